"""A checkpoint's numbers: frame mAP and video mAP, per class and class group.

Sec. 5.3 and 5.4: Tables 5 to 7, Fig. 1.

    python evaluate.py                                        # the synthetic model that comes along
    python evaluate.py --ckpt runs/NAME [--dataset D --data DIR --split 1] [--protocol released]
    torchrun --nproc_per_node 8 evaluate.py --ckpt runs/NAME  # the same numbers, sooner
    python evaluate.py --ckpt runs/A runs/B runs/C --split 1 2 3           # JHMDB: their mean
    python evaluate.py --detections runs/NAME/evaluation/detections.npz    # scored again
    python evaluate.py --efficiency                                        # Table 6

`detect` runs the model over a data set and returns plain arrays, a row for each actor query and
frame; `link` makes tubes of them; `score` compares both with the data set's ground truth as
metrics.py says. Nothing else in the project turns outputs into numbers.

Detections are a dict of arrays of n rows, sorted by video, frame and query:
    video (n,) index into dataset.videos; frame (n,) number in the video; box (n, 4) x1, y1, x2, y2
    in the annotation's pixels; class_prob (n, C); conf (n,): the score of a class is
    class_prob * conf, equal to model.scores (conf is 1 where the class alone counts: AVA);
and of the run: videos (v,) the video indices that were evaluated, video_names, classes, dataset,
config (JSON), so that the file detections.npz says by itself what it is of.
"""
# B clips, T frames, A actor queries, C classes, N actors of the annotation, n detections

import argparse
import csv
import json
import os
import signal
import sys
import time
import zipfile
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import metrics
from data import build_dataset, collate
from model import PRESETS, VideoActionDetector, config_from_dict, load_checkpoint, override
from objective import cxcywh_to_xyxy, match

try:
    import resource
except ImportError:             # on Windows
    resource = None

DATASETS = ("synthetic", "ucf", "jhmdb", "ava", "custom")
WEIGHTS = Path(__file__).resolve().parent / "weights"       # what the repository comes with
PRECISIONS = ("float32", "tf32", "bf16", "fp16")
ROWS = ("video", "frame", "box", "class_prob", "conf")
TUBE_THRESHOLDS = {"v-mAP@0.2": 0.2, "v-mAP@0.5": 0.5,
                   "v-mAP@0.5:0.95": tuple(np.arange(10) * 0.05 + 0.5)}
AVA_LEFT_OUT = (2, 16, 18, 19, 21, 23, 25, 31, 32, 33, 35, 39, 40, 42, 44, 50, 53, 55, 71, 75)
AVA_CLASSES = [i for i in range(1, 81) if i not in AVA_LEFT_OUT]        # the 60 that are evaluated
AVA_CAP = 50                    # (box, class) rows of a key frame that count
RELEASED_RULES = {              # what makes its v-mAP another number
    "released_ucf": "only boxes whose confidence is at least 0.7 are linked, each for its best "
                    "class alone, tubes are trimmed, and a class without ground truth counts as 0",
    "released_jhmdb": "tubes are compared in space but not in time, after trimming, and a class "
                      "without ground truth counts as 0"}
PAPER_EFFICIENCY = {            # Table 6: parameters, "FLOPs" (ours agree as multiply-adds), ms
    "jhmdb": ("117.8M", "3.26T", "432.0"), "ucf": ("117.8M", "3.73T", "370.0")}


# ---- how it computes ----------------------------------------------------------------------------

def set_precision(name, device):
    """Sets how matrix products and convolutions are computed -> dtype of autocast, None without.

    float32: strictly; tf32: float32 with products of 10 bits on a GPU; bf16, fp16: autocast, and
    tf32 for what stays float32. Use as torch.autocast(device.type, dtype, enabled=dtype is not
    None). ValueError for an unknown name, and for tf32 on a CPU.
    """
    if name not in PRECISIONS:
        raise ValueError(f"precision {name!r}; there are: {', '.join(PRECISIONS)}")
    if name == "tf32" and torch.device(device).type != "cuda":
        raise ValueError(f"precision tf32: only GPUs compute in it, not {device}; take float32")
    torch.backends.cuda.matmul.allow_tf32 = name != "float32"
    torch.backends.cudnn.allow_tf32 = name != "float32"
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(name)


def default_precision(device, training):
    """float32 on a CPU; on a GPU tf32, and for training bf16 where the GPU computes in it."""
    if torch.device(device).type != "cuda":
        return "float32"
    if training and torch.cuda.is_bf16_supported(including_emulation=False):
        return "bf16"
    return "tf32"


def default_workers(device):
    """Loading processes of a rank: none on a CPU, whose cores are the model's, up to 8 on a GPU."""
    if torch.device(device).type != "cuda":
        return 0
    # Windows and macOS do not tell which cores are this process's
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(8, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def memory_gb(device):
    """The most memory used so far: the GPU's, or what was resident; 0 on Windows."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2 ** 30
    if resource is None:
        return 0.0
    unit = 2 ** 30 if sys.platform == "darwin" else 2 ** 20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def reset_memory(device):
    """Starts `memory_gb` afresh, on GPUs and on Linux."""
    peak = Path("/proc/self/clear_refs")
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif peak.exists():
        peak.write_text("5")


def this_rank():
    """-> rank and number of processes."""
    if dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def bar(items, label, **options):
    """tqdm, seldom where it is written to a file."""
    interval = 0.1 if sys.stderr.isatty() else 30
    return tqdm(items, label, leave=False, mininterval=interval, **options)


# ---- from clips to detections -------------------------------------------------------------------

def detect(model, dataset, config, device, share=1.0, workers=0, progress=True, batch_size=None,
           oracle=None, precision=None):
    """The model's boxes and scores on all frames of a data set's clips, or on their key frames.

    share: evaluate this share of the videos, evenly spread over dataset.videos. batch_size: clips
    at once, by default config.micro_batch. oracle: "boxes" or "labels" gives queries matched with
    an actor (objective.match) its true box or labels. precision: dtype of autocast, None without.
    Under torch.distributed the ranks share the batches, whose clips do not depend on the number of
    ranks; every rank returns the same arrays, those that one process alone would return. Raises
    ValueError on outputs that are not finite.
    """
    device = torch.device(device)
    rank, world = this_rank()
    count = max(1, round(share * len(dataset.videos)))
    videos = np.arange(count) * len(dataset.videos) // count
    clips = np.flatnonzero(np.isin(clip_videos(dataset), videos))
    size = batch_size or config.micro_batch
    batches = [clips[i:i + size].tolist() for i in range(0, len(clips), size)]
    loader = DataLoader(dataset, batch_sampler=batches[rank::world], collate_fn=collate,
                        num_workers=workers, pin_memory=device.type == "cuda")
    was_training = model.training
    model.eval()
    parts = []
    with torch.inference_mode(), torch.autocast(device.type, precision, precision is not None):
        for images, padding_mask, targets in bar(loader, "detecting",
                                                 disable=not progress or rank > 0):
            images = images.to(device, non_blocking=True)
            mask = padding_mask.to(device, non_blocking=True) if padding_mask.any() else None
            parts.append(rows(model(images, mask), targets, config, oracle))
    model.train(was_training)
    if world > 1:
        gathered = [None] * world
        dist.all_gather_object(gathered, parts)
        parts = [part for parts_of_rank in gathered for part in parts_of_rank]
    found = {name: np.concatenate([part[name] for part in parts]) for name in ROWS}
    order = np.lexsort((found["frame"], found["video"]))    # stable: queries stay in their order
    found = {name: values[order] for name, values in found.items()}
    about = {"videos": videos, "video_names": dataset.videos, "classes": dataset.class_names,
             "dataset": dataset.name, "config": json.dumps(asdict(config))}
    if hasattr(dataset, "table"):       # (V, 2): what the boxes count the pixels of
        about["sizes"] = dataset.table.size
    return found | {name: np.array(value) for name, value in about.items()}


def clip_videos(dataset):
    """(clips,) the index in dataset.videos of each clip's video, known without loading a clip.

    A data set without the array `clip_videos` has one clip a video, in their order.
    """
    if not hasattr(dataset, "clip_videos") and len(dataset) != len(dataset.videos):
        raise ValueError(f"{dataset.name}: {len(dataset)} clips of {len(dataset.videos)} videos; "
                         "set clip_videos")
    return np.asarray(getattr(dataset, "clip_videos", range(len(dataset))))


def rows(out, targets, config, oracle=None):
    """Detections of one batch as arrays, temporal padding left out: all queries of a frame, in
    their order. The outputs stay on their device until they are copied, all at once."""
    boxes = out["pred_boxes"].float()                                   # (B, T, A, 4)
    prob = out["pred_logits"].float().sigmoid()                         # (B, T, A, C)
    conf = out["pred_conf"].float().sigmoid()                           # (B, T, A)
    if not config.score_with_confidence:
        conf = torch.ones_like(conf)
    found = torch.cat([cxcywh_to_xyxy(boxes), conf[..., None], prob], -1)   # (B, T, A, 5 + C)
    found = found.cpu().numpy()
    if oracle:
        give_truth(oracle, found, out, targets, config)
    keep = torch.stack([target["frames"] for target in targets]).bool().numpy()     # (B, T)
    if keep.shape != found.shape[:2]:
        raise ValueError(f"the model gives {found.shape[:2]} clips and frames, the targets have "
                         f"{keep.shape}: is the data set built with another Config than the model?")
    size = torch.stack([torch.as_tensor(target["size"]) for target in targets]).numpy()
    frame = torch.stack([target["frame_ids"] for target in targets]).numpy()        # (B, T)
    video = np.array([target["video_index"] for target in targets])
    clip, _ = np.nonzero(keep)                          # (k,), of each frame that is kept
    scale = size[clip][:, None, [1, 0, 1, 0]].astype(np.float32)        # (k, 1, 4)
    found = found[keep]                                                 # (k, A, 5 + C)
    if not np.isfinite(found).all():
        names = ", ".join(sorted({target["video"] for target in targets}))
        raise ValueError(f"the model's outputs on {names} are not finite; its weights or these "
                         "clips hold NaN or inf")
    queries = found.shape[1]
    return {"video": video[clip].repeat(queries),                       # (k * A,)
            "frame": frame[keep].repeat(queries),
            "box": (found[..., :4] * scale).reshape(-1, 4),             # (k * A, 4)
            "class_prob": found[..., 5:].reshape(-1, prob.shape[-1]),   # (k * A, C)
            "conf": found[..., 4].reshape(-1)}                          # (k * A,)


def give_truth(oracle, found, out, targets, config):
    """Fig. 1 and Table 7: the true labels or boxes in place of those of the queries matched with an
    actor, in found (B, T, A, 5 + C): x1, y1, x2, y2, confidence, classes."""
    clip, frame, query, actor = (index.cpu().numpy() for index in match(out, targets, config))
    for b, target in enumerate(targets):
        t, a, n = frame[clip == b], query[clip == b], actor[clip == b]
        if oracle == "boxes":
            found[b, t, a, :4] = cxcywh_to_xyxy(target["boxes"]).numpy()[n, t]
        else:
            found[b, t, a, 5:] = target["labels"].numpy()[n, t]


# ---- from detections to numbers -----------------------------------------------------------------

def shortest_tube(config):
    """Frames below which a tube is dropped: 15, half a clip where clips are shorter than 30."""
    return 15 if config.frames >= 30 else config.frames // 2


def link(detections, config, protocol="strict"):
    """The tubes of all detections, see metrics.link_tubes; none of key frames.

    Under torch.distributed all ranks call it, each links its share of the videos, and rank 0 gets
    the tubes of all as one process would have them, the others None.
    """
    if config.key_frame:
        return []
    rank, world = this_rank()
    boxes = {name: detections[name] for name in ROWS}
    if world > 1:
        own = np.isin(boxes["video"], detections["videos"][rank::world])
        boxes = {name: values[own] for name, values in boxes.items()}
    tubes = metrics.link_tubes(boxes, protocol, config.link_score, min_length=shortest_tube(config))
    if world == 1:
        return tubes
    gathered = [None] * world if rank == 0 else None
    dist.gather_object(tubes, gathered)
    if rank > 0:
        return None
    tubes = [tube for tubes_of_rank in gathered for tube in tubes_of_rank]
    return sorted(tubes, key=lambda tube: tube["video"])


def score(detections, dataset, config, protocol="strict", tubes=None):
    """Detections against the data set's ground truth, restricted to the evaluated videos.

    tubes: those of `link`; by default this process links them all by itself.

    Returns {"f-mAP@0.5", "v-mAP@0.2", "v-mAP@0.5", "v-mAP@0.5:0.95"} as floats (key-frame data
    sets have no tubes), "per_class" {class: {"boxes", "tubes" and the same APs}}, "per_group"
    {group: the same, means of its classes' AP}, "protocol", "videos". A class without ground truth
    has AP NaN and is left out of means.
    """
    names, videos = list(dataset.class_names), detections["videos"]
    truth, true_tubes = dataset.ground_truth()
    inside = np.isin(truth["video"], videos)
    truth = {name: values[inside] for name, values in truth.items()}
    found = {"video": detections["video"], "frame": detections["frame"], "box": detections["box"],
             "scores": detections["class_prob"] * detections["conf"][:, None]}          # (n, C)
    if dataset.name == "ava":
        maps = {"f-mAP@0.5": ava_frame_map(found, truth, len(names), protocol)}
    else:
        maps = {"f-mAP@0.5": metrics.frame_map(found, truth, len(names))}
    evaluated = set(videos.tolist())
    true_tubes = [tube for tube in true_tubes if tube["video"] in evaluated]
    if not config.key_frame:
        if tubes is None:
            tubes = metrics.link_tubes({name: detections[name] for name in ROWS}, protocol,
                                       config.link_score, min_length=shortest_tube(config))
        for name, threshold in TUBE_THRESHOLDS.items():
            maps[name] = metrics.video_map(tubes, true_tubes, len(names), threshold, protocol)
    boxes = np.bincount(truth["label"], minlength=len(names))
    tube_labels = np.array([tube["label"] for tube in true_tubes], np.int64)
    tubes_of_class = np.bincount(tube_labels, minlength=len(names))
    per_class, per_group = {}, {}
    for index, name in enumerate(names):
        per_class[name] = {"boxes": int(boxes[index]), "tubes": int(tubes_of_class[index])}
        per_class[name] |= {metric: float(value["AP"][index]) for metric, value in maps.items()}
    for group, members in dataset.class_groups.items():
        per_group[group] = {metric: metrics.nanmean(value["AP"][list(members)])
                            for metric, value in maps.items()}
    results = {metric: float(value["mAP"]) for metric, value in maps.items()}
    return results | {"protocol": protocol, "videos": len(videos), "per_class": per_class,
                      "per_group": per_group}


def ava_frame_map(detections, ground_truth, num_classes, protocol="strict"):
    """metrics.ava_map with the arguments and the result of metrics.frame_map; class k is action id
    k + 1, a frame's number its second. `strict` is the official script, which counts the AVA_CAP
    best rows of a key frame; the authors' counts all."""
    found, truth = dict(detections), dict(ground_truth)
    found["timestamp"], truth["timestamp"] = found.pop("frame"), truth.pop("frame")
    truth["label"] = truth["label"] + 1
    cap = None if protocol == "released" else AVA_CAP
    result = metrics.ava_map(found, truth, AVA_CLASSES, cap=cap)
    average_precision = [result["AP"].get(action, np.nan) for action in range(1, num_classes + 1)]
    return {"mAP": result["mAP"], "AP": np.array(average_precision)}


# ---- what is printed and written ----------------------------------------------------------------

def table(results):
    """The results as text: all classes that have ground truth, then each class group."""
    metric = next(name for name in results if "-mAP@" in name)
    classes = results["per_class"]
    known = sum(not np.isnan(values[metric]) for values in classes.values())
    label = f"all {known} classes"
    if known < len(classes):
        label = f"{known} of {len(classes)} classes"
    return lines({label: results} | results["per_group"])


def lines(results):
    """{label: {metric: value}} as text; the metrics of the first are the columns."""
    columns = [name for name in next(iter(results.values())) if "-mAP@" in name]
    width = max(len(label) for label in results) + 2
    text = ["".ljust(width) + "".join(f"{name:>16}" for name in columns)]
    for label, values in results.items():
        text.append(label.ljust(width) + "".join(f"{values[name]:>16.4f}" for name in columns))
    return "\n".join(text)


def write_results(folder, results, detections=None):
    """metrics.json, per_class.csv and, if given, detections.npz in `folder`; returns their paths.
    NaN is null, in the csv an empty cell."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = [write_json(folder / "metrics.json", results), folder / "per_class.csv"]
    per_class = rounded(results["per_class"])
    with open(paths[1], "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["class", *next(iter(per_class.values()))])
        writer.writeheader()
        writer.writerows({"class": name} | values for name, values in per_class.items())
    if detections is not None:
        paths.append(folder / "detections.npz")
        part = folder / "detections.npz.part"   # a file broken off is none
        with open(part, "wb") as file:
            np.savez(file, **detections)
        part.replace(paths[2])
    return paths


def write_json(path, value):
    """Writes a nested dict, see `rounded` -> the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rounded(value), indent=2, allow_nan=False) + "\n", encoding="utf-8")
    return path


def rounded(value):
    """A nested dict with floats of 6 decimals, and None in place of NaN, which is not in JSON."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, float):
        return None if np.isnan(value) else round(value, 6)
    return value


def write_ava_csv(path, detections, dataset):
    """The AVA_CAP best rows of each key frame as the official csv, with either protocol: video,
    timestamp, box in shares of the frame, action id, score -> the path."""
    scores = detections["class_prob"] * detections["conf"][:, None]     # (n, C)
    scores = scores[:, np.array(AVA_CLASSES) - 1]                       # (n, 60)
    frame, _ = metrics.number_frames({name: detections[name] for name in ("video", "frame")})
    kept = metrics.best_rows(frame.repeat(scores.shape[1]), scores.ravel(), AVA_CAP)     # (n * 60,)
    row, column = np.divmod(np.flatnonzero(kept), scores.shape[1])
    video = detections["video"][row]
    height, width = np.asarray(dataset.table.size)[video].T
    box = detections["box"][row] / np.stack([width, height, width, height], 1)
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        for name, second, place, action, value in zip(
                detections["video_names"][video].tolist(), detections["frame"][row].tolist(),
                box.tolist(), np.array(AVA_CLASSES)[column].tolist(), scores[row, column].tolist()):
            shares = [f"{share:.4f}" for share in place]
            writer.writerow([name, f"{second:04d}", *shares, action, f"{value:.6f}"])
    return path


def read_detections(path):
    """A detections.npz as written by `write_results`; an error when something of it is missing."""
    if not Path(path).is_file():
        raise ValueError(f"detections missing: {path}; evaluate.py --ckpt writes them")
    try:
        with np.load(path, allow_pickle=False) as file:
            detections = dict(file)
    except (EOFError, TypeError, AttributeError, ValueError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is broken off, or no detections.npz of evaluate.py: {error}; "
                         "evaluate the checkpoint again") from error
    missing = {*ROWS, "videos", "video_names", "classes", "dataset", "config"} - set(detections)
    if missing:
        raise ValueError(f"{path} holds no {', '.join(sorted(missing))}; it is no "
                         "detections.npz of evaluate.py")
    return detections


def to_stored_size(detections, dataset, source):
    """Boxes in the pixels that the data set has now: of frames extracted anew in another size, or,
    where AVA's or your own annotation is here without frames, in shares of the frame."""
    if not hasattr(dataset, "table"):
        return
    size = dataset.table.size                                           # (V, 2)
    if "sizes" in detections:
        scale = (size / detections["sizes"])[detections["video"]]       # (n, 2)
        detections["box"] = (detections["box"] * scale[:, [1, 0, 1, 0]]).astype(np.float32)
    elif (size == 1).all():
        raise ValueError(f"{source} does not say of which size its frames were (it is of an "
                         f"earlier version), and {dataset.name} has no frames here: evaluate the "
                         "checkpoint again, or give a --data with the frames")


# ---- Table 6 ------------------------------------------------------------------------------------

def multiply_adds(function):
    """What a call multiplies and adds by torch's FLOP counter, a multiply-add as one.

    The sampling op is left out; attention is counted in its plain form, as the counter does not see
    the fused ones.
    """
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.inference_mode(), sdpa_kernel(SDPBackend.MATH), \
                FlopCounterMode(display=False) as counter:
            function()
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
    total = 0
    for operation, count in counter.get_flop_counts()["Global"].items():
        sampling = ("deform3d", "grid_sampler", "embedding_bag")
        if not any(name in str(operation) for name in sampling):
            total += count
    return total // 2


def efficiency(config, device, size=(256, 360), runs=3, model=None, precision=None):
    """Table 6: what a clip of T frames of `size` costs -> {"parameters", "multiply_adds",
    "sampling_multiply_adds", "ms", "peak_gb"}.

    The sampling op is left out of the count and given by itself: 8 corners a point and channel.
    model: by default a new one; precision: dtype of autocast. peak_gb is the GPU's, or what is
    resident of the process, its weights included.
    """
    reset_memory(device)
    model = (model or VideoActionDetector(config)).to(device).eval().requires_grad_(False)
    clip = torch.randn(1, 3, config.frames, *size, device=device)
    times = []
    with torch.inference_mode(), torch.autocast(device.type, precision, precision is not None):
        for _ in bar(range(runs + 1), "timing"):
            started = time.perf_counter()
            model(clip)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            times.append(1000 * (time.perf_counter() - started))
    peak = memory_gb(device)                # before the count, whose plain attention takes more

    queries = []                            # cells that a layer samples for

    def count_queries(layer, arguments, output):
        queries.append(output.shape[1])

    samplers = [layer for layer in model.encoder.layers if hasattr(layer, "sampling_offsets")]
    hooks = [layer.register_forward_hook(count_queries) for layer in samplers]
    count = multiply_adds(lambda: model(clip))
    for hook in hooks:
        hook.remove()
    points = sum(queries) * config.num_levels * config.num_points
    return {"parameters": sum(parameter.numel() for parameter in model.parameters()),
            "multiply_adds": count, "sampling_multiply_adds": points * 8 * config.dim,
            "ms": float(np.median(times[1:])), "peak_gb": peak}


def print_efficiency(args, device, precision):
    """Table 6, a row as soon as it is measured: this machine's beside the paper's."""
    form = "{:28}{:>14}{:>16}{:>16}{:>10}{:>10}"
    print(form.format("", "parameters", "multiply-adds", "sampling op", "ms", "peak GB"))
    models = {}
    for path in args.ckpt or ():
        model, config, _ = load_model(path, args.set, preset=args.preset)
        models[str(path)] = config, model
    for name in args.efficiency or (() if models else PAPER_EFFICIENCY):
        models[name] = override(PRESETS[name], args.set), None
    for name, (config, model) in models.items():
        row = efficiency(config, device, model=model, precision=precision)
        print(form.format(f"{name}, {config.frames} x 256 x 360", f"{row['parameters']:,}",
                          f"{row['multiply_adds'] / 1e12:.3f}T",
                          f"{row['sampling_multiply_adds'] / 1e12:.3f}T",
                          f"{row['ms']:.1f}", f"{row['peak_gb']:.2f}"), flush=True)
        if name in PAPER_EFFICIENCY:
            parameters, count, milliseconds = PAPER_EFFICIENCY[name]
            print(form.format("  the paper, its GPU", parameters, count, "", milliseconds, ""))


# ---- what is evaluated, shared with visualize.py ------------------------------------------------

def find_checkpoint(path=None):
    """The file that is meant by `path`: itself, best.pt of a run's folder, or without a path the
    synthetic model of the repository."""
    if path is None:
        path = WEIGHTS / "synthetic.pt"
        if not path.is_file():
            raise SystemExit("name a checkpoint: --ckpt runs/NAME; train.py writes one")
        if os.environ.get("RANK", "0") == "0":
            print(f"no --ckpt: taking {path}")
    path = Path(path)
    if path.is_dir():
        path = path / "best.pt"
    if path.is_file():
        return path
    known = [*path.parent.glob("*.pt"), *Path("runs").glob("*/*.pt")]
    known = sorted(known, key=lambda file: file.stat().st_mtime)[-3:]
    places = f"there are {', '.join(map(str, known))}" if known else "there is none in runs/"
    raise SystemExit(f"no such checkpoint: {path}; train.py writes best.pt and last.pt to its run "
                     f"folder; {places}")


def load_model(path=None, changes=(), device="cpu", preset=None):
    """The model, Config and record of a checkpoint (see `find_checkpoint`), with changes to the
    Config ("name=value") that keep its weights. preset: of a file that does not tell it."""
    path = find_checkpoint(path)
    try:
        model, checkpoint = load_checkpoint(path, device, changes, preset)
    except (OSError, ValueError) as error:
        text = " ".join(str(error).split())     # torch lists every tensor that does not fit
        if not text.startswith(("--set", str(path))):
            text = f"{path} cannot be loaded: {text}"
        if len(text) > 600:
            text = text[:600] + " ..."
        raise SystemExit(text) from error
    return model.eval(), model.config, checkpoint


def open_dataset(args, config, classes, source, trained):
    """The clips that args.dataset, .data, .split and .side name, seen as at test time.

    trained: a dict of the same names, which holds where args has None. SystemExit where they cannot
    be opened or do not have `classes`, those of `source` (None: not known).
    """
    name = args.dataset or trained.get("dataset")
    if name != trained.get("dataset"):
        trained = {}
    root = args.data or trained.get("data")
    split = args.split or trained.get("split") or 1
    missing = (args.missing or trained.get("missing") or "error").replace("-", " ")
    fill = args.fill
    if fill is None:
        fill = trained.get("fill") or 0
    if name is None:
        raise SystemExit(f"{source} does not say which data set it is for: name it with --dataset")
    if root is None and name != "synthetic":
        raise SystemExit(f"data set {name!r} of {source} is read from a folder: name it with "
                         "--data DIR")
    if args.data and name == "synthetic":
        raise SystemExit(f"--data {args.data}: the synthetic set has no folder; name the data set "
                         "with --dataset")
    if args.split not in (None, 1) and name not in ("ucf", "jhmdb"):
        raise SystemExit(f"--split {args.split}: {name} has one split")
    try:
        dataset = build_dataset(name, root, args.side, config, int(split), missing, int(fill))
    except (OSError, ValueError) as error:
        raise SystemExit(str(error)) from error
    dataset.augment = False
    if classes is not None and list(dataset.class_names) != list(classes):
        known, here = (f"{len(names)} ({', '.join(list(names)[:3])}, ...)"
                       for names in (classes, dataset.class_names))
        raise SystemExit(f"{source} knows other classes, {known}, than data set {name!r} has, "
                         f"{here}; choose --dataset and --data as it was trained, or train on this "
                         "data set with train.py")
    return dataset


def start(device=None):
    """Exit codes of signals, torchrun's process group -> (device, rank)."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    name = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise SystemExit(f"--device {name}: no device is called so; cpu, cuda, cuda:1") from error
    if device.type == "cuda":
        if device.index is None:
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        count = torch.cuda.device_count()
        if device.index >= count:
            raise SystemExit(f"--device {device}: torch finds {count} GPUs here; start no more "
                             "processes than that, or take --device cpu")
        torch.cuda.set_device(device)
    if "RANK" in os.environ and not dist.is_initialized():
        # The others wait while one draws a long film, or rank 0 scores a large set.
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo",
                                timeout=timedelta(days=2))
    return device, this_rank()[0]


def at_least(least):
    """A type of argparse's: a whole number from `least` on."""
    def whole_number(text):
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
        if value < least:
            raise argparse.ArgumentTypeError(f"{value}: must be at least {least}")
        return value
    return whole_number


def add_source_arguments(parser, several=False):
    """The options that visualize.py has too: which checkpoint, which data, how it computes.

    several: --ckpt and --split take more than one.
    """
    many = "+" if several else None
    group = parser.add_argument_group("model and data")
    group.add_argument("--ckpt", nargs=many, metavar="FILE",
                       help="checkpoint of train.py or its folder; default: weights/synthetic.pt")
    group.add_argument("--preset", choices=PRESETS, help="of weights that do not tell theirs")
    group.add_argument("--dataset", choices=DATASETS, help="default: the checkpoint's")
    group.add_argument("--data", metavar="DIR", help="the data set's folder")
    group.add_argument("--split", nargs=many, type=at_least(1), metavar="N",
                       help="1-3 for jhmdb, the others have one; default: the checkpoint's")
    group.add_argument("--side", choices=("train", "val"), default="val",
                       help="training or validation (test) videos of the split (val)")
    group.add_argument("--missing", choices=("error", "leave-out"),
                       help="of videos that have no frames; default: as in training, or error")
    group.add_argument("--fill", type=at_least(0), metavar="N",
                       help="interpolate boxes up to N frames apart; default: as in training, or 0")
    group.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE",
                       help="change the checkpoint's Config")
    group.add_argument("--device", help="default: cuda if there is one, else cpu")
    group.add_argument("--precision", choices=PRECISIONS,
                       help="default: tf32 on a GPU, float32 on a CPU")
    return group


# ---- the command line ---------------------------------------------------------------------------

def arguments(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0].replace("\n", " "),
                                     usage="python evaluate.py [--ckpt FILE] [options]")
    add_source_arguments(parser, several=True)
    group = parser.add_argument_group("evaluation")
    group.add_argument("--detections", metavar="FILE", nargs="+",
                       help="score saved detections.npz again, without the model")
    group.add_argument("--protocol", choices=("strict", "released"), default="strict",
                       help="rules of scoring, see metrics.py")
    group.add_argument("--eval-share", type=float, default=1.0, metavar="SHARE",
                       help="share of the videos that is evaluated, in (0, 1]")
    group.add_argument("--oracle", choices=("boxes", "labels"),
                       help="give matched queries the true boxes (Fig. 1, Table 7) or labels")
    group.add_argument("--efficiency", nargs="*", choices=PRESETS, metavar="PRESET",
                       help="parameters, multiply-adds, time and memory of a clip of the paper's "
                            "size (Table 6), no more: of presets, of --ckpt, or of the paper's two")
    group.add_argument("--batch-size", type=at_least(1), metavar="N",
                       help="clips at once per process; default: the Config's micro_batch")
    group.add_argument("--workers", type=at_least(0), metavar="N",
                       help="loading processes per rank; default: 0 on a CPU, up to 8 on a GPU")
    group.add_argument("--out", metavar="DIR",
                       help="folder of the results; default, beside the file that was read: "
                            "evaluation/, oracle-boxes/, scored-released/ or the like")
    args = parser.parse_args(argv)
    if not 0 < args.eval_share <= 1:
        parser.error(f"--eval-share {args.eval_share} is not in (0, 1]")
    if args.detections and (args.ckpt or args.oracle):
        parser.error("--detections are scored without a model: leave --ckpt and --oracle out")
    if args.efficiency is None:
        files = len(args.detections or args.ckpt or [None])
        splits = args.split or [None]
        if files not in (1, len(splits)):
            parser.error(f"{files} files and {len(splits)} --split: give one file, or one for each "
                         "split")
        if len(set(splits)) < len(splits):
            parser.error(f"--split {' '.join(map(str, splits))}: each split once")
    return args


def results_folder(source, args):
    """Where the results of a checkpoint or of saved detections go."""
    if args.out:
        return Path(args.out)
    kind = f"oracle-{args.oracle}" if args.oracle else "evaluation"
    if args.detections:
        kind = f"scored-{args.protocol}"
    elif args.protocol == "released":
        kind += "-released"
    if args.side == "train":
        kind += "-train"
    inside = Path(source).resolve().parent == WEIGHTS       # that folder holds what is committed
    return (Path("runs", Path(source).stem) if inside else Path(source).parent) / kind


def evaluate_split(source, out, args, device, precision):
    """Detections of a checkpoint, or saved ones, scored; prints the table and writes the results to
    the folder `out` -> results, None on ranks other than 0."""
    if args.detections:
        detections = read_detections(source)
        config = override(config_from_dict(json.loads(str(detections["config"]))), args.set)
        classes, trained = detections["classes"].tolist(), {"dataset": str(detections["dataset"])}
        said = str(source)
    else:
        model, config, checkpoint = load_model(source, args.set, device, args.preset)
        classes = checkpoint["classes"]
        trained = checkpoint.get("settings", {}) | {"dataset": checkpoint["dataset"]}
        said = f"{source}, {checkpoint['kind']}"
    dataset = open_dataset(args, config, classes, source, trained)
    if not args.detections:
        workers = default_workers(device) if args.workers is None else args.workers
        detections = detect(model, dataset, config, device, args.eval_share, workers,
                            batch_size=args.batch_size, oracle=args.oracle, precision=precision)
    elif list(dataset.videos) != detections["video_names"].tolist():
        raise ValueError(f"{source} is of other videos ({len(detections['video_names'])}) than "
                         f"{dataset.name} has ({len(dataset.videos)}); choose --data, --split and "
                         "--side as they were evaluated")
    else:
        to_stored_size(detections, dataset, source)
    tubes = link(detections, config, args.protocol)
    if this_rank()[0] > 0:
        return None
    results = score(detections, dataset, config, args.protocol, tubes)
    said += f", on {dataset.name}: {results['videos']} of {len(dataset.videos)} {args.side} videos"
    if args.oracle:
        said += f", true {args.oracle} given"
    if args.split and trained.get("data") and args.split != (trained.get("split") or 1):
        said += f", trained on split {trained.get('split') or 1}, so on some of these videos"
    print(f"{said}, {args.protocol} protocol")
    if args.protocol == "released" and not config.key_frame:
        rules = RELEASED_RULES[metrics.full_name("released", len(dataset.class_names))]
        print(f"v-mAP is that of the paper's code, not to be compared with strict: {rules}")
    paths = write_results(out, results, None if args.detections else detections)
    if dataset.name == "ava":
        paths.append(write_ava_csv(out / "detections.csv", detections, dataset))
    print(table(results))
    print("wrote " + ", ".join(str(path) for path in paths))
    return results


def evaluate_splits(args, device, precision):
    """A checkpoint (or saved detections) on each split, and where there are several their mean."""
    sources = args.detections or args.ckpt or [None]
    splits = args.split or [None]
    if not args.detections:
        sources = [find_checkpoint(path) for path in sources]
    if len(sources) == 1:
        sources = sources * len(splits)
    results = {}
    for source, split in zip(sources, splits):
        out = results_folder(source, args)
        if len(splits) > 1:
            out = out / f"split-{split}"
        of_split = argparse.Namespace(**{**vars(args), "split": split})
        results[f"split {split}"] = evaluate_split(source, out, of_split, device, precision)
    if len(splits) == 1 or this_rank()[0] > 0:
        return
    numbers = {}                        # the metrics of each split, without its classes
    for split, values in results.items():
        numbers[split] = {name: value for name, value in values.items() if "-mAP@" in name}
    mean = {name: float(np.mean([values[name] for values in numbers.values()]))
            for name in numbers[f"split {splits[0]}"]}
    print(lines({f"mean of {len(splits)} splits": mean} | numbers))
    path = results_folder(sources[0], args) / "mean.json"
    write_json(path, mean | {"protocol": args.protocol, "splits": numbers})
    print(f"wrote {path}")


def main(argv=None):
    args = arguments(argv)
    device, rank = start(args.device)
    precision = args.precision or default_precision(device, training=False)
    try:
        autocast = set_precision(precision, device)
        if rank == 0:
            print(f"evaluate.py: {device}, precision {precision}", flush=True)
        if args.efficiency is None:
            evaluate_splits(args, device, autocast)
        elif rank == 0:
            print_efficiency(args, device, autocast)
    except (OSError, ValueError) as error:
        text = str(error).strip()
        if "Traceback" in text:                 # of a loading process: its last line says it
            text = text.split("\n")[-1]
        raise SystemExit(f"evaluate.py: {text}") from error
    except torch.OutOfMemoryError as error:
        raise SystemExit(f"evaluate.py: out of memory: {str(error).split('.')[0]}; take a smaller "
                         "--batch-size, or --precision bf16") from error
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
