"""Training objective (Sec. 4.3, Eq. 3-5): Hungarian matching frame by frame, and the loss.

Predictions (B, T, A, ...) meet actors frame by frame: a frame's actors are assigned to its queries
at the least cost of confidence, L1 and GIoU, so that one query answers for one actor in one frame.
Eq. 3's omega is one for a whole tube; here each frame has its own: queries of two frames are not
tied, tubes come from linking (metrics.py). Of the sum of Eq. 3,

    L_class  binary focal loss of all queries against their actor's labels, or zeros
    L_box    |B - B^| over (cx, cy, w, h), matched queries only
    L_giou   1 - GIoU, matched queries only (Eq. 4's -GIoU and a constant, so that 0 is perfect)
    L_conf   binary cross entropy of the confidence against "matched"

Eq. 5 divides all by |T||N_a|; here each part has its own divisor. The class loss, a mean over
classes and a sum over queries, is divided by the number of frames, box and giou by the number of
matched pairs, the confidence loss by the sum of its weights. All three are known from the targets
alone (`loss_counts`), so that they can be those of the whole batch, over micro-batches and
processes. A clip without actors has no pairs: its queries learn zeros, and box and giou are 0.

Besides matching and divisors, five choices are the released recipe's and not the paper's: class
losses of matched queries count tenfold; confidence losses of the others are weighed by 0.5 (AVA
0.1); the class loss is that of the score, class times confidence (all presets but AVA's); labels
are smoothed (AVA: 0 is learned as .05, by unmatched queries too); and the last decoder layer alone
has a loss (in the synthetic preset all have). Loss weights (Config.loss_*): class 4, L1 5, GIoU 2,
confidence 3; AVA 10, 5, 2, 1. Matching costs (Config.cost_*): confidence 4 (AVA 12), L1 5, GIoU 2,
none of the class. Both are the released recipes'; the paper prints none.

A target is a dict of one clip: boxes (N, T, 4) cx, cy, w, h in [0, 1], present (N, T) bool, labels
(N, T, C) 0 or 1, frames (T,) bool, False on temporal padding, which is ignored by every part.
Targets may stay on the CPU; then the only wait for a GPU is that for the costs.
"""

# B clips, T frames, A actor queries, N actors of a clip, C classes
# K true boxes of a batch, over all its clips and frames; P matched pairs, less than K only where a
# frame has more actors than queries
# S supervised decoder layers: the last, or all of them with deep supervision

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment

FOCAL_ALPHA, FOCAL_GAMMA = 0.25, 2.0
MATCHED_CLASS_WEIGHT = 10.0  # of a matched query's class loss; not in the paper, in all presets
SMALLEST_AREA = 1e-7  # keeps 0 / 0 out of the GIoU; a pixel of a 320 x 240 frame has 1e-5


def cxcywh_to_xyxy(boxes):
    """Boxes (..., 4) from centre, width and height to corners x1, y1, x2, y2, in the same unit."""
    centre, size = boxes[..., :2], boxes[..., 2:]
    return torch.cat([centre - size / 2, centre + size / 2], dim=-1)


def box_giou(boxes, others):
    """Generalised IoU of boxes (..., 4) with others (..., 4), both x1, y1, x2, y2, broadcast."""
    area = (boxes[..., 2:] - boxes[..., :2]).prod(dim=-1)
    other_area = (others[..., 2:] - others[..., :2]).prod(dim=-1)
    low = torch.maximum(boxes[..., :2], others[..., :2])
    high = torch.minimum(boxes[..., 2:], others[..., 2:])
    intersection = (high - low).clamp(min=0).prod(dim=-1)
    union = (area + other_area - intersection).clamp(min=SMALLEST_AREA)
    hull_low = torch.minimum(boxes[..., :2], others[..., :2])
    hull_high = torch.maximum(boxes[..., 2:], others[..., 2:])
    hull = (hull_high - hull_low).prod(dim=-1).clamp(min=SMALLEST_AREA)
    return intersection / union - (hull - union) / hull  # (...)


def score_logit(logits, confidence):
    """The logit of sigmoid(logits) * sigmoid(confidence), without leaving log space; broadcasts.

    With s the product, (1 - s) / s = (1 + e^-z)(1 + e^-c) - 1 = e^-z + e^-c + e^-(z + c).
    """
    logits, confidence = torch.broadcast_tensors(logits, confidence)
    return -torch.logsumexp(torch.stack([-logits, -confidence, -logits - confidence]), dim=0)


def focal_loss(logits, labels):
    """Binary focal loss (Eq. 4's BFLoss) of logits against labels in [0, 1], element by element."""
    probability = logits.sigmoid()
    missed = 1 - (probability * labels + (1 - probability) * (1 - labels))
    balance = FOCAL_ALPHA * labels + (1 - FOCAL_ALPHA) * (1 - labels)
    entropy = F.binary_cross_entropy_with_logits(logits, labels, reduction="none")
    return balance * missed ** FOCAL_GAMMA * entropy


def match(outputs, targets, config):
    """Hungarian matching of the last layer's outputs, frame by frame: (clip, frame, query, actor).

    Four int64 vectors (P,) on the outputs' device, an entry a matched pair, sorted by clip, frame
    and actor. Where a frame has more actors than queries, the cheapest A of them are matched.
    Outputs that are not finite are matched somehow: it is their loss that tells.
    """
    boxes = _stacked([outputs], "pred_boxes")                           # (1, B, T, A, 4)
    confidence = _stacked([outputs], "pred_conf")                       # (1, B, T, A)
    place, true_boxes, _, actors_per_frame = _true_boxes(targets, boxes)
    row, query = _assign(boxes, confidence, true_boxes, place, actors_per_frame, config)
    clip, frame, actor = place[:, row[0]]
    return clip, frame, query[0], actor


def loss_counts(targets, config):
    """The divisors (3,) float64 of a batch: frames, matched pairs, sum of confidence weights.

    Sums: those of two halves of a batch add up to those of the batch.
    """
    return _count(targets, config.num_queries, config)


def detection_loss(outputs, targets, config, counts=None):
    """Eq. 5: (scalar, {"class", "box", "giou", "conf"}), the last layer's parts, unweighted.

    outputs are the model's, targets a list of B dicts. With `config.deep_supervision` the losses of
    all decoder layers are summed, each matched by itself. `counts` (3,) are the divisors, those of
    these targets by default; given those of a larger batch, the result is this part's share: over
    the parts of the batch it adds up to the batch's loss.
    """
    layers = [outputs]  # the released recipe: no loss on earlier layers
    if config.deep_supervision:  # as in DETR
        layers = [*outputs.get("aux_outputs", ()), outputs]
    logits = _stacked(layers, "pred_logits")                            # (S, B, T, A, C)
    boxes = _stacked(layers, "pred_boxes")                              # (S, B, T, A, 4)
    confidence = _stacked(layers, "pred_conf")                          # (S, B, T, A)
    device, num_queries, num_classes = logits.device, *logits.shape[3:]
    place, true_boxes, true_labels, actors_per_frame = _true_boxes(targets, boxes)
    if true_labels.shape[1] != num_classes:
        raise ValueError(f"targets of {true_labels.shape[1]} classes for outputs of {num_classes}")
    real_frame = torch.stack([target["frames"] for target in targets])  # (B, T)
    real_frame = real_frame.to(device, non_blocking=True)[None, :, :, None]
    if counts is None:
        counts = _count(targets, num_queries, config)
    counts = counts.to(device, logits.dtype, non_blocking=True)
    # Sums over no frames or no pairs are 0, and so are their means.
    num_frames, num_pairs, sum_of_weights = torch.where(counts > 0, counts, 1.0)

    # Each pair's true box and the prediction that answers for it, omega of Eq. 3.
    row, query = _assign(boxes, confidence, true_boxes, place, actors_per_frame, config)
    clip, frame, _ = place[:, row]                                      # each (S, P)
    layer = torch.arange(len(layers), device=device)[:, None]           # (S, 1)
    pair = (layer, clip, frame, query)

    # Y of the paper: 1 and the actor's labels for a matched query (i <= N_X), zeros for the others.
    matched = torch.zeros_like(confidence)                              # (S, B, T, A)
    matched[pair] = confidence.new_ones(())  # a plain 1.0 would be copied from the host
    labels = torch.zeros_like(logits)                                   # (S, B, T, A, C)
    labels[pair] = true_labels[row]
    # Not in the paper: label smoothing (AVA).
    labels = (1 - config.label_smoothing) * labels + config.label_smoothing / 2

    # Eq. 4, the four losses.
    score = logits
    # Not in the paper: the C^ of UCF and JHMDB is the score of test time, class times confidence,
    # and the gradient flows into both; that of AVA is the class alone.
    if config.score_with_confidence:
        score = score_logit(logits, confidence[..., None])
    class_loss = focal_loss(score, labels).mean(dim=-1)                 # (S, B, T, A)
    # Not in the paper: outweighs the queries without an actor, whose labels are zeros.
    class_loss = class_loss * (MATCHED_CLASS_WEIGHT * matched + (1 - matched))
    conf_loss = F.binary_cross_entropy_with_logits(confidence, matched, reduction="none")
    # Not in the paper: queries without an actor, most of them, weigh less: 0.5, AVA 0.1.
    conf_loss = conf_loss * (matched + config.no_actor_weight * (1 - matched))
    matched_boxes = boxes[pair]                                         # (S, P, 4)
    box_loss = (matched_boxes - true_boxes[row]).abs()                  # (S, P, 4)
    giou_loss = 1 - box_giou(cxcywh_to_xyxy(matched_boxes), cxcywh_to_xyxy(true_boxes[row]))

    # Eq. 5, the means, each (S,). Without a pair box_loss and giou_loss are empty, yet stay in the
    # graph: a distributed step waits for every parameter's gradient, be it zero.
    parts = {"class": (class_loss * real_frame).sum(dim=(1, 2, 3)) / num_frames,
             "box": box_loss.sum(dim=(1, 2)) / num_pairs,
             "giou": giou_loss.sum(dim=1) / num_pairs,
             "conf": (conf_loss * real_frame).sum(dim=(1, 2, 3)) / sum_of_weights}

    # Eq. 3, the weighted sum, over all layers under supervision.
    loss = (config.loss_class * parts["class"] + config.loss_box * parts["box"]
            + config.loss_giou * parts["giou"] + config.loss_confidence * parts["conf"]).sum()
    return loss, {name: part[-1].detach() for name, part in parts.items()}


def _stacked(layers, name):
    """One output of S layers, (S, ...), in float32 at least, whatever precision the model ran in:
    exponentials, focal weights and sums over thousands of terms are too much for 8 or 11 bits."""
    dtype = torch.promote_types(layers[0][name].dtype, torch.float32)
    return torch.stack([layer[name].to(dtype) for layer in layers])


def _true_boxes(targets, like):
    """The K true boxes of a batch, sorted by clip, frame and actor.

    `like` (S, B, T, A, 4) are predicted boxes. Returns, on their device, place (3, K): clip, frame
    and actor of each, boxes (K, 4) and labels (K, C); and a list, how many each of B*T frames has.
    """
    num_clips, num_frames = like.shape[1:3]
    if len(targets) != num_clips:
        raise ValueError(f"{len(targets)} targets for outputs of {num_clips} clips")
    places, actors_per_frame, boxes, labels = [], [], [], []
    for clip, target in enumerate(targets):
        box_shape, label_shape = tuple(target["boxes"].shape), tuple(target["labels"].shape)
        if box_shape[1:] != (num_frames, 4) or label_shape[:2] != box_shape[:2]:
            raise ValueError(f"clip {target.get('video', clip)}: boxes {box_shape} and labels "
                             f"{label_shape} do not fit outputs of {num_frames} frames")
        counted = (target["present"] & target["frames"]).T              # (T, N)
        frame, actor = counted.nonzero(as_tuple=True)
        places.append(torch.stack([torch.full_like(frame, clip), frame, actor]))
        actors_per_frame += counted.sum(dim=1).tolist()
        boxes.append(target["boxes"][actor, frame])
        labels.append(target["labels"][actor, frame])
    place = torch.cat(places, dim=1).to(like.device, non_blocking=True)
    boxes = torch.cat(boxes).to(like.device, like.dtype, non_blocking=True)
    labels = torch.cat(labels).to(like.device, like.dtype, non_blocking=True)
    return place, boxes, labels, actors_per_frame


@torch.no_grad()
def _assign(boxes, confidence, true_boxes, place, actors_per_frame, config):
    """Hungarian matching of predictions with the K true boxes of `_true_boxes`, layer by layer.

    boxes (S, B, T, A, 4) and confidence logits (S, B, T, A) -> row, query: (S, P) each, the true
    box and the query of every pair, on the same device. The paper leaves the cost to its
    supplement; this one is the released recipe's.
    """
    clip, frame, _ = place
    predicted = boxes[:, clip, frame]                                   # (S, K, A, 4)
    probability = confidence[:, clip, frame].sigmoid()                  # (S, K, A)
    truth = true_boxes[:, None]                                         # (K, 1, 4)
    overlap = box_giou(cxcywh_to_xyxy(predicted), cxcywh_to_xyxy(truth))
    cost = (config.cost_box * (predicted - truth).abs().sum(dim=-1)
            - config.cost_giou * overlap - config.cost_confidence * probability)
    # The solver refuses NaN. Whatever is matched then, the loss is not finite and training says so.
    cost = cost.nan_to_num(nan=1e6, posinf=1e6, neginf=-1e6)
    cost = cost.cpu().numpy()  # (S, K, A) in one copy: here, and only here, the CPU waits for a GPU

    rows, queries = [], []
    for cost_of_layer in cost:
        first = 0  # row of a frame's first actor
        for num_actors in actors_per_frame:
            row, query = linear_sum_assignment(cost_of_layer[first:first + num_actors])
            rows.append(first + row)
            queries.append(query)
            first += num_actors
    # Every layer has the same number of pairs: a frame has one for each actor or each query.
    pairs = np.stack([np.concatenate(rows), np.concatenate(queries)])   # (2, S * P)
    pairs = torch.from_numpy(pairs).to(boxes.device, non_blocking=True)
    return pairs.unflatten(1, (len(cost), -1))                          # (2, S, P)


def _count(targets, num_queries, config):
    """`loss_counts` for a given number of queries."""
    num_frames, num_pairs = 0, 0
    for target in targets:
        actors = (target["present"] & target["frames"]).sum(dim=0)      # (T,)
        num_frames += int(target["frames"].sum())
        num_pairs += int(actors.clamp(max=num_queries).sum())
    weight = num_pairs + config.no_actor_weight * (num_frames * num_queries - num_pairs)
    return torch.tensor([num_frames, num_pairs, weight], dtype=torch.float64)
