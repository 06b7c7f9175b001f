"""The main claim: this model computes what the authors' released model computes.

Weights under the released names, drawn by the recipe in tests/golden/README.md, are loaded as a
released checkpoint; outputs are compared with those of the released code.
"""

import json
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from model import PRESETS, VideoActionDetector, load_released, scores

# B clips, T frames, T' time steps, A actors, C classes

GOLDEN = Path(__file__).parent / "golden"
LISTING = json.loads((GOLDEN / "ucf_tiny.json").read_text())
CONFIG = replace(PRESETS["ucf"], frames=16, encoder_layers=1, decoder_layers=2, vit_depth=1,
                 vit_width=192, num_queries=3, dim_feedforward=256)
TOLERANCE = 1e-4  # of an array's own standard deviation


def draw(name, shape, mean=0.0, std=1.0):
    seed = zlib.crc32(f"{LISTING['meta']['salt']}:{name}".encode())
    values = mean + std * np.random.RandomState(seed).standard_normal(shape)
    return torch.from_numpy(np.asarray(values, dtype=np.float32))


@pytest.fixture(scope="module")
def expected():
    return np.load(GOLDEN / "ucf_tiny.npz")


@pytest.fixture(scope="module")
def model():
    """The tiny model with a checkpoint as the authors' training code writes it."""
    tensors = {}
    for name, shape, mean, std, same_as in LISTING["tensors"]:
        tensors[f"module.{name}"] = draw(same_as or name, shape, mean, std)
    return load_released(VideoActionDetector(CONFIG).eval(), {"model": tensors, "epoch": 3})


def clip_and_padded_batch():
    """One clip (1, 3, T, H, W); two clips (2, 3, T, H, W) with the mask (2, H, W) of the padding
    beside the second."""
    frames, height, width = LISTING["meta"]["size"]
    small_height, small_width = LISTING["meta"]["size2"]
    clip = draw("clip", (3, frames, height, width))
    clips = torch.zeros(2, 3, frames, height, width)
    padding_mask = torch.ones(2, height, width, dtype=torch.bool)
    clips[0], padding_mask[0] = clip, False
    clips[1, :, :, :small_height, :small_width] = draw(
        "clip2", (3, frames, small_height, small_width))
    padding_mask[1, :small_height, :small_width] = False
    return clip[None], clips, padding_mask


def assert_close(ours, expected):
    assert ours.numel() == expected.size
    difference = np.abs(ours.numpy().reshape(expected.shape) - expected).max()
    assert difference < TOLERANCE * expected.std()


def assert_outputs_equal(out, expected, batch):
    """Both decoder layers' logits, boxes and confidences, and the last layer's class attention."""
    for prefix, layer in ((f"{batch}/aux0", out["aux_outputs"][0]), (batch, out)):
        assert_close(layer["pred_logits"], expected[f"{prefix}/pred_logits"])
        assert_close(layer["pred_boxes"], expected[f"{prefix}/pred_boxes"])
        three_way = torch.from_numpy(expected[f"{prefix}/pred_logits_b"])
        assert_close(layer["pred_conf"].sigmoid(), three_way.softmax(-1)[..., 1].numpy())
    attention = out["attention"].flatten(0, 1).flatten(3).transpose(0, 1)  # (A, B*T, C, H'*W')
    assert_close(attention, expected[f"{batch}/attention"])


def test_it_has_the_released_number_of_parameters(model):
    assert sum(p.numel() for p in model.parameters()) == LISTING["meta"]["params"]


@torch.no_grad()
def test_outputs_of_one_clip_equal_the_released_models(model, expected):
    clip, _, _ = clip_and_padded_batch()
    out = model(clip, return_attention=True)
    assert_outputs_equal(out, expected, "b1")
    assert_close(scores(out, CONFIG), expected["b1/scores"])


@torch.no_grad()
def test_multi_scale_maps_of_one_clip_equal_the_released_models(model, expected):
    clip, _, _ = clip_and_padded_batch()
    for level, x in enumerate(model.neck(model.backbone(clip))):  # (B, D, T', H_l, W_l)
        assert_close(x.mean(dim=1), expected[f"b1/map{level}_mean"])


@torch.no_grad()
def test_outputs_of_a_padded_batch_equal_the_released_models(model, expected):
    _, clips, padding_mask = clip_and_padded_batch()
    assert_outputs_equal(model(clips, padding_mask, return_attention=True), expected, "b2")
