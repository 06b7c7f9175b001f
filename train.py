"""Training (Sec. 5): the loop, from the data to the numbers, on one process or on as many as torchrun starts.

    python train.py                                                   # the synthetic set, all cores of one process
    torchrun --nproc_per_node 2 train.py --dataset synthetic          # the same on two processes, faster
    torchrun --nproc_per_node 8 train.py --dataset ucf --data DIR --backbone-weights FILE
    python train.py --resume runs/NAME                                # goes on where last.pt stands, in mid-epoch too

A step takes `batch_size` clips over all processes, `micro_batch` of them at a time on each. The divisors of the loss
are summed over all of these first, so the gradient is that of one large batch however it is cut. Nothing random has a
state of its own: the order of the clips is a function of (seed, pass), the augmentation of a clip of (seed, its
position in the run), dropout and the frames that are decoded of (seed, step, rank). The step is therefore all that a
checkpoint has to hold of them, and a resumed run draws what the uninterrupted one would have drawn.

Weight decay is on all parameters, as in the released recipe. Float32 islands under autocast: the objective, and what
encoder.py and decoder.py name.
"""

# B clips, T frames, A actor queries, N actors of a clip, C classes

import argparse
import contextlib
import csv
import ctypes
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

import evaluate
import visualize
from data import build_dataset, collate
from model import PRESETS, VideoActionDetector, config_from_dict, load_backbone, override, read_checkpoint
from objective import detection_loss, loss_counts

PARTS = ("class", "box", "giou", "conf")
BAD_STEPS = 5                   # non-finite steps in a row that end a run
SETTINGS = dict(dataset="synthetic", preset=None, data=None, split=None, seed=0, precision="float32", compile=False,
                workers=None, eval_share=1.0, save_minutes=5.0)     # a resumed run has those of its checkpoint
OUT_OF_MEMORY = """out of memory: {error}
What takes less: --set checkpoint_classifier=True checkpoint_backbone=True (recomputed in the backward pass), a smaller
micro_batch=N (the batch stays as large), train_frames=N (frames of a clip that are decoded), --precision bf16, smaller
clips (crop_size, frames). With --resume {out} the run goes on where last.pt stands."""


def arguments(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    group = parser.add_argument_group("what is trained on what")
    group.add_argument("--dataset", help="synthetic (default), ucf, jhmdb, ava or one's own")
    group.add_argument("--data", metavar="DIR", help="the data set's folder (synthetic has none)")
    group.add_argument("--split", type=int, help="1-3 for jhmdb, 1 for ucf")
    group.add_argument("--preset", choices=PRESETS, help="sizes and recipe; default: the data set's")
    group.add_argument("--set", nargs="+", action="extend", default=[], metavar="NAME=VALUE",
                       help="change fields of the preset's Config: --set epochs=20 lr=1e-4")
    group.add_argument("--seed", type=int, help="of everything random, default 0")
    group = parser.add_argument_group("where it starts")
    group.add_argument("--backbone-weights", metavar="FILE", help="published weights of the backbone")
    group.add_argument("--init", metavar="FILE", help="stage two: encoder and decoder of a checkpoint of stage one")
    group.add_argument("--resume", metavar="DIR", nargs="?", const="", help="go on with the run in DIR, or in --out")
    group = parser.add_argument_group("where it ends")
    group.add_argument("--out", metavar="DIR", help="run folder, default runs/<dataset>-<date>-<time>")
    group.add_argument("--save-minutes", type=float, help="time between checkpoints within an epoch, default 5")
    group.add_argument("--eval-share", type=float, help="share of the test videos evaluated in training, default 1")
    group = parser.add_argument_group("how it runs")
    group.add_argument("--precision", choices=("float32", "bf16", "fp16"), help="autocast of the forward pass")
    group.add_argument("--compile", action="store_true", default=None, help="torch.compile backbone and decoder")
    group.add_argument("--workers", type=int, help="loading processes per rank; default: 0 on a CPU, up to 8 on a GPU")
    args = parser.parse_args(argv)
    if args.eval_share is not None and not 0 < args.eval_share <= 1:
        parser.error(f"--eval-share {args.eval_share} is not in (0, 1]")
    if args.resume is not None and (args.init or args.backbone_weights):
        parser.error("--resume goes on with the weights of the run: --init and --backbone-weights start another one")
    if args.resume == "" and not args.out:
        parser.error("--resume needs the run folder: --resume runs/NAME")
    if int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)) and not (args.out or args.resume):
        parser.error("--max-restarts needs --out DIR: a restarted run has to find its folder")
    return args


def start_processes():
    """One process of torchrun's, or the only one -> (device, rank, number of processes)."""
    rank, world, local = (int(os.environ.get(*entry)) for entry in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    if torch.cuda.is_available():
        if local >= torch.cuda.device_count():
            raise SystemExit(f"process {local} finds {torch.cuda.device_count()} GPUs: --nproc_per_node is too large")
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
        if world > 1:
            torch.set_num_threads(1)
        if sys.platform == "linux":     # freed memory is kept for the next step: a tenth of a step was page faults
            ctypes.CDLL(None).mallopt(-3, 2 ** 25)          # M_MMAP_THRESHOLD
            ctypes.CDLL(None).mallopt(-1, 2 ** 31 - 1)      # M_TRIM_THRESHOLD
    if "RANK" in os.environ:
        store, rank, world = next(dist.rendezvous("env://"))    # outlives a restart by torchrun: old addresses apart
        store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=store, rank=rank, world_size=world,
                                timeout=timedelta(hours=2))     # covers rank 0's scoring of a large test set
    return device, rank, world


class SeededClips(Dataset):
    """A data set whose augmentation is a function of (seed, position in the run), whichever process loads the clip.

    Takes (index, position); an index below 0 gives a filler clip, all of whose frames are padding: it counts nowhere.
    """

    def __init__(self, dataset, seed):
        self.dataset, self.seed = dataset, seed

    def __getitem__(self, index_and_position):
        index, position = index_and_position
        seed_everything(self.seed, 0, position)
        clip, target = self.dataset[max(index, 0)]
        return clip, target if index >= 0 else {**target, "frames": torch.zeros_like(target["frames"])}


def seed_everything(*key):
    """Seeds numpy and torch by non-negative integers."""
    seed = int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0])
    np.random.seed(seed % 2 ** 32)
    torch.manual_seed(seed)


def clip_order(first, last, length, seed):
    """Clip indices at positions first..last - 1 of a run: one random order of the `length` clips after another."""
    passes = range(first // length, (last - 1) // length + 1)
    order = np.concatenate([np.random.default_rng((seed, number)).permutation(length) for number in passes])
    return order[first - passes[0] * length:last - passes[0] * length].tolist()


def micro_batches(start, total, length, config, seed, rank=0, world=1):
    """A process's micro-batches from step `start` to `total`: lists of (clip or -1 past the epoch's end, position).

    Every step has batch_size positions of the epoch's clips; process r takes each world-th of them, from r on.
    """
    per_epoch, steps = epoch_length(length, config)
    size = micro_batch_size(config, world)
    for step in range(start, total):
        epoch = step // steps
        first = epoch * per_epoch + step % steps * config.batch_size
        order = clip_order(first, min(first + config.batch_size, (epoch + 1) * per_epoch), length, seed)
        order += [-1] * (config.batch_size - len(order))
        mine = [(index, step * config.batch_size + place) for place, index in enumerate(order)][rank::world]
        yield from (mine[i:i + size] for i in range(0, len(mine), size))


def epoch_length(length, config):
    """(clips, steps) of an epoch; the last step may have fewer clips."""
    clips = config.clips_per_epoch or length
    return clips, math.ceil(clips / config.batch_size)


def micro_batch_size(config, world):
    """Clips a process takes at once; an error unless they make up the batch."""
    share, rest = divmod(config.batch_size, world)
    size = min(config.micro_batch, share)
    if rest or size < 1 or share % size:
        raise ValueError(f"{config.batch_size} clips do not divide into {world} processes x micro-batches of {size}; "
                         f"choose --set batch_size=N micro_batch=M with N a multiple of {world} x M")
    return size


def rates(step, steps_per_epoch, config):
    """The learning rates of a step: (the backbone's, all others'). With lr_batch they follow the batch by the square
    root, Adam's rule: the noise of its normalised gradient falls so."""
    warm, total = config.warmup_epochs * steps_per_epoch, config.epochs * steps_per_epoch
    scale = math.sqrt(config.batch_size / config.lr_batch) if config.lr_batch else 1.0
    if step < warm:
        return tuple(scale * (config.warmup_lr + (lr - config.warmup_lr) * step / warm)
                     for lr in (config.backbone_lr, config.lr))
    if config.schedule == "cosine":
        factor = (1 + math.cos(math.pi * (step - warm) / max(total - warm, 1))) / 2
    else:
        factor = 0.1 ** sum(step >= epoch * steps_per_epoch for epoch in config.drop_epochs)
    return config.backbone_lr * factor * scale, config.lr * factor * scale


def make_optimizer(model, config):
    """AdamW with the backbone's parameters as the first group; frozen ones are left out."""
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    groups = [{"params": [p for name, p in trained if name.startswith("backbone.") == backbone], "lr": rate}
              for backbone, rate in ((True, config.backbone_lr), (False, config.lr))]
    return torch.optim.AdamW(groups, betas=(0.9, config.adam_beta2), weight_decay=config.weight_decay, fused=True)


def cut_to_frames(target, frames):
    """A target with the chosen frames (k,) only."""
    of_actors = {name: target[name][:, frames] for name in ("boxes", "present", "labels", "cause") if name in target}
    return {**target, **of_actors, **{name: target[name][frames] for name in ("frames", "frame_ids")}}


def prepare(batch, config):
    """A collated batch, with some frames chosen to be decoded -> (clips, mask or None, targets, frames or None)."""
    clips, padding_mask, targets = batch
    frames = None
    if 0 < config.train_frames < clips.shape[2] and not config.key_frame:
        frames = torch.randperm(clips.shape[2])[:config.train_frames].sort().values
        targets = [cut_to_frames(target, frames) for target in targets]
    return clips, padding_mask if padding_mask.any() else None, targets, frames


def save(path, content):
    """Writes a checkpoint whole or not at all: to a temporary file, synced, renamed."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)
    except (OSError, RuntimeError) as error:
        temporary.unlink(missing_ok=True)
        kept = f"the previous {path.name} is kept" if path.exists() else f"there is no {path.name}"
        raise SystemExit(f"cannot write {path}: {error}; {kept}. Make room, then go on with --resume {path.parent}")


def code_version():
    """The commit this file is of, or "unknown" outside of a repository."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


class Signals:
    """SIGTERM and SIGINT: noted in a step, so that it is finished; elsewhere, or twice, they end the script at once."""

    def __init__(self):
        self.caught, self.in_step = 0, False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.handle)

    def handle(self, number, _):
        if self.caught or not self.in_step:
            sys.exit(128 + number)
        self.caught = number


def open_run(args, rank):
    """The run folder and, of a run that goes on, its last checkpoint (else None); one that holds a run is refused."""
    restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0     # by torchrun, after a process died
    out = Path(args.resume or args.out or time.strftime(f"runs/{args.dataset or SETTINGS['dataset']}-%Y%m%d-%H%M%S"))
    last = out / "last.pt"
    if args.resume is not None or (restarted and last.is_file()):
        if not last.is_file():
            raise SystemExit(f"nothing to resume: {last} is missing; start the run without --resume")
        return out, read_checkpoint(last)
    if rank == 0 and last.exists():
        raise SystemExit(f"{out} holds a run already; go on with it by --resume {out}, or choose another --out")
    return out, None


def choose_settings(args, saved):
    """What is given on the command line, else what the checkpoint was trained with, else the default."""
    settings = SETTINGS | (saved["settings"] if saved else {})
    settings |= {name: getattr(args, name) for name in SETTINGS if getattr(args, name) is not None}
    preset = settings["preset"] or {"custom": "ucf"}.get(settings["dataset"], settings["dataset"])
    if saved:
        config = config_from_dict(saved["config"])
    elif preset in PRESETS:
        config = PRESETS[preset]
    else:
        raise ValueError(f"no preset is called {preset!r}; choose one with --preset: {', '.join(PRESETS)} (data sets are "
                         "synthetic, ucf, jhmdb, ava and custom)")
    if settings["dataset"] != "synthetic" and not settings["data"]:
        raise ValueError(f"data set {settings['dataset']!r} is read from a folder: name it with --data DIR")
    return settings, override(config, args.set)


def open_datasets(settings, config):
    """(training clips, test clips) of a data set."""
    name, split = settings["dataset"], settings["split"]
    numbered = name in ("ucf", "jhmdb")
    if split and not numbered:
        raise ValueError(f"--split {split}: {name} is trained on train, tested on val; only ucf and jhmdb have others")
    training, testing = (build_dataset(name, settings["data"], side, config, split or 1)
                         for side in ("train", "val"))
    if len(training.class_names) != config.num_classes:
        raise ValueError(f"{name} has {len(training.class_names)} classes and the model {config.num_classes}: "
                         f"add --set num_classes={len(training.class_names)}")
    return training, testing


def load_stage_one(model, path):
    """Encoder and decoder (with box head and anchors) of a checkpoint, ours or the authors', into the model; backbone
    and neck stay, so do class queries where the number of classes differs. All or nothing: else ValueError."""
    checkpoint = read_checkpoint(path)
    weights = checkpoint["model"]
    own = {name: value for name, value in model.state_dict().items() if not name.startswith(("backbone.", "neck."))}
    queries = "decoder.class_queries"
    if queries in weights and weights[queries].shape != own[queries].shape:
        del own[queries]
    misfits = [f"{name} {tuple(value.shape)}" for name, value in own.items()
               if name not in weights or weights[name].shape != value.shape]
    if misfits:
        raise ValueError(f"{path} does not fit the model in {len(misfits)} tensors: {', '.join(misfits[:5])}")
    model.load_state_dict({name: weights[name] for name in own}, strict=False)
    return f"{path}, {checkpoint['kind']}: encoder and decoder" + ("" if queries in own else ", without class queries")


def evaluate_now(run):
    """Detections on the test clips by all ranks, scored and written by rank 0 -> results, None on the other ranks."""
    if run.world > 1:       # batch statistics are each rank's own until the next forward pass
        for buffer in run.model.buffers():
            dist.broadcast(buffer, 0)
    detections = evaluate.detect(run.model, run.testing, run.config, run.device, run.settings["eval_share"],
                                 run.settings["workers"])
    if run.rank > 0:
        return None
    results = evaluate.score(detections, run.testing, run.config)
    evaluate.write_results(run.out, results, detections)
    return results


def summary(results, epoch, step, seconds):
    """An evaluation's line in results.csv."""
    row = {"epoch": epoch, "step": step, "minutes": round(seconds / 60, 3)}
    row |= {name: value for name, value in results.items() if "-mAP@" in name}
    return row | {f"{name} {group}": values[name] for group, values in results["per_group"].items() for name in values}


def write_history(history, log_path, out):
    """results.csv, a line an evaluation, and curves.png: losses, rate, gradient norm and mAP over the epochs."""
    with open(out / "results.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, history[0])
        writer.writeheader()
        writer.writerows(history)
    lines = [line for line in map(json.loads, log_path.read_text().splitlines()) if not line["skipped"]]
    visualize.training_curves(lines, history, PARTS, out / "curves.png")


def trim_log(path, step):
    """Leaves the lines of a log up to a step: those after it were written by a process that then died."""
    lines = path.read_text().splitlines() if path.exists() else []
    path.write_text("".join(line + "\n" for line in lines if line.endswith("}") and json.loads(line)["step"] <= step))


def name_clips(batches, losses, world):
    """The clips, of all ranks, in the micro-batches whose loss is not finite; all if only the gradient is not."""
    named = [(f"{target['video']} from frame {int(target['frame_ids'][0])}", bool(loss.isfinite().all()))
             for (_, _, targets, _), loss in zip(batches, losses) for target in targets]
    gathered = [named] * world
    if world > 1:
        dist.all_gather_object(gathered, named)
    named = sum(gathered, [])
    return [name for name, finite in named if not finite] or [name for name, _ in named]


def accumulate(run, batches, counts):
    """Forward and backward passes of a step's micro-batches -> for each the loss and its parts, (5,).

    DDP exchanges gradients in the last backward pass only, and takes their mean over ranks where the sum is meant.
    """
    losses = []
    for number, (clips, mask, targets, frames) in enumerate(batches):
        clips, mask = (x if x is None else x.to(run.device, non_blocking=True) for x in (clips, mask))
        last = number == len(batches) - 1
        with contextlib.nullcontext() if last or run.world == 1 else run.network.no_sync():
            with torch.autocast(run.device.type, run.precision, enabled=run.precision is not None):
                outputs = run.network(clips, mask, frames=frames)
            loss, parts = detection_loss(outputs, targets, run.config, counts)
            run.scaler.scale(loss * run.world).backward()
        losses.append(torch.stack([loss.detach(), *parts.values()]))
    return losses


def train_step(run, batches):
    """One step on the micro-batches of all ranks -> (what log.jsonl says of it, whether a signal reached any rank).

    What is not finite changes nothing but the count of such steps in a row; "clips" of the line then names the clips.
    """
    config, state = run.config, run.state
    seed_everything(run.settings["seed"], 1, state["step"], run.rank)
    batches = [prepare(batch, config) for batch in batches]
    counts = sum(loss_counts(targets, config) for _, _, targets, _ in batches).to(run.device)
    if run.world > 1:
        dist.all_reduce(counts)
    learning_rates = rates(state["step"], epoch_length(run.length, config)[1], config)
    for group, rate in zip(run.optimizer.param_groups, learning_rates):
        group["lr"] = rate
    buffers = [buffer.clone() for buffer in run.model.buffers()]
    losses = accumulate(run, batches, counts)
    run.scaler.unscale_(run.optimizer)
    norm = nn.utils.clip_grad_norm_([*run.model.parameters()], config.clip_norm)
    sums = torch.cat([sum(losses), losses[0].new_tensor([run.signals.caught > 0])])
    if run.world > 1:
        dist.all_reduce(sums)
    loss, *parts, stop, norm = torch.cat([sums, norm[None]]).tolist()     # waits for the GPU, as matching does
    finite = math.isfinite(loss) and math.isfinite(norm)
    # fp16 finds its scale by overflowing: no fault as long as the scale can still be lowered
    overflow = math.isfinite(loss) and not finite and run.scaler.is_enabled() and run.scaler.get_scale() > 1
    if finite:
        run.scaler.step(run.optimizer)
    else:
        for buffer, value in zip(run.model.buffers(), buffers):     # batch statistics have met what was not finite
            buffer.copy_(value)
    run.scaler.update()
    run.optimizer.zero_grad()
    state["step"] += 1
    state["bad"] = 0 if finite else state["bad"] + (not overflow)
    line = {"loss": loss, **dict(zip(PARTS, parts)), "lr": learning_rates[1], "backbone_lr": learning_rates[0],
            "grad_norm": norm, "skipped": not finite}
    return line if finite else line | {"clips": name_clips(batches, losses, run.world)}, stop


def checkpoint(run, name):
    """Rank 0 writes all that the run needs to go on: out/NAME."""
    if run.rank == 0:
        state = run.state
        save(run.out / name, {
            "model": run.model.state_dict(), "optimizer": run.optimizer.state_dict(), "scaler": run.scaler.state_dict(),
            "state": state, "config": asdict(run.config), "settings": run.settings, "dataset": run.testing.name,
            "classes": list(run.testing.class_names), "epoch": state["step"] // epoch_length(run.length, run.config)[1],
            "metrics": state["history"][-1] if state["history"] else {}, "processes": run.world, "code": run.code})


def end_epoch(run, epoch):
    """Evaluation after an epoch: table, files, best.pt and last.pt -> results, None on ranks other than 0."""
    checkpoint(run, "last.pt")              # an evaluation may be left at once: it starts anew from here
    run.signals.in_step = False
    if run.signals.caught:
        sys.exit(128 + run.signals.caught)
    results, state = evaluate_now(run), run.state
    state["evaluated"] = epoch
    if run.rank == 0:
        state["history"].append(summary(results, epoch, state["step"], time.monotonic() - run.begun))
        write_history(state["history"], run.out / "log.jsonl", run.out)
        run.bar.write(f"epoch {epoch}{', overfit check: the test videos are the training videos' * run.overfit}\n"
                      + evaluate.table(results))
        if results["f-mAP@0.5"] > state["best"]:
            state["best"] = results["f-mAP@0.5"]
            checkpoint(run, "best.pt")
    checkpoint(run, "last.pt")
    return results


def report(run, line):
    """A step's line into log.jsonl and its loss to the progress bar; SystemExit after BAD_STEPS bad ones in a row."""
    said = "step {step} skipped: loss {loss}, gradient norm {grad_norm} with ".format(**line) + str(line.get("clips"))
    run.bar.set_postfix_str("epoch {epoch:.2f} loss {loss:.3f} lr {lr:.1e}".format(**line), refresh=False)
    if run.rank == 0:
        if line["skipped"]:
            run.bar.write(said)
            line |= {name: None for name in ("loss", *PARTS, "grad_norm") if not math.isfinite(line[name])}
        run.log.write(json.dumps(line) + "\n")
        run.log.flush()
    run.bar.update()
    if run.state["bad"] == BAD_STEPS:
        raise SystemExit(f"{said}\n{BAD_STEPS} in a row: {run.out / 'last.pt'} holds the weights before them. Look at "
                         "these clips, or lower the learning rate (--set lr=)")


def train(training, run):
    """The loop of steps, checkpoints and evaluations, from the saved step or 0 to the end -> the last results."""
    config, settings, state = run.config, run.settings, run.state
    clips_per_epoch, steps_per_epoch = epoch_length(run.length, config)
    total, results = config.epochs * steps_per_epoch, None
    micro_steps = config.batch_size // (run.world * micro_batch_size(config, run.world))
    batches = micro_batches(state["step"], total, run.length, config, settings["seed"], run.rank, run.world)
    loader = iter(DataLoader(SeededClips(training, settings["seed"]), batch_sampler=batches, collate_fn=collate,
                             num_workers=settings["workers"], pin_memory=run.device.type == "cuda"))
    if run.rank == 0:
        run.out.mkdir(parents=True, exist_ok=True)
        checkpoint(run, "last.pt")
        (run.out / "config.json").write_text(json.dumps({**settings, **asdict(config)}, indent=2) + "\n")
        trim_log(run.out / "log.jsonl", state["step"])
        run.log = open(run.out / "log.jsonl", "a")
    run.bar = tqdm(total=total, initial=state["step"], disable=run.rank > 0, mininterval=1 if sys.stderr.isatty() else 30)
    last_saved, run.begun = time.monotonic(), time.monotonic() - state["seconds"]

    while True:
        epoch, within = divmod(state["step"], steps_per_epoch)
        if within == 0 and epoch > state["evaluated"] and (epoch % config.eval_every == 0 or epoch == config.epochs):
            results = end_epoch(run, epoch)
        if state["step"] == total:
            run.bar.close()
            return results
        run.signals.in_step = True
        started = time.monotonic()
        batches = [next(loader) for _ in range(micro_steps)]
        waited = time.monotonic() - started
        line, stop = train_step(run, batches)
        now, step = time.monotonic(), state["step"]
        state["seconds"] = now - run.begun
        report(run, {
            "step": step, "epoch": step / steps_per_epoch, **line, "memory_gb": evaluate.memory_gb(run.device),
            "clips_per_s": min(config.batch_size, clips_per_epoch - within * config.batch_size) / (now - started),
            "data_share": waited / (now - started), "eta_minutes": state["seconds"] / step * (total - step) / 60})
        if stop or now - last_saved > 60 * settings["save_minutes"]:
            checkpoint(run, "last.pt")
            last_saved = now
        if stop:
            sys.exit(128 + (run.signals.caught or signal.SIGTERM))


def prepare_run(model, optimizer, training, testing, config, settings, saved, out, device, rank, world, signals):
    """All that a run consists of, under one name: what is given, and the scaler, the network that is called and the
    state (step, history, ...) that a checkpoint holds."""
    state = {"step": 0, "evaluated": 0, "best": -1.0, "bad": 0, "seconds": 0.0, "history": []}
    precision = {"float32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[settings["precision"]]
    scaler = torch.amp.GradScaler(device.type, enabled=precision is torch.float16)
    if saved:
        state |= saved["state"]
        scaler.load_state_dict(saved["scaler"])
    network = DistributedDataParallel(model, gradient_as_bucket_view=True) if world > 1 else model
    return SimpleNamespace(
        model=model, network=network, optimizer=optimizer, scaler=scaler, precision=precision, config=config,
        settings=settings, state=state, testing=testing, length=len(training), out=out, device=device, rank=rank,
        world=world, signals=signals, code=code_version(), overfit=set(training.videos) == set(testing.videos))


def main(argv=None):
    args = arguments(argv)
    signals = Signals()
    device, rank, world = start_processes()
    try:
        out, saved = open_run(args, rank)
        settings, config = choose_settings(args, saved)
        micro_batch_size(config, world)
        training, testing = open_datasets(settings, config)
        seed_everything(settings["seed"], 2)
        model = VideoActionDetector(config)
        if args.backbone_weights:
            load_backbone(model, args.backbone_weights)
        said = load_stage_one(model, args.init) if args.init else ""
        if saved:
            model.load_state_dict(saved["model"])
            said = f"going on from step {saved['state']['step']}"
    except (ValueError, OSError, RuntimeError) as error:
        raise SystemExit(f"train.py: {error}")
    if settings["workers"] is None:     # on a CPU the cores are the model's
        cores = os.cpu_count() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        settings["workers"] = min(8, cores) if device.type == "cuda" else 0
    if world > 1 and device.type == "cuda":
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    model.to(device).train()
    if settings["compile"]:
        model.backbone.compile()
        model.decoder.compile()
    optimizer = make_optimizer(model, config)
    if saved:
        optimizer.load_state_dict(saved["optimizer"])
    if rank == 0:
        count = sum(parameter.numel() for parameter in model.parameters())
        print(f"{out}: {count:,} parameters, {len(training)} training clips, {world} x {device.type}", said, flush=True)
    try:
        results = train(training, prepare_run(model, optimizer, training, testing, config, settings, saved, out, device,
                                              rank, world, signals))
    except OSError as error:
        raise SystemExit(f"train.py: {error}; after mending it go on with --resume {out}")
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, RuntimeError) and not re.search("out of memory|can't allocate memory", str(error)):
            raise
        raise SystemExit(OUT_OF_MEMORY.format(error=str(error).split("\n")[0], out=out))
    if rank == 0:
        visualize.attention_sheet(model, testing, config, out / "attention.png", device)
        print(evaluate.table(results) if results else f"{out}: the run had ended; metrics.json has its results")
        print("wrote " + ", ".join(str(path) for path in sorted(out.iterdir())))
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
