"""What if the public set comes from another distribution?

Private images of mnist-5k or Fashion-MNIST (3,200 among ten clients, Dirichlet 0.3), and 800 unlabelled
public images: held-out ones of the same data set, of the other one, or noise (independent uniform
pixels). Students `mlp-20`, eight rounds, DS-FL and FedMD; three seeds. Needs Fashion-MNIST and MNIST
(downloaded once, or in $FEDKD_DATA_DIR), with `--smoke` neither; three minutes on one core:

    python simulations/foreign_public_set.py --write docs/questions
"""

from __future__ import annotations

from pathlib import Path

import torch

from fedkd.data import Dataset
from simulations._questions import BASE, Cell, Grid, Question, Result, listed, only

PRIVATE = {"MNIST": "mnist-5k", "Fashion": "fashion-mnist"}
OTHER = {"MNIST": "fashion-mnist", "Fashion": "mnist"}
NOISE = "simulations.foreign_public_set:noise"
LOCAL = "local only"
FEDERATED = {"DS-FL": "DSFL", "FedMD": "FedMD"}


def noise(folder: Path | None = None) -> Dataset:
    """Return images without content: independent uniform pixels, 1×28×28, with no true labels."""
    drawn = torch.randint(
        256, (1_010, 1, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    labels = torch.arange(1_010) % 10
    names = tuple(map(str, range(10)))
    parts = (drawn[:1_000], labels[:1_000], drawn[1_000:], labels[1_000:])
    return Dataset("noise", *parts, names, (0.5,), (0.289,))


def grid() -> Grid:
    """Return every method on both data sets with three public sets each."""
    points = {}
    for name, dataset in PRIVATE.items():
        base = BASE.replace(dataset=dataset, public_size=800, test_size=1_000)
        points[f"{name}, own"] = base.replace(train_size=4_000)
        points[f"{name}, other"] = base.replace(train_size=3_200, public=OTHER[name])
        points[f"{name}, noise"] = base.replace(train_size=3_200, public=NOISE)
    methods = {LOCAL: "LocalOnly", **FEDERATED}
    return {
        n: {p: Cell(experiment, m) for p, experiment in points.items()} for n, m in methods.items()
    }


def answer(result: Result) -> str:
    """Return what each public set gains over local training, and its share of the best kind's gain."""
    names = list(dict.fromkeys(point.split(", ")[0] for point in result.points))
    return " ".join(_sentence(result, m, name) for m in FEDERATED for name in names)


def _sentence(result: Result, method: str, name: str) -> str:
    same = result.gain(method, LOCAL, f"{name}, own")
    parts = [f"{same.words} local training with public images of its own kind"]
    for public, text in (("other", "those of the other data set"), ("noise", "noise")):
        if (point := f"{name}, {public}") in result.points:
            gain = result.gain(method, LOCAL, point)
            share = f" ({100 * gain.mean / same.mean:.0f} % of that)" if same.mean > 0 else ""
            parts.append(f"{gain.words} it with {text}{share}")
    return f"{method} on {name} ends {listed(parts)}."


QUESTION = Question(
    name="foreign_public_set",
    question="What if the public set comes from another distribution?",
    setting="3,200 private images of mnist-5k or Fashion-MNIST among ten clients (Dirichlet 0.3), "
    "`mlp-20`, eight rounds, 800 unlabelled public images: of the same data set (own), of the other "
    "one, or uniform noise.",
    x="private images, public set",
    grid=grid,
    ordered=False,
    answer=answer,
    smoke=only("MNIST, own", "MNIST, noise"),
)


if __name__ == "__main__":
    QUESTION.main(__doc__)
