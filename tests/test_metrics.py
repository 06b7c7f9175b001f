"""metrics.py against other people's evaluators (golden cases), slow loops that say the rules again, and the truth."""

import functools
import json
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
from metrics import ava_map, box_iou, frame_map, link_tubes, video_map  # noqa: E402
from model import PRESETS  # noqa: E402
from beside.synthetic import SyntheticDataset  # noqa: E402

SHARED = Path(__file__).parents[2] / "shared"
GOLDEN = SHARED / "golden" / "eval"
golden = pytest.mark.skipif(not GOLDEN.exists(), reason="needs ../shared/golden/eval")
annotations = pytest.mark.skipif(not (SHARED / "data").exists(), reason="needs ../shared/data, the real annotations")
THRESHOLDS = (0.2, 0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95)
DATASETS = ("jhmdb", "ucf24")


@functools.cache
def expected(group):
    return json.loads((GOLDEN / "expected.json").read_text())[group]


def frames_of(tubes):
    """Tubes as ground truth of frames; a frame's key is video * 10^6 + number."""
    return {"frame": np.concatenate([tube["video"] * 1_000_000 + np.asarray(tube["frames"]) for tube in tubes]),
            "label": np.concatenate([np.full(len(tube["frames"]), tube["label"]) for tube in tubes]),
            "box": np.concatenate([tube["boxes"] for tube in tubes])}


def unpack(video, label, start, offset, box, score=None):
    tubes = [{"video": int(v), "label": int(c), "frames": s + np.arange(b - a), "boxes": box[a:b]}
             for v, c, s, a, b in zip(video, label, start, offset[:-1], offset[1:])]
    return tubes if score is None else [{**tube, "score": float(value)} for tube, value in zip(tubes, score)]


@functools.cache
def load(name):
    """A golden case: number of classes, ground-truth tubes, detections as link_tubes takes them, tubes, lengths"""
    frames, tubes = np.load(GOLDEN / f"{name}_frames.npz"), np.load(GOLDEN / f"{name}_tubes.npz")
    truth = unpack(*(frames["gt_" + key] for key in ("tube_video", "tube_class", "tube_start", "tube_offset", "box")))
    given = unpack(*(tubes["tube_" + key] for key in ("video", "class", "start", "offset", "box", "score")))
    detections = {"video": frames["det_video"], "frame": frames["det_frame"], "box": frames["det_box"],
                  "class_prob": frames["det_class_prob"], "conf": frames["det_person_prob"]}
    return len(frames["labels"]), truth, detections, given, dict(enumerate(frames["video_nframes"].tolist()))


def dense(detections):
    return {"frame": detections["video"].astype(np.int64) * 1_000_000 + detections["frame"], "box": detections["box"],
            "scores": detections["class_prob"].astype(np.float64) * detections["conf"].astype(np.float64)[:, None]}


def sparse(table):
    number, classes = table["scores"].shape
    return {"frame": np.repeat(table["frame"], classes), "box": np.repeat(table["box"], classes, 0),
            "label": np.tile(np.arange(classes), number), "score": table["scores"].ravel()}


def differs(result, case):
    """Largest difference of a result to a golden one, classes and mean; NaN must be NaN."""
    wanted = np.array([np.nan if ap is None else ap for ap in case["per_class"]], np.float64)
    assert (np.isnan(result["AP"]) == np.isnan(wanted)).all()
    return max(np.nanmax(np.abs(result["AP"] - wanted)), abs(result["mAP"] - case["mAP"]))


# ---- golden cases -------------------------------------------------------------------------------------------------

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
    # mmaction2 takes a tube for (last - first) frames long, which moves a match at 0.5 and at 0.55; counted its way all
    # thresholds agree, counted inclusively all others.
    for threshold in THRESHOLDS:
        case = wanted[f"linked/all/ref_mmaction2_repaired@{threshold}"]
        assert differs(slow_video_map(tubes, truth, classes, threshold, plus_one=0), case) < 1e-6, threshold
        ours = video_map(tubes, truth, classes, threshold)
        np.testing.assert_allclose(ours["AP"], slow_video_map(tubes, truth, classes, threshold)["AP"], atol=1e-12)
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
    assert counts.tolist() == expected(name)["linked/argmax/mmaction2_repaired_number_of_tubes"]


@golden
@pytest.mark.parametrize("name", DATASETS)
def test_released_linking_gives_class_query_vads_tubes_and_numbers(name):
    classes, truth, detections, _, num_frames = load(name)
    tubes = link_tubes(detections, "released", num_frames=num_frames)
    wanted = np.load(GOLDEN / f"{name}_linked_cqvad.npz")
    wanted = unpack(*(wanted["tube_" + key] for key in ("video", "class", "start", "offset", "box", "score")))
    assert len(tubes) == len(wanted)
    order = lambda tube: (tube["video"], tube["label"], tube["frames"][0], round(tube["score"], 4), len(tube["frames"]))
    for tube, other in zip(sorted(tubes, key=order), sorted(wanted, key=order)):
        assert order(tube)[:3] == order(other)[:3] and abs(tube["score"] - other["score"]) < 1e-5
        assert np.array_equal(tube["boxes"], other["boxes"])
    for threshold in THRESHOLDS:
        result = video_map(tubes, truth, classes, threshold)
        assert differs(result, expected(name)[f"linked/official/cqvad@{threshold}"]) < 1e-6, threshold


@golden
@pytest.mark.parametrize("name, key, protocol", [("jhmdb", "all", "released_ucf"), ("ucf24", "all", "released_ucf"),
                                                 ("jhmdb", "all_notemporal", "released_jhmdb")])
def test_released_scoring_of_given_tubes(name, key, protocol):
    classes, truth, _, given, _ = load(name)
    for threshold in THRESHOLDS:
        result = video_map(given, truth, classes, threshold, protocol=protocol)
        assert differs(result, expected(name)[f"tubes/{key}/cqvad@{threshold}"]) < 1e-6, threshold


@golden
@pytest.mark.parametrize("case", ["tiny", "large", "dense"])
@pytest.mark.parametrize("cap, peers", [(50, ("ref_cap50", "activitynet_2018_3fee089")),
                                        (None, ("ref_plain", "activitynet_2017_be7854e"))])
def test_ava_map_is_that_of_the_official_script(case, cap, peers):
    label_map = GOLDEN / ("ava_tiny_labelmap.pbtxt" if case == "tiny" else "ava_labelmap.pbtxt")
    excluded = None if case == "tiny" else GOLDEN / f"ava_{case}_excluded.csv"
    result = ava_map(GOLDEN / f"ava_{case}_det.csv", str(GOLDEN / f"ava_{case}_gt.csv"), label_map, excluded, cap)
    for peer in peers:
        wanted = expected("ava")[f"ava_{case}/{peer}"]
        assert abs(result["mAP"] - wanted["mAP"]) < 1e-9
        aps = {action: ap for action, ap in result["AP"].items() if not np.isnan(ap)}
        assert aps == pytest.approx({int(action): ap for action, ap in wanted["per_class"].items()}, abs=1e-9)


@golden
@pytest.mark.parametrize("case", ["large", "dense"])
def test_ava_ground_truth_may_list_empty_key_frames(case):
    files = [GOLDEN / f"ava_{case}_{part}" for part in ("det.csv", "gt_2020.csv", "excluded.csv")]
    result = ava_map(files[0], files[1], GOLDEN / "ava_labelmap.pbtxt", files[2])
    assert abs(result["mAP"] - expected("ava")[f"ava_{case}/activitynet_2020_af461c3_on_gt_2020"]["mAP"]) < 1e-9


@golden
def test_multisports_sample_of_mmaction2():
    case = np.load(GOLDEN / "multisports.npz")
    truth = unpack(*(case["gt_" + key] for key in ("tube_video", "tube_class", "tube_start", "tube_offset", "box")))
    height, width = case["video_hw"][0]
    prob, names = case["det_class_prob"], case["labels"].tolist()
    box = case["det_box"] * np.array([width, height, width, height], np.float32)
    frame = np.repeat(case["sample_frame"], np.diff(case["sample_offset"]))
    found = {"frame": frame, "box": box, "label": prob.argmax(1), "score": prob.max(1)}
    wanted = expected("multisports")
    ap = frame_map(found, frames_of(truth), len(names))["AP"]
    assert {names[i]: ap[i] for i in np.flatnonzero(~np.isnan(ap))} == pytest.approx(
        wanted["multisports/frame@0.5"]["per_class"], abs=1e-9)
    best = np.where(np.arange(len(names)) == prob.argmax(1)[:, None], prob, 0)
    tubes = link_tubes({"video": np.zeros(len(box), int), "frame": frame, "box": box, "class_prob": best,
                        "conf": np.ones(len(box))}, min_score=1e-30)
    order = lambda tube: -tube["score"]
    linked = sorted(wanted["multisports/repaired_linked_tubes"], key=order)
    for tube, other in zip(sorted(tubes, key=order), linked, strict=True):
        assert names[tube["label"]] == other["label"]
        assert tube["frames"][[0, -1]].tolist() == [other["first_frame"], other["last_frame"]]
        assert tube["score"] == pytest.approx(other["score"], abs=1e-6)
    assert [video_map(tubes, truth, len(names), iou)["mAP"] for iou in (0.2, 0.5, 0.75)] == [0.5, 0.5, 0.375]


# ---- the truth scores 1 -------------------------------------------------------------------------------------------

def assert_truth_is_perfect(tubes, classes):
    frames = frames_of(tubes)
    assert frame_map({**frames, "score": np.ones(len(frames["label"]))}, frames, classes)["mAP"] == 1.0
    scored = [{**tube, "score": 1.0} for tube in tubes]
    result = video_map(scored, tubes, classes, (0.5, 0.95, 1))
    assert result["mAP"] == 1.0 and (result["AP"] == 1.0).all()


@annotations
def test_truth_of_ucf101_24_scores_one_though_two_tubes_are_there_twice():
    scipy_io = pytest.importorskip("scipy.io")
    file = scipy_io.loadmat(SHARED / "data/ucf101_24/finalAnnots.mat", squeeze_me=True, struct_as_record=False)
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
    tubes = [{"video": index, "label": label, "frames": tube[:, 0].astype(int), "boxes": tube[:, 1:]}
             for index, video in enumerate(sorted(truth["gttubes"]))
             for label, several in truth["gttubes"][video].items() for tube in several]
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
    truth = {"frame": np.zeros(2, int), "label": np.zeros(2, int), "box": np.array([[0, 0, 10, 10], [4, 0, 14, 10]])}
    found = {"frame": np.zeros(2, int), "label": np.zeros(2, int), "score": np.array([0.9, 0.8]),
             "box": np.array([[0, 0, 10, 10], [2, 0, 12, 10]])}
    assert frame_map(found, truth, 1)["mAP"] == 1.0
    csv = {"video": np.zeros(2, int), "timestamp": np.full(2, 902), "label": np.ones(2, int)}
    official = ava_map({**csv, "box": found["box"], "score": found["score"]}, {**csv, "box": truth["box"]}, [1])
    assert official["AP"] == {1: 0.5}   # the official script takes the first


# ---- slow loops ---------------------------------------------------------------------------------------------------

def slow_iou(a, b, plus_one=0):
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]) + plus_one)
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]) + plus_one)
    area = [(box[2] - box[0] + plus_one) * (box[3] - box[1] + plus_one) for box in (a, b)]
    return width * height / (sum(area) - width * height) if sum(area) > 0 else 0.0


def slow_ap(scores, overlaps, threshold):
    """overlaps (n, m) of every detection with every ground truth of the class; no ground truth twice"""
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
    rows = lambda table: zip(np.asarray(table["frames"]).tolist(), np.asarray(table["boxes"], float).tolist())
    boxes = dict(rows(truth))
    spatial = [slow_iou(box, boxes[frame]) for frame, box in rows(tube) if frame in boxes]
    first, last = zip(*((min(t["frames"]), max(t["frames"])) for t in (tube, truth)))
    common, joint = min(last) - max(first) + plus_one, max(last) - min(first) + plus_one
    return np.mean(spatial) * common / joint if spatial else 0.0


def slow_video_map(tubes, truth, classes, threshold, plus_one=1):
    result = np.full(classes, np.nan)
    for label in {tube["label"] for tube in truth}:
        of_class = [tube for tube in truth if tube["label"] == label]
        seen, unique = set(), []        # where an actor is annotated twice, the copy is never met
        for tube in of_class:
            key = (tube["video"], np.asarray(tube["frames"]).tobytes(), np.asarray(tube["boxes"]).tobytes())
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
    return np.concatenate([corner, corner + generator.integers(1, 9, (number, 2))], 1).astype(np.float32)


@pytest.mark.parametrize("seed", range(20))
def test_frame_map_is_what_a_slow_loop_finds_on_crowded_frames(seed):
    generator = np.random.default_rng(seed)
    frames, classes, number, several = int(generator.integers(1, 6)), 3, int(generator.integers(1, 60)), 12
    truth = {"frame": generator.integers(0, frames, several), "label": generator.integers(0, classes - 1, several),
             "box": random_boxes(generator, several)}
    rows = np.unique(np.column_stack([truth["frame"], truth["label"], truth["box"]]), axis=0, return_index=True)[1]
    truth = {name: values[rows] for name, values in truth.items()}
    table = {"frame": generator.integers(0, frames + 1, number), "box": random_boxes(generator, number),
             "scores": generator.integers(0, 9, (number, classes)) / 8}    # many equal scores: their order counts
    threshold = generator.choice([0.3, 0.5])
    wanted = np.full(classes, np.nan)
    for label in set(truth["label"].tolist()):
        of_class = truth["label"] == label
        overlaps = np.array([[slow_iou(box, other) if frame == place else -1.0 for place, other in
                              zip(truth["frame"][of_class], truth["box"][of_class].astype(float))]
                             for frame, box in zip(table["frame"], table["box"].astype(float))])
        wanted[label] = slow_ap(table["scores"][:, label].tolist(), overlaps, threshold)
    for found in (table, sparse(table), {**table, "frame": np.array([f"frame {i}" for i in table["frame"]])}):
        named = dict(truth)
        if found["frame"].dtype.kind == "U":
            named["frame"] = np.array([f"frame {i}" for i in truth["frame"]])
        result = frame_map(found, named, classes, threshold)
        np.testing.assert_allclose(result["AP"], wanted, atol=1e-12)
        assert result["mAP"] == pytest.approx(np.nanmean(wanted), abs=1e-12)


@pytest.mark.parametrize("seed", range(10))
def test_video_map_is_what_a_slow_loop_finds(seed):
    generator = np.random.default_rng(seed)

    def tube():
        frames = 1 + np.sort(generator.permutation(12)[:generator.integers(1, 12)])
        return {"video": f"video {generator.integers(2)}", "label": int(generator.integers(3)), "frames": frames,
                "score": int(generator.integers(5)) / 4,
                "boxes": np.array([2, 2, 9, 9]) + generator.integers(-1, 2, (len(frames), 4)).astype(np.float32)}

    truth, tubes = [tube() for _ in range(6)], [tube() for _ in range(int(generator.integers(0, 30)))]
    several = [video_map(tubes, truth, 4, iou) for iou in (0.1, 0.3)]
    for iou, result in zip((0.1, 0.3), several):
        np.testing.assert_allclose(result["AP"], slow_video_map(tubes, truth, 4, iou)["AP"], atol=1e-12)
    both = video_map(tubes, truth, 4, (0.1, 0.3))
    np.testing.assert_allclose(both["AP"], np.mean([result["AP"] for result in several], 0))
    assert both["mAP"] == pytest.approx(np.mean([result["mAP"] for result in several]))


def slow_link(detections, min_score, max_gap, min_length):
    """ACT's linking of one video and class after another, a box at a time -> set of (video, label, rows, score)"""
    found, number, boxes = set(), detections["frame"].tolist(), detections["box"].astype(float).tolist()
    for video, label in np.ndindex(detections["video"].max() + 1, detections["class_prob"].shape[1]):
        live, ended = [], []
        inside = np.flatnonzero(detections["video"] == video).tolist()
        for frame in sorted({number[i] for i in inside}):
            score = {i: float(detections["class_prob"][i, label]) * float(detections["conf"][i]) for i in inside
                     if number[i] == frame}
            score = {i: value for i, value in score.items() if value >= min_score}
            touched = set()
            for i in sorted(score, key=lambda i: -score[i]):
                if i not in touched:
                    touched.add(i)
                    for j in set(score) - touched:
                        overlap = slow_iou(boxes[i], boxes[j], plus_one=1)
                        if overlap > 0.6:
                            touched.add(j)
                            score[j] *= 1 - overlap
            free = sorted(score, key=lambda i: -score[i])[:10]
            ended += [tube for tube in live if frame - number[tube[-1][0]] > max_gap]
            live = [tube for tube in live if frame - number[tube[-1][0]] <= max_gap]
            for tube in sorted(live, key=lambda tube: -np.mean([value for _, value in tube])):
                fits = [i for i in free if slow_iou(boxes[i], boxes[tube[-1][0]]) >= 0.5]
                if fits:
                    free.remove(fits[0])
                    tube.append((fits[0], score[fits[0]]))
            live += [[(i, score[i])] for i in free]
        for rows, values in (zip(*tube) for tube in ended + live):
            if number[rows[-1]] - number[rows[0]] + 1 >= min_length and np.mean(values) >= 0.005:
                found.add((video, label, rows, float(np.mean(values))))
    return found


@pytest.mark.parametrize("seed, max_gap", [(0, 1), (1, 1), (2, 2), (3, 3), (4, 4)])
def test_linking_is_what_a_slow_loop_finds(seed, max_gap):
    generator = np.random.default_rng(seed)
    number, classes = 500, 3
    detections = {"video": generator.integers(0, 3, number), "frame": generator.integers(1, 14, number),
                  "class_prob": generator.random((number, classes)).astype(np.float32) ** 4,
                  "conf": generator.random(number)}
    corner = generator.integers(0, 4, (number, 1)) * 12 + generator.integers(0, 5, (number, 2))
    detections["box"] = np.append(corner, corner + 10 + generator.integers(0, 4, (number, 2)), 1).astype(np.float32)
    assert np.bincount(detections["video"] * 100 + detections["frame"]).max() > 12      # 10 are kept
    wanted = slow_link(detections, 0.01, max_gap, 4)
    tubes = link_tubes(detections, min_score=0.01, max_gap=max_gap, min_length=4)
    assert len(tubes) == len(wanted) > 20
    frame = detections["frame"]
    assert any(len(rows) <= frame[rows[-1]] - frame[rows[0]] for _, _, rows, _ in wanted) == (max_gap > 1)     # gaps
    key = lambda video, label, frames, boxes: (video, label, frames.tobytes(), boxes.tobytes())
    found = {key(tube["video"], tube["label"], tube["frames"], tube["boxes"]): tube["score"] for tube in tubes}
    wanted = {key(video, label, frame[list(rows)], detections["box"][list(rows)]): score
              for video, label, rows, score in wanted}
    assert found == pytest.approx(wanted, abs=1e-8)


# ---- behaviour ----------------------------------------------------------------------------------------------------

def one_track(frames, video="v", conf=1.0):
    frames = np.asarray(frames)
    return {"video": np.full(len(frames), video), "frame": frames, "box": np.tile([[5, 5, 50, 90.]], (len(frames), 1)),
            "class_prob": np.tile([[0.9, 0.2]], (len(frames), 1)), "conf": np.full(len(frames), conf)}


def test_a_tube_ends_after_max_gap_frames_without_a_match():
    track = one_track([*range(1, 21), *range(23, 43)])
    spans = lambda tubes: [(tube["frames"][0], tube["frames"][-1]) for tube in tubes if tube["label"] == 0]
    assert sorted(spans(link_tubes(track))) == sorted(spans(link_tubes(track, max_gap=2))) == [(1, 20), (23, 42)]
    assert spans(link_tubes(track, max_gap=3)) == [(1, 42)]
    assert link_tubes(one_track(range(1, 15))) == [] and len(link_tubes(one_track(range(1, 16)))) == 2
    assert [tube["label"] for tube in link_tubes(track, min_score=0.5)] == [0, 0]
    assert link_tubes({name: values[:0] for name, values in track.items()}) == []


def test_videos_of_one_frame_each_stay_apart():
    tracks = one_track([7], "a"), one_track([7], "b")
    tubes = link_tubes({name: np.concatenate([track[name] for track in tracks]) for name in tracks[0]}, min_length=1)
    assert sorted((tube["video"], tube["label"]) for tube in tubes) == [("a", 0), ("a", 1), ("b", 0), ("b", 1)]


def test_released_tube_of_ucf_starts_a_frame_late_and_gaps_shorten_it():
    track = one_track([3, 4, 6, 7, 8])
    track["conf"][1] = 0.69                                         # not a person for certain: no box in frame 4
    tube, = link_tubes(track, "released_ucf", num_frames={"v": 10})
    assert tube["frames"].tolist() == [4, 5, 6, 7] and tube["label"] == 0
    # Frames 1 and 2 borrow 3's box, 5 borrows 4's: of the scores, 0.9 but for 4 and 5, 6..10 is the run with the
    # largest sum above their mean; its length taken as 4, it is widened by (10 - 4) / 2.
    for tube in link_tubes(track, "released_jhmdb", num_frames={"v": 10}):
        assert tube["frames"].tolist() == list(range(3, 11))
    with pytest.raises(ValueError, match="video v has frames 3..8, but 1..7"):
        link_tubes(track, "released", num_frames={"v": 7})


def test_video_map_knows_by_which_protocol_tubes_were_linked():
    truth = [{"video": "v", "label": 0, "frames": np.arange(1, 9), "boxes": np.tile([[5, 5, 50, 90.]], (8, 1))}]
    tubes = link_tubes(one_track(range(1, 9)), "released_ucf")
    result = video_map(tubes, truth, 2)
    assert result["AP"].tolist() == [1 / (1 + 1e-5), 0]             # class-query-vad counts a class without truth as 0
    assert np.isnan(video_map(tubes, truth, 2, protocol="strict")["AP"]).tolist() == [False, True]


def test_one_common_frame_is_no_overlap_for_class_query_vads_ucf():
    span = lambda first, last: {"video": 0, "label": 0, "score": 1.0, "frames": np.arange(first, last + 1),
                                "boxes": np.tile([[5, 5, 50, 90.]], (last + 1 - first, 1))}
    scored = lambda truth, protocol: video_map([span(1, 3)], [truth], 1, 0.15, protocol)["mAP"]
    assert [scored(span(3, 6), protocol) for protocol in ("strict", "released_ucf")] == [1.0, 0.0]      # 1 of 6 frames
    assert scored(span(2, 6), "released_ucf") == scored(span(3, 6), "released_jhmdb") == 1 / (1 + 1e-5)


def test_no_detections_score_zero_and_no_truth_is_nan():
    truth = {"frame": np.array([1]), "label": np.array([0]), "box": np.array([[0, 0, 1, 1.]])}
    nothing = {"frame": np.zeros(0, int), "label": np.zeros(0, int), "score": np.zeros(0), "box": np.zeros((0, 4))}
    assert frame_map(nothing, truth, 2)["mAP"] == 0
    assert frame_map({name: [] for name in nothing}, truth, 2)["mAP"] == 0
    assert np.isnan(frame_map({**truth, "score": np.ones(1)}, nothing, 2)["mAP"])
    tube = {"video": 0, "label": 0, "frames": [1], "boxes": [[0, 0, 1, 1]], "score": 1.0}
    assert video_map([], [tube], 2)["mAP"] == 0 and video_map([tube], [tube], 2)["mAP"] == 1
    assert np.isnan(video_map([tube], [], 2)["mAP"])


def test_box_iou_counts_pixels_inclusively_when_asked():
    assert box_iou([0, 0, 9, 9], [0, 0, 9, 4]) == 36 / 81 and box_iou([0, 0, 9, 9], [0, 0, 9, 4], 1) == 0.5
    assert box_iou([3, 3, 3, 3], [3, 3, 3, 3]) == 0 and box_iou([3, 3, 3, 3], [3, 3, 3, 3], 1) == 1


def test_unsound_arrays_are_errors_that_name_the_row():
    truth = {"frame": np.array([1, 1]), "label": np.array([0, 0]), "box": np.array([[0, 0, 1, 1.], [2, 2, 4, 4]])}
    found = {**truth, "score": np.array([0.5, 0.4])}
    for change, message in (({"box": np.array([[0, 0, 1, 1.], [2, 2, 1, 4]])}, "detections, row 1: box .* x2 < x1"),
                            ({"box": np.array([[0, np.nan, 1, 1.], [2, 2, 4, 4]])}, "row 0: box .* not finite"),
                            ({"score": np.array([0.5, np.nan])}, "detections, row 1: score is not a finite number"),
                            ({"label": np.array([0, 2])}, r"detections, row 1: class 2 is not one of the classes 0..1"),
                            ({"score": np.array([0.5])}, "lengths differ"),
                            ({"frame": np.array(["1", "1"])}, "none would match")):
        with pytest.raises(ValueError, match=message):
            frame_map({**found, **change}, truth, 2)
    with pytest.raises(ValueError, match=r"ground truth, row 1: box"):
        frame_map(found, {**truth, "box": np.array([[0, 0, 1, 1.], [2, 2, 4, 1]])}, 2)
    with pytest.raises(ValueError, match=r"lack \['score', 'label'\]"):
        frame_map({"frame": truth["frame"], "box": truth["box"]}, truth, 2)
    with pytest.raises(ValueError, match=r"\(2, 2\) expected, got \(2, 3\)"):
        frame_map({"frame": truth["frame"], "box": truth["box"], "scores": np.zeros((2, 3))}, truth, 2)
    with pytest.raises(ValueError, match="protocol 'lenient': strict, released"):
        link_tubes(one_track(range(20)), "lenient")
    with pytest.raises(ValueError, match="tube 0 has 2 frames and 1 boxes"):
        video_map([{"video": 0, "label": 0, "score": 1, "frames": [1, 2], "boxes": [[0, 0, 1, 1]]}], [], 2)


# ---- AVA ----------------------------------------------------------------------------------------------------------

GROUND_TRUTH = "a,0902,0.1,0.1,0.5,0.5,1,0\na,0902,0.1,0.1,0.5,0.5,3,0\nb,903,0.2,0.2,0.9,0.9,3,1\n"
DETECTIONS = "a,0902,0.1,0.1,0.5,0.5,1,0.9\nb,0903,0.2,0.2,0.9,0.9,3,0.8\nb,0904,0.2,0.2,0.9,0.9,3,0.7\n"
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


def ava_files(folder, detections=DETECTIONS, truth=GROUND_TRUTH, label_map=LABEL_MAP, excluded="b,0905\n"):
    paths = [folder / name for name in ("detections.csv", "truth.csv", "map.pbtxt", "excluded.csv")]
    for path, text in zip(paths, (detections, truth, label_map, excluded)):
        path.write_text(text)
    return paths


def test_ava_map_by_hand(tmp_path):
    files = ava_files(tmp_path)
    result = ava_map(*files[:3])
    assert result["AP"] == {1: 1.0, 3: 0.5, 5: pytest.approx(np.nan, nan_ok=True)} and result["mAP"] == 0.75
    assert ava_map(*ava_files(tmp_path, excluded="b,903\n"))["AP"][3] == 0.0     # a false positive at 904 stays
    better = "b,903,0.2,0.2,0.9,0.9,1,0.95\nb,903,0.2,0.2,0.9,0.9,2,0.99\n"
    assert ava_map(*ava_files(tmp_path, better + DETECTIONS)[:3], cap=1)["AP"][3] == 0.0    # of class 2 nothing counts
    assert ava_map(*ava_files(tmp_path, better + DETECTIONS)[:3], cap=2)["AP"][3] == 0.5


@pytest.mark.parametrize("row, message", [
    ("a,0902,0.1,0.1,0.5,0.5,1,0.9,1,2,3", "line 2: 11 columns"), ("a,0902,0.1,0.1,0.5,0.5,1", "line 2: 7 columns"),
    ("a,0902", "line 2: 2 columns"), ("", "line 2: 0 columns"),
    ("a,0902,0.1,nan,0.5,0.5,1,0.9", "line 2: a number that is not finite"),
    ("a,0902,0.5,0.1,0.1,0.5,1,0.9", "line 2: x2 < x1"),
    ("a,0902,0.1,0.1,0.5,0.05,1,0.9", "line 2: x2 < x1 or y2 < y1"),
    ("a,0902,0.1,0.1,0.5,0.5,run,0.9", "line 2: could not convert string to float: 'run'"),
    ("a,902.5,0.1,0.1,0.5,0.5,1,0.9", "line 2: a timestamp or action_id that is not a whole number"),
    ("a,0902,0.1,0.1,0.5,0.5,1.5,0.9", "line 2: a timestamp or action_id"),
    ("a,0902,0.1,0.1,0.5,0.5,1,", "line 2: could not convert")])
def test_a_faulty_row_of_an_ava_file_is_one_error_with_its_line(tmp_path, row, message):
    first, rest = DETECTIONS.split("\n", 1)
    with pytest.raises(ValueError, match="detections.csv, " + message):
        ava_map(*ava_files(tmp_path, f"{first}\n{row}\n{rest}")[:3])


def test_other_faults_of_ava_input_are_errors(tmp_path):
    inverted = "a,0902\n" + GROUND_TRUTH + "a,0902,1,1,0,1,1,0\n"
    for change, message in (({"truth": inverted}, "truth.csv, line 5: x2 < x1"),
                            ({"truth": "a,0902\n"}, "no row of the label map's classes is left"),
                            ({"excluded": "a,0902,1\n"}, "excluded.csv, line 1: 3 columns"),
                            ({"label_map": "stand, run"}, "map.pbtxt: no `id: N` found")):
        with pytest.raises(ValueError, match=message):
            ava_map(*ava_files(tmp_path, **change))
    arrays = {"video": np.array([3]), "timestamp": np.array([902]), "box": np.array([[0, 0, 1, 1.]]),
              "label": np.array([1])}
    with pytest.raises(ValueError, match="videos are numbers in one"):
        ava_map({**arrays, "score": np.ones(1)}, ava_files(tmp_path)[1], [1, 3])


@pytest.mark.parametrize("cap", [None, 7])
def test_ava_arrays_dense_or_not_score_as_the_csv_does(tmp_path, cap):
    generator = np.random.default_rng(0)
    number, classes, several = 60, 5, 25
    box = lambda count: np.sort(generator.random((count, 2, 2)).round(2), 1).reshape(count, 4)
    truth = {"video": generator.choice(["a", "b"], several), "timestamp": generator.integers(902, 906, several),
             "box": box(several), "label": generator.integers(1, 6, several)}
    table = {"video": generator.choice(["a", "b", "c"], number), "timestamp": generator.integers(902, 907, number),
             "box": box(number), "scores": generator.random((number, classes)).round(6)}
    table["box"][:several] = truth["box"]
    table["video"][:several], table["timestamp"][:several] = truth["video"], truth["timestamp"]
    rows = {"video": np.repeat(table["video"], classes), "timestamp": np.repeat(table["timestamp"], classes),
            "box": np.repeat(table["box"], classes, 0), "label": np.tile(np.arange(1, 6), number),
            "score": table["scores"].ravel()}
    text = lambda part, last: "".join(f"{v},{t:04d},{','.join(map(repr, b.tolist()))},{c},{s}\n" for v, t, b, c, s in
                                      zip(part["video"], part["timestamp"], part["box"], part["label"], last))
    files = ava_files(tmp_path, text(rows, rows["score"]), text(truth, range(several)), excluded="b,0904\n")
    excluded = {"video": np.array(["b"]), "timestamp": np.array([904])}
    wanted = ava_map(*files[:2], [1, 3, 5], files[3], cap)
    assert 0 < wanted["mAP"] < 1
    for found in (rows, table):
        result = ava_map(found, truth, [1, 3, 5], excluded, cap)
        assert result["AP"] == pytest.approx(wanted["AP"], abs=1e-12)
    with pytest.raises(ValueError, match="5 columns of scores, but an action id 6"):
        ava_map(table, truth, [1, 6])
