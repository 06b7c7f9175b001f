"""A training run beside its story in train.py: processes, settings, first weights, the order of the
clips, the folder.

A run's folder, written by rank 0:
    config.json     settings and Config
    last.pt         all that the run needs to go on
    best.pt         the last.pt of the full evaluation with the highest f-mAP@0.5, the first of
                    equals: a hard link, not a second copy
    log.jsonl       a line a step
    results.csv     a line an evaluation, with the share of the validation videos that it is of
    curves.png      both, drawn
    metrics.json, per_class.csv, detections.npz: of the last evaluation that was not a quick one
    attention.png   at the end: class attention on some clips

Nothing random has a state of its own. The order of the clips is a function of (seed, pass), the
augmentation of a clip of (seed, its position in the run), dropout and the frames that are decoded
of (seed, step, rank). The step is therefore all that a checkpoint has to hold of them, and a
resumed run draws what the uninterrupted one would have drawn.
"""

import csv
import ctypes
import inspect
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from datetime import timedelta
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.utils.data import Dataset

import visualize
from backbone import load_backbone, strip_prefixes
from model import PRESETS, Config, config_from_dict, override, read_checkpoint

ROOT = Path(__file__).resolve().parents[1]

# What a run is made with beside its Config; a resumed run has what its checkpoint has. None: the
# data set's or the device's default.
SETTINGS = {
    "dataset": "synthetic", "preset": None, "data": None, "split": None, "missing": "error",
    "fill": 0, "seed": 0, "precision": None, "compile": False, "eval_share": 1.0,
    "quick_share": None, "save_minutes": 5.0}
# What decides which clips a step takes, and what the saved optimizer holds, stays as it is when a
# run is resumed.
KEPT_SETTINGS = ("dataset", "preset", "split", "missing", "fill", "seed")
KEPT_FIELDS = ("batch_size", "clips_per_epoch", "offset_rate", "weight_decay", "adam_beta2")

STEM = ROOT / "weights" / "stem.safetensors"    # the synthetic preset's backbone, pre-trained
OF_CLASSES = ("decoder.class_queries", "decoder.class_head")    # tensors with a row for each class
OF_BACKBONE = ("backbone.", "neck.")                            # what stage two does not take


# --------------------------------------------------------------------------------------------------
# Processes and signals


def start_processes(wanted=None):
    """One process of torchrun's, or the only one -> (device, rank, number of processes).

    wanted: "cuda", "cpu", or None for the GPU if there is one. Processes exchange by NCCL on GPUs,
    by gloo on CPUs. SystemExit where there is no GPU, or none for this process.
    """
    if wanted == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda: torch finds no GPU (torch.cuda.is_available() is False); "
                         "leave --device out to train on the CPU, or install a CUDA build of torch")
    if wanted == "cpu" or not torch.cuda.is_available():
        device = torch.device("cpu")
        use_the_cpu_well()
    else:
        local, count = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
        if local >= count:
            raise SystemExit(f"process {local} finds {count} GPUs: start --nproc_per_node {count}, "
                             "or train on the CPU with --device cpu")
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    if "RANK" not in os.environ:
        return device, 0, 1

    store, rank, world = next(dist.rendezvous("env://"))
    # The store outlives a restart by torchrun: keep the addresses of the dead processes apart.
    store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo", store=store, rank=rank, world_size=world,
        timeout=timedelta(hours=2))         # the others wait while rank 0 scores a large set
    return device, rank, world


def use_the_cpu_well():
    """One thread for each of several processes. On Linux freed memory is kept for the next step: a
    tenth of a step was page faults."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        torch.set_num_threads(1)
    if sys.platform == "linux":
        ctypes.CDLL(None).mallopt(-3, 2 ** 25)          # M_MMAP_THRESHOLD
        ctypes.CDLL(None).mallopt(-1, 2 ** 31 - 1)      # M_TRIM_THRESHOLD


def all_sum(tensor):
    """The sum of a tensor over all processes, in its place."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


class Signals:
    """SIGTERM and SIGINT (Ctrl-C). Within a step they are noted, so that it is finished and saved;
    elsewhere, or the second time, they end the script at once. The exit code is 128 + number."""

    def __init__(self):
        self.caught = 0             # number of the signal that was noted
        self.in_step = False
        self.folder = None          # of rank 0, once there is something to resume
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.handle)

    def handle(self, number, _):
        if self.in_step and not self.caught:
            self.caught = number
        else:
            self.leave(number)

    def end_step(self):
        """From here on signals end the script at once, and one that was noted does."""
        self.in_step = False
        if self.caught:
            self.leave(self.caught)

    def leave(self, number):
        """Ends the script and says where the run stands."""
        if self.folder:
            self.folder.wait()
            print(f"\nsaved at step {self.folder.saved_step}; resume with --resume "
                  f"{self.folder.path}", file=sys.stderr)
        sys.exit(128 + number)


def ignore_signals(_):
    """For a loading process, whose clips the step needs: what a terminal or a scheduler sends to
    the whole group of processes does not reach it. It ends with the process that started it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(os, "setpgrp"):      # not on Windows
        os.setpgrp()


# --------------------------------------------------------------------------------------------------
# Settings


def run_folder(args):
    """The folder that is meant, by default one named by data set and time."""
    dataset = args.dataset or SETTINGS["dataset"]
    return Path(args.resume or args.out or time.strftime(f"runs/{dataset}-%Y%m%d-%H%M%S"))


def read_run(out, args, rank):
    """last.pt of a run that goes on, None for a new one, which needs a folder without a run."""
    last = out / "last.pt"
    restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0    # after a process died
    if args.resume is not None or (restarted and last.is_file()):
        if not last.is_file():
            raise ValueError(f"nothing to resume: {last} is missing; start without --resume")
        return read_checkpoint(last)
    if rank == 0 and last.exists():
        raise ValueError(f"{out} holds a run already; go on with it by --resume {out}, or choose "
                         "another --out")
    return None


def choose_settings(args, saved):
    """(settings, Config): what the command line says, else what the checkpoint was trained with,
    else the default. ValueError where these do not go together."""
    settings = dict(SETTINGS)
    for name in SETTINGS:
        if saved and name in saved["settings"]:
            settings[name] = saved["settings"][name]
        given = getattr(args, name)
        if given is None:
            continue
        if saved and name in KEPT_SETTINGS and given != settings[name]:
            raise ValueError(f"--{name} {given}: this run has {settings[name]} and keeps it; leave "
                             f"--{name} out, or start another run with --out")
        settings[name] = given

    dataset = settings["dataset"]
    if dataset == "synthetic" and settings["data"]:
        raise ValueError(f"--data {settings['data']}: the synthetic set has no folder; name the "
                         "data set with --dataset ucf, jhmdb, ava or custom (your own)")
    if dataset != "synthetic" and not settings["data"]:
        raise ValueError(f"{dataset} is read from a folder: name it with --data DIR")
    splits = [1, 2, 3] if dataset == "jhmdb" else [1]
    if settings["split"] is None:
        settings["split"] = 1
    if settings["split"] not in splits:
        raise ValueError(f"--split {settings['split']}: the splits of {dataset} are {splits}")
    if settings["preset"] is None:
        settings["preset"] = default_preset(dataset)
    if settings["quick_share"] is None:
        settings["quick_share"] = 0.25 if dataset == "synthetic" else 0.0

    if not saved:
        return settings, override(PRESETS[settings["preset"]], args.set)
    before = config_from_dict(saved["config"])
    config = override(before, args.set)
    for name in KEPT_FIELDS:
        if getattr(config, name) != getattr(before, name):
            raise ValueError(f"--set {name}={getattr(config, name)}: this run has "
                             f"{getattr(before, name)} and keeps it; start another run with --out")
    return settings, config


def default_preset(dataset):
    """The preset of a data set: that of its name, for your own ucf."""
    if dataset == "custom":
        return "ucf"
    return dataset


def list_fields(config):
    """Every field of the Config with its value and what it means, by the comments in model.py."""
    lines = []
    for line in inspect.getsource(Config).splitlines():
        heading = re.fullmatch(r" {4}# (.+)", line)
        field = re.fullmatch(r" {4}(\w+): \w+ = .*?(?: *# (.*))?", line)
        continued = re.fullmatch(r" {5,}# (.+)", line)
        if heading:
            lines.append(f"\n{heading[1]}")
        elif field:
            value = getattr(config, field[1])
            if isinstance(value, tuple):
                value = ",".join(map(str, value))
            lines.append(f"  {field[1]}={value}".ljust(34) + (field[2] or ""))
        elif continued:
            lines.append(" " * 34 + continued[1])
        elif line.startswith("    def "):
            break
    return "\n".join(lines).strip("\n")


def crowd_warning(dataset, num_queries):
    """A line if frames of the data set have more actors than the model has queries, else ""."""
    frames, _ = dataset.ground_truth()
    place = np.column_stack([frames["video"], frames["frame"], frames["box"]])              # (n, 6)
    place = np.unique(place, axis=0)            # a box with several labels once
    _, actors = np.unique(place[:, :2], axis=0, return_counts=True)
    crowded = int((actors > num_queries).sum())
    if crowded == 0:
        return ""
    return (f"WARNING: {crowded} of {len(actors)} frames have more than num_queries={num_queries} "
            f"actors, up to {actors.max()}; the others are not learned (--set num_queries=)\n")


def code_version():
    """The commit that this file is of, or "unknown" outside of a repository."""
    command = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return result.stdout.strip()


# --------------------------------------------------------------------------------------------------
# The weights that a run starts from


def resume(model, saved, state, training, steps_per_epoch):
    """The weights and the state of a run that goes on -> words that say so. ValueError if it cannot
    with the model's Config or the training clips."""
    other_run = "start another run with --out, from its weights with --init"
    for number, (before, now) in enumerate(zip(saved["classes"], training.class_names)):
        if before != now:
            raise ValueError(f"class {number} of the run is {before}, that of the data is {now}; "
                             f"{other_run}")
    clips = saved.get("clips", len(training))       # files of earlier versions do not say
    if clips != len(training):
        raise ValueError(f"the run has {clips} training clips, the data have {len(training)}; "
                         f"{other_run}")
    for name in state:
        state[name] = saved["state"][name]
    epochs = state["step"] / steps_per_epoch
    if epochs > model.config.epochs:
        raise ValueError(f"epochs={model.config.epochs}: the run has done {epochs:.2f} already and "
                         f"stays as it is; choose --set epochs={math.ceil(epochs)} or more")
    try:
        model.load_state_dict(saved["model"])
    except RuntimeError as error:
        raise ValueError("the run's weights do not fit the model that --set makes of it: "
                         f"{' '.join(str(error).split())[:300]}") from error
    return f"resumed at step {state['step']}"


def first_weights(model, args, settings, class_names):
    """Puts the weights that the command line asks for into the model -> words that say which.

    --init: the whole of another model. --backbone-weights: the backbone's, by default the stem that
    comes with the synthetic set. --init-transformer: encoder and decoder beside these.
    """
    if args.init:
        return start_from(model, args.init, class_names, preset=args.preset)
    backbone = args.backbone_weights
    drawn = settings["dataset"] == "synthetic" and model.config.backbone == "conv"
    if backbone is None and drawn and STEM.is_file():
        backbone = STEM
    if backbone not in (None, "none"):
        load_backbone(model, backbone)
        said = f"backbone from {backbone}"
    elif backbone is None and model.config.backbone in ("vit", "csn152"):
        said = (f"WARNING: the backbone {model.config.backbone} starts from random weights where "
                "the paper's is pre-trained; --backbone-weights FILE, or none if this is meant")
    else:
        said = "random weights"
        if backbone is None and drawn and os.environ.get("RANK", "0") == "0":
            print(f"WARNING: {STEM} is missing, which the results in the README start from: python "
                  "-m tools.pretrain makes it; --backbone-weights none if this is meant")
    if args.init_transformer:
        said += "; " + start_from(model, args.init_transformer, class_names, True, args.preset)
    return said


def start_from(model, path, class_names, stage_two=False, preset=None):
    """A checkpoint's weights, this project's or the authors', into the model -> words that say what
    was taken.

    All of them, for fine-tuning; for stage two all but the backbone's and the neck's: encoder,
    decoder, box head, anchors. Class queries (or a linear class head) only if the classes are the
    same. ValueError, the model as it was, if anything else does not fit. preset: of a file that
    holds nothing but tensors.
    """
    if Path(path).is_dir():
        path = Path(path) / "best.pt"       # of a run, as --ckpt takes it
    checkpoint = read_checkpoint(path, preset)
    weights = strip_prefixes(checkpoint["model"])
    own = model.state_dict()
    same_classes = checkpoint.get("classes") in (None, list(class_names))   # None: it does not say
    taken = {}
    left_out = []
    misfits = []
    for name in dict.fromkeys([*own, *weights]):
        if stage_two and name.startswith(OF_BACKBONE):
            continue
        fits = name in own and name in weights and own[name].shape == weights[name].shape
        if name.startswith(OF_CLASSES) and not (fits and same_classes):
            left_out.append(name)
        elif fits:
            taken[name] = weights[name]
        else:
            misfits.append(name)
    if misfits:
        hint = "was it trained with another --preset or --set?"
        preset = checkpoint.get("settings", {}).get("preset")
        if preset:
            hint = f"it was trained with --preset {preset}"
        raise ValueError(f"{path} ({checkpoint['kind']}) does not fit the model in {len(misfits)} "
                         f"tensors: {', '.join(misfits[:5])}; {hint}")
    model.load_state_dict(taken, strict=False)
    said = f"{'encoder and decoder' if stage_two else 'all weights'} from {path}"
    if left_out:
        said += f" without {', '.join(left_out)}, as its classes are others"
    return f"{said} ({checkpoint['kind']})"


# --------------------------------------------------------------------------------------------------
# The order of the clips


def seed_everything(*key):
    """Seeds numpy and torch by non-negative integers."""
    seed = int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0])
    np.random.seed(seed % 2 ** 32)
    torch.manual_seed(seed)


class SeededClips(Dataset):
    """A data set whose augmentation is a function of (seed, position in the run), whichever process
    loads the clip.

    Takes (index, position). An index below 0 gives a filler clip, all of whose frames are padding,
    which the loss ignores.
    """

    def __init__(self, dataset, seed):
        self.dataset = dataset
        self.seed = seed

    def __getitem__(self, index_and_position):
        index, position = index_and_position
        seed_everything(self.seed, 0, position)
        clip, target = self.dataset[max(index, 0)]
        if index < 0:
            target = target | {"frames": torch.zeros_like(target["frames"])}
        return clip, target


def epoch_length(length, config):
    """(clips, steps) of an epoch over `length` clips; the last step may have fewer clips."""
    clips = config.clips_per_epoch or length
    return clips, math.ceil(clips / config.batch_size)


def micro_batch_size(config, world):
    """Clips that a process takes at once; ValueError unless they make up the batch."""
    share, rest = divmod(config.batch_size, world)
    size = min(config.micro_batch, share)
    if rest or size < 1 or share % size:
        raise ValueError(f"{config.batch_size} clips do not divide into {world} processes x "
                         f"micro-batches of {size}; choose --set batch_size=N micro_batch=M with N "
                         f"a multiple of {world} x M")
    return size


@lru_cache(maxsize=2)       # the clips of a step are of one pass, or of two
def permutation(length, seed, number):
    """The clips in the order of a pass over them."""
    return np.random.default_rng((seed, number)).permutation(length).tolist()


def clip_order(first, last, length, seed):
    """The clips at positions first..last - 1 of a run: one pass over the clips after another."""
    order = []
    for position in range(first, last):
        number, place = divmod(position, length)
        order.append(permutation(length, seed, number)[place])
    return order


def micro_batches(start, total, length, config, seed, rank=0, world=1):
    """A process's micro-batches from step `start` to `total`: lists of (clip, position), the clip
    -1 past the epoch's end.

    Every step has batch_size positions of the epoch's clips; process r takes each world-th of them,
    from r on.
    """
    clips_per_epoch, steps_per_epoch = epoch_length(length, config)
    size = micro_batch_size(config, world)
    for step in range(start, total):
        epoch, within = divmod(step, steps_per_epoch)
        first = epoch * clips_per_epoch + within * config.batch_size
        last = min(first + config.batch_size, (epoch + 1) * clips_per_epoch)
        order = clip_order(first, last, length, seed)
        order += [-1] * (config.batch_size - len(order))
        positions = range(rank, config.batch_size, world)
        mine = [(order[place], step * config.batch_size + place) for place in positions]
        for begin in range(0, len(mine), size):
            yield mine[begin:begin + size]


# --------------------------------------------------------------------------------------------------
# The folder


class RunFolder:
    """What rank 0 writes of a run. `save` takes a copy and returns; a thread writes it, `wait` is
    until it has."""

    def __init__(self, path, history):
        self.path = path
        self.history = history          # rows of results.csv
        self.log_file = None
        self.saved_step = None          # of the last.pt that is, or is being, written
        self.writing = None
        self.thread = ThreadPoolExecutor(1)     # Python does not exit before it is done

    def open(self, checkpoint, settings, config):
        """Makes the folder with a first last.pt: what cannot be written is known before a step."""
        self.path.mkdir(parents=True, exist_ok=True)
        self.save(checkpoint)
        self.wait()
        record = {**settings, **asdict(config)}
        (self.path / "config.json").write_text(json.dumps(record, indent=2) + "\n")
        trim_log(self.path / "log.jsonl", self.saved_step)
        self.log_file = open(self.path / "log.jsonl", "a")

    def save(self, checkpoint):
        """last.pt; waits only for the one before."""
        self.wait()
        self.saved_step = checkpoint["state"]["step"]
        self.writing = self.thread.submit(save, self.path / "last.pt", to_memory(checkpoint))

    def wait(self):
        """Until last.pt is on the disk; SystemExit if it could not be written."""
        if self.writing:
            self.writing.result()

    def log(self, line):
        """A line of log.jsonl. JSON has no numbers that are not finite: they are null."""
        line = dict(line)
        for name, value in line.items():
            if isinstance(value, float) and not math.isfinite(value):
                line[name] = None
        self.log_file.write(json.dumps(line) + "\n")
        self.log_file.flush()

    def last_result(self):
        """The last row of results.csv, {} before the first."""
        if not self.history:
            return {}
        return self.history[-1]

    def share_at(self, step):
        """The share of the validation videos that has been evaluated after a step, 0 without."""
        return max([row["share"] for row in self.history if row["step"] == step], default=0)

    def keep_if_best(self, row):
        """best.pt, unless an evaluation of the same share was as good: another name of the file
        that is last.pt now, and which the next `save` replaces but does not change."""
        for past in self.history:
            if past["share"] == row["share"] and past["f-mAP@0.5"] >= row["f-mAP@0.5"]:
                return
        self.wait()
        last = self.path / "last.pt"
        temporary = self.path / "best.pt.tmp"
        temporary.unlink(missing_ok=True)
        try:
            os.link(last, temporary)
        except OSError as error:
            print(f"best.pt is a copy of last.pt: {self.path} takes no hard links ({error})")
            shutil.copyfile(last, temporary)
        os.replace(temporary, self.path / "best.pt")
        temporary.unlink(missing_ok=True)       # replacing one name of a file by another keeps both

    def add_result(self, row, parts):
        """A row to results.csv, and curves.png: parts of the loss, rate, gradient norm and mAP."""
        self.history.append(row)
        temporary = self.path / "results.csv.tmp"
        with open(temporary, "w", newline="") as file:
            writer = csv.DictWriter(file, row)
            writer.writeheader()
            writer.writerows(self.history)
        os.replace(temporary, self.path / "results.csv")
        lines = []
        for text in (self.path / "log.jsonl").read_text().splitlines():
            line = json.loads(text)
            if not line["skipped"]:
                lines.append(line)
        visualize.training_curves(lines, self.history, parts, self.path / "curves.png")


def save(path, content):
    """Writes a checkpoint whole or not at all: to a temporary file, synced, renamed."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        if os.name == "posix":          # elsewhere folders cannot be opened
            folder = os.open(path.parent, os.O_RDONLY)
            os.fsync(folder)
            os.close(folder)
    except (OSError, RuntimeError) as error:
        temporary.unlink(missing_ok=True)
        kept = f"the previous {path.name} is kept" if path.exists() else f"there is no {path.name}"
        raise SystemExit(f"cannot write {path}: {error}; {kept}. Make room, then go on with "
                         f"--resume {path.parent}") from error


def to_memory(content):
    """A copy of nested dicts, lists and tuples with their tensors on the CPU."""
    if isinstance(content, torch.Tensor):
        return content.detach().to("cpu", copy=True)
    if isinstance(content, dict):
        return {name: to_memory(value) for name, value in content.items()}
    if isinstance(content, (list, tuple)):
        return type(content)(to_memory(value) for value in content)
    return content


def trim_log(path, step):
    """Leaves the lines of a log up to a step: those after it are of a process that then died."""
    kept = []
    if path.exists():
        for line in path.read_text().splitlines():
            if line.endswith("}") and json.loads(line)["step"] <= step:
                kept.append(line + "\n")
    path.write_text("".join(kept))


def read_history(path, step):
    """The rows of results.csv up to a step as dicts of numbers; [] without the file."""
    history = []
    if path.exists():
        with open(path, newline="") as file:
            for texts in csv.DictReader(file):
                row = {"share": 1.0} | {name: float(text) for name, text in texts.items()}
                row |= {"epoch": int(row["epoch"]), "step": int(row["step"])}
                if row["step"] <= step:
                    history.append(row)
    return history
