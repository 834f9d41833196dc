"""Processes that run experiments and are killed on the way, at a write of their choice or from outside.

Run as a script it serves: it imports fedkd once, and forks a process for each line of JSON on its stdin,
which takes a twentieth of the time of a process started for each.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from paths import TOOLS


class Killers:
    """The caller's side: a server of processes that are killed."""

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(
            [sys.executable, str(TOOLS / "killing.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(30)
        self._process.stdout.close()

    def run(self, folder: Path, **what: Any) -> dict[str, Any]:
        """Run, or go on with, an experiment in a process of its own, and say how that ended.

        Args:
            folder: the process's working directory.
            what: ``keys`` of an experiment, or the folder to ``resume``; ``dies_at``, the number of the
                write in which it dies, and the ``part`` of that which it still does; or ``after``, the
                seconds after which it is killed; ``room``, the bytes that the disk has left.

        Returns:
            ``signal`` that ended it or 0, ``said``: the error, ``writes``: how many there were, and
            ``bytes``.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({"folder": str(folder), **what}) + "\n")
        self._process.stdin.flush()
        found: dict[str, Any] = json.loads(self._process.stdout.readline())
        return found


class Dying:
    """Counts the writes of this process, and kills it in one of them, or lets the disk be full."""

    def __init__(self, dies_at: int | None, part: float, room: int | None) -> None:
        self.writes = self.bytes = 0
        self._dies_at, self._part, self._room = dies_at, part, room

    def is_last(self) -> bool:
        self.writes += 1
        return self.writes == self._dies_at

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Die before or after a call that is done as a whole or not at all."""

        def called(*given: Any, **named: Any) -> Any:
            last = self.is_last()
            if last and self._part < 0.5:
                die()
            found = function(*given, **named)
            if last:
                die()
            return found

        return called

    def begun(self, write: Callable[[Any], int], content: Any) -> int:
        """Write, or die when a part of it is written."""
        if self.is_last():
            view = memoryview(content)
            write(view[: int(self._part * len(view))])
            die()
        self.bytes += len(content)
        if self._room is not None and self.bytes > self._room:
            write(memoryview(content)[: max(0, len(content) + self._room - self.bytes)])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(content)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _prepare(dying: Dying) -> None:
    """Have every write of a run counted: to files of states, to records, the flushes and the renames."""
    from fedkd.clients import state_files

    class Counted(FileIO):
        def write(self, content: Any) -> int:
            return dying.begun(super().write, content)

    opened = Path.open

    def open_counted(path: Path, mode: str = "r", *given: Any, **named: Any) -> Any:
        file: Any = opened(path, mode, *given, **named)
        if set(mode) & set("wax") and "b" in mode:
            write = file.write

            def write_through(content: Any) -> int:
                def through(part: Any) -> int:
                    size = int(write(part))
                    file.flush()
                    return size

                return dying.begun(through, content)

            file = _Wrapped(file, write_through)
        return file

    setattr(state_files, "FileIO", Counted)  # noqa: B010 - mypy: a class
    Path.open = open_counted  # type: ignore[assignment]
    Path.replace = dying.around(Path.replace)  # type: ignore[method-assign]
    os.fsync = dying.around(os.fsync)


class _Wrapped:
    """A file of which `write` is another."""

    def __init__(self, file: Any, write: Callable[[Any], int]) -> None:
        self._file, self.write = file, write

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def _child(what: dict[str, Any], answers: int) -> None:
    from fedkd.engines.run import resume, run
    from fedkd.errors import FedkdError
    from fedkd.experiment import Experiment

    dying = Dying(what.get("dies_at"), what.get("part", 0.0), what.get("room"))
    said = ""
    os.chdir(what["folder"])
    try:
        _prepare(dying)
        if "resume" in what:
            resume(what["resume"])
        else:
            run(Experiment(**what["keys"]))
    except FedkdError as error:
        said = str(error)
    found = {"said": said, "writes": dying.writes, "bytes": dying.bytes}
    os.write(answers, json.dumps(found).encode())


def _forked(what: dict[str, Any]) -> dict[str, Any]:
    reading, writing = os.pipe()
    process = os.fork()
    if not process:
        os.close(reading)
        try:
            _child(what, writing)
        except BaseException as error:
            os.write(writing, json.dumps({"said": f"raised {error!r}", "writes": 0}).encode())
        os._exit(0)
    os.close(writing)
    if "after" in what:
        time.sleep(what["after"])
        os.kill(process, signal.SIGKILL)
    with os.fdopen(reading, "rb") as answers:
        answered = answers.read()
    _, status = os.waitpid(process, 0)
    return {"signal": os.WTERMSIG(status), **json.loads(answered or b'{"said": "", "writes": 0}')}


def _serve() -> None:
    import torch

    import fedkd  # noqa: F401 - before the first fork
    from fedkd.engines import in_process  # noqa: F401

    torch.set_num_threads(1)
    for line in sys.stdin:
        print(json.dumps(_forked(json.loads(line))), flush=True)


if __name__ == "__main__":
    _serve()
