"""Everything that fedkd needs of Flower 1.41 and that Flower does not call public.

Flower's own simulation sets a process-wide identity, message ids and a backend behind the curtain;
an in-process grid has to do the same, and a simulation that outlives its clients has to reach
deeper. A new version of Flower is a change in this file. It does not import Ray: what has to be
asked of Ray comes in from outside (`ClientProcesses`).
"""

from __future__ import annotations

import copy
import importlib
import logging
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partialmethod
from threading import Event
from typing import Any, Protocol, cast
from uuid import uuid4

from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Context,
    Error,
    Message,
    MetricRecord,
    RecordDict,
)
from flwr.clientapp import ClientApp
from flwr.common.constant import SUPERLINK_NODE_ID, ErrorCode
from flwr.serverapp import Grid, ServerApp
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

FIRST_NODE_ID = 1000
"""Node id of partition 0 on a `LocalGrid`; so far from 0 that the two are not mixed up."""

_RUN_ID = 1
_TASK_ID = 1
_POLL_S = 0.05
_LAST_CALLS_S = 10.0

Handle = Callable[[Sequence[tuple[int, Message]]], Sequence[Message | None]]
"""Answers messages for clients, given as (partition id, message); None = this client is silent."""


# --- Identity and context ------------------------------------------------------------------------


@contextmanager
def task_identity() -> Iterator[None]:
    """Let this process build instructions, as a ServerApp may.

    `Message(content, dst_node_id, message_type)` reads a process-wide identity, which Flower sets
    for the apps it starts. Whatever was set before is back afterwards, also if the block starts a
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


# --- The in-process grid -------------------------------------------------------------------------


class LocalGrid(Grid):
    """A grid whose clients live in this process and are answered together.

    Every `send_and_receive` (or `push_messages`) makes one call of `handle` with all its messages,
    so that whoever is behind it can train clients side by side. Partition k is node
    `FIRST_NODE_ID + k`. Records are rebuilt on their way in and out, as if they had crossed a wire:
    what a client does to its message, or keeps of its reply, is its own affair.

    The work is done when the messages are sent. So a `timeout` cannot strike, a client that gives
    no reply is not waited for, and an exception of `handle` ends the call: turning the failure of
    one client into an `error_reply` is up to `handle`. Two messages to one client both reach
    `handle`, in their order. Build messages within `task_identity`.

    Raises:
        ValueError: A message goes to a node that does not exist, or the replies do not fit.
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
        """Build an instruction; `Message(...)` does the same."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """Return the K node ids in the order of their partitions."""
        return range(FIRST_NODE_ID, FIRST_NODE_ID + self._num_clients)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Have the messages answered and return their ids, for `pull_messages`."""
        instructions = [self._receive(message) for message in messages]
        if not instructions:
            return []
        replies = self._handle(instructions)
        if len(replies) != len(instructions):
            raise ValueError(f"{len(instructions)} messages were given {len(replies)} replies")
        ids = [instruction.metadata.message_id for _, instruction in instructions]
        for message_id, reply in zip(ids, replies, strict=True):
            if reply is not None:
                self._replies[message_id] = _sent(message_id, reply)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Return the replies to these messages, each once, in the order of the ids."""
        found = (self._replies.pop(message_id, None) for message_id in message_ids)
        return [reply for reply in found if reply is not None]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Send all messages at once and return the replies in their order."""
        return self.pull_messages(self.push_messages(messages))

    def _receive(self, message: Message) -> tuple[int, Message]:
        """Give the message an id and return (partition id, the client's own copy)."""
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
        raise ValueError("a reply stands in the place of another message's")
    _set_message_id(reply, str(uuid4()))
    return _isolated(reply)


def _set_message_id(message: Message, message_id: str) -> None:
    message.metadata.__dict__["_message_id"] = message_id  # as Flower itself does: no setter


def _isolated(message: Message) -> Message:
    """Return a message that shares nothing mutable with the given one."""
    metadata = copy.copy(message.metadata)
    if message.has_error():
        return Message(error=message.error, metadata=metadata)  # type: ignore[call-overload,no-any-return]
    content = _isolated_records(message.content)
    return Message(content=content, metadata=metadata)  # type: ignore[call-overload,no-any-return]


def _isolated_records(records: RecordDict) -> RecordDict:
    return RecordDict({name: _isolated_record(record) for name, record in records.items()})


def _isolated_record(
    record: ArrayRecord | MetricRecord | ConfigRecord,
) -> ArrayRecord | MetricRecord | ConfigRecord:
    """Rebuild a record. The bytes of an `Array` cannot change, so they are shared."""
    if isinstance(record, ArrayRecord):
        return ArrayRecord(
            {name: Array(a.dtype, a.shape, a.stype, a.data) for name, a in record.items()}
        )
    # Without Flower's check of every key and value, which they have passed: an experiment has fifty.
    rebuilt = copy.copy(record)
    values = {k: list(v) if isinstance(v, list) else v for k, v in record.items()}
    rebuilt.__dict__["_data"] = values
    return rebuilt


# --- Failures of one client ----------------------------------------------------------------------


def error_reply(message: Message, failure: Exception | str) -> Message:
    """Return the reply of a client that failed: code 2, with "ValueError: text" or the given text."""
    if isinstance(failure, Exception):
        failure = f"{type(failure).__name__}: {failure}".removesuffix(": ")
    return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, failure), reply_to=message)


def always_reply(
    message: Message, context: Context, call_next: Callable[[Message, Context], Message]
) -> Message:
    """Answer every message: a Flower mod, `ClientApp(mods=[always_reply])`.

    A client that raises, or returns no `Message`, gives an `error_reply`. Flower would wait for the
    second until the round's timeout, and answer for the first with a traceback of the worker; here
    the traceback goes to the log. The state is then as before the call, in every engine (Flower's
    simulation drops the changes of a call that raised, a deployment keeps them).
    """
    before = _isolated_records(context.state)
    try:
        reply: object = call_next(message, context)
        if not isinstance(reply, Message):
            raise _no_message(reply)
    except Exception as exception:
        context.state = before
        logging.getLogger(__name__).warning("a client failed", exc_info=True)
        return error_reply(message, exception)
    return reply


def _no_message(reply: object) -> TypeError:
    return TypeError(f"the client returned {type(reply).__name__} instead of a Message")


_DIED = "client process died"
_REASONS: dict[int, str] = {
    ErrorCode.MESSAGE_UNAVAILABLE: "no reply in time",
    ErrorCode.REPLY_MESSAGE_UNAVAILABLE: "no reply in time",
    ErrorCode.NODE_UNAVAILABLE: "node is gone",
}
_LONGEST_REASON = 200
_ANSI = re.compile(r"\x1b\[[0-9;]*m")
_WRAPPED = re.compile(r"<class '([\w.]+)(?:\(\w+\))?'>:<['\"]?(.*?)['\"]?>", re.DOTALL)
_CHAINED = re.compile(
    r"\n\nThe above exception was the direct cause of the following exception:\n\n"
    r"|\n\nDuring handling of the above exception, another exception occurred:\n\n"
)
_FLOWERS_WORDS = re.compile(r"Exception ClientAppException occurred\. Message: ")


def failure_reason(reply: Message) -> str:
    """Return why a client failed, in one short line without colours and tracebacks.

    "ValueError: text" for a client that raised, "client process died", "no reply in time" for a
    message that expired, "node is gone" for a SuperNode that left.

    Raises:
        ValueError: The reply is not an error.
    """
    code, text = reply.error.code, _ANSI.sub("", reply.error.reason or "")
    if code in _REASONS:
        return _REASONS[code]
    wrapped = _WRAPPED.fullmatch(text.strip())
    if wrapped:
        text = _of_exception(wrapped[1].rpartition(".")[2], wrapped[2])
    line = " ".join(text.split()) or f"error {code} without a reason"
    return line if len(line) <= _LONGEST_REASON else line[: _LONGEST_REASON - 1] + "…"


def _of_exception(kind: str, text: str) -> str:
    """Return "Type: text" for an exception that Flower wrote down as its class and its text."""
    if kind.startswith(("Actor", "RayActor", "WorkerCrashed", "OutOfMemory", "NodeDied")):
        return _DIED
    blocks = _CHAINED.split(text)
    # Ray's traceback; the last exception is Flower's ClientAppException around the client's own.
    block = blocks[-2] if len(blocks) > 1 and "ClientAppException" in blocks[-1] else blocks[-1]
    lines = block.splitlines()
    in_traceback = [number for number, line in enumerate(lines) if line.startswith("  ")]
    if in_traceback:
        return " ".join(lines[in_traceback[-1] + 1 :])
    words = _FLOWERS_WORDS.sub("", block.strip())
    return words if kind == "ClientAppException" else f"{kind}: {words}"


# --- Flower's simulation -------------------------------------------------------------------------


class ClientProcessLost(Exception):
    """The process in which a client ran is gone or had to be ended; the text says why."""


class ClientProcesses(Protocol):
    """What Flower's backend leaves undone and Ray is needed for."""

    def start(self, init: Callable[[], None]) -> None:
        """Have Ray started by `init`, within a deadline."""

    def wait_until_ready(self, actors: Sequence[Any]) -> None:
        """Return when the worker processes are up, or there is no more use for them."""

    def result(
        self, client: str, actor: Any, call: Any, deadline: float
    ) -> tuple[str, Any, Context]:
        """Return (partition id, reply, context) of a client's call on an actor.

        Raises `ClientProcessLost` if the actor died or was ended, which it is when the call is not
        done at `deadline` (Unix time) or the run is over.
        """

    def check(self) -> None:
        """Return if there is a Ray to run in; raises a `FedkdError` if there is none any more."""

    def settle(self) -> None:
        """Return when the calls whose deadline is past have ended, or will not."""

    def end(self) -> None:
        """Have all calls of `result` that are under way end."""

    def leave(self, terminate: Callable[[], None]) -> None:
        """Have Ray shut down by `terminate`, within a deadline."""


class SimulationStopped(Exception):
    """The server waited for replies of a simulation that is no more."""


class GuardedGrid(Grid):
    """A grid whose calls end when the run does, and a round's timeout ends its clients' work.

    Flower's own grid goes on waiting for replies when its backend has failed, and lets late clients
    run on into the next rounds, though nobody will collect their replies.

    Args:
        grid: Flower's.
        stopped: set when the run is over.
        processes: in which the clients run, if this process knows of them.
    """

    def __init__(
        self, grid: Grid, stopped: Event, processes: ClientProcesses | None = None
    ) -> None:
        self._grid = grid
        self._stopped = stopped
        self._processes = processes

    def set_run(self, run: Run) -> None:
        """See `Grid`."""
        self._grid.set_run(run)

    @property
    def run(self) -> Run:
        """See `Grid`."""
        return self._grid.run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """See `Grid`."""
        return self._grid.create_message(content, message_type, dst_node_id, group_id, ttl)

    def get_node_ids(self) -> Iterable[int]:
        """See `Grid`."""
        return self._grid.get_node_ids()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """See `Grid`."""
        return self._grid.push_messages(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """See `Grid`; raises `SimulationStopped` when the run is over."""
        if self._stopped.is_set():
            raise SimulationStopped("the simulation has stopped")
        return self._grid.pull_messages(message_ids)

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """See `Grid`; a message expires at the timeout, if it does not do so before."""
        instructions = list(messages)
        if timeout:
            for message in instructions:
                message.metadata.ttl = min(message.metadata.ttl, timeout)
        waiting = set(self.push_messages(instructions))
        end = time.monotonic() + (float("inf") if timeout is None else timeout)
        replies: list[Message] = []
        while waiting and time.monotonic() < end:
            if self._processes is not None:
                self._processes.check()
            arrived = list(self.pull_messages(waiting))
            replies += arrived
            waiting -= {reply.metadata.reply_to_message_id for reply in arrived}
            if waiting:
                time.sleep(_POLL_S)
        if self._processes is not None:
            self._processes.settle()
        return replies


@contextmanager
def quiet() -> Iterator[None]:
    """Silence Flower's log, in which a dead client takes sixty lines."""
    logger = logging.getLogger("flwr")
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        logger.setLevel(level)


def run_simulation(
    main: Callable[[Grid], None],
    client_app: ClientApp,
    *,
    num_clients: int,
    backend_config: dict[str, dict[str, Any]],
    processes: ClientProcesses,
) -> None:
    """Run Flower's simulation (deprecated, without a public successor) without telemetry.

    `main` runs in a thread. This imports Ray, starts it and shuts it down.
    """
    from flwr.simulation import run_simulation as flower_simulation

    app = ServerApp()

    @app.main()
    def run_main(grid: Grid, context: Context) -> None:
        main(grid)

    # By name: the package's attribute `run_simulation` is the function.
    module = importlib.import_module("flwr.simulation.run_simulation")
    with replaced(module, "event", lambda *_, **__: None), tended_backend(processes):
        flower_simulation(app, client_app, num_clients, backend_config=cast(Any, backend_config))


def is_simulated(grid: Grid) -> bool:
    """Whether the clients of this grid run in worker processes of Ray, started by this process."""
    from flwr.superlink.grid import InMemoryGrid

    return isinstance(grid, InMemoryGrid)


@contextmanager
def tended_backend(processes: ClientProcesses) -> Iterator[None]:
    """Let Flower's Ray backend, also one that runs, treat differently what goes wrong.

    Flower puts a dead actor back into its pool, where it fails at once whatever it is given, and
    waits without end for one that does not return. Here a new process takes the place of either,
    and the client's failure is its reply, as is the failure of one that returns no message. Ray is
    started and ended within a deadline.
    """
    from flwr.server.superlink.fleet.vce.backend.raybackend import RayBackend

    init_ray = partialmethod(_init_ray, processes, RayBackend.init_ray)
    build = partialmethod(_build, processes, RayBackend.build)
    process_message = partialmethod(_process_message, processes)
    terminate = partialmethod(_terminate, processes, RayBackend.terminate)
    with (
        replaced(RayBackend, "init_ray", init_ray),
        replaced(RayBackend, "build", build),
        replaced(RayBackend, "process_message", process_message),
        replaced(RayBackend, "terminate", terminate),
    ):
        yield


def _init_ray(
    backend: Any, processes: ClientProcesses, init: Callable[..., None], config: object
) -> None:
    processes.start(lambda: init(backend, config))


def _build(
    backend: Any, processes: ClientProcesses, build: Callable[..., None], app_fn: object
) -> None:
    build(backend, app_fn)
    processes.wait_until_ready(backend.pool.pool)


def _process_message(
    backend: Any, processes: ClientProcesses, message: Message, context: Context
) -> tuple[Message, Context]:
    deadline = message.metadata.created_at + message.metadata.ttl
    if time.time() >= deadline:  # it waited for a worker all the time that it had
        return Message(Error(ErrorCode.MESSAGE_UNAVAILABLE, ""), reply_to=message), context
    actors = backend.pool
    actor = actors.pool.pop()
    try:
        partition = str(context.node_config["partition-id"])
        call = actor.run.remote(backend.app_fn, message, partition, context)
        _, reply, after = processes.result(partition, actor, call, deadline)
    except ClientProcessLost as lost:
        actor = actors.create_actor_fn()
        return Message(Error(ErrorCode.CLIENT_APP_CRASHED, str(lost)), reply_to=message), context
    finally:
        actors.pool.append(actor)
    if not isinstance(reply, Message):
        return error_reply(message, _no_message(reply)), context
    return reply, after


def _terminate(backend: Any, processes: ClientProcesses, terminate: Callable[..., None]) -> None:
    processes.end()  # a call that outlives Ray would start another one
    end = time.monotonic() + _LAST_CALLS_S
    while backend.pool and len(backend.pool.pool) < backend.num_workers and time.monotonic() < end:
        time.sleep(_POLL_S)
    processes.leave(lambda: terminate(backend))


@contextmanager
def replaced(owner: object, name: str, value: object) -> Iterator[None]:
    """Replace an attribute of a module for the length of a block."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)
