"""Import a user's code by module or file, locate its errors by file and line, fingerprint it."""

from __future__ import annotations

import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from hashlib import blake2b
from importlib import import_module
from importlib.machinery import SourceFileLoader
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any, cast

from fedkd.errors import FedkdError, Setting, nearest, one_line
from fedkd.keys import is_file

_changed: dict[str, int] = {}
"""By path of an imported file, when it had last been changed, in ns."""


def find_function(
    import_path: str, key: str, allowed: Sequence[str] | None = None
) -> Callable[..., Any]:
    """Return the function that `import_path` (``module:function`` or ``file.py:function``) names.

    Args:
        import_path: a module is also looked for in the working directory, which a console script
            does not search by itself.
        key: the key of which it is the value, such as ``"dataset"`` or ``"model"``.
        allowed: the modules in which, or in submodules of which, it has to be defined (``None``: any). A
            node of a deployment has such a list: the reference is a server's.

    Raises:
        FedkdError: the module or file does not import, has no such function, or is not allowed.
    """
    where, _, function_name = import_path.rpartition(":")
    if not is_name(function_name):
        raise FedkdError(
            Setting(key, import_path),
            f": '{function_name}' is not a plain name: write module:function, with a function at the "
            "top of the module",
        )
    if allowed is not None and not is_within(where, allowed):
        raise FedkdError(Setting(key, import_path), f": must be {_one_of(allowed)}")
    module = load_file(Path(where), key) if is_file(where) else _module(where, import_path, key)
    function = getattr(module, function_name, None)
    if not callable(function):
        raise FedkdError(
            Setting(key, import_path),
            f": '{where}' has no function '{function_name}'{nearest(function_name, vars(module))}",
        )
    if allowed is not None:
        try:
            check_defined_within(function, allowed)
        except FedkdError as error:
            raise FedkdError(Setting(key, import_path), f": {error}") from None
    return cast(Callable[..., Any], function)


def _module(where: str, import_path: str, key: str) -> ModuleType:
    try:
        return import_user_module(where)
    except Exception as error:  # importing runs the user's code, which may raise anything
        raise FedkdError(
            Setting(key, import_path),
            f": cannot import '{where}' ({error_with_location(error)})",
        ) from error


def load_file(path: Path, key: str) -> ModuleType:
    """Return a file imported as the module of its name; import it again if it has changed since.

    Its folder is searched for modules from then on, by worker processes too: clients import from the
    file what it defines, such as loss terms.

    Args:
        path: of the file.
        key: the key that names it.

    Raises:
        FedkdError: there is no such file, or it does not import.
    """
    if not path.exists():
        raise FedkdError(Setting(key, path), ": there is no such file")
    name, changed = _module_name(path), path.stat().st_mtime_ns
    where = str(path.resolve())
    if name in sys.modules and _changed.setdefault(where, changed) == changed:
        return sys.modules[name]
    add_import_path(path.resolve().parent)
    loader = _AsItStands(name, where)
    spec = spec_from_file_location(name, where, loader=loader)
    assert spec is not None
    module = module_from_spec(spec)
    sys.modules[name] = module
    try:
        loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise FedkdError(
            Setting(key, path), f": the file does not import: {error_with_location(error)}"
        ) from error
    _changed[where] = changed
    return module


class _AsItStands(SourceFileLoader):
    """Compiles the file: what is cached passes for it if size and second of change are the same."""

    def get_code(self, fullname: str) -> CodeType:
        """Return the module's code."""
        return self.source_to_code(self.get_data(self.path), self.path)


def _module_name(path: Path) -> str:
    """Return the file's own name, or a generated one if that is the name of another module."""
    generated = GENERATED_PREFIX + blake2b(str(path.resolve()).encode(), digest_size=8).hexdigest()
    if "." in path.stem:
        return generated
    try:
        spec = find_spec(path.stem)
    except ValueError:  # a module without a spec, such as __main__
        return generated
    its_own = spec is None or (spec.origin and Path(spec.origin).resolve() == path.resolve())
    return path.stem if its_own else generated


def is_name(text: str) -> bool:
    """Whether a text is one plain name: without dots, and none of those that Python itself defines."""
    return text.isidentifier() and not text.startswith("__")


def is_within(module: str, allowed: Sequence[str]) -> bool:
    """Whether `module` is one of the `allowed` modules, or a submodule of one."""
    below = [module.removeprefix(f"{name}.") for name in allowed if module.startswith(f"{name}.")]
    return module in allowed or any(all(map(is_name, rest.split("."))) for rest in below)


def check_defined_within(code: object, allowed: Sequence[str]) -> None:
    """Refuse a function or class that the `allowed` modules have only imported from elsewhere.

    Raises:
        FedkdError: it names the module in which `code` is defined.
    """
    home = getattr(code, "__module__", None)
    if not isinstance(home, str) or not is_within(home, allowed):
        raise FedkdError(
            f"is defined in {one_line(str(home))}: must be a function or class of {_one_of(allowed)}"
        )


def _one_of(allowed: Sequence[str]) -> str:
    """Return allowed modules in words."""
    return f"{', '.join(allowed) or 'no module'} or a submodule"


def import_user_module(name: str) -> ModuleType:
    """Return an imported module, which is also looked for in the working directory.

    Raises:
        Exception: whatever the module raises while it is imported.
    """
    add_import_path(Path.cwd())
    return import_module(name)


def add_import_path(folder: Path) -> None:
    """Search a folder for modules, after all other places: it hides none.

    Worker processes search where this process does.
    """
    if str(folder) not in sys.path:
        sys.path.append(str(folder))


GENERATED_PREFIX = "user_file_"
"""Begins the name of a module that is read from a file with the same name as another module."""


def is_importable(module: str) -> bool:
    """Whether other processes can import a module that this one has, going by its name."""
    return module != "__main__" and not module.startswith(GENERATED_PREFIX)


LONGEST = 200
"""Most characters of an exception with its location, and of the reason of a client's failure."""

_NOT_THE_USERS = (str(Path(__file__).parent), sysconfig.get_paths()["stdlib"])
_LIBRARIES = ("flwr", "numpy", "pydantic", "ray", "torch", "torchvision")


def user_location(error: BaseException) -> str:
    """Return where in a user's code an exception came from, as `` (file.py, line 12)``.

    It is that of the innermost frame that is neither in fedkd nor in an installed package; otherwise of
    the innermost in a package that fedkd does not use, such as installed strategies; otherwise empty.
    """
    local, installed = "", ""
    for frame in traceback.extract_tb(error.__traceback__):
        path = Path(frame.filename)
        is_installed = "site-packages" in path.parts
        if frame.filename.startswith("<"):
            continue
        if frame.filename.startswith(_NOT_THE_USERS) and not is_installed:
            continue
        location = f" ({path.name}, line {frame.lineno})"
        if not is_installed:
            local = location
        elif path.parts[path.parts.index("site-packages") + 1] not in (*_LIBRARIES, "fedkd"):
            installed = location
    return local or installed


def error_with_location(error: BaseException) -> str:
    """Return an exception in one line, with the user's file and line if it came from the user's code.

    It has at most `LONGEST` characters: a longer text is cut before the location.
    """
    location = user_location(error)
    return one_line(error, LONGEST - len(location)) + location


@contextmanager
def attributed(where: str) -> Iterator[None]:
    """Raise any exception of the block with the user's function and line that it came from.

    Args:
        where: the user's function.

    Raises:
        FedkdError: in one line; a `FedkdError` of the block keeps its text.
    """
    try:
        yield
    except FedkdError as error:
        raise FedkdError(f"{where}: {error}{user_location(error)}") from error
    except Exception as error:
        raise FedkdError(f"{where}: {error_with_location(error)}") from error


def fingerprint(modules: Iterable[str]) -> str:
    """Return a hash of the Python sources of fedkd, strategies and `modules`.

    Clients and server must run the same code. Under ``flwr run`` the server app comes from Flower's
    archive while Ray workers import from a working directory, so that the two can differ unnoticed. A
    script that is run, and a file with another module's name, are left out: only this process knows them.
    """
    known = [module for module in modules if is_importable(module)]
    origins = [_origin(module) for module in ("fedkd", "strategies", *known)]
    # A user's file may change and be read again while a notebook runs.
    return _hash(tuple((path, path.stat().st_mtime_ns) for path in origins if path is not None))


@lru_cache(maxsize=8)
def _hash(origins: tuple[tuple[Path, int], ...]) -> str:
    hasher = blake2b(digest_size=8)
    for origin, _ in origins:
        for path in _files(origin):
            hasher.update(path.name.encode() + b"\0" + path.read_bytes())
    return hasher.hexdigest()


def _origin(module: str) -> Path | None:
    try:
        spec = find_spec(module)
    except ModuleNotFoundError:  # the package of a dotted name
        return None
    return Path(spec.origin) if spec is not None and spec.has_location and spec.origin else None


def _files(origin: Path) -> list[Path]:
    return sorted(origin.parent.rglob("*.py")) if origin.name == "__init__.py" else [origin]
