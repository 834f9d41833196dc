"""Draw, before training starts, which samples each client sees at each step.

An epoch visits every sample once and its last batch may be short, exactly as with a ``DataLoader``;
clients with different shard sizes take different numbers of steps. Models with batch normalisation
cannot learn from one sample: a last batch that is too small for a model is left out of its epoch.
Batches are padded to a constant width with weight 0, since the width of a matrix product decides its
rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from fedkd.randomness import permutation

Stream = tuple[int | str, ...]
"""Name of a random stream, such as ``(seed, client, round, phase)``."""


@dataclass(frozen=True)
class Schedule:
    """Batches of K clients.

    Attributes:
        positions: int64 ``[K, T, B]``, positions in each client's list of samples; padding is position 0,
            a real sample, so that activations stay finite.
        weights: ``[K, T, B]``, 1/n for the n real rows of a batch and 0 for padding (true and false
            until `to` gives them their dtype).
        sizes: int64 ``[K, T]`` on the CPU, the real rows of each batch (0 past a client's last).
        steps: how many steps each client takes.
    """

    positions: Tensor
    weights: Tensor
    sizes: Tensor
    steps: list[int]

    def padded(self, width: int) -> Schedule:
        """Return the schedule with batches padded to `width` rows."""
        wider = (0, width - self.positions.shape[-1])
        return replace(self, positions=pad(self.positions, wider), weights=pad(self.weights, wider))

    def to(self, device: torch.device, dtype: torch.dtype) -> Schedule:
        """Return the schedule with positions and weights on `device`, weights in `dtype`."""
        # 1/n is computed in the training dtype: a cast from float32 costs 1e-10 in float64 runs.
        weights = (self.weights > 0).to(device, dtype)
        weights /= self.sizes.clamp_min(1).to(device, dtype).unsqueeze(-1)
        return Schedule(self.positions.to(device), weights, self.sizes, self.steps)


def steps_per_epoch(samples: int, batch_size: int, smallest: int = 1) -> int:
    """Return how many batches of at least `smallest` samples an epoch over `samples` has."""
    whole, rest = divmod(samples, batch_size)
    return whole + (rest >= smallest)


def schedule(
    samples: Sequence[int],
    steps: Sequence[int],
    batch_size: int,
    streams: Sequence[Stream],
    smallest: int = 1,
) -> Schedule:
    """Return the batches of every client, drawn from its stream.

    Args:
        samples: how many samples each of the K clients has, ≥ `smallest`.
        steps: how many steps each takes, over as many epochs as that needs.
        batch_size: B.
        streams: each client's random stream; epoch e is drawn from ``(*stream, e)``.
        smallest: number of samples below which a last batch is left out, 1..B.
    """
    most_steps = max(steps)
    positions = torch.zeros(len(samples), most_steps, batch_size, dtype=torch.int64)
    sizes = torch.zeros(len(samples), most_steps, dtype=torch.int64)
    for k, (n, total_steps, stream) in enumerate(zip(samples, steps, streams, strict=True)):
        per_epoch = steps_per_epoch(n, batch_size, smallest)
        used = min(n, per_epoch * batch_size)
        for epoch in range(-(-total_steps // per_epoch)):
            order = torch.zeros(per_epoch * batch_size, dtype=torch.int64)
            order[:used] = permutation(n, *stream, epoch)[:used]
            first = epoch * per_epoch
            taken = min(per_epoch, total_steps - first)
            positions[k, first : first + taken] = order.reshape(per_epoch, batch_size)[:taken]
            sizes[k, first : first + taken] = batch_size
            if taken == per_epoch:
                sizes[k, first + taken - 1] = used - (per_epoch - 1) * batch_size
    weights = torch.arange(batch_size) < sizes.unsqueeze(-1)
    return Schedule(positions, weights, sizes, list(steps))
