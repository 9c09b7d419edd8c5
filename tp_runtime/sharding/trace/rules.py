"""What each ATen operation does to labels. One function a class of operations; names are ATen's.

Views need no rule (labels belong to storages). Operations that copy elements unchanged run on the label
tensors as they are. Element-wise ones join their operands, reductions tie along dims, contractions are
where a weight is cut by columns or by rows. Whatever has no rule makes its labelled inputs stay whole.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from .contraction import CONTRACTIONS, convolution, grouped_product
from .operators import ALONG, BY_INDEX, COPIES, NORMS, POINTWISE, REDUCTIONS, SPATIAL, WRITES

if TYPE_CHECKING:
    from .mode import Trace

LOOK_UP_LIMIT = 1 << 16  # values of a look-up whose columns may be followed

Call = tuple[str, bool, Any, Any, Any]  # name, in place, args, kwargs, out


def tensors_in(value: Any) -> list[Tensor]:
    """All tensors in nested lists, tuples and dicts."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, (list, tuple)):
        return []
    found: list[Tensor] = []
    for item in value:
        if isinstance(item, Tensor):
            found.append(item)
        elif isinstance(item, (list, tuple, dict)):
            found += tensors_in(item)
    return found


def apply_rule(trace: Trace, func: Any, op: str, inplace: bool, args: Any, kwargs: Any, out: Any) -> None:
    """Label the results of one operation, of which at least one input has labels."""
    outs = tensors_in(out)
    if op in CONTRACTIONS:
        CONTRACTIONS[op](trace, op, args, out)
    elif op in COPIES and not inplace:
        _copies(trace, func, op, args, kwargs, outs)
    elif op == "embedding":
        _embedding(trace, args, out)
    elif op in ("_grouped_mm", "grouped_mm", "grouped_mm_fallback"):
        grouped_product(trace, args, kwargs, out)
    elif op in ("convolution", "_convolution"):
        convolution(trace, args, out)
    elif op in WRITES:
        _writes(trace, op, inplace, args, kwargs, out)
    elif op == "copy":
        _copy(trace, args)
    elif op in ("fill", "zero"):
        _fill(trace, inplace, args)
    elif op in REDUCTIONS:
        _reduce(trace, op, args, kwargs, outs)
    elif op in ALONG:
        _along(trace, op, args, kwargs, outs)
    elif op in NORMS:
        _norm(trace, op, args, outs)
    elif op == "native_group_norm":
        _group_norm(trace, args, outs)
    elif op == "native_batch_norm":
        _batch_norm(trace, args, outs)
    elif op in SPATIAL:
        _spatial(trace, op, args, outs)
    elif op == "glu":
        _glu(trace, args, outs[0])
    elif op == "view_as_complex":
        labels = trace.labels.get(args[0])
        if labels is not None:
            trace.labels.tie_along(labels, [-1], trace.where, op)
    elif len(outs) == 1 and (torch.Tag.pointwise in func.tags or op in POINTWISE):
        _elementwise(trace, op, inplace, args, kwargs, outs)
    else:
        trace.fail_all(args, kwargs, f"{op} has no rule")


def _zeros_for(trace: Trace, value: Any) -> Any:
    """Tensors replaced by their labels."""
    if isinstance(value, Tensor):
        labels = trace.labels.get(value)
        return torch.zeros(value.shape, dtype=torch.int64) if labels is None else labels
    if isinstance(value, (list, tuple)):
        return type(value)(_zeros_for(trace, item) for item in value)
    return value


def _copies(trace: Trace, func: Any, op: str, args: Any, kwargs: Any, outs: list[Tensor]) -> None:
    if op in ("clone", "contiguous", "_to_copy", "lift_fresh_copy"):
        labels = trace.labels.get(args[0])
        if labels is not None:
            trace.labels.put(outs[0], labels)
        return
    rest = {k: v for k, v in kwargs.items() if k != "memory_format"}
    if op == "constant_pad_nd":
        result: Any = func(_zeros_for(trace, args[0]), args[1], 0)
    elif op in BY_INDEX:
        for index in tensors_in(args[1:]):
            trace.labels.fail(trace.labels.get(index), f"{op} with an index that depends on it", trace.where)
        result = func(_zeros_for(trace, args[0]), *args[1:], **rest)
    else:
        result = func(*_zeros_for(trace, args), **rest)
    for tensor, labels in zip(outs, tensors_in(result), strict=True):
        trace.labels.put(tensor, labels)


def _embedding(trace: Trace, args: Any, out: Tensor) -> None:
    if trace.where in trace.decisions.vocabularies:  # its result is summed over ranks
        return
    view = trace.labels.weight_view(args[0])
    trace.labels.fail(trace.labels.get(args[1]), "a look-up by an index that depends on it", trace.where)
    if view is None or view.source is None:
        labels = trace.labels.get(args[0])
        if labels is not None:
            trace.labels.put(out, labels[args[1]])
        return
    if out.numel() > LOOK_UP_LIMIT:  # a table as wide as the model is cut by tokens, or not at all
        trace.labels.too_large.add(view.source.name)
        return
    rows = view.offset + args[1].to(torch.int64) * view.strides[0]
    ids = view.source.base + rows.unsqueeze(-1) + torch.arange(view.sizes[1]) * view.strides[1]
    trace.labels.put(out, -view.source.apply_decisions(ids))


def _writes(trace: Trace, op: str, inplace: bool, args: Any, kwargs: Any, out: Tensor) -> None:
    base = trace.labels.get(args[0])
    labels = torch.zeros(args[0].shape, dtype=torch.int64) if base is None else base.clone()
    if op in ("index_add", "index_copy"):
        labels.index_copy_(args[1], args[2], _zeros_for(trace, args[3]))
        trace.labels.fail(trace.labels.get(args[2]), f"{op} by an index that depends on it", trace.where)
    elif op in ("index_put", "_index_put_impl"):
        torch.ops.aten.index_put_(labels, list(args[1]), _zeros_for(trace, args[2]))
    elif op in ("scatter", "scatter_add", "scatter_reduce"):
        trace.labels.fail(trace.labels.get(args[2]), f"{op} by an index that depends on it", trace.where)
        source = args[3] if isinstance(args[3], Tensor) else torch.zeros(())
        if isinstance(args[3], Tensor):
            labels.scatter_(args[1], args[2], _zeros_for(trace, source))
        elif bool((labels != 0).any()):
            trace.labels.fail(labels, "scatter of a constant", trace.where)
            return
    elif op == "slice_scatter":
        labels = torch.slice_scatter(labels, _zeros_for(trace, args[1]), *args[2:], **kwargs)
    else:
        labels = torch.select_scatter(labels, _zeros_for(trace, args[1]), *args[2:], **kwargs)
    whole = None if inplace else trace.labels.overwrite(args[0], labels)
    if whole is not None:
        labels = whole.view(-1).as_strided(args[0].shape, args[0].stride(), int(args[0].storage_offset()))
    trace.labels.put(args[0] if inplace else out, labels)


def _copy(trace: Trace, args: Any) -> None:
    target, source = args[0], args[1]
    labels = trace.labels.get(source)
    if labels is None:
        labels = torch.zeros((), dtype=torch.int64)
    trace.labels.put(target, labels.expand(target.shape))


def _fill(trace: Trace, inplace: bool, args: Any) -> None:
    if inplace:
        trace.labels.put(args[0], torch.zeros(args[0].shape, dtype=torch.int64))


def _dims(op: str, args: Any, kwargs: Any, rank: int) -> list[int]:
    place = 2 if op in ("norm", "linalg_vector_norm") else 1
    dims = (
        args[place]
        if len(args) > place and isinstance(args[place], (int, list, tuple))
        else kwargs.get("dim")
    )
    if isinstance(dims, bool) or dims is None or (isinstance(dims, (list, tuple)) and not dims):
        return list(range(rank))
    return [int(dims) % rank] if isinstance(dims, int) else [int(d) % rank for d in dims]


def _reduce(trace: Trace, op: str, args: Any, kwargs: Any, outs: list[Tensor]) -> None:
    tensor = args[0]
    labels = trace.labels.get(tensor)
    if labels is None or tensor.dim() == 0:
        if labels is not None:
            trace.labels.put(outs[0], labels)
        return
    if len(tensors_in(args)) > 1:  # max(a, b), min(a, b)
        _elementwise(trace, op, False, args, kwargs, outs)
        return
    dims = _dims(op, args, kwargs, tensor.dim())
    tied = trace.labels.tie_along(labels, dims, trace.where, op)
    for out in outs:
        trace.labels.put(
            out, tied.reshape(out.shape) if out.numel() == tied.numel() else tied.expand(out.shape)
        )


def _along(trace: Trace, op: str, args: Any, kwargs: Any, outs: list[Tensor]) -> None:
    labels = trace.labels.get(args[0])
    if labels is None:
        return
    place = 2 if op == "topk" else 1
    dim = args[place] if len(args) > place and type(args[place]) is not bool else kwargs.get("dim", -1)
    tied = trace.labels.tie_along(labels, [int(dim)], trace.where, op)
    for out in outs:
        trace.labels.put(out, tied.expand(out.shape))


def _norm(trace: Trace, op: str, args: Any, outs: list[Tensor]) -> None:
    tensor, shape = args[0], args[1]
    labels = trace.labels.get(tensor)
    dims = list(range(-len(shape), 0))
    tied = (
        None if labels is None else trace.labels.tie_along(labels, dims, trace.where, op).expand(tensor.shape)
    )
    weights = [t for t in args[2:4] if isinstance(t, Tensor)]
    out = trace.labels.combine(
        [tied, *(trace.labels.get(w) for w in weights)],
        [tuple(tensor.shape), *(tuple(w.shape) for w in weights)],
        tuple(tensor.shape),
        trace.where,
        op,
    )
    if out is not None:
        trace.labels.put(outs[0], out)


def _group_norm(trace: Trace, args: Any, outs: list[Tensor]) -> None:
    tensor, groups = args[0], int(args[6])
    labels = trace.labels.get(tensor)
    tied = None
    if labels is not None:
        grouped = labels.reshape(tensor.shape[0], groups, -1)
        tied = trace.labels.tie_along(grouped, [2], trace.where, "native_group_norm").expand(grouped.shape)
        tied = tied.reshape(tensor.shape)
    _per_channel(trace, "native_group_norm", tied, tensor, args[1:3], outs[0])


def _batch_norm(trace: Trace, args: Any, outs: list[Tensor]) -> None:
    _per_channel(trace, "native_batch_norm", trace.labels.get(args[0]), args[0], args[1:5], outs[0])


def _per_channel(
    trace: Trace, op: str, labels: Tensor | None, tensor: Tensor, weights: Any, out: Tensor
) -> None:
    channel = (1, -1) + (1,) * (tensor.dim() - 2)
    known = [w for w in weights if isinstance(w, Tensor)]
    own = [trace.labels.get(w) for w in known]
    combined = trace.labels.combine(
        [labels, *(None if w is None else w.view(channel) for w in own)],
        [tuple(tensor.shape), *((1, int(w.numel())) + (1,) * (tensor.dim() - 2) for w in known)],
        tuple(tensor.shape),
        trace.where,
        op,
    )
    if combined is not None:
        trace.labels.put(out, combined)


def _spatial(trace: Trace, op: str, args: Any, outs: list[Tensor]) -> None:
    labels = trace.labels.get(args[0])
    if labels is None:
        return
    tied = trace.labels.tie_along(labels, list(range(2, labels.dim())), trace.where, op)
    for out in outs:
        trace.labels.put(out, tied.expand(out.shape))


def _glu(trace: Trace, args: Any, out: Tensor) -> None:
    labels = trace.labels.get(args[0])
    if labels is None:
        return
    halves = labels.chunk(2, args[1] if len(args) > 1 else -1)
    shape = tuple(out.shape)
    combined = trace.labels.combine(list(halves), [shape, shape], shape, trace.where, "glu")
    if combined is not None:
        trace.labels.put(out, combined)


def _reaches(own: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    """Whether a tensor of shape `own` broadcasts to `shape`."""
    lead = len(shape) - len(own)
    return lead >= 0 and all(n in (1, shape[lead + d]) for d, n in enumerate(own))


def _elementwise(trace: Trace, op: str, inplace: bool, args: Any, kwargs: Any, outs: list[Tensor]) -> None:
    ins = tensors_in(args) + tensors_in(kwargs)
    shape = tuple(outs[0].shape)
    if not all(_reaches(tuple(t.shape), shape) for t in ins):
        trace.fail_all(args, kwargs, f"{op} has no rule")
        return
    sums = [trace.partials.get(t) for t in ins]
    labels = trace.labels.combine(
        [trace.labels.get(t) for t in ins],
        [tuple(t.shape) for t in ins],
        shape,
        trace.where,
        op,
        [None if s is None else np.concatenate([leaf.ids for leaf in s.leaves()]) for s in sums],
    )
    if labels is not None:
        trace.labels.put(outs[0], labels)


Rule = Callable[..., None]
