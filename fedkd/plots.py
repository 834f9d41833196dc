"""Plots, as SVG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
"""Okabe and Ito's palette, which colour-blind readers can tell apart."""


def accuracy_by_round(
    curves: Mapping[str, Sequence[tuple[int, float]]], lines: Mapping[str, float], path: Path
) -> Path:
    """Draw accuracy against rounds, with horizontal lines for what has no rounds.

    Args:
        curves: (round, accuracy 0..1) by label.
        lines: accuracy by label.
        path: where the SVG goes.

    Returns:
        `path`.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    for (label, points), colour in zip(curves.items(), COLOURS, strict=False):
        rounds, accuracies = zip(*points, strict=True)
        axes.plot(rounds, [100 * a for a in accuracies], "o-", ms=3, color=colour, label=label)
    for (label, accuracy), style in zip(lines.items(), ("--", "-.", ":"), strict=False):
        named = f"{label} {100 * accuracy:.1f}"
        axes.axhline(100 * accuracy, ls=style, lw=1, color="0.35", label=named)
    axes.set(xlabel="round", ylabel="test accuracy in %", ylim=(0, 100))
    axes.grid(alpha=0.25)
    figure.legend(loc="outside right upper", frameon=False)
    figure.savefig(path, metadata={"Date": None})
    return path
