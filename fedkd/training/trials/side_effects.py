"""Notice what a module changes besides its buffers: attributes, and generators of random numbers.

Clients share one module, into which their parameters and buffers are put for each call. What it keeps
elsewhere it would keep for all clients, rounds and runs together.
"""

from __future__ import annotations

import random  # noqa: TID251 - to see whether a user's model draws from it
from collections.abc import Iterator, Mapping
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fedkd.errors import FedkdError
from fedkd.training.parameters import named_tensors

_OF_TORCH = {*vars(nn.Module()), "_flat_weights", "_flat_weight_refs"}
"""Attributes that every module has, and lists of the weights of a recurrent layer."""

_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size)
_CODE = (type, ModuleType, FunctionType, BuiltinFunctionType, MethodType)


class SideEffects:
    """Remembers a module's attributes and the generators; `check` compares them with what is there now.

    What a module holds is seen, with its containers and objects, and global names that its methods use.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._attributes = dict(_attributes(module))
        self._generators = _generators()

    def check(self) -> None:
        """Raise an error if something has changed.

        Raises:
            FedkdError: it has; the text names the attribute or the generator.
        """
        now = dict(_attributes(self._module))
        for name in {**self._attributes, **now}:
            if self._attributes.get(name) != now.get(name):
                raise FedkdError(
                    f"'{name}' changes when it is called, and would be shared by all clients and rounds: "
                    "make it a buffer (register_buffer), or do not keep it"
                )
        for name, state in _generators().items():
            if self._generators[name] != state:
                raise FedkdError(
                    f"it draws from {name}, which cannot be keyed by client and round: use a dropout of "
                    "PyTorch"
                )


def _generators() -> dict[str, str]:
    """Return the state of each global generator, by its name."""
    return {
        "Python's random": repr(random.getstate()),
        "numpy.random": _frozen(np.random.get_state(legacy=False), {}),
    }


def _attributes(module: nn.Module) -> Iterator[tuple[str, str]]:
    """Yield all attributes of a module, its parts and their classes by name, each as a text."""
    registered: dict[int, object] = {id(t): t for t in named_tensors(module).values()}
    for path, part in module.named_modules():
        for name, value in vars(part).items():
            if name not in _OF_TORCH:
                yield f"{path}.{name}".lstrip("."), _frozen(value, dict(registered))
        for kind in type(part).__mro__:
            if not kind.__module__.startswith(("torch.", "builtins")):
                yield from _class_attributes(kind)


def _class_attributes(kind: type) -> Iterator[tuple[str, str]]:
    """Yield the values of a class, and of the global names that its methods refer to."""
    for name, value in vars(kind).items():
        if isinstance(value, FunctionType):
            for used in value.__code__.co_names:
                found = value.__globals__.get(used)
                if not isinstance(found, _CODE):
                    yield f"{kind.__module__}.{used}", _frozen(found, {})
        elif not name.startswith("__") and not isinstance(value, _CODE):
            yield f"{kind.__name__}.{name}", _frozen(value, {})


def _frozen(value: Any, seen: dict[int, object]) -> str:
    """Return a text that changes when a value does."""
    if isinstance(value, _PLAIN):
        return repr(value)
    if isinstance(value, _CODE) or id(value) in seen:
        return f"<{id(value)}>"
    seen[id(value)] = value
    if isinstance(value, Tensor | np.ndarray):
        return _frozen_array(value)
    if isinstance(value, torch.Generator):
        return _frozen_array(value.get_state())
    if isinstance(value, random.Random):
        return repr(value.getstate())
    if isinstance(value, np.random.RandomState):
        return _frozen(value.get_state(legacy=False), seen)
    if isinstance(value, np.random.Generator):
        return _frozen(value.bit_generator.state, seen)
    if isinstance(value, Mapping):
        return repr([(_frozen(k, seen), _frozen(v, seen)) for k, v in value.items()])
    if isinstance(value, list | tuple):
        return repr([_frozen(each, seen) for each in value])
    # A counter or a deque shows its state in its text, another object in its attributes.
    return repr(value) + _frozen(getattr(value, "__dict__", None), seen)


def _frozen_array(value: Any) -> str:
    tensor = torch.as_tensor(value).detach().cpu().contiguous()
    data = tensor.flatten().view(torch.uint8) if tensor.numel() else tensor
    return f"{tensor.dtype} {tuple(tensor.shape)} {hash(data.numpy().tobytes())}"
