"""The folder of a sweep: its settings and the accuracies measured so far."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

from fedkd.engines.identity import software
from fedkd.engines.run_folder import record_beginning
from fedkd.errors import FedkdError, Setting
from fedkd.experiment import Experiment
from fedkd.keys import Scalar
from fedkd.machine import resolve_device
from fedkd.records.files import read_json, write_json
from fedkd.records.folder import RunFolder
from fedkd.records.identity import Identity, as_one, changes

Of = Literal["federation", "central"]
"""Whose accuracy: the mean over a federation's clients, or the central distilled student's."""

Keys = dict[str, Scalar]
"""A point: values by key, as in Python."""

_RECORD, _POINTS, _IDENTITIES = "sweep.json", "points.jsonl", "identities.json"


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
        cells = [[Cell(keys, seed, fold) for fold in range(1, folds + 1)] for seed in seeds]
        if not all(cell.name in self._accuracies for row in cells for cell in row):
            raise FedkdError("the sweep is unfinished: run it again to continue")
        return [[self._accuracies[cell.name] for cell in row] for row in cells]


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
        settings = read_json(self.path / _RECORD, "sweep")
        missing = {"of", "grid", "is_search", "trials", "seeds", "folds", "points"} - set(settings)
        if missing:
            raise FedkdError(f"{self.path / _RECORD} lacks {', '.join(sorted(missing))}")
        return settings

    def write(self, record: Mapping[str, Any]) -> None:
        """Write the sweep's settings."""
        write_json(self.path / _RECORD, dict(record))

    def done(self) -> Done:
        """Return what is done; incomplete lines are ignored."""
        done, path = Done(), self.path / _POINTS
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        for line in lines:
            try:
                point = json.loads(line)
                cell = Cell(point["keys"], point["seed"], int(point["fold"].partition("/")[0]))
                done.add(cell, point["accuracy"], point["identity"])
            except (ValueError, KeyError):
                continue
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
        return read_json(path, "sweep") if path.is_file() else {}


def _software() -> Identity:
    """Return the versions that all cells of a sweep have in common."""
    return {"software": software()}
