"""Machine settings: the device, number formats of matrix products, and how malloc keeps freed memory.

Products are exact float32 unless the experiment asks for the tensor cores' faster formats. Parameters,
optimiser state, losses and everything on the wire stay float32.

By default glibc returns the activations of each batch to the system and faults them in again for the
next one, which was measured to halve the speed of a small CNN. The three thresholds are those of
``MALLOC_TRIM_THRESHOLD_``, ``MALLOC_TOP_PAD_`` and ``MALLOC_MMAP_THRESHOLD_``, set at run time so that
users need not set them.
"""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, Literal

import torch

from fedkd.errors import FedkdError, Setting

Precision = Literal["float32", "tf32", "bfloat16"]


def resolve_device(name: str) -> torch.device:
    """Return the device that the key ``device`` names; ``auto`` prefers cuda, then mps, then cpu.

    Raises:
        FedkdError: this machine has no such device.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        torch.empty(0, device=name)
        return torch.device(name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise FedkdError(
            Setting("device", name), f": {reason}; accepted: auto, cpu, cuda, cuda:N, mps"
        ) from None


@contextmanager
def matrix_products(precision: Precision, device: torch.device) -> Iterator[None]:
    """Within the block, a GPU rounds products and convolutions to TF32's 10 bits only for ``"tf32"``.

    By default PyTorch rounds convolutions to TF32, but not matrix products.
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
    """Return the context of a forward pass: under bfloat16, layers that gain from it compute in it."""
    # Without the cache of cast weights, which would outlive its step.
    return torch.autocast(
        device.type, torch.bfloat16, enabled=precision == "bfloat16", cache_enabled=False
    )


# From malloc.h; the values were measured.
_THRESHOLDS = {-1: 1 << 30, -2: 128 << 20, -3: 32 << 20}


@cache
def keep_freed_memory() -> None:
    """Raise the thresholds of this process, once; without glibc nothing happens."""
    if platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL(None)
    for parameter, value in _THRESHOLDS.items():
        libc.mallopt(parameter, value)
