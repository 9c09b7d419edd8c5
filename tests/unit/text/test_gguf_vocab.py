"""Vocabularies inside GGUF files against the tokenizers they were written from."""

from __future__ import annotations

import random
import string

import pytest
import sentencepiece
import transformers
from tokenizers import AddedToken
from tp_testing import vocabularies
from tp_testing.awkward_text import AWKWARD, PROSE
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

from tp_runtime.errors import TokenizerError
from tp_runtime.text import load_tokenizer
from tp_runtime.text.pre_tokenizers import PRE_TOKENIZERS


@pytest.mark.parametrize(("kind", "pre"), [("gpt2", "gpt-2"), ("llama3", "llama-bpe"), ("llama3", "dbrx")])
def test_byte_level_is_the_tokenizer_it_came_from(kind, pre, directories, tmp_path):
    fast = vocabularies.KINDS[kind]()
    path = vocabularies.write_gguf(tmp_path / "m.gguf", vocabularies.byte_level_metadata(fast, pre))
    ours, theirs = load_tokenizer(path), load_tokenizer(directories[kind])
    assert ours.vocab_size == theirs.vocab_size and ours.chat_template == theirs.chat_template
    for text in AWKWARD:
        for allow in (False, True):
            expected = theirs.encode(text, add_special=False, allow_special=allow)
            assert ours.encode(text, add_special=False, allow_special=allow) == expected, repr(text)
        assert ours.decode(expected) == theirs.decode(expected)


def test_qwen2_with_user_defined_tokens_is_what_transformers_reads(tmp_path):
    fast = vocabularies.qwen2()
    fast.normalizer = None
    path = vocabularies.write_gguf(tmp_path / "m.gguf", vocabularies.byte_level_metadata(fast, "qwen2"))
    ours = load_tokenizer(path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")
    for text in AWKWARD:
        expected = theirs.encode(text, split_special_tokens=True, add_special_tokens=False)
        assert ours.encode(text) == expected, repr(text)
        assert ours.encode(text, allow_special=True) == theirs.encode(text, add_special_tokens=False)
    assert ours.decode(ours.encode("<think>x")) == "<think>x"


@pytest.mark.parametrize("pre", sorted(set(GGUF_PRE_TOKENIZER_SPLITS) & set(PRE_TOKENIZERS)))
def test_pre_tokenizers_cut_as_transformers_does(pre):
    from tokenizers import Regex, pre_tokenizers

    theirs = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(GGUF_PRE_TOKENIZER_SPLITS[pre]), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    ours = PRE_TOKENIZERS[pre].build()
    for text in (*AWKWARD, *PROSE):
        assert ours.pre_tokenize_str(text) == theirs.pre_tokenize_str(text), repr(text)


@pytest.mark.parametrize(
    ("pre", "text", "words"),
    [
        ("smollm", "in 2024  5", ["in", "Ġ", "2", "0", "2", "4", "ĠĠ", "5"]),
        ("gpt-2", "in 2024  5", ["in", "Ġ2024", "Ġ", "Ġ5"]),
        ("default", "a+b 12345", ["a", "+", "b", "Ġ", "123", "45"]),
        ("falcon", "a`b 1234", ["a", "`", "b", "Ġ", "123", "4"]),
        ("deepseek-coder", "Hi there\n12", ["Hi", "Ġthere", "Ċ", "1", "2"]),
        ("deepseek-v3", "Hi _x(y 1234", ["Hi", "Ġ_", "x", "(y", "Ġ", "123", "4"]),
        ("glm4", "1234 x", ["123", "4", "Ġx"]),
    ],
)
def test_pre_tokenizers_by_hand(pre, text, words):
    found = PRE_TOKENIZERS[pre].build().pre_tokenize_str(text)
    assert [word for word, _ in found] == words


def test_every_pre_tokenizer_keeps_every_byte():
    alphabet = vocabularies.gpt2().get_vocab()
    for name, pre_tokenizer in PRE_TOKENIZERS.items():
        built = pre_tokenizer.build()
        for text in AWKWARD:
            cut = "".join(word for word, _ in built.pre_tokenize_str(text))
            assert len(cut) == len(text.encode()), (name, text)
            assert set(cut) <= alphabet.keys()


def test_sentencepiece_vocabulary_is_sentencepiece(sentencepiece_model, tmp_path):
    path = tmp_path / "m.gguf"
    vocabularies.write_gguf(path, vocabularies.sentencepiece_metadata(sentencepiece_model))
    ours = load_tokenizer(path)
    processor = sentencepiece.SentencePieceProcessor(model_proto=sentencepiece_model)
    for text in (*AWKWARD, *PROSE):
        ids = processor.encode(text)
        assert ours.encode(text, add_special=False) == ids, repr(text)
        assert ours.encode(text) == [1, *ids], "BOS is the default of such vocabularies"
        assert ours.decode(ids) == processor.decode(ids)
        assert ours.decode(ids) == text.replace("\u2581", " "), "the mark itself reads as a space"
    rng = random.Random(0)
    letters = string.ascii_lowercase[:12] + "  éü日本語"
    for _ in range(500):
        text = "".join(rng.choices(letters, k=rng.randrange(1, 40)))
        assert ours.encode(text, add_special=False) == processor.encode(text), repr(text)


def test_sentencepiece_vocabulary_without_a_leading_space(tmp_path):
    model = vocabularies.train_sentencepiece(add_dummy_prefix=False)
    metadata = vocabularies.sentencepiece_metadata(model, add_space_prefix=False, add_bos_token=False)
    ours = load_tokenizer(vocabularies.write_gguf(tmp_path / "m.gguf", metadata))
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    for text in AWKWARD:
        assert ours.encode(text) == processor.encode(text), repr(text)
        assert ours.decode(ours.encode(text)) == text.replace("\u2581", " ")


def test_end_tokens_and_flags(tmp_path):
    fast = vocabularies.gpt2()
    fast.add_special_tokens([AddedToken("<|eot_id|>", normalized=False)])
    eot = fast.token_to_id("<|eot_id|>")
    metadata = vocabularies.byte_level_metadata(
        fast, "llama-bpe", eos_token_id=4, eot_token_id=eot, add_eos_token=True, padding_token_id=5
    )
    ours = load_tokenizer(vocabularies.write_gguf(tmp_path / "m.gguf", metadata))
    assert ours.bos_id == 1
    assert ours.eos_ids == {4, 5, eot}, "named ones, and <|endoftext|> (5) by its name"
    assert ours.encode("a") == [1, *ours.encode("a", add_special=False), 4], "llama-bpe begins with BOS"


def test_metadata_may_be_handed_over(tmp_path):
    metadata = vocabularies.byte_level_metadata(vocabularies.gpt2(), "gpt-2")
    path = vocabularies.write_gguf(tmp_path / "m.gguf", metadata)
    handed = load_tokenizer(tmp_path / "not-there.gguf", gguf_metadata=metadata)
    assert handed.encode("Hello 12") == load_tokenizer(path).encode("Hello 12")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"tokens": None}, "holds no vocabulary"),
        ({"tokens": [1, 2]}, "tokens in .* is no list of str"),
        ({"token_type": [1]}, "706 tokens but 1 entries of token_type|tokens but 1 entries"),
        ({"model": "bert"}, "has a 'bert' vocabulary; 'gpt2' and 'llama' can be read"),
        ({"model": None}, "has a None vocabulary"),
        ({"pre": "nobody-knows"}, "names the pre-tokenizer 'nobody-knows'; known are: chatglm-bpe, "),
        ({"bos_token_id": 10**6}, "bos_token_id in .* is 1000000 of"),
        ({"eos_token_id": "x"}, "eos_token_id in .* is 'x', not int"),
        ({"merges": ["zzz yyy"]}, "cannot be used: .*out of vocabulary"),
        ({"model": "llama"}, "without tokenizer.ggml.scores"),
    ],
)
def test_bad_vocabularies_are_refused_in_one_sentence(change, sentence):
    metadata = vocabularies.byte_level_metadata(vocabularies.gpt2(), "gpt-2")
    for key, value in change.items():
        metadata[f"tokenizer.ggml.{key}"] = value
    metadata = {key: value for key, value in metadata.items() if value is not None}
    with pytest.raises(TokenizerError, match=sentence) as caught:
        load_tokenizer("m.gguf", metadata)
    assert "\n" not in str(caught.value) and "m.gguf" in str(caught.value)
