"""visualize.py: bad input, wrong options, short videos, folders that were left half done."""
import json
import os
import subprocess
import sys
import tracemalloc
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from test_sources import write_video as write_pictures

import evaluate
import visualize
from beside import pictures
from model import PRESETS, VideoActionDetector

CONFIG = replace(PRESETS["synthetic"], num_classes=3, num_queries=4)    # clips of 8 frames
NAMES = ["run", "sit", "wave"]
av = pytest.importorskip("av")


@pytest.fixture
def command(tmp_path, monkeypatch):
    """visualize.main with an untrained checkpoint and some options, without signal handlers."""
    def call(*options, names=NAMES, **changes):
        config = replace(CONFIG, **changes)
        torch.manual_seed(0)
        content = {"model": VideoActionDetector(config).state_dict(), "config": asdict(config),
                   "dataset": "synthetic", "classes": names}
        if not (tmp_path / "c.pt").exists():                            # its time is remembered
            torch.save(content, tmp_path / "c.pt")
        monkeypatch.setattr(visualize, "start",
                            lambda device: (torch.device(device or "cpu"), 0))
        visualize.main(["--ckpt", str(tmp_path / "c.pt"), "--device", "cpu", *map(str, options)])
    return call


def write_video(path, frames, rate=10, size=(60, 80)):
    shades = (np.full((*size, 3), 5 + 10 * i % 240, np.uint8) for i in range(frames))
    visualize.save_video(path, shades, rate)
    return path


# ---- what is no video ----

@pytest.mark.parametrize("source", ["rtsp://camera/1", "http://host/in.mp4", "0", "/dev/video0"])
def test_streams_and_cameras_are_refused_by_name(tmp_path, command, source):
    with pytest.raises(SystemExit, match=f"--video {source}: files and folders only"):
        command("--video", source, "--out", tmp_path / "out")


def test_files_that_are_no_videos_are_one_line_each(tmp_path, command):
    whole = write_video(tmp_path / "in.avi", 60, size=(120, 160)).read_bytes()
    for name, content, message in [("none.mp4", None, "none.mp4"), ("empty.mp4", b"", "empty.mp4"),
                                   ("text.mp4", b"not a video", "text.mp4 cannot be read"),
                                   ("head.avi", whole[:600], "head.avi|the video is empty")]:
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(SystemExit, match=message) as ended:
            command("--video", tmp_path / name, "--out", tmp_path / "out")
        assert "\n" not in str(ended.value)
        assert not (tmp_path / "out").exists()


def test_a_video_that_ends_before_what_it_announces_is_noted_once(tmp_path, command, capsys):
    path = tmp_path / "in.avi"
    noise = np.random.default_rng(0).integers(0, 255, (40, 48, 64, 3)).astype(np.uint8)
    write_pictures(path, noise, "mpeg4")
    path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])
    command("--video", path, "--out", tmp_path / "out")
    note = f"note: {path}: 40 frames announced, "
    assert capsys.readouterr().out.count(note) == 1


def test_a_result_never_takes_the_place_of_its_video(tmp_path, command):
    content = write_video(tmp_path / "in.mp4", 3).read_bytes()
    with pytest.raises(SystemExit, match="in.mp4 would be overwritten by its own result"):
        command("--video", tmp_path / "in.mp4", "--out", tmp_path)
    assert (tmp_path / "in.mp4").read_bytes() == content


def test_a_file_as_the_folder_of_results_is_refused_before_anything_is_computed(tmp_path, command):
    (tmp_path / "out.mp4").write_text("kept")
    with pytest.raises(SystemExit, match="--out .*out.mp4 is a file; name the folder"):
        command("--video", tmp_path / "missing.mp4", "--out", tmp_path / "out.mp4")
    assert (tmp_path / "out.mp4").read_text() == "kept"


# ---- folders of videos ----

def test_a_folder_is_shared_by_processes_and_goes_on_where_it_was_left(
        tmp_path, command, monkeypatch, capsys):
    (tmp_path / "in" / "deep").mkdir(parents=True)
    for name in ("a.mp4", "c.avi", "deep/b.MPG"):
        write_video(tmp_path / "in" / "x.mp4", 3).rename(tmp_path / "in" / name)
    (tmp_path / "in" / "broken.mp4").write_bytes((tmp_path / "in" / "a.mp4").read_bytes()[:300])
    (tmp_path / "in" / "notes.txt").write_text("not looked at")
    options = ["--video", tmp_path / "in", "--out", tmp_path / "in" / "out", "--no-maps"]

    def done():
        return sorted(path.parent.name for path in (tmp_path / "in").rglob("tubes.json"))

    with monkeypatch.context() as patched:                              # one of two processes
        patched.setenv("WORLD_SIZE", "2")
        command(*options)                                               # torchrun would end both
    first = done()
    assert first in (["a", "b"], ["a", "c"], ["b"], ["c"])
    with pytest.raises(SystemExit, match="1 video could not be read:\n.*broken.mp4"):
        command(*options)
    assert done() == ["a", "b", "c"], "results in the folder are no videos to look at"
    assert capsys.readouterr().out.count("is done, by the same options") == len(first)
    (tmp_path / "in" / "broken.mp4").unlink()
    command(*options, "--min-score", 0.01)
    said = capsys.readouterr().out
    assert "is done" not in said, "other options: drawn again"
    record = json.loads((tmp_path / "in" / "out" / "a" / "tubes.json").read_text())
    assert record["options"]["min_score"] == 0.01 and record["actors"]
    command(*options, "--min-score", 0.01)
    assert capsys.readouterr().out.count("is done") == 3


def test_folders_without_videos_and_names_that_clash_are_refused(tmp_path, command):
    (tmp_path / "in" / "deep").mkdir(parents=True)
    with pytest.raises(SystemExit, match="no video .* in .*in"):
        command("--video", tmp_path / "in", "--out", tmp_path / "out")
    for name in ("a.mp4", "deep/a.avi"):
        write_video(tmp_path / "in" / name, 3)
    with pytest.raises(SystemExit, match="several videos are called a"):
        command("--video", tmp_path / "in", "--out", tmp_path / "out")


def test_two_processes_draw_a_folder_and_say_at_the_end_what_could_not_be_read(tmp_path, command):
    (tmp_path / "in").mkdir()
    for name in "ac":
        write_video(tmp_path / "in" / f"{name}.mp4", 3)
    (tmp_path / "in" / "b.mp4").write_bytes(b"no video")
    command("--clip", 0, "--out", tmp_path / "first", "--no-maps", names=None, num_classes=9)
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
         visualize.__file__, "--ckpt", tmp_path / "c.pt", "--device", "cpu", "--no-maps",
         "--video", tmp_path / "in", "--out", tmp_path / "out"],
        capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode != 0 and "1 video could not be read:" in done.stdout + done.stderr
    assert sorted(path.parent.name for path in (tmp_path / "out").rglob("tubes.json")) == ["a", "c"]


def test_a_video_is_done_again_if_it_is_newer_or_was_cut_off(tmp_path, command, capsys,
                                                             monkeypatch):
    (tmp_path / "in").mkdir()
    path = write_video(tmp_path / "in" / "a.mp4", 3)
    options = ("--video", tmp_path / "in", "--out", tmp_path / "out", "--no-maps")
    tubes = tmp_path / "out" / "a" / "tubes.json"
    command(*options)
    command(*options)
    assert "is done, by the same options" in capsys.readouterr().out
    later = tubes.stat().st_mtime + 5
    os.utime(path, (later, later))

    def broken(*arguments):
        raise KeyboardInterrupt
    with monkeypatch.context() as patch:
        patch.setattr(visualize, "save_video", broken)
        with pytest.raises(KeyboardInterrupt):
            command(*options)
    assert not tubes.exists(), "what is half drawn is not done"


def test_a_signal_ends_a_folder_of_videos_and_is_no_broken_video(tmp_path, command, monkeypatch):
    (tmp_path / "in").mkdir()
    for name in "ab":
        write_video(tmp_path / "in" / f"{name}.mp4", 3)
    met = []

    def show(detector, clips, video, *rest):
        met.append(video)
        sys.exit(143)
    monkeypatch.setattr(visualize, "show", show)
    with pytest.raises(SystemExit) as ended:
        command("--video", tmp_path / "in", "--out", tmp_path / "out")
    assert ended.value.code == 143 and met == ["a"]


# ---- short videos, nothing found ----

@pytest.mark.parametrize("length, frames", [(1, 8), (3, 32), (20, 32)])
def test_a_video_shorter_than_the_shortest_tube_has_tubes_all_the_same(
        tmp_path, command, capsys, length, frames):
    path = write_video(tmp_path / "in.mp4", length)
    command("--video", path, "--out", tmp_path / "out", "--min-score", 0, "--no-maps",
            frames=frames)
    record = json.loads((tmp_path / "out" / "tubes.json").read_text())
    assert len(record["actors"]) and "tube" in capsys.readouterr().out
    with av.open(str(tmp_path / "out" / "in.mp4")) as container:
        assert len(list(container.decode(video=0))) == length


def test_where_nothing_is_found_the_message_says_why(tmp_path, command, capsys):
    path = write_video(tmp_path / "in.mp4", 3)
    command("--video", path, "--out", tmp_path / "out", "--min-score", 0.9)
    assert "no tube: the best box scores 0." in capsys.readouterr().out
    frames = {"best": 0.5, "shortest": 15}
    assert visualize.outcome([], frames, 0.3).endswith("follow each other over 15 frames")
    tubes = [{"tubes": [1]}]
    assert visualize.outcome(tubes, frames, 0.3) == "1 actor, 1 tube"
    assert visualize.outcome(2 * tubes, frames, 0.3) == "2 actors, 2 tubes"


# ---- options ----

@pytest.mark.parametrize("options, message", [
    ("--clip -1", "--clip: -1: must be at least 0"), ("--clip 320", "clips 0 to 319"),
    ("--clip 1 --video in.mp4", "--video: not allowed with argument --clip"),
    ("--min-score 2", "--min-score: 2 is not in"), ("--min-score x", "'x' is not a number"),
    ("--top 0", "--top: 0: must be"), ("--width 10", "--width: 10: must be at least 320"),
    ("--rate 0", "--rate 0.0 is not"), ("--look-from 0.5 2", "--look-from: 2 is not in"),
    ("--classes fly", "unknown class fly"), ("--video-name nobody", "no video 'nobody'"),
    ("--heads content", "no quirk split_heads"), ("--layer 3", "--layer 3: "),
    ("--layer 0", "--layer: 0: must be at least 1"),
    ("--video-name nobody --set sampling_rate=2", "--video-name with sampling_rate 2")])
def test_options_that_cannot_be_are_refused_by_name(command, options, message, capsys):
    with pytest.raises(SystemExit) as ended:
        command(*options.split(), names=None, num_classes=9)
    assert message in str(ended.value) + capsys.readouterr().err


def test_an_encoder_without_sampling_points_is_named_before_anything_is_drawn(tmp_path, command):
    with pytest.raises(SystemExit, match="--look-from: the ordinary transformer encoder of .*c.pt"):
        command("--clip", 0, "--out", tmp_path / "out", "--look-from", 0.5, 0.5, names=None,
                num_classes=9, encoder="transformer")
    assert not (tmp_path / "out").exists()


def test_a_missing_device_and_a_run_s_folder_are_understood(tmp_path, command, capsys, monkeypatch):
    command("--clip", 0, "--out", tmp_path / "out", names=None, num_classes=9)
    (tmp_path / "c.pt").rename(tmp_path / "best.pt")
    options = ["--ckpt", str(tmp_path), "--clip", "0", "--out", str(tmp_path / "out")]
    visualize.main(options)
    assert f"{tmp_path / 'best.pt'} is a checkpoint" in capsys.readouterr().out
    monkeypatch.undo()
    monkeypatch.setattr(evaluate.signal, "signal", lambda *arguments: None)
    if not torch.cuda.is_available():
        with pytest.raises(SystemExit, match="--device cuda:0: torch finds 0 GPUs"):
            visualize.main([*options, "--device", "cuda"])


def test_without_a_checkpoint_the_small_one_of_the_repository_is_taken_and_named(
        tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(evaluate, "WEIGHTS", tmp_path / "weights")
    monkeypatch.setattr(visualize, "start", lambda device: (torch.device("cpu"), 0))
    with pytest.raises(SystemExit, match="name a checkpoint: --ckpt"):
        visualize.main([])
    (tmp_path / "weights").mkdir()
    config = PRESETS["synthetic"]
    weights = {name: value.half() if value.is_floating_point() else value
               for name, value in VideoActionDetector(config).state_dict().items()}
    path = tmp_path / "weights" / "synthetic.pt"
    torch.save({"model": weights, "config": asdict(config), "dataset": "synthetic",
                "classes": None}, path)
    visualize.main(["--clip", "3", "--out", str(tmp_path / "out")])
    assert f"no --ckpt: taking {path}" in capsys.readouterr().out
    assert (tmp_path / "out" / "synthetic-clip-3.png").exists()
    monkeypatch.setattr(visualize, "FIGURE_CLIPS", 5)
    visualize.main(["--figure", str(tmp_path / "figure.png")])
    assert (tmp_path / "figure.png").stat().st_size < 300_000
    write_video(tmp_path / "in.mp4", 3)
    visualize.main(["--video", str(tmp_path / "in.mp4"), "--out", str(tmp_path / "own")])
    assert "and no real video" in capsys.readouterr().out


def test_names_that_the_font_cannot_draw_are_drawn_as_far_as_it_can_and_named_once(
        tmp_path, command, capsys):
    names = ("\u8d70\u308b", "\u03c4\u03c1\u03ad\u03c7\u03c9", "run \U0001f3c3")
    assert pictures.drawable(names) == ["class 1", "\u03c4\u03c1\u03ad\u03c7\u03c9", "run"]
    assert capsys.readouterr().out.count("\n") == 1
    known = ["\u0431\u0435\u0433", "\u00e9lan"]
    assert pictures.drawable(tuple(known)) == known
    assert capsys.readouterr().out == ""
    pictures.drawable.cache_clear()
    path = write_video(tmp_path / "in.mp4", 8)
    options = ["--video", path, "--out", tmp_path / "out", "--min-score", 0.01]
    command(*options, names=list(names))
    command(*options, names=list(names))
    assert capsys.readouterr().out.count("the font lacks letters") == 1
    record = json.loads((tmp_path / "out" / "tubes.json").read_text())
    assert record["classes"] == list(names), "as they are"


# ---- memory ----

def test_tubes_are_written_without_all_boxes_in_memory(tmp_path):
    def peak(count):
        frames = np.arange(1, 601)
        tubes = [{"label": 0, "score": 0.5, "frames": frames,
                  "boxes": np.zeros((600, 4), np.float32)}]
        actors = [{"colour": (0, 0, 0), "tubes": tubes} for _ in range(count)]
        known = {"number": frames.tolist(), "seconds": frames.tolist(), "size": [60, 80]}
        tracemalloc.start()
        visualize.write_tubes(tmp_path, {"video": "v"}, actors, known, NAMES)
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return most
    one = peak(1)
    assert peak(12) < 1.1 * one
    assert len(json.loads((tmp_path / "tubes.json").read_text())["actors"]) == 12
