"""tools/prepare.py on what is wrong: each kind of fault once, with its count, places and cause."""

import re
import shutil

import numpy as np
import pytest
from PIL import Image
from test_sources import write_video as write_pictures

from beside import sources
from tests.small_sets import grey_frames, small_ava, small_own, small_ucf, write_csv
from tests.test_prepare import as_videos, check, run
from tools import prepare


# ---- extract ----

def test_a_video_that_cannot_be_read_is_named_and_the_others_are_done(tmp_path, capsys):
    as_videos(tmp_path)
    path = tmp_path / "videos/a.mp4"
    path.write_bytes(path.read_bytes()[:500])
    assert run("extract", "--dataset", "custom", "--data", tmp_path) == 1
    out = capsys.readouterr().out
    assert "a.mp4" in out and "1 video, 9 frames" in out and "1 cannot be read" in out
    assert [folder.name for folder in (tmp_path / "frames").iterdir()] == ["b"]


def test_interrupted_it_ends_in_one_line(tmp_path, capsys, monkeypatch):
    def interrupted(args):
        raise KeyboardInterrupt
    monkeypatch.setattr(prepare, "extract", interrupted)
    monkeypatch.setattr(prepare, "check", interrupted)
    assert prepare.main(["extract", "--dataset", "custom", "--data", str(tmp_path)]) == 130
    assert capsys.readouterr().err == "ended; started again it goes on with the next video\n"
    assert prepare.main(["check", "--dataset", "custom", "--data", str(tmp_path)]) == 130
    assert capsys.readouterr().err == "ended\n"


def test_extract_without_videos_is_an_error(tmp_path):
    with pytest.raises(SystemExit, match="no videos .* below"):
        run("extract", "--dataset", "custom", "--data", tmp_path)
    with pytest.raises(SystemExit, match="no such folder"):
        run("extract", "--dataset", "custom", "--data", tmp_path / "nowhere")


def test_two_videos_of_one_name_are_an_error(tmp_path):
    as_videos(tmp_path)
    (tmp_path / "more").mkdir()
    shutil.copy(tmp_path / "videos/a.mp4", tmp_path / "more/a.mp4")
    with pytest.raises(SystemExit, match="would both go to .*frames/a; rename one"):
        run("extract", "--dataset", "custom", "--data", tmp_path)


@pytest.mark.parametrize("words", [("--workers", 0), ("--every", 0), ("--clips", 0),
                                   ("--fill", -1), ("--missing", "some")])
def test_impossible_values_are_refused(tmp_path, words, capsys):
    with pytest.raises(SystemExit) as error:
        check("custom", tmp_path, *words)
    assert error.value.code == 2 and words[0] in capsys.readouterr().err


@pytest.mark.parametrize("name, split, message", [
    ("jhmdb", 0, "JHMDB-GT.pkl missing"), ("ucf", 0, "ucf has the splits 1 to 1, not 0"),
    ("custom", 2, "custom has one split, 1, not 2")])
def test_splits_that_do_not_exist_are_named(tmp_path, name, split, message, capsys):
    if name == "ucf":
        small_ucf(tmp_path)
    assert check(name, tmp_path, "--split", split) == 1
    assert message in capsys.readouterr().out


# ---- check: frames ----

def truncate(path):
    path.write_bytes(path.read_bytes()[:200])


FAULTS = {
    "a frame is missing in the middle": (
        lambda folder: (folder / "00007.jpg").unlink(),
        r"frames missing, once.*\n.*v_a/00007.jpg, 1 in all \(20 expected, 19 found\)"),
    "frames are missing at the end": (
        lambda folder: [(folder / f"000{i}.jpg").unlink() for i in (19, 20)],
        r"v_a/00019.jpg, 2 in all \(20 expected, 18 found\)"),
    "a frame too many": (
        lambda folder: Image.new("RGB", (8, 8)).save(folder / "00021.jpg"),
        "disagree, once\n.*v_a: its last frame is 21, that of the annotation 20"),
    "frames of two kinds": (
        lambda folder: [(folder / f"000{i}.jpg").rename(folder / f"000{i}.JPEG") for i in (18, 19)],
        "frames of several kinds in one folder, once; likely cause: frames of several .*\n"
        ".*v_a: 18 are ....jpg, 2 are ....JPEG; 20 expected of one kind"),
    "a truncated frame": (
        lambda folder: truncate(folder / "00004.jpg"),
        "image that cannot be read, once\n.*cannot read the image .*v_a/00004.jpg"),
    "a frame that is no image": (
        lambda folder: (folder / "00020.jpg").write_text("x"),
        "image that cannot be read, once\n.*cannot read the image .*v_a/00020.jpg"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_check_names_what_is_wrong_with_the_frames(tmp_path, fault, capsys):
    small_ucf(tmp_path)
    damage, message = FAULTS[fault]
    damage(tmp_path / "rgb-images/Biking/v_a")
    assert check("ucf", tmp_path) == 1
    out = capsys.readouterr().out
    assert len(re.findall(message, out)) == 1, out
    assert "1 fault: ucf in" in out and "may NOT be trained on" in out
    assert not (tmp_path / "out/sheet.png").exists()


def test_a_data_set_without_any_frames_is_refused(tmp_path, capsys):
    small_ucf(tmp_path)
    shutil.rmtree(tmp_path / "rgb-images")
    assert check("ucf", tmp_path) == 1
    out = capsys.readouterr().out
    assert "NO frames or videos below" in out and "frames/VIDEO/00001.jpg" in out
    assert "1 fault: ucf" in out                           # of both sides the same


def test_avas_frames_have_to_reach_its_last_annotated_second(tmp_path, capsys):
    small_ava(tmp_path)
    for number in range(80, 101):
        (tmp_path / f"frames/vid/vid_{number:06d}.jpg").unlink()
    assert check("ava", tmp_path) == 1
    assert "vid: 79 frames, its last annotated second is frame 91" in capsys.readouterr().out


def test_a_video_file_that_breaks_off_is_named(tmp_path, capsys):
    as_videos(tmp_path)
    path = tmp_path / "videos/a.mp4"
    content = bytearray(path.read_bytes())
    start = content.index(b"mdat") + 4
    middle = start + (content.index(b"moov") - start) // 2
    content[middle:middle + 400] = bytes(400)              # pictures are lost, the index is whole
    path.write_bytes(content)
    assert check("custom", tmp_path) == 1
    out = capsys.readouterr().out
    assert "a.mp4" in out and "1 fault" in out


def test_a_video_that_ends_before_what_it_announces_is_noted(tmp_path, capsys):
    """A decoder ends in silence there; a few frames too many are announced of many a part."""
    as_videos(tmp_path)
    noise = np.random.default_rng(0).integers(0, 255, (40, 48, 64, 3)).astype(np.uint8)
    path = tmp_path / "videos/b.avi"
    write_pictures(path, noise, "mpeg4")
    content = path.read_bytes()
    path.write_bytes(content[:len(content) // 2])
    check("custom", tmp_path)
    run("extract", "--dataset", "custom", "--data", tmp_path)
    out = capsys.readouterr().out
    decoded = len(list((tmp_path / "frames/b").iterdir()))
    note = f"note: {path}: 40 frames announced, {decoded} decoded: is it whole?"
    assert 0 < decoded < 30 and out.count(note) == 2 and "a.mp4:" not in out
    assert "0 faults" in out and "0 cannot be read" in out
    assert not sources.not_whole(tmp_path / "videos/a.mp4", 19)
    path.write_bytes(content)
    assert not sources.not_whole(path, 36) and sources.not_whole(path, 35)


# ---- check: the annotation ----

def test_faults_are_grouped_with_count_rows_and_likely_cause(tmp_path, capsys):
    """Boxes in pixels, as from most tools."""
    small_own(tmp_path)
    rows = [("a", frame, 16, 12, 48, 24, 1, 7) for frame in range(1, 21)]
    write_csv(tmp_path / "annotations.csv", [*rows, ("b", 5, 0, 0, 1, 1, 1, 1)])
    assert check("custom", tmp_path) == 1
    out = capsys.readouterr().out
    assert "box outside of the frame, 20 times; likely cause: pixels" in out
    assert re.findall(r"annotations.csv row (\d+): a frame", out) == ["1", "2", "3"]
    assert "and 17 more" in out and "1 fault: custom" in out


def test_each_kind_of_fault_is_listed(tmp_path, capsys):
    small_own(tmp_path)
    write_csv(tmp_path / "annotations.csv", [
        ("b", 1, 0, 0, 1, 1, 1, 1), ("a", 1, .1, .1, .2, .2, 1),
        ("a", 1, .1, .1, .2, .2, 5, 1), ("a", 1, .3, .1, .2, .2, 1, 2),
        ("a", 1, "nan", .1, .2, .2, 1, 3), ("a", 99, .1, .1, .2, .2, 1, 1)])
    assert check("custom", tmp_path) == 1
    out = capsys.readouterr().out
    for row, kind in ((2, "columns"), (3, "class id that is not in the class list"),
                      (4, "x2 <= x1"), (5, "not a number"), (6, "not in the video")):
        assert len(re.findall(f"row {row}[: ]", out)) == 1 and kind in out, (row, out)


def test_a_class_without_boxes_to_train_on_is_a_fault_of_your_own_data(tmp_path, capsys):
    small_own(tmp_path)
    (tmp_path / "classes.txt").write_text("wave\njump high\nsit\n")
    assert check("custom", tmp_path) == 1
    out = capsys.readouterr().out
    assert "class without boxes to train on, once; likely cause" in out
    assert "\n    sit\n" in out and "3 classes (num_classes=3)" in out


@pytest.mark.parametrize("listed, message", [
    ("", "lists no video of .* none is left for validation"),
    ("a\nb\n", "lists every video of .* none is left for training"),
    ("b\nB c\n", "B c is not in")])
def test_lists_that_leave_a_side_empty_are_faults(tmp_path, listed, message, capsys):
    small_own(tmp_path)
    (tmp_path / "val.txt").write_text(listed)
    assert check("custom", tmp_path) == 1
    assert re.search(message, capsys.readouterr().out)


@pytest.mark.parametrize("content, message", [("", "b is not in"), ("b,7\n", "has no boxes")])
def test_an_empty_annotation_is_a_fault(tmp_path, content, message, capsys):
    small_own(tmp_path)
    (tmp_path / "annotations.csv").write_text(content)
    assert check("custom", tmp_path) == 1
    assert message in capsys.readouterr().out


def test_the_sheet_has_names_of_any_script_and_length(tmp_path):
    small_own(tmp_path)
    grey_frames(tmp_path / "frames/b", "{:05d}.jpg", 9, size=(48, 64))     # upright
    sheets = []
    for names in ("прыжок\n" + "a very long name " * 9, "прыжок\n" + "a very long name " * 30,
                  "\u4e00\u4e01\n" + "a very long name " * 9):
        (tmp_path / "classes.txt").write_text(names + "\n", "utf-8")
        assert check("custom", tmp_path) == 0
        sheets.append(np.asarray(Image.open(tmp_path / "out/sheet.png")))
    assert np.array_equal(*sheets[:2]), "a long name is cut at the picture's width"
    assert not np.array_equal(sheets[0], sheets[2]), "Cyrillic is not drawn as what has no letter"
