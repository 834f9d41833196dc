"""Ray as this process uses it: started or joined, watched, and left, each within a deadline.

Ray waits for its head (GCS) without end, or ends the process that waits. Here whatever may wait for it
does so in a thread of its own, which is abandoned when its time is over.
"""

from __future__ import annotations

import atexit
import importlib
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager, nullcontext, suppress
from threading import Event, Lock, Thread
from typing import Any, TypeVar

from fedkd.errors import FedkdError, one_line
from fedkd.federation.flower_internals.backend import quiet, replaced

RAY_TIMEOUT = 120.0
"""Seconds until Ray must have started, or its cluster been joined."""

LOOK_EVERY = 2.0
"""Seconds from one question to Ray's head to the next."""

PATIENCE = 10.0
"""Seconds in which it must answer."""

MISSES = 3
"""Questions running without an answer after which Ray is taken to be gone."""

LEAVE_TIMEOUT = 20.0
"""Seconds until Ray must have let go of this process."""

# Without its head Ray would end this very process after a minute. Read when Ray is imported.
os.environ.setdefault("RAY_gcs_rpc_server_reconnect_timeout_s", "100000")

T = TypeVar("T")


def within(seconds: float, call: Callable[[], T]) -> T:
    """Return what a call returns, or raise what it raises.

    Raises:
        TimeoutError: it has not returned in time. It goes on in a thread that nobody waits for.
    """
    return _begun(call).result(timeout=seconds)


def _begun(call: Callable[[], T], afterwards: Callable[[], object] = lambda: None) -> Future[T]:
    """Make a call in a thread of its own, which then does something else."""
    outcome: Future[T] = Future()

    def run() -> None:
        try:
            outcome.set_result(call())
        except BaseException as error:
            outcome.set_exception(error)
        afterwards()

    Thread(target=run, daemon=True).start()
    return outcome


class RaySession:
    """Ray in this process, from before its start to after its end.

    Attributes:
        ray: the module.
        nodes: the machines that Ray had when it last answered: resources by id.
        gone: ids of those that it had before.
    """

    def __init__(self, ray: Any) -> None:
        self.ray = ray
        self.nodes: dict[str, dict[str, float]] = {}
        self.gone: frozenset[str] = frozenset()
        self._lock = Lock()
        self._left, self._ended = Event(), Event()
        self._misses = 0
        self._problem = ""
        self._is_abandoned = False
        self._watch = Thread(target=self._look_again_and_again, daemon=True, name="ray-watch")

    def start(self, init: Callable[[], object], what: str, timeout: float) -> None:
        """Start Ray, or join a cluster, and begin to watch it.

        Args:
            init: calls `ray.init`.
            what: what to say has failed, such as "Ray does not start".
            timeout: seconds.

        Raises:
            FedkdError: it fails, or takes longer.
        """
        try:
            # Linux ends Ray's processes with the thread that started them, so it has to stay.
            _begun(init, afterwards=self._ended.wait).result(timeout)
        except TimeoutError as error:
            raise FedkdError(f"{what} (no answer in {timeout:g} s)") from error
        except (Exception, SystemExit) as error:  # Ray has many
            raise FedkdError(f"{what} ({one_line(error)})") from error
        self.look()
        self.watch()

    def watch(self) -> None:
        """Begin to watch a Ray that has been started, or is about to be."""
        if self._watch.ident is None:
            self._watch.start()

    def unwatch(self) -> None:
        """Watch it no longer."""
        self._left.set()

    def check(self) -> None:
        """Return if Ray is there.

        Raises:
            FedkdError: its head has given no answer for long, or it has no machine left.
        """
        if self._problem:
            raise FedkdError(self._problem)

    def look(self) -> None:
        """Ask Ray which machines it has; called now and then by a thread of its own."""
        with self._lock:
            if self._problem or self._left.is_set() or not self.ray.is_initialized():
                return
            try:
                known = within(PATIENCE, self.ray.nodes)
            except Exception as error:
                self._misses += 1
                if self._misses >= MISSES:
                    self._problem = (
                        f"Ray went away: its head process has not answered {MISSES} times running "
                        f"({one_line(error)}); finished rounds are in the run folder"
                    )
                return
            self._misses = 0
            alive = {node["NodeID"]: node["Resources"] for node in known if node["Alive"]}
            self.gone |= self.nodes.keys() - alive.keys()
            self.nodes = alive
            if not self.nodes:
                self._problem = (
                    "Ray went away: it has no machine left (its raylet died); finished rounds are in "
                    "the run folder"
                )

    def kill(self, actors: Iterable[Any]) -> None:
        """End worker processes, as far as Ray is there to do it.

        For one that is not up yet Ray asks its head, and waits for the answer.
        """
        with suppress(TimeoutError, ConnectionError):
            within(PATIENCE, lambda: [self.ray.kill(actor) for actor in actors])

    def leave(self, shutdown: Callable[[], object]) -> None:
        """Shut Ray down, or leave its cluster; what does not end in time is ended or abandoned."""
        self.unwatch()
        with self._lock:  # nobody asks while it ends
            if self._is_abandoned:
                return
            try:
                within(LEAVE_TIMEOUT, shutdown)
            except TimeoutError:
                self._abandon()
            self._ended.set()

    def _look_again_and_again(self) -> None:
        while not self._left.wait(LOOK_EVERY):
            self.look()

    def _abandon(self) -> None:
        """End the processes of a Ray that was started here, and do not wait for it at exit either."""
        self._is_abandoned = True
        worker = importlib.import_module("ray._private.worker")
        node = worker._global_node
        atexit.unregister(worker.shutdown)
        if node is not None:
            node.kill_all_processes(check_alive=False, allow_graceful=False)


def local_ray(verbose: bool = False) -> dict[str, Any]:
    """Return what `ray.init` is told to start Ray on this machine, for this process only."""
    return {
        "address": "local",  # whatever RAY_ADDRESS says
        "include_dashboard": False,
        **ray_log(verbose),
    }


def ray_log(verbose: bool = False) -> dict[str, Any]:
    """Return what `ray.init` is told about its log and that of its workers."""
    return {"log_to_driver": verbose, "logging_level": "INFO" if verbose else "ERROR"}


@contextmanager
def ray_session(
    threads: int, verbose: bool = False, *, joins: bool = False
) -> Iterator[RaySession]:
    """Yield Ray, to be started or joined; it is left, and the environment as before, afterwards.

    Args:
        threads: What the libraries of the worker processes may use.
        verbose: Let Flower and Ray log.
        joins: Whether a cluster is joined. Otherwise only this machine reaches Ray.

    Raises:
        FedkdError: Ray already runs in this process.
    """
    # As Flower does: under `uv run` Ray would ship the working folder to every worker.
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    import ray  # before the environment is noted: it sets variables that belong to it

    if ray.is_initialized():
        raise FedkdError("Ray already runs in this process: call ray.shutdown() before")
    session = RaySession(ray)
    alone = nullcontext() if joins else _on_loopback()
    with _environment(_worker_environment(threads)), _silence(verbose), alone:
        try:
            yield session
        finally:
            session.leave(ray.shutdown)


@contextmanager
def _on_loopback() -> Iterator[None]:
    """Have a Ray that starts in the block listen on 127.0.0.1 alone.

    Ray executes whatever reaches its ports. On Linux it opens them on all interfaces, and takes
    ``_node_ip_address="127.0.0.1"`` for the address of the network; on macOS and Windows it does what is
    asked for here. Its API server, which without a dashboard only reports usage, asks the metadata
    service of a cloud for the cloud's name even when that is off: it is not started.
    """
    constants = importlib.import_module("ray._private.ray_constants")
    node = importlib.import_module("ray._private.node")
    with (
        replaced(constants, "ENABLE_RAY_CLUSTER", False),
        replaced(node.Node, "start_api_server", lambda *_, **__: None),
    ):
        yield


def _worker_environment(threads: int) -> dict[str, str]:
    """Return the variables that the workers inherit.

    Ray would choose the number of threads by itself; the server's process keeps its own.
    """
    return {
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "OPENBLAS_NUM_THREADS": str(threads),
    }


@contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Set these variables, and take back every change of the block (Flower sets PYTHONPATH)."""
    before = dict(os.environ)
    os.environ.update(variables)
    try:
        yield
    finally:
        for name in set(os.environ) - set(before):
            del os.environ[name]
        os.environ.update(before)


@contextmanager
def _silence(verbose: bool) -> Iterator[None]:
    """Silence Flower and Ray, unless they are to talk.

    Ray prints the death of a worker on stdout, whatever its own log settings are.
    """
    if verbose:
        yield
        return
    worker = importlib.import_module("ray._private.worker")
    with (
        quiet(),
        replaced(worker, "print_to_stdstream", lambda *_, **__: None),
        warnings.catch_warnings(),
    ):
        warnings.filterwarnings("ignore", message="Tip: In future versions of Ray")
        yield
