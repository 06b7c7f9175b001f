"""Backbones and the multi-scale feature maps (Sec. 4.1): clip -> L maps (B, D, T', H_l, W_l).

ViT-B as VideoMAE has it (Conv3d patches of 2x16x16, T' = T/2) with four maps made from its last
features, strides 4, 8, 16, 32; ir-CSN-152 with three of its stages and a fourth map, strides 8, 16,
16, 32, time halved in each of stages 2, 3 and 4 (T' then differs from level to level); and a small
convolutional stem for the synthetic preset, strides 8 and 16, T' = T. A backbone gives its raw
feature maps; its neck turns them into L maps of D channels (256, synthetic 64), and starts from
scratch and trains at the full rate. The paper has "1D convolutions" there. As in the released model
they are 1x1x1 for CSN's three stages; its fourth map is a 3x3x3 of stride 2. The ViT's maps have a
1x1x1 and a 3x3x3 each, behind transposed convolutions (strides 4 and 8) or pooling (32).

As in the released model, the ViT does not mask padding, and a side that 16 does not divide is
floored. The paper's multi-scale maps are "outputs from intermediate layers": three of CSN's are,
the ViT's are all made from its last features, as the released model has them.

The second half of the file loads published weights, and opens any PyTorch file without executing
what is in it.
"""

# B clips, T frames, T' time steps of the backbone, H, W cells, D channels, N tokens (T'HW), M heads

import argparse
import re
from collections import OrderedDict
from contextlib import contextmanager, nullcontext
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from scipy.io import loadmat
from safetensors.torch import load_file
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, of colours in [0, 1]


def normalise(clips, padding_mask=None):
    """uint8 clips (B, 3, T, H, W) -> float32, minus ImageNet's mean, divided by its deviation.

    Where padding_mask (B, H, W) is True, the result is 0. The statistics are plain numbers, channel
    by channel: a tensor of them would be copied from the host at each call.
    """
    channels = []
    for channel, (mean, std) in enumerate(zip(MEAN, STD)):
        channels.append((clips[:, channel].float() - 255 * mean) / (255 * std))
    clips = torch.stack(channels, dim=1)  # (B, 3, T, H, W)
    if padding_mask is None:
        return clips
    return clips.masked_fill(padding_mask[:, None, None], 0.0)


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of (B, D, T, H, W)."""

    def forward(self, x):
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)  # (B, D, T, H, W)


def running_index_table(positions, width):
    """VideoMAE's fixed sinusoids (positions, width) over one running index of all tokens: sine on
    even, cosine on odd channels."""
    channel = torch.arange(width, dtype=torch.float64)
    position = torch.arange(positions, dtype=torch.float64)[:, None]
    angle = position / 10000 ** (2 * (channel // 2) / width)  # (positions, width)
    return torch.where(channel % 2 == 0, angle.sin(), angle.cos()).float()


def run_block(block, x, recompute):
    """block(x); with recompute, its activations are computed anew in the backward pass, not kept.

    Then BatchNorm's running statistics move in the first pass only. torch.compile sees to that by
    itself, and takes no such contexts.
    """
    if not recompute or not torch.is_grad_enabled():
        return block(x)
    if torch.compiler.is_compiling():
        return checkpoint(block, x, use_reentrant=False)
    return checkpoint(block, x, use_reentrant=False,
                      context_fn=lambda: (nullcontext(), statistics_kept(block)))


@contextmanager
def statistics_kept(block):
    """BatchNorms of the block, synchronised ones too, do not move their running statistics while
    this lasts."""
    norms = [module for module in block.modules() if isinstance(module, _BatchNorm)]
    before = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
        norm.num_batches_tracked = norm.num_batches_tracked.clone()  # it is counted in place
    try:
        yield
    finally:
        for norm, (momentum, num_batches) in zip(norms, before):
            norm.momentum, norm.num_batches_tracked = momentum, num_batches


class ViTBlock(nn.Module):
    """Pre-norm transformer block; q and v have a bias and k has none. (B, N, width) -> the same."""

    def __init__(self, width, num_heads, drop_path):
        super().__init__()
        self.num_heads, self.drop_path = num_heads, drop_path
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.proj = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def keep(self, branch):
        """Stochastic depth: drops the branch of a clip with probability drop_path in training."""
        if not self.training or self.drop_path == 0.0:
            return branch
        kept = torch.rand(len(branch), 1, 1, device=branch.device) >= self.drop_path
        return branch * kept.to(branch.dtype) / (1.0 - self.drop_path)

    def attention(self, x):
        batch, tokens, width = x.shape
        bias = torch.cat([self.q_bias, torch.zeros_like(self.v_bias), self.v_bias])
        qkv = F.linear(x, self.qkv.weight, bias)  # (B, N, 3 * width)
        qkv = qkv.view(batch, tokens, 3, self.num_heads, -1)  # (B, N, 3, M, width/M)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)  # each (B, M, N, width/M)
        attended = F.scaled_dot_product_attention(query, key, value)
        return self.proj(attended.transpose(1, 2).reshape(batch, tokens, width))  # (B, N, width)

    def forward(self, x):
        x = x + self.keep(self.attention(self.norm1(x)))
        return x + self.keep(self.fc2(F.gelu(self.fc1(self.norm2(x)))))


class ViT(nn.Module):
    """VideoMAE's encoder: clips (B, 3, T, H, W) -> a list of one map, its last features
    (B, width, T/2, H//16, W//16).

    drop_path is the stochastic depth of the last block, linear over depth; recompute as in
    `run_block`.
    """

    def __init__(self, frames, depth, width, num_heads, drop_path, recompute=False):
        super().__init__()
        self.frames, self.recompute = frames, recompute
        self.patch_embed = nn.Conv3d(3, width, kernel_size=(2, 16, 16), stride=(2, 16, 16))
        rates = [drop_path * number / max(1, depth - 1) for number in range(depth)]
        self.blocks = nn.ModuleList([ViTBlock(width, num_heads, rate) for rate in rates])
        self.norm = nn.LayerNorm(width, eps=1e-6)
        positions = running_index_table(frames // 2 * 14 * 14, width)
        self.register_buffer("positions", positions, persistent=False)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def position_table(self, steps, height, width):
        """(T'HW, channels): the table of T' x 14 x 14 positions, as it is where a clip has as many
        tokens, otherwise resized in space, each time step by itself, bicubic."""
        if steps != self.frames // 2:
            raise ValueError(f"a clip of {2 * steps} frames in a ViT built for {self.frames}: "
                             "set Config.frames")
        if height * width == 14 * 14:
            return self.positions
        table = self.positions.view(steps, 14, 14, -1).permute(0, 3, 1, 2)  # (T', channels, 14, 14)
        table = F.interpolate(table, size=(height, width), mode="bicubic", align_corners=False)
        return table.permute(0, 2, 3, 1).flatten(0, 2)  # (T'HW, channels)

    def forward(self, clips):
        x = self.patch_embed(clips)  # (B, channels, T', H, W)
        batch, channels, steps, height, width = x.shape
        x = x.flatten(2).transpose(1, 2)  # (B, N, channels)
        x = x + self.position_table(steps, height, width)
        for block in self.blocks:
            x = run_block(block, x, self.recompute)
        x = self.norm(x).transpose(1, 2)  # (B, channels, N)
        return [x.unflatten(2, (steps, height, width))]  # (B, channels, T', H, W)


def to_dim(channels, dim):
    """The end of each level of `ViTNeck`: (B, channels, T', H, W) -> (B, D, T', H, W)."""
    return [nn.Conv3d(channels, dim, kernel_size=1, bias=False), ChannelNorm(dim, eps=1e-6),
            nn.Conv3d(dim, dim, kernel_size=3, padding=1, bias=False)]


class ViTNeck(nn.ModuleList):
    """Four maps from the ViT's last features: (B, width, T', H, W) -> 4 x (B, D, T', H_l, W_l)."""

    def __init__(self, width, dim):
        half, quarter = width // 2, width // 4
        twice = dict(kernel_size=(1, 2, 2), stride=(1, 2, 2))
        stride4 = nn.Sequential(
            nn.ConvTranspose3d(width, half, **twice), ChannelNorm(half, eps=1e-6), nn.GELU(),
            nn.ConvTranspose3d(half, quarter, **twice), *to_dim(quarter, dim))
        stride8 = nn.Sequential(nn.ConvTranspose3d(width, half, **twice), *to_dim(half, dim))
        stride16 = nn.Sequential(*to_dim(width, dim))
        stride32 = nn.Sequential(nn.MaxPool3d(**twice), *to_dim(width, dim))
        super().__init__([stride4, stride8, stride16, stride32])

    def forward(self, features):
        return [level(features[0]) for level in self]


def csn_norm(channels):
    return nn.BatchNorm3d(channels, eps=1e-3, momentum=0.1)


class Bottleneck(nn.Module):
    """ir-CSN's block: 1x1x1, 3x3x3 depth-wise (with the stride) and 1x1x1 convolutions, each with a
    BatchNorm, ReLU, residual. (B, channels, T, H, W) -> (B, 4 * planes, T', H', W').

    The convolutions are counted 1, 3, 4 as in the published weights.
    """

    def __init__(self, channels, planes, stride):
        super().__init__()
        self.conv1 = nn.Conv3d(channels, planes, kernel_size=1, bias=False)
        self.bn1 = csn_norm(planes)
        self.conv3 = nn.Conv3d(planes, planes, kernel_size=3, stride=stride, padding=1,
                               groups=planes, bias=False)
        self.bn3 = csn_norm(planes)
        self.conv4 = nn.Conv3d(planes, 4 * planes, kernel_size=1, bias=False)
        self.bn4 = csn_norm(4 * planes)
        self.down_sample = nn.Identity()
        if channels != 4 * planes:
            self.down_sample = nn.Sequential(
                nn.Conv3d(channels, 4 * planes, kernel_size=1, stride=stride, bias=False),
                csn_norm(4 * planes))

    def forward(self, x):
        shortcut = self.down_sample(x)
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn3(self.conv3(x)))
        return F.relu(self.bn4(self.conv4(x)) + shortcut)


def csn_stage(depth, channels, planes, stride):
    """A stage of `depth` blocks, of which the first has the stride."""
    blocks = [Bottleneck(channels, planes, stride)]
    for _ in range(depth - 1):
        blocks.append(Bottleneck(4 * planes, planes, stride=1))
    return nn.Sequential(*blocks)


CSN_DEPTHS = (3, 8, 36, 3)  # blocks of the four stages


class CSN152(nn.Module):
    """ir-CSN-152: clips (B, 3, T, H, W) -> stages 2, 3, 4: (B, 512, T/2, H/8, W/8), (B, 1024, T/4,
    H/16, W/16), (B, 2048, T/8, H/16, W/16): the last keeps its spatial stride at 1. recompute as in
    `run_block`."""

    def __init__(self, recompute=False):
        super().__init__()
        self.recompute = recompute
        self.conv1 = nn.Conv3d(3, 64, kernel_size=(3, 7, 7), stride=(1, 2, 2), padding=(1, 3, 3),
                               bias=False)
        self.bn1 = csn_norm(64)
        self.layer1 = csn_stage(CSN_DEPTHS[0], channels=64, planes=64, stride=(1, 1, 1))
        self.layer2 = csn_stage(CSN_DEPTHS[1], channels=256, planes=128, stride=(2, 2, 2))
        self.layer3 = csn_stage(CSN_DEPTHS[2], channels=512, planes=256, stride=(2, 2, 2))
        self.layer4 = csn_stage(CSN_DEPTHS[3], channels=1024, planes=512, stride=(2, 1, 1))

    def forward(self, clips):
        x = F.relu(self.bn1(self.conv1(clips)))
        x = F.max_pool3d(x, kernel_size=(1, 3, 3), stride=(1, 2, 2), padding=(0, 1, 1))
        features = []
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            for block in stage:
                x = run_block(block, x, self.recompute)
            features.append(x)
        return features[1:]


class CSNNeck(nn.ModuleList):
    """Four maps (B, D, T_l, H_l, W_l): stages 2, 3, 4 by a 1x1x1 convolution each, a fourth from
    stage 4 by a 3x3x3 one of stride 2; GroupNorm on each."""

    def __init__(self, dim):
        stage2 = nn.Conv3d(512, dim, kernel_size=1)
        stage3 = nn.Conv3d(1024, dim, kernel_size=1)
        stage4 = nn.Conv3d(2048, dim, kernel_size=1)
        coarse = nn.Conv3d(2048, dim, kernel_size=3, stride=(1, 2, 2), padding=1)
        levels = []
        for convolution in (stage2, stage3, stage4, coarse):
            nn.init.xavier_uniform_(convolution.weight)
            nn.init.zeros_(convolution.bias)
            levels.append(nn.Sequential(convolution, nn.GroupNorm(32, dim)))
        super().__init__(levels)

    def forward(self, features):
        return [level(x) for level, x in zip(self, [*features, features[-1]])]


def conv_norm_relu(channels, out_channels, kernel_size, stride=1):
    padding = tuple(size // 2 for size in kernel_size)
    return [nn.Conv3d(channels, out_channels, kernel_size, stride, padding, bias=False),
            nn.BatchNorm3d(out_channels), nn.ReLU(inplace=True)]


class ConvStem(nn.Module):
    """The synthetic preset's backbone: clips (B, 3, T, H, W) -> (B, 96, T, H/8, W/8) and
    (B, 128, T, H/16, W/16).

    Four stages, each halving space. Stages 2 and 3 look at three frames at a time; stages 3 and 4
    have a second convolution, without which a cell of the coarse map would see no more than a
    figure's height.
    """

    def __init__(self):
        super().__init__()
        half = (1, 2, 2)
        self.stages = nn.ModuleList([
            nn.Sequential(*conv_norm_relu(3, 16, (1, 3, 3), half)),
            nn.Sequential(*conv_norm_relu(16, 48, (3, 3, 3), half)),
            nn.Sequential(*conv_norm_relu(48, 96, (3, 3, 3), half),
                          *conv_norm_relu(96, 96, (1, 3, 3))),
            nn.Sequential(*conv_norm_relu(96, 128, (1, 3, 3), half),
                          *conv_norm_relu(128, 128, (1, 3, 3)))])
        for module in self.modules():
            if isinstance(module, nn.Conv3d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                # a tenth to a fifth faster on the CPU
                channels_last = module.weight.detach().contiguous(
                    memory_format=torch.channels_last_3d)
                module.weight = nn.Parameter(channels_last)

    def forward(self, clips):
        x = clips.contiguous(memory_format=torch.channels_last_3d)
        features = []
        for stage in self.stages:
            x = stage(x)
            features.append(x)
        return features[2:]


class ConvNeck(nn.ModuleList):
    """Each map of the stem by a 1x1x1 convolution and a channel norm: 2 x (B, D, T, H_l, W_l)."""

    def __init__(self, dim):
        stage3 = nn.Sequential(nn.Conv3d(96, dim, kernel_size=1), ChannelNorm(dim))
        stage4 = nn.Sequential(nn.Conv3d(128, dim, kernel_size=1), ChannelNorm(dim))
        super().__init__([stage3, stage4])

    def forward(self, features):
        return [level(x) for level, x in zip(self, features)]


# --------------------------------------------------------------------------------------------------
# Files of weights

class YacsConfig:
    """Stands in for yacs.config.CfgNode, a dict with attributes, so that yacs is not needed."""

    def __new__(cls, *arguments):
        return OrderedDict()  # the safe loader fills no other subclass of dict


def numpy_names():
    """What arrays and numbers of numpy are pickled as, under numpy's new and old module names."""
    rebuild_array = np.zeros(1).__reduce__()[0]
    rebuild_number = np.float64(0).__reduce__()[0]
    names = [np.ndarray, np.dtype]
    for module in ("numpy._core.multiarray", "numpy.core.multiarray"):
        names.append((rebuild_array, f"{module}._reconstruct"))
        names.append((rebuild_number, f"{module}.scalar"))
    for code in "?" + np.typecodes["AllInteger"] + np.typecodes["AllFloat"]:
        names.append(type(np.dtype(code)))
    return names


# What a file may ask for beside tensors and plain containers: VideoMAE's files hold their command
# line, those of this paper's authors their settings and the states of numpy's random numbers.
ADMITTED = [argparse.Namespace, (YacsConfig, "yacs.config.CfgNode"), *numpy_names()]


@contextmanager
def reading(path, kind):
    """Whatever a reader raises on a broken file is a ValueError that names the file."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        yield
    except Exception as error:
        # torch's safe loader puts what it found between advice to load the file unsafely.
        found = re.sub(r"(?s).*WeightsUnpickler error:|Check the documentation.*", "", str(error))
        reason = f"{type(error).__name__}: {found.strip()} ({path.stat().st_size} bytes)"
        wanted = re.search(r"GLOBAL (\S+)", found)
        if wanted:
            reason = (f"it asks for {wanted[1]}, and nothing that a file brings is executed here. "
                      "If you trust it, save its tensors alone, in the code that it comes from")
        raise ValueError(f"{path} cannot be read as {kind}: {reason}") from error


def open_checkpoint(path):
    """The content of a PyTorch file, its tensors on the CPU. Nothing in it is executed: it may hold
    tensors, plain containers and what ADMITTED lists. ValueError if it cannot be read so."""
    with reading(Path(path), "a checkpoint"), torch.serialization.safe_globals(ADMITTED):
        return torch.load(path, map_location="cpu", weights_only=True)


# What is put in front of all names of a file: by DistributedDataParallel, torch.compile, trainers,
# and libraries in which a model is a backbone and a head.
PREFIXES = ("module.", "_orig_mod.", "model.", "backbone.")


def strip_prefixes(tensors):
    """The same tensors with PREFIXES taken off, each where all names carry it, in any order."""
    while tensors:
        names = [str(name) for name in tensors]
        prefix = names[0].partition(".")[0] + "."
        if prefix not in PREFIXES or not all(name.startswith(prefix) for name in names):
            break
        tensors = {name.removeprefix(prefix): value for name, value in tensors.items()}
    return tensors


def read_weights(path):
    """The tensors of a weight file by name, without prefixes: PyTorch (also below `module`, `model`
    or `state_dict`), safetensors or Matlab. ValueError if it is none of these."""
    path = Path(path)
    if path.suffix == ".safetensors":
        with reading(path, "safetensors"):
            return strip_prefixes(load_file(path))
    if path.suffix == ".mat":
        with reading(path, "a Matlab file"):
            arrays = loadmat(path)
            header = ("__header__", "__version__", "__globals__")
            return {name: torch.from_numpy(arrays[name]) for name in arrays if name not in header}
    content = open_checkpoint(path)
    for wrapping in ("module", "model", "state_dict"):
        if isinstance(content, dict) and isinstance(content.get(wrapping), dict):
            content = content[wrapping]
    if not isinstance(content, dict):
        raise ValueError(f"{path}: not a dict of tensors but {type(content).__name__}")
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            raise ValueError(f"{path}: not a dict of tensors by name: {name!r} is of type "
                             f"{type(value).__name__}")
    return strip_prefixes(content)


# What published files hold beside the backbone: heads of classification (VideoMAE's, mmaction2's,
# Hugging Face's, Caffe2's) and the decoder of a pre-training.
LEFT_OUT = (r"(^|\.)(head\.|cls_head\.|fc_norm\.|classifier\.|last_out|pred|decoder\.|decoder_norm|"
            r"encoder_to_decoder|mask_token)")

# Parts of names of a ViT and what they become here, in this order.
VIT_NAMES = [
    # Hugging Face's VideoMAE
    (r"^(videomae\.)?embeddings\.patch_embeddings\.projection\.", "patch_embed."),
    (r"^(videomae\.)?encoder\.layer\.", "blocks."),
    (r"^(videomae\.)?layernorm\.", "norm."),
    (r"\.attention\.attention\.", "."),
    (r"\.attention\.output\.dense\.", ".proj."),
    (r"\.intermediate\.dense\.", ".fc1."),
    (r"\.output\.dense\.", ".fc2."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    # mmaction2's
    (r"^patch_embed\.projection\.", "patch_embed."),
    (r"\.mlp\.layers\.0\.0\.", ".fc1."),
    (r"\.mlp\.layers\.1\.", ".fc2."),
    # VideoMAE's own; that of a pre-training begins with "encoder."
    (r"^encoder\.", ""),
    (r"^patch_embed\.proj\.", "patch_embed."),
    (r"\.(attn|mlp)\.", ".")]


def vit_names(tensors):
    """A ViT's tensors as VideoMAE, Hugging Face or mmaction2 name them, under this file's names."""
    named = {}
    for name, value in tensors.items():
        for pattern, ours in VIT_NAMES:
            name = re.sub(pattern, ours, name)
        named[name] = value
    for name in list(named):  # Hugging Face has query, key and value apart
        if name.endswith(".query.weight"):
            parts = [name.replace("query", part) for part in ("query", "key", "value")]
            if all(part in named for part in parts):
                qkv = torch.cat([named.pop(part) for part in parts])  # (3 * width, width)
                named[name.replace("query", "qkv")] = qkv
    return named


def csn_names(tensors):
    """ir-CSN-152's tensors as Caffe2 names them, blocks counted 0..49 over the stages, under this
    file's names; vectors, (1, n) in a Matlab file, are made (n,)."""
    convolutions, norms = {"conv1_w": "conv1.weight"}, {"conv1_spatbn_relu": "bn1"}
    number = 0
    for stage, depth in enumerate(CSN_DEPTHS, start=1):
        for index in range(depth):
            block = f"layer{stage}.{index}"
            for conv in (1, 3, 4):
                convolutions[f"comp_{number}_conv_{conv}_w"] = f"{block}.conv{conv}.weight"
                norms[f"comp_{number}_spatbn_{conv}"] = f"{block}.bn{conv}"
            shortcut = f"shortcut_projection_{number}"
            convolutions[f"{shortcut}_w"] = f"{block}.down_sample.0.weight"
            norms[shortcut] = norms[f"{shortcut}_spatbn"] = f"{block}.down_sample.1"
            number += 1
    vectors = {}
    for caffe2, ours in norms.items():
        vectors[f"{caffe2}_s"] = f"{ours}.weight"
        vectors[f"{caffe2}_b"] = f"{ours}.bias"
        vectors[f"{caffe2}_rm"] = f"{ours}.running_mean"
        vectors[f"{caffe2}_riv"] = f"{ours}.running_var"
    named = {}
    for name, value in tensors.items():
        if name in vectors:
            named[vectors[name]] = value.flatten()
        else:
            named[convolutions.get(name, name)] = value
    return named


def load_backbone(model, path):
    """Published weights into `model.backbone`: every tensor of the file used or left out by name,
    every shape checked, values cast to the model's precision.

    A ViT takes VideoMAE's files as its authors, Hugging Face or mmaction2 name them (a fine-tuned
    one has no last LayerNorm: ours keeps its start); ir-CSN-152 the Kinetics / IG-65M `.mat`; any
    backbone a file of its own names. Raises ValueError with the names, the model untouched.
    """
    backbone = model.backbone
    own = backbone.state_dict()
    tensors = read_weights(path)
    fine_tuned = any("fc_norm." in name for name in tensors)
    tensors = {name: value for name, value in tensors.items() if not re.search(LEFT_OUT, name)}
    tensors = strip_prefixes(tensors)  # mmaction2's, now that its head is gone
    if isinstance(backbone, ViT):
        tensors = vit_names(tensors)
    elif isinstance(backbone, CSN152):
        tensors = csn_names(tensors)

    problems = []
    for name, value in tensors.items():
        if name not in own:
            if not is_running_index_table(name, value) and not in_absent_stage(name, own):
                problems.append(f"not a tensor of this backbone: {name}")
        elif value.shape != own[name].shape:
            problems.append(f"{name}: shape {tuple(value.shape)}, expected "
                            f"{tuple(own[name].shape)}")
        elif value.is_floating_point() != own[name].is_floating_point():
            problems.append(f"{name}: {value.dtype}, expected {own[name].dtype}")
    for name in own:
        optional = name.endswith("num_batches_tracked") or (fine_tuned and name.startswith("norm."))
        if name not in tensors and not optional:
            problems.append(f"missing: {name}")
    if problems:
        raise ValueError(f"{path} does not fit the backbone ({len(problems)} problems):\n  "
                         + "\n  ".join(problems[:20]))
    backbone.load_state_dict(tensors, strict=False)  # strictness is above, with the names
    return model


def is_running_index_table(name, value):
    """Whether a tensor is VideoMAE's fixed table, (1, positions, width), which mmaction2 saves."""
    if name != "pos_embed" or value.dim() != 3:
        return False
    return torch.allclose(value[0].float(), running_index_table(*value.shape[1:]), atol=1e-2)


def in_absent_stage(name, own):
    """Whether a tensor is of a stage that the model, reading an earlier one only, does not have."""
    stage = re.match(r"(stages\.[0-3]|layer[1-4])\.", name)
    return bool(stage) and not any(other.startswith(stage[0]) for other in own)
