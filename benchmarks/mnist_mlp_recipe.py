"""Show why the recipe of ``--preset mnist-mlp`` does not help its student, one change at a time.

Trains the recipe's teacher (dropout 0.8) and one without dropout, then students that differ only in α, τ
and reduction, all as one cohort from the same initial weights on the same batches, over three seeds.
Prints a Markdown table. About half an hour on one core; needs MNIST.

    python benchmarks/mnist_mlp_recipe.py > benchmarks/results/mnist_mlp_recipe.md
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from statistics import mean, stdev
from time import monotonic

import torch
from torch import Tensor

from fedkd.cli.presets import mnist_mlp
from fedkd.data.federated import FederatedData, federated_data
from fedkd.losses import ce, kl
from fedkd.training.architectures import architectures_of
from fedkd.training.batches import BatchStream
from fedkd.training.cohort import Cohort
from fedkd.training.optimizers import OptimizerSettings

SEEDS = (0, 1, 2)
TEACHERS = ("mlp-1200", "mlp-800")
POINTS = {  # (weight of KL·τ², weight of CE, τ)
    "alone: α = 0": (0.0, 1.0, 1.0),
    "recipe: α = 0.7, τ = 5": (0.7, 0.3, 5.0),
    "its listing: KL / 10": (0.07, 0.3, 5.0),
    "α = 0.7, τ = 2": (0.7, 0.3, 2.0),
    "α = 0.7, τ = 1": (0.7, 0.3, 1.0),
    "α = 0.3, τ = 5": (0.3, 0.7, 5.0),
    "α = 0.7, τ = 20": (0.7, 0.3, 20.0),
}


def cohort(data: FederatedData, name: str, seeds: Sequence[int]) -> Cohort:
    """Return one model a seed, from the initial weights of the preset, as a cohort."""
    architectures = architectures_of(data)
    states = [architectures.initial_state(name, seed) for seed in seeds]
    return Cohort.of(architectures.model(name), states, architectures.plan(name, "auto"))


def train(
    models: Cohort,
    batch_stream: BatchStream,
    epochs: int,
    what: str,
    numbers: dict[str, float | Tensor],
) -> None:
    """Train models as the preset does, on its random streams."""
    copies = len(models) // len(SEEDS)
    started = monotonic()
    models.fit(
        [batch_stream],
        epochs=epochs,
        batch_size=64,
        optimizer=OptimizerSettings("adam", 1e-3),
        streams=[(seed, "central", what) for seed in SEEDS * copies],
        numbers=numbers,
    )
    print(f"{what}: {monotonic() - started:.0f} s", file=sys.stderr, flush=True)


def accuracies(models: Cohort, data: FederatedData) -> list[float]:
    """Return test accuracy in percent, one a model."""
    assert data.test.labels is not None
    right = models.classify(data.test) == data.test.labels
    return [100 * float(a) for a in right.double().mean(1)]


def main() -> None:
    """Measure and print."""
    experiment = mnist_mlp()
    data = federated_data(experiment)
    rows = data.pooled
    print("# The recipe of mnist-mlp, one change at a time\n")
    print(f"MNIST, {len(data.test):,} test images, seeds {SEEDS}, mean ± std (n − 1) in %.\n")
    print("| teacher | its accuracy | its entropy at τ = 5, bits | student | accuracy | agrees |")
    print("|---|---|---|---|---|---|")
    for name in TEACHERS:
        teachers = cohort(data, name, SEEDS)
        batch_stream = BatchStream("pooled", data.train, [rows] * len(SEEDS), {ce: 1.0})
        train(teachers, batch_stream, experiment.local_epochs, "teacher", {})
        logits = teachers.predict(data.train, rows)
        report(data, name, teachers, logits, experiment.distill_epochs)


def report(data: FederatedData, name: str, teachers: Cohort, logits: Tensor, epochs: int) -> None:
    """Distil one teacher in every way and print a row for each."""
    points = list(POINTS.values())
    soft, hard, tau = (
        torch.tensor([p[i] for p in points for _ in SEEDS], dtype=torch.float32) for i in range(3)
    )
    students = cohort(data, "mlp-20", SEEDS * len(points))
    batch_stream = BatchStream(
        "pooled",
        data.train,
        [data.pooled] * len(students),
        {kl: soft, ce: hard},
        logits.repeat(len(points), 1, 1),
    )
    train(students, batch_stream, epochs, "students", {"tau": tau})
    log_p = (logits / 5).log_softmax(-1)
    entropy = float(-(log_p.exp() * log_p).sum(-1).mean()) / 0.6931471805599453
    taught = teachers.classify(data.test)
    agreement = (students.classify(data.test) == taught.repeat(len(points), 1)).double().mean(1)
    mine = accuracies(students, data)
    teacher = spread(accuracies(teachers, data))
    for i, label in enumerate(POINTS):
        part = slice(i * len(SEEDS), (i + 1) * len(SEEDS))
        agrees = 100 * float(agreement[part].mean())
        print(
            f"| {name} | {teacher} | {entropy:.2f} | {label} | {spread(mine[part])} | {agrees:.1f} |",
            flush=True,
        )


def spread(values: Sequence[float]) -> str:
    """Return mean ± standard deviation as text."""
    return f"{mean(values):.2f} ± {stdev(values):.2f}"


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
