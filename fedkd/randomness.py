"""Random streams keyed by their purpose, so that no draw depends on any other client's.

A client's numbers depend on (seed, client, round, phase) alone. Every stream is named by such a tuple,
which is hashed: consecutive keys would make neighbouring streams overlap, and Python's own ``hash`` is
salted per process.

Draws inside a forward pass cannot come from a generator, as ``vmap`` runs many clients at once. There
`draws` hashes a counter instead, by integer arithmetic that is the same on CPU and CUDA.
"""

from __future__ import annotations

from hashlib import blake2b

import torch
from torch import Tensor


def key(*parts: int | str) -> int:
    """Return a non-negative 63-bit hash of `parts`, the same in every process and on every machine."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def generator(*parts: int | str) -> torch.Generator:
    """Return a fresh CPU generator for the stream named by `parts`."""
    return torch.Generator().manual_seed(key(*parts))


def permutation(n: int, *parts: int | str) -> Tensor:
    """Return a random order of ``0..n-1`` (int64 ``[n]``) drawn from the stream named by `parts`."""
    return torch.randperm(n, generator=generator(*parts))


def _signed(value: int) -> int:
    """Return an integer wrapped around to the range of int64."""
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >= 1 << 63 else value


# The constants of splitmix64 (Steele, Lea, Flood 2014), as signed 64-bit integers.
_GOLDEN = _signed(0x9E3779B97F4A7C15)
_MIX1 = _signed(0xBF58476D1CE4E5B9)
_MIX2 = _signed(0x94D049BB133111EB)


def _shift(z: Tensor, bits: int) -> Tensor:
    """Return `z` shifted right without the sign: ``>>`` on int64 is arithmetic."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def mix(z: Tensor) -> Tensor:
    """Return int64 hashed to int64 by splitmix64's finaliser; multiplication wraps around."""
    z = (z ^ _shift(z, 30)) * _MIX1
    z = (z ^ _shift(z, 27)) * _MIX2
    return z ^ _shift(z, 31)


def at_steps(keys: Tensor, steps: int) -> Tensor:
    """Return the keys ``[K, T]`` of the first T steps of the streams `keys` (int64 ``[K]``)."""
    return mix(keys.unsqueeze(-1) + torch.arange(steps, device=keys.device) * _GOLDEN)


def draws(key: Tensor, count: int, call: int = 0) -> Tensor:
    """Return `count` uniform 16-bit integers (int64, 0..65535) of the stream `key`.

    Args:
        key: int64 0-d (or mapped to that by ``vmap``).
        count: how many.
        call: number of the call: two calls with one key draw from different streams.
    """
    counter = torch.arange(-(-count // 4), device=key.device) + (call + 1) * (1 << 40)
    words = mix(key + counter * _GOLDEN)
    shifts = torch.arange(0, 64, 16, device=key.device)
    return ((words.unsqueeze(-1) >> shifts) & 0xFFFF).flatten()[:count]
