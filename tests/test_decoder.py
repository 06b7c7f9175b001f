"""decoder.py: anchors and their embedding, both layers against Eq. 1 and Sec. 4.2 written out, the gate, pieces."""
import math

import pytest
import torch

import decoder as decoder_module
from decoder import (ClassifyingLayer, Decoder, LocalizingLayer, OneMapDecoder, anchor_embedding, inverse_sigmoid,
                     join_yx)
from encoder import paper_frequencies, small_frequencies
from model import QUIRKS


def make_decoder(num_layers=2, quirks=(), **changes):
    options = dict(dim=16, num_heads=4, num_levels=2, dim_feedforward=24, dropout=0.0, num_queries=3, num_frames=2,
                   num_classes=5, num_blocks=2, logit_dropout=0.0, recompute=False, frequencies=paper_frequencies(8),
                   num_groups=1, quirks=quirks)
    decoder = Decoder(num_layers, **{**options, **changes})
    for parameter in decoder.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return decoder.eval()


def inputs(frames=3, actors=3, height=2, width=4, dim=16, levels=2):
    padding = torch.zeros(frames, height, width, dtype=torch.bool)
    padding[1, :, 3] = True
    anchors = torch.rand(frames, actors, 4) * 0.5 + 0.2
    return (torch.randn(frames, levels, height, width, dim), torch.randn(frames, height, width, dim), padding, anchors,
            torch.randn(frames, actors, dim))


def test_inverse_sigmoid_inverts_and_stays_finite_at_the_ends():
    x = torch.tensor([0.1, 0.5, 0.93])
    assert torch.allclose(inverse_sigmoid(x).sigmoid(), x)
    assert inverse_sigmoid(torch.tensor([0.0, 1.0])).tolist() == pytest.approx([math.log(1e-5), -math.log(1e-5)], rel=1e-4)


def test_anchor_embedding_is_y_x_w_h_with_the_usual_frequencies():
    box = torch.tensor([0.3, 0.6, 0.2, 0.9])
    embedding = anchor_embedding(box, paper_frequencies(128))
    for place, value in enumerate((0.6, 0.3, 0.2, 0.9)):
        for i in (0, 1, 6, 127):
            angle = value * 2 * math.pi * 10000 ** (-2 * (i // 2) / 128)
            assert embedding[place, i] == pytest.approx(math.sin(angle) if i % 2 == 0 else math.cos(angle), abs=1e-5)


def test_joined_anchor_embedding_has_y_and_x_in_every_group():
    pair = torch.arange(16.0).view(2, 8)  # y, x
    assert torch.equal(join_yx(pair, 1), pair.flatten())
    assert join_yx(pair, 4).tolist()[:4] == [0, 1, 8, 9]


def test_the_positional_query_is_modulated_by_the_sizes_asked_for():
    decoder = make_decoder()
    anchors, x = torch.rand(2, 3, 4) * 0.5 + 0.2, torch.randn(2, 3, 16)
    embedding = anchor_embedding(anchors, decoder.frequencies)
    wanted = decoder.size_modulation(x).sigmoid()
    expected = torch.cat([embedding[..., 0, :] * (wanted[..., 1:] / anchors[..., 3:]),
                          embedding[..., 1, :] * (wanted[..., :1] / anchors[..., 2:3])], dim=-1)
    assert torch.allclose(decoder.positional_query(x, anchors, embedding, True), expected, atol=1e-6)
    assert torch.allclose(decoder.positional_query(x, anchors, embedding, False), expected * decoder.query_scale(x), atol=1e-6)


@pytest.mark.parametrize("first", [True, False])
def test_localizing_cross_attention_head_by_head(first):
    layer = LocalizingLayer(16, 4, 2, 24, 0.0, first).eval()
    x, box, place = (torch.randn(3, 2, 16) for _ in range(3))
    memory, keys = torch.randn(3, 2, 8, 16), torch.randn(3, 8, 16)
    padding, levels = torch.zeros(3, 8, dtype=torch.bool), torch.rand(3, 2, 2)
    padding[1, 5:] = True
    with torch.no_grad():
        attended, maps = layer.cross_attention(x, box, place, memory, levels, keys, padding)
        for frame in range(3):
            for actor in range(2):
                own = layer.context_norm(sum(levels[frame, actor, level] * memory[frame, level] for level in range(2)))
                content, position = layer.cross_key_content(own), layer.cross_key_position(keys[frame])
                query = layer.cross_query_content(x[frame, actor])
                if first:
                    query = query + layer.cross_query_box(box[frame, actor])
                    content = content + position
                where, value = layer.cross_query_position(place[frame, actor]), layer.cross_value(own)
                heads, mean = [], torch.zeros(8)
                for part in (slice(4 * h, 4 * h + 4) for h in range(4)):
                    key = torch.cat([content[:, part], position[:, part]], -1)
                    logits = key @ torch.cat([query[part], where[part]]) / math.sqrt(8)
                    weights = logits.masked_fill(padding[frame], -math.inf).softmax(-1)
                    heads.append(weights @ value[:, part])
                    mean += weights / 4
                assert torch.allclose(maps[frame, actor], mean, atol=1e-6)
                assert torch.allclose(attended[frame, actor], layer.cross_output(torch.cat(heads)), atol=1e-5)


@pytest.mark.parametrize("quirks", [(), ("split_heads",), ("unmasked_padding",), ("split_heads", "unmasked_padding")])
def test_class_attention_is_equation_one(quirks):
    layer = ClassifyingLayer(16, 4, 24, 0.0, 1, quirks).eval()
    queries, place, z, keys = torch.randn(2, 5, 16), torch.randn(2, 16), torch.randn(2, 8, 16), torch.randn(2, 8, 16)
    padding = torch.zeros(2, 8, dtype=torch.bool)
    padding[1, 6:] = True
    with torch.no_grad():
        maps = layer.attention_maps(queries, place, z, keys, padding)
        maps = torch.cat([part.expand(-1, -1, 5, -1) for part in maps], dim=1)  # (I, M, C, N)
        for pair in range(2):
            for c in range(5):
                if "split_heads" in quirks:
                    query = torch.cat([queries[pair, c], layer.query_position(place[pair])])
                    key = torch.cat([layer.key_content(z[pair]), keys[pair]], -1)
                else:
                    query = layer.query(torch.cat([queries[pair, c], place[pair]]))
                    key = layer.key(torch.cat([z[pair], keys[pair]], -1))
                for head in range(4):
                    part = slice(8 * head, 8 * head + 8)
                    logits = key[:, part] @ query[part] / math.sqrt(8)
                    if "unmasked_padding" not in quirks:
                        logits = logits.masked_fill(padding[pair], -math.inf)
                    assert torch.allclose(maps[pair, head, c], logits.softmax(-1), atol=1e-5)


def test_bare_output_leaves_no_way_around_the_attention():
    """Without add & norm behind it, class features depend on the class queries through the attention maps only."""
    for quirks, way_around in [(("bare_output",), False), ((), True)]:
        layer = ClassifyingLayer(16, 4, 24, 0.0, 1, quirks).eval()
        constant = torch.randn(1, 1, 16).expand(2, 8, 16)  # every cell alike: attention changes nothing
        arguments = (torch.randn(2, 16), constant, torch.randn(2, 16), torch.zeros(2, 8, 16), torch.zeros(2, 8).bool(), (2, 4))
        layer.value.weight.data.normal_()
        one, _ = layer(torch.randn(2, 5, 16), *arguments)
        two, _ = layer(torch.randn(2, 5, 16), *arguments)
        assert torch.allclose(one, two, atol=1e-4) != way_around


def test_shared_block_is_one_block_applied_as_often():
    shared, own = (ClassifyingLayer(16, 4, 24, 0.0, 3, quirks) for quirks in (("shared_block",), ()))
    assert len(shared.blocks) == 1 and len(own.blocks) == 3
    for block in own.blocks:
        block.load_state_dict(shared.blocks[0].state_dict())
    for name in ("actor_linear1", "actor_linear2", "actor_norm", "context_norm"):
        getattr(own, name).load_state_dict(getattr(shared, name).state_dict())
    arguments = torch.randn(2, 16), torch.randn(2, 8, 16), (2, 4), torch.zeros(2, 8, dtype=torch.bool)
    assert torch.allclose(shared.interaction(*arguments), own.interaction(*arguments))


def test_levels_are_mixed_by_the_actor_or_alike_for_all():
    x = torch.randn(2, 3, 16)
    for kind in ("actor", "weighted", "mean"):
        layer = LocalizingLayer(16, 4, 2, 24, 0.0, True, kind)
        if kind == "weighted":
            layer.level_weights.data = torch.tensor([0.0, math.log(3)])
        shares = layer.level_shares(x)
        expected = {"actor": None, "weighted": torch.tensor([0.25, 0.75]), "mean": torch.tensor([0.5, 0.5])}[kind]
        expected = layer.level_weights(x).softmax(-1) if kind == "actor" else expected.expand(2, 3, 2)
        assert torch.allclose(shares, expected)


@pytest.mark.parametrize("quirks", [(), ("split_heads",)])
@pytest.mark.parametrize("position", [True, False])
def test_only_the_positional_query_tells_a_class_where_the_actor_is(quirks, position):
    layer = ClassifyingLayer(16, 4, 24, 0.0, 1, quirks, class_position=position).eval()
    queries, z, keys, padding = torch.randn(1, 5, 16), torch.randn(1, 8, 16), torch.randn(1, 8, 16), torch.zeros(1, 8).bool()
    one, two = (layer.attention_maps(queries, torch.randn(1, 16), z, keys, padding) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one, two)) == (not position)
    elsewhere = layer.attention_maps(queries, torch.zeros(1, 16), z, keys + torch.randn(1, 8, 16), padding)
    assert all(torch.equal(a, b) for a, b in zip(one, elsewhere)) == (not position)
    assert sum(part.shape[1] for part in one) == 4


@pytest.mark.parametrize("combine", ["sum", "concat", "cross-attention", "self-attention"])
def test_ways_to_combine_actor_and_context(combine):
    layer = ClassifyingLayer(16, 4, 24, 0.0, 1, (), combine=combine).eval()
    actor, context, padding = torch.randn(2, 16), torch.randn(2, 8, 16), torch.zeros(2, 8, dtype=torch.bool)
    padding[1, 6:] = True
    with torch.no_grad():
        out = layer.combined(actor, context, padding)
        order = torch.tensor([3, 1, 2, 0, 4, 5, 6, 7])
        assert torch.allclose(layer.combined(actor, context[:, order], padding), out[:, order], atol=1e-5), "cells are alike"
        assert not torch.allclose(layer.combined(actor + torch.randn(16), context, padding)[:, 0], out[:, 0], atol=1e-3)
        changed = context.clone()
        changed[1, 6:] += 1
        assert torch.allclose(layer.combined(actor, changed, padding)[:, :6], out[:, :6], atol=1e-5), "padding is hidden"
        changed[0, 7] += 1
        moved = not torch.allclose(layer.combined(actor, changed, padding)[0, :7], out[0, :7], atol=1e-4)
        assert moved == ("attention" in combine), "attention alone mixes cells"
        if combine == "sum":
            assert torch.equal(out, actor[:, None] + context)
        if combine == "concat":
            weight = layer.join.weight[:, :, None]                              # a 1d convolution of kernel 1
            joined = torch.cat([actor[:, :, None].expand(-1, -1, 8), context.transpose(1, 2)], 1)
            expected = torch.nn.functional.conv1d(joined, weight, layer.join.bias)
            assert torch.allclose(out, expected.transpose(1, 2), atol=1e-5)


def test_without_class_queries_the_heads_share_a_feature_and_the_map_is_the_actors():
    decoder, arguments = make_decoder(class_queries=False), inputs()
    seen = []
    decoder.norm.register_forward_hook(lambda module, args, out: seen.append(out))
    with torch.no_grad():
        predictions, maps = decoder(*arguments, return_attention=True)
        assert torch.allclose(predictions[-1]["pred_logits"], decoder.class_head(seen[-1]))
        own = decoder.localize(arguments[0].flatten(2, 3), arguments[1].flatten(1, 2), arguments[2].flatten(1), *arguments[3:])[2]
    assert maps.shape == (3, 3, 5, 2, 4) and torch.equal(maps[:, :, 3].flatten(2), own)


def test_the_one_map_decoder_looks_at_the_mean_of_the_levels_and_not_at_padding():
    decoder = OneMapDecoder(2, 16, 4, 24, 0.0, 3, 2, 5).eval()
    memory, keys, padding, _, x = inputs()
    places = torch.randn(3, 3, 16)
    with torch.no_grad():
        predictions, maps = decoder(memory, keys, padding, places, x)
        same = decoder(memory.flip(1), keys, padding, places, x)[0]
        memory[padding[:, None].expand(memory.shape[:-1])] += 5
        hidden = decoder(memory, keys, padding, places, x)[0]
    assert len(predictions) == 2 and predictions[0]["pred_boxes"].shape == (3, 3, 4)
    for name, value in predictions[-1].items():
        assert torch.allclose(value, same[-1][name], atol=1e-5) and torch.allclose(value, hidden[-1][name], atol=1e-5)
    assert maps[1][..., 3].abs().max() == 0 and torch.allclose(maps.sum((-2, -1)), torch.ones(1), atol=1e-5)


def test_anchors_of_the_next_layer_are_the_predicted_boxes_unless_the_quirk_says_otherwise():
    for quirks in ((), ("anchor_before_norm",)):
        decoder = make_decoder(quirks=quirks)
        anchors = []
        decoder.positional_query = lambda x, boxes, *rest: anchors.append(boxes) or Decoder.positional_query(decoder, x, boxes, *rest)
        with torch.no_grad():
            predictions, _ = decoder(*inputs())
        assert torch.equal(anchors[1], predictions[0]["pred_boxes"]) == (not quirks)


@pytest.mark.parametrize("quirks", [(), QUIRKS])
def test_in_pieces_as_in_one(quirks, monkeypatch):
    decoder, arguments = make_decoder(quirks=quirks), inputs(frames=5)
    whole, maps = decoder(*arguments, return_attention=True)  # with gradients: in one
    monkeypatch.setattr(decoder_module, "PIECE", 2)
    with torch.no_grad():
        pieces, maps_in_pieces = decoder(*arguments, return_attention=True)
    for one, two in zip(whole, pieces):
        assert all(torch.allclose(one[name], two[name], atol=1e-5) for name in one)
    assert torch.allclose(maps, maps_in_pieces, atol=1e-6)
    assert torch.allclose(maps.sum((-2, -1)), torch.ones(1), atol=1e-5)


def test_class_features_send_no_gradient_into_the_actor_features():
    decoder = make_decoder(num_layers=1)
    predictions, _ = decoder(*inputs())
    predictions[0]["pred_logits"].sum().backward()
    layer = decoder.localizing[0]
    assert layer.cross_output.weight.grad is None, "f is detached"
    assert layer.level_weights.weight.grad.abs().max() > 0, "x is not"


def test_the_gate_skips_actors_and_leaves_the_others():
    decoder, arguments = make_decoder(), inputs()
    with torch.no_grad():
        full, _ = decoder(*arguments)
        gate = full[-1]["pred_conf"].sigmoid().median().item()
        seen = []
        decoder.classifying[0].register_forward_hook(lambda module, args, out: seen.append(len(out[0])))
        gated, _ = decoder(*arguments, gate=gate)
    kept = full[-1]["pred_conf"].sigmoid() >= gate
    assert sum(seen) == kept.sum() == 5
    assert torch.allclose(gated[-1]["pred_logits"][kept], full[-1]["pred_logits"][kept], atol=1e-5)
    assert (gated[-1]["pred_logits"][~kept] == -1e4).all()
