"""backbone.py: shapes of the maps, the ViT's position table and attention, stochastic depth, recomputation."""
import argparse
import math
import os
import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.io
import torch
import torch.nn.functional as F

from backbone import (CSN152, CSNNeck, ConvNeck, ConvStem, ViT, ViTBlock, ViTNeck, load_backbone, read_weights,
                      running_index_table)


def test_vit_gives_four_maps_at_strides_4_8_16_32():
    maps = ViTNeck(48, 16)(ViT(frames=4, depth=1, width=48, num_heads=12, drop_path=0.0)(torch.randn(2, 3, 4, 64, 96)))
    assert [tuple(x.shape) for x in maps] == [(2, 16, 2, 16, 24), (2, 16, 2, 8, 12), (2, 16, 2, 4, 6), (2, 16, 2, 2, 3)]


def test_a_side_that_16_does_not_divide_is_floored():
    features = ViT(frames=4, depth=1, width=48, num_heads=12, drop_path=0.0)(torch.randn(1, 3, 4, 70, 90))
    assert features[0].shape == (1, 48, 2, 4, 5)


def test_csn_halves_time_from_stage_two_and_keeps_the_last_stride():
    with torch.device("meta"):
        features = CSN152()(torch.empty(1, 3, 16, 64, 96))
        maps = CSNNeck(64)(features)
    assert [tuple(x.shape[1:]) for x in features] == [(512, 8, 8, 12), (1024, 4, 4, 6), (2048, 2, 4, 6)]
    assert [tuple(x.shape[1:]) for x in maps] == [(64, 8, 8, 12), (64, 4, 4, 6), (64, 2, 4, 6), (64, 2, 2, 3)]


def test_the_convolutional_stem_keeps_time():
    maps = ConvNeck(16)(ConvStem()(torch.randn(2, 3, 5, 64, 96)))
    assert [tuple(x.shape) for x in maps] == [(2, 16, 5, 8, 12), (2, 16, 5, 4, 6)]


def test_the_position_table_against_its_formula():
    table = running_index_table(7, 10)
    for position in range(7):
        for channel in range(10):
            angle = position / 10000 ** (2 * (channel // 2) / 10)
            expected = math.sin(angle) if channel % 2 == 0 else math.cos(angle)
            assert table[position, channel] == pytest.approx(expected, abs=1e-6)


def test_the_position_table_is_resized_per_time_step_when_the_token_count_differs():
    vit = ViT(frames=4, depth=1, width=24, num_heads=12, drop_path=0.0)
    assert torch.equal(vit.position_table(2, 14, 14), vit.positions)
    assert torch.equal(vit.position_table(2, 7, 28), vit.positions)  # as many tokens: used as it is
    step = vit.positions[196:].T.reshape(1, 24, 14, 14)
    expected = F.interpolate(step, size=(3, 5), mode="bicubic", align_corners=False)[0].flatten(1).T
    assert torch.allclose(vit.position_table(2, 3, 5)[15:], expected)
    with pytest.raises(ValueError, match="clip of 8 frames in a ViT built for 4"):
        vit.position_table(4, 14, 14)


def test_attention_against_plain_soft_max():
    block = ViTBlock(24, 3, 0.0)
    torch.nn.init.normal_(block.q_bias), torch.nn.init.normal_(block.v_bias)
    x = torch.randn(2, 5, 24)
    query, key, value = (x @ block.qkv.weight.T).split(24, dim=-1)
    query, value = query + block.q_bias, value + block.v_bias  # k has no bias
    expected = []
    for head in range(3):
        part = slice(8 * head, 8 * head + 8)
        weights = (query[..., part] @ key[..., part].transpose(1, 2) / math.sqrt(8)).softmax(-1)
        expected.append(weights @ value[..., part])
    assert torch.allclose(block.attention(x), block.proj(torch.cat(expected, -1)), atol=1e-5)


def test_stochastic_depth_drops_whole_clips_and_keeps_the_mean():
    block = ViTBlock(24, 3, 0.25)
    kept = block.keep(torch.ones(4000, 2, 3))
    assert kept.unique().tolist() == pytest.approx([0.0, 1 / 0.75]) and torch.equal(kept, kept[:, :1, :1].expand_as(kept))
    assert kept.mean() == pytest.approx(1.0, abs=0.05)
    assert torch.equal(block.eval().keep(torch.ones(8, 2, 3)), torch.ones(8, 2, 3))


def vit_model():
    return SimpleNamespace(backbone=ViT(frames=4, depth=2, width=24, num_heads=12, drop_path=0.0))


def videomae_file(model, prefix="", fine_tuned=True):
    """The backbone's weights as VideoMAE's own files name them."""
    tensors = {}
    for name, value in model.backbone.state_dict().items():
        for part in ("qkv", "q_bias", "v_bias", "proj"):
            name = name.replace(f".{part}", f".attn.{part}")
        name = name.replace(".fc", ".mlp.fc").replace("patch_embed.", "patch_embed.proj.")
        if not (fine_tuned and name.startswith("norm.")):
            tensors[prefix + name] = torch.randn_like(value)
    if fine_tuned:
        tensors.update({"fc_norm.weight": torch.ones(24), "fc_norm.bias": torch.ones(24), "head.weight": torch.ones(400, 24),
                        "head.bias": torch.ones(400)})
    return tensors


def hugging_face_file(tensors):
    """The same under the names of the Hugging Face models, query, key and value apart."""
    named = {}
    for name, value in tensors.items():
        name = name.replace("blocks.", "videomae.encoder.layer.").replace("patch_embed.proj.", "videomae.embeddings.patch_embeddings.projection.")
        name = name.replace(".attn.proj.", ".attention.output.dense.").replace(".attn.", ".attention.attention.")
        name = name.replace(".mlp.fc1.", ".intermediate.dense.").replace(".mlp.fc2.", ".output.dense.")
        name = name.replace(".norm1.", ".layernorm_before.").replace(".norm2.", ".layernorm_after.").replace("head.", "classifier.")
        if ".qkv." in name:
            named.update({name.replace("qkv", part): piece for part, piece in zip(("query", "key", "value"), value.chunk(3))})
        else:
            named[name] = value
    return named


@pytest.mark.parametrize("wrapping", ["module", "model", None])
@pytest.mark.parametrize("prefix, fine_tuned", [("", True), ("encoder.", False)])
def test_videomae_files_load(tmp_path, wrapping, prefix, fine_tuned):
    model, path = vit_model(), tmp_path / "vit.pth"
    tensors = videomae_file(model, prefix, fine_tuned)
    extra = {} if fine_tuned else {"decoder.norm.weight": torch.ones(3), "mask_token": torch.ones(1), "encoder_to_decoder.weight": torch.ones(2)}
    content = {**tensors, **extra}
    torch.save({wrapping: content, "args": argparse.Namespace(lr=1)} if wrapping else content, path)
    load_backbone(model, path)
    assert torch.equal(model.backbone.blocks[1].qkv.weight, tensors[f"{prefix}blocks.1.attn.qkv.weight"])
    assert torch.equal(model.backbone.blocks[0].fc2.bias, tensors[f"{prefix}blocks.0.mlp.fc2.bias"])
    assert torch.equal(model.backbone.patch_embed.weight, tensors[f"{prefix}patch_embed.proj.weight"])
    assert torch.equal(model.backbone.norm.weight, torch.ones(24) if fine_tuned else tensors["encoder.norm.weight"])


def test_hugging_face_files_load(tmp_path):
    model = vit_model()
    tensors = videomae_file(model)
    torch.save(hugging_face_file(tensors), tmp_path / "pytorch_model.bin")
    load_backbone(model, tmp_path / "pytorch_model.bin")
    for name, leaf in [("attn.qkv.weight", "qkv.weight"), ("attn.q_bias", "q_bias"), ("attn.proj.weight", "proj.weight"),
                       ("mlp.fc1.bias", "fc1.bias"), ("norm2.weight", "norm2.weight")]:
        assert torch.equal(model.backbone.state_dict()[f"blocks.1.{leaf}"], tensors[f"blocks.1.{name}"])


def test_safetensors_files_load(tmp_path):
    from safetensors.torch import save_file
    model = vit_model()
    tensors = videomae_file(model)
    save_file({name: value.contiguous() for name, value in hugging_face_file(tensors).items()}, tmp_path / "model.safetensors")
    load_backbone(model, tmp_path / "model.safetensors")
    assert torch.equal(model.backbone.blocks[0].qkv.weight, tensors["blocks.0.attn.qkv.weight"])


def csn_file(backbone):
    """The backbone's weights in Caffe2's naming; vectors as Matlab keeps them, (1, n)."""
    leaves = {"weight": "s", "bias": "b", "running_mean": "rm", "running_var": "riv"}
    starts, tensors = {1: 0, 2: 3, 3: 11, 4: 47}, {}
    for name, value in backbone.state_dict().items():
        *path, leaf = name.split(".")
        if leaf == "num_batches_tracked":
            continue
        if path[0] == "conv1":
            key = "conv1_w"
        elif path[0] == "bn1":
            key = f"conv1_spatbn_relu_{leaves[leaf]}"
        else:
            block = starts[int(path[0][5:])] + int(path[1])
            if path[2] == "down_sample":
                key = f"shortcut_projection_{block}_" + ("w" if path[3] == "0" else f"spatbn_{leaves[leaf]}")
            else:
                key = f"comp_{block}_conv_{path[2][-1]}_w" if "conv" in path[2] else f"comp_{block}_spatbn_{path[2][-1]}_{leaves[leaf]}"
        tensors[key] = np.random.RandomState(len(tensors)).randn(*value.shape).astype(np.float32)
    return tensors


def test_csn_mat_files_load(tmp_path):
    model = SimpleNamespace(backbone=CSN152())
    tensors = csn_file(model.backbone)
    scipy.io.savemat(tmp_path / "csn.mat", {**tensors, "last_out_L400_w": np.ones((400, 2048), np.float32)})
    load_backbone(model, tmp_path / "csn.mat")
    own = model.backbone.state_dict()
    assert torch.equal(own["layer3.35.conv3.weight"], torch.from_numpy(tensors["comp_46_conv_3_w"]))
    assert torch.equal(own["layer4.0.down_sample.1.running_var"], torch.from_numpy(tensors["shortcut_projection_47_spatbn_riv"]))
    assert torch.equal(own["bn1.bias"], torch.from_numpy(tensors["conv1_spatbn_relu_b"]))


def test_files_that_do_not_fit_are_refused_and_leave_the_model_alone(tmp_path):
    model = vit_model()
    tensors = videomae_file(model)
    before = {name: value.clone() for name, value in model.backbone.state_dict().items()}
    wrong = {"missing.pth": {k: v for k, v in tensors.items() if k != "blocks.0.attn.q_bias"},
             "extra.pth": {**tensors, "blocks.2.norm1.weight": torch.ones(24)},
             "shape.pth": {**tensors, "blocks.0.norm1.weight": torch.ones(23)}}
    messages = {"missing.pth": "missing: blocks.0.q_bias", "extra.pth": "blocks.2.norm1.weight", "shape.pth": r"shape \(23,\)"}
    for name, content in wrong.items():
        torch.save(content, tmp_path / name)
        with pytest.raises(ValueError, match=messages[name]):
            load_backbone(model, tmp_path / name)
    torch.save(tensors, tmp_path / "whole.pth")
    (tmp_path / "truncated.pth").write_bytes((tmp_path / "whole.pth").read_bytes()[:2000])
    with pytest.raises(ValueError, match="truncated.pth cannot be read"):
        load_backbone(model, tmp_path / "truncated.pth")
    with pytest.raises(FileNotFoundError, match="nowhere.pth"):
        load_backbone(model, tmp_path / "nowhere.pth")
    assert all(torch.equal(value, before[name]) for name, value in model.backbone.state_dict().items())


class Command:
    def __reduce__(self):
        return os.system, ("touch " + os.environ["EXECUTED"],)


def test_a_pickle_with_code_in_it_is_refused_and_not_executed(tmp_path, monkeypatch):
    monkeypatch.setenv("EXECUTED", str(tmp_path / "executed"))
    torch.save({"module": {"weight": Command()}}, tmp_path / "code.pth")
    (tmp_path / "plain.pkl").write_bytes(pickle.dumps(Command()))
    for name in ("code.pth", "plain.pkl"):
        with pytest.raises(ValueError, match=f"{name} cannot be read"):
            read_weights(tmp_path / name)
    assert not (tmp_path / "executed").exists()
