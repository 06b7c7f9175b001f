"""What lies on disk: annotations, trees of frames and video files (Sec. 5.1).

UCF101-24, JHMDB51-21, AVA v2.2 and your own data (docs/own_data.md) are read into one table of
boxes (`Table`). A `FrameSource` reads the pixels that belong to it, from frames that were extracted
or from the video files themselves.

There is one decoder of video, for training, evaluation, extraction and drawing. Frame n is the n-th
picture that a player shows: upright, in the order shown, without what the file marks as not to be
shown. What a container says about its frames is often something else. So a file is decoded from its
start unless its packets are known to tell the truth (`packet_stamps`), and the frames found after a
seek must be the ones expected.

Errors: FileNotFoundError where something is missing, OSError for pictures that cannot be read,
ValueError for an annotation that cannot be understood. Faults of single rows or videos are
collected in Table.problems: each kind with its count, its first three places and its likely cause.
"""
# M boxes of a table, V videos, K key frames, R rows, C classes, n frames of a video, H x W pixels

import codecs
import contextlib
import csv
import difflib
import itertools
import math
import os
import pickle
import re
import unicodedata
from collections import Counter
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from scipy.io import loadmat

UCF_CLASSES = """Basketball BasketballDunk Biking CliffDiving CricketBowling Diving Fencing
FloorGymnastics GolfSwing HorseRiding IceDancing LongJump PoleVault RopeClimbing SalsaSpin
SkateBoarding Skiing Skijet SoccerJuggling Surfing TennisSwing TrampolineJumping VolleyballSpiking
WalkingWithDog""".split()
JHMDB_CLASSES = """brush_hair catch clap climb_stairs golf jump kick_ball pick pour pullup push run
shoot_ball shoot_bow shoot_gun sit stand swing_baseball throw walk wave""".split()
AVA_CLASSES_80 = """bend/bow (at the waist)|crawl|crouch/kneel|dance|fall down|get up|jump/leap
lie/sleep|martial art|run/jog|sit|stand|swim|walk|answer phone|brush teeth|carry/hold (an object)
catch (an object)|chop|climb (e.g., a mountain)|clink glass|close (e.g., a door, a box)|cook|cut|dig
dress/put on clothing|drink|drive (e.g., a car, a truck)|eat|enter|exit|extract|fishing
hit (an object)|kick (an object)|lift/pick up|listen (e.g., to music)
open (e.g., a window, a car door)|paint|play board game|play musical instrument|play with pets
point to (an object)|press|pull (an object)|push (an object)|put down|read
ride (e.g., a bike, a car, a horse)|row boat|sail boat|shoot|shovel|smoke|stir|take a photo
text on/look at a cellphone|throw|touch (an object)|turn (e.g., a screwdriver)|watch (e.g., TV)
work on a computer|write|fight/hit (a person)|give/serve (an object) to (a person)|grab (a person)
hand clap|hand shake|hand wave|hug (a person)|kick (a person)|kiss (a person)|lift (a person)
listen to (a person)|play with kids|push (another person)
sing to (e.g., self, a person, a group)|take (an object) from (a person)
talk to (e.g., self, a person, a group)|watch (a person)""".replace("\n", "|").split("|")

AVA_RATE = 30                      # frames a second
AVA_START, AVA_LENGTH = 900, 901   # seconds of a film: the first that is taken, and how many
AVA_SECONDS = (902, 1798)          # the first and last that are annotated
FRAME_FOLDERS = ("rgb-images", "Frames", "Rename_Images", "frames", "rawframes")
VIDEO_SUFFIXES = (".avi", ".mp4", ".mkv", ".webm", ".mov", ".m4v", ".mpg", ".mpeg", ".wmv", ".flv",
                  ".3gp", ".ts", ".mts", ".m2ts", ".ogv")      # in lower case; files may have any


# --- text

def read_text(path):
    """The text of a file in UTF-8 or, by its byte order mark, UTF-16; marks are left out."""
    content = path.read_bytes()
    encoding = "utf-8"
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        encoding = "utf-16"
    elif b"\0" in content:
        raise ValueError(f"{path} holds zero bytes (UTF-16 without its mark?); save it as UTF-8")
    try:
        return content.decode(encoding).replace("\ufeff", "")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path} line {line} is not {encoding.upper()} (Latin-1, or another code "
                         "page?); save the file as UTF-8") from error


def read_list(path):
    """The lines of a list file that are not blank."""
    return [line.strip() for line in read_text(path).splitlines() if line.strip()]


def read_csv(path):
    """Yields the rows of a csv file that are not blank: (number from 1, list of texts)."""
    lines = re.split("\r\n|\r|\n", read_text(path))
    try:
        for line, row in enumerate(csv.reader(lines), 1):
            if row:
                yield line, row
    except csv.Error as error:
        raise ValueError(f"{path} is no csv file: {error}") from error


def some(names, most=10):
    """The first names of a list, and how many there are besides."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(str, names[:most])) + more


def problem(kind, places, cause="", count=None):
    """One kind of fault as text: how often, its first three places, its likely cause. places: all,
    or the first ones of `count`."""
    count = count or len(places)
    often = "once" if count == 1 else f"{count} times"
    lines = [f"{kind}, {often}" + (f"; likely cause: {cause}" if cause else ""), *places[:3]]
    if count > 3:
        lines.append(f"and {count - 3} more")
    return "\n    ".join(lines)


# --- the table

@dataclass
class Table:
    """One annotation for all data sets: V videos and M boxes, sorted by video, then frame."""
    classes: list                  # C names
    videos: list                   # V names
    num_frames: np.ndarray         # (V,) int64
    size: np.ndarray               # (V, 2) int64, height and width whose pixels boxes count
    source: str                    # what was read, in words
    problems: list                 # faults, a text each; a table that has some is not for training
    seconds: bool = False          # frames are numbered by AVA's seconds
    video: np.ndarray = None       # (M,) int64, index of the video
    frame: np.ndarray = None       # (M,) int64, counted from 1; where `seconds`, AVA's second
    actor: np.ndarray = None       # (M,) int64, the same for the boxes of one actor
    box: np.ndarray = None         # (M, 4) float32: x1, y1, x2, y2
    label: np.ndarray = None       # (M, C) bool
    key_frames: np.ndarray = None  # (K, 2) int64, video and frame of all annotated, boxes or none


# One row of an annotation: a box with one class, or (NaN from the person on) a frame with nobody.
ROW = np.dtype([("video", np.int64),       # index of the video
                ("frame", np.float64), ("person", np.float64),
                ("box", np.float64, 4),    # x1, y1, x2, y2, in the unit of the annotation
                ("label", np.float64),     # class id, from 1
                ("line", np.int64)])       # of the csv file, from 1; 0: of another kind of file


def make_rows(video, frame, person, box, label, line=0):
    """Rows (R,) from their fields; each may be one value for all rows."""
    rows = np.empty(len(frame), ROW)
    values = (video, frame, person, box, label, line)
    for name, value in zip(ROW.names, values):
        rows[name] = value
    return rows


def add_boxes(table, rows, path, unit, persons):
    """The table, so far without boxes, with those of rows (R,) that were read from `path`.

    Rows that differ in nothing but the class are one box with several labels. unit (V, 2): what
    the whole height and width of a video are in the annotation; 1 if boxes are shares of them.
    persons: the boxes of one person are one actor; otherwise each box is an actor of its own.
    """
    nobody = np.isnan(rows["person"]) & np.isnan(rows["box"]).all(axis=1)      # (R,)
    problems = table.problems + row_problems(table, rows[~nobody], path, unit)
    empty = rows[nobody]
    places = [f"{where(row, path, table)} (of {table.num_frames[row['video']]} frames)"
              for row in empty[beyond_video(table, empty)]]
    if places:
        cause = "frames counted from 0; the first is 1" if (empty["frame"] == 0).any() else ""
        problems.append(problem("frame with nobody that is not in the video", places, cause))
    numbered = np.isfinite(rows["frame"])
    key_frames = np.column_stack([rows["video"], rows["frame"]])[numbered]
    key_frames = np.unique(key_frames.astype(np.int64), axis=0)                # (K, 2)

    known = np.isin(rows["label"], np.arange(len(table.classes)) + 1)
    rows = rows[known & numbered]
    key = np.column_stack([rows["video"], rows["frame"], rows["person"], rows["box"]])     # (R, 7)
    _, first, box_of_row = np.unique(key, axis=0, return_index=True, return_inverse=True)
    boxes = rows[first]                            # (M,) in the order of video, frame, person
    label = np.zeros((len(boxes), len(table.classes)), bool)
    label[box_of_row.reshape(-1), rows["label"].astype(np.int64) - 1] = True
    actor = np.arange(len(boxes))
    if persons:
        key = np.column_stack([boxes["video"], boxes["person"]])               # (M, 2)
        actor = np.unique(key, axis=0, return_inverse=True)[1].reshape(-1)
        order = np.lexsort((boxes["frame"], actor))
        again = (np.diff(actor[order]) == 0) & (np.diff(boxes["frame"][order]) == 0)
        places = [f"{where(row, path, table)}: person {row['person']:g} has two boxes"
                  for row in boxes[order[1:][again]]]
        if places:
            problems.append(problem("person with two boxes in one frame", places))
    if not len(boxes) and not problems:
        problems.append(f"{path}: the annotation has no boxes")
    scale = (table.size / unit)[boxes["video"]][:, [1, 0, 1, 0]]               # (M, 4)
    return replace(table, problems=problems, key_frames=key_frames, video=boxes["video"],
                   frame=boxes["frame"].astype(np.int64), actor=actor, label=label,
                   box=(boxes["box"] * scale).astype(np.float32))


def where(row, path, table):
    """Where a row is, in words."""
    line = f" row {row['line']}" if row["line"] else ""
    return f"{path}{line}: {table.videos[row['video']]} frame {row['frame']:g}"


def beyond_video(table, rows):
    """(R,) bool: rows whose frame, a number from 1, or AVA's second, the video does not have."""
    count = table.num_frames[rows["video"]]                                    # (R,)
    first, last = 1, count
    frame = rows["frame"]
    if table.seconds:
        first, last = AVA_SECONDS
        last = np.minimum(last, AVA_START + (count - 1) // AVA_RATE)
    return (count > 0) & ~((frame >= first) & (frame <= last))


def row_problems(table, rows, path, unit):
    """The faults of rows (R,) of boxes, and of videos, as texts; see `add_boxes`."""
    extent = unit[rows["video"]][:, ::-1]                                      # (R, 2) x and y
    low, high = rows["box"][:, :2], rows["box"][:, 2:]                         # (R, 2) each
    slack = 0.005 * extent         # annotations that count pixels from 1 may end one pixel outside
    classes = len(table.classes)

    finite = np.isfinite(rows["box"]).all(axis=1)
    outside = finite & ((low < -slack) | (high > extent + slack)).any(axis=1)
    turned = finite & (high <= low).any(axis=1)
    beyond = beyond_video(table, rows)
    unknown = ~np.isin(rows["label"], np.arange(classes) + 1)

    in_shares = (unit == 1).all()
    pixels = in_shares and (rows["box"][outside] > 2).any()
    # a row may be turned by a slip; of x, y, width, height many are, and the boxes fit so read
    many = (finite & (high < low).any(axis=1)).sum() * 4 >= finite.sum()
    sizes = many and ((low + high)[finite] <= (extent + slack)[finite]).all()
    frames_from_0 = (rows["frame"][beyond] == 0).any()
    ids_from_0 = (rows["label"][unknown] == 0).all() and not (rows["label"] == classes).any()
    kinds = [("box with a coordinate that is not a number", ~finite, False, ""),
             ("box outside of the frame", outside, pixels,
              "pixels; x and y are shares of the frame's width and height, 0 to 1"),
             ("box with x2 <= x1 or y2 <= y1", turned, sizes,
              "x, y, width, height in place of the corners x1, y1, x2, y2"),
             ("box of a frame that is not in the video", beyond, frames_from_0,
              "frames counted from 0; the first is 1"),
             (f"class id that is not in the class list (1 to {classes})", unknown, ids_from_0,
              "class ids counted from 0; the first is 1")]

    problems = []
    places = [f"{path}: {table.videos[v]}: the video has no frames"
              for v in np.flatnonzero(table.num_frames < 1)]
    if places:
        problems.append(problem("video of zero frames", places))
    for kind, found, likely, cause in kinds:
        places = []
        for row in rows[found][:3]:
            height, width = unit[row["video"]]
            of = "" if in_shares else f"{width}x{height}, "
            places.append(f"{where(row, path, table)}: box {row['box'].tolist()}, class "
                          f"{row['label']:g} (of {of}{table.num_frames[row['video']]} frames)")
        if places:
            problems.append(problem(kind, places, cause if likely else "", found.sum()))
    return problems


def fill_gaps(table, fill):
    """The table with boxes interpolated linearly between those of a person, `fill` frames apart or
    less; they have the labels that both have. Nothing is filled across a frame said to be empty."""
    boxed = set(zip(table.video.tolist(), table.frame.tolist()))
    empty = {key for key in map(tuple, table.key_frames.tolist()) if key not in boxed}
    order = np.lexsort((table.frame, table.actor))
    gap = np.diff(table.frame[order])
    near = (np.diff(table.actor[order]) == 0) & (gap > 1) & (gap <= fill)
    start, frame, box, label = [], [], [], []      # of the new boxes: the box before, and the rest
    for at in np.flatnonzero(near):
        before, after = order[at], order[at + 1]
        between = np.arange(table.frame[before] + 1, table.frame[after])
        both = table.label[before] & table.label[after]
        if both.any() and empty.isdisjoint((table.video[before], number) for number in between):
            share = (np.arange(1, gap[at]) / gap[at])[:, None]                 # (gap - 1, 1)
            start += [before] * len(between)
            frame.append(between)
            box.append((1 - share) * table.box[before] + share * table.box[after])
            label += [both] * len(between)
    if not start:
        return table
    video = np.concatenate([table.video, table.video[start]])
    frame = np.concatenate([table.frame, *frame])
    key_frames = np.concatenate([table.key_frames, np.column_stack([video, frame])])
    order = np.lexsort((frame, video))
    return replace(table, video=video[order], frame=frame[order],
                   actor=np.concatenate([table.actor, table.actor[start]])[order],
                   box=np.concatenate([table.box, *box]).astype(np.float32)[order],
                   label=np.concatenate([table.label, label])[order],
                   key_frames=np.unique(key_frames, axis=0),
                   source=f"{table.source}; {len(start)} boxes interpolated")


def sparse_boxes(table):
    """What is to be said of boxes that mostly are not in successive frames; "" if they are."""
    order = np.lexsort((table.frame, table.actor))
    gap = np.diff(table.frame[order])[np.diff(table.actor[order]) == 0]
    if not len(gap):               # persons are not followed: the frames of a video that have boxes
        video, frame = np.unique(np.column_stack([table.video, table.frame]), axis=0).T
        gap = np.diff(frame)[np.diff(video) == 0]
    if not len(gap) and len(np.unique(table.video)) > 1:
        return (f"{len(table.box)} boxes, in one frame of each video: key frames? use --preset ava "
                "(check: --key-frames), or --fill 1 to take them as they are")
    if (gap > 1).sum() * 2 <= len(gap):
        return ""
    usual = np.bincount(gap).argmax()
    each = "each" if (gap == usual).all() else "most of them"
    return (f"{len(table.box)} boxes, {each} {usual} frames from the next: key frames? use "
            f"--preset ava (check: --key-frames), or --fill {usual} to interpolate (--fill 1 takes "
            "them as they are)")


def class_counts(table):
    """(C,) boxes and (C,) actors of each class; for key frames each box is an actor of its own."""
    row, label = np.nonzero(table.label)
    pairs = np.unique(np.column_stack([table.actor[row], label]), axis=0)      # (pairs, 2)
    return table.label.sum(axis=0), np.bincount(pairs[:, 1], minlength=len(table.classes))


def class_lines(train, val):
    """Lines to print: boxes and actors of each class in the tables of both sides, and the classes
    that only one of them, or neither, has."""
    (train_boxes, train_actors), (val_boxes, val_actors) = class_counts(train), class_counts(val)
    width = max(map(len, train.classes))
    lines = [f"{'class':{width}}  training boxes  actors  validation boxes  actors"]
    for c, name in enumerate(train.classes):
        lines.append(f"{name:{width}} {train_boxes[c]:15} {train_actors[c]:7} {val_boxes[c]:17} "
                     f"{val_actors[c]:7}")
    for words, found in (("in training only", (train_boxes > 0) & (val_boxes == 0)),
                         ("in validation only", (train_boxes == 0) & (val_boxes > 0)),
                         ("without boxes", (train_boxes == 0) & (val_boxes == 0))):
        names = [train.classes[c] for c in np.flatnonzero(found)]
        if names:
            lines.append(f"classes {words}: {len(names)} of {len(train.classes)}: {some(names)}")
    return lines


# --- annotation files

@dataclass
class Annotated:
    """The annotation of one video of UCF101-24 or JHMDB51-21."""
    num_frames: int
    size: tuple                    # height, width
    tubes: list                    # (frames (n,), boxes (n, 4), class id from 1)


def read_annots_mat(path):
    """finalAnnots.mat of the corrected UCF101-24 -> {video: Annotated}.

    x, y, w, h (x, y from 1) -> x, y, x + w, y + h, not shifted.
    """
    try:
        annotated = {}
        for entry in loadmat(path)["annot"][0]:
            tubes = []
            for tube in entry["tubes"].reshape(-1):                            # (1, n) -> (n,)
                boxes = tube["boxes"].astype(np.float64).reshape(-1, 4)        # uint8 overflows
                boxes[:, 2:] += boxes[:, :2]
                frames = np.arange(tube["sf"].item(), tube["ef"].item() + 1)
                if len(frames) != len(boxes):
                    raise ValueError(f"a tube of {len(frames)} frames has {len(boxes)} boxes")
                tubes.append((frames, boxes, tube["class"].item()))
            name, count = str(entry["name"][0]), entry["num_imgs"].item()
            annotated[name] = Annotated(count, (240, 320), tubes)
        return annotated
    except Exception as error:     # whatever the reader raises on a damaged or foreign file
        raise ValueError(f"{path} cannot be read ({error!r}); get finalAnnots.mat again") from error


# All that a pickle of numpy arrays names; numpy moved its modules in version 2.
ADMITTED = {("numpy", "ndarray"): np.ndarray, ("numpy", "dtype"): np.dtype,
            ("_codecs", "encode"): str.encode}
for _core in ("numpy.core", "numpy._core"):
    ADMITTED[_core + ".multiarray", "_reconstruct"] = np.zeros(1).__reduce__()[0]
    ADMITTED[_core + ".multiarray", "scalar"] = np.float64(0).__reduce__()[0]
    ADMITTED[_core + ".numeric", "_frombuffer"] = np.zeros(1).__reduce_ex__(5)[0]


class PlainUnpickler(pickle.Unpickler):
    """Admits numpy arrays and plain containers; anything else that a pickle names is an error and
    is not executed."""

    def find_class(self, module, name):
        if (module, name) not in ADMITTED:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which was not executed")
        return ADMITTED[module, name]


def read_gttubes(path):
    """JHMDB-GT.pkl or UCF101v2-GT.pkl -> (class names, splits, {video: Annotated}); a split is its
    training videos and its test videos."""
    try:
        with open(path, "rb") as file:
            content = PlainUnpickler(file, encoding="latin1").load()
        annotated = {}
        for video, count in content["nframes"].items():
            tubes = []
            for label, several in content["gttubes"].get(video, {}).items():
                for tube in several:
                    frames, *corners = tube.T                                  # (n, 5) -> 5 of (n,)
                    tubes.append((frames, np.stack(corners, axis=1).reshape(-1, 4), label + 1))
            annotated[video] = Annotated(count, content["resolution"][video], tubes)
        splits = list(zip(content["train_videos"], content["test_videos"]))
        return content["labels"], splits, annotated
    except Exception as error:     # whatever a damaged or foreign pickle makes it raise
        raise ValueError(f"{path} is no annotation of numpy arrays and plain containers: "
                         f"{error!r}; get it again from where the data set is published") from error


def read_rows(path):
    """A csv of AVA's columns -> (video names (R,), rows (R,) without their video, problems)."""
    names, fields = [], []
    columns, words, fractions = [], [], []         # faults: (number of the row, what is wrong)
    widths, semicolons = Counter(), 0
    for line, row in read_csv(path):
        widths[len(row)] += 1
        if len(row) not in (2, 8):
            semicolons += ";" in "".join(row)
            columns.append((line, f"columns: {len(row)}, not 8 (video, frame, x1, y1, x2, y2, "
                            "class id, person), nor the first 2, for a frame with nobody in it"))
            continue
        try:
            frame, *numbers = map(float, row[1:])
        except ValueError as error:
            words.append((line, error))
            continue
        if not frame.is_integer() or abs(frame) > 2 ** 53:
            fractions.append((line, f"frame {row[1]!r} is no whole number"))
            continue
        *box, label, person = numbers or [np.nan] * 6
        if numbers and not math.isfinite(person):
            words.append((line, f"{row[7]!r} in the last column is no number"))
            continue
        names.append(row[0])
        fields.append((0, frame, person, box, label, line))

    usual = max(widths, key=widths.get, default=8)
    shape = {1: "something else than commas between the columns",
             7: "the last column, the person, left out",
             9: "a column too many, a row number or a score"}.get(usual, "")
    if semicolons * 2 > len(columns):
        shape = ("semicolons between the columns, as of Excel where numbers have decimal commas; "
                 "save it with commas, and points in numbers")
    header = "names in place of numbers; a class is its line in the class list, from 1"
    if [line for line, _ in words] == [1]:
        header = "a header line; the format has none: delete it"
    problems = []
    for kind, faults, cause in (("row of another number of columns", columns, shape),
                                ("row with a word for a number", words, header),
                                ("row whose frame is no whole number", fractions, "")):
        if faults:
            places = [f"{path} row {line}: {fault}" for line, fault in faults[:3]]
            problems.append(problem(kind, places, cause, len(faults)))
    return np.array(names, str), np.array(fields, ROW), problems


def read_label_map(path):
    """{id: name} of a .pbtxt label map such as AVA's."""
    items = re.findall(r'name:\s*"([^"]*)"\s*(?:label_)?id:\s*(\d+)', read_text(path))
    if not items:
        raise ValueError(f"{path} has no item {{ name: ... id: ... }}; it is no label map")
    return {int(number): name for name, number in items}


# --- frames, a file each

def read_image(path, least=(4096, 4096)):
    """An image file as an RGB image, upright; a JPEG above twice `least` (width, height) is decoded
    at a half or less."""
    try:
        with Image.open(path) as file:
            turned = file.getexif().get(0x0112)            # EXIF's orientation, from 1 to 8
            if turned not in range(1, 9):
                turned = 1
            width, height = least[::-1] if turned > 4 else least
            file.draft("RGB", (2 * width, 2 * height))
            image = ImageOps.exif_transpose(file) if turned > 1 else file
            if image.mode.startswith("I"):                 # 16 bits of grey, convert clips them
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            return image.convert("RGB")
    except FileNotFoundError:
        raise
    except (OSError, SyntaxError, ValueError) as error:    # Pillow's SyntaxError is a broken PNG
        raise OSError(f"cannot read the image {path}: {error}; extract it again") from error


def frame_name(stem):
    """What the files of a video's frames are called: 00001.jpg, img_00001.jpg (mmaction2),
    NAME_000001.jpg (SlowFast). A number alone does not make a file a frame: thumb_1.jpg."""
    return re.compile(rf"(|img_|image_?|frame_?|{re.escape(stem)}_)(\d+)(\.jpe?g|\.png)",
                      re.IGNORECASE)


@dataclass(frozen=True)
class FrameFolder:
    """How the frames of a video in a folder are called and counted."""
    folder: Path
    prefix: str
    digits: int                    # a number is filled up with zeros to so many
    suffix: str
    first: int                     # the number of the first frame, 0 or 1
    count: int                     # frames up to the highest number, whether they are there or not

    def path(self, index):
        """File of a frame, its index counted from 0."""
        number = f"{index + self.first:0{self.digits}d}"
        return self.folder / f"{self.prefix}{number}{self.suffix}"


def has_frames(folder, stem):
    """Whether a folder holds a frame of the video."""
    if not folder.is_dir():
        return False
    name = frame_name(stem)
    with os.scandir(folder) as entries:
        return any(name.fullmatch(entry.name) for entry in entries)


def read_folder(folder, stem):
    """The FrameFolder of a folder. Of names of several kinds, the kind with most files is it."""
    kinds, name = {}, frame_name(stem)             # (prefix, suffix) -> numbers as written
    for file in sorted(os.listdir(folder)):
        match = name.fullmatch(file)
        if match:
            prefix, number, suffix = match.groups()
            kinds.setdefault((prefix, suffix), []).append(number)
    (prefix, suffix), written = max(kinds.items(), key=lambda kind: len(kind[1]))
    numbers = sorted(map(int, written))
    for number, following in itertools.pairwise(numbers):
        if number == following:
            raise ValueError(f"{folder} holds two files of frame {number} ({prefix}...{suffix}); "
                             "delete one of them")
    first = min(1, numbers[0])
    return FrameFolder(folder, prefix, min(map(len, written)), suffix, first,
                       numbers[-1] + 1 - first)


# --- video files

# Codecs of which every packet is one picture that is shown, if it is not interlaced. Not MPEG-4 and
# VP8: there a packet may be a picture that is skipped or hidden.
PICTURE_A_PACKET = ("h264", "hevc", "vp9", "av1", "libdav1d")
NEAR_START = 32                    # frames so near to the start are read without a seek


@contextlib.contextmanager
def open_video(path):
    """(container, stream of pictures) of a video file; errors name the file and what is wrong."""
    import av
    if not Path(path).is_file():
        if re.match(r"[A-Za-z][\w+.-]+:/", str(path)) or str(path).isdigit():
            raise OSError(f"{path} is a stream or a camera, and only files are read: record it to "
                          "a file first, for instance with ffmpeg")
        if Path(path).exists():
            raise OSError(f"{path} is a folder or a device, not a video file")
        raise FileNotFoundError(f"video missing: {path}")
    try:
        with av.open(str(Path(path).absolute())) as container:     # a bare "a:b.mp4" would be a URL
            stream = container.streams.best("video")
            if stream is None or stream.disposition & av.stream.Disposition.attached_pic:
                raise OSError(f"{path} holds no video stream, sound alone perhaps; give a file "
                              "with pictures")
            yield container, stream
    except av.FFmpegError as error:
        raise OSError(f"{path} cannot be read as a video ({error}); is it whole? Or convert it "
                      "with ffmpeg") from error


def mean_rate(stream):
    return float(stream.average_rate or stream.guessed_rate or 25)


def video_rate(path):
    """Frames per second of a video file, the mean of those that come at uneven times."""
    with open_video(path) as (_, stream):
        return mean_rate(stream)


class Converter:
    """Makes of decoded frames of a stream pictures (H, W, 3) uint8, all of one size, turned as a
    player shows them.

    A display matrix [[a, b, .], [c, d, .], [...]] moves what is stored at column p, row q to column
    a p + c q, row b p + d q: mirrored where the factor is negative. Other angles than quarter turns
    are taken as the nearest one.
    """

    def __init__(self, stream):
        from av.video.reformatter import VideoReformatter
        # One for all frames: each has threads, and a frame that is freed late would keep its own
        # alive, even into processes that are forked, where nothing can join them.
        self.reformatter = VideoReformatter()
        self.size = (stream.codec_context.width or None, stream.codec_context.height or None)
        self.matrix = None

    def __call__(self, frame):
        if self.matrix is None:                            # of the first frame, for all of them
            self.matrix = np.eye(3, dtype=np.int32)
            for data in frame.side_data:
                if data.type.name == "DISPLAYMATRIX":
                    self.matrix = np.frombuffer(data, np.int32).reshape(3, 3).copy()
        picture = self.reformatter.reformat(frame, *self.size, "rgb24").to_ndarray()
        (a, b, _), (c, d, _), _ = self.matrix.tolist()
        if abs(b) > abs(a):                                # columns become rows
            picture, a, d = picture.transpose(1, 0, 2), c, b
        return np.ascontiguousarray(picture[::-1 if d < 0 else 1, ::-1 if a < 0 else 1])


def timed_frames(path):
    """(decoded frame, seconds from the first, Converter) of a video file in the order shown.

    The decoder sorts the frames; time stamps are not relied on for their order. Seconds grow from
    frame to frame: where stamps jump back (joined files), time goes on behind the frame before.
    """
    with open_video(path) as (container, stream):
        stream.thread_type = "AUTO"
        convert, step = Converter(stream), 1 / mean_rate(stream)
        without_pts = container.format.name == "avi"       # its stamps are in the order of decoding
        broadcast = container.format.name in ("mpegts", "mpeg")
        seconds, shift, last = -step, 0.0, None
        for frame in container.decode(stream):
            stamp = frame.dts if without_pts else frame.pts
            if stamp is None:
                seconds += step
            else:
                time = float(stamp * stream.time_base)
                if last is None or time < last or (broadcast and time > last + 10):
                    shift = seconds + step - time          # the first, or another file joined to it
                last = time
                seconds = time + shift if time + shift > seconds else seconds + step
            yield frame, seconds, convert


def video_frames(path):
    """The frames of a video file, decoded in a stream, in the order a player shows them: (picture
    (H, W, 3) uint8, upright; seconds from the first frame, never going back)."""
    for frame, seconds, convert in timed_frames(path):
        yield convert(frame), seconds


def not_whole(path, decoded):
    """What is to be said of a video file of which so many frames can be decoded, "" for nothing. A
    decoder ends in silence where a file breaks off; a few frames too many are announced of any part
    that was cut without encoding it again."""
    with open_video(path) as (_, stream):
        announced = stream.frames                          # 0 where the file does not tell
    if decoded >= 0.9 * announced:
        return ""
    return f"note: {path}: {announced} frames announced, {decoded} decoded: is it whole?"


@cache
def packet_stamps(path):
    """(time stamps (n,) of the frames in the order shown, those of key frames, seconds of a unit),
    without decoding; None for a file whose packets may not tell which pictures are shown."""
    with open_video(path) as (container, stream):
        if not container.format.name.startswith(("mov,", "matroska,")):
            return None
        if stream.codec_context.name not in PICTURE_A_PACKET:
            return None
        first = next(container.decode(stream), None)
        if first is None or first.interlaced_frame:        # a packet may be half a picture
            return None
        first_stamp = first.pts
    with open_video(path) as (container, stream):
        stamps, keys = [], []
        for packet in container.demux(stream):
            if not packet.size:
                continue
            if packet.pts is None or packet.is_discard or packet.is_corrupt:
                return None
            stamps.append(packet.pts)
            if packet.is_keyframe:
                keys.append(packet.pts)
        ordered = np.sort(np.array(stamps, np.int64))
        whole = stamps and first_stamp == ordered[0] and ordered[0] in keys    # from its start on
        if not whole or len(set(stamps)) < len(stamps):
            return None
        return ordered, np.sort(np.array(keys, np.int64)), float(stream.time_base)


@cache
def frame_times(path):
    """Seconds (n,) of the n frames of a video file from the first one, in the order shown."""
    known = packet_stamps(path)
    if known:
        stamps, _, unit = known
        return (stamps - stamps[0]) * unit
    return np.array([seconds for _, seconds, _ in timed_frames(path)])


def frames_at_rate(path, rate):
    """Numbers (K,) from 0 of the frames that AVA takes from a video file: so many a second, from
    AVA_START on where the file is the whole film, each time the nearest frame."""
    times = frame_times(path)
    if not len(times):
        return np.zeros(0, np.int64)
    begin = AVA_START if times[-1] > AVA_LENGTH + 1 else 0
    count = int(min(times[-1] - begin, AVA_LENGTH) * rate + 1)
    wanted = begin + np.arange(count) / rate
    return np.searchsorted((times[1:] + times[:-1]) / 2, wanted)


def seek_frames(path, index, stamps, keys):
    """What `read_frames` returns, decoded from the key frame before the first; None unless the
    frames found are exactly those that are expected by their stamps."""
    expected = stamps[index[0]:index[-1] + 1]
    key = keys[keys <= expected[0]][-1]
    wanted, pictures, count = set(index.tolist()), [], 0
    with open_video(path) as (container, stream):
        convert = Converter(stream)
        container.seek(int(key), stream=stream)
        for frame in container.decode(stream):
            if not count and (frame.pts is None or frame.pts < expected[0]):
                continue
            if frame.pts != expected[count] or frame.is_corrupt:
                return None
            if index[0] + count in wanted:
                pictures.append(convert(frame))
            count += 1
            if count == len(expected):
                return pictures
    return None


def read_frames(path, index):
    """Pictures (H, W, 3) uint8, a list, of frames of a video file: `index` (ascending, from 0)."""
    known = packet_stamps(path) if index[0] >= NEAR_START else None
    if known and index[-1] < len(known[0]):
        pictures = seek_frames(path, index, *known[:2])
        if pictures is not None:
            return pictures
    wanted, pictures, count = set(index.tolist()), [], 0
    with open_video(path) as (container, stream):
        convert = Converter(stream)
        for frame in container.decode(stream):
            if count in wanted:
                pictures.append(convert(frame))
            count += 1
            if len(pictures) == len(wanted):
                return pictures
    raise OSError(f"{path} has {count} frames, frame {index[-1] + 1} is annotated; is it another "
                  "cut, or not whole?")


# --- where the pixels are

@dataclass
class FrameSource:
    """Where the pixels of each video are: frames in a folder, or else a video file."""
    root: Path
    folders: dict                  # video -> folder of its frames
    files: dict                    # video -> its file, of those without frames
    rate: int | None = None        # frames a second to take from a file; None: all
    known: dict = field(default_factory=dict, repr=False)          # video -> FrameFolder, once read
    sought: bool = True            # whether any video was looked for

    def __str__(self):
        words = []
        if self.folders:
            first = self.path(next(iter(self.folders)), 1)
            words.append(f"videos as frames: {len(self.folders)} ({first}, ...)")
        if self.files:
            words.append(f"as files: {len(self.files)}")
        if not self.sought:
            return "no video was looked for"
        return ", ".join(words) or f"NO frames or videos below {self.root}"

    def __contains__(self, video):
        return video in self.folders or video in self.files

    def frame_folder(self, video):
        """The FrameFolder of a video in `folders`."""
        if video not in self.known:
            self.known[video] = read_folder(self.folders[video], Path(video).name)
        return self.known[video]

    def path(self, video, number):
        """File of a frame, counted from 1, of a video in `folders`."""
        return self.frame_folder(video).path(number - 1)

    def read(self, video, index, expected=1, least=(4096, 4096)):
        """RGB images of the frames `index` (ascending, from 0) of a video that should have
        `expected` frames; `least` as in `read_image`."""
        if video not in self:
            raise FileNotFoundError(f"no frames and no video file of {video} below {self.root}; "
                                    f"{where_looked(video)}; is it the data set's folder (--data)?")
        if video in self.files:
            file = self.files[video]
            if self.rate:
                taken = frames_at_rate(file, self.rate)
                if index[-1] >= len(taken):
                    raise OSError(f"{file} has {len(taken)} frames at {self.rate} a second, frame "
                                  f"{index[-1] + 1} is annotated; is it another cut?")
                index = taken[index]
            distinct, again = np.unique(index, return_inverse=True)
            pictures = read_frames(file, distinct)
            return [Image.fromarray(pictures[i]) for i in again]
        frames = self.frame_folder(video)
        try:
            return [read_image(frames.path(int(i)), least) for i in index]
        except FileNotFoundError as error:
            present = sum(path.suffix == frames.suffix for path in frames.folder.glob("*"))
            raise FileNotFoundError(f"frames missing: {error.filename} ({expected} expected, "
                                    f"{present} found); extract them with python -m tools.prepare "
                                    "extract") from None

    def count(self, video):
        """Number of the last frame that there is of a video, 0 without any."""
        if video in self.folders:
            return self.frame_folder(video).count
        if video not in self.files:
            return 0
        if self.rate:
            return len(frames_at_rate(self.files[video], self.rate))
        return len(frame_times(self.files[video]))

    def size(self, video):
        """(height, width) of the first frame of a video, upright."""
        return self.read(video, np.zeros(1, np.int64))[0].size[::-1]


def video_files(root):
    """The video files below a folder, in order. Trees of frames and hidden files are left out, and
    what visualize.py drew (an MP4 beside a tubes.json)."""
    found = {}
    for folder, folders, names in os.walk(root, followlinks=True):
        folders[:] = sorted(set(folders) - set(FRAME_FOLDERS))     # which of them to walk through
        for name in names:
            suffix = Path(name).suffix.lower()
            drawn = suffix == ".mp4" and "tubes.json" in names
            if suffix in VIDEO_SUFFIXES and not name.startswith(".") and not drawn:
                path = Path(folder, name)
                found.setdefault(path.resolve(), path)     # a link to a file is no second file
    return sorted(found.values())


def find_source(root, videos, rate=None):
    """Looks below root for the frames of these videos, or else for their files -> FrameSource; an
    error if a video is there twice."""
    trees = [root / name for name in FRAME_FOLDERS if (root / name).is_dir()]
    folders = {}
    for video, tree in itertools.product(videos, trees):
        folder = tree / video
        if has_frames(folder, Path(video).name):
            if video in folders and not folder.samefile(folders[video]):
                raise ValueError(f"{folders[video]} and {folder} both hold frames of {video}; move "
                                 "one of them away")
            folders[video] = folder
    wanted = [video for video in videos if video not in folders]
    files = find_files(root, wanted) if wanted else {}
    return FrameSource(root, folders, files, rate, sought=len(videos) > 0)


def find_files(root, videos):
    """{video: file} of the videos that have a file below root, by its name (and folder, as in
    Biking/v_a); an error if a video has several."""
    named = {}
    for path in video_files(root):
        named.setdefault(path.stem, []).append(path)
        named.setdefault(f"{path.parent.name}/{path.stem}", []).append(path)
    taken = {path for video in videos if "/" in video for path in named.get(video, ())}
    files = {}
    for video in videos:
        found = named.get(video, [])
        if not found:              # perhaps not in a folder of its class; of no other video then
            found = [path for path in named.get(Path(video).name, ()) if path not in taken]
        if len(found) > 1:
            raise ValueError(f"several video files are called {video}: {some(found)}; rename or "
                             "move all but one")
        if found:
            files[video] = found[0]
    return files


def find_file(root, *names, needed=True):
    """The first of these files that is in root or root/annotations; None where there is none and
    none is needed."""
    for name, folder in itertools.product(names, (root, root / "annotations")):
        if (folder / name).is_file():
            return folder / name
    if needed:
        there = {path.name for folder in (root, root / "annotations") for path in folder.glob("*")}
        near = ""
        for name in names:
            near = near or nearest(name, there)
        if near.endswith((".xlsx", ".xls", ".ods", ".numbers")):
            near += ": save it as CSV UTF-8 (comma delimited)"
        raise FileNotFoundError(f"{' or '.join(names)} missing in {root} and {root}/annotations"
                                f"{near}; is it the data set's folder (--data)?")
    return None


def where_looked(video):
    """Where the pixels of a video are looked for, in words."""
    name = Path(video).name
    return (f"frames are looked for as frames/{video}/00001.jpg (in {', '.join(FRAME_FOLDERS)}), a "
            f"video file as {name}.mp4 in any folder ({', '.join(VIDEO_SUFFIXES)})")


def nearest(name, names):
    """", the nearest is ..." where a name is like one of `names`, else nothing."""
    close = difflib.get_close_matches(name, sorted(names), n=1)
    if not close:
        return ""
    said = f", the nearest is {close[0]}"
    if unicodedata.normalize("NFC", name) == unicodedata.normalize("NFC", close[0]):
        said += ", with accents of other code points (NFD, as on a Mac): rename it"
    return said


def choose_videos(videos, source, missing, alone):
    """The videos to take of a list -> (videos, what is to be said of the others, problems).

    alone: where there are no pixels at all, the annotation may be taken alone, to score with it.
    """
    kept = [video for video in videos if video in source]
    lost = [video for video in videos if video not in source]
    if not lost or (alone and missing == "error" and not kept):
        return videos, "", []
    if missing == "leave out" and kept:
        return kept, f"; videos without frames left out: {len(lost)} ({some(lost)})", []
    there = {path.stem for path in video_files(source.root)}
    for name in FRAME_FOLDERS:
        there.update(path.name for path in source.root.glob(f"{name}/*"))
    places = [f"{video}{nearest(Path(video).name, there)}" for video in lost]
    cause = ("a name that is written in another way, or a video that could not be had; "
             f"{where_looked(lost[0])}; or leave such videos out with --missing leave-out")
    return kept, "", [problem("video without frames and without a file", places, cause)]


# --- data sets

def read_ucf_lists(root, annotated):
    """The videos of UCF101-24's lists -> (training, test); without trainlist01.txt the annotated
    ones that are not in testlist01.txt are for training."""
    suffix = re.compile(r"\.\w+( +\d+)?$")                 # v_a.avi 3: of a file, and a class id
    test = [suffix.sub("", line) for line in read_list(find_file(root, "testlist01.txt"))]
    path = find_file(root, "trainlist01.txt", needed=False)
    if path is None:
        return sorted(set(annotated) - set(test)), test
    return [suffix.sub("", line) for line in read_list(path)], test


def read_tube_set(name, root, side, fold, missing):
    """UCF101-24 or JHMDB51-21 -> (Table, FrameSource) of a side of one of its splits."""
    files = ["JHMDB-GT.pkl"] if name == "jhmdb" else ["finalAnnots.mat", "UCF101v2-GT.pkl"]
    path = find_file(root, *files)
    if path.suffix == ".mat":
        annotated = read_annots_mat(path)
        classes, splits = UCF_CLASSES, [read_ucf_lists(root, annotated)]
    else:
        classes, splits, annotated = read_gttubes(path)
    if fold not in range(1, len(splits) + 1):
        raise ValueError(f"{name} has the splits 1 to {len(splits)}, not {fold!r}; choose one with "
                         "--split")
    train, test = splits[fold - 1]
    listed = list(dict.fromkeys(train if side == "train" else test))
    known = [video for video in listed if video in annotated]
    source = find_source(root, known)
    videos, left_out, problems = choose_videos(known, source, missing, alone=True)
    if not known:
        problems.append(f"{name} split {fold}, {side}: none of the {len(listed)} listed videos is "
                        f"in {path}, the set is empty")

    rows, person = [np.zeros(0, ROW)], 0
    for i, video in enumerate(videos):
        for frames, boxes, label in annotated[video].tubes:
            rows.append(make_rows(i, frames, person, boxes, label))
            person += 1
    num_frames = np.array([annotated[video].num_frames for video in videos], np.int64)
    size = np.array([annotated[video].size for video in videos], np.int64).reshape(-1, 2)
    unknown = len(listed) - len(known)
    words = f"{path}, {unknown} of the {len(listed)} listed videos not annotated and left out"
    table = Table(list(classes), videos, num_frames, size, words + left_out, problems)
    return add_boxes(table, np.concatenate(rows), path, size, persons=True), source


def read_ava_rows(root, side):
    """What `read_own_rows` returns, of AVA v2.2: without the seconds that are excluded."""
    path = find_file(root, f"ava_{side}_v2.2.csv")
    names, rows, problems = read_rows(path)
    listed = find_file(root, f"ava_{side}_excluded_timestamps_v2.2.csv", needed=False)
    excluded = set()
    for line, row in read_csv(listed) if listed else ():
        try:
            excluded.add((row[0], float(row[1])))
        except (IndexError, ValueError) as error:
            raise ValueError(f"{listed} row {line}: {row} is not a video and a second") from error
    keys = zip(names.tolist(), rows["frame"].tolist())
    kept = np.array([key not in excluded for key in keys], bool)
    return path, names, rows, kept, listed or "no list of excluded seconds", problems


def read_own_rows(root, side):
    """Your own annotation -> (its path, video names (R,), rows (R,), which of them are of the side
    (R,), the list that says so, problems)."""
    path, listed = find_file(root, "annotations.csv"), find_file(root, "val.txt")
    names, rows, problems = read_rows(path)
    val, annotated = set(read_list(listed)), set(names.tolist())
    kept = np.isin(names, sorted(val)) == (side == "val")
    if not problems:               # else the rows that cannot be read may be what is missed here
        places = [f"{listed}: {video} is not in {path}{nearest(video, annotated)}"
                  for video in sorted(val - annotated)]
        if places:
            problems.append(problem("validation video without annotation", places))
        if len(names) and not kept.any():
            fault = "no video of {}: none is left for validation"
            if side == "train":
                fault = "every video of {}: none is left for training"
            problems.append(f"{listed} lists {fault.format(path)}")
    return path, names, rows, kept, listed, problems


def read_csv_set(name, root, side, key_frame, missing):
    """AVA v2.2 or your own data (docs/own_data.md) -> (Table, FrameSource) of a side."""
    ava = name == "ava"
    if ava and not key_frame:
        raise ValueError("ava is annotated at key frames only; use a preset of key frames "
                         "(--set key_frame=true)")
    read_rows = read_ava_rows if ava else read_own_rows
    path, names, rows, kept, by, problems = read_rows(root, side)
    words = f"{path} without {(~kept).sum()} rows by {by}"
    names, rows = names[kept], rows[kept]

    listed = np.unique(names).tolist()
    source = find_source(root, listed, AVA_RATE if ava else None)
    videos, left_out, lost = choose_videos(listed, source, missing, alone=ava)
    there = np.isin(names, videos)
    names, rows = names[there], rows[there]
    rows["video"] = np.searchsorted(np.array(videos, str), names)
    num_frames = [source.count(video) for video in videos if video in source]
    size = [source.size(video) for video in videos if video in source]
    if videos and not num_frames:  # the annotation alone: boxes stay shares of the frame
        num_frames, size = [AVA_LENGTH * AVA_RATE] * len(videos), [(1, 1)] * len(videos)
    table = Table(read_class_names(name, root), videos, np.array(num_frames, np.int64),
                  np.array(size, np.int64).reshape(-1, 2), words + left_out, problems + lost, ava)
    return add_boxes(table, rows, path, np.ones_like(table.size), persons=not key_frame), source


def read_class_names(name, root):
    """The class names of a data set in a folder, without reading its annotation."""
    known = {"ucf": UCF_CLASSES, "jhmdb": JHMDB_CLASSES, "ava": AVA_CLASSES_80}
    if name in known:
        return list(known[name])
    path = find_file(Path(root), "classes.txt")
    classes = read_list(path)
    twice = [name for name, count in Counter(classes).items() if count > 1]
    if twice:
        raise ValueError(f"{path} lists {some(twice)} twice; it has one line for each class")
    if not classes:
        raise ValueError(f"{path} lists no class; it has one line for each class")
    return classes


def read_dataset(name, root, side, key_frame, fold=1, missing="error", fill=0):
    """The boxes and the pixels of a data set in a folder -> (Table, FrameSource).

    name: "ucf", "jhmdb", "ava" or "custom" (docs/own_data.md). side: "train" or "val". key_frame:
    whether boxes are wanted at key frames or at every frame. fold: which of the splits, of which
    jhmdb has three, the others one. missing: "error", or "leave out" for videos without frames and
    without a file. fill: interpolates between boxes of a person that are so many frames apart or
    less; 1 takes boxes as they are, 0 makes it a fault if most of them are apart.
    Faults of the annotation are in table.problems; raises what the top of this file says.
    """
    if name not in ("ucf", "jhmdb", "ava", "custom"):
        raise ValueError(f"no data set {name!r}; there are synthetic, ucf, jhmdb, ava and custom "
                         "(docs/own_data.md)")
    if side not in ("train", "val"):
        raise ValueError(f'the sides of {name} are "train" and "val", not {side!r}')
    if name in ("ava", "custom") and fold != 1:
        raise ValueError(f"{name} has one split, 1, not {fold!r}")
    if missing not in ("error", "leave out"):
        raise ValueError(f'missing videos are an "error" or to "leave out", not {missing!r}')
    if fill < 0 or (fill and key_frame):
        raise ValueError(f"fill {fill}: it must be at least 0, and 0 with key frames, whose boxes "
                         "are taken as they are")
    if not root or not Path(root).is_dir():
        raise FileNotFoundError(f"--data {root}: no such folder; it holds annotation and frames "
                                f"(or videos) of {name}")
    if name in ("ucf", "jhmdb"):
        table, source = read_tube_set(name, Path(root), side, fold, missing)
    else:
        table, source = read_csv_set(name, Path(root), side, key_frame, missing)
    if not key_frame and not table.problems:
        if fill > 1:
            table = fill_gaps(table, fill)
        sparse = sparse_boxes(table)
        if sparse and fill != 1:
            table.problems.append(sparse)
    return table, source
