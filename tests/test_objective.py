"""objective.py against a permutation matcher and a loss written as plain loops over scalars."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import objective
from model import Config
from objective import box_giou, cxcywh_to_xyxy, detection_loss, loss_counts, match, score_logit

# B clips, T frames, A actor queries, N actors of a clip, C classes

CONFIG = Config(num_classes=3, num_queries=4)
NAMES = ("pred_boxes", "pred_logits", "pred_conf")


def make_outputs(clips=2, frames=3, queries=4, classes=3, seed=0, aux=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)

    def draw(function, *channels):
        return function(clips, frames, queries, *channels, generator=generator, dtype=dtype)

    def layer():
        return {"pred_boxes": draw(torch.rand, 4) * 0.4 + 0.3,
                "pred_logits": draw(torch.randn, classes) * 2,
                "pred_conf": draw(torch.randn) * 2}

    return {**layer(), "aux_outputs": [layer() for _ in range(aux)]}


def make_target(actors, frames=3, classes=3, seed=0, present=0.7, padded=()):
    generator = torch.Generator().manual_seed(seed)
    target = {"boxes": torch.rand(actors, frames, 4, generator=generator) * 0.4 + 0.3,
              "present": torch.rand(actors, frames, generator=generator) < present,
              "labels": (torch.rand(actors, frames, classes, generator=generator) < 0.5).float(),
              "frames": torch.ones(frames, dtype=torch.bool), "video": f"clip{seed}",
              "frame_ids": torch.arange(1, frames + 1), "size": torch.tensor([240, 320])}
    target["frames"][list(padded)] = False
    target["boxes"][~target["present"]] = math.nan  # nobody may look at them
    return target


def some_targets(classes=3):
    return [make_target(3, classes=classes, seed=1),
            make_target(6, classes=classes, seed=2, present=0.9, padded=(2,))]


def part_of(outputs, index):
    """The outputs of some clips, or with (slice(None), frames) of some frames."""
    part = {name: outputs[name][index] for name in NAMES}
    part["aux_outputs"] = [{name: layer[name][index] for name in NAMES}
                           for layer in outputs["aux_outputs"]]
    return part


def plain_giou(box, other):
    (x, y, w, h), (u, v, a, b) = (box.tolist(), other.tolist())
    left, right, top, bottom = x - w / 2, x + w / 2, y - h / 2, y + h / 2
    left2, right2, top2, bottom2 = u - a / 2, u + a / 2, v - b / 2, v + b / 2
    width = max(0, min(right, right2) - max(left, left2))
    height = max(0, min(bottom, bottom2) - max(top, top2))
    union = w * h + a * b - width * height
    hull = (max(right, right2) - min(left, left2)) * (max(bottom, bottom2) - min(top, top2))
    return width * height / union - (hull - union) / hull


def plain_l1(box, other):
    return sum(abs(p - t) for p, t in zip(box.tolist(), other.tolist()))


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def plain_match(outputs, targets, config):
    """{(clip, frame): {query: actor}}, the cheapest of all ways to assign a frame's actors."""
    matched = {}
    for clip, target in enumerate(targets):
        for frame in range(len(target["frames"])):
            if not target["frames"][frame]:
                continue
            actors = [n for n in range(len(target["boxes"])) if target["present"][n, frame]]
            boxes, conf = outputs["pred_boxes"][clip, frame], outputs["pred_conf"][clip, frame]
            cost = {}
            for query, actor in itertools.product(range(len(boxes)), actors):
                box, truth = boxes[query], target["boxes"][actor, frame]
                cost[query, actor] = (config.cost_box * plain_l1(box, truth)
                                      - config.cost_giou * plain_giou(box, truth)
                                      - config.cost_confidence * sigmoid(conf[query].item()))
            pairs = min(len(actors), len(boxes))
            ways = []
            for some in itertools.combinations(actors, pairs):
                for queries in itertools.permutations(range(len(boxes)), pairs):
                    ways.append(list(zip(queries, some)))
            matched[clip, frame] = dict(min(ways, key=lambda way: sum(cost[p] for p in way)))
    return matched


def plain_loss(outputs, targets, config):
    """The last layer's four parts, unweighted, by loops over scalars."""
    matched = plain_match(outputs, targets, config)
    sums, weights, pairs = {"class": 0.0, "box": 0.0, "giou": 0.0, "conf": 0.0}, 0.0, 0
    for (clip, frame), actor_of in matched.items():
        target = targets[clip]
        for q in range(outputs["pred_conf"].shape[2]):
            confidence = sigmoid(outputs["pred_conf"][clip, frame, q].item())
            for c, logit in enumerate(outputs["pred_logits"][clip, frame, q].tolist()):
                y = target["labels"][actor_of[q], frame, c].item() if q in actor_of else 0.0
                y = (1 - config.label_smoothing) * y + config.label_smoothing / 2
                p = sigmoid(logit) * (confidence if config.score_with_confidence else 1)
                entropy = -(y * math.log(p) + (1 - y) * math.log(1 - p))
                entropy *= 10 if q in actor_of else 1
                focal = (0.25 * y + 0.75 * (1 - y)) * (1 - p * y - (1 - p) * (1 - y)) ** 2
                sums["class"] += focal * entropy / outputs["pred_logits"].shape[3]
            weight = 1 if q in actor_of else config.no_actor_weight
            sums["conf"] -= weight * math.log(confidence if q in actor_of else 1 - confidence)
            weights += weight
            if q in actor_of:
                box = outputs["pred_boxes"][clip, frame, q]
                truth = target["boxes"][actor_of[q], frame]
                sums["box"] += plain_l1(box, truth)
                sums["giou"] += 1 - plain_giou(box, truth)
                pairs += 1
    divisors = {"class": len(matched), "box": pairs, "giou": pairs, "conf": weights}
    return {name: value / max(divisors[name], 1e-9) for name, value in sums.items()}


def weighted(parts, config):
    return (config.loss_class * parts["class"] + config.loss_box * parts["box"]
            + config.loss_giou * parts["giou"] + config.loss_confidence * parts["conf"])


# --------------------------------------------------------------------------------------------------
# Matching

@pytest.mark.parametrize("seed", range(6))
def test_match_is_the_cheapest_permutation_also_with_more_actors_than_queries(seed):
    outputs = make_outputs(clips=3, seed=seed)
    targets = [make_target(3, seed=seed), make_target(7, seed=seed + 10, present=0.9),
               make_target(0, seed=seed)]
    indices = match(outputs, targets, CONFIG)
    assert {index.dtype for index in indices} == {torch.int64}
    found = {}
    entries = list(zip(*(index.tolist() for index in indices)))
    for clip, frame, query, actor in entries:
        found.setdefault((clip, frame), {})[query] = actor
    expected = plain_match(outputs, targets, CONFIG)
    assert found == {place: pairs for place, pairs in expected.items() if pairs}
    assert max(len(pairs) for pairs in found.values()) == 4  # of up to 7 actors
    order = [(clip, frame, actor) for clip, frame, _, actor in entries]
    assert order == sorted(order)


COSTS = [({"cost_confidence": 1.0}, 1), ({"cost_box": 1.0}, 0), ({"cost_giou": 1.0}, 0),
         ({"cost_confidence": 0.1, "cost_box": 5.0, "cost_giou": 2.0}, 0)]


@pytest.mark.parametrize("costs, winner", COSTS)
def test_each_weight_of_the_cost_decides_alone(costs, winner):
    """One actor, two queries: the first has its box, the second more confidence."""
    target = make_target(1, frames=1, present=1.1)
    target["boxes"][:] = torch.tensor([0.5, 0.5, 0.2, 0.2])
    outputs = make_outputs(clips=1, frames=1, queries=2)
    outputs["pred_boxes"][0, 0] = torch.tensor([[0.5, 0.5, 0.2, 0.2], [0.5, 0.5, 0.1, 0.2]])
    outputs["pred_conf"][0, 0] = torch.tensor([-3.0, 3.0])
    config = replace(CONFIG, **{"cost_confidence": 0.0, "cost_box": 0.0, "cost_giou": 0.0, **costs})
    assert match(outputs, [target], config)[2].tolist() == [winner]


@pytest.mark.parametrize("costs, winner", [({"cost_box": 1.0}, 1), ({"cost_giou": 1.0}, 0)])
def test_l1_and_giou_may_disagree(costs, winner):
    """The first query's L1 is .12 and it overlaps; the second's is .1 and it does not."""
    target = make_target(1, frames=1, present=1.1)
    target["boxes"][:] = torch.tensor([0.5, 0.5, 0.04, 0.04])
    outputs = make_outputs(clips=1, frames=1, queries=2)
    outputs["pred_boxes"][0, 0] = torch.tensor([[0.5, 0.5, 0.1, 0.1], [0.55, 0.55, 0.04, 0.04]])
    config = replace(CONFIG, **{"cost_confidence": 0.0, "cost_box": 0.0, "cost_giou": 0.0, **costs})
    assert match(outputs, [target], config)[2].tolist() == [winner]


# --------------------------------------------------------------------------------------------------
# Eq. 3-5

@pytest.mark.parametrize("changes", [
    {}, {"score_with_confidence": False}, {"label_smoothing": 0.1}, {"no_actor_weight": 0.1},
    {"label_smoothing": 0.2, "score_with_confidence": False, "loss_class": 10.0,
     "loss_confidence": 1.0}])
def test_the_loss_is_that_of_plain_loops(changes):
    config = replace(CONFIG, **changes)
    for seed in range(3):
        outputs, targets = make_outputs(seed=seed), some_targets()
        outputs["pred_logits"].requires_grad_()
        loss, parts = detection_loss(outputs, targets, config)
        expected = plain_loss(outputs, targets, config)
        for name in ("class", "box", "giou", "conf"):
            assert parts[name].item() == pytest.approx(expected[name], rel=1e-9), name
        assert loss.item() == pytest.approx(weighted(expected, config), rel=1e-9)
        assert not parts["class"].requires_grad


def test_deep_supervision_sums_the_losses_of_layers_matched_each_by_itself():
    outputs, targets = make_outputs(aux=2), some_targets()
    layers = [*outputs["aux_outputs"], outputs]
    queries = {tuple(match(layer, targets, CONFIG)[2].tolist()) for layer in layers}
    assert len(queries) > 1  # they do match differently
    loss, parts = detection_loss(outputs, targets, replace(CONFIG, deep_supervision=True))
    each = [detection_loss(layer, targets, CONFIG)[0].item() for layer in layers]
    assert loss.item() == pytest.approx(sum(each), rel=1e-9)
    last_loss, last = detection_loss(outputs, targets, CONFIG)  # off: the last layer only
    for name, part in parts.items():
        assert part.item() == pytest.approx(last[name].item(), rel=1e-9), name
    expected = weighted(plain_loss(outputs, targets, CONFIG), CONFIG)
    assert last_loss.item() == pytest.approx(expected, rel=1e-9)


def test_perfect_boxes_cost_nothing_and_sure_predictions_almost_nothing():
    target = make_target(2, present=1.1)
    outputs = make_outputs(clips=1)
    boxes, labels = target["boxes"].transpose(0, 1), target["labels"].transpose(0, 1)  # (T, N, ...)
    outputs["pred_boxes"][0, :, 1:3] = boxes.double()
    outputs["pred_conf"][:] = torch.tensor([-20.0, 20.0, 20.0, -20.0])
    outputs["pred_logits"][:] = -20.0
    outputs["pred_logits"][0, :, 1:3] = (labels * 40 - 20).double()
    loss, parts = detection_loss(outputs, [target], CONFIG)
    assert loss.item() < 1e-6 and parts["box"] < 1e-12 and parts["giou"] < 1e-12


def test_confidence_loss_of_an_empty_clip_has_a_closed_form():
    outputs = make_outputs(clips=1)
    outputs["pred_conf"][:] = 0.7
    loss, parts = detection_loss(outputs, [make_target(0)], CONFIG)
    assert parts["conf"].item() == pytest.approx(math.log1p(math.exp(0.7)))  # the weight cancels
    assert parts["box"] == 0 and parts["giou"] == 0 and torch.isfinite(loss)


def test_boxes_and_giou_have_closed_forms():
    corners = cxcywh_to_xyxy(torch.tensor([[0.5, 0.4, 0.2, 0.6]]))
    torch.testing.assert_close(corners, torch.tensor([[0.4, 0.1, 0.6, 0.7]]))
    boxes = torch.tensor([[0.0, 0.0, 2.0, 2.0]])
    others = torch.tensor([[0.0, 0.0, 2.0, 2.0], [1.0, 1.0, 3.0, 3.0], [3.0, 0.0, 4.0, 1.0]])
    expected = torch.tensor([1.0, 1 / 7 - 2 / 9, -3 / 8])
    torch.testing.assert_close(box_giou(boxes, others), expected)
    no_area = box_giou(torch.full((1, 4), 0.5), torch.full((1, 4), 0.7))
    assert torch.isfinite(no_area).all()


@pytest.mark.parametrize("z, c", [(0.3, -1.2), (30.0, 30.0), (-80.0, 5.0), (90.0, -90.0),
                                  (-60.0, -60.0)])
def test_score_logit_is_the_products_logit_also_where_the_product_rounds_to_one_or_zero(z, c):
    logit = score_logit(torch.tensor(z), torch.tensor(c)).item()
    odds_against = math.exp(-z) + math.exp(-c) + math.exp(-z - c)  # (1 - s) / s
    assert logit == pytest.approx(-math.log(odds_against), rel=1e-5)


# --------------------------------------------------------------------------------------------------
# Gradients

def test_gradients_are_those_of_the_formula_and_flow_into_logit_and_confidence():
    outputs, targets = make_outputs(clips=2, aux=1), some_targets()
    config = replace(CONFIG, deep_supervision=True, label_smoothing=0.1)

    def loss_of(*tensors):
        first, last = dict(zip(NAMES, tensors[:3])), dict(zip(NAMES, tensors[3:]))
        return detection_loss({**last, "aux_outputs": [first]}, targets, config)[0]

    inputs = [layer[name].requires_grad_()
              for layer in (outputs["aux_outputs"][0], outputs) for name in NAMES]
    assert torch.autograd.gradcheck(loss_of, inputs)
    only_class = replace(CONFIG, loss_box=0.0, loss_giou=0.0, loss_confidence=0.0)
    for with_confidence in (True, False):
        config = replace(only_class, score_with_confidence=with_confidence)
        loss, _ = detection_loss(outputs, targets, config)
        _, to_logits, to_confidence = torch.autograd.grad(loss, inputs[3:])
        assert to_logits.abs().max() > 0
        assert (to_confidence.abs().max() > 0) == with_confidence


@pytest.mark.parametrize("scale", [50.0, -50.0])
def test_gradients_stay_finite_at_extreme_logits_in_float32(scale):
    outputs = make_outputs(dtype=torch.float32)
    for name in ("pred_logits", "pred_conf"):
        outputs[name] = torch.full_like(outputs[name], scale).requires_grad_()
    loss, _ = detection_loss(outputs, some_targets(), CONFIG)
    loss.backward()
    assert torch.isfinite(loss)
    for name in ("pred_logits", "pred_conf"):
        assert torch.isfinite(outputs[name].grad).all()


@pytest.mark.parametrize("aux", [0, 2])
def test_every_output_is_in_the_graph_when_there_is_no_actor(aux):
    outputs = make_outputs(clips=1, aux=aux)
    leaves = [layer[name].requires_grad_()
              for layer in (outputs, *outputs["aux_outputs"]) for name in NAMES]
    loss, _ = detection_loss(outputs, [make_target(0)], replace(CONFIG, deep_supervision=True))
    gradients = torch.autograd.grad(loss, leaves)  # or it raises
    assert gradients[0].abs().max() == 0 and gradients[1].abs().max() > 0


# --------------------------------------------------------------------------------------------------
# Divisors, padding, batches

def test_frames_of_temporal_padding_are_ignored():
    outputs, whole = make_outputs(clips=1, frames=5), make_target(3, frames=5, padded=(0, 3))
    kept = [1, 2, 4]
    cut = {**whole, "frames": torch.ones(3, dtype=torch.bool)}
    for name in ("boxes", "present", "labels"):
        cut[name] = whole[name][:, kept]
    loss, parts = detection_loss(outputs, [whole], CONFIG)
    expected, expected_parts = detection_loss(part_of(outputs, (slice(None), kept)), [cut], CONFIG)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    assert parts["conf"].item() == pytest.approx(expected_parts["conf"].item(), rel=1e-12)
    assert torch.equal(loss_counts([whole], CONFIG), loss_counts([cut], CONFIG))
    assert set(match(outputs, [whole], CONFIG)[1].tolist()) <= set(kept)
    logits = outputs["pred_logits"].requires_grad_()
    gradient, = torch.autograd.grad(detection_loss(outputs, [whole], CONFIG)[0], logits)
    assert gradient[:, [0, 3]].abs().max() == 0
    assert (gradient[:, kept].abs().amax(dim=(2, 3)) > 0).all()


def test_a_clip_of_padding_only_costs_nothing():
    target = make_target(2, padded=(0, 1, 2))
    assert detection_loss(make_outputs(clips=1), [target], CONFIG)[0].item() == 0
    assert loss_counts([target], CONFIG).tolist() == [0, 0, 0]


@pytest.mark.parametrize("frames", [1, 3])
def test_a_batch_of_equal_clips_has_the_loss_of_one(frames):
    outputs = make_outputs(clips=1, frames=frames)
    target = make_target(3, frames=frames, present=0.9)
    twice = part_of(outputs, [0, 0])
    one, two = (detection_loss(outputs, [target], CONFIG)[0],
                detection_loss(twice, [target, target], CONFIG)[0])
    assert two.item() == pytest.approx(one.item(), rel=1e-12)
    single, double = match(outputs, [target], CONFIG), match(twice, [target, target], CONFIG)
    assert double[2].tolist() == single[2].tolist() * 2
    assert double[0].tolist() == [0] * len(single[0]) + [1] * len(single[0])


def test_loss_counts_are_frames_pairs_and_weight():
    target = make_target(6, present=1.1, padded=(2,))  # 2 frames of 6 actors, 4 queries
    assert loss_counts([target], CONFIG).tolist() == [2, 8, 8]
    target = make_target(1, present=1.1)  # 3 frames of 1 actor
    assert loss_counts([target, make_target(0)], CONFIG).tolist() == [6, 3, 3 + 0.5 * 21]


def test_micro_batches_with_the_counts_of_the_whole_add_up_to_the_large_batch():
    config = replace(CONFIG, deep_supervision=True)
    outputs = make_outputs(clips=4, aux=1)
    targets = [make_target(3, seed=1), make_target(0, seed=2), make_target(6, seed=3, padded=(0,)),
               make_target(1)]
    leaves = [layer[name].requires_grad_()
              for layer in (outputs, outputs["aux_outputs"][0]) for name in NAMES]
    whole, whole_parts = detection_loss(outputs, targets, config)
    gradients = torch.autograd.grad(whole, leaves)

    shares = [slice(0, 1), slice(1, 2), slice(2, 4)]  # the second has no actor at all
    counts = sum(loss_counts(targets[share], config) for share in shares)
    assert torch.equal(counts, loss_counts(targets, config))
    total, parts = 0, {"class": 0, "box": 0, "giou": 0, "conf": 0}
    for share in shares:
        loss, micro = detection_loss(part_of(outputs, share), targets[share], config, counts=counts)
        total = total + loss
        parts = {name: parts[name] + micro[name] for name in parts}
    assert total.item() == pytest.approx(whole.item(), rel=1e-12)
    for name, part in whole_parts.items():
        assert parts[name].item() == pytest.approx(part.item(), rel=1e-12), name
    for gradient, expected in zip(torch.autograd.grad(total, leaves), gradients):
        torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-14)


# --------------------------------------------------------------------------------------------------
# Devices and precisions

class NoBlockingCopies(TorchDispatchMode):
    """Fails where an operation takes tensors of two devices, or copies between them and waits."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        tensors = [x for x in tree_leaves((args, kwargs, result)) if isinstance(x, torch.Tensor)]
        if len({tensor.device for tensor in tensors}) > 1:
            assert kwargs.get("non_blocking"), f"{function} waits for a copy between devices"
        return result


def test_nothing_but_the_costs_is_waited_for(monkeypatch):
    """Outputs on the device `meta`, in place of a GPU, and targets on the CPU."""
    outputs = make_outputs()
    outputs = {name: outputs[name].to("meta") for name in NAMES}
    assign = objective._assign

    def assign_as_far_as_the_costs(boxes, confidence, true_boxes, *rest):
        with pytest.raises(NotImplementedError, match="copy out of meta tensor"):
            assign(boxes, confidence, true_boxes, *rest)
        return torch.zeros(2, len(boxes), len(true_boxes), dtype=torch.int64, device="meta")

    monkeypatch.setattr(objective, "_assign", assign_as_far_as_the_costs)
    with NoBlockingCopies():
        loss, parts = detection_loss(outputs, some_targets(), CONFIG)
    assert {value.device.type for value in (loss, *parts.values())} == {"meta"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_outputs_are_taken_to_float32_also_under_autocast(dtype):
    outputs = {name: value.to(dtype) for name, value in make_outputs().items() if name in NAMES}
    precise = {name: value.float() for name, value in outputs.items()}
    expected, _ = detection_loss(precise, some_targets(), CONFIG)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, _ = detection_loss(outputs, some_targets(), CONFIG)
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(expected.item(), rel=1e-6)


# --------------------------------------------------------------------------------------------------
# Bad input

@pytest.mark.parametrize("name, value", [
    ("pred_boxes", math.nan), ("pred_logits", math.nan), ("pred_conf", math.nan),
    ("pred_boxes", math.inf), ("pred_conf", -math.inf)])
def test_outputs_that_are_not_finite_are_matched_and_make_the_loss_not_finite(name, value):
    outputs, targets = make_outputs(), some_targets()
    outputs[name][:] = value
    assert len(match(outputs, targets, CONFIG)[0]) == int(loss_counts(targets, CONFIG)[1])
    assert not torch.isfinite(detection_loss(outputs, targets, CONFIG)[0])


def test_a_predicted_box_of_no_area_has_a_finite_loss():
    outputs = make_outputs(clips=1)
    boxes = torch.zeros_like(outputs["pred_boxes"]).requires_grad_()
    loss, _ = detection_loss({**outputs, "pred_boxes": boxes}, [make_target(3)], CONFIG)
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(boxes.grad).all()


@pytest.mark.parametrize("targets, message", [
    (some_targets()[:1], "1 targets for outputs of 2 clips"),
    ([make_target(3), make_target(2, frames=4)], "clip clip0.*3 frames"),
    (some_targets(classes=5), "5 classes for outputs of 3")])
def test_targets_that_do_not_fit_are_named(targets, message):
    with pytest.raises(ValueError, match=message):
        detection_loss(make_outputs(), targets, CONFIG)
