"""tools/prepare.py: videos become the frames that training reads; check counts, fills and draws."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from beside import sources
from tests.small_sets import (grey_frames, numbers_shown, small_ava, small_own, small_ucf,
                              write_csv, write_video)
from tools import prepare


def run(*words):
    return prepare.main([str(word) for word in (*words, "--workers", 1)])


def check(name, root, *words):
    sheet = root / "out/sheet.png"
    return run("check", "--dataset", name, "--data", root, "--sheet", sheet, "--clips", 4, *words)


def as_videos(root):
    """The small data set of your own with a file of each video in place of its frames."""
    small_own(root)
    (root / "frames").rename(root / "hidden")
    (root / "videos").mkdir()
    write_video(root / "videos/a.mp4", 20, "libx264", g=5, bf=2, qp=1)
    write_video(root / "videos/b.avi", 9, "mpeg4", g=5, bf=2)
    return root


# ---- extract ----

def test_extract_writes_the_frames_in_the_layout_that_is_read(tmp_path, capsys):
    as_videos(tmp_path)
    assert run("extract", "--dataset", "custom", "--data", tmp_path) == 0
    assert "2 videos, 29 frames written" in capsys.readouterr().out
    assert sorted(os.listdir(tmp_path / "frames/b")) == [f"{i:05d}.jpg" for i in range(1, 10)]
    source = sources.find_source(tmp_path, ["a", "b"])
    for video, count in (("a", 20), ("b", 9)):
        assert video in source.folders and source.count(video) == count
        assert numbers_shown(source.read(video, np.arange(count))) == list(range(count))
    assert check("custom", tmp_path) == 0


@pytest.mark.parametrize("name, path", [
    ("ucf", "rgb-images/videos/a/00020.jpg"), ("jhmdb", "Frames/videos/a/00020.png"),
    ("ava", "frames/a/a_000023.jpg")])
def test_extract_knows_the_layout_of_each_data_set(tmp_path, name, path):
    as_videos(tmp_path)
    assert run("extract", "--dataset", name, "--data", tmp_path) == 0
    folder = (tmp_path / path).parent
    assert (tmp_path / path).exists() and len(os.listdir(folder)) == int(Path(path).stem[-5:])


def test_avas_frames_are_thirty_a_second_the_nearest_each(tmp_path):
    write_video(tmp_path / "film.mp4", 40, "libx264", rate=20, qp=1)
    assert run("extract", "--dataset", "ava", "--data", tmp_path) == 0
    source = sources.find_source(tmp_path, ["film"])
    index = np.arange(source.count("film"))
    shown = np.array(numbers_shown(source.read("film", index)))
    assert len(index) == int(39 / 20 * 30) + 1
    assert np.abs(shown - index / 30 * 20).max() <= 0.5


def test_extract_goes_on_where_it_was_ended(tmp_path, capsys):
    as_videos(tmp_path)
    (tmp_path / "frames/a").mkdir(parents=True)            # done before
    (tmp_path / "frames/b.part").mkdir()                   # was being written
    (tmp_path / "frames/b.part/00099.jpg").write_text("half")
    assert run("extract", "--dataset", "custom", "--data", tmp_path) == 0
    assert "1 video, 9 frames written" in capsys.readouterr().out
    assert sorted(os.listdir(tmp_path / "frames")) == ["a", "b"]
    assert len(os.listdir(tmp_path / "frames/b")) == 9 and not os.listdir(tmp_path / "frames/a")


def test_several_processes_share_the_videos_and_the_exit_status_tells_of_faults(tmp_path):
    as_videos(tmp_path)
    (tmp_path / "videos/c.mp4").write_bytes(b"no video")
    words = ["-m", "tools.prepare", "extract", "--dataset", "custom", "--data", str(tmp_path)]
    result = subprocess.run([sys.executable, *words, "--workers", "2"], capture_output=True,
                            text=True, cwd=Path(prepare.__file__).parents[1])
    assert result.returncode == 1
    assert "c.mp4 cannot be read" in result.stdout and "2 videos, 29 frames" in result.stdout


# ---- check ----

def test_a_sound_data_set_may_be_trained_on(tmp_path, capsys):
    assert check("ucf", small_ucf(tmp_path)) == 0
    out = capsys.readouterr().out
    assert "1 video, 2 tubes, 12 boxes, 20 frames, 1 clip; published: 910 videos, 1315 tubes" in out
    assert f"0 faults: ucf in {tmp_path} may be trained on" in out


def test_check_counts_classes_on_both_sides(tmp_path, capsys):
    small_own(tmp_path)
    assert check("custom", tmp_path) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "2 classes (num_classes=2):" in lines
    assert ["wave", "6", "1", "1", "1"] in [line.split() for line in lines]
    assert ["jump", "high", "4", "2", "0", "0"] in [line.split() for line in lines]
    assert "classes in training only: 1 of 2: jump high" in lines


def every_fifth(root):
    """Boxes of two persons at every fifth frame of both videos."""
    small_own(root)
    grey_frames(root / "frames/b", "{:05d}.jpg", 20)
    rows = []
    for video in "ab":
        for frame in (1, 6, 11, 16):
            for person in (1, 2):
                box = .1, .1, .5 + frame / 100, .5
                rows.append((video, frame, *box, person, person))
    write_csv(root / "annotations.csv", rows)
    return root


def test_boxes_at_every_fifth_frame_are_no_tubes_until_they_are_filled(tmp_path, capsys):
    every_fifth(tmp_path)
    assert check("custom", tmp_path) == 1
    out = capsys.readouterr().out
    assert "8 boxes, each 5 frames from the next: key frames?" in out
    assert "check: --key-frames), or --fill 5" in out
    assert check("custom", tmp_path, "--fill", 5) == 0
    assert "1 video, 2 tubes, 32 boxes, 20 frames" in capsys.readouterr().out
    assert check("custom", tmp_path, "--key-frames") == 0


def test_videos_without_frames_are_left_out_where_that_is_asked_for(tmp_path, capsys):
    small_own(tmp_path)
    with (tmp_path / "annotations.csv").open("a") as file:
        file.write("gone,3,0.1,0.1,0.5,0.5,1,1\n")
    assert check("custom", tmp_path) == 1
    assert "video without frames and without a file, once" in capsys.readouterr().out
    assert check("custom", tmp_path, "--missing", "leave-out") == 0
    out = capsys.readouterr().out
    assert "left out: 1 (gone)" in out and "1 video, 4 tubes, 7 boxes" in out


def test_one_split_may_be_checked(tmp_path, capsys):
    assert run("check", "--dataset", "jhmdb", "--data", tmp_path, "--split", 2) == 1
    out = capsys.readouterr().out
    assert out.count("JHMDB-GT.pkl missing in") == 1 and "1 fault: jhmdb" in out


# ---- the sheet ----

def yellow(picture):
    return (picture[..., 0] > 200) & (picture[..., 1] > 180) & (picture[..., 2] < 60)


def test_the_sheet_draws_boxes_where_they_are_on_every_picture(tmp_path):
    check("ucf", small_ucf(tmp_path))                      # 2 clips of 6 pictures, 319 x 240 each
    sheet = np.asarray(Image.open(tmp_path / "out/sheet.png")).astype(int)
    assert sheet.shape == (2 * 260, 6 * 319, 3)
    pictures = sheet.reshape(2, 260, 6, 319, 3).swapaxes(1, 2)             # (2, 6, 260, ...)
    pictures = pictures[:, :, :240]
    assert yellow(pictures).any(axis=(2, 3)).all()
    corner = yellow(pictures[1, :, :20, :20]).any(axis=(1, 2))
    assert corner.tolist() == [False, True] + [False] * 4  # a second box in frame 5 of 3 to 12
    tube = yellow(pictures[1, 5])                          # frame 12
    columns, rows = (np.flatnonzero(tube.sum(axis=axis) > 40) for axis in (0, 1))
    found = np.array([columns[0], rows[0], columns[-1], rows[-1]])
    assert np.abs(found - [200, 100, 300, 160]).max() < 4


def test_the_sheet_shows_key_frames_side_by_side(tmp_path):
    small_ava(tmp_path)
    for name in ("v2.2", "excluded_timestamps_v2.2"):
        text = (tmp_path / f"annotations/ava_val_{name}.csv").read_text()
        (tmp_path / f"annotations/ava_train_{name}.csv").write_text(text)
    assert check("ava", tmp_path, "--clips", 2) == 0
    sheet = np.asarray(Image.open(tmp_path / "out/sheet.png")).astype(int)
    assert sheet.shape[:2] == (260, 6 * 320)               # 2 key frames of each side
    pictures = sheet.reshape(260, 6, 320, 3).swapaxes(0, 1)
    assert yellow(pictures).any(axis=(1, 2)).tolist() == [True] * 4 + [False] * 2


# ---- the documentation ----

def test_the_example_of_the_documentation_may_be_trained_on(tmp_path):
    text = (Path(prepare.__file__).parents[1] / "docs/own_data.md").read_text()
    for name, kind in (("annotations.csv", "csv"), ("classes.txt", "classes"), ("val.txt", "val")):
        content = text.split(f"```{kind}\n")[1].split("```")[0]
        (tmp_path / name).write_text(content)
    for video in ("kitchen", "garden"):
        grey_frames(tmp_path / "frames" / video, "{:05d}.jpg", 40)
    assert check("custom", tmp_path) == 0
    assert check("custom", tmp_path, "--key-frames") == 0
