"""The numbers of one method in a comparison, taken from its runs.

When a method reached an accuracy, and at what cost, is measured by one accuracy per round that means the
same for all methods: that of the clients' students after they have applied the round's result, as in the
closing exchange. `Counted` names the field of a method's records that holds it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import floor
from statistics import mean, stdev
from typing import Any

from fedkd.phases import Fit, Load, Phase, closing
from fedkd.records.results import CentralRun, Run, gap_closed
from fedkd.strategy import DistillationStrategy
from fedkd.studies.comparison.methods import CENTRAL, DISTILLED, LOCAL, label


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
    """Return the first point that is as accurate as `target`, or `None`."""
    return next((point for point in points if point.accuracy >= target - 1e-9), None)


@dataclass(frozen=True)
class Difference:
    """A method minus the reference, both with the same seeds.

    Attributes:
        mean: of accuracies 0..1, over seeds of the mean over clients.
        low: lower end of the 95 % interval, or `None` where it cannot be computed.
        high: upper end.
        images_won: test images on which a larger share of the method's models is right; `None` where
            runs did not keep their predictions.
        images_lost: on which a larger share of the reference's is.
        p_value: of the exact test on these two counts.
    """

    mean: float
    low: float | None
    high: float | None
    images_won: int | None = None
    images_lost: int | None = None
    p_value: float | None = None


@dataclass(frozen=True)
class Entry:
    """One method of a comparison.

    Attributes:
        method: its name, as in `CENTRAL` or of a strategy.
        accuracies: test accuracy per seed, 0..1: the mean over clients after the closing exchange, or
            of the central model.
        client_accuracies: by seed of each client, `None` for one that did not answer; `None` for a
            central model.
        worst: accuracy of the worst client, mean over seeds, or `None` for a central model.
        best: of the best client.
        server_accuracies: of the server's model per seed, where it keeps one.
        bytes_up: payload bytes of all clients over a run, mean over seeds, or `None`.
        bytes_down: likewise.
        seconds: of a run, mean over seeds.
        counted: which accuracy decides when the target is reached, or `None` for a central model.
        rounds_to_target: by seed, `None` where it is never reached; `None` for a central model or
            without a target.
        bytes_to_target: bytes up and down until then, likewise.
        gap_closed: (method − local only) / (student distilled − local only), or `None`.
        difference: to the reference, or `None` for the reference itself.
        sentence: the comparison with the reference in words, likewise.
    """

    method: str
    accuracies: list[float]
    client_accuracies: list[list[float | None]] | None
    worst: float | None
    best: float | None
    server_accuracies: list[float] | None
    bytes_up: float | None
    bytes_down: float | None
    seconds: float
    counted: Counted | None = None
    rounds_to_target: list[int | None] | None = None
    bytes_to_target: list[int | None] | None = None
    gap_closed: float | None = None
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
    return Entry(name, accuracies, None, None, None, None, None, None, seconds)


def federated_entry(name: str, runs: Sequence[Run], field: Counted) -> Entry:
    """Return the numbers of a strategy."""
    servers = [r.server_accuracy for r in runs if r.server_accuracy is not None]
    clients = [[a for a in r.client_accuracy if a is not None] for r in runs]
    return Entry(
        name,
        [r.accuracy for r in runs],
        [r.client_accuracy for r in runs],
        mean(min(each) for each in clients),
        mean(max(each) for each in clients),
        servers or None,
        mean(r.bytes_up for r in runs),
        mean(r.bytes_down for r in runs),
        mean(r.result["seconds"] for r in runs),
        field,
    )


def default_target(
    entries: Sequence[Entry], curves: Mapping[str, Sequence[Sequence[Point]]]
) -> tuple[float, str] | None:
    """Return a target accuracy in whole percent, and the reason for it.

    The highest that every method that sends anything reaches with every seed; where that is no more
    than clients reach on their own, nine tenths of the best such method's; `None` if none sends.
    """
    sending = [entry for entry in entries if entry.sent]
    if not sending:
        return None
    tops = [max(p.accuracy for p in points) for e in sending for points in curves[e.method]]
    alone = [entry.accuracy for entry in entries if entry.method == LOCAL]
    common = _whole_percent(min(tops))
    if common > max(alone, default=0.0):
        return (
            common,
            "the highest whole percent that all methods that send data reach with every seed",
        )
    best = _whole_percent(0.9 * max(entry.accuracy for entry in sending))
    return (
        best,
        "nine tenths of the best, as not all methods that send data are better than local only",
    )


def _whole_percent(share: float) -> float:
    return floor(100 * share + 1e-9) / 100


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

    There is none where the student distilled or its teacher has learnt nothing.
    """
    by_name = {entry.method: entry.accuracy for entry in entries}
    low, high = by_name.get(LOCAL), by_name.get(DISTILLED)
    lost = () if baseline is None else baseline.without_learning
    if low is None or high is None or "teacher" in lost or DISTILLED in lost:
        return list(entries)
    return [
        entry
        if entry.method in (*CENTRAL, LOCAL)
        else replace(entry, gap_closed=gap_closed(entry.accuracy, low, high))
        for entry in entries
    ]


def as_row(entry: Entry) -> dict[str, Any]:
    """Return an entry as a plain dict, for JSON and external tables."""
    plain = {
        name: vars(value) if isinstance(value, Counted | Difference) else value
        for name, value in vars(entry).items()
    }
    return {**plain, "label": entry.label, "accuracy": entry.accuracy, "spread": entry.spread}
