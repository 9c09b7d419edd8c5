"""The kernels command measures what the engine runs, beside the ceiling of the same threads."""

from __future__ import annotations

from argparse import Namespace

import pytest
import torch

from tp_runtime.benchmark import kernels
from tp_runtime.benchmark.read import ReadCeiling
from tp_runtime.kernels.cpu import build
from tp_runtime.kernels.linear import weight_only_linear

pytestmark = pytest.mark.skipif(not build.available(), reason="the C++ kernels are not built here")
CASES = Namespace(
    device="cpu",
    models=("smollm2-135m",), worlds=(1,), quant=("int8",), threads=(1, 2), rows=(1,), attention=(), bytes=1 << 20
)  # fmt: skip


@pytest.mark.parametrize("quant", ["none", "int8", "int4-g32"])
@pytest.mark.parametrize("gated", [False, True])
def test_the_loop_runs_the_linear(quant: str, gated: bool) -> None:
    """The last copy's result is that of the op itself, bit for bit."""
    weight = kernels.random_weight(quant, 96, 64, gated=gated)
    copies = kernels.copies_of(weight, 5 * weight.tensors[0].numel())
    assert len(copies) == 5 and weight.gated == gated
    x = torch.randn(3, 64)
    y, seconds = kernels.linear_seconds(x, copies)
    assert torch.equal(y, weight_only_linear(x, weight))
    assert y.shape == (3, 48 if gated else 96) and seconds > 0


def test_a_ceiling_is_read_by_the_case_s_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """No reading of another number of threads is left when a case starts."""
    before, found = torch.get_num_threads(), []

    def read(self: ReadCeiling) -> float:
        self.readings.append(float(torch.get_num_threads()))
        return self.readings[-1]

    monkeypatch.setattr(ReadCeiling, "read", read)
    for row in kernels.measure(CASES, None, speaks=False):
        found.append((row["threads"], row["ceiling_gb_s"]))
    assert torch.get_num_threads() == before
    assert set(found) == {(1, 1.0), (2, 2.0)}
