"""How non-IID must it get before federated distillation beats local training by 10 points?

mnist-5k, ten clients of about 320 images, 800 unlabelled public images, students `mlp-20`, eight rounds
of 5 local and 5 digest epochs. The shards go from IID over Dirichlet 10 to 0.05. Local training alone,
DS-FL (mean of probabilities, sharpened), FedMD (mean of logits) and FedAvg, tested on all classes alike
and on each client's own mix of classes; three seeds. No download; three minutes on one core:

    python simulations/how_non_iid.py --write docs/questions
"""

from __future__ import annotations

from simulations._questions import BASE, Cell, Grid, Question, Result, where

ALPHAS = (10, 1, 0.3, 0.1, 0.05)
LOCAL = "local only"
OWN = ", own mix"
FEDERATED = {"DS-FL": "DSFL", "FedMD": "FedMD"}
METHODS = {LOCAL: "LocalOnly", **FEDERATED, "FedAvg": "FedAvg"}


def grid() -> Grid:
    """Return every method at every skew."""
    points = {"IID": BASE.replace(partition="iid")}
    points |= {f"α = {alpha:g}": BASE.replace(partition_alpha=alpha) for alpha in ALPHAS}
    lines = {n: {p: Cell(e, m) for p, e in points.items()} for n, m in METHODS.items()}
    for line in (LOCAL, *FEDERATED):
        lines[line + OWN] = {p: cell._replace(own_mix=True) for p, cell in lines[line].items()}
    return lines


def answer(result: Result) -> str:
    """Return where each of the two gains 10 points, and how much of it on a client's own mix."""
    return " ".join(_sentence(result, method) for method in FEDERATED)


def _sentence(result: Result, method: str) -> str:
    points = result.points
    gains = [result.gain(method, LOCAL, point) for point in points]
    on_own_mix = [result.gain(method + OWN, LOCAL + OWN, point) for point in points]
    return (
        f"{method} beats local training by 10 points or more "
        f"{where(points, [gain.mean >= 10 for gain in gains])} "
        f"({gains[0]} points at {points[0]}, {gains[-1]} at {points[-1]}); tested on its own mix of "
        f"classes a client is a point or more worse off than alone "
        f"{where(points, [gain.mean <= -1 for gain in on_own_mix])} "
        f"({on_own_mix[0]} points at {points[0]}, {on_own_mix[-1]} at {points[-1]})."
    )


QUESTION = Question(
    name="how_non_iid",
    question="How non-IID must it get before distillation beats local training by 10 points?",
    setting="mnist-5k, ten clients, 800 unlabelled public images, `mlp-20`, eight rounds; shards IID, or "
    "Dirichlet with concentration α (small is more skewed). Own mix: test images weighted as a "
    "client's own classes are; DS-FL's students end with a digest, FedMD's and local ones on the shard.",
    x="shards",
    grid=grid,
    answer=answer,
)


if __name__ == "__main__":
    QUESTION.main(__doc__)
