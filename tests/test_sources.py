"""sources.py: published counts, boxes by hand, and pictures that show their own number: frame n is
the n-th picture that a player shows, in whatever container and tree it is stored."""

import struct
from pathlib import Path

import numpy as np
import pytest
from conftest import shared
from PIL import Image
from small_sets import gttubes, grey_frames, write_csv

from beside import sources
from beside.sources import (
    find_source,
    frame_times,
    read_dataset,
    read_frames,
    read_image,
    video_frames,
    video_rate,
)

# --- inputs made here


def bars(number, width=64, height=48):
    """A picture (H, W, 3) that shows a number, 0 to 255, as eight black or white bars."""
    bits = np.uint8(number >> np.arange(8) & 1) * np.uint8(255)
    row = np.repeat(bits, width // 8)                                          # (W,)
    return np.ascontiguousarray(np.broadcast_to(row[:, None], (height, width, 3)))


def shown(pictures):
    """The numbers that pictures (or images) of 64x48 show."""
    numbers = []
    for picture in pictures:
        bits = np.asarray(picture)[24, 4::8, 1] > 128                          # (8,)
        numbers.append(int((bits << np.arange(8)).sum()))
    return numbers


def write_video(path, pictures, codec="libx264", rate=25, container=None, ticks=None, **options):
    """A video of pictures (H, W, 3), or of bars if `pictures` are numbers; ticks: their times, in
    parts of 1 / rate."""
    import av
    options = {key.replace("_", "-"): str(value) for key, value in options.items()}
    pictures = [bars(picture) if np.isscalar(picture) else picture for picture in pictures]
    with av.open(str(path), "w", format=container) as output:
        stream = output.add_stream(codec, rate=rate, options=options)
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        stream.height, stream.width = pictures[0].shape[:2]
        for i, picture in enumerate(pictures):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts = i if ticks is None else ticks[i]
            output.mux(stream.encode(frame))
        output.mux(stream.encode())


def set_matrix(path, a, b, c, d):
    """Writes a display matrix into the track header of an MP4, as phones do."""
    content = bytearray(path.read_bytes())
    at = content.index(b"tkhd") + 44                       # behind version, times, duration, layer
    content[at:at + 36] = struct.pack(">9i", *np.int64([a, b, 0, c, d, 0, 0, 0, 1 << 14]) << 16)
    path.write_bytes(content)


def levels(images):
    """The grey levels of plain images."""
    return [round(float(np.asarray(image).mean())) for image in images]


@pytest.fixture
def ava(tmp_path):
    """A small AVA: key frames of one video at seconds 902 and 903, and 904, which is excluded."""
    grey_frames(tmp_path / "frames/vid", "vid_{:06d}.jpg", range(1, 101))
    (tmp_path / "annotations").mkdir()
    write_csv(tmp_path / "annotations/ava_val_v2.2.csv", [
        ("vid", "0902", .1, .2, .5, .9, 12, 0), ("vid", "0902", .1, .2, .5, .9, 80, 0),
        ("vid", "0902", .5, .2, .9, .9, 12, 1), ("vid", "0903", .1, .2, .5, .9, 1, 0),
        ("vid", "0904", .1, .2, .5, .9, 1, 0)])
    write_csv(tmp_path / "annotations/ava_val_excluded_timestamps_v2.2.csv", [("vid", "0904")])
    return tmp_path


# --- annotations

@pytest.mark.parametrize("side, videos, actors, boxes, frames, annotated", [
    ("train", 2284, 3143, 403282, 395868, 340336), ("val", 910, 1315, 170580, 159289, 138527)])
def test_ucf_has_the_published_counts(side, videos, actors, boxes, frames, annotated):
    table, _ = read_dataset("ucf", shared("data", "ucf101_24"), side, False)
    assert (len(table.videos), table.actor.max() + 1, len(table.box)) == (videos, actors, boxes)
    assert (table.num_frames.sum(), len(table.key_frames)) == (frames, annotated)
    assert not table.problems


@pytest.mark.parametrize("fold, train, test", [(1, (660, 22713), (268, 9139)),
                                               (2, (658, 22895), (270, 8957)),
                                               (3, (663, 22807), (265, 9045))])
def test_jhmdb_has_the_published_counts(fold, train, test):
    for side, counts in (("train", train), ("val", test)):
        table, _ = read_dataset("jhmdb", shared("data", "jhmdb"), side, False, fold)
        assert (len(table.videos), len(table.box)) == counts and not table.problems
        assert table.classes == sources.JHMDB_CLASSES


def test_class_names_are_those_that_were_published():
    assert sources.AVA_CLASSES_80 == shared("data", "ava", "classes.txt").read_text().splitlines()
    assert [len(sources.UCF_CLASSES), len(sources.JHMDB_CLASSES)] == [24, 21]


def test_ucf_boxes_of_uint8_do_not_overflow_and_stay_unshifted(ucf):
    table, _ = read_dataset("ucf", ucf, "val", False)
    assert table.videos == ["Biking/v_a"] and table.box.max(axis=0).tolist() == [200, 100, 300, 160]
    assert table.frame[table.actor == 0].tolist() == list(range(3, 13))
    assert table.frame[table.actor == 1].tolist() == [5, 6]
    assert np.flatnonzero(table.label.all(axis=0)).tolist() == [2] and table.classes[2] == "Biking"
    assert table.size.tolist() == [[240, 320]] and table.key_frames[:2].tolist() == [[0, 3], [0, 4]]


def test_training_videos_are_those_of_no_test_list_where_there_is_no_training_list(ucf):
    assert read_dataset("ucf", ucf, "train", False)[0].videos == ["Biking/v_b"]
    (ucf / "trainlist01.txt").write_text("Biking/v_a.avi 3\n")
    assert read_dataset("ucf", ucf, "train", False)[0].videos == ["Biking/v_a"]


def test_listed_videos_without_annotation_are_counted(ucf):
    (ucf / "testlist01.txt").write_text("Biking/v_a\nDiving/v_x\n")
    table, _ = read_dataset("ucf", ucf, "val", False)
    assert table.videos == ["Biking/v_a"]
    assert "1 of the 2 listed videos not annotated and left out" in table.source


@pytest.mark.parametrize("name, file", [("jhmdb", "JHMDB-GT.pkl"), ("ucf", "UCF101v2-GT.pkl")])
def test_gttubes_pickles_are_read_for_jhmdb_and_ucf(tmp_path, name, file):
    gttubes(tmp_path / file)
    table, _ = read_dataset(name, tmp_path, "val", False)
    assert table.videos == ["catch/w"] and table.label.sum(axis=0).tolist() == [16, 0]
    assert table.box[table.actor == 1][0].tolist() == [15, 25, 115, 125]
    assert table.frame[table.actor == 1].tolist() == list(range(1, 9))
    assert read_dataset(name, tmp_path, "val", False, 2)[0].videos == ["clap/v"]
    for fold in (0, 3):
        with pytest.raises(ValueError, match=f"splits 1 to 2, not {fold}"):
            read_dataset(name, tmp_path, "val", False, fold)


def test_rows_of_one_box_are_one_box_with_several_labels(own):
    table, _ = read_dataset("custom", own, "train", False)
    assert table.frame.tolist() == [3, 3, 4, 5, 6, 7, 8]
    assert sorted(table.actor.tolist()) == [0] * 6 + [1]
    assert table.label[table.actor == 0].tolist() == [[1, 1]] * 2 + [[1, 0]] * 3 + [[1, 1]]
    assert table.label[table.actor == 1].tolist() == [[0, 1]]
    assert table.box[0].tolist() == [16, 12, 48, 24] and table.classes == ["wave", "jump high"]


def test_a_row_of_two_columns_is_a_key_frame_with_nobody(own):
    table, _ = read_dataset("custom", own, "val", True)
    assert table.key_frames.tolist() == [[0, 5], [0, 7]] and table.frame.tolist() == [5]


def test_ava_knows_its_classes_and_leaves_out_excluded_seconds(ava):
    table, _ = read_dataset("ava", ava, "val", True)
    assert table.seconds and table.key_frames.tolist() == [[0, 902], [0, 903]]
    assert table.num_frames.tolist() == [100] and table.size.tolist() == [[48, 64]]
    assert len(set(table.actor.tolist())) == len(table.actor) == 3
    two = [table.classes[c] for c in np.flatnonzero(table.label[0])]
    assert two == ["stand", "watch (a person)"]
    assert np.abs(table.box[0] - [6.4, 9.6, 32, 43.2]).max() < 1e-5
    with pytest.raises(ValueError, match="key_frame=true"):
        read_dataset("ava", ava, "val", False)


def test_class_names_are_known_without_reading_the_annotation(own):
    assert sources.read_class_names("custom", own) == ["wave", "jump high"]
    assert sources.read_class_names("ava", None)[11] == "stand"
    assert sources.read_class_names("ucf", None)[23] == "WalkingWithDog"


def test_counts_of_classes_name_those_of_one_side(own):
    train, val = (read_dataset("custom", own, side, False)[0] for side in ("train", "val"))
    boxes, actors = sources.class_counts(train)
    assert boxes.tolist() == [6, 4] and actors.tolist() == [1, 2]
    lines = sources.class_lines(train, val)
    assert [line.split() for line in lines[1:3]] == [["wave", "6", "1", "1", "1"],
                                                     ["jump", "high", "4", "2", "0", "0"]]
    assert lines[3:] == ["classes in training only: 1 of 2: jump high"]


# --- boxes at every k-th frame

B = ("b", 5, 0, 0, 1, 1, 1, 1)     # val.txt lists b


def write_every_fifth(own, second_class=()):
    """Four boxes of a person at frames 1, 6, 11, 16 that moves right; some of two classes."""
    rows = [B]
    for i in range(4):
        rows.append(("a", 1 + 5 * i, .1 * i, .1, .2 + .1 * i, .5, 1, 7))
        if i in second_class:
            rows.append((*rows[-1][:6], 2, 7))
    write_csv(own / "annotations.csv", rows)


def test_boxes_at_every_fifth_frame_are_refused_unasked(own):
    write_every_fifth(own)
    problem, = read_dataset("custom", own, "train", False)[0].problems
    assert problem.startswith("4 boxes, each 5 frames from the next: key frames? use --preset ava "
                              "(check: --key-frames), or --fill 5 to interpolate")
    assert len(read_dataset("custom", own, "train", False, fill=3)[0].problems) == 1
    assert not read_dataset("custom", own, "train", False, fill=1)[0].problems
    table, _ = read_dataset("custom", own, "train", True)
    assert not table.problems and table.frame.tolist() == [1, 6, 11, 16]


def test_persons_that_are_not_followed_are_judged_by_the_frames_of_their_video(own):
    rows = [("a", frame, .1, .1, .5, .5, 1, frame) for frame in (1, 4, 7, 13)]
    write_csv(own / "annotations.csv", [*rows, B])
    problems = read_dataset("custom", own, "train", False)[0].problems
    assert problems[0].startswith("4 boxes, most of them 3 frames from the next")


def test_fill_interpolates_boxes_of_one_person_with_the_labels_of_both_ends(own):
    write_every_fifth(own, second_class=(0, 1))
    table, _ = read_dataset("custom", own, "train", False, fill=5)
    assert not table.problems and table.frame.tolist() == list(range(1, 17))
    assert len(set(table.actor.tolist())) == 1 and "12 boxes interpolated" in table.source
    wanted = [[.02 * i * 64, 4.8, (.2 + .02 * i) * 64, 24] for i in range(16)]
    assert np.abs(table.box - wanted).max() < 1e-4
    assert table.label.tolist() == [[True, i <= 5] for i in range(16)]
    assert table.key_frames[:, 1].tolist() == list(range(1, 17))


def test_fill_leaves_wider_gaps_and_frames_said_to_be_empty(own):
    rows = [("a", frame, .1, .1, .5, .5, 1, 7) for frame in (1, 2, 3, 5, 9, 12, 13)]
    write_csv(own / "annotations.csv", [*rows, ("a", 4), ("a", 10), B])
    for fill, frames in ((1, [1, 2, 3, 5, 9, 12, 13]), (3, [1, 2, 3, 5, 9, 12, 13]),
                         (4, [1, 2, 3, 5, 6, 7, 8, 9, 12, 13])):
        table, _ = read_dataset("custom", own, "train", False, fill=fill)
        assert table.frame.tolist() == frames


# --- trees of frames

@pytest.mark.parametrize("name", ["{:05d}.jpg", "{:05d}.png", "img_{:05d}.jpg", "v_{:06d}.jpg",
                                  "{}.jpg", "frame{:04d}.jpeg", "{:05d}.JPG", "V_{:03d}.PNG"])
@pytest.mark.parametrize("first", [0, 1])
def test_frames_are_found_by_any_name_and_counted_from_0_or_1(tmp_path, name, first):
    grey_frames(tmp_path / "frames/v", name, range(first, first + 12))
    source = find_source(tmp_path, ["v"])
    assert source.count("v") == 12 and source.size("v") == (48, 64)
    assert levels(source.read("v", np.array([0, 3, 11]))) == [0, 6, 22]
    assert source.path("v", 1).is_file() and source.path("v", 12).is_file()


def test_stray_files_are_no_frames(tmp_path):
    folder = tmp_path / "frames/v"
    grey_frames(folder, "{:05d}.jpg", range(1, 13))
    for stray in ("thumbnail.jpg", "thumb_1.jpg", "flow_x_00013.jpg", "00013.txt", "._00014.jpg"):
        (folder / stray).write_text("no frame")
    grey_frames(folder, "{:05d}.png", [99])                # of another kind, and fewer
    source = find_source(tmp_path, ["v"])
    assert source.count("v") == 12 and levels(source.read("v", np.array([11]))) == [22]


def test_more_than_99999_frames_are_counted_by_number(tmp_path):
    grey_frames(tmp_path / "frames/v", "{:05d}.jpg", [1, 99_999, 100_000, 100_001])
    source = find_source(tmp_path, ["v"])
    assert source.count("v") == 100_001
    assert levels(source.read("v", np.array([0, 99_998, 100_000]))) == [0, 2, 6]


def test_each_video_is_read_from_where_it_is(tmp_path):
    grey_frames(tmp_path / "Frames/run/v", "{:05d}.png", range(1, 4))
    grey_frames(tmp_path / "rgb-images/run/w", "{:05d}.jpg", range(0, 5))
    write_video(tmp_path / "x.MP4", range(6))
    (tmp_path / "rgb-images/run/x").mkdir()                # nothing was extracted
    (tmp_path / "rgb-images/run/x/thumbnail.jpg").write_text("no frame")
    source = find_source(tmp_path, ["run/v", "run/w", "run/x", "run/y"])
    assert [source.count(f"run/{video}") for video in "vwxy"] == [3, 5, 6, 0]
    assert "videos as frames: 2 (" in str(source) and "as files: 1" in str(source)


@pytest.mark.parametrize("orientation, how", [
    (1, None), (2, "FLIP_LEFT_RIGHT"), (3, "ROTATE_180"), (4, "FLIP_TOP_BOTTOM"), (5, "TRANSPOSE"),
    (6, "ROTATE_270"), (7, "TRANSVERSE"), (8, "ROTATE_90")])
def test_the_rotation_of_exif_is_honoured(tmp_path, orientation, how):
    stored = np.zeros((48, 64, 3), np.uint8)
    stored[:24, :32], stored[:24, 32:], stored[24:, :32] = 255, (255, 0, 0), (0, 255, 0)
    image, exif = Image.fromarray(stored), Image.Exif()
    exif[0x0112] = orientation
    image.save(tmp_path / "a.png", exif=exif)
    wanted = image.transpose(Image.Transpose[how]) if how else image
    assert np.array_equal(read_image(tmp_path / "a.png"), wanted)


def test_images_of_every_mode_are_scaled_right(tmp_path):
    ramp = np.arange(256, dtype=np.uint8).reshape(16, 16)
    grey = np.stack([ramp] * 3, axis=2)
    Image.fromarray(ramp.astype(np.uint16) * 257).save(tmp_path / "deep.png")
    Image.fromarray(ramp).save(tmp_path / "grey.png")
    Image.fromarray(grey).quantize(64).save(tmp_path / "palette.png")
    Image.fromarray(np.dstack([grey, ramp])).save(tmp_path / "alpha.png")
    Image.fromarray(np.dstack([ramp, ramp[::-1]]), "LA").save(tmp_path / "grey_alpha.png")
    for name, most in (("deep", 0), ("grey", 0), ("palette", 8), ("alpha", 0), ("grey_alpha", 0)):
        image = read_image(tmp_path / f"{name}.png")
        assert image.mode == "RGB"
        assert np.abs(np.asarray(image).astype(int) - grey).max() <= most, name
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(tmp_path / "cmyk.jpg", quality=95)
    assert np.abs(np.asarray(read_image(tmp_path / "cmyk.jpg")).astype(int) - [255, 0, 0]).max() < 9


def test_an_orientation_that_is_no_number_is_upright(tmp_path):
    entry = bytes.fromhex("0112 0002 00000003") + b"up\0\0"       # tag, ASCII, three letters
    exif = b"Exif\0\0MM\0*" + bytes.fromhex("00000008 0001") + entry + bytes(4)
    Image.new("RGB", (16, 12)).save(tmp_path / "a.jpg", exif=exif)
    assert Image.open(tmp_path / "a.jpg").getexif()[0x0112] == "up"
    assert sources.read_image(tmp_path / "a.jpg").size == (16, 12)


def test_a_large_jpeg_is_decoded_at_a_fraction_that_still_exceeds_the_need(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (1600, 1200)).save(tmp_path / "a.jpg")
    Image.new("RGB", (1600, 1200)).save(tmp_path / "b.jpg", exif=exif)
    assert read_image(tmp_path / "a.jpg").size == (1600, 1200)
    assert read_image(tmp_path / "a.jpg", (298, 224)).size == (800, 600)
    assert read_image(tmp_path / "b.jpg", (100, 400)).size == (600, 800)


# --- video files

CONTAINERS = [("h264.mp4", "libx264", {"g": 25, "bf": 3}),
              ("h264.mkv", "libx264", {"g": 25, "bf": 3}),
              ("open.mp4", "libx264", {"g": 20, "bf": 3, "x264_params": "open-gop=1"}),
              ("h264.avi", "libx264", {"g": 25, "bf": 3}),
              ("h264.ts", "libx264", {"g": 25, "bf": 3}),
              ("xvid.avi", "mpeg4", {"g": 7, "bf": 2}),
              ("plain.avi", "mpeg4", {"g": 250, "bf": 0}),
              ("mpeg4.mp4", "mpeg4", {"g": 9, "bf": 3}),
              ("mpeg4.mkv", "mpeg4", {"g": 100, "bf": 2}),
              ("mjpeg.avi", "mjpeg", {}),
              ("mpeg2.mpg", "mpeg2video", {"g": 12, "bf": 2}),
              ("wmv2.wmv", "wmv2", {}),
              ("vp8.webm", "libvpx", {"auto_alt_ref": 1, "lag_in_frames": 16, "cpu_used": 8}),
              ("vp9.webm", "libvpx-vp9", {"auto_alt_ref": 1, "lag_in_frames": 16, "cpu_used": 8}),
              ("hevc.mp4", "libx265", {"x265_params": "log-level=none:bframes=3:keyint=30"})]


@pytest.mark.parametrize("name, codec, options", CONTAINERS, ids=[case[0] for case in CONTAINERS])
def test_frame_n_is_the_nth_picture_shown(tmp_path, name, codec, options):
    path = tmp_path / name
    write_video(path, range(150), codec, **options)
    pictures, seconds = zip(*video_frames(path))
    assert shown(pictures) == list(range(150))
    assert np.abs(np.array(seconds) - np.arange(150) / 25).max() < 0.002
    assert np.abs(frame_times(path) - seconds).max() < 0.002 and video_rate(path) == 25
    for index in ([0], range(60, 75), [149], [31, 32, 33, 90], range(0, 150, 7), [74, 75]):
        assert shown(read_frames(path, np.array(index))) == list(index)


def test_a_video_gives_the_same_pixels_however_it_is_read(tmp_path):
    write_video(tmp_path / "a.mp4", range(60), g=10)
    pictures = [picture for picture, _ in video_frames(tmp_path / "a.mp4")]
    assert np.array_equal(read_frames(tmp_path / "a.mp4", np.array([45, 46])), pictures[45:47])
    images = find_source(tmp_path, ["a"]).read("a", np.array([3, 45]))
    assert [np.array_equal(image, pictures[i]) for image, i in zip(images, (3, 45))] == [True] * 2


def test_a_seek_is_taken_where_it_finds_what_is_expected_and_only_there(tmp_path):
    path, index = tmp_path / "a.mp4", np.arange(120, 128)
    write_video(path, range(150), g=25, bf=3)
    stamps, keys, _ = sources.packet_stamps(path)
    assert shown(sources.seek_frames(path, index, stamps, keys)) == list(index)
    assert sources.seek_frames(path, index, np.delete(stamps, 122), keys) is None
    assert sources.seek_frames(path, index, stamps - 1, keys) is None
    assert sources.seek_frames(path, index, np.append(stamps, stamps[-1] + 1)[1:], keys) is not None


@pytest.mark.parametrize("name, codec, options", [
    ("a.avi", "libx264", {}), ("a.ts", "libx264", {}), ("a.mpg", "mpeg2video", {}),
    ("a.mp4", "mpeg4", {}), ("a.webm", "libvpx", {"cpu_used": 8}),
    ("a.mkv", "libx264", {"x264_params": "interlaced=1"})])
def test_no_seek_is_taken_where_packets_may_not_tell_what_is_shown(tmp_path, name, codec, options):
    path = tmp_path / name
    write_video(path, range(40), codec, g=10, **options)
    assert sources.packet_stamps(path) is None and len(frame_times(path)) == 40
    assert shown(read_frames(path, np.array([33, 39]))) == [33, 39]


def turned(picture, a, b, c, d):
    """A picture moved pixel by pixel: column p, row q goes to column a p + c q, row b p + d q."""
    height, width = picture.shape[:2]
    places = {}
    for q in range(height):
        for p in range(width):
            places[a * p + c * q, b * p + d * q] = picture[q, p]
    columns, rows = (sorted({place[axis] for place in places}) for axis in (0, 1))
    return np.array([[places[column, row] for column in columns] for row in rows])


@pytest.mark.parametrize("matrix", [(1, 0, 0, 1), (0, 1, -1, 0), (-1, 0, 0, -1), (0, -1, 1, 0),
                                    (-1, 0, 0, 1), (1, 0, 0, -1), (0, 1, 1, 0), (0, -1, -1, 0)])
def test_a_rotated_or_mirrored_video_is_shown_upright_by_all_readers(tmp_path, matrix):
    stored = np.full((32, 48, 3), 16, np.uint8)
    stored[:16, :24], stored[:16, 24:], stored[16:, :24] = 235, (235, 16, 16), (16, 16, 235)
    path = tmp_path / "a.mp4"
    write_video(path, [stored] * 40, crf=1)
    set_matrix(path, *matrix)
    wanted = turned(stored, *matrix).astype(int)
    streamed = next(video_frames(path))[0]
    source = find_source(tmp_path, ["a"])
    assert source.size("a") == wanted.shape[:2]
    sought, = read_frames(path, np.array([39]))
    image, = source.read("a", np.array([3]))
    for picture in (streamed, sought, np.asarray(image)):
        assert picture.shape == wanted.shape and np.abs(picture - wanted).mean() < 10


def test_a_quarter_turn_of_a_phone_is_clockwise(tmp_path):
    stored = np.full((32, 48, 3), 16, np.uint8)
    stored[:16, :24] = 235                                 # the upper left corner
    write_video(tmp_path / "a.mp4", [stored] * 3)
    set_matrix(tmp_path / "a.mp4", 0, 1, -1, 0)
    picture = next(video_frames(tmp_path / "a.mp4"))[0]
    assert picture.shape == (48, 32, 3) and picture[4, 28].min() > 200 > picture[4, 4].max()


def cut(source, target, first, step):
    """Copies the packets of an MP4 from the key frame before its frame `first` on; the frames
    before that one get times below zero, from which the muxer makes an edit list."""
    import av
    with av.open(str(source)) as whole, av.open(str(target), "w") as part:
        stream = whole.streams.video[0]
        copied = part.add_stream_from_template(stream)
        packets = [packet for packet in whole.demux(stream) if packet.size]
        keys = [i for i, packet in enumerate(packets)
                if packet.is_keyframe and packet.pts <= first * step]
        for packet in packets[keys[-1]:]:
            packet.pts, packet.dts = packet.pts - first * step, packet.dts - first * step
            packet.stream = copied
            part.mux(packet)


def test_a_cut_without_encoding_has_the_frames_that_a_player_shows(tmp_path):
    write_video(tmp_path / "whole.mp4", range(150), g=25, bf=3)
    cut(tmp_path / "whole.mp4", tmp_path / "a.mp4", 40, 512)
    path = tmp_path / "a.mp4"
    assert shown(picture for picture, _ in video_frames(path)) == list(range(40, 150))
    assert len(frame_times(path)) == 110 and np.abs(frame_times(path)[-1] - 109 / 25) < 1e-6
    assert shown(read_frames(path, np.array([0, 50, 109]))) == [40, 90, 149]


def test_an_edit_list_that_ends_early_ends_the_video(tmp_path):
    path = tmp_path / "a.mp4"
    write_video(path, range(150), g=25, bf=3)
    content = bytearray(path.read_bytes())
    at = content.index(b"elst") + 12                       # behind version and number of entries
    length, = struct.unpack(">I", content[at:at + 4])
    content[at:at + 4] = struct.pack(">I", length // 2)
    path.write_bytes(content)
    assert shown(picture for picture, _ in video_frames(path)) == list(range(75))
    assert len(frame_times(path)) == 75 and shown(read_frames(path, np.array([74]))) == [74]


def test_a_video_that_begins_between_key_frames_begins_with_its_first_picture(tmp_path):
    import av
    write_video(tmp_path / "whole.mp4", range(100), g=20, bf=0)
    path = tmp_path / "a.mkv"
    with av.open(str(tmp_path / "whole.mp4")) as whole, av.open(str(path), "w") as part:
        stream = whole.streams.video[0]
        copied = part.add_stream_from_template(stream)
        for packet in [packet for packet in whole.demux(stream) if packet.size][7:]:
            packet.stream = copied
            part.mux(packet)
    numbers = shown(picture for picture, _ in video_frames(path))
    assert 7 < numbers[0] <= 20 and numbers == list(range(numbers[0], 100))
    assert len(frame_times(path)) == len(numbers)
    assert shown(read_frames(path, np.array([2, 40]))) == [numbers[2], numbers[40]]


@pytest.mark.parametrize("codec", ["libx264", "mpeg2video"])
@pytest.mark.parametrize("start", [0, 2500])
def test_joined_transport_streams_go_on_in_time(tmp_path, codec, start):
    write_video(tmp_path / "a.ts", range(24), codec, g=12, bf=2)
    ticks = range(start, start + 72, 3)                    # the second file has a time of its own
    write_video(tmp_path / "b.ts", range(24, 48), codec, ticks=ticks, g=12, bf=2)
    path = tmp_path / "joined.ts"
    path.write_bytes((tmp_path / "a.ts").read_bytes() + (tmp_path / "b.ts").read_bytes())
    pictures, seconds = zip(*video_frames(path))
    assert shown(pictures) == list(range(48))
    wanted = np.array([*range(24), *range(24, 96, 3)]) / 25
    assert np.abs(np.array(seconds) - wanted).max() < 0.05
    assert np.abs(frame_times(path) - seconds).max() < 1e-3
    assert shown(read_frames(path, np.array([40, 47]))) == [40, 47]


def test_frames_at_uneven_times_keep_their_times(tmp_path):
    ticks = [0, 1, 2, 10, 11, 30, 31, 500]
    write_video(tmp_path / "a.mkv", range(8), ticks=ticks, bf=2)
    pictures, seconds = zip(*video_frames(tmp_path / "a.mkv"))
    assert shown(pictures) == list(range(8))
    assert np.abs(np.array(seconds) - np.array(ticks) / 25).max() < 0.002


def test_seconds_grow_where_stamps_are_equal(tmp_path):
    path = tmp_path / "a.mkv"                              # which counts milliseconds
    write_video(path, range(60), rate=3000, bf=0)
    pictures, seconds = zip(*video_frames(path))
    assert shown(pictures) == list(range(60)) and min(np.diff(seconds)) > 1e-4
    assert np.abs(np.array(seconds) - np.arange(60) / 3000).max() < 0.001
    assert sources.packet_stamps(path) is None and shown(read_frames(path, np.array([50]))) == [50]


def test_a_change_of_size_on_the_way_is_undone(tmp_path):
    write_video(tmp_path / "a.ts", range(10), g=5)
    write_video(tmp_path / "b.ts", [bars(i, 128, 96) for i in range(10, 20)], g=5)
    path = tmp_path / "joined.ts"
    path.write_bytes((tmp_path / "a.ts").read_bytes() + (tmp_path / "b.ts").read_bytes())
    pictures = [picture for picture, _ in video_frames(path)]
    assert {picture.shape for picture in pictures} == {(48, 64, 3)}
    assert shown(pictures) == list(range(20)) and shown(read_frames(path, np.array([15]))) == [15]


@pytest.mark.parametrize("suffix", [".MP4", ".Mkv", ".mpg", ".MPEG", ".m4v", ".TS", ".MOV", ".3gp"])
def test_videos_are_found_by_suffixes_in_any_case(tmp_path, suffix):
    codec = "mpeg2video" if suffix in (".mpg", ".MPEG") else "libx264"
    container = {".MPEG": "mpeg", ".TS": "mpegts", ".m4v": "mp4"}.get(suffix)
    (tmp_path / "deep/er").mkdir(parents=True)
    write_video(tmp_path / f"deep/er/a{suffix}", range(10), codec, container=container)
    source = find_source(tmp_path, ["a"])
    assert source.count("a") == 10 and shown(source.read("a", np.array([2, 9]))) == [2, 9]


def test_ava_frames_are_taken_from_videos_by_time(ava):
    (ava / "frames").rename(ava / "hidden")
    write_video(ava / "vid.mp4", range(40), g=10)                              # 25 a second
    write_csv(ava / "annotations/ava_val_v2.2.csv", [("vid", "0902", .1, .2, .5, .9, 12, 0)])
    table, source = read_dataset("ava", ava, "val", True)
    assert table.num_frames.tolist() == [int(39 / 25 * 30) + 1]
    index = np.arange(0, 46, 5)
    numbers = np.array(shown(source.read("vid", index)))
    assert np.abs(numbers - index / 30 * 25).max() <= 0.5
    assert shown(source.read("vid", np.arange(44, 47))) == [37, 37, 38]        # one is taken twice
    with pytest.raises(OSError, match="vid.mp4 has 47 frames at 30 a second, frame 48 is anno"):
        source.read("vid", np.array([47]))


def test_ava_frames_of_a_whole_film_begin_at_its_900th_second(tmp_path):
    write_video(tmp_path / "film.mp4", [number % 256 for number in range(1000)], rate=1, g=50)
    source = find_source(tmp_path, ["film"], 30)
    assert source.count("film") == 99 * 30 + 1
    numbers = shown(source.read("film", np.array([0, 16, 30, 31, 2970])))
    assert numbers == [number % 256 for number in (900, 901, 901, 901, 999)]


def test_real_videos_have_the_frames_of_their_tree(tmp_path):
    mini = Path(shared("data", "ucf24_mini"))
    (tmp_path / "videos").symlink_to(mini / "videos")
    names = (mini / "testlist01.txt").read_text().split()
    trees, files = find_source(mini, names), find_source(tmp_path, names)
    for name in names[:2]:
        count = trees.count(name)
        assert files.count(name) == count
        for i in (0, count // 2, count - 1):
            small = [image.resize((80, 60)) for image in (trees.read(name, np.array([i]))[0],
                                                           files.read(name, np.array([i]))[0])]
            assert np.abs(np.subtract(*(np.asarray(image, float) for image in small))).mean() < 4
