"""What a plan is proved on: a copy of the model whose weights hide no error, with the first rows of large
vocabularies only.

A fresh model's norms are all ones and its biases zeros, and a weight that is address space is all zeros: a
rank that takes the wrong part of those is right by chance. So what is constant is drawn. A vocabulary divides
by tokens whatever their number, so that a few rows of a table of many million values prove as much as all.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from .inputs import FEW_TOKENS, Example
from .plan import Ranges
from .shardplan import ShardPlan
from .surrogate import LARGE_WEIGHT, make_surrogate
from .trace.rules import tensors_in

BLOCK = (1 << 20) + 7  # values that are drawn and repeated; no unit's size divides it
SAMPLE = 4096  # values of a large weight that tell whether it is constant
NOISE = 0.1


def proof_copy(
    model: nn.Module, plan: ShardPlan, example: Example, shorten: bool
) -> tuple[nn.Module, ShardPlan]:
    """(a copy whose constant weights are drawn, the plan for it). shorten: leave the first rows of large
    vocabularies, where the example has no other token; the plan is the same object where there are none.
    """
    made = make_surrogate(model).model
    short = short_vocabularies(made, example) if shorten else set()
    for number, (name, parameter) in enumerate(made.named_parameters()):
        if name in short:
            parameter.data = parameter.data[:FEW_TOKENS].clone()
        if _is_constant(parameter.data):
            parameter.data = _drawn(parameter.data, number)
    for module in made.modules():
        if isinstance(module, nn.Embedding) and (module.padding_idx or 0) >= len(module.weight):
            module.padding_idx = None
    return made, _shortened(plan, short) if short else plan


def proof_size(model: nn.Module, example: Example) -> int:
    """Values of the parameters of such a copy."""
    short = short_vocabularies(model, example)
    return sum(
        p.numel() // len(p) * FEW_TOKENS if name in short else p.numel()
        for name, p in model.named_parameters()
    )


def short_vocabularies(model: nn.Module, example: Example) -> set[str]:
    """Names of the parameters of large tables, and of the linears of as many rows, of which the example needs
    the first rows alone.
    """
    inputs = [t for call in example.calls for t in tensors_in(call[1]) + tensors_in(call[2])]
    if any(t.numel() and not t.is_floating_point() and int(t.max()) >= FEW_TOKENS for t in inputs):
        return set()
    modules = list(model.modules())
    tables = [
        m
        for m in modules
        if isinstance(m, nn.Embedding) and m.num_embeddings > FEW_TOKENS and m.weight.numel() > LARGE_WEIGHT
    ]
    sizes = {m.num_embeddings for m in tables}
    heads = [m for m in modules if isinstance(m, nn.Linear) and m.out_features in sizes]
    own = {id(p) for m in (*tables, *heads) for p in m.parameters(recurse=False)}
    return {name for name, p in model.named_parameters() if id(p) in own}


def _shortened(plan: ShardPlan, short: set[str]) -> ShardPlan:
    """The plan for a model of which these weights have their first rows alone, which divide evenly."""
    edges = [FEW_TOKENS * rank // plan.world_size for rank in range(plan.world_size + 1)]
    parts: tuple[Ranges, ...] = tuple((edge,) for edge in zip(edges[:-1], edges[1:], strict=True))
    weights = []
    for weight in plan.weights:
        if weight.name in short:
            weight = replace(weight, shape=(FEW_TOKENS, *weight.shape[1:]))
            weight = replace(weight, parts=parts) if weight.dim == 0 else weight
        weights.append(weight)
    modules = {name.rpartition(".")[0] for name in short}
    gathers = tuple(replace(g, parts=parts) if g.module in modules else g for g in plan.gathers)
    return replace(plan, weights=tuple(weights), gathers=gathers)


def _is_constant(data: Tensor) -> bool:
    """Whether all indices of the first dim have the same values, so that a wrong part would be as good."""
    if not data.is_floating_point() or data.numel() == 0:
        return False
    if data.numel() > LARGE_WEIGHT:
        sample = data.reshape(-1)[:: data.numel() // SAMPLE]
        return bool((sample == sample[0]).all())
    if len(data.reshape(-1)) == 1:
        return not bool(data.any())
    rows = data if data.dim() and len(data) > 1 else data.reshape(-1)
    return bool((rows == rows[:1]).all())


def _drawn(data: Tensor, seed: int) -> Tensor:
    """The values with noise of a tenth of them; zeros become weights of usual size."""
    generator = torch.Generator().manual_seed(seed)
    block = torch.randn(min(data.numel(), BLOCK), generator=generator, dtype=data.dtype)
    made = torch.empty(data.numel(), dtype=data.dtype)
    for start in range(0, data.numel(), BLOCK):
        stop = min(start + BLOCK, data.numel())
        made[start:stop] = block[: stop - start]
    made = made.view(data.shape)
    if data.numel() > LARGE_WEIGHT:
        return made.mul_(data.shape[-1] ** -0.5)
    largest = float(data.abs().max())
    if largest == 0.0:
        return made.mul_(data.shape[-1] ** -0.5 if data.dim() > 1 else NOISE)
    return made.mul_(NOISE * largest).add_(data)
