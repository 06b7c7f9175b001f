"""Files of weights that are broken, foreign or hostile: refused with a reason, nothing executed,
the model untouched."""

import os
import pickle
import sys
from collections import Counter
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import scipy.io
import torch
from safetensors.torch import save_file

from backbone import (ConvStem, ViT, load_backbone, open_checkpoint, read_weights,
                      running_index_table)


def stem_model():
    return SimpleNamespace(backbone=ConvStem())


def stem_file(**changes):
    """The stem's tensors under its own names, `changes` (None: left out) applied, dots as __."""
    tensors = {name: torch.randn(value.shape) for name, value in ConvStem().state_dict().items()
               if value.dim() > 0}
    for name, value in changes.items():
        tensors[name.replace("__", ".")] = value
    return {name: value for name, value in tensors.items() if value is not None}


@pytest.mark.parametrize("changes, message", [
    ({"stages__0__0__weight": None}, "missing: stages.0.0.weight"),
    ({"stages__4__0__weight": torch.ones(2)}, "not a tensor of this backbone: stages.4.0.weight"),
    ({"neck__0__weight": torch.ones(2)}, "not a tensor of this backbone: neck.0.weight"),
    ({"stages__0__1__bias": torch.ones(17)}, r"stages.0.1.bias: shape \(17,\), expected \(16,\)"),
    ({"stages__0__1__bias": torch.ones(16, dtype=torch.int8)}, "int8, expected torch.float32"),
    ({"pos_embed": torch.ones(1, 4, 8)}, "not a tensor of this backbone: pos_embed")])
def test_tensors_that_do_not_fit_are_named_and_the_model_is_untouched(tmp_path, changes, message):
    model = stem_model()
    before = {name: value.clone() for name, value in model.backbone.state_dict().items()}
    torch.save(stem_file(**changes), tmp_path / "stem.pth")
    with pytest.raises(ValueError, match=f"stem.pth does not fit the backbone .*(\n|.)*{message}"):
        load_backbone(model, tmp_path / "stem.pth")
    for name, value in model.backbone.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_learned_positions_are_refused_where_the_fixed_ones_are_not(tmp_path):
    model = SimpleNamespace(backbone=ViT(4, depth=1, width=24, num_heads=12, drop_path=0.0))
    tensors = model.backbone.state_dict()
    torch.save({**tensors, "pos_embed": running_index_table(1568, 24)[None]}, tmp_path / "vit.pth")
    load_backbone(model, tmp_path / "vit.pth")
    for wrong in (torch.randn(1, 1568, 24), torch.randn(24)):
        torch.save({**tensors, "pos_embed": wrong}, tmp_path / "vit.pth")
        with pytest.raises(ValueError, match="not a tensor of this backbone: pos_embed"):
            load_backbone(model, tmp_path / "vit.pth")


def test_a_whole_model_is_no_backbone(tmp_path):
    tensors = {f"module.backbone.{name}": value for name, value in stem_file().items()}
    torch.save({"model": {**tensors, "module.neck.0.0.weight": torch.ones(2)}}, tmp_path / "all.pt")
    with pytest.raises(ValueError, match="all.pt does not fit the backbone"):
        load_backbone(stem_model(), tmp_path / "all.pt")


class Command:
    def __reduce__(self):
        return os.system, (f"touch {os.environ['EXECUTED']}",)


class Evaluated:
    def __reduce__(self):
        return eval, ("open(__import__('os').environ['EXECUTED'], 'w').close()",)


@pytest.mark.parametrize("hostile, name", [
    (Command(), f"{os.system.__module__}.system"), (Evaluated(), "eval"),
    (SimpleNamespace(), "types.SimpleNamespace")])
@pytest.mark.parametrize("save", ["zip", "legacy", "pickle"])
def test_what_a_file_would_execute_is_named_and_not_executed(tmp_path, monkeypatch, hostile, name,
                                                             save):
    monkeypatch.setenv("EXECUTED", str(tmp_path / "executed"))
    path, content = tmp_path / "hostile.pth", {"model": {"weight": torch.ones(2)}, "extra": hostile}
    if save == "pickle":
        path.write_bytes(pickle.dumps({"extra": hostile}, protocol=2))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=save == "zip")
    for read in (open_checkpoint, read_weights, lambda path: load_backbone(stem_model(), path)):
        with pytest.raises(ValueError, match=f"hostile.pth cannot be read .*it asks for .*{name}"):
            read(path)
    assert not (tmp_path / "executed").exists()


def test_of_yacs_only_the_class_of_settings_is_admitted_and_no_code_runs(tmp_path, monkeypatch):
    executed = []
    module = ModuleType("yacs.config")

    def define(name):
        def restore(self, state):
            executed.append(name)
        made = type(name, (dict,), {"__module__": "yacs.config", "__setstate__": restore,
                                    "__getstate__": lambda self: {"state": 1}})
        setattr(module, name, made)
        return made

    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "yacs", ModuleType("yacs"))
        patch.setitem(sys.modules, "yacs.config", module)
        torch.save({"config": define("CfgNode")(LR=1)}, tmp_path / "known.pth")
        torch.save({"config": define("Other")(LR=1)}, tmp_path / "other.pth")
        assert open_checkpoint(tmp_path / "known.pth")["config"] == {"LR": 1}
        with pytest.raises(ValueError, match="it asks for yacs.config.Other"):
            open_checkpoint(tmp_path / "other.pth")
    assert executed == []


def test_arrays_of_objects_are_refused(tmp_path):
    torch.save({"array": np.array([{}, None], dtype=object)}, tmp_path / "objects.pth")
    with pytest.raises(ValueError, match="objects.pth cannot be read"):
        open_checkpoint(tmp_path / "objects.pth")


def test_safe_names_do_not_stay_admitted_after_reading(tmp_path):
    admitted = Counter(map(str, torch.serialization.get_safe_globals()))
    torch.save({"weight": torch.ones(2)}, tmp_path / "plain.pth")
    open_checkpoint(tmp_path / "plain.pth")
    assert Counter(map(str, torch.serialization.get_safe_globals())) == admitted


@pytest.mark.parametrize("suffix", [".pth", ".safetensors", ".mat"])
@pytest.mark.parametrize("damage", ["truncated", "empty", "text"])
def test_damaged_files_are_named(tmp_path, suffix, damage):
    path = tmp_path / f"file{suffix}"
    if suffix == ".pth":
        torch.save(stem_file(), path)
    elif suffix == ".safetensors":
        save_file(stem_file(), path)
    else:
        scipy.io.savemat(path, {"conv1_w": np.ones((64, 300))})
    whole = path.read_bytes()
    content = {"truncated": whole[:len(whole) // 2], "empty": b"", "text": b"<!DOCTYPE html>" * 20}
    path.write_bytes(content[damage])
    with pytest.raises(ValueError, match=f"file{suffix} cannot be read as .*: .+"):
        read_weights(path)


def test_files_that_are_absent_or_folders_are_named(tmp_path):
    (tmp_path / "folder.pth").mkdir()
    for name in ("nowhere.pth", "nowhere.safetensors", "nowhere.mat", "folder.pth"):
        with pytest.raises(FileNotFoundError, match=f"{name}: no such file"):
            read_weights(tmp_path / name)


@pytest.mark.parametrize("content, message", [
    ([torch.ones(2)], "not a dict of tensors but list"), (torch.ones(2), "but Tensor"),
    ({"epoch": 3}, "'epoch' is of type int"), ({0: torch.ones(2)}, "0 is of type Tensor"),
    ({"model": {"weight": torch.ones(2), "step": "last"}}, "'step' is of type str")])
def test_what_is_no_dict_of_tensors_by_name_is_said(tmp_path, content, message):
    torch.save(content, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=f"other.pth: .*{message}"):
        read_weights(tmp_path / "other.pth")


def test_a_matlab_file_of_something_else_is_named(tmp_path):
    scipy.io.savemat(tmp_path / "text.mat", {"names": np.array(["a", "bc"], dtype=object)})
    with pytest.raises(ValueError, match="text.mat cannot be read as a Matlab file"):
        read_weights(tmp_path / "text.mat")
