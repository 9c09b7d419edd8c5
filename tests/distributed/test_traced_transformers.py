"""transformers models, unedited, split by `shard`: compiled, generating, quantised, saved, loaded from meta.

Tiny random models of the library's own classes, fp32, two ranks. Compiled and eager logits differ by the
order of sums alone; quantised ones differ from the quantised whole model only so, because values are those
of the whole weight.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from tp_testing.ranks import run_ranks

import tp_runtime
from tp_runtime.mesh import init_mesh

transformers = pytest.importorskip("transformers")

TOLERANCE = 5e-5  # of the largest logit: fp32 sums of some hundred values, twice a layer
COMMON = {
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "vocab_size": 128,
    "pad_token_id": 0,
}
HEADS = {"num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 8}
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", {**COMMON, **HEADS}),
    "qwen3": ("Qwen3ForCausalLM", {**COMMON, **HEADS}),
    "gpt2": (
        "GPT2LMHeadModel",
        {"n_embd": 48, "n_layer": 2, "n_head": 6, "vocab_size": 128, "pad_token_id": 0},
    ),
    "mixtral": ("MixtralForCausalLM", {**COMMON, **HEADS, "num_local_experts": 4}),
    "gemma3": ("Gemma3ForCausalLM", {**COMMON, **HEADS, "sliding_window": 8}),
}


def _build(name: str) -> nn.Module:
    class_name, settings = CONFIGS[name]
    model_class = getattr(transformers, class_name)
    torch.manual_seed(3)
    model: nn.Module = model_class(model_class.config_class(**settings)).eval()
    for parameter in model.parameters():
        parameter.data += torch.randn_like(parameter) * 0.1
    return model


def _ids() -> Tensor:
    return torch.randint(5, 120, (2, 12), generator=torch.Generator().manual_seed(4))


def _error(got: Tensor, wanted: Tensor) -> tuple[float, float]:
    error = (got - wanted).abs() / wanted.abs().max()
    return float(error.max()), float(error.mean())


def _generates(name: str) -> tuple[bool, tuple[float, float]]:
    model = _build(name)
    with torch.no_grad():
        wanted = model(_ids()).logits
        tokens = model.generate(_ids(), max_new_tokens=6, do_sample=False)
        tp_runtime.shard(model, init_mesh(), cache=False)
        same = torch.equal(model.generate(_ids(), max_new_tokens=6, do_sample=False), tokens)
        return same, _error(model(_ids()).logits, wanted)


@pytest.mark.parametrize("name", CONFIGS)
def test_greedy_tokens_are_the_whole_models(name: str) -> None:
    for same, (largest, mean) in run_ranks(2, _generates, name):
        print(f"{name}: largest error {largest:.2e}, mean {mean:.2e}")
        assert same and largest <= TOLERANCE


def _generates_from_a_padded_batch() -> bool:
    """One KV head on two ranks: with a mask, attention repeats it by a number that it reads."""
    model_class = transformers.LlamaForCausalLM
    torch.manual_seed(3)
    config = model_class.config_class(**{**COMMON, **HEADS, "num_key_value_heads": 1})
    model = model_class(config).eval()
    mask = torch.ones_like(_ids())
    mask[0, :5] = 0
    settings = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False}
    tokens = model.generate(_ids(), **settings)
    tp_runtime.shard(model, init_mesh(), cache=False)
    held = model.model.layers[0].self_attn.q_proj.weight.shape[0]
    return held == 24 and torch.equal(model.generate(_ids(), **settings), tokens)


def test_a_padded_batch_with_fewer_key_value_heads_than_ranks() -> None:
    assert run_ranks(2, _generates_from_a_padded_batch) == [True, True]


def _compiles(name: str) -> tuple[float, float]:
    model = tp_runtime.shard(_build(name), init_mesh(), cache=False)
    with torch.no_grad():
        eager = model(_ids(), use_cache=False).logits
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        return _error(compiled(_ids(), use_cache=False).logits, eager)


@pytest.mark.parametrize(
    "name",
    ["llama", "gpt2", *(pytest.param(n, marks=pytest.mark.full) for n in ("qwen3", "mixtral", "gemma3"))],
)
def test_a_sharded_model_compiles_in_one_graph(name: str) -> None:
    for largest, mean in run_ranks(2, _compiles, name, timeout=300.0):
        print(f"{name} compiled: largest error {largest:.2e}, mean {mean:.2e}")
        assert largest <= TOLERANCE


def _quantises(format: str, first: bool) -> tuple[float, float]:
    whole = tp_runtime.quantize(_build("llama"), format)
    model = _build("llama")
    if first:
        model = tp_runtime.shard(tp_runtime.quantize(model, format), init_mesh(), cache=False)
    else:
        model = tp_runtime.quantize(tp_runtime.shard(model, init_mesh(), cache=False), format)
    with torch.no_grad():
        return _error(model(_ids()).logits, whole(_ids()).logits)


@pytest.mark.parametrize("first", [True, False], ids=["before shard", "after shard"])
@pytest.mark.parametrize("format", ["int8", "int4"])
def test_quantised_values_are_the_whole_models(format: str, first: bool) -> None:
    for largest, mean in run_ranks(2, _quantises, format, first):
        print(f"{format}: largest error {largest:.2e}, mean {mean:.2e}")
        # Kernels round activations of a row-parallel weight's inputs apart on each rank.
        assert largest <= 2e-2 if format == "int8" else largest <= 2e-2


def _round_trip(folder: str) -> tuple[bool, tuple[float, float], int]:
    model = _build("llama")
    rank = torch.distributed.get_rank()
    before = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        wanted = model(_ids()).logits
    tp_runtime.unshard(tp_runtime.shard(model, init_mesh(), cache=False))
    same = all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    if rank == 0:
        model.save_pretrained(folder)
    torch.distributed.barrier()
    with torch.device("meta"):
        empty = type(model)(model.config).eval()
    tp_runtime.shard(empty, init_mesh(), cache=False)
    held = sum(p.numel() for p in empty.parameters())
    tp_runtime.load(empty, folder)
    with torch.no_grad():
        return same, _error(empty(_ids()).logits, wanted), held


def test_a_state_dict_comes_back_and_fills_a_meta_model(tmp_path: Path) -> None:
    whole = sum(p.numel() for p in _build("llama").parameters())
    for same, (largest, mean), held in run_ranks(2, _round_trip, str(tmp_path)):
        print(f"loaded from meta: largest error {largest:.2e}, mean {mean:.2e}, {held} of {whole} values")
        assert same and largest <= TOLERANCE and held < 0.75 * whole
