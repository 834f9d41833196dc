"""The Flower engine: Flower simulates the clients, each call in a worker process of Ray."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from threading import Event, Thread, current_thread
from typing import Any

from flwr.app import Context
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid

from fedkd.engines.answering import located
from fedkd.engines.client_app import app
from fedkd.engines.ray_session import RaySession, local_ray, ray_session
from fedkd.engines.resources import check_resources
from fedkd.errors import FedkdError, one_line
from fedkd.experiment import Experiment
from fedkd.federation.events import Events
from fedkd.federation.flower_internals.backend import (
    ClientProcessLost,
    GuardedGrid,
    SimulationStopped,
    is_simulated,
    run_simulation,
    tended_backend,
)
from fedkd.federation.flower_internals.local_grid import task_identity
from fedkd.records.files import Row
from fedkd.records.folder import RunFolder
from fedkd.strategy import DistillationStrategy

_POLL_S = 0.5
_JOIN_S = 5.0
_SETTLE_S = 10.0
_FETCH_S = 60.0
_START_S = 60.0


def run(
    strategy: DistillationStrategy,
    experiment: Experiment,
    folder: RunFolder,
    on_round: Callable[[Row], None],
) -> None:
    """Run a federation on Ray and write its records to `folder`."""
    placed, events = located(experiment), Events()

    def server(grid: Grid) -> None:
        strategy.open(grid, placed, folder, on_round, events).run()

    simulate(
        server,
        app,
        num_clients=placed.num_clients,
        client_cpus=placed.client_cpus,
        client_gpus=placed.client_gpus,
        events=events,
    )


def simulate(
    server: Callable[[Grid], None],
    client_app: ClientApp,
    *,
    num_clients: int,
    client_cpus: float = 1.0,
    client_gpus: float = 0.0,
    num_cpus: int | None = None,
    start_timeout: float = _START_S,
    verbose: bool = False,
    events: Events | None = None,
) -> None:
    """Run `server(grid)` against `num_clients` simulated clients; return when it has returned.

    As many clients run at once as `client_cpus` and `client_gpus` (shares of a CPU or GPU that one
    takes, 0.5 = two on each) leave room for; a client's libraries get `client_cpus` threads, at
    least one. `num_cpus` is what may be used in all, by default what this process may use. Define
    `client_app` in a module that can be imported: the workers get this process's `sys.path`.

    `server` starts when all clients are registered and all workers are up, and gets a grid on which
    a failed client is an error reply (see `flower_internals.replies.failure_reason`): it raised, its
    process died, it returned no message, or it was still at work at the end of the round's timeout.
    In the last three cases its worker is replaced if necessary, and the others are not affected.
    Ray is started for the run and shut down after it; the environment is restored.

    Args:
        start_timeout: Seconds that clients and workers may take to start.
        verbose: Whether Flower and Ray log, and what the workers print is shown.
        events: Records client processes that die or are ended.

    Raises:
        FedkdError: The machine cannot hold a single client, the start took too long, or Ray already
            runs in this process.
        BaseException: Whatever `server` raised, unchanged.
    """
    resources = check_resources(num_clients, client_cpus, client_gpus, num_cpus)
    import flwr.simulation  # noqa: F401 - it sets variables that belong to it

    with (
        task_identity(),
        ray_session(threads=max(1, int(client_cpus)), verbose=verbose) as session,
    ):
        workers = _Workers(session, events or Events(), start_timeout)
        run = _Server(server, num_clients, start_timeout, workers)
        init = {**local_ray(session.folder, verbose), **resources}
        try:
            run_simulation(
                run,
                client_app,
                num_clients=num_clients,
                backend_config=_backend_config(init, client_cpus, client_gpus),
                processes=workers,
            )
        except Exception as exception:
            run.failure = run.failure or _without_wrapping(exception)
        finally:
            run.end()
    if run.failure is not None:
        raise run.failure


@contextmanager
def guarded(grid: Grid, events: Events | None = None) -> Iterator[Grid]:
    """Yield a grid on which a failed client is an error reply, in a simulation that Flower started.

    For the main function of a ServerApp under `flwr run`. In a simulation the grid treats failed
    clients as that of `simulate` does; in a deployment it is `grid` itself.

    Args:
        grid: Flower's.
        events: Records client processes that die or are ended.
    """
    if not is_simulated(grid):
        yield grid
        return
    import ray

    session = RaySession(ray)
    workers = _Workers(session, events or Events(), _START_S)
    session.watch()
    with tended_backend(workers):
        try:
            yield GuardedGrid(grid, workers.stopped, workers)
        finally:
            workers.end()
            session.unwatch()


def _without_wrapping(exception: BaseException) -> Exception:
    """Return the error behind Flower's "An error was encountered"."""
    while exception.__cause__ is not None and not isinstance(exception, FedkdError):
        exception = exception.__cause__
    if isinstance(exception, FedkdError):
        return exception
    error = RuntimeError(f"the simulation failed: {type(exception).__name__}: {exception}")
    error.__cause__ = exception
    return error


class _Server:
    """Runs the server function in Flower's thread and keeps what it raised."""

    def __init__(
        self,
        server: Callable[[Grid], None],
        num_clients: int,
        start_timeout: float,
        workers: _Workers,
    ) -> None:
        self._server = server
        self._num_clients = num_clients
        self._start_timeout = start_timeout
        self._workers = workers
        self._stopped = workers.stopped
        self._ready = workers.ready
        self._thread: Thread | None = None
        self.failure: BaseException | None = None

    def __call__(self, grid: Grid) -> None:
        self._thread = current_thread()
        try:
            self._wait_for_clients(grid)
            self._server(GuardedGrid(grid, self._stopped, self._workers))
        except SimulationStopped:
            pass  # run_simulation raises what stopped it
        except BaseException as exception:
            self.failure = exception
        finally:
            self._stopped.set()

    def end(self) -> None:
        """Stop the server, if it still runs: the simulation is over."""
        self._stopped.set()
        if self._thread is not None:
            self._thread.join(_JOIN_S)

    def _wait_for_clients(self, grid: Grid) -> None:
        end = time.monotonic() + self._start_timeout
        while True:
            registered = len(list(grid.get_node_ids()))
            if registered >= self._num_clients and self._ready.is_set():
                return
            if self._stopped.is_set():
                raise SimulationStopped
            if time.monotonic() > end:
                raise FedkdError(
                    f"the simulation did not start within {self._start_timeout:g} s: "
                    f"{registered} of {self._num_clients} clients are registered, their worker "
                    f"processes are {'up' if self._ready.is_set() else 'not up'}"
                )
            time.sleep(0.05)


class _Workers:
    """Watches the Ray processes in which clients run.

    Attributes:
        stopped: set when the run is over.
        ready: set when the worker processes are up.
    """

    def __init__(self, session: RaySession, events: Events, start_timeout: float) -> None:
        self.stopped, self.ready = Event(), Event()
        self._session = session
        self._events = events
        self._start_timeout = start_timeout
        self._deadlines: dict[Any, float] = {}  # of calls under way

    def start(self, init: Callable[[], None]) -> None:
        try:
            self._session.start(init, "Ray does not start", self._start_timeout)
        except FedkdError:
            self.stopped.set()  # the server need not wait for clients
            raise

    def wait_until_ready(self, actors: Sequence[Any]) -> None:
        import ray

        starting = [actor.__ray_ready__.remote() for actor in actors]
        while starting and not self.stopped.is_set():
            _, starting = ray.wait(starting, num_returns=len(starting), timeout=_POLL_S)
        self.ready.set()

    def result(
        self, client: str, actor: Any, call: Any, deadline: float
    ) -> tuple[str, Any, Context]:
        self._deadlines[call] = deadline
        try:
            return self._result(client, actor, call, deadline)
        finally:
            del self._deadlines[call]

    def _result(
        self, client: str, actor: Any, call: Any, deadline: float
    ) -> tuple[str, Any, Context]:
        import ray
        from ray.exceptions import RayError, RayTaskError

        done: list[Any] = []
        while not done and time.time() < deadline and not self.stopped.is_set():
            patience = max(0.0, min(_POLL_S, deadline - time.time()))
            done, _ = ray.wait([call], timeout=patience)
        if not done:
            self._session.kill([actor])
            if not self.stopped.is_set():
                text = f"client {client} was still at work at the end of the round: process ended"
                self._events.add("client-late", text)
            raise ClientProcessLost("no reply in time")
        try:
            answer: tuple[str, Any, Context] = ray.get(call, timeout=_FETCH_S)
        except RayTaskError:
            raise  # the client app itself raised
        except RayError as exception:  # died, out of memory, its node gone
            if not self.stopped.is_set():
                text = f"the process of client {client} died ({one_line(exception)})"
                self._events.add("client-died", text)
            raise ClientProcessLost("client process died") from exception
        return answer

    def check(self) -> None:
        self._session.check()

    def settle(self) -> None:
        end = time.monotonic() + _SETTLE_S
        while time.monotonic() < end:
            now = time.time()
            if not any(deadline < now for deadline in list(self._deadlines.values())):
                return
            time.sleep(0.05)

    def end(self) -> None:
        self.stopped.set()

    def leave(self, terminate: Callable[[], None]) -> None:
        self._session.leave(terminate)


def _backend_config(
    init: Mapping[str, Any], client_cpus: float, client_gpus: float
) -> dict[str, dict[str, Any]]:
    return {
        "init_args": dict(init),
        "client_resources": {"num_cpus": client_cpus, "num_gpus": client_gpus},
    }
