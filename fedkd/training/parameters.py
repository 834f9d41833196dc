"""Models as tensors by name: initial values, stacks of several, and calls of a module with them.

``torch.func.functional_call`` also calls a module with other tensors, but searches the module at each
call, which takes a third of the step of a small net. Here the module is searched once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fedkd.errors import FedkdError
from fedkd.randomness import key

State = dict[str, Tensor]
"""One model's parameters and buffers by name, without a client axis."""


def named_tensors(module: nn.Module) -> State:
    """Return a module's parameters and buffers by name, tied ones once."""
    return dict([*module.named_parameters(), *module.named_buffers()])


def stacked(states: Sequence[State]) -> State:
    """Return the states of K models stacked along a new axis, ``[K, ...]`` by name."""
    return {name: torch.stack([state[name] for state in states]) for name in states[0]}


def initial_state(build: Callable[[], nn.Module], *parts: int | str) -> State:
    """Return a new model's state with weights drawn from the stream named by `parts`.

    PyTorch's initialisers draw from the global generator, which is restored afterwards.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(key(*parts))
        model = build()
    return {n: t.detach().clone() for n, t in named_tensors(model).items()}


class Stateless:
    """A module whose parameters and buffers are passed with each call.

    A call replaces the buffers that the module assigns (``self.steps = self.steps + 1``) in the
    dictionary that it was given; those changed in place are changed there already.

    Args:
        module: has its own tensors back after each call; tied ones stay tied.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        names = {id(tensor): name for name, tensor in named_tensors(module).items()}
        stores = [store for each in module.modules() for store in (each._parameters, each._buffers)]
        self._places: list[tuple[Any, Any, str]] = [
            (store, leaf, names[id(tensor)])
            for store in stores
            for leaf, tensor in store.items()
            if tensor is not None
        ]

    def __call__(self, tensors: State, images: Tensor) -> Tensor:
        """Return the module's output; `tensors` has all of its parameters and buffers by name.

        Raises:
            FedkdError: the module assigns a buffer with another shape or type.
        """
        with self._substituted(tensors):
            output: Tensor = self.module(images)
        return output

    def features(self, tensors: State, images: Tensor) -> Tensor:
        """Return the output of the module's body, ``[B, D]``.

        Raises:
            FedkdError: the module is not a body and a head.
        """
        body: Callable[[Tensor], Tensor] = self._part("body")
        with self._substituted(tensors):
            return body(images)

    def head(self, tensors: State, features: Tensor) -> Tensor:
        """Return the logits ``[B, C]`` of the module's head for features."""
        head: Callable[[Tensor], Tensor] = self._part("head")
        with self._substituted(tensors):
            return head(features)

    def _part(self, name: str) -> Callable[[Tensor], Tensor]:
        part = getattr(self.module, name, None)
        if not isinstance(part, nn.Module):
            kind = type(self.module).__name__
            raise FedkdError(
                f"the model {kind} has no features: they are the output of `body` in head(body(images))"
            )
        return part

    @contextmanager
    def _substituted(self, tensors: State) -> Iterator[None]:
        originals = [store[leaf] for store, leaf, _ in self._places]
        try:
            for store, leaf, name in self._places:
                store[leaf] = tensors[name]
            yield
            for store, leaf, name in self._places:
                if store[leaf] is not tensors[name]:
                    tensors[name] = _assigned(name, tensors[name], store[leaf])
        finally:
            for (store, leaf, _), tensor in zip(self._places, originals, strict=True):
                store[leaf] = tensor


def _assigned(name: str, before: Tensor, value: object) -> Tensor:
    """Return what a module has assigned to a buffer, if it is a tensor like the one before."""
    if not isinstance(value, Tensor) or (value.shape, value.dtype) != (before.shape, before.dtype):
        kinds = [
            f"{t.dtype} {tuple(t.shape)}" if isinstance(t, Tensor) else type(t).__name__
            for t in (value, before)
        ]
        raise FedkdError(
            f"the model assigns {kinds[0]} to its buffer '{name}', which is {kinds[1]}: type and shape "
            "must not change"
        )
    return value.detach()
