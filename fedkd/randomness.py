"""Random streams keyed by what they are for, so that no draw depends on who else draws.

A client's numbers depend on (seed, client, round, phase) alone. Every stream is named by such a tuple
and hashed: counted keys would make neighbouring streams overlap, and Python's own ``hash`` is salted
per process.
"""

from __future__ import annotations

from hashlib import blake2b

import torch
from torch import Tensor


def key(*parts: int | str) -> int:
    """Hash `parts` to a non-negative 63-bit integer, the same in every process and on every machine."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def generator(*parts: int | str) -> torch.Generator:
    """Return a fresh CPU generator for the stream named by `parts`."""
    return torch.Generator().manual_seed(key(*parts))


def permutation(n: int, *parts: int | str) -> Tensor:
    """Return a random order of ``0..n-1`` (int64 ``[n]``) drawn from the stream named by `parts`."""
    return torch.randperm(n, generator=generator(*parts))
