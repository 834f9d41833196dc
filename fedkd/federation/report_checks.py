"""Checks of a client report by the server: what does not fit the instruction is refused with a reason."""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import replace

import torch

from fedkd.clients.instructions import ClientReport, Instruction
from fedkd.data.federated import FederatedData
from fedkd.errors import FedkdError, Setting
from fedkd.knowledge import ClassMeans, Knowledge, SoftLabels, Weights, check_answer
from fedkd.phases import ANSWERING, MeanByClass, Predict
from fedkd.training.architectures import architectures_of
from fedkd.training.profiling import TIMED

LARGEST_METRIC = 3.4e38
"""The largest loss or norm that is accepted: it fits into float32."""

LONGEST_S = 1e9
"""The most seconds on a phase that are accepted."""

MOST_EVENTS = 1_000_000
"""The most failures of one kind, at one client in one round, that are accepted."""

_PARTS = ("data", "forward", "backward", "optimizer", "predict", "evaluate")


def check_report(
    report: ClientReport, instruction: Instruction, data: FederatedData, student: str
) -> None:
    """Refuse a report that would poison the round.

    Args:
        report: as it was received.
        instruction: what the client was asked for.
        data: has the sizes of the private shards.
        student: architecture of its student.

    Raises:
        FedkdError: the text says what the client did, as in "answers samples that were not asked for".
    """
    if report.client != instruction.client:
        raise FedkdError(f"replies for partition {report.client}")
    if report.round != instruction.round:
        which = f"round {report.round}" if report.round else "no round that it names"
        raise FedkdError(f"replies to {which} in round {instruction.round}")
    if report.num_examples != (held := len(data.shards[instruction.client])):
        raise FedkdError(f"sends num-examples = {report.num_examples} of a partition of {held}")
    has_tested = {"accuracy", "own_accuracy"} <= set(report.metrics) or "metrics" in report.withheld
    if instruction.evaluate == "end" and not has_tested:
        raise FedkdError("sends no final accuracy")
    answers = [phase for phase in instruction.phases if isinstance(phase, ANSWERING)]
    if report.answer is not None and not answers:
        raise FedkdError("sends knowledge that was not asked for")
    for phase in answers:
        if isinstance(phase, Predict):
            _check_labels(report.answer, phase, instruction)
        elif isinstance(phase, MeanByClass):
            _check_means(report, phase, data, student)
        else:
            _check_weights(report.answer, data, student)
    if report.answer is not None:
        check_answer(report.answer)


def with_known_numbers(report: ClientReport, instruction: Instruction) -> ClientReport:
    """Return a report with only the metrics and seconds that its instruction accounts for.

    Raises:
        FedkdError: one of these, or a count of events, is out of range.
    """
    names = [phase.name for phase in instruction.phases]
    shares = {"accuracy", "training_accuracy"} if instruction.evaluate == "end" else set()
    if instruction.evaluate != "none":
        shares |= {"own_accuracy", "agreement", *(f"accuracy_after_{name}" for name in names)}
    losses, norms = ({f"{what}_{name}" for name in names} for what in ("loss", "gradient_norm"))
    spent = {"encode", *names, *(f"{TIMED} {name}" for name in _PARTS)}
    metrics = {
        **_within(report.metrics, shares, 0, 1),
        **_within(report.metrics, losses, -LARGEST_METRIC, LARGEST_METRIC),
        **_within(report.metrics, norms, 0, LARGEST_METRIC),
    }
    _within(report.events, report.events, 0, MOST_EVENTS)
    return replace(
        report,
        metrics={name: metrics[name] for name in report.metrics if name in metrics},
        seconds=_within(report.seconds, spent, 0, LONGEST_S),
    )


def _within(
    numbers: Mapping[str, float], names: Container[str], low: float, high: float
) -> dict[str, float]:
    """Return the numbers called `names`, refusing one that is out of range."""
    selected = {name: value for name, value in numbers.items() if name in names}
    for name, value in selected.items():
        if not low <= value <= high:
            raise FedkdError(f"sends {name} = {value:g}, which must be {low:g} to {high:g}")
    return selected


def _check_labels(answer: Knowledge | None, phase: Predict, instruction: Instruction) -> None:
    if not isinstance(answer, SoftLabels) or answer.space != phase.space:
        raise FedkdError(f"does not send the {phase.space} that were asked for")
    if answer.samples is instruction.asked:  # the answer names no samples
        return
    if not bool(torch.isin(answer.samples, instruction.asked).all()):
        raise FedkdError("answers samples that were not asked for")


def _check_means(
    report: ClientReport, phase: MeanByClass, data: FederatedData, student: str
) -> None:
    answer = report.answer
    if not isinstance(answer, ClassMeans) or answer.of != phase.of:
        raise FedkdError(f"does not send the means of its {phase.of} that were asked for")
    shape = (1, data.num_classes, means_width(phase, data, student))
    if answer.values.dtype != torch.float32 or tuple(answer.values.shape) != shape:
        raise FedkdError(
            f"sends {answer.values.dtype} of shape {tuple(answer.values.shape[1:])}: must be "
            f"float32 of shape {shape[1:]}"
        )
    if int(answer.counts.sum()) != report.num_examples:
        raise FedkdError(
            f"sends counts that add up to {int(answer.counts.sum())}, with num-examples = "
            f"{report.num_examples}"
        )


def means_width(phase: MeanByClass, data: FederatedData, student: str) -> int:
    """Return D, the width of what is averaged by class: classes, or the student's features.

    Raises:
        FedkdError: the student has no features.
    """
    if phase.of != "features":
        return data.num_classes
    head = getattr(architectures_of(data).skeleton(student), "head", None)
    width = getattr(head, "in_features", None)
    if not isinstance(width, int):
        raise FedkdError(
            Setting("student", student),
            ": its features are asked for, so it must be head(body(images)) with a "
            "torch.nn.Linear as head",
        )
    return width


def _check_weights(answer: Knowledge | None, data: FederatedData, student: str) -> None:
    if not isinstance(answer, Weights) or list(answer.by_model) != [student]:
        raise FedkdError(f"does not send the weights of {student} that were asked for")
    model = architectures_of(data).skeleton(student)
    known = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    sent = answer.by_model[student].tensors
    if set(sent) != set(known):
        raise FedkdError(f"sends other parameters than {student} has")
    for name, tensor in known.items():
        if sent[name].shape[1:] != tensor.shape or sent[name].dtype != tensor.dtype:
            raise FedkdError(
                f"sends {name} as {sent[name].dtype} of shape {tuple(sent[name].shape[1:])}: "
                f"must be {tensor.dtype} of shape {tuple(tensor.shape)}"
            )
