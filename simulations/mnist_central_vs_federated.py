"""How close does federated distillation come to central distillation, and what does it send?

All of MNIST, ten clients (Dirichlet 0.3), 10,000 unlabelled public images. Central teacher and student,
the students alone, FedAvg, FedMD and DS-FL on the same images, over three seeds. Needs MNIST (downloaded
once, or in $FEDKD_DATA_DIR); seven minutes on one core.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from rich.console import Console
from rich.progress import Progress

import fedkd

EXPERIMENT = fedkd.Experiment(
    dataset="mnist",
    public_size=10_000,
    public_labels=False,
    num_clients=10,
    partition="dirichlet",
    partition_alpha=0.3,
    student="mlp-20",
    teacher="mlp-64",
    num_server_rounds=10,
    distill_epochs=2,
    alpha=0.9,
    tau=3.0,
)
SEEDS = (0, 1, 2)


def main(arguments: Sequence[str] | None = None) -> None:
    """Compare and print one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="seconds instead of minutes")
    smoke = parser.parse_args(arguments).smoke
    console = Console(width=100)
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("", total=1.0)
        comparison = fedkd.compare(
            EXPERIMENT.smoke() if smoke else EXPERIMENT,
            seeds=SEEDS[:1] if smoke else SEEDS,
            progress=lambda what, share: progress.update(task, description=what, completed=share),
        )
    console.print(comparison.table())


if __name__ == "__main__":
    main()
