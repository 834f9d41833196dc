"""What kept a federation from converging: a rule for each cause."""

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
"""Test accuracy, in multiples of 1/C, below which a student has learnt nothing for sure."""

EXPLODED = 5.0
"""Late gradient norm relative to the first after digests of logits that are far larger than hard
labels ask for."""

IGNORED, MISSED = 0.7, 0.15
"""Agreement with what was digested, below; and accuracy by which the knowledge is better, from."""

APART = 0.3
"""Accuracy on own training images by which one architecture of several lies behind the best."""

NOT_FINITE = ("not finite", "NaN or infinity")
"""What stands in the reasons for which replies are refused that hold such numbers."""


def refused(run: Run) -> str | None:
    """Say how many replies were not finite, if in some round half of them were not."""
    for row in run.rounds:
        reasons = row["dropped"].values()
        lost = [reason for reason in reasons if any(said in reason for said in NOT_FINITE)]
        if 2 * len(lost) >= len(row["sampled"]):
            return (
                f"{len(lost)} of {len(row['sampled'])} replies to round {row['round']} were refused "
                f"({lost[0]})"
            )
    return None


def learning_of(run: Run, rows: Sequence[Row], counts: Mapping[str, Any]) -> Learning | None:
    """Read how the students (or local teachers) trained on private images, if they did to the end."""
    entropies = [label_entropy(shard) for shard in counts["counts"]]
    trained = [row for row in rows if row.get("loss_revisit") is not None]
    if not trained or trained[-1] is not rows[-1]:
        return None
    baselines = [mean_of(entropies[k] for k in row["answered"]) for row in trained]
    if min(baselines) < 0.05:  # shards of one class: nothing to learn
        return None
    told = run.result["client_training_accuracy"]
    known = [k for k, accuracy in enumerate(told) if accuracy is not None]
    frequent = mean_of(max(counts["counts"][k]) / sum(counts["counts"][k]) for k in known)
    return Learning(
        [row["loss_revisit"] / h for row, h in zip(trained, baselines, strict=True)],
        [n for row in trained if (n := row.get("gradient_norm_revisit")) is not None],
        trained[0]["loss_revisit"] / log(len(counts["classes"])),
        _steps(run.experiment, trained, counts),
        gain(run.result["training_accuracy"], frequent),
    )


def _steps(experiment: Experiment, rows: Sequence[Row], counts: Mapping[str, Any]) -> float:
    """Count the steps of a client in a usual round."""
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
    """Explain students that know no more than their labels' frequencies."""
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
    """Find the architecture whose students learn nothing where others do."""
    experiment = run.experiment
    names = list(dict.fromkeys(names_of(experiment.student)))
    found: dict[str, tuple[float, float]] = {}
    for name in names:
        pairs = [
            (trained, tested)
            for k, (trained, tested) in enumerate(
                zip(run.result["client_training_accuracy"], run.client_accuracy, strict=True)
            )
            if experiment.student_of(k) == name and trained is not None and tested is not None
        ]
        if pairs:
            found[name] = (mean_of(p[0] for p in pairs), mean_of(p[1] for p in pairs))
    if len(found) < 2:
        return None
    worst, best = (choose(found, key=lambda n: found[n][0]) for choose in (min, max))
    if found[best][0] - found[worst][0] < APART or found[worst][1] >= nothing_below:
        return None
    return flat(
        experiment,
        worst,
        f"accuracy {percent(found[worst][0])} on own training and {percent(found[worst][1])} on test "
        f"images, of {best} {percent(found[best][0])} and {percent(found[best][1])}",
    )


def _participations(rows: Sequence[Row], experiment: Experiment) -> float:
    """Return in how many rounds a client took part, on average."""
    return sum(len(row["answered"]) for row in rows) / experiment.num_clients


def too_few_rounds(run: Run, rows: Sequence[Row], learning: Learning) -> Finding | None:
    """Find a run that ended while its loss was still high, and falling or hardly begun."""
    experiment = run.experiment
    took_part = _participations(rows, experiment)
    begun = took_part < FEW or learning.fall >= STILL_FALLING
    if learning.late <= UNLEARNED or learning.gain >= HALFWAY or not begun:
        return None
    return Finding(
        "too-few-rounds",
        "too few rounds",
        f"{learning.evidence}{learning.falling}, {took_part:.3g} × {learning.steps:.0f} steps a client, "
        f"accuracy {percent(run.result['training_accuracy'])} on own training and "
        f"{percent(run.accuracy)} on test images",
        f"num-server-rounds = {4 * experiment.num_server_rounds}",
    )


def no_pupil(run: Run, rows: Sequence[Row], learning: Learning, nothing: bool) -> Finding | None:
    """Find students that cannot follow local teachers which learn."""
    experiment, agreement = run.experiment, _last(rows, "agreement")
    digests = sum(row.get("loss_digest") is not None for row in rows)
    if experiment.teacher == "none" or agreement is None or digests < FEW:
        return None
    if not nothing or learning.gain >= LITTLE or agreement >= 0.5 or learning.late > UNLEARNED:
        return None
    return flat(
        experiment,
        experiment.student_of(0),
        f"teachers' {learning.evidence}; students agree with {percent(agreement)} of what they digest, "
        f"accuracy {percent(run.result['training_accuracy'])} on own training images",
    )


def ignores_knowledge(run: Run, rows: Sequence[Row], uniform: float) -> Finding | None:
    """Find students that do not take in soft labels which τ makes one-hot."""
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
    """Return the newest value of a field, if any row has one."""
    values = [row[name] for row in rows if row.get(name) is not None]
    return float(values[-1]) if values else None
