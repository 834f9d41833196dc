"""Central and federated methods side by side, on the same shards, public set and initial weights.

Runs that are there already are not made again, and those that were cut off go on, so that one with
another method or seed costs that method or seed. The comparison's own record only says which
runs it is made of: every number is computed from their folders.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

from rich.console import Group
from rich.table import Table

from fedkd.comparing import tables
from fedkd.comparing.differences import Bools, difference, right, with_differences
from fedkd.comparing.entries import (
    Difference,
    Entry,
    as_row,
    central_entry,
    curve,
    default_target,
    federated_entry,
    with_gaps,
    with_target,
)
from fedkd.comparing.jobs import Job, check_jobs, make, threads, threads_each
from fedkd.comparing.methods import (
    CENTRAL,
    LOCAL,
    Method,
    canonical,
    check_all,
    default_methods,
    federated,
    label,
    pooled,
    variant,
)
from fedkd.comparing.record import Record
from fedkd.comparing.reuse import Shelf, common_plan, joined
from fedkd.comparing.verdicts import rivals, sentence
from fedkd.errors import FedkdError
from fedkd.experiment import Experiment
from fedkd.interrupts import naming_how_to_go_on
from fedkd.records.results import CentralRun, Run
from fedkd.tuning import planned


@dataclass(frozen=True)
class Comparison:
    """Methods × seeds on the same data.

    Attributes:
        path: its folder, which holds ``comparison.json``.
        experiment: what all methods share, as it was asked for.
        entries: one a method, in the order asked for.
        seeds: of every method.
        test_size: test images behind every accuracy.
        runs: the federated runs by method, one a seed.
        central: the central baseline, if any of its methods was asked for; its path is `None` where
            its seeds lie in several folders.
        central_folders: by seed, where it lies.
        reference: the method that the others are compared with.
        target: accuracy 0..1 of which the entries say when it was reached, or `None`.
        target_reason: why it is that one, or `None` if it was asked for.
        reused: runs that were there already; a central baseline counts once a seed.
        remark: how many runs were made at once, and why, where several were asked for.
    """

    path: Path
    experiment: Experiment
    entries: list[Entry]
    seeds: list[int]
    test_size: int
    runs: dict[str, list[Run]]
    central: CentralRun | None
    central_folders: dict[int, Path]
    reference: str
    target: float | None
    target_reason: str | None
    reused: int
    remark: str | None

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a comparison's folder and the run folders that it names, beside it or elsewhere.

        Raises:
            FedkdError: there is no comparison, or one of its runs is gone.
        """
        return cls(**_assembled(Record.read(Path(path))))

    @property
    def rows(self) -> list[dict[str, Any]]:
        """One plain dict a method."""
        return [as_row(entry) for entry in self.entries]

    def __getitem__(self, method: Method) -> Entry:
        name = canonical(method)
        for entry in self.entries:
            if entry.method == name:
                return entry
        there = ", ".join(entry.method for entry in self.entries)
        raise FedkdError(f"method = '{name}' is not compared here; there are {there}")

    @property
    def sentences(self) -> list[str]:
        """What it comes to: a sentence a method, and one on the two methods that matter most.

        See `fedkd.comparing.verdicts.rivals`.
        """
        found = [entry.sentence for entry in self.entries if entry.sentence is not None]
        if (pair := rivals(self.entries, self.reference)) is not None:
            ours, theirs = self[pair[0]], self[pair[1]]
            found.append(sentence(ours, theirs, self.difference(*pair), self.target))
        return found

    @property
    def notes(self) -> list[str]:
        """What has to be known to read the tables."""
        found = tables.notes(self.entries, len(self.seeds), self.target, self.target_reason)
        count = len(self.seeds) * (len(self.runs) + (self.central is not None))
        if self.reused:
            found.append(f"{self.reused} of {count} runs were there already.")
        return [*found, self.remark + "."] if self.remark is not None else found

    def difference(self, method: Method, reference: Method) -> Difference:
        """Return one method minus another, with how sure that is; the docs say what it covers."""
        ours, theirs = self[method], self[reference]
        return difference(ours, theirs, *map(self._right, (ours, theirs)))

    def _right(self, entry: Entry) -> Bools | None:
        return right(entry.method, self.runs.get(entry.method, ()), self.central_folders)

    def as_json(self) -> dict[str, Any]:
        """Return everything that ``--json`` prints."""
        paths = {method: [str(run.path) for run in runs] for method, runs in self.runs.items()}
        return {
            "path": str(self.path),
            "seeds": self.seeds,
            "test_size": self.test_size,
            "reference": self.reference,
            "target": self.target,
            "target_reason": self.target_reason,
            "reused": self.reused,
            "remark": self.remark,
            "methods": self.rows,
            "sentences": self.sentences,
            "notes": self.notes,
            "runs": paths,
            "central": {str(seed): str(path) for seed, path in self.central_folders.items()},
        }

    def table(self) -> Group:
        """Return both tables, one above the other, at most 100 columns wide."""
        return Group(self.accuracy_table(), self.cost_table())

    def accuracy_table(self) -> Table:
        """Return accuracies and differences, in percent and percentage points."""
        seeds = _seeds(self.seeds)
        title = f"Test accuracy in %, {seeds}, {self.test_size:,} test images"
        return tables.accuracy_table(self.entries, title, self.reference)

    def cost_table(self) -> Table:
        """Return bytes, rounds and seconds."""
        clients = self.experiment.num_clients
        title = f"Payload of all {clients:,} clients and seconds, means of {_seeds(self.seeds)}"
        return tables.cost_table(self.entries, title, self.target)


def _seeds(seeds: Sequence[int]) -> str:
    return f"{len(seeds)} seed{'s' * (len(seeds) > 1)}"


# --- Making the runs ------------------------------------------------------------------------------


def compare(
    experiment: Experiment,
    methods: Sequence[Method] | None = None,
    seeds: Sequence[int] | None = None,
    *,
    reference: Method | None = None,
    target: float | None = None,
    jobs: int = 1,
    progress: Callable[[str, float], None] = lambda _, __: None,
) -> Comparison:
    """Run methods on the same shards, public set, client samples and initial weights.

    Finished runs in ``run-dir`` are taken where the same code made them of the same experiment, and
    unfinished ones go on.

    Args:
        experiment: what all methods share. Its strategy is not used, its ``strategy-config`` only by
            the method that it names. Its name is the comparison's, and the beginning of its runs'.
        methods: names or classes of strategies, and ``teacher``, ``student-alone``,
            ``student-distilled``; see `fedkd.comparing.methods.default_methods`.
        seeds: of all methods; default the experiment's.
        reference: the method that the others are compared with; default LocalOnly if it is compared,
            else the first.
        target: accuracy, 0..1 or in percent, of which to say when it is reached; default see
            `fedkd.comparing.entries.default_target`.
        jobs: runs made at once, in processes of their own, when they fit into memory. The numbers are
            those of one after another.
        progress: told what is going on and how far it is, 0..1.

    Raises:
        FedkdError: a method or key is not right, and nothing has been run then; or a run went wrong:
            finished ones stay, and the same call goes on from them.
    """
    seeds = [experiment.seed] if seeds is None else list(seeds)
    names = [canonical(m) for m in (default_methods(experiment) if methods is None else methods)]
    check_jobs(experiment, jobs)
    check_all(experiment, names, seeds)
    chosen = _reference(names, reference)
    share = _share(target)
    Record.check(experiment)
    record = Record(experiment, names, seeds, chosen, share).written()  # for `resume`
    with naming_how_to_go_on(f"compare --resume {record.path}", lambda _: "interrupted"):
        folders, reused, remark = _made(experiment, names, seeds, jobs, progress)
    runs, central = folders
    done = replace(record, runs=runs, central=central, reused=reused, remark=remark)
    return Comparison(**_assembled(done.written()))


def resume(
    path: str | Path, *, jobs: int = 1, progress: Callable[[str, float], None] = lambda _, __: None
) -> Comparison:
    """Go on with a comparison that was cut off; see `compare`.

    Runs that were cut off go on after their last finished round.

    Args:
        path: its folder, which may have been moved together with those of its runs.
        jobs: see `compare`.
        progress: see `compare`.

    Raises:
        FedkdError: there is no comparison, or see `compare`.
    """
    folder = Path(path)
    record = Record.read(folder)
    experiment = record.experiment.replace(run_dir=str(folder.parent))
    if experiment.name is not None:
        experiment = experiment.replace(name=folder.name)
    return compare(
        experiment,
        record.methods,
        record.seeds,
        reference=record.reference,
        target=record.target,
        jobs=jobs,
        progress=progress,
    )


def _reference(names: Sequence[str], wanted: Method | None) -> str:
    if wanted is None:
        return LOCAL if LOCAL in names else names[0]
    name = canonical(wanted)
    if name not in names:
        raise FedkdError(f"reference = '{wanted}': must be one of the methods: {', '.join(names)}")
    return name


def _share(target: float | None) -> float | None:
    """Read an accuracy that is given as a fraction or, above 1, in percent."""
    if target is None:
        return None
    share = target / 100 if target > 1 else target
    if not 0 < share <= 1:
        raise FedkdError(f"target = {target:g}: must be an accuracy, > 0 and ≤ 1, or in percent")
    return share


Folders = tuple[dict[str, list[Path]], dict[int, Path]]
"""Run folders of each strategy by seed, and of the central baseline."""


def _made(
    experiment: Experiment,
    names: Sequence[str],
    seeds: Sequence[int],
    at_once: int,
    progress: Callable[[str, float], None],
) -> tuple[Folders, int, str | None]:
    """Make the runs that are not there; return all folders, how many were, and the jobs' remark."""
    shelf = Shelf(experiment.run_dir)
    wanted = [(name, seed) for name in federated(names) for seed in seeds]
    there = {key: found for key in wanted if (found := shelf.federated(variant(experiment, *key)))}
    has_central = any(name in CENTRAL for name in names)
    central = shelf.central(pooled(experiment)) if has_central else {}
    central = {seed: central[seed] for seed in seeds if seed in central}
    missing = [key for key in wanted if key not in there]
    begun = {key: shelf.unfinished(variant(experiment, *key)) for key in missing}
    jobs = _central_jobs(experiment, seeds, central) if has_central else []
    if missing:
        with threads(threads_each(at_once)):
            # One plan for all federations: its bits are not the method's.
            known = [*(f for fs in there.values() for f in fs), *filter(None, begun.values())]
            shared = planned(common_plan(experiment, known))
        jobs += [
            Job(f"{label(n)}, seed {s}", _free(variant(shared, n, s)), begun=begun[n, s])
            for n, s in missing
        ]
    paths, remark = make(jobs, at_once, progress)
    central |= {seed: path for job, path in zip(jobs, paths, strict=True) for seed in job.seeds}
    made = dict(zip(missing, paths[len(paths) - len(missing) :], strict=True))
    runs = {
        name: [made[key] if (key := (name, seed)) in made else there[key][0] for seed in seeds]
        for name in federated(names)
    }
    reused = len(there) + len(central) - sum(len(job.seeds) for job in jobs)
    return (runs, {seed: central[seed] for seed in seeds if has_central}), reused, remark


def _central_jobs(
    experiment: Experiment, seeds: Sequence[int], there: Mapping[int, Path]
) -> list[Job]:
    """Return the central baseline of the seeds that there is none of: one cohort."""
    missing = tuple(seed for seed in seeds if seed not in there)
    shared = common_plan(pooled(experiment), there.values())
    return [Job("central baseline", _free(shared), missing)] if missing else []


def _free(experiment: Experiment) -> Experiment:
    """Number the name of a run whose folder is taken, as by one that was interrupted."""
    name, number = experiment.name, 1
    while experiment.name and (Path(experiment.run_dir) / experiment.name).exists():
        number += 1
        experiment = experiment.replace(name=f"{name}-{number}")
    return experiment


# --- From run folders to numbers -------------------------------------------------------------------


def _assembled(record: Record) -> dict[str, Any]:
    """Compute a comparison's attributes from its record and run folders."""
    if not record.is_finished:
        raise FedkdError(
            f"{record.path} is unfinished: fedkd compare --resume {record.path} goes on"
        )
    runs = {name: [Run.load(path) for path in paths] for name, paths in record.runs.items()}
    baseline = joined(record.central) if record.central else None
    points = {n: [curve(run, record.counted[n]) for run in each] for n, each in runs.items()}
    entries = [
        central_entry(name, baseline)
        if baseline and name in CENTRAL
        else federated_entry(name, runs[name], record.counted[name])
        for name in record.methods
    ]
    target, why = record.target, None
    if target is None:
        target, why = default_target(entries, points) or (None, None)
    entries = [with_target(e, points.get(e.method), target) for e in with_gaps(entries)]
    answers = {n: right(n, runs.get(n, ()), record.central) for n in record.methods}
    sizes = [run.result["test_size"] for each in runs.values() for run in each[:1]]
    return {
        "path": record.path,
        "experiment": record.experiment,
        "entries": with_differences(entries, record.reference, target, answers),
        "seeds": record.seeds,
        "test_size": baseline.test_size if baseline else int(sizes[0]),
        "runs": runs,
        "central": baseline,
        "central_folders": record.central,
        "reference": record.reference,
        "target": target,
        "target_reason": why,
        "reused": record.reused,
        "remark": record.remark,
    }
