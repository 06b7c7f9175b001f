"""evaluate.py: from outputs to numbers, on stand-ins whose truth is known, and through the command line."""
import json
import os
import signal
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import evaluate
import metrics
from beside import synthetic
from model import PRESETS, VideoActionDetector, scores

ROOT = Path(evaluate.__file__).parent
CONFIG = replace(PRESETS["synthetic"], frames=6, num_classes=3, num_queries=4, micro_batch=2)
SIZE = (60, 80)                         # height, width of the annotation


@pytest.fixture(autouse=True)
def signal_handlers():
    """main() installs its own: they go when a test ends."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


class Videos(torch.utils.data.Dataset):
    """Videos of 5, 6, 14 and 9 frames, cut into clips of 6 with the overhang at the end; two actors, three classes.
    A clip's pixels are its index, so that a stand-in model can look its truth up."""
    name, class_names, class_groups = "stand-in", ["run", "sit", "wave"], {"move": [0, 2], "rest": [1]}

    def __init__(self, lengths=(5, 6, 14, 9)):
        draw = torch.Generator().manual_seed(3)
        self.videos = [f"class/v{i}" for i in range(len(lengths))]
        self.targets, self.clip_videos, self.lengths = [], [], lengths
        for video, length in enumerate(lengths):
            corner = torch.rand(2, 1, 2, generator=draw) * 0.2 + torch.tensor([[[0.0, 0.0]], [[0.5, 0.5]]])
            drift = torch.arange(length)[None, :, None] * 0.005
            boxes = torch.cat([corner + drift + 0.1, torch.full((2, length, 2), 0.2)], -1)              # (N, n, 4)
            labels = torch.zeros(2, 3)
            labels[0, video % 3], labels[1, (video + 1) % 3] = 1, 1
            for first in range(0, length, 6):
                ids = torch.arange(first, first + 6)
                inside = ids < length
                ids = ids.clamp(max=length - 1)
                self.clip_videos.append(video)
                self.targets.append({"boxes": boxes[:, ids], "present": inside.expand(2, 6), "frames": inside,
                                     "labels": labels[:, None].expand(2, 6, 3), "video": self.videos[video],
                                     "frame_ids": ids + 1, "size": torch.tensor(SIZE)})

    def __len__(self):
        return len(self.targets)

    def __getitem__(self, index):
        return torch.full((3, 6, 8, 8), float(index)), self.targets[index]

    def ground_truth(self):
        scale, frames, tubes = np.array([80, 60, 80, 60]), {"frame": [], "label": [], "box": []}, {}
        for video, target in zip(self.clip_videos, self.targets):
            cx, cy, w, h = target["boxes"].double().unbind(-1)
            boxes = torch.stack([cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2], -1).numpy() * scale
            for n, t in torch.nonzero(target["present"]).tolist():
                label, frame = int(target["labels"][n, t].argmax()), int(target["frame_ids"][t])
                for key, value in zip(frames, (video * 1_000_000 + frame, label, boxes[n, t])):
                    frames[key].append(value)
                tubes.setdefault((video, n, label), []).append((frame, boxes[n, t]))
        tubes = [{"video": video, "label": label, "frames": np.array([f for f, _ in rows]),
                  "boxes": np.array([b for _, b in rows])} for (video, _, label), rows in tubes.items()]
        return {key: np.array(value) for key, value in frames.items()}, tubes


class Truthful(nn.Module):
    """Outputs the truth of the clips it is given; noise, shift and wrong spoil it."""

    def __init__(self, targets, noise=0.0, shift=0.0, wrong=False):
        super().__init__()
        self.targets, self.noise, self.shift, self.wrong = targets, noise, shift, wrong

    def forward(self, clips, padding_mask=None, return_attention=False):
        chosen = [self.targets[int(index)] for index in clips[:, 0, 0, 0, 0]]
        boxes = torch.stack([t["boxes"] for t in chosen]).transpose(1, 2) + self.shift                  # (B, T, N, 4)
        labels = torch.stack([t["labels"] for t in chosen]).transpose(1, 2)                             # (B, T, N, C)
        labels = labels.roll(1, -1) if self.wrong else labels
        draw = torch.Generator().manual_seed(int(clips[:, 0, 0, 0, 0].sum()))
        noise = torch.randn(labels.shape, generator=draw) * self.noise
        extra = boxes.shape[:2] + (2,)                                       # two queries without an actor, in front
        return {"pred_boxes": torch.cat([torch.full((*extra, 4), 0.3), boxes], 2),
                "pred_logits": torch.cat([torch.full((*extra, 3), -8.0), labels * 12 - 6 + noise], 2),
                "pred_conf": torch.cat([torch.full(extra, -5.0), torch.full(boxes.shape[:3], 5.0)], 2)}


def run(model, dataset, **options):
    return evaluate.detect(model, dataset, CONFIG, "cpu", progress=False, **options)


def metric(results):
    return {name: value for name, value in results.items() if "-mAP@" in name}


def test_truth_as_outputs_scores_one_in_every_metric_class_and_group():
    dataset = Videos()
    model = Truthful(dataset.targets).train()
    results = evaluate.score(run(model, dataset), dataset, CONFIG)
    assert metric(results) == {"f-mAP@0.5": 1.0, "v-mAP@0.2": 1.0, "v-mAP@0.5": 1.0, "v-mAP@0.5:0.95": 1.0}
    assert all(metric(values) == metric(results) for values in results["per_group"].values())
    assert list(results["per_class"]) == dataset.class_names and list(results["per_group"]) == ["move", "rest"]
    assert sum(values["boxes"] for values in results["per_class"].values()) == 2 * sum(dataset.lengths)
    assert sum(values["tubes"] for values in results["per_class"].values()) == 2 * len(dataset.lengths)
    assert model.training, "the model is handed back in the mode it came in"


def test_detections_are_of_annotated_frames_in_order_in_the_annotation_s_pixels():
    dataset = Videos()
    found = run(Truthful(dataset.targets), dataset)
    expected = [(v, f + 1) for v, length in enumerate(dataset.lengths) for f in range(length) for _ in range(4)]
    assert list(zip(found["video"], found["frame"])) == expected, "each frame once, padding never"
    truth, _ = dataset.ground_truth()
    key = found["video"] * 1_000_000 + found["frame"]
    actors = np.arange(len(key)) % 4 >= 2
    order = np.argsort(truth["frame"], kind="stable")
    np.testing.assert_array_equal(key[actors], truth["frame"][order])
    np.testing.assert_allclose(found["box"][actors], truth["box"][order], atol=1e-4)
    np.testing.assert_allclose(found["conf"][actors], torch.tensor(5.0).sigmoid(), rtol=1e-6)


@pytest.mark.parametrize("with_confidence", [True, False])
def test_class_prob_times_conf_is_the_model_s_score_and_a_gated_query_has_none(with_confidence, monkeypatch):
    config, draw = replace(CONFIG, score_with_confidence=with_confidence), torch.Generator().manual_seed(0)
    out = {"pred_boxes": torch.rand(2, 6, 4, 4, generator=draw), "pred_conf": torch.randn(2, 6, 4, generator=draw),
           "pred_logits": torch.randn(2, 6, 4, 3, generator=draw)}

    def gated_scores(out, config):
        return scores(out, config) * (torch.arange(4) != 2)[:, None]
    monkeypatch.setattr(evaluate, "scores", gated_scores)
    targets = [Videos().targets[i] for i in (1, 4)]
    part = evaluate.rows(out, targets, config, {name: i for i, name in enumerate(Videos().videos)})
    expected = gated_scores(out, config)[torch.stack([t["frames"] for t in targets])].flatten(0, 1)
    np.testing.assert_allclose(part["class_prob"] * part["conf"][:, None], expected, rtol=1e-6)
    assert (part["class_prob"][2::4] == 0).all() and (part["class_prob"][1::4] > 0).all()


def test_a_share_of_the_videos_is_spread_evenly_and_cuts_the_ground_truth_too():
    dataset = Videos()
    found = run(Truthful(dataset.targets), dataset, share=0.5)
    assert found["videos"].tolist() == [0, 2] and set(found["video"]) == {0, 2}
    results = evaluate.score(found, dataset, CONFIG)
    assert results["f-mAP@0.5"] == results["v-mAP@0.5"] == 1.0 and results["videos"] == 2
    everything = evaluate.score(found | {"videos": np.arange(4)}, dataset, CONFIG)
    assert everything["f-mAP@0.5"] < 1, "the left-out videos' truth would have counted"


def test_a_class_without_ground_truth_is_nan_and_left_out_of_its_group():
    dataset = Videos(lengths=(6,))                                           # classes run and sit only
    results = evaluate.score(run(Truthful(dataset.targets), dataset), dataset, CONFIG)
    assert np.isnan(results["per_class"]["wave"]["f-mAP@0.5"]) and results["per_group"]["move"]["f-mAP@0.5"] == 1


def test_a_group_has_the_mean_of_its_classes_and_a_score_counts_the_confidence():
    dataset = Videos()
    found = run(Truthful(dataset.targets, noise=6.0), dataset)
    results = evaluate.score(found, dataset, CONFIG)
    of_class = [results["per_class"][name]["f-mAP@0.5"] for name in dataset.class_names]
    assert len(set(of_class)) == 3 and results["f-mAP@0.5"] == pytest.approx(np.mean(of_class))
    assert results["per_group"]["move"]["f-mAP@0.5"] == pytest.approx((of_class[0] + of_class[2]) / 2)
    assert results["per_group"]["rest"]["f-mAP@0.5"] == of_class[1]
    found["class_prob"][:] = 0.9                                             # only the confidence tells the actors now
    right, wrong = (evaluate.score(found | {"conf": conf}, dataset, CONFIG)["f-mAP@0.5"]
                    for conf in (found["conf"], 1 - found["conf"]))
    assert right > 1.5 * wrong


def test_a_data_set_must_say_whose_its_clips_are_when_videos_have_several():
    dataset = type("Bare", (), {"name": "bare", "videos": ["a", "b"], "__len__": lambda self: 2})()
    assert evaluate.clip_videos(dataset).tolist() == [0, 1]
    dataset.videos = ["a"]
    with pytest.raises(ValueError, match="bare: 2 clips of 1 videos; set clip_videos"):
        evaluate.clip_videos(dataset)


def ava_stand_in():
    """20 key frames of two videos, 6 queries, 80 classes: (detections, data set with its truth)."""
    draw = np.random.default_rng(5)
    n, corner = 2 * 10 * 6, draw.uniform(0, 60, (2 * 10 * 6, 2))
    box = np.concatenate([corner, corner + draw.uniform(10, 40, (n, 2))], 1).astype(np.float32)
    video, frame = np.repeat([0, 1], n // 2), np.tile(np.repeat(np.arange(902, 912), 6), 2)
    found = {"video": video, "frame": frame, "box": box, "class_prob": draw.random((n, 80), np.float32),
             "conf": np.ones(n, np.float32), "videos": np.arange(2), "video_names": np.array(["a", "b"])}
    true = np.arange(0, n, 3)
    dataset = type("Ava", (), {})()
    dataset.name, dataset.videos, dataset.class_groups = "ava", ["a", "b"], {}
    dataset.class_names = [f"action {i}" for i in range(80)]
    truth = {"frame": (video * 1_000_000 + frame)[true], "label": np.arange(len(true)) * 7 % 80, "box": box[true] + 1}
    dataset.ground_truth = lambda: (truth, [])
    dataset.table = type("Table", (), {"size": np.array([[100, 120], [200, 110]])})
    return found, dataset


def test_ava_is_scored_and_written_as_the_official_csv_which_scores_the_same(tmp_path):
    found, dataset = ava_stand_in()
    results = evaluate.score(found, dataset, replace(CONFIG, key_frame=True))
    evaluate.write_ava_csv(tmp_path / "detections.csv", found, dataset)
    lines = (tmp_path / "detections.csv").read_text().splitlines()
    assert len(lines) == 20 * 50 and lines[0].startswith("a,0902,0.") and {line.count(",") for line in lines} == {7}
    truth, _ = dataset.ground_truth()
    size = dataset.table.size[truth["frame"] // 1_000_000][:, [1, 0, 1, 0]]
    with open(tmp_path / "truth.csv", "w") as file:
        for frame, label, box in zip(truth["frame"], truth["label"], truth["box"] / size):
            file.write(f"{'ab'[frame // 1_000_000]},{frame % 1_000_000:04d},{','.join(map(str, box))},{label + 1},0\n")
    official = metrics.ava_map(tmp_path / "detections.csv", tmp_path / "truth.csv", evaluate.AVA_CLASSES)
    assert 0 < results["f-mAP@0.5"] == pytest.approx(official["mAP"], abs=1e-4)
    assert results["per_class"]["action 7"]["f-mAP@0.5"] == pytest.approx(official["AP"][8], abs=1e-3)
    assert np.isnan(results["per_class"]["action 1"]["f-mAP@0.5"]), "action id 2 is not evaluated"


def test_ava_s_classes_are_those_of_the_official_label_map():
    path = ROOT.parent / "shared" / "golden" / "eval" / "ava_labelmap.pbtxt"
    if not path.exists():
        pytest.skip("needs ../shared/golden/eval/ava_labelmap.pbtxt")
    assert evaluate.AVA_CLASSES == metrics.read_label_map(path)


def test_average_of_several_results(tmp_path, capsys):
    for split, value in enumerate((0.5, 0.625, 0.75)):
        results = {"f-mAP@0.5": value, "v-mAP@0.2": 1.0, "videos": 3, "per_class": {"run": {}}, "per_group": {}}
        (tmp_path / f"{split}.json").write_text(json.dumps(results))
    evaluate.main(["--average", *(str(tmp_path / f"{split}.json") for split in range(3))])
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split()[-2:] == ["0.6250", "1.0000"] and lines[4].split()[-2:] == ["0.7500", "1.0000"]


def test_key_frame_data_sets_have_no_tubes():
    dataset, config = Videos(), replace(CONFIG, key_frame=True)
    results = evaluate.score(run(Truthful(dataset.targets), dataset), dataset, config)
    assert metric(results) == {"f-mAP@0.5": 1.0}


def test_tubes_shorter_than_half_a_clip_or_fifteen_frames_are_dropped():
    assert [evaluate.shortest_tube(replace(CONFIG, frames=n)) for n in (8, 29, 30, 32, 40)] == [4, 14, 15, 15, 15]


def test_link_score_ends_a_tube_where_its_score_falls():
    dataset = Videos()
    found = run(Truthful(dataset.targets), dataset)
    found["class_prob"][(found["video"] == 2) & (found["frame"] > 3)] *= 0.05               # of 14 frames
    linked = [evaluate.score(found, dataset, replace(CONFIG, link_score=value))["v-mAP@0.5"] for value in (0.0, 0.1)]
    assert linked[0] == 1 and linked[1] < 1


def test_oracles_give_matched_queries_the_truth():
    dataset = Videos()

    def f_map(oracle=None, **spoiled):
        found = run(Truthful(dataset.targets, **spoiled), dataset, oracle=oracle)
        return evaluate.score(found, dataset, CONFIG)["f-mAP@0.5"]
    assert f_map(shift=0.08) < 0.1 and f_map("labels", shift=0.08) < 0.1 and f_map("boxes", shift=0.08) == 1
    assert f_map(wrong=True) < 0.5 and f_map("boxes", wrong=True) < 0.5 and f_map("labels", wrong=True) == 1


def test_outputs_that_are_not_finite_are_an_error_that_names_the_videos():
    dataset = Videos()
    with pytest.raises(ValueError, match="class/v0, class/v1 are not finite"):
        evaluate.detect(Truthful(dataset.targets, noise=float("nan")), dataset, CONFIG, "cpu", progress=False)


def test_written_results_can_be_read_and_scored_again(tmp_path):
    dataset = Videos(lengths=(6, 9))
    found = run(Truthful(dataset.targets, noise=3.0), dataset)
    results = evaluate.score(found, dataset, CONFIG)
    paths = evaluate.write_results(tmp_path / "new" / "folder", results, found)
    assert json.loads(paths[0].read_text()) == json.loads(json.dumps(results).replace("NaN", "null"))
    lines = paths[1].read_text().splitlines()
    assert len(lines) == 4 and lines[0].startswith("class,boxes,tubes,f-mAP@0.5,v-mAP@0.2")
    again = evaluate.read_detections(paths[2])
    np.testing.assert_equal(evaluate.score(again, dataset, CONFIG), results)
    assert json.loads(str(again["config"])) == json.loads(json.dumps(asdict(CONFIG)))
    np.savez(tmp_path / "other.npz", box=again["box"])
    with pytest.raises(SystemExit, match="other.npz holds no class_prob, classes"):
        evaluate.read_detections(tmp_path / "other.npz")
    with pytest.raises(SystemExit, match="detections missing: .*nowhere.npz"):
        evaluate.read_detections(tmp_path / "nowhere.npz")


def test_table_has_a_line_for_all_classes_and_for_each_group():
    results = {"f-mAP@0.5": 0.25, "v-mAP@0.2": 1.0, "protocol": "strict", "per_class": {"run": {}, "sit": {}},
               "per_group": {"move": {"f-mAP@0.5": float("nan"), "v-mAP@0.2": 0.5}}}
    assert [line.split() for line in evaluate.table(results).splitlines()] == [
        ["f-mAP@0.5", "v-mAP@0.2"], ["all", "2", "classes", "0.2500", "1.0000"], ["move", "nan", "0.5000"]]


def table_of(text):
    """Lines of the printed table: first words, numbers."""
    return [line.split() for line in text.splitlines() if line.startswith(("all ", "own ", "detail ", "context "))]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("run") / "best.pt"
    config = replace(PRESETS["synthetic"], frames=4, num_queries=3, micro_batch=3)
    torch.manual_seed(0)
    model, names = VideoActionDetector(config), list(synthetic.CLASS_NAMES)
    torch.save({"model": model.state_dict(), "config": asdict(config), "dataset": "synthetic", "classes": names}, path)
    return path


def command(*options, ranks=None):
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks else []
    return subprocess.Popen([sys.executable, *launcher, str(ROOT / "evaluate.py"), *map(str, options)], text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ | {"OMP_NUM_THREADS": "1"})


def test_torchrun_prints_what_one_process_prints_and_detections_score_the_same(checkpoint, capsys, tmp_path):
    options = ["--ckpt", str(checkpoint), "--device", "cpu", "--eval-share", "0.0125", "--out"]     # clips: 3, 1, none
    shared = command(*options, tmp_path / "three", ranks=3)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)            # as torchrun's ranks have: sums of other numbers of threads round differently
    evaluate.main([*options, str(tmp_path / "one")])
    torch.set_num_threads(threads)
    alone = capsys.readouterr().out
    assert len(table_of(alone)) == 4 and f"{tmp_path / 'one' / 'per_class.csv'}" in alone
    text, errors = shared.communicate(timeout=300)
    assert shared.returncode == 0 and table_of(text) == table_of(alone), errors
    for name in ("metrics.json", "per_class.csv", "detections.npz"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "three" / name).read_bytes(), name
    evaluate.main(["--detections", str(tmp_path / "one" / "detections.npz"), "--device", "cpu"])
    assert table_of(capsys.readouterr().out) == table_of(alone)
    again, first = (tmp_path / "one" / folder / "metrics.json" for folder in ("scored-strict", ""))
    assert again.read_bytes() == first.read_bytes()


def test_terminated_it_exits_with_128_and_the_signal(checkpoint):
    process = command("--ckpt", checkpoint, "--device", "cpu", "--batch-size", 1, "--out", checkpoint.parent / "never")
    while process.stderr.read(1) != "d":                                     # detecting: the progress bar is there
        assert process.poll() is None, process.stderr.read()
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=120) == 128 + signal.SIGTERM and not (checkpoint.parent / "never").exists()
    process.communicate()


@pytest.mark.parametrize("options, message", [
    (["--ckpt", "nowhere/best.pt"], "checkpoint missing: nowhere/best.pt; train.py writes"),
    (["--ckpt", __file__], "test_evaluate.py cannot be loaded: .*"),
    (["--ckpt", "{checkpoint}", "--dataset", "ucf"], "best.pt is of data set 'ucf'; name its folder with --data DIR"),
    (["--ckpt", "{checkpoint}", "--dataset", "ucf", "--data", "nowhere"], "--data nowhere: no such folder"),
    (["--ckpt", "{checkpoint}", "--set", "gat=0.1"], "--set gat=0.1: not name=value with one of the names"),
    (["--ckpt", "{checkpoint}", "--set", "dim=128"], "best.pt cannot be loaded: .*size mismatch"),
])
def test_wrong_input_is_one_message_that_names_it_and_the_way_out(options, message, checkpoint):
    with pytest.raises(SystemExit, match="(?s).*" + message):
        evaluate.main([option.format(checkpoint=checkpoint) for option in options] + ["--device", "cpu"])


def test_a_data_set_of_other_classes_is_refused(checkpoint, monkeypatch):
    monkeypatch.setattr(evaluate, "build_dataset", lambda *args, **options: Videos())
    with pytest.raises(SystemExit, match=r"other classes, 9 \(.*\), than .*'synthetic' has, 3 \(run, sit, wave, ...\)"):
        evaluate.main(["--ckpt", str(checkpoint), "--device", "cpu"])


def test_changes_to_the_config_keep_the_weights(checkpoint):
    model, config, _ = evaluate.load_model(checkpoint)
    changed, new, _ = evaluate.load_model(checkpoint, ["gate=0.25"])
    assert (config.gate, new.gate, changed.config.gate) == (0.0, 0.25, 0.25) and not changed.training
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, changed.state_dict()[name]), name


def test_multiply_adds_of_attention_are_counted_whatever_kernel_runs_it():
    """Projections of 3 + 1 D*D a token, and twice N*N*D for the weights and the mixture."""
    layer, x = nn.MultiheadAttention(16, 4, batch_first=True).eval().requires_grad_(False), torch.randn(2, 10, 16)
    assert evaluate.multiply_adds(lambda: layer(x, x, x, need_weights=False)) == 2 * (10 * 4 * 16 ** 2 + 2 * 10 ** 2 * 16)
    assert torch.backends.mha.get_fastpath_enabled()


def test_efficiency_counts_multiply_adds_of_what_is_added():
    """One convolution block more in a classifying layer costs 17 D*D multiply-adds a cell of every actor's map."""
    config = replace(PRESETS["synthetic"], gate=0.0)
    one, two = (evaluate.efficiency(replace(config, conv_blocks=blocks), torch.device("cpu"), (64, 96), runs=1)
                for blocks in (1, 2))
    cells = 8 * 12 * config.num_queries * config.frames * config.decoder_layers
    assert two["multiply_adds"] - one["multiply_adds"] == cells * 17 * config.dim ** 2
    assert two["parameters"] - one["parameters"] == config.decoder_layers * (17 * config.dim ** 2 + 8 * config.dim)
    points = (8 * 8 * 12 + 8 * 4 * 6) * config.num_levels * config.num_points
    assert one["sampling_multiply_adds"] == points * 8 * config.dim and one["ms"] > 0 and one["peak_gb"] > 0
