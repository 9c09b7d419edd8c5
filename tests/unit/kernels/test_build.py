"""Building C++ libraries: once, under a lock no kill can leave behind, and without a compiler."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from tp_runtime import native
from tp_runtime.errors import ConfigError, KernelBuildError
from tp_runtime.kernels.cpu.read_ceiling import STREAMS, last_level_cache_bytes, read_ceiling

LOAD = """
    import sys
    from pathlib import Path
    from tp_runtime import native
    from tp_runtime.errors import TPError
    try:
        native.load(native.Library("tp_test", (native.Source(Path(sys.argv[1])),), ()))
    except TPError as error:
        sys.exit(f"{type(error).__name__}: {error}")
"""


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "answer.cpp"
    path.write_text('extern "C" int answer() { return 42; }\n')
    return path


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("TP_CACHE_DIR", str(folder))
    return folder


def _library(source: Path) -> native.Library:
    return native.Library("tp_test", (native.Source(source),), ())


def _start(source: Path, **environ: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", textwrap.dedent(LOAD), str(source)]
    return subprocess.Popen(command, env=os.environ | environ, stderr=subprocess.PIPE, text=True)


def _slow_compiler(folder: Path, seconds: float) -> str:
    """A compiler that takes its time, except to say its version."""
    script = folder / "slow-c++"
    script.write_text(f'#!/bin/sh\n[ "$1" = --version ] || sleep {seconds}\nexec c++ "$@"\n')
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    return str(script)


def _built(cache: Path) -> list[Path]:
    return sorted((cache / "native").glob("*.so"))


def test_built_once_and_again_when_the_source_changes(source: Path, cache: Path) -> None:
    native.load(_library(source))
    (first,) = _built(cache)
    changed = first.stat().st_mtime_ns
    native.load(_library(source))
    assert _built(cache) == [first] and first.stat().st_mtime_ns == changed
    source.write_text('extern "C" int answer() { return 43; }\n')
    native.load(_library(source))
    assert len(_built(cache)) == 2


def test_others_wait_and_say_so(source: Path, cache: Path, tmp_path: Path) -> None:
    slow = _slow_compiler(tmp_path, 3)
    ranks = [_start(source, CXX=slow) for _ in range(2)]
    said = [process.communicate(timeout=120)[1] for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0], said
    assert sum("waiting for it" in text for text in said) == 1, said
    assert sum("building tp_test (once" in text for text in said) == 1, said
    assert len(_built(cache)) == 1


def test_a_killed_builder_leaves_no_lock(source: Path, cache: Path, tmp_path: Path) -> None:
    slow = _slow_compiler(tmp_path, 30)
    killed = _start(source, CXX=slow)
    deadline = time.monotonic() + 60
    while not list((cache / "native").glob("*.build-*")):
        assert time.monotonic() < deadline and killed.poll() is None
        time.sleep(0.05)
    killed.kill()
    killed.wait()
    # The same compiler, quick now: the same digest, lock and folder.
    _slow_compiler(tmp_path, 0)
    after = _start(source, CXX=slow)
    _, said = after.communicate(timeout=60)
    assert after.returncode == 0 and "waiting" not in said, said
    assert len(_built(cache)) == 1 and not list((cache / "native").glob("*.build-*"))


def test_a_broken_source_says_its_first_error(source: Path, cache: Path) -> None:
    source.write_text("int answer() { return nonsense; }\n")
    with pytest.raises(KernelBuildError, match="nonsense"):
        native.load(_library(source))
    assert not _built(cache) and not list((cache / "native").glob("*.build-*"))


def test_no_compiler(source: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "/nowhere/c++")
    with pytest.raises(KernelBuildError, match="install g"):
        native.load(_library(source))


def test_a_cache_that_cannot_be_written(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TP_CACHE_DIR", str(tmp_path / "file" / "below"))
    with pytest.raises(ConfigError, match="TP_CACHE_DIR"):
        native.load(_library(source))


FALLBACK = """
    import torch
    from tp_runtime.kernels.attention import cache_write, paged_attention
    from tp_runtime.kernels.linear import prepare, prepare_plain, weight_only_linear
    kinds, x = [], torch.randn(2, 64)
    for bits, group, shape in ((8, 0, (16, 64)), (4, 32, (16, 32)), (4, 32, (7, 32))):
        dtype = torch.int8 if bits == 8 else torch.uint8
        scale = torch.rand(shape[0], 2).half() if group else torch.rand(shape[0])
        weight = [
            prepare(torch.randint(0, 100, shape, dtype=dtype, generator=torch.Generator().manual_seed(0)), scale, None,
                    bits=bits, group_size=group, head=0, n=shape[0], k=64, backend=backend)
            for backend in ("auto", "reference")
        ]
        kinds.append(weight[0].kind)
        torch.testing.assert_close(*(weight_only_linear(x, w) for w in weight), rtol=1e-5, atol=1e-3)
    kinds.append(prepare_plain(torch.randn(8, 64)).kind)
    cache = torch.zeros(2, 1, 8, 16)
    cache_write(torch.ones(1, 1, 16), torch.ones(1, 1, 16), cache, cache.clone(), torch.tensor([0]))
    assert cache.sum() == 16
    print(*kinds)
"""


def test_without_a_compiler_torchs_ops_serve(tmp_path: Path) -> None:
    environ = os.environ | {"CXX": "/nowhere/c++", "TP_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", textwrap.dedent(FALLBACK)]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["aten_int8", "aten_int4", "reference", "plain"]
    assert done.stderr.count("no C++ compiler is found") == 1, done.stderr


def test_an_instruction_set_that_is_unknown(tmp_path: Path) -> None:
    code = "from tp_runtime.kernels.cpu import build; build.load()"
    environ = os.environ | {"TP_CPU_ISA": "mmx"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environ, capture_output=True, text=True, timeout=120
    )
    assert "TP_CPU_ISA='mmx' is not known; use one of avx2, avx512, amx" in done.stderr


def test_read_ceiling() -> None:
    assert last_level_cache_bytes() >= 1 << 20
    by_streams = read_ceiling(32 << 20, repeat=1)
    assert set(by_streams) == set(STREAMS) and all(gb_s > 0.1 for gb_s in by_streams.values())
    command = [sys.executable, "-m", "tp_runtime.kernels.cpu.read_ceiling", "--json", "--threads", "1"]
    done = subprocess.run([*command, "--bytes", str(8 << 20)], capture_output=True, text=True, timeout=120)
    assert json.loads(done.stdout)["threads"] == 1 and json.loads(done.stdout)["gb_s"] > 0.1, done.stderr
