"""The data sets of Sec. 5.1 as clips with targets: UCF101-24, JHMDB51-21, AVA v2.2, one's own, the synthetic default.

Every data set is read into one table (`Table`): M boxes, each with its video, frame, actor and labels. A clip is T
slots of a video's frames; a slot before the first or behind the last frame repeats that frame and is False in
target["frames"]: it counts nowhere. Untrimmed videos are tiled by ceil(n / T) clips, so that every frame is in exactly
one; key-frame presets (AVA) take a clip around each annotated key frame, with T = 1 in the target.

`dataset[i]` is (clip, target): clip (3, T, H, W) float32, normalised by ImageNet's mean and deviation; target a dict of
  boxes     (N, T, 4) float32  cx, cy, w, h in [0, 1] of the clip's frame, clipped to it; zeros where not present
  present   (N, T) bool        the actor has a box in that frame (and more than a sliver of it is in the training crop)
  labels    (N, T, C) float32  0 or 1
  frames    (T,) bool          False on temporal padding
  frame_ids (T,) int64         1-based numbers in the video; for AVA the second of the key frame
  size      (2,) int64         height and width whose pixels the annotation counts
  video     str

Augmentation: flip, crop and colour jitter, drawn once per clip and uniform, by a numpy generator that is seeded by one
draw of torch's: they follow torch.manual_seed and torch's random state, in the workers of a DataLoader too.
Departure: colours are changed in float32 without rounding in between, so that a jitter of zero changes nothing.
"""
# B clips, T frames, N actors in a clip, C classes, M boxes of a table, V videos, K clips, R rows, H x W pixels

import os
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from beside.sources import (AVA_RATE, AVA_START, UCF_CLASSES, VIDEO_SUFFIXES, FrameSource,  # noqa: F401
                            PlainUnpickler, decode, find_media, frame_stamps, read_dataset, read_image, video_files)
from beside.synthetic import SyntheticDataset

MEAN = np.float32([0.485, 0.456, 0.406]) * 255     # ImageNet's, of 8-bit colours
STD = np.float32([0.229, 0.224, 0.225]) * 255
VIDEO_KEY = 1_000_000              # a frame's key over all videos: index of the video * VIDEO_KEY + number of the frame


def tile(num_frames, frames, rate=1):
    """First slots (K,) of the clips that tile a video; slot i of a clip is the 0-based frame first + i * rate.

    ceil(n / T) clips, the overhang split between front (the smaller half) and back. At a rate of r, stretches of T * r
    frames are taken in r phases: each frame is in exactly one clip there, too.
    """
    span = frames * rate
    count = -(-num_frames // span)
    front = (count * span - num_frames) // 2
    first = (np.arange(count)[:, None] * span - front + np.arange(rate)).reshape(-1)               # (count * rate,)
    slots = first[:, None] + np.arange(frames) * rate                                              # (count * rate, T)
    return first[((slots >= 0) & (slots < num_frames)).any(axis=1)]


def fit(size, short):
    """(width, height) of a frame of `size` (height, width) at this short side, the long side rounded down."""
    height, width = map(int, size)
    return (short * width // height, short) if width >= height else (short, short * height // width)


@dataclass
class View:
    """How the frames of a clip are seen: resized, cut to the crop, jittered, channels permuted, mirrored."""
    resized: tuple                 # width, height
    crop: tuple                    # x, y, width, height in the resized frame
    jitter: tuple = (0, 0, 0)      # added to hue (of 180), saturation and value (of 255)
    channels: tuple = (0, 1, 2)
    flip: bool = False


def draw_view(size, config, train):
    """The view of a clip that is annotated in `size` (height, width); in training one draw of the augmentations."""
    if not train:
        resized = fit(size, config.test_size)
        return View(resized, (0, 0, *resized))
    random = np.random.default_rng(int(torch.randint(2 ** 62, ())))
    resized, crop = fit(size, config.resize_size), fit(size, config.crop_size)
    corner = random.integers(np.subtract(resized, crop) + 1).tolist()
    reach = np.array([config.jitter_hue, config.jitter_saturation, config.jitter_saturation])
    channels = random.permutation(3).tolist() if config.permute_colours else (0, 1, 2)
    return View(resized, (*corner, *crop), tuple(random.integers(-reach, reach + 1).tolist()), tuple(channels),
                bool(random.random() < config.flip))


def jitter_colours(frame, shift):
    """Changes a frame (3, H, W), 0..255, in place: adds `shift` to hue (of 180, cyclic), saturation and value (of 255).

    Value is the largest channel v, chroma c is v less the smallest, saturation c / v; grey pixels have hue 0. Back: a
    channel whose peak lies d sixths of the circle from the hue is v - c * clip(d - 1, 0, 1).
    """
    red, green, blue = frame
    value = np.maximum(np.maximum(red, green), blue)
    chroma = value - np.minimum(np.minimum(red, green), blue)
    scale = 1 / np.maximum(chroma, np.float32(1e-3))
    hue = np.where(value == red, (green - blue) * scale,                           # (H, W) in -1..5, before the shift
                   np.where(value == green, 2 + (blue - red) * scale, 4 + (red - green) * scale)) + np.float32(shift[0] / 30)
    saturation = np.clip(chroma / np.maximum(value, np.float32(1e-3)) + np.float32(shift[1] / 255), 0, 1)
    value = np.clip(value + np.float32(shift[2]), 0, 255)
    chroma = value * saturation
    for channel, peak in enumerate(np.float32([0, 2, 4])):
        distance = np.abs(np.abs(hue - peak) - 3)                                  # to the opposite of the peak: 3 - d
        np.subtract(value, chroma * np.clip(2 - distance, 0, 1), out=frame[channel])


def render(images, view):
    """T images as seen through the view -> (3, T, H, W) float32, normalised.

    A frame that is not stored in the annotation's size is stretched to it. Only the part that the crop shows is
    resized: the pixels are those of the resized frame's crop, as the filter sees what lies beside the part.
    """
    x, y, width, height = view.crop
    clip = np.empty((3, len(images), height, width), np.float32)
    for t, image in enumerate(images):
        part = np.array([x, y, x + width, y + height]) * np.tile(np.divide(image.size, view.resized), 2)
        part = np.minimum(part, image.size * 2).tolist()                           # a tuple: width, height, twice
        image = image.resize((width, height), Image.Resampling.BICUBIC, box=part)
        frame = np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1)).astype(np.float32)      # (3, H, W)
        if any(view.jitter):
            jitter_colours(frame, view.jitter)
        frame = frame[list(view.channels), :, ::-1 if view.flip else 1]
        np.multiply(frame - MEAN[:, None, None], 1 / STD[:, None, None], out=clip[:, t])
    return torch.from_numpy(clip)


def view_boxes(box, size, view):
    """Boxes (M, 4), x1, y1, x2, y2 in pixels of `size` -> (cx, cy, w, h clipped to the crop, in shares of it; visible).

    visible (M,) bool: a pixel or more is left of both sides.
    """
    scale, crop = np.array(view.resized) / size[::-1], np.array(view.crop)         # in x and y
    corners = (box.reshape(-1, 2, 2) * scale - crop[:2]).clip(0, crop[2:])         # (M, corner, xy)
    sides, centre = corners[:, 1] - corners[:, 0], corners.mean(axis=1) / crop[2:]                 # (M, 2) each
    if view.flip:
        centre[:, 0] = 1 - centre[:, 0]
    return np.concatenate([centre, sides / crop[2:]], axis=1).astype(np.float32), (sides >= 1).all(axis=1)


class ClipDataset:
    """Clips of a table and the pixels that belong to it, for a DataLoader; the module's docstring says what an item is.

    name, videos, class_names; class_groups (none here); clip_videos (K,), the index in `videos` of each clip's video.
    """

    def __init__(self, name, table, media, config, train):
        self.name, self.table, self.media, self.config, self.train = name, table, media, config, train
        self.videos, self.class_names, self.class_groups = table.videos, table.classes, {}
        self.key = table.video * VIDEO_KEY + table.frame                           # (M,) ascending
        if config.key_frame:                                                       # clips lie around key frames
            self.clip_videos, self.clip_frame = table.key_frames.T                 # (K,) each
            centre = (self.clip_frame - AVA_START) * AVA_RATE if table.seconds else self.clip_frame - 1
            self.clip_first = centre - config.frames // 2 * config.sampling_rate   # (K,) 0-based, of the first slot
        else:                                                                      # clips tile the videos
            first = [tile(int(count), config.frames, config.sampling_rate) for count in table.num_frames]
            self.clip_videos = np.repeat(np.arange(len(first)), [len(f) for f in first])           # (K,)
            self.clip_first = np.concatenate([np.zeros(0, np.int64), *first])      # (K,)

    def __len__(self):
        return len(self.clip_videos)

    def __getitem__(self, i):
        video, config = int(self.clip_videos[i]), self.config
        count, size = int(self.table.num_frames[video]), self.table.size[video]
        slots = self.clip_first[i] + np.arange(config.frames) * config.sampling_rate               # (T,)
        index = slots.clip(0, count - 1)
        view = draw_view(size, config, self.train)
        shown, repeat = np.unique(index, return_inverse=True)                      # a repeated frame is read once
        clip = render(self.media.read(self.videos[video], shown, count, view.resized), view)
        clip = clip[:, torch.from_numpy(repeat)] if len(shown) < len(index) else clip              # (3, T, H, W)
        if config.key_frame:
            return clip, self.target(video, self.clip_frame[i:i + 1], np.ones(1, bool), view)
        return clip, self.target(video, index + 1, slots == index, view)

    def target(self, video, frame_ids, frames, view):
        """The target of a clip with the frame numbers frame_ids (T,), of which frames (T,) bool are no padding."""
        table, slots = self.table, np.flatnonzero(frames)
        numbers = frame_ids[slots]                                                 # ascending
        begin, end = np.searchsorted(self.key, video * VIDEO_KEY + numbers[[0, -1]] + [0, 1])
        found = np.searchsorted(numbers, table.frame[begin:end])                   # of each box, its place in numbers
        box, visible = view_boxes(table.box[begin:end], table.size[video], view)
        rows = np.flatnonzero(visible & (numbers[found] == table.frame[begin:end]))   # a sampling rate leaves some out
        actors, actor = np.unique(table.actor[begin + rows], return_inverse=True)
        at, shape = (actor, slots[found[rows]]), (len(actors), len(frame_ids))     # N, T
        boxes, present = np.zeros((*shape, 4), np.float32), np.zeros(shape, bool)
        labels = np.zeros((*shape, len(table.classes)), np.float32)
        boxes[at], present[at], labels[at] = box[rows], True, table.label[begin + rows]
        arrays = {"boxes": boxes, "present": present, "labels": labels, "frames": frames, "frame_ids": frame_ids,
                  "size": table.size[video]}
        return {key: torch.tensor(value) for key, value in arrays.items()} | {"video": self.videos[video]}

    def ground_truth(self):
        """(frames, tubes) as metrics.py takes them, in the annotation's pixels; "video" is an index of self.videos.

        frames: arrays "frame" (video * VIDEO_KEY + number), "label", "box", a row for each label of a box. tubes: a
        dict for each unbroken run of frames in which an actor has a label, with score 1; none for key frames.
        """
        table = self.table
        row, label = np.nonzero(table.label)
        frames = {"frame": self.key[row], "label": label, "box": table.box[row]}
        if self.config.key_frame:
            return frames, []
        order = np.lexsort((table.frame[row], label, table.actor[row]))
        row, label = row[order], label[order]
        steps = np.diff([table.actor[row], label, table.frame[row]])               # (3, rows - 1)
        breaks = np.flatnonzero((steps != [[0], [0], [1]]).any(axis=0)) + 1
        return frames, [{"video": int(table.video[run[0]]), "label": int(kind), "score": 1.0, "frames": table.frame[run],
                         "boxes": table.box[run]} for run, kind in zip(np.split(row, breaks), label[np.r_[0, breaks]])]


def build_dataset(name, root, side, config, fold=1):
    """The clips of a data set: "synthetic", "ucf", "jhmdb", "ava" or "custom" (one's own, docs/own_data.md).

    root: folder of annotation and frames (or videos). side: "train", with augmentation, or "val". fold: which of the
    splits that jhmdb has three of, the others one. Prints what was found. Raises
    ValueError on a wrong annotation, FileNotFoundError where a file is missing; frames that are missing or cannot be
    read raise an OSError when they are read.
    """
    if side not in ("train", "val"):
        raise ValueError(f'the sides of {name} are "train" and "val", not {side!r}')
    train = side == "train"
    if name == "synthetic":
        return SyntheticDataset(config, side)
    if config.crop_size > config.resize_size:
        raise ValueError(f"crop_size {config.crop_size} exceeds resize_size {config.resize_size}; set one with --set")
    table, media = read_dataset(name, root, side, config.key_frame, fold)
    if table.problems:
        raise ValueError(f"{name} in {root}: {len(table.problems)} faults in the annotation (python -m tools.prepare "
                         "check lists all), the first:\n  " + "\n  ".join(table.problems[:5]))
    dataset = ClipDataset(name, table, media, config, train)
    if os.environ.get("RANK", "0") == "0":
        print(f"{name}: {len(table.videos)} videos, {len(table.frame)} boxes, {len(dataset)} clips; {table.source}; {media}")
    return dataset


def collate(batch):
    """(clip, target) pairs -> clips (B, 3, T, H, W) padded with zeros, padding_mask (B, H, W) True there, targets."""
    clips, targets = zip(*batch)
    height, width = (max(clip.shape[side] for clip in clips) for side in (-2, -1))
    padded = clips[0].new_zeros(len(clips), *clips[0].shape[:2], height, width)                    # (B, 3, T, H, W)
    padding_mask = torch.ones(len(clips), height, width, dtype=torch.bool)
    for i, clip in enumerate(clips):
        padded[i, :, :, :clip.shape[-2], :clip.shape[-1]] = clip
        padding_mask[i, :clip.shape[-2], :clip.shape[-1]] = False
    return padded, padding_mask, list(targets)
