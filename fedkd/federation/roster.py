"""The clients of a federation: which node holds which partition, and why other nodes are unusable."""

from __future__ import annotations

from collections.abc import Iterator
from time import monotonic, sleep

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from fedkd.data.federated import FederatedData
from fedkd.errors import FedkdError, Setting
from fedkd.experiment import Experiment
from fedkd.federation.flower_internals.replies import failure_reason
from fedkd.federation.messages import HELLO, Introduction, decode_introduction
from fedkd.user_code import fingerprint

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

        Raises:
            FedkdError: at the first call: fewer clients than ``num-clients`` after a minute, two for one
                partition, or clients that run other code than the server. After the first call, missing
                clients are not waited for and late ones cannot end the run.
        """
        if len(self._nodes) < self._experiment.num_clients:
            self._introduce()

    def _introduce(self) -> None:
        is_first = not self._nodes
        new = set(self._present(is_first)) - set(self._nodes.values())
        self._failures = []
        for reply in self._hellos(new):
            if reply.has_error():
                self._failures.append(failure_reason(reply))
                continue
            try:
                introduction = decode_introduction(reply.content)
            except FedkdError as error:
                self._failures.append(str(error))
                continue
            try:
                self._enrol(introduction, reply.metadata.src_node_id)
            except FedkdError as error:
                if is_first:  # to be fixed before the run starts
                    raise
                self._failures.append(str(error))

    def _hellos(self, nodes: set[int]) -> Iterator[Message]:
        """Yield the replies of nodes that are asked for an introduction."""
        if not nodes:
            return
        content = RecordDict({"experiment": self._record})
        timeout = min(HELLO_TIMEOUT, self._experiment.round_timeout)
        hellos = [Message(content, node, HELLO, ttl=timeout) for node in nodes]
        for reply in self._grid.send_and_receive(hellos, timeout=timeout):
            if reply.metadata.src_node_id in nodes:
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

    def _enrol(self, introduction: Introduction, node: int) -> None:
        client, num_clients = introduction.client, self._experiment.num_clients
        if introduction.sources != fingerprint(self._experiment.client_modules):
            raise FedkdError(
                f"client {client} runs other code than the server (fedkd, strategies or "
                "client-code differ); start both from the same installation"
            )
        known = self._nodes.get(client, node)
        if known != node:
            raise FedkdError(f"nodes {known} and {node} both hold partition {client}")
        if not 0 <= client < num_clients:
            raise FedkdError(
                f"a node holds partition {client}; ",
                Setting("num-clients", num_clients),
                f" allows 0 to {num_clients - 1}",
            )
        if introduction.num_examples not in (None, held := len(self._data.shards[client])):
            self._failures.append(
                f"introduces num-examples = {introduction.num_examples} of a partition of {held}"
            )
        elif introduction.student != self._experiment.student_of(client):
            self._failures.append(f"introduces another student, {introduction.student}")
        else:
            self._nodes[client] = node
