"""beside/ablations.py: every row of Tables 1 to 4, each alternative against its definition."""
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from beside.ablations import (Concat, CrossAttention, DETRDecoder, LinearClassDecoder, MeanLevels,
                              OrdinaryLayer, SelfAttention, WeightedLevels, WithoutP)
from decoder import ClassifyingLayer, LocalizingLayer
from encoder import frequencies
from model import PRESETS, VideoActionDetector

TINY = replace(PRESETS["ucf"], frames=4, encoder_layers=1, decoder_layers=2, vit_depth=1,
               vit_width=192, num_queries=3, dim_feedforward=256)
BASES = {"synthetic": PRESETS["synthetic"], "tiny": TINY,
         "tiny-plain-key": replace(TINY, quirks=(), key_frame=True)}
ALTERNATIVES = [
    dict(encoder="transformer"), dict(encoder="transformer", decoder="ldl"), dict(decoder="ldl"),
    dict(encoder="transformer", decoder="detr"), dict(decoder="detr"), dict(aggregation="weighted"),
    dict(aggregation="mean"), dict(class_position=False), dict(combine="concat"),
    dict(combine="cross-attention"), dict(combine="self-attention"),
    dict(combine="concat", class_position=False)]
NAMES = [" ".join(map(str, changes.values())) for changes in ALTERNATIVES]


def clips_of_two_sizes(frames):
    clips = torch.randn(2, 3, frames, 32, 64)
    clips[1, :, :, 16:], clips[1, :, :, :, 32:] = 0, 0
    mask = torch.zeros(2, 32, 64, dtype=torch.bool)
    mask[1, 16:], mask[1, :, 32:] = True, True
    return clips, mask


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("changes", ALTERNATIVES, ids=NAMES)
def test_every_row_trains_all_its_parameters_and_treats_a_batch_as_its_clips(base, changes):
    config = replace(BASES[base], **changes)
    torch.manual_seed(1)
    model, (clips, mask) = VideoActionDetector(config), clips_of_two_sizes(config.frames)
    out = model(clips, mask)
    names = ("pred_logits", "pred_boxes", "pred_conf")
    sum(out[name].square().mean() for name in names).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None or not parameter.requires_grad, name
    with torch.no_grad():
        out = model.eval()(clips, mask, return_attention=True)
        alone = model(clips[:1], return_attention=True)
        heads = model(clips[:1], return_attention="heads")["attention"]
        model.config = replace(config, gate=1.1)
        assert model(clips, mask, return_attention=True)["pred_logits"].isfinite().all()
    frames = 1 if config.key_frame else config.frames
    assert out["pred_logits"].shape == (2, frames, config.num_queries, config.num_classes)
    for name in (*names, "attention"):
        assert torch.allclose(out[name][0], alone[name][0], atol=1e-4), name
    assert heads.shape[4] == config.num_heads
    assert torch.allclose(heads.mean(4), alone["attention"], atol=1e-5)
    assert torch.allclose(out["attention"].sum((-2, -1)), torch.ones(1), atol=1e-5)
    height, width = out["attention"].shape[-2:]
    if "unmasked_padding" not in config.quirks:
        assert out["attention"][1, ..., height // 2:, :].abs().max() == 0
        assert out["attention"][1, ..., width // 2:].abs().max() == 0
    same_map = (out["attention"][:, :, :, :1] == out["attention"]).all()
    assert same_map == (config.decoder != "ldl+cdl")


@pytest.mark.parametrize("changes", ALTERNATIVES, ids=NAMES)
def test_every_row_decodes_some_frames_as_it_decodes_them_among_all(changes):
    config = replace(PRESETS["synthetic"], **changes)
    torch.manual_seed(1)
    model, clips = VideoActionDetector(config).eval(), torch.randn(1, 3, 8, 32, 48)
    with torch.no_grad():
        out, some = model(clips), model(clips, frames=[6, 1])
    for name in ("pred_logits", "pred_boxes", "pred_conf"):
        assert torch.allclose(some[name], out[name][:, [6, 1]], atol=1e-4), name


def test_what_no_level_needs_is_left_out():
    for changes in (dict(encoder="transformer"), dict(num_levels=3)):
        config = replace(TINY, **changes)
        names = [name for name, _ in VideoActionDetector(config).named_parameters()]
        necks = {name.split(".")[1] for name in names if name.startswith("neck.")}
        assert necks == ({"2"} if "encoder" in changes else {"0", "1", "2"})
    model = VideoActionDetector(replace(PRESETS["synthetic"], encoder="transformer"))
    names = [name for name, _ in model.named_parameters()]
    assert not any(name.startswith(("neck.1", "backbone.stages.3")) for name in names)


@pytest.mark.parametrize("level, stages", [(0, 2), (1, 3), (2, 4), (3, 4)])
def test_a_single_level_of_csn_needs_no_later_stage(level, stages):
    config = replace(PRESETS["ava_csn152"], encoder="transformer", grid_level=level)
    with torch.device("meta"):
        model = VideoActionDetector(config)
    backbone = model.backbone
    held = [len(getattr(backbone, f"layer{n}")) for n in range(1, 5)]
    assert held == [3, 8, 36, 3][:stages] + [0] * (4 - stages)


def test_an_ordinary_layer_is_attention_over_the_unpadded_cells():
    layer = OrdinaryLayer(8, 2, 16, 0.0).eval()
    x, positions = torch.randn(2, 6, 8), torch.randn(1, 6, 8)
    padding = torch.zeros(2, 6, dtype=torch.bool)
    padding[1, 4:] = True
    shapes = ((3, 1, 2),)
    with torch.no_grad():
        out = layer(x, positions, padding, None, shapes, None)
        part = layer(x, positions, padding, None, shapes, None, [[2, 0]])
        projected = []
        for number, source in enumerate((x + positions, x + positions, x)):
            weight = layer.attention.in_proj_weight[8 * number:8 * number + 8]
            projected.append(F.linear(source, weight))
        query, key, value = projected
        heads = []
        for head in (slice(0, 4), slice(4, 8)):
            logits = query[..., head] @ key[..., head].transpose(1, 2) / 2
            weights = logits.masked_fill(padding[:, None], -math.inf).softmax(-1)
            heads.append(weights @ value[..., head])
        y = layer.norm1(x + layer.attention.out_proj(torch.cat(heads, -1)))
        expected = layer.norm2(y + layer.linear2(layer.linear1(y).relu()))
    assert torch.allclose(out, expected, atol=1e-5)
    assert torch.allclose(part, expected[:, [4, 5, 0, 1]], atol=1e-5)


def test_levels_are_mixed_by_the_actor_or_alike_for_all():
    actors = torch.randn(2, 3, 16)
    weighted = WeightedLevels(16, 4, 2, 24, 0.0, True)
    weighted.level_weights.data = torch.tensor([0.0, math.log(3)])
    expected = torch.tensor([0.25, 0.75]).expand(2, 3, 2)
    assert torch.allclose(weighted.level_shares(actors), expected)
    mean = MeanLevels(16, 4, 2, 24, 0.0, True)
    assert torch.equal(mean.level_shares(actors), torch.full((2, 3, 2), 0.5))
    layer = LocalizingLayer(16, 4, 2, 24, 0.0, True)
    assert torch.allclose(layer.level_shares(actors), layer.level_weights(actors).softmax(-1))


def classifying_inputs():
    padding = torch.zeros(2, 8, dtype=torch.bool)
    padding[1, 6:] = True
    return torch.randn(2, 16), torch.randn(2, 8, 16), padding


def test_only_P_tells_a_class_where_its_actor_is():
    queries, z, key_pos = torch.randn(2, 5, 16), torch.randn(2, 8, 16), torch.randn(2, 8, 16)
    padding = torch.zeros(2, 8, dtype=torch.bool)
    for layer, told in ((ClassifyingLayer, True), (WithoutP, False)):
        attend = layer(16, 4, 24, 0.0, 1).class_attention_folded
        here, there = (attend(queries, torch.randn(2, 16), z, key_pos, padding) for _ in range(2))
        assert torch.equal(here, there) == (not told)
        P = torch.randn(2, 16)
        here, there = (attend(queries, P, z, torch.randn(2, 8, 16), padding) for _ in range(2))
        assert torch.equal(here, there) == (not told)


@pytest.mark.parametrize("mixin", [None, Concat, CrossAttention, SelfAttention])
def test_ways_to_combine_actor_and_context(mixin):
    bases = (ClassifyingLayer,) if mixin is None else (mixin, ClassifyingLayer)
    layer = type("Layer", bases, {})(16, 4, 24, 0.0, 1).eval()
    f, context, padding = classifying_inputs()
    with torch.no_grad():
        out = layer.combine(f, context, padding)
        order = torch.tensor([3, 1, 2, 0, 4, 5, 6, 7])
        moved = layer.combine(f, context[:, order], padding)
        assert torch.allclose(moved, out[:, order], atol=1e-5), "cells are alike"
        other = layer.combine(f + torch.randn(16), context, padding)
        assert not torch.allclose(other[:, 0], out[:, 0], atol=1e-3), "the actor matters"
        changed = context.clone()
        changed[1, 6:] += 1
        hidden = layer.combine(f, changed, padding)
        assert torch.allclose(hidden[:, :6], out[:, :6], atol=1e-5), "padding is hidden"
        changed[0, 7] += 1
        mixed = not torch.allclose(layer.combine(f, changed, padding)[0, :7], out[0, :7], atol=1e-4)
        assert mixed == (mixin in (CrossAttention, SelfAttention)), "attention alone mixes cells"
        if mixin is None:
            assert torch.equal(out, f[:, None] + context)
        if mixin is Concat:  # a 1d convolution of kernel 1
            joined = torch.cat([f[:, :, None].expand(-1, -1, 8), context.transpose(1, 2)], 1)
            expected = F.conv1d(joined, layer.join.weight[:, :, None], layer.join.bias)
            assert torch.allclose(out, expected.transpose(1, 2), atol=1e-5)


def frame_inputs():
    padding = torch.zeros(3, 2, 4, dtype=torch.bool)
    padding[1, :, 3] = True
    memory, key_pos = torch.randn(3, 2, 2, 4, 16), torch.randn(3, 2, 4, 16)
    return memory, key_pos, padding, torch.rand(3, 3, 4) * 0.5 + 0.2, torch.randn(3, 3, 16)


def test_without_class_queries_the_heads_share_a_feature_and_the_map_is_the_actors():
    localizing = [LocalizingLayer(16, 4, 2, 24, 0.0, first=n == 0) for n in range(2)]
    decoder = LinearClassDecoder(localizing, [], 16, 3, 2, 5, frequencies(8)).eval()
    seen = []
    decoder.norm.register_forward_hook(lambda module, args, out: seen.append(out))
    for layer in localizing:
        layer.register_forward_hook(lambda module, args, out: seen.append(out[3]))
    with torch.no_grad():
        predictions, maps = decoder(*frame_inputs(), return_attention=True)
        assert torch.allclose(predictions[-1]["pred_logits"], decoder.class_head(seen[-1]))
    for of_layer, of_actors in ((predictions[0]["attention"], seen[0]), (maps, seen[2])):
        assert of_layer.shape == (3, 3, 5, 2, 4)
        assert torch.equal(of_layer[:, :, 3].flatten(2), of_actors)


def test_detrs_decoder_looks_at_the_mean_of_the_levels_and_not_at_padding():
    decoder = DETRDecoder(2, 16, 4, 24, 0.0, 3, 2, 5).eval()
    memory, key_pos, padding, _, actors = frame_inputs()
    query_pos = torch.randn(3, 3, 16)
    with torch.no_grad():
        predictions, maps = decoder(memory, key_pos, padding, query_pos, actors,
                                    return_attention=True)
        same = decoder(memory.flip(1), key_pos, padding, query_pos, actors)[0]
        memory[padding[:, None].expand(memory.shape[:-1])] += 5
        hidden = decoder(memory, key_pos, padding, query_pos, actors)[0]
    assert len(predictions) == 2 and predictions[0]["pred_boxes"].shape == (3, 3, 4)
    for name, value in predictions[-1].items():
        assert torch.allclose(value, same[-1][name], atol=1e-5)
        assert torch.allclose(value, hidden[-1][name], atol=1e-5)
    assert maps[1][..., 3].abs().max() == 0
    for of_layer in (predictions[0]["attention"], maps):
        assert torch.allclose(of_layer.sum((-2, -1)), torch.ones(1), atol=1e-5)
    assert not torch.equal(predictions[0]["attention"], maps)
