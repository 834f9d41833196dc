"""From folders to what a report shows: comparisons, federations on the same data, baselines, sweeps."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from string import ascii_uppercase

from fedkd.errors import FedkdError
from fedkd.experiment import Experiment
from fedkd.keys import kebab
from fedkd.records.files import read_json
from fedkd.records.folder import RunFolder
from fedkd.records.results import CentralRun, Run
from fedkd.studies.comparison.methods import label
from fedkd.studies.comparison.result import Comparison
from fedkd.studies.sweep.result import Sweep

RUNS = "runs"
"""Where folders are looked for when none is named."""

MOST_LABEL = 26
"""Characters of a method's label: what a figure has room for."""

DATA_KEYS = Experiment.keys("data", "federated data")
"""What makes test accuracies of two federations comparable."""

_TECHNICAL_KEYS = {*Experiment.keys("bookkeeping", "clients", "machine", "evaluation", "seed")} - {
    "engine"
}
"""Keys that no method of a report is called after: figures compare engines, and nothing else of these."""


@dataclass(frozen=True)
class Federations:
    """Federated runs on the same data, and the central baseline beside them.

    Attributes:
        title: what they are called.
        runs: by the method's label, a run a seed.
        central: the baseline, where there is one.
        central_folders: where it lies.
        comparison: the comparison that they are, where they are one.
        notes: what the labels leave unsaid.
    """

    title: str
    runs: dict[str, list[Run]]
    central: CentralRun | None = None
    central_folders: tuple[Path, ...] = ()
    comparison: Comparison | None = None
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Sources:
    """What was found.

    Attributes:
        federations: comparisons first, then runs by data.
        centrals: baselines that stand alone.
        sweeps: by folder.
        skipped: what is in the folder and not shown, each with the reason.
    """

    federations: list[Federations]
    centrals: list[CentralRun]
    sweeps: list[Sweep]
    skipped: list[str] = field(default_factory=list)


def find(folders: Sequence[str | Path] = ()) -> Sources:
    """Read folders of runs, baselines, comparisons and sweeps, or all that is in a folder of such.

    Raises:
        FedkdError: a folder that was named is nothing of this or is not finished, or nothing is there.
    """
    comparisons: list[Comparison] = []
    runs: list[Run] = []
    centrals: list[CentralRun] = []
    sweeps: list[Sweep] = []
    skipped: list[str] = []
    for path, named in _listed(folders or (RUNS,)):
        try:
            match _read(path):
                case Comparison() as found:
                    comparisons.append(found)
                case CentralRun() as found:
                    centrals.append(found)
                case Run() as found:
                    runs.append(found)
                case found:
                    sweeps.append(found)
        except FedkdError as error:
            if named:
                raise
            skipped.append(str(error) if str(path) in str(error) else f"{path}: {error}")
    sources = _sorted(comparisons, runs, centrals, sweeps, skipped)
    if not (sources.federations or sources.centrals or sources.sweeps):
        said = f"; not shown: {'; '.join(skipped)}" if skipped else ""
        where = ", ".join(map(str, folders)) or f"{RUNS}/"
        raise FedkdError(f"folders = {where}: no finished run to report on{said}")
    return sources


def _listed(folders: Iterable[str | Path]) -> list[tuple[Path, bool]]:
    """Return each folder with whether it was named, those in a folder of runs in their place."""
    listed: dict[Path, bool] = {}
    for folder in map(Path, folders):
        if not folder.is_dir():
            raise FedkdError(f"folders: there is no folder {folder}")
        if _is_ours(folder):
            listed[folder] = True
            continue
        inside = sorted(path for path in folder.iterdir() if path.is_dir())
        if not any(map(_is_ours, inside)):
            raise FedkdError(
                f"folders: {folder} is no folder of a run, comparison or sweep, and none is in it"
            )
        for path in inside:
            listed.setdefault(path, False)
    return list(listed.items())


def _is_ours(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("experiment.toml", "comparison.json"))


def _read(folder: Path) -> Comparison | CentralRun | Run | Sweep:
    """Read a folder, whatever it is of.

    Raises:
        FedkdError: it is of nothing that is known, or not finished.
    """
    if (folder / "comparison.json").is_file():
        return Comparison.load(folder)
    if (folder / "sweep.json").is_file():
        return Sweep.load(folder)
    RunFolder.existing(folder)
    if (folder / "rounds.jsonl").is_file():
        run = Run.load(folder)
        _ = run.experiment  # of a version that had other keys: say so here
        return run
    if "teacher_accuracies" not in read_json(folder / "result.json"):
        raise FedkdError(f"{folder} holds no finished run: rounds.jsonl is missing")
    return CentralRun.load(folder)


# --- What belongs together ------------------------------------------------------------------------


def _sorted(
    comparisons: Sequence[Comparison],
    runs: Sequence[Run],
    centrals: Sequence[CentralRun],
    sweeps: list[Sweep],
    skipped: list[str],
) -> Sources:
    """Put runs on the same data together; those of a comparison are shown there."""
    compared = {path.resolve() for comparison in comparisons for path in _folders(comparison)}
    alone = [run for run in runs if run.path.resolve() not in compared]
    baselines = [c for c in centrals if c.path is None or c.path.resolve() not in compared]
    federations = [_compared(comparison) for comparison in comparisons]
    together, left = _together(alone, baselines)
    return Sources([*federations, *together], left, sweeps, skipped)


def _folders(comparison: Comparison) -> list[Path]:
    """Return the run folders of a comparison."""
    paths = [run.path for runs in comparison.runs.values() for run in runs]
    return [*paths, *comparison.central_folders.values()]


def _compared(comparison: Comparison) -> Federations:
    runs = {label(method): list(found) for method, found in comparison.runs.items()}
    folders = tuple(dict.fromkeys(comparison.central_folders.values()))
    return Federations(comparison.path.name, runs, comparison.central, folders, comparison)


def _together(
    runs: Sequence[Run], centrals: Sequence[CentralRun]
) -> tuple[list[Federations], list[CentralRun]]:
    """Group runs by their data, each with a baseline on it, and return the baselines left."""
    groups: dict[tuple[object, ...], list[Run]] = {}
    for run in runs:
        key = tuple(getattr(run.experiment, name) for name in DATA_KEYS)
        groups.setdefault(key, []).append(run)
    left = list(centrals)
    federations = []
    for group in groups.values():
        central = next((c for c in left if _goes_with(c, group)), None)
        if central is not None:
            left.remove(central)
        folders = (central.path,) if central is not None and central.path is not None else ()
        methods, notes = by_method(group)
        federations.append(Federations(_title(group), methods, central, folders, notes=notes))
    return federations, left


def _goes_with(central: CentralRun, runs: Sequence[Run]) -> bool:
    """Say whether a baseline is of the data and the student of runs."""
    if central.path is None:
        return False
    first, second = RunFolder(central.path).experiment, runs[0].experiment
    return first.student == second.student and all(
        getattr(first, key) == getattr(second, key) for key in Experiment.keys("data")
    )


def _title(runs: Sequence[Run]) -> str:
    if len(runs) == 1:
        return runs[0].path.name
    first = runs[0].experiment
    return f"{first.dataset}, {first.num_clients} clients, {dealt(first)}"


def dealt(experiment: Experiment) -> str:
    """Say how private images were dealt."""
    return {
        "iid": "dealt at random",
        "dirichlet": f"Dirichlet {experiment.partition_alpha:g}",
        "shard": f"{experiment.classes_per_client} sorted shards each",
        "pathological": f"{experiment.classes_per_client} classes each",
    }[experiment.partition]


def by_method(runs: Sequence[Run]) -> tuple[dict[str, list[Run]], list[str]]:
    """Return runs by a label of their method, one a seed, and what the labels leave unsaid.

    Runs of a strategy that differ in other keys too have the difference in their label; where that is
    long, a letter in its place, and the difference is said. A repeated run has a label of its own.
    """
    found: dict[tuple[str, str, int], list[Run]] = {}
    for run in runs:
        experiment = run.experiment
        alike = [r.experiment for r in runs if r.experiment.strategy == experiment.strategy]
        which = label(experiment.strategy), _difference(experiment, alike)
        number = 1
        while any(r.experiment.seed == experiment.seed for r in found.get((*which, number), ())):
            number += 1
        found.setdefault((*which, number), []).append(run)
    labels = _labels(list(found))
    notes = [
        f"{labels[key]}: {difference or 'as by default'}{f', run no. {key[2]}' * (key[2] > 1)}."
        for key in found
        if (difference := key[1]) not in labels[key]
    ]
    return {labels[key]: each for key, each in found.items()}, notes


def _difference(experiment: Experiment, alike: Sequence[Experiment]) -> str:
    """Say in which keys an experiment differs from others of the same strategy."""
    differing = [
        key
        for key in Experiment.model_fields
        if key not in (*_TECHNICAL_KEYS, "strategy")
        and len({str(getattr(each, key)) for each in alike}) > 1
    ]
    return ", ".join(f"{kebab(key)} {getattr(experiment, key)}" for key in differing)


def _labels(keys: Sequence[tuple[str, str, int]]) -> dict[tuple[str, str, int], str]:
    """Return a label for each name, difference and number of a repetition."""
    plain = {
        key: f"{key[0]}{f' ({key[1]})' * bool(key[1])}{f' #{key[2]}' * (key[2] > 1)}"
        for key in keys
    }
    long = {name for (name, _, _), text in plain.items() if len(text) > MOST_LABEL}
    seen: dict[str, int] = {}
    for key in keys:
        if key[0] in long:
            seen[key[0]] = number = seen.get(key[0], -1) + 1
            mark = ascii_uppercase[number] if number < 26 else str(number + 1)
            plain[key] = f"{key[0][: MOST_LABEL - 4]} {mark}"
    return plain
