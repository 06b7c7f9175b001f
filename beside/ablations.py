"""Tables 1 to 4 (Sec. 5.2): each alternative as a subclass of what it stands in for, no larger than
the difference. `--set` switches them on:

    Table 1   encoder=transformer      OrdinaryLayer        an ordinary encoder, on one level's map
              decoder=ldl              LinearClassDecoder   no class queries: a linear head
              decoder=detr             DETRDecoder          no anchors, one feature for all heads
    Table 2   aggregation=weighted     WeightedLevels       one learned mixture for all actors
              aggregation=mean         MeanLevels           the mean of the levels
    Table 3   class_position=False     WithoutP             no actor positional query
    Table 4   combine=concat           Concat               actor beside context, not their sum
              combine=cross-attention  CrossAttention
              combine=self-attention   SelfAttention

`model.py` takes what a Config names from the functions at the end.

The paper names each alternative and cites one for some, no more: how they are built in detail is
this project's. DETR's decoder sees the mean of the levels; CrossAttention adds what the actor
gathered to the plain sum; SelfAttention has a residual and no norm.
"""

# B clips, S cells of a clip, F frames, A actors, C classes, L levels, N cells (H*W), D channels, M
# heads, Y layers, I (frame, actor) pairs that are classified

from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from backbone import CSN152, ConvStem
from beside.released import ReleasedClassifyingLayer, hold_unused_norm
from decoder import MLP, ClassifyingLayer, Decoder, LocalizingLayer, masked_softmax, to_heads
from encoder import DeformableLayer, at_steps

# --------------------------------------------------------------------------------------------------
# Table 1


class OrdinaryLayer(nn.Module):
    """An encoder layer in which every cell looks at every cell of one map. Same signature as
    DeformableLayer."""

    def __init__(self, dim, num_heads, dim_feedforward, dropout):
        super().__init__()
        self.attention = nn.MultiheadAttention(dim, num_heads, dropout, batch_first=True)
        self.norm1 = nn.LayerNorm(dim)
        self.linear1 = nn.Linear(dim, dim_feedforward)
        self.linear2 = nn.Linear(dim_feedforward, dim)
        self.norm2 = nn.LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)

    def initialise(self):
        """Nothing beyond the matrices that the model draws."""

    def forward(self, x, positions, padding, references, shapes, scales, steps=None):
        keys, padding = x + positions, padding.expand(len(x), -1)  # (B, S, D), (B, S)
        queries = at_steps(keys, shapes, steps)  # (B, Q, D)
        attended = self.attention(queries, keys, x, key_padding_mask=padding, need_weights=False)[0]
        x = self.norm1(at_steps(x, shapes, steps) + self.dropout(attended))
        hidden = self.dropout(F.relu(self.linear1(x)))
        return self.norm2(x + self.dropout(self.linear2(hidden)))


def keep_levels(backbone, neck, levels):
    """Leaves out what makes no map of these levels: it would have no gradient."""
    for level in range(len(neck)):
        if level not in levels:
            neck[level] = nn.Identity()
    if isinstance(backbone, ConvStem):
        del backbone.stages[3 + max(levels):]
    if isinstance(backbone, CSN152):  # level 3 is made of the last stage, too
        for stage in ("layer3", "layer4")[min(max(levels), 2):]:
            setattr(backbone, stage, nn.Sequential())


def one_map(attention, num_classes, num_heads, size, return_attention):
    """The actors' maps (F, A, N) as class attention maps, the same for every class (and head):
    (F, A, C, H, W), with return_attention="heads" (F, A, C, M, H, W)."""
    maps = attention.unflatten(-1, size)[:, :, None]  # (F, A, 1, H, W)
    if return_attention == "heads":
        return maps[:, :, :, None].expand(-1, -1, num_classes, num_heads, -1, -1)
    return maps.expand(-1, -1, num_classes, -1, -1)


class LinearClassDecoder(Decoder):
    """LDL alone: the classes by a linear head on what box and confidence are read from."""

    def add_classifier(self, classifying, dim, num_classes, logit_dropout):
        self.class_head = nn.Linear(dim, num_classes)

    def class_predictions(self, predictions, outputs, memory, key_pos, padding, size, gate,
                          return_attention):
        for prediction, output in zip(predictions, outputs):
            prediction["pred_logits"] = self.class_head(output["actors"]).float()  # (F, A, C)
            if return_attention:
                prediction["attention"] = one_map(
                    output["attention"], self.class_head.out_features,
                    self.localizing[-1].num_heads, size, return_attention)


class DETRDecoder(nn.Module):
    """DETR's decoder: a learned query an actor and frame, no anchors; box, confidence and classes
    are read off the same feature, so there is one attention map an actor. It looks at the mean of
    the levels.

    Same signature as Decoder, with its query positions (F, A, D) in place of anchors. The gate
    changes nothing.
    """

    def __init__(self, num_layers, dim, num_heads, dim_feedforward, dropout, num_queries,
                 num_frames, num_classes):
        super().__init__()
        self.num_queries, self.num_heads = num_queries, num_heads
        rows = num_queries * num_frames  # row a * T + t
        self.query_positions = nn.Parameter(torch.empty(rows, dim))
        attention = partial(nn.MultiheadAttention, dim, num_heads, dropout, batch_first=True)
        self.layers = nn.ModuleList()
        for _ in range(num_layers):
            self.layers.append(nn.ModuleDict({
                "self": attention(), "norm1": nn.LayerNorm(dim),
                "cross": attention(), "norm2": nn.LayerNorm(dim),
                "linear1": nn.Linear(dim, dim_feedforward),
                "linear2": nn.Linear(dim_feedforward, dim), "norm3": nn.LayerNorm(dim)}))
        self.dropout = nn.Dropout(dropout)
        self.norm = nn.LayerNorm(dim)
        self.box_head = MLP(dim, dim, dim, 4)
        self.confidence_head = nn.Linear(dim, 1)
        self.class_head = nn.Linear(dim, num_classes)

    def initialise(self):
        nn.init.normal_(self.query_positions)

    def first_anchors(self):
        """The queries' positions, (T, A, D)."""
        return self.query_positions.unflatten(0, (self.num_queries, -1)).transpose(0, 1)

    def forward(self, memory, key_pos, padding, query_pos, actors, gate=0.0,
                return_attention=False):
        size = tuple(memory.shape[2:4])
        memory = memory.mean(1).flatten(1, 2)  # (F, N, D)
        keys, hidden = memory + key_pos.flatten(1, 2), padding.flatten(1)  # (F, N, D), (F, N)
        predictions = []
        for layer in self.layers:
            query = actors + query_pos
            attended = layer["self"](query, query, actors, need_weights=False)[0]
            actors = layer["norm1"](actors + self.dropout(attended))
            attended, attention = layer["cross"](actors + query_pos, keys, memory,
                                                 key_padding_mask=hidden)
            actors = layer["norm2"](actors + self.dropout(attended))
            branch = layer["linear2"](self.dropout(F.relu(layer["linear1"](actors))))
            actors = layer["norm3"](actors + self.dropout(branch))
            normed = self.norm(actors)
            predictions.append({"pred_boxes": self.box_head(normed).float().sigmoid(),
                                "pred_conf": self.confidence_head(normed)[..., 0].float(),
                                "pred_logits": self.class_head(normed).float()})
            if return_attention:
                predictions[-1]["attention"] = one_map(
                    attention, self.class_head.out_features, self.num_heads, size, return_attention)
        return predictions, predictions[-1].pop("attention", None)


# --------------------------------------------------------------------------------------------------
# Table 2


class WeightedLevels(LocalizingLayer):
    """One learned mixture of the levels for all actors."""

    def add_level_weights(self, dim, num_levels):
        self.level_weights = nn.Parameter(torch.zeros(num_levels))

    def level_shares(self, actors):
        return self.level_weights.softmax(-1).expand(*actors.shape[:-1], -1)  # (F, A, L)


class MeanLevels(LocalizingLayer):
    """The mean of the levels for all actors."""

    def add_level_weights(self, dim, num_levels):
        self.num_levels = num_levels

    def level_shares(self, actors):
        return actors.new_full((*actors.shape[:-1], self.num_levels), 1 / self.num_levels)


# --------------------------------------------------------------------------------------------------
# Table 3


class WithoutP(ClassifyingLayer):
    """Class queries and regions meet without positions: nothing tells a class where its actor is.
    The paper does not say whether its keys keep theirs. Here they go too: left in, a class could
    prefer places of the frame, but not its actor's."""

    def add_attention_projections(self, dim):
        self.query = nn.Linear(dim, 2 * dim)
        self.key = nn.Linear(dim, 2 * dim, bias=False)

    def class_attention_folded(self, queries, P, z, key_pos, padding):
        q = to_heads(self.query(queries), self.num_heads)  # (I, M, C, 2D/M)
        k = to_heads(self.key(z), self.num_heads)  # (I, M, N, 2D/M)
        return masked_softmax(q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5, padding)


class ReleasedWithoutP(ReleasedClassifyingLayer, WithoutP):
    """With the quirk split_heads all heads see content."""

    def add_attention_projections(self, dim):
        if "split_heads" in self.quirks:
            self.key_content = nn.Linear(dim, dim)
        else:
            WithoutP.add_attention_projections(self, dim)

    def class_attention_folded(self, queries, P, z, key_pos, padding):
        if "split_heads" not in self.quirks:
            return super().class_attention_folded(queries, P, z, key_pos, padding)
        if "unmasked_padding" in self.quirks:
            padding = torch.zeros_like(padding)
        q = to_heads(queries, self.num_heads)  # (I, M, C, D/M)
        k = to_heads(self.key_content(z), self.num_heads)  # (I, M, N, D/M)
        return masked_softmax(q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5, padding)


# --------------------------------------------------------------------------------------------------
# Table 4: put in front of a classifying layer's class


class Concat:
    """A 1x1 convolution of actor and context side by side."""

    def __init__(self, dim, num_heads, dim_feedforward, dropout, *others):
        super().__init__(dim, num_heads, dim_feedforward, dropout, *others)
        self.join = nn.Linear(2 * dim, dim)

    def combine(self, f, context, padding):
        return self.join(torch.cat([f[:, None].expand_as(context), context], -1))


class CrossAttention:
    """The actor gathers from the cells before it is added to them."""

    def __init__(self, dim, num_heads, dim_feedforward, dropout, *others):
        super().__init__(dim, num_heads, dim_feedforward, dropout, *others)
        self.join = nn.MultiheadAttention(dim, num_heads, dropout, batch_first=True)

    def combine(self, f, context, padding):
        if len(f) == 0:  # the gate dropped all actors; nn.MultiheadAttention takes no empty batch
            return context
        gathered = self.join(f[:, None], context, context, key_padding_mask=padding,
                             need_weights=False)[0]  # (I, 1, D)
        return f[:, None] + gathered + context


class SelfAttention:
    """The actor is one more token among the cells."""

    def __init__(self, dim, num_heads, dim_feedforward, dropout, *others):
        super().__init__(dim, num_heads, dim_feedforward, dropout, *others)
        self.join = nn.MultiheadAttention(dim, num_heads, dropout, batch_first=True)

    def combine(self, f, context, padding):
        if len(f) == 0:
            return context
        tokens = torch.cat([f[:, None], context], 1)  # (I, 1 + N, D)
        hidden = F.pad(padding, (1, 0))  # (I, 1 + N)
        attended = self.join(tokens, tokens, tokens, key_padding_mask=hidden,
                             need_weights=False)[0]  # (I, 1 + N, D)
        return (tokens + attended)[:, 1:]


# --------------------------------------------------------------------------------------------------
# What a Config names

LOCALIZING = {"actor": LocalizingLayer, "weighted": WeightedLevels, "mean": MeanLevels}
COMBINE = {"concat": Concat, "cross-attention": CrossAttention, "self-attention": SelfAttention}
OF_THE_LAYER = {"shared_block", "bare_output", "split_heads", "unmasked_padding", "unused_tensors"}


def levels_of(config):
    """The levels that the encoder sees: all, or the ordinary encoder's one."""
    if config.encoder == "transformer":
        return [config.grid_level]
    return list(range(config.num_levels))


def encoder_layer(config, num_levels):
    """One encoder layer."""
    if config.encoder == "transformer":
        return OrdinaryLayer(config.dim, config.num_heads, config.dim_feedforward, config.dropout)
    return DeformableLayer(config.dim, config.num_heads, num_levels, config.num_points,
                           config.dim_feedforward, config.dropout)


def classifying_layer(config):
    """One classifying layer: the paper's, or the released model's where one of its quirks is
    active."""
    sizes = (config.dim, config.num_heads, config.dim_feedforward, config.dropout,
             config.conv_blocks)
    released = OF_THE_LAYER & set(config.quirks)
    if config.class_position:
        layer = ReleasedClassifyingLayer if released else ClassifyingLayer
    else:
        layer = ReleasedWithoutP if released else WithoutP
    if config.combine != "sum":
        layer = type(config.combine, (COMBINE[config.combine], layer), {})
    return layer(*sizes, config.quirks) if released else layer(*sizes)


def decoder_of(config, num_levels, frequencies):
    """The decoder with its layers; frequencies (D/2,) of the anchors' embedding."""
    num_frames = 1 if config.key_frame else config.frames
    if config.decoder == "detr":
        return DETRDecoder(
            config.decoder_layers, config.dim, config.num_heads, config.dim_feedforward,
            config.dropout, config.num_queries, num_frames, config.num_classes)
    layer = LOCALIZING[config.aggregation]
    localizing = []
    classifying = []
    for number in range(config.decoder_layers):
        localizing.append(layer(
            config.dim, config.num_heads, num_levels, config.dim_feedforward, config.dropout,
            first=number == 0))
        if config.decoder == "ldl+cdl":
            classifying.append(classifying_layer(config))
    kind = Decoder if config.decoder == "ldl+cdl" else LinearClassDecoder
    decoder = kind(
        localizing, classifying, config.dim, config.num_queries, num_frames, config.num_classes,
        frequencies, config.logit_dropout, recompute=config.checkpoint_classifier,
        three_way_confidence="three_way_confidence" in config.quirks,
        anchor_before_norm="anchor_before_norm" in config.quirks)
    if "unused_tensors" in config.quirks and config.decoder == "ldl+cdl":
        hold_unused_norm(decoder)
    return decoder
