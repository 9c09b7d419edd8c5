"""The public surface: small, sorted, lazy, and under one import name."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

import tp_runtime


def run(code: str, cwd: str | None = None) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_all_is_sorted_and_visible() -> None:
    assert list(tp_runtime.__all__) == sorted(tp_runtime.__all__)
    assert dir(tp_runtime) == list(tp_runtime.__all__)
    for name in tp_runtime.__all__:
        assert getattr(tp_runtime, name) is not None


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = tp_runtime.nonsense


def test_import_is_light() -> None:
    """Without torch, and a small share of a bare interpreter's time (0.1 s is the promise)."""
    code = (
        "import sys, time; t = time.perf_counter(); import tp_runtime; "
        "print(time.perf_counter() - t, 'torch' in sys.modules, 'numpy' in sys.modules)"
    )
    seconds, torch_loaded, numpy_loaded = min(run(code) for _ in range(3)).split()
    assert (torch_loaded, numpy_loaded) == ("False", "False")
    assert float(seconds) < 0.1, f"import tp_runtime took {seconds} s"


@pytest.mark.parametrize("name", ["launch", "models", "quant", "configs"])
def test_a_bare_folder_name_is_refused(name: str, repository: object) -> None:
    code = (
        f"import sys; sys.path.insert(0, {str(repository)!r})\n"
        f"try:\n    import {name}\nexcept ImportError as error:\n    print(error)"
    )
    assert f"import tp_runtime.{name}" in run(code)


def test_importing_everything_loads_no_bare_folder() -> None:
    """Modules of the GPU need Triton, which comes with torch's CUDA builds only; nothing else may be missing."""
    code = (
        "import importlib, pkgutil, sys, tp_runtime\n"
        "missing = set()\n"
        "for m in pkgutil.walk_packages(tp_runtime.__path__, 'tp_runtime.'):\n"
        "    if m.name.endswith('__main__'): continue\n"
        "    try: importlib.import_module(m.name)\n"
        "    except ModuleNotFoundError as error: missing.add(error.name)\n"
        "print(sorted(missing - {'triton'}), sorted({'launch', 'models', 'quant', 'configs'} & set(sys.modules)))"
    )
    assert run(code, cwd="/").split() == ["[]", "[]"]


def test_help_answers_fast() -> None:
    """tp-launch --help within 0.3 s: the best of three, because the machine may be busy."""
    code = "import sys; sys.argv = ['tp-launch', '--help']; from tp_runtime.launch.cli import main; main()"
    best = 1e9
    for _ in range(3):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60)
        best = min(best, time.perf_counter() - start)
    assert best < 0.3, f"tp-launch --help took {best:.2f} s"
