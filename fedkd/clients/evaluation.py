"""Test the clients of a stack: accuracy, agreement with knowledge, and answers on the test images."""

from __future__ import annotations

from itertools import compress

import torch
from torch import Tensor

from fedkd.clients.memories import TESTED
from fedkd.clients.stack import Stack, set_memory
from fedkd.data.images import Images
from fedkd.knowledge import ClassMeans, SoftLabels
from fedkd.phases import Role
from fedkd.training.accuracy import accuracy, correct_by_class
from fedkd.training.architectures import architectures_of
from fedkd.training.cohort import Classified


def measure_agreement(stack: Stack, role: Role) -> None:
    """Record the share of digested soft labels whose class a client's model now predicts."""
    labels = [k for k in stack.knowledge if isinstance(k, SoftLabels)]
    different = {id(each): each.samples for each in labels}  # most share one
    samples = torch.cat(list(different.values())).unique()
    predicted = stack.role(role).classify(stack.data.public, samples).cpu()
    taught: dict[int, Tensor] = {}
    for metrics, each, classes in zip(stack.metrics, labels, predicted, strict=True):
        if id(each) not in taught:
            taught[id(each)] = each.values[0].max(-1).indices.cpu()
        places = torch.searchsorted(samples, each.samples)
        metrics["agreement"] = float((classes[places] == taught[id(each)]).double().mean())


def record_accuracy(stack: Stack, name: str, role: Role) -> None:
    """Record the accuracy of the models in a role after a phase."""
    predicted = _by_means(stack, role) if stack.by_means else None
    if predicted is None:
        predicted = stack.role(role).classify(stack.data.test)
    record_predicted(stack, name, predicted)


def examine(stack: Stack) -> None:
    """Test all models at the end, and keep their answers in the clients' memories for `collected`."""
    for role, cohort in stack.cohorts.items():
        trained = [role == "student" or _is_trained(stack, role, row) for row in range(len(cohort))]
        if not any(trained):
            continue
        answers = cohort.answer(stack.data.test)
        if role == "student":
            if stack.by_means:
                classes = _by_means(stack, "student").to(torch.int16)
                answers = Classified(classes, torch.full_like(answers.confidences, torch.nan))
            record_predicted(stack, "accuracy", answers.classes)
        for memory, classes, confidences in compress(
            zip(stack.memories, *answers, strict=True), trained
        ):
            tensors = {"classes": classes, "confidences": confidences.to(torch.float16)}
            set_memory(memory, f"{TESTED}{role}", tensors)
    record_training_accuracy(stack)


def _is_trained(stack: Stack, role: str, row: int) -> bool:
    """Whether a local teacher was trained: some strategies do not use it."""
    name, seed = stack.architecture(role), stack.experiments[row].seed
    initial = architectures_of(stack.data).initial_state(name, seed)
    params = stack.cohorts[role].params
    return any(not torch.equal(tensor[row], initial[name]) for name, tensor in params.items())


def record_training_accuracy(stack: Stack) -> None:
    """Record the students' accuracy on their own private images."""
    train = stack.data.train
    assert train.labels is not None
    for row, (metrics, shard) in enumerate(zip(stack.metrics, stack.shards, strict=True)):
        rows = shard.to(train.device)
        predicted = _classified(stack, row, train, rows).unsqueeze(0)
        metrics["training_accuracy"] = float(accuracy(predicted, train.labels[rows]))


def _classified(stack: Stack, row: int, images: Images, rows: Tensor) -> Tensor:
    """Return the classes ``[N]`` that a client's student predicts, by class means if it uses them."""
    means = stack.knowledge[row]
    if stack.by_means and isinstance(means, ClassMeans):
        return means.nearest(stack.outputs(row, "student", means.of, images, rows))
    return stack.cohorts["student"].only(row).classify(images, rows)[0]


def _by_means(stack: Stack, role: Role) -> Tensor:
    """Return the nearest received class mean of each test image, int64 ``[K, N]``."""
    test = stack.data.test
    means = [k for k in stack.knowledge if isinstance(k, ClassMeans)]
    return torch.stack(
        [m.nearest(stack.outputs(row, role, m.of, test, None)) for row, m in enumerate(means)]
    )


def record_predicted(stack: Stack, name: str, predicted: Tensor) -> None:
    """Record the accuracy on the test set, also weighted by the client's own label distribution.

    Args:
        stack: the clients.
        name: key of the accuracy among the metrics.
        predicted: classes ``[K, N]`` of the test images.
    """
    test, classes = stack.data.test, stack.data.num_classes
    assert test.labels is not None
    predicted, labels = predicted.cpu(), test.labels.cpu()
    right = correct_by_class(predicted, labels, classes)
    # Over the classes of the test set; a shard without any of them weights them equally.
    counts = stack.data.private_label_counts[stack.clients].double() * (right.total > 0)
    counts += (counts.sum(1, keepdim=True) == 0) * (right.total > 0)
    share = counts / counts.sum(1, keepdim=True)
    own_accuracies = (share * right.correct / right.total.clamp_min(1)).sum(1).tolist()
    accuracies = accuracy(predicted, labels).tolist()
    for metrics, a, own in zip(stack.metrics, accuracies, own_accuracies, strict=True):
        metrics[name] = a
        metrics["own_accuracy"] = min(1.0, own)  # shares add up to 1 except for rounding
