"""A comparison as two tables that fit into 100 columns, with notes on them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import mean

from rich.box import SIMPLE_HEAD
from rich.table import Table

from fedkd.studies.comparison.entries import Difference, Entry, central_student
from fedkd.studies.comparison.methods import CENTRAL, LOCAL, label
from fedkd.studies.comparison.significance import LEAST_SEEDS
from fedkd.studies.comparison.verdicts import OF_USE, percent
from fedkd.wording import size

Cells = Mapping[str, str | None]
"""A row by column; `None` where the column does not apply."""


def accuracy_table(entries: Sequence[Entry], title: str, reference: str) -> Table:
    """Return accuracies in percent and differences in percentage points, one row per method.

    ``worst decile`` is of the clients that are worst off, ``gap`` is the gap closed. The server has a
    column where its model differs from the clients'.
    """
    rows = [{**_accuracy_cells(entry, reference)} for entry in entries]
    if _about_gap(entries):
        rows = [
            {**row, "gap": "n/a" if _may_close_gap(entry) else None}
            for row, entry in zip(rows, entries, strict=True)
        ]
    if all(abs(mean(e.server_accuracies or e.accuracies) - e.accuracy) < 1e-9 for e in entries):
        rows = [{**row, "server": None} for row in rows]
    return _table(title, rows)


def cost_table(entries: Sequence[Entry], title: str, target: float | None) -> Table:
    """Return payload bytes, rounds and bytes to the target, and seconds, one row per method."""
    return _table(title, [_cost_cells(entry, target) for entry in entries])


def _accuracy_cells(entry: Entry, reference: str) -> dict[str, str | None]:
    spread = "" if entry.spread is None else f" ± {100 * entry.spread:.1f}"
    servers = entry.server_accuracies
    return {
        "method": entry.label,
        "accuracy": f"{100 * entry.accuracy:.1f}{spread}",
        "worst decile": None if entry.worst_decile is None else f"{100 * entry.worst_decile:.1f}",
        "server": f"{100 * mean(servers):.1f}" if servers else None,
        "gap": _gap_cell(entry),
        **_difference_cells(entry.difference, f"− {label(reference)}"),
    }


def _gap_cell(entry: Entry) -> str | None:
    """Return the gap closed, with its interval if it has one; ``n/a`` where that is unbounded."""
    if entry.gap_closed is None:
        return None
    if entry.gap_low is None or entry.gap_high is None:
        enough = len(entry.accuracies) >= LEAST_SEEDS
        return "n/a" if enough else _minus(f"{100 * entry.gap_closed:.0f} %")
    ends = f"{100 * entry.gap_low:.0f} to {100 * entry.gap_high:.0f}"
    return _minus(f"{100 * entry.gap_closed:.0f} % ({ends})")


def _difference_cells(difference: Difference | None, column: str) -> dict[str, str | None]:
    if difference is None:
        return {column: None, "95 % interval": None, "p (Holm)": None}
    low, high, p = difference.low, difference.high, difference.p_holm
    unknown = None if len(difference.by_seed) < LEAST_SEEDS else "n/a"
    return {
        column: _signed(difference.mean),
        "95 % interval": unknown
        if low is None or high is None
        else f"{_signed(low)} to {_signed(high)}",
        "p (Holm)": unknown if p is None else "<0.001" if p < 0.001 else f"{p:.3f}",
    }


def _signed(difference: float) -> str:
    """Return a difference in percentage points as text."""
    return _minus(f"{100 * difference:+.1f}")


def _minus(text: str) -> str:
    return text.replace("-", "−")


def _cost_cells(entry: Entry, target: float | None) -> dict[str, str | None]:
    to = "" if target is None else f"to {percent(target)}"
    reach = _reach_cells(entry) if target is not None else (None, None)
    return {
        "method": entry.label,
        "up": None if entry.bytes_up is None else size(entry.bytes_up),
        "down": None if entry.bytes_down is None else size(entry.bytes_down),
        f"rounds {to}": reach[0],
        f"bytes {to}": reach[1],
        "seconds": f"{entry.seconds:.1f}",
    }


def _reach_cells(entry: Entry) -> tuple[str | None, str | None]:
    """Return rounds and bytes to the target as text, means over the seeds if all reach it."""
    if entry.rounds_to_target is None or entry.bytes_to_target is None:
        return None, None
    rounds = [count for count in entry.rounds_to_target if count is not None]
    if len(rounds) < len(entry.rounds_to_target):
        return (
            f"{len(rounds)} of {len(entry.rounds_to_target)} seeds" if rounds else "never"
        ), None
    payload = mean(count for count in entry.bytes_to_target if count is not None)
    return f"{mean(rounds):.1f}".removesuffix(".0"), size(payload)


def _table(title: str, rows: Sequence[Cells]) -> Table:
    """Return a table of the columns that are not empty."""
    table = Table(title=title, box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    columns = [name for name in rows[0] if any(row[name] is not None for row in rows)]
    for name in columns:
        table.add_column(name, justify="left" if name == "method" else "right")
    for row in rows:
        table.add_row(*(row[name] or "–" for name in columns))
    return table


def notes(
    entries: Sequence[Entry], seeds: int, target: float | None, target_reason: str | None
) -> list[str]:
    """Return notes on the tables: what is n/a and why, and what the intervals cover."""
    remarks = [_about_interval(entries, seeds), _about_power(entries), _about_gap(entries)]
    if target is not None and target_reason is not None:
        remarks.append(f"Target {percent(target)}: {target_reason}.")
    return [note for note in remarks if note is not None]


def _about_interval(entries: Sequence[Entry], seeds: int) -> str | None:
    differences = [e.difference for e in entries if e.difference is not None]
    if not differences:
        return None
    if seeds < LEAST_SEEDS:
        return (
            f"No intervals with {seeds}: they take {LEAST_SEEDS} seeds, and {OF_USE} to be of use."
        )
    if all(difference.low is None for difference in differences):
        return "No intervals: all seeds have the same differences."
    count = len([d for d in differences if d.p_value is not None])
    holm = f", p corrected for {count} comparisons" if count > 1 else ""
    return f"Intervals and p: paired t over {seeds} seeds{holm}."


def _about_power(entries: Sequence[Entry]) -> str | None:
    """Return which differences so few seeds would miss."""
    known = [(e.difference.detectable, e.label) for e in entries
             if e.difference is not None and e.difference.detectable is not None]  # fmt: skip
    if not known:
        return None
    (least, one), (most, other) = min(known), max(known)
    said = f"{100 * most:.1f} pp ({other})"
    if len(known) > 1:
        said = f"{100 * least:.1f} pp ({one}) to {said}"
    return f"Smallest difference that so many seeds find in 4 of 5 experiments: {said}."


def _about_gap(entries: Sequence[Entry]) -> str | None:
    by_name = {entry.method: entry for entry in entries}
    low, high = by_name.get(LOCAL), central_student(entries)
    closing = [entry for entry in entries if _may_close_gap(entry)]
    is_known = any(entry.gap_closed is not None for entry in closing)
    if low is None or high is None or is_known or not closing:
        return None
    if high.accuracy > low.accuracy:
        return f"The gap closed is n/a: {high.label} or its teacher has learnt nothing."
    return (
        f"The gap closed is n/a: {high.label} ({percent(round(high.accuracy, 3))}) is not better "
        f"than {label(LOCAL)} ({percent(round(low.accuracy, 3))})."
    )


def _may_close_gap(entry: Entry) -> bool:
    return entry.method not in (*CENTRAL, LOCAL)
