"""JSON objects from files nobody vouches for: bounded in size, one sentence where they are not as told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..errors import CheckpointError


def parse_json_object(text: bytes, where: str) -> dict[str, Any]:
    """The JSON object in `text`. Raises CheckpointError, naming `where`, for anything else."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where} is not valid JSON ({error}); fetch the file again") from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{where} holds a JSON {type(found).__name__}, not an object; fetch it again")
    return found


def read_json_object(path: Path, *, limit_bytes: int = 64 << 20) -> dict[str, Any]:
    """The JSON object in the file. Raises CheckpointError where it is missing, too large or none."""
    try:
        size = path.stat().st_size
        if size > limit_bytes:
            raise CheckpointError(
                f"{path} has {size} bytes, more than the {limit_bytes} such a file may have"
            )
        text = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    return parse_json_object(text, str(path))
