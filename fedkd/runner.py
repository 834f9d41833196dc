"""Run one experiment on the engine it names, and come back with its records."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from importlib import import_module

import torch

from fedkd.allocator import keep_freed_memory
from fedkd.callbacks import Callback, Callbacks
from fedkd.errors import FedkdError
from fedkd.experiment import AUTO, Experiment
from fedkd.knowledge import SoftLabels
from fedkd.preflight import check, default_name
from fedkd.records import Run, RunFolder, environment
from fedkd.registry import recorded
from fedkd.sources import digest
from fedkd.strategy import DistillationStrategy
from fedkd.tuning import described, planned
from fedkd.world import resolve_device

_ENGINES = {"cohort": "fedkd.engines.cohort", "flower": "fedkd.engines.flower"}


def run(experiment: Experiment, callbacks: Iterable[Callback] = ()) -> Run:
    """Run a federated experiment.

    Args:
        experiment: what to run. Its folder ``<run-dir>/<name>`` must not exist; without a name one is
            made up from strategy, data set and seed.
        callbacks: told of the run as it goes; see `fedkd.callbacks`.

    Returns:
        The finished run, read back from its folder.

    Raises:
        FedkdError: something in the experiment is not right; nothing has been written then. Or the
            federation lost its clients on the way; finished rounds are in the run folder.
    """
    keep_freed_memory()
    strategy = check(experiment)
    with Callbacks(callbacks) as told:
        folder, named = _prepared(experiment, strategy)
        told.on_run_start(named, folder.path)
        engine = import_module(_ENGINES[experiment.engine])
        engine.run(strategy, named, folder, told.on_round_end)
        done = Run.load(folder.path)
        told.on_run_end(done)
    return done


def run_side_by_side(
    experiments: Sequence[Experiment], callbacks: Iterable[Callback] = ()
) -> list[Run | Exception]:
    """Run federations on the same data, their clients in one stack of models.

    Args:
        experiments: of the in-process engine without workers; they differ in the keys of
            `fedkd.stack.STACKABLE`, the seed (of the same shards) and the name alone.
        callbacks: told of every round of all of them, as it ends.

    Returns:
        The finished runs, or what ended one early. Their numbers are those of runs alone, within
        floating-point tolerance.

    Raises:
        FedkdError: an experiment is not right, or differs in other keys; nothing has been written.
    """
    if not experiments:
        return []
    keep_freed_memory()
    strategies = [check(experiment) for experiment in experiments]
    together = import_module("fedkd.engines.together")
    experiments = _with_one_plan(experiments)
    together.check_alike(experiments)
    prepared = [
        _prepared(experiment, strategy)
        for experiment, strategy in zip(experiments, strategies, strict=True)
    ]
    with Callbacks(callbacks) as told:
        planned = [
            together.Planned(strategy, named, folder, told.on_round_end)
            for strategy, (folder, named) in zip(strategies, prepared, strict=True)
        ]
        ended = together.run_together(planned)
    return [
        error or Run.load(folder.path) for error, (folder, _) in zip(ended, prepared, strict=True)
    ]


def _with_one_plan(experiments: Sequence[Experiment]) -> list[Experiment]:
    """Choose a plan that was left open once for all, and refuse two runs of one folder."""
    names = [(experiment.run_dir, experiment.name) for experiment in experiments if experiment.name]
    if len(set(names)) < len(names):
        twice = next(name for n, (_, name) in enumerate(names) if names[n] in names[:n])
        raise FedkdError(f"name = '{twice}': two runs side by side cannot have one folder")
    plan = planned(experiments[0]).plan
    return [
        experiment.replace(plan=plan) if experiment.plan == AUTO else experiment
        for experiment in experiments
    ]


def _prepared(
    experiment: Experiment, strategy: DistillationStrategy
) -> tuple[RunFolder, Experiment]:
    """Make the run folder, and say in it what is run: all that was left open is decided."""
    folder = RunFolder.create(experiment, default_name(experiment, strategy))
    named = experiment.replace(
        name=folder.path.name,
        device=_device(experiment),
        plan=planned(experiment).plan,
        **recorded(experiment, strategy),
    )
    surroundings = environment(named.device, torch.get_num_threads())
    sources = {"sources": digest(named)}
    said = {**surroundings, **sources, **described(experiment), **_codec(experiment, strategy)}
    folder.write_experiment(named, said)
    return folder, named


def _codec(experiment: Experiment, strategy: DistillationStrategy) -> dict[str, str]:
    """Say how soft labels cross the wire, where there are any."""
    if strategy.uploads() is not SoftLabels:
        return {}
    up, down = strategy.wires(experiment)
    return {"codec": str(up) if up == down else f"{up}/{down}"}


def _device(experiment: Experiment) -> str:
    """Return the device that all processes of the run use.

    A Flower client without a share of a GPU sees none, and the server should not differ from it.
    """
    blind = (
        experiment.engine == "flower" and experiment.device == "auto" and not experiment.client_gpus
    )
    return "cpu" if blind else str(resolve_device(experiment.device))
