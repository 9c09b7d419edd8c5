"""What settings are made of, whatever object holds them: for telling two apart, and as text for a key.

Attributes of a module may be numbers, but as well configurations, functions with what they close over,
dictionaries and objects of a user's own. `parts` takes one such value apart; `same` and `describe` follow.
"""

from __future__ import annotations

import ctypes
import hashlib
import io
import logging
import random
import sys
import threading
import weakref
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
_FEW = 64  # elements of a tensor that is a setting rather than data
_PLAIN = (
    bool,
    int,
    float,
    complex,
    str,
    bytes,
    type(None),
    type(...),
    range,
    slice,
    torch.dtype,
    torch.device,
)
OF_EVERY_MODULE = frozenset(vars(nn.Module()))
# What decides nothing that is computed, and would be different in every process.
_NO_SETTINGS = (
    *(logging.Logger, logging.Handler, io.IOBase, threading.Thread, threading.local, torch.Generator),
    *(random.Random, weakref.ReferenceType, weakref.WeakKeyDictionary, weakref.WeakValueDictionary),
    *(type(threading.Lock()), type(threading.RLock()), threading.Event, threading.Condition),
)
_LIBRARIES = ("torch", "transformers", "numpy")


class UnknownSettings(Exception):
    """Too much to be described, or something that cannot be."""


def parts(value: Any) -> tuple[str, list[Any]]:
    """What a value is as far as that is one line of text, and the values it is made of.

    Raises UnknownSettings for what neither tells.
    """
    try:
        return _parts(value)
    except UnknownSettings:
        raise
    except Exception as error:
        raise UnknownSettings from error


def _parts(value: Any) -> tuple[str, list[Any]]:
    kind = type(value)  # not __class__, which proxies give as another's
    name = _name(kind)
    if issubclass(kind, _NO_SETTINGS):
        return name, []
    if issubclass(kind, Enum):
        return f"{name}.{value.name}", []
    if kind in _PLAIN:
        return f"{name} {value!r}", []
    if issubclass(kind, Tensor):
        few = value.numel() <= _FEW and not value.is_meta and not isinstance(value, nn.Parameter)
        return f"tensor {tuple(value.shape)} {value.dtype} {value.tolist() if few else ''}", []
    if issubclass(kind, np.ndarray):
        if value.dtype.hasobject:
            return f"{name} {value.shape}", value.reshape(-1).tolist()
        return f"{name} {value.shape} {value.dtype} {hashlib.sha256(value.tobytes()).hexdigest()}", []
    if kind is partial:
        return name, [value.func, value.args, value.keywords]
    if kind is MethodType:
        return name, [value.__self__, value.__func__]
    if issubclass(kind, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
        return f"{name} {value}", []
    if issubclass(kind, ctypes._SimpleCData):
        return f"{name} {value.value!r}", []
    if kind in (staticmethod, classmethod):
        return name, [value.__func__]
    if kind is property:
        return name, [value.fget, value.fset]
    if kind is FunctionType:
        return _function(value)
    if issubclass(kind, ModuleType):
        return f"{name} {value.__name__}", []
    if issubclass(kind, type):
        return _class(value)
    return _object(value)


def _function(value: FunctionType) -> tuple[str, list[Any]]:
    inner: list[Any] = [value.__defaults__, value.__kwdefaults__]
    for cell in value.__closure__ or ():
        with suppress(ValueError):  # not filled yet
            inner.append(cell.cell_contents)
    if not _of_library(value.__module__):  # constants, which a file does not tell if they were set since
        used = (value.__globals__.get(name) for name in value.__code__.co_names)
        inner += [v for v in used if isinstance(v, _PLAIN)]
        if not _file(value.__module__):  # a notebook's
            inner += [v for v in map(value.__globals__.get, value.__code__.co_names) if _is_code(v)]
    return f"function {_name(value)} {_code(value.__code__)}", inner


def _class(value: type) -> tuple[str, list[Any]]:
    """A class with what it holds, and its bases: methods may close over something."""
    if _of_library(value.__module__):
        return f"class {_name(value)}", []
    held = {name: v for name, v in vars(value).items() if not name.startswith("__") or name == "__init__"}
    held = {n: v for n, v in held.items() if _is_code(v) or isinstance(v, (*_PLAIN, list, tuple, dict, set))}
    return f"class {_name(value)} {list(held)}", [*held.values(), *value.__bases__]


def _is_code(value: Any) -> bool:
    return isinstance(value, (FunctionType, type, staticmethod, classmethod, property))


def _code(code: CodeType) -> str:
    text = f"{code.co_code.hex()} {[_constant(c) for c in code.co_consts]} {code.co_names}"
    return hashlib.sha256(text.encode()).hexdigest()


def _constant(value: Any) -> str:
    if isinstance(value, CodeType):
        return _code(value)
    if isinstance(value, (tuple, frozenset)):
        each = [_constant(item) for item in value]
        return str(each if isinstance(value, tuple) else sorted(each))
    return repr(value)


def _object(value: Any) -> tuple[str, list[Any]]:
    kind, inner = type(value), []
    name = _name(kind)
    if issubclass(kind, Mapping):
        name += f" {len(value)}"
        inner += [part for item in value.items() for part in item]
    elif issubclass(kind, (set, frozenset)):
        name += f" {sorted(Describer().describe(item) for item in value)}"
    elif issubclass(kind, (list, tuple)):
        name += f" {len(value)}"
        inner += list(value)
    held: dict[str, Any] = {}
    with suppress(AttributeError, TypeError):
        held.update(object.__getattribute__(value, "__dict__"))
    for base in kind.__mro__:
        slots = vars(base).get("__slots__", ())
        for slot in [slots] if isinstance(slots, str) else slots:
            with suppress(AttributeError):
                held[slot] = vars(base)[slot].__get__(value, kind)
    held = {key: v for key, v in held.items() if key not in ("__dict__", "__weakref__")}
    if issubclass(kind, nn.Module):
        kept = ("_parameters", "_buffers", "_modules")
        held = {key: v for key, v in held.items() if key not in OF_EVERY_MODULE or key in kept}
    bare = kind.__module__ == "builtins" or _of_library(kind.__module__)
    contained = issubclass(kind, (Mapping, set, frozenset, list, tuple))
    if not held and not contained and "__dict__" not in dir(kind) and kind is not object:
        name += f" {_text(value)}"  # of C: a number of numpy, a counter, a built-in function
    return f"{name} {list(held)}", [*inner, *held.values(), *([] if bare else [kind])]


def _text(value: Any) -> str:
    text = repr(value)
    if " at 0x" in text:
        text = getattr(value, "__qualname__", "")
        if not text:
            raise UnknownSettings
    return text


def _name(of: Any) -> str:
    return f"{of.__module__}.{of.__qualname__}"


def _of_library(module: str | None) -> bool:
    """Whether a module belongs to a package whose code its version tells."""
    package = (module or "").partition(".")[0]
    return package in _LIBRARIES or package != "__main__" and package in sys.stdlib_module_names


def same(one: Any, other: Any, place: int = -1, other_place: int = -1) -> bool:
    """Whether two values are made of the same. place, other_place: numbers that the two may differ in, as the
    layers of a list do in which each holds its own place (or a name with it).
    """
    known: set[tuple[int, int]] = set()
    kept: list[Any] = []  # so that no id is given twice
    todo = [(one, other)]
    while todo:
        a, b = todo.pop()
        if a is b or _plainly_same(a, b, place, other_place) or (id(a), id(b)) in known:
            continue
        try:
            (text, inner), (other_text, other_inner) = parts(a), parts(b)
        except UnknownSettings:
            return False
        if text != other_text or len(inner) != len(other_inner):
            return False
        if inner:
            known.add((id(a), id(b)))
            kept += [a, b]
            todo += zip(inner, other_inner, strict=True)
        if len(known) > LIMIT:
            return False
    return True


def _plainly_same(a: Any, b: Any, place: int, other_place: int) -> bool:
    if type(a) is not type(b) or type(a) not in (int, float, str):
        return False
    if type(a) is str and place >= 0:
        return bool(a == b or a.replace(str(place), "#") == b.replace(str(other_place), "#"))
    return bool(a == b or type(a) is int and (a, b) == (place, other_place))


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
            if type(part) in _PLAIN:
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
        owners = [value] if issubclass(type(value), (FunctionType, type)) else type(value).__mro__
        self.python_modules.update(str(owner.__module__) for owner in owners)


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
