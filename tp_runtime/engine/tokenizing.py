"""The tokenizer of a model's source, a stand-in for made-up weights, or its absence. No torch."""

from __future__ import annotations

from ..errors import TokenizerError
from ..log import once
from ..text import Tokenizer, load_tokenizer
from ..text.byte_tokenizer import ByteTokenizer
from .source import ModelSource


def has_vocabulary(source: ModelSource) -> bool:
    """True where the tokens' texts are known: a GGUF file, or a folder that holds a tokenizer."""
    path = source.tokenizer_path
    return path is not None and (
        path.is_file() or any((path / name).exists() for name in ("tokenizer.json", "tokenizer.model"))
    )


def _takes_bytes(source: ModelSource) -> bool:
    """True for made-up weights, whose answers mean nothing under any tokenizer, with an id for every byte."""
    return source.kind == "random" and source.config.vocab_size >= 256


def has_tokenizer(source: ModelSource) -> bool:
    """True where text can become tokens: a GGUF file, a folder that holds a tokenizer, or made-up weights."""
    return has_vocabulary(source) or _takes_bytes(source)


def open_tokenizer(source: ModelSource) -> Tokenizer | ByteTokenizer:
    """The tokenizer that lies beside the weights. Raises TokenizerError where there is none."""
    if source.tokenizer_path is not None and has_vocabulary(source):
        return load_tokenizer(source.tokenizer_path, source.gguf_metadata)
    if _takes_bytes(source):
        once(f"{source.name} has made-up weights and no tokenizer here: every byte of text is one token")
        return ByteTokenizer()
    raise TokenizerError(
        f"{source.name} has no tokenizer here, so text cannot become tokens; use --weights PATH with a "
        f"folder that holds tokenizer.json or tokenizer.model, or give token ids in Python"
    )


class NoText:
    """The stream of a model without a tokenizer: tokens have no text."""

    def push(self, token: int) -> str:
        return ""

    def flush(self) -> str:
        return ""
