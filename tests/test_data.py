"""data.py: clips and targets against planted pixels and boxes, ground truth of golden cases."""
# T frames, N actors, C classes, K clips

import colorsys
from dataclasses import replace
from functools import lru_cache

import numpy as np
import pytest
import torch
from conftest import shared
from PIL import Image

import data
from backbone import normalise
from data import build_dataset, collate
from model import PRESETS
from tests.small_sets import grey_frames, gttubes, small_ava, small_own, small_ucf

UCF = replace(PRESETS["ucf"], frames=8, resize_size=64, crop_size=56, test_size=56)
KEY = replace(UCF, key_frame=True, sampling_rate=4)
STILL = replace(UCF, flip=0.0, jitter_hue=0, jitter_saturation=0)


@lru_cache
def real_set(name, side, fold=1):
    """A real annotation without its frames."""
    folder = shared("data", {"ucf": "ucf101_24"}.get(name, name))
    return build_dataset(name, folder, side, PRESETS[name], fold)


def levels(clip, y=0, x=0):
    """The grey level of each frame of a clip at a pixel."""
    return clip[1, :, y, x].tolist()


def noise(seed, height=240, width=320):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


# ---- which frames a clip has ----

def test_tiles_are_disjoint_complete_and_evenly_padded():
    random = np.random.default_rng(0)
    for _ in range(300):
        count, frames, stride = (int(random.integers(1, most)) for most in (200, 40, 5))
        first = data.tile(count, frames, stride)
        slots = (first[:, None] + np.arange(frames) * stride).reshape(-1)
        assert sorted(s for s in slots if 0 <= s < count) == list(range(count))
        if stride == 1:
            front, back = -first[0], first[-1] + frames - count
            assert len(first) == -(-count // frames) and 0 <= back - front <= 1
    assert data.tile(33, 32).tolist() == [-15, 17]


@pytest.mark.parametrize("name, folds, total", [("ucf", [1], 3194), ("jhmdb", [1, 2, 3], 928)])
def test_clips_tile_every_real_video_exactly_once(name, folds, total):
    seen = set()
    for fold in folds:
        for side in ("train", "val"):
            dataset = real_set(name, side, fold)
            counts = dataset.table.num_frames
            slots = dataset.clip_first[:, None] + np.arange(dataset.config.frames)    # (K, T)
            inside = (slots >= 0) & (slots < counts[dataset.clip_videos][:, None])
            video = np.broadcast_to(dataset.clip_videos[:, None], slots.shape)[inside]
            found = sorted(zip(video.tolist(), slots[inside].tolist()))
            assert found == [(v, n) for v, count in enumerate(counts) for n in range(count)]
            clips = np.bincount(dataset.clip_videos)
            assert np.array_equal(clips, -(-counts // dataset.config.frames))
            seen |= set(dataset.videos)
    assert len(seen) == total


def test_padding_repeats_the_ends_and_is_marked(tmp_path):
    dataset = build_dataset("ucf", small_ucf(tmp_path), "val", UCF)
    (first, start), _, (last, end) = (dataset[i] for i in range(3))    # 2 slots in front, 2 behind
    assert levels(first) == [0, 0, 0, 2, 4, 6, 8, 10]
    assert levels(last) == [28, 30, 32, 34, 36, 38, 38, 38]
    assert start["frames"].tolist() == [False] * 2 + [True] * 6
    assert end["frames"].tolist() == [True] * 6 + [False] * 2
    assert start["present"].tolist() == [[False] * 4 + [True] * 4, [False] * 6 + [True] * 2]
    assert end["boxes"].shape == (0, 8, 4) and end["labels"].shape == (0, 8, 24)
    assert start["size"].tolist() == [240, 320]
    assert start["video"] == "Biking/v_a" and start["video_index"] == 0


def test_a_video_shorter_than_a_clip_is_padded_at_both_ends(tmp_path):
    grey_frames(tmp_path / "Frames/clap/v", "{:05d}.png", 3)
    tube = np.float32([[f, 10, 20, 110, 120] for f in (1, 2, 3)])
    gttubes(tmp_path / "JHMDB-GT.pkl", nframes={"clap/v": 3, "catch/w": 8},
            gttubes={"clap/v": {1: [tube]}})
    clip, target = build_dataset("jhmdb", tmp_path, "val", UCF, fold=2)[0]
    assert levels(clip) == [0, 0, 0, 2, 4, 4, 4, 4]
    assert target["frames"].tolist() == [False] * 2 + [True] * 3 + [False] * 3


def test_a_temporal_stride_takes_every_nth_frame_with_its_own_boxes(tmp_path):
    config = replace(UCF, sampling_rate=2)                 # 20 frames in 32 slots: from -6 on
    dataset = build_dataset("ucf", small_ucf(tmp_path), "val", config)
    assert len(dataset) == 4
    clip, target = dataset[1]
    assert target["frame_ids"].tolist() == [1, 1, 1, 2, 4, 6, 8, 10]
    assert target["frames"].tolist() == [False] * 3 + [True] * 5
    assert levels(clip)[3:] == [2, 6, 10, 14, 18]
    assert target["present"].tolist() == [[False] * 4 + [True] * 4,
                                          [False] * 5 + [True] + [False] * 2]
    targets = [dataset[i][1] for i in range(4)]
    numbers = torch.cat([target["frame_ids"][target["frames"]] for target in targets])
    assert sorted(numbers.tolist()) == [*range(1, 21)]
    assert sum(int(target["present"].sum()) for target in targets) == 12


def test_a_key_frame_clip_lies_around_its_key_frame(tmp_path):
    dataset = build_dataset("ava", small_ava(tmp_path), "val", KEY)
    assert len(dataset) == 2 and dataset.clip_videos.tolist() == [0, 0]
    clip, target = dataset[0]                              # second 902 is frame 60
    assert levels(clip) == [2 * (60 + (i - 4) * 4) for i in range(8)]
    assert target["boxes"].shape == (2, 1, 4)
    assert target["frame_ids"].tolist() == [902] and target["frames"].tolist() == [True]
    assert torch.allclose(target["boxes"][0, 0], torch.tensor([.3, .55, .4, .7]), atol=1e-6)
    assert target["labels"].shape == (2, 1, 80)
    assert target["labels"][0, 0].nonzero().flatten().tolist() == [11, 79]
    assert target["size"].tolist() == [48, 64]
    clip, target = dataset[1]                              # frame 90: the end is repeated
    assert levels(clip) == [2 * min(90 + (i - 4) * 4, 99) for i in range(8)]
    frames, tubes = dataset.ground_truth()
    assert frames["frame"].tolist() == [902, 902, 902, 903] and tubes == []
    assert frames["video"].tolist() == [0] * 4


def test_your_own_data_at_every_frame(tmp_path):
    dataset = build_dataset("custom", small_own(tmp_path), "train", STILL)
    tubes = dataset.ground_truth()[1]
    runs = [(0, [3, 4, 5, 6, 7, 8]), (1, [3, 4]), (1, [8]), (1, [3])]
    assert [(tube["label"], tube["frames"].tolist()) for tube in tubes] == runs
    assert tubes[0]["boxes"][0].tolist() == [16, 12, 48, 24]
    assert dataset.class_names == ["wave", "jump high"] and dataset.class_groups == {}
    dataset.augment = False
    _, target = dataset[0]                                 # 20 frames in clips of 8: from -2 on
    assert target["frame_ids"].tolist() == [1, 1, 1, 2, 3, 4, 5, 6]
    assert target["frames"].tolist() == [False] * 2 + [True] * 6
    assert target["present"].tolist() == [[False] * 4 + [True] * 4,
                                          [False] * 4 + [True] + [False] * 3]
    assert target["labels"][0].tolist() == [[0, 0]] * 4 + [[1, 1]] * 2 + [[1, 0]] * 2


def test_your_own_key_frames_may_have_nobody_in_them(tmp_path):
    dataset = build_dataset("custom", small_own(tmp_path), "val", KEY)
    assert [dataset[i][1]["frame_ids"].tolist() for i in range(len(dataset))] == [[5], [7]]
    assert dataset[1][1]["boxes"].shape == (0, 1, 4)
    assert levels(dataset[0][0]) == [2 * min(max(4 + (i - 4) * 4, 0), 8) for i in range(8)]


# ---- how its frames are seen ----

@pytest.mark.parametrize("size, short, expected", [
    ((240, 320), 224, (298, 224)), ((240, 320), 256, (341, 256)), ((320, 240), 224, (224, 298)),
    ((100, 100), 56, (56, 56))])
def test_the_long_side_is_rounded_down(size, short, expected):
    assert data.fit(size, short) == expected


def test_a_clip_is_the_resized_frames_bit_for_bit():
    """Frames of another size are stretched to the annotation's shape."""
    image = noise(0, 256, 340)
    clip = data.render([image], data.draw_transform((240, 320), PRESETS["ucf"], augment=False))
    expected = np.asarray(image.resize((298, 224), Image.Resampling.BICUBIC))     # (H, W, 3)
    assert clip.dtype == torch.uint8
    assert np.array_equal(clip[:, 0].permute(1, 2, 0), expected)


def test_a_crop_has_the_pixels_of_the_resized_frames_crop():
    image = noise(1)
    clip = data.render([image], data.Transform((341, 256), (20, 32, 298, 224)))
    expected = np.asarray(image.resize((341, 256), Image.Resampling.BICUBIC))[32:256, 20:318]
    difference = np.abs(clip[:, 0].permute(1, 2, 0).numpy() - expected.astype(float))
    assert difference.max() <= 1 and difference.mean() < 0.01     # eight bits between two filters


def test_normalised_clips_are_those_of_the_float_pipeline():
    """Without jitter exactly, with it within half of one of 255 levels: they are rounded once."""
    image, plain = noise(2), data.Transform((298, 224), (0, 0, 298, 224))
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    resized = np.asarray(image.resize((298, 224), Image.Resampling.BICUBIC))      # (H, W, 3)
    frame = np.ascontiguousarray(resized.transpose(2, 0, 1)).astype(np.float32)   # (3, H, W)
    for jitter, bound in (((0, 0, 0), 1e-6), ((7, -90, 30), 0.5001 / 255 / 0.224)):
        clip = data.render([image], replace(plain, jitter=jitter, channels=(2, 0, 1), flip=True))
        if any(jitter):
            data.jitter_colours(frame, jitter)
        expected = (torch.from_numpy(frame)[[2, 0, 1]].flip(-1) / 255 - mean) / std
        assert (normalise(clip[None])[0, :, 0] - expected).abs().max() < bound


@pytest.mark.parametrize("shift", [(10, 0, 0), (-7, 128, -40), (0, -300, 0), (3, 20, 128),
                                   (0, 0, 0), (90, 0, 0), (-75, 9, 0), (170, 0, 0)])
def test_jitter_is_that_of_hsv(shift):
    frame = np.random.default_rng(3).integers(0, 256, (3, 12, 13)).astype(np.float32)
    frame[:, 0] = frame[:1, 0]                             # greys, among them
    frame[:, 0, 0], frame[:, 1, 1] = 0, 255
    expected = np.empty_like(frame)
    for row, column in np.ndindex(12, 13):
        h, s, v = colorsys.rgb_to_hsv(*(frame[:, row, column] / 255))
        s, v = min(max(s + shift[1] / 255, 0), 1), min(max(v + shift[2] / 255, 0), 1)
        rgb = colorsys.hsv_to_rgb((h + shift[0] / 180) % 1, s, v)
        expected[:, row, column] = np.array(rgb) * 255
    data.jitter_colours(frame, shift)
    assert np.abs(frame - expected).max() < 2e-3


def test_boxes_follow_the_pixels_through_crop_and_flip():
    """A white rectangle in a frame is found again where its box says, whatever the draw."""
    config = replace(PRESETS["ucf"], jitter_hue=0, jitter_saturation=0)
    random, flips = np.random.default_rng(2), 0
    for _ in range(25):
        x, y = random.integers(0, 200), random.integers(0, 140)
        box = np.float32([[x, y, x + random.integers(40, 120), y + random.integers(40, 100)]])
        frame = np.zeros((240, 320, 3), np.uint8)
        frame[int(box[0, 1]):int(box[0, 3]), int(box[0, 0]):int(box[0, 2])] = 255
        transform = data.draw_transform((240, 320), config, augment=True)
        flips += transform.flip
        assert transform.resized == (341, 256) and transform.crop[2:] == (298, 224)
        bright = data.render([Image.fromarray(frame)], transform)[0, 0].numpy() > 128      # (H, W)
        shares, visible = data.transform_boxes(box, np.array([240, 320]), transform)
        assert bright.any() == visible[0]
        if visible[0]:
            rows, columns = np.flatnonzero(bright.any(axis=1)), np.flatnonzero(bright.any(axis=0))
            found = np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])
            cx, cy, w, h = shares[0]
            corners = np.array([cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2])
            assert np.abs(found - corners * [298, 224, 298, 224]).max() < 1.1
    assert 5 < flips < 20


def test_an_actor_of_whom_the_crop_shows_less_than_a_pixel_is_not_present(tmp_path):
    dataset = build_dataset("ucf", small_ucf(tmp_path), "val", STILL)
    frame_ids, frames = np.arange(1, 9), np.ones(8, bool)
    for width, actors in ((40, 1), (54, 1), (55, 2)):      # the long tube begins at x = 53.1
        crop = data.Transform((85, 64), (0, 0, width, 56))
        target = dataset.target(0, frame_ids, frames, crop)
        assert target["present"].sum(dim=1).tolist() == [6, 2][-actors:]


def test_draws_are_uniform_within_their_ranges_and_follow_torchs_seed():
    config = replace(PRESETS["ucf"], permute_colours=True)
    torch.manual_seed(1)
    drawn = [data.draw_transform((240, 320), config, augment=True) for _ in range(600)]
    torch.manual_seed(1)
    again = [data.draw_transform((240, 320), config, augment=True) for _ in range(20)]
    assert drawn[:20] == again
    values = np.array([(*one.jitter, *one.crop[:2]) for one in drawn])                # (600, 5)
    lowest, highest = (-10, -128, -128, 0, 0), (10, 128, 128, 43, 32)
    for column, low, high in zip(values.T, lowest, highest):
        quarters = np.histogram(column, 4, (low, high + 1))[0] / len(column)
        assert column.min() >= low and column.max() <= high
        assert np.abs(quarters - 0.25).max() < 0.08
        if high < 20:
            assert set(column.tolist()) == set(range(low, high + 1))
    assert {one.channels for one in drawn} > {(0, 1, 2), (2, 1, 0), (1, 0, 2)}


def test_augmentation_is_drawn_once_per_clip_and_can_be_switched_off(tmp_path):
    small_ucf(tmp_path)
    for path in (tmp_path / "rgb-images/Biking/v_b").iterdir():
        Image.linear_gradient("L").resize((64, 48)).convert("RGB").save(path)
    dataset = build_dataset("ucf", tmp_path, "train", UCF)
    torch.manual_seed(0)
    clip, other = dataset[0][0], dataset[0][0]
    assert torch.equal(clip, clip[:, :1].expand_as(clip)) and not torch.equal(clip, other)
    dataset.augment = False
    assert torch.equal(dataset[0][0], dataset[0][0])


# ---- what loss, metrics and loader get ----

def test_collate_pads_to_the_largest_and_masks():
    batch = [(torch.full((3, 2, 4, 6), 9, dtype=torch.uint8), {"video": "a"}),
             (torch.full((3, 2, 5, 3), 9, dtype=torch.uint8), {"video": "b"})]
    clips, mask, targets = collate(batch)
    assert clips.shape == (2, 3, 2, 5, 6) and mask.shape == (2, 5, 6) and mask.dtype == torch.bool
    assert clips.dtype == torch.uint8 and clips.nbytes == 2 * 3 * 2 * 5 * 6
    assert [target["video"] for target in targets] == ["a", "b"]
    assert torch.equal(clips, 9 * (~mask)[:, None, None].expand_as(clips))
    assert (~mask).sum(dim=(1, 2)).tolist() == [24, 15]


def test_real_clips_have_the_documented_form():
    dataset = build_dataset("ucf", shared("data/ucf24_mini"), "val", PRESETS["ucf"])
    assert np.bincount(dataset.clip_videos).tolist() == [6, 5, 6, 4, 6]
    clip, target = dataset[21]                             # SalsaSpin, several actors
    actors = len(target["boxes"])
    assert clip.shape == (3, 32, 224, 298) and clip.dtype == torch.uint8 and actors > 1
    video, index = target.pop("video"), target.pop("video_index")
    assert dataset.videos[index] == video and dataset.clip_videos[21] == index
    forms = {key: (tuple(value.shape), value.dtype) for key, value in target.items()}
    assert forms == {
        "boxes": ((actors, 32, 4), torch.float32), "present": ((actors, 32), torch.bool),
        "labels": ((actors, 32, 24), torch.float32), "frames": ((32,), torch.bool),
        "frame_ids": ((32,), torch.int64), "size": ((2,), torch.int64)}
    assert torch.equal(target["labels"].sum(dim=2) > 0, target["present"])
    truth = dataset.ground_truth()[0]
    here = (truth["video"] == index) & (truth["frame"] == int(target["frame_ids"][20]))
    found = target["boxes"][target["present"][:, 20], 20] * torch.tensor([320, 240, 320, 240])
    cx, cy, w, h = found.T
    corners = torch.stack([cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2], dim=1).numpy()
    assert np.abs(np.sort(corners, axis=0) - np.sort(truth["box"][here], axis=0)).max() < 1e-4


def test_a_frame_beyond_the_millionth_is_itself_in_the_ground_truth(tmp_path):
    """Frames are (video, frame): no number that stands for both."""
    small_own(tmp_path)
    dataset = build_dataset("custom", tmp_path, "val", KEY)
    dataset.table.frame[:] = 1_000_007
    frames, _ = dataset.ground_truth()
    assert frames["video"].tolist() == [0] and frames["frame"].tolist() == [1_000_007]


@pytest.mark.parametrize("side, videos, tubes, boxes, frames, annotated", [
    ("train", 2284, 3143, 403282, 395868, 340336), ("val", 910, 1315, 170580, 159289, 138527)])
def test_ucf_has_the_published_counts(side, videos, tubes, boxes, frames, annotated):
    dataset = real_set("ucf", side)
    truth, truth_tubes = dataset.ground_truth()
    assert (len(dataset.videos), len(truth_tubes), len(truth["box"])) == (videos, tubes, boxes)
    distinct = set(zip(truth["video"].tolist(), truth["frame"].tolist()))
    assert (dataset.table.num_frames.sum(), len(distinct)) == (frames, annotated)
    assert dataset.class_names[23] == "WalkingWithDog"


@pytest.mark.parametrize("name, golden", [("ucf", "ucf24"), ("jhmdb", "jhmdb")])
def test_ground_truth_is_that_of_the_golden_cases(name, golden):
    case = np.load(shared(f"golden/eval/{golden}_frames.npz"))
    dataset = real_set(name, "val")
    assert dataset.class_names == case["labels"].tolist()
    names, expected = case["video_names"].tolist(), set()
    for i, (first, last) in enumerate(zip(case["gt_tube_offset"], case["gt_tube_offset"][1:])):
        video, label = names[case["gt_tube_video"][i]], int(case["gt_tube_class"][i])
        boxes = case["gt_box"][first:last].tobytes()
        expected.add((video, label, int(case["gt_tube_start"][i]), boxes))
    found = set()
    for tube in dataset.ground_truth()[1]:
        video = dataset.videos[tube["video"]]
        if video in names:
            start, boxes = int(tube["frames"][0]), tube["boxes"].tobytes()
            found.add((video, tube["label"], start, boxes))
    assert found == expected
