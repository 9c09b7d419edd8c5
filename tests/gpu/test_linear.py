"""The GPU's linears against dequantise-then-multiply in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tp_runtime.kernels import reference

Case = tuple[str, int, bool]
FORMATS: list[Case] = [
    ("bf16", 0, False),
    ("fp8", 0, False),
    ("int8", 0, False),
    ("int4", 32, False),
    ("int4", 64, True),
    ("int4", 128, False),
    ("int4", 128, True),
]
# [n, k]: whole tiles; tails on both sides; fewer columns than one tile.
SHAPES = [(512, 1024), (328, 592), (80, 48)]


def make(case: Case, n: int, k: int, device: str) -> tuple[tuple[Tensor, ...], Tensor]:
    """(tensors of a packed random weight, the fp32 weight it stands for)."""
    from tp_runtime.kernels.cuda import pack

    kind, group, asymmetric = case
    if kind == "bf16":
        w = torch.randn(n, k).bfloat16()
        return (w.to(device),), w.float()
    bits = 4 if kind == "int4" else 8
    if kind == "int4":
        q = torch.randint(0, 256, (n, (k + 1) // 2), dtype=torch.uint8)
        q[:, -1] &= 15 if k % 2 else 255
    elif kind == "int8":
        q = torch.randint(-127, 128, (n, k), dtype=torch.int8)
    else:
        q = torch.randn(n, k).to(torch.float8_e4m3fn)
    shape = (n, -(-k // group)) if group else (n,)
    scale = torch.rand(shape) / 64 + 0.01
    scale = scale.half() if group else scale
    offset = (torch.randn(shape) / 16).half() if asymmetric else None
    w = reference.dequantize(q, scale, offset, bits=bits, group_size=group, head=0, k=k)
    tensors = pack.pack(q, scale, offset, bits=bits, group_size=group, k=k)
    return tuple(each.to(device) for each in tensors), w


def errors(found: Tensor, wanted: Tensor) -> tuple[float, float]:
    """(largest and mean error over the wanted values' spread)."""
    gap = (found.double().cpu() - wanted.double()).abs() / wanted.double().std()
    return float(gap.max()), float(gap.mean())


@pytest.mark.parametrize("rows", [1, 5, 16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("case", FORMATS, ids=str)
def test_gemv(case: Case, shape: tuple[int, int], rows: int, device: str) -> None:
    from tp_runtime.kernels.cuda.linear import choose_tile, gemv_

    n, k = shape
    tensors, w = make(case, n, k, device)
    x = torch.randn(rows, k).bfloat16()
    tile = choose_tile(tensors[0], k, rows=rows, gated=False)
    y = torch.full((tile.splits, rows, n), torch.nan, device=device)  # poisoned: every element is written
    gemv_(x.to(device), tensors, y, group_size=case[1], tile=tile)
    largest, mean = errors(y.sum(0), x.double() @ w.double().T)
    print(f"{case} {shape} x{rows}: largest {largest:.1e}, mean {mean:.1e}")
    # Weights and x are exact in bf16 and sums are fp32: only the order of summation differs. Tensor cores
    # keep a few bits less than fp32 while they add.
    assert largest < 2e-5


@pytest.mark.parametrize("n", [256, 88])  # whole tiles of gate and up, and a tail
@pytest.mark.parametrize("case", [FORMATS[0], FORMATS[1], FORMATS[2], FORMATS[5]], ids=str)
def test_gemv_with_norm_and_gate(case: Case, n: int, device: str) -> None:
    from tp_runtime.kernels.cuda.linear import choose_tile, gemv_

    k, rows, eps = 512, 3, 1e-5
    tensors, w = make(case, 2 * n, k, device)
    x = torch.randn(rows, k).bfloat16()
    sums = torch.rand(rows, 4) * k
    y = torch.full((rows, n), torch.nan, device=device)
    tile = choose_tile(tensors[0], k, rows=rows, gated=True)
    gemv_(x.to(device), tensors, y, group_size=case[1], gated=True, sums=sums.to(device), eps=eps, tile=tile)
    rms = (sums.double().sum(1) / k + eps).rsqrt()
    both = (x.double() @ w.double().T) * rms.unsqueeze(1)
    wanted = torch.nn.functional.silu(both[:, :n]) * both[:, n:]
    largest, mean = errors(y, wanted)
    print(f"{case}: largest {largest:.1e}, mean {mean:.1e}")
    assert largest < 1e-4  # a product of two sums, and exp in fp32


@pytest.mark.parametrize("slices", [1, 2])
@pytest.mark.parametrize("case", FORMATS, ids=str)
def test_many_rows(case: Case, slices: int, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from tp_runtime.kernels.cuda import linear as ours
    from tp_runtime.kernels.cuda.linear import linear

    n, k = 320, 592
    monkeypatch.setattr(ours, "_SLICE_VALUES", n * k // slices)
    tensors, w = make(case, n, k, device)
    x = torch.randn(40, k).bfloat16()
    y = linear(x.to(device), tensors, group_size=case[1])
    largest, mean = errors(y, x.double() @ w.double().T)
    print(f"{case}: largest {largest:.1e}, mean {mean:.1e}")
    # The weight and the result are each rounded to bf16 (2^-9 relative); the latter's largest value is
    # four times their spread.
    assert largest < 2.5e-2 and mean < 2e-3


def test_planes_are_inverse(device: str) -> None:
    from tp_runtime.kernels.cuda import pack

    for k, group in ((592, 32), (256, 128), (47, 64)):
        q = torch.randint(0, 256, (24, (k + 1) // 2), dtype=torch.uint8)
        planes = pack.pack_planes(q.to(device), k, group)
        assert torch.equal(pack.unpack_planes(planes, k, group).cpu(), reference.unpack_nibbles(q, k))
