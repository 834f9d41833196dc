"""Fingerprint a user's functions and classes as they are in memory, with all own code that they use.

Files do not decide what runs: a notebook has none, and one that was edited after its import is not what
runs. So the byte code of a function counts, with its defaults, what it closes over, and the values of the
global names it refers to. Line numbers, comments and docstrings do not.
"""

from __future__ import annotations

import dis
import enum
import functools
import sys
import sysconfig
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import suppress
from dataclasses import is_dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import torch

_OURS = ("fedkd", "strategies")
_INSTALLED = tuple(
    str(Path(sysconfig.get_paths()[name]).resolve()) for name in ("stdlib", "purelib", "platlib")
)
_CONSTANTS = (
    *(bool, int, float, complex, str, bytes, type(None), type(Ellipsis), range, slice, Path),
    *(torch.dtype, torch.device, torch.Size, enum.Enum),
)


def code_fingerprints(used: Iterable[object]) -> dict[str, str]:
    """Return a fingerprint of each of the user's functions and classes that are used or referred to.

    Fedkd, its strategies, Python's standard library and installed packages are left out, except for the
    package of something in `used` itself, such as an installed strategy.

    Args:
        used: functions, classes, and objects of the user's classes.

    Returns:
        By ``module:name``, 16 hexadecimal digits; also for global names that are bound to values. They
        depend on the minor version of Python. A global name to which one of the functions assigns is a
        memory and not code: it is left out, and so is the content of a container unless it consists of
        constants, functions and classes.
    """
    used = list(used)
    reader = _Reader({_package(each) for each in used} - {""})
    for each in used:
        reader.value(each)
    return dict(sorted(reader.found().items()))


def _package(value: object) -> str:
    """Return the top package of a function, a class or an object of one, unless it is ours."""
    kind = value if isinstance(value, type | types.FunctionType) else type(value)
    package = str(getattr(kind, "__module__", "") or "").partition(".")[0]
    return "" if package in _OURS or package in sys.stdlib_module_names else package


def _hash(*parts: str | bytes) -> str:
    hasher = blake2b(digest_size=8)
    for part in parts:
        data = part.encode(errors="surrogatepass") if isinstance(part, str) else part
        hasher.update(str(len(data)).encode() + b":" + data)
    return hasher.hexdigest()


class _Reader:
    """Reads functions and classes, each once, and what they refer to."""

    def __init__(self, packages: set[str]) -> None:
        self._packages = packages
        self._parts: dict[str, list[str]] = {}
        self._texts: dict[int, str] = {}
        self._kept: list[object] = []  # so that no id comes twice
        self._assigned: set[str] = set()

    def found(self) -> dict[str, str]:
        """Return the fingerprints of all that was read."""
        parts = {name: parts for name, parts in self._parts.items() if name not in self._assigned}
        return {name: _hash(*sorted(set(texts))) for name, texts in parts.items()}

    def value(self, value: object, names: AbstractSet[str] = frozenset()) -> str:
        """Return a value as text, and read the functions and classes in it.

        Args:
            value: anything.
            names: which attributes are looked at, if it is one of the user's modules.
        """
        if isinstance(value, _CONSTANTS):
            return f"{type(value).__name__} {value!r}"
        if isinstance(value, types.ModuleType):
            return self._module(value, names)
        if (inner := _inner(value)) is not None:
            return " ".join([type(value).__name__, *(self.value(each, names) for each in inner)])
        if isinstance(value, Mapping | Sequence | AbstractSet):
            return self._container(value, names)
        if isinstance(value, torch.Tensor):
            return f"tensor {_tensor(value)}"
        if type(value) is np.ndarray and value.dtype.kind in "biufc":
            return f"array {_hash(f'{value.dtype} {value.shape}', value.tobytes())}"
        return self._once(value)

    def _once(self, value: object) -> str:
        """Return a function, a class or an object as text; within itself it is its name alone."""
        if id(value) not in self._texts:
            self._kept.append(value)
            cls = value if isinstance(value, type | types.FunctionType) else type(value)
            name = f"{cls.__module__}:{cls.__qualname__}"
            self._texts[id(value)] = name
            if isinstance(value, types.FunctionType):
                self._read_function(value, name)
            elif isinstance(value, type):
                self._read_class(value, name)
            else:
                self._texts[id(value)] = f"{name} {self._attributes(value)}"
        return self._texts[id(value)]

    def _is_users(self, module: str | None) -> bool:
        """Whether a module is the user's own."""
        package = str(module).partition(".")[0]
        if package in self._packages or package == "__main__":
            return True
        if package in _OURS or package in sys.stdlib_module_names:
            return False
        files = (
            getattr(sys.modules.get(name), "__file__", None) for name in (str(module), package)
        )
        return not any(file and str(Path(file).resolve()).startswith(_INSTALLED) for file in files)

    def _module(self, module: types.ModuleType, names: AbstractSet[str]) -> str:
        """Return what the attributes of a user's module are to which a function may refer."""
        name = module.__name__
        if not self._is_users(name):
            return name
        attributes = sorted(names & set(vars(module)))
        return f"{name}({', '.join(self._global(vars(module), n, names) for n in attributes)})"

    def _global(self, namespace: Mapping[str, Any], name: str, names: AbstractSet[str]) -> str:
        """Return what a global name is bound to; a value that is no code becomes a part by itself."""
        value, module = namespace[name], namespace.get("__name__")
        if isinstance(value, types.ModuleType):
            inner = names - {name}  # a module may be an attribute of what it imports
            return f"{name} = {self._module(value, inner)}"
        if isinstance(value, type | types.FunctionType):
            return f"{name} = {self._once(value)}"
        part = f"{module}:{name}"
        if part not in self._parts and self._is_users(module):
            self._parts[part] = []  # it may refer to itself
            self._parts[part].append(self.value(value, names))
        return f"{name} = {part}"

    def _read_function(self, function: types.FunctionType, name: str) -> None:
        module = function.__module__
        if not self._is_users(module):
            return
        parts = self._parts.setdefault(name, [])
        codes = list(_codes(function.__code__))
        names = {name for code in codes for name in code.co_names}
        mentioned = names.union(*map(_texts, codes))
        parts.append(_hash(*(_code_text(code, function.__doc__) for code in codes)))
        parts.append(f"defaults {self.value(function.__defaults__ or ())}")
        parts.append(f"defaults {self.value(function.__kwdefaults__ or {})}")
        parts += (f"free {n} {self.value(v, mentioned)}" for n, v in _closure(function))
        self._assigned |= {f"{module}:{each}" for code in codes for each in _assigned(code)}
        for each in sorted(names):
            if each in function.__globals__:
                if not each.startswith("__"):
                    parts.append(self._global(function.__globals__, each, mentioned))
            elif isinstance(imported := sys.modules.get(each), types.ModuleType):
                parts.append(self._module(imported, mentioned))

    def _read_class(self, cls: type, name: str) -> None:
        if not self._is_users(cls.__module__):
            return
        parts = self._parts.setdefault(name, [])
        parts.append("bases " + " ".join(self.value(base) for base in cls.__mro__[1:]))
        for member, value in sorted(vars(cls).items()):
            if member not in _OF_EVERY_CLASS:
                parts.append(f"{member} {self.value(value)}")

    def _container(
        self, value: Mapping[Any, Any] | Sequence[Any] | AbstractSet[Any], names: AbstractSet[str]
    ) -> str:
        """Return a container of constants, functions and classes in full, any other as its type."""
        items: list[object] = [*value.items()] if isinstance(value, Mapping) else [*value]
        texts = [self.value(item, names) for item in items] if all(map(_is_plain, items)) else []
        ordered = sorted(texts) if isinstance(value, AbstractSet) else texts
        return f"{type(value).__name__}({', '.join(ordered)})"

    def _attributes(self, value: object) -> str:
        """Return an object's attributes, and read its class."""
        cls = type(value)
        self._once(cls)
        if isinstance(value, torch.nn.Module):
            state = [f"{n} {_tensor(t)}" for n, t in sorted(value.state_dict().items())]
            return f"{value!r} {_hash(*state)}"
        if not self._is_users(cls.__module__) and not is_dataclass(cls):
            return ""
        attributes = sorted(getattr(value, "__dict__", {}).items())
        return " ".join(f"{name}={self.value(each)}" for name, each in attributes)


def _closure(function: types.FunctionType) -> Iterator[tuple[str, object]]:
    """Yield what a function closes over, by name."""
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        with suppress(ValueError):  # not assigned yet
            if name != "__class__":
                yield name, cell.cell_contents


_OF_EVERY_CLASS = (
    *("__module__", "__qualname__", "__doc__", "__dict__", "__weakref__", "__firstlineno__"),
    *("__static_attributes__", "__abstractmethods__", "_abc_impl", "__match_args__"),
    *("__annotations__", "__annotations_cache__", "__annotate_func__", "__parameters__"),
    *("__dataclass_params__", "__dataclass_fields__", "__orig_bases__"),
)


def _inner(value: object) -> list[object] | None:
    """Return what a wrapper of functions holds; `None` for anything else."""
    if isinstance(value, functools.partial):
        return [value.func, value.args, value.keywords]
    if isinstance(value, staticmethod | classmethod | types.MethodType):
        return [value.__func__]
    if isinstance(value, property):
        return [value.fget, value.fset, value.fdel]
    if isinstance(value, functools.cached_property):
        return [value.func]
    if hasattr(value, "__wrapped__") and not isinstance(value, types.FunctionType | type):
        return [value.__wrapped__]
    return None


def _is_plain(value: object) -> bool:
    """Whether a value consists of constants, functions and classes."""
    if isinstance(value, Mapping):
        return all(map(_is_plain, value.items()))
    if isinstance(value, tuple | list | set | frozenset):
        return all(map(_is_plain, value))
    return isinstance(value, (*_CONSTANTS, type, types.FunctionType)) or _inner(value) is not None


def _tensor(value: torch.Tensor) -> str:
    data = value.detach().cpu().contiguous().reshape(-1)
    return _hash(f"{value.dtype} {list(value.shape)}", data.view(torch.uint8).numpy().tobytes())


# --- Byte code ------------------------------------------------------------------------------------


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    """Yield the code of a function and of all that are defined in it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _codes(constant)


def _code_text(code: types.CodeType, doc: str | None) -> bytes:
    """Return what a function does, without its docstring and the places of its lines."""
    constants = [
        "code" if isinstance(each, types.CodeType) else f"{type(each).__name__} {_constant(each)}"
        for each in (None if doc is not None and each == doc else each for each in code.co_consts)
    ]
    shape = (code.co_argcount, code.co_kwonlyargcount, code.co_posonlyargcount, code.co_flags)
    names = (code.co_names, code.co_freevars, code.co_cellvars, constants, shape)
    # Under a debugger or coverage code is instrumented; `co_code` is without that.
    return repr(names).encode(errors="surrogatepass") + code.co_code + code.co_exceptiontable


def _constant(value: object) -> str:
    """Return a constant in an order that does not change from process to process."""
    return f"{sorted(map(repr, value))}" if isinstance(value, frozenset) else repr(value)


def _texts(code: types.CodeType) -> set[str]:
    """Return the texts in code that may name an attribute (``getattr(module, "name")``)."""
    return {each for each in code.co_consts if isinstance(each, str) and each.isidentifier()}


def _assigned(code: types.CodeType) -> Iterator[str]:
    """Yield the global names to which code assigns."""
    for step in dis.get_instructions(code):
        if step.opname == "STORE_GLOBAL":
            yield str(step.argval)
