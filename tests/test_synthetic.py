"""The generator: determinism, valid targets, exact boxes, causes out of reach; what the crops tell and do not tell."""
# N actors, T frames, C classes, K crops

import sys
from dataclasses import replace
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))
from beside import synthetic  # noqa: E402
from data import build_dataset  # noqa: E402
from model import PRESETS  # noqa: E402
from beside.synthetic import CLASS_GROUPS, SyntheticDataset  # noqa: E402

CONFIG = PRESETS["synthetic"]
GROUPS = list(CLASS_GROUPS.values())
CROP = 24


def crops_and_labels(split, seed, indices):
    """The actors' boxes cut out of every frame: (K, 3, T, 24, 24) and the class of each group (K, 3), -1 without."""
    from PIL import Image

    crops, labels = [], []
    for index in indices:
        scene = synthetic.describe(CONFIG, split, seed, index)
        frames = [Image.fromarray(frame) for frame in synthetic.draw(scene)]
        for actor in scene["actors"]:
            if actor["present"].all():
                crops.append([np.asarray(frame.resize((CROP, CROP), Image.Resampling.BILINEAR, box=tuple(box)))
                              for frame, box in zip(frames, actor["box"])])
                seen = actor["seen"].sum(0)                                                       # (C,)
                labels.append([int(np.argmax(seen[ids])) if seen[ids].max() >= 4 else -1 for ids in GROUPS])
    crops = torch.from_numpy(np.array(crops)).permute(0, 4, 1, 2, 3).float() / 127.5 - 1          # (K, 3, T, 24, 24)
    return crops, torch.tensor(labels)


class CropClassifier(nn.Module):
    """Three 3D convolutions over a crop's whole clip and one head a group."""

    def __init__(self, width=24):
        super().__init__()
        sizes = (3, width, 2 * width, 3 * width)
        self.convolutions = nn.Sequential(*[nn.Sequential(
            nn.Conv3d(a, b, 3, (1, 2, 2) if a != sizes[-2] else 1, 1, bias=False), nn.BatchNorm3d(b), nn.ReLU())
            for a, b in zip(sizes, sizes[1:])])
        self.head = nn.Linear(2 * sizes[-1], 9)

    def forward(self, crops):
        features = self.convolutions(crops).flatten(2)                                            # (K, D, T * 6 * 6)
        return self.head(torch.cat((features.mean(-1), features.amax(-1)), -1)).view(-1, 3, 3)    # (K, groups, classes)


def train_classifier(crops, labels, epochs, width=24, rate=3e-3):
    torch.manual_seed(0)
    model = CropClassifier(width)
    optimizer = torch.optim.AdamW(model.parameters(), rate, weight_decay=1e-2)
    steps = epochs * (len(crops) // 32)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, steps)
    for _ in range(epochs):
        for batch in torch.randperm(len(crops))[:len(crops) // 32 * 32].view(-1, 32):
            inputs, mirrored = crops[batch], torch.rand(len(batch)) < 0.5
            inputs = torch.where(mirrored[:, None, None, None, None], inputs.flip(-1), inputs)[:, torch.randperm(3)]
            logits = model(inputs)
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels[batch].flatten(), ignore_index=-1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.eval()


def balanced_accuracy(model, crops, labels):
    with torch.no_grad():
        guesses = torch.cat([model(part).argmax(-1) for part in crops.split(256)])                # (K, groups)
    right = (guesses == labels).float()
    return [torch.stack([right[labels[:, g] == c, g].mean() for c in range(3)]).mean().item() for g in range(3)]


# ---- the clips ----

@pytest.fixture(scope="module")
def scenes():
    return [synthetic.describe(CONFIG, "train", 5, index) for index in range(900)]


def test_same_index_same_bits_and_anything_else_differs():
    first, again = SyntheticDataset(CONFIG, "train", seed=3), SyntheticDataset(CONFIG, "train", seed=3)
    clip, target = first[17]
    first[4]                                                              # what was asked for before does not matter
    for one_clip, one_target in (first[17], again[17]):
        assert torch.equal(clip, one_clip)
        assert all(torch.equal(target[key], one_target[key]) for key in ("boxes", "present", "labels", "frame_ids"))
        assert torch.equal(target["cause"].nan_to_num(-1), one_target["cause"].nan_to_num(-1))
    other_seed, other_split = SyntheticDataset(CONFIG, "train", seed=4), SyntheticDataset(CONFIG, "val", seed=3)
    for other, _ in (first[18], other_seed[17], other_split[17]):
        assert (other - clip).abs().mean() > 0.1


def test_dataset_names_its_clips_and_classes():
    dataset = SyntheticDataset(CONFIG, "val", seed=0, length=30)
    assert len(dataset) == 30 and dataset.videos[17] == "val-0-000017" and len(SyntheticDataset(CONFIG, "val")) == 320
    assert len(SyntheticDataset(CONFIG, "train")) == 100_000
    assert sorted(sum(dataset.class_groups.values(), [])) == list(range(len(dataset.class_names))) == list(range(9))
    clip, target = dataset[17]
    assert clip.shape == (3, 8, 64, 96) and clip.dtype == torch.float32
    assert target["video"] == "val-0-000017" and target["size"].tolist() == [64, 96]
    assert target["frame_ids"].tolist() == list(range(1, 9)) and target["frames"].all()
    with pytest.raises(IndexError):
        dataset[30]
    with pytest.raises(ValueError, match="'test'.*train, val"):
        SyntheticDataset(CONFIG, "test")
    with pytest.raises(ValueError, match="frames=2 "):
        SyntheticDataset(replace(CONFIG, frames=2), "val")
    with pytest.raises(ValueError, match="key_frame=True"):
        SyntheticDataset(replace(CONFIG, key_frame=True), "val")


def test_clip_is_the_drawn_frames_normalised_by_the_imagenet_statistics():
    clip, _ = SyntheticDataset(CONFIG, "val")[5]
    frames = torch.from_numpy(synthetic.draw(synthetic.describe(CONFIG, "val", 0, 5)))            # (T, H, W, 3)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    assert torch.allclose(clip, ((frames / 255 - mean) / std).permute(3, 0, 1, 2), atol=1e-5)


@pytest.mark.parametrize("frames, height", [(5, 64), (11, 96), (8, 40)])
def test_other_lengths_and_sizes_show_the_same_kind_of_scene(frames, height):
    config = replace(CONFIG, frames=frames, test_size=height)
    clip, target = SyntheticDataset(config, "val")[3]
    assert clip.shape == (3, frames, height, height * 3 // 2) and target["size"].tolist() == [height, height * 3 // 2]
    assert target["labels"].shape == (len(target["boxes"]), frames, 9)
    truth, _ = SyntheticDataset(config, "val", length=40).ground_truth()
    box = truth["box"]
    assert height / 2 < box[:, 3].max() <= height and (box[:, 2] - box[:, 0]).max() > height / 4


def test_clip_without_actors_has_an_empty_target():
    scene = dict(synthetic.describe(CONFIG, "val", 0, 0), actors=[])
    target = synthetic.to_target(scene, "val-0-000000")
    assert target["boxes"].shape == target["cause"].shape == (0, 8, 4)
    assert target["labels"].shape == (0, 8, 9) and target["present"].shape == (0, 8)
    assert synthetic.draw(scene).shape == (8, 64, 96, 3)


def test_targets_are_valid(scenes):
    for scene in scenes[:400]:
        target = synthetic.to_target(scene, "x")
        boxes, present, labels, cause = (target[key] for key in ("boxes", "present", "labels", "cause"))
        corners = torch.cat((boxes[..., :2] - boxes[..., 2:] / 2, boxes[..., :2] + boxes[..., 2:] / 2), -1)
        assert ((corners >= -1e-6) & (corners <= 1 + 1e-6)).all()
        assert present.any(1).all()                                           # who never appears is not listed
        assert (boxes[present][:, 2:] > 0).all()
        assert not labels[~present].any() and set(labels.unique().tolist()) <= {0.0, 1.0}
        for ids in CLASS_GROUPS.values():
            assert (labels[..., ids].sum(-1) <= 1).all()
        assert torch.equal(~cause.isnan().any(-1), labels[..., CLASS_GROUPS["context"]].any(-1))


def test_cause_is_outside_of_the_box_and_further_than_its_width(scenes):
    checked = 0
    for scene in scenes:
        for actor in scene["actors"]:
            where = ~np.isnan(actor["cause"][:, 0])
            box, cause = actor["box"][where], actor["cause"][where]           # (n, 4)
            apart = np.maximum(cause[:, :2] - box[:, 2:], box[:, :2] - cause[:, 2:]).max(-1)
            assert (apart > 0).all()
            distance = np.hypot(*((cause[:, :2] + cause[:, 2:] - box[:, :2] - box[:, 2:]) / 2).T)
            assert (distance > box[:, 2] - box[:, 0]).all()
            checked += where.sum()
    assert checked > 4000


def test_cause_is_what_the_label_says(scenes):
    found = set()
    for scene in scenes[:400]:
        for actor in scene["actors"]:
            for frame in np.flatnonzero(actor["seen"][:, 6:].any(-1)):
                label = int(np.argmax(actor["seen"][frame, 6:])) + 6
                kind = {6: "cone", 7: "disc", 8: None}[label]
                others = [one for one in scene["things"] + scene["actors"] if one.get("kind") == kind]
                match = [one for one in others if np.array_equal(one["box"][frame], actor["cause"][frame])]
                assert len(match) == 1 and match[0]["present"][frame]
                if label == 8:                                                # who is met meets
                    assert match[0]["seen"][frame, 8] and np.array_equal(match[0]["cause"][frame], actor["box"][frame])
                found.add(label)
    assert found == {6, 7, 8}


def test_boxes_are_the_extent_of_the_drawn_figure():
    compared = 0
    for index in range(60):
        scene = synthetic.describe(CONFIG, "val", 1, index)
        empty = dict(scene, actors=[], things=[], pillar=None)
        for actor in scene["actors"]:
            drawn = (synthetic.draw(dict(empty, actors=[actor])) != synthetic.draw(empty)).any(-1)     # (T, H, W)
            for frame in np.flatnonzero(actor["present"]):
                rows, columns = np.flatnonzero(drawn[frame].any(1)), np.flatnonzero(drawn[frame].any(0))
                extent = np.array((columns[0], rows[0], columns[-1] + 1, rows[-1] + 1))
                box, whole = actor["box"][frame], synthetic.outlines(actor)[frame]
                assert (extent[:2] > box[:2] - 2).all() and (extent[2:] < box[2:] + 2).all(), (index, frame)
                if np.array_equal(box, whole):                                # not cut by the edge of the frame
                    assert np.abs(extent - box).max() < 2, (index, frame, extent, box)
                    compared += 1
    assert compared > 400


def test_present_means_over_half_in_the_frame_and_over_three_tenths_unhidden(scenes):
    leaving, hidden = 0, 0
    for scene in scenes:
        for actor in scene["actors"]:
            whole = synthetic.outlines(actor)
            area = (whole[:, 2] - whole[:, 0]) * (whole[:, 3] - whole[:, 1])
            inside = (actor["box"][:, 2] - actor["box"][:, 0]) * (actor["box"][:, 3] - actor["box"][:, 1]) / area
            assert (inside[actor["present"]] > 0.5).all()
            leaving += (inside <= 0.5).any() and actor["present"].any()
            hidden += (~actor["present"] & (inside > 0.5)).any()
            if scene["pillar"]:
                joints = np.stack(list(actor["joints"].values())).real        # (10, T)
                behind = np.abs(joints - scene["pillar"]["x"]) < scene["pillar"]["width"] / 2
                assert (behind.mean(0)[actor["present"]] < 0.7).all()
    assert leaving > 10 and hidden > 2                                        # actors come and go; occlusion happens


def test_flip_mirrors_pixels_boxes_and_causes():
    plain = SyntheticDataset(replace(CONFIG, flip=0.0, permute_colours=False), "train", length=12)
    flipped = SyntheticDataset(replace(CONFIG, flip=1.0, permute_colours=False), "train", length=12)
    causes = 0
    for index in range(12):
        (clip, target), (mirror, mirrored) = plain[index], flipped[index]
        assert torch.equal(clip.flip(-1), mirror)
        for key in ("boxes", "cause"):
            assert torch.allclose(target[key][..., 0], 1 - mirrored[key][..., 0], equal_nan=True)
            assert torch.equal(target[key][..., 1:].nan_to_num(-1), mirrored[key][..., 1:].nan_to_num(-1))
        assert torch.equal(target["labels"], mirrored["labels"])
        causes += (~target["cause"].isnan()).sum().item()
    assert causes > 0


def test_augmentation_is_for_training_only_and_drawn_per_clip():
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    config = replace(CONFIG, flip=0.5, permute_colours=True)
    train, val = SyntheticDataset(config, "train", length=24), SyntheticDataset(config, "val")
    assert torch.equal(val[2][0], SyntheticDataset(replace(CONFIG, flip=0.0, permute_colours=False), "val")[2][0])
    still = SyntheticDataset(replace(CONFIG, flip=0.0, permute_colours=False), "train", length=24)
    as_it_is, turned = (build_dataset("synthetic", None, split, replace(config, flip=1.0), train)
                        for split, train in (("train", False), ("val", True)))
    assert all(torch.equal(as_it_is[index][0], still[index][0]) for index in range(8)), "a training split, not augmented"
    assert torch.equal(turned[2][1]["boxes"][..., 0], 1 - val[2][1]["boxes"][..., 0]), "a test split, augmented"
    drawn = set()
    for index in range(24):
        frames = synthetic.draw(synthetic.describe(CONFIG, "train", 0, index))                    # (T, H, W, 3)
        back = ((train[index][0].permute(1, 2, 3, 0) * std + mean) * 255).numpy()                 # (T, H, W, 3)
        for order in permutations(range(3)):
            for direction in (1, -1):
                if np.abs(back - frames[:, :, ::direction][..., order]).max() < 0.01:
                    drawn.add((order, direction))
                    break
            else:
                continue
            break
        else:
            raise AssertionError(f"clip {index} is no mirrored or recoloured drawing of its scene")
    assert len({order for order, _ in drawn}) >= 5 and {direction for _, direction in drawn} == {1, -1}


def test_ground_truth_is_the_targets():
    dataset = SyntheticDataset(replace(CONFIG, test_size=96), "val", seed=2, length=25)
    truth, tubes = dataset.ground_truth()
    expected = []
    for video in range(len(dataset)):
        _, target = dataset[video]
        height, width = target["size"].tolist()
        boxes = target["boxes"].numpy() * np.array((width, height, width, height))
        for actor, frame, label in target["labels"].nonzero().tolist():
            cx, cy, w, h = boxes[actor, frame]
            expected.append((video * 1_000_000 + int(target["frame_ids"][frame]), label,
                             cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2))
    found = np.column_stack((truth["frame"], truth["label"], truth["box"]))
    assert truth["frame"].dtype == truth["label"].dtype == np.int64
    assert np.allclose(np.array(sorted(expected)), found[np.lexsort(found.T[::-1])], atol=1e-3)
    from_tubes = [(tube["video"] * 1_000_000 + frame, tube["label"], *box)
                  for tube in tubes for frame, box in zip(tube["frames"], tube["boxes"])]
    assert np.allclose(np.array(sorted(from_tubes)), found[np.lexsort(found.T[::-1])])
    assert all((np.diff(tube["frames"]) == 1).all() for tube in tubes)
    keys = {(tube["video"], tube["label"], frame): 0 for tube in tubes for frame in tube["frames"]}
    assert len(keys) < len(from_tubes)    # two actors of a clip with one label: two tubes


def test_ground_truth_of_no_clips_is_empty():
    truth, tubes = SyntheticDataset(CONFIG, "val", length=0).ground_truth()
    assert truth["box"].shape == (0, 4) and truth["frame"].shape == truth["label"].shape == (0,) and tubes == []


# ---- what can be told from what ----

def test_labels_are_as_frequent_as_meant(scenes):
    actors = [actor for scene in scenes for actor in scene["actors"]]
    labels = np.concatenate([actor["seen"][actor["present"]] for actor in actors])                # (n, C)
    share = labels.mean(0)
    assert share.min() > 0.09 and share.max() < 1.5 * share.min()
    assert 0.05 < (labels.sum(1) == 0).mean() < 0.32
    assert (labels.sum(1) > 1).mean() > 0.25 and (labels.sum(1) == 3).any()
    runs = [actor["intervals"][group] for actor in actors for group in ("own motion", "detail")]
    assert 0.45 < np.mean([stop - start == 8 for start, stop in runs]) < 0.55
    assert {stop - start for start, stop in runs} == {4, 5, 6, 7, 8}


def test_groups_are_drawn_independently(scenes):
    actors = [actor for scene in scenes for actor in scene["actors"]]
    labels = [[actor["labels"][group] for group in CLASS_GROUPS] for actor in actors]
    state = np.array([[-1 if label is None else label for label in row] for row in labels])       # (n, groups)
    for one, other in ((0, 1), (0, 2), (1, 2)):
        for a in np.unique(state[:, one]):
            for b in np.unique(state[:, other]):
                together = np.mean((state[:, one] == a) & (state[:, other] == b))
                expected = np.mean(state[:, one] == a) * np.mean(state[:, other] == b)
                assert abs(together - expected) < 4 * np.sqrt(expected / len(state)), (a, b)


def test_looks_place_and_path_do_not_depend_on_the_class(scenes):
    actors = [actor for scene in scenes for actor in scene["actors"]]
    looks = np.array([[actor["height"], sum(actor["skin"]), sum(actor["shirt"]), sum(actor["colour"]),
                       actor["path"][4].real, actor["path"][4].imag, abs(actor["path"][7] - actor["path"][0]),
                       abs(actor["lean"]), actor["depth"]] for actor in actors], float)           # (n, 9)
    looks = (looks - looks.mean(0)) / looks.std(0)
    for group in CLASS_GROUPS:
        labels = np.array([-1 if actor["labels"][group] is None else actor["labels"][group] for actor in actors])
        of_group = looks[labels >= 0]
        for label in CLASS_GROUPS[group]:
            of_class = looks[labels == label]
            error = of_group.std(0) / np.sqrt(len(of_class))
            assert (np.abs(of_class.mean(0) - of_group.mean(0)) < 4 * error).all(), label


def test_where_the_arm_points_does_not_depend_on_what_it_points_at(scenes):
    pointing = [(actor["labels"]["context"], actor["direction"]) for scene in scenes for actor in scene["actors"]
                if actor["labels"]["context"] is not None]
    labels = np.array([label for label, _ in pointing])
    numbers = np.array([(np.nanmean(np.abs(np.cos(d))), np.nanmean(np.sin(d)), np.nanstd(np.cos(d)), np.isnan(d).mean())
                        for _, d in pointing])                                # (n, 4)
    for label in (6, 7, 8):
        of_class = numbers[labels == label]
        assert (np.abs(of_class.mean(0) - numbers.mean(0)) < 4 * numbers.std(0) / np.sqrt(len(of_class))).all(), label


def candidates(scene, actor, frame):
    """[(class, cosine of the angle to where the arm points)] of all the things and other actors that are there."""
    shoulder = actor["joints"]["shoulder"][frame]
    found = []
    for one in scene["things"] + scene["actors"]:
        if one is not actor and one["present"][frame]:
            towards = np.angle(one["path"][frame] - shoulder)
            found.append(({"cone": 6, "disc": 7}.get(one.get("kind"), 8), np.cos(towards - actor["direction"][frame])))
    return found


def test_context_follows_from_the_description_among_competing_causes(scenes):
    right, rivals, unlabelled = [], [], []
    for scene in scenes[:500]:
        for actor in scene["actors"]:
            for frame in np.flatnonzero(actor["present"] & ~np.isnan(actor["direction"])):
                found = candidates(scene, actor, frame)
                best = max(found, key=lambda one: one[1], default=(None, -1))
                if actor["seen"][frame, 6:].any():
                    right.append(bool(actor["seen"][frame, best[0]]))
                    rivals.append(len(found) - 1)
                elif actor["labels"]["context"] is None:
                    unlabelled.append(best[1] < np.cos(np.deg2rad(15)))       # pointing past everything
    print(f"context from the description: {np.mean(right):.4f}, nothing: {np.mean(unlabelled):.4f}")
    assert np.mean(right) > 0.97 and np.mean(unlabelled) > 0.9 and len(unlabelled) > 300
    assert np.mean(np.array(rivals) >= 2) > 0.75 and np.mean(np.array(rivals) >= 1) > 0.97


def test_look_alikes_are_there(scenes):
    actors = [actor for scene in scenes for actor in scene["actors"]]
    still = [actor for actor in actors if actor["labels"]["own motion"] is None]
    assert sum(actor["lean"] != 0 for actor in still) > 50 and sum(actor["lifted"] != 0 for actor in still) > 50
    near, others = 0, 0                           # somebody else nearer to a watched thing who does not watch it
    for scene in scenes:
        for actor in scene["actors"]:
            if actor["labels"]["context"] in (6, 7):
                thing = scene["things"][actor["partner"][1]]["path"]
                for other in scene["actors"]:
                    if other is not actor:
                        others += 1
                        near += abs(other["path"] - thing).min() < abs(actor["path"] - thing).min()
    assert near > 0.25 * others > 50


def test_crops_tell_the_first_two_groups_and_not_the_third():
    crops, labels = crops_and_labels("train", 0, range(1000))
    new_crops, new_labels = crops_and_labels("val", 0, range(400))
    model = train_classifier(crops, labels, epochs=8, width=16)
    own, detail, context = balanced_accuracy(model, new_crops, new_labels)
    count = (new_labels[:, 2] >= 0).sum().item()
    print(f"crops: own motion {own:.3f}, detail {detail:.3f}, context {context:.3f} of {count}")
    assert own > 0.7 and detail > 0.45                                        # chance is 1 / 3
    assert abs(context - 1 / 3) < 3 * np.sqrt(2 / 9 / count)
