"""beside/small.py: positions and start of the small model."""
import math
from dataclasses import replace

import torch

from beside.small import anchors_around, by_place, frequencies, key_table, map_table
from model import PRESETS, VideoActionDetector


def test_frequencies_go_from_two_cycles_an_image_to_a_tenth():
    values = frequencies(8)
    assert torch.allclose(values[[0, 1, 6, 7]], torch.tensor([2.0, 2.0, 0.1, 0.1]))
    padding = torch.zeros(1, 1, 4, 8, dtype=torch.bool)
    table = key_table(16)(padding)[0, 0]  # (4, 8, 16): 8 channels for h, 8 for w
    row, column = 2 * math.pi * 2.5 / 4 * 2, 2 * math.pi * 3.5 / 8 * 0.1  # angles
    assert torch.allclose(table[2, :, 0], torch.tensor(math.sin(row)), atol=1e-5)
    assert torch.allclose(table[:, 3, 15], torch.tensor(math.cos(column)), atol=1e-5)
    assert map_table(16)(padding).shape == (1, 1, 4, 8, 16)


def test_by_place_gives_every_head_both_axes_and_finds_the_own_place():
    strengths = torch.tensor([2, 5 / 3, 4 / 3, 1])
    weight = by_place(strengths, 64)  # (M, D/M, D)
    assert torch.equal(weight.amax((1, 2)), strengths)
    for head in range(4):
        channels = weight[head].sum(0).nonzero()[:, 0]
        assert (channels < 32).sum() == 8 == (channels >= 32).sum(), "eight of y, eight of x"
    table = key_table(64)(torch.zeros(1, 1, 6, 9, dtype=torch.bool))[0, 0].flatten(0, 1)  # (54, 64)
    projected = torch.einsum("mkd,nd->mnk", weight, table)
    logits = projected @ projected.transpose(1, 2)  # (M, 54, 54)
    assert torch.equal(logits.argmax(-1), torch.arange(54).expand(4, -1))


def test_half_of_the_class_heads_start_at_the_actor_and_the_last_layers_others_away_from_it():
    torch.manual_seed(1)
    model = VideoActionDetector(PRESETS["synthetic"]).eval()
    with torch.no_grad():
        out = model(torch.randn(1, 3, 8, 64, 96), return_attention="heads")
    height, width = out["attention"].shape[-2:]
    centre = out["pred_boxes"][0, 0, :, :2]  # (A, 2)
    rows = ((torch.arange(height) + 0.5) / height)[:, None]
    columns = ((torch.arange(width) + 0.5) / width)[None]
    times_area = [[], []]  # of the first layer and the last
    for actor, (x, y) in enumerate(centre):
        near = ((columns - x).abs() < 0.2) & ((rows - y).abs() < 0.3)
        for number, predictions in enumerate((out["aux_outputs"][0], out)):
            maps = predictions["attention"][0, 0, actor]  # (C, M, H, W)
            share = maps[..., near].sum(-1).mean(0)  # (M,) of the classes
            times_area[number].append(share / near.float().mean())
    first, last = (torch.stack(of_layer) for of_layer in times_area)  # (A, M): 1 is unbound
    close = torch.cat([first[:, :2], last[:, :2]], 1)  # (A, 4)
    loose = first[:, 2:]  # (A, 2)
    away = last[:, 2:]  # (A, 2)
    assert (close > 1.5).all() and (close.mean(0) > 2).all()
    assert (loose.mean(0) > 0.8).all() and (loose.mean(0) < 1.4).all()
    assert (away.mean(0) < 0.75).all()


def test_what_is_of_the_class_is_doubled_in_the_queries_of_the_class_heads_alone():
    torch.manual_seed(0)
    model = VideoActionDetector(PRESETS["synthetic"])
    strengths_of_layers = [[2, 2, 0.5, 0.5], [2, 2, -1, -1]]  # negative: away from the actor
    for layer, of_heads in zip(model.decoder.classifying, strengths_of_layers, strict=True):
        query, key = (weight.view(4, 32, 128) for weight in (layer.query.weight, layer.key.weight))
        bound = (6 / 128) ** 0.5  # Xavier's of 64 channels to 64
        assert 1.8 * bound < query[:, :16, :64].abs().max() <= 2.001 * bound
        assert 0.9 * bound < key[:, :16, :64].abs().max() <= 1.001 * bound
        strengths = torch.tensor(of_heads)  # (M,)
        assert torch.equal(query[:, 16:].sum((1, 2)) / 16, strengths)
        sign = strengths.sign()[:, None, None]
        assert torch.equal(query[:, 16:], sign * key[:, 16:]), "the keys' place, negated for away"
    without_places = VideoActionDetector(replace(PRESETS["synthetic"], class_position=False))
    for layer in without_places.decoder.classifying:
        largest, of_keys = layer.query.weight.abs().max(), layer.key.weight.abs().max()
        assert largest > 1.9 * of_keys


def test_the_small_encoder_first_samples_half_as_far_as_the_papers():
    near, far = (VideoActionDetector(replace(PRESETS["synthetic"], initialisation=start))
                 for start in ("small", "paper"))
    offsets = [model.encoder.layers[0].sampling_offsets.bias for model in (near, far)]
    assert torch.equal(2 * offsets[0], offsets[1]) and offsets[1].max() == 2


def test_an_ordinary_transformer_encoder_has_no_offsets_and_starts_all_the_same():
    model = VideoActionDetector(replace(PRESETS["synthetic"], encoder="transformer"))
    assert not any("sampling_offsets" in name for name, _ in model.named_parameters())
    assert torch.equal(model.decoder.class_norm.bias, torch.full((64,), -2.0))


def test_anchors_are_inside_and_apart():
    boxes = anchors_around(5)
    assert boxes.shape == (5, 4) and (boxes > 0).all() and (boxes < 1).all()
    assert torch.pdist(boxes[:, :2]).min() > 0.2


def test_the_small_start_serves_every_switch():
    for changes in (dict(decoder="ldl"), dict(decoder="detr"), dict(class_position=False),
                    dict(decoder_layers=1), dict(quirks=("split_heads", "bare_output")),
                    dict(encoder="transformer"), dict(aggregation="mean"), dict(combine="concat"),
                    dict(combine="cross-attention"), dict(combine="self-attention"),
                    dict(dim=48, num_heads=3)):
        config = replace(PRESETS["synthetic"], **changes)
        with torch.no_grad():
            out = VideoActionDetector(config).eval()(torch.randn(1, 3, 8, 64, 96))
        assert out["pred_logits"].isfinite().all()
