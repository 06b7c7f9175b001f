"""The model on a GPU that is not there: devices, dtypes under CUDA's autocast lists, and values
that are waited for. And what recomputation saves, counted on the CPU.

Tensors of device "cuda" are fake here (torch's FakeTensorMode: shape, dtype and device, no
content), tensors of the CPU are real. So whatever the program works out on the CPU is right, and
where it mixes devices, copies from one to the other, or needs a value that only the GPU knows,
`FakeGPU` notes the line. A build of torch without CUDA lacks a device guard, the object that torch
asks for the current device: it gets torch's own no-op guard, compiled from one line of C++.

All of this patches torch for good, so these tests run in other processes, which
test_in_processes_of_their_own starts. A backward pass does not run on fake tensors.
"""

# B clips, T frames, H, W pixels, A actor queries, C classes, N actors of a clip

import ctypes
import functools
import os
import re
import shutil
import subprocess
import sys
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException, DynamicOutputShapeException, FakeTensor, FakeTensorMode)
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_map_only

import evaluate
import train
import visualize
from model import PRESETS, QUIRKS, VideoActionDetector, override, scores
from objective import detection_loss

ROOT = Path(__file__).parents[1]
GUARD = os.environ.get("FAKE_GPU_GUARD")    # in the other processes: its file, "none" if not needed
GUARD_SOURCE = """#include <c10/core/impl/DeviceGuardImplInterface.h>
namespace c10::impl { C10_REGISTER_GUARD_IMPL(CUDA, NoOpDeviceGuardImpl<DeviceType::CUDA>) }"""
fake = pytest.mark.skipif(GUARD is None, reason="runs in test_in_processes_of_their_own")
real = pytest.mark.skipif(GUARD is not None, reason="needs no fake GPU")
DTYPES = {"float32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
# Fake tensors cost the same at any size; what costs is the number of operations.
SMALL = dict(vit_depth=1, encoder_layers=2, decoder_layers=2, conv_blocks=1)
SWITCHES = (
    "encoder=transformer", "decoder=ldl", "decoder=detr", "aggregation=weighted",
    "aggregation=mean", "class_position=False", "combine=concat", "combine=cross-attention",
    "combine=self-attention")


# ---- the processes ------------------------------------------------------------------------------

def build_guard(folder):
    """The guard's file, compiled in `folder`; a skip that says what is absent."""
    if torch.version.cuda is not None:      # FakeTensorMode replaces the guard that it has
        return "none"
    compiler = shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++")
    include = Path(torch.__file__).parent / "include"
    if compiler is None:
        pytest.skip("no C++ compiler: fake CUDA tensors need a device guard, compiled for torch")
    if not (include / "c10/core/impl/DeviceGuardImplInterface.h").is_file():
        pytest.skip(f"no C++ headers in {include}: fake CUDA tensors need a device guard")
    source, library = folder / "guard.cpp", folder / "guard.so"
    source.write_text(GUARD_SOURCE)
    subprocess.run([compiler, "-std=c++20", "-shared", "-fPIC", f"-I{include}", source,
                    "-o", library, f"-L{include.parent / 'lib'}", "-lc10"], check=True)
    return str(library)


@real
def test_in_processes_of_their_own(tmp_path):
    guard = build_guard(tmp_path)
    environment = dict(os.environ, FAKE_GPU_GUARD=guard, CUDA_VISIBLE_DEVICES="")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k"]
    started = []
    for part in ("presets", "not presets"):     # side by side: two cores, half of the tests each
        started.append(subprocess.Popen([*command, part], cwd=ROOT, env=environment, text=True,
                                        stdout=subprocess.PIPE, stderr=subprocess.STDOUT))
    outputs = [process.communicate()[0] for process in started]
    for process, output in zip(started, outputs):
        assert process.returncode == 0, output[-20000:]
    passed = sum(int(re.search(r"(\d+) passed", output)[1]) for output in outputs)
    assert passed >= 36, outputs


if GUARD is not None:
    if GUARD != "none":
        ctypes.CDLL(GUARD)
    torch.cuda.amp.common.amp_definitely_not_available = lambda: False
    torch.cuda.is_bf16_supported = lambda including_emulation=True: True
    FAKE = FakeTensorMode(allow_non_fake_inputs=True)   # one for all tests: constants may be kept


# ---- the GPU ------------------------------------------------------------------------------------

def caller():
    """file:line of the program that is being run."""
    frame = sys._getframe(1)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(ROOT) and path != Path(__file__):
            return f"{path.relative_to(ROOT)}:{frame.f_lineno}"
        frame = frame.f_back
    return "the test"


def tensors_in(values):
    """The tensors among an operation's arguments or results, which may be in lists."""
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from tensors_in(value)


class FakeGPU(TorchDispatchMode):
    """CPU tensors are computed with, CUDA tensors are fake. Inside FAKE; notes each place where the
    two meet.

    mixed: an operation with tensors of both. upload, download: a copy to, or from, the GPU (a
    number that joins an operation as a CPU tensor is an upload). wait: an operation whose course
    depends on values that the GPU has (a condition, nonzero, a boolean index); it goes on with
    values made up. `sampled` has the dtypes that the deformable sampling was called with.
    """

    def __init__(self):
        super().__init__()
        self.notes, self.sampled = [], []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is torch.ops.prim.device.default:   # .device of a fake tensor
            return args[0].fake_device
        if function is torch.ops.deform3d.sample.default:
            self.sampled.append([tensor.dtype for tensor in tensors_in(args)])
        if function._can_decompose():       # in inference mode such a one comes before its parts
            with self:
                return function.decompose(*args, **kwargs)
        tensors = list(tensors_in([*args, *kwargs.values()]))
        on_gpu = [tensor for tensor in tensors if isinstance(tensor, FakeTensor)]
        on_cpu = [tensor for tensor in tensors if not isinstance(tensor, FakeTensor)]
        target = None
        if kwargs.get("device") is not None:
            target = torch.device(kwargs["device"]).type
        if not on_gpu and target in (None, "cpu"):
            with _disable_current_modes():
                return function(*args, **kwargs)
        if target == "cpu":
            return self.made_up("download", function, args, kwargs)
        if on_cpu and (not on_gpu or all(tensor.dim() == 0 for tensor in on_cpu)):
            self.note("upload", function)
        elif on_cpu:
            self.note("mixed", function)
        try:
            return function(*args, **kwargs)
        except (DataDependentOutputException, DynamicOutputShapeException):
            result = self.made_up("wait", function, args, kwargs)
            return tree_map_only(torch.Tensor, lambda x: torch.empty_like(x, device="cuda"), result)

    def note(self, kind, function):
        self.notes.append(f"{kind}: {function} at {caller()}")

    def made_up(self, kind, function, args, kwargs):
        """The function of real CPU tensors, True or 0, in place of fake ones."""
        def content(tensor):
            return torch.full(tensor.shape, tensor.dtype == torch.bool, dtype=tensor.dtype)

        self.note(kind, function)
        with _disable_current_modes():
            args, kwargs = tree_map_only(FakeTensor, content, (args, kwargs))
            return function(*args, **kwargs)


def on_fake_gpu(model):
    """The model with its parameters and buffers in fake CUDA tensors: what .to("cuda") does, which
    a build without CUDA refuses. Tensors that are neither stay where they are, as they do there."""
    def moved(tensor):
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cuda")

    with FAKE:
        for module in model.modules():
            for name, value in module._parameters.items():
                if value is not None:
                    module._parameters[name] = nn.Parameter(moved(value), value.requires_grad)
            for name, value in module._buffers.items():
                if value is not None:
                    module._buffers[name] = moved(value)
    return model


@functools.cache
def built(preset, *changes):
    """A preset, smaller, on the fake GPU -> (model, Config)."""
    usual = PRESETS[preset]
    small = {name: min(size, getattr(usual, name)) for name, size in SMALL.items()}
    config = override(replace(usual, **small), changes)
    return on_fake_gpu(VideoActionDetector(config)), config


def made_up_targets(batch, frames, config):
    """Two actors a clip, the second in the first frame only; of the last clip all frames but the
    first are temporal padding."""
    target = {
        "boxes": torch.tensor([0.5, 0.5, 0.2, 0.4]).expand(2, frames, 4),
        "labels": torch.eye(config.num_classes)[:2, None].expand(2, frames, -1),    # (N, T, C)
        "present": torch.ones(2, frames, dtype=torch.bool), "size": torch.tensor([60, 90]),
        "frames": torch.ones(frames, dtype=torch.bool), "video": "noise", "video_index": 0,
        "frame_ids": torch.arange(1, frames + 1)}
    target["present"][1, 1:] = False
    last = {**target, "frames": target["frames"].clone()}
    last["frames"][1:] = False
    return [target] * (batch - 1) + [last]


def run(model, config, training, precision, padded, **options):
    """One forward pass of two clips -> the outputs, and the FakeGPU with its notes."""
    model.train(training)
    dtype = DTYPES[precision]
    with FAKE, FakeGPU() as gpu, torch.inference_mode(not training):
        clips = torch.empty(2, 3, config.frames, 80, 96, dtype=torch.uint8, device="cuda")
        mask = torch.zeros(2, 80, 96, dtype=torch.bool, device="cuda") if padded else None
        with torch.autocast("cuda", dtype, enabled=dtype is not None):
            out = model(clips, mask, **options)
        for layer in (out, *out["aux_outputs"]):
            for name in ("pred_boxes", "pred_conf", "pred_logits"):
                assert layer[name].dtype == torch.float32, name
                assert layer[name].device.type == "cuda", name
        assert scores(out, config).dtype == torch.float32
    return out, gpu


def check(model, config, training, precision, padded, **options):
    """A forward pass mixes no devices, copies nothing to or from the GPU, and waits for nothing.

    What a first pass copies may be kept: a table for a size and device. Then a second pass copies
    nothing.
    """
    out, gpu = run(model, config, training, precision, padded, **options)
    if any(note.startswith("upload") for note in gpu.notes):
        out, gpu = run(model, config, training, precision, padded, **options)
    assert not gpu.notes, "\n".join(sorted(set(gpu.notes)))
    return out


def check_loss(out, config, num_frames):
    """The loss of a pass, in float32; the GPU is waited for once, for the costs of the matching."""
    with FAKE, FakeGPU() as gpu:
        loss, parts = detection_loss(out, made_up_targets(2, num_frames, config), config)
    assert {loss.dtype, *(part.dtype for part in parts.values())} == {torch.float32}
    assert loss.device.type == "cuda" and loss.requires_grad
    waits = [note for note in gpu.notes if not note.startswith("upload")]
    assert len(waits) == 1 and waits[0].startswith("download"), waits


PASSES = [(preset, *how) for preset in PRESETS for how in (("bf16", True), ("float32", False))]
PASSES += [(preset, *how) for preset in ("ucf", "synthetic")
           for how in (("bf16", False), ("fp16", True))]


@fake
@pytest.mark.parametrize("preset, precision, padded", PASSES)
def test_presets(preset, precision, padded):
    model, config = built(preset, "frames=8" if preset == "ava_csn152" else "frames=4")
    check(model, config, False, precision, padded)
    num_frames = 1 if config.key_frame else config.frames
    check_loss(check(model, config, True, precision, padded), config, num_frames)


@fake
@pytest.mark.parametrize("switch", SWITCHES)
def test_switches_of_the_tables(switch):
    model, config = built("synthetic", switch)
    check(model, config, False, "float32", False)
    check(model, config, False, "bf16", True)
    check_loss(check(model, config, True, "fp16", False), config, 8)
    check_loss(check(model, config, True, "bf16", True, frames=[0, 7]), config, 2)


ALL_BUT_ONE = [f"quirks={','.join(set(QUIRKS) - {quirk})}" for quirk in QUIRKS]


@fake
@pytest.mark.parametrize("change", [*ALL_BUT_ONE, "quirks="])
def test_quirks_of_the_released_model(change):
    model, config = built("ucf", "frames=4", "encoder_layers=1", change)
    check(model, config, False, "bf16", True)
    check_loss(check(model, config, True, "bf16", False, frames=[0, 3]), config, 2)


@fake
def test_attention_maps_and_recomputation():
    model, config = built("ucf", "frames=4", "checkpoint_backbone=True", "checkpoint_encoder=True",
                          "checkpoint_classifier=True")
    check_loss(check(model, config, True, "bf16", True), config, 4)
    for asked in (True, "heads"):
        out = check(model, config, False, "bf16", True, return_attention=asked)
        assert out["attention"].device.type == "cuda"
        assert out["attention"].shape[:4] == (2, 4, config.num_queries, config.num_classes)


@fake
def test_dtypes_that_the_kernel_is_called_with():
    """Those that test_deform3d_triton.py compiles it for and tools/benchmark.py times it with."""
    model, config = built("ucf", "frames=4")
    _, gpu = run(model, config, True, "bf16", False)
    low, high = torch.bfloat16, torch.float32
    assert gpu.sampled == [[low, high, high, low, high]] * config.encoder_layers, \
        "value, references, offsets, logits, scales"


@fake
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_training_run_reaches_its_end(precision, tmp_path, monkeypatch):
    """From the first step to the pictures, a short evaluation in it; only the backward pass is left
    out: every gradient is zero."""
    models = []

    def move(model, device):
        models.append(on_fake_gpu(model))
        return model

    def backward(loss):
        assert loss.requires_grad
        for parameter in models[0].parameters():
            if parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter)

    monkeypatch.setattr(VideoActionDetector, "to", move)
    monkeypatch.setattr(torch.Tensor, "backward", backward)
    monkeypatch.setattr(train, "start_processes", lambda device: (torch.device("cuda"), 0, 1))
    monkeypatch.setattr(evaluate, "memory_gb", lambda device: 0.0)
    monkeypatch.setattr(visualize, "FIGURE_CLIPS", 4)
    with FAKE, FakeGPU() as gpu:
        train.main(["--out", str(tmp_path / "run"), "--precision", precision, "--workers", "0",
                    "--eval-share", "0.01", "--set", "batch_size=4", "micro_batch=2", "epochs=1",
                    "clips_per_epoch=4"])
    assert {"attention.png", "best.pt", "curves.png"} <= set(os.listdir(tmp_path / "run"))
    assert not [note for note in gpu.notes if note.startswith("mixed")]
    waits = [note for note in gpu.notes if note.startswith("wait")]
    assert waits and all(" at train.py:" in note for note in waits), waits


@fake
def test_what_is_noted():
    """The notes that the other tests find none of."""
    with FAKE, FakeGPU() as gpu:
        x = torch.ones(3, 4, device="cuda")
        with pytest.raises(RuntimeError, match="device"):
            x + torch.ones(4)
        torch.tensor([1.0, 2.0], device="cuda")
        x[torch.tensor([0, 2])]
        x[x > 0].sum()
        if x.all():
            x.cpu()
        with torch.autocast("cuda", torch.float16):
            assert (x @ x.T).dtype == torch.float16 and x.softmax(1).dtype == torch.float32
    assert [note.split(":")[0] for note in gpu.notes] == [
        "mixed", "upload", "mixed", "wait", "wait", "download"], gpu.notes


# ---- memory -------------------------------------------------------------------------------------

class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages that operations have made and that are still alive."""

    def __init__(self):
        super().__init__()
        self.alive, self.total, self.peak = {}, 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tensors_in([result]):
            storage = tensor.untyped_storage()
            if storage._cdata not in self.alive:
                self.alive[storage._cdata] = storage.nbytes()
                self.total += storage.nbytes()
                self.peak = max(self.peak, self.total)
                weakref.finalize(storage, self.freed, storage._cdata)
        return result

    def freed(self, key):
        self.total -= self.alive.pop(key)


def step_of(config, *changes):
    """A training step of a small model -> its peak of live bytes, and all gradients."""
    config = override(config, changes)
    torch.manual_seed(0)
    model = VideoActionDetector(config).train()
    clips = torch.randint(256, (2, 3, config.frames, 64, 64), dtype=torch.uint8)
    targets = made_up_targets(2, config.frames, config)
    with LiveBytes() as memory:
        detection_loss(model(clips), targets, config)[0].backward()
    return memory.peak, [parameter.grad for parameter in model.parameters()]


@real
def test_what_recomputation_saves_of_a_step_s_memory():
    config = replace(PRESETS["ucf"], vit_depth=1, vit_width=96, vit_heads=2, frames=2, dim=64,
                     dim_feedforward=128, num_points=2, encoder_layers=2)
    usual, gradients = step_of(config)
    classifier, same = step_of(config, "checkpoint_classifier=True")
    both, again = step_of(config, "checkpoint_classifier=True", "checkpoint_encoder=True")
    assert classifier <= 0.6 * usual and both <= 0.45 * usual, (usual, classifier, both)
    for first, second, third in zip(gradients, same, again):
        assert (first is None) == (second is None) == (third is None)
        if first is not None:
            assert torch.equal(first, second) and torch.equal(first, third)
