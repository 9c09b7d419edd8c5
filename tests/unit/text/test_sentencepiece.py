"""tokenizer.model against sentencepiece itself and transformers' LlamaTokenizer."""

from __future__ import annotations

import json
import random

import pytest
import sentencepiece
from tp_testing.awkward_text import AWKWARD
from tp_testing.vocabularies import train_sentencepiece
from transformers import LlamaTokenizer
from transformers.tokenization_utils_base import generate_merges

from tp_runtime.text import load_tokenizer


@pytest.fixture(scope="module")
def processor(sentencepiece_model):
    return sentencepiece.SentencePieceProcessor(model_proto=sentencepiece_model)


def directory_with(path, model: bytes, **config: object):
    (path / "tokenizer.model").write_bytes(model)
    if config:
        (path / "tokenizer_config.json").write_text(json.dumps(config))
    return path


@pytest.fixture
def ours(tmp_path, sentencepiece_model):
    return load_tokenizer(directory_with(tmp_path, sentencepiece_model))


def test_encode_is_sentencepieces(ours, processor):
    for text in AWKWARD:
        assert ours.encode(text, add_special=False) == processor.encode(text), repr(text)
        assert ours.encode(text) == [processor.bos_id(), *processor.encode(text)], "Llama begins with BOS"


def test_decode_is_sentencepieces(ours, processor):
    for text in AWKWARD:
        ids = processor.encode(text, add_bos=True, add_eos=True)
        assert ours.decode(ids) == processor.decode(ids), repr(text)
    rng = random.Random(0)
    words = [
        i for i in range(processor.vocab_size()) if not processor.is_byte(i) and not processor.is_unknown(i)
    ]
    for _ in range(200):
        ids = rng.choices(words, k=12)
        assert ours.decode(ids) == processor.decode(ids), ids


def test_other_settings(tmp_path):
    """No leading space, no byte tokens, Unigram, normalisation: sentencepiece knows."""
    variants = {
        "bare": train_sentencepiece(add_dummy_prefix=False),
        "unigram": train_sentencepiece("unigram", vocab_size=400, byte_fallback=False),
        "nfkc": train_sentencepiece(normalization_rule_name="nmt_nfkc", remove_extra_whitespaces=True),
    }
    for name, model in variants.items():
        (tmp_path / name).mkdir()
        ours = load_tokenizer(directory_with(tmp_path / name, model))
        processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        for text in AWKWARD:
            ids = processor.encode(text)
            assert ours.encode(text, add_special=False) == ids, (name, text)
            if processor.unk_id() not in ids:
                assert ours.decode(ids) == processor.decode(ids), (name, text)


def test_against_transformers_llama_tokenizer(tmp_path, sentencepiece_model, processor):
    """LlamaTokenizer made from the same pieces and scores. Its Metaspace adds no space before text that
    has one, where sentencepiece adds its own all the same; such texts are left to the tests above."""
    pieces = {processor.id_to_piece(i): i for i in range(processor.vocab_size())}
    scores = {piece: processor.get_score(i) for piece, i in pieces.items()}
    control = {processor.id_to_piece(i) for i in range(processor.vocab_size()) if processor.is_control(i)}
    theirs = LlamaTokenizer(vocab=pieces, merges=generate_merges(pieces, scores, skip_tokens=control))
    theirs.add_special_tokens({"additional_special_tokens": sorted(control - {"<s>", "</s>"})})
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model)
    ours = load_tokenizer(tmp_path)
    compared = 0
    for text in AWKWARD:
        if text.startswith((" ", "\u2581")) or "<unk>" in text:
            continue
        expected = theirs.encode(text, add_special_tokens=False, split_special_tokens=True)
        assert ours.encode(text, add_special=False) == expected, repr(text)
        assert ours.decode(expected) == theirs.decode(expected, skip_special_tokens=True), repr(text)
        compared += 1
    assert compared > 30


def test_control_and_added_tokens(tmp_path, sentencepiece_model, processor):
    size = processor.vocab_size()
    config = {
        "bos_token": {"content": "<s>", "lstrip": False},
        "eos_token": "</s>",
        "add_bos_token": False,
        "added_tokens_decoder": {
            "1": {"content": "<s>", "special": True},
            str(size): {"content": "<|turn|>", "special": True, "rstrip": True},
            str(size + 1): {"content": "<tool>", "special": False},
        },
    }
    ours = load_tokenizer(directory_with(tmp_path, sentencepiece_model, **config))
    start = processor.piece_to_id("<|im_start|>")
    assert ours.vocab_size == size + 2 and ours.eos_ids == {2} and ours.bos_id == 1
    assert ours.encode("Hello") == processor.encode("Hello")
    assert ours.encode("<|im_start|>x<|turn|>  y", allow_special=True) == [
        *(start, *processor.encode("x")),
        *(size, *processor.encode("y")),
    ]
    typed = ours.encode("a<tool>b<|turn|><s>")
    assert size + 1 in typed and not {size, start, 1} & set(typed), (
        "only the unmarked one is found in user text"
    )
    assert ours.decode([1, size, start, size + 1]) == "<tool>"
    assert ours.decode([start, size], skip_special=False) == "<|im_start|><|turn|>"


def test_no_space_after_control_tokens_unless_legacy(tmp_path, sentencepiece_model, processor):
    ours = load_tokenizer(directory_with(tmp_path, sentencepiece_model, legacy=False))
    ids = ours.encode("Hello<s>Hello", allow_special=True, add_special=False)
    at = ids.index(1)
    assert ids[:at] == processor.encode("Hello")
    assert processor.id_to_piece(ids[at + 1])[0] == "H"
    assert ours.decode(ids) == "HelloHello"
