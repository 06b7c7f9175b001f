"""Frame mAP, tube linking, video mAP and AVA's mAP (Sec. 5.1). Plain numpy; AP in float64.

Boxes are x1, y1, x2, y2. Frames and videos are integers or strings.

The paper takes a query's boxes in the frames of a clip as one tube. Here, as in the released
evaluation, they are not: the boxes of all frames are linked anew.

evaluate.py chooses: the 60 classes of AVA that count and how many rows of a key frame, the true
boxes of Table 7 (--oracle), the shortest tube. Clips play no part here: each frame of a video comes
from exactly one (data.py). Excluded seconds of AVA are dropped by `ava_map`'s argument, and by
beside/sources.py where the annotation is read.

Two protocols. `strict` is this project's own, the same for every data set that has tubes;
`released` has the rules of the code that made the paper's tables, so that a released checkpoint
gives the released numbers. The linking of `strict` is ACT's (Kalogeiton et al., ICCV 2017):

             strict                              released (the authors' code)
frame mAP    plain IoU, best ground truth,       the same
             taken already: false positive
linking      greedy in time, every class,        best paths through all frames, NMS of tubes,
             soft NMS                            trimming
tube IoU     mean plain IoU over common          pixels inclusive (+1 on width and height); JHMDB:
             frames x temporal IoU, frames       no temporal IoU; UCF: a single common frame
             inclusive                           counts as no overlap
tube match   best ground truth, taken            best ground truth that is still free
             already: false positive
AP           all-point with the envelope         the same, recall = tp / (n + 1e-5)
no truth     class is NaN and left out of        class counts as 0
             the mean
AVA          50 best (box, class) rows of a      all rows of a key frame
             key frame (the official script)
"""
# n detections or boxes, F frames of a video that have detections, T all frames of it, C classes,
# A boxes of a frame (padded), L live tubes of a class, R frames before this one that they end in

import os
from pathlib import Path

import numpy as np

from beside.sources import read_label_map, read_rows

SOFT_NMS_IOU = 0.6          # of boxes that overlap by more, the better one lowers the other's score
KEPT_BOXES = 10             # of a frame and class, after soft NMS
LINK_IOU = 0.5              # of a tube's last box and the box that it takes
MIN_TUBE_SCORE = 0.005
FRAMES_AT_ONCE = 64         # in soft NMS: enough to fill numpy's calls, few enough for the cache


def box_iou(first, second, plus_one=0):
    """IoU of boxes (..., 4) that broadcast -> (...), float64; 0 where both are empty.

    plus_one=1 counts pixels inclusively.
    """
    first, second = np.asarray(first, np.float64), np.asarray(second, np.float64)
    width = np.minimum(first[..., 2], second[..., 2]) - np.maximum(first[..., 0], second[..., 0])
    height = np.minimum(first[..., 3], second[..., 3]) - np.maximum(first[..., 1], second[..., 1])
    overlap = np.maximum(width + plus_one, 0) * np.maximum(height + plus_one, 0)
    union = box_area(first, plus_one) + box_area(second, plus_one) - overlap
    return np.divide(overlap, union, out=np.zeros_like(overlap), where=union > 0)


def box_area(box, plus_one):
    """Area of boxes (..., 4) -> (...)."""
    return (box[..., 2] - box[..., 0] + plus_one) * (box[..., 3] - box[..., 1] + plus_one)


# ---- what is given ------------------------------------------------------------------------------

def check_boxes(box, place):
    """ValueError naming the first row of box (n, 4) that is not finite, or x2 < x1 or y2 < y1."""
    if box.ndim != 2 or box.shape[1] != 4:
        raise ValueError(f"{place}: boxes (n, 4) of x1, y1, x2, y2 expected, got {box.shape}")
    for start in range(0, len(box), 1 << 21):           # a part at a time, for memory
        part = box[start:start + (1 << 21)]
        bad = ~np.isfinite(part).all(1) | (part[:, 2:] < part[:, :2]).any(1)
        if bad.any():
            row = bad.argmax()
            raise ValueError(f"{place}, row {start + row}: box {part[row]} is not finite, "
                             "or x2 < x1 or y2 < y1")


def check_detections(detections, needed, place):
    """The arrays of `detections` named in `needed`, checked: equal length, finite, sound boxes."""
    missing = [name for name in needed if name not in detections]
    if missing:
        raise ValueError(f"{place} lack {missing}; they need {needed}")
    arrays = {name: np.asarray(detections[name]) for name in needed}
    if arrays["box"].size == 0:
        arrays["box"] = arrays["box"].reshape(-1, 4)
    lengths = {name: len(array) for name, array in arrays.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"{place}: lengths differ: {lengths}")
    check_boxes(arrays["box"], place)
    for name in ("score", "scores", "class_prob", "conf"):
        if name in arrays and not np.isfinite(arrays[name].sum(dtype=np.float64)):
            row = np.argwhere(~np.isfinite(arrays[name]))[0][0]
            raise ValueError(f"{place}, row {row}: {name} is not a finite number")
    return list(arrays.values())


def check_labels(label, num_classes, place):
    """ValueError for a class outside of 0..C-1."""
    bad = (label < 0) | (label >= num_classes)
    if bad.any():
        row = bad.argmax()
        raise ValueError(f"{place}, row {row}: class {label[row]} is not one of the classes "
                         f"0..{num_classes - 1}")


def runs(*keys):
    """Starts and lengths of the runs of equal keys (n,)."""
    changed = np.ones(len(keys[0]), bool)
    changed[1:] = np.any([key[1:] != key[:-1] for key in keys], axis=0)
    starts = np.flatnonzero(changed)
    return starts, np.diff(starts, append=len(changed))


def number_frames(*tables):
    """The frame of every row of several tables as an integer, the same for the same frame.

    A frame is a pair of "video" and "frame" (AVA: "timestamp"), or "frame" alone where the tables
    have one video. -> an int64 array (n,) for each table, and the number of different frames.
    """
    columns = [name for name in ("video", "frame", "timestamp") if name in tables[0]]
    starts, lengths = [], []            # rows of one frame mostly stand together: one look-up a run
    for table in tables:
        if [name for name in ("video", "frame", "timestamp") if name in table] != columns:
            raise ValueError(f"frames are told by {columns} in one table, not in another")
        start, length = runs(*(np.asarray(table[name]) for name in columns))
        starts.append(start)
        lengths.append(length)
    number = 0
    for name in columns:
        values = [np.asarray(table[name])[start] for table, start in zip(tables, starts)]
        values = [part for part in values if len(part)] or values       # [] would be of floats
        if len({part.dtype.kind in "iu" for part in values}) > 1:
            raise ValueError(f"{name}: integers in one table and {values[0].dtype} and "
                             f"{values[-1].dtype} in others; none would match")
        distinct, place = np.unique(np.concatenate(values), return_inverse=True)
        number = number * len(distinct) + place         # below (rows)^2: it does not overflow
    distinct, number = np.unique(number, return_inverse=True)
    parts = np.split(number, np.cumsum([len(start) for start in starts])[:-1])
    return *(np.repeat(part, length) for part, length in zip(parts, lengths)), len(distinct)


# ---- matching and average precision, the same for boxes and tubes -------------------------------

def average_precision(rank, truth, iou, rule, num_truth, original):
    """Area under the all-point precision envelope of pairs (p,) of a detection and a ground truth.

    rank: of the detection by descending score, from 0; truth: index of the ground truth; iou:
    theirs, at or above the threshold. num_truth: number of ground truths, found or not.

    rule "best": a detection takes its best ground truth, among equal ones one that is still free;
    "first": among equal ones the first (the official AVA script); "free": its best of those that
    are still free (class-query-vad's tubes). original (m,), for "best": the first ground truth
    that is the same as the m-th. Where an actor is annotated twice, a detection takes the second
    copy only if it is that very box or tube: the truth itself scores 1, and of two different boxes
    around the one actor the second is a false positive, as with every peer.
    """
    if rule == "best":
        truth = np.where(iou < 1, original[truth], truth)
    order = np.lexsort((truth, -iou, rank))
    rank, truth, iou = rank[order], truth[order], iou[order]
    starts, lengths = runs(rank)
    if rule == "first":
        rank, truth = rank[starts], truth[starts]
    elif rule == "best":
        best = iou == np.repeat(iou[starts], lengths)
        rank, truth = rank[best], truth[best]
    taken, hits = set(), [-1]           # hits: ranks of the true positives; -1 is none
    for one_rank, one_truth in zip(rank.tolist(), truth.tolist()):
        if one_rank != hits[-1] and one_truth not in taken:
            taken.add(one_truth)
            hits.append(one_rank)
    precision = np.arange(1, len(hits)) / (np.array(hits[1:]) + 1.0)
    # one division: a perfect result is exactly 1
    return np.maximum.accumulate(precision[::-1]).sum() / num_truth


def ranks(score):
    """Place of every score (n,) in descending order, stable -> (n,)."""
    rank = np.empty(len(score), np.int64)
    rank[np.argsort(-score, kind="stable")] = np.arange(len(score))
    return rank


def overlapping_pairs(frame, box, truth_frame, truth_box, num_frames, threshold):
    """Pairs of a detection and a ground truth of one frame with IoU >= threshold.

    frame (n,) and truth_frame (m,) in 0 .. num_frames - 1, boxes (n, 4) and (m, 4)
    -> (detection, truth, iou), three vectors
    """
    by_frame = np.argsort(truth_frame, kind="stable")
    count = np.bincount(truth_frame, minlength=num_frames)
    start = np.cumsum(count) - count                    # of a frame's ground truths in by_frame
    several = count[frame]                              # (n,) ground truths that a detection meets
    detection = np.repeat(np.arange(len(frame)), several)
    within = np.arange(len(detection)) - np.repeat(np.cumsum(several) - several, several)
    truth = by_frame[start[frame[detection]] + within]
    iou = box_iou(box[detection], truth_box[truth])
    keep = iou >= threshold
    return detection[keep], truth[keep], iou[keep]


def nanmean(values):
    """Mean of the values that are not NaN, NaN when there is none (np.nanmean would warn)."""
    values = [value for value in values if not np.isnan(value)]
    return float(np.mean(values)) if values else float("nan")


def mean_average_precision(frame, box, score, label, truth, num_frames, classes, iou, rule,
                           row=None):
    """-> {"mAP": mean over the classes with ground truth, "AP": {class: AP, NaN without}}.

    frame (n,) in 0 .. num_frames - 1 and score (n,), or (n, C) where label (n,) is None; box (n,
    4), or fewer that several detections share: row (n,) says which. truth: frame, box and label.
    """
    truth_frame, truth_box, truth_label = truth
    result = dict.fromkeys(classes, np.nan)
    for one in np.unique(truth_label).tolist():
        rows = np.arange(len(frame)) if label is None else np.flatnonzero(label == one)
        of_class = truth_label == one
        own = box[rows if row is None else row[rows]]
        own_truth, own_frame = truth_box[of_class], truth_frame[of_class]
        detection, found, overlap = overlapping_pairs(
            frame[rows], own, own_frame, own_truth, num_frames, iou)
        boxes = np.column_stack([own_frame, own_truth])
        _, first, same = np.unique(boxes, axis=0, return_index=True, return_inverse=True)
        original = first[same.ravel()]
        rank = ranks(score[:, one] if label is None else score[rows])[detection]
        area = average_precision(rank, found, overlap, rule, len(own_truth), original)
        result[one] = float(area)
    return {"mAP": nanmean(result.values()), "AP": result}


def frame_map(detections, ground_truth, num_classes, iou=0.5):
    """Frame mAP -> {"mAP": float, "AP": (C,) float64}; a class without ground truth is NaN in AP
    and left out of mAP.

    detections {"frame" (n,), "label" (n,), "score" (n,), "box" (n, 4)}, or dense {"frame" (n,),
    "scores" (n, C), "box" (n, 4)}: every box for every class, without C rows a box. ground_truth
    {"frame", "label", "box"}. Both may have "video" (n,): a frame is then the pair of video and
    frame. Either is of integers or of strings, the same in both.

    Both protocols: in descending score (stable) a detection takes the ground truth of its class and
    frame with the best plain IoU >= iou, among equal ones one that is still free; taken already:
    false positive. Frames without ground truth count.
    """
    dense = "scores" in detections
    needed = ("frame", "box", "scores") if dense else ("frame", "box", "score", "label")
    _, box, score, *rest = check_detections(detections, needed, "detections")
    label = None if dense else rest[0]
    _, *truth = check_detections(ground_truth, ("frame", "box", "label"), "ground truth")
    check_labels(truth[1], num_classes, "ground truth")
    if not dense:
        check_labels(label, num_classes, "detections")
    elif score.shape != (len(box), num_classes):
        raise ValueError(f"detections: scores of shape ({len(box)}, {num_classes}) expected, "
                         f"got {score.shape}")
    frame, truth_frame, num_frames = number_frames(detections, ground_truth)
    result = mean_average_precision(frame, box, score, label, (truth_frame, *truth), num_frames,
                                    range(num_classes), iou, "best")
    return {**result, "AP": np.array(list(result["AP"].values()))}


# ---- linking boxes to tubes ---------------------------------------------------------------------

def each_video(video, frame):
    """Yields of each video its name, the numbers of its frames (F,), ascending, and the rows of
    their detections (F, A), -1: none."""
    videos, index = np.unique(video, return_inverse=True)
    order = np.lexsort((frame, index))
    ends = np.cumsum(np.bincount(index))
    for one, rows in zip(videos.tolist(), np.split(order, ends[:-1])):
        starts, lengths = runs(frame[rows])
        table = np.full((len(starts), lengths.max()), -1)
        place = np.arange(len(rows)) - np.repeat(starts, lengths)   # of a detection in its frame
        table[np.repeat(np.arange(len(starts)), lengths), place] = rows
        yield one, frame[rows[starts]], table


def soft_nms(boxes, scores):
    """ACT's: in descending score, a box that no better one has touched multiplies the scores of the
    untouched boxes with IoU > 0.6 by 1 - IoU, once a box; the 10 best of them then are kept.

    boxes (F, A, 4), scores (F, C, A), -1: no box -> scores (F, C, A), -1: no box or not kept
    """
    overlap = box_iou(boxes[:, :, None], boxes[:, None], plus_one=1)    # (F, A, A)
    near = (overlap > SOFT_NMS_IOU) & ~np.eye(overlap.shape[1], dtype=bool)
    factor = 1 - overlap
    frame, label = np.ogrid[:scores.shape[0], :scores.shape[1]]
    order = np.argsort(-scores, axis=2, kind="stable")
    touched = scores < 0
    for place in range(scores.shape[2]):
        box = order[..., place]                                         # (F, C)
        acts = ~touched[frame, label, box]
        hit = near[frame, box] & ~touched & acts[..., None]             # (F, C, A)
        scores = np.where(hit, scores * factor[frame, box], scores)
        touched |= hit
        touched[frame, label, box] = True
    order = np.argsort(-scores, axis=2, kind="stable")
    np.put_along_axis(scores, order[..., KEPT_BOXES:], -1, 2)
    return scores


def assign(fits, scores):
    """Tubes in their order each take the best box that is free and fits.

    fits (C, L, A), scores (C, A), -1: no box -> (C, L) the box that a tube takes, A: none
    """
    classes, tubes, boxes = fits.shape
    every = np.arange(classes)
    # -1: no box, or it is taken; the last stands for none: it is always there and below any box
    left = np.append(scores, np.full((classes, 1), -0.5), 1)            # (C, A + 1)
    fits = np.append(fits, np.ones((classes, tubes, 1), bool), 2)       # (C, L, A + 1)
    taken = np.empty((classes, tubes), np.int64)
    for place in range(tubes):
        best = np.where(fits[:, place], left, -1).argmax(1)             # (C,)
        taken[:, place] = best
        left[every, best] = -1
        left[:, boxes] = -0.5
    return taken


def link_video(boxes, scores, number, max_gap):
    """ACT's greedy linking of a video, all classes side by side, one step a frame.

    boxes (F, A, 4), scores (F, C, A) of `soft_nms`, number (F,) of the frames
    -> (F, C, A) the tube that a box goes to, numbered from 0 on, -1: no box
    """
    steps, classes, width = scores.shape
    present = scores >= 0
    tube = np.full((steps, classes, width + 1), -1)     # the last box stands for none
    near = [box_iou(boxes[:-lag, :, None], boxes[lag:, None]) >= LINK_IOU       # (F - lag, A, A)
            for lag in range(1, min(max_gap, steps - 1) + 1)]
    most = np.count_nonzero(present) + 1        # tubes at most, each of a box; the last is no tube
    total = np.zeros(most)
    length = np.zeros(most, np.int64)
    last = np.full(most, -1)
    every = np.arange(classes)[:, None]
    tubes = 0
    for step in range(steps):
        recent = []                             # steps that a tube may have been at, latest first
        earlier = step - 1
        while earlier >= 0 and number[step] - number[earlier] <= max_gap:
            recent.append(earlier)
            earlier -= 1
        if recent:
            live = np.concatenate([tube[earlier, :, :width] for earlier in recent], 1)  # (C, R * A)
            live[last[live] != np.repeat(recent, width)] = -1           # they went on since
            mean = np.where(live >= 0, total[live] / np.maximum(length[live], 1), -1)
            order = np.argsort(-mean, axis=1, kind="stable")[:, :KEPT_BOXES * len(recent)]
            live = live[every, order]                                   # (C, L)
            fits = np.concatenate([near[step - earlier - 1][earlier] for earlier in recent])
            fits = fits[order] & (live >= 0)[..., None]                 # (R * A, A) -> (C, L, A)
            tube[step, every, assign(fits, scores[step])] = live
        own = tube[step, :, :width]
        fresh = np.nonzero(present[step] & (own < 0))
        own[fresh] = np.arange(tubes, tubes + len(fresh[0]))
        tubes += len(fresh[0])
        of_step = own[present[step]]
        total[of_step] += scores[step][present[step]]
        length[of_step] += 1
        last[of_step] = step
    return tube[..., :width]


def link_strict(detections, min_score, max_gap, min_length):
    """`link_tubes` by plain rules, one video after the other."""
    video, frame, box, class_prob, conf = detections
    tubes = []
    for one, number, table in each_video(video, frame):
        boxes = box[table].astype(np.float64)                           # (F, A, 4)
        scores = class_prob[table] * conf[table].astype(np.float64)[..., None]          # (F, A, C)
        scores[(table < 0)[..., None] | (scores < min_score)] = -1
        scores = np.ascontiguousarray(scores.transpose(0, 2, 1))        # (F, C, A)
        for start in range(0, len(table), FRAMES_AT_ONCE):
            part = slice(start, start + FRAMES_AT_ONCE)
            scores[part] = soft_nms(boxes[part], scores[part])
        tube = link_video(boxes, scores, number.tolist(), max_gap)      # (F, C, A)
        step, label, slot = np.nonzero(tube >= 0)
        order = np.argsort(tube[step, label, slot], kind="stable")      # by tube, then frame
        step, label, slot = step[order], label[order], slot[order]
        row, value = table[step, slot], scores[step, label, slot]
        starts, lengths = runs(tube[step, label, slot])
        span = number[step[starts + lengths - 1]] - number[step[starts]] + 1
        mean = np.add.reduceat(value, starts) / lengths
        for index in np.flatnonzero((span >= min_length) & (mean >= MIN_TUBE_SCORE)).tolist():
            rows = row[starts[index]:starts[index] + lengths[index]]
            tubes.append({"video": one, "label": int(label[starts[index]]),
                          "score": float(mean[index]), "frames": frame[rows], "boxes": box[rows]})
    return tubes


def best_paths(overlap, scores, present, count=3):
    """Paths through all frames with the largest sum of IoU + s1 + s2 + s1 * s2 / 2 over
    neighbouring frames, one after the other without the boxes of the former, until a frame is
    empty; P problems side by side.

    overlap (P, T - 1, A, A): IoU of each frame's boxes with the next one's; scores and present
    (P, T, A) -> list of (which of the problems, slots (T,)), an entry a path
    """
    first, second = scores[:, :-1, :, None], scores[:, 1:, None, :]
    edge = overlap + first + second + 0.5 * first * second              # (P, T - 1, A, A)
    closed = np.where(present, 0, -np.inf)              # (P, T, A): no box, or a former path has it
    found, problems, length = [], np.arange(len(scores)), scores.shape[1]
    for _ in range(count):
        total = closed[:, -1]
        following = np.zeros(scores.shape, np.int64)
        for step in range(length - 2, -1, -1):
            sums = edge[:, step] + total[:, None]                       # (P, A, A)
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
    """class-query-vad's temporal trimming of a path through all T frames -> its first row, its last
    row + 1, the scores (T,).

    ucf: `count` rows (frames of the class with a box) from row `first`, that is the 1-based number
    of the first such frame: a tube starts one frame late. jhmdb: scores of boxes with IoU < 0.3 to
    the one before are negated; the run with the largest sum of score - mean is widened at both
    sides by half of what the video is longer.
    """
    length = len(scores)
    if protocol == "released_ucf":
        return min(first, length), min(first + count, length), scores
    jumps = np.append(False, box_iou(boxes[1:], boxes[:-1], plus_one=1) < 0.3)
    scores = np.where(jumps, -scores, scores)
    sums = np.append(0, np.cumsum(scores - scores.mean()))
    last = (sums[1:] - np.minimum.accumulate(sums[:-1])).argmax()
    begin = sums[:last + 1].argmin()
    half = (length - (last - begin)) // 2
    return max(begin - half, 0), min(last + half, length), scores


def released_tubes(rows, box, scores, enters, protocol):
    """class-query-vad's tubes of a video: rows (T, A) of detections (-1: none), scores and enters
    (T, A, C)."""
    enters = enters.transpose(2, 0, 1)                                  # (C, T, A)
    labels = np.flatnonzero(enters.any((1, 2)))                         # the P classes with a box
    has = enters[labels].any(2)                                         # (P, T)
    steps = np.arange(has.shape[1])
    distance = np.where(has[:, None], abs(steps[:, None] - steps), len(steps))          # (P, T, T)
    borrowed = distance.argmin(2)                       # (P, T): the nearest frame, the earlier one
    pairs = np.stack([borrowed[:, :-1], borrowed[:, 1:]], -1).reshape(-1, 2)
    pairs, place = np.unique(pairs, axis=0, return_inverse=True)        # few differ among classes
    overlap = box_iou(box[rows[pairs[:, 0]]][:, :, None], box[rows[pairs[:, 1]]][:, None])
    overlap = overlap[place.reshape(len(labels), len(steps) - 1)]       # (P, T - 1, A, A)
    rows = rows[borrowed]                                               # (P, T, A)
    scores = scores.transpose(2, 0, 1)[labels[:, None], borrowed]       # (P, T, A)
    paths = {}
    for one, slots in best_paths(overlap, scores, enters[labels[:, None], borrowed]):
        path = scores[one, steps, slots], box[rows[one, steps, slots]]
        paths.setdefault(one, []).append(path)
    tubes = []
    for one, candidates in paths.items():
        kept = []
        for score, boxes in sorted(candidates, key=lambda path: -path[0].mean()):
            if any(box_iou(boxes, other, plus_one=1).mean() > 0.3 for other in kept):
                continue
            kept.append(boxes)
            first, count = has[one].argmax() + 1, np.count_nonzero(has[one])
            start, end, score = trim(boxes, score, protocol, first, count)
            if end > start:             # a tube that is trimmed to nothing cannot match
                tubes.append({"label": int(labels[one]), "score": float(score[start:end].mean()),
                              "frames": np.arange(start, end) + 1, "boxes": boxes[start:end]})
    return tubes


def link_released(detections, protocol, num_frames):
    """`link_tubes` as the released code does it, best paths through all frames of each video."""
    video, frame, box, class_prob, conf = detections
    tubes = []
    for one, number, table in each_video(video, frame):
        length = number[-1] if num_frames is None else num_frames[one]
        if number[0] < 1 or number[-1] > length:
            raise ValueError(f"detections: video {one} has frames {number[0]}..{number[-1]}, "
                             f"but 1..{length} are its frames (num_frames)")
        rows = np.full((length, table.shape[1]), -1)                    # (T, A)
        rows[number - 1] = table
        prob, person = class_prob[rows], conf[rows][..., None]          # (T, A, C), (T, A, 1)
        enters = np.repeat((rows >= 0)[..., None], prob.shape[2], 2)    # (T, A, C)
        if protocol == "released_ucf":
            best = prob.argmax(2)[..., None] == np.arange(prob.shape[2])
            enters &= best & (person >= 0.7)
        scores = prob * person.astype(np.float64)                       # (T, A, C)
        for tube in released_tubes(rows, box, scores, enters, protocol):
            tubes.append({"video": one, "protocol": protocol, **tube})
    return tubes


def full_name(protocol, num_classes):
    """-> strict, released_ucf or released_jhmdb; class-query-vad has one evaluator a data set, told
    by the classes."""
    if protocol == "released":
        return "released_jhmdb" if num_classes == 21 else "released_ucf"
    if protocol not in ("strict", "released_ucf", "released_jhmdb"):
        raise ValueError(f"protocol {protocol!r}: strict, released, released_ucf or released_jhmdb "
                         "expected")
    return protocol


def link_tubes(detections, protocol="strict", min_score=0.0, max_gap=1, min_length=15,
               num_frames=None):
    """Boxes of frames to tubes, in the order of the videos, each of which is linked by itself.

    -> list of {"video", "label", "score", "frames" (k,), "boxes" (k, 4)}

    detections {"video" (n,), "frame" (n,) integers, "box" (n, 4), "class_prob" (n, C), "conf" (n,)}

    strict: ACT's online linking with K = 1. A box's score is class_prob * conf, boxes below
    min_score are left out; per frame and class the 10 best boxes after soft NMS. Live tubes, by
    descending mean score, each take the best box that is free and has plain IoU >= 0.5 with their
    last one; boxes that are left start tubes. A tube ends after max_gap frames without a match
    (`frames` has only those with a box); those shorter than min_length frames or with a mean score
    below 0.005 are left out.

    released (released_ucf, released_jhmdb; "released" takes jhmdb's for 21 classes):
    class-query-vad's linking, its constants fixed. ucf: a box enters for its best class if
    conf >= 0.7; jhmdb: every box for every class. Frames without boxes borrow the nearest one's; up
    to 3 best paths a class through the whole video, NMS of tubes at 0.3, trimming. num_frames
    {video: frames} of the videos, by default the last frame with a detection. Such tubes carry
    "protocol", so that video_map scores them by the same rules.
    """
    arrays = check_detections(detections, ("video", "frame", "box", "class_prob", "conf"),
                              "detections")
    protocol = full_name(protocol, np.shape(arrays[3])[-1])
    if protocol == "strict":
        return link_strict(arrays, min_score, max_gap, min_length)
    return link_released(arrays, protocol, num_frames)


# ---- video mAP ----------------------------------------------------------------------------------

def tube_overlaps(tubes, truth, protocol):
    """Spatio-temporal IoU of every tube with one ground truth (see the table) -> (tubes,)"""
    starts = np.cumsum([0, *(len(tube["frames"]) for tube in tubes[:-1])])
    frames = np.concatenate([tube["frames"] for tube in tubes])
    boxes = np.concatenate([tube["boxes"] for tube in tubes])
    order = np.argsort(truth["frames"], kind="stable")
    truth_frames = np.asarray(truth["frames"])[order]
    truth_boxes = np.asarray(truth["boxes"])[order]
    place = np.minimum(np.searchsorted(truth_frames, frames), len(truth_frames) - 1)
    common = truth_frames[place] == frames
    plus_one = 0 if protocol == "strict" else 1
    iou = np.zeros(len(frames))
    iou[common] = box_iou(boxes[common], truth_boxes[place[common]], plus_one)
    shared = np.add.reduceat(common, starts, dtype=np.int64)
    spatial = np.add.reduceat(iou, starts) / np.maximum(shared, 1)
    if protocol == "released_jhmdb":
        return spatial
    first, last = np.minimum.reduceat(frames, starts), np.maximum.reduceat(frames, starts)
    overlap = np.minimum(last, truth_frames[-1]) - np.maximum(first, truth_frames[0]) + 1
    union = np.maximum(last, truth_frames[-1]) - np.minimum(first, truth_frames[0]) + 1
    fewest = 2 if protocol == "released_ucf" else 1
    return np.where(overlap >= fewest, spatial * overlap / union, 0)


def tube_pairs(tubes, truths, protocol):
    """Every tube with every ground truth of its video and class -> (tube, truth, overlap)"""
    groups, pairs = {}, [(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0))]
    for index, tube in enumerate(tubes):
        groups.setdefault((tube["video"], tube["label"]), []).append(index)
    for index, truth in enumerate(truths):
        group = groups.get((truth["video"], truth["label"]))
        if group:
            overlap = tube_overlaps([tubes[one] for one in group], truth, protocol)
            pairs.append((np.array(group), np.full(len(group), index), overlap))
    return [np.concatenate(part) for part in zip(*pairs)]


def check_tubes(tubes, num_classes, place):
    """ValueError for a tube without frames, with other numbers of frames and boxes, or of an
    unknown class -> labels"""
    for index, tube in enumerate(tubes):
        frames, boxes = len(tube["frames"]), len(tube["boxes"])
        if not 0 < frames == boxes:
            raise ValueError(f"{place} {index} has {frames} frames and {boxes} boxes; "
                             "as many of both expected, not 0")
    labels = np.array([tube["label"] for tube in tubes], np.int64)
    check_labels(labels, num_classes, place)
    return labels


def first_copies(tubes):
    """The first of the tubes that is the same as the m-th -> (m,)"""
    firsts, original = {}, []
    for index, tube in enumerate(tubes):
        frames, boxes = np.asarray(tube["frames"]).tobytes(), np.asarray(tube["boxes"]).tobytes()
        original.append(firsts.setdefault((tube["video"], tube["label"], frames, boxes), index))
    return np.array(original, np.int64)


def video_map(tubes, ground_truth_tubes, num_classes, iou=0.5, protocol=None):
    """Video mAP -> {"mAP": float, "AP": (C,)}; iou a number, or a sequence: both are means over it.

    tubes {"video", "label", "score", "frames" (k,), "boxes" (k, 4)}, ground truth the same without
    score. strict: matching and AP as for frames, with the mean plain IoU over common frames x
    temporal IoU (frames counted inclusively) of tubes of one video and class. released
    (released_ucf, released_jhmdb): class-query-vad's columns of the table above. None: the
    protocol the tubes were linked by, strict for tubes that do not say.
    """
    if protocol is None:
        protocol = tubes[0].get("protocol", "strict") if len(tubes) else "strict"
    protocol = full_name(protocol, num_classes)
    strict = protocol == "strict"
    rule, missing, surplus = ("best", np.nan, 0) if strict else ("free", 0.0, 1e-5)
    thresholds = np.atleast_1d(np.asarray(iou, np.float64))
    labels = check_tubes(tubes, num_classes, "tube")
    truth_labels = check_tubes(ground_truth_tubes, num_classes, "ground-truth tube")
    scores = np.array([tube["score"] for tube in tubes], np.float64)
    original = first_copies(ground_truth_tubes)
    tube, truth, overlap = tube_pairs(tubes, ground_truth_tubes, protocol)
    result = np.full((len(thresholds), num_classes), missing)
    rank = np.empty(len(tubes), np.int64)
    for label in np.unique(truth_labels).tolist():
        rank[labels == label] = ranks(scores[labels == label])
        number = np.count_nonzero(truth_labels == label) + surplus
        for row, threshold in zip(result, thresholds):
            keep = (truth_labels[truth] == label) & (overlap >= threshold)
            row[label] = average_precision(rank[tube[keep]], truth[keep], overlap[keep], rule,
                                           number, original)
    return {"mAP": nanmean([nanmean(row) for row in result]), "AP": result.mean(0)}


# ---- AVA ----------------------------------------------------------------------------------------

def read_ava(path, columns=8):
    """A csv of AVA's -> {"video", "timestamp", "box", "label", "score"}; ValueError: a faulty row.

    columns: 8 for detections (the last column is the score) and ground truth, of which rows of two
    columns are key frames with nobody in them; 2 for excluded time stamps. Arrays in place of a
    path come back as they are.
    """
    if not isinstance(path, (str, os.PathLike)):
        return path
    videos, rows, problems = read_rows(Path(path))
    if problems:
        raise ValueError(problems[0])
    timestamp, nobody = rows["frame"].astype(np.int64), np.isnan(rows["label"])
    if columns == 2:
        if not nobody.all():
            raise ValueError(f"{path} row {rows['line'][nobody.argmin()]}: 8 columns, not 2")
        return {"video": videos, "timestamp": timestamp}
    videos, timestamp, rows = videos[~nobody], timestamp[~nobody], rows[~nobody]
    box, label, score = rows["box"], rows["label"], rows["person"]
    faults = {"a number that is not finite": ~np.isfinite(box).all(1) | ~np.isfinite(label),
              "x2 < x1 or y2 < y1": (box[:, 2:] < box[:, :2]).any(1),
              "an action id that is not a whole number": label % 1 != 0}
    for what, bad in faults.items():
        if bad.any():
            raise ValueError(f"{path} row {rows['line'][bad.argmax()]}: {what}")
    return {"video": videos, "timestamp": timestamp, "box": box, "label": label.astype(np.int64),
            "score": score}


def best_rows(frame, score, cap):
    """Mask (n,) of the `cap` rows of every frame with the highest scores, among equal ones the
    earlier."""
    order = np.argsort(frame, kind="stable")
    starts, _ = runs(frame[order])
    mask = np.zeros(len(frame), bool)
    step = max(1, (len(starts) << 22) // max(len(frame), 1))    # whole frames, some 4 M rows
    for rows in np.split(order, starts[step::step]):
        rows = rows[np.lexsort((-score[rows], frame[rows]))]
        first, lengths = runs(frame[rows])
        mask[rows[np.arange(len(rows)) - np.repeat(first, lengths) < cap]] = True
    return mask


def ava_map(detections_csv, ground_truth_csv, label_map, excluded=None, cap=50):
    """AVA's mAP at IoU 0.5 -> {"mAP", "AP": {action id: AP}}; an action without ground truth is NaN
    in AP and left out of mAP.

    The rules of the official script (ActivityNet 3fee089; cap=None: be7854e, STMixer,
    class-query-vad): rows outside the label map's classes and at excluded time stamps are dropped
    on both sides; of every key frame the `cap` best (box, class) rows count; in descending score a
    detection takes its best ground truth (the first of equal ones), taken already: false positive.
    Key frames without ground truth count.

    Paths of csv files (a faulty row is a ValueError with file and row), or arrays {"video",
    "timestamp", "box", "label", "score"}, or dense detections {"video", "timestamp", "box" (n, 4),
    "scores" (n, C)}, column k of action id k + 1; `excluded` a csv or {"video", "timestamp"};
    label_map a pbtxt file or a sequence of ids.
    """
    if isinstance(label_map, (str, os.PathLike)):
        label_map = read_label_map(Path(label_map))
    classes = sorted(map(int, label_map))
    found, truth = read_ava(detections_csv), read_ava(ground_truth_csv)
    dropped = {"video": [], "timestamp": []} if excluded is None else read_ava(excluded, columns=2)
    keys = ("video", "timestamp", "box")
    dense = "scores" in found
    columns = ("scores",) if dense else ("score", "label")
    _, _, box, score, *rest = check_detections(found, keys + columns, "detections")
    _, _, *truth_columns = check_detections(truth, keys + ("label",), "ground truth")
    frame, truth_frame, dropped, num_frames = number_frames(
        *({name: table[name] for name in keys[:2]} for table in (found, truth, dropped)))
    kept = np.isin(truth_columns[1], classes) & ~np.isin(truth_frame, dropped)
    if not kept.any():
        raise ValueError("ground truth: no row of the label map's classes is left; nothing can be "
                         "evaluated")
    truth = [column[kept] for column in (truth_frame, *truth_columns)]
    row = np.flatnonzero(~np.isin(frame, dropped)).astype(np.int32)     # of the box of a detection
    if dense:
        if score.shape[1] < classes[-1]:
            raise ValueError(f"detections: {score.shape[1]} columns of scores, but an action id "
                             f"{classes[-1]}")
        score = score[row][:, np.array(classes) - 1].ravel()            # (boxes * classes,)
        label = np.tile(np.array(classes, np.int16), len(row))
        row = np.repeat(row, len(classes))
    else:
        row = row[np.isin(rest[0][row], classes)]
        score, label = score[row], rest[0][row]
    if cap is not None:
        kept = best_rows(frame[row], score, cap)
        row, score, label = row[kept], score[kept], label[kept]
    return mean_average_precision(frame[row], box, score, label, truth, num_frames, classes, 0.5,
                                  "first", row)
