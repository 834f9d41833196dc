"""Images stored on the device as bytes; batches are gathered, augmented and normalised there.

There is no ``DataLoader``: per-image work in Python starves a device when a thousand small clients train.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from fedkd.randomness import draws, mix

Augment = Literal["none", "crop-flip", "jitter-2"]
_SHIFT = {"crop-flip": 4, "jitter-2": 2}
"""Largest shift in pixels: a random crop after padding by 4 (He et al. 2015), or Hinton's jitter by 2."""

MAX_NORMALISED_BYTES = 256 << 20
"""The largest set that stays in memory normalised: any test set here, but not the training images."""


@dataclass(frozen=True)
class Images:
    """A set of images with labels on one device.

    Attributes:
        pixels: uint8 ``[N, c, h, w]``.
        labels: int64 ``[N]``, or ``None`` for an unlabelled set.
        mean: per channel of pixels scaled to 0..1.
        std: likewise.
        dtype: of the batches.
    """

    pixels: Tensor
    labels: Tensor | None
    mean: Sequence[float]
    std: Sequence[float]
    dtype: torch.dtype = torch.float32
    _normalised: dict[bool, Tensor] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def __len__(self) -> int:
        return len(self.pixels)

    @property
    def device(self) -> torch.device:
        """The device of the pixels."""
        return self.pixels.device

    def keep(self, rows: Tensor, labelled: bool = True) -> Images:
        """Return the images `rows` (int64 ``[M]``) as a set of their own."""
        labels = self.labels[rows] if labelled and self.labels is not None else None
        return replace(self, pixels=self.pixels[rows], labels=labels)

    def batch(self, rows: Tensor, channels_last: bool = False) -> Tensor:
        """Return normalised images ``[n, c, h, w]`` for `rows` (int64 ``[n]``).

        With `channels_last` the channels of a pixel are adjacent in memory, which alone makes unstacked
        convolutions and pooling twice as fast on a CPU.
        """
        return self.batches(rows.unsqueeze(0), "none", rows, channels_last).squeeze(0)

    def whole(self) -> Tensor:
        """Return all images normalised, ``[N, c, h, w]``."""
        return self.batch(torch.arange(len(self), device=self.device))

    def chunks(
        self, rows: Tensor | None, size: int, channels_last: bool = False
    ) -> Iterator[Tensor]:
        """Yield normalised images ``[n, c, h, w]``, `size` at a time: those of `rows`, or all.

        A set that is read as a whole, such as a test set in every round, is normalised once and kept.
        Copies are yielded, as a model may work in place.
        """
        whole = rows is None or (
            len(rows) == len(self) and torch.equal(rows.cpu(), torch.arange(len(self)))
        )
        bytes_whole = self.pixels.numel() * self.dtype.itemsize
        if whole and bytes_whole <= MAX_NORMALISED_BYTES:
            if channels_last not in self._normalised:
                everything = torch.arange(len(self), device=self.device)
                self._normalised[channels_last] = self.batch(everything, channels_last)
            for chunk in self._normalised[channels_last].split(size):
                yield chunk.clone()
            return
        chosen = torch.arange(len(self)) if rows is None else rows
        for chunk in chosen.to(self.device).split(size):
            yield self.batch(chunk, channels_last)

    def batches(
        self, rows: Tensor, augment: Augment, keys: Tensor, channels_last: bool = False
    ) -> Tensor:
        """Return normalised images ``[A, B, c, h, w]``, augmented unless `augment` is ``"none"``.

        Args:
            rows: int64 ``[A, B]``.
            augment: how images are changed.
            keys: int64 ``[A]``, each client's stream for this step.
            channels_last: see `batch`.
        """
        pixels = self._gathered(rows.flatten())
        if augment != "none":
            streams = mix(keys)  # dropout draws from the keys themselves
            draw = torch.func.vmap(lambda key: draws(key, 3 * rows.shape[1]).reshape(-1, 3))(
                streams
            )
            pixels = _shifted(pixels, draw.reshape(-1, 3), augment)
        if channels_last:
            pixels = pixels.contiguous(memory_format=torch.channels_last)
        normalised = self.normalise(pixels)
        batches = normalised.view(*rows.shape, *normalised.shape[1:])
        return _with_channels_last_strides(batches) if channels_last else batches

    def _gathered(self, rows: Tensor) -> Tensor:
        """Return the pixels of `rows`, copied image by image (indexing copies pixel by pixel)."""
        picked = self.pixels.flatten(1).index_select(0, rows)
        return picked.view(-1, *self.pixels.shape[1:])

    def normalise(self, pixels: Tensor) -> Tensor:
        """Return uint8 ``[n, c, h, w]`` scaled to zero mean and unit deviation."""
        scale, shift = self._scale_and_shift
        return pixels.to(self.dtype).mul_(scale).sub_(shift)

    @cached_property
    def _scale_and_shift(self) -> tuple[Tensor, Tensor]:
        mean = torch.tensor(self.mean, dtype=self.dtype, device=self.device)[:, None, None]
        std = torch.tensor(self.std, dtype=self.dtype, device=self.device)[:, None, None]
        return 1 / (255 * std), mean / std


def _with_channels_last_strides(batches: Tensor) -> Tensor:
    """Return ``[A, B, 1, h, w]`` with the strides by which convolutions recognise channels-last.

    With one channel both layouts have the same memory, and PyTorch assumes the slower one.
    """
    _, size, channels, height, width = batches.shape
    if channels > 1:
        return batches
    return batches.as_strided(batches.shape, (size * height * width, height * width, 1, width, 1))


def _shifted(pixels: Tensor, draw: Tensor, augment: Literal["crop-flip", "jitter-2"]) -> Tensor:
    """Return ``[n, c, h, w]`` shifted by a few pixels (black outside); ``crop-flip`` flips half."""
    reach = _SHIFT[augment]
    n, _, height, width = pixels.shape
    offset = (draw[:, :2] * (2 * reach + 1)) >> 16
    y = offset[:, 0, None] + torch.arange(height, device=pixels.device)
    x = offset[:, 1, None] + torch.arange(width, device=pixels.device)
    if augment == "crop-flip":
        x = torch.where(draw[:, 2, None] >= 1 << 15, x.flip(1), x)
    image = torch.arange(n, device=pixels.device)[:, None, None]
    moved = pad(pixels, (reach,) * 4)[image, :, y[:, :, None], x[:, None, :]]
    return moved.permute(0, 3, 1, 2).contiguous()
