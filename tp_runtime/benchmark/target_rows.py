"""The rows of targets: their command lines, and what is read off the documents and judged. No torch.

Where llama-1b in some format may live in the caches, its MBU is taken from the next larger model of the
family, and the figure says so.
"""

from __future__ import annotations

import shlex
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from ..engine.source import resolve
from ..errors import ModelNotFoundError
from ..models import registry
from .definitions import bits_per_weight, is_cache_resident, mbu_by_turn
from .peers import weight_bytes

QUANTS = ("none", "int8", "int4")
FAMILY = ("llama-1b", "llama-3b", "llama-8b", "llama-70b")
_KERNEL_SHARE = {"none": 0.90, "int8": 0.90, "int4-g32": 0.85, "int4-g128": 0.85}
_MBU = {"none": 0.88, "int8": 0.85, "int4": 0.80}
_PREFILL = {"none": 0.92, "int8": 0.80, "int4": 0.80}
_REDUCE_US = {4096: 3.0, 16384: 8.0, 65536: 16.0}
_EAGER = 6.0
Documents = list[list[dict[str, Any]]]  # by command, then by turn


@dataclass(frozen=True)
class Figure:
    """One judged figure. at_most: the target is an upper limit. value: None where it could not be had."""

    what: str
    value: float | None
    target: float
    at_most: bool = False
    ceiling_gb_s: float | None = None

    @property
    def met(self) -> bool | None:
        """None where there is no value."""
        if self.value is None:
            return None
        return self.value <= self.target if self.at_most else self.value >= self.target


@dataclass(frozen=True)
class Row:
    """One row. minutes: about what it takes on two cores. turns: how often its commands take turns."""

    name: str
    minutes: float
    commands: tuple[str, ...]
    judge: Callable[[Documents], Iterator[Figure]]
    turns: int = 1


def rows() -> tuple[Row, ...]:
    """All of them, the short ones first."""
    decode = "decode --model llama-1b --quant"
    short = "--new-tokens 32 --repeat"  # turns that a host's speed seldom changes in
    over = [f"{decode} {q} {short} 8 {r}" for q in QUANTS for r in ("--nproc 1", "--nproc 2", _ONE_THREAD)]
    mbu = [f"decode --model {mbu_model(quant)} --quant {quant} {short} 15" for quant in QUANTS]
    prefill = [f"{decode} {quant} --prompt-tokens 512 --new-tokens 2 --repeat 5" for quant in QUANTS]
    deep = f"{decode} int8 --cache-dtype bf16 --contexts 128,8192 --new-tokens 32 --repeat 3"
    sizes = ",".join(map(str, _REDUCE_US))
    return (
        Row("collectives", 4, (f"collectives --nproc 2 --bytes {sizes}",), _collectives),
        Row("mbu", 8, tuple(mbu), _mbu),
        Row("prefill", 5, tuple(prefill), _prefill),
        Row("contexts", 6, (deep,), _contexts),
        Row("smollm2", 4, (f"peers --gguf {_demo_file()} --quant int4,int8",), _smollm2),
        Row("peers", 15, ("peers --model llama-1b --quant none,int8,int4",), _peers),
        Row("eager", 12, ("peers --model llama2-7b --layers 8 --quant int4",), _eager),
        Row("ranks", 25, tuple(over), _ranks, turns=2),
        *(Row(f"kernels-{m}", 25, (_KERNELS.format(m),), _kernels) for m in ("llama-1b", "llama-8b")),
        Row("kernels-llama-70b", 35, (_KERNELS.format("llama-70b"),), _kernels),
    )


_ONE_THREAD = "--nproc 1 --threads 1"
_KERNELS = f"kernels --models {{}} --worlds 1,2 --threads 1,2 --rows 1,4 --quant {','.join(_KERNEL_SHARE)}"


def mbu_model(quant: str) -> str:
    """The smallest model of the family that cannot live in the caches in this format."""
    bits = bits_per_weight(quant)
    head = 8.0 if bits < 8 else bits
    for name in FAMILY:
        entry = registry.find(name)
        assert entry is not None, f"{name} is a model of configs/models"
        if not is_cache_resident(weight_bytes(entry.config, bits, head)):
            return name
    return FAMILY[-1]


def _demo_file() -> str:
    try:
        return shlex.quote(str(resolve("smollm2-135m").weights_path))
    except ModelNotFoundError:
        return "smollm2-135m.gguf"  # which the row then reports as missing


def _kernels(found: Documents) -> Iterator[Figure]:
    """The lowest share at one row and the largest time of four rows over one, by format and threads."""
    cases = found[0][0]["kernels"]
    by_key = {(r["op"], r["quant"], r["threads"], r["rows"]): r for r in cases}
    for quant, threads in dict.fromkeys((r["quant"], r["threads"]) for r in cases):
        ones = [r for r in cases if (r["quant"], r["threads"], r["rows"]) == (quant, threads, 1)]
        worst = min(ones, key=lambda r: float(r["share"]))
        label = f"{quant}, {threads} threads, lowest of {len(ones)} shapes"
        share = _KERNEL_SHARE[quant]
        yield Figure(f"{label}: {worst['op']}", worst["share"], share, False, worst["ceiling_gb_s"])
        times = {r["op"]: r["gb_s"] / by_key[r["op"], quant, threads, 4]["gb_s"] for r in ones}
        op = max(times, key=lambda name: times[name])
        yield Figure(f"{quant}, {threads} threads, time of 4 rows over 1, most: {op}", times[op], 1.25, True)


def _mbu(found: Documents) -> Iterator[Figure]:
    for quant, (document,) in zip(QUANTS, found, strict=True):
        model = document["model"]
        why = "" if model == FAMILY[0] else f" ({FAMILY[0]} may live in the caches)"
        ceiling = document["read_ceiling_gb_s"]
        yield Figure(f"MBU of {model} {quant}{why}", document["mbu"], _MBU[quant], False, ceiling)
        if document["mbu"] is not None:
            yield Figure("the same by turn", mbu_by_turn(document), _MBU[quant])


def _prefill(found: Documents) -> Iterator[Figure]:
    for quant, turns in zip(QUANTS, found, strict=True):
        yield Figure(f"prefill of 512, {quant}: prefill_share", turns[0]["prefill_share"], _PREFILL[quant])


def _collectives(found: Documents) -> Iterator[Figure]:
    for row in found[0][0]["collectives"]:
        mine = (row["op"], row["backend"], row["dtype"]) == ("all_reduce", "shm", "bfloat16")
        if mine and row["in_compiled"]:
            limit = _REDUCE_US[row["bytes"]]
            yield Figure(
                f"all_reduce in the step, bf16, {row['bytes']} B, p50 us", row["p50_us"], limit, True
            )


def _contexts(found: Documents) -> Iterator[Figure]:
    row = found[0][0]["contexts"][-1]
    off = abs(row["time_ratio"] / row["bytes_ratio"] - 1)
    what = f"time x {row['time_ratio']:.3f} against bytes x {row['bytes_ratio']:.3f}, off by"
    yield Figure(what, off, 0.15, True, found[0][0]["read_ceiling_gb_s"])


def _ranks(found: Documents) -> Iterator[Figure]:
    """Ratios of the medians over turns; or the share of each one's ceiling, where that is met instead."""
    for at, quant in enumerate(QUANTS):
        one, two, thread = found[3 * at : 3 * at + 3]
        speed = [statistics.median(run["tok_s"] for run in runs) for runs in (one, two, thread)]
        ceilings = [max(run["read_ceiling_gb_s"] for run in runs) for runs in (one, two, thread)]
        yield Figure(f"{quant}: 2 ranks x 1 thread over 1 x 2", speed[1] / speed[0], 0.98, False, ceilings[1])
        least = min(1.85, ceilings[1] / ceilings[2])  # "or the same share of the two measured ceilings"
        yield Figure(
            f"{quant}: 2 ranks x 1 thread over 1 x 1", speed[1] / speed[2], least, False, ceilings[2]
        )


def _over_llama_cpp(document: dict[str, Any], targets: dict[str, float]) -> Iterator[Figure]:
    ours = {row["format"]: row for row in document["peers"] if row["runtime"] == "tp_runtime"}
    theirs = {row["against"]: row for row in document["peers"] if row["runtime"] == "llama.cpp"}
    for quant, target in targets.items():
        if quant not in theirs:
            yield Figure(f"{quant} over llama.cpp, which gave none", None, target)
            continue
        mine, peer = ours[quant], theirs[quant]
        what = (
            f"{quant} ({mine['bits_per_weight']:g} bits) over {peer['format']} ({peer['bits_per_weight']:g})"
        )
        ceiling = mine["read_ceiling_gb_s"]
        yield Figure(f"{what} of llama.cpp", mine["tok_s"] / peer["tok_s"], target, False, ceiling)


def _peers(found: Documents) -> Iterator[Figure]:
    return _over_llama_cpp(found[0][0], dict.fromkeys(QUANTS, 1.4))


def _smollm2(found: Documents) -> Iterator[Figure]:
    return _over_llama_cpp(found[0][0], {"int4": 1.4, "int8": 1.1})


def _eager(found: Documents) -> Iterator[Figure]:
    row = next(row for row in found[0][0]["peers"] if row["runtime"] == "tp_runtime")
    bound = row["over_eager_bound"]
    target = _EAGER if bound is None else min(_EAGER, bound)
    what = "int4 over eager bf16, llama2-7b of 8 layers"
    yield Figure(what, row["over_eager"], target, False, row["read_ceiling_gb_s"])
