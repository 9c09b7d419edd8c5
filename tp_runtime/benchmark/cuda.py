"""What the commands share on GPUs: the read ceiling, the matmul rate, caches, and time by kernel.

Modules that load triton are imported where a GPU is at work, so that this one imports without it.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from .. import env
from ..config import SamplingParams
from ..engine.figures import CACHE_FACTOR
from ..engine.llm import LLM
from ..engine.memory import gib
from ..errors import ConfigError, MemoryLimitError
from ..kernels.cpu.read_ceiling import CACHES_READ
from ..models.config import ModelConfig
from .definitions import PEAK_SIZE, PREFILL_ROWS, linears
from .read import Ceiling, slowest, total

MOST_READ_BYTES = 4 << 30
_SPARE_BYTES = 512 << 20  # left free beside the ceiling's memory
_MATMUL_REPEAT = 9
_PROFILED_PROMPT, _PROFILED_TOKENS = 8, 33
_MOST_KERNELS = 14  # of a profile


def require_gpus() -> None:
    """Refuse a job whose ranks have no GPU each. Raises ConfigError."""
    if not torch.cuda.is_available():
        raise ConfigError("--device cuda was asked for and torch finds no usable GPU; use --device cpu")
    ranks, found = env.get_int("LOCAL_WORLD_SIZE") or 1, torch.cuda.device_count()
    if ranks > found:
        raise ConfigError(f"{ranks} ranks were asked for and torch finds {found} GPUs; use --nproc {found}")


def cache_bytes() -> int:
    """Bytes of this GPU's L2."""
    return int(torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size)


def is_cache_resident(weight_bytes_per_token: int, world_size: int) -> bool:
    """Whether the weights may live in the L2 of the ranks' GPUs, which are alike."""
    return weight_bytes_per_token < CACHE_FACTOR * cache_bytes() * world_size


def bytes_to_read(asked: int | None, group: dist.ProcessGroup | None) -> int:
    """What every rank reads for the ceiling: `asked`, or MOST_READ_BYTES, or less where less is free.

    Raises MemoryLimitError, in all ranks, where what is free on some GPU might live in its L2.
    """
    free = torch.cuda.mem_get_info()[0] - _SPARE_BYTES
    least = -int(slowest(-float(free), group))
    wanted, needed = asked or MOST_READ_BYTES, CACHES_READ * cache_bytes()
    if least < min(wanted, needed):
        raise MemoryLimitError(
            f"the read ceiling takes {gib(min(wanted, needed))} of a GPU beside the model and "
            f"{gib(max(0, least))} are free on the fullest; use more ranks, a smaller --quant or --context"
        )
    return min(wanted, least) // 4 * 4


class CudaReadCeiling(Ceiling):
    """Memory kept for reading on each rank's GPU. group: of CPU tensors (gloo).

    num_bytes: what this rank reads.
    """

    def __init__(self, num_bytes: int, group: dist.ProcessGroup | None = None) -> None:
        from ..kernels.cuda.read_ceiling import Reader

        super().__init__(group)
        data = torch.empty(num_bytes // 4, dtype=torch.int32, device="cuda")
        self._reader = Reader(data.random_())

    def _reading(self) -> float:
        if self._group is not None:
            dist.barrier(self._group)
        return total(self._reader.gb_s(), self._group)


def seconds_of(run: Callable[[], Any], repeat: int = 5) -> float:
    """Median seconds of one replay of run(), captured as a CUDA graph."""
    from ..kernels.cuda.read_ceiling import graph_seconds

    return float(graph_seconds(run, repeat))


@torch.inference_mode()
def matmul_rate(config: ModelConfig, world_size: int, num_tokens: int, group: dist.ProcessGroup) -> float:
    """Operations a second of the ranks' best bf16 matmul: on the model's own shapes, or PEAK_SIZE^3.

    num_tokens: of the prompt; the model's shapes have as many rows, and PREFILL_ROWS at least.
    """
    rows, best = max(PREFILL_ROWS, num_tokens), 0.0
    shapes = [(rows, n, k) for _, n, k in linears(config, world_size)]
    for m, n, k in dict.fromkeys([*shapes, (PEAK_SIZE, PEAK_SIZE, PEAK_SIZE)]):
        dist.barrier(group)
        best = max(best, total(2 * m * n * k / _matmul_seconds(m, n, k), group))
    return best


def _matmul_seconds(m: int, n: int, k: int) -> float:
    x, weight = (torch.randn(rows, k, device="cuda", dtype=torch.bfloat16) for rows in (m, n))
    out = torch.empty(m, n, device="cuda", dtype=torch.bfloat16)
    return seconds_of(lambda: torch.mm(x, weight.t(), out=out), _MATMUL_REPEAT)


def finish(group: dist.ProcessGroup) -> None:
    """Wait until no rank's GPU reaches into another's memory any more. group: of CPU tensors."""
    torch.cuda.synchronize()
    dist.barrier(group)


def release() -> None:
    """Give back what nobody holds any more: a model's weights, before matmuls need room."""
    gc.collect()
    torch.cuda.empty_cache()


def profiles(llm: LLM, prompt_tokens: int, new_tokens: int, batch: int) -> dict[str, list[dict[str, Any]]]:
    """Time by kernel of one decoded token of `batch` rows, and of a whole prompt. Every rank calls it."""
    short = [[5 + row] * min(_PROFILED_PROMPT, prompt_tokens) for row in range(batch)]
    count = min(_PROFILED_TOKENS, new_tokens)
    return {
        "kernels": _profile(llm, short, count),
        "prefill_kernels": _profile(llm, [[7] * prompt_tokens] * batch, 1),
    }


def _profile(llm: LLM, prompts: Sequence[Sequence[int]], new_tokens: int) -> list[dict[str, Any]]:
    """Microseconds by kernel, a decoded token (of a prompt's only token: all of it), the longest first."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as found:
        llm.generate(prompts, SamplingParams(max_new_tokens=new_tokens, ignore_eos=True))
        torch.cuda.synchronize()
    steps = max(1, new_tokens - 1)
    kernels = [
        {"kernel": event.key[:60], "us": event.device_time_total / steps, "calls": event.count}
        for event in found.key_averages()
    ]
    kernels.sort(key=lambda each: -each["us"])
    return kernels[:_MOST_KERNELS]


def profile_lines(document: dict[str, Any]) -> str:
    """Both profiles for people."""
    return "".join(
        f"{title} {each['us']:9.1f} us {each['calls']:6d} {each['kernel']}\n"
        for title, name in (("token ", "kernels"), ("prompt", "prefill_kernels"))
        for each in document.get(name, ())
    )
