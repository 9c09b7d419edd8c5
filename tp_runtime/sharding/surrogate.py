"""A disposable copy of a model to trace: same code, own integers and hooks, and weights that cost nothing.

Everything is fp32 on the CPU, so that rounding is no difference and any device will do. Weights are shared
with the model where it has them so. Elsewhere a large one is address space without pages, and on the meta
device a small one is drawn. A list of layers ends after the first of its last new structure, so that a model
of 80 equal layers is traced in the time of one.
"""

from __future__ import annotations

import copy
import mmap
from collections import OrderedDict
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from .describe import OF_EVERY_MODULE, same
from .multihead import replace_forward, replaceable, without_nested_tensors
from .plan import Ranges

if TYPE_CHECKING:
    from .inputs import Example

LARGE_WEIGHT = 1 << 22


@runtime_checkable
class Divisible(Protocol):
    """A module whose weight is kept in another form than a tensor, and which can be cut nevertheless."""

    def dense(self) -> nn.Module:
        """A module of plain parameters with the same values: what is traced."""

    def divided(self, dim: int, ranges: Ranges) -> nn.Module:
        """A module that holds `ranges` of dim `dim` of the weight."""


def named_shapes(model: nn.Module) -> list[tuple[str, tuple[int, ...]]]:
    """Name and shape of each parameter and buffer of what is traced for `model`."""
    found = [(n, tuple(t.shape)) for n, t in [*model.named_parameters(), *model.named_buffers()]]
    dense = {path: m.dense() for path, m in model.named_modules() if isinstance(m, Divisible)}
    found = [(n, shape) for n, shape in found if n.rpartition(".")[0] not in dense]
    return found + [(f"{p}.{n}", tuple(t.shape)) for p, m in dense.items() for n, t in m.named_parameters()]


@dataclass
class Surrogate:
    """model: the copy. places: path of each shortened list -> place in the original -> place in the copy.
    hooked: modules of the copy at which a user's hooks see what goes in and comes out. overlapping: buffers
    that share memory, in the original, with other tensors of the model.
    """

    model: nn.Module
    places: dict[str, dict[str, str]]
    hooked: set[str] = field(default_factory=set)
    overlapping: set[str] = field(default_factory=set)

    def stand_in(self, name: str) -> str:
        """The name, in the copy, of what stands for a module or parameter of the original."""
        path: list[str] = []
        for part in name.split("."):
            path.append(self.places.get(".".join(path), {}).get(part, part))
        return ".".join(path)

    def original_calls(self, model: nn.Module, example: Example) -> Example:
        """The example with module paths of `model`, the original."""
        first: dict[str, str] = {}
        for name, _ in model.named_modules():
            first.setdefault(self.stand_in(name), name)
        return replace(example, calls=[(first[path], args, kwargs) for path, args, kwargs in example.calls])

    def repeats(self, path: str) -> int:
        """How many modules of the original a child of a list in the copy stands for."""
        parent, _, place = path.rpartition(".")
        return max(1, sum(kept == place for kept in self.places.get(parent, {}).values()))

    def same_role(self, name: str) -> list[str]:
        """The tensors at the same place of modules of the same class in the same lists, `name` among them."""
        return self._roles.get(name, [name])

    @cached_property
    def _roles(self) -> dict[str, list[str]]:
        roles: dict[tuple[object, ...], list[str]] = {}
        for name, tensor in [*self.model.named_parameters(), *self.model.named_buffers()]:
            roles.setdefault((_role(self.model, name), tuple(tensor.shape)), []).append(name)
        return {name: names for names in roles.values() for name in names}


def _role(model: nn.Module, name: str) -> tuple[object, ...]:
    """A tensor's path, with a list's places replaced by the classes of what is there."""
    path: list[object] = []
    module: nn.Module | None = model
    for part in name.split(".")[:-1]:
        child = module._modules[part] if module is not None else None
        path.append(type(child) if isinstance(module, nn.ModuleList) else part)
        module = child
    return *path, name.rpartition(".")[2]


def make_surrogate(model: nn.Module, *, shorten: bool = False) -> Surrogate:
    """A disposable copy of model, without its hooks. shorten: cut every outermost list after the first layer
    of the last new structure.
    """
    places: dict[str, dict[str, str]] = {}
    dropped: list[nn.Module] = []
    if shorten:
        _choose_layers(model, "", places, dropped)
    gone = {id(module) for layer in dropped for module in layer.modules()}
    memo: dict[int, Any] = {id(layer): nn.Identity() for layer in dropped}
    for module in model.modules():
        for hooks in (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks):
            memo[id(hooks)] = OrderedDict()
        if id(module) in gone:
            continue
        if isinstance(module, Divisible):
            memo[id(module)] = module.dense()
        for parameter in module._parameters.values():
            if parameter is not None and id(parameter) not in memo:
                memo[id(parameter)] = nn.Parameter(_stand_in_tensor(parameter), requires_grad=False)
        for tensor in (*module._buffers.values(), *vars(module).values()):
            if isinstance(tensor, Tensor) and id(tensor) not in memo:
                memo[id(tensor)] = _stand_in_tensor(tensor, clone=True)
    made = copy.deepcopy(model, memo)
    made.eval()
    for module in made.modules():
        # transformers' hooks, which the next call that asks for something makes anew.
        vars(module).pop("_output_capturing_hooks_installed", None)
    for path, stand_ins in places.items():
        layers = made.get_submodule(path)
        for place in set(stand_ins) - set(stand_ins.values()):
            del layers._modules[place]
    for attention in replaceable(made):
        replace_forward(attention)
    without_nested_tensors(made)
    surrogate = Surrogate(made, places)
    surrogate.hooked = {surrogate.stand_in(path) for path, m in model.named_modules() if has_hooks(m)}
    surrogate.overlapping = {surrogate.stand_in(name) for name in _overlapping(model)}
    return surrogate


def _overlapping(model: nn.Module) -> set[str]:
    """Buffers of which an element is also another's, or several of its own: what is written into one shows in
    the other, which parts of them, or a copy, would not do.
    """
    found: set[str] = set()
    by_storage: dict[int, list[tuple[str, Tensor]]] = {}
    for name, tensor in [*model.named_buffers(), *model.named_parameters()]:
        by_storage.setdefault(tensor.untyped_storage()._cdata, []).append((name, tensor))
    for held in by_storage.values():
        spans = [(t.storage_offset(), t.storage_offset() + _extent(t), name) for name, t in held]
        for start, stop, name in spans:
            if any(start < other_stop and other < stop for other, other_stop, n in spans if n != name):
                found.add(name)
        found.update(name for name, t in held if t.numel() > 1 and 0 in t.stride())
    return found & {name for name, _ in model.named_buffers()}


def _extent(tensor: Tensor) -> int:
    """From a tensor's first element in memory to behind its last, in elements."""
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    return sum((size - 1) * stride for size, stride in steps) + 1 if tensor.numel() else 0


def _stand_in_tensor(tensor: Tensor, clone: bool = False) -> Tensor:
    """A contiguous tensor on the CPU, fp32 where it is floating, with storage of its own extent and, where
    the original has any that cost nothing, its values. clone: of a buffer, which a forward pass may change.
    """
    dtype = proof_dtype(tensor.dtype)
    there = tensor.device.type == "cpu" and tensor.dtype == dtype
    if tensor.numel() > LARGE_WEIGHT and (tensor.is_meta or not there and not clone):
        return _address_space(tensor.shape, dtype)
    if not tensor.is_meta:
        data = tensor.detach().to("cpu", dtype)
        whole = data.is_contiguous() and data.untyped_storage().nbytes() == data.numel() * data.itemsize
        return data if whole and not (clone and there) else data.clone(memory_format=torch.contiguous_format)
    if dtype == torch.bool:
        return torch.ones(tensor.shape, dtype=torch.bool)
    if not dtype.is_floating_point:
        return torch.zeros(tensor.shape, dtype=dtype)
    generator = torch.Generator().manual_seed(tensor.numel())
    scale = tensor.shape[-1] ** -0.5 if tensor.dim() > 1 else 1.0
    return (torch.randn(tensor.shape, generator=generator) * scale).to(dtype)


def proof_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp32 for a floating type of fewer bits, else the same."""
    return torch.float32 if dtype.is_floating_point and dtype.itemsize < 4 else dtype


def _address_space(shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """A tensor of zeros whose pages do not exist until they are written."""
    size = shape.numel() * dtype.itemsize
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
    return torch.frombuffer(mmap.mmap(-1, size, flags=flags), dtype=dtype).view(shape)


def alike(one: nn.Module, place: int, other: nn.Module, other_place: int) -> bool:
    """Whether two modules of a list have the same classes, shapes and settings all the way down; a number in
    which each holds its own place in the list does not count.
    """
    if type(one) is not type(other) or has_hooks(one) != has_hooks(other):
        return False
    if _tensors(one) != _tensors(other) or not same(settings(one), settings(other), place, other_place):
        return False
    children, more = dict(one.named_children()), dict(other.named_children())
    return list(children) == list(more) and all(
        alike(child, place, more[name], other_place) for name, child in children.items()
    )


def settings(module: nn.Module) -> dict[str, Any]:
    """The attributes of a module that are neither its tensors, its children nor its hooks."""
    return {name: value for name, value in vars(module).items() if name not in OF_EVERY_MODULE}


def _tensors(module: nn.Module) -> dict[str, Any]:
    """Shapes and types of a module's own tensors."""
    return {name: tensor_kind(t) for name, t in [*module._parameters.items(), *module._buffers.items()]}


def tensor_kind(tensor: Tensor | None) -> tuple[object, ...]:
    """What of a tensor of a module decides about plans: also the value of a buffer that is one number."""
    if tensor is None:
        return ()
    lone = tensor.numel() == 1 and tensor.is_floating_point() and not tensor.is_meta
    value = float(tensor) if lone and not isinstance(tensor, nn.Parameter) else None
    return tuple(tensor.shape), tensor.dtype, value


def has_hooks(module: nn.Module) -> bool:
    """Whether a user's own hooks see what goes into this module or comes out of it. Not those in which
    transformers collects what a call asks for, nor those with which torch makes a weight of others.
    """
    for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values()):
        home = getattr(hook, "__module__", None) or type(hook).__module__
        if home.partition(".")[0] not in ("torch", "transformers"):
            return True
    return False


def repeated(module: nn.Module) -> list[list[int]]:
    """The places of the children of a list, those that are alike together."""
    children = list(module.children())
    groups: list[list[int]] = []
    for place, child in enumerate(children):
        for group in groups:
            if alike(children[group[0]], group[0], child, place):
                group.append(place)
                break
        else:
            groups.append([place])
    return groups


def _choose_layers(
    module: nn.Module, path: str, places: dict[str, dict[str, str]], dropped: list[nn.Module]
) -> None:
    """Keep the first children, one of each structure at least, in every outermost list below module."""
    if isinstance(module, nn.ModuleList):
        layers = list(module)
        groups = repeated(module)
        kept = range(max((group[0] for group in groups), default=0) + 1)
        if len(kept) < len(layers):
            places[path] = {str(p): str(p if p in kept else group[0]) for group in groups for p in group}
            shared = {id(layers[place]) for place in kept}
            dropped += [layer for layer in layers[len(kept) :] if id(layer) not in shared]
        return
    for name, child in module.named_children():
        _choose_layers(child, f"{path}.{name}" if path else name, places, dropped)
