"""Run folders: the experiment, the record of each round and the result of a run.

``runs/<name>/`` holds ``experiment.toml`` (every key, itself a valid ``--config``), ``rounds.jsonl`` (one
object per round, on disk before the next round begins) and ``result.json``. Only text and safetensors,
never pickle. Files are written under a temporary name and renamed.
"""

from __future__ import annotations

import errno
import json
import os
import platform
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from shutil import rmtree
from time import monotonic_ns
from typing import IO, Any, Self

import tomli_w

from fedkd.errors import FedkdError, Setting, printable
from fedkd.experiment import Experiment, parse_toml
from fedkd.records.files import (
    RESULT,
    Row,
    flush_folder,
    make_folder,
    package_version,
    read_bytes,
    read_json,
    read_result,
    replace_file,
    rows_in,
    write_json,
)
from fedkd.records.identity import FILE as IDENTITY
from fedkd.records.identity import Identity, changes, keys_of
from fedkd.records.shapes import IdentityRecord, KnowledgeOfRound, Round, Shape

EXPERIMENT = "experiment.toml"

_COMMENT = re.compile(r"^# ([\w-]+): (.+)$", re.MULTILINE)
_PACKAGES = ("fedkd", "torch", "torchvision", "flwr", "ray", "numpy")


def environment(device: str, threads: int) -> dict[str, Any]:
    """Return what a run depends on besides its experiment: versions, device, threads."""
    versions = {package: package_version(package) for package in _PACKAGES}
    return {"python": platform.python_version(), **versions, "device": device, "threads": threads}


@dataclass(frozen=True)
class RunFolder:
    """The folder of one run."""

    path: Path

    @classmethod
    def check(cls, experiment: Experiment) -> None:
        """Raise an error if the run folder exists already, before any work.

        Raises:
            FedkdError: the folder of a named run exists.
        """
        if experiment.name is None:
            return
        path = Path(experiment.run_dir) / experiment.name
        if not _is_free(path):
            raise FedkdError(
                Setting("name", experiment.name), f": the run folder {path} exists; {_advice(path)}"
            )

    @classmethod
    def create(
        cls,
        experiment: Experiment,
        default_name: str,
        begin: Callable[[Self, str], None] = lambda _, __: None,
    ) -> Self:
        """Return a new folder: named by the experiment, or else the next free one after `default_name`.

        Args:
            experiment: the run.
            default_name: of a run without a name.
            begin: writes the first files, given the folder and the name that it will have. It appears
                under that name with these files or not at all, whenever the process is killed.

        Raises:
            FedkdError: the folder exists already, or cannot be made.
        """
        cls.check(experiment)
        parent = Path(experiment.run_dir)
        for name in _names(experiment.name, default_name):
            path = parent / name
            if path.is_symlink() or (path.exists() and not path.is_dir()):
                raise FedkdError(Setting("run-dir", parent), f": {path} is in the way")
            if _is_free(path) and cls._appears(path, begin):
                return cls(path)
            cls.check(experiment)  # another process was faster
        raise AssertionError("names never end")

    @classmethod
    def _appears(cls, path: Path, begin: Callable[[Self, str], None]) -> bool:
        """Make a folder with its first files; return whether no other process had made it."""
        part = path.with_name(f".{path.name}.{os.getpid()}-{monotonic_ns()}.part")
        try:
            make_folder(part)
            begin(cls(part), path.name)
            part.rename(path)  # an empty folder is replaced, one with files is not
            flush_folder(path.parent)
        except OSError as error:
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
                return False
            raise FedkdError(
                Setting("run-dir", path.parent),
                f": the folder cannot be made ({error.strerror}); choose one that is writable",
            ) from error
        finally:
            rmtree(part, ignore_errors=True)
        return True

    @classmethod
    def existing(cls, path: str | Path) -> Self:
        """Return the folder of a run that has begun.

        Raises:
            FedkdError: the path is not one.
        """
        folder = Path(path)
        try:
            is_run = (folder / EXPERIMENT).is_file()
        except OSError as error:  # a name that is too long, a folder that may not be read
            raise FedkdError(f"{folder} cannot be read: {error.strerror}") from None
        if not is_run:
            raise FedkdError(f"{folder} is not a run folder: it has no {EXPERIMENT}")
        return cls(folder)

    @property
    def experiment(self) -> Experiment:
        """What was run.

        Raises:
            FedkdError: ``experiment.toml`` is damaged, or a key that changes numbers was edited since.
        """
        file = self.path / EXPERIMENT
        experiment = Experiment.load((str(file), parse_toml(file, read_bytes(file, "run"))))
        recorded = self.identity.get("keys", {})
        present = keys_of(experiment)
        same_kind = {name: present[name] for name in recorded if name in present}
        edited = changes({"keys": recorded}, {"keys": same_kind}) + self._edited_rounds(experiment)
        if edited:
            raise FedkdError(
                f"{file} was edited after the run began: {'; '.join(edited)}; "
                "restore it, or start a new run with --config and another name"
            )
        return experiment

    def _edited_rounds(self, experiment: Experiment) -> list[str]:
        """Return in words that a finished run has another number of rounds than it says, if so."""
        result = read_result(self.path) if self.is_finished else {}
        rounds = {"num-server-rounds": result.get("rounds", experiment.num_server_rounds)}
        return changes(
            {"keys": rounds}, {"keys": {"num-server-rounds": experiment.num_server_rounds}}
        )

    @property
    def identity(self) -> Identity:
        """What its numbers depend on; empty where it is not recorded.

        Raises:
            FedkdError: ``identity.json`` is damaged.
        """
        path = self.path / IDENTITY
        return read_json(path, IdentityRecord, "run") if path.exists() else {}

    @property
    def is_finished(self) -> bool:
        """Whether the run is finished."""
        return (self.path / RESULT).is_file()

    def relocated_experiment(self) -> Experiment:
        """Return what was run, with the current place of its folder, which may have been moved."""
        experiment = self.experiment
        written = Path(experiment.run_dir) / (experiment.name or "")
        if written.exists() and written.samefile(self.path):
            return experiment  # unchanged, as its text is part of messages whose bytes are counted
        path = self.path.absolute()
        return experiment.replace(run_dir=str(path.parent), name=path.name)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes from running this run in the block; the lock ends with the process.

        Raises:
            FedkdError: another process runs it.
        """
        with (self.path / ".lock").open("ab") as file:
            with suppress(ImportError):  # Windows has no such lock
                import fcntl

                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    raise FedkdError(
                        f"{self.path} is being run by another process: wait until it is done, or stop it"
                    ) from None
                except OSError:
                    pass  # some network file systems have no locks
            yield

    @property
    def is_running(self) -> bool:
        """Whether a process is running it now."""
        try:
            with self.locked():
                return False
        except FedkdError:
            return True

    @property
    def environment(self) -> dict[str, str]:
        """Versions, device and threads that it was run with, by name: comments of ``experiment.toml``.

        Raises:
            FedkdError: the file cannot be read.
        """
        text = read_bytes(self.path / EXPERIMENT, "run").decode(errors="replace")
        return {name: printable(value) for name, value in _COMMENT.findall(text)}

    def write_experiment(self, experiment: Experiment, surroundings: Mapping[str, Any]) -> None:
        """Write ``experiment.toml``: versions as comments, then every key."""
        comments = "".join(f"# {name}: {value}\n" for name, value in surroundings.items())
        keys = tomli_w.dumps(experiment.flat())
        replace_file(self.path / EXPERIMENT, (comments + "\n" + keys).encode())

    def extend(self, rounds: int) -> None:
        """Set the number of rounds; a finished run is unfinished from then on.

        Raises:
            FedkdError: a file cannot be written.
        """
        path = self.path / EXPERIMENT
        text = read_bytes(path, "run").decode()
        changed = re.sub(
            r"^num-server-rounds = \d+$", f"num-server-rounds = {rounds}", text, flags=re.MULTILINE
        )
        (self.path / RESULT).unlink(missing_ok=True)
        replace_file(path, changed.encode())

    def append_round(self, row: Row) -> None:
        """Append a round's record and force it to the disk."""
        self.append("rounds.jsonl", row)

    def append(self, name: str, value: Mapping[str, Any]) -> None:
        """Append an object to a file of JSON lines and force it to the disk.

        Raises:
            FedkdError: the file cannot be written.
        """
        line = json.dumps(value, allow_nan=False).encode() + b"\n"
        try:
            with (self.path / name).open("ab+") as file:
                if file.tell() and not _ends_a_line(file):  # the last write was interrupted
                    file.write(b"\n")
                file.write(line)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise FedkdError(f"{self.path}/{name} cannot be written: {error.strerror}") from error

    def keep(self, last: int) -> list[Row]:
        """Remove the records of rounds after `last`, as an interrupted run leaves them.

        Returns:
            The records of rounds 1 to `last`.

        Raises:
            FedkdError: one of them is missing, or a file cannot be written.
        """
        for temporary in self.path.rglob(".*.part"):
            temporary.unlink(missing_ok=True)
        self._cut("knowledge.jsonl", KnowledgeOfRound, last)
        rows = self._cut("rounds.jsonl", Round, last)
        if [row["round"] for row in rows] != list(range(1, last + 1)):
            raise FedkdError(
                f"{self.path}/rounds.jsonl does not hold rounds 1 to {last}, each once"
            )
        return rows

    def _cut(self, name: str, shape: type[Shape], last: int) -> list[Row]:
        """Remove incomplete lines and rounds after `last` from a file of JSON lines; return the rest."""
        path = self.path / name
        if not path.exists():
            return []
        rows = [each for each in rows_in(path, shape, skip_cut=True) if each[1]["round"] <= last]
        content = b"".join(line + b"\n" for line, _ in rows)
        if content != read_bytes(path, "run"):
            replace_file(path, content)
        return [row for _, row in rows]

    def write_shards(self, counts: Mapping[str, Any]) -> None:
        """Write ``shards.json``: how many images of each class each client holds."""
        write_json(self.path / "shards.json", dict(counts))

    def write_result(self, result: Mapping[str, Any]) -> None:
        """Write ``result.json``: the run is complete once this is there."""
        write_json(self.path / RESULT, dict(result))


def _ends_a_line(file: IO[bytes]) -> bool:
    file.seek(-1, os.SEEK_END)
    return file.read(1) == b"\n"


def _is_free(path: Path) -> bool:
    """Whether there is nothing of this name, or an empty folder."""
    if path.is_symlink():
        return False
    return not path.exists() or (path.is_dir() and not any(path.iterdir()))


def _advice(path: Path) -> str:
    """Return what to do about a folder that exists."""
    kinds = {"comparison.json": "compare", "sweep.json": "sweep", EXPERIMENT: "run"}
    command = next((kinds[name] for name in kinds if (path / name).is_file()), None)
    if command is None or (path / RESULT).is_file():
        return "choose another name, or remove the folder"
    return f"continue it with fedkd {command} --resume {path}, or choose another name"


def _names(name: str | None, default: str) -> Iterable[str]:
    if name is not None:
        yield name
        return
    yield default
    number = 2
    while True:
        yield f"{default}-{number}"
        number += 1
