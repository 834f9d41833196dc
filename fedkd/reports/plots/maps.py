"""Maps: images by client and class, mean soft labels, and accuracies over two keys."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import ceil, isfinite, nan
from statistics import mean
from typing import TYPE_CHECKING, Literal

from fedkd.reports.plots.style import (
    COLOURS,
    HEAT,
    INK,
    ON_HEAT,
    SIZE,
    WIDTH,
    colour,
    single,
    style,
    whole_ticks,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FEW_CLIENTS = 50
"""Clients up to which shards are drawn as bubbles; beyond, as a map."""

MOST_COLUMNS = 200
"""Columns of a map of shards; more clients share one."""

_HEAT_LEVELS = 25


def shards(counts: Sequence[Sequence[int]], classes: Sequence[str]) -> Figure:
    """Return a figure of how many private images of each class each client holds.

    Bubbles up to `FEW_CLIENTS`; beyond, a map of the shares with the clients sorted by their most
    frequent class, and a histogram of the shards' sizes.

    Args:
        counts: ``[K][C]``.
        classes: C names.
    """
    with style():
        return (
            _bubbles(counts, classes) if len(counts) <= FEW_CLIENTS else _shard_map(counts, classes)
        )


def _bubbles(counts: Sequence[Sequence[int]], classes: Sequence[str]) -> Figure:
    height = min(max(2.6, 0.27 * len(classes) + 0.8), 6)
    figure, axes = single(height)
    clients = len(counts)
    largest = max(max(row) for row in counts) or 1
    across = min(330 / clients, 72 * (height - 0.8) / len(classes))
    points = [(k, c, n) for k, row in enumerate(counts) for c, n in enumerate(row) if n]
    x, y, n = zip(*points, strict=True)
    axes.scatter(
        x, y, s=[(0.95 * across) ** 2 * count / largest for count in n],
        color=colour(0), alpha=0.8, lw=0,
    )  # fmt: skip
    axes.set(xlabel="client", ylabel="class", xlim=(-0.6, clients - 0.4))
    axes.set_ylim(len(classes) - 0.4, -0.6)
    whole_ticks(axes.xaxis)
    if clients <= 12:
        axes.set_xticks(range(clients))
    _class_ticks(axes, classes, "y")
    axes.grid()
    return figure


def _shard_map(counts: Sequence[Sequence[int]], classes: Sequence[str]) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, 4.4), layout="constrained")
    above, below = figure.subplots(2, height_ratios=(2.2, 1))
    order = sorted(range(len(counts)), key=lambda k: _majority(counts[k]))
    shares = [[n / max(1, sum(counts[k])) for n in counts[k]] for k in order]
    columns, each = _pooled(shares)
    _cells(above, [list(row) for row in zip(*columns, strict=True)], most=1.0)
    together = f", {each} per column" if each > 1 else ""
    above.set(xlabel=f"clients, by most frequent class{together}", ylabel="class", xticks=[])
    _class_ticks(above, classes, "y")
    sizes = [sum(row) for row in counts]
    below.hist(sizes, bins=min(25, max(5, len(set(sizes)))), color=colour(0), rwidth=0.9)
    below.set(xlabel="private images of a client", ylabel="clients")
    below.grid(axis="y")
    for axis in (below.xaxis, below.yaxis):
        whole_ticks(axis, 5)
    return figure


def _majority(row: Sequence[int]) -> tuple[int, float]:
    """Return a sort key: the most frequent class, then its share, largest first."""
    top = max(range(len(row)), key=lambda c: row[c])
    return top, -row[top] / max(1, sum(row))


def _pooled(rows: Sequence[Sequence[float]]) -> tuple[list[list[float]], int]:
    """Return at most `MOST_COLUMNS` means over neighbours, and how many rows each covers."""
    each = ceil(len(rows) / MOST_COLUMNS)
    groups = [rows[start : start + each] for start in range(0, len(rows), each)]
    return [[mean(column) for column in zip(*group, strict=True)] for group in groups], each


def soft_labels(by_class: Sequence[Sequence[float] | None], classes: Sequence[str]) -> Figure:
    """Return a figure of each class' mean soft label: rows of probabilities 0..1, or `None`."""
    with style():
        many = len(classes) > 12
        figure, axes = single(4.3)
        rows = [list(row) if row else [nan] * len(classes) for row in by_class]
        _cells(axes, rows, most=1.0)
        if not many:
            for y, row in enumerate(rows):
                for x, share in enumerate(row):
                    if isfinite(share) and share >= 0.005:
                        _cell_text(axes, x, y, f"{100 * share:.0f}", share)
        axes.set(xlabel="class of the soft label", ylabel="class of the images")
        _class_ticks(axes, classes, "x")
        _class_ticks(axes, classes, "y")
        return figure


def grid(
    values: Sequence[Sequence[float]],
    *,
    rows: tuple[str, Sequence[str]],
    columns: tuple[str, Sequence[str]],
    best: tuple[int, int] | None,
    flat: Iterable[tuple[int, int]],
) -> Figure:
    """Return a figure of accuracies (percent) over two keys, the best starred, the flat region framed.

    Args:
        values: ``[rows][columns]``; NaN where there is none.
        rows: the key, and its values as text, lowest first.
        columns: likewise.
        best: place of the best point, (row, column).
        flat: places of the flat region.
    """
    with style():
        high = len(rows[1])
        figure, axes = single(min(max(2.2, 0.42 * high + 1.0), 5.5))
        known = [v for row in values for v in row if isfinite(v)]
        low, top = min(known), max(known)
        span = (top - low) or 1.0
        shares = [[0.06 + 0.94 * (v - low) / span for v in row] for row in values]
        _cells(axes, shares, most=1.0)
        for y, row in enumerate(values):
            for x, value in enumerate(row):
                if isfinite(value) and len(row) <= 9:
                    star = "★ " if (y, x) == best else ""
                    _cell_text(axes, x, y, f"{star}{value:.1f}", shares[y][x])
        _frame(axes, set(flat))
        axes.set(xlabel=columns[0], ylabel=rows[0])
        axes.set_xticks(range(len(columns[1])), columns[1])
        axes.set_yticks(range(high), rows[1])
        axes.invert_yaxis()
        return figure


def _cells(axes: Axes, rows: Sequence[Sequence[float]], most: float) -> None:
    """Fill the cells of a map with an opacity of their share of `most`; one path per shade."""
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path as Outline

    shades: dict[int, list[tuple[float, float]]] = {}
    for y, row in enumerate(rows):
        for x, value in enumerate(row):
            if isfinite(value) and (level := round(_HEAT_LEVELS * min(1.0, value / most))):
                shades.setdefault(level, []).append((x - 0.5, y - 0.5))
    step = [Outline.MOVETO, Outline.LINETO, Outline.LINETO, Outline.LINETO, Outline.CLOSEPOLY]
    for level, corners in sorted(shades.items()):
        points = [
            (x + dx, y + dy)
            for x, y in corners
            for dx, dy in ((0, 0), (1, 0), (1, 1), (0, 1), (0, 0))
        ]
        outline = Outline(points, step * len(corners))
        alpha = level / _HEAT_LEVELS
        axes.add_patch(PathPatch(outline, facecolor=HEAT, alpha=alpha, lw=0))
    axes.set_xlim(-0.5, len(rows[0]) - 0.5)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.tick_params(length=0)
    axes.spines[["top", "right"]].set_visible(True)


def _cell_text(axes: Axes, x: float, y: float, text: str, share: float) -> None:
    tint = ON_HEAT if share > 0.62 else INK
    axes.text(x, y, text, ha="center", va="center", color=tint, fontsize=SIZE - 1)


def _frame(axes: Axes, cells: set[tuple[int, int]]) -> None:
    """Outline a region of (row, column) cells."""
    for y, x in sorted(cells):
        for (dy, dx), ends in {
            (-1, 0): ((x - 0.5, y - 0.5), (x + 0.5, y - 0.5)),
            (1, 0): ((x - 0.5, y + 0.5), (x + 0.5, y + 0.5)),
            (0, -1): ((x - 0.5, y - 0.5), (x - 0.5, y + 0.5)),
            (0, 1): ((x + 0.5, y - 0.5), (x + 0.5, y + 0.5)),
        }.items():
            if (y + dy, x + dx) not in cells:
                axes.plot(
                    *zip(*ends, strict=True), color=COLOURS[1], lw=2.4,
                    solid_capstyle="projecting", clip_on=False, zorder=3,
                )  # fmt: skip


def _class_ticks(axes: Axes, classes: Sequence[str], axis: Literal["x", "y"]) -> None:
    """Name the classes, or every tenth where there are many."""
    each = 1 if len(classes) <= 20 else 10
    places = list(range(0, len(classes), each))
    names = [classes[c] if each == 1 else str(c) for c in places]
    if axis == "y":
        axes.set_yticks(places, names)
        return
    axes.set_xticks(places, names)
    if max(map(len, names)) > 3:
        for tick in axes.get_xticklabels():
            tick.set(rotation=90, rotation_mode="anchor", ha="right", va="center")
