"""all_reduce, all_gather and broadcast over one process group, as ops torch.compile can trace.

ops.py: the functions. shm.py: attaching ranks of one host to shared memory. hosts.py: groups over
several hosts. src/: the C++.
"""

from __future__ import annotations

from .ops import (
    all_gather,
    all_reduce,
    all_reduce_op,
    attach,
    broadcast_,
    collective_errors,
    set_timeout,
    start_all_reduce_,
)

__all__ = [
    "all_gather",
    "all_reduce",
    "all_reduce_op",
    "attach",
    "broadcast_",
    "collective_errors",
    "set_timeout",
    "start_all_reduce_",
]
