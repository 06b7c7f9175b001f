"""model.py: sizes, batches and padding, uint8 clips, the gate, export, checkpoints, --set."""
import argparse
from dataclasses import asdict, replace

import pytest
import torch

from backbone import normalise
from model import (PRESETS, VideoActionDetector, config_from_dict, load_checkpoint, load_released,
                   override, scores)
from test_golden import CONFIG as TINY
from test_released import RELEASED

OUTPUTS = ("pred_boxes", "pred_logits", "pred_conf")
TINY_SIZES = ["frames=16", "encoder_layers=1", "decoder_layers=2", "vit_depth=1", "vit_width=192",
              "num_queries=3", "dim_feedforward=256"]


def small_model(**changes):
    torch.manual_seed(1)
    return VideoActionDetector(replace(PRESETS["synthetic"], **changes)).eval()


@pytest.mark.parametrize("preset, count", [("ucf", 117_823_061), ("jhmdb", 117_821_173),
                                           ("ava", 138_550_045), ("ava_csn152", 86_006_621)])
def test_parameter_counts(preset, count):
    with torch.device("meta"):
        model = VideoActionDetector(PRESETS[preset])
    assert sum(p.numel() for p in model.parameters()) == count


def test_the_parts_of_ucf_have_their_sizes():
    with torch.device("meta"):
        model = VideoActionDetector(PRESETS["ucf"])
    expected = {model.backbone: 86_227_200, model.neck: 10_276_544, model.encoder.layers: 4_339_968,
                model.decoder.localizing: 5_596_172, model.decoder.classifying: 10_844_160,
                model.decoder.box_head: 132_612}
    for part, count in expected.items():
        assert sum(p.numel() for p in part.parameters()) == count


@pytest.mark.parametrize("config", [PRESETS["synthetic"], TINY], ids=["synthetic", "tiny"])
def test_clips_in_a_batch_get_the_same_outputs_as_alone(config):
    torch.manual_seed(1)
    model = VideoActionDetector(config).eval()
    clips = torch.randn(3, 3, config.frames, 64, 96)
    with torch.no_grad():
        together = model(clips, return_attention=True)
        for i in range(3):
            alone = model(clips[i:i + 1], return_attention=True)
            for name in (*OUTPUTS, "attention"):
                assert torch.allclose(together[name][i], alone[name][0], atol=1e-5), name


@pytest.mark.parametrize("config", [PRESETS["synthetic"], TINY, replace(TINY, quirks=())],
                         ids=["synthetic", "tiny", "tiny-plain"])
def test_padding_beside_a_smaller_clip(config):
    torch.manual_seed(1)
    model, localizing = VideoActionDetector(config).eval(), []
    clips = torch.randn(2, 3, config.frames, 64, 96)
    mask = torch.zeros(2, 64, 96, dtype=torch.bool)
    mask[1, 32:], mask[1, :, 48:] = True, True
    clips.masked_fill_(mask[:, None, None], 0)
    model.decoder.localizing[0].register_forward_hook(
        lambda module, args, out: localizing.append(out[3]))
    with torch.no_grad():
        out = model(clips, mask, return_attention=True)
        alone = model(clips[:1], return_attention=True)
    for name in (*OUTPUTS, "attention"):
        assert torch.allclose(out[name][0], alone[name][0], atol=1e-4), name
    height, width = out["attention"].shape[-2:]
    maps = localizing[0].unflatten(-1, (height, width))[config.frames:]  # of the smaller clip
    assert torch.allclose(maps.sum((-2, -1)), torch.ones(1), atol=1e-5)
    for attention, masked in ((maps, True),
                              (out["attention"][1], "unmasked_padding" not in config.quirks)):
        below, beside = attention[..., height // 2:, :], attention[..., width // 2:]
        assert (below.abs().max() == 0) == (beside.abs().max() == 0) == masked


def test_uint8_clips_are_normalised_and_padding_is_zero():
    model = small_model()
    clips = torch.randint(0, 256, (2, 3, 8, 32, 48), dtype=torch.uint8)
    mask = torch.zeros(2, 32, 48, dtype=torch.bool)
    mask[1, 20:] = True
    with torch.no_grad():
        given, made = model(clips, mask), model(normalise(clips, mask), mask)
        clips[1, :, :, 20:] = 7
        assert torch.equal(model(clips, mask)["pred_logits"], given["pred_logits"])
    assert all(torch.equal(given[name], made[name]) for name in OUTPUTS)


def test_some_frames_are_decoded_as_they_are_among_all():
    for config in (PRESETS["synthetic"], TINY):
        torch.manual_seed(1)
        model = VideoActionDetector(config).eval()
        clips = torch.randn(2, 3, config.frames, 32, 48)
        with torch.no_grad():
            out, some = model(clips), model(clips, frames=[5, 0])
        for name in OUTPUTS:
            assert torch.allclose(some[name], out[name][:, [5, 0]], atol=1e-5), name


@pytest.mark.parametrize("config", [PRESETS["synthetic"], TINY, replace(TINY, quirks=())],
                         ids=["synthetic", "tiny", "tiny-plain"])
def test_every_trained_parameter_gets_a_gradient(config):
    model = VideoActionDetector(config)
    out = model(torch.randn(1, 3, config.frames, 32, 48))
    sum(out[name].square().mean() for name in OUTPUTS).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None or not parameter.requires_grad, name


@pytest.mark.parametrize("config", [replace(PRESETS["synthetic"], dropout=0.1), TINY],
                         ids=["synthetic", "tiny"])
def test_recomputation_changes_no_gradient(config):
    gradients, clips = [], torch.randn(1, 3, config.frames, 32, 48)
    for recompute in (False, True):
        torch.manual_seed(1)
        model = VideoActionDetector(replace(
            config, checkpoint_backbone=recompute, checkpoint_encoder=recompute,
            checkpoint_classifier=recompute))
        torch.manual_seed(2)
        out = model(clips)
        sum(out[name].square().mean() for name in OUTPUTS).backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    for one, two in zip(*gradients):
        assert torch.allclose(one, two, atol=1e-5, rtol=1e-4)


def test_gated_actors_score_zero_and_the_others_are_unchanged():
    model, gated = small_model(), small_model(gate=0.5)
    clips = torch.randn(2, 3, 8, 64, 96)
    with torch.no_grad():
        full, out = model(clips, return_attention=True), gated(clips, return_attention=True)
        nobody = small_model(gate=1.1)(clips)
    kept = full["pred_conf"].sigmoid() >= 0.5
    assert 0 < kept.sum() < kept.numel()
    assert torch.equal(full["pred_boxes"], out["pred_boxes"])
    for name in ("pred_logits", "attention"):
        assert torch.allclose(full[name][kept], out[name][kept], atol=1e-5)
    assert out["pred_logits"].isfinite().all()
    assert (scores(out, gated.config)[~kept] == 0).all()
    assert (scores(nobody, gated.config) == 0).all()


@pytest.mark.parametrize("config", [PRESETS["synthetic"], replace(TINY, frames=4)],
                         ids=["synthetic", "tiny"])
def test_an_exported_model_gives_the_same_outputs(config):
    torch.manual_seed(1)
    model, clips = VideoActionDetector(config).eval(), torch.randn(1, 3, config.frames, 32, 48)
    with torch.no_grad():
        exported = torch.export.export(model, (clips,), strict=False).module()(clips)
        expected = model(clips)
    for name in OUTPUTS:
        assert torch.allclose(exported[name], expected[name], atol=1e-5)


def test_a_checkpoint_gives_its_model_back(tmp_path):
    model, path = small_model(num_classes=4), tmp_path / "last.pt"
    state = model.state_dict()
    torch.save({"model": state, "config": asdict(model.config), "epoch": 3}, path)
    loaded, checkpoint = load_checkpoint(path)
    assert loaded.config == model.config and checkpoint["epoch"] == 3
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, state[name])
    assert checkpoint["dataset"] is None and checkpoint["classes"] is None      # it does not say
    changed, _ = load_checkpoint(path, changes=["gate=0.25"])
    assert changed.config == replace(model.config, gate=0.25)
    for prefix in ("module.", "_orig_mod."):  # of DistributedDataParallel and torch.compile
        named = {prefix + name: value for name, value in state.items()}
        torch.save({"model": named, "config": asdict(model.config)}, path)
        assert load_checkpoint(path)[0].config == model.config


def test_a_checkpoint_of_half_precision_is_computed_in_float32(tmp_path):
    model, path = small_model(), tmp_path / "half.pt"
    half = {name: value.half() if value.is_floating_point() else value
            for name, value in model.state_dict().items()}
    torch.save({"model": half, "config": asdict(model.config)}, path)
    loaded, _ = load_checkpoint(path)
    assert all(p.dtype == torch.float32 for p in loaded.parameters())


def test_weights_without_a_config_need_a_preset(tmp_path):
    torch.save(small_model().state_dict(), tmp_path / "bare.pt")
    with pytest.raises(ValueError, match="bare.pt.*--preset"):
        load_checkpoint(tmp_path / "bare.pt")
    model, checkpoint = load_checkpoint(tmp_path / "bare.pt", preset="synthetic")
    assert model.config == PRESETS["synthetic"] and checkpoint["dataset"] == "synthetic"
    torch.save({"state_dict": model.state_dict(), "epoch": 3}, tmp_path / "wrapped.pt")
    assert load_checkpoint(tmp_path / "wrapped.pt", preset="synthetic")[0].config == model.config


def test_a_released_file_is_known_by_its_tensors(tmp_path):
    path = tmp_path / "tiny.pth"
    tensors = {f"module.{name}": value for name, value in RELEASED.items()}
    config = {"CONFIG": {"LR": 1}, "DDP_CONFIG": {}}  # not a Config of this project
    torch.save({"model": tensors, "epoch": 3, "config": config,
                "args": argparse.Namespace(lr=1)}, path)
    model, checkpoint = load_checkpoint(path, changes=TINY_SIZES)
    assert checkpoint["kind"] == "a released checkpoint, preset ucf"
    assert checkpoint["dataset"] == "ucf"
    expected = load_released(VideoActionDetector(TINY), RELEASED).state_dict()
    for name, value in model.state_dict().items():
        assert torch.equal(value, expected[name])
    with pytest.raises(ValueError, match="tiny.pth .* does not fit"):
        load_checkpoint(path)  # of other sizes than the preset's


def test_files_that_are_no_checkpoints_are_named(tmp_path):
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save({"weight": torch.ones(2)}, tmp_path / "other.pt")
    (tmp_path / "empty.pt").write_bytes(b"")
    for name in ("list.pt", "other.pt", "empty.pt"):
        with pytest.raises(ValueError, match=name):
            load_checkpoint(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="nowhere.pt"):
        load_checkpoint(tmp_path / "nowhere.pt")


def test_a_config_of_an_older_version_is_read_unless_it_did_what_is_gone():
    old = asdict(PRESETS["synthetic"]) | {"schedule": "step", "lr_batch": 0}
    del old["positions"], old["checkpoint_encoder"], old["offset_rate"]
    assert config_from_dict(old) == replace(PRESETS["synthetic"], offset_rate=1.0)
    with pytest.raises(ValueError, match="schedule='cosine'"):
        config_from_dict(old | {"schedule": "cosine"})
    with pytest.raises(ValueError, match="'frobs'"):
        config_from_dict(old | {"frobs": 1})


def test_set_changes_fields():
    config = override(PRESETS["ucf"], ["frames=16", "lr=1", "quirks=grid_edge,split_heads",
                                       "key_frame=True", "backbone=conv"])
    assert (config.frames, config.lr, config.key_frame) == (16, 1.0, True)
    assert config.quirks == ("grid_edge", "split_heads") and config.backbone == "conv"
    assert not config.released and PRESETS["ucf"].released
    assert config_from_dict(asdict(config)) == config
    for one, two in (("key_frame=false", "key_frame=False"), ("quirks=", "quirks=()"),
                     ("drop_epochs=8,11", "drop_epochs=[8, 11]"),
                     ("drop_epochs=5", "drop_epochs=(5,)")):
        assert override(config, [one]) == override(config, [two])


@pytest.mark.parametrize("wrong, message", [
    ("frame=3", "did you mean frames"), ("zzz=3", "num_queries"), ("frames=2.5", "frames is int"),
    ("frames", "name=value"), ("quirks=gird_edge", "grid_edge"), ("drop_epochs=a,b", "drop_epochs"),
    ("key_frame=maybe", "key_frame is bool"), ("drop_epochs=1.5", "drop_epochs"),
    ("eval_every=0", "eval_every=0: must be at least 1"), ("epochs=-1", "epochs=-1"),
    ("crop_size=0", "crop_size=0"), ("encoder=resnet", "transformer"), ("decoder=x", "ldl"),
    ("aggregation=x", "mean"), ("combine=x", "concat"), ("backbone=x", "csn152")])
def test_set_refuses_what_does_not_fit_and_says_what_does(wrong, message):
    with pytest.raises(ValueError, match=message):
        override(PRESETS["ucf"], [wrong])


@pytest.mark.parametrize("changes", [{"dim": 65}, {"dim": 40}, {"num_levels": 3}, {"grid_level": 2},
                                     {"grid_level": -1}])
def test_sizes_that_do_not_fit_together_are_named(changes):
    (name, value), = changes.items()
    with pytest.raises(ValueError, match=f"{name}={value}"):
        VideoActionDetector(replace(PRESETS["synthetic"], **changes))


def test_split_heads_needs_an_even_number_of_heads():
    odd = replace(PRESETS["synthetic"], dim=48, num_heads=3)
    VideoActionDetector(odd)
    with pytest.raises(ValueError, match="num_heads=3: must be even"):
        VideoActionDetector(replace(odd, quirks=("split_heads",)))


def test_a_clip_of_another_length_is_named():
    with pytest.raises(ValueError, match="clips of 7 frames for a model of 8"):
        small_model()(torch.randn(1, 3, 7, 32, 32))
