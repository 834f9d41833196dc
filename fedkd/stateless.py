"""Call a module with tensors in the place of its own parameters and buffers, at every step of a fit.

``torch.func.functional_call`` does the same, and looks the module through at each call, which takes a
third of a step of a small net. Here that is done once.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn


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
        own = [store[leaf] for store, leaf, _ in self._places]
        try:
            for store, leaf, name in self._places:
                store[leaf] = tensors[name]
            output: Tensor = self.module(images)
            return output
        finally:
            for (store, leaf, _), tensor in zip(self._places, own, strict=True):
                store[leaf] = tensor
