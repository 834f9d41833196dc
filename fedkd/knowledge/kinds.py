"""The kinds of knowledge, and the functions that work for all of them."""

from __future__ import annotations

from typing import TypeAlias, get_args

from torch import Tensor

from fedkd.errors import FedkdError
from fedkd.knowledge.class_means import ClassMeans
from fedkd.knowledge.soft_labels import SoftLabels
from fedkd.knowledge.weights import Weights

Knowledge: TypeAlias = SoftLabels | ClassMeans | Weights
"""Any kind of knowledge. A new kind is a class with the same methods that is added here."""

KINDS: tuple[type[Knowledge], ...] = get_args(Knowledge)

BY_NAME = {kind.kind: kind for kind in KINDS}
"""The kinds by their names in messages and stored files."""


def in_words(kind: type[Knowledge] | None) -> str:
    """Return the name of a kind in words, such as ``"soft labels"``; ``"nothing"`` for ``None``."""
    return "nothing" if kind is None else kind.kind.replace("-", " ")


def tensors_of(knowledge: Knowledge) -> list[Tensor]:
    """Return the tensors of knowledge that hold values, ``[K, ...]``."""
    return knowledge.value_tensors()


def require_one(knowledge: Knowledge) -> None:
    """Refuse knowledge of several clients where one client's is needed.

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
    answer.check()
