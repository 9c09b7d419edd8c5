"""One logger for the project: lines on stderr, prefixed with the rank where there are several.

`once()` is for fallbacks: said once a process, on the first local rank only. Standard library only.
"""

from __future__ import annotations

import logging
import sys

from . import env
from .errors import ConfigError

_SAID: set[str] = set()
_LEVELS = {
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warning": logging.WARNING,
    "error": logging.ERROR,
}


class _Prefix(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        world = env.get_int("WORLD_SIZE") or 1
        where = f"[rank {env.get_int('RANK')}/{world}] " if world > 1 else ""
        level = "" if record.levelno == logging.INFO else f"{record.levelname.lower()}: "
        return f"{where}{level}{record.getMessage()}"


def _level() -> int:
    asked = (env.get("TP_LOG_LEVEL") or "info").lower()
    if asked not in _LEVELS:
        raise ConfigError(f"TP_LOG_LEVEL={asked!r} is not known; use one of: {', '.join(_LEVELS)}")
    return _LEVELS[asked]


def get_logger() -> logging.Logger:
    """The project's logger; its handler and level are set on the first call."""
    logger = logging.getLogger("tp_runtime")
    if not logger.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(_Prefix())
        logger.addHandler(handler)
        logger.setLevel(_level())
        logger.propagate = False
    return logger


def complain(error: Exception, *, of_input: bool) -> None:
    """Say a rank's error where no launcher does. of_input: all ranks of a host find it, and one of them says
    it; else it may be wrong on this rank alone.
    """
    rank = env.get_int("RANK") or 0
    if not of_input or (env.get_int("LOCAL_RANK") or 0) == 0:
        sys.stderr.write(f"error: {error}\n" if rank == 0 else f"[rank {rank}] error: {error}\n")


def once(message: str, level: int = logging.WARNING) -> None:
    """Say `message` once in this process, on the first rank of the host."""
    if message in _SAID:
        return
    _SAID.add(message)
    if (env.get_int("LOCAL_RANK") or 0) == 0:
        get_logger().log(level, message)
