"""Run clients in worker processes: Ray actors with a fixed part of the clients each (``num-workers``).

A worker decodes, executes and encodes its clients' messages with the code of the engine in this process
and keeps their states. Ray decides where an actor runs, and which GPU it gets. A worker that dies is
restarted and its messages are sent again: every instruction names the round to start from, and states
are on disk by round, so that nothing is lost and no number changes.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from time import monotonic
from types import TracebackType
from typing import Any, Self

import torch
from flwr.app import RecordDict

from fedkd import data
from fedkd.clients.instructions import Failure
from fedkd.data.federated import federated_data
from fedkd.engines.answering import located
from fedkd.engines.ray_session import (
    RAY_TIMEOUT,
    RaySession,
    local_ray,
    ray_log,
    ray_session,
    within,
)
from fedkd.engines.resources import Share, available_cpus, placement, share_of
from fedkd.engines.worker import Contents, Results, Worker, data_sets, packed
from fedkd.errors import FedkdError, Setting, one_line
from fedkd.experiment import Experiment
from fedkd.federation.events import Events
from fedkd.machine import resolve_device
from fedkd.user_code import fingerprint

RESTARTS = 2
"""How often a worker is restarted within one exchange before its clients are given up."""

START_TIMEOUT = 120.0
"""Seconds that all workers may take to be up with their data, and a restarted one to be up."""

_SLICE_S = 1.0
_FETCH_S = 60.0


@dataclass(frozen=True)
class _Lost:
    """Why a worker gave no answers, and Ray's message."""

    reason: str
    details: str = ""


class Workers:
    """The workers of a run; a context manager that starts Ray, or joins a cluster, and leaves it.

    Args:
        experiment: the run.
        events: records workers that die, are late or are given up, and machines that are lost.
    """

    def __init__(self, experiment: Experiment, events: Events | None = None) -> None:
        self._events = events or Events()
        self._experiment = located(experiment)
        self._timeout = experiment.round_timeout
        self._count = experiment.num_workers
        shards = federated_data(experiment).shards
        clients = range(experiment.num_clients)
        architectures = [f"{experiment.student_of(k)} {experiment.teacher_of(k)}" for k in clients]
        self._worker_of = placement(architectures, [len(s) for s in shards], self._count)
        self._actors: dict[int, Any] = {}
        self._absent: dict[int, tuple[Any, float]] = {}  # not up yet: call for its node, since when
        self._nodes: set[str] = set()  # ids of the machines that workers were on
        self._is_up = False
        self._sent: dict[str, list[Any]] = {}  # in lists, or Ray would resolve the references

    def __enter__(self) -> Self:
        """Start all workers.

        Raises:
            FedkdError: they do not start, or run other code; Ray already runs in this process; there
                is no such cluster, or it is too small.
        """
        with ExitStack() as stack:
            self._ray, self._share = stack.enter_context(_ray(self._experiment))
            self._actor_class: Any = self._ray.ray.remote(Worker)
            stack.callback(self._end_all)
            self._start()
            self._is_up = True
            self._leave = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._leave.close()

    def handle(self, contents: Sequence[tuple[int, RecordDict]]) -> list[RecordDict | Failure]:
        """Return the answers to messages, each by the worker that holds its client: `answering.handle`.

        The clients of a worker fail if it has not answered by the round's timeout, when it is ended,
        or if it dies again after `RESTARTS` restarts.

        Raises:
            BaseException: whatever a worker raised that is not one client's failure.
        """
        parts: dict[int, Contents] = {}
        for client, content in contents:
            lean = {name: record for name, record in content.items() if name != "experiment"}
            parts.setdefault(self._worker_of[client], []).append((client, RecordDict(lean)))
        outcomes = self._exchange(parts, self._timeout)
        by_client: dict[int, RecordDict | Failure] = {}
        for worker, part in parts.items():
            outcome = outcomes[worker]
            clients = [client for client, _ in part]
            if isinstance(outcome, _Lost):
                outcome = [Failure(client, outcome.reason) for client in clients]
            by_client |= zip(clients, outcome, strict=True)
        return [by_client[client] for client, _ in contents]

    def _start(self) -> None:
        """Start all workers and wait until each has its data."""
        outcomes = self._exchange({worker: [] for worker in range(self._count)}, START_TIMEOUT)
        lost = [outcome for outcome in outcomes.values() if isinstance(outcome, _Lost)]
        if lost:
            late = f"not up in {START_TIMEOUT:g} s; other jobs may hold the cluster's CPUs"
            raise FedkdError(
                Setting("num-workers", self._count),
                f": {len(lost)} did not start ({lost[0].details or late})",
            )

    def _exchange(
        self, parts: Mapping[int, Contents], timeout: float
    ) -> dict[int, Results | _Lost]:
        """Return the workers' answers to their parts of an exchange, computed at the same time.

        Raises:
            FedkdError: Ray is gone, or has no room for a worker that is to be restarted.
        """
        end = monotonic() + timeout
        deaths = Counter[int]()
        outcomes: dict[int, Results | _Lost] = {}
        calls = {self._call(worker, part): worker for worker, part in parts.items()}
        while calls:
            self._look_around()
            done = _first_done(list(calls), max(0.0, min(_SLICE_S, end - monotonic())))
            if done is None:
                if monotonic() < end:
                    continue
                return outcomes | {worker: self._late(worker, timeout) for worker in calls.values()}
            worker = calls.pop(done)
            outcome = self._outcome(worker, done, deaths)
            if outcome is not None:
                outcomes[worker] = outcome
                continue
            calls[self._call(worker, parts[worker])] = worker
        self._look_around()
        return outcomes

    def _outcome(self, worker: int, call: Any, deaths: Counter[int]) -> Results | _Lost | None:
        """Return the outcome of a call, or `None` if it is to be made again."""
        import ray
        from ray.exceptions import RayError, RayTaskError

        try:
            results: Results | None = ray.get(call, timeout=_FETCH_S)
        except RayTaskError as error:
            if not isinstance(error.cause, MemoryError):
                raise error.cause from error  # a mistake of the experiment, or of this code
            return self._dead(worker, deaths, "worker ran out of memory", error)
        except RayError as error:  # died, out of memory, its node gone
            return self._dead(worker, deaths, "worker process died", error)
        if results is None:
            self._send_data()
        return results

    def _call(self, worker: int, part: Contents) -> Any:
        """Return a worker's call with its part of an exchange; a worker that is missing is started."""
        if worker not in self._actors:
            self._actors[worker] = self._new_actor(worker)
            since = self._absent.get(worker, (None, monotonic()))[1]
            self._absent[worker] = (self._actors[worker].node.remote(), since)
        return self._actors[worker].handle.remote(part, self._sent)

    def _new_actor(self, worker: int) -> Any:
        options = {"num_cpus": self._share.cpus, "num_gpus": self._share.gpus, "max_restarts": 0}
        paths = [str(Path(path).absolute()) for path in sys.path]
        keys, sources = self._experiment.flat(), fingerprint(self._experiment.client_modules)
        build = self._actor_class.options(**options).remote
        try:
            return within(START_TIMEOUT, lambda: build(keys, sources, paths, self._share.threads))
        except TimeoutError as error:
            raise FedkdError(
                f"worker {worker}: Ray did not accept it within {START_TIMEOUT:g} s"
            ) from error

    def _dead(self, worker: int, deaths: Counter[int], what: str, error: Exception) -> _Lost | None:
        """Record a death; return the worker's loss if that was one too many, otherwise `None`."""
        self._end(worker)
        self._absent.pop(worker, None)
        deaths[worker] += 1
        details = one_line(error)
        if deaths[worker] > RESTARTS:
            text = f"worker {worker}: {deaths[worker]} deaths in one exchange, given up ({details})"
            self._events.add("worker-given-up", text)
            return _Lost(what, details)
        text = f"worker {worker} is restarted, its clients start over: {what} ({details})"
        self._events.add("worker-died", text)
        return None

    def _late(self, worker: int, timeout: float) -> _Lost:
        self._end(worker)
        text = f"worker {worker} gave no answer in {timeout:g} s: stopped, will be restarted"
        self._events.add("worker-late", text)
        return _Lost("no reply in time")

    def _look_around(self) -> None:
        """Record which workers have come up and which machines are gone.

        Raises:
            FedkdError: Ray is gone, or a restarted worker is not up within `START_TIMEOUT`.
        """
        import ray
        from ray.exceptions import RayError

        self._ray.check()
        for worker, (node, since) in list(self._absent.items()):
            if _first_done([node], 0.0) is not None:
                with suppress(RayError):  # its own call fails as well
                    self._nodes.add(ray.get(node, timeout=_FETCH_S))
                    del self._absent[worker]
            elif monotonic() > since + START_TIMEOUT and self._is_up:
                raise FedkdError(
                    Setting("num-workers", self._count),
                    f": worker {worker} died and could not be restarted within "
                    f"{START_TIMEOUT:g} s; Ray has no room for it on "
                    f"{len(self._ray.nodes)} machine{'s' * (len(self._ray.nodes) != 1)}",
                )
        for node in self._nodes & self._ray.gone:
            self._nodes.remove(node)
            self._events.add("node-died", f"the machine of workers, Ray's node {node}, is gone")

    def _send_data(self) -> None:
        """Put the data sets into Ray's object store, once, for workers whose machines lack them."""
        import ray

        if not self._sent:
            for key, name in data_sets(self._experiment).items():
                dataset = data.load(name, self._experiment.data_dir)
                self._sent[key] = [ray.put(packed(dataset))]

    def _end(self, worker: int) -> None:
        self._ray.kill([self._actors.pop(worker)])

    def _end_all(self) -> None:
        self._ray.kill(self._actors.values())
        self._actors.clear()


@contextmanager
def _ray(experiment: Experiment) -> Iterator[tuple[RaySession, Share]]:
    """Yield Ray, started here or joined at ``ray-address``, and a worker's share."""
    workers = experiment.num_workers
    on_gpu = resolve_device(experiment.device).type == "cuda"
    if experiment.ray_address is None:
        # More workers than CPUs take turns; together they use the threads of this process.
        cpus = max(workers, available_cpus())
        gpus = torch.cuda.device_count() if on_gpu else 0
        share = share_of([{"CPU": cpus, "GPU": gpus}], workers, on_gpu)
        threads = min(share.cpus, max(1, torch.get_num_threads() // workers))
        share = replace(share, threads=threads)
        with ray_session(share.threads) as session:
            arguments = {**local_ray(session.folder), "num_cpus": cpus, "num_gpus": gpus}
            init = partial(session.ray.init, **arguments)
            session.start(init, f"num-workers = {workers}: Ray does not start", RAY_TIMEOUT)
            yield session, share
        return
    with ray_session(threads=1, joins=True) as session:
        address = experiment.ray_address
        init = partial(session.ray.init, address=address, **ray_log())
        what = f"ray-address = '{address}': no cluster can be joined there"
        session.start(init, what, RAY_TIMEOUT)
        yield session, share_of(list(session.nodes.values()), workers, on_gpu)


def _first_done(calls: list[Any], timeout: float) -> Any | None:
    """Return one of these calls that is done within `timeout` seconds, or `None`."""
    import ray

    try:
        done, _ = ray.wait(calls, timeout=timeout)
    except ConnectionError as error:  # of Ray's client, with an address of ray://
        raise FedkdError(f"Ray went away ({one_line(error)})") from error
    return done[0] if done else None
