"""Can clients with different networks learn from each other without sharing weights?

CIFAR-10, six clients of which two each have a small CNN, a LeNet and a ResNet-8 (Dirichlet 0.5), and
5,000 unlabelled public images. FedMD exchanges logits, and is compared with every client alone; FedAvg
could only average equal networks. Needs CIFAR-10 (downloaded once, or in $FEDKD_DATA_DIR); hours on two
cores, minutes on a GPU.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from statistics import mean

from rich.console import Console
from rich.table import Table

import fedkd
from fedkd.records import Row, Run
from fedkd.records.callbacks import EachRound

EXPERIMENT = fedkd.Experiment(
    dataset="cifar10",
    public_size=5_000,
    public_labels=False,
    num_clients=6,
    partition="dirichlet",
    partition_alpha=0.5,
    student="cnn,lenet,resnet-8",
    num_server_rounds=10,
    alpha=0.9,
    tau=3.0,
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run both and print the accuracies by architecture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="seconds instead of hours")
    experiment = EXPERIMENT.smoke() if parser.parse_args(arguments).smoke else EXPERIMENT
    console = Console()

    def show(row: Row) -> None:
        console.print(
            f"round {row['round']}: {100 * row['accuracy_after_revisit']:.1f} % on average"
        )

    runs = {}
    for label, strategy in (("local only", "LocalOnly"), ("FedMD", "FedMD")):
        console.print(f"{label} ...")
        runs[label] = fedkd.run(experiment.replace(strategy=strategy), [EachRound(show)])
    console.print(_table(experiment, runs))


def _table(experiment: fedkd.Experiment, runs: dict[str, Run]) -> Table:
    table = Table(title="Test accuracy of the students in %, mean over the clients of a network")
    table.add_column("network")
    for label in runs:
        table.add_column(label, justify="right")
    table.add_column("gain", justify="right")
    for network in experiment.student.split(","):
        means = [100 * _mean_of(experiment, run, network) for run in runs.values()]
        table.add_row(network, *(f"{m:.1f}" for m in means), f"{means[-1] - means[0]:+.1f}")
    return table


def _mean_of(experiment: fedkd.Experiment, run: Run, network: str) -> float:
    return mean(
        accuracy
        for client, accuracy in enumerate(run.client_accuracy)
        if accuracy is not None and experiment.student_of(client) == network
    )


if __name__ == "__main__":
    main()
