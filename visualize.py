"""Class attention maps and tubes, drawn on clips and videos (Sec. 5.4, Fig. 2 and 7).

    python visualize.py --clip 3 --out out/                                   # a validation clip
    python visualize.py --ckpt runs/NAME/best.pt --video-name V --out out/    # a video of the data
    python visualize.py --ckpt C --video in.mp4 --classes run,sit --out out/  # a video of your own
    torchrun --nproc_per_node 8 visualize.py --ckpt C --video folder/ --out out/   # many of them
    python visualize.py --figure attention.png      # one actor, a map for each of its labels

Each but the last writes NAME.mp4 (every frame, at its time, without sound), NAME.png (six frames),
tubes.json and tubes.csv; several videos have a folder each. A picture has a panel with the tubes,
one colour an actor, and panels with the class attention maps in the colours of the actors they
belong to: one panel a class of --classes, or a single one with each actor's best class. A map is
the last decoder layer's or --layer's, the mean over heads, bilinear between cells and divided by
its own maximum, so that brightness does not compare between maps. Layers differ in where they look.
Half of the heads of the benchmark presets look alike for every class; --heads content leaves them
out. White boxes are the annotation's, where there is one. --look-from adds NAME-points.png, the
sampling points of the encoder. Clips are read twice, one at a time: first for the tubes, then to
draw.

tubes.json: {"video", "rate" (frames a second), "size" (height, width), "classes", "options",
"actors": [{"actor" (from 1), "colour", "tubes": [{"label", "score", "frames" (k 1-based numbers),
"seconds" (k), "boxes" (k of x1, y1, x2, y2 in pixels of the video)}]}]}; an actor has one tube a
class. tubes.csv has AVA's columns and the actor, a line a box and class: video, second, x1, y1, x2,
y2 in [0, 1], class number from 1, the tube's score, actor.
"""
# B clips, T frames, A actor queries, C classes, N actors, G annotated boxes
# H, W of a frame or panel, H', W' of an attention map; a colour is (red, green, blue), up to 255

import argparse
import csv
import json
import os
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw
from torch.utils.data import DataLoader, Subset

from beside.pictures import (
    BLACK, COLOURS, GAP, WHITE, arrange, draw_boxes, draw_labels, drawable, font, in_pairs, in_rows,
    letter_size, resize, save_picture, save_video, shine, upsample)
from beside.released import content_heads
from beside.sources import (AVA_CLASSES_80, JHMDB_CLASSES, UCF_CLASSES, VIDEO_SUFFIXES, not_whole,
                            video_files, video_frames, video_rate)
from data import collate, draw_transform, render
from evaluate import (ROWS, add_source_arguments, at_least, bar, clip_videos, default_precision,
                      find_checkpoint, load_model, open_dataset, rows, set_precision, shortest_tube,
                      start, this_rank)
from metrics import box_iou, link_tubes
from model import scores
from objective import cxcywh_to_xyxy, match

SHEET_FRAMES = 6            # frames of a video that NAME.png shows
FIGURE_WIDTH = 1152         # pixels of an attention sheet
FIGURE_LETTERS = 16         # pixels of its letters
FIGURE_CLIPS = 40           # clips that are looked at for one
REMEMBERED = ("set", "precision", "classes", "heads", "layer", "maps", "look_from", "min_score",
              "top", "width")       # options that tubes.json names


# ---- what the model sees ----

@dataclass
class Detector:
    """A model and how it is run."""
    model: torch.nn.Module
    config: object
    device: torch.device
    precision: torch.dtype | None = None        # of autocast, None without
    layer: int | None = None                    # whose attention is drawn, from 1; None: the last


def detect_clip(detector, clip, target, heads=None):
    """The model on one clip (3, T, H, W) -> (detections, attention).

    detections: `evaluate.rows` of the clip's frames as (frames, A, ...) arrays; attention: maps (T,
    A, C, H', W') of the detector's layer, the mean over "all" heads or over the "content" heads,
    those that see no position with the quirk split_heads; None without `heads`.
    """
    device, dtype = detector.device, detector.precision
    wanted = "heads" if heads == "content" else heads is not None
    with torch.inference_mode(), torch.autocast(device.type, dtype, dtype is not None):
        out = detector.model(clip[None].to(device), return_attention=wanted)
    detections = {}
    queries = out["pred_boxes"].shape[2]
    for name, values in rows(out, [target], detector.config).items():
        detections[name] = values.reshape(-1, queries, *values.shape[1:])    # (frames, A, ...)
    if heads is None:
        return detections, None
    attention = class_maps(out, detector.layer)[0]
    if heads == "content":
        attention = content_heads(attention)    # (T, A, C, M, H', W') -> (T, A, C, H', W')
    return detections, attention.float().cpu().numpy()


def class_maps(out, layer=None):
    """The attention maps of a decoder layer, counted from 1, or of the last one."""
    if layer is None:
        return out["attention"]
    return [*out["aux_outputs"], out][layer - 1]["attention"]


def frame_slots(target):
    """The slots of a clip that hold frames of their own, no padding, as a list of ints."""
    return torch.as_tensor(target["frames"]).nonzero()[:, 0].tolist()


# ---- tubes ----

def find_actors(detector, clips, min_score):
    """The tubes of some clips, (clip, target, pictures) each, by actor -> (actors, frames).

    actors: see `group_tubes`. frames: {"number", "seconds": lists over all frames, "size": [height,
    width], "best": the best score of a box, "shortest": frames below which a tube is dropped, at
    most half of the video}. ValueError where there is no frame.
    """
    frames = {"number": [], "seconds": [], "size": None, "best": 0.0}
    # bytes, since small arrays would stay where frames were, and memory grow by a frame a clip
    kept = {name: bytearray() for name in ROWS}
    for clip, target, _ in bar(clips, "finding tubes", unit="clip"):
        part, _ = detect_clip(detector, clip, target)
        for t in frame_slots(target):
            frames["number"].append(int(target["frame_ids"][t]))
            frames["seconds"].append(target["times"][t])
        frames["size"] = [int(side) for side in target["size"]]
        score = part["class_prob"].max(-1) * part["conf"]                    # (frames, A)
        frames["best"] = max(frames["best"], float(score.max()))
        for name, values in part.items():
            kept[name] += values[score >= min_score].tobytes()
    if not frames["number"]:
        raise ValueError("no frames to draw on: the video is empty")
    frames["shortest"] = 1                      # key frames are a second apart
    if not detector.config.key_frame:
        frames["shortest"] = min(shortest_tube(detector.config), max(1, len(frames["number"]) // 2))
    found = {}
    for name, values in part.items():
        found[name] = np.frombuffer(kept[name], values.dtype).reshape(-1, *values.shape[2:])
    tubes = link_tubes(found, min_score=min_score, min_length=frames["shortest"])
    return group_tubes(tubes), frames


def group_tubes(tubes):
    """Tubes by actor, best first -> [{"colour", "first", "last": frames, "tubes": best first}].

    A tube is of one class, so that an actor with several classes has several tubes in one place:
    those that overlap by a mean IoU of 0.5 over the frames they share are one actor. An actor has
    one tube a class, as what linking left over of a class joins the actor's better tube.
    """
    groups = []
    for tube in sorted(tubes, key=lambda tube: -tube["score"]):
        for group in groups:
            if any(same_place(tube, other) for other in group):
                group.append(tube)
                break
        else:
            groups.append([tube])
    actors = []
    for group in groups:
        by_label = {}
        for tube in group:
            by_label.setdefault(tube["label"], []).append(tube)
        merged = [merge(of_label) for of_label in by_label.values()]
        merged.sort(key=lambda tube: -tube["score"])
        actors.append({"first": min(int(tube["frames"][0]) for tube in merged),
                       "last": max(int(tube["frames"][-1]) for tube in merged), "tubes": merged})
    actors.sort(key=lambda actor: -actor["tubes"][0]["score"])
    choose_colours(actors)
    return actors


def same_place(tube, other):
    """Whether two tubes have a mean IoU of at least 0.5 over the frames they share, if any."""
    if tube["frames"][-1] < other["frames"][0] or other["frames"][-1] < tube["frames"][0]:
        return False
    _, i, j = np.intersect1d(tube["frames"], other["frames"], return_indices=True)
    return len(i) > 0 and box_iou(tube["boxes"][i], other["boxes"][j]).mean() >= 0.5


def merge(tubes):
    """Tubes of one class and actor, best first, as one: where several have a frame, it takes the
    best one's box. Its score is the mean over its frames."""
    frames = np.concatenate([tube["frames"] for tube in tubes])              # (k,)
    boxes = np.concatenate([tube["boxes"] for tube in tubes])                # (k, 4)
    score = np.repeat([tube["score"] for tube in tubes], [len(tube["frames"]) for tube in tubes])
    frames, first = np.unique(frames, return_index=True)
    return {"label": tubes[0]["label"], "score": float(score[first].mean()), "frames": frames,
            "boxes": boxes[first]}


def choose_colours(actors):
    """Gives each actor a "colour" that no actor of the same frames has before it, as far as there
    are colours."""
    for number, actor in enumerate(actors):
        free = dict.fromkeys(COLOURS)
        for other in actors[:number]:
            if other["first"] <= actor["last"] and actor["first"] <= other["last"]:
                free.pop(other["colour"], None)
        actor["colour"] = next(iter(free), COLOURS[number % len(COLOURS)])


# ---- what is drawn of a frame ----

@dataclass
class Frame:
    """A frame and what is drawn on it; boxes are x1, y1, x2, y2 in shares of it."""
    title: str
    picture: np.ndarray     # (H, W, 3) uint8, as it is stored
    truth: np.ndarray       # (G, 4) boxes of the annotation
    boxes: np.ndarray       # (N, 4) boxes of the actors
    colours: list           # N colours of theirs
    texts: list             # N lists of lines: classes and scores
    maps: list              # for each panel: (title, maps (N, H', W'), N lists of lines)


def frames_to_draw(detector, clips, actors, names, classes, heads, top):
    """Yields a `Frame` for each frame of the clips: the actors, with the `top` best classes, and
    the attention of `classes` (ids), or of each actor's best class where they are none. heads:
    "all" or "content", None for no attention."""
    for clip, target, pictures in clips:
        if heads:
            part, attention = detect_clip(detector, clip, target, heads)
        height, width = target["size"].tolist()
        for row, t in enumerate(frame_slots(target)):
            number = int(target["frame_ids"][t])
            colours, boxes, texts, best = on_frame(actors, number, names, top)
            maps = []
            if heads:
                # an actor's box at a frame is that of one query: its maps are the actor's
                distance = np.abs(part["box"][row] - boxes[:, None]).sum(-1)         # (N, A)
                queries = distance.argmin(1)                                         # (N,)
                for chosen in classes:
                    maps.append((f"attention: {names[chosen]}", attention[t, queries, chosen],
                                 [[]] * len(boxes)))
                if not classes:
                    maps.append(("attention: each actor's best class", attention[t, queries, best],
                                 [[names[label]] for label in best]))
            truth = true_boxes(target, t)
            title = f"frame {number}" + ("; annotation in white" if len(truth) else "")
            yield Frame(title, pictures[t], truth, boxes / (width, height, width, height), colours,
                        texts, maps)


def on_frame(actors, number, names, top):
    """The actors of a frame: N colours, boxes (N, 4) in the video's pixels, N lists of lines (the
    `top` best classes), ids of their best classes (N,)."""
    colours, boxes, texts, best = [], [], [], []
    for actor in actors:
        if not actor["first"] <= number <= actor["last"]:
            continue
        lines = []
        for tube in actor["tubes"]:
            row = np.searchsorted(tube["frames"], number)
            if row == len(tube["frames"]) or tube["frames"][row] != number:
                continue
            if not lines:                       # the best tube comes first
                colours.append(actor["colour"])
                boxes.append(tube["boxes"][row])
                best.append(tube["label"])
            lines.append(f"{names[tube['label']]} {tube['score']:.2f}")
        if lines:
            texts.append(lines[:top])
    return colours, np.array(boxes, float).reshape(-1, 4), texts, np.array(best, int)


def true_boxes(target, t):
    """The annotated boxes (G, 4), x1, y1, x2, y2 in [0, 1], of a clip's slot t, if there are."""
    if "boxes" not in target:
        return np.zeros((0, 4))
    return cxcywh_to_xyxy(target["boxes"][target["present"][:, t], t]).numpy()


def draw_frame(frame, width):
    """A `Frame` as one picture (height, at most `width`, 3): the actors, then the maps, in rows."""
    columns, size = arrange(1 + len(frame.maps), frame.picture.shape[:2], width)
    pixels = np.array([size[1], size[0], size[1], size[0]])
    boxes, truth, colours = frame.boxes * pixels, frame.truth * pixels, frame.colours
    letters, picture = letter_size(size), resize(frame.picture, size)
    image = picture.copy()
    draw_boxes(image, truth, [WHITE] * len(truth), letters)
    draw_boxes(image, boxes, colours, letters)
    draw_labels(image, boxes, colours, letters, frame.texts, truth)
    panels = [(frame.title, image)]
    for title, maps, texts in frame.maps:
        image = shine(picture, upsample(maps, size), colours)
        draw_boxes(image, boxes, colours, letters)
        draw_labels(image, boxes, colours, letters, texts, truth)
        panels.append((title, image))
    return in_rows(panels, columns, letters)


# ---- one actor, a map for each of its labels (Fig. 2) ----

def attention_sheet(model, dataset, config, path, device, clips=3, layer=None):
    """A PNG with a line for each of some clips: a frame, and for one actor of it the class
    attention of each of its labels (three at most), from the query that lies best on it, in decoder
    layer `layer`, from 1, or the last one. White: what the context label is caused by, where the
    data set knows it; beside that label, the share of its attention that lies there.

    The rule by which clips are chosen: of 40 clips spread evenly over the data set, those with an
    actor that has three labels at once, or the most there are; of these, the ones whose share on
    the cause is nearest to the median, or the first ones where no cause is known. The frame is the
    middle one of those in which the actor has these labels. Where no clip has a label nothing is
    drawn, and a line says so. Leaves the model as it was; returns whether there is a picture.
    """
    moments = []
    for index in np.unique(np.linspace(0, len(dataset) - 1, FIGURE_CLIPS).astype(int)).tolist():
        moment = busiest_moment(dataset[index][1])
        if moment:
            moments.append(moment | {"clip": index})
    if not moments:
        print(f"{path} is not drawn: {FIGURE_CLIPS} clips of {dataset.name} have no label")
        return False
    busiest = max(moment["rank"] for moment in moments)
    moments = [moment for moment in moments if moment["rank"] == busiest]
    caused = busiest[1]
    if not caused:
        moments = moments[:clips]
    was_training = model.training
    model.eval()
    for moment in moments:
        moment |= look_at(model, dataset, moment, config, device, layer)
    model.train(was_training)
    if caused:
        middle = np.median([moment["share"] for moment in moments])
        moments.sort(key=lambda moment: abs(moment["share"] - middle))
    save_picture(path, np.concatenate([draw_moment(dataset, moment) for moment in moments[:clips]]))
    return True


def busiest_moment(target):
    """The frame of a clip in which an actor has most labels, three at most, and rather one with a
    known cause -> {"actor", "t", "labels" (class ids), "rank": (how many labels, whether a cause is
    known)}, the middle one of several; None without a label."""
    shown = target["present"] & torch.as_tensor(target["frames"])            # (N, T)
    labels = target["labels"] * shown[..., None]                             # (N, T, C)
    moments = []
    for actor, t in labels.any(-1).nonzero().tolist():
        ids = labels[actor, t].nonzero()[:3, 0].tolist()
        caused = "cause" in target and not target["cause"][actor, t].isnan().any()
        moments.append({"actor": actor, "t": t, "labels": ids, "rank": (len(ids), bool(caused))})
    if not moments:
        return None
    busiest = max(moment["rank"] for moment in moments)
    moments = [moment for moment in moments if moment["rank"] == busiest]
    return moments[len(moments) // 2]


def look_at(model, dataset, moment, config, device, layer=None):
    """The query that lies best on a moment's actor: its "box" x1, y1, x2, y2 in [0, 1], "scores"
    (C,) and "maps" (C, H', W'); with a cause also its box "cause", the "context" label that it
    causes and the "share" of that label's attention on it."""
    clip, target = dataset[moment["clip"]]
    actor, t = moment["actor"], moment["t"]
    with torch.inference_mode():
        out = model(clip[None].to(device), return_attention=True)
    boxes = cxcywh_to_xyxy(out["pred_boxes"][0, t].float()).cpu().numpy()    # (A, 4)
    truth = cxcywh_to_xyxy(target["boxes"][actor, t]).numpy()                # (4,)
    query = int(box_iou(boxes, truth).argmax())
    maps = class_maps(out, layer)[0, t, query].float().cpu().numpy()         # (C, H', W')
    seen = {"box": boxes[query], "scores": scores(out, config)[0, t, query].cpu().numpy(),
            "maps": maps}
    if moment["rank"][1]:
        (context,) = set(moment["labels"]) & set(dataset.class_groups["context"])
        cause = cxcywh_to_xyxy(target["cause"][actor, t]).numpy()
        on_cause = (maps[context] * cover(cause, maps.shape[1:])).sum()
        share = float(on_cause / max(maps[context].sum(), 1e-12))       # 0 behind a closed gate
        seen |= {"cause": cause, "context": context, "share": share}
    return seen


def cover(box, size):
    """The share of each cell of a map (H', W') that a box x1, y1, x2, y2 in [0, 1] covers; NaN for
    a box of NaN."""
    x1, y1, x2, y2 = np.asarray(box, float)
    row, column = np.arange(size[0]), np.arange(size[1])
    down = np.minimum(y2 * size[0], row + 1) - np.maximum(y1 * size[0], row)             # (H',)
    across = np.minimum(x2 * size[1], column + 1) - np.maximum(x1 * size[1], column)     # (W',)
    return down.clip(min=0)[:, None] * across.clip(min=0)


def draw_moment(dataset, moment):
    """A line of FIGURE_WIDTH: a moment's frame, then a panel for each of the actor's labels."""
    clip, target = dataset[moment["clip"]]
    picture = stored_pictures(dataset, moment["clip"], clip)[moment["t"]]
    width = FIGURE_WIDTH // (1 + len(moment["labels"]))
    size = round(width * picture.shape[0] / picture.shape[1]), width
    picture, letters = resize(picture, size), FIGURE_LETTERS
    boxes, colours = [moment["box"]], [COLOURS[0]]
    if "cause" in moment:
        boxes, colours = [moment["box"], moment["cause"]], [COLOURS[0], WHITE]
    boxes = np.stack(boxes) * (size[1], size[0], size[1], size[0])
    names = drawable(tuple(dataset.class_names))
    panels = [(f"{target['video']}, frame {int(target['frame_ids'][moment['t']])}", picture)]
    for label in moment["labels"]:
        title = f"{names[label]} {moment['scores'][label]:.2f}"
        if label == moment.get("context"):
            title += f", {moment['share']:.2f} on its cause"
        panels.append((title, shine(picture, upsample(moment["maps"][[label]], size), COLOURS[:1])))
    for _, image in panels:
        draw_boxes(image, boxes, colours, letters)
    return in_rows(panels, len(panels), letters)


def attention_shares(model, dataset, config, device, share=1.0):
    """What the figure shows, in numbers over the data set, or a share of its clips: where the
    attention of an actor's labels lies, for each class group: {"outside", "cause", "area"}: its
    share outside of the actor's box; that on the cause of the actor's context label, where it has
    one, whichever the group; and the share of the frame that this cause covers. These are of the
    last decoder layer; of an earlier one there is "cause, layer N", N from 1.

    The maps of the queries that are matched with the actors, mean over heads; means over frames,
    actors and labels, NaN where there is none. {} for data sets whose targets do not have "cause":
    all but the synthetic one. Under torch.distributed each rank takes its share of the clips and
    has the result of all.
    """
    if "cause" not in dataset[0][1]:
        return {}
    rank, world = this_rank()
    count = max(1, round(share * len(dataset)))
    indices = np.linspace(0, len(dataset) - 1, count).astype(int)[rank::world].tolist()
    group_of = {c: group for group, classes in dataset.class_groups.items() for c in classes}
    found = {group: {"outside": [], "cause": [], "area": []} for group in dataset.class_groups}
    was_training = model.training
    model.eval()
    for clips, _, targets in DataLoader(Subset(dataset, indices), 8, collate_fn=collate):
        with torch.inference_mode():
            out = model(clips.to(device), return_attention=True)
        layers = [layer["attention"] for layer in (*out.get("aux_outputs", ()), out)]
        attention = torch.stack(layers).float().cpu().numpy()       # (S, B, T, A, C, H', W')
        for of_group in found.values():
            for number in range(1, len(layers)):
                of_group.setdefault(f"cause, layer {number}", [])
        for b, t, query, n in torch.stack(match(out, targets, config), 1).cpu().tolist():
            target, maps = targets[b], attention[:, b, t, query]                # (S, C, H', W')
            own = cover(cxcywh_to_xyxy(target["boxes"][n, t]), maps.shape[2:])
            cause = cover(cxcywh_to_xyxy(target["cause"][n, t]), maps.shape[2:])
            for c in target["labels"][n, t].nonzero()[:, 0].tolist():
                whole = maps[:, c].sum((1, 2)).clip(min=1e-12)  # a shut gate leaves zeros
                of_box = (maps[:, c] * own).sum((1, 2)) / whole                 # (S,)
                *earlier, last = (maps[:, c] * cause).sum((1, 2)) / whole
                values = {"outside": 1 - of_box[-1], "cause": last, "area": cause.mean()}
                for number, value in enumerate(earlier, 1):
                    values[f"cause, layer {number}"] = value
                for name, value in values.items():
                    found[group_of[c]][name].append(float(value))
    model.train(was_training)
    of_ranks = [found]
    if world > 1:
        of_ranks = [None] * world
        dist.all_gather_object(of_ranks, found)
    return {group: mean_shares([of_rank[group] for of_rank in of_ranks]) for group in found}


def mean_shares(parts):
    """{name: list of values} of each rank -> {name: their mean without NaN, NaN where none is}."""
    columns = {}
    for part in parts:
        for name, values in part.items():
            columns.setdefault(name, []).extend(values)
    shares = {}
    for name, values in columns.items():
        known = np.array(values)[~np.isnan(values)]
        shares[name] = float(known.mean()) if len(known) else float("nan")
    return shares


def say_shares(shares):
    """`attention_shares` in words, a line for each layer."""
    area = np.mean([of_group["area"] for of_group in shares.values()])
    columns = []
    for name in next(iter(shares.values())):
        if name.startswith("cause, layer"):
            columns.append(name)
    columns.append("cause")
    lines = ["attention of an actor's labels on what causes its context label, which covers "
             f"{area:.3f} of the frame:"]
    for number, name in enumerate(columns, 1):
        of_layer = ", ".join(f"{group} {of_group[name]:.3f}" for group, of_group in shares.items())
        lines.append(f"  decoder layer {number} of {len(columns)}: {of_layer}")
    return "\n".join(lines)


# ---- the encoder's sampling points ----

@torch.inference_mode()
def sampling_points(model, clip, place, device):
    """Where the encoder's last layer looks from the cell at `place` (t, y, x), each in [0, 1], of
    the decoder's grid -> points (n, 3) of t, y, x, 0 and 1 the clip's edges, n = M*L*P; their level
    (n,); their weight (n,), the mean over heads."""
    layer = model.encoder.layers[-1]
    inputs = []
    hook = layer.register_forward_pre_hook(lambda module, arguments: inputs.append(arguments))
    model(clip[None].to(device))
    hook.remove()
    x, positions, _, references, shapes, scales, _ = inputs[0]
    level = model.config.grid_level
    inside = [min(int(share * count), count - 1) for share, count in zip(place, shapes[level])]
    cell = int(np.ravel_multi_index(inside, shapes[level]))
    cell += sum(t * h * w for t, h, w in shapes[:level])
    offsets, logits = layer.sampling_offsets_and_logits((x + positions)[:, [cell]])
    places = references[:, [cell], None, :, None]                            # (1, 1, 1, L, 1, 3)
    points = places + offsets * scales[:, None]                              # (1, 1, M, L, P, 3)
    levels = torch.arange(len(shapes))[:, None].expand(logits.shape[2:])     # (M, L, P)
    weights = logits.float().flatten(3).softmax(-1) / logits.shape[2]        # (1, 1, M, L*P)
    return (points.reshape(-1, 3).float().cpu().numpy(), levels.flatten().numpy(),
            weights.flatten().cpu().numpy())


def draw_points(pictures, points, levels, weights, place, width):
    """Pictures (T, H, W, 3) in rows, each with the sampling points that are nearest in time: a ring
    of the level's colour, whose area is the weight; a white cross where the cell is; a legend."""
    columns, size = arrange(len(pictures), pictures[0].shape[:2], width)
    letters, arm, last = letter_size(size), min(size) / 30, len(pictures) - 1
    line = max(2, letters // 7)
    slots = (points[:, 0] * len(pictures)).astype(int).clip(0, last)         # (n,)
    panels = []
    for t, picture in enumerate(pictures):
        image = resize(picture, size)
        draw, near = ImageDraw.Draw(image), slots == t
        centres = points[near][:, [2, 1]] * (size[1], size[0])               # x, y
        radii = 1 + 2.5 * arm * weights[near] ** 0.5
        for (x, y), level, radius in zip(centres, levels[near], radii):
            draw.ellipse((x - radius, y - radius, x + radius, y + radius), None, COLOURS[level],
                         line)
        if t == min(int(place[0] * len(pictures)), last):
            x, y = place[2] * size[1], place[1] * size[0]
            draw.line((x - arm, y, x + arm, y), WHITE, line)
            draw.line((x, y - arm, x, y + arm), WHITE, line)
        panels.append((f"frame {t + 1}", image))
    sheet = in_rows(panels, columns, letters)
    legend = [("+ the cell that looks", WHITE), ("ring: a point, its area the weight", WHITE)]
    for level in np.unique(levels).tolist():
        legend.append((f"level {level + 1}", COLOURS[level]))
    band = Image.new("RGB", (sheet.shape[1], letters + 10), BLACK)
    draw, x = ImageDraw.Draw(band), 4
    for words, colour in legend:
        draw.text((x, 3), words, colour, font(letters))
        x += draw.textlength(words + "    ", font(letters))
    return np.concatenate([sheet, np.asarray(band)])


# ---- a run's curves ----

def training_curves(lines, history, parts, path):
    """A run's curves over its epochs as a picture: loss parts, loss, rate and gradient norm of the
    steps (lines of log.jsonl), mAP of the evaluations (rows of results.csv)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    stride = max(len(lines) // 500, 1)      # a point of a curve is a mean over so many steps
    lines = lines[:len(lines) // stride * stride]
    figure = Figure(figsize=(12, 7), layout="constrained")
    FigureCanvasAgg(figure)

    def points(name):
        return np.array([line[name] for line in lines]).reshape(-1, stride).mean(1)    # (points,)

    *of_steps, of_evaluations = figure.subplots(2, 2).flat
    for axes, names in zip(of_steps, (parts, ("loss",), ("lr", "grad_norm"))):
        for name in names:
            axes.plot(points("epoch"), points(name), label=name)
        axes.set(xlabel="epoch", yscale="log")
    epochs = [row["epoch"] for row in history]
    for name in history[0]:
        if "f-mAP" in name or name.endswith("@0.5"):
            of_evaluations.plot(epochs, [row[name] for row in history], marker=".", label=name)
    of_evaluations.set(xlabel="epoch", ylim=(0, 1))
    for axes in figure.axes:
        axes.legend(fontsize="small", loc="upper right")
    figure.savefig(path, dpi=80)


# ---- clips with their pictures ----

def dataset_clips(dataset, indices, rate):
    """Yields (clip, target, pictures) of clips of a data set; pictures: see `stored_pictures`.

    The times of the frames, target["times"], follow from their numbers: AVA's are seconds, others
    count from 1, `rate` a second.
    """
    for index in indices:
        clip, target = dataset[index]
        times = target["frame_ids"].tolist()
        if dataset.name != "ava":
            times = [(number - 1) / rate for number in times]
        yield clip, target | {"times": times}, stored_pictures(dataset, index, clip)


def stored_pictures(dataset, index, clip):
    """The frames of a clip (3, T, H, W) as they are stored, not at the size that the model sees:
    pictures (H, W, 3) uint8, T or for key frames one. Drawn clips are stored nowhere else."""
    if not hasattr(dataset, "source"):
        return list(clip.permute(1, 2, 3, 0).numpy())                        # (T, H, W, 3)
    config, video = dataset.config, int(dataset.clip_videos[index])
    count = int(dataset.table.num_frames[video])
    slots = dataset.clip_first[index] + np.arange(config.frames) * config.sampling_rate     # (T,)
    if config.key_frame:
        slots = slots[[config.frames // 2]]
    distinct, place = np.unique(slots.clip(0, count - 1), return_inverse=True)
    images = dataset.source.read(dataset.videos[video], distinct, count)
    return [np.asarray(images[i]) for i in place]


def video_clips(path, config, rate, seen=True):
    """Yields (clip, target, pictures) of a video file as `dataset_clips` does, decoded in a stream;
    clips that no model is to have `seen` are None.

    Clips of T frames begin T // 2 frames apart, and a frame is taken from the clip in whose middle
    it is (target["frames"]), so that it is seen with what comes before and after; the last clip is
    filled up with the last frame. For key-frame models a clip begins with every second (by the mean
    rate), and its middle frame is a frame of the result. Raises OSError where the file breaks off,
    ValueError where the Config's sampling rate would leave out frames.
    """
    if not config.key_frame and config.sampling_rate > 1:
        raise ValueError(f"sampling_rate {config.sampling_rate} leaves frames without boxes: --set "
                         "sampling_rate=1")
    reach = (config.frames - 1) * config.sampling_rate + 1          # frames from first to last
    step = max(1, round(rate)) if config.key_frame else max(1, config.frames // 2)
    decoded, number = 0, 0
    buffer = []                 # frames: {"picture", "seconds", "clip": as the model sees it}
    for picture, seconds in video_frames(path):
        if len(buffer) == reach:                                    # and there is a frame behind it
            yield video_clip(path, buffer, number, config, step, seen, last=False)
            number += 1
            buffer = buffer[step:]
        if decoded >= number * step:
            buffer.append({"picture": picture, "seconds": seconds, "clip": None})
        decoded += 1
    say_if_not_whole(path, decoded)
    middle = config.frames // 2 * config.sampling_rate if config.key_frame else 0
    while buffer and (number == 0 or len(buffer) > middle):         # too few for a whole clip
        yield video_clip(path, buffer, number, config, step, seen, last=True)
        number += 1
        buffer = buffer[step:] if config.key_frame else []


@lru_cache
def say_if_not_whole(path, decoded):
    """Says, once, that frames of a video file are lost."""
    note = not_whole(path, decoded)
    if note:
        print(note)


def video_clip(path, buffer, number, config, step, seen, last):
    """Clip `number` of a video file from its frames `buffer`, fewer at the video's end."""
    slots = torch.arange(config.frames)
    indices = (slots * config.sampling_rate).clamp(max=len(buffer) - 1)
    used = [buffer[index] for index in indices.tolist()]
    target = {"video": Path(path).stem, "video_index": 0,
              "size": torch.tensor(used[0]["picture"].shape[:2])}
    clip = None
    if seen:
        transform = draw_transform(target["size"].tolist(), config, augment=False)
        for frame in used:
            if frame["clip"] is None:                               # clips share frames
                frame["clip"] = render([Image.fromarray(frame["picture"])], transform)
        clip = torch.cat([frame["clip"] for frame in used], 1)      # (3, T, H, W)
    edge = (config.frames - step) // 2
    begin = edge if number else 0
    end = len(buffer) if last else edge + step
    target |= {"frame_ids": slots + number * step + 1, "frames": (slots >= begin) & (slots < end)}
    if config.key_frame:
        used = used[config.frames // 2:][:1]
        target |= {"frame_ids": torch.tensor([number + 1]), "frames": torch.tensor([True])}
    target["times"] = [frame["seconds"] for frame in used]
    return clip, target, [frame["picture"] for frame in used]


# ---- files ----

def write_tubes(out, head, actors, frames, names):
    """tubes.json and tubes.csv in the folder `out`, see the top of this file -> their paths.

    head: what tubes.json has before its actors; frames: as of `find_actors`. Written actor by
    actor: the boxes of a long video are never all there as Python objects.
    """
    seconds = dict(zip(frames["number"], frames["seconds"]))
    unfinished = out / "tubes.json.tmp"
    with open(unfinished, "w") as file:
        file.write("{\n")
        for name, value in head.items():
            file.write(f"{json.dumps(name)}: {json.dumps(value)},\n")
        file.write('"actors": [\n')
        for number, actor in enumerate(actors, 1):
            comma = "," if number < len(actors) else ""
            file.write(json.dumps(actor_record(number, actor, seconds, names)) + comma + "\n")
        file.write("]}\n")
    height, width = frames["size"]
    with open(out / "tubes.csv", "w", newline="") as file:
        table = csv.writer(file)
        for number, actor in enumerate(actors, 1):
            for tube in actor["tubes"]:
                boxes = tube["boxes"].astype(float) / (width, height, width, height)     # (k, 4)
                boxes = boxes.clip(0, 1).round(4).tolist()
                for frame, box in zip(tube["frames"].tolist(), boxes):
                    table.writerow([head["video"], f"{seconds[frame]:.3f}", *box, tube["label"] + 1,
                                    round(tube["score"], 4), number])
    unfinished.replace(out / "tubes.json")      # whole or not at all: it says that a video is done
    return [out / "tubes.json", out / "tubes.csv"]


def actor_record(number, actor, seconds, names):
    """An actor as tubes.json has it."""
    tubes = []
    for tube in actor["tubes"]:
        frames = tube["frames"].tolist()
        tubes.append({"label": names[tube["label"]], "score": round(tube["score"], 4),
                      "frames": frames, "seconds": [round(seconds[frame], 3) for frame in frames],
                      "boxes": tube["boxes"].astype(float).round(1).tolist()})
    return {"actor": number, "colour": "#%02x%02x%02x" % actor["colour"], "tubes": tubes}


# ---- the command ----

def show(detector, clips, video, rate, out, names, classes, args):
    """Finds the tubes of a video or clip and writes what the top of this file says to `out`.

    clips(seen): the clips, anew each time; classes: ids of those whose attention is drawn; args:
    the command line's. Raises ValueError and OSError where the clips cannot be read.
    """
    actors, frames = find_actors(detector, clips(True), args.min_score)
    name, out = video.replace("/", "_"), Path(out)
    out.mkdir(parents=True, exist_ok=True)
    (out / "tubes.json").unlink(missing_ok=True)        # it says that the others are whole
    paths = [out / f"{name}.mp4", out / f"{name}.png"]
    count, sheet = len(frames["number"]), []
    on_sheet = np.linspace(0, count - 1, SHEET_FRAMES).astype(int).tolist()

    def pictures():
        to_draw = frames_to_draw(detector, clips(args.maps), actors, drawable(tuple(names)),
                                 classes, args.heads if args.maps else None, args.top)
        for number, frame in enumerate(bar(to_draw, "drawing", total=count, unit="frame")):
            if number in on_sheet:
                sheet.append(draw_frame(frame, args.width // 2 - GAP))
            yield draw_frame(frame, args.width)

    save_video(paths[0], pictures(), rate, frames["seconds"])
    save_picture(paths[1], in_pairs(sheet))
    if args.look_from:
        clip, place = next(clips(True))[0], (0.5, args.look_from[1], args.look_from[0])
        points = sampling_points(detector.model, clip, place, detector.device)
        seen = clip.permute(1, 2, 3, 0).numpy()                              # (T, H, W, 3)
        paths.append(out / f"{name}-points.png")
        save_picture(paths[-1], draw_points(seen, *points, place, args.width))
    head = {"video": video, "rate": round(rate, 3), "size": frames["size"], "classes": names,
            "options": remembered(args)}
    paths += write_tubes(out, head, actors, frames, names)
    found = outcome(actors, frames, args.min_score)
    print(f"{video}: {found}; wrote " + ", ".join(map(str, paths)))


def outcome(actors, frames, min_score):
    """What was found, in words; where nothing was, why."""
    if actors:
        tubes = sum(len(actor["tubes"]) for actor in actors)
        return f"{counted(len(actors), 'actor')}, {counted(tubes, 'tube')}"
    if frames["best"] < min_score:
        return f"no tube: the best box scores {frames['best']:.2f}, below --min-score {min_score}"
    return ("no tube: no boxes of one class follow each other over "
            + counted(frames["shortest"], "frame"))


def counted(number, noun):
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def remembered(args):
    """What a result depends on besides the video, as tubes.json has it."""
    path = Path(args.ckpt)
    options = {"ckpt": str(path), "ckpt_time": round(path.stat().st_mtime)}
    return options | {name: getattr(args, name) for name in REMEMBERED}


def is_done(path, args, video):
    """Whether there is a tubes.json that was made with the same options, later than the video."""
    if not path.is_file() or path.stat().st_mtime < Path(video).stat().st_mtime:
        return False
    return json.loads(path.read_text()).get("options") == remembered(args)


def find_videos(sources, out):
    """The video files that --video names: files, and what is in folders, but for the results in
    `out`. ValueError where there is none, and where two have one name."""
    videos = []
    for source in map(str, sources):
        if "://" in source or source.startswith("/dev/") or source.isdigit():
            raise ValueError(f"--video {source}: files and folders only; record a stream or camera "
                             "first, for example by ffmpeg -i SOURCE -t 60 in.mp4")
        if not Path(source).is_dir():
            videos.append(Path(source))
            continue
        inside = []
        for path in video_files(source):
            if out.resolve() not in path.resolve().parents:
                inside.append(path)
        if not inside:
            raise ValueError(f"no video ({', '.join(VIDEO_SUFFIXES)}) in {source}")
        videos += inside
    names = [path.stem for path in videos]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"several videos are called {', '.join(twice[:5])}: their results would "
                         "share a folder; rename them")
    return videos


def show_videos(detector, rank, names, classes, args):
    """`show` for the files of --video, each in a folder of its own where there are several. The
    ranks share them; those that are done are left out. Returns the messages of those that cannot be
    read; where there is one file alone, that is raised."""
    root, failed = Path(args.out or "out"), []
    videos = find_videos(args.video, root)
    several = len(videos) > 1 or Path(args.video[0]).is_dir()
    for path in videos[rank::int(os.environ.get("WORLD_SIZE", 1))]:
        out = root / path.stem if several or not args.out else root
        if (out / f"{path.stem}.mp4").resolve() == path.resolve():
            raise ValueError(f"{path} would be overwritten by its own result: choose another --out")
        if several and is_done(out / "tubes.json", args, path):
            print(f"{path} is done, by the same options: {out / 'tubes.json'}")
            continue
        try:
            rate = video_rate(path)
            clips = partial(video_clips, path, detector.config, rate)
            drawn_rate = 1 if detector.config.key_frame else rate
            show(detector, clips, path.stem, drawn_rate, out, names, classes, args)
        except (OSError, ValueError) as error:
            if not several:
                raise
            print(error)
            failed.append(str(error))
    return failed


def arguments(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0],
                                     usage="python visualize.py [--ckpt FILE] [options]")
    add_source_arguments(parser)
    group = parser.add_argument_group("what is drawn")
    add = group.add_mutually_exclusive_group().add_argument
    add("--clip", type=at_least(0), metavar="N", help="a clip of the data set, from 0 (default: 0)")
    add("--video-name", metavar="NAME", help="a whole video of the data set")
    add("--video", metavar="FILE", nargs="+", help="your own: files, folders; processes share them")
    add("--figure", metavar="FILE", help="no video but this PNG: an actor of a typical clip, and "
                                         "the attention of each of its labels")
    add = group.add_argument
    add("--classes", nargs="+", default=[], metavar="a,b",
        help="whose attention is drawn (default: each actor's best)")
    add("--heads", choices=("all", "content"), default="all",
        help="whose mean the attention is; content: those that see content alone")
    add("--layer", type=at_least(1), metavar="N",
        help="of the decoder, whose attention it is, from 1 (default: the last)")
    add("--no-maps", dest="maps", action="store_false", help="tubes without attention, sooner")
    add("--look-from", nargs=2, type=share, metavar=("X", "Y"),
        help="draw the encoder's sampling points too, from the cell at this place of the first "
             "clip's middle frame, in shares of width and height")
    add("--min-score", type=share, default=0.3, metavar="SCORE",
        help="boxes below this are left out (0.3)")
    add("--top", type=at_least(1), default=3, metavar="N", help="classes written at an actor (3)")
    add("--width", type=at_least(320), default=1920, metavar="PIXELS",
        help="of a picture, at most (1920)")
    add("--rate", type=float, help="frames a second of the data set (25; short clips 4, AVA 1)")
    add("--out", metavar="DIR", help="folder of the results (default: out/NAME)")
    args = parser.parse_args(argv)
    if args.rate is not None and not 0.001 <= args.rate <= 1000:
        parser.error(f"--rate {args.rate} is not between 0.001 and 1000")
    return args


def share(text):
    """A type of argparse's: a number in [0, 1]."""
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not in [0, 1]")
    return value


def class_names(checkpoint, config):
    """Names of the checkpoint's classes: the authors' checkpoints hold none, but their numbers of
    classes are those of known data sets."""
    known = {len(names): names for names in (UCF_CLASSES, JHMDB_CLASSES, AVA_CLASSES_80)}
    numbered = [f"class {number}" for number in range(1, config.num_classes + 1)]
    return list(checkpoint["classes"] or known.get(config.num_classes, numbered))


def chosen_classes(texts, names):
    """Ids of the classes of --classes: each text a name, or several with commas between."""
    chosen = []
    for text in texts:
        for name in [text] if text in names else text.split(","):
            if name not in names:
                raise ValueError(f"unknown class {name}; the checkpoint knows: {', '.join(names)}")
            chosen.append(names.index(name))
    return chosen


def show_clips(detector, dataset, classes, args):
    """`show` for a clip or a whole video of a data set."""
    config = detector.config
    if args.video_name:
        if config.sampling_rate > 1 and not config.key_frame:
            raise ValueError(f"--video-name with sampling_rate {config.sampling_rate}: its clips "
                             "are not in the order of the frames; --set sampling_rate=1")
        if args.video_name not in dataset.videos:
            raise ValueError(f"no video {args.video_name!r} among the {len(dataset.videos)} of "
                             f"{dataset.name}: {', '.join(list(dataset.videos)[:5])}, ...")
        place = list(dataset.videos).index(args.video_name)
        indices, video = np.flatnonzero(clip_videos(dataset) == place).tolist(), args.video_name
    else:
        index = args.clip or 0
        if index >= len(dataset):
            raise ValueError(f"--clip {index}: {dataset.name} has clips 0 to {len(dataset) - 1}")
        indices, video = [index], f"{dataset.name}-clip-{index}"
    usual = 25 if config.frames >= 30 or config.key_frame else 4
    rate = args.rate or (1 if dataset.name == "ava" else usual)
    out = args.out or Path("out") / video.replace("/", "_")
    names = list(dataset.class_names)
    show(detector, lambda seen: dataset_clips(dataset, indices, rate), video, rate, out, names,
         classes, args)


def draw_all(args, device, rank, precision):
    """What the command line asks for; precision: dtype of autocast."""
    if args.out and Path(args.out).is_file():
        raise ValueError(f"--out {args.out} is a file; name the folder of the results")
    args.ckpt = find_checkpoint(args.ckpt)
    model, config, checkpoint = load_model(args.ckpt, args.set, device, args.preset)
    if args.heads == "content" and "split_heads" not in config.quirks:
        raise ValueError(f"--heads content: no heads of {args.ckpt} see content alone (no quirk "
                         "split_heads)")
    if args.layer and args.layer > config.decoder_layers:
        raise ValueError(f"--layer {args.layer}: {args.ckpt} has {config.decoder_layers} decoder "
                         "layers")
    if args.look_from and config.encoder == "transformer":
        raise ValueError(f"--look-from: the ordinary transformer encoder of {args.ckpt} has no "
                         "sampling points, every cell looks at every cell")
    if rank == 0:
        print(f"{args.ckpt} is {checkpoint['kind']}")
    detector = Detector(model, config, device, precision, args.layer)
    if args.video:
        if checkpoint["dataset"] == "synthetic" and rank == 0:
            print(f"{args.ckpt} knows the drawn figures of the synthetic set, and no real video")
        names = class_names(checkpoint, config)
        classes = chosen_classes(args.classes, names)
        failed = show_videos(detector, rank, names, classes, args)
        if dist.is_initialized():
            dist.barrier()      # torchrun ends the others where one fails: all are through
        if failed:
            said = "\n".join(failed)
            raise ValueError(f"{counted(len(failed), 'video')} could not be read:\n{said}")
        return
    if rank > 0:
        return
    trained = checkpoint.get("settings", {}) | {"dataset": checkpoint["dataset"]}
    dataset = open_dataset(args, config, checkpoint["classes"], args.ckpt, trained)
    if args.figure:
        if attention_sheet(model, dataset, config, args.figure, device, 1, args.layer):
            print(f"wrote {args.figure}")
        return
    show_clips(detector, dataset, chosen_classes(args.classes, dataset.class_names), args)


def main(argv=None):
    args = arguments(argv)
    device, rank = start(args.device)
    args.precision = args.precision or default_precision(device, training=False)
    try:
        autocast = set_precision(args.precision, device)
        if rank == 0:
            print(f"visualize.py: {device}, precision {args.precision}", flush=True)
        draw_all(args, device, rank, autocast)
    except (OSError, ValueError) as error:
        raise SystemExit(f"visualize.py: {error}") from error
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
