"""Flower's simulation, hardened against clients that die, hang or return no message.

A new version of Flower means a change in this folder only. It does not import Ray: whatever needs Ray
is passed in (`ClientProcesses`).
"""

from __future__ import annotations

import importlib
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partialmethod
from threading import Event
from typing import Any, Protocol, cast

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode  # noqa: TID251
from flwr.serverapp import Grid, ServerApp
from flwr.supercore.run import Run  # noqa: TID251

from fedkd.federation.flower_internals.replies import error_reply, no_message

_POLL_S = 0.05
_LAST_CALLS_S = 10.0


class ClientProcessLost(Exception):
    """The process in which a client ran is gone or had to be ended; the text says why."""


class ClientProcesses(Protocol):
    """What Flower's backend lacks and what takes Ray to do."""

    def start(self, init: Callable[[], None]) -> None:
        """Start Ray by calling `init`, within a deadline."""

    def wait_until_ready(self, actors: Sequence[Any]) -> None:
        """Return when the worker processes are up, or are no longer needed."""

    def result(
        self, client: str, actor: Any, call: Any, deadline: float
    ) -> tuple[str, Any, Context]:
        """Return (partition id, reply, context) of a client's call on an actor.

        Raises `ClientProcessLost` if the actor died or was ended. It is ended when the call is not done
        by `deadline` (Unix time) or the run is over.
        """

    def check(self) -> None:
        """Return if Ray is still running; raises a `FedkdError` if it is not."""

    def settle(self) -> None:
        """Return when the calls whose deadline is past have ended, or cannot be ended."""

    def end(self) -> None:
        """End all calls of `result` that are in progress."""

    def leave(self, terminate: Callable[[], None]) -> None:
        """Shut down Ray by calling `terminate`, within a deadline."""


class SimulationStopped(Exception):
    """The server waited for replies of a simulation that has ended."""


class GuardedGrid(Grid):
    """A grid whose calls end with the run, and whose round timeout also ends the clients' work.

    Flower's own grid keeps waiting for replies after its backend has failed, and late clients keep
    running in the next rounds, although their replies are never collected.

    Args:
        grid: Flower's.
        stopped: set when the run is over.
        processes: those that the clients run in, if they belong to this process.
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
    from flwr.superlink.grid import InMemoryGrid  # noqa: TID251

    return isinstance(grid, InMemoryGrid)


@contextmanager
def tended_backend(processes: ClientProcesses) -> Iterator[None]:
    """Change how Flower's Ray backend, even one that is already running, handles failures.

    Flower puts a dead actor back into its pool, where it fails every task at once, and waits forever
    for an actor that does not return. Here either is replaced by a new process, and the client gets
    an error reply, as does one that returns no message. Ray is started and shut down within a
    deadline.
    """
    from flwr.server.superlink.fleet.vce.backend.raybackend import RayBackend  # noqa: TID251

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
    if time.time() >= deadline:  # it waited for a worker until its deadline
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
        return error_reply(message, no_message(reply)), context
    return reply, after


def _terminate(backend: Any, processes: ClientProcesses, terminate: Callable[..., None]) -> None:
    processes.end()  # a call that outlives Ray would start Ray again
    end = time.monotonic() + _LAST_CALLS_S
    while backend.pool and len(backend.pool.pool) < backend.num_workers and time.monotonic() < end:
        time.sleep(_POLL_S)
    processes.leave(lambda: terminate(backend))


@contextmanager
def replaced(owner: object, name: str, value: object) -> Iterator[None]:
    """Replace an attribute of `owner` within the block."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)
