"""Do clients of mixed architectures learn as well from each other as clients that are all alike?

mnist-5k, nine clients (Dirichlet 0.3), 800 unlabelled public images, eight rounds. Three networks: a
linear one (7,850 parameters), `mlp-20` (16,330) and a small convolutional one (5,338, defined here). All
clients have one of them, or three clients each have each. DS-FL and FedMD beside local training, three
seeds; the mixture's clients also by network. No download; four minutes on one core:

    python simulations/mixed_architectures.py --write docs/questions
"""

from __future__ import annotations

from torch import nn

from fedkd.training.models import Classifier, InputShape
from simulations._questions import BASE, Cell, Grid, Question, Result, listed, whole

MODULE = "simulations.mixed_architectures"
NETWORKS = {
    "linear": f"{MODULE}:linear",
    "mlp-20": "mlp-20",
    "convolutional": f"{MODULE}:small_cnn",
}
FEDERATED = {"DS-FL": "DSFL", "FedMD": "FedMD"}
MIXED = "mixed"


def linear(shape: InputShape, num_classes: int) -> nn.Module:
    """Return multinomial logistic regression."""
    return Classifier(nn.Flatten(), nn.Linear(shape[0] * shape[1] * shape[2], num_classes))


def small_cnn(shape: InputShape, num_classes: int) -> nn.Module:
    """Return one convolution of 8 filters, 5×5 in steps of 3, ReLU and a linear layer."""
    rows, columns = ((side - 5) // 3 + 1 for side in shape[1:])
    body = nn.Sequential(nn.Conv2d(shape[0], 8, 5, stride=3), nn.ReLU(), nn.Flatten())
    return Classifier(body, nn.Linear(8 * rows * columns, num_classes))


def grid() -> Grid:
    """Return every method with each network for all and with all three, also by third of clients."""
    base = BASE.replace(num_clients=9)
    mixed = base.replace(student=",".join(NETWORKS.values()))
    alike = {name: base.replace(student=student) for name, student in NETWORKS.items()}
    grid: dict[str, dict[str, Cell]] = {}
    for line, method in {"local only": "LocalOnly", **FEDERATED}.items():
        row = {f"all {name}": Cell(experiment, method) for name, experiment in alike.items()}
        row[MIXED] = Cell(mixed, method)
        for number, (name, experiment) in enumerate(alike.items()):
            third = slice(number, None, len(NETWORKS))
            row[f"{name} third, all alike"] = Cell(experiment, method, third)
            row[f"{name} third, {MIXED}"] = Cell(mixed, method, third)
        grid[line] = row
    return grid


def answer(result: Result) -> str:
    """Return how the mixture compares with each network for all, and what its thirds gain or lose."""
    return " ".join(_sentence(result, method) for method in FEDERATED)


def _sentence(result: Result, method: str) -> str:
    means = {name: result.mean(method, f"all {name}") for name in NETWORKS}
    best, worst = max(means, key=means.__getitem__), min(means, key=means.__getitem__)
    gains = [result.gain(method, method, MIXED, f"all {name}") for name in (best, worst)]
    thirds = [
        f"{result.gain(method, method, f'{n} third, {MIXED}', f'{n} third, all alike').words} ({n})"
        for n in NETWORKS
    ]
    return (
        f"With {method} the mixture ends {gains[0].words} the best network for all ({best}) and "
        f"{gains[1].words} the worst ({worst}); its thirds end {listed(thirds)} themselves among "
        "their own kind."
    )


QUESTION = Question(
    name="mixed_architectures",
    question="Mixed architectures, or the best one for all?",
    setting="mnist-5k, nine clients (Dirichlet 0.3), 800 unlabelled public images, eight rounds. All "
    "clients have a linear network (7,850 parameters), `mlp-20` (16,330) or a small convolutional one "
    "(5,338), or three clients each have each.",
    x="networks",
    grid=grid,
    ordered=False,
    smoke=whole,
    answer=answer,
)


if __name__ == "__main__":
    QUESTION.main(__doc__)
