"""Shared parts of a report's figures: their form and texts in captions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fedkd.experiment import Experiment
from fedkd.records.results import CentralRun, Run
from fedkd.studies.comparison import methods
from fedkd.studies.comparison.methods import CENTRAL

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_PANELS = 6
"""Panels of a figure; further methods are left out, and the caption names them."""


@dataclass(frozen=True)
class Drawing:
    """A figure of the page.

    Attributes:
        key: names its file, and with its section its anchor.
        title: what it shows, in a few words.
        caption: how to read it: units, seeds, test images.
        figure: as drawn by `fedkd.reports.plots`.
        described: the numbers that the figure shows, for screen readers.
    """

    key: str
    title: str
    caption: str
    figure: Figure
    described: str = ""


@dataclass(frozen=True)
class Missing:
    """A figure that cannot be made from the records, and why."""

    title: str
    reason: str


Shown = Drawing | Missing


def spread_over(seeds: int, *, exactly: bool = True) -> str:
    """Return in words over how many seeds, or at most how many, is averaged."""
    count = f"{'' if exactly else 'up to '}{seeds} seeds"
    return f"mean ± standard deviation over {count}" if seeds > 1 else "one seed"


def seeds_text(seeds: Sequence[int]) -> str:
    """Return the seeds in words, or their number where they are many."""
    if len(seeds) > 8:
        return f"{len(seeds)} seeds"
    return f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}"


def tested_on(experiment: Experiment, count: int) -> str:
    """Return in words on which images accuracies were measured."""
    if experiment.fold != "none":
        return f"{count:,} held-out training images (fold {experiment.fold})"
    return f"{count:,} test images"


def privacy(runs: Mapping[str, Sequence[Run]]) -> list[str]:
    """Return the (ε, δ) of a client's soft labels by method in words; empty without ``dp-noise``."""
    noisy = {name: seeds for name, seeds in runs.items() if seeds[0].experiment.dp_noise}
    deltas = {run.experiment.dp_delta for seeds in noisy.values() for run in seeds}
    return [
        f"soft labels of a client: {', '.join(_epsilons(noisy, delta))} at δ = {delta:g}"
        for delta in sorted(deltas)
    ]


def _epsilons(runs: Mapping[str, Sequence[Run]], delta: float) -> Iterator[str]:
    for name, seeds in runs.items():
        spent = [run.result["epsilon"] for run in seeds if run.experiment.dp_delta == delta]
        if spent:
            worst = None if None in spent else max(spent)
            yield f"{name} ε = {'∞' if worst is None else f'{worst:.3g}'}"


def central_accuracies(run: CentralRun) -> dict[str, list[float]]:
    """Return test accuracies 0..1 per seed by the model's label."""
    accuracies = (run.teacher_accuracies, run.student_alone_accuracies, run.student_accuracies)
    return dict(zip(map(methods.label, CENTRAL), accuracies, strict=True))


def left_out(names: Sequence[str]) -> str:
    """Return in words which methods a figure leaves out."""
    return f" Left out: {', '.join(names)}." if names else ""


def slug(label: str) -> str:
    """Return a text for file names and anchors."""
    return "-".join("".join(c if c.isalnum() else " " for c in label.lower()).split()) or "method"
