"""One exchange between server and clients: what was sent to whom, what came back, and its bytes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from time import monotonic
from typing import Any

from flwr.app import Message, RecordDict

from fedkd.checks import check_report, with_known_metrics
from fedkd.codecs import Reference
from fedkd.errors import FedkdError
from fedkd.experiment import Experiment
from fedkd.messages import decode_report, payload_bytes, wire_bytes
from fedkd.orders import Order, Report
from fedkd.transport.adapter import failure_reason
from fedkd.world import World


@dataclass
class Bytes:
    """Bytes of one direction: payload by client and by tensor, and everything by client."""

    payload: dict[int, int] = field(default_factory=dict)
    wire: dict[int, int] = field(default_factory=dict)
    by_tensor: dict[str, int] = field(default_factory=dict)

    def count(self, client: int, records: RecordDict) -> None:
        """Add a message to or from a client."""
        self.wire[client] = wire_bytes(records)
        sizes = payload_bytes(records)
        self.payload[client] = sum(sizes.values())
        for name, size in sizes.items():
            self.by_tensor[name] = self.by_tensor.get(name, 0) + size

    def record(self, direction: str, clients: Sequence[int]) -> dict[str, Any]:
        """Return the sums, and the numbers of `clients` in their order."""
        return {
            f"bytes_{direction}": sum(self.payload.values()),
            f"wire_bytes_{direction}": sum(self.wire.values()),
            f"bytes_{direction}_by_tensor": self.by_tensor,
            f"bytes_{direction}_by_client": [self.payload.get(k, 0) for k in clients],
            f"wire_bytes_{direction}_by_client": [self.wire.get(k, 0) for k in clients],
        }


@dataclass
class Exchange:
    """One exchange in progress.

    Attributes:
        sampled: partition ids of the clients drawn, sorted.
        orders: of those that were sent one.
        up: bytes that came.
        down: bytes that were sent.
        sent: what each client has of our soft labels once it has replied.
        reports: the good replies, in order of partition.
        dropped: why each of the others does not count.
        started: when it began, seconds.
        encoding: seconds spent on encoding and decoding.
    """

    sampled: list[int]
    orders: dict[int, Order] = field(default_factory=dict)
    up: Bytes = field(default_factory=Bytes)
    down: Bytes = field(default_factory=Bytes)
    sent: dict[int, Reference | None] = field(default_factory=dict)
    reports: list[Report] = field(default_factory=list)
    dropped: dict[int, str] = field(default_factory=dict)
    started: float = field(default_factory=monotonic)
    encoding: float = 0.0

    def receive(
        self,
        replies: Iterable[Message],
        client_of: Mapping[int, int],
        experiment: Experiment,
        world: World,
        heard: Mapping[int, Reference | None],
    ) -> None:
        """Sort replies into good reports and drops with a reason.

        Args:
            replies: whatever came.
            client_of: partition ids by node id.
            experiment: the run.
            world: the data as the server sees it.
            heard: by client, what we have of its soft labels already.
        """
        received = monotonic()
        silent = set(self.sampled) - set(self.dropped)
        for reply in replies:
            client = client_of[reply.metadata.src_node_id]
            if client not in silent:
                self.dropped.setdefault(client, "replied twice")
                self.reports = [r for r in self.reports if r.client != client]
                continue
            silent.remove(client)
            if reply.has_error():
                self.dropped[client] = failure_reason(reply)
                continue
            self.up.count(client, reply.content)
            order = self.orders[client]
            try:
                report = decode_report(
                    reply.content, order.asked, world.sizes, order.wire, heard.get(client)
                )
                check_report(report, order, world, experiment.student_of(client))
                self.reports.append(with_known_metrics(report, order))
            except FedkdError as error:
                self.dropped[client] = str(error)
        for client in silent:
            self.dropped[client] = "no reply in time"
        self.reports.sort(key=lambda report: report.client)
        self.encoding += monotonic() - received
