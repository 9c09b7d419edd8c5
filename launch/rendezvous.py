"""Where launchers and ranks meet: stores that listen on one address only.

On one host that is 127.0.0.1 with a free port; over several hosts the control store listens where
--rdzv-endpoint says, on node 0. torch's own TCPStore binds every interface; here the listening socket is
made first and handed over. Each attempt's ranks have a store of their own, so that a restart meets
nothing stale. Imports torch: `spawn` imports this module inside the function that starts ranks.
"""

from __future__ import annotations

import errno
import json
import socket
import threading
import time
from datetime import timedelta

from torch.distributed import PrefixStore, Store, TCPStore
from torch.distributed.elastic.rendezvous import RendezvousHandler, RendezvousInfo, RendezvousStoreInfo

from ..errors import LaunchError
from .endpoint import Endpoint

LOOPBACK = "127.0.0.1"
_STORE_TIMEOUT_S = 300.0
_POLL_S = 0.1
# A launcher writes a heartbeat a second; one that misses this many is taken for gone.
_BEAT_S, _SILENT_S = 1.0, 8.0


def serve_store(address: str, port: int) -> TCPStore:
    """A store served from this process on one address. port 0: a free one. Raises OSError if taken."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((address, port))
        listener.listen(1024)
    except OSError:
        listener.close()
        raise
    return TCPStore(
        address,
        listener.getsockname()[1],
        is_master=True,
        timeout=timedelta(seconds=_STORE_TIMEOUT_S),
        wait_for_workers=False,
        master_listen_fd=listener.detach(),
    )


def _client(host: str, port: int, limit_s: float) -> TCPStore:
    """The store served there. Raises TimeoutError, or RuntimeError, where something else listens.

    TCPStore keeps to no time limit while it waits for the first answer, hence the thread; one that waits on
    is left behind, and ends with the process.
    """
    found: list[TCPStore | Exception] = []

    def connect() -> None:
        try:
            found.append(TCPStore(host, port, is_master=False, timeout=timedelta(seconds=_STORE_TIMEOUT_S)))
        except RuntimeError as error:
            found.append(error)

    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(limit_s)
    if not found:
        raise TimeoutError("what listens there is no launcher")
    if isinstance(found[0], Exception):
        raise found[0]
    return found[0]


class LoopbackRendezvous(RendezvousHandler):
    """The elastic agent's rendezvous handler for a job on one host: always complete, never waits."""

    def __init__(self, job_id: str) -> None:
        self.job_id = job_id
        self._store: TCPStore | None = None

    @property
    def use_agent_store(self) -> bool:
        """Ranks are clients of the store this process serves."""
        return True

    def get_backend(self) -> str:
        """The name the agent writes into its events."""
        return "loopback"

    def get_run_id(self) -> str:
        """The job's id."""
        return self.job_id

    def next_rendezvous(self) -> RendezvousInfo:
        """A fresh store for the next attempt."""
        self._store = serve_store(LOOPBACK, 0)
        return RendezvousInfo(self._store, 0, 1, RendezvousStoreInfo(LOOPBACK, self._store.port))

    def num_nodes_waiting(self) -> int:
        """No host ever joins later."""
        return 0

    def is_closed(self) -> bool:
        """Never: it lives as long as the agent."""
        return False

    def set_closed(self) -> None:
        """Nothing to close: the store goes with the process."""

    def shutdown(self) -> bool:
        """Drop the store, and with it the port."""
        self._store = None
        return True

    def announce(self, sentence: str, exit_code: int) -> None:
        """Tell other hosts of a failure; there are none."""

    def news(self) -> tuple[str, int] | None:
        """A failure on another host, as (sentence, exit code); there are none."""
        return None


class EndpointRendezvous(LoopbackRendezvous):
    """For a job over several hosts: node 0 serves a control store, and a store for each attempt's ranks."""

    def __init__(self, job_id: str, endpoint: Endpoint) -> None:
        super().__init__(job_id)
        self._endpoint = endpoint
        self._attempt = 0
        self._address = endpoint.address()
        self._beats: dict[int, tuple[int, float]] = {}
        self._last_beat = 0.0
        self._control: Store = self._open_control()
        # For the watch's thread: a client serves one call at a time.
        self._side: Store = self._control.clone()  # type: ignore[attr-defined]
        self._join()

    def get_backend(self) -> str:
        """The name the agent writes into its events."""
        return "endpoint"

    def next_rendezvous(self) -> RendezvousInfo:
        """Wait for all hosts, then return the attempt's stores. Raises LaunchError past the timeout."""
        self._attempt += 1
        here, key = self._endpoint.node_rank, f"attempt/{self._attempt}"
        self._beats.clear()
        if here == 0:
            self._store = serve_store(self._address, 0)
            self._control.set(f"{key}/port", str(self._store.port))
        self._control.set(f"{key}/joined/{here}", "1")
        wanted = [f"{key}/joined/{node}" for node in range(self._endpoint.num_nodes)]
        self._wait([f"{key}/port", *wanted])
        port = int(self._control.get(f"{key}/port"))
        info = RendezvousStoreInfo(self._endpoint.host, port)
        return RendezvousInfo(PrefixStore(key, self._control), here, self._endpoint.num_nodes, info)

    def announce(self, sentence: str, exit_code: int) -> None:
        """Tell the other hosts what failed in this attempt."""
        try:
            self._side.set(f"attempt/{self._attempt}/failed", json.dumps([sentence, exit_code]))
        except RuntimeError:
            pass  # node 0 has gone; the others notice that themselves

    def news(self) -> tuple[str, int] | None:
        """What failed on another host in this attempt, or which launcher is silent; None if nothing."""
        try:
            key = f"attempt/{self._attempt}/failed"
            if self._side.check([key]):
                sentence, exit_code = json.loads(self._side.get(key))
                return str(sentence), int(exit_code)
            return self._silent(time.monotonic())
        except RuntimeError:
            return f"error: the launcher of node 0 at {self._endpoint.host}:{self._endpoint.port} has gone", 1

    def _silent(self, now: float) -> tuple[str, int] | None:
        if now - self._last_beat < _BEAT_S:
            return None
        self._last_beat = now
        self._side.add(f"beat/{self._endpoint.node_rank}", 1)
        for node in range(self._endpoint.num_nodes):
            beat = self._side.add(f"beat/{node}", 0)
            known = self._beats.get(node)
            if known is None or known[0] != beat:
                self._beats[node] = (beat, now)
            elif now - known[1] > _SILENT_S:
                return f"error: the launcher of node {node} has not been heard of for {_SILENT_S:g} s", 1
        return None

    def _open_control(self) -> Store:
        host, port = self._endpoint.host, self._endpoint.port
        if self._endpoint.node_rank == 0:
            try:
                return serve_store(self._address, port)
            except OSError as error:
                why = f"node 0 cannot listen there ({error.strerror}); give an address of this host"
                if error.errno == errno.EADDRINUSE:
                    why = f"port {port} is taken by another program; choose a free one on every host"
                raise LaunchError(f"--rdzv-endpoint {host}:{port}: {why}") from None
        deadline = time.monotonic() + self._endpoint.timeout_s
        while True:
            try:
                socket.create_connection((self._address, port), timeout=2.0).close()
                return _client(host, port, max(1.0, deadline - time.monotonic()))
            except (OSError, RuntimeError) as error:
                if time.monotonic() > deadline:
                    raise LaunchError(
                        f"--rdzv-endpoint {host}:{port}: no launcher answers there within "
                        f"{self._endpoint.timeout_s:g} s ({error}); start node 0, or raise --rdzv-timeout"
                    ) from None
                time.sleep(_POLL_S)

    def _join(self) -> None:
        """Agree on the job: one id, one number of nodes, each node rank once."""
        here, nodes = self._endpoint.node_rank, self._endpoint.num_nodes
        if here == 0:
            self._control.set("job", json.dumps([self.job_id, nodes]))
        self._wait(["job"])
        self.job_id, told = json.loads(self._control.get("job"))
        if told != nodes:
            raise LaunchError(f"--nnodes {nodes} here and {told} on node 0; give every host the same number")
        if self._control.add(f"claimed/{here}", 1) > 1:
            raise LaunchError(f"--node-rank {here} is taken by another launcher; give each host its own")

    def _wait(self, keys: list[str]) -> None:
        """Until all keys are set; polled, so that Ctrl-C is heard."""
        deadline = time.monotonic() + self._endpoint.timeout_s
        while not self._control.check(keys):
            if time.monotonic() > deadline:
                late = [key.rpartition("/")[2] for key in keys if not self._control.check([key])]
                raise LaunchError(
                    f"of {self._endpoint.num_nodes} nodes these did not join within "
                    f"{self._endpoint.timeout_s:g} s: {', '.join(late)}; start tp-launch there, or raise "
                    "--rdzv-timeout"
                )
            time.sleep(_POLL_S)
