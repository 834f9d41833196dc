"""Is my own strategy any good? The file to copy: a strategy, and what it is compared with.

5,000 real MNIST images, ten clients (Dirichlet 0.3) and 800 unlabelled public images: local training
alone, DS-FL, and the strategy below. No download; a quarter of a minute on one core.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from rich.console import Console
from rich.progress import Progress
from torch import Tensor

import fedkd
from fedkd.strategy import Facts, Positive

EXPERIMENT = fedkd.Experiment(
    dataset="mnist-5k",
    public_labels=False,
    num_clients=10,
    partition="dirichlet",
    partition_alpha=0.3,
    student="mlp-20",
    num_server_rounds=10,
    distill_epochs=3,
    alpha=0.9,
    tau=3.0,
)


class Confident(fedkd.DistillationStrategy):
    """Clients count more for samples they are more confident of: weights max_c p_c ^ power."""

    facts = Facts(paper="none", up="P*C*4", down="P*C*4 + 2*I")

    power: Positive = 1.0

    def aggregate(self, labels: fedkd.SoftLabels) -> Tensor:
        """Return weighted mean logits, [K, N, C] -> [N, C]; clients without an answer have weight 0."""
        confidence = labels.probabilities.amax(-1, keepdim=True) ** self.power
        weight = confidence * labels.mask.unsqueeze(-1)
        return (weight * labels.values).sum(0) / weight.sum(0)


def main(arguments: Sequence[str] | None = None) -> None:
    """Compare and print one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--smoke", action="store_true", help="seconds instead of a quarter of a minute"
    )
    smoke = parser.parse_args(arguments).smoke
    console = Console()
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("", total=1.0)
        comparison = fedkd.compare(
            EXPERIMENT.smoke() if smoke else EXPERIMENT,
            ["LocalOnly", "DSFL", f"{__name__}:Confident"],
            progress=lambda what, share: progress.update(task, description=what, completed=share),
        )
    console.print(comparison.table())


if __name__ == "__main__":
    main()
