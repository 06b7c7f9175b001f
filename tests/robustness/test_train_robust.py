"""train.py where things go wrong: signals, kills, full disks, bad clips, bad arguments."""

import json
import math
import os
import pickle
import random
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from stand_ins import Clips, assert_equal_weights, assert_same_state, last, log, run
from torch import nn

import train
from beside import runs

MINUTES = 10            # until a process is given up: far more than it takes on an idle machine
TWO_RANKS = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")


def wait_for_step(out, process, step):
    """Until a run's log has so many lines."""
    deadline = time.monotonic() + 60 * MINUTES
    while not (out / "log.jsonl").exists() or (out / "log.jsonl").read_text().count("\n") < step:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, f"no step {step} within {MINUTES} minutes"
        time.sleep(0.005)


def finish(process, code=0):
    said, _ = process.communicate(timeout=60 * MINUTES)
    assert process.returncode == code, said
    return said


# --- signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_run_after_its_step_with_what_to_do_next(
        stand_ins, start, tmp_path, number):
    """The whole group of processes is sent it, as by a terminal or a job scheduler."""
    process = start(
        tmp_path, "--workers", "1", settings=["epochs=20", "eval_every=20"], DELAY="0.05")
    wait_for_step(tmp_path, process, 2)
    os.killpg(process.pid, number)
    said = finish(process, 128 + number)
    step = last(tmp_path)["state"]["step"]
    assert 2 <= step < 60 and step == len(log(tmp_path))
    assert f"saved at step {step}; resume with --resume {tmp_path}" in said
    assert "Traceback" not in said


def test_a_signal_in_an_evaluation_ends_the_run_at_once_and_it_is_made_when_resumed(
        stand_ins, tmp_path, capsys):
    whole = run(tmp_path / "whole")
    detect = train.evaluate.detect
    stand_ins.setattr(
        train.evaluate, "detect", lambda *_, **__: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(SystemExit) as ended:
        run(tmp_path / "cut")
    assert ended.value.code == 143 and last(tmp_path / "cut")["state"]["step"] == 3
    assert "saved at step 3; resume with" in capsys.readouterr().err
    stand_ins.setattr(train.evaluate, "detect", detect)
    train.main(["--resume", str(tmp_path / "cut")])
    assert_same_state(whole, last(tmp_path / "cut"))
    for name in ("whole", "cut"):
        history = runs.read_history(tmp_path / name / "results.csv", 6)
        assert [row["epoch"] for row in history] == [1, 2]


def test_the_second_signal_ends_a_step_at_once(stand_ins, tmp_path):
    def twice(*_):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("the step went on")

    stand_ins.setattr(train, "detection_loss", twice)
    with pytest.raises(SystemExit) as ended:
        run(tmp_path)
    assert ended.value.code == 130 and last(tmp_path)["state"]["step"] == 0


# --- killed processes


def test_killed_at_random_moments_and_resumed_the_weights_are_those_of_an_uninterrupted_run(
        stand_ins, start, tmp_path):
    """KILLS=20 in the environment: some two minutes."""
    settings = ["train_frames=2", "dropout=0.3", "conv_blocks=2", "epochs=10", "eval_every=5"]
    whole = run(tmp_path / "whole", settings=settings)
    out = tmp_path / "cut"
    chance = random.Random()
    steps = sorted(chance.sample(range(1, 28), int(os.environ.get("KILLS", 3))))
    print("killed after", steps)
    for number, step in enumerate(steps):
        resumed = ["--resume"] if number else []
        process = start(out, *resumed, "--save-minutes", "0", settings=settings, DELAY="0.01")
        wait_for_step(out, process, step)
        time.sleep(chance.random() * 0.2)
        process.kill()
        process.communicate()
        assert 0 <= last(out)["state"]["step"] <= 30                        # it can be read
    train.main(["--resume", str(out)])
    assert_same_state(whole, last(out))
    assert [line["step"] for line in log(out)] == list(range(1, 31))
    assert [line["loss"] for line in log(out)] == [line["loss"] for line in log(tmp_path / "whole")]
    history = runs.read_history(out / "results.csv", 30)
    assert [row["epoch"] for row in history] == [row["epoch"] for row in runs.read_history(
        tmp_path / "whole/results.csv", 30)]


def test_torchrun_restarts_a_run_one_of_whose_ranks_was_killed(stand_ins, start, tmp_path):
    settings = ["epochs=5", "eval_every=5"]
    out = tmp_path / "two"
    process = start(out, "--save-minutes", "0", settings=[*settings, "micro_batch=2"], DELAY="0.05",
                    launcher=(*TWO_RANKS, "--max-restarts", "1"))
    wait_for_step(out, process, 3)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)
    assert "resumed at step" in finish(process)
    whole = run(tmp_path / "whole", settings=settings)
    assert_equal_weights(whole, last(out), tolerance=1e-5)
    assert [line["step"] for line in log(out)] == list(range(1, 16))


# --- what cannot be written


def full_disk(content, file):
    file.write(b"half of it")
    raise OSError(28, "No space left on device")


def test_a_failed_write_keeps_the_previous_checkpoint(monkeypatch, tmp_path):
    path = tmp_path / "last.pt"
    runs.save(path, {"step": 1})
    monkeypatch.setattr(runs.torch, "save", full_disk)
    with pytest.raises(SystemExit, match="No space left.*previous last.pt is kept.*--resume"):
        runs.save(path, {"step": 2})
    assert torch.load(path) == {"step": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["last.pt"]


def test_a_disk_that_fills_up_in_the_background_ends_the_run(stand_ins, tmp_path):
    write = runs.save

    def fails_from_step_two(path, content):
        if content["state"]["step"] >= 2:
            stand_ins.setattr(runs.torch, "save", full_disk)
        write(path, content)

    stand_ins.setattr(runs, "save", fails_from_step_two)
    with pytest.raises(SystemExit, match="cannot write .*last.pt.*No space left"):
        run(tmp_path, "--save-minutes", "0")
    assert last(tmp_path)["state"]["step"] == 1


def test_without_hard_links_best_is_a_copy_and_that_is_said(stand_ins, tmp_path, capsys):
    def refused(*_):
        raise OSError(95, "Operation not supported")

    stand_ins.setattr(runs.os, "link", refused)
    run(tmp_path, settings=["epochs=1"])
    assert "best.pt is a copy of last.pt" in capsys.readouterr().out
    assert not (tmp_path / "best.pt").samefile(tmp_path / "last.pt")
    assert torch.load(tmp_path / "best.pt")["epoch"] == 1


def test_out_of_memory_says_what_takes_less(stand_ins, tmp_path):
    def too_large(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    stand_ins.setattr(train, "detection_loss", too_large)
    with pytest.raises(SystemExit, match=r"(?s)allocate 2 GiB.*checkpoint_classifier.*--resume"):
        run(tmp_path)


# --- clips that are not finite


def test_a_step_that_is_not_finite_is_skipped_and_its_clips_are_named(stand_ins, tmp_path):
    stand_ins.setenv("SPOILT", "4")
    checkpoint = run(tmp_path, settings=["micro_batch=2", "conv_blocks=2", "eval_every=2"])
    skipped = [line for line in log(tmp_path) if line["skipped"]]
    assert len(skipped) == 2                                            # one in each of two passes
    for line in skipped:
        assert line["loss"] is None and line["grad_norm"] is None
        assert "train4 from frame 1" in line["clips"] and len(line["clips"]) == 2
    for value in checkpoint["model"].values():                          # batch statistics too
        assert torch.isfinite(value).all()
    assert checkpoint["state"]["bad"] == 0


def test_five_bad_steps_in_a_row_end_the_run_and_the_checkpoint_is_from_before(stand_ins, tmp_path):
    stand_ins.setenv("SPOILT", "0 1 2 3 4 5 6 7 8 9")
    with pytest.raises(SystemExit, match="5 in a row: .*last.pt"):
        run(tmp_path, "--save-minutes", "0", settings=["conv_blocks=2", "epochs=9", "eval_every=9"])
    assert len(log(tmp_path)) == 5
    for value in last(tmp_path)["model"].values():
        assert torch.isfinite(value).all()


def test_an_infinite_gradient_of_a_finite_loss_is_skipped(stand_ins, tmp_path):
    clip = nn.utils.clip_grad_norm_

    def spoil(parameters, limit):
        parameters = [parameter for parameter in parameters if parameter.grad is not None]
        parameters[0].grad[0] = math.inf
        return clip(parameters, limit)

    stand_ins.setattr(train.nn.utils, "clip_grad_norm_", spoil)
    with pytest.raises(SystemExit, match="5 in a row"):
        run(tmp_path, settings=["epochs=9", "eval_every=9"])
    line = log(tmp_path)[0]
    assert line["loss"] > 0 and line["grad_norm"] is None and len(line["clips"]) == 4


# --- arguments


def test_a_folder_with_a_run_is_refused(stand_ins, tmp_path):
    run(tmp_path, settings=["epochs=1"])
    before = (tmp_path / "last.pt").read_bytes()
    with pytest.raises(SystemExit, match="holds a run already.*--resume"):
        run(tmp_path, settings=["epochs=1"])
    assert (tmp_path / "last.pt").read_bytes() == before
    with pytest.raises(SystemExit, match="nothing to resume: .*nowhere/last.pt is missing"):
        train.main(["--resume", str(tmp_path / "nowhere")])


@pytest.mark.parametrize("arguments, message", [
    (["--set", "qeueries=3"], "qeueries.*did you mean num_queries"),
    (["--set", "epochs=many"], "epochs is int"),
    (["--set", "micro_batch=3"], "8 clips do not divide"),
    (["--set", "num_classes=5"], "--set num_classes=3"),
    (["--set", "drop_epochs=a,b"], "drop_epochs"),
    (["--set", "crop_size=0"], "crop_size=0: must be at least 1"),
    (["--set", "batch_size=0"], "batch_size=0"),
    (["--dataset", "ucf"], "--data DIR"),
    (["--dataset", "synthetic", "--data", "x"], "--dataset ucf"),
    (["--split", "2"], "--split 2: the splits of synthetic"),
    (["--dataset", "ucf", "--data", "x", "--split", "0"], "--split 0: the splits of ucf"),
    (["--dataset", "jhmdb", "--data", "x", "--split", "4"], "--split 4: the splits of jhmdb"),
    (["--device", "cuda"], "--device cuda: torch finds no GPU"),
    (["--precision", "tf32"], "precision tf32"),
    (["--init", "missing.pt"], "missing.pt"),
    (["--init-transformer", "missing.pt"], "missing.pt"),
    (["--backbone-weights", "missing.pt"], "missing.pt")])
def test_wrong_arguments_end_with_one_line_and_nothing_is_written(
        stand_ins, tmp_path, arguments, message):
    with pytest.raises(SystemExit, match=message) as ended:
        train.main(["--out", str(tmp_path / "run"), "--set", "num_classes=3", *arguments])
    assert "\n" not in str(ended.value) and not (tmp_path / "run").exists()


@pytest.mark.parametrize("arguments, message", [
    (["--eval-share", "0"], "--eval-share 0.0"), (["--eval-share", "nan"], "--eval-share nan"),
    (["--quick-share", "1"], "--quick-share 1.0"), (["--save-minutes", "-1"], "at least 0"),
    (["--workers", "-1"], "at least 0"), (["--seed", "-1"], "at least 0"),
    (["--precision", "int8"], "int8"), (["--dataset", "mine", "--data", "x"], "custom"),
    (["--data", "x"], "of which data set"), (["--resume"], "--resume runs/NAME"),
    (["--resume", "x", "--init", "y"], "--resume goes on"),
    (["--resume", "x", "--out", "y"], "leave --out y out"),
    (["--init", "x", "--init-transformer", "y"], "--init takes a whole model")])
def test_arguments_that_are_impossible_or_contradict_are_refused(capsys, arguments, message):
    with pytest.raises(SystemExit) as ended:
        train.arguments(arguments)
    lines = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2 and len(lines) == 2 and message in lines[1]


@pytest.mark.parametrize("arguments, message", [
    (["--set", "epochs=1"], "epochs=1: the run has done 2.00 already.*epochs=2 or more"),
    (["--preset", "ucf"], "--preset ucf: this run has synthetic"),
    (["--dataset", "ucf", "--data", "x"], "--dataset ucf: this run has synthetic"),
    (["--seed", "3"], "--seed 3: this run has 0"), (["--fill", "3"], "--fill 3: this run has 0"),
    (["--set", "batch_size=8"], "batch_size=8: this run has 4"),
    (["--set", "offset_rate=0.5"], "offset_rate=0.5: this run has 0.1"),
    (["--set", "weight_decay=0.5"], "weight_decay=0.5: this run has 0.01"),
    (["--set", "num_queries=5"], "weights do not fit.*decoder")])
def test_a_resumed_run_stays_what_it_was(stand_ins, tmp_path, arguments, message):
    run(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(SystemExit, match=message) as ended:
        train.main(["--resume", str(tmp_path), *arguments])
    assert "\n" not in str(ended.value)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("change, message", [
    ({"class_names": ["a", "c", "b"]}, "class 1 of the run is b, that of the data is c; start ano"),
    ({"videos": [f"video{index}" for index in range(9)]}, "has 10 training clips, .* 9")])
def test_a_run_is_not_resumed_on_other_classes_or_clips(
        stand_ins, monkeypatch, tmp_path, change, message):
    def other_clips(*arguments, **options):
        dataset = Clips(*arguments, **options)
        vars(dataset).update(change)
        return dataset

    run(tmp_path)
    monkeypatch.setattr(train, "build_dataset", other_clips)
    with pytest.raises(SystemExit, match=message):
        train.main(["--resume", str(tmp_path)])


def test_a_resumed_run_may_be_told_what_it_has(stand_ins, tmp_path):
    run(tmp_path)
    train.main(["--resume", str(tmp_path), "--out", str(tmp_path), "--dataset", "synthetic",
                "--preset", "synthetic", "--seed", "0", "--split", "1"])


# --- data


def test_data_without_frames_are_refused_before_anything_is_written(handlers, tmp_path):
    tube = np.tile([1, 10, 10, 90, 90], (15, 1)).astype(np.float32)
    tube[:, 0] += np.arange(15)
    videos = ["clap/one", "clap/two"]
    annotation = {
        "labels": [f"class {number}" for number in range(21)],
        "gttubes": {video: {0: [tube]} for video in videos},
        "nframes": {video: 15 for video in videos},
        "resolution": {video: (240, 320) for video in videos},
        "train_videos": [videos[:1]] * 3, "test_videos": [videos[1:]] * 3}
    (tmp_path / "data").mkdir()
    (tmp_path / "data/JHMDB-GT.pkl").write_bytes(pickle.dumps(annotation))
    with pytest.raises(SystemExit, match="frames.*clap/one"):
        train.main(["--out", str(tmp_path / "run"), "--dataset", "jhmdb",
                    "--data", str(tmp_path / "data")])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("error, message", [
    (OSError("cannot read the image 00012.jpg: truncated"), "cannot read the image 00012.jpg"),
    (ValueError("v_Biking_g01_c01 holds two files of frame 12"), "v_Biking_g01_c01 holds two"),
    (OSError(), "OSError")])
@pytest.mark.parametrize("workers", ["0", "1"])
def test_a_clip_that_cannot_be_read_is_one_line(stand_ins, tmp_path, error, message, workers):
    item = train.build_dataset.__getitem__

    def broken(clips, index):
        if clips.augment and index == 7:
            raise error
        return item(clips, index)

    stand_ins.setattr(train.build_dataset, "__getitem__", broken)
    with pytest.raises(SystemExit, match=f"{message}.*--resume") as ended:
        run(tmp_path, "--workers", workers)
    assert "\n" not in str(ended.value)


def test_only_log_lines_are_needed_to_be_json(tmp_path):
    """What is not finite is null in log.jsonl: NaN is no JSON."""
    folder = runs.RunFolder(tmp_path, [])
    folder.open({"state": {"step": 0}}, {}, train.PRESETS["synthetic"])
    folder.log({"loss": math.nan, "norm": math.inf, "step": 1})
    text = (tmp_path / "log.jsonl").read_text()
    assert json.loads(text, parse_constant=pytest.fail) == {"loss": None, "norm": None, "step": 1}
