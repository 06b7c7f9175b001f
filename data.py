"""The data sets of Sec. 5.1 as clips with targets: UCF101-24, JHMDB51-21, AVA v2.2, your own data
(docs/own_data.md) and the synthetic default.

beside/sources.py reads what lies on disk into one table of boxes, whatever the data set. This file
makes clips of T frames of it, at a temporal stride (T x tau in Tables 5 and 6):

    UCF101-24, JHMDB51-21   annotated at every frame, and a clip gives a whole tube: a video of n
                            frames is tiled by ceil(n / T) clips, so that each frame is in one;
    AVA v2.2                annotated once a second: a clip centred on each key frame, whose target
                            has T = 1; the model decodes slot T // 2 alone, which is the key frame.

A slot of a clip before a video's first frame or behind its last repeats that frame and is False in
target["frames"]: it is ignored by loss and metrics (AVA's one target frame is always True).

`dataset[i]` is (clip, target): clip (3, T, H, W) uint8, made float32 and normalised by the model
(backbone.normalise); target a dict

    boxes        (N, T, 4) float32  cx, cy, w, h in [0, 1] of the clip, cut to it; 0 if not present
    present      (N, T) bool        the actor has a box in this frame and the clip shows some of it
    labels       (N, T, C) float32  0 or 1
    frames       (T,) bool          False on temporal padding
    frame_ids    (T,) int64         1-based numbers in the video; of AVA the key frame's second
    size         (2,) int64         height and width whose pixels the annotation counts
    video        str                the video's name
    video_index  int                its place in dataset.videos

A data set has name, videos, class_names, class_groups ({} where classes have none), clip_videos
(K,), the place in `videos` of each clip's video, `augment` and ground_truth().

Augmentation, of which the paper says nothing, is the released model's: flip, crop and colour
jitter, each uniform and drawn once a clip. The generator is numpy's, seeded by one draw of torch's,
so it follows torch.manual_seed, in the workers of a DataLoader too. Departure from the released
code: colours are changed in float32 and rounded once, so that a jitter of zero changes nothing.
"""
# B clips of a batch, K of a data set, T frames, N actors in a clip, C classes, H x W pixels
# V videos, M boxes of a table, R of them in a clip

import os
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from beside.sources import AVA_RATE, AVA_START, read_dataset
from beside.synthetic import SyntheticDataset


# ---- which frames ----

def tile(num_frames, frames, stride=1):
    """First slots (K,) of the clips that tile a video; slot i is frame first + i * stride, from 0.

    ceil(n / T) clips, the overhang split between front (the smaller half) and back. At a stride of
    s, stretches of T * s frames are taken in s phases: there, too, each frame is in one clip.
    """
    span = frames * stride
    count = -(-num_frames // span)
    front = (count * span - num_frames) // 2
    first = np.arange(count)[:, None] * span - front + np.arange(stride)   # (count, stride)
    first = first.reshape(-1)                                              # (count * stride,)
    slots = first[:, None] + np.arange(frames) * stride                    # (count * stride, T)
    inside = (slots >= 0) & (slots < num_frames)
    return first[inside.any(axis=1)]


# ---- how they are seen ----

@dataclass
class Transform:
    """What happens to the frames of a clip and to their boxes, in this order."""
    resized: tuple                 # to width, height
    crop: tuple                    # to x, y, width, height of the resized frame
    jitter: tuple = (0, 0, 0)      # added to hue (of 180), saturation and value (of 255)
    channels: tuple = (0, 1, 2)    # the order of the colours
    flip: bool = False             # left to right


def fit(size, short):
    """(width, height) of a frame of `size` (height, width) with this short side; the long side is
    rounded down."""
    height, width = map(int, size)
    if width >= height:
        return short * width // height, short
    return short, short * height // width


def draw_transform(size, config, augment):
    """The transform of a clip annotated in `size` (height, width); augment: a random one."""
    if not augment:
        resized = fit(size, config.test_size)
        return Transform(resized, (0, 0, *resized))
    rng = np.random.default_rng(int(torch.randint(2 ** 62, ())))
    resized, crop = fit(size, config.resize_size), fit(size, config.crop_size)
    corner = rng.integers(np.subtract(resized, crop) + 1).tolist()
    channels = rng.permutation(3).tolist() if config.permute_colours else (0, 1, 2)
    reach = np.array([config.jitter_hue, config.jitter_saturation, config.jitter_saturation])
    jitter = rng.integers(-reach, reach + 1).tolist()
    flip = bool(rng.random() < config.flip)
    return Transform(resized, (*corner, *crop), tuple(jitter), tuple(channels), flip)


def jitter_colours(frame, shift):
    """Adds `shift` to hue (of 180, cyclic), saturation and value (of 255) of a frame, in place.

    frame (3, H, W) float32, 0..255. Value is the largest channel v, chroma c is v less the
    smallest, saturation c / v; grey pixels have hue 0. Back: a channel whose peak lies d sixths of
    the circle from the hue is v - c * clip(d - 1, 0, 1).
    """
    red, green, blue = frame
    tiny = np.float32(1e-3)
    value = np.maximum(np.maximum(red, green), blue)                       # (H, W), as all below
    chroma = value - np.minimum(np.minimum(red, green), blue)
    scale = 1 / np.maximum(chroma, tiny)
    from_red = (green - blue) * scale                                      # in sixths of the circle
    from_green = 2 + (blue - red) * scale
    from_blue = 4 + (red - green) * scale
    hue = np.where(value == red, from_red, np.where(value == green, from_green, from_blue))
    hue += np.float32(shift[0] / 30)
    if abs(shift[0]) > 30:                     # what follows holds for less than a circle
        hue %= 6
    saturation = chroma / np.maximum(value, tiny) + np.float32(shift[1] / 255)
    value = np.clip(value + np.float32(shift[2]), 0, 255)
    chroma = value * np.clip(saturation, 0, 1)
    for channel, peak in enumerate(np.float32([0, 2, 4])):
        distance = np.abs(np.abs(hue - peak) - 3)                          # 3 - d
        np.subtract(value, chroma * np.clip(2 - distance, 0, 1), out=frame[channel])


def render(images, transform):
    """T images through the transform -> (3, T, H, W) uint8.

    Images that are not stored in the annotation's size are stretched to it. Only the part that the
    crop shows is resized, yet the filter sees what lies beside it: the pixels are those of the
    resized frame's crop.
    """
    x, y, width, height = transform.crop
    clip = np.empty((3, len(images), height, width), np.uint8)
    for t, image in enumerate(images):
        stored = np.array(image.size * 2)                                  # width, height, twice
        part = np.array([x, y, x + width, y + height]) * stored / (transform.resized * 2)
        image = image.resize((width, height), Image.Resampling.BICUBIC, box=part.tolist())
        frame = np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))     # (3, H, W)
        if any(transform.jitter):
            frame = frame.astype(np.float32)
            jitter_colours(frame, transform.jitter)
            np.rint(frame, out=frame)
        clip[:, t] = frame[list(transform.channels), :, ::-1 if transform.flip else 1]
    return torch.from_numpy(clip)


def transform_boxes(boxes, size, transform):
    """Boxes (R, 4), x1, y1, x2, y2 in pixels of `size` -> (shares (R, 4) float32, visible (R,)).

    shares: cx, cy, w, h of the part in the crop, in [0, 1] of the crop. visible: a pixel or more is
    left of both sides.
    """
    scale = np.array(transform.resized) / size[::-1]                       # in x and y
    x, y, width, height = transform.crop
    corners = boxes.reshape(-1, 2, 2) * scale - (x, y)                     # (R, corner, xy)
    corners = corners.clip(0, (width, height))
    sides = corners[:, 1] - corners[:, 0]                                  # (R, xy)
    centre = corners.mean(axis=1) / (width, height)                        # (R, xy)
    if transform.flip:
        centre[:, 0] = 1 - centre[:, 0]
    shares = np.concatenate([centre, sides / (width, height)], axis=1)     # (R, 4)
    return shares.astype(np.float32), (sides >= 1).all(axis=1)


# ---- the data set ----

class ClipDataset:
    """Clips of a table (beside/sources.py) and of the frames that belong to it, for a DataLoader.

    The file's docstring says what an item is. augment: draw a random transform for each clip.
    """

    def __init__(self, name, table, source, config, augment):
        self.name, self.table, self.source, self.config = name, table, source, config
        self.augment = augment
        self.videos, self.class_names, self.class_groups = table.videos, table.classes, {}
        # (V + 1,): the boxes of video v are the table's rows box_start[v] to box_start[v + 1]
        self.box_start = np.searchsorted(table.video, np.arange(len(table.videos) + 1))
        if config.key_frame:
            self.clip_videos, self.clip_key = table.key_frames.T           # (K,) each
            centre = self.clip_key - 1                                     # (K,) 0-based
            if table.seconds:
                centre = (self.clip_key - AVA_START) * AVA_RATE
            self.clip_first = centre - config.frames // 2 * config.sampling_rate
        else:
            first = [tile(count, config.frames, config.sampling_rate)
                     for count in table.num_frames.tolist()]
            self.clip_videos = np.repeat(np.arange(len(first)), [len(part) for part in first])
            self.clip_first = np.concatenate([np.zeros(0, np.int64), *first])       # (K,) 0-based

    def __len__(self):
        return len(self.clip_videos)

    def __getitem__(self, i):
        config, video = self.config, int(self.clip_videos[i])
        count, size = int(self.table.num_frames[video]), self.table.size[video]
        slots = self.clip_first[i] + np.arange(config.frames) * config.sampling_rate    # (T,)
        shown = slots.clip(0, count - 1)
        transform = draw_transform(size, config, self.augment)
        distinct, place = np.unique(shown, return_inverse=True)    # a repeated frame is read once
        images = self.source.read(self.videos[video], distinct, count, transform.resized)
        clip = render(images, transform)                           # (3, distinct frames, H, W)
        if len(distinct) < len(shown):
            clip = clip[:, torch.from_numpy(place)]                # (3, T, H, W)
        if config.key_frame:
            return clip, self.target(video, self.clip_key[i:i + 1], np.ones(1, bool), transform)
        return clip, self.target(video, shown + 1, slots == shown, transform)

    def target(self, video, frame_ids, frames, transform):
        """The target of a clip: frames (T,) bool are no padding, frame_ids (T,) their numbers."""
        table, start, stop = self.table, *self.box_start[video:video + 2]
        slots = np.flatnonzero(frames)
        numbers = frame_ids[slots]                                 # ascending
        rows = start + np.flatnonzero(np.isin(table.frame[start:stop], numbers))    # (R,)
        box, visible = transform_boxes(table.box[rows], table.size[video], transform)
        rows, box = rows[visible], box[visible]
        slot = slots[np.searchsorted(numbers, table.frame[rows])]                   # (R,)
        actors, actor = np.unique(table.actor[rows], return_inverse=True)           # (N,), (R,)
        shape = len(actors), len(frames)                                            # N, T
        boxes = np.zeros((*shape, 4), np.float32)
        present = np.zeros(shape, bool)
        labels = np.zeros((*shape, len(table.classes)), np.float32)
        boxes[actor, slot] = box
        present[actor, slot] = True
        labels[actor, slot] = table.label[rows]
        return {
            "boxes": torch.from_numpy(boxes),
            "present": torch.from_numpy(present),
            "labels": torch.from_numpy(labels),
            "frames": torch.tensor(frames),
            "frame_ids": torch.tensor(frame_ids),
            "size": torch.tensor(table.size[video]),
            "video": self.videos[video],
            "video_index": video,
        }

    def ground_truth(self):
        """(frames, tubes) as metrics.py takes them; "video" is an index of self.videos.

        frames: arrays "video", "frame", "label", "box", a row for each label of a box. tubes: a
        dict for each unbroken run of frames in which an actor has a label, with score 1; none for
        key frames. Boxes are in the annotation's pixels.
        """
        table = self.table
        row, label = np.nonzero(table.label)
        frames = {"video": table.video[row], "frame": table.frame[row], "label": label,
                  "box": table.box[row]}
        if self.config.key_frame:
            return frames, []
        order = np.lexsort((table.frame[row], label, table.actor[row]))
        row, label = row[order], label[order]
        step = np.diff([table.actor[row], label, table.frame[row]])        # (3, rows - 1)
        goes_on = (step == [[0], [0], [1]]).all(axis=0)
        tubes = []
        for run in np.split(np.arange(len(row)), np.flatnonzero(~goes_on) + 1):
            if len(run):
                boxes = row[run]
                tubes.append({"video": int(table.video[boxes[0]]), "label": int(label[run[0]]),
                              "score": 1.0, "frames": table.frame[boxes],
                              "boxes": table.box[boxes]})
        return frames, tubes


def build_dataset(name, root, side, config, fold=1, missing="error", fill=0):
    """The clips of a data set: "synthetic", "ucf", "jhmdb", "ava" or "custom" (your own).

    root: folder of annotation and frames (or videos). side: "train", with augmentation, or "val".
    fold: which of jhmdb's three splits; the others have one. missing: "error", or "leave out" for
    videos without frames. fill: interpolate a person's boxes that are up to so many frames apart.
    Prints what was found, once for all ranks. Raises ValueError on a wrong annotation,
    FileNotFoundError where a file is missing; frames raise an OSError when they cannot be read.
    """
    if side not in ("train", "val"):
        raise ValueError(f'the sides of {name} are "train" and "val", not {side!r}')
    if name == "synthetic":
        if fold != 1:
            raise ValueError(f"synthetic has one split, 1, not {fold!r}; leave out --split")
        return SyntheticDataset(config, side)
    if config.crop_size > config.resize_size:
        raise ValueError(f"crop_size {config.crop_size} exceeds resize_size {config.resize_size}; "
                         "set one with --set")
    table, source = read_dataset(name, root, side, config.key_frame, fold, missing, fill)
    if table.problems:
        raise ValueError("\n  ".join([f"{name} in {root} cannot be used as it is (python -m "
                                      "tools.prepare check looks for all faults):",
                                      *table.problems]))
    dataset = ClipDataset(name, table, source, config, augment=side == "train")
    if os.environ.get("RANK", "0") == "0":
        print(f"{name}: {len(table.videos)} videos, {len(table.frame)} boxes, {len(dataset)} clips;"
              f" {table.source}; {source}")
    return dataset


def collate(batch):
    """(clip, target) pairs -> clips (B, 3, T, H, W), padding_mask (B, H, W) bool, targets.

    Clips smaller than the largest are padded below and to the right; the mask is True there.
    """
    clips, targets = zip(*batch)
    height = max(clip.shape[-2] for clip in clips)
    width = max(clip.shape[-1] for clip in clips)
    channels, frames = clips[0].shape[:2]
    padded = clips[0].new_zeros(len(clips), channels, frames, height, width)    # (B, 3, T, H, W)
    padding_mask = torch.ones(len(clips), height, width, dtype=torch.bool)      # (B, H, W)
    for i, clip in enumerate(clips):
        padded[i, ..., :clip.shape[-2], :clip.shape[-1]] = clip
        padding_mask[i, :clip.shape[-2], :clip.shape[-1]] = False
    return padded, padding_mask, list(targets)
