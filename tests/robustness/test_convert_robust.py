"""tools/convert.py on files that are of another kind, broken, or in the way."""

import pytest

from tests.test_convert import CVAT, coco, convert, labels


@pytest.mark.parametrize("text, suffix, message", [
    ("<a><b></a>", ".xml", "is no XML"),
    ('<annotations><image id="0"/></annotations>', ".xml", "CVAT for video 1.1"),
    ("<annotations><meta><task/></meta></annotations>", ".xml", "does not say which video"),
    ("{", ".json", "is no COCO file"), ("[]", ".json", "is no COCO file"),
    (coco(["x.jpg"], []), ".json", "does not end in the number"),
    (coco(["12.jpg"], []), ".json", "does not tell its video"),
    (coco(["a/1.jpg"], [{"image_id": 99, "category_id": 5, "bbox": [0, 0, 1, 1]}]), ".json",
     "is of an image or a category"),
    (coco(["a/1.jpg"], [{"id": 3, "image_id": 10, "category_id": 5, "bbox": []}]), ".json",
     "annotation 3 has no bbox of x, y, width and height"),
    (coco(["a/1.jpg"], [{"id": 3, "image_id": 10, "category_id": 5, "bbox": None}]), ".json",
     "annotation 3 has no bbox"),
    (coco(["a/1.jpg"], [{"image_id": 10, "category_id": 5, "bbox": ["0", "0", "1", "1"]}]),
     ".json", "made.json: an image, an annotation or a track is not as the format has it"),
    (coco(["one/img/1.jpg", "two/img/1.jpg"], []), ".json",
     "one/img/1.jpg and two/img/1.jpg are both frame 1 of img: give videos names of their own")])
def test_what_cannot_be_read_is_named(tmp_path, text, suffix, message):
    with pytest.raises(SystemExit, match=message):
        convert(tmp_path, text, suffix)
    assert not (tmp_path / "annotations.csv").exists()


def test_nothing_is_overwritten_and_known_classes_keep_their_numbers(tmp_path):
    text = CVAT.format(labels=labels("walk", "sit"), one="walk", other="sit", shown="")
    (tmp_path / "classes.txt").write_text("sit\nrun\n")
    with pytest.raises(SystemExit, match="classes.txt lacks walk"):
        convert(tmp_path, text, ".xml")
    (tmp_path / "classes.txt").write_text("sit\nrun\nwalk\n")
    convert(tmp_path, text, ".xml")
    first = (tmp_path / "annotations.csv").read_text().splitlines()[0]
    assert first == "kitchen,1,0.00000,0.10000,0.25000,0.60000,3,1"
    with pytest.raises(SystemExit, match="annotations.csv is there already"):
        convert(tmp_path, text, ".xml")
