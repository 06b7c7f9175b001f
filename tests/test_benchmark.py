"""tools/benchmark.py: all that it measures runs on a CPU; what goes wrong on the way is a row."""

import json
import math
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import evaluate
from model import PRESETS
from tools import benchmark

ROOT = Path(__file__).parents[1]


def command(path, *options):
    """What a command writes."""
    benchmark.main([*options, "--out", str(path)])
    return json.loads(path.read_text())


def test_gpu_measures_every_part_at_tiny_sizes_on_a_cpu(tmp_path):
    environment = dict(os.environ, CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1")
    done = subprocess.run(
        [sys.executable, "-m", "tools.benchmark", "gpu", "--minutes", "8", "--out", str(tmp_path)],
        cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "gpu.json").read_text())["rows"]
    assert {row["part"] for row in rows} == set(benchmark.PARTS)
    assert not [row for row in rows if "note" in row], (tmp_path / "gpu.log").read_text()[-4000:]
    for row in rows:
        line = [text.strip() for text in next_line(done.stdout, row).split("|")[1:-1]]
        assert len(line) == len(benchmark.COLUMNS[row["part"]])
    sampled = [row for row in rows if row["part"] == "kernel" and row["variant"] != "copy"]
    assert {row["dtype"] for row in sampled} == {"bfloat16", "float32"}
    assert all(0 < row["error"] < 0.01 and row["backward_ms"] > 0 for row in sampled)
    training = [row for row in rows if row["part"] == "training"]
    assert {row["recomputed"] for row in training} == set(benchmark.RECOMPUTED)
    assert all(row["clips_per_s"] > 0 for row in rows if "clips_per_s" in row)
    (trained,) = [row for row in rows if row["part"] == "command"]
    assert trained["steps_per_s"] == pytest.approx(trained["clips_per_s"] / 2)
    assert 0 < trained["data_share"] < 1


def next_line(printed, row):
    """The printed line of a row: the one with all that it is of."""
    known = [benchmark.cell(row[name]) for name in benchmark.COLUMNS[row["part"]] if name in row]
    (line, *_) = [line for line in printed.splitlines() if all(text in line for text in known)]
    return line


def plan(device, sweep):
    """A part in which nothing goes well."""
    def fail():
        raise RuntimeError("first line\nsecond line")

    def fill():
        raise torch.OutOfMemoryError("CUDA out of memory")

    return [({"kind": "a", "batch": 1}, lambda: {"ms": 1.5}), ({"kind": "a", "batch": 2}, fill),
            ({"kind": "a", "batch": 4}, lambda: {"ms": 0.0}), ({"kind": "b", "batch": 4}, fail),
            ({"kind": "c"}, lambda: sys.exit("no data")), ({"kind": "d"}, lambda: {"ms": 2.5}),
            ({"kind": "e"}, lambda: time.sleep(60)), ({"kind": "f"}, lambda: {"ms": 3.5})]


def rows_of(monkeypatch, tmp_path, plan, seconds):
    monkeypatch.setitem(benchmark.PARTS, "test", (plan, 1.0))
    deadline = time.monotonic() + seconds
    return list(benchmark.rows_of("test", False, tmp_path / "log", deadline))


def test_what_fails_or_does_not_fit_is_a_row_and_the_rest_is_measured(monkeypatch, tmp_path):
    rows = rows_of(monkeypatch, tmp_path, plan, 3)
    said = [(row["kind"], row.get("ms"), row.get("note")) for row in rows]
    assert said == [
        ("a", 1.5, None), ("a", None, "out of memory"),
        ("a", None, "more than what did not fit"), ("b", None, "failed: RuntimeError: first line"),
        ("c", None, "failed: SystemExit: no data"), ("d", 2.5, None),
        ("e", None, "no time was left"), ("f", None, "no time was left")]
    assert "second line" in (tmp_path / "log").read_text()


def test_a_part_whose_process_dies_is_named_with_its_exit_code(monkeypatch, tmp_path):
    def dying(device, sweep):
        return [({"kind": "a"}, lambda: {"ms": 1.0}), ({"kind": "b"}, lambda: os._exit(7))]

    first, second = rows_of(monkeypatch, tmp_path, dying, 60)
    assert first == {"kind": "a", "ms": 1.0} and "ended with 7" in second["note"]


def test_a_wrong_result_of_the_kernel_is_said(monkeypatch):
    right = benchmark.deform_attn_3d_fused
    monkeypatch.setattr(benchmark, "deform_attn_3d_fused", lambda *inputs: right(*inputs) * 1.001)
    row = benchmark.time_sampling([(2, 3, 3), (1, 2, 1)], 2, torch.float32, "backend torch",
                                  torch.device("cpu"), runs=1)
    assert row["note"].startswith("WRONG") and row["error"] == pytest.approx(1e-3, rel=0.05)


def test_the_levels_are_those_of_the_presets():
    shapes = benchmark.make_levels(*benchmark.SIZES["ucf"])
    assert shapes == [(16, 56, 56), (16, 28, 28), (16, 14, 14), (16, 7, 7)]
    assert sum(math.prod(shape) for shape in shapes) == 66640
    for name, (frames, side) in benchmark.SIZES.items():
        config = PRESETS[name]
        assert (frames, side) == (config.frames // 2, config.crop_size // 4)


def test_a_step_is_split_into_phases(tmp_path):
    (row,) = command(tmp_path / "s.json", "step", "--batches", "2", "--runs", "1", "--set",
                     "micro_batch=2")["rows"]
    whole = sum(row[phase] for phase in ("forward", "loss", "backward", "optimizer"))
    assert row["clips_per_s"] == pytest.approx(2000 / whole) and 0 < row["matching"] < whole


def test_forward_times_stages_and_counts_what_efficiency_counts(tmp_path):
    small = {"vit_depth": 1, "encoder_layers": 1, "decoder_layers": 1, "frames": 2,
             "num_queries": 2, "vit_width": 96, "dim_feedforward": 64, "conv_blocks": 1}
    changes = [f"{name}={value}" for name, value in small.items()]
    result = command(tmp_path / "f.json", "forward", "--size", "32", "64", "--runs", "1",
                     "--matmul", "64", "--set", *changes)
    stages = [result["seconds"][stage]
              for stage in ("backbone", "encoder", "localizing", "classifying")]
    assert min(stages) > 0 and sum(stages) < result["seconds"]["all"]
    config = replace(PRESETS["ucf"], **small)
    counted = evaluate.efficiency(config, torch.device("cpu"), (32, 64), runs=1)
    assert result["multiply_adds"] == counted["multiply_adds"]


def test_scoring_measures_both_protocols_and_ava(tmp_path):
    rows = command(tmp_path / "s.json", "scoring", "--share", "0.003")["rows"]
    assert [row["what"].split(":")[0] for row in rows] == \
        ["UCF101-24, strict"] * 3 + ["UCF101-24, released"] * 2 + ["AVA"]
    assert all(row["seconds"] > 0 and row["peak_gb"] > 0 for row in rows)


def test_the_made_up_set_has_a_row_a_query_and_frame():
    rng = np.random.default_rng(0)
    found, tubes = benchmark.made_up_set(rng, np.array([3, 5]), queries=4, classes=6)
    assert found["class_prob"].shape == (8 * 4, 6)
    assert found["frame"].tolist()[:5] == [1, 1, 1, 1, 2]
    assert {tube["video"] for tube in tubes} == {0, 1}
    assert all(len(tube["boxes"]) == (3, 5)[tube["video"]] for tube in tubes)
    frames = benchmark.frames_of(tubes)
    assert len(frames["box"]) == sum(len(tube["boxes"]) for tube in tubes)
    assert frames["frame"].max() == 5 and set(frames["video"]) == {0, 1}


def test_against_measures_in_turns_and_tells_the_ratio(monkeypatch, tmp_path):
    (tmp_path / "tools").mkdir()
    (tmp_path / "tools/benchmark.py").touch()
    seen = []

    def measure_tree(tree, arguments):
        seen.append("this" if tree == ROOT else "other")
        return {"x, s": 3.0 if tree == ROOT else 2.0 + len(seen)}

    monkeypatch.setattr(benchmark, "measure_tree", measure_tree)
    result = command(tmp_path / "a.json", "against", str(tmp_path), "--rounds", "2")
    assert seen == ["other", "this", "this", "other"]
    assert result["rows"] == [{"what": "x, s", "other": 4.5, "this": 3.0, "ratio": 3.0 / 4.5}]
    with pytest.raises(SystemExit, match="no tree of this project"):
        benchmark.main(["against", str(tmp_path / "tools")])


def test_a_command_that_fails_in_the_other_tree_shows_what_it_printed(tmp_path):
    with pytest.raises(SystemExit, match="ended with 3:\nabout to fail"):
        benchmark.run_command(tmp_path, "-c", "print('about to fail'); exit(3)")
