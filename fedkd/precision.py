"""Number formats of the arithmetic: exact float32, or the tensor cores' faster ones where asked for.

Parameters, optimiser state, losses and everything on the wire stay float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch

Precision = Literal["float32", "tf32", "bfloat16"]


@contextmanager
def matrix_products(precision: Precision, device: torch.device) -> Iterator[None]:
    """Compute products and convolutions on a GPU with TF32's 10 bits only where that is asked for.

    PyTorch by itself rounds convolutions to TF32, and products not.
    """
    if device.type != "cuda":
        yield
        return
    backends: Any = torch.backends
    switches = (backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn)
    before = [switch.fp32_precision for switch in switches]
    for switch in switches:
        switch.fp32_precision = "tf32" if precision == "tf32" else "ieee"
    try:
        yield
    finally:
        for switch, value in zip(switches, before, strict=True):
            switch.fp32_precision = value


def forward_pass(precision: Precision, device: torch.device) -> torch.autocast:
    """Return the context of a forward pass: under bfloat16, layers that gain by it compute in it."""
    # Without the cache of cast weights, which would outlive the step that they are of.
    return torch.autocast(
        device.type, torch.bfloat16, enabled=precision == "bfloat16", cache_enabled=False
    )
