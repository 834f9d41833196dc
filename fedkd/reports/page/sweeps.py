"""The figure and table of a sweep: a map over two keys, a curve over one, dots for a search."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import nan
from statistics import mean
from typing import TYPE_CHECKING

from fedkd.keys import Scalar, kebab
from fedkd.reports.page.parts import Drawing, Missing, Shown
from fedkd.reports.page.tables import Table, from_cells, mean_percent
from fedkd.reports.plots import points as point_plots
from fedkd.reports.plots.curves import Curve, curves
from fedkd.reports.plots.maps import grid
from fedkd.studies.sweep.result import Point, Sweep

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_POINTS = 20
"""Rows of the table, the best first."""


def of_sweep(sweep: Sweep) -> list[Shown]:
    """Return the figure of a sweep."""
    keys = _varied(sweep)
    title = "Held-out accuracy"
    if not keys:
        return [Missing(title, "the sweep has a single point")]
    title = f"Held-out accuracy over {' × '.join(map(_symbol, keys))}"
    fixed = {} if sweep.is_search else {k: v for k, v in sweep.best.keys.items() if k not in keys}
    points = [p for p in sweep.points if all(p.keys[key] == v for key, v in fixed.items())]
    if sweep.is_search:
        figure, how = _dots(sweep, keys), "Filled"
    elif len(keys) == 2:
        figure, how = _map(sweep, points, keys[0], keys[1]), "Framed"
    else:
        figure, how = _line(sweep, points, keys[0]), "As good"
    star = "" if how == "As good" else " (★)"
    seeds = len(sweep.seeds)
    held = f", at {_in_words(fixed)}" if fixed else ""
    region = (
        f"{how}: the {len(sweep.flat)} points around it that are worse by at most one standard "
        "error of the paired difference."
        if len(sweep.flat) > 1
        else "No other point around it is as good within one standard error of the paired difference."
    )
    caption = (
        f"Accuracy in % on held-out training images, mean over {sweep.folds} folds and "
        f"{seeds} seed{'s' * (seeds > 1)}{held}. Best{star}: {_in_words(sweep.best.keys)} with "
        f"{_accuracy(sweep.best)} %. {region}"
    )
    return [Drawing("sweep", title, caption, figure)]


def _varied(sweep: Sweep) -> list[str]:
    """Return the keys to draw: of a grid the two with most values, of a search all."""
    several = [key for key in sweep.grid if len({p.keys[key] for p in sweep.points}) > 1]
    if sweep.is_search:
        return several
    most = sorted(several, key=lambda key: -len(sweep.grid[key]))[:2]
    return [key for key in several if key in most]


def _map(sweep: Sweep, points: Sequence[Point], down: str, across: str) -> Figure:
    rows, columns = (_ordered(sweep.grid[key]) for key in (down, across))
    points_by_place = {(rows.index(p.keys[down]), columns.index(p.keys[across])): p for p in points}
    flat = [point.keys for point in sweep.flat]
    return grid(
        [
            [
                100 * points_by_place[y, x].accuracy if (y, x) in points_by_place else nan
                for x in range(len(columns))
            ]
            for y in range(len(rows))
        ],
        rows=(_symbol(down), [_text(value) for value in rows]),
        columns=(_symbol(across), [_text(value) for value in columns]),
        best=next(
            (at for at, point in points_by_place.items() if point.keys == sweep.best.keys), None
        ),
        flat=[at for at, point in points_by_place.items() if point.keys in flat],
    )


def _line(sweep: Sweep, points: Sequence[Point], key: str) -> Figure:
    """Return the figure of one key: a curve over numbers, markers over names."""
    order = _ordered(sweep.grid[key])
    ordered = sorted(points, key=lambda point: order.index(point.keys[key]))
    by_seed = [[100 * mean(folds) for folds in point.accuracies] for point in ordered]
    if any(isinstance(value, str | bool) for value in order):
        named = {_text(p.keys[key]): row for p, row in zip(ordered, by_seed, strict=True)}
        return point_plots.points(named, xlabel="held-out accuracy in %")
    x = [float(point.keys[key]) for point in ordered]
    curve = Curve("held-out accuracy", x, [list(row) for row in zip(*by_seed, strict=True)])
    best = 100 * sweep.best.accuracy
    return curves(
        [curve], {f"best {best:.1f}": best}, xlabel=_symbol(key), ylabel="held-out accuracy in %",
        scale="numbers",
    )  # fmt: skip


def _dots(sweep: Sweep, keys: Sequence[str]) -> Figure:
    flat = [point.keys for point in sweep.flat]
    return point_plots.dots(
        {_symbol(key): [_number(point.keys[key]) for point in sweep.points] for key in keys},
        [100 * point.accuracy for point in sweep.points],
        best=sweep.points.index(sweep.best),
        flat=[n for n, point in enumerate(sweep.points) if point.keys in flat],
    )


def table(sweep: Sweep) -> Table:
    """Return the best points of a sweep, the best first."""
    flat = [point.keys for point in sweep.flat]
    ordered = sorted(sweep.points, key=lambda point: -point.accuracy)
    rows = [
        {
            "point": _in_words(point.keys),
            "held-out accuracy, %": _accuracy(point),
            "in the flat region": "yes" if point.keys in flat else "no",
        }
        for point in ordered[:MOST_POINTS]
    ]
    of = (
        f"The {len(rows)} best of {len(ordered)} points"
        if len(rows) < len(ordered)
        else "All points"
    )
    note = (
        "Mean over seeds and folds, ± standard deviation over seeds. The test set was not used: evaluate "
        "the chosen point on it once."
    )
    return from_cells(of, rows, 0, [note])


def _accuracy(point: Point) -> str:
    return mean_percent([mean(folds) for folds in point.accuracies])


def _ordered(values: Sequence[Scalar]) -> list[Scalar]:
    """Return numbers sorted, and names in their given order."""
    numbers = [v for v in values if isinstance(v, int | float)]
    return sorted(numbers) if len(numbers) == len(values) else list(values)


def _number(value: Scalar) -> float:
    return float(value) if isinstance(value, int | float) else nan


def _in_words(keys: Mapping[str, Scalar]) -> str:
    return ", ".join(f"{_symbol(key)} = {_text(value)}" for key, value in keys.items())


def _text(value: Scalar) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _symbol(key: str) -> str:
    return {"alpha": "α", "tau": "τ"}.get(key, kebab(key))
