"""Annotations of other programs -> annotations.csv and classes.txt, as docs/own_data.md has them.

    python -m tools.prepare convert annotations.xml --data mydata       # CVAT for video 1.1
    python -m tools.prepare convert coco.json --data mydata             # COCO

CVAT: a track is a person. Between two of its boxes the box is interpolated, as CVAT shows it, but
not behind one that is marked as outside. Frames are counted from 0 there.
COCO: an image's name tells its video and frame: kitchen/00012.jpg, kitchen_000012.jpg; frames are
counted from 0 if one of them is 0. A person is an annotation's `track_id`, beside the others or in
its `attributes`; without one each box is a person of its own, which will do for key frames. An
image without boxes is a frame with nobody.

Classes are the labels (categories); where there is one label alone, such as "person", and boxes
have attributes, these are the classes: a text by its value, a check box by its name.
"""
# a box here: video, frame (from 1), person, x1, y1, x2, y2 in shares of the frame, names of classes

import json
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import NamedTuple

from beside.sources import read_list

# attributes that say something of a box, not of the person's action
BOOKKEEPING = ("track_id", "occluded", "outside", "keyframe", "truncated", "difficult", "rotation")
NO_CLASS = ("", "none", "false", "__undefined__")


class Box(NamedTuple):
    video: str
    frame: int
    person: int
    corners: tuple                 # x1, y1, x2, y2 in shares of the frame
    label: str
    attributes: dict               # name -> value, a text


def attribute_classes(attributes):
    """Names of classes that attributes {name: value} give; numbers are none."""
    names = []
    for name, value in attributes.items():
        value = str(value)
        if name in BOOKKEEPING or value.lower() in NO_CLASS or re.fullmatch(r"[-+.\d]+", value):
            continue
        names.append(name if value.lower() == "true" else value)
    return names


def shares(corners, width, height):
    """x1, y1, x2, y2 in pixels -> shares of the frame, cut to it."""
    extent = width, height, width, height
    return tuple(min(max(value / whole, 0.0), 1.0) for value, whole in zip(corners, extent))


# ---- CVAT ----

def read_cvat(path):
    """A file of CVAT for video 1.1 -> (boxes, {video: frames with nobody}, all labels)."""
    try:
        root = ElementTree.parse(path).getroot()
    except ElementTree.ParseError as error:
        raise ValueError(f"{path} is no XML ({error}); export it again") from error
    if root.find("image") is not None or root.find("meta") is None:
        raise ValueError(f'{path} is not of the format "CVAT for video 1.1"; export it as that')
    videos = {}                    # id of a task -> name of the video, width, height
    for task in [*root.iter("task"), *root.iter("job")]:
        size = task.find("original_size")
        name = task.findtext("source") or root.findtext("meta/source") or task.findtext("name")
        if size is not None and name:
            width, height = float(size.findtext("width")), float(size.findtext("height"))
            videos[task.findtext("id")] = Path(name).stem, width, height
    if not videos:
        raise ValueError(f"{path} does not say which video it is of, and its size (meta, task, "
                         "source and original_size)")
    labels = [label.findtext("name") for label in root.iter("label")]
    boxes, only = [], next(iter(videos))
    for person, track in enumerate(root.iter("track"), 1):
        task = track.get("task_id", only)
        if task not in videos:
            raise ValueError(f"{path}: track {track.get('id')} is of task {task}, which the file "
                             "does not describe")
        boxes += track_boxes(path, track, person, *videos[task])
    return boxes, {name: [] for name, _, _ in videos.values()}, labels


def track_boxes(path, track, person, video, width, height):
    """The boxes of a track at every frame, those between its key frames interpolated."""
    def attributes(element):
        return {one.get("name"): one.text or "" for one in element.findall("attribute")}

    found, before = [], None       # before: frame, corners and attributes of the box before
    for element in sorted(track.findall("box"), key=lambda one: int(one.get("frame"))):
        frame = int(element.get("frame")) + 1
        if float(element.get("rotation", 0)):
            raise ValueError(f"{path}: track {track.get('id')} has a rotated box in frame "
                             f"{frame - 1}; boxes are upright here")
        pixels = [float(element.get(key)) for key in ("xtl", "ytl", "xbr", "ybr")]
        corners = shares(pixels, width, height)
        if before:
            first, start, known = before
            for between in range(first + 1, frame):
                share = (between - first) / (frame - first)
                mixed = tuple((1 - share) * a + share * b for a, b in zip(start, corners))
                found.append(Box(video, between, person, mixed, track.get("label"), known))
        before = None
        if element.get("outside") != "1":
            known = attributes(track) | attributes(element)
            found.append(Box(video, frame, person, corners, track.get("label"), known))
            before = frame, corners, known
    return found


# ---- COCO ----

def video_and_number(name):
    """kitchen/00012.jpg, kitchen_000012.jpg, kitchen/frame_12.png -> ("kitchen", 12)."""
    path = Path(name)
    match = re.fullmatch(r"(.*?)[-_. ]?(?:frame|img|image)?[-_. ]?(\d+)", path.stem, re.IGNORECASE)
    if match is None:
        raise ValueError(f"the name of image {name} does not end in the number of a frame")
    prefix, number = match.groups()
    video = prefix or path.parent.name
    if not video:
        raise ValueError(f"the name of image {name} does not tell its video: kitchen/00012.jpg "
                         "or kitchen_00012.jpg does")
    return video, int(number)


def read_coco(path):
    """A COCO file -> (boxes, {video: frames with nobody}, all labels)."""
    try:
        content = json.loads(Path(path).read_text("utf-8"))
        images = {image["id"]: image for image in content["images"]}
        labels = {category["id"]: category["name"] for category in content["categories"]}
        annotations = content["annotations"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no COCO file with images, annotations and categories "
                         f"({error!r})") from error
    places = {}                    # id of an image -> its video, its number
    names = {}                     # the same, the other way round, with the image's name
    for key, image in images.items():
        place = video_and_number(image["file_name"])
        if place in names:
            raise ValueError(f"{path}: {names[place]} and {image['file_name']} are both frame "
                             f"{place[1]} of {place[0]}: give videos names of their own, in the "
                             "folder of the frames or in front of their number")
        names[place] = image["file_name"]
        places[key] = place
    first = min([1, *(number for _, number in names)])
    if first == 0:
        print(f"{path} counts frames from 0: all are numbered one higher here")
    boxes, empty = [], {video: set() for video, _ in places.values()}
    for video, number in places.values():
        empty[video].add(number + 1 - first)
    for count, annotation in enumerate(annotations):
        name = f"{path}: annotation {annotation.get('id', count)}"
        image = images.get(annotation.get("image_id"))
        label = labels.get(annotation.get("category_id"))
        if image is None or label is None:
            raise ValueError(f"{name} is of an image or a category that the file does not have")
        if len(annotation.get("bbox") or ()) != 4:
            raise ValueError(f"{name} has no bbox of x, y, width and height: give it one, or "
                             "delete the annotation")
        video, number = places[annotation["image_id"]]
        attributes = annotation.get("attributes") or {}
        person = annotation.get("track_id", attributes.get("track_id"))
        x, y, w, h = annotation["bbox"]
        corners = shares((x, y, x + w, y + h), image["width"], image["height"])
        frame = number + 1 - first
        boxes.append(Box(video, frame, person, corners, label, attributes))
        empty[video].discard(frame)
    untracked = []
    known = [0]
    for number, box in enumerate(boxes):
        if box.person is None:
            untracked.append(number)
        else:
            known.append(box.person)
    if untracked:
        print(f"{path}: {len(untracked)} of {len(boxes)} boxes without track_id; each of these is "
              "a person of its own, as key frames have it")
        for person, number in enumerate(untracked, max(known) + 1):
            boxes[number] = boxes[number]._replace(person=person)
    return boxes, {video: sorted(frames) for video, frames in empty.items()}, [*labels.values()]


# ---- what is written ----

def choose_classes(boxes, labels):
    """(names of classes, those of each box): the labels, or the attributes of a single label."""
    of_attributes = [attribute_classes(box.attributes) for box in boxes]
    if len(set(labels)) > 1 or not any(of_attributes):
        return list(dict.fromkeys(labels)), [[box.label] for box in boxes]
    names = sorted({name for several in of_attributes for name in several})
    return names, of_attributes


def convert(args):
    """Writes annotations.csv and classes.txt into args.data; returns the exit status."""
    root = Path(args.data)
    target, listed = root / "annotations.csv", root / "classes.txt"
    if target.exists():
        raise SystemExit(f"{target} is there already; move it away, or give another --data")
    boxes, empty, labels = [], {}, []
    try:
        for path in args.files:
            read = read_coco if path.suffix.lower() == ".json" else read_cvat
            try:
                found, nobody, names = read(path)
            except KeyError as error:
                raise ValueError(f"{path}: an image or an annotation has no {error}") from error
            except (TypeError, AttributeError, ZeroDivisionError) as error:
                raise ValueError(f"{path}: an image, an annotation or a track is not as the "
                                 f"format has it ({error})") from error
            twice = sorted(set(empty) & set(nobody))
            if twice:
                raise ValueError(f"{path} has boxes of {twice[0]}, and so has a file before it")
            boxes, empty, labels = boxes + found, empty | nobody, labels + names
    except (OSError, ValueError) as error:
        raise SystemExit(str(error)) from error
    classes, of_boxes = choose_classes(boxes, labels)
    if listed.exists():
        known = read_list(listed)
        unknown = sorted(set(classes) - set(known))
        if unknown:
            raise SystemExit(f"{listed} lacks {', '.join(unknown)}; add them, or move it away")
        classes = known

    quoted = {video: video for video in empty}
    for video in empty:
        if "," in video or '"' in video:
            quoted[video] = '"' + video.replace('"', '""') + '"'
    rows, left_out = [], 0
    for box, names in zip(boxes, of_boxes):
        x1, y1, x2, y2 = box.corners
        if not names or x2 - x1 < 1e-4 or y2 - y1 < 1e-4:
            left_out += 1
            continue
        corners = ",".join(f"{value:.5f}" for value in box.corners)
        for name in names:
            row = f"{box.frame},{corners},{classes.index(name) + 1},{box.person}"
            row = f"{quoted[box.video]},{row}"
            rows.append((box.video, box.frame, row))
    # Frames with nobody: those said to be so, and those of which no box is left.
    nobody = {(box.video, box.frame) for box in boxes}
    for video, frames in empty.items():
        nobody |= {(video, frame) for frame in frames}
        if not frames and all(box.video != video for box in boxes):
            nobody.add((video, 1))     # a video with nobody in it
    nobody -= {(video, frame) for video, frame, _ in rows}
    rows += [(video, frame, f"{quoted[video]},{frame}") for video, frame in nobody]
    root.mkdir(parents=True, exist_ok=True)
    target.write_text("".join(row + "\n" for _, _, row in sorted(rows)), "utf-8")
    listed.write_text("".join(name + "\n" for name in classes), "utf-8")
    print(f"{target}: {len(boxes) - left_out} boxes in {len(empty)} videos; {left_out} left out "
          "that have no class, or lie outside of the frame")
    print(f"{listed}: {', '.join(classes)}")
    if not (root / "val.txt").exists():
        print(f"now list the videos for validation in {root / 'val.txt'}, one a line")
    return 0
