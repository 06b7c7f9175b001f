"""The paper's Tables 1 to 4, and what each quirk costs, on the synthetic set.

    python -m tools.experiments --table 1 3         # end it when you like and repeat it
    python -m tools.experiments --table 1 --same-time
    python -m tools.experiments --places            # when class queries pay, see tools/places.py

A row of a table is the synthetic preset with a switch or two; a run is a row with a seed: train.py
in a process of its own on one core or GPU, as many side by side as there are. It starts from the
pre-trained stem, as the preset does, and takes 3,600 steps of 8 clips. Runs are folders
OUT/ROW-seedN that tables share: those that are done are kept, those that are not are resumed. With
--same-time the rows run again, OUT/ROW-time-seedN, with as many clips as they see in the time that
the full model takes. The tables of docs/experiments.md are then written anew from all runs that are
done.

Shares of attention, the paper's Fig. 2 and 7 in numbers, are those of visualize.attention_shares.
"""

import argparse
import csv
import json
import os
import re
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from scipy import stats
from tqdm import tqdm

import evaluate
from model import PRESETS, QUIRKS, Config, VideoActionDetector, config_from_dict, override
from tools import places

ROOT = Path(__file__).resolve().parents[1]
LENGTH = "clips_per_epoch=2880"     # ten epochs: 3,600 steps of 8 clips
FULL = "deformable3d, LDL + CDL"
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
}
TABLES = {  # title, number of seeds, rows with what the paper has for them
    "1": ("each module (the paper: AVA mAP)", 3, {
        "transformer, DETR": "28.6", "transformer, LDL": "29.1", "transformer, LDL + CDL": "31.4",
        "deformable3d, LDL": "31.3", FULL: "33.5"}),
    "2": ("aggregation of the levels (the paper: AVA mAP, UCF f-mAP)", 2, {
        FULL: "33.5, 85.9", "levels weighted": "32.9, 82.0", "levels mean": "32.0, 82.8"}),
    "3": ("actor positional queries (the paper: AVA mAP, UCF f-mAP)", 3, {
        FULL: "33.5, 85.9", "without P": "31.7, 82.9"}),
    "4": ("combining actor and context (the paper: AVA mAP, UCF f-mAP)", 2, {
        FULL: "33.5, 85.9", "concat + 1d conv": "31.8, 84.7", "cross-attention": "31.3, 81.3",
        "self-attention": "30.8, 81.0"}),
    "quirks": ("one quirk active, the others not", 1, {FULL: ""}),
}
for name in QUIRKS:
    # The others change nothing here: no such positions, no padding, one convolution block.
    if name not in ("unused_tensors", "position_pairs", "unmasked_padding", "shared_block"):
        ROWS[f"quirk {name}"] = [f"quirks={name}"]
        TABLES["quirks"][2][f"quirk {name}"] = ""
BEGIN = "<!-- Written by tools/experiments.py, up to the next such line. -->"
END = "<!-- End of what tools/experiments.py writes. -->"


# --------------------------------------------------------------------------------------------------
# Runs


def config_of(row, changes=()):
    """The synthetic preset with a row's switches and the changes."""
    return override(PRESETS["synthetic"], [LENGTH, *ROWS[row], *changes])


def folder_of(out, row, seed, kind=""):
    """A run's folder; kind "-time" is a run of the full model's time."""
    name = re.sub(r"[,+ ]+", "-", row)
    return Path(out) / f"{name}{kind}-seed{seed}"


def runs_of(out, row, kind=""):
    """{seed: folder} of a row's runs that are done."""
    runs = {}
    for folder in sorted(Path(out).glob(folder_of("", row, "*[0-9]", kind).name)):
        if is_done(folder):
            runs[int(folder.name.rpartition("seed")[2])] = folder
    return runs


def saved_config(folder):
    """The Config of the run in a folder, None without one."""
    path = folder / "config.json"
    if not path.is_file():
        return None
    saved = json.loads(path.read_text())
    names = {field.name for field in fields(Config)} & set(saved)
    return config_from_dict({name: saved[name] for name in names})


def is_done(folder, config=None):
    """Whether a run has ended. SystemExit if the folder's run has another Config than `config`."""
    saved = saved_config(folder)
    if saved is None:
        return False
    if config is not None and config != saved:
        raise SystemExit(f"{folder} holds a run of another Config (see its config.json): "
                         "choose another --out or remove it")
    if not (folder / "results.csv").is_file():
        return False
    with open(folder / "results.csv", newline="") as file:
        evaluations = list(csv.DictReader(file))
    whole = int(evaluations[-1]["epoch"]) == saved.epochs
    return whole and (folder / "attention.json").is_file()     # the last that a run writes


def train_one(job, slots, running):
    """A run to its end, in a process on a core or GPU of its own -> whether it succeeded."""
    folder, seed, changes = job
    slot = slots.pop()
    command = [sys.executable, "train.py"]
    if (folder / "last.pt").is_file():
        command += ["--resume", str(folder)]
    else:
        command += ["--out", str(folder), "--seed", str(seed), "--set", *changes]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    gpus = torch.cuda.device_count()
    if gpus:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(gpus)))
        environment["CUDA_VISIBLE_DEVICES"] = visible.split(",")[slot % gpus]
    with open(f"{folder}.log", "a") as log:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)
        running.append(process)
        code = process.wait()
    slots.append(slot)
    return code == 0


def train_all(jobs, count):
    """All jobs, so many side by side -> the logs of those that failed."""
    running = []

    def stop(number, _):  # the runs save what they have, as on Ctrl-C
        for process in running:
            process.terminate()
        sys.exit(128 + number)

    signal.signal(signal.SIGTERM, stop)
    run = partial(train_one, slots=list(range(count)), running=running)
    with ThreadPoolExecutor(count) as pool:
        succeeded = list(tqdm(pool.map(run, jobs), "runs", total=len(jobs)))
    return [f"{job[0]}.log" for job, well in zip(jobs, succeeded) if not well]


def same_time(out, row):
    """clips_per_epoch with which a row takes as long as the full model: that of its runs of this
    kind so far, else from the speed of steps in the runs of the same clips."""
    for folder in sorted(Path(out).glob(folder_of("", row, "*[0-9]", "-time").name)):
        saved = saved_config(folder)
        if saved is not None:
            return saved.clips_per_epoch
    full, own = runs_of(out, FULL), runs_of(out, row)
    seeds = full.keys() & own.keys()
    if not seeds:
        raise SystemExit(f"--same-time needs a seed of which {FULL} and {row} are done in {out}: "
                         "run the command without it first")
    ratios = [speed(own[seed]) / speed(full[seed]) for seed in seeds]
    config = saved_config(full[min(seeds)])
    # The median: a run may have been slowed by something beside it.
    steps = config.clips_per_epoch / config.batch_size * np.median(ratios)
    return round(steps) * config.batch_size


def speed(folder):
    """Clips a second in a run's steps, the median."""
    lines = (folder / "log.jsonl").read_text().splitlines()
    return np.median([json.loads(line)["clips_per_s"] for line in lines])


# --------------------------------------------------------------------------------------------------
# Numbers of a run


def measure(folder):
    """The numbers of a run that is done, {column: value}."""
    results = json.loads((folder / "metrics.json").read_text())
    values = {"f-mAP": results["f-mAP@0.5"]}
    for group, of_group in results["per_group"].items():
        values[group] = of_group["f-mAP@0.5"]
    values["v-mAP"] = results["v-mAP@0.5"]
    shares = json.loads((folder / "attention.json").read_text())
    for group, share in shares.items():
        values[f"outside of the box, {group}"] = share["outside"]
    for group, share in shares.items():
        values[f"on the cause, {group}"] = share["cause"]
    return values


def cost(config):
    """Parameters in millions and multiply-adds of a clip in billions, the sampling op apart."""
    model = VideoActionDetector(config).eval().requires_grad_(False)
    clip = torch.randn(1, 3, config.frames, 64, 96)
    count = evaluate.multiply_adds(lambda: model(clip))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return f"{parameters / 1e6:.2f} M", f"{count / 1e9:.2f} G"


# --------------------------------------------------------------------------------------------------
# Tables


def interval(values):
    """Mean ± half of the 95% interval, Student's t over seeds; of one value the value."""
    mean = f"{np.mean(values):.3f}"
    if len(values) < 2:
        return mean
    half = stats.sem(values) * stats.t.ppf(0.975, len(values) - 1)
    return f"{mean} ± {half:.3f}"


def table_lines(rows, numbers, costs, columns):
    """A table in Markdown: a row's means over seeds, and below it the differences to the full model
    over the seeds that both have.

    rows {row: what the paper has}; numbers {row: {seed: {column: value}}}; costs {row: (parameters,
    multiply-adds)}.
    """
    header = ["row", "paper", "parameters", "multiply-adds", "seeds", *columns]
    lines = [header, ["---"] * len(header)]
    for row, runs in numbers.items():
        seeds = sorted(runs)
        line = [row, rows[row], *costs.get(row, ("", "")), " ".join(map(str, seeds))]
        for column in columns:
            values = [runs[seed][column] for seed in seeds]
            line.append(interval(values) if values else "not run")
        lines.append(line)
        paired = sorted(runs.keys() & numbers[FULL].keys())
        if row == FULL or len(paired) < 2:
            continue
        line = ["*less the full model*", "", "", "", " ".join(map(str, paired))]
        for column in columns:
            differences = [runs[seed][column] - numbers[FULL][seed][column] for seed in paired]
            line.append(interval(differences))
        lines.append(line)
    return ["| " + " | ".join(line) + " |" for line in lines]


def check_recipe(folders):
    """SystemExit if a run of a table, {row: {seed: folder}}, differs from the full model's in more
    than its row's switches and the number of clips."""
    recipe = saved_config(next(iter(folders[FULL].values())))
    for row, runs in folders.items():
        expected = override(recipe, ROWS[row])
        for folder in runs.values():
            saved = saved_config(folder)
            if replace(saved, clips_per_epoch=recipe.clips_per_epoch) != expected:
                raise SystemExit(f"{folder} is of another recipe than the runs of {FULL}: remove "
                                 "it or choose another --out")


def tables(out, kind, said):
    """The lines of all tables of which a row beside the full model is done."""
    lines = []
    for table, (title, _, rows) in TABLES.items():
        folders = {row: runs_of(out, row, "" if row == FULL else kind) for row in rows}
        others = [row for row in rows if row != FULL and folders[row]]
        if not others or not folders[FULL]:
            continue
        check_recipe(folders)
        numbers, costs = {}, {}
        for row, runs in folders.items():
            numbers[row] = {seed: measure(folder) for seed, folder in runs.items()}
            if runs:
                costs[row] = cost(saved_config(next(iter(runs.values()))))
        columns = list(next(iter(numbers[FULL].values())))
        looks = [column for column in columns if column.startswith(("outside", "on the cause"))]
        plain = [column for column in columns if column not in looks]
        lines += [f"### Table {table}: {title}; {said}", ""]
        lines += [*table_lines(rows, numbers, costs, plain), ""]
        lines += ["Shares of the attention of true labels:", ""]
        lines += [*table_lines(rows, numbers, {}, looks), ""]
    return lines


def report(out, page):
    """Writes the tables of all runs that are done between the two marks of a page."""
    lines = tables(out, "", "the same clips")
    lines += tables(out, "-time", "the same time")
    if not lines:
        raise SystemExit(f"{out} holds no finished run of a row and of the full model: {page} "
                         "stays as it is")
    before, begin, rest = page.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise SystemExit(f"{page} lacks the line {BEGIN} or {END}: put both where the tables go")
    page.write_text(before + begin + "\n\n" + "\n".join(lines) + "\n" + end + after)
    print(f"wrote {page}")


# --------------------------------------------------------------------------------------------------
# The command


def arguments(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--table", nargs="+", choices=TABLES,
                        help="which tables (1 2 3 4)")
    parser.add_argument("--places", action="store_true",
                        help="instead: decoders on maps where actors need several places")
    parser.add_argument("--seeds", nargs="+", type=int,
                        help="default: 0 1 2; for tables 2 and 4 0 1, for the quirks 0")
    parser.add_argument("--out", default="runs/experiments", help="where runs go (%(default)s)")
    parser.add_argument("--jobs", type=int,
                        help="runs side by side; default: one a core or GPU; 0: only report")
    parser.add_argument("--same-time", action="store_true",
                        help="runs of the full model's time in place of its number of clips")
    parser.add_argument("--set", nargs="+", default=[], metavar="NAME=VALUE",
                        help="change the Config of all rows")
    args = parser.parse_args(argv)
    if args.jobs is not None and args.jobs < 0:
        parser.error(f"--jobs {args.jobs}: must be at least 0")
    if args.places and (args.table or args.set or args.same_time):
        parser.error("--places goes with --seeds, --out and --jobs only")
    args.table = args.table or ["1", "2", "3", "4"]
    return args


def wanted_runs(args):
    """[(folder, seed, changes)] of the runs that are not done: seed 0 of all rows first."""
    kind = "-time" if args.same_time else ""
    wanted = []
    for table in args.table:
        _, count, rows = TABLES[table]
        seeds = range(count) if args.seeds is None else args.seeds
        for row in rows:
            for seed in seeds:
                if (seed, row) not in wanted:
                    wanted.append((seed, row))
    jobs = []
    for seed, row in sorted(wanted, key=lambda pair: pair[0]):
        changes = list(args.set)
        if args.same_time:
            if row == FULL:
                continue
            changes.append(f"clips_per_epoch={same_time(args.out, row)}")
        folder = folder_of(Path(args.out).resolve(), row, seed, kind)
        if not is_done(folder, config_of(row, changes)):
            jobs.append((folder, seed, [LENGTH, *ROWS[row], *changes]))
    return jobs


def main(argv=None):
    args = arguments(argv)
    count = args.jobs
    if count is None:
        count = torch.cuda.device_count() or os.cpu_count()
    if args.places:
        out = Path(args.out) / "places"
        if count:
            places.run_all(out, [0, 1, 2] if args.seeds is None else args.seeds, count)
        places.report(out, ROOT / "docs" / "places.md", ROOT / "docs" / "places.png")
        return 0
    failed = []
    if count:
        Path(args.out).mkdir(parents=True, exist_ok=True)
        failed = train_all(wanted_runs(args), count)
    if failed:
        print(f"{len(failed)} runs failed, see the end of {', '.join(failed)}; repeat the command "
              "to resume them")
    report(args.out, ROOT / "docs" / "experiments.md")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
