"""Accuracies of a federation by round: the mean, the server's, and each client's."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass

from fedkd.errors import FedkdError
from fedkd.records.files import Row
from fedkd.records.results import Run
from fedkd.registry import strategy_of
from fedkd.studies.comparison.entries import Counted, Point, counted, curve

Points = dict[int, float]
"""Accuracy 0..1 by round."""


def students(run: Run) -> list[Point]:
    """Return the students' mean test accuracy after each round, and the bytes until then.

    There is none if all clients withhold theirs.
    """
    return curve(run, counted_of(run)) if run.has_accuracy else []


def counted_of(run: Run) -> Counted:
    """Return which accuracy of a round is that of the closing exchange.

    For a user's strategy it is inferred from the recorded rounds: a folder may come from a third party,
    and reading it must not run code that it names.
    """
    experiment = run.experiment
    if ":" not in experiment.strategy:
        with suppress(FedkdError):  # it no longer exists
            return counted(strategy_of(experiment), has_teacher=experiment.teacher != "none")
    return _recorded(run)


def _recorded(run: Run) -> Counted:
    """Return it from the run's records alone."""
    if _ends_as_the_server(run):
        return Counted("server_accuracy", later=False, delivered=True)
    digests = any("accuracy_after_digest" in row for row in run.rounds)
    field = "accuracy_after_digest" if digests else "accuracy_after_revisit"
    return Counted(field, later=digests, delivered=digests)


def _ends_as_the_server(run: Run) -> bool:
    """Whether all clients ended with the accuracy of the server's model, if there is one."""
    final = run.server_accuracy
    known = [accuracy for accuracy in run.client_accuracy if accuracy is not None]
    return final is not None and bool(known) and all(abs(a - final) < 1e-9 for a in known)


def server(run: Run) -> Points:
    """Return the test accuracy of the server's model by round; empty where clients adopt it."""
    final = run.server_accuracy
    if final is None or _ends_as_the_server(run):
        return {}
    points = {row["round"]: row.get("server_accuracy") for row in run.rounds}
    known = {number: value for number, value in points.items() if value is not None}
    return {**known, len(run.rounds): final}


def each_client(run: Run) -> list[Points]:
    """Return accuracies by client, whose mean is `students`; empty where all adopt the server's model."""
    field = counted_of(run)
    if field.field == "server_accuracy":
        return []
    points: list[Points] = [{} for _ in run.client_accuracy]
    for row, following in zip(run.rounds, run.rounds[1:], strict=False):
        holder = following if field.later else row
        for client, value in _by_client(holder, field.field).items():
            points[client][row["round"]] = value
    for client, accuracy in enumerate(run.client_accuracy):
        if accuracy is not None:
            points[client][len(run.rounds)] = accuracy
    return points


@dataclass(frozen=True)
class Beginning:
    """Accuracies ``[K]`` of the clients' students in the first round that tested them, or `None`."""

    round: int
    accuracies: list[float | None]


def beginning(run: Run) -> Beginning | None:
    """Return the clients' first accuracies, if any round tested their students."""
    alone = run.experiment.teacher == "none"
    fields = ["accuracy_after_revisit"] if alone else []
    for row in run.rounds:
        for field in [*fields, counted_of(run).field]:
            if accuracies := _by_client(row, field):
                each = [accuracies.get(k) for k in range(len(run.client_accuracy))]
                return Beginning(row["round"], each)
    return None


def _by_client(row: Row, field: str) -> dict[int, float]:
    """Return a field's values in a round by client."""
    values = zip(row["answered"], row.get(f"client_{field}", ()), strict=False)
    return {client: value for client, value in values if value is not None}
