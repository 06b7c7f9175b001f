"""backbone.py: normalisation, shapes of the maps, the ViT against plain formulas, recomputation,
graphs for torch.compile, published weights in each of their namings."""

import argparse
import math
import random
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import scipy.io
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from backbone import (CSN152, CSNNeck, ConvNeck, ConvStem, ViT, ViTBlock, ViTNeck, load_backbone,
                      normalise, open_checkpoint, read_weights, running_index_table, strip_prefixes)

# B clips, T frames, T' time steps, H, W cells, D channels


def small_vit(recompute=False):
    return ViT(frames=4, depth=2, width=24, num_heads=12, drop_path=0.0, recompute=recompute)


def short_csn(recompute=False):
    """ir-CSN-152 with one block a stage."""
    backbone = CSN152(recompute)
    for name in ("layer1", "layer2", "layer3", "layer4"):
        setattr(backbone, name, getattr(backbone, name)[:1])
    return backbone


# --------------------------------------------------------------------------------------------------
# Clips and maps

def test_normalise_takes_off_imagenets_mean_over_its_deviation_and_zeroes_padding():
    clips = torch.randint(0, 256, (2, 3, 4, 5, 7), dtype=torch.uint8)
    padding_mask = torch.zeros(2, 5, 7, dtype=torch.bool)
    padding_mask[1, 3:], padding_mask[1, :, 4:] = True, True
    ours = normalise(clips, padding_mask)
    assert ours.dtype == torch.float32 and ours.shape == clips.shape
    colours = clips.numpy().astype(np.float64) / 255
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    expected = (colours - mean[:, None, None, None]) / std[:, None, None, None]
    np.testing.assert_allclose(ours[0].numpy(), expected[0], atol=1e-6)
    np.testing.assert_allclose(ours[1, :, :, :3, :4].numpy(), expected[1, :, :, :3, :4], atol=1e-6)
    assert ours[1, :, :, 3:].abs().max() == 0 and ours[1, :, :, :, 4:].abs().max() == 0
    assert torch.equal(normalise(clips)[0], ours[0])


def test_vit_gives_four_maps_at_strides_4_8_16_32():
    features = ViT(frames=4, depth=1, width=48, num_heads=12, drop_path=0.0)(
        torch.randn(2, 3, 4, 64, 96))
    maps = ViTNeck(48, 16)(features)
    assert [tuple(x.shape) for x in maps] == [
        (2, 16, 2, 16, 24), (2, 16, 2, 8, 12), (2, 16, 2, 4, 6), (2, 16, 2, 2, 3)]


def test_a_side_that_16_does_not_divide_is_floored():
    assert small_vit()(torch.randn(1, 3, 4, 70, 90))[0].shape == (1, 24, 2, 4, 5)


def test_csn_halves_time_from_stage_two_and_keeps_the_last_stride():
    with torch.device("meta"):
        features = CSN152()(torch.empty(1, 3, 16, 64, 96))
        maps = CSNNeck(64)(features)
    assert [tuple(x.shape[1:]) for x in features] == [
        (512, 8, 8, 12), (1024, 4, 4, 6), (2048, 2, 4, 6)]
    assert [tuple(x.shape[1:]) for x in maps] == [
        (64, 8, 8, 12), (64, 4, 4, 6), (64, 2, 4, 6), (64, 2, 2, 3)]


def test_the_convolutional_stem_keeps_time():
    maps = ConvNeck(16)(ConvStem()(torch.randn(2, 3, 5, 64, 96)))
    assert [tuple(x.shape) for x in maps] == [(2, 16, 5, 8, 12), (2, 16, 5, 4, 6)]


# --------------------------------------------------------------------------------------------------
# The ViT

def test_the_position_table_against_its_formula():
    table = running_index_table(7, 10)
    for position in range(7):
        for channel in range(10):
            angle = position / 10000 ** (2 * (channel // 2) / 10)
            expected = math.sin(angle) if channel % 2 == 0 else math.cos(angle)
            assert table[position, channel] == pytest.approx(expected, abs=1e-6)


def test_the_position_table_is_resized_per_time_step_when_the_token_count_differs():
    vit = small_vit()
    assert torch.equal(vit.position_table(2, 14, 14), vit.positions)
    assert torch.equal(vit.position_table(2, 7, 28), vit.positions)  # as many tokens: as it is
    step = vit.positions[196:].T.reshape(1, 24, 14, 14)
    expected = F.interpolate(step, size=(3, 5), mode="bicubic", align_corners=False)
    expected = expected[0].flatten(1).T  # (15, 24)
    assert torch.allclose(vit.position_table(2, 3, 5)[15:], expected)
    with pytest.raises(ValueError, match="clip of 8 frames in a ViT built for 4"):
        vit.position_table(4, 14, 14)


def test_attention_against_plain_soft_max():
    block = ViTBlock(24, 3, 0.0)
    nn.init.normal_(block.q_bias)
    nn.init.normal_(block.v_bias)
    x = torch.randn(2, 5, 24)
    query, key, value = (x @ block.qkv.weight.T).split(24, dim=-1)
    query, value = query + block.q_bias, value + block.v_bias  # k has no bias
    expected = []
    for head in range(3):
        part = slice(8 * head, 8 * head + 8)
        weights = (query[..., part] @ key[..., part].transpose(1, 2) / math.sqrt(8)).softmax(-1)
        expected.append(weights @ value[..., part])
    expected = block.proj(torch.cat(expected, -1))
    assert torch.allclose(block.attention(x), expected, atol=1e-5)


def test_stochastic_depth_drops_whole_clips_and_keeps_the_mean():
    block = ViTBlock(24, 3, 0.25)
    kept = block.keep(torch.ones(4000, 2, 3))
    assert kept.unique().tolist() == pytest.approx([0.0, 1 / 0.75])
    assert torch.equal(kept, kept[:, :1, :1].expand_as(kept))
    assert kept.mean() == pytest.approx(1.0, abs=0.05)
    assert torch.equal(block.eval().keep(torch.ones(8, 2, 3)), torch.ones(8, 2, 3))


# --------------------------------------------------------------------------------------------------
# Recomputation, devices, graphs

@pytest.mark.parametrize("backbone, synchronised", [
    (small_vit, False), (short_csn, False), (short_csn, True)])
def test_recomputation_changes_no_gradient_and_moves_running_statistics_once(
        backbone, synchronised):
    plain, recomputed = backbone(), backbone(recompute=True)
    recomputed.load_state_dict(plain.state_dict())
    if synchronised:    # as train.py makes it for several GPUs
        recomputed = torch.nn.SyncBatchNorm.convert_sync_batchnorm(recomputed)
    clips = torch.randn(2, 3, 4, 32, 32)
    for module in (plain, recomputed):
        sum(x.square().mean() for x in module(clips)).backward()
    for (name, one), two in zip(plain.named_parameters(), recomputed.parameters()):
        torch.testing.assert_close(one.grad, two.grad, msg=name)
    for name, value in plain.state_dict().items():
        assert torch.equal(value, recomputed.state_dict()[name]), name


class OneDevice(TorchDispatchMode):
    """Fails at every operation that takes or makes a tensor on another device than `meta`."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves((args, kwargs, result)):
            if isinstance(tensor, torch.Tensor):
                assert tensor.device.type == "meta", f"{function} with a tensor of the host"
        return result


@pytest.mark.parametrize("backbone, neck", [
    (small_vit, lambda: ViTNeck(24, 16)), (short_csn, lambda: CSNNeck(32)),
    (ConvStem, lambda: ConvNeck(16))], ids=["vit", "csn", "conv"])
def test_nothing_is_made_on_the_host_and_copied(backbone, neck):
    with torch.device("meta"):
        backbone, neck = backbone(), neck()
        clips = torch.empty(2, 3, 4, 32, 48, dtype=torch.uint8)
        padding_mask = torch.empty(2, 32, 48, dtype=torch.bool)
    with OneDevice():
        neck(backbone(normalise(clips, padding_mask)))


@pytest.mark.parametrize("backbone, neck", [
    (small_vit, lambda: ViTNeck(24, 16)), (short_csn, lambda: CSNNeck(32)),
    (ConvStem, lambda: ConvNeck(16))], ids=["vit", "csn", "conv"])
def test_backbone_and_neck_are_one_graph_each(backbone, neck):
    backbone, neck = backbone().eval(), neck()
    clips = torch.randn(1, 3, 4, 32, 48)
    expected = neck(backbone(clips))
    torch._dynamo.reset()
    in_one = [torch.compile(module, backend="eager", fullgraph=True) for module in (backbone, neck)]
    for ours, plain in zip(in_one[1](in_one[0](clips)), expected):
        torch.testing.assert_close(ours, plain)


# --------------------------------------------------------------------------------------------------
# Published weights

def videomae_name(name):
    for part in ("qkv", "q_bias", "v_bias", "proj"):
        name = name.replace(f".{part}", f".attn.{part}")
    return name.replace(".fc", ".mlp.fc").replace("patch_embed.", "patch_embed.proj.")


def videomae_file(backbone, fine_tuned=True):
    """The ViT's tensors, drawn anew, as VideoMAE's own files name them, and what else they hold."""
    tensors = {videomae_name(name): torch.randn_like(value)
               for name, value in backbone.state_dict().items()}
    if not fine_tuned:
        named = {f"encoder.{name}": value for name, value in tensors.items()}
        return {**named, "decoder.norm.weight": torch.ones(3), "mask_token": torch.ones(1),
                "encoder_to_decoder.weight": torch.ones(2)}
    del tensors["norm.weight"], tensors["norm.bias"]
    return {**tensors, "fc_norm.weight": torch.ones(24), "fc_norm.bias": torch.ones(24),
            "head.weight": torch.ones(400, 24), "head.bias": torch.ones(400)}


def hugging_face_file(tensors):
    """A fine-tuned VideoMAE's under Hugging Face's names, query, key and value apart."""
    named = {}
    for name, value in tensors.items():
        for theirs, ours in [("blocks.", "videomae.encoder.layer."),
                             ("patch_embed.proj.",
                              "videomae.embeddings.patch_embeddings.projection."),
                             (".attn.proj.", ".attention.output.dense."),
                             (".attn.", ".attention.attention."),
                             (".mlp.fc1.", ".intermediate.dense."), (".mlp.fc2.", ".output.dense."),
                             (".norm1.", ".layernorm_before."), (".norm2.", ".layernorm_after."),
                             ("head.", "classifier.")]:
            name = name.replace(theirs, ours)
        if ".qkv." in name:
            for part, piece in zip(("query", "key", "value"), value.chunk(3)):
                named[name.replace("qkv", part)] = piece.contiguous()
        else:
            named[name] = value
    return named


def mmaction_file(tensors):
    """A fine-tuned VideoMAE's under mmaction2's names, with the table of positions it saves."""
    named = {"backbone.pos_embed": running_index_table(8 * 196, 24)[None]}
    for name, value in tensors.items():
        name = name.replace("patch_embed.proj.", "patch_embed.projection.")
        name = name.replace(".mlp.fc1.", ".mlp.layers.0.0.").replace(".mlp.fc2.", ".mlp.layers.1.")
        if name.startswith("head."):
            named[name.replace("head.", "cls_head.fc_cls.")] = value
        else:
            named[f"backbone.{name}"] = value
    return named


def assert_loaded(backbone, tensors, prefix=""):
    """All of VideoMAE's tensors are the backbone's; a file without the last norm left it alone."""
    for name, value in backbone.state_dict().items():
        expected = tensors.get(prefix + videomae_name(name))
        if expected is None:
            assert name.startswith("norm.")
            expected = torch.full_like(value, float(name == "norm.weight"))
        assert torch.equal(value, expected), name


@pytest.mark.parametrize("wrapping", ["module", "model", "state_dict", None])
@pytest.mark.parametrize("fine_tuned", [True, False])
def test_videomae_files_load(tmp_path, wrapping, fine_tuned):
    model = SimpleNamespace(backbone=small_vit())
    tensors = videomae_file(model.backbone, fine_tuned)
    content = {wrapping: tensors, "args": argparse.Namespace(lr=1)} if wrapping else tensors
    torch.save(content, tmp_path / "vit.pth")
    load_backbone(model, tmp_path / "vit.pth")
    assert_loaded(model.backbone, tensors, "" if fine_tuned else "encoder.")


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model.", "backbone.",
                                    "module._orig_mod.", "model.module.backbone."])
def test_prefixes_that_all_names_carry_are_taken_off(tmp_path, prefix):
    model = SimpleNamespace(backbone=small_vit())
    tensors = videomae_file(model.backbone)
    torch.save({prefix + name: value for name, value in tensors.items()}, tmp_path / "vit.pth")
    assert list(read_weights(tmp_path / "vit.pth")) == list(tensors)
    load_backbone(model, tmp_path / "vit.pth")
    assert_loaded(model.backbone, tensors)


def test_a_prefix_that_only_some_names_carry_stays():
    some = {"module.backbone.norm.weight": 1, "module.neck.0.weight": 2}
    assert strip_prefixes(some) == {"backbone.norm.weight": 1, "neck.0.weight": 2}
    assert strip_prefixes({"backbone.a": 1, "head.b": 2}) == {"backbone.a": 1, "head.b": 2}
    assert strip_prefixes({"encoder.a": 1, "encoder.b": 2}) == {"encoder.a": 1, "encoder.b": 2}
    for kept in ({}, {"module.a": 1, 3: 2}):
        assert strip_prefixes(kept) == kept


@pytest.mark.parametrize("naming, suffix", [(hugging_face_file, ".safetensors"),
                                            (hugging_face_file, ".bin"), (mmaction_file, ".pth")])
def test_other_libraries_files_load(tmp_path, naming, suffix):
    model = SimpleNamespace(backbone=small_vit())
    tensors = videomae_file(model.backbone)
    save = save_file if suffix == ".safetensors" else torch.save
    save(naming(tensors), tmp_path / f"vit{suffix}")
    load_backbone(model, tmp_path / f"vit{suffix}")
    assert_loaded(model.backbone, tensors)


def csn_file(backbone):
    """ir-CSN-152's tensors, drawn anew, in Caffe2's naming; savemat makes vectors (1, n)."""
    leaves = {"weight": "s", "bias": "b", "running_mean": "rm", "running_var": "riv"}
    first_block = {"layer1": 0, "layer2": 3, "layer3": 11, "layer4": 47}
    tensors = {}
    for name, value in backbone.state_dict().items():
        *path, leaf = name.split(".")
        if leaf == "num_batches_tracked":
            continue
        if path[0] == "conv1":
            key = "conv1_w"
        elif path[0] == "bn1":
            key = f"conv1_spatbn_relu_{leaves[leaf]}"
        else:
            block, part = first_block[path[0]] + int(path[1]), path[2]
            if part == "down_sample":
                end = "w" if path[3] == "0" else f"spatbn_{leaves[leaf]}"
                key = f"shortcut_projection_{block}_{end}"
            elif part.startswith("conv"):
                key = f"comp_{block}_conv_{part[-1]}_w"
            else:
                key = f"comp_{block}_spatbn_{part[-1]}_{leaves[leaf]}"
        values = np.random.RandomState(len(tensors)).standard_normal(value.shape)
        tensors[key] = values.astype(np.float32)
    return tensors


def test_csn_mat_files_load_also_into_a_model_without_the_last_stage(tmp_path):
    model = SimpleNamespace(backbone=CSN152())
    tensors = csn_file(model.backbone)
    head = {"last_out_L400_w": np.ones((400, 2048), np.float32)}
    scipy.io.savemat(tmp_path / "csn.mat", {**tensors, **head})
    for _ in range(2):
        load_backbone(model, tmp_path / "csn.mat")
        own = model.backbone.state_dict()
        for name, caffe2 in [
                ("conv1.weight", "conv1_w"), ("bn1.bias", "conv1_spatbn_relu_b"),
                ("layer2.7.bn4.running_mean", "comp_10_spatbn_4_rm"),
                ("layer3.0.down_sample.1.running_var", "shortcut_projection_11_spatbn_riv"),
                ("layer3.35.conv3.weight", "comp_46_conv_3_w")]:
            assert torch.equal(own[name], torch.from_numpy(tensors[caffe2])), name
        model.backbone = CSN152()
        model.backbone.layer4 = nn.Sequential()


@pytest.mark.parametrize("stages", [4, 3])
def test_a_half_precision_file_of_the_stems_own_names_loads(tmp_path, stages):
    tensors = {name: torch.randn(value.shape).half().contiguous()
               for name, value in ConvStem().state_dict().items() if value.dim() > 0}
    save_file(tensors, tmp_path / "stem.safetensors")
    model = SimpleNamespace(backbone=ConvStem())
    del model.backbone.stages[stages:]
    load_backbone(model, tmp_path / "stem.safetensors")
    for name, value in model.backbone.state_dict().items():
        if value.dim() > 0:
            assert value.dtype == torch.float32 and torch.equal(value, tensors[name].float()), name


# --------------------------------------------------------------------------------------------------
# A checkpoint as the authors' code saves it

def authors_checkpoint(monkeypatch):
    """The entries of the released code's save; its settings are a dict of yacs's own class."""
    yacs = ModuleType("yacs.config")

    class CfgNode(dict):
        def __init__(self, values):
            super().__init__(values)
            self.__dict__["__immutable__"] = True

    CfgNode.__module__, CfgNode.__qualname__ = "yacs.config", "CfgNode"
    yacs.CfgNode = CfgNode
    monkeypatch.setitem(sys.modules, "yacs", ModuleType("yacs"))
    monkeypatch.setitem(sys.modules, "yacs.config", yacs)
    layer = nn.Linear(2, 3)
    optimizer = torch.optim.AdamW(layer.parameters())
    layer(torch.ones(2)).sum().backward()
    optimizer.step()
    return {
        "model": {f"module.{name}": value for name, value in layer.state_dict().items()},
        "optimizer": optimizer.state_dict(),
        "lr_scheduler": torch.optim.lr_scheduler.MultiStepLR(optimizer, [16]).state_dict(),
        "max_accuracy": np.float64(0.859), "epoch": 17,
        "config": CfgNode({"CONFIG": CfgNode({"LR": 1e-4, "NAMES": ["a", "b"]}),
                           "DDP_CONFIG": CfgNode({"GPU": None, "DISTRIBUTED": True})}),
        "random_python": random.getstate(), "random_numpy": np.random.get_state(),
        "random_pytorch": torch.get_rng_state(), "random_cuda": [torch.get_rng_state()],
        "scaler": {"scale": 65536.0, "growth_factor": 2.0, "_growth_tracker": 3}}


@pytest.mark.parametrize("old_numpy", [False, True])
def test_a_checkpoint_as_the_authors_code_saves_it_opens_without_yacs(tmp_path, monkeypatch,
                                                                     old_numpy):
    path = tmp_path / "authors.pth"
    with monkeypatch.context() as patch:
        saved = authors_checkpoint(patch)
        torch.save(saved, path, _use_new_zipfile_serialization=not old_numpy)
    assert "yacs.config" not in sys.modules
    if old_numpy:  # the same file from a numpy before 2, in the format that has no offsets
        content = path.read_bytes()
        assert b"numpy._core.multiarray" in content
        path.write_bytes(content.replace(b"numpy._core.multiarray", b"numpy.core.multiarray"))
    opened = open_checkpoint(path)
    assert list(opened) == list(saved)
    assert torch.equal(opened["model"]["module.weight"], saved["model"]["module.weight"])
    assert opened["max_accuracy"] == 0.859 and opened["epoch"] == 17
    assert opened["config"] == {"CONFIG": {"LR": 1e-4, "NAMES": ["a", "b"]},
                                "DDP_CONFIG": {"GPU": None, "DISTRIBUTED": True}}
    assert opened["random_python"] == saved["random_python"]
    assert np.array_equal(opened["random_numpy"][1], saved["random_numpy"][1])
    assert torch.equal(opened["random_cuda"][0], saved["random_pytorch"])
    assert opened["scaler"] == saved["scaler"]
    assert list(read_weights(path)) == ["weight", "bias"]


def test_numbers_of_numpy_come_back_as_they_were(tmp_path):
    numbers = {np.dtype(kind).name: np.ones(1, kind)[0]
               for kind in ("?", "i1", "u1", "i2", "i4", "u4", "i8", "f2", "f4", "f8")}
    torch.save({"metrics": numbers, "array": np.arange(6, dtype="f4").reshape(2, 3)},
               tmp_path / "ours.pt")
    opened = open_checkpoint(tmp_path / "ours.pt")
    assert opened["metrics"] == numbers
    assert np.array_equal(opened["array"], np.arange(6).reshape(2, 3))
