"""tools/places.py: the planted scenes and maps, what is measured on them, and what is kept."""

import json
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from tools import places
from tools.places import DECODERS, FULL, PlantedMaps, draw_scenes


def scenes_of(count, num_places, seed=0):
    return draw_scenes(count, num_places, torch.Generator().manual_seed(seed))


def test_a_class_is_true_of_the_kind_of_the_thing_that_has_the_flag_s_colour():
    scenes = scenes_of(200, 3)
    for cells, kinds, flags, labels in zip(*(scenes[name].tolist() for name in
                                             ("cells", "kinds", "flags", "labels"))):
        assert len(set(cells)) == 12 and 0 <= min(cells) and max(cells) < 48
        for actor in range(2):
            for place in range(3):
                colour = flags[actor][place]
                for kind in range(3):
                    true = colour < 10 and kinds[colour] == kind
                    assert labels[actor][3 * place + kind] == true
    assert (scenes["flags"] == 10).float().mean() == pytest.approx(0.4, abs=0.03)
    assert torch.bincount(scenes["kinds"].flatten(), minlength=3).min() > 550
    assert torch.bincount(scenes["flags"].flatten(), minlength=11)[:10].min() > 45
    assert all(torch.equal(scenes[name], again) for name, again in scenes_of(200, 3).items())
    assert not torch.equal(scenes["cells"], scenes_of(200, 3, 1)["cells"])


@pytest.mark.parametrize("name", DECODERS)
def test_every_decoder_takes_the_maps_and_gives_classes_and_their_attention(name):
    scenes = scenes_of(3, 2)
    predictions, attention = PlantedMaps(name, 2)(scenes, return_attention=True)
    assert [layer["pred_logits"].shape for layer in predictions] == [(3, 2, 6)] * 2
    assert attention.shape == (3, 2, 6, 6, 8)
    torch.testing.assert_close(attention.sum((-1, -2)), torch.ones(3, 2, 6))


def test_half_of_the_class_heads_of_each_layer_start_close_to_the_actor():
    for layer in PlantedMaps(FULL, 2).decoder.classifying:
        for weight in (layer.query.weight, layer.key.weight):
            strengths = weight.view(4, 32, 128)[:, 16:, 64:].sum((1, 2)) / 16  # (M,)
            assert strengths.tolist() == [2, 2, 0.5, 0.5]


def test_a_cell_holds_its_position_and_what_stands_in_it():
    model, scenes = PlantedMaps(FULL, 2), scenes_of(5, 2)
    maps = model.maps(scenes)
    for b in range(5):
        expected = model.position.clone()
        for actor in range(2):
            first, second = scenes["flags"][b, actor].tolist()
            found = model.actor + model.flag[0, first] + model.flag[1, second]
            expected[scenes["cells"][b, actor]] += found
        for thing in range(10):
            found = model.colour[thing] + model.kind[scenes["kinds"][b, thing]]
            expected[scenes["cells"][b, 2 + thing]] += found
        torch.testing.assert_close(maps[b], expected)


def test_anchors_lie_on_the_actors_cells():
    cells = torch.tensor([[0, 13], [47, 8]])  # rows of 8 cells
    boxes = PlantedMaps("LDL", 1).anchors(cells)
    centres = [[[0.5 / 8, 0.5 / 6], [5.5 / 8, 1.5 / 6]], [[7.5 / 8, 5.5 / 6], [0.5 / 8, 1.5 / 6]]]
    torch.testing.assert_close(boxes[..., :2], torch.tensor(centres))
    of_detr = PlantedMaps("DETR", 1)
    assert torch.equal(of_detr.anchors(cells), of_detr.position[cells])


def test_with_boxes_given_an_actor_first_looks_at_itself():
    scenes = scenes_of(20, 2)
    for name in ("LDL", FULL):
        with torch.no_grad():
            _, attention = PlantedMaps(name, 2)(scenes, return_attention=True)
        own = scenes["cells"][:, :2, None, None].expand(-1, -1, 6, 1)
        assert attention.flatten(3).gather(3, own).mean() > 2 / 48


class Oracle(torch.nn.Module):
    """Knows the labels; three quarters of a class's attention lie on the cause of its flag."""

    def forward(self, scenes, return_attention):
        labels = scenes["labels"]
        attention = torch.full((*labels.shape, 48), 0.25 / 47)
        for b, a, c in labels.nonzero().tolist():
            thing = scenes["flags"][b, a, c // 3]
            attention[b, a, c, scenes["cells"][b, 2 + thing]] = 0.75
        attention = attention.unflatten(-1, (6, 8))
        return [{"pred_logits": -labels}, {"pred_logits": labels}], attention


def test_precision_and_share_of_one_who_knows():
    scenes = scenes_of(70, 3)  # more than one batch
    precision, share = places.examine(Oracle(), scenes)
    assert precision == 1.0 and share == pytest.approx(0.75)


def test_mean_precision_is_the_mean_over_the_true_of_the_precision_at_their_rank():
    rng = np.random.default_rng(0)
    scores = rng.permutation(40).reshape(5, 2, 4) / 40
    labels = (rng.random((5, 2, 4)) < 0.4).astype(np.float32)
    precisions = []
    for c in range(4):
        score, true = scores[..., c].ravel(), labels[..., c].ravel() == 1
        at_true = [true[score >= score[i]].mean() for i in np.flatnonzero(true)]
        precisions.append(np.mean(at_true))
    found = places.mean_precision(torch.tensor(scores), torch.tensor(labels))
    assert found == pytest.approx(np.mean(precisions))


def test_the_plateau_is_what_the_counts_of_kinds_tell():
    scenes = scenes_of(4000, 1)
    _, loss = places.without_looking(scenes)
    precision, _ = places.without_looking(scenes_of(60_000, 1))
    # more than the third of a blind guess
    assert precision == pytest.approx(places.WITHOUT_LOOKING, abs=0.005)
    losses = []
    for b in range(4000):
        for a in range(2):
            for kind in range(3):
                odds = (scenes["kinds"][b] == kind).sum().item() / 10
                odds *= scenes["flags"][b, a, 0].item() < 10
                true = scenes["labels"][b, a, kind].item()
                losses.append(-np.log(odds if true else 1 - odds))
    assert loss == pytest.approx(np.mean(losses), rel=1e-4)


@pytest.mark.parametrize("losses, step", [
    ([0.4] * 100, None),
    ([0.4] * 60 + [0.0] * 40, 61),  # two zeros among 25: a mean of .368
    ([0.4] * 20 + [0.0] * 30 + [0.4] * 30, None),  # it came back
    ([0.1] * 50, 25),
])
def test_a_loss_leaves_its_plateau_for_good(losses, step):
    assert places.leaves(losses, 0.4) == step


def test_the_rate_warms_up_and_is_a_tenth_at_the_end():
    rates = [places.rate_of(step, 500) / places.RATE for step in range(500)]
    assert rates[:50] == pytest.approx(np.arange(1, 51) / 50)
    assert set(rates[50:450]) == {1.0} and rates[450:] == pytest.approx([0.1] * 50)


def test_a_run_is_seeded_and_learns(monkeypatch):
    monkeypatch.setattr(places, "TEST_SCENES", 64)
    monkeypatch.setattr(places, "BATCH", 16)
    monkeypatch.setattr(places, "WARM_UP", 5)
    one, again, other = (places.learn(FULL, 2, seed, 2) for seed in (3, 3, 4))
    for run in (one, again, other):
        assert run.pop("seconds") > 0
    assert one == again and one["mAP"] != other["mAP"]
    run = places.learn("LDL", 1, 3, 40)
    assert run["steps"] == 40 and run["mAP"] > 0.25 and 0 < run["share"] < 1


@pytest.fixture
def pretended(monkeypatch):
    """Runs that cost nothing, in threads; a full decoder's takes four times that of LDL."""
    asked = []

    def learn(decoder, num_places, seed, steps):
        asked.append((decoder, num_places, seed, steps))
        seconds = {"DETR": 10.0, "LDL": 20.0}.get(decoder, 80.0) * steps / places.STEPS
        return {"decoder": decoder, "places": num_places, "seed": seed, "steps": steps,
                "mAP": 0.5 + 0.01 * num_places, "share": 0.1, "left": None, "seconds": seconds}

    monkeypatch.setattr(places, "learn", learn)
    monkeypatch.setattr(places, "ProcessPoolExecutor", lambda count, _: ThreadPoolExecutor(count))
    return asked


def test_all_runs_are_made_once_and_one_map_again_for_the_full_decoder_s_time(tmp_path, pretended):
    places.run_all(tmp_path, [0], 2)
    steps = places.STEPS
    wanted = {(name, count, 0, steps) for name in DECODERS for count in places.NUM_PLACES}
    wanted |= {("DETR", count, 0, 8 * steps) for count in places.NUM_PLACES}
    wanted |= {("LDL", count, 0, 4 * steps) for count in places.NUM_PLACES}
    assert set(pretended) == wanted and len(pretended) == len(wanted)
    path = tmp_path / "runs.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join(lines[:-3]) + "\n")  # broken off
    pretended.clear()
    places.run_all(tmp_path, [0, 1], 1)
    assert [job[2] for job in pretended].count(0) == 3
    assert len(places.read_runs(tmp_path)) == 2 * len(wanted)


def test_a_run_that_fails_ends_the_command_and_what_was_done_is_kept(
        tmp_path, monkeypatch, pretended):
    learn = places.learn

    def fails(decoder, num_places, seed, steps):
        if num_places == 4:
            raise FloatingPointError("of the fifth decoder")
        time.sleep(0.2 if num_places > 4 else 0)
        return learn(decoder, num_places, seed, steps)

    monkeypatch.setattr(places, "learn", fails)
    with pytest.raises(FloatingPointError, match="of the fifth decoder"):
        places.run_all(tmp_path, [0], 1)
    assert len(pretended) < 15, "runs behind the one that failed are not begun"
    (tmp_path / "runs.jsonl").write_text('{"decoder": "LD')
    with pytest.raises(SystemExit, match="runs.jsonl, line 1 is no run: delete the line"):
        places.read_runs(tmp_path)


def test_the_report_has_each_seed_in_a_cell_and_leaves_the_page_s_own_words(tmp_path, pretended):
    page, figure = tmp_path / "places.md", tmp_path / "places.png"
    with pytest.raises(SystemExit, match="holds no run"):
        places.report(tmp_path, page, figure)
    places.run_all(tmp_path, [0], 1)
    lines = (tmp_path / "runs.jsonl").read_text().splitlines()
    last = {**json.loads(lines[0]), "seed": 1, "mAP": 0.875, "left": 312}
    (tmp_path / "runs.jsonl").write_text("\n".join([*lines, json.dumps(last)]) + "\n")
    page.write_text("# Found\n\nProse.\n\n" + places.MARK + "\nold")
    places.report(tmp_path, page, figure)
    text = page.read_text()
    assert text.startswith("# Found\n\nProse.\n\n" + places.MARK) and "old" not in text
    first, number = json.loads(lines[0])["decoder"], json.loads(lines[0])["places"]
    row = next(line for line in text.splitlines() if line.startswith(f"| {first} |"))
    cell = row.split(" | ")[1 + places.NUM_PLACES.index(number)].strip(" |")
    assert cell == f"{0.5 + 0.01 * number:.3f} 0.875"
    assert "never 312" in text and "0.520 –" in text
    assert f"| LDL, the time of {FULL} | {4 * places.STEPS} –" in text
    assert figure.stat().st_size > 5000
