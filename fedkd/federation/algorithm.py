"""What the round loop needs from an algorithm, and the checks of what the algorithm returns."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import copy, deepcopy
from dataclasses import dataclass
from inspect import cleandoc
from typing import ClassVar, Literal, Protocol

from torch import Tensor

from fedkd.errors import FedkdError
from fedkd.experiment import Experiment
from fedkd.federation.server import Replies, Server
from fedkd.knowledge import (
    KINDS,
    ClassMeans,
    Knowledge,
    SoftLabels,
    Wire,
    check_answer,
    require_one,
)
from fedkd.knowledge.samples import check_samples
from fedkd.phases import Apply, Phase, check_phases, closing
from fedkd.training.parameters import State
from fedkd.user_code import attributed


@dataclass(frozen=True)
class Facts:
    """What a strategy declares about itself; printed by ``fedkd strategies``.

    Attributes:
        paper: arXiv number, DOI or venue; ``"none"`` where nothing was published.
        up: payload bytes a client sends a round, a formula over P (samples asked), C (classes), K
            (clients), D (width of the student's features), S (bytes of the student's parameters and
            buffers), I (bytes of a list of the P samples: 0 for the whole public set, else 4 bytes a
            sample or a bit a public image, whichever is less) and the strategy's settings by name;
            preceded by ``<=`` where coding or caching makes it less. Where clients answer no samples, P
            are the samples drawn for the round.
        down: payload bytes a client receives a round, likewise.
        public_labels: whether the algorithm needs the labels of the public set.
        server_model: whether it keeps a model at the server.
        local_teacher: whether the algorithm needs a local teacher at every client.
        headline: whose accuracy the paper's tables show.
        mixed_models: whether clients of different architectures learn from each other.
        distils: whether a model learns from outputs of others, so that knowledge distillation is cited.
        bibtex: the paper's entry as ``fedkd cite`` prints it, indented as you like.
    """

    paper: str
    up: str
    down: str
    public_labels: bool = False
    server_model: Literal["none", "optional", "required"] = "none"
    headline: Literal["clients", "server"] = "clients"
    mixed_models: bool = True
    distils: bool = True
    bibtex: str = ""
    local_teacher: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "bibtex", cleandoc(self.bibtex))


class Algorithm(Protocol):
    """An algorithm as the round loop sees it: what `fedkd.strategy.DistillationStrategy` satisfies."""

    facts: ClassVar[Facts]
    closes: ClassVar[Literal["digest", "revisit"]]
    """Last phase of the closing exchange, after which final accuracies are taken."""

    def name(self) -> str:
        """Return the name of the algorithm."""
        ...

    def check(self, experiment: Experiment) -> None:
        """Refuse an experiment that would silently give wrong results with this algorithm.

        Raises:
            FedkdError: the keys contradict each other; the text says which to change.
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


@dataclass
class Proposal:
    """What an update makes of some replies, before it is accepted.

    Attributes:
        knowledge: new, or ``None`` to keep the previous.
        server: with the state that the update leaves.
        model: the weights of the server's model before the update, if it has one.
        fault: the error of its values, if these are wrong.
    """

    knowledge: Knowledge | None
    server: Server
    model: State | None = None
    fault: FedkdError | None = None


class CheckedAlgorithm:
    """An algorithm whose results are checked, and whose errors say where they come from.

    Args:
        algorithm: the algorithm to check.
        server: what the algorithm may read and change.
    """

    def __init__(self, algorithm: Algorithm, server: Server) -> None:
        self._algorithm = algorithm
        self._server = server
        self.wire_up, self.wire_down = algorithm.wires(server.experiment)

    @property
    def facts(self) -> Facts:
        """What the algorithm declares about itself."""
        return self._algorithm.facts

    @contextmanager
    def attributed_to(self, method: str, clients: Sequence[int] = ()) -> Iterator[None]:
        """Add the algorithm, its method and line, the round and the clients to any error raised."""
        where = f"{method} of {self._algorithm.name()}, round {self._server.round}"
        if clients:
            where += f", client{'s' * (len(clients) > 1)} {_listed(clients)}"
        with attributed(where):
            yield

    def phases(self, number: int) -> list[Phase]:
        """Return a round's phases."""
        with self.attributed_to("phases"):
            return check_phases(self._algorithm.phases(number))

    def closing(self, number: int) -> list[Phase]:
        """Return the phases of the closing exchange, which is numbered like a round."""
        return closing(self.phases(number), self._algorithm.closes)

    def request(self) -> Tensor:
        """Return the public samples to be answered, int64 ``[M]``."""
        with self.attributed_to("request"):
            return check_samples(self._algorithm.request(self._server), self._server.num_public)

    def personalise(
        self,
        knowledge: Knowledge,
        client: int,
        phases: Sequence[Phase],
        server: Server | None = None,
    ) -> Knowledge:
        """Return what a client receives: K = 1, unless one of its phases is a procedure that chooses.

        Args:
            knowledge: of all clients.
            client: its partition id.
            phases: what it is to do.
            server: as a proposal has left it; by default as it is.
        """
        with self.attributed_to("personalise", [client]):
            received: object = self._algorithm.personalise(
                knowledge, client, server or self._server
            )
            if not isinstance(received, KINDS):
                raise FedkdError(f"returns a {type(received).__name__} instead of knowledge")
            if not any(isinstance(phase, Apply) for phase in phases):
                require_one(received)
        return received

    def propose(self, replies: Replies) -> Proposal:
        """Return the new knowledge that replies lead to, to be accepted or withdrawn.

        Raises:
            FedkdError: the update fails, or returns what does not fit the experiment.
        """
        server = self._server
        draft = copy(server)
        draft.state = deepcopy(server.state)
        model = None if server.model is None else server.model.state(0)
        try:
            with self.attributed_to("update", replies.clients):
                new = self._algorithm.update(replies, draft)
                if new is not None:
                    self.check_knowledge(new)
        except BaseException:
            _restore_model(server, model)
            raise
        proposal = Proposal(new, draft, model)
        if new is not None:
            try:
                with self.attributed_to("update", replies.clients):
                    check_answer(new)
            except FedkdError as error:
                proposal.fault = error
        return proposal

    def accept(self, proposal: Proposal) -> Knowledge | None:
        """Make the server what a proposal has made of it, and return the new knowledge.

        Raises:
            FedkdError: the values of the knowledge are wrong.
        """
        if proposal.fault is not None:
            self.withdraw(proposal)
            raise proposal.fault
        self._server.state, self._server.trained = proposal.server.state, proposal.server.trained
        return proposal.knowledge

    def withdraw(self, proposal: Proposal) -> None:
        """Put the server's model back to what it was before a proposal, which changed nothing else."""
        _restore_model(self._server, proposal.model)

    def check_knowledge(self, new: object) -> None:
        """Refuse what is not knowledge, or does not fit the experiment.

        Raises:
            FedkdError: it is another type, or its classes or samples are wrong.
        """
        if not isinstance(new, KINDS):
            raise FedkdError(f"returns a {type(new).__name__} instead of knowledge or None")
        if isinstance(new, SoftLabels):
            sizes, (_, _, classes) = self._server.data.sizes, new.values.shape
            if classes != sizes.num_classes:
                raise FedkdError(
                    f"returns soft labels of {classes} classes: must be {sizes.num_classes}"
                )
            check_samples(new.samples, self._server.num_public)
        if isinstance(new, ClassMeans) and new.values.shape[1] != self._server.num_classes:
            raise FedkdError(
                f"returns means of {new.values.shape[1]} classes: must be {self._server.num_classes}"
            )


def _restore_model(server: Server, state: State | None) -> None:
    if server.model is not None and state is not None:
        server.model.load(0, state)


def _listed(clients: Sequence[int]) -> str:
    """Return the first ten clients as text, and how many more there are."""
    more = f" and {len(clients) - 10} more" if len(clients) > 10 else ""
    return ", ".join(map(str, clients[:10])) + more
