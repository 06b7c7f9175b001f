"""beside/released.py: what each quirk changes; a released checkpoint fits whole or not at all."""
import json
import zlib
from dataclasses import replace

import numpy as np
import pytest
import torch

from beside.released import QUIRKS, ReleasedClassifyingLayer, content_heads, load_released
from conftest import shared
from decoder import ClassifyingLayer
from model import PRESETS, VideoActionDetector, scores
from test_golden import CONFIG, LISTING, clip_and_padded_batch, draw

RELEASED = {name: draw(same_as or name, shape, mean, std)
            for name, shape, mean, std, same_as in LISTING["tensors"]}


def distance(ours, expected):
    """Largest difference in units of the expected array's standard deviation."""
    expected = np.asarray(expected)
    assert ours.numel() == expected.size
    return np.abs(ours.detach().numpy().reshape(expected.shape) - expected).max() / expected.std()


@pytest.fixture(scope="module")
def released():
    """The tiny released model and what it gives for a clip and for a padded batch."""
    model = load_released(VideoActionDetector(CONFIG).eval(), RELEASED)
    clip, clips, mask = clip_and_padded_batch()
    with torch.no_grad():
        return model, {"clip": model(clip), "padded": model(clips, mask)}


def without(quirk, model, batch):
    """The released model's outputs without one quirk; weights that only this one has stay drawn."""
    torch.manual_seed(1)
    config = replace(CONFIG, quirks=tuple(name for name in QUIRKS if name != quirk))
    other, state = VideoActionDetector(config).eval(), model.state_dict()
    own = other.state_dict()
    for name, value in own.items():
        if name in state and state[name].shape == value.shape:
            own[name] = state[name]
    other.load_state_dict(own)
    clip, clips, mask = clip_and_padded_batch()
    with torch.no_grad():
        return other(clips, mask) if batch == "padded" else other(clip)


@pytest.mark.parametrize("quirk, batch, name", [
    ("position_pairs", "clip", "pred_logits"), ("offset_axes", "clip", "pred_logits"),
    ("grid_edge", "clip", "pred_logits"), ("shared_block", "clip", "pred_logits"),
    ("bare_output", "clip", "pred_logits"), ("split_heads", "clip", "pred_logits"),
    ("unmasked_padding", "padded", "pred_logits"), ("anchor_before_norm", "clip", "pred_boxes"),
    ("three_way_confidence", "clip", "pred_conf")])
def test_without_a_quirk_the_outputs_are_not_the_released_ones(quirk, batch, name, released):
    model, outputs = released
    assert distance(without(quirk, model, batch)[name], outputs[batch][name]) > 5e-3


def test_unused_tensors_are_held_frozen_and_counted():
    parameters = VideoActionDetector(CONFIG).named_parameters()
    held = {name: p for name, p in parameters if "unused" in name}
    assert len(held) == 2 * 2 + 2 and not any(p.requires_grad for p in held.values())
    free = replace(CONFIG, quirks=tuple(name for name in QUIRKS if name != "unused_tensors"))
    assert not any("unused" in name for name, _ in VideoActionDetector(free).named_parameters())


def test_split_heads_see_content_or_position():
    """q and the key positions unprojected, the plain concatenations cut into heads."""
    layer = ReleasedClassifyingLayer(16, 4, 24, 0.0, 1, ("split_heads",)).eval()
    queries, P = torch.randn(2, 5, 16), torch.randn(2, 16)
    z, key_pos = torch.randn(2, 2, 8, 16)
    padding = torch.zeros(2, 8, dtype=torch.bool)
    padding[1, 6:] = True
    with torch.no_grad():
        maps = layer.class_attention_folded(queries, P, z, key_pos, padding)
        for pair in range(2):
            for c in range(5):
                query = torch.cat([queries[pair, c], layer.query_position(P[pair])])
                key = torch.cat([layer.key_content(z[pair]), key_pos[pair]], -1)
                for head in range(4):
                    part = slice(8 * head, 8 * head + 8)
                    logits = key[:, part] @ query[part] / 8 ** 0.5
                    expected = logits.masked_fill(padding[pair], -torch.inf).softmax(-1)
                    assert torch.allclose(maps[pair, head, c], expected, atol=1e-5)
    seen = content_heads(maps.transpose(1, 2).unflatten(-1, (2, 4)))  # (I, C, H, W)
    assert torch.allclose(seen.flatten(-2), maps[:, :2].mean(1), atol=1e-6)


def test_with_bare_output_a_class_is_known_only_by_where_it_looked():
    constant = torch.randn(1, 1, 16).expand(2, 8, 16)  # every cell alike: attention changes nothing
    arguments = (torch.randn(2, 16), constant, torch.randn(2, 16), torch.zeros(2, 8, 16),
                 torch.zeros(2, 8).bool(), (2, 4))
    bare = ReleasedClassifyingLayer(16, 4, 24, 0.0, 1, ("bare_output",)).eval()
    paper = ClassifyingLayer(16, 4, 24, 0.0, 1).eval()
    for layer, known in ((bare, True), (paper, False)):
        one, two = (layer(torch.randn(2, 5, 16), *arguments)[0] for _ in range(2))
        assert torch.allclose(one, two, atol=1e-4) == known


def test_shared_block_is_one_block_applied_as_often():
    shared_one = ReleasedClassifyingLayer(16, 4, 24, 0.0, 3, ("shared_block",))
    own = ClassifyingLayer(16, 4, 24, 0.0, 3)
    assert len(shared_one.blocks) == 1 and len(own.blocks) == 3
    for block in own.blocks:
        block.load_state_dict(shared_one.blocks[0].state_dict())
    z = torch.randn(2, 3, 4, 16)
    assert torch.allclose(shared_one.convolve(z), own.convolve(z))


def test_a_released_checkpoint_that_does_not_fit_is_refused_whole():
    model = VideoActionDetector(CONFIG)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    missing = {name: value for name, value in RELEASED.items() if name != "class_embed_b.bias"}
    extra = {**RELEASED, "transformer.decoder.layers.0.something.weight": torch.zeros(2)}
    shape = {**RELEASED, "class_embed_b.bias": torch.zeros(4)}
    twice = "bbox_embed.layers.0.bias"
    unequal = {**RELEASED, twice: RELEASED[twice] + 1}
    for wrong, message in [(missing, "missing: decoder.confidence_head.bias"), (extra, "something"),
                           (shape, r"shape \(4,\)"), (unequal, "should equal"), ({}, "missing")]:
        with pytest.raises(ValueError, match=message):
            load_released(model, wrong)
        for name, value in model.state_dict().items():
            assert torch.equal(value, before[name])


# --------------------------------------------------------------------------------------------------
# The full-size cases, which are too large for the repository


def full_size(case):
    """The model with the case's weights, its clip, and what the released code computed."""
    listing = json.loads(shared("golden", "model", f"{case}.json").read_text())
    salt, tensors = listing["meta"]["salt"], {}

    def drawn(name, shape, mean=0.0, std=1.0):
        seed = zlib.crc32(f"{salt}:{name}".encode())
        values = np.random.RandomState(seed).standard_normal(shape)
        return torch.from_numpy(np.asarray(mean + std * values, dtype=np.float32))

    for tensor in listing["state_dict"]:
        source = tensor["same_as"] or tensor["name"]
        tensors[tensor["name"]] = drawn(source, tensor["shape"], tensor["mean"], tensor["std"])
    model = load_released(VideoActionDetector(PRESETS[case]).eval(), {"model": tensors})
    return model, drawn("clip", (1, 3, *listing["meta"]["size"])), np.load(
        shared("golden", "model", f"{case}.npz"))


@pytest.mark.parametrize("case", ["ucf", "ava", "ava_csn152"])
def test_a_full_size_model_equals_the_released_one(case):
    model, clip, expected = full_size(case)
    with torch.no_grad():
        out = model(clip, return_attention=True)
    layers = {f"aux{i}/": layer for i, layer in enumerate(out["aux_outputs"])} | {"": out}
    for prefix, layer in layers.items():
        three_way = torch.from_numpy(expected[f"b1/{prefix}pred_logits_b"])
        confidence = three_way.softmax(-1)[..., 1].numpy()
        assert distance(layer["pred_logits"], expected[f"b1/{prefix}pred_logits"]) < 1e-3
        assert distance(layer["pred_boxes"], expected[f"b1/{prefix}pred_boxes"]) < 1e-3
        assert distance(layer["pred_conf"].sigmoid(), confidence) < 1e-3
    assert distance(scores(out, model.config), expected["b1/scores"]) < 1e-3
    attention = out["attention"].flatten(0, 1).flatten(3).transpose(0, 1)  # (A, B*T, C, H'*W')
    assert distance(attention, expected["b1/attention"]) < 1e-3


def test_every_stage_equals_the_released_one():
    expected = np.load(shared("golden", "model", "ucf_tiny.npz"))
    model = load_released(VideoActionDetector(CONFIG).eval(), RELEASED)
    clip, _, _ = clip_and_padded_batch()
    seen, anchors, features = {}, [], {0: [], 1: []}
    model.neck.register_forward_hook(lambda module, args, out: seen.update(maps=out))
    model.encoder.register_forward_hook(lambda module, args, out: seen.update(encoded=out))
    model.decoder.register_forward_hook(lambda module, args, out: seen.update(grid=args[0]))
    positional_query = model.decoder.positional_query

    def noted(actors, boxes, *rest):
        anchors.append(boxes)
        return positional_query(actors, boxes, *rest)

    model.decoder.positional_query = noted
    for i in range(2):
        localizing, classifying = model.decoder.localizing[i], model.decoder.classifying[i]
        localizing.register_forward_hook(
            lambda module, args, out, i=i: seen.update({f"actor{i}": out[0]}))
        classifying.register_forward_hook(
            lambda module, args, out, i=i: features[i].append(out[0]))
    with torch.no_grad():
        model(clip)
    for level in range(4):
        assert distance(seen["maps"][level], expected[f"b1/map{level}"]) < 1e-4
        grid = seen["grid"][:, level].permute(3, 0, 1, 2)  # (D, T, H, W)
        assert distance(grid, expected[f"b1/grid{level}"]) < 1e-4
    memory = torch.cat([x.flatten(1, 3) for x in seen["encoded"]], dim=1)
    assert distance(memory, expected["b1/memory"]) < 1e-4
    for i in range(2):
        assert distance(seen[f"actor{i}"].transpose(0, 1), expected[f"b1/actor{i}"]) < 1e-4
        of_classes = torch.cat(features[i]).unflatten(0, (16, 3)).transpose(0, 1)  # (A, T, C, D)
        assert distance(of_classes, expected[f"b1/class_features{i}"]) < 1e-4
    assert distance(torch.stack(anchors), expected["b1/references"]) < 1e-4
