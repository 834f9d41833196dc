"""Start or join Ray, watch it and leave it, each within a deadline.

Ray waits for its head (GCS) indefinitely, or ends the process that waits. So every call that may wait
for it runs in a thread of its own, which is abandoned at its deadline.
"""

from __future__ import annotations

import atexit
import importlib
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from threading import Event, Lock, Thread
from typing import Any, TypeVar

from fedkd.engines.interrupts import keeping_sigterm
from fedkd.engines.ray_leftovers import VARIABLE, own_folder
from fedkd.errors import FedkdError, one_line
from fedkd.federation.flower_internals.backend import quiet, replaced

RAY_TIMEOUT = 120.0
"""Seconds that starting Ray, or joining its cluster, may take."""

LOOK_EVERY = 2.0
"""Seconds between two questions to Ray's head."""

PATIENCE = 10.0
"""Seconds that an answer may take."""

MISSES = 3
"""Consecutive questions without an answer after which Ray counts as gone."""

LEAVE_TIMEOUT = 20.0
"""Seconds that shutting Ray down, or leaving its cluster, may take."""

# Without its head Ray would end this very process after a minute. Read when Ray is imported.
os.environ.setdefault("RAY_gcs_rpc_server_reconnect_timeout_s", "100000")

T = TypeVar("T")


def within(seconds: float, call: Callable[[], T]) -> T:
    """Return what a call returns, or raise what it raises.

    Raises:
        TimeoutError: it has not returned in time. It continues in a thread that is not waited for.
    """
    return _in_thread(call).result(timeout=seconds)


def _in_thread(call: Callable[[], T], afterwards: Callable[[], object] = lambda: None) -> Future[T]:
    """Return the future result of a call in a thread of its own, which then calls `afterwards`."""
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
        folder: of a Ray that is started here.
    """

    def __init__(self, ray: Any, folder: Path | None = None) -> None:
        self.ray = ray
        self.folder = folder
        self.nodes: dict[str, dict[str, float]] = {}
        self.gone: frozenset[str] = frozenset()
        self._lock = Lock()
        self._left, self._ended = Event(), Event()
        self._misses = 0
        self._problem = ""
        self._is_abandoned = False
        self._watch = Thread(target=self._look_until_left, daemon=True, name="ray-watch")

    def start(self, init: Callable[[], object], what: str, timeout: float) -> None:
        """Start Ray, or join a cluster, and begin to watch it.

        Args:
            init: calls `ray.init`.
            what: how the error begins, such as "Ray does not start".
            timeout: seconds.

        Raises:
            FedkdError: it fails, or takes longer.
        """
        try:
            # Linux ends Ray's processes with the thread that started them, so it has to stay.
            _in_thread(keeping_sigterm(init), afterwards=self._ended.wait).result(timeout)
        except TimeoutError as error:
            raise FedkdError(f"{what} (no answer in {timeout:g} s)") from error
        except (Exception, SystemExit) as error:  # Ray has many
            raise FedkdError(f"{what} ({one_line(error)})") from error
        self.look()
        self.watch()

    def watch(self) -> None:
        """Begin to watch a Ray that has started, or is about to."""
        if self._watch.ident is None:
            self._watch.start()

    def unwatch(self) -> None:
        """Stop watching it."""
        self._left.set()

    def check(self) -> None:
        """Raise if Ray is gone.

        Raises:
            FedkdError: its head has not answered for long, or it has no machine left.
        """
        if self._problem:
            raise FedkdError(self._problem)

    def look(self) -> None:
        """Update `nodes` and `gone` from Ray; a thread calls this every `LOOK_EVERY` seconds."""
        with self._lock:
            if self._problem or self._left.is_set() or not self.ray.is_initialized():
                return
            try:
                nodes = within(PATIENCE, self.ray.nodes)
            except Exception as error:
                self._misses += 1
                if self._misses >= MISSES:
                    self._problem = (
                        f"Ray went away: its head process did not answer {MISSES} times in a row "
                        f"({one_line(error)}); finished rounds are in the run folder"
                    )
                return
            self._misses = 0
            alive = {node["NodeID"]: node["Resources"] for node in nodes if node["Alive"]}
            self.gone |= self.nodes.keys() - alive.keys()
            self.nodes = alive
            if not self.nodes:
                self._problem = (
                    "Ray went away: it has no machine left (its raylet died); finished rounds are in "
                    "the run folder"
                )

    def kill(self, actors: Iterable[Any]) -> None:
        """End worker processes, if Ray still answers.

        For a process that is not up yet Ray asks its head, and waits for the answer.
        """
        with suppress(TimeoutError, ConnectionError):
            within(PATIENCE, lambda: [self.ray.kill(actor) for actor in actors])

    def leave(self, shutdown: Callable[[], object]) -> None:
        """Shut Ray down, or leave its cluster; what does not end in time is killed or abandoned."""
        self.unwatch()
        with self._lock:  # no question to Ray while it ends
            if self._is_abandoned:
                return
            try:
                within(LEAVE_TIMEOUT, shutdown)
            except TimeoutError:
                self._abandon()
            self._ended.set()

    def _look_until_left(self) -> None:
        while not self._left.wait(LOOK_EVERY):
            self.look()

    def _abandon(self) -> None:
        """End the processes of a Ray that this process started, and do not wait for it at exit."""
        self._is_abandoned = True
        worker = importlib.import_module("ray._private.worker")
        node = worker._global_node
        atexit.unregister(worker.shutdown)
        if node is not None:
            node.kill_all_processes(check_alive=False, allow_graceful=False)


def local_ray(folder: Path | None, verbose: bool = False) -> dict[str, Any]:
    """Return the arguments of `ray.init` that start Ray on this machine, for this process only.

    Args:
        folder: of the session.
        verbose: whether Ray logs.
    """
    return {
        "_temp_dir": str(folder),
        "address": "local",  # even if RAY_ADDRESS is set
        "include_dashboard": False,
        **ray_log(verbose),
    }


def ray_log(verbose: bool = False) -> dict[str, Any]:
    """Return the arguments of `ray.init` for its log and that of its workers."""
    return {"log_to_driver": verbose, "logging_level": "INFO" if verbose else "ERROR"}


@contextmanager
def ray_session(
    threads: int, verbose: bool = False, *, joins: bool = False
) -> Iterator[RaySession]:
    """Yield Ray, to be started or joined; leave it and restore the environment afterwards.

    Args:
        threads: Threads that the libraries of the worker processes may use.
        verbose: Whether Flower and Ray log.
        joins: Whether a cluster is joined. Otherwise only this machine reaches Ray, and what is left
            of it afterwards is ended and removed.

    Raises:
        FedkdError: Ray already runs in this process, or has no place for its files.
    """
    # As Flower does: under `uv run` Ray would ship the working folder to every worker.
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    import ray  # before the environment is saved: it sets variables that belong to it

    if ray.is_initialized():
        raise FedkdError("Ray already runs in this process: call ray.shutdown() first")
    with ExitStack() as stack:
        stack.enter_context(_silence(verbose))
        folder = None if joins else stack.enter_context(_folder())
        stack.enter_context(_environment(_worker_environment(threads, folder)))
        if not joins:
            stack.enter_context(_on_loopback())
        session = RaySession(ray, folder)
        stack.callback(session.leave, ray.shutdown)
        yield session


@contextmanager
def _folder() -> Iterator[Path]:
    """Yield a folder for Ray's files, see `own_folder`."""
    with ExitStack() as stack:
        try:
            folder = stack.enter_context(own_folder())
        except OSError as error:
            raise FedkdError(f"Ray does not start ({one_line(error)})") from error
        yield folder


@contextmanager
def _on_loopback() -> Iterator[None]:
    """Make a Ray that starts in the block listen on 127.0.0.1 only.

    Ray executes whatever reaches its ports. On Linux it opens them on all interfaces, and takes
    ``_node_ip_address="127.0.0.1"`` for the address of the network; on macOS and Windows it listens on
    loopback by itself. Its API server, which without a dashboard only reports usage, asks the metadata
    service of a cloud for the cloud's name even when that is off: it is not started.
    """
    constants = importlib.import_module("ray._private.ray_constants")
    node = importlib.import_module("ray._private.node")
    with (
        replaced(constants, "ENABLE_RAY_CLUSTER", False),
        replaced(node.Node, "start_api_server", lambda *_, **__: None),
    ):
        yield


def _worker_environment(threads: int, folder: Path | None) -> dict[str, str]:
    """Return the variables that Ray's processes inherit.

    Ray would choose the number of threads itself; the server's process keeps its own number.
    """
    return {
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "OPENBLAS_NUM_THREADS": str(threads),
        **({} if folder is None else {VARIABLE: str(folder)}),
    }


@contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Set these variables in the block, and undo all its changes (Flower sets PYTHONPATH)."""
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
    """Silence Flower and Ray in the block, unless `verbose`.

    Ray prints the death of a worker on stdout, whatever its log settings are.
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
