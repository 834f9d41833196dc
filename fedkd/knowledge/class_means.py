"""Class means: the mean outputs of clients by class, without a public set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from reprlib import repr as shown
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from fedkd.errors import FedkdError
from fedkd.knowledge.arrival import Arrival, Sizes, taken
from fedkd.knowledge.soft_labels import check_simplex

Output = Literal["logits", "probabilities", "features"]
"""The outputs that class means can be means of."""


@dataclass(frozen=True, eq=False)
class ClassMeans:
    """The mean outputs of K clients' models by class, over their private images.

    Attributes:
        values: ``[K, C, D]``, the mean output by class (D = C, or the width of the features); zeros
            where a client has no image of a class.
        counts: int64 ``[K, C]``, number of images in each mean; 0 where a class is absent.
        clients: int64 ``[K]``, partition ids.
        of: the output that was averaged.

    Raises:
        FedkdError: the shapes do not fit together.
    """

    kind: ClassVar[str] = "class-means"
    message_fields: ClassVar[dict[str, type]] = {"of": str}

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
        """Return the concatenation of answers of one client each.

        Raises:
            FedkdError: their means have different widths.
        """
        widths = sorted({a.values.shape[-1] for a in answers})
        if len(widths) > 1:
            raise FedkdError(
                f"class means of widths {widths} cannot be combined: all students need features of "
                "the same width"
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

        By Euclidean distance. Absent classes are never returned; of equal distances, the first class is.
        """
        means = self.values[0].to(outputs)
        exactly = "donot_use_mm_for_euclid_dist"
        distances = torch.cdist(outputs, means, compute_mode=exactly)
        absent = ~self.present[0].to(outputs.device)
        return distances.masked_fill(absent, torch.inf).argmin(-1)

    def mean(self, weights: Tensor) -> ClassMeans:
        """Return the average over clients, K = 1, with `weights` ``[K, C]``; weight 0 leaves a mean out.

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

    def value_tensors(self) -> list[Tensor]:
        """Return the tensors that hold values, ``[K, ...]``."""
        return [self.values]

    def check(self) -> None:
        """Refuse means that no client can have.

        Raises:
            FedkdError: negative counts, or probabilities off the simplex.
        """
        if bool((self.counts < 0).any()):
            raise FedkdError("holds negative counts")
        if self.of == "probabilities":
            check_simplex(self.values[self.present])

    def tensors(self) -> dict[str, Tensor]:
        """Return all tensors by name, as they are stored."""
        return {"values": self.values, "counts": self.counts, "clients": self.clients}

    def stored_fields(self) -> dict[str, Any]:
        """Return what is stored beside the tensors."""
        return {"of": self.of}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], fields: Mapping[str, Any]) -> ClassMeans:
        """Return the inverse of `tensors` and `stored_fields`."""
        return cls(of=fields["of"], **tensors)

    def to_message(self, sizes: Sizes, *, asked: bool) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return the tensors of a message, and its `message_fields`; K = 1."""
        return {"values": self.values[0], "counts": self.counts[0].to(torch.int32)}, {"of": self.of}

    @classmethod
    def from_message(
        cls, tensors: dict[str, Tensor], fields: dict[str, Any], arrival: Arrival
    ) -> ClassMeans:
        """Return the inverse of `to_message`.

        Raises:
            FedkdError: a tensor is missing, unknown, or has a wrong shape or type.
        """
        values, counts = taken(tensors, "values"), taken(tensors, "counts")
        if tensors:
            raise FedkdError(f"class means come with {shown([*tensors])}")
        if counts.dtype != torch.int32:  # sums of wider ones could overflow
            raise FedkdError(f"counts are {counts.dtype}: must be torch.int32")
        means, images = values.unsqueeze(0), counts.to(torch.int64).unsqueeze(0)
        return cls(means, images, torch.tensor([arrival.client]), fields["of"])
