"""data.py: real annotations against FORMATS.md and the golden cases, boxes against planted pixels, faults by name."""

import colorsys
import pickle
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat

import data
from data import build_dataset, collate
from model import PRESETS

SHARED = Path(__file__).resolve().parents[2] / "shared"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason=f"the real data in {SHARED} is not there")
MINI = SHARED / "data/ucf24_mini"
UCF = replace(PRESETS["ucf"], frames=8, resize_size=64, crop_size=56, test_size=56)
KEY = replace(UCF, key_frame=True, sampling_rate=4)
STILL = replace(UCF, flip=0.0, jitter_hue=0, jitter_saturation=0)


@lru_cache
def real_set(name, split, train):
    """A real annotation without its frames."""
    folder = {"ucf": "ucf101_24"}.get(name, name)
    return build_dataset(name, SHARED / "data" / folder, split, PRESETS[name], train)


def pixels(clip):
    """A clip (3, T, H, W) back in 0..255 as (T, H, W, 3)."""
    return clip.permute(1, 2, 3, 0).numpy() * data.STD + data.MEAN


def grey_frames(folder, name, count, size=(64, 48)):
    """Frames whose grey level is 2 * (their number from 0): JPEG keeps a plain image's level."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        Image.new("RGB", size, (2 * i % 256,) * 3).save(folder / name.format(i + 1), quality=95)


def annots_mat(path, videos):
    """Writes {name: (num_imgs, [(sf, class id, boxes x y w h), ...])} in the layout of finalAnnots.mat."""
    fields = [("num_imgs", object), ("name", object), ("tubes", object)]
    annot = np.empty((1, len(videos)), fields)
    for i, (name, (count, tubes)) in enumerate(videos.items()):
        inner = np.empty((1, len(tubes)), [("ef", object), ("sf", object), ("class", object), ("boxes", object)])
        for j, (start, label, boxes) in enumerate(tubes):
            boxes = np.array(boxes)
            inner[0, j] = (np.array([[start + len(boxes) - 1]]), np.array([[start]]), np.array([[label]]), boxes)
        annot[0, i] = (np.array([[count]]), name, inner)
    savemat(path, {"annot": annot})


@pytest.fixture
def ucf(tmp_path):
    """A small UCF101-24: 20 frames of Biking/v_a stored at 64x48, a tube in frames 3 to 12 and one in 5 to 6."""
    grey_frames(tmp_path / "rgb-images/Biking/v_a", "{:05d}.jpg", 20)
    annots_mat(tmp_path / "finalAnnots.mat", {
        "Biking/v_a": (20, [(3, 3, np.uint8([[200, 100, 100, 60]] * 10)), (5, 3, np.uint8([[1, 1, 32, 24]] * 2))]),
        "Biking/v_b": (9, [(1, 3, np.uint8([[1, 1, 32, 24]] * 9))])})
    (tmp_path / "testlist01.txt").write_text("Biking/v_a\n")
    return tmp_path


def write_csv(path, rows):
    path.write_text("".join(",".join(map(str, row)) + "\n" for row in rows))


@pytest.fixture
def own(tmp_path):
    """A small data set of one's own: videos a (20 frames, training) and b (9 frames, validation)."""
    grey_frames(tmp_path / "frames/a", "{:05d}.jpg", 20)
    grey_frames(tmp_path / "frames/b", "{:05d}.jpg", 9)
    (tmp_path / "classes.txt").write_text("wave\njump high\n")
    (tmp_path / "val.txt").write_text("b\n")
    rows = [("a", f, .25, .25, .75, .5, 1, 7) for f in range(3, 9)]
    rows += [("a", f, .25, .25, .75, .5, 2, 7) for f in (3, 4, 8)]
    write_csv(tmp_path / "annotations.csv", rows + [("a", 3, 0, 0, .5, .5, 2, 9), ("b", 5, 0, 0, 1, 1, 1, 1), ("b", 7)])
    return tmp_path


@pytest.fixture
def ava(tmp_path):
    """A small AVA in SlowFast's layout: 100 frames of one video, key frames at 902 (frame 60) and 903, 904 excluded."""
    grey_frames(tmp_path / "frames/vid", "vid_{:06d}.jpg", 100)
    (tmp_path / "annotations").mkdir()
    write_csv(tmp_path / "annotations/ava_val_v2.2.csv", [
        ("vid", "0902", .1, .2, .5, .9, 12, 0), ("vid", "0902", .1, .2, .5, .9, 80, 0),
        ("vid", "0902", .5, .2, .9, .9, 12, 1), ("vid", "0903", .1, .2, .5, .9, 1, 0),
        ("vid", "0904", .1, .2, .5, .9, 1, 0)])
    write_csv(tmp_path / "annotations/ava_val_excluded_timestamps_v2.2.csv", [("vid", "0904")])
    (tmp_path / "annotations/ava_action_list_v2.2_for_activitynet_2019.pbtxt").write_text(
        'item {\n  name: "stand"\n  id: 12\n}\nitem {\n  name: "watch (a person)"\n  id: 80\n}\n')
    return tmp_path


# --- annotations

@needs_shared
@pytest.mark.parametrize("train, videos, tubes, boxes, frames, annotated", [
    (True, 2284, 3143, 403282, 395868, 340336), (False, 910, 1315, 170580, 159289, 138527)])
def test_ucf_has_the_published_counts(train, videos, tubes, boxes, frames, annotated):
    dataset = real_set("ucf", 1, train)
    truth, truth_tubes = dataset.ground_truth()
    assert (len(dataset.videos), len(truth_tubes), len(truth["box"])) == (videos, tubes, boxes)
    assert (dataset.table.num_frames.sum(), len(np.unique(truth["frame"]))) == (frames, annotated)
    assert dataset.class_names[23] == "WalkingWithDog"


@needs_shared
@pytest.mark.parametrize("split, train, test", [(1, (660, 22713), (268, 9139)), (2, (658, 22895), (270, 8957)),
                                                (3, (663, 22807), (265, 9045))])
def test_jhmdb_has_the_published_counts(split, train, test):
    for is_train, counts in ((True, train), (False, test)):
        dataset = real_set("jhmdb", split, is_train)
        truth, tubes = dataset.ground_truth()
        assert (len(dataset.videos), len(truth["box"])) == counts
        assert len(tubes) == len(dataset) == len(dataset.videos)


@needs_shared
@pytest.mark.parametrize("name, golden", [("ucf", "ucf24"), ("jhmdb", "jhmdb")])
def test_ground_truth_is_that_of_the_golden_cases(name, golden):
    dataset = real_set(name, 1, False)
    case = np.load(SHARED / f"golden/eval/{golden}_frames.npz")
    assert dataset.class_names == case["labels"].tolist()
    expected = set()
    for i, (first, last) in enumerate(zip(case["gt_tube_offset"], case["gt_tube_offset"][1:])):
        video = str(case["video_names"][case["gt_tube_video"][i]])
        label, start = int(case["gt_tube_class"][i]), int(case["gt_tube_start"][i])
        expected.add((video, label, start, case["gt_box"][first:last].tobytes()))
    known, tubes = set(case["video_names"].tolist()), dataset.ground_truth()[1]
    got = {(dataset.videos[t["video"]], t["label"], int(t["frames"][0]), t["boxes"].tobytes()) for t in tubes}
    assert {tube for tube in got if tube[0] in known} == expected


@needs_shared
@pytest.mark.parametrize("name, splits, total", [("ucf", [1], 3194), ("jhmdb", [1, 2, 3], 928)])
def test_clips_tile_every_real_video_exactly_once(name, splits, total):
    seen = set()
    for split, train in [(split, train) for split in splits for train in (True, False)]:
        dataset = real_set(name, split, train)
        length = dataset.config.frames
        slots = dataset.clip_first[:, None] + np.arange(length)                    # (K, T)
        count = dataset.table.num_frames[dataset.clip_videos][:, None]
        real = (slots >= 0) & (slots < count)
        keys = (dataset.clip_videos[:, None] * data.VIDEO_KEY + slots)[real]
        wanted = np.concatenate([v * data.VIDEO_KEY + np.arange(n) for v, n in enumerate(dataset.table.num_frames)])
        assert np.array_equal(np.sort(keys), wanted)
        assert np.array_equal(np.bincount(dataset.clip_videos), -(-dataset.table.num_frames // length))
        seen |= set(dataset.videos)
    assert len(seen) == total


def test_tiles_are_disjoint_complete_and_evenly_padded():
    random = np.random.default_rng(0)
    for _ in range(300):
        count, frames, rate = (int(random.integers(1, most)) for most in (200, 40, 5))
        first = data.tile(count, frames, rate)
        slots = (first[:, None] + np.arange(frames) * rate).reshape(-1)
        assert sorted(s for s in slots if 0 <= s < count) == list(range(count))
        if rate == 1:
            front, back = -first[0], first[-1] + frames - count
            assert len(first) == -(-count // frames) and 0 <= back - front <= 1
    assert data.tile(33, 32).tolist() == [-15, 17]


def test_boxes_of_uint8_do_not_overflow_and_stay_unshifted(ucf):
    dataset = build_dataset("ucf", ucf, "val", UCF)
    frames, tubes = dataset.ground_truth()
    assert frames["box"].max(axis=0).tolist() == [200, 100, 300, 160] and len(tubes) == 2
    assert [tube["label"] for tube in tubes] == [2, 2] and dataset.class_names[2] == "Biking"


def test_training_videos_are_those_not_in_the_test_list_where_there_is_no_training_list(ucf):
    assert build_dataset("ucf", ucf, "train", UCF).videos == ["Biking/v_b"]
    (ucf / "trainlist01.txt").write_text("Biking/v_a.avi 3\n")
    assert build_dataset("ucf", ucf, "train", UCF).videos == ["Biking/v_a"]


def test_listed_videos_without_annotation_are_counted_aloud(ucf, capsys):
    (ucf / "testlist01.txt").write_text("Biking/v_a\nDiving/v_x\n")
    assert build_dataset("ucf", ucf, "val", UCF).videos == ["Biking/v_a"]
    assert "1 of the 2 listed videos not annotated and left out" in capsys.readouterr().out


def gttubes(path, **changes):
    tube = np.float32([[f, 10, 20, 110, 120] for f in range(1, 9)])
    content = {"labels": ["catch", "clap"],
               "gttubes": {"clap/v": {1: [tube]}, "catch/w": {0: [tube, tube + [0, 5, 5, 5, 5]]}},
               "nframes": {"clap/v": 8, "catch/w": 8}, "resolution": {"clap/v": (240, 320), "catch/w": (240, 320)},
               "train_videos": [["clap/v"], ["catch/w"]], "test_videos": [["catch/w"], ["clap/v"]]}
    path.write_bytes(pickle.dumps({**content, **changes}, protocol=2))


@pytest.mark.parametrize("name, file", [("jhmdb", "JHMDB-GT.pkl"), ("ucf", "UCF101v2-GT.pkl")])
def test_gttubes_pickles_are_read_for_jhmdb_and_ucf(tmp_path, name, file):
    gttubes(tmp_path / file)
    dataset = build_dataset(name, tmp_path, "val", UCF)
    tubes = dataset.ground_truth()[1]
    assert dataset.videos == ["catch/w"] and [t["label"] for t in tubes] == [0, 0]
    assert tubes[1]["boxes"][0].tolist() == [15, 25, 115, 125] and tubes[1]["frames"].tolist() == list(range(1, 9))
    assert build_dataset(name, tmp_path, "val", UCF, 2).videos == ["clap/v"]
    with pytest.raises(ValueError, match="splits 1 to 2, not 3"):
        build_dataset(name, tmp_path, "val", UCF, 3)


def test_ava_key_frame_clips(ava):
    dataset = build_dataset("ava", ava, "val", KEY)
    assert len(dataset) == 2 and dataset.class_names[11] == "stand" and dataset.class_names[0] == "action 1"
    clip, target = dataset[0]
    assert pixels(clip)[:, 0, 0, 0].round().tolist() == [2 * (60 + (i - 4) * 4) for i in range(8)]
    assert target["boxes"].shape == (2, 1, 4)
    assert target["frame_ids"].tolist() == [902] and target["frames"].tolist() == [True]
    assert torch.allclose(target["boxes"][0, 0], torch.tensor([.3, .55, .4, .7]), atol=1e-6)
    assert target["labels"].shape == (2, 1, 80) and target["labels"][0, 0].nonzero().flatten().tolist() == [11, 79]
    assert target["size"].tolist() == [48, 64]
    clip, target = dataset[1]                                                      # frame 90: the end is clamped
    assert pixels(clip)[:, 0, 0, 0].round().tolist() == [2 * min(90 + (i - 4) * 4, 99) for i in range(8)]
    assert dataset.ground_truth()[1] == [] and dataset.ground_truth()[0]["frame"].tolist() == [902, 902, 902, 903]


def test_ava_in_mmaction2_layout_gives_the_same_clips(ava, capsys):
    first = build_dataset("ava", ava, "val", KEY)[0][0]
    (ava / "rawframes").mkdir()
    (ava / "frames/vid").rename(ava / "rawframes/vid")
    for path in (ava / "rawframes/vid").iterdir():
        path.rename(path.with_name(f"img_{int(path.stem[-6:]):05d}.jpg"))
    assert torch.equal(build_dataset("ava", ava, "val", KEY)[0][0], first)
    assert "rawframes/<video>/img_{:05d}.jpg" in capsys.readouterr().out


def test_ava_without_key_frames_is_an_error(ava):
    with pytest.raises(ValueError, match="key_frame=true"):
        build_dataset("ava", ava, "val", UCF)


def test_own_data_at_every_frame(own):
    dataset = build_dataset("custom", own, "train", UCF)
    tubes = dataset.ground_truth()[1]
    runs = [(0, [3, 4, 5, 6, 7, 8]), (1, [3, 4]), (1, [8]), (1, [3])]
    assert [(t["label"], t["frames"].tolist()) for t in tubes] == runs
    assert tubes[0]["boxes"][0].tolist() == [16, 12, 48, 24] and dataset.class_names == ["wave", "jump high"]
    _, target = dataset[0]                                                         # 20 frames in clips of 8: from -2 on
    assert target["frame_ids"].tolist() == [1, 1, 1, 2, 3, 4, 5, 6]
    assert target["frames"].tolist() == [False] * 2 + [True] * 6
    assert target["present"].tolist() == [[False] * 4 + [True] * 4, [False] * 4 + [True] + [False] * 3]
    assert target["labels"][0].tolist() == [[0, 0]] * 4 + [[1, 1]] * 2 + [[1, 0]] * 2


def test_own_data_at_key_frames_with_a_frame_that_is_empty(own):
    dataset = build_dataset("custom", own, "val", KEY)
    assert [dataset[i][1]["frame_ids"].tolist() for i in range(len(dataset))] == [[5], [7]]
    assert dataset[1][1]["boxes"].shape == (0, 1, 4)
    assert pixels(dataset[0][0])[:, 0, 0, 0].round().tolist() == [2 * min(max(4 + (i - 4) * 4, 0), 8) for i in range(8)]


# --- clips

def test_a_sampling_rate_takes_every_nth_frame_with_its_own_boxes(ucf):
    dataset = build_dataset("ucf", ucf, "val", replace(UCF, sampling_rate=2))   # 20 frames in 32 slots: from -6 on
    assert len(dataset) == 4
    clip, target = dataset[1]
    assert target["frame_ids"].tolist() == [1, 1, 1, 2, 4, 6, 8, 10]
    assert target["frames"].tolist() == [False] * 3 + [True] * 5
    assert pixels(clip)[3:, 5, 5, 1].round().tolist() == [2, 6, 10, 14, 18]
    assert target["present"].tolist() == [[False] * 4 + [True] * 4, [False] * 5 + [True] + [False] * 2]
    targets = [dataset[i][1] for i in range(4)]
    assert sorted(torch.cat([t["frame_ids"][t["frames"]] for t in targets]).tolist()) == [*range(1, 21)]
    assert sum(int(t["present"].sum()) for t in targets) == 12


def test_padding_repeats_the_ends_and_counts_nowhere(ucf):
    dataset = build_dataset("ucf", ucf, "val", UCF)
    (first, start), _, (last, end) = (dataset[i] for i in range(3))                # 2 slots in front, 2 behind
    assert pixels(first)[:, 5, 5, 1].round().tolist() == [0, 0, 0, 2, 4, 6, 8, 10]
    assert pixels(last)[:, 5, 5, 1].round().tolist() == [28, 30, 32, 34, 36, 38, 38, 38]
    assert start["frames"].tolist() == [False] * 2 + [True] * 6 and end["frames"].tolist() == [True] * 6 + [False] * 2
    assert start["present"].tolist() == [[False] * 4 + [True] * 4, [False] * 6 + [True] * 2]
    assert end["boxes"].shape == (0, 8, 4) and end["labels"].shape == (0, 8, 24)
    assert start["size"].tolist() == [240, 320] and start["video"] == "Biking/v_a"


def test_a_video_shorter_than_a_clip_is_padded_at_both_ends(tmp_path):
    grey_frames(tmp_path / "Frames/clap/v", "{:05d}.png", 3)
    gttubes(tmp_path / "JHMDB-GT.pkl", nframes={"clap/v": 3, "catch/w": 8},
            gttubes={"clap/v": {1: [np.float32([[f, 10, 20, 110, 120] for f in (1, 2, 3)])]}})
    clip, target = build_dataset("jhmdb", tmp_path, "val", UCF, 2)[0]
    assert pixels(clip)[:, 0, 0, 0].round().tolist() == [0, 0, 0, 2, 4, 4, 4, 4]
    assert target["frames"].tolist() == [False] * 2 + [True] * 3 + [False] * 3


def test_frames_of_another_size_are_stretched_to_the_annotations(tmp_path):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (256, 340, 3), dtype=np.uint8))
    clip = data.render([image], data.draw_view((240, 320), PRESETS["ucf"], False))
    expected = np.asarray(image.resize((298, 224), Image.Resampling.BICUBIC))
    assert clip.shape == (3, 1, 224, 298) and np.abs(pixels(clip)[0] - expected).max() < 1e-3


@pytest.mark.parametrize("size, short, expected", [((240, 320), 224, (298, 224)), ((240, 320), 256, (341, 256)),
                                                   ((320, 240), 224, (224, 298)), ((100, 100), 56, (56, 56))])
def test_the_long_side_is_rounded_down(size, short, expected):
    assert data.fit(size, short) == expected


def test_a_crop_has_the_pixels_of_the_resized_frames_crop():
    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (240, 320, 3), dtype=np.uint8))
    view = data.View((341, 256), (20, 32, 298, 224))
    expected = np.asarray(image.resize((341, 256), Image.Resampling.BICUBIC))[32:256, 20:318]
    difference = np.abs(pixels(data.render([image], view))[0] - expected)
    assert difference.max() < 1.01 and difference.mean() < 0.01                    # rounding of the eight bits between


def test_boxes_follow_the_pixels_through_crop_and_flip():
    """A white rectangle in a frame is found again where its box says, whatever the draw."""
    random, config = np.random.default_rng(2), replace(PRESETS["ucf"], jitter_hue=0, jitter_saturation=0)
    torch.manual_seed(0)
    flips = 0
    for _ in range(25):
        x, y = random.integers(0, 200), random.integers(0, 140)
        box = np.float32([[x, y, x + random.integers(40, 120), y + random.integers(40, 100)]])
        frame = np.zeros((240, 320, 3), np.uint8)
        frame[int(box[0, 1]):int(box[0, 3]), int(box[0, 0]):int(box[0, 2])] = 255
        view = data.draw_view((240, 320), config, True)
        flips += view.flip
        assert view.resized == (341, 256) and view.crop[2:] == (298, 224)
        bright = pixels(data.render([Image.fromarray(frame)], view))[0, :, :, 0] > 128
        (cx, cy, w, h), visible = (part[0] for part in data.view_boxes(box, np.array([240, 320]), view))
        rows, columns = np.flatnonzero(bright.any(axis=1)), np.flatnonzero(bright.any(axis=0))
        assert bright.any() == bool(visible)
        if visible:
            found = np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])
            expected = np.array([cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2]) * [298, 224, 298, 224]
            assert np.abs(found - expected).max() < 1.1
    assert 5 < flips < 20


def test_an_actor_that_the_crop_leaves_nothing_of_is_not_present(ucf):
    dataset = build_dataset("ucf", ucf, "val", STILL)
    left = data.View((85, 64), (0, 0, 40, 56))                                     # the tube lies right of x = 53
    target = dataset.target(0, np.arange(1, 9), np.ones(8, bool), left)
    assert target["boxes"].shape == (1, 8, 4) and target["present"].sum(dim=1).tolist() == [2]
    sliver = data.View((85, 64), (0, 0, 54, 56))                                   # 0.9 of a pixel of it
    assert dataset.target(0, np.arange(1, 9), np.ones(8, bool), sliver)["boxes"].shape[0] == 1
    more = data.View((85, 64), (0, 0, 55, 56))
    assert dataset.target(0, np.arange(1, 9), np.ones(8, bool), more)["boxes"].shape[0] == 2


@pytest.mark.parametrize("shift", [(10, 0, 0), (-7, 128, -40), (0, -300, 0), (3, 20, 128), (0, 0, 0)])
def test_jitter_is_that_of_hsv(shift):
    frame = np.random.default_rng(3).integers(0, 256, (3, 12, 13)).astype(np.float32)
    frame[:, 0] = frame[:1, 0]                                                     # greys, among them
    frame[:, 0, 0], frame[:, 1, 1] = 0, 255
    expected = np.empty_like(frame)
    for row, column in np.ndindex(12, 13):
        h, s, v = colorsys.rgb_to_hsv(*(frame[:, row, column] / 255))
        s, v = min(max(s + shift[1] / 255, 0), 1), min(max(v + shift[2] / 255, 0), 1)
        expected[:, row, column] = np.array(colorsys.hsv_to_rgb((h + shift[0] / 180) % 1, s, v)) * 255
    data.jitter_colours(frame, shift)
    assert np.abs(frame - expected).max() < 2e-3


def test_draws_are_uniform_within_their_ranges_and_follow_torchs_seed():
    config = replace(PRESETS["ucf"], permute_colours=True)
    torch.manual_seed(1)
    views = [data.draw_view((240, 320), config, True) for _ in range(600)]
    torch.manual_seed(1)
    assert views[:20] == [data.draw_view((240, 320), config, True) for _ in range(20)]
    for values, low, high in ((zip(*(v.jitter for v in views)), (-10, -128, -128), (10, 128, 128)),
                              (zip(*(v.crop[:2] for v in views)), (0, 0), (43, 32))):
        for drawn, least, most in zip(values, low, high):
            counts = np.histogram(drawn, 4, (least, most + 1))[0] / len(views)
            assert min(drawn) >= least and max(drawn) <= most and np.abs(counts - 0.25).max() < 0.08
            if most < 20:
                assert set(drawn) == set(range(least, most + 1))
    assert {v.channels for v in views} > {(0, 1, 2), (2, 1, 0), (1, 0, 2)}


def test_augmentation_is_drawn_once_per_clip(ucf):
    (ucf / "trainlist01.txt").write_text("Biking/v_a\n")
    for path in (ucf / "rgb-images/Biking/v_a").iterdir():
        Image.linear_gradient("L").resize((64, 48)).convert("RGB").save(path)
    dataset = build_dataset("ucf", ucf, "train", UCF)
    torch.manual_seed(0)
    clip, other = dataset[0][0], dataset[0][0]
    assert torch.equal(clip, clip[:, :1].expand_as(clip)) and not torch.equal(clip, other)


def test_normalisation_is_imagenets():
    clip = data.render([Image.new("RGB", (320, 240), (0, 128, 255))], data.draw_view((240, 320), PRESETS["ucf"], False))
    expected = (torch.tensor([0, 128, 255]) / 255 - torch.tensor([.485, .456, .406])) / torch.tensor([.229, .224, .225])
    assert torch.allclose(clip[:, 0, 0, 0], expected, atol=1e-5)


def test_channels_are_permuted_as_drawn():
    image, plain = Image.new("RGB", (320, 240), (10, 20, 30)), data.View((298, 224), (0, 0, 298, 224))
    shuffled = data.render([image], replace(plain, channels=(2, 0, 1)))
    assert pixels(shuffled)[0, 0, 0].round().tolist() == [30, 10, 20]


def test_a_large_jpeg_is_decoded_at_a_fraction_that_still_exceeds_the_need(tmp_path):
    x, y = np.meshgrid(np.arange(1600), np.arange(1200))
    waves = np.stack([x // 8 % 256, y // 8 % 256, (x + y) // 16 % 256], axis=2).astype(np.uint8)
    Image.fromarray(waves).save(tmp_path / "a.jpg", quality=95)
    small, whole = data.read_image(tmp_path / "a.jpg", 1, (298, 224)), data.read_image(tmp_path / "a.jpg", 1)
    assert whole.size == (1600, 1200) and small.size == (800, 600)
    view = data.View((298, 224), (0, 0, 298, 224))
    assert np.abs(pixels(data.render([small], view)) - pixels(data.render([whole], view))).mean() < 2


def test_collate_pads_to_the_largest_and_masks():
    batch = [(torch.ones(3, 2, 4, 6), {"video": "a"}), (torch.ones(3, 2, 5, 3), {"video": "b"})]
    clips, mask, targets = collate(batch)
    assert clips.shape == (2, 3, 2, 5, 6) and mask.shape == (2, 5, 6) and [t["video"] for t in targets] == ["a", "b"]
    assert torch.equal(clips[:, 0, 0], (~mask).float()) and (~mask).sum(dim=(1, 2)).tolist() == [24, 15]


@needs_shared
def test_real_clips_have_the_documented_form():
    dataset = build_dataset("ucf", MINI, "val", PRESETS["ucf"])
    assert len(dataset) == 6 + 5 + 6 + 4 + 6
    clip, target = dataset[21]                                                     # SalsaSpin, several actors
    actors = len(target["boxes"])
    assert clip.shape == (3, 32, 224, 298) and clip.dtype == torch.float32 and actors > 1
    kinds = {key: (tuple(value.shape), value.dtype) for key, value in target.items() if key != "video"}
    assert kinds == {"boxes": ((actors, 32, 4), torch.float32), "present": ((actors, 32), torch.bool),
                     "labels": ((actors, 32, 24), torch.float32), "frames": ((32,), torch.bool),
                     "frame_ids": ((32,), torch.int64), "size": ((2,), torch.int64)}
    assert torch.equal(target["labels"].sum(dim=2) > 0, target["present"])
    truth = dataset.ground_truth()[0]
    video, frame = dataset.videos.index(target["video"]), int(target["frame_ids"][20])
    boxes = truth["box"][truth["frame"] == video * data.VIDEO_KEY + frame]
    cx, cy, w, h = (target["boxes"][target["present"][:, 20], 20] * torch.tensor([320, 240, 320, 240])).T
    mine = torch.stack([cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2], dim=1).numpy()
    assert np.abs(np.sort(mine, axis=0) - np.sort(boxes, axis=0)).max() < 1e-4


@needs_shared
def test_videos_give_the_clips_of_the_frames_up_to_codec_and_resizing(tmp_path):
    for name in ("finalAnnots.mat", "testlist01.txt", "videos"):
        (tmp_path / name).symlink_to(MINI / name)
    config = replace(PRESETS["ucf"], frames=8)
    frames, videos = (build_dataset("ucf", root, "val", config) for root in (MINI, tmp_path))
    for i in (0, 30, len(frames) - 1):                                             # a first, a middle, a last clip
        (a, _), (b, _) = frames[i], videos[i]
        difference = np.abs(pixels(a) - pixels(b))
        shifted = np.abs(pixels(a)[1:] - pixels(b)[:-1])
        assert difference.mean() < 4 and difference.mean() < shifted.mean()


def write_video(path, count, codec, rate=25, **options):
    """A video whose frames show their number from 0 as eight black or white bars."""
    import av
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate, options={key: str(value) for key, value in options.items()})
        stream.width, stream.height = 64, 48
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        for i in range(count):
            bars = np.repeat(np.uint8(i >> np.arange(8) & 1) * np.uint8(255), 8)     # (64,)
            picture = np.ascontiguousarray(np.broadcast_to(bars[:, None], (48, 64, 3)))
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())


def numbers_shown(images):
    bars = np.stack([np.asarray(image)[24, 4::8, 1] > 128 for image in images])    # (frames, 8)
    return (bars << np.arange(8)).sum(axis=1).tolist()


@pytest.mark.parametrize("name, codec, options", [
    ("v_a.avi", "mpeg4", {"g": 7, "bf": 2}), ("v_a.avi", "mpeg4", {"g": 250, "bf": 0}), ("v_a.avi", "mjpeg", {}),
    ("v_a.mp4", "mpeg4", {"g": 9, "bf": 3}), ("v_a.mkv", "mpeg4", {"g": 100, "bf": 2})])
def test_frames_of_a_video_file_are_counted_in_the_order_shown(tmp_path, name, codec, options):
    write_video(tmp_path / name, 150, codec, **options)
    assert len(data.frame_stamps(tmp_path / name)) == 150
    for index in ([0], range(5), range(60, 75), [149], [31, 32, 33, 90], range(0, 150, 7)):
        assert numbers_shown(data.decode(tmp_path / name, np.array(index))) == list(index)
    with pytest.raises(OSError, match=f"{name} has 150 frames, frame 151 is annotated"):
        data.decode(tmp_path / name, np.array([149, 150]))


def test_ava_frames_are_taken_from_videos_by_time(ava, tmp_path):
    (ava / "frames").rename(ava / "hidden")
    write_video(ava / "vid.mp4", 40, "mpeg4", g=10)                                # 25 a second: 1.6 seconds
    write_csv(ava / "annotations/ava_val_v2.2.csv", [("vid", "0902", .1, .2, .5, .9, 12, 0)])
    dataset = build_dataset("ava", ava, "val", replace(KEY, sampling_rate=1))
    assert dataset.table.num_frames.tolist() == [int(39 / 25 * 30) + 1]
    clip, _ = dataset[0]                                                           # 56 to 63: clamped to the last
    pictures = pixels(clip).round().clip(0, 255).astype(np.uint8)
    assert numbers_shown(Image.fromarray(picture).resize((64, 48)) for picture in pictures) == [38] * 8
    index = np.arange(0, 46, 5)
    shown = numbers_shown(dataset.media.read("vid", index))
    assert np.abs(shown - index / 30 * 25).max() <= 0.5


def test_ava_frames_of_a_whole_film_begin_at_its_900th_second(tmp_path):
    write_video(tmp_path / "film.mp4", 1000, "mpeg4", rate=1)
    stamps = data.frame_stamps(tmp_path / "film.mp4", 30)
    assert len(stamps) == 99 * 30 + 1
    index = np.array([0, 16, 30, 31, 2970])
    assert numbers_shown(data.decode(tmp_path / "film.mp4", index, 30)) == [n % 256 for n in (900, 901, 901, 901, 999)]


# --- faults: each is one clear error

def test_a_missing_frame_is_named_with_the_way_out(ucf):
    (ucf / "rgb-images/Biking/v_a/00009.jpg").unlink()
    dataset = build_dataset("ucf", ucf, "val", UCF)
    dataset[0]
    message = r"frames missing: .*v_a/00009.jpg \(20 expected, 19 found\); extract them with python -m tools.prepare"
    with pytest.raises(FileNotFoundError, match=message):
        dataset[1]


def test_a_truncated_jpeg_is_named(ucf):
    path = ucf / "rgb-images/Biking/v_a/00009.jpg"
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(OSError, match="cannot read the image .*v_a/00009.jpg: .*extract it again"):
        build_dataset("ucf", ucf, "val", UCF)[1]


def test_a_video_of_zero_frames_is_named(ucf, own):
    annots_mat(ucf / "finalAnnots.mat", {"Biking/v_a": (0, [(1, 3, np.uint8([[1, 1, 9, 9]]))])})
    with pytest.raises(ValueError, match="Biking/v_a: the video has no frames"):
        build_dataset("ucf", ucf, "val", UCF)


@pytest.mark.parametrize("row, message", [
    (("a", 3, .1, .1, .2, .2, 1, 7, .5, 0, 0), "row 14: 11 columns, not 8"),
    (("a", 3, .1, .1, .2, .2, 1), "row 14: 7 columns, not 8"),
    (("a", 3, .1, .1, .2, .2, 3, 8), "a frame 3: .* class 3, has a class id that is not in the class list"),
    (("a", 3, .1, .1, .2, .2, 0, 8), "class 0, has a class id that is not"),
    (("a", 3, .3, .1, .2, .2, 1, 8), "has x2 <= x1"),
    (("a", 3, .1, "nan", .2, .2, 1, 8), "has a coordinate that is not a number"),
    (("a", 3, .1, .1, 1.2, .2, 1, 8), "lies outside of the frame .of 64x48"),
    (("a", 21, .1, .1, .2, .2, 1, 8), "is of a frame that is not in the video .*20 frames"),
    (("a", 0, .1, .1, .2, .2, 1, 8), "is of a frame that is not in the video"),
    (("a", 3, .1, .1, .2, .2, 1, 7), "a frame 3: person 7 has two boxes"),
    (("a", "x", .1, .1, .2, .2, 1, 8), "row 14: could not convert string to float: 'x'"),
    (("a", 3.5, .1, .1, .2, .2, 1, 8), "row 14: frame '3.5' is no whole number"),
])
def test_a_faulty_csv_row_is_named(own, row, message):
    with (own / "annotations.csv").open("a") as file:
        file.write("\n" + ",".join(map(str, row)) + "\n")
    with pytest.raises(ValueError, match=message):
        build_dataset("custom", own, "train", UCF)


def test_a_faulty_tube_is_named(ucf):
    boxes = np.int16([[10, 10, 20, 20], [310, 10, 40, 20], [10, 10, -5, 20]])
    annots_mat(ucf / "finalAnnots.mat", {"Biking/v_a": (20, [(19, 25, boxes)])})
    with pytest.raises(ValueError) as error:
        build_dataset("ucf", ucf, "val", UCF)
    for part in ("7 faults", "frame 20: box [310.0, 10.0, 350.0, 30.0]", "x2 <= x1", "frame 21", "not in the video"):
        assert part in str(error.value)


def test_an_empty_annotation_is_an_error(own, ucf):
    write_csv(own / "annotations.csv", [("b", 7)])
    with pytest.raises(ValueError, match="has no boxes"):
        build_dataset("custom", own, "val", UCF)
    annots_mat(ucf / "finalAnnots.mat", {"Biking/v_a": (20, [])})
    with pytest.raises(ValueError, match="has no boxes"):
        build_dataset("ucf", ucf, "val", UCF)


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        import os
        return os.system, (f"touch {self.path}",)


def test_a_pickle_that_calls_something_is_refused_and_not_executed(tmp_path):
    gttubes(tmp_path / "JHMDB-GT.pkl", extra=Malicious(tmp_path / "executed"))
    with pytest.raises(ValueError, match=r"JHMDB-GT.pkl .*names (posix|nt).system, which was not executed"):
        build_dataset("jhmdb", tmp_path, "val", UCF)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("name", ["builtins eval", "numpy load", "numpy.core.multiarray scalar.__class__", "os system"])
def test_a_pickle_may_name_nothing_but_arrays(tmp_path, name):
    (tmp_path / "JHMDB-GT.pkl").write_bytes(b"c" + name.replace(" ", "\n").encode() + b"\n.")
    with pytest.raises(ValueError, match="which was not executed"):
        build_dataset("jhmdb", tmp_path, "val", UCF)


@pytest.mark.parametrize("protocol", range(6))
def test_arrays_of_every_pickle_protocol_are_admitted(tmp_path, protocol):
    array = np.float32([[1, 2], [3, 4]])
    (tmp_path / "a.pkl").write_bytes(pickle.dumps([array, np.float64(2), {"b": (1, "x", b"y")}], protocol=protocol))
    with open(tmp_path / "a.pkl", "rb") as file:
        loaded = data.PlainUnpickler(file, encoding="latin1").load()
    assert np.array_equal(loaded[0], array) and loaded[1] == 2 and loaded[2] == {"b": (1, "x", b"y")}


@pytest.mark.parametrize("content", [b"", b"nonsense", pickle.dumps({"labels": []}), pickle.dumps([1])])
def test_a_damaged_or_foreign_pickle_is_an_error(tmp_path, content):
    (tmp_path / "JHMDB-GT.pkl").write_bytes(content)
    with pytest.raises(ValueError, match="JHMDB-GT.pkl is no annotation of numpy arrays"):
        build_dataset("jhmdb", tmp_path, "val", UCF)


def test_a_damaged_mat_file_is_an_error(ucf):
    content = (ucf / "finalAnnots.mat").read_bytes()
    for damaged in (b"", b"nonsense", content[:len(content) // 2]):
        (ucf / "finalAnnots.mat").write_bytes(damaged)
        with pytest.raises(ValueError, match="finalAnnots.mat cannot be read"):
            build_dataset("ucf", ucf, "val", UCF)


def test_a_wrong_folder_is_an_error(tmp_path):
    for name, missing in (("ucf", "finalAnnots.mat or UCF101v2-GT.pkl"), ("jhmdb", "JHMDB-GT.pkl"),
                          ("ava", "ava_val_v2.2.csv"), ("custom", "annotations.csv")):
        split = 1 if name in ("ucf", "jhmdb") else "val"
        with pytest.raises(FileNotFoundError, match=f"{missing} missing in .*--data"):
            build_dataset(name, tmp_path, split, KEY, False)
        with pytest.raises(FileNotFoundError, match="no such folder"):
            build_dataset(name, tmp_path / "nowhere", split, KEY, False)
    with pytest.raises(ValueError, match="there are synthetic, ucf, jhmdb, ava and custom"):
        build_dataset("kinetics", tmp_path, "val", UCF)
    with pytest.raises(ValueError, match='"train" and "val", not 1'):
        build_dataset("custom", tmp_path, "val", UCF)


def test_an_annotation_without_pixels_can_be_scored_but_not_read(ucf, capsys):
    (ucf / "rgb-images").rename(ucf / "hidden")
    dataset = build_dataset("ucf", ucf, "val", UCF)
    assert len(dataset.ground_truth()[1]) == 2 and "NO frames or videos" in capsys.readouterr().out
    with pytest.raises(FileNotFoundError, match="no frames and no video file of Biking/v_a"):
        dataset[0]


@pytest.mark.parametrize("keep", [0, 2000])
def test_a_damaged_video_is_named(ucf, keep):
    (ucf / "rgb-images").rename(ucf / "hidden")
    write_video(ucf / "v_a.avi", 20, "mpeg4", g=5)
    (ucf / "v_a.avi").write_bytes((ucf / "v_a.avi").read_bytes()[:keep])
    with pytest.raises(OSError, match="v_a.avi"):
        build_dataset("ucf", ucf, "val", UCF)[2]


def test_a_validation_video_that_is_not_in_the_csv_is_an_error(own):
    (own / "val.txt").write_text("b\nc d\n")
    with pytest.raises(ValueError, match="val.txt: c d is not in"):
        build_dataset("custom", own, "val", UCF)


def test_the_worked_example_of_the_documentation_runs(tmp_path, monkeypatch):
    text = (Path(data.__file__).parent / "docs/own_data.md").read_text()
    rows = [line.split(",") for line in text.split("```csv\n")[1].split("```")[0].splitlines()]
    write_csv(tmp_path / "annotations.csv", rows)
    for video in {row[0] for row in rows}:
        grey_frames(tmp_path / "frames" / video, "{:05d}.jpg", 40)
    (tmp_path / "classes.txt").write_text(text.split("```classes\n")[1].split("```")[0])
    (tmp_path / "val.txt").write_text(text.split("```val\n")[1].split("```")[0])
    for split in ("train", "val"):
        for config in (UCF, KEY):
            dataset = build_dataset("custom", tmp_path, split, config, split == "train")
            assert sum(len(dataset[i][1]["boxes"]) for i in range(len(dataset))) > 0
