"""The folder of a sweep: its settings and the accuracies measured so far."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from fedkd.engines.identity import software
from fedkd.engines.run_folder import record_beginning
from fedkd.errors import FedkdError, Setting
from fedkd.experiment import Experiment
from fedkd.keys import Scalar
from fedkd.machine import resolve_device
from fedkd.records.files import read_json, read_lines, write_json
from fedkd.records.folder import RunFolder
from fedkd.records.identity import Identity, as_one, changes
from fedkd.records.shapes import Count, IdentityRecord, Positive, Shape, Share, Value

Of = Literal["federation", "central"]
"""Whose accuracy: the mean over a federation's clients, or the central distilled student's."""

Keys = dict[str, Scalar]
"""A point: values by key, as in Python."""

_RECORD, _POINTS, _IDENTITIES = "sweep.json", "points.jsonl", "identities.json"


class _Settings(Shape):
    """``sweep.json``."""

    of: Of
    grid: Annotated[dict[str, Annotated[list[Value], Field(min_length=1)]], Field(min_length=1)]
    is_search: bool
    trials: Positive | None
    seeds: Annotated[list[Count], Field(min_length=1)]
    folds: Annotated[int, Field(ge=2)]
    points: list[dict[str, Value]]
    remark: str | None = None

    @model_validator(mode="after")
    def _points_of_the_grid(self) -> Self:
        if self.is_search != (self.trials is not None):
            raise ValueError("trials must be given for a search, and only then")
        for point in self.points:
            if point.keys() != self.grid.keys():
                raise ValueError(f"points must have the keys {', '.join(self.grid)}")
            if not self.is_search and any(v not in self.grid[key] for key, v in point.items()):
                raise ValueError("points must have values of the grid")
        return self


class _Measured(Shape):
    """A line of ``points.jsonl``."""

    keys: dict[str, Value]
    seed: Count
    fold: Annotated[str, Field(pattern=r"^\d{1,9}/\d{1,9}$")]
    accuracy: Share
    identity: str


class _Identities(Shape):
    """``identities.json``: identities by fingerprint."""

    __pydantic_extra__: dict[str, IdentityRecord] = Field(init=False)  # type: ignore[assignment]


@dataclass(frozen=True)
class Cell:
    """A point for one seed and fold.

    Attributes:
        keys: of the point.
        seed: of everything random.
        fold: the part held out, 1..F.
    """

    keys: Keys
    seed: int
    fold: int

    @property
    def name(self) -> tuple[Any, ...]:
        """What identifies it."""
        return (*sorted(self.keys.items()), self.seed, self.fold)


class Done:
    """Measured accuracies by cell, and by what they were measured with."""

    def __init__(self) -> None:
        self._accuracies: dict[tuple[Any, ...], float] = {}
        self._identities: dict[tuple[Any, ...], str] = {}

    def identity(self, cell: Cell) -> str | None:
        """Return the fingerprint of what a cell was measured with; `None` if it was not yet."""
        return self._identities.get(cell.name)

    def add(self, cell: Cell, accuracy: float, identity: str) -> None:
        """Add a cell's accuracy; it replaces an older one."""
        self._accuracies[cell.name] = accuracy
        self._identities[cell.name] = identity

    def table(self, keys: Keys, seeds: Sequence[int], folds: int) -> list[list[float]]:
        """Return a point's accuracies ``[S][F]``.

        Raises:
            FedkdError: not all are measured yet.
        """
        try:
            return [
                [self._accuracies[Cell(keys, seed, fold).name] for fold in range(1, folds + 1)]
                for seed in seeds
            ]
        except KeyError:
            raise FedkdError("the sweep is unfinished: run it again to continue") from None


@dataclass(frozen=True)
class SweepFolder:
    """The folder of a sweep: ``sweep.json`` holds its settings, ``points.jsonl`` what is done."""

    path: Path

    @classmethod
    def begin(cls, experiment: Experiment, record: Mapping[str, Any]) -> Self:
        """Return the folder of a new sweep, or that of the same sweep, whatever its points and seeds.

        Args:
            experiment: what its points share.
            record: the sweep's settings, which are written there.

        Raises:
            FedkdError: the folder that the experiment names belongs to something else, or another
                process is running the sweep.
        """
        folder = cls._earlier(experiment, record) or cls._made(experiment)
        with folder.locked():
            folder.write(record)
        return folder

    def locked(self) -> AbstractContextManager[None]:
        """Keep other processes from running this sweep in the block.

        Raises:
            FedkdError: another process runs it.
        """
        return RunFolder(self.path).locked()

    @classmethod
    def _earlier(cls, experiment: Experiment, record: Mapping[str, Any]) -> Self | None:
        """Return the folder of the same sweep, if there is one."""
        name, parent = experiment.name, Path(experiment.run_dir)
        if name is not None and not (parent / name).exists():
            return None
        for path in [parent / name] if name is not None else sorted(parent.glob("sweep-*")):
            if cls(path)._is_of(experiment, record):
                return cls(path)
            if name is not None:
                raise FedkdError(
                    Setting("name", name),
                    f": {path} exists and holds another sweep, or one made by other code; "
                    "choose another name, or remove the folder",
                )
        return None

    def _is_of(self, experiment: Experiment, record: Mapping[str, Any]) -> bool:
        """Whether it holds this sweep, made by the same code."""
        try:
            settings, folder = self.record(), RunFolder.existing(self.path)
            before = folder.experiment
        except FedkdError:  # no sweep, or one written by another version
            return False
        same = all(settings.get(key) == record[key] for key in ("of", "folds", "is_search"))
        ignored = {"name": None, "run_dir": "runs", "seed": 0}
        is_equal = before.replace(**ignored) == experiment.replace(**ignored)
        return same and is_equal and not changes(folder.identity, _software())

    @classmethod
    def _made(cls, experiment: Experiment) -> Self:
        device = str(resolve_device(experiment.device))
        folder = RunFolder.create(
            experiment,
            f"sweep-{experiment.dataset_word}",
            lambda part, _: record_beginning(part, experiment, device, identity=_software()),
        )
        return cls(folder.path)

    def record(self) -> dict[str, Any]:
        """Return the sweep's settings.

        Raises:
            FedkdError: the folder holds no sweep.
        """
        return read_json(self.path / _RECORD, _Settings, "sweep")

    def write(self, record: Mapping[str, Any]) -> None:
        """Write the sweep's settings."""
        write_json(self.path / _RECORD, dict(record))

    def done(self) -> Done:
        """Return what is done; incomplete lines are ignored.

        Raises:
            FedkdError: a complete line is damaged.
        """
        done, path = Done(), self.path / _POINTS
        for point in read_lines(path, _Measured, skip_cut=True) if path.exists() else []:
            cell = Cell(point["keys"], point["seed"], int(point["fold"].partition("/")[0]))
            done.add(cell, point["accuracy"], point["identity"])
        return done

    def append(
        self, cell: Cell, folds: int, accuracy: float, failure: str | None, identity: Identity
    ) -> None:
        """Append a finished cell: its accuracy, what ended it early, if anything, and its identity."""
        fingerprint, known = as_one(identity), self.identities()
        if fingerprint not in known:
            write_json(self.path / _IDENTITIES, {**known, fingerprint: identity})
        fields = {"keys": cell.keys, "seed": cell.seed, "fold": f"{cell.fold}/{folds}"}
        fields |= {"accuracy": accuracy, "failure": failure, "identity": fingerprint}
        RunFolder(self.path).append(_POINTS, fields)

    def identities(self) -> dict[str, Identity]:
        """Return what cells were measured with, by the fingerprint that their lines hold."""
        path = self.path / _IDENTITIES
        return read_json(path, _Identities, "sweep") if path.exists() else {}


def _software() -> Identity:
    """Return the versions that all cells of a sweep have in common."""
    return {"software": software()}
