"""The kernels' suites once more, on the fallback instruction set, in one process that is limited to it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tp_runtime.kernels.cpu import build

FILES = ("test_linear.py", "test_attention.py")
# One spawns processes of its own for every instruction set; the others' graphs know of none.
LEFT_OUT = "not every_instruction_set and not under_compile"


def test_suites_under_avx2() -> None:
    build.load()
    paths = [str(Path(__file__).with_name(name)) for name in FILES]
    command = [sys.executable, "-m", "pytest", "-q", "--import-mode=importlib", "-k", LEFT_OUT, *paths]
    environ = os.environ | {"TP_CPU_ISA": "avx2"}
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-3000:]
    assert " passed" in done.stdout
