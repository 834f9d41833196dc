"""Finds out from a run's records why it did not converge.

Learning is judged by the training loss on hard labels, divided by the entropy of the labels that the
model trains on: a model that knows only the class frequencies is at 1. This holds for skewed shards as
well as for even ones, so that clients which only lack classes do not count as failures. Thresholds lie
between runs that were made to fail and healthy ones; `docs/findings.md` has both.
"""

from __future__ import annotations

from math import log

from fedkd.records.results import CentralRun, Run
from fedkd.reports.findings import centralised, federated
from fedkd.reports.findings.learning import Finding, label_entropy, too_high


def findings(run: Run | CentralRun) -> list[Finding]:
    """Return why a run did not converge; empty if it did, or if too little was recorded.

    Where one cause explains the symptoms of another, only that cause is given. Only records are read.

    Raises:
        FedkdError: the run has no folder, or one without ``experiment.toml``.
    """
    finding = _of_central(run) if isinstance(run, CentralRun) else _of_federation(run)
    return [] if finding is None else [finding]


def _of_federation(run: Run) -> Finding | None:
    """Return the finding of the first rule that applies, in this order."""
    if (refused := federated.refused(run)) is not None:
        return too_high(run.experiment, refused)
    counts = run.shards
    if counts is None or run.result.get("training_accuracy") is None:
        return None
    rows = [row for row in run.rounds if row["accepted"] and row["answered"]]
    learning = federated.learning_of(run, rows, counts)
    if learning is None:
        return None
    chance = 1 / len(counts["classes"])
    nothing_below = federated.NEAR_CHANCE * chance
    nothing = run.accuracy < nothing_below
    return (
        federated.not_learning(run, rows, learning, nothing)
        or federated.left_behind(run, nothing_below)
        or federated.too_few_rounds(run, rows, learning)
        or federated.no_pupil(run, rows, learning, nothing)
        or federated.ignores_knowledge(run, rows, log(1 / chance))
    )


def _of_central(run: CentralRun) -> Finding | None:
    """Return the first finding, the teacher's first: the student distilled learns from it."""
    counts = run.shards
    if counts is None:
        return None
    experiment = run.experiment
    for model, course in run.training.items():
        if any(loss is None for losses in course["loss"] for loss in losses):
            return too_high(
                experiment, f"the loss of the {centralised.spoken(model)} is not finite"
            )
    labels = [sum(column) for column in zip(*counts["counts"], strict=True)]
    if not run.training or label_entropy(labels) < federated.ONE_CLASS:
        return None
    teacher, alone = (
        centralised.learning_of(run, model, labels) for model in ("teacher", "student-alone")
    )
    return (
        centralised.not_learning(experiment, "teacher", teacher)
        or centralised.not_learning(experiment, "student-alone", alone)
        or centralised.harmful(run, log(len(labels)))
    )
