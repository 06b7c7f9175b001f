"""Frames out of videos, and a data set's health before hours of training are spent on it.

    python -m tools.prepare extract --dataset ucf --data DIR    # videos below it -> rgb-images/<class>/<video>/00001.jpg
    python -m tools.prepare check --dataset ucf --data DIR      # exit status 0 if it may be trained on, else 1

`extract` works on as many videos at once as there are cores. A video's frames are in a folder of another name until all
of them are there, so that a run that was ended goes on with the next video when it is started again.
`check` reads every annotation and every frame and prints a line for each fault: of the annotation (data.py lists what),
frames that are missing, unreadable or more than the annotation has. It compares the counts with those published (a part
of a data set may be trained on: another count is no fault) and draws clips with their boxes, as training reads them.
"""
# T frames, N actors, C classes

import argparse
import os
import shutil
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from tqdm import tqdm

import data
from model import PRESETS

# (data set, split, training or test): videos, tubes, boxes, frames; all splits of ucf and jhmdb, in the order of check
PUBLISHED = {("ucf", 1, True): (2284, 3143, 403282, 395868), ("ucf", 1, False): (910, 1315, 170580, 159289),
             ("jhmdb", 1, True): (660, 660, 22713, 22713), ("jhmdb", 1, False): (268, 268, 9139, 9139),
             ("jhmdb", 2, True): (658, 658, 22895, 22895), ("jhmdb", 2, False): (270, 270, 8957, 8957),
             ("jhmdb", 3, True): (663, 663, 22807, 22807), ("jhmdb", 3, False): (265, 265, 9045, 9045)}
# where extract puts the frames of a video and what it calls them
LAYOUTS = {"ucf": ("rgb-images/{group}/{stem}", "{:05d}.jpg"), "jhmdb": ("Frames/{group}/{stem}", "{:05d}.png"),
           "ava": ("frames/{stem}", "{stem}_{:06d}.jpg"), "custom": ("frames/{stem}", "{:05d}.jpg")}


def extract_video(path, folder, pattern, rate):
    """Writes the frames of a video to a folder -> (number of frames, what is to be said about it or "").

    Raises OSError where the video cannot be read to its end; nothing stays in `folder` then.
    """
    import av
    stamps, count = data.frame_stamps(path, rate), 0
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        with av.open(str(path)) as container:
            for frame in container.decode(video=0):
                # At a rate a frame is taken once, several times or not at all; otherwise each is, whatever its stamp.
                for _ in range((stamps == frame.pts).sum() if rate else 1):
                    count += 1
                    frame.to_image().save(part / pattern.format(count, stem=path.stem), quality=95)
    except av.FFmpegError as error:
        shutil.rmtree(part)
        raise OSError(f"cannot decode {path} behind frame {count}: {error}; get the file again") from error
    if not count:
        shutil.rmtree(part)
        raise OSError(f"{path} has no frames")
    part.rename(folder)
    return count, "" if count == len(stamps) else f"{path}: {count} frames decoded, {len(stamps)} announced by the file"


def extract(args):
    """The videos below args.data as a tree of frames; returns the exit status."""
    folder, pattern = LAYOUTS[args.dataset]
    rate = data.AVA_RATE if args.dataset == "ava" else None
    jobs = {}
    for path in data.video_files(Path(args.data)):
        target = Path(args.data) / folder.format(group=path.parent.name, stem=path.stem)
        if target in jobs:
            raise SystemExit(f"{path} and {jobs[target]} would both go to {target}; rename one of them")
        jobs[target] = path
    if not jobs:
        raise SystemExit(f"no videos ({', '.join(data.VIDEO_SUFFIXES)}) below {args.data}")
    todo = {target: path for target, path in jobs.items() if not target.is_dir()}
    frames, faults = 0, []
    with ProcessPoolExecutor(args.workers) as pool:
        running = [pool.submit(extract_video, path, target, pattern, rate) for target, path in todo.items()]
        for result in tqdm(running, "videos", disable=None):
            try:
                count, remark = result.result()
                frames += count
                if remark:
                    tqdm.write(remark)
            except OSError as error:
                faults.append(str(error))
    print("\n".join([*faults, f"{len(todo) - len(faults)} videos, {frames} frames written below {args.data}; "
                     f"{len(jobs) - len(todo)} were there before; {len(faults)} cannot be read"]))
    return int(bool(faults))


def check_video(media, every, video, expected):
    """Faults of a video's frames, a line each; every `every`th is decoded. expected: their number, None if unknown."""
    faults = []
    try:
        count = media.count(video)
        if not media.pattern:
            for first in range(0, count, 64):                  # so many in memory at once
                media.read(video, np.arange(first, min(first + 64, count), every), count)
    except OSError as error:
        return [str(error)]
    if media.pattern:
        present = {path.name for path in media.path(video, 1).parent.glob("*")}
        wanted = [media.path(video, i) for i in range(1, (expected or count) + 1)]
        missing = [path for path in wanted if path.name not in present]
        if missing:
            faults.append(f"frames missing: {missing[0]}, {len(missing)} in all ({len(wanted)} expected, "
                          f"{len(wanted) - len(missing)} found); extract them with python -m tools.prepare extract")
        for path in wanted[::every]:
            try:
                if path.name in present:
                    data.read_image(path, len(wanted))
            except OSError as error:
                faults.append(str(error))
    if expected not in (None, count) and not faults:
        faults.append(f"{video}: its last frame is {count}, that of the annotation {expected}: they disagree")
    return faults


def check_split(args, split, train, config, checked, datasets):
    """Prints what a split holds; returns its faults. Adds to `checked`, videos whose frames were read, and `datasets`."""
    table, media = data.read_dataset(args.dataset, args.data, split, config.key_frame, train)
    print(f"{args.dataset} split {split}{' training' * train}: {table.source}; {media}")
    if table.problems:
        return table.problems
    dataset = data.ClipDataset(args.dataset, table, media, config, train=False)
    counts = (len(table.videos), len(dataset.ground_truth()[1]), len(table.frame), int(table.num_frames.sum()))
    published = PUBLISHED.get((args.dataset, split, train), ())
    words = "videos", "tubes", "boxes", "frames"
    here, there = (", ".join(f"{count} {word}" for word, count in zip(words, of)) for of in (counts, published))
    print(f"   {here}, {len(dataset)} clips; published: " + ("the same" if counts == published else there or "unknown"))
    if not media.pattern and not media.files:
        return [str(media)]
    faults, last = [], np.zeros(len(table.videos), np.int64)
    if table.seconds:                                  # AVA: the frames should reach the last annotated second
        np.maximum.at(last, table.video, (table.frame - data.AVA_START) * data.AVA_RATE)
        faults = [f"{table.videos[v]}: {table.num_frames[v]} frames, its last annotated second is frame {last[v] + 1}"
                  for v in np.flatnonzero(last >= table.num_frames)]
    fresh = [video for video in table.videos if video not in checked]
    expected = dict(zip(table.videos, table.num_frames.tolist())) if args.dataset in ("ucf", "jhmdb") else {}
    with ProcessPoolExecutor(args.workers) as pool:
        results = pool.map(partial(check_video, media, args.every), fresh, map(expected.get, fresh))
        for lines in tqdm(results, "videos", total=len(fresh), disable=None):
            faults += lines
    checked.update(table.videos)
    datasets.append(dataset)
    return faults


def draw_slot(clip, target, t, slot, classes):
    """Frame t of a clip as an image with the boxes and labels of the target's slot."""
    picture = clip[:, t].permute(1, 2, 0).numpy() * data.STD + data.MEAN                          # (H, W, 3)
    image = Image.fromarray(picture.round().clip(0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(image)
    for actor in target["present"][:, slot].nonzero().flatten().tolist():
        cx, cy, w, h = target["boxes"][actor, slot].numpy() * np.array(image.size * 2)
        draw.rectangle([cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2], outline=(255, 220, 0), width=2)
        labels = target["labels"][actor, slot].nonzero().flatten().tolist()
        draw.text((cx - w / 2 + 3, cy - h / 2 + 2), ", ".join(classes[label] for label in labels), (255, 220, 0))
    text = f"{target['frame_ids'][slot]} {target['video']}" if target["frames"][slot] else "padding"
    draw.text((3, image.height - 13), text, (0, 255, 255))
    return image


def contact_sheet(datasets, path, rows, columns=6):
    """Clips of the data sets, a row each, as training reads them; of key-frame clips the key frames, side by side."""
    images = []
    for dataset in datasets:
        for i in np.linspace(0, len(dataset) - 1, -(-rows // len(datasets))).astype(int):
            clip, target = dataset[i]
            shown = np.linspace(0, clip.shape[1] - 1, columns).astype(int)
            pairs = [(t, t) for t in shown] if len(target["frames"]) > 1 else [(clip.shape[1] // 2, 0)]
            images += [draw_slot(clip, target, t, slot, dataset.class_names) for t, slot in pairs]
    width, height = (max(image.size[side] for image in images) for side in (0, 1))
    sheet = Image.new("RGB", (width * columns, height * -(-len(images) // columns)))
    for i, image in enumerate(images):
        sheet.paste(image, (i % columns * width, i // columns * height))
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)


def check(args):
    """Whether a data set may be trained on; returns the exit status."""
    config = replace(PRESETS.get(args.dataset, PRESETS["ucf"]), key_frame=args.dataset == "ava" or args.key_frames)
    args.every = args.every or (data.AVA_RATE if args.dataset == "ava" else 1)
    args.sheet = args.sheet or Path("runs", f"check-{args.dataset}.png")
    parts = [key[1:] for key in PUBLISHED if key[0] == args.dataset] or [("train", True), ("val", False)]
    faults, datasets, checked = [], [], set()
    for split, train in parts:
        try:
            faults += check_split(args, split, train, config, checked, datasets)
        except (OSError, ValueError) as error:
            faults.append(str(error))
    faults = list(dict.fromkeys(faults))               # a video may stand in several splits
    if not faults:
        contact_sheet(datasets, args.sheet, args.clips)
        print(f"{args.clips} clips with their boxes: {args.sheet}; look at it")
    print(*faults, f"{len(faults)} faults: {args.dataset} in {args.data} may {'NOT ' * bool(faults)}be trained on", sep="\n")
    return int(bool(faults))


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m tools.prepare", description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (("extract", "turn videos into the tree of frames that training reads"),
                       ("check", "find what is wrong with a data set; exit status 0 if it may be trained on")):
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("--dataset", required=True, choices=sorted(LAYOUTS))
        command.add_argument("--data", required=True, metavar="DIR", help="the data set's folder")
        command.add_argument("--workers", type=int, default=os.cpu_count(), help="processes (default: one a core)")
    command.add_argument("--every", type=int, metavar="N", help="decode every Nth frame only (default: 1; ava: 30)")
    command.add_argument("--key-frames", action="store_true", help="custom: boxes are at key frames")
    command.add_argument("--clips", type=int, default=12, help="clips on the sheet (default: 12)")
    command.add_argument("--sheet", type=Path, metavar="FILE", help="the sheet (default: runs/check-DATASET.png)")
    args = parser.parse_args(argv)
    return extract(args) if args.command == "extract" else check(args)


if __name__ == "__main__":
    sys.exit(main())
