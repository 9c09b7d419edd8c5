"""Starting the ranks of a measurement: a tp-launch each, whose last line is the document. No torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import LaunchError

_GRACE_S = 15.0


class RunFailed(Exception):
    """The ranks ended with `code` and have said why on stderr."""

    def __init__(self, code: int) -> None:
        super().__init__(f"the measurement ended with code {code}")
        self.code = code


def run_ranks(
    words: Sequence[str],
    nproc: int,
    *,
    numa: bool = True,
    timeout_s: float,
    variables: Mapping[str, str] | None = None,
    quiet: bool = False,
) -> dict[str, Any]:
    """Measure `bench.py WORDS` over `nproc` ranks; its document.

    variables: the ranks' environment beyond this process's own. quiet: keep their lines for people back.
    Raises RunFailed where they fail, LaunchError where they take longer than timeout_s.
    """
    launcher = [sys.executable, "-m", "tp_runtime.launch.cli", "--nproc", str(nproc)]
    program = ["--module", "tp_runtime.bench", *words, "--json"]
    return run_program(
        [*launcher, *(["--numa"] if numa else []), *program],
        timeout_s=timeout_s,
        variables=variables,
        quiet=quiet,
    )


def run_program(
    command: Sequence[str],
    *,
    timeout_s: float,
    variables: Mapping[str, str] | None = None,
    quiet: bool = False,
) -> dict[str, Any]:
    """Run a program whose last line of stdout is a JSON document; the document. As run_ranks."""
    child = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **(variables or {})},
    )
    try:
        stdout, _ = child.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        raise LaunchError(
            f"a measurement took longer than {timeout_s:g} s; raise --timeout, or measure less (--layers)"
        ) from None
    finally:
        _end(child)
    if child.returncode:
        raise RunFailed(child.returncode)
    *lines, last = stdout.splitlines() or [""]
    if lines and not quiet:
        sys.stdout.write("\n".join(lines) + "\n")
        sys.stdout.flush()
    try:
        return dict(json.loads(last))
    except ValueError:
        raise LaunchError(f"a measurement ended without a document; its last line is {last[:80]!r}") from None


def _end(child: subprocess.Popen[str]) -> None:
    """Leave nothing running: tp-launch ends its ranks when asked to."""
    if child.poll() is not None:
        return
    child.terminate()
    try:
        child.wait(_GRACE_S)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()
