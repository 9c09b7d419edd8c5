"""Memory policies of the running process, by libnuma where it can be trusted, else by system calls.

py-libnuma is a thin wrapper that fails hard: without libnuma it raises on import, a node that libnuma
rejects is a null pointer and ends the process, and sparse node numbers come out wrong. So nodes are
checked first, the same call is tried in a child process, and only if the child ends up with the
wanted policy is it made here. The kernel's own read-back decides in every case. No torch.
"""

from __future__ import annotations

import ctypes
import errno
import importlib
import importlib.util
import os
import platform
from collections.abc import Iterable

# linux/mempolicy.h
_MODES = {"default": 0, "preferred": 1, "bind": 2, "interleave": 3, "local": 4, "weighted_interleave": 6}
_NAMES = {mode: name for name, mode in _MODES.items()} | {5: "preferred"}  # 5: preferred, several nodes
_MODE_FLAGS = 0xE000
# (set_mempolicy, get_mempolicy); machines not named use the generic table.
_CALLS = {"x86_64": (238, 239), "ppc64le": (261, 260), "ppc64": (261, 260), "s390x": (270, 269)}
_GENERIC_CALLS = (237, 236)
_MASK_BITS = 1024  # the kernel refuses a mask smaller than its own number of nodes
_WORD_BITS = 8 * ctypes.sizeof(ctypes.c_ulong)
_PROBE_GOOD = 0


def set_policy(policy: str, nodes: Iterable[int]) -> str:
    """Make `policy` on `nodes` this process's default. Returns what did it: "libnuma" or "set_mempolicy".

    policy: bind, preferred (the first node), interleave, weighted_interleave, default. Raises OSError
    with the kernel's errno where it is refused.
    """
    wanted = tuple(sorted(set(nodes)))
    if policy == "preferred":
        wanted = wanted[:1]
    if _probe(policy, wanted):
        _libnuma_set(policy, wanted)
        if get_policy() == (policy, wanted):
            return "libnuma"
    set_by_call(policy, wanted)
    return "set_mempolicy"


def set_by_call(policy: str, nodes: tuple[int, ...]) -> None:
    """set_mempolicy(2). Raises OSError."""
    words = (ctypes.c_ulong * (_MASK_BITS // _WORD_BITS))()
    for node in nodes:
        if not 0 <= node < _MASK_BITS:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        words[node // _WORD_BITS] |= 1 << node % _WORD_BITS
    # The kernel takes one bit less than it is told.
    _call(
        0,
        ctypes.c_long(_MODES[policy]),
        words if nodes else None,
        ctypes.c_ulong(_MASK_BITS + 1 if nodes else 0),
    )


def get_policy() -> tuple[str, tuple[int, ...]] | None:
    """This process's default policy and its nodes; None where the kernel does not say."""
    mode = ctypes.c_int(0)
    words = (ctypes.c_ulong * (_MASK_BITS // _WORD_BITS))()
    try:
        _call(1, ctypes.byref(mode), words, ctypes.c_ulong(_MASK_BITS), ctypes.c_void_p(0), ctypes.c_ulong(0))
    except OSError:
        return None
    nodes = tuple(bit for bit in range(_MASK_BITS) if words[bit // _WORD_BITS] >> bit % _WORD_BITS & 1)
    return _NAMES.get(mode.value & ~_MODE_FLAGS, "unknown"), nodes


def _call(which: int, *arguments: object) -> None:
    number = _CALLS.get(platform.machine(), _GENERIC_CALLS)[which]
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.syscall(ctypes.c_long(number), *arguments) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def _libnuma_can(policy: str, nodes: tuple[int, ...]) -> bool:
    """Whether py-libnuma has the call, libnuma is there, and it knows every node by its number."""
    if policy not in ("bind", "preferred", "interleave") or not nodes:
        return False
    try:
        libnuma = ctypes.CDLL("libnuma.so.1")
        available = libnuma.numa_available() >= 0
        return (
            available
            and max(nodes) <= libnuma.numa_max_node()
            and importlib.util.find_spec("numa") is not None
        )
    except (OSError, AttributeError):
        return False


def _libnuma_set(policy: str, nodes: tuple[int, ...]) -> None:
    memory, schedule = importlib.import_module("numa.memory"), importlib.import_module("numa.schedule")
    if policy == "bind":
        memory.set_membind_nodes(*nodes)
    elif policy == "interleave":
        memory.set_interleave_nodes(*nodes)
    else:
        schedule.set_preferred_node(nodes[0])


def _probe(policy: str, nodes: tuple[int, ...]) -> bool:
    """Whether a child that makes the same call lives and has the policy afterwards.

    Loading libnuma alone makes calls (it tries policies out), so that this, too, is left to the child.
    """
    child = os.fork()
    if child == 0:
        good = False
        try:
            silence = os.open(os.devnull, os.O_WRONLY)
            os.dup2(silence, 2)  # libnuma complains on stderr by itself
            if _libnuma_can(policy, nodes):
                _libnuma_set(policy, nodes)
                good = get_policy() == (policy, nodes)
        finally:
            # Whatever was raised: this child must not return into the caller's code.
            os._exit(_PROBE_GOOD if good else 1)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status) == _PROBE_GOOD
