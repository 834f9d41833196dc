"""Rules for why a federation did not converge, one per cause."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import ceil, log
from typing import Any

from fedkd.experiment import Experiment
from fedkd.records.files import Row
from fedkd.records.results import Run, mean_of
from fedkd.reports.findings.learning import (
    FEW,
    LITTLE,
    SHARP,
    STILL_FALLING,
    UNLEARNED,
    Finding,
    Learning,
    flat,
    gain,
    label_entropy,
    names_of,
    rate_too_high,
    too_hard,
    too_high,
    too_soft,
)
from fedkd.wording import percent

HALFWAY = 0.7
"""`LITTLE` for a federation that is still learning."""

NEAR_CHANCE = 3.0
"""Test accuracy, in multiples of 1/C, below which a student has certainly learnt nothing."""

EXPLODED = 5.0
"""Late gradient norm relative to the first, after digests of logits far larger than hard labels
require."""

IGNORED, MISSED = 0.7, 0.15
"""Agreement with the digested labels (below), and accuracy by which the knowledge is better (from)."""

APART = 0.3
"""Accuracy on training images by which one architecture of several is behind the best."""

ONE_CLASS = 0.05
"""Entropy of labels in nats, below which there is hardly more than one class."""

NOT_FINITE = ("not finite", "NaN or infinity")
"""Texts in the reasons for refusing replies that hold such numbers."""


def refused(run: Run) -> str | None:
    """Return how many replies were not finite, if in some round half of them were not."""
    for row in run.rounds:
        reasons = row["dropped"].values()
        lost = [reason for reason in reasons if any(text in reason for text in NOT_FINITE)]
        if lost and 2 * len(lost) >= len(row["sampled"]):
            return (
                f"{len(lost)} of {len(row['sampled'])} replies to round {row['round']} were refused "
                f"({lost[0]})"
            )
    return None


def learning_of(run: Run, rows: Sequence[Row], counts: Mapping[str, Any]) -> Learning | None:
    """Return how students (or local teachers) trained on private images, if they did to the end."""
    entropies = [label_entropy(shard) for shard in counts["counts"]]
    trained = [row for row in rows if row.get("loss_revisit") is not None]
    if not trained or trained[-1] is not rows[-1]:
        return None
    baselines = [mean_of(entropies[k] for k in reporting(row)) for row in trained]
    if min(baselines) < ONE_CLASS:  # nothing to learn
        return None
    accuracies = run.result["client_training_accuracy"]
    known = [k for k, accuracy in enumerate(accuracies) if accuracy is not None]
    frequent = mean_of(max(counts["counts"][k]) / sum(counts["counts"][k]) for k in known)
    return Learning(
        [row["loss_revisit"] / h for row, h in zip(trained, baselines, strict=True)],
        [n for row in trained if (n := row.get("gradient_norm_revisit")) is not None],
        trained[0]["loss_revisit"] / log(len(counts["classes"])),
        _steps(run.experiment, trained, counts),
        gain(run.result["training_accuracy"], frequent),
    )


def reporting(row: Row) -> list[int]:
    """Return the clients behind a row's metrics: those that answered and do not withhold theirs."""
    withheld = row.get("withheld", {}).get("metrics", [])
    return [client for client in row["answered"] if client not in withheld]


def _steps(experiment: Experiment, rows: Sequence[Row], counts: Mapping[str, Any]) -> float:
    """Return the mean number of steps of a client in a usual round."""
    batch = experiment.batch_size
    private = mean_of(ceil(sum(shard) / batch) for shard in counts["counts"])
    steps = private * experiment.local_epochs
    if "loss_digest" in rows[-1] and counts["public"] is not None:
        digested = experiment.public_per_round or sum(counts["public"])
        steps += ceil(digested / batch) * experiment.distill_epochs
    return steps


def not_learning(
    run: Run, rows: Sequence[Row], learning: Learning, nothing: bool
) -> Finding | None:
    """Return why students learnt only their labels' frequencies, or `None` if they learnt more."""
    if learning.late <= UNLEARNED or learning.gain >= LITTLE:
        return None
    experiment = run.experiment
    evidence = (
        f"{learning.evidence}, accuracy {percent(run.result['training_accuracy'])} on own training and "
        f"{percent(run.accuracy)} on test images"
    )
    if nothing and rate_too_high(experiment, learning):
        return too_high(experiment, evidence)
    if experiment.tau > 1 and (learning.norm_ratio or 0) > EXPLODED and "loss_digest" in rows[-1]:
        at_one, at_tau = (_last(rows, f"knowledge_entropy{at}") for at in ("", "_at_tau"))
        labels = (
            ""
            if at_one is None
            else f", entropy of the soft labels {at_one:.2g} and {at_tau:.2g} at it"
        )
        return too_soft(f"tau = {experiment.tau:g}{labels}, {evidence}")
    alike = len(set(names_of(experiment.student))) == 1 and experiment.teacher == "none"
    enough = _participations(rows, experiment) >= FEW and learning.fall < STILL_FALLING
    return (
        flat(experiment, experiment.student_of(0), evidence)
        if (nothing and alike and enough)
        else None
    )


def left_behind(run: Run, nothing_below: float) -> Finding | None:
    """Return the finding of an architecture whose students learn nothing where others do, if any."""
    experiment = run.experiment
    names = list(dict.fromkeys(names_of(experiment.student)))
    accuracies: dict[str, tuple[float, float]] = {}
    for name in names:
        pairs = [
            (trained, tested)
            for k, (trained, tested) in enumerate(
                zip(run.result["client_training_accuracy"], run.client_accuracy, strict=True)
            )
            if experiment.student_of(k) == name and trained is not None and tested is not None
        ]
        if pairs:
            accuracies[name] = (mean_of(p[0] for p in pairs), mean_of(p[1] for p in pairs))
    if len(accuracies) < 2:
        return None
    worst, best = (choose(accuracies, key=lambda n: accuracies[n][0]) for choose in (min, max))
    if accuracies[best][0] - accuracies[worst][0] < APART or accuracies[worst][1] >= nothing_below:
        return None
    return flat(
        experiment,
        worst,
        f"accuracy {percent(accuracies[worst][0])} on own training and "
        f"{percent(accuracies[worst][1])} on test images, of {best} "
        f"{percent(accuracies[best][0])} and {percent(accuracies[best][1])}",
    )


def _participations(rows: Sequence[Row], experiment: Experiment) -> float:
    """Return the mean number of rounds in which a client took part."""
    return sum(len(row["answered"]) for row in rows) / experiment.num_clients


def too_few_rounds(run: Run, rows: Sequence[Row], learning: Learning) -> Finding | None:
    """Return the finding of a run that ended while its loss was high and falling, if it did."""
    experiment = run.experiment
    took_part = _participations(rows, experiment)
    begun = took_part < FEW or learning.fall >= STILL_FALLING
    if learning.late <= UNLEARNED or learning.gain >= HALFWAY or not begun:
        return None
    return Finding(
        "too-few-rounds",
        "too few rounds",
        f"{learning.evidence}{learning.falling}, "
        f"{took_part:.3g} × {learning.steps:.0f} steps per client, "
        f"accuracy {percent(run.result['training_accuracy'])} on own training and "
        f"{percent(run.accuracy)} on test images",
        f"num-server-rounds = {4 * experiment.num_server_rounds}",
    )


def no_pupil(run: Run, rows: Sequence[Row], learning: Learning, nothing: bool) -> Finding | None:
    """Return the finding of students that cannot follow local teachers which learn, if any."""
    experiment, agreement = run.experiment, _last(rows, "agreement")
    digests = sum(row.get("loss_digest") is not None for row in rows)
    if experiment.teacher == "none" or agreement is None or digests < FEW:
        return None
    if not nothing or learning.gain >= LITTLE or agreement >= 0.5 or learning.late > UNLEARNED:
        return None
    return flat(
        experiment,
        experiment.student_of(0),
        f"teachers' {learning.evidence}; "
        f"students agree with {percent(agreement)} of the digested labels, "
        f"accuracy {percent(run.result['training_accuracy'])} on own training images",
    )


def ignores_knowledge(run: Run, rows: Sequence[Row], uniform: float) -> Finding | None:
    """Return the finding of students that do not learn soft labels made one-hot by τ, if any."""
    tau = run.experiment.tau
    agreement, accuracy = _last(rows, "agreement"), _last(rows, "knowledge_accuracy")
    entropy = _last(rows, "knowledge_entropy_at_tau")
    if agreement is None or accuracy is None or entropy is None or tau >= 1:
        return None
    better = accuracy - run.accuracy
    if agreement >= IGNORED or better < MISSED or entropy > SHARP * uniform:
        return None
    return too_hard(
        f"entropy of the soft labels {entropy:.2g} at tau = {tau:g} of ln C = {uniform:.2f}, students "
        f"agree with {percent(agreement)} of them, accuracy {percent(run.accuracy)} of students and "
        f"{percent(accuracy)} of the soft labels"
    )


def _last(rows: Sequence[Row], name: str) -> float | None:
    """Return the last value of a field, if any row has one."""
    values = [row[name] for row in rows if row.get(name) is not None]
    return float(values[-1]) if values else None
