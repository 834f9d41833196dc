"""What the receiver of knowledge knows besides the message that it came in."""

from __future__ import annotations

from dataclasses import dataclass
from reprlib import repr as shown

from torch import Tensor

from fedkd.errors import FedkdError


@dataclass(frozen=True)
class Sizes:
    """What both sides know of soft labels: P public images and C classes."""

    num_public: int
    num_classes: int


@dataclass(frozen=True, eq=False)
class Arrival:
    """What the receiver of knowledge knows of it.

    Attributes:
        sizes: of the public set.
        client: partition id that it is attributed to.
        num_examples: private images behind it.
        samples: those that were asked for.
    """

    sizes: Sizes
    client: int
    num_examples: int
    samples: Tensor | None


def taken(tensors: dict[str, Tensor], name: str) -> Tensor:
    """Take a tensor out of those of a message.

    Raises:
        FedkdError: it is not there.
    """
    if name not in tensors:
        raise FedkdError(f"it has no {name} (but {shown([*tensors])})")
    return tensors.pop(name)
