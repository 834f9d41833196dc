"""Run one experiment on the engine it names, and come back with its records."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import suppress
from functools import partial
from importlib import import_module
from pathlib import Path

import torch

from fedkd.engines.interrupts import InterruptedRun, between_rounds, naming_how_to_go_on
from fedkd.engines.preflight import check, default_name
from fedkd.engines.run_folder import record_beginning
from fedkd.errors import FedkdError, Setting
from fedkd.experiment import Experiment
from fedkd.federation.checkpoint import Checkpoint
from fedkd.keys import AUTO
from fedkd.knowledge import SoftLabels
from fedkd.machine import keep_freed_memory, resolve_device
from fedkd.records.callbacks import Callback, Callbacks
from fedkd.records.files import Row
from fedkd.records.folder import RunFolder, environment
from fedkd.records.results import Run
from fedkd.registry import reproducible_keys, strategy_of
from fedkd.strategy import DistillationStrategy
from fedkd.training.tuning import plan_reasons, with_plan
from fedkd.user_code import fingerprint

_ENGINES = {"cohort": "fedkd.engines.in_process", "flower": "fedkd.engines.simulation"}


def run(experiment: Experiment, callbacks: Iterable[Callback] = ()) -> Run:
    """Run a federated experiment.

    Args:
        experiment: what to run. Its folder ``<run-dir>/<name>`` must not exist; without a name one is
            made up from strategy, data set and seed.
        callbacks: told of the run as it goes; see `fedkd.records.callbacks`.

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
        return _finished(strategy, named, folder, told)


def resume(path: str | Path, callbacks: Iterable[Callback] = ()) -> Run:
    """Go on with a run that was cut off, after the last round that it finished.

    Its records, states and result become those of a run that was never cut off: bit for bit on the same
    machine, but for its seconds. Each resumption is a line of ``resumptions.jsonl``.

    Args:
        path: the run folder.
        callbacks: told of the rounds that are still to be run, as of those of any run.

    Returns:
        The finished run, read back from its folder. A run that is finished already is only read.

    Raises:
        FedkdError: there is no run of this code, or another process is running it.
    """
    folder = RunFolder.existing(path)
    if folder.is_finished:
        return Run.load(folder.path)
    experiment = folder.relocated_experiment()
    check_resumable(folder, experiment)
    keep_freed_memory()
    strategy = check(experiment, is_new=False)
    with Callbacks(callbacks) as told:
        return _finished(strategy, experiment, folder, told)


def run_or_resume(experiment: Experiment, callbacks: Iterable[Callback] = ()) -> Run:
    """Run an experiment that has a name, or go on with it in its folder; see `is_begun`.

    Raises:
        FedkdError: see `run`.
    """
    keep_freed_memory()
    strategy = check(experiment, is_new=False)
    with Callbacks(callbacks) as told:
        folder, named = _taken_up(experiment, strategy)
        return _finished(strategy, named, folder, told)


def check_resumable(folder: RunFolder, experiment: Experiment) -> None:
    """Refuse to go on with a run of other code: the numbers of one run come of one code.

    Raises:
        FedkdError: the sources differ from those that the run began with.
    """
    if folder.sources != fingerprint(experiment.client_modules):
        raise FedkdError(
            f"{folder.path} was begun by other code (fedkd {folder.version}; fedkd, strategies or "
            "client-code differ): go on with that, or begin a new run"
        )


def _finished(
    strategy: DistillationStrategy, experiment: Experiment, folder: RunFolder, told: Callbacks
) -> Run:
    """Run all rounds that are left of a run."""
    goes_on = naming_how_to_go_on(f"run --resume {folder.path}", partial(_how_far, folder))
    with folder.locked(), between_rounds() as interrupts, goes_on:
        _note_resumption(experiment, folder)
        told.on_run_start(experiment, folder.path)

        def on_round(row: Row) -> None:
            told.on_round_end(row)
            if interrupts.wanted and row["round"] < experiment.num_server_rounds:
                raise InterruptedRun(
                    f"interrupted after round {row['round']} of {experiment.num_server_rounds}"
                )

        engine = import_module(_ENGINES[experiment.engine])
        engine.run(strategy, experiment, folder, on_round)
        done = Run.load(folder.path)
        told.on_run_end(done)
    return done


def _how_far(folder: RunFolder, stopped: KeyboardInterrupt) -> str:
    """Say what is done of a run that was interrupted, between two rounds or at once."""
    if isinstance(stopped, InterruptedRun):
        return str(stopped)
    return f"stopped at once, {Checkpoint.load(folder.path).round} rounds are done"


def _note_resumption(experiment: Experiment, folder: RunFolder) -> None:
    """Write down after which round, and where, a run goes on that has finished any."""
    last = Checkpoint.load(folder.path).round
    if last:
        surroundings = environment(experiment.device, torch.get_num_threads())
        folder.append("resumptions.jsonl", {"after_round": last, **surroundings})


def run_side_by_side(
    experiments: Sequence[Experiment],
    callbacks: Iterable[Callback] = (),
    *,
    is_new: bool = True,
) -> list[Run | Exception]:
    """Run federations on the same data, their clients in one stack of models.

    Args:
        experiments: of the in-process engine without workers; they differ in the keys of
            `fedkd.clients.stack.STACKABLE`, the seed (of the same shards) and the name alone.
        callbacks: told of every round of all of them, as it ends.
        is_new: whether their folders must not be there yet; else those that have been begun go on.

    Returns:
        The finished runs, or what ended one early. Their numbers are those of runs alone, within
        floating-point tolerance.

    Raises:
        FedkdError: an experiment is not right, or differs in other keys; nothing has been written.
    """
    if not experiments:
        return []
    keep_freed_memory()
    strategies = [check(experiment, is_new=is_new) for experiment in experiments]
    side_by_side = import_module("fedkd.engines.side_by_side")
    experiments = _with_one_plan(experiments)
    side_by_side.check_alike(experiments)
    prepare = _prepared if is_new else _taken_up
    prepared = [
        prepare(each, strategy) for each, strategy in zip(experiments, strategies, strict=True)
    ]
    with Callbacks(callbacks) as told, between_rounds() as interrupts:

        def on_round(row: Row) -> None:
            told.on_round_end(row)
            if interrupts.wanted:
                raise InterruptedRun("interrupted between two rounds")

        with_plan = [
            side_by_side.PreparedRun(strategy, named, folder, on_round)
            for strategy, (folder, named) in zip(strategies, prepared, strict=True)
        ]
        ended = side_by_side.run_side_by_side(with_plan)
    return [
        error or Run.load(folder.path) for error, (folder, _) in zip(ended, prepared, strict=True)
    ]


def _with_one_plan(experiments: Sequence[Experiment]) -> list[Experiment]:
    """Choose a plan that was left open once for all, and refuse two runs of one folder."""
    names = [(experiment.run_dir, experiment.name) for experiment in experiments if experiment.name]
    if len(set(names)) < len(names):
        twice = next(name for n, (_, name) in enumerate(names) if names[n] in names[:n])
        raise FedkdError(Setting("name", twice), ": two runs side by side cannot have one folder")
    plan = with_plan(experiments[0]).plan
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
        plan=with_plan(experiment).plan,
        **reproducible_keys(experiment, strategy),
    )
    reasons = {**plan_reasons(experiment), **_codec(experiment, strategy)}
    record_beginning(folder, named, named.device, reasons)
    return folder, named


def _taken_up(
    experiment: Experiment, strategy: DistillationStrategy
) -> tuple[RunFolder, Experiment]:
    """Return the folder in which a run goes on, if it has been begun, or make it."""
    if not is_begun(experiment):
        return _prepared(experiment, strategy)
    folder = RunFolder.existing(Path(experiment.run_dir) / str(experiment.name))
    return folder, folder.experiment


def is_begun(experiment: Experiment) -> bool:
    """Whether the folder of a named experiment is there, and holds the same by the same code."""
    wanted = experiment.replace(
        device=_device(experiment), **reproducible_keys(experiment, strategy_of(experiment))
    )
    with suppress(FedkdError):
        folder = RunFolder.existing(Path(experiment.run_dir) / str(experiment.name))
        return folder.experiment == wanted and folder.sources == fingerprint(wanted.client_modules)
    return False


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
