"""The two libraries that turn plain text into ids, behind one small interface.

A backend never recognises control tokens: what a user typed stays text. `tokenizer.py` finds the
control tokens that are meant and asks the backend for the text between them.

`TokenizersBackend` serves tokenizer.json and GGUF vocabularies, `SentencePieceBackend` serves
tokenizer.model. Both libraries raise plain Exception or RuntimeError; the loaders turn that into one
sentence.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import sentencepiece
import tokenizers

from .pieces import SPACE_MARK, Spelling


class Backend(Protocol):
    """What a Tokenizer needs from a library."""

    spelling: Spelling
    vocab_size: int

    def encode_plain(self, text: str, *, first: bool) -> list[int]:
        """Ids of `text`, none of them a control token. first: nothing stands before it in the sequence."""

    def piece(self, token_id: int) -> str | None:
        """The token's spelling in the vocabulary, or None where the id is not used."""


class TokenizersBackend:
    """A `tokenizers.Tokenizer` that treats its special tokens as text.

    control_tokens: further added tokens that must be treated as text, although the file does not mark
    them as special. spelling: left out, it is read from the decoder in the file.
    """

    def __init__(
        self,
        tokenizer: tokenizers.Tokenizer,
        control_tokens: Sequence[tokenizers.AddedToken] = (),
        spelling: Spelling | None = None,
    ) -> None:
        tokenizer.no_truncation()
        tokenizer.no_padding()
        if control_tokens:
            tokenizer.add_special_tokens(list(control_tokens))
        tokenizer.encode_special_tokens = True
        self._tokenizer = tokenizer
        self.spelling = spelling or _spelling_of(tokenizer)
        self.vocab_size = 1 + max(tokenizer.get_vocab().values(), default=-1)

    def encode_plain(self, text: str, *, first: bool) -> list[int]:
        tokenizer = self._tokenizer if first else self._continuing
        return tokenizer.encode(text, add_special_tokens=False).ids

    def piece(self, token_id: int) -> str | None:
        return self._tokenizer.id_to_token(token_id)

    @functools.cached_property
    def _continuing(self) -> tokenizers.Tokenizer:
        """The same tokenizer for text that follows a control token.

        Only `Metaspace` with the scheme "first" tells the two apart: it puts a space before the first
        word of a sequence alone, and would take each stretch of text for a sequence of its own.
        """
        pre_tokenizer = self._tokenizer.pre_tokenizer
        if pre_tokenizer is None or not _replace_scheme(json.loads(pre_tokenizer.__getstate__())):
            return self._tokenizer
        state = json.loads(self._tokenizer.to_str())
        _replace_scheme(state["pre_tokenizer"])
        continuing = tokenizers.Tokenizer.from_str(json.dumps(state))
        continuing.encode_special_tokens = True
        return continuing


def _replace_scheme(node: object) -> bool:
    """Change every prepend_scheme "first" below `node` into "never"; True if there was one."""
    if isinstance(node, list):
        changed = [_replace_scheme(item) for item in node]  # all of them, not up to the first
        return any(changed)
    if not isinstance(node, dict):
        return False
    if node.get("prepend_scheme") == "first":
        node["prepend_scheme"] = "never"
        return True
    return _replace_scheme(list(node.values()))


def _spelling_of(tokenizer: tokenizers.Tokenizer) -> Spelling:
    """The spelling that a tokenizer's decoder undoes. Raises ValueError for one that is not known."""
    if tokenizer.decoder is None:
        raise ValueError("it has no decoder")
    state: dict[str, Any] = json.loads(tokenizer.decoder.__getstate__())
    steps: list[dict[str, Any]] = state["decoders"] if state["type"] == "Sequence" else [state]
    kinds = [step["type"] for step in steps]
    unknown = set(kinds) - {"ByteLevel", "Metaspace", "Replace", "ByteFallback", "Fuse", "Strip"}
    if unknown:
        raise ValueError(f"its decoder {sorted(unknown)[0]} is not known; ByteLevel and Metaspace are")
    marks = [step for step in steps if step["type"] == "Replace"]
    if any(step["pattern"] != {"String": SPACE_MARK} or step["content"] != " " for step in marks):
        raise ValueError("its decoder replaces something else than U+2581 by a space")
    metaspace = [step for step in steps if step["type"] == "Metaspace"]
    return Spelling(
        byte_level="ByteLevel" in kinds,
        space_mark=bool(marks or metaspace),
        byte_tokens="ByteFallback" in kinds,
        strip_first_space=any(step["type"] == "Strip" and step["start"] == 1 for step in steps)
        or any(step.get("prepend_scheme") != "never" for step in metaspace),
    )


class SentencePieceBackend:
    """A SentencePiece model.

    model: the serialised model. added: tokens beside the model, spelling -> id, found in any text before
    the model sees it. prefix_after_control: text after a control or added token gets the leading space
    too (the behaviour called legacy by Hugging Face).
    """

    # A ModelProto holding only normalizer_spec { add_dummy_prefix: false }. Serialised protocol buffers
    # merge when they are joined, so this, appended to a model, turns the leading space off.
    _NO_PREFIX = b"\x1a\x02\x18\x00"

    def __init__(
        self, model: bytes, added: Mapping[str, int] | None = None, *, prefix_after_control: bool = True
    ) -> None:
        self.processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        self._model = model
        self._added = dict(added or {})
        self._added_by_id = {token_id: text for text, token_id in self._added.items()}
        longest_first = sorted(self._added, key=len, reverse=True)
        self._finder = re.compile(f"({'|'.join(map(re.escape, longest_first))})") if self._added else None
        self._prefix_after_control = prefix_after_control
        self.vocab_size = max([self.processor.vocab_size(), *(1 + i for i in self._added_by_id)])
        has_prefix = "".join(self.processor.encode("x", out_type=str)).startswith(SPACE_MARK)
        byte_tokens = any(self.processor.is_byte(token_id) for token_id in range(min(self.vocab_size, 512)))
        self.spelling = Spelling(space_mark=True, byte_tokens=byte_tokens, strip_first_space=has_prefix)

    def encode_plain(self, text: str, *, first: bool) -> list[int]:
        ids: list[int] = []
        parts = self._finder.split(text) if self._finder is not None else [text]
        for index, part in enumerate(parts):
            if index % 2:  # what the group in the expression matched
                ids.append(self._added[part])
            elif part:
                alone = self._prefix_after_control or (first and index == 0)
                ids += (self.processor if alone else self._continuing).encode(part)
        return ids

    def piece(self, token_id: int) -> str | None:
        if token_id in self._added_by_id:
            return self._added_by_id[token_id]
        return self.processor.id_to_piece(token_id) if token_id < self.processor.vocab_size() else None

    @functools.cached_property
    def _continuing(self) -> sentencepiece.SentencePieceProcessor:
        return sentencepiece.SentencePieceProcessor(model_proto=self._model + self._NO_PREFIX)
