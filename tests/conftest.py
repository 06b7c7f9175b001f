"""What all tests share: seeds, the folder ../shared, no GPU but for the kernel, stand-ins."""

import os
import signal
import subprocess
import sys
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"     # as in torchrun's processes, to compare with bit for bit

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
from small_sets import small_own, small_ucf  # noqa: E402 (found by the path above)

OF_THE_KERNEL = "test_deform3d_triton.py"

if torch.cuda.is_available():
    torch.cuda.init()           # while GPUs can be seen


def hide_gpus(patch):
    """Neither this process nor those that it starts see a GPU. Numbers compare with a CPU's, and
    two processes of a test do not ask for two GPUs."""
    patch.setenv("CUDA_VISIBLE_DEVICES", "")
    patch.setattr(torch.cuda, "is_available", lambda: False)
    patch.setattr(torch.cuda, "device_count", lambda: 0)


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector):
    with pytest.MonkeyPatch.context() as patch:
        if collector.path.name != OF_THE_KERNEL:
            hide_gpus(patch)
        return (yield)


@pytest.fixture
def own(tmp_path):
    return small_own(tmp_path)


@pytest.fixture
def ucf(tmp_path):
    return small_ucf(tmp_path)


@pytest.fixture(autouse=True)
def without_gpus(request, monkeypatch):
    if request.path.name != OF_THE_KERNEL:
        hide_gpus(monkeypatch)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def shared(*parts):
    """A path under ../shared, or a skip that says what is absent."""
    path = SHARED.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"{path} is absent: this test compares with data outside of the repository")
    return path


@pytest.fixture
def handlers():
    """What is called on signals is as it was after the test; for those that call train.main."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def stand_ins(monkeypatch, handlers):
    """train.py with the model and the clips of tests/stand_ins.py."""
    from stand_ins import put_in
    put_in(monkeypatch.setattr)
    return monkeypatch


@pytest.fixture
def start():
    """A function that runs train.py with the stand-ins as another process, in a group of its own;
    what still runs is killed with the test."""
    from stand_ins import FILE, SMALL
    processes = []

    def begin(out, *arguments, settings=(), launcher=(), **environment):
        command = [sys.executable, *launcher, str(FILE), "--out", str(out), *arguments]
        processes.append(subprocess.Popen(
            [*command, "--set", *SMALL, *settings], env={**os.environ, **environment},
            start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
        return processes[-1]

    yield begin
    for process in processes:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
