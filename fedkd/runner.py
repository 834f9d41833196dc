"""Run one experiment on the engine it names, and come back with its records."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module

import torch

from fedkd.errors import FedkdError
from fedkd.experiment import Experiment
from fedkd.records import Row, Run, RunFolder, environment
from fedkd.registry import strategy_of
from fedkd.strategy import DistillationStrategy
from fedkd.world import check_models, resolve_device, world_of

_ENGINES = {"cohort": "fedkd.engines.cohort", "flower": "fedkd.engines.flower"}


def run(experiment: Experiment, on_round: Callable[[Row], None] = lambda _: None) -> Run:
    """Run a federated experiment.

    Args:
        experiment: what to run. Its folder ``<run-dir>/<name>`` must not exist; without a name one is
            made up from strategy, data set and seed.
        on_round: called with each round's record, once that is on disk.

    Returns:
        The finished run, read back from its folder.

    Raises:
        FedkdError: something in the experiment is not right; nothing has been written then. Or the
            federation lost its clients on the way; finished rounds are in the run folder.
    """
    strategy = check(experiment)
    folder = RunFolder.create(experiment, default_name(experiment, strategy))
    named = experiment.replace(name=folder.path.name, strategy=_recorded(experiment, strategy))
    device = str(resolve_device(experiment.device))
    folder.write_experiment(named, environment(device, torch.get_num_threads()))
    import_module(_ENGINES[experiment.engine]).run(strategy, named, on_round)
    return Run.load(folder.path)


def check(experiment: Experiment) -> DistillationStrategy:
    """Check everything that can be checked before any work, and return the strategy.

    Raises:
        FedkdError: a key names something that is not there, or keys contradict each other.
    """
    strategy = strategy_of(experiment)
    RunFolder.check(experiment)
    world = world_of(experiment)
    check_models(experiment, world, ("student", "teacher", "server_model"))
    per_round = experiment.public_per_round
    if per_round is not None and per_round > len(world.public):
        raise FedkdError(
            f"public-per-round = {per_round}: the public set has {len(world.public)} images"
        )
    return strategy


def default_name(experiment: Experiment, strategy: DistillationStrategy) -> str:
    """Make up a run's name."""
    dataset = experiment.dataset.replace(":", ".")
    return f"{strategy.name().lower()}-{dataset}-seed{experiment.seed}"


def _recorded(experiment: Experiment, strategy: DistillationStrategy) -> str:
    """Record a strategy of ours by its class name, a user's as it was given."""
    return experiment.strategy if ":" in experiment.strategy else strategy.name()
