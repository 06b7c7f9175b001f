"""Measurements: `python -m tools.benchmark curves`, `forward`, `gate`, `kernel`, `scoring` or `step`.

curves: the loss over the first steps of training on the synthetic set in float32 and under bf16 autocast, several seeds.
On a CPU, most of which have no bf16 arithmetic, products of bf16 operands are taken in float32 and rounded to bf16.

forward: a clip through a preset, stage by stage: seconds, multiply-adds a second beside those of a 4096^3 matmul, and
the peak of memory above what the weights take.

gate: f-mAP, v-mAP, multiply-adds and time of a checkpoint on its test clips, for several confidence gates.

scoring: frame mAP, linking and video mAP of as many detections as UCF101-24's test set gives, and AVA's mAP of as many
as its validation set gives: made up, every query scored for every class. Seconds, and the peak of resident memory.

step: a training step of a preset, phase by phase, at several batch sizes and precisions, with clips/s and peak memory.
Clips are noise (drawn, for the synthetic preset) with five actors; `loss` has the matching in it, which is also told by
itself. How long a run waits for its data stands in its log.jsonl (data_share).

kernel: deform3d_triton.py against what it replaces, in one call on a GPU: forward, backward, forward+backward (medians
with the 10th and 90th percentile) and peak memory, at the sizes of the paper's data sets, against F.grid_sample (eager
and compiled), the same kernel unfused, the deterministic path and a device copy of the same bytes. Correctness is checked
first, against float64; a wrong result ends the run. Every command prints one table and writes it as JSON.
"""

# B clips, Q queries, S cells of all levels, M heads, L levels, P points of a level, D channels of a head; (t, h, w)

import argparse
import collections
import contextlib
import itertools
import json
import math
import os
import tempfile
import time
from importlib import machinery, util
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from tqdm import tqdm

import deform3d_triton
import evaluate
import metrics
import objective
import train
from data import build_dataset, collate
from deform3d_triton import deform_attn_3d, deform_attn_3d_fused, deform_attn_3d_reference, triton
from evaluate import AVA_CLASSES, VIDEO_KEY, multiply_adds
from model import PRESETS, VideoActionDetector, override

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HEADS, DIM = 8, 32
# Maps of the clip sizes that the presets train on: frames / 2, then height and width / 4, / 8, / 16, / 32. ucf is of
# 32 x 224 x 224, Q = S = 66,640; jhmdb of 40 x 256 x 256; ava of 16 x 256 x 256; eighth is an eighth of ucf, Q = S = 8,360:
# a CPU's default.
SIZES = {name: [(steps, math.ceil(side / scale), math.ceil(side / scale)) for scale in (1, 2, 4, 8)]
         for name, steps, side in (("ucf", 16, 56), ("jhmdb", 20, 64), ("ava", 8, 64), ("eighth", 8, 28))}
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}  # relative L2, levels of up to 64 cells
PHASES = ("data", "forward", "matching", "loss", "backward", "optimizer")
COLUMNS = dict(size=6, points=6, dtype=8, variant=28, forward_ms=26, backward_ms=26, both_ms=26, peak_mb=8)    # widths


def device_name():
    return torch.cuda.get_device_name() if DEVICE == "cuda" else f"CPU, {torch.get_num_threads()} threads"


def now():
    """Seconds, once what the GPU was asked for is done."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def timed(function):
    """-> a call's result and its seconds."""
    started = now()
    return function(), now() - started


def make_inputs(shapes, points, dtype):
    """Self-attention as in the encoder: every cell a query that looks around its own place, a few cells far."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    def normal(*size):
        return torch.randn(*size, generator=generator, device=DEVICE)
    grids = [torch.meshgrid(*((torch.arange(n) + 0.5) / n for n in shape), indexing="ij") for shape in shapes]
    centres = torch.cat([torch.stack(grid, -1).flatten(0, 2) for grid in grids]).to(DEVICE)  # (Q, 3)
    queries, levels = len(centres), len(shapes)
    references = centres[None, :, None].expand(1, -1, levels, -1).contiguous()  # (1, Q, L, 3)
    leaves = (normal(1, queries, HEADS, DIM).to(dtype), 2 * normal(1, queries, HEADS, levels, points, 3),
              normal(1, queries, HEADS, levels, points))
    scales = 1 / torch.tensor(shapes, dtype=torch.float32, device=DEVICE)  # (L, 3): offsets in cells
    return [leaf.requires_grad_() for leaf in leaves], references, scales


def unfuse(references, offsets, logits, scales):
    """-> locations (B, Q, M, L, P, 3) and soft-maxed weights (B, Q, M, L, P), as the published op wants them."""
    return references[:, :, None, :, None] + offsets * scales[:, None], logits.flatten(3).softmax(3).view(logits.shape)


def load_module(path):
    """A compiled extension with ms_deform_attn_forward and ms_deform_attn_backward, from its file."""
    name = "MultiScaleDeformableAttention"
    if not Path(path).is_file():
        raise FileNotFoundError(f"--module {path}: no such file; give the compiled extension, {name}.cpython-*.so")
    loader = machinery.ExtensionFileLoader(name, str(path))
    module = util.module_from_spec(util.spec_from_loader(name, loader))
    loader.exec_module(module)
    return module


def module_function(module, shapes):
    """The module's op as a function of value, locations (t, h, w) and weights; it wants locations in (w, h, t)."""
    sizes = torch.tensor(shapes, device=DEVICE)
    starts = torch.cat([sizes.new_zeros(1), sizes.prod(1).cumsum(0)[:-1]])

    class Published(torch.autograd.Function):
        @staticmethod
        def forward(ctx, value, locations, weights):
            ctx.save_for_backward(value, locations, weights)
            return module.ms_deform_attn_forward(value, sizes, starts, locations, weights, 64)

        @staticmethod
        def backward(ctx, grad):
            value, *rest = ctx.saved_tensors
            return tuple(module.ms_deform_attn_backward(value, sizes, starts, *rest, grad.contiguous(), 64))

    return lambda value, locations, weights: Published.apply(value, locations.flip(-1).to(value), weights.to(value))


def variants(shapes, references, scales, module):
    """Name -> function of (value, offsets, logits). All but the fused ones get locations and weights from PyTorch."""
    def unfused(sample):
        return lambda value, offsets, logits: sample(value, *unfuse(references, offsets, logits, scales))
    def fused(backend):
        return lambda value, *rest: deform_attn_3d_fused(value, shapes, references, *rest, scales, backend=backend)
    grid_sample = unfused(lambda value, *rest: deform_attn_3d_reference(value, shapes, *rest))
    if DEVICE == "cpu":
        return {"backend torch": fused("torch"), "grid_sample": grid_sample}
    named = {"kernel": fused("triton"), "kernel, deterministic": fused("triton"),
             "kernel, unfused": unfused(lambda value, *rest: deform_attn_3d(value, shapes, *rest, backend="triton")),
             "grid_sample": grid_sample, "grid_sample, compiled": torch.compile(grid_sample)}
    return named | ({"published module": unfused(module_function(module, shapes))} if module else {})


def check(function, leaves, references, scales, shapes, name):
    """Relative L2 errors of output and gradients against float64, for 256 queries; SystemExit where one is too large.

    The published module's errors are only reported: its backward is known to be wrong (../shared/KERNEL.md)."""
    picked = torch.linspace(0, leaves[1].shape[1] - 1, 256, device=references.device).long()
    few = leaves[0], leaves[1][:, picked], leaves[2][:, picked]
    value, offsets, logits = exact = [x.detach().double().requires_grad_() for x in few]
    expected = deform_attn_3d_reference(value, shapes, *unfuse(references[:, picked], offsets, logits, scales))
    result = function(*leaves)
    grad = torch.zeros_like(result)
    grad[:, picked] = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1)).to(grad)
    truths = (expected, *torch.autograd.grad(expected, exact, grad[:, picked].double()))
    of_value, *others = torch.autograd.grad(result, leaves, grad)
    got = (result[:, picked], of_value, *(x[:, picked] for x in others))
    errors = [float((x.detach().double() - y.detach()).norm() / y.detach().norm()) for x, y in zip(got, truths)]
    errors, limit = dict(zip(("out", "value", "offsets", "logits"), errors)), TOLERANCE[leaves[0].dtype]
    if name != "published module" and not all(error < limit for error in errors.values()):
        raise SystemExit(f"{name} is wrong at {shapes}, {leaves[0].dtype}: relative errors {errors} pass {limit}")
    return errors


def measure(function, runs):
    """-> [10th percentile, median, 90th percentile] of the milliseconds of a call, after two calls to warm up."""
    times = []
    for _ in range(runs + 2):
        if DEVICE == "cuda":
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            torch.cuda.synchronize()
            start.record()
            function()
            end.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(end))
        else:
            times.append(timed(function)[1] * 1000)
    times = sorted(times[2:])
    return [times[len(times) // 10], float(np.median(times)), times[-1 - len(times) // 10]]


def peak_memory(function):
    """Megabytes that a call needs at most above what is there before it."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    if not Path("/proc/self/clear_refs").exists():  # Linux has it
        return math.nan
    Path("/proc/self/clear_refs").write_text("5")  # starts the process's peak afresh
    def resident(field):
        return int(Path("/proc/self/status").read_text().split(field)[1].split()[0]) / 1e3
    before = resident("VmRSS:")
    function()
    return resident("VmHWM:") - before


def time_variant(function, leaves, runs):
    """-> forward_ms, backward_ms, both_ms (each a triple) and peak_mb of forward and backward together."""
    result = function(*leaves)
    grad = torch.randn_like(result)
    def both():
        torch.autograd.grad(function(*leaves), leaves, grad)
    row = {"forward_ms": measure(torch.no_grad()(lambda: function(*leaves)), runs),
           "backward_ms": measure(lambda: torch.autograd.grad(result, leaves, grad, retain_graph=True), runs)}
    del result
    return row | {"both_ms": measure(both, runs), "peak_mb": peak_memory(both)}


def time_copy(leaves, references, runs):
    """A copy of the bytes that the fused forward must read and write at least: nothing that moves them is faster."""
    count = sum(x.numel() * x.element_size() for x in (*leaves, references, leaves[0]))  # once more: the output
    source = torch.empty(count // 2, dtype=torch.uint8, device=DEVICE)  # a copy reads and writes each byte
    target = torch.empty_like(source)
    return {"variant": "copy of the forward's bytes", "forward_ms": measure(lambda: target.copy_(source), runs)}


def sweep(function, leaves, references, scales, shapes, runs):
    """Times of the kernel for other tiles: rows of (queries of a program, warps)."""
    original = deform3d_triton._tile
    for tile in ((2, 1), (4, 1), (8, 1), (16, 1), (8, 2), (16, 2), (16, 4), (32, 4)):
        deform3d_triton._tile = lambda value, element_size: tile
        check(function, leaves, references, scales, shapes, f"tile {tile}")
        yield {"variant": f"kernel, {tile[0]} queries, {tile[1]} warps"} | time_variant(function, leaves, runs)
    deform3d_triton._tile = original


def show(row):
    """One line of the table: medians with the 10th and 90th percentile in brackets."""
    def cell(value):
        if isinstance(value, list):
            return f"{value[1]:.3f} [{value[0]:.3f}, {value[2]:.3f}]"
        return "-" if value is None else f"{value:.0f}" if isinstance(value, float) else str(value)
    print(*(cell(row.get(name)).ljust(width) for name, width in COLUMNS.items()), row.get("note", ""), sep="  ", flush=True)


def kernel_rows(shapes, points, dtype, module, arguments):
    """Times, memory and errors of every variant at one size, of a copy and, with --sweep, of the kernel's other tiles."""
    leaves, references, scales = make_inputs(shapes, points, getattr(torch, dtype))
    functions = variants(shapes, references, scales, module)
    for variant, function in functions.items():
        torch.use_deterministic_algorithms("deterministic" in variant)
        row = {"variant": variant}
        try:
            row["errors"] = check(function, leaves, references, scales, shapes, variant)
            row |= time_variant(function, leaves, arguments.runs)
        except Exception as error:  # torch.compile needs a C compiler, which is not everywhere: the rest is still told
            if "compiled" not in variant:
                raise
            row["note"] = f"failed: {str(error).splitlines()[0]}"
        if "deterministic" in variant:
            first, second = (torch.autograd.grad(function(*leaves).sum(), leaves) for _ in range(2))
            row["note"] = "repeats itself" if all(map(torch.equal, first, second)) else "DIFFERS FROM RUN TO RUN"
        torch.use_deterministic_algorithms(False)
        yield row
    yield time_copy(leaves, references, arguments.runs)
    if arguments.sweep and DEVICE == "cuda":
        yield from sweep(functions["kernel"], leaves, references, scales, shapes, arguments.runs)


def kernel(arguments):
    """The command `kernel`: see the top of the file."""
    about = {"device": device_name(), "torch": torch.__version__, "triton": getattr(triton, "__version__", None)}
    print(json.dumps(about), "milliseconds: median [10th, 90th percentile]; peak of forward + backward in MB", sep="\n")
    show({column: column for column in COLUMNS})
    module, rows = load_module(arguments.module) if arguments.module else None, []
    sizes = arguments.sizes or (["ucf", "jhmdb", "ava"] if DEVICE == "cuda" else ["eighth"])
    dtypes = arguments.dtypes or (["float32", "bfloat16"] if DEVICE == "cuda" else ["float32"])
    for size, points, dtype in ((s, p, d) for s in sizes for p in arguments.points for d in dtypes):
        for row in kernel_rows(SIZES[size], points, dtype, module, arguments):
            rows.append({"size": size, "points": points, "dtype": dtype} | row)
            show(rows[-1])
        Path(arguments.out).write_text(json.dumps(about | {"rows": rows}, indent=1))  # so a call cut short leaves some
    print(f"written: {arguments.out}")


def made_up_set(rng, lengths, queries, classes):
    """Detections as metrics.link_tubes takes them, and ground-truth tubes: the actors' boxes, off by two pixels.

    Boxes wander. The first one or two queries of a video are actors of one class, with the better scores."""
    tubes, parts = [], []
    for video, frames in enumerate(tqdm(lengths.tolist(), "making up", leave=False)):
        actors, label, number = int(rng.integers(1, 3)), int(rng.integers(classes)), np.arange(1, frames + 1)
        middle = rng.uniform(60, 180, (1, queries, 2)) + rng.normal(0, 2, (frames, queries, 2)).cumsum(0)
        half = rng.uniform(15, 45, (1, queries, 2))
        prob = rng.beta(0.3, 3, (frames, queries, classes))                                       # (T, A, C)
        prob[:, :actors, label] = rng.beta(4, 2, (frames, actors))
        conf = rng.beta(0.5, 3, (frames, queries))
        conf[:, :actors] = rng.beta(6, 2, (frames, actors))
        box = np.concatenate([middle - half, middle + half], 2)                                   # (T, A, 4), pixels
        tubes += [{"video": video, "label": label, "frames": number, "boxes": box[:, one]} for one in range(actors)]
        part = (np.full(frames * queries, video), number.repeat(queries), (box + rng.normal(0, 2, box.shape)).reshape(-1, 4),
                prob.reshape(-1, classes), conf.ravel())  # a row a query: (T * A, ...)
        parts.append([x if x.dtype == np.int64 else x.astype(np.float32) for x in part])
    return dict(zip(("video", "frame", "box", "class_prob", "conf"), map(np.concatenate, zip(*parts)))), tubes


def scoring(arguments):
    """The command `scoring`: see the top of the file."""
    rng, rows = np.random.default_rng(0), []
    def tell(name, function):
        (result, seconds), peak = timed(function), evaluate.memory_gb(torch.device("cpu"))
        rows.append({"what": name, "seconds": seconds, "peak_gb": peak})
        print(f"{name:60}{seconds:8.1f} s   peak {peak:.2f} GB", flush=True)
        return result
    count = max(round(910 * arguments.share), 1)
    lengths = rng.integers(32, 318, count)                          # of 910 videos: 159,289 frames in all
    lengths += (159289 * count // 910 - lengths.sum()) // count
    lengths[-1] += 159289 * count // 910 - lengths.sum()
    found, truth = made_up_set(rng, lengths, queries=15, classes=24)
    print(f"{count} videos, {lengths.sum():,} frames, {found['class_prob'].size:,} scored boxes")
    frames = {"frame": np.concatenate([tube["video"] * VIDEO_KEY + tube["frames"] for tube in truth]),
              "label": np.concatenate([np.full(len(tube["frames"]), tube["label"]) for tube in truth]),
              "box": np.concatenate([tube["boxes"] for tube in truth])}
    scored = {"frame": found["video"] * VIDEO_KEY + found["frame"], "box": found["box"],
              "scores": found["class_prob"] * found["conf"][:, None]}                               # (n, C)
    tell("UCF101-24, strict: frame mAP", lambda: metrics.frame_map(scored, frames, 24))
    tubes = tell("UCF101-24, strict: linking", lambda: metrics.link_tubes(found))
    tell("UCF101-24, strict: video mAP at 0.2, 0.5, 0.5:0.95", lambda: [
        metrics.video_map(tubes, truth, 24, iou) for iou in (0.2, 0.5, np.arange(0.5, 1, 0.05))])
    tubes = tell("UCF101-24, released: linking", lambda: metrics.link_tubes(found, "released"))
    tell("UCF101-24, released: video mAP at 0.5", lambda: metrics.video_map(tubes, truth, 24))
    del found, scored, frames, tubes
    seconds = max(round(57_000 * arguments.share), 1)               # key frames, each a video of one frame
    found, truth = made_up_set(rng, np.ones(seconds, np.int64), queries=15, classes=80)
    table = {"video": found["video"] // 897, "timestamp": 902 + found["video"] % 897, "box": found["box"],
             "scores": found["class_prob"]}
    own, labels = (np.array([tube[name] for tube in truth]) for name in ("video", "label"))
    truth = {"video": own // 897, "timestamp": 902 + own % 897, "label": labels + 1,
             "box": np.concatenate([tube["boxes"] for tube in truth])}
    tell(f"AVA: mAP of {seconds:,} key frames x 15 x 60, cap of 50", lambda: metrics.ava_map(table, truth, AVA_CLASSES))
    Path(arguments.out).write_text(json.dumps({"cores": os.cpu_count(), "rows": rows}, indent=1))
    print(f"written: {arguments.out}")


def time_stages(model, clip):
    """Seconds of one forward pass: {"all", "backbone", "encoder", "localizing", "classifying"}."""
    seconds, hooks = collections.Counter(), []
    stages = {"backbone": [model.backbone, model.neck], "encoder": [model.encoder],
              "localizing": model.decoder.localizing, "classifying": model.decoder.classifying}
    for name, modules in stages.items():
        for module in modules:
            hooks.append(module.register_forward_pre_hook(lambda *_, name=name: seconds.update({name: -now()})))
            hooks.append(module.register_forward_hook(lambda *_, name=name: seconds.update({name: now()})))
    seconds["all"] = timed(lambda: model(clip))[1]
    for hook in hooks:
        hook.remove()
    return seconds


def forward(arguments):
    """The command `forward`: see the top of the file."""
    config, side = override(PRESETS[arguments.preset], arguments.set), arguments.matmul
    model = VideoActionDetector(config).to(DEVICE).eval().requires_grad_(False)
    clip = torch.randn(1, 3, config.frames, *arguments.size, device=DEVICE)
    left, right = torch.randn(2, side, side, device=DEVICE)
    matmul = side ** 3 / measure(lambda: left @ right, 5)[1] * 1000
    del left, right
    with torch.inference_mode():
        model(clip)
        rows = [time_stages(model, clip) for _ in range(arguments.runs)]
        peak = peak_memory(lambda: model(clip))
    count = multiply_adds(lambda: model(clip))
    median = {name: float(np.median([row[name] for row in rows])) for name in rows[0]}
    result = {"preset": arguments.preset, "clip": list(clip.shape[2:]), "threads": torch.get_num_threads(),
              "seconds": median, "multiply_adds": count, "share_of_matmul": count / median["all"] / matmul,
              "matmul_multiply_adds_per_s": matmul, "peak_mb_above_weights": peak}
    print(json.dumps(result, indent=1))
    Path(arguments.out).write_text(json.dumps(result, indent=1))


def gate(arguments):
    """The command `gate`: see the top of the file."""
    device, rows = torch.device(DEVICE), []
    for value in arguments.gates:
        model, config, checkpoint = evaluate.load_model(arguments.ckpt, [f"gate={value}"], device)
        model.requires_grad_(False)     # or the counter looks for their graph
        dataset = build_dataset(checkpoint["dataset"], arguments.data, "val", config)
        def detect():
            return evaluate.detect(model, dataset, config, device)
        count, (found, seconds) = multiply_adds(detect), timed(detect)
        results = evaluate.score(found, dataset, config)
        rows.append({"gate": value, "actors_classified": float((found["class_prob"] > 0).any(1).mean()), "seconds": seconds,
                     **{name: ap for name, ap in results.items() if "mAP@" in name}, "giga_multiply_adds": count / 1e9})
        if value == arguments.gates[0]:
            print(*(name.rjust(18) for name in rows[0]))
        print(*(f"{x:.4f}".rjust(18) for x in rows[-1].values()), flush=True)
    Path(arguments.out).write_text(json.dumps({"ckpt": arguments.ckpt, "rows": rows}, indent=1))


def made_up_batch(config, batch, start):
    """A batch as train.prepare wants it: the synthetic preset's own clips, or noise with up to five actors a frame."""
    if config.num_classes == 9:
        dataset = build_dataset("synthetic", None, "train", config)
        return collate([dataset[index] for index in range(start, start + batch)])
    frames, actors, size = 1 if config.key_frame else config.frames, min(config.num_queries, 5), config.crop_size
    boxes = torch.cat([torch.rand(actors, 1, 2) * 0.6 + 0.2, torch.full((actors, 1, 2), 0.3)], 2).expand(-1, frames, -1)
    labels = F.one_hot(torch.randint(config.num_classes, (actors, 1)), config.num_classes).float().expand(-1, frames, -1)
    target = {"boxes": boxes, "labels": labels, "present": torch.ones(actors, frames, dtype=torch.bool),
              "frames": torch.ones(frames, dtype=torch.bool), "frame_ids": torch.arange(frames), "video": "noise"}
    clips = torch.randn(batch, 3, config.frames, size, size)
    return clips, torch.zeros(batch, size, size, dtype=torch.bool), [target] * batch


def time_step(config, batch, precision, compiled, runs, device):
    """-> {phase: median milliseconds}, "clips_per_s" and "peak_gb" of training steps after two to warm up."""
    torch.manual_seed(0)
    model = VideoActionDetector(config).to(device).train()
    if compiled:
        model.backbone.compile()
        model.decoder.compile()
    optimizer, times = train.make_optimizer(model, config), {name: [] for name in PHASES}
    def phase(name, function):
        result, seconds = timed(function)
        times[name].append(seconds * 1000)
        return result
    def forward(clips, mask, frames):
        with torch.autocast(device, getattr(torch, precision), enabled=precision != "float32"):
            return model(clips, mask, frames=frames)
    def update():
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for run in range(runs + 2):
        made = phase("data", lambda: made_up_batch(config, batch, run * batch))
        clips, mask, targets, frames = train.prepare(made, config)
        clips = clips.to(device)
        outputs = phase("forward", lambda: forward(clips, mask, frames))
        phase("matching", lambda: objective.match(outputs, targets, config))
        loss, _ = phase("loss", lambda: objective.detection_loss(outputs, targets, config))
        phase("backward", loss.backward)
        phase("optimizer", update)
    row = {name: float(np.median(values[2:])) for name, values in times.items()}
    whole = sum(row[name] for name in ("forward", "loss", "backward", "optimizer"))
    return row | {"clips_per_s": 1000 * batch / whole, "peak_gb": evaluate.memory_gb(torch.device(device))}


class Bf16Products(TorchDispatchMode):
    """Matrix products and convolutions of bf16 tensors in float32, their results rounded: what hardware with bf16 does."""

    products = {getattr(torch.ops.aten, name).default for name in (
        "mm", "bmm", "addmm", "baddbmm", "linear", "convolution", "convolution_backward")}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        tensors = [x for x in args if isinstance(x, torch.Tensor)]
        if function not in self.products or not any(x.dtype == torch.bfloat16 for x in tensors):
            return function(*args, **(kwargs or {}))
        args, kwargs = tree_map_only(torch.Tensor, lambda x: x.float() if x.is_floating_point() else x, (args, kwargs or {}))
        return tree_map_only(torch.Tensor, lambda x: x.bfloat16() if x.is_floating_point() else x, function(*args, **kwargs))


def curves(arguments):
    """The command `curves`: see the top of the file."""
    rows, report = [], train.report

    def stop(run, line):
        report(run, line)
        if line["step"] == arguments.steps:
            raise KeyboardInterrupt

    for seed, precision in itertools.product(arguments.seeds, ("float32", "bf16")):
        with tempfile.TemporaryDirectory() as folder, mock.patch.object(train, "report", stop), \
                Bf16Products() if DEVICE == "cpu" and precision == "bf16" else contextlib.nullcontext():
            with contextlib.suppress(KeyboardInterrupt):
                train.main(["--precision", precision, "--seed", str(seed), "--out", f"{folder}/run",
                            *(["--set", *arguments.set] if arguments.set else [])])
            losses = [json.loads(line)["loss"] for line in open(f"{folder}/run/log.jsonl")]
        means = [float(np.mean(part)) for part in np.array_split(losses, 3)]
        rows.append({"seed": seed, "precision": precision, "thirds": means, "losses": losses})
        print(f"seed {seed} {precision:8} mean loss by thirds:", *(f"{value:.2f}" for value in means), flush=True)
    Path(arguments.out).write_text(json.dumps(rows))


def step(arguments):
    """The command `step`: see the top of the file."""
    config, name, rows = override(PRESETS[arguments.preset], arguments.set), device_name(), []
    print(f"{arguments.preset} on {name}, torch {torch.__version__}; milliseconds, medians of {arguments.runs} steps")
    print(*(column.rjust(11) for column in ("batch", "precision", *PHASES, "clips_per_s", "peak_gb")), flush=True)
    plans = [(batch, precision) for precision in arguments.precisions for batch in arguments.batches]
    while plans:
        batch, precision = plans.pop(0)
        dtype, _, compiled = precision.partition("+")
        rows.append({"batch": batch, "precision": precision}
                    | time_step(config, batch, dtype, bool(compiled), arguments.runs, DEVICE))
        print(*((f"{x:.1f}" if isinstance(x, float) else str(x)).rjust(11) for x in rows[-1].values()), flush=True)
        if arguments.largest and not plans and rows[-1]["peak_gb"] < arguments.largest:
            plans = [(batch + 1, precision)]    # larger and larger, until it no longer fits
    Path(arguments.out).write_text(json.dumps({"device": name, "torch": torch.__version__, "rows": rows}, indent=1))
    print(f"written: {arguments.out}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    def command(run, text, preset=None):
        """Adds a command -> what adds an option to it. preset: the default of those that take a Config."""
        options = commands.add_parser(run.__name__, help=text)
        options.add_argument("--out", default=f"benchmark_{run.__name__}.json", help="where the result goes as JSON")
        options.set_defaults(run=run)
        if preset:
            options.add_argument("--preset", choices=PRESETS, default=preset)
            options.add_argument("--set", nargs="+", default=[], metavar="NAME=VALUE", help="change fields of its Config")
        return options.add_argument
    add = command(kernel, "deformable sampling: times, memory, errors of all ways to compute it")
    add("--sizes", nargs="+", choices=SIZES, help="default: ucf jhmdb ava on a GPU, eighth on a CPU")
    add("--points", nargs="+", type=int, default=[4, 8], help="P, sampling points per head and level")
    add("--dtypes", nargs="+", choices=["float32", "bfloat16", "float16"], help="of value (float32, on a GPU bfloat16 too)")
    add("--runs", type=int, default=20, help="timed calls of each")
    add("--module", help="path of a compiled MultiScaleDeformableAttention extension to compare with")
    add("--sweep", action="store_true", help="also time the kernel with other tiles (GPU)")
    add = command(curves, "loss in float32 and under bf16 autocast over the first steps of training")
    add("--seeds", nargs="+", type=int, default=[0, 1, 2])
    add("--steps", type=int, default=300)
    add("--set", nargs="+", default=[], metavar="NAME=VALUE", help="change the synthetic preset's Config")
    add = command(forward, "a clip through a preset: seconds by stage, speed, memory", preset="ucf")
    add("--size", nargs=2, type=int, default=[224, 224], metavar=("H", "W"))
    add("--runs", type=int, default=3)
    add("--matmul", type=int, default=4096, help="side of the square matrices to compare with")
    add = command(gate, "the confidence gate: mAP, multiply-adds and time of a checkpoint")
    add("--ckpt", required=True)
    add("--data", help="the data set's folder (synthetic has none)")
    add("--split", default="val", help="the data set's test split")
    add("--gates", nargs="+", type=float, default=[0, 0.001, 0.01, 0.05, 0.1])
    add = command(scoring, "frame mAP, linking, video mAP, AVA's mAP: seconds and memory")
    add("--share", type=float, default=1.0, help="of the videos; 1: as many as the data sets have")
    add = command(step, "a training step: data, forward, matching, loss, backward, optimizer", preset="synthetic")
    add("--batches", nargs="+", type=int, default=[1, 2, 4], help="clips of a step")
    add("--precisions", nargs="+", default=["float32"], choices=["float32", "bfloat16", "bfloat16+compile"])
    add("--largest", type=float, metavar="GB", help="go on with larger batches up to this memory")
    add("--runs", type=int, default=5, help="timed steps of each")
    arguments = parser.parse_args()
    arguments.run(arguments)


if __name__ == "__main__":
    main()
