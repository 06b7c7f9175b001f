"""Measurements: `python -m tools.benchmark gpu`, `forward`, `step`, `scoring` or `against`.

gpu: what a GPU has to say, in one call of nine minutes. Each part runs in a process of its own and
has a share of the time, so that none takes the others along: what fails or does not fit is a row
that says so, what there was no time for is named. Rows are printed, and written to --out, as they
come: gpu.json, and gpu.log with what the parts print. On a CPU the same runs at tiny sizes.

    machine     what it is measured on
    kernel      deform3d_triton.py at the sizes of the paper's data sets: correctness against
                float64, times and memory, beside F.grid_sample (eager and compiled), the kernel
                unfused and deterministic, and a device copy of the forward's bytes; --sweep: other
                tiles
    forward     `ucf` in evaluation: time and memory of a batch of clips in every precision
    training    a training step of `ucf`, phase by phase: batches up to the largest that fits,
                precisions, compiled, and with layers recomputed in the backward pass
    evaluation  clips/s of evaluate.detect with its loading processes
    command     the README's first command for some steps: steps/s, the share that waits for data

forward: a clip through a preset, stage by stage: seconds, multiply-adds a second beside those of a
4096^3 matrix product, and the peak of memory above what the weights take.

step: a training step of a preset, phase by phase, at several batch sizes and precisions. Clips are
noise (drawn, for the synthetic preset) with five actors; the loss has the matching in it, which is
also timed by itself.

scoring: frame mAP, linking and video mAP of as many detections as UCF101-24's test set gives, and
AVA's mAP of as many as its validation set gives: made up, every query scored for every class.

against: this tree beside another one (an older commit's `git worktree`), in turns: `forward` of
`ucf`, a step of the first command, `scoring`; medians, and their ratios.
"""

# B clips, T frames, A actor queries, C classes, N actors, n detections; of the kernel: Q queries, S
# cells of all levels, M heads, L levels, P points of a level, D channels of a head; (t, h, w)

import argparse
import collections
import contextlib
import functools
import gc
import json
import math
import multiprocessing
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import Dataset

import deform3d_triton
import evaluate
import metrics
import objective
import train
from data import build_dataset, collate
from deform3d_triton import (deform_attn_3d, deform_attn_3d_fused, deform_attn_3d_reference,
                             triton)
from model import PRESETS, VideoActionDetector, override

ROOT = Path(__file__).resolve().parents[1]
HEADS, DIM = 8, 32
# (frames, side) of the finest maps of the presets' training clips: ucf of 32 x 224 x 224, jhmdb of
# 40 x 256 x 256, ava of 16 x 256 x 256. The backbone halves T, the finest map has stride 4.
SIZES = {"ucf": (16, 56), "jhmdb": (20, 64), "ava": (8, 64)}
TINY_SIZES = {"ucf": (2, 8)}
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}     # relative L2, levels of up to 64 cells
TILES = ((2, 1), (4, 1), (8, 1), (16, 1), (8, 2), (16, 2), (16, 4), (32, 4))    # queries, warps
# `ucf` for a test on a CPU
TINY = ("frames=2", "crop_size=32", "vit_depth=1", "vit_width=96", "vit_heads=2", "dim=64",
        "encoder_layers=1", "decoder_layers=1", "dim_feedforward=64", "num_queries=2",
        "conv_blocks=1")
RECOMPUTED = {"none": (), "classifier": ("checkpoint_classifier=True",),
              "encoder": ("checkpoint_encoder=True",), "backbone": ("checkpoint_backbone=True",)}
RECOMPUTED["all"] = sum(RECOMPUTED.values(), ())
PHASES = ("data", "forward", "matching", "loss", "backward", "optimizer")
COLUMNS = {
    "machine": ("device", "memory_gb", "torch", "triton", "cores"),
    "kernel": ("size", "dtype", "variant", "forward_ms", "backward_ms", "both_ms", "peak_mb",
               "error", "note"),
    "forward": ("precision", "batch", "ms", "clips_per_s", "peak_gb", "note"),
    "training": ("precision", "recomputed", "batch", *PHASES, "clips_per_s", "peak_gb", "note"),
    "evaluation": ("precision", "batch", "workers", "clips_per_s", "peak_gb", "note"),
    "command": ("options", "steps_per_s", "clips_per_s", "data_share", "peak_gb", "seconds",
                "note"),
}
WIDTHS = {"device": 24, "variant": 22, "options": 20, "torch": 12, "precision": 14}


# ---- clocks and memory --------------------------------------------------------------------------

def find_device():
    """The device to measure. Not asked for before a part's process has begun: a process that has
    spoken to the GPU cannot be forked."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def now(device):
    """Seconds, once what the GPU was asked for is done."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def timed(function, device):
    """-> a call's result and its seconds."""
    started = now(device)
    result = function()
    return result, now(device) - started


def measure(function, device, runs):
    """The median milliseconds of a call, after two calls to warm up."""
    times = []
    for _ in range(runs + 2):
        if device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            start.record()
            function()
            end.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(end))
        else:
            times.append(1000 * timed(function, device)[1])
    return statistics.median(times[2:])


def peak_above(function, device):
    """Megabytes that a call needs at most above what is there before it; NaN where Linux does not
    tell."""
    evaluate.reset_memory(device)
    if device.type == "cuda":
        before = torch.cuda.memory_allocated()
        function()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    status = Path("/proc/self/status")
    if not status.exists():
        return math.nan

    def resident(field):
        return int(status.read_text().split(field)[1].split()[0]) / 1e3

    before = resident("VmRSS:")
    function()
    return resident("VmHWM:") - before


# ---- the kernel ---------------------------------------------------------------------------------

def make_levels(frames, side):
    """(T_l, H_l, W_l) of a preset's four maps."""
    return [(frames, *[math.ceil(side / stride)] * 2) for stride in (1, 2, 4, 8)]


def make_inputs(shapes, points, dtype, device):
    """Self-attention as in the encoder: every cell a query that looks around its own place, a few
    cells far -> leaves (value, offsets, logits), references (1, Q, L, 3), scales (L, 3).

    value and logits are of dtype, as under autocast, the offsets float32."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*size):
        return torch.randn(*size, generator=generator, device=device)

    centres = []
    for shape in shapes:
        axes = [(torch.arange(cells) + 0.5) / cells for cells in shape]
        centres.append(torch.cartesian_prod(*axes))                             # (cells, 3)
    centres = torch.cat(centres).to(device)                                     # (Q, 3)
    queries, levels = len(centres), len(shapes)
    references = centres[None, :, None].expand(1, -1, levels, -1).contiguous()
    leaves = (normal(1, queries, HEADS, DIM).to(dtype),
              2 * normal(1, queries, HEADS, levels, points, 3),
              normal(1, queries, HEADS, levels, points).to(dtype))
    scales = 1 / torch.tensor(shapes, dtype=torch.float32, device=device)       # offsets in cells
    return [leaf.requires_grad_() for leaf in leaves], references, scales


def unfuse(references, offsets, logits, scales):
    """-> locations (B, Q, M, L, P, 3) and soft-maxed weights (B, Q, M, L, P)."""
    locations = references[:, :, None, :, None] + offsets * scales[:, None]
    return locations, logits.flatten(3).softmax(3).view(logits.shape)


def sampler(variant, shapes, references, scales):
    """The way to sample that a variant names, a function of (value, offsets, logits)."""
    def fused(value, offsets, logits):
        backend = "torch" if variant == "backend torch" else "triton"
        return deform_attn_3d_fused(value, shapes, references, offsets, logits, scales, backend)

    def unfused(value, offsets, logits):
        where, weights = unfuse(references, offsets, logits, scales)
        if variant == "kernel, unfused":
            return deform_attn_3d(value, shapes, where, weights, backend="triton")
        return deform_attn_3d_reference(value, shapes, where, weights)

    if variant == "grid_sample, compiled":
        return torch.compile(unfused)
    return unfused if "unfused" in variant or "grid_sample" in variant else fused


def truth_of(leaves, shapes, references, scales, picked):
    """Output and gradients in float64 for the picked queries -> (gradient of the output (1, Q,
    M * D), zero but for these; output, gradients of value, offsets and logits)."""
    value, offsets, logits = leaves
    copies = [x.detach().double().requires_grad_()
              for x in (value, offsets[:, picked], logits[:, picked])]
    where, weights = unfuse(references[:, picked], *copies[1:], scales)
    output = deform_attn_3d_reference(copies[0], shapes, where, weights)
    grad = torch.zeros(1, offsets.shape[1], output.shape[2], dtype=value.dtype, device=value.device)
    generator = torch.Generator().manual_seed(1)
    grad[:, picked] = torch.randn(output.shape, generator=generator).to(grad)
    gradients = torch.autograd.grad(output, copies, grad[:, picked].double())
    return grad, (output.detach(), *gradients)


def largest_error(function, leaves, grad, truth, picked):
    """The largest relative L2 error among output and gradients of a way to sample."""
    result = function(*leaves)
    of_value, of_offsets, of_logits = torch.autograd.grad(result, leaves, grad)
    found = result.detach()[:, picked], of_value, of_offsets[:, picked], of_logits[:, picked]
    errors = [(ours.double() - exact).norm() / exact.norm() for ours, exact in zip(found, truth)]
    return float(torch.stack(errors).max())


def time_sampling(shapes, points, dtype, variant, device, runs):
    """A row of the part kernel: milliseconds of forward, backward and both, memory, error."""
    leaves, references, scales = make_inputs(shapes, points, dtype, device)
    if variant == "copy":       # of the bytes that the forward reads and writes: nothing is faster
        bytes_moved = sum(x.nbytes for x in (*leaves, references, leaves[0]))
        source = torch.empty(bytes_moved // 2, dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        return {"forward_ms": measure(lambda: target.copy_(source), device, runs)}
    queries = leaves[1].shape[1]
    picked = torch.linspace(0, queries - 1, min(queries, 256), device=device).round().long()
    grad, truth = truth_of(leaves, shapes, references, scales, picked)
    function = sampler(variant, shapes, references, scales)
    # The kernel alone may be asked to repeat itself: grid_sample's backward refuses to.
    torch.use_deterministic_algorithms(variant == "kernel, deterministic")
    try:
        row = {"error": largest_error(function, leaves, grad, truth, picked)}
        if not row["error"] < TOLERANCE[dtype]:
            row["note"] = f"WRONG: the error is above {TOLERANCE[dtype]}"
        if variant == "kernel, deterministic":
            first, second = (torch.autograd.grad(function(*leaves), leaves, grad) for _ in range(2))
            same = all(torch.equal(one, other) for one, other in zip(first, second))
            row["note"] = "repeats itself" if same else "DIFFERS FROM RUN TO RUN"
        result = function(*leaves)

        def both():
            return torch.autograd.grad(function(*leaves), leaves, grad)

        row["forward_ms"] = measure(torch.no_grad()(lambda: function(*leaves)), device, runs)
        row["backward_ms"] = measure(
            lambda: torch.autograd.grad(result, leaves, grad, retain_graph=True), device, runs)
        del result
        return row | {"both_ms": measure(both, device, runs), "peak_mb": peak_above(both, device)}
    finally:
        torch.use_deterministic_algorithms(False)


def time_tile(tile, *arguments):
    """The same with other tiles of the kernel: (queries of a program, warps)."""
    with mock.patch.object(deform3d_triton, "_tile", lambda value, element_size: tile):
        return time_sampling(*arguments)


def plan_kernel(device, sweep):
    """What the part measures: a list of (what a row is of, function that gives the rest of it)."""
    on_gpu = device.type == "cuda"
    sizes, points, runs = (SIZES, 8, 20) if on_gpu else (TINY_SIZES, 2, 2)
    variants = ["backend torch", "copy", "grid_sample"]
    if on_gpu:
        variants = ["kernel", "copy", "kernel, deterministic", "kernel, unfused", "grid_sample",
                    "grid_sample, compiled"]
    plan = []
    for variant in variants:
        for size, finest in sizes.items():
            for dtype in (torch.bfloat16, torch.float32):
                about = {"size": size, "dtype": str(dtype).split(".")[1], "variant": variant}
                plan.append((about, partial(time_sampling, make_levels(*finest), points, dtype,
                                            variant, device, runs)))
    if sweep and on_gpu:
        for tile in TILES:
            about = {"size": "ucf", "dtype": "bfloat16",
                     "variant": "{} queries, {} warps".format(*tile)}
            plan.append((about, partial(time_tile, tile, make_levels(*SIZES["ucf"]), points,
                                        torch.bfloat16, "kernel", device, runs)))
    return plan


# ---- the model ----------------------------------------------------------------------------------

@functools.lru_cache(maxsize=1)
def built(config, compiled, device):
    """A model of a Config; the last one is kept, as the next row is often of the same."""
    torch.manual_seed(0)
    model = VideoActionDetector(config).to(device)
    if compiled:
        train.compile_parts(model)
    return model


def precisions(device):
    """All that there are, the most wanted first. With "+compile" the model is compiled."""
    if device.type == "cuda":
        return ["bf16", "tf32", "float32", "bf16+compile"]
    return ["bf16", "float32"]


def autocast(precision, device):
    """Sets a precision -> the context to run the model in."""
    dtype = evaluate.set_precision(precision.removesuffix("+compile"), device)
    return torch.autocast(device.type, dtype, enabled=dtype is not None)


def ucf(device, *changes):
    """The preset that is measured: `ucf`, on a CPU a tiny one."""
    return override(PRESETS["ucf"], [*(TINY if device.type == "cpu" else ()), *changes])


def time_forward(config, precision, batch, device, runs):
    """A row of the part forward: a batch in evaluation."""
    model = built(config, "+compile" in precision, device).eval()
    size = batch, 3, config.frames, config.crop_size, config.crop_size
    clips = torch.randint(256, size, dtype=torch.uint8, device=device)
    with torch.inference_mode(), autocast(precision, device):
        evaluate.reset_memory(device)
        ms = measure(lambda: model(clips), device, runs)
    return {"ms": ms, "clips_per_s": 1000 * batch / ms, "peak_gb": evaluate.memory_gb(device)}


def plan_forward(device, sweep):
    on_gpu, plan = device.type == "cuda", []
    for precision in precisions(device):
        for batch in (1, 4, 16) if on_gpu else (1, 2):
            about = {"precision": precision, "batch": batch}
            plan.append((about, partial(time_forward, ucf(device), precision, batch, device,
                                        10 if on_gpu else 1)))
    return plan


def made_up_batch(config, batch, start):
    """A batch as train.prepare wants it: the synthetic preset's own clips, or noise with up to five
    actors a frame."""
    if config.num_classes == 9:
        dataset = build_dataset("synthetic", None, "train", config)
        return collate([dataset[index] for index in range(start, start + batch)])
    frames, size = 1 if config.key_frame else config.frames, config.crop_size
    actors = min(config.num_queries, 5)
    centres = torch.rand(actors, 1, 2) * 0.6 + 0.2
    boxes = torch.cat([centres, torch.full((actors, 1, 2), 0.3)], 2)        # (N, 1, 4)
    labels = F.one_hot(torch.randint(config.num_classes, (actors, 1)), config.num_classes).float()
    target = {"boxes": boxes.expand(-1, frames, -1), "labels": labels.expand(-1, frames, -1),
              "present": torch.ones(actors, frames, dtype=torch.bool),
              "frames": torch.ones(frames, dtype=torch.bool),
              "frame_ids": torch.arange(1, frames + 1), "size": torch.tensor([size, size]),
              "video": "noise", "video_index": 0}
    clips = torch.randint(256, (batch, 3, config.frames, size, size), dtype=torch.uint8)
    return clips, torch.zeros(batch, size, size, dtype=torch.bool), [target] * batch


def time_step(config, precision, batch, device, runs):
    """A row of the part training: {phase: median milliseconds}, clips/s and peak memory of training
    steps after two to warm up. The loss has a matching in it; clips/s leave data out."""
    model = built(config, "+compile" in precision, device).train()
    optimizer, times = train.make_optimizer(model, config), collections.defaultdict(list)

    def phase(name, function):
        result, seconds = timed(function, device)
        times[name].append(1000 * seconds)
        return result

    def update():
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm)
        optimizer.step()
        optimizer.zero_grad()

    context = autocast(precision, device)
    evaluate.reset_memory(device)
    for run in range(runs + 2):
        made = phase("data", lambda: made_up_batch(config, batch, run * batch))
        clips, mask, targets, frames = train.prepare(made, config, device)
        with context:
            outputs = phase("forward", lambda: model(clips, mask, frames=frames))
        phase("matching", lambda: objective.match(outputs, targets, config))
        loss, _ = phase("loss", lambda: objective.detection_loss(outputs, targets, config))
        phase("backward", loss.backward)
        phase("optimizer", update)
        del outputs, loss
    row = {name: statistics.median(times[name][2:]) for name in PHASES}
    whole = sum(row[name] for name in ("forward", "loss", "backward", "optimizer"))
    return row | {"clips_per_s": 1000 * batch / whole, "peak_gb": evaluate.memory_gb(device)}


def plan_training(device, sweep):
    wanted = [("bf16", "none", (1, 2, 4))]
    wanted += [("bf16", recomputed, (2,)) for recomputed in RECOMPUTED if recomputed != "none"]
    if device.type == "cuda":
        wanted += [("tf32", "none", (1, 2)), ("float32", "none", (1, 2))]
        wanted += [("bf16", "none", (6, 8, 12)), ("bf16", "all", (8, 16, 24, 32, 48))]
        wanted += [("bf16+compile", "none", (1, 2, 4))]
    else:
        wanted += [("float32", "none", (1,))]
    plan = []
    for precision, recomputed, batches in wanted:
        for batch in batches:
            about = {"precision": precision, "recomputed": recomputed, "batch": batch}
            config = ucf(device, *RECOMPUTED[recomputed])
            runs = 3 if device.type == "cuda" else 1
            plan.append((about, partial(time_step, config, precision, batch, device, runs)))
    return plan


class NoiseClips(Dataset):
    """Clips of noise, a video each, with what evaluate.detect asks of a data set."""

    def __init__(self, config, count):
        self.config, self.name = config, "noise"
        self.videos = [f"noise {number}" for number in range(count)]
        self.class_names = [str(number) for number in range(config.num_classes)]

    def __len__(self):
        return len(self.videos)

    def __getitem__(self, index):
        clips, _, targets = made_up_batch(self.config, 1, index)
        return clips[0], targets[0] | {"video": self.videos[index], "video_index": index}


def time_detect(config, precision, batch, device, count):
    """A row of the part evaluation, start of the loading processes included."""
    model, dataset = built(config, False, device), NoiseClips(config, count)
    workers = evaluate.default_workers(device)
    dtype = evaluate.set_precision(precision, device)

    def detect(share):
        evaluate.detect(model, dataset, config, device, share, workers, progress=False,
                        batch_size=batch, precision=dtype)

    detect(batch / count)       # to warm up
    evaluate.reset_memory(device)
    seconds = timed(lambda: detect(1.0), device)[1]
    return {"workers": workers, "clips_per_s": count / seconds,
            "peak_gb": evaluate.memory_gb(device)}


def plan_evaluation(device, sweep):
    wanted, count = [("float32", 1), ("bf16", 2)], 4
    if device.type == "cuda":
        wanted, count = [("tf32", 1), ("tf32", 8), ("bf16", 1), ("bf16", 8)], 64
    plan = []
    for precision, batch in wanted:
        about = {"precision": precision, "batch": batch}
        plan.append((about, partial(time_detect, ucf(device), precision, batch, device, count)))
    return plan


def train_briefly(options, clips):
    """The first command for one epoch of some clips -> the lines of its log.jsonl."""
    with tempfile.TemporaryDirectory() as folder:
        train.main(["--out", f"{folder}/run", "--eval-share", "0.01", "--quick-share", "0", "--set",
                    f"clips_per_epoch={clips}", "epochs=1", *options])
        return [json.loads(line) for line in open(f"{folder}/run/log.jsonl")]


def time_command(options, clips, device):
    """A row of the part command: medians over its second half; seconds are those of the whole, the
    start, a short evaluation and the pictures included."""
    lines, seconds = timed(lambda: train_briefly(options, clips), device)
    later = lines[len(lines) // 2:]
    rate = statistics.median(line["clips_per_s"] for line in later)
    return {"steps_per_s": rate * len(lines) / clips, "clips_per_s": rate, "seconds": seconds,
            "data_share": statistics.median(line["data_share"] for line in later),
            "peak_gb": lines[-1]["memory_gb"]}


def plan_command(device, sweep):
    options = ["batch_size=2", "micro_batch=2"]
    clips = 4
    if device.type == "cuda":
        options = []
        clips = 960
    about = {"options": " ".join(options) or "as it is"}
    return [(about, partial(time_command, options, clips, device))]


def about_machine(device):
    row = {"device": "CPU", "torch": torch.__version__, "cores": len(os.sched_getaffinity(0)),
           "triton": getattr(triton, "__version__", "none")}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        row |= {"device": properties.name, "memory_gb": properties.total_memory / 2 ** 30}
    return row


def plan_machine(device, sweep):
    return [({}, partial(about_machine, device))]


# ---- the command gpu ----------------------------------------------------------------------------

PARTS = {       # what makes its plan, and its share of the time; what one leaves goes to the next
    "machine": (plan_machine, 0.04), "kernel": (plan_kernel, 0.3), "forward": (plan_forward, 0.13),
    "training": (plan_training, 0.33), "evaluation": (plan_evaluation, 0.08),
    "command": (plan_command, 0.12)}


def run_part(part, sweep, log, sender):
    """A part's process: sends what its rows are of, then, one by one, what was measured."""
    os.setsid()                                 # a group that can be ended as a whole
    with open(log, "a") as file:
        os.dup2(file.fileno(), sys.stdout.fileno())
        os.dup2(file.fileno(), sys.stderr.fileno())
    device = find_device()
    plan = PARTS[part][0](device, sweep)
    sender.send([about for about, _ in plan])
    too_large = []                              # what did not fit, and does not with more clips
    for about, measurement in plan:
        kind = {name: value for name, value in about.items() if name != "batch"}
        if kind in too_large:
            sender.send({"note": "more than what did not fit"})
            continue
        try:
            sender.send(measurement())
        except torch.OutOfMemoryError:
            too_large.append(kind)
            sender.send({"note": "out of memory"})
        except (Exception, SystemExit) as error:        # of whatever kind: the next is measured
            traceback.print_exc()
            lines = str(error).splitlines() or [""]
            sender.send({"note": f"failed: {type(error).__name__}: {lines[0][:80]}"})
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def rows_of(part, sweep, log, deadline):
    """Yields the rows of a part as they come; past the deadline its process is ended, and what is
    left is named."""
    fork = multiprocessing.get_context("fork")
    receiver, sender = fork.Pipe(duplex=False)
    process = fork.Process(target=run_part, args=(part, sweep, log, sender))
    process.start()
    sender.close()
    planned, done, reason = [{}], 0, "no time was left"
    try:
        if receiver.poll(deadline - time.monotonic()):
            planned = receiver.recv()
            while done < len(planned) and receiver.poll(max(0, deadline - time.monotonic())):
                yield planned[done] | receiver.recv()
                done += 1
    except EOFError:
        process.join()
        reason = f"the process ended with {process.exitcode}, see {log}"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.join()
    for about in planned[done:]:
        yield about | {"note": reason}


def cell(value):
    if isinstance(value, float):
        return f"{value:.1e}" if 0 < value < 0.001 else f"{value:.4g}"
    return str(value)


def table_line(cells, columns):
    """A line of a table in Markdown, in columns of their width."""
    padded = [text.ljust(WIDTHS.get(name, max(len(name), 8))) for text, name in zip(cells, columns)]
    return f"| {' | '.join(padded)} |"


def gpu(arguments):
    """The command `gpu`, see the top of the file."""
    out = Path(arguments.out)
    out.mkdir(parents=True, exist_ok=True)
    result, log = out / "gpu.json", out / "gpu.log"
    log.write_text("")
    rows, shares, started = [], 0.0, time.monotonic()
    of_all = sum(PARTS[part][1] for part in arguments.parts)
    for part in arguments.parts:
        columns, shares = COLUMNS[part], shares + PARTS[part][1]
        deadline = started + 60 * arguments.minutes * shares / of_all
        print(f"\n{part}\n\n{table_line(columns, columns)}")
        print(table_line(["---"] * len(columns), columns), flush=True)
        for row in rows_of(part, arguments.sweep, log, deadline):
            rows.append({"part": part} | row)
            print(table_line([cell(row.get(name, "")) for name in columns], columns), flush=True)
            result.write_text(json.dumps({"rows": rows}, indent=1))
    print(f"\n{time.monotonic() - started:.0f} s; wrote {result}, {log}")


# ---- forward, step, scoring ---------------------------------------------------------------------

def write(arguments, result):
    """A command's result as JSON."""
    Path(arguments.out).parent.mkdir(parents=True, exist_ok=True)
    Path(arguments.out).write_text(json.dumps(result, indent=1) + "\n")
    print(f"wrote {arguments.out}")


def time_stages(model, clip, device):
    """Seconds of a forward pass: {"all", "backbone", "encoder", "localizing", "classifying"}."""
    stages = {"backbone": [model.backbone, model.neck], "encoder": [model.encoder],
              "localizing": model.decoder.localizing, "classifying": model.decoder.classifying}
    seconds, hooks = collections.Counter(), []

    def watch(name, module):
        def before(*_):
            seconds[name] -= now(device)

        def after(*_):
            seconds[name] += now(device)

        hooks.extend([module.register_forward_pre_hook(before),
                      module.register_forward_hook(after)])

    for name, modules in stages.items():
        for module in modules:
            watch(name, module)
    seconds["all"] = timed(lambda: model(clip), device)[1]
    for hook in hooks:
        hook.remove()
    return seconds


def forward(arguments):
    """The command `forward`, see the top of the file."""
    device, side = find_device(), arguments.matmul
    config = override(PRESETS[arguments.preset], arguments.set)
    evaluate.set_precision("float32", device)
    model = VideoActionDetector(config).to(device).eval().requires_grad_(False)
    clip = torch.randn(1, 3, config.frames, *arguments.size, device=device)
    left, right = torch.randn(2, side, side, device=device)
    rate = side ** 3 / measure(lambda: left @ right, device, 5) * 1000
    del left, right
    with torch.inference_mode():
        model(clip)
        runs = [time_stages(model, clip, device) for _ in range(arguments.runs)]
        peak = peak_above(lambda: model(clip), device)
    count = evaluate.multiply_adds(lambda: model(clip))
    seconds = {name: statistics.median(run[name] for run in runs) for name in runs[0]}
    result = {"preset": arguments.preset, "clip": list(clip.shape[2:]), "seconds": seconds,
              "multiply_adds": count, "share_of_matmul": count / seconds["all"] / rate,
              "matmul_multiply_adds_per_s": rate, "peak_mb_above_weights": peak}
    print(json.dumps(result, indent=1))
    write(arguments, result)


def step(arguments):
    """The command `step`, see the top of the file."""
    device, rows = find_device(), []
    config = override(PRESETS[arguments.preset], arguments.set)
    columns = ("precision", "batch", *PHASES, "clips_per_s", "peak_gb")
    print(table_line(columns, columns))
    for precision in arguments.precisions:
        for batch in arguments.batches:
            row = time_step(config, precision, batch, device, arguments.runs)
            rows.append({"precision": precision, "batch": batch} | row)
            print(table_line([cell(rows[-1][name]) for name in columns], columns), flush=True)
    write(arguments, {"preset": arguments.preset, "rows": rows})


def made_up_set(rng, lengths, queries, classes):
    """Detections as metrics.link_tubes takes them, and ground-truth tubes: the actors' boxes, off
    by two pixels.

    Boxes wander. The first one or two queries of a video are actors of one class, with the better
    scores."""
    tubes, parts = [], []
    for video, frames in enumerate(lengths.tolist()):
        actors, label = int(rng.integers(1, 3)), int(rng.integers(classes))
        number = np.arange(1, frames + 1)                                           # (T,)
        walk = rng.normal(0, 2, (frames, queries, 2)).cumsum(0)
        centre = rng.uniform(60, 180, (1, queries, 2)) + walk                       # (T, A, 2)
        half = rng.uniform(15, 45, (1, queries, 2))
        box = np.concatenate([centre - half, centre + half], 2)                     # (T, A, 4)
        prob = rng.beta(0.3, 3, (frames, queries, classes))                         # (T, A, C)
        prob[:, :actors, label] = rng.beta(4, 2, (frames, actors))
        conf = rng.beta(0.5, 3, (frames, queries))                                  # (T, A)
        conf[:, :actors] = rng.beta(6, 2, (frames, actors))
        for actor in range(actors):
            tubes.append({"video": video, "label": label, "frames": number,
                          "boxes": box[:, actor]})
        found = (box + rng.normal(0, 2, box.shape)).reshape(-1, 4)                  # (T * A, 4)
        parts.append({"video": np.full(frames * queries, video), "frame": number.repeat(queries),
                      "box": found.astype(np.float32), "conf": conf.ravel().astype(np.float32),
                      "class_prob": prob.reshape(-1, classes).astype(np.float32)})
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}, tubes


def frames_of(tubes):
    """Ground-truth tubes as ground truth of frames: arrays "video", "frame", "label", "box"."""
    lengths = [len(tube["frames"]) for tube in tubes]
    return {"video": np.repeat([tube["video"] for tube in tubes], lengths),
            "label": np.repeat([tube["label"] for tube in tubes], lengths),
            "frame": np.concatenate([tube["frames"] for tube in tubes]),
            "box": np.concatenate([tube["boxes"] for tube in tubes])}


def scoring(arguments):
    """The command `scoring`, see the top of the file."""
    rng, rows, cpu = np.random.default_rng(0), [], torch.device("cpu")

    def tell(what, function):
        result, seconds = timed(function, cpu)
        rows.append({"what": what, "seconds": seconds, "peak_gb": evaluate.memory_gb(cpu)})
        print(f"{what:60}{seconds:8.1f} s   peak {rows[-1]['peak_gb']:.2f} GB", flush=True)
        return result

    count = max(round(910 * arguments.share), 1)            # of 910 videos, 159,289 frames in all
    lengths = rng.integers(32, 318, count)
    lengths += (159289 * count // 910 - lengths.sum()) // count
    lengths[-1] += 159289 * count // 910 - lengths.sum()
    found, truth = made_up_set(rng, lengths, queries=15, classes=24)
    print(f"{count} videos, {lengths.sum():,} frames, {found['class_prob'].size:,} scored boxes")
    frames = frames_of(truth)
    scored = {name: found[name] for name in ("video", "frame", "box")}
    scored["scores"] = found["class_prob"] * found["conf"][:, None]                 # (n, C)
    tell("UCF101-24, strict: frame mAP", lambda: metrics.frame_map(scored, frames, 24))
    for protocol, thresholds in (("strict", (0.2, 0.5, np.arange(0.5, 1, 0.05))),
                                 ("released", (0.5,))):
        tubes = tell(f"UCF101-24, {protocol}: linking",
                     lambda: metrics.link_tubes(found, protocol))
        tell(f"UCF101-24, {protocol}: video mAP at {len(thresholds)} thresholds",
             lambda: [metrics.video_map(tubes, truth, 24, iou) for iou in thresholds])
    del found, scored, frames, tubes
    seconds = max(round(57_000 * arguments.share), 1)       # key frames, each a video of one frame
    found, truth = made_up_set(rng, np.ones(seconds, np.int64), queries=15, classes=80)
    frames = frames_of(truth)
    found["scores"] = found.pop("class_prob")
    for table in (found, frames):                           # videos of 897 key frames
        table["video"], table["frame"] = np.divmod(table["video"], 897)
    tell(f"AVA: mAP of {seconds:,} key frames x 15 x 60, cap of 50",
         lambda: evaluate.ava_frame_map(found, frames, 80))
    write(arguments, {"rows": rows})


# ---- against ------------------------------------------------------------------------------------

def run_command(tree, *command):
    """A Python command in a tree; what it prints is shown where it fails."""
    done = subprocess.run([sys.executable, *command], cwd=tree, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} in {tree} ended with {done.returncode}:\n"
                         f"{done.stdout[-2000:]}{done.stderr[-2000:]}")


def measure_tree(tree, arguments):
    """{what: seconds or megabytes} of a tree, by its own tools."""
    with tempfile.TemporaryDirectory() as folder:
        numbers, path = {}, f"{folder}/result.json"
        if "forward" in arguments.parts:
            changes = ["--set", *arguments.set] if arguments.set else []
            run_command(tree, "-m", "tools.benchmark", "forward", "--runs", "2", "--out", path,
                        *changes)
            result = json.loads(Path(path).read_text())
            numbers["ucf forward, s"] = result["seconds"]["all"]
            numbers["ucf forward, MB above the weights"] = result["peak_mb_above_weights"]
        if "step" in arguments.parts:
            run_command(tree, "-m", "torch.distributed.run", "--nproc_per_node", "2", "train.py",
                        "--out", f"{folder}/run", "--eval-share", "0.01", "--set", "epochs=1",
                        f"clips_per_epoch={PRESETS['synthetic'].batch_size * arguments.steps}")
            batch = json.loads(Path(f"{folder}/run/config.json").read_text())["batch_size"]
            lines = [json.loads(line) for line in open(f"{folder}/run/log.jsonl")]
            times = [batch / line["clips_per_s"] for line in lines[len(lines) // 4:]]
            numbers["step of the first command, s"] = statistics.median(times)
        if "scoring" in arguments.parts:
            run_command(tree, "-m", "tools.benchmark", "scoring", "--share", str(arguments.share),
                        "--out", path)
            for row in json.loads(Path(path).read_text())["rows"]:
                what, _, task = row["what"].partition(": ")
                numbers[f"scoring {what}: {' '.join(task.split()[:2])}, s"] = row["seconds"]
        return numbers


def against(arguments):
    """The command `against`, see the top of the file."""
    trees = {"other": Path(arguments.tree).resolve(), "this": ROOT}
    if not (trees["other"] / "tools/benchmark.py").is_file():
        raise SystemExit(f"{trees['other']} is no tree of this project: it has no "
                         "tools/benchmark.py; make one with git worktree add DIR COMMIT")
    numbers = {name: collections.defaultdict(list) for name in trees}
    for number in range(arguments.rounds):
        for name in list(trees)[::1 if number % 2 == 0 else -1]:    # in turns, each first once
            for what, value in measure_tree(trees[name], arguments).items():
                numbers[name][what].append(value)
            print(f"round {number + 1} of {arguments.rounds}: {name} tree measured", flush=True)
    rows = []
    print(f"{'':60}{'other':>12}{'this':>12}{'ratio':>8}")
    for what, values in numbers["this"].items():
        other, this = statistics.median(numbers["other"][what]), statistics.median(values)
        rows.append({"what": what, "other": other, "this": this, "ratio": this / other})
        print(f"{what:60}{other:12.3f}{this:12.3f}{this / other:8.2f}")
    write(arguments, {"trees": {name: str(tree) for name, tree in trees.items()}, "rows": rows})


# ---- the command line ---------------------------------------------------------------------------

def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)

    def command(run, text, out=None):
        """Adds a command -> what adds an option to it."""
        options = commands.add_parser(run.__name__, help=text)
        options.set_defaults(run=run)
        out = out or f"runs/benchmark/{run.__name__}.json"
        options.add_argument("--out", default=out, help=f"where results are written ({out})")
        return options.add_argument

    add = command(gpu, "all that is worth measuring on a GPU, in nine minutes", "runs/benchmark")
    add("--minutes", type=float, default=9, help="the parts share this time")
    add("--parts", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART",
        help="only these: " + ", ".join(PARTS))
    add("--sweep", action="store_true", help="also time the kernel with other tiles")
    add = command(forward, "a clip through a preset: seconds by stage, speed, memory")
    add("--size", nargs=2, type=int, default=[224, 224], metavar=("H", "W"))
    add("--runs", type=int, default=3)
    add("--matmul", type=int, default=4096, help="side of the square matrices to compare with")
    add("--preset", choices=PRESETS, default="ucf")
    add("--set", nargs="+", default=[], metavar="NAME=VALUE", help="change fields of its Config")
    add = command(step, "a training step: data, forward, matching, loss, backward, optimizer")
    add("--preset", choices=PRESETS, default="synthetic")
    add("--set", nargs="+", default=[], metavar="NAME=VALUE", help="change fields of its Config")
    add("--batches", nargs="+", type=int, default=[1, 2, 4], help="clips of a step")
    add("--precisions", nargs="+", default=["float32"],
        choices=["float32", "tf32", "bf16", "bf16+compile"])
    add("--runs", type=int, default=5, help="timed steps of each")
    add = command(scoring, "frame mAP, linking, video mAP, AVA's mAP: seconds and memory")
    add("--share", type=float, default=1.0, help="of the videos; 1: as many as the data sets have")
    add = command(against, "this tree beside another one: forward, step, scoring, and their ratios")
    add("tree", metavar="DIR", help="the other tree")
    add("--parts", nargs="+", choices=("forward", "step", "scoring"),
        default=["forward", "step", "scoring"])
    add("--rounds", type=int, default=2, help="times that each tree is measured")
    add("--steps", type=int, default=20, help="of the first command")
    add("--share", type=float, default=0.1, help="of the videos that are scored")
    add("--set", nargs="+", default=[], metavar="NAME=VALUE", help="change ucf's Config")
    arguments = parser.parse_args(argv)
    arguments.run(arguments)


if __name__ == "__main__":
    main()
