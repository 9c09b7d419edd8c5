"""kernels: bandwidth of the linears of few rows and of attention, and speed of the linears of many rows.

definitions.py says what is measured. Shapes are divided over --worlds (default: this job's ranks); in a job
of several ranks all run each case at once, rates and ceilings are their sums. Of many rows `share` is the
rate over that of torch's bf16 linear (oneDNN) on the same shape, measured turn by turn. Linears run as the
engine's step runs them: from C++, on fp32 activations that may be rounded, gate and up with their SiLU.
"""

from __future__ import annotations

import itertools
import statistics
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from ..kernels.attention import paged_attention
from ..kernels.linear import PreparedWeight, prepare, prepare_plain, weight_only_linear
from ..layout import weight_format
from ..models.config import ModelConfig
from ..models.registry import find
from .definitions import PREFILL_ROWS, ceiling_bytes, linears
from .launching import Progress
from .read import Ceiling, ReadCeiling, total

PASSES = 5  # of the matmuls of many rows, which are compared turn by turn
_TURNS, _TURN_PASSES = 4, 3  # of a bandwidth; readings of the ceiling stand before, between and after
BLOCK_SIZE = 32  # tokens of a cache block, as the engine's
FEW_ROWS = 16
_BLOCK_ROWS = 16  # of a packed weight; gate and up are joined where both are whole blocks
_RANDOM_ROWS = 256


@dataclass(frozen=True)
class Bench:
    """What every case needs. num_bytes: what a case rotates over. group: ranks that measure at once."""

    ceiling: Ceiling
    num_bytes: int
    group: dist.ProcessGroup | None

    def start(self) -> None:
        """Wait for the other ranks."""
        if self.group is not None:
            dist.barrier(self.group)

    def bandwidth(self, seconds: Callable[[], float], read: int) -> dict[str, float]:
        """Rate of what reads `read` bytes in `seconds()`, in turns with readings of the ceiling.

        Short turns: a shared host's memory changes its speed within seconds, and both are to meet the same.
        """
        rates = []
        self.ceiling.start_case()
        for _ in range(_TURNS):
            for _ in range(_TURN_PASSES):
                self.start()
                rates.append(total(read / seconds() / 1e9, self.group))
            self.ceiling.read()
        best, ceiling = max(rates), self.ceiling.best
        return {
            "gb_s": round(best, 6),
            "gb_s_median": round(statistics.median(rates), 4),
            "ceiling_gb_s": round(ceiling, 2),
            "share": round(best / ceiling, 6),
        }


def random_weight(quant: str, n: int, k: int, *, gated: bool = False) -> PreparedWeight:
    """A prepared weight of random values, which repeat every few rows, as the engine prepares it.

    gated: of gate over up; it stays two plain ones where the engine cannot join them either.
    """
    joined = gated and n % (2 * _BLOCK_ROWS) == 0
    return replace(_random_weight(quant, n, k), gated=joined, round_activations=True)


def _random_weight(quant: str, n: int, k: int) -> PreparedWeight:
    layout = weight_format(quant)
    if layout is None:
        return prepare_plain(_repeated(torch.randn(min(n, _RANDOM_ROWS), k, dtype=torch.bfloat16), n))
    group_size = layout.group_size or 0
    if layout.bits == 8:
        q = _repeated(torch.randint(-127, 128, (min(n, _RANDOM_ROWS), k), dtype=torch.int8), n)
    else:
        q = _repeated(torch.randint(0, 256, (min(n, _RANDOM_ROWS), (k + 1) // 2), dtype=torch.uint8), n)
    groups = -(-k // group_size) if group_size else 0
    scale = torch.rand(n, groups).half() if group_size else torch.rand(n)
    return prepare(q, scale, None, bits=layout.bits, group_size=group_size, head=0, n=n, k=k)


def _repeated(rows: Tensor, n: int) -> Tensor:
    """`n` rows made of these, over and over."""
    return rows.repeat(-(-n // len(rows)), 1)[:n]


def linear_seconds(x: Tensor, weights: Sequence[PreparedWeight]) -> tuple[Tensor, float]:
    """Run x through each of the weights, copies of one, in a loop in C++: the last result and the seconds."""
    w = weights[0]
    assert w.kind == "cpu", f"a weight of kind {w.kind!r} is not run from C++"
    shape = (w.n, w.k, w.bits, w.group_size, w.head, w.asymmetric, w.gated, w.round_activations)
    packed = [weight.tensors[0] for weight in weights]
    y, seconds = torch.ops.tp_cpu.linear_seconds(x, packed, w.channel_scale, *shape)
    return y, float(seconds)


def copies_of(weight: PreparedWeight, num_bytes: int) -> list[PreparedWeight]:
    """The weight and copies of it, `num_bytes` in all."""
    packed, *rest = weight.tensors

    def copy() -> PreparedWeight:
        own = torch.ops.tp_cpu.empty_weight(packed.numel()).copy_(packed)
        return replace(weight, tensors=(own, *rest))

    return [weight, *(copy() for _ in range(-(-num_bytes // packed.numel()) - 1))]


def few_rows(
    name: str, quant: str, n: int, k: int, rows: list[int], bench: Bench
) -> Iterator[dict[str, Any]]:
    """One shape at each row count."""
    weights = copies_of(random_weight(quant, n, k, gated=_is_gated(name)), bench.num_bytes)
    read = sum(tensor.nbytes for weight in weights for tensor in weight.tensors)
    for count in rows:
        x = torch.randn(count, k)

        def seconds(x: Tensor = x) -> float:
            return linear_seconds(x, weights)[1]

        found = bench.bandwidth(seconds, read)
        yield result(name, quant, weights[0].group_size, n, k, count) | found


def _is_gated(name: str) -> bool:
    return name.endswith("gate_up")


def many_rows(name: str, quant: str, n: int, k: int, bench: Bench) -> dict[str, Any]:
    """One shape at PREFILL_ROWS rows, turn by turn with torch's bf16 linear."""
    weight = random_weight(quant, n, k, gated=_is_gated(name))
    plain = _repeated(torch.randn(min(n, _RANDOM_ROWS), k, dtype=torch.bfloat16), n)
    x = torch.randn(PREFILL_ROWS, k)
    x_bf16 = x.bfloat16()
    taken: tuple[list[float], list[float]] = ([], [])
    turns = (lambda: weight_only_linear(x, weight), lambda: F.linear(x_bf16, plain))
    for _ in range(2 * PASSES + 1):
        for seconds, run in zip(taken, turns, strict=True):
            bench.start()
            started = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - started)
    operations = 2 * PREFILL_ROWS * n * k
    ours, theirs = (total(operations / statistics.median(seconds[1:]), bench.group) for seconds in taken)
    read = sum(tensor.nbytes for tensor in weight.tensors)
    return result(name, quant, weight.group_size, n, k, PREFILL_ROWS) | {
        "gb_s": round(read * ours / operations / 1e9, 6),
        "tflop_s": round(ours / 1e12, 3),
        "torch_tflop_s": round(theirs / 1e12, 3),
        "share": round(ours / theirs, 6),
    }


def attention(
    name: str, config: ModelConfig, world_size: int, num_tokens: int, bench: Bench
) -> dict[str, Any]:
    """Decode attention of one row over `num_tokens` cached ones, over enough layers' caches."""
    heads, kv_heads = config.num_heads // world_size, max(1, config.num_kv_heads // world_size)
    blocks = -(-num_tokens // BLOCK_SIZE)
    shape = (blocks, kv_heads, BLOCK_SIZE, config.head_dim)
    one = 2 * num_tokens * kv_heads * config.head_dim * torch.bfloat16.itemsize
    caches = [
        (torch.randn(shape, dtype=torch.bfloat16), torch.randn(shape, dtype=torch.bfloat16))
        for _ in range(-(-bench.num_bytes // one))
    ]
    q = torch.randn(1, heads, config.head_dim, dtype=torch.bfloat16)
    table = torch.randperm(blocks, dtype=torch.int32).unsqueeze(0)
    start = torch.tensor([0, 1], dtype=torch.int32)
    lens = torch.tensor([num_tokens], dtype=torch.int32)

    def seconds() -> float:
        started = time.perf_counter()
        for keys, values in caches:
            paged_attention(q, keys, values, table, start, lens, config.head_dim**-0.5)
        return time.perf_counter() - started

    found = bench.bandwidth(seconds, one * len(caches))
    return result(name, "bf16 cache", 0, heads * config.head_dim, num_tokens, 1) | found


def result(name: str, quant: str, group: int, n: int, k: int, rows: int) -> dict[str, Any]:
    """The fields that every row begins with."""
    return {
        "op": name,
        "quant": quant,
        "group": group,
        "n": n,
        "k": k,
        "rows": rows,
        "threads": torch.get_num_threads(),
    }


@dataclass(frozen=True)
class Case:
    """One weight at all its row counts, or attention over `tokens`. world: ranks it is divided over."""

    model: str
    world: int
    name: str
    quant: str = ""
    n: int = 0
    k: int = 0
    tokens: int = 0

    @property
    def label(self) -> str:
        """As rows call it."""
        return f"{self.model} tp{self.world} {self.name}"


def config_of(model: str) -> ModelConfig:
    """The shape of a model of configs/models."""
    entry = find(model)
    assert entry is not None, "the command line names known models only"
    return entry.config


def cases_of(args: Namespace, worlds: tuple[int, ...]) -> list[Case]:
    """Each shape and format once; several models and worlds may share one."""
    cases, seen = [], set()
    for model, world in itertools.product(args.models, worlds):
        for (name, n, k), quant in itertools.product(linears(config_of(model), world), args.quant):
            if (n, k, quant, _is_gated(name)) not in seen:
                seen.add((n, k, quant, _is_gated(name)))
                cases.append(Case(model, world, name, quant, n, k))
        cases += [Case(model, world, "attention", tokens=tokens) for tokens in args.attention]
    return cases


def _rows_of(case: Case, rows: Sequence[int], bench: Bench) -> Iterator[dict[str, Any]]:
    if case.tokens:
        yield attention(case.label, config_of(case.model), case.world, case.tokens, bench)
        return
    few = [count for count in rows if count <= FEW_ROWS]
    if few:
        yield from few_rows(case.label, case.quant, case.n, case.k, few, bench)
    if max(rows) > FEW_ROWS:
        yield many_rows(case.label, case.quant, case.n, case.k, bench)


def _for_device(
    args: Namespace, group: dist.ProcessGroup | None
) -> tuple[Callable[[Case, Sequence[int], Bench], Iterator[dict[str, Any]]], Bench]:
    """How a case is measured, and what it needs."""
    if args.device == "cuda":
        from . import kernels_cuda

        return kernels_cuda.rows_of, kernels_cuda.bench_of(args.bytes, group)
    num_bytes = args.bytes or ceiling_bytes()
    return _rows_of, Bench(ReadCeiling(num_bytes, group, passes=1), num_bytes, group)


@torch.inference_mode()
def measure(args: Namespace, group: dist.ProcessGroup | None, *, speaks: bool) -> list[dict[str, Any]]:
    """All cases asked for, printed as they come by the rank that speaks. group: of CPU tensors."""
    world_size = 1 if group is None else group.size()
    rows_of, bench = _for_device(args, group)
    most = torch.get_num_threads()
    results: list[dict[str, Any]] = []
    cases, counts = cases_of(args, args.worlds or (world_size,)), args.threads or (most,)
    progress = Progress(len(cases) * len(counts))
    for threads in counts:
        torch.set_num_threads(threads)
        bench.ceiling.restart()
        for case in cases:
            rows = list(rows_of(case, args.rows, bench))
            results += [row | {"world_size": world_size} for row in rows]
            done = progress.step()
            if speaks:
                sys.stdout.write("".join(f"{line(row)}  {done}\n" for row in rows))
                sys.stdout.flush()
    torch.set_num_threads(most)
    return results


def line(row: dict[str, Any]) -> str:
    """One result for people."""
    rate = f"{row['tflop_s']:6.3f} TFLOP/s" if "tflop_s" in row else f"{row['gb_s']:6.2f} GB/s"
    return (
        f"{row['op']:<24} {row['quant']:<10} [{row['n']:>6}, {row['k']:>5}] {row['rows']:>3} rows "
        f"{row['threads']} threads {rate}  share {row['share']:.3f}"
    )
