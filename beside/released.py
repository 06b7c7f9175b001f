"""The authors' model: where it departs from the paper, the names of its tensors, and their loading.

The paper's tables were made by the released model. Each of its departures that can be switched is a
quirk, a name in `Config.quirks`; the paper presets have all of them active, the synthetic preset
none. `--set quirks=` takes the names of those to keep. What the quirks cost on the synthetic set
stands in docs/experiments.md.

position_pairs (encoder.py)
    Sine and cosine of a pair of channels differ in frequency. Without: the usual pairs.
offset_axes (encoder.py)
    Sampling offsets (t, h, w) are divided by (H, W, T). Without: by (T, H, W).
grid_edge (encoder.py)
    The outermost samples of the common grid lie half a cell outside. Without: cell centres.
anchor_before_norm (decoder.py)
    The next anchor is read before the norm that precedes the heads. Without: the predicted box.
three_way_confidence (decoder.py)
    Three outputs, of which soft-max entry 1 is the confidence. Without: one logit (Sec. 4.2).
shared_block
    The convolution blocks of a classifying layer are one block, applied three times. This is where
    the paper's 117.8 M parameters come from. Without: three blocks.
bare_output
    No residual around the class cross attention: behind it a class is known only by where it
    looked. Without: add & norm, as in the decoder layers that the paper builds on.
split_heads
    The class queries and the key positions stay unprojected, and the plain concatenations of Eq. 2
    are cut into heads: half of them see only content, the other half only position, the same for
    every class. Without: Eq. 1, W_Q and W_K on the concatenations.
unmasked_padding
    Class attention may fall on padding. Without: masked, as in the localizing layers.
unused_tensors
    A checkpoint holds tensors that nothing uses: q_proj of every classifying layer and cls_norm of
    the decoder. They are counted in the 117.8 M, so the paper presets hold them, frozen.

What the released model does where the paper is silent or says less, and this project does as well,
in all presets unless a Config field is named:

objective.py
    - The cross entropy of matched queries counts 10 times in the class loss.
    - The class loss of AVA has label smoothing of 0.1 (label_smoothing).
    - UCF and JHMDB learn the product of class and confidence, its gradient flowing into both; AVA
      the class alone (score_with_confidence).
    - The loss is on the last decoder layer only (deep_supervision; the synthetic preset has it on
      all of them, as DETR has).
    - The divisors are the numbers of frames, of matched pairs and of confidence weights, where
      Eq. 5 has |T||N_a|: they differ by constants that the loss weights absorb.
    - Matching costs have weights of their own, and no class in them.
    - Queries without an actor weigh less in the confidence loss (no_actor_weight); Eq. 3 weighs all
      queries alike.
decoder.py
    - f is detached in front of the classifying layers; x, P and the level shares are not: through
      them the classes tell the localizing layers what to gather.
    - f is taken before its layer's feed-forward; the classifying layer has one of its own.
    - The self-attention among the class queries has no projections of query, key and value.
    - The value of the class attention is of x, its keys are of z.
    - A class logit is the mean over the channels of a LayerNorm shared by all layers, with a
      dropout of 0.5 in front of the mean.
    - Boxes are T x A learned anchors for tubes, A for key frames, and start anywhere: N(0, 1).
    - The first layer's P has no scale, but a modulation by width and height; its content query and
      key have the box and the position added.
backbone.py
    - All four maps of the ViT are made from its last features; the paper has intermediate ones.
    - The ViT does not mask padding; a side that 16 does not divide is floored.
model.py
    - Encoded features at padding are used as they are, on the common grid and by the convolutions.
    - Key positions are those of T' time steps, repeated as a block: frame t has row t mod T'.
    - For key frames all T frames are interpolated, and frame T // 2 is decoded.
    - AVA's score is the class alone; the confidence ranks nothing there.
train.py
    - Training has two stages: the second starts from the first's transformer, its class queries
      included, and again from the backbone's pre-training.
    - Weight decay is on all parameters, biases and norms included.
data.py
    - Frames that fill up a clip repeat the first and the last; they are ignored by the loss.

Where this project chose otherwise, in all presets:

    - The confidence loss is the paper's binary cross entropy; the released recipe has a three-way
      cross entropy that never targets entry 0 (objective.py).
    - PCA lighting is left out: at the released strength it changes no pixel (data.py).
    - Colours are jittered in float32 and rounded once (data.py).
    - Every test frame is scored once under its own name, videos are matched by name, also where the
      released evaluation does not (metrics.py).
    - Sampling offsets are laid out (t, h, w), there (x, y, t): turned over in loading.
    - The published backward pass of the sampling op is wrong (a corner's gradient takes another
      corner's weight); here it is the true gradient (deform3d_triton.py).
"""

# I (frame, actor) pairs, C classes, N cells, D channels, M heads, L levels, P points

import re

import torch
from torch import nn

from decoder import ClassifyingLayer, Decoder, masked_softmax, to_heads

QUIRKS = ("position_pairs", "offset_axes", "grid_edge", "anchor_before_norm",
          "three_way_confidence", "shared_block", "bare_output", "split_heads", "unmasked_padding",
          "unused_tensors")


class ReleasedClassifyingLayer(ClassifyingLayer):
    """The classifying layer with those of its five quirks that `quirks` names."""

    def __init__(self, dim, num_heads, dim_feedforward, dropout, num_blocks, quirks=QUIRKS):
        self.quirks, self.num_blocks = quirks, num_blocks
        held = 1 if "shared_block" in quirks else num_blocks
        super().__init__(dim, num_heads, dim_feedforward, dropout, held)
        if "bare_output" in quirks:
            del self.norm2
        if "unused_tensors" in quirks:  # frozen: no distributed step may wait for their gradients
            self.unused_query = nn.Linear(dim, dim).requires_grad_(False)

    def add_attention_projections(self, dim):
        if "split_heads" not in self.quirks:
            return super().add_attention_projections(dim)
        self.key_content = nn.Linear(dim, dim)
        self.query_position = nn.Linear(dim, dim)

    def convolve(self, z):
        if "shared_block" not in self.quirks:
            return super().convolve(z)
        for _ in range(self.num_blocks):
            z = self.blocks[0](z)
        return z

    def class_attention_folded(self, queries, P, z, key_pos, padding):
        if "unmasked_padding" in self.quirks:
            padding = torch.zeros_like(padding)
        if "split_heads" not in self.quirks:
            return super().class_attention_folded(queries, P, z, key_pos, padding)
        half = self.num_heads // 2
        content = to_heads(queries, half) @ to_heads(self.key_content(z), half).transpose(-1, -2)
        position = to_heads(self.query_position(P)[:, None], half)  # (I, M/2, 1, 2D/M)
        position = position @ to_heads(key_pos, half).transpose(-1, -2)  # (I, M/2, 1, N)
        scale = (2 * z.shape[-1] / self.num_heads) ** -0.5
        by_content = masked_softmax(content * scale, padding)  # (I, M/2, C, N)
        by_position = masked_softmax(position * scale, padding).expand_as(by_content)
        return torch.cat([by_content, by_position], 1)  # (I, M, C, N)

    def add_and_norm(self, queries, attended):
        return attended if "bare_output" in self.quirks else super().add_and_norm(queries, attended)


def content_heads(attention):
    """Attention of every head (..., M, H', W') -> the mean over the heads that see content with
    the quirk split_heads, (..., H', W'): the others look at the actor's place, the same for every
    class."""
    return attention[..., :attention.shape[-3] // 2, :, :].mean(-3)


def hold_unused_norm(decoder: Decoder):
    """Quirk unused_tensors, the decoder's."""
    decoder.unused_norm = nn.LayerNorm(decoder.norm.normalized_shape).requires_grad_(False)


# -------------------------------------------------------------------------------------------------
# - The names of the released tensors (regular expressions) and ours. An order: the first that
# matches counts.

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
    "localizing": {
        "sa_qcontent_proj": "self_query_content", "sa_qpos_proj": "self_query_position",
        "sa_kcontent_proj": "self_key_content", "sa_kpos_proj": "self_key_position",
        "sa_v_proj": "self_value", "self_attn.out_proj": "self_output",
        "lvl_w_embed": "level_weights", "norm_": "context_norm",
        "ca_qcontent_proj": "cross_query_content", "ca_qpos_proj": "cross_query_box",
        "ca_qpos_sine_proj": "cross_query_position", "ca_kcontent_proj": "cross_key_content",
        "ca_kpos_proj": "cross_key_position", "ca_v_proj": "cross_value",
        "cross_attn.out_proj": "cross_output"},
    "classifying": {
        "cls_linear1": "actor_linear1", "cls_linear2": "actor_linear2", "cls_norm": "actor_norm",
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
    if not layer:
        return re.sub(r"class_queries\.weight$", "class_queries", name)
    part, leaf = name[layer.end():].rsplit(".", 1)
    block = re.match(r"conv_blocks\.\d+\.", part + ".")
    if block:  # the released blocks are one block, listed as often as it is applied
        part = part[block.end():].replace("conv2", "linear1").replace("conv3", "linear2")
        return f"{layer[0]}blocks.0.{part}.{leaf}"
    part = RELEASED_PARTS[layer[1]].get(part, part)
    return f"{layer[0]}{part}.{leaf}"


def released_weights(state_dict):
    """The authors' tensors (`model` and `module.` wrapping allowed) under our names and in our
    layouts -> (tensors, problems). Tensors that the release lists twice must be equal."""
    if isinstance(state_dict.get("model"), dict):
        state_dict = state_dict["model"]
    loaded, problems = {}, []
    for released, value in state_dict.items():
        name = translate(re.sub(r"^module\.", "", released))
        if name is None:
            problems.append(f"not a released tensor: {released}")
            continue
        if "sampling_offsets" in name:  # (x, y, t) there, (t, h, w) here
            value = value.unflatten(0, (-1, 3)).flip(1).flatten(0, 1)  # (M*L*P*3, ...)
        if "classifying" in name and value.shape[2:] == (1, 1):  # 1x1 convolutions there
            value = value.flatten(1)
        if name in loaded and not torch.equal(loaded[name], value):
            problems.append(f"{released}: should equal the tensor that it shares {name} with")
        loaded[name] = value
    return loaded, problems


def load_released(model, state_dict):
    """The authors' checkpoint into this model: every tensor once, every shape checked.

    Raises ValueError with the names, and leaves the model as it was, if anything is missing, left
    over or of another shape. """
    own = model.state_dict()
    loaded, problems = released_weights(state_dict)
    for name, value in loaded.items():
        if name not in own:
            problems.append(f"not a tensor of this preset: {name}")
        elif value.shape != own[name].shape:
            expected = tuple(own[name].shape)
            problems.append(f"{name}: shape {tuple(value.shape)}, {expected} expected")
    problems += [f"missing: {name}" for name in own if name not in loaded]
    if problems:
        raise ValueError(f"not a released checkpoint of this preset ({len(problems)} problems):\n  "
                         + "\n  ".join(problems[:20]))
    model.load_state_dict(loaded)
    return model
