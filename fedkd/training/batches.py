"""Batches of a fit: at each step every client's images, labels, soft labels and coefficients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedkd.data.images import Augment, Images
from fedkd.losses import Term
from fedkd.randomness import at_steps, key
from fedkd.training.schedule import Stream, schedule

VECTOR = 4
"""Widths of stacked batches are multiples of this: otherwise a client's logits would start at unaligned
addresses, and the rounding of matrix products depends on these."""


@dataclass(frozen=True)
class BatchStream:
    """One stream of batches of a fit: its samples, soft labels and loss terms.

    Attributes:
        name: names the random stream (``"private"`` or ``"public"``).
        images: the set that holds the samples.
        rows: int64 indices into `images`, one tensor a client.
        terms: coefficients by term, each a number or a tensor ``[K]``.
        teacher_logits: ``[1, N, C]`` (the same for all) or ``[K, N, C]`` (or as many as `taught_by`
            names), in the order of `rows`; N is the largest number of samples of a client.
        taught_by: index of the `teacher_logits` that each client learns from, int64 ``[K]``; default:
            the only one, or the k-th for client k.
        augment: how images are changed as they are drawn.
        class_means: ``[1, C, D]`` or ``[K, C, D]``, for terms that need them.
        class_counts: ``[1, C]`` or ``[K, C]``, images behind each mean.
        labels: labels that each client uses for its `rows`, int64; default: those of `images`.
    """

    name: str
    images: Images
    rows: Sequence[Tensor]
    terms: Mapping[Term, float | Tensor]
    teacher_logits: Tensor | None = None
    taught_by: Tensor | None = None
    augment: Augment = "none"
    class_means: Tensor | None = None
    class_counts: Tensor | None = None
    labels: Sequence[Tensor] | None = None


@dataclass(frozen=True, eq=False)
class Block:
    """Clients of a cohort that take their steps together.

    Attributes:
        clients: their positions in the cohort, the one with most steps first.
        index: the same, int64 on the device.
        steps: number of steps of each.
        streams: the random stream of each.
        batch_size: B.
        stacked: whether they run through ``vmap``; otherwise the block is one client.
        dtype: of weights, coefficients and losses.
        smallest_batch: see `fedkd.training.schedule.schedule`.
    """

    clients: Sequence[int]
    index: Tensor
    steps: Sequence[int]
    streams: Sequence[Stream]
    batch_size: int
    stacked: bool
    dtype: torch.dtype
    smallest_batch: int = 1

    @property
    def width(self) -> int:
        """The number of samples of a batch, with padding."""
        return -(-self.batch_size // VECTOR) * VECTOR if self.stacked else self.batch_size


class Batches:
    """One stream of batches for the clients of a block.

    All that does not depend on the model is prepared for all steps at once; a step only gathers.
    """

    def __init__(self, batch_stream: BatchStream, block: Block) -> None:
        index, device, dtype = block.index, block.index.device, block.dtype
        self._images = batch_stream.images
        self._augment: Augment = batch_stream.augment
        self._stacked = block.stacked
        rows = [batch_stream.rows[k].to(device) for k in block.clients]
        streams = [(*stream, batch_stream.name) for stream in block.streams]
        sizes = [len(r) for r in rows]
        drawn = schedule(
            sizes, block.steps, block.batch_size, streams, block.smallest_batch
        ).padded(block.width)
        drawn = drawn.to(device, dtype)
        self._positions, self._weights, self._sizes = drawn.positions, drawn.weights, drawn.sizes
        padded = nn.utils.rnn.pad_sequence(rows, batch_first=True)
        self._rows = padded.gather(1, drawn.positions.flatten(1)).view_as(drawn.positions)
        self._real = drawn.weights > 0
        labels = batch_stream.images.labels
        self._labels = torch.zeros_like(self._rows) if labels is None else labels[self._rows]
        if batch_stream.labels is not None:
            labels_by_client = [batch_stream.labels[k].to(device) for k in block.clients]
            padded = nn.utils.rnn.pad_sequence(labels_by_client, batch_first=True)
            self._labels = padded.gather(1, drawn.positions.flatten(1)).view_as(drawn.positions)
        self._teacher_logits = batch_stream.teacher_logits
        several = batch_stream.teacher_logits is not None and len(batch_stream.teacher_logits) > 1
        teachers = (
            index if batch_stream.taught_by is None else batch_stream.taught_by.to(device)[index]
        )
        self._teachers = teachers if several else None
        keys = [key(*stream, "step") for stream in streams]
        self._keys = at_steps(torch.tensor(keys, device=device), max(block.steps))
        means = {"class_means": batch_stream.class_means, "class_counts": batch_stream.class_counts}
        self._constant = {
            name: _rows_of(tensor.to(device, dtype), index)
            for name, tensor in means.items()
            if tensor is not None
        }
        self.terms = list(batch_stream.terms)
        self._coefficients = {
            f"coefficient {i}": spread(value, index, dtype)
            for i, value in enumerate(batch_stream.terms.values())
        }

    def batch(self, tick: int, active: int) -> dict[str, Tensor]:
        """Return the batch of step `tick` for the first `active` clients.

        Clients that run one by one see no padding: it is cut off instead of masked.
        """
        width = None if self._stacked else int(self._sizes[0, tick])
        step = (slice(active), tick, slice(width))
        keys = self._keys[:active, tick]
        batch = {
            "images": self._images.batches(
                self._rows[step], self._augment, keys, channels_last=not self._stacked
            ),
            "labels": self._labels[step],
            "weights": self._weights[step],
            "real": self._real[step],
            "key": keys,
            **{
                name: value[:active]
                for name, value in {**self._coefficients, **self._constant}.items()
            },
        }
        if self._teacher_logits is not None:
            batch["teacher_logits"] = self._teacher_logits_at(self._positions[step])
        return batch

    def _teacher_logits_at(self, positions: Tensor) -> Tensor:
        """Return the received logits ``[active, B, C]`` at int64 positions ``[active, B]``."""
        assert self._teacher_logits is not None
        if self._teachers is None:
            shared = self._teacher_logits[0].index_select(0, positions.flatten())
            return shared.view(*positions.shape, -1)
        return self._teacher_logits[self._teachers[: len(positions), None], positions]


def _rows_of(tensor: Tensor, index: Tensor) -> Tensor:
    """Return each block client's row of ``[K, ...]``, or the only row of ``[1, ...]`` for all."""
    return tensor[index] if len(tensor) > 1 else tensor.expand(len(index), *tensor.shape[1:])


def spread(value: float | Tensor, index: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a number, or a tensor ``[K]``, as one value for each client of a block."""
    tensor = torch.as_tensor(value, dtype=dtype, device=index.device)
    return tensor[index] if tensor.ndim else tensor.expand(len(index))
