"""Files of a run folder: written atomically, read with errors that name the file."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from fedkd.errors import FedkdError

Row = dict[str, Any]
"""One round's record; `docs/records.md` is the glossary of its fields."""


@cache  # reading it takes milliseconds, and a run asks for six
def package_version(name: str) -> str:
    """Return an installed package's version, or ``"not installed"``: fedkd itself in a bare checkout."""
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def replace_file(path: Path, content: bytes) -> None:
    """Write `content` to `path` so that a reader sees the old file or the new one, never half.

    Raises:
        FedkdError: the file cannot be written.
    """
    temporary = path.with_name(f".{path.name}.part")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        flush_folder(path.parent)
    except OSError as error:
        raise FedkdError(f"{path} cannot be written: {error.strerror}") from error


def flush_folder(path: Path) -> None:
    """Force a folder's entries to disk where the system can: renaming writes the folder as well."""
    with suppress(PermissionError, IsADirectoryError):  # Windows cannot open folders
        folder = os.open(path, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def make_folder(path: Path) -> None:
    """Make a folder, and those above it that are missing, and force the new entries to disk."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in reversed(missing):
        flush_folder(folder.parent)


def write_json(path: Path, value: object) -> None:
    """Write `value` as JSON, atomically; NaN and infinity raise `ValueError`, as JSON has neither."""
    replace_file(path, (json.dumps(value, indent=2, allow_nan=False) + "\n").encode())


@contextmanager
def _reading(path: Path, what: str) -> Iterator[None]:
    """Raise an error that names a file of a run folder that cannot be read in the block."""
    try:
        yield
    except OSError:
        raise FedkdError(f"{path.parent} holds no {what}: {path.name} is missing") from None
    except ValueError as error:
        raise FedkdError(f"{path.parent}: {path.name} is not valid JSON ({error})") from None


def read_json(path: Path, what: str = "finished run") -> dict[str, Any]:
    """Return the object in a file of a run folder.

    Args:
        path: the file.
        what: what a folder with such a file holds.

    Raises:
        FedkdError: the file is missing or damaged.
    """
    with _reading(path, what):
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError("it is no object")
        return found


def read_lines(path: Path) -> list[Row]:
    """Return the objects in a file of a run folder, one per line.

    Raises:
        FedkdError: the file is missing or damaged.
    """
    with _reading(path, "finished run"):
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def read_shards(folder: Path | None) -> dict[str, Any] | None:
    """Return how many images of each class each client holds, or `None` where a run has no record."""
    path = None if folder is None else folder / "shards.json"
    return read_json(path) if path is not None and path.is_file() else None
