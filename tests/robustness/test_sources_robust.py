"""sources.py on what hands and disks do to files: each fault is one message that names the file,
the place and the way out, and nothing wrong is read in silence."""

import gc
import os
import pickle

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat
from small_sets import annots_mat, gttubes, write_csv
from test_sources import shown, write_video

from beside import sources
from beside.sources import find_source, read_dataset, read_frames, video_frames, video_rate


def problems(root, side="train", key_frame=False, name="custom", **options):
    """All problems of a table as one text."""
    return "\n".join(read_dataset(name, root, side, key_frame, **options)[0].problems)


def rewrite(path, encoding, mark=b""):
    path.write_bytes(mark + path.read_text().encode(encoding))


# --- text

@pytest.mark.parametrize("encoding, mark", [("utf-8", b"\xef\xbb\xbf"), ("utf-16-le", b"\xff\xfe"),
                                            ("utf-16-be", b"\xfe\xff")])
def test_byte_order_marks_are_left_out(own, encoding, mark):
    (own / "classes.txt").write_text("wave\nläuft\n", "utf-8")
    for name in ("annotations.csv", "val.txt"):
        rewrite(own / name, encoding, mark)
    (own / "classes.txt").write_bytes(mark + "wave\nläuft\n".encode(encoding))
    for side, videos in (("train", ["a"]), ("val", ["b"])):
        table, _ = read_dataset("custom", own, side, False)
        assert table.videos == videos and table.classes == ["wave", "läuft"] and not table.problems


def test_a_mark_in_the_middle_of_joined_files_is_left_out(own):
    with open(own / "annotations.csv", "ab") as file:
        file.write(b"\xef\xbb\xbfa,9,0.25,0.25,0.75,0.5,1,7\n")
    assert read_dataset("custom", own, "train", False)[0].frame.tolist()[-1] == 9


@pytest.mark.parametrize("encoding, message", [("latin-1", "classes.txt line 2 is not UTF-8"),
                                               ("utf-16-le", "classes.txt holds zero bytes"),
                                               ("utf-16-be", "classes.txt holds zero bytes")])
def test_another_encoding_is_an_error_that_names_the_file(own, encoding, message):
    (own / "classes.txt").write_bytes("wave\nläuft\n".encode(encoding))
    with pytest.raises(ValueError, match=message):
        read_dataset("custom", own, "train", False)


# --- rows

ROWS = [("a", frame, .1, .1, .2, .3, 1 + frame % 2, 7) for frame in range(1, 9)]
B = ("b", 5, 0, 0, 1, 1, 1, 1)


@pytest.mark.parametrize("change, kind, places, cause", [
    (lambda r: (*r[:2], 20 * r[1], 30, 20 * r[1] + 90, 160, *r[6:]),
     "box outside of the frame, 8 times",
     ["row 2: a frame 1: box [20.0, 30.0, 110.0, 160.0], class 2 (of 20 frames)", "row 3", "row 4",
      "and 5 more"], "pixels"),
    (lambda r: (*r[:2], .5, .5, .2, .3, *r[6:]), "box with x2 <= x1 or y2 <= y1, 8 times",
     ["row 2: a frame 1", "row 3", "row 4", "and 5 more"], "x, y, width, height in place of"),
    (lambda r: (*r[:6], r[6] - 1, r[7]), "class id that is not in the class list (1 to 2), 4 times",
     ["row 3: a frame 2", "row 5", "row 7", "and 1 more"], "class ids counted from 0"),
    (lambda r: (r[0], r[1] - 1, *r[2:]), "box of a frame that is not in the video, once",
     ["row 2: a frame 0"], "frames counted from 0"),
    (lambda r: (*r, .9), "row of another number of columns, 8 times",
     ["row 2: columns: 9, not 8", "row 3", "row 4", "and 5 more"], "a column too many"),
    (lambda r: r[:7], "row of another number of columns, 8 times",
     ["row 2: columns: 7, not 8", "row 3", "row 4", "and 5 more"], "the last column, the person"),
    (lambda r: ("\t".join(map(str, r)),), "row of another number of columns, 8 times",
     ["row 2: columns: 1, not 8", "row 3", "row 4", "and 5 more"], "something else than commas"),
    (lambda r: (";".join(map(str, r)),), "row of another number of columns, 8 times",
     ["row 2: columns: 1, not 8", "row 3", "row 4", "and 5 more"], "semicolons between"),
    (lambda r: (";".join(map(str, r)).replace(".", ","),),      # a German Excel's
     "row of another number of columns, 8 times",
     ["row 2: columns: 5, not 8", "row 3", "row 4", "and 5 more"], "semicolons between"),
    (lambda r: (*r[:6], ["wave", "walk"][r[6] - 1], r[7]), "row with a word for a number, 8 times",
     ["row 2: could not convert", "row 3", "row 4", "and 5 more"], "names in place of numbers")])
def test_faults_of_one_kind_are_one_message(own, change, kind, places, cause):
    write_csv(own / "annotations.csv", [B, *map(change, ROWS)])
    text, = read_dataset("custom", own, "train", False)[0].problems
    head, *lines = text.split("\n")
    assert head.startswith(f"{kind}; likely cause: {cause}")
    assert len(lines) == len(places)
    assert [place in line for place, line in zip(places, lines)] == [True] * len(places)
    assert all("annotations.csv row" in line for line in lines[:3])


@pytest.mark.parametrize("boxes", [
    [(.3, .1, .2, .2)],                                    # the corners of one box of nine swapped
    [(.2, .1, .2, .4)] * 15,                               # x2 is x1
    [(.5, .5, .2, .3)] * 15 + [(.1, .2, .3, .9)]])         # one does not fit as x, y, w, h
def test_a_turned_box_is_not_always_taken_for_x_y_width_height(own, boxes):
    rows = [("a", number, *box, 1, 8) for number, box in enumerate(boxes, 1)]
    write_csv(own / "annotations.csv", [B, *ROWS, *rows])
    text = problems(own)
    assert "box with x2 <= x1 or y2 <= y1" in text and "width, height" not in text


def test_a_header_line_is_recognised(own):
    header = ("video", "frame", "x1", "y1", "x2", "y2", "class", "person")
    write_csv(own / "annotations.csv", [header, B, *ROWS])
    text = problems(own)
    assert "row with a word for a number, once; likely cause: a header line" in text
    assert "annotations.csv row 1: could not convert string to float: 'frame'" in text


@pytest.mark.parametrize("row, message", [
    (("a", 3, .1, .1, .2, .2, 1, 7, .5, 0, 0), "row 10: columns: 11, not 8"),
    (("a", 3, .3, .1, .2, .2, 1, 8), "box with x2 <= x1 or y2 <= y1, once"),
    (("a", 3, .1, .2, .2, .2, 1, 8), "box with x2 <= x1 or y2 <= y1, once"),
    (("a", 3, .1, "nan", .2, .2, 1, 8), "box with a coordinate that is not a number, once"),
    (("a", 3, .1, .1, 1.2, .2, 1, 8), "box outside of the frame, once"),
    (("a", 21, .1, .1, .2, .2, 1, 8), "row 10: a frame 21: box [0.1, 0.1, 0.2, 0.2], class 1 (of"),
    (("a", 3, .1, .1, .2, .9, 1, 7), "row 10: a frame 3: person 7 has two boxes"),
    (("a", "x", .1, .1, .2, .2, 1, 8), "row 10: could not convert string to float: 'x'"),
    (("a", 3.5, .1, .1, .2, .2, 1, 8), "row 10: frame '3.5' is no whole number"),
    (("a", "1e30", .1, .1, .2, .2, 1, 8), "row 10: frame '1e30' is no whole number"),
    (("a", 3, .1, .1, .2, .2, 1, "nan"), "row 10: 'nan' in the last column is no number"),
    (("a", 3, .1, .1, .2, .2, "nan", 8), "class id that is not in the class list (1 to 2), once")])
def test_one_faulty_row_is_named(own, row, message):
    write_csv(own / "annotations.csv", [B, *ROWS, row])
    assert message in problems(own)


def test_a_quote_that_is_not_closed_is_an_error(own):
    with open(own / "annotations.csv", "a") as file:
        file.write('"a,' + "1,2\n" * 50_000)
    with pytest.raises(ValueError, match="annotations.csv is no csv file: field larger than"):
        read_dataset("custom", own, "train", False)


@pytest.mark.parametrize("end", ["\r\n", "\r"])
def test_lines_may_end_as_other_systems_do(own, end):
    text = (own / "annotations.csv").read_text().replace("\n", end)
    (own / "annotations.csv").write_bytes(text.encode())
    assert not problems(own)


def test_blank_lines_are_no_rows(own):
    (own / "annotations.csv").write_text("\n" + (own / "annotations.csv").read_text() + "\n\n")
    assert not problems(own)


def test_a_faulty_tube_is_named(ucf):
    boxes = np.int16([[10, 10, 20, 20], [310, 10, 40, 20], [10, 10, -5, 20]])
    annots_mat(ucf / "finalAnnots.mat", {"Biking/v_a": (20, [(19, 25, boxes)])})
    text = problems(ucf, "val", name="ucf")
    for part in ("not in the class list (1 to 24), 3 times", "box [310.0, 10.0, 350.0, 30.0], ",
                 "class 25 (of 320x240, 20 frames)", "frame 21", "x2 <= x1 or y2 <= y1, once"):
        assert part in text


def test_a_video_of_zero_frames_is_named(ucf):
    annots_mat(ucf / "finalAnnots.mat", {"Biking/v_a": (0, [(1, 3, np.uint8([[1, 1, 9, 9]]))])})
    text, = read_dataset("ucf", ucf, "val", False)[0].problems                 # said once
    assert "Biking/v_a: the video has no frames" in text


def test_a_class_list_with_a_class_twice_or_none_is_an_error(own):
    for text, message in (("wave\nrun\nwave\n", "wave twice"), ("\n", "no class")):
        (own / "classes.txt").write_text(text)
        with pytest.raises(ValueError, match=f"classes.txt lists {message}; it has one line for"):
            read_dataset("custom", own, "train", False)


def test_a_faulty_list_of_excluded_seconds_is_named(tmp_path):
    write_csv(tmp_path / "ava_val_v2.2.csv", [("v", 902, .1, .1, .2, .2, 1, 1)])
    (tmp_path / "ava_val_excluded_timestamps_v2.2.csv").write_text("v,902\nv\n")
    with pytest.raises(ValueError, match="timestamps_v2.2.csv row 2: ..v.. is not a video and a"):
        read_dataset("ava", tmp_path, "val", True)


# --- splits

def test_an_annotation_without_boxes_is_named(own, ucf):
    write_csv(own / "annotations.csv", [("b", 7)])
    assert "has no boxes" in problems(own, "val")
    annots_mat(ucf / "finalAnnots.mat", {"Biking/v_a": (20, [])})
    assert "has no boxes" in problems(ucf, "val", name="ucf")


def test_an_empty_side_is_named(own, ucf):
    (own / "val.txt").write_text("")
    assert "val.txt lists no video of" in problems(own, "val") and not problems(own, "train")
    (own / "val.txt").write_text("a\nb\n")
    assert "val.txt lists every video of" in problems(own, "train")
    (ucf / "testlist01.txt").write_text("")
    assert "ucf split 1, val: none of the 0 listed videos" in problems(ucf, "val", name="ucf")


def test_a_validation_video_that_is_not_annotated_is_named_with_the_nearest(own):
    (own / "val.txt").write_text("b\nab\n")
    assert "val.txt: ab is not in" in problems(own) and "the nearest is" in problems(own)


def test_names_that_only_look_the_same_are_told_apart(own):
    (own / "frames/a").rename(own / "frames/ku\u0308che")          # as macOS writes it
    write_csv(own / "annotations.csv", [B, *(("k\xfcche", *row[1:]) for row in ROWS)])
    expected = "k\xfcche, the nearest is ku\u0308che, with accents of other code points"
    assert expected in problems(own)


# --- videos that are not there, or there twice

def test_a_video_without_pixels_is_named_with_what_helps(own):
    (own / "frames/a").rename(own / "frames/aa")
    write_csv(own / "annotations.csv", [("c", 1, .1, .1, .2, .2, 1, 1), B, *ROWS])
    grey = Image.new("RGB", (64, 48))
    (own / "frames/c").mkdir()
    grey.save(own / "frames/c/00001.jpg")
    text = problems(own)
    assert "video without frames and without a file, once" in text and "--missing leave-out" in text
    assert "a, the nearest is aa" in text and "frames/a/00001.jpg" in text and "a.mp4" in text


def test_videos_without_pixels_are_left_out_on_demand(own, tmp_path):
    others = [(f"lost{i:02d}", 1, .1, .1, .2, .2, 1, 1) for i in range(12)]
    write_csv(own / "annotations.csv", [*others, B, *ROWS])
    lines = problems(own).split("\n")
    assert lines[0].startswith("video without frames and without a file, 12 times; likely cause:")
    assert [line.strip() for line in lines[1:]] == ["lost00", "lost01", "lost02", "and 9 more"]
    table, source = read_dataset("custom", own, "train", False, missing="leave out")
    assert table.videos == ["a"] and len(table.box) == 8 and not table.problems and "a" in source
    assert "videos without frames left out: 12 (lost00, lost01" in table.source
    assert table.source.endswith("and 2 more)")


def test_tube_sets_leave_out_videos_on_demand_too(tmp_path):
    gttubes(tmp_path / "JHMDB-GT.pkl", train_videos=[["clap/v", "catch/w"]] * 2)
    write_video(tmp_path / "v.avi", range(8), "mpeg4")
    assert "video without frames and without a file, once" in problems(tmp_path, name="jhmdb")
    table, _ = read_dataset("jhmdb", tmp_path, "train", False, missing="leave out")
    assert table.videos == ["clap/v"] and table.label.sum(axis=0).tolist() == [0, 8]
    assert "videos without frames left out: 1 (catch/w)" in table.source


def test_an_annotation_alone_can_be_read_but_gives_no_pixels(ucf):
    (ucf / "rgb-images").rename(ucf / "hidden")
    table, source = read_dataset("ucf", ucf, "val", False)
    assert len(table.box) == 12 and not table.problems and str(source).startswith("NO frames or v")
    with pytest.raises(FileNotFoundError, match="no frames and no video file of Biking/v_a"):
        source.read("Biking/v_a", np.array([0]))
    assert "without frames" in problems(ucf, "val", name="ucf", missing="leave out")


def test_your_own_data_without_any_pixels_is_a_fault(own):
    (own / "frames").rename(own / "hidden")
    text = problems(own)
    assert "video without frames and without a file, once" in text and "frames/a/00001.jpg" in text


def test_frames_are_not_said_to_be_lost_where_no_row_could_be_read(own):
    write_csv(own / "annotations.csv", [("a", 1, 2)])
    _, source = read_dataset("custom", own, "train", False)
    assert str(source) == "no video was looked for"


def test_two_videos_of_one_name_are_an_error_that_names_both(tmp_path):
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        write_video(tmp_path / folder / "a.mp4", range(5))
    with pytest.raises(ValueError, match=r"called a: .*one/a.mp4, .*two/a.mp4; rename or move"):
        find_source(tmp_path, ["a"])
    source = find_source(tmp_path, ["one/a", "two/a", "b"])                    # by their folders
    assert [source.files[name].parent.name for name in ("one/a", "two/a")] == ["one", "two"]


def test_a_file_is_not_taken_for_a_video_of_another_class(tmp_path):
    (tmp_path / "run").mkdir()
    write_video(tmp_path / "run/v.mp4", range(5))
    assert list(find_source(tmp_path, ["run/v", "walk/v"]).files) == ["run/v"]
    assert list(find_source(tmp_path, ["walk/v"]).files) == ["walk/v"]         # the only one


def test_two_folders_of_frames_of_one_video_are_an_error_that_names_both(own):
    (own / "rawframes").mkdir()
    (own / "frames/a").rename(own / "rawframes/a")
    (own / "frames/a").symlink_to(own / "rawframes/a")     # a link is no second one
    assert find_source(own, ["a"]).count("a") == 20
    (own / "frames/a").unlink()
    (own / "frames/b").rename(own / "frames/a")
    with pytest.raises(ValueError, match="frames/a and .*rawframes/a both hold frames of a; move"):
        find_source(own, ["a"])


def test_links_and_hidden_files_are_no_second_video(tmp_path):
    for folder in ("other", "frames"):
        (tmp_path / folder).mkdir()
    write_video(tmp_path / "a.mp4", range(5))
    write_video(tmp_path / "frames/a.mp4", range(7))       # trees of frames are not searched
    (tmp_path / "other/a.mp4").symlink_to(tmp_path / "a.mp4")
    (tmp_path / "._a.mp4").write_bytes(b"of another system")
    assert len(sources.video_files(tmp_path)) == 1 and find_source(tmp_path, ["a"]).count("a") == 5


def test_what_visualize_drew_is_no_data(tmp_path):
    (tmp_path / "videos").mkdir()
    (tmp_path / "out/a").mkdir(parents=True)
    write_video(tmp_path / "videos/a.avi", range(5), "mpeg4")
    write_video(tmp_path / "out/a/a.mp4", range(9))
    (tmp_path / "out/a/tubes.json").write_text("{}")
    assert find_source(tmp_path, ["a"]).files["a"] == tmp_path / "videos/a.avi"
    assert sources.video_files(tmp_path) == [tmp_path / "videos/a.avi"]
    (tmp_path / "videos/tubes.json").write_text("{}")                          # drawn beside it
    assert sources.video_files(tmp_path) == [tmp_path / "videos/a.avi"]


# --- frames

def test_a_missing_frame_is_named_with_the_way_out(ucf):
    (ucf / "rgb-images/Biking/v_a/00009.jpg").unlink()
    _, source = read_dataset("ucf", ucf, "val", False)
    assert source.count("Biking/v_a") == 20
    assert len(source.read("Biking/v_a", np.array([7, 9]))) == 2
    message = r"frames missing: .*v_a/00009.jpg \(20 expected, 19 found\); extract them with python"
    with pytest.raises(FileNotFoundError, match=message):
        source.read("Biking/v_a", np.array([7, 8]), 20)


@pytest.mark.parametrize("content", [b"", b"no image", None])
@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_a_damaged_image_is_named(tmp_path, suffix, content):
    path = tmp_path / f"a.{suffix}"
    noise = np.random.default_rng(0).integers(0, 255, (48, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[:700] if content is None else content)
    with pytest.raises(OSError, match=f"cannot read the image .*a.{suffix}: .*extract it again"):
        sources.read_image(path)


def test_two_files_of_one_frame_are_an_error(tmp_path):
    (tmp_path / "frames/v").mkdir(parents=True)
    for name in ("00001.jpg", "1.jpg", "00002.jpg"):
        Image.new("RGB", (8, 8)).save(tmp_path / "frames/v" / name)
    with pytest.raises(ValueError, match="frames/v holds two files of frame 1"):
        find_source(tmp_path, ["v"]).count("v")


# --- video files

@pytest.mark.parametrize("name", ["rtsp://camera/1", "http://host/a.mp4", "https://host/a", "0"])
def test_streams_and_cameras_are_refused(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    for read in (video_rate, lambda path: next(video_frames(path))):
        with pytest.raises(OSError, match=f"{name} is a stream or a camera, and only files are"):
            read(name)


def test_what_is_no_video_file_is_named(tmp_path):
    import av
    with pytest.raises(FileNotFoundError, match="video missing: .*none.mp4"):
        video_rate(tmp_path / "none.mp4")
    with pytest.raises(OSError, match="is a folder or a device"):
        video_rate(tmp_path)
    (tmp_path / "text.mp4").write_text("no video")
    with pytest.raises(OSError, match="text.mp4 cannot be read as a video"):
        video_rate(tmp_path / "text.mp4")
    with av.open(str(tmp_path / "sound.wav"), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), "s16", "mono")
        sound.sample_rate = 8000
        container.mux(stream.encode(sound))
    with pytest.raises(OSError, match="sound.wav holds no video stream"):
        video_rate(tmp_path / "sound.wav")


@pytest.mark.parametrize("keep", [0, 2000])
@pytest.mark.parametrize("suffix", [".avi", ".mp4"])
def test_a_damaged_video_is_named(tmp_path, suffix, keep):
    path = tmp_path / f"a{suffix}"
    write_video(path, range(40), "mpeg4", g=5)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(OSError, match=f"a{suffix}"):
        read_frames(path, np.array([35]))


def test_a_video_that_is_too_short_says_how_long_it_is(tmp_path):
    for name, codec in (("a.avi", "mpeg4"), ("a.mp4", "libx264")):
        write_video(tmp_path / name, range(50), codec)
        with pytest.raises(OSError, match=f"{name} has 50 frames, frame 51 is annotated"):
            read_frames(tmp_path / name, np.array([49, 50]))


def test_a_video_whose_name_looks_like_an_address_is_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_video(tmp_path / "a.mp4", range(5))
    (tmp_path / "a.mp4").rename(tmp_path / "12:30 %d.mp4")
    assert shown(picture for picture, _ in video_frames("12:30 %d.mp4")) == list(range(5))


def test_a_seek_that_misses_is_followed_by_decoding_from_the_start(tmp_path, monkeypatch):
    path = tmp_path / "a.mp4"
    write_video(path, range(100), g=25)
    stamps, keys, unit = sources.packet_stamps(path)
    wrong = np.delete(stamps, 61)                          # a packet that is no picture, say
    monkeypatch.setattr(sources, "packet_stamps", lambda path: (wrong, keys, unit))
    assert shown(read_frames(path, np.array([60, 62]))) == [60, 62]


def test_a_tune_that_has_a_cover_has_no_video(tmp_path):
    import av
    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        stream = container.add_stream("mjpeg", rate=1)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuvj420p"
        stream.disposition = av.stream.Disposition.attached_pic
        picture = av.VideoFrame.from_ndarray(np.zeros((48, 64, 3), np.uint8), "rgb24")
        container.mux(stream.encode(picture))
        container.mux(stream.encode())
    with pytest.raises(OSError, match="holds no video stream"):
        video_rate(tmp_path / "a.mp4")


# --- files of annotation

class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        import os
        return os.system, (f"touch {self.path}",)


def test_a_pickle_that_calls_something_is_refused_and_not_executed(tmp_path):
    gttubes(tmp_path / "JHMDB-GT.pkl", extra=Malicious(tmp_path / "executed"))
    with pytest.raises(ValueError, match=r"JHMDB-GT.pkl .*names (posix|nt).system, which was not"):
        read_dataset("jhmdb", tmp_path, "val", False)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("name", ["builtins eval", "numpy load", "os system",
                                  "numpy.core.multiarray scalar.__class__"])
def test_a_pickle_may_name_nothing_but_arrays(tmp_path, name):
    (tmp_path / "JHMDB-GT.pkl").write_bytes(b"c" + name.replace(" ", "\n").encode() + b"\n.")
    with pytest.raises(ValueError, match="which was not executed"):
        read_dataset("jhmdb", tmp_path, "val", False)


@pytest.mark.parametrize("protocol", range(6))
def test_arrays_of_every_pickle_protocol_are_admitted(tmp_path, protocol):
    content = [np.float32([[1, 2], [3, 4]]), np.float64(2), {"b": (1, "x", b"y")}]
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(content, protocol=protocol))
    with open(tmp_path / "a.pkl", "rb") as file:
        array, scalar, plain = sources.PlainUnpickler(file, encoding="latin1").load()
    assert np.array_equal(array, content[0]) and scalar == 2 and plain == content[2]


@pytest.mark.parametrize("content", [b"", b"nonsense", pickle.dumps({"labels": []}),
                                     pickle.dumps([1])])
def test_a_damaged_or_foreign_pickle_is_an_error(tmp_path, content):
    (tmp_path / "JHMDB-GT.pkl").write_bytes(content)
    with pytest.raises(ValueError, match="JHMDB-GT.pkl is no annotation of numpy arrays"):
        read_dataset("jhmdb", tmp_path, "val", False)


def test_a_damaged_mat_file_is_an_error(ucf):
    content = (ucf / "finalAnnots.mat").read_bytes()
    for damaged in (b"", b"nonsense", content[:len(content) // 2]):
        (ucf / "finalAnnots.mat").write_bytes(damaged)
        with pytest.raises(ValueError, match="finalAnnots.mat cannot be read"):
            read_dataset("ucf", ucf, "val", False)


def test_a_tube_of_more_boxes_than_frames_is_an_error(ucf):
    content = sources.loadmat(ucf / "finalAnnots.mat")
    content["annot"][0, 0]["tubes"][0, 0]["ef"][:] += 1
    savemat(ucf / "finalAnnots.mat", {"annot": content["annot"]})
    with pytest.raises(ValueError, match="a tube of 11 frames has 10 boxes"):
        read_dataset("ucf", ucf, "val", False)


@pytest.mark.parametrize("name, message", [
    ("annotation.csv", "the nearest is annotation.csv; is it"),
    ("annotations.xlsx", r"annotations.xlsx: save it as CSV UTF-8 \(comma delimited\); is it")])
def test_a_file_of_a_name_that_is_nearly_right_is_named(own, name, message):
    (own / "annotations.csv").rename(own / name)
    with pytest.raises(FileNotFoundError, match=f"annotations.csv missing in .*{message}"):
        read_dataset("custom", own, "train", False)


def test_a_wrong_folder_or_argument_is_an_error(tmp_path, own):
    empty = tmp_path / "empty"
    empty.mkdir()
    for name, missing in (("ucf", "finalAnnots.mat or UCF101v2-GT.pkl"), ("jhmdb", "JHMDB-GT.pkl"),
                          ("ava", "ava_val_v2.2.csv"), ("custom", "annotations.csv")):
        with pytest.raises(FileNotFoundError, match=f"{missing} missing in .*--data"):
            read_dataset(name, empty, "val", True)
        with pytest.raises(FileNotFoundError, match="no such folder"):
            read_dataset(name, tmp_path / "nowhere", "val", True)
    for message, arguments in (
            ("there are synthetic, ucf, jhmdb, ava and custom", ("x", own, "val", True)),
            ('"train" and "val", not 1', ("custom", own, 1, True)),
            ("custom has one split, 1, not 2", ("custom", own, "val", True, 2)),
            ("not 'maybe'", ("custom", own, "val", True, 1, "maybe")),
            ("fill -1: it must be at least 0", ("custom", own, "val", False, 1, "error", -1)),
            ("0 with key frames", ("custom", own, "val", True, 1, "error", 5))):
        with pytest.raises(ValueError, match=message):
            read_dataset(*arguments)


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="threads are counted in /proc")
@pytest.mark.parametrize("suffix", [".mp4", ".avi"])
def test_reading_leaves_no_threads_that_forked_processes_would_wait_for(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    write_video(path, range(60))
    gc.collect()
    gc.disable()
    try:
        before = len(os.listdir("/proc/self/task"))
        list(video_frames(path))
        sources.frame_times(path)
        read_frames(path, np.array([3, 50]))
        read_frames(path, np.array([50]))
        assert len(os.listdir("/proc/self/task")) <= before
    finally:
        gc.enable()
