"""Files of a run folder: written atomically, read with errors that name the file."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from stat import S_ISREG
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open

from fedkd.errors import FedkdError, one_line, printable
from fedkd.records.shapes import CentralResult, Result, Shape, misfit

if TYPE_CHECKING:
    from torch import Tensor

RESULT = "result.json"
"""The file that completes a run."""

MOST_BYTES = 1 << 30
"""Largest file of text that is read: a thousand rounds of a thousand clients take a tenth of it."""

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


def read_json(path: Path, shape: type[Shape], what: str = "finished run") -> dict[str, Any]:
    """Return the object in a file of a run folder.

    Args:
        path: the file.
        shape: what it must hold.
        what: what a folder with such a file holds.

    Raises:
        FedkdError: the file is missing or damaged, or does not hold that.
    """
    where = f"{path.parent}: {path.name}"
    return checked(_value(read_bytes(path, what), where), shape, where)


def read_result(folder: Path) -> dict[str, Any]:
    """Return the content of ``result.json``: with ``seeds`` of a central baseline, else of a federation.

    Raises:
        FedkdError: the run is not finished, or the file is damaged.
    """
    where = f"{folder}: {RESULT}"
    value = _value(read_bytes(folder / RESULT, "finished run"), where)
    keys = value.keys() if isinstance(value, dict) else {"seeds"}
    if not keys & {"seeds", "client_accuracy"}:
        raise FedkdError(f"{where} is of neither a federated nor a central run")
    is_central = "seeds" in keys
    return checked(value, CentralResult if is_central else Result, where)


def read_lines(path: Path, shape: type[Shape], *, skip_cut: bool = False) -> list[Row]:
    """Return the objects in a file of a run folder, one per line.

    Args:
        path: the file.
        shape: what each line must hold.
        skip_cut: whether to leave out lines that are no JSON, as an interrupted process leaves them.

    Raises:
        FedkdError: the file is missing or damaged, or a line does not hold that.
    """
    return [row for _, row in rows_in(path, shape, skip_cut=skip_cut)]


def rows_in(path: Path, shape: type[Shape], *, skip_cut: bool) -> Iterator[tuple[bytes, Row]]:
    """Yield each line of a file with its object; see `read_lines`."""
    for number, line in enumerate(read_bytes(path, "finished run").splitlines(), 1):
        where = f"{path.parent}: {path.name}, line {number}"
        try:
            value = _value(line, where)
        except FedkdError:
            if skip_cut:
                continue
            raise
        yield line, checked(value, shape, where)


def read_bytes(path: Path, what: str) -> bytes:
    """Return the content of a file of a run folder; `what` is what a folder with such a file holds.

    Raises:
        FedkdError: the file is missing or cannot be read.
    """
    try:
        reason = _why_not_read(path.stat())
        if not reason:
            return path.read_bytes()
    except FileNotFoundError:
        raise FedkdError(f"{path.parent} holds no {what}: {path.name} is missing") from None
    except OSError as error:
        reason = str(error.strerror)
    except ValueError as error:  # a name that no file can have
        reason = str(error)
    raise FedkdError(f"{path} cannot be read: {reason}")


def read_safetensors(path: Path, prefix: str = "") -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors of a file whose names begin with `prefix`, and the file's metadata.

    Raises:
        FedkdError: the file cannot be read.
    """
    try:
        if not path.is_file():  # a pipe would block
            raise FedkdError(f"{path} is not a file")
        with safe_open(path, "pt") as file:
            names = [name for name in file.keys() if name.startswith(prefix)]  # noqa: SIM118
            return {name: file.get_tensor(name) for name in names}, file.metadata() or {}
    except (OSError, SafetensorError, MemoryError) as error:
        raise FedkdError(f"{path} cannot be read: {one_line(str(error))}") from None


def _why_not_read(file: os.stat_result) -> str:
    """Return why a file is not read, or an empty text: a pipe would block, and a device never ends."""
    if not S_ISREG(file.st_mode):
        return "is not a file"
    return f"has more than {MOST_BYTES:,} bytes" if file.st_size > MOST_BYTES else ""


def _value(content: bytes, where: str) -> Any:
    """Return what JSON says, its texts made `printable`."""
    try:
        value = _JSON.validate_json(content)
    except ValidationError as error:
        reason = error.errors()[0]["ctx"]["error"]
        raise FedkdError(f"{where} is not valid JSON ({reason})") from None
    return _printable(value) if _MARKS.search(content) else value


def _printable(value: Any) -> Any:
    match value:
        case str():
            return printable(value)
        case list():
            return [_printable(each) for each in value]
        case dict():
            return {printable(key): _printable(each) for key, each in value.items()}
    return value


_MARKS = re.compile(rb"\\u|[\x7f-\xff]")
"""What a text of JSON contains if there is anything in it besides plain ASCII."""


def checked(value: Any, shape: type[Shape], where: str) -> dict[str, Any]:
    """Return a value, unchanged, that fits a shape.

    Raises:
        FedkdError: it does not; the text begins with `where`.
    """
    try:
        shape.model_validate(value)
    except ValidationError as error:
        raise FedkdError(f"{where}: {misfit(error)}") from None
    return value  # type: ignore[no-any-return]


_JSON: TypeAdapter[Any] = TypeAdapter(Any)
"""Unlike the standard library's, its parser refuses what is nested too deep, and halves of letters."""
