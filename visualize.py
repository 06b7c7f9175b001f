"""Pictures of what the model sees: tubes, class scores and class attention maps on the frames (Sec. 5.4, Fig. 2 and 7).

    python visualize.py --ckpt runs/NAME/best.pt --clip 3 --out out/                    # a clip of the data set
    python visualize.py --ckpt C --data DIR --video-name Biking/v_Biking_g01_c01 --classes Biking --out out/
    python visualize.py --ckpt C --video in.mp4 --out out/                              # a video of one's own
    torchrun --nproc_per_node 8 visualize.py --ckpt C --video folder/ --out out/        # many, one folder each

Each writes NAME.mp4 (every frame, at its time, without sound), NAME.png (six frames, one above the other), tubes.json and
tubes.csv. A picture has a panel with the tubes, one colour an actor, and beside it panels with the class attention maps in
the colours of the actors they belong to: one panel a class of --classes, or a single one with each actor's best class.
--look-from adds NAME-points.png, the encoder's sampling points. All clips are gone through twice and one is in memory at a
time: the first pass finds the tubes, the second draws them.

tubes.json: {"video", "rate" (frames per second), "size" (height, width), "classes", "actors": [{"colour", "tubes":
[{"label", "score", "frames" (k 1-based numbers), "seconds" (k), "boxes" (k of x1, y1, x2, y2 in pixels of the video)}]}]}; an
actor has a tube for each class. tubes.csv: AVA's columns, a line a box and class: video, second, x1, y1, x2, y2 in [0, 1],
class number from 1, the tube's score.
"""
# B clips, T frames, A actor queries, C classes, N actors, n detections; H, W of a frame, H', W' of an attention map

import argparse
import contextlib
import csv
import json
import os
from fractions import Fraction
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch.nn import functional as F

from data import MEAN, STD, UCF_CLASSES, draw_view, render
from evaluate import ROWS, add_source_arguments, bar, clip_videos, load_model, open_dataset, rows, shortest_tube, start
from metrics import box_iou, link_tubes
from objective import cxcywh_to_xyxy

COLOURS = [(255, 99, 71), (64, 156, 255), (80, 220, 100), (255, 196, 0), (214, 112, 255), (0, 214, 214),
           (255, 128, 200), (170, 220, 60), (255, 150, 60), (140, 140, 255)]     # told apart on dark and light ground
TRUTH = (255, 255, 255)
TEXT_SIZE, BAND = 14, 22                # pixels: letters, the caption above a panel
SHORTEST_SIDE = 240                     # frames smaller than this are enlarged by a whole factor, so that text fits
SHEET_FRAMES = 6
TICK = Fraction(1, 60000)               # of a second: the grain of a written video's times
VIDEOS = (".mp4", ".avi", ".mkv", ".mov", ".webm", ".m4v", ".mpg", ".mpeg")     # what is taken from a folder


def frames_of(clip):
    """A clip (3, T, H, W), uint8 or normalised, as pictures (T, H, W, 3) uint8."""
    if clip.dtype == torch.uint8:
        return clip.permute(1, 2, 3, 0).numpy()
    pixels = clip.permute(1, 2, 3, 0).numpy() * STD + MEAN                  # (T, H, W, 3)
    return pixels.round().clip(0, 255).astype(np.uint8)


def enlarge(picture):
    """A picture (H, W, 3) repeated by the whole factor that takes its short side to SHORTEST_SIDE at least."""
    factor = -(-SHORTEST_SIDE // min(picture.shape[:2]))
    return picture.repeat(factor, 0).repeat(factor, 1)


def upsample(maps, size):
    """Attention maps (N, H', W') at a frame's size (H, W), each 1 at its largest value.

    A map covers the whole frame, cell (i, j) being centred at ((i + 0.5) / H', (j + 0.5) / W') of it.
    """
    maps = torch.as_tensor(maps, dtype=torch.float32)
    maps = maps / maps.amax((1, 2), keepdim=True).clamp(min=1e-12)
    return F.interpolate(maps[:, None], size, mode="bilinear", align_corners=False)[:, 0].numpy()       # (N, H, W)


def overlay(picture, maps, colours):
    """Maps (N, H, W) in [0, 1] as light of N colours on the picture (H, W, 3) in dark grey."""
    grey = picture @ np.full(3, 0.15, np.float32)                           # (H, W)
    canvas = np.repeat(grey[..., None], 3, -1)                              # (H, W, 3)
    for map, colour in zip(maps, colours):
        canvas += 0.8 * map[..., None] * (np.array(colour, np.float32) - canvas)
    return canvas.round().astype(np.uint8)


def draw_boxes(picture, boxes, texts, colours):
    """Boxes (N, 4) x1, y1, x2, y2 in the picture's pixels with their lines of text, kept inside and off each other."""
    image = Image.fromarray(picture)
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(size=TEXT_SIZE)
    for box, colour in zip(boxes, colours):
        x1, y1, x2, y2 = np.clip(box, 0, [image.width - 1, image.height - 1] * 2).tolist()
        draw.rectangle((x1, y1, max(x1, x2), max(y1, y2)), outline=colour, width=2)
    taken = []
    for box, lines, colour in zip(boxes, texts, colours):
        if not lines:
            continue
        width = max(draw.textlength(line, font) for line in lines) + 6
        height = len(lines) * (TEXT_SIZE + 3) + 2
        x = min(max(box[0], 0), max(image.width - width, 0))
        above, below, inside = box[1] - height, box[3] + 1, max(box[1] + 2, 0)
        y = above if above >= 0 else below if below + height <= image.height else inside
        y = min(y, max(image.height - height, 0))
        for left, top, right, bottom in sorted(taken, key=lambda place: place[1]):      # below the labels in the way
            if x < right and left < x + width and y < bottom and top < y + height:
                y = bottom
        taken.append((x, y, x + width, y + height))
        draw.rectangle((x, y, x + width, y + height), fill=colour)
        for i, line in enumerate(lines):
            draw.text((x + 3, y + i * (TEXT_SIZE + 3)), line, fill=(0, 0, 0), font=font)
    return np.asarray(image)


def captioned(picture, text):
    """The picture under a white band with the text, its end cut off where it does not fit."""
    image = Image.new("RGB", (picture.shape[1], picture.shape[0] + BAND), (255, 255, 255))
    image.paste(Image.fromarray(picture), (0, BAND))
    ImageDraw.Draw(image).text((4, 2), text, fill=(0, 0, 0), font=ImageFont.load_default(size=TEXT_SIZE))
    return np.asarray(image)


def save_sheet(path, lines):
    """Lines of pictures, all of one size, as one PNG; shorter lines are filled with white."""
    blank = np.full_like(lines[0][0], 255)
    columns = max(len(line) for line in lines)
    sheet = np.concatenate([np.concatenate([*line, *[blank] * (columns - len(line))], 1) for line in lines])
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(sheet).save(path)


def save_video(path, pictures, rate, seconds=None):
    """Pictures (H, W, 3) uint8, one after another, as an MP4 that any player takes (H.264 where PyAV has it): `rate` a
    second, or at the times `seconds`."""
    import av
    codec = "libx264" if "libx264" in av.codecs_available else "mpeg4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=Fraction(rate).limit_denominator(1001),
                                      options={"preset": "veryfast"} if codec == "libx264" else {})
        stream.pix_fmt = "yuv420p"                                          # it halves both sides: they must be even
        stream.codec_context.time_base = TICK
        last = -1
        for number, picture in enumerate(pictures):
            picture = np.pad(picture, [(0, picture.shape[0] % 2), (0, picture.shape[1] % 2), (0, 0)], "edge")
            if not stream.codec_context.is_open:
                stream.height, stream.width = picture.shape[:2]
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            time = seconds[number] - seconds[0] if seconds else number / rate
            frame.pts = last = max(last + 1, round(time / TICK))            # two frames at one time would be refused
            frame.time_base = TICK
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def run(model, clip, target, config, device, **options):
    """The model on one clip (3, T, H, W): its outputs, and `evaluate.rows` of its frames as (frames, A, ...) arrays."""
    with torch.inference_mode():
        out = model(clip[None].to(device), **options)
    part = rows(out, [target], config, {target["video"]: 0})
    queries = out["pred_boxes"].shape[2]
    return out, {name: values.reshape(-1, queries, *values.shape[1:]) for name, values in part.items()}


def find_actors(model, clips, config, device, min_score):
    """Tubes of the clips (an iterable of (clip, target, pictures)), grouped by actor, best first; and of the frames in their
    order {"number", "seconds"}, and their "size".

    A tube is of one class, so an actor with several classes has several tubes in one place: they are one actor when
    they overlap by an IoU of 0.5 over the frames that they share.
    """
    parts, frames = [], {"number": [], "seconds": []}
    for clip, target, _ in bar(clips, "finding tubes", unit="clip"):
        _, part = run(model, clip, target, config, device)
        taken = torch.as_tensor(target["frames"])
        frames["number"] += target["frame_ids"][taken].tolist()
        frames["seconds"] += [second for second, shown in zip(target["times"], taken) if shown]
        frames["size"] = [int(side) for side in target["size"]]
        seen = (part["class_prob"].max(-1) * part["conf"]) >= min_score     # (frames, A)
        parts.append({name: values[seen] for name, values in part.items()})
    if not parts:
        raise SystemExit("no frames to draw on: the video is empty")
    found = {name: np.concatenate([part[name] for part in parts]) for name in ROWS}
    actors = []
    shortest = 1 if config.key_frame else shortest_tube(config)             # key frames are a second apart
    for tube in sorted(link_tubes(found, min_score=min_score, min_length=shortest), key=lambda tube: -tube["score"]):
        home = next((actor for actor in actors if any(same_place(tube, other) for other in actor)), None)
        actors.append([tube]) if home is None else home.append(tube)
    return actors, frames


def choose_colours(actors):
    """A colour for each actor that no actor of the same frames has before it, as far as there are colours."""
    spans = [(min(tube["frames"][0] for tube in tubes), max(tube["frames"][-1] for tube in tubes)) for tubes in actors]
    chosen = []
    for actor, (first, last) in enumerate(spans):
        met = {chosen[other] for other in range(actor) if spans[other][0] <= last and first <= spans[other][1]}
        chosen.append(next((colour for colour in range(len(COLOURS)) if colour not in met), actor % len(COLOURS)))
    return [COLOURS[colour] for colour in chosen]


def same_place(tube, other):
    """Whether two tubes have a mean IoU of at least 0.5 over the frames that they share (and share some)."""
    _, i, j = np.intersect1d(tube["frames"], other["frames"], return_indices=True)
    return len(i) > 0 and box_iou(tube["boxes"][i], other["boxes"][j]).mean() >= 0.5


def on_frame(actors, frame, names, top):
    """The actors present at a frame: indices, boxes (N, 4), lines of text (`top` best classes), best class ids."""
    indices, boxes, texts, best = [], [], [], []
    for index, tubes in enumerate(actors):
        here = [(tube, np.searchsorted(tube["frames"], frame)) for tube in tubes]
        here = [(tube, i) for tube, i in here if i < len(tube["frames"]) and tube["frames"][i] == frame]
        if here:                                                            # tubes come best first
            indices.append(index)
            boxes.append(here[0][0]["boxes"][here[0][1]])
            texts.append([f"{names[tube['label']]} {tube['score']:.2f}" for tube, _ in here[:top]])
            best.append(here[0][0]["label"])
    return indices, np.array(boxes, dtype=float).reshape(-1, 4), texts, np.array(best, dtype=int)


def draw(model, clips, actors, names, config, device, classes=(), top=3, heads="all"):
    """Yields a picture for each frame of the clips: the tubes, and the attention of `classes` (ids) beside them, the mean
    over all heads or over the "content" heads."""
    palette = choose_colours(actors)
    for clip, target, pictures in clips:
        out, part = run(model, clip, target, config, device, return_attention="content" if heads == "content" else True)
        attention = out["attention"][0].float().cpu()                       # (T, A, C, H', W')
        shown = torch.as_tensor(target["frames"]).nonzero()[:, 0].tolist()
        for row, t in enumerate(shown):
            picture = enlarge(pictures[t])
            height, width = picture.shape[:2]
            indices, boxes, texts, best = on_frame(actors, int(target["frame_ids"][t]), names, top)
            # an actor's box at a frame is that of one query: its maps are the actor's
            queries = np.abs(part["box"][row][None] - boxes[:, None]).sum(-1).argmin(1)                 # (N, A) -> (N,)
            places = boxes * np.array([width, height] * 2) / np.array([*target["size"]][::-1] * 2, dtype=float)
            colours = [palette[index] for index in indices]
            panels = [captioned(draw_boxes(picture, places, texts, colours), f"frame {int(target['frame_ids'][t])}")]
            for chosen in classes or [None]:
                ids = best if chosen is None else np.full(len(indices), chosen)
                maps = upsample(attention[t, queries, ids], (height, width))                            # (N, H, W)
                labels = [[names[c]] if chosen is None else [] for c in ids]
                title = "attention: " + ("each actor's best class" if chosen is None else names[chosen])
                panels.append(captioned(draw_boxes(overlay(picture, maps, colours), places, labels, colours), title))
            yield np.concatenate(panels, 1)


def training_curves(lines, history, parts, path):
    """A run's curves over its epochs as a picture: loss parts, loss, rate and gradient norm of the steps (lines of
    log.jsonl), mAP of the evaluations (rows of results.csv)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    stride = max(len(lines) // 500, 1)      # a point of a curve is a mean over so many steps
    lines = lines[:len(lines) // stride * stride]
    figure = Figure(figsize=(12, 7), layout="constrained")
    FigureCanvasAgg(figure)

    def points(name):
        return np.array([line[name] for line in lines]).reshape(-1, stride).mean(axis=1)

    for axes, names in zip(figure.subplots(2, 2).flat, (parts, ("loss",), ("lr", "grad_norm"), ())):
        for name in names:
            axes.plot(points("epoch"), points(name), label=name)
        axes.set(xlabel="epoch", yscale="log" if names else "linear")
    for name in [name for name in history[0] if "f-mAP" in name or name.endswith("@0.5")]:     # in the last of the four
        axes.plot([row["epoch"] for row in history], [row[name] for row in history], marker=".", label=name)
    axes.set(ylim=(0, 1))
    for axes in figure.axes:
        axes.legend(fontsize="small", loc="upper right")
    figure.savefig(path, dpi=80)


def attention_sheet(model, dataset, config, path, device, clips=4, actors=10):
    """A PNG with a line for each labelled actor of some clips, at the frame with most labels: the frame, then the class
    attention map of each of its labels, from the query that lies best on it. White: the true box, and what the
    label is caused by where the data set knows it. Clips without labels are passed over. Leaves the model as it was."""
    was_training, lines = model.training, []
    model.eval()
    spread = np.linspace(0, len(dataset) - 1, 4 * clips).astype(int).tolist()
    for index in dict.fromkeys([*spread, *range(len(dataset))]):             # all others if these have no label
        if clips == 0 or len(lines) >= actors or (lines and index not in spread):
            break
        clip, target = dataset[index]
        labels = target["labels"] * (target["present"] & target["frames"])[..., None]                   # (N, T, C)
        if not labels.any():
            continue
        clips -= 1
        t = int(labels.sum((0, 2)).argmax())
        out, part = run(model, clip, target, config, device, return_attention=True)
        pictures = frames_of(clip)
        picture = enlarge(pictures[t if len(target["frames"]) == len(pictures) else len(pictures) // 2])
        lines += actor_lines(out, part, target, labels[:, t], t, picture, dataset.class_names)
    model.train(was_training)
    if not lines:
        raise ValueError(f"no clip of {dataset.name} with a label was met: there is nothing to draw")
    save_sheet(path, lines[:actors])


def actor_lines(out, part, target, labels, t, picture, names):
    """The sheet's lines for the labelled actors (labels (N, C)) of a clip at frame t."""
    height, width = picture.shape[:2]
    size = np.array([width, height] * 2)
    row = int(target["frames"][:t].sum())                                   # `part` leaves temporal padding out
    found = part["box"][row] * size / np.array([*target["size"]][::-1] * 2, dtype=float)                # (A, 4)
    truths = cxcywh_to_xyxy(target["boxes"][:, t]).numpy() * size                                       # (N, 4)
    lines = []
    for actor in labels.any(1).nonzero()[:, 0].tolist():
        query, colour = int(box_iou(found, truths[actor]).argmax()), COLOURS[len(lines) % len(COLOURS)]
        box, prob = found[query], part["class_prob"][row, query] * part["conf"][row, query]
        ids = labels[actor].nonzero()[:, 0].tolist()
        best = [f"{names[c]} {prob[c]:.2f}" for c in prob.argsort()[::-1][:3]]
        line = [captioned(draw_boxes(picture, [truths[actor], box], [[], best], [TRUTH, colour]),
                          f"{target['video']} frame {int(target['frame_ids'][t])}")]
        marks = [(box, colour)]
        if "cause" in target and not target["cause"][actor, t].isnan().any():
            marks.append((cxcywh_to_xyxy(target["cause"][actor, t]).numpy() * size, TRUTH))
        for c, map in zip(ids, upsample(out["attention"][0, t, query, ids], (height, width))):
            light = overlay(picture, [map], [colour])
            light = draw_boxes(light, *zip(*[(place, [], c) for place, c in marks]))
            line.append(captioned(light, f"{names[c]}: score {prob[c]:.2f}"))
        lines.append(line)
    return lines


def dataset_clips(dataset, indices, config, rate):
    """(clip, target, pictures (T, H, W, 3)) of clips of a data set, one by one; for key frames T = 1. The frames' times,
    target["times"], follow from their numbers: AVA's are seconds, others are counted from 1, `rate` a second."""
    for index in indices:
        clip, target = dataset[int(index)]
        pictures = frames_of(clip)
        target["times"] = (target["frame_ids"] if dataset.name == "ava" else (target["frame_ids"] - 1) / rate).tolist()
        yield clip, target, pictures[config.frames // 2:][:1] if config.key_frame else pictures


@contextlib.contextmanager
def open_video(path):
    """A video file's container and its stream of pictures; an error that says what is wrong with a file that has none, or
    that breaks off."""
    import av
    if not Path(path).is_file():
        raise SystemExit(f"video missing: {path}")
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise SystemExit(f"{path} holds no video stream, sound alone perhaps; give a file with pictures")
            yield container, container.streams.video[0]
    except av.FFmpegError as error:
        raise SystemExit(f"{path} cannot be read as a video ({error}); is it whole? Or convert it with ffmpeg") from error


def video_rate(path):
    """Frames per second of a video file, the mean of those that come at uneven times."""
    with open_video(path) as (_, stream):
        return float(stream.average_rate or stream.guessed_rate or 25)


def video_frames(path, rate):
    """The frames of a video file, decoded in a stream: ((H, W, 3) uint8, seconds from the first one), upright as a player
    shows them. A change of size on the way is undone; a frame without a time comes 1 / rate behind the one before."""
    first, size, time = None, None, -1 / rate
    with open_video(path) as (container, stream):
        stream.thread_type = "AUTO"
        for number, frame in enumerate(container.decode(stream)):
            first = first if number else frame.time
            size = size or (frame.width, frame.height)
            time = time + 1 / rate if None in (first, frame.time) else frame.time - first
            yield np.rot90(frame.reformat(*size, "rgb24").to_ndarray(), frame.rotation // 90), time


def video_clips(path, config, rate):
    """(clip, target, pictures) of a video file as `dataset_clips` gives them, decoded in a stream.

    Clips of T frames begin T // 2 frames apart, and a frame is taken from the clip in whose middle it is (target["frames"]),
    so that it is seen with what comes before and after; the video's last clip is filled up with its last frame. For key-frame
    models a clip begins with every second (by the average rate), and its middle frame is a frame of the result.
    """
    span = (config.frames - 1) * config.sampling_rate + 1                   # frames that a clip reaches over
    step = max(1, round(rate)) if config.key_frame else max(config.frames // 2, 1)
    if not config.key_frame and config.sampling_rate > 1:
        raise SystemExit(f"sampling_rate {config.sampling_rate} leaves frames without boxes: --set sampling_rate=1")
    buffer, number = [], 0
    for index, frame in enumerate(video_frames(path, rate)):
        if len(buffer) == span:                                             # and there is a frame behind it
            yield video_clip(path, buffer, number, config, step, last=False)
            number, buffer = number + 1, buffer[step:]
        if index >= number * step:
            buffer.append([*frame, None])
    middle = config.frames // 2 * config.sampling_rate if config.key_frame else 0
    while buffer and (number == 0 or len(buffer) > middle):                 # what no whole clip is left for
        yield video_clip(path, buffer, number, config, step, last=True)
        number, buffer = number + 1, buffer[step:] if config.key_frame else []


def video_clip(path, buffer, number, config, step, last):
    """Clip `number` of a video file from its frames `buffer`, lists of picture, time and what the model sees of it (None: not
    yet rendered; clips share frames), fewer at the video's end."""
    frames = torch.arange(config.frames)
    used = [buffer[min(i, len(buffer) - 1)] for i in (frames * config.sampling_rate).tolist()]
    view = draw_view(used[0][0].shape[:2], config, train=False)
    for frame in used:
        frame[2] = render([Image.fromarray(frame[0])], view) if frame[2] is None else frame[2]          # (3, 1, H, W)
    pictures, times, rendered = zip(*used)
    edge = (config.frames - step) // 2
    taken = (frames >= (edge if number else 0)) & (frames < (len(buffer) if last else edge + step))
    target = {"video": Path(path).stem, "frame_ids": frames + number * step + 1, "frames": taken, "times": times,
              "size": torch.tensor(pictures[0].shape[:2])}
    shown, middle = np.stack(pictures), config.frames // 2                  # (T, H, W, 3)
    if config.key_frame:
        shown = shown[middle:][:1]
        target |= {"frame_ids": torch.tensor([number + 1]), "frames": torch.tensor([True]), "times": times[middle:][:1]}
    return torch.cat(rendered, 1), target, shown


def write_tubes(out, video, rate, actors, size, seconds, names):
    """tubes.json and tubes.csv in the folder `out`: see the top of this file. size: height and width of the video's frames,
    seconds {frame number: its time}. Returns their paths."""
    parts = (json.dumps({"colour": "#%02x%02x%02x" % colour, "tubes": [
        {"label": names[tube["label"]], "score": round(float(tube["score"]), 4), "frames": tube["frames"].tolist(),
         "seconds": [round(seconds[frame], 3) for frame in tube["frames"].tolist()],
         "boxes": np.round(tube["boxes"], 1).tolist()} for tube in tubes]})
        for tubes, colour in zip(actors, choose_colours(actors)))
    with open(out / "tubes.json.tmp", "w") as file:     # an actor at a time: a long video has thousands
        head = {"video": video, "rate": rate, "size": size, "classes": list(names), "actors": []}
        file.write(json.dumps(head).removesuffix("]}"))
        file.writelines(", " * (n > 0) + part for n, part in enumerate(parts))
        file.write("]}\n")
    lines = np.concatenate([np.zeros((0, 7)), *(np.column_stack((           # second, x1, y1, x2, y2, class, score
        [seconds[frame] for frame in tube["frames"].tolist()], (tube["boxes"] / ([*size][::-1] * 2)).clip(0, 1).round(4),
        [(tube["label"] + 1, round(float(tube["score"]), 4))] * len(tube["frames"]))) for tube in sum(actors, []))])
    with open(out / "tubes.csv", "w", newline="") as file:
        csv.writer(file).writerows([video, f"{second:.3f}", *box, int(label), score] for second, *box, label, score in
                                   map(np.ndarray.tolist, lines[np.lexsort(lines.T[::-1])]))
    (out / "tubes.json.tmp").replace(out / "tubes.json")                    # whole or not at all: it says that NAME is done
    return [out / "tubes.json", out / "tubes.csv"]


@torch.inference_mode()
def sampling_points(model, clip, place, device):
    """Where the encoder's last layer looks from the cell at `place` (t, y, x), each in [0, 1], of the decoder's grid: points
    (n, 3) of t, y, x, 0 and 1 the clip's edges, n = M*L*P; their level (n,); their weight (n,), the mean over heads."""
    layer, seen = model.encoder.layers[-1], []
    if not hasattr(layer, "sampling_offsets"):
        raise SystemExit("an ordinary transformer encoder has no sampling points: every cell looks at every cell")
    hook = layer.register_forward_pre_hook(lambda module, args: seen.append(args))
    model(clip[None].to(device))
    hook.remove()
    x, positions, _, references, shapes, _ = seen[0]
    level = model.config.grid_level
    inside = [min(int(share * n), n - 1) for share, n in zip(place, shapes[level])]
    cell = sum(t * h * w for t, h, w in shapes[:level]) + int(np.ravel_multi_index(inside, shapes[level]))
    offsets, logits, scales = layer.look((x + positions)[:, [cell]], shapes)                            # of one query
    points = references[:, [cell], None, :, None] + offsets * scales[:, None]                           # (1, 1, M, L, P, 3)
    levels = torch.arange(len(shapes))[:, None].expand(logits.shape[2:])                                # (M, L, P)
    weights = logits.flatten(3).softmax(-1) / logits.shape[2]
    return points.reshape(-1, 3).cpu().numpy(), levels.flatten().numpy(), weights.flatten().cpu().numpy()


def draw_points(pictures, points, levels, weights, place):
    """Pictures (T, H, W, 3) side by side, each with the sampling points nearest to it in time: a disc of the level's colour
    whose area is the weight; a white cross where the cell is."""
    panels, last = [], len(pictures) - 1
    time = np.clip((points[:, 0] * len(pictures)).astype(int), 0, last)
    for t, picture in enumerate(map(enlarge, pictures)):
        image, near = Image.fromarray(picture), time == t
        draw, size = ImageDraw.Draw(image), np.array(image.size)
        for centre, level, radius in zip(points[near, :0:-1] * size, levels[near], 1 + 20 * weights[near] ** 0.5):
            draw.ellipse((*(centre - radius), *(centre + radius)), outline=COLOURS[level], width=2)
        if t == min(int(place[0] * len(pictures)), last):
            x, y = np.array(place[:0:-1]) * size
            draw.line((x - 8, y, x + 8, y), fill=TRUTH, width=2)
            draw.line((x, y - 8, x, y + 8), fill=TRUTH, width=2)
        panels.append(captioned(np.asarray(image), f"frame {t + 1}"))
    return panels


def visualize(model, clips, video, rate, config, device, out, args, names, classes=()):
    """Finds the tubes of a video or clip and writes what the top of this file says to the folder `out`; `clips()` gives the
    clips anew each time. args: the command line's; classes: ids of those whose attention is drawn."""
    actors, frames = find_actors(model, clips(), config, device, args.min_score)
    out, name, count = Path(out), video.replace("/", "_"), len(frames["number"])
    out.mkdir(parents=True, exist_ok=True)
    paths = [out / f"{name}.mp4", out / f"{name}.png"]
    on_sheet, sheet = set(np.linspace(0, count - 1, SHEET_FRAMES).astype(int).tolist()), []

    def pictures():
        drawn = draw(model, clips(), actors, names, config, device, classes, args.top, args.heads)
        for i, picture in enumerate(bar(drawn, "drawing", total=count, unit="frame")):
            if i in on_sheet:
                sheet.append([picture])
            yield picture

    save_video(paths[0], pictures(), rate, frames["seconds"])
    save_sheet(paths[1], sheet)
    if args.look_from:
        place, clip = (0.5, *args.look_from[::-1]), next(clips())[0]
        paths.append(out / f"{name}-points.png")
        save_sheet(paths[-1], [draw_points(frames_of(clip), *sampling_points(model, clip, place, device), place)])
    paths += write_tubes(out, video, rate, actors, frames["size"], dict(zip(frames["number"], frames["seconds"])), names)
    found = f"{sum(map(len, actors))} tubes" if actors else f"no tube of boxes of score {args.min_score}: lower --min-score"
    print(f"{video}: {len(actors)} actors, {found}; wrote " + ", ".join(map(str, paths)))


def find_videos(sources, out):
    """The video files that --video names, files and folders (and what is in them, but for the results in `out`); an error if
    two have one name."""
    videos = []
    for source in map(Path, sources):
        inside = [path for path in source.rglob("*") if path.suffix.lower() in VIDEOS] if source.is_dir() else [source]
        inside = sorted(path for path in inside if path == source or out.resolve() not in path.resolve().parents)
        if not inside:
            raise SystemExit(f"no video ({', '.join(VIDEOS)}) in {source}")
        videos += inside
    names = [path.stem for path in videos]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise SystemExit(f"several videos are called {', '.join(twice[:5])}: their results would share a folder; rename them")
    return videos


def show_videos(model, sources, config, device, rank, args, **options):
    """Tubes and attention of video files, each in a folder of its own where there are several: shared over the ranks, those
    that are done left out. Returns the messages of the videos that could not be read."""
    root, failed = Path(args.out or "out"), []
    videos = find_videos(sources, root)
    several = len(videos) > 1 or Path(sources[0]).is_dir()
    world = int(os.environ.get("WORLD_SIZE", 1))
    for path in videos[rank::world]:
        out = root / path.stem if several or not args.out else root
        if (out / f"{path.stem}.mp4").resolve() == path.resolve():
            raise SystemExit(f"{path} would be overwritten by its own result: choose another --out")
        if several and (out / "tubes.json").is_file():
            print(f"{out / 'tubes.json'} is there: {path} is done")
            continue
        try:
            rate = video_rate(path)
            clips = partial(video_clips, path, config, rate)
            visualize(model, clips, path.stem, 1 if config.key_frame else rate, config, device, out, args, **options)
        except SystemExit as error:
            if not several or not isinstance(error.code, str):              # a number: ended by a signal
                raise
            print(error)
            failed.append(str(error))
    return failed


def arguments(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add_source_arguments(parser)
    group = parser.add_argument_group("what is drawn")
    source = group.add_mutually_exclusive_group()
    source.add_argument("--clip", type=int, metavar="N", help="a clip of the data set, counted from 0 (the default: 0)")
    source.add_argument("--video-name", metavar="NAME", help="a whole video of the data set")
    source.add_argument("--video", metavar="FILE", nargs="+", help="one's own, files or folders; processes share them")
    group.add_argument("--classes", nargs="+", default=[], metavar="a,b", help="whose attention is drawn (each actor's best)")
    group.add_argument("--heads", choices=("all", "content"), default="all", help="content: those that see content alone")
    group.add_argument("--look-from", nargs=2, type=float, metavar=("X", "Y"), help="draw the encoder's sampling points too, "
                       "from the cell at this place of the first clip's middle, in shares of width and height")
    group.add_argument("--min-score", type=float, default=0.3, help="boxes below this score are left out (0.3)")
    group.add_argument("--top", type=int, default=3, help="classes written at an actor, at most (3)")
    group.add_argument("--rate", type=float, help="frames a second of a data set's clips (25; short clips 4, AVA 1)")
    group.add_argument("--out", metavar="DIR", help="folder of the results (out/NAME); of several videos, of their folders")
    args = parser.parse_args(argv)
    if not args.ckpt:
        parser.error("name a checkpoint: --ckpt runs/NAME/best.pt")
    if args.look_from and not all(0 <= share <= 1 for share in args.look_from):
        parser.error(f"--look-from {args.look_from}: not in [0, 1]")
    return args


def main(argv=None):
    args = arguments(argv)
    device, rank = start(args.device)
    model, config, checkpoint = load_model(args.ckpt, args.set, device)
    if args.heads == "content" and "split_heads" not in config.quirks:
        raise SystemExit(f"--heads content: no heads of {args.ckpt} see content alone (no quirk split_heads)")
    trained = checkpoint.get("settings", {}) | {"dataset": checkpoint["dataset"]}
    # a video needs no data set; but the authors' checkpoints do not name their classes, and --data may
    dataset = None if args.video and (checkpoint["classes"] or not args.data) else \
        open_dataset(args, config, checkpoint["classes"], args.ckpt, trained)
    names = checkpoint["classes"] or (list(dataset.class_names) if dataset else list(UCF_CLASSES) if config.num_classes == 24
                                      else [f"class {number}" for number in range(1, config.num_classes + 1)])
    chosen = [name for text in args.classes for name in ([text] if text in names else text.split(","))]
    if unknown := [name for name in chosen if name not in names]:
        raise SystemExit(f"unknown classes {', '.join(unknown)}; {args.ckpt} knows: {', '.join(names)}")
    options = {"names": names, "classes": [names.index(name) for name in chosen]}
    print(f"{args.ckpt} is {checkpoint['kind']}")
    if args.video:
        failed = show_videos(model, args.video, config, device, rank, args, **options)
        if failed and "WORLD_SIZE" not in os.environ:                       # torchrun would end the other processes
            raise SystemExit(f"{len(failed)} videos could not be read:\n" + "\n".join(failed))
        return
    if args.video_name:
        if args.video_name not in dataset.videos:
            raise SystemExit(f"no video {args.video_name!r} among the {len(dataset.videos)} of {dataset.name}: "
                             f"{', '.join(list(dataset.videos)[:5])}, ...")
        video = args.video_name
        indices = np.flatnonzero(clip_videos(dataset) == list(dataset.videos).index(video))
    else:
        if not 0 <= (args.clip or 0) < len(dataset):
            raise SystemExit(f"--clip {args.clip}: {dataset.name} has clips 0 to {len(dataset) - 1}")
        indices, video = [args.clip or 0], f"{dataset.name}-clip-{args.clip or 0}"
    rate = args.rate or (1 if dataset.name == "ava" else 25 if config.frames >= 30 or config.key_frame else 4)
    visualize(model, partial(dataset_clips, dataset, indices, config, rate), video, rate, config, device,
              args.out or Path("out") / video.replace("/", "_"), args, **options)


if __name__ == "__main__":
    main()
