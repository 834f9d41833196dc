"""Accuracy of predicted classes, overall and by class."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


def accuracy(predicted: Tensor, labels: Tensor) -> Tensor:
    """Return the share of N images that each of K models gets right, float64 ``[K]``.

    Args:
        predicted: classes, integers ``[K, N]``.
        labels: int64 ``[N]``, on the same device; some devices know no float64.
    """
    return (predicted == labels).double().mean(1)


@dataclass(frozen=True, eq=False)
class ByClass:
    """Test results by true class: correct answers float64 ``[K, C]``, and test images ``[C]``."""

    correct: Tensor
    total: Tensor


def correct_by_class(predicted: Tensor, labels: Tensor, num_classes: int) -> ByClass:
    """Return how many predictions (integers ``[K, N]``) are correct, by true class (int64 ``[N]``).

    Both are on the CPU.
    """
    member = torch.nn.functional.one_hot(labels, num_classes).float()  # counts are exact in it
    right = (predicted == labels).float()
    return ByClass((right @ member).double(), member.sum(0).double())
