"""kernels on GPUs: the linears and attention of the engine's step, captured as it captures them.

A case is one kernel over rotating copies of its weight, launched back to back in a CUDA graph: what a
launch costs the host is not in it, as in the step. Activations are bf16, sums fp32; what the step normalises
on the way (all but o and down) is normalised here, gate and up have their SiLU inside. The other fields and
the turns are those of kernels.py. Triton is loaded where a case runs.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from ..kernels.linear import PreparedWeight, weight_only_linear
from ..layout import weight_format
from ..models.config import ModelConfig
from . import cuda
from .definitions import PREFILL_ROWS
from .kernels import BLOCK_SIZE, FEW_ROWS, PASSES, Bench, Case, config_of, result
from .read import total

COPIES_BYTES = 600 << 20
_EPS = 1e-5
_REPLAYS = 3
_PLAIN_SUMS = ("o", "down")  # what reads no norm


def bench_of(num_bytes: int | None, group: dist.ProcessGroup | None) -> Bench:
    """group: of CPU tensors. num_bytes: what a case rotates over, and no less than the L2 several times."""
    rotated = num_bytes or COPIES_BYTES
    return Bench(cuda.CudaReadCeiling(cuda.bytes_to_read(None, group), group), rotated, group)


def make_weights(quant: str, n: int, k: int, copies: int) -> list[tuple[torch.Tensor, ...]]:
    """Packed weights of random bytes (scales of a sane size) on the GPU. quant: a format with a kernel."""
    from ..kernels.cuda.pack import padded_columns

    form = weight_format(quant)
    made: list[tuple[torch.Tensor, ...]] = []
    for _ in range(copies):
        if form is None:
            made.append((torch.randn(n, k, device="cuda", dtype=torch.bfloat16),))
        elif form.bits == 8:
            q = torch.randint(-80, 80, (n, k), device="cuda", dtype=torch.int8)
            scale = torch.rand(n, device="cuda") / 1000
            made.append((q.view(torch.float8_e4m3fn) if form.is_float else q, scale))
        else:
            group = form.group_size or k
            padded = padded_columns(k, group)
            q = torch.randint(0, 256, (n, padded // 2), device="cuda", dtype=torch.uint8)
            halves = (torch.rand(padded // group // 2, n, 2, device="cuda") / 1000).half()
            made.append((q, halves.view(torch.int32).squeeze(-1)))
    return made


def group_size_of(quant: str) -> int:
    """Columns that share a scale; 0 where a row has one, or none."""
    form = weight_format(quant)
    return 0 if form is None else form.group_size or 0


def chain(
    quant: str, weights: Sequence[tuple[torch.Tensor, ...]], rows: int, k: int, tile: Any, *, gated: bool,
    num_sums: int, early: bool = False,
) -> Callable[[], None]:  # fmt: skip
    """A function that multiplies `rows` rows with each weight in turn, as the engine's step does.

    weights: of make_weights. tile: of kernels.cuda.linear. num_sums: of squares that a row's norm is made of
    on the way; 0: it is not normalised. early: as before a small kernel.
    """
    from ..kernels.cuda.linear import launch_gemv

    n = weights[0][0].shape[0] // (2 if gated else 1)
    x = torch.randn(rows, k, device="cuda", dtype=torch.bfloat16)
    sums = torch.rand(rows, num_sums, device="cuda") * k if num_sums else None
    dtype = torch.bfloat16 if gated else torch.float32
    y = torch.empty((tile.splits, rows, n), device="cuda", dtype=dtype)
    group = group_size_of(quant)

    def run() -> None:
        for tensors in weights:
            scale = tensors[1] if len(tensors) > 1 else None
            launch_gemv(
                x, tensors[0], scale, None, sums, y, group_size=group, gated=gated, eps=_EPS, tile=tile,
                early=early,
            )  # fmt: skip

    return run


def rows_of(case: Case, rows: Sequence[int], bench: Bench) -> Iterator[dict[str, Any]]:
    """One weight at all its row counts, or attention; as kernels.py's."""
    if case.tokens:
        yield _attention(case, config_of(case.model), bench)
        return
    few = [count for count in rows if count <= FEW_ROWS]
    if few:
        yield from _few_rows(case, few, bench)
    if max(rows) > FEW_ROWS:
        yield _many_rows(case, bench)
    torch.cuda.empty_cache()


def _few_rows(case: Case, rows: Sequence[int], bench: Bench) -> Iterator[dict[str, Any]]:
    from ..engine.cuda_decode import pieces_of
    from ..kernels.cuda.linear import choose_tile

    gated = case.name == "gate_up"
    weights = make_weights(case.quant, case.n, case.k, 1)
    size = sum(each.nbytes for each in weights[0])
    weights += make_weights(case.quant, case.n, case.k, max(1, -(-bench.num_bytes // size) - 1))
    num_sums = 0 if case.name in _PLAIN_SUMS else pieces_of(case.k)[0]
    for count in rows:
        tile = choose_tile(weights[0][0], case.k, rows=count, gated=gated, split=case.name != "head")
        run = chain(case.quant, weights, count, case.k, tile, gated=gated, num_sums=num_sums)
        found = bench.bandwidth(_timed(run), size * len(weights))
        yield result(case.label, case.quant, group_size_of(case.quant), case.n, case.k, count) | found


def _timed(run: Callable[[], Any]) -> Callable[[], float]:
    """Seconds of one replay of run(), captured once."""
    from ..kernels.cuda.read_ceiling import captured, replay_seconds

    graph = captured(run)
    return lambda: float(replay_seconds(graph, _REPLAYS))


def _many_rows(case: Case, bench: Bench) -> dict[str, Any]:
    """One shape at PREFILL_ROWS rows, turn by turn with torch's bf16 linear."""
    n, k, group = case.n, case.k, group_size_of(case.quant)
    tensors = make_weights(case.quant, n, k, 1)[0]
    form = weight_format(case.quant)
    weight = PreparedWeight(
        "cuda", n, k, 16 if form is None else form.bits, group, 0, tensors, gated=case.name == "gate_up"
    )
    plain = torch.randn(n, k, device="cuda", dtype=torch.bfloat16)
    x = torch.randn(PREFILL_ROWS, k, device="cuda", dtype=torch.bfloat16)
    turns = (_timed(lambda: weight_only_linear(x, weight)), _timed(lambda: F.linear(x, plain)))
    taken: tuple[list[float], list[float]] = ([], [])
    for _ in range(PASSES):
        for seconds, turn in zip(taken, turns, strict=True):
            bench.start()
            seconds.append(turn())
    operations = 2 * PREFILL_ROWS * n * k
    ours, theirs = (total(operations / statistics.median(seconds), bench.group) for seconds in taken)
    read = sum(tensor.nbytes for tensor in tensors)
    return result(case.label, case.quant, group, n, k, PREFILL_ROWS) | {
        "gb_s": round(read * ours / operations / 1e9, 6),
        "tflop_s": round(ours / 1e12, 3),
        "torch_tflop_s": round(theirs / 1e12, 3),
        "share": round(ours / theirs, 6),
    }


def _attention(case: Case, config: ModelConfig, bench: Bench) -> dict[str, Any]:
    """The step's attention of one token over `case.tokens` cached ones, over enough layers' caches."""
    from ..kernels.cuda.attention_ops import DecodeScratch, decode_attention

    heads, kv_heads = config.num_heads // case.world, max(1, config.num_kv_heads // case.world)
    blocks, dim = -(-case.tokens // BLOCK_SIZE), config.head_dim
    shape = (blocks, kv_heads, BLOCK_SIZE, dim)
    one = 2 * case.tokens * kv_heads * dim * torch.bfloat16.itemsize
    caches = [
        tuple(torch.randn(shape, dtype=torch.bfloat16, device="cuda") for _ in range(2))
        for _ in range(max(2, -(-bench.num_bytes // one)))
    ]
    q = torch.randn(1, heads, dim, dtype=torch.bfloat16, device="cuda")
    out = torch.empty_like(q)
    table = torch.randperm(blocks).int().unsqueeze(0).cuda()
    position = torch.tensor([case.tokens - 1], dtype=torch.int32, device="cuda")
    row = torch.zeros(1, dtype=torch.int32, device="cuda")
    scratch = DecodeScratch.make(1, heads, caches[0][0], case.tokens)

    def run() -> None:
        for keys, values in caches:
            decode_attention(
                q, keys, values, position, row, table, scratch, out, scale=dim**-0.5, window=0
            )  # fmt: skip

    found = bench.bandwidth(_timed(run), one * len(caches))
    return result(case.label, "bf16 cache", 0, heads * dim, case.tokens, 1) | found
