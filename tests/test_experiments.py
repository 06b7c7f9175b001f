"""tools/experiments.py: which runs a table asks for, what of them is kept, the tables written, the shares of attention."""
import csv
import json
import math
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import stats

from data import build_dataset
from model import PRESETS
from tools import experiments
from tools.experiments import FULL, ROWS, TABLES


def test_every_row_is_a_config_of_its_own_and_every_table_has_the_full_model():
    configs = {row: experiments.config_of(row) for row in ROWS}
    assert len(set(configs.values())) == len(ROWS) and configs[FULL] == PRESETS["synthetic"]
    assert len({str(experiments.folder_of("runs", row, 0)) for row in ROWS}) == len(ROWS)
    for title, seeds, rows in TABLES.values():
        assert FULL in rows and set(rows) <= set(ROWS) and seeds >= 1
    assert [len(TABLES[table][2]) for table in "1234"] == [5, 3, 2, 4]


@pytest.fixture(autouse=True)
def handlers():
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def test_terminated_it_terminates_its_runs(tmp_path):
    """A run that says nothing and waits stands in for train.py."""
    (tmp_path / "train.py").write_text("import time, pathlib; pathlib.Path('started').touch(); time.sleep(300)")
    code = ("import sys; from pathlib import Path; from tools import experiments; experiments.ROOT = Path(sys.argv[1]); "
            "sys.exit(experiments.main(['--table', '3', '--seeds', '0', '--jobs', '1', '--out', sys.argv[1]]))")
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], cwd=Path(experiments.__file__).parents[1],
                               stderr=subprocess.DEVNULL)
    for _ in range(600):
        if (tmp_path / "started").exists():
            break
        time.sleep(0.1)
    (child,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split() or [
        child for task in Path(f"/proc/{process.pid}/task").iterdir() for child in (task / "children").read_text().split()]
    process.terminate()
    assert process.wait(timeout=60) == 143
    assert not Path(f"/proc/{child}").exists()


def write_run(folder, row, seed, values, clips=1760):
    """A run that is done, with its numbers."""
    folder.mkdir(parents=True, exist_ok=True)
    config = replace(experiments.config_of(row), clips_per_epoch=clips)
    saved = {"dataset": "synthetic", "seed": seed, **asdict(config)}
    saved.pop("combine")                                                     # as a run of an earlier version
    (folder / "config.json").write_text(json.dumps(saved | ({"combine": config.combine} if config.combine != "sum" else {})))
    (folder / "results.csv").write_text(f"epoch,step\n{config.epochs},1100\n")
    (folder / "measured.json").write_text(json.dumps(values))


def test_runs_are_shared_between_tables_kept_when_done_and_resumed_when_broken_off(tmp_path, monkeypatch, capsys):
    commands = []

    def train(command, cwd, env, stdout, stderr):
        commands.append(command[2:])
        folder = command[command.index("--resume" if "--resume" in command else "--out") + 1]
        row = next(row for row in ROWS for seed in (0, 1) for kind in ("", "-time")
                   if folder.endswith("/" + experiments.folder_of("", row, seed, kind).name))
        clips = next((int(word.partition("=")[2]) for word in command if word.startswith("clips")), 1760)
        write_run(experiments.Path(folder), row, int(folder[-1]), {"f-mAP all": 0.5}, clips)
        return SimpleNamespace(wait=lambda: int("mean-seed1" in folder))

    monkeypatch.setattr(experiments.subprocess, "Popen", train)
    monkeypatch.setattr(experiments, "ROOT", tmp_path)
    monkeypatch.setattr(experiments, "cost", lambda config: ("1 M", "1 G"))
    (tmp_path / "docs").mkdir()
    write_run(experiments.folder_of(tmp_path, FULL, 0), FULL, 0, {"f-mAP all": 0.6})
    broken = experiments.folder_of(tmp_path, "levels mean", 0)
    write_run(broken, "levels mean", 0, {})
    (broken / "results.csv").write_text("epoch,step\n4,440\n")              # evaluated, then broken off
    (broken / "last.pt").touch()
    assert experiments.main(["--table", "2", "3", "--seeds", "0", "1", "--jobs", "1", "--out", str(tmp_path)]) == 1
    assert "1 runs failed, see the end of" in capsys.readouterr().out
    names = [command[command.index("--out") + 1].rpartition("/")[2] for command in commands if "--out" in command]
    full = experiments.folder_of("", FULL, 1).name
    assert names == ["levels-weighted-seed0", "without-P-seed0", full, "levels-weighted-seed1", "levels-mean-seed1",
                     "without-P-seed1"]
    assert [command for command in commands if "--resume" in command] == [["--resume", str(broken)]]
    assert "--set aggregation=weighted" in " ".join(commands[0]) and "--seed 0" in " ".join(commands[0])
    commands.clear()
    monkeypatch.setattr(experiments, "time_step", lambda config, *_: {"clips_per_s": 1.0 + (config.aggregation == "mean")})
    for _ in range(2):                                                       # the second call goes by what the first took
        assert experiments.main(["--table", "2", "--seeds", "0", "--jobs", "1", "--same-time", "--out", str(tmp_path)]) == 0
        monkeypatch.setattr(experiments, "time_step", None)
    assert [command[-2:] for command in commands] == [["aggregation=weighted", "clips_per_epoch=1760"],
                                                      ["aggregation=mean", "clips_per_epoch=3520"]]
    assert "### Table 2: aggregation of the levels (AVA mAP, UCF f-mAP), the same time" in (
        tmp_path / "docs" / "experiments.md").read_text()
    commands.clear()
    assert experiments.main(["--table", "2", "3", "--seeds", "0", "1", "--jobs", "2", "--out", str(tmp_path)]) == 0
    assert not commands
    with pytest.raises(SystemExit, match="holds a run of another Config"):
        experiments.main(["--table", "2", "--out", str(tmp_path), "--set", "dim=128"])


def test_tables_have_means_with_intervals_and_differences_paired_by_seed(tmp_path, monkeypatch):
    ours, theirs = [0.8, 0.7, 0.75], [0.7, 0.65, 0.61]
    for seed in range(3):
        write_run(experiments.folder_of(tmp_path, FULL, seed), FULL, seed, {"f-mAP all": ours[seed]})
        write_run(experiments.folder_of(tmp_path, "without P", seed), "without P", seed, {"f-mAP all": theirs[seed]})
    monkeypatch.setattr(experiments, "cost", lambda config: ("1 M", "1 G"))
    page = tmp_path / "page.md"
    page.write_text("# What was found\n\nProse.\n\n" + experiments.MARK + "\nold tables")
    experiments.report(tmp_path, page, "cpu")
    text = page.read_text()
    assert text.startswith("# What was found\n\nProse.\n\n") and "old tables" not in text
    with pytest.raises(SystemExit, match="holds no run"):                   # tables stay where there is nothing to write
        experiments.report(tmp_path / "elsewhere", page, "cpu")
    assert page.read_text() == text
    half = np.std(ours, ddof=1) / math.sqrt(3) * stats.t.ppf(0.975, 2)
    assert f"| {FULL} | 33.5, 85.9 | 1 M | 1 G | 0 1 2 | 0.750 ± {half:.3f} |" in text
    low, high = stats.ttest_rel(theirs, ours).confidence_interval(0.95)
    assert f"| *less the full model* |  |  |  |  | {(low + high) / 2:.3f} ± {(high - low) / 2:.3f} |" in text
    assert text.count("### Table") == 1 and "levels mean" not in text, "a table of the full model alone says nothing"


def test_cover_is_the_share_of_each_cell_in_the_box():
    cover = experiments.cover(torch.tensor([0.25, 0.5, 0.625, 1.2]), (2, 4))
    np.testing.assert_allclose(cover, [[0, 0, 0, 0], [0, 1, 0.5, 0]])
    assert np.isnan(experiments.cover(torch.full((4,), math.nan), (2, 3))).all()


def test_attention_shares_of_maps_that_are_known():
    config = PRESETS["synthetic"]
    dataset = build_dataset("synthetic", None, "val", config)
    clips = [dataset[i] for i in range(24)]

    def model(images, return_attention):
        """Queries on the true boxes; context classes look at the whole frame, the others at the top left cell."""
        targets = [clip[1] for clip in clips if any(torch.equal(clip[0], image) for image in images)]
        boxes = torch.full((len(images), 8, 5, 4), 0.01)
        for b, target in enumerate(targets):
            boxes[b, :, :len(target["boxes"])] = target["boxes"].transpose(0, 1)
        attention = torch.zeros(len(images), 8, 5, 9, 8, 12)
        attention[..., :6, 0, 0], attention[..., 6:, :, :] = 0.9, 1 / 96
        return {"pred_boxes": boxes, "pred_conf": torch.zeros(boxes.shape[:3]), "attention": attention}

    few = type("Few", (torch.utils.data.Dataset,), {"class_groups": dataset.class_groups, "__len__": lambda self: 24,
                                                    "__getitem__": lambda self, i: clips[i]})()
    shares = experiments.attention_shares(model, few, config, "cpu")
    outside, cause = [], []
    for _, target in clips:
        for n, t, c in target["labels"].nonzero().tolist():
            if c >= 6 and target["present"][n, t]:
                x, y, w, h = target["boxes"][n, t].tolist()
                left, right, top, bottom = max(x - w / 2, 0), min(x + w / 2, 1), max(y - h / 2, 0), min(y + h / 2, 1)
                outside.append(1 - (right - left) * (bottom - top))
                x, y, w, h = target["cause"][n, t].tolist()
                cause.append((min(x + w / 2, 1) - max(x - w / 2, 0)) * (min(y + h / 2, 1) - max(y - h / 2, 0)))
    assert shares["context"]["outside"] == pytest.approx(np.mean(outside), abs=1e-4)
    assert shares["context"]["cause"] == pytest.approx(np.mean(cause), abs=1e-4) == shares["context"]["area"]
    assert shares["detail"]["outside"] > 0.9 and shares["own motion"]["cause"] < 0.05
