"""The assembled detector (Sec. 4, Fig. 3): Config, presets, the model, its scores, the loading of
checkpoints.

A clip (B, 3, T, H, W) becomes L feature maps (backbone, neck), encoded maps (encoder), maps on one
common grid in all T frames, and for each frame A actors with a box, a confidence and C class
logits (decoder).

The benchmark presets (ucf, jhmdb, ava, ava_csn152) have all of the released model's departures from
the paper, each a name in `Config.quirks` (beside/released.py); the alternatives of Tables 1 to 4
are in beside/ablations.py, what the small model of the synthetic preset needs in beside/small.py.
`VideoActionDetector.__init__` chooses among them once.

Padding of a batch of clips of several sizes is not masked in the backbone; it is 0 in the encoder's
values and masked in the attention of localizing and classifying layers (the benchmark presets leave
class attention unmasked); on the common grid and in convolutions it is used as it is.
"""

# B clips, T frames, T' time steps of the backbone, F = B*T frames of a batch, A actors, C classes,
# L levels, D channels, M heads

import ast
import difflib
from dataclasses import asdict, dataclass, fields, replace

import torch
import torch.nn.functional as F
from torch import nn

from backbone import (CSN152, CSNNeck, ConvNeck, ConvStem, ViT, ViTNeck, normalise,
                      open_checkpoint, strip_prefixes)
from backbone import load_backbone  # noqa: F401
from beside import small
from beside.ablations import decoder_of, encoder_layer, keep_levels, levels_of
from beside.released import QUIRKS, load_released, released_weights  # noqa: F401
from encoder import (DeformableEncoder, frequencies, paper_table, select, steps_of, to_common_grid)

# The words that Config's switches take; those of Tables 1, 2 and 4 are among them.
CHOICES = {"backbone": ("vit", "csn152", "conv"), "positions": ("paper", "small"),
           "initialisation": ("paper", "small"), "encoder": ("deformable3d", "transformer"),
           "decoder": ("ldl+cdl", "ldl", "detr"), "aggregation": ("actor", "weighted", "mean"),
           "combine": ("sum", "concat", "cross-attention", "self-attention")}
AT_LEAST_ONE = ("frames", "sampling_rate", "resize_size", "crop_size", "test_size", "num_classes",
                "num_queries", "encoder_layers", "decoder_layers", "num_heads", "num_points",
                "batch_size", "micro_batch", "epochs", "eval_every")
# Fields of older checkpoints, and the only values that this version can still do.
REMOVED_FIELDS = {"schedule": "step", "lr_batch": 0}


@dataclass(frozen=True)
class Config:
    """Every size and switch of the model, the objective, the clips and the recipe: `--set
    name=value`. The paper prints no weights of losses and no recipe: those of the benchmark presets
    are the released ones. Nothing is frozen in training but what nothing uses (the quirk
    unused_tensors)."""
    # the clip
    frames: int = 32                    # T, frames of a clip
    sampling_rate: int = 1              # temporal stride, in frames of the video
    resize_size: int = 256              # short side of a frame in training, before the crop
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
    positions: str = "paper"            # "paper" or "small": of a small model (beside/small.py)
    initialisation: str = "paper"       # "paper" or "small": of a small model (beside/small.py)
    quirks: tuple = QUIRKS              # active quirks of the released model (beside/released.py)
    encoder: str = "deformable3d"       # "deformable3d" or "transformer" (on grid_level; Table 1)
    decoder: str = "ldl+cdl"            # "ldl+cdl", or "ldl", "detr": no class queries (Table 1)
    aggregation: str = "actor"          # of the levels: "actor", "weighted" or "mean" (Table 2)
    class_position: bool = True         # class queries have the actor positional query (Table 3)
    combine: str = "sum"                # "sum", "concat", "cross-attention" or "self-attention"
                                        # (Table 4)
    checkpoint_backbone: bool = False   # each block again in the backward pass: less memory
    checkpoint_encoder: bool = False    # the same for each encoder layer
    checkpoint_classifier: bool = False  # the same for each classifying layer
    # evaluation
    gate: float = 0.0                   # actors below this confidence are not classified
    link_score: float = 0.0             # boxes that score less are not linked (0: all are)
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
    score_with_confidence: bool = True  # class score: times the confidence; not for ava
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
    clips_per_epoch: int = 0            # clips of an epoch (0: the whole training set)
    train_frames: int = 0               # frames of a clip decoded in training (0: all)
    drop_epochs: tuple = (16,)          # the learning rates are multiplied by 0.1 at each of them
    decay_from: int = 0                 # epoch from which they fall evenly to 0 (0: they do not)
    warmup_epochs: float = 4.0
    warmup_lr: float = 2e-6             # the rate the linear warm-up starts from
    lr: float = 2e-4
    backbone_lr: float = 2e-5           # of the pre-trained backbone alone; its neck learns at lr
    offset_rate: float = 1.0            # of the encoder's sampling offsets, times lr
    weight_decay: float = 2e-4
    adam_beta2: float = 0.999
    clip_norm: float = 0.1              # of the gradient, over all parameters
    eval_every: int = 1                 # epochs from one full evaluation to the next

    def __post_init__(self):
        unknown = set(self.quirks) - set(QUIRKS)
        if unknown:
            raise ValueError(f"unknown quirks {sorted(unknown)}; there are: {', '.join(QUIRKS)}")
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} {getattr(self, name)!r}; there are: {', '.join(choices)}")
        if not all(isinstance(epoch, int) for epoch in self.drop_epochs):
            raise ValueError(f"drop_epochs {self.drop_epochs!r}: must be whole numbers, as in "
                             "drop_epochs=8,11")
        if self.decay_from < 0:
            raise ValueError(f"decay_from={self.decay_from}: must be at least 0 (0: no decay)")
        for name in AT_LEAST_ONE:
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1")

    @property
    def released(self):
        """True when all quirks of the released model are active."""
        return set(self.quirks) == set(QUIRKS)


UCF = Config()
AVA = replace(
    UCF, frames=16, sampling_rate=4, resize_size=288, crop_size=256, test_size=256, num_classes=80,
    encoder_layers=6, decoder_layers=6, key_frame=True, cost_confidence=12.0, loss_class=10.0,
    loss_confidence=1.0, no_actor_weight=0.1, label_smoothing=0.1, score_with_confidence=False,
    jitter_saturation=102, batch_size=16, micro_batch=2, epochs=12, drop_epochs=(8, 11),
    warmup_epochs=3.0, warmup_lr=1e-5, lr=1e-4, backbone_lr=1e-5, weight_decay=1e-4)
PRESETS = {
    "ucf": UCF,
    "ava": AVA,
    "ava_csn152": replace(AVA, frames=32, sampling_rate=2, backbone="csn152"),
    "jhmdb": replace(
        UCF, frames=40, resize_size=288, crop_size=256, test_size=256, num_classes=21,
        num_queries=5, epochs=350, drop_epochs=(300,), warmup_epochs=10.0, eval_every=10),
    "synthetic": Config(
        frames=8, resize_size=64, crop_size=64, test_size=64, num_classes=9, num_queries=5,
        encoder_layers=1, decoder_layers=2, dim=64, num_heads=4, num_levels=2, num_points=2,
        grid_level=0, dim_feedforward=256, dropout=0.0, logit_dropout=0.0, conv_blocks=1,
        backbone="conv", positions="small", initialisation="small", quirks=(), loss_class=16.0,
        deep_supervision=True, jitter_hue=0, jitter_saturation=0, permute_colours=True,
        batch_size=8, micro_batch=8, epochs=10, clips_per_epoch=1920, train_frames=1,
        drop_epochs=(), decay_from=4, warmup_epochs=0.4, warmup_lr=0.0, lr=7e-4,
        backbone_lr=3e-3, offset_rate=0.1, weight_decay=1e-2, adam_beta2=0.98, clip_norm=1.0,
        eval_every=10)}


def override(config, assignments):
    """Config with ["name=value", ...] applied. ValueError, with what there is, for an unknown name
    or a value of the wrong type."""
    kinds = {field.name: field.type for field in fields(Config)}
    changes = {}
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        if name not in kinds:
            near = difflib.get_close_matches(name, kinds, n=1, cutoff=0.5)
            meant = f"did you mean {near[0]}? " if near else ""
            raise ValueError(f"--set {assignment}: Config has no field {name!r}; {meant}"
                             f"There are: {', '.join(kinds)}")
        if not equals:
            raise ValueError(f"--set {assignment}: not name=value; give the field a value, "
                             f"{name}=VALUE")
        value = read_value(text, kinds[name])
        if type(value) is not kinds[name]:
            now = getattr(config, name)
            raise ValueError(f"--set {assignment}: {name} is {kinds[name].__name__} (now {now!r})")
        changes[name] = value
    return replace(config, **changes)


def read_value(text, kind):
    """The text of --set as a value of this type, or as what it looks like where it is none."""
    if kind is str:
        return text
    try:
        value = ast.literal_eval(text.title() if kind is bool else text)
    except (ValueError, SyntaxError):
        value = tuple(filter(None, text.split(","))) if kind is tuple else text
    if kind is float and type(value) is int:
        return float(value)
    if kind is tuple and isinstance(value, list):
        return tuple(value)
    if kind is tuple and not isinstance(value, tuple):
        return (value,)
    return value


def config_from_dict(values):
    """Config from `dataclasses.asdict` of one, as a checkpoint or config.json holds it. Older ones
    lack `positions`, which went with `initialisation`, and offset_rate, which was 1, and hold
    fields that are gone: they must have their usual value."""
    known = {field.name for field in fields(Config)}
    given = {}
    for name, value in values.items():
        if name in known:
            given[name] = tuple(value) if isinstance(value, list) else value
        elif name not in REMOVED_FIELDS:
            raise ValueError(f"the checkpoint's Config has an unknown field {name!r}: is it of a "
                             "newer version?")
        elif value != REMOVED_FIELDS[name]:
            raise ValueError(f"the checkpoint's Config has {name}={value!r}, no longer offered")
    given.setdefault("positions", given.get("initialisation", "paper"))
    return Config(**given)


class VideoActionDetector(nn.Module):
    """The detector of Fig. 3. See `forward`."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        dim, quirks = config.dim, config.quirks
        check_sizes(config)
        self.levels = levels_of(config)
        num_levels = len(self.levels)

        # Sec. 4.1: the backbone and its multi-scale maps
        if config.backbone == "vit":
            self.backbone = ViT(config.frames, config.vit_depth, config.vit_width, config.vit_heads,
                                config.drop_path, config.checkpoint_backbone)
            self.neck = ViTNeck(config.vit_width, dim)
        elif config.backbone == "csn152":
            self.backbone = CSN152(config.checkpoint_backbone)
            self.neck = CSNNeck(dim)
        else:
            self.backbone = ConvStem()
            self.neck = ConvNeck(dim)
        keep_levels(self.backbone, self.neck, self.levels)

        # Sec. 4.1: the encoder, and positions
        layers = [encoder_layer(config, num_levels) for _ in range(config.encoder_layers)]
        options = {"offset_axes": "offset_axes" in quirks, "recompute": config.checkpoint_encoder}
        if config.positions == "small":
            self.encoder = small.PlacedEncoder(layers, num_levels, dim, **options)
            self.position_table = small.map_table(dim)
            self.key_table = small.key_table(dim)
            self.actor_embed = small.actor_embedding(config.num_queries, dim)
            anchor_frequencies = small.frequencies(dim // 2)
        else:
            self.encoder = DeformableEncoder(layers, num_levels, dim, **options)
            self.position_table = self.key_table = paper_table(dim, "position_pairs" in quirks)
            zeros = torch.zeros(config.num_queries, dim)
            self.register_buffer("actor_embed", zeros, persistent=False)
            anchor_frequencies = frequencies(dim // 2)

        # Sec. 4.2: the decoder
        self.decoder = decoder_of(config, num_levels, anchor_frequencies)
        self.initialise()
        if config.initialisation == "small":
            small.initialise_small(self)

    def initialise(self):
        """Xavier's for every matrix of encoder and decoder, class queries included; the rest as
        each part says."""
        for part in (self.encoder, self.decoder):
            for parameter in part.parameters():
                if parameter.dim() > 1:
                    nn.init.xavier_uniform_(parameter)
        nn.init.normal_(self.encoder.level_embed)
        for layer in self.encoder.layers:
            layer.initialise()
        self.decoder.initialise()

    def level_paddings(self, padding_mask, maps):
        """padding_mask (B, H, W) -> L x (B, T_l, H_l, W_l) by PyTorch's nearest, index floor(i *
        in / out)."""
        mask, paddings = padding_mask[:, None].float(), []
        for x in maps:
            padding = F.interpolate(mask, x.shape[-2:], mode="nearest").bool()  # (B, 1, H_l, W_l)
            paddings.append(padding.expand(-1, x.shape[2], -1, -1))
        return paddings

    def forward(self, clips, padding_mask=None, return_attention=False, frames=None):
        """clips (B, 3, T, H, W), uint8 or normalised; padding_mask (B, H, W), True on padding;
        frames: a list of indices, only these frames are decoded, as many in place of T below.
        Key-frame presets decode T // 2 alone.

        Returns pred_boxes (B, T, A, 4) cx, cy, w, h in [0, 1] of the clip's own unpadded frame,
        pred_logits (B, T, A, C), pred_conf (B, T, A) logit, aux_outputs (the same of each earlier
        layer), all float32; and if asked attention (B, T, A, C, H', W'), the mean over heads, or
        with return_attention="heads" (B, T, A, C, M, H', W'), earlier layers' in aux_outputs.
        """
        config = self.config
        batch, _, num_frames, height, width = clips.shape
        if num_frames != config.frames:
            raise ValueError(f"clips of {num_frames} frames for a model of {config.frames}: "
                             "cut the clip or set Config.frames")
        if clips.dtype == torch.uint8:
            clips = normalise(clips, padding_mask)
        if padding_mask is None:
            padding_mask = torch.zeros(1, height, width, dtype=torch.bool, device=clips.device)
        if config.key_frame:
            frames = [num_frames // 2]
        grid_edge = "grid_edge" in config.quirks

        maps = self.neck(self.backbone(clips))  # the V_l of Sec. 4.1
        maps = [maps[level] for level in self.levels]  # L x (B, D, T', H, W)
        paddings = self.level_paddings(padding_mask, maps)  # L x (B or 1, T', H, W)
        tables = [self.position_table(padding) for padding in paddings]
        lengths = [x.shape[2] for x in maps]
        steps = None
        if frames is not None:  # the last encoder layer encodes only what these are made of
            steps = [steps_of(frames, length, num_frames, grid_edge) for length in lengths]
        encoded = self.encoder(maps, paddings, tables, steps)
        padding = paddings[self.levels.index(config.grid_level)]  # (B or 1, T', H, W)
        memory = to_common_grid(encoded, lengths, padding.shape[2:], num_frames, grid_edge, frames,
                                steps)  # (B, T, L, H, W, D)

        # Frame t has the positions of step t mod T', the T' steps repeated as a block: so has the
        # released model, whose weights have learned it (t // 2 would be the time of a ViT's step).
        key_pos = in_frames(self.key_table(padding), num_frames, frames)  # (B or 1, T, H, W, D)
        padding = in_frames(padding, num_frames, frames)  # (B or 1, T, H, W)
        key_pos = key_pos.expand(batch, -1, -1, -1, -1)
        padding = padding.expand(batch, -1, -1, -1)

        anchors = self.decoder.first_anchors()  # (T, A, 4)
        if frames is not None and not config.key_frame:
            anchors = select(anchors, frames, dim=0)
        anchors = anchors.expand(batch, -1, -1, -1).flatten(0, 1)  # (F, A, 4)
        actors = self.actor_embed.expand(len(anchors), -1, -1)  # (F, A, D)
        gate = 0.0 if self.training else config.gate
        of_frames = [part.flatten(0, 1) for part in (memory, key_pos, padding)]  # (F, ...)
        predictions, attention = self.decoder(*of_frames, anchors, actors, gate, return_attention)
        for prediction in predictions:
            for name, value in prediction.items():
                prediction[name] = value.unflatten(0, (batch, -1))  # (B, T, A, ...)
        out = {**predictions[-1], "aux_outputs": predictions[:-1]}
        if return_attention:
            out["attention"] = attention.unflatten(0, (batch, -1))  # (B, T, A, C, ...)
        return out


def check_sizes(config):
    """ValueError for sizes that do not fit together."""
    unit = config.num_heads
    if config.initialisation == "small":
        unit *= 4  # each head starts with sines and cosines of both axes
    if config.dim % 16 or config.dim % unit:
        raise ValueError(f"dim={config.dim} num_heads={config.num_heads}: dim must be a multiple "
                         f"of 16 and of {unit}")
    positional = config.decoder == "ldl+cdl" and config.class_position
    if "split_heads" in config.quirks and positional and config.num_heads % 2:
        raise ValueError(f"num_heads={config.num_heads}: must be even with the quirk split_heads")
    there = {"vit": 4, "csn152": 4, "conv": 2}[config.backbone]
    if not 0 <= config.grid_level < config.num_levels <= there:
        raise ValueError(f"num_levels={config.num_levels} grid_level={config.grid_level}: backbone "
                         f"{config.backbone} has at most {there} levels, and grid_level must be "
                         "one of them, counted from 0")


def in_frames(x, num_frames, frames):
    """Something of T' time steps, (B, T', ...), repeated as a block to T frames, or the list
    `frames` of these."""
    steps = x.shape[1]
    if frames is not None:
        return select(x, [frame % steps for frame in frames], dim=1)
    repeated = x.repeat(1, -(-num_frames // steps), *[1] * (x.dim() - 2))
    return repeated[:, :num_frames]


def scores(out, config):
    """Class scores at test time, (B, T, A, C) in [0, 1]: the sigmoid of the logit (Sec. 4.2); as
    released, not in the paper: times the confidence (Config.score_with_confidence; not AVA)."""
    probabilities = out["pred_logits"].float().sigmoid()
    if not config.score_with_confidence:
        return probabilities
    return probabilities * out["pred_conf"].float().sigmoid()[..., None]


# --------------------------------------------------------------------------------------------------
# Checkpoints: this project's, and the authors'


def read_checkpoint(path, preset=None):
    """{"model": tensors under our names, "config": dict, "kind", "dataset", "classes", ...} of a
    checkpoint of train.py, or of the authors' with what can be known of it: the preset, by
    backbone and number of classes. A file with nothing but this model's tensors needs `preset`.
    ValueError for other files."""
    content = open_checkpoint(path)
    if is_ours(content):
        unsaid = {"dataset": None, "classes": None, "epoch": None, "metrics": {}}   # saved by hand
        return {**unsaid, **content, "kind": "a checkpoint of this project"}
    tensors = content if isinstance(content, dict) else {}
    problems = []
    for wrapping in ("model", "state_dict"):
        if isinstance(tensors.get(wrapping), dict):
            tensors = tensors[wrapping]
    tensors = strip_prefixes(tensors)
    kind = "weights of this project"
    found = preset
    if "decoder.class_queries" not in tensors:
        tensors, problems = released_weights(tensors)
        kind = "a released checkpoint"
        found = preset or preset_of(tensors)
    if problems or "decoder.class_queries" not in tensors:
        said = ": " + "; ".join(problems[:5]) if problems else ""
        raise ValueError(f"{path}: neither a checkpoint of this project (a dict with 'model' and "
                         f"'config') nor one of the authors'{said}")
    if found is None:
        classes = len(tensors["decoder.class_queries"])
        raise ValueError(f"{path}: {kind} of {classes} classes: name its preset with --preset "
                         f"({', '.join(PRESETS)})")
    return {"model": tensors, "config": asdict(PRESETS[found]), "dataset": found.split("_")[0],
            "classes": None, "kind": f"{kind}, preset {found}", "epoch": None, "metrics": {}}


def is_ours(content):
    """Whether a file is a checkpoint of train.py: it holds a Config as a dict (other projects'
    have a "config" too)."""
    if not isinstance(content, dict) or "model" not in content:
        return False
    config = content.get("config")
    return isinstance(config, dict) and {"num_queries", "quirks"} <= set(config)


def preset_of(tensors):
    """The preset of the authors' tensors, under our names, or None."""
    classes = len(tensors.get("decoder.class_queries", ()))
    backbone = "csn152" if "backbone.conv1.weight" in tensors else "vit"
    for name, preset in PRESETS.items():
        if (preset.num_classes, preset.backbone) == (classes, backbone):
            return name
    return None


def load_checkpoint(path, device="cpu", changes=(), preset=None):
    """(model, checkpoint): the model of a checkpoint of train.py or of the authors', its Config
    with `changes` (as for `override`) applied. Nothing in the file is executed. ValueError where
    it does not fit."""
    checkpoint = read_checkpoint(path, preset)
    model = VideoActionDetector(override(config_from_dict(checkpoint["config"]), changes))
    try:
        model.load_state_dict(strip_prefixes(checkpoint["model"]))
    except RuntimeError as error:
        said = str(error)[:1000]
        raise ValueError(f"{path} ({checkpoint['kind']}) does not fit: {said}") from error
    return model.to(device), checkpoint
