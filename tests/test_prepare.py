"""tools/prepare.py: videos become the frames that training reads; each fault of a data set is a line of `check`."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import data
from tests.test_data import grey_frames, numbers_shown, own, ucf, write_csv, write_video    # noqa: F401
from tools import prepare


def run(*words):
    return prepare.main([str(word) for word in (*words, "--workers", 1)])


def check(name, root, *words):
    return run("check", "--dataset", name, "--data", root, "--sheet", root / "out/sheet.png", "--clips", 4, *words)


@pytest.fixture
def mine(own):
    """The data set of test_data.py with its frames as a file of each video."""
    (own / "frames").rename(own / "hidden")
    (own / "videos").mkdir()
    write_video(own / "videos/a.mp4", 20, "mpeg4", g=5)
    write_video(own / "videos/b.avi", 9, "mpeg4", g=5)
    return own


@pytest.fixture
def both(ucf):
    """The small UCF101-24 of test_data.py with the frames of its training video too."""
    grey_frames(ucf / "rgb-images/Biking/v_b", "{:05d}.jpg", 9)
    return ucf


def test_extract_writes_the_frames_in_the_layout_that_is_read(mine, capsys):
    assert run("extract", "--dataset", "custom", "--data", mine) == 0
    assert "2 videos, 29 frames written" in capsys.readouterr().out
    assert sorted(os.listdir(mine / "frames/b")) == [f"{i:05d}.jpg" for i in range(1, 10)]
    media = data.find_media(mine, ["a", "b"])
    assert media.pattern == "{:05d}.jpg" and numbers_shown(media.read("a", np.arange(20))) == list(range(20))
    assert check("custom", mine) == 0


@pytest.mark.parametrize("name, path", [("ucf", "rgb-images/videos/a/00020.jpg"),
                                        ("jhmdb", "Frames/videos/a/00020.png"), ("ava", "frames/a/a_000023.jpg")])
def test_extract_knows_the_layout_of_each_data_set(mine, name, path):
    assert run("extract", "--dataset", name, "--data", mine) == 0
    assert (mine / path).exists() and len(os.listdir((mine / path).parent)) == int(Path(path).stem[-5:])


def test_extract_goes_on_where_it_was_ended(mine, capsys):
    (mine / "frames/a").mkdir(parents=True)                                        # done before
    (mine / "frames/b.part").mkdir()                                               # was being written
    (mine / "frames/b.part/00099.jpg").write_text("half")
    assert run("extract", "--dataset", "custom", "--data", mine) == 0
    assert "1 videos, 9 frames written" in capsys.readouterr().out
    assert sorted(os.listdir(mine / "frames")) == ["a", "b"] and len(os.listdir(mine / "frames/b")) == 9
    assert os.listdir(mine / "frames/a") == []


def test_extract_names_a_video_that_cannot_be_read_and_does_the_others(mine, capsys):
    (mine / "videos/a.mp4").write_bytes((mine / "videos/a.mp4").read_bytes()[:500])
    assert run("extract", "--dataset", "custom", "--data", mine) == 1
    out = capsys.readouterr().out
    assert "a.mp4" in out and "1 cannot be read" in out and os.listdir(mine / "frames") == ["b"]


def test_extract_without_videos_is_an_error(tmp_path):
    with pytest.raises(SystemExit, match="no videos .* below"):
        run("extract", "--dataset", "custom", "--data", tmp_path)


def test_a_sound_data_set_may_be_trained_on(both, capsys):
    assert check("ucf", both) == 0
    out = capsys.readouterr().out
    assert "1 videos, 2 tubes, 12 boxes, 20 frames, 1 clips; published: 910 videos, 1315 tubes" in out
    assert "0 faults: ucf in" in out and "may be trained on" in out
    sheet = np.asarray(Image.open(both / "out/sheet.png"))
    yellow = (sheet[..., 0] > 200) & (sheet[..., 2] < 60)
    assert yellow.any() and sheet.shape == (4 * 224, 6 * 298, 3)


def test_the_sheet_draws_boxes_where_they_are(both):
    check("ucf", both)
    sheet = np.asarray(Image.open(both / "out/sheet.png")).astype(int)
    panel = sheet[-224:, 2 * 298:3 * 298]                                          # the test clip, slot 12: frame 7
    yellow = (panel[..., 0] > 200) & (panel[..., 1] > 180) & (panel[..., 2] < 60)
    columns, rows = np.flatnonzero(yellow.sum(axis=0) > 40), np.flatnonzero(yellow.sum(axis=1) > 60)
    found = [columns[0], rows[0], columns[-1], rows[-1]]
    assert np.abs(np.array(found) - np.array([200, 100, 300, 160]) * 224 / 240).max() < 3


FAULTS = {
    "a frame is missing in the middle": (lambda v: (v / "00007.jpg").unlink(),
                                         r"frames missing: .*v_a/00007.jpg, 1 in all \(20 expected, 19 found\)"),
    "frames are missing at the end": (lambda v: [(v / f"000{i}.jpg").unlink() for i in (19, 20)],
                                      "v_a/00019.jpg, 2 in all"),
    "a frame too many": (lambda v: Image.new("RGB", (8, 8)).save(v / "00021.jpg"), "v_a: its last frame is 21, .* 20"),
    "a truncated frame": (lambda v: (v / "00004.jpg").write_bytes((v / "00004.jpg").read_bytes()[:200]),
                          "cannot read the image .*v_a/00004.jpg"),
    "a frame that is no image": (lambda v: (v / "00020.jpg").write_text("x"), "cannot read the image .*v_a/00020.jpg"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_check_names_what_is_wrong_with_the_frames(both, fault, capsys):
    import re
    damage, message = FAULTS[fault]
    damage(both / "rgb-images/Biking/v_a")
    assert check("ucf", both) == 1
    out = capsys.readouterr().out
    assert len(re.findall(message, out)) == 1 and "1 faults: ucf in" in out and "may NOT be trained on" in out
    assert not (both / "out/sheet.png").exists()


def test_check_lists_every_fault_of_an_annotation(own, capsys):
    rows = [("a", 1, .1, .1, .2, .2, 1), ("a", 1, .1, .1, .2, .2, 1, 7, 0, 0, 0), ("a", 1, .1, .1, .2, .2, 5, 1),
            ("a", 1, .3, .1, .2, .2, 1, 2), ("a", 1, "nan", .1, .2, .2, 1, 3), ("a", 99, .1, .1, .2, .2, 1, 1)]
    write_csv(own / "annotations.csv", [("b", 1, 0, 0, 1, 1, 1, 1), *rows])
    assert check("custom", own) == 1
    out = capsys.readouterr().out
    for part in ("row 2: 7 columns", "row 3: 11 columns", "class 5, has a class id", "has x2 <= x1", "not a number",
                 "not in the video"):
        assert out.count(part) == 1, part
    assert "6 faults: custom" in out


@pytest.mark.parametrize("content", ["", "b,7\n"])
def test_check_names_an_empty_annotation(own, content, capsys):
    (own / "annotations.csv").write_text(content)
    assert check("custom", own) == 1
    assert "the annotation has no boxes" in capsys.readouterr().out


def test_check_names_a_wrong_folder(tmp_path, capsys):
    assert check("jhmdb", tmp_path) == 1
    out = capsys.readouterr().out
    assert out.count("JHMDB-GT.pkl missing in") == 1 and "1 faults" in out


def test_check_reads_videos_where_there_are_no_frames(mine, capsys):
    assert check("custom", mine, "--key-frames") == 0
    assert "2 video files" not in capsys.readouterr().out                          # one in each split
    (mine / "videos/a.mp4").write_bytes((mine / "videos/a.mp4").read_bytes()[:500])
    data.frame_stamps.cache_clear()
    assert check("custom", mine) == 1
    assert "cannot read the video" in capsys.readouterr().out


def test_the_exit_status_is_that_of_the_process(tmp_path):
    words = [sys.executable, "-m", "tools.prepare", "check", "--dataset", "ucf", "--data", str(tmp_path)]
    result = subprocess.run(words, cwd=Path(data.__file__).parent, capture_output=True, text=True)
    assert result.returncode == 1 and "finalAnnots.mat or UCF101v2-GT.pkl missing" in result.stdout
