"""What a rank tells its launcher: one JSON document a line on stderr, marked by a leading RS (0x1E).

The launcher reads every rank's stderr anyway, so that this needs no further pipe, and a report comes
before the traceback it announces. (RFC 7464 frames JSON texts so.) Standard library only.
"""

from __future__ import annotations

import json
import os
from typing import Any

from .. import env

MARK = b"\x1e"
# Longer texts are cut: a write of up to PIPE_BUF bytes is not torn by other threads' lines.
_MAX_TEXT = 1500


def report(kind: str, **fields: Any) -> None:
    """Tell the launcher, where one is listening."""
    if env.get_int("TP_LAUNCHER_PID") is None:
        return
    cut = {key: value[:_MAX_TEXT] if isinstance(value, str) else value for key, value in fields.items()}
    line = json.dumps({"kind": kind, **cut}).encode()
    try:
        os.write(2, MARK + line + b"\n")
    except OSError:
        pass  # the launcher has gone; the rank is about to end, too


def parse(line: bytes) -> dict[str, Any] | None:
    """The report in a line of a rank's stderr; None where the line is none."""
    if not line.startswith(MARK):
        return None
    try:
        document = json.loads(line[1:])
    except ValueError:
        return None
    return document if isinstance(document, dict) and "kind" in document else None
