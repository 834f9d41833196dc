"""Run or resume experiments on the engine that they name, and return their records."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import suppress
from functools import partial
from importlib import import_module
from pathlib import Path

import torch

from fedkd.engines.identity import identity_of
from fedkd.engines.interrupts import InterruptedRun, between_rounds, naming_resume_command
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
from fedkd.records.identity import changes
from fedkd.records.results import Run
from fedkd.registry import reproducible_keys, strategy_of
from fedkd.strategy import DistillationStrategy
from fedkd.training.tuning import plan_reasons, with_plan

_ENGINES = {"cohort": "fedkd.engines.in_process", "flower": "fedkd.engines.simulation"}


def run(experiment: Experiment, callbacks: Iterable[Callback] = ()) -> Run:
    """Run a federated experiment.

    Args:
        experiment: what to run. Its folder ``<run-dir>/<name>`` must not exist; without a name it is
            made of strategy, data set and seed.
        callbacks: called while the run progresses; see `fedkd.records.callbacks`.

    Returns:
        The finished run, read back from its folder.

    Raises:
        FedkdError: the experiment is invalid, and nothing has been written; or the federation lost its
            clients, and finished rounds are in the run folder.
    """
    keep_freed_memory()
    strategy = check(experiment)
    with Callbacks(callbacks) as hooks:
        folder, named = _prepared(experiment, strategy)
        return _finished(strategy, named, folder, hooks)


def resume(
    path: str | Path, callbacks: Iterable[Callback] = (), *, num_server_rounds: int | None = None
) -> Run:
    """Resume a run that was cut off, after its last finished round, or extend one by more rounds.

    Its records, states and result become those of a run that was never cut off: bit for bit on the same
    machine, except for seconds. Each resumption is a line of ``resumptions.jsonl``.

    Args:
        path: the run folder.
        callbacks: called for the remaining rounds, as in any run.
        num_server_rounds: all rounds that the run is to have, not less than it has; default those of its
            experiment. It ends as if they had been asked for at first, from the states before its
            closing exchange.

    Returns:
        The finished run, read back from its folder. A run that has already finished is only read,
        unless it is extended.

    Raises:
        FedkdError: there is no such run, it was begun with something else, or another process is
            running it; or it cannot have that number of rounds.
    """
    folder = RunFolder.existing(path)
    experiment = folder.relocated_experiment()
    rounds = num_server_rounds or experiment.num_server_rounds
    if folder.is_finished and rounds == experiment.num_server_rounds:
        return Run.load(folder.path)
    keep_freed_memory()
    strategy = check(experiment, is_new=False)
    check_resumable(folder, experiment, strategy)
    experiment = _with_rounds(folder, experiment, rounds)
    with Callbacks(callbacks) as hooks:
        return _finished(strategy, experiment, folder, hooks)


def _with_rounds(folder: RunFolder, experiment: Experiment, rounds: int) -> Experiment:
    """Return the experiment of a run with another number of rounds, written down in its folder.

    Raises:
        FedkdError: more rounds are done, or the last one was tested only as it was the last.
    """
    before, done = experiment.num_server_rounds, Checkpoint.load(folder.path).round
    key = Setting("num-server-rounds", rounds)
    if rounds < done:
        raise FedkdError(
            key, f": {folder.path} has {done} rounds already; give more, or leave it out"
        )
    if rounds == before:
        return experiment
    if done == before and done % experiment.evaluate_every:
        raise FedkdError(
            key,
            f": round {done} of {folder.path} was tested as the last one, which ",
            Setting("evaluate-every", experiment.evaluate_every),
            " would not have done: start a new run",
        )
    with folder.locked():
        folder.extend(rounds)
    return experiment.replace(num_server_rounds=rounds)


def run_or_resume(experiment: Experiment, callbacks: Iterable[Callback] = ()) -> Run:
    """Run an experiment that has a name, or resume it in its folder; see `is_begun`.

    Raises:
        FedkdError: see `run`.
    """
    keep_freed_memory()
    strategy = check(experiment, is_new=False)
    with Callbacks(callbacks) as hooks:
        folder, named = _prepared_or_begun(experiment, strategy)
        return _finished(strategy, named, folder, hooks)


def check_resumable(
    folder: RunFolder, experiment: Experiment, strategy: DistillationStrategy
) -> None:
    """Raise if all numbers of a run would not come from the same code, data and weights.

    Raises:
        FedkdError: something differs from what the run began with; the text names it.
    """
    changed = changes(folder.identity, identity_of(experiment, strategy))
    if changed:
        raise FedkdError(
            f"{folder.path} cannot be resumed, as it was begun with something else: "
            f"{'; '.join(changed)}; restore it, or start a new run"
        )


def _finished(
    strategy: DistillationStrategy, experiment: Experiment, folder: RunFolder, hooks: Callbacks
) -> Run:
    """Return a run after its remaining rounds."""
    naming = naming_resume_command(f"run --resume {folder.path}", partial(_progress, folder))
    with folder.locked(), between_rounds() as interrupts, naming:
        _record_resumption(experiment, folder)
        hooks.on_run_start(experiment, folder.path)

        def on_round(row: Row) -> None:
            hooks.on_round_end(row)
            if interrupts.requested and row["round"] < experiment.num_server_rounds:
                raise InterruptedRun(
                    f"interrupted after round {row['round']} of {experiment.num_server_rounds}"
                )

        engine = import_module(_ENGINES[experiment.engine])
        engine.run(strategy, experiment, folder, on_round)
        done = Run.load(folder.path)
        hooks.on_run_end(done)
    return done


def _progress(folder: RunFolder, stopped: KeyboardInterrupt) -> str:
    """Return what is done of a run that was interrupted, between two rounds or at once."""
    if isinstance(stopped, InterruptedRun):
        return str(stopped)
    return f"stopped at once, {Checkpoint.load(folder.path).round} rounds are done"


def _record_resumption(experiment: Experiment, folder: RunFolder) -> None:
    """Record after which round, and where, a run resumes; nothing if it has finished none."""
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
    """Run federations on the same data, with their clients in one stack of models.

    Args:
        experiments: of the in-process engine without workers; they differ only in the keys of
            `fedkd.clients.stack.STACKABLE`, the seed (of the same shards) and the name.
        callbacks: called after every round of each.
        is_new: whether their folders must not exist yet; otherwise runs that have begun are resumed.

    Returns:
        The finished runs, or what ended one early. Their numbers are those of runs alone, within
        floating-point tolerance.

    Raises:
        FedkdError: an experiment is invalid, or differs in other keys; nothing has been written.
    """
    if not experiments:
        return []
    keep_freed_memory()
    strategies = [check(experiment, is_new=is_new) for experiment in experiments]
    side_by_side = import_module("fedkd.engines.side_by_side")
    experiments = _with_one_plan(experiments)
    side_by_side.check_alike(experiments)
    prepare = _prepared if is_new else _prepared_or_begun
    prepared = [
        prepare(each, strategy) for each, strategy in zip(experiments, strategies, strict=True)
    ]
    with Callbacks(callbacks) as hooks, between_rounds() as interrupts:

        def on_round(row: Row) -> None:
            hooks.on_round_end(row)
            if interrupts.requested:
                raise InterruptedRun("interrupted between two rounds")

        runs = [
            side_by_side.PreparedRun(strategy, named, folder, on_round)
            for strategy, (folder, named) in zip(strategies, prepared, strict=True)
        ]
        errors = side_by_side.run_side_by_side(runs)
    return [
        error or Run.load(folder.path) for error, (folder, _) in zip(errors, prepared, strict=True)
    ]


def _with_one_plan(experiments: Sequence[Experiment]) -> list[Experiment]:
    """Return the experiments with one plan where it was left open; refuse two runs in one folder."""
    names = [(experiment.run_dir, experiment.name) for experiment in experiments if experiment.name]
    if len(set(names)) < len(names):
        repeated = next(name for n, (_, name) in enumerate(names) if names[n] in names[:n])
        raise FedkdError(Setting("name", repeated), ": two runs cannot share a folder")
    plan = with_plan(experiments[0]).plan
    return [
        experiment.replace(plan=plan) if experiment.plan == AUTO else experiment
        for experiment in experiments
    ]


def _prepared(
    experiment: Experiment, strategy: DistillationStrategy
) -> tuple[RunFolder, Experiment]:
    """Return a new run folder, and the experiment written there, with all that was left open decided."""
    decided = experiment.replace(
        device=_device(experiment),
        plan=with_plan(experiment).plan,
        **reproducible_keys(experiment, strategy),
    )
    identity = identity_of(decided, strategy)
    reasons = {**plan_reasons(experiment), **_codec(experiment, strategy)}

    def begin(folder: RunFolder, name: str) -> None:
        record_beginning(folder, decided.replace(name=name), decided.device, reasons, identity)

    folder = RunFolder.create(decided, default_name(experiment, strategy), begin)
    return folder, decided.replace(name=folder.path.name)


def _prepared_or_begun(
    experiment: Experiment, strategy: DistillationStrategy
) -> tuple[RunFolder, Experiment]:
    """Return the folder of a run that has begun, with its experiment, or a new one."""
    if not is_begun(experiment):
        return _prepared(experiment, strategy)
    folder = RunFolder.existing(Path(experiment.run_dir) / str(experiment.name))
    return folder, folder.experiment


def is_begun(experiment: Experiment) -> bool:
    """Whether the folder of a named experiment exists, begun with all that it would begin with now."""
    strategy = strategy_of(experiment)
    expected = experiment.replace(
        device=_device(experiment), **reproducible_keys(experiment, strategy)
    )
    with suppress(FedkdError):
        folder = RunFolder.existing(Path(experiment.run_dir) / str(experiment.name))
        if folder.experiment == expected:
            return not changes(folder.identity, identity_of(expected, strategy))
    return False


def _codec(experiment: Experiment, strategy: DistillationStrategy) -> dict[str, str]:
    """Return the codecs of soft labels, upload and download, as a reason; none if none are sent."""
    if strategy.uploads() is not SoftLabels:
        return {}
    up, down = strategy.wires(experiment)
    return {"codec": str(up) if up == down else f"{up}/{down}"}


def _device(experiment: Experiment) -> str:
    """Return the device that all processes of the run use.

    A Flower client without a share of a GPU sees none, and the server should not differ from it.
    """
    sees_no_gpu = (
        experiment.engine == "flower" and experiment.device == "auto" and not experiment.client_gpus
    )
    return "cpu" if sees_no_gpu else str(resolve_device(experiment.device))
