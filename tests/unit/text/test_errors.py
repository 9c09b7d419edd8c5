"""Everything that can be wrong with a tokenizer's files, one sentence each."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from tokenizers import decoders
from tp_testing import vocabularies

from tp_runtime.errors import RequestError, TokenizerError
from tp_runtime.text import load_tokenizer


@pytest.mark.parametrize(
    ("files", "sentence"),
    [
        ({}, "no tokenizer in .*: neither tokenizer.json nor tokenizer.model is there"),
        ({"tokenizer.json": "{"}, "cannot be used: "),
        ({"tokenizer.json": '{"model": 3}'}, "cannot be used: "),
        ({"tokenizer.json": ""}, "cannot be used: "),
        ({"tokenizer.model": "not a model"}, "cannot be used: "),
        ({"tokenizer.model": "", "tokenizer_config.json": "[1]"}, "holds a list, where a dictionary"),
        ({"tokenizer.model": "", "tokenizer_config.json": "{]"}, "is no readable JSON"),
        ({"tokenizer.model": "", "generation_config.json": "\x00"}, "is no readable JSON"),
        ({"tokenizer.model": "", "special_tokens_map.json": "[" * 100_000}, "is no readable JSON"),
    ],
)
def test_broken_directories(files, sentence, tmp_path):
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(TokenizerError, match=sentence) as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


def test_missing_paths(tmp_path):
    with pytest.raises(TokenizerError, match="there is no such file or directory"):
        load_tokenizer(tmp_path / "nothing")


@pytest.mark.parametrize("kept_bytes", [0, 3, 4, 20, 24, 30, 60, 2000])
def test_broken_gguf_files(kept_bytes, tmp_path):
    metadata = vocabularies.byte_level_metadata(vocabularies.gpt2(), "gpt-2")
    path = vocabularies.write_gguf(tmp_path / "m.gguf", metadata)
    path.write_bytes(path.read_bytes()[:kept_bytes])
    with pytest.raises(TokenizerError, match="m.gguf is no readable GGUF file: ") as caught:
        load_tokenizer(path)
    assert "\n" not in str(caught.value)
    path.write_text("hello, I am no model")
    with pytest.raises(TokenizerError, match="GGUF magic invalid"):
        load_tokenizer(path)


@pytest.mark.parametrize(
    "decoder",
    [None, decoders.WordPiece(), decoders.Sequence([decoders.Replace("_", " "), decoders.Fuse()])],
)
def test_unknown_decoders(decoder, tmp_path):
    fast = vocabularies.gpt2()
    state = json.loads(fast.to_str())
    state["decoder"] = None if decoder is None else json.loads(decoder.__getstate__())
    (tmp_path / "tokenizer.json").write_text(json.dumps(state))
    with pytest.raises(TokenizerError, match="cannot be used: (it has no|its) decoder"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(("text", "at"), [("\ud800", 0), ("ok \udc80", 3), ("😀\ud83d", 1)])
def test_lone_surrogates_are_refused(directories, text, at):
    for kind in ("gpt2", "llama2_legacy"):
        with pytest.raises(RequestError, match=f"lone surrogate, .* at character {at},") as caught:
            load_tokenizer(directories[kind]).encode(text)
        str(caught.value).encode("utf-8")


def test_only_text_is_encoded(directories):
    with pytest.raises(RequestError, match="a text is needed, and bytes was given"):
        load_tokenizer(directories["gpt2"]).encode(b"bytes")


def test_text_needs_no_torch():
    heavy = "{'torch', 'transformers', 'numpy', 'gguf'}"
    program = f"import sys, tp_runtime.text.gguf_vocab; print(sorted({heavy} & set(sys.modules)))"
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "[]\n"
