"""Small tokenizers of the common kinds, trained once a session."""

from __future__ import annotations

from pathlib import Path

import pytest
from tp_testing.vocabularies import KINDS, train_sentencepiece, write_directory


@pytest.fixture(scope="session")
def directories(tmp_path_factory) -> dict[str, Path]:
    """kind -> a directory with such a tokenizer."""
    root = tmp_path_factory.mktemp("tokenizers")
    return {kind: write_directory(root / kind, make()) for kind, make in KINDS.items()}


@pytest.fixture(scope="session")
def sentencepiece_model() -> bytes:
    return train_sentencepiece(control_symbols=["<|im_start|>", "<|im_end|>"])
