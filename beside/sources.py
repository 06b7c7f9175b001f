"""What lies on disk: annotations, trees of frames and video files of UCF101-24, JHMDB51-21, AVA v2.2 and your own data.

Every data set is read into one table (`Table`): M boxes, each with its video, frame, actor and labels; a `FrameSource`
reads the pixels that belong to it.
"""
# M boxes of a table, V videos, K key frames, R rows, C classes, H x W pixels

import contextlib
import csv
import os
import pickle
import re
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.io import loadmat

AVA_RATE, AVA_START, AVA_LENGTH = 30, 900, 901     # frames a second, from this second of the film on, for so many
AVA_SECONDS = (902, 1798)          # the first and last that are annotated
UCF_CLASSES = """Basketball BasketballDunk Biking CliffDiving CricketBowling Diving Fencing FloorGymnastics GolfSwing
HorseRiding IceDancing LongJump PoleVault RopeClimbing SalsaSpin SkateBoarding Skiing Skijet SoccerJuggling Surfing
TennisSwing TrampolineJumping VolleyballSpiking WalkingWithDog""".split()
FRAME_FOLDERS = ("rgb-images", "Frames", "Rename_Images", "frames", "rawframes")
FRAME_PATTERNS = ("{:05d}.jpg", "{:05d}.png", "img_{:05d}.jpg", "{stem}_{:06d}.jpg")   # last two: mmaction2, SlowFast
VIDEO_SUFFIXES = (".avi", ".mp4", ".mkv", ".webm", ".mov")


@dataclass
class Table:
    """One annotation for all data sets: V videos and M boxes, sorted by video, then frame."""
    classes: list                  # C names
    videos: list                   # V names
    num_frames: np.ndarray         # (V,) int64
    size: np.ndarray               # (V, 2) int64, height and width whose pixels boxes count
    video: np.ndarray              # (M,) int64, index of the video
    frame: np.ndarray              # (M,) int64, 1-based number in the video; where `seconds`, AVA's second
    actor: np.ndarray              # (M,) int64, the same for the boxes of one actor
    box: np.ndarray                # (M, 4) float32: x1, y1, x2, y2
    label: np.ndarray              # (M, C) bool
    key_frames: np.ndarray         # (K, 2) int64, video and frame of all that are annotated, also without boxes
    seconds: bool                  # frames are numbered by AVA's seconds
    problems: list                 # faults, a line each; a table that has some is not for training
    source: str                    # what was read, in words


def tabulate(classes, videos, num_frames, size, rows, source, persons=True, seconds=False, problems=()):
    """The table of rows (R, 8): index of the video, frame, person, x1, y1, x2, y2, class id (from 1).

    Rows that differ in nothing but the class are one box with several labels; a row that is NaN from the person on is a
    frame with nobody in it. persons: the boxes of one person are one actor; otherwise each box is an actor of its own.
    """
    num_frames, size = np.array(num_frames, np.int64), np.array(size, np.int64).reshape(-1, 2)
    key_frames = np.unique(rows[:, :2].astype(np.int64), axis=0)                   # (K, 2)
    rows = rows[~np.isnan(rows[:, 2:]).all(axis=1)]
    problems = [*problems, *row_problems(videos, num_frames, size, rows, len(classes), seconds)]
    rows = rows[np.isin(rows[:, 7], np.arange(len(classes)) + 1)]
    rows = rows[np.lexsort(rows.T[::-1])]                                          # by the columns, the first one first
    new = (np.diff(rows[:, :7], axis=0, prepend=np.nan) != 0).any(axis=1)          # (R,) another than the row before
    boxes = rows[new]                                                              # (M, 8)
    label = np.zeros((len(boxes), len(classes)), bool)
    label[np.cumsum(new) - 1, rows[:, 7].astype(np.int64) - 1] = True
    video, frame = boxes[:, :2].astype(np.int64).T
    actor = np.arange(len(boxes))
    if persons:
        actor = np.unique(boxes[:, [0, 2]], axis=0, return_inverse=True)[1].reshape(-1)            # (M,)
    twice = np.flatnonzero(persons & (np.diff(boxes[:, :3], axis=0) == 0).all(axis=1))
    problems += [f"{videos[video[r]]} frame {frame[r]}: person {boxes[r, 2]:g} has two boxes" for r in twice]
    if not len(boxes):
        problems.append("the annotation has no boxes")
    return Table(list(classes), list(videos), num_frames, size, video, frame, actor, boxes[:, 3:7].astype(np.float32),
                 label, key_frames, seconds, problems, source)


def row_problems(videos, num_frames, size, rows, num_classes, seconds):
    """A line for each fault of rows (R, 8), see `tabulate`, and for each video without frames."""
    video, frame, low, high = rows[:, 0].astype(np.int64), rows[:, 1], rows[:, 3:5], rows[:, 5:7]  # (R,) x 2, (R, 2) x 2
    extent, count = size[video][:, ::-1], num_frames[video]                        # (R, 2) width and height, (R,)
    first, last = AVA_SECONDS if seconds else (1, count)
    slack = 0.005                  # annotations that count pixels from 1 may end one pixel outside
    unknown = ~np.isin(rows[:, 7], np.arange(num_classes) + 1)
    faults = {"has a coordinate that is not a number": ~np.isfinite(rows[:, 3:7]).all(axis=1),
              "has x2 <= x1 or y2 <= y1": (high <= low).any(axis=1),
              "lies outside of the frame": ((low < -slack * extent) | (high > (1 + slack) * extent)).any(axis=1),
              "is of a frame that is not in the video": (frame < first) | (frame > last),
              f"has a class id that is not in the class list (1 to {num_classes})": unknown}
    lines = [f"{videos[v]}: the video has no frames" for v in np.flatnonzero(num_frames < 1)]
    return lines + [f"{videos[video[r]]} frame {frame[r]:g}: box {rows[r, 3:7].tolist()}, class {rows[r, 7]:g}, {fault} "
                    f"(of {extent[r, 0]}x{extent[r, 1]}, {count[r]} frames)"
                    for fault, found in faults.items() for r in np.flatnonzero(found)]


def tube_rows(frames, boxes, class_id):
    """Rows (n, 6) of a tube with frames (n,) and boxes (n, 4): frame, x1, y1, x2, y2, class id (from 1)."""
    rows = np.empty((len(frames), 6))
    rows[:, 0], rows[:, 1:5], rows[:, 5] = frames, boxes, class_id
    return rows


def read_annots_mat(path):
    """finalAnnots.mat of the corrected UCF101-24 -> {video: (number of frames, size, rows as of `tube_rows` per tube)}.

    x, y, w, h (x, y from 1) -> x, y, x + w, y + h, not shifted.
    """
    try:
        annotated = {}
        for entry in loadmat(path)["annot"][0]:
            tubes = []
            for tube in entry["tubes"].reshape(-1):                                # (1, tubes) -> (tubes,)
                boxes = tube["boxes"].astype(np.float64).reshape(-1, 4)            # as uint8, x + w would overflow
                boxes[:, 2:] += boxes[:, :2]
                tubes.append(tube_rows(np.arange(tube["sf"].item(), tube["ef"].item() + 1), boxes, tube["class"].item()))
            annotated[str(entry["name"][0])] = entry["num_imgs"].item(), (240, 320), tubes
        return annotated
    except Exception as error:      # whatever the reader raises on a damaged or foreign file
        raise ValueError(f"{path} cannot be read ({error!r}); get finalAnnots.mat again") from error


# All that a pickle of numpy arrays names; numpy moved its modules in version 2.
ADMITTED = {("numpy", "ndarray"): np.ndarray, ("numpy", "dtype"): np.dtype, ("_codecs", "encode"): str.encode}
for _core in ("numpy.core", "numpy._core"):
    ADMITTED[_core + ".multiarray", "_reconstruct"] = np.zeros(1).__reduce__()[0]
    ADMITTED[_core + ".multiarray", "scalar"] = np.float64(0).__reduce__()[0]
    ADMITTED[_core + ".numeric", "_frombuffer"] = np.zeros(1).__reduce_ex__(5)[0]


class PlainUnpickler(pickle.Unpickler):
    """Admits numpy arrays and plain containers; anything else that a pickle names is an error and is not executed."""

    def find_class(self, module, name):
        if (module, name) not in ADMITTED:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which was not executed")
        return ADMITTED[module, name]


def read_gttubes(path):
    """JHMDB-GT.pkl or UCF101v2-GT.pkl -> (class names, its splits: a list of training and test videos each, and videos
    as of `read_annots_mat`)."""
    try:
        with open(path, "rb") as file:
            content = PlainUnpickler(file, encoding="latin1").load()
        annotated = {}
        for video, count in content["nframes"].items():
            tubes = [tube_rows(tube[:, 0], tube[:, 1:], label + 1)                 # (n, 5): frame and box
                     for label, several in content["gttubes"].get(video, {}).items() for tube in several]
            annotated[video] = count, content["resolution"][video], tubes
        return content["labels"], list(zip(content["train_videos"], content["test_videos"])), annotated
    except Exception as error:      # whatever a damaged or foreign pickle makes it raise
        raise ValueError(f"{path} is no annotation of numpy arrays and plain containers: {error!r}; "
                         "get it again from where the data set is published") from error


def read_list(path):
    """The lines of a list file that are not blank; of a video's file name the stem."""
    return [line.strip().removesuffix(".avi") for line in path.read_text().splitlines() if line.strip()]


def read_rows(path):
    """A csv of AVA's columns -> (video names (R,), rows (R, 8) without their first column, the video, problems)."""
    names, rows, problems = [], [], []
    with open(path, newline="") as file:
        for line, row in enumerate(csv.reader(file), 1):
            try:
                if len(row) not in (2, 8):
                    raise ValueError(f"{len(row)} columns, not 8 (video, frame, x1, y1, x2, y2, class id, person) "
                                     "nor the first 2 of them, for a frame with nobody in it")
                if not float(row[1]).is_integer():
                    raise ValueError(f"frame {row[1]!r} is no whole number")
                frame, *box, label, person = map(float, [*row[1:], *["nan"] * (8 - len(row))])
                rows.append((np.nan, frame, person, *box, label))
                names.append(row[0])
            except ValueError as error:
                problems.append(f"{path} row {line}: {error}")
    return np.array(names, str), np.array(rows).reshape(-1, 8), problems


def read_label_map(path):
    """{id: name} of a .pbtxt label map such as AVA's."""
    items = re.findall(r'name:\s*"([^"]*)"\s*(?:label_)?id:\s*(\d+)', path.read_text())
    if not items:
        raise ValueError(f"{path} has no item {{ name: ... id: ... }}; it is no label map")
    return {int(number): name for name, number in items}


@lru_cache(maxsize=None)
def frame_stamps(path, rate=None):
    """Time stamp (n,) of each frame of a video file, in the order they are shown and in the file's unit of time.

    rate: as AVA's frames are taken: so many a second, from AVA_START on where the file is the whole film, each time the
    nearest frame.
    """
    import av
    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            stamps = [packet.pts for packet in container.demux(stream) if packet.size]
            if None in stamps or len(set(stamps)) < len(stamps):       # as in some .avi files: only decoding tells
                container.seek(0)
                stamps = [frame.pts for frame in container.decode(stream)]
            stamps, unit = np.sort(np.array(stamps, np.int64)), float(stream.time_base)
    except (av.FFmpegError, IndexError, TypeError) as error:           # no pictures in it; no time stamps
        raise OSError(f"cannot read the video {path}: {error}; is it whole, and are there pictures in it?") from error
    if rate and len(stamps):
        seconds = (stamps[-1] - stamps[0]) * unit
        begin = AVA_START if seconds > AVA_LENGTH + 1 else 0
        count = int(min(seconds - begin, AVA_LENGTH) * rate + 1)
        wanted = stamps[0] + (begin + np.arange(count) / rate) / unit
        stamps = stamps[np.searchsorted((stamps[1:] + stamps[:-1]) / 2, wanted)]
    return stamps


def decode(path, index, rate=None):
    """Images of the 0-based frames `index` (ascending) of a video file; no more than what lies between is decoded."""
    import av
    stamps, images = frame_stamps(path, rate), {}
    if len(stamps) <= index[-1]:
        raise OSError(f"{path} has {len(stamps)} frames, frame {index[-1] + 1} is annotated; is it another cut?")
    wanted = set(stamps[index].tolist())
    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            if index[0] >= 32:     # to a key frame before; by the order of decoding, which runs ahead of what is shown
                container.seek(int(stamps[index[0] - 32]), stream=stream)
            for frame in container.decode(stream):
                if frame.pts in wanted:
                    images[frame.pts] = frame.to_image()
                if len(images) == len(wanted):
                    return [images[stamp] for stamp in stamps[index].tolist()]
    except av.FFmpegError as error:
        raise OSError(f"cannot decode {path} between its frames {index[0] + 1} and {index[-1] + 1}: {error}") from error
    raise OSError(f"cannot decode {path}: {len(wanted) - len(images)} frames from {index[0] + 1} on are lost; damaged?")


def read_image(path, expected, least=(4096, 4096)):
    """A frame's file as an RGB image; a JPEG above twice `least` (width, height) is decoded at a half or less."""
    try:
        with Image.open(path) as image:
            image.draft("RGB", (2 * least[0], 2 * least[1]))
            return image.convert("RGB")
    except FileNotFoundError:
        raise FileNotFoundError(f"frames missing: {path} ({expected} expected, {len([*path.parent.glob('*')])} found); "
                                "extract them with python -m tools.prepare extract") from None
    except (OSError, SyntaxError) as error:         # Pillow raises SyntaxError for a broken PNG
        raise OSError(f"cannot read the image {path}: {error}; extract it again") from error


@dataclass
class FrameSource:
    """Where the pixels of a data set are, as found by looking: a tree of frames, or else video files."""
    root: Path
    folder: str = ""               # of the frames, below root
    pattern: str = ""              # of a frame's file name, in the folder of its video
    files: dict = field(default_factory=dict)      # video -> file, where there is no tree of frames
    rate: int | None = None        # frames a second to take from a file; None: all

    def __str__(self):
        if self.pattern:
            return f"frames {self.root}/{self.folder}/<video>/{self.pattern}"
        return f"{len(self.files)} video files" if self.files else f"NO frames or videos below {self.root}"

    def path(self, video, number):
        """File of a frame, counted from 1."""
        return self.root / self.folder / video / self.pattern.format(number, stem=Path(video).name)

    def read(self, video, index, expected=1, least=(4096, 4096)):
        """RGB images of the 0-based frames `index` (ascending) of a video that should have `expected` frames."""
        if self.pattern:
            return [read_image(self.path(video, int(i) + 1), expected, least) for i in index]
        if video in self.files:
            return decode(self.files[video], index, self.rate)
        raise FileNotFoundError(f"no frames and no video file of {video} below {self.root} (frames are looked for in "
                                f"{', '.join(FRAME_FOLDERS)}); is it the data set's folder (--data)?")

    def count(self, video):
        """Number of the last frame that there is of a video, 0 without any."""
        if video in self.files:
            return len(frame_stamps(self.files[video], self.rate))
        folder, suffix = self.path(video, 1).parent, Path(self.pattern).suffix
        names = os.listdir(folder) if self.pattern and folder.is_dir() else ()
        last = max((name for name in names if name.endswith(suffix)), default="0")
        return int(re.findall(r"\d+", last)[-1])

    def size(self, video):
        """(height, width) of the first frame of a video as it is stored."""
        return self.read(video, np.zeros(1, np.int64))[0].size[::-1]


def find_media(root, videos, rate=None):
    """Looks below root for frames of these videos in one of the layouts known here, or else for their files."""
    for folder in FRAME_FOLDERS:
        for video in videos if (root / folder).is_dir() else ():
            for pattern in FRAME_PATTERNS if (root / folder / video).is_dir() else ():
                if (media := FrameSource(root, folder, pattern)).path(video, 1).exists():
                    return media
    found = {name: path for path in video_files(root) for name in (path.stem, f"{path.parent.name}/{path.stem}")}
    files = {video: found.get(video) or found.get(Path(video).name) for video in videos}
    return FrameSource(root, files={video: path for video, path in files.items() if path}, rate=rate)


def video_files(root):
    """The video files below a folder, in order; trees of frames are not searched."""
    found = []
    for place, folders, names in os.walk(root, followlinks=True):
        folders[:] = set(folders) - set(FRAME_FOLDERS)
        found += [Path(place, name) for name in names if name.lower().endswith(VIDEO_SUFFIXES)]
    return sorted(found)


def find_file(root, *names, needed=True):
    """The first of these files that is in root or root/annotations; None where there is none and none is needed."""
    for path in (folder / name for name in names for folder in (root, root / "annotations")):
        if path.is_file():
            return path
    if needed:
        raise FileNotFoundError(f"{' or '.join(names)} missing in {root} and {root}/annotations; "
                                "is it the data set's folder (--data)?")


def read_tube_set(name, root, side, fold):
    """UCF101-24 or JHMDB51-21: the table of the training or test videos of a split, and where their pixels are."""
    path = find_file(root, *(["JHMDB-GT.pkl"] if name == "jhmdb" else ["finalAnnots.mat", "UCF101v2-GT.pkl"]))
    if path.suffix == ".mat":
        annotated = read_annots_mat(path)
        test, listed = read_list(find_file(root, "testlist01.txt")), find_file(root, "trainlist01.txt", needed=False)
        train_list = read_list(listed) if listed else sorted({*annotated} - {*test})
        classes, splits = UCF_CLASSES, [([name.split(".avi")[0] for name in train_list], test)]
    else:
        classes, splits, annotated = read_gttubes(path)
    if fold not in range(1, len(splits) + 1):
        raise ValueError(f"{name} has the splits 1 to {len(splits)}, not {fold!r}; choose one with --split")
    listed = dict.fromkeys(splits[fold - 1][0 if side == "train" else 1])
    chosen = [video for video in listed if video in annotated]
    tubes = [(i, tube) for i, video in enumerate(chosen) for tube in annotated[video][2]]
    rows = [np.zeros((0, 8)), *(np.insert(tube, [0, 1], (i, person), axis=1) for person, (i, tube) in enumerate(tubes))]
    num_frames, size = ([annotated[video][fact] for video in chosen] for fact in (0, 1))
    source = f"{path}, {len(listed) - len(chosen)} of the {len(listed)} listed videos not annotated and left out"
    return tabulate(classes, chosen, num_frames, size, np.concatenate(rows), source), find_media(root, chosen)


def read_csv_set(name, root, side, key_frame):
    """AVA v2.2 or a data set of one's own (docs/own_data.md): the table of a side, and where its pixels are."""
    ava = name == "ava"
    path = find_file(root, f"ava_{side}_v2.2.csv" if ava else "annotations.csv")
    names, rows, problems = read_rows(path)
    if ava:
        if not key_frame:
            raise ValueError("ava is annotated at key frames only; use a preset of key frames (--set key_frame=true)")
        label_map = find_file(root, "ava_action_list_v2.2.pbtxt", "ava_action_list_v2.2_for_activitynet_2019.pbtxt")
        named = read_label_map(label_map)
        classes = [named.get(i, f"action {i}") for i in range(1, 81)]
        extra = find_file(root, f"ava_{side}_excluded_timestamps_v2.2.csv", needed=False)
        left_out = {(line[0], float(line[1])) for line in csv.reader(extra.open()) if line} if extra else set()
        kept = np.array([key not in left_out for key in zip(names.tolist(), rows[:, 1])], bool)
    else:
        classes, extra = read_list(find_file(root, "classes.txt")), find_file(root, "val.txt")
        kept = np.isin(names, read_list(extra)) == (side == "val")
        problems += [f"{extra}: {video} is not in {path}" for video in {*read_list(extra)} - {*names.tolist()}]
    videos, index = np.unique(names[kept], return_inverse=True)
    videos, rows = videos.tolist(), rows[kept]
    media = find_media(root, videos, AVA_RATE if ava else None)
    absent = ava and not media.pattern and not media.files             # the annotation alone: boxes stay shares
    num_frames = [AVA_LENGTH * AVA_RATE if absent else media.count(video) for video in videos]
    size = np.array([(1, 1) if absent else media.size(video) for video in videos]).reshape(-1, 2)
    rows[:, 0] = index
    rows[:, 3:7] *= size[index][:, [1, 0, 1, 0]]                                   # from shares of a frame to pixels
    source = f"{path} without {(~kept).sum()} rows by {extra or 'no list of excluded seconds'}"
    return tabulate(classes, videos, num_frames, size, rows, source, not key_frame, ava, problems), media


def read_dataset(name, root, side, key_frame, fold=1):
    """(table, frame source) of a data set in a folder, faults of the annotation in table.problems; raises if unreadable.

    side: "train" or "val"; fold: which of the splits that jhmdb has three of, the others one.
    """
    if side not in ("train", "val"):
        raise ValueError(f'the sides of {name} are "train" and "val", not {side!r}')
    if name not in ("ucf", "jhmdb", "ava", "custom"):
        raise ValueError(f"no data set {name!r}; there are synthetic, ucf, jhmdb, ava and custom (docs/own_data.md)")
    if not root or not Path(root).is_dir():
        raise FileNotFoundError(f"--data {root}: no such folder; it holds annotation and frames (or videos) of {name}")
    if name in ("ucf", "jhmdb"):
        return read_tube_set(name, Path(root), side, fold)
    return read_csv_set(name, Path(root), side, key_frame)


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
