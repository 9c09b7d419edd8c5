"""The CUDA linears as ops: gemv for 1 to 16 rows, dequantise and cuBLAS for more.

A weight is what pack.py made of it (PreparedWeight kind "cuda") or a plain bf16 matrix. `gemv_` writes into
a tensor that exists, so that a captured step allocates nothing.

Legend: S splits of K, R rows, N outputs, K inputs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from ...dependent_launch import launch
from .dequant import dequantize_kernel
from .gemv import BF16, FP8, INT4, INT8, gemv_kernel

MOST_ROWS = 16
_SLICE_VALUES = 128 << 20  # bf16 values made at a time; fewer leave cuBLAS too few tiles for all processors
_LINES_AHEAD = 2  # of each row of a tile, asked for before a linear waits; four are slower than none
_LINES_AHEAD_INT4 = 1  # twice the columns a line
_INTERPRETED = bool(triton.knobs.runtime.interpret)


@dataclass(frozen=True)
class Tile:
    """How a gemv is cut: BN rows and BK columns of W a tile, splits of K, warps, pipeline stages."""

    bn: int
    bk: int
    splits: int
    warps: int
    stages: int


_HEAD_TILES = {
    BF16.value: Tile(32, 256, 1, 2, 4),
    FP8.value: Tile(64, 256, 1, 4, 4),
    INT8.value: Tile(64, 256, 1, 4, 4),
    INT4.value: Tile(64, 0, 1, 2, 4),
}


def kind_of(w: Tensor) -> int:
    """BF16, FP8, INT8 or INT4, from the packed weight's dtype."""
    kinds = {torch.bfloat16: BF16, torch.float8_e4m3fn: FP8, torch.int8: INT8, torch.uint8: INT4}
    return int(kinds[w.dtype].value)


def choose_tile(w: Tensor, k: int, *, rows: int, gated: bool, split: bool = True) -> Tile:
    """The tile for a weight, as found on an H200 within the step (benchmarks/cuda_step_tiles.py).

    rows: of x, at most; int4 has other tiles for one, for up to eight and for up to sixteen: every program
    reads its columns of all of them. split: whether K may be split (a gated linear's never is).
    """
    kind, n = kind_of(w), w.shape[0]
    return _fitting(_gated_tile(kind, n, k, rows > 1) if gated else _plain_tile(kind, n, k, rows, split), w)


def _fitting(tile: Tile, w: Tensor) -> Tile:
    """The tile, with fewer stages where the GPU has less shared memory than an H200's 227 KiB."""
    if w.device.type != "cuda":
        return tile
    limit = torch.cuda.get_device_properties(w.device).shared_memory_per_block_optin  # type: ignore[attr-defined]
    columns = tile.bk or 256  # of x; int4's group of 128, twice
    stage = tile.bn * (columns // 2 if tile.bk == 0 else columns * w.itemsize) + columns * MOST_ROWS * 2
    return replace(tile, stages=max(1, min(tile.stages, limit // stage)))


def _plain_tile(kind: int, n: int, k: int, rows: int, split: bool) -> Tile:
    """Of a linear without a gate.

    Best are splits that give 132 processors nearly the same number of programs, all at once: about three
    each (384 = 3 x 128), whose loads in flight cover the memory's latency.
    """

    def splits(programs: int, bn: int, least_columns: int) -> int:
        return max(1, min(programs // triton.cdiv(n, bn), k // least_columns, 8))

    if not split:  # the head, which has programs enough
        return _HEAD_TILES[kind]
    if kind == BF16.value:
        return Tile(32, 128, 1 if n > 8192 else splits(max(384, 3 * triton.cdiv(n, 32)), 32, 1024), 2, 4)
    if kind == INT4.value:
        large = n * k > 48 << 20
        if rows > 8:
            return Tile(128, 0, splits(256 if large else 512, 128, 640), 4, 3)
        if rows > 1 and not large:
            return Tile(64, 0, splits(256, 64, 640), *((4, 4) if k > n else (2, 8)))
        if k > 8192 or rows > 1:
            return Tile(32, 0, splits(1024, 32, 1024), 1, 4)
        return Tile(64, 0, splits(512, 64, 768), 4, 3)
    if n * k > 64 << 20:  # two programs a processor, or three of fewer stages
        count = splits(320, 64, 768)
        return Tile(64, 256, count, 4, 4 if count * triton.cdiv(n, 64) <= 2 * 132 else 3)
    count = splits(384, 64, 768)
    return Tile(64, 256, count, 4, 6) if k <= 2048 else Tile(64, 128, count, 4, 4)


def _gated_tile(kind: int, n: int, k: int, several: bool) -> Tile:
    """Of n rows of gate and up."""
    if kind == BF16.value:
        return Tile(32, 128, 1, 1, 4)
    if kind == INT4.value:
        if k < 8192 or 20_000 <= n < 40_000 or (several and n < 20_000):
            return Tile(64, 0, 1, 2, 4)
        return Tile(32, 0, 1, 2, 6 if n < 20_000 else 4)
    if n < 10_000:
        return Tile(32, 256, 1, 2, 8)
    if n < 20_000:
        return Tile(64, 256, 1, 4, 4)
    if k < 8192:
        return Tile(64, 128, 1, 4, 4)
    return Tile(128, 256, 1, 4, 3) if several or n < 40_000 else Tile(32, 512, 1, 2, 4)


@torch.library.custom_op("tp_cuda::gemv_", mutates_args=("y",))
def _gemv(
    x: Tensor,
    w: Tensor,
    scale: Tensor | None,
    offset: Tensor | None,
    sums: Tensor | None,
    y: Tensor,
    group_size: int,
    gated: bool,
    eps: float,
    tile: list[int],
) -> None:
    launch_gemv(x, w, scale, offset, sums, y, group_size=group_size, gated=gated, eps=eps, tile=Tile(*tile))


@_gemv.register_fake
def _(
    x: Tensor,
    w: Tensor,
    scale: Tensor | None,
    offset: Tensor | None,
    sums: Tensor | None,
    y: Tensor,
    group_size: int,
    gated: bool,
    eps: float,
    tile: list[int],
) -> None:
    return None


def launch_gemv(
    x: Tensor,
    w: Tensor,
    scale: Tensor | None,
    offset: Tensor | None,
    sums: Tensor | None,
    y: Tensor,
    *,
    group_size: int,
    gated: bool,
    eps: float,
    tile: Tile,
    early: bool = False,
) -> None:
    """y[s] = the part of rms(x) W^T that split s of K gives; see gemv.py.

    x: bf16 [R, K], R at most 16. w: bf16, float8_e4m3fn or int8 [n, K], or uint8 planes. scale: fp32 [n], or
    fp16 [groups, n] with group_size. sums: fp32 [R, P], sums of squares, or None where there is no norm.
    gated: w is gate rows over up rows, and y gets silu(gate) * up. y: [splits, R, N] fp32, or with one split
    [R, N] in any floating type. early: the kernel launched next is a small one, and may start at once.
    """
    rows, k = x.shape
    n = w.shape[0] // (2 if gated else 1)
    kind = kind_of(w)
    assert rows <= MOST_ROWS and x.is_contiguous() and y.is_contiguous(), (x.shape, x.stride(), y.stride())
    assert y.numel() == tile.splits * rows * n and not (gated and tile.splits > 1), (y.shape, tile)
    step = 2 * group_size if kind == INT4.value else tile.bk
    dummy = x
    outputs = tile.bn // 2 if gated else tile.bn
    launch(
        gemv_kernel,
        (triton.cdiv(n, outputs), tile.splits),
        x,
        w.view(torch.uint8) if kind == FP8.value else w,
        dummy if scale is None else scale,
        dummy if offset is None else offset,
        dummy if sums is None else sums,
        y,
        rows,
        n,
        k,
        w.stride(0),
        eps,
        KIND=kind,
        G=group_size,
        ASYMMETRIC=offset is not None,
        GATED=gated,
        NUM_SUMS=0 if sums is None else sums.shape[1],
        BN=tile.bn,
        BK=tile.bk,
        BR=8 if rows <= 8 else 16,
        STAGES=tile.stages,
        EVEN_N=n % outputs == 0,
        EVEN_K=k % step == 0,
        ASM=not _INTERPRETED,
        AHEAD=_LINES_AHEAD_INT4 if kind == INT4.value else _LINES_AHEAD,
        EARLY=early,
        num_warps=tile.warps,
    )


def gemv_(
    x: Tensor,
    tensors: tuple[Tensor, ...],
    y: Tensor,
    *,
    group_size: int,
    gated: bool = False,
    sums: Tensor | None = None,
    eps: float = 0.0,
    tile: Tile,
) -> None:
    """launch_gemv as an op. tensors: weight, then scale and offset where there are any."""
    w, scale, offset = (*tensors, None, None)[:3]
    fields = [tile.bn, tile.bk, tile.splits, tile.warps, tile.stages]
    _gemv(x, w, scale, offset, sums, y, group_size, gated, eps, fields)


def dequantize(tensors: tuple[Tensor, ...], k: int, group_size: int, out: Tensor | None = None) -> Tensor:
    """The weight [n, k] in bf16. tensors: as gemv_ takes them."""
    w = tensors[0]
    scale, offset = (*tensors[1:], None, None)[:2]
    n, kind = w.shape[0], kind_of(w)
    if out is None:
        out = torch.empty((n, k), dtype=torch.bfloat16, device=w.device)
    bk = 256
    columns = triton.cdiv(k, 2 * group_size if kind == INT4.value else bk)
    dequantize_kernel[(triton.cdiv(n, 32), columns)](
        w,
        w if scale is None else scale,
        w if offset is None else offset,
        out,
        n,
        k,
        w.stride(0),
        scale.stride(0) if scale is not None and scale.ndim == 2 else 0,
        KIND=kind,
        G=group_size,
        ASYMMETRIC=offset is not None,
        BN=32,
        BK=bk,
        ASM=not _INTERPRETED,
    )
    return out


def _rows(tensors: tuple[Tensor, ...], start: int, stop: int) -> tuple[Tensor, ...]:
    """The same weight's rows start..stop. Scales a pair of groups are [pairs, n], those a channel [n]."""
    w, *scales = tensors
    return (w[start:stop], *(each[..., start:stop] for each in scales))


@torch.library.custom_op("tp_cuda::linear", mutates_args=())
def _linear(x: Tensor, tensors: list[Tensor], group_size: int, gated: bool) -> Tensor:
    x_RK = x.reshape(-1, x.shape[-1])
    n = tensors[0].shape[0] // (2 if gated else 1)
    shape = (*x.shape[:-1], n)
    if x_RK.shape[0] <= MOST_ROWS:
        return _few_rows(x_RK, tuple(tensors), group_size, gated).to(x.dtype).view(shape)
    return _many_rows(x_RK, tuple(tensors), group_size, gated).to(x.dtype).view(shape)


@_linear.register_fake
def _(x: Tensor, tensors: list[Tensor], group_size: int, gated: bool) -> Tensor:
    return x.new_empty((*x.shape[:-1], tensors[0].shape[0] // (2 if gated else 1)))


def _few_rows(x_RK: Tensor, tensors: tuple[Tensor, ...], group_size: int, gated: bool) -> Tensor:
    rows, k = x_RK.shape
    tile = choose_tile(tensors[0], k, rows=rows, gated=gated)
    n = tensors[0].shape[0] // (2 if gated else 1)
    y_SRN = torch.empty((tile.splits, rows, n), dtype=torch.float32, device=x_RK.device)
    gemv_(x_RK.bfloat16().contiguous(), tensors, y_SRN, group_size=group_size, gated=gated, tile=tile)
    return y_SRN.sum(0) if tile.splits > 1 else y_SRN[0]


def row_slices(tensors: tuple[Tensor, ...], k: int, group_size: int) -> Iterator[tuple[int, Tensor]]:
    """The weight in bf16, some rows at a time: (number of the first, [rows, k]). A plain one is one slice."""
    w = tensors[0]
    n = w.shape[0]
    if w.dtype == torch.bfloat16:
        yield 0, w
        return
    step = triton.cdiv(triton.cdiv(n, triton.cdiv(n * k, _SLICE_VALUES)), 256) * 256
    for start in range(0, n, step):
        yield start, dequantize(_rows(tensors, start, min(start + step, n)), k, group_size)


def _many_rows(x_RK: Tensor, tensors: tuple[Tensor, ...], group_size: int, gated: bool) -> Tensor:
    x_RK = x_RK.bfloat16()
    n, k = tensors[0].shape[0], x_RK.shape[1]
    y_RN = torch.empty((x_RK.shape[0], n), dtype=torch.bfloat16, device=x_RK.device)
    for start, w_NK in row_slices(tensors, k, group_size):
        torch.mm(x_RK, w_NK.t(), out=y_RN[:, start : start + len(w_NK)])
    if gated:
        return F.silu(y_RN[:, : n // 2]) * y_RN[:, n // 2 :]
    return y_RN


def linear(x: Tensor, tensors: tuple[Tensor, ...], *, group_size: int, gated: bool = False) -> Tensor:
    """x W^T in x's dtype, or silu(gate) * up of it. x: [..., k], any number of rows."""
    return _linear(x, list(tensors), group_size, gated)
