"""tools/experiments.py: which runs tables ask for, what of them is kept, tables,
places."""

import json
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from scipy import stats

from conftest import ROOT
from model import PRESETS
from tools import experiments
from tools.experiments import FULL, ROWS, TABLES


def test_every_row_is_a_config_of_its_own_and_every_table_has_the_full_model():
    configs = {row: experiments.config_of(row) for row in ROWS}
    assert len(set(configs.values())) == len(ROWS)
    assert configs[FULL] == replace(PRESETS["synthetic"], clips_per_epoch=2880)
    assert configs[FULL].epochs * configs[FULL].clips_per_epoch / configs[FULL].batch_size == 3600
    assert len({experiments.folder_of("runs", row, 0) for row in ROWS}) == len(ROWS)
    for _, seeds, rows in TABLES.values():
        assert FULL in rows and set(rows) <= set(ROWS) and seeds >= 1
    assert [len(TABLES[table][2]) for table in "1234"] == [5, 3, 2, 4]
    assert len(TABLES["quirks"][2]) == 7


@pytest.fixture(autouse=True)
def handlers():
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def children(pid):
    """The processes that any thread of a process started."""
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        found += (task / "children").read_text().split()
    return found


def test_terminated_it_terminates_its_runs(tmp_path):
    """A run that says nothing and waits stands in for train.py."""
    (tmp_path / "train.py").write_text(
        "import time, pathlib; pathlib.Path('started').touch(); time.sleep(300)")
    code = ("import sys; from pathlib import Path; from tools import experiments; "
            "experiments.ROOT = Path(sys.argv[1]); sys.exit(experiments.main("
            "['--table', '3', '--seeds', '0', '--jobs', '1', '--out', sys.argv[1]]))")
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT,
                               stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (tmp_path / "started").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    (child,) = children(process.pid)
    process.terminate()
    assert process.wait(timeout=60) == 143
    assert not Path(f"/proc/{child}").exists()


def write_run(folder, row, seed, value=0.5, cause=0.1, speed=10.0, **changes):
    """A run that is done, with its numbers."""
    folder.mkdir(parents=True, exist_ok=True)
    config = replace(experiments.config_of(row), **changes)
    saved = {"dataset": "synthetic", "seed": seed, **asdict(config)}
    if config.combine == "sum":
        del saved["combine"]  # as in a run of an earlier version
    (folder / "config.json").write_text(json.dumps(saved))
    (folder / "results.csv").write_text(f"epoch,step\n3,540\n{config.epochs},1800\n")
    results = {"f-mAP@0.5": value, "v-mAP@0.5": value / 2, "per_group": {}}
    (folder / "metrics.json").write_text(json.dumps(results))
    shares = {"context": {"outside": 0.6, "cause": cause, "area": 0.05}}
    (folder / "attention.json").write_text(json.dumps(shares))
    speeds = (0.1, speed, speed, 1.2 * speed)  # the first step waits for other things
    lines = [json.dumps({"clips_per_s": value}) for value in speeds]
    (folder / "log.jsonl").write_text("\n".join(lines))


@pytest.fixture
def pretended(tmp_path, monkeypatch):
    """Stands in for train.py: notes the arguments and writes a run; one row's seed 1 fails."""
    commands = []

    def train(command, cwd, env, stdout, stderr):
        arguments = command[2:]
        commands.append(arguments)
        folder = Path(arguments[1])
        name, _, seed = folder.name.rpartition("-seed")
        name = name.removesuffix("-time")
        row = next(row for row in ROWS if experiments.folder_of("", row, 0).name == name + "-seed0")
        changes = {}
        for word in arguments:
            if word.startswith("clips_per_epoch="):
                changes["clips_per_epoch"] = int(word.partition("=")[2])
        write_run(folder, row, int(seed), **changes)
        failed = "mean-seed1" in folder.name
        return SimpleNamespace(wait=lambda: int(failed))

    monkeypatch.setattr(experiments.subprocess, "Popen", train)
    monkeypatch.setattr(experiments, "ROOT", tmp_path)
    monkeypatch.setattr(experiments, "cost", lambda config: ("1 M", "1 G"))
    (tmp_path / "docs").mkdir()
    page = f"# Experiments\n\n{experiments.BEGIN}\nold\n{experiments.END}\n\n## Found\n"
    (tmp_path / "docs" / "experiments.md").write_text(page)
    return commands


def names_of(commands):
    return [Path(arguments[1]).name for arguments in commands]


def run(out, *arguments):
    return experiments.main([*arguments, "--jobs", "1", "--out", str(out)])


def test_runs_are_shared_kept_when_done_and_resumed_when_broken_off(tmp_path, pretended, capsys):
    write_run(experiments.folder_of(tmp_path, FULL, 0), FULL, 0)
    broken = experiments.folder_of(tmp_path, "levels mean", 0)
    write_run(broken, "levels mean", 0)
    (broken / "results.csv").write_text("epoch,step\n4,720\n")
    (broken / "last.pt").touch()
    assert run(tmp_path, "--table", "2", "3", "--seeds", "0", "1") == 1
    assert "1 runs failed, see the end of" in capsys.readouterr().out
    full = experiments.folder_of("", FULL, 1).name
    assert names_of(pretended) == ["levels-weighted-seed0", "levels-mean-seed0", "without-P-seed0",
                                   full, "levels-weighted-seed1", "levels-mean-seed1",
                                   "without-P-seed1"]
    assert pretended[0][2:] == ["--seed", "0", "--set", "clips_per_epoch=2880",
                                "aggregation=weighted"]
    assert pretended[1] == ["--resume", str(broken)]
    pretended.clear()
    assert run(tmp_path, "--table", "2", "3", "--seeds", "0", "1") == 0 and not pretended
    with pytest.raises(SystemExit, match="holds a run of another Config"):
        run(tmp_path, "--table", "2", "--set", "dim=128")


def test_a_run_that_did_not_come_to_write_its_shares_is_not_done(tmp_path):
    folder = experiments.folder_of(tmp_path, FULL, 0)
    write_run(folder, FULL, 0)
    assert experiments.is_done(folder)
    (folder / "attention.json").unlink()
    assert not experiments.is_done(folder)


def test_runs_of_the_same_time_see_as_many_clips_as_their_speed_allows(tmp_path, pretended):
    with pytest.raises(SystemExit, match="run the command without it first"):
        run(tmp_path, "--table", "2", "--seeds", "0", "--same-time")
    for row, speed in ((FULL, 10.0), ("levels weighted", 10.0), ("levels mean", 20.0)):
        write_run(experiments.folder_of(tmp_path, row, 0), row, 0, speed=speed)
    assert run(tmp_path, "--table", "2", "--seeds", "0", "--same-time") == 0
    assert names_of(pretended) == ["levels-weighted-time-seed0", "levels-mean-time-seed0"]
    assert [arguments[-1] for arguments in pretended] == ["clips_per_epoch=2880",
                                                          "clips_per_epoch=5760"]
    pretended.clear()
    write_run(experiments.folder_of(tmp_path, "levels mean", 1), "levels mean", 1, speed=90.0)
    assert run(tmp_path, "--table", "2", "--seeds", "0", "1", "--same-time") == 0
    assert [arguments[-1] for arguments in pretended] == ["clips_per_epoch=2880",
                                                          "clips_per_epoch=5760"], "as seed 0"
    text = (tmp_path / "docs" / "experiments.md").read_text()
    assert "### Table 2: aggregation of the levels (the paper: AVA mAP, UCF f-mAP); the same time" \
        in text


def test_a_run_that_something_slowed_does_not_set_the_same_time(tmp_path):
    for seed, speed in enumerate((10.0, 5.0, 10.0)):
        write_run(experiments.folder_of(tmp_path, FULL, seed), FULL, seed, speed=speed)
        folder = experiments.folder_of(tmp_path, "levels mean", seed)
        write_run(folder, "levels mean", seed, speed=20.0)
    assert experiments.same_time(tmp_path, "levels mean") == 2 * 2880


def test_tables_have_means_with_intervals_and_differences_paired_by_seed(tmp_path, monkeypatch):
    ours, theirs = [0.8, 0.7, 0.75, 0.5], [0.7, 0.65, 0.61]
    for seed, value in enumerate(ours):
        folder = experiments.folder_of(tmp_path, FULL, seed)
        write_run(folder, FULL, seed, value, cause=0.1)
    for seed, value in enumerate(theirs):
        folder = experiments.folder_of(tmp_path, "without P", seed)
        write_run(folder, "without P", seed, value, cause=0.2)
    monkeypatch.setattr(experiments, "cost", lambda config: ("1 M", "1 G"))
    page = tmp_path / "page.md"
    page.write_text(f"# Title\n\n{experiments.BEGIN}\nold\n{experiments.END}\n\n## Found\n\nProse.")
    experiments.report(tmp_path, page)
    text = page.read_text()
    assert text.startswith(f"# Title\n\n{experiments.BEGIN}\n\n### Table 3")
    assert text.endswith(f"\n{experiments.END}\n\n## Found\n\nProse.") and "old" not in text
    with pytest.raises(SystemExit, match="holds no finished run"):
        experiments.report(tmp_path / "elsewhere", page)
    assert page.read_text() == text
    half = np.std(ours, ddof=1) / 2 * stats.t.ppf(0.975, 3)
    mean = f"{np.mean(ours):.3f} ± {half:.3f}"
    assert f"| {FULL} | 33.5, 85.9 | 1 M | 1 G | 0 1 2 3 | {mean} |" in text
    low, high = stats.ttest_rel(theirs, ours[:3]).confidence_interval(0.95)
    difference = f"{(low + high) / 2:.3f} ± {(high - low) / 2:.3f}"
    assert f"| *less the full model* |  |  |  | 0 1 2 | {difference} |" in text
    assert "on the cause, context |" in text and "| 0 1 2 | 0.000 ± 0.000 | 0.100 ± 0.000 |" in text
    assert text.count("### Table") == 1, "a table of the full model alone says nothing"
    page.write_text("# Title")
    with pytest.raises(SystemExit, match="lacks the line"):
        experiments.report(tmp_path, page)
    other = experiments.folder_of(tmp_path, "without P", 1)
    write_run(other, "without P", 1, offset_rate=1.0)
    with pytest.raises(SystemExit, match="without-P-seed1 is of another recipe"):
        experiments.report(tmp_path, page)


def test_the_page_in_the_repository_has_a_place_for_the_tables():
    text = (ROOT / "docs" / "experiments.md").read_text()
    assert text.index(experiments.BEGIN) < text.index(experiments.END)


def test_places_are_run_and_reported_by_the_same_command(tmp_path, monkeypatch):
    called = []
    monkeypatch.setattr(experiments, "ROOT", tmp_path)
    monkeypatch.setattr(experiments.places, "run_all", lambda *given: called.append(given))
    monkeypatch.setattr(experiments.places, "report", lambda *given: called.append(given))
    assert run(tmp_path, "--places", "--seeds", "1") == 0
    out = tmp_path / "places"
    page, figure = tmp_path / "docs" / "places.md", tmp_path / "docs" / "places.png"
    assert called == [(out, [1], 1), (out, page, figure)]
    with pytest.raises(SystemExit):
        run(tmp_path, "--places", "--table", "1")
    assert len(called) == 2
