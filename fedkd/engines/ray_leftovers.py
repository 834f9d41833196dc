"""Each Ray that fedkd starts has a temporary folder of its own, and nothing of it stays behind.

The folders of a user lie side by side. The process that started Ray holds a lock on a file in its folder,
which the system releases when the process ends, however it ends: a folder whose lock is free belongs to
nobody, and what is left of its Ray is ended and removed.
"""

from __future__ import annotations

import os
import shutil
import signal
import stat
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import mkdtemp
from typing import BinaryIO

from fedkd.errors import FedkdError

VARIABLE = "FEDKD_RAY_FOLDER"
"""Names the folder in the environment of Ray's processes."""

END_TIMEOUT = 10.0
"""Seconds that processes may take to be gone once they are killed."""

_LONGEST_SOCKET = 103
"""Bytes that the path of a socket may have on all systems."""

_BELOW = len("/12345678/session_2026-12-31_23-59-59_123456_4194304/sockets/plasma_store")
_LOCK = "driver.lock"
_POLL_S = 0.05


@contextmanager
def own_folder() -> Iterator[Path]:
    """Yield a new folder for Ray; afterwards end its processes that are still there, and remove it.

    Folders of processes that are gone are removed first.

    Raises:
        FedkdError: the place for such folders belongs to somebody else.
        OSError: it cannot be made.
    """
    place = ray_place()
    place.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not _is_ours(place):
        raise FedkdError(
            f"{place} must be a folder of yours that nobody else can write to: remove it, or set "
            "RAY_TMPDIR to another place"
        )
    remove_leftovers()
    with _locked(place / ".lock", wait=True):  # nobody looks between the folder and its lock
        folder = Path(mkdtemp(prefix="", dir=place))
        file = (folder / _LOCK).open("ab")
        _lock(file, wait=False)
    try:
        yield folder
    finally:
        _clear(folder)
        file.close()


def remove_leftovers() -> None:
    """End and remove what is left of Rays whose process is gone; cheap if there are none."""
    place = ray_place()
    if not _is_ours(place):
        return
    with suppress(OSError), _locked(place / ".lock", wait=False) as alone:
        for folder in place.iterdir() if alone else ():
            if folder.is_dir() and _is_abandoned(folder):
                _clear(folder)


def ray_place() -> Path:
    """Return the folder of this user's folders: below that of Ray, or /tmp if that is too long."""
    variables = ("RAY_TMPDIR", "TMPDIR") if sys.platform == "linux" else ("RAY_TMPDIR",)
    found = [os.environ[name] for name in variables if os.environ.get(name)]
    name = f"fedkd-ray-{os.getuid()}" if hasattr(os, "getuid") else "fedkd-ray"
    for above in found:
        place = Path(above).absolute() / name
        if len(os.fsencode(place)) + _BELOW <= _LONGEST_SOCKET:
            return place
    return Path("/tmp").absolute() / name


def processes_of(folder: Path) -> list[int]:
    """Return the ids of this user's processes of Ray that belong to a folder.

    Their environment names it, and their command line shows Ray. Only Linux tells: elsewhere there are
    none, and Ray's processes end when they miss each other.
    """
    return [
        int(entry.name)
        for entry in Path("/proc").glob("[0-9]*")
        if int(entry.name) != os.getpid() and _belongs(entry, os.fsencode(folder))
    ]


def _belongs(process: Path, folder: bytes) -> bool:
    try:
        command = (process / "cmdline").read_bytes()
        if process.stat().st_uid != os.getuid() or not command:  # it has none when it is dead
            return False
        is_ray = command.startswith(b"ray::") or folder in command
        variable = VARIABLE.encode() + b"=" + folder
        return is_ray and variable in (process / "environ").read_bytes().split(b"\0")
    except OSError:
        return False


def _clear(folder: Path) -> None:
    """End the processes of a folder, and remove it; what resists is left to the next look."""
    end = time.monotonic() + END_TIMEOUT
    while (found := processes_of(folder)) and time.monotonic() < end:
        for process in found:
            with suppress(OSError):
                os.kill(process, signal.SIGKILL)
        time.sleep(_POLL_S)
    shutil.rmtree(folder, ignore_errors=True)


def _is_abandoned(folder: Path) -> bool:
    """Whether no process holds the lock of a folder; not where the system has no locks."""
    try:
        with (folder / _LOCK).open("rb") as file:
            return _lock(file, wait=False)
    except FileNotFoundError:
        return True  # its removal was cut off
    except OSError:
        return False


def _is_ours(place: Path) -> bool:
    """Whether this is a folder that only this user can change."""
    try:
        found = place.lstat()
    except OSError:
        return False
    if not hasattr(os, "getuid"):
        return stat.S_ISDIR(found.st_mode)
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o022


@contextmanager
def _locked(path: Path, *, wait: bool) -> Iterator[bool]:
    """Yield whether the lock of a file is held in the block."""
    with path.open("ab") as file:
        yield _lock(file, wait=wait)


def _lock(file: BinaryIO, *, wait: bool) -> bool:
    """Return whether this process now holds the lock of a file, until the file is closed."""
    try:
        import fcntl
    except ImportError:  # Windows
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        return False
    return True
