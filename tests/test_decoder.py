"""decoder.py: anchors, both layers against Eq. 1-2 and Sec. 4.2 written out, the gate, pieces."""
import math

import pytest
import torch

from decoder import ClassifyingLayer, Decoder, LocalizingLayer, inverse_sigmoid, masked_softmax
from encoder import frequencies


def make_decoder(num_layers=2, **options):
    localizing = [LocalizingLayer(16, 4, 2, 24, 0.0, first=n == 0) for n in range(num_layers)]
    classifying = [ClassifyingLayer(16, 4, 24, 0.0, 2) for _ in range(num_layers)]
    decoder = Decoder(localizing, classifying, 16, 3, 2, 5, frequencies(8), **options)
    for parameter in decoder.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return decoder.eval()


def inputs(frames=3, actors=3, height=2, width=4, dim=16, levels=2):
    """memory, key_pos, padding, anchors and actors of some frames."""
    padding = torch.zeros(frames, height, width, dtype=torch.bool)
    padding[1, :, 3] = True
    memory = torch.randn(frames, levels, height, width, dim)
    key_pos = torch.randn(frames, height, width, dim)
    anchors = torch.rand(frames, actors, 4) * 0.5 + 0.2
    return memory, key_pos, padding, anchors, torch.randn(frames, actors, dim)


def test_inverse_sigmoid_inverts_and_stays_finite_at_the_ends():
    x = torch.tensor([0.1, 0.5, 0.93])
    assert torch.allclose(inverse_sigmoid(x).sigmoid(), x)
    ends = inverse_sigmoid(torch.tensor([0.0, 1.0])).tolist()
    assert ends == pytest.approx([math.log(1e-5), -math.log(1e-5)], rel=1e-4)


def embedding_of(box):
    """The sine embedding of one box in the order y, x, w, h, written out: (4, 8)."""
    rows = []
    for value in (box[1], box[0], box[2], box[3]):
        row = []
        for i in range(8):
            angle = value * 2 * math.pi * 10000 ** (-2 * (i // 2) / 8)
            row.append(math.sin(angle) if i % 2 == 0 else math.cos(angle))
        rows.append(row)
    return torch.tensor(rows)


def test_query_position_and_P_are_made_of_the_embedding_of_the_anchor():
    decoder, (memory, key_pos, padding, anchors, actors) = make_decoder(), inputs()
    seen = []
    decoder.box_position.register_forward_hook(lambda module, args, out: seen.append(args[0]))
    with torch.no_grad():
        frames = (memory.flatten(2, 3), key_pos.flatten(1, 2), padding.flatten(1))
        _, outputs = decoder.localize(*frames, anchors, actors)
        for a in range(3):
            box, embedding = anchors[2, a], embedding_of(anchors[2, a].tolist())
            assert torch.allclose(seen[0][2, a], embedding.flatten(), atol=1e-5)
            width, height = decoder.size_modulation(actors[2, a]).sigmoid()
            of_y, of_x = embedding[0] * height / box[3], embedding[1] * width / box[2]
            P = outputs[0]["P"][2, a]
            assert torch.allclose(P, torch.cat([of_y, of_x]), atol=1e-5), "the first scale is 1"
            later = decoder.positional_query(actors, anchors, embedding.expand(3, 3, 4, 8), False)
            scaled = torch.cat([of_y, of_x]) * decoder.query_scale(actors[2, a])
            assert torch.allclose(later[2, a], scaled, atol=1e-5)


@pytest.mark.parametrize("first", [True, False])
def test_localizing_cross_attention_head_by_head(first):
    layer = LocalizingLayer(16, 4, 2, 24, 0.0, first).eval()
    actors, query_pos, P = torch.randn(3, 3, 2, 16)
    memory, key_pos = torch.randn(3, 2, 8, 16), torch.randn(3, 8, 16)
    padding, shares = torch.zeros(3, 8, dtype=torch.bool), torch.rand(3, 2, 2)
    padding[1, 5:] = True
    with torch.no_grad():
        attended, maps = layer.cross_attention(actors, query_pos, P, memory, shares, key_pos,
                                               padding)
        for frame in range(3):
            for actor in range(2):
                share, levels = shares[frame, actor], memory[frame]
                context = layer.context_norm(share[0] * levels[0] + share[1] * levels[1])
                content = layer.cross_key_content(context)
                position = layer.cross_key_position(key_pos[frame])
                query = layer.cross_query_content(actors[frame, actor])
                if first:
                    query = query + layer.cross_query_box(query_pos[frame, actor])
                    content = content + position
                where = layer.cross_query_position(P[frame, actor])
                value = layer.cross_value(context)
                heads, mean = [], torch.zeros(8)
                for part in (slice(4 * h, 4 * h + 4) for h in range(4)):
                    key = torch.cat([content[:, part], position[:, part]], -1)
                    logits = key @ torch.cat([query[part], where[part]]) / math.sqrt(8)
                    weights = logits.masked_fill(padding[frame], -math.inf).softmax(-1)
                    heads.append(weights @ value[:, part])
                    mean += weights / 4
                assert torch.allclose(maps[frame, actor], mean, atol=1e-6)
                expected = layer.cross_output(torch.cat(heads))
                assert torch.allclose(attended[frame, actor], expected, atol=1e-5)


def class_attention_inputs():
    """queries, P, z, key_pos, padding of two actors."""
    padding = torch.zeros(2, 8, dtype=torch.bool)
    padding[1, 6:] = True
    z, key_pos = torch.randn(2, 2, 8, 16)
    return torch.randn(2, 5, 16), torch.randn(2, 16), z, key_pos, padding


def test_class_attention_is_equation_one():
    """a = softmax((nu W_Q)(eta W_K)^T / sqrt(d)), nu = [q, P], eta = [z, P_V], number by number."""
    layer = ClassifyingLayer(16, 4, 24, 0.0, 1).eval()
    queries, P, z, key_pos, padding = class_attention_inputs()
    with torch.no_grad():
        maps = layer.class_attention(queries, P, z, key_pos, padding)
        for pair in range(2):
            for c in range(5):
                nu = torch.cat([queries[pair, c], P[pair]])
                eta = torch.cat([z[pair], key_pos[pair]], -1)
                query = layer.query.weight @ nu + layer.query.bias
                key = eta @ layer.key.weight.T
                for head in range(4):
                    part = slice(8 * head, 8 * head + 8)
                    logits = key[:, part] @ query[part] / math.sqrt(8)
                    expected = logits.masked_fill(padding[pair], -math.inf).softmax(-1)
                    assert torch.allclose(maps[pair, head, c], expected, atol=1e-5)


def test_the_folded_class_attention_is_the_printed_one_with_its_gradients():
    layer = ClassifyingLayer(16, 4, 24, 0.0, 1).double()
    queries, P, z, key_pos, padding = class_attention_inputs()
    leaves = [part.double().requires_grad_() for part in (queries, P, z, key_pos)]
    weight = torch.randn(2, 4, 5, 8, dtype=torch.float64)
    wanted = [*leaves, layer.query.weight, layer.query.bias, layer.key.weight]
    results = []
    for attention in (layer.class_attention, layer.class_attention_folded):
        maps = attention(*leaves, padding)
        results.append([maps, *torch.autograd.grad((maps * weight).sum(), wanted)])
    for printed, folded in zip(*results):
        assert torch.allclose(printed, folded, atol=1e-12)


def test_a_classifying_layer_step_by_step():
    """Sec. 4.2: z of f + x by the convolutions; the attention's value is of x, not of z."""
    layer = ClassifyingLayer(16, 4, 24, 0.0, 2).eval()
    f, P = torch.randn(2, 2, 16)
    context, key_pos = torch.randn(2, 2, 8, 16)
    queries, padding = torch.randn(1, 5, 16), torch.zeros(2, 8, dtype=torch.bool)
    with torch.no_grad():
        out, maps = layer(queries, f, context, P, key_pos, padding, (2, 4))
        actor = layer.actor_norm(f + layer.actor_linear2(layer.actor_linear1(f).relu()))
        z = layer.context_norm(actor[:, None] + context).view(2, 2, 4, 16)
        for block in layer.blocks:
            z = block(z)
        q = queries[0].view(5, 4, 4).transpose(0, 1)  # (M, C, D/M)
        among = (q @ q.transpose(1, 2) / 2).softmax(-1) @ q
        among = layer.self_output(among.transpose(0, 1).flatten(1))
        own = layer.norm1(queries + among).expand(2, -1, -1)
        expected = layer.class_attention(own, P, z.flatten(1, 2), key_pos, padding)
        assert torch.allclose(maps, expected, atol=1e-5)
        value = layer.value(context).view(2, 8, 4, 4)
        attended = torch.einsum("imcn,inmk->icmk", expected, value).flatten(2)
        x = layer.norm2(own + layer.output(attended))
        x = layer.norm3(x + layer.linear2(layer.linear1(x).relu()))
    assert torch.allclose(out, x, atol=1e-5)


def test_softmax_is_of_float32_and_leaves_padding_out():
    logits = torch.randn(2, 3, 4, 6, dtype=torch.bfloat16)
    padding = torch.zeros(2, 6, dtype=torch.bool)
    padding[1, 2:] = True
    weights = masked_softmax(logits, padding)
    assert weights.dtype == torch.float32 and weights[1, ..., 2:].abs().max() == 0
    assert torch.allclose(weights.sum(-1), torch.ones(()))
    assert masked_softmax(logits.double(), padding).dtype == torch.float64


def test_the_next_anchors_are_the_predicted_boxes_unless_the_quirk_says_otherwise():
    for quirk in (False, True):
        decoder, anchors = make_decoder(anchor_before_norm=quirk), []
        positional_query = decoder.positional_query

        def noted(actors, boxes, *rest):
            anchors.append(boxes)
            return positional_query(actors, boxes, *rest)

        decoder.positional_query = noted
        with torch.no_grad():
            predictions, _ = decoder(*inputs())
        assert torch.equal(anchors[1], predictions[0]["pred_boxes"]) == (not quirk)


def test_three_way_confidence_is_the_logit_of_soft_max_entry_one():
    decoder, actors = make_decoder(three_way_confidence=True), torch.randn(2, 3, 16)
    expected = decoder.confidence_head(actors).softmax(-1)[..., 1]
    assert torch.allclose(decoder.confidence(actors).sigmoid(), expected, atol=1e-6)


@pytest.mark.parametrize("gate", [0.0, 0.5])
def test_in_pieces_as_in_one(gate, monkeypatch):
    decoder, arguments = make_decoder(), inputs(frames=5)
    whole, maps = decoder(*arguments, gate=gate, return_attention=True)  # with gradients: in one
    monkeypatch.setattr("decoder.PIECE", 2)
    with torch.no_grad():
        pieces, maps_in_pieces = decoder(*arguments, gate=gate, return_attention=True)
        _, heads = decoder(*arguments, gate=gate, return_attention="heads")
    for one, two in zip(whole, pieces):
        assert all(torch.allclose(one[name], two[name], atol=1e-5) for name in one)
    assert torch.allclose(maps, maps_in_pieces, atol=1e-6)
    assert torch.allclose(heads.mean(3), maps, atol=1e-6)
    classified = whole[-1]["pred_conf"].sigmoid() >= gate
    assert torch.allclose(maps.sum((-2, -1)), classified[..., None].float(), atol=1e-5)


@pytest.mark.parametrize("gate", [0.0, 0.5])
def test_each_layer_has_the_maps_of_its_own_class_attention(gate):
    decoder, arguments = make_decoder(num_layers=3), inputs(frames=3)
    seen = []  # (I, M, C, N) each
    for layer in decoder.classifying:
        layer.register_forward_hook(lambda module, args, out: seen.append(out[1]))
    with torch.no_grad():
        predictions, last = decoder(*arguments, gate=gate, return_attention=True)
    maps = [layer["attention"] for layer in predictions[:-1]] + [last]
    classified = predictions[-1]["pred_conf"].sigmoid() >= gate
    for of_layer, of_pairs in zip(maps, seen, strict=True):
        assert torch.allclose(of_layer[classified].flatten(2), of_pairs.mean(1), atol=1e-6)
        assert (of_layer[~classified] == 0).all()
    assert "attention" not in decoder(*arguments, gate=gate)[0][0], "not asked for"


@pytest.mark.parametrize("num_layers", [1, 3])
def test_recomputed_classifying_layers_have_the_same_gradients(num_layers):
    decoder, arguments = make_decoder(num_layers), inputs()
    gradients = []
    for recompute in (False, True):
        decoder.recompute = recompute
        decoder.zero_grad()
        predictions, _ = decoder(*arguments)
        sum(layer["pred_logits"].square().sum() for layer in predictions).backward()
        gradients.append({name: p.grad for name, p in decoder.named_parameters()})
    assert sum(gradient is not None for gradient in gradients[0].values()) > 20
    for name, gradient in gradients[0].items():
        other = gradients[1][name]
        assert (gradient is None) == (other is None), name
        assert gradient is None or torch.allclose(gradient, other, atol=1e-5), name


def test_class_features_send_no_gradient_into_the_actor_features():
    decoder = make_decoder(num_layers=1)
    predictions, _ = decoder(*inputs())
    predictions[0]["pred_logits"].sum().backward()
    layer = decoder.localizing[0]
    assert layer.cross_output.weight.grad is None, "f is detached"
    assert layer.level_weights.weight.grad.abs().max() > 0, "the level shares are not"
    assert decoder.size_modulation.layers[0].weight.grad.abs().max() > 0, "nor is P"


def test_the_gate_skips_actors_and_leaves_the_others():
    decoder, arguments, seen = make_decoder(), inputs(), []
    with torch.no_grad():
        full, _ = decoder(*arguments)
        gate = full[-1]["pred_conf"].sigmoid().median().item()
        layer = decoder.classifying[0]
        layer.register_forward_hook(lambda module, args, out: seen.append(len(out[0])))
        gated, _ = decoder(*arguments, gate=gate)
        decoder(*arguments, gate=1.1)
    kept = full[-1]["pred_conf"].sigmoid() >= gate
    assert seen == [kept.sum(), 0] and kept.sum() == 5
    assert torch.allclose(gated[-1]["pred_logits"][kept], full[-1]["pred_logits"][kept], atol=1e-5)
    assert (gated[-1]["pred_logits"][~kept] == -1e4).all()


def test_each_layer_compiles_to_one_graph():
    decoder, (memory, key_pos, padding, _, actors) = make_decoder(), inputs()
    memory, key_pos, padding = memory.flatten(2, 3), key_pos.flatten(1, 2), padding.flatten(1)
    arguments = (actors, actors, actors, memory, key_pos, padding)
    localizing = decoder.localizing[0]
    expected = localizing(*arguments)
    compiled = torch.compile(localizing, backend="eager", fullgraph=True)
    for one, two in zip(compiled(*arguments), expected):
        assert torch.allclose(one, two, atol=1e-5)
    queries, P, z, key_pos, padding = class_attention_inputs()
    arguments = (queries, P, z, P, key_pos, padding, (2, 4))
    classifying = decoder.classifying[0]
    expected = classifying(*arguments)
    compiled = torch.compile(classifying, backend="eager", fullgraph=True)
    for one, two in zip(compiled(*arguments), expected):
        assert torch.allclose(one, two, atol=1e-5)
