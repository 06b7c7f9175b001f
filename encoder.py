"""3D deformable transformer encoder and the common grid (Sec. 4.1; the paper's supplement C).

The L maps (B, D, T_l, H_l, W_l) of the backbone become one sequence of S = sum T_l*H_l*W_l cells. Every cell, as a query,
samples P points per head and level around its own place, at offsets in (t, h, w) and with weights that a linear
layer reads off the query. Then all encoded maps are brought to the T x H x W of one of them, in all T frames
(last paragraph of Sec. 4.1): `to_common_grid`. Table 1's ordinary encoder is the same with `OrdinaryLayer`s on one map.

Departures of the released model, by their names in SPEC.md: `position_pairs` (sine and cosine of a pair differ in
frequency), `offset_axes` (an (x, y, t) offset is divided by (T, W, H)), `grid_edge` (the outermost samples of the common
grid lie half a cell outside and are halved).
"""

# B clips, T_l, H_l, W_l cells of level l, L levels, S cells of all levels, D channels, M heads, P points

import math

import torch
import torch.nn.functional as F
from torch import nn

from deform3d_triton import deform_attn_3d_fused

PIECE = 16384  # queries whose samples and hidden units are held at once where no gradient is wanted


def position_table(padding, channels, frequencies, num_groups=1, centred=False):
    """Sine position table of a map: padding (B, T, H, W), True on padding -> (B, T, H, W, sum of channels).

    Positions are counts of unpadded cells along an axis, from 1, over the last count, times 2 pi; `centred` counts cell
    centres (from 1/2). channels: even numbers for (t, h, w), 0 leaves an axis out. frequencies(n) gives the n
    frequencies of an axis with n channels; sine on even channels, cosine on odd ones. With num_groups > 1 the
    sine-cosine pairs are dealt out to that many groups of channels (heads), so that each has every axis.
    """
    content = (~padding).float()
    parts = []
    for axis, n in zip((1, 2, 3), channels):
        if n == 0:
            continue
        counts = content.cumsum(axis)
        last = counts.narrow(axis, counts.shape[axis] - 1, 1)
        position = (counts - 0.5 * centred) / (last + 1e-6) * 2 * math.pi
        angle = position[..., None] * frequencies(n).to(position)  # (B, T, H, W, n)
        pairs = torch.stack([angle[..., 0::2].sin(), angle[..., 1::2].cos()], dim=-1)  # (B, T, H, W, n/2, 2)
        pairs = pairs.unflatten(-2, (-1, num_groups)).transpose(-3, -2)  # (B, T, H, W, groups, n/2/groups, 2)
        parts.append(pairs.flatten(-2))  # (B, T, H, W, groups, n/groups)
    return torch.cat(parts, dim=-1).flatten(-2)  # (B, T, H, W, channels)


def paper_frequencies(n, pairs_differ=False):
    """10000^(-2*floor(i/2)/n) for channel i; with the quirk `position_pairs` the division i/2 is not floored."""
    channel = torch.arange(n, dtype=torch.float32)
    half = channel / 2 if pairs_differ else torch.div(channel, 2, rounding_mode="floor")
    return 10000 ** (-2 * half / n)


def small_frequencies(n):
    """From 2 to 0.1 cycles an image, both channels of a pair alike: what a small model learns from (SYNTHETIC.md)."""
    return torch.logspace(math.log10(2.0), math.log10(0.1), n // 2).repeat_interleave(2)


class OrdinaryLayer(nn.Module):
    """Table 1's alternative: every cell looks at every cell of one map, add & norm, feed-forward, add & norm. Called as
    `DeformableLayer` is."""

    def __init__(self, dim, num_heads, dim_feedforward, dropout):
        super().__init__()
        self.attention = nn.MultiheadAttention(dim, num_heads, dropout, batch_first=True)
        self.norm1 = nn.LayerNorm(dim)
        self.linear1 = nn.Linear(dim, dim_feedforward)
        self.linear2 = nn.Linear(dim_feedforward, dim)
        self.norm2 = nn.LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x, positions, padding, references, shapes, cells=None):
        keys, padding = x + positions, padding.expand(len(x), -1)
        queries, asked = (keys, x) if cells is None else (keys[:, cells], x[:, cells])   # (B, Q, D)
        attended = self.attention(queries, keys, x, key_padding_mask=padding, need_weights=False)[0]
        x = self.norm1(asked + self.dropout(attended))
        return self.norm2(x + self.dropout(self.linear2(self.dropout(F.relu(self.linear1(x))))))


class DeformableLayer(nn.Module):
    """Multi-scale deformable self-attention, add & norm, feed-forward, add & norm. (B, S, D) -> the same.

    offset_axes: the quirk of that name; then offsets are divided by (H, W, T) in the order (t, h, w).
    """

    def __init__(self, dim, num_heads, num_levels, num_points, dim_feedforward, dropout, offset_axes):
        super().__init__()
        self.sizes = (num_heads, num_levels, num_points)
        self.offset_axes = offset_axes
        self.sampling_offsets = nn.Linear(dim, num_heads * num_levels * num_points * 3)  # laid out (M, L, P, 3)
        self.attention_weights = nn.Linear(dim, num_heads * num_levels * num_points)     # laid out (M, L, P)
        self.value_proj = nn.Linear(dim, dim)
        self.output_proj = nn.Linear(dim, dim)
        self.norm1 = nn.LayerNorm(dim)
        self.linear1 = nn.Linear(dim, dim_feedforward)
        self.linear2 = nn.Linear(dim_feedforward, dim)
        self.norm2 = nn.LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)

    def initialise(self):
        """Heads of the first half look at t + 1, the others at t; angles 0, 90, 180, 270 in (x, y); point p at
        distance p."""
        num_heads, num_levels, num_points = self.sizes
        nn.init.zeros_(self.sampling_offsets.weight)
        nn.init.zeros_(self.attention_weights.weight)
        nn.init.zeros_(self.attention_weights.bias)
        nn.init.zeros_(self.value_proj.bias)
        nn.init.zeros_(self.output_proj.bias)
        head = torch.arange(num_heads)
        angle = (head % 4) * (math.pi / 2)
        first = (head < (num_heads + 1) // 2).float()
        direction = torch.stack([first, angle.sin().round(), angle.cos().round()], dim=-1)  # (M, 3) in t, h, w
        distance = torch.arange(1, num_points + 1)[:, None]
        bias = (direction[:, None, None] * distance).expand(num_heads, num_levels, num_points, 3)
        with torch.no_grad():
            self.sampling_offsets.bias.copy_(bias.flatten())

    def forward(self, x, positions, padding, references, shapes, cells=None):
        """x (B, S, D); positions (B or 1, S, D); padding (B or 1, S); references (B or 1, S, L, 3) in [0, 1]; shapes
        [(T_l, H_l, W_l), ...]; cells (Q,) names those that are encoded, all of them if None. Returns (B, Q, D)."""
        value = self.value_proj(x).masked_fill(padding[..., None], 0.0)
        value = value.unflatten(-1, (self.sizes[0], -1))                                 # (B, S, M, D/M)
        of_queries = x, positions, references
        if cells is not None:
            of_queries = [part[:, cells] for part in of_queries]
        if torch.is_grad_enabled():
            return self.encode(value, shapes, *of_queries)
        pieces = zip(*(part.split(PIECE, dim=1) for part in of_queries))
        return torch.cat([self.encode(value, shapes, *piece) for piece in pieces], dim=1)

    def look(self, query, shapes):
        """Where queries (B, Q, D) look: offsets (B, Q, M, L, P, 3) in cells, logits (B, Q, M, L, P), scales (L, 3), one
        over the cells of an axis."""
        with torch.autocast(query.device.type, enabled=False):  # float32 island: an offset of 4 cells in bf16 steps by 1/32
            offsets = self.sampling_offsets(query.float()).unflatten(-1, (*self.sizes, 3))
        divisors = torch.tensor([(h, w, t) if self.offset_axes else (t, h, w) for t, h, w in shapes])
        return offsets, self.attention_weights(query).unflatten(-1, self.sizes), (1.0 / divisors).to(offsets)

    def encode(self, value, shapes, x, positions, references):
        """Some queries x (B, Q, D), of positions (B or 1, Q, D) and references (B or 1, Q, L, 3), against the values
        (B, S, M, D/M) of all cells -> (B, Q, D)."""
        references = references.expand(len(x), -1, -1, -1)                               # (B, Q, L, 3)
        attended = deform_attn_3d_fused(value, shapes, references, *self.look(x + positions, shapes))
        x = self.norm1(x + self.dropout(self.output_proj(attended)))
        return self.norm2(x + self.dropout(self.linear2(self.dropout(F.relu(self.linear1(x))))))


def cell_references(paddings):
    """Where each cell looks from, in every level: paddings of the levels (B, T, H, W) -> (B, S, L, 3) in (t, h, w).

    A cell's centre over the unpadded extent of its own level, times the unpadded share of the level that is sampled.
    """
    points, shares = [], []
    for padding in paddings:
        sizes = torch.tensor(padding.shape[1:], device=padding.device)
        extent = torch.stack([(~padding[:, :, 0, 0]).sum(1), (~padding[:, 0, :, 0]).sum(1),
                              (~padding[:, 0, 0, :]).sum(1)], dim=-1)  # (B, 3) unpadded cells per axis
        axes = [torch.arange(n, device=padding.device) + 0.5 for n in padding.shape[1:]]
        centres = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, 2)  # (T*H*W, 3)
        points.append(centres[None] / extent[:, None])
        shares.append(extent / sizes)
    return torch.cat(points, dim=1)[:, :, None] * torch.stack(shares, dim=1)[:, None]  # (B, S, L, 3)


class DeformableEncoder(nn.Module):
    """maps: L x (B, D, T_l, H_l, W_l), their paddings L x (B or 1, T_l, H_l, W_l), position tables
    L x (B or 1, T_l, H_l, W_l, D) -> encoded maps, L x (B, T_l, H_l, W_l, D).

    steps: per level, bool (T_l,): the time steps that are asked for. The last layer encodes no others, and T_l counts
    these in what it returns. ordinary: `OrdinaryLayer`s in place of deformable ones, for a single level.
    """

    def __init__(self, num_layers, dim, num_heads, num_levels, num_points, dim_feedforward, dropout, offset_axes,
                 ordinary=False):
        super().__init__()
        self.level_embed = nn.Parameter(torch.empty(num_levels, dim))
        self.layers = nn.ModuleList([
            OrdinaryLayer(dim, num_heads, dim_feedforward, dropout) if ordinary else
            DeformableLayer(dim, num_heads, num_levels, num_points, dim_feedforward, dropout, offset_axes)
            for _ in range(num_layers)])

    def initialise(self):
        nn.init.normal_(self.level_embed)
        for layer in self.layers:
            if isinstance(layer, DeformableLayer):
                layer.initialise()

    def forward(self, maps, paddings, tables, steps):
        shapes = [tuple(x.shape[2:]) for x in maps]
        x = torch.cat([x.flatten(2).transpose(1, 2) for x in maps], dim=1)               # (B, S, D)
        positions = torch.cat([table.flatten(1, 3) + self.level_embed[level]
                               for level, table in enumerate(tables)], dim=1)            # (B, S, D)
        padding = torch.cat([p.flatten(1) for p in paddings], dim=1)                     # (B, S)
        references = cell_references(paddings)
        for layer in self.layers[:-1]:
            x = layer(x, positions, padding, references, shapes)
        asked = [step.repeat_interleave(h * w) for step, (_, h, w) in zip(steps, shapes)]
        cells = None if all(part.all() for part in asked) else torch.cat(asked).nonzero()[:, 0].to(x.device)
        x = self.layers[-1](x, positions, padding, references, shapes, cells)
        parts = x.split([int(part.sum()) for part in asked], dim=1)
        return [part.unflatten(1, (-1, h, w)) for part, (_, h, w) in zip(parts, shapes)]


def resize_weights(size, target, grid_edge):
    """Linear interpolation along one axis as a matrix (target, size).

    Samples lie at the centres of `target` equal parts. With the quirk `grid_edge` they go from -1 to 1 in the convention
    in which these are the outer edges of the line: the first and last lie half a cell outside of the cell centres, where
    half of the weight falls on zeros.
    """
    if grid_edge:
        place = (torch.linspace(-1, 1, target, dtype=torch.float64) + 1) / 2 * size - 0.5
    else:
        place = ((torch.arange(target, dtype=torch.float64) + 0.5) * size / target - 0.5).clamp(0, size - 1)
    return (1 - (place[:, None] - torch.arange(size)).abs()).clamp(min=0).float()


def time_weights(maps, frames, keep, grid_edge):
    """How the frames that `keep` (k,) names, of `frames`, are made of the time steps of each level: L x (k, T_l)."""
    return [resize_weights(x.shape[2], frames, grid_edge)[keep] for x in maps]


def to_common_grid(maps, size, times, grid_edge):
    """Encoded maps L x (B, T_l, H_l, W_l, D) -> (B, T, L, H, W, D), by the time weights L x (T, T_l)."""
    gridded = []
    for x, time in zip(maps, times):
        rows, columns = (resize_weights(n, target, grid_edge).to(x) for n, target in zip(x.shape[2:4], size))
        x = torch.einsum("xw,bthwd->bthxd", columns, x)
        x = torch.einsum("yh,bthxd->btyxd", rows, x)
        gridded.append(torch.einsum("ft,btyxd->bfyxd", time.to(x), x))                  # (B, T, H, W, D)
    return torch.stack(gridded, dim=2)
