"""Model parameters, by architecture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


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
        """Mean weighted by `num_examples` (McMahan et al. 2017, algorithm 1), K = 1.

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
    """Model parameters, by architecture: only like is averaged with like."""

    by_model: Mapping[str, ModelWeights]

    @classmethod
    def stack(cls, answers: Sequence[Weights]) -> Weights:
        """Join answers of one client each."""
        found: dict[str, list[ModelWeights]] = {}
        for answer in answers:
            for name, weights in answer.by_model.items():
                found.setdefault(name, []).append(weights)
        return cls({name: _joined(weights) for name, weights in found.items()})

    def average(self) -> Weights:
        """Average within each architecture, K = 1."""
        return Weights({name: weights.average() for name, weights in self.by_model.items()})

    def updated(self, newer: Weights) -> Weights:
        """Return these with `newer` in their place for the architectures that it has."""
        return Weights({**self.by_model, **newer.by_model})

    def of(self, clients: Tensor) -> Weights:
        """Return those of some clients (int64 partition ids), dropping architectures without clients."""
        found = {}
        for name, part in self.by_model.items():
            rows = torch.isin(part.clients, clients).nonzero().flatten()
            if len(rows):
                tensors = {n: tensor[rows] for n, tensor in part.tensors.items()}
                found[name] = ModelWeights(tensors, part.clients[rows], part.num_examples[rows])
        return Weights(found)

    def only(self, model: str) -> Weights:
        """Return the part that a client with architecture `model` can load."""
        return Weights({model: self.by_model[model]})


def _joined(weights: Sequence[ModelWeights]) -> ModelWeights:
    return ModelWeights(
        {name: torch.cat([w.tensors[name] for w in weights]) for name in weights[0].tensors},
        torch.cat([w.clients for w in weights]),
        torch.cat([w.num_examples for w in weights]),
    )
