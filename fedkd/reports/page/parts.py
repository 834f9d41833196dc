"""What the figures of a report have in common: their form, and what their captions say."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedkd.experiment import Experiment
from fedkd.records.files import read_lines
from fedkd.records.results import CentralRun, Run
from fedkd.studies.comparison import methods
from fedkd.studies.comparison.methods import CENTRAL

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_PANELS = 6
"""Panels of a figure; the methods after those are left out, and the caption says so."""


@dataclass(frozen=True)
class Drawing:
    """A figure of the page.

    Attributes:
        key: names its file, and with its section its anchor.
        title: what it shows, in a few words.
        caption: how to read it: units, seeds, test images.
        figure: as drawn by `fedkd.reports.plots`.
        described: the numbers that are to be seen, for those who cannot see them.
    """

    key: str
    title: str
    caption: str
    figure: Figure
    described: str = ""


@dataclass(frozen=True)
class Missing:
    """A figure that the records do not give, and why."""

    title: str
    reason: str


Shown = Drawing | Missing


def spread_over(seeds: int, *, exactly: bool = True) -> str:
    """Say in words what is averaged: so many seeds, or at most so many."""
    count = f"{'' if exactly else 'up to '}{seeds} seeds"
    return f"mean ± standard deviation over {count}" if seeds > 1 else "one seed"


def seeds_said(seeds: Sequence[int]) -> str:
    """Name seeds, or count them where they are many."""
    if len(seeds) > 8:
        return f"{len(seeds)} seeds"
    return f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}"


def tested_on(experiment: Experiment, count: int) -> str:
    """Say on which images accuracies were measured."""
    if experiment.fold != "none":
        return f"{count:,} held-out training images (fold {experiment.fold})"
    return f"{count:,} test images"


def privacy(runs: Mapping[str, Sequence[Run]]) -> list[str]:
    """Say to what (ε, δ) the soft labels of a client amount, by method; nothing without ``dp-noise``."""
    noisy = {name: found for name, found in runs.items() if found[0].experiment.dp_noise}
    deltas = {run.experiment.dp_delta for found in noisy.values() for run in found}
    return [
        f"soft labels of a client: {', '.join(_epsilons(noisy, delta))} at δ = {delta:g}"
        for delta in sorted(deltas)
    ]


def _epsilons(runs: Mapping[str, Sequence[Run]], delta: float) -> Iterator[str]:
    for name, found in runs.items():
        spent = [run.result["epsilon"] for run in found if run.experiment.dp_delta == delta]
        if spent:
            worst = None if None in spent else max(spent)
            yield f"{name} ε = {'∞' if worst is None else f'{worst:.3g}'}"


def central_accuracies(run: CentralRun) -> dict[str, list[float]]:
    """Return test accuracies 0..1 per seed by the model's label."""
    found = (run.teacher_accuracies, run.student_alone_accuracies, run.student_accuracies)
    return dict(zip(map(methods.label, CENTRAL), found, strict=True))


def knowledge_of(folder: Path) -> list[dict[str, Any]]:
    """Read ``knowledge.jsonl`` of a run, one object a round; empty where it left none."""
    path = folder / "knowledge.jsonl"
    return read_lines(path) if path.is_file() else []


def left_out(names: Sequence[str]) -> str:
    """Say which methods a figure has no room for."""
    return f" Left out: {', '.join(names)}." if names else ""


def slug(label: str) -> str:
    """Return a text for file names and anchors."""
    return "-".join("".join(c if c.isalnum() else " " for c in label.lower()).split()) or "method"
