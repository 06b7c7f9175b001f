"""Training (Sec. 5), on one process or on as many as torchrun starts.

    python train.py                                               # the synthetic set, one process
    torchrun --nproc_per_node 2 train.py --dataset synthetic      # the same on two, faster
    torchrun --nproc_per_node 8 train.py --dataset ucf --data DIR --backbone-weights FILE
    python train.py --dataset custom --data DIR --init FILE       # fine-tuning on your own data
    python train.py --resume runs/NAME                            # from last.pt, even mid-epoch

`train` is the story, from the arguments to the last evaluation; beside/runs.py has the machinery
of a run: its settings, its folder, signals, the seeded order of the clips.

The recipes are in model.PRESETS, as released: the paper prints none of learning rates, batches and
epochs, and mentions no stages; why there are two the release does not say. Stage two is the same
recipe once more, with --init-transformer: encoder and decoder start from stage one, the backbone
again from its pre-training, the neck anew. Nothing is frozen in either stage, CSN's BatchNorm
included, but the tensors that nothing uses (beside/released.py).

A step takes `batch_size` clips over all processes, `micro_batch` of them at a time on each. The
divisors of the loss are summed over all of these first, so the gradient is that of one large
batch however it is cut, but for BatchNorm (the conv stem, CSN): its statistics are a micro-batch's,
over all GPUs or of one CPU process.

Weight decay is on all parameters, as in the released recipe. Float32 islands under autocast: the
objective, and what encoder.py and decoder.py name.
"""

# B clips, T frames, k of them decoded, N actors of a clip, C classes

import argparse
import math
import os
import re
import signal
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from tqdm import tqdm

import evaluate
import visualize
from beside.runs import (
    RunFolder, SeededClips, Signals, all_sum, choose_settings, code_version, crowd_warning,
    default_preset, epoch_length, first_weights, ignore_signals, list_fields, micro_batch_size,
    micro_batches, read_history, read_run, resume, run_folder, seed_everything, start_processes)
from data import build_dataset, collate
from model import PRESETS, VideoActionDetector
from objective import detection_loss, loss_counts

PARTS = ("class", "box", "giou", "conf")        # of the loss
BAD_STEPS = 5                                   # non-finite steps in a row that end a run
FIXED_SIZES = ("synthetic", "ucf", "jhmdb")     # data sets whose clips all have one size
OUT_OF_MEMORY = """out of memory: {error}
What takes less: --set checkpoint_classifier=True checkpoint_encoder=True checkpoint_backbone=True
(recomputed in the backward pass), a smaller micro_batch=N (the batch stays as large),
train_frames=N (frames of a clip that are decoded), --precision bf16, smaller clips (crop_size,
frames). With --resume {out} the run goes on from last.pt."""


def main(argv=None):
    """A run. Faults of the data and the machine end it with a message instead of a traceback."""
    args = arguments(argv)
    out = run_folder(args)
    try:
        train(args, out)
    except (OSError, ValueError) as error:
        lines = str(error).splitlines() or [type(error).__name__]
        reason = lines[-1]                          # from a loading process it comes in a traceback
        raise SystemExit(f"train.py: {reason}; mended, it goes on with --resume {out}") from error
    except (RuntimeError, MemoryError) as error:
        memory = re.search("out of memory|can't allocate memory", str(error))
        if isinstance(error, RuntimeError) and not memory:
            raise
        raise SystemExit(OUT_OF_MEMORY.format(error=str(error).split("\n")[0], out=out)) from error


def train(args, out):
    """From the arguments to the last evaluation; `out` is the run's folder."""
    signals = Signals()
    device, rank, world = start_processes(args.device)
    try:
        saved = read_run(out, args, rank)               # last.pt of a run that is resumed, or None
        settings, config = choose_settings(args, saved)
        if settings["precision"] is None:
            settings["precision"] = evaluate.default_precision(device, training=True)
        autocast = evaluate.set_precision(settings["precision"], device)    # a dtype, or None
        if rank == 0:
            print(f"{out}: {settings['dataset']}, preset {settings['preset']}, seed "
                  f"{settings['seed']}, {world} x {device.type} in {settings['precision']}",
                  flush=True)

        # Data
        training, testing, config = open_datasets(settings, config, args)
        clips_per_epoch, steps_per_epoch = epoch_length(len(training), config)
        total = config.epochs * steps_per_epoch
        micro_steps = config.batch_size // (world * micro_batch_size(config, world))

        # Model
        seed_everything(settings["seed"], 2)
        model = VideoActionDetector(config)
        state = {"step": 0, "bad": 0, "seconds": 0.0}   # bad: non-finite steps in a row
        if saved:
            start = resume(model, saved, state, training, steps_per_epoch)
        else:
            start = first_weights(model, args, settings, training.class_names)
    except (OSError, ValueError) as error:
        raise SystemExit(f"train.py: {error}") from error
    if world > 1 and device.type == "cuda":
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    model.to(device).train()
    torch.backends.cudnn.benchmark = settings["dataset"] in FIXED_SIZES
    if settings["compile"]:
        compile_parts(model)
    network = model
    if world > 1:       # batch statistics are sent before evaluations, not in every step
        network = DistributedDataParallel(
            model, gradient_as_bucket_view=True, forward_sync_buffers=False)

    # Optimizer
    optimizer = make_optimizer(model, config)
    scaler = torch.amp.GradScaler(device.type, enabled=autocast is torch.float16)
    if saved:
        optimizer.load_state_dict(saved["optimizer"])
        scaler.load_state_dict(saved["scaler"])

    # What happens now and then: a checkpoint, an evaluation
    workers = args.workers
    if workers is None:
        workers = evaluate.default_workers(device)
    code = code_version()
    begun = time.monotonic() - state["seconds"]         # of a resumed run, as if it had begun then
    folder = RunFolder(out, read_history(out / "results.csv", state["step"]))

    def checkpoint():
        """All that the run needs to go on."""
        return {
            "model": model.state_dict(), "optimizer": optimizer.state_dict(),
            "scaler": scaler.state_dict(), "state": state, "config": asdict(config),
            "settings": settings, "dataset": training.name, "classes": list(training.class_names),
            "clips": len(training), "epoch": state["step"] // steps_per_epoch,
            "processes": world, "code": code,
            "metrics": folder.last_result()}

    def evaluate_share(share):
        """Evaluates this share of the validation videos. The best full evaluation is best.pt."""
        precision = settings["precision"]
        detections = detect(model, testing, config, device, precision, share, workers)
        tubes = evaluate.link(detections, config)           # each rank those of its videos
        if rank > 0:
            return
        results = evaluate.score(detections, testing, config, tubes=tubes)
        quick = share < settings["eval_share"]
        said = f"{results['videos']} of {len(testing.videos)} validation videos"
        if quick:
            said += " (a quick look)"
        if set(training.videos) == set(testing.videos):
            said += ", overfit check: they are the training videos"
        epoch = state["step"] // steps_per_epoch
        tqdm.write(f"epoch {epoch}, {said}\n{evaluate.table(results)}")
        minutes = round((time.monotonic() - begun) / 60, 3)
        row = {"epoch": epoch, "step": state["step"], "minutes": minutes, "share": share}
        row |= columns(results)
        if not quick:
            evaluate.write_results(out, results, detections)
            folder.keep_if_best(row)
        folder.add_result(row, PARTS)

    if rank == 0:
        count = sum(parameter.numel() for parameter in model.parameters())
        print(f"{count:,} parameters, {len(training)} training clips; {start}", flush=True)
        if settings["dataset"] != "synthetic":
            print(crowd_warning(training, config.num_queries), end="", flush=True)
        folder.open(checkpoint(), settings, config)
        signals.folder = folder
    last_saved = time.monotonic()
    share = share_due(state["step"], steps_per_epoch, config, settings)
    if share > folder.share_at(state["step"]):          # the run was ended in an evaluation
        evaluate_share(share)

    # The loop
    order = micro_batches(
        state["step"], total, len(training), config, settings["seed"], rank, world)
    loader = iter(DataLoader(
        SeededClips(training, settings["seed"]), batch_sampler=order, collate_fn=collate,
        num_workers=workers, worker_init_fn=ignore_signals, pin_memory=device.type == "cuda"))
    statistics = batch_statistics(model)
    bar = tqdm(total=total, initial=state["step"], disable=rank > 0,
               mininterval=1 if sys.stderr.isatty() else 30)

    for step in range(state["step"], total):
        signals.in_step = True
        started = time.monotonic()
        batches = [next(loader) for _ in range(micro_steps)]
        waited = time.monotonic() - started
        seed_everything(settings["seed"], 1, step, rank)        # of dropout and decoded frames
        micro = [prepare(batch, config, device) for batch in batches]
        kept = [buffer.clone() for buffer in statistics]

        # A step: forward, loss and backward of each micro-batch, then the optimizer
        backbone_lr, lr = rates(step, steps_per_epoch, config)
        set_rates(optimizer, (backbone_lr, lr, config.offset_rate * lr))
        counts = sum(loss_counts(targets, config) for _, _, targets, _ in micro)            # (3,)
        counts = all_sum(counts.to(device, non_blocking=True))
        losses = []
        for number, (clips, mask, targets, frames) in enumerate(micro):
            if world > 1:       # gradients are exchanged once, in the last backward pass
                network.require_backward_grad_sync = number == len(micro) - 1
            with torch.autocast(device.type, autocast, enabled=autocast is not None):
                outputs = network(clips, mask, frames=frames)
            loss, parts = detection_loss(outputs, targets, config, counts)
            scaler.scale(loss * world).backward()       # the exchange is a mean, the sum is meant
            losses.append(torch.stack([loss.detach(), *parts.values()]))                    # (5,)
        scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm)
        stop = losses[0].new_tensor([signals.caught > 0])       # a signal that any rank has met
        sums = all_sum(torch.cat([sum(losses), stop]))                                      # (6,)
        numbers = torch.cat([sums, norm[None]]).tolist()                # waits for the GPU
        total_loss, *means, stopped, grad_norm = numbers

        # What is not finite changes nothing but the count of such steps in a row
        finite = math.isfinite(total_loss) and math.isfinite(grad_norm)
        if finite:
            scaler.step(optimizer)
            state["bad"] = 0
        else:
            for buffer, value in zip(statistics, kept):
                buffer.copy_(value)
            # fp16 finds its scale by overflowing: no fault while the scale can still be lowered
            searching = (scaler.is_enabled() and math.isfinite(total_loss)
                         and scaler.get_scale() > 1)
            if not searching:
                state["bad"] += 1
        scaler.update()
        optimizer.zero_grad()
        state["step"] = step + 1

        # Log
        now = time.monotonic()
        state["seconds"] = now - begun
        taken = clips_per_epoch - step % steps_per_epoch * config.batch_size
        taken = min(config.batch_size, taken)           # clips; an epoch's last step may have fewer
        minutes = state["seconds"] / 60
        line = {
            "step": step + 1, "epoch": (step + 1) / steps_per_epoch, "loss": total_loss,
            **dict(zip(PARTS, means)), "lr": lr, "backbone_lr": backbone_lr,
            "grad_norm": grad_norm, "skipped": not finite, "memory_gb": evaluate.memory_gb(device),
            "clips_per_s": taken / (now - started), "data_share": waited / (now - started),
            "eta_minutes": minutes / (step + 1) * (total - step - 1)}
        if not finite:
            line["clips"] = name_clips(micro, losses, world)
        bar.set_postfix_str(f"epoch {line['epoch']:.2f} loss {total_loss:.3f} lr {lr:.1e}",
                            refresh=False)
        bar.update()
        if rank == 0:
            folder.log(line)
            if not finite:
                bar.write(f"step {step + 1} skipped: loss {total_loss}, gradient norm {grad_norm} "
                          f"with {', '.join(line['clips'])}")
        if state["bad"] == BAD_STEPS:
            raise SystemExit(
                f"step {step + 1}: loss {total_loss}, gradient norm {grad_norm}, {BAD_STEPS} in a "
                f"row: {out / 'last.pt'} holds the weights before them. Look at these clips, or "
                f"lower the learning rate (--set lr=): {', '.join(line['clips'])}")

        # Save, evaluate
        share = share_due(step + 1, steps_per_epoch, config, settings)
        overdue = now - last_saved > 60 * settings["save_minutes"]
        if rank == 0 and (stopped or share or overdue):
            folder.save(checkpoint())
            last_saved = now
        if stopped:
            signals.leave(signals.caught or signal.SIGTERM)
        if share:
            signals.end_step()          # an evaluation may be left at once: resumed, it starts anew
            evaluate_share(share)

    bar.close()
    shares = visualize.attention_shares(model, testing, config, device, settings["eval_share"])
    if rank == 0:
        if saved and saved["state"]["step"] == total:
            print(f"{out}: the run had ended; metrics.json has its results. --set epochs=N goes on")
        visualize.attention_sheet(model, testing, config, out / "attention.png", device)
        if shares:
            print(visualize.say_shares(shares))
            evaluate.write_json(out / "attention.json", shares)
        folder.wait()
        print("wrote " + ", ".join(str(path) for path in sorted(out.iterdir())))
    if dist.is_initialized():
        dist.destroy_process_group()


# --------------------------------------------------------------------------------------------------
# The parts of the story, in its order


def arguments(argv=None):
    """The command line. What is impossible or contradicts itself is refused."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0],
        usage="train.py [--dataset NAME --data DIR] [options]; --help shows them")
    add = parser.add_argument_group("what is trained on what").add_argument
    add("--dataset", choices=evaluate.DATASETS,
        help="synthetic (default), a benchmark, or custom: your own (docs/own_data.md)")
    add("--data", metavar="DIR", help="the data set's folder (synthetic has none)")
    add("--split", type=int, metavar="N", help="1 (default), of jhmdb also 2 and 3")
    add("--missing", choices=("error", "leave-out"),
        help="leave-out: do without the videos that have no frames (default: an error)")
    add("--fill", type=evaluate.at_least(0), metavar="N",
        help="custom: interpolate a person's boxes that are up to N frames apart, default 0")
    add("--preset", choices=PRESETS, help="sizes and recipe; default: the data set's; custom: ucf")
    add("--set", nargs="+", action="extend", default=[], metavar="NAME=VALUE",
        help="change fields of the preset's Config: --set epochs=20 lr=1e-4")
    add("--fields", action="store_true", help="show these fields and what they mean, no more")
    add("--seed", type=evaluate.at_least(0), metavar="N", help="of everything random, default 0")
    add = parser.add_argument_group("where it starts").add_argument
    add("--backbone-weights", metavar="FILE", help="published weights of the backbone; none: "
        "random ones; default for synthetic: weights/stem.safetensors")
    add("--init", metavar="FILE", help="fine-tuning: the whole model of a checkpoint, this "
        "project's or the authors'")
    add("--init-transformer", metavar="FILE", help="stage two of the released recipe: "
        "encoder and decoder of stage one's checkpoint, the backbone again from pre-training")
    add("--resume", metavar="DIR", nargs="?", const="", help="go on with the run in DIR, or --out")
    add = parser.add_argument_group("where it ends").add_argument
    add("--out", metavar="DIR", help="run folder, default runs/<dataset>-<date>-<time>")
    add("--save-minutes", type=float, metavar="M", help="between checkpoints, default 5")
    add("--eval-share", type=float, metavar="SHARE",
        help="share of the validation videos that is evaluated, default 1")
    add("--quick-share", type=float, metavar="SHARE",
        help="share of these that is evaluated at a quarter, half and three quarters of the way "
             "between, never for best.pt; default .25 for synthetic, else 0")
    add = parser.add_argument_group("how it runs").add_argument
    add("--device", choices=("cuda", "cpu"), help="default: cuda if there is one")
    add("--precision", choices=evaluate.PRECISIONS, help="default: float32 on a CPU; on a GPU "
        "bf16, or tf32 where it lacks bf16. fp16 overflows sooner than bf16")
    add("--compile", action="store_true", default=None, help="torch.compile, part by part")
    add("--workers", type=evaluate.at_least(0), metavar="N",
        help="loading processes per rank; default: 0 on a CPU, up to 8 on a GPU")
    args = parser.parse_args(argv)

    if args.fields:
        print(list_fields(PRESETS[args.preset or default_preset(args.dataset or "synthetic")]))
        parser.exit()
    if args.data and not args.dataset and args.resume is None:
        parser.error(f"--data {args.data}: of which data set? Add --dataset ucf, jhmdb, ava or "
                     "custom (your own)")
    if args.save_minutes is not None and not args.save_minutes >= 0:
        parser.error(f"--save-minutes {args.save_minutes}: must be at least 0")
    if args.eval_share is not None and not 0 < args.eval_share <= 1:
        parser.error(f"--eval-share {args.eval_share}: must be above 0 and at most 1")
    if args.quick_share is not None and not 0 <= args.quick_share < 1:
        parser.error(f"--quick-share {args.quick_share}: must be at least 0 (none) and below 1")
    if args.init and (args.init_transformer or args.backbone_weights):
        parser.error("--init takes a whole model: leave --init-transformer and --backbone-weights "
                     "out")
    if args.resume is not None and (args.init or args.init_transformer or args.backbone_weights):
        parser.error("--resume goes on with the weights of the run: --init, --init-transformer and "
                     "--backbone-weights start another one")
    if args.resume == "" and not args.out:
        parser.error("--resume needs the run folder: --resume runs/NAME")
    if args.resume and args.out and Path(args.resume).resolve() != Path(args.out).resolve():
        parser.error(f"--resume {args.resume} goes on in that folder: leave --out {args.out} out")
    if int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)) and not (args.out or args.resume):
        parser.error("--max-restarts needs --out DIR: a restarted run has to find its folder")
    return args


def open_datasets(settings, config, args):
    """(training clips, validation clips, Config with as many classes as the data have).

    A clip of each is read, so that missing frames are known before anything is written.
    """
    name = settings["dataset"]
    sides = []
    for side in ("train", "val"):
        dataset = build_dataset(
            name, settings["data"], side, config, settings["split"],
            missing=settings["missing"].replace("-", " "), fill=settings["fill"])
        if len(dataset) == 0:
            raise ValueError(f"{name} in {settings['data']} has no clips for {side}")
        dataset[0]
        sides.append(dataset)
    training, testing = sides
    classes = len(training.class_names)
    if classes == config.num_classes:
        return training, testing, config

    given = any(assignment.startswith("num_classes=") for assignment in args.set)
    if name == "custom" and not given and args.resume is None:
        if os.environ.get("RANK", "0") == "0":
            print(f"num_classes={classes}, as in {settings['data']}")
        return training, testing, replace(config, num_classes=classes)
    advice = f"add --set num_classes={classes}"
    if given and (name == "custom" or PRESETS[settings["preset"]].num_classes == classes):
        advice = "leave num_classes out of --set"
    raise ValueError(
        f"{name} has {classes} classes and the model num_classes={config.num_classes}: {advice}")


def compile_parts(model):
    """torch.compile of the backbone, the neck and every layer of encoder and decoder, each a graph
    of its own (but for the decoder of Table 1's DETR, which stays as it is)."""
    parts = [model.backbone, model.neck, *model.encoder.layers]
    for name in ("localizing", "classifying"):
        parts += getattr(model.decoder, name, [])
    for part in parts:
        part.compile()


def make_optimizer(model, config):
    """AdamW with the backbone's parameters as the first group, all others as the second; the
    encoder's sampling offsets are a third one where they have a rate of their own. Frozen ones are
    left out."""
    backbone = []
    others = []
    offsets = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if name.startswith("backbone."):
            backbone.append(parameter)
        elif ".sampling_offsets." in name and config.offset_rate != 1:
            offsets.append(parameter)
        else:
            others.append(parameter)
    groups = [{"params": backbone, "lr": config.backbone_lr}, {"params": others, "lr": config.lr}]
    if offsets:
        groups.append({"params": offsets, "lr": config.offset_rate * config.lr})
    return torch.optim.AdamW(groups, betas=(0.9, config.adam_beta2),
                             weight_decay=config.weight_decay, fused=True)


def batch_statistics(model):
    """BatchNorm's running mean, variance and count: the buffers that training changes."""
    statistics = []
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            statistics += module.buffers()
    return statistics


def prepare(batch, config, device="cpu"):
    """A collated batch for the model -> (clips on the device, mask or None, targets, frames).

    With Config.train_frames, so many frames of the clips are drawn to be decoded: `frames` are
    their indices, and the targets are cut to them. Otherwise `frames` is None: all are.
    """
    clips, padding_mask, targets = batch
    mask = None
    if padding_mask.any():
        mask = padding_mask.to(device, non_blocking=True)
    frames = None
    if 0 < config.train_frames < clips.shape[2] and not config.key_frame:
        frames = sorted(torch.randperm(clips.shape[2])[:config.train_frames].tolist())
        targets = [cut_to_frames(target, frames) for target in targets]
    return clips.to(device, non_blocking=True), mask, targets, frames


def cut_to_frames(target, frames):
    """A target with the frames of these k indices only."""
    cut = dict(target)
    for name in ("boxes", "present", "labels", "cause"):
        if name in target:
            cut[name] = target[name][:, frames]         # (N, k, ...)
    for name in ("frames", "frame_ids"):
        cut[name] = target[name][frames]                # (k,)
    return cut


def rates(step, steps_per_epoch, config):
    """A step's learning rates, (the backbone's, the others'): linear warm-up, then a tenth at each
    of drop_epochs, and from epoch decay_from on evenly down to 0 behind the last step. That of
    sampling offsets is offset_rate times the second."""
    warm_up = config.warmup_epochs * steps_per_epoch
    start, total = config.decay_from * steps_per_epoch, config.epochs * steps_per_epoch
    factor = 0.1 ** sum(step >= epoch * steps_per_epoch for epoch in config.drop_epochs)
    if config.decay_from and step > start:
        factor *= (total - step) / (total - start)
    of_step = []
    for rate in (config.backbone_lr, config.lr):
        if step < warm_up:
            of_step.append(config.warmup_lr + (rate - config.warmup_lr) * step / warm_up)
        else:
            of_step.append(rate * factor)
    return tuple(of_step)


def set_rates(optimizer, of_groups):
    """Gives the optimizer's groups their learning rates, a third one where there is such a
    group."""
    for group, rate in zip(optimizer.param_groups, of_groups):
        group["lr"] = rate


def name_clips(micro, losses, world):
    """The clips, of all ranks, in the micro-batches whose loss is not finite; all of them if only
    the gradient is not."""
    named = []
    for (_, _, targets, _), loss in zip(micro, losses):
        finite = bool(loss.isfinite().all())
        for target in targets:
            named.append((f"{target['video']} from frame {int(target['frame_ids'][0])}", finite))
    of_ranks = [named]
    if world > 1:
        of_ranks = [None] * world
        dist.all_gather_object(of_ranks, named)
    named = sum(of_ranks, [])
    spoilt = [name for name, finite in named if not finite]
    return spoilt or [name for name, _ in named]


def share_due(step, steps_per_epoch, config, settings):
    """The share of the validation videos that is evaluated after a step, 0 for none.

    eval_share every eval_every epochs and at the end; quick_share of that at a quarter, half and
    three quarters of the way between.
    """
    epoch, within = divmod(step, steps_per_epoch)
    if within or epoch == 0:
        return 0
    if epoch % config.eval_every == 0 or epoch == config.epochs:
        return settings["eval_share"]
    if 4 * epoch // config.eval_every > 4 * (epoch - 1) // config.eval_every:
        return settings["eval_share"] * settings["quick_share"]
    return 0


def detect(model, testing, config, device, precision, share, workers):
    """Detections on a share of the validation videos by all ranks, in the precision of evaluate.py
    in place of the training's, so that the numbers compare."""
    if dist.is_initialized():       # until here each rank has batch statistics of its own
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)
    autocast = evaluate.set_precision(evaluate.default_precision(device, training=False), device)
    detections = evaluate.detect(
        model, testing, config, device, share, workers, precision=autocast)
    evaluate.set_precision(precision, device)
    return detections


def columns(results):
    """An evaluation's mAPs for a line of results.csv: of all classes, then of each class group."""
    row = {}
    for name, value in results.items():
        if "-mAP@" in name:
            row[name] = value
    for group, values in results["per_group"].items():
        row |= {f"{name} {group}": value for name, value in values.items()}
    return row


if __name__ == "__main__":
    main()
