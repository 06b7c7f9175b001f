"""tools/convert.py: what CVAT and COCO show is what annotations.csv says."""

import json

import numpy as np
import pytest

from beside.sources import read_rows
from data import build_dataset
from tests.small_sets import grey_frames
from tests.test_data import KEY, STILL
from tools import prepare

# Two persons in 20 frames of 200 x 100. The first goes from x = 0 to 100 in the frames 0 to 10,
# is gone from 15 to 17 and comes back; the second is there in the last frames alone.
CVAT = """<?xml version="1.0" encoding="utf-8"?>
<annotations><version>1.1</version><meta><task><id>3</id><name>any</name><size>20</size>
<labels>{labels}</labels>
<original_size><width>200</width><height>100</height></original_size>
<source>kitchen.mp4</source></task></meta>
<track id="0" label="{one}">
  <box frame="0" outside="0" keyframe="1" xtl="0" ytl="10" xbr="50" ybr="60">{shown}</box>
  <box frame="10" outside="0" keyframe="1" xtl="100" ytl="10" xbr="150" ybr="60">{shown}</box>
  <box frame="15" outside="1" keyframe="1" xtl="100" ytl="10" xbr="150" ybr="60"></box>
  <box frame="18" outside="0" keyframe="1" xtl="100" ytl="10" xbr="210" ybr="60">{shown}</box>
</track>
<track id="1" label="{other}">
  <box frame="18" outside="0" keyframe="1" xtl="20.0" ytl="20.0" xbr="40.0" ybr="40.0">{shown}</box>
  <box frame="19" outside="0" keyframe="0" xtl="20.0" ytl="20.0" xbr="40.0" ybr="40.0">{shown}</box>
</track></annotations>"""


def convert(root, content, suffix):
    root.mkdir(exist_ok=True)
    (root / ("made" + suffix)).write_text(content, "utf-8")
    return prepare.main(["convert", str(root / ("made" + suffix)), "--data", str(root)])


def labels(*names):
    return "".join(f"<label><name>{name}</name></label>" for name in names)


def open_set(root, side, config=STILL):
    """The data set that was written, with frames of a video for validation beside it."""
    with (root / "annotations.csv").open("a") as file:
        file.write("garden,1,0.1,0.1,0.5,0.5,1,1\ngarden,2,0.1,0.1,0.5,0.5,1,1\n")
    (root / "val.txt").write_text("garden\n")
    for video in ("kitchen", "garden"):
        grey_frames(root / "frames" / video, "{:05d}.jpg", 20, size=(200, 100))
    return build_dataset("custom", root, side, config)


def test_tracks_of_cvat_are_what_cvat_shows(tmp_path, capsys):
    text = CVAT.format(labels=labels("walk", "wave", "sit"), one="walk", other="sit", shown="")
    assert convert(tmp_path, text, ".xml") == 0
    assert "now list the videos for validation" in capsys.readouterr().out
    assert (tmp_path / "classes.txt").read_text() == "walk\nwave\nsit\n"
    tubes = open_set(tmp_path, "train").ground_truth()[1]
    assert [(tube["label"], tube["frames"].tolist()) for tube in tubes] == [
        (0, [*range(1, 16)]), (0, [19]), (2, [19, 20])]
    first = tubes[0]["boxes"]
    assert np.allclose(first[:11, 0], np.arange(11) * 10, atol=1e-2)       # it walks
    assert np.allclose(first[11:], [100, 10, 150, 60], atol=1e-2)                  # and stands
    assert np.allclose(tubes[1]["boxes"], [100, 10, 200, 60], atol=1e-2)   # cut to the frame


def test_attributes_of_a_single_label_are_the_classes(tmp_path):
    shown = ('<attribute name="action">wave</attribute><attribute name="sits">true</attribute>'
             '<attribute name="age">34</attribute><attribute name="runs">false</attribute>')
    text = CVAT.format(labels=labels("person"), one="person", other="person", shown=shown)
    convert(tmp_path, text, ".xml")
    assert (tmp_path / "classes.txt").read_text() == "sits\nwave\n"
    dataset = open_set(tmp_path, "train")
    assert dataset.table.label.all() and len(dataset.table.box) == 15 + 1 + 2


def coco(names, annotations):
    images = [{"id": 10 + i, "file_name": name, "width": 200, "height": 100}
              for i, name in enumerate(names)]
    categories = [{"id": 5, "name": "walk"}, {"id": 7, "name": "wave"}]
    return json.dumps({"images": images, "annotations": annotations, "categories": categories})


@pytest.mark.parametrize("pattern, first", [
    ("kitchen/{:05d}.jpg", 1), ("kitchen_{:06d}.png", 0), ("kitchen/frame_{}.jpg", 0),
    ("images/kitchen_frame_{:04d}.jpg", 1)])
def test_coco_images_are_named_by_video_and_frame(tmp_path, pattern, first):
    boxes = []
    for i in range(3):
        boxes.append({"id": i, "image_id": 10 + i, "category_id": 7, "bbox": [20, 10, 40, 30],
                      "track_id": 4})
        boxes.append({"id": 9 + i, "image_id": 10 + i, "category_id": 5, "bbox": [0, 0, 20, 20],
                      "attributes": {"track_id": 6, "occluded": False}})
    names = [pattern.format(first + i) for i in range(4)]
    convert(tmp_path, coco(names, boxes), ".json")
    lines = (tmp_path / "annotations.csv").read_text().splitlines()
    assert len(lines) == 7 and lines[-1] == "kitchen,4"    # the fourth image shows nobody
    dataset = open_set(tmp_path, "train")
    tubes = dataset.ground_truth()[1]
    assert [(tube["label"], tube["frames"].tolist()) for tube in tubes] == [
        (1, [1, 2, 3]), (0, [1, 2, 3])]
    assert tubes[0]["boxes"].tolist() == [[20, 10, 60, 40]] * 3
    assert len(open_set(tmp_path, "train", KEY)) == 4


def test_coco_without_track_ids_will_do_for_key_frames(tmp_path, capsys):
    box = {"image_id": 10, "category_id": 5, "bbox": [0, 0, 20, 20]}
    convert(tmp_path, coco(["kitchen/1.jpg"], [box, {**box, "bbox": [50, 0, 20, 20]}]), ".json")
    assert "without track_id" in capsys.readouterr().out
    target = open_set(tmp_path, "train", KEY)[0][1]
    assert target["present"].tolist() == [[True], [True]]


def test_a_box_without_track_id_leaves_the_tracks_as_they_are(tmp_path, capsys):
    boxes = []
    for i in range(3):
        boxes.append({"image_id": 10 + i, "category_id": 5, "bbox": [0, 0, 20, 20], "track_id": 4})
    boxes.append({"image_id": 11, "category_id": 7, "bbox": [50, 0, 20, 20], "attributes": None})
    convert(tmp_path, coco([f"kitchen/{i}.jpg" for i in range(3)], boxes), ".json")
    said = capsys.readouterr().out
    assert "1 of 4 boxes without track_id" in said and "counts frames from 0" in said
    tubes = open_set(tmp_path, "train").ground_truth()[1]
    assert [(tube["label"], tube["frames"].tolist()) for tube in tubes] == [
        (0, [1, 2, 3]), (1, [2])]


def test_frames_and_videos_whose_boxes_have_no_class_are_said_to_show_nobody(tmp_path):
    boxes = []
    for image, action in ((10, "wave"), (11, "none"), (12, "none")):
        boxes.append({"image_id": image, "category_id": 5, "bbox": [0, 0, 20, 20],
                      "track_id": 1, "attributes": {"action": action}})
    content = json.loads(coco(["kitchen/1.jpg", "kitchen/2.jpg", "hall/1.jpg"], boxes))
    content["categories"] = [{"id": 5, "name": "person"}]
    convert(tmp_path, json.dumps(content), ".json")
    lines = (tmp_path / "annotations.csv").read_text().splitlines()
    assert lines[0] == "hall,1" and lines[1].startswith("kitchen,1,0.0") and lines[2] == "kitchen,2"


def test_a_comma_in_a_video_s_name_is_no_column(tmp_path):
    box = {"image_id": 10, "category_id": 5, "bbox": [0, 0, 20, 20], "track_id": 1}
    convert(tmp_path, coco(['a, "b"/1.jpg', 'a, "b"/2.jpg'], [box]), ".json")
    lines = (tmp_path / "annotations.csv").read_text().splitlines()
    assert lines[0].startswith('"a, ""b""",1,0.00000,') and lines[1] == '"a, ""b""",2'
    assert read_rows(tmp_path / "annotations.csv")[0].tolist() == ['a, "b"'] * 2


def test_coco_without_sizes_of_its_images_is_named(tmp_path):
    content = json.loads(coco(["kitchen/1.jpg"], [{"image_id": 10, "category_id": 5,
                                                   "bbox": [0, 0, 20, 20]}]))
    del content["images"][0]["width"]
    with pytest.raises(SystemExit, match="made.json: an image or an annotation has no 'width'"):
        convert(tmp_path, json.dumps(content), ".json")
