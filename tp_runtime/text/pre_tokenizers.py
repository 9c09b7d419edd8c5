"""How byte-level vocabularies cut text into words before merging, by the name in `tokenizer.ggml.pre`.

Merges never cross a cut, so the cuts are part of the vocabulary. A GGUF file names them only; the
regular expressions are those of the published tokenizers. Each is applied to what the one before it
has cut, and what it does not match stays a word of its own. `Digits` before GPT-2's expression matters
for the demo model: in "  1" both spaces stay together, which GPT-2's expression alone would part.
Names: https://github.com/ggml-org/llama.cpp/blob/master/convert_hf_to_gguf_update.py.
"""

from __future__ import annotations

from dataclasses import dataclass

from tokenizers import Regex, pre_tokenizers

_GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_TAIL = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TITLE = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+"
_CAPITALS = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
_SLASH_TAIL = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def _cl100k(digits: str) -> str:
    """The expression that cl100k introduced, with its own bound on digits in a row."""
    return rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}|{_TAIL}"


_HAN_HANGUL = r"[\x{4E00}-\x{9FA5}\x{0800}-\x{4E00}\x{AC00}-\x{D7FF}]+"  # as published: the middle range, too
_HAN_KANA = r"[\x{4E00}-\x{9FA5}\x{3040}-\x{30FF}]+"


@dataclass(frozen=True)
class PreTokenizer:
    """expressions: applied in turn. ignore_merges: a word that is a token is taken whole. add_bos: a text
    begins with the BOS token where the file does not say."""

    expressions: tuple[str, ...]
    ignore_merges: bool = False
    add_bos: bool = False

    def build(self) -> pre_tokenizers.PreTokenizer:
        """The `tokenizers` object: the cuts, then the byte alphabet."""
        splits = [pre_tokenizers.Split(Regex(e), behavior="isolated") for e in self.expressions]
        return pre_tokenizers.Sequence(
            [*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        )


_GPT2_WORDS = PreTokenizer((_GPT2,))
_SINGLE_DIGITS = PreTokenizer((r"\p{N}", _GPT2))
_LLAMA3 = PreTokenizer((_cl100k(r"\p{N}{1,3}"),), ignore_merges=True, add_bos=True)
_CL100K = PreTokenizer((_cl100k(r"\p{N}{1,3}"),))
_QWEN2 = PreTokenizer((_cl100k(r"\p{N}"),))
_GPT4O = PreTokenizer((rf"{_TITLE}{_CONTRACTION}?|{_CAPITALS}{_CONTRACTION}?|\p{{N}}{{1,3}}|{_SLASH_TAIL}",))
_GROUPS: dict[PreTokenizer, tuple[str, ...]] = {
    PreTokenizer((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")): ("default",),
    _GPT2_WORDS: ("gpt-2", "phi-2", "mpt", "olmo", "jais", "gigachat", "roberta-bpe"),
    _SINGLE_DIGITS: ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"),
    _LLAMA3: ("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"),
    _CL100K: ("dbrx", "smaug-bpe", "chatglm-bpe", "glm4"),
    _QWEN2: ("qwen2", "stablelm2", "deepseek-r1-qwen", "megrez", "kormo", "f2llmv2"),
    _GPT4O: ("gpt-4o", "llama4", "kanana2"),
    PreTokenizer((rf"{_TITLE}|{_CAPITALS}|\p{{N}}|{_SLASH_TAIL}",), ignore_merges=True, add_bos=True): (
        "tekken",
    ),
    PreTokenizer((r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, r"[0-9][0-9][0-9]")): ("falcon",),
    PreTokenizer((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _HAN_HANGUL, r"\p{N}")): ("deepseek-coder",),
    PreTokenizer(
        (
            r"\p{N}{1,3}",
            _HAN_KANA,
            r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
            r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        )
    ): ("deepseek-v3",),
}
PRE_TOKENIZERS: dict[str, PreTokenizer] = {
    name: pre_tokenizer for pre_tokenizer, names in _GROUPS.items() for name in names
}
