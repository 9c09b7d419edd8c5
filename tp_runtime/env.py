"""The only reader of os.environ. Every variable the project reads stands in `VARIABLES` below.

`python -m tp_runtime.env` prints docs/env.md (a test compares the two). Values are read when asked
for, not at import: launchers and tests set them late. Standard library only.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from .errors import ConfigError


@dataclass(frozen=True)
class Variable:
    """One environment variable: its name, type (as the reader sees it), default and meaning."""

    name: str
    kind: str  # "int", "float", "str", "path", "flag"
    default: str | None
    meaning: str
    set_by: str = "user"


VARIABLES: tuple[Variable, ...] = (
    Variable("TP_CACHE_DIR", "path", "~/.cache/tp_runtime", "built kernels, measured ceilings, plans"),
    Variable("TP_CHECKED", "flag", None, "1: the launcher has checked the script's arguments", "launcher"),
    Variable("TP_MODEL_PATH", "path", None, "folder of weights by model name: <name>/ or <name>.gguf"),
    Variable("HF_HUB_CACHE", "path", None, "the Hugging Face cache; default $HF_HOME/hub"),
    Variable("HF_HOME", "path", "~/.cache/huggingface", "the folder of the Hugging Face libraries"),
    Variable("TP_LOG_LEVEL", "str", "info", "debug, info, warning or error"),
    Variable("TP_CPU_ISA", "str", None, "CPU kernels: avx2, avx512 or amx; not sums over ranks"),
    Variable("CXX", "str", None, "the C++ compiler; default: the first of g++, c++ and clang++"),
    Variable("TORCHINDUCTOR_CACHE_DIR", "path", None, "compiled graphs; default: below TP_CACHE_DIR"),
    Variable("GLOO_SOCKET_IFNAME", "str", None, "network interface of gloo; lo for a job on one host"),
    Variable("RANK", "int", "0", "rank in the job", "launcher"),
    Variable("WORLD_SIZE", "int", "1", "ranks in the job", "launcher"),
    Variable("LOCAL_RANK", "int", "0", "rank on this host", "launcher"),
    Variable("LOCAL_WORLD_SIZE", "int", "1", "ranks on this host", "launcher"),
    Variable("MASTER_ADDR", "str", None, "address of the rendezvous store", "launcher"),
    Variable("MASTER_PORT", "int", None, "port of the rendezvous store", "launcher"),
    Variable("OMP_NUM_THREADS", "int", None, "threads a rank", "launcher"),
    Variable("TP_JOB_ID", "str", None, "unique name of the job, for files and shared memory", "launcher"),
    Variable("TP_LAUNCHER_PID", "int", None, "who started the rank; it ends with that process", "launcher"),
    Variable("TP_PLACEMENT", "str", None, "the rank's part of tp-launch --dry-run --json", "launcher"),
    Variable("TP_NUMA", "flag", "0", "ranks started by srun or mpirun place themselves as --numa would"),
    Variable("TP_NUMA_STRICT", "flag", "0", "a placement that cannot be applied is refused", "launcher"),
    Variable("LD_PRELOAD", "str", None, "allocator and OpenMP libraries of the placement", "launcher"),
    Variable("CUDA_VISIBLE_DEVICES", "str", None, "GPUs ranks may use, by number in PCI order"),
    Variable("PYTORCH_ALLOC_CONF", "str", "expandable_segments:True", "torch's memory of a GPU"),
    Variable("PYTORCH_CUDA_ALLOC_CONF", "str", None, "its older name; where it is set, it stands"),
    Variable("TP_STORE_FILE", "path", None, "rendezvous store of a job on one host", "launcher"),
    Variable("TP_COLLECTIVES", "str", "auto", "how CPU ranks communicate: shm (or an error), c10d, or auto"),
    Variable("TP_COLLECTIVE_TIMEOUT", "float", None, "seconds a collective may wait for a peer"),
)
# What the collectives of one rank take of /dev/shm (collectives/shm.py); tp-launch asks before ranks start.
SHM_BYTES_PER_RANK = (2 << 20) + 4096
_BY_NAME = {variable.name: variable for variable in VARIABLES}


def get(name: str, environ: Mapping[str, str] | None = None) -> str | None:
    """The raw value of a declared variable, or its default. Raises KeyError for an undeclared one."""
    variable = _BY_NAME[name]
    return (os.environ if environ is None else environ).get(name, variable.default)


def is_set(name: str) -> bool:
    """Whether a declared variable is in the environment, whatever its default."""
    assert name in _BY_NAME, f"{name} is not declared"
    return name in os.environ


def get_int(name: str, environ: Mapping[str, str] | None = None) -> int | None:
    """The value as int. Raises ConfigError where it is none."""
    value = get(name, environ)
    if value is None:
        return None
    try:
        return int(value)
    except ValueError:
        raise ConfigError(f"{name}={value!r} is not a whole number; unset it or give one") from None


def get_float(name: str, environ: Mapping[str, str] | None = None) -> float | None:
    """The value as a finite float. Raises ConfigError where it is none."""
    value = get(name, environ)
    if value is None:
        return None
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise ConfigError(f"{name}={value!r} is not a number; unset it or give one")
    return number


def get_seconds(name: str, environ: Mapping[str, str] | None = None) -> float | None:
    """The value as a number of seconds above 0. Raises ConfigError where it is none."""
    number = get_float(name, environ)
    if number is not None and number <= 0:
        raise ConfigError(f"{name}={number:g} is no positive number of seconds; unset it or give one")
    return number


def get_flag(name: str, environ: Mapping[str, str] | None = None) -> bool:
    """True for 1, true, yes, on; False for 0, false, no, off, empty or unset. Else ConfigError."""
    value = (get(name, environ) or "").strip().lower()
    if value in ("1", "true", "yes", "on"):
        return True
    if value in ("", "0", "false", "no", "off"):
        return False
    raise ConfigError(f"{name}={value!r} is neither on nor off; use 1 or 0")


def get_path(name: str, environ: Mapping[str, str] | None = None) -> Path | None:
    """The value as a path with ~ expanded. Raises ConfigError for an unknown ~user."""
    value = get(name, environ)
    return None if value is None else user_path(value, name)


def user_path(text: str, asked: str) -> Path:
    """A path as a user wrote it, with ~ expanded. asked: who asks, for the message. Raises ConfigError."""
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise ConfigError(
            f"{asked} {text}: there is no such user, so ~ means no folder; write the path in full"
        ) from None


def set_default(name: str, value: str) -> None:
    """Set a declared variable for this process and its children, where the user has not."""
    assert name in _BY_NAME, f"{name} is not declared"
    os.environ.setdefault(name, value)


def render() -> str:
    """docs/env.md."""
    rows = [f"| `{v.name}` | {v.kind} | {v.default or ''} | {v.set_by} | {v.meaning} |" for v in VARIABLES]
    head = ["# Environment variables", "", "Generated by `python -m tp_runtime.env`; do not edit.", ""]
    table = ["| name | type | default | set by | meaning |", "|---|---|---|---|---|"]
    return "\n".join([*head, *table, *rows]) + "\n"


if __name__ == "__main__":
    import sys

    sys.stdout.write(render())
