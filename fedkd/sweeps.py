"""Choosing α, τ and the like by cross-validation on training data, never on the test set.

Every point of a grid is trained for every seed and fold: on the training images without the fold, and
measured on the fold. Points that differ in α, τ, step size or epochs alone are more models in one stack,
so that a grid costs little more than its largest part. What is finished is on disk: a sweep that was
interrupted, or is asked for more seeds or points, goes on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import product
from pathlib import Path
from statistics import mean, stdev
from typing import Any, Self

from rich.box import SIMPLE_HEAD
from rich.table import Table

from fedkd.errors import FedkdError
from fedkd.experiment import Experiment
from fedkd.keys import Scalar, kebab, snake
from fedkd.records.folder import RunFolder
from fedkd.trials import Keys, Of, Progress, SweepFolder, Trials, silent

SHOWN = 10
"""Points in a table that is no map; all are in the folder."""

AT_ONCE = 8
"""Points of a search that are chosen before any of them is known: enough for a stack."""


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
        of: whose accuracy.
        grid: values by key; of a search, the (low, high) of each.
        is_search: whether the points were drawn from ranges, by Optuna.
        seeds: S seeds.
        folds: F.
        points: in the order of the grid, or of the search.
    """

    path: Path
    experiment: Experiment
    of: Of
    grid: dict[str, list[Scalar]]
    is_search: bool
    seeds: list[int]
    folds: int
    points: list[Point]

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a sweep's folder.

        Raises:
            FedkdError: there is no finished sweep in it.
        """
        folder = SweepFolder(Path(path))
        said, done = folder.record(), folder.done()
        if not said["points"]:
            raise FedkdError(
                f"{folder.path}: the search is unfinished; run it again and it goes on"
            )
        points = [
            Point(keys, done.table(keys, said["seeds"], said["folds"])) for keys in said["points"]
        ]
        return cls(
            folder.path,
            RunFolder.existing(folder.path).experiment,
            said["of"],
            said["grid"],
            said["is_search"],
            said["seeds"],
            said["folds"],
            points,
        )

    @property
    def best(self) -> Point:
        """The point of the highest accuracy; the first of equals."""
        return max(self.points, key=lambda point: point.accuracy)

    @property
    def flat(self) -> list[Point]:
        """The region around the best point in which it hardly matters where one is.

        Points that are worse than the best by no more than one standard error of the difference,
        paired over seeds and folds, and that are joined to it by steps from one value of one key to
        the next. (Folds share training images, so that the standard error is too small rather than
        too large.) Of a search, points in no order: all that are not worse.
        """
        good = [point for point in self.points if self._is_as_good(point)]
        return good if self.is_search else _joined_to(self.best, good, self.grid)

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
        """Return held-out accuracies in %: by two keys as a map, else the best points in order.

        ``*`` marks the best point, ``~`` those of the flat region around it.
        """
        whose = "clients" if self.of == "federation" else "central student distilled"
        title = f"Held-out accuracy in %: {whose}, {_count(self.seeds, 'seed')}, {self.folds} folds"
        table = Table(
            title=title, box=SIMPLE_HEAD, pad_edge=False, padding=(0, 2, 0, 0), min_width=len(title)
        )
        varied = [key for key, values in self.grid.items() if len(values) > 1]
        if len(varied) == 2 and not self.is_search:
            self._fill_map(table, *varied)
        else:
            self._fill_list(table)
        return table

    def facts(self) -> dict[str, str]:
        """Say what was chosen, and how to go on."""
        flags = " ".join(f"--{kebab(key)} {value}" for key, value in self.best.keys.items())
        others = len(self.flat) - 1
        return {
            "best": f"{self.best} ({self.accuracy_text} %)",
            "flat": f"{others} other point{'s' * (others != 1)} within one standard error of it"
            + (f": {'; '.join(map(str, self.flat_others[:3]))}" if others else "")
            + (" …" if others > 3 else ""),
            "go on": f"with {flags} and all other keys as they are, on the test set",
            "folder": str(self.path),
        }

    @property
    def flat_others(self) -> list[Point]:
        """The flat region without the best point."""
        return [point for point in self.flat if point is not self.best]

    def _marked(self, point: Point) -> str:
        mark = "*" if point is self.best else "~" if point in self.flat else " "
        return f"{_percent(point)} {mark}"

    def _fill_map(self, table: Table, down: str, across: str) -> None:
        table.add_column(f"{kebab(down)} \\ {kebab(across)}")
        for value in self.grid[across]:
            table.add_column(str(value), justify="right")
        for value in self.grid[down]:
            row = [p for p in self.points if p.keys[down] == value]
            table.add_row(str(value), *(self._marked(point) for point in row))

    def _fill_list(self, table: Table) -> None:
        for key in self.grid:
            table.add_column(kebab(key), justify="right")
        table.add_column("accuracy", justify="right")
        for point in sorted(self.points, key=lambda p: -p.accuracy)[:SHOWN]:
            table.add_row(*map(str, point.keys.values()), self._marked(point))

    def as_json(self) -> dict[str, Any]:
        """Return everything that ``--json`` prints."""
        flat = self.flat

        def said(point: Point) -> dict[str, Any]:
            kept = {"accuracy": point.accuracy, "spread": point.spread}
            return {"keys": point.keys, **kept, "accuracies": point.accuracies}

        return {
            "path": str(self.path),
            "of": self.of,
            "grid": self.grid,
            "seeds": self.seeds,
            "folds": self.folds,
            "points": [said(point) for point in self.points],
            "best": said(self.best),
            "flat": [point.keys for point in flat],
        }


def sweep(
    experiment: Experiment,
    grid: Mapping[str, Sequence[Scalar]],
    seeds: Sequence[int] | None = None,
    folds: int = 3,
    *,
    of: str = "federation",
    progress: Progress = silent,
) -> Sweep:
    """Train every point of a grid for every seed and fold, and measure it on the fold.

    Args:
        experiment: what all points share.
        grid: values by key, such as ``{"alpha": [0.3, 0.7], "tau": [1, 5]}``.
        seeds: default the experiment's.
        folds: F ≥ 2, parts of the training images, each held out once.
        of: ``"federation"``: the mean over its clients; ``"central"``: the student distilled from
            the pooled teacher.
        progress: told what is going on and how far it is, 0..1.

    Raises:
        FedkdError: a key or value is not right; nothing has been trained then.
    """
    values = _typed(experiment, grid)
    trials = Trials(experiment, of, _seeds(experiment, seeds), folds, progress)
    points = [dict(zip(values, chosen, strict=True)) for chosen in product(*values.values())]
    trials.check(points)
    trials.begin(values, points)
    trials.evaluate(points)
    return Sweep.load(trials.finish(points))


def search(
    experiment: Experiment,
    ranges: Mapping[str, Sequence[Scalar]],
    trials: int,
    seeds: Sequence[int] | None = None,
    folds: int = 3,
    *,
    of: str = "federation",
    progress: Progress = silent,
) -> Sweep:
    """Let Optuna choose the points: for more keys than a grid can hold.

    The sampler (TPE, Watanabe 2023) is seeded, so that an interrupted search asks for the same points
    again and finds them done. Points are asked for eight at a time, which train in one stack.

    Args:
        experiment: what all points share.
        ranges: (low, high) by key; on a logarithmic scale where high ≥ 10 low > 0; whole numbers where
            the key is one.
        trials: points to try.
        seeds: see `sweep`.
        folds: see `sweep`.
        of: see `sweep`.
        progress: see `sweep`.

    Raises:
        FedkdError: a key or range is not right, or Optuna is not installed.
    """
    if trials < 1:
        raise FedkdError(f"trials = {trials}: must be ≥ 1")
    study = _study(experiment.seed)
    values = _typed(experiment, ranges)
    for key, bounds in values.items():
        if len(bounds) != 2 or not all(type(b) in (int, float) for b in bounds):
            raise FedkdError(f"{kebab(key)} = {bounds}: a range is LOW..HIGH, two numbers")
        if float(bounds[0]) >= float(bounds[1]):
            raise FedkdError(f"{kebab(key)} = {bounds[0]}..{bounds[1]}: LOW must be below HIGH")
    work = Trials(experiment, of, _seeds(experiment, seeds), folds, progress)
    work.check([{key: bounds[end] for key, bounds in values.items()} for end in (0, 1)])
    work.begin(values, [], trials)
    points: list[Keys] = []
    while len(points) < trials:
        asked = [study.ask() for _ in range(min(AT_ONCE, trials - len(points)))]
        new = [{key: _suggested(trial, key, b) for key, b in values.items()} for trial in asked]
        work.evaluate(new, len(points) / trials, len(new) / trials)
        for trial, keys in zip(asked, new, strict=True):
            study.tell(trial, Point(keys, work.table(keys)).accuracy)
        points += new
    distinct = [keys for n, keys in enumerate(points) if keys not in points[:n]]
    return Sweep.load(work.finish(distinct))


@dataclass(frozen=True)
class Asked:
    """What was asked of a sweep, beside the experiment; see `sweep` and `search`.

    Attributes:
        grid: values by key; of a search, the bounds of each.
        trials: of a search, the points to try.
        seeds: S seeds.
        folds: F.
        of: whose accuracy.
    """

    grid: dict[str, list[Scalar]]
    trials: int | None
    seeds: list[int]
    folds: int
    of: str

    @classmethod
    def in_folder(cls, path: str | Path) -> Self:
        """Read it in a sweep's folder.

        Raises:
            FedkdError: there is no sweep in it.
        """
        said = SweepFolder(Path(path)).record()
        return cls(**{each.name: said[each.name] for each in fields(cls)})

    def __str__(self) -> str:
        between = "," if self.trials is None else ".."
        grid = [f"{kebab(key)}={between.join(map(str, v))}" for key, v in self.grid.items()]
        return f"{' '.join(grid)}, {_count(self.seeds, 'seed')}, {self.folds} folds"

    def make(self, experiment: Experiment, progress: Progress = silent) -> Sweep:
        """Make the sweep, or go on with it.

        Raises:
            FedkdError: see `sweep` and `search`.
        """
        rest: dict[str, Any] = {"of": self.of, "progress": progress}
        if self.trials is None:
            return sweep(experiment, self.grid, self.seeds, self.folds, **rest)
        return search(experiment, self.grid, self.trials, self.seeds, self.folds, **rest)


def resume(path: str | Path, *, progress: Progress = silent) -> Sweep:
    """Go on with a sweep or search that was cut off, after the rounds that are done.

    Args:
        path: its folder.
        progress: see `sweep`.

    Raises:
        FedkdError: there is no sweep of this code in it.
    """
    return Asked.in_folder(path).make(RunFolder.existing(path).relocated_experiment(), progress)


def _study(seed: int) -> Any:
    try:
        import optuna
    except ImportError:
        raise FedkdError("a search needs Optuna: pip install 'fedkd[optuna]'") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(seed=seed))


def _suggested(trial: Any, key: str, bounds: Sequence[Any]) -> Scalar:
    """Ask for a value of a key between its bounds."""
    low, high = bounds
    is_log = 0 < 10 * low <= high
    suggest = trial.suggest_int if type(low) is int else trial.suggest_float
    value = suggest(key, low, high, log=is_log)
    return int(value) if type(low) is int else min(high, max(low, float(f"{value:.4g}")))


def _seeds(experiment: Experiment, seeds: Sequence[int] | None) -> list[int]:
    found = [experiment.seed] if seeds is None else list(seeds)
    if not found or len(set(found)) < len(found):
        raise FedkdError(f"seeds = {found}: at least one, and none of them twice")
    return found


def _typed(experiment: Experiment, grid: Mapping[str, Sequence[Scalar]]) -> dict[str, list[Scalar]]:
    """Validate each value by itself, and give it its type: it may be text, as on the command line."""
    found: dict[str, list[Scalar]] = {}
    for name, given in grid.items():
        key = snake(name)
        if key in _FIXED:
            raise FedkdError(f"{kebab(key)} cannot be swept: a sweep sets it itself")
        if isinstance(given, str) or not isinstance(given, Sequence):
            raise FedkdError(f"{kebab(key)} = {given!r} (from the grid): must be a list of values")
        base = ("the experiment", experiment.flat())
        values = [getattr(Experiment.load(base, ("the grid", {name: v})), key) for v in given]
        if not values or len(set(values)) < len(values):
            raise FedkdError(f"{kebab(key)} = {list(given)}: at least one value, and none twice")
        found[key] = values
    if not found:
        raise FedkdError("the grid is empty: name keys and values, as in alpha=0.3,0.7 tau=1,5")
    return found


_FIXED = ("seed", "fold", "name", "run_dir", "data_dir", "engine", "plan")


def parse(text: str | None, *, is_search: bool) -> dict[str, list[Scalar]]:
    """Read a grid such as ``alpha=0.3,0.7 tau=1,5``, or ranges such as ``alpha=0.1..0.9``.

    Args:
        text: of either.
        is_search: whether it has to be ranges.

    Returns:
        Values (or bounds) by key, as text.

    Raises:
        FedkdError: it is neither, or the other.
    """
    if text is None:
        raise FedkdError("--vary is missing: name keys and values, as in 'alpha=0.3,0.7 tau=1,5'")
    found: dict[str, list[Scalar]] = {}
    ranges = set()
    for pair in text.split():
        key, equals, values = pair.partition("=")
        if not (key and equals and values):
            raise FedkdError(
                f"vary = '{pair}': must be KEY=VALUE,VALUE,... or KEY=LOW..HIGH, with spaces between keys"
            )
        if snake(key) in found:
            raise FedkdError(f"vary = '{text}': {key} stands there twice")
        found[snake(key)] = list(values.split(".." if ".." in values else ","))
        ranges.add(".." in values)
    if len(ranges) > 1:
        raise FedkdError(f"vary = '{text}': either values or ranges, not both")
    if ranges != {is_search}:
        raise FedkdError(
            f"vary = '{text}': values make a grid, ranges (LOW..HIGH) a search, which needs --trials"
        )
    return found


def _percent(point: Point) -> str:
    spread = "" if point.spread is None else f" ± {100 * point.spread:.1f}"
    return f"{100 * point.accuracy:.1f}{spread}"


def _count(values: Sequence[object], what: str) -> str:
    return f"{len(values)} {what}{'s' * (len(values) != 1)}"


def _joined_to(
    best: Point, points: Sequence[Point], grid: Mapping[str, Sequence[Scalar]]
) -> list[Point]:
    """Return the points that single steps along the grid join to the best, by way of each other."""

    def in_order(values: Sequence[Scalar]) -> list[Scalar]:
        return sorted(
            values, key=lambda v: (isinstance(v, str), str(v) if isinstance(v, str) else v)
        )

    def place(point: Point) -> tuple[int, ...]:
        return tuple(in_order(values).index(point.keys[key]) for key, values in grid.items())

    def are_neighbours(a: Point, b: Point) -> bool:
        return sum(abs(x - y) for x, y in zip(place(a), place(b), strict=True)) == 1

    found, left = [best], [point for point in points if point is not best]
    for point in found:  # grows on the way
        near = [other for other in left if are_neighbours(point, other)]
        found += near
        left = [other for other in left if other not in near]
    return [point for point in points if point in found]
