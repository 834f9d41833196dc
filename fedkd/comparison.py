"""Central and federated methods side by side, on the same shards, public set and initial weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import mean, stdev
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from fedkd.baseline import central, check_central
from fedkd.errors import FedkdError, nearest
from fedkd.experiment import Experiment
from fedkd.knowledge import SoftLabels
from fedkd.plans import without
from fedkd.preflight import check
from fedkd.records import CentralRun, Run, RunFolder, gap_closed
from fedkd.registry import find, strategies
from fedkd.runner import run
from fedkd.tuning import planned

CENTRAL = ("teacher", "student-alone", "student-distilled")
"""Methods of the central baseline; all others are strategies."""

LOCAL = "LocalOnly"
_LABELS = {
    "student-alone": "student alone",
    "student-distilled": "student distilled",
    LOCAL: "local only",
}


@dataclass(frozen=True)
class Entry:
    """One method of a comparison.

    Attributes:
        method: its name, as in `CENTRAL` or of a strategy.
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
    def label(self) -> str:
        """What it is called in tables."""
        return _LABELS.get(self.method, self.method.split(":")[-1])

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
        return [
            {**vars(e), "label": e.label, "accuracy": e.accuracy, "spread": e.spread}
            for e in self.entries
        ]

    def __getitem__(self, method: str) -> Entry:
        name = _canonical(method)
        return next(entry for entry in self.entries if entry.method == name)

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
        if all(
            abs(mean(e.server_accuracies or e.accuracies) - e.accuracy) < 1e-9 for e in self.entries
        ):
            rows = [{**row, "server": None} for row in rows]
        columns = [name for name in rows[0] if any(row[name] for row in rows)]
        for name in columns:
            table.add_column(name, justify="left" if name == "method" else "right", no_wrap=True)
        for row in rows:
            table.add_row(*(row[name] or "–" for name in columns))
        return table


def compare(
    experiment: Experiment,
    methods: Sequence[str] | None = None,
    seeds: Sequence[int] | None = None,
    *,
    progress: Callable[[str, float], None] = lambda _, __: None,
) -> Comparison:
    """Run methods on the same shards, public set, client samples and initial weights.

    Args:
        experiment: what all methods share. Its strategy is not used, its ``strategy-config`` only by
            the method that it names.
        methods: names of strategies, and ``teacher``, ``student-alone``, ``student-distilled``; see
            `default_methods`.
        seeds: of all methods; default the experiment's.
        progress: told what is going on and how far it is, 0..1.

    Raises:
        FedkdError: a method or key is not right; nothing has been run then.
    """
    seeds = [experiment.seed] if seeds is None else list(seeds)
    names = [_canonical(m) for m in (default_methods(experiment) if methods is None else methods)]
    _check_all(experiment, names, seeds)
    is_central = any(name in CENTRAL for name in names)
    baseline = central(_pooled(experiment), seeds, progress=progress) if is_central else None
    experiment = planned(experiment)  # one plan for all federations: its bits are not the method's
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


def default_methods(experiment: Experiment) -> list[str]:
    """Return what is compared unless asked otherwise: the central baseline only where there is one."""
    federated = [LOCAL, "FedAvg", "FedMD", "DSFL"]
    single = experiment.teacher != "none" and "," not in experiment.teacher + experiment.student
    return [*CENTRAL, *federated] if single else federated


def _check_all(experiment: Experiment, names: Sequence[str], seeds: Sequence[int]) -> None:
    """Check every run of a comparison before the first."""
    labels = [name.split(":")[-1].lower() for name in names]  # what run folders are called by
    for what, values in (("methods", labels), ("seeds", [str(seed) for seed in seeds])):
        if not values or len(set(values)) < len(values):
            raise FedkdError(f"{what} = '{','.join(values)}': at least one, and none of them twice")
    if experiment.strategy_config != "none" and _canonical(experiment.strategy) not in names:
        raise FedkdError(
            f"strategy-config = '{experiment.strategy_config}' belongs to strategy = "
            f"'{experiment.strategy}', which is not compared; set strategy to the method it is for"
        )
    if any(name in CENTRAL for name in names):
        check_central(_pooled(experiment))
        RunFolder.check(_pooled(experiment))
    for name in names:
        for seed in seeds:
            if name not in CENTRAL:
                check(_variant(experiment, name, seed))


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
    label = method.split(":")[-1].lower()
    strategy = find(method)
    has_labels = strategy.uploads() is SoftLabels
    observes = strategy.facts.server_model != "none"
    serves_alone = (
        experiment.server_model not in f"{experiment.student},{experiment.teacher}".split(",")
    )
    drops = serves_alone and not observes
    return experiment.replace(
        strategy=method,
        plan=without(experiment.plan, experiment.server_model) if drops else experiment.plan,
        # Settings and the server's model belong to the methods that know them.
        strategy_config=experiment.strategy_config
        if _canonical(experiment.strategy) == method
        else "none",
        server_model=experiment.server_model if observes else "none",
        codec=experiment.codec if has_labels else "auto",
        seed=seed,
        name=f"{experiment.name}-{label}-seed{seed}" if experiment.name else None,
    )


def _run(
    experiment: Experiment, method: str, seed: int, progress: Callable[[str, float], None]
) -> Run:
    what = f"{_LABELS.get(method, method)}, seed {seed}"
    rounds = experiment.num_server_rounds
    return run(
        _variant(experiment, method, seed), lambda row: progress(what, row["round"] / rounds)
    )


def _pooled(experiment: Experiment) -> Experiment:
    """Return the central baseline's experiment: as many epochs as the clients train in all."""
    rounds = experiment.num_server_rounds
    return experiment.replace(
        local_epochs=rounds * experiment.local_epochs,
        distill_epochs=rounds * experiment.distill_epochs,
        name=f"{experiment.name}-central" if experiment.name else None,
    )


def _central_entry(name: str, baseline: CentralRun) -> Entry:
    accuracies = {
        "teacher": baseline.teacher_accuracies,
        "student-alone": baseline.student_alone_accuracies,
        "student-distilled": baseline.student_accuracies,
    }[name]
    seconds = sum(baseline.seconds.values()) / len(accuracies)
    return Entry(name, accuracies, None, None, None, None, None, seconds)


def _entry(name: str, runs: Sequence[Run]) -> Entry:
    servers = [r.server_accuracy for r in runs if r.server_accuracy is not None]
    clients = [[a for a in r.client_accuracy if a is not None] for r in runs]
    return Entry(
        name,
        [r.accuracy for r in runs],
        mean(min(each) for each in clients),
        mean(max(each) for each in clients),
        servers or None,
        mean(r.bytes_up for r in runs),
        mean(r.bytes_down for r in runs),
        mean(r.result["seconds"] for r in runs),
    )


def _with_gaps(entries: Sequence[Entry]) -> list[Entry]:
    by_name = {entry.method: entry.accuracy for entry in entries}
    low, high = by_name.get(LOCAL), by_name.get("student-distilled")
    if low is None or high is None:
        return list(entries)
    return [
        entry
        if entry.method in (*CENTRAL, LOCAL)
        else replace(entry, gap_closed=gap_closed(entry.accuracy, low, high))
        for entry in entries
    ]


def _cells(entry: Entry) -> dict[str, str | None]:
    spread = "" if entry.spread is None else f" ± {100 * entry.spread:.1f}"
    servers = entry.server_accuracies
    return {
        "method": entry.label,
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
