"""torchrun's elastic agent with a watch over its ranks.

Imports torch, as rendezvous.py does: `spawn` imports both inside the function that starts ranks. The
agent keeps rendezvous, restarts and process groups; added here, in the methods torch's agents are made
by (_start_workers, _monitor_workers, _shutdown), are who failed first and why (watch.py), a grace period
that also holds after failures, and signals: the first is passed on to the ranks, a second kills them.
"""

from __future__ import annotations

import logging
import signal
from collections.abc import Callable
from inspect import signature
from pathlib import Path
from types import FrameType
from typing import Any

from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerSpec, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import LogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.api import LogsDest

from . import output, process, residency
from .rendezvous import LoopbackRendezvous
from .watch import Failure, Watch

_ENDING_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
_FORWARDED_SIGNALS = (signal.SIGUSR1, signal.SIGUSR2)


class RankStreams(LogsSpecs):
    """Where the agent sends ranks' output, and what each rank's environment has beside torchrun's."""

    def __init__(
        self, extra_env: Callable[[int], dict[str, str]], log_dir: Path | None, show_all: bool
    ) -> None:
        super().__init__()
        self._extra_env = extra_env
        self._log_dir = log_dir
        self._show_all = show_all
        self.output: output.RankOutput | None = None

    def reify(self, envs: dict[int, dict[str, str]]) -> LogsDest:
        """Pipes for the attempt that is about to start; called by the agent with the ranks' variables."""
        for local_rank, variables in envs.items():
            # The agent hands on the launcher's OMP_NUM_THREADS, a rank's own comes from its placement.
            variables.update(self._extra_env(local_rank))
            variables["TORCHELASTIC_ERROR_FILE"] = ""
        self.output = output.RankOutput(
            {local_rank: int(variables["RANK"]) for local_rank, variables in envs.items()},
            log_dir=self._log_dir,
            show_all=self._show_all,
            attempt=int(envs[0]["TORCHELASTIC_RESTART_COUNT"]),
            on_report=lambda local_rank, document: None,
        )
        nowhere = dict.fromkeys(envs, "/dev/null")
        return LogsDest(self.output.stdout_paths, self.output.stderr_paths, {}, {}, nowhere)

    @property
    def root_log_dir(self) -> str:
        """For the agent's own messages."""
        return str(self._log_dir or "")


class Agent(LocalElasticAgent):
    """The elastic agent of one host."""

    def __init__(
        self,
        spec: WorkerSpec,
        rendezvous: LoopbackRendezvous,
        streams: RankStreams,
        grace_period_s: float,
        own_nodes: list[tuple[int, ...]] | None,
    ) -> None:
        """own_nodes: each local rank's memory nodes, to report what share of its memory lies there."""
        super().__init__(spec, streams, exit_barrier_timeout=30)
        # An argument of the constructor from torch 2.12 on.
        self._shutdown_timeout = max(1, round(grace_period_s))
        for name, logger in logging.root.manager.loggerDict.items():
            if name.startswith("torch.distributed.elastic") and isinstance(logger, logging.Logger):
                logger.setLevel(logging.CRITICAL)  # its news are told here in one sentence each
        self._rendezvous_handler = rendezvous
        self._streams = streams
        self._own_nodes = own_nodes
        self._grace_period_s = grace_period_s
        self._watch: Watch | None = None
        self._ending = False
        # nohup and shells' background jobs ignore some of them; so does their launcher.
        self._ignored = {signum for signum in _ENDING_SIGNALS if signal.getsignal(signum) == signal.SIG_IGN}
        self.failure: Failure | None = None

    def all_ended_well(self) -> bool:
        """Whether every rank of the last attempt exited with 0, as a server does after SIGTERM."""
        handlers = getattr(self._pcontext, "subprocess_handlers", {}).values()
        return bool(handlers) and all(handler.proc.poll() == 0 for handler in handlers)

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        self._end_watch()
        self.failure = None
        pids = super()._start_workers(worker_group)
        assert self._streams.output is not None, "the agent starts ranks without asking for their streams"
        world_size = worker_group.workers[0].world_size
        self._watch = Watch(
            self._streams.output,
            world_size,
            self._say,
            self._rendezvous_handler.news,
            self._tell_memory if self._own_nodes is not None else None,
        )
        self._watch.begin(pids, {worker.local_rank: worker.global_rank for worker in worker_group.workers})
        for signum in _ENDING_SIGNALS:
            signal.signal(signum, signal.SIG_IGN if signum in self._ignored else self._on_signal)
        for signum in _FORWARDED_SIGNALS:
            signal.signal(signum, self._forward)
        return pids

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        if self._watch is not None and self._watch.goes_on:
            # Not torch's poll: it would collect a rank before the watch has read how it ended.
            return RunResult(state=WorkerState.HEALTHY)
        if self._watch is not None and self._watch.failure is not None:
            self.failure = self._watch.failure
            self._watch.quiet()
            self._close(signal.SIGTERM)
            if self.failure.elsewhere:
                # The ranks here may end well when told to; the job has failed all the same.
                return RunResult(state=WorkerState.FAILED)
        return super()._monitor_workers(worker_group)

    def _shutdown(self, death_sig: signal.Signals = signal.SIGTERM, timeout: int = 30) -> None:
        if self._watch is not None:
            self._watch.quiet()
        self._close(death_sig)
        # With a time limit from torch 2.12 on; before that it is the process context's own.
        limit = (self._shutdown_timeout,) if "timeout" in signature(super()._shutdown).parameters else ()
        super()._shutdown(death_sig, *limit)
        self._end_watch()

    def _close(self, death_sig: signal.Signals) -> None:
        if self._pcontext is not None:
            # The agent's own type is whole seconds; fractions work as well.
            self._pcontext.close(death_sig, self._grace_period_s)  # type: ignore[arg-type]

    def _end_watch(self) -> None:
        if self._watch is not None:
            self._watch.stop()
            self.failure = self.failure or self._watch.failure
            if self._own_nodes is not None:
                for local_rank, found in self._watch.residencies().items():
                    self._tell_memory(local_rank, found, "at the end")
            self._watch = None

    def _tell_memory(self, local_rank: int, found: residency.Residency | None, when: str = "loaded") -> None:
        assert self._own_nodes is not None
        rank = self._worker_group.workers[local_rank].global_rank
        output.say(residency.describe(when, rank, found, self._own_nodes[local_rank]))

    def _say(self, failure: Failure) -> None:
        if not failure.elsewhere:
            self._rendezvous_handler.announce(failure.sentence, failure.exit_code)
        left = self._remaining_restarts
        budget = self._worker_group.spec.max_restarts
        sentence = failure.sentence
        if sentence and budget and left:
            sentence += f"; restart {budget - left + 1} of {budget}"
        elif sentence and budget:
            sentence += f"; all {budget} restarts of --max-restarts are used up"
        if sentence:
            output.say(sentence)

    def _on_signal(self, signum: int, frame: FrameType | None) -> None:
        if self._ending:
            self._kill_all(signal.SIGKILL)
            return
        self._ending = True
        if self._watch is not None:
            self._watch.quiet()
        raise SignalException(f"signal {signum}", signal.Signals(signum))

    def _forward(self, signum: int, frame: FrameType | None) -> None:
        self._kill_all(signum)

    def _kill_all(self, signum: int) -> None:
        if self._pcontext is not None:
            for pid in self._pcontext.pids().values():
                process.kill_group(pid, signum)
