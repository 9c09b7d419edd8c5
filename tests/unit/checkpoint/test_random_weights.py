"""Random weights: any slice is cut from the whole, repeatable, and of a sane size."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tp_runtime.checkpoint import RandomCheckpoint

SHAPES = {
    "model.embed_tokens.weight": (300, 40),
    "model.layers.0.mlp.down_proj.weight": (48, 130),
    "model.layers.0.self_attn.q_proj.bias": (48,),
    "model.norm.weight": (40,),
}


@settings(max_examples=60, deadline=None)
@given(data=st.data(), name=st.sampled_from(sorted(SHAPES)))
def test_any_slice_is_cut_from_the_whole(data: st.DataObject, name: str) -> None:
    whole = RandomCheckpoint(SHAPES).read(name)

    def cuts(extent: int) -> Any:
        pair = st.tuples(st.integers(0, extent), st.integers(0, extent)).map(sorted).map(tuple)
        return data.draw(st.lists(pair, min_size=1, max_size=3).map(tuple))

    rows = cuts(whole.shape[0])
    expected = torch.cat([whole[a:b] for a, b in rows])
    cols = None
    if whole.dim() == 2:
        cols = cuts(whole.shape[1])
        expected = torch.cat([expected[:, a:b] for a, b in cols], dim=1)
    assert torch.equal(RandomCheckpoint(SHAPES).read(name, rows, cols), expected)


def test_names_and_seeds_make_the_values() -> None:
    shapes = {"a.weight": (64, 64), "b.weight": (64, 64)}
    first = RandomCheckpoint(shapes)
    assert not torch.equal(first.read("a.weight"), first.read("b.weight"))
    assert not torch.equal(first.read("a.weight"), RandomCheckpoint(shapes, seed=1).read("a.weight"))
    assert torch.equal(first.read("a.weight"), RandomCheckpoint({"a.weight": (64, 64)}).read("a.weight"))


def test_values_are_bf16_whatever_dtype_is_asked_for() -> None:
    made = RandomCheckpoint(SHAPES)
    brain = made.read("model.embed_tokens.weight", dtype=torch.bfloat16)
    assert torch.equal(made.read("model.embed_tokens.weight", dtype=torch.float32), brain.float())
    assert made.info("model.embed_tokens.weight").type_name == "BF16"


@pytest.mark.parametrize(("n", "k"), [(1, 64), (4096, 64), (512, 2048), (1500, 1000)])
def test_rows_differ_and_have_unit_gain(n: int, k: int) -> None:
    w_NK = RandomCheckpoint({"w": (n, k)}).read("w")
    assert len(torch.unique(w_NK, dim=0)) == n
    gain = w_NK.square().sum(dim=1).mean()
    assert 0.7 < gain < 1.3  # the sum of k squares of N(0, 1/k); k = 64 in one row spreads by 0.18


def test_norms_are_near_one_and_biases_near_zero() -> None:
    made = RandomCheckpoint(SHAPES)
    assert (made.read("model.norm.weight") - 1).abs().max() < 0.2
    assert made.read("model.layers.0.self_attn.q_proj.bias").abs().max() < 0.2


def test_activations_stay_finite_through_many_layers() -> None:
    shapes = {f"{i}.weight": (256, 256) for i in range(40)}
    made = RandomCheckpoint(shapes)
    x = torch.randn(256, generator=torch.Generator().manual_seed(0))
    for name in shapes:
        x = made.read(name) @ x
    assert 0.05 < x.std() < 20
