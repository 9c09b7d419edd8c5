"""Starting the ranks of a measurement: a tp-launch each, whose last line is the document. No torch."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from typing import IO, Any

from ..errors import LaunchError

_GRACE_S = 15.0


class RunFailed(Exception):
    """The ranks ended with `code` and have said why on stderr."""

    def __init__(self, code: int) -> None:
        how = f"by {signal.Signals(-code).name}" if code < 0 else f"with code {code}"
        super().__init__(f"the measurement ended {how}")
        self.code = code


class Progress:
    """How many of `total` steps are done, and how long the rest will take at their pace."""

    def __init__(self, total: int) -> None:
        self._total, self._done, self._started = total, 0, time.monotonic()

    def step(self) -> str:
        """One more is done; as "[3/12, 4 min left]"."""
        self._done += 1
        left = (time.monotonic() - self._started) / self._done * (self._total - self._done)
        rest = f"{left / 60:.0f} min left" if left >= 60 else f"{left:.0f} s left"
        return f"[{self._done}/{self._total}, {rest}]"


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
    assert child.stdout is not None, "a pipe was asked for"
    last = [""]
    reader = threading.Thread(target=_pass_on, args=(child.stdout, last, quiet), daemon=True)
    reader.start()
    try:
        child.wait(timeout_s)
    except subprocess.TimeoutExpired:
        raise LaunchError(
            f"a measurement took longer than {timeout_s:g} s; raise --timeout, or measure less (--layers)"
        ) from None
    finally:
        _end(child)
        reader.join(_GRACE_S)
    if child.returncode:
        raise RunFailed(child.returncode)
    try:
        return dict(json.loads(last[0]))
    except ValueError:
        raise LaunchError(
            f"a measurement ended without a document; its last line is {last[0][:80]!r}"
        ) from None


def _pass_on(stdout: IO[str], last: list[str], quiet: bool) -> None:
    """Show a program's lines as they come, all but the last, which is left in last[0]."""
    with stdout:
        for line in stdout:
            if last[0] and not quiet:
                sys.stdout.write(last[0])
                sys.stdout.flush()
            last[0] = line


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
