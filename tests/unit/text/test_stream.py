"""Streaming against decoding at once: the same text, whole characters, linear cost."""

from __future__ import annotations

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from tp_testing.awkward_text import AWKWARD
from tp_testing.vocabularies import train_sentencepiece

from tp_runtime.text import load_tokenizer
from tp_runtime.text.pieces import Spelling, byte_alphabet
from tp_runtime.text.stream import StreamDecoder


@pytest.fixture(
    scope="module", params=["gpt2", "llama2_legacy", "llama2_first", "unigram", "tokenizer.model"]
)
def tokenizer(request, directories, sentencepiece_model, tmp_path_factory):
    if request.param in directories:
        return load_tokenizer(directories[request.param])
    path = tmp_path_factory.mktemp("stream")
    (path / request.param).write_bytes(sentencepiece_model)
    return load_tokenizer(path)


def pieces_of(tokenizer, ids, **options) -> list[str]:
    stream = tokenizer.stream(**options)
    return [*(stream.push(token_id) for token_id in ids), stream.flush()]


def slow_text(tokenizer, ids, skip_special: bool) -> str:
    """The obvious twin: all bytes first, then one character after another."""
    data = b"".join(
        b"" if skip_special and control_is_hidden(tokenizer, i) else tokenizer.token_bytes(i) for i in ids
    )
    if tokenizer._spelling.strip_first_space and data.startswith(b" "):
        data = data[1:]
    return str(data, "utf-8", "replace")


def control_is_hidden(tokenizer, token_id: int) -> bool:
    return token_id in tokenizer._controls and tokenizer._controls[token_id].hidden


def test_awkward_strings_arrive_whole(tokenizer):
    for text in AWKWARD:
        ids = tokenizer.encode(text)
        pieces = pieces_of(tokenizer, ids)
        assert "".join(pieces) == tokenizer.decode(ids)
        if "\ufffd" not in text:
            assert not any("\ufffd" in piece for piece in pieces), repr(text)


@settings(max_examples=100, deadline=None)
@given(data=st.data(), skip_special=st.booleans(), continuation=st.booleans())
def test_random_ids(tokenizer, data, skip_special, continuation):
    ids = data.draw(st.lists(st.integers(-1, tokenizer.vocab_size + 1), max_size=40))
    pieces = pieces_of(tokenizer, ids, skip_special=skip_special, continuation=continuation)
    whole = tokenizer.decode(ids, skip_special=skip_special, continuation=continuation)
    assert "".join(pieces) == whole
    if not continuation:
        assert whole == slow_text(tokenizer, ids, skip_special)
    for piece in pieces:
        piece.encode("utf-8")


@settings(max_examples=100, deadline=None)
@given(text=st.text(max_size=40))
def test_random_text_arrives_whole(tokenizer, text):
    """Where decoding gives the text without U+FFFD, no piece has one: no half character is ever shown."""
    ids = tokenizer.encode(text)
    pieces = pieces_of(tokenizer, ids)
    assert "".join(pieces) == tokenizer.decode(ids)
    if "\ufffd" not in tokenizer.decode(ids):
        assert not any("\ufffd" in piece for piece in pieces)


@settings(max_examples=300, deadline=None)
@given(chunks=st.lists(st.binary(max_size=5), max_size=20))
def test_any_bytes(chunks):
    stream = StreamDecoder(chunks.__getitem__, strip_first_space=False)
    pieces = [stream.push(index) for index in range(len(chunks))]
    pieces.append(stream.flush())
    assert "".join(pieces) == b"".join(chunks).decode("utf-8", errors="replace")


def test_a_character_waits_for_its_last_byte():
    stream = StreamDecoder(lambda index: "é😀".encode()[index : index + 1], strip_first_space=False)
    assert [stream.push(index) for index in range(6)] == ["", "é", "", "", "", "😀"]
    assert stream.flush() == ""


def test_an_unfinished_character_is_given_out_at_the_end():
    stream = StreamDecoder(lambda index: "😀".encode()[index : index + 1], strip_first_space=False)
    assert [stream.push(0), stream.push(1), stream.flush()] == ["", "", "\ufffd"]


def test_the_leading_space(tmp_path):
    model = train_sentencepiece()
    (tmp_path / "tokenizer.model").write_bytes(model)
    tokenizer = load_tokenizer(tmp_path)
    ids = sentencepiece.SentencePieceProcessor(model_proto=model).encode("Paris is")
    assert "".join(pieces_of(tokenizer, ids)) == "Paris is"
    assert "".join(pieces_of(tokenizer, ids, continuation=True)) == " Paris is"
    assert tokenizer.decode([1, *ids]) == "Paris is", "a hidden token is no text before the space"
    assert tokenizer.decode([1, *ids], skip_special=False) == "<s> Paris is"


def test_cost_is_linear():
    """Bytes handled per token do not grow: the decoder never holds more than three."""
    stream = StreamDecoder(lambda _: b"\xf0\x9f\x98", strip_first_space=False)
    for index in range(1000):
        stream.push(index)
        assert len(stream._decoder.getstate()[0]) <= 3


def test_byte_alphabet():
    alphabet = byte_alphabet()
    assert sorted(alphabet.values()) == list(range(256))
    assert (alphabet["Ġ"], alphabet["Ċ"], alphabet["A"], alphabet["é"]) == (32, 10, 65, 0xE9)


def test_spellings():
    assert Spelling(byte_level=True).to_bytes("ĠÃ©") == " é".encode()
    assert Spelling(byte_level=True).to_bytes("｜日｜") == "｜日｜".encode()
    marked = Spelling(space_mark=True, byte_tokens=True)
    assert marked.to_bytes("▁a▁") == b" a "
    assert marked.to_bytes("<0x0A>") == b"\n"
    assert Spelling(space_mark=True).to_bytes("<0x0A>") == b"<0x0A>"
