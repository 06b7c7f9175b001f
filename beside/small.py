"""What a small model without a large pre-training needs, in one place: the synthetic preset's
positions and start.

Found by trials on the synthetic set, not in the paper. `Config.positions = "small"` is
architecture:
    - positions of 2 down to .1 cycles an image, counted at cell centres: small maps cannot use
    finer ones;
    - they are added to the maps as well: the convolutional stem knows no places;
    - the keys' positions are of space alone, laid out as the anchors' are;
    - actor embeddings are learned (the paper's start at zero and stay there).
`Config.initialisation = "small"` is where training starts: an actor, and half of the heads of each
of its classes, look at and around the actor's own box; in later classifying layers the other heads
look away from it; the encoder samples half as far as the paper's.
`Config.offset_rate = 0.1` in its recipe: the encoder's sampling offsets learn at a tenth of the
rate, as Deformable DETR's do. At the full rate they brought causes to the actor on some seeds, and
class attention had nothing left to look for.
`Config.train_frames = 1` in its recipe: one frame of a clip, drawn at random, is decoded and
supervised where Eq. 5 sums over all. Each is decoded by itself: on average the gradient is right.
"""

# A actors, C classes, T frames, D channels, M heads

import math

import torch
from torch import nn

from encoder import DeformableEncoder, PositionTable


def frequencies(n):
    """From 2 to 0.1 cycles an image for n channels, both of a pair alike."""
    return torch.logspace(math.log10(2.0), math.log10(0.1), n // 2).repeat_interleave(2)


def map_table(dim):
    """Position table of the maps: a quarter of the D channels for t, three eighths each for h and
    w."""
    axes = [frequencies(n) for n in (dim // 4, 3 * dim // 8, 3 * dim // 8)]
    return PositionTable(axes, first=0.5)


def key_table(dim):
    """Position table of the decoder's keys: half of the D channels each for h and w."""
    return PositionTable([frequencies(n) for n in (0, dim // 2, dim // 2)], first=0.5)


def actor_embedding(num_queries, dim):
    """Learned actor embeddings (A, D). From zeros the first gradient is hundreds of times as
    large."""
    return nn.Parameter(0.5 * torch.randn(num_queries, dim))


class PlacedEncoder(DeformableEncoder):
    """The encoder on maps that positions are added to."""

    def forward(self, maps, paddings, tables, steps=None):
        placed = [x + table.movedim(-1, 1) for x, table in zip(maps, tables)]  # (B, D, T, H, W)
        return super().forward(placed, paddings, tables, steps)


# --------------------------------------------------------------------------------------------------
# The start


def initialise_small(model):
    """Called on a model that was initialised as the paper's is."""
    start_at_actors(model)
    for number, layer in enumerate(getattr(model.decoder, "classifying", ())):
        # In trials heads of the first layer that are hardly bound to the actor moved on to causes
        # far from it, sooner than heads without positions; the close ones stayed. Such heads of the
        # next layer ended at the actor as often as at a cause; of those away most found one.
        start_looking(layer, other_strength=0.5 if number == 0 else -1)


@torch.no_grad()
def start_at_actors(model):
    """Anchors, P, what localizing layers look at, class queries, scores, sampling offsets: all of
    the start but where class attention looks."""
    # From the usual distances, up to two cells of the coarse map, the encoder brings causes to the
    # actor's cells before class attention has looked for them.
    for layer in model.encoder.layers:
        if hasattr(layer, "sampling_offsets"):  # not in an ordinary transformer encoder
            layer.sampling_offsets.bias.mul_(0.5)
    decoder = model.decoder
    if hasattr(decoder, "class_head"):
        nn.init.constant_(decoder.class_head.bias, -2.0)
    else:
        nn.init.normal_(decoder.class_queries)
        # With a weight of 1 the mean of a LayerNorm, the logit, would not depend on the features.
        nn.init.normal_(decoder.class_norm.weight, std=3.0)
        nn.init.constant_(decoder.class_norm.bias, -2.0)
    if not hasattr(decoder, "anchors"):
        return
    boxes = anchors_around(decoder.num_queries)  # (A, 4)
    anchors = torch.logit(boxes).repeat_interleave(decoder.num_frames, dim=0)  # row a * T + t
    decoder.anchors.copy_(anchors)
    # P starts as the plain embedding of the anchor in every layer.
    start_constant(decoder.size_modulation, boxes[0, 2:].logit())
    if hasattr(decoder, "query_scale"):
        start_constant(decoder.query_scale, torch.ones(()))
    for layer in decoder.localizing:
        for projection in (layer.cross_query_position, layer.cross_key_position):
            strengths = torch.linspace(2, 1, layer.num_heads)  # (M,)
            projection.weight.copy_(by_place(strengths, projection.in_features).flatten(0, 1))
            nn.init.zeros_(projection.bias)


def anchors_around(num_queries):
    """One box in the middle, the others around it, (A, 4), of a figure's size."""
    angle = 2 * torch.pi * (torch.arange(num_queries - 1) + 0.5) / max(1, num_queries - 1)
    x, y = 0.5 + 0.45 * angle.cos(), 0.5 + 0.28 * angle.sin()
    ring = torch.stack([x, y], dim=-1)  # (A - 1, 2)
    centres = torch.cat([torch.full((1, 2), 0.5), ring])  # (A, 2)
    size = torch.tensor([0.2, 0.48]).expand(len(centres), 2)  # (A, 2)
    return torch.cat([centres, size], dim=-1)


def start_constant(mlp, bias):
    """An MLP whose output starts as `bias`, whatever its input."""
    nn.init.zeros_(mlp.layers[-1].weight)
    mlp.layers[-1].bias.copy_(bias)


def by_place(strengths, dim):
    """Projection of a position of D/2 channels each for y and x, (M, D/M, D), by which a query
    finds its own place: each of M heads has some sine-cosine pairs of both axes, of its strength: 2
    is a narrow look, 0.5 a wide one. Negative in the query and positive in the key it is a look
    anywhere else."""
    pairs = torch.arange(dim).view(2, -1, len(strengths), 2)  # (axis, pair of a head, M, 2)
    order = pairs.permute(2, 0, 1, 3).flatten(1)  # (M, D/M)
    return torch.eye(dim)[order] * torch.as_tensor(strengths)[:, None, None]


@torch.no_grad()
def start_looking(layer, other_strength):
    """Half of each head of a classifying layer is content, half position. Half of the heads
    (rounded up) start close to the actor, for every class; the others' strength is 0.5, hardly
    bound to it, or -1, away from it (without effect where Eq. 1 has no positions, Table 3, and with
    the quirk split_heads). What is of the class in a query is doubled: else heads moved for all
    classes alike."""
    dim, heads = layer.output.in_features, layer.num_heads
    # Quirk split_heads: keys are positions as they are, half of the heads have y, half x.
    if hasattr(layer, "query_position"):
        strength = torch.linspace(2, 1, heads).repeat_interleave(dim // heads)  # (D,)
        layer.query_position.weight.copy_(torch.diag(strength))
    if not hasattr(layer, "query"):
        return
    if layer.query.in_features > dim:  # else there are no positions in Eq. 1 (Table 3)
        strengths = torch.full((heads,), 2.0)  # (M,)
        strengths[(heads + 1) // 2:] = other_strength
        of_query = (layer.query.weight, by_place(strengths, dim))  # place: (M, D/M, D)
        of_key = (layer.key.weight, by_place(strengths.abs(), dim))
        for weight, place in (of_query, of_key):
            content = nn.init.xavier_uniform_(torch.empty(dim, dim))
            content = content.view(heads, -1, dim)  # (M, D/M, D)
            of_content = torch.cat([content, torch.zeros_like(place)], -1)  # (M, D/M, 2D)
            of_place = torch.cat([torch.zeros_like(content), place], -1)  # (M, D/M, 2D)
            weight.copy_(torch.cat([of_content, of_place], 1).flatten(0, 1))  # (M * 2D/M, 2D)
    layer.query.weight[:, :dim].mul_(2)  # the columns of the class query
