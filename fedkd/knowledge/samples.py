"""The check of public samples: distinct indices into the public set."""

from __future__ import annotations

from reprlib import repr as shown

import torch
from torch import Tensor

from fedkd.errors import FedkdError


def check_samples(samples: object, num_public: int) -> Tensor:
    """Return `samples` if they are valid: int64 ``[N]``, distinct, ``0 .. num_public - 1``.

    Raises:
        FedkdError: they are not; the text says what is wrong.
    """
    if not isinstance(samples, Tensor) or samples.dtype != torch.int64 or samples.ndim != 1:
        description = shown(samples)
        if isinstance(samples, Tensor):
            description = f"{samples.dtype} {list(samples.shape)}"
        raise FedkdError(f"samples are {description}: must be an int64 tensor [N]")
    if len(samples) == 0:
        return samples
    if len(samples) > num_public:
        raise FedkdError(f"{len(samples)} samples: must be at most {num_public}, the public set")
    low, high = int(samples.min()), int(samples.max())
    if low < 0 or high >= num_public:
        wrong = low if low < 0 else high
        raise FedkdError(f"sample {wrong}: must be in 0 .. {num_public - 1}, the public set")
    if len(samples.unique()) < len(samples):
        raise FedkdError("samples occur twice: must be distinct")
    return samples
