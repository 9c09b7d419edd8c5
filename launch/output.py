"""Ranks' stdout and stderr on their way to the user: pipes, prefixes, log files.

By default rank 0's stdout is the launcher's own (not a byte passes through here, so that a streamed
answer appears token by token), other ranks' stdout is dropped, and every rank's stderr is read here:
rank 0's is passed on as it is, the others' with "[rank N] " before each line.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

from ..errors import LaunchError
from .reports import MARK, parse

Report = Callable[[int, dict[str, Any]], None]
_CHUNK = 1 << 16
_PARTIAL_LINE_S = 0.1


@dataclass
class Stream:
    """One output of one rank: a pipe whose write end the rank inherits."""

    local_rank: int
    is_stderr: bool
    prefix: bytes
    shown: bool
    log: FileIO | None
    read_fd: int
    write_fd: int
    at_line_start: bool = True
    pending: bytes = b""  # the beginning of a line, kept for its rest or a moment
    pending_since: float = 0.0
    last_line: bytes = b""

    @property
    def path(self) -> str:
        """A name under which this process can open the write end."""
        return f"/proc/self/fd/{self.write_fd}"


class RankOutput:
    """All ranks' streams of one attempt, and what is shown of them."""

    def __init__(
        self, ranks: dict[int, int], *, log_dir: Path | None, show_all: bool, attempt: int, on_report: Report
    ) -> None:
        """ranks: global rank by local rank. show_all: every stream of every rank, prefixed."""
        self.on_report = on_report
        self.held: list[tuple[int, bytes]] | None = None
        self.stdout_paths: dict[int, str] = {}
        self.stderr_paths: dict[int, str] = {}
        self.streams: list[Stream] = []
        for local_rank, rank in ranks.items():
            folder = None if log_dir is None else _log_folder(log_dir, attempt, rank)
            prefix = f"[rank {rank}] ".encode() if show_all or rank > 0 else b""
            err = self._open(local_rank, True, prefix, True, folder)
            self.stderr_paths[local_rank] = err.path
            shown = show_all or rank == 0
            if folder is not None or show_all:
                self.stdout_paths[local_rank] = self._open(local_rank, False, prefix, shown, folder).path
            else:
                self.stdout_paths[local_rank] = "" if shown else os.devnull

    def _open(
        self, local_rank: int, is_stderr: bool, prefix: bytes, shown: bool, folder: Path | None
    ) -> Stream:
        read_fd, write_fd = os.pipe()
        os.set_blocking(read_fd, False)
        name = "stderr.log" if is_stderr else "stdout.log"
        log = None if folder is None else open(folder / name, "wb", buffering=0)  # noqa: SIM115
        stream = Stream(local_rank, is_stderr, prefix, shown, log, read_fd, write_fd)
        self.streams.append(stream)
        return stream

    def started(self) -> None:
        """The ranks have their ends; close ours, so that the pipes end when the ranks do."""
        for stream in self.streams:
            if stream.write_fd >= 0:
                os.close(stream.write_fd)
                stream.write_fd = -1

    def read(self, stream: Stream) -> bool:
        """Pass on what a stream has. False at its end."""
        try:
            data = os.read(stream.read_fd, _CHUNK)
        except BlockingIOError:
            return True
        if data:
            self._pass_on(stream, data)
        else:
            self._flush(stream)
        return bool(data)

    def flush_partial_lines(self, now: float) -> bool:
        """Show beginnings of lines whose rest does not come (prompts, progress bars). True if some wait."""
        waiting = False
        for stream in self.streams:
            if stream.pending and now - stream.pending_since > _PARTIAL_LINE_S:
                self._flush(stream)
            waiting = waiting or bool(stream.pending)
        return waiting

    def hold(self) -> None:
        """Keep back what would be shown, until release: something else has to be said first."""
        if self.held is None:
            self.held = []

    def release(self) -> None:
        """Show what was kept back."""
        held, self.held = self.held, None
        for fd, data in held or ():
            _write(fd, data)

    def close(self) -> None:
        """Close all pipes and log files."""
        self.release()
        self.started()
        for stream in self.streams:
            os.close(stream.read_fd)
            if stream.log is not None:
                stream.log.close()
        self.streams.clear()

    def last_line(self, local_rank: int) -> str:
        """The last complete line a rank wrote to stderr."""
        for stream in self.streams:
            if stream.local_rank == local_rank and stream.is_stderr:
                return stream.last_line.decode("utf-8", "replace").strip()
        return ""

    def _pass_on(self, stream: Stream, data: bytes) -> None:
        if not stream.is_stderr and not stream.prefix:
            self._show(stream, data)
            return
        *lines, rest = (stream.pending + data).splitlines(keepends=True)
        stream.pending = b""
        if rest.endswith((b"\n", b"\r")):
            lines.append(rest)
        else:
            stream.pending, stream.pending_since = rest, time.monotonic()
        for line in lines:
            before, mark, after = line.partition(MARK)
            document = parse(mark + after) if stream.is_stderr and mark else None
            if document is not None:
                # What a progress bar or a prompt left without an end of line gets one.
                stream.last_line = before if before.strip() else stream.last_line
                if before or stream.shown and not stream.at_line_start:
                    self._show(stream, before + b"\n")
                self.on_report(stream.local_rank, document)
                continue
            stream.last_line = line if line.strip() else stream.last_line
            self._show(stream, line)

    def _flush(self, stream: Stream) -> None:
        if stream.pending:
            self._show(stream, stream.pending)
            stream.pending = b""

    def _show(self, stream: Stream, data: bytes) -> None:
        if stream.log is not None:
            stream.log.write(data)
        if not stream.shown:
            return
        fd = 2 if stream.is_stderr else 1
        if stream.prefix:
            data = self._prefixed(stream, data)
        else:
            stream.at_line_start = data.endswith((b"\n", b"\r"))
        if self.held is not None and stream.is_stderr:
            self.held.append((fd, data))
        else:
            _write(fd, data)

    def _prefixed(self, stream: Stream, data: bytes) -> bytes:
        parts = []
        for line in data.splitlines(keepends=True):
            # The project's own log lines name their rank already, and so do torch's tracebacks.
            if stream.at_line_start and not line.startswith(b"[rank"):
                parts.append(stream.prefix)
            parts.append(line)
            stream.at_line_start = line.endswith((b"\n", b"\r"))
        return b"".join(parts)


def say(text: str) -> None:
    """One line of the launcher's own on stderr."""
    _write(2, text.encode() + b"\n")


def _log_folder(log_dir: Path, attempt: int, rank: int) -> Path:
    folder = log_dir / f"attempt_{attempt}" / f"rank_{rank}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LaunchError(
            f"--log-dir {log_dir}: {error.strerror}; give a folder that can be written"
        ) from None
    return folder


def _write(fd: int, data: bytes) -> None:
    try:
        if fd == 1:
            sys.stdout.flush()
        while data:
            data = data[os.write(fd, data) :]
    except OSError:
        pass  # nobody reads any more; the job itself goes on
