"""Rules written out as loops, which several tests compare with."""

from __future__ import annotations

import math

from torch import Tensor


def mean_loop(values: Tensor, mask: Tensor) -> list[list[float]]:
    """Return the mean over the clients that have each sample, of ``[K, N, C]``."""
    means = []
    for n in range(values.shape[1]):
        rows = [values[k, n].tolist() for k in range(len(values)) if mask[k, n]]
        means.append([math.fsum(column) / len(rows) for column in zip(*rows, strict=True)])
    return means
