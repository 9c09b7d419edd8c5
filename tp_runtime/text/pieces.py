"""From a token's spelling in the vocabulary to the bytes it stands for.

Two spellings cover the model families served here. Byte-level BPE writes each byte as one printable
character (GPT-2's alphabet). SentencePiece writes text as it is, a space as U+2581, and bytes that no
piece covers as `<0x0A>`. With the bytes of each token known, decoding is joining, at linear cost, and
streaming needs no second pass. Standard library only.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

SPACE_MARK = "\u2581"
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def byte_alphabet() -> dict[str, int]:
    """GPT-2's alphabet, character -> byte: printable Latin-1 stands for itself, the other 68 bytes are
    spelled by U+0100 and up, in order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    alphabet = {chr(byte): byte for byte in printable}
    others = (byte for byte in range(256) if byte not in set(printable))
    alphabet.update({chr(0x100 + index): byte for index, byte in enumerate(others)})
    return alphabet


_ALPHABET = byte_alphabet()


@dataclass(frozen=True)
class Spelling:
    """How a vocabulary spells its tokens.

    byte_level: GPT-2's alphabet. space_mark: U+2581 stands for a space. byte_tokens: `<0x0A>` stands
    for a byte. strip_first_space: the first space of a decoded text was put there by the tokenizer.
    """

    byte_level: bool = False
    space_mark: bool = False
    byte_tokens: bool = False
    strip_first_space: bool = False

    def to_bytes(self, piece: str) -> bytes:
        """The bytes of one token. A byte-level token outside the alphabet stands for its own text."""
        if self.byte_level:
            try:
                return bytes(map(_ALPHABET.__getitem__, piece))
            except KeyError:
                return piece.encode("utf-8")
        if self.byte_tokens and (match := _BYTE_TOKEN.fullmatch(piece)):
            return bytes.fromhex(match[1])
        return (piece.replace(SPACE_MARK, " ") if self.space_mark else piece).encode("utf-8")
