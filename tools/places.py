"""When class queries pay (Sec. 3, Fig. 2): the decoder alone, on maps in which an actor's classes have K places.

The synthetic set gives an actor one cause, and one look serves all of its labels. Here a map of 6 x 8 cells holds 2 actors
and 10 things, each a sum of learned embeddings in a cell of its own. A thing has one of 10 colours, all different, and
one of 3 kinds. An actor has K flags, each empty (.4) or of the colour of some thing, all of them in the actor's one
cell. Class (k, s) is true of an actor whose k-th flag has the colour of a thing of kind s: K groups of classes, each told
by a place of its own. The boxes are given, and the loss is the classes' binary cross entropy on both layers.

Decoders: those of Table 1, class queries without P (Table 3), and with two quirks of the released model. Each is trained on
the same scenes for the same number of steps, and those with one map an actor once more for the time of the full decoder.
A run that is done is a line of `runs.jsonl` in the folder; `report` makes the table and the figure of them.

    python -m tools.experiments --places --seeds 0
"""
# B scenes, A actors, J things, K flags, S kinds, C = K * S classes, N = H * W cells, D channels

import json
import math
import os
import time
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from model import PRESETS, VideoActionDetector

HEIGHT, WIDTH = 6, 8
ACTORS, THINGS, KINDS, EMPTY = 2, 10, 3, 0.4        # THINGS colours, one of each
ACTOR_SIZE = (0.2, 0.48)                            # w, h that the small start expects of an actor
NUM_PLACES = (1, 2, 4, 6, 8)                        # K
TEST_SCENES, TEST_SEED = 1024, 1_000_000
BATCH, STEPS, RATE = 64, 600, 1e-3
FULL = "LDL + CDL"
DECODERS = {                                        # what differs from the synthetic preset
    "DETR": {"decoder": "detr"},
    "LDL": {"decoder": "ldl"},
    FULL: {},
    "LDL + CDL without P": {"class_position": False},
    "LDL + CDL as released": {"quirks": ("split_heads", "bare_output")},
}
ONE_MAP = ("DETR", "LDL")


def draw_scenes(count, num_places, generator):
    """`count` scenes: cells (B, A + J) of the actors and things, kinds (B, J), flags (B, A, K) the thing of the flag's colour
    or J for none, labels (B, A, K * S). Thing j has colour j: cells and kinds are random, so that nothing is lost by it."""
    cells = torch.rand(count, HEIGHT * WIDTH, generator=generator).argsort(1)[:, :ACTORS + THINGS]
    kinds = torch.randint(KINDS, (count, THINGS), generator=generator)
    flags = torch.randint(THINGS, (count, ACTORS, num_places), generator=generator)
    flags[torch.rand(flags.shape, generator=generator) < EMPTY] = THINGS
    with_none = F.pad(kinds, (0, 1), value=KINDS)                                           # (B, J + 1)
    shown = with_none.gather(1, flags.flatten(1)).view_as(flags)                            # (B, A, K)
    labels = F.one_hot(shown, KINDS + 1)[..., :KINDS].flatten(2).float()                    # (B, A, K * S)
    return {"cells": cells, "kinds": kinds, "flags": flags, "labels": labels}


class PlantedMaps(nn.Module):
    """A decoder, and the embeddings of what stands in its maps. Scenes -> its predictions and attention maps."""

    def __init__(self, decoder_name, num_places):
        super().__init__()
        self.decoder, position = make_decoder(decoder_name, num_places)
        self.register_buffer("position", position)                                          # (N, D)
        dim = position.shape[1]
        self.actor = nn.Parameter(torch.randn(dim))
        self.colour = nn.Parameter(torch.randn(THINGS, dim))
        self.kind = nn.Parameter(torch.randn(KINDS, dim))
        self.flag = nn.Parameter(torch.randn(num_places, THINGS + 1, dim) / math.sqrt(num_places))
        self.actor_embed = nn.Parameter(0.5 * torch.randn(ACTORS, dim))

    def forward(self, scenes, return_attention=False):
        cells, flags = scenes["cells"], scenes["flags"]
        places = torch.arange(flags.shape[2])
        actors = self.actor + self.flag[places, flags].sum(2)                               # (B, A, D)
        things = self.colour + self.kind[scenes["kinds"]]                                   # (B, J, D)
        found = torch.cat([actors, things], 1)                                              # (B, A + J, D)
        maps = self.position.repeat(len(cells), 1, 1)                                       # (B, N, D)
        maps = maps.scatter_add(1, cells[..., None].expand_as(found), found)
        maps = maps.unflatten(1, (HEIGHT, WIDTH))[:, None]                                  # (B, 1, H, W, D)
        keys = self.position.unflatten(0, (HEIGHT, WIDTH)).expand(len(cells), -1, -1, -1)   # (B, H, W, D)
        padding = torch.zeros(keys.shape[:3], dtype=torch.bool)
        anchors = self.anchors(cells[:, :ACTORS])
        actor_embed = self.actor_embed.expand(len(cells), -1, -1)                           # (B, A, D)
        return self.decoder(maps, keys, padding, anchors, actor_embed, return_attention=return_attention)

    def anchors(self, cells):
        """What tells the decoder where the actors are: boxes (B, A, 4); for DETR's the positions of their cells (B, A, D)."""
        if hasattr(self.decoder, "query_positions"):
            return self.position[cells]
        middle = torch.stack([(cells % WIDTH + 0.5) / WIDTH, (cells // WIDTH + 0.5) / HEIGHT], -1)     # (B, A, 2)
        return torch.cat([middle, torch.tensor(ACTOR_SIZE).expand_as(middle)], -1)


def make_decoder(name, num_places):
    """The synthetic preset's decoder with its own start, for one map, and the positions of the map's cells (N, D)."""
    config = replace(PRESETS["synthetic"], num_queries=ACTORS, num_classes=num_places * KINDS, num_levels=1, **DECODERS[name])
    model = VideoActionDetector(config)
    _, keys = model.tables([torch.zeros(1, 1, HEIGHT, WIDTH, dtype=torch.bool)])            # (1, 1, H, W, D)
    return model.decoder, keys.flatten(0, 3)


def class_loss(predictions, labels):
    """Binary cross entropy, the sum over both layers."""
    return sum(F.binary_cross_entropy_with_logits(layer["pred_logits"], labels) for layer in predictions)


@torch.no_grad()
def examine(model, scenes):
    """(mAP, share): the mean over classes of the average precision on scenes, and the share of a true label's attention
    that lies on its cause, the thing of its flag's colour, in the last layer, mean over heads, actors and labels."""
    model.eval()
    probabilities, shares = [], []
    for start in range(0, len(scenes["cells"]), BATCH):
        part = {name: value[start:start + BATCH] for name, value in scenes.items()}
        predictions, maps = model(part, return_attention=True)                              # maps (B, A, C, H, W)
        probabilities.append(predictions[-1]["pred_logits"].sigmoid())
        true = part["labels"].bool()                                                        # (B, A, C)
        cells = cause_cells(part).repeat_interleave(KINDS, 2)                               # (B, A, C)
        shares.append(maps.flatten(3).gather(3, cells[..., None])[..., 0][true])
    model.train()
    return mean_precision(torch.cat(probabilities), scenes["labels"]), float(torch.cat(shares).mean())


def cause_cells(scenes):
    """The cell of the thing that each flag names, (B, A, K); the first actor's where there is none."""
    of_things = torch.cat([scenes["cells"][:, ACTORS:], scenes["cells"][:, :1]], 1)         # (B, J + 1)
    return of_things.gather(1, scenes["flags"].flatten(1)).view_as(scenes["flags"])


def mean_precision(scores, labels):
    """Scores and labels (B, A, C) -> the mean over classes of the precision at each true one, by descending score."""
    scores, labels = scores.flatten(0, 1).numpy(), labels.flatten(0, 1).numpy()             # (B * A, C)
    precisions = []
    for score, label in zip(scores.T, labels.T):
        ranked = label[np.argsort(-score, kind="stable")]
        ranks = np.flatnonzero(ranked) + 1
        precisions.append((np.arange(1, len(ranks) + 1) / ranks).mean())
    return float(np.mean(precisions))


def without_looking(scenes):
    """(mAP, loss) of one who sees the flags, and how many things are of each kind, but not where: the plateau."""
    count = F.one_hot(scenes["kinds"], KINDS).float().mean(1)                               # (B, S)
    known = (scenes["flags"] < THINGS)[..., None] * count[:, None, None]                    # (B, A, K, S)
    known = known.flatten(2)
    return mean_precision(known, scenes["labels"]), float(F.binary_cross_entropy(known, scenes["labels"]))


def learn(decoder_name, num_places, seed, steps):
    """One run -> what is written of it: a line of runs.jsonl as a dict. One thread; seconds are the processor's."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = PlantedMaps(decoder_name, num_places)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, fused=True)
    losses, begun = [], time.process_time()
    for step in range(steps):
        if step == steps - steps // 10:
            optimizer.param_groups[0]["lr"] = RATE / 10
        scenes = draw_scenes(BATCH, num_places, generator)
        predictions, _ = model(scenes)
        losses.append(class_loss(predictions[-1:], scenes["labels"]))
        loss = losses[-1] + class_loss(predictions[:-1], scenes["labels"])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses[-1] = losses[-1].item()
    seconds = time.process_time() - begun
    testing = draw_scenes(TEST_SCENES, num_places, torch.Generator().manual_seed(TEST_SEED))
    mean, share = examine(model, testing)
    return {"decoder": decoder_name, "places": num_places, "seed": seed, "steps": steps, "mAP": mean, "share": share,
            "left": leaves(losses, without_looking(testing)[1]), "seconds": seconds}


def leaves(losses, plateau, width=25):
    """The step from which the mean of `width` losses stays below .95 of the plateau; None if the last is not."""
    means = np.convolve(losses, np.ones(width) / width, "valid")
    above = np.flatnonzero(means >= 0.95 * plateau)
    last = above[-1] + 1 if len(above) else 0
    return None if last == len(means) else int(last) + width


def read_runs(out):
    """The runs that are done: {(decoder, places, seed, kind): line}; kind "steps", or "time" for as long as the full one."""
    path = Path(out) / "runs.jsonl"
    lines = path.read_text().splitlines() if path.is_file() else []
    runs = [json.loads(line) for line in lines]
    return {(run["decoder"], run["places"], run["seed"], run["kind"]): run for run in runs}


def missing(runs, seeds, kind):
    """What is left to run: [(decoder, places, seed, steps)]. Runs of the same time need those of the same steps."""
    jobs = []
    for seed in seeds:
        for places in NUM_PLACES:
            for decoder in DECODERS if kind == "steps" else ONE_MAP:
                if (decoder, places, seed, kind) in runs:
                    continue
                steps = STEPS
                if kind == "time":
                    full, own = (runs[name, places, seed, "steps"]["seconds"] for name in (FULL, decoder))
                    steps = round(STEPS * full / own)
                jobs.append((decoder, places, seed, steps))
    return jobs


def run_all(out, seeds, processes):
    """All runs of some seeds that are not done yet, each in one of so many processes, one seed after another."""
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    for seed in seeds:
        for kind in ("steps", "time"):
            jobs = missing(read_runs(out), [seed], kind)
            with get_context("spawn").Pool(processes) as pool, open(out / "runs.jsonl", "a") as file:
                ended = pool.imap_unordered(learn_job, jobs)
                for run in tqdm(ended, f"places, seed {seed}, same {kind}", total=len(jobs)):
                    file.write(json.dumps({**run, "kind": kind}) + "\n")
                    file.flush()


def learn_job(job):
    return learn(*job)


def report(out, page, figure):
    """Writes the tables of all runs behind the mark in a page, what stands above it stays, and the figure."""
    runs = read_runs(out)
    if not runs:
        raise SystemExit(f"{out}/runs.jsonl holds no run: {page} stays")
    rows = [(decoder, kind) for kind in ("steps", "time") for decoder in DECODERS
            if any(run[0] == decoder and run[3] == kind for run in runs)]
    seeds = sorted({seed for _, _, seed, _ in runs})
    lines = []
    for value, title in (("mAP", "mAP on fresh scenes"), ("share", "Share of a true label's attention on its cause"),
                         ("left", "Step at which the loss leaves its plateau"), ("seconds", "Seconds of processor time")):
        header = [title, *(f"K = {places}" for places in NUM_PLACES)]
        lines += ["", *markdown(header, [[row_name(*row), *cells(runs, row, seeds, value)] for row in rows])]
    lines += ["", f"Seeds {', '.join(map(str, seeds))} in a cell, in this order; – is a run that has not been made."]
    text = page.read_text() if page.is_file() else MARK
    page.write_text(text.partition(MARK)[0] + MARK + "\n" + "\n".join(lines) + "\n")
    draw_figure(runs, rows, figure)
    print(f"wrote {page} and {figure}")


def row_name(decoder, kind):
    return decoder if kind == "steps" else f"{decoder}, the time of {FULL}"


def cells(runs, row, seeds, value):
    """A table row's cells, one for each K: the value of each seed."""
    written = []
    for places in NUM_PLACES:
        of_seeds = []
        for seed in seeds:
            run = runs.get((row[0], places, seed, row[1]))
            if run is None:
                of_seeds.append("–")
            elif value == "left":
                of_seeds.append("never" if run["left"] is None else str(run["left"]))
            elif value == "seconds":
                of_seeds.append(f"{run['seconds']:.0f}")
            else:
                of_seeds.append(f"{run[value]:.3f}".lstrip("0"))
        written.append(" ".join(of_seeds))
    return written


def markdown(header, rows):
    table = [header, ["---"] * len(header), *rows]
    return ["| " + " | ".join(row) + " |" for row in table]


def draw_figure(runs, rows, path):
    """Two panels over K, mAP and the share on the cause: a line a decoder through the means over seeds, a dot a seed."""
    from matplotlib.figure import Figure
    figure = Figure((9, 3.4), layout="constrained")
    for panel, value in zip(figure.subplots(1, 2), ("mAP", "share")):
        for decoder, kind in rows:
            points = [(run["places"], run[value]) for run in runs.values() if (run["decoder"], run["kind"]) == (decoder, kind)]
            places = sorted({place for place, _ in points})
            means = [np.mean([one for place, one in points if place == wanted]) for wanted in places]
            colour = f"C{list(DECODERS).index(decoder)}"
            panel.plot(places, means, colour, ls="-" if kind == "steps" else "--", label=row_name(decoder, kind))
            panel.scatter(*zip(*points), 8, colour)
        panel.set_xlabel("K, places that an actor's classes need")
        panel.set_xticks(NUM_PLACES)
        panel.set_ylim(0, 1.02 if value == "mAP" else None)
        panel.set_title({"mAP": "mAP", "share": "attention of true labels on their cause"}[value], fontsize=10)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside right center", fontsize=8)
    figure.savefig(path, dpi=110)
