"""Prompts as Python callers bring them: what is taken, and the sentence for what is not."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from tp_runtime.config import SamplingParams
from tp_runtime.engine.requests import prompt_items, token_ids, with_params
from tp_runtime.errors import RequestError

VOCAB = 100


@pytest.mark.parametrize(
    "prompt",
    [[5, 6], (5, 6), range(5, 7), np.array([5, 6]), torch.tensor([5, 6]), [np.int32(5), np.uint8(6)]],
    ids=repr,
)
def test_ids_are_plain_numbers(prompt: Any) -> None:
    found = token_ids(prompt_items(prompt), VOCAB)
    assert found == (5, 6) and all(type(token) is int for token in found)


@pytest.mark.parametrize(
    ("prompt", "sentence"),
    [
        (None, "a prompt is of type NoneType; give a text"),
        (5, "a prompt is of type int"),
        (np.array(5), "a prompt is of type ndarray"),
        (torch.tensor(5), "a prompt is of type Tensor"),
        ({"role": "user", "content": "x"}, "a prompt is of type dict"),
        ({5, 6}, "a prompt is of type set"),
        (iter([5, 6]), "a prompt is of type list_iterator"),
        (b"abc", "a prompt is of type bytes"),
        (torch.ones(3, device="meta"), "a prompt is a tensor without values"),
        (["a"], "a prompt holds a str where a token id should be"),
        ([None], "a prompt holds a NoneType"),
        ([1.5, 2.0], "a prompt holds a float"),
        ([True, False], "a prompt holds a bool"),
        (np.array([1.5]), "a prompt holds a float"),
        (np.array([[5, 6]]), "a prompt holds a list"),
        (torch.tensor([True]), "a prompt holds a bool"),
        ([5, 100], "token ids outside 0..99"),
        ([-1], "token ids outside 0..99"),
    ],
    ids=repr,
)
def test_other_prompts_are_one_sentence(prompt: Any, sentence: str) -> None:
    with pytest.raises(RequestError, match=sentence) as caught:
        token_ids(prompt_items(prompt), VOCAB)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "prompts",
    ["abc", b"abc", bytearray(b"abc"), {"abc"}, None, 5, np.array(5), torch.tensor(5), {"role": "user"}],
    ids=repr,
)
def test_what_is_no_list_of_prompts(prompts: Any) -> None:
    with pytest.raises(RequestError, match=r"^prompts is (a|of) .*; give a list of prompts$"):
        with_params(prompts, None)


def test_params_for_all_or_for_each() -> None:
    hot = SamplingParams(temperature=1.0)
    assert with_params((text for text in ("a", "b")), hot) == [("a", hot), ("b", hot)]
    assert with_params(["a", [5]], None) == [("a", SamplingParams()), ([5], SamplingParams())]
    assert with_params(["a", "b"], [hot, SamplingParams()]) == [("a", hot), ("b", SamplingParams())]
    with pytest.raises(RequestError, match="2 prompts came with 1 sampling parameters"):
        with_params(["a", "b"], [hot])
    for other in ({"temperature": 1}, "hot", np.array([1, 2])):
        with pytest.raises(RequestError, match="params is no SamplingParams"):
            with_params(["a"], other)  # type: ignore[arg-type]
