"""Images that live on the device as bytes; batches are gathered, augmented and normalised there.

No ``DataLoader``: per-image Python work is what starves a device when a thousand small clients train.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from fedkd.keyed import draws

Augment = Literal["none", "crop-flip", "jitter-2"]
_SHIFT = {"crop-flip": 4, "jitter-2": 2}
"""Largest shift in pixels: a random crop after padding by 4 (He et al. 2015), or Hinton's jitter by 2."""


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

    def __len__(self) -> int:
        return len(self.pixels)

    @property
    def device(self) -> torch.device:
        """Where the pixels are."""
        return self.pixels.device

    def keep(self, rows: Tensor, labelled: bool = True) -> Images:
        """Return the images `rows` (int64 ``[M]``) as a set of their own."""
        labels = self.labels[rows] if labelled and self.labels is not None else None
        return replace(self, pixels=self.pixels[rows], labels=labels)

    def batch(self, rows: Tensor) -> Tensor:
        """Return normalised images ``[..., c, h, w]`` for `rows` (int64 ``[...]``)."""
        return self.normalise(self.pixels[rows])

    def augmented(self, rows: Tensor, augment: Augment, keys: Tensor) -> Tensor:
        """Return augmented normalised images ``[A, B, c, h, w]``.

        Args:
            rows: int64 ``[A, B]``.
            augment: what to do.
            keys: int64 ``[A]``, each client's stream for this step.
        """
        if augment == "none":
            return self.batch(rows)
        draw = torch.func.vmap(lambda key: draws(key, 3 * rows.shape[1]).reshape(-1, 3))(keys)
        moved = _shifted(self.pixels[rows.flatten()], draw.reshape(-1, 3), augment)
        return self.normalise(moved.reshape(*rows.shape, *moved.shape[1:]))

    def normalise(self, pixels: Tensor) -> Tensor:
        """Scale uint8 ``[..., c, h, w]`` to zero mean and unit deviation."""
        mean = torch.tensor(self.mean, dtype=self.dtype, device=pixels.device)[:, None, None]
        std = torch.tensor(self.std, dtype=self.dtype, device=pixels.device)[:, None, None]
        return pixels.to(self.dtype).mul_(1 / (255 * std)).sub_(mean / std)


def _shifted(pixels: Tensor, draw: Tensor, augment: Literal["crop-flip", "jitter-2"]) -> Tensor:
    """Shift ``[n, c, h, w]`` by up to some pixels (black outside), and flip half of them if asked."""
    reach = _SHIFT[augment]
    n, _, height, width = pixels.shape
    offset = (draw[:, :2] * (2 * reach + 1)) >> 16
    y = offset[:, 0, None] + torch.arange(height, device=pixels.device)
    x = offset[:, 1, None] + torch.arange(width, device=pixels.device)
    if augment == "crop-flip":
        x = torch.where(draw[:, 2, None] >= 1 << 15, x.flip(1), x)
    image = torch.arange(n, device=pixels.device)[:, None, None]
    moved = pad(pixels, (reach,) * 4)[image, :, y[:, :, None], x[:, None, :]]
    return moved.permute(0, 3, 1, 2)
