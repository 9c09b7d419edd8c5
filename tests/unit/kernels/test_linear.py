"""The linears against their twin: dequantise to fp32, then multiply.

Tolerances, relative to the largest output: fp32 activations 2e-6 (sums in another order; two-term fixed
point is finer), bf16 2^-7 and fp16 2^-10 (one unit in the last place, where rounding tips over).
Rows and threads must not matter at all, so those are compared bit for bit.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass, replace

import pytest
import torch

from tp_runtime.kernels import reference
from tp_runtime.kernels.cpu import build
from tp_runtime.kernels.linear import (
    PreparedWeight,
    join_rows,
    lookup,
    prepare,
    prepare_plain,
    weight_only_linear,
)

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}
# Beyond 16 rows, bf16 activations meet a weight rounded to bf16 once.
MANY_ROWS_TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2 * 2**-7, torch.float16: 2**-10}


@dataclass(frozen=True)
class Case:
    """A quantised weight: odd shapes, tails, shards that begin inside a group."""

    bits: int
    group_size: int
    head: int
    n: int
    k: int
    asymmetric: bool = False

    def weights(self, backend: str) -> PreparedWeight:
        generator = torch.Generator().manual_seed(self.n * 1000 + self.k)
        groups = -(-(self.head + self.k) // self.group_size) if self.group_size else 0
        if self.bits == 8:
            q = torch.randint(-127, 128, (self.n, self.k), dtype=torch.int8, generator=generator)
        else:
            q = torch.randint(0, 256, (self.n, (self.k + 1) // 2), dtype=torch.uint8, generator=generator)
        if self.group_size:
            scale = torch.rand(self.n, groups, generator=generator).half()
        else:
            scale = torch.rand(self.n, generator=generator)
        offset = torch.randn(self.n, groups, generator=generator).half() if self.asymmetric else None
        return prepare(
            q,
            scale,
            offset,
            bits=self.bits,
            group_size=self.group_size,
            head=self.head,
            n=self.n,
            k=self.k,
            backend=backend,
        )


CASES = [
    Case(8, 0, 0, 48, 100),
    Case(8, 0, 0, 1, 1),
    Case(8, 0, 0, 130, 576),
    Case(8, 32, 0, 100, 257),
    Case(8, 32, 5, 7, 65),
    Case(4, 32, 0, 64, 128),
    Case(4, 32, 0, 17, 95, asymmetric=True),
    Case(4, 32, 31, 40, 33),
    Case(4, 64, 13, 33, 101, asymmetric=True),
    Case(4, 64, 40, 33, 101),
    Case(4, 128, 0, 200, 576, asymmetric=True),
    Case(4, 128, 100, 200, 577),
]
ROWS = (1, 2, 3, 4, 5, 16, 17)


def _compare(name: str, y: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    error = (y.double() - expected.double()).abs() / expected.double().abs().max().clamp_min(1e-30)
    print(f"{name}: largest error {error.max():.2e}, mean {error.mean():.2e}, tolerance {tolerance:.2e}")
    assert y.shape == expected.shape and y.dtype == expected.dtype
    assert error.max() <= tolerance, name


@pytest.fixture(autouse=True, scope="module")
def _needs_kernels() -> None:
    assert build.available(), "the suite needs g++"


@pytest.mark.parametrize("case", CASES, ids=str)
def test_like_the_twin(case: Case) -> None:
    fast, slow = case.weights("auto"), case.weights("reference")
    assert (fast.kind, slow.kind) == ("cpu", "reference")
    for dtype in TOLERANCE:
        for rows in ROWS:
            x = torch.randn(rows, case.k, generator=torch.Generator().manual_seed(rows)).to(dtype)
            tolerance = (TOLERANCE if rows <= 16 else MANY_ROWS_TOLERANCE)[dtype]
            y, expected = weight_only_linear(x, fast), weight_only_linear(x, slow)
            _compare(f"{case} {dtype} {rows} rows", y, expected, tolerance)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(48, 100), (1, 1), (130, 577)])
def test_plain_weights_like_torch(shape: tuple[int, int], dtype: torch.dtype) -> None:
    w = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    prepared = prepare_plain(w)
    assert prepared.kind == "cpu"
    for x_dtype in (dtype, torch.float32):
        for rows in ROWS:
            x = torch.randn(rows, shape[1], generator=torch.Generator().manual_seed(rows)).to(x_dtype)
            expected = torch.nn.functional.linear(x.float(), w.float()).to(x_dtype)
            _compare(
                f"{shape} {dtype} {rows} rows", weight_only_linear(x, prepared), expected, TOLERANCE[x_dtype]
            )


@pytest.mark.parametrize("case", CASES, ids=str)
def test_rows_and_threads_change_no_bit(case: Case) -> None:
    fast = case.weights("auto")
    threads = torch.get_num_threads()
    for dtype in TOLERANCE:
        x = torch.randn(16, case.k, generator=torch.Generator().manual_seed(1)).to(dtype)
        together = weight_only_linear(x, fast)
        alone = torch.cat([weight_only_linear(row, fast) for row in x.split(1)])
        assert torch.equal(together, alone), f"{case} {dtype}"
        try:
            torch.set_num_threads(1)
            assert torch.equal(together, weight_only_linear(x, fast)), f"{case} {dtype}"
        finally:
            torch.set_num_threads(threads)


MANY_CASES = [
    Case(8, 0, 0, 100, 577),
    Case(8, 32, 5, 72, 257),
    Case(4, 32, 31, 200, 321),
    Case(4, 64, 13, 33, 129, asymmetric=True),
    Case(4, 128, 100, 130, 577, asymmetric=True),
]


@pytest.mark.parametrize("rows", [33, 64, 512])
@pytest.mark.parametrize("case", MANY_CASES, ids=str)
def test_many_rows_like_the_twin(case: Case, rows: int) -> None:
    """Outputs that fill no tile, and shards that begin inside a group."""
    fast, slow = case.weights("auto"), case.weights("reference")
    x = torch.randn(rows, case.k, generator=torch.Generator().manual_seed(rows))
    expected = weight_only_linear(x, slow)
    for dtype, tolerance in MANY_ROWS_TOLERANCE.items():
        y, rounded = weight_only_linear(x.to(dtype), fast), weight_only_linear(x.to(dtype), slow)
        _compare(f"{case} {dtype} {rows} rows", y, rounded, tolerance)
    y = weight_only_linear(x, replace(fast, round_activations=True))
    _compare(f"{case} {rows} rounded rows", y, expected, 2**-7)


@pytest.mark.parametrize("rows", [33, 64, 512])
@pytest.mark.parametrize("shape", [(100, 577), (33, 64)])
def test_many_rows_of_plain_weights(shape: tuple[int, int], rows: int) -> None:
    w = torch.randn(shape, generator=torch.Generator().manual_seed(0)).bfloat16()
    x = torch.randn(rows, shape[1], generator=torch.Generator().manual_seed(rows))
    expected = torch.nn.functional.linear(x, w.float())
    prepared = prepare_plain(w)
    _compare(f"{shape} {rows} rows", weight_only_linear(x, prepared), expected, 2e-6)
    for y in (
        weight_only_linear(x.bfloat16(), prepared).float(),
        weight_only_linear(x, replace(prepared, round_activations=True)),
    ):
        _compare(f"{shape} {rows} rounded rows", y, expected, 2 * 2**-7)


def test_gate_and_up_in_one() -> None:
    case = Case(4, 32, 0, 96, 128)
    fast = case.weights("auto")
    for dtype in TOLERANCE:
        for rows in ROWS:
            x = torch.randn(rows, case.k, generator=torch.Generator().manual_seed(rows)).to(dtype)
            gate, up = weight_only_linear(x.float(), case.weights("reference")).chunk(2, -1)
            expected = (torch.nn.functional.silu(gate) * up).to(dtype)
            # A large product carries the errors of both factors, in their dtype beyond 16 rows.
            tolerance = 4 * MANY_ROWS_TOLERANCE[dtype]
            y = weight_only_linear(x, replace(fast, gated=True))
            _compare(f"gated {dtype} {rows} rows", y, expected, tolerance)


def test_awkward_activations() -> None:
    case = Case(8, 0, 0, 32, 96)
    fast, slow = case.weights("auto"), case.weights("reference")
    x = torch.randn(6, 96)
    x[0] = 0
    x[1] *= 1e-28
    x[2] *= 1e30
    x[3, 5] = 1e4  # one outlier in its slice of 32
    for dtype, tolerance in ((torch.float32, 2e-6), (torch.bfloat16, 2**-7)):
        for row in range(4):
            one = x[row : row + 1].to(dtype)
            y, expected = weight_only_linear(one, fast), weight_only_linear(one, slow)
            _compare(f"row {row} {dtype}", y, expected, tolerance)
    x[4, 3], x[5, 3] = float("nan"), float("inf")
    assert not weight_only_linear(x[4:], fast).isfinite().any()


def test_strided_and_empty_inputs() -> None:
    case = Case(4, 32, 0, 48, 64)
    fast = case.weights("auto")
    x = torch.randn(3, 5, 128)
    assert torch.equal(
        weight_only_linear(x[..., :64], fast), weight_only_linear(x[..., :64].contiguous(), fast)
    )
    assert weight_only_linear(x[:0, :, :64], fast).shape == (0, 5, 48)


def test_one_graph_under_compile() -> None:
    fast = Case(8, 0, 0, 48, 100).weights("auto")
    x = torch.randn(3, 100)
    compiled = torch.compile(lambda x: weight_only_linear(x, fast) + 1, fullgraph=True)
    assert torch.equal(compiled(x), weight_only_linear(x, fast) + 1)


CHILD = """
import torch
from test_linear import CASES, Case
from tp_runtime.kernels.linear import weight_only_linear
outputs = []
for case in CASES:
    fast = case.weights("auto")
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(5, case.k, generator=torch.Generator().manual_seed(3)).to(dtype)
        outputs.append(weight_only_linear(x, fast))
import sys
assert torch.ops.tp_cpu.isa() == sys.argv[1], torch.ops.tp_cpu.isa()
torch.save(outputs, sys.argv[2])
"""


def test_every_instruction_set_gives_the_same_bits(tmp_path) -> None:  # type: ignore[no-untyped-def]
    results = {}
    isas = {"avx2": 1, "avx512": 2, "amx": 3}
    build.load()
    best = isas[torch.ops.tp_cpu.isa()]
    for isa in [isa for isa, level in isas.items() if level <= best]:
        target = tmp_path / f"{isa}.pt"
        environ = os.environ | {"TP_CPU_ISA": isa, "PYTHONPATH": os.path.dirname(__file__)}
        command = [sys.executable, "-c", CHILD, isa, str(target)]
        done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        results[isa] = torch.load(target, weights_only=True)
    for isa, outputs in results.items():
        for case, y, expected in zip(CASES * 2, outputs, results["avx2"], strict=False):
            assert torch.equal(y, expected), f"{isa} differs from avx2 ({case})"


@pytest.mark.parametrize("case", [case for case in CASES if case.n % 16 == 0], ids=str)
def test_joined_rows_are_the_parts_side_by_side(case: Case) -> None:
    parts = [case.weights("auto"), replace(case, n=case.n + 3).weights("auto")]
    joined = join_rows(parts)
    assert joined is not None and joined.n == 2 * case.n + 3
    x = torch.randn(3, case.k, generator=torch.Generator().manual_seed(0))
    expected = torch.cat([weight_only_linear(x, part) for part in parts], dim=-1)
    assert torch.equal(weight_only_linear(x, joined), expected)


@pytest.mark.parametrize("rows", [1, 5, 40])
def test_joined_gate_and_up(rows: int) -> None:
    gate, up = Case(8, 0, 0, 48, 100), Case(8, 0, 0, 48, 100)
    joined = join_rows([gate.weights("auto"), up.weights("auto")], gated=True)
    assert joined is not None
    x = torch.randn(rows, 100, generator=torch.Generator().manual_seed(rows))
    expected = torch.nn.functional.silu(weight_only_linear(x, gate.weights("reference")))
    expected = expected * weight_only_linear(x, up.weights("reference"))
    _compare(f"gated, {rows} rows", weight_only_linear(x, joined), expected, 4e-6)


def test_parts_that_do_not_join() -> None:
    whole = Case(8, 0, 0, 48, 100).weights("auto")
    assert join_rows([Case(8, 0, 0, 17, 100).weights("auto"), whole]) is None, "a part ends inside a block"
    assert join_rows([whole, Case(8, 32, 0, 48, 100).weights("auto")]) is None, "formats differ"
    assert join_rows([whole, Case(8, 0, 0, 32, 100).weights("auto")], gated=True) is None, "sizes differ"
    assert join_rows([Case(8, 0, 0, 48, 100).weights("reference")] * 2) is None, "the twin joins nothing"


@pytest.mark.parametrize("case", CASES, ids=str)
def test_rows_looked_up_are_the_weights(case: Case) -> None:
    weight, twin = case.weights("auto"), case.weights("reference")
    ids = torch.tensor([[0, case.n - 1], [case.n // 2, 0]])
    offset = twin.tensors[2] if case.asymmetric else None
    shape = {"bits": case.bits, "group_size": case.group_size, "head": case.head, "k": case.k}
    expected = reference.dequantize(twin.tensors[0], twin.tensors[1], offset, **shape)[ids]
    # One rounding more or less where there are offsets.
    _compare(str(case), lookup(ids, weight), expected, 1e-7 if case.asymmetric else 0.0)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("rows", [1, 16, 40])
def test_rounded_activations_are_no_worse_than_bf16(case: Case, rows: int) -> None:
    """Few rows: an error of 2^-14 of each slice's largest value, far under bf16's 2^-9. Many: bf16's own."""
    weight = replace(case.weights("auto"), round_activations=True)
    x = torch.randn(rows, case.k, generator=torch.Generator().manual_seed(rows))
    expected = weight_only_linear(x, case.weights("reference"))
    _compare(f"{case} {rows} rows", weight_only_linear(x, weight), expected, 2**-12 if rows <= 16 else 2**-7)
