"""encoder.py: positions, reference points, initial offsets, the layer, the common grid."""
import math

import pytest
import torch
import torch.nn.functional as F

from encoder import (DeformableEncoder, DeformableLayer, PositionTable, at_steps, cell_references,
                     frequencies, in_pieces, offset_scales, paper_table, resize_weights, steps_of,
                     to_common_grid)

SHAPES = ((2, 3, 2), (1, 2, 2))


def padding_of(steps, height, width, content_height, content_width):
    padding = torch.ones(1, steps, height, width, dtype=torch.bool)
    padding[:, :, :content_height, :content_width] = False
    return padding


def small_inputs():
    """positions, padding and references of two levels, each beside padding."""
    paddings = [padding_of(2, 3, 2, 2, 2), padding_of(1, 2, 2, 2, 1)]
    padding = torch.cat([p.flatten(1) for p in paddings], 1)
    return torch.randn(1, 16, 8), padding, cell_references(paddings)


@pytest.mark.parametrize("position_pairs", [False, True])
def test_position_table_against_its_formula_beside_padding(position_pairs):
    table = paper_table(16, position_pairs)(padding_of(2, 4, 5, 3, 4))[0]  # 4, 6, 6 channels
    for t, y, x in [(0, 0, 0), (1, 2, 3), (1, 1, 0)]:
        for place, last, n, first in [(t + 1, 2, 4, 0), (y + 1, 3, 6, 4), (x + 1, 4, 6, 10)]:
            for i in range(n):
                half = i / 2 if position_pairs else i // 2
                angle = place / (last + 1e-6) * 2 * math.pi * 10000 ** (-2 * half / n)
                expected = math.sin(angle) if i % 2 == 0 else math.cos(angle)
                assert table[t, y, x, first + i] == pytest.approx(expected, abs=1e-5)
    behind = table[:, 3, :4, 4:10]
    assert torch.allclose(behind, table[:, 2, :4, 4:10], atol=1e-5), "padding keeps the last count"
    sines = table[:, 3, 4, 4::2]
    assert torch.allclose(sines, torch.zeros(2, 6)), "a wholly padded line counts 0"


def test_a_table_counted_at_cell_centres():
    table = PositionTable([frequencies(2), frequencies(0), frequencies(2)], first=0.5)
    values = table(padding_of(4, 1, 2, 1, 2))[0]  # (4, 1, 2, 4): h has no channels
    assert values[0, 0, 0, 0] == pytest.approx(math.sin(2 * math.pi * 0.5 / 4), abs=1e-5)
    assert values[3, 0, 1, 2] == pytest.approx(math.sin(2 * math.pi * 1.5 / 2), abs=1e-5)


def test_reference_points_are_cell_centres_over_the_unpadded_share():
    paddings = [padding_of(2, 4, 6, 3, 3), padding_of(1, 2, 3, 2, 2)]
    references = cell_references(paddings)
    assert references.shape == (1, 2 * 4 * 6 + 2 * 3, 2, 3)
    cell = 1 * 24 + 2 * 6 + 1  # t = 1, y = 2, x = 1 of level 0
    own = torch.tensor([1.5 / 2, 2.5 / 3, 1.5 / 3])
    assert torch.allclose(references[0, cell, 0], own * torch.tensor([1, 3 / 4, 3 / 6]))
    assert torch.allclose(references[0, cell, 1], own * torch.tensor([1, 2 / 2, 2 / 3]))


def test_an_offset_of_one_cell_is_one_over_the_cells_of_its_axis_or_of_another_one():
    expected = torch.tensor([[1 / 2, 1 / 3, 1 / 2], [1, 1 / 2, 1 / 2]])
    assert torch.allclose(offset_scales(SHAPES, False, device="cpu"), expected)
    by_hwt = torch.tensor([[1 / 3, 1 / 2, 1 / 2], [1 / 2, 1 / 2, 1]])
    assert torch.allclose(offset_scales(SHAPES, True, device="cpu"), by_hwt), "quirk offset_axes"


def test_what_depends_on_sizes_alone_is_made_once_and_serves_training_too():
    with torch.inference_mode():
        first = resize_weights(3, 7, False, device="cpu")
    assert resize_weights(3, 7, False, device="cpu") is first and not first.is_inference()
    assert resize_weights(3, 8, False, device="cpu") is not first


def test_initial_offsets_point_in_four_directions_half_of_them_ahead_in_time():
    layer = DeformableLayer(16, 8, 2, 3, 32, 0.0)
    layer.initialise()
    offsets = layer.sampling_offsets.bias.detach().view(8, 2, 3, 3)  # (M, L, P, 3) in t, h, w
    for head in range(8):
        angle = head % 4 * math.pi / 2
        for point in range(3):
            expected = torch.tensor([float(head < 4), math.sin(angle), math.cos(angle)])
            assert torch.allclose(offsets[head, 1, point], expected * (point + 1), atol=1e-6)
    assert layer.sampling_offsets.weight.abs().max() == 0
    assert layer.attention_weights.weight.abs().max() == 0


def sampled(grid, place):
    """Trilinear interpolation of a grid (t, h, w, D) at a place in cells; zero outside."""
    total = 0
    for corner in torch.cartesian_prod(*[torch.arange(2)] * 3):
        index = place.floor().long() + corner
        if (index >= 0).all() and (index < torch.tensor(grid.shape[:3])).all():
            total = total + (1 - (place - index).abs()).prod() * grid[tuple(index)]
    return total


def plain_attention(layer, x, positions, padding, references, offset_axes):
    """The layer's attention, cell by cell and point by point."""
    heads, levels, points = layer.sizes
    value = layer.value_proj(x) * ~padding[..., None]
    query = x + positions
    offsets = layer.sampling_offsets(query).view(*x.shape[:2], heads, levels, points, 3)
    weights = layer.attention_weights(query).view(*x.shape[:2], heads, levels * points).softmax(-1)
    out = torch.zeros_like(x).view(*x.shape[:2], heads, -1)
    start = 0
    for level, shape in enumerate(SHAPES):
        cells = math.prod(shape)
        sizes = torch.tensor(shape, dtype=torch.float32)
        divisor = sizes[[1, 2, 0]] if offset_axes else sizes
        grid = value[0, start:start + cells].view(*shape, heads, -1)
        start += cells
        for cell in range(x.shape[1]):
            for head in range(heads):
                for point in range(points):
                    offset = offsets[0, cell, head, level, point] / divisor
                    place = (references[0, cell, level] + offset) * sizes - 0.5
                    weight = weights[0, cell, head, level * points + point]
                    out[0, cell, head] += weight * sampled(grid[..., head, :], place)
    return layer.output_proj(out.flatten(2))


@pytest.mark.parametrize("offset_axes", [False, True])
def test_a_layer_against_loops_over_cells_and_points(offset_axes):
    layer = DeformableLayer(8, 2, 2, 2, 16, 0.0)
    x, (positions, padding, references) = torch.randn(1, 16, 8), small_inputs()
    scales = offset_scales(SHAPES, offset_axes, device="cpu")
    with torch.no_grad():
        attended = plain_attention(layer, x, positions, padding, references, offset_axes)
        expected = layer.norm1(x + attended)
        expected = layer.norm2(expected + layer.linear2(layer.linear1(expected).relu()))
        arguments = (x, positions, padding, references, SHAPES, scales)
        assert torch.allclose(layer(*arguments), expected, atol=1e-5)
        some = layer(*arguments, [[1], [0]])
        assert torch.allclose(some, expected[:, 6:], atol=1e-5), "the cells of these time steps"


def test_without_gradients_queries_are_encoded_in_pieces_to_the_same_result(monkeypatch):
    monkeypatch.setattr("encoder.PIECE", 7)
    layer, seen = DeformableLayer(8, 2, 2, 2, 16, 0.0), []
    layer.linear1.register_forward_hook(lambda module, inputs, out: seen.append(out.shape[1]))
    scales = offset_scales(SHAPES, False, device="cpu")
    arguments = (torch.randn(2, 16, 8), *small_inputs(), SHAPES, scales)
    expected = layer(*arguments)
    with torch.no_grad():
        assert torch.allclose(layer(*arguments), expected, atol=1e-6)
    assert seen == [16, 7, 7, 2]


def test_pieces_of_a_function_are_put_together_again():
    x, y = torch.randn(5, 3), torch.randn(5)
    with torch.no_grad():
        doubled, summed = in_pieces(lambda x, y: (2 * x, x.sum(1) + y), 2, x, y)
    assert torch.equal(doubled, 2 * x) and torch.allclose(summed, x.sum(1) + y)


def made_encoder(recompute=False):
    layers = [DeformableLayer(8, 2, 2, 1, 16, 0.0) for _ in range(2)]
    encoder = DeformableEncoder(layers, 2, 8, recompute=recompute)
    torch.nn.init.normal_(encoder.level_embed)
    maps = [torch.randn(2, 8, 3, 4, 4), torch.randn(2, 8, 3, 2, 2)]
    paddings = [torch.zeros(1, *x.shape[2:], dtype=torch.bool) for x in maps]
    tables = [torch.randn(1, *x.shape[2:], 8) for x in maps]
    return encoder, (maps, paddings, tables)


def test_only_the_time_steps_asked_for_are_encoded_in_the_last_layer():
    encoder, arguments = made_encoder()
    with torch.no_grad():
        full, part = encoder(*arguments), encoder(*arguments, [[1, 2], [0, 1, 2]])
    assert torch.allclose(part[0], full[0][:, 1:], atol=1e-6)
    assert torch.allclose(part[1], full[1], atol=1e-6)


def test_recomputed_layers_have_the_same_gradients():
    encoder, (maps, *rest) = made_encoder()
    gradients = []
    for recompute in (False, True):
        encoder.recompute = recompute
        leaves = [x.clone().requires_grad_() for x in maps]
        sum(out.square().sum() for out in encoder(leaves, *rest)).backward()
        gradients.append([x.grad for x in leaves])
    assert all(torch.allclose(one, two, atol=1e-5) for one, two in zip(*gradients))


def test_the_steps_of_some_frames_are_all_that_their_weights_need():
    for size, target, grid_edge in [(4, 8, False), (8, 8, False), (4, 8, True), (5, 3, True)]:
        weights = resize_weights(size, target, grid_edge, device="cpu")
        for frames in ([0], [2], [0, target - 1]):
            used = weights[frames].any(0).nonzero()[:, 0].tolist()
            assert set(used) <= set(steps_of(frames, size, target, grid_edge))
    assert steps_of([3], 8, 8, False) == [3], "no step more than needed"


def test_cells_of_some_time_steps():
    x = torch.arange(16.0).view(1, 16, 1)
    assert at_steps(x, SHAPES, [[1], [0]]).flatten().tolist() == [*range(6, 12), *range(12, 16)]
    assert at_steps(x, SHAPES, None) is x


@pytest.mark.parametrize("size, target", [(1, 3), (5, 5), (7, 3), (4, 9), (14, 1)])
def test_resize_weights_are_linear_interpolation(size, target):
    line = torch.randn(1, 1, size)
    expected = F.interpolate(line, size=target, mode="linear", align_corners=False)
    weights = resize_weights(size, target, False, device="cpu")
    assert torch.allclose(line[0, 0] @ weights.T, expected[0, 0], atol=1e-5)
    grid = torch.zeros(1, 1, target, 2)
    grid[..., 0] = torch.linspace(-1, 1, target)
    expected = F.grid_sample(line[:, :, None], grid, align_corners=False)  # zeros outside
    weights = resize_weights(size, target, True, device="cpu")
    assert torch.allclose(line[0, 0] @ weights.T, expected[0, 0, 0], atol=1e-5), "quirk grid_edge"


def test_the_common_grid_against_trilinear_interpolation():
    maps = [torch.randn(2, 3, 6, 8, 5), torch.randn(2, 4, 3, 4, 5)]  # (B, T, H, W, D)
    frames = [5, 0, 3]
    steps = [steps_of(frames, x.shape[1], 6, False) for x in maps]
    held = [x[:, chosen] for x, chosen in zip(maps, steps)]
    full = to_common_grid(maps, [3, 4], (3, 4), 6, False)
    part = to_common_grid(held, [3, 4], (3, 4), 6, False, frames, steps)
    for level, x in enumerate(maps):
        expected = F.interpolate(x.movedim(-1, 1), (6, 3, 4), mode="trilinear", align_corners=False)
        assert torch.allclose(full[:, :, level], expected.movedim(1, -1), atol=1e-5)
        assert torch.allclose(part[:, :, level], expected.movedim(1, -1)[:, frames], atol=1e-5)


def test_each_layer_compiles_to_one_graph():
    layer = DeformableLayer(8, 2, 2, 2, 16, 0.0)
    scales = offset_scales(SHAPES, False, device="cpu")
    arguments = (torch.randn(1, 16, 8), *small_inputs(), SHAPES, scales)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    assert torch.allclose(compiled(*arguments), layer(*arguments), atol=1e-6)
