"""beside/runs.py: the order of the clips, what a run is started with, and its folder."""

import json
import threading
from dataclasses import fields, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from stand_ins import Clips, StandIn

import train
from beside import runs
from model import CHOICES, PRESETS, Config, VideoActionDetector

CONFIG = replace(
    PRESETS["synthetic"], frames=4, dim=32, num_heads=2, dim_feedforward=16, num_queries=3)
CLASSES = list("abcdefghi")


# --- the order of the clips


@pytest.mark.parametrize("length, batch, micro, world, clips", [
    (10, 4, 2, 1, 0), (10, 4, 1, 2, 0), (7, 6, 1, 3, 0), (12, 4, 2, 2, 5)])
def test_a_pass_takes_every_clip_once_over_all_ranks_and_epochs_are_slices_of_it(
        length, batch, micro, world, clips):
    config = replace(CONFIG, batch_size=batch, micro_batch=micro, clips_per_epoch=clips)
    per_epoch, steps = runs.epoch_length(length, config)
    total = 24 * steps
    of_ranks = []
    for rank in range(world):
        of_ranks.append(list(runs.micro_batches(0, total, length, config, 3, rank, world)))
        assert len(of_ranks[rank]) == total * batch // (world * micro)
        assert {len(entries) for entries in of_ranks[rank]} == {micro}
    entries = sorted((position, index) for batches in of_ranks for entries in batches
                     for index, position in entries)
    assert [position for position, _ in entries] == list(range(total * batch))  # each one once
    seen = [index for _, index in entries if index >= 0]
    assert len(seen) == 24 * per_epoch
    passes = [tuple(seen[i:i + length]) for i in range(0, len(seen) - length + 1, length)]
    for one in passes:
        assert sorted(one) == list(range(length))
    assert len(set(passes)) == len(passes)                  # each in an order of its own
    for epoch in range(24):
        of_epoch = entries[epoch * steps * batch:(epoch + 1) * steps * batch]
        assert sum(index >= 0 for _, index in of_epoch) == per_epoch
    # resumed in the middle, it is the rest of the same sequence
    rest = list(runs.micro_batches(total // 2 + 1, total, length, config, 3, 0, world))
    assert rest == of_ranks[0][-len(rest):]
    assert list(runs.micro_batches(0, total, length, config, 4, 0, world)) != of_ranks[0]


def test_a_pass_is_drawn_once_and_not_in_every_step(monkeypatch):
    runs.permutation.cache_clear()
    config = replace(CONFIG, batch_size=4, micro_batch=4, clips_per_epoch=0)
    list(runs.micro_batches(0, 50, 100, config, 0))         # two passes
    assert runs.permutation.cache_info().misses == 2


def test_the_batch_has_to_divide():
    config = replace(CONFIG, batch_size=16, micro_batch=8)
    assert [runs.micro_batch_size(config, world) for world in (1, 2, 4)] == [8, 8, 4]
    for world, micro in ((3, 8), (1, 5), (32, 8)):
        with pytest.raises(ValueError, match=f"16 clips do not divide into {world} processes"):
            runs.micro_batch_size(replace(config, micro_batch=micro), world)


def test_a_clip_is_augmented_by_its_position_alone_and_fillers_are_padding():
    clips = runs.SeededClips(Clips("synthetic", None, "train", CONFIG), seed=5)
    first, target = clips[3, 17]
    torch.rand(100), np.random.random(7)
    again, _ = clips[3, 17]
    assert torch.equal(first, again) and not torch.equal(first, clips[3, 18][0])
    assert not torch.equal(first, runs.SeededClips(clips.dataset, seed=6)[3, 17][0])
    loader = torch.utils.data.DataLoader(
        clips, batch_sampler=[[(3, 17)]], num_workers=1, collate_fn=list)
    assert torch.equal(next(iter(loader))[0][0], first)
    assert target["frames"].all() and not clips[-1, 17][1]["frames"].any()


# --- what a run is started with


def choose(*given, saved=None):
    return runs.choose_settings(train.arguments(list(given)), saved)


def test_settings_are_the_command_lines_then_the_checkpoints_then_the_defaults():
    settings, config = choose()
    assert (settings["preset"], settings["split"], settings["quick_share"]) == ("synthetic", 1, .25)
    assert config == PRESETS["synthetic"]
    settings, config = choose("--dataset", "custom", "--data", "x", "--set", "num_classes=2")
    assert (settings["preset"], settings["quick_share"]) == ("ucf", 0)
    assert config == replace(PRESETS["ucf"], num_classes=2)
    saved = {"settings": settings | {"seed": 4}, "config": vars(config)}
    settings, resumed = choose("--resume", "x", "--data", "y", "--set", "lr=1", saved=saved)
    assert (settings["dataset"], settings["data"], settings["seed"]) == ("custom", "y", 4)
    assert resumed == replace(config, lr=1.0)


def test_fields_are_listed_with_their_meaning():
    listed = runs.list_fields(PRESETS["ava"])
    of_field = {line.split("=")[0].strip(): line for line in listed.splitlines() if "=" in line}
    assert list(of_field) == [field.name for field in fields(Config)]
    assert "frames of a clip" in of_field["frames"] and "frames=16 " in of_field["frames"]
    assert "drop_epochs=8,11" in of_field["drop_epochs"]
    assert "the objective" in listed.splitlines()
    for name, choices in CHOICES.items():                  # whichever of them is the preset's
        assert [choice for choice in choices if f'"{choice}"' not in of_field[name]] == []


def test_frames_with_more_actors_than_queries_are_counted():
    labels = np.arange(8)
    frames = {
        "video": np.array([0, 0, 0, 0, 1, 1, 1, 1]), "frame": np.array([1, 1, 1, 2, 1, 1, 1, 1]),
        "label": labels, "box": np.stack([[0, 1, 2, 0, 0, 1, 2, 2], *np.zeros((3, 8))], axis=1)}
    dataset = SimpleNamespace(ground_truth=lambda: (frames, []))    # 3, 1 and 3 actors
    assert "2 of 3 frames have more than num_queries=2 actors, up to 3" in runs.crowd_warning(
        dataset, 2)
    assert runs.crowd_warning(dataset, 3) == ""


# --- the weights that it starts from


@pytest.fixture
def source(tmp_path):
    """The weights of a trained model of nine classes and its checkpoint."""
    weights = VideoActionDetector(CONFIG).state_dict()
    for value in weights.values():
        value.add_(1)                   # no tensor is as a new model has it
    path = tmp_path / "source.pt"
    torch.save({"model": weights, "config": vars(CONFIG), "classes": CLASSES,
                "dataset": "synthetic", "settings": {}, "epoch": 1}, path)
    return weights, path


def copied(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def taken_from(weights, model, before):
    """Names of the tensors that the model has from `weights`; the others are as before."""
    names = set()
    for name, value in model.state_dict().items():
        if torch.equal(value, before[name]):
            continue
        assert torch.equal(value, weights[name]), name
        names.add(name)
    return names


@pytest.mark.parametrize("num_classes, class_names, same", [
    (9, CLASSES, True), (9, CLASSES[::-1], False), (5, CLASSES[:5], False)])
@pytest.mark.parametrize("stage_two", [False, True])
def test_fine_tuning_takes_the_whole_model_and_stage_two_all_but_the_backbone(
        source, num_classes, class_names, same, stage_two):
    weights, path = source
    model = VideoActionDetector(replace(CONFIG, num_classes=num_classes))
    before = copied(model)
    said = runs.start_from(model, path, class_names, stage_two)
    expected = set(weights)
    if stage_two:
        expected = {name for name in weights if not name.startswith(("backbone.", "neck."))}
    if not same:
        expected.remove("decoder.class_queries")
        assert "without decoder.class_queries, as its classes are others" in said
    assert taken_from(weights, model, before) == expected
    assert ("encoder and decoder" in said) == stage_two and str(path) in said


def test_a_run_s_folder_stands_for_its_best_checkpoint(source):
    weights, path = source
    path.rename(path.parent / "best.pt")
    model = VideoActionDetector(CONFIG)
    before = copied(model)
    assert "best.pt" in runs.start_from(model, path.parent, CLASSES)
    assert taken_from(weights, model, before) == set(weights)


def test_a_checkpoint_that_does_not_fit_changes_nothing(source):
    for changes in ({"dim_feedforward": 8}, {"decoder": "ldl"}, {"encoder": "transformer"}):
        model = VideoActionDetector(replace(CONFIG, **changes))
        before = copied(model)
        with pytest.raises(ValueError, match=r"source.pt.* does not fit the model in \d+ tensors"):
            runs.start_from(model, source[1], CLASSES)
        assert taken_from({}, model, before) == set()


def test_the_synthetic_set_starts_from_the_stem_unless_that_is_not_wanted(
        source, monkeypatch, tmp_path, capsys):
    weights, path = source
    of_backbone = VideoActionDetector(CONFIG).backbone.state_dict()
    stem = {}
    halved = {}
    for name in of_backbone:
        value = weights[f"backbone.{name}"].contiguous()
        if value.is_floating_point():
            value = value.half()
        stem[name] = value
        halved[f"backbone.{name}"] = value.to(weights[f"backbone.{name}"])
    save_file(stem, tmp_path / "stem.safetensors")
    monkeypatch.setattr(runs, "STEM", tmp_path / "stem.safetensors")

    def first(*given):
        model = VideoActionDetector(CONFIG)
        before = copied(model)
        args = train.arguments(list(given))
        said = runs.first_weights(model, args, runs.choose_settings(args, None)[0], CLASSES)
        return said, {name.split(".")[0] for name in taken_from(halved, model, before)}

    assert first() == (f"backbone from {tmp_path / 'stem.safetensors'}", {"backbone"})
    assert first("--backbone-weights", "none") == ("random weights", set())
    assert first("--dataset", "custom", "--data", "x")[0] == "random weights"
    monkeypatch.setattr(runs, "STEM", tmp_path / "nowhere")
    assert first() == ("random weights", set())
    assert "nowhere is missing, which the results in the README" in capsys.readouterr().out


def test_a_backbone_that_is_usually_pre_trained_is_warned_about(monkeypatch):
    vit = SimpleNamespace(config=PRESETS["ucf"])
    args = train.arguments(["--dataset", "ucf", "--data", "x"])
    assert "WARNING: the backbone vit starts from random" in runs.first_weights(vit, args, {
        "dataset": "ucf"}, [])
    args.backbone_weights = "none"
    assert runs.first_weights(vit, args, {"dataset": "ucf"}, []) == "random weights"
    loaded = []
    monkeypatch.setattr(runs, "load_backbone", lambda model, path: loaded.append(path))
    args.backbone_weights = "vit.pth"
    assert runs.first_weights(vit, args, {"dataset": "ucf"}, []) == "backbone from vit.pth"
    assert loaded == ["vit.pth"]


# --- the folder


def test_a_checkpoint_is_as_it_was_when_it_was_saved_whatever_happens_while_it_is_written(
        monkeypatch, tmp_path):
    folder = runs.RunFolder(tmp_path, [])
    model = StandIn(CONFIG)
    optimizer = torch.optim.Adam(model.parameters())
    before = copied(model)
    write = runs.save
    changed = threading.Event()

    def late(path, content):
        assert changed.wait(60)
        write(path, content)

    monkeypatch.setattr(runs, "save", late)
    state = {"step": 1, "history": [(1, 2)]}
    folder.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "state": state})
    state["step"] = 2
    torch.nn.init.zeros_(model.backbone.weight)
    changed.set()
    folder.wait()
    saved = torch.load(tmp_path / "last.pt")
    assert torch.equal(saved["model"]["backbone.weight"], before["backbone.weight"])
    assert saved["state"] == {"step": 1, "history": [(1, 2)]}
    assert saved["optimizer"]["param_groups"][0]["betas"] == (0.9, 0.999)


def test_best_is_kept_when_last_is_replaced_and_a_tie_goes_to_the_first(tmp_path):
    folder = runs.RunFolder(tmp_path, [])
    for step, share, value in [(1, 1.0, 0.3), (2, 0.5, 0.1), (3, 1.0, 0.3), (4, 1.0, 0.2),
                               (5, 1.0, 0.4)]:
        folder.save({"state": {"step": step}})
        row = {"step": step, "share": share, "f-mAP@0.5": value}
        folder.keep_if_best(row)
        folder.history.append(row)
        best = torch.load(tmp_path / "best.pt")["state"]["step"]
        assert best == {1: 1, 2: 2, 3: 2, 4: 2, 5: 5}[step]
    folder.save({"state": {"step": 6}})
    folder.wait()
    assert torch.load(tmp_path / "best.pt")["state"]["step"] == 5
    folder.keep_if_best(row | {"f-mAP@0.5": 0.5})
    folder.keep_if_best(row | {"f-mAP@0.5": 0.6})           # both are names of one file already
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best.pt", "last.pt"]


def test_results_are_read_as_they_were_written_up_to_a_step(monkeypatch, tmp_path):
    monkeypatch.setattr(runs.visualize, "training_curves", lambda *_: None)
    (tmp_path / "log.jsonl").write_text(json.dumps({"step": 1, "skipped": False}) + "\n")
    folder = runs.RunFolder(tmp_path, [])
    rows = [{"epoch": 1, "step": 3, "share": 0.1 * 0.25, "f-mAP@0.5": 1 / 3},
            {"epoch": 2, "step": 6, "share": 1.0, "f-mAP@0.5": 0.7}]
    for row in rows:
        folder.add_result(row, ())
    assert runs.read_history(tmp_path / "results.csv", 6) == rows
    assert runs.read_history(tmp_path / "results.csv", 5) == rows[:1]
    assert runs.read_history(tmp_path / "nowhere.csv", 5) == []
    assert [folder.share_at(step) for step in (3, 4, 6)] == [0.1 * 0.25, 0, 1.0]


def test_lines_of_the_log_after_the_checkpoint_are_cut_off(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    runs.trim_log(path, 2)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'
