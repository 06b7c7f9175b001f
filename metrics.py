"""Frame mAP, tube linking, video mAP and AVA's mAP (Sec. 5.1). Plain numpy; boxes are x1, y1, x2, y2; AP in float64.

Two protocols. `strict` is this project's own, the same for every dataset that has tubes; `released` has the rules of
the code that made the paper's tables, so that a released checkpoint gives the released numbers:

             strict                                       released (class-query-vad)
frame mAP    plain IoU, best ground truth, taken: false   the same
linking      greedy in time, every class, soft NMS        best paths through all frames, NMS of tubes, trimming
tube IoU     mean plain IoU over common frames x          pixels inclusive (+1 on width and height); JHMDB: no temporal
             temporal IoU, frames inclusive               IoU; UCF: a single common frame counts as no overlap
tube match   best ground truth, taken: false              best ground truth that is still free
AP           all-point with the envelope                  the same, recall = tp / (n + 1e-5)
no truth     class is NaN and left out of the mean        class counts as 0
"""
# n detections or boxes, F frames with detections, V videos of a batch, C classes, A boxes of a frame (padded),
# K boxes of a frame and class that are kept, L live tubes of a video and class

import csv
import os
import re
import sys
from array import array

import numpy as np

SOFT_NMS_IOU, KEPT_BOXES = 0.6, 10      # linking: boxes of a frame and class, and the IoU above which scores decay
LINK_IOU, MIN_TUBE_SCORE = 0.5, 0.005
VIDEOS_AT_ONCE = 64                     # linked side by side: enough to fill numpy's calls, small enough for the cache


def box_iou(first, second, plus_one=0):
    """IoU of boxes (..., 4) that broadcast -> (...), float64; 0 where both are empty. plus_one=1: inclusive pixels."""
    first, second = np.asarray(first, np.float64), np.asarray(second, np.float64)
    width = np.minimum(first[..., 2], second[..., 2]) - np.maximum(first[..., 0], second[..., 0]) + plus_one
    height = np.minimum(first[..., 3], second[..., 3]) - np.maximum(first[..., 1], second[..., 1]) + plus_one
    overlap = np.maximum(width, 0) * np.maximum(height, 0)
    areas = ((box[..., 2] - box[..., 0] + plus_one) * (box[..., 3] - box[..., 1] + plus_one) for box in (first, second))
    union = sum(areas) - overlap
    return np.divide(overlap, union, out=np.zeros_like(overlap), where=union > 0)


def check_boxes(box, place):
    """ValueError naming the first row of box (n, 4) with a coordinate that is not finite, or x2 < x1, or y2 < y1."""
    if box.ndim != 2 or box.shape[1] != 4:
        raise ValueError(f"{place}: boxes of shape (n, 4) expected (x1, y1, x2, y2), got {box.shape}")
    for start in range(0, len(box), 1 << 21):
        part = box[start:start + (1 << 21)]
        bad = ~np.isfinite(part).all(1) | (part[:, 2:] < part[:, :2]).any(1)
        if bad.any():
            row = bad.argmax()
            raise ValueError(f"{place}, row {start + row}: box {part[row]} is not finite, or x2 < x1 or y2 < y1")


def check_detections(detections, needed, place):
    """The arrays of `detections` named in `needed`, checked for equal length, finite scores and sound boxes."""
    if missing := [name for name in needed if name not in detections]:
        raise ValueError(f"{place} lack {missing}; they need {needed}")
    arrays = [np.asarray(detections[name]) for name in needed]
    arrays = [array.reshape(-1, 4) if name == "box" and array.size == 0 else array for name, array in zip(needed, arrays)]
    if len({len(array) for array in arrays}) > 1:
        raise ValueError(f"{place}: lengths differ: {dict(zip(needed, map(len, arrays)))}")
    for name, array in zip(needed, arrays):
        if name == "box":
            check_boxes(array, place)
        elif name in ("score", "scores", "class_prob", "conf") and not np.isfinite(array.sum(dtype=np.float64)):
            raise ValueError(f"{place}, row {np.argwhere(~np.isfinite(array))[0][0]}: {name} is not a finite number")
    return arrays


def check_labels(label, num_classes, place):
    """ValueError for a class outside of 0..C-1."""
    if len(label) and not (0 <= label.min() and label.max() < num_classes):
        row = np.flatnonzero((label < 0) | (label >= num_classes))[0]
        raise ValueError(f"{place}, row {row}: class {label[row]} is not one of the classes 0..{num_classes - 1}")


def runs(*keys):
    """Starts and lengths of the runs of equal keys (n,). Rows of one frame mostly stand together: one look-up a run."""
    changed = np.ones(len(keys[0]), bool)
    changed[1:] = np.any([key[1:] != key[:-1] for key in keys], axis=0)
    starts = np.flatnonzero(changed)
    return starts, np.diff(starts, append=len(changed))


def find(keys, table, place):
    """Position of every key (n,) in the sorted table, -1 where it is not there -> (n,) int32."""
    if len(keys) == 0 or len(table) == 0:
        return np.full(len(keys), -1, np.int32)
    if (keys.dtype.kind in "iu") != (table.dtype.kind in "iu"):
        raise ValueError(f"{place}: {keys.dtype} in detections, {table.dtype} in ground truth; none would match")
    starts, lengths = runs(keys)
    position = np.minimum(np.searchsorted(table, keys[starts]), len(table) - 1)
    return np.repeat(np.where(table[position] == keys[starts], position, -1).astype(np.int32), lengths)


# ---- matching and average precision, the same for boxes and tubes -------------------------------------------------

def average_precision(rank, truth, iou, rule, num_truth, original):
    """Area under the all-point precision envelope of pairs (p,): rank of the detection by descending score (from 0),
    ground truth, their IoU, all at or above the threshold. num_truth: number of ground truths, found or not.

    rule "best": a detection takes its best ground truth, among equal ones one that is still free; "first": among equal
    ones the first (the official AVA script); "free": its best of those that are still free (class-query-vad's tubes).
    original (m,), for "best": the first ground truth that is the same as the m-th. Where an actor is annotated twice,
    a detection takes the second copy only if it is that very box or tube: the truth itself scores 1, and of two
    different boxes around the one actor the second is a false positive, as with every peer.
    """
    if rule == "best":
        truth = np.where(iou < 1, original[truth], truth)
    order = np.lexsort((truth, -iou, rank))
    rank, truth, iou = rank[order], truth[order], iou[order]
    starts, lengths = runs(rank)
    keep = {"free": slice(None), "first": starts, "best": iou == np.repeat(iou[starts], lengths)}[rule]
    rank, truth = rank[keep], truth[keep]
    # A ground truth that is nobody's alternative goes to the first who asks; only the others depend on the sequence.
    contested = np.isin(truth, truth[np.isin(rank, rank[1:][rank[1:] == rank[:-1]])])
    _, first = np.unique(truth[~contested], return_index=True)
    served, last = {}, -1               # ground truth -> rank of the detection that takes it; the last such rank
    for one_rank, one_truth in zip(rank[contested].tolist(), truth[contested].tolist()):
        if one_rank != last and one_truth not in served:
            served[one_truth] = last = one_rank
    hits = np.sort(np.append(rank[~contested][first], list(served.values())))          # ranks of the true positives
    precision = np.arange(1, len(hits) + 1) / (hits + 1.0)
    return np.maximum.accumulate(precision[::-1]).sum() / num_truth     # one division: a perfect result is exactly 1


def ranks(score):
    """Place of every score (n,) in descending order, stable -> (n,)."""
    rank = np.empty(len(score), np.int64)
    rank[np.argsort(-score, kind="stable")] = np.arange(len(score))
    return rank


def overlapping_pairs(group, box, truth_group, truth_box, num_groups, threshold):
    """Pairs of a detection and a ground truth of one group (frame) with IoU >= threshold -> (detection, truth, iou).

    group (n,) in -1 .. num_groups - 1, -1: a frame without ground truth; boxes (n, 4) and (m, 4)
    """
    by_group = np.argsort(truth_group, kind="stable")
    count = np.append(np.bincount(truth_group, minlength=num_groups), 0)    # the last entry is for group -1
    start = np.cumsum(count) - count
    several = count[group]
    detection = np.repeat(np.arange(len(group)), several)
    truth = by_group[np.arange(len(detection)) + (start[group] - np.cumsum(several) + several)[detection]]
    iou = box_iou(box[detection], truth_box[truth])
    keep = iou >= threshold
    return detection[keep], truth[keep], iou[keep]


def nanmean(values):
    """Mean of the values that are not NaN, NaN when there is none (np.nanmean would warn)."""
    values = [value for value in values if not np.isnan(value)]
    return float(np.mean(values)) if values else float("nan")


def mean_average_precision(frame, box, score, label, truth, classes, iou, rule, row=None):
    """-> {"mAP": mean over the classes with ground truth, "AP": {class: AP, NaN without}}. frame (n,) and score (n,), or
    (n, C) where label (n,) is None; box (n, 4), or one of several detections: row (n,) says which. truth: frame, box and
    label."""
    truth_frame, truth_box, truth_label = truth
    frames, truth_group = np.unique(truth_frame, return_inverse=True)
    group, result = find(frame, frames, "frame"), dict.fromkeys(classes, np.nan)
    for one in np.unique(truth_label).tolist():
        rows = np.arange(len(group)) if label is None else np.flatnonzero(label == one)
        place, boxes = truth_group[truth_label == one], truth_box[truth_label == one]
        own = box[rows if row is None else row[rows]]
        detection, found, overlap = overlapping_pairs(group[rows], own, place, boxes, len(frames), iou)
        _, first, same = np.unique(np.column_stack([place, boxes]), axis=0, return_index=True, return_inverse=True)
        rank = ranks(score[:, one] if label is None else score[rows])[detection]
        result[one] = float(average_precision(rank, found, overlap, rule, len(place), first[same.ravel()]))
    return {"mAP": nanmean(result.values()), "AP": result}


def frame_map(detections, ground_truth, num_classes, iou=0.5):
    """Frame mAP -> {"mAP": float, "AP": (C,) float64}; AP is NaN for a class without ground truth, mAP leaves it out.

    detections {"frame" (n,), "label" (n,), "score" (n,), "box" (n, 4)}, or dense {"frame" (n,), "scores" (n, C),
    "box" (n, 4)}: every box for every class, without C rows a box. ground_truth {"frame", "label", "box"}. Frames are
    integers or strings, the same in both. Both protocols: in descending score (stable) a detection takes the ground
    truth of its class and frame with the best plain IoU >= iou, among equal ones one that is still free; taken
    already: false positive. Frames without ground truth count.
    """
    names = ("frame", "box", "scores") if "scores" in detections else ("frame", "box", "score", "label")
    frame, box, score, *label = check_detections(detections, names, "detections")
    truth = check_detections(ground_truth, ("frame", "box", "label"), "ground truth")
    for labels, place in ((truth[2], "ground truth"), *((labels, "detections") for labels in label)):
        check_labels(labels, num_classes, place)
    if not label and score.shape != (len(frame), num_classes):
        raise ValueError(f"detections: scores of shape ({len(frame)}, {num_classes}) expected, got {score.shape}")
    label = label[0] if label else None
    result = mean_average_precision(frame, box, score, label, truth, range(num_classes), iou, "best")
    return {**result, "AP": np.array(list(result["AP"].values()))}


# ---- linking boxes to tubes ---------------------------------------------------------------------------------------

def frame_table(video, frame):
    """Rows of detections by frame -> videos (V,), their first and number of entries in `table`, table (F, A) of rows
    (-1: none) and the frame numbers (F,); frames in the order of video and number."""
    videos, video_index = np.unique(video, return_inverse=True)
    order = np.lexsort((frame, video_index))
    starts, lengths = runs(video_index[order], frame[order])
    table = np.full((len(starts), lengths.max(initial=0)), -1, np.int64)
    entry = np.repeat(np.arange(len(starts)), lengths)
    table[entry, np.arange(len(order)) - starts[entry]] = order
    return videos, *runs(video_index[order][starts]), table, frame[order][starts]


def soft_nms(boxes, scores):
    """ACT's: in descending score, a box that no better one has touched multiplies the scores of the untouched boxes
    with IoU > 0.6 by 1 - IoU, once a box; the best of them then are kept.
    boxes (V, A, 4), scores (V, C, A), -1: no box -> slots and scores (V, C, K) in descending order."""
    overlap = box_iou(boxes[:, :, None], boxes[:, None], plus_one=1)        # (V, A, A)
    near, factor = (overlap > SOFT_NMS_IOU) & ~np.eye(overlap.shape[1], dtype=bool), 1 - overlap
    video, label = np.ogrid[:scores.shape[0], :scores.shape[1]]
    order = np.argsort(-scores, axis=2, kind="stable")
    touched = scores < 0
    for place in range(scores.shape[2]):
        box = order[..., place]                                             # (V, C)
        hit = near[video, box] & ~(touched | touched[video, label, box][..., None])     # (V, C, A)
        scores = np.where(hit, scores * factor[video, box], scores)
        touched |= hit
        touched[video, label, box] = True
    slots = np.argsort(-scores, axis=2, kind="stable")[..., :KEPT_BOXES]
    return slots, np.take_along_axis(scores, slots, 2)


def assign(tube_box, alive, tube_order, boxes, present):
    """Tubes in their order each take the first box (boxes stand in descending score) that is free and has
    IoU >= 0.5 with theirs. tube_box (V, C, L, 4), alive and tube_order (V, C, L), boxes (V, C, K, 4), present
    (V, C, K) -> owner (V, C, K): the tube a box goes to, -1: none."""
    fits = box_iou(tube_box[..., :, None, :], boxes[..., None, :, :]) >= LINK_IOU   # (V, C, L, K)
    fits = np.take_along_axis(fits & alive[..., None] & present[:, :, None], tube_order[..., None], 2)
    owner = np.full(present.shape, -1)
    for place in range(tube_order.shape[2]):
        can = fits[:, :, place] & (owner < 0)                               # (V, C, K)
        one = np.nonzero(can.any(2))
        owner[one + (can[one].argmax(1),)] = tube_order[..., place][one]
    return owner


def link_batch(first, count, table, number, box, class_prob, conf, min_score, max_gap):
    """Greedy linking of V videos side by side, all classes at once, one step a frame. first, count (V,), count
    descending: a video's part of table (F, A) and of the frame numbers (F,). -> one entry a linked box: tube (N,), row
    (N,), score (N,), in the order of the frames; and video (M,), label (M,) of the tubes."""
    classes, kept = class_prob.shape[1], min(KEPT_BOXES, table.shape[1])
    shape = (len(first), classes, kept * max_gap)
    live = {"tube": np.full(shape, -1), "box": np.zeros(shape + (4,)), "last": np.zeros(shape, np.int64),
            "total": np.zeros(shape), "length": np.ones(shape)}
    linked, born, tubes = [], [], 0
    for step in range(count[0]):
        videos = np.count_nonzero(count > step)
        rows, now = table[first[:videos] + step], number[first[:videos] + step][:, None, None]
        boxes = box[rows].astype(np.float64)                                # (V, A, 4)
        scores = class_prob[rows] * conf[rows][..., None].astype(np.float64)
        scores = np.where((rows < 0)[..., None] | (scores < min_score), -1.0, scores).transpose(0, 2, 1)  # (V, C, A)
        slots, values = soft_nms(boxes, scores)                             # (V, C, K)
        present = values >= 0
        video = np.arange(videos)[:, None, None]
        boxes, rows = boxes[video, slots], rows[video, slots]               # (V, C, K, 4), (V, C, K)
        live = {name: array[:videos] for name, array in live.items()}
        alive = (live["tube"] >= 0) & (now - live["last"] <= max_gap)       # (V, C, L)
        mean = np.where(alive, live["total"] / live["length"], -1.0)
        owner = assign(live["box"], alive, np.argsort(-mean, axis=2, kind="stable"), boxes, present)
        fresh = present & (owner < 0)
        tube, total, length = (np.where(owner < 0, none, np.take_along_axis(live[name], owner, 2))
                               for name, none in (("tube", -1), ("total", 0), ("length", 0)))
        tube[fresh] = tubes + np.arange(np.count_nonzero(fresh))
        tubes += np.count_nonzero(fresh)
        born.append(np.stack(np.nonzero(fresh)[:2]).astype(np.int32))
        linked.append((tube[present].astype(np.int32), rows[present].astype(np.int32), values[present]))
        state = {"tube": tube, "box": boxes, "last": np.broadcast_to(now, tube.shape), "total": total + values,
                 "length": length + 1}
        # Behind the tubes of this frame's boxes stand those of the last max_gap - 1 frames that got none here.
        waiting = {name: array[:, :, :kept * (max_gap - 1)] for name, array in live.items()}
        waiting["tube"] = np.where((waiting["tube"][..., None] == tube[:, :, None]).any(3), -1, waiting["tube"])
        live = {name: np.concatenate([state[name], waiting[name]], 2) for name in state}
    tube, row, score = (np.concatenate(part) for part in zip(*linked))
    video, label = np.concatenate(born, 1)
    return tube, row, score, video, label


def tube_list(tube, row, score, video, label, frame, box, min_length):
    """Linked boxes -> tubes; those shorter than min_length frames or with a mean score below 0.005 are left out."""
    order = np.argsort(tube, kind="stable")
    tube, row = tube[order], row[order]
    starts, lengths = runs(tube)
    mean = np.add.reduceat(score[order], starts) / lengths
    keep = (frame[row[starts + lengths - 1]] - frame[row[starts]] + 1 >= min_length) & (mean >= MIN_TUBE_SCORE)
    row, ends = row[np.repeat(keep, lengths)], np.cumsum(lengths[keep])
    facts = (part[keep].tolist() for part in (video, label, mean))
    tubes = zip(*facts, np.split(frame[row], ends), np.split(box[row], ends))
    return [dict(zip(("video", "label", "score", "frames", "boxes"), tube)) for tube in tubes]


def link_strict(detections, min_score, max_gap, min_length):
    """`link_tubes` by plain rules: the videos with most frames first, VIDEOS_AT_ONCE of them side by side."""
    video, frame, box, *scores = detections
    videos, first, count, table, number = frame_table(video, frame)
    tubes, longest = [], np.argsort(-count, kind="stable")
    for batch in np.split(longest, range(0, len(videos), VIDEOS_AT_ONCE))[1:]:       # at: of a tube's video in it
        tube, row, score, at, label = link_batch(first[batch], count[batch], table, number, box, *scores, min_score, max_gap)
        tubes += tube_list(tube, row, score, videos[batch][at], label, frame, box, min_length)
    return tubes


def best_paths(boxes, scores, present, count=3):
    """Paths through all frames with the largest sum of IoU + s1 + s2 + s1 * s2 / 2 over neighbouring frames, one after
    the other without the boxes of the former, until a frame is empty; P problems side by side.
    boxes (P, T, A, 4), scores and present (P, T, A) -> list of (which of the problems, slots (T,)), an entry a path."""
    first, second = scores[:, :-1, :, None], scores[:, 1:, None, :]
    edge = box_iou(boxes[:, :-1, :, None], boxes[:, 1:, None, :]) + first + second + 0.5 * first * second  # (P, T - 1, A, A)
    closed = np.where(present, 0, -np.inf)                                  # (P, T, A): no box, or a former path has it
    found, problems, length = [], np.arange(len(scores)), scores.shape[1]
    for _ in range(count):
        total = closed[:, -1]
        following = np.zeros(scores.shape, np.int64)
        for step in range(length - 2, -1, -1):
            sums = edge[:, step] + total[:, None]                           # (P, A, A)
            following[:, step] = sums.argmax(2)
            total = sums.max(2) + closed[:, step]
        slots = np.zeros((len(scores), length), np.int64)
        slots[:, 0] = total.argmax(1)
        for step in range(length - 1):
            slots[:, step + 1] = following[problems, step, slots[:, step]]
        complete = np.flatnonzero((closed == 0).any(2).all(1))
        found += zip(complete, slots[complete])
        closed[problems[:, None], np.arange(length), slots] = -np.inf
    return found


def trim(boxes, scores, protocol, first, count):
    """class-query-vad's temporal trimming of a path through all T frames -> the range of rows, the scores (T,).

    ucf: `count` rows (frames of the class with a box) from row `first`, that is the 1-based number of the first such
    frame: a tube starts one frame late. jhmdb: scores of boxes with IoU < 0.3 to the one before are negated; the run
    with the largest sum of score - mean is widened at both sides by half of what the video is longer.
    """
    length = len(scores)
    if protocol == "released_ucf":
        return min(first, length), min(first + count, length), scores
    scores = np.where(np.append(False, box_iou(boxes[1:], boxes[:-1], plus_one=1) < 0.3), -scores, scores)
    sums = np.append(0, np.cumsum(scores - scores.mean()))
    last = (sums[1:] - np.minimum.accumulate(sums[:-1])).argmax()
    begin = sums[:last + 1].argmin()
    half = (length - (last - begin)) // 2
    return max(begin - half, 0), min(last + half, length), scores


def released_tubes(rows, box, scores, enters, protocol):
    """class-query-vad's tubes of one video: rows (T, A) of detections (-1: none), scores and enters (T, A, C)."""
    enters = enters.transpose(2, 0, 1)                                      # (C, T, A)
    labels = np.flatnonzero(enters.any((1, 2)))
    has = enters[labels].any(2)                                             # (P, T): class has a box in this frame
    steps = np.arange(has.shape[1])
    borrowed = np.where(has[:, None], abs(steps[:, None] - steps), len(steps)).argmin(2)    # (P, T): nearest, earlier
    rows = rows[borrowed]                                                   # (P, T, A)
    scores = scores.transpose(2, 0, 1)[labels[:, None], borrowed]           # (P, T, A)
    paths = {}
    for one, slots in best_paths(box[rows], scores, enters[labels[:, None], borrowed]):
        paths.setdefault(one, []).append((scores[one, steps, slots], box[rows[one, steps, slots]]))
    tubes = []
    for one, candidates in paths.items():
        kept = []
        for score, boxes in sorted(candidates, key=lambda path: -path[0].mean()):
            if all(box_iou(boxes, other, plus_one=1).mean() <= 0.3 for other in kept):
                kept.append(boxes)
                start, end, score = trim(boxes, score, protocol, has[one].argmax() + 1, np.count_nonzero(has[one]))
                if end > start:     # a tube that is trimmed to nothing cannot match
                    tubes.append({"label": int(labels[one]), "score": float(score[start:end].mean()),
                                  "frames": np.arange(start, end) + 1, "boxes": boxes[start:end]})
    return tubes


def link_released(detections, protocol, num_frames):
    """`link_tubes` as the released code does it, best paths through all frames; one video after the other."""
    video, frame, box, class_prob, conf = detections
    videos, first, count, table, number = frame_table(video, frame)
    tubes = []
    for one, start, end in zip(videos.tolist(), first, first + count):
        length = number[end - 1] if num_frames is None else num_frames[one]
        if number[start] < 1 or number[end - 1] > length:
            raise ValueError(f"detections: video {one} has frames {number[start]}..{number[end - 1]}, "
                             f"but 1..{length} are its frames (num_frames)")
        rows = np.full((length, table.shape[1]), -1)
        rows[number[start:end] - 1] = table[start:end]
        prob, person = class_prob[rows], conf[rows][..., None]              # (T, A, C), (T, A, 1)
        enters = np.repeat((rows >= 0)[..., None], prob.shape[2], 2)        # (T, A, C)
        if protocol == "released_ucf":
            enters &= (prob.argmax(2)[..., None] == np.arange(prob.shape[2])) & (person >= 0.7)
        tubes += [{"video": one, "protocol": protocol, **tube}
                  for tube in released_tubes(rows, box, prob * person.astype(np.float64), enters, protocol)]
    return tubes


def full_name(protocol, num_classes):
    """-> strict, released_ucf or released_jhmdb; class-query-vad has one evaluator a dataset, told by the classes."""
    if protocol == "released":
        return "released_jhmdb" if num_classes == 21 else "released_ucf"
    if protocol not in ("strict", "released_ucf", "released_jhmdb"):
        raise ValueError(f"protocol {protocol!r}: strict, released, released_ucf or released_jhmdb expected")
    return protocol


def link_tubes(detections, protocol="strict", min_score=0.0, max_gap=1, min_length=15, num_frames=None):
    """Boxes of frames to tubes -> list of {"video", "label", "score", "frames" (k,), "boxes" (k, 4)}.

    detections {"video" (n,), "frame" (n,) integers, "box" (n, 4), "class_prob" (n, C), "conf" (n,)}

    strict: ACT's online linking with K = 1. A box's score is class_prob * conf, boxes below min_score are left out; per
    frame and class the 10 best boxes after soft NMS. Live tubes, by descending mean score, each take the best box that
    is free and has plain IoU >= 0.5 with their last one; boxes that are left start tubes. A tube ends after max_gap
    frames without a match (`frames` has only those with a box); those shorter than min_length frames or with a mean
    score below 0.005 are left out.

    released (released_ucf, released_jhmdb; "released" takes jhmdb's for 21 classes): class-query-vad's linking, its
    constants fixed. ucf: a box enters for its best class if conf >= 0.7; jhmdb: every box for every class. Frames
    without boxes borrow the nearest one's; up to 3 best paths a class through the whole video, NMS of tubes at 0.3,
    trimming. num_frames {video: frames} of the videos, by default the last frame with a detection. Such tubes carry
    "protocol", so that video_map scores them by the same rules.
    """
    arrays = check_detections(detections, ("video", "frame", "box", "class_prob", "conf"), "detections")
    protocol = full_name(protocol, np.shape(arrays[3])[-1])
    if protocol == "strict":
        return link_strict(arrays, min_score, max_gap, min_length)
    return link_released(arrays, protocol, num_frames)


# ---- video mAP ----------------------------------------------------------------------------------------------------

def tube_overlaps(tubes, truth, protocol):
    """Spatio-temporal IoU of every tube with one ground truth (table above) -> (number of tubes,)"""
    starts = np.cumsum([0, *(len(tube["frames"]) for tube in tubes[:-1])])
    frames, boxes = (np.concatenate([tube[name] for tube in tubes]) for name in ("frames", "boxes"))
    order = np.argsort(truth["frames"], kind="stable")
    truth_frames = np.asarray(truth["frames"])[order]
    place = np.minimum(np.searchsorted(truth_frames, frames), len(truth_frames) - 1)
    common = truth_frames[place] == frames
    iou = np.zeros(len(frames))
    iou[common] = box_iou(boxes[common], np.asarray(truth["boxes"])[order[place[common]]], int(protocol != "strict"))
    spatial = np.add.reduceat(iou, starts) / np.maximum(np.add.reduceat(common, starts, dtype=np.int64), 1)
    if protocol == "released_jhmdb":
        return spatial
    first, last = np.minimum.reduceat(frames, starts), np.maximum.reduceat(frames, starts)
    overlap = np.minimum(last, truth_frames[-1]) - np.maximum(first, truth_frames[0]) + 1
    union = np.maximum(last, truth_frames[-1]) - np.minimum(first, truth_frames[0]) + 1
    return np.where(overlap > (protocol == "released_ucf"), spatial * overlap / union, 0)


def tube_pairs(tubes, truths, protocol):
    """Every tube with every ground truth of its video and class -> (tube, truth, overlap), three vectors"""
    groups, pairs = {}, []
    for index, tube in enumerate(tubes):
        groups.setdefault((tube["video"], tube["label"]), []).append(index)
    for index, truth in enumerate(truths):
        if group := groups.get((truth["video"], truth["label"])):
            overlap = tube_overlaps([tubes[one] for one in group], truth, protocol)
            pairs.append((np.array(group), np.full(len(group), index), overlap))
    return [np.concatenate(part) for part in zip(*pairs)] or [np.zeros(0, np.int64)] * 2 + [np.zeros(0)]


def check_tubes(tubes, num_classes, place):
    """ValueError for a tube without frames, with other numbers of frames and boxes, or of an unknown class -> labels"""
    for index, tube in enumerate(tubes):
        frames, boxes = len(tube["frames"]), len(tube["boxes"])
        if not 0 < frames == boxes:
            raise ValueError(f"{place} {index} has {frames} frames and {boxes} boxes; as many of both expected, not 0")
    labels = np.array([tube["label"] for tube in tubes], np.int64)
    check_labels(labels, num_classes, place)
    return labels


def video_map(tubes, ground_truth_tubes, num_classes, iou=0.5, protocol=None):
    """Video mAP -> {"mAP": float, "AP": (C,)}; iou a number, or a sequence: then both are means over it.

    tubes {"video", "label", "score", "frames" (k,), "boxes" (k, 4)}, ground truth the same without score.
    strict: matching and AP as for frames, with the mean plain IoU over common frames x temporal IoU (frames counted
    inclusively) of tubes of one video and class. released (released_ucf, released_jhmdb): class-query-vad's columns of
    the table above. None: the protocol the tubes were linked by, strict for tubes that do not say.
    """
    protocol = full_name(protocol or (tubes[0].get("protocol", "strict") if len(tubes) else "strict"), num_classes)
    rule, missing, surplus = ("best", np.nan, 0) if protocol == "strict" else ("free", 0.0, 1e-5)
    thresholds = np.atleast_1d(np.asarray(iou, np.float64))
    labels = check_tubes(tubes, num_classes, "tube")
    truth_labels = check_tubes(ground_truth_tubes, num_classes, "ground-truth tube")
    scores = np.array([tube["score"] for tube in tubes], np.float64)
    copies = {}
    keys = [(truth["video"], truth["label"], *(np.asarray(truth[name]).tobytes() for name in ("frames", "boxes")))
            for truth in ground_truth_tubes]
    original = np.array([copies.setdefault(key, index) for index, key in enumerate(keys)], np.int64)
    tube, truth, overlap = tube_pairs(tubes, ground_truth_tubes, protocol)
    result = np.full((len(thresholds), num_classes), missing)
    rank = np.empty(len(tubes), np.int64)
    for label in np.unique(truth_labels).tolist():
        rank[labels == label] = ranks(scores[labels == label])
        number = np.count_nonzero(truth_labels == label) + surplus
        for row, threshold in zip(result, thresholds):
            keep = (truth_labels[truth] == label) & (overlap >= threshold)
            row[label] = average_precision(rank[tube[keep]], truth[keep], overlap[keep], rule, number, original)
    return {"mAP": nanmean([nanmean(row) for row in result]), "AP": result.mean(0)}


# ---- AVA ----------------------------------------------------------------------------------------------------------

AVA_COLUMNS = {"detections": "video,timestamp,x1,y1,x2,y2,action_id,score", "excluded": "video,timestamp",
               "ground truth": "video,timestamp,x1,y1,x2,y2,action_id,person_id"}


def read_ava_csv(path, kind):
    """AVA's csv without header -> {"video", "timestamp"}, and unless kind is "excluded" {"box", "label", "score"}.
    A faulty row raises ValueError with its line. Ground truth may list empty key frames in two columns. Arrays in place
    of the path come back as they are."""
    if not isinstance(path, (str, os.PathLike)):
        return path
    columns = AVA_COLUMNS[kind].split(",")
    used = len(columns) - (kind == "ground truth")      # person_id is not needed
    videos, lines, values = [], array("q"), array("d")
    fault = lambda line, what: ValueError(f"{path}, line {line}: {what}; rows of {AVA_COLUMNS[kind]} expected")
    with open(path, encoding="utf-8", newline="") as file:
        for line, row in enumerate(csv.reader(file), 1):
            if len(row) == 2 and kind == "ground truth":
                continue
            if len(row) != len(columns):
                raise fault(line, f"{len(row)} columns")
            try:
                values.extend(map(float, row[1:used]))
            except ValueError as error:
                raise fault(line, error) from error
            videos.append(sys.intern(row[0]))
            lines.append(line)
    numbers = np.array(values).reshape(-1, used - 1)
    for what, bad in (("a number that is not finite", ~np.isfinite(numbers).all(1)),
                      ("x2 < x1 or y2 < y1", (numbers[:, 3:5] < numbers[:, 1:3]).any(1)),
                      ("a timestamp or action_id that is not a whole number", np.modf(numbers[:, ::5])[0].any(1))):
        if bad.any():
            raise fault(lines[bad.argmax()], what)
    table = {"video": np.array(videos, object), "timestamp": numbers[:, 0].astype(np.int64)}
    return table if used == 2 else {**table, "box": numbers[:, 1:5], "label": numbers[:, 5].astype(np.int64),
                                    "score": numbers[:, 6:].sum(1)}


def read_label_map(path):
    """Action ids of a label map (pbtxt with `id:` or `label_id:`), or of a sequence of them -> sorted list"""
    if not isinstance(path, (str, os.PathLike)):
        return sorted(map(int, path))
    with open(path, encoding="utf-8") as file:
        ids = re.findall(r"\b(?:label_)?id:\s*(\d+)", re.sub(r'"[^"\n]*"', "", file.read()))
    if not ids:
        raise ValueError(f"{path}: no `id: N` found; a label map of blocks item {{ name: \"...\" id: N }} expected")
    return sorted(set(map(int, ids)))


def key_frames(table, videos):
    """Key frames (n,) int64 of rows with a video and a timestamp; videos {name: number} grows by those that are new."""
    video, timestamp = np.asarray(table["video"]), np.asarray(table["timestamp"]).astype(np.int64)
    starts, lengths = runs(video)
    numbers = np.array([videos.setdefault(name, len(videos)) for name in video[starts].tolist()], np.int64)
    return np.repeat(numbers, lengths) * 1_000_000 + timestamp


def best_rows(frame, score, cap):
    """Mask (n,) of the `cap` rows of every frame with the highest scores, among equal ones the earlier."""
    order = np.argsort(frame, kind="stable")
    starts, _ = runs(frame[order])
    mask = np.zeros(len(frame), bool)
    step = max(1, (len(starts) << 22) // max(len(frame), 1))                # whole frames, some 4 M rows at once
    for rows in np.split(order, starts[step::step]):
        rows = rows[np.lexsort((-score[rows], frame[rows]))]
        first, lengths = runs(frame[rows])
        mask[rows[np.arange(len(rows)) - np.repeat(first, lengths) < cap]] = True
    return mask


def ava_map(detections_csv, ground_truth_csv, label_map, excluded=None, cap=50):
    """AVA's mAP at IoU 0.5 -> {"mAP", "AP": {action id: AP}}; AP is NaN without ground truth, mAP leaves it out.

    The rules of the official script (ActivityNet 3fee089; cap=None: be7854e, STMixer, class-query-vad): rows outside
    the label map's classes and at excluded time stamps are dropped on both sides; of every key frame the `cap` best
    (box, class) rows count; in descending score a detection takes its best ground truth (the first of equal ones),
    taken already: false positive. Key frames without ground truth count.

    Paths of csv files (a faulty row is a ValueError with file and line), or arrays {"video", "timestamp", "box",
    "label", "score"}, or dense detections {"video", "timestamp", "box" (n, 4), "scores" (n, C)}, column k of action id
    k + 1; `excluded` a csv or {"video", "timestamp"}; label_map a pbtxt file or a sequence of ids.
    """
    classes = read_label_map(label_map)
    found, truth = read_ava_csv(detections_csv, "detections"), read_ava_csv(ground_truth_csv, "ground truth")
    dropped = {"video": [], "timestamp": []} if excluded is None else read_ava_csv(excluded, "excluded")
    names = ("scores",) if "scores" in found else ("score", "label")
    _, _, box, score, *label = check_detections(found, ("video", "timestamp", "box", *names), "detections")
    _, _, truth_box, truth_label = check_detections(truth, ("video", "timestamp", "box", "label"), "ground truth")
    videos = {}
    frame, truth_frame = key_frames(found, videos), key_frames(truth, videos)
    dropped = np.unique(key_frames(dropped, videos))
    if len(set(map(type, videos))) > 1:
        raise ValueError("videos are numbers in one of detections, ground truth and exclusions and names in another")
    kept = np.isin(truth_label, classes) & (find(truth_frame, dropped, "video") < 0)
    if not kept.any():
        raise ValueError("ground truth: no row of the label map's classes is left; nothing can be evaluated")
    truth = truth_frame[kept], truth_box[kept], truth_label[kept]
    row = np.arange(len(box), dtype=np.int32)       # of the box of every detection
    if not label:
        if score.shape[1] < classes[-1]:
            raise ValueError(f"detections: {score.shape[1]} columns of scores, but an action id {classes[-1]}")
        row, label = np.repeat(row, len(classes)), [np.tile(np.array(classes, np.int16), len(box))]
        score, frame = score[:, np.array(classes) - 1].ravel(), frame[row]              # (n * classes,)
    label = label[0]
    kept = np.flatnonzero(np.isin(label, classes) & (find(frame, dropped, "video") < 0)).astype(np.int32)
    if cap is not None:
        kept = kept[best_rows(frame[kept], score[kept], cap)]
    frame, score, label, row = (part[kept] for part in (frame, score, label, row))
    return mean_average_precision(frame, box, score, label, truth, classes, 0.5, "first", row)
