import os
import sys
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # as in torchrun's processes, with which tests compare bit for bit

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"
sys.path.insert(0, str(ROOT))


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def shared(*parts):
    """A path under ../shared, or a skip that says what is absent."""
    path = SHARED.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"{path} is absent: this test compares with data that is not part of the repository")
    return path
