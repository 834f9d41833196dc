"""The numbers of one method in a comparison, taken from its runs.

When a method reached an accuracy, and at what cost, is measured by one accuracy per round that means the
same for all methods: that of the clients' students after they have applied the round's result, as in the
closing exchange. `Counted` names the field of a method's records that holds it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil
from statistics import mean, stdev
from typing import Any

from fedkd.phases import Fit, Load, Phase, closing
from fedkd.records.results import CentralRun, Run, gap_closed
from fedkd.strategy import DistillationStrategy
from fedkd.studies.comparison.methods import ALONE, CENTRAL, DISTILLED, LOCAL, label
from fedkd.studies.comparison.significance import ratio_interval


@dataclass(frozen=True)
class Counted:
    """The field of ``rounds.jsonl`` that holds the students' accuracy after a round.

    Attributes:
        field: its name.
        later: whether it is in the next row, where the round's knowledge is applied.
        delivered: whether the next row's bytes down count as well: they carry that knowledge.
    """

    field: str
    later: bool
    delivered: bool


def counted(strategy: DistillationStrategy, *, has_teacher: bool) -> Counted:
    """Return which accuracy after a round is that of the closing exchange, for a strategy.

    A student that digests is tested after the digest in the next round (after its own training too if
    the closing exchange includes that), shared weights at the server, anything else where it trained.
    """
    phases = strategy.phases(2)
    end = closing(phases, strategy.closes)
    if trained := _student_fits(end, has_teacher):
        return Counted(f"accuracy_after_{trained[-1]}", later=True, delivered=True)
    if any(isinstance(phase, Load) for phase in end):
        return Counted("server_accuracy", later=False, delivered=True)
    trained = _student_fits(phases, has_teacher)
    field = f"accuracy_after_{trained[-1]}" if trained else "accuracy"
    return Counted(field, later=False, delivered=False)


def _student_fits(phases: Sequence[Phase], has_teacher: bool) -> list[str]:
    """Return the names of the phases that train the student (any model without a local teacher)."""
    fits = (phase for phase in phases if isinstance(phase, Fit))
    return [fit.name for fit in fits if fit.model == "student" or not has_teacher]


@dataclass(frozen=True)
class Point:
    """The state of a federation after a round.

    Attributes:
        round: from 1.
        accuracy: mean over clients, 0..1.
        payload: bytes of all clients until then, both ways, including what led to this accuracy.
    """

    round: int
    accuracy: float
    payload: int


def curve(run: Run, field: Counted) -> list[Point]:
    """Return a run's points: rounds that were evaluated, and after the last the closing accuracy."""
    points, spent = [], 0
    for row, following in zip(run.rounds, run.rounds[1:], strict=False):
        spent += row["bytes_up"] + row["bytes_down"]
        accuracy = (following if field.later else row).get(field.field)
        if accuracy is not None:
            coming = following["bytes_down"] if field.delivered else 0
            points.append(Point(row["round"], accuracy, spent + coming))
    points.append(Point(len(run.rounds), run.accuracy, run.bytes_up + run.bytes_down))
    return points


def reached(points: Sequence[Point], target: float) -> Point | None:
    """Return the first point from which on all are as accurate as `target`, or `None`."""
    held = None
    for point in reversed(points):
        if point.accuracy < target - 1e-9:
            break
        held = point
    return held


@dataclass(frozen=True)
class Difference:
    """A method minus the reference, both with the same seeds.

    Attributes:
        mean: of accuracies 0..1, over seeds of the mean over clients.
        by_seed: the differences of which it is the mean.
        low: lower end of the 95 % interval of the paired t over seeds, or `None` where there is none.
        high: upper end.
        p_value: of the paired t-test.
        p_holm: the same, corrected for how many differences are tested together.
        p_sign_flip: of the exact test that flips the signs of the differences.
        detectable: the smallest true difference that so many seeds would have shown in 80 % of
            experiments.
    """

    mean: float
    by_seed: list[float]
    low: float | None = None
    high: float | None = None
    p_value: float | None = None
    p_holm: float | None = None
    p_sign_flip: float | None = None
    detectable: float | None = None


@dataclass(frozen=True)
class Entry:
    """One method of a comparison.

    Attributes:
        method: its name, as in `CENTRAL` or of a strategy.
        accuracies: test accuracy per seed, 0..1: the mean over clients after the closing exchange, or
            of the central model.
        client_accuracies: by seed of each client, `None` for one that did not answer; `None` for a
            central model.
        worst_decile: mean accuracy of the tenth of the clients (at least one) that is worst off, mean
            over seeds, or `None` for a central model.
        server_accuracies: of the server's model per seed, where it keeps one.
        bytes_up: payload bytes of all clients over a run, mean over seeds, or `None`.
        bytes_down: likewise.
        seconds: of a run, mean over seeds.
        counted: which accuracy decides when the target is reached, or `None` for a central model.
        rounds_to_target: by seed, `None` where it is never reached; `None` for a central model or
            without a target.
        bytes_to_target: bytes up and down until then, likewise.
        gap_closed: (method − local only) / (central student − local only), or `None`.
        gap_low: lower end of its 95 % interval over seeds, or `None` where there is none.
        gap_high: upper end.
        gap_to: the central student, the better of the two.
        difference: to the reference, or `None` for the reference itself.
        sentence: the comparison with the reference in words, likewise.
    """

    method: str
    accuracies: list[float]
    client_accuracies: list[list[float | None]] | None
    worst_decile: float | None
    server_accuracies: list[float] | None
    bytes_up: float | None
    bytes_down: float | None
    seconds: float
    counted: Counted | None = None
    rounds_to_target: list[int | None] | None = None
    bytes_to_target: list[int | None] | None = None
    gap_closed: float | None = None
    gap_low: float | None = None
    gap_high: float | None = None
    gap_to: str | None = None
    difference: Difference | None = None
    sentence: str | None = None

    @property
    def label(self) -> str:
        """Its name in tables."""
        return label(self.method)

    @property
    def accuracy(self) -> float:
        """Mean over the seeds."""
        return mean(self.accuracies)

    @property
    def spread(self) -> float | None:
        """Standard deviation over the seeds (n − 1), or `None` for one seed."""
        return stdev(self.accuracies) if len(self.accuracies) > 1 else None

    @property
    def sent(self) -> float | None:
        """Payload bytes up and down, or `None` for a central model."""
        if self.bytes_up is None or self.bytes_down is None:
            return None
        return self.bytes_up + self.bytes_down


def central_entry(name: str, baseline: CentralRun) -> Entry:
    """Return the numbers of a method of the central baseline."""
    accuracies = {
        "teacher": baseline.teacher_accuracies,
        "student-alone": baseline.student_alone_accuracies,
        DISTILLED: baseline.student_accuracies,
    }[name]
    seconds = sum(baseline.seconds.values()) / len(accuracies)
    return Entry(name, accuracies, None, None, None, None, None, seconds)


def federated_entry(name: str, runs: Sequence[Run], field: Counted) -> Entry:
    """Return the numbers of a strategy."""
    servers = [r.server_accuracy for r in runs if r.server_accuracy is not None]
    clients = [[a for a in r.client_accuracy if a is not None] for r in runs]
    return Entry(
        name,
        [r.accuracy for r in runs],
        [r.client_accuracy for r in runs],
        mean(mean(sorted(each)[: ceil(len(each) / 10)]) for each in clients),
        servers or None,
        mean(r.bytes_up for r in runs),
        mean(r.bytes_down for r in runs),
        mean(r.result["seconds"] for r in runs),
        field,
    )


Target = float | str
"""An accuracy 0..1, or ``0.9c``: nine tenths of the central student's."""

DEFAULT_TARGET = "0.9c"


def target_of(asked: Target | None, entries: Sequence[Entry]) -> tuple[float, str | None] | None:
    """Return a target accuracy, and in words where it comes from, unless it is a number.

    Args:
        asked: fixed before the runs; `None` for `DEFAULT_TARGET`.
        entries: all methods.

    Returns:
        `None` where it is a share of the central student, and none is compared.
    """
    asked = DEFAULT_TARGET if asked is None else asked
    if not isinstance(asked, str):
        return asked, None
    central = central_student(entries)
    if central is None:
        return None
    share = float(asked.removesuffix("c"))
    # To a tenth of a point, as it is printed.
    return round(share * central.accuracy, 3), f"{share:g} of the accuracy of {central.label}"


def central_student(entries: Sequence[Entry]) -> Entry | None:
    """Return the better of the two central students, or `None` if none is compared."""
    students = [entry for entry in entries if entry.method in (ALONE, DISTILLED)]
    return max(students, key=lambda entry: entry.accuracy, default=None)


def with_target(
    entry: Entry, points: Sequence[Sequence[Point]] | None, target: float | None
) -> Entry:
    """Return an entry with the rounds and bytes at which it reached the target."""
    if points is None or target is None:
        return entry
    first = [reached(each, target) for each in points]
    return replace(
        entry,
        rounds_to_target=[None if point is None else point.round for point in first],
        bytes_to_target=[None if point is None else point.payload for point in first],
    )


def with_gaps(entries: Sequence[Entry], baseline: CentralRun | None) -> list[Entry]:
    """Return the entries with the gap that each strategy closes, where both its ends are compared.

    There is none where the central student is not better than clients on their own, or it, or the
    teacher that it learnt from, has learnt nothing.
    """
    low = next((entry for entry in entries if entry.method == LOCAL), None)
    high = central_student(entries)
    if low is None or high is None or _lost(high, baseline):
        return list(entries)
    return [
        entry if entry.method in (*CENTRAL, LOCAL) else _with_gap(entry, low, high)
        for entry in entries
    ]


def _lost(student: Entry, baseline: CentralRun | None) -> bool:
    """Whether a central student, or the teacher that it learnt from, has learnt nothing."""
    lost = () if baseline is None else baseline.without_learning
    return student.method in lost or (student.method == DISTILLED and "teacher" in lost)


def _with_gap(entry: Entry, low: Entry, high: Entry) -> Entry:
    share = gap_closed(entry.accuracy, low.accuracy, high.accuracy)
    if share is None:
        return entry
    above, below = (
        [a - b for a, b in zip(each.accuracies, low.accuracies, strict=True)]
        for each in (entry, high)
    )
    ends = ratio_interval(above, below) or (None, None)
    return replace(entry, gap_closed=share, gap_low=ends[0], gap_high=ends[1], gap_to=high.method)


def as_row(entry: Entry) -> dict[str, Any]:
    """Return an entry as a plain dict, for JSON and external tables."""
    plain = {
        name: vars(value) if isinstance(value, Counted | Difference) else value
        for name, value in vars(entry).items()
    }
    return {**plain, "label": entry.label, "accuracy": entry.accuracy, "spread": entry.spread}
