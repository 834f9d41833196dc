"""Find the layer of a module whose output for an image depends on other images of its batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from fedkd.training.vmap_modes import KeyedMode

LOUD = 100.0
"""By how much padding is scaled, so that any effect of it is seen, of a maximum as well."""


def coupled_layer(module: nn.Module, images: Tensor) -> str:
    """Return the first layer that mixes images, in words; empty if there is none.

    In training mode a layer that normalises over the batch as PyTorch does is none: its padding is
    masked.

    Args:
        module: its buffers may change.
        images: ``[B, c, h, w]``.
    """
    buffers = {n: t.clone() for n, t in module.named_buffers()}
    alone = _calls(module, images, len(images))
    for name, buffer in module.named_buffers():
        buffer.copy_(buffers[name])
    padding = LOUD * torch.cat([-images[:1], images[:1]])
    padded = _calls(module, torch.cat([images, padding]), len(images))
    for name, (given, returned) in alone.items():
        given_padded, returned_padded = padded[name]
        if _same(given, given_padded) and not _same(returned, returned_padded):
            kind = type(module.get_submodule(name)).__name__
            return f"its layer '{name}' ({kind})" if name else f"the forward method of {kind}"
    return ""


_Calls = Mapping[str, tuple[Any, Any]]
"""By name, the first input and the output of each layer, in the order in which they end."""


def _calls(module: nn.Module, images: Tensor, real: int) -> _Calls:
    calls: dict[str, tuple[Any, Any]] = {}

    def noting(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def note(_: nn.Module, inputs: Any, output: Any) -> None:
            calls[name] = _first(inputs, real), _first(output, real)

        return note

    hooks = [part.register_forward_hook(noting(name)) for name, part in module.named_modules()]
    try:
        stream = torch.zeros((), dtype=torch.int64, device=images.device)
        rows = torch.arange(len(images), device=images.device)
        mode = KeyedMode(stream, rows < real) if module.training else nullcontext()
        with torch.no_grad(), mode:
            module(images)
    finally:
        for hook in hooks:
            hook.remove()
    return calls


def _first(value: Any, real: int) -> Any:
    """Return the rows of real images, of the first tensor of a value."""
    while isinstance(value, list | tuple) and value:
        value = value[0]
    return value[:real].clone() if isinstance(value, Tensor) and value.ndim else value


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and torch.allclose(a, b, rtol=1e-4, equal_nan=True)
    return True
