"""A sweep as a table: a map for two keys, a list of the best points otherwise."""

from __future__ import annotations

from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.table import Table

from fedkd.keys import Scalar, kebab
from fedkd.studies.sweep.folder import Keys

SHOWN = 10
"""Points in a list; all are in the folder."""

Rows = Sequence[tuple[Keys, str]]
"""Points with the text of each."""

Axis = tuple[str, Sequence[Scalar]]
"""A key and its values."""


def as_map(title: str, rows: Rows, down: Axis, across: Axis) -> Table:
    """Return a table of all points of a grid: one key down, another across."""
    table = _empty(title)
    table.add_column(f"{kebab(down[0])} \\ {kebab(across[0])}")
    for value in across[1]:
        table.add_column(str(value), justify="right")
    for value in down[1]:
        table.add_row(str(value), *(text for keys, text in rows if keys[down[0]] == value))
    return table


def as_list(title: str, rows: Rows, keys: Sequence[str]) -> Table:
    """Return a table of points, one per row."""
    table = _empty(title)
    for key in keys:
        table.add_column(kebab(key), justify="right")
    table.add_column("accuracy", justify="right")
    for point, text in rows:
        table.add_row(*map(str, point.values()), text)
    return table


def counted(values: Sequence[object], what: str) -> str:
    """Return the number of values in words: ``3 seeds``."""
    return f"{len(values)} {what}{'s' * (len(values) != 1)}"


def _empty(title: str) -> Table:
    return Table(
        title=title, box=SIMPLE_HEAD, pad_edge=False, padding=(0, 2, 0, 0), min_width=len(title)
    )
