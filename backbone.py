"""Backbones and the multi-scale feature maps (Sec. 4.1): clip (B, 3, T, H, W) -> L maps (B, D, T', H_l, W_l).

ViT-B as VideoMAE has it (Conv3d patches of 2x16x16, T' = T/2) with four maps made from its last features, strides
4, 8, 16, 32; ir-CSN-152 with three of its stages and a fourth map, strides 8, 16, 16, 32, time halved from stage 2
on; and a small convolutional stem for the synthetic preset, strides 8 and 16, T' = T. A backbone gives its raw
feature maps; its neck turns them into L maps of D channels. The neck starts from scratch and trains at the full rate.

The ViT does not mask padding (the released model does not); a side that 16 does not divide is floored.
"""

# B clips, T frames, T' time steps of the backbone, H, W cells, D channels, N tokens (T'HW), M heads

import argparse
import re
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint


MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)    # ImageNet's, of colours in [0, 1]


def normalise(clips, padding_mask=None):
    """uint8 clips (B, 3, T, H, W) -> float32, less ImageNet's mean over its deviation, zeros on padding (B, H, W)."""
    mean, std = (torch.stack([torch.full((), 255 * x, device=clips.device) for x in of_channels]).view(3, 1, 1, 1)
                 for of_channels in (MEAN, STD))
    clips = (clips.float() - mean) / std
    return clips if padding_mask is None else clips.masked_fill(padding_mask[:, None, None], 0.0)


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of (B, D, T, H, W)."""

    def forward(self, x):
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)  # (B, D, T, H, W)


def running_index_table(positions, width):
    """Sinusoid table (positions, width) over one running index, as VideoMAE has it: sine on even, cosine on odd channels."""
    channel = torch.arange(width, dtype=torch.float64)
    angle = torch.arange(positions, dtype=torch.float64)[:, None] / 10000 ** (2 * (channel // 2) / width)
    return torch.where(channel % 2 == 0, angle.sin(), angle.cos()).float()


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
        qkv = F.linear(x, self.qkv.weight, bias).view(batch, tokens, 3, self.num_heads, -1)  # (B, N, 3, M, width/M)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)  # each (B, M, N, width/M)
        attended = F.scaled_dot_product_attention(query, key, value)
        return self.proj(attended.transpose(1, 2).reshape(batch, tokens, width))  # (B, N, width)

    def forward(self, x):
        x = x + self.keep(self.attention(self.norm1(x)))
        return x + self.keep(self.fc2(F.gelu(self.fc1(self.norm2(x)))))


class ViT(nn.Module):
    """VideoMAE's encoder: clips (B, 3, T, H, W) -> its last features, one map (B, width, T/2, H//16, W//16)."""

    def __init__(self, frames, depth, width, num_heads, drop_path, recompute=False):
        super().__init__()
        self.recompute = recompute
        self.patch_embed = nn.Conv3d(3, width, kernel_size=(2, 16, 16), stride=(2, 16, 16))
        rates = [drop_path * number / max(1, depth - 1) for number in range(depth)]
        self.blocks = nn.ModuleList([ViTBlock(width, num_heads, rate) for rate in rates])
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.register_buffer("positions", running_index_table(frames // 2 * 14 * 14, width), persistent=False)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def position_table(self, steps, height, width):
        """(N, channels): the fixed table, resized in space (bicubic, per time step) when the token count differs."""
        table = self.positions
        if len(table) != steps * 14 * 14:
            raise ValueError(f"a clip of {2 * steps} frames in a ViT built for {2 * len(table) // 196}: set Config.frames")
        if steps * height * width == len(table):
            return table
        table = table.view(steps, 14, 14, -1).permute(0, 3, 1, 2)  # (T', width, 14, 14)
        table = F.interpolate(table, size=(height, width), mode="bicubic", align_corners=False)
        return table.permute(0, 2, 3, 1).flatten(0, 2)  # (T'HW, width)

    def forward(self, clips):
        x = self.patch_embed(clips)  # (B, width, T', H, W)
        batch, channels, steps, height, width = x.shape
        x = x.flatten(2).transpose(1, 2) + self.position_table(steps, height, width)  # (B, N, width)
        for block in self.blocks:
            recompute = self.recompute and torch.is_grad_enabled()
            x = checkpoint(block, x, use_reentrant=False) if recompute else block(x)
        return [self.norm(x).transpose(1, 2).reshape(batch, channels, steps, height, width)]  # (B, width, T', H, W)


class ViTNeck(nn.ModuleList):
    """Four maps (strides 4, 8, 16, 32) from the ViT's last features; (B, width, T', H, W) -> 4 x (B, D, T', H_l, W_l)."""

    def __init__(self, width, dim):
        half, quarter, up = width // 2, width // 4, dict(kernel_size=(1, 2, 2), stride=(1, 2, 2))
        resize = [
            [nn.ConvTranspose3d(width, half, **up), ChannelNorm(half, eps=1e-6), nn.GELU(),
             nn.ConvTranspose3d(half, quarter, **up)],
            [nn.ConvTranspose3d(width, half, **up)], [], [nn.MaxPool3d(**up)],
        ]
        super().__init__(nn.Sequential(
            *layers, nn.Conv3d(channels, dim, kernel_size=1, bias=False), ChannelNorm(dim, eps=1e-6),
            nn.Conv3d(dim, dim, kernel_size=3, padding=1, bias=False),
        ) for layers, channels in zip(resize, (quarter, half, width, width)))

    def forward(self, features):
        return [level(features[0]) for level in self]


class Bottleneck(nn.Module):
    """ir-CSN's: 1x1x1, 3x3x3 depth-wise (holding the stride), 1x1x1 convolutions, BatchNorm each, ReLU, residual."""

    def __init__(self, channels, planes, stride):
        super().__init__()
        norm = dict(eps=1e-3, momentum=0.1)
        self.conv1 = nn.Conv3d(channels, planes, kernel_size=1, bias=False)
        self.bn1 = nn.BatchNorm3d(planes, **norm)
        self.conv3 = nn.Conv3d(planes, planes, kernel_size=3, stride=stride, padding=1, groups=planes, bias=False)
        self.bn3 = nn.BatchNorm3d(planes, **norm)
        self.conv4 = nn.Conv3d(planes, 4 * planes, kernel_size=1, bias=False)
        self.bn4 = nn.BatchNorm3d(4 * planes, **norm)
        self.down_sample = nn.Identity() if channels == 4 * planes else nn.Sequential(
            nn.Conv3d(channels, 4 * planes, kernel_size=1, stride=stride, bias=False), nn.BatchNorm3d(4 * planes, **norm))

    def forward(self, x):
        shortcut = self.down_sample(x)
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn3(self.conv3(x)))
        return F.relu(self.bn4(self.conv4(x)) + shortcut)


class CSN152(nn.Module):
    """ir-CSN-152: clips (B, 3, T, H, W) -> stages 2, 3, 4 (512, 1024, 2048 channels), strides 8, 16, 16, T/2, T/4, T/8."""

    def __init__(self, recompute=False):
        super().__init__()
        self.recompute = recompute
        self.conv1 = nn.Conv3d(3, 64, kernel_size=(3, 7, 7), stride=(1, 2, 2), padding=(1, 3, 3), bias=False)
        self.bn1 = nn.BatchNorm3d(64, eps=1e-3, momentum=0.1)
        channels, strides = 64, [(1, 1, 1), (2, 2, 2), (2, 2, 2), (2, 1, 1)]
        for number, (depth, stride) in enumerate(zip((3, 8, 36, 3), strides), start=1):
            planes = 64 * 2 ** (number - 1)
            blocks = [Bottleneck(channels, planes, stride)]
            blocks += [Bottleneck(4 * planes, planes, 1) for _ in range(depth - 1)]
            setattr(self, f"layer{number}", nn.Sequential(*blocks))
            channels = 4 * planes

    def forward(self, clips):
        x = F.relu(self.bn1(self.conv1(clips)))
        x = F.max_pool3d(x, kernel_size=(1, 3, 3), stride=(1, 2, 2), padding=(0, 1, 1))
        features = []
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            for block in stage:
                recompute = self.recompute and torch.is_grad_enabled()
                x = checkpoint(block, x, use_reentrant=False) if recompute else block(x)
            features.append(x)
        return features[1:]


class CSNNeck(nn.ModuleList):
    """Stages 2, 3, 4 by 1x1x1 convolution, a fourth map from the last by a strided 3x3x3 one, GroupNorm each."""

    def __init__(self, dim):
        convolutions = [nn.Conv3d(channels, dim, kernel_size=1) for channels in (512, 1024, 2048)]
        convolutions.append(nn.Conv3d(2048, dim, kernel_size=3, stride=(1, 2, 2), padding=1))
        for convolution in convolutions:
            nn.init.xavier_uniform_(convolution.weight)
            nn.init.zeros_(convolution.bias)
        super().__init__(nn.Sequential(convolution, nn.GroupNorm(32, dim)) for convolution in convolutions)

    def forward(self, features):
        return [level(x) for level, x in zip(self, [*features, features[-1]])]


class ConvStem(nn.Module):
    """The synthetic preset's backbone: four stages, each halving space, T' = T; maps at strides 8 and 16.

    A stage begins with a 3x3 convolution of stride 2, over three frames as well in the middle two; the last two have a
    second one, without which a cell of the coarse map would see no more than a figure's height.
    """

    def __init__(self, widths=(16, 48, 96, 128)):
        super().__init__()
        self.stages = nn.ModuleList()
        for before, after, steps, again in zip((3, *widths), widths, (1, 3, 3, 1), (False, False, True, True)):
            layers = [nn.Conv3d(before, after, kernel_size=(steps, 3, 3), stride=(1, 2, 2), padding=(steps // 2, 1, 1),
                                bias=False), nn.BatchNorm3d(after), nn.ReLU(inplace=True)]
            if again:
                layers += [nn.Conv3d(after, after, kernel_size=(1, 3, 3), padding=(0, 1, 1), bias=False),
                           nn.BatchNorm3d(after), nn.ReLU(inplace=True)]
            self.stages.append(nn.Sequential(*layers))
        for module in self.modules():
            if isinstance(module, nn.Conv3d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        self.to(memory_format=torch.channels_last_3d)  # a tenth to a fifth faster on the CPU

    def forward(self, clips):
        features = [clips.contiguous(memory_format=torch.channels_last_3d)]
        for stage in self.stages:
            features.append(stage(features[-1]))
        return features[3:]  # (B, 96, T, H/8, W/8), (B, 128, T, H/16, W/16)


class ConvNeck(nn.ModuleList):
    """Each map of the stem by a 1x1x1 convolution and a channel norm to D channels."""

    def __init__(self, dim, widths=(96, 128)):
        super().__init__(nn.Sequential(nn.Conv3d(width, dim, kernel_size=1), ChannelNorm(dim)) for width in widths)

    def forward(self, features):
        return [level(x) for level, x in zip(self, features)]


# ---------------------------------------------------------------------------------------------------------------------
# Published weights

# What a file holds beside the backbone: classification heads, and the decoder of a pre-training.
LEFT_OUT = r"head\.|fc_norm\.|classifier\.|decoder\.|encoder_to_decoder|mask_token|decoder_norm|__|last_out|pred"

# Names of the Hugging Face VideoMAE models and VideoMAE's own.
HUGGING_FACE_NAMES = [
    (r"^(videomae\.)?embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^(videomae\.)?encoder\.layer\.", "blocks."),
    (r"^(videomae\.)?layernorm\.", "norm."),
    (r"\.attention\.attention\.(q_bias|v_bias|query|key|value)", r".attn.\1"),
    (r"\.attention\.output\.dense\.", ".attn.proj."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."), (r"\.output\.dense\.", ".mlp.fc2."),
    (r"\.layernorm_before\.", ".norm1."), (r"\.layernorm_after\.", ".norm2.")]


@contextmanager
def reading(path, kind):
    """Whatever a reader raises on a broken file is a ValueError that names it."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        yield
    except Exception as error:
        raise ValueError(f"{path} cannot be read as {kind} ({type(error).__name__}: {str(error)[:200]})") from error


def open_checkpoint(path):
    """The content of a PyTorch file. Nothing in it is executed: beside tensors and plain containers only
    argparse.Namespace is admitted. ValueError if it cannot be read."""
    with reading(Path(path), "a checkpoint"), torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(path, map_location="cpu", weights_only=True)


def read_weights(path):
    """The tensors of a weight file by name: PyTorch (`module`, `model` wrapping undone), safetensors or Matlab."""
    path = Path(path)
    if path.suffix in (".mat", ".safetensors"):
        from safetensors.torch import load_file
        from scipy.io import loadmat
        with reading(path, "weights"):
            if path.suffix == ".safetensors":
                return load_file(path)
            return {name: torch.from_numpy(value) for name, value in loadmat(path).items() if not name.startswith("__")}
    content = open_checkpoint(path)
    for wrapping in ("module", "model", "state_dict"):
        if isinstance(content, dict) and isinstance(content.get(wrapping), dict):
            content = content[wrapping]
    if not isinstance(content, dict) or not all(isinstance(value, torch.Tensor) for value in content.values()):
        raise ValueError(f"{path}: not a dict of tensors")
    return content


def vit_names(tensors):
    """VideoMAE's tensors, in its own naming or in Hugging Face's, under this project's names."""
    named = {}
    for name, value in tensors.items():
        if any(part in name for part in ("encoder.layer.", "embeddings.")) or name.startswith(("videomae.", "layernorm.")):
            for pattern, ours in HUGGING_FACE_NAMES:
                name = re.sub(pattern, ours, name)
        name = re.sub(r"^encoder\.", "", name).replace("patch_embed.proj.", "patch_embed.")
        named[re.sub(r"\.(attn|mlp)\.", ".", name)] = value
    for name in [name for name in named if name.endswith(".query.weight")]:  # query, key, value apart
        parts = [name.replace("query", part) for part in ("query", "key", "value")]
        if all(part in named for part in parts):
            named[name.replace("query", "qkv")] = torch.cat([named.pop(part) for part in parts])
    return named


def csn_names(tensors):
    """ir-CSN-152's tensors in Caffe2's naming, blocks counted 0..49 over the stages, under this project's names."""
    blocks = [f"layer{stage}.{block}" for stage, depth in enumerate((3, 8, 36, 3), start=1) for block in range(depth)]
    leaves = {"s": "weight", "b": "bias", "rm": "running_mean", "riv": "running_var"}
    patterns = [
        (r"conv1_w", lambda: "conv1.weight"),
        (r"conv1_spatbn_relu_(s|b|rm|riv)", lambda leaf: f"bn1.{leaves[leaf]}"),
        (r"comp_(\d+)_conv_([134])_w", lambda n, conv: f"{blocks[int(n)]}.conv{conv}.weight"),
        (r"comp_(\d+)_spatbn_([134])_(s|b|rm|riv)", lambda n, conv, leaf: f"{blocks[int(n)]}.bn{conv}.{leaves[leaf]}"),
        (r"shortcut_projection_(\d+)_w", lambda n: f"{blocks[int(n)]}.down_sample.0.weight"),
        (r"shortcut_projection_(\d+)_(?:spatbn_)?(s|b|rm|riv)",
         lambda n, leaf: f"{blocks[int(n)]}.down_sample.1.{leaves[leaf]}")]
    named = {}
    for name, value in tensors.items():
        for pattern, ours in patterns:
            match = re.fullmatch(pattern, name)
            if match and all(int(number) < len(blocks) for number in match.groups()[:1] if number.isdigit()):
                name = ours(*match.groups())
        named[name] = value
    return named


def load_backbone(model, path):
    """Published weights into `model.backbone`: every tensor of the file used or left out by name, every shape checked.

    VideoMAE's ViT-B in its own naming or Hugging Face's (a fine-tuned file has no last LayerNorm: ours keeps its start),
    or the Kinetics / IG-65M `.mat` of ir-CSN-152. Raises ValueError with the names, the model untouched, otherwise.
    """
    backbone, own = model.backbone, model.backbone.state_dict()
    named = (csn_names if isinstance(backbone, CSN152) else vit_names)(read_weights(path))
    fine_tuned = any("fc_norm." in name for name in named)
    named = {name: value for name, value in named.items() if not re.match(LEFT_OUT, name)}
    if isinstance(backbone, CSN152):
        named = {name: value.flatten() if name in own and own[name].dim() == 1 else value for name, value in named.items()}
    optional = r".*num_batches_tracked|norm\.(weight|bias)" if fine_tuned else r".*num_batches_tracked"
    problems = [f"not a tensor of this backbone: {name}" for name in named if name not in own]
    problems += [f"missing: {name}" for name in own if name not in named and not re.fullmatch(optional, name)]
    problems += [f"{name}: shape {tuple(value.shape)}, {tuple(own[name].shape)} expected" for name, value in named.items()
                 if name in own and value.shape != own[name].shape]
    if problems:
        raise ValueError(f"{path} does not fit the backbone ({len(problems)} problems):\n  " + "\n  ".join(problems[:20]))
    backbone.load_state_dict(named, strict=False)  # strictness is above, with the names
    return model
