"""The authors' model: where it departs from the paper, the names of its tensors, and their loading.

The paper's tables were made by the released model. Each of its departures that can be switched is a
quirk, a name in `Config.quirks`; the benchmark presets (ucf, jhmdb, ava, ava_csn152) have all of
them active, the synthetic preset none. `--set quirks=` takes the names of those to keep.

What they cost was measured on the synthetic set, one active at a time, seed 0, from the pre-trained
stem and with an earlier start of class attention (docs/experiments.md), f-mAP and v-mAP against
.921 and .647 of the model without: split_heads .875 .594, grid_edge .891 .604, bare_output .897
.637; three_way_confidence .912 .637, anchor_before_norm .914 .643 and offset_axes .919 .647 are
within what seeds differ by. The other four change nothing there.

position_pairs (encoder.py)
    Sine and cosine of a pair of channels differ in frequency, in the tables of maps and keys; the
    anchors' embedding has the usual pairs. Without: the usual pairs everywhere.
offset_axes (encoder.py)
    Sampling offsets (t, h, w) are divided by (H, W, T): 1 is T/H time steps, H/W rows, W/T columns.
    Without: by (T, H, W), 1 is a cell.
grid_edge (encoder.py)
    The outermost samples of the common grid lie half a cell outside and are halved, on all three
    axes, for the grid's own level too. Without: cell centres.
anchor_before_norm (decoder.py)
    The next anchor is read before the norm that precedes the heads. Without: the predicted box.
three_way_confidence (decoder.py)
    Three outputs, of which soft-max entry 1 is the confidence. Without: one logit (Sec. 4.3).
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
    the decoder. They are counted in the 117.8 M, so the benchmark presets hold them, frozen.

What else the released model does, and this project as well: in the benchmark presets, and in the
synthetic one but for what beside/small.py and its line in model.PRESETS change. Lines with (!) are
against what the paper prints, the others where it is silent:

objective.py
    - (!) Matched queries count 10 times in the class loss; Eq. 3 weighs all queries alike.
    - The class loss of AVA has label smoothing of 0.1 (label_smoothing), (!) on unmatched queries
      too, whose labels Eq. 3 has at 0.
    - (!) UCF and JHMDB learn the product of class and confidence, its gradient flowing into both;
      AVA the class alone (score_with_confidence).
    - The loss is on the last decoder layer only (deep_supervision; the synthetic preset has it on
      all of them, as DETR has).
    - The class loss is a mean over classes and a sum over queries, focal with alpha 0.25 and gamma
      2; GIoU counts as 1 - GIoU.
    - (!) The divisors are the numbers of frames, of matched pairs and of confidence weights, where
      Eq. 5 has |T||N_a|: a constant factor for the class loss only; the other two change with the
      number of actors in the batch.
    - (!) Matching is done frame by frame, each supervised layer by itself; Eq. 3 has one omega a
      tube.
    - Matching costs have weights of their own, and no class in them.
    - (!) Queries without an actor weigh less in the confidence loss (no_actor_weight); Eq. 3 weighs
      all queries alike.
encoder.py
    - A query is features + position table (a quarter of the channels for t, three eighths each for
      y and x) + a level embedding; the value is zero at padding.
    - But for offset_axes an offset counts cells of the level it samples, from the cell's own
      relative place; samples outside are zero. Point p of a head starts p cells away, at 0, 90, 180
      or 270 degrees, and in half of the heads also p time steps ahead.
    - The common grid is the third map's H x W (grid_level), by trilinear interpolation.
decoder.py
    - (!) The actor embeddings AE are zeros and not learned; each layer refines them. (Sec. 4.2:
      learnable queries.) So the first layer's self-attention, whose values are of AE alone, gives
      every actor the same vector: its level shares and the size that P asks for are constants.
    - (!) Level shares are a soft-max read off the embedding behind the self-attention (Sec. 4.2:
      off AE); scale and modulation of P off the layer's input; x is a LayerNorm of the mixture.
    - P is of the anchor's y and x alone; height and width enter by the modulation and by the query
      position.
    - Heads, the LayerNorm before them and the anchors' MLPs are shared by all layers; the next
      layer's anchor is detached.
    - (!) f is taken in front of its layer's feed-forward, where Sec. 4.2 has the layer's output. It
      passes a feed-forward and a norm of the classifying layer before it meets x: z is convolved
      from LayerNorm(f + x).
    - f is detached in front of the classifying layers; x, P and the level shares are not: through
      them the classes tell the localizing layers what to gather.
    - Box and confidence are read behind the localizing layer's feed-forward.
    - Class queries attend to each other before they look, without projections of query, key and
      value; the text of Sec. 4.2 names the cross attention only.
    - The value of the class attention is of x, its keys are of z.
    - Attention has M heads; Eq. 1 and 2 print one map. What is drawn is the mean over heads.
    - (!) A class logit is the mean over the channels of a LayerNorm shared by all layers, with a
      dropout of 0.5 in front of the mean; Sec. 4.2 pools the class feature itself.
    - Boxes are T x A learned anchors for tubes, A for key frames, and start anywhere: N(0, 1).
    - The first layer's P has no scale; like all others it is modulated by width and height. Its
      content query and key have the box and the position added.
backbone.py
    - (!) The ViT's four maps are all made from its last features; the paper has intermediate ones.
    - (!) The neck is more than "1D convolutions": 3x3x3 and transposed ones for the ViT, a 3x3x3
      for CSN's fourth map.
    - The ViT does not mask padding. A side that 16 does not divide is floored, while masks and
      boxes keep the full size: a map is stretched by up to 15 pixels.
    - The ViT's position table is resized in space, step by step, bicubic.
    - CSN's stage 4 keeps its spatial stride at 1; the fourth map is made from stage 4 as well.
model.py
    - Encoded features at padding are used as they are, on the common grid and by the convolutions.
    - Key positions are those of T' time steps, repeated as a block: frame t has row t mod T'.
    - (!) AVA's model gives one frame, where Sec. 4 has T: frame T // 2 of the maps interpolated to
      T frames is decoded (only what it needs is computed here); its key positions are row (T // 2)
      mod T'.
    - Every matrix of encoder and decoder starts Xavier-uniform, class queries too; the level
      embedding is N(0, 1), the box head's last layer zero.
    - (!) The score is class times confidence, where Sec. 4.2 has the class. AVA's is the class
      alone; the confidence ranks nothing there.
train.py
    - Training has two stages: the second starts from the first's transformer, its class queries
      included, and again from the backbone's pre-training.
    - Weight decay is on all parameters, biases and norms included.
metrics.py
    - (!) A query's boxes in the frames of a clip are not taken as a tube, as Sec. 4 has it: boxes
      of all frames are linked anew, by overlap and score.
    - With --protocol released all (box, class) rows of an AVA key frame count, where the official
      script takes the best 50; linking, tube IoU and recall are as the table in metrics.py says.
data.py
    - Videos are tiled by ceil(n / T) clips, in training too, the overhang split between front (the
      smaller half) and back. The first and the last frame are repeated there, and ignored by the
      loss. AVA's clips are clamped to the film's frames.
    - Augmentation and resizing as data.py says.

Where this project chose otherwise, in all presets:

    - The confidence loss is the paper's binary cross entropy; the released recipe has a three-way
      cross entropy that never targets entry 0 (objective.py).
    - PCA lighting is left out: at the released strength it changes no pixel (data.py).
    - Colours are jittered in float32 and rounded once (data.py).
    - Every test frame is scored once under its own name, videos are matched by name, also where the
      released evaluation does not (metrics.py).
    - Sampling offsets are laid out (t, h, w), there (x, y, t): turned over in loading.
    - Key positions lack the level embedding: it is the same at every cell, and no soft-max sees it.
    - The neck learns at the full rate, only the backbone at its own; in the synthetic preset the
      sampling offsets too (train.py).
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
    over or of another shape.
    """
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
