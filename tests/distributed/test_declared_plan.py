"""A model cut by its declared plan gives the plain model's logits at every world size.

fp32; ranks differ from the plain model only in the order of sums. World 1 is the plain model, bit for bit.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from tp_testing.ranks import run_ranks

from tp_runtime.mesh import init_mesh, tp_group
from tp_runtime.models.config import ModelConfig
from tp_runtime.models.llama import Llama, causal_attention
from tp_runtime.sharding.layers import apply_declared, gather_last_dim
from tp_runtime.sharding.rules import DecoderShape, plan_decoder

TOLERANCE = 2e-5
HEADS = [(9, 3), (10, 2), (4, 1), (6, 6), (8, 4)]
KINDS = {
    "plain": {},
    "tied": {"tie_word_embeddings": True},
    "biases": {"attention_bias": True, "attention_out_bias": True},
    "qk norm, window": {"qk_norm": True, "sliding_window": 5},
}

Case = tuple[tuple[int, int], str, int]  # (query heads, KV heads), kind, batch


def _config(heads: tuple[int, int], kind: str) -> ModelConfig:
    """Tiny, and of sizes (vocabulary, neurons) that no world size divides."""
    return ModelConfig(
        vocab_size=101,
        hidden_size=40,
        intermediate_size=157,
        num_layers=2,
        num_heads=heads[0],
        num_kv_heads=heads[1],
        head_dim=8,
        max_position_embeddings=64,
        **KINDS[kind],
    )


def _shape(config: ModelConfig) -> DecoderShape:
    return DecoderShape(
        config.vocab_size,
        config.hidden_size,
        config.intermediate_size,
        config.num_layers,
        config.num_heads,
        config.num_kv_heads,
        config.head_dim,
        config.tie_word_embeddings,
        config.attention_bias,
        config.attention_out_bias,
        config.qk_norm,
    )


def _plain(config: ModelConfig) -> Llama:
    model = Llama(config).eval()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        nn.init.normal_(parameter, mean=float("norm" in name), std=0.2, generator=generator)
    return model


def _compare(cases: list[Case]) -> list[tuple[float, float, float]]:
    """In each rank: per case the largest and mean error, and the largest logit."""
    mesh = init_mesh()
    with torch.inference_mode():
        return [_errors(_config(heads, kind), batch, mesh) for heads, kind, batch in cases]


def _errors(config: ModelConfig, batch: int, mesh: DeviceMesh) -> tuple[float, float, float]:
    plain, sharded = _plain(config), _plain(config)
    plan = plan_decoder(_shape(config), mesh.size())
    apply_declared(sharded, plan, mesh)
    ids = torch.randint(0, config.vocab_size, (batch, 13), generator=torch.Generator().manual_seed(batch))
    positions = torch.arange(13).expand(batch, 13)
    wanted = plain(ids, positions)
    head = plan["model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"]
    got = gather_last_dim(sharded(ids, positions), head.parts, tp_group(mesh))
    assert got.shape == wanted.shape
    error = (got - wanted).abs()
    return error.max().item(), error.mean().item(), wanted.abs().max().item()


def _check(world: int, cases: list[Case]) -> None:
    ranks = run_ranks(world, _compare, cases)
    for case, *found in zip(cases, *ranks, strict=True):
        largest, mean, logit = found[0]
        print(f"world {world}, {case}: error max {largest:.1e} mean {mean:.1e}, logits to {logit:.1f}")
        assert all(rank == found[0] for rank in found), "ranks disagree"
        assert largest == 0.0 if world == 1 else largest < TOLERANCE * max(1.0, logit)


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_logits(world: int) -> None:
    """All heads, each with one kind of model, and all kinds."""
    kinds = itertools.cycle(KINDS)
    _check(
        world, [(heads, kind, batch) for heads, kind in zip(HEADS, kinds, strict=False) for batch in (1, 3)]
    )


@pytest.mark.full
@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_logits_of_all_pairs(world: int) -> None:
    """Every heads with every kind."""
    _check(world, list(itertools.product(HEADS, KINDS, (1, 3))))


def _graphs() -> tuple[int, float]:
    """Graphs that torch.compile makes of the layers of one sharded model, and the error of their chain."""
    config, mesh = _config((9, 3), "biases"), init_mesh()
    model, graphs = _plain(config), []
    apply_declared(model, plan_decoder(_shape(config), mesh.size()), mesh)

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    def step(layer: nn.Module, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        return layer(x, cos, sin, lambda _, q, k, v: causal_attention(q, k, v))

    compiled = torch.compile(step, fullgraph=True, dynamic=False, backend=backend)
    with torch.inference_mode():
        cos, sin = model.rotary(torch.arange(7))
        x = y = torch.randn(7, config.hidden_size, generator=torch.Generator().manual_seed(1))
        for layer in model.model.layers:
            x, y = step(layer, x, cos, sin), compiled(layer, y, cos, sin)
    return len(graphs), (x - y).abs().max().item()


def test_one_graph_for_all_layers() -> None:
    """Collectives included, with no graph break."""
    assert run_ranks(2, _graphs) == [(1, 0.0), (1, 0.0)]


def _refusals() -> tuple[str, str]:
    mesh = init_mesh()
    config = _config((4, 2), "plain")
    with pytest.raises(ValueError) as other_world:
        apply_declared(_plain(config), plan_decoder(_shape(config), 3), mesh)
    other = _config((6, 2), "plain")
    with pytest.raises(ValueError) as other_shape:
        apply_declared(_plain(other), plan_decoder(_shape(config), 2), mesh)
    return str(other_world.value), str(other_shape.value)


def test_a_plan_of_another_model_is_refused() -> None:
    for world, shape in run_ranks(2, _refusals):
        assert "for 3 ranks cannot be applied on 2" in world
        assert "self_attn.q_proj.weight has shape (48, 40)" in shape
