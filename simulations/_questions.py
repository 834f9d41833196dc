"""Shared parts of the question scripts: measure a grid, write table, numbers, figure and index.

A question has a *grid*: lines (methods) over points (what varies), each cell an experiment and the
method that `fedkd.compare` runs on it, with the same seeds everywhere. All cells are reported. The
answer is a sentence computed from the cells.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from statistics import mean, stdev
from time import process_time
from typing import NamedTuple

from rich.console import Console
from rich.progress import Progress

import fedkd

SEEDS = (0, 1, 2)
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
"""Okabe and Ito's palette, without yellow."""
MARKERS = "osD^vPX"

BASE = fedkd.Experiment(
    dataset="mnist-5k",
    public_labels=False,
    num_clients=10,
    partition_alpha=0.3,
    student="mlp-20",
    num_server_rounds=8,
    local_epochs=5,
    distill_epochs=5,
    alpha=0.9,
    tau=3.0,
    evaluate_phases="last",
    evaluate_every=8,
    device="cpu",
)
"""The experiment that all questions start from; each changes some keys."""


class Cell(NamedTuple):
    """One cell of a grid: an experiment, a method of `fedkd.compare`, and which accuracy counts.

    Attributes:
        experiment: all keys but strategy and seed.
        method: of `fedkd.compare`.
        clients: the clients that are averaged.
        own_mix: whether each is tested on its own mix of classes, not on all alike.
    """

    experiment: fedkd.Experiment
    method: str
    clients: slice = slice(None)
    own_mix: bool = False


Grid = Mapping[str, Mapping[str, Cell]]
"""Cells by line and point."""


@dataclass(frozen=True)
class Result:
    """A measured grid.

    Attributes:
        name: of the script and its files.
        question: in one line.
        setting: what was measured, in words.
        x: what varies from point to point.
        points: its values, in order.
        lines: test accuracies by line: ``[points][seeds]``, 0..1; no seeds where a cell is missing.
        bytes_up: payload of all clients over a run by line ``[points]``, mean over seeds; 0 for none.
        seeds: of every cell.
        test_size: test images behind every accuracy.
        at: positions of a line's points on a logarithmic axis ``[points]``, if not evenly spaced.
        place: the label of that axis.
        ordered: whether a line may join the points.
        measured: date, machine, versions and CPU minutes.
    """

    name: str
    question: str
    setting: str
    x: str
    points: list[str]
    lines: dict[str, list[list[float]]]
    bytes_up: dict[str, list[float]]
    seeds: list[int]
    test_size: int
    at: dict[str, list[float]] = field(default_factory=dict)
    place: str = ""
    ordered: bool = True
    measured: str = ""

    def cell(self, line: str, point: str) -> list[float]:
        """Return the accuracies of one cell, one per seed."""
        return self.lines[line][self.points.index(point)]

    def mean(self, line: str, point: str) -> float:
        """Return a cell's mean in percent."""
        return 100 * mean(self.cell(line, point))

    def gain(self, line: str, over: str, point: str, other_point: str | None = None) -> Gain:
        """Return how many points `line` is above `over` (at `other_point`), seed by seed."""
        pairs = zip(self.cell(line, point), self.cell(over, other_point or point), strict=True)
        differences = [100 * (a - b) for a, b in pairs]
        return Gain(mean(differences), stdev(differences) if len(differences) > 1 else None)


class Gain(NamedTuple):
    """A difference of accuracies in points: mean and standard deviation over paired seeds."""

    mean: float
    spread: float | None

    def __str__(self) -> str:
        return f"{self.mean:+.1f}{self._more}"

    @property
    def words(self) -> str:
        """``1.5 ± 0.2 points above``, ``0.3 ± 0.1 points below``, ``level with``."""
        if f"{abs(self.mean):.1f}" == "0.0":
            return "level with"
        return f"{abs(self.mean):.1f}{self._more} points {'above' if self.mean > 0 else 'below'}"

    @property
    def _more(self) -> str:
        return "" if self.spread is None else f" ± {self.spread:.1f}"


@dataclass(frozen=True)
class Question:
    """One script: its question, its grid, and the function that turns cells into an answer."""

    name: str
    question: str
    setting: str
    x: str
    grid: Callable[[], Grid]
    answer: Callable[[Result], str]
    ordered: bool = True
    smoke: Callable[[Grid], Grid] = field(default_factory=lambda: outer)
    finish: Callable[[Result], Result] = field(default_factory=lambda: _same)

    def main(self, about: str | None, arguments: Sequence[str] | None = None) -> None:
        """Measure, print, and write with ``--write``."""
        parser = argparse.ArgumentParser(description=about)
        parser.add_argument("--smoke", action="store_true", help="seconds instead of minutes")
        parser.add_argument("--write", type=Path, metavar="FOLDER", help="where the results go")
        chosen = parser.parse_args(arguments)
        result = self.measure(smoke=chosen.smoke)
        text = f"{table(result)}\n\n{self.answer(result)}"
        Console().print(text, markup=False, highlight=False, soft_wrap=True)
        if chosen.write is not None:
            write(chosen.write, result, self.answer(result))

    def measure(self, *, smoke: bool) -> Result:
        """Return the result of all cells (`smoke`: those that `self.smoke` keeps, shrunk, one seed)."""
        grid, seeds = (
            (self.grid(), SEEDS) if not smoke else (_shrunk(self.smoke(self.grid())), (0,))
        )
        points = list(dict.fromkeys(point for row in grid.values() for point in row))
        started = process_time()
        outcomes = _measure(grid, seeds, self.name)
        (test_size,) = {outcome.test_size for outcome in outcomes.values()}
        missing = Outcome([], 0.0, test_size)
        rows = {line: [outcomes.get((line, point), missing) for point in points] for line in grid}
        result = Result(
            self.name,
            self.question,
            self.setting,
            self.x,
            points,
            {line: [outcome.accuracies for outcome in row] for line, row in rows.items()},
            {line: [outcome.bytes_up for outcome in row] for line, row in rows.items()},
            list(seeds),
            test_size,
            ordered=self.ordered,
            measured=measured_on(started),
        )
        return self.finish(result)


def _same(result: Result) -> Result:
    return result


class Outcome(NamedTuple):
    """The result of a cell: an accuracy per seed, bytes up (mean over seeds), and the test images."""

    accuracies: list[float]
    bytes_up: float
    test_size: int


def _measure(grid: Grid, seeds: Sequence[int], name: str) -> dict[tuple[str, str], Outcome]:
    """Return the outcomes by line and point, running each federation once."""
    outcomes: dict[tuple[str, str], Outcome] = {}
    done: dict[tuple[str, fedkd.Experiment], fedkd.Comparison] = {}
    cells = [(line, point) for line, row in grid.items() for point in row]
    with Progress(console=Console(stderr=True), transient=True) as progress:
        for line, point in progress.track(cells, description=name):
            cell = grid[line][point]
            same = (cell.method, cell.experiment)
            if same not in done:
                done[same] = fedkd.compare(cell.experiment, [cell.method], seeds)
            outcomes[line, point] = _outcome(done[same], cell)
    return outcomes


def _outcome(comparison: fedkd.Comparison, cell: Cell) -> Outcome:
    runs = [run for each in comparison.runs.values() for run in each]
    accuracies = comparison.entries[0].accuracies
    if cell.own_mix or cell.clients != slice(None):
        tested = [
            r.result["client_own_accuracy"] if cell.own_mix else r.client_accuracy for r in runs
        ]
        chosen = [each[cell.clients] for each in tested]
        accuracies = [mean(a for a in each if a is not None) for each in chosen]
    sent = mean(run.bytes_up for run in runs) if runs else 0.0
    return Outcome([round(a, 6) for a in accuracies], round(sent, 1), comparison.test_size)


def outer(grid: Grid) -> Grid:
    """Return the first and the last point of every line."""
    return {
        n: {p: row[p] for p in dict.fromkeys([*row][:1] + [*row][-1:])} for n, row in grid.items()
    }


def whole(grid: Grid) -> Grid:
    """Return the whole grid."""
    return grid


def only(*points: str) -> Callable[[Grid], Grid]:
    """Return a function that keeps these points."""
    return lambda grid: {n: {p: row[p] for p in points} for n, row in grid.items()}


def _shrunk(grid: Grid) -> Grid:
    """Return the same cells, shrunk to take seconds."""
    return {
        line: {p: cell._replace(experiment=cell.experiment.smoke()) for p, cell in row.items()}
        for line, row in grid.items()
    }


def measured_on(started: float) -> str:
    import torch

    cpu = Path("/proc/cpuinfo")
    lines = cpu.read_text(encoding="utf-8").splitlines() if cpu.is_file() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return (
        f"{datetime.now(UTC):%Y-%m-%d}, {names[0] if names else platform.machine()}, "
        f"{torch.get_num_threads()} thread(s), torch {torch.__version__}, "
        f"{(process_time() - started) / 60:.0f} CPU minutes"
    )


# --- Words ----------------------------------------------------------------------------------------


def where(points: Sequence[str], chosen: Sequence[bool]) -> str:
    """Return in words at which points something holds."""
    named = [point for point, holds in zip(points, chosen, strict=True) if holds]
    if not named:
        return "nowhere in the grid"
    if len(named) == len(points):
        return "everywhere in the grid"
    return f"at {listed(named)}" if len(named) > 1 else f"only at {named[0]}"


def listed(words: Sequence[str]) -> str:
    """Return words as a list: ``a``, ``a and b``, ``a, b and c``."""
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


# --- Files ----------------------------------------------------------------------------------------


def table(result: Result) -> str:
    """Return the cells as Markdown: accuracy in percent, mean ± standard deviation over seeds."""
    first = f"{result.x} ({result.place})" if result.at else result.x
    lines = [f"| {first} | {' | '.join(result.lines)} |", "|---" * (1 + len(result.lines)) + "|"]
    for number, point in enumerate(result.points):
        cells = [_cell(result, line, number) for line in result.lines]
        lines.append(f"| {point} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(result: Result, line: str, number: int) -> str:
    values = [100 * a for a in result.lines[line][number]]
    if not values:
        return "–"
    spread = f" ± {stdev(values):.1f}" if len(values) > 1 else ""
    place = f" ({result.at[line][number]:.4g})" if result.at else ""
    return f"{mean(values):.1f}{spread}{place}"


def page(result: Result, answer: str) -> str:
    """Return a question's page."""
    seeds = f"{len(result.seeds)} seed{'s' * (len(result.seeds) > 1)}"
    return (
        f"# {result.question}\n\n**{answer}**\n\n{result.setting}\n\nTest accuracy in percent, mean "
        f"over the clients, mean ± standard deviation over {seeds}; {result.test_size:,} test images "
        "with all classes\nalike, whatever a client holds.\n\n"
        f"{table(result)}\n\n![{result.question}]({result.name}.svg)\n\n"
        f"    {command(result.name)}\n\nMeasured {result.measured}. "
        f"Every seed's numbers: [{result.name}.json]({result.name}.json).\n"
    )


def command(name: str) -> str:
    """Return the command that repeats a question."""
    return f"python simulations/{name}.py --write docs/questions"


def index(folder: Path) -> str:
    """Return the index of all questions answered in `folder`."""
    lines = [
        "# Questions of the field, measured\n",
        "Each is one script of `simulations/`; the answers are computed from the tables, differences are "
        "means ± standard deviations\nover paired seeds. They hold for these small settings, which the "
        "pages describe, and no further. Nothing was tuned, and grids\nare reported whole. All keys but "
        "those asked about are the same: α = 0.9, τ = 3, which suits FedMD badly ([α and τ]"
        "(alpha_and_tau.md)).\nDS-FL's students are tested after a last digest, FedMD's after a last "
        "pass over their shards, as these methods end; part of\nthe distance between the two is that.\n",
        "| question | answer | table and figure | repeated by | measured |",
        "|---|---|---|---|---|",
    ]
    for path in sorted(folder.glob("*.json")):
        result, answer = load(path)
        lines.append(
            f"| {result.question} | {answer} | [table]({result.name}.md), [figure]({result.name}.svg) "
            f"| `{command(result.name)}` | {result.measured} |"
        )
    return "\n".join(lines) + "\n"


def load(path: Path) -> tuple[Result, str]:
    """Return a result and its answer from JSON."""
    values = json.loads(path.read_text(encoding="utf-8"))
    answer = values.pop("answer")
    return Result(**values), answer


def write(folder: Path, result: Result, answer: str) -> None:
    """Write numbers, table and figure of one question, and the index of all."""
    folder.mkdir(parents=True, exist_ok=True)
    values = {"answer": answer, **asdict(result)}
    text = json.dumps(values, ensure_ascii=False, indent=1) + "\n"
    (folder / f"{result.name}.json").write_text(text, encoding="utf-8")
    (folder / f"{result.name}.md").write_text(page(result, answer), encoding="utf-8")
    draw(result, folder / f"{result.name}.svg")
    (folder / "README.md").write_text(index(folder), encoding="utf-8")


def draw(result: Result, path: Path) -> None:
    """Write a figure as SVG: every line with its own marker and the standard deviation over seeds."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    # Text stays text, and the same numbers give the same bytes.
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "fedkd"}):
        figure = Figure(figsize=(7, 4.6), layout="constrained")
        axes = figure.add_subplot()
        for number, (line, cells) in enumerate(result.lines.items()):
            beside = 0.05 * (
                number - (len(result.lines) - 1) / 2
            )  # so that bars do not cover each other
            places = result.at.get(line, [place + beside for place in range(len(cells))])
            shown = [(x, [100 * a for a in c]) for x, c in zip(places, cells, strict=True) if c]
            axes.errorbar(
                [x for x, _ in shown],
                [mean(c) for _, c in shown],
                [stdev(c) if len(c) > 1 else 0.0 for _, c in shown],
                color=COLOURS[number % 7], marker=MARKERS[number % 7], ms=5, capsize=3,
                ls="-" if result.ordered else "none",
                label=line,
            )  # fmt: skip
        if result.at:
            axes.set_xscale("log")
            axes.xaxis.set_major_formatter("{x:g}")
        else:
            axes.set_xticks(range(len(result.points)), result.points)
            if max(map(len, result.points)) > 12:
                for label in axes.get_xticklabels():
                    label.set(rotation=30, ha="right")
        axes.set(xlabel=result.place or result.x, ylabel="test accuracy in %")
        axes.grid(alpha=0.3)
        figure.legend(loc="outside upper left", ncols=3, frameon=False)
        figure.savefig(path, metadata={"Date": None})
