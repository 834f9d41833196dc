"""What is printed: the plan of a run, its progress, and what it gave.

Facts are values by name, printed one a line. Only `write` and `Steps` print; all else returns a line,
facts or a table.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import mean, stdev
from typing import Any, Self

from rich.console import Console, ConsoleOptions, RenderableType
from rich.progress import (
    BarColumn,
    Progress,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
)
from rich.segment import Segment
from rich.table import Table

from fedkd.data import DATASETS, Dataset
from fedkd.errors import printable
from fedkd.experiment import Experiment, kebab
from fedkd.knowledge import ClassMeans, SoftLabels, Weights
from fedkd.losses import effective_weights
from fedkd.models import num_parameters
from fedkd.phases import Fit
from fedkd.profiling import PART
from fedkd.records.files import Row
from fedkd.records.results import CentralRun, Run
from fedkd.strategy import DistillationStrategy
from fedkd.testing.findings import Report
from fedkd.tuning import choices
from fedkd.world import World, world_of

SHOWN_ROUNDS = 5
"""Rounds in the table at the end; all are in the run folder."""

STRATEGIES_LEGEND = {
    "sends": "what crosses the wire; weights are shared by those that send them, and by no other",
    "up, down": "payload bytes of a client in a round, at most where ≤ stands",
    "P": "public images asked for",
    "I": "bytes of the list of these: 0 for the whole public set, else 4 P or a bit a public image",
    "C, K, D": "classes, clients, width of the student's features",
    "S": "bytes of the student's parameters and buffers",
}


# --- Printing -------------------------------------------------------------------------------------


def write(what: RenderableType | Mapping[str, object]) -> None:
    """Print to stdout: coloured on a terminal, plain and 120 wide elsewhere."""
    width = None if sys.stdout.isatty() else 120
    console = _Console(width=width, markup=False, highlight=False, emoji=False)
    shown = _aligned(what) if isinstance(what, Mapping) else what
    console.print(shown, soft_wrap=isinstance(shown, str))


class _Console(Console):
    """Shows texts of others as they are: what a terminal would obey in them is replaced."""

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        """Render as the console does; its own colours and movements stay."""
        for part in super().render(renderable, options):
            yield part if part.control else Segment(printable(part.text), part.style)


class Steps:
    """How far the work is, on stderr: a bar on a terminal, elsewhere a line for each new text.

    The plan goes to stdout before the first step. By then everything has been checked: an error comes
    alone.
    """

    def __init__(self, *, shown: bool, plan: Callable[[], Mapping[str, object]] | None) -> None:
        console = _Console(stderr=True, highlight=False)
        self._bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            console=console,
            transient=True,
            redirect_stdout=False,  # results must not land on stderr
            disable=not (shown and console.is_terminal),
        )
        self._in_lines = shown and not console.is_terminal
        self._plan = plan
        self._task: TaskID | None = None
        self._text = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def show(self, text: str, share: float) -> None:
        """Say what is going on, and how much of it is done, 0..1."""
        if self._task is None:
            if self._plan is not None:
                write(self._plan())
                write("")
            self._task = self._bar.add_task("", total=1.0)
            self._bar.start()
        self._bar.update(self._task, description=text, completed=share)
        if self._in_lines and share > 0 and text != self._text:
            print(printable(text), file=sys.stderr, flush=True)
        self._text = text


# --- What is about to happen ----------------------------------------------------------------------


def run_plan(experiment: Experiment, strategy: DistillationStrategy) -> dict[str, str]:
    """Say what a federation is about to do."""
    settings = ", ".join(f"{kebab(key)}={value}" for key, value in strategy.settings().items())
    return {
        **compare_plan(experiment),
        **_whose_accuracy(experiment, strategy),
        "strategy": f"{strategy.name()}{f' ({settings})' if settings else ''}, "
        f"{experiment.num_server_rounds} rounds",
        "loss": _losses(experiment, strategy, world_of(experiment)),
        "plan": "; ".join(map(str, choices(experiment))),
    }


def _whose_accuracy(experiment: Experiment, strategy: DistillationStrategy) -> dict[str, str]:
    """Say what a local teacher does, as accuracies after revisit are then its own."""
    if experiment.teacher == "none":
        return {}
    fits = [phase for phase in strategy.phases(2) if isinstance(phase, Fit)]
    if not any(phase.model == "teacher" for phase in fits):
        return {"teacher": f"not used by {strategy.name()}"}
    return {"teacher": "revisits the private data: accuracies after revisit are its own"}


def compare_plan(experiment: Experiment) -> dict[str, str]:
    """Say what is the same for all methods of a comparison."""
    world = world_of(experiment)
    sizes = [len(shard) for shard in world.shards]
    drawn = experiment.clients_per_round
    each = "" if drawn == len(sizes) else f", {drawn} drawn each round"
    return {
        "data": _images(experiment, len(world.train), len(world.test)),
        "public": _public(experiment, world),
        "clients": f"{len(sizes)} ({experiment.partition}), {min(sizes):,} to {max(sizes):,} private "
        f"images each{each}",
        "models": "; ".join(
            f"{kebab(key)} {_models(getattr(experiment, key), world)}"
            for key in ("student", "teacher", "server_model")
        ),
        "training": _training(experiment),
        "engine": f"{experiment.engine} on {world.train.device}",
        "loss": _weights(experiment, world),
    }


def central_plan(experiment: Experiment, seeds: Sequence[int]) -> dict[str, str]:
    """Say what the central baseline is about to do."""
    world = world_of(experiment)
    return {
        "data": _images(experiment, len(world.pooled), len(world.test)),
        "models": f"teacher {_models(experiment.teacher_of(0), world)}; "
        f"student {_models(experiment.student_of(0), world)}",
        "training": f"{_training(experiment)}; epochs: teacher {experiment.local_epochs}, "
        f"students {experiment.distill_epochs}",
        "loss": f"student distilled {_weights(experiment, world)}; teacher and student alone CE",
        "seeds": ", ".join(str(seed) for seed in seeds),
        "device": str(world.train.device),
    }


def sweep_plan(
    experiment: Experiment, what: str, seeds: Sequence[int], folds: int, of: str
) -> dict[str, str]:
    """Say what a sweep is about to do."""
    held_out = experiment.replace(fold=f"1/{folds}")
    shared = central_plan(held_out, seeds) if of == "central" else compare_plan(held_out)
    strategy = {} if of == "central" else {"strategy": experiment.strategy}
    return {
        **{name: text for name, text in shared.items() if name != "seeds"},
        **strategy,
        "sweep": what,
    }


def _weights(experiment: Experiment, world: World) -> str:
    return effective_weights(
        experiment.alpha, experiment.tau, experiment.kl_reduction, world.num_classes
    )


def _images(experiment: Experiment, train: int, test: int) -> str:
    held = "test images" if experiment.fold == "none" else f"of them held out ({experiment.fold})"
    return f"{experiment.dataset}, {train:,} training and {test:,} {held}"


def _public(experiment: Experiment, world: World) -> str:
    where = "of the training images" if experiment.public == "train" else f"of {experiment.public}"
    labels = "without labels" if world.public.labels is None else "with labels"
    per_round = experiment.public_per_round
    return f"{len(world.public):,} {where}, {labels}" + (
        f", {per_round:,} drawn each round" if per_round else ""
    )


def _models(names: str, world: World) -> str:
    return ", ".join(
        name if name == "none" else f"{name} ({num_parameters(world.model(name)):,} parameters)"
        for name in dict.fromkeys(part.strip() for part in names.split(","))
    )


def _losses(experiment: Experiment, strategy: DistillationStrategy, world: World) -> str:
    """Spell out the loss of each training phase of a usual round."""
    values = {"alpha": experiment.alpha, "1-alpha": 1 - experiment.alpha}
    losses = []
    for phase in strategy.phases(2):
        if not isinstance(phase, Fit):
            continue
        terms = {**phase.private, **phase.public}
        text = " + ".join(
            _weighted(name, values[w] if isinstance(w, str) else w, phase, experiment)
            for name, w in terms.items()
        ).removeprefix("1 × ")
        if terms == {"kl": "alpha", "ce": "1-alpha"}:
            text = _weights(experiment, world)
        if "ce" in phase.public and world.public.labels is None:
            text += " of private images"
        losses.append(f"{phase.name} {text}")
    return "; ".join(losses)


def _weighted(name: str, weight: float, phase: Fit, experiment: Experiment) -> str:
    """Write a term with its weight; that of the soft term includes τ²."""
    if name != "kl":
        return f"{weight:g} × {name.upper() if name == 'ce' else name.rpartition(':')[2]}"
    tau = phase.numbers.get("tau", experiment.tau)
    return f"{weight:g}·{tau:g}² = {weight * tau**2:g} × KL"


def _training(experiment: Experiment) -> str:
    return f"{experiment.optimizer} at {experiment.learning_rate:g}, batches of {experiment.batch_size}"


# --- A federation ---------------------------------------------------------------------------------


def round_line(row: Row, rounds: int) -> str:
    """Say in a line what a round gave."""
    parts = [f"{_percent(row[name])} {label}" for name, label in _accuracies([row]).items()]
    if row["dropped"]:
        reasons = "; ".join(sorted(set(row["dropped"].values())))
        parts.append(f"{len(row['dropped'])} dropped ({reasons})")
    return f"round {row['round']} of {rounds}: {', '.join(parts) or 'not evaluated'}"


def rounds_table(done: Run) -> Table:
    """Return the last rounds as a table."""
    rows = done.rounds[-SHOWN_ROUNDS:]
    accuracies = _accuracies(rows)
    table = _table("round", "answered", *accuracies.values(), "bytes up", "bytes down", "seconds")
    for row in rows:
        table.add_row(
            str(row["round"]),
            f"{len(row['answered'])} of {len(row['sampled'])}",
            *(_percent(row.get(name)) for name in accuracies),
            f"{row['bytes_up']:,}",
            f"{row['bytes_down']:,}",
            f"{row['seconds']['round']:.1f}",
        )
    return table


def _accuracies(rows: Sequence[Row]) -> dict[str, str]:
    """Return the accuracies that the rows hold, with labels, in the order of a usual round."""
    found: dict[str, str] = {}
    for row in reversed(rows):  # the first round may have phases of its own
        for name, value in row.items():
            if name.startswith("accuracy_after_") and value is not None:
                found[name] = name.removeprefix("accuracy_").replace("_", " ")
    if any(row["server_accuracy"] is not None for row in rows):
        found["server_accuracy"] = "server"
    return found


def run_facts(done: Run) -> dict[str, str]:
    """Say what a federation gave."""
    tested = [accuracy for accuracy in done.client_accuracy if accuracy is not None]
    server = done.server_accuracy
    return {
        "accuracy": f"{_percent(done.accuracy)} on average over {len(tested)} clients "
        f"({_percent(min(tested))} to {_percent(max(tested))})",
        "server": "keeps no model" if server is None else _percent(server),
        "bytes": f"{done.bytes_up:,} up, {done.bytes_down:,} down",
        "seconds": f"{done.result['seconds']:.1f}",
        "folder": str(done.path),
    }


def run_profile(done: Run) -> Table:
    """Return where the time of all rounds went, part by part."""
    spent: dict[str, float] = {}
    for row in done.rounds:
        for name, seconds in row["seconds"].items():
            part = name.removeprefix(f"{PART} ")
            if part != name or name in ("encode", "aggregate"):
                spent[part] = spent.get(part, 0.0) + seconds
    total = sum(spent.values())
    table = _table("part", "seconds", "share")
    for part, seconds in sorted(spent.items(), key=lambda item: -item[1]):
        table.add_row(part, f"{seconds:.2f}", f"{100 * seconds / total:.0f} %")
    return table


def run_line(done: Run) -> str:
    """Say the same in a line."""
    facts = run_facts(done)
    return f"{facts['accuracy']}; bytes {facts['bytes']}; {facts['seconds']} s; {done.path}"


# --- The central baseline -------------------------------------------------------------------------


def central_table(done: CentralRun) -> Table:
    """Return the three models as a table."""
    table = _table("", "test accuracy", "test errors", "parameters")
    for label, model, accuracies in _central_rows(done):
        errors = _mean_std([(1 - accuracy) * done.test_size for accuracy in accuracies])
        table.add_row(label, spread(accuracies), errors, f"{done.parameters[model]:,}")
    return table


def central_facts(done: CentralRun) -> dict[str, str]:
    """Say what else a central baseline gave."""
    several = " (mean ± standard deviation)" if len(done.seeds) > 1 else ""
    return {
        "gap closed": _gap(done),
        "agreement": f"{spread(done.agreements)} of test images alike by teacher and student distilled",
        "test set": f"{done.test_size:,} images",
        "seeds": f"{', '.join(str(seed) for seed in done.seeds)}{several}",
        "seconds": ", ".join(f"{what} {spent:.1f}" for what, spent in done.seconds.items()),
        "folder": str(done.path),
    }


def central_line(done: CentralRun) -> str:
    """Say the same in a line."""
    parts = [f"{label} {spread(values)}" for label, _, values in _central_rows(done)]
    return f"{', '.join(parts)}; gap closed {_gap(done)}; {done.path}"


def _central_rows(done: CentralRun) -> list[tuple[str, str, list[float]]]:
    return [
        ("teacher", "teacher", done.teacher_accuracies),
        ("student alone", "student", done.student_alone_accuracies),
        ("student distilled", "student", done.student_accuracies),
    ]


def _gap(done: CentralRun) -> str:
    if done.gap_closed is None:
        return "n/a (the teacher is not better than the student alone)"
    return _percent(done.gap_closed)


# --- Strategies and data sets ---------------------------------------------------------------------


_SENDS: dict[type | None, str] = {
    SoftLabels: "soft labels",
    ClassMeans: "class means",
    Weights: "weights",
    None: "nothing",
}


def strategy_row(cls: type[DistillationStrategy]) -> dict[str, Any]:
    """Return what a strategy declares."""
    strategy = cls()
    return {
        "name": cls.name(),
        **asdict(cls.facts),
        "sends": _SENDS[strategy.uploads()],
        "settings": strategy.settings(),
        "summary": (cls.__doc__ or "").strip().partition("\n")[0],
    }


def strategies_table(rows: Iterable[Mapping[str, Any]]) -> Table:
    """Return rows of `strategy_row` as a table; `STRATEGIES_LEGEND` explains it."""
    table = _table(
        "strategy", "paper", "sends", "up", "down", "public labels", "server model",
        "mixed models", "reports", right=False,
    )  # fmt: skip
    for column in table.columns:
        column.overflow = "fold"
    for row in sorted(rows, key=lambda row: list(_SENDS.values()).index(row["sends"])):
        table.add_row(
            row["name"],
            row["paper"],
            row["sends"],
            row["up"].replace("<=", "≤"),
            row["down"].replace("<=", "≤"),
            "needed" if row["public_labels"] else "not needed",
            row["server_model"],
            "yes" if row["mixed_models"] else "no",
            row["reports"],
        )
    return table


def strategies_settings(rows: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """Return the settings of strategies with their defaults, as ``strategy-config`` takes them."""
    return {
        row["name"]: " ".join(f"{kebab(key)}={value}" for key, value in row["settings"].items())
        for row in rows
        if row["settings"]
    }


def check_plan(strategy: DistillationStrategy) -> dict[str, str]:
    """Say what is about to be checked."""
    settings = ", ".join(f"{kebab(key)}={value}" for key, value in strategy.settings().items())
    return {"strategy": strategy.name(), "settings": settings or "none"}


def findings_table(report: Report) -> Table:
    """Return what was found as a table: what each check shows, or what to change."""
    table = _table("check", "result", "what it shows, or what to change", right=False)
    for finding in report.findings:
        table.add_row(finding.check, finding.result, finding.detail or finding.shows)
    return table


def check_line(report: Report) -> str:
    """Count the results."""
    counts = Counter(finding.result for finding in report.findings)
    return ", ".join(f"{count} {result}" for result, count in counts.items())


def dataset_row(name: str, folder: Path) -> dict[str, Any]:
    """Say what is known of a data set without loading it, and whether it is in the folder."""
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
    table = _table("data set", "training", "test", "classes", "image", "where", "what")
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
    """Say what a loaded data set holds."""
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
    """Write fractions in percent: the mean and, from two on, the standard deviation."""
    return f"{_mean_std([100 * fraction for fraction in fractions])} %"


def _mean_std(values: Sequence[float]) -> str:
    around = f" ± {stdev(values):.1f}" if len(values) > 1 else ""
    return f"{mean(values):.1f}{around}"


def _percent(fraction: float | None) -> str:
    return "n/a" if fraction is None else f"{100 * fraction:.1f} %"


def _table(first: str, *others: str, right: bool = True) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column(first)
    for name in others:
        table.add_column(name, justify="right" if right else "left")
    return table


def _aligned(facts: Mapping[str, object]) -> str:
    width = max(len(name) for name in facts)
    return "\n".join(f"{name:<{width}}  {_words(value)}" for name, value in facts.items())


def _words(value: object) -> str:
    if isinstance(value, list):
        return ", ".join(str(part) for part in value)
    return f"{value:,}" if isinstance(value, int) else str(value)
