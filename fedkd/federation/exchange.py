"""One exchange between server and clients: instructions sent, replies received, and their bytes.

Payload bytes are the raw buffers of knowledge and requested indices; wire bytes are everything in
the message.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from reprlib import repr as shown
from time import monotonic
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict

from fedkd.clients.instructions import ClientReport, Instruction
from fedkd.data.federated import FederatedData
from fedkd.errors import FedkdError, one_line, safe_logger
from fedkd.experiment import Experiment
from fedkd.federation.events import Events
from fedkd.federation.flower_internals.replies import failure_reason, says_lost
from fedkd.federation.knowledge_records import typed_record
from fedkd.federation.messages import decode_report
from fedkd.federation.report_checks import check_report, with_known_numbers
from fedkd.knowledge.codec import KnownRows

_logger = safe_logger(__name__)

REFUSED = "refused"
"""Name under which the tensors of refused replies are counted."""


@dataclass
class Bytes:
    """Bytes of one direction: payload by client and by tensor, and everything by client."""

    payload: dict[int, int] = field(default_factory=dict)
    wire: dict[int, int] = field(default_factory=dict)
    by_tensor: dict[str, int] = field(default_factory=dict)
    _named: dict[int, dict[str, int]] = field(default_factory=dict, repr=False)

    def count(self, client: int, records: RecordDict, merged: str | None = None) -> None:
        """Add a message to or from a client, its tensors under their own names or all as `merged`."""
        self.wire[client] = self.wire.get(client, 0) + wire_bytes(records)
        sizes = payload_bytes(records)
        self.payload[client] = self.payload.get(client, 0) + sum(sizes.values())
        for name, size in sizes.items():
            key = name if merged is None else merged
            self.by_tensor[key] = self.by_tensor.get(key, 0) + size
        self._named[client] = sizes if merged is None else {}

    def refuse(self, client: int) -> None:
        """Count the tensors of a client's last message as refused, which turned out to be bad."""
        for name, size in self._named.pop(client, {}).items():
            self.by_tensor[name] -= size
            self.by_tensor[REFUSED] = self.by_tensor.get(REFUSED, 0) + size

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
        instructions: by client, what was sent.
        up: bytes received.
        down: bytes sent.
        sent: by client, what it has of our soft labels once it has replied.
        reports: the good replies, in order of partition.
        dropped: by client, why the others do not count.
        lost: those of them that have lost a part of what they are to continue from.
        enrolled_again: those that therefore begin once more like new clients.
        started: when it began, in seconds of the monotonic clock.
        encoding: seconds spent on encoding and decoding.
        events: counts replies from unknown nodes.
    """

    sampled: list[int]
    instructions: dict[int, Instruction] = field(default_factory=dict)
    up: Bytes = field(default_factory=Bytes)
    down: Bytes = field(default_factory=Bytes)
    sent: dict[int, KnownRows | None] = field(default_factory=dict)
    reports: list[ClientReport] = field(default_factory=list)
    dropped: dict[int, str] = field(default_factory=dict)
    lost: set[int] = field(default_factory=set)
    enrolled_again: list[int] = field(default_factory=list)
    started: float = field(default_factory=monotonic)
    encoding: float = 0.0
    events: Events = field(default_factory=Events)

    def receive(
        self,
        replies: Iterable[Message],
        client_of: Mapping[int, int],
        experiment: Experiment,
        data: FederatedData,
        heard: Mapping[int, KnownRows | None],
    ) -> None:
        """Sort replies into good reports and drops with a reason.

        A bad reply, whatever it holds, drops its own client from the round and affects no other. A reply
        from an unknown node is counted as an event, ``stray-reply``; one to the message of another round
        is treated as missing.

        Args:
            replies: everything received.
            client_of: partition ids by node id.
            experiment: the run.
            data: the data as the server sees it.
            heard: by client, what we already have of its soft labels.
        """
        received = monotonic()
        silent = dict.fromkeys(set(self.sampled) - set(self.dropped), "no reply in time")
        for reply in replies:
            client = _sender(reply, client_of)
            if client is None:
                self.events.add("stray-reply", "a reply came from a node without a partition")
            elif client not in self.instructions:
                self.dropped.setdefault(client, "replies without having been asked")
            elif (group := reply.metadata.group_id) != str(self.instructions[client].round):
                if client in silent:
                    silent[client] = f"replies to the message of round {shown(group)}"
            elif silent.pop(client, None) is None:
                self._count(client, reply, None)
                self.dropped.setdefault(client, "replied twice")
                self.lost.discard(client)
                self.reports = [r for r in self.reports if r.client != client]
            else:
                student = experiment.student_of(client)
                self._judge(reply, client, data, student, heard.get(client))
        self.dropped.update(silent)
        self.dropped = {client: one_line(reason) for client, reason in self.dropped.items()}
        self.reports.sort(key=lambda report: report.client)
        self.encoding += monotonic() - received

    def leave_out(self, client: int, reason: str) -> None:
        """Drop a client whose report was good, for a reason that showed later."""
        self.reports = [report for report in self.reports if report.client != client]
        self.dropped[client] = one_line(reason)
        self.up.refuse(client)

    def _judge(
        self,
        reply: Message,
        client: int,
        data: FederatedData,
        student: str,
        heard: KnownRows | None,
    ) -> None:
        """Add a client's report to `reports`, or drop the client."""
        report = None
        try:
            if says_lost(reply):
                self.lost.add(client)
            if reply.has_error():
                raise FedkdError(failure_reason(reply))
            if not reply.has_content():
                raise FedkdError("sends an empty reply")
            instruction = self.instructions[client]
            report = decode_report(
                reply.content,
                instruction.asked,
                data.sizes,
                instruction.wire,
                heard,
                num_examples=len(data.shards[client]),
            )
            check_report(report, instruction, data, student)
            self.reports.append(with_known_numbers(report, instruction))
        except FedkdError as error:
            self.dropped[client] = str(error)
        except Exception:
            # A malicious reply can raise anything; it must not end the round.
            _logger.warning("the reply of client %d cannot be read", client, exc_info=True)
            self.dropped[client] = "sends a reply that cannot be read"
        self._count(client, reply, self.dropped.get(client))

    def _count(self, client: int, reply: Message, refused: str | None) -> None:
        """Count the bytes of a reply; tensor names of refused replies stay out of the record."""
        if reply.has_content():
            self.up.count(client, reply.content, None if refused is None else REFUSED)


def _sender(reply: object, client_of: Mapping[int, int]) -> int | None:
    """Return the client that sent a reply; ``None`` for an unknown node, or what is not a message."""
    node = reply.metadata.src_node_id if isinstance(reply, Message) else None
    return client_of.get(node) if isinstance(node, int) else None


def payload_bytes(records: RecordDict) -> dict[str, int]:
    """Return the bytes of the raw buffers of knowledge and requested indices, by tensor.

    With N public samples, C classes and float32, an upload's ``values`` are N·C·4 bytes. Flower's
    128-byte header of each array is not payload.
    """
    sizes: dict[str, int] = {}
    for record, prefix in (("knowledge", ""), ("request", "requested ")):
        if arrays := typed_record(records, record, ArrayRecord):
            for name, array in arrays.items():
                sizes[prefix + name] = _buffer_size(array.data)
    return sizes


def _buffer_size(data: bytes) -> int:
    """Return the bytes of an array's buffer in a ``.npy``, whatever shape its header claims."""
    width = 2 if data[6:7] == b"\x01" else 4
    header = 8 + width + int.from_bytes(data[8 : 8 + width], "little")
    return max(0, len(data) - header)


def wire_bytes(records: RecordDict) -> int:
    """Return the bytes of everything in a message's records, counted by Flower where it can."""
    return sum(_record_bytes(record) for record in records.values())


def _record_bytes(record: ArrayRecord | ConfigRecord | MetricRecord) -> int:
    try:
        return record.count_bytes()
    except (ValueError, IndexError):  # Flower's count fails at empty texts and lists
        return sum(len(str(name)) + len(str(value)) for name, value in record.items())
