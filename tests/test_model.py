"""model.py: equal to the released model (golden cases), each quirk, batches and padding, weights, --set."""
import argparse
import json
import zlib
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch

from conftest import shared
from model import (PRESETS, QUIRKS, VideoActionDetector, config_from_dict, load_checkpoint, load_released, override, scores)

TINY = replace(PRESETS["ucf"], frames=16, encoder_layers=1, decoder_layers=2, vit_depth=1, vit_width=192, num_queries=3,
               dim_feedforward=256)
CASES = {"ucf_tiny": TINY, "ucf": PRESETS["ucf"], "ava": PRESETS["ava"], "ava_csn152": PRESETS["ava_csn152"]}


def draw(salt, name, shape, mean=0.0, std=1.0):
    values = np.random.RandomState(zlib.crc32(f"{salt}:{name}".encode())).standard_normal(shape)
    return torch.from_numpy(np.asarray(mean + std * values, dtype=np.float32))


def released_weights(case):
    listing = json.loads(shared("golden", "model", f"{case}.json").read_text())
    salt = listing["meta"]["salt"]
    tensors = {tensor["name"]: draw(salt, tensor["same_as"] or tensor["name"], tensor["shape"], tensor["mean"], tensor["std"])
               for tensor in listing["state_dict"]}
    return listing["meta"], tensors


def golden(case, config=None):
    """The model with the case's weights, its clip (3, T, H, W), its padded batch or None, and the expected arrays."""
    meta, tensors = released_weights(case)
    model = load_released(VideoActionDetector(config or CASES[case]).eval(), {"model": tensors})
    frames, height, width = meta["size"]
    clip = draw(meta["salt"], "clip", (3, frames, height, width))
    padded = None
    if meta["size2"]:
        small = draw(meta["salt"], "clip2", (3, frames, *meta["size2"]))
        clips = torch.zeros(2, 3, frames, height, width)
        mask = torch.ones(2, height, width, dtype=torch.bool)
        clips[0], mask[0] = clip, False
        clips[1, :, :, :meta["size2"][0], :meta["size2"][1]], mask[1, :meta["size2"][0], :meta["size2"][1]] = small, False
        padded = clips, mask
    return model, clip, padded, np.load(shared("golden", "model", f"{case}.npz"))


def distance(ours, expected):
    """Largest difference in units of the expected array's standard deviation."""
    assert ours.numel() == expected.size
    return np.abs(ours.detach().numpy().reshape(expected.shape) - expected).max() / expected.std()


def assert_equal(out, expected, prefix, tolerance):
    for where, part in [("", out)] + [(f"aux{i}/", aux) for i, aux in enumerate(out["aux_outputs"])]:
        confidence = torch.from_numpy(expected[f"{prefix}{where}pred_logits_b"]).softmax(-1)[..., 1].numpy()
        assert distance(part["pred_logits"], expected[f"{prefix}{where}pred_logits"]) < tolerance, where
        assert distance(part["pred_boxes"], expected[f"{prefix}{where}pred_boxes"]) < tolerance, where
        assert distance(part["pred_conf"].sigmoid(), confidence) < tolerance, where
    attention = out["attention"].flatten(0, 1).flatten(3).transpose(0, 1)  # (A, B*T, C, H'*W')
    assert distance(attention, expected[f"{prefix}attention"]) < tolerance


@pytest.mark.parametrize("case, tolerance", [("ucf_tiny", 1e-4), ("ucf", 1e-3), ("ava", 1e-3), ("ava_csn152", 1e-3)])
def test_equals_the_released_model(case, tolerance):
    model, clip, padded, expected = golden(case)
    with torch.no_grad():
        out = model(clip[None], return_attention=True)
        assert_equal(out, expected, "b1/", tolerance)
        assert distance(scores(out, model.config), expected["b1/scores"]) < tolerance
        if padded:
            assert_equal(model(*padded, return_attention=True), expected, "b2/", tolerance)


def test_every_stage_equals_the_released_model():
    model, clip, _, expected = golden("ucf_tiny")
    seen, anchors = {}, []
    model.neck.register_forward_hook(lambda module, args, out: seen.update(maps=out))
    model.encoder.register_forward_hook(lambda module, args, out: seen.update(encoded=out))
    model.decoder.register_forward_hook(lambda module, args, out: seen.update(grid=args[0]))
    for i in range(2):
        model.decoder.localizing[i].register_forward_hook(lambda module, args, out, i=i: seen.update({f"actor{i}": out[0]}))
        model.decoder.classifying[i].register_forward_hook(
            lambda module, args, out, i=i: seen.setdefault(f"class_features{i}", []).append(out[0]))
    positional_query = model.decoder.positional_query
    model.decoder.positional_query = lambda x, boxes, *rest: anchors.append(boxes) or positional_query(x, boxes, *rest)
    with torch.no_grad():
        model(clip[None])
    for level in range(4):
        assert distance(seen["maps"][level], expected[f"b1/map{level}"]) < 1e-4
        assert distance(seen["grid"][:, level].permute(3, 0, 1, 2), expected[f"b1/grid{level}"]) < 1e-4  # (D, T, H, W)
    assert distance(torch.cat([x.flatten(1, 3) for x in seen["encoded"]], dim=1), expected["b1/memory"]) < 1e-4
    for i in range(2):
        assert distance(seen[f"actor{i}"].transpose(0, 1), expected[f"b1/actor{i}"]) < 1e-4  # (A, T, D)
        features = torch.cat(seen[f"class_features{i}"]).unflatten(0, (16, 3)).transpose(0, 1)  # (A, T, C, D)
        assert distance(features, expected[f"b1/class_features{i}"]) < 1e-4
    assert distance(torch.stack(anchors), expected["b1/references"]) < 1e-4


def without(quirk, batch):
    """Relative change of the logits when the golden model runs without one quirk; weights that only one side has stay drawn."""
    model, clip, padded, expected = golden("ucf_tiny")
    config = replace(TINY, quirks=tuple(name for name in QUIRKS if name != quirk))
    other = VideoActionDetector(config).eval()
    own = {name: value for name, value in model.state_dict().items()
           if name in other.state_dict() and other.state_dict()[name].shape == value.shape}
    other.load_state_dict(own, strict=False)
    with torch.no_grad():
        out = other(*padded) if batch == "b2" else other(clip[None])
    return out, expected, other


@pytest.mark.parametrize("quirk, batch", [("position_pairs", "b1"), ("offset_axes", "b1"), ("grid_edge", "b1"),
                                          ("shared_block", "b1"), ("bare_output", "b1"), ("split_heads", "b1"),
                                          ("unmasked_padding", "b2"), ("anchor_before_norm", "b1")])
def test_without_the_quirk_the_logits_are_not_the_released_ones(quirk, batch):
    out, expected, _ = without(quirk, batch)
    name = "pred_boxes" if quirk == "anchor_before_norm" else "pred_logits"
    assert distance(out[name], expected[f"{batch}/{name}"]) > 5e-3


def test_three_way_confidence_is_soft_max_entry_one():
    out, expected, other = without("three_way_confidence", "b1")
    assert other.decoder.confidence_head.out_features == 1
    confidence = torch.from_numpy(expected["b1/pred_logits_b"]).softmax(-1)[..., 1].numpy()
    assert distance(out["pred_conf"].sigmoid(), confidence) > 0.1


def test_unused_tensors_are_held_frozen_and_counted():
    held = {name: p for name, p in VideoActionDetector(TINY).named_parameters() if "unused" in name}
    assert len(held) == 2 * 2 + 2 and not any(p.requires_grad for p in held.values())
    free = replace(TINY, quirks=tuple(name for name in QUIRKS if name != "unused_tensors"))
    assert not any("unused" in name for name, _ in VideoActionDetector(free).named_parameters())


@pytest.mark.parametrize("preset, count", [("ucf", 117_823_061), ("jhmdb", 117_821_173), ("ava", 138_550_045),
                                           ("ava_csn152", 86_006_621)])
def test_parameter_counts(preset, count):
    with torch.device("meta"):
        model = VideoActionDetector(PRESETS[preset])
    assert sum(p.numel() for p in model.parameters()) == count


def test_the_parts_of_ucf_have_the_sizes_of_the_specification():
    with torch.device("meta"):
        model = VideoActionDetector(PRESETS["ucf"])
    decoder = model.decoder
    count = {name: sum(p.numel() for p in part.parameters()) for name, part in [
        ("backbone", model.backbone), ("neck", model.neck), ("encoder", model.encoder.layers),
        ("localizing", decoder.localizing), ("classifying", decoder.classifying), ("box_head", decoder.box_head)]}
    assert count == dict(backbone=86_227_200, neck=10_276_544, encoder=4_339_968, localizing=5_596_172,
                         classifying=10_844_160, box_head=132_612)


def small_model(**changes):
    torch.manual_seed(1)
    return VideoActionDetector(replace(PRESETS["synthetic"], **changes)).eval()


@pytest.mark.parametrize("config", [PRESETS["synthetic"], TINY], ids=["synthetic", "ucf_tiny"])
def test_clips_in_a_batch_get_the_same_outputs_as_alone(config):
    torch.manual_seed(1)
    model = VideoActionDetector(config).eval()
    clips = torch.randn(3, 3, config.frames, 64, 96)
    with torch.no_grad():
        together = model(clips, return_attention=True)
        for i in range(3):
            alone = model(clips[i:i + 1], return_attention=True)
            for name in ("pred_boxes", "pred_logits", "pred_conf", "attention"):
                assert torch.allclose(together[name][i], alone[name][0], atol=1e-5), name


@pytest.mark.parametrize("config", [PRESETS["synthetic"], TINY, replace(TINY, quirks=())], ids=["synthetic", "tiny", "tiny-plain"])
def test_padding_beside_a_smaller_clip(config):
    torch.manual_seed(1)
    model = VideoActionDetector(config).eval()
    clips = torch.randn(2, 3, config.frames, 64, 96)
    clips[1, :, :, 32:], clips[1, :, :, :, 48:] = 0, 0
    mask = torch.zeros(2, 64, 96, dtype=torch.bool)
    mask[1, 32:], mask[1, :, 48:] = True, True
    localizing = []
    for layer in model.decoder.localizing:  # the soft-max weights of the localizing layers go through their dropout
        layer.dropout.register_forward_hook(lambda module, args, out: localizing.append(out) if out.dim() == 4 else None)
    with torch.no_grad():
        out = model(clips, mask, return_attention=True)
        maps = torch.cat(localizing[:len(localizing) // config.decoder_layers])  # of the first layer, frames in order
        alone = model(clips[:1], return_attention=True)
    for name in ("pred_boxes", "pred_logits", "pred_conf", "attention"):
        assert torch.allclose(out[name][0], alone[name][0], atol=1e-4), name
    height, width = out["attention"].shape[-2:]
    maps = maps.unflatten(-1, (height, width))[config.frames:]  # of the smaller clip
    assert maps.shape[0] == config.frames and torch.allclose(maps.sum((-2, -1)), torch.ones(1), atol=1e-5)
    assert maps[..., height // 2:, :].abs().max() == 0 and maps[..., width // 2:].abs().max() == 0
    on_padding = out["attention"][1, ..., height // 2:, :].abs().max()
    assert (on_padding == 0) == ("unmasked_padding" not in config.quirks)


ALTERNATIVES = [dict(encoder="transformer"), dict(encoder="transformer", decoder="ldl"), dict(decoder="ldl"),
                dict(encoder="transformer", decoder="detr"), dict(decoder="detr"), dict(aggregation="weighted"),
                dict(aggregation="mean"), dict(class_position=False), dict(combine="concat"),
                dict(combine="cross-attention"), dict(combine="self-attention")]


@pytest.mark.parametrize("base", [PRESETS["synthetic"], replace(TINY, frames=8), replace(TINY, frames=8, quirks=(), key_frame=True)],
                         ids=["synthetic", "tiny", "tiny-plain-key"])
@pytest.mark.parametrize("changes", ALTERNATIVES, ids=lambda changes: " ".join(map(str, changes.values())))
def test_rows_of_tables_1_to_4(base, changes):
    """Every alternative trains all its parameters, gives a clip beside a smaller one what it gives it alone, runs with a gate
    that no actor passes, and its class attention is one, off the padding where no quirk lets it there."""
    config = replace(base, **changes)
    torch.manual_seed(1)
    model = VideoActionDetector(config)
    clips = torch.randn(2, 3, config.frames, 32, 64)
    clips[1, :, :, 16:], clips[1, :, :, :, 32:] = 0, 0
    mask = torch.zeros(2, 32, 64, dtype=torch.bool)
    mask[1, 16:], mask[1, :, 32:] = True, True
    out = model(clips, mask)
    sum(out[name].square().mean() for name in ("pred_logits", "pred_boxes", "pred_conf")).backward()
    assert [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None] == []
    with torch.no_grad():
        out, alone = model.eval()(clips, mask, return_attention=True), model(clips[:1], return_attention=True)
        some = model(clips, mask, frames=torch.tensor([0])) if not config.key_frame else None
        model.config = replace(config, gate=1.1)
        assert model(clips, mask, return_attention=True)["pred_logits"].isfinite().all()
    frames = 1 if config.key_frame else config.frames
    assert out["pred_logits"].shape == (2, frames, config.num_queries, config.num_classes)
    assert out["attention"].shape[:4] == out["pred_logits"].shape
    for name in ("pred_boxes", "pred_logits", "pred_conf", "attention"):
        assert torch.allclose(out[name][0], alone[name][0], atol=1e-4), name
        assert some is None or name == "attention" or torch.allclose(some[name][:, 0], out[name][:, 0], atol=1e-4), name
    assert torch.allclose(out["attention"].sum((-2, -1)), torch.ones(1), atol=1e-5)
    height, width = out["attention"].shape[-2:]
    if "unmasked_padding" not in config.quirks:
        assert out["attention"][1, ..., height // 2:, :].abs().max() == 0 == out["attention"][1, ..., width // 2:].abs().max()
    one_map = (out["attention"][:, :, :, :1] == out["attention"]).all()
    assert one_map == (config.decoder != "ldl+cdl")


def test_a_single_scale_model_holds_nothing_of_the_other_levels():
    names = [name for name, _ in VideoActionDetector(replace(TINY, encoder="transformer")).named_parameters()]
    assert {name.split(".")[1] for name in names if name.startswith("neck.")} == {"2"}
    names = [name for name, _ in small_model(encoder="transformer").named_parameters()]
    assert not any(name.startswith(("neck.1", "backbone.stages.3")) for name in names)


def test_a_choice_that_does_not_exist_is_refused_with_those_that_do():
    for name, there in (("encoder", "transformer"), ("decoder", "ldl"), ("aggregation", "mean"), ("combine", "concat"),
                        ("backbone", "csn152")):
        with pytest.raises(ValueError, match=f"{name} 'resnet'; there are: .*{there}"):
            override(PRESETS["ucf"], [f"{name}=resnet"])


def test_decoding_some_frames_gives_what_decoding_all_gives():
    for model in (small_model(), VideoActionDetector(TINY).eval()):
        clips = torch.randn(2, 3, model.config.frames, 64, 96)
        frames = torch.tensor([6, 1])
        with torch.no_grad():
            some, everything = model(clips, frames=frames), model(clips)
        for name in ("pred_boxes", "pred_logits", "pred_conf"):
            assert torch.allclose(some[name], everything[name][:, frames], atol=1e-5), name


def test_recomputing_in_the_backward_pass_changes_no_gradient():
    gradients = []
    for recompute in (False, True):
        torch.manual_seed(2)
        model = VideoActionDetector(replace(TINY, dropout=0.0, logit_dropout=0.0, drop_path=0.0, checkpoint_backbone=recompute,
                                            checkpoint_classifier=recompute))
        torch.manual_seed(3)
        out = model(torch.randn(1, 3, 16, 32, 32))
        sum(out[name].square().mean() for name in ("pred_logits", "pred_boxes", "pred_conf")).backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    assert all(torch.allclose(one, two, atol=1e-6) for one, two in zip(*gradients))


@pytest.mark.parametrize("config", [PRESETS["synthetic"], TINY, replace(TINY, quirks=())], ids=["synthetic", "tiny", "tiny-plain"])
def test_every_trained_parameter_gets_a_gradient(config):
    model = VideoActionDetector(config)
    out = model(torch.randn(1, 3, config.frames, 32, 48))
    sum(out[name].square().mean() for name in ("pred_logits", "pred_boxes", "pred_conf")).backward()
    assert [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None] == []


def test_gated_actors_score_zero_and_the_others_are_unchanged():
    model = small_model()
    gated = small_model(gate=0.5)
    clips = torch.randn(2, 3, 8, 64, 96)
    with torch.no_grad():
        full, out = model(clips, return_attention=True), gated(clips, return_attention=True)
    kept = full["pred_conf"].sigmoid() >= 0.5
    assert 0 < kept.sum() < kept.numel()
    assert torch.equal(full["pred_boxes"], out["pred_boxes"])
    assert torch.allclose(full["pred_logits"][kept], out["pred_logits"][kept], atol=1e-5)
    assert torch.allclose(full["attention"][kept], out["attention"][kept], atol=1e-5)
    assert out["pred_logits"].isfinite().all() and (scores(out, gated.config)[~kept] == 0).all()
    with torch.no_grad():
        assert (scores(small_model(gate=1.1)(clips), gated.config) == 0).all()


def test_a_released_checkpoint_that_does_not_fit_is_refused_whole():
    _, tensors = released_weights("ucf_tiny")
    model = VideoActionDetector(TINY)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    missing = {name: value for name, value in tensors.items() if name != "class_embed_b.bias"}
    extra = {**tensors, "transformer.decoder.layers.0.something.weight": torch.zeros(2)}
    shape = {**tensors, "class_embed_b.bias": torch.zeros(4)}
    unequal = {**tensors, "bbox_embed.layers.0.bias": tensors["bbox_embed.layers.0.bias"] + 1}
    for wrong, message in [(missing, "missing: decoder.confidence_head.bias"), (extra, "something"), (shape, r"shape \(4,\)"),
                           (unequal, "should equal"), ({}, "missing")]:
        with pytest.raises(ValueError, match=message):
            load_released(model, wrong)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    load_released(model, {"model": {f"module.{name}": value for name, value in tensors.items()}})
    assert torch.equal(model.decoder.confidence_head.bias, tensors["class_embed_b.bias"])


def test_a_checkpoint_gives_its_model_back(tmp_path):
    model = small_model(num_classes=4)
    torch.save({"model": model.state_dict(), "config": asdict(model.config), "epoch": 3}, tmp_path / "last.pt")
    loaded, checkpoint = load_checkpoint(tmp_path / "last.pt")
    assert loaded.config == model.config and checkpoint["epoch"] == 3
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in loaded.state_dict().items())
    changed, _ = load_checkpoint(tmp_path / "last.pt", changes=["gate=0.25"])
    assert changed.config == replace(model.config, gate=0.25)


def test_a_released_file_is_known_by_its_tensors(tmp_path):
    _, tensors = released_weights("ucf_tiny")
    torch.save({"model": {f"module.{name}": value for name, value in tensors.items()}, "epoch": 3,
                "args": argparse.Namespace(lr=1)}, tmp_path / "tiny.pth")
    sizes = ["frames=16", "encoder_layers=1", "decoder_layers=2", "vit_depth=1", "vit_width=192", "num_queries=3",
             "dim_feedforward=256"]
    model, checkpoint = load_checkpoint(tmp_path / "tiny.pth", changes=sizes)
    assert checkpoint["kind"] == "a released checkpoint, preset ucf" and checkpoint["dataset"] == "ucf"
    expected = load_released(VideoActionDetector(TINY), tensors)
    assert all(torch.equal(value, expected.state_dict()[name]) for name, value in model.state_dict().items())
    with pytest.raises(ValueError, match="tiny.pth .* does not fit"):
        load_checkpoint(tmp_path / "tiny.pth")  # of other sizes than the preset's


def test_files_that_are_no_checkpoints_are_named(tmp_path):
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save({"weight": torch.ones(2)}, tmp_path / "other.pt")
    (tmp_path / "empty.pt").write_bytes(b"")
    for name in ("list.pt", "other.pt", "empty.pt"):
        with pytest.raises(ValueError, match=name):
            load_checkpoint(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="nowhere.pt"):
        load_checkpoint(tmp_path / "nowhere.pt")


def test_set_changes_fields_and_refuses_what_does_not_fit():
    config = override(PRESETS["ucf"], ["frames=16", "lr=1", "quirks=grid_edge,split_heads", "key_frame=True", "backbone=conv"])
    assert (config.frames, config.lr, config.key_frame, config.backbone) == (16, 1.0, True, "conv")
    assert config.quirks == ("grid_edge", "split_heads") and not config.released and PRESETS["ucf"].released
    assert config_from_dict(asdict(config)) == config
    assert override(config, ["key_frame=false", "quirks=", "drop_epochs=8,11"]) == override(
        config, ["key_frame=False", "quirks=()", "drop_epochs=[8, 11]"])
    assert override(config, ["drop_epochs=5"]).drop_epochs == (5,) and override(config, ["quirks="]).quirks == ()
    for wrong, message in [("frame=3", "num_queries"), ("frames=2.5", "frames is int"), ("frames", "name=value"),
                           ("quirks=gird_edge", "grid_edge"), ("key_frame=maybe", "key_frame is bool"),
                           ("drop_epochs=a,b", "drop_epochs"), ("drop_epochs=1.5", "drop_epochs"),
                           ("eval_every=0", "eval_every=0: 1 is the least"), ("epochs=-1", "epochs=-1")]:
        with pytest.raises(ValueError, match=message):
            override(config, [wrong])


@pytest.mark.parametrize("changes", [{"dim": 65}, {"dim": 48}, {"num_levels": 3}, {"grid_level": 2}, {"grid_level": -1}])
def test_sizes_that_do_not_fit_together_are_named(changes):
    with pytest.raises(ValueError, match=f"{next(iter(changes))}={next(iter(changes.values()))}"):
        VideoActionDetector(replace(PRESETS["synthetic"], **changes))


def test_a_clip_of_another_length_is_named():
    with pytest.raises(ValueError, match="clips of 7 frames for a model of 8"):
        small_model()(torch.randn(1, 3, 7, 32, 32))
