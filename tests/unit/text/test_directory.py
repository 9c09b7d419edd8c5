"""Directories in Hugging Face layout against transformers' AutoTokenizer, string by string."""

from __future__ import annotations

import json

import pytest
import transformers
from tokenizers import AddedToken
from tp_testing.awkward_text import AWKWARD

from tp_runtime.text import load_tokenizer

KINDS = ("gpt2", "llama3", "qwen2", "llama2_legacy", "llama2_first", "unigram", "starred_flags")
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "  What is 12 + 30?\n"},
    {"role": "assistant", "content": "42"},
    {"role": "user", "content": "日本語 😀 please"},
]


@pytest.fixture(params=KINDS)
def pair(request, directories):
    path = directories[request.param]
    return load_tokenizer(path), transformers.AutoTokenizer.from_pretrained(path)


def steering_ids(theirs) -> set[int]:
    """Ids of the special tokens, without <unk>, which plain text may rightly contain."""
    special = {i for i, token in theirs.added_tokens_decoder.items() if token.special}
    return special - {theirs.unk_token_id}


def test_plain_text_has_the_same_ids(pair):
    """Control tokens typed by a user: transformers keeps them plain with split_special_tokens, except in
    a Unigram vocabulary, where the model itself finds them; there we differ on purpose (next test)."""
    ours, theirs = pair
    compared = 0
    for text in AWKWARD:
        expected = theirs(text, split_special_tokens=True, add_special_tokens=False)["input_ids"]
        if not set(expected) & steering_ids(theirs):
            assert ours.encode(text, add_special=False) == expected, repr(text)
            compared += 1
    assert compared >= len(AWKWARD) - 4


def test_typed_control_tokens_never_count(pair):
    ours, theirs = pair
    forbidden = steering_ids(theirs)
    assert len(forbidden) >= 5
    for token_id in forbidden:
        token = theirs.added_tokens_decoder[token_id].content
        for text in (token, f"a{token}b", f"a {token} b", token * 3):
            ids = ours.encode(text, add_special=False)
            assert not forbidden & set(ids), (text, ids)


def test_special_tokens_count_where_allowed(pair):
    ours, theirs = pair
    extra = [
        "a <|user|>  b",
        "a  <mask> b",
        "STOP STOPPING STOP",
        "<|im_start|> <s> x </s>  y",
        "<s>",
        "<s> a",
    ]
    for text in (*AWKWARD, *extra):
        assert ours.encode(text, allow_special=True) == theirs(text)["input_ids"], repr(text)
        without = theirs(text, add_special_tokens=False)["input_ids"]
        assert ours.encode(text, allow_special=True, add_special=False) == without, repr(text)


def test_decode_is_the_same(pair):
    ours, theirs = pair
    for text in AWKWARD:
        ids = theirs(text)["input_ids"]
        for skip in (True, False):
            expected = theirs.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
            assert ours.decode(ids, skip_special=skip) == expected, (text, skip)


def test_chat_is_the_same(pair):
    ours, theirs = pair
    for prompt in (True, False):
        expected = theirs.apply_chat_template(CHAT, add_generation_prompt=prompt)["input_ids"]
        assert ours.encode_chat(CHAT, add_generation_prompt=prompt) == expected


def test_facts(pair):
    ours, theirs = pair
    assert ours.vocab_size == max(theirs.get_vocab().values()) + 1
    assert ours.bos_id == theirs.bos_token_id
    assert ours.eos_ids == {theirs.eos_token_id}
    assert ours.chat_template == theirs.chat_template
    for token_id in (-1, ours.vocab_size, 10**9):
        assert ours.token_bytes(token_id) == b""


def test_tokenizer_json_decides_on_bos_not_the_config(directories, tmp_path):
    source = directories["llama3"]
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((source / name).read_bytes())
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    for flags in ({"add_bos_token": False}, {"add_bos_token": True, "add_eos_token": True}):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({**config, **flags}))
        theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
        assert load_tokenizer(tmp_path).encode("Hello") == theirs("Hello")["input_ids"], flags


def test_end_ids_of_generation_config(directories, tmp_path):
    source = directories["gpt2"]
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((source / name).read_bytes())
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [4, 5]}))
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 5}))
    assert load_tokenizer(tmp_path).eos_ids == {2, 4, 5}


def test_added_tokens_that_the_template_writes_are_control_tokens(directories, tmp_path):
    """Some models leave role marks such as <think> unmarked; in user text they must stay text."""
    source = directories["qwen2"]
    (tmp_path / "tokenizer.json").write_bytes((source / "tokenizer.json").read_bytes())
    plain = load_tokenizer(tmp_path)
    think = plain.encode("<think>", add_special=False)
    assert len(think) == 1, "an added token that no template writes is found in any text, as in transformers"
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0].content }}<think>")
    ours = load_tokenizer(tmp_path)
    assert think[0] not in ours.encode("a<think>b")
    ids = ours.encode_chat([{"role": "user", "content": "<think>"}])
    assert ids.count(think[0]) == 1 and ids.index(think[0]) > 1
    assert ours.decode(ids) == "<think><think>", "it is not hidden: the file does not mark it special"


def test_a_tokenizer_with_a_normalised_added_token(directories, tmp_path):
    from tokenizers import Tokenizer as FastTokenizer

    fast = FastTokenizer.from_file(str(directories["gpt2"] / "tokenizer.json"))
    fast.add_tokens([AddedToken("Paris")])
    fast.save(str(tmp_path / "tokenizer.json"))
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    text = "in Paris, Paris"
    assert load_tokenizer(tmp_path).encode(text) == theirs(text)["input_ids"]
