"""Which device and number type a run uses where the user did not say. No torch.

Read off the host's own files, so that a launcher can answer before torch is loaded; build.py holds
torch to the answer.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

from ..config import EngineConfig
from ..errors import ConfigError

_BF16_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}


@cache
def cpu_flags() -> frozenset[str]:
    """The instruction sets /proc/cpuinfo lists for the first CPU."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        key, _, value = line.partition(":")
        if key.strip().lower() in ("flags", "features"):
            return frozenset(value.split())
    return frozenset()


def has_nvidia_gpu() -> bool:
    """True where the NVIDIA driver shows at least one card."""
    return any(Path("/dev").glob("nvidia[0-9]*"))


def pick_device(config: EngineConfig) -> str:
    """ "cpu" or "cuda"."""
    if config.device != "auto":
        return config.device
    return "cuda" if has_nvidia_gpu() else "cpu"


def pick_dtype(config: EngineConfig, device: str) -> str:
    """ "fp32", "bf16" or "fp16": the one asked for, else bf16 where the hardware computes in it."""
    if config.dtype is not None:
        return config.dtype
    return "bf16" if device == "cuda" or cpu_flags() & _BF16_FLAGS else "fp32"


def refuse_cache_dtype(config: EngineConfig, device: str) -> None:
    """Raise ConfigError where no kernel of that device reads such a cache."""
    if config.cache_dtype == "int8" and device == "cuda":
        raise ConfigError(
            "--cache-dtype int8 was asked for on a GPU, whose kernels read bf16, fp16 and fp8 caches alone; "
            "use --cache-dtype fp8, leave it away, or use --device cpu"
        )
    if config.cache_dtype == "fp8" and device == "cpu":
        raise ConfigError(
            "--cache-dtype fp8 was asked for on CPUs, whose kernels read none; use --cache-dtype int8, "
            "which is as small, or leave it away"
        )
