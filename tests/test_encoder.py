"""encoder.py: position tables, reference points, initial offsets, the encoder layer, the common grid."""
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from encoder import (DeformableEncoder, DeformableLayer, OrdinaryLayer, cell_references, paper_frequencies, position_table,
                     resize_weights, small_frequencies, time_weights, to_common_grid)

FLOORED = partial(paper_frequencies, pairs_differ=False)
UNFLOORED = partial(paper_frequencies, pairs_differ=True)


def padding_of(steps, height, width, content_height, content_width):
    padding = torch.ones(1, steps, height, width, dtype=torch.bool)
    padding[:, :, :content_height, :content_width] = False
    return padding


@pytest.mark.parametrize("frequencies, floored", [(FLOORED, True), (UNFLOORED, False)])
def test_position_table_against_its_formula_beside_padding(frequencies, floored):
    table = position_table(padding_of(2, 4, 5, 3, 4), (4, 6, 6), frequencies)[0]
    for t, y, x in [(0, 0, 0), (1, 2, 3), (1, 1, 0)]:
        for axis, (place, last, n, first) in enumerate([(t + 1, 2, 4, 0), (y + 1, 3, 6, 4), (x + 1, 4, 6, 10)]):
            for i in range(n):
                half = i // 2 if floored else i / 2
                angle = place / (last + 1e-6) * 2 * math.pi * 10000 ** (-2 * half / n)
                expected = math.sin(angle) if i % 2 == 0 else math.cos(angle)
                assert table[t, y, x, first + i] == pytest.approx(expected, abs=1e-5), (axis, i)
    assert torch.allclose(table[:, 3, :4, 4:10], table[:, 2, :4, 4:10], atol=1e-5)  # padding behind content keeps the last count
    assert torch.allclose(table[:, 3, 4, 4::2], torch.zeros(2, 6)), "a wholly padded line counts 0: its sines are 0"


def test_dealing_pairs_to_heads_gives_every_head_every_axis():
    plain = position_table(padding_of(2, 3, 4, 3, 4), (4, 8, 8), small_frequencies)
    dealt = position_table(padding_of(2, 3, 4, 3, 4), (4, 8, 8), small_frequencies, num_groups=2)
    t, y, x = plain.split((4, 8, 8), dim=-1)
    first = torch.cat([t[..., 0:2], y[..., 0:2], y[..., 4:6], x[..., 0:2], x[..., 4:6]], dim=-1)
    assert torch.equal(dealt[..., :10], first)


def test_reference_points_are_cell_centres_over_the_unpadded_share():
    paddings = [padding_of(2, 4, 6, 3, 3), padding_of(1, 2, 3, 2, 2)]
    references = cell_references(paddings)
    assert references.shape == (1, 2 * 4 * 6 + 2 * 3, 2, 3)
    cell = 1 * 24 + 2 * 6 + 1  # t = 1, y = 2, x = 1 of level 0
    own = torch.tensor([1.5 / 2, 2.5 / 3, 1.5 / 3])
    assert torch.allclose(references[0, cell, 0], own * torch.tensor([1, 3 / 4, 3 / 6]))
    assert torch.allclose(references[0, cell, 1], own * torch.tensor([1, 2 / 2, 2 / 3]))


def test_initial_offsets_point_in_four_directions_half_of_them_ahead_in_time():
    layer = DeformableLayer(16, 8, 2, 3, 32, 0.0, offset_axes=False)
    layer.initialise()
    offsets = layer.sampling_offsets.bias.detach().view(8, 2, 3, 3)  # (M, L, P, 3) in t, h, w
    for head in range(8):
        angle = head % 4 * math.pi / 2
        for point in range(3):
            expected = torch.tensor([float(head < 4), math.sin(angle), math.cos(angle)]) * (point + 1)
            assert torch.allclose(offsets[head, 1, point], expected, atol=1e-6)
    assert layer.sampling_offsets.weight.abs().max() == 0 and layer.attention_weights.weight.abs().max() == 0


def plain_attention(layer, x, positions, padding, references, shapes):
    """The layer's attention, cell by cell and point by point, by trilinear interpolation written out."""
    heads, levels, points = layer.sizes
    value = layer.value_proj(x) * ~padding[..., None]
    query = x + positions
    offsets = layer.sampling_offsets(query).view(*x.shape[:2], heads, levels, points, 3)
    weights = layer.attention_weights(query).view(*x.shape[:2], heads, levels * points).softmax(-1)
    out = torch.zeros_like(x).view(*x.shape[:2], heads, -1)
    starts = [0]
    for t, h, w in shapes:
        starts.append(starts[-1] + t * h * w)
    for cell in range(x.shape[1]):
        for head in range(heads):
            for level, shape in enumerate(shapes):
                sizes = torch.tensor(shape, dtype=torch.float32)
                divisor = sizes[[1, 2, 0]] if layer.offset_axes else sizes
                grid = value[0, starts[level]:starts[level + 1]].view(*shape, heads, -1)[..., head, :]
                for point in range(points):
                    place = (references[0, cell, level] + offsets[0, cell, head, level, point] / divisor) * sizes - 0.5
                    for corner in torch.cartesian_prod(*[torch.arange(2)] * 3):
                        index = place.floor().long() + corner
                        if (index >= 0).all() and (index < sizes).all():
                            share = (1 - (place - index).abs()).prod()
                            out[0, cell, head] += weights[0, cell, head, level * points + point] * share * grid[tuple(index)]
    return layer.output_proj(out.flatten(2))


@pytest.mark.parametrize("offset_axes", [False, True])
def test_a_layer_against_loops_over_cells_and_points(offset_axes):
    shapes = [(2, 3, 2), (1, 2, 2)]
    layer = DeformableLayer(8, 2, 2, 2, 16, 0.0, offset_axes)
    x, positions = torch.randn(1, 16, 8), torch.randn(1, 16, 8)
    paddings = [padding_of(2, 3, 2, 2, 2), padding_of(1, 2, 2, 2, 1)]
    padding, references = torch.cat([p.flatten(1) for p in paddings], 1), cell_references(paddings)
    with torch.no_grad():
        attended = plain_attention(layer, x, positions, padding, references, shapes)
        expected = layer.norm1(x + attended)
        expected = layer.norm2(expected + layer.linear2(layer.linear1(expected).relu()))
        assert torch.allclose(layer(x, positions, padding, references, shapes), expected, atol=1e-5)
        cells = torch.tensor([3, 14])
        assert torch.allclose(layer(x, positions, padding, references, shapes, cells), expected[:, cells], atol=1e-5)


def test_without_gradients_queries_are_encoded_in_pieces_to_the_same_result(monkeypatch):
    monkeypatch.setattr("encoder.PIECE", 7)
    shapes, seen = [(2, 3, 2), (1, 2, 2)], []
    layer = DeformableLayer(8, 2, 2, 2, 16, 0.0, False)
    layer.linear1.register_forward_hook(lambda module, inputs, out: seen.append(out.shape[1]))
    x, positions = torch.randn(2, 16, 8), torch.randn(1, 16, 8)
    paddings = [padding_of(2, 3, 2, 2, 2), padding_of(1, 2, 2, 2, 1)]
    rest = torch.cat([p.flatten(1) for p in paddings], 1), cell_references(paddings), shapes
    expected = layer(x, positions, *rest)
    with torch.no_grad():
        assert torch.allclose(layer(x, positions, *rest), expected, atol=1e-6)
    assert seen == [16, 7, 7, 2]


def test_only_the_time_steps_asked_for_are_encoded_in_the_last_layer():
    encoder = DeformableEncoder(2, 8, 2, 2, 1, 16, 0.0, False)
    torch.nn.init.normal_(encoder.level_embed)
    maps = [torch.randn(2, 8, 3, 4, 4), torch.randn(2, 8, 3, 2, 2)]
    paddings = [torch.zeros(1, *x.shape[2:], dtype=torch.bool) for x in maps]
    tables = [torch.randn(1, *x.shape[2:], 8) for x in maps]
    every, some = torch.ones(3, dtype=torch.bool), torch.tensor([False, True, True])
    with torch.no_grad():
        full, part = encoder(maps, paddings, tables, [every, every]), encoder(maps, paddings, tables, [some, every])
    assert torch.allclose(part[0], full[0][:, some], atol=1e-6) and torch.allclose(part[1], full[1], atol=1e-6)


def test_an_ordinary_layer_is_attention_over_the_unpadded_cells():
    layer = OrdinaryLayer(8, 2, 16, 0.0).eval()
    x, positions, padding = torch.randn(2, 6, 8), torch.randn(1, 6, 8), torch.zeros(2, 6, dtype=torch.bool)
    padding[1, 4:] = True
    with torch.no_grad():
        out = layer(x, positions, padding, None, None)
        part = layer(x, positions, padding, None, None, cells=torch.tensor([3, 0]))
        query, key, value = (F.linear(of, layer.attention.in_proj_weight[8 * i:8 * i + 8]) for i, of in
                             enumerate((x + positions, x + positions, x)))
        heads = []
        for head in (slice(0, 4), slice(4, 8)):
            logits = query[..., head] @ key[..., head].transpose(1, 2) / 2
            heads.append(logits.masked_fill(padding[:, None], -math.inf).softmax(-1) @ value[..., head])
        y = layer.norm1(x + layer.attention.out_proj(torch.cat(heads, -1)))
        expected = layer.norm2(y + layer.linear2(layer.linear1(y).relu()))
    assert torch.allclose(out, expected, atol=1e-5)
    assert torch.allclose(part, expected[:, [3, 0]], atol=1e-5)


@pytest.mark.parametrize("size, target", [(1, 3), (5, 5), (7, 3), (4, 9), (14, 1)])
def test_resize_weights_are_linear_interpolation(size, target):
    line = torch.randn(1, 1, size)
    expected = F.interpolate(line, size=target, mode="linear", align_corners=False)
    assert torch.allclose(line[0, 0] @ resize_weights(size, target, False).T, expected[0, 0], atol=1e-5)
    grid = torch.zeros(1, 1, target, 2)
    grid[..., 0] = torch.linspace(-1, 1, target)
    expected = F.grid_sample(line[:, :, None], grid, align_corners=False)  # zeros outside
    assert torch.allclose(line[0, 0] @ resize_weights(size, target, True).T, expected[0, 0, 0], atol=1e-5)


def test_the_common_grid_against_trilinear_interpolation():
    maps = [torch.randn(2, 3, 6, 8, 5), torch.randn(2, 4, 3, 4, 5)]  # (B, T, H, W, D)
    frames, keep = 6, torch.tensor([5, 0, 3])
    times = time_weights([x.movedim(-1, 1) for x in maps], frames, keep, False)
    out = to_common_grid(maps, (3, 4), times, False)
    for level, x in enumerate(maps):
        expected = F.interpolate(x.movedim(-1, 1), size=(frames, 3, 4), mode="trilinear", align_corners=False)
        assert torch.allclose(out[:, :, level], expected.movedim(1, -1)[:, keep], atol=1e-5)
