"""visualize.py: pictures whose pixels are known beforehand, from stand-ins that say where the actors are and look."""
import contextlib
import csv
import json
import re
import sys
from dataclasses import asdict, replace
from fractions import Fraction
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import encoder
import visualize
from data import draw_view, render
from model import PRESETS, VideoActionDetector

CONFIG = replace(PRESETS["synthetic"], num_classes=3, num_queries=4)        # clips of 8 frames
NAMES = ["run", "sit", "wave"]
CELLS = (5, 7)                                                               # H', W' of the stand-in's attention


class LooksAt(nn.Module):
    """Two actors, the first doing classes 0 and 2, the second class 1; its attention is one cell for each class."""

    def __init__(self, cells=((0, 0), (4, 6), (0, 6)), boxes=((0.3, 0.4, 0.2, 0.4), (0.7, 0.6, 0.2, 0.4)), drift=0.0):
        super().__init__()
        self.cells, self.boxes, self.drift = cells, torch.tensor(boxes), drift

    def forward(self, clips, padding_mask=None, return_attention=False):
        frames = clips.shape[2]
        boxes = torch.cat([torch.full((2, 4), 0.5), self.boxes])            # queries 2 and 3 are the actors
        logits = torch.full((4, 3), -8.0)
        logits[2, 0], logits[2, 2], logits[3, 1] = 4, 2, 3
        move = self.drift * torch.arange(frames)[:, None, None] * torch.tensor([1, 0, 0, 0])            # to the right
        out = {"pred_boxes": (boxes + move)[None], "pred_logits": logits.expand(1, frames, 4, 3),
               "pred_conf": torch.tensor([-5.0, -5.0, 5.0, 5.0]).expand(1, frames, 4)}
        if return_attention:
            maps = torch.zeros(4, 3, *CELLS)
            for c, (i, j) in enumerate(self.cells):
                maps[2:, c, i, j] = 0.01
            out["attention"] = maps.expand(1, frames, *maps.shape)
        return out


def clip_of(frames=8, first=1, size=(60, 80)):
    """(clip, target, pictures): black frames, as visualize.dataset_clips gives them."""
    pictures = np.zeros((frames, *size, 3), np.uint8)
    clip = render([Image.fromarray(picture) for picture in pictures], draw_view(size, CONFIG, train=False))
    return clip, {"video": "v", "frame_ids": torch.arange(first, first + frames), "size": torch.tensor(size),
                  "frames": torch.ones(frames, dtype=torch.bool), "times": (torch.arange(frames) / 4).tolist()}, pictures


@pytest.mark.parametrize("size", [(60, 80), (61, 47), (240, 320)])
def test_a_bright_cell_lands_on_its_place_of_the_frame(size):
    for i, j in [(0, 0), (0, 6), (4, 0), (4, 6), (2, 3)]:
        cell = torch.zeros(1, *CELLS)
        cell[0, i, j] = 0.02
        full = visualize.upsample(cell, size)[0]
        assert full.shape == size and full.max() > 0.8
        inner = cell.new_zeros(1, *CELLS).numpy()[0]                         # mass of the picture's cells, back again
        rows, columns = (np.arange(size[0]) + 0.5) * 5 // size[0], (np.arange(size[1]) + 0.5) * 7 // size[1]
        np.add.at(inner, (rows.astype(int)[:, None], columns.astype(int)[None]), full)
        assert np.unravel_index(inner.argmax(), CELLS) == (i, j)
        if 0 < i < 4:                                                        # symmetric around the cell's centre
            centre = [(full.sum(1 - axis) * (np.arange(size[axis]) + 0.5)).sum() / full.sum() for axis in (0, 1)]
            expected = [(i + 0.5) * size[0] / 5, (j + 0.5) * size[1] / 7]
            np.testing.assert_allclose(centre, expected, atol=1e-3 * max(size))


def test_attention_panels_shine_where_the_model_looks_in_the_colour_of_the_actor():
    model, clips = LooksAt(), [clip_of()]
    actors, frames = visualize.find_actors(model, clips, CONFIG, "cpu", min_score=0.3)
    picture = next(visualize.draw(model, clips, actors, NAMES, CONFIG, "cpu", classes=[0, 1, 2]))
    height, width = 240, 320                                                 # 60 x 80, four times
    assert frames == {"number": list(range(1, 9)), "seconds": [i / 4 for i in range(8)], "size": [60, 80]}
    assert picture.shape == (height + visualize.BAND, 4 * width, 3)
    for panel, (i, j) in enumerate(LooksAt().cells, 1):
        frame = picture[visualize.BAND:, panel * width:(panel + 1) * width].astype(float)
        corners = {(y, x): frame[y * 220:, x * 300:][:20, :20].mean((0, 1)) for y in (0, 1) for x in (0, 1)}
        lit = corners.pop((i // 4, j // 6))
        # both actors look there: the second one's colour is laid over the first one's
        assert np.abs(lit / lit.sum() - np.array(visualize.COLOURS[1]) / sum(visualize.COLOURS[1])).max() < 0.1
        assert lit.sum() > 300 and all(dark.sum() < 5 for dark in corners.values())


def test_best_class_panel_shows_each_actor_s_own_map():
    model, clips = LooksAt(), [clip_of()]
    actors, _ = visualize.find_actors(model, clips, CONFIG, "cpu", min_score=0.3)
    picture = next(visualize.draw(model, clips, actors, NAMES, CONFIG, "cpu"))
    frame = picture[visualize.BAND:, 320:].astype(int)
    assert picture.shape[1] == 640
    assert frame[2, 2].argmax() == np.argmax(visualize.COLOURS[0]) and frame[2, 2].sum() > 300     # run: top left
    assert frame[-2, -2].argmax() == np.argmax(visualize.COLOURS[1]) and frame[-2, -2].sum() > 300  # sit: bottom right
    assert frame[2, -2].sum() < 5                                            # wave is not the first actor's best class


def test_tubes_in_one_place_are_one_actor_and_boxes_are_drawn_where_they_are():
    model, clips = LooksAt(), [clip_of(), clip_of(first=9)]
    actors, frames = visualize.find_actors(model, clips, CONFIG, "cpu", min_score=0.3)
    assert frames["number"] == list(range(1, 17))
    assert [[tube["label"] for tube in tubes] for tubes in actors] == [[0, 2], [1]]
    assert all(tube["frames"].tolist() == list(range(1, 17)) for tubes in actors for tube in tubes), "linked over clips"
    picture = list(visualize.draw(model, clips, actors, NAMES, CONFIG, "cpu"))[11][visualize.BAND:, :320]
    for index, (cx, cy, w, h) in enumerate(LooksAt().boxes.tolist()):
        left, right = round((cx - w / 2) * 320), round((cx + w / 2) * 320)
        bottom = round((cy + h / 2) * 240)
        for y, x in [(bottom, (left + right) // 2), (bottom - 20, left), (bottom - 20, right)]:
            near = picture[max(y - 2, 0):y + 3, x - 2:x + 3].reshape(-1, 3)
            assert (near == visualize.COLOURS[index]).all(1).any(), (index, y, x)
    assert not visualize.find_actors(model, clips, CONFIG, "cpu", min_score=0.999)[0]


def test_actors_of_the_same_frames_have_colours_of_their_own_and_later_ones_take_them_over():
    spans = [(1, 10), (5, 20), (1, 4), (11, 30), (21, 30), (1, 30)]
    actors = [[{"frames": np.arange(first, last + 1)}] for first, last in spans]
    assert [visualize.COLOURS.index(colour) for colour in visualize.choose_colours(actors)] == [0, 1, 1, 0, 1, 2]
    assert len(visualize.choose_colours([actors[0]] * 25)) == 25


def test_tubes_are_in_one_place_above_half_an_overlap_on_the_frames_they_share():
    def tube(first, shift):
        return {"frames": np.arange(first, first + 4), "boxes": np.array([[shift, 0, shift + 10, 10.0]] * 4)}
    assert visualize.same_place(tube(1, 0), tube(4, 3)) and not visualize.same_place(tube(1, 0), tube(4, 4))
    assert not visualize.same_place(tube(1, 0), tube(5, 0)), "no frame in common"


def test_labels_stay_inside_the_picture_and_off_each_other():
    boxes = np.array([[-5, -5, 30, 30], [-5, -5, 31, 31], [300, 200, 330, 250.0], [310, 0, 319, 20]])
    colours = visualize.COLOURS[:4]
    picture = visualize.draw_boxes(np.zeros((240, 320, 3), np.uint8), boxes, [["somebody waves 0.93"]] * 4, colours)
    areas = [(picture == colour).all(-1) for colour in colours]
    assert all(area.sum() > 1500 for area in areas), "each label's ground is to be seen whole: about 150 x 19 pixels"
    assert np.unique(areas[2].nonzero()[1]).size > 120, "the label at the right edge is moved in, not cut off"


def test_a_video_of_odd_size_plays_with_all_its_frames(tmp_path):
    av = pytest.importorskip("av")
    shades = [np.full((61, 83, 3), 10 + 12 * i, np.uint8) for i in range(19)]
    visualize.save_video(tmp_path / "a.mp4", iter(shades), 12.5)
    with av.open(str(tmp_path / "a.mp4")) as container:
        stream = container.streams.video[0]
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        assert stream.average_rate == Fraction(25, 2) and stream.codec_context.pix_fmt == "yuv420p"
    assert len(frames) == 19 and frames[0].shape == (62, 84, 3)
    assert all(abs(float(frame.mean()) - shade.mean()) < 4 for frame, shade in zip(frames, shades))


def test_frames_of_undoes_the_normalisation():
    pictures = np.random.default_rng(0).integers(0, 256, (2, 64, 80, 3), dtype=np.uint8)
    clip = render([Image.fromarray(picture) for picture in pictures], draw_view((64, 80), CONFIG, train=False))
    np.testing.assert_array_equal(visualize.frames_of(clip), pictures)


class Labelled(torch.utils.data.Dataset):
    """Clips of one video; the first actor has two labels and a cause, the second none; clip 0 has no label at all."""
    name, videos, class_names = "labelled", ["v"], NAMES

    def __init__(self, labelled=True):
        self.labelled = labelled

    def __len__(self):
        return 3

    def __getitem__(self, index):
        clip, target, _ = clip_of(size=(64, 80))
        labels = torch.zeros(2, 8, 3)
        labels[0, 4:, [0, 2]] = float(self.labelled and index > 0)
        causes = torch.full((2, 8, 4), float("nan"))
        causes[0] = torch.tensor([0.8, 0.2, 0.1, 0.1])
        target["frames"][0] = False                                          # padding in front
        move = 0.02 * torch.arange(8)[:, None] * torch.tensor([1, 0, 0, 0])
        return clip, target | {"boxes": LooksAt().boxes[:, None] + move, "present": torch.ones(2, 8, dtype=torch.bool),
                               "labels": labels, "cause": causes}


class Rare(Labelled):
    """200 clips, of which clip 1 alone has labels."""

    def __init__(self):
        super().__init__()
        self.asked = []

    def __len__(self):
        return 200

    def __getitem__(self, index):
        self.asked.append(index)
        return super().__getitem__(int(index == 1))


def test_training_curves_go_through_the_means_of_the_steps(tmp_path, monkeypatch):
    from matplotlib.figure import Figure
    figures, init = [], Figure.__init__
    monkeypatch.setattr(Figure, "__init__", lambda self, *args, **options: figures.append(self) or init(self, *args, **options))
    lines = [{"epoch": i / 100, "a": float(i), "b": 1.0, "loss": i + 1.0, "lr": 1e-3, "grad_norm": 2.0} for i in range(1, 1202)]
    history = [{"epoch": e, "f-mAP@0.5": e / 20, "v-mAP@0.2": 0.9, "f-mAP@0.5 own": 0.3} for e in (4, 8, 12)]
    visualize.training_curves(lines, history, ("a", "b"), tmp_path / "curves.png")
    parts, loss, rates, maps = figures[0].axes
    (a, b), curves = parts.get_lines(), {line.get_label(): line for line in maps.get_lines()}
    np.testing.assert_allclose(a.get_ydata(), np.arange(1, 1201).reshape(-1, 2).mean(1))        # 600 points of two steps
    assert set(b.get_ydata()) == {1.0} and len(loss.get_lines()) == 1 and len(rates.get_lines()) == 2
    assert set(curves) == {"f-mAP@0.5", "f-mAP@0.5 own"}
    np.testing.assert_allclose(curves["f-mAP@0.5"].get_xydata(), [(4, 0.2), (8, 0.4), (12, 0.6)])
    assert Image.open(tmp_path / "curves.png").size == (960, 560)


def test_attention_sheet_has_a_line_per_labelled_actor_and_a_map_per_label(tmp_path):
    model = LooksAt(drift=0.02).train()
    visualize.attention_sheet(model, Labelled(), CONFIG, tmp_path / "new" / "attention.png", "cpu")
    sheet = np.asarray(Image.open(tmp_path / "new" / "attention.png"))
    height, width = 256 + visualize.BAND, 320
    assert sheet.shape == (2 * height, 3 * width, 3) and model.training
    first_map, second_map = sheet[visualize.BAND:height, width:2 * width], sheet[visualize.BAND:height, 2 * width:]
    assert first_map[2, 2].sum() > 300 and first_map[2, -3].sum() < 30       # run looks top left
    assert second_map[2, -3].sum() > 300 and second_map[2, 2].sum() < 30     # wave looks top right
    assert (first_map[63:65, 241:270] == 255).all(), "the lower edge of the cause, white: x 240 to 272, y 38.4 to 64"
    left = round((0.3 - 0.1 + 0.02 * 4) * 320)                               # at frame 5, the first with labels
    assert (sheet[visualize.BAND + 130, left] == visualize.COLOURS[0]).all(), "the query's box lies on the true one"
    assert not (sheet[visualize.BAND:height, :left - 3] == 255).all(-1).any(), "nor is the true one elsewhere"
    rare = Rare()
    visualize.attention_sheet(model, rare, CONFIG, tmp_path / "rare.png", "cpu")
    assert rare.asked[:3] == [0, 13, 26] and rare.asked[-1] == 1, "clips spread over the set first, then those between"
    assert Image.open(tmp_path / "rare.png").size == (3 * width, height)
    with pytest.raises(ValueError, match="no clip of labelled with a label"):
        visualize.attention_sheet(model, Labelled(labelled=False), CONFIG, tmp_path / "none.png", "cpu")


def write_video(path, frames, rate=10, size=(60, 80)):
    shades = (np.full((*size, 3), 5 + 10 * i % 240, np.uint8) for i in range(frames))
    visualize.save_video(path, shades, rate)
    return path


def test_a_video_file_is_cut_into_clips_that_take_each_frame_once_from_their_middles(tmp_path):
    pytest.importorskip("av")
    for length in (1, 7, 8, 9, 19, 24):
        path = write_video(tmp_path / "in.mp4", length)
        clips = list(visualize.video_clips(path, CONFIG, visualize.video_rate(path)))
        assert visualize.video_rate(path) == 10 and {clip.shape for clip, _, _ in clips} == {(3, 8, 64, 85)}
        taken = [target["frame_ids"][target["frames"]].tolist() for _, target, _ in clips]
        assert sum(taken, []) == list(range(1, length + 1))
        for ids, (_, target, _) in zip(taken[1:-1], clips[1:-1]):
            assert ids == target["frame_ids"][2:6].tolist(), "two frames of each side are seen, and taken elsewhere"
        shades = np.concatenate([pictures[target["frames"].numpy()] for _, target, pictures in clips]).mean((1, 2, 3))
        np.testing.assert_allclose(shades, [5 + 10 * i % 240 for i in range(length)], atol=4)
        times = [second for _, target, _ in clips for second, shown in zip(target["times"], target["frames"]) if shown]
        np.testing.assert_allclose(times, np.arange(length) / 10, atol=1e-3)
        clip, frames = clips[-1][0], int(clips[-1][1]["frames"].nonzero().max())
        assert torch.equal(clip[:, frames:], clip[:, [frames]].expand_as(clip[:, frames:])), "filled up with the last frame"


def test_a_key_frame_model_sees_one_frame_a_second(tmp_path):
    pytest.importorskip("av")
    path, config = write_video(tmp_path / "in.mp4", 35), replace(CONFIG, key_frame=True)
    clips = list(visualize.video_clips(path, config, 10))
    longer = list(visualize.video_clips(path, replace(config, sampling_rate=4), 10))      # 29 frames a clip, from 10 to 10
    assert [target["times"] for _, target, _ in longer] == [(pytest.approx(second, abs=1e-3),) for second in (1.6, 2.6)]
    np.testing.assert_allclose([pictures.mean() for _, _, pictures in longer], [5 + 160, 5 + 20], atol=4)
    for length in (3, 17, 29, 36, 37, 57):                                  # every second whose middle frame there is
        path = write_video(tmp_path / f"{length}.mp4", length)
        times = [target["times"][0] for _, target, _ in
                 visualize.video_clips(path, replace(config, sampling_rate=4), 10)]
        np.testing.assert_allclose(times, np.arange(16, length, 10) / 10 if length > 16 else [(length - 1) / 10], atol=1e-3)
    assert [target["frame_ids"].tolist() for _, target, _ in clips] == [[1], [2], [3], [4]]
    assert [len(pictures) for _, _, pictures in clips] == [1, 1, 1, 1], "the last one has its middle, if not its end"
    np.testing.assert_allclose([pictures.mean() for _, _, pictures in clips], [5 + 40, 5 + 140, 5, 5 + 100], atol=4)


def test_files_that_are_no_videos_are_clear_errors(tmp_path):
    av = pytest.importorskip("av")
    with pytest.raises(SystemExit, match="video missing: .*none.mp4"):
        visualize.video_rate(tmp_path / "none.mp4")
    (tmp_path / "text.mp4").write_text("not a video")
    with pytest.raises(SystemExit, match="text.mp4 cannot be read as a video"):
        visualize.video_rate(tmp_path / "text.mp4")
    with av.open(str(tmp_path / "sound.wav"), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
    with pytest.raises(SystemExit, match="sound.wav holds no video stream"):
        visualize.video_rate(tmp_path / "sound.wav")


def command(folder, monkeypatch, *options, names=NAMES, **changes):
    """visualize.main with an untrained checkpoint and these options, without signal handlers."""
    torch.manual_seed(0)
    config = replace(CONFIG, **changes)
    content = {"model": VideoActionDetector(config).state_dict(), "config": asdict(config), "dataset": "synthetic",
               "classes": names}
    torch.save(content, folder / "c.pt")
    monkeypatch.setattr(visualize, "start", lambda device: (torch.device(device), 0))
    visualize.main(["--ckpt", str(folder / "c.pt"), "--device", "cpu", *map(str, options)])


def test_times_of_a_video_of_uneven_rate_are_kept(tmp_path, monkeypatch):
    av = pytest.importorskip("av")
    uneven = [0.0, 0.1, 0.2, 0.9, 1.0, 1.7, 1.75, 2.5, 3.0, 3.04, 4.0, 4.5]
    shades = (np.full((60, 80, 3), 20 * i, np.uint8) for i in range(12))
    visualize.save_video(tmp_path / "in.mp4", shades, 3, uneven)
    command(tmp_path, monkeypatch, "--video", tmp_path / "in.mp4", "--out", tmp_path / "out", "--min-score", "0.01")
    with av.open(str(tmp_path / "out" / "in.mp4")) as container:
        np.testing.assert_allclose([frame.time for frame in container.decode(video=0)], uneven, atol=2e-3)
    lines = list(csv.reader((tmp_path / "out" / "tubes.csv").open()))
    (tube, *_), *_ = (actor["tubes"] for actor in json.loads((tmp_path / "out" / "tubes.json").read_text())["actors"])
    ours = [line for line in lines if line[6] == str(NAMES.index(tube["label"]) + 1) and float(line[7]) == tube["score"]]
    for frame, box in zip(tube["frames"], tube["boxes"]):
        (line,) = [line for line in ours if float(line[1]) == pytest.approx(uneven[frame - 1], abs=2e-3)]
        assert line[0] == "in"
        np.testing.assert_allclose([float(x) for x in line[2:6]], np.array(box) / [80, 60, 80, 60], atol=2e-3)


def test_a_folder_of_videos_is_shared_over_processes_and_goes_on_where_it_was_left(tmp_path, monkeypatch, capsys):
    pytest.importorskip("av")
    (tmp_path / "in" / "deep").mkdir(parents=True)
    for name in ("a.mp4", "c.avi", "deep/b.mp4"):
        write_video(tmp_path / "in" / name, 3)
    (tmp_path / "in" / "broken.mp4").write_bytes((tmp_path / "in" / "a.mp4").read_bytes()[:300])
    (tmp_path / "in" / "notes.txt").write_text("not looked at")
    options = ["--video", tmp_path / "in", "--out", tmp_path / "out"]
    find = visualize.find_videos
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(visualize, "find_videos", lambda *where: find(*where)[1:] + find(*where)[:1])    # broken comes first
    command(tmp_path, monkeypatch, *options)                                 # else torchrun would end the other process
    assert "broken.mp4 cannot be read as a video" in capsys.readouterr().out
    first = sorted(path.parent.name for path in (tmp_path / "out").rglob("tubes.json"))
    assert len(first) == 1
    monkeypatch.undo()
    with pytest.raises(SystemExit, match="1 videos could not be read:\n.*broken.mp4 cannot be read as a video"):
        command(tmp_path, monkeypatch, *options)
    assert sorted(path.parent.name for path in (tmp_path / "out").rglob("tubes.json")) == ["a", "b", "c"]
    said = capsys.readouterr().out
    assert said.count("is done") == 1 and f"{first[0]}/tubes.json is there" in said
    found = visualize.find_videos([tmp_path], tmp_path / "out")
    assert sorted(path.name for path in found) == ["a.mp4", "b.mp4", "broken.mp4", "c.avi"], "results are no videos to look at"
    write_video(tmp_path / "in" / "deep" / "a.mp4", 3)
    with pytest.raises(SystemExit, match="several videos are called a"):
        command(tmp_path, monkeypatch, *options)
    with pytest.raises(SystemExit, match="no video .* in .*empty"):
        (tmp_path / "empty").mkdir()
        command(tmp_path, monkeypatch, "--video", tmp_path / "empty", "--out", tmp_path / "out")


def test_a_signal_ends_a_folder_of_videos_and_is_no_broken_video(tmp_path, monkeypatch):
    pytest.importorskip("av")
    (tmp_path / "in").mkdir()
    for name in "ab":
        write_video(tmp_path / "in" / f"{name}.mp4", 3)
    met = []
    monkeypatch.setattr(visualize, "visualize", lambda model, clips, video, *rest, **options: met.append(video) or sys.exit(143))
    with pytest.raises(SystemExit) as ended:
        command(tmp_path, monkeypatch, "--video", tmp_path / "in", "--out", tmp_path / "out")
    assert ended.value.code == 143 and met == ["a"]


def test_a_result_never_takes_the_place_of_its_video(tmp_path, monkeypatch):
    pytest.importorskip("av")
    content = write_video(tmp_path / "in.mp4", 3).read_bytes()
    with pytest.raises(SystemExit, match="in.mp4 would be overwritten by its own result: choose another --out"):
        command(tmp_path, monkeypatch, "--video", tmp_path / "in.mp4", "--out", tmp_path)
    assert (tmp_path / "in.mp4").read_bytes() == content


def test_a_phone_s_video_stands_upright(tmp_path, monkeypatch):
    pytest.importorskip("av")
    path = write_video(tmp_path / "in.mp4", 2)

    class Turned:                                                            # as PyAV gives a frame to be turned clockwise
        width, height, time, rotation = 4, 2, 0.0, -90

        def reformat(self, width, height, kind):
            return SimpleNamespace(to_ndarray=lambda: np.arange(24, dtype=np.uint8).reshape(height, width, 3))

    @contextlib.contextmanager
    def opened(path):
        yield SimpleNamespace(decode=lambda stream: [Turned()]), SimpleNamespace()
    monkeypatch.setattr(visualize, "open_video", opened)
    ((picture, _),) = visualize.video_frames(path, 10)
    assert picture.shape == (4, 2, 3), "wider than high becomes higher than wide"
    assert picture[0, -1].tolist() == [0, 1, 2], "the upper left corner goes to the upper right"


def test_a_checkpoint_of_24_classes_that_does_not_name_them_knows_ucf_s(tmp_path, monkeypatch):
    pytest.importorskip("av")
    path = write_video(tmp_path / "in.mp4", 3)
    command(tmp_path, monkeypatch, "--video", path, "--out", tmp_path / "out", "--classes", "Fencing", names=None, num_classes=24)
    assert json.loads((tmp_path / "out" / "tubes.json").read_text())["classes"][6] == "Fencing"
    with pytest.raises(SystemExit, match="knows: class 1, class 2"):
        command(tmp_path, monkeypatch, "--video", path, "--out", tmp_path / "out", "--classes", "Fencing", names=None)


@pytest.mark.parametrize("name, rate, seconds", [("ucf", 25, [1.0, 1.04, 2.0]), ("custom", 1, [25, 26, 50]), ("ava", 25, [26, 27, 51])])
def test_times_of_a_data_set_s_clips_follow_from_the_frame_numbers(tmp_path, monkeypatch, name, rate, seconds):
    pytest.importorskip("av")

    class Three(list):
        pass

    dataset, config = Three(), replace(CONFIG, key_frame=True)              # a frame a clip, as the boxes of `tube`
    dataset.name = name
    for number in (26, 27, 51):
        clip, target, _ = clip_of()
        dataset.append((clip, {**target, "frame_ids": torch.tensor([number]), "frames": torch.tensor([True])}))
    args = SimpleNamespace(min_score=0.3, top=3, heads="all", look_from=None)
    monkeypatch.setattr(visualize, "run", lambda *_, **__: (None, {
        "video": np.zeros((1, 1), int), "frame": np.zeros((1, 1), int), "box": np.zeros((1, 1, 4)),
        "class_prob": np.zeros((1, 1, 3)), "conf": np.zeros((1, 1))}))
    monkeypatch.setattr(visualize, "link_tubes", lambda *_, **__: [
        {"label": 0, "score": 0.5, "frames": np.array([26, 27, 51]), "boxes": np.zeros((3, 4))}])
    monkeypatch.setattr(visualize, "draw", lambda *_: iter(np.zeros((3, 60, 80, 3), np.uint8)))
    clips = partial(visualize.dataset_clips, dataset, range(3), config, rate)
    visualize.visualize(None, clips, "v", rate, config, "cpu", tmp_path, args, NAMES)
    assert [float(line[1]) for line in csv.reader((tmp_path / "tubes.csv").open())] == seconds
    assert json.loads((tmp_path / "tubes.json").read_text())["actors"][0]["tubes"][0]["seconds"] == seconds


def test_videos_that_break_off_or_hold_nothing_are_clear_errors(tmp_path, monkeypatch):
    pytest.importorskip("av")
    whole = write_video(tmp_path / "in.avi", 60, size=(120, 160)).read_bytes()
    for name, content, message in [("empty.mp4", b"", "empty.mp4 cannot be read as a video"),
                                   ("head.avi", whole[:600], "head.avi (cannot be|holds)|the video is empty")]:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(SystemExit, match=message):
            command(tmp_path, monkeypatch, "--video", tmp_path / name, "--out", tmp_path / "out")
        assert not (tmp_path / "out").exists()


def test_content_heads_are_those_of_split_heads(tmp_path, monkeypatch):
    clip = torch.randn(1, 3, 8, 64, 96)
    model = VideoActionDetector(replace(CONFIG, quirks=("split_heads",))).eval()
    layer, seen = model.decoder.classifying[-1], []
    keep = layer.attention_maps
    layer.attention_maps = lambda *arguments: seen.append(keep(*arguments)) or seen[-1]
    with torch.no_grad():
        both = model(clip, return_attention=True)["attention"].flatten(-2).flatten(0, 2)             # (I, C, N)
        content = model(clip, return_attention="content")["attention"].flatten(-2).flatten(0, 2)
    maps = [torch.cat(parts) for parts in zip(*seen[:len(seen) // 2])]                               # (I, M/2, C or 1, N)
    assert torch.allclose(content, maps[0].mean(1), atol=1e-6)
    assert torch.allclose(both, (maps[0].mean(1) + maps[1].mean(1)) / 2, atol=1e-6)
    with pytest.raises(SystemExit, match="--heads content: .*no quirk split_heads"):
        command(tmp_path, monkeypatch, "--heads", "content", "--clip", "0")


def test_sampling_points_are_those_that_the_encoder_samples(monkeypatch):
    model = VideoActionDetector(CONFIG).eval()
    layer, calls = model.encoder.layers[-1], []
    torch.nn.init.normal_(layer.sampling_offsets.weight, std=0.1)
    torch.nn.init.normal_(layer.attention_weights.weight, std=0.1)
    sample = encoder.deform_attn_3d_fused
    monkeypatch.setattr(encoder, "deform_attn_3d_fused", lambda *arguments: calls.append(arguments) or sample(*arguments))
    points, levels, weights = visualize.sampling_points(model, torch.randn(3, 8, 64, 96), (0.5, 0.99, 0.3), "cpu")
    _, shapes, references, offsets, logits, scales = calls[0]
    (t, h, w), cell = shapes[0], (4 * 8 + 7) * 12 + 3                        # of the first map, 8 x 8 x 12
    assert (t, h, w) == (8, 8, 12)
    where = references[0, cell][None, :, None] + offsets[0, cell] * scales[:, None]                  # (M, L, P, 3)
    np.testing.assert_allclose(points, where.reshape(-1, 3).numpy(), atol=1e-6)
    np.testing.assert_allclose(weights.reshape(CONFIG.num_heads, -1).sum(1), 1 / CONFIG.num_heads, rtol=1e-5)
    assert levels.reshape(where.shape[:3])[2].tolist() == [[0, 0], [1, 1]]
    pictures = np.zeros((8, 64, 96, 3), np.uint8)
    panels = visualize.draw_points(pictures, np.array([[0.3, 0.5, 0.25]]), np.array([1]), np.array([0.25]), (0.5, 0.5, 0.5))
    assert len(panels) == 8 and [bool(panel[visualize.BAND:].any()) for panel in panels] == [i in (2, 4) for i in range(8)]
    ring = (panels[2][visualize.BAND:] == visualize.COLOURS[1]).all(-1).nonzero()
    np.testing.assert_allclose([place.mean() for place in ring], [128, 96], atol=1)                  # of 256 x 384


def test_command_line_writes_video_sheet_and_tubes_of_one_s_own_video(tmp_path, capsys, monkeypatch):
    av = pytest.importorskip("av")
    path = write_video(tmp_path / "in.mp4", 11)
    options = ["--video", path, "--out", tmp_path / "out"]
    command(tmp_path, monkeypatch, *options, "--min-score", "0.01", "--classes", "sit,run", "--look-from", "0.5", "0.5")
    assert Image.open(tmp_path / "out" / "in-points.png").size == (8 * 340, 278)                # what the model sees, 64 x 85
    assert str(tmp_path / "out" / "in.mp4") in capsys.readouterr().out
    with av.open(str(tmp_path / "out" / "in.mp4")) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert len(frames) == 11 and frames[0].shape == (262, 960, 3)
    assert Image.open(tmp_path / "out" / "in.png").size == (960, 6 * 262)
    record = json.loads((tmp_path / "out" / "tubes.json").read_text())
    assert record["rate"] == 10 and record["size"] == [60, 80] and record["classes"] == NAMES and record["actors"], "untrained scores are above 0.01"
    for actor in record["actors"]:
        for tube in actor["tubes"]:
            assert tube["label"] in NAMES and len(tube["frames"]) == len(tube["boxes"]) >= 4
    with pytest.raises(SystemExit, match="unknown classes fly; .* knows: run, sit, wave"):
        command(tmp_path, monkeypatch, *options, "--classes", "fly")


def test_readme_s_example_gives_boxes_scores_and_attention(tmp_path, monkeypatch):
    pytest.importorskip("av")
    readme = (Path(visualize.__file__).parent / "README.md").read_text()
    (example,) = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    content = {"model": VideoActionDetector(CONFIG).state_dict(), "config": asdict(CONFIG), "dataset": "synthetic",
               "classes": NAMES}
    torch.save(content, tmp_path / "UCF.pth")
    write_video(tmp_path / "in.mp4", 11)
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(example, names)
    frames, actors = CONFIG.frames, CONFIG.num_queries
    assert names["boxes"].shape == (frames, actors, 4) and names["prob"].shape == (frames, actors, 3)
    assert names["attention"].shape[:3] == (frames, actors, 3)
