"""A GPU's memory while a model is made ready: given back early, and missed in one sentence."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from ..errors import MemoryLimitError

_TIGHT_BYTES = 4 << 30


@contextlib.contextmanager
def device_memory_errors(world_size: int) -> Iterator[None]:
    """Turn torch's error for a full GPU into MemoryLimitError, which says what would help."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        asked = str(error).partition("Tried to allocate ")[2].partition(". ")[0] or "more"
        raise MemoryLimitError(
            f"a GPU has no room for the model: {asked} was asked for beyond what it holds; use more than "
            f"{world_size} ranks (--nproc), fewer bits (--quant int8 or int4), or a smaller --context"
        ) from None


def give_back_where_tight() -> None:
    """Return what torch keeps of freed tensors to the GPU where little is free: pieces do not join otherwise.

    For between steps of loading; it waits for the GPU.
    """
    if torch.cuda.mem_get_info()[0] < _TIGHT_BYTES:
        torch.cuda.empty_cache()
