"""The assembled detector (Sec. 4, Fig. 3): Config, presets, the model, its scores, and the loading of weights.

A clip (B, 3, T, H, W) becomes L feature maps (backbone, neck), encoded maps (encoder), maps on one common grid in all T
frames, and for each frame A actors with a box, a confidence and C class logits (decoder).

Departs from the paper where the released model does, each departure by its name in `Config.quirks`; the
"small" initialisation and the spatial position table that goes with it are this project's, for the synthetic preset.
"""

# B clips, T frames, T' time steps of the backbone, F = B*T frames of a batch, A actors, C classes, L levels, D channels

import ast
import re
from dataclasses import asdict, dataclass, fields, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from backbone import (CSN152, CSNNeck, ConvNeck, ConvStem, ViT, ViTNeck, load_backbone, normalise,  # noqa: F401
                      open_checkpoint)
from decoder import Decoder, OneMapDecoder
from encoder import DeformableEncoder, paper_frequencies, position_table, small_frequencies, time_weights, to_common_grid

# The names of SPEC.md's quirks: where the released model departs from the paper's words. The four paper
# presets have all of them (the paper's tables were made with them), the synthetic preset has none.
QUIRKS = ("position_pairs", "offset_axes", "grid_edge", "anchor_before_norm", "three_way_confidence", "shared_block",
          "bare_output", "split_heads", "unmasked_padding", "unused_tensors")

# The words that Config's switches take; those of Tables 1, 2 and 4 are among them.
CHOICES = {"backbone": ("vit", "csn152", "conv"), "initialisation": ("paper", "small"),
           "encoder": ("deformable3d", "transformer"), "decoder": ("ldl+cdl", "ldl", "detr"),
           "aggregation": ("actor", "weighted", "mean"),
           "combine": ("sum", "concat", "cross-attention", "self-attention"), "schedule": ("step", "cosine")}
AT_LEAST_ONE = ("frames", "sampling_rate", "num_classes", "num_queries", "encoder_layers", "decoder_layers", "num_heads",
                "num_points", "batch_size", "micro_batch", "epochs", "eval_every")  # fields of which a 0 makes no sense


@dataclass(frozen=True)
class Config:
    """Every size and switch of the model, the objective, the clips and the recipe. Flat on purpose: `--set name=value`."""
    # the clip
    frames: int = 32                    # T, frames of a clip
    sampling_rate: int = 1              # every how many frames of the video one is taken
    resize_size: int = 256              # short side a frame is resized to in training, before the crop
    crop_size: int = 224                # short side of the training crop (the aspect ratio is kept)
    test_size: int = 224                # short side at test time
    # the model
    num_classes: int = 24               # C
    num_queries: int = 15               # A, actor queries per frame
    encoder_layers: int = 3
    decoder_layers: int = 3
    dim: int = 256                      # D
    num_heads: int = 8                  # M
    num_levels: int = 4                 # L, feature maps
    num_points: int = 8                 # P, sampling points per head and level
    grid_level: int = 2                 # the level whose H x W is the common grid of the decoder
    dim_feedforward: int = 2048
    dropout: float = 0.1
    logit_dropout: float = 0.5          # before the mean over channels that gives a class logit
    conv_blocks: int = 3                # convolution blocks of a classifying layer
    backbone: str = "vit"               # "vit", "csn152" or "conv"
    vit_depth: int = 12
    vit_width: int = 768
    vit_heads: int = 12
    drop_path: float = 0.2              # stochastic depth of the ViT, linear over its depth
    key_frame: bool = False             # only frame T // 2 is decoded (AVA)
    gate: float = 0.0                   # test time: actors below this confidence skip the classifying layers (0: none does)
    link_score: float = 0.0             # boxes that score less are not linked into tubes (0: all are, as in the benchmarks)
    initialisation: str = "paper"       # "paper" (SPEC.md) or "small" (SYNTHETIC.md: what a small model needs)
    quirks: tuple = QUIRKS              # names of the released model's departures that are in force
    encoder: str = "deformable3d"       # or "transformer": ordinary, on the map of grid_level alone (Table 1)
    decoder: str = "ldl+cdl"            # or "ldl": classes by a linear head; "detr": DETR's (Table 1)
    aggregation: str = "actor"          # how levels make an actor's map: or "weighted", "mean" (Table 2)
    class_position: bool = True         # class queries have the actor positional query (Table 3)
    combine: str = "sum"                # actor and context: or "concat", "cross-attention", "self-attention" (Table 4)
    checkpoint_backbone: bool = False   # recompute the backbone's blocks in the backward pass to save memory
    checkpoint_classifier: bool = False # the same for the classifying layers
    # the objective
    cost_confidence: float = 4.0        # matching cost
    cost_box: float = 5.0
    cost_giou: float = 2.0
    loss_class: float = 4.0             # loss weights
    loss_box: float = 5.0
    loss_giou: float = 2.0
    loss_confidence: float = 3.0
    no_actor_weight: float = 0.5        # of unmatched queries in the confidence loss
    label_smoothing: float = 0.0
    score_with_confidence: bool = True  # class score = sigmoid(logit) * confidence (ucf, jhmdb); False: sigmoid(logit) (ava)
    deep_supervision: bool = False      # the loss on every decoder layer, not the last only
    # augmentation
    flip: float = 0.5                   # probability of a horizontal flip
    jitter_hue: int = 10                # +- of 180, cyclic
    jitter_saturation: int = 128        # +- of 255, clipped; the value (brightness) likewise
    permute_colours: bool = False       # a random order of the three colour channels (synthetic)
    # the recipe
    batch_size: int = 8                 # clips per step, over all processes and micro-batches
    micro_batch: int = 1                # clips a process takes at once, at most
    epochs: int = 18
    clips_per_epoch: int = 0            # clips after which an epoch ends (0: the whole training set)
    train_frames: int = 0               # frames of a clip decoded in training, drawn at random (0: all)
    schedule: str = "step"              # "step" (x0.1 at each of drop_epochs) or "cosine" (to zero)
    drop_epochs: tuple = (16,)
    warmup_epochs: float = 4.0
    warmup_lr: float = 2e-6             # the rate the linear warm-up starts from
    lr: float = 2e-4
    backbone_lr: float = 2e-5
    lr_batch: int = 0                   # batch size the rates are for: they grow as sqrt(batch_size / lr_batch) (0: never)
    weight_decay: float = 2e-4
    adam_beta2: float = 0.999
    clip_norm: float = 0.1              # of the gradient, over all parameters
    eval_every: int = 1                 # epochs between evaluations

    def __post_init__(self):
        unknown = set(self.quirks) - set(QUIRKS)
        if unknown:
            raise ValueError(f"unknown quirks {sorted(unknown)}; there are: {', '.join(QUIRKS)}")
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} {getattr(self, name)!r}; there are: {', '.join(choices)}")
        if not all(isinstance(epoch, int) for epoch in self.drop_epochs):
            raise ValueError(f"drop_epochs {self.drop_epochs!r} are whole numbers: drop_epochs=8,11")
        if small := [f"{name}={getattr(self, name)}" for name in AT_LEAST_ONE if getattr(self, name) < 1]:
            raise ValueError(f"{', '.join(small)}: 1 is the least")

    @property
    def released(self):
        """True when all quirks of the released model are in force."""
        return set(self.quirks) == set(QUIRKS)


UCF = Config()
AVA = replace(UCF, frames=16, sampling_rate=4, resize_size=288, crop_size=256, test_size=256, num_classes=80, encoder_layers=6,
              decoder_layers=6, key_frame=True, cost_confidence=12.0, loss_class=10.0, loss_confidence=1.0, no_actor_weight=0.1,
              label_smoothing=0.1, score_with_confidence=False, jitter_saturation=102, batch_size=16, micro_batch=2, epochs=12,
              drop_epochs=(8, 11), warmup_epochs=3.0, warmup_lr=1e-5, lr=1e-4, backbone_lr=1e-5, weight_decay=1e-4)
PRESETS = {
    "ucf": UCF,
    "ava": AVA,
    "ava_csn152": replace(AVA, frames=32, sampling_rate=2, backbone="csn152"),
    "jhmdb": replace(UCF, frames=40, resize_size=288, crop_size=256, test_size=256, num_classes=21, num_queries=5,
                     epochs=350, drop_epochs=(300,), warmup_epochs=10.0, eval_every=10),
    "synthetic": Config(
        frames=8, resize_size=64, crop_size=64, test_size=64, num_classes=9, num_queries=5, encoder_layers=1,
        decoder_layers=2, dim=64, num_heads=4, num_levels=2, num_points=2, grid_level=0, dim_feedforward=256,
        dropout=0.0, logit_dropout=0.0, conv_blocks=1, backbone="conv", initialisation="small", quirks=(),
        loss_class=16.0, deep_supervision=True, jitter_hue=0, jitter_saturation=0, permute_colours=True, batch_size=16,
        micro_batch=8, epochs=10, clips_per_epoch=1760, train_frames=2, drop_epochs=(9,), warmup_epochs=0.5, warmup_lr=0.0,
        lr=1e-3, backbone_lr=3e-3, weight_decay=1e-2, adam_beta2=0.98, clip_norm=1.0, eval_every=10)}


def override(config, assignments):
    """Config with ["name=value", ...] applied. ValueError, with a list of what there is, for an unknown name or a value
    of the wrong type."""
    kinds = {field.name: field.type for field in fields(Config)}
    changes = {}
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        if not equals or name not in kinds:
            raise ValueError(f"--set {assignment}: not name=value with one of the names {', '.join(kinds)}")
        kind = kinds[name]
        try:
            value = text if kind is str else ast.literal_eval(text.title() if kind is bool else text)
        except (ValueError, SyntaxError):
            value = tuple(filter(None, text.split(","))) if kind is tuple else text
        if kind is float and type(value) is int:
            value = float(value)
        if kind is tuple and not isinstance(value, tuple):
            value = tuple(value) if isinstance(value, list) else (value,)
        if type(value) is not kind:
            raise ValueError(f"--set {assignment}: {name} is {kind.__name__} (now {getattr(config, name)!r})")
        changes[name] = value
    return replace(config, **changes)


def config_from_dict(values):
    """Config from `dataclasses.asdict` of one, as a checkpoint or config.json holds it."""
    unknown = set(values) - {field.name for field in fields(Config)}
    if unknown:
        raise ValueError(f"the checkpoint's Config has fields that this version does not know: {sorted(unknown)}")
    return Config(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})


class VideoActionDetector(nn.Module):
    """The detector of Fig. 3. See `forward`."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        dim, small = config.dim, config.initialisation == "small"
        unit = 16 * (config.num_heads if small else 1)      # of a position's sines and cosines
        if dim % unit or dim % config.num_heads:
            raise ValueError(f"dim={dim} num_heads={config.num_heads}: dim is to be a multiple of {unit} and of the heads")
        if config.backbone == "vit":
            self.backbone = ViT(config.frames, config.vit_depth, config.vit_width, config.vit_heads, config.drop_path,
                                config.checkpoint_backbone)
            self.neck = ViTNeck(config.vit_width, dim)
        elif config.backbone == "csn152":
            self.backbone, self.neck = CSN152(config.checkpoint_backbone), CSNNeck(dim)
        else:
            self.backbone, self.neck = ConvStem(), ConvNeck(dim)
        if not 0 <= config.grid_level < config.num_levels <= len(self.neck):
            raise ValueError(f"num_levels={config.num_levels} grid_level={config.grid_level}: backbone {config.backbone} has "
                             f"{len(self.neck)} levels at most, and grid_level is one of them, from 0 on")
        self.levels = range(config.num_levels)
        if config.encoder == "transformer":  # what makes the other levels is not there
            self.levels = range(config.grid_level, config.grid_level + 1)
            if config.backbone == "conv":
                del self.backbone.stages[3 + config.grid_level:]
            for level in set(range(len(self.neck))) - set(self.levels):
                self.neck[level] = nn.Identity()
        self.encoder = DeformableEncoder(config.encoder_layers, dim, config.num_heads, len(self.levels), config.num_points,
                                         config.dim_feedforward, config.dropout, "offset_axes" in config.quirks,
                                         config.encoder == "transformer")
        self.frequencies = small_frequencies if small else \
            partial(paper_frequencies, pairs_differ="position_pairs" in config.quirks)
        frames = 1 if config.key_frame else config.frames
        if config.decoder == "detr":
            self.decoder = OneMapDecoder(config.decoder_layers, dim, config.num_heads, config.dim_feedforward, config.dropout,
                                         config.num_queries, frames, config.num_classes)
        else:
            self.decoder = Decoder(
                config.decoder_layers, dim, config.num_heads, len(self.levels), config.dim_feedforward, config.dropout,
                config.num_queries, frames, config.num_classes, config.conv_blocks, config.logit_dropout,
                config.checkpoint_classifier, frequencies=(small_frequencies if small else paper_frequencies)(dim // 2),
                num_groups=config.num_heads if small else 1, quirks=config.quirks, aggregation=config.aggregation,
                class_queries=config.decoder == "ldl+cdl", class_position=config.class_position, combine=config.combine)
        self.actor_embed = nn.Parameter(0.5 * torch.randn(config.num_queries, dim)) if small else None
        self.initialise()

    @torch.no_grad()
    def initialise(self):
        """SPEC.md's initialisation; with Config.initialisation "small" what SYNTHETIC.md found that a small model needs."""
        decoder, small = self.decoder, self.config.initialisation == "small"
        for part in (self.encoder, decoder):
            for parameter in part.parameters():
                if parameter.dim() > 1:
                    nn.init.xavier_uniform_(parameter)
        self.encoder.initialise()
        if small and decoder.class_head is not None:
            nn.init.constant_(decoder.class_head.bias, -2.0)
        if self.config.decoder == "detr":
            nn.init.normal_(decoder.query_positions)
            return
        nn.init.normal_(decoder.anchors)
        nn.init.zeros_(decoder.box_head.layers[-1].weight)
        nn.init.zeros_(decoder.box_head.layers[-1].bias)
        if small:
            if decoder.class_head is None:
                nn.init.normal_(decoder.class_queries)
                nn.init.normal_(decoder.class_norm.weight, std=3.0)  # the mean of a LayerNorm of weight 1 has no gradient
                nn.init.constant_(decoder.class_norm.bias, -2.0)
            angle = 2 * torch.pi * (torch.arange(decoder.num_queries - 1) + 0.5) / max(1, decoder.num_queries - 1)
            ring = torch.stack([0.5 + 0.45 * angle.cos(), 0.5 + 0.28 * angle.sin()], dim=-1)
            grid = torch.cat([torch.full((1, 2), 0.5), ring])     # one in the middle, the others around it
            grid = torch.cat([grid, torch.tensor([0.2, 0.48]).expand(len(grid), 2)], dim=-1)
            decoder.anchors.copy_(torch.logit(grid).repeat_interleave(decoder.num_frames, dim=0))  # row a * T + t
            for head, bias in [(decoder.query_scale, torch.ones(())), (decoder.size_modulation, grid[0, 2:].logit())]:
                if head is not None:  # P starts as the plain embedding of the anchor in every layer
                    nn.init.zeros_(head.layers[-1].weight)
                    head.layers[-1].bias.copy_(bias)
            for layer in (*decoder.localizing, *decoder.classifying):
                layer.initialise_by_place()

    def level_paddings(self, padding_mask, maps):
        """padding_mask (B, H, W) -> L x (B, T_l, H_l, W_l) by PyTorch's nearest, index floor(i * in / out)."""
        mask = padding_mask[:, None].float()
        return [F.interpolate(mask, size=x.shape[-2:], mode="nearest").bool().expand(-1, x.shape[2], -1, -1) for x in maps]

    def tables(self, paddings):
        """Position tables of the levels, L x (B, T_l, H_l, W_l, D), and of the keys on the common grid, (B, T', H, W, D)."""
        dim, groups = self.config.dim, self.decoder.num_groups
        small = self.config.initialisation == "small"
        of_axes = partial(position_table, frequencies=self.frequencies, num_groups=groups, centred=small)
        tables = [of_axes(padding, (dim // 4, 3 * dim // 8, 3 * dim // 8)) for padding in paddings]
        level = self.levels.index(self.config.grid_level)
        keys = of_axes(paddings[level], (0, dim // 2, dim // 2)) if small else tables[level]  # laid out as the anchors are
        return tables, keys

    def forward(self, clips, padding_mask=None, return_attention=False, frames=None):
        """clips (B, 3, T, H, W), normalised; padding_mask (B, H, W), True on padding; frames (k,) indices on the CPU:
        only these are decoded, k in place of T below. Key-frame presets decode frame T // 2 alone.

        Returns pred_boxes (B, T, A, 4) cx, cy, w, h in [0, 1] of the clip's own unpadded frame, pred_logits (B, T, A, C),
        pred_conf (B, T, A) logit, aux_outputs (the same of each earlier layer), and attention (B, T, A, C, H', W') if asked,
        the mean over heads; with return_attention="content" over those of the quirk split_heads that see content.
        """
        config = self.config
        batch, _, length, height, width = clips.shape
        if length != config.frames:
            raise ValueError(f"clips of {length} frames for a model of {config.frames}: cut the clip or set Config.frames")
        if padding_mask is None:
            padding_mask = torch.zeros(1, height, width, dtype=torch.bool, device=clips.device)
        if clips.dtype == torch.uint8:
            clips = normalise(clips, padding_mask)
        if config.key_frame:
            frames = torch.tensor([length // 2])
        elif frames is None:
            frames = torch.arange(length)
        maps = self.neck(self.backbone(clips))
        maps = [maps[level] for level in self.levels]
        paddings = self.level_paddings(padding_mask, maps)                                        # L x (B or 1, T', H, W)
        tables, keys = self.tables(paddings)
        if config.initialisation == "small":  # the convolutional stem knows no places
            maps = [x + table.movedim(-1, 1) for x, table in zip(maps, tables)]
        grid_edge = "grid_edge" in config.quirks
        times = time_weights(maps, length, frames, grid_edge)                                     # L x (T, T')
        steps = [(time != 0).any(0) for time in times]
        encoded = self.encoder(maps, paddings, tables, steps)
        padding = paddings[self.levels.index(config.grid_level)]
        memory = to_common_grid(encoded, padding.shape[2:], [time[:, step] for time, step in zip(times, steps)], grid_edge)
        rows = frames % padding.shape[1]  # the T' rows of the table, tiled over T
        keys, padding = (part[:, rows].expand(batch, *[-1] * (part.dim() - 1)).flatten(0, 1) for part in (keys, padding))
        anchors = self.decoder.places().unflatten(0, (config.num_queries, -1)).transpose(0, 1)    # (T, A, 4)
        anchors = anchors if config.key_frame else anchors[frames]
        anchors = anchors.expand(batch, -1, -1, -1).flatten(0, 1)                                 # (F, A, 4)
        actors = memory.new_zeros(config.num_queries, config.dim) if self.actor_embed is None else self.actor_embed
        actors, gate = actors.expand(len(anchors), -1, -1), 0.0 if self.training else config.gate
        predictions, attention = self.decoder(memory.flatten(0, 1), keys, padding, anchors, actors, gate, return_attention)
        layers = [{name: value.unflatten(0, (batch, -1)) for name, value in layer.items()} for layer in predictions]
        out = {**layers[-1], "aux_outputs": layers[:-1]}
        if return_attention:
            out["attention"] = attention.unflatten(0, (batch, -1))                                # (B, T, A, C, H', W')
        return out


def scores(out, config):
    """Class scores at test time (Sec. 4.3), (B, T, A, C) in [0, 1]: sigmoid of the logit, for ucf and jhmdb times the
    confidence."""
    probabilities = out["pred_logits"].float().sigmoid()
    if not config.score_with_confidence:
        return probabilities
    return probabilities * out["pred_conf"].float().sigmoid()[..., None]


# ---------------------------------------------------------------------------------------------------------------------
# Weights: this project's checkpoints, and the authors'

# The released names (regular expressions) and ours. An order: the first that matches counts.
RELEASED_NAMES = [
    (r"backbone\.0\.body\.(blocks\.\d+)\.attn\.(qkv|proj|q_bias|v_bias)", r"backbone.\1.\2"),
    (r"backbone\.0\.body\.(blocks\.\d+)\.mlp\.", r"backbone.\1."),
    (r"backbone\.0\.body\.patch_embed\.proj\.", r"backbone.patch_embed."),
    (r"backbone\.0\.body\.", r"backbone."),
    (r"backbone\.0\.lateral_convs\.|input_proj\.", r"neck."),
    (r"transformer\.level_embed", r"encoder.level_embed"),
    (r"transformer\.encoder\.(layers\.\d+)\.self_attn\.", r"encoder.\1."),
    (r"transformer\.encoder\.", r"encoder."),
    (r"transformer\.decoder\.layers\.(\d+)\.", r"decoder.localizing.\1."),
    (r"transformer\.decoder\.cls_layers\.(\d+)\.", r"decoder.classifying.\1."),
    (r"transformer\.decoder\.(norm|class_queries)\b", r"decoder.\1"),
    (r"transformer\.decoder\.query_scale\.", r"decoder.query_scale."),
    (r"transformer\.decoder\.ref_point_head\.", r"decoder.box_position."),
    (r"transformer\.decoder\.ref_anchor_head\.", r"decoder.size_modulation."),
    (r"transformer\.decoder\.cls_norm2\.", r"decoder.class_norm."),
    (r"transformer\.decoder\.cls_norm\.", r"decoder.unused_norm."),
    (r"(transformer\.decoder\.)?bbox_embed\.", r"decoder.box_head."),
    (r"class_embed_b\.", r"decoder.confidence_head."),
    (r"refpoint_embed\.weight", r"decoder.anchors")]
RELEASED_PARTS = {
    "localizing": {"sa_qcontent_proj": "self_query_content", "sa_qpos_proj": "self_query_position",
                   "sa_kcontent_proj": "self_key_content", "sa_kpos_proj": "self_key_position", "sa_v_proj": "self_value",
                   "self_attn.out_proj": "self_output", "lvl_w_embed": "level_weights", "norm_": "context_norm",
                   "ca_qcontent_proj": "cross_query_content", "ca_qpos_proj": "cross_query_box",
                   "ca_qpos_sine_proj": "cross_query_position", "ca_kcontent_proj": "cross_key_content",
                   "ca_kpos_proj": "cross_key_position", "ca_v_proj": "cross_value", "cross_attn.out_proj": "cross_output"},
    "classifying": {"cls_linear1": "actor_linear1", "cls_linear2": "actor_linear2", "cls_norm": "actor_norm",
                    "conv_norm": "context_norm", "self_attn.out_proj": "self_output", "q_proj": "unused_query",
                    "k_proj": "key_content", "v_proj": "value", "cls_qpos_sine_proj": "query_position",
                    "cross_attn.out_proj": "output", "cls_linear1_": "linear1", "cls_linear2_": "linear2",
                    "cls_norm_": "norm3"}}


def translate(name):
    """A released tensor's name -> ours, or None if the table does not know it."""
    for pattern, ours in RELEASED_NAMES:
        match = re.match(pattern, name)
        if match:
            name = match.expand(ours) + name[match.end():]
            break
    else:
        return None
    layer = re.match(r"decoder\.(localizing|classifying)\.\d+\.", name)
    if layer:
        part, leaf = name[layer.end():].rsplit(".", 1)
        block = re.match(r"conv_blocks\.\d+\.", part + ".")
        if block:  # the released blocks are one block, listed as often as it is applied
            part = "blocks.0." + part[block.end():].replace("conv2", "linear1").replace("conv3", "linear2")
        else:
            part = RELEASED_PARTS[layer[1]].get(part, part)
        return f"{layer[0]}{part}.{leaf}"
    return re.sub(r"class_queries\.weight$", "class_queries", name)


def released_weights(state_dict):
    """The authors' tensors (`model` / `module.` wrapping allowed) under our names and in our layouts -> (tensors, problems).

    Tensors that the release lists twice must be equal. Offsets are laid out (x, y, t) there and (t, h, w) here.
    """
    if isinstance(state_dict.get("model"), dict):
        state_dict = state_dict["model"]
    loaded, problems = {}, []
    for released, value in state_dict.items():
        name = translate(re.sub(r"^module\.", "", released))
        if name is None:
            problems.append(f"not a released tensor: {released}")
            continue
        if "sampling_offsets" in name:
            value = value.unflatten(0, (-1, 3)).flip(1).flatten(0, 1)                             # (M*L*P*3, ...)
        if "classifying" in name and value.shape[2:] == (1, 1):  # 1x1 convolutions there, linear maps here
            value = value.flatten(1)
        if name in loaded and not torch.equal(loaded[name], value):
            problems.append(f"{released}: should equal the tensor that it shares {name} with")
        loaded[name] = value
    return loaded, problems


def load_released(model, state_dict):
    """The authors' checkpoint into this model: every tensor once, every shape checked.

    Raises ValueError with the names, and leaves the model as it was, if anything is missing, left over or of another shape.
    """
    own = model.state_dict()
    loaded, problems = released_weights(state_dict)
    problems += [f"not a tensor of this preset: {name}" for name in loaded if name not in own]
    problems += [f"missing: {name}" for name in own if name not in loaded]
    problems += [f"{name}: shape {tuple(value.shape)}, {tuple(own[name].shape)} expected" for name, value in loaded.items()
                 if name in own and value.shape != own[name].shape]
    if problems:
        raise ValueError(f"not a released checkpoint of this preset ({len(problems)} problems):\n  "
                         + "\n  ".join(problems[:20]))
    model.load_state_dict(loaded)
    return model


def read_checkpoint(path):
    """{"model": tensors under our names, "config": dict, "kind", "dataset", "classes", ...} of a checkpoint of train.py,
    or of the authors' with what can be known of it: the preset, by backbone and number of classes.
    ValueError for other files."""
    content = open_checkpoint(path)
    if isinstance(content, dict) and "model" in content and isinstance(content.get("config"), dict):
        return {**content, "kind": "a checkpoint of this project"}
    tensors, problems = released_weights(content) if isinstance(content, dict) else ({}, [])
    if problems or "decoder.class_queries" not in tensors:
        raise ValueError(f"{path}: neither a checkpoint of this project (a dict with 'model' and 'config') nor one of the "
                         f"authors'{': ' if problems else ''}{'; '.join(problems[:5])}")
    classes = len(tensors["decoder.class_queries"])
    backbone = "csn152" if "backbone.conv1.weight" in tensors else "vit"
    presets = [name for name, preset in PRESETS.items() if (preset.num_classes, preset.backbone) == (classes, backbone)]
    if not presets:
        raise ValueError(f"{path}: a released checkpoint of {classes} classes and backbone {backbone}, which is no preset's")
    return {"model": tensors, "config": asdict(PRESETS[presets[0]]), "dataset": presets[0].split("_")[0], "classes": None,
            "kind": f"a released checkpoint, preset {presets[0]}", "epoch": None, "metrics": {}}


def load_checkpoint(path, device="cpu", changes=()):
    """(model, checkpoint): the model of a checkpoint of train.py or of the authors', its Config with `changes` (as for
    `override`) applied. Nothing in the file is executed. ValueError where it does not fit."""
    checkpoint = read_checkpoint(path)
    model = VideoActionDetector(override(config_from_dict(checkpoint["config"]), changes))
    try:
        model.load_state_dict(checkpoint["model"])
    except RuntimeError as error:
        raise ValueError(f"{path} ({checkpoint['kind']}) does not fit: {str(error)[:1000]}") from error
    return model.to(device), checkpoint
