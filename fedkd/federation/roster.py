"""The clients of a federation: which node holds which partition, and why other nodes are unusable."""

from __future__ import annotations

from collections.abc import Iterator
from time import monotonic, sleep

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from fedkd.data.federated import FederatedData
from fedkd.errors import FedkdError, Setting, one_line, safe_logger
from fedkd.experiment import Experiment
from fedkd.federation.flower_internals.replies import failure_reason
from fedkd.federation.messages import HELLO, Introduction, decode_introduction
from fedkd.user_code import fingerprint

_logger = safe_logger(__name__)

HELLO_TIMEOUT = 60.0
"""Seconds until all clients must have introduced themselves."""


class Roster:
    """The clients that have introduced themselves.

    Args:
        grid: reaches the clients.
        experiment: the run.
        data: the data as the server sees it.
        record: the experiment as it is sent.
    """

    def __init__(
        self, grid: Grid, experiment: Experiment, data: FederatedData, record: ConfigRecord
    ) -> None:
        self._grid = grid
        self._experiment = experiment
        self._data = data
        self._record = record
        self._nodes: dict[int, int] = {}  # node ids by partition
        self._failures: list[str] = []

    def node_of(self, client: int) -> int | None:
        """Return the node that holds a partition, or ``None`` if none has introduced itself."""
        return self._nodes.get(client)

    def client_of(self) -> dict[int, int]:
        """Return partition ids by node id."""
        return {node: client for client, node in self._nodes.items()}

    def why_missing(self) -> str:
        """Return why a client that is not in the roster is dropped."""
        reasons = "; ".join(sorted(set(self._failures)))
        return f"never introduced itself ({reasons})" if reasons else "never introduced itself"

    def complete(self) -> None:
        """Ask new nodes for an introduction if a client is missing.

        An introduction that does not fit leaves out its own node alone. Of two nodes that hold the same
        partition the one that was heard first stays.

        Raises:
            FedkdError: at the first call: fewer nodes than ``num-clients`` after a minute, or fewer than
                ``quorum`` whose introductions fit. After the first call, missing clients are not waited
                for, and nothing ends the run.
        """
        if len(self._nodes) < self._experiment.num_clients:
            self._introduce()

    def _introduce(self) -> None:
        is_first = not self._nodes
        new = set(self._present(is_first)) - set(self._nodes.values())
        self._failures = []
        misfits = [error for reply in self._hellos(new) if (error := self._judge(reply))]
        if is_first and misfits and len(self._nodes) < (quorum := self._experiment.quorum):
            raise FedkdError(
                Setting("quorum", quorum),
                f": {len(self._nodes)} of {self._experiment.num_clients} clients fit together; ",
                *misfits[0].parts,
            )

    def _judge(self, reply: Message) -> FedkdError | None:
        """Enrol a node, or note why not; return what does not fit in what it says of itself."""
        misfit = None
        try:
            if reply.has_error():
                raise FedkdError(failure_reason(reply))
            introduction = decode_introduction(reply.content)
            misfit = self._misfit(introduction, reply.metadata.src_node_id)
            if misfit is not None:
                raise misfit
            self._nodes[introduction.client] = reply.metadata.src_node_id
        except FedkdError as error:
            self._failures.append(one_line(str(error)))
            _logger.warning("a node is left out: %s", self._failures[-1])
        except Exception:  # what a stranger sends can raise anything
            _logger.warning("an introduction cannot be read", exc_info=True)
            self._failures.append("sends an introduction that cannot be read")
        return misfit

    def _hellos(self, nodes: set[int]) -> Iterator[Message]:
        """Yield the first reply of each node that is asked for an introduction."""
        if not nodes:
            return
        content = RecordDict({"experiment": self._record})
        timeout = min(HELLO_TIMEOUT, self._experiment.round_timeout)
        hellos = [Message(content, node, HELLO, ttl=timeout) for node in sorted(nodes)]
        silent = set(nodes)
        for reply in self._grid.send_and_receive(hellos, timeout=timeout):
            if reply.metadata.src_node_id in silent:
                silent.remove(reply.metadata.src_node_id)
                yield reply

    def _present(self, is_first: bool) -> list[int]:
        """Return the connected nodes; the first time, wait until there are enough."""
        num_clients, deadline = self._experiment.num_clients, monotonic() + HELLO_TIMEOUT
        nodes = list(self._grid.get_node_ids())
        while is_first and len(nodes) < num_clients and monotonic() < deadline:
            sleep(0.1)
            nodes = list(self._grid.get_node_ids())
        if is_first and len(nodes) < num_clients:
            raise FedkdError(
                Setting("num-clients", num_clients),
                f": only {len(nodes)} Flower nodes are there; start as many, with "
                f'--federation-config "num-supernodes={num_clients}" under `flwr run`',
            )
        return nodes

    def _misfit(self, introduction: Introduction, node: int) -> FedkdError | None:
        """Return why a node cannot be the client that it says it is, if it cannot."""
        client, num_clients = introduction.client, self._experiment.num_clients
        if introduction.sources != fingerprint(self._experiment.client_modules):
            return FedkdError(
                f"client {client} runs other code than the server (fedkd, strategies or "
                "client-code differ); start both from the same installation"
            )
        if not 0 <= client < num_clients:
            return FedkdError(
                f"a node holds partition {client}; ",
                Setting("num-clients", num_clients),
                f" allows 0 to {num_clients - 1}",
            )
        if client in self._nodes:
            return FedkdError(
                f"nodes {self._nodes[client]} and {node} both hold partition {client}"
            )
        if introduction.num_examples not in (None, held := len(self._data.shards[client])):
            return FedkdError(
                f"introduces num-examples = {introduction.num_examples} of a partition of {held}"
            )
        if introduction.student != self._experiment.student_of(client):
            return FedkdError(f"introduces another student, {introduction.student}")
        return None
