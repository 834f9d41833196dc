"""How many malicious clients does each robust rule tolerate?

mnist-5k, DS-FL's round (Dirichlet 1.0, ten clients with 200 private images each on average, 400
unlabelled public images, students `mlp-20`, five rounds), soft labels combined by mean, median,
trimmed mean, geometric median, Cronus and the exponential-weights guard, against 0 to 40 % malicious
clients and each attack of `fedkd.clients.attacks`. The measure is the mean test accuracy of the *honest*
clients. Cronus also trains differently, on both sets at once. Three seeds. No download; a quarter of
an hour on one core:

    python simulations/byzantine_clients.py --write docs
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from time import process_time

import torch
from rich.console import Console
from rich.progress import Progress

import fedkd
from fedkd.clients.attacks import ATTACKS, malicious_clients
from simulations._questions import COLOURS, MARKERS, measured_on

BASE = fedkd.Experiment(
    dataset="mnist-5k",
    public_labels=False,
    train_size=2400,
    public_size=400,
    num_clients=10,
    partition_alpha=1.0,
    student="mlp-20",
    num_server_rounds=5,
    local_epochs=3,
    distill_epochs=3,
    alpha=0.9,
    tau=1.0,
    evaluate_phases="last",
    evaluate_every=5,
    plan="stacked",
    device="cpu",
)
SIMPLE = "sharpening=mean combine="
RULES = {
    "mean": ("DSFL", f"{SIMPLE}mean"),
    "median": ("DSFL", f"{SIMPLE}median"),
    "trimmed mean": ("DSFL", f"{SIMPLE}trimmed-mean"),
    "geometric median": ("DSFL", f"{SIMPLE}geometric-median"),
    "Cronus": ("Cronus", "none"),
    "ExpGuard": ("ExpGuard", "none"),
}
"""Strategy and settings of each rule."""

SHARES = (0.0, 0.1, 0.2, 0.3, 0.4)
SEEDS = (0, 1, 2)
Table = dict[str, dict[str, list[list[float]]]]
"""Honest accuracy by attack and rule ``[shares][seeds]``, 0..1."""


def honest_accuracy(experiment: fedkd.Experiment) -> tuple[float, int]:
    """Return the mean accuracy of a federation's honest clients, and the number of test images."""
    with tempfile.TemporaryDirectory() as folder:
        run = fedkd.run(experiment.replace(run_dir=folder))
    malicious = malicious_clients(experiment)
    honest = [a for k, a in enumerate(run.client_accuracy) if k not in malicious and a is not None]
    return mean(honest), int(run.result["test_size"])


def measure(
    base: fedkd.Experiment,
    attacks: Sequence[str],
    shares: Sequence[float],
    seeds: Sequence[int],
    advance: Callable[[], object],
) -> tuple[Table, int]:
    """Return the table of every attack, rule, share and seed; without attackers all attacks are one."""
    table: Table = {attack: {} for attack in attacks}
    size = 0
    for rule, (strategy, settings) in RULES.items():
        ours = base.replace(strategy=strategy, strategy_config=settings)
        without: dict[int, float] = {}
        for attack in attacks:
            rows: list[list[float]] = []
            for share in shares:
                row = []
                for seed in seeds:
                    advance()
                    if share == 0 and seed in without:
                        row.append(without[seed])
                        continue
                    keys = {"attack": attack, "attackers": share} if share else {}
                    accuracy, size = honest_accuracy(ours.replace(seed=seed, **keys))
                    if share == 0:
                        without[seed] = accuracy
                    row.append(accuracy)
                rows.append(row)
            table[attack][rule] = rows
    return table, size


def markdown(attack: str, rows: Mapping[str, list[list[float]]], shares: Sequence[float]) -> str:
    """Return one attack's table, in percent."""
    lines = [
        f"### {attack}",
        "",
        f"| attackers | {' | '.join(f'{100 * share:.0f} %' for share in shares)} |",
        "|---" * (1 + len(shares)) + "|",
    ]
    lines += [f"| {rule} | {' | '.join(map(_cell, cells))} |" for rule, cells in rows.items()]
    return "\n".join(lines)


def _cell(values: Sequence[float]) -> str:
    spread = f" ± {100 * stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * mean(values):.1f}{spread}"


def answer(table: Table, shares: Sequence[float]) -> str:
    """Return what the rules cost without attackers, and by attack what the most attackers cost."""
    most, sentences = f"{100 * shares[-1]:.0f} %", []
    without = {rule: 100 * mean(cells[0]) for rule, cells in next(iter(table.values())).items()}
    costs = [f"{r} {without['mean'] - a:.1f}" for r, a in without.items() if r != "mean"]
    sentences.append(
        f"- **without liars** the rules cost points of the mean's: {', '.join(costs)}."
    )
    for attack, rows in table.items():
        last = {rule: 100 * mean(cells[-1]) for rule, cells in rows.items()}
        order = sorted(last, key=lambda rule: -last[rule])
        ends = ", ".join(f"{rule} {last[rule]:.1f}" for rule in order)
        lost = without["mean"] - last["mean"]
        sentences.append(
            f"- **{attack}**: {most} of liars take {lost:.1f} points from the mean. In %: {ends}."
        )
    return "\n".join(sentences)


def page(table: Table, shares: Sequence[float], size: int, seeds: int, measured: str) -> str:
    """Return the page with the figure."""
    tables = "\n\n".join(markdown(attack, rows, shares) for attack, rows in table.items())
    return _PAGE.format(
        answer=answer(table, shares), size=size, seeds=seeds, tables=tables, measured=measured
    )


_PAGE = """# Byzantine clients

`--attack NAME --attackers SHARE` makes a share of the clients malicious, in both engines alike; who
they are follows from the seed (`fedkd.clients.attacks.malicious_clients`). In a deployment a node attacks
only if its own `--node-config` says so.

| attack | what a malicious client does |
|---|---|
| `label-flip` | trains on its images as class C − 1 − c, and answers what it has learnt |
| `random` | is sure of a class drawn for each sample |
| `constant` | is sure of one class, its own, for every sample |
| `least-likely` | is sure of the least likely class by what it received last (LMA, Roux et al. 2025) |
| `colluding` | is sure of a wrong class, which all malicious clients agree on |
| `little-is-enough` | stays within the spread of honest answers (Baruch et al. 2019) |

Attacks are pure functions on what a client sends, or on its labels, and know what a client can
know. What they send is a valid answer (finite, on the simplex): the checks of the server cannot see
it. Strategies that send class means or weights take `label-flip` alone.

Against them: `combine` of the strategies that average soft labels (`median`, `trimmed-mean`,
`geometric-median`), and the strategies [Cronus](strategies/cronus.md) and
[ExpGuard](strategies/expguard.md).

## Absurd numbers

What a client sends may be finite and yet useless: weights of 1e20, a negative variance of BatchNorm,
class means whose squares overflow. No bound decides this. The server tries it on 32 of its public
images (or one for each class, if there are more classes):

1. **Alone.** Weights are put into the model, whose logits and cross entropy must be finite. Soft
   labels and class means are what a client learns from in one step, from the initial model: losses
   and gradients must be finite. A client that fails is dropped.
2. **Together.** The round's new knowledge is loaded, or learnt from in two steps of each fit, by a
   client of each architecture (by up to 8 where each receives something else). Losses and gradients
   must be finite even if a million times as large, as clients have other images and take more steps;
   the server's model must be finite too. If not, clients are dropped in the order of their distance
   from the coordinate-wise median: the root mean square over all numbers. For weights, those that
   were sent out count as one client more. As few as possible are dropped, and fewer than half: where
   that does not help, nobody is, as training itself has diverged.

The record's `dropped` gives the reason, and the round is as if they had been silent. Large numbers
from which something can be learnt stay. What only makes training unstable, step by step, passes:
class means ten thousand times too large can drive plain SGD with a high learning rate to infinity
within two rounds.

## Measured

mnist-5k, ten clients (Dirichlet 1.0, 200 private images each on average), 400 unlabelled public
images, students `mlp-20`, five rounds of three local and three digest epochs, α = 0.9, τ = 1;
DS-FL's round with simple averages, but for Cronus, which trains on both sets at once. Mean test
accuracy in % of the **honest** clients after the last digest, mean ± standard deviation over
{seeds} seeds; {size:,} test images.

![accuracy of honest clients by the share of attackers](byzantine.svg)

{answer}

Of ten clients the z of `little-is-enough` is 0 at 10 % and 20 %, where liars repeat what they
received, 0.18 at 30 % and 0.43 at 40 %; in round 1, in which nothing has been received, it is
honest.

{tables}

    python simulations/byzantine_clients.py --write docs

Measured {measured}. Every seed's numbers: [byzantine.json](byzantine.json).
"""


def draw(table: Table, shares: Sequence[float], path: Path) -> None:
    """Write a figure as SVG: a panel for each attack, a line for each rule."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "fedkd"}):
        columns = 3
        figure = Figure(figsize=(11, 3.2 * -(-len(table) // columns)), layout="constrained")
        panels = figure.subplots(-(-len(table) // columns), columns, sharey=True, squeeze=False)
        for axes, (attack, rows) in zip(panels.flat, table.items(), strict=False):
            for number, (rule, cells) in enumerate(rows.items()):
                axes.errorbar(
                    [100 * share for share in shares],
                    [100 * mean(values) for values in cells],
                    [100 * stdev(values) if len(values) > 1 else 0.0 for values in cells],
                    color=COLOURS[number], marker=MARKERS[number], ms=5, capsize=3, label=rule,
                )  # fmt: skip
            axes.set(title=attack, xlabel="attackers in %")
            axes.grid(alpha=0.3)
        for axes in panels[:, 0]:
            axes.set_ylabel("accuracy of honest clients in %")
        for axes in panels.flat[len(table) :]:
            axes.set_axis_off()
        handles, names = panels.flat[0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside upper left", ncols=6, frameon=False)
        figure.savefig(path, metadata={"Date": None})


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, and write with ``--write``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="seconds instead of minutes")
    parser.add_argument("--write", type=Path, metavar="FOLDER", help="where page and figure go")
    chosen = parser.parse_args(arguments)
    base = BASE
    shares: tuple[float, ...] = SHARES
    seeds: tuple[int, ...] = SEEDS
    attacks = [name for name in ATTACKS if name != "none"]
    if chosen.smoke:
        base, shares, seeds = BASE.smoke().replace(evaluate_every=2), (0.0, 0.34), (0,)
        attacks = ["least-likely", "label-flip"]
    torch.set_num_threads(1)
    started = process_time()
    runs = len(attacks) * len(RULES) * len(shares) * len(seeds)
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("runs", total=runs)
        table, size = measure(base, attacks, shares, seeds, lambda: progress.advance(task))
    for attack, rows in table.items():
        print(markdown(attack, rows, shares), end="\n\n")
    print(answer(table, shares))
    if chosen.write is not None:
        chosen.write.mkdir(parents=True, exist_ok=True)
        measured = measured_on(started)
        text = json.dumps({"shares": shares, "measured": measured, "accuracy": table}, indent=1)
        (chosen.write / "byzantine.json").write_text(text + "\n", encoding="utf-8")
        filled = page(table, shares, size, len(seeds), measured)
        (chosen.write / "byzantine.md").write_text(filled, encoding="utf-8")
        draw(table, shares, chosen.write / "byzantine.svg")


if __name__ == "__main__":
    main()
