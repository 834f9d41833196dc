"""Curves over rounds, bytes or the values of a key, with the spread over seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil, isfinite, log10, nan
from pathlib import Path
from statistics import mean, stdev
from typing import TYPE_CHECKING, Any, Literal

from fedkd.reports.plots.style import (
    COLOURS,
    MARKERS,
    MUTED,
    PAPER,
    colour,
    legend,
    single,
    style,
    whole_ticks,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_STYLES = ("-", "--", "-.", ":")

_GREYS: tuple[Any, ...] = ("-", (0, (7, 2)), (0, (3, 2)), (0, (1, 1.5)))


@dataclass(frozen=True)
class Curve:
    """One method's curve.

    Attributes:
        label: its name.
        x: ``[T]``.
        values: ``[S][T]``, one row per seed; NaN where there is none.
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


def curves(
    drawn: Sequence[Curve],
    lines: Mapping[str, float],
    *,
    xlabel: str,
    ylabel: str,
    scale: Literal["rounds", "bytes", "numbers"] = "rounds",
) -> Figure:
    """Return a figure of curves, mean ± standard deviation over seeds, and grey lines for constants."""
    with style():
        figure, axes = single(3.5)
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
            whole_ticks(axes.xaxis)
        legend(figure, axes)
        return figure


def _curve(axes: Axes, curve: Curve) -> None:
    """Draw a curve, its band, and the thin lines beneath."""
    tint = colour(curve.slot)
    for row in curve.thin:
        axes.plot(curve.x, row, color=tint, lw=0.7, alpha=0.35, zorder=1.6)
    means, spreads = _over_seeds(curve.values)
    if len(curve.values) > 1 and not curve.dashed:  # a second band of the same colour is unreadable
        low = [m - s for m, s in zip(means, spreads, strict=True)]
        high = [m + s for m, s in zip(means, spreads, strict=True)]
        axes.fill_between(curve.x, low, high, color=tint, alpha=0.18, lw=0, zorder=1.8)
    axes.plot(
        curve.x,
        means,
        ls="--" if curve.dashed else _STYLES[curve.slot // len(COLOURS) % 4],
        marker=MARKERS[curve.slot % len(MARKERS)],
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
        known = [value for value in column if isfinite(value)]
        means.append(mean(known) if known else nan)
        spreads.append(stdev(known) if len(known) > 1 else 0.0)
    return means, spreads


def _bytes_axis(axes: Axes) -> None:
    """Make x logarithmic, with ticks such as 100 kB."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_xscale("log")
    low, high = axes.get_xlim()
    decades = log10(high / low)
    subs = (1.0,) if decades > 2.5 else (1.0, 3.0) if decades > 1.2 else (1.0, 2.0, 5.0)
    axes.xaxis.set_major_locator(LogLocator(subs=subs, numticks=9))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: tick_of_bytes(value)))
    axes.xaxis.set_minor_formatter(NullFormatter())


def tick_of_bytes(count: float) -> str:
    """Return bytes as a short label of a tick: ``100 kB``, ``1.5 MB`` (powers of 1000)."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            break
        count /= 1000
    return f"{count:.0f} {unit}" if count >= 100 or count == int(count) else f"{count:.1f} {unit}"


def accuracy_by_round(
    curves_: Mapping[str, Sequence[tuple[int, float]]], lines: Mapping[str, float], path: Path
) -> Path:
    """Write a figure of accuracy by round, with horizontal lines for methods without rounds.

    Args:
        curves_: (round, accuracy 0..1) by label.
        lines: accuracy by label.
        path: the SVG file to write.

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
