"""Central and federated methods side by side, on the same shards, public set and initial weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from fedkd.baseline import central
from fedkd.errors import FedkdError, nearest
from fedkd.experiment import Experiment
from fedkd.records import CentralRun, Run, gap_closed
from fedkd.registry import find, strategies
from fedkd.runner import check, run

CENTRAL = {
    "teacher": "teacher",
    "student-alone": "student alone",
    "student-distilled": "student distilled",
}
"""Methods of the central baseline, and their labels."""

LOCAL = "LocalOnly"
METHODS = (*CENTRAL, LOCAL, "FedAvg", "FedMD", "DSFL")
"""What is compared unless asked otherwise."""


@dataclass(frozen=True)
class Entry:
    """One method of a comparison.

    Attributes:
        method: its label.
        accuracies: test accuracy per seed, 0..1: the mean over clients after the closing exchange, or
            of the central model.
        worst: accuracy of the worst client, mean over seeds, or `None` for a central model.
        best: of the best client.
        server_accuracies: of the server's model per seed, where it keeps one.
        bytes_up: payload bytes of all clients over a run, mean over seeds, or `None`.
        bytes_down: likewise.
        seconds: of a run, mean over seeds.
        gap_closed: (method − local only) / (student distilled − local only), or `None`.
    """

    method: str
    accuracies: list[float]
    worst: float | None
    best: float | None
    server_accuracies: list[float] | None
    bytes_up: float | None
    bytes_down: float | None
    seconds: float
    gap_closed: float | None = None

    @property
    def accuracy(self) -> float:
        """Mean over the seeds."""
        return mean(self.accuracies)

    @property
    def spread(self) -> float | None:
        """Standard deviation over the seeds (n − 1), or `None` for one seed."""
        return stdev(self.accuracies) if len(self.accuracies) > 1 else None


@dataclass(frozen=True)
class Comparison:
    """Methods × seeds on the same data.

    Attributes:
        entries: one a method, in the order asked for.
        seeds: of every method.
        test_size: test images behind every accuracy.
        runs: the federated runs by method, one a seed.
        central: the central baseline, if any of its methods was asked for.
    """

    entries: list[Entry]
    seeds: list[int]
    test_size: int
    runs: dict[str, list[Run]]
    central: CentralRun | None

    @property
    def rows(self) -> list[dict[str, Any]]:
        """One plain dict a method."""
        return [{**vars(e), "accuracy": e.accuracy, "spread": e.spread} for e in self.entries]

    def __getitem__(self, method: str) -> Entry:
        for entry in self.entries:
            if entry.method == method:
                return entry
        raise KeyError(method)

    def as_json(self) -> dict[str, Any]:
        """Return everything that ``--json`` prints."""
        paths = {method: [str(run.path) for run in runs] for method, runs in self.runs.items()}
        return {
            "seeds": self.seeds,
            "test_size": self.test_size,
            "methods": self.rows,
            "runs": paths,
        }

    def table(self) -> Table:
        """Return the comparison as a table of at most 80 columns, accuracies in percent.

        ``clients`` spans the worst and the best client, ``gap`` is the gap closed, bytes are those of
        all clients over a run. The server has a column where its model differs from the clients'.
        """
        seeds = f"{len(self.seeds)} seed{'s' * (len(self.seeds) > 1)}"
        table = Table(
            title=f"Test accuracy in %, {seeds}, {self.test_size:,} test images",
            box=SIMPLE_HEAD,
            pad_edge=False,
            padding=(0, 1, 0, 0),
        )
        rows = [_cells(entry) for entry in self.entries]
        if all(e.server_accuracies in (None, e.accuracies) for e in self.entries):
            rows = [{**row, "server": None} for row in rows]
        columns = [name for name in rows[0] if any(row[name] for row in rows)]
        for name in columns:
            table.add_column(name, justify="left" if name == "method" else "right", no_wrap=True)
        for row in rows:
            table.add_row(*(row[name] or "–" for name in columns))
        return table


def compare(
    experiment: Experiment,
    methods: Sequence[str] = METHODS,
    seeds: Sequence[int] | None = None,
    *,
    progress: Callable[[str, float], None] = lambda _, __: None,
) -> Comparison:
    """Run methods on the same shards, public set, client samples and initial weights.

    Args:
        experiment: what all methods share. Its strategy is not used, its ``strategy-config`` only by
            the method that it names.
        methods: names of strategies, and ``teacher``, ``student-alone``, ``student-distilled``.
        seeds: of all methods; default the experiment's.
        progress: told what is going on and how far it is, 0..1.

    Raises:
        FedkdError: a method or key is not right; nothing has been run then.
    """
    seeds = list(seeds) if seeds else [experiment.seed]
    names = [_canonical(method) for method in methods]
    for name in names:
        if name not in CENTRAL:
            check(_variant(experiment, name, seeds[0]))
    baseline = _baseline(experiment, seeds, progress) if CENTRAL.keys() & set(names) else None
    runs = {
        name: [_run(experiment, name, seed, progress) for seed in seeds]
        for name in names
        if name not in CENTRAL
    }
    entries = [
        _central_entry(name, baseline) if baseline and name in CENTRAL else _entry(name, runs[name])
        for name in names
    ]
    return Comparison(_with_gaps(entries), seeds, _test_size(baseline, runs), runs, baseline)


def _test_size(baseline: CentralRun | None, runs: Mapping[str, Sequence[Run]]) -> int:
    return baseline.test_size if baseline else int(next(iter(runs.values()))[0].result["test_size"])


def _canonical(method: str) -> str:
    plain = method.strip().lower().replace(" ", "-").replace("_", "-")
    if plain in CENTRAL:
        return plain
    if plain in ("local", "local-only"):
        return LOCAL
    if ":" in plain:
        find(method.strip())
        return method.strip()
    known = {*CENTRAL, *strategies()}
    try:
        return find(plain).name()
    except FedkdError:
        raise FedkdError(
            f"methods: no method '{method}'{nearest(plain, known)}; there are {', '.join(sorted(known))}"
        ) from None


def _variant(experiment: Experiment, method: str, seed: int) -> Experiment:
    """Return the experiment as one method runs it."""
    named = experiment.strategy.split(":")[-1].lower() == method.split(":")[-1].lower()
    label = method.split(":")[-1].lower()
    return experiment.replace(
        strategy=method,
        strategy_config=experiment.strategy_config if named else "none",
        seed=seed,
        name=f"{experiment.name}-{label}-seed{seed}" if experiment.name else None,
    )


def _run(
    experiment: Experiment, method: str, seed: int, progress: Callable[[str, float], None]
) -> Run:
    what = f"{method}, seed {seed}"
    rounds = experiment.num_server_rounds
    return run(
        _variant(experiment, method, seed), lambda row: progress(what, row["round"] / rounds)
    )


def _baseline(
    experiment: Experiment, seeds: Sequence[int], progress: Callable[[str, float], None]
) -> CentralRun:
    """Run the central baseline for as many epochs as the federation's clients train in all."""
    rounds = experiment.num_server_rounds
    pooled = experiment.replace(
        local_epochs=rounds * experiment.local_epochs,
        distill_epochs=rounds * experiment.distill_epochs,
        name=f"{experiment.name}-central" if experiment.name else None,
    )
    return central(pooled, seeds, progress=progress)


def _central_entry(name: str, baseline: CentralRun) -> Entry:
    accuracies = {
        "teacher": baseline.teacher_accuracies,
        "student-alone": baseline.student_alone_accuracies,
        "student-distilled": baseline.student_accuracies,
    }[name]
    seconds = sum(baseline.seconds.values()) / len(accuracies)
    return Entry(CENTRAL[name], accuracies, None, None, None, None, None, seconds)


def _entry(name: str, runs: Sequence[Run]) -> Entry:
    servers = [r.server_accuracy for r in runs if r.server_accuracy is not None]
    clients = [[a for a in r.client_accuracy if a is not None] for r in runs]
    return Entry(
        "local only" if name == LOCAL else name.split(":")[-1],
        [r.accuracy for r in runs],
        mean(min(each) for each in clients),
        mean(max(each) for each in clients),
        servers or None,
        mean(r.bytes_up for r in runs),
        mean(r.bytes_down for r in runs),
        mean(r.result["seconds"] for r in runs),
    )


def _with_gaps(entries: Sequence[Entry]) -> list[Entry]:
    by_label = {entry.method: entry.accuracy for entry in entries}
    low, high = by_label.get("local only"), by_label.get(CENTRAL["student-distilled"])
    if low is None or high is None:
        return list(entries)
    central_labels = set(CENTRAL.values()) | {"local only"}
    return [
        e
        if e.method in central_labels
        else Entry(**{**vars(e), "gap_closed": gap_closed(e.accuracy, low, high)})
        for e in entries
    ]


def _cells(entry: Entry) -> dict[str, str | None]:
    spread = "" if entry.spread is None else f" ± {100 * entry.spread:.1f}"
    servers = entry.server_accuracies
    return {
        "method": entry.method,
        "accuracy": f"{100 * entry.accuracy:.1f}{spread}",
        "clients": None
        if entry.worst is None or entry.best is None
        else f"{100 * entry.worst:.1f}–{100 * entry.best:.1f}",
        "server": f"{100 * mean(servers):.1f}" if servers else None,
        "gap": None if entry.gap_closed is None else f"{100 * entry.gap_closed:.0f} %",
        "up": _size(entry.bytes_up),
        "down": _size(entry.bytes_down),
        "seconds": f"{entry.seconds:.1f}",
    }


def _size(count: float | None) -> str | None:
    """Write a number of bytes with a unit (powers of 1000)."""
    if count is None:
        return None
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"
