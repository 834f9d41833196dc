"""Reach clients that are SuperNodes of a deployment, and keep a node within its limits."""

from __future__ import annotations

import faulthandler
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Event, Thread

from flwr.app import Context, Message
from flwr.serverapp import Grid

from fedkd.engines.node_limits import NodeLimits
from fedkd.errors import one_line
from fedkd.federation.flower_internals.backend import GuardedGrid
from fedkd.federation.flower_internals.replies import error_reply

_POLL_S = 1.0
_LEAST_S = 1.0
_LATE = "the message's deadline, or the node's max-seconds, has passed"
_GRACE_S = 10.0

_STDERR = 2

_CLIENT_PROCESS = "flwr-clientapp"
"""The command in which a SuperNode runs a message's ClientApp."""


class DeployedGrid(GuardedGrid):
    """A grid that turns every outcome of a message into a reply of the node that it was sent to.

    Flower's own reads all replies at once: bytes that it cannot read end the run, and a node that dies
    while it sends blocks the reader for minutes. And when the SuperLink answers in place of a node that
    is gone, it answers under its own id.
    """

    def __init__(self, grid: Grid) -> None:
        super().__init__(grid, stopped=Event())

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Return the replies that arrive within `timeout` seconds; each is waited for separately.

        Raises:
            BaseException: the SuperLink itself cannot be reached, or has ended the run.
        """
        sent = list(messages)
        self.push_messages(sent)
        end = float("inf") if timeout is None else time.monotonic() + timeout
        arrived: SimpleQueue[Message | BaseException] = SimpleQueue()
        for message in sent:
            # Daemons: a thread that a node blocks must not block the process's exit.
            Thread(target=self._wait, args=(message, end, arrived), daemon=True).start()
        replies: list[Message] = []
        while len(replies) < len(sent):
            left = None if timeout is None else max(0.0, end - time.monotonic())
            try:
                reply = arrived.get(timeout=left)
            except Empty:
                break
            if isinstance(reply, BaseException):
                raise reply
            replies.append(reply)
        return replies

    def _wait(
        self, message: Message, end: float, arrived: SimpleQueue[Message | BaseException]
    ) -> None:
        """Poll for the reply to a message until it arrives or the time is up."""
        while time.monotonic() < end:
            try:
                reply = self._read(message)
            except BaseException as error:  # Flower raises when the run was stopped
                arrived.put(error)
                return
            if reply is not None:
                arrived.put(reply)
                return
            time.sleep(_POLL_S)

    def _read(self, message: Message) -> Message | None:
        """Return the reply to a message if there is one, whatever is wrong with it."""
        try:
            pulled = list(self.pull_messages([message.metadata.message_id]))
        except Exception as error:
            if _is_of_the_network(error):
                raise
            return error_reply(message, f"sent an unreadable reply: {one_line(error)}")
        if not pulled:
            return None
        (reply,) = pulled
        if reply.metadata.src_node_id == message.metadata.dst_node_id:
            return reply
        if not reply.has_error():
            return error_reply(message, "replies as another node")
        return Message(reply.error, reply_to=message)


def _is_of_the_network(error: Exception) -> bool:
    """Whether an error comes from Flower's HTTP client."""
    return any(kind.__module__.partition(".")[0] == "httpx" for kind in type(error).__mro__)


def within_limits(
    message: Message, context: Context, call_next: Callable[[Message, Context], Message]
) -> Message:
    """Return the reply to a message within the node's limits: a Flower mod, within `always_reply`.

    A SuperNode handles no other message before it has a reply to this one, however long that takes: one
    call that hangs would be the node's last. Here it raises a `TimeoutError` at the message's deadline,
    or after the node's own ``max-seconds``.
    A process that does not react (it hangs in a library, say) is ended, which Flower notices after a
    minute. The node's log shows where it hung.
    """
    if Path(sys.argv[0]).name != _CLIENT_PROCESS:
        return call_next(message, context)
    limits = NodeLimits.of(context.node_config)
    limits.limit_memory()
    left = message.metadata.created_at + message.metadata.ttl - time.time()
    left = min(max(left, _LEAST_S), limits.seconds)
    # Works even if the interpreter itself hangs: it needs no Python thread.
    faulthandler.dump_traceback_later(left + _GRACE_S, exit=True, file=_STDERR)
    with _raising(left):
        try:
            return call_next(message, context)
        finally:
            faulthandler.cancel_dump_traceback_later()


@contextmanager
def _raising(seconds: float) -> Iterator[None]:
    """Raise a `TimeoutError` in a block that takes longer, where the system has such an alarm."""
    if not hasattr(signal, "setitimer"):
        yield
        return

    def late(*_: object) -> None:
        raise TimeoutError(_LATE)

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
