"""A finished sweep: its points, the best one, and the flat region around it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any, Self

from rich.table import Table

from fedkd.errors import FedkdError
from fedkd.experiment import Experiment
from fedkd.keys import Scalar, kebab
from fedkd.records.folder import RunFolder
from fedkd.studies.sweep.folder import Keys, Of, SweepFolder
from fedkd.studies.sweep.tables import SHOWN, as_list, as_map, counted
from fedkd.wording import plus_minus


@dataclass(frozen=True)
class Point:
    """A point of the grid.

    Attributes:
        keys: its values by key.
        accuracies: on the held-out images, ``[S][F]``.
    """

    keys: Keys
    accuracies: list[list[float]]

    @property
    def accuracy(self) -> float:
        """Mean over seeds and folds."""
        return mean(mean(folds) for folds in self.accuracies)

    @property
    def spread(self) -> float | None:
        """Standard deviation (n − 1) over the seeds of the mean over the folds; `None` for one seed."""
        means = [mean(folds) for folds in self.accuracies]
        return stdev(means) if len(means) > 1 else None

    def __str__(self) -> str:
        return ", ".join(f"{kebab(key)} = {value}" for key, value in self.keys.items())


@dataclass(frozen=True)
class Sweep:
    """A finished sweep.

    Attributes:
        path: its folder.
        experiment: what all points share.
        of: whose accuracy, as for `sweep`.
        grid: values by key; of a search, the (low, high) of each.
        is_search: whether the points were drawn from ranges, by Optuna.
        seeds: S seeds.
        folds: F.
        points: in the order of the grid, or of the search.
        remark: why cells were measured again, or `None`.
    """

    path: Path
    experiment: Experiment
    of: Of
    grid: dict[str, list[Scalar]]
    is_search: bool
    seeds: list[int]
    folds: int
    points: list[Point]
    remark: str | None = None

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Return the sweep in a folder.

        Raises:
            FedkdError: the folder holds no finished sweep.
        """
        folder = SweepFolder(Path(path))
        settings, done = folder.record(), folder.done()
        if not settings["points"]:
            raise FedkdError(f"{folder.path}: the search is unfinished; run it again to continue")
        points = [
            Point(keys, done.table(keys, settings["seeds"], settings["folds"]))
            for keys in settings["points"]
        ]
        return cls(
            folder.path,
            RunFolder.existing(folder.path).experiment,
            settings["of"],
            settings["grid"],
            settings["is_search"],
            settings["seeds"],
            settings["folds"],
            points,
            settings.get("remark"),
        )

    @property
    def best(self) -> Point:
        """The point with the highest accuracy; the first of equals."""
        return max(self.points, key=lambda point: point.accuracy)

    @property
    def flat(self) -> list[Point]:
        """The region around the best point in which the choice hardly matters.

        These points are worse than the best by at most one standard error of the difference, paired
        over seeds and folds, and are connected to it by steps from one value of one key to the next.
        (Folds share training images, so that the standard error is too small rather than too large.)
        For a search, whose points have no neighbours: all that are not worse.
        """
        good = [point for point in self.points if self._is_as_good(point)]
        return good if self.is_search else _connected_to(self.best, good, self.grid)

    def _is_as_good(self, point: Point) -> bool:
        pairs = zip(self.best.accuracies, point.accuracies, strict=True)
        differences = [a - b for x, y in pairs for a, b in zip(x, y, strict=True)]
        error = stdev(differences) / len(differences) ** 0.5
        return bool(mean(differences) <= error)

    @property
    def accuracy_text(self) -> str:
        """The best point's accuracy in percent, with its spread over seeds."""
        return _percent(self.best)

    def table(self) -> Table:
        """Return held-out accuracies in %: a map for two keys, else the best points in order.

        ``*`` marks the best point, ``~`` those of the flat region around it.
        """
        whose = "clients" if self.of == "federation" else "central student distilled"
        title = (
            f"Held-out accuracy in %: {whose}, {counted(self.seeds, 'seed')}, {self.folds} folds"
        )
        varied = [key for key, values in self.grid.items() if len(values) > 1]
        if len(varied) == 2 and not self.is_search:
            cells = [(point.keys, self._marked(point)) for point in self.points]
            return as_map(title, cells, *((key, self.grid[key]) for key in varied))
        best = sorted(self.points, key=lambda p: -p.accuracy)[:SHOWN]
        return as_list(title, [(p.keys, self._marked(p)) for p in best], list(self.grid))

    def facts(self) -> dict[str, str]:
        """Return what was chosen and what to do next, by name."""
        flags = " ".join(f"--{kebab(key)} {value}" for key, value in self.best.keys.items())
        others = len(self.flat) - 1
        return {
            "best": f"{self.best} ({self.accuracy_text} %)",
            "flat": f"{others} other point{'s' * (others != 1)} within one standard error of it"
            + (f": {'; '.join(map(str, self.flat_others[:3]))}" if others else "")
            + (" …" if others > 3 else ""),
            "next": f"use {flags}, with all other keys unchanged, on the test set",
            "folder": str(self.path),
            **({"remark": self.remark} if self.remark else {}),
        }

    @property
    def flat_others(self) -> list[Point]:
        """The flat region without the best point."""
        return [point for point in self.flat if point is not self.best]

    def _marked(self, point: Point) -> str:
        mark = "*" if point is self.best else "~" if point in self.flat else " "
        return f"{_percent(point)} {mark}"

    def as_json(self) -> dict[str, Any]:
        """Return everything that ``--json`` prints."""
        flat = self.flat

        def row(point: Point) -> dict[str, Any]:
            scores = {"accuracy": point.accuracy, "spread": point.spread}
            return {"keys": point.keys, **scores, "accuracies": point.accuracies}

        return {
            "path": str(self.path),
            "of": self.of,
            "grid": self.grid,
            "seeds": self.seeds,
            "folds": self.folds,
            "points": [row(point) for point in self.points],
            "best": row(self.best),
            "flat": [point.keys for point in flat],
            "remark": self.remark,
        }


def _percent(point: Point) -> str:
    spread = None if point.spread is None else 100 * point.spread
    return plus_minus(100 * point.accuracy, spread)


def _connected_to(
    best: Point, points: Sequence[Point], grid: Mapping[str, Sequence[Scalar]]
) -> list[Point]:
    """Return the points connected to the best by single steps along the grid."""

    def in_order(values: Sequence[Scalar]) -> list[Scalar]:
        return sorted(
            values, key=lambda v: (isinstance(v, str), str(v) if isinstance(v, str) else v)
        )

    def place(point: Point) -> tuple[int, ...]:
        return tuple(in_order(values).index(point.keys[key]) for key, values in grid.items())

    def are_neighbours(a: Point, b: Point) -> bool:
        return sum(abs(x - y) for x, y in zip(place(a), place(b), strict=True)) == 1

    connected, left = [best], [point for point in points if point is not best]
    for point in connected:  # grows on the way
        near = [other for other in left if are_neighbours(point, other)]
        connected += near
        left = [other for other in left if other not in near]
    return [point for point in points if point in connected]
