"""Run folders: what a run was, what each round gave, and how it ended.

``runs/<name>/`` holds ``experiment.toml`` (every key, itself a valid ``--config``), ``rounds.jsonl`` (one
object a round, on disk before the next round begins) and ``result.json``. Only text and safetensors,
never pickle. Files are written under a temporary name and renamed.
"""

from __future__ import annotations

import json
import os
import platform
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO, Any, Self

import tomli_w

from fedkd.errors import FedkdError
from fedkd.experiment import Experiment, read_toml

Row = dict[str, Any]
"""One round's record; `docs/records.md` is the glossary of its fields."""

_PACKAGES = ("fedkd", "torch", "torchvision", "flwr", "ray", "numpy")


def environment(device: str, threads: int) -> dict[str, Any]:
    """Say what a run depends on besides its experiment: versions, device, threads."""
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return {"python": platform.python_version(), **found, "device": device, "threads": threads}


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
    """Force the names in a folder to the disk, where the system can: a renamed file is two writes."""
    with suppress(PermissionError, IsADirectoryError):  # Windows opens no folders
        folder = os.open(path, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def write_json(path: Path, value: object) -> None:
    """Write `value` as JSON, atomically; NaN and infinity are refused, as JSON knows neither."""
    replace_file(path, (json.dumps(value, indent=2, allow_nan=False) + "\n").encode())


@dataclass(frozen=True)
class RunFolder:
    """The folder of one run."""

    path: Path

    @classmethod
    def check(cls, experiment: Experiment) -> None:
        """Refuse a folder that exists already, before any work.

        Raises:
            FedkdError: the folder of a named run is there.
        """
        if experiment.name is None:
            return
        path = Path(experiment.run_dir) / experiment.name
        if path.exists():
            raise FedkdError(
                f"name = '{experiment.name}': the run folder {path} exists; choose another name, or "
                "remove the folder"
            )

    @classmethod
    def create(cls, experiment: Experiment, default_name: str) -> Self:
        """Make the folder named by the experiment, or else the next free one after `default_name`.

        Raises:
            FedkdError: the folder exists already, or cannot be made.
        """
        cls.check(experiment)
        parent = Path(experiment.run_dir)
        for name in _names(experiment.name, default_name):
            try:
                (parent / name).mkdir(parents=True)
            except FileExistsError:
                if experiment.name is not None or not (parent / name).is_dir():
                    raise FedkdError(
                        f"run-dir = '{parent}': {parent / name} is in the way"
                    ) from None
                continue
            except OSError as error:
                raise FedkdError(
                    f"run-dir = '{parent}': the folder cannot be made ({error.strerror}); name one "
                    "that you may write to"
                ) from error
            return cls(parent / name)
        raise AssertionError("names never end")

    @classmethod
    def existing(cls, path: str | Path) -> Self:
        """Open the folder of a run that has begun.

        Raises:
            FedkdError: there is none.
        """
        folder = Path(path)
        if not (folder / "experiment.toml").is_file():
            raise FedkdError(f"{folder} is no run folder: it has no experiment.toml")
        return cls(folder)

    @property
    def experiment(self) -> Experiment:
        """What was run."""
        return Experiment.load(read_toml(self.path / "experiment.toml"))

    @property
    def is_finished(self) -> bool:
        """Whether the run has come to its end."""
        return (self.path / "result.json").is_file()

    def found(self) -> Experiment:
        """Return what was run, with the place where its folder is now: it may have been moved."""
        experiment = self.experiment
        written = Path(experiment.run_dir) / (experiment.name or "")
        if written.exists() and written.samefile(self.path):
            return experiment  # in the words that messages were counted with
        path = self.path.absolute()
        return experiment.replace(run_dir=str(path.parent), name=path.name)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes from running this run in the block; a process that dies lets go.

        Raises:
            FedkdError: another process runs it.
        """
        with (self.path / ".lock").open("ab") as file:
            with suppress(ImportError):  # Windows: nobody is kept out
                import fcntl

                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    raise FedkdError(
                        f"{self.path} is being run by another process: wait until it is done, or end it"
                    ) from None
                except OSError:
                    pass  # some network file systems know no locks
            yield

    @property
    def is_running(self) -> bool:
        """Whether a process is running it just now."""
        try:
            with self.locked():
                return False
        except FedkdError:
            return True

    @property
    def version(self) -> str | None:
        """The version of fedkd that wrote it, if it says so."""
        return self._said("fedkd")

    @property
    def sources(self) -> str | None:
        """The digest of the code that wrote it, if it says so; see `fedkd.sources`."""
        return self._said("sources")

    def _said(self, name: str) -> str | None:
        """Read one of the comments at the head of ``experiment.toml``."""
        text = (self.path / "experiment.toml").read_text(encoding="utf-8")
        found = re.search(rf"^# {name}: (\S+)$", text, re.MULTILINE)
        return found[1] if found else None

    def write_experiment(self, experiment: Experiment, surroundings: Mapping[str, Any]) -> None:
        """Write ``experiment.toml``: versions as comments, then every key."""
        comments = "".join(f"# {name}: {value}\n" for name, value in surroundings.items())
        keys = tomli_w.dumps(experiment.flat())
        replace_file(self.path / "experiment.toml", (comments + "\n" + keys).encode())

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
                if file.tell() and not _ends_a_line(file):  # whoever wrote it last was cut off
                    file.write(b"\n")
                file.write(line)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise FedkdError(f"{self.path}/{name} cannot be written: {error.strerror}") from error

    def keep(self, last: int) -> list[Row]:
        """Drop whatever is there of rounds after `last`, as a run leaves it that was cut off.

        Returns:
            The records of rounds 1 to `last`.

        Raises:
            FedkdError: one of them is missing, or a file cannot be written.
        """
        for temporary in self.path.rglob(".*.part"):
            temporary.unlink(missing_ok=True)
        self._cut("knowledge.jsonl", last)
        rows = self._cut("rounds.jsonl", last)
        if [row["round"] for row in rows] != list(range(1, last + 1)):
            raise FedkdError(
                f"{self.path}/rounds.jsonl does not hold rounds 1 to {last}, each once"
            )
        return rows

    def _cut(self, name: str, last: int) -> list[Row]:
        """Drop what a file of JSON lines holds of rounds after `last`, and whole lines alone stay."""
        path = self.path / name
        lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
        kept, rows = [], []
        for line in lines:
            with suppress(ValueError):  # cut off
                row = json.loads(line)
                if line.endswith(b"\n") and row["round"] <= last:
                    kept.append(line)
                    rows.append(row)
        if kept != lines:
            replace_file(path, b"".join(kept))
        return rows

    def write_shards(self, counts: Mapping[str, Any]) -> None:
        """Write ``shards.json``: who holds how many images of which class."""
        write_json(self.path / "shards.json", dict(counts))

    def write_result(self, result: Mapping[str, Any]) -> None:
        """Write ``result.json``: the run is complete once this is there."""
        write_json(self.path / "result.json", dict(result))


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Say what is wrong with a file of a run folder that cannot be read."""
    try:
        yield
    except OSError:
        raise FedkdError(f"{path.parent} holds no finished run: {path.name} is missing") from None
    except json.JSONDecodeError as error:
        raise FedkdError(f"{path.parent}: {path.name} is not valid JSON ({error})") from None


def read_json(path: Path) -> dict[str, Any]:
    """Read an object of a run folder.

    Raises:
        FedkdError: the file is missing or damaged.
    """
    with _reading(path):
        return dict(json.loads(path.read_text(encoding="utf-8")))


def read_lines(path: Path) -> list[Row]:
    """Read a file of one object a line of a run folder.

    Raises:
        FedkdError: the file is missing or damaged.
    """
    with _reading(path):
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def read_shards(folder: Path | None) -> dict[str, Any] | None:
    """Read who holds how many images of which class, or return `None` where a run does not say."""
    path = None if folder is None else folder / "shards.json"
    return read_json(path) if path is not None and path.is_file() else None


def _ends_a_line(file: IO[bytes]) -> bool:
    file.seek(-1, os.SEEK_END)
    return file.read(1) == b"\n"


def _names(name: str | None, default: str) -> Iterable[str]:
    if name is not None:
        yield name
        return
    yield default
    number = 2
    while True:
        yield f"{default}-{number}"
        number += 1


@dataclass(frozen=True)
class Run:
    """A finished federated run, read from its folder.

    Attributes:
        path: the run folder.
        rounds: one dict a round, as in ``rounds.jsonl``.
        result: what ``result.json`` holds.
    """

    path: Path
    rounds: list[Row] = field(repr=False)
    result: dict[str, Any] = field(repr=False)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a run folder.

        Raises:
            FedkdError: there is no finished run in it.
        """
        folder = Path(path)
        rows = read_lines(folder / "rounds.jsonl")
        return cls(folder, rows, read_json(folder / "result.json"))

    @property
    def experiment(self) -> Experiment:
        """What was run."""
        return RunFolder(self.path).experiment

    @property
    def accuracy(self) -> float:
        """Mean over clients of the student's test accuracy after the closing exchange, 0..1."""
        return float(self.result["accuracy"])

    @property
    def client_accuracy(self) -> list[float | None]:
        """The same per client, ``[K]`` in order of partition; `None` for one that did not answer."""
        return list(self.result["client_accuracy"])

    @property
    def server_accuracy(self) -> float | None:
        """Test accuracy of the server's model at the end, where it keeps one."""
        return self.result["server_accuracy"]  # type: ignore[no-any-return]

    @property
    def bytes_up(self) -> int:
        """Payload bytes from all clients to the server over the whole run."""
        return int(self.result["bytes_up"])

    @property
    def bytes_down(self) -> int:
        """Payload bytes from the server to all clients over the whole run, closing included."""
        return int(self.result["bytes_down"])


@dataclass(frozen=True)
class CentralRun:
    """The pooled teacher → student baseline, for one or more seeds.

    Attributes:
        path: the run folder, or ``None`` where none was asked for.
        seeds: S seeds.
        teacher_accuracies: test accuracy per seed, 0..1.
        student_alone_accuracies: the student trained on hard labels only.
        student_accuracies: the same student distilled from the teacher.
        agreements: share of test images on which distilled student and teacher agree.
        parameters: of ``{"teacher": ..., "student": ...}``.
        test_size: test images behind every accuracy.
        seconds: by phase, all seeds together.
        training: by model (``teacher``, ``student-alone``, ``student-distilled``): mean ``loss`` and
            ``gradient_norm`` of each epoch, ``[S][E]`` (`None` where not finite or not measured), and
            ``accuracy`` on its own training images, ``[S]``.
        soft_label_entropy: mean entropy in nats of the teachers' soft labels, ``[S]`` (`None` where not
            finite).
        soft_label_entropy_at_tau: the same at the temperature τ.
    """

    path: Path | None
    seeds: list[int]
    teacher_accuracies: list[float]
    student_alone_accuracies: list[float]
    student_accuracies: list[float]
    agreements: list[float]
    parameters: dict[str, int]
    test_size: int
    seconds: dict[str, float]
    training: dict[str, dict[str, Any]] = field(repr=False)
    soft_label_entropy: list[float | None]
    soft_label_entropy_at_tau: list[float | None]

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a run folder.

        Raises:
            FedkdError: there is no finished central run in it.
        """
        folder = Path(path)
        result = read_json(folder / "result.json")
        names = [each.name for each in fields(cls) if each.name != "path"]
        missing = [name for name in names if name not in result]
        if missing:
            raise FedkdError(f"{folder} holds no central run: no {missing[0]} in result.json")
        return cls(folder, **{name: result[name] for name in names})

    @property
    def experiment(self) -> Experiment:
        """What was run; its seed is none of `seeds`."""
        if self.path is None:
            raise FedkdError("this central run was not saved")
        return RunFolder(self.path).experiment

    @property
    def teacher_accuracy(self) -> float:
        """Mean over the seeds."""
        return _mean(self.teacher_accuracies)

    @property
    def student_alone_accuracy(self) -> float:
        """Mean over the seeds."""
        return _mean(self.student_alone_accuracies)

    @property
    def student_accuracy(self) -> float:
        """Mean over the seeds."""
        return _mean(self.student_accuracies)

    @property
    def gap_closed(self) -> float | None:
        """(distilled − alone) / (teacher − alone) of the means; `None` where it means nothing."""
        return gap_closed(self.student_accuracy, self.student_alone_accuracy, self.teacher_accuracy)

    def as_json(self) -> dict[str, Any]:
        """Return what ``result.json`` holds."""
        plural = {
            each.name: getattr(self, each.name) for each in fields(self) if each.name != "path"
        }
        return {
            "teacher_accuracy": self.teacher_accuracy,
            "student_alone_accuracy": self.student_alone_accuracy,
            "student_accuracy": self.student_accuracy,
            "gap_closed": self.gap_closed,
            **plural,
        }


def gap_closed(value: float, low: float, high: float) -> float | None:
    """Return (value − low) / (high − low), or `None` where the gap is not positive."""
    return (value - low) / (high - low) if high > low else None


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
