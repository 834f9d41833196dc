"""The figures of federated runs on the same data, each with a caption, or why it is missing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import log, nan
from statistics import mean, median

from fedkd.records.results import Run
from fedkd.reports.page import calibration as report_calibration
from fedkd.reports.page import curves as report_curves
from fedkd.reports.page.collect import Federations, partition_text
from fedkd.reports.page.curves import Points
from fedkd.reports.page.parts import (
    MOST_PANELS,
    Drawing,
    Missing,
    Shown,
    central_accuracies,
    left_out,
    slug,
    spread_over,
    tested_on,
)
from fedkd.reports.plots import points as point_plots
from fedkd.reports.plots.curves import Curve, curves
from fedkd.reports.plots.maps import FEW_CLIENTS, shards, soft_labels
from fedkd.reports.plots.points import Clients, Reliability
from fedkd.studies.comparison.methods import LOCAL

WITHHELD = "all clients withhold their accuracies"

_PHASES = ("load", "transfer", "digest", "revisit", "predict", "send", "encode", "aggregate")


def of_federations(group: Federations) -> list[Shown]:
    """Return all figures of federated runs on the same data."""
    view = _View(group)
    return [
        _by_round(view),
        _by_bytes(view),
        _shards(view),
        _clients(view),
        *_soft_labels(view),
        _entropy(view),
        _reliability(view),
        _seconds(view),
    ]


class _View:
    """The facts that several figures of the same runs use."""

    def __init__(self, group: Federations) -> None:
        self.group = group
        first = next(iter(group.runs.values()))[0]
        self.experiment = first.experiment
        self.local = next((label for label, runs in group.runs.items() if _is_local(runs)), None)
        self.methods = {label: runs for label, runs in group.runs.items() if label != self.local}
        self.slots = {label: slot for slot, label in enumerate(self.methods)}
        self.on = tested_on(self.experiment, first.result["test_size"])
        self.first = first

    @property
    def lines(self) -> dict[str, float]:
        """Constants in percent by label: the central models, and local only."""
        accuracies = central_accuracies(self.group.central) if self.group.central else {}
        local = self.group.runs[self.local] if self.local is not None else []
        if known := [run.accuracy for run in local if run.has_accuracy]:
            accuracies[self.local or ""] = known
        means = {label: 100 * mean(values) for label, values in accuracies.items()}
        return {f"{label} {value:.1f}": value for label, value in means.items()}

    @property
    def seeds(self) -> str:
        """The number of seeds of a curve, and what a band shows, in words."""
        counts = {len(runs) for runs in self.group.runs.values()}
        return spread_over(max(counts), exactly=len(counts) == 1)


def _is_local(runs: Sequence[Run]) -> bool:
    return runs[0].experiment.strategy == LOCAL


def _by_round(view: _View) -> Shown:
    thin = len(view.methods) == 1
    drawn = []
    for label, runs in view.methods.items():
        slot = view.slots[label]
        clients = report_curves.each_client(runs[0]) if thin and len(runs) == 1 else []
        if any(points := _students(runs)):
            drawn.append(_curve(label, points, slot, clients))
        if any(served := [report_curves.server(run) for run in runs]):
            drawn.append(_curve(f"{label}, server", served, slot, dashed=True))
    lines = view.lines
    alone = _students(view.group.runs.get(view.local or "", ()))
    if not drawn and any(alone):
        drawn = [_curve(view.local or "", alone, 0)]
        lines = {}
    if not drawn:
        return Missing("Accuracy by round", WITHHELD)
    figure = curves(drawn, lines, xlabel="round", ylabel="test accuracy in %")
    thin_text = " Thin lines: single clients." if any(curve.thin for curve in drawn) else ""
    dashed = " Dashed: the server's own model." if any(curve.dashed for curve in drawn) else ""
    level = " Grey lines: final accuracies of methods without rounds." if lines else ""
    caption = (
        "Test accuracy of the students after applying the knowledge of each round, mean over clients; "
        f"{view.seeds}; {view.on}.{thin_text}{dashed}{level}"
    )
    return Drawing("accuracy-by-round", "Accuracy by round", caption, figure, _ends(drawn, lines))


def _students(runs: Sequence[Run]) -> list[Points]:
    """Return the students' accuracy by round, of each run."""
    return [{p.round: p.accuracy for p in report_curves.students(run)} for run in runs]


def _curve(
    label: str,
    points: Sequence[Points],
    slot: int,
    clients: Sequence[Points] = (),
    *,
    dashed: bool = False,
) -> Curve:
    """Return the curve of accuracies by round, in percent, one row per seed."""
    x = sorted({number for each in points for number in each})
    return Curve(
        label,
        x,
        [[100 * each.get(number, nan) for number in x] for each in points],
        slot,
        dashed,
        [[100 * each.get(number, nan) for number in x] for each in clients],
    )


def _ends(drawn: Sequence[Curve], lines: Mapping[str, float]) -> str:
    """Return the final values of curves in words."""
    ends = [f"{c.label} {mean(row[-1] for row in c.values):.1f} %" for c in drawn]
    return f"At the end: {', '.join([*ends, *(f'{name} %' for name in lines)])}."


def _by_bytes(view: _View) -> Shown:
    title = "Accuracy by bytes"
    drawn = []
    for label, runs in view.methods.items():
        points = [report_curves.students(run) for run in runs if run.has_accuracy]
        sent = [{point.round: float(point.payload) for point in each} for each in points]
        accuracies = _curve(label, _students(runs), view.slots[label])
        x = [mean(each[int(t)] for each in sent if int(t) in each) for t in accuracies.x]
        if x and all(x):
            drawn.append(Curve(label, x, accuracies.values, accuracies.slot))
    if not drawn:
        tested = any(run.has_accuracy for runs in view.methods.values() for run in runs)
        return Missing(title, "no run sends data" if tested or not view.methods else WITHHELD)
    figure = curves(
        drawn,
        view.lines,
        xlabel="payload bytes, up and down, all clients (log)",
        ylabel="test accuracy in %",
        scale="bytes",
    )
    caption = (
        "The same accuracies against all payload bytes sent until then, both ways and all clients "
        f"together; one marker per round; {view.seeds}; {view.on}."
    )
    totals = ", ".join(f"{curve.label} {round(curve.x[-1]):,} bytes" for curve in drawn)
    return Drawing("accuracy-by-bytes", title, caption, figure, f"In total: {totals}.")


def _shards(view: _View) -> Shown:
    title = "Label distribution of the shards"
    for run in (run for runs in view.group.runs.values() for run in runs):
        if (dealt := run.shards) is not None:
            break
    else:
        return Missing(title, "no run has a shards.json")
    counts, classes = dealt["counts"], dealt["classes"]
    sizes = [sum(row) for row in counts]
    figure = shards(counts, classes)
    if len(counts) <= FEW_CLIENTS:
        largest = max(map(max, counts))
        how = f"Area: private images of a class at a client; the largest bubble is {largest:,}"
    else:
        how = (
            "Shade: share of a client's private images, from 0 % to 100 %; below, the sizes "
            "of the shards"
        )
    caption = (
        f"{how}. {len(sizes)} clients with {min(sizes):,} to {max(sizes):,} images, "
        f"{partition_text(run.experiment)}, seed {run.experiment.seed}."
    )
    return Drawing("shards", title, caption, figure)


def _clients(view: _View) -> Shown:
    title = "Clients before and after"
    if not view.methods:
        return Missing(title, "the runs train locally only")
    panels, before = [], ""
    for label, runs in view.methods.items():
        start = None if _is_local(runs) else _before(view, runs[0])
        if start is None:
            continue
        before, values = start
        pairs = [
            (100 * a, 100 * b)
            for a, b in zip(values, runs[0].client_accuracy, strict=True)
            if a is not None and b is not None
        ]
        if pairs:
            first, last = zip(*pairs, strict=True)
            panels.append(Clients(label, first, last, view.slots[label]))
    if not panels:
        return Missing(title, "no round tested clients")
    shown = panels[:MOST_PANELS]
    gains = "; ".join(_gain(panel) for panel in shown)
    caption = (
        f"Each client's test accuracy before (open: {before}) and at the end (filled), sorted by the "
        f"former; seed {view.first.experiment.seed}; {view.on}. Clients that gain: {gains}."
        f"{left_out([panel.label for panel in panels[MOST_PANELS:]])}"
    )
    return Drawing("clients", title, caption, point_plots.clients(shown, before=before))


def _before(view: _View, run: Run) -> tuple[str, Sequence[float | None]] | None:
    """Return what a run's clients are compared with, and the accuracies 0..1 of that."""
    for local in view.group.runs.get(view.local or "", ()):
        same = len(local.client_accuracy) == len(run.client_accuracy)
        if local.experiment.seed == run.experiment.seed and same:
            return view.local or "", local.client_accuracy
    start = report_curves.beginning(run)
    return None if start is None else (f"round {start.round}", start.accuracies)


def _gain(panel: Clients) -> str:
    changes = [b - a for a, b in zip(panel.before, panel.after, strict=True)]
    gaining = sum(change > 0 for change in changes)
    return f"{panel.label} {gaining} of {len(changes)} (median {median(changes):+.1f} points)"


def _soft_labels(view: _View) -> list[Shown]:
    title = "Mean soft labels"
    drawings: list[Shown] = []
    for label, runs in view.methods.items():
        recorded = runs[0].knowledge
        if not recorded or not any(recorded[-1]["by_class"]):
            continue
        last = recorded[-1]
        classes = (runs[0].shards or {}).get("classes") or [
            str(c) for c in range(len(last["by_class"]))
        ]
        rows = "true class" if last["by"] == "label" else "most probable class"
        caption = (
            f"The last soft labels that clients received from {label} (round {last['round']}, seed "
            f"{runs[0].experiment.seed}): mean probability in % at temperature 1, by the {rows} of the "
            "public image. Shade: from 0 % to 100 %."
        )
        figure = soft_labels(last["by_class"], classes)
        key = f"soft-labels-{slug(label)}"
        drawings.append(Drawing(key, f"{title}: {label}", caption, figure))
    return drawings or [Missing(title, "no run has soft labels in a knowledge.jsonl")]


def _entropy(view: _View) -> Shown:
    title = "Entropy of the soft labels"
    drawn = [
        Curve(
            f"{label}, at τ = {runs[0].experiment.tau:g}" if tempered else label,
            *_field_by_round(runs, f"knowledge_entropy{'_at_tau' if tempered else ''}"),
            view.slots[label],
            tempered,
        )
        for label, runs in view.methods.items()
        for tempered in (False, True)
    ]
    drawn = [curve for curve in drawn if curve.x]
    if not drawn:
        return Missing(title, "no run recorded it")
    classes = _class_count(view)
    lines = {f"ln {classes}, uniform": log(classes)} if classes else {}
    figure = curves(drawn, lines, xlabel="round", ylabel="entropy in nats")
    caption = (
        "Mean entropy of the aggregated soft labels at temperature 1, dashed at the temperature of the "
        f"loss, τ; {view.seeds}. Low: confident; ln of the number of classes: uniform."
    )
    return Drawing("entropy", title, caption, figure)


def _class_count(view: _View) -> int | None:
    for runs in view.group.runs.values():
        if dealt := runs[0].shards:
            return len(dealt["classes"])
    return None


def _field_by_round(runs: Sequence[Run], field: str) -> tuple[list[float], list[list[float]]]:
    """Return rounds ``[T]`` and a field's values ``[S][T]``."""
    values = [
        {row["round"]: row[field] for row in run.rounds if row.get(field) is not None}
        for run in runs
    ]
    x = sorted({number for each in values for number in each})
    return x, [[each.get(number, nan) for number in x] for each in values]


def _reliability(view: _View) -> Shown:
    group = view.group
    panels: dict[str, list[Reliability]] = {}
    if group.central is not None:
        central = report_calibration.of_models(group.central_folders, group.central.seeds)
        panels["central"] = central
    for label, runs in group.runs.items():
        aggregate = report_calibration.of_aggregate(runs)
        panels[label] = aggregate + report_calibration.of_models([run.path for run in runs])
    panels = {label: lines for label, lines in panels.items() if lines}
    if not panels:
        return Missing("Reliability", "no run has a tested.safetensors")
    chosen = _most_informative(panels)
    left = [label for label in panels if label not in chosen]
    shown = {label: lines for label, lines in panels.items() if label in chosen}
    on = f"the aggregate, the last soft labels, on public images, all others on {view.on}."
    return report_calibration.drawing(shown, "all models and seeds", f"{on}{left_out(left)}")


def _most_informative(panels: Mapping[str, Sequence[Reliability]]) -> list[str]:
    """Return the panels to show: the baseline's, then those with soft labels."""

    def rank(label: str) -> int:
        kinds = {line.kind for line in panels[label]}
        return 0 if "alone" in kinds else 1 if "aggregate" in kinds else 2

    return sorted(panels, key=rank)[:MOST_PANELS]


def _seconds(view: _View) -> Shown:
    bars = _without_small(
        {label: _means([_spent(run) for run in runs]) for label, runs in view.group.runs.items()}
    )
    several = max(len(runs) for runs in view.group.runs.values()) > 1
    over = "mean over seeds, " if several else ""
    caption = (
        f"Seconds in all rounds by phase, {over}summed over clients; encode: messages, both ways; "
        "aggregate: the server."
    )
    totals = ", ".join(f"{label} {sum(bar.values()):.1f}" for label, bar in bars.items())
    figure = point_plots.seconds(bars)
    return Drawing("seconds", "Time by phase", caption, figure, f"Seconds in total: {totals}.")


def _spent(run: Run) -> dict[str, float]:
    """Return the seconds of a run's phases."""
    spent: dict[str, float] = {}
    for row in run.rounds:
        for phase, seconds in row["seconds"].items():
            if phase != "round" and not phase.startswith("part "):
                spent[phase] = spent.get(phase, 0.0) + seconds
    return spent


def _means(parts: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return the mean seconds by phase."""
    names = dict.fromkeys(name for part in parts for name in part)
    return {name: mean(part.get(name, 0.0) for part in parts) for name in names}


def _without_small(bars: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """Return bars with ordered phases; those always below 1/50 of the longest bar become "other"."""
    least = max(sum(bar.values()) for bar in bars.values()) / 50
    names = dict.fromkeys(phase for bar in bars.values() for phase in bar)
    phases = sorted(names, key=lambda phase: [*_PHASES, *names].index(phase))
    small = {p for p in phases if all(bar.get(p, 0.0) < least for bar in bars.values())}
    if len(small) < 2:
        return {label: {p: bar.get(p, 0.0) for p in phases} for label, bar in bars.items()}
    return {
        label: {
            **{p: bar.get(p, 0.0) for p in phases if p not in small},
            "other": sum(bar.get(p, 0.0) for p in small),
        }
        for label, bar in bars.items()
    }
