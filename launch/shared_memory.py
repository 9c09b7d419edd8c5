"""Whether /dev/shm has room for the ranks' collectives, asked before any rank starts. No torch.

A container has 64 MiB there unless it was told otherwise (docker run --shm-size), and other programs may
have filled it. Hosts of several are each asked by their own launcher.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from .. import env
from ..errors import LaunchError

_ROOT = Path("/dev/shm")
_WAY_OUT = "enlarge it (docker run --shm-size, mount -o remount,size=), or set TP_COLLECTIVES=c10d"


def check(nproc: int, words: Sequence[str]) -> None:
    """Refuse a job of `nproc` ranks on this host that /dev/shm has no room for.

    words: the script's arguments, since --collectives c10d needs no room. Raises LaunchError.
    """
    if nproc == 1 or _through_c10d(words):
        return
    needed = nproc * env.SHM_BYTES_PER_RANK
    try:
        found = os.statvfs(_ROOT)
    except OSError as error:
        raise LaunchError(
            f"--nproc {nproc}: {_ROOT}, through which ranks communicate, cannot be used ({error.strerror}); "
            "mount it, or set TP_COLLECTIVES=c10d"
        ) from None
    free, whole = found.f_bavail * found.f_frsize, found.f_blocks * found.f_frsize
    if whole and free < needed:  # a size of 0 is no limit
        raise LaunchError(
            f"--nproc {nproc}: ranks need {needed >> 10} KiB in {_ROOT} to communicate, and {free >> 10} KiB "
            f"of its {whole >> 10} KiB are free; {_WAY_OUT}"
        )


def _through_c10d(words: Sequence[str]) -> bool:
    chosen = "auto"
    for word, following in pairwise([*words, ""]):
        option, _, value = word.partition("=")
        if option == "--collectives":
            chosen = value or following
    return (env.get("TP_COLLECTIVES") if chosen == "auto" else chosen) == "c10d"
