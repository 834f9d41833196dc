"""A grid in this process, and the identity that Flower 1.41 needs for building messages.

Flower's own simulation sets a process-wide identity, message ids and more internally; an
in-process grid has to do the same, with parts of Flower that are not public.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from uuid import uuid4

from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.common.constant import SUPERLINK_NODE_ID  # noqa: TID251
from flwr.serverapp import Grid
from flwr.supercore.run import Run  # noqa: TID251
from flwr.supercore.task_identity import TaskIdentity  # noqa: TID251

FIRST_NODE_ID = 1000
"""Node id of partition 0 on a `LocalGrid`; far from 0, to keep the two apart."""

_RUN_ID = 1
_TASK_ID = 1

Handle = Callable[[Sequence[tuple[int, Message]]], Sequence[Message | None]]
"""Answers messages for clients, passed as (partition id, message); None = no reply from this client."""


@contextmanager
def task_identity() -> Iterator[None]:
    """Give this process the identity of a ServerApp, with which it can build messages.

    `Message(content, dst_node_id, message_type)` reads a process-wide identity, which Flower sets
    for the apps it starts. The previous identity is restored afterwards, also if the block starts a
    simulation, which sets its own.
    """
    names = ("_task_id", "_run_id", "_node_id")
    before = {name: getattr(TaskIdentity, name) for name in names}
    TaskIdentity.task_id = _TASK_ID
    TaskIdentity.run_id = _RUN_ID
    TaskIdentity.node_id = SUPERLINK_NODE_ID
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(TaskIdentity, name, value)


class LocalGrid(Grid):
    """A grid whose clients live in this process and are answered together.

    Every `send_and_receive` (or `push_messages`) makes one call of `handle` with all its messages,
    so that an engine can train clients side by side. Partition k is node `FIRST_NODE_ID + k`. Records
    are rebuilt on their way in and out, as if they had crossed a wire: a client that changes its
    message, or keeps its reply and changes it, affects nothing else.

    The work is done when the messages are sent. So a `timeout` has no effect, a client without a
    reply is not waited for, and an exception of `handle` ends the call: `handle` itself has to turn
    the failure of one client into an `error_reply`. Two messages to one client both reach
    `handle`, in their order. Build messages within `task_identity`.

    Raises:
        ValueError: a message is for a node that does not exist, or the replies do not match.
    """

    def __init__(self, handle: Handle, *, num_clients: int) -> None:
        self._handle = handle
        self._num_clients = num_clients
        self._run = Run.create_empty(_RUN_ID)
        self._replies: dict[str, Message] = {}

    def set_run(self, run: Run) -> None:
        """Set the run that `run` returns; nothing else depends on it."""
        self._run = run

    @property
    def run(self) -> Run:
        """The run of this grid."""
        return self._run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """Return a message; `Message(...)` does the same."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """Return the K node ids in the order of their partitions."""
        return range(FIRST_NODE_ID, FIRST_NODE_ID + self._num_clients)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Answer the messages and return their ids, for `pull_messages`."""
        instructions = [self._receive(message) for message in messages]
        if not instructions:
            return []
        replies = self._handle(instructions)
        if len(replies) != len(instructions):
            raise ValueError(f"{len(instructions)} messages got {len(replies)} replies")
        ids = [instruction.metadata.message_id for _, instruction in instructions]
        for message_id, reply in zip(ids, replies, strict=True):
            if reply is not None:
                self._replies[message_id] = _sent(message_id, reply)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Return the replies to these messages, each once, in the order of the ids."""
        replies = (self._replies.pop(message_id, None) for message_id in message_ids)
        return [reply for reply in replies if reply is not None]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Send all messages at once and return the replies in their order."""
        return self.pull_messages(self.push_messages(messages))

    def _receive(self, message: Message) -> tuple[int, Message]:
        """Return (partition id, the client's own copy) of a message, which gets an id."""
        partition = message.metadata.dst_node_id - FIRST_NODE_ID
        if not 0 <= partition < self._num_clients:
            last = FIRST_NODE_ID + self._num_clients - 1
            raise ValueError(
                f"no node {message.metadata.dst_node_id}: there are {FIRST_NODE_ID} to {last}"
            )
        _set_message_id(message, str(uuid4()))
        return partition, _isolated(message)


def _sent(message_id: str, reply: Message) -> Message:
    """Return the server's own copy of a client's reply."""
    if reply.metadata.reply_to_message_id != message_id:
        raise ValueError("a reply is for another message")
    _set_message_id(reply, str(uuid4()))
    return _isolated(reply)


def _set_message_id(message: Message, message_id: str) -> None:
    message.metadata.__dict__["_message_id"] = message_id  # as Flower itself does: no setter


def _isolated(message: Message) -> Message:
    """Return a message that shares nothing mutable with this one."""
    metadata = copy.copy(message.metadata)
    if message.has_error():
        return Message(error=message.error, metadata=metadata)  # type: ignore[call-overload,no-any-return]
    content = isolated_records(message.content)
    return Message(content=content, metadata=metadata)  # type: ignore[call-overload,no-any-return]


def isolated_records(records: RecordDict) -> RecordDict:
    """Return records that share nothing mutable with these."""
    return RecordDict({name: _isolated_record(record) for name, record in records.items()})


def _isolated_record(
    record: ArrayRecord | MetricRecord | ConfigRecord,
) -> ArrayRecord | MetricRecord | ConfigRecord:
    """Return a copy of a record. The bytes of an `Array` cannot change, so they are shared."""
    if isinstance(record, ArrayRecord):
        return ArrayRecord(
            {name: Array(a.dtype, a.shape, a.stype, a.data) for name, a in record.items()}
        )
    # Skips Flower's check of every key and value, which was done before: an experiment has fifty.
    rebuilt = copy.copy(record)
    values = {k: list(v) if isinstance(v, list) else v for k, v in record.items()}
    rebuilt.__dict__["_data"] = values
    return rebuilt
