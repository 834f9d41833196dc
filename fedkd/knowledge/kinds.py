"""The kinds of knowledge, and what is the same for all of them."""

from __future__ import annotations

from typing import TypeAlias

from torch import Tensor

from fedkd.errors import FedkdError
from fedkd.knowledge.class_means import ClassMeans
from fedkd.knowledge.soft_labels import SoftLabels
from fedkd.knowledge.weights import Weights

Knowledge: TypeAlias = SoftLabels | ClassMeans | Weights
KINDS = (SoftLabels, ClassMeans, Weights)

LARGEST_MEAN = 1e15
"""The largest class mean that is believed: distances to it are squared and added in float32."""

SIMPLEX_TOLERANCE = 1e-3
"""How far a row of probabilities may be from summing to 1 (float16 rounding stays below it)."""


def tensors_of(knowledge: Knowledge) -> list[Tensor]:
    """Return the tensors of knowledge that hold values, ``[K, ...]``."""
    if isinstance(knowledge, Weights):
        return [t for part in knowledge.by_model.values() for t in part.tensors.values()]
    return [knowledge.values]


def require_one(knowledge: Knowledge) -> None:
    """Refuse knowledge of several clients where one peer's copy is wanted.

    Raises:
        FedkdError: K is not 1.
    """
    parts = tensors_of(knowledge)
    if any(len(part) != 1 for part in parts):
        raise FedkdError(
            f"knowledge of {len(parts[0])} clients cannot be sent to one: aggregate it, or override "
            "personalise"
        )


def check_answer(answer: Knowledge) -> None:
    """Refuse values that would poison an aggregate.

    Raises:
        FedkdError: not finite, or probabilities off the simplex; the text says which.
    """
    if not all(bool(t.isfinite().all()) for t in tensors_of(answer)):
        raise FedkdError("holds NaN or infinity")
    if isinstance(answer, SoftLabels) and answer.space == "probabilities":
        _check_simplex(answer.values[answer.mask])
    if isinstance(answer, ClassMeans):
        if bool((answer.counts < 0).any()):
            raise FedkdError("holds negative counts")
        if bool((answer.values.abs() > LARGEST_MEAN).any()):
            raise FedkdError(f"holds class means beyond {LARGEST_MEAN:g}, whose squares overflow")
        if answer.of == "probabilities":
            _check_simplex(answer.values[answer.present])


def _check_simplex(rows: Tensor) -> None:
    if bool((rows < 0).any()):
        raise FedkdError("holds negative probabilities")
    off = float((rows.sum(-1) - 1).abs().amax()) if rows.numel() else 0.0
    if off > SIMPLEX_TOLERANCE:
        raise FedkdError(f"holds rows of probabilities that miss a sum of 1 by {off:.3g}")
