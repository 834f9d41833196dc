"""Formats numbers as text, alike for the terminal, reports and model cards."""

from __future__ import annotations


def percent(share: float | None) -> str:
    """Return a share in percent with one decimal, such as ``12.3 %``; ``n/a`` for none."""
    return "n/a" if share is None else f"{100 * share:.1f} %"


def plus_minus(middle: float, spread: float | None) -> str:
    """Return a number with one decimal and its spread, if any, as text: ``12.3 ± 0.4``."""
    return f"{middle:.1f}" if spread is None else f"{middle:.1f} ± {spread:.1f}"


def size(count: float) -> str:
    """Return a number of bytes with a unit (powers of 1000)."""
    if count < 1000:
        return f"{count:.0f} B"
    for unit in ("kB", "MB"):
        count /= 1000
        if count < 999.95:
            return f"{count:.1f} {unit}"
    return f"{count / 1000:.2f} GB"
