"""Loss terms of a user: with faults that a trial finds, and two that compare the samples of a batch."""

from __future__ import annotations

import random

import torch
from torch import Tensor

from fedkd.losses import Step, term


def _logits(step: Step) -> tuple[Tensor, Tensor]:
    assert step.teacher_logits is not None
    return step.logits, step.teacher_logits


def _correlation(a: Tensor, b: Tensor, dim: int) -> Tensor:
    a, b = a - a.mean(dim, keepdim=True), b - b.mean(dim, keepdim=True)
    norms: Tensor = a.norm(dim=dim) * b.norm(dim=dim)
    return (a * b).sum(dim) / (norms + 1e-8)


@term(needs="soft-labels")
def dist(step: Step) -> Tensor:
    """DIST (Huang et al. 2022), whose columns see the padding of the batch."""
    student, teacher = (z.softmax(-1) for z in _logits(step))
    return 1 - _correlation(student, teacher, -1) + (1 - _correlation(student, teacher, 0)).mean()


@term(needs="soft-labels")
def masked_dist(step: Step) -> Tensor:
    """The same over the samples alone, as one number for the batch."""
    assert step.mask is not None
    student, teacher = (z.softmax(-1) for z in _logits(step))
    real = step.mask.to(student.dtype).unsqueeze(-1)
    count = real.sum()
    rows = ((1 - _correlation(student, teacher, -1)) * real.squeeze(-1)).sum() / count
    centred = [(p - (p * real).sum(0) / count) * real for p in (student, teacher)]
    norms = [(c.square().sum(0) + 1e-12).sqrt() for c in centred]
    columns = 1 - (centred[0] * centred[1]).sum(0) / (norms[0] * norms[1] + 1e-8)
    return rows + columns.mean()


@term(needs=None)
def averaged(step: Step) -> Tensor:
    """An average over the batch, padding included."""
    return step.logits.square().mean()


@term(needs=None)
def drawing(step: Step) -> Tensor:
    """A draw."""
    return step.logits.square().sum(-1) * random.random()


@term(needs=None)
def by_value(step: Step) -> Tensor:
    """An ``if`` on a value."""
    return step.logits.square().sum(-1) * (2 if step.logits.sum() > 0 else 1)


@term(needs=None)
def of_deviation(step: Step) -> Tensor:
    """NaN for a batch of one."""
    assert step.mask is not None
    real = step.mask.to(step.logits.dtype).unsqueeze(-1)
    mean = (step.logits * real).sum(0) / real.sum()
    return ((step.logits - mean).square() * real).sum() / (real.sum() - 1)


@term(needs=None)
def detached(step: Step) -> Tensor:
    """Nothing to learn from."""
    return step.logits.detach().sum(-1)


@term(needs=None)
def of_a_number(step: Step) -> Tensor:
    """No tensor."""
    return 1.0  # type: ignore[return-value]


@term(needs=None)
def wide(step: Step) -> Tensor:
    """A value for each class."""
    return step.logits.square()


@term(needs=None)
def of_the_weights(step: Step) -> Tensor:
    """One number of the weights: as it should be."""
    return torch.stack([p.square().sum() for p in step.params.values()]).sum()


REFUSED = {
    dist: "when a batch is padded",
    averaged: "when a batch is padded",
    drawing: "another loss when it is called again",
    by_value: "when clients are stacked",
    of_deviation: "NaN or infinite for a batch of 1",
    detached: "depends on nothing that is trained",
    of_a_number: "returns a float: return a tensor",
    wide: r"returns \[5, 7\] for 5 samples",
}
