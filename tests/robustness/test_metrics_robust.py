"""metrics.py on unsound input: one error that names the place."""

import numpy as np
import pytest
from test_metrics import DETECTIONS, GROUND_TRUTH, ava_files, one_track

from metrics import ava_map, frame_map, link_tubes, video_map

TRUTH = {"frame": np.array([1, 1]), "label": np.array([0, 0]),
         "box": np.array([[0, 0, 1, 1.], [2, 2, 4, 4]])}
FOUND = {**TRUTH, "score": np.array([0.5, 0.4])}


@pytest.mark.parametrize("change, message", [
    ({"box": np.array([[0, 0, 1, 1.], [2, 2, 1, 4]])}, "detections, row 1: box .* x2 < x1"),
    ({"box": np.array([[0, np.nan, 1, 1.], [2, 2, 4, 4]])}, "row 0: box .* not finite"),
    ({"box": np.zeros((2, 3))}, r"boxes \(n, 4\) of x1, y1, x2, y2 expected, got \(2, 3\)"),
    ({"score": np.array([0.5, np.nan])}, "detections, row 1: score is not a finite number"),
    ({"label": np.array([0, 2])}, r"detections, row 1: class 2 is not one of the classes 0..1"),
    ({"score": np.array([0.5])}, "lengths differ"),
    ({"frame": np.array(["1", "1"])}, "frame: integers in one table .* none would match"),
    ({"video": np.array([0, 0])}, r"frames are told by \['video', 'frame'\] in one table, not in")])
def test_unsound_detections_are_errors_that_name_the_row(change, message):
    with pytest.raises(ValueError, match=message):
        frame_map({**FOUND, **change}, TRUTH, 2)


def test_other_unsound_arrays_are_errors():
    with pytest.raises(ValueError, match="ground truth, row 1: box"):
        frame_map(FOUND, {**TRUTH, "box": np.array([[0, 0, 1, 1.], [2, 2, 4, 1]])}, 2)
    with pytest.raises(ValueError, match=r"lack \['score', 'label'\]"):
        frame_map({"frame": TRUTH["frame"], "box": TRUTH["box"]}, TRUTH, 2)
    with pytest.raises(ValueError, match=r"\(2, 2\) expected, got \(2, 3\)"):
        scores = np.zeros((2, 3))
        frame_map({"frame": TRUTH["frame"], "box": TRUTH["box"], "scores": scores}, TRUTH, 2)
    with pytest.raises(ValueError, match="protocol 'lenient': strict, released"):
        link_tubes(one_track(range(20)), "lenient")
    with pytest.raises(ValueError, match="video v has frames 3..8, but 1..7"):
        link_tubes(one_track(range(3, 9)), "released", num_frames={"v": 7})
    with pytest.raises(ValueError, match="tube 0 has 2 frames and 1 boxes"):
        tube = {"video": 0, "label": 0, "score": 1, "frames": [1, 2], "boxes": [[0, 0, 1, 1]]}
        video_map([tube], [], 2)


@pytest.mark.parametrize("row, message", [
    ("a,0902,0.1,0.1,0.5,0.5,1,0.9,1,2,3", "columns: 11"),
    ("a,0902,0.1,0.1,0.5,0.5,1", "columns: 7"),
    ("a,0902,0.1,nan,0.5,0.5,1,0.9", "a number that is not finite"),
    ("a,0902,0.5,0.1,0.1,0.5,1,0.9", "x2 < x1"),
    ("a,0902,0.1,0.1,0.5,0.05,1,0.9", "x2 < x1 or y2 < y1"),
    ("a,0902,0.1,0.1,0.5,0.5,run,0.9", "could not convert string to float: 'run'"),
    ("a,902.5,0.1,0.1,0.5,0.5,1,0.9", "frame '902.5' is no whole number"),
    ("a,0902,0.1,0.1,0.5,0.5,1.5,0.9", "an action id that is not a whole number"),
    ("a,0902,0.1,0.1,0.5,0.5,1,", "could not convert")])
def test_a_faulty_row_of_an_ava_file_is_one_error_with_its_row(tmp_path, row, message):
    first, rest = DETECTIONS.split("\n", 1)
    with pytest.raises(ValueError, match="detections.csv row 2: " + message):
        ava_map(*ava_files(tmp_path, f"{first}\n{row}\n{rest}")[:3])


@pytest.mark.parametrize("change, message", [
    ({"truth": "a,0902\n" + GROUND_TRUTH + "a,0902,1,1,0,1,1,0\n"}, "truth.csv row 5: x2 < x1"),
    ({"truth": "a,0902\n"}, "no row of the label map's classes is left"),
    ({"excluded": "a,0902,1\n"}, "excluded.csv row 1: columns: 3"),
    ({"excluded": "b,0903\n" + DETECTIONS}, "excluded.csv row 2: 8 columns, not 2"),
    ({"label_map": "stand, run"}, "map.pbtxt .*no label map")])
def test_other_faults_of_ava_files_are_errors(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        ava_map(*ava_files(tmp_path, **change))


def test_ava_videos_that_are_numbers_here_and_names_there_are_an_error(tmp_path):
    arrays = {"video": np.array([3]), "timestamp": np.array([902]),
              "box": np.array([[0, 0, 1, 1.]]), "label": np.array([1]), "score": np.ones(1)}
    with pytest.raises(ValueError, match="video: integers in one table .* none would match"):
        ava_map(arrays, ava_files(tmp_path)[1], [1, 3])


def test_an_action_id_without_a_column_of_scores_is_an_error():
    table = {"video": np.array([3]), "timestamp": np.array([902]), "box": np.array([[0, 0, 1, 1.]])}
    with pytest.raises(ValueError, match="5 columns of scores, but an action id 6"):
        ava_map({**table, "scores": np.zeros((1, 5))}, {**table, "label": np.array([1])}, [1, 6])
