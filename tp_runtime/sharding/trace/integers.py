"""Integers that a forward pass reads from its modules, followed to the dimensions they set.

While a model is traced, each integer attribute of its modules (and of the plain objects they hold, such as
a configuration) is replaced by an int that remembers where it came from. Arithmetic keeps the memory, so do
tensor sizes. Where such an int sets a dimension (`view`, `split`, `zeros`, ...), the labels of the result say
how many of its indices this rank holds, which is one equation for the attribute.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .labels import Labels
from .operators import TAKE_SIZES


@dataclass(frozen=True)
class Attribute:
    """An integer of a model: `owner` is the path of a module, or "path>name" of an object that it holds;
    index: place in a list or tuple, or None."""

    owner: str
    name: str
    index: int | None = None


@dataclass(frozen=True, eq=False)
class SizeOf:
    """The size of a dimension of a labelled tensor."""

    labels: Tensor
    dim: int


Expression = Any  # int | Attribute | SizeOf | (operator, Expression, Expression)
Locate = Callable[[Tensor, int], int]  # labels, dim -> indices of it that a rank holds

_OPERATORS: dict[str, Callable[[int, int], int]] = {
    "mul": lambda a, b: a * b,
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "floordiv": lambda a, b: a // b if b else 0,
}


class TracedInt(int):
    """An int that knows the expression it was computed by."""

    expression: Expression

    def __new__(cls, value: int, expression: Expression) -> TracedInt:
        made = super().__new__(cls, value)
        made.expression = expression
        return made

    def __reduce__(self) -> tuple[Any, ...]:
        return (int, (int(self),))

    def __deepcopy__(self, memo: dict[int, Any]) -> int:
        return int(self)

    def __neg__(self) -> TracedInt:
        return TracedInt(-int(self), ("sub", 0, self.expression))

    def __truediv__(self, other: Any) -> Any:
        """A quotient without rest may come back through int()."""
        return (
            TracedFloat(int(self) / other, self, other)
            if type(other) in (int, TracedInt) and other
            else int(self) / other
        )


class TracedFloat(float):
    """The quotient of traced ints; int() of it is their floor division."""

    def __new__(cls, value: float, above: int, below: int) -> TracedFloat:
        made = super().__new__(cls, value)
        made.quotient = ("floordiv", _expression(above), _expression(below))  # type: ignore[attr-defined]
        return made

    def __int__(self) -> int:
        return TracedInt(math.floor(float(self)), self.quotient)  # type: ignore[attr-defined]

    def __reduce__(self) -> tuple[Any, ...]:
        return (float, (float(self),))


def _expression(value: int) -> Expression:
    return value.expression if isinstance(value, TracedInt) else int(value)


def _install(name: str) -> None:
    compute = _OPERATORS[name]

    def forward(self: TracedInt, other: Any) -> Any:
        if type(other) not in (int, TracedInt):
            return NotImplemented
        return TracedInt(compute(int(self), int(other)), (name, self.expression, _expression(other)))

    def reverse(self: TracedInt, other: Any) -> Any:
        if type(other) not in (int, TracedInt):
            return NotImplemented
        return TracedInt(compute(int(other), int(self)), (name, _expression(other), self.expression))

    setattr(TracedInt, f"__{name}__", forward)
    setattr(TracedInt, f"__r{name}__", reverse)


for _name in _OPERATORS:
    _install(_name)


def attributes_of(expression: Expression) -> list[Attribute]:
    """The attributes an expression reads."""
    if isinstance(expression, Attribute):
        return [expression]
    if isinstance(expression, tuple):
        return [a for part in expression[1:] for a in attributes_of(part)]
    return []


def evaluate(
    expression: Expression, values: dict[Attribute, int], whole: dict[Attribute, int], locate: Locate
) -> int:
    """The expression's value on a rank whose attributes are `values` where they differ from `whole`."""
    if isinstance(expression, Attribute):
        return values.get(expression, whole[expression])
    if isinstance(expression, SizeOf):
        return locate(expression.labels, expression.dim)
    if isinstance(expression, tuple):
        name, a, b = expression
        return _OPERATORS[name](evaluate(a, values, whole, locate), evaluate(b, values, whole, locate))
    return int(expression)


def holders(model: nn.Module) -> list[tuple[str, Any]]:
    """Every object whose integers a forward pass may read: modules, and plain objects they hold."""
    found: list[tuple[str, Any]] = []
    seen: set[int] = set()
    for path, module in model.named_modules():
        found.append((path, module))
        seen.add(id(module))
        for name, value in vars(module).items():
            plain = (
                hasattr(value, "__dict__")
                and not isinstance(value, (nn.Module, Tensor, type))
                and not callable(value)
            )
            if plain and id(value) not in seen and not isinstance(value, (torch.device, torch.dtype)):
                seen.add(id(value))
                found.append((f"{path}>{name}", value))
    return found


def install(model: nn.Module) -> dict[Attribute, int]:
    """Replace the integers of a (disposable) model by traced ones; their values."""
    whole: dict[Attribute, int] = {}
    for owner, holder in holders(model):
        for name, value in list(vars(holder).items()):
            if name.startswith("__"):
                continue
            if type(value) is int and value > 0:
                key = Attribute(owner, name)
                whole[key] = value
                vars(holder)[name] = TracedInt(value, key)
            elif (
                type(value) in (list, tuple)
                and value
                and all(type(v) is int for v in value)
                and isinstance(holder, nn.Module)
            ):
                keys = [Attribute(owner, name, place) for place in range(len(value))]
                whole.update(zip(keys, value, strict=True))
                vars(holder)[name] = type(value)(TracedInt(v, k) for v, k in zip(value, keys, strict=True))
    return whole


@dataclass
class Equation:
    """`value` (full size) sets dim `dim` of a tensor with `labels`; relative to `base`: as a multiple of its
    dim.
    """

    value: int
    labels: Tensor | None
    dim: int
    module: str
    base: tuple[Tensor | None, int, int] | None = None  # labels, dim, whole size
    share: bool = False  # value counts groups of the dim, which keep their size

    def wanted(self, locate: Locate) -> int:
        """The value that fits a rank."""
        if self.labels is None:
            return int(self.value)
        local = locate(self.labels, self.dim)
        if self.share:
            full = self.labels.shape[self.dim]
            return int(self.value) * local // full if full else int(self.value)
        if self.base is not None:
            labels, dim, below = self.base
            below = below if labels is None else locate(labels, dim)
            return local // below if below else int(self.value)
        return local


class IntegerMode(TorchFunctionMode):
    """Sees the integers that torch functions get, and writes down the equations."""

    def __init__(self, labels: Labels, where: Callable[[], str]) -> None:
        super().__init__()
        self.labels = labels
        self.where = where
        self.equations: list[Equation] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name == "scaled_dot_product_attention":
            return plain_attention(*args, **kwargs)
        result = func(*args, **kwargs)
        first = args[0] if args else None
        if isinstance(first, Tensor):
            if isinstance(result, torch.Size):
                return self._sizes(first, result)
            if type(result) is int and name == "size":
                dim = args[1] if len(args) > 1 else kwargs.get("dim", 0)
                return self._size(first, result, int(dim))
        note = getattr(self, "_" + name.strip("_"), None) if name not in TAKE_SIZES else self._shaped
        if note is not None and name != "size":
            note(result, args, kwargs)
        return result

    def _size(self, tensor: Tensor, value: int, dim: int) -> int:
        labels = self._labels(tensor)
        return value if labels is None else TracedInt(value, SizeOf(labels, dim % labels.dim()))

    def _sizes(self, tensor: Tensor, sizes: torch.Size) -> torch.Size:
        labels = self._labels(tensor)
        if labels is None:
            return sizes
        return torch.Size([TracedInt(size, SizeOf(labels, dim)) for dim, size in enumerate(sizes)])

    def _labels(self, tensor: Tensor) -> Tensor | None:
        view = self.labels.weight_view(tensor)
        if view is not None and view.numel > 1 << 20:
            return None
        return self.labels.get(tensor)

    def _add(
        self,
        value: Any,
        tensor: Tensor,
        dim: int,
        base: tuple[Tensor, int] | None = None,
        share: bool = False,
    ) -> None:
        if type(value) not in (int, TracedInt) or not isinstance(tensor, Tensor) or value < 1:
            return
        labels = self._labels(tensor)
        if labels is None and not isinstance(value, TracedInt):
            return
        below = None
        if base is not None:
            whole, base_dim = base
            base_dim %= whole.dim()
            below = self._labels(whole), base_dim, int(whole.shape[base_dim])
        self.equations.append(Equation(value, labels, dim % max(tensor.dim(), 1), self.where(), below, share))

    def _shaped(self, result: Any, args: Any, kwargs: Any) -> None:
        if not isinstance(result, Tensor):
            return
        sizes = list(
            _flat(
                a
                for a in (*args, kwargs.get("size", ()), kwargs.get("shape", ()))
                if not isinstance(a, Tensor)
            )
        )
        for dim, size in enumerate(sizes[: result.dim()]):
            self._add(size, result, dim)

    def _unflatten(self, result: Any, args: Any, kwargs: Any) -> None:
        dim = kwargs.get("dim", args[1] if len(args) > 1 else 0)
        sizes = kwargs.get("sizes", args[2] if len(args) > 2 else ())
        for place, size in enumerate(sizes):
            self._add(size, result, int(dim) % args[0].dim() + place)

    def _split(self, result: Any, args: Any, kwargs: Any) -> None:
        dim = kwargs.get("dim", args[2] if len(args) > 2 else 0)
        sizes = (
            args[1]
            if len(args) > 1
            else kwargs.get("split_size_or_sections", kwargs.get("split_size", kwargs.get("split_sizes")))
        )
        for place, part in enumerate(result):
            self._add(sizes[place] if isinstance(sizes, (list, tuple)) else sizes, part, int(dim))

    _split_with_sizes = _split

    def _repeat_interleave(self, result: Any, args: Any, kwargs: Any) -> None:
        dim = kwargs.get("dim", args[2] if len(args) > 2 else None)
        repeats = kwargs.get("repeats", args[1] if len(args) > 1 else None)
        if dim is not None and isinstance(repeats, int):
            self._add(repeats, result, int(dim), base=(args[0], int(dim)))

    def _repeat(self, result: Any, args: Any, kwargs: Any) -> None:
        sizes = list(_flat(args[1:]))
        lead = len(sizes) - args[0].dim()
        for dim, size in enumerate(sizes):
            if dim >= lead:
                self._add(size, result, dim, base=(args[0], dim - lead))
            else:
                self._add(size, result, dim)

    def _layer_norm(self, result: Any, args: Any, kwargs: Any) -> None:
        sizes = kwargs.get("normalized_shape", args[1] if len(args) > 1 else ())
        for place, size in enumerate(sizes):
            self._add(size, result, result.dim() - len(sizes) + place)

    _rms_norm = _layer_norm

    def _group_norm(self, result: Any, args: Any, kwargs: Any) -> None:
        self._add(kwargs.get("num_groups", args[1] if len(args) > 1 else None), result, 1, share=True)

    def _conv1d(self, result: Any, args: Any, kwargs: Any) -> None:
        groups = kwargs.get("groups", args[6] if len(args) > 6 else 1)
        if groups > 1:
            self._add(groups, result, 1 if result.dim() > 2 else 0, share=True)

    _conv2d = _conv1d

    def _narrow(self, result: Any, args: Any, kwargs: Any) -> None:
        if len(args) > 3:
            self._add(args[3], result, int(args[1]))

    def _getitem(self, result: Any, args: Any, kwargs: Any) -> None:
        tensor, index = args[0], args[1] if isinstance(args[1], tuple) else (args[1],)
        if not isinstance(tensor, Tensor):
            return
        used = sum(1 for i in index if i is not None and i is not Ellipsis and not isinstance(i, Tensor))
        dim = 0
        for i in index:
            if isinstance(i, Tensor):
                return
            if i is Ellipsis:
                dim += tensor.dim() - used
            elif i is not None:
                if isinstance(i, slice):
                    for end in (i.start, i.stop):
                        if isinstance(end, TracedInt) and 0 < end <= tensor.shape[dim]:
                            self._add(end, tensor.narrow(dim, 0, int(end)), dim)
                dim += 1


def _flat(values: Iterable[Any]) -> Iterable[Any]:
    for value in values:
        if isinstance(value, (list, tuple)):
            yield from _flat(value)
        else:
            yield value


def plain_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """scaled_dot_product_attention of operations whose labels can be followed."""
    if enable_gqa and k.shape[-3] != q.shape[-3]:
        copies = int(q.shape[-3]) // int(k.shape[-3])
        k, v = k.repeat_interleave(copies, -3), v.repeat_interleave(copies, -3)
    scores = q @ k.transpose(-2, -1) * (scale if scale is not None else int(q.shape[-1]) ** -0.5)
    if is_causal:
        causal = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).tril()
        scores = scores.masked_fill(~causal, float("-inf"))
    if attn_mask is not None:
        scores = (
            scores.masked_fill(~attn_mask, float("-inf"))
            if attn_mask.dtype == torch.bool
            else scores + attn_mask
        )
    return torch.softmax(scores, -1) @ v


def solve(
    equations: list[Equation], whole: dict[Attribute, int], locate: Locate
) -> tuple[dict[Attribute, int], list[Equation]]:
    """(attributes that differ from `whole` on a rank, equations no attribute can satisfy).

    locate: labels, dim -> how many indices of it the rank holds. An equation that names one attribute sets
    it; the others then choose, among the attributes they read, one that no equation has set.
    """
    values: dict[Attribute, int] = {}
    fixed: set[Attribute] = set()
    indirect: list[tuple[Equation, int]] = []
    bad: list[Equation] = []
    seen: set[tuple[object, int, str]] = set()
    for equation in equations:
        wanted = equation.wanted(locate)
        expression = (
            equation.value.expression if isinstance(equation.value, TracedInt) else int(equation.value)
        )
        if isinstance(expression, Attribute):
            if wanted == whole[expression]:
                fixed.add(expression)
            elif values.setdefault(expression, wanted) != wanted:
                bad.append(equation)
        elif isinstance(expression, (tuple, int)):
            key = (expression if isinstance(expression, int) else id(expression), wanted, equation.module)
            if key not in seen:
                seen.add(key)
                indirect.append((equation, wanted))
    for _ in range(3):
        for equation, wanted in indirect:
            _satisfy(equation, wanted, values, fixed, whole, locate)
    for equation, wanted in indirect:
        expression = (
            equation.value.expression if isinstance(equation.value, TracedInt) else int(equation.value)
        )
        if evaluate(expression, values, whole, locate) != wanted:
            bad.append(equation)
    return values, bad


def _satisfy(
    equation: Equation,
    wanted: int,
    values: dict[Attribute, int],
    fixed: set[Attribute],
    whole: dict[Attribute, int],
    locate: Locate,
) -> None:
    """Change one attribute so that the equation holds, if it does not and one can."""
    expression = equation.value.expression if isinstance(equation.value, TracedInt) else int(equation.value)
    if evaluate(expression, values, whole, locate) == wanted:
        return
    choices = []
    for attribute in dict.fromkeys(attributes_of(expression)):
        full = whole[attribute]
        now = max(evaluate(expression, values, whole, locate), 1)
        guesses = [
            full * wanted // now,
            full * wanted // max(int(equation.value), 1),
            *range(1, min(full, 4096)),
        ]
        for guess in guesses:
            if guess > 0 and evaluate(expression, {**values, attribute: guess}, whole, locate) == wanted:
                rank = 2 * (attribute in values) + 4 * (attribute in fixed) + (">" in attribute.owner)
                choices.append((rank, guess, attribute))
                break
    if choices:
        _, guess, attribute = min(choices, key=lambda choice: choice[0])
        values[attribute] = guess
