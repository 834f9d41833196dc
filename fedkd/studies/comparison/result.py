"""A finished comparison: every number is computed from the folders of its runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from rich.console import Group
from rich.table import Table

from fedkd.errors import FedkdError
from fedkd.experiment import Experiment
from fedkd.records.results import CentralRun, Run
from fedkd.studies.comparison import tables
from fedkd.studies.comparison.differences import difference, verdict_on, with_differences
from fedkd.studies.comparison.entries import (
    Difference,
    Entry,
    Target,
    as_row,
    central_entry,
    curve,
    federated_entry,
    target_of,
    with_gaps,
    with_target,
)
from fedkd.studies.comparison.methods import CENTRAL, Method, canonical
from fedkd.studies.comparison.record import ComparisonRecord
from fedkd.studies.comparison.reuse import joined


@dataclass(frozen=True)
class Comparison:
    """Methods × seeds on the same data.

    Attributes:
        path: its folder, which holds ``comparison.json``.
        experiment: what all methods share, as given by the user.
        entries: one per method, in the order given.
        seeds: of every method.
        test_size: test images behind every accuracy.
        runs: the federated runs by method, one per seed.
        central: the central baseline, if any of its methods is compared; its path is `None` where
            its seeds are in several folders.
        central_folders: of the central baseline, by seed.
        reference: the method that the others are compared with.
        asked_target: what the target was fixed as before the runs, or `None` for the default.
        target: accuracy 0..1 for which the entries give rounds and bytes, or `None`.
        target_reason: where it comes from, or `None` if it was given as a number.
        reused: runs that existed already; a central baseline counts once a seed.
        remark: how many runs were made at once and why, or `None` if one at a time was requested.
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
    asked_target: Target | None
    target: float | None
    target_reason: str | None
    reused: int
    remark: str | None

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Return the comparison in a folder, read from the run folders that its record names.

        Raises:
            FedkdError: there is no comparison, or one of its runs is missing.
        """
        return cls.from_record(ComparisonRecord.read(Path(path)))

    @classmethod
    def from_record(cls, record: ComparisonRecord) -> Self:
        """Return the comparison computed from a record and the run folders that it names.

        Raises:
            FedkdError: it is unfinished, or one of its runs is missing.
        """
        return cls(**_assembled(record))

    @property
    def rows(self) -> list[dict[str, Any]]:
        """One plain dict per method."""
        return [as_row(entry) for entry in self.entries]

    def __getitem__(self, method: Method) -> Entry:
        name = canonical(method)
        for entry in self.entries:
            if entry.method == name:
                return entry
        names = ", ".join(entry.method for entry in self.entries)
        raise FedkdError(f"method = '{name}' is not compared here; the methods are {names}")

    @property
    def verdict(self) -> str | None:
        """Which method that sends something is ahead of which others, or that it is undecided."""
        return verdict_on(self.entries)

    @property
    def sentences(self) -> list[str]:
        """The results in words: the verdict, and a sentence for each method."""
        sentences = [self.verdict, *(entry.sentence for entry in self.entries)]
        return [text for text in sentences if text is not None]

    @property
    def notes(self) -> list[str]:
        """Notes on the tables."""
        notes = tables.notes(self.entries, len(self.seeds), self.target, self.target_reason)
        count = len(self.seeds) * (len(self.runs) + (self.central is not None))
        if self.reused:
            notes.append(f"{self.reused} of {count} runs existed already.")
        return [*notes, self.remark + "."] if self.remark is not None else notes

    def difference(self, method: Method, reference: Method) -> Difference:
        """Return one method minus another, with interval and tests; the docs state what they cover."""
        return difference(self[method], self[reference])

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
            "verdict": self.verdict,
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


def _assembled(record: ComparisonRecord) -> dict[str, Any]:
    """Compute a comparison's attributes from its record and run folders."""
    if not record.is_finished:
        raise FedkdError(
            f"{record.path} is unfinished; resume it with: fedkd compare --resume {record.path}"
        )
    runs = {name: [Run.load(path) for path in paths] for name, paths in record.runs.items()}
    baseline = joined(record.central) if record.central else None
    _refuse_other_data([run for each in runs.values() for run in each], baseline)
    points = {n: [curve(run, record.counted[n]) for run in each] for n, each in runs.items()}
    entries = [
        central_entry(name, baseline)
        if baseline and name in CENTRAL
        else federated_entry(name, runs[name], record.counted[name])
        for name in record.methods
    ]
    target, why = target_of(record.target, entries) or (None, None)
    entries = [with_target(e, points.get(e.method), target) for e in with_gaps(entries, baseline)]
    sizes = [run.result["test_size"] for each in runs.values() for run in each[:1]]
    return {
        "path": record.path,
        "experiment": record.experiment,
        "entries": with_differences(entries, record.reference, target),
        "seeds": record.seeds,
        "test_size": baseline.test_size if baseline else int(sizes[0]),
        "runs": runs,
        "central": baseline,
        "central_folders": record.central,
        "reference": record.reference,
        "asked_target": record.target,
        "target": target,
        "target_reason": why,
        "reused": record.reused,
        "remark": record.remark,
    }


def _refuse_other_data(runs: Sequence[Run], baseline: CentralRun | None) -> None:
    """Raise an error unless all runs have the same number of test images, and of clients.

    Raises:
        FedkdError: a folder has been replaced by that of another experiment.
    """
    sizes = {run.path: int(run.result["test_size"]) for run in runs}
    expected = baseline.test_size if baseline else next(iter(sizes.values()))
    for run in runs:
        clients, first = len(run.client_accuracy), len(runs[0].client_accuracy)
        if sizes[run.path] != expected or clients != first:
            raise FedkdError(
                f"{run.path} has {sizes[run.path]} test images and {clients} clients: the comparison "
                f"has {expected} and {first}"
            )
