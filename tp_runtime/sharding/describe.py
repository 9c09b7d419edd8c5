"""What settings are made of, whatever object holds them: for telling two apart, and as text for a key.

Attributes of a module may be numbers, but as well configurations, functions with what they close over,
dictionaries and objects of a user's own. `parts` takes one such value apart; `same` and `describe` follow.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterable, Mapping
from contextlib import suppress
from enum import Enum
from functools import partial
from pathlib import Path
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

LIMIT = 200_000  # values of one description; what is larger is no setting
_NUMBERS = (bool, int, float, complex)
_PLAIN = (*_NUMBERS, str, bytes, type(None), type(...), range, slice, torch.dtype, torch.device)
_OF_EVERY_MODULE = frozenset(vars(nn.Module())) - {"_parameters", "_buffers", "_modules"}


class UnknownSettings(Exception):
    """Too much to be described."""


def parts(value: Any) -> tuple[str, list[Any]]:
    """What a value is as far as that is one line of text, and the values it is made of."""
    if isinstance(value, Enum):
        return f"{_name(type(value))}.{value.name}", []
    if isinstance(value, _PLAIN):
        return f"{type(value).__name__} {value!r}", []
    if isinstance(value, Tensor):
        return f"tensor {tuple(value.shape)} {value.dtype}", []
    if isinstance(value, np.ndarray):
        return f"array {value.shape} {value.dtype} {hashlib.sha256(value.tobytes()).hexdigest()}", []
    if isinstance(value, (list, tuple)):
        return f"{_name(type(value))} {len(value)}", list(value)
    if isinstance(value, (set, frozenset)):
        return f"{_name(type(value))} {sorted(map(str, value))}", []
    if isinstance(value, Mapping):
        return f"{_name(type(value))} {[str(key) for key in value]}", list(value.values())
    if isinstance(value, partial):
        return "partial", [value.func, value.args, value.keywords]
    if isinstance(value, MethodType):
        return "method", [value.__self__, value.__func__]
    if isinstance(value, FunctionType):
        return _function(value)
    if isinstance(value, type):
        bare = [] if _file(value.__module__) else [f for f in vars(value).values() if callable(f)]
        return f"class {_name(value)}", bare
    return _object(value)


def _function(value: FunctionType) -> tuple[str, list[Any]]:
    inner: list[Any] = [value.__defaults__, value.__kwdefaults__]
    for cell in value.__closure__ or ():
        with suppress(ValueError):  # not filled yet
            inner.append(cell.cell_contents)
    if not _file(value.__module__):  # of a notebook: no file says what it calls
        used = (value.__globals__.get(name) for name in value.__code__.co_names)
        inner += [v for v in used if isinstance(v, (*_PLAIN, type, FunctionType))]
    return f"function {_name(value)} {_code(value.__code__)}", inner


def _code(code: CodeType) -> str:
    constants = [_code(c) if isinstance(c, CodeType) else repr(c) for c in code.co_consts if c is not None]
    if any(" at 0x" in constant for constant in constants):
        raise UnknownSettings
    text = f"{code.co_code.hex()} {constants} {code.co_names}"
    return hashlib.sha256(text.encode()).hexdigest()


def _object(value: Any) -> tuple[str, list[Any]]:
    held = dict(vars(value)) if hasattr(value, "__dict__") else {}
    for base in type(value).__mro__:
        slots = vars(base).get("__slots__", ())
        for name in [slots] if isinstance(slots, str) else slots:
            if name not in ("__dict__", "__weakref__") and hasattr(value, name):
                held[name] = getattr(value, name)
    if isinstance(value, nn.Module):
        held = {name: v for name, v in held.items() if name not in _OF_EVERY_MODULE}
    if isinstance(value, ModuleType):
        return f"module {value.__name__}", []
    name = getattr(value, "__qualname__", "") if callable(value) else ""
    bare = [] if _file(type(value).__module__) else [type(value)]
    return f"{_name(type(value))} {name} {list(held)}", [*held.values(), *bare]


def _name(of: Any) -> str:
    return f"{of.__module__}.{of.__qualname__}"


def same(one: Any, other: Any, place: int = -1, other_place: int = -1) -> bool:
    """Whether two values are made of the same. place, other_place: numbers that the two may differ in, as the
    layers of a list do in which each holds its own place.
    """
    known: set[tuple[int, int]] = set()
    kept: list[Any] = []  # so that no id is given twice
    todo = [(one, other)]
    while todo:
        a, b = todo.pop()
        if a is b or type(a) is int and type(b) is int and (a, b) == (place, other_place):
            continue
        if (id(a), id(b)) in known:
            continue
        (text, inner), (other_text, other_inner) = parts(a), parts(b)
        if text != other_text or len(inner) != len(other_inner):
            return False
        if inner:
            known.add((id(a), id(b)))
            kept += [a, b]
            todo += zip(inner, other_inner, strict=True)
        if len(known) > LIMIT:
            return False
    return True


class Describer:
    """Values as text that is equal in every process. python_modules: those that classes and functions in them
    come from. Raises UnknownSettings where there is too much of it, or no text for a part.
    """

    def __init__(self) -> None:
        self.python_modules: set[str] = set()
        self._seen: dict[int, int] = {}
        self._kept: list[Any] = []

    def describe(self, value: Any) -> str:
        """A value met again is only named."""
        words: list[str] = []
        todo = [value]
        while todo:
            part = todo.pop()
            if isinstance(part, _PLAIN):
                words.append(parts(part)[0])
                continue
            if id(part) in self._seen:
                words.append(f"again {self._seen[id(part)]}")
                continue
            self._seen[id(part)] = len(self._seen)
            self._kept.append(part)
            if len(self._kept) > LIMIT:
                raise UnknownSettings
            text, inner = parts(part)
            words.append(text)
            self._note(part)
            todo += reversed(inner)
        return "\n".join(words)

    def _note(self, value: Any) -> None:
        if isinstance(value, (FunctionType, type)):
            self.python_modules.add(value.__module__)
        else:
            self.python_modules.update(base.__module__ for base in type(value).__mro__)


def _file(module: str | None) -> str | None:
    """Where a module's code is; a module of the interpreter's own is known by its name."""
    if module in sys.builtin_module_names:
        return module
    return getattr(sys.modules.get(module or ""), "__file__", None)


def sources(python_modules: Iterable[str]) -> tuple[set[str], set[str]]:
    """The files of these modules and of what they use of unversioned code (a user's own), and the versions of
    the packages they belong to.
    """
    files: set[str] = set()
    versions: set[str] = set()
    done: set[str] = set()
    todo = list(python_modules)
    while todo:
        name = todo.pop()
        module, package = sys.modules.get(name), name.partition(".")[0]
        if name in done or module is None:
            continue
        done.add(name)
        version = getattr(sys.modules.get(package), "__version__", None)
        if package in sys.stdlib_module_names and package != "__main__":
            continue
        if _file(name) and Path(str(_file(name))).is_file():
            files.add(str(_file(name)))
        if version is not None:
            versions.add(f"{package} {version}")
            continue
        for value in list(vars(module).values()):
            used = value.__name__ if isinstance(value, ModuleType) else getattr(value, "__module__", None)
            owner = sys.modules.get(str(used).partition(".")[0])
            if isinstance(used, str) and not hasattr(owner, "__version__"):
                todo.append(used)
    return files, versions
