"""The figures of a central baseline that belongs to no other runs."""

from __future__ import annotations

from math import nan

from fedkd.records.results import CentralRun
from fedkd.reports.page import calibration as report_calibration
from fedkd.reports.page.parts import (
    Drawing,
    Missing,
    Shown,
    central_accuracies,
    spread_over,
    tested_on,
)
from fedkd.reports.plots.curves import Curve, curves
from fedkd.reports.plots.points import points
from fedkd.studies.comparison import methods


def of_central(run: CentralRun) -> list[Shown]:
    """Return the figures of a central baseline."""
    assert run.path is not None
    on = tested_on(run.experiment, run.test_size)
    lines = report_calibration.of_models([run.path])
    calibration: Shown = Missing("Reliability", "the run has no tested.safetensors")
    if lines:
        calibration = report_calibration.drawing({"central": lines}, "all seeds", f"{on}.")
    return [_accuracies(run, on), _losses(run), calibration]


def _accuracies(run: CentralRun, on: str) -> Drawing:
    percent = {
        label: [100 * value for value in values]
        for label, values in central_accuracies(run).items()
    }
    count = f"{len(run.seeds)} seeds" if len(run.seeds) > 1 else "one seed"
    return Drawing(
        "accuracy",
        "Accuracy of the central models",
        f"One marker per seed ({count}), a bar at the mean; {on}.",
        points(percent, xlabel="test accuracy in %"),
        ", ".join(f"{label} {sum(v) / len(v):.1f} %" for label, v in percent.items()) + ".",
    )


def _losses(run: CentralRun) -> Shown:
    title = "Training loss by epoch"
    drawn = [
        Curve(
            methods.label(kind),
            range(1, len(course["loss"][0]) + 1),
            [[nan if loss is None else loss for loss in row] for row in course["loss"]],
            slot,
        )
        for slot, (kind, course) in enumerate(run.training.items())
    ]
    if not drawn:
        return Missing(title, "the run did not record it")
    figure = curves(drawn, {}, xlabel="epoch", ylabel="training loss")
    caption = (
        f"Mean training loss of each epoch; {spread_over(len(run.seeds))}. The losses differ: "
        "teacher and student alone learn from labels, the student distilled from soft labels as well."
    )
    return Drawing("loss", title, caption, figure)
