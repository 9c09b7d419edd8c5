"""C++ libraries of this package: built on first use, kept under $TP_CACHE_DIR/native, loaded into torch.

A built library is named by a digest of its sources and flags, the torch version and the compiler, so that
none is ever stale. One process builds, in a folder of its own, and renames the result into place; others
wait on a file lock, which the kernel drops when its holder dies, however it dies. (torch's own JIT builder
is not used: it needs ninja, and the file it locks with survives a kill.)
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from . import env
from .errors import ConfigError, KernelBuildError
from .log import get_logger

# The vector code states its own contractions, so that AVX2 and AVX-512 round alike.
_FLAGS = (
    "-std=c++20",
    "-O3",
    "-fPIC",
    "-fopenmp",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=off",
)
_BUILD_TIMEOUT_S = 900.0
_POLL_S = 0.2


@dataclass(frozen=True)
class Source:
    """One C++ file and the flags it needs beyond the common ones."""

    path: Path
    flags: tuple[str, ...] = ()


@dataclass(frozen=True)
class Library:
    """A C++ library. name: file name stem. sources: compiled. headers: what else its digest covers."""

    name: str
    sources: tuple[Source, ...]
    headers: tuple[Path, ...]


def load(library: Library) -> None:
    """Build `library` if this host has not, and load it into the process, which registers its torch ops.

    Raises KernelBuildError where there is no compiler or it fails; ConfigError where $TP_CACHE_DIR cannot
    be written.
    """
    compiler = find_compiler()
    if compiler is None:
        raise KernelBuildError("no C++ compiler is found; install g++ (or set CXX) to get the native kernels")
    root = env.get_path("TP_CACHE_DIR")
    assert root is not None, "TP_CACHE_DIR has a default"
    target = root / "native" / f"{library.name}-{_digest(library, compiler)}.so"
    try:
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            with _lock(target.with_suffix(".lock"), library.name):
                if not target.exists():
                    _build(library, compiler, target)
    except OSError as error:
        raise ConfigError(
            f"TP_CACHE_DIR={root} cannot hold the built {library.name} ({error.strerror}); "
            "set TP_CACHE_DIR to a folder that can be written"
        ) from None
    torch.ops.load_library(str(target))


def find_compiler() -> str | None:
    """The C++ compiler of kernels and compiled graphs: $CXX, else the first of g++, c++ and clang++ found."""
    chosen = env.get("CXX")
    names = (chosen,) if chosen else ("g++", "c++", "clang++")
    return next((path for name in names if (path := shutil.which(name))), None)


def _digest(library: Library, compiler: str) -> str:
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, timeout=60).stdout
    digest = hashlib.sha256(repr((torch.__version__, version, _FLAGS, os.uname().machine)).encode())
    for source in library.sources:
        digest.update(repr((source.path.name, source.flags)).encode() + source.path.read_bytes())
    for header in library.headers:
        digest.update(header.name.encode() + header.read_bytes())
    return digest.hexdigest()[:16]


@contextmanager
def _lock(path: Path, name: str) -> Iterator[None]:
    """Hold an exclusive lock on `path`; says so once where another process holds it."""
    deadline, told = time.monotonic() + _BUILD_TIMEOUT_S, False
    with open(path, "w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise KernelBuildError(
                        f"another process has been building {name} for {_BUILD_TIMEOUT_S:.0f} s "
                        f"(it holds {path}); end it, or set TP_CACHE_DIR to another folder"
                    ) from None
                if not told:
                    get_logger().info("another process is building %s; waiting for it", name)
                    told = True
                time.sleep(_POLL_S)
        yield


def _build(library: Library, compiler: str, target: Path) -> None:
    """Compile and link in a new folder beside `target`, then rename. Called under the lock."""
    for leftover in target.parent.glob(f"{target.stem}.build-*"):
        shutil.rmtree(leftover, ignore_errors=True)  # of a builder that was killed
    get_logger().info("building %s (once for this host and torch version)", library.name)
    started = time.monotonic()
    root = Path(torch.__file__).parent
    includes = [f"-isystem{root}/include", f"-isystem{root}/include/torch/csrc/api/include"]
    defines = [f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}"]
    with tempfile.TemporaryDirectory(prefix=f"{target.stem}.build-", dir=target.parent) as folder:

        def compile_one(source: Source) -> Path:
            result = Path(folder) / f"{source.path.stem}.o"
            _run(
                [
                    compiler,
                    *_FLAGS,
                    *source.flags,
                    *defines,
                    *includes,
                    "-c",
                    str(source.path),
                    "-o",
                    str(result),
                ]
            )
            return result

        # The files with torch's headers take longest and stand first.
        with ThreadPoolExecutor(max_workers=max(1, len(os.sched_getaffinity(0)))) as pool:
            objects = [str(path) for path in pool.map(compile_one, library.sources)]
        linked = Path(folder) / target.name
        # OpenMP comes from the copy that torch has loaded: a second one would have threads of its own.
        libraries = [f"-L{root}/lib", "-lc10", "-ltorch_cpu", "-ltorch", "-lrt"]
        _run([compiler, "-shared", "-o", str(linked), *objects, *libraries])
        os.replace(linked, target)
    get_logger().info("built %s in %.0f s", library.name, time.monotonic() - started)


def _run(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_BUILD_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        raise KernelBuildError(
            f"the C++ compiler took over {_BUILD_TIMEOUT_S:.0f} s: {' '.join(command)}"
        ) from None
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines()
        raise KernelBuildError(
            f"the native kernels cannot be built: {(errors or ['the compiler said nothing'])[0].strip()} "
            f"(full output: {' '.join(command)})"
        )
