"""Why a run did not converge, as far as its own records say.

Learning is judged by the training loss on hard labels, divided by the entropy of the labels that the
model trains on: a model that knows these images' frequencies and nothing else is at 1. That is as true
of skewed shards as of even ones, so that clients which only lack classes are not taken for failures.
Thresholds lie between runs that were made to fail and healthy ones; `docs/findings.md` has both.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import ceil, log
from typing import Any

from fedkd.experiment import Experiment
from fedkd.records.files import Row, read_shards
from fedkd.records.results import CentralRun, Run

UNLEARNED = 0.9
"""Late loss in a federation, relative, above which clients have learnt nothing of their shards."""

UNLEARNED_CENTRALLY = 0.5
"""The same for models that see all data, in whose way no shard stands."""

LITTLE = 0.3
"""Share of the way from the most frequent class to all right, on own training images; see `_gain`."""

HALFWAY = 0.7
"""The same for a federation that is still learning."""

NEAR_CHANCE = 3.0
"""Test accuracy, in multiples of 1/C, below which a student has learnt nothing for sure."""

STILL_FALLING = 0.1
"""Relative fall of the loss in 100 steps from which there is more to learn."""

FEW = 3
"""Rounds of a client, or epochs, from which a trend can be read."""

ABOVE_UNIFORM = 1.5
"""First loss, in multiples of ln C (a uniform guess), that only too large steps reach."""

VANISHED = 0.5
"""Late gradient norm relative to the first: units that no image reaches any more."""

EXPLODED = 5.0
"""The same after digests of logits that are far larger than hard labels ask for."""

SHARP, SOFT = 0.1, 0.7
"""Entropy of the soft labels at τ, in multiples of ln C, of labels without and with too many hues."""

IGNORED, MISSED = 0.7, 0.15
"""Agreement with what was digested, below; and accuracy by which the knowledge is better, from."""

HARM = 0.15
"""Accuracy on own training images that distillation may cost a student, against itself alone."""

APART = 0.3
"""The same by which one architecture of several lies behind the best."""

NOT_FINITE = ("not finite", "NaN or infinity")
"""What stands in the reasons for which replies are refused that hold such numbers."""

RATES = {"adam": (1e-4, 0.02, 1e-3), "adamw": (1e-4, 0.02, 1e-3), "sgd": (1e-2, 1.0, 0.1)}
"""Ordinary learning rates by optimiser, of SGD divided by 1 − momentum: lowest, highest, one to try."""


@dataclass(frozen=True)
class Finding:
    """What kept a run from converging.

    Attributes:
        kind: short and stable: ``student-too-small``, ``learning-rate-too-high``,
            ``learning-rate-too-low``, ``too-few-rounds``, ``too-few-epochs``, ``tau-too-hard`` or
            ``tau-too-soft``.
        problem: the same in words.
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


def findings(run: Run | CentralRun) -> list[Finding]:
    """Say what kept a run from converging: nothing if all is well, or if too little was recorded.

    Where one cause explains the symptoms of another, only that cause is named. Only records are read.

    Raises:
        FedkdError: the run has no folder, or one without ``experiment.toml``.
    """
    found = _of_central(run) if isinstance(run, CentralRun) else _of_federation(run)
    return [] if found is None else [found]


# --- What both have in common ---------------------------------------------------------------------


@dataclass(frozen=True)
class _Learning:
    """How training on hard labels went.

    Attributes:
        losses: mean loss of each round or epoch, divided by the labels' entropy.
        norms: mean gradient norms of the same.
        first: the first loss in multiples of ln C.
        steps: between one entry and the next.
        gain: see `_gain`.
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
        return _mean(self.losses[-self._window :])

    @property
    def fall(self) -> float:
        """Relative fall of the loss in 100 steps, from the third before the last; 0 if it rose."""
        n = self._window
        before = _mean(self.losses[-2 * n : -n]) if len(self.losses) >= 2 * n else 0.0
        if before <= 0:
            return 0.0
        ratio = self.late / before
        return float(1 - min(1.0, ratio) ** (100 / (n * self.steps)))

    @property
    def norm_ratio(self) -> float | None:
        """Gradient norm of the last third relative to the first entry."""
        n = self._window
        return _mean(self.norms[-n:]) / self.norms[0] if self.norms and self.norms[0] > 0 else None

    @property
    def evidence(self) -> str:
        """Return what all findings about it rest on."""
        losses, ratio = self.losses, self.norm_ratio
        if len(losses) == 1:
            return f"training loss {losses[0]:.3g} times the entropy of the labels"
        norm = "" if ratio is None else f", gradient norm {ratio:.2g} times the first"
        return (
            f"training loss {losses[0]:.3g} at first and {losses[-1]:.3g} at last times the entropy of "
            f"the labels{norm}"
        )

    @property
    def falling(self) -> str:
        """Say how steeply the loss ends."""
        if len(self.losses) == 1:
            return ""
        return f", falling by {_percent(self.fall)} in 100 steps"


def _rate(experiment: Experiment) -> float:
    """Return the learning rate, of SGD with what momentum makes of it."""
    return experiment.learning_rate / (1 - experiment.momentum)


def _rate_too_high(experiment: Experiment, learning: _Learning) -> bool:
    """Say whether steps are too large for a model that has learnt nothing."""
    ratio = learning.norm_ratio
    return (
        _rate(experiment) > RATES[experiment.optimizer][1]
        or learning.first > ABOVE_UNIFORM
        or (ratio is not None and ratio < VANISHED)
    )


def _too_high(experiment: Experiment, evidence: str) -> Finding:
    usual = RATES[experiment.optimizer][2] * (1 - experiment.momentum)
    value = min(usual, experiment.learning_rate / 10)
    return Finding(
        "learning-rate-too-high",
        "the learning rate is too high",
        f"{experiment.optimizer} at {experiment.learning_rate:g}, {evidence}",
        f"learning-rate = {value:g}",
    )


def _flat(experiment: Experiment, student: str, evidence: str) -> Finding:
    """Explain a loss that stays where it is: tiny steps, or a model that cannot do better."""
    low, _, usual = RATES[experiment.optimizer]
    if _rate(experiment) < low:
        return Finding(
            "learning-rate-too-low",
            "the learning rate is too low",
            f"{experiment.optimizer} at {experiment.learning_rate:g}, {evidence}",
            f"learning-rate = {usual * (1 - experiment.momentum):g}",
        )
    larger = _larger(student)
    replaced = [larger if name == student else name for name in _names(experiment.student)]
    return Finding(
        "student-too-small",
        f"the student {student} is too small",
        evidence,
        f"student = '{','.join(replaced)}'",
    )


def _larger(model: str) -> str:
    """Name a model of more parameters."""
    width = re.fullmatch(r"mlp-(\d+)", model)
    if width:
        return f"mlp-{min(1000, max(20, 4 * int(width[1])))}"
    deeper = {"resnet-8": "resnet-20", "resnet-8-gn": "resnet-20-gn", "cnn": "cnn-large"}
    return deeper.get(model, "resnet-20")


def _names(models: str) -> list[str]:
    return [name.strip() for name in models.split(",")]


def _entropy(counts: Sequence[int]) -> float:
    """Return the entropy in nats of labels that occur so often."""
    total = sum(counts)
    return -sum(n / total * log(n / total) for n in counts if n)


def _gain(accuracy: float, frequent: float) -> float:
    """Return how far accuracy got from the share of the most frequent class (0) to all right (1)."""
    return (accuracy - frequent) / (1 - frequent) if frequent < 1 else 1.0


def _mean(values: Iterable[float]) -> float:
    listed = list(values)
    return sum(listed) / len(listed)


# --- A federation ---------------------------------------------------------------------------------


def _of_federation(run: Run) -> Finding | None:
    if (refused := _refused(run)) is not None:
        return _too_high(run.experiment, refused)
    counts = read_shards(run.path)
    if counts is None or run.result.get("training_accuracy") is None:
        return None
    rows = [row for row in run.rounds if row["accepted"] and row["answered"]]
    learning = _federated_learning(run, rows, counts)
    if learning is None:
        return None
    chance = 1 / len(counts["classes"])
    nothing = run.accuracy < NEAR_CHANCE * chance
    return (
        _not_learning(run, rows, learning, nothing)
        or _left_behind(run, nothing_below=NEAR_CHANCE * chance)
        or _too_few_rounds(run, rows, learning)
        or _no_pupil(run, rows, learning, nothing)
        or _ignores_knowledge(run, rows, log(1 / chance))
    )


def _refused(run: Run) -> str | None:
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


def _federated_learning(
    run: Run, rows: Sequence[Row], counts: Mapping[str, Any]
) -> _Learning | None:
    """Read how the students (or local teachers) trained on private images, if they did to the end."""
    entropies = [_entropy(shard) for shard in counts["counts"]]
    trained = [row for row in rows if row.get("loss_revisit") is not None]
    if not trained or trained[-1] is not rows[-1]:
        return None
    baselines = [_mean(entropies[k] for k in row["answered"]) for row in trained]
    if min(baselines) < 0.05:  # shards of one class: nothing to learn
        return None
    told = run.result["client_training_accuracy"]
    known = [k for k, accuracy in enumerate(told) if accuracy is not None]
    frequent = _mean(max(counts["counts"][k]) / sum(counts["counts"][k]) for k in known)
    return _Learning(
        [row["loss_revisit"] / h for row, h in zip(trained, baselines, strict=True)],
        [n for row in trained if (n := row.get("gradient_norm_revisit")) is not None],
        trained[0]["loss_revisit"] / log(len(counts["classes"])),
        _steps(run.experiment, trained, counts),
        _gain(run.result["training_accuracy"], frequent),
    )


def _steps(experiment: Experiment, rows: Sequence[Row], counts: Mapping[str, Any]) -> float:
    """Count the steps of a client in a usual round."""
    batch = experiment.batch_size
    private = _mean(ceil(sum(shard) / batch) for shard in counts["counts"])
    steps = private * experiment.local_epochs
    if "loss_digest" in rows[-1] and counts["public"] is not None:
        digested = experiment.public_per_round or sum(counts["public"])
        steps += ceil(digested / batch) * experiment.distill_epochs
    return steps


def _not_learning(
    run: Run, rows: Sequence[Row], learning: _Learning, nothing: bool
) -> Finding | None:
    """Explain students that know no more than their labels' frequencies."""
    if learning.late <= UNLEARNED or learning.gain >= LITTLE:
        return None
    experiment = run.experiment
    evidence = (
        f"{learning.evidence}, accuracy {_percent(run.result['training_accuracy'])} on own training and "
        f"{_percent(run.accuracy)} on test images"
    )
    if nothing and _rate_too_high(experiment, learning):
        return _too_high(experiment, evidence)
    if experiment.tau > 1 and (learning.norm_ratio or 0) > EXPLODED and "loss_digest" in rows[-1]:
        at_one, at_tau = (_last(rows, f"knowledge_entropy{at}") for at in ("", "_at_tau"))
        labels = (
            ""
            if at_one is None
            else f", entropy of the soft labels {at_one:.2g} and {at_tau:.2g} at it"
        )
        return _too_soft(f"tau = {experiment.tau:g}{labels}, {evidence}")
    alike = len(set(_names(experiment.student))) == 1 and experiment.teacher == "none"
    enough = _participations(rows, experiment) >= FEW and learning.fall < STILL_FALLING
    return (
        _flat(experiment, experiment.student_of(0), evidence)
        if (nothing and alike and enough)
        else None
    )


def _too_soft(evidence: str) -> Finding:
    return Finding("tau-too-soft", "τ is too soft", evidence, "tau = 1")


def _left_behind(run: Run, nothing_below: float) -> Finding | None:
    """Find the architecture whose students learn nothing where others do."""
    experiment = run.experiment
    names = list(dict.fromkeys(_names(experiment.student)))
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
            found[name] = (_mean(p[0] for p in pairs), _mean(p[1] for p in pairs))
    if len(found) < 2:
        return None
    worst, best = (choose(found, key=lambda n: found[n][0]) for choose in (min, max))
    if found[best][0] - found[worst][0] < APART or found[worst][1] >= nothing_below:
        return None
    return _flat(
        experiment,
        worst,
        f"accuracy {_percent(found[worst][0])} on own training and {_percent(found[worst][1])} on test "
        f"images, of {best} {_percent(found[best][0])} and {_percent(found[best][1])}",
    )


def _participations(rows: Sequence[Row], experiment: Experiment) -> float:
    """Return in how many rounds a client took part, on average."""
    return sum(len(row["answered"]) for row in rows) / experiment.num_clients


def _too_few_rounds(run: Run, rows: Sequence[Row], learning: _Learning) -> Finding | None:
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
        f"accuracy {_percent(run.result['training_accuracy'])} on own training and "
        f"{_percent(run.accuracy)} on test images",
        f"num-server-rounds = {4 * experiment.num_server_rounds}",
    )


def _no_pupil(run: Run, rows: Sequence[Row], learning: _Learning, nothing: bool) -> Finding | None:
    """Find students that cannot follow local teachers which learn."""
    experiment, agreement = run.experiment, _last(rows, "agreement")
    digests = sum(row.get("loss_digest") is not None for row in rows)
    if experiment.teacher == "none" or agreement is None or digests < FEW:
        return None
    if not nothing or learning.gain >= LITTLE or agreement >= 0.5 or learning.late > UNLEARNED:
        return None
    return _flat(
        experiment,
        experiment.student_of(0),
        f"teachers' {learning.evidence}; students agree with {_percent(agreement)} of what they digest, "
        f"accuracy {_percent(run.result['training_accuracy'])} on own training images",
    )


def _ignores_knowledge(run: Run, rows: Sequence[Row], uniform: float) -> Finding | None:
    """Find students that do not take in soft labels which τ makes one-hot."""
    tau = run.experiment.tau
    agreement, accuracy = _last(rows, "agreement"), _last(rows, "knowledge_accuracy")
    entropy = _last(rows, "knowledge_entropy_at_tau")
    if agreement is None or accuracy is None or entropy is None or tau >= 1:
        return None
    better = accuracy - run.accuracy
    if agreement >= IGNORED or better < MISSED or entropy > SHARP * uniform:
        return None
    return _too_hard(
        f"entropy of the soft labels {entropy:.2g} at tau = {tau:g} of ln C = {uniform:.2f}, students "
        f"agree with {_percent(agreement)} of them, accuracy {_percent(run.accuracy)} of students and "
        f"{_percent(accuracy)} of the soft labels"
    )


def _too_hard(evidence: str) -> Finding:
    return Finding("tau-too-hard", "τ is too hard", evidence, "tau = 3")


def _last(rows: Sequence[Row], name: str) -> float | None:
    """Return the newest value of a field, if any row has one."""
    values = [row[name] for row in rows if row.get(name) is not None]
    return float(values[-1]) if values else None


# --- The central baseline -------------------------------------------------------------------------


def _of_central(run: CentralRun) -> Finding | None:
    counts = read_shards(run.path)
    if counts is None:
        return None
    experiment = run.experiment
    for model, said in run.training.items():
        if any(loss is None for losses in said["loss"] for loss in losses):
            return _too_high(experiment, f"the loss of the {_spoken(model)} is not finite")
    labels = [sum(column) for column in zip(*counts["counts"], strict=True)]
    teacher, alone = (
        _central_learning(run, model, labels) for model in ("teacher", "student-alone")
    )
    return (
        _central_failure(experiment, "teacher", teacher)
        or _central_failure(experiment, "student-alone", alone)
        or _harmful(run, log(len(labels)))
    )


def _central_learning(run: CentralRun, model: str, labels: Sequence[int]) -> _Learning:
    said, h = run.training[model], _entropy(labels)
    losses = [_mean(epoch) for epoch in zip(*said["loss"], strict=True)]
    norms = [
        [n for n in epoch if n is not None] for epoch in zip(*said["gradient_norm"], strict=True)
    ]
    return _Learning(
        [loss / h for loss in losses],
        [_mean(epoch) for epoch in norms if epoch],
        losses[0] / log(len(labels)),
        ceil(sum(labels) / run.experiment.batch_size),
        _gain(_mean(said["accuracy"]), max(labels) / sum(labels)),
    )


def _central_failure(experiment: Experiment, model: str, learning: _Learning) -> Finding | None:
    """Explain a model that has not learnt its own training images from hard labels."""
    if learning.late <= UNLEARNED_CENTRALLY:
        return None
    nothing = learning.gain < LITTLE
    evidence = (
        f"{_spoken(model)}: {learning.evidence}, {_percent(learning.gain)} of the way to all own "
        "training images right"
    )
    if learning.late > UNLEARNED and nothing and _rate_too_high(experiment, learning):
        return _too_high(experiment, evidence)
    if len(learning.losses) < FEW or learning.fall >= STILL_FALLING:
        key, epochs = (
            ("local-epochs", experiment.local_epochs)
            if model == "teacher"
            else ("distill-epochs", experiment.distill_epochs)
        )
        said = f"{evidence}{learning.falling}"
        return Finding("too-few-epochs", "too few epochs", said, f"{key} = {4 * epochs}")
    low = _rate(experiment) < RATES[experiment.optimizer][0]
    small = nothing and model != "teacher"
    return _flat(experiment, experiment.student_of(0), evidence) if low or small else None


def _harmful(run: CentralRun, uniform: float) -> Finding | None:
    """Find a τ with which distillation costs the student what it can do alone."""
    known = [entropy for entropy in run.soft_label_entropy_at_tau if entropy is not None]
    if len(known) < len(run.seeds):
        return None
    tau, entropy = run.experiment.tau, _mean(known)
    alone, distilled = (
        _mean(run.training[model]["accuracy"]) for model in ("student-alone", "student-distilled")
    )
    # Distillation also keeps a student from learning its images by heart, which is no harm.
    if alone - distilled < HARM or run.student_accuracy >= run.student_alone_accuracy:
        return None
    evidence = (
        f"entropy of the soft labels {entropy:.2g} at tau = {tau:g} of ln C = {uniform:.2f}, accuracy on "
        f"own training images {_percent(distilled)} distilled and {_percent(alone)} alone"
    )
    if tau < 1 and entropy < SHARP * uniform:
        return _too_hard(evidence)
    return _too_soft(evidence) if tau > 1 and entropy > SOFT * uniform else None


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _spoken(model: str) -> str:
    return model.replace("-", " ")
