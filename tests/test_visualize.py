"""visualize.py: pictures whose pixels are known beforehand, from stand-ins that say where the
actors are and where they look."""
import csv
import json
import re
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import encoder
import visualize
from beside.synthetic import SyntheticDataset
from data import draw_transform, render
from model import PRESETS, VideoActionDetector

CONFIG = replace(PRESETS["synthetic"], num_classes=3, num_queries=4)    # clips of 8 frames
NAMES = ["run", "sit", "wave"]
CELLS = (5, 7)                                                          # H', W' of the stand-in
BAND = 22                                                               # pixels of a caption


class LooksAt(nn.Module):
    """Two actors, the first doing classes 0 and 2, the second class 1; its attention is one cell
    for each class, and the middle one where the second actor is asked about class 0."""

    def __init__(self, cells=((0, 0), (4, 6), (0, 6)), drift=0.0):
        super().__init__()
        self.cells, self.drift = cells, drift
        self.boxes = torch.tensor([[0.3, 0.4, 0.2, 0.4], [0.7, 0.6, 0.2, 0.4]])

    def forward(self, clips, padding_mask=None, return_attention=False):
        frames = clips.shape[2]
        boxes = torch.cat([torch.full((2, 4), 0.5), self.boxes])        # queries 2 and 3
        logits = torch.full((4, 3), -8.0)
        logits[2, 0], logits[2, 2], logits[3, 1] = 4, 2, 3
        right = self.drift * torch.arange(frames)[:, None, None] * torch.tensor([1, 0, 0, 0])
        confidence = torch.tensor([-5.0, -5.0, 5.0, 5.0])
        out = {"pred_boxes": (boxes + right)[None],
               "pred_logits": logits.expand(1, frames, 4, 3),
               "pred_conf": confidence.expand(1, frames, 4)}
        if return_attention:
            maps = torch.zeros(4, 3, *CELLS)
            for label, (i, j) in enumerate(self.cells):
                maps[2:, label, i, j] = 0.01
            maps[3, 0] = torch.eye(35)[17].view(CELLS)
            out["attention"] = maps.expand(1, frames, *maps.shape)
        return out


def clip_of(frames=8, first=1, size=(60, 80)):
    """(clip, target, pictures): black frames, as visualize.dataset_clips gives them."""
    pictures = [np.zeros((*size, 3), np.uint8)] * frames
    transform = draw_transform(size, CONFIG, augment=False)
    clip = render([Image.fromarray(picture) for picture in pictures], transform)
    target = {"video": "v", "video_index": 0, "frame_ids": torch.arange(first, first + frames),
              "size": torch.tensor(size), "frames": torch.ones(frames, dtype=torch.bool),
              "times": [i / 4 for i in range(frames)]}
    return clip, target, pictures


def drawn(clips, model=None, **options):
    """(actors, frames, pictures) of clips by a stand-in, each picture as draw_frame makes it."""
    detector = visualize.Detector(model or LooksAt(), CONFIG, torch.device("cpu"))
    actors, frames = visualize.find_actors(detector, clips, 0.3)
    options = {"names": NAMES, "classes": [], "heads": "all", "top": 3} | options
    to_draw = visualize.frames_to_draw(detector, clips, actors, **options)
    return actors, frames, [visualize.draw_frame(frame, 1920) for frame in to_draw]


# ---- class attention maps ----

def test_attention_panels_shine_where_the_model_looks_in_the_colour_of_the_actor():
    actors, frames, pictures = drawn([clip_of()], classes=[0, 1, 2])
    assert frames["number"] == list(range(1, 9)) and frames["seconds"] == [i / 4 for i in range(8)]
    assert frames["size"] == [60, 80]
    assert pictures[0].shape == (360 + BAND, 4 * 480, 3)                # 60 x 80, six times
    one, both = visualize.COLOURS[0], np.add(*visualize.COLOURS[:2])    # actors who look there
    for panel, (i, j) in enumerate(LooksAt().cells, 1):
        frame = pictures[0][BAND:, panel * 480:(panel + 1) * 480].astype(float)
        corners = {(y, x): frame[y * 340:, x * 460:][:20, :20].mean((0, 1))
                   for y in (0, 1) for x in (0, 1)}
        lit, expected = corners.pop((i // 4, j // 6)), one if panel == 1 else both.clip(max=255)
        np.testing.assert_allclose(lit, expected, atol=40)
        assert all(dark.sum() < 5 for dark in corners.values())


def test_best_class_panel_shows_each_actor_s_own_map():
    frame = drawn([clip_of()])[2][0][BAND:, 480:].astype(int)
    assert frame.shape == (360, 480, 3)
    np.testing.assert_allclose(frame[2, 2], visualize.COLOURS[0], atol=15)          # run
    np.testing.assert_allclose(frame[-2, -2], visualize.COLOURS[1], atol=15)        # sit
    assert frame[2, -2].sum() < 5, "wave is not the first actor's best class"


def test_nothing_goes_to_numpy_before_it_is_on_the_cpu_and_float32():
    class Remote(torch.Tensor):                                         # as a CUDA tensor
        def numpy(self):
            raise TypeError("can't convert cuda device type tensor to numpy")

        def cpu(self):
            return self.as_subclass(torch.Tensor)

    class OnGPU(LooksAt):
        def forward(self, *arguments, **options):
            out = super().forward(*arguments, **options)
            for name in ("attention", "pred_logits"):
                if name in out:
                    out[name] = out[name].bfloat16()
            return {name: value.as_subclass(Remote) for name, value in out.items()}

    assert len(drawn([clip_of()], OnGPU())[2]) == 8
    dataset = Labelled()
    moment = visualize.busiest_moment(dataset[1][1]) | {"clip": 1}
    seen = visualize.look_at(OnGPU(), dataset, moment, CONFIG, "cpu")
    assert seen["maps"].dtype == seen["scores"].dtype == np.float32


def test_content_heads_are_those_of_split_heads():
    clip, target, _ = clip_of(size=(64, 96))
    config = replace(CONFIG, quirks=("split_heads",))
    model = VideoActionDetector(config).eval()
    with torch.no_grad():
        heads = model(clip[None], return_attention="heads")["attention"][0].numpy()
    detector = visualize.Detector(model, config, torch.device("cpu"))
    content = visualize.detect_clip(detector, clip, target, "content")[1]
    every = visualize.detect_clip(detector, clip, target, "all")[1]
    half = config.num_heads // 2
    np.testing.assert_allclose(content, heads[:, :, :, :half].mean(3), atol=1e-6)
    np.testing.assert_allclose(every, heads.mean(3), atol=1e-6)
    assert np.abs(content - every).max() > 1e-4


def test_the_maps_are_those_of_the_detector_s_layer():
    clip, target, _ = clip_of(size=(64, 96))
    model = VideoActionDetector(CONFIG).eval()
    with torch.no_grad():
        out = model(clip[None], return_attention=True)
    expected = {1: out["aux_outputs"][0], 2: out, None: out}
    for layer, outputs in expected.items():
        detector = visualize.Detector(model, CONFIG, torch.device("cpu"), layer=layer)
        maps = visualize.detect_clip(detector, clip, target, "all")[1]
        np.testing.assert_allclose(maps, outputs["attention"][0].numpy(), atol=1e-6)
    dataset = Labelled()
    moment = visualize.busiest_moment(dataset[1][1]) | {"clip": 1}
    first, last = (visualize.look_at(model, dataset, moment, CONFIG, "cpu", layer)["maps"]
                   for layer in (1, None))
    assert np.abs(first - last).max() > 1e-4


# ---- tubes ----

def test_tubes_in_one_place_are_one_actor_and_boxes_are_drawn_where_they_are():
    clips = [clip_of(), clip_of(first=9)]
    actors, frames, pictures = drawn(clips)
    assert frames["number"] == list(range(1, 17))
    assert [[tube["label"] for tube in actor["tubes"]] for actor in actors] == [[0, 2], [1]]
    for actor in actors:
        for tube in actor["tubes"]:
            assert tube["frames"].tolist() == list(range(1, 17)), "linked over clips"
    picture = pictures[11][BAND:, :480]
    for index, (cx, cy, w, h) in enumerate(LooksAt().boxes.tolist()):
        left, right = round((cx - w / 2) * 480), round((cx + w / 2) * 480)
        bottom = round((cy + h / 2) * 360)
        for y, x in [(bottom, (left + right) // 2), (bottom - 20, left), (bottom - 20, right)]:
            near = picture[max(y - 2, 0):y + 3, x - 2:x + 3].reshape(-1, 3)
            assert (near == visualize.COLOURS[index]).all(1).any(), (index, y, x)


def tube(label, first, last, score, shift=0.0):
    boxes = np.array([[shift, 0, shift + 10, 10.0]] * (last - first + 1))
    return {"label": label, "score": score, "frames": np.arange(first, last + 1), "boxes": boxes}


def test_an_actor_has_one_tube_a_class_whatever_linking_leaves_over():
    tubes = [tube(0, 1, 20, 0.8), tube(0, 15, 30, 0.4, shift=1), tube(0, 3, 5, 0.2, shift=2),
             tube(1, 1, 30, 0.6), tube(0, 25, 30, 0.1, shift=1), tube(0, 1, 30, 0.5, shift=50)]
    first, second = visualize.group_tubes(tubes)
    assert [part["label"] for part in first["tubes"]] == [0, 1]
    whole = first["tubes"][0]
    assert whole["frames"].tolist() == list(range(1, 31))
    assert whole["boxes"][:, 0].tolist() == [0.0] * 20 + [1.0] * 10, "the better tube's box"
    assert whole["score"] == pytest.approx((20 * 0.8 + 10 * 0.4) / 30)
    assert [len(part["frames"]) for part in second["tubes"]] == [30]
    assert (first["first"], first["last"]) == (1, 30)


def test_tubes_are_in_one_place_above_half_an_overlap_on_the_frames_they_share():
    assert visualize.same_place(tube(0, 1, 4, 1), tube(0, 4, 8, 1, shift=3))        # IoU 7 / 13
    assert not visualize.same_place(tube(0, 1, 4, 1), tube(0, 4, 8, 1, shift=4))    # 6 / 14
    assert not visualize.same_place(tube(0, 1, 4, 1), tube(0, 5, 8, 1)), "no frame in common"


def test_actors_of_the_same_frames_differ_in_colour_and_later_ones_take_it_over():
    spans = [(1, 10), (5, 20), (1, 4), (11, 30), (21, 30), (1, 30)]
    actors = [{"first": first, "last": last} for first, last in spans]
    visualize.choose_colours(actors)
    chosen = [visualize.COLOURS.index(actor["colour"]) for actor in actors]
    assert chosen == [0, 1, 1, 0, 1, 2]
    crowd = [{"first": 1, "last": 9} for _ in range(25)]                            # more than 10
    visualize.choose_colours(crowd)
    colours = [actor["colour"] for actor in crowd]
    assert set(colours[:10]) == set(visualize.COLOURS) and set(colours) == set(visualize.COLOURS)


def test_tubes_are_written_with_rounded_numbers_and_their_actor(tmp_path):
    one = tube(2, 3, 5, 0.123456, shift=1 / 3)
    one["boxes"] = one["boxes"].astype(np.float32)
    others = [tube(0, 3, 5, 0.5, shift=40), tube(1, 4, 5, 0.4, shift=40)]
    actors = visualize.group_tubes([one, *others])
    seconds = [0.1, 0.1333333, 28.899999618530273]
    frames = {"number": [3, 4, 5], "seconds": seconds, "size": [20, 80]}
    head = {"video": "v", "rate": 29.97}
    visualize.write_tubes(tmp_path, head, actors, frames, NAMES)
    record = json.loads((tmp_path / "tubes.json").read_text())
    assert (record["video"], record["rate"]) == ("v", 29.97)
    assert [actor["actor"] for actor in record["actors"]] == [1, 2]
    labels = [[part["label"] for part in actor["tubes"]] for actor in record["actors"]]
    assert labels == [["run", "sit"], ["wave"]]
    assert record["actors"][1] == {"actor": 2, "colour": "#409cff", "tubes": [
        {"label": "wave", "score": 0.1235, "frames": [3, 4, 5], "seconds": [0.1, 0.133, 28.9],
         "boxes": [[0.3, 0.0, 10.3, 10.0]] * 3}]}
    lines = list(csv.reader((tmp_path / "tubes.csv").open()))
    assert lines[0] == ["v", "0.100", "0.5", "0.0", "0.625", "0.5", "1", "0.5", "1"]
    assert lines[-1] == ["v", "28.900", "0.0042", "0.0", "0.1292", "0.5", "3", "0.1235", "2"]


# ---- drawing ----

def test_annotated_boxes_are_drawn_in_white_on_the_frames_as_they_are_stored(tmp_path):
    class Stored:                                                       # a data set of one video
        name, videos, clip_videos, class_names = "custom", ["v"], np.array([0]), NAMES
        config, clip_first = CONFIG, np.array([-1])                     # a slot of padding in front
        table = type("Table", (), {"num_frames": np.array([7])})
        asked = []

        def __getitem__(self, index):
            clip, target, _ = clip_of(first=0, size=(120, 160))
            target["frame_ids"][0], target["frames"][0] = 1, False
            boxes = torch.tensor([[0.5, 0.5, 0.5, 0.5], [0.15, 0.5, 0.1, 0.5]])
            boxes = boxes[:, None].expand(2, 8, 4)
            present = torch.tensor([[True] * 8, [False] * 8])
            return clip, target | {"boxes": boxes, "present": present}

        def read(self, video, index, expected):
            self.asked.append((video, index.tolist(), expected))
            return [Image.new("RGB", (640, 480), (0, 0, 30 + i)) for i in index.tolist()]

    dataset = Stored()
    dataset.source = dataset
    clips = list(visualize.dataset_clips(dataset, [0], 5))
    assert dataset.asked == [("v", [0, 1, 2, 3, 4, 5, 6], 7)]
    assert [picture[0, 0, 2] for picture in clips[0][2]] == [30, *range(30, 37)]
    picture = drawn(clips)[2][0][BAND:, :640]                           # two panels of 640 x 480
    assert picture[0, 0].tolist() == [0, 0, 30], "the second slot holds the first frame"
    assert (picture[120:122, 300:470] == 255).all(), "from 160, 120 to 480, 360"
    assert not (picture[:, :155] == 255).all(-1).any(), "the other actor is not in this frame"


# ---- attention.png and the figure ----

class Labelled(torch.utils.data.Dataset):
    """Clips of one video. From frame 5 on the first actor of clip n runs and waves, and the wave's
    cause covers SHARES[n] of the cell at which LooksAt looks for it; clip 0 has no label."""
    name, videos, class_names, class_groups = "labelled", ["v"], NAMES, {"context": [2]}
    SHARES = [0.0, 0.9, 0.1, 0.5, 0.75, 0.2]

    def __init__(self, length=6, labelled=True, caused=True):
        self.length, self.labelled, self.caused, self.asked = length, labelled, caused, []

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        self.asked.append(index)
        clip, target, _ = clip_of(size=(64, 80))
        target["frames"][0] = False                                     # padding in front
        right = 0.02 * torch.arange(8)[:, None] * torch.tensor([1, 0, 0, 0])
        labels, causes = torch.zeros(2, 8, 3), torch.full((2, 8, 4), float("nan"))
        labels[0, 4:, [0, 2]] = float(self.labelled and index > 0)
        if self.caused:
            share = self.SHARES[index % 6]
            causes[0, 4:] = torch.tensor([(6.5 - (1 - share)) / 7, 0.1, 1 / 7, 0.2])
        return clip, target | {
            "boxes": LooksAt().boxes[:, None] + right, "labels": labels, "cause": causes,
            "present": torch.ones(2, 8, dtype=torch.bool)}


def test_the_share_of_a_map_on_a_box_is_the_area_of_its_cells_inside():
    fine = np.zeros((50, 70))
    fine[7:23, 11:52] = 1                                               # ten pixels a cell
    cells = visualize.cover((11 / 70, 7 / 50, 52 / 70, 23 / 50), CELLS)
    np.testing.assert_allclose(cells, fine.reshape(5, 10, 7, 10).mean((1, 3)), atol=1e-9)
    assert visualize.cover((-1, -1, 2, 2), CELLS).min() == 1
    assert np.isnan(visualize.cover([np.nan] * 4, CELLS)).all(), "an actor without a cause"


def sheet_of(dataset, path, monkeypatch, clips=3):
    """The moments that attention_sheet draws, as they are drawn, by LooksAt."""
    moments, draw = [], visualize.draw_moment
    monkeypatch.setattr(visualize, "draw_moment",
                        lambda data, moment: moments.append(moment) or draw(data, moment))
    model = LooksAt(drift=0.02).train()
    visualize.attention_sheet(model, dataset, CONFIG, path, "cpu", clips)
    assert model.training
    return moments


def test_attention_sheet_draws_the_clips_nearest_to_the_median_share_on_the_cause(
        tmp_path, monkeypatch):
    moments = sheet_of(Labelled(), tmp_path / "a.png", monkeypatch)
    assert [moment["clip"] for moment in moments] == [3, 4, 5], "median .5, then .75, then .2"
    np.testing.assert_allclose([moment["share"] for moment in moments], [0.5, 0.75, 0.2], atol=1e-5)
    assert all(moment["t"] == 6 for moment in moments), "the middle of slots 4 to 7"
    np.testing.assert_allclose(moments[0]["box"], [0.32, 0.2, 0.52, 0.6], atol=1e-6)
    moments = sheet_of(Labelled(caused=False), tmp_path / "b.png", monkeypatch)
    assert [moment["clip"] for moment in moments] == [1, 2, 3], "no cause known: the first ones"


def test_the_figure_has_a_frame_and_a_map_for_each_label(tmp_path, monkeypatch):
    (moment,) = sheet_of(Labelled(), tmp_path / "new" / "a.png", monkeypatch, clips=1)
    sheet = np.asarray(Image.open(tmp_path / "new" / "a.png"))
    width, height, band = 384, 307, 24                                  # of a third, 64 x 80
    assert sheet.shape == (height + band, 3 * width, 3)
    frame, run, wave = (sheet[band:, i * width:(i + 1) * width] for i in range(3))
    assert run[2, 2].sum() > 300 and run[250, 250].sum() < 30           # run looks top left
    assert wave[2, -2].sum() > 300 and wave[250, 250].sum() < 30        # wave looks top right
    left, right, lower = (6 / 7 - 0.5 / 7) * width, (1 - 0.5 / 7) * width, 0.2 * height
    for panel in (frame, run, wave):
        edge = panel[round(lower) - 3:round(lower) + 1, round(left) + 2:round(right) - 2]
        assert (edge == 255).all(-1).any(0).all(), "the cause, in white"
        side = panel[150, round(0.32 * width) - 3:round(0.32 * width) + 3]
        assert (side == visualize.COLOURS[0]).all(-1).any(), "the query's box"


def test_attention_sheet_looks_at_forty_clips_and_says_where_none_has_a_label(tmp_path, capsys):
    dataset = Labelled(200, labelled=False)
    visualize.attention_sheet(LooksAt(), dataset, CONFIG, tmp_path / "a.png", "cpu")
    assert len(dataset.asked) == 40 and dataset.asked[0] == 0 and dataset.asked[-1] == 199
    assert "40 clips of labelled have no label" in capsys.readouterr().out
    assert not (tmp_path / "a.png").exists()


def area(box):
    """The share of the frame in a box cx, cy, w, h."""
    x, y, w, h = box.tolist()
    width = min(x + w / 2, 1) - max(x - w / 2, 0)
    return width * (min(y + h / 2, 1) - max(y - h / 2, 0))


def test_attention_shares_of_maps_that_are_known(monkeypatch):
    config = PRESETS["synthetic"]
    dataset = SyntheticDataset(config, "val", length=24)
    clips = [dataset[i] for i in range(24)]

    def looks(images, return_attention):
        """Queries on the true boxes; own motion and context look everywhere, detail at a corner."""
        targets = []
        for image in images:
            targets += [target for clip, target in clips if torch.equal(clip, image)]
        boxes = torch.full((len(images), 8, 5, 4), 0.01)
        for b, target in enumerate(targets):
            boxes[b, :, :len(target["boxes"])] = target["boxes"].transpose(0, 1)
        attention = torch.full((len(images), 8, 5, 9, 8, 12), 1 / 96)
        attention[..., 3:6, :, :] = 0
        attention[..., 3:6, 0, 0] = 0.9
        return {"pred_boxes": boxes, "pred_conf": torch.zeros(boxes.shape[:3]),
                "attention": attention}

    model = nn.Module()
    model.forward = looks
    shares = visualize.attention_shares(model, dataset, config, "cpu")
    assert model.training, "left as it was"
    for group, classes in (("own motion", range(3)), ("context", range(6, 9))):
        outside, cause = [], []
        for _, target in clips:
            for n, t, c in target["labels"].nonzero().tolist():
                if c in classes:
                    outside.append(1 - area(target["boxes"][n, t]))
                    if not target["cause"][n, t].isnan().any():
                        cause.append(area(target["cause"][n, t]))
        assert shares[group]["outside"] == pytest.approx(np.mean(outside), abs=1e-4)
        assert shares[group]["cause"] == pytest.approx(np.mean(cause), abs=1e-4)
        assert shares[group]["area"] == pytest.approx(np.mean(cause), abs=1e-4)
    assert shares["detail"]["outside"] > 0.9 and shares["detail"]["cause"] < 0.05
    said = visualize.say_shares(shares)
    assert said.endswith(f"context {shares['context']['cause']:.3f}")

    def looks_twice(images, return_attention):
        out = looks(images, return_attention)
        earlier = out["attention"].roll(3, dims=3)  # detail looks everywhere, context at a corner
        return out | {"aux_outputs": [{"attention": earlier}]}

    model.forward = looks_twice
    by_layer = visualize.attention_shares(model, dataset, config, "cpu")
    for group in shares:
        first = by_layer[group].pop("cause, layer 1")
        assert by_layer[group] == pytest.approx(shares[group]), "the last layer's"
        expected = 0.0 if group == "context" else shares[group]["area"]
        assert first == pytest.approx(expected, abs=0.01 if group == "context" else 1e-4)
        by_layer[group]["cause, layer 1"] = first
    said = visualize.say_shares(by_layer)
    assert "\n  decoder layer 1 of 2: own motion" in said
    assert said.endswith(f"context {shares['context']['cause']:.3f}")
    half = visualize.attention_shares(model, dataset, config, "cpu", 0.5)
    assert 0 < abs(half["context"]["cause"] - shares["context"]["cause"]) < 0.02

    of_ranks = []

    def gather(gathered, own):
        of_ranks.append(own)
        gathered[:] = of_ranks

    monkeypatch.setattr(visualize.dist, "all_gather_object", gather)
    for rank in (0, 1):
        monkeypatch.setattr(visualize, "this_rank", lambda rank=rank: (rank, 2))
        of_both = visualize.attention_shares(model, dataset, config, "cpu")
    for group in shares:
        assert of_both[group] == pytest.approx(by_layer[group]), "two ranks have what one has"


def test_training_curves_go_through_the_means_of_the_steps(tmp_path, monkeypatch):
    from matplotlib.figure import Figure
    figures, make = [], Figure.__init__
    monkeypatch.setattr(Figure, "__init__", lambda self, *arguments, **options: (
        figures.append(self) or make(self, *arguments, **options)))
    lines = [{"epoch": i / 100, "a": float(i), "b": 1.0, "loss": i + 1.0, "lr": 1e-3,
              "grad_norm": 2.0} for i in range(1, 1202)]
    history = [{"epoch": epoch, "f-mAP@0.5": epoch / 20, "v-mAP@0.2": 0.9, "f-mAP@0.5 own": 0.3}
               for epoch in (4, 8, 12)]
    visualize.training_curves(lines, history, ("a", "b"), tmp_path / "curves.png")
    parts, loss, rates, maps = figures[0].axes
    a, b = parts.get_lines()
    np.testing.assert_allclose(a.get_ydata(), np.arange(1, 1201).reshape(-1, 2).mean(1))
    assert set(b.get_ydata()) == {1.0}
    assert len(loss.get_lines()) == 1 and len(rates.get_lines()) == 2
    curves = {line.get_label(): line for line in maps.get_lines()}
    assert set(curves) == {"f-mAP@0.5", "f-mAP@0.5 own"}
    np.testing.assert_allclose(curves["f-mAP@0.5"].get_xydata(), [(4, 0.2), (8, 0.4), (12, 0.6)])
    assert Image.open(tmp_path / "curves.png").size == (960, 560)


# ---- sampling points ----

def test_sampling_points_are_those_that_the_encoder_samples(monkeypatch):
    model = VideoActionDetector(CONFIG).eval()
    layer, calls = model.encoder.layers[-1], []
    nn.init.normal_(layer.sampling_offsets.weight, std=0.1)
    nn.init.normal_(layer.attention_weights.weight, std=0.1)
    sample = encoder.deform_attn_3d_fused
    monkeypatch.setattr(encoder, "deform_attn_3d_fused",
                        lambda *arguments: calls.append(arguments) or sample(*arguments))
    place = (0.5, 0.99, 0.3)
    points, levels, weights = visualize.sampling_points(model, torch.randn(3, 8, 64, 96), place,
                                                        "cpu")
    _, shapes, references, offsets, logits, scales = calls[0]
    assert shapes[0] == (8, 8, 12)
    cell = (4 * 8 + 7) * 12 + 3                                         # t 4, y 7, x 3
    where = references[0, cell][None, :, None] + offsets[0, cell] * scales[:, None]
    np.testing.assert_allclose(points, where.reshape(-1, 3).numpy(), atol=1e-6)
    of_heads = weights.reshape(CONFIG.num_heads, -1).sum(1)
    np.testing.assert_allclose(of_heads, 1 / CONFIG.num_heads, rtol=1e-5)
    assert levels.reshape(where.shape[:3])[2].tolist() == [[0, 0], [1, 1]]


def test_a_sampling_point_is_a_ring_in_its_frame_and_the_legend_names_its_level():
    pictures = np.zeros((8, 64, 96, 3), np.uint8)
    points, weights = np.array([[0.3, 0.5, 0.25]]), np.array([0.25])
    sheet = visualize.draw_points(pictures, points, np.array([1]), weights, (0.5, 0.5, 0.5), 1920)
    assert sheet.shape == (2 * (320 + BAND) + 24, 4 * 480, 3)           # and the legend below
    lines = sheet[:-24].reshape(2, 320 + BAND, 4, 480, 3).swapaxes(1, 2).reshape(8, 342, 480, 3)
    assert [bool(panel[BAND:].any()) for panel in lines] == [i in (2, 4) for i in range(8)]
    ring = (lines[2, BAND:] == visualize.COLOURS[1]).all(-1).nonzero()
    np.testing.assert_allclose([place.mean() for place in ring], [160, 120], atol=1)
    legend = sheet[-24:].reshape(-1, 3)
    assert (legend == visualize.COLOURS[1]).all(1).any(), "level 2 in its colour"
    assert not (legend == visualize.COLOURS[0]).all(1).any(), "level 1 has no point"


# ---- video files ----

def write_video(path, frames, rate=10, size=(60, 80)):
    shades = (np.full((*size, 3), 5 + 10 * i % 240, np.uint8) for i in range(frames))
    visualize.save_video(path, shades, rate)
    return path


@pytest.mark.parametrize("length", [1, 7, 8, 9, 19, 24])
def test_a_video_file_is_cut_into_clips_that_take_each_frame_once_from_their_middles(
        tmp_path, length):
    pytest.importorskip("av")
    path = write_video(tmp_path / "in.mp4", length)
    clips = list(visualize.video_clips(path, CONFIG, 10))
    assert {clip.shape for clip, _, _ in clips} == {(3, 8, 64, 85)}
    taken, shades, times = [], [], []
    for number, (_, target, pictures) in enumerate(clips):
        slots = visualize.frame_slots(target)
        taken += target["frame_ids"][slots].tolist()
        shades += [pictures[slot].mean() for slot in slots]
        times += [target["times"][slot] for slot in slots]
        if 0 < number < len(clips) - 1:
            assert slots == [2, 3, 4, 5], "two frames of each side are seen, and taken elsewhere"
    assert taken == list(range(1, length + 1))
    np.testing.assert_allclose(shades, [5 + 10 * i % 240 for i in range(length)], atol=4)
    np.testing.assert_allclose(times, np.arange(length) / 10, atol=1e-3)
    clip, last = clips[-1][0], visualize.frame_slots(clips[-1][1])[-1]
    assert (clip[:, last:] == clip[:, [last]]).all(), "filled up with the last frame"
    unseen = list(visualize.video_clips(path, CONFIG, 10, seen=False))
    for (_, target, pictures), (clip, same_target, same_pictures) in zip(clips, unseen):
        assert clip is None and target["times"] == same_target["times"]
        np.testing.assert_array_equal(pictures, same_pictures)


def test_a_key_frame_model_sees_one_frame_a_second(tmp_path):
    pytest.importorskip("av")
    config = replace(CONFIG, key_frame=True)
    clips = list(visualize.video_clips(write_video(tmp_path / "in.mp4", 35), config, 10))
    assert [target["frame_ids"].tolist() for _, target, _ in clips] == [[1], [2], [3], [4]]
    shades = [np.mean(pictures) for _, _, pictures in clips]            # the last has its middle,
    np.testing.assert_allclose(shades, [5 + 40, 5 + 140, 5, 5 + 100], atol=4)   # if not its end
    config = replace(config, sampling_rate=4)                           # 29 frames a clip
    for length in (3, 17, 29, 36, 37, 57):
        path = write_video(tmp_path / f"{length}.mp4", length)
        clips = visualize.video_clips(path, config, 10)
        times = [target["times"][0] for _, target, _ in clips]
        expected = np.arange(16, length, 10) / 10 if length > 16 else [(length - 1) / 10]
        np.testing.assert_allclose(times, expected, atol=1e-3)


@pytest.mark.parametrize("name, rate, seconds", [("ucf", 25, [1.0, 1.04, 2.0]),
                                                 ("custom", 1, [25, 26, 50]),
                                                 ("ava", 25, [26, 27, 51])])
def test_times_of_a_data_set_s_clips_follow_from_the_frame_numbers(name, rate, seconds):
    class Three(list):
        pass

    dataset = Three()
    dataset.name = name
    for number in (26, 27, 51):
        clip, target, _ = clip_of()
        dataset.append((clip, {**target, "frame_ids": torch.tensor([number])}))
    clips = visualize.dataset_clips(dataset, range(3), rate)
    assert [target["times"][0] for _, target, _ in clips] == seconds


# ---- the command ----

def command(folder, monkeypatch, *options, names=NAMES, **changes):
    """visualize.main with an untrained checkpoint and these options, without signal handlers."""
    config = replace(CONFIG, **changes)
    content = {"model": VideoActionDetector(config).state_dict(), "config": asdict(config),
               "dataset": "synthetic", "classes": names}
    torch.save(content, folder / "c.pt")
    monkeypatch.setattr(visualize, "start", lambda device: (torch.device(device), 0))
    visualize.main(["--ckpt", str(folder / "c.pt"), "--device", "cpu", *map(str, options)])


def test_command_line_writes_video_sheet_and_tubes_of_your_own_video(
        tmp_path, capsys, monkeypatch):
    av = pytest.importorskip("av")
    path, out = write_video(tmp_path / "in.mp4", 11), tmp_path / "out"
    options = ["--video", path, "--out", out, "--min-score", "0.01"]
    command(tmp_path, monkeypatch, *options, "--classes", "sit,run", "--look-from", "0.5", "0.5")
    assert str(out / "in.mp4") in capsys.readouterr().out
    with av.open(str(out / "in.mp4")) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert len(frames) == 11 and frames[0].shape == (360 + BAND, 3 * 480, 3)
    assert Image.open(out / "in.png").size == (2 * (3 * 317 + 8), 3 * (238 + BAND + 8))
    assert Image.open(out / "in-points.png").size == (4 * 480, 2 * (361 + BAND) + 24)    # 64 x 85
    record = json.loads((out / "tubes.json").read_text())
    assert (record["rate"], record["size"], record["classes"]) == (10, [60, 80], NAMES)
    assert record["actors"], "untrained scores are above 0.01"
    for actor in record["actors"]:
        labels = [part["label"] for part in actor["tubes"]]
        assert len(set(labels)) == len(labels) and set(labels) <= set(NAMES)
        for part in actor["tubes"]:
            assert len(part["frames"]) == len(part["boxes"]) >= 4
    command(tmp_path, monkeypatch, *options, "--no-maps", "--width", "320")
    with av.open(str(out / "in.mp4")) as container:
        assert container.streams.video[0].width <= 320


def test_times_of_a_video_of_uneven_rate_are_kept(tmp_path, monkeypatch):
    av = pytest.importorskip("av")
    uneven = [0.0, 0.1, 0.2, 0.9, 1.0, 1.7, 1.75, 2.5, 3.0, 3.04, 4.0, 4.5]
    shades = (np.full((60, 80, 3), 20 * i, np.uint8) for i in range(12))
    visualize.save_video(tmp_path / "in.mp4", shades, 3, uneven)
    out = tmp_path / "out"
    command(tmp_path, monkeypatch, "--video", tmp_path / "in.mp4", "--out", out, "--min-score",
            "0.01")
    with av.open(str(out / "in.mp4")) as container:
        times = [frame.time for frame in container.decode(video=0)]
    np.testing.assert_allclose(times, uneven, atol=2e-3)
    lines = list(csv.reader((out / "tubes.csv").open()))
    for actor in json.loads((out / "tubes.json").read_text())["actors"]:
        for part in actor["tubes"]:
            label = str(NAMES.index(part["label"]) + 1)
            ours = [line for line in lines if (line[6], line[8]) == (label, str(actor["actor"]))]
            assert [float(line[1]) for line in ours] == part["seconds"]
            expected = np.take(uneven, np.array(part["frames"]) - 1)
            np.testing.assert_allclose(part["seconds"], expected, atol=2e-3)


def test_a_checkpoint_that_names_no_classes_knows_those_of_its_data_set(tmp_path, monkeypatch):
    pytest.importorskip("av")
    path = write_video(tmp_path / "in.mp4", 3)
    options = ["--video", path, "--out", tmp_path / "out", "--no-maps"]
    for count, name in [(24, "Fencing"), (21, "kick_ball"), (80, "listen to (a person)")]:
        command(tmp_path, monkeypatch, *options, "--classes", name, names=None, num_classes=count)
    with pytest.raises(SystemExit, match="unknown class Fencing; .* knows: class 1, class 2"):
        command(tmp_path, monkeypatch, *options, "--classes", "Fencing", names=None)


def test_readme_s_example_gives_boxes_scores_and_attention(tmp_path, monkeypatch):
    pytest.importorskip("av")
    readme = (Path(visualize.__file__).parent / "README.md").read_text()
    (example,) = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    content = {"model": VideoActionDetector(CONFIG).state_dict(), "config": asdict(CONFIG),
               "dataset": "synthetic", "classes": NAMES}
    torch.save(content, tmp_path / "UCF.pth")
    write_video(tmp_path / "in.mp4", 11)
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(example, names)
    frames, actors = CONFIG.frames, CONFIG.num_queries
    assert names["boxes"].shape == (frames, actors, 4)
    assert names["prob"].shape == (frames, actors, 3)
    assert names["attention"].shape[:3] == (frames, actors, 3)
