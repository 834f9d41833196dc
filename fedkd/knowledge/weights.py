"""Model parameters, by architecture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fedkd.knowledge.arrival import Arrival, Sizes


@dataclass(frozen=True, eq=False)
class ModelWeights:
    """Parameters and buffers of one architecture from K clients.

    Attributes:
        tensors: ``[K, ...]`` by name.
        clients: int64 ``[K]``.
        num_examples: int64 ``[K]``, the weights of an average.
    """

    tensors: Mapping[str, Tensor]
    clients: Tensor
    num_examples: Tensor

    def average(self) -> ModelWeights:
        """Return the mean weighted by `num_examples` (McMahan et al. 2017, algorithm 1), K = 1.

        Accumulated in float64; integer buffers are rounded.
        """
        share = self.num_examples.double() / self.num_examples.sum()

        def mean(stacked: Tensor) -> Tensor:
            total = torch.einsum("k,k...->...", share.to(stacked.device), stacked.double())
            total = total if stacked.is_floating_point() else total.round()
            return total.to(stacked.dtype).unsqueeze(0)

        return ModelWeights(
            {name: mean(stacked) for name, stacked in self.tensors.items()},
            self.clients[:1],
            self.num_examples.sum().unsqueeze(0),
        )


@dataclass(frozen=True, eq=False)
class Weights:
    """Model parameters, by architecture; averages are taken within each architecture only."""

    kind: ClassVar[str] = "weights"
    message_fields: ClassVar[dict[str, type]] = {"model": str}

    by_model: Mapping[str, ModelWeights]

    @classmethod
    def stack(cls, answers: Sequence[Weights]) -> Weights:
        """Return the concatenation of answers of one client each."""
        by_model: dict[str, list[ModelWeights]] = {}
        for answer in answers:
            for name, weights in answer.by_model.items():
                by_model.setdefault(name, []).append(weights)
        return cls({name: _concatenated(weights) for name, weights in by_model.items()})

    def average(self) -> Weights:
        """Return the averages within each architecture, K = 1."""
        return Weights({name: weights.average() for name, weights in self.by_model.items()})

    def updated(self, newer: Weights) -> Weights:
        """Return these weights, replaced by `newer` for the architectures that it has."""
        return Weights({**self.by_model, **newer.by_model})

    def only(self, model: str) -> Weights:
        """Return the part that a client with architecture `model` can load."""
        return Weights({model: self.by_model[model]})

    def value_tensors(self) -> list[Tensor]:
        """Return the tensors that hold values, ``[K, ...]``."""
        return [tensor for part in self.by_model.values() for tensor in part.tensors.values()]

    def check(self) -> None:
        """Do nothing: finite weights of any size can be valid."""

    def tensors(self) -> dict[str, Tensor]:
        """Return all tensors by name, as they are stored."""
        tensors: dict[str, Tensor] = {}
        for number, part in enumerate(self.by_model.values()):
            tensors |= {f"{number}/tensors/{name}": tensor for name, tensor in part.tensors.items()}
            tensors |= {f"{number}/clients": part.clients, f"{number}/examples": part.num_examples}
        return tensors

    def stored_fields(self) -> dict[str, Any]:
        """Return what is stored beside the tensors."""
        return {"models": list(self.by_model)}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], fields: Mapping[str, Any]) -> Weights:
        """Return the inverse of `tensors` and `stored_fields`."""
        parts = {}
        for number, model in enumerate(fields["models"]):
            start = f"{number}/tensors/"
            named = {n.removeprefix(start): t for n, t in tensors.items() if n.startswith(start)}
            owners = tensors[f"{number}/clients"], tensors[f"{number}/examples"]
            parts[model] = ModelWeights(named, *owners)
        return cls(parts)

    def to_message(self, sizes: Sizes, *, asked: bool) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return the tensors of a message, and its `message_fields`; one architecture and K = 1."""
        ((model, weights),) = self.by_model.items()
        return {name: stacked[0] for name, stacked in weights.tensors.items()}, {"model": model}

    @classmethod
    def from_message(
        cls, tensors: dict[str, Tensor], fields: dict[str, Any], arrival: Arrival
    ) -> Weights:
        """Return the inverse of `to_message`."""
        stacked = {name: tensor.unsqueeze(0) for name, tensor in tensors.items()}
        owner = torch.tensor([arrival.client]), torch.tensor([arrival.num_examples])
        return cls({fields["model"]: ModelWeights(stacked, *owner)})


def _concatenated(weights: Sequence[ModelWeights]) -> ModelWeights:
    return ModelWeights(
        {name: torch.cat([w.tensors[name] for w in weights]) for name in weights[0].tensors},
        torch.cat([w.clients for w in weights]),
        torch.cat([w.num_examples for w in weights]),
    )
