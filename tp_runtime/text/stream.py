"""Streaming detokenisation: token ids in, whole characters out.

A character may be spread over several tokens (an emoji is four bytes, and often four byte tokens), so
bytes wait until the character they begin is complete. At most three bytes ever wait, so the cost of
a token does not grow with the text. Bytes that can never become a character are given out as U+FFFD,
one for each maximal ill-formed run (Unicode, chapter 3.9), and the joined pieces always equal
`Tokenizer.decode` of the same ids. Standard library only.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable

_NEW_DECODER = codecs.getincrementaldecoder("utf-8")


class StreamDecoder:
    """Turns ids into text one at a time. Made by `Tokenizer.stream`.

    token_bytes: the bytes an id adds to the text. strip_first_space: drop one space at the very start,
    which SentencePiece-style tokenizers put before the first word.
    """

    def __init__(self, token_bytes: Callable[[int], bytes], *, strip_first_space: bool) -> None:
        self._token_bytes = token_bytes
        self._strip_pending = strip_first_space
        self._decoder = _NEW_DECODER("replace")

    def push(self, token_id: int) -> str:
        """The characters that are complete now that `token_id` has come; often one word, maybe ''."""
        data = self._token_bytes(token_id)
        if self._strip_pending and data:
            self._strip_pending = False
            data = data.removeprefix(b" ")
        return self._decoder.decode(data)

    def flush(self) -> str:
        """What still waits at the end: '', or U+FFFD for a character that was never completed."""
        return self._decoder.decode(b"", final=True)
