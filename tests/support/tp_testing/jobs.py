"""tp-launch as a user runs it: a process with its own temporary folder, and what it leaves behind."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[3]
SCRIPTS = REPOSITORY / "tests" / "launch" / "scripts"
COMMAND = [sys.executable, "-m", "tp_runtime.launch.cli"]


@dataclass(frozen=True)
class Outcome:
    """How a launch ended."""

    code: int
    stdout: str
    stderr: str
    seconds: float

    @property
    def sentences(self) -> list[str]:
        """The launcher's and ranks' lines on stderr, warnings left out."""
        return [line for line in self.stderr.splitlines() if line and not line.startswith("warning: ")]


class Launch:
    """One running tp-launch. `folder` is its temporary folder, and the token its processes are known by."""

    def __init__(
        self, words: list[str], folder: Path, wrapper: list[str] | None = None, **variables: str
    ) -> None:
        self.folder = folder
        self.temporary = folder / "tmp"
        self.temporary.mkdir(parents=True)
        self._out, self._err = folder / "stdout", folder / "stderr"
        inherited = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
        with self._out.open("wb") as out, self._err.open("wb") as err:
            self.process = subprocess.Popen(
                [*(wrapper or []), *COMMAND, *words],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                cwd=folder,
                env={**inherited, "TMPDIR": str(self.temporary), **variables},
                start_new_session=True,
                # A test run in the background of a shell ignores Ctrl-C, and so would the launcher.
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
            )
        self._started = time.monotonic()

    def wait(self, timeout: float) -> Outcome:
        """The end, within `timeout` seconds from now; a launch that takes longer is killed and fails."""
        started = time.monotonic()
        try:
            code = self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.kill_everything()
            raise AssertionError(f"no end within {timeout} s; stderr:\n{self._err.read_text()}") from None
        return Outcome(
            code,
            self._out.read_text(errors="replace"),
            self._err.read_text(errors="replace"),
            time.monotonic() - started,
        )

    def stdout_so_far(self) -> str:
        """What has arrived on stdout."""
        return self._out.read_text(errors="replace")

    def facts(self, ranks: int, attempt: int = 0, timeout: float = 60.0) -> list[dict[str, Any]]:
        """What scripts/stages.py wrote for each rank, once all have reached their stage."""
        deadline = time.monotonic() + timeout
        paths = [self.folder / f"rank{rank}.attempt{attempt}" for rank in range(ranks)]
        while not all(path.exists() for path in paths):
            if time.monotonic() > deadline or self.process.poll() is not None:
                self.kill_everything()
                raise AssertionError(f"ranks did not get there; stderr:\n{self._err.read_text()}")
            time.sleep(0.02)
        return [json.loads(path.read_text()) for path in paths]

    def leftovers(self, facts: list[dict[str, Any]], patience: float = 5.0) -> list[str]:
        """Processes, shared memory and temporary files that outlive the job; none is what should be."""
        deadline = time.monotonic() + patience
        while found := self._leftovers(facts):
            if time.monotonic() > deadline:
                return found
            time.sleep(0.05)
        return []

    def _leftovers(self, facts: list[dict[str, Any]]) -> list[str]:
        names = [str(fact["pid"]) for fact in facts] + [str(fact["job"]) for fact in facts]
        pattern = re.compile(rf"\b({'|'.join(map(re.escape, names))})\b") if names else None
        shared = [name for name in os.listdir("/dev/shm") if pattern and pattern.search(name)]
        temporary = [str(path) for path in self.temporary.iterdir()]
        return [f"process {pid}" for pid in self._pids()] + shared + temporary

    def _pids(self) -> list[int]:
        """Processes that carry the folder in their command line or environment."""
        token, found = str(self.folder).encode(), []
        for entry in os.listdir("/proc"):
            if not entry.isdigit() or int(entry) == os.getpid():
                continue
            try:
                text = (
                    Path(f"/proc/{entry}/cmdline").read_bytes() + Path(f"/proc/{entry}/environ").read_bytes()
                )
            except OSError:
                continue
            if token in text and self.process.pid != int(entry):
                found.append(int(entry))
        return found

    def kill_everything(self) -> None:
        """Leave nothing running, whatever happened."""
        for pid in [*self._pids(), *([self.process.pid] if self.process.poll() is None else [])]:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        self.process.wait()
