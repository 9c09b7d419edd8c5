"""Products: where a weight is cut by its columns or by its rows.

For x [M, K] @ W [K, N], W a parameter:
- x whole: W is cut by columns, column n of the result lives where W's column n does;
- x's labels change along K only: W is cut by rows, the result is a partial sum over ranks;
- x's labels change along M (heads that share W): the result lives where x does; W is whole, or goes with
  the one unit that it meets.
A product of two activations ties each operand along K and joins them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from .grids import SHARED
from .sources import WeightView

if TYPE_CHECKING:
    from .mode import Trace

MEET_LIMIT = 1 << 20


def weight_of(trace: Trace, tensor: Tensor) -> tuple[WeightView | None, bool]:
    """(the tensor as a weight or None, whether it is a parameter itself and no result of joining some)."""
    view = trace.labels.weight_view(tensor)
    if view is not None and view.source is not None:
        return (view, True) if view.source.kind in ("weight", "buffer") else (None, False)
    labels = trace.labels.get(tensor)
    if labels is None or not trace.is_constant(tensor) or not bool((labels < 0).any()):
        return None, False
    ids = -labels
    return WeightView(None, tuple(ids.shape), dense=ids), False


def contract(
    trace: Trace, x: Tensor | None, w: WeightView, rows: int, op: str
) -> tuple[Tensor, np.ndarray | None]:
    """Labels of x [B, M, K] @ w [B, K, N] (B may be 1 in w), and w's ids where the result is a partial sum.

    x: labels or None; rows: M.
    """
    batch = max(w.sizes[0], x.shape[0] if x is not None else 1)
    shape = (batch, rows, w.sizes[2])
    hard = None if x is None else x.clamp_min(0)
    if hard is None or not bool(hard.any()):
        trace.labels.pin(x)
        return _column(trace, w, shape, op), None
    assert x is not None, "hard labels without labels"
    uniform = bool((hard == hard[:, :1, :1]).all()) and hard.shape[2] > 1 and not bool((hard == 0).any())
    shared = batch > 1 and (w.sizes[0] == 1 or 0 in w.shared_dims)
    differs = shared and not bool((hard == hard[:1]).all())
    apart = w.source is not None and w.source.name in trace.decisions.apart
    by_k = bool((hard == hard[:, :1]).all()) and not differs and not apart
    if by_k and not uniform:
        return torch.zeros(shape, dtype=torch.int64), _row(trace, hard[:, 0], w, op)
    if uniform and not differs and bool((hard == hard[:1, :1, :1]).all()):
        trace.labels.fail(hard, "all of it goes together before the next weight", trace.where)
        return torch.zeros(shape, dtype=torch.int64), None
    out = trace.labels.tie_along(hard, [2], trace.where, op)
    for dim in (2, 1) if apart else ():
        if w.source_dim(dim) is not None:
            w = trace.labels.tie_weight(w, dim, trace.where, op)
    _meet_unit(trace, out, w)
    return out.expand(shape), None


def _meet_unit(trace: Trace, out: Tensor, w: WeightView) -> None:
    """A weight (or each of a batch of them) that one unit alone is multiplied by lives with it."""
    if w.numel > MEET_LIMIT:
        return
    ids = w.ids()
    for batch in range(w.sizes[0]):
        units = out if w.sizes[0] == 1 else out[batch]
        first = units.reshape(-1)[:1]
        if bool((units == first).all()):
            trace.labels.meet(first.view(1, 1), -ids[batch])


def _column(trace: Trace, w: WeightView, shape: tuple[int, int, int], op: str) -> Tensor:
    first = trace.labels.tie_weight(w, 1, trace.where, op).ids()
    trace.used(first)
    for grid in first[:, 0].unbind(0) if 0 not in w.shared_dims else [first[0, 0]]:
        ids = grid[grid > 0].numpy() & ~SHARED
        if len(ids):
            trace.labels.columns.append(ids)
    return first.expand(shape)


def _row(trace: Trace, hard: Tensor, w: WeightView, op: str) -> np.ndarray:
    """w's rows live where x's columns do. hard: [B, K]."""
    first = trace.labels.tie_weight(w, 2, trace.where, op).ids()[:, :, 0]
    hard, first = torch.broadcast_tensors(hard, first)
    if bool(((first == 0) & (hard > 0)).any()) or bool((hard == 0).any()) or bool((hard >= SHARED).any()):
        trace.labels.fail(hard, "the next weight is not cut along it", trace.where)
    trace.labels._tie_pairs("weight", hard, first, trace.where, op)
    trace.used(first)
    return np.unique(first[first > 0].numpy() & ~SHARED)


def product(
    trace: Trace, a: Tensor | None, b: Tensor | None, shape: tuple[int, ...], k: int, op: str
) -> Tensor | None:
    """Labels of a product of two activations [B, M, K] @ [B, K, N] of which one at least has labels."""
    batch, m, n = shape
    left = None if a is None else trace.labels.tie_along(a, [2], trace.where, op).expand(batch, m, n)
    right = None if b is None else trace.labels.tie_along(b, [1], trace.where, op).expand(batch, m, n)
    return trace.labels.combine([left, right], [(batch, m, 1), (batch, 1, n)], (batch, m, n), trace.where, op)


def matrix_product(
    trace: Trace, a: Tensor, b: Tensor, out: Tensor, op: str, bias: Tensor | None = None
) -> None:
    """a [B, M, K] @ b [B, K, N] (+ bias); out [B, M, N] or a view that can take its labels."""
    if out.numel() == 0:  # an expert that got no token says nothing about its weights
        return
    (wa, direct_a), (wb, direct_b) = weight_of(trace, a), weight_of(trace, b)
    if wb is not None and wa is not None and direct_a and not direct_b:
        wb = None
    shape = (a.shape[0], a.shape[1], b.shape[2])
    ids: np.ndarray | None = None
    labels: Tensor | None
    if wb is not None:
        labels, ids = contract(trace, trace.activation(a), wb, a.shape[1], op)
    elif wa is not None:
        other = trace.activation(b)
        flipped = None if other is None else other.transpose(1, 2)
        labels, ids = contract(trace, flipped, wa.transpose(), b.shape[2], op)
        labels = labels.transpose(1, 2)
    else:
        labels = product(trace, trace.activation(a), trace.activation(b), shape, a.shape[2], op)
    _finish(trace, labels, ids, shape, out, op, bias)


def _finish(
    trace: Trace,
    labels: Tensor | None,
    ids: np.ndarray | None,
    shape: tuple[int, ...],
    out: Tensor,
    op: str,
    bias: Tensor | None,
) -> None:
    if ids is not None:
        trace.partials.create(out, ids, trace.where, batched=shape[0] > 1)
        if bias is not None:
            trace.add_to_partial(out, bias)
        return
    if labels is not None:
        labels = labels.expand(shape).reshape(out.shape)
    if bias is not None:
        labels = trace.labels.combine(
            [labels, trace.labels.get(bias)],
            [tuple(out.shape), tuple(bias.shape)],
            tuple(out.shape),
            trace.where,
            op,
        )
    if labels is not None:
        trace.labels.put(out, labels)


def _mm(trace: Trace, op: str, args: Any, out: Tensor) -> None:
    matrix_product(trace, args[0].unsqueeze(0), args[1].unsqueeze(0), out, op)


def _addmm(trace: Trace, op: str, args: Any, out: Tensor) -> None:
    matrix_product(trace, args[1].unsqueeze(0), args[2].unsqueeze(0), out, op, args[0])


def _bmm(trace: Trace, op: str, args: Any, out: Tensor) -> None:
    matrix_product(trace, args[0], args[1], out, op)


def _baddbmm(trace: Trace, op: str, args: Any, out: Tensor) -> None:
    matrix_product(trace, args[1], args[2], out, op, args[0])


def _mv(trace: Trace, op: str, args: Any, out: Tensor) -> None:
    matrix_product(trace, args[0].unsqueeze(0), args[1].view(1, -1, 1), out, op)


def _dot(trace: Trace, op: str, args: Any, out: Tensor) -> None:
    matrix_product(trace, args[0].view(1, 1, -1), args[1].view(1, -1, 1), out, op)


CONTRACTIONS: dict[str, Callable[..., None]] = {
    "mm": _mm,
    "addmm": _addmm,
    "bmm": _bmm,
    "baddbmm": _baddbmm,
    "mv": _mv,
    "dot": _dot,
}


def grouped_product(trace: Trace, args: Any, kwargs: Any, out: Tensor) -> None:
    """grouped_mm: the rows of a between two offsets times one matrix of b."""
    a, b = args[0], args[1]
    offsets = args[2] if len(args) > 2 else kwargs.get("offs")
    view = trace.labels.weight_view(b)
    if view is None or offsets is None or b.dim() != 3 or a.dim() != 2:
        trace.fail_all(args, kwargs, "grouped_mm of activations")
        return
    x = trace.activation(a)
    labels = torch.zeros(out.shape, dtype=torch.int64)
    start, found = 0, []
    for expert, stop in enumerate(offsets.tolist()):
        if stop > start:
            part = None if x is None else x[start:stop].unsqueeze(0)
            got, ids = contract(trace, part, view.narrow(0, expert, 1), stop - start, "grouped_mm")
            labels[start:stop] = got[0]
            if ids is not None:
                found.append(ids)
        start = stop
    if found:
        trace.partials.create(out, np.unique(np.concatenate(found)), trace.where)
        if bool(labels.any()):
            trace.labels.fail(labels, "experts that divide in different ways", trace.where)
    else:
        trace.labels.put(out, labels)


def convolution(trace: Trace, args: Any, out: Tensor) -> None:
    """A convolution as a product over input channels (dense) or channel by channel (depthwise)."""
    x, weight, bias, groups = args[0], args[1], args[2], int(args[8])
    transposed = bool(args[6])
    view = trace.labels.weight_view(weight)
    labels = trace.activation(x)
    hard = labels is not None and bool((labels > 0).any())
    spatial = (1,) * (out.dim() - 2)
    if view is None or transposed or x.dim() != out.dim() or groups not in (1, out.shape[1]):
        trace.fail_all(args, {}, "this kind of convolution")
        return
    if labels is not None and hard:
        labels = trace.labels.tie_along(labels, list(range(2, x.dim())), trace.where, "convolution")
        labels = labels.amax(0).reshape(-1)  # [channels]
    ids: np.ndarray | None = None
    for dim in reversed(range(2, weight.dim())):
        view = trace.labels.tie_weight(view, dim, trace.where, "convolution").squeeze(dim)
    given = labels if hard else None
    if groups == 1:
        x_labels = None if given is None else given[None, None]
        got, ids = contract(trace, x_labels, view.transpose().unsqueeze(), 1, "convolution")
        channels = got[0, 0]
    elif given is not None:
        trace.labels.meet(given, -view.ids()[:, 0])
        channels = given
    else:  # a weight for each channel of an input that is whole divides where its result does
        channels = -view.ids()[:, 0]
    if ids is not None:
        trace.partials.create(out, ids, trace.where)
        if bias is not None:
            trace.add_to_partial(out, bias)
        return
    shape = (1, out.shape[1], *spatial)
    own = None if bias is None else trace.labels.get(bias)
    combined = trace.labels.combine(
        [channels.view(shape), None if own is None else own.view(shape)][: 2 if bias is not None else 1],
        [shape, shape][: 2 if bias is not None else 1],
        tuple(out.shape),
        trace.where,
        "convolution",
    )
    if combined is not None:
        trace.labels.put(out, combined)
