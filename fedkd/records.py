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
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Self

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
    except OSError as error:
        raise FedkdError(f"{path} cannot be written: {error.strerror}") from error


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
    def version(self) -> str | None:
        """The version of fedkd that wrote it, if it says so."""
        text = (self.path / "experiment.toml").read_text(encoding="utf-8")
        found = re.search(r"^# fedkd: (\S+)$", text, re.MULTILINE)
        return found[1] if found else None

    def write_experiment(self, experiment: Experiment, surroundings: Mapping[str, Any]) -> None:
        """Write ``experiment.toml``: versions as comments, then every key."""
        comments = "".join(f"# {name}: {value}\n" for name, value in surroundings.items())
        keys = tomli_w.dumps(experiment.flat())
        replace_file(self.path / "experiment.toml", (comments + "\n" + keys).encode())

    def append_round(self, row: Row) -> None:
        """Append a round's record and force it to the disk."""
        line = json.dumps(row, allow_nan=False)
        try:
            with (self.path / "rounds.jsonl").open("a", encoding="utf-8") as file:
                file.write(line + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise FedkdError(
                f"{self.path}/rounds.jsonl cannot be written: {error.strerror}"
            ) from error

    def write_result(self, result: Mapping[str, Any]) -> None:
        """Write ``result.json``: the run is complete once this is there."""
        write_json(self.path / "result.json", dict(result))


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
        try:
            lines = (folder / "rounds.jsonl").read_text(encoding="utf-8").splitlines()
            result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
            return cls(folder, [json.loads(line) for line in lines], result)
        except OSError as error:
            raise FedkdError(
                f"{folder} holds no finished run: {Path(error.filename or '').name} is missing"
            ) from None
        except json.JSONDecodeError as error:
            raise FedkdError(f"{folder}: a record is not valid JSON ({error})") from None

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
            name: getattr(self, name)
            for name in (
                "seeds", "teacher_accuracies", "student_alone_accuracies", "student_accuracies",
                "agreements", "parameters", "test_size", "seconds",
            )
        }  # fmt: skip
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
