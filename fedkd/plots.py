"""Figures from plain numbers, drawn by matplotlib: what papers about federated distillation show.

All have one width, at which their text is readable in a column of a page and on a phone. Colours are
Okabe and Ito's, which colour-blind readers can tell apart, and never alone: each method has a marker
of its own. Cells of maps are one colour over the background, more of it where the value is higher, so
that `fedkd.reporting.svg` can show every figure in light and in dark.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import ceil, isfinite, log10, nan
from pathlib import Path
from statistics import mean, stdev
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
"""Okabe and Ito's palette, without black and yellow."""

INK, MUTED, RULE, PAPER = "#1f2328", "#59636e", "#d9dee3", "#ffffff"
"""Text, text beside the point, grid lines, and what a marker is rimmed with."""

HEAT, ON_HEAT = "#0b4f8a", "#fefefe"
"""What the cells of a map are filled with, and text on a full one."""

WIDTH = 5.6
"""Inches of every figure."""

SIZE = 11.0
"""Points of all text: 10 px where the figure is 370 px wide, 15 px at 570 px."""

FEW_CLIENTS = 50
"""Clients up to which shards are bubbles, and a map beyond."""

MOST_COLUMNS = 200
"""Columns of a map of shards; more clients share one."""

_MARKERS = "osD^vPX*"
_STYLES = ("-", "--", "-.", ":")
_GREYS: tuple[Any, ...] = ("-", (0, (7, 2)), (0, (3, 2)), (0, (1, 1.5)))
_LINE = 1.4 * SIZE / 72
_HEAT_LEVELS = 25
_MOST_KEYS = 6
_RC: Any = {
    "axes.axisbelow": True,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.labelsize": SIZE,
    "axes.linewidth": 0.8,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": SIZE,
    "axes.titlelocation": "left",
    "axes.titlecolor": INK,
    "figure.constrained_layout.h_pad": 0.04,
    "figure.constrained_layout.w_pad": 0.04,
    "font.family": "sans-serif",
    "font.size": SIZE,
    "grid.color": RULE,
    "grid.linewidth": 0.8,
    "legend.fontsize": SIZE,
    "legend.frameon": False,
    "legend.handlelength": 1.9,
    "legend.labelcolor": INK,
    "lines.linewidth": 1.8,
    "lines.markersize": 5,
    "savefig.facecolor": "none",
    "savefig.transparent": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "fedkd",
    "text.color": INK,
    "text.parse_math": False,
    "xtick.color": MUTED,
    "xtick.labelcolor": INK,
    "xtick.labelsize": SIZE,
    "ytick.color": MUTED,
    "ytick.labelcolor": INK,
    "ytick.labelsize": SIZE,
}  # fmt: skip


@contextmanager
def style() -> Iterator[None]:
    """Draw and save in the block as the figures of this module look, whatever the user has set."""
    import matplotlib as mpl

    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(_RC)
        yield


# --- Curves ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Curve:
    """One method's curve.

    Attributes:
        label: its name.
        x: ``[T]``.
        values: ``[S][T]``, one row a seed; NaN where there is none.
        slot: number of the method, which gives colour and marker.
        dashed: whether it is the second curve of its method, which the legend leaves out.
        thin: ``[K][T]``, drawn beneath as thin lines.
    """

    label: str
    x: Sequence[float]
    values: Sequence[Sequence[float]]
    slot: int = 0
    dashed: bool = False
    thin: Sequence[Sequence[float]] = ()


def colour(slot: int) -> str:
    """Return the colour of the method with that number."""
    return COLOURS[slot % len(COLOURS)]


def curves(
    drawn: Sequence[Curve],
    lines: Mapping[str, float],
    *,
    xlabel: str,
    ylabel: str,
    scale: Literal["rounds", "bytes", "numbers"] = "rounds",
) -> Figure:
    """Draw curves, mean ± standard deviation over seeds, and a grey line for each constant."""
    with style():
        figure, axes = _single(3.5)
        for curve in drawn:
            _curve(axes, curve)
        for number, (label, value) in enumerate(lines.items()):
            axes.axhline(value, ls=_GREYS[number % 4], lw=1.2, color=MUTED, label=label, zorder=1.5)
        axes.set(xlabel=xlabel, ylabel=ylabel)
        axes.grid(axis="y")
        if scale == "bytes":
            _bytes_axis(axes)
        elif scale == "numbers":
            x = sorted({x for curve in drawn for x in curve.x})
            if 0 < 5 * x[0] <= x[-1]:
                axes.set_xscale("log")
            axes.set_xticks(x, [f"{value:g}" for value in x])
            axes.minorticks_off()
        else:
            _whole(axes.xaxis)
        _legend(figure, axes)
        return figure


def _curve(axes: Axes, curve: Curve) -> None:
    """Draw a curve, its band, and the thin lines beneath."""
    tint = colour(curve.slot)
    for row in curve.thin:
        axes.plot(curve.x, row, color=tint, lw=0.7, alpha=0.35, zorder=1.6)
    means, spreads = _over_seeds(curve.values)
    if len(curve.values) > 1 and not curve.dashed:  # a second band of one colour says nothing
        low = [m - s for m, s in zip(means, spreads, strict=True)]
        high = [m + s for m, s in zip(means, spreads, strict=True)]
        axes.fill_between(curve.x, low, high, color=tint, alpha=0.18, lw=0, zorder=1.8)
    axes.plot(
        curve.x,
        means,
        ls="--" if curve.dashed else _STYLES[curve.slot // len(COLOURS) % 4],
        marker=_MARKERS[curve.slot % len(_MARKERS)],
        markevery=max(1, ceil(len(means) / 25)) if len(means) > 40 else 1,
        mec=PAPER,
        mew=0.7,
        color=tint,
        label="_" if curve.dashed else curve.label,
        zorder=2.5,
    )


def _over_seeds(values: Sequence[Sequence[float]]) -> tuple[list[float], list[float]]:
    """Return mean and standard deviation (n − 1) over the seeds, of those that have a value."""
    means, spreads = [], []
    for column in zip(*values, strict=True):
        there = [value for value in column if isfinite(value)]
        means.append(mean(there) if there else nan)
        spreads.append(stdev(there) if len(there) > 1 else 0.0)
    return means, spreads


def _bytes_axis(axes: Axes) -> None:
    """Make x logarithmic, with ticks such as 100 kB."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_xscale("log")
    low, high = axes.get_xlim()
    decades = log10(high / low)
    subs = (1.0,) if decades > 2.5 else (1.0, 3.0) if decades > 1.2 else (1.0, 2.0, 5.0)
    axes.xaxis.set_major_locator(LogLocator(subs=subs, numticks=9))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: size(value)))
    axes.xaxis.set_minor_formatter(NullFormatter())


def size(count: float) -> str:
    """Write a number of bytes with a unit (powers of 1000), as in ``1.5 MB``."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            break
        count /= 1000
    return f"{count:.0f} {unit}" if count >= 100 or count == int(count) else f"{count:.1f} {unit}"


def accuracy_by_round(
    curves_: Mapping[str, Sequence[tuple[int, float]]], lines: Mapping[str, float], path: Path
) -> Path:
    """Draw accuracy against rounds, with horizontal lines for what has no rounds.

    Args:
        curves_: (round, accuracy 0..1) by label.
        lines: accuracy by label.
        path: where the SVG goes.

    Returns:
        `path`.
    """
    drawn = [
        Curve(label, [x for x, _ in points], [[100 * y for _, y in points]], slot)
        for slot, (label, points) in enumerate(curves_.items())
    ]
    named = {f"{label} {100 * value:.1f}": 100 * value for label, value in lines.items()}
    figure = curves(drawn, named, xlabel="round", ylabel="test accuracy in %")
    with style():
        figure.savefig(path, metadata={"Date": None}, facecolor=PAPER)
    return path


# --- Shards ---------------------------------------------------------------------------------------


def shards(counts: Sequence[Sequence[int]], classes: Sequence[str]) -> Figure:
    """Draw how many private images of each class each client holds.

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
    figure, axes = _single(height)
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
    _whole(axes.xaxis)
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
    together = f", {each} a column" if each > 1 else ""
    above.set(xlabel=f"clients, by most frequent class{together}", ylabel="class", xticks=[])
    _class_ticks(above, classes, "y")
    sizes = [sum(row) for row in counts]
    below.hist(sizes, bins=min(25, max(5, len(set(sizes)))), color=colour(0), rwidth=0.9)
    below.set(xlabel="private images of a client", ylabel="clients")
    below.grid(axis="y")
    for axis in (below.xaxis, below.yaxis):
        _whole(axis, 5)
    return figure


def _majority(row: Sequence[int]) -> tuple[int, float]:
    """Return what clients are sorted by: the most frequent class, then the most of it first."""
    top = max(range(len(row)), key=lambda c: row[c])
    return top, -row[top] / max(1, sum(row))


def _pooled(rows: Sequence[Sequence[float]]) -> tuple[list[list[float]], int]:
    """Return at most `MOST_COLUMNS` means of so many neighbours, and how many."""
    each = ceil(len(rows) / MOST_COLUMNS)
    groups = [rows[start : start + each] for start in range(0, len(rows), each)]
    return [[mean(column) for column in zip(*group, strict=True)] for group in groups], each


# --- Maps -----------------------------------------------------------------------------------------


def soft_labels(by_class: Sequence[Sequence[float] | None], classes: Sequence[str]) -> Figure:
    """Draw the mean soft label of each class: rows of probabilities 0..1, `None` for none."""
    with style():
        many = len(classes) > 12
        figure, axes = _single(4.3)
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
    """Draw accuracies (percent) over two keys, the best point starred and the flat region framed.

    Args:
        values: ``[rows][columns]``; NaN where there is none.
        rows: the key, and its values as text, lowest first.
        columns: likewise.
        best: place of the best point, (row, column).
        flat: places of the flat region.
    """
    with style():
        high = len(rows[1])
        figure, axes = _single(min(max(2.2, 0.42 * high + 1.0), 5.5))
        there = [v for row in values for v in row if isfinite(v)]
        low, top = min(there), max(there)
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
    """Fill the cells of a map, the opacity being the share of `most`; one path a shade."""
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


# --- Clients --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Clients:
    """Accuracies (percent) of the same clients before and after, for one panel."""

    label: str
    before: Sequence[float]
    after: Sequence[float]
    slot: int = 0


def clients(panels: Sequence[Clients], *, before: str) -> Figure:
    """Draw each client's accuracy before and after, the clients sorted by the first."""
    with style():
        few = len(panels) in (1, 2, 4)
        figure, all_axes = _panels(len(panels), 2 if few else 3, height=2.4)
        for axes, panel in zip(all_axes, panels, strict=True):
            _dumbbells(axes, panel)
        figure.supxlabel("clients, by accuracy before", fontsize=SIZE)
        figure.supylabel("test accuracy in %", fontsize=SIZE)
        handles = [
            _dot(INK, "o", fill=False, label=f"before: {before}"),
            _dot(INK, "o", fill=True, label="after"),
        ]
        figure.legend(handles=handles, loc="outside upper left", ncols=2)
        return figure


def _dumbbells(axes: Axes, panel: Clients) -> None:
    order = sorted(range(len(panel.before)), key=lambda k: panel.before[k])
    x = range(len(order))
    low = [panel.before[k] for k in order]
    high = [panel.after[k] for k in order]
    tint = colour(panel.slot)
    small = max(1.6, min(5.0, 150 / len(order)))
    axes.vlines(x, low, high, color=tint, lw=min(1.6, small / 2), alpha=0.5)
    axes.plot(x, low, "o", ms=small, mfc=PAPER, mec=MUTED, mew=min(1.1, small / 4))
    axes.plot(
        x, high, _MARKERS[panel.slot % len(_MARKERS)], ms=small, color=tint, mec=PAPER, mew=0.3
    )
    axes.set_title(panel.label)
    axes.set_xlim(-0.7, len(order) - 0.3)
    axes.set_xticks(list(x) if len(order) <= 10 else [])
    if len(order) <= 10:
        axes.set_xticklabels([str(k) for k in order])
    axes.grid(axis="y")


# --- Calibration ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reliability:
    """One line of a reliability diagram: by bin, percent; NaN where a bin is empty.

    Attributes:
        label: the model, with its error.
        confidence: mean of each bin.
        accuracy: of each bin.
        share: of the answers that are in each bin, 0..1.
        kind: whose answers; gives colour and marker.
    """

    label: str
    confidence: Sequence[float]
    accuracy: Sequence[float]
    share: Sequence[float]
    kind: Literal["teacher", "aggregate", "student", "alone"]


_KINDS = {"teacher": (1, "s"), "aggregate": (2, "D"), "student": (0, "o"), "alone": (3, "^")}


def reliability(panels: Mapping[str, Sequence[Reliability]]) -> Figure:
    """Draw accuracy against confidence, a panel for each run's models."""
    with style():
        figure, all_axes = _panels(len(panels), 2, height=2.9)
        most = max(len(lines) for lines in panels.values())
        for axes, (title, lines) in zip(all_axes, panels.items(), strict=True):
            axes.plot([0, 100], [0, 100], color=MUTED, lw=1, ls=(0, (2, 2)))
            for line in lines:
                _calibration(axes, line)
            axes.set(xlim=(0, 103), xticks=(0, 50, 100), yticks=(0, 50, 100))
            axes.set_ylim(0, 103 + 17 * most)  # room for the legend
            axes.set_title(title)
            axes.grid()
            axes.legend(loc="upper left", fontsize=SIZE - 1, handlelength=1.2, borderaxespad=0.1)
        figure.supxlabel("confidence in %", fontsize=SIZE)
        figure.supylabel("accuracy in %", fontsize=SIZE)
        return figure


def _calibration(axes: Axes, line: Reliability) -> None:
    """Draw a line, its markers as large as there are answers in their bins."""
    slot, marker = _KINDS[line.kind]
    bins = zip(line.confidence, line.accuracy, line.share, strict=True)
    shown = [each for each in bins if isfinite(each[0]) and isfinite(each[1])]
    x, y, share = zip(*shown, strict=True)
    tint = COLOURS[slot]
    axes.plot(x, y, lw=1.2, color=tint, alpha=0.8)
    axes.scatter(
        x, y, s=[6 + 130 * part for part in share], marker=marker, color=tint, lw=0, zorder=3
    )
    axes.plot([], [], marker=marker, ms=4.5, lw=1.2, color=tint, label=line.label)


# --- Time -----------------------------------------------------------------------------------------


def seconds(bars: Mapping[str, Mapping[str, float]]) -> Figure:
    """Draw seconds by phase as stacked bars, the phases in the order of the first that has them."""
    with style():
        phases = list(dict.fromkeys(phase for bar in bars.values() for phase in bar))
        figure, axes = _single(max(1.9, 0.36 * len(bars) + 1.1 + 0.2 * ceil(len(phases) / 4)))
        names = list(bars)
        left = [0.0] * len(names)
        tints = [*COLOURS, MUTED, INK]
        for number, phase in enumerate(phases):
            widths = [bars[name].get(phase, 0.0) for name in names]
            axes.barh(
                range(len(names)), widths, left=left, height=0.62, label=phase,
                color=tints[number % len(tints)], ec=PAPER, lw=0.8,
            )  # fmt: skip
            left = [a + b for a, b in zip(left, widths, strict=True)]
        for place, total in enumerate(left):
            axes.annotate(
                f"{total:.1f}", (total, place), (4, 0), textcoords="offset points", va="center"
            )
        axes.set_xlim(0, max(left) * 1.12)
        axes.set_yticks(range(len(names)), names)
        axes.tick_params(axis="y", length=0)
        axes.invert_yaxis()
        axes.set_xlabel("seconds")
        axes.grid(axis="x")
        _legend(figure, axes, handlelength=1.0)
        return figure


# --- Points ---------------------------------------------------------------------------------------


def points(values: Mapping[str, Sequence[float]], *, xlabel: str) -> Figure:
    """Draw one dot a seed for each name, and a bar at the mean."""
    with style():
        figure, axes = _single(0.36 * len(values) + 1.1)
        for place, row in enumerate(values.values()):
            tint, marker = colour(place), _MARKERS[place % len(_MARKERS)]
            axes.plot(row, [place] * len(row), marker, color=tint, mec=PAPER, mew=0.5, ms=7)
            axes.plot([mean(row)] * 2, [place - 0.3, place + 0.3], color=INK, lw=1.4)
        axes.set_yticks(range(len(values)), list(values))
        axes.set_ylim(len(values) - 0.5, -0.5)
        axes.tick_params(axis="y", length=0)
        axes.set_xlabel(xlabel)
        axes.grid(axis="x")
        return figure


def dots(
    keys: Mapping[str, Sequence[float]], values: Sequence[float], *, best: int, flat: Sequence[int]
) -> Figure:
    """Draw accuracies (percent) of points that are no grid against each key, in a panel of its own.

    Args:
        keys: values of each point by key.
        values: accuracies of the points.
        best: number of the best point, starred.
        flat: numbers of the points that are as good, filled.
    """
    with style():
        shown = list(keys.items())[:_MOST_KEYS]
        figure, all_axes = _panels(len(shown), 2, height=2.4)
        for axes, (key, x) in zip(all_axes, shown, strict=True):
            axes.plot(x, values, "o", ms=5, mfc=PAPER, mec=MUTED)
            axes.plot([x[n] for n in flat], [values[n] for n in flat], "o", ms=5, color=COLOURS[0])
            axes.plot([x[best]], [values[best]], "*", ms=14, color=COLOURS[1], mec=PAPER)
            there = [value for value in x if isfinite(value)]
            if there and min(there) > 0 and max(there) >= 10 * min(there):
                axes.set_xscale("log")
                axes.xaxis.set_major_formatter("{x:g}")
                axes.xaxis.set_minor_formatter(lambda *_: "")
            axes.set_xlabel(key)
            axes.grid()
        figure.supylabel("held-out accuracy in %", fontsize=SIZE)
        return figure


# --- Parts ----------------------------------------------------------------------------------------


def _single(height: float) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    return figure, figure.add_subplot()


def _panels(count: int, columns: int, height: float) -> tuple[Figure, list[Axes]]:
    """Return a figure of panels on the same y axis, so many a row, and their axes."""
    from matplotlib.figure import Figure

    rows, columns = ceil(count / columns), min(count, columns)
    tall = 3.4 if count == 1 else height * rows + 0.4
    figure = Figure(figsize=(WIDTH, tall), layout="constrained")
    found = figure.subplots(rows, columns, sharey=True, squeeze=False)
    flat = [axes for row in found for axes in row]
    for axes in flat[count:]:
        axes.remove()
    return figure, flat[:count]


def _whole(axis: Axis, most: int = 9) -> None:
    """Put ticks at whole numbers only."""
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(most, integer=True, steps=[1, 2, 5, 10], min_n_ticks=1))


def _legend(figure: Figure, axes: Axes, **more: Any) -> None:
    """Put the legend above the axes, in as many columns as fit."""
    handles, labels = axes.get_legend_handles_labels()
    if not labels:
        return
    longest = max(map(len, labels))
    columns = max(1, min(4, int(72 * WIDTH / (0.56 * SIZE * longest + 38))))
    figure.set_figheight(figure.get_figheight() + _LINE * (ceil(len(labels) / columns) - 2))
    figure.legend(
        handles, labels, loc="outside upper left", ncols=columns, columnspacing=1.2, **more
    )


def _dot(tint: str, marker: str, *, fill: bool, label: str) -> Any:
    from matplotlib.lines import Line2D

    inside = tint if fill else PAPER
    return Line2D([], [], ls="", marker=marker, mfc=inside, mec=tint, ms=5, label=label)
