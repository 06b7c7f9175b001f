"""tools/pretrain.py: what the stem is taught, that it is seeded, and the files that are made."""

from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from safetensors import safe_open

from backbone import ConvStem, load_backbone
from beside.synthetic import CLASS_GROUPS, CONE, DISC, HEIGHT, MEET, WIDTH, SyntheticDataset, draw
from conftest import ROOT
from data import build_dataset
from model import PRESETS, VideoActionDetector, load_checkpoint
from tools import pretrain

SYNTHETIC = PRESETS["synthetic"]


@pytest.fixture
def scenes():
    dataset = SyntheticDataset(SYNTHETIC, "train", seed=7)
    return [dataset.scene(index) for index in range(12)]


def test_a_crop_shows_one_actor_in_its_place_and_no_other(scenes):
    seen = 0
    for scene in scenes:
        actors = [actor for actor in scene["actors"] if actor["present"].any()]
        crops = list(pretrain.crops_of(scene))
        assert len(crops) - len(actors) in (0, 1), "behind the actors' a thing's"
        for actor, (crop, _) in zip(actors, crops):
            assert crop.shape == (3, 8, 48, 48) and crop.dtype == torch.uint8
            picture = crop.permute(1, 2, 3, 0).numpy()  # (T, S, S, 3)
            box = actor["box"][actor["present"]].mean(0)
            left = min(max((box[0] + box[2]) / 2 - 24, 0), WIDTH - 48)
            top = min(max((box[1] + box[3]) / 2 - 24, 0), HEIGHT - 48)
            window = np.s_[:, int(top):int(top) + 48, int(left):int(left) + 48]
            alone = draw({**scene, "actors": [actor]})
            assert (picture == alone[window]).all()
            nobody = draw({**scene, "actors": []})
            assert (picture != nobody[window]).any(), "the actor is in its crop"
            seen += len(actors) > 1 and (draw(scene)[window] != picture).any()
    assert seen > 3, "crops in which another actor would have been seen"


def test_a_things_crop_shows_it_and_no_actor(scenes):
    kinds = []
    for scene in scenes:
        actors = [actor for actor in scene["actors"] if actor["present"].any()]
        for crop, label in list(pretrain.crops_of(scene))[len(actors):]:
            thing = scene["things"][0]
            middle = np.stack([thing["path"].real, thing["path"].imag], -1)  # (T, 2)
            if ((middle < 1) | (middle > (WIDTH - 1, HEIGHT - 1))).any():
                continue
            left, top = np.clip(middle.mean(0) - 24, 0, (WIDTH - 48, HEIGHT - 48)).astype(int)
            nobody = draw({**scene, "actors": []})
            picture = crop.permute(1, 2, 3, 0).numpy()  # (T, S, S, 3)
            assert (picture == nobody[:, top:top + 48, left:left + 48]).all()
            assert label[:6].sum() == 0 and label[6 + (thing["kind"] == "disc")] == 1
            kinds.append(thing["kind"])
    assert set(kinds) == {"cone", "disc"}


def test_a_thing_counts_where_its_middle_is_in_the_crop(scenes):
    """From the actors' crops: a thing moved out of all of them is not there, one moved onto the
    actor is."""
    scene = scenes[0]
    for kind, other in (("cone", 7), ("disc", 6)):
        actor = scene["actors"][0]
        away = {**scene["things"][0], "kind": kind, "path": np.full(8, -50 - 50j)}
        there = {**away, "path": actor["path"]}
        alone = {**scene, "actors": [actor]}
        (_, labels), = pretrain.crops_of({**alone, "things": [away]})
        assert labels[6:].sum() == 0
        (_, labels), (_, of_thing) = pretrain.crops_of({**alone, "things": [there]})
        assert labels[6:].sum() == of_thing[6:].sum() == 1 and labels[other] == of_thing[other] == 0


def test_labels_are_of_own_motion_detail_and_things_and_do_not_know_the_context(scenes):
    shown = set()
    for scene in scenes:
        labels = [label for _, label in pretrain.crops_of(scene)]
        actors = [actor for actor in scene["actors"] if actor["present"].any()]
        for actor, label in zip(actors, labels):
            wanted = [float(actor["seen"][:, c].any()) for c in range(6)]
            assert label[:6].tolist() == wanted
            shown |= set(actor["seen"].any(0).nonzero()[0].tolist())
            actor["seen"][:, [CONE, DISC, MEET]] = 1 - actor["seen"][:, [CONE, DISC, MEET]]
            actor["labels"]["context"] = None
        again = [label for _, label in pretrain.crops_of(scene)]
        assert all(torch.equal(one, other) for one, other in zip(labels, again))
    assert shown & set(CLASS_GROUPS["context"]), "scenes without a label of the group prove nothing"


def test_its_scenes_are_neither_those_of_training_nor_of_validation(monkeypatch):
    used = []

    class Watched(SyntheticDataset):
        def scene(self, index):
            used.append((self.seed, index))
            return super().scene(index)

    monkeypatch.setattr(pretrain, "SyntheticDataset", Watched)
    monkeypatch.setattr(pretrain, "BATCH", 2)
    pretrain.pretrain(1, 3, held_out=2)
    theirs = {build_dataset("synthetic", None, side, SYNTHETIC).seed for side in ("train", "val")}
    assert {seed for seed, _ in used} == {103} and theirs == {0}


def test_the_same_seed_gives_the_same_stem_and_another_gives_another(monkeypatch):
    monkeypatch.setattr(pretrain, "BATCH", 4)
    (one, reached), (same, again) = (pretrain.pretrain(2, 0, held_out=4) for _ in range(2))
    other, _ = pretrain.pretrain(2, 1, held_out=4)
    assert reached == again and set(reached) == {"own motion", "detail", "things"}
    names = list(one.state_dict())
    for name in names:
        assert torch.equal(one.state_dict()[name], same.state_dict()[name])
    weight = "stages.3.3.weight"
    assert weight in names and not torch.equal(one.state_dict()[weight], other.state_dict()[weight])


def test_each_map_is_read_out_at_the_strongest_place_of_its_mean_over_time():
    pupil = pretrain.Pupil().eval()
    crops = torch.randn(2, 3, 8, 48, 48)
    with torch.no_grad():
        pupil(crops)
        features = []
        for x in pupil.stem(crops):
            mean = sum(x[:, :, t] for t in range(8)) / 8
            features.append(mean.flatten(2).max(-1)[0])
        logits = torch.cat(features, 1) @ pupil.read_out.weight.T + pupil.read_out.bias
        torch.testing.assert_close(pupil(crops), logits)
    assert logits.shape == (2, 8)


def test_the_file_in_the_repository_is_small_says_how_it_was_made_and_fits_the_stem():
    path = ROOT / "weights" / "stem.safetensors"
    assert path.stat().st_size <= 1_000_000
    with safe_open(path, "pt") as file:
        said = file.metadata()
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.float16}
    assert said["command"] == "python -m tools.pretrain --steps 2000 --seed 0"
    assert said["seed"] == "0"
    model = VideoActionDetector(SYNTHETIC)
    before = model.backbone.stages[0][0].weight.clone()
    load_backbone(model, path)
    assert not torch.equal(before, model.backbone.stages[0][0].weight)


def test_what_main_writes_loads_into_the_stem(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(pretrain, "BATCH", 2)
    monkeypatch.setattr(pretrain, "HELD_OUT", 2)
    monkeypatch.setattr(pretrain.pretrain, "__defaults__", (2,))
    path = tmp_path / "new" / "stem.safetensors"
    pretrain.main(["--steps", "1", "--seed", "5", "--out", str(path)])
    assert f"wrote {path}" in capsys.readouterr().out
    model = VideoActionDetector(SYNTHETIC)
    load_backbone(model, path)
    torch.manual_seed(5)
    stem, _ = pretrain.pretrain(1, 5)
    weights = stem.state_dict()
    for name, tensor in model.backbone.state_dict().items():
        if not name.endswith("num_batches_tracked"):
            assert torch.equal(tensor, weights[name].half().float())
    for wrong in (["--steps", "0"], ["--seed", "-1"]):
        with pytest.raises(SystemExit):
            pretrain.main(wrong)


def test_a_shrunk_checkpoint_is_half_as_large_and_gives_the_same(tmp_path):
    config = replace(SYNTHETIC, clips_per_epoch=320, num_queries=3, drop_epochs=(4, 6),
                     offset_rate=1.0)
    model = VideoActionDetector(config).eval()
    settings = {"dataset": "synthetic", "preset": None, "seed": 4, "data": None}
    checkpoint = {
        "model": model.state_dict(), "optimizer": {"state": torch.zeros(3_000_000)}, "step": 7,
        "config": asdict(config), "settings": settings, "dataset": "synthetic", "epoch": 2,
        "classes": ["a"] * 9, "metrics": {"f-mAP@0.5": 0.5}, "processes": 2}
    del checkpoint["config"]["offset_rate"]  # as in a run from before it was there
    source, out = tmp_path / "best.pt", tmp_path / "new" / "small.pt"
    torch.save(checkpoint, source)
    pretrain.main(["--shrink", str(source), str(out)])
    assert out.stat().st_size < 3_000_000 < source.stat().st_size
    again, read = load_checkpoint(out)
    assert read["command"] == ("torchrun --nproc_per_node 2 train.py --dataset synthetic --seed 4 "
                               "--set num_queries=3 clips_per_epoch=320 drop_epochs=4,6 "
                               "offset_rate=1.0")
    assert read["settings"]["seed"] == 4 and read["metrics"] == checkpoint["metrics"]
    assert again.config == config and read["classes"] == checkpoint["classes"]
    clips = torch.randn(1, 3, 8, 64, 96)
    with torch.no_grad():
        exact, halved = model(clips), again.eval()(clips)
    torch.testing.assert_close(halved["pred_logits"], exact["pred_logits"], atol=0.02, rtol=0.02)


def test_shrink_refuses_what_is_no_checkpoint_of_train(tmp_path):
    torch.save({"model": ConvStem().state_dict()}, tmp_path / "weights.pt")
    with pytest.raises(SystemExit, match="this one has no config, settings"):
        pretrain.main(["--shrink", str(tmp_path / "weights.pt"), str(tmp_path / "small.pt")])
