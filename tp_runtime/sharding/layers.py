"""The two layers that end in a collective, and putting a declared plan onto a model.

A row-parallel linear holds some input columns, so its outputs are partial sums over ranks. A vocabulary-
parallel embedding holds some tokens' rows; each token has its row on exactly one rank and the others bring
zeros, so the sum is exact. Column-parallel layers need no class: they are linears with fewer rows.

Both take the process group as an argument and wrap a module that computes this rank's part, whatever its
number format. At world size 1 nothing is wrapped.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from ..collectives import all_gather, all_reduce
from ..errors import ShardingError
from ..mesh import tp_group, tp_rank, tp_size
from .plan import Plan, Ranges, WeightPlan, extent


class RowParallelLinear(nn.Module):
    """all_reduce(inner(x)) + bias. inner has no bias of its own: every rank's would be added."""

    def __init__(self, inner: nn.Module, group: ProcessGroup, bias: Tensor | None = None) -> None:
        super().__init__()
        assert getattr(inner, "bias", None) is None, "a bias inside would be added once a rank"
        self.inner = inner
        self.group = group
        self.bias = bias if bias is None or isinstance(bias, nn.Parameter) else nn.Parameter(bias, False)

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., local columns]; returns [..., rows], the same bits on every rank."""
        y = all_reduce(self.inner(x), self.group)
        return y if self.bias is None else y + self.bias


class VocabParallelEmbedding(nn.Module):
    """The vectors of token ids, of which this rank holds those of [start, stop).

    inner: ids counted from start -> vectors (an nn.Embedding, or one of another number format).
    """

    def __init__(self, inner: nn.Module, tokens: tuple[int, int], group: ProcessGroup) -> None:
        super().__init__()
        self.inner = inner
        self.start, self.stop = tokens
        self.group = group

    @property
    def weight(self) -> Tensor:
        """This rank's rows, for a head that is tied to them."""
        return cast(Tensor, self.inner.weight)

    def forward(self, ids: Tensor) -> Tensor:
        """ids: any shape, of the whole vocabulary; returns [*ids.shape, hidden_size]."""
        held = (ids >= self.start) & (ids < self.stop)
        part = self.inner(torch.where(held, ids - self.start, 0))
        return all_reduce(torch.where(held.unsqueeze(-1), part, 0), self.group)


def gather_last_dim(x: Tensor, parts: tuple[Ranges, ...], group: ProcessGroup) -> Tensor:
    """The whole of a tensor whose last dim is cut: the logits of a vocabulary-parallel head.

    x: [..., this rank's extent]. parts: every rank's ranges, in order and without copies.
    Returns [..., sum of extents] on every rank. Extents may differ: shorter ones travel padded.
    """
    if group.size() == 1:
        return x
    sizes = [extent(ranges) for ranges in parts]
    every = all_gather(F.pad(x, (0, max(sizes) - x.shape[-1])), group)
    return torch.cat([part[..., :size] for part, size in zip(every.unbind(0), sizes, strict=True)], dim=-1)


def take(whole: Tensor, dim: int, ranges: Ranges) -> Tensor:
    """A copy of the given ranges of `dim`, joined in order."""
    return torch.cat([whole.narrow(dim, start, stop - start) for start, stop in ranges], dim=dim)


def apply_declared(model: nn.Module, plan: Plan, mesh: DeviceMesh) -> nn.Module:
    """Make `model` this rank's part of the plan, in place, and return it.

    Weights that are whole are cut; weights that have the rank's shape already stay. Modules of row-parallel
    and of vocabulary-parallel embedding weights get their collective. Raises ShardingError for a plan of
    another world size or a weight of another shape.
    """
    if plan.world_size != tp_size(mesh):
        raise ShardingError(
            f"a plan for {plan.world_size} ranks cannot be applied on {tp_size(mesh)}; make one for those"
        )
    cut_weights(model, plan, tp_rank(mesh))
    return wrap_modules(model, plan, tp_rank(mesh), tp_group(mesh))


def cut_weights(model: nn.Module, plan: Plan, rank: int) -> None:
    """Replace every whole parameter that the plan divides by this rank's part."""
    for weight in plan.weights:
        path, _, name = weight.name.rpartition(".")
        module = model.get_submodule(path)
        parameter = module.get_parameter(name)
        ranges = weight.part(rank)
        if ranges is not None and parameter.shape == weight.shape:
            assert weight.dim is not None
            part = take(parameter.detach(), weight.dim, ranges)
            setattr(module, name, nn.Parameter(part, requires_grad=parameter.requires_grad))
        elif parameter.shape != weight.local_shape(rank):
            raise ShardingError(
                f"{weight.name} has shape {tuple(parameter.shape)}, which is neither the whole "
                f"{weight.shape} nor rank {rank}'s part {weight.local_shape(rank)}; "
                "the plan is of another model"
            )
        _set_sizes(module, weight, rank)


def _set_sizes(module: nn.Module, weight: WeightPlan, rank: int) -> None:
    """The sizes that torch's own layers keep beside their weight."""
    if len(weight.shape) != 2:
        return
    rows, columns = weight.local_shape(rank)
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = rows, columns
    elif isinstance(module, nn.Embedding):
        module.num_embeddings, module.embedding_dim = rows, columns


def wrap_modules(model: nn.Module, plan: Plan, rank: int, group: ProcessGroup) -> nn.Module:
    """Put the collectives of row-parallel linears and of the embedding into `model`, and return it.

    The modules may be of any number format: only the plan's names and styles are looked at.
    """
    if group.size() == 1:
        return model
    for weight in plan.weights:
        path = weight.name.rpartition(".")[0]
        if weight.style == "row":
            inner = model.get_submodule(path)
            bias = getattr(inner, "bias", None)
            if bias is not None:
                setattr(inner, "bias", None)  # noqa: B010  (a parameter or a buffer; its owner is any module)
            model.set_submodule(path, RowParallelLinear(inner, group, bias))
        elif weight.style == "vocab" and any(c.kind == "all_reduce" for c in weight.traffic):
            ((start, stop),) = weight.parts[rank]
            inner = model.get_submodule(path)
            model.set_submodule(path, VocabParallelEmbedding(inner, (start, stop), group))
    return model
