"""evaluate.py on wrong input, signals and outputs that are not finite: one line that names it."""

import signal

import numpy as np
import pytest
import test_evaluate
import torch
from test_evaluate import CONFIG, Truthful, Videos, command

import evaluate

checkpoint = test_evaluate.checkpoint                       # fixtures
precision_flags, signal_handlers = test_evaluate.precision_flags, test_evaluate.signal_handlers


def test_a_data_set_must_say_whose_its_clips_are_when_videos_have_several():
    dataset = type("Bare", (), {"name": "bare", "videos": ["a", "b"], "__len__": lambda self: 2})()
    assert evaluate.clip_videos(dataset).tolist() == [0, 1]
    dataset.videos = ["a"]
    with pytest.raises(ValueError, match="bare: 2 clips of 1 videos; set clip_videos"):
        evaluate.clip_videos(dataset)


def test_outputs_that_are_not_finite_are_an_error_that_names_the_videos():
    dataset = Videos()
    model = Truthful(dataset.targets, noise=float("nan"))
    with pytest.raises(ValueError, match="class/v0, class/v1 are not finite"):
        evaluate.detect(model, dataset, CONFIG, "cpu", progress=False)


def test_a_data_set_built_with_another_config_is_an_error():
    dataset = Videos()
    half = [{name: target[name][:, :3] for name in ("boxes", "labels")}
            for target in dataset.targets]
    message = r"gives \(2, 3\) clips and frames, the targets have \(2, 6\)"
    with pytest.raises(ValueError, match=message):
        evaluate.detect(Truthful(half), dataset, CONFIG, "cpu", progress=False)


def test_files_that_hold_no_detections_are_errors(tmp_path):
    np.savez(tmp_path / "other.npz", box=np.zeros((1, 4)))
    with pytest.raises(ValueError, match="other.npz holds no class_prob, classes"):
        evaluate.read_detections(tmp_path / "other.npz")
    with pytest.raises(ValueError, match="detections missing: .*nowhere.npz"):
        evaluate.read_detections(tmp_path / "nowhere.npz")
    whole = (tmp_path / "other.npz").read_bytes()
    np.save(tmp_path / "array.npy", np.zeros(3))
    for content in (b"", whole[:100], b"text", (tmp_path / "array.npy").read_bytes()):
        (tmp_path / "cut.npz").write_bytes(content)
        with pytest.raises(ValueError, match="cut.npz is broken off, or no detections.npz"):
            evaluate.read_detections(tmp_path / "cut.npz")


def test_precisions_that_there_are_not():
    with pytest.raises(ValueError, match="precision 'half'; there are: float32, tf32, bf16, fp16"):
        evaluate.set_precision("half", torch.device("cpu"))
    with pytest.raises(ValueError, match="precision tf32: only GPUs compute in it, not cpu"):
        evaluate.set_precision("tf32", torch.device("cpu"))


@pytest.mark.parametrize("options, message", [
    (["--ckpt", "nowhere/best.pt"], "no such checkpoint: nowhere/best.pt; train.py writes best.pt"),
    (["--ckpt", __file__], "test_evaluate_robust.py cannot be (loaded|read)"),
    (["--ckpt", "{checkpoint}", "--dataset", "ucf"], "'ucf' of .*best.pt .* name it with --data"),
    (["--ckpt", "{checkpoint}", "--dataset", "ucf", "--data", "x"], "--data x: no such"),
    (["--ckpt", "{checkpoint}", "--data", "x"], "--data x: the synthetic set has no folder"),
    (["--ckpt", "{checkpoint}", "--split", "2"], "--split 2: synthetic has one split"),
    (["--ckpt", "{checkpoint}", "--set", "gat=0.1"], "--set gat=0.1: .*gate"),
    (["--ckpt", "{checkpoint}", "--set", "dim=128"], "best.pt .*size mismatch"),
    (["--ckpt", "{checkpoint}", "--precision", "tf32"], "precision tf32: only GPUs compute in it"),
    (["--detections", "no.npz"], "detections missing: no.npz; evaluate.py --ckpt writes them")])
def test_wrong_input_is_one_line_that_names_it_and_the_way_out(options, message, checkpoint):
    options = [option.format(checkpoint=checkpoint) for option in options]
    with pytest.raises(SystemExit, match=".*" + message) as error:
        evaluate.main([*options, "--device", "cpu"])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("options, message", [
    (["--split", "0"], "argument --split: 0: must be at least 1"),
    (["--split", "val"], "argument --split: 'val' is not a whole number"),
    (["--batch-size", "0"], "argument --batch-size: 0: must be at least 1"),
    (["--workers", "-1"], "argument --workers: -1: must be at least 0"),
    (["--eval-share", "0"], r"--eval-share 0.0 is not in \(0, 1\]"),
    (["--dataset", "kinetics"], "invalid choice: 'kinetics' .*synthetic.*ucf"),
    (["--efficiency", "huge"], "invalid choice: 'huge' .*jhmdb"),
    (["--ckpt", "a", "b"], "2 files and 1 --split: give one file, or one for each split"),
    (["--ckpt", "a", "b", "--split", "1", "2", "3"], "2 files and 3 --split"),
    (["--split", "2", "2"], "--split 2 2: each split once"),
    (["--detections", "a.npz", "--oracle", "boxes"], "leave --ckpt and --oracle out")])
def test_wrong_options_are_refused_before_anything_is_read(options, message, capsys):
    with pytest.raises(SystemExit):
        evaluate.arguments(options)
    error = capsys.readouterr().err
    assert error.splitlines()[0] == "usage: python evaluate.py [--ckpt FILE] [options]"
    with pytest.raises(AssertionError, match=message):      # pytest's search, in the text
        raise AssertionError(error)


def test_devices_that_there_are_not(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(SystemExit, match="--device gpu: no device is called so; cpu, cuda"):
        evaluate.start("gpu")
    with pytest.raises(SystemExit, match="--device cuda:1: torch finds 1 GPUs here; .*device cpu"):
        evaluate.start("cuda:1")
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(SystemExit, match="--device cuda:2: torch finds 1 GPUs here"):
        evaluate.start("cuda")


def test_without_a_checkpoint_and_without_the_repository_s_own_it_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(evaluate, "WEIGHTS", tmp_path)
    with pytest.raises(SystemExit, match="name a checkpoint: --ckpt runs/NAME; train.py writes"):
        evaluate.find_checkpoint()


def test_a_checkpoint_that_tells_its_config_alone_wants_a_data_set(checkpoint, tmp_path):
    content, path = torch.load(checkpoint), tmp_path / "alone.pt"
    torch.save({name: content[name] for name in ("model", "config")}, path)
    with pytest.raises(SystemExit, match="alone.pt does not say which data set .*--dataset"):
        evaluate.main(["--ckpt", str(path), "--device", "cpu"])


def test_a_missing_checkpoint_names_those_that_are_there(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="there is none in runs/"):
        evaluate.find_checkpoint("best.pt")
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    (tmp_path / "runs" / "mine" / "last.pt").touch()
    message = "no such checkpoint: runs/mine/best.pt; .*there are runs/mine/last.pt"
    with pytest.raises(SystemExit, match=message):
        evaluate.find_checkpoint("runs/mine")
    with pytest.raises(SystemExit, match="there are runs/mine/last.pt"):
        evaluate.find_checkpoint("elsewhere.pt")


def test_a_data_set_of_other_classes_is_refused(checkpoint, monkeypatch):
    monkeypatch.setattr(evaluate, "build_dataset", lambda *args, **options: Videos())
    message = r"other classes, 9 \(.*\), than .*'synthetic' has, 3 \(run, sit, wave, ...\)"
    with pytest.raises(SystemExit, match=message):
        evaluate.main(["--ckpt", str(checkpoint), "--device", "cpu"])


@pytest.mark.parametrize("workers", ["0", "1"])
def test_a_clip_that_cannot_be_read_is_one_line(workers, checkpoint, monkeypatch, tmp_path):
    class Broken(evaluate.build_dataset("synthetic", None, "val", CONFIG).__class__):
        def __getitem__(self, index):
            raise OSError("cannot read the image 00001.jpg: broken; extract it again")

    def build_dataset(name, root, side, config, *options):
        return Broken(config, side)

    monkeypatch.setattr(evaluate, "build_dataset", build_dataset)
    with pytest.raises(SystemExit) as error:
        evaluate.main(["--ckpt", str(checkpoint), "--device", "cpu", "--workers", workers,
                       "--out", str(tmp_path)])
    assert "\n" not in str(error.value)
    assert str(error.value).endswith("cannot read the image 00001.jpg: broken; extract it again")


def test_terminated_it_exits_with_128_and_the_signal(checkpoint):
    never = checkpoint.parent / "never"
    process = command("--ckpt", checkpoint, "--device", "cpu", "--batch-size", 1, "--out", never)
    while process.stderr.read(1) != "d":                    # detecting: the progress bar is there
        assert process.poll() is None, process.stderr.read()
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=120) == 128 + signal.SIGTERM and not never.exists()
    process.communicate()
