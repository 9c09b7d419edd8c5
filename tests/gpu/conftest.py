"""Where the GPU tests run: on a GPU, or with TRITON_INTERPRET=1 (kernels alone, slowly) on the CPU."""

from __future__ import annotations

import os

import pytest
import torch


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def device() -> str:
    """ "cuda", or "cpu" under Triton's interpreter."""
    return "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
