"""Finds runs that can be reused or resumed: of the same experiment, and known by the same identity."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from fedkd.engines.identity import NOT_CENTRAL, identity_of
from fedkd.errors import FedkdError
from fedkd.experiment import Experiment
from fedkd.federation.checkpoint import FILE as CHECKPOINT
from fedkd.keys import AUTO
from fedkd.machine import resolve_device
from fedkd.records.files import read_result
from fedkd.records.folder import RunFolder
from fedkd.records.identity import Identity, changes, counted
from fedkd.records.results import CentralRun
from fedkd.registry import reproducible_keys, strategy_of


@dataclass(frozen=True)
class _ExistingRun:
    """A run.

    Attributes:
        path: its folder.
        experiment: what was run, with the device that was used.
        identity: what its numbers depend on.
        is_finished: whether it is finished.
        central_seeds: of a finished central baseline, else none.
    """

    path: Path
    experiment: Experiment
    identity: Identity
    is_finished: bool
    central_seeds: tuple[int, ...]


class ExistingRuns:
    """The runs in a folder that would come out the same if they were made now.

    Data, the user's code, initial weights and the versions of fedkd, PyTorch and Python must be the same.

    Attributes:
        outdated: by run of the same experiment that would come out otherwise, what has changed since.
    """

    def __init__(self, run_dir: str | Path) -> None:
        folders = sorted(p.parent for p in Path(run_dir).glob("[!.]*/experiment.toml"))
        self._runs = [run for folder in folders if (run := _read(folder)) is not None]
        self.outdated: dict[Path, list[str]] = {}

    def federated(self, experiment: Experiment) -> list[Path]:
        """Return the folders of finished runs of a federated experiment."""
        return [run.path for run in self._of(experiment) if run.is_finished]

    def unfinished(self, experiment: Experiment) -> Path | None:
        """Return the folder of a federated run that was interrupted after at least one round, if any."""
        unfinished = (run.path for run in self._of(experiment) if not run.is_finished)
        begun = (path for path in unfinished if (path / CHECKPOINT).is_file())
        return next((path for path in begun if not RunFolder(path).is_running), None)

    def _of(self, experiment: Experiment) -> list[_ExistingRun]:
        strategy = strategy_of(experiment)
        complete = experiment.replace(**reproducible_keys(experiment, strategy))
        federated = [run for run in self._runs if not run.central_seeds]
        alike = [run for run in federated if _same(complete, run.experiment, ())]
        return self._unchanged(alike, identity_of(complete, strategy)) if alike else []

    def central(self, experiment: Experiment, seeds: Sequence[int]) -> dict[int, Path]:
        """Return the folder of each of the seeds for which there is a central baseline."""
        alike = [run for run in self._runs if _same(experiment, run.experiment, NOT_CENTRAL)]
        found: dict[int, Path] = {}
        for seed in seeds:
            with_seed = [run for run in alike if seed in run.central_seeds]
            now = identity_of(experiment, None, [seed]) if with_seed else {}
            if unchanged := self._unchanged(with_seed, now):
                found[seed] = unchanged[0].path
        return found

    def _unchanged(self, runs: Sequence[_ExistingRun], now: Identity) -> list[_ExistingRun]:
        """Return those runs that would come out the same now; note what has changed if none would."""
        # An automatic plan matches any: keys are compared by themselves.
        compared = {kind: part for kind, part in now.items() if kind != "keys"}
        changed = {run.path: changes(run.identity, compared) for run in runs}
        unchanged = [run for run in runs if not changed[run.path]]
        if not unchanged:
            self.outdated |= changed
        return unchanged

    def remark(self) -> str | None:
        """Return in words why runs are made again, or `None`."""
        reasons = counted(self.outdated.values())
        return f"runs made again since something changed: {reasons}" if reasons else None


def common_plan(experiment: Experiment, reused: Iterable[Path]) -> Experiment:
    """Return the experiment with the plan that most of the reused runs have.

    A plan decides the last bits: new runs use the plan of existing ones.
    """
    if experiment.plan != AUTO:
        return experiment
    plans = Counter(RunFolder(path).experiment.plan for path in reused)
    return experiment.replace(plan=plans.most_common(1)[0][0]) if plans else experiment


def _read(folder: Path) -> _ExistingRun | None:
    """Return a run, or `None` for a folder that holds none, or not what it is known by."""
    try:
        is_finished = RunFolder(folder).is_finished
        result = read_result(folder) if is_finished else {}
        experiment, identity = RunFolder(folder).experiment, RunFolder(folder).identity
        seeds = tuple(result["seeds"]) if "seeds" in result else ()
        experiment = experiment.replace(device=RunFolder(folder).environment["device"])
        return _ExistingRun(folder, experiment, identity, is_finished, seeds) if identity else None
    except (OSError, ValueError, KeyError):  # an incomplete record, or keys of another version
        return None


def _same(experiment: Experiment, existing: Experiment, besides: Sequence[str]) -> bool:
    """Whether two experiments agree in all that may change numbers; an automatic plan matches any."""
    experiment = experiment.replace(device=str(resolve_device(experiment.device)))
    left_out = {
        *Experiment.keys("bookkeeping"),
        *besides,
        *(("plan",) if experiment.plan == AUTO else ()),
    }
    return experiment.model_dump(exclude=left_out) == existing.model_dump(exclude=left_out)


# --- The central baseline, which holds several seeds ----------------------------------------------


def joined(folders: Mapping[int, Path]) -> CentralRun:
    """Return one central baseline from the folders that hold its seeds, in the order of the seeds.

    Its path is that of the folder if there is only one, else `None`.

    Raises:
        FedkdError: a folder holds no finished central baseline, or not of that seed.
    """
    paths = list(dict.fromkeys(folders.values()))
    runs = {path: CentralRun.load(path) for path in paths}
    for seed, path in folders.items():
        if seed not in runs[path].seeds:
            raise FedkdError(f"{path} holds no central baseline of seed {seed}")
    parts = [_part(runs[path], seed) for seed, path in folders.items()]
    first = parts[0]
    values: dict[str, Any] = {name: _appended([p[name] for p in parts]) for name in first}
    values |= {"path": paths[0] if len(paths) == 1 else None}
    return CentralRun(**values)


_WHOLE = ("parameters", "test_size")


def _part(run: CentralRun, seed: int) -> dict[str, Any]:
    """Return the fields of a central baseline for one of its seeds."""
    number, count = run.seeds.index(seed), len(run.seeds)
    values = {field.name: getattr(run, field.name) for field in fields(run)}
    values["seconds"] = {what: spent / count for what, spent in run.seconds.items()}
    whole = ("path", "seconds", *_WHOLE)
    return {n: v if n in whole else _entry(v, number) for n, v in values.items()}


def _entry(value: Any, number: int) -> Any:
    """Return one seed's part of a list by seed, also for such lists in dicts."""
    if isinstance(value, Mapping):
        return {name: _entry(each, number) for name, each in value.items()}
    return None if value is None else value[number : number + 1]


def _appended(values: Sequence[Any]) -> Any:
    """Return the seeds' values combined: lists concatenated, seconds added, the rest from the first."""
    first = values[0]
    if isinstance(first, dict) and first:
        return {name: _appended([value[name] for value in values]) for name in first}
    if isinstance(first, list):
        return [entry for value in values for entry in value]
    return sum(values) if isinstance(first, float) else first
