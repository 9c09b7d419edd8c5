"""The tokenizer inside a GGUF file, built as a `tokenizers` object.

"gpt2" vocabularies are byte-level BPE: tokens in GPT-2's byte alphabet, merges in order, and the name
of a pre-tokenizer. "llama" vocabularies are SentencePiece BPE: tokens with scores, and no merges. There
SentencePiece merges the pair whose joined piece has the highest score, so the merges are recovered: each
way to cut a token into two tokens, by falling score of the whole. As in the runtimes these files are
made for, the leading space is put before every stretch of text, also after a control token.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import tokenizers
from tokenizers import models, normalizers

from ..errors import TokenizerError
from .backends import TokenizersBackend
from .pieces import SPACE_MARK, Spelling
from .pre_tokenizers import PRE_TOKENIZERS, PreTokenizer
from .tokenizer import ControlToken, Conventions, Tokenizer

_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4
_NAMED = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}
_END_KEYS = ("eos_token_id", "eot_token_id", "eom_token_id")
# Files often name one end token only; these control tokens end a turn or a text in every model that has them.
_END_TEXTS = frozenset(
    ["<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<EOT>"]
)


def tokenizer_from_gguf(metadata: Mapping[str, object], source: str) -> Tokenizer:
    """The tokenizer that a GGUF file's key-values describe. source: the file's name, for messages.

    Raises TokenizerError where the vocabulary is missing, inconsistent or of a kind that is not known.
    """
    vocabulary = _Vocabulary.read(metadata, source)
    try:
        backend, add_bos = vocabulary.backend()
    except TokenizerError:
        raise
    except Exception as error:  # what the tokenizers package raises has no type of its own
        reason = " ".join(str(error).split())
        raise TokenizerError(f"the vocabulary in {source} cannot be used: {reason}") from error
    return Tokenizer(backend, vocabulary.control_tokens(), vocabulary.conventions(add_bos))


@dataclass(frozen=True)
class _Vocabulary:
    """The `tokenizer.*` key-values, checked. kinds and scores have one entry a token, or none."""

    metadata: Mapping[str, object]
    source: str
    tokens: Sequence[str]
    kinds: Sequence[int]
    scores: Sequence[float]

    @classmethod
    def read(cls, metadata: Mapping[str, object], source: str) -> _Vocabulary:
        tokens = _list_of(metadata, "tokens", str, source)
        if not tokens:
            raise TokenizerError(
                f"{source} holds no vocabulary (tokenizer.ggml.tokens); use a file that has one"
            )
        kinds = _list_of(metadata, "token_type", int, source)
        scores = _list_of(metadata, "scores", float, source)
        for name, values in (("token_type", kinds), ("scores", scores)):
            if values and len(values) != len(tokens):
                raise TokenizerError(f"{source} has {len(tokens)} tokens but {len(values)} entries of {name}")
        return cls(metadata, source, tokens, kinds, scores)

    def get(self, name: str, kind: type, default=None):
        """The value of tokenizer.ggml.`name`, or the default where there is none."""
        value = self.metadata.get(f"tokenizer.ggml.{name}")
        if value is None:
            return default
        if not isinstance(value, kind):
            raise TokenizerError(f"tokenizer.ggml.{name} in {self.source} is {value!r}, not {kind.__name__}")
        return value

    def token_id(self, name: str) -> int | None:
        """A token id under tokenizer.ggml.`name`, or None; one outside the vocabulary is refused."""
        token_id = self.get(name, int)
        if token_id is not None and not 0 <= token_id < len(self.tokens):
            raise TokenizerError(
                f"tokenizer.ggml.{name} in {self.source} is {token_id} of {len(self.tokens)} tokens"
            )
        return token_id

    def backend(self) -> tuple[TokenizersBackend, bool]:
        """The encoder, and whether a text begins with BOS where the file does not say."""
        model = self.get("model", str)
        if model == "gpt2":
            pre_tokenizer = self._pre_tokenizer()
            return self._byte_level(pre_tokenizer), pre_tokenizer.add_bos
        if model == "llama":
            return self._sentencepiece(), True
        raise TokenizerError(f"{self.source} has a {model!r} vocabulary; 'gpt2' and 'llama' can be read")

    def _pre_tokenizer(self) -> PreTokenizer:
        name = self.get("pre", str, "default")
        if name not in PRE_TOKENIZERS:
            known = ", ".join(sorted(PRE_TOKENIZERS))
            raise TokenizerError(f"{self.source} names the pre-tokenizer {name!r}; known are: {known}")
        return PRE_TOKENIZERS[name]

    def _byte_level(self, pre_tokenizer: PreTokenizer) -> TokenizersBackend:
        merges = [_cut_merge(merge) for merge in _list_of(self.metadata, "merges", str, self.source)]
        vocab = {token: index for index, token in enumerate(self.tokens)}
        tokenizer = tokenizers.Tokenizer(
            models.BPE(vocab=vocab, merges=merges, ignore_merges=pre_tokenizer.ignore_merges)
        )
        tokenizer.pre_tokenizer = pre_tokenizer.build()
        tokenizer.add_tokens(self._user_defined())
        return TokenizersBackend(tokenizer, self._control_added(), Spelling(byte_level=True))

    def _sentencepiece(self) -> TokenizersBackend:
        if not self.scores:
            raise TokenizerError(f"{self.source} has a 'llama' vocabulary without tokenizer.ggml.scores")
        vocab = {token: index for index, token in enumerate(self.tokens)}
        unknown = self.token_id("unknown_token_id")
        model = models.BPE(
            vocab=vocab,
            merges=list(self._merges(vocab)),
            unk_token=self.tokens[0 if unknown is None else unknown],
            fuse_unk=True,
            byte_fallback=True,
        )
        tokenizer = tokenizers.Tokenizer(model)
        prefix = self.get("add_space_prefix", bool, True)
        steps = [normalizers.Prepend(SPACE_MARK)] if prefix else []
        tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE_MARK)])
        tokenizer.add_tokens(self._user_defined())
        spelling = Spelling(space_mark=True, byte_tokens=True, strip_first_space=prefix)
        return TokenizersBackend(tokenizer, self._control_added(), spelling)

    def _merges(self, vocab: Mapping[str, int]) -> Iterator[tuple[str, str]]:
        """Every cut of a normal token into two tokens, best token first."""
        normal = [i for i in range(len(self.tokens)) if not self.kinds or self.kinds[i] == 1]
        normal.sort(key=lambda i: (-self.scores[i], i))
        for index in normal:
            token = self.tokens[index]
            for cut in range(1, len(token)):
                if token[:cut] in vocab and token[cut:] in vocab:
                    yield token[:cut], token[cut:]

    def _user_defined(self) -> list[tokenizers.AddedToken]:
        """Tokens that are found whole in any text, like `<think>`."""
        return [
            tokenizers.AddedToken(token, normalized=False)
            for token, kind in zip(self.tokens, self.kinds, strict=False)
            if kind == _USER_DEFINED and token
        ]

    def _control_added(self) -> list[tokenizers.AddedToken]:
        """The user-defined tokens among the control tokens: the encoder must not find them."""
        return [
            tokenizers.AddedToken(token.text, normalized=False, special=True)
            for token in self.control_tokens()
            if not token.hidden
        ]

    def control_tokens(self) -> list[ControlToken]:
        """Control and unknown tokens, those with a named duty, and user-defined ones the template writes."""
        hidden = {i for i, kind in enumerate(self.kinds) if kind in (_CONTROL, _UNKNOWN)}
        duties = (self.token_id(name) for name in {*_NAMED.values(), *_END_KEYS})
        hidden.update(token_id for token_id in duties if token_id is not None)
        template = self._chat_template() or ""
        written = {
            i
            for i, kind in enumerate(self.kinds)
            if kind == _USER_DEFINED and self.tokens[i].strip() and self.tokens[i] in template
        }
        return [
            ControlToken(self.tokens[i], i, hidden=i in hidden)
            for i in sorted(hidden | written)
            if self.tokens[i]
        ]

    def _chat_template(self) -> str | None:
        template = self.metadata.get("tokenizer.chat_template")
        return template if isinstance(template, str) else None

    def conventions(self, add_bos_default: bool) -> Conventions:
        """What the file says about the use of its tokens."""
        ids = {name: self.token_id(key) for name, key in _NAMED.items()}
        named = {name: self.tokens[token_id] for name, token_id in ids.items() if token_id is not None}
        ends = {token_id for key in _END_KEYS if (token_id := self.token_id(key)) is not None}
        ends |= {token.id for token in self.control_tokens() if token.text in _END_TEXTS}
        bos, eos = ids["bos_token"], ids["eos_token"]
        return Conventions(
            bos_id=bos,
            eos_ids=frozenset(ends),
            prefix_ids=(bos,) if bos is not None and self.get("add_bos_token", bool, add_bos_default) else (),
            suffix_ids=(eos,) if eos is not None and self.get("add_eos_token", bool, False) else (),
            chat_template=self._chat_template(),
            named=named,
        )


def _list_of(metadata: Mapping[str, object], name: str, kind: type, source: str) -> list:
    """The list under tokenizer.ggml.`name` ([] where there is none), every element of type `kind`."""
    values = metadata.get(f"tokenizer.ggml.{name}", [])
    if not isinstance(values, Sequence) or isinstance(values, str) or set(map(type, values)) - {kind}:
        raise TokenizerError(f"tokenizer.ggml.{name} in {source} is no list of {kind.__name__}")
    return list(values)


def _cut_merge(merge: str) -> tuple[str, str]:
    """The two sides of "left right"; the first character belongs to the left side even if it is a space."""
    cut = merge.find(" ", 1)
    return merge[:cut], merge[cut + 1 :]
