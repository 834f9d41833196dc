"""Write the measurements: a table in Markdown, and JSON with every sample."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median

from work import BATCH_SIZE, MACS, Work


@dataclass(frozen=True)
class Sample:
    """One process: a system at work.

    Attributes:
        system: its title.
        work: what a round was.
        repeat: from 1; the seed is `repeat` − 1.
        failure: why it did not end well, or `None`; the rest is empty then.
        round_seconds: of the measured rounds, in order.
        start_seconds: from the process's start to the end of its first round, less a median round.
        process_seconds: all of it.
        peak_bytes: largest sum of PSS over its processes, or `None` where it cannot be known.
        accuracies: mean over clients by round, the first one included.
        digest_seconds: the part of each measured round that fedkd spends on its digest.
    """

    system: str
    work: Work
    repeat: int
    failure: str | None = None
    round_seconds: list[float] = field(default_factory=list)
    start_seconds: float = 0.0
    process_seconds: float = 0.0
    peak_bytes: int | None = None
    accuracies: list[float] = field(default_factory=list)
    digest_seconds: list[float] = field(default_factory=list)


@dataclass
class Results:
    """Everything that one command has measured.

    Attributes:
        machine: what it ran on, by name.
        systems: titles, in the order of the table; the first one is the measure of the others.
        cells: the rounds, in the order of the table.
        left_out: why a system was not run, by (system, student, clients).
        matmul_flops: measured rates of a product of matrices, all threads, FLOP/s.
        samples: the processes.
        help_seconds: of ``fedkd --help``.
        start_seconds: of ``fedkd run`` up to its first training step.
    """

    machine: dict[str, str]
    systems: list[str]
    cells: list[Work]
    left_out: dict[tuple[str, str, int], str] = field(default_factory=dict)
    matmul_flops: list[float] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    help_seconds: list[float] = field(default_factory=list)
    start_seconds: list[float] = field(default_factory=list)

    def of(self, system: str, work: Work) -> list[Sample]:
        """Return the samples of a row, failed ones too."""
        return [s for s in self.samples if s.system == system and s.work == work]

    def round_seconds(self, system: str, work: Work) -> list[float]:
        """Return all measured rounds of a row."""
        return [seconds for s in self.of(system, work) for seconds in s.round_seconds]

    def write(self, path: Path) -> None:
        """Write the Markdown to `path` and all samples beside it as JSON."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(markdown(self), encoding="utf-8")
        left_out = [[*row, why] for row, why in self.left_out.items()]
        everything = {**vars(self), "left_out": left_out}
        everything["cells"] = [asdict(work) for work in self.cells]
        everything["samples"] = [asdict(sample) for sample in self.samples]
        text = json.dumps(everything, indent=1, ensure_ascii=False)
        path.with_suffix(".json").write_text(text + "\n", encoding="utf-8")


def markdown(results: Results) -> str:
    """Return the whole report."""
    parts = [
        "# The engines, side by side",
        "\n".join(f"- {name}: {value}" for name, value in results.machine.items()),
        _rate_line(results),
        _table(results),
        _agreement(results),
        _failures(results),
        _start_lines(results),
        _targets(results),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


# --- The table -----------------------------------------------------------------------------------

_HEADS = (
    "student", "K", "system", "s a round: median (min–max)", "rounds", "ms a client-round",
    "ms a client-step", "× the first row", "peak memory, GB", "start, s", "of the matmul rate",
    "accuracy",
)  # fmt: skip


def _table(results: Results) -> str:
    rows = [_row(results, system, work) for work in results.cells for system in results.systems]
    head = [f"| {' | '.join(_HEADS)} |", "|" + "---|" * len(_HEADS)]
    return "\n".join([*head, *(f"| {' | '.join(row)} |" for row in rows)])


def _row(results: Results, system: str, work: Work) -> list[str]:
    first = [work.student, f"{work.num_clients:,}", system]
    why = results.left_out.get((system, work.student, work.num_clients))
    if why is not None:
        return [*first, f"not run: {why}", *["–"] * (len(_HEADS) - len(first) - 1)]
    good = [sample for sample in results.of(system, work) if sample.failure is None]
    if not good:
        return [*first, "failed", *["–"] * (len(_HEADS) - len(first) - 1)]
    seconds = results.round_seconds(system, work)
    middle = median(seconds)
    peaks = [sample.peak_bytes for sample in good if sample.peak_bytes is not None]
    rate = median(results.matmul_flops)
    return [
        *first,
        f"{middle:.3g} ({min(seconds):.3g}–{max(seconds):.3g})",
        str(len(seconds)),
        f"{1000 * middle / work.num_clients:.2f}",
        f"{1000 * middle / work.num_clients / work.steps:.3f}",
        _times(ratio(results, system, results.systems[0], work)),
        f"{max(peaks) / 1e9:.2f}" if peaks else "–",
        f"{median(sample.start_seconds for sample in good):.1f}",
        f"{100 * work.flops / middle / rate:.1f} %",
        _accuracy(results, system, work),
    ]


def ratio(results: Results, system: str, other: str, work: Work) -> float | None:
    """Return how many times as long as the other's a system's median round takes, if both ran."""
    mine, theirs = results.round_seconds(system, work), results.round_seconds(other, work)
    return median(mine) / median(theirs) if mine and theirs else None


def _accuracy(results: Results, system: str, work: Work) -> str:
    percent = f"{100 * accuracy(results, system, work):.1f} %"
    return f"{percent} (round {last_common_round(results, work)})"


def accuracy(results: Results, system: str, work: Work) -> float:
    """Return a row's accuracy after the last round that all systems of the cell have reached."""
    last = last_common_round(results, work)
    good = [sample for sample in results.of(system, work) if sample.failure is None]
    return sum(sample.accuracies[last - 1] for sample in good) / len(good)


def last_common_round(results: Results, work: Work) -> int:
    """Return the last round for which every sample of a cell has an accuracy."""
    cell = [sample for sample in results.samples if sample.work == work and sample.failure is None]
    return min(len(sample.accuracies) for sample in cell)


def _times(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


# --- Around the table ----------------------------------------------------------------------------


def _rate_line(results: Results) -> str:
    rates = [rate / 1e9 for rate in results.matmul_flops]
    if not rates:
        return ""
    work = {work.student: work.flops / work.num_clients / 1e6 for work in reversed(results.cells)}
    useful = ", ".join(f"{name} {mega:.0f}" for name, mega in work.items() if name in MACS)
    return (
        f"Product of two 2048×2048 float32 matrices, all threads: {median(rates):.0f} GFLOP/s "
        f"({min(rates):.0f}–{max(rates):.0f}). Useful MFLOP a client-round: {useful}. Batches of "
        f"{BATCH_SIZE}. `start` is the time from the process's start to the end of its first round, "
        "less a median round; the first round is in no other figure."
    )


def _agreement(results: Results) -> str:
    """Return how far apart the systems' accuracies are."""
    parts = []
    for work in results.cells:
        ran = [s for s in results.systems if results.round_seconds(s, work)]
        values = [100 * accuracy(results, system, work) for system in ran]
        if len(values) > 1:
            where = f"{work.student} with {work.num_clients:,} clients"
            parts.append(f"{where} {max(values) - min(values):.1f}")
    if not parts:
        return ""
    return f"Largest difference of accuracy between two systems, in points: {', '.join(parts)}."


def _failures(results: Results) -> str:
    failed = [sample for sample in results.samples if sample.failure is not None]
    return "\n".join(
        f"- failed: {s.system}, {s.work.student}, {s.work.num_clients} clients, repeat {s.repeat}: "
        f"{s.failure}"
        for s in failed
    )


def _start_lines(results: Results) -> str:
    lines = []
    if results.help_seconds:
        lines.append(f"- `fedkd --help`: {_spread(results.help_seconds)} s")
    if results.start_seconds:
        lines.append(
            f"- `fedkd run`, in process, to the first training step: "
            f"{_spread(results.start_seconds)} s"
        )
    return "\n".join(lines)


def _spread(seconds: Sequence[float]) -> str:
    return f"{median(seconds):.2f} ({min(seconds):.2f}–{max(seconds):.2f})"


# --- Targets -------------------------------------------------------------------------------------


def _targets(results: Results) -> str:
    """Return a table of the targets that these cells can show."""
    rows = [row for work in results.cells for row in _aims(results, work)]
    if results.start_seconds:
        rows.append(
            ("`fedkd run` to the first training step, s", "< 6", median(results.start_seconds))
        )
    if results.help_seconds:
        rows.append(("`fedkd --help`, s", "< 0.5", median(results.help_seconds)))
    measured = [row for row in rows if row[2] is not None]
    if not measured:
        return ""
    head = "| figure | target | measured |\n|---|---|---|\n"
    return head + "\n".join(f"| {what} | {aim} | {value:.2f} |" for what, aim, value in measured)


def _aims(results: Results, work: Work) -> list[tuple[str, str, float | None]]:
    if work.dataset != "mnist":
        return []
    where = f"{work.student}, K = {work.num_clients:,}"
    first = results.systems[0]
    if work.student == "mlp-20" and work.num_clients == 50:
        return [
            (f"{where}: Flower app / cohort", "≥ 10", ratio(results, "Flower app", first, work)),
            (f"{where}: plain loop / cohort", "≥ 3", ratio(results, "plain loop", first, work)),
            (
                f"{where}: Flower app / fedkd, flower",
                "≥ 1.5",
                ratio(results, "Flower app", "fedkd, flower", work),
            ),
        ]
    if work.student.startswith("cnn") and work.num_clients == 10:
        tuned = ratio(results, "plain loop, tuned", first, work)
        return [
            (f"{where}: plain loop / cohort", "≥ 1.8", ratio(results, "plain loop", first, work)),
            (f"{where}: plain loop, tuned / cohort", "≥ 1", tuned),
        ]
    if work.student == "mlp-20" and work.num_clients == 1_000:
        return _aims_at_a_thousand(results, work)
    return []


def _aims_at_a_thousand(results: Results, work: Work) -> list[tuple[str, str, float | None]]:
    """Return the targets for K = 1,000, of the digest: other parts of a round do not grow with steps."""
    first, fifty = results.systems[0], Work.of("mlp-20", 50)
    mine, theirs = _digest_seconds(results, first, work), _digest_seconds(results, first, fifty)
    peaks = [s.peak_bytes for s in results.of(first, work) if s.peak_bytes is not None]
    return [
        (
            "mlp-20, cohort: seconds a client and step of the digest, K = 1,000 / K = 50",
            "≤ 1",
            mine / theirs if mine and theirs else None,
        ),
        ("mlp-20, K = 1,000, cohort: peak memory, GB", "< 3", max(peaks) / 1e9 if peaks else None),
    ]


def _digest_seconds(results: Results, system: str, work: Work) -> float | None:
    seconds = [d for sample in results.of(system, work) for d in sample.digest_seconds]
    return median(seconds) / work.num_clients if seconds else None
