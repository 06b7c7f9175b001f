"""train.py: a step against a plain loop, cut into micro-batches, over two processes, resumed; the
recipe; evaluations on the way."""

import copy
import csv
import json
import os
import signal
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from stand_ins import (
    SMALL, Clips, StandIn, assert_equal_weights, assert_same_state, last, log, no_sheet, run)
from torch import nn

import train
from beside import runs
from data import collate
from model import PRESETS, VideoActionDetector, override
from objective import detection_loss

# B clips, T frames, A actor queries, N actors of a clip, C classes

OF_A_STEP = ("loss", "class", "box", "giou", "conf", "grad_norm")
TWO_RANKS = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")


def finish(process):
    said, _ = process.communicate(timeout=600)
    assert process.returncode == 0, said
    return said


def assert_same_steps(out, other):
    for line, expected in zip(log(out), log(other), strict=True):
        for name in OF_A_STEP:
            assert line[name] == pytest.approx(expected[name], rel=1e-4), name


# --- the step


def test_training_is_a_plain_loop(stand_ins, tmp_path):
    """Written anew: whole batches, no counts, no scaler, no micro-batches, torch's plain AdamW."""
    trained = run(tmp_path, settings=["micro_batch=1"])
    config = override(PRESETS["synthetic"], SMALL)
    clips = runs.SeededClips(Clips("synthetic", None, "train", config), 0)
    runs.seed_everything(0, 2)
    model = StandIn(config).train()
    of_backbone = list(model.backbone.parameters())
    of_decoder = list(model.decoder.parameters())
    optimizer = torch.optim.AdamW(
        [{"params": of_backbone}, {"params": of_decoder}], betas=(0.9, 0.98), weight_decay=1e-2)
    losses = []
    for step in range(6):                               # two epochs of 4, 4 and 2 clips
        epoch, first = step // 3, step % 3 * 4
        order = np.random.default_rng((0, epoch)).permutation(10)[first:first + 4].tolist()
        images, _, targets = collate([clips[i, 4 * step + n] for n, i in enumerate(order)])
        backbone_lr, lr = 1e-3, 1e-2
        if step < 1.5:                                  # half an epoch of warm-up, from 0
            backbone_lr, lr = backbone_lr * step / 1.5, lr * step / 1.5
        optimizer.param_groups[0]["lr"] = backbone_lr
        optimizer.param_groups[1]["lr"] = lr
        loss, _ = detection_loss(model(images), targets, config)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    assert_equal_weights({"model": model.state_dict()}, trained, tolerance=1e-5)
    assert [line["loss"] for line in log(tmp_path)] == pytest.approx(losses, rel=1e-4)


@pytest.mark.parametrize("micro", [1, 2])
def test_micro_batches_train_as_the_whole_batch_does(stand_ins, tmp_path, micro):
    """Six steps over clips of 0 to 5 actors, the last step of an epoch with half a batch."""
    whole = run(tmp_path / "whole")
    parts = run(tmp_path / "parts", settings=[f"micro_batch={micro}"])
    assert_equal_weights(whole, parts, tolerance=1e-5)
    assert_same_steps(tmp_path / "parts", tmp_path / "whole")


def test_two_ranks_train_as_one_process_does(stand_ins, start, tmp_path):
    """Two micro-batches on each of two ranks; clips of 0 to 5 actors. Gradients are exchanged once
    a step."""
    said = finish(start(
        tmp_path / "two", settings=["micro_batch=1"], launcher=TWO_RANKS, COUNT_EXCHANGES="1"))
    assert said.count("gradients exchanged") == 2 * 6                   # by each rank in each step
    assert_equal_weights(run(tmp_path / "whole"), last(tmp_path / "two"), tolerance=1e-5)
    assert_same_steps(tmp_path / "two", tmp_path / "whole")
    of_two, of_one = (json.loads((tmp_path / name / "metrics.json").read_text())["f-mAP@0.5"]
                      for name in ("two", "whole"))
    assert of_two == pytest.approx(of_one, abs=1e-6)


def test_training_learns(stand_ins, tmp_path):
    """The stand-in sees colours alone, yet learns where boxes are and that they are less than 4."""
    run(tmp_path, settings=["epochs=20", "eval_every=20"])
    losses = [line["loss"] for line in log(tmp_path)]
    assert np.mean(losses[-6:]) < 0.85 * np.mean(losses[:6])


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_trains_nearly_as_float32_does(stand_ins, tmp_path, precision):
    """fp16 finds its scale by overflowing, here more often in a row than is a fault otherwise."""
    high = partial(torch.amp.GradScaler, init_scale=2.0 ** 24)
    stand_ins.setattr(train.torch.amp, "GradScaler", high)
    settings = ["epochs=10", "eval_every=10"]
    run(tmp_path / "full", settings=settings)
    half = run(tmp_path / "half", "--precision", precision, settings=settings)
    lines = log(tmp_path / "half")
    full = log(tmp_path / "full")
    skipped = sum(line["skipped"] for line in lines)
    if precision == "fp16":
        assert train.BAD_STEPS < skipped < 20 and half["scaler"]["scale"] < 2.0 ** 20
    else:
        assert skipped == 0 and half["scaler"] == {}
    assert half["state"]["bad"] == 0 and lines[-1]["loss"] != full[-1]["loss"]
    ends = [np.mean([line["loss"] for line in of[-3:]]) for of in (lines, full)]
    assert ends[0] == pytest.approx(ends[1], rel=0.02 if precision == "bf16" else 0.2)


# --- chance


def test_a_seed_gives_a_run_and_another_seed_another(stand_ins, tmp_path):
    settings = ["train_frames=2", "dropout=0.3"]
    first = run(tmp_path / "a", settings=settings)
    assert_same_state(first, run(tmp_path / "b", settings=settings))
    other = run(tmp_path / "c", "--seed", "1", settings=settings)
    assert not torch.equal(first["model"]["decoder.0.weight"], other["model"]["decoder.0.weight"])


def test_a_run_that_is_resumed_in_mid_epoch_is_bit_equal_to_one_that_was_not(stand_ins, tmp_path):
    settings = ["train_frames=2", "dropout=0.3", "conv_blocks=2"]
    whole = run(tmp_path / "whole", settings=settings)
    signal_after_step(stand_ins, 2)
    with pytest.raises(SystemExit):
        run(tmp_path / "cut", "--workers", "1", settings=settings)      # who loads does not matter
    assert last(tmp_path / "cut")["state"]["step"] == 2
    train.main(["--resume", str(tmp_path / "cut")])                     # with its own settings
    assert_same_state(whole, last(tmp_path / "cut"))
    for line, expected in zip(log(tmp_path / "cut"), log(tmp_path / "whole"), strict=True):
        assert [line[name] for name in OF_A_STEP] == [expected[name] for name in OF_A_STEP]
    assert (tmp_path / "cut/results.csv").read_text().count("\n") == 3


def signal_after_step(patch, step):
    """SIGTERM is met while a step is taken: it is noted, and the step finished."""
    rates = train.rates

    def caught(number, steps_per_epoch, config):
        if number == step - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return rates(number, steps_per_epoch, config)

    patch.setattr(train, "rates", caught)


def test_the_real_model_resumes_bit_equal(monkeypatch, handlers, tmp_path):
    settings = ["--eval-share", "0.005", "--backbone-weights", "none", "--set", "frames=4",
                "dim=32", "num_heads=2", "dim_feedforward=16", "num_queries=3", "batch_size=4",
                "micro_batch=2", "epochs=1", "clips_per_epoch=12", "dropout=0.1"]
    monkeypatch.setattr(train.visualize, "attention_sheet", no_sheet)
    train.main(["--out", str(tmp_path / "whole"), *settings])
    signal_after_step(monkeypatch, 1)
    with pytest.raises(SystemExit):
        train.main(["--out", str(tmp_path / "cut"), *settings])
    train.main(["--resume", str(tmp_path / "cut")])
    assert_same_state(last(tmp_path / "whole"), last(tmp_path / "cut"))


# --- the recipe


def test_rates_warm_up_by_the_step_then_drop_to_a_tenth():
    config = replace(PRESETS["ucf"], drop_epochs=(12, 16), warmup_epochs=2.5, warmup_lr=1e-6,
                     lr=1e-4, backbone_lr=1e-5)
    rates = [train.rates(step, 10, config) for step in range(180)]
    assert rates[0] == (1e-6, 1e-6) and rates[25] == (1e-5, 1e-4)
    assert rates[5] == pytest.approx((1e-6 + 5 / 25 * 9e-6, 1e-6 + 5 / 25 * 99e-6))
    assert rates[119] == (1e-5, 1e-4)
    assert rates[120] == pytest.approx((1e-6, 1e-5))
    assert rates[160] == pytest.approx((1e-7, 1e-6))


def test_rates_fall_evenly_to_nothing_behind_the_last_step():
    config = replace(PRESETS["synthetic"], epochs=5, decay_from=2, drop_epochs=(3,),
                     warmup_epochs=0.1, lr=1e-3, backbone_lr=3e-3)
    rates = [train.rates(step, 20, config) for step in range(101)]
    assert rates[2] == rates[40] == (3e-3, 1e-3)
    assert rates[50] == pytest.approx((2.5e-3, 50 / 60 * 1e-3))
    assert rates[70] == pytest.approx((1.5e-4, 5e-5)), "drop_epochs acts as well"
    assert rates[100] == (0, 0) < rates[99]
    constant = replace(config, decay_from=0, drop_epochs=())
    assert train.rates(99, 20, constant) == (3e-3, 1e-3)


def test_the_optimizer_has_the_backbone_at_its_own_rate_and_leaves_out_what_is_frozen():
    config = replace(PRESETS["synthetic"], backbone_lr=1e-5, lr=1e-4, weight_decay=0.3,
                     adam_beta2=0.9, conv_blocks=2)
    model = StandIn(config)
    backbone, others = train.make_optimizer(model, config).param_groups
    assert (backbone["lr"], others["lr"]) == (1e-5, 1e-4)
    for group in (backbone, others):
        assert (group["betas"], group["weight_decay"]) == ((0.9, 0.9), 0.3)
    assert {id(p) for p in backbone["params"]} == {id(p) for p in model.backbone.parameters()}
    rest = [*model.norm.parameters(), *model.decoder.parameters()]
    assert {id(p) for p in others["params"]} == {id(p) for p in rest}


def test_sampling_offsets_have_a_rate_of_their_own_where_it_differs():
    model = VideoActionDetector(PRESETS["synthetic"])
    optimizer = train.make_optimizer(model, PRESETS["synthetic"])
    offsets = optimizer.param_groups[2]
    layer = model.encoder.layers[0].sampling_offsets
    assert {id(p) for p in offsets["params"]} == {id(layer.weight), id(layer.bias)}
    assert offsets["lr"] == pytest.approx(7e-5)
    train.set_rates(optimizer, (3, 2, 0.2))
    assert [group["lr"] for group in optimizer.param_groups] == [3, 2, 0.2]
    plain = replace(PRESETS["synthetic"], offset_rate=1.0)
    _, others = train.make_optimizer(model, plain).param_groups
    assert {id(layer.weight), id(layer.bias)} < {id(p) for p in others["params"]}


def test_sampling_offsets_follow_the_others_through_warm_up_and_decay(
        stand_ins, monkeypatch, tmp_path):
    of_steps = []
    monkeypatch.setattr(train, "set_rates", lambda optimizer, given: of_steps.append(given))
    run(tmp_path, settings=["epochs=4", "warmup_epochs=1", "decay_from=2"])
    others = [given[1] for given in of_steps]
    assert others[0] < max(others) > others[-1]
    assert [given[2] for given in of_steps] == pytest.approx([rate / 10 for rate in others])


def test_batches_are_cut_to_the_frames_that_are_drawn():
    config = replace(PRESETS["synthetic"], frames=4, train_frames=2)
    clips = Clips("synthetic", None, "train", config)
    batch = collate([clips[3], clips[5]])
    seen = set()
    for _ in range(60):
        images, mask, targets, frames = train.prepare(copy.deepcopy(batch), config)
        assert torch.equal(images, batch[0]) and mask is None
        assert frames == sorted(frames) and len(set(frames)) == 2
        seen.add(tuple(frames))
        for target, whole in zip(targets, batch[2]):
            for name in ("boxes", "present", "labels"):
                assert torch.equal(target[name], whole[name][:, frames]), name
            assert target["frame_ids"].tolist() == [frame + 1 for frame in frames]
            assert len(target["frames"]) == 2 and target["video"] == whole["video"]
    assert len(seen) == 6                                       # every pair of four frames
    for all_frames in (replace(config, train_frames=0), replace(config, key_frame=True)):
        _, _, targets, frames = train.prepare(batch, all_frames)
        assert frames is None and targets is batch[2]


def test_a_padded_batch_has_its_mask():
    padding = torch.zeros(2, 3, 3, dtype=torch.bool)
    padding[1, 2] = True
    _, mask, _, _ = train.prepare((torch.zeros(2, 3, 8, 3, 3), padding, []), PRESETS["ucf"])
    assert torch.equal(mask, padding)


def test_every_part_is_compiled_by_itself(monkeypatch):
    model = train.VideoActionDetector(PRESETS["synthetic"])
    names = {module: name for name, module in model.named_modules()}
    compiled = []
    monkeypatch.setattr(nn.Module, "compile", lambda module: compiled.append(names[module]))
    train.compile_parts(model)
    assert compiled == [
        "backbone", "neck", "encoder.layers.0", "decoder.localizing.0", "decoder.localizing.1",
        "decoder.classifying.0", "decoder.classifying.1"]


def test_the_number_of_classes_of_your_own_data_is_theirs_unless_it_is_set(stand_ins, capsys):
    def config_of(*given, dataset="custom"):
        args = train.arguments(["--dataset", dataset, "--data", "somewhere", *given])
        settings, config = train.choose_settings(args, None)
        return train.open_datasets(settings, config, args)[2]

    assert config_of() == replace(PRESETS["ucf"], num_classes=3)
    assert "num_classes=3, as in somewhere" in capsys.readouterr().out
    assert config_of("--preset", "ava").num_classes == 3
    with pytest.raises(ValueError, match="custom has 3 classes.*leave num_classes out"):
        config_of("--set", "num_classes=5")
    with pytest.raises(ValueError, match="jhmdb has 3 classes.*add --set num_classes=3"):
        config_of(dataset="jhmdb")


# --- evaluations


def test_the_share_that_is_evaluated_after_a_step():
    settings = {"eval_share": 0.8, "quick_share": 0.25}

    def shares(**changes):
        config = replace(PRESETS["synthetic"], **changes)
        return [train.share_due(3 * epoch, 3, config, settings) for epoch in range(13)]

    full, quick = 0.8, 0.2
    assert shares(epochs=12, eval_every=1) == [0] + [full] * 12
    assert shares(epochs=10, eval_every=10)[:11] == [
        0, 0, 0, quick, 0, quick, 0, 0, quick, 0, full]
    assert shares(epochs=12, eval_every=8) == [
        0, 0, quick, 0, quick, 0, quick, 0, full, 0, quick, 0, full]
    config = replace(PRESETS["synthetic"], eval_every=1)
    assert train.share_due(4, 3, config, settings) == 0             # within an epoch


def score_as(patch, values):
    """The f-mAP@0.5 of evaluations, one after the other."""
    values = iter(values)
    score = train.evaluate.score

    def scored(*args, **options):
        return score(*args, **options) | {"f-mAP@0.5": next(values)}

    patch.setattr(train.evaluate, "score", scored)


def test_quick_evaluations_are_marked_and_never_the_best(stand_ins, tmp_path):
    score_as(stand_ins, [0.3, 0.6, 0.9, 0.5])
    run(tmp_path, "--quick-share", "0.5", settings=["epochs=4", "eval_every=2"])
    with open(tmp_path / "results.csv") as file:
        rows = list(csv.DictReader(file))
    assert [(row["epoch"], row["step"], row["share"]) for row in rows] == [
        ("1", "3", "0.5"), ("2", "6", "1.0"), ("3", "9", "0.5"), ("4", "12", "1.0")]
    assert json.loads((tmp_path / "metrics.json").read_text())["videos"] == 10
    assert torch.load(tmp_path / "best.pt")["epoch"] == 2           # .6, although .9 was seen


def test_best_is_a_link_to_the_checkpoint_of_the_best_evaluation(stand_ins, tmp_path):
    score_as(stand_ins, [0.3, 0.5, 0.4])
    run(tmp_path, settings=["epochs=2"])
    assert (tmp_path / "best.pt").samefile(tmp_path / "last.pt")
    train.main(["--resume", str(tmp_path), "--set", "epochs=3"])
    assert torch.load(tmp_path / "best.pt")["epoch"] == 2 and last(tmp_path)["epoch"] == 3


def test_a_run_leaves_its_folder_and_says_so(stand_ins, tmp_path, capsys):
    checkpoint = run(tmp_path / "run")
    files = {path.name for path in (tmp_path / "run").iterdir()}
    assert files == {
        "config.json", "log.jsonl", "results.csv", "per_class.csv", "metrics.json",
        "detections.npz", "last.pt", "best.pt", "curves.png", "attention.png"}
    said = capsys.readouterr().out
    first = said.splitlines()[0]
    assert "preset synthetic" in first and "float32" in first and "overfit" not in said
    for name in files:
        assert str(tmp_path / "run" / name) in said
    assert (checkpoint["dataset"], checkpoint["classes"]) == ("synthetic", ["a", "b", "c"])
    assert checkpoint["epoch"] == 2 and checkpoint["config"]["num_classes"] == 3
    lines = log(tmp_path / "run")
    assert [line["step"] for line in lines] == list(range(1, 7))        # steps of 4, 4, 2 clips
    assert set(lines[0]) == {
        "step", "epoch", "loss", "class", "box", "giou", "conf", "lr", "backbone_lr", "grad_norm",
        "clips_per_s", "data_share", "memory_gb", "eta_minutes", "skipped"}
    assert lines[2]["epoch"] == 1 and lines[5]["eta_minutes"] == 0
    with open(tmp_path / "run/results.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows] == ["1", "2"] and "f-mAP@0.5 others" in rows[0]
    record = json.loads((tmp_path / "run/config.json").read_text())
    assert record["num_queries"] == 4 and record["precision"] == "float32"
    assert "workers" not in record                  # this machine's, not the run's


def test_the_same_videos_for_training_and_validation_are_called_an_overfit_check(
        stand_ins, tmp_path, capsys):
    run(tmp_path, "--dataset", "ucf", "--data", "somewhere", settings=["epochs=1"])
    assert "overfit check" in capsys.readouterr().out


def test_a_run_that_had_ended_is_only_trained_on_for_more_epochs(stand_ins, tmp_path, capsys):
    before = run(tmp_path)
    train.main(["--out", str(tmp_path), "--resume"])
    assert "had ended" in capsys.readouterr().out
    assert_same_state(before, last(tmp_path))
    train.main(["--resume", str(tmp_path), "--set", "epochs=3"])
    assert last(tmp_path)["state"]["step"] == 9 and len(log(tmp_path)) == 9
