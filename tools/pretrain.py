"""The synthetic stem's schooling, in the place of Kinetics (Sec. 5.1): `python -m tools.pretrain`.

The paper's backbones come pre-trained on action classification, and so does the synthetic preset's
stem. It learns which classes of "own motion" and "detail" a figure shows, from a crop around it
with no other figure drawn, and whether a cone or a disc lies in a crop, as Kinetics' backbones know
objects: multi-label binary cross entropy, on a linear read-out of the maximum over space of each
map's mean over time. The third group, "context", is who points at what: it is no label here. The
scenes are of another seed than those of training and validation.

    python -m tools.pretrain                    # weights/stem.safetensors, 7.5 minutes on a core
    python -m tools.pretrain --shrink runs/NAME/best.pt weights/synthetic.pt

--shrink keeps of a checkpoint what evaluating and drawing need, its floats in half precision.
"""
# B crops, T frames, S pixels of a crop's side, C labels: classes of the two groups, kinds of things

import argparse
import sys
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn
from tqdm import tqdm

from backbone import ConvStem, normalise, open_checkpoint
from beside.synthetic import CLASS_GROUPS, HEIGHT, WIDTH, SyntheticDataset, draw
from model import PRESETS, config_from_dict

GROUPS = ("own motion", "detail")
CLASSES = [c for group in GROUPS for c in CLASS_GROUPS[group]]
KINDS = ("cone", "disc")
SUBJECTS = {**{group: len(CLASS_GROUPS[group]) for group in GROUPS}, "things": len(KINDS)}
FIRST_SEED = 100    # of the scenes, --seed is added; training and validation have 0
CROP = 48           # S; a figure is 24 to 36 pixels tall
BATCH, RATE = 24, 3e-3
HELD_OUT = 480      # crops of scenes that are not trained on
KEPT = ("model", "config", "settings", "dataset", "classes", "epoch", "metrics", "processes")


class Pupil(nn.Module):
    """The stem with its read-out: crops (B, 3, T, S, S) -> logits (B, C)."""

    def __init__(self):
        super().__init__()
        self.stem = ConvStem()
        self.read_out = nn.LazyLinear(sum(SUBJECTS.values()))

    def forward(self, crops):
        strongest = [x.mean(2).amax((2, 3)) for x in self.stem(crops)]  # (B, channels) of each map
        return self.read_out(torch.cat(strongest, 1))


def crops_of(scene):
    """Of each actor that is present, drawn without the others, and of the first thing that is in
    the frame, drawn without actors: a crop (3, T, S, S) uint8 around its mean place, pushed into
    the frame, and what the crop shows in some frame, (C,) float: classes of the actor, none where
    there is no actor, and kinds of things."""
    for actor in scene["actors"]:
        if actor["present"].any():
            x1, y1, x2, y2 = actor["box"][actor["present"]].mean(0)
            middle = (x1 + x2) / 2, (y1 + y2) / 2
            alone = {**scene, "actors": [actor]}
            yield crop_around(middle, alone, actor["seen"][:, CLASSES].max(0))
    for thing in scene["things"]:
        path = thing["path"]  # (T,)
        path = path[(0 < path.real) & (path.real < WIDTH) & (0 < path.imag) & (path.imag < HEIGHT)]
        if len(path):
            middle = path.mean().real, path.mean().imag
            nobody = {**scene, "actors": []}
            yield crop_around(middle, nobody, np.zeros(len(CLASSES), np.float32))
            return


def crop_around(middle, scene, seen):
    """The crop of a scene around `middle` (x, y) and its labels: `seen`, then of each kind whether
    the middle of such a thing is in the crop in some frame."""
    left = int(np.clip(middle[0] - CROP / 2, 0, WIDTH - CROP))
    top = int(np.clip(middle[1] - CROP / 2, 0, HEIGHT - CROP))
    crop = draw(scene)[:, top:top + CROP, left:left + CROP].transpose(3, 0, 1, 2)
    inside = np.zeros(len(KINDS), np.float32)
    for thing in scene["things"]:
        x, y = thing["path"].real - left, thing["path"].imag - top  # (T,) each
        if ((0 < x) & (x < CROP) & (0 < y) & (y < CROP)).any():
            inside[KINDS.index(thing["kind"])] = 1
    return torch.from_numpy(crop.copy()), torch.from_numpy(np.concatenate([seen, inside]))


def batches(dataset, size):
    """Crops (B, 3, T, S, S), normalised, and labels (B, C), one scene after another, endlessly."""
    pairs, index = [], 0
    while True:
        while len(pairs) < size:
            pairs += crops_of(dataset.scene(index % len(dataset)))
            index += 1
        crops, labels = zip(*pairs[:size])
        pairs = pairs[size:]
        yield normalise(torch.stack(crops)), torch.stack(labels)


@torch.no_grad()
def examine(pupil, crops, labels):
    """{group, or "things": binary cross entropy}."""
    pupil.eval()
    logits = torch.cat([pupil(part) for part in crops.split(BATCH)])
    losses = F.binary_cross_entropy_with_logits(logits, labels, reduction="none").mean(0)  # (C,)
    pupil.train()
    parts = losses.split(list(SUBJECTS.values()))
    return {subject: float(part.mean()) for subject, part in zip(SUBJECTS, parts)}


def pretrain(steps, seed, held_out=HELD_OUT):
    """The stem after `steps` and, of `held_out` crops, what `examine` says. Seeded."""
    torch.manual_seed(seed)
    config = PRESETS["synthetic"]
    lessons = batches(SyntheticDataset(config, "train", seed=FIRST_SEED + seed), BATCH)
    examples = next(batches(SyntheticDataset(config, "val", seed=FIRST_SEED + seed), held_out))
    pupil = Pupil()
    pupil(examples[0][:2])  # the read-out learns its width
    optimizer = torch.optim.AdamW(pupil.parameters(), lr=RATE, weight_decay=config.weight_decay)
    rates = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    bar = tqdm(range(steps), "pre-training", mininterval=1 if sys.stderr.isatty() else 30)
    for _ in bar:
        crops, labels = next(lessons)
        loss = F.binary_cross_entropy_with_logits(pupil(crops), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rates.step()
        bar.set_postfix_str(f"loss {loss:.3f}", refresh=False)
    return pupil.stem, examine(pupil, *examples)


def halved(tensors):
    """Tensors by name, floats in half precision."""
    small = {}
    for name, tensor in tensors.items():
        small[name] = tensor.half().contiguous() if tensor.is_floating_point() else tensor
    return small


def shrink(checkpoint):
    """A checkpoint of train.py as one to look at: what KEPT names, and the command that made it."""
    missing = ", ".join(name for name in KEPT if name not in checkpoint)
    if missing:
        raise SystemExit(f"--shrink takes checkpoints of train.py; this one has no {missing}")
    settings, dataset = checkpoint["settings"], checkpoint["dataset"]
    command = f"torchrun --nproc_per_node {checkpoint['processes']} train.py --dataset {dataset}"
    command += f" --seed {settings['seed']}"
    if settings["preset"] not in (None, dataset):
        command += f" --preset {settings['preset']}"
    preset = asdict(PRESETS[settings["preset"] or dataset])
    changes = []
    for name, value in asdict(config_from_dict(checkpoint["config"])).items():
        if value == preset[name]:
            continue
        text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
        changes.append(f"{name}={text}")
    if changes:
        command += " --set " + " ".join(changes)
    kept = {name: checkpoint[name] for name in KEPT}
    return {**kept, "model": halved(checkpoint["model"]), "command": command}


def arguments(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=2000, help=f"of {BATCH} crops each (2000)")
    parser.add_argument("--seed", type=int, default=0, help="of start and scenes (0)")
    parser.add_argument("--out", type=Path, default=Path("weights/stem.safetensors"),
                        metavar="FILE", help="where the weights go (weights/stem.safetensors)")
    parser.add_argument("--shrink", nargs=2, type=Path, metavar=("CHECKPOINT", "FILE"),
                        help="instead: write a checkpoint's small copy")
    args = parser.parse_args(argv)
    if args.steps < 1 or args.seed < 0:
        parser.error(f"--steps {args.steps} --seed {args.seed}: must be at least 1 and 0")
    return args


def main(argv=None):
    args = arguments(argv)
    if args.shrink:
        source, out = args.shrink
        small = shrink(open_checkpoint(source))
        out.parent.mkdir(parents=True, exist_ok=True)
        torch.save(small, out)
        print(f"wrote {out}, {out.stat().st_size / 1e6:.2f} MB")
        return
    begun = time.monotonic()
    stem, losses = pretrain(args.steps, args.seed)
    reached = ", ".join(f"{subject} {loss:.3f}" for subject, loss in losses.items())
    print(f"{time.monotonic() - begun:.0f} s; binary cross entropy on {HELD_OUT} crops of scenes "
          f"that were not trained on: {reached}")
    tensors = {}
    for name, tensor in halved(stem.state_dict()).items():
        if not name.endswith("num_batches_tracked"):  # read by nobody
            tensors[name] = tensor
    command = f"python -m tools.pretrain --steps {args.steps} --seed {args.seed}"
    args.out.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, args.out, {"command": command, "seed": str(args.seed), "reached": reached})
    print(f"wrote {args.out}, {args.out.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
