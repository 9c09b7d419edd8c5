"""Watching the ranks of a host from their first moment: deaths, stops, and who was first.

One thread waits for process ends (pidfd), for the ranks' output and for their reports, and looks at
process states for ranks that were stopped. The death of one rank makes the others fail in its wake,
within milliseconds: after the first sign of failure the ranks' stderr is held back until it is clear
which rank was first, so that its name is the first thing said. No torch.
"""

from __future__ import annotations

import os
import selectors
import signal
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from . import output, process, residency

# A rank killed by a signal is a first cause; one that raises may be a follower: wait for a cause this long.
_SETTLE_S = 0.25
# Ranks that lost a peer know no more than that; the peer's own end may take longer to be seen.
_SETTLE_FOLLOWER_S = 1.5
_FOLLOWERS = ("CollectiveError", "DistBackendError", "DistNetworkError", "DistStoreError", "DistError")
_FOLLOWERS_SAY = ("peer", "connection", "timed out")
_POLL_S = 0.25
# A stopped rank is given so many polls to go on: one that is merely suspended with its launcher
# (a batch system's suspend) must not be taken for a fault when both go on.
_STOPPED_POLLS = 8
_DRAIN_S = 0.5


@dataclass(frozen=True)
class Failure:
    """What failed first, as one sentence ("" where the rank has said it), and the job's exit code."""

    sentence: str
    exit_code: int
    elsewhere: bool = False  # on another host, which has told the others already


@dataclass
class _Sign:
    """One rank's way of failing, as far as it is known."""

    at: float
    exit_code: int | None = None
    reason: str = ""
    killed: bool = False  # by a signal that is not the launcher's
    follower: bool = False  # it only noticed that a peer had gone
    refused: str = ""


@dataclass
class _Rank:
    local_rank: int
    rank: int
    pid: int
    pidfd: int | None
    sampler: residency.Sampler
    stopped_polls: int = 0
    ended: bool = False


class Watch(threading.Thread):
    """The watch of one attempt. `failure` is set once, and said, as soon as it is clear."""

    def __init__(
        self,
        ranks_output: output.RankOutput,
        world_size: int,
        say: Callable[[Failure], None],
        news: Callable[[], tuple[str, int] | None],
        tell_memory: Callable[[int, residency.Residency], None] | None,
    ) -> None:
        """say: called once with the failure. news: a failure on another host, as (sentence, exit code).
        tell_memory: called with a local rank and where its memory lies, once that is loaded.
        """
        super().__init__(name="tp-launch watch", daemon=True)
        self.failure: Failure | None = None
        self._output = ranks_output
        self._world_size = world_size
        self._say = say
        self._news = news
        self._tell_memory = tell_memory
        self._ranks: dict[int, _Rank] = {}
        self._signs: dict[int, _Sign] = {}
        self._warned: set[str] = set()
        self._oom_kills_before = process.num_oom_kills()
        self._selector = selectors.DefaultSelector()
        self._quiet = threading.Event()  # the launcher ends the ranks itself: nothing is a failure now
        self._finish = threading.Event()
        self._wake_read, self._wake_write = os.pipe()

    def begin(self, pids: dict[int, int], global_ranks: dict[int, int]) -> None:
        """Watch these processes, by local rank."""
        for local_rank, pid in pids.items():
            try:
                pidfd: int | None = os.pidfd_open(pid)
            except OSError:
                pidfd = None  # no pidfds here, or the process has gone: polls find out
            rank = _Rank(local_rank, global_ranks[local_rank], pid, pidfd, residency.Sampler(pid))
            self._ranks[local_rank] = rank
            if pidfd is not None:
                self._selector.register(pidfd, selectors.EVENT_READ, rank)
        for stream in self._output.streams:
            self._selector.register(stream.read_fd, selectors.EVENT_READ, stream)
        self._selector.register(self._wake_read, selectors.EVENT_READ, None)
        self._output.started()
        self._output.on_report = self._on_report
        self.start()

    @property
    def goes_on(self) -> bool:
        """Whether ranks run, or one has failed and it is not yet clear which was first.

        Until this is over, nobody else may collect a rank that ended: how it ended is read here.
        """
        if not self.is_alive() or self._quiet.is_set() or self.failure is not None:
            return False
        return bool(self._signs) or not all(rank.ended for rank in self._ranks.values())

    def quiet(self) -> None:
        """From now on ranks end because they are told to."""
        self._quiet.set()

    def stop(self) -> None:
        """Read what is left of the ranks' output and end."""
        self._finish.set()
        if self.is_alive():
            os.write(self._wake_write, b"x")
            self.join()
        for rank in self._ranks.values():
            # Helper processes that a rank left behind in its group.
            process.kill_group(rank.pid, signal.SIGKILL)
            if rank.pidfd is not None:
                os.close(rank.pidfd)
        self._selector.close()
        os.close(self._wake_read)
        os.close(self._wake_write)
        self._output.close()

    def run(self) -> None:
        """The thread."""
        next_poll = time.monotonic() + _POLL_S
        deadline: float | None = None
        waiting = False
        while True:
            for key, _ in self._selector.select(timeout=0.05 if self._signs or waiting else _POLL_S):
                if isinstance(key.data, _Rank):
                    self._selector.unregister(key.fileobj)
                    self._look_for_end(key.data)
                elif isinstance(key.data, output.Stream):
                    if not self._output.read(key.data):
                        self._selector.unregister(key.fileobj)
                elif key.data is None:
                    os.read(self._wake_read, 1)
            now = time.monotonic()
            waiting = self._output.flush_partial_lines(now)
            if now >= next_poll:
                next_poll = now + _POLL_S
                self._poll_states()
                self._hear()
            self._decide(now)
            if self._finish.is_set():
                deadline = deadline if deadline is not None else now + _DRAIN_S
                open_streams = [
                    k for k in self._selector.get_map().values() if isinstance(k.data, output.Stream)
                ]
                if not open_streams or now > deadline:
                    self._decide(now, final=True)
                    return

    def residencies(self) -> dict[int, residency.Residency | None]:
        """Where each rank's memory was, by local rank; to be asked after stop()."""
        return {local_rank: rank.sampler.residency for local_rank, rank in self._ranks.items()}

    def _hear(self) -> None:
        """A failure on another host ends this host's ranks, too."""
        if (
            self.failure is not None
            or self._quiet.is_set()
            or any(sign.killed for sign in self._signs.values())
        ):
            return
        news = self._news()
        if news is not None:
            self._settle(Failure(*news, elsewhere=True))

    def _poll_states(self) -> None:
        for rank in self._ranks.values():
            self._look_for_end(rank)  # where there are no pidfds
            if rank.ended:
                continue
            if self._tell_memory is not None:
                rank.sampler.sample()
                found = rank.sampler.news()
                if found is not None:
                    self._tell_memory(rank.local_rank, found)
            state = process.state(rank.pid)
            rank.stopped_polls = rank.stopped_polls + 1 if state == "T" else 0
            if rank.stopped_polls == _STOPPED_POLLS and not self._quiet.is_set():
                seconds = _STOPPED_POLLS * _POLL_S
                reason = f"(pid {rank.pid}) has been stopped (SIGSTOP) for {seconds:g} s"
                self._sign(rank.rank, 128 + signal.SIGSTOP, reason).killed = True
                process.kill_group(rank.pid, signal.SIGKILL)

    def _look_for_end(self, rank: _Rank) -> None:
        """Note how a rank ended, if it has."""
        if rank.ended:
            return
        try:
            status = os.waitid(os.P_PID, rank.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:
            rank.ended = True  # collected already, by the agent that ends the ranks
            return
        if status is None:
            return
        if self._quiet.is_set():
            pass
        elif status.si_code != os.CLD_EXITED:
            name = signal.Signals(status.si_status).name + self._hint(status.si_status)
            self._sign(
                rank.rank, 128 + status.si_status, f"(pid {rank.pid}) was killed by {name}"
            ).killed = True
        elif status.si_status != 0:
            self._sign(rank.rank, status.si_status, "")
        rank.ended = True  # last: the agent may collect the rank from now on

    def _hint(self, signum: int) -> str:
        """What a signal most likely means, where there is evidence or but one usual cause."""
        if signum == signal.SIGKILL and process.num_oom_kills() > self._oom_kills_before:
            return " (the kernel's out-of-memory killer was at work; see dmesg, and generate.py --plan)"
        return " (/dev/shm may be full; see tp-launch doctor)" if signum == signal.SIGBUS else ""

    def _on_report(self, local_rank: int, document: dict[str, Any]) -> None:
        rank = self._ranks[local_rank].rank
        if document["kind"] == "warning":
            self._warn(str(document.get("text")))
        if self._quiet.is_set() or self.failure is not None:
            return
        if document["kind"] == "raised":
            name, text = str(document.get("type")), str(document.get("text"))
            sign = self._sign(
                rank, None, f"raised {name}: {text.splitlines()[0]}" if text else f"raised {name}"
            )
            sign.follower = name in _FOLLOWERS or any(word in text.lower() for word in _FOLLOWERS_SAY)
        elif document["kind"] == "exits":
            self._sign(rank, int(document.get("code") or 1), "")
        elif document["kind"] == "refused":
            self._sign(rank, 2, "").refused = str(document.get("text"))

    def _warn(self, text: str) -> None:
        if text not in self._warned:
            self._warned.add(text)
            output.say(f"warning: {text}")

    def _sign(self, rank: int, exit_code: int | None, reason: str) -> _Sign:
        sign = self._signs.setdefault(rank, _Sign(time.monotonic()))
        sign.exit_code = exit_code if exit_code is not None else sign.exit_code
        sign.reason = sign.reason or reason
        if self.failure is None:
            self._output.hold()
        return sign

    def _decide(self, now: float, final: bool = False) -> None:
        if not self._signs or self.failure is not None or self._quiet.is_set():
            if self._quiet.is_set():
                self._output.release()
            return
        killed = [(sign.at, rank) for rank, sign in self._signs.items() if sign.killed]
        causes = [(sign.at, rank) for rank, sign in self._signs.items() if not sign.follower]
        first = min(killed or causes or [(sign.at, rank) for rank, sign in self._signs.items()])
        settle = _SETTLE_S if causes else _SETTLE_FOLLOWER_S
        if not killed and not final and now - min(sign.at for sign in self._signs.values()) < settle:
            return
        self._settle(self._describe(first[1], self._signs[first[1]]))

    def _settle(self, failure: Failure) -> None:
        self.failure = failure
        self._say(failure)
        self._output.release()

    def _describe(self, rank: int, sign: _Sign) -> Failure:
        code = sign.exit_code if sign.exit_code is not None else 1
        if sign.refused:
            return Failure(f"error: {sign.refused}", code)
        local_rank = next(r.local_rank for r in self._ranks.values() if r.rank == rank)
        if code == 2 and not sign.reason and self._output.last_line(local_rank).startswith("error: "):
            return Failure("", code)
        reason = sign.reason or f"exited with code {code}"
        return Failure(f"error: rank {rank} of {self._world_size} on {socket.gethostname()} {reason}", code)
