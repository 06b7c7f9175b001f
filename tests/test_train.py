"""train.py on a small stand-in for the model and a data set of random clips, in this process and in others.

`python tests/test_train.py ARGUMENTS` is train.py with the stand-ins, for the tests that need processes to kill.
"""

import csv
import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))
import train                                                                                          # noqa: E402
from model import PRESETS                                                                             # noqa: E402

# B clips, T frames, A actor queries, N actors of a clip, C classes

SMALL = ("num_classes=3 frames=4 num_queries=4 train_frames=0 batch_size=4 micro_batch=4 epochs=2 clips_per_epoch=0 "
         "eval_every=1 warmup_epochs=0.5 lr=1e-2 backbone_lr=1e-3 deep_supervision=True dropout=0.0").split()


WRITE_HISTORY = train.write_history
MINUTES = 10            # until a process is given up: far more than it takes on an idle machine


class StandIn(nn.Module):
    """The output contract of VideoActionDetector from the mean colour of each frame; has what trips a training loop:
    a frozen parameter, dropout, and batch statistics when config.conv_blocks is 2."""

    def __init__(self, config):
        super().__init__()
        self.config, width = config, 8
        self.backbone = nn.Linear(3, width)
        self.norm = nn.BatchNorm1d(width) if config.conv_blocks == 2 else nn.Identity()
        self.dropout = nn.Dropout(config.dropout)
        self.decoder = nn.ModuleList(nn.Linear(width, config.num_queries * (5 + config.num_classes)) for _ in range(2))
        self.unused = nn.Parameter(torch.ones(3), requires_grad=False)

    def forward(self, clips, padding_mask=None, return_attention=False, frames=None):
        clips = clips if frames is None else clips[:, :, frames]
        x = self.backbone(clips.mean(dim=(3, 4)).transpose(1, 2))                                     # (B, T, width)
        x = self.dropout(torch.tanh(self.norm(x.flatten(0, 1)).view_as(x)))
        layers = []
        for layer in self.decoder:
            y = layer(x).unflatten(-1, (self.config.num_queries, -1))                                 # (B, T, A, 5 + C)
            layers.append({"pred_boxes": y[..., :4].sigmoid(), "pred_conf": y[..., 4], "pred_logits": y[..., 5:]})
        return {**layers[-1], "aux_outputs": layers[:-1]}


class Clips:
    """Ten clips with 0 to 5 actors, drawn from their index, with noise for an augmentation; clips may be spoilt."""

    def __init__(self, name, root, split, config, train):
        self.name, self.config, self.train = name, config, train
        self.class_names, self.class_groups = ["a", "b", "c"], {"first": [0], "others": [1, 2]}
        self.videos = [f"{split if name == 'synthetic' else 'video'}{i}" for i in range(10)]
        self.clip_videos = list(range(10))
        self.spoilt = [int(i) for i in os.environ.get("SPOILT", "").split()] if train else []
        self.delay = float(os.environ.get("DELAY", 0))

    def __len__(self):
        return len(self.videos)

    def __getitem__(self, index):
        frames, generator = self.config.frames, np.random.default_rng(index)
        actors = index % 6
        time.sleep(self.delay)
        clip = torch.from_numpy(generator.normal(size=(3, frames, 8, 8))).float()
        if self.train:
            clip = clip + 0.1 * torch.rand(3, 1, 1, 1)
        if index in self.spoilt:
            clip[:, 1] = math.nan
        present = torch.from_numpy(generator.random((actors, frames)) < 0.8)
        return clip, {
            "boxes": torch.from_numpy(generator.random((actors, frames, 4)) * 0.3 + 0.3).float(), "present": present,
            "labels": torch.from_numpy(generator.random((actors, frames, 3)) < 0.5).float(),
            "frames": torch.ones(frames, dtype=torch.bool), "video": self.videos[index],
            "frame_ids": torch.arange(1, frames + 1), "size": torch.tensor([100, 200])}

    def ground_truth(self):
        video = np.arange(10)
        boxes = np.tile([50.0, 25.0, 150.0, 75.0], (10, 1))
        frames = {"frame": video * 1_000_000 + 1, "label": video % 3, "box": boxes}
        tubes = [{"video": int(v), "label": int(v % 3), "score": 1.0, "frames": np.arange(1, 5),
                  "boxes": np.tile(boxes[:1], (4, 1))} for v in video]
        return frames, tubes


def no_sheet(model, dataset, config, path, device):
    Path(path).write_bytes(b"")


def run(out, *arguments, settings=()):
    """train.main in this process -> the contents of last.pt."""
    train.main(["--out", str(out), *arguments, "--set", *SMALL, *settings])
    return last(out)


def last(out):
    return torch.load(Path(out) / "last.pt", weights_only=True)


def log(out):
    return [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()]


@pytest.fixture
def start():
    """A function that runs train.py with the stand-ins as another process; all of them are ended with the test."""
    processes = []

    def begin(out, *arguments, settings=(), launcher=(), **environment):
        processes.append(subprocess.Popen(
            [sys.executable, *launcher, __file__, "--out", str(out), *arguments, "--set", *SMALL, *settings],
            env={**os.environ, "OMP_NUM_THREADS": "1", **environment}, start_new_session=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
        return processes[-1]

    yield begin
    for process in processes:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()


def two_ranks(*options):
    return ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", *options)


def assert_equal_weights(first, second, tolerance=0.0):
    assert first["model"].keys() == second["model"].keys()
    for name, value in first["model"].items():
        torch.testing.assert_close(second["model"][name], value, rtol=0, atol=tolerance, msg=lambda m: f"{name}: {m}")


def signal_in_step(monkeypatch, step, number):
    """Sends this process a signal when a run reports on a step."""
    calls, memory = [], train.evaluate.memory_gb

    def signalled(device):
        calls.append(device)
        if len(calls) == step:
            os.kill(os.getpid(), number)
        return memory(device)

    monkeypatch.setattr(train.evaluate, "memory_gb", signalled)


def assert_same_state(first, second):
    """Weights and the optimizer's moments bit for bit."""
    assert_equal_weights(first, second)
    for number, moments in first["optimizer"]["state"].items():
        for name, value in moments.items():
            assert torch.equal(second["optimizer"]["state"][number][name], value), (number, name)


@pytest.fixture
def stand_ins(monkeypatch):
    monkeypatch.setattr(train, "VideoActionDetector", StandIn)
    monkeypatch.setattr(train, "build_dataset", Clips)
    monkeypatch.setattr(train.visualize, "attention_sheet", no_sheet)
    monkeypatch.setattr(train, "write_history", lambda *_: None)        # drawing takes longer than such a run
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield monkeypatch
    for number, handler in handlers.items():
        signal.signal(number, handler)


# --- the order of the clips, the rates, small functions


@pytest.mark.parametrize("length, batch, micro, world, clips", [
    (10, 4, 2, 1, 0), (10, 4, 1, 2, 0), (7, 6, 1, 3, 0), (12, 4, 2, 2, 5)])
def test_a_pass_takes_every_clip_once_over_all_ranks_and_epochs_are_slices_of_it(length, batch, micro, world, clips):
    config = replace(PRESETS["synthetic"], batch_size=batch, micro_batch=micro, clips_per_epoch=clips)
    per_epoch, steps = train.epoch_length(length, config)
    total = 24 * steps
    of_ranks = [list(train.micro_batches(0, total, length, config, 3, rank, world)) for rank in range(world)]
    assert all(len(batches) == total * batch // (world * micro) for batches in of_ranks)
    assert all(len(entries) == micro for batches in of_ranks for entries in batches)
    entries = sorted((position, index) for batches in of_ranks for entries in batches for index, position in entries)
    assert [position for position, _ in entries] == list(range(total * batch))             # each position once
    seen = [index for _, index in entries if index >= 0]
    assert len(seen) == 24 * per_epoch
    passes = [seen[i:i + length] for i in range(0, len(seen) - length + 1, length)]
    assert all(sorted(one) == list(range(length)) for one in passes)
    assert len({tuple(one) for one in passes}) == len(passes)                          # each in an order of its own
    of_epochs = [entries[e * steps * batch:(e + 1) * steps * batch] for e in range(24)]
    assert all(sum(index >= 0 for _, index in epoch) == per_epoch for epoch in of_epochs)
    # going on in the middle is the rest of the same sequence
    rest = list(train.micro_batches(total // 2 + 1, total, length, config, 3, 0, world))
    assert rest == of_ranks[0][-len(rest):]
    assert list(train.micro_batches(0, total, length, config, 4, 0, world)) != of_ranks[0]


def test_a_clip_is_augmented_by_its_position_alone_and_fillers_count_nowhere():
    config = replace(PRESETS["synthetic"], frames=4)
    clips = train.SeededClips(Clips("synthetic", None, "train", config, True), seed=5)
    first, target = clips[3, 17]
    torch.rand(100), np.random.random(7)
    again, _ = clips[3, 17]
    assert torch.equal(first, again) and not torch.equal(first, clips[3, 18][0])
    assert not torch.equal(first, train.SeededClips(clips.dataset, seed=6)[3, 17][0])
    loader = torch.utils.data.DataLoader(clips, batch_sampler=[[(3, 17)]], num_workers=1, collate_fn=list)
    assert torch.equal(next(iter(loader))[0][0], first)
    assert target["frames"].all() and not clips[-1, 17][1]["frames"].any()


def test_rates_warm_up_by_the_step_then_drop_or_follow_a_cosine():
    config = replace(PRESETS["ucf"], drop_epochs=(12, 16), warmup_epochs=2.5, warmup_lr=1e-6, lr=1e-4, backbone_lr=1e-5)
    rates = [train.rates(step, 10, config) for step in range(180)]
    assert rates[0] == (1e-6, 1e-6) and rates[25] == (1e-5, 1e-4)
    assert rates[5][1] == pytest.approx(1e-6 + 5 / 25 * 99e-6) and rates[5][0] == pytest.approx(1e-6 + 5 / 25 * 9e-6)
    assert rates[119] == (1e-5, 1e-4) and rates[120] == pytest.approx((1e-6, 1e-5))
    assert rates[160] == pytest.approx((1e-7, 1e-6))
    config = replace(config, schedule="cosine", warmup_epochs=2.0)
    assert train.rates(20, 10, config)[1] == 1e-4 and train.rates(100, 10, config)[1] == pytest.approx(5e-5)
    assert train.rates(179, 10, config)[1] == pytest.approx(1e-4 * (1 + math.cos(math.pi * 159 / 160)) / 2)
    with pytest.raises(ValueError, match="there are: step, cosine"):
        replace(config, schedule="linear")


def test_rates_follow_the_batch_by_the_square_root_where_the_recipe_says_for_which_batch_they_are():
    config = replace(PRESETS["ucf"], batch_size=32)
    for step in (0, 15, 50, 170):
        plain, scaled = train.rates(step, 10, config), train.rates(step, 10, replace(config, lr_batch=8))
        assert scaled == pytest.approx([2 * rate for rate in plain])


def test_the_batch_has_to_divide():
    config = replace(PRESETS["synthetic"], batch_size=16, micro_batch=8)
    assert [train.micro_batch_size(config, world) for world in (1, 2, 4)] == [8, 8, 4]
    for world, micro in ((3, 8), (1, 5), (32, 8)):
        with pytest.raises(ValueError, match=f"16 clips do not divide into {world} processes"):
            train.micro_batch_size(replace(config, micro_batch=micro), world)


def test_the_optimizer_has_the_backbone_at_its_own_rate_and_leaves_out_what_is_frozen():
    config = replace(PRESETS["synthetic"], backbone_lr=1e-5, lr=1e-4, weight_decay=0.3, adam_beta2=0.9, conv_blocks=2)
    model = StandIn(config)
    backbone, others = train.make_optimizer(model, config).param_groups
    assert (backbone["lr"], others["lr"], others["betas"], others["weight_decay"]) == (1e-5, 1e-4, (0.9, 0.9), 0.3)
    assert {id(p) for p in backbone["params"]} == {id(p) for p in model.backbone.parameters()}
    rest = [*model.norm.parameters(), *model.decoder.parameters()]
    assert {id(p) for p in others["params"]} == {id(p) for p in rest}


def test_targets_are_cut_to_the_frames_that_are_decoded():
    target = Clips("synthetic", None, "train", replace(PRESETS["synthetic"], frames=4), True)[3][1]
    target["cause"] = torch.rand(3, 4, 4)
    cut = train.cut_to_frames(target, torch.tensor([1, 3]))
    for name in ("boxes", "present", "labels", "cause"):
        assert torch.equal(cut[name], target[name][:, [1, 3]]), name
    assert cut["frame_ids"].tolist() == [2, 4] and len(cut["frames"]) == 2 and cut["video"] == target["video"]


# --- whole runs in this process


def test_a_run_leaves_its_folder_and_says_so(stand_ins, tmp_path, capsys):
    stand_ins.setattr(train, "write_history", WRITE_HISTORY)
    checkpoint = run(tmp_path / "run")
    files = {path.name for path in (tmp_path / "run").iterdir()}
    assert files == {"config.json", "log.jsonl", "results.csv", "per_class.csv", "metrics.json", "detections.npz",
                     "last.pt", "best.pt", "curves.png", "attention.png"}
    said = capsys.readouterr().out
    assert all(str(tmp_path / "run" / name) in said for name in files) and "overfit" not in said
    assert (checkpoint["dataset"], checkpoint["classes"], checkpoint["epoch"]) == ("synthetic", ["a", "b", "c"], 2)
    assert set(checkpoint["metrics"]) >= {"f-mAP@0.5", "v-mAP@0.5"} and checkpoint["config"]["num_classes"] == 3
    lines = log(tmp_path / "run")
    assert [line["step"] for line in lines] == list(range(1, 7))               # 10 clips a pass: steps of 4, 4, 2
    assert set(lines[0]) >= {"loss", "class", "box", "giou", "conf", "lr", "backbone_lr", "grad_norm", "clips_per_s",
                             "data_share", "memory_gb", "eta_minutes", "skipped"}
    rates = train.rates(5, 3, train.config_from_dict(checkpoint["config"]))                 # of the last step
    assert tuple(group["lr"] for group in checkpoint["optimizer"]["param_groups"]) == rates
    assert (lines[-1]["backbone_lr"], lines[-1]["lr"]) == rates
    with open(tmp_path / "run" / "results.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows] == ["1", "2"] and "f-mAP@0.5 others" in rows[0]
    assert json.loads((tmp_path / "run" / "config.json").read_text())["num_queries"] == 4


def test_the_same_videos_for_training_and_test_are_called_an_overfit_check(stand_ins, tmp_path, capsys):
    run(tmp_path, "--dataset", "ucf", "--data", "somewhere", settings=["epochs=1"])
    assert "overfit check" in capsys.readouterr().out


def test_training_learns(stand_ins, tmp_path):
    """The stand-in sees colours only, but can learn where boxes are on the whole and that there are less than four."""
    run(tmp_path, settings=["epochs=20", "eval_every=20"])
    losses = [line["loss"] for line in log(tmp_path)]
    assert np.mean(losses[-6:]) < 0.85 * np.mean(losses[:6])


@pytest.mark.parametrize("micro", [1, 2])
def test_micro_batches_train_as_the_whole_batch_does(stand_ins, tmp_path, micro):
    """Six steps over clips of 0 to 5 actors, the last step of an epoch with half a batch."""
    whole = run(tmp_path / "whole")
    parts = run(tmp_path / "parts", settings=[f"micro_batch={micro}"])
    assert_equal_weights(whole, parts, tolerance=1e-5)
    for line, other in zip(log(tmp_path / "whole"), log(tmp_path / "parts")):
        for name in ("loss", "class", "box", "giou", "conf", "grad_norm"):
            assert other[name] == pytest.approx(line[name], rel=1e-4), name


def test_a_seed_gives_a_run_and_another_seed_another(stand_ins, tmp_path):
    first = run(tmp_path / "a", settings=["train_frames=2", "dropout=0.3"])
    assert_same_state(first, run(tmp_path / "b", settings=["train_frames=2", "dropout=0.3"]))
    other = run(tmp_path / "c", "--seed", "1", settings=["train_frames=2", "dropout=0.3"])
    assert not torch.equal(first["model"]["decoder.0.weight"], other["model"]["decoder.0.weight"])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_step_and_a_resumed_run_is_bit_equal_to_one_that_was_not(stand_ins, tmp_path, number):
    stand_ins.setattr(train, "write_history", WRITE_HISTORY)
    settings = ["train_frames=2", "dropout=0.3", "conv_blocks=2"]
    whole = run(tmp_path / "whole", settings=settings)
    signal_in_step(stand_ins, 2, number)
    with pytest.raises(SystemExit) as ended:
        run(tmp_path / "cut", "--workers", "1", settings=settings)      # who loads the clips makes no difference
    assert ended.value.code == 128 + number
    assert last(tmp_path / "cut")["state"]["step"] == 3                 # sent at the end of step 2, step 3 is finished
    train.main(["--resume", str(tmp_path / "cut")])                     # the settings are the checkpoint's
    assert_same_state(whole, last(tmp_path / "cut"))
    keep = ("step", "loss", "lr", "grad_norm")
    assert [[line[name] for name in keep] for line in log(tmp_path / "cut")] == \
        [[line[name] for name in keep] for line in log(tmp_path / "whole")]
    assert (tmp_path / "cut/results.csv").read_text().count("\n") == 3


def test_a_signal_in_an_evaluation_ends_the_run_at_once_and_the_evaluation_is_made_when_resumed(stand_ins, tmp_path):
    whole = run(tmp_path / "whole")
    evaluate_now = train.evaluate_now
    stand_ins.setattr(train, "evaluate_now", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(SystemExit) as ended:
        run(tmp_path / "cut")
    assert ended.value.code == 143 and last(tmp_path / "cut")["state"]["step"] == 3
    stand_ins.setattr(train, "evaluate_now", evaluate_now)
    train.main(["--resume", str(tmp_path / "cut")])
    assert_same_state(whole, last(tmp_path / "cut"))
    assert [row["epoch"] for row in last(tmp_path / "cut")["state"]["history"]] == [1, 2]


def test_a_run_that_had_ended_is_not_trained_on(stand_ins, tmp_path, capsys):
    before = run(tmp_path)
    train.main(["--out", str(tmp_path), "--resume"])
    assert "had ended" in capsys.readouterr().out
    assert_same_state(before, last(tmp_path))
    train.main(["--resume", str(tmp_path), "--set", "epochs=3"])
    assert last(tmp_path)["state"]["step"] == 9 and len(log(tmp_path)) == 9


def test_lines_of_the_log_after_the_checkpoint_are_cut_off(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    train.trim_log(path, 2)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_a_step_that_is_not_finite_is_skipped_and_its_clips_are_named(stand_ins, tmp_path):
    stand_ins.setenv("SPOILT", "4")
    checkpoint = run(tmp_path, settings=["micro_batch=2", "conv_blocks=2", "eval_every=2"])
    skipped = [line for line in log(tmp_path) if line["skipped"]]
    assert len(skipped) == 2 and all(line["loss"] is None for line in skipped)          # one in each of two passes
    assert all("train4 from frame 1" in line["clips"] and len(line["clips"]) == 2 for line in skipped)
    assert all(torch.isfinite(value).all() for value in checkpoint["model"].values())   # batch statistics too
    assert checkpoint["state"]["bad"] == 0


def test_five_bad_steps_in_a_row_end_the_run_and_the_checkpoint_is_from_before(stand_ins, tmp_path):
    stand_ins.setenv("SPOILT", "0 1 2 3 4 5 6 7 8 9")
    with pytest.raises(SystemExit, match="5 in a row: .*last.pt"):
        run(tmp_path, "--save-minutes", "0", settings=["conv_blocks=2", "epochs=9", "eval_every=9"])
    assert len(log(tmp_path)) == 5
    assert all(torch.isfinite(value).all() for value in last(tmp_path)["model"].values())


def test_an_infinite_gradient_of_a_finite_loss_is_skipped(stand_ins, tmp_path):
    clip = nn.utils.clip_grad_norm_

    def spoil(parameters, limit):
        next(parameter.grad for parameter in parameters if parameter.grad is not None)[0] = math.inf
        return clip(parameters, limit)

    stand_ins.setattr(train.nn.utils, "clip_grad_norm_", spoil)
    with pytest.raises(SystemExit, match="5 in a row"):
        run(tmp_path, settings=["epochs=9", "eval_every=9"])
    line = log(tmp_path)[0]
    assert line["loss"] > 0 and line["grad_norm"] is None and len(line["clips"]) == 4


def test_a_folder_with_a_run_is_refused(stand_ins, tmp_path):
    run(tmp_path, settings=["epochs=1"])
    before = (tmp_path / "last.pt").read_bytes()
    with pytest.raises(SystemExit, match="holds a run already.*--resume"):
        run(tmp_path, settings=["epochs=1"])
    assert (tmp_path / "last.pt").read_bytes() == before
    with pytest.raises(SystemExit, match="nothing to resume: .*nowhere/last.pt is missing"):
        train.main(["--resume", str(tmp_path / "nowhere")])


@pytest.mark.parametrize("arguments, message", [
    (["--set", "qeueries=3"], "qeueries.*num_queries"), (["--set", "epochs=many"], "epochs is int"),
    (["--set", "micro_batch=3"], "16 clips do not divide"), (["--set", "num_classes=5"], "--set num_classes=3"),
    (["--dataset", "ucf"], "name it with --data"), (["--dataset", "mine", "--data", "x"], "no preset is called 'mine'"),
    (["--set", "drop_epochs=a,b"], "drop_epochs"),
    (["--split", "2"], "--split 2: synthetic"), (["--init", "missing.pt"], "missing.pt")])
def test_wrong_arguments_end_with_one_line(stand_ins, tmp_path, arguments, message):
    with pytest.raises(SystemExit, match=message) as ended:
        train.main(["--out", str(tmp_path / "run"), "--set", "num_classes=3", *arguments])
    assert "\n" not in str(ended.value) and not (tmp_path / "run").exists()


def test_a_data_set_of_ones_own_is_trained_with_the_preset_ucf():
    chosen = ["--dataset", "custom", "--data", "x", "--set", "num_classes=2"]
    assert train.choose_settings(train.arguments(chosen), None)[1] == replace(PRESETS["ucf"], num_classes=2)
    assert train.choose_settings(train.arguments([*chosen, "--preset", "ava"]), None)[1].key_frame


@pytest.mark.parametrize("arguments", [
    ["--eval-share", "0"], ["--resume"], ["--resume", "x", "--init", "y"], ["--precision", "int8"]])
def test_arguments_that_contradict_are_refused(arguments):
    with pytest.raises(SystemExit) as ended:
        train.arguments(arguments)
    assert ended.value.code == 2


def test_a_failed_write_keeps_the_previous_checkpoint(stand_ins, tmp_path):
    path = tmp_path / "last.pt"
    train.save(path, {"step": 1})

    def full(content, file):
        file.write(b"half of it")
        raise OSError(28, "No space left on device")

    stand_ins.setattr(train.torch, "save", full)
    with pytest.raises(SystemExit, match="No space left.*previous last.pt is kept.*--resume"):
        train.save(path, {"step": 2})
    assert torch.load(path) == {"step": 1} and [p.name for p in tmp_path.iterdir()] == ["last.pt"]


def test_out_of_memory_says_what_takes_less(stand_ins, tmp_path):
    def too_large(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    stand_ins.setattr(train, "accumulate", too_large)
    with pytest.raises(SystemExit, match=r"(?s)Tried to allocate 2 GiB.*checkpoint_classifier.*micro_batch.*--resume"):
        run(tmp_path)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_trains_nearly_as_float32_does(stand_ins, tmp_path, precision):
    settings = ["epochs=6", "eval_every=6"]
    full = run(tmp_path / "full", settings=settings)
    half = run(tmp_path / "half", "--precision", precision, settings=settings)
    lines, expected = log(tmp_path / "half"), log(tmp_path / "full")
    skipped = [line["step"] for line in lines if line["skipped"]]
    assert len(skipped) < 6 and half["state"]["bad"] == 0
    assert bool(skipped) == bool(half["scaler"]) == (precision == "fp16")   # it starts with too large a scale: no fault
    assert np.mean([line["loss"] for line in lines[-3:]]) == pytest.approx(
        np.mean([line["loss"] for line in expected[-3:]]), rel=0.02 if precision == "bf16" else 0.2)
    assert not torch.equal(full["model"]["decoder.1.weight"], half["model"]["decoder.1.weight"])


# --- the real model

REAL = ("num_classes=9 frames=4 dim=32 num_heads=2 dim_feedforward=16 num_queries=3 batch_size=4 micro_batch=2 "
        "epochs=1 clips_per_epoch=16 dropout=0.1 eval_every=1").split()


def test_the_real_model_resumes_bit_equal_and_gives_its_encoder_and_decoder_to_stage_two(tmp_path, monkeypatch):
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    monkeypatch.setattr(train.visualize, "attention_sheet", no_sheet)
    monkeypatch.setattr(train, "write_history", lambda *_: None)
    train.main(["--out", str(tmp_path / "whole"), "--eval-share", "0.005", "--set", *REAL])
    signal_in_step(monkeypatch, 1, signal.SIGTERM)
    with pytest.raises(SystemExit):
        train.main(["--out", str(tmp_path / "cut"), "--eval-share", "0.005", "--set", *REAL])
    train.main(["--resume", str(tmp_path / "cut")])
    for number, handler in handlers.items():
        signal.signal(number, handler)
    assert_same_state(last(tmp_path / "whole"), last(tmp_path / "cut"))

    config = train.override(PRESETS["synthetic"], REAL)
    source = last(tmp_path / "whole")["model"]
    for classes in (9, 5):
        model = train.VideoActionDetector(replace(config, num_classes=classes))
        before = {name: value.clone() for name, value in model.state_dict().items()}
        train.load_stage_one(model, tmp_path / "whole/last.pt")
        for name, value in model.state_dict().items():
            of_stage_two = name.startswith(("backbone.", "neck.")) or (classes == 5 and name == "decoder.class_queries")
            assert torch.equal(value, before[name] if of_stage_two else source[name]), name
    model = train.VideoActionDetector(replace(config, dim_feedforward=8))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"does not fit the model in \d+ tensors: encoder"):
        train.load_stage_one(model, tmp_path / "whole/last.pt")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


# --- several processes, killed ones


def finish(process):
    said, _ = process.communicate(timeout=60 * MINUTES)
    assert process.returncode == 0, said
    return said


def wait_for_step(out, process, step):
    """Until a run's log has so many lines."""
    deadline = time.monotonic() + 60 * MINUTES
    while not (out / "log.jsonl").exists() or (out / "log.jsonl").read_text().count("\n") < step:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, f"no step {step} within {MINUTES} minutes"
        time.sleep(0.005)


def test_two_ranks_train_as_one_process_does(stand_ins, start, tmp_path):
    """Two micro-batches on each of two ranks; clips of 0 to 5 actors, the last step of an epoch half empty."""
    finish(start(tmp_path / "two", settings=["micro_batch=1"], launcher=two_ranks()))
    assert_equal_weights(run(tmp_path / "whole"), last(tmp_path / "two"), tolerance=1e-5)
    for name in ("loss", "class", "box", "giou", "conf", "grad_norm"):
        assert [line[name] for line in log(tmp_path / "two")] == pytest.approx(
            [line[name] for line in log(tmp_path / "whole")], rel=1e-4), name
    assert json.loads((tmp_path / "two/metrics.json").read_text())["f-mAP@0.5"] == pytest.approx(
        json.loads((tmp_path / "whole/metrics.json").read_text())["f-mAP@0.5"], abs=1e-6)


def test_killed_at_random_moments_and_resumed_the_weights_are_those_of_an_uninterrupted_run(stand_ins, start, tmp_path):
    settings = ["train_frames=2", "dropout=0.3", "conv_blocks=2", "epochs=10", "eval_every=5"]
    whole, out, chance = run(tmp_path / "whole", settings=settings), tmp_path / "cut", random.Random()
    steps = sorted(chance.sample(range(1, 28), int(os.environ.get("KILLS", 3))))       # KILLS=20: some two minutes
    print("killed after", steps)
    for number, step in enumerate(steps):
        process = start(out, *(["--resume"] if number else []), "--save-minutes", "0", settings=settings, DELAY="0.01")
        wait_for_step(out, process, step)
        time.sleep(chance.random() * 0.2)
        process.kill()
        process.communicate()
        assert 0 < last(out)["state"]["step"] <= 30                                 # it can be read
    train.main(["--resume", str(out)])
    assert_same_state(whole, last(out))
    assert [line["step"] for line in log(out)] == list(range(1, 31))
    assert [line["loss"] for line in log(out)] == [line["loss"] for line in log(tmp_path / "whole")]


def test_a_script_ended_by_sigterm_exits_with_143(stand_ins, start, tmp_path):
    process = start(tmp_path, settings=["epochs=10", "eval_every=10"], DELAY="0.05")
    wait_for_step(tmp_path, process, 2)
    process.terminate()
    said, _ = process.communicate(timeout=60 * MINUTES)
    assert process.returncode == 143, said
    assert 2 <= last(tmp_path)["state"]["step"] < 30


def test_torchrun_restarts_a_run_one_of_whose_ranks_was_killed(stand_ins, start, tmp_path):
    settings = ["epochs=5", "eval_every=5"]
    process = start(tmp_path / "two", "--save-minutes", "0", settings=[*settings, "micro_batch=2"], DELAY="0.05",
                    launcher=two_ranks("--max-restarts", "1"))
    wait_for_step(tmp_path / "two", process, 3)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)
    assert "going on from step" in finish(process)
    assert_equal_weights(run(tmp_path / "whole", settings=settings), last(tmp_path / "two"), tolerance=1e-5)
    assert [line["step"] for line in log(tmp_path / "two")] == list(range(1, 16))


if __name__ == "__main__":
    train.VideoActionDetector, train.build_dataset, train.visualize.attention_sheet = StandIn, Clips, no_sheet
    train.write_history = lambda *_: None
    train.main()
