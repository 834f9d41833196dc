"""A model as tensors by name: its first values, stacks of several, and calling it with them.

``torch.func.functional_call`` calls a module with other tensors as well, and looks the module through at
each call, which takes a third of a step of a small net. Here that is done once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fedkd.errors import FedkdError
from fedkd.randomness import key

State = dict[str, Tensor]
"""One model's parameters and buffers by name, without a client axis."""


def stacked(states: Sequence[State]) -> State:
    """Stack the states of K models, ``[K, ...]`` by name."""
    return {name: torch.stack([state[name] for state in states]) for name in states[0]}


def initial_state(build: Callable[[], nn.Module], *parts: int | str) -> State:
    """Return a new model's state with weights drawn from the stream named by `parts`.

    PyTorch's initialisers draw from the global generator, which is restored afterwards.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(key(*parts))
        model = build()
    named = [*model.named_parameters(), *model.named_buffers()]
    return {n: t.detach().clone() for n, t in named}


class Stateless:
    """A module whose parameters and buffers are given with each call.

    Args:
        module: its own tensors are in place again after each call; tied ones stay tied.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        names = {
            id(tensor): name
            for name, tensor in [*module.named_parameters(), *module.named_buffers()]
        }
        stores: list[dict[str, Any]] = [
            store for each in module.modules() for store in (each._parameters, each._buffers)
        ]
        self._places = [
            (store, leaf, names[id(tensor)])
            for store in stores
            for leaf, tensor in store.items()
            if tensor is not None
        ]

    def __call__(self, tensors: Mapping[str, Tensor], images: Tensor) -> Tensor:
        """Return the module's output; `tensors` has all of its parameters and buffers by name."""
        with self._lent(tensors):
            output: Tensor = self.module(images)
        return output

    def features(self, tensors: Mapping[str, Tensor], images: Tensor) -> Tensor:
        """Return what the module's body gives, ``[B, D]``.

        Raises:
            FedkdError: it is not a body and a head.
        """
        body: Callable[[Tensor], Tensor] = self._part("body")
        with self._lent(tensors):
            return body(images)

    def head(self, tensors: Mapping[str, Tensor], features: Tensor) -> Tensor:
        """Return the logits ``[B, C]`` that the module's head gives for features."""
        head: Callable[[Tensor], Tensor] = self._part("head")
        with self._lent(tensors):
            return head(features)

    def _part(self, name: str) -> Callable[[Tensor], Tensor]:
        part = getattr(self.module, name, None)
        if not isinstance(part, nn.Module):
            kind = type(self.module).__name__
            raise FedkdError(
                f"the model {kind} has no features: they are what `body` gives in head(body(images))"
            )
        return part

    @contextmanager
    def _lent(self, tensors: Mapping[str, Tensor]) -> Iterator[None]:
        own = [store[leaf] for store, leaf, _ in self._places]
        try:
            for store, leaf, name in self._places:
                store[leaf] = tensors[name]
            yield
        finally:
            for (store, leaf, _), tensor in zip(self._places, own, strict=True):
                store[leaf] = tensor
