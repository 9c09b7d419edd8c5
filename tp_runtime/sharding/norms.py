"""Norms over a dimension that ranks divide: one small all-reduce of sums instead of a gather of activations.

Whether a module is such a norm is found by trying it: its result on random rows must be that of a root-mean-
square or layer norm with its own weight (w or 1 + w), its own bias and one of its own numbers as epsilon.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .plan import Ranges
from .shardplan import Norm

if TYPE_CHECKING:
    from .apply import Communicator

TOLERANCE = 1e-5  # of a row's largest value
# Sizes of the rows tried: at the small ones it shows which number is added under the root.
SCALES = (3.0, 3e-2, 3e-3, 1e-3, 1e-4, 1e-6)


def recognise(module: nn.Module, path: str, size: int, parts: tuple[Ranges, ...] = ()) -> Norm | None:
    """The norm over the last dim (of `size`) that this module computes; None where it computes none.

    path, parts: of the result.
    """
    weights = [name for name, p in module.named_parameters() if tuple(p.shape) == (size,)]
    if len(weights) != len(list(module.parameters())) or len(weights) > 2:
        return None
    x = torch.randn(len(SCALES), size, generator=torch.Generator().manual_seed(3)) + 0.2
    x = x * torch.tensor(SCALES)[:, None]
    with torch.no_grad():
        try:
            wanted = module(x)
        except (RuntimeError, TypeError, ValueError):
            return None
        numbers = {float(v) for v in vars(module).values() if isinstance(v, float) and 0 <= v < 0.1} | {
            1e-6,
            1e-5,
        }
        choices = itertools.product(
            (False, True), (False, True), sorted(numbers), itertools.permutations(["", "", *weights], 2)
        )
        for centred, shifted, epsilon, (weight, bias) in choices:
            norm = Norm(path, size, parts, centred, shifted, epsilon, weight, bias)
            if set(weights) != {weight, bias} - {""} or (shifted and not weight):
                continue
            got = _forward(module, norm, lambda t: t)(x)
            if (
                isinstance(wanted, Tensor)
                and got.shape == wanted.shape
                and bool(((got - wanted).abs().amax(-1) < TOLERANCE * wanted.abs().amax(-1)).all())
            ):
                return norm
    return None


def collective_forward(module: nn.Module, norm: Norm, comm: Communicator) -> Callable[[Tensor], Tensor]:
    """The forward function of `module`, whose weight and bias have been cut, on rows cut alike."""
    return _forward(module, norm, comm.all_reduce)


def _forward(
    module: nn.Module, norm: Norm, all_reduce: Callable[[Tensor], Tensor]
) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        rows = x.float()
        if norm.centred:
            rows = rows - all_reduce(rows.sum(-1, keepdim=True)) / norm.size
        square = all_reduce(rows.pow(2).sum(-1, keepdim=True)) / norm.size
        rows = rows * torch.rsqrt(square + norm.epsilon)
        if norm.weight:
            weight = getattr(module, norm.weight).float()
            rows = rows * (weight + 1.0 if norm.shifted else weight)
        if norm.bias:
            rows = rows + getattr(module, norm.bias).float()
        return rows.to(x.dtype)

    return forward
