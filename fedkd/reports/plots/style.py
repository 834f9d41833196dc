"""The style of all figures: width, text size, colours, markers, panels and legends.

Text is readable in a column of a page and on a phone. Colours are Okabe and Ito's, which colour-blind
readers can tell apart, and never the only distinction: each method has its own marker. Cells of maps are
one colour over the background, stronger for higher values, so that a page can show every figure in
light and in dark.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from math import ceil
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
"""Okabe and Ito's palette, without black and yellow."""

INK, MUTED, RULE, PAPER = "#1f2328", "#59636e", "#d9dee3", "#ffffff"
"""Colours of text, secondary text, grid lines, and marker edges."""

HEAT, ON_HEAT = "#0b4f8a", "#fefefe"
"""Colours of a map's cells, and of text on a full one."""

WIDTH = 5.6
"""Inches of every figure."""

SIZE = 11.0
"""Points of all text: 10 px where the figure is 370 px wide, 15 px at 570 px."""

MARKERS = "osD^vPX*"
"""One per method, by its number."""

_LINE = 1.4 * SIZE / 72
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
    """Set the common style in the block, independent of the user's settings."""
    import matplotlib as mpl

    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(_RC)
        yield


def colour(slot: int) -> str:
    """Return the colour of the method with that number."""
    return COLOURS[slot % len(COLOURS)]


# --- Parts of figures -----------------------------------------------------------------------------


def single(height: float) -> tuple[Figure, Axes]:
    """Return a figure of a height in inches, and its only axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    return figure, figure.add_subplot()


def in_panels(count: int, columns: int, height: float) -> tuple[Figure, list[Axes]]:
    """Return a figure of panels with a shared y axis, `columns` per row, and their axes."""
    from matplotlib.figure import Figure

    rows, columns = ceil(count / columns), min(count, columns)
    tall = 3.4 if count == 1 else height * rows + 0.4
    figure = Figure(figsize=(WIDTH, tall), layout="constrained")
    rows_of_axes = figure.subplots(rows, columns, sharey=True, squeeze=False)
    flat = [axes for row in rows_of_axes for axes in row]
    for axes in flat[count:]:
        axes.remove()
    return figure, flat[:count]


def whole_ticks(axis: Axis, most: int = 9) -> None:
    """Put ticks at whole numbers only."""
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(most, integer=True, steps=[1, 2, 5, 10], min_n_ticks=1))


def legend(figure: Figure, axes: Axes, **more: Any) -> None:
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


def key_dot(tint: str, marker: str, *, fill: bool, label: str) -> Any:
    """Return an entry for a legend: a marker without a line, filled or open."""
    from matplotlib.lines import Line2D

    inside = tint if fill else PAPER
    return Line2D([], [], ls="", marker=marker, mfc=inside, mec=tint, ms=5, label=label)
