"""What the receiver of knowledge knows besides the message."""

from __future__ import annotations

from dataclasses import dataclass
from reprlib import repr as shown

from torch import Tensor

from fedkd.errors import FedkdError


@dataclass(frozen=True)
class Sizes:
    """Sizes of soft labels, known to both sides: P public images and C classes."""

    num_public: int
    num_classes: int


@dataclass(frozen=True, eq=False)
class Arrival:
    """What the receiver knows about the knowledge in a message.

    Attributes:
        sizes: of the public set.
        client: partition id that it is attributed to.
        num_examples: private images that it is based on.
        samples: int64 ``[N]``, those that were asked for, or ``None``.
    """

    sizes: Sizes
    client: int
    num_examples: int
    samples: Tensor | None


def taken(tensors: dict[str, Tensor], name: str) -> Tensor:
    """Remove a tensor from those of a message and return it.

    Raises:
        FedkdError: it is missing.
    """
    if name not in tensors:
        raise FedkdError(f"it has no {name} (but {shown([*tensors])})")
    return tensors.pop(name)
