"""Where the GPU tests run: on a GPU, or with TRITON_INTERPRET=1 (kernels alone, slowly) on the CPU."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def device() -> str:
    """ "cuda", or "cpu" under Triton's interpreter."""
    return "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect, and so list in the summary, what this machine's GPUs cannot run."""
    here = [item for item in items if Path(item.path).parent == Path(__file__).parent]
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    left = []
    for item in here:
        marker = item.get_closest_marker("gpus")
        needed = marker.args[0] if marker is not None else 1
        kernels_alone = interpreted and item.path.stem in (
            "test_linear",
            "test_attention",
            "test_elementwise",
        )
        if count < needed and not kernels_alone:
            left.append(item)
    if left:
        config.hook.pytest_deselected(items=left)
        items[:] = [item for item in items if item not in set(left)]
