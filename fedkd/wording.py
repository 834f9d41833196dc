"""Numbers as text, the same wherever they are read: on a terminal, a page, a card."""

from __future__ import annotations


def percent(share: float | None) -> str:
    """Write a share in percent with one decimal, such as ``12.3 %``; ``n/a`` for none."""
    return "n/a" if share is None else f"{100 * share:.1f} %"


def plus_minus(middle: float, spread: float | None) -> str:
    """Write a number with one decimal and, where there is one, what it varies by: ``12.3 ± 0.4``."""
    return f"{middle:.1f}" if spread is None else f"{middle:.1f} ± {spread:.1f}"
