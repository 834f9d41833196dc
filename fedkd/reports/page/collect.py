"""Reads folders for a report: comparisons, federations on the same data, baselines, sweeps."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from string import ascii_uppercase

from fedkd.errors import FedkdError, naming
from fedkd.experiment import Experiment
from fedkd.keys import kebab
from fedkd.records.files import read_result
from fedkd.records.folder import RunFolder
from fedkd.records.results import CentralRun, Run
from fedkd.studies.comparison.methods import label
from fedkd.studies.comparison.result import Comparison
from fedkd.studies.sweep.result import Sweep

RUNS = "runs"
"""Where folders are searched by default."""

MOST_LABEL = 26
"""Characters of a method's label: a figure has room for this many."""

DATA_KEYS = Experiment.keys("data", "federated data")
"""Keys that make test accuracies of two federations comparable."""

_TECHNICAL_KEYS = {*Experiment.keys("bookkeeping", "clients", "machine", "evaluation", "seed")} - {
    "engine"
}
"""Keys that no label of a method mentions; of the technical keys, figures compare engines only."""


@dataclass(frozen=True)
class Federations:
    """Federated runs on the same data, and the central baseline beside them.

    Attributes:
        title: their title.
        runs: by the method's label, one run per seed.
        central: the baseline, if any.
        central_folders: its folders.
        comparison: their comparison, if they form one.
        notes: what the labels omit.
    """

    title: str
    runs: dict[str, list[Run]]
    central: CentralRun | None = None
    central_folders: tuple[Path, ...] = ()
    comparison: Comparison | None = None
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Sources:
    """The finished runs, comparisons and sweeps to report on.

    Attributes:
        federations: comparisons first, then runs by data.
        centrals: baselines that belong to no other runs.
        sweeps: by folder.
        skipped: other contents of the folders, each with the reason.
    """

    federations: list[Federations]
    centrals: list[CentralRun]
    sweeps: list[Sweep]
    skipped: list[str] = field(default_factory=list)


def find(folders: Sequence[str | Path] = ()) -> Sources:
    """Return the content of folders of runs, baselines, comparisons and sweeps, or of folders of such.

    Raises:
        FedkdError: a given folder is none of these or is unfinished, or nothing is found.
    """
    comparisons: list[Comparison] = []
    runs: list[Run] = []
    centrals: list[CentralRun] = []
    sweeps: list[Sweep] = []
    skipped: list[str] = []
    for path, is_given in _readable(folders or (RUNS,)):
        try:
            match _read(path):
                case Comparison() as comparison:
                    comparisons.append(comparison)
                case CentralRun() as central:
                    centrals.append(central)
                case Run() as run:
                    runs.append(run)
                case sweep:
                    sweeps.append(sweep)
        except FedkdError as error:
            if is_given:
                raise
            skipped.append(naming(path, error))
    sources = _sorted(comparisons, runs, centrals, sweeps, skipped)
    if not (sources.federations or sources.centrals or sources.sweeps):
        reasons = f"; not shown: {'; '.join(skipped)}" if skipped else ""
        where = ", ".join(map(str, folders)) or f"{RUNS}/"
        raise FedkdError(f"folders = {where}: no finished run to report on{reasons}")
    return sources


def _readable(folders: Sequence[str | Path]) -> list[tuple[Path, bool]]:
    """Return each run folder with whether it was given itself.

    Raises:
        FedkdError: a folder is not there, cannot be read, or holds nothing of ours.
    """
    try:
        return _listed(folders)
    except OSError as error:
        raise FedkdError(f"folders: {error.filename} cannot be read ({error.strerror})") from None


def _listed(folders: Iterable[str | Path]) -> list[tuple[Path, bool]]:
    """Return each run folder with whether it was given itself; folders of runs are expanded."""
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
                f"folders: {folder} is not the folder of a run, comparison or sweep, and contains none"
            )
        for path in inside:
            listed.setdefault(path, False)
    return list(listed.items())


def _is_ours(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("experiment.toml", "comparison.json"))


def _read(folder: Path) -> Comparison | CentralRun | Run | Sweep:
    """Return the content of a folder.

    Raises:
        FedkdError: the folder is of no known kind, or unfinished.
    """
    if (folder / "comparison.json").is_file():
        return Comparison.load(folder)
    if (folder / "sweep.json").is_file():
        return Sweep.load(folder)
    RunFolder.existing(folder)
    if (folder / "rounds.jsonl").is_file():
        run = Run.load(folder)
        _ = run.experiment  # raises here if another version wrote it with other keys
        return run
    if "teacher_accuracies" not in read_result(folder):
        raise FedkdError(f"{folder} holds no finished run: rounds.jsonl is missing")
    return CentralRun.load(folder)


# --- Grouping -----------------------------------------------------------------------------------


def _sorted(
    comparisons: Sequence[Comparison],
    runs: Sequence[Run],
    centrals: Sequence[CentralRun],
    sweeps: list[Sweep],
    skipped: list[str],
) -> Sources:
    """Return the sources with runs grouped by data, except those of comparisons."""
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


def _data(path: Path | None) -> Mapping[str, str] | None:
    """Return the fingerprints of a run's images, where they are recorded."""
    return None if path is None else RunFolder(path).identity.get("data")


def _compared(comparison: Comparison) -> Federations:
    runs = {label(method): list(seeds) for method, seeds in comparison.runs.items()}
    folders = tuple(dict.fromkeys(comparison.central_folders.values()))
    return Federations(comparison.path.name, runs, comparison.central, folders, comparison)


def _together(
    runs: Sequence[Run], centrals: Sequence[CentralRun]
) -> tuple[list[Federations], list[CentralRun]]:
    """Return runs grouped by data, each group with a baseline if any, and the other baselines."""
    groups: dict[tuple[object, ...], list[Run]] = {}
    for run in runs:
        keys = (getattr(run.experiment, name) for name in DATA_KEYS)
        key = (*keys, str(_data(run.path)))
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
    """Whether a baseline has the data and the student of some runs, by name and by what they were."""
    if central.path is None:
        return False
    first, second = RunFolder(central.path).experiment, runs[0].experiment
    ours, theirs = RunFolder(central.path).identity, RunFolder(runs[0].path).identity
    return (
        first.student == second.student
        and all(getattr(first, key) == getattr(second, key) for key in Experiment.keys("data"))
        and all(_agree(ours.get(kind, {}), theirs.get(kind, {})) for kind in ("data", "code"))
    )


def _agree(some: Mapping[str, str], others: Mapping[str, str]) -> bool:
    """Whether what has the same name has the same fingerprint."""
    return all(some[name] == others[name] for name in some.keys() & others.keys())


def _title(runs: Sequence[Run]) -> str:
    if len(runs) == 1:
        return runs[0].path.name
    first = runs[0].experiment
    return f"{first.dataset}, {first.num_clients} clients, {partition_text(first)}"


def partition_text(experiment: Experiment) -> str:
    """Return in words how private images were partitioned."""
    return {
        "iid": "split at random",
        "dirichlet": f"Dirichlet {experiment.partition_alpha:g}",
        "shard": f"{experiment.classes_per_client} sorted shards each",
        "pathological": f"{experiment.classes_per_client} classes each",
    }[experiment.partition]


def by_method(runs: Sequence[Run]) -> tuple[dict[str, list[Run]], list[str]]:
    """Return runs by a label of their method, one per seed, and notes on what the labels omit.

    The label of a strategy's runs includes the other keys in which they differ; where that is long, it
    has a letter instead, and a note gives the difference. A repeated run has its own label.
    """
    runs_by_method: dict[tuple[str, str, int], list[Run]] = {}
    for run in runs:
        experiment = run.experiment
        alike = [r.experiment for r in runs if r.experiment.strategy == experiment.strategy]
        which = label(experiment.strategy), _difference(experiment, alike)
        number = 1
        while any(
            r.experiment.seed == experiment.seed for r in runs_by_method.get((*which, number), ())
        ):
            number += 1
        runs_by_method.setdefault((*which, number), []).append(run)
    labels = _labels(list(runs_by_method))
    notes = [
        f"{labels[key]}: {difference or 'with the defaults'}{f', run no. {key[2]}' * (key[2] > 1)}."
        for key in runs_by_method
        if (difference := key[1]) not in labels[key]
    ]
    return {labels[key]: each for key, each in runs_by_method.items()}, notes


def _difference(experiment: Experiment, alike: Sequence[Experiment]) -> str:
    """Return in words in which keys an experiment differs from others of the same strategy."""
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
