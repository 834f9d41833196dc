"""What a server believes of a client's report: everything else is refused with its reason."""

from __future__ import annotations

from dataclasses import replace

import torch

from fedkd.errors import FedkdError
from fedkd.knowledge import ClassMeans, Knowledge, SoftLabels, Weights, check_answer
from fedkd.orders import Order, Report
from fedkd.phases import ANSWERS, MeanByClass, Predict
from fedkd.world import World


def check_report(report: Report, order: Order, world: World, student: str) -> None:
    """Refuse a report that would poison the round.

    Args:
        report: as it came.
        order: what the client was asked for.
        world: its private images are counted there.
        student: architecture of its student.

    Raises:
        FedkdError: says what the client did, as in "answers samples that were not asked for".
    """
    if report.client != order.client:
        raise FedkdError(f"replies for partition {report.client}")
    if report.num_examples != (held := len(world.shards[order.client])):
        raise FedkdError(f"sends num-examples = {report.num_examples} of a partition of {held}")
    if order.evaluate == "end" and not {"accuracy", "own_accuracy"} <= set(report.metrics):
        raise FedkdError("sends no final accuracy")
    answers = [phase for phase in order.phases if isinstance(phase, ANSWERS)]
    if report.answer is not None and not answers:
        raise FedkdError("sends knowledge that nobody asked for")
    for phase in answers:
        if isinstance(phase, Predict):
            _check_labels(report.answer, phase, order)
        elif isinstance(phase, MeanByClass):
            _check_means(report, phase, world, student)
        else:
            _check_weights(report.answer, world, student)
    if report.answer is not None:
        check_answer(report.answer)


def with_known_metrics(report: Report, order: Order) -> Report:
    """Return a report without metrics that do not follow from its order.

    Raises:
        FedkdError: one of the others is not in its range.
    """
    names = [phase.name for phase in order.phases]
    shares = {"accuracy", "own_accuracy", "training_accuracy", "agreement"}
    shares |= {f"accuracy_after_{name}" for name in names}
    sizes = {f"{what}_{name}" for what in ("loss", "gradient_norm") for name in names}
    known = {n: v for n, v in report.metrics.items() if n in shares | sizes}
    for name, value in known.items():
        if name in shares and not 0 <= value <= 1:
            raise FedkdError(f"sends {name} = {value:g}, which must be 0 to 1")
    return replace(report, metrics=known)


def _check_labels(answer: Knowledge | None, phase: Predict, order: Order) -> None:
    if not isinstance(answer, SoftLabels) or answer.space != phase.space:
        raise FedkdError(f"does not send the {phase.space} that were asked for")
    if answer.samples is order.asked:  # the answer names none of its own
        return
    if not bool(torch.isin(answer.samples, order.asked).all()):
        raise FedkdError("answers samples that were not asked for")


def _check_means(report: Report, phase: MeanByClass, world: World, student: str) -> None:
    answer = report.answer
    if not isinstance(answer, ClassMeans) or answer.of != phase.of:
        raise FedkdError(f"does not send the means of its {phase.of} that were asked for")
    shape = (1, world.num_classes, means_width(phase, world, student))
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


def means_width(phase: MeanByClass, world: World, student: str) -> int:
    """Return D, the width of what is averaged by class: classes, or the student's features.

    Raises:
        FedkdError: the student has no features.
    """
    if phase.of != "features":
        return world.num_classes
    head = getattr(world.skeleton(student), "head", None)
    width = getattr(head, "in_features", None)
    if not isinstance(width, int):
        raise FedkdError(
            f"student = '{student}': its features are asked for, so it must be head(body(images)) "
            "with a torch.nn.Linear as head"
        )
    return width


def _check_weights(answer: Knowledge | None, world: World, student: str) -> None:
    if not isinstance(answer, Weights) or list(answer.by_model) != [student]:
        raise FedkdError(f"does not send the weights of {student} that were asked for")
    model = world.skeleton(student)
    reference = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    sent = answer.by_model[student].tensors
    if set(sent) != set(reference):
        raise FedkdError(f"sends other parameters than {student} has")
    for name, tensor in reference.items():
        if sent[name].shape[1:] != tensor.shape or sent[name].dtype != tensor.dtype:
            raise FedkdError(
                f"sends {name} as {sent[name].dtype} of shape {tuple(sent[name].shape[1:])}: "
                f"must be {tensor.dtype} of shape {tuple(tensor.shape)}"
            )
