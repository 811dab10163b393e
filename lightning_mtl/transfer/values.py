"""Digests of objects by value: numbers, tensors, attributes and code, never how something prints."""

from __future__ import annotations

import enum
import functools
import hashlib
import io
import logging
import struct
import sys
import sysconfig
import types
from collections.abc import Callable, Mapping
from pathlib import Path, PurePath
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.loggers import Logger
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parameter import is_lazy

DIGITS = 20
LIBRARIES = tuple(Path(folder) for folder in {sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib")})
PACKAGE = Path(__file__).parent.parent
# What a class has besides what its author wrote.
GENERATED = (
    "__dict__",
    "__weakref__",
    "__doc__",
    "__module__",
    "__firstlineno__",
    "__static_attributes__",
    "_abc_impl",
)
WRITTEN_OUT = (torch.dtype, torch.device, torch.layout, torch.memory_format, np.dtype, PurePath)
DESCRIBING = (property, staticmethod, classmethod)
# Objects that reach into the whole process, and tell nothing about what is trained.
OPAQUE = (pl.Trainer, Logger, logging.Logger, logging.Handler, io.IOBase)
# Modules whose objects have values that Python copies, and no attributes that show them.
COPIED = frozenset({"array", "collections", "datetime", "decimal", "fractions", "numpy", "operator", "random", "re"})


def digest_of(*values: object) -> str:
    """Compute a name for values, 20 hexadecimal digits: the same for equal values, in every process.

    Example:
        >>> loss, other = torch.nn.HuberLoss(delta=1.0), torch.nn.HuberLoss(delta=0.1)
        >>> digest_of(loss) == digest_of(torch.nn.HuberLoss()), digest_of(loss) == digest_of(other)
        (True, False)
    """
    walk = Digests()
    return _hash(*map(walk.of, values), walk.of_code())[:DIGITS]


def class_name(cls: type) -> str:
    """Return a class's module and name."""
    return f"{cls.__module__}.{cls.__qualname__}"


def attributes(value: Any) -> dict[str, Any] | None:  # noqa: ANN401 - any object
    """Return an object's attributes by their names, sorted; None where it cannot have any."""
    slots = [name for cls in type(value).__mro__ for name in _slots(cls)]
    held: dict[str, Any] | None = getattr(value, "__dict__", None)
    if not isinstance(held, dict) and not slots:
        return None
    held = dict(held or {})
    held.update({name: getattr(value, name) for name in slots if hasattr(value, name)})
    if isinstance(value, nn.Module):
        # Keys of hooks are numbers that torch counts up in a process.
        held = {k: list(own.values()) if "_hooks" in k and isinstance(own, dict) else own for k, own in held.items()}
    return {key: held[key] for key in sorted(held)}


def _hash(*parts: str | bytes) -> str:
    found = hashlib.sha256()
    for part in parts:
        raw = part.encode("utf-8", "surrogatepass") if isinstance(part, str) else part
        found.update(struct.pack("<q", len(raw)) + raw)  # with its length, so that no two lists of parts look alike
    return found.hexdigest()


class Digests:
    """Digests of values and, in the end, of the code that they name.

    Tensors and arrays count by their bytes, other objects by their class and attributes, functions by their code,
    defaults, what they enclose, and the global values that they name. Functions and classes of installed libraries
    count by their names. What shows neither value nor attributes, such as a lock or an object written in C, counts by
    its class.

    Functions and classes that code names are noted, and described one after another in the end, as chains of them may
    be longer than Python's stack is deep.

    Args:
        outer: Whether values that your code finds outside of itself count: what a function encloses, global values, and
            what a class holds. Those of callbacks often count or collect something.
    """

    def __init__(self, *, outer: bool = True) -> None:
        self._outer = outer
        self._known: dict[int, str] = {}
        self._held: list[object] = []  # an object that is gone could leave its id to another one
        self._named: list[type | types.FunctionType] = []
        self._places: dict[int, int] = {}

    def of(self, value: Any) -> str:  # noqa: ANN401 - any object
        """Return the digest of a value, 64 hexadecimal digits."""
        if value is None or value is Ellipsis or isinstance(value, bool | int | str | bytes):
            return _hash(class_name(type(value)), value if isinstance(value, bytes) else str(value))
        if (found := self._known.get(id(value))) is not None:
            return found
        self._held.append(value)
        self._known[id(value)] = _hash("inside of itself", class_name(type(value)))
        self._known[id(value)] = found = self._whole(value)
        return found

    def of_code(self) -> str:
        """Return the digest of the functions and classes that were named so far."""
        # More are named on the way, and the list grows while it is read.
        return _hash(
            *(self._class(named) if isinstance(named, type) else self._function(named) for named in self._named)
        )

    def _whole(self, value: Any) -> str:  # noqa: ANN401
        name = class_name(type(value))
        if isinstance(value, float):
            return _hash(name, struct.pack("<d", value))
        if isinstance(value, complex):
            return _hash(name, struct.pack("<2d", value.real, value.imag))
        if isinstance(value, Tensor):
            return _tensor(value)
        if isinstance(value, np.ndarray | np.generic):
            content = self.of(value.tolist()) if value.dtype.hasobject else value.tobytes()
            return _hash(name, str(value.dtype), str(value.shape), content)
        if isinstance(value, WRITTEN_OUT):
            return _hash(name, str(value))
        if isinstance(value, types.ModuleType):
            return _hash(name, value.__name__)
        if isinstance(value, OPAQUE):
            return _hash(name)
        if isinstance(value, type):
            return _hash("class", self._note(value))
        return self._callable(value) or self._object(value)

    def _object(self, value: Any) -> str:  # noqa: ANN401
        """What an object holds, as a container and in its attributes."""
        parts = [self._note(type(value))]
        if isinstance(value, enum.Enum):
            return _hash(*parts, value.name)
        if isinstance(value, Mapping):
            parts += [self.of(part) for pair in value.items() for part in pair]
        elif isinstance(value, set | frozenset):
            parts += sorted(map(self.of, value))
        elif isinstance(value, list | tuple):
            parts += map(self.of, value)
        elif isinstance(value, slice | range):
            parts += map(self.of, (value.start, value.stop, value.step))
        elif isinstance(value, torch.Generator):
            parts.append(_tensor(value.get_state()))
        elif isinstance(value, nn.Module) and "_orig_mod" in value._modules:  # compiled, which changes no value
            return self.of(value._modules["_orig_mod"])
        elif type(value).__module__.partition(".")[0] in COPIED:
            return _hash("object", *parts, *map(self.of, _as_copied(value)))
        held = attributes(value) or {}
        return _hash("object", *parts, *(part for key, own in held.items() for part in (key, self.of(own))))

    def _callable(self, value: Any) -> str | None:  # noqa: ANN401
        if isinstance(value, types.FunctionType):
            return self._function(value)
        if isinstance(value, types.CodeType):
            return self._code(value)
        if isinstance(value, types.CellType):
            try:
                return self.of(value.cell_contents)
            except ValueError:  # empty so far
                return _hash("cell")
        if isinstance(value, types.MethodType):
            return _hash("method", self.of(value.__func__), self.of(value.__self__))
        if isinstance(value, functools.partial):
            return _hash("partial", *map(self.of, (value.func, value.args, value.keywords)))
        if isinstance(value, staticmethod | classmethod):
            return _hash(type(value).__name__, self.of(value.__func__))
        if isinstance(value, property):
            return _hash("property", *map(self.of, (value.fget, value.fset, value.fdel)))
        if isinstance(value, types.BuiltinFunctionType):
            return _hash("builtin", _name(value), self.of(value.__self__))
        return None

    def _function(self, function: types.FunctionType) -> str:
        if _is_library(function.__code__.co_filename):
            # A decorator of a library encloses what it decorates.
            return _hash("function", _name(function), self.of(function.__closure__))
        own = (function.__code__, function.__defaults__, function.__kwdefaults__)
        parts = [self.of(part) for part in (*own, function.__closure__ if self._outer else None)]
        for name in sorted(_names(function.__code__) & function.__globals__.keys()):
            held = function.__globals__[name]
            if isinstance(held, type | types.FunctionType):
                parts += [name, self._note(held)]
            elif self._outer:
                parts += [name, self.of(held)]
        return _hash("code", *parts)

    def _code(self, code: types.CodeType) -> str:
        counts = (code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, code.co_flags)
        names = (code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars)
        # Neither file nor lines: code may move.
        return _hash(code.co_code, *map(self.of, (code.co_consts, names, counts)))

    def _note(self, named: Any) -> str:  # noqa: ANN401 - a class or a function
        """Note code to be described in the end, unless it is a library's class; return its place and name."""
        if isinstance(named, type) and _is_of_library(named):
            return class_name(named)
        place = self._places.setdefault(id(named), len(self._named))
        if place == len(self._named):
            self._named.append(named)
        return f"{place} {class_name(named)}" if isinstance(named, type) else str(place)

    def _class(self, cls: type) -> str:
        bases = [self._note(base) for base in cls.__bases__]
        own = {key: held for key, held in vars(cls).items() if key not in GENERATED and not key.startswith("__annot")}
        if not self._outer:
            own = {key: held for key, held in own.items() if callable(held) or isinstance(held, DESCRIBING)}
        return _hash("class", *bases, *(part for key in sorted(own) for part in (key, self.of(own[key]))))


def _slots(cls: type) -> tuple[str, ...]:
    found = vars(cls).get("__slots__", ())
    names = (found,) if isinstance(found, str) else tuple(found)
    mangled = (f"_{cls.__name__.lstrip('_')}{name}" if name.startswith("__") else name for name in names)
    return tuple(name for name in mangled if name not in ("__dict__", "__weakref__"))


def _as_copied(value: Any) -> list[Any]:  # noqa: ANN401
    """What Python copies an object from; nothing where it cannot be copied."""
    try:
        reduced = value.__reduce_ex__(4)
    except TypeError:
        return []
    # The fourth and the fifth part yield what a container holds.
    return [list(part) if place in (3, 4) and part is not None else part for place, part in enumerate(reduced)]


def _tensor(tensor: Tensor) -> str:
    """A tensor's kind, shape and bytes; the bytes alone are missing where there are none on this process."""
    kind = (class_name(type(tensor)), str(tensor.dtype), str(tensor.requires_grad))
    if is_lazy(tensor):
        return _hash(*kind, "lazy")
    shape = str(tuple(tensor.shape))
    if isinstance(tensor, DTensor) or tensor.is_meta:
        return _hash(*kind, shape)
    held = tensor.detach().cpu()
    if held.layout != torch.strided:
        held = held.to_sparse_coo().coalesce()
        return _hash(*kind, shape, str(tensor.layout), _tensor(held.indices()), _tensor(held.values()))
    held = held.dequantize() if held.is_quantized else held.resolve_conj().resolve_neg()
    return _hash(*kind, shape, held.contiguous().flatten().view(torch.uint8).numpy().tobytes())


def _names(code: types.CodeType) -> set[str]:
    """The names that code, and code inside of it, looks up."""
    inside = (constant for constant in code.co_consts if isinstance(constant, types.CodeType))
    return set(code.co_names).union(*map(_names, inside))


def _name(function: Callable[..., Any]) -> str:
    return f"{getattr(function, '__module__', None)}.{function.__qualname__}"


@functools.cache
def _is_library(file: str) -> bool:
    path = Path(file)
    if {"site-packages", "dist-packages"} & set(path.parts) or file.startswith("<frozen"):
        return True
    return any(path.is_relative_to(folder) for folder in (*LIBRARIES, PACKAGE))


def _is_of_library(cls: type) -> bool:
    """Whether a class comes from Python or from an installed library."""
    if cls.__module__.partition(".")[0] in sys.stdlib_module_names - {"__main__"}:
        return True
    file = getattr(sys.modules.get(cls.__module__), "__file__", None)
    return file is not None and _is_library(file)
