"""Answers of clients: soft labels, class means or weights, after attacks and privacy noise, encoded."""

from __future__ import annotations

from time import monotonic

import torch

from fedkd.clients.attacks import attacked
from fedkd.clients.privacy import privatise
from fedkd.clients.stack import Stack, known_rows, set_memory
from fedkd.errors import FedkdError
from fedkd.knowledge import ClassMeans, ModelWeights, SoftLabels, Weights
from fedkd.knowledge.codec import Packed
from fedkd.knowledge.wire import PLAIN
from fedkd.phases import MeanByClass, Predict
from fedkd.randomness import generator
from fedkd.training.profiling import timed


def answer_with_soft_labels(stack: Stack, phase: Predict) -> None:
    """Set clients' answers to a model's soft labels on the public samples asked for.

    Raises:
        FedkdError: `phase.only` names no mask in a client's state.
    """
    asked = stack.first.asked
    with timed("predict"):
        logits = stack.role(phase.model).predict(stack.data.public, asked)
        values = (logits if phase.space == "logits" else logits.softmax(-1)).cpu()
    for row, client in enumerate(stack.clients):
        labels = SoftLabels(
            values[row : row + 1],
            phase.space,
            asked,
            torch.tensor([client]),
            torch.tensor([len(stack.shards[row])]),
        )
        if phase.only is not None:
            labels = _masked(stack, row, labels, phase.only)
        stack.answers[row] = _falsified_or_noisy(stack, row, labels)


def _masked(stack: Stack, row: int, labels: SoftLabels, name: str) -> SoftLabels:
    """Return the labels of samples for which a tensor of the client's state is true."""
    mask = stack.memories[row].get("own", {}).get(name)
    shape = (len(stack.data.public),)
    if mask is None or mask.dtype != torch.bool or tuple(mask.shape) != shape:
        raise FedkdError(
            f"only = '{name}': the client's state has no such tensor of type bool and shape {shape}"
        )
    return labels.keep(mask[labels.samples])


def _falsified_or_noisy(stack: Stack, row: int, labels: SoftLabels) -> SoftLabels:
    """Return what a client sends for its honest `labels`: an attack's, or with privacy noise."""
    experiment, client = stack.experiments[row], stack.clients[row]
    round = stack.first.round
    if stack.attack(row).answer is not None:
        return attacked(labels, stack.knowledge[row], experiment, client, round)
    if not experiment.dp_noise:
        return labels
    seeded = generator(experiment.seed, "dp", client, round)
    return privatise(labels, experiment, None if stack.secret_noise else seeded)


def answer_with_means(stack: Stack, phase: MeanByClass) -> None:
    """Set clients' answers to a model's mean output by class over their private shards."""
    train, classes = stack.data.train, stack.data.num_classes
    for row, (client, shard) in enumerate(zip(stack.clients, stack.shards, strict=True)):
        outputs = stack.outputs(row, phase.model, phase.of, train, shard.to(train.device))
        member = torch.nn.functional.one_hot(stack.labels(row), classes).to(outputs.dtype)
        counts = member.sum(0)
        means = (member.T @ outputs) / counts.clamp_min(1).unsqueeze(-1)
        stack.answers[row] = ClassMeans(
            means.unsqueeze(0).cpu(),
            counts.unsqueeze(0).cpu().to(torch.int64),
            torch.tensor([client]),
            phase.of,
        )


def answer_with_weights(stack: Stack) -> None:
    """Set clients' answers to their students' parameters and buffers."""
    name = stack.architecture("student")
    state = {n: t.cpu() for n, t in stack.states.models["student"].items()}
    for k, client in enumerate(stack.clients):
        tensors = {n: t[k : k + 1].clone() for n, t in state.items()}
        weights = ModelWeights(
            tensors, torch.tensor([client]), torch.tensor([len(stack.shards[k])])
        )
        stack.answers[k] = Weights({name: weights})


def encoded_answers(stack: Stack) -> list[Packed | None]:
    """Return all answers as they are sent, `None` for those that are sent as plain tensors."""
    if stack.first.wire == PLAIN:
        return [None] * len(stack.instructions)
    started = monotonic()
    encoded = [_encoded_answer(stack, row) for row in range(len(stack.instructions))]
    stack.spend("encode", monotonic() - started)
    return encoded


def _encoded_answer(stack: Stack, row: int) -> Packed | None:
    """Return a client's soft labels encoded, or `None` for another answer."""
    answer, memory = stack.answers[row], stack.memories[row]
    if not isinstance(answer, SoftLabels):
        return None
    num_public = stack.data.sizes.num_public
    encoded, known = answer.pack(stack.first.wire, num_public, known_rows(memory, "up"))
    set_memory(memory, "up", known)
    return encoded
