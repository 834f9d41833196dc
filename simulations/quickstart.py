"""Is federated distillation worth it? Central, alone and federated on the same 5,000 MNIST images.

Ten clients hold 3,200 images between them, unevenly (Dirichlet 0.3), and share 800 unlabelled ones. Each
has a small student and a bigger local teacher. The federation runs twice, as Flower clients on Ray and
on the in-process engine, to show the same accuracies and the two times. No download; under three
minutes on two cores.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from time import monotonic

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

import fedkd
from fedkd.losses import effective_weights
from fedkd.records import Run
from fedkd.reports.plots.curves import accuracy_by_round
from fedkd.studies.comparison.result import Comparison

EXPERIMENT = fedkd.Experiment(
    dataset="mnist-5k",
    public_labels=False,
    num_clients=10,
    partition="dirichlet",
    partition_alpha=0.3,
    student="mlp-20",
    teacher="mlp-256",
    strategy="DSFL",
    num_server_rounds=10,
    device="cpu",  # where both engines run, so that the numbers can be equal
    local_epochs=1,
    distill_epochs=3,
    alpha=0.9,
    tau=3.0,
)


def main() -> None:
    """Run everything and print one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="seconds instead of minutes")
    experiment = EXPERIMENT.smoke() if parser.parse_args().smoke else EXPERIMENT
    console = Console(width=100)
    console.print(_introduction(experiment))

    comparison = fedkd.compare(
        experiment,
        ["teacher", "student-alone", "student-distilled", "local-only", "FedAvg", "DSFL"],
        progress=_Progress(console),
    )
    cohort = comparison.runs["DSFL"][0]
    console.print("The same federation as Flower clients on Ray ...")
    started = monotonic()
    # With the plan that was measured for the first engine: another one rounds differently.
    flower = fedkd.run(experiment.replace(engine="flower", plan=cohort.experiment.plan))
    seconds = monotonic() - started

    console.print(comparison.table())
    console.print(_engines(cohort, flower, seconds))
    figure = accuracy_by_round(_curves(comparison), _lines(comparison), Path("quickstart.svg"))
    console.print(f"Accuracy by round: {figure}\nRecords: {cohort.path.parent}/")
    gap = max(
        abs(a - b)
        for a, b in zip(cohort.client_accuracy, flower.client_accuracy, strict=True)
        if a is not None and b is not None
    )
    console.print(f"Largest difference of a client between the engines: {100 * gap:.2f} points")


def _introduction(experiment: fedkd.Experiment) -> str:
    weights = effective_weights(experiment.alpha, experiment.tau, experiment.kl_reduction, 10)
    return (
        f"{experiment.num_clients} clients, students {experiment.student}, local teachers "
        f"{experiment.teacher}; a student's loss is {weights} (KL to the received soft labels on public "
        "images, CE on private ones)."
    )


class _Progress:
    """Prints each description of the current work once."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._last = ""

    def __call__(self, description: str, share: float) -> None:
        if description != self._last:
            self._last = description
            self._console.print(f"Training: {description} ...")


def _engines(cohort: Run, flower: Run, flower_seconds: float) -> Table:
    table = Table(title="One federation (DSFL), two engines", box=SIMPLE_HEAD, pad_edge=False)
    for name in ("engine", "accuracy", "worst", "best", "up", "seconds"):
        table.add_column(name, justify="left" if name == "engine" else "right")
    for name, run, seconds in (
        ("in process (cohort)", cohort, float(cohort.result["seconds"])),
        ("Flower on Ray (flower)", flower, flower_seconds),
    ):
        clients = [a for a in run.client_accuracy if a is not None]
        table.add_row(
            name,
            f"{100 * run.accuracy:.2f}",
            f"{100 * min(clients):.2f}",
            f"{100 * max(clients):.2f}",
            f"{run.bytes_up:,} B",
            f"{seconds:.1f}",
        )
    return table


def _curves(comparison: Comparison) -> dict[str, list[tuple[int, float]]]:
    """Return a curve per federated method, by the round whose knowledge the students hold."""
    ds_fl, fed_avg, local = (comparison.runs[m][0] for m in ("DSFL", "FedAvg", "LocalOnly"))
    digested = [row for row in ds_fl.rounds if row["knowledge_round"]]
    return {
        "DSFL": [
            *((row["knowledge_round"], row["accuracy_after_digest"]) for row in digested),
            (len(ds_fl.rounds), ds_fl.accuracy),  # the last knowledge is digested in the closing
        ],
        "FedAvg": [(row["round"], row["server_accuracy"]) for row in fed_avg.rounds],
        "local only": [(row["round"], row["accuracy_after_revisit"]) for row in local.rounds],
    }


def _lines(comparison: Comparison) -> dict[str, float]:
    return {e.label: e.accuracy for e in comparison.entries if e.bytes_up is None}


if __name__ == "__main__":
    main()
