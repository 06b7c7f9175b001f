"""The paper's Tables 1 to 4, and what each quirk costs, on the synthetic set: `python -m tools.experiments --table 1 3`.

A row of a table is the synthetic preset with a switch or two (ROWS), a run is a row with a seed: `train.py` in a process of
its own on one core or one GPU, as many side by side as there are. Runs stand in `--out`, ROW-seedN; tables share them, one
that was broken off goes on, one that is done is kept: end the command when you like and repeat it. Rows get the same number
of clips; with --same-time a second run each, ROW-time-seedN, of as many clips as take the time of the full model's run.
The tables of docs/experiments.md are then written anew from all runs that are done.

`attention_shares` puts into numbers what the paper's Fig. 2 and 7 show by eye.
"""
# B clips, T frames, A actor queries, C classes, N actors; H', W' cells of an attention map

import argparse
import csv
import json
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from functools import partial
from pathlib import Path

import numpy as np
import torch
from scipy import stats
from torch.utils.data import DataLoader
from tqdm import tqdm

import evaluate
from data import build_dataset, collate
from model import PRESETS, QUIRKS, Config, VideoActionDetector, config_from_dict, override
from objective import cxcywh_to_xyxy, match
from tools.benchmark import time_step

ROOT = Path(__file__).resolve().parents[1]
FULL = "deformable3d, LDL + CDL"
WITHOUT_EFFECT = ("unused_tensors", "position_pairs", "unmasked_padding")   # here: no paper frequencies, no padding
ROWS = {
    FULL: [],
    "transformer, DETR": ["encoder=transformer", "decoder=detr"],
    "transformer, LDL": ["encoder=transformer", "decoder=ldl"],
    "transformer, LDL + CDL": ["encoder=transformer"],
    "deformable3d, LDL": ["decoder=ldl"],
    "levels weighted": ["aggregation=weighted"],
    "levels mean": ["aggregation=mean"],
    "without P": ["class_position=False"],
    "concat + 1d conv": ["combine=concat"],
    "cross-attention": ["combine=cross-attention"],
    "self-attention": ["combine=self-attention"],
    **{f"quirk {name}": [f"quirks={name}"] for name in QUIRKS if name not in WITHOUT_EFFECT},
}
TABLES = {  # title, seeds that it wants, its rows with what the paper has for them
    "1": ("each module (the paper: AVA mAP)", 3, {
        "transformer, DETR": "28.6", "transformer, LDL": "29.1", "transformer, LDL + CDL": "31.4",
        "deformable3d, LDL": "31.3", FULL: "33.5"}),
    "2": ("aggregation of the levels (AVA mAP, UCF f-mAP)", 2, {
        FULL: "33.5, 85.9", "levels weighted": "32.9, 82.0", "levels mean": "32.0, 82.8"}),
    "3": ("actor positional queries (AVA mAP, UCF f-mAP)", 3, {FULL: "33.5, 85.9", "without P": "31.7, 82.9"}),
    "4": ("combining actor and context (AVA mAP, UCF f-mAP)", 2, {
        FULL: "33.5, 85.9", "concat + 1d conv": "31.8, 84.7", "cross-attention": "31.3, 81.3",
        "self-attention": "30.8, 81.0"}),
    "quirks": ("one quirk in force, the others not", 1, {
        FULL: "", **{row: "" for row in ROWS if row.startswith("quirk")}}),
}
MARK = "<!-- What follows is written by tools/experiments.py. -->"


def config_of(row, changes=()):
    """The synthetic preset with a row's switches and the changes."""
    return override(PRESETS["synthetic"], [*ROWS[row], *changes])


def folder_of(out, row, seed, kind=""):
    """Where a run stands: out/ROW-seedN, a run of the same time (kind "-time") in out/ROW-time-seedN."""
    return Path(out) / "{}{}-seed{}".format(row.replace(", ", "-").replace(" + ", "-").replace(" ", "-"), kind, seed)


def saved_config(folder):
    """The Config of the run in a folder, None without one."""
    if not (folder / "config.json").is_file():
        return None
    saved = json.loads((folder / "config.json").read_text())
    return config_from_dict({field.name: saved[field.name] for field in fields(Config) if field.name in saved})


def is_done(folder, config=None):
    """Whether a run has ended. SystemExit if the folder holds a run of another Config (None: of any)."""
    saved, results = saved_config(folder), folder / "results.csv"
    if None not in (saved, config) and config != saved:
        raise SystemExit(f"{folder} holds a run of another Config (see its config.json): choose another --out or remove it")
    return saved is not None and results.is_file() and int(list(csv.DictReader(results.open()))[-1]["epoch"]) == saved.epochs


def train_one(job, slots, running):
    """One run to its end, in a process with a core or GPU of its own -> its folder, or None if it failed."""
    folder, row, seed, changes = job
    slot = slots.pop()
    where = ["--resume", str(folder)] if (folder / "last.pt").is_file() else [
        "--out", str(folder), "--seed", str(seed), *(["--set", *ROWS[row], *changes] if ROWS[row] or changes else [])]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    if torch.cuda.is_available():
        visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))
        environment["CUDA_VISIBLE_DEVICES"] = visible.split(",")[slot % torch.cuda.device_count()]
    with open(f"{folder}.log", "a") as log:
        process = subprocess.Popen([sys.executable, "train.py", *where], cwd=ROOT, env=environment, stdout=log, stderr=log)
        running.append(process)
        code = process.wait()
    slots.append(slot)
    return None if code else folder


def attention_shares(model, dataset, config, device):
    """Where the attention of an actor's labels lies, per class group: {"outside", "cause", "area"}: the shares of it outside
    of the actor's box and on the cause (NaN without one), and the share of the frame that the cause covers.

    Of the queries matched with the actors (`objective.match`), the last layer's maps, means over actors, frames and labels.
    """
    sums = {group: np.zeros((2, 3)) for group in dataset.class_groups}
    for clips, _, targets in DataLoader(dataset, 8, collate_fn=collate):
        with torch.inference_mode():
            out = model(clips.to(device), return_attention=True)
        for b, t, q, n in zip(*(x.tolist() for x in match(out, targets, config))):
            maps, target = out["attention"][b, t, q].cpu().numpy(), targets[b]              # (C, H', W')
            own, cause = (cover(cxcywh_to_xyxy(target[name][n, t]), maps.shape[1:]) for name in ("boxes", "cause"))
            for group, classes in dataset.class_groups.items():
                for c in (c for c in classes if target["labels"][n, t, c]):
                    share = maps[c] / maps[c].sum()         # the mean over heads of soft-max weights: 1 but for rounding
                    values = np.array([1 - (share * own).sum(), (share * cause).sum(), cause.mean()])
                    sums[group] += np.nan_to_num(values), ~np.isnan(values)
    return {group: dict(zip(("outside", "cause", "area"), total / np.where(count, count, np.nan)))
            for group, (total, count) in sums.items()}


def cover(box, size):
    """The share of each cell of a (H', W') map that a box x1, y1, x2, y2 in [0, 1] covers; NaN for a box of NaN."""
    (x1, y1, x2, y2), (height, width) = box.tolist(), size
    rows, columns = (np.clip(np.minimum(high * n, np.arange(n) + 1) - np.maximum(low * n, np.arange(n)), 0, None)
                     for low, high, n in ((y1, y2, height), (x1, x2, width)))
    return rows[:, None] * columns


def measure(folder, device):
    """The numbers of a run that is done, {column: value}; kept in its folder."""
    path = folder / "measured.json"
    if path.is_file():
        return json.loads(path.read_text())
    results = json.loads((folder / "metrics.json").read_text())
    values = {f"{name} {group}": of[name + "@0.5"] for name in ("f-mAP", "v-mAP")
              for group, of in [("all", results), *results["per_group"].items()]}
    model, config, _ = evaluate.load_model(folder / "last.pt", (), device)
    dataset = build_dataset("synthetic", None, "val", config)
    found = evaluate.read_detections(folder / "detections.npz")
    several = np.flatnonzero([len(dataset[i][1]["boxes"]) > 1 for i in range(len(dataset))])
    inside = np.isin(found["video"], several)
    found |= {name: found[name][inside] for name in evaluate.ROWS} | {"videos": several}
    values["f-mAP several actors"] = evaluate.score(found, dataset, config)["f-mAP@0.5"]
    shares = attention_shares(model, dataset, config, device)
    values |= {f"attention outside, {group}": share["outside"] for group, share in shares.items()}
    values |= {"attention on cause": shares["context"]["cause"], "cause's area": shares["context"]["area"]}
    path.write_text(json.dumps(values))
    return values


def interval(values):
    """"mean ± half of the 95% interval" (Student's t over seeds; one value stands alone)."""
    mean = f"{np.mean(values):.3f}"
    return mean if len(values) < 2 else mean + f" ± {stats.sem(values) * stats.t.ppf(0.975, len(values) - 1):.3f}"


def paired(numbers, row, column):
    """The difference to the full model over the seeds that both have, with its interval; "" without two of them."""
    seeds = numbers[row].keys() & numbers[FULL].keys()
    return interval([numbers[row][s][column] - numbers[FULL][s][column] for s in seeds]) if len(seeds) > 1 else ""


def cost(config):
    """Parameters in millions and multiply-adds of a clip in billions, the sampling op apart."""
    model = VideoActionDetector(config).eval().requires_grad_(False)
    count = evaluate.multiply_adds(lambda: model(torch.randn(1, 3, config.frames, 64, 96)))
    return f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M", f"{count / 1e9:.2f} G"


def report(out, path, device):
    """Writes the tables of all runs that are done behind the mark in docs/experiments.md; what stands above it stays."""
    lines, text = [], path.read_text() if path.is_file() else MARK
    for kind, said in (("", "the same number of clips"), ("-time", "the same time")):
        for table, (title, _, rows) in TABLES.items():
            folders = {row: {int(folder.name.rpartition("seed")[2]): folder for folder in sorted(
                Path(out).glob(folder_of("", row, "*[0-9]", kind * (row != FULL)).name)) if is_done(folder)} for row in rows}
            numbers = {row: {s: measure(run, device) for s, run in runs.items()} for row, runs in folders.items()}
            if any(numbers[row] for row in rows if row != FULL) and numbers[FULL]:
                costs = {row: cost(saved_config(next(iter(runs.values())))) for row, runs in folders.items() if runs}
                columns = list(next(iter(numbers[FULL].values())))
                looks = [column for column in columns if column.startswith("attention") or "area" in column]
                lines += [f"### Table {table}: {title}, {said}", ""]
                lines += [*table_lines(rows, numbers, costs, [c for c in columns if c not in looks]), ""]
                lines += ["Shares of the class attention:", "", *table_lines(rows, numbers, costs, looks), ""] if looks else []
    if not lines:
        raise SystemExit(f"{out} holds no run of a table's row that is done, and one of the full model: {path} stays")
    path.write_text(text.partition(MARK)[0] + MARK + "\n\n" + "\n".join(lines))
    print(f"wrote {path}")


def table_lines(rows, numbers, costs, columns):
    """A table's rows as Markdown: means over seeds, and below each the differences to the full model, paired by seed."""
    lines = [["row", "paper", "parameters", "multiply-adds", "seeds", *columns], ["---"] * (len(columns) + 5)]
    for row, runs in numbers.items():
        values = [interval([run[column] for run in runs.values()]) if runs else "not run" for column in columns]
        lines.append([row, rows[row], *costs.get(row, ("", "")), " ".join(map(str, runs)), *values])
        if row != FULL and paired(numbers, row, columns[0]):
            lines.append(["*less the full model*", *[""] * 4, *(paired(numbers, row, column) for column in columns)])
    return ["| " + " | ".join(line) + " |" for line in lines]


def same_time(out, row, changes, device):
    """clips_per_epoch that take a row as long as the full model's take it: those of its runs so far, else by steps timed
    side by side, on one thread as the runs are."""
    known = [saved_config(folder) for folder in sorted(Path(out).glob(folder_of("", row, "*[0-9]", "-time").name))]
    if any(known):
        return [f"clips_per_epoch={next(filter(None, known)).clips_per_epoch}"]
    torch.set_num_threads(1)
    ours, full = (time_step(config_of(one, changes), 16, "float32", False, 10, device)["clips_per_s"] for one in (row, FULL))
    return [f"clips_per_epoch={round(config_of(FULL, changes).clips_per_epoch * ours / full / 16) * 16}"]


def arguments(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--table", nargs="+", choices=TABLES, default=["1", "2", "3", "4"], help="which tables (1 2 3 4)")
    parser.add_argument("--seeds", nargs="+", type=int, help="default: 0 1 2, for tables 2 and 4 0 1, for the quirks 0")
    parser.add_argument("--out", default="runs/experiments", help="folder of the runs (runs/experiments)")
    parser.add_argument("--jobs", type=int, help="runs side by side; default: one a core or GPU; 0: only report")
    parser.add_argument("--same-time", action="store_true", help="runs of the same time in place of the same clips")
    parser.add_argument("--set", nargs="+", default=[], metavar="NAME=VALUE", help="change the Config of all rows")
    return parser.parse_args(argv)


def main(argv=None):
    args = arguments(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    slots = list(range(args.jobs if args.jobs is not None else torch.cuda.device_count() or os.cpu_count()))
    wanted = [(seed, row) for table in args.table for row in TABLES[table][2]
              for seed in (args.seeds if args.seeds is not None else range(TABLES[table][1]))]
    rows, jobs = {row: None for _, row in wanted}, []
    for row in rows:
        rows[row] = [*args.set, *(same_time(args.out, row, args.set, device) if args.same_time and row != FULL else ())]
    for seed, row in sorted(dict.fromkeys(wanted), key=lambda pair: pair[0]):       # stable: a seed's rows in their order
        folder = folder_of(Path(args.out).resolve(), row, seed, "-time" * (args.same_time and row != FULL))
        folder.parent.mkdir(parents=True, exist_ok=True)
        if not is_done(folder, config_of(row, rows[row])):
            jobs.append((folder, row, seed, rows[row]))
    running = []

    def stop(number, _):                # the runs save what they have, as on Ctrl-C
        for process in running:
            process.terminate()
        sys.exit(128 + number)

    signal.signal(signal.SIGTERM, stop)
    if slots:
        with ThreadPoolExecutor(len(slots)) as pool:
            ended = list(tqdm(pool.map(partial(train_one, slots=slots, running=running), jobs), "runs", total=len(jobs)))
        failed = [f"{job[0]}.log" for job, folder in zip(jobs, ended) if folder is None]
        if failed:
            print(f"{len(failed)} runs failed, see the end of {', '.join(failed)}; the command goes on with them")
    report(args.out, ROOT / "docs" / "experiments.md", device)
    return 1 if slots and failed else 0


if __name__ == "__main__":
    sys.exit(main())
