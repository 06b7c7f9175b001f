"""Pictures made of frames, boxes, labels and attention maps: what visualize.py is drawn with.

Nothing here knows the model. A picture is an array (H, W, 3) uint8; an image is Pillow's, still
being drawn on.
"""
# H, W of a frame or panel, H', W' of an attention map, N boxes or maps, G boxes without a label
# a colour is (red, green, blue), up to 255

from fractions import Fraction
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch.nn import functional as F

COLOURS = [(255, 99, 71), (64, 156, 255), (80, 220, 100), (255, 196, 0), (214, 112, 255),
           (0, 214, 214), (255, 128, 200), (170, 220, 60), (255, 150, 60), (140, 140, 255)]
WHITE, BLACK = (255, 255, 255), (0, 0, 0)
SHORTEST_SIDE = 360         # frames smaller than this are enlarged by a whole factor: text fits
GAP = 8                     # pixels between them
TICK = Fraction(1, 60000)   # of a second: the grain of a written video's times

# ---- panels ----

def arrange(count, size, width):
    """(columns, panel size) for `count` panels of pictures of `size` (height, width).

    The panels are as large as they fit into `width` and, captions apart, 9/16 of it in height, but
    no larger than the pictures, or than the whole factor that brings their short side to
    SHORTEST_SIDE. Another row has to make them larger by a quarter.
    """
    height = width * 9 / 16
    largest = max(1, -(-SHORTEST_SIDE // min(size)))
    best, columns = 0.0, 1
    for lines in range(1, count + 1):
        in_line = -(-count // lines)
        scale = min(width / (in_line * size[1]), height / (lines * size[0]), largest)
        if scale > 1.25 * best:
            best, columns = scale, in_line
    return columns, (max(1, int(size[0] * best)), max(1, int(size[1] * best)))


def letter_size(size):
    """Pixels of the letters in a panel of `size` (height, width)."""
    return max(14, round(min(size) / 36))


def in_rows(panels, columns, letters):
    """Panels (title, image), of one size, in rows of `columns`, each under its title, which is cut
    off where it does not fit -> a picture (height, width, 3)."""
    (width, height), band = panels[0][1].size, letters + 8
    lines = -(-len(panels) // columns)
    sheet = Image.new("RGB", (columns * width, lines * (height + band)), WHITE)
    for number, (title, image) in enumerate(panels):
        caption = Image.new("RGB", (width, band), WHITE)
        ImageDraw.Draw(caption).text((4, 2), title, BLACK, font(letters))
        x, y = number % columns * width, number // columns * (height + band)
        sheet.paste(caption, (x, y))
        sheet.paste(image, (x, y + band))
    return np.asarray(sheet)


def in_pairs(pictures):
    """Pictures (H, W, 3), of one size, two in a row, with white between."""
    padded = [np.pad(picture, [(0, GAP), (0, GAP), (0, 0)], constant_values=255)
              for picture in pictures]
    if len(padded) > 1 and len(padded) % 2:
        padded.append(np.full_like(padded[0], 255))
    return np.concatenate([np.concatenate(padded[i:i + 2], 1) for i in range(0, len(padded), 2)])

# ---- on a panel ----

def resize(picture, size):
    """A picture (H, W, 3) as an image of another size; where that is a whole multiple, pixels are
    repeated."""
    whole = size[0] % picture.shape[0] == 0 and size[1] % picture.shape[1] == 0
    method = Image.Resampling.NEAREST if whole else Image.Resampling.BILINEAR
    return Image.fromarray(picture).resize((size[1], size[0]), method, reducing_gap=1.0)


def upsample(maps, size):
    """Attention maps (N, H', W') at a panel's size (H, W), each 1 at its largest value.

    A map covers the whole frame, cell (i, j) being centred at ((i + 0.5) / H', (j + 0.5) / W').
    """
    maps = torch.as_tensor(maps, dtype=torch.float32)
    maps = maps / maps.amax((1, 2), keepdim=True).clamp(min=1e-12)
    full = F.interpolate(maps[:, None], size, mode="bilinear", align_corners=False)  # (N, 1, H, W)
    return full[:, 0].numpy()


def shine(image, maps, colours):
    """Maps (N, H, W) in [0, 1] as light of N colours on an image, which is shown in grey and at
    half its brightness -> an image."""
    grey = np.asarray(image.convert("L"), np.float32) / 2                    # (H, W)
    grey *= (1 - maps / 2).prod(0)                                           # colours stay strong
    light = np.tensordot(maps, np.array(colours, np.float32).reshape(-1, 3), (0, 0))    # (H, W, 3)
    return Image.fromarray((grey[..., None] + light).clip(max=255).astype(np.uint8))


def draw_boxes(image, boxes, colours, letters):
    """Draws boxes (N, 4) x1, y1, x2, y2 in pixels, in N colours, with lines as thick as suits
    letters of that size."""
    draw = ImageDraw.Draw(image)
    boxes = boxes.clip(0, np.array([image.width - 1, image.height - 1] * 2))
    for (x1, y1, x2, y2), colour in zip(boxes.tolist(), colours):
        draw.rectangle((x1, y1, max(x1, x2), max(y1, y2)), None, colour, max(2, letters // 7))


def draw_labels(image, boxes, colours, letters, texts, others):
    """Draws the labels of boxes (N, 4), N lists of lines on N colours, where `place_labels` finds
    room."""
    draw, step, extents = ImageDraw.Draw(image), letters + 3, np.zeros((len(boxes), 2))
    for extent, lines in zip(extents, texts):
        if lines:
            widest = max(draw.textlength(words, font(letters)) for words in lines)
            extent[:] = widest + 6, len(lines) * step + 3
    corners = place_labels(boxes, extents, image.size, others)
    for (x, y), (width, height), lines, colour in zip(corners, extents, texts, colours):
        if lines:
            draw.rectangle((x, y, x + width, y + height), colour)
        for number, words in enumerate(lines):
            draw.text((x + 3, y + number * step), words, BLACK, font(letters))


def place_labels(boxes, extents, size, others):
    """Where the labels of boxes (N, 4) stand in a picture of `size` (width, height): their upper
    left corners (N, 2). extents (N, 2): their width, 0 for none, and height; others (G, 4): boxes
    that have no label.

    A label stands beside its box, where there is room: above, right, left or below, rather not on
    another box; else within its lower edge; else at the free place that is nearest. It covers heads
    (the upper third of a box) and other labels only as far as nothing else is left.
    """
    heads = np.concatenate([boxes, others]).clip(0, np.array([*size, *size]))    # (N + G, 4)
    heads[:, 3] = heads[:, 1] + (heads[:, 3] - heads[:, 1]) / 3
    grid = np.stack(np.meshgrid(np.linspace(0, 1, 17), np.linspace(0, 1, 17)), -1)
    grid = grid.reshape(-1, 2)                                               # (289, 2) of the room
    corners, labels = np.zeros((len(boxes), 2)), np.zeros((0, 4))
    for number in np.flatnonzero(extents[:, 0]):
        x1, y1, x2, y2 = boxes[number]
        width, height = extent = extents[number]
        room = np.maximum(np.array(size) - extent - 1, 0)
        beside = [(x1, y1 - height - 1), (x2 + 1, y1), (x1 - width - 1, y1), (x1, y2 + 1),
                  (x1 + 2, y2 - height - 2), (x2 - width - 2, y2 - height - 2)]
        distance = np.abs(grid * room + extent / 2 - ((x1 + x2) / 2, (y1 + y2) / 2)).sum(1)
        spots = np.concatenate([beside, (grid * room)[distance.argsort(kind="stable")]])
        spots = spots.clip(0, room)                                          # (6 + 289, 2)
        spots = np.concatenate([spots, spots + extent], 1)                   # (295, 4)
        covered = common_area(spots, np.concatenate([heads, labels]))        # (295,)
        on_others = common_area(spots, np.delete(boxes, number, 0)) > 0
        far = np.arange(len(spots)) >= len(beside)
        chosen = np.lexsort((on_others, far, covered))[0]
        corners[number] = spots[chosen, :2]
        labels = np.concatenate([labels, spots[[chosen]]])
    return corners


def common_area(boxes, others):
    """The area that each of the boxes (K, 4) shares with the others (M, 4), summed over them."""
    low = np.maximum(boxes[:, None, :2], others[:, :2])                      # (K, M, 2)
    high = np.minimum(boxes[:, None, 2:], others[:, 2:])                     # (K, M, 2)
    return (high - low).clip(min=0).prod(-1).sum(-1)

# ---- letters ----

@lru_cache
def font_file():
    """DejaVu Sans, which comes with matplotlib: Latin, Greek, Cyrillic and more."""
    from matplotlib import get_data_path
    return str(Path(get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"))


@lru_cache
def font(size):
    return ImageFont.truetype(font_file(), size)


@lru_cache
def drawable(names):
    """A tuple of class names as they can be drawn: letters that the font lacks are left out, and
    "class 3" stands where none is left. Says, once, which names that changes."""
    from matplotlib.ft2font import FT2Font
    letters, drawn, changed = FT2Font(font_file()).get_charmap(), [], []
    for number, name in enumerate(names, 1):
        known = "".join(letter for letter in name if ord(letter) in letters).strip()
        drawn.append(known or f"class {number}")
        if drawn[-1] != name:
            changed.append(f"{name} as {drawn[-1]}")
    if changed:
        print("the font lacks letters of some class names, drawn: " + "; ".join(changed))
    return drawn

# ---- files ----

def save_picture(path, picture):
    """A picture (H, W, 3) uint8 as a PNG."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture).save(path)


def save_video(path, pictures, rate, seconds=None):
    """Pictures (H, W, 3) uint8, one after another, as an MP4 that any player takes (H.264 where
    PyAV has it): `rate` a second, or at the times `seconds`."""
    import av
    codec, options = "mpeg4", {}
    if "libx264" in av.codecs_available:
        codec, options = "libx264", {"preset": "superfast"}
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, Fraction(rate).limit_denominator(1001), options)
        stream.pix_fmt = "yuv420p"              # it halves both sides: they must be even
        stream.codec_context.time_base = TICK
        last = -1
        for number, picture in enumerate(pictures):
            height, width = picture.shape[:2]
            picture = np.pad(picture, [(0, height % 2), (0, width % 2), (0, 0)], "edge")
            if not stream.codec_context.is_open:
                stream.height, stream.width = picture.shape[:2]
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            time = seconds[number] - seconds[0] if seconds else number / rate
            last = max(last + 1, round(time / TICK))        # two frames at one time are refused
            frame.pts, frame.time_base = last, TICK
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
