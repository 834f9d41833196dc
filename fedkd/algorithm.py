"""What the round loop asks of an algorithm: nine things, and what an algorithm declares of itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol

from torch import Tensor

from fedkd.codecs import Wire
from fedkd.experiment import Experiment
from fedkd.knowledge import Knowledge
from fedkd.phases import Phase
from fedkd.server import Replies, Server


@dataclass(frozen=True)
class Facts:
    """What a strategy declares of itself; printed by ``fedkd strategies``.

    Attributes:
        paper: arXiv number or venue.
        up: payload bytes a client sends a round, a formula over P (samples asked), C (classes), K
            (clients), D (width of the student's features), S (bytes of the student's parameters and
            buffers), I (bytes of a list of the P samples: 0 for the whole public set, else 4 bytes a
            sample or a bit a public image, whichever is less) and the strategy's settings by name;
            ``<=`` in front where coding or caching makes it less.
        down: payload bytes a client receives a round, likewise.
        public_labels: whether the algorithm needs the labels of the public set.
        server_model: whether it keeps a model at the server.
        reports: whose accuracy the paper reports.
        mixed_models: whether clients of different architectures learn from each other.
    """

    paper: str
    up: str
    down: str
    public_labels: bool = False
    server_model: Literal["none", "optional", "required"] = "none"
    reports: Literal["clients", "server"] = "clients"
    mixed_models: bool = True


class Algorithm(Protocol):
    """An algorithm as the round loop sees it: what `fedkd.strategy.DistillationStrategy` satisfies."""

    facts: ClassVar[Facts]
    closes: ClassVar[Literal["digest", "revisit"]]
    """Last phase of the closing exchange, after which final accuracies are taken."""

    def name(self) -> str:
        """Return the name under which it is found."""
        ...

    def check(self, experiment: Experiment) -> None:
        """Refuse an experiment that the algorithm would get silently wrong.

        Raises:
            FedkdError: the keys do not go together; the text says which to change.
        """
        ...

    def wires(self, experiment: Experiment) -> tuple[Wire, Wire]:
        """Return how soft labels cross the wire in this experiment, up and down."""
        ...

    def phases(self, round: int) -> list[Phase]:
        """Return what clients do in `round`; 1 is a client's first."""
        ...

    def request(self, server: Server) -> Tensor:
        """Return the public samples to be answered this round, int64 ``[M]``, distinct."""
        ...

    def update(self, replies: Replies, server: Server) -> Knowledge | None:
        """Return new knowledge from a round's replies, or ``None`` to keep the previous."""
        ...

    def personalise(self, knowledge: Knowledge, client: int, server: Server) -> Knowledge:
        """Return what `client` receives; the same object for all who receive the same."""
        ...
