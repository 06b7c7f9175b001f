"""Gets a data set ready: frames out of videos, and everything checked before hours of training.

    python -m tools.prepare extract --dataset ucf --data DIR    # videos below it -> frames
    python -m tools.prepare check --dataset ucf --data DIR      # exit status 0: may be trained on
    python -m tools.prepare convert FILE --data DIR             # CVAT or COCO: tools/convert.py

`extract` works on as many videos at once as there are cores. A video's frames are in a folder of
another name until all of them are there: a run that was ended goes on with the next video when it
is started again.
`check` reads every annotation and every frame. It prints what the data set holds, boxes and actors
of each class, and each kind of fault with its count, its first places and its likely cause. It
compares the counts with those published (a part of a data set may be trained on: another count is
no fault) and draws clips with their boxes, as training reads them.
"""
# T frames, N actors, C classes, V videos

import argparse
import os
import shutil
import signal
import sys
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from beside import sources
from tools.convert import convert

# (data set, split, side): videos, tubes, boxes, frames; the splits of ucf and jhmdb
PUBLISHED = {("ucf", 1, "train"): (2284, 3143, 403282, 395868),
             ("ucf", 1, "val"): (910, 1315, 170580, 159289),
             ("jhmdb", 1, "train"): (660, 660, 22713, 22713),
             ("jhmdb", 1, "val"): (268, 268, 9139, 9139),
             ("jhmdb", 2, "train"): (658, 658, 22895, 22895),
             ("jhmdb", 2, "val"): (270, 270, 8957, 8957),
             ("jhmdb", 3, "train"): (663, 663, 22807, 22807),
             ("jhmdb", 3, "val"): (265, 265, 9045, 9045)}
SPLITS = {"ucf": 1, "jhmdb": 3, "ava": 1, "custom": 1}     # how many there are
# where extract puts the frames of a video and what it calls them
LAYOUTS = {"ucf": ("rgb-images/{group}/{stem}", "{:05d}.jpg"),
           "jhmdb": ("Frames/{group}/{stem}", "{:05d}.png"),
           "ava": ("frames/{stem}", "{stem}_{:06d}.jpg"), "custom": ("frames/{stem}", "{:05d}.jpg")}
# kinds of faults and what they likely come from
CAUSES = {"frames missing": "an extraction or a copy that was ended; delete the video's folder and "
                            "run python -m tools.prepare extract",
          "frames of several kinds in one folder": "frames of several sources; name all alike, or "
                                                   "move those away that do not belong to it",
          "class without boxes to train on": "all of its videos are in val.txt, or it has none; "
                                             "move videos, or take it out of classes.txt"}
YELLOW, WHITE = (255, 220, 0), (255, 255, 255)


def cores():
    """How many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count()


def work(function, items, workers):
    """function(item) of each item in their order, by so many processes, with a progress bar."""
    if workers == 1:
        yield from tqdm(map(function, items), "videos", total=len(items), disable=None)
        return
    # not forked: the decoder's threads, which a fork would lose, may be at work already
    with ProcessPoolExecutor(workers, get_context("spawn"), initializer=signal.signal,
                             initargs=(signal.SIGINT, signal.SIG_DFL)) as pool:
        results = pool.map(function, items)
        yield from tqdm(results, "videos", total=len(items), disable=None)


# ---- extract ----

def extract_video(job, pattern, rate):
    """Writes the frames of a video to a folder -> (their number, what went wrong or "", a note of
    frames that are lost or "").

    job: the video's file, the folder. rate: frames a second to take, None for all. Where the video
    cannot be read to its end nothing stays in the folder.
    """
    path, folder = job
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    count, decoded, note = 0, 0, ""
    try:
        # At a rate a frame is taken once, several times or not at all.
        times = np.bincount(sources.frames_at_rate(path, rate)) if rate else None
        for picture, _ in sources.video_frames(path):
            if times is not None and decoded == len(times):
                break
            decoded += 1
            for _ in range(1 if times is None else times[decoded - 1]):
                count += 1
                file = part / pattern.format(count, stem=path.stem)
                Image.fromarray(picture).save(file, quality=95)
        else:                                              # decoded to its end
            note = sources.not_whole(path, decoded)
        if not count:
            raise OSError(f"{path} has no frames")
    except (OSError, ValueError) as error:
        shutil.rmtree(part)
        return 0, str(error), ""
    part.rename(folder)
    return count, "", note


def extract(args):
    """The videos below args.data as a tree of frames; returns the exit status."""
    root = Path(args.data)
    if not root.is_dir():
        raise SystemExit(f"--data {root}: no such folder")
    folder, pattern = LAYOUTS[args.dataset]
    rate = sources.AVA_RATE if args.dataset == "ava" else None
    jobs = {}                                              # folder of frames -> video
    for path in sources.video_files(root):
        target = root / folder.format(group=path.parent.name, stem=path.stem)
        if target in jobs:
            raise SystemExit(f"{path} and {jobs[target]} would both go to {target}; rename one")
        jobs[target] = path
    if not jobs:
        suffixes = ", ".join(sources.VIDEO_SUFFIXES)
        raise SystemExit(f"no videos ({suffixes}) below {root}")
    todo = [(path, target) for target, path in jobs.items() if not target.is_dir()]
    frames, faults, notes = 0, [], []
    extract_one = partial(extract_video, pattern=pattern, rate=rate)
    for count, fault, note in work(extract_one, todo, min(args.workers, max(len(todo), 1))):
        frames += count
        if fault:
            faults.append(fault)
        if note:
            notes.append(note)
    print(*notes, *faults, sep="\n", end="\n" if notes + faults else "")
    print(f"{counted(len(todo) - len(faults), 'video')}, {counted(frames, 'frame')} written below "
          f"{root}; {len(jobs) - len(todo)} were there before; {len(faults)} cannot be read")
    return int(bool(faults))


def counted(number, word):
    """1 fault, 2 faults."""
    if number == 1:
        return f"1 {word}"
    return f"{number} {'boxes' if word == 'box' else word + 's'}"


# ---- check ----

class Faults:
    """What is wrong with a data set: whole texts, and places by their kind."""

    def __init__(self):
        self.texts, self.places = [], {}

    def add(self, kind, place):
        self.places.setdefault(kind, []).append(place)

    def lines(self):
        """A text for each kind of fault; what was said of several sides and splits once."""
        grouped = [sources.problem(kind, places, CAUSES.get(kind, ""))
                   for kind, places in self.places.items()]
        return list(dict.fromkeys([*self.texts, *grouped]))


def check_frames(frames, every, expected):
    """[(kind, place)] of the faults of a FrameFolder; every `every`th frame is decoded.

    expected: number of frames, None if unknown.
    """
    faults, present = [], set(os.listdir(frames.folder))
    wanted = [frames.path(i) for i in range(expected or frames.count)]
    missing = [path for path in wanted if path.name not in present]
    kinds = Counter()                      # (prefix, suffix) of names -> files
    for match in map(sources.frame_name(frames.folder.name).fullmatch, present):
        if match:
            kinds[match[1], match[3]] += 1
    if missing and len(kinds) > 1:
        named = [f"{count} are {prefix}...{suffix}"
                 for (prefix, suffix), count in kinds.most_common()]
        faults.append(("frames of several kinds in one folder",
                       f"{frames.folder}: {', '.join(named)}; {len(wanted)} expected of one kind"))
    elif missing:
        faults.append(("frames missing",
                       f"{missing[0]}, {len(missing)} in all ({len(wanted)} expected, "
                       f"{len(wanted) - len(missing)} found)"))
    for path in wanted[::every]:
        if path.name in present:
            try:
                sources.read_image(path)
            except OSError as error:
                faults.append(("image that cannot be read", str(error)))
    return faults


def check_video(job, source, every):
    """([(kind, place)] of the faults of a video's frames, a note of frames that are lost or "").

    job: the video, its number of frames or None; every: as for `check_frames`.
    """
    video, expected = job
    faults, note = [], ""
    try:
        count = source.count(video)
        if video in source.folders:
            faults = check_frames(source.frame_folder(video), every, expected)
        else:
            file, decoded = source.files[video], 0
            for _ in sources.video_frames(file):           # it can be decoded to its end
                decoded += 1
            note = sources.not_whole(file, decoded)
    except (OSError, ValueError) as error:
        return [("video that cannot be read", str(error))], ""
    if expected not in (None, count) and not faults:
        faults = [("video and annotation disagree",
                   f"{video}: its last frame is {count}, that of the annotation {expected}")]
    return faults, note


def check_side(args, split, side, config, faults, checked):
    """Prints what a side of a split holds and adds to `faults` -> ClipDataset, None without one.

    checked: names of the videos whose frames were read already; added to.
    """
    from data import ClipDataset           # not above: processes that read frames need no torch
    try:
        table, source = sources.read_dataset(args.dataset, args.data, side, config.key_frame,
                                             split, args.missing.replace("-", " "), args.fill)
    except (OSError, ValueError) as error:
        faults.texts.append(str(error))
        return None
    words = {"train": "training", "val": "validation"}[side]
    print(f"{args.dataset} split {split}, {words}: {table.source}; {source}")
    dataset = ClipDataset(args.dataset, table, source, config, augment=False)
    tubes = len(dataset.ground_truth()[1])
    counts = (len(table.videos), tubes, len(table.frame), int(table.num_frames.sum()))
    published = PUBLISHED.get((args.dataset, split, side))
    compared = ""
    if published:
        compared = f"; published: {'the same' if counts == published else describe(published)}"
    print(f"    {describe(counts)}, {counted(len(dataset), 'clip')}{compared}")

    if table.videos and not source.folders and not source.files:
        faults.texts.append(f"{source}; {sources.where_looked('VIDEO')}")
        return dataset
    faults.texts += table.problems
    if table.seconds:                      # AVA: the frames should reach the last annotated second
        last = np.zeros(len(table.videos), np.int64)
        np.maximum.at(last, table.video, (table.frame - sources.AVA_START) * sources.AVA_RATE)
        for v in np.flatnonzero(last >= table.num_frames):
            faults.add("video that ends before its annotation",
                       f"{table.videos[v]}: {table.num_frames[v]} frames, its last annotated "
                       f"second is frame {last[v] + 1}")
    todo = []                              # of your own videos and AVA's the frames are counted
    counted_here = args.dataset in ("ava", "custom")
    for video, count in zip(table.videos, table.num_frames.tolist()):
        if video in source and video not in checked:
            todo.append((video, None if counted_here else count))
            checked.add(video)
    check_one = partial(check_video, source=source, every=args.every)
    notes = []
    for found, note in work(check_one, todo, min(args.workers, max(len(todo), 1))):
        for kind, place in found:
            faults.add(kind, place)
        if note:
            notes.append(note)
    print(*notes, sep="\n", end="\n" if notes else "")
    return dataset


def describe(counts):
    """Numbers of videos, tubes, boxes and frames in words."""
    return ", ".join(map(counted, counts, ("video", "tube", "box", "frame")))


def check_classes(name, train, val, faults):
    """Prints boxes and actors of each class; of your own data each should be trained on."""
    print(f"{len(train.class_names)} classes (num_classes={len(train.class_names)}):")
    print(*sources.class_lines(train.table, val.table), sep="\n")
    if name == "custom" and not train.table.problems:      # a published set may be here in part
        boxes, _ = sources.class_counts(train.table)
        for label in np.flatnonzero(boxes == 0):
            faults.add("class without boxes to train on", train.class_names[label])


def check(args):
    """Whether a data set may be trained on; returns the exit status."""
    from model import PRESETS
    key_frame = args.dataset == "ava" or args.key_frames
    config = replace(PRESETS.get(args.dataset, PRESETS["ucf"]), key_frame=key_frame)
    if args.every is None:
        args.every = sources.AVA_RATE if args.dataset == "ava" else 1
    sheet = args.sheet or Path("runs", f"check-{args.dataset}.png")
    splits = range(1, SPLITS[args.dataset] + 1) if args.split is None else [args.split]
    faults, checked, datasets = Faults(), set(), []
    for split in splits:
        sides = []
        for side in ("train", "val"):
            sides.append(check_side(args, split, side, config, faults, checked))
        if None not in sides:
            check_classes(args.dataset, *sides, faults)
            datasets += sides
    lines = faults.lines()
    if not lines:
        try:
            contact_sheet(datasets, sheet, args.clips)
            print(f"clips with their boxes: {sheet}; look at it")
        except (OSError, ValueError) as error:     # of a frame that --every left out
            faults.add("frame that cannot be read", str(error))
            lines = faults.lines()
    print(*lines, sep="\n", end="\n" if lines else "")
    print(f"{counted(len(lines), 'fault')}: {args.dataset} in {args.data} may "
          f"{'NOT ' if lines else ''}be trained on")
    return int(bool(lines))


# ---- the sheet ----

def font(size):
    """DejaVu Sans, which comes with matplotlib: Latin, Greek, Cyrillic and more."""
    path = Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")
    return ImageFont.truetype(str(path), size)


def draw_frame(picture, target, slot, classes, height):
    """A frame (3, H, W) in this height, with boxes and labels of the target's slot; its number and
    video stand below."""
    image = Image.fromarray(picture.permute(1, 2, 0).numpy())                      # (H, W, 3)
    image = image.resize((round(image.width * height / image.height), height))
    size, letters, line = np.array(image.size), font(height // 16), height // 12
    tile = Image.new("RGB", (image.width, height + line))
    tile.paste(image)
    draw = ImageDraw.Draw(tile)
    places = []                                            # of labels: x, y, width and words
    for actor in target["present"][:, slot].nonzero().flatten().tolist():
        box = target["boxes"][actor, slot].numpy()                                 # cx, cy, w, h
        low, high = (box[:2] - box[2:] / 2) * size, (box[:2] + box[2:] / 2) * size
        draw.rectangle((*low, *high), outline=YELLOW, width=2)
        labels = target["labels"][actor, slot].nonzero().flatten().tolist()
        words = shortened(draw, ", ".join(classes[label] for label in labels), image.width, letters)
        width = draw.textlength(words, letters)
        x = max(0, min(low[0], image.width - width))
        y = low[1] - line if low[1] >= line else min(high[1], height - line)
        for x1, y1, other, _ in sorted(places, key=lambda place: place[1]):
            if abs(y - y1) < line and x1 - width < x < x1 + other:
                y = y1 + line                              # below a label that is there
        places.append((x, y, width, words))
    for x, y, _, words in places:                          # over all boxes
        draw.rectangle(draw.textbbox((x, y), words, letters), fill=(0, 0, 0))
        draw.text((x, y), words, YELLOW, letters)
    words = f"frame {target['frame_ids'][slot]}, {Path(target['video']).name}"
    draw.text((3, height), shortened(draw, words, image.width - 3, letters), WHITE, letters)
    return tile


def shortened(draw, words, width, letters):
    """Words that are cut where they would be wider than `width` pixels."""
    if draw.textlength(words, letters) <= width:
        return words
    while words and draw.textlength(words + "...", letters) > width:
        words = words[:-1]
    return words + "..."


def clip_with_boxes(dataset, start):
    """The first clip from `start` on with a box: (clip, target, slots with boxes), or None."""
    for i in range(start, len(dataset)):
        clip, target = dataset[i]
        slots = target["present"].any(dim=0).nonzero().flatten().tolist()
        if slots:
            return clip, target, slots
    return None


def contact_sheet(datasets, path, rows, columns=6, height=240):
    """Clips of the data sets as training reads them, a row each; a box is on every picture.

    Of a key-frame clip there is one such picture, so these stand side by side.
    """
    tiles = []
    for dataset in datasets:
        wanted = -(-rows // len(datasets))
        if dataset.config.key_frame:
            wanted *= columns
        starts = np.unique(np.linspace(0, len(dataset) - 1, wanted).astype(int)).tolist()
        for start in starts:
            found = clip_with_boxes(dataset, start)
            if found is None:
                break
            clip, target, slots = found
            if dataset.config.key_frame:
                shown = [(clip.shape[1] // 2, 0)]          # of the clip, of the target
            else:
                chosen = np.linspace(0, len(slots) - 1, columns).round().astype(int)
                shown = [(slots[k], slots[k]) for k in chosen]
            for t, slot in shown:
                tiles.append(draw_frame(clip[:, t], target, slot, dataset.class_names, height))
    widest, tallest = max(tile.width for tile in tiles), max(tile.height for tile in tiles)
    sheet = Image.new("RGB", (widest * columns, tallest * -(-len(tiles) // columns)))
    for i, tile in enumerate(tiles):
        sheet.paste(tile, (i % columns * widest, i // columns * tallest))
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)


# ---- options ----

def at_least(least):
    """A type of argparse: a whole number, at least so much."""
    def number(text):
        if int(text) < least:
            raise argparse.ArgumentTypeError(f"{text} must be at least {least}")
        return int(text)
    return number


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m tools.prepare",
                                     description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    adders = {}         # add_argument of a command
    for name, text in (
            ("extract", "turn videos into the tree of frames that training reads"),
            ("check", "find what is wrong with a data set; exit status 0: may be trained on")):
        command = commands.add_parser(name, help=text, description=text)
        add = adders[name] = command.add_argument
        add("--dataset", required=True, choices=sorted(LAYOUTS))
        add("--data", required=True, metavar="DIR", help="the data set's folder")
        add("--workers", type=at_least(1), default=cores(), metavar="N",
            help="processes (default: one a core)")
    add = adders["check"]
    add("--split", type=int, metavar="N", help="one of jhmdb's three splits (default: all)")
    add("--key-frames", action="store_true", help="custom: boxes are at key frames")
    add("--fill", type=at_least(0), default=0, metavar="N",
        help="custom: interpolate a person's boxes that are up to N frames apart; train.py takes "
             "the same option")
    add("--missing", choices=("error", "leave-out"), default="error",
        help="leave-out: do without the videos that have no frames; train.py takes the same")
    add("--every", type=at_least(1), metavar="N",
        help="decode every Nth frame only (default: 1; ava: 30)")
    add("--clips", type=at_least(1), default=12, metavar="N", help="rows of the sheet (12)")
    add("--sheet", type=Path, metavar="FILE", help="the sheet (default: runs/check-DATASET.png)")
    text = "turn annotations of CVAT (video XML 1.1) or COCO into annotations.csv and classes.txt"
    command = commands.add_parser("convert", help=text, description=text)
    command.add_argument("files", nargs="+", type=Path, metavar="FILE")
    command.add_argument("--data", required=True, metavar="DIR", help="where they are written")
    args = parser.parse_args(argv)
    try:
        return {"extract": extract, "check": check, "convert": convert}[args.command](args)
    except KeyboardInterrupt:
        said = "ended"
        if args.command == "extract":
            said += "; started again it goes on with the next video"
        print(said, file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
