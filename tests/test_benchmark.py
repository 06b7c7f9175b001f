"""tools/benchmark.py: its commands run on a CPU, write what they print, and say what is so by construction."""
import json
import signal
import sys
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch

import evaluate
from beside import synthetic
from model import PRESETS, VideoActionDetector
from tools import benchmark


def command(monkeypatch, path, *options):
    """What a command writes."""
    monkeypatch.setattr(sys, "argv", ["benchmark", *options, "--out", str(path)])
    benchmark.main()
    return json.loads(path.read_text())


def test_scoring_measures_both_protocols_and_ava(monkeypatch, tmp_path):
    rows = command(monkeypatch, tmp_path / "s.json", "scoring", "--share", "0.003")["rows"]
    assert [row["what"].split(":")[0] for row in rows] == ["UCF101-24, strict"] * 3 + ["UCF101-24, released"] * 2 + ["AVA"]
    assert all(row["seconds"] > 0 and row["peak_gb"] > 0 for row in rows)


def test_the_made_up_set_has_ucf101_24_s_number_of_frames():
    found, tubes = benchmark.made_up_set(np.random.default_rng(0), np.array([3, 5]), queries=4, classes=6)
    assert found["class_prob"].shape == (8 * 4, 6) and found["frame"].tolist()[:5] == [1, 1, 1, 1, 2]
    assert {tube["video"] for tube in tubes} == {0, 1} and all(len(tube["boxes"]) in (3, 5) for tube in tubes)


def test_a_step_is_split_into_phases(monkeypatch, tmp_path):
    (row,) = command(monkeypatch, tmp_path / "s.json", "step", "--batches", "2", "--runs", "1", "--set", "micro_batch=2")["rows"]
    whole = sum(row[phase] for phase in ("forward", "loss", "backward", "optimizer"))
    assert row["clips_per_s"] == pytest.approx(2000 / whole) and 0 < row["matching"] < whole


def test_forward_times_stages_and_counts_what_efficiency_counts(monkeypatch, tmp_path):
    small = {"vit_depth": 1, "encoder_layers": 1, "decoder_layers": 1, "frames": 2, "num_queries": 2,
             "vit_width": 96, "dim_feedforward": 64, "conv_blocks": 1}
    changes = [f"{name}={value}" for name, value in small.items()]
    result = command(monkeypatch, tmp_path / "f.json", "forward", "--size", "32", "64", "--runs", "1", "--matmul", "64",
                     "--set", *changes)
    stages = [result["seconds"][stage] for stage in ("backbone", "encoder", "localizing", "classifying")]
    assert 0 < sum(stages) < result["seconds"]["all"]
    counted = evaluate.efficiency(replace(PRESETS["ucf"], **small), torch.device("cpu"), (32, 64), runs=1)
    assert result["multiply_adds"] == counted["multiply_adds"]


def test_a_gate_that_none_passes_saves_multiply_adds(monkeypatch, tmp_path):
    monkeypatch.setitem(synthetic.LENGTHS, "val", 10)
    config = PRESETS["synthetic"]
    torch.manual_seed(0)
    torch.save({"model": VideoActionDetector(config).state_dict(), "config": asdict(config), "dataset": "synthetic",
                "classes": list(synthetic.CLASS_NAMES)}, tmp_path / "c.pt")
    rows = command(monkeypatch, tmp_path / "g.json", "gate", "--ckpt", str(tmp_path / "c.pt"), "--gates", "0", "1")["rows"]
    assert [row["actors_classified"] for row in rows] == [1, 0] and rows[1]["f-mAP@0.5"] < rows[0]["f-mAP@0.5"] + 1e-9
    assert rows[1]["giga_multiply_adds"] < 0.8 * rows[0]["giga_multiply_adds"]


def test_products_of_bf16_are_rounded_once(monkeypatch):
    x, y = torch.randn(64, 300).bfloat16(), torch.randn(300, 32).bfloat16().requires_grad_()
    exact = x.double() @ y.double()
    with benchmark.Bf16Products():
        product = x @ y
        product.sum().backward()
    assert product.dtype == y.grad.dtype == torch.bfloat16
    assert ((product - exact).abs() <= exact.abs() * 2 ** -8 + 1e-5).all(), "half a step of 8 bits"
    assert torch.allclose(y.grad.double(), x.double().sum(0)[:, None].expand(-1, 32), rtol=2 ** -8)


def test_curves_of_both_precisions_come_close(monkeypatch, tmp_path):
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    rows = command(monkeypatch, tmp_path / "c.json", "curves", "--seeds", "3", "--steps", "3", "--set", "batch_size=2",
                   "micro_batch=2")
    for number, handler in before.items():
        signal.signal(number, handler)
    assert [row["precision"] for row in rows] == ["float32", "bf16"] and all(len(row["losses"]) == 3 for row in rows)
    one, two = (np.array(row["losses"]) for row in rows)
    assert (one != two).any() and np.allclose(one, two, rtol=0.15)
