"""data.py on what is missing or wrong: one clear error, with the way out."""

import re
from dataclasses import replace

import pytest

from data import build_dataset
from tests.small_sets import (annots_mat, grey_frames, small_ava, small_own, small_ucf, write_csv,
                              write_video)
from tests.test_data import KEY, UCF


def test_a_missing_frame_is_named_with_the_way_out(tmp_path):
    small_ucf(tmp_path)
    (tmp_path / "rgb-images/Biking/v_a/00009.jpg").unlink()
    dataset = build_dataset("ucf", tmp_path, "val", UCF)
    dataset[0]
    message = (r"frames missing: .*v_a/00009.jpg \(20 expected, 19 found\); extract them with "
               "python -m tools.prepare")
    with pytest.raises(FileNotFoundError, match=message):
        dataset[1]


def test_a_truncated_image_is_named(tmp_path):
    path = small_ucf(tmp_path) / "rgb-images/Biking/v_a/00009.jpg"
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(OSError, match="cannot read the image .*v_a/00009.jpg: .*extract it again"):
        build_dataset("ucf", tmp_path, "val", UCF)[1]


@pytest.mark.parametrize("keep", [0, 2000])
def test_a_damaged_video_is_named(tmp_path, keep):
    small_ucf(tmp_path)
    (tmp_path / "rgb-images").rename(tmp_path / "hidden")
    path = tmp_path / "v_a.avi"
    write_video(path, 20, "mpeg4", g=5)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(OSError, match="v_a.avi"):
        build_dataset("ucf", tmp_path, "val", UCF)[2]


def test_an_annotation_without_pixels_can_be_scored_but_not_read(tmp_path, capsys):
    small_ucf(tmp_path)
    (tmp_path / "rgb-images").rename(tmp_path / "hidden")
    dataset = build_dataset("ucf", tmp_path, "val", UCF)
    assert len(dataset.ground_truth()[1]) == 2
    assert "NO frames or videos" in capsys.readouterr().out
    with pytest.raises(FileNotFoundError, match="no frames and no video file of Biking/v_a"):
        dataset[0]


def test_a_faulty_annotation_is_refused_with_all_kinds_of_its_faults(tmp_path):
    small_own(tmp_path)
    write_csv(tmp_path / "annotations.csv", [
        ("a", 3, .1, .1, .2, .2, 3, 8), ("a", 3, .3, .1, .2, .2, 1, 9), ("b", 1, 0, 0, 1, 1, 1, 1)])
    with pytest.raises(ValueError) as error:
        build_dataset("custom", tmp_path, "train", UCF)
    assert f"custom in {tmp_path} cannot be used as it is" in str(error.value)
    assert "python -m tools.prepare check" in str(error.value)
    assert "row 1: a frame 3" in str(error.value) and "row 2: a frame 3" in str(error.value)


def test_a_video_of_zero_frames_and_one_without_boxes_are_refused(tmp_path):
    small_ucf(tmp_path)
    annots_mat(tmp_path / "finalAnnots.mat", {"Biking/v_a": (0, [(1, 3, [[1, 1, 9, 9]])])})
    with pytest.raises(ValueError, match="Biking/v_a"):
        build_dataset("ucf", tmp_path, "val", UCF)
    annots_mat(tmp_path / "finalAnnots.mat", {"Biking/v_a": (20, [])})
    with pytest.raises(ValueError, match="has no boxes"):
        build_dataset("ucf", tmp_path, "val", UCF)


def test_sparse_boxes_are_refused_and_filled_on_demand(tmp_path):
    small_own(tmp_path)
    rows = [("a", frame, .1, .1, .5, .5, 1, 1) for frame in (1, 6, 11, 16)]
    write_csv(tmp_path / "annotations.csv", [*rows, ("b", 1, 0, 0, 1, 1, 1, 1)])
    with pytest.raises(ValueError, match="each 5 frames from the next.*--fill 5 to interpolate"):
        build_dataset("custom", tmp_path, "train", UCF)
    filled = build_dataset("custom", tmp_path, "train", UCF, fill=5)
    assert filled.ground_truth()[1][0]["frames"].tolist() == list(range(1, 17))
    assert len(build_dataset("custom", tmp_path, "train", KEY)) == 4


def test_one_box_a_video_is_taken_for_key_frames(tmp_path):
    small_own(tmp_path)
    grey_frames(tmp_path / "frames/c", "{:05d}.jpg", 20)
    rows = [(video, 5, .1, .1, .5, .5, 1, 1) for video in "abc"]
    write_csv(tmp_path / "annotations.csv", rows)
    with pytest.raises(ValueError, match="2 boxes, in one frame of each video: key frames"):
        build_dataset("custom", tmp_path, "train", UCF)
    assert len(build_dataset("custom", tmp_path, "train", KEY)) == 2
    assert len(build_dataset("custom", tmp_path, "train", UCF, fill=1).table.box) == 2


def test_annotated_frames_that_the_video_does_not_have_are_refused(tmp_path):
    small_own(tmp_path)
    with (tmp_path / "annotations.csv").open("a") as file:
        file.write("a,0\na,21\n")
    message = "(?s)frame with nobody that is not in the video, 2 times; .*counted from 0.*frame 21"
    with pytest.raises(ValueError, match=message):
        build_dataset("custom", tmp_path, "train", KEY)
    small_ava(tmp_path / "ava")
    for number in range(91, 101):                           # second 903 is frame 91
        (tmp_path / f"ava/frames/vid/vid_{number:06d}.jpg").unlink()
    with pytest.raises(ValueError, match="(?s)not in the video.*vid frame 903.*of 90 frames"):
        build_dataset("ava", tmp_path / "ava", "val", KEY)


def test_missing_videos_are_refused_and_left_out_on_demand(tmp_path, capsys):
    small_own(tmp_path)
    with (tmp_path / "annotations.csv").open("a") as file:
        file.write("gone,3,0.1,0.1,0.5,0.5,1,1\n")
    with pytest.raises(ValueError, match="(?s)without frames and without a file.*gone"):
        build_dataset("custom", tmp_path, "train", UCF)
    dataset = build_dataset("custom", tmp_path, "train", UCF, missing="leave out")
    assert dataset.videos == ["a"] and "left out: 1 (gone)" in capsys.readouterr().out


@pytest.mark.parametrize("name, side, fold, message", [
    ("kinetics", "val", 1, "there are synthetic, ucf, jhmdb, ava and custom"),
    ("custom", 1, 1, 'the sides of custom are "train" and "val", not 1'),
    ("synthetic", "val", 0, "synthetic has one split, 1, not 0"),
    ("ucf", "val", 2, "ucf has the splits 1 to 1, not 2")])
def test_names_sides_and_splits_that_do_not_exist(tmp_path, name, side, fold, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        build_dataset(name, small_ucf(tmp_path), side, UCF, fold)


def test_other_impossible_wishes_are_refused(tmp_path):
    with pytest.raises(ValueError, match="crop_size 99 exceeds resize_size 64"):
        build_dataset("ucf", tmp_path, "val", replace(UCF, crop_size=99))
    with pytest.raises(ValueError, match="key_frame=true"):
        build_dataset("ava", tmp_path, "val", UCF)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        build_dataset("ucf", tmp_path / "nowhere", "val", UCF)
