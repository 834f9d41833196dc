"""Reliability diagrams from records, of tested models and of soft labels."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import nan
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedkd.knowledge.calibration import expected_calibration_error, reliability
from fedkd.records.predictions import Tested
from fedkd.records.results import Run
from fedkd.reports.page.parts import Drawing
from fedkd.reports.plots import points as point_plots
from fedkd.reports.plots.points import Reliability
from fedkd.studies.comparison import methods

_KIND_OF = {
    "teacher": "teacher",
    "student": "student",
    "student-alone": "alone",
    "student-distilled": "student",
}


def drawing(panels: Mapping[str, Sequence[Reliability]], whose: str, on: str) -> Drawing:
    """Return the figure of some panels.

    Args:
        panels: lines by the panel's title.
        whose: the answers that are pooled, in words.
        on: images on which models were tested, in words, with further remarks.
    """
    caption = (
        f"Accuracy against confidence in 15 bins of equal width, {whose} together; the dotted diagonal "
        "is calibrated, below it a model is overconfident. A marker's area shows the answers in its bin. "
        f"Numbers: expected calibration error in %; {on}"
    )
    legends = [
        f"{title}: {', '.join(each.label for each in lines)}" for title, lines in panels.items()
    ]
    label_statistics = f"Expected calibration error in %: {'; '.join(legends)}."
    figure = point_plots.reliability(panels)
    return Drawing("reliability", "Reliability", caption, figure, label_statistics)


def of_models(folders: Iterable[Path], seeds: Sequence[int] | None = None) -> list[Reliability]:
    """Return the lines of the models whose predictions the runs of one method kept.

    Args:
        folders: of the runs.
        seeds: seeds of a baseline to use; default all.
    """
    all_tested = [tested for folder in folders if (tested := Tested.load(folder)) is not None]
    kinds = [kind for kind in _KIND_OF if any(kind in tested.models for tested in all_tested)]
    lines = []
    for kind in kinds:
        parts = [_answers(tested, kind, seeds) for tested in all_tested if kind in tested.models]
        confidences, correct = (torch.cat(part) for part in zip(*parts, strict=True))
        if len(confidences):
            bins = reliability(confidences, correct)
            lines.append(_line(methods.label(kind), bins, _KIND_OF[kind]))
    return lines


def _answers(tested: Tested, kind: str, seeds: Sequence[int] | None) -> tuple[Tensor, Tensor]:
    """Return confidences and whether they were right, of all answers that have a confidence."""
    predictions = tested.models[kind]
    counts = torch.tensor([seeds is None or owner in seeds for owner in predictions.owners])
    known = ~predictions.confidences.isnan() & counts[:, None]
    return predictions.confidences[known], tested.correct(kind)[known]


def of_aggregate(runs: Sequence[Run]) -> list[Reliability]:
    """Return the line of the last soft labels, all seeds together."""
    last = [rows[-1]["reliability"] for run in runs if (rows := run.knowledge)]
    recorded = [bins for bins in last if bins and any(bins["count"])]
    return [_line("aggregate", _summed(recorded), "aggregate")] if recorded else []


def _summed(parts: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Return the bins of several sets of answers together."""
    columns = range(len(parts[0]["count"]))
    count = [sum(part["count"][m] for part in parts) for m in columns]

    def average(name: str) -> list[float | None]:
        sums = [sum(p["count"][m] * (p[name][m] or 0) for p in parts) for m in columns]
        return [s / n if n else None for s, n in zip(sums, count, strict=True)]

    return {"count": count, "confidence": average("confidence"), "accuracy": average("accuracy")}


def _line(label: str, bins: Mapping[str, Any], kind: Any) -> Reliability:
    error = 100 * expected_calibration_error(bins)
    percent = {
        name: [nan if value is None else 100 * value for value in bins[name]]
        for name in ("confidence", "accuracy")
    }
    total = sum(bins["count"])
    share = [count / total for count in bins["count"]]
    return Reliability(f"{label} {error:.1f}", **percent, share=share, kind=kind)
