"""Chat templates: a jinja2 template from the model turns messages into the prompt's text.

Rendering happens in a child process (see template_worker.py), because a template is untrusted code: a
time limit that holds in any thread, a limit of memory, and a limit of output. The child starts at the
first rendering (about 0.1 s), serves later ones in well under a millisecond, and ends with this process:
its input closes. Standard library only.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Mapping
from pathlib import Path

from ..errors import RequestError, TokenizerError

TIME_LIMIT_S = 2.0
MAX_CHARS = 8 * 2**20
MEMORY_LIMIT_BYTES = 2**30
_START_TIMEOUT_S = 60.0  # start of the child on a busy machine; the template's own time is its timer's
_WORKER = Path(__file__).with_name("template_worker.py")


def _stop(child: subprocess.Popen, owner_pid: int) -> None:
    """End the child and close its pipes; in a process forked from its owner, leave it alone."""
    if os.getpid() != owner_pid:
        return
    child.kill()
    child.wait()
    for pipe in (child.stdin, child.stdout):
        if pipe is not None:
            try:
                pipe.close()
            except BrokenPipeError:
                pass  # a half-written request to a child that has died


class ChatTemplate:
    """One template, its limits, and the child that renders it. May be used from any thread.

    source: jinja2. time_limit_s: seconds a rendering may take. max_chars: characters it may write.
    """

    def __init__(
        self, source: str, *, time_limit_s: float = TIME_LIMIT_S, max_chars: int = MAX_CHARS
    ) -> None:
        self.source, self.time_limit_s, self.max_chars = source, time_limit_s, max_chars
        self._lock = threading.Lock()
        self._child: subprocess.Popen | None = None
        self._owner_pid = 0
        self._finalizer: weakref.finalize | None = None

    def render(self, variables: Mapping[str, object]) -> str:
        """The template's text for `variables` (plain JSON values).

        Raises TokenizerError for a template that is wrong, refuses, or exceeds a limit; RequestError for
        variables that are no JSON.
        """
        request = {
            "template": self.source,
            "variables": dict(variables),
            "time_limit_s": self.time_limit_s,
            "max_chars": self.max_chars,
        }
        try:
            line = json.dumps(request).encode("ascii") + b"\n"
        except (TypeError, ValueError, RecursionError) as error:
            raise RequestError(f"the messages are no plain JSON data: {error}") from None
        with self._lock:
            reply = self._exchange(line)
        if "error" in reply:
            raise TokenizerError(" ".join(f"the chat template {reply['error']}".split()))
        return reply["text"]

    def close(self) -> None:
        """End the child, if there is one; the next rendering starts another."""
        with self._lock:
            self._forget_child()

    def _exchange(self, line: bytes) -> dict:
        child = self._running_child()
        assert child.stdin is not None and child.stdout is not None, "the child has pipes"
        watchdog = threading.Timer(_START_TIMEOUT_S + self.time_limit_s, child.kill)
        watchdog.daemon = True
        watchdog.start()
        try:
            child.stdin.write(line)
            child.stdin.flush()
            answer = child.stdout.readline()
        except BrokenPipeError:
            answer = b""
        finally:
            watchdog.cancel()
        if answer.endswith(b"\n"):
            return json.loads(answer)
        code = child.wait()
        self._forget_child()
        if code == -signal.SIGALRM:
            return {"error": f"took longer than {self.time_limit_s:g} s and was stopped"}
        return {"error": f"could not be rendered: its process ended with code {code}"}

    def _running_child(self) -> subprocess.Popen:
        """The child; a new one where there is none, it has died, or we were forked from its owner."""
        if self._child is not None and self._owner_pid == os.getpid() and self._child.poll() is None:
            return self._child
        self._forget_child()
        self._child = subprocess.Popen(
            [sys.executable, "-P", str(_WORKER), str(MEMORY_LIMIT_BYTES)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is for us; the child ends when its input closes
        )
        self._owner_pid = os.getpid()
        self._finalizer = weakref.finalize(self, _stop, self._child, self._owner_pid)
        return self._child

    def _forget_child(self) -> None:
        if self._finalizer is not None:
            self._finalizer()
        self._child = self._finalizer = None
