"""Points and bars: clients before and after, reliability, seconds, and dots per seed or point."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil, isfinite
from statistics import mean
from typing import TYPE_CHECKING, Literal

from fedkd.reports.plots.style import (
    COLOURS,
    INK,
    MARKERS,
    MUTED,
    PAPER,
    SIZE,
    colour,
    in_panels,
    key_dot,
    legend,
    single,
    style,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MOST_KEYS = 6


@dataclass(frozen=True)
class Clients:
    """Accuracies (percent) of the same clients before and after, for one panel."""

    label: str
    before: Sequence[float]
    after: Sequence[float]
    slot: int = 0


def clients(panels: Sequence[Clients], *, before: str) -> Figure:
    """Return a figure of each client's accuracy before and after, sorted by the former."""
    with style():
        few = len(panels) in (1, 2, 4)
        figure, all_axes = in_panels(len(panels), 2 if few else 3, height=2.4)
        for axes, panel in zip(all_axes, panels, strict=True):
            _dumbbells(axes, panel)
        figure.supxlabel("clients, by accuracy before", fontsize=SIZE)
        figure.supylabel("test accuracy in %", fontsize=SIZE)
        handles = [
            key_dot(INK, "o", fill=False, label=f"before: {before}"),
            key_dot(INK, "o", fill=True, label="after"),
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
    axes.plot(x, high, MARKERS[panel.slot % len(MARKERS)], ms=small, color=tint, mec=PAPER, mew=0.3)
    axes.set_title(panel.label)
    axes.set_xlim(-0.7, len(order) - 0.3)
    axes.set_xticks(list(x) if len(order) <= 10 else [])
    if len(order) <= 10:
        axes.set_xticklabels([str(k) for k in order])
    axes.grid(axis="y")


@dataclass(frozen=True)
class Reliability:
    """One line of a reliability diagram: by bin, percent; NaN where a bin is empty.

    Attributes:
        label: the model, with its error.
        confidence: mean of each bin.
        accuracy: of each bin.
        share: share of the answers in each bin, 0..1.
        kind: the model's kind, which sets colour and marker.
    """

    label: str
    confidence: Sequence[float]
    accuracy: Sequence[float]
    share: Sequence[float]
    kind: Literal["teacher", "aggregate", "student", "alone"]


_KINDS = {"teacher": (1, "s"), "aggregate": (2, "D"), "student": (0, "o"), "alone": (3, "^")}


def reliability(panels: Mapping[str, Sequence[Reliability]]) -> Figure:
    """Return a figure of accuracy against confidence, one panel per run."""
    with style():
        figure, all_axes = in_panels(len(panels), 2, height=2.9)
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
    """Draw a line, its markers sized by the answers in their bins."""
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


def seconds(bars: Mapping[str, Mapping[str, float]]) -> Figure:
    """Return a figure of seconds by phase as stacked bars, the phases in order of appearance."""
    with style():
        phases = list(dict.fromkeys(phase for bar in bars.values() for phase in bar))
        figure, axes = single(max(1.9, 0.36 * len(bars) + 1.1 + 0.2 * ceil(len(phases) / 4)))
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
        legend(figure, axes, handlelength=1.0)
        return figure


def points(values: Mapping[str, Sequence[float]], *, xlabel: str) -> Figure:
    """Return a figure of one dot per seed for each name, and a bar at the mean."""
    with style():
        figure, axes = single(0.36 * len(values) + 1.1)
        for place, row in enumerate(values.values()):
            tint, marker = colour(place), MARKERS[place % len(MARKERS)]
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
    """Return a figure of the accuracies (percent) of a search against each key, one panel per key.

    Args:
        keys: values of each point by key.
        values: accuracies of the points.
        best: number of the best point, starred.
        flat: numbers of the points that are as good, filled.
    """
    with style():
        shown = list(keys.items())[:_MOST_KEYS]
        figure, all_axes = in_panels(len(shown), 2, height=2.4)
        for axes, (key, x) in zip(all_axes, shown, strict=True):
            axes.plot(x, values, "o", ms=5, mfc=PAPER, mec=MUTED)
            axes.plot([x[n] for n in flat], [values[n] for n in flat], "o", ms=5, color=COLOURS[0])
            axes.plot([x[best]], [values[best]], "*", ms=14, color=COLOURS[1], mec=PAPER)
            known = [value for value in x if isfinite(value)]
            if known and min(known) > 0 and max(known) >= 10 * min(known):
                axes.set_xscale("log")
                axes.xaxis.set_major_formatter("{x:g}")
                axes.xaxis.set_minor_formatter(lambda *_: "")
            axes.set_xlabel(key)
            axes.grid()
        figure.supylabel("held-out accuracy in %", fontsize=SIZE)
        return figure
