"""Small data sets on disk for the tests: functions that write one into a folder and return it."""

import pickle

import numpy as np
from PIL import Image
from scipy.io import savemat


def grey_frames(folder, name, numbers, size=(64, 48)):
    """Frames, one for each number in their names (a count: from 1 on), whose grey level is twice
    their place; JPEG keeps the level of a plain image."""
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(numbers, int):
        numbers = range(1, numbers + 1)
    for i, number in enumerate(numbers):
        Image.new("RGB", size, (2 * i % 256,) * 3).save(folder / name.format(number), quality=95)


def write_csv(path, rows):
    path.write_text("".join(",".join(map(str, row)) + "\n" for row in rows))


def annots_mat(path, videos):
    """{name: (num_imgs, [(sf, class id, boxes x y w h), ...])} in the layout of finalAnnots.mat."""
    annot = np.empty((1, len(videos)), [(key, object) for key in ("num_imgs", "name", "tubes")])
    for i, (name, (count, tubes)) in enumerate(videos.items()):
        inner = np.empty((1, len(tubes)), [(key, object) for key in ("ef", "sf", "class", "boxes")])
        for j, (start, label, boxes) in enumerate(tubes):
            boxes = np.array(boxes)
            numbers = start + len(boxes) - 1, start, label
            inner[0, j] = *(np.array([[number]]) for number in numbers), boxes
        annot[0, i] = np.array([[count]]), name, inner
    savemat(path, {"annot": annot})


def gttubes(path, **changes):
    """A file like JHMDB-GT.pkl with two videos of 8 frames, two classes and two splits."""
    tube = np.float32([[f, 10, 20, 110, 120] for f in range(1, 9)])
    content = {
        "labels": ["catch", "clap"],
        "gttubes": {"clap/v": {1: [tube]}, "catch/w": {0: [tube, tube + [0, 5, 5, 5, 5]]}},
        "nframes": {"clap/v": 8, "catch/w": 8},
        "resolution": {"clap/v": (240, 320), "catch/w": (240, 320)},
        "train_videos": [["clap/v"], ["catch/w"]],
        "test_videos": [["catch/w"], ["clap/v"]],
    }
    path.write_bytes(pickle.dumps({**content, **changes}, protocol=2))


def small_ucf(root):
    """20 frames of Biking/v_a stored at 64x48, a tube in frames 3 to 12 and one in 5 to 6.

    It is the only test video; for training there is Biking/v_b of 9 frames, annotated in all.
    """
    grey_frames(root / "rgb-images/Biking/v_a", "{:05d}.jpg", 20)
    grey_frames(root / "rgb-images/Biking/v_b", "{:05d}.jpg", 9)
    right, corner = [200, 100, 100, 60], [1, 1, 32, 24]
    annots_mat(root / "finalAnnots.mat", {
        "Biking/v_a": (20, [(3, 3, np.uint8([right] * 10)), (5, 3, np.uint8([corner] * 2))]),
        "Biking/v_b": (9, [(1, 3, np.uint8([corner] * 9))])})
    (root / "testlist01.txt").write_text("Biking/v_a\n")
    return root


def small_own(root):
    """Your own data: videos a (20 frames, training) and b (9 frames, validation) of two classes."""
    grey_frames(root / "frames/a", "{:05d}.jpg", 20)
    grey_frames(root / "frames/b", "{:05d}.jpg", 9)
    (root / "classes.txt").write_text("wave\njump high\n")
    (root / "val.txt").write_text("b\n")
    rows = [("a", f, .25, .25, .75, .5, 1, 7) for f in range(3, 9)]
    rows += [("a", f, .25, .25, .75, .5, 2, 7) for f in (3, 4, 8)]
    rows += [("a", 3, 0, 0, .5, .5, 2, 9), ("b", 5, 0, 0, 1, 1, 1, 1), ("b", 7)]
    write_csv(root / "annotations.csv", rows)
    return root


def small_ava(root):
    """AVA in SlowFast's layout: 100 frames of a video, key frames at the seconds 902 (frame 60),
    903 and 904, which is excluded."""
    grey_frames(root / "frames/vid", "vid_{:06d}.jpg", 100)
    folder = root / "annotations"
    folder.mkdir()
    write_csv(folder / "ava_val_v2.2.csv", [
        ("vid", "0902", .1, .2, .5, .9, 12, 0), ("vid", "0902", .1, .2, .5, .9, 80, 0),
        ("vid", "0902", .5, .2, .9, .9, 12, 1), ("vid", "0903", .1, .2, .5, .9, 1, 0),
        ("vid", "0904", .1, .2, .5, .9, 1, 0)])
    write_csv(folder / "ava_val_excluded_timestamps_v2.2.csv", [("vid", "0904")])
    (folder / "ava_action_list_v2.2_for_activitynet_2019.pbtxt").write_text(
        'item {\n  name: "stand"\n  id: 12\n}\nitem {\n  name: "watch (a person)"\n  id: 80\n}\n')
    return root


def write_video(path, count, codec, rate=25, **options):
    """A video whose frames show their number from 0 as eight black or white bars."""
    import av
    options = {key: str(value) for key, value in options.items()}
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate, options=options)
        stream.width, stream.height = 64, 48
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        for i in range(count):
            bars = np.repeat(np.uint8(i >> np.arange(8) & 1) * np.uint8(255), 8)    # (64,)
            picture = np.ascontiguousarray(np.broadcast_to(bars[:, None], (48, 64, 3)))
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())


def numbers_shown(images):
    """The numbers that frames of `write_video` show."""
    bars = np.stack([np.asarray(image)[24, 4::8, 1] > 128 for image in images])    # (frames, 8)
    return (bars << np.arange(8)).sum(axis=1).tolist()
