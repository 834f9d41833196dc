"""Learning from hard labels, and the findings shared by federations and central runs."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import log

from fedkd.experiment import Experiment
from fedkd.records.results import mean_of
from fedkd.wording import percent

UNLEARNED = 0.9
"""Late relative loss in a federation, above which clients have learnt nothing of their shards."""

LITTLE = 0.3
"""Share of the way from the most frequent class to all training images right; see `gain`."""

STILL_FALLING = 0.1
"""Relative fall of the loss in 100 steps, from which more training helps."""

FEW = 3
"""Rounds of a client, or epochs, from which a trend can be read."""

ABOVE_UNIFORM = 1.5
"""First loss, in multiples of ln C (a uniform guess), that only too large steps reach."""

VANISHED = 0.5
"""Late gradient norm relative to the first, below which units are dead."""

SHARP, SOFT = 0.1, 0.7
"""Entropy of the soft labels at τ, in multiples of ln C, of too hard and too soft labels."""

RATES = {"adam": (1e-4, 0.02, 1e-3), "adamw": (1e-4, 0.02, 1e-3), "sgd": (1e-2, 1.0, 0.1)}
"""Usual learning rates by optimiser, for SGD divided by 1 − momentum: lowest, highest, one to try."""


@dataclass(frozen=True)
class Finding:
    """A reason why a run did not converge.

    Attributes:
        kind: short and stable: ``student-too-small``, ``learning-rate-too-high``,
            ``learning-rate-too-low``, ``too-few-rounds``, ``too-few-epochs``, ``tau-too-hard`` or
            ``tau-too-soft``.
        problem: the kind in words.
        evidence: the numbers.
        suggestion: a key and a value to try.
    """

    kind: str
    problem: str
    evidence: str
    suggestion: str

    def as_json(self) -> dict[str, str]:
        """Return the fields by name."""
        return asdict(self)

    def __str__(self) -> str:
        return f"{self.problem}: {self.evidence}; try {self.suggestion}"


@dataclass(frozen=True)
class Learning:
    """The course of training on hard labels.

    Attributes:
        losses: mean loss of each round or epoch, divided by the labels' entropy.
        norms: mean gradient norm of each round or epoch.
        first: the first loss in multiples of ln C.
        steps: number of steps from one entry to the next.
        gain: see `gain`.
    """

    losses: list[float]
    norms: list[float]
    first: float
    steps: float
    gain: float

    @property
    def _window(self) -> int:
        return max(1, len(self.losses) // 3)

    @property
    def late(self) -> float:
        """Mean of the last third."""
        return mean_of(self.losses[-self._window :])

    @property
    def fall(self) -> float:
        """Relative fall of the loss in 100 steps, from the third before the last; 0 if it rose."""
        n = self._window
        before = mean_of(self.losses[-2 * n : -n]) if len(self.losses) >= 2 * n else 0.0
        if before <= 0:
            return 0.0
        ratio = self.late / before
        return float(1 - min(1.0, ratio) ** (100 / (n * self.steps)))

    @property
    def norm_ratio(self) -> float | None:
        """Gradient norm of the last third relative to the first entry."""
        n = self._window
        return (
            mean_of(self.norms[-n:]) / self.norms[0] if self.norms and self.norms[0] > 0 else None
        )

    @property
    def evidence(self) -> str:
        """The evidence of all findings about it, in words."""
        losses, ratio = self.losses, self.norm_ratio
        if len(losses) == 1:
            return f"training loss {losses[0]:.3g} times the entropy of the labels"
        norm = "" if ratio is None else f", gradient norm {ratio:.2g} times the first"
        return (
            f"training loss {losses[0]:.3g} times the entropy of the labels at first, {losses[-1]:.3g} "
            f"times at the end{norm}"
        )

    @property
    def falling(self) -> str:
        """How steeply the loss falls at the end, in words."""
        if len(self.losses) == 1:
            return ""
        return f", falling by {percent(self.fall)} in 100 steps"


def effective_rate(experiment: Experiment) -> float:
    """Return the learning rate, for SGD divided by 1 − momentum."""
    return experiment.learning_rate / (1 - experiment.momentum)


def rate_too_high(experiment: Experiment, learning: Learning) -> bool:
    """Whether steps are too large, for a model that has learnt nothing."""
    ratio = learning.norm_ratio
    return (
        effective_rate(experiment) > RATES[experiment.optimizer][1]
        or learning.first > ABOVE_UNIFORM
        or (ratio is not None and ratio < VANISHED)
    )


def too_high(experiment: Experiment, evidence: str) -> Finding:
    """Return the finding that steps are too large, with a tenth or the usual rate to try."""
    usual = RATES[experiment.optimizer][2] * (1 - experiment.momentum)
    value = min(usual, experiment.learning_rate / 10)
    return Finding(
        "learning-rate-too-high",
        "the learning rate is too high",
        f"{experiment.optimizer} at {experiment.learning_rate:g}, {evidence}",
        f"learning-rate = {value:g}",
    )


def flat(experiment: Experiment, student: str, evidence: str) -> Finding:
    """Return the finding of a loss that does not fall: too small steps, or too small a model."""
    low, _, usual = RATES[experiment.optimizer]
    if effective_rate(experiment) < low:
        return Finding(
            "learning-rate-too-low",
            "the learning rate is too low",
            f"{experiment.optimizer} at {experiment.learning_rate:g}, {evidence}",
            f"learning-rate = {usual * (1 - experiment.momentum):g}",
        )
    larger = _larger(student)
    replaced = [larger if name == student else name for name in names_of(experiment.student)]
    return Finding(
        "student-too-small",
        f"the student {student} is too small",
        evidence,
        f"student = '{','.join(replaced)}'",
    )


def too_soft(evidence: str) -> Finding:
    """Return the finding that τ blurs the soft labels."""
    return Finding("tau-too-soft", "τ is too soft", evidence, "tau = 1")


def too_hard(evidence: str) -> Finding:
    """Return the finding that τ makes the soft labels one-hot."""
    return Finding("tau-too-hard", "τ is too hard", evidence, "tau = 3")


def _larger(model: str) -> str:
    """Return the name of a model with more parameters."""
    width = re.fullmatch(r"mlp-(\d+)", model)
    if width:
        return f"mlp-{min(1000, max(20, 4 * int(width[1])))}"
    deeper = {"resnet-8": "resnet-20", "resnet-8-gn": "resnet-20-gn", "cnn": "cnn-large"}
    return deeper.get(model, "resnet-20")


def names_of(models: str) -> list[str]:
    """Return the names of models in a list separated by commas."""
    return [name.strip() for name in models.split(",")]


def label_entropy(counts: Sequence[int]) -> float:
    """Return the entropy in nats of labels with these counts."""
    total = sum(counts)
    return -sum(n / total * log(n / total) for n in counts if n)


def gain(accuracy: float, frequent: float) -> float:
    """Return how far accuracy got from the share of the most frequent class (0) to all right (1)."""
    return (accuracy - frequent) / (1 - frequent) if frequent < 1 else 1.0
