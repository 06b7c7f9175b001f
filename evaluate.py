"""A checkpoint's numbers: frame mAP and video mAP, per class and class group (Sec. 5.2, Tables 5 and 7, Fig. 1).

    python evaluate.py --ckpt runs/NAME/best.pt [--dataset D --data DIR --split 1] [--protocol strict|released]
    torchrun --nproc_per_node 8 evaluate.py --ckpt runs/NAME/best.pt          # the same numbers, sooner
    python evaluate.py --detections runs/NAME/evaluation/detections.npz       # scored again, without the model

`detect` runs the model over a data set and returns plain arrays, one row per actor query and frame; `score` compares
them with the data set's ground truth as PROTOCOLS.md says. Nothing else in the project turns outputs into numbers.

Detections are a dict of arrays of n rows, sorted by video, frame and query:
    video (n,) index into dataset.videos; frame (n,) number in the video; box (n, 4) x1, y1, x2, y2 in the annotation's
    pixels; class_prob (n, C); conf (n,): the score of a class is class_prob * conf, equal to model.scores;
and of the run: videos (v,) the video indices that were evaluated, video_names, classes, dataset, config (JSON), so
that the file detections.npz says by itself what it is of.
"""
# B clips, T frames, A actor queries, C classes, N actors of the annotation, n detections

import argparse
import csv
import json
import os
import resource
import signal
import sys
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import metrics
from data import VIDEO_KEY, build_dataset, collate
from model import PRESETS, VideoActionDetector, config_from_dict, load_checkpoint, override, scores
from objective import cxcywh_to_xyxy, match

PAPER_EFFICIENCY = {"jhmdb": (40, "117.8M", "3.26T", "432.0"), "ucf": (32, "117.8M", "3.73T", "370.0")}     # Table 6
TUBE_THRESHOLDS = {"v-mAP@0.2": 0.2, "v-mAP@0.5": 0.5, "v-mAP@0.5:0.95": tuple(np.arange(10) * 0.05 + 0.5)}
AVA_LEFT_OUT = (2, 16, 18, 19, 21, 23, 25, 31, 32, 33, 35, 39, 40, 42, 44, 50, 53, 55, 71, 75)
AVA_CLASSES = [i for i in range(1, 81) if i not in AVA_LEFT_OUT]            # the 60 action ids that are evaluated
AVA_CAP = 50                            # (box, class) rows of a key frame that count
ROWS = ("video", "frame", "box", "class_prob", "conf")


def detect(model, dataset, config, device, share=1.0, workers=0, progress=True, batch_size=None, oracle=None):
    """The model's boxes and scores on the annotated frames of a data set's clips.

    share: evaluate this share of the videos, evenly spread over dataset.videos. batch_size: clips at once, by default
    config.micro_batch. oracle: "boxes" or "labels" gives queries matched with an actor (objective.match) its true box
    or labels. Under torch.distributed the ranks share the batches, whose clips do not depend on the number of ranks;
    every rank returns the same arrays, those that one process alone would return. Raises ValueError on outputs that are
    not finite.
    """
    device = torch.device(device)
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    count = max(1, round(share * len(dataset.videos)))
    videos = np.arange(count) * len(dataset.videos) // count
    clips = np.flatnonzero(np.isin(clip_videos(dataset), videos))
    size = batch_size or config.micro_batch
    batches = [clips[i:i + size].tolist() for i in range(0, len(clips), size)][rank::world]
    loader = DataLoader(dataset, batch_sampler=batches, collate_fn=collate, num_workers=workers,
                        pin_memory=device.type == "cuda")
    index = {name: i for i, name in enumerate(dataset.videos)}
    was_training = model.training
    model.eval()
    parts = []
    with torch.inference_mode():
        for images, padding_mask, targets in bar(loader, "detecting", disable=not progress or rank > 0):
            mask = padding_mask.to(device) if padding_mask.any() else None
            out = model(images.to(device, non_blocking=True), mask)
            parts.append(rows(out, targets, config, index, oracle))
    model.train(was_training)
    if world > 1:
        gathered = [None] * world
        dist.all_gather_object(gathered, parts)
        parts = [part for of_rank in gathered for part in of_rank]
    found = {name: np.concatenate([part[name] for part in parts]) for name in ROWS}
    order = np.lexsort((found["frame"], found["video"]))    # stable: a frame's queries stay in their order
    found = {name: values[order] for name, values in found.items()}
    return found | {"videos": videos, "video_names": np.array(dataset.videos), "classes": np.array(dataset.class_names),
                    "dataset": np.array(dataset.name), "config": np.array(json.dumps(asdict(config)))}


def bar(items, label, **options):
    """tqdm, seldom where it is written to a file."""
    return tqdm(items, label, leave=False, mininterval=0.1 if sys.stderr.isatty() else 30, **options)


def clip_videos(dataset):
    """(clips,) the index in dataset.videos of each clip's video, known without loading a clip. A data set without the
    array `clip_videos` has one clip a video, in their order."""
    if not hasattr(dataset, "clip_videos") and len(dataset) != len(dataset.videos):
        raise ValueError(f"{dataset.name}: {len(dataset)} clips of {len(dataset.videos)} videos; set clip_videos")
    return np.asarray(getattr(dataset, "clip_videos", range(len(dataset))))


def rows(out, targets, config, index, oracle=None):
    """Detections of one batch as arrays, temporal padding left out: all queries of a frame, in their order."""
    logits, boxes = out["pred_logits"].float(), out["pred_boxes"].float()           # (B, T, A, C), (B, T, A, 4)
    # a query that the confidence gate dropped has finite logits and score 0
    prob = torch.where(scores(out, config) == 0, 0.0, logits.sigmoid())             # (B, T, A, C)
    conf = out["pred_conf"].float().sigmoid() if config.score_with_confidence else torch.ones_like(boxes[..., 0])
    if oracle:
        prob, boxes = give_truth(oracle, prob, boxes, out, targets, config)
    height, width = torch.stack([torch.as_tensor(t["size"]) for t in targets]).to(boxes).unbind(1)        # (B,), (B,)
    boxes = cxcywh_to_xyxy(boxes) * torch.stack([width, height, width, height], 1)[:, None, None]   # * (B, 1, 1, 4)
    keep = torch.stack([t["frames"] for t in targets]).bool()                       # (B, T)
    if keep.shape != boxes.shape[:2]:
        raise ValueError(f"the model gives {tuple(boxes.shape[:2])} clips and frames, the targets have "
                         f"{tuple(keep.shape)}: is the data set built with another Config than the model?")
    queries = boxes.shape[2]
    frame = torch.stack([t["frame_ids"] for t in targets])[keep].repeat_interleave(queries)               # (k * A,)
    video = torch.tensor([index[t["video"]] for t in targets])[:, None].expand(keep.shape)[keep]          # (k,)
    keep = keep.to(boxes.device)
    part = {"video": video.repeat_interleave(queries), "frame": frame, "box": boxes[keep].flatten(0, 1),  # (k * A, 4)
            "class_prob": prob[keep].flatten(0, 1), "conf": conf[keep].flatten()}   # (k * A, C), (k * A,)
    part = {name: values.cpu().numpy() for name, values in part.items()}
    if not all(np.isfinite(part[name]).all() for name in ("box", "class_prob", "conf")):
        names = ", ".join(sorted({t["video"] for t in targets}))
        raise ValueError(f"the model's outputs on {names} are not finite; its weights or these clips hold NaN or inf")
    return part


def give_truth(oracle, prob, boxes, out, targets, config):
    """Fig. 1 and Table 7: the true labels or boxes in place of those of the queries matched with an actor."""
    clip, frame, query, actor = match(out, targets, config)
    prob, boxes = prob.clone(), boxes.clone()
    for b, target in enumerate(targets):
        of_clip = clip == b
        t, a, n = (x[of_clip] for x in (frame, query, actor))
        if oracle == "boxes":
            boxes[b, t, a] = target["boxes"].to(boxes)[n, t]
        else:
            prob[b, t, a] = target["labels"].to(prob)[n, t]
    return prob, boxes


def score(detections, dataset, config, protocol="strict"):
    """Detections against the data set's ground truth, videos that were left out of `detect` left out of both.

    Returns {"f-mAP@0.5", "v-mAP@0.2", "v-mAP@0.5", "v-mAP@0.5:0.95"} as floats (key-frame data sets have no tubes),
    "per_class" {class: {"boxes", "tubes" and the same APs}}, "per_group" {group: the same, means of its classes' AP},
    "protocol", "videos". A class without ground truth has AP NaN and is left out of means.
    """
    names, kept = list(dataset.class_names), detections["videos"]
    frames, tubes = dataset.ground_truth()
    inside = np.isin(frames["frame"] // VIDEO_KEY, kept)
    frames = {name: values[inside] for name, values in frames.items()}
    found = {"frame": detections["video"] * VIDEO_KEY + detections["frame"], "box": detections["box"],
             "scores": detections["class_prob"] * detections["conf"][:, None]}                            # (n, C)
    frame_map = ava_frame_map if dataset.name == "ava" else metrics.frame_map
    results = {"f-mAP@0.5": frame_map(found, frames, len(names))}
    if not config.key_frame:
        kept = set(kept.tolist())
        tubes = [tube for tube in tubes if tube["video"] in kept]
        boxes = {name: detections[name] for name in ROWS}
        linked = metrics.link_tubes(boxes, protocol, config.link_score, min_length=shortest_tube(config))
        for name, threshold in TUBE_THRESHOLDS.items():
            results[name] = metrics.video_map(linked, tubes, len(names), threshold, protocol)
    boxes = np.bincount(frames["label"], minlength=len(names))
    counts = {"boxes": boxes, "tubes": np.bincount([t["label"] for t in tubes or ()], minlength=len(names))}
    per_class = {c: {k: int(v[i]) for k, v in counts.items()} | {k: float(v["AP"][i]) for k, v in results.items()}
                 for i, c in enumerate(names)}
    per_group = {group: {name: metrics.nanmean(value["AP"][list(classes)]) for name, value in results.items()}
                 for group, classes in dataset.class_groups.items()}
    return {name: float(value["mAP"]) for name, value in results.items()} | \
        {"protocol": protocol, "videos": len(detections["videos"]), "per_class": per_class, "per_group": per_group}


def ava_frame_map(detections, ground_truth, num_classes):
    """metrics.ava_map with the arguments and the result of metrics.frame_map, class k being action id k + 1."""
    found, truth = ({**rows, **dict(zip(("video", "timestamp"), np.divmod(rows["frame"], VIDEO_KEY)))}
                    for rows in (detections, ground_truth))
    result = metrics.ava_map(found, truth | {"label": truth["label"] + 1}, AVA_CLASSES, cap=AVA_CAP)
    return {"mAP": result["mAP"], "AP": np.array([result["AP"].get(i + 1, np.nan) for i in range(num_classes)])}


def write_ava_csv(path, detections, dataset):
    """The AVA_CAP best rows of each key frame as the official csv: video, timestamp, box in shares of the frame, action
    id, score."""
    scores = detections["class_prob"] * detections["conf"][:, None]                 # (n, C)
    scores = scores[:, np.array(AVA_CLASSES) - 1]                                   # (n, 60)
    box = np.repeat(np.arange(len(scores)), scores.shape[1])                        # (n * 60,) the row that it is of
    frame = detections["video"] * VIDEO_KEY + detections["frame"]
    kept = metrics.best_rows(frame[box], scores.ravel(), AVA_CAP)
    row, label = np.divmod(np.flatnonzero(kept), scores.shape[1])
    video = detections["video"][row]
    shares = detections["box"][row] / np.asarray(dataset.table.size)[video][:, [1, 0, 1, 0]]
    lines = zip(detections["video_names"][video].tolist(), detections["frame"][row].tolist(), shares.tolist(),
                np.array(AVA_CLASSES)[label].tolist(), scores[row, label].tolist())
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([name, f"{second:04d}", *(f"{x:.4f}" for x in place), action, f"{value:.6f}"]
                                   for name, second, place, action, value in lines)


def average(paths):
    """The mean of the metrics of several metrics.json, such as JHMDB's three splits, as results (without classes)."""
    results = [json.loads(Path(path).read_text()) for path in paths]
    names = [name for name in results[0] if "-mAP@" in name]
    return {name: float(np.mean([result[name] for result in results])) for name in names} | \
        {"per_class": results[0]["per_class"], "per_group": {str(path): result for path, result in zip(paths, results)}}


def shortest_tube(config):
    """Frames below which a tube is dropped (PROTOCOLS.md): 15, half a clip where clips are shorter than 30 frames."""
    return 15 if config.frames >= 30 else config.frames // 2


def table(results):
    """The results as text: all classes, then each class group."""
    columns = [name for name in results if "-mAP@" in name]
    lines = [("", *columns), (f"all {len(results['per_class'])} classes", *(results[c] for c in columns))]
    lines += [(group, *(values[c] for c in columns)) for group, values in results["per_group"].items()]
    width = max(len(line[0]) for line in lines) + 2
    return "\n".join(first.ljust(width) + "".join(f"{x:>16.4f}" if isinstance(x, float) else f"{x:>16}" for x in rest)
                     for first, *rest in lines)


def write_results(folder, results, detections=None):
    """metrics.json, per_class.csv and, if given, detections.npz in `folder`; returns their paths. NaN is null, in
    the csv an empty cell."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / "metrics.json", folder / "per_class.csv"]
    paths[0].write_text(json.dumps(without_nan(results), indent=2, allow_nan=False) + "\n")
    per_class = without_nan(results["per_class"])
    with open(paths[1], "w", newline="") as file:
        writer = csv.DictWriter(file, ["class", *next(iter(per_class.values()))])
        writer.writeheader()
        writer.writerows({"class": name} | values for name, values in per_class.items())
    if detections is not None:
        paths.append(folder / "detections.npz")
        np.savez(paths[2], **detections)
    return paths


def without_nan(value):
    """A nested dict with None in place of NaN, as JSON has no NaN."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    return None if isinstance(value, float) and np.isnan(value) else value


def read_detections(path):
    """A detections.npz as written by `write_results`; an error when something of it is missing."""
    if not Path(path).is_file():
        raise SystemExit(f"detections missing: {path}; evaluate.py --ckpt writes them")
    with np.load(path, allow_pickle=False) as file:
        missing = {*ROWS, "videos", "video_names", "classes", "dataset", "config"} - set(file.files)
        if missing:
            raise SystemExit(f"{path} holds no {', '.join(sorted(missing))}; it is no detections.npz of evaluate.py")
        return dict(file)


def memory_gb(device):
    """The most memory used so far: the GPU's, or what is resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2 ** 30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2 ** 30 if sys.platform == "darwin" else 2 ** 20)


def multiply_adds(function):
    """What a call multiplies and adds by torch's FLOP counter, a multiply-add as one, the sampling op left out; attention is
    counted in its plain form, as the counter does not see the fused ones of the CPU."""
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.inference_mode(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            function()
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
    return sum(count for op, count in counter.get_flop_counts()["Global"].items()
               if not any(name in str(op) for name in ("deform3d", "grid_sampler", "embedding_bag"))) // 2


def efficiency(config, device, size=(256, 360), runs=3):
    """Table 6: what a clip of T frames of `size` costs -> {"parameters", "multiply_adds", "sampling_multiply_adds", "ms",
    "peak_gb"}.

    The sampling op is left out of the count and given by itself: 8 corners a point and channel. peak_gb is of the GPU, or
    what the process holds at most, its weights included.
    """
    model = VideoActionDetector(config).to(device).eval().requires_grad_(False)
    clip = torch.randn(1, 3, config.frames, *size, device=device)
    times, cells = [], []
    with torch.inference_mode():
        for _ in range(runs + 1):
            started = time.perf_counter()
            model(clip)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            times.append(1000 * (time.perf_counter() - started))
    peak = memory_gb(device)                # the count's plain attention takes more
    model.encoder.register_forward_hook(lambda module, maps, out: cells.append(sum(x[0, 0].numel() for x in maps[0])))
    count = multiply_adds(lambda: model(clip))
    points = cells[0] * config.encoder_layers * config.num_levels * config.num_points
    return {"parameters": sum(parameter.numel() for parameter in model.parameters()), "multiply_adds": count,
            "sampling_multiply_adds": points * 8 * config.dim, "ms": float(np.median(times[1:])), "peak_gb": peak}


def efficiency_table(device):
    """Table 6 as text: this machine's rows beside the paper's."""
    lines = [f"{'':24}{'parameters':>14}{'multiply-adds':>15}{'sampling op':>13}{'ms':>10}{'peak GB':>9}"]
    for name, (frames, *paper) in PAPER_EFFICIENCY.items():
        row = efficiency(PRESETS[name], device)
        lines += [f"{name + f', {frames} x 256 x 360':24}{row['parameters']:>14,}{row['multiply_adds'] / 1e12:>14.3f}T"
                  f"{row['sampling_multiply_adds'] / 1e12:>12.3f}T{row['ms']:>10.1f}{row['peak_gb']:>9.2f}",
                  f"{'  the paper, its GPU':24}{paper[0]:>14}{paper[1]:>15}{'':>13}{paper[2]:>10}"]
    return "\n".join(lines)


def load_model(path, changes=(), device="cpu"):
    """The model, Config and record of a checkpoint, with changes to the Config ("name=value") that keep its weights."""
    if not Path(path).is_file():
        raise SystemExit(f"checkpoint missing: {path}; train.py writes best.pt and last.pt to its run folder")
    try:
        model, checkpoint = load_checkpoint(path, device, changes)
    except ValueError as error:
        text = str(error)                       # torch lists every tensor that does not fit
        raise SystemExit(f"{path} cannot be loaded: {text[:600]}{' ...' if len(text) > 600 else ''}") from error
    return model.eval(), model.config, checkpoint


def open_dataset(args, config, classes, source, trained):
    """The test clips that args.dataset, .data and .split name, by default those of `trained`, a dict of the same names;
    an error unless they have `classes`, those of `source` (None: not known)."""
    name = args.dataset or trained.get("dataset")
    trained = trained if name == trained.get("dataset") else {}
    root, split = args.data or trained.get("data"), args.split or trained.get("split")
    if root is None and name != "synthetic":
        raise SystemExit(f"{source} is of data set {name!r}; name its folder with --data DIR")
    try:
        dataset = build_dataset(name, root, "val", config, int(split or 1))
    except (OSError, ValueError) as error:
        raise SystemExit(str(error)) from error
    if classes is not None and list(dataset.class_names) != list(classes):
        known, here = (f"{len(names)} ({', '.join(list(names)[:3])}, ...)" for names in (classes, dataset.class_names))
        raise SystemExit(f"{source} knows other classes, {known}, than data set {name!r} has, {here}; choose --dataset "
                         "and --data as it was trained, or train on this data set with train.py")
    return dataset


def start(device=None):
    """Exit codes of signals, torchrun's process group; returns (device, rank)."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    local = int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device(device or (f"cuda:{local}" if torch.cuda.is_available() else "cpu"))
    if device.index is not None and device.type == "cuda":
        torch.cuda.set_device(device)
    if "RANK" in os.environ and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return device, dist.get_rank() if dist.is_initialized() else 0


def add_source_arguments(parser):
    """The options that visualize.py has too: which checkpoint, which data."""
    group = parser.add_argument_group("model and data")
    group.add_argument("--ckpt", help="checkpoint of train.py")
    group.add_argument("--dataset", help="synthetic, ucf, jhmdb, ava or custom; default: the checkpoint's")
    group.add_argument("--data", metavar="DIR", help="the data set's folder")
    group.add_argument("--split", help="1-3 for jhmdb, 1 for ucf, train or val for the others; default: the test split")
    group.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="change the checkpoint's Config")
    group.add_argument("--device", help="default: cuda if there is one, else cpu")
    return group


def arguments(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add_source_arguments(parser)
    group = parser.add_argument_group("evaluation")
    either = group.add_mutually_exclusive_group()
    either.add_argument("--detections", metavar="FILE", help="score a saved detections.npz again, without the model")
    group.add_argument("--average", metavar="FILE", nargs="+", help="print the mean of these metrics.json, no more")
    group.add_argument("--protocol", choices=("strict", "released"), default="strict", help="rules of scoring")
    group.add_argument("--eval-share", type=float, default=1.0, help="share of the videos that is evaluated, in (0, 1]")
    either.add_argument("--oracle", choices=("boxes", "labels"),
                        help="give matched queries the true boxes (Fig. 1, Table 7) or labels (Fig. 1)")
    group.add_argument("--efficiency", action="store_true", help="parameters, multiply-adds, time and memory of a clip at "
                                                                 "the paper's sizes (Table 6), no more; needs no checkpoint")
    group.add_argument("--batch-size", type=int, help="clips at once per process; default: the Config's micro_batch")
    group.add_argument("--workers", type=int, default=0, help="loading processes per rank")
    group.add_argument("--out", metavar="DIR", help="default, beside the file that was read: evaluation/, "
                                                    "oracle-boxes/, oracle-labels/ or scored-PROTOCOL/")
    args = parser.parse_args(argv)
    if not (args.ckpt or args.detections or args.average or args.efficiency):
        parser.error("name a checkpoint (--ckpt) or saved detections (--detections)")
    if not 0 < args.eval_share <= 1:
        parser.error(f"--eval-share {args.eval_share} is not in (0, 1]")
    return args


def main(argv=None):
    args = arguments(argv)
    if args.average:
        return print(table(average(args.average)))
    device, rank = start(args.device)
    if args.efficiency:
        return print(efficiency_table(device))
    source = args.detections or args.ckpt
    if args.detections:
        detections = read_detections(source)
        config = override(config_from_dict(json.loads(str(detections["config"]))), args.set)
        classes, trained = detections["classes"].tolist(), {"dataset": str(detections["dataset"])}
    else:
        model, config, checkpoint = load_model(source, args.set, device)
        classes, trained = checkpoint["classes"], checkpoint.get("settings", {}) | {"dataset": checkpoint["dataset"]}
    dataset = open_dataset(args, config, classes, source, trained)
    if not args.detections:
        detections = detect(model, dataset, config, device, args.eval_share, args.workers,
                            batch_size=args.batch_size, oracle=args.oracle)
    elif list(dataset.videos) != detections["video_names"].tolist():
        raise SystemExit(f"{source} is of other videos ({len(detections['video_names'])}) than {dataset.name} has "
                         f"({len(dataset.videos)}); choose --data and --split as they were evaluated")
    if rank == 0:
        results = score(detections, dataset, config, args.protocol)
        kind = "" if args.detections else ", " + checkpoint["kind"]
        print(f"{source}{kind}, on {dataset.name}: {results['videos']} of {len(dataset.videos)} videos, {args.protocol}"
              f" protocol{', true ' + args.oracle + ' given' if args.oracle else ''}")
        print(table(results))
        kind = f"oracle-{args.oracle}" if args.oracle else "evaluation"
        kind = f"scored-{args.protocol}" if args.detections else kind
        out = Path(args.out or Path(source).parent / kind)
        paths = write_results(out, results, None if args.detections else detections)
        if dataset.name == "ava":
            paths.append(out / "detections.csv")
            write_ava_csv(paths[-1], detections, dataset)
        print("wrote " + ", ".join(str(path) for path in paths))
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
