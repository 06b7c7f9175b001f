"""Training objective (Sec. 4.3, Eq. 3-5): Hungarian matching frame by frame, and the loss of the matched predictions.

Predictions (B, T, A, ...) meet actors frame by frame: a frame's actors are assigned to its queries at the least cost
of confidence, L1 and GIoU, so that one query answers for one actor in one frame. Of the sum of Eq. 3,

    L_class  binary focal loss of all queries against their actor's labels, or zeros        (BFLoss of Eq. 4)
    L_box    |B - B^| over (cx, cy, w, h), matched queries only
    L_giou   1 - GIoU, matched queries only (Eq. 4's -GIoU and a constant, so that 0 is perfect)
    L_conf   binary cross entropy of the confidence against "matched"

each part has a divisor of its own (SPEC.md) where Eq. 5 divides all by |T||N_a|: the class loss the number of frames,
box and giou the number of matched pairs, the confidence the sum of its weights. All three are known from the targets
alone (`loss_counts`), so that they can be those of the whole batch, over micro-batches and processes.

A target is a dict of one clip: boxes (N, T, 4) cx, cy, w, h in [0, 1], present (N, T) bool, labels (N, T, C) 0 or 1,
frames (T,) bool, False on temporal padding, which counts nowhere. Targets may stay on the CPU; then the only wait for
a GPU is that for the costs.
"""

# B clips, T frames, A actor queries, N actors of a clip, C classes, K boxes that count in the batch,
# Y decoder layers under supervision (1, or all of them with deep supervision)

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment

FOCAL_ALPHA, FOCAL_GAMMA = 0.25, 2.0
MATCHED_WEIGHT = 10.0    # of a matched query's cross entropy in the class loss
SMALLEST_AREA = 1e-7     # keeps 0 / 0 out of the GIoU; a pixel of a 320 x 240 frame has an area of 1e-5


def cxcywh_to_xyxy(boxes):
    """Boxes (..., 4) from centre, width and height to corners x1, y1, x2, y2, in the same unit."""
    centre, size = boxes[..., :2], boxes[..., 2:]
    return torch.cat([centre - size / 2, centre + size / 2], dim=-1)


def box_giou(boxes, others):
    """Generalised IoU of boxes (..., 4) with others (..., 4), both x1, y1, x2, y2, broadcast -> (...)."""
    area = (boxes[..., 2:] - boxes[..., :2]).prod(dim=-1)
    other_area = (others[..., 2:] - others[..., :2]).prod(dim=-1)
    low = torch.maximum(boxes[..., :2], others[..., :2])
    high = torch.minimum(boxes[..., 2:], others[..., 2:])
    intersection = (high - low).clamp(min=0).prod(dim=-1)
    union = (area + other_area - intersection).clamp(min=SMALLEST_AREA)
    span = torch.maximum(boxes[..., 2:], others[..., 2:]) - torch.minimum(boxes[..., :2], others[..., :2])
    hull = span.prod(dim=-1).clamp(min=SMALLEST_AREA)
    return intersection / union - (hull - union) / hull


def score_logit(logits, confidence):
    """The logit of sigmoid(logits) * sigmoid(confidence), without leaving log space; arguments broadcast.

    With s the product, (1 - s) / s = (1 + e^-z)(1 + e^-c) - 1 = e^-z + e^-c + e^-(z + c).
    """
    logits, confidence = torch.broadcast_tensors(logits, confidence)
    return -torch.logsumexp(torch.stack([-logits, -confidence, -logits - confidence]), dim=0)


def focal_loss(logits, labels):
    """Binary focal loss of logits against labels in [0, 1], the same shape, element by element."""
    probability = logits.sigmoid()
    missed = 1 - (probability * labels + (1 - probability) * (1 - labels))
    balance = FOCAL_ALPHA * labels + (1 - FOCAL_ALPHA) * (1 - labels)
    return balance * missed ** FOCAL_GAMMA * F.binary_cross_entropy_with_logits(logits, labels, reduction="none")


def match(outputs, targets, config):
    """Hungarian matching of the last layer's outputs, frame by frame -> (clip, frame, query, actor).

    Four int64 vectors on the outputs' device, an entry a matched pair, sorted by clip, frame and actor. Where a frame
    has more actors than queries, the cheapest A of them are matched. Outputs that are not finite match somehow: it is
    their loss that tells.
    """
    clip, frame, actor, boxes, _ = _gather_targets(targets, outputs["pred_boxes"])
    _, box, query = _assign(outputs["pred_boxes"][None], outputs["pred_conf"][None], clip, frame, boxes, config)
    return tuple(torch.stack([clip[box], frame[box], query, actor[box]]).to(outputs["pred_boxes"].device))


def loss_counts(targets, config):
    """The three divisors (3,) float64 of a batch of targets: frames, matched pairs, weight in the confidence loss.

    Sums: those of two halves of a batch add up to those of the batch.
    """
    return _count(targets, config.num_queries, config)


def detection_loss(outputs, targets, config, counts=None):
    """The loss of Eq. 5 -> (scalar, {"class", "box", "giou", "conf"}: the last layer's parts, unweighted).

    outputs are the model's, targets a list of B dicts. With `config.deep_supervision` the losses of all decoder layers
    are summed, each matched by itself. `counts` (3,) are the divisors, those of these targets by default; given those
    of a larger batch, the result is this part's share: over the parts of the batch it adds up to the batch's loss.
    """
    layers = [*outputs.get("aux_outputs", ()), outputs] if config.deep_supervision else [outputs]
    # A float32 island: exponentials, focal weights and sums over thousands of terms are too much for 8 or 11 bits.
    logits, boxes, confidence = (
        torch.stack([_at_least_float32(layer[name]) for layer in layers])
        for name in ("pred_logits", "pred_boxes", "pred_conf"))             # (Y, B, T, A, C or 4 or nothing)
    clip, frame, _, true_boxes, true_labels = _gather_targets(targets, outputs["pred_boxes"])
    if true_labels.shape[1] != logits.shape[-1]:
        raise ValueError(f"targets of {true_labels.shape[1]} classes for outputs of {logits.shape[-1]}")
    layer, box, query = _assign(boxes, confidence, clip, frame, true_boxes, config)
    pair = tuple(torch.stack([layer, clip[box], frame[box], query]).to(logits.device, non_blocking=True))
    true_boxes, true_labels = (true[box].to(logits.device, logits.dtype, non_blocking=True)
                               for true in (true_boxes, true_labels))       # (Y * pairs, 4), (Y * pairs, C)
    counted = torch.stack([target["frames"] for target in targets]).to(logits.device, non_blocking=True)
    counted = counted[None, :, :, None].to(logits.dtype)                    # (1, B, T, 1)
    if counts is None:
        counts = _count(targets, logits.shape[3], config)
    frames, pairs, weight = counts.to(logits.device, logits.dtype, non_blocking=True)

    matched = torch.zeros_like(confidence)                                  # (Y, B, T, A)
    matched[pair] = 1
    labels = torch.zeros_like(logits)                                       # (Y, B, T, A, C)
    labels[pair] = true_labels
    labels = (1 - config.label_smoothing) * labels + config.label_smoothing / 2
    if config.score_with_confidence:
        logits = score_logit(logits, confidence[..., None])
    class_loss = focal_loss(logits, labels).mean(dim=-1) * (1 + (MATCHED_WEIGHT - 1) * matched) * counted
    conf_loss = F.binary_cross_entropy_with_logits(confidence, matched, reduction="none")
    conf_loss = conf_loss * (matched + config.no_actor_weight * (1 - matched)) * counted

    matched_boxes = boxes[pair]                                             # (Y * pairs, 4)
    box_loss = (matched_boxes - true_boxes).abs().sum(dim=-1)
    giou_loss = 1 - box_giou(cxcywh_to_xyxy(matched_boxes), cxcywh_to_xyxy(true_boxes))
    # Every layer has the same number of pairs, layer after layer. All parts stay in the graph when there is none:
    # a distributed step waits for every parameter's gradient, be it zero.
    box_loss, giou_loss = (part.reshape(len(layers), -1).sum(dim=1) if len(part) else part.sum().expand(len(layers))
                           for part in (box_loss, giou_loss))               # (Y,)
    parts = {"class": class_loss.sum(dim=(1, 2, 3)) / _or_one(frames), "box": box_loss / _or_one(pairs),
             "giou": giou_loss / _or_one(pairs), "conf": conf_loss.sum(dim=(1, 2, 3)) / _or_one(weight)}
    loss = sum(factor * parts[name].sum() for name, factor in (("class", config.loss_class), ("box", config.loss_box),
                                                               ("giou", config.loss_giou), ("conf", config.loss_confidence)))
    return loss, {name: part[-1].detach() for name, part in parts.items()}


def _at_least_float32(tensor):
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _or_one(count):
    """A divisor of nothing: sums over no frames or no pairs are 0, and so are their means here."""
    return torch.where(count > 0, count, torch.ones_like(count))


def _gather_targets(targets, pred_boxes):
    """All boxes that count, on the CPU, by clip and frame -> clip, frame, actor (K,), boxes (K, 4), labels (K, C)."""
    clips, num_frames = pred_boxes.shape[:2]
    if len(targets) != clips:
        raise ValueError(f"{len(targets)} targets for outputs of {clips} clips")
    gathered = []
    for index, target in enumerate(targets):
        boxes, present, labels, frames = (target[name].cpu() for name in ("boxes", "present", "labels", "frames"))
        if boxes.shape[1:] != (num_frames, 4) or labels.shape[:2] != boxes.shape[:2]:
            raise ValueError(f"clip {target.get('video', index)}: boxes {tuple(boxes.shape)} and labels "
                             f"{tuple(labels.shape)} do not fit outputs of {num_frames} frames")
        frame, actor = (present & frames).T.nonzero(as_tuple=True)          # (N, T) -> by frame, then actor
        gathered.append((torch.full_like(frame, index), frame, actor, boxes[actor, frame], labels[actor, frame]))
    return [torch.cat(parts) for parts in zip(*gathered)]


def _count(targets, num_queries, config):
    actors = torch.cat([(target["present"] & target["frames"]).sum(dim=0)[target["frames"]] for target in targets])
    frames, pairs = len(actors), int(actors.clamp(max=num_queries).sum())
    weight = pairs + config.no_actor_weight * (frames * num_queries - pairs)
    return torch.tensor([frames, pairs, weight], dtype=torch.float64)


@torch.no_grad()
def _assign(boxes, confidence, clip, frame, true_boxes, config):
    """Matches Y layers' boxes (Y, B, T, A, 4) and confidence logits (Y, B, T, A) -> layer, box, query.

    Three vectors on the CPU, an entry a pair, sorted by layer and box; box counts the K rows of `_gather_targets`.

    The costs of all boxes with all queries of their frame are one tensor (Y, K, A), copied to the CPU at once; there a
    frame is a run of rows, and nothing but the solver itself is called for each.
    """
    device = boxes.device
    on_device = [index.to(device, non_blocking=True) for index in (clip, frame)]
    predicted = _at_least_float32(boxes)[:, on_device[0], on_device[1]]                 # (Y, K, A, 4)
    probability = _at_least_float32(confidence)[:, on_device[0], on_device[1]].sigmoid()    # (Y, K, A)
    truth = true_boxes.to(device, predicted.dtype, non_blocking=True)[:, None]          # (K, 1, 4)
    cost = (config.cost_box * (predicted - truth).abs().sum(dim=-1) - config.cost_confidence * probability
            - config.cost_giou * box_giou(cxcywh_to_xyxy(predicted), cxcywh_to_xyxy(truth)))
    # The solver refuses NaN: whatever is matched then, the loss is not finite either, and the training loop says so.
    cost = cost.nan_to_num(nan=1e6, posinf=1e6, neginf=-1e6).cpu().numpy()              # (Y, K, A)

    num_layers, num_boxes, num_queries = cost.shape
    place = np.stack([clip.numpy(), frame.numpy()])                                     # (2, K)
    starts = np.flatnonzero((place[:, 1:] != place[:, :-1]).any(axis=0)) + 1
    starts = np.concatenate([[0], starts])[:num_boxes]                                  # first box of each frame, (F,)
    starts = (np.arange(num_layers)[:, None] * num_boxes + starts).reshape(-1)          # in every layer, (Y * F,)
    solved = [linear_sum_assignment(rows) for rows in np.split(cost.reshape(-1, num_queries), starts)[1:]]
    rows = np.concatenate([np.empty(0, int), *(row for row, _ in solved)])
    rows = rows + np.repeat(starts, [len(row) for row, _ in solved])
    query = np.concatenate([np.empty(0, int), *(column for _, column in solved)])
    layer, box = np.divmod(rows, max(num_boxes, 1))
    return [torch.from_numpy(index) for index in (layer, box, query)]
