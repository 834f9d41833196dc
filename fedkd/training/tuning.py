"""Choose plans by timing a few steps of each way to run an architecture's clients.

The choice never changes results beyond floating-point tolerance, but it does change their last bits.
So it is written into the experiment (its ``plan`` key), which the run folder, the workers and the
clients all read.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from time import perf_counter

import torch

from fedkd.code_fingerprint import code_fingerprints
from fedkd.data.federated import FederatedData, federated_data
from fedkd.errors import FedkdError, Setting, one_line, safe_logger
from fedkd.experiment import Experiment
from fedkd.keys import AUTO
from fedkd.losses import ce
from fedkd.training.architectures import architectures_of
from fedkd.training.batches import BatchStream
from fedkd.training.cohort import Cohort
from fedkd.training.optimizers import OptimizerSettings
from fedkd.training.plans import Plan, default_plan, largest_block
from fedkd.training.schedule import steps_per_epoch
from fedkd.user_code import find_function

_logger = safe_logger(__name__)

STEPS = 6
"""Steps taken with each plan; the first is not timed."""

ROUNDS = 20
"""Measuring takes at most about a hundredth of a run of this many rounds."""

MARGIN = 0.9
"""Another plan must take less than this share of the first plan's time, so that noise does not decide."""


@dataclass(frozen=True)
class Choice:
    """The plan of an architecture, and why."""

    architecture: str
    plan: Plan
    reason: str

    def __str__(self) -> str:
        return f"{self.architecture} {self.plan} ({self.reason})"


Counts = tuple[tuple[str, int], ...]
"""How many models of each architecture are run at once."""


def plan_reasons(experiment: Experiment, counts: Counts = ()) -> dict[str, str]:
    """Return, for the run folder, which plans were chosen and why; see `choose_plans`."""
    return {"plans": "; ".join(map(str, choose_plans(experiment, counts)))}


def check_plan(experiment: Experiment) -> None:
    """Raise an error if ``plan`` names an architecture twice, or one that the run does not have.

    Raises:
        FedkdError: it does; the message names the architecture.
    """
    models = f"{experiment.student},{experiment.teacher},{experiment.server_model}"
    known = sorted({name.strip() for name in models.split(",")} - {"none"})
    planned = [entry.strip().rpartition("=")[0] for entry in experiment.plan.split(",")]
    for name in planned:
        if name and (name not in known or planned.count(name) > 1):
            raise FedkdError(
                Setting("plan", experiment.plan),
                f": '{name}' must be one of {', '.join(known)}, given once",
            )


def with_plan(experiment: Experiment, counts: Counts = ()) -> Experiment:
    """Return the experiment with its plan written out; see `choose_plans`."""
    choices = choose_plans(experiment, counts)
    if experiment.plan != AUTO:
        # Other processes do not try models, and would stack one that must not be.
        why_not_stacked = architectures_of(federated_data(experiment)).why_not_stacked
        named = {entry.strip().rpartition("=")[0] for entry in experiment.plan.split(",")}
        choices = tuple(c for c in choices if why_not_stacked(c.architecture))
        choices = tuple(c for c in choices if not named & {"", c.architecture})
    if not choices:
        return experiment
    given = [] if experiment.plan == AUTO else [experiment.plan]
    plans = [*given, *(f"{c.architecture}={c.plan}" for c in choices)]
    return experiment.replace(plan=", ".join(plans))


def choose_plans(experiment: Experiment, counts: Counts = ()) -> tuple[Choice, ...]:
    """Return a plan for each architecture, chosen once for equal experiments with equal models.

    Args:
        experiment: the run.
        counts: models by architecture; default the clients that a round of it runs in one process.
    """
    names = f"{experiment.student},{experiment.teacher},{experiment.server_model}".split(",")
    functions = [find_function(name.strip(), "model") for name in names if ":" in name]
    known_by = {**code_fingerprints(functions), **federated_data(experiment).fingerprints}
    return _chosen(experiment, counts, tuple(known_by.items()))


@lru_cache(maxsize=16)
def _chosen(
    experiment: Experiment, counts: Counts, _: tuple[tuple[str, str], ...]
) -> tuple[Choice, ...]:
    """Return a plan for each architecture; the last argument is what models and images are known by."""
    data = federated_data(experiment)
    counts = _largest(counts or clients_at_once(experiment))
    if experiment.plan != AUTO:
        plan = architectures_of(data).plan
        return tuple(Choice(n, plan(n, experiment.plan), "as asked for") for n, _ in counts)
    threads = _threads(experiment)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return tuple(_choose(experiment, data, name, count, threads) for name, count in counts)
    finally:
        torch.set_num_threads(before)


def _largest(counts: Counts) -> Counts:
    """Return each architecture once: teacher and student may share one."""
    largest: dict[str, int] = {}
    for name, count in counts:
        largest[name] = max(count, largest.get(name, 0))
    return tuple(largest.items())


def clients_at_once(experiment: Experiment) -> Counts:
    """Return by architecture how many of its models are run at once, in one process."""
    clients = range(experiment.num_clients)
    names = Counter(experiment.student_of(k) for k in clients)
    names.update(experiment.teacher_of(k) for k in clients)
    del names["none"]
    if experiment.engine == "flower":
        return tuple((name, 1) for name in names)
    share = experiment.clients_per_round / experiment.num_clients / max(1, experiment.num_workers)
    return tuple((name, max(1, round(count * share))) for name, count in names.items())


def _threads(experiment: Experiment) -> int:
    """Return the number of threads that a process of the run has."""
    if experiment.engine == "flower":
        return max(1, int(experiment.client_cpus))
    return max(1, torch.get_num_threads() // max(1, experiment.num_workers))


def _choose(
    experiment: Experiment, data: FederatedData, name: str, clients: int, threads: int
) -> Choice:
    example = data.train.batch(torch.arange(2, device=data.train.device))
    skeleton = architectures_of(data).skeleton(name)
    may_stack = not architectures_of(data).why_not_stacked(name)
    default = default_plan(skeleton, example, may_stack)
    largest = largest_block(skeleton)
    if data.train.device.type == "cuda":
        threads = 1  # one process feeds the device
        if default.stacked:
            largest = min(largest, _fitting_block(experiment, data, name, clients))
    plans = candidates(default, largest, clients, threads)
    plans = [plan for plan in plans if may_stack or not plan.stacked]
    if len(plans) == 1:
        return Choice(name, plans[0], "the only plan")
    times = _measure(experiment, data, name, clients, plans)
    if not times:
        return Choice(name, default, "no plan could be measured")
    best = fastest(times)
    others = ", ".join(f"{plan} {_text(t)}" for plan, t in times.items() if plan != best)
    reason = f"{_text(times[best])} per client and step" + (f"; {others}" if others else "")
    return Choice(name, best, reason)


def _text(seconds: float) -> str:
    return f"{seconds * 1e3:.2g} ms"


def candidates(default: Plan, largest: int, clients: int, threads: int) -> list[Plan]:
    """Return the ways to run some clients, the one to prefer first.

    Lanes come first: they cost nothing on an idle machine, and lose far less than threads on a busy one.
    """
    lanes = min(threads, clients)
    if not default.stacked:
        plans = [Plan(False, lanes=lanes), Plan(False), Plan(True, min(10, largest, clients))]
    else:
        block = min(largest, clients)
        part = min(largest, -(-clients // lanes))
        plans = [
            Plan(True, part, lanes),
            Plan(True, block),
            Plan(True, max(1, part // 2), lanes),
            Plan(False, lanes=lanes),
        ]
    return list(dict.fromkeys(plans))


def fastest(times: Mapping[Plan, float]) -> Plan:
    """Return the plan to use, from seconds by plan: the first unless another is clearly faster."""
    first = next(iter(times))
    best = min(times, key=lambda plan: times[plan])
    return best if times[best] < MARGIN * times[first] else first


def _measure(
    experiment: Experiment, data: FederatedData, name: str, clients: int, plans: Sequence[Plan]
) -> dict[Plan, float]:
    """Return the seconds of a client's step by plan, measured until a hundredth of the run is spent."""
    times: dict[Plan, float] = {}
    spent = 0.0
    steps = ROUNDS * _steps_a_round(experiment, data)
    for plan in plans:
        try:
            used, times[plan] = _time(
                experiment, data, name, min(clients, plan.block * plan.lanes), plan
            )
        except Exception as error:  # in the run, whatever a model raises is its clients' failure
            _logger.warning("%s cannot be run as %s: %s", name, plan, one_line(error))
            continue
        spent += used
        best = min(times.values())
        if spent + used > 0.01 * best * steps * clients:
            break
    return times


def _steps_a_round(experiment: Experiment, data: FederatedData) -> int:
    """Return the approximate number of steps of a client in a round."""
    private = sum(map(len, data.shards)) // len(data.shards)
    public = experiment.public_per_round or len(data.public)
    return experiment.local_epochs * steps_per_epoch(
        private, experiment.batch_size
    ) + experiment.distill_epochs * steps_per_epoch(public, experiment.batch_size)


def _fitting_block(experiment: Experiment, data: FederatedData, name: str, clients: int) -> int:
    """Return how many clients can step at once in the free memory of the GPU."""
    device = data.train.device
    # First once, so that libraries have allocated their workspaces.
    _time(experiment, data, name, 1, Plan(True, 1))
    peaks = []
    for count in (1, 3):
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        _time(experiment, data, name, count, Plan(True, count))
        peaks.append(torch.cuda.max_memory_allocated(device) - before)
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info(device)
    initial = architectures_of(data).initial_state(name, 0)
    state = sum(t.numel() * t.element_size() for t in initial.values())
    return fitting_block(free, clients * state, (peaks[1] - peaks[0]) / 2)


def fitting_block(free: int, resident: int, each: float) -> int:
    """Return how many clients fit, at least one, with a fifth of the memory to spare.

    Args:
        free: bytes.
        resident: bytes that the states of all clients take.
        each: bytes that each further client in a step takes.
    """
    return max(1, int((0.8 * free - resident) / max(each, 1)))


def _time(
    experiment: Experiment, data: FederatedData, name: str, clients: int, plan: Plan
) -> tuple[float, float]:
    """Return the seconds that measuring a plan took, and the seconds of a client's step under it."""
    begun = perf_counter()
    architectures = architectures_of(data)
    stack = architectures.initial_states(name, experiment.seed, clients)
    cohort = Cohort.over(architectures.skeleton(name), stack, plan, experiment.precision)

    rows = torch.arange(STEPS * experiment.batch_size) % len(data.train)
    ticks: list[tuple[float, float]] = []

    def ticked(share: float) -> None:
        if data.train.device.type == "cuda":
            torch.cuda.synchronize()
        ticks.append((share, perf_counter()))

    cohort.fit(
        [BatchStream("private", data.train, [rows] * clients, {ce: 1.0})],
        epochs=1,
        batch_size=experiment.batch_size,
        optimizer=OptimizerSettings.from_experiment(experiment),
        streams=[(experiment.seed, k, "plan") for k in range(clients)],
        progress=ticked,
    )
    # The first step of each block is a warm-up, and preparing a fit is not part of a step.
    done, since = next(tick for tick in ticks if tick[0] >= 1 / STEPS)
    taken = (ticks[-1][1] - since) / (1 - done)
    return perf_counter() - begun, taken / (STEPS * clients)
