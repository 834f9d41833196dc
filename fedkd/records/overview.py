"""Runs at a glance: one line for each in a folder, and how two of them differ."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fedkd.errors import FedkdError, naming, nearest
from fedkd.experiment import Experiment
from fedkd.keys import Scalar, kebab
from fedkd.records.files import read_result
from fedkd.records.folder import EXPERIMENT, RunFolder
from fedkd.records.identity import changes
from fedkd.records.results import mean_of

Kind = Literal["federated", "central", "sweep"]

_PLACE = {"name", "run_dir"}
"""Keys that say where a run is, not what it is."""

_FEDERATED = (
    "accuracy", "server_accuracy", "rounds", "bytes_up", "bytes_down", "epsilon", "seconds",
)  # fmt: skip
_CENTRAL = {
    "teacher_accuracy": "teacher_accuracies",
    "student_alone_accuracy": "student_alone_accuracies",
    "student_distilled_accuracy": "student_accuracies",
}


@dataclass(frozen=True)
class Overview:
    """A run in one line.

    Attributes:
        path: its folder.
        kind: a federation, a central baseline (`federated` until it is finished), or a sweep.
        experiment: what was run.
        is_finished: whether it has a result; `False` for a sweep.
        figures: of a finished run, by name: ``accuracy`` 0..1, ``bytes_up``, ``seconds``, ...
    """

    path: Path
    kind: Kind
    experiment: Experiment
    is_finished: bool
    figures: dict[str, float]

    @classmethod
    def of(cls, path: str | Path) -> Overview:
        """Return the run in a folder.

        Raises:
            FedkdError: it holds none, or is damaged.
        """
        folder = RunFolder.existing(path)
        if (folder.path / "sweep.json").is_file():
            return cls(folder.path, "sweep", folder.experiment, is_finished=False, figures={})
        result = read_result(folder.path) if folder.is_finished else {}
        kind: Kind = "central" if "seeds" in result else "federated"
        figures = _figures(result) if result else {}
        return cls(folder.path, kind, folder.experiment, bool(result), figures)

    def as_row(self) -> dict[str, Any]:
        """Return a plain dict, for JSON and external tables."""
        return {
            "path": str(self.path),
            "kind": self.kind,
            "finished": self.is_finished,
            "experiment": self.experiment.flat(),
            **self.figures,
        }


def _figures(result: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers of a result that can be compared."""
    if "seeds" in result:
        means = {name: mean_of(result[by_seed]) for name, by_seed in _CENTRAL.items()}
        return {**means, "seconds": sum(result["seconds"].values())}
    return {name: value for name in _FEDERATED if (value := result.get(name)) is not None}


def overviews(
    folder: str | Path, wanted: Mapping[str, str] | None = None
) -> tuple[list[Overview], list[str]]:
    """Return the runs in a folder by name, and why others cannot be shown.

    Args:
        folder: that contains the folders of runs.
        wanted: values of keys, as text, that a run must have.

    Raises:
        FedkdError: there is no such folder, or no such key.
    """
    keys = {_key(name): value for name, value in (wanted or {}).items()}
    found, skipped = [], []
    for path in _run_folders(Path(folder)):
        try:
            run = Overview.of(path)
        except FedkdError as error:
            skipped.append(naming(path, error))
            continue
        values = run.experiment.flat()
        if run.kind == "central":
            del values["strategy"]  # it has none, whatever the file says
        if all(_text(values.get(key, "")) == value.lower() for key, value in keys.items()):
            found.append(run)
    return found, skipped


def _run_folders(folder: Path) -> list[Path]:
    try:
        return sorted(path for path in folder.iterdir() if (path / EXPERIMENT).is_file())
    except OSError as error:
        raise FedkdError(f"{folder} cannot be read: {error.strerror}") from None


def _key(name: str) -> str:
    known = [kebab(each) for each in Experiment.model_fields]
    key = kebab(name)
    if key not in known:
        raise FedkdError(f"where: no key '{name}'{nearest(key, known)}")
    return key


def _text(value: Scalar) -> str:
    return str(value).lower()


# --- Two runs -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Differences:
    """How two runs differ.

    Attributes:
        keys: of the experiment, each with both values.
        besides: versions, data, code and initial weights that differ, in words.
        figures: of both, by name; `None` for one that a run has not.
    """

    keys: dict[str, tuple[Scalar | None, Scalar | None]]
    besides: list[str]
    figures: dict[str, tuple[float | None, float | None]]


def differences(first: str | Path, second: str | Path) -> Differences:
    """Return how two runs differ: in keys, in all else that they are known by, and in their figures.

    Raises:
        FedkdError: a folder holds no run, or is damaged.
    """
    ours, theirs = Overview.of(first), Overview.of(second)
    names = [n for n in Experiment.model_fields if n not in _PLACE]
    values = ((n, getattr(ours.experiment, n), getattr(theirs.experiment, n)) for n in names)
    before, now = (
        {kind: part for kind, part in RunFolder(run.path).identity.items() if kind != "keys"}
        for run in (ours, theirs)
    )
    return Differences(
        {kebab(name): (a, b) for name, a, b in values if a != b},
        changes(before, now),
        {
            name: (ours.figures.get(name), theirs.figures.get(name))
            for name in _in_order(ours.figures, theirs.figures)
        },
    )


def _in_order(*names: Iterable[str]) -> Sequence[str]:
    """Return all names once, in the order in which they come."""
    return list(dict.fromkeys(name for each in names for name in each))
