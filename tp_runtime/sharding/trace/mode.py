"""One traced forward pass: a dispatch mode that labels every tensor, with hooks that know the running module.

The model that is traced is disposable (see `surrogate`): its integers are replaced, its modules hooked.
Tensors are real, so that data-dependent Python code runs as it would; products with matrices of many million
elements are not computed but drawn, since no decision rests on their values.
"""

from __future__ import annotations

import sys
from collections.abc import Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from .grids import SHARED
from .hooks import BIRTH_LIMIT, Enter, Leave, answer_tensors
from .integers import Attribute, Equation, IntegerMode, install
from .labels import Labels
from .operators import BY_INDEX, JOINING, LINEAR, NEW, SHAPE_ONLY
from .partial import Partials
from .rules import apply_rule, tensors_in
from .sources import DENSE_LIMIT, Source, StorageSet, TooLargeError, storage_key

_OURS = {"torch", __name__.split(".")[0]}


@dataclass
class Decisions:
    """What earlier traces taught: the next trace follows it.

    whole: parameters that stay whole. marks: (dim, NORMAL | REPLICATED | COPIED per index) of parameters of
    which some rows do. births: modules in which whole
    activations may be cut. norms: modules that reduce over a cut dim by a collective. gathers: modules whose
    cut result is gathered. apart: weights that are several matrices, each of which goes, all of it, with what
    it is multiplied by.
    """

    whole: dict[str, str] = field(default_factory=dict)
    marks: dict[str, tuple[int, np.ndarray]] = field(default_factory=dict)
    births: set[str] = field(default_factory=set)
    norms: set[str] = field(default_factory=set)
    gathers: set[str] = field(default_factory=set)
    vocabularies: set[str] = field(default_factory=set)
    apart: set[str] = field(default_factory=set)

    def copy(self) -> Decisions:
        """An independent copy."""
        return Decisions(
            dict(self.whole),
            dict(self.marks),
            set(self.births),
            set(self.norms),
            set(self.gathers),
            set(self.vocabularies),
            set(self.apart),
        )

    def state(self) -> tuple[object, ...]:
        """Something to compare: equal where nothing was decided since."""
        marks = tuple(sorted((name, dim, m.tobytes()) for name, (dim, m) in self.marks.items()))
        sets = (self.births, self.norms, self.gathers, self.vocabularies, self.apart)
        return frozenset(self.whole), marks, *map(frozenset, sets)


def _line_of_the_model() -> str:
    """ "file.py:12", the innermost line that runs and is neither torch's nor ours."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").split(".")[0] in _OURS:
        frame = frame.f_back
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"


class Trace(TorchDispatchMode):
    """Labels, partial sums and integer equations of one forward pass of `model` under `decisions`."""

    def __init__(self, model: nn.Module, decisions: Decisions, hooked: Set[str] = frozenset()) -> None:
        """hooked: modules at whose ends everything must be whole."""
        super().__init__()
        self.hooked = hooked
        self.shown: set[str] = set()  # those of them at which something would have been cut
        self.model = model
        self.decisions = decisions
        self.labels = Labels()
        self.partials = Partials()
        self.stack: list[str] = []
        self.suspended = 0
        self.order: dict[str, int] = {}
        self.result_whole: dict[str, bool] = {}
        self.result_soft: dict[str, list[np.ndarray]] = {}
        self.reached: set[str] = set()
        self.norm_inputs: dict[str, Tensor] = {}
        self.normed: dict[str, np.ndarray] = {}
        self.gathered: dict[str, np.ndarray] = {}
        self.generator = torch.Generator().manual_seed(0)
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            kind = "weight" if isinstance(tensor, nn.Parameter) else "buffer"
            if name in decisions.whole or tensor.numel() == 0:
                if kind == "buffer":
                    self.labels.whole[storage_key(tensor)] = name
                continue
            source = self.labels.add_source(name, tensor, kind)
            source.decided = decisions.marks.get(name)
        self.first_activation_id = self.labels.next_id
        self.constants = StorageSet()  # what depends on parameters alone
        for tensor in [*model.parameters(), *model.buffers()]:
            self.constants.add(tensor)
        self.rows_of_constants = StorageSet()
        self.measured = StorageSet()  # truth values and integers made of activations
        self.branches: set[str] = set()  # where the code decided by them
        self.whole_integers: dict[Attribute, int] = {}
        self.integers = IntegerMode(self.labels, lambda: self.where)

    @property
    def where(self) -> str:
        """Path of the innermost running module."""
        return self.stack[-1] if self.stack else ""

    @property
    def equations(self) -> list[Equation]:
        """What the integers of the model must satisfy."""
        return self.integers.equations

    # running

    def run(self, calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]]) -> None:
        """Trace calls of the model (path "") or of modules of it: path, arguments, keyword arguments."""
        self.whole_integers = install(self.model)
        hooks = []
        for name, child in self.model.named_modules():
            hooks.append(child.register_forward_pre_hook(Enter(self, name), with_kwargs=True))
            hooks.append(child.register_forward_hook(Leave(self, name)))
        try:
            for path, args, kwargs in calls:
                self._call(path, args, kwargs)
        finally:
            for hook in hooks:
                hook.remove()

    def _call(self, path: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.stack = []
        with torch.no_grad(), self.integers, self:
            out = self.model.get_submodule(path)(*args, **kwargs)
        for tensor in answer_tensors(out):
            self.need_whole(tensor, "the result of the model depends on it", path)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunction():
            name = func._schema.name.split("::")[1]
            inplace = name.endswith("_") and not name.startswith("__")
            op = name[:-1] if inplace else name
            if op == "_local_scalar_dense" and self._decides(args[0]):
                self.branches.add(_line_of_the_model())
            out = self._compute(func, op, args, kwargs)
            self._measure(args, kwargs, out)
            if self.suspended:
                return out
            try:
                out = self._follow(func, op, inplace, args, kwargs, out)
            except (RuntimeError, IndexError, ValueError, TypeError) as error:
                self.fail_all(
                    args, kwargs, f"{op} could not be followed ({' '.join(str(error).split())[:80]})"
                )
            except TooLargeError as error:
                self.labels.too_large.add(error.source.name)
                self.fail_all(args, kwargs, f"{op} of a very large weight", skip=error.source.name)
        return out

    def _compute(self, func: Any, op: str, args: Any, kwargs: Any) -> Any:
        if op in ("mm", "addmm", "bmm", "_grouped_mm") and any(
            isinstance(a, Tensor)
            and a.numel() > DENSE_LIMIT
            and a.untyped_storage()._cdata in self.labels.by_storage
            for a in args
        ):
            a, b = (args[1], args[2]) if op == "addmm" else (args[0], args[1])
            shape = (*a.shape[:-1], b.shape[-1])
            return torch.randn(shape, generator=self.generator).to(a.dtype)
        return func(*args, **kwargs)

    def _decides(self, read: Tensor) -> bool:
        """Whether a number that Python reads is an activation's or compares one. Integers route tokens."""
        if read.is_floating_point():
            return read not in self.constants
        return read.dtype == torch.bool and read in self.measured

    def _measure(self, args: Any, kwargs: Any, out: Any) -> None:
        """Note what is no number with a fraction but depends on such that are not constant."""
        made = [t for t in tensors_in(out) if not t.is_floating_point() and not t.is_complex()]
        if made and any(
            t in self.measured or t.is_floating_point() and t not in self.constants
            for t in tensors_in(args) + tensors_in(kwargs)
        ):
            for tensor in made:
                self.measured.add(tensor)

    def _follow(self, func: Any, op: str, inplace: bool, args: Any, kwargs: Any, out: Any) -> Any:
        ins = tensors_in(args) + tensors_in(kwargs)
        outs = tensors_in(out)
        if op in NEW and not ins or op in ("zeros_like", "new_zeros"):
            if op in ("zeros", "zeros_like", "new_zeros"):
                for tensor in outs:
                    self.partials.zeros.add(tensor)
            if self._births():
                for tensor in outs:
                    self.birth(f"new@{self.where}", tensor, "new")
            return out
        keys = {int(t.untyped_storage()._cdata) for t in ins}
        if op == "expand" and self._expands(args[0], out):
            labels = self.labels.get(args[0]) if self.labelled(args[0]) else None
            if labels is not None and bool((labels >= SHARED).any()) and out.numel() <= BIRTH_LIMIT:
                expanded, out = labels.expand(out.shape), out.clone()
                self.labels.put_copies(out, expanded, f"copies@{self.where}")
                return out
            if self._births():
                out = out.clone()
                self._birth_copies(args[0], out)
                return out
        if (
            not inplace
            and op != "view_as_complex"
            and outs
            and all(int(t.untyped_storage()._cdata) in keys for t in outs)
        ):
            return out
        if ins and all(t in self.constants for t in ins):
            for tensor in outs:
                self.constants.add(tensor)
        elif op in BY_INDEX and ins[0] in self.constants:
            for tensor in outs:
                self.rows_of_constants.add(tensor)
        elif inplace and ins[0] in self.constants:
            self.constants.discard(ins[0])
        self._follow_partials(op, inplace, args, kwargs, ins, outs)
        if op not in SHAPE_ONLY and any(self.labelled(t) for t in ins):
            apply_rule(self, func, op, inplace, args, kwargs, out)
        return out

    def labelled(self, tensor: Tensor) -> bool:
        key = int(tensor.untyped_storage()._cdata)
        return key in self.labels.storages or key in self.labels.by_storage

    # partial sums

    def _follow_partials(
        self, op: str, inplace: bool, args: Any, kwargs: Any, ins: list[Tensor], outs: list[Tensor]
    ) -> None:
        states = [self.partials.get(t) for t in ins]
        partial = [s for s in states if s is not None]
        if not partial or op in SHAPE_ONLY:
            return
        others = [t for t, s in zip(ins, states, strict=True) if s is None and t.is_floating_point()]
        if op not in LINEAR or not self._stays_linear(op, args, partial, others):
            for state in partial:
                self.partials.demand(state, op, self.where)
            return
        joined = self.partials.join(partial)
        if op in ("add", "sub"):
            for bias in others:
                if not self._is_zero(bias):
                    joined.biases.append((len(joined.exits), self._weight_ids(bias)))
        for tensor in outs:
            self.partials.mark(tensor, joined)

    def _stays_linear(self, op: str, args: Any, partial: list[Any], others: list[Tensor]) -> bool:
        if op == "mul":
            found = [labels for labels in map(self.labels.get, others) if labels is not None]
            hard = any(bool((labels > 0).any()) for labels in found)
            return len(partial) == 1 and not hard
        if op == "div":
            return self.partials.get(args[0]) is not None and len(partial) == 1
        if op in ("masked_fill", "where"):
            return all(self._is_zero(t) or t.numel() == 1 and not bool(t.any()) for t in others) and all(
                not isinstance(a, (int, float)) or a == 0 for a in args[2:]
            )
        if op in ("add", "sub"):
            return all(self._is_zero(t) or self._is_bias(t) for t in others)
        if op in JOINING:
            written = others if op != "copy" else [t for t in others if t is not args[0]]
            return all(self._is_zero(t) for t in written)
        return True

    def _is_zero(self, tensor: Tensor) -> bool:
        return tensor in self.partials.zeros or tensor.numel() == 0

    def _is_bias(self, tensor: Tensor) -> bool:
        """Whether a tensor is a parameter, or rows of one."""
        if tensor not in self.constants and tensor not in self.rows_of_constants:
            return False
        labels = self.labels.get(tensor)
        return labels is not None and bool((labels < 0).all())

    def _weight_ids(self, tensor: Tensor) -> np.ndarray:
        """One id of each parameter that a bias is made of."""
        labels = self.labels.get(tensor)
        assert labels is not None, "a bias is a parameter"
        ids = np.unique(-labels.numpy())
        sources = np.searchsorted([s.base for s in self.labels.sources], ids, side="right")
        return ids[np.unique(sources, return_index=True)[1]]

    def add_to_partial(self, out: Tensor, bias: Tensor) -> None:
        """A product with a bias: the bias is added once, where the product is summed."""
        partial = self.partials.get(out)
        assert partial is not None, "the product is a partial sum"
        if self._is_bias(bias):
            partial.biases.append((len(partial.exits), self._weight_ids(bias)))
        else:
            known = self.partials.get(bias)
            if known is not None:
                self.partials.mark(out, self.partials.join([partial, known]))
            elif not self._is_zero(bias):
                self.partials.demand(partial, "a result", self.where)

    def need_whole(self, tensor: Tensor, reason: str, module: str) -> None:
        """Somebody sees this tensor who must not see a rank's part, nor a sum that is not complete."""
        labels = self.labels.get(tensor)
        self.labels.fail(labels, reason, module)
        self.labels.pin(labels)
        self._demand(tensor)

    def _demand(self, tensor: Tensor) -> None:
        partial = self.partials.get(tensor)
        if partial is not None:
            self.partials.demand(partial, "a result", self.where)

    # cutting activations

    def _births(self) -> bool:
        return any(name in self.decisions.births for name in self.stack[-2:])

    def birth(self, name: str, tensor: Tensor, kind: str) -> None:
        """Let a whole activation be cut: soft ids for its elements."""
        if not tensor.is_floating_point() or tensor.dim() < 2 or not 1 < tensor.numel() <= BIRTH_LIMIT:
            return
        source = Source(name, tuple(tensor.shape), self.labels.next_id, kind)
        self.labels.next_id += source.numel
        self.labels.sources.append(source)
        ids = torch.arange(source.numel).view(tensor.shape) + source.base
        self.labels.put(tensor, -ids)

    @staticmethod
    def _expands(before: Tensor, out: Tensor) -> bool:
        return out.dim() >= 4 and out.is_floating_point() and out.numel() > before.numel()

    def _birth_copies(self, before: Tensor, out: Tensor) -> None:
        labels = self.labels.get(before)
        if labels is not None and bool(labels.any()):
            self.labels.put(out, labels.expand(out.shape))
            return
        lead = out.dim() - before.dim()
        dims = [
            d
            for d in range(1, out.dim() - 2)
            if out.shape[d] > 1 and (d < lead or before.shape[d - lead] == 1)
        ]
        if not dims:
            return
        size = out.shape[dims[0]]
        source = Source(f"copies@{self.where}", (size,), self.labels.next_id, "new")
        self.labels.next_id += size
        self.labels.sources.append(source)
        shape = [size if d == dims[0] else 1 for d in range(out.dim())]
        self.labels.put(out, -(torch.arange(size) + source.base).view(shape).expand(out.shape))

    # helpers of the rules

    def activation(self, tensor: Tensor) -> Tensor | None:
        """The labels of an operand that is no weight."""
        return self.labels.get(tensor)

    def is_constant(self, tensor: Tensor) -> bool:
        """Whether a tensor is computed from parameters alone."""
        return tensor in self.constants

    def used(self, ids: Tensor) -> None:
        """Remember which weights came first in the flow of data."""
        flat = ids.reshape(-1)
        for value in (flat[:1], flat[-1:]):
            if value.numel() and int(value) > 0:
                name = self.source_name(int(value) & ~SHARED)
                self.order.setdefault(name, len(self.order))
                self.reached.add(name)

    def source_name(self, identity: int) -> str:
        """Name of the source that has this id."""
        low, high = 0, len(self.labels.sources)
        while high - low > 1:
            middle = (low + high) // 2
            if self.labels.sources[middle].base <= identity:
                low = middle
            else:
                high = middle
        return self.labels.sources[low].name

    def fail_all(self, args: Any, kwargs: Any, reason: str, skip: str = "") -> None:
        """Hard labels of the operands cannot be followed; partial sums among them must be summed before."""
        for tensor in tensors_in(args) + tensors_in(kwargs):
            view = self.labels.weight_view(tensor)
            if (
                view is not None
                and view.source is not None
                and (view.source.name == skip or view.numel > DENSE_LIMIT)
            ):
                continue
            labels = self.labels.get(tensor)
            self.labels.fail(labels, reason, self.where)
            self.labels.pin(labels)
