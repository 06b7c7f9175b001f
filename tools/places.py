"""When class queries pay (Sec. 3, Fig. 2): the decoder alone, on maps where actors need K places.

The synthetic set gives an actor one cause, and one look serves all of its labels. Here a map of
6 x 8 cells holds 2 actors and 10 things in cells of their own, each a sum of learned embeddings.
A thing has one of 10 colours, all different, and one of 3 kinds. An actor carries K flags, each
empty (.4) or of some thing's colour, all in the actor's one cell. Class (k, s): the k-th flag has
the colour of a thing of kind s. So an actor has K groups of classes, each told by another place.
Boxes are given; the loss is the binary cross entropy of the classes, on both layers.

Decoders: Table 1's, class queries without P (Table 3), and with two quirks of the released model.
All see the same scenes, the same number of steps; those with one map an actor once more, for as
long as the full decoder took. A run that is done is a line of OUT/runs.jsonl: end the command when
you like and repeat it. `report` makes the tables and the figure of these lines.

    python -m tools.experiments --places --seeds 0
"""
# B scenes, A actors, J things, K flags, S kinds, C = K * S classes, N = H * W cells, D channels

import json
import math
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from multiprocessing import active_children, get_context
from pathlib import Path
from time import process_time

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import nn
from tqdm import tqdm

from beside.small import start_at_actors, start_looking
from model import PRESETS, VideoActionDetector

HEIGHT, WIDTH = 6, 8
ACTORS, THINGS, KINDS = 2, 10, 3
EMPTY = 0.4
ACTOR_SIZE = (0.2, 0.48)    # w, h of the anchors, those that the small start expects
NUM_PLACES = (1, 2, 4, 6, 8)
TEST_SCENES, TEST_SEED = 1024, 1_000_000
WITHOUT_LOOKING = 0.506     # mAP of `without_looking`, for any K
BATCH, STEPS, WARM_UP = 64, 1000, 50
RATE, BETAS = 2e-3, (0.9, 0.98)
FULL = "LDL + CDL"
DECODERS = {                # what differs from the synthetic preset
    "DETR": {"decoder": "detr"},
    "LDL": {"decoder": "ldl"},
    FULL: {},
    "LDL + CDL without P": {"class_position": False},
    "LDL + CDL as released": {"quirks": ("split_heads", "bare_output")},
}
ONE_MAP = ("DETR", "LDL")
MARK = "<!-- What follows is written by tools/places.py. -->"


def draw_scenes(count, num_places, generator):
    """cells (B, A + J) of actors and things; kinds (B, J); flags (B, A, K): the thing of the flag's
    colour, or J for none; labels (B, A, C). Thing j has colour j: its cell and kind are random, so
    this takes nothing away."""
    cells = torch.rand(count, HEIGHT * WIDTH, generator=generator).argsort(1)
    kinds = torch.randint(KINDS, (count, THINGS), generator=generator)
    flags = torch.randint(THINGS, (count, ACTORS, num_places), generator=generator)
    flags[torch.rand(flags.shape, generator=generator) < EMPTY] = THINGS
    kinds_or_none = F.pad(kinds, (0, 1), value=KINDS)  # (B, J + 1)
    shown = kinds_or_none.gather(1, flags.flatten(1)).view_as(flags)  # (B, A, K)
    labels = F.one_hot(shown, KINDS + 1)[..., :KINDS]  # (B, A, K, S)
    return {"cells": cells[:, :ACTORS + THINGS], "kinds": kinds, "flags": flags,
            "labels": labels.flatten(2).float()}


def make_decoder(name, num_places):
    """The synthetic preset's decoder for one map, and the cells' positions (N, D). It starts as the
    small model does, but for class attention: half of the heads of each layer close to the actor,
    the start for which the setting was found."""
    sizes = {"num_queries": ACTORS, "num_classes": num_places * KINDS, "num_levels": 1}
    config = replace(PRESETS["synthetic"], initialisation="paper", **sizes, **DECODERS[name])
    model = VideoActionDetector(config)
    start_at_actors(model)
    for layer in getattr(model.decoder, "classifying", ()):
        start_looking(layer, other_strength=0.5)
    position = model.key_table(torch.zeros(1, 1, HEIGHT, WIDTH, dtype=torch.bool))
    return model.decoder, position.flatten(0, 3)  # (1, 1, H, W, D) -> (N, D)


class PlantedMaps(nn.Module):
    """A decoder, and the embeddings that its maps are made of: scenes -> what `Decoder` returns."""

    def __init__(self, decoder_name, num_places):
        super().__init__()
        self.decoder, position = make_decoder(decoder_name, num_places)
        self.register_buffer("position", position)
        dim = position.shape[1]
        self.actor = nn.Parameter(torch.randn(dim))
        self.colour = nn.Parameter(torch.randn(THINGS, dim))
        self.kind = nn.Parameter(torch.randn(KINDS, dim))
        flags = torch.randn(num_places, THINGS + 1, dim) / math.sqrt(num_places)
        self.flag = nn.Parameter(flags)
        self.actor_embed = nn.Parameter(0.5 * torch.randn(ACTORS, dim))  # as the small model's

    def forward(self, scenes, return_attention=False):
        count = len(scenes["cells"])
        maps = self.maps(scenes).unflatten(1, (1, HEIGHT, WIDTH))  # (B, 1, H, W, D)
        key_pos = self.position.unflatten(0, (HEIGHT, WIDTH)).expand(count, -1, -1, -1)
        padding = torch.zeros(count, HEIGHT, WIDTH, dtype=torch.bool)
        anchors = self.anchors(scenes["cells"][:, :ACTORS])
        actors = self.actor_embed.expand(count, -1, -1)  # (B, A, D)
        return self.decoder(maps, key_pos, padding, anchors, actors,
                            return_attention=return_attention)

    def maps(self, scenes):
        """(B, N, D): the cells' positions, and in the cells of actors and things what they are."""
        places = torch.arange(scenes["flags"].shape[2])
        actors = self.actor + self.flag[places, scenes["flags"]].sum(2)  # (B, A, K, D) -> (B, A, D)
        things = self.colour + self.kind[scenes["kinds"]]  # (B, J, D)
        found = torch.cat([actors, things], 1)  # (B, A + J, D)
        maps = self.position.repeat(len(found), 1, 1)
        return maps.scatter_add(1, scenes["cells"][..., None].expand_as(found), found)

    def anchors(self, cells):
        """Where the actors' cells (B, A) are: boxes (B, A, 4); for DETR's decoder, which has none,
        positions (B, A, D)."""
        if not hasattr(self.decoder, "anchors"):
            return self.position[cells]
        x = (cells % WIDTH + 0.5) / WIDTH  # (B, A)
        y = (cells // WIDTH + 0.5) / HEIGHT
        size = torch.tensor(ACTOR_SIZE).expand(*cells.shape, 2)
        return torch.cat([x[..., None], y[..., None], size], -1)


# --------------------------------------------------------------------------------------------------
# A run


def class_loss(prediction, labels):
    return F.binary_cross_entropy_with_logits(prediction["pred_logits"], labels)


def rate_of(step, steps):
    """A linear warm-up; the last tenth of the steps at a tenth."""
    rate = RATE * min(1.0, (step + 1) / WARM_UP)
    return rate / 10 if step >= steps - steps // 10 else rate


def learn(decoder_name, num_places, seed, steps):
    """One run, on one thread -> what runs.jsonl says of it. Seconds are the processor's."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = PlantedMaps(decoder_name, num_places)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=BETAS, fused=True)
    losses = []
    begun = process_time()
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = rate_of(step, steps)
        scenes = draw_scenes(BATCH, num_places, generator)
        predictions, _ = model(scenes)
        of_layers = [class_loss(prediction, scenes["labels"]) for prediction in predictions]
        optimizer.zero_grad()
        sum(of_layers).backward()
        optimizer.step()
        losses.append(of_layers[-1].item())
    seconds = process_time() - begun
    generator.manual_seed(TEST_SEED)
    testing = draw_scenes(TEST_SCENES, num_places, generator)
    precision, share = examine(model, testing)
    return {"decoder": decoder_name, "places": num_places, "seed": seed, "steps": steps,
            "mAP": precision, "share": share, "left": leaves(losses, without_looking(testing)[1]),
            "seconds": seconds}


@torch.no_grad()
def examine(model, scenes):
    """mAP on scenes, and the share of the attention of true labels that lies on their cause, the
    thing of their flag's colour: the last layer's, mean over heads, actors and labels."""
    model.eval()
    scores, shares = [], []
    for start in range(0, len(scenes["cells"]), BATCH):
        part = {name: value[start:start + BATCH] for name, value in scenes.items()}
        predictions, attention = model(part, return_attention=True)  # attention (B, A, C, H, W)
        scores.append(predictions[-1]["pred_logits"])
        cells = cause_cells(part).repeat_interleave(KINDS, 2)  # (B, A, K) -> (B, A, C)
        on_cause = attention.flatten(3).gather(3, cells[..., None])[..., 0]  # (B, A, C)
        shares.append(on_cause[part["labels"] == 1])
    model.train()
    return mean_precision(torch.cat(scores), scenes["labels"]), float(torch.cat(shares).mean())


def cause_cells(scenes):
    """The cell of the thing that each flag names, (B, A, K); any cell for an empty one."""
    of_things = F.pad(scenes["cells"][:, ACTORS:], (0, 1))  # (B, J + 1)
    return of_things.gather(1, scenes["flags"].flatten(1)).view_as(scenes["flags"])


def mean_precision(scores, labels):
    """Average precision of each class, its mean: scores and labels (B, A, C), any monotone
    scores."""
    scores, labels = scores.flatten(0, 1).numpy(), labels.flatten(0, 1).numpy()  # (B * A, C)
    precisions = []
    for score, label in zip(scores.T, labels.T):
        ranked = label[np.argsort(-score, kind="stable")]
        ranks = np.flatnonzero(ranked) + 1
        precisions.append(np.mean(np.arange(1, len(ranks) + 1) / ranks))
    return float(np.mean(precisions))


def without_looking(scenes):
    """mAP and loss of one who knows which flags are up and how many things are of each kind, but
    not which: what can be had without finding a place, the plateau."""
    kinds = F.one_hot(scenes["kinds"], KINDS).float().mean(1)  # (B, S)
    up = (scenes["flags"] < THINGS).float()  # (B, A, K)
    known = torch.einsum("bak,bs->baks", up, kinds).flatten(2)  # (B, A, C)
    loss = F.binary_cross_entropy(known, scenes["labels"])
    return mean_precision(known, scenes["labels"]), float(loss)


def leaves(losses, plateau, width=25):
    """The step after which no mean of `width` losses is above .95 of the plateau, or None."""
    means = np.convolve(losses, np.ones(width) / width, "valid")
    above = np.flatnonzero(means > 0.95 * plateau)
    if len(above) and above[-1] == len(means) - 1:
        return None
    return int(above[-1]) + width if len(above) else width


# --------------------------------------------------------------------------------------------------
# All runs


def read_runs(out):
    """{(decoder, places, seed, kind): a line of runs.jsonl}; kind "steps", or "time" for a run of
    the full decoder's time."""
    path = Path(out) / "runs.jsonl"
    runs = {}
    if not path.is_file():
        return runs
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            run = json.loads(line)
        except ValueError as error:
            raise SystemExit(f"{path}, line {number} is no run: delete the line, and its run is "
                             "made again") from error
        runs[run["decoder"], run["places"], run["seed"], run["kind"]] = run
    return runs


def missing(runs, seed, kind):
    """The arguments of `learn` for each run of a seed that is not done."""
    decoders = DECODERS if kind == "steps" else ONE_MAP
    jobs = []
    for places in NUM_PLACES:
        for decoder in decoders:
            if (decoder, places, seed, kind) in runs:
                continue
            steps = STEPS
            if kind == "time":
                of_full = runs[FULL, places, seed, "steps"]["seconds"]
                of_decoder = runs[decoder, places, seed, "steps"]["seconds"]
                steps = round(STEPS * of_full / of_decoder)
            jobs.append((decoder, places, seed, steps))
    return jobs


def run_all(out, seeds, processes):
    """All runs of the seeds that are not done, one seed after another, some runs side by side."""
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    for seed in seeds:
        for kind in ("steps", "time"):
            jobs = missing(read_runs(out), seed, kind)
            with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
                futures = [pool.submit(learn, *job) for job in jobs]
                bar = tqdm(as_completed(futures), f"seed {seed}, same {kind}", total=len(jobs))
                try:
                    for future in bar:
                        line = json.dumps({**future.result(), "kind": kind})
                        with open(out / "runs.jsonl", "a") as file:
                            file.write(line + "\n")
                except BaseException:  # Ctrl-C, or a run that failed: no more runs are begun
                    pool.shutdown(wait=False, cancel_futures=True)
                    for worker in active_children():
                        worker.terminate()
                    raise


# --------------------------------------------------------------------------------------------------
# What they say


def report(out, page, figure):
    """Writes the tables behind the mark in a page, what stands above it stays, and the figure."""
    runs = read_runs(out)
    if not runs:
        raise SystemExit(f"{out}/runs.jsonl holds no run: {page} stays as it is")
    seeds = sorted({run["seed"] for run in runs.values()})
    done = {(run["decoder"], run["kind"]) for run in runs.values()}
    rows = [(decoder, kind) for kind in ("steps", "time") for decoder in DECODERS]
    rows = [row for row in rows if row in done]
    lines = [MARK, "", f"In a cell: seeds {', '.join(map(str, seeds))}; – is a run not made."]
    for title, write in (
            ("mAP on fresh scenes", lambda run: f"{run['mAP']:.3f}"),
            ("share of true labels' attention on their cause", lambda run: f"{run['share']:.3f}"),
            ("step at which the loss leaves the plateau", lambda run: str(run["left"] or "never")),
            ("steps", lambda run: str(run["steps"])),
            ("seconds of one core", lambda run: f"{run['seconds']:.0f}")):
        header = [title, *(f"K = {places}" for places in NUM_PLACES)]
        lines += ["", "| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
        for row in rows:
            cells = [row_name(*row)]
            for places in NUM_PLACES:
                of_seeds = [runs.get((row[0], places, seed, row[1])) for seed in seeds]
                cells.append(" ".join(write(run) if run else "–" for run in of_seeds))
            lines.append("| " + " | ".join(cells) + " |")
    text = page.read_text() if page.is_file() else ""
    page.write_text(text.partition(MARK)[0] + "\n".join(lines) + "\n")
    draw_figure(runs, rows, figure)
    print(f"wrote {page} and {figure}")


def row_name(decoder, kind):
    return decoder if kind == "steps" else f"{decoder}, the time of {FULL}"


def draw_figure(runs, rows, path):
    """mAP and the share on the cause over K: a dot a run, a line through the means over seeds; in
    grey what one has who does not look, and the share of one who looks everywhere alike."""
    figure = Figure((9.5, 3.4), layout="constrained")
    for panel, value in zip(figure.subplots(1, 2), ("mAP", "share")):
        for decoder, kind in rows:
            points = {}
            for run in runs.values():
                if (run["decoder"], run["kind"]) == (decoder, kind):
                    points.setdefault(run["places"], []).append(run[value])
            colour = f"C{list(DECODERS).index(decoder)}"
            style = "-" if kind == "steps" else "--"
            places = sorted(points)
            means = [np.mean(points[number]) for number in places]
            panel.plot(places, means, colour, ls=style, label=row_name(decoder, kind))
            for number in places:
                panel.scatter([number] * len(points[number]), points[number], 8, colour)
        panel.set_xlabel("K: places that an actor's classes need")
        panel.set_xticks(NUM_PLACES)
    left, right = figure.axes
    left.axhline(WITHOUT_LOOKING, color="grey", lw=0.8)
    right.axhline(1 / (HEIGHT * WIDTH), color="grey", lw=0.8)
    left.set_title("mAP", fontsize=10)
    right.set_title("attention of true labels on their cause", fontsize=10)
    figure.legend(*left.get_legend_handles_labels(), loc="outside right center", fontsize=8)
    figure.savefig(path, dpi=110)
