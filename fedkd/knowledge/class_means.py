"""Class means: what clients make of each class on average, without a public set."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fedkd.errors import FedkdError

Output = Literal["logits", "probabilities", "features"]
"""What class means are means of."""


@dataclass(frozen=True, eq=False)
class ClassMeans:
    """What K clients' models make of each class, averaged over their private images of it.

    Attributes:
        values: ``[K, C, D]``, the mean output by class (D = C, or the width of the features); zeros
            where a client has no image of a class.
        counts: int64 ``[K, C]``, images behind each mean; 0 where a class is absent.
        clients: int64 ``[K]``, partition ids.
        of: which output.

    Raises:
        FedkdError: the shapes do not fit together.
    """

    values: Tensor
    counts: Tensor
    clients: Tensor
    of: Output

    def __post_init__(self) -> None:
        if self.values.ndim != 3 or self.counts.shape != self.values.shape[:2]:
            raise FedkdError(
                f"class means have shape {tuple(self.values.shape)} and counts "
                f"{tuple(self.counts.shape)}: must be [K, C, D] and [K, C]"
            )

    @classmethod
    def stack(cls, answers: Sequence[ClassMeans]) -> ClassMeans:
        """Join answers of one client each.

        Raises:
            FedkdError: their means have different widths.
        """
        widths = sorted({a.values.shape[-1] for a in answers})
        if len(widths) > 1:
            raise FedkdError(
                f"class means of widths {widths} cannot be joined: all students need features of one "
                "width"
            )
        return cls(
            torch.cat([a.values for a in answers]),
            torch.cat([a.counts for a in answers]),
            torch.cat([a.clients for a in answers]),
            answers[0].of,
        )

    @property
    def present(self) -> Tensor:
        """Which client has which class, bool ``[K, C]``."""
        return self.counts > 0

    def nearest(self, outputs: Tensor) -> Tensor:
        """Return the class whose mean (K = 1) is nearest to each of ``[N, D]`` outputs, int64 ``[N]``.

        By Euclidean distance; absent classes are nobody's, and of equal distances the first class wins.
        """
        means = self.values[0].to(outputs)
        exactly = "donot_use_mm_for_euclid_dist"
        distances = torch.cdist(outputs, means, compute_mode=exactly)
        absent = ~self.present[0].to(outputs.device)
        return distances.masked_fill(absent, torch.inf).argmin(-1)

    def mean(self, weights: Tensor) -> ClassMeans:
        """Average over clients, K = 1, with `weights` ``[K, C]`` that are 0 where nothing is to count.

        Accumulated in float64. A class without any weight is absent.
        """
        share = weights.double().unsqueeze(-1)
        total = (share * self.values.double()).sum(0) / share.sum(0).clamp_min(1e-300)
        counts = (self.counts * (weights > 0)).sum(0)
        return ClassMeans(
            total.to(self.values.dtype).unsqueeze(0),
            counts.unsqueeze(0),
            self.clients[:1],
            self.of,
        )
