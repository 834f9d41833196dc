"""How few public images suffice?

2,000 private images of mnist-5k among ten clients (Dirichlet 0.3), students `mlp-20`, eight rounds, and
10 to 2,000 unlabelled public images. A digest makes about as many steps whatever the size, 60 a round
(batches of at most 64), so that a small public set is not also a shorter training. Three seeds. No
download; three minutes on one core:

    python simulations/how_few_public_images.py --write docs/questions
"""

from __future__ import annotations

from math import ceil

from simulations._questions import BASE, Cell, Grid, Question, Result, where

PRIVATE, STEPS = 2_000, 60
SIZES = (10, 30, 100, 300, 1_000, 2_000)
LOCAL = "local only"
FEDERATED = {"DS-FL": "DSFL", "FedMD": "FedMD"}


def grid() -> Grid:
    """Return every method with every public set."""
    points = {
        f"{size:,}": BASE.replace(
            train_size=PRIVATE + size,
            public_size=size,
            distill_epochs=round(STEPS / ceil(size / BASE.batch_size)),
        )
        for size in SIZES
    }
    methods = {LOCAL: "LocalOnly", **FEDERATED}
    return {
        n: {p: Cell(experiment, m) for p, experiment in points.items()} for n, m in methods.items()
    }


def answer(result: Result) -> str:
    """Return how few come within 2 points of the most, and where that is 10 points above local."""
    return " ".join(_sentence(result, method) for method in FEDERATED)


def _sentence(result: Result, method: str) -> str:
    points = result.points
    most, enough = points[-1], points[-1]
    for point in reversed(points):  # the fewest such that no larger set falls short either
        if result.gain(method, method, most, point).mean > 2:
            break
        enough = point
    suffices = (
        f"needs {most} public images, the most of the grid, for its {result.mean(method, most):.1f} %"
        if enough == most
        else f"is within 2 points of its {result.mean(method, most):.1f} % with {most} public images "
        f"from {enough} on"
    )
    beats = where(points, [result.gain(method, LOCAL, point).mean >= 10 for point in points])
    return f"{method} {suffices}; it beats local training by 10 points or more {beats}."


QUESTION = Question(
    name="how_few_public_images",
    question="How few public images suffice?",
    setting="2,000 private images of mnist-5k among ten clients (Dirichlet 0.3), `mlp-20`, eight rounds; "
    "about 60 digest steps a round for every size.",
    x="unlabelled public images",
    grid=grid,
    answer=answer,
)


if __name__ == "__main__":
    QUESTION.main(__doc__)
