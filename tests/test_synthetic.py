"""The generator: exact boxes, causes out of reach, and what the crops tell and do not tell."""
# N actors, T frames, C classes, K crops

from dataclasses import replace
from itertools import permutations

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from beside import synthetic
from beside.synthetic import CLASS_GROUPS, SyntheticDataset
from data import build_dataset
from model import PRESETS

CONFIG = PRESETS["synthetic"]
PLAIN = replace(CONFIG, flip=0.0, permute_colours=False)
GROUPS = list(CLASS_GROUPS.values())
CONTEXT = [6, 7, 8]
CROP = 24


@pytest.fixture(scope="module")
def scenes():
    return [synthetic.describe(CONFIG, "train", 5, index) for index in range(900)]


@pytest.fixture(scope="module")
def actors(scenes):
    return [actor for scene in scenes for actor in scene["actors"]]


# ---- the clips ----

def same(one, other):
    """Are two targets equal, NaN for NaN?"""
    keys = ("boxes", "present", "labels", "frame_ids", "cause")
    return all(torch.equal(one[key].nan_to_num(-1), other[key].nan_to_num(-1)) for key in keys)


def test_same_index_same_bits_and_anything_else_differs():
    first = SyntheticDataset(CONFIG, "train", seed=3)
    again = SyntheticDataset(CONFIG, "train", seed=3)
    clip, target = first[17]
    first[4]                                     # what was asked for before does not matter
    for other_clip, other_target in (first[17], again[17]):
        assert torch.equal(clip, other_clip) and same(target, other_target)
    other_seed = SyntheticDataset(CONFIG, "train", seed=4)
    other_split = SyntheticDataset(CONFIG, "val", seed=3)
    for other, _ in (first[18], other_seed[17], other_split[17]):
        assert (other.float() - clip.float()).abs().mean() > 5


def test_the_dataset_names_its_clips_and_classes():
    dataset = SyntheticDataset(CONFIG, "val", seed=0, length=30)
    assert len(dataset) == 30 and dataset.videos[17] == "val-0-000017"
    assert dataset.clip_videos.tolist() == list(range(30))
    assert len(SyntheticDataset(CONFIG, "val")) == 320
    assert len(SyntheticDataset(CONFIG, "train")) == 100_000
    assert len(dataset.class_names) == 9
    assert sorted(sum(dataset.class_groups.values(), [])) == list(range(9))
    clip, target = dataset[17]
    assert clip.shape == (3, 8, 64, 96) and clip.dtype == torch.uint8
    assert target["video"] == "val-0-000017" and target["video_index"] == 17
    assert target["size"].tolist() == [64, 96]
    assert target["frame_ids"].tolist() == list(range(1, 9)) and target["frames"].all()
    with pytest.raises(IndexError):
        dataset[30]


@pytest.mark.parametrize("split, change, message", [
    ("test", {}, "'test'.*train, val"), ("val", {"frames": 2}, "frames=2 "),
    ("val", {"key_frame": True}, "key_frame=True")])
def test_what_the_generator_cannot_draw_is_an_error(split, change, message):
    with pytest.raises(ValueError, match=message):
        SyntheticDataset(replace(CONFIG, **change), split)


def test_a_clip_is_the_drawn_frames():
    clip, _ = SyntheticDataset(CONFIG, "val")[5]
    frames = synthetic.draw(synthetic.describe(CONFIG, "val", 0, 5))                # (T, H, W, 3)
    assert np.array_equal(clip.permute(1, 2, 3, 0), frames)


@pytest.mark.parametrize("frames, height", [(5, 64), (11, 96), (8, 40)])
def test_other_lengths_and_sizes_show_the_same_kind_of_scene(frames, height):
    config = replace(CONFIG, frames=frames, test_size=height)
    clip, target = SyntheticDataset(config, "val")[3]
    size = height, height * 3 // 2
    assert clip.shape == (3, frames, *size) and target["size"].tolist() == list(size)
    assert target["labels"].shape == (len(target["boxes"]), frames, 9)
    box = SyntheticDataset(config, "val", length=40).ground_truth()[0]["box"]
    assert height / 2 < box[:, 3].max() <= height
    assert (box[:, 2] - box[:, 0]).max() > height / 4


def test_a_clip_without_actors_has_an_empty_target():
    scene = dict(synthetic.describe(CONFIG, "val", 0, 0), actors=[])
    target = synthetic.to_target(scene, "val-0-000000")
    assert target["boxes"].shape == target["cause"].shape == (0, 8, 4)
    assert target["labels"].shape == (0, 8, 9) and target["present"].shape == (0, 8)
    assert synthetic.draw(scene).shape == (8, 64, 96, 3)


def test_targets_are_valid(scenes):
    for scene in scenes[:400]:
        target = synthetic.to_target(scene, "x")
        boxes, present, labels = target["boxes"], target["present"], target["labels"]
        low, high = boxes[..., :2] - boxes[..., 2:] / 2, boxes[..., :2] + boxes[..., 2:] / 2
        assert (low >= -1e-6).all() and (high <= 1 + 1e-6).all()
        assert present.any(1).all()              # who never appears is not listed
        assert (boxes[present][:, 2:] > 0).all()
        assert not labels[~present].any() and set(labels.unique().tolist()) <= {0.0, 1.0}
        for ids in GROUPS:
            assert (labels[..., ids].sum(-1) <= 1).all()
        caused = ~target["cause"].isnan().any(-1)
        assert torch.equal(caused, labels[..., CONTEXT].any(-1))


def test_a_cause_is_outside_of_the_box_and_further_than_its_width(actors):
    checked = 0
    for actor in actors:
        where = ~np.isnan(actor["cause"][:, 0])
        box, cause = actor["box"][where], actor["cause"][where]                     # (n, 4)
        apart = np.maximum(cause[:, :2] - box[:, 2:], box[:, :2] - cause[:, 2:]).max(-1)
        assert (apart > 0).all()
        centres = (cause[:, :2] + cause[:, 2:]) / 2 - (box[:, :2] + box[:, 2:]) / 2
        assert (np.hypot(*centres.T) > box[:, 2] - box[:, 0]).all()
        checked += where.sum()
    assert checked > 4000


def test_a_cause_is_what_the_label_says(scenes):
    found = set()
    for scene in scenes[:400]:
        everything = scene["things"] + scene["actors"]
        for actor in scene["actors"]:
            for frame in np.flatnonzero(actor["seen"][:, CONTEXT].any(-1)):
                label = int(np.argmax(actor["seen"][frame, CONTEXT])) + 6
                kind = {6: "cone", 7: "disc", 8: None}[label]
                box = actor["cause"][frame]
                there = [one for one in everything
                         if one.get("kind") == kind and np.array_equal(one["box"][frame], box)]
                assert len(there) == 1 and there[0]["present"][frame]
                if label == 8:                   # who is met meets
                    assert there[0]["seen"][frame, 8]
                    assert np.array_equal(there[0]["cause"][frame], actor["box"][frame])
                found.add(label)
    assert found == {6, 7, 8}


def test_boxes_are_the_extent_of_the_drawn_figure():
    compared = 0
    for index in range(60):
        scene = synthetic.describe(CONFIG, "val", 1, index)
        empty = dict(scene, actors=[], things=[], pillar=None)
        ground = synthetic.draw(empty)
        for actor in scene["actors"]:
            figure = synthetic.draw(dict(empty, actors=[actor]))
            drawn, whole = (figure != ground).any(-1), synthetic.outlines(actor)    # (T, H, W)
            for frame in np.flatnonzero(actor["present"]):
                rows = np.flatnonzero(drawn[frame].any(1))
                columns = np.flatnonzero(drawn[frame].any(0))
                extent = np.array((columns[0], rows[0], columns[-1] + 1, rows[-1] + 1))
                box = actor["box"][frame]
                assert (extent[:2] > box[:2] - 2).all() and (extent[2:] < box[2:] + 2).all()
                if np.array_equal(box, whole[frame]):    # not cut by the edge of the frame
                    assert np.abs(extent - box).max() < 2, (index, frame, extent, box)
                    compared += 1
    assert compared > 400


def area(boxes):
    return (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])


def test_present_means_over_half_in_the_frame_and_over_three_tenths_unhidden(scenes):
    leaving, hidden = 0, 0
    for scene in scenes:
        pillar = scene["pillar"]
        for actor in scene["actors"]:
            inside = area(actor["box"]) / area(synthetic.outlines(actor))
            assert (inside[actor["present"]] > 0.5).all()
            leaving += (inside <= 0.5).any() and actor["present"].any()
            hidden += (~actor["present"] & (inside > 0.5)).any()
            if pillar:
                joints = np.stack(list(actor["joints"].values())).real              # (10, T)
                behind = np.abs(joints - pillar["x"]) < pillar["width"] / 2
                assert (behind.mean(0)[actor["present"]] < 0.7).all()
    assert leaving > 10 and hidden > 2           # actors come and go; occlusion happens


def test_flip_mirrors_pixels_boxes_and_causes():
    plain = SyntheticDataset(PLAIN, "train", length=12)
    flipped = SyntheticDataset(replace(PLAIN, flip=1.0), "train", length=12)
    causes = 0
    for index in range(12):
        (clip, target), (mirror, mirrored) = plain[index], flipped[index]
        assert torch.equal(clip.flip(-1), mirror)
        for key in ("boxes", "cause"):
            one, other = target[key], mirrored[key]
            assert torch.allclose(one[..., 0], 1 - other[..., 0], equal_nan=True)
            assert torch.equal(one[..., 1:].nan_to_num(-1), other[..., 1:].nan_to_num(-1))
        assert torch.equal(target["labels"], mirrored["labels"])
        causes += (~target["cause"].isnan()).sum().item()
    assert causes > 0


def test_augment_is_set_for_training_and_can_be_switched():
    config = replace(CONFIG, flip=1.0, permute_colours=True)
    train, val = (build_dataset("synthetic", None, side, config) for side in ("train", "val"))
    assert train.augment and not val.augment
    assert torch.equal(val[2][0], SyntheticDataset(PLAIN, "val")[2][0])
    boxes = val[2][1]["boxes"]
    train.augment, val.augment = False, True
    assert torch.equal(train[2][0], SyntheticDataset(PLAIN, "train")[2][0])
    assert torch.equal(val[2][1]["boxes"][..., 0], 1 - boxes[..., 0])
    assert SyntheticDataset(config, "val", train=True).augment


def test_every_clip_draws_its_own_mirroring_and_order_of_colours():
    train = SyntheticDataset(replace(CONFIG, flip=0.5, permute_colours=True), "train", length=24)
    drawn = set()
    for index in range(24):
        frames = synthetic.draw(train.scene(index))                                 # (T, H, W, 3)
        clip = train[index][0].permute(1, 2, 3, 0).numpy()                          # (T, H, W, 3)
        matches = []
        for order in permutations(range(3)):
            for direction in (1, -1):
                if np.array_equal(clip, frames[:, :, ::direction][..., order]):
                    matches.append((order, direction))
        assert matches, f"clip {index} is no mirrored or recoloured drawing of its scene"
        drawn.add(matches[0])
    assert len({order for order, _ in drawn}) >= 5
    assert {direction for _, direction in drawn} == {1, -1}


def in_order(rows):
    rows = np.array(rows, float)
    return rows[np.lexsort(rows.T[::-1])]


def test_ground_truth_is_the_targets():
    dataset = SyntheticDataset(replace(CONFIG, test_size=96), "val", seed=2, length=25)
    truth, tubes = dataset.ground_truth()
    columns = truth["video"], truth["frame"], truth["label"]
    assert all(column.dtype == np.int64 for column in columns)
    found = in_order(np.column_stack((*columns, truth["box"])))
    expected = []
    for video in range(len(dataset)):
        _, target = dataset[video]
        height, width = target["size"].tolist()
        boxes = target["boxes"].numpy() * np.array((width, height, width, height))
        for actor, frame, label in target["labels"].nonzero().tolist():
            cx, cy, w, h = boxes[actor, frame]
            corners = cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2
            expected.append((video, int(target["frame_ids"][frame]), label, *corners))
    assert np.allclose(in_order(expected), found, atol=1e-3)
    of_tubes = []
    for tube in tubes:
        assert (np.diff(tube["frames"]) == 1).all()
        for frame, box in zip(tube["frames"], tube["boxes"]):
            of_tubes.append((tube["video"], frame, tube["label"], *box))
    assert np.allclose(in_order(of_tubes), found)
    assert len({row[:3] for row in of_tubes}) < len(of_tubes)    # two actors with one label


def test_ground_truth_of_no_clips_is_empty():
    truth, tubes = SyntheticDataset(CONFIG, "val", length=0).ground_truth()
    assert truth["box"].shape == (0, 4) and tubes == []
    assert truth["video"].shape == truth["frame"].shape == truth["label"].shape == (0,)


# ---- what can be told from what ----

def test_labels_are_as_frequent_as_meant(actors):
    labels = np.concatenate([actor["seen"][actor["present"]] for actor in actors])  # (n, C)
    share = labels.mean(0)
    assert share.min() > 0.09 and share.max() < 1.5 * share.min()
    assert 0.05 < (labels.sum(1) == 0).mean() < 0.32
    assert (labels.sum(1) > 1).mean() > 0.25 and (labels.sum(1) == 3).any()
    lengths = []
    for actor in actors:
        for group in ("own motion", "detail"):
            start, stop = actor["intervals"][group]
            lengths.append(stop - start)
    assert 0.45 < np.mean(np.array(lengths) == 8) < 0.55
    assert set(lengths) == {4, 5, 6, 7, 8}


def classes_of(actors, group):
    """(n,) the class that each actor has of a group, -1 without one."""
    labels = [actor["labels"][group] for actor in actors]
    return np.array([-1 if label is None else label for label in labels])


def test_groups_are_drawn_independently(actors):
    state = np.stack([classes_of(actors, group) for group in CLASS_GROUPS])         # (groups, n)
    for one, other in ((0, 1), (0, 2), (1, 2)):
        for a in np.unique(state[one]):
            for b in np.unique(state[other]):
                together = np.mean((state[one] == a) & (state[other] == b))
                expected = np.mean(state[one] == a) * np.mean(state[other] == b)
                error = np.sqrt(expected / len(actors))
                assert abs(together - expected) < 4 * error, (a, b)


def test_looks_place_and_path_do_not_depend_on_the_class(actors):
    looks = []
    for actor in actors:
        path, middle = actor["path"], actor["path"][4]
        looks.append((actor["height"], sum(actor["skin"]), sum(actor["shirt"]),
                      sum(actor["colour"]), middle.real, middle.imag, abs(path[7] - path[0]),
                      abs(actor["lean"]), actor["depth"]))
    looks = np.array(looks, float)                                                  # (n, 9)
    looks = (looks - looks.mean(0)) / looks.std(0)
    for group, ids in CLASS_GROUPS.items():
        labels = classes_of(actors, group)
        of_group = looks[labels >= 0]
        for label in ids:
            of_class = looks[labels == label]
            error = of_group.std(0) / np.sqrt(len(of_class))
            assert (np.abs(of_class.mean(0) - of_group.mean(0)) < 4 * error).all(), label


def test_where_the_arm_points_does_not_depend_on_what_it_points_at(actors):
    labels = classes_of(actors, "context")
    numbers = []
    for actor, label in zip(actors, labels):
        if label >= 0:
            across, down = np.cos(actor["direction"]), np.sin(actor["direction"])
            numbers.append((np.nanmean(np.abs(across)), np.nanmean(down), np.nanstd(across),
                            np.isnan(across).mean()))
    numbers, labels = np.array(numbers), labels[labels >= 0]                        # (n, 4), (n,)
    for label in CONTEXT:
        of_class = numbers[labels == label]
        error = numbers.std(0) / np.sqrt(len(of_class))
        assert (np.abs(of_class.mean(0) - numbers.mean(0)) < 4 * error).all(), label


def candidates(scene, actor, frame):
    """[(class, cosine of the angle to where the arm points)] of all else that is there."""
    shoulder = actor["joints"]["shoulder"][frame]
    found = []
    for one in scene["things"] + scene["actors"]:
        if one is not actor and one["present"][frame]:
            label = {"cone": 6, "disc": 7}.get(one.get("kind"), 8)
            towards = np.angle(one["path"][frame] - shoulder)
            found.append((label, np.cos(towards - actor["direction"][frame])))
    return found


def test_context_follows_from_the_description_among_competing_causes(scenes):
    right, rivals, unlabelled = [], [], []
    for scene in scenes[:500]:
        for actor in scene["actors"]:
            pointing = actor["present"] & ~np.isnan(actor["direction"])
            for frame in np.flatnonzero(pointing):
                found = candidates(scene, actor, frame)
                label, cosine = max(found, key=lambda one: one[1], default=(None, -1))
                if actor["seen"][frame, CONTEXT].any():
                    right.append(bool(actor["seen"][frame, label]))
                    rivals.append(len(found) - 1)
                elif actor["labels"]["context"] is None:    # pointing past everything
                    unlabelled.append(cosine < np.cos(np.deg2rad(15)))
    print(f"context from the description: {np.mean(right):.4f}, nothing: {np.mean(unlabelled):.4f}")
    assert np.mean(right) > 0.97 and np.mean(unlabelled) > 0.9 and len(unlabelled) > 300
    assert np.mean(np.array(rivals) >= 2) > 0.75 and np.mean(np.array(rivals) >= 1) > 0.97


def test_look_alikes_are_there(scenes, actors):
    still = [actor for actor in actors if actor["labels"]["own motion"] is None]
    assert sum(actor["lean"] != 0 for actor in still) > 50
    assert sum(actor["lifted"] != 0 for actor in still) > 50
    nearer, others = 0, 0         # than who watches a thing: another actor who does not
    for scene in scenes:
        for actor in scene["actors"]:
            if actor["labels"]["context"] in (6, 7):
                thing = scene["things"][actor["partner"][1]]["path"]
                distance = abs(actor["path"] - thing).min()
                for other in scene["actors"]:
                    if other is not actor:
                        others += 1
                        nearer += abs(other["path"] - thing).min() < distance
    assert nearer > 0.25 * others > 50


def crops_and_labels(split, indices):
    """Crops (K, 3, T, 24, 24) of boxes and the class of each group (K, 3), -1 without one."""
    crops, labels = [], []
    for index in indices:
        scene = synthetic.describe(CONFIG, split, 0, index)
        frames = [Image.fromarray(frame) for frame in synthetic.draw(scene)]
        for actor in scene["actors"]:
            if not actor["present"].all():
                continue
            crop = [frame.resize((CROP, CROP), Image.Resampling.BILINEAR, box=tuple(box))
                    for frame, box in zip(frames, actor["box"])]
            crops.append(np.stack(crop))                                            # (T, 24, 24, 3)
            seen = actor["seen"].sum(0)                                             # (C,)
            labels.append([int(np.argmax(seen[ids])) if seen[ids].max() >= 4 else -1
                           for ids in GROUPS])
    crops = torch.from_numpy(np.stack(crops)).permute(0, 4, 1, 2, 3)                # (K, 3, T, ...)
    return crops.float() / 127.5 - 1, torch.tensor(labels)


class CropClassifier(nn.Module):
    """Three 3D convolutions over a crop's whole clip and one head a group."""

    def __init__(self, width):
        super().__init__()
        layers, channels = [], 3
        for out, stride in ((width, 2), (2 * width, 2), (3 * width, 1)):
            layers += [nn.Conv3d(channels, out, 3, (1, stride, stride), 1, bias=False),
                       nn.BatchNorm3d(out), nn.ReLU()]
            channels = out
        self.convolutions = nn.Sequential(*layers)
        self.head = nn.Linear(2 * channels, 9)

    def forward(self, crops):
        features = self.convolutions(crops).flatten(2)                              # (K, D, T * 36)
        pooled = torch.cat((features.mean(-1), features.amax(-1)), -1)              # (K, 2 D)
        return self.head(pooled).view(-1, 3, 3)                                     # (K, groups, 3)


def train_classifier(crops, labels, epochs, width, rate=3e-3):
    model = CropClassifier(width)
    optimizer = torch.optim.AdamW(model.parameters(), rate, weight_decay=1e-2)
    batches = len(crops) // 32
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, epochs * batches)
    for _ in range(epochs):
        for batch in torch.randperm(len(crops))[:batches * 32].view(-1, 32):
            mirrored = torch.rand(len(batch), 1, 1, 1, 1) < 0.5
            inputs = torch.where(mirrored, crops[batch].flip(-1), crops[batch])
            logits = model(inputs[:, torch.randperm(3)]).flatten(0, 1)              # (K * 3, 3)
            loss = nn.functional.cross_entropy(logits, labels[batch].flatten(), ignore_index=-1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.eval()


def balanced_accuracy(model, crops, labels):
    """Of each group the mean over its classes of the share that is told right."""
    with torch.no_grad():
        guesses = torch.cat([model(part).argmax(-1) for part in crops.split(256)])  # (K, groups)
    right = (guesses == labels).float()
    return [np.mean([right[labels[:, group] == label, group].mean() for label in range(3)])
            for group in range(3)]


def test_crops_tell_the_first_two_groups_and_not_the_third():
    crops, labels = crops_and_labels("train", range(700))
    new_crops, new_labels = crops_and_labels("val", range(400))
    model = train_classifier(crops, labels, epochs=4, width=16)
    own, detail, context = balanced_accuracy(model, new_crops, new_labels)
    count = (new_labels[:, 2] >= 0).sum().item()
    print(f"crops: own motion {own:.3f}, detail {detail:.3f}, context {context:.3f} of {count}")
    assert own > 0.8 and detail > 0.8                      # chance is 1 / 3
    assert abs(context - 1 / 3) < 3 * np.sqrt(2 / 9 / count)
