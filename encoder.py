"""3D deformable transformer encoder and the common grid (Sec. 4.1; the paper's supplement C).

The L maps (B, D, T_l, H_l, W_l) of the backbone become one sequence of S = sum T_l*H_l*W_l cells.
Every cell, as a query, samples P points per head and level around its own place, at offsets in (t,
h, w) and with weights that a linear layer reads off the query. Then all encoded maps are brought
to the T x H x W of the third (stride 16; Config.grid_level, the synthetic preset's is the first),
in all T frames (key-frame presets: in frame T // 2), as the last paragraph of Sec. 4.1 has it:
`to_common_grid`.

Sizes (model.Config): 3 layers (AVA 6), M = 8, P = 8, L = 4, D = 256. Weights are a soft-max over
the L * P points of a head. Offsets count cells of the level they look at; each head starts in one
of four directions of (y, x), point p at p cells, and half of the heads also p time steps ahead.
The quirk `offset_axes` stretches this, see `offset_scales`. Values at padding are 0.

Where the released model departs from the paper, a line is marked "Quirk" (beside/released.py lists
them): `position_pairs`, `offset_axes` and `grid_edge` act here.

Nothing here waits for the GPU or copies to it: what depends on sizes alone is made on the device,
once.
"""

# B clips, T_l, H_l, W_l cells of level l, L levels, S cells of all levels, Q of them as queries,
# D channels, M heads, P points

import functools
import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from deform3d_triton import deform_attn_3d_fused

PIECE = 16384  # queries whose samples and hidden units are held at once where no gradient is wanted
TABLES_KEPT = 256


def made_once(make):
    """Keeps what `make(*sizes, device=...)` returns, for each sizes and device."""
    kept = {}

    @functools.wraps(make)
    def look_up(*sizes, device):
        key = (*sizes, torch.device(device))
        if key in kept:
            return kept[key]
        with torch.inference_mode(False):  # an inference tensor could not be used in training later
            table = make(*sizes, device=device)
        if type(table) is torch.Tensor:  # not a tensor of torch.export's, which only stands for one
            if len(kept) == TABLES_KEPT:
                kept.clear()
            kept[key] = table
        return table

    return look_up


def in_pieces(function, size, *tensors, dim=0):
    """function(*tensors) -> a tuple of tensors, `size` entries of the axis `dim` at a time where no
    gradient is wanted: the intermediate results of one piece are all that is held."""
    if torch.is_grad_enabled():
        return function(*tensors)
    pieces = zip(*(tensor.split(size, dim) for tensor in tensors))
    outputs = [function(*piece) for piece in pieces]
    return tuple(torch.cat(parts, dim) for parts in zip(*outputs))


# --------------------------------------------------------------------------------------------------
# Positions


def frequencies(n, position_pairs=False):
    """10000^(-2*floor(i/2)/n) for channel i of n. Quirk position_pairs: the division i/2 is not
    floored, so that the sine and the cosine of a pair differ in frequency."""
    channel = torch.arange(n, dtype=torch.float32)
    half = channel / 2 if position_pairs else torch.div(channel, 2, rounding_mode="floor")
    return 10000 ** (-2 * half / n)


def sine_embedding(position, frequencies):
    """Position (...) -> (..., n): sines on even channels, cosines on odd ones; frequencies (n,)."""
    angle = position[..., None] * frequencies  # (..., n)
    pairs = torch.stack([angle[..., 0::2].sin(), angle[..., 1::2].cos()], -1)  # (..., n/2, 2)
    return pairs.flatten(-2)  # (..., n)


class PositionTable(nn.Module):
    """Sine position table of a map: padding (B, T, H, W), True on padding -> (B, T, H, W,
    channels).

    A position is the count of unpadded cells along its axis, over the last count, times 2 pi.
    axes: the frequencies for t, h and w, one a channel; first: the count of the first cell.
    """

    def __init__(self, axes, first=1.0):
        super().__init__()
        self.first = first
        for name, values in zip("thw", axes):
            self.register_buffer(name, values, persistent=False)

    def forward(self, padding):
        content = (~padding).float()
        parts = []
        for axis, values in ((1, self.t), (2, self.h), (3, self.w)):
            counts = content.cumsum(axis)  # 1, 2, ..., last, last
            last = counts.amax(axis, keepdim=True)
            position = (counts - 1 + self.first) / (last + 1e-6) * 2 * math.pi
            parts.append(sine_embedding(position, values))
        return torch.cat(parts, dim=-1)


def paper_table(dim, position_pairs=False):
    """The table of the benchmark presets: a quarter of the D channels for t, three eighths each for
    h and w."""
    axes = [frequencies(n, position_pairs) for n in (dim // 4, 3 * dim // 8, 3 * dim // 8)]
    return PositionTable(axes)


# --------------------------------------------------------------------------------------------------
# The encoder


@made_once
def offset_scales(shapes, offset_axes, device):
    """What an offset counted in cells is in shares of its level: one over its cells, (L, 3) in (t,
    h, w).

    Quirk offset_axes: an offset (t, h, w) is divided by (H, W, T), so that 1 is T/H time steps, H/W
    rows, W/T columns."""
    cells = []
    for t, h, w in shapes:
        cells += (h, w, t) if offset_axes else (t, h, w)
    return torch.stack([torch.full((), 1 / n, device=device) for n in cells]).view(len(shapes), 3)


def cell_references(paddings):
    """Where each cell looks from, in every level: paddings L x (B, T_l, H_l, W_l) -> (B, S, L, 3)
    in (t, h, w).

    A cell's centre over the unpadded extent of its own level, times the unpadded share of the
    level that is sampled.
    """
    points, shares = [], []
    for padding in paddings:
        device, content = padding.device, ~padding
        extent = torch.stack([content[:, :, 0, 0].sum(1), content[:, 0, :, 0].sum(1),
                              content[:, 0, 0, :].sum(1)], dim=-1)  # (B, 3) cells
        axes = [torch.arange(n, device=device) + 0.5 for n in padding.shape[1:]]
        centres = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1)  # (T, H, W, 3)
        points.append(centres.flatten(0, 2)[None] / extent[:, None])  # (B, T*H*W, 3)
        share = [extent[:, axis] / n for axis, n in enumerate(padding.shape[1:])]
        shares.append(torch.stack(share, dim=-1))  # (B, 3)
    return torch.cat(points, dim=1)[:, :, None] * torch.stack(shares, dim=1)[:, None]


def at_steps(x, shapes, steps):
    """The cells of some time steps of each level: x (B, S, ...) -> (B, Q, ...); steps None: all of
    them."""
    if steps is None:
        return x
    parts = []
    levels = x.split([math.prod(shape) for shape in shapes], dim=1)
    for part, (t, h, w), chosen in zip(levels, shapes, steps):
        part = part.unflatten(1, (t, h * w))  # (B, T_l, H_l*W_l, ...)
        parts.append(select(part, chosen, dim=1).flatten(1, 2))
    return torch.cat(parts, dim=1)


def select(x, indices, dim):
    """x at a list of indices of an axis, by slices: no tensor of indices has to travel to the
    GPU."""
    return torch.stack([x.select(dim, index) for index in indices], dim)


class DeformableLayer(nn.Module):
    """Multi-scale deformable self-attention, add & norm, feed-forward, add & norm."""

    def __init__(self, dim, num_heads, num_levels, num_points, dim_feedforward, dropout):
        super().__init__()
        self.sizes = (num_heads, num_levels, num_points)
        samples = num_heads * num_levels * num_points
        self.sampling_offsets = nn.Linear(dim, samples * 3)  # laid out (M, L, P, 3)
        self.attention_weights = nn.Linear(dim, samples)  # laid out (M, L, P)
        self.value_proj = nn.Linear(dim, dim)
        self.output_proj = nn.Linear(dim, dim)
        self.norm1 = nn.LayerNorm(dim)
        self.linear1 = nn.Linear(dim, dim_feedforward)
        self.linear2 = nn.Linear(dim_feedforward, dim)
        self.norm2 = nn.LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)

    @torch.no_grad()
    def initialise(self):
        """Point p looks p cells away, at an angle of 0, 90, 180 or 270 degrees in (x, y); in the
        first half of the heads also p time steps ahead."""
        num_heads, num_levels, num_points = self.sizes
        nn.init.zeros_(self.sampling_offsets.weight)
        nn.init.zeros_(self.attention_weights.weight)
        nn.init.zeros_(self.attention_weights.bias)
        nn.init.zeros_(self.value_proj.bias)
        nn.init.zeros_(self.output_proj.bias)
        head = torch.arange(num_heads)
        angle = (head % 4) * (math.pi / 2)
        later = (head < (num_heads + 1) // 2).float()
        y, x = angle.sin().round(), angle.cos().round()
        direction = torch.stack([later, y, x], dim=-1)  # (M, 3)
        distance = torch.arange(1, num_points + 1)[:, None]  # (P, 1)
        bias = direction[:, None, None] * distance  # (M, 1, P, 3)
        self.sampling_offsets.bias.copy_(bias.expand(-1, num_levels, -1, -1).flatten())

    def sampling_offsets_and_logits(self, query):
        """Query (B, Q, D) -> offsets (B, Q, M, L, P, 3) in cells of the level, logits (B, Q, M, L,
        P)."""
        # A float32 island: an offset of 4 cells in bfloat16 steps by 1/32.
        with torch.autocast(query.device.type, enabled=False):
            offsets = self.sampling_offsets(query.to(self.sampling_offsets.weight.dtype))
        logits = self.attention_weights(query)
        return offsets.unflatten(-1, (*self.sizes, 3)), logits.unflatten(-1, self.sizes)

    def forward(self, x, positions, padding, references, shapes, scales, steps=None):
        """x (B, S, D); positions (B or 1, S, D); padding (B or 1, S); references (B or 1, S, L, 3)
        in [0, 1]; shapes ((T_l, H_l, W_l), ...); scales (L, 3): an offset of one cell.

        Returns (B, Q, D): the cells at `steps` (L lists of time steps), all S of them if None.
        """
        value = self.value_proj(x).masked_fill(padding[..., None], 0.0)
        value = value.unflatten(-1, (self.sizes[0], -1))  # (B, S, M, D/M)

        def encode(x, positions, references):
            references = references.expand(len(x), -1, -1, -1)  # (B, Q, L, 3)
            offsets, logits = self.sampling_offsets_and_logits(x + positions)
            attended = deform_attn_3d_fused(value, shapes, references, offsets, logits, scales)
            x = self.norm1(x + self.dropout(self.output_proj(attended)))
            # in place: the layer's largest tensor is there once
            hidden = self.dropout(F.relu(self.linear1(x), inplace=True))
            return (self.norm2(x + self.dropout(self.linear2(hidden))),)  # (B, Q, D)

        queries = [at_steps(part, shapes, steps) for part in (x, positions, references)]
        return in_pieces(encode, PIECE, *queries, dim=1)[0]


class DeformableEncoder(nn.Module):
    """maps L x (B, D, T_l, H_l, W_l), paddings L x (B or 1, T_l, H_l, W_l), position tables
    L x (B or 1, T_l, H_l, W_l, D) -> encoded maps, L x (B, T_l, H_l, W_l, D).

    steps: L lists of the time steps that are read later, or None for all. The last layer encodes
    no others, and T_l counts these in what it returns. recompute: each layer again in the backward
    pass.
    """

    def __init__(self, layers, num_levels, dim, offset_axes=False, recompute=False):
        super().__init__()
        self.offset_axes, self.recompute = offset_axes, recompute
        self.level_embed = nn.Parameter(torch.empty(num_levels, dim))
        self.layers = nn.ModuleList(layers)

    def forward(self, maps, paddings, tables, steps=None):
        shapes = tuple(tuple(x.shape[2:]) for x in maps)
        x = torch.cat([x.flatten(2).transpose(1, 2) for x in maps], dim=1)  # (B, S, D)
        positions = torch.cat([table.flatten(1, 3) + self.level_embed[level]
                               for level, table in enumerate(tables)], dim=1)  # (B or 1, S, D)
        padding = torch.cat([p.flatten(1) for p in paddings], dim=1)  # (B or 1, S)
        references = cell_references(paddings)  # (B or 1, S, L, 3)
        scales = offset_scales(shapes, self.offset_axes, device=x.device)  # (L, 3)
        for number, layer in enumerate(self.layers, start=1):
            wanted = steps if number == len(self.layers) else None
            arguments = (x, positions, padding, references, shapes, scales, wanted)
            if self.recompute and torch.is_grad_enabled():
                x = checkpoint(layer, *arguments, use_reentrant=False)
            else:
                x = layer(*arguments)
        if steps is not None:
            shapes = tuple((len(chosen), h, w) for chosen, (_, h, w) in zip(steps, shapes))
        levels = x.split([math.prod(shape) for shape in shapes], dim=1)
        return [part.unflatten(1, shape) for part, shape in zip(levels, shapes)]


# --------------------------------------------------------------------------------------------------
# The common grid


def sample_place(index, size, target, grid_edge):
    """Where sample `index` (a number, or a tensor of them) of `target` lies on a line of `size`
    cells, 0 being the centre of the first.

    The samples are the centres of `target` equal parts of the line. Quirk grid_edge: they are
    spread evenly from edge to edge, the first on the outer edge of the first cell, half a cell from
    its centre, where half of the weight falls on zeros; on every axis, time too.
    """
    if grid_edge:
        return index * (size / max(target - 1, 1)) - 0.5
    return (index + 0.5) * (size / target) - 0.5


@made_once
def resize_weights(size, target, grid_edge, device):
    """Linear interpolation along one axis as a matrix (target, size)."""
    cells = torch.arange(size, device=device, dtype=torch.float64)
    index = torch.arange(target, device=device, dtype=torch.float64)
    place = sample_place(index, size, target, grid_edge)
    if not grid_edge:  # nothing falls on zeros outside
        place = place.clamp(0, size - 1)
    return (1 - (place[:, None] - cells).abs()).clamp(min=0).float()


def steps_of(frames, size, num_frames, grid_edge):
    """The time steps, of `size`, that these of the `num_frames` frames are interpolated from: a
    list."""
    steps = set()
    for frame in frames:
        place = min(max(sample_place(frame, size, num_frames, grid_edge), 0), size - 1)
        steps |= {math.floor(place), math.ceil(place)}
    return sorted(steps)


def to_common_grid(maps, lengths, size, num_frames, grid_edge, frames=None, steps=None):
    """Encoded maps L x (B, T_l, H_l, W_l, D) -> (B, T, L, H, W, D), (H, W) being `size`.

    lengths: the L levels' numbers of time steps. frames: indices of the frames that are wanted,
    None for all; steps: for each level the time steps that `maps` holds, None for all.
    """
    gridded = []
    for level, x in enumerate(maps):
        time = resize_weights(lengths[level], num_frames, grid_edge, device=x.device)  # (T, T_l)
        if frames is not None:
            time = select(select(time, frames, dim=0), steps[level], dim=1)
        rows = resize_weights(x.shape[2], size[0], grid_edge, device=x.device)  # (H, H_l)
        columns = resize_weights(x.shape[3], size[1], grid_edge, device=x.device)  # (W, W_l)
        x = torch.einsum("xw,bthwd->bthxd", columns.to(x.dtype), x)
        x = torch.einsum("yh,bthxd->btyxd", rows.to(x.dtype), x)
        gridded.append(torch.einsum("ft,btyxd->bfyxd", time.to(x.dtype), x))  # (B, T, H, W, D)
    return torch.stack(gridded, dim=2)
