"""Building and loading the CPU kernels. Fallback where that cannot be: ATen's ops and the references."""

from __future__ import annotations

import platform
from functools import cache
from pathlib import Path

import torch

from ... import env, native
from ...errors import ConfigError, KernelBuildError
from ...log import once
from . import ops

_ISAS = ("avx2", "avx512", "amx")
_FOLDER = Path(__file__).parent / "src"
_AVX2 = ("-mavx2", "-mfma", "-mf16c")
_AVX512 = (*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni", "-mavx512bf16")
_AMX = (*_AVX512, "-mamx-tile", "-mamx-int8", "-mamx-bf16")
# gcc 12 warns of its own header's undefined vectors; nothing else is silenced.
_SOURCES = (
    ("linear_ops.cpp", ()),
    ("attention_ops.cpp", ()),
    ("attention_prompt.cpp", ()),
    ("step.cpp", ()),
    ("host_ops.cpp", ()),
    ("timing_ops.cpp", ()),
    ("memory.cpp", ()),
    ("many_rows_amx.cpp", _AMX),
    ("linear_avx512.cpp", _AVX512),
    ("linear_avx2.cpp", _AVX2),
    ("attention_avx512.cpp", _AVX512),
    ("attention_avx2.cpp", _AVX2),
    ("pack.cpp", ()),
    ("read.cpp", ()),
    ("isa.cpp", ()),
)


def _library() -> native.Library:
    sources = tuple(native.Source(_FOLDER / name, flags) for name, flags in _SOURCES)
    return native.Library("tp_cpu_kernels", sources, tuple(sorted(_FOLDER.glob("*.h"))))


@cache
def load() -> None:
    """Build the kernels if need be and register their ops (`torch.ops.tp_cpu`).

    TP_CPU_ISA (avx2, avx512 or amx) lowers the instruction set. Raises KernelBuildError where they cannot
    be built, ConfigError for a TP_CPU_ISA that is unknown or not offered here.
    """
    if platform.machine() not in ("x86_64", "AMD64"):
        raise KernelBuildError(f"there are no native kernels for {platform.machine()} CPUs")
    wanted = env.get("TP_CPU_ISA")
    if wanted is not None and wanted not in _ISAS:
        raise ConfigError(f"TP_CPU_ISA={wanted!r} is not known; use one of {', '.join(_ISAS)}")
    native.load(_library())
    ops.register_fakes()
    if wanted is not None:
        torch.ops.tp_cpu.limit_isa(wanted)
    found = torch.ops.tp_cpu.isa()
    if found == "none":
        raise KernelBuildError("this CPU has no AVX2, FMA and F16C, which the native kernels need")
    if wanted is not None and found != wanted:
        raise ConfigError(f"TP_CPU_ISA={wanted} is not offered by this CPU, whose best is {found}; unset it")


@cache
def available() -> bool:
    """True where the kernels are loaded now. Says once why they are not. Raises ConfigError as load()."""
    try:
        load()
    except KernelBuildError as error:
        once(f"{error}; using torch's own ops, which reach about half the speed")
        return False
    return True
