"""Cutting what no pair divides: a linear by columns, its result gathered.

A column-parallel linear followed by a row-parallel one needs one collective for two weights; where there is
no such pair, a linear can still be cut by its columns if its result is gathered. Right almost anywhere, but a
collective for one weight. So a block (one layer of the outermost list) gets as many as the hand-written plans
have, two, and up to four while most of it would stay whole; the head, which is read for every token, gets
one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from math import prod

from torch import nn

from .shardplan import ShardPlan

PER_BLOCK, PER_WHOLE_BLOCK = 2, 4
OUTSIDE = 4  # collectives of a model beside PER_BLOCK for each block
MOSTLY_WHOLE = 0.75  # of a block's weights on the fullest rank, of 1.0
MIN_SHARE = 0.02  # of a block's weights, for a weight to be worth a collective
HEAD_SHARE = 0.05  # of all weights, for one outside of the blocks


def choose_gathers(
    model: nn.Module, plan: ShardPlan, refused: set[str], repeats: Callable[[str], int]
) -> list[str]:
    """Modules whose only weight is whole in the plan and should be cut, with its result gathered.

    model: as in the plan. refused: modules that were tried. repeats: how many layers of the whole model a
    module of this one stands for.
    """
    blocks = _block_of(model)
    matrices = {w.name: w for w in plan.weights if len(w.shape) > 1 and "." in w.name}
    embedded = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    size: Counter[str] = Counter()
    held: Counter[str] = Counter()
    for weight in matrices.values():
        block = blocks(weight.name)
        size[block] += prod(weight.shape)
        held[block] += max(prod(weight.local_shape(rank)) for rank in range(plan.world_size))
    total = sum(size.values())
    spent = _spent(plan, blocks)
    budget = OUTSIDE + sum((PER_BLOCK - spent[block]) * repeats(block) for block in size if block)
    chosen = []
    for weight in sorted(matrices.values(), key=lambda w: -prod(w.shape)):
        module = weight.name.rpartition(".")[0]
        block = blocks(weight.name)
        numel = prod(weight.shape)
        if weight.dim is not None or module in refused or len(weight.shape) != 2:
            continue
        if not _is_linear(model.get_submodule(module), weight.shape, embedded):
            continue
        limit = PER_WHOLE_BLOCK if held[block] > MOSTLY_WHOLE * size[block] else PER_BLOCK
        wanted = numel >= MIN_SHARE * size[block] and spent[block] < limit
        if not block:
            wanted = numel >= HEAD_SHARE * total and spent[""] < budget
        if wanted and min(weight.shape) >= plan.world_size:
            chosen.append(module)
            spent[block] += 1
            held[block] -= numel - -(-numel // plan.world_size)
    return chosen


def _spent(plan: ShardPlan, blocks: Callable[[str], str]) -> Counter[str]:
    """Collectives of each block, and of what is in none."""
    norms = [norm.module for norm in plan.norms for _ in range(1 + norm.centred)]
    others = [gather.module for gather in plan.gathers] + list(plan.vocabularies)
    return Counter(blocks(name) for name in [*(module for module, _ in plan.sums), *norms, *others])


def choose_vocabulary(
    model: nn.Module, plan: ShardPlan, repeats: Callable[[str], int]
) -> tuple[str, list[str]] | None:
    """(the embedding to cut by tokens, linears that share its weight); None where it is not worth it.

    One collective a forward pass for the sum of what ranks look up, and one for each head's gather.
    """
    total = sum(prod(w.shape) for w in plan.weights)
    whole = {w.name for w in plan.weights if w.dim is None and prod(w.shape) >= HEAD_SHARE * total}
    tables = [
        (p, m) for p, m in model.named_modules() if isinstance(m, nn.Embedding) and f"{p}.weight" in whole
    ]
    tables = [(p, m) for p, m in tables if m.max_norm is None and m.num_embeddings >= plan.world_size]
    if not tables:
        return None
    path, table = max(tables, key=lambda found: found[1].weight.numel())
    heads = sharing_weight(model, table)
    blocks = _block_of(model)
    spent = _spent(plan, blocks)
    lists = {blocks(w.name) for w in plan.weights} - {""}
    budget = OUTSIDE + sum((PER_BLOCK - spent[block]) * repeats(block) for block in lists)
    return (path, heads) if spent[""] + 1 + len(heads) <= budget else None


def sharing_weight(model: nn.Module, table: nn.Embedding) -> list[str]:
    """Paths of the other modules that have the table's weight: heads that are tied to it."""
    return [
        p for p, m in model.named_modules() if m is not table and table.weight in set(m._parameters.values())
    ]


def _is_linear(module: nn.Module, shape: tuple[int, ...], embedded: set[int]) -> bool:
    """Whether the module's only matrix has this shape and is no embedding."""
    own = [p for p in module.parameters() if p.dim() > 1]
    return (
        len(own) == 1
        and tuple(own[0].shape) == shape
        and id(own[0]) not in embedded
        and not list(module.children())
    )


def _block_of(model: nn.Module):
    """A function from a name to the outermost list's child that it is in, "" where it is in none. A list of
    single modules (heads) is no list of blocks.
    """
    lists = [
        path
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and any(list(child.children()) for child in module)
    ]
    outermost = [p for p in lists if not any(p.startswith(o + ".") for o in lists)]

    def block(name: str) -> str:
        for path in outermost:
            if name.startswith(path + "."):
                return path + "." + name[len(path) + 1 :].partition(".")[0]
        return ""

    return block
