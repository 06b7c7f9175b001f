"""evaluate.py: from outputs to numbers, on stand-ins whose truth is known, and through the command
line."""
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import shared
from torch import nn

import evaluate
import metrics
from beside import synthetic
from beside.sources import read_label_map
from data import build_dataset
from model import PRESETS, VideoActionDetector, scores
from tests.small_sets import grey_frames, small_ava

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


@pytest.fixture(autouse=True)
def precision_flags():
    """set_precision sets flags of the whole process: they go back when a test ends."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


class Videos(torch.utils.data.Dataset):
    """Videos of 5, 6, 14 and 9 frames, cut into clips of 6 with the overhang at the end; two
    actors, three classes. A clip's pixels are its index: a stand-in model looks its truth up."""
    name, class_names = "stand-in", ["run", "sit", "wave"]
    class_groups = {"move": [0, 2], "rest": [1]}

    def __init__(self, lengths=(5, 6, 14, 9)):
        draw = torch.Generator().manual_seed(3)
        self.videos = [f"class/v{i}" for i in range(len(lengths))]
        self.targets, self.clip_videos, self.lengths = [], [], lengths
        self.augment = True
        for video, length in enumerate(lengths):
            corner = torch.rand(2, 1, 2, generator=draw) * 0.2
            corner = corner + torch.tensor([[[0.1, 0.1]], [[0.6, 0.6]]])
            drift = torch.arange(length)[None, :, None] * 0.005
            boxes = torch.cat([corner + drift, torch.full((2, length, 2), 0.2)], -1)    # (N, n, 4)
            labels = torch.zeros(2, 3)
            labels[0, video % 3], labels[1, (video + 1) % 3] = 1, 1
            for first in range(0, length, 6):
                ids = torch.arange(first, first + 6)
                inside = ids < length
                ids = ids.clamp(max=length - 1)
                self.clip_videos.append(video)
                self.targets.append({
                    "boxes": boxes[:, ids], "present": inside.expand(2, 6), "frames": inside,
                    "labels": labels[:, None].expand(2, 6, 3), "video": self.videos[video],
                    "video_index": video, "frame_ids": ids + 1, "size": torch.tensor(SIZE)})

    def __len__(self):
        return len(self.targets)

    def __getitem__(self, index):
        return torch.full((3, 6, 8, 8), index, dtype=torch.uint8), self.targets[index]

    def ground_truth(self):
        scale = np.array([80, 60, 80, 60])
        frames, tubes = {"video": [], "frame": [], "label": [], "box": []}, {}
        for video, target in zip(self.clip_videos, self.targets):
            cx, cy, w, h = target["boxes"].double().unbind(-1)
            boxes = torch.stack([cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2], -1)
            boxes = boxes.numpy() * scale
            for n, t in torch.nonzero(target["present"]).tolist():
                label, frame = int(target["labels"][n, t].argmax()), int(target["frame_ids"][t])
                for key, value in zip(frames, (video, frame, label, boxes[n, t])):
                    frames[key].append(value)
                tubes.setdefault((video, n, label), []).append((frame, boxes[n, t]))
        listed = []
        for (video, _, label), rows in tubes.items():
            numbers, boxes = zip(*rows)
            listed.append({"video": video, "label": label, "frames": np.array(numbers),
                           "boxes": np.array(boxes)})
        return {key: np.array(value) for key, value in frames.items()}, listed


class Truthful(nn.Module):
    """Outputs the truth of the clips it is given; noise, shift and wrong spoil it."""

    def __init__(self, targets, noise=0.0, shift=0.0, wrong=False):
        super().__init__()
        self.targets, self.noise, self.shift, self.wrong = targets, noise, shift, wrong
        self.autocast = None

    def forward(self, clips, padding_mask=None):
        assert clips.dtype == torch.uint8, "the model normalises, nobody else"
        if torch.is_autocast_enabled("cpu"):
            self.autocast = torch.get_autocast_dtype("cpu")
        chosen = [self.targets[int(index)] for index in clips[:, 0, 0, 0, 0]]
        boxes = torch.stack([target["boxes"] for target in chosen])
        labels = torch.stack([target["labels"] for target in chosen])
        boxes = boxes.transpose(1, 2) + self.shift      # (B, T, N, 4)
        labels = labels.transpose(1, 2)                 # (B, T, N, C)
        if self.wrong:
            labels = labels.roll(1, -1)
        draw = torch.Generator().manual_seed(int(clips[:, 0, 0, 0, 0].sum()))
        noise = torch.randn(labels.shape, generator=draw) * self.noise
        extra = boxes.shape[:2] + (2,)                  # two queries without an actor, in front
        low, high = torch.full(extra, -5.0), torch.full(boxes.shape[:3], 5.0)
        logits = torch.cat([torch.full((*extra, 3), -8.0), labels * 12 - 6 + noise], 2)
        return {"pred_boxes": torch.cat([torch.full((*extra, 4), 0.3), boxes], 2),
                "pred_logits": logits, "pred_conf": torch.cat([low, high], 2)}


def run(model, dataset, **options):
    return evaluate.detect(model, dataset, CONFIG, "cpu", progress=False, **options)


def metric(results):
    return {name: value for name, value in results.items() if "-mAP@" in name}


# ---- detections and scores ----------------------------------------------------------------------

def test_truth_as_outputs_scores_one_in_every_metric_class_and_group():
    dataset = Videos()
    model = Truthful(dataset.targets).train()
    results = evaluate.score(run(model, dataset), dataset, CONFIG)
    assert metric(results) == {"f-mAP@0.5": 1.0, "v-mAP@0.2": 1.0, "v-mAP@0.5": 1.0,
                               "v-mAP@0.5:0.95": 1.0}
    assert all(metric(values) == metric(results) for values in results["per_group"].values())
    assert list(results["per_class"]) == dataset.class_names
    assert list(results["per_group"]) == ["move", "rest"]
    boxes = sum(values["boxes"] for values in results["per_class"].values())
    tubes = sum(values["tubes"] for values in results["per_class"].values())
    assert (boxes, tubes) == (2 * sum(dataset.lengths), 2 * len(dataset.lengths))
    assert model.training, "the model is handed back in the mode it came in"


def test_detections_are_of_annotated_frames_in_order_in_the_annotation_s_pixels():
    dataset = Videos()
    found = run(Truthful(dataset.targets), dataset)
    expected = []
    for video, length in enumerate(dataset.lengths):
        expected += [(video, frame + 1) for frame in range(length) for _ in range(4)]
    assert list(zip(found["video"], found["frame"])) == expected, "each frame once, padding never"
    truth, _ = dataset.ground_truth()
    actors = np.arange(len(expected)) % 4 >= 2
    order = np.lexsort((truth["frame"], truth["video"]))
    np.testing.assert_array_equal(found["frame"][actors], truth["frame"][order])
    np.testing.assert_array_equal(found["video"][actors], truth["video"][order])
    np.testing.assert_allclose(found["box"][actors], truth["box"][order], atol=1e-4)
    np.testing.assert_allclose(found["conf"][actors], torch.tensor(5.0).sigmoid(), rtol=1e-6)


@pytest.mark.parametrize("with_confidence", [True, False])
def test_class_prob_times_conf_is_the_model_s_score_and_a_gated_query_has_none(with_confidence):
    config = replace(CONFIG, score_with_confidence=with_confidence)
    draw = torch.Generator().manual_seed(0)
    out = {"pred_boxes": torch.rand(2, 6, 4, 4, generator=draw),
           "pred_conf": torch.randn(2, 6, 4, generator=draw),
           "pred_logits": torch.randn(2, 6, 4, 3, generator=draw)}
    out["pred_logits"][:, :, 2] = -1e4          # as the decoder leaves those below its gate
    targets = [Videos().targets[i] for i in (1, 4)]
    part = evaluate.rows(out, targets, config)
    shown = torch.stack([target["frames"] for target in targets])
    expected = scores(out, config)[shown].flatten(0, 1)
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
    dataset = Videos(lengths=(6,))                      # classes run and sit only
    results = evaluate.score(run(Truthful(dataset.targets), dataset), dataset, CONFIG)
    assert np.isnan(results["per_class"]["wave"]["f-mAP@0.5"])
    assert results["per_group"]["move"]["f-mAP@0.5"] == 1
    assert evaluate.table(results).splitlines()[1].startswith("2 of 3 classes  ")


def test_a_group_has_the_mean_of_its_classes_and_a_score_counts_the_confidence():
    dataset = Videos()
    found = run(Truthful(dataset.targets, noise=6.0), dataset)
    results = evaluate.score(found, dataset, CONFIG)
    of_class = [results["per_class"][name]["f-mAP@0.5"] for name in dataset.class_names]
    assert len(set(of_class)) == 3 and results["f-mAP@0.5"] == pytest.approx(np.mean(of_class))
    moving = (of_class[0] + of_class[2]) / 2
    assert results["per_group"]["move"]["f-mAP@0.5"] == pytest.approx(moving)
    assert results["per_group"]["rest"]["f-mAP@0.5"] == of_class[1]
    found["class_prob"][:] = 0.9                        # only the confidence tells the actors now
    right, wrong = (evaluate.score(found | {"conf": conf}, dataset, CONFIG)["f-mAP@0.5"]
                    for conf in (found["conf"], 1 - found["conf"]))
    assert right > 1.5 * wrong


def test_key_frame_data_sets_have_no_tubes():
    dataset, config = Videos(), replace(CONFIG, key_frame=True)
    found = run(Truthful(dataset.targets), dataset)
    assert evaluate.link(found, config) == []
    assert metric(evaluate.score(found, dataset, config)) == {"f-mAP@0.5": 1.0}


def test_tubes_shorter_than_half_a_clip_or_fifteen_frames_are_dropped():
    shortest = [evaluate.shortest_tube(replace(CONFIG, frames=n)) for n in (8, 29, 30, 32, 40)]
    assert shortest == [4, 14, 15, 15, 15]


def test_link_score_ends_a_tube_where_its_score_falls():
    dataset = Videos()
    found = run(Truthful(dataset.targets), dataset)
    found["class_prob"][(found["video"] == 2) & (found["frame"] > 3)] *= 0.05       # of 14 frames
    linked = [evaluate.score(found, dataset, replace(CONFIG, link_score=value))["v-mAP@0.5"]
              for value in (0.0, 0.1)]
    assert linked[0] == 1 and linked[1] < 1


def test_oracles_give_matched_queries_the_truth():
    dataset = Videos()

    def f_map(oracle=None, **spoiled):
        found = run(Truthful(dataset.targets, **spoiled), dataset, oracle=oracle)
        return evaluate.score(found, dataset, CONFIG)["f-mAP@0.5"]

    assert f_map(shift=0.08) < 0.1 and f_map("labels", shift=0.08) < 0.1
    assert f_map("boxes", shift=0.08) == 1
    assert f_map(wrong=True) < 0.5 and f_map("boxes", wrong=True) < 0.5
    assert f_map("labels", wrong=True) == 1


# ---- AVA ----------------------------------------------------------------------------------------

def ava_stand_in():
    """20 key frames of two videos, 6 queries, 80 classes: (detections, data set with its truth)."""
    draw, n = np.random.default_rng(5), 2 * 10 * 6
    corner = draw.uniform(0, 60, (n, 2))
    box = np.concatenate([corner, corner + draw.uniform(10, 40, (n, 2))], 1).astype(np.float32)
    video, frame = np.repeat([0, 1], n // 2), np.tile(np.repeat(np.arange(902, 912), 6), 2)
    found = {"video": video, "frame": frame, "box": box, "conf": np.ones(n, np.float32),
             "class_prob": draw.random((n, 80), np.float32), "videos": np.arange(2),
             "video_names": np.array(["a", "b"])}
    true = np.arange(0, n, 3)
    dataset = type("Ava", (), {})()
    dataset.name, dataset.videos, dataset.class_groups = "ava", ["a", "b"], {}
    dataset.class_names = [f"action {i}" for i in range(80)]
    truth = {"video": video[true], "frame": frame[true], "label": np.arange(len(true)) * 7 % 80,
             "box": box[true] + 1}
    dataset.ground_truth = lambda: (truth, [])
    dataset.table = type("Table", (), {"size": np.array([[100, 120], [200, 110]])})
    return found, dataset


def test_ava_is_scored_and_written_as_the_official_csv_which_scores_the_same(tmp_path):
    found, dataset = ava_stand_in()
    results = evaluate.score(found, dataset, replace(CONFIG, key_frame=True))
    path = evaluate.write_ava_csv(tmp_path / "detections.csv", found, dataset)
    lines = path.read_text().splitlines()
    assert len(lines) == 20 * 50 and lines[0].startswith("a,0902,0.")
    assert {line.count(",") for line in lines} == {7}
    truth, _ = dataset.ground_truth()
    boxes = truth["box"] / dataset.table.size[truth["video"]][:, [1, 0, 1, 0]]
    with open(tmp_path / "truth.csv", "w") as file:
        for video, frame, label, box in zip(truth["video"], truth["frame"], truth["label"], boxes):
            file.write(f"{'ab'[video]},{frame:04d},{','.join(map(str, box))},{label + 1},0\n")
    official = metrics.ava_map(path, tmp_path / "truth.csv", evaluate.AVA_CLASSES)
    assert 0 < results["f-mAP@0.5"] == pytest.approx(official["mAP"], abs=1e-4)
    score = found["class_prob"][:, np.array(evaluate.AVA_CLASSES) - 1]
    row = {"video": np.array(["a", "b"])[found["video"]], "timestamp": found["frame"],
           "box": found["box"] / dataset.table.size[found["video"]][:, [1, 0, 1, 0]]}
    row = {name: values.repeat(score.shape[1], 0) for name, values in row.items()}
    row |= {"score": score.ravel(), "label": np.tile(evaluate.AVA_CLASSES, len(score))}
    every = metrics.ava_map(row, tmp_path / "truth.csv", evaluate.AVA_CLASSES, cap=None)
    released = evaluate.score(found, dataset, replace(CONFIG, key_frame=True), "released")
    assert released["f-mAP@0.5"] == pytest.approx(every["mAP"], abs=1e-4)
    assert abs(released["f-mAP@0.5"] - results["f-mAP@0.5"]) > 1e-3, "the authors count all rows"
    of_class = results["per_class"]["action 7"]["f-mAP@0.5"]
    assert of_class == pytest.approx(official["AP"][8], abs=1e-3)
    assert np.isnan(results["per_class"]["action 1"]["f-mAP@0.5"]), "action id 2 is not evaluated"


def test_ava_s_classes_are_those_of_the_official_label_map():
    label_map = read_label_map(shared("golden", "eval", "ava_labelmap.pbtxt"))
    assert sorted(label_map) == evaluate.AVA_CLASSES


# ---- results as text and files ------------------------------------------------------------------

def test_written_results_can_be_read_and_scored_again(tmp_path):
    dataset = Videos(lengths=(6, 9))
    found = run(Truthful(dataset.targets, noise=3.0), dataset)
    results = evaluate.score(found, dataset, CONFIG)
    results["f-mAP@0.5"] = 0.28899999618530273
    paths = evaluate.write_results(tmp_path / "new" / "folder", results, found)
    written = json.loads(paths[0].read_text())
    assert written == json.loads(json.dumps(evaluate.rounded(results)))
    assert written["f-mAP@0.5"] == 0.289 and "NaN" not in paths[0].read_text()
    lines = paths[1].read_text().splitlines()
    assert len(lines) == 4 and lines[0].startswith("class,boxes,tubes,f-mAP@0.5,v-mAP@0.2")
    again = evaluate.read_detections(paths[2])
    np.testing.assert_equal(evaluate.score(again, dataset, CONFIG),
                            evaluate.score(found, dataset, CONFIG))
    assert json.loads(str(again["config"])) == json.loads(json.dumps(asdict(CONFIG)))


def test_table_has_a_line_for_all_classes_and_for_each_group():
    some = {"f-mAP@0.5": 0.5}
    results = {"f-mAP@0.5": 0.25, "v-mAP@0.2": 1.0, "protocol": "strict",
               "per_class": {"run": some, "sit": some},
               "per_group": {"move": {"f-mAP@0.5": float("nan"), "v-mAP@0.2": 0.5}}}
    assert [line.split() for line in evaluate.table(results).splitlines()] == [
        ["f-mAP@0.5", "v-mAP@0.2"], ["all", "2", "classes", "0.2500", "1.0000"],
        ["move", "nan", "0.5000"]]


# ---- several processes --------------------------------------------------------------------------

def link_as_rank(rank, store, found, queue):
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    tubes = evaluate.link(found, CONFIG)
    queue.put((rank, tubes))
    dist.destroy_process_group()


@pytest.mark.skipif(sys.platform != "linux", reason="forks processes")
def test_two_ranks_link_like_one(tmp_path):
    dataset = Videos(lengths=(5, 6, 14, 9, 12, 7, 30))
    found = run(Truthful(dataset.targets, noise=3.0), dataset)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    processes = [context.Process(target=link_as_rank, args=(rank, tmp_path / "store", found, queue))
                 for rank in range(2)]
    for process in processes:
        process.start()
    tubes = dict(queue.get(timeout=60) for _ in processes)
    for process in processes:
        process.join(60)
    alone = evaluate.link(found, CONFIG)
    assert tubes[1] is None and len({tube["video"] for tube in alone}) == 7
    np.testing.assert_equal(tubes[0], alone)
    results = [evaluate.score(found, dataset, CONFIG, tubes=given) for given in (tubes[0], None)]
    np.testing.assert_equal(*results)


@pytest.mark.parametrize("world", [2, 3])
def test_each_rank_links_its_own_videos(world, monkeypatch):
    dataset = Videos()
    found = run(Truthful(dataset.targets), dataset)
    shares = []
    monkeypatch.setattr(evaluate.metrics, "link_tubes",
                        lambda boxes, *_, **__: shares.append(set(boxes["video"].tolist())) or [])
    monkeypatch.setattr(evaluate.dist, "gather_object", lambda *_: None)
    for rank in range(1, world):
        monkeypatch.setattr(evaluate, "this_rank", lambda rank=rank: (rank, world))
        assert evaluate.link(found, CONFIG) is None
    assert shares == [set(range(4)[rank::world]) for rank in range(1, world)]


def table_of(text):
    """Lines of the printed table: first words, numbers."""
    rows = [line.split() for line in text.splitlines()]
    return [row for row in rows if row and row[-1].startswith(("0.", "1."))]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("run") / "best.pt"
    config = replace(PRESETS["synthetic"], frames=4, num_queries=3, micro_batch=3)
    torch.manual_seed(0)
    model, names = VideoActionDetector(config), list(synthetic.CLASS_NAMES)
    torch.save({"model": model.state_dict(), "config": asdict(config), "dataset": "synthetic",
                "classes": names}, path)
    return path


def command(*options, ranks=None):
    launcher = []
    if ranks:
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    script = [sys.executable, *launcher, str(ROOT / "evaluate.py"), *map(str, options)]
    return subprocess.Popen(script, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            env=os.environ | {"OMP_NUM_THREADS": "1"})


def test_torchrun_prints_what_one_process_prints_and_detections_score_the_same(
        checkpoint, capsys, tmp_path):
    options = ["--ckpt", str(checkpoint), "--device", "cpu", "--eval-share", "0.0125", "--out"]
    several = command(*options, tmp_path / "three", ranks=3)            # clips: 3, 1, none
    threads = torch.get_num_threads()
    torch.set_num_threads(1)            # as torchrun's: other numbers of threads round differently
    evaluate.main([*options, str(tmp_path / "one")])
    torch.set_num_threads(threads)
    alone = capsys.readouterr().out
    assert alone.startswith("evaluate.py: cpu, precision float32\n")
    assert len(table_of(alone)) == 4 and f"{tmp_path / 'one' / 'per_class.csv'}" in alone
    text, errors = several.communicate(timeout=300)
    assert several.returncode == 0 and table_of(text) == table_of(alone), errors
    for name in ("metrics.json", "per_class.csv", "detections.npz"):
        one, three = (tmp_path / folder / name for folder in ("one", "three"))
        assert one.read_bytes() == three.read_bytes(), name
    evaluate.main(["--detections", str(tmp_path / "one" / "detections.npz"), "--device", "cpu"])
    assert table_of(capsys.readouterr().out) == table_of(alone)
    again, first = (tmp_path / "one" / folder / "metrics.json" for folder in ("scored-strict", ""))
    assert again.read_bytes() == first.read_bytes()


# ---- precision and what is loaded ---------------------------------------------------------------

@pytest.mark.parametrize("name, dtype, tf32", [
    ("float32", None, False), ("tf32", None, True), ("bf16", torch.bfloat16, True),
    ("fp16", torch.float16, True)])
def test_a_precision_sets_products_and_convolutions_together(name, dtype, tf32):
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = not tf32, not tf32
    assert evaluate.set_precision(name, torch.device("cuda")) is dtype
    assert torch.backends.cuda.matmul.allow_tf32 is tf32
    assert torch.backends.cudnn.allow_tf32 is tf32


@pytest.mark.parametrize("has_bf16", [True, False])
def test_default_precisions(monkeypatch, has_bf16):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has_bf16)
    cpu, gpu = torch.device("cpu"), torch.device("cuda", 0)
    assert evaluate.default_precision(cpu, False) == "float32"
    assert evaluate.default_precision(cpu, True) == "float32"
    assert evaluate.default_precision(gpu, False) == "tf32"
    assert evaluate.default_precision(gpu, True) == ("bf16" if has_bf16 else "tf32")


def test_default_workers_are_this_process_s_cores_shared_by_the_ranks_of_a_machine(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(12)), raising=False)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert evaluate.default_workers(torch.device("cpu")) == 0
    assert evaluate.default_workers(torch.device("cuda")) == 8
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert evaluate.default_workers(torch.device("cuda")) == 3
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 20)
    assert evaluate.default_workers(torch.device("cuda")) == 5


def test_detect_runs_the_model_under_autocast_where_asked():
    dataset = Videos(lengths=(6,))
    model = Truthful(dataset.targets)
    found = [run(model, dataset), run(model, dataset, precision=torch.bfloat16)]
    assert model.autocast is torch.bfloat16
    assert all(part["box"].dtype == part["class_prob"].dtype == np.float32 for part in found)
    model.autocast = None
    run(model, dataset)
    assert model.autocast is None


def test_the_peak_of_memory_starts_afresh():
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("needs Linux's /proc/self/clear_refs")
    cpu = torch.device("cpu")
    held = np.ones(2 ** 26)                             # half a GB
    before = evaluate.memory_gb(cpu)
    del held
    evaluate.reset_memory(cpu)
    assert evaluate.memory_gb(cpu) < before - 0.4


def test_changes_to_the_config_keep_the_weights(checkpoint):
    model, config, _ = evaluate.load_model(checkpoint)
    changed, new, _ = evaluate.load_model(checkpoint, ["gate=0.25"])
    assert (config.gate, new.gate, changed.config.gate) == (0.0, 0.25, 0.25)
    assert not changed.training
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, changed.state_dict()[name]), name


def test_a_checkpoint_is_a_file_a_run_s_folder_or_the_repository_s(checkpoint, monkeypatch, capsys):
    assert evaluate.find_checkpoint(str(checkpoint)) == checkpoint
    assert evaluate.find_checkpoint(checkpoint.parent) == checkpoint
    default = checkpoint.parent / "synthetic.pt"
    default.write_bytes(checkpoint.read_bytes())
    monkeypatch.setattr(evaluate, "WEIGHTS", checkpoint.parent)
    assert evaluate.find_checkpoint() == default
    assert capsys.readouterr().out == f"no --ckpt: taking {default}\n"
    args = evaluate.arguments([])
    assert evaluate.results_folder(default, args) == Path("runs/synthetic/evaluation")


@pytest.mark.parametrize("options, folder", [
    ([], "run/evaluation"), (["--protocol", "released"], "run/evaluation-released"),
    (["--oracle", "boxes"], "run/oracle-boxes"), (["--side", "train"], "run/evaluation-train"),
    (["--detections", "run/x.npz"], "run/scored-strict"), (["--out", "here"], "here"),
    (["--detections", "run/x.npz", "--protocol", "released"], "run/scored-released")])
def test_kinds_of_results_do_not_overwrite_each_other(options, folder):
    args = evaluate.arguments(options)
    assert evaluate.results_folder("run/best.pt", args) == Path(folder)


def test_training_videos_are_seen_as_at_test_time(checkpoint):
    args = evaluate.arguments(["--side", "train"])
    _, config, record = evaluate.load_model(checkpoint)
    dataset = evaluate.open_dataset(args, config, record["classes"], checkpoint, record)
    assert dataset.videos[0].startswith("train-") and not dataset.augment
    plain = synthetic.SyntheticDataset(config, "train", train=False)
    assert torch.equal(dataset[5][0], plain[5][0])


@pytest.mark.parametrize("options, trained, asked", [
    ([], {}, ("D", "val", 1, "error", 0)),
    ([], {"split": 2, "missing": "leave-out", "fill": 5}, ("D", "val", 2, "leave out", 5)),
    (["--data", "E", "--split", "3", "--side", "train", "--fill", "0", "--missing", "error"],
     {"split": 2, "missing": "leave-out", "fill": 5}, ("E", "train", 3, "error", 0))])
def test_the_data_are_those_of_the_training_unless_others_are_asked_for(options, trained, asked,
                                                                        monkeypatch):
    def build_dataset(name, root, side, config, fold, missing, fill):
        assert (root, side, fold, missing, fill) == asked
        return Videos()

    monkeypatch.setattr(evaluate, "build_dataset", build_dataset)
    args = evaluate.arguments(options)
    args.split = args.split and args.split[0]
    trained = {"dataset": "jhmdb", "data": "D", **trained}
    evaluate.open_dataset(args, CONFIG, Videos.class_names, "best.pt", trained)


# ---- the command line on stand-ins --------------------------------------------------------------

@pytest.fixture
def folds(monkeypatch, tmp_path):
    """A data set of three splits, and checkpoints A and B of models that are better on it the
    later their letter; returns the folder and the splits that were opened."""
    sets = {1: Videos((5, 6, 14)), 2: Videos((9, 8)), 3: Videos((12, 7, 6))}
    opened = []

    def build_dataset(name, root, side, config, fold, missing, fill):
        opened.append(fold)
        sets[fold].name = name
        return sets[fold]

    def load_model(path, changes, device, preset):
        noise = {"A": 6.0, "B": 3.0, "C": 0.0}[path.parent.name]
        model = Truthful(sets[1].targets, noise)
        model.forward = lambda clips, mask: Truthful(sets[opened[-1]].targets, noise)(clips, mask)
        record = {"dataset": "jhmdb", "classes": Videos.class_names, "kind": "a stand-in",
                  "settings": {"data": "jhmdb", "split": 1}}
        return model, CONFIG, record

    monkeypatch.setattr(evaluate, "build_dataset", build_dataset)
    monkeypatch.setattr(evaluate, "load_model", load_model)
    for name in "ABC":
        (tmp_path / name).mkdir()
        (tmp_path / name / "best.pt").touch()
    return tmp_path, opened


@pytest.mark.parametrize("names", ["A", "ABC"])
def test_several_splits_have_their_results_and_a_mean(names, folds, capsys):
    folder, opened = folds
    checkpoints = [str(folder / name) for name in names]
    evaluate.main(["--ckpt", *checkpoints, "--split", "1", "2", "3", "--device", "cpu"])
    assert opened == [1, 2, 3]
    text, values = capsys.readouterr().out, []
    for split, name in zip((1, 2, 3), names * 3):
        path = folder / name / "evaluation" / f"split-{split}" / "metrics.json"
        values.append(metric(json.loads(path.read_text())))
    assert len({value["f-mAP@0.5"] for value in values}) == 3
    mean = json.loads((folder / "A" / "evaluation" / "mean.json").read_text())
    for name, value in metric(mean).items():
        assert value == pytest.approx(np.mean([of_split[name] for of_split in values]), abs=1e-6)
    assert mean["splits"] == {f"split {split}": value for split, value in zip((1, 2, 3), values)}
    rows = [" ".join(row[:-4]) for row in table_of(text)[-4:]]
    assert rows == ["mean of 3 splits", "split 1", "split 2", "split 3"]
    assert text.count("trained on split 1, so on some of these videos") == 2


def test_released_protocol_says_why_its_v_map_differs(folds, capsys):
    folder, _ = folds
    evaluate.main(["--ckpt", str(folder / "C"), "--device", "cpu", "--protocol", "released"])
    text = capsys.readouterr().out
    assert "not to be compared with strict: only boxes whose confidence is at least 0.7" in text
    assert text.splitlines()[-1].startswith("wrote ") and "evaluation-released" in text
    evaluate.main(["--ckpt", str(folder / "C"), "--device", "cpu"])
    assert "not to be compared" not in capsys.readouterr().out


# ---- Table 6 ------------------------------------------------------------------------------------

def test_multiply_adds_of_attention_are_counted_whatever_kernel_runs_it():
    """Projections of 3 + 1 D*D a token, and twice N*N*D for the weights and the mixture."""
    layer = nn.MultiheadAttention(16, 4, batch_first=True).eval().requires_grad_(False)
    x = torch.randn(2, 10, 16)
    count = evaluate.multiply_adds(lambda: layer(x, x, x, need_weights=False))
    assert count == 2 * (10 * 4 * 16 ** 2 + 2 * 10 ** 2 * 16)
    assert torch.backends.mha.get_fastpath_enabled()


def test_efficiency_counts_multiply_adds_of_what_is_added():
    """One convolution block more in a classifying layer costs 17 D*D multiply-adds a cell of every
    actor's map."""
    config = replace(PRESETS["synthetic"], gate=0.0)
    one, two = (evaluate.efficiency(replace(config, conv_blocks=blocks), torch.device("cpu"),
                                    (64, 96), runs=1) for blocks in (1, 2))
    cells = 8 * 12 * config.num_queries * config.frames * config.decoder_layers
    assert two["multiply_adds"] - one["multiply_adds"] == cells * 17 * config.dim ** 2
    parameters = config.decoder_layers * (17 * config.dim ** 2 + 8 * config.dim)
    assert two["parameters"] - one["parameters"] == parameters
    points = (8 * 8 * 12 + 8 * 4 * 6) * config.num_levels * config.num_points
    assert one["sampling_multiply_adds"] == points * 8 * config.dim
    assert one["ms"] > 0 and one["peak_gb"] > 0


def test_the_sampling_op_is_counted_where_a_layer_samples():
    """The last layer of a key-frame model samples for the cells of the frames that are read; an
    ordinary encoder samples nothing."""
    config = replace(PRESETS["synthetic"], encoder_layers=2, key_frame=True)
    counted = evaluate.efficiency(config, torch.device("cpu"), (64, 96), runs=1)
    cells = 8 * 12 + 4 * 6                                  # of a time step, T' = 8
    points = (8 + 1) * cells * config.num_levels * config.num_points
    assert counted["sampling_multiply_adds"] == points * 8 * config.dim
    ordinary = replace(PRESETS["synthetic"], encoder="transformer")
    counted = evaluate.efficiency(ordinary, torch.device("cpu"), (64, 96), runs=1)
    assert counted["sampling_multiply_adds"] == 0


def test_efficiency_is_of_the_presets_or_the_checkpoint_that_are_named(checkpoint, monkeypatch,
                                                                       capsys):
    measured = []

    def efficiency(config, device, model=None, precision=None):
        measured.append((config.frames, model is not None))
        return {"parameters": 10 ** 6, "multiply_adds": 10 ** 12,
                "sampling_multiply_adds": 10 ** 10, "ms": 1.5, "peak_gb": 2.5}

    monkeypatch.setattr(evaluate, "efficiency", efficiency)
    for options in ([], ["synthetic", "ava"], ["--ckpt", str(checkpoint)],
                    ["ucf", "--ckpt", str(checkpoint), "--set", "link_score=0.1"]):
        evaluate.main(["--efficiency", *options, "--device", "cpu"])
    assert measured == [(40, False), (32, False), (8, False), (16, False), (4, True), (4, True),
                        (32, False)]
    text = capsys.readouterr().out
    assert "117.8M" in text and f"{checkpoint}, 4 x 256 x 360" in text


def test_saved_detections_score_the_same_on_frames_of_another_size_and_without_any(
        tmp_path, capsys):
    """Of real files: boxes count the pixels of frames that may be extracted anew, or be gone."""
    small_ava(tmp_path)
    config = replace(PRESETS["ava"], frames=4)
    dataset = build_dataset("ava", tmp_path, "val", config)
    truth, _ = dataset.ground_truth()
    count = len(truth["video"])
    rng = np.random.default_rng(0)
    about = {"videos": [0], "video_names": dataset.videos, "classes": dataset.class_names,
             "dataset": "ava", "config": json.dumps(asdict(config)), "sizes": dataset.table.size}
    found = {"video": truth["video"], "frame": truth["frame"], "box": truth["box"] + 1,
             "class_prob": rng.random((count, 80)), "conf": np.ones(count), **about}
    np.savez(tmp_path / "saved.npz", **found)
    del found["sizes"]                                      # as earlier versions wrote it
    np.savez(tmp_path / "old.npz", **found)

    def scored(name):
        evaluate.main(["--detections", str(tmp_path / name), "--data", str(tmp_path), "--dataset",
                       "ava", "--out", str(tmp_path / "out"), "--device", "cpu"])
        boxes = (tmp_path / "out" / "detections.csv").read_text()
        return json.loads((tmp_path / "out" / "metrics.json").read_text())["f-mAP@0.5"], boxes

    first = scored("saved.npz")
    assert first[0] > 0 and scored("old.npz") == first
    grey_frames(tmp_path / "frames/vid", "vid_{:06d}.jpg", 100, size=(128, 96))
    assert scored("saved.npz") == first
    shutil.rmtree(tmp_path / "frames")
    assert scored("saved.npz") == first
    with pytest.raises(SystemExit, match="old.npz does not say of which size its frames were"):
        scored("old.npz")
