"""What a strategy lets a client do besides training: a function of one client's data and models.

A *procedure* is called client by client, once a round; it chooses among what was received, or works
out something of its own and keeps it in the client's state. It travels by reference, as a term does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from fedkd.errors import FedkdError
from fedkd.knowledge import SoftLabels

Role = Literal["student", "teacher"]
"""Which local model: a client without a local teacher takes its student for both."""


class Predictor(Protocol):
    """Predicts for public samples with one of a client's models."""

    def __call__(self, samples: Tensor, model: Role = "teacher") -> Tensor:
        """Return logits ``[N, C]`` for samples int64 ``[N]``."""
        ...


@dataclass(eq=False)
class LocalClient:
    """What a procedure sees of the client that it works for.

    Attributes:
        images: normalised private images ``[n, c, h, w]``.
        labels: int64 ``[n]``.
        received: soft labels received, or ``None``; may be replaced by others, of a sample at least.
        state: tensors by name that the client keeps between rounds; the same names, types and shapes
            for all clients, round after round.
        predict: logits ``[N, C]`` of a local model for public samples (int64 ``[N]``), as in
            ``predict(samples, "student")``; the teacher's (without one, the student's) if not said.
        generator: a random generator for a purpose, the client's own in this round.
        load_public: what `public` is made by when it is looked at.
    """

    images: Tensor
    labels: Tensor
    received: SoftLabels | None
    state: dict[str, Tensor]
    predict: Predictor
    generator: Callable[[str], torch.Generator]
    load_public: Callable[[], Tensor]

    @property
    def public(self) -> Tensor:
        """Normalised public images ``[P, c, h, w]``."""
        return self.load_public()


ProcedureFunction = Callable[..., None]


@dataclass(frozen=True)
class Procedure:
    """A function that clients run when a strategy's phases say so."""

    function: ProcedureFunction

    @property
    def reference(self) -> str:
        """The ``module:function`` under which the procedure travels."""
        return f"{self.function.__module__}:{self.function.__qualname__}"

    def __call__(self, client: LocalClient, **numbers: Any) -> None:
        """Work for one client; `numbers` are those of the phase."""
        self.function(client, **numbers)


def procedure(function: ProcedureFunction) -> Procedure:
    """Declare a module-level function ``(client, **numbers) -> None`` to be a procedure."""
    return Procedure(function)


def check_received(procedure: Procedure, labels: object) -> None:
    """Refuse what a procedure puts in the place of received soft labels.

    Raises:
        FedkdError: no soft labels, or of no sample.
    """
    who = procedure.reference
    if not isinstance(labels, SoftLabels):
        raise FedkdError(f"{who} leaves a {type(labels).__name__} as received soft labels")
    if not labels.values.numel():
        raise FedkdError(f"{who} leaves no soft labels: keep those of a sample at least")
