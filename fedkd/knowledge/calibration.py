"""Statistics of soft labels: entropy, accuracy, calibration and confusion of classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import log
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from fedkd.knowledge.soft_labels import SoftLabels

BINS = 15
"""Bins of confidence (Guo et al. 2017, section 4)."""

HISTOGRAM_BINS = 20


def entropy(logits: Tensor) -> Tensor:
    """Return the entropy in nats of the softmax of logits ``[..., C]``: shape ``[...]``."""
    log_probabilities = logits.log_softmax(-1)
    return -(log_probabilities.exp() * log_probabilities).sum(-1)


def label_statistics(labels: SoftLabels, truth: Tensor | None, tau: float) -> dict[str, Any]:
    """Return the statistics of soft labels: the fields ``knowledge_...`` of a round's record.

    Args:
        labels: the aggregate, or those of all clients.
        truth: true classes of the public images, int64 ``[P]``, or `None` if the public set has other
            classes.
        tau: temperature at which they are digested.

    Returns:
        The fields; none without samples.
    """
    logits, samples = _flat(labels)
    if not len(samples):
        return {}
    fields: dict[str, Any] = {
        "knowledge_entropy": float(entropy(logits).mean()),
        "knowledge_entropy_at_tau": float(entropy(logits / tau).mean()),
    }
    if truth is None:
        return {**fields, "knowledge_accuracy": None, "knowledge_ece": None}
    confidences, correct = _confidences(logits, truth[samples])
    return {
        **fields,
        "knowledge_accuracy": float(correct.double().mean()),
        "knowledge_ece": expected_calibration_error(reliability(confidences, correct)),
    }


def label_details(labels: SoftLabels, truth: Tensor | None) -> dict[str, Any]:
    """Return the details of soft labels: the fields of ``knowledge.jsonl``.

    Args:
        labels: see `label_statistics`.
        truth: see `label_statistics`.
    """
    logits, samples = _flat(labels)
    probabilities, classes = logits.softmax(-1), logits.shape[-1]
    rows = probabilities.argmax(-1) if truth is None else truth[samples]
    member = one_hot(rows, classes).double()
    counts = member.sum(0)
    sums = member.T @ probabilities
    most = log(classes)  # which rounding may exceed
    entropies = entropy(logits).clamp(0, most).histc(HISTOGRAM_BINS, 0, most)
    return {
        "by_class": [
            [round(value, 6) for value in (total / count).tolist()] if count else None
            for total, count in zip(sums, counts, strict=True)
        ],
        "by": "predicted" if truth is None else "label",
        "entropy_histogram": [int(count) for count in entropies],
        "reliability": None if truth is None else reliability(*_confidences(logits, rows)),
    }


def reliability(confidences: Tensor, correct: Tensor, bins: int = BINS) -> dict[str, list[Any]]:
    """Return answers sorted into bins of confidence of equal width (Guo et al. 2017, section 2).

    Args:
        confidences: 0..1, any shape.
        correct: bool, of the same shape.
        bins: number of bins; bin m holds confidences in ((m − 1)/bins, m/bins].

    Returns:
        By bin: ``count``, and the means ``confidence`` and ``accuracy``, `None` for an empty bin.
    """
    confidences, correct = confidences.flatten().double(), correct.flatten()
    place = (confidences * bins).ceil().long().sub(1).clamp(0, bins - 1)
    count = torch.bincount(place, minlength=bins)
    sums = [
        torch.bincount(place, weights=values, minlength=bins)
        for values in (confidences, correct.double())
    ]
    confidence, accuracy = (
        [float(s / n) if n else None for s, n in zip(each, count, strict=True)] for each in sums
    )
    return {"count": count.tolist(), "confidence": confidence, "accuracy": accuracy}


def expected_calibration_error(bins: Mapping[str, Sequence[Any]]) -> float:
    """Return Σ n_m/n · |accuracy_m − confidence_m| over the bins of `reliability` (equation 3)."""
    total = sum(bins["count"])
    return float(
        sum(
            count / total * abs(accuracy - confidence)
            for count, confidence, accuracy in zip(
                bins["count"], bins["confidence"], bins["accuracy"], strict=True
            )
            if count
        )
    )


def _flat(labels: SoftLabels) -> tuple[Tensor, Tensor]:
    """Return the rows that were answered, float64 logits ``[M, C]``, and their samples ``[M]``."""
    present = labels.mask.cpu()
    samples = labels.samples.cpu().expand(present.shape)
    return labels.logits.cpu().double()[present], samples[present]


def _confidences(logits: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
    """Return the confidence of each row ``[M]``, and whether it is correct, bool ``[M]``."""
    best = logits.softmax(-1).max(-1)
    return best.values, best.indices == truth
