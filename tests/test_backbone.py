"""backbone.py: shapes of the maps, the ViT's position table and attention, stochastic depth, recomputation."""
import math

import pytest
import torch
import torch.nn.functional as F

from backbone import CSN152, CSNNeck, ConvNeck, ConvStem, ViT, ViTBlock, ViTNeck, running_index_table


def test_vit_gives_four_maps_at_strides_4_8_16_32():
    maps = ViTNeck(48, 16)(ViT(frames=4, depth=1, width=48, num_heads=12, drop_path=0.0)(torch.randn(2, 3, 4, 64, 96)))
    assert [tuple(x.shape) for x in maps] == [(2, 16, 2, 16, 24), (2, 16, 2, 8, 12), (2, 16, 2, 4, 6), (2, 16, 2, 2, 3)]


def test_a_side_that_16_does_not_divide_is_floored():
    features = ViT(frames=4, depth=1, width=48, num_heads=12, drop_path=0.0)(torch.randn(1, 3, 4, 70, 90))
    assert features[0].shape == (1, 48, 2, 4, 5)


def test_csn_halves_time_from_stage_two_and_keeps_the_last_stride():
    with torch.device("meta"):
        features = CSN152()(torch.empty(1, 3, 16, 64, 96))
        maps = CSNNeck(64)(features)
    assert [tuple(x.shape[1:]) for x in features] == [(512, 8, 8, 12), (1024, 4, 4, 6), (2048, 2, 4, 6)]
    assert [tuple(x.shape[1:]) for x in maps] == [(64, 8, 8, 12), (64, 4, 4, 6), (64, 2, 4, 6), (64, 2, 2, 3)]


def test_the_convolutional_stem_keeps_time():
    maps = ConvNeck(16)(ConvStem()(torch.randn(2, 3, 5, 64, 96)))
    assert [tuple(x.shape) for x in maps] == [(2, 16, 5, 8, 12), (2, 16, 5, 4, 6)]


def test_the_position_table_against_its_formula():
    table = running_index_table(7, 10)
    for position in range(7):
        for channel in range(10):
            angle = position / 10000 ** (2 * (channel // 2) / 10)
            expected = math.sin(angle) if channel % 2 == 0 else math.cos(angle)
            assert table[position, channel] == pytest.approx(expected, abs=1e-6)


def test_the_position_table_is_resized_per_time_step_when_the_token_count_differs():
    vit = ViT(frames=4, depth=1, width=24, num_heads=12, drop_path=0.0)
    assert torch.equal(vit.position_table(2, 14, 14), vit.positions)
    assert torch.equal(vit.position_table(2, 7, 28), vit.positions)  # as many tokens: used as it is
    step = vit.positions[196:].T.reshape(1, 24, 14, 14)
    expected = F.interpolate(step, size=(3, 5), mode="bicubic", align_corners=False)[0].flatten(1).T
    assert torch.allclose(vit.position_table(2, 3, 5)[15:], expected)
    with pytest.raises(ValueError, match="clip of 8 frames in a ViT built for 4"):
        vit.position_table(4, 14, 14)


def test_attention_against_plain_soft_max():
    block = ViTBlock(24, 3, 0.0)
    torch.nn.init.normal_(block.q_bias), torch.nn.init.normal_(block.v_bias)
    x = torch.randn(2, 5, 24)
    query, key, value = (x @ block.qkv.weight.T).split(24, dim=-1)
    query, value = query + block.q_bias, value + block.v_bias  # k has no bias
    expected = []
    for head in range(3):
        part = slice(8 * head, 8 * head + 8)
        weights = (query[..., part] @ key[..., part].transpose(1, 2) / math.sqrt(8)).softmax(-1)
        expected.append(weights @ value[..., part])
    assert torch.allclose(block.attention(x), block.proj(torch.cat(expected, -1)), atol=1e-5)


def test_stochastic_depth_drops_whole_clips_and_keeps_the_mean():
    block = ViTBlock(24, 3, 0.25)
    kept = block.keep(torch.ones(4000, 2, 3))
    assert kept.unique().tolist() == pytest.approx([0.0, 1 / 0.75]) and torch.equal(kept, kept[:, :1, :1].expand_as(kept))
    assert kept.mean() == pytest.approx(1.0, abs=0.05)
    assert torch.equal(block.eval().keep(torch.ones(8, 2, 3)), torch.ones(8, 2, 3))
