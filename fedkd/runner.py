"""Run one experiment on the engine it names, and come back with its records."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module

import torch

from fedkd.allocator import keep_freed_memory
from fedkd.experiment import Experiment
from fedkd.knowledge import SoftLabels
from fedkd.preflight import check, default_name
from fedkd.records import Row, Run, RunFolder, environment
from fedkd.registry import recorded
from fedkd.strategy import DistillationStrategy
from fedkd.tuning import described, planned
from fedkd.world import resolve_device

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
    keep_freed_memory()
    strategy = check(experiment)
    folder = RunFolder.create(experiment, default_name(experiment, strategy))
    named = experiment.replace(
        name=folder.path.name,
        device=_device(experiment),
        plan=planned(experiment).plan,
        **recorded(experiment, strategy),
    )
    surroundings = environment(named.device, torch.get_num_threads())
    said = {**surroundings, **described(experiment), **_codec(experiment, strategy)}
    folder.write_experiment(named, said)
    import_module(_ENGINES[experiment.engine]).run(strategy, named, folder, on_round)
    return Run.load(folder.path)


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
