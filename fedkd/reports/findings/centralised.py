"""Rules for why the models of a central run did not converge, one per cause."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil, log

from fedkd.experiment import Experiment
from fedkd.records.results import CentralRun, mean_of
from fedkd.reports.findings.learning import (
    FEW,
    LITTLE,
    RATES,
    SHARP,
    SOFT,
    STILL_FALLING,
    UNLEARNED,
    Finding,
    Learning,
    effective_rate,
    flat,
    gain,
    label_entropy,
    rate_too_high,
    too_hard,
    too_high,
    too_soft,
)
from fedkd.wording import percent

UNLEARNED_CENTRALLY = 0.5
"""`UNLEARNED` for models that see all data and are not limited by shards."""

HARM = 0.15
"""Accuracy on its training images that a student may lose by distillation, against training alone."""


def learning_of(run: CentralRun, model: str, labels: Sequence[int]) -> Learning:
    """Return how a model trained on hard labels, on average over seeds."""
    course, h = run.training[model], label_entropy(labels)
    losses = [mean_of(epoch) for epoch in zip(*course["loss"], strict=True)]
    norms = [
        [n for n in epoch if n is not None] for epoch in zip(*course["gradient_norm"], strict=True)
    ]
    return Learning(
        [loss / h for loss in losses],
        [mean_of(epoch) for epoch in norms if epoch],
        losses[0] / log(len(labels)),
        ceil(sum(labels) / run.experiment.batch_size),
        gain(mean_of(course["accuracy"]), max(labels) / sum(labels)),
    )


def not_learning(experiment: Experiment, model: str, learning: Learning) -> Finding | None:
    """Return why a model has not learnt its training images from hard labels, or `None` if it has."""
    if learning.late <= UNLEARNED_CENTRALLY:
        return None
    nothing = learning.gain < LITTLE
    evidence = (
        f"{spoken(model)}: {learning.evidence}, {percent(learning.gain)} of the way to all "
        "training images right"
    )
    if learning.late > UNLEARNED and nothing and rate_too_high(experiment, learning):
        return too_high(experiment, evidence)
    if len(learning.losses) < FEW or learning.fall >= STILL_FALLING:
        key, epochs = (
            ("local-epochs", experiment.local_epochs)
            if model == "teacher"
            else ("distill-epochs", experiment.distill_epochs)
        )
        trend = f"{evidence}{learning.falling}"
        return Finding("too-few-epochs", "too few epochs", trend, f"{key} = {4 * epochs}")
    low = effective_rate(experiment) < RATES[experiment.optimizer][0]
    small = nothing and model != "teacher"
    return flat(experiment, experiment.student_of(0), evidence) if low or small else None


def harmful(run: CentralRun, uniform: float) -> Finding | None:
    """Return the finding of a τ with which distillation makes the student worse, if it does."""
    known = [entropy for entropy in run.soft_label_entropy_at_tau if entropy is not None]
    if len(known) < len(run.seeds):
        return None
    tau, entropy = run.experiment.tau, mean_of(known)
    alone, distilled = (
        mean_of(run.training[model]["accuracy"]) for model in ("student-alone", "student-distilled")
    )
    # Distillation also reduces overfitting to the training images, which does no harm.
    if alone - distilled < HARM or run.student_accuracy >= run.student_alone_accuracy:
        return None
    evidence = (
        f"entropy of the soft labels {entropy:.2g} at tau = {tau:g} of ln C = {uniform:.2f}, accuracy on "
        f"training images {percent(distilled)} distilled and {percent(alone)} alone"
    )
    if tau < 1 and entropy < SHARP * uniform:
        return too_hard(evidence)
    return too_soft(evidence) if tau > 1 and entropy > SOFT * uniform else None


def spoken(model: str) -> str:
    """Return the name of a model as words."""
    return model.replace("-", " ")
