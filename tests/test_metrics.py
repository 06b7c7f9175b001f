"""metrics.py against other people's evaluators (golden cases), slow loops that say the rules again,
and the truth."""

import functools
import json
import pickle

import numpy as np
import pytest
from conftest import SHARED

from beside.synthetic import SyntheticDataset
from metrics import ava_map, box_iou, frame_map, link_tubes, video_map
from model import PRESETS

GOLDEN = SHARED / "golden" / "eval"
golden = pytest.mark.skipif(not GOLDEN.exists(), reason="needs ../shared/golden/eval")
annotations = pytest.mark.skipif(not (SHARED / "data").exists(),
                                 reason="needs ../shared/data, the real annotations")
THRESHOLDS = (0.2, 0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95)
DATASETS = ("jhmdb", "ucf24")


@functools.cache
def expected(group):
    return json.loads((GOLDEN / "expected.json").read_text())[group]


def frames_of(tubes):
    """Tubes as ground truth of frames."""
    lengths = [len(tube["frames"]) for tube in tubes]
    return {"video": np.repeat([tube["video"] for tube in tubes], lengths),
            "frame": np.concatenate([tube["frames"] for tube in tubes]),
            "label": np.repeat([tube["label"] for tube in tubes], lengths),
            "box": np.concatenate([tube["boxes"] for tube in tubes])}


def unpack(video, label, start, offset, box, score=None):
    tubes = []
    for index, (first, last) in enumerate(zip(offset[:-1], offset[1:])):
        tubes.append({"video": int(video[index]), "label": int(label[index]),
                      "frames": start[index] + np.arange(last - first), "boxes": box[first:last]})
        if score is not None:
            tubes[-1]["score"] = float(score[index])
    return tubes


@functools.cache
def load(name):
    """A golden case: number of classes, ground-truth tubes, detections as link_tubes takes them,
    tubes, lengths of the videos."""
    frames, tubes = np.load(GOLDEN / f"{name}_frames.npz"), np.load(GOLDEN / f"{name}_tubes.npz")
    keys = ("tube_video", "tube_class", "tube_start", "tube_offset", "box")
    truth = unpack(*(frames["gt_" + key] for key in keys))
    keys = ("video", "class", "start", "offset", "box", "score")
    given = unpack(*(tubes["tube_" + key] for key in keys))
    detections = {"video": frames["det_video"], "frame": frames["det_frame"],
                  "box": frames["det_box"], "class_prob": frames["det_class_prob"],
                  "conf": frames["det_person_prob"]}
    lengths = dict(enumerate(frames["video_nframes"].tolist()))
    return len(frames["labels"]), truth, detections, given, lengths


def dense(detections):
    conf = detections["conf"].astype(np.float64)[:, None]
    return {"video": detections["video"], "frame": detections["frame"], "box": detections["box"],
            "scores": detections["class_prob"].astype(np.float64) * conf}


def sparse(table):
    number, classes = table["scores"].shape
    rows = {name: np.repeat(values, classes, 0) for name, values in table.items()}
    del rows["scores"]
    return rows | {"label": np.tile(np.arange(classes), number), "score": table["scores"].ravel()}


def differs(result, case):
    """Largest difference of a result to a golden one, classes and mean; NaN must be NaN."""
    wanted = np.array([np.nan if ap is None else ap for ap in case["per_class"]], np.float64)
    assert (np.isnan(result["AP"]) == np.isnan(wanted)).all()
    return max(np.nanmax(np.abs(result["AP"] - wanted)), abs(result["mAP"] - case["mAP"]))


# ---- golden cases -------------------------------------------------------------------------------

@golden
@pytest.mark.parametrize("name", DATASETS)
@pytest.mark.parametrize("form", ["dense", "sparse"])
def test_frame_map_is_that_of_mmaction2_and_class_query_vad(name, form):
    classes, truth, detections, _, _ = load(name)
    found = dense(detections) if form == "dense" else sparse(dense(detections))
    for key, case in expected(name).items():
        if key.startswith(("frame/all/mmaction2@", "frame/all/cqvad@")):
            result = frame_map(found, frames_of(truth), classes, float(key.split("@")[1]))
            assert differs(result, case) < 1e-9, key


@golden
@pytest.mark.parametrize("name", DATASETS)
def test_video_map_of_given_tubes_counts_frames_inclusively(name):
    classes, truth, _, given, _ = load(name)
    for threshold in THRESHOLDS:
        case = expected(name)[f"tubes/all/ref_only_frame_plus_one@{threshold}"]
        assert differs(video_map(given, truth, classes, threshold), case) < 1e-9, threshold
    several = video_map(given, truth, classes, np.arange(0.5, 1, 0.05))
    assert differs(several, expected(name)["tubes/all/ref_only_frame_plus_one@0.5:0.95"]) < 1e-9


@golden
@pytest.mark.parametrize("name", DATASETS)
def test_strict_linking_is_mmaction2s_repaired(name):
    classes, truth, detections, _, _ = load(name)
    tubes = link_tubes(detections)
    wanted = expected(name)
    counts = np.bincount([tube["label"] for tube in tubes], minlength=classes)
    assert counts.tolist() == wanted["linked/all/mmaction2_repaired_number_of_tubes"]
    # mmaction2 takes a tube for (last - first) frames long, which moves a match at 0.5 and at 0.55;
    # counted its way all thresholds agree, counted inclusively all others.
    for threshold in THRESHOLDS:
        case = wanted[f"linked/all/ref_mmaction2_repaired@{threshold}"]
        slow = slow_video_map(tubes, truth, classes, threshold, plus_one=0)
        assert differs(slow, case) < 1e-6, threshold
        ours = video_map(tubes, truth, classes, threshold)
        slow = slow_video_map(tubes, truth, classes, threshold)
        np.testing.assert_allclose(ours["AP"], slow["AP"], atol=1e-12)
        if threshold not in (0.5, 0.55):
            assert differs(ours, case) < 1e-6, threshold


@golden
@pytest.mark.parametrize("name", DATASETS)
def test_linking_of_best_classes_only(name):
    classes, _, detections, _, _ = load(name)
    prob = detections["class_prob"]
    best = np.where(np.arange(classes) == prob.argmax(1)[:, None], prob, 0)
    tubes = link_tubes({**detections, "class_prob": best}, min_score=1e-30)
    counts = np.bincount([tube["label"] for tube in tubes], minlength=classes)
    wanted = expected(name)["linked/argmax/mmaction2_repaired_number_of_tubes"]
    assert counts.tolist() == wanted


@golden
@pytest.mark.parametrize("name", DATASETS)
def test_released_linking_gives_class_query_vads_tubes_and_numbers(name):
    classes, truth, detections, _, num_frames = load(name)
    tubes = link_tubes(detections, "released", num_frames=num_frames)
    wanted = np.load(GOLDEN / f"{name}_linked_cqvad.npz")
    keys = ("video", "class", "start", "offset", "box", "score")
    wanted = unpack(*(wanted["tube_" + key] for key in keys))
    assert len(tubes) == len(wanted)

    def order(tube):
        return (tube["video"], tube["label"], tube["frames"][0], round(tube["score"], 4),
                len(tube["frames"]))

    for tube, other in zip(sorted(tubes, key=order), sorted(wanted, key=order)):
        assert order(tube)[:3] == order(other)[:3]
        assert abs(tube["score"] - other["score"]) < 1e-5
        assert np.array_equal(tube["boxes"], other["boxes"])
    for threshold in THRESHOLDS:
        result = video_map(tubes, truth, classes, threshold)
        case = expected(name)[f"linked/official/cqvad@{threshold}"]
        assert differs(result, case) < 1e-6, threshold


@golden
@pytest.mark.parametrize("name, key, protocol", [
    ("jhmdb", "all", "released_ucf"), ("ucf24", "all", "released_ucf"),
    ("jhmdb", "all_notemporal", "released_jhmdb")])
def test_released_scoring_of_given_tubes(name, key, protocol):
    classes, truth, _, given, _ = load(name)
    for threshold in THRESHOLDS:
        result = video_map(given, truth, classes, threshold, protocol=protocol)
        case = expected(name)[f"tubes/{key}/cqvad@{threshold}"]
        assert differs(result, case) < 1e-6, threshold


@golden
@pytest.mark.parametrize("case", ["tiny", "large", "dense"])
@pytest.mark.parametrize("cap, peers", [(50, ("ref_cap50", "activitynet_2018_3fee089")),
                                        (None, ("ref_plain", "activitynet_2017_be7854e"))])
def test_ava_map_is_that_of_the_official_script(case, cap, peers):
    label_map = GOLDEN / ("ava_tiny_labelmap.pbtxt" if case == "tiny" else "ava_labelmap.pbtxt")
    excluded = None if case == "tiny" else GOLDEN / f"ava_{case}_excluded.csv"
    result = ava_map(GOLDEN / f"ava_{case}_det.csv", str(GOLDEN / f"ava_{case}_gt.csv"), label_map,
                     excluded, cap)
    for peer in peers:
        wanted = expected("ava")[f"ava_{case}/{peer}"]
        assert abs(result["mAP"] - wanted["mAP"]) < 1e-9
        known = {action: ap for action, ap in result["AP"].items() if not np.isnan(ap)}
        per_class = {int(action): ap for action, ap in wanted["per_class"].items()}
        assert known == pytest.approx(per_class, abs=1e-9)


@golden
@pytest.mark.parametrize("case", ["large", "dense"])
def test_ava_ground_truth_may_list_empty_key_frames(case):
    files = [GOLDEN / f"ava_{case}_{part}" for part in ("det.csv", "gt_2020.csv", "excluded.csv")]
    result = ava_map(files[0], files[1], GOLDEN / "ava_labelmap.pbtxt", files[2])
    wanted = expected("ava")[f"ava_{case}/activitynet_2020_af461c3_on_gt_2020"]
    assert abs(result["mAP"] - wanted["mAP"]) < 1e-9


@golden
def test_multisports_sample_of_mmaction2():
    case = np.load(GOLDEN / "multisports.npz")
    keys = ("tube_video", "tube_class", "tube_start", "tube_offset", "box")
    truth = unpack(*(case["gt_" + key] for key in keys))
    height, width = case["video_hw"][0]
    prob, names = case["det_class_prob"], case["labels"].tolist()
    box = case["det_box"] * np.array([width, height, width, height], np.float32)
    frame = np.repeat(case["sample_frame"], np.diff(case["sample_offset"]))
    video = np.zeros(len(box), int)
    found = {"video": video, "frame": frame, "box": box, "label": prob.argmax(1),
             "score": prob.max(1)}
    wanted = expected("multisports")
    ap = frame_map(found, frames_of(truth), len(names))["AP"]
    known = {names[i]: ap[i] for i in np.flatnonzero(~np.isnan(ap))}
    assert known == pytest.approx(wanted["multisports/frame@0.5"]["per_class"], abs=1e-9)
    best = np.where(np.arange(len(names)) == prob.argmax(1)[:, None], prob, 0)
    tubes = link_tubes({"video": video, "frame": frame, "box": box, "class_prob": best,
                        "conf": np.ones(len(box))}, min_score=1e-30)

    def order(tube):
        return -tube["score"]

    linked = sorted(wanted["multisports/repaired_linked_tubes"], key=order)
    for tube, other in zip(sorted(tubes, key=order), linked, strict=True):
        assert names[tube["label"]] == other["label"]
        assert tube["frames"][[0, -1]].tolist() == [other["first_frame"], other["last_frame"]]
        assert tube["score"] == pytest.approx(other["score"], abs=1e-6)
    scored = [video_map(tubes, truth, len(names), iou)["mAP"] for iou in (0.2, 0.5, 0.75)]
    assert scored == [0.5, 0.5, 0.375]


# ---- the truth scores 1 -------------------------------------------------------------------------

def assert_truth_is_perfect(tubes, classes):
    frames = frames_of(tubes)
    scored = {**frames, "score": np.ones(len(frames["label"]))}
    assert frame_map(scored, frames, classes)["mAP"] == 1.0
    result = video_map([{**tube, "score": 1.0} for tube in tubes], tubes, classes, (0.5, 0.95, 1))
    assert result["mAP"] == 1.0 and (result["AP"] == 1.0).all()


@annotations
def test_truth_of_ucf101_24_scores_one_though_two_tubes_are_there_twice():
    scipy_io = pytest.importorskip("scipy.io")
    file = scipy_io.loadmat(SHARED / "data/ucf101_24/finalAnnots.mat", squeeze_me=True,
                            struct_as_record=False)
    tubes = []
    for index, video in enumerate(file["annot"]):
        for tube in np.atleast_1d(video.tubes):
            corner = np.atleast_2d(tube.boxes).astype(np.float64)
            corner[:, 2:] += corner[:, :2]
            tubes.append({"video": index, "label": int(tube.__dict__["class"]) - 1, "boxes": corner,
                          "frames": np.arange(tube.sf, tube.ef + 1)})
    keys = {(tube["video"], tube["frames"].tobytes(), tube["boxes"].tobytes()) for tube in tubes}
    assert (len(tubes), len(keys)) == (4458, 4456)
    assert_truth_is_perfect(tubes, 24)


@annotations
def test_truth_of_jhmdb_scores_one():
    with open(SHARED / "data/jhmdb/JHMDB-GT.pkl", "rb") as file:
        truth = pickle.load(file, encoding="latin1")
    tubes = []
    for video in sorted(truth["gttubes"]):
        for label, several in truth["gttubes"][video].items():
            for tube in several:
                tubes.append({"video": video, "label": label, "frames": tube[:, 0].astype(int),
                              "boxes": tube[:, 1:]})
    assert len(tubes) == 928
    assert_truth_is_perfect(tubes, 21)


def test_truth_of_the_synthetic_clips_scores_one():
    frames, tubes = SyntheticDataset(PRESETS["synthetic"], "val").ground_truth()
    assert set(frames["label"]) == set(range(9))
    assert len(frames["frame"]) == sum(len(tube["frames"]) for tube in tubes)
    assert_truth_is_perfect(tubes, 9)


def test_truth_scores_one_and_a_second_box_around_one_annotated_twice_is_false():
    box = np.array([[0, 0, 10, 10], [0, 0, 10, 10.]])
    truth = {"frame": np.zeros(2, int), "label": np.zeros(2, int), "box": box}
    assert frame_map({**truth, "score": np.ones(2)}, truth, 1)["mAP"] == 1.0
    near = {**truth, "box": box + [[0.5, 0, 0, 0], [0, 0.25, 0, 0]], "score": np.array([0.9, 0.8])}
    assert frame_map(near, truth, 1)["mAP"] == 0.5
    tubes = [{"video": "v", "label": 0, "frames": [1, 2], "boxes": box}] * 2
    assert video_map([{**tube, "score": 1} for tube in tubes], tubes, 1)["mAP"] == 1.0


def test_of_two_truths_with_equal_iou_the_free_one_is_taken():
    truth = {"frame": np.zeros(2, int), "label": np.zeros(2, int),
             "box": np.array([[0, 0, 10, 10], [4, 0, 14, 10]])}
    found = {"frame": np.zeros(2, int), "label": np.zeros(2, int), "score": np.array([0.9, 0.8]),
             "box": np.array([[0, 0, 10, 10], [2, 0, 12, 10]])}
    assert frame_map(found, truth, 1)["mAP"] == 1.0
    csv = {"video": np.zeros(2, int), "timestamp": np.full(2, 902), "label": np.ones(2, int)}
    official = ava_map({**csv, "box": found["box"], "score": found["score"]},
                       {**csv, "box": truth["box"]}, [1])
    assert official["AP"] == {1: 0.5}   # the official script takes the first


def test_a_detection_between_two_truths_takes_one_of_them():
    box = np.array([[0, 0, 10, 10], [4, 0, 14, 10.]])
    truth = {"frame": np.zeros(2, int), "label": np.zeros(2, int), "box": box}
    between = {"frame": np.zeros(1, int), "label": np.zeros(1, int), "score": np.ones(1),
               "box": box.mean(0, keepdims=True)}
    assert frame_map(between, truth, 1)["mAP"] == 0.5
    tubes = [{"video": 0, "label": 0, "frames": [1, 2], "boxes": np.tile(one, (2, 1))}
             for one in box]
    tube = {**tubes[0], "score": 1.0, "boxes": np.tile(between["box"], (2, 1))}
    assert video_map([tube], tubes, 1)["mAP"] == 0.5
    released = video_map([tube], tubes, 1, protocol="released_ucf")["mAP"]
    assert released == pytest.approx(0.5, abs=1e-5)


# ---- slow loops ---------------------------------------------------------------------------------

def slow_iou(a, b, plus_one=0):
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]) + plus_one)
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]) + plus_one)
    area = [(box[2] - box[0] + plus_one) * (box[3] - box[1] + plus_one) for box in (a, b)]
    return width * height / (sum(area) - width * height) if sum(area) > 0 else 0.0


def slow_ap(scores, overlaps, threshold):
    """overlaps (n, m) of every detection with every ground truth of the class, none of which is
    there twice"""
    number = overlaps.shape[1]
    taken, points, hits = set(), [], 0
    for place, one in enumerate(sorted(range(len(scores)), key=lambda i: -scores[i])):
        best = overlaps[one].max(initial=0)
        free = [j for j in range(number) if overlaps[one, j] == best and j not in taken]
        if best >= threshold and free:
            taken.add(free[0])
            hits += 1
            points.append(hits / (place + 1))
    return sum(max(points[i:]) for i in range(len(points))) / number


def slow_video_iou(tube, truth, plus_one=1):
    def boxes_of(table):
        boxes = np.asarray(table["boxes"], float).tolist()
        return dict(zip(np.asarray(table["frames"]).tolist(), boxes))

    boxes = boxes_of(truth)
    spatial = []
    for frame, box in boxes_of(tube).items():
        if frame in boxes:
            spatial.append(slow_iou(box, boxes[frame]))
    first, last = zip(*((min(t["frames"]), max(t["frames"])) for t in (tube, truth)))
    common, joint = min(last) - max(first) + plus_one, max(last) - min(first) + plus_one
    return np.mean(spatial) * common / joint if spatial else 0.0


def slow_video_map(tubes, truth, classes, threshold, plus_one=1):
    result = np.full(classes, np.nan)
    for label in {tube["label"] for tube in truth}:
        of_class = [tube for tube in truth if tube["label"] == label]
        seen, unique = set(), []        # where an actor is annotated twice, the copy is never met
        for tube in of_class:
            frames, boxes = np.asarray(tube["frames"]), np.asarray(tube["boxes"])
            key = tube["video"], frames.tobytes(), boxes.tobytes()
            unique.append(key not in seen)
            seen.add(key)
        found = [tube for tube in tubes if tube["label"] == label]
        overlaps = np.full((len(found), len(of_class)), -1.0)
        for i, j in np.ndindex(overlaps.shape):
            if unique[j] and found[i]["video"] == of_class[j]["video"]:
                overlaps[i, j] = slow_video_iou(found[i], of_class[j], plus_one)
        result[label] = slow_ap([tube["score"] for tube in found], overlaps, threshold)
    return {"mAP": np.nanmean(result), "AP": result}


def random_boxes(generator, number):
    corner = generator.integers(0, 12, (number, 2))
    boxes = np.concatenate([corner, corner + generator.integers(1, 9, (number, 2))], 1)
    return boxes.astype(np.float32)


@pytest.mark.parametrize("seed", range(20))
def test_frame_map_is_what_a_slow_loop_finds_on_crowded_frames(seed):
    generator = np.random.default_rng(seed)
    frames, classes, several = int(generator.integers(1, 6)), 3, 12
    number = int(generator.integers(1, 60))
    truth = {"frame": generator.integers(0, frames, several),
             "label": generator.integers(0, classes - 1, several),
             "box": random_boxes(generator, several)}
    columns = np.column_stack([truth["frame"], truth["label"], truth["box"]])
    rows = np.unique(columns, axis=0, return_index=True)[1]
    truth = {name: values[rows] for name, values in truth.items()}
    table = {"frame": generator.integers(0, frames + 1, number),
             "box": random_boxes(generator, number),
             "scores": generator.integers(0, 9, (number, classes)) / 8}     # many equal ones
    threshold = generator.choice([0.3, 0.5])
    wanted = np.full(classes, np.nan)
    for label in set(truth["label"].tolist()):
        of_class = np.flatnonzero(truth["label"] == label)
        overlaps = np.full((number, len(of_class)), -1.0)
        for i, j in np.ndindex(overlaps.shape):
            if table["frame"][i] == truth["frame"][of_class[j]]:
                overlaps[i, j] = slow_iou(table["box"][i].astype(float),
                                          truth["box"][of_class[j]].astype(float))
        wanted[label] = slow_ap(table["scores"][:, label].tolist(), overlaps, threshold)
    for found in (table, sparse(table)):
        result = frame_map(found, truth, classes, threshold)
        np.testing.assert_allclose(result["AP"], wanted, atol=1e-12)
        assert result["mAP"] == pytest.approx(np.nanmean(wanted), abs=1e-12)


@pytest.mark.parametrize("seed", range(10))
def test_video_map_is_what_a_slow_loop_finds(seed):
    generator = np.random.default_rng(seed)

    def tube():
        frames = 1 + np.sort(generator.permutation(12)[:generator.integers(1, 12)])
        shifts = generator.integers(-1, 2, (len(frames), 4)).astype(np.float32)
        return {"video": f"video {generator.integers(2)}", "label": int(generator.integers(3)),
                "frames": frames, "score": int(generator.integers(5)) / 4,
                "boxes": np.array([2, 2, 9, 9]) + shifts}

    truth = [tube() for _ in range(6)]
    tubes = [tube() for _ in range(int(generator.integers(0, 30)))]
    several = [video_map(tubes, truth, 4, iou) for iou in (0.1, 0.3)]
    for iou, result in zip((0.1, 0.3), several):
        slow = slow_video_map(tubes, truth, 4, iou)
        np.testing.assert_allclose(result["AP"], slow["AP"], atol=1e-12)
    both = video_map(tubes, truth, 4, (0.1, 0.3))
    np.testing.assert_allclose(both["AP"], np.mean([result["AP"] for result in several], 0))
    assert both["mAP"] == pytest.approx(np.mean([result["mAP"] for result in several]))


def slow_soft_nms(score, boxes):
    """{row: score} of a frame and class -> the rows that are kept, best first, and all scores."""
    score, touched = dict(score), set()
    for i in sorted(score, key=lambda i: -score[i]):
        if i not in touched:
            touched.add(i)
            for j in set(score) - touched:
                overlap = slow_iou(boxes[i], boxes[j], plus_one=1)
                if overlap > 0.6:
                    touched.add(j)
                    score[j] *= 1 - overlap
    return sorted(score, key=lambda i: -score[i])[:10], score


def slow_link(detections, min_score, max_gap, min_length):
    """ACT's linking of one video and class after another, a box at a time
    -> set of (video, label, rows, score)"""
    found = set()
    number, boxes = detections["frame"].tolist(), detections["box"].astype(float).tolist()
    videos, classes = detections["video"].max() + 1, detections["class_prob"].shape[1]
    for video, label in np.ndindex(videos, classes):
        live, ended = [], []
        inside = np.flatnonzero(detections["video"] == video).tolist()
        for frame in sorted({number[i] for i in inside}):
            score = {}
            for i in inside:
                value = float(detections["class_prob"][i, label]) * float(detections["conf"][i])
                if number[i] == frame and value >= min_score:
                    score[i] = value
            free, score = slow_soft_nms(score, boxes)
            ended += [tube for tube in live if frame - number[tube[-1][0]] > max_gap]
            live = [tube for tube in live if frame - number[tube[-1][0]] <= max_gap]
            for tube in sorted(live, key=lambda tube: -np.mean([value for _, value in tube])):
                fits = [i for i in free if slow_iou(boxes[i], boxes[tube[-1][0]]) >= 0.5]
                if fits:
                    free.remove(fits[0])
                    tube.append((fits[0], score[fits[0]]))
            live += [[(i, score[i])] for i in free]
        for tube in ended + live:
            rows, values = zip(*tube)
            length = number[rows[-1]] - number[rows[0]] + 1
            if length >= min_length and np.mean(values) >= 0.005:
                found.add((video, label, rows, float(np.mean(values))))
    return found


def crowd(seed, number=500, classes=3):
    """Detections of three videos in which more than ten boxes meet on a frame."""
    generator = np.random.default_rng(seed)
    found = {"video": generator.integers(0, 3, number), "frame": generator.integers(1, 14, number),
             "class_prob": generator.random((number, classes)).astype(np.float32) ** 4,
             "conf": generator.random(number)}
    corner = generator.integers(0, 4, (number, 1)) * 12 + generator.integers(0, 5, (number, 2))
    sides = 10 + generator.integers(0, 4, (number, 2))
    return found | {"box": np.append(corner, corner + sides, 1).astype(np.float32)}


def facts(tube):
    return tube["video"], tube["label"], tube["frames"].tobytes(), tube["boxes"].tobytes()


@pytest.mark.parametrize("seed, max_gap", [(0, 1), (1, 1), (2, 2), (3, 3), (4, 4)])
def test_linking_is_what_a_slow_loop_finds(seed, max_gap):
    detections = crowd(seed)
    frame = detections["frame"]
    assert np.bincount(detections["video"] * 100 + frame).max() > 12        # 10 are kept
    slow = slow_link(detections, 0.01, max_gap, 4)
    tubes = link_tubes(detections, min_score=0.01, max_gap=max_gap, min_length=4)
    assert len(tubes) == len(slow) > 20
    gaps = [len(rows) <= frame[rows[-1]] - frame[rows[0]] for _, _, rows, _ in slow]
    assert any(gaps) == (max_gap > 1)
    wanted = {}
    for video, label, rows, score in slow:
        rows = list(rows)
        tube = {"video": video, "label": label, "frames": frame[rows],
                "boxes": detections["box"][rows]}
        wanted[facts(tube)] = score
    assert {facts(tube): tube["score"] for tube in tubes} == pytest.approx(wanted, abs=1e-8)


@pytest.mark.parametrize("protocol", ["strict", "released_ucf", "released_jhmdb"])
def test_each_video_is_linked_by_itself(protocol):
    detections = crowd(5)
    detections["conf"] = detections["conf"] ** 0.1
    options = {"protocol": protocol, "min_length": 4}
    whole = link_tubes(detections, **options)
    alone = []
    for video in range(3):
        inside = detections["video"] == video
        own = {name: values[inside] for name, values in detections.items()}
        alone += link_tubes(own, **options)
    assert len(whole) == len(alone) > 10
    for tube, other in zip(whole, alone):
        assert facts(tube) == facts(other) and tube["score"] == other["score"]


# ---- a frame is a pair of video and frame -------------------------------------------------------

def renamed(table, videos, frames, name="frame"):
    """The table with other identities of videos and frames, arrays to look them up in."""
    return {**table, "video": videos[table["video"]], name: frames[table[name]]}


@pytest.mark.parametrize("videos, frames", [
    (np.array([0, 1, 2]), 10 ** 9 + np.arange(20)),
    (np.array([5, 10 ** 12, 7]), np.arange(20) * 1_000_000),            # 1,000,000 of the first and
    (np.array(["a", "b", "c"]), np.arange(20)),                         # 0 of a next stay apart
    (np.array([2, 0, 1]), np.array([f"frame {i}" for i in range(20)])),
    (np.array(["b", "a", "c"], object), np.array([f"{i}" for i in range(20)]))])
def test_videos_and_frames_may_be_any_integers_or_strings(videos, frames):
    detections = crowd(6, number=200)
    truth = {name: detections[name][::3] for name in ("video", "frame", "box")}
    truth["label"] = np.arange(len(truth["frame"])) % 3
    plain = frame_map(dense(detections), truth, 3)
    assert 0 < plain["mAP"] < 1
    found = renamed(dense(detections), videos, frames)
    result = frame_map(found, renamed(truth, videos, frames), 3)
    np.testing.assert_array_equal(result["AP"], plain["AP"])
    packed = {**dense(detections), "frame": detections["video"] * 100 + detections["frame"]}
    one_video = {**truth, "frame": truth["video"] * 100 + truth["frame"]}
    del packed["video"], one_video["video"]
    np.testing.assert_array_equal(frame_map(packed, one_video, 3)["AP"], plain["AP"])


@pytest.mark.parametrize("videos, seconds", [
    (np.array([3, 4, 5]), 10 ** 7 + np.arange(20)),
    (np.array(["b", "a", "c"]), np.arange(20) * 10 ** 6)])
def test_ava_s_key_frames_may_be_any_integers(videos, seconds):
    detections = crowd(7, number=200)
    table = {**dense(detections), "timestamp": detections["frame"]}
    del table["frame"]
    truth = {name: table[name][::3] for name in ("video", "timestamp", "box")}
    truth["label"] = np.arange(len(truth["box"])) % 3 + 1
    excluded = {"video": np.array([1, 2]), "timestamp": np.array([4, 7])}
    plain = ava_map(table, truth, [1, 2, 3], excluded, cap=9)
    assert 0 < plain["mAP"] < 1 and plain != ava_map(table, truth, [1, 2, 3], cap=9)
    found, truth, excluded = (renamed(part, videos, seconds, "timestamp")
                              for part in (table, truth, excluded))
    assert ava_map(found, truth, [1, 2, 3], excluded, cap=9) == plain


@pytest.mark.parametrize("names", [np.array([10 ** 12, 1, 7]), np.array(["b", "a", "c"])])
def test_tubes_of_renamed_videos_and_late_frames_are_the_same(names):
    detections = crowd(8, number=300)
    plain = link_tubes(detections, min_length=4)
    late = {**detections, "video": names[detections["video"]],
            "frame": detections["frame"] + 10 ** 7}
    tubes = link_tubes(late, min_length=4)
    assert len(tubes) == len(plain)
    key = {facts({**tube, "video": names[tube["video"]], "frames": tube["frames"] + 10 ** 7})
           for tube in plain}
    assert {facts(tube) for tube in tubes} == key


# ---- behaviour ----------------------------------------------------------------------------------

def one_track(frames, video="v", conf=1.0):
    frames = np.asarray(frames)
    return {"video": np.full(len(frames), video), "frame": frames,
            "box": np.tile([[5, 5, 50, 90.]], (len(frames), 1)),
            "class_prob": np.tile([[0.9, 0.2]], (len(frames), 1)),
            "conf": np.full(len(frames), conf)}


def spans(tubes):
    """First and last frame of the tubes of class 0."""
    return sorted((tube["frames"][0], tube["frames"][-1]) for tube in tubes if tube["label"] == 0)


def test_a_tube_ends_after_max_gap_frames_without_a_match():
    track = one_track([*range(1, 21), *range(23, 43)])
    assert spans(link_tubes(track)) == [(1, 20), (23, 42)]
    assert spans(link_tubes(track, max_gap=2)) == [(1, 20), (23, 42)]
    assert spans(link_tubes(track, max_gap=3)) == [(1, 42)]
    assert link_tubes(one_track(range(1, 15))) == []
    assert len(link_tubes(one_track(range(1, 16)))) == 2
    assert [tube["label"] for tube in link_tubes(track, min_score=0.5)] == [0, 0]
    assert link_tubes({name: values[:0] for name, values in track.items()}) == []


def test_a_long_video_is_suppressed_in_parts_and_linked_whole():
    tubes = link_tubes(one_track(range(1, 201)))
    assert spans(tubes) == [(1, 200)] and tubes[0]["score"] == pytest.approx(0.9)


def test_videos_of_one_frame_each_stay_apart():
    tracks = one_track([7], "a"), one_track([7], "b")
    both = {name: np.concatenate([track[name] for track in tracks]) for name in tracks[0]}
    tubes = [(tube["video"], tube["label"]) for tube in link_tubes(both, min_length=1)]
    assert tubes == [("a", 0), ("a", 1), ("b", 0), ("b", 1)]


def test_released_tube_of_ucf_starts_a_frame_late_and_gaps_shorten_it():
    track = one_track([3, 4, 6, 7, 8])
    track["conf"][1] = 0.69                     # not a person for certain: no box in frame 4
    assert link_tubes(one_track([3, 4], conf=0.69), "released_ucf") == []
    assert link_tubes(one_track([1]), "released_ucf") == []     # trimmed to nothing
    tube, = link_tubes(track, "released_ucf", num_frames={"v": 10})
    assert tube["frames"].tolist() == [4, 5, 6, 7] and tube["label"] == 0
    # Frames 1 and 2 borrow 3's box, 5 borrows 4's: of the scores, 0.9 but for 4 and 5, 6..10 is
    # the run with the largest sum above their mean; its length taken as 4, it is widened by
    # (10 - 4) / 2.
    for tube in link_tubes(track, "released_jhmdb", num_frames={"v": 10}):
        assert tube["frames"].tolist() == list(range(3, 11))


def test_video_map_knows_by_which_protocol_tubes_were_linked():
    boxes = np.tile([[5, 5, 50, 90.]], (8, 1))
    truth = [{"video": "v", "label": 0, "frames": np.arange(1, 9), "boxes": boxes}]
    tubes = link_tubes(one_track(range(1, 9)), "released_ucf")
    result = video_map(tubes, truth, 2)
    assert result["AP"].tolist() == [1 / (1 + 1e-5), 0]     # a class without truth counts as 0
    strict = video_map(tubes, truth, 2, protocol="strict")
    assert np.isnan(strict["AP"]).tolist() == [False, True]


def test_one_common_frame_is_no_overlap_for_class_query_vads_ucf():
    def span(first, last):
        frames = np.arange(first, last + 1)
        return {"video": 0, "label": 0, "score": 1.0, "frames": frames,
                "boxes": np.tile([[5, 5, 50, 90.]], (len(frames), 1))}

    def scored(truth, protocol):
        return video_map([span(1, 3)], [truth], 1, 0.15, protocol)["mAP"]

    assert scored(span(3, 6), "strict") == 1.0              # 1 of 6 frames
    assert scored(span(3, 6), "released_ucf") == 0.0
    assert scored(span(2, 6), "released_ucf") == 1 / (1 + 1e-5)
    assert scored(span(3, 6), "released_jhmdb") == 1 / (1 + 1e-5)


def test_no_detections_score_zero_and_no_truth_is_nan():
    truth = {"frame": np.array([1]), "label": np.array([0]), "box": np.array([[0, 0, 1, 1.]])}
    nothing = {"frame": np.zeros(0, int), "label": np.zeros(0, int), "score": np.zeros(0),
               "box": np.zeros((0, 4))}
    assert frame_map(nothing, truth, 2)["mAP"] == 0
    assert frame_map({name: [] for name in nothing}, truth, 2)["mAP"] == 0
    assert np.isnan(frame_map({**truth, "score": np.ones(1)}, nothing, 2)["mAP"])
    tube = {"video": 0, "label": 0, "frames": [1], "boxes": [[0, 0, 1, 1]], "score": 1.0}
    assert video_map([], [tube], 2)["mAP"] == 0
    assert video_map([tube], [tube], 2)["mAP"] == 1
    assert np.isnan(video_map([tube], [], 2)["mAP"])


def test_box_iou_counts_pixels_inclusively_when_asked():
    assert box_iou([0, 0, 9, 9], [0, 0, 9, 4]) == 36 / 81
    assert box_iou([0, 0, 9, 9], [0, 0, 9, 4], 1) == 0.5
    assert box_iou([3, 3, 3, 3], [3, 3, 3, 3]) == 0
    assert box_iou([3, 3, 3, 3], [3, 3, 3, 3], 1) == 1


# ---- AVA ----------------------------------------------------------------------------------------

GROUND_TRUTH = """a,0902,0.1,0.1,0.5,0.5,1,0
a,0902,0.1,0.1,0.5,0.5,3,0
b,903,0.2,0.2,0.9,0.9,3,1
"""
DETECTIONS = """a,0902,0.1,0.1,0.5,0.5,1,0.9
b,0903,0.2,0.2,0.9,0.9,3,0.8
b,0904,0.2,0.2,0.9,0.9,3,0.7
"""
LABEL_MAP = """item {
  name: "stand id: 7"
  id: 1
}
item {
  name: "run"
  label_id: 3
}
item { name: "sit" id: 5 }
"""


def ava_files(folder, detections=DETECTIONS, truth=GROUND_TRUTH, label_map=LABEL_MAP,
              excluded="b,0905\n"):
    names = ("detections.csv", "truth.csv", "map.pbtxt", "excluded.csv")
    paths = [folder / name for name in names]
    for path, text in zip(paths, (detections, truth, label_map, excluded)):
        path.write_text(text)
    return paths


def test_ava_map_by_hand(tmp_path):
    result = ava_map(*ava_files(tmp_path)[:3])
    assert result["AP"] == {1: 1.0, 3: 0.5, 5: pytest.approx(np.nan, nan_ok=True)}
    assert result["mAP"] == 0.75
    excluded = ava_map(*ava_files(tmp_path, excluded="b,903\n"))
    assert excluded["AP"][3] == 0.0             # a false positive at 904 stays
    assert np.isnan(ava_map(*ava_files(tmp_path, excluded="a,902\n"))["AP"][1])
    better = "b,903,0.2,0.2,0.9,0.9,1,0.95\nb,903,0.2,0.2,0.9,0.9,2,0.99\n"
    files = ava_files(tmp_path, better + DETECTIONS)[:3]
    assert ava_map(*files, cap=1)["AP"][3] == 0.0           # of class 2 nothing counts
    assert ava_map(*files, cap=2)["AP"][3] == 0.5


@pytest.mark.parametrize("cap", [None, 7])
def test_ava_arrays_dense_or_not_score_as_the_csv_does(tmp_path, cap):
    generator = np.random.default_rng(0)
    number, classes, several = 60, 5, 25

    def boxes(count):
        return np.sort(generator.random((count, 2, 2)).round(2), 1).reshape(count, 4)

    def text(part, last):
        lines = []
        for video, second, box, label, value in zip(part["video"], part["timestamp"], part["box"],
                                                    part["label"], last):
            corners = ",".join(map(repr, box.tolist()))
            lines.append(f"{video},{second:04d},{corners},{label},{value}\n")
        return "".join(lines)

    truth = {"video": generator.choice(["a", "b"], several),
             "timestamp": generator.integers(902, 906, several), "box": boxes(several),
             "label": generator.integers(1, 6, several)}
    table = {"video": generator.choice(["a", "b", "c"], number),
             "timestamp": generator.integers(902, 907, number), "box": boxes(number),
             "scores": generator.random((number, classes)).round(6)}
    for name in ("box", "video", "timestamp"):
        table[name][:several] = truth[name]
    rows = sparse(table)
    rows["label"] = rows["label"] + 1
    files = ava_files(tmp_path, text(rows, rows["score"]), text(truth, range(several)),
                      excluded="b,0904\n")
    excluded = {"video": np.array(["b"]), "timestamp": np.array([904])}
    wanted = ava_map(*files[:2], [1, 3, 5], files[3], cap)
    assert 0 < wanted["mAP"] < 1
    for found in (rows, table):
        result = ava_map(found, truth, [1, 3, 5], excluded, cap)
        assert result["AP"] == pytest.approx(wanted["AP"], abs=1e-12)
