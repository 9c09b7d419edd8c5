"""The tokenizer of a model's source, or its absence. No torch."""

from __future__ import annotations

from ..errors import TokenizerError
from ..text import Tokenizer, load_tokenizer
from .source import ModelSource


def has_tokenizer(source: ModelSource) -> bool:
    """True where the source names a tokenizer: a GGUF file, or a folder that holds one."""
    path = source.tokenizer_path
    return path is not None and (
        path.is_file() or any((path / name).exists() for name in ("tokenizer.json", "tokenizer.model"))
    )


def open_tokenizer(source: ModelSource) -> Tokenizer:
    """The tokenizer that lies beside the weights. Raises TokenizerError where there is none."""
    if source.tokenizer_path is None or not has_tokenizer(source):
        raise TokenizerError(
            f"{source.name} has no tokenizer here, so text cannot become tokens; use --weights PATH with a "
            f"folder that holds tokenizer.json or tokenizer.model, or give token ids in Python"
        )
    return load_tokenizer(source.tokenizer_path, source.gguf_metadata)


class NoText:
    """The stream of a model without a tokenizer: tokens have no text."""

    def push(self, token: int) -> str:
        return ""

    def flush(self) -> str:
        return ""
