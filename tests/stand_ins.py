"""A small model and a data set of random clips in place of the real ones, and runs on them.

`python tests/stand_ins.py ARGUMENTS` is train.py with them, for tests that need processes.
"""

import json
import math
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import train                                                                        # noqa: E402
from beside import runs                                                             # noqa: E402

# B clips, T frames, A actor queries, N actors of a clip, C classes

SMALL = (
    "num_classes=3 frames=4 num_queries=4 train_frames=0 batch_size=4 micro_batch=4 epochs=2 "
    "clips_per_epoch=0 eval_every=1 warmup_epochs=0.5 lr=1e-2 backbone_lr=1e-3 "
    "deep_supervision=True dropout=0.0").split()
FILE = Path(__file__).resolve()
WHITE = 255             # a clip of nothing else makes the model's outputs NaN


class StandIn(nn.Module):
    """The contract of VideoActionDetector, from the mean colour of each frame; with what trips a
    training loop: a frozen parameter, dropout, and batch statistics if config.conv_blocks is 2."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        width = 8
        self.backbone = nn.Linear(3, width)
        self.norm = nn.Identity()
        if config.conv_blocks == 2:
            self.norm = nn.BatchNorm1d(width)
        self.dropout = nn.Dropout(config.dropout)
        outputs = config.num_queries * (5 + config.num_classes)
        self.decoder = nn.ModuleList(nn.Linear(width, outputs) for _ in range(2))
        self.unused = nn.Parameter(torch.ones(3), requires_grad=False)

    def forward(self, clips, padding_mask=None, return_attention=False, frames=None):
        assert clips.dtype == torch.uint8
        if frames is not None:
            clips = clips[:, :, frames]
        colours = clips.float().mean(dim=(3, 4)).transpose(1, 2)                    # (B, T, 3)
        colours = colours.masked_fill(colours == WHITE, math.nan)
        x = self.backbone((colours - 128) / 20)                                     # (B, T, width)
        x = self.dropout(torch.tanh(self.norm(x.flatten(0, 1)).view_as(x)))
        layers = []
        for layer in self.decoder:
            y = layer(x).unflatten(-1, (self.config.num_queries, -1))           # (B, T, A, 5 + C)
            layers.append({"pred_boxes": y[..., :4].sigmoid(), "pred_conf": y[..., 4],
                           "pred_logits": y[..., 5:]})
        return {**layers[-1], "aux_outputs": layers[:-1]}


class Clips:
    """Ten clips with 0 to 5 actors, drawn from their index; in training with noise for an
    augmentation. In the environment: SPOILT, indices of clips that are white; DELAY in seconds."""

    def __init__(self, name, root, side, config, fold=1, missing="error", fill=0):
        self.name = name
        self.config = config
        self.augment = side == "train"
        self.class_names = ["a", "b", "c"]
        self.class_groups = {"first": [0], "others": [1, 2]}
        prefix = side if name == "synthetic" else "video"
        self.videos = [f"{prefix}{index}" for index in range(10)]
        self.clip_videos = list(range(10))

    def __len__(self):
        return len(self.videos)

    def __getitem__(self, index):
        time.sleep(float(os.environ.get("DELAY", 0)))
        generator = np.random.default_rng(index)
        frames = self.config.frames
        actors = index % 6
        clip = torch.from_numpy(generator.integers(60, 200, (3, frames, 2, 2))).byte()
        if self.augment:
            clip = clip + torch.randint(10, (3, 1, 1, 1)).byte()
            if str(index) in os.environ.get("SPOILT", "").split():
                clip = torch.full_like(clip, WHITE)
        boxes = torch.from_numpy(generator.random((actors, frames, 4)) * 0.3 + 0.3).float()
        return clip, {
            "boxes": boxes, "present": torch.from_numpy(generator.random((actors, frames)) < 0.8),
            "labels": torch.from_numpy(generator.random((actors, frames, 3)) < 0.5).float(),
            "frames": torch.ones(frames, dtype=torch.bool), "video": self.videos[index],
            "video_index": index, "frame_ids": torch.arange(1, frames + 1),
            "size": torch.tensor([100, 200])}

    def ground_truth(self):
        video = np.arange(10)
        boxes = np.tile([50.0, 25.0, 150.0, 75.0], (10, 1))
        frames = {"video": video, "frame": np.ones(10, np.int64), "label": video % 3, "box": boxes}
        tubes = []
        for index in range(10):
            tubes.append({"video": index, "label": index % 3, "score": 1.0,
                          "frames": np.arange(1, 5), "boxes": np.tile(boxes[:1], (4, 1))})
        return frames, tubes


def no_sheet(model, dataset, config, path, device):
    Path(path).write_bytes(b"")


def no_curves(lines, history, parts, path):
    Path(path).write_bytes(b"")


def put_in(replace):
    """replace(module, name, value) puts the stand-ins in; drawing takes longer than such a run."""
    replace(train, "VideoActionDetector", StandIn)
    replace(train, "build_dataset", Clips)
    replace(train.visualize, "attention_sheet", no_sheet)
    replace(runs.visualize, "training_curves", no_curves)
    replace(runs, "STEM", Path("nowhere"))


def run(out, *arguments, settings=()):
    """train.main in this process -> the contents of last.pt."""
    train.main(["--out", str(out), *arguments, "--set", *SMALL, *settings])
    return last(out)


def last(out):
    return torch.load(Path(out) / "last.pt", weights_only=True)


def log(out):
    return [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()]


def assert_equal_weights(first, second, tolerance=0.0):
    assert first["model"].keys() == second["model"].keys()
    for name, value in first["model"].items():
        torch.testing.assert_close(second["model"][name], value, rtol=0, atol=tolerance)


def assert_same_state(first, second):
    """Weights and the optimizer's moments bit for bit."""
    assert_equal_weights(first, second)
    for number, moments in first["optimizer"]["state"].items():
        for name, value in moments.items():
            assert torch.equal(second["optimizer"]["state"][number][name], value), (number, name)


class Counted(train.DistributedDataParallel):
    """Says each time that gradients are exchanged: once in a backward pass, the model is small."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.register_comm_hook(None, self.exchange)

    @staticmethod
    def exchange(_, bucket):
        print("gradients exchanged", flush=True)
        return allreduce_hook(None, bucket)


if __name__ == "__main__":
    put_in(setattr)
    if "COUNT_EXCHANGES" in os.environ:
        train.DistributedDataParallel = Counted
    train.main()
