"""Lines, facts and tables of runs, strategies and data sets."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from rich.table import Table

from fedkd.cli.console import table_of
from fedkd.data import DATASETS, Dataset
from fedkd.keys import AUTO, kebab
from fedkd.knowledge.kinds import KINDS, in_words
from fedkd.records.files import Row
from fedkd.records.overview import Differences, Overview
from fedkd.records.results import CentralRun, Run
from fedkd.strategy import DistillationStrategy
from fedkd.testing.outcomes import CheckResults
from fedkd.training.profiling import TIMED
from fedkd.wording import percent, plus_minus, size

SHOWN_ROUNDS = 5
"""Rounds in the table at the end; all are in the run folder."""

STRATEGIES_LEGEND = {
    "sends": "what crosses the network; only strategies that send weights share them",
    "up, down": "payload bytes per client and round; ≤ marks upper bounds",
    "P": "public images asked for",
    "I": "bytes of the list of these: 0 for the whole public set, else 4 P or one bit per public image",
    "C, K, D": "classes, clients, width of the student's features",
    "S": "bytes of the student's parameters and buffers",
}


# --- A federation ---------------------------------------------------------------------------------


def round_line(row: Row, rounds: int) -> str:
    """Return a round's results in one line."""
    parts = [f"{percent(row[name])} {label}" for name, label in _accuracies([row]).items()]
    if row["dropped"]:
        reasons = "; ".join(sorted(set(row["dropped"].values())))
        parts.append(f"{len(row['dropped'])} dropped ({reasons})")
    if again := row.get("enrolled_again"):
        parts.append(f"enrolled again: {', '.join(map(str, again))}")
    return f"round {row['round']} of {rounds}: {', '.join(parts) or 'not evaluated'}"


def rounds_table(done: Run) -> Table:
    """Return the last rounds as a table."""
    rows = done.rounds[-SHOWN_ROUNDS:]
    accuracies = _accuracies(rows)
    table = table_of("round", "answered", *accuracies.values(), "bytes up", "bytes down", "seconds")
    for row in rows:
        table.add_row(
            str(row["round"]),
            f"{len(row['answered'])} of {len(row['sampled'])}",
            *(percent(row.get(name)) for name in accuracies),
            f"{row['bytes_up']:,}",
            f"{row['bytes_down']:,}",
            f"{row['seconds']['round']:.1f}",
        )
    return table


def _accuracies(rows: Sequence[Row]) -> dict[str, str]:
    """Return the accuracies that the rows hold, with labels, in the order of a usual round."""
    labels: dict[str, str] = {}
    for row in reversed(rows):  # the first round may have other phases
        for name, value in row.items():
            if name.startswith("accuracy_after_") and value is not None:
                labels[name] = name.removeprefix("accuracy_").replace("_", " ")
    if any(row["server_accuracy"] is not None for row in rows):
        labels["server_accuracy"] = "server"
    return labels


def run_facts(done: Run) -> dict[str, str]:
    """Return the results of a federation."""
    tested = [accuracy for accuracy in done.client_accuracy if accuracy is not None]
    server = done.server_accuracy
    return {
        "accuracy": f"{percent(done.accuracy)} on average over {len(tested)} clients "
        f"({percent(min(tested))} to {percent(max(tested))})"
        if tested
        else "withheld by all clients",
        "server": "keeps no model" if server is None else percent(server),
        "bytes": f"{done.bytes_up:,} up, {done.bytes_down:,} down",
        "seconds": f"{done.result['seconds']:.1f}",
        "folder": str(done.path),
    }


def run_profile(done: Run) -> Table:
    """Return the time of all rounds by part as a table."""
    spent: dict[str, float] = {}
    for row in done.rounds:
        for name, seconds in row["seconds"].items():
            part = name.removeprefix(f"{TIMED} ")
            if part != name or name in ("encode", "aggregate"):
                spent[part] = spent.get(part, 0.0) + seconds
    total = sum(spent.values())
    table = table_of("part", "seconds", "share")
    for part, seconds in sorted(spent.items(), key=lambda item: -item[1]):
        table.add_row(part, f"{seconds:.2f}", f"{100 * seconds / total:.0f} %")
    return table


def run_line(done: Run) -> str:
    """Return the same results in one line."""
    facts = run_facts(done)
    return f"{facts['accuracy']}; bytes {facts['bytes']}; {facts['seconds']} s; {done.path}"


# --- The central baseline -------------------------------------------------------------------------


def central_table(done: CentralRun) -> Table:
    """Return the three models as a table."""
    table = table_of("", "test accuracy", "test errors", "parameters")
    for label, model, accuracies in _central_rows(done):
        errors = _mean_std([(1 - accuracy) * done.test_size for accuracy in accuracies])
        table.add_row(label, spread(accuracies), errors, f"{done.parameters[model]:,}")
    return table


def central_facts(done: CentralRun) -> dict[str, str]:
    """Return the other results of a central baseline."""
    several = " (mean ± standard deviation)" if len(done.seeds) > 1 else ""
    return {
        "gap closed": _gap(done),
        "agreement": f"{spread(done.agreements)} of test images: teacher and student distilled agree",
        "test set": f"{done.test_size:,} images",
        "seeds": f"{', '.join(str(seed) for seed in done.seeds)}{several}",
        "seconds": ", ".join(f"{what} {spent:.1f}" for what, spent in done.seconds.items()),
        "folder": str(done.path),
    }


def central_line(done: CentralRun) -> str:
    """Return the same results in one line."""
    parts = [f"{label} {spread(values)}" for label, _, values in _central_rows(done)]
    return f"{', '.join(parts)}; gap closed {_gap(done)}; {done.path}"


def _central_rows(done: CentralRun) -> list[tuple[str, str, list[float]]]:
    return [
        ("teacher", "teacher", done.teacher_accuracies),
        ("student alone", "student", done.student_alone_accuracies),
        ("student distilled", "student", done.student_accuracies),
    ]


def _gap(done: CentralRun) -> str:
    if done.without_learning:
        models = " and ".join(model.replace("-", " ") for model in done.without_learning)
        return f"n/a (learnt nothing, or diverged: {models})"
    if done.gap_closed is None:
        return "n/a (the teacher is not better than the student alone)"
    return percent(done.gap_closed)


# --- Strategies and data sets ---------------------------------------------------------------------

_SENDS = [in_words(kind) for kind in (*KINDS, None)]


def strategy_row(cls: type[DistillationStrategy]) -> dict[str, Any]:
    """Return the properties that a strategy declares."""
    strategy = cls()
    return {
        "name": cls.name(),
        **asdict(cls.facts),
        "sends": in_words(strategy.uploads()),
        "settings": strategy.settings(),
        "summary": (cls.__doc__ or "").strip().partition("\n")[0],
    }


def strategies_table(rows: Iterable[Mapping[str, Any]]) -> Table:
    """Return rows of `strategy_row` as a table; `STRATEGIES_LEGEND` explains it."""
    table = table_of(
        "strategy", "paper", "sends", "up", "down", "public labels", "server model",
        "mixed models", "headline", right=False,
    )  # fmt: skip
    for column in table.columns:
        column.overflow = "fold"
    for row in sorted(rows, key=lambda row: _SENDS.index(row["sends"])):
        table.add_row(
            row["name"],
            row["paper"],
            row["sends"],
            row["up"].replace("<=", "≤"),
            row["down"].replace("<=", "≤"),
            "needed" if row["public_labels"] else "not needed",
            row["server_model"],
            "yes" if row["mixed_models"] else "no",
            row["headline"],
        )
    return table


def strategies_settings(rows: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """Return the settings of strategies with their defaults, as ``strategy-config`` takes them."""
    return {
        row["name"]: " ".join(f"{kebab(key)}={value}" for key, value in row["settings"].items())
        for row in rows
        if row["settings"]
    }


def checks_table(checked: CheckResults) -> Table:
    """Return check results as a table: what each check shows, or what to change."""
    table = table_of("check", "result", "what it shows, or what to change", right=False)
    for outcome in checked.results:
        table.add_row(outcome.check, outcome.result, outcome.detail or outcome.shows)
    return table


def check_line(checked: CheckResults) -> str:
    """Return the number of check results of each kind in one line."""
    counts = Counter(outcome.result for outcome in checked.results)
    return ", ".join(f"{count} {result}" for result, count in counts.items())


def dataset_row(name: str, folder: Path) -> dict[str, Any]:
    """Return what is known of a data set without loading it, and whether it is in the folder."""
    info = DATASETS[name]
    file = folder / f"{name}.safetensors"
    return {
        "name": name,
        "train": info.num_train,
        "test": info.num_test,
        "input_shape": list(info.input_shape),
        "classes": info.num_classes,
        "needs_download": info.needs_download,
        "cached": str(file) if file.is_file() else None,
        "description": info.description,
    }


def datasets_table(rows: Iterable[Mapping[str, Any]]) -> Table:
    """Return rows of `dataset_row` as a table."""
    table = table_of("data set", "training", "test", "classes", "image", "where", "what")
    table.columns[-1].justify = table.columns[-2].justify = "left"
    for row in rows:
        where = "in the folder" if row["cached"] else "to be downloaded"
        table.add_row(
            row["name"],
            f"{row['train']:,}",
            f"{row['test']:,}",
            str(row["classes"]),
            "×".join(str(side) for side in row["input_shape"]),
            where if row["needs_download"] else "installed",
            row["description"],
        )
    return table


def dataset_facts(dataset: Dataset) -> dict[str, Any]:
    """Return what a loaded data set holds."""
    return {
        "name": dataset.name,
        "train": len(dataset.train_images),
        "test": len(dataset.test_images),
        "input_shape": list(dataset.input_shape),
        "class_names": list(dataset.class_names),
        "mean": list(dataset.mean),
        "std": list(dataset.std),
    }


# --- Text -----------------------------------------------------------------------------------------


def spread(fractions: Sequence[float]) -> str:
    """Return fractions in percent as text: the mean and, from two on, the standard deviation."""
    return f"{_mean_std([100 * fraction for fraction in fractions])} %"


def _mean_std(values: Sequence[float]) -> str:
    return plus_minus(mean(values), stdev(values) if len(values) > 1 else None)


# --- Runs in a folder -----------------------------------------------------------------------------


def overviews_table(runs: Sequence[Overview]) -> Table:
    """Return a line for each run."""
    table = table_of("run", "what", "data", "clients", "seed", "rounds", "result", right=False)
    for run in runs:
        experiment = run.experiment
        is_federated = run.kind == "federated"
        table.add_row(
            run.path.name,
            experiment.strategy if is_federated else run.kind,
            experiment.dataset,
            f"{experiment.num_clients:,}" if is_federated else "",
            str(experiment.seed),
            f"{experiment.num_server_rounds:,}" if is_federated else "",
            overview_result(run),
        )
    return table


def overview_result(run: Overview) -> str:
    """Return a run's result in words."""
    if run.kind == "sweep":
        return "see fedkd report"
    if not run.is_finished:
        return "unfinished"
    if run.kind == "central":
        return f"student {percent(run.figures['student_distilled_accuracy'])}"
    sent = run.figures["bytes_up"] + run.figures["bytes_down"]
    return f"{percent(run.figures.get('accuracy'))}, {size(sent)}"


def differences_parts(found: Differences, first: str, second: str) -> list[Table | str]:
    """Return how two runs differ, for the terminal."""
    parts: list[Table | str] = []
    if found.keys:
        keys = table_of("key", first, second, right=False)
        for name, values in found.keys.items():
            keys.add_row(name, *map(_value, values))
        parts.append(keys)
    if found.besides:
        parts.append("\n".join(["also differ:", *(f"  {each}" for each in found.besides)]))
    if not parts:
        parts.append("no key, code, data or version differs")
    figures = table_of("figure", first, second, "difference")
    for name, (ours, theirs) in found.figures.items():
        figures.add_row(name.replace("_", " "), *_compared(name, ours, theirs))
    return [*parts, figures]


def _compared(name: str, ours: float | None, theirs: float | None) -> Iterable[str]:
    """Yield two values of a figure, and the second minus the first."""
    scale, text = (100, "{:.2f} %") if "accuracy" in name else (1, "{:,.6g}")
    for value in (ours, theirs):
        yield "n/a" if value is None else text.format(scale * value)
    if ours is None or theirs is None:
        yield ""
    else:
        between = scale * (theirs - ours)
        yield (f"{between:+.2f} pp" if scale > 1 else f"{between:+,.6g}").replace("-", "−")


def _value(value: object) -> str:
    return AUTO if value is None else str(value).lower() if isinstance(value, bool) else str(value)
