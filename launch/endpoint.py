"""A job's name and, over several hosts, the address where its launchers meet. No torch."""

from __future__ import annotations

import os
import socket
import time
from dataclasses import dataclass

from ..errors import LaunchError


@dataclass(frozen=True)
class Endpoint:
    """--rdzv-endpoint: node 0's host and port, and this launcher's place among them."""

    host: str
    port: int
    num_nodes: int
    node_rank: int
    timeout_s: float

    @classmethod
    def parse(cls, text: str | None, num_nodes: int, node_rank: int | None, timeout_s: float) -> Endpoint:
        """From the command line. Raises LaunchError for what cannot be."""
        host, _, port = (text or "").rpartition(":")
        if not host or not port.isdigit() or not 0 < int(port) < 1 << 16:
            raise LaunchError(
                f"--rdzv-endpoint {text!r} with --nnodes {num_nodes}: every host needs the same HOST:PORT "
                "of node 0, such as 10.0.0.1:29400"
            )
        if node_rank is None or not 0 <= node_rank < num_nodes:
            raise LaunchError(f"--node-rank {node_rank} with --nnodes {num_nodes}: give 0 to {num_nodes - 1}")
        return cls(host.strip("[]"), int(port), num_nodes, node_rank, timeout_s)

    def address(self) -> str:
        """The endpoint's numeric address. Raises LaunchError where the name is unknown."""
        try:
            return str(socket.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM)[0][4][0])
        except OSError as error:
            raise LaunchError(f"--rdzv-endpoint: host {self.host!r} cannot be resolved ({error})") from None


def interface_towards(address: str) -> str | None:
    """The network interface this host would use to reach `address`; None where that is not clear."""
    import psutil

    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((address, 9))  # sends nothing: it only chooses a route
        except OSError:
            return None
        own = probe.getsockname()[0]
    for name, addresses in psutil.net_if_addrs().items():
        if any(known.address.partition("%")[0] == own for known in addresses):
            return name
    return None


def new_job_id() -> str:
    """A name no other job has had: process id, start of the second, and random digits."""
    return f"{os.getpid()}-{time.time_ns():x}-{os.urandom(3).hex()}"
