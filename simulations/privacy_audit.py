"""What do soft labels reveal, and what does noise on them cost?

mnist-5k, DS-FL, Dirichlet 0.5, in two settings: five clients that overfit (some 200 private images each,
students `mlp-256`, five rounds of 300 public images), and a hundred clients that answer once (some 30
images each, `mlp-64`, 100 public images), which suits noise: few rows, averaged over many clients. For
every `dp-noise` σ: ε at δ = 1e-5, accuracy, and what a curious server infers
(`fedkd.studies.leakage`) from the mean of a client's answers over the rounds. Members are compared
with test images of the same classes. Three seeds. No download;
a quarter of an hour on one core (`pip install 'fedkd[privacy]'`):

    python simulations/privacy_audit.py --write docs
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

import fedkd
from fedkd.clients.privacy import epsilon
from fedkd.clients.state_files import StateFiles
from fedkd.data.federated import FederatedData, federated_data
from fedkd.strategy import Replies, Server
from fedkd.studies import leakage
from fedkd.training.architectures import architectures_of
from fedkd.training.cohort import Cohort
from strategies.dsfl import DSFL

COMMON = fedkd.Experiment(
    dataset="mnist-5k",
    public_labels=False,
    partition="dirichlet",
    partition_alpha=0.5,
    student="mlp-256",
    local_epochs=10,
    distill_epochs=10,
    alpha=1.0,
    tau=1.0,
    evaluate_phases="last",
    device="cpu",
)
SETTINGS = {
    "5 clients, 5 rounds": COMMON.replace(
        num_clients=5, train_size=1300, public_size=300, num_server_rounds=5, evaluate_every=5
    ),
    "100 clients, 1 round": COMMON.replace(
        num_clients=100,
        train_size=3100,
        public_size=100,
        num_server_rounds=1,
        local_epochs=60,
        distill_epochs=40,
        student="mlp-64",
    ),
}
NOISES = (0.0, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
SEEDS = (0, 1, 2)
PROXY_EPOCHS = 100
ALONE = "nothing sent, guessing"
COLUMNS = {
    "accuracy": "accuracy, %",
    "proxy": "proxy",
    "calibrated": "proxy, calibrated",
    "advantage": "its advantage",
    "tpr": "its TPR at 1 % FPR, %",
    "model": "the student itself",
    "labels": "label distribution: TV",
}
Table = dict[str, dict[str, list[Any]]]
"""Measurements by noise, one number per seed; an infinite ε is `None`."""

_received: dict[str, list[fedkd.SoftLabels]] = {}
"""Soft labels that the curious server kept, by the name of the run."""


class Curious(DSFL):
    """DS-FL with a server that keeps the soft labels it receives."""

    def update(self, replies: Replies, server: Server) -> fedkd.SoftLabels | None:
        """Return the knowledge of DS-FL, keeping the clients' answers."""
        assert replies.labels is not None
        _received.setdefault(str(server.experiment.name), []).append(replies.labels)
        knowledge = super().update(replies, server)
        assert isinstance(knowledge, fedkd.SoftLabels)
        return knowledge


def audit(experiment: fedkd.Experiment, proxy_epochs: int) -> dict[str, Any]:
    """Return the measurements of one federation under attack, means over its clients."""
    with tempfile.TemporaryDirectory() as folder:
        run = fedkd.run(experiment.replace(strategy=f"{__name__}:Curious", run_dir=folder))
        data, received = federated_data(experiment), _received.pop(run.path.name)
        labels = leakage.averaged(received, data.sizes.num_public)
        proxies = leakage.distilled_proxies(labels, data, experiment, proxy_epochs)
        students = _students(run, data)
    rows = sum(len(each.samples) for each in received)
    assert data.public_truth is not None
    public = data.public_truth.bincount(minlength=data.num_classes)
    truth = data.private_label_counts / data.private_label_counts.sum(1, keepdim=True)
    estimate = leakage.label_distributions(labels, public)
    membership = _membership(experiment, data, proxies, students)
    spent = epsilon(noise=experiment.dp_noise, rows=rows, delta=experiment.dp_delta)
    return {
        "epsilon": spent if math.isfinite(spent) else None,
        "accuracy": run.accuracy,
        **membership,
        "labels": float(leakage.total_variation(estimate, truth).mean()),
        "labels_guess": float(leakage.total_variation(public / public.sum(), truth).mean()),
        "test_size": float(run.result["test_size"]),
    }


def _students(run: fedkd.Run, data: FederatedData) -> Cohort:
    """Return the students in their state when they last answered."""
    experiment = run.experiment
    last = dict.fromkeys(range(experiment.num_clients), experiment.num_server_rounds)
    states = StateFiles(run.path / "clients", experiment.architecture_period).load(last)
    return architectures_of(data).cohort(experiment, experiment.student, states.models["student"])


def _membership(
    experiment: fedkd.Experiment, data: FederatedData, proxies: Cohort, students: Cohort
) -> dict[str, float]:
    """Return how well private images are separated from as many test images of the same classes."""
    assert data.train.labels is not None
    assert data.test.labels is not None
    scores = {"proxy": _scores(proxies, data), "model": _scores(students, data)}
    scores["calibrated"] = tuple(map(leakage.calibrated, scores["proxy"]))
    aucs: dict[str, list[float]] = {name: [] for name in scores}
    pooled: list[tuple[Tensor, Tensor]] = []
    for client, shard in enumerate(data.shards):
        inside, outside = leakage.matched(
            data.train.labels[shard], data.test.labels, experiment.seed, client
        )
        for name, (on_train, on_test) in scores.items():
            members, others = on_train[client, shard[inside]], on_test[client, outside]
            aucs[name].append(leakage.detection(members, others).auc)
            if name == "calibrated":
                pooled.append((members, others))
    # One threshold for all clients: with 30 images per shard there is no rate of 1 %.
    members, others = (torch.cat(each) for each in zip(*pooled, strict=True))
    at_once = leakage.detection(members, others)
    means = {name: mean(each) for name, each in aucs.items()}
    return {**means, "advantage": at_once.advantage, "tpr": at_once.tpr_at_1}


def _scores(cohort: Cohort, data: FederatedData) -> tuple[Tensor, ...]:
    """Return the log-likelihoods of the true classes of the training and the test images."""
    scores = []
    for images in (data.train, data.test):
        assert images.labels is not None
        scores.append(leakage.log_likelihoods(cohort.predict(images), images.labels))
    return tuple(scores)


def measure(
    base: fedkd.Experiment,
    noises: Sequence[float],
    seeds: Sequence[int],
    proxy_epochs: int,
    advance: Any,
) -> Table:
    """Return the audit of every noise with every seed."""
    table: Table = {}
    for noise in noises:
        for seed in seeds:
            advance()
            measured = audit(base.replace(dp_noise=noise, seed=seed), proxy_epochs)
            for name, value in measured.items():
                table.setdefault(f"{noise:g}", {}).setdefault(name, []).append(value)
    table[ALONE] = {"accuracy": [_alone(base.replace(seed=seed)) for seed in seeds]}
    return table


def _alone(experiment: fedkd.Experiment) -> float:
    """Return the accuracy of clients that send nothing at all."""
    with tempfile.TemporaryDirectory() as folder:
        return fedkd.run(experiment.replace(strategy="LocalOnly", run_dir=folder)).accuracy


def markdown(title: str, table: Table) -> str:
    """Return a setting's table: mean ± standard deviation over seeds."""
    lines = [
        f"### {title}",
        "",
        f"| σ | ε | {' | '.join(COLUMNS.values())} |",
        "|---" * (2 + len(COLUMNS)) + "|",
    ]
    audited = {noise: row for noise, row in table.items() if noise != ALONE}
    for noise, row in audited.items():
        cells = [_cell(name, row[name]) for name in COLUMNS]
        lines.append(f"| {noise} | {_epsilon(row['epsilon'][0])} | {' | '.join(cells)} |")
    guess = _cell("labels_guess", audited["0"]["labels_guess"])
    alone = _cell("accuracy", table[ALONE]["accuracy"])
    lines.append(f"| {ALONE} | 0 | {alone} | 0.50 | 0.50 | 0.00 | 1.0 | 0.50 | {guess} |")
    return "\n".join(lines)


def _cell(name: str, values: Sequence[float]) -> str:
    scale, digits = (100, 1) if name in ("accuracy", "tpr") else (1, 2)
    spread = f" ± {scale * stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{scale * mean(values):.{digits}f}{spread}"


def _epsilon(value: float | None) -> str:
    if value is None:
        return "∞"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


PANELS = {
    "accuracy": "test accuracy in %",
    "calibrated": "AUC of membership (calibrated)",
    "labels": "label distribution: total variation",
}


def draw(tables: Mapping[str, Table], path: Path) -> None:
    """Write a figure as SVG: accuracy, membership and label distribution by ε."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "fedkd"}):
        figure = Figure(figsize=(11, 3.8), layout="constrained")
        for axes, name in zip(figure.subplots(1, len(PANELS)), PANELS, strict=True):
            for number, (title, table) in enumerate(tables.items()):
                _draw_line(axes, name, table, number, title)
            axes.set(xscale="log", xlabel="ε at δ = 1e-5", ylabel=PANELS[name])
            axes.grid(alpha=0.3)
        handles, names = axes.get_legend_handles_labels()
        title = "dotted: no noise; dashed: nothing sent, or guessing"
        figure.legend(handles, names, loc="outside upper left", ncols=2, frameon=False, title=title)
        figure.savefig(path, metadata={"Date": None})


def _draw_line(axes: Any, name: str, table: Table, number: int, title: str) -> None:
    """Draw one setting's line of a panel, and its two limits as horizontal lines."""
    colour, scale = ("#0072b2", "#d55e00")[number], 100 if name == "accuracy" else 1
    cells = [row for noise, row in table.items() if noise not in ("0", ALONE)]
    axes.errorbar(
        [row["epsilon"][0] for row in cells],
        [scale * mean(row[name]) for row in cells],
        [scale * _spread(row[name]) for row in cells],
        color=colour, marker="os"[number], ms=5, capsize=3, label=title,
    )  # fmt: skip
    without = {"accuracy": table[ALONE]["accuracy"], "labels": table["0"]["labels_guess"]}
    axes.axhline(scale * mean(table["0"][name]), color=colour, ls=":")
    axes.axhline(scale * mean(without.get(name, [0.5])), color=colour, ls="--", lw=1)


def _spread(values: Sequence[float]) -> float:
    return stdev(values) if len(values) > 1 else 0.0


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, and write with ``--write``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="seconds instead of minutes")
    parser.add_argument("--write", type=Path, metavar="FOLDER", help="where figure and numbers go")
    chosen = parser.parse_args(arguments)
    settings = SETTINGS
    noises: tuple[float, ...] = NOISES
    seeds: tuple[int, ...] = SEEDS
    epochs = PROXY_EPOCHS
    if chosen.smoke:
        settings = {name: base.smoke() for name, base in SETTINGS.items()}
        noises, seeds, epochs = (0.0, 1.0), (0,), 2
    console = Console()
    tables: dict[str, Table] = {}
    torch.set_num_threads(1)
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("audit", total=len(settings) * len(noises) * len(seeds))
        for title, base in settings.items():
            tables[title] = measure(base, noises, seeds, epochs, lambda: progress.advance(task))
            text = markdown(title, tables[title])
            console.print(f"{text}\n", markup=False, highlight=False, soft_wrap=True)
    if chosen.write is not None:
        chosen.write.mkdir(parents=True, exist_ok=True)
        text = json.dumps(tables, indent=1, allow_nan=False) + "\n"
        (chosen.write / "privacy_audit.json").write_text(text, encoding="utf-8")
        draw(tables, chosen.write / "privacy_audit.svg")


if __name__ == "__main__":
    main()
