"""A stand-in tokenizer for made-up weights: one token a byte, ids 0 to 255. No model ever learned it.

It lets a model of random weights be run by text where no tokenizer is installed; what such a model answers
means nothing under any tokenizer. Standard library only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..errors import TokenizerError
from .stream import StreamDecoder


class ByteTokenizer:
    """Text as its UTF-8 bytes. Tokens from 256 on, which have no bytes, decode to U+FFFD."""

    eos_ids: frozenset[int] = frozenset()

    def encode(self, text: str) -> list[int]:
        """One id a byte."""
        return list(text.encode("utf-8", "surrogatepass"))

    def encode_chat(self, messages: Sequence[Mapping[str, object]]) -> list[int]:
        """Raises TokenizerError: there is no chat template."""
        raise TokenizerError(
            f"{len(messages)} chat messages came and made-up weights without a tokenizer have no chat "
            "template; give a plain prompt instead"
        )

    def stream(self) -> StreamDecoder:
        """A streaming decoder of ids."""
        return StreamDecoder(_bytes_of, strip_first_space=False)


def _bytes_of(token: int) -> bytes:
    return bytes([token]) if token < 256 else "\ufffd".encode()
