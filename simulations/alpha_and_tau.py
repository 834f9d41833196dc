"""Which weight α and temperature τ of the soft labels, and how much does it matter?

FedMD on mnist-5k: ten clients (Dirichlet 0.3), 800 unlabelled public images, students `mlp-20`, eight
rounds. The digest is α·τ²·KL(soft labels) + (1 − α)·CE, the CE on private images as the public set has
no labels. Test accuracy of the whole grid, three seeds: a description, not a choice; to choose a pair,
hold out training images. No download; five minutes on one core:

    python simulations/alpha_and_tau.py --write docs/questions
"""

from __future__ import annotations

from collections.abc import Sequence

from simulations._questions import BASE, Cell, Grid, Question, Result

ALPHAS = (0.1, 0.3, 0.6, 0.9, 1.0)
TAUS = (1.0, 2.0, 5.0, 10.0, 20.0)


def grid() -> Grid:
    """Return FedMD at every pair."""
    return {
        f"α = {alpha:g}": {
            f"{tau:g}": Cell(BASE.replace(alpha=alpha, tau=tau), "FedMD") for tau in TAUS
        }
        for alpha in ALPHAS
    }


def answer(result: Result) -> str:
    """Return how far apart the pairs are, and which are within a point of the best."""
    pairs = [(line, point) for line in result.lines for point in result.points]
    means = {pair: result.mean(*pair) for pair in pairs}
    best, worst = max(means, key=means.__getitem__), min(means, key=means.__getitem__)
    near = [means[best] - means[pair] <= 1 for pair in pairs]
    by_tau, by_alpha = _spread(result, along="tau"), _spread(result, along="alpha")
    inner = best[0] in list(result.lines)[1:-1] and best[1] in result.points[1:-1]
    return (
        f"From the worst pair to the best of the grid it is {means[worst]:.1f} % "
        f"({_named(worst)}) to {means[best]:.1f} % ({_named(best)}"
        f"{'' if inner else ', at the edge of the grid'}); within one point of the best are "
        f"{sum(near)} of {len(pairs)} pairs{_which(pairs, near)}; averaged over the other, τ moves the "
        f"accuracy by {by_tau:.1f} points and α by {by_alpha:.1f}."
    )


def _named(pair: tuple[str, str]) -> str:
    return f"{pair[0]}, τ = {pair[1]}"


def _which(pairs: Sequence[tuple[str, str]], near: Sequence[bool]) -> str:
    """Return the pairs in words where they are few."""
    named = [_named(pair) for pair, holds in zip(pairs, near, strict=True) if holds]
    return f" ({'; '.join(named)})" if len(named) <= 4 else ""


def _spread(result: Result, *, along: str) -> float:
    """Return largest minus smallest mean accuracy along one key, averaged over the other."""
    rows = [[result.mean(line, point) for point in result.points] for line in result.lines]
    columns = rows if along == "alpha" else list(zip(*rows, strict=True))
    means = [sum(values) / len(values) for values in columns]
    return max(means) - min(means)


QUESTION = Question(
    name="alpha_and_tau",
    question="Which α and τ, and how much do they matter?",
    setting="FedMD on mnist-5k, ten clients (Dirichlet 0.3), 800 unlabelled public images, `mlp-20`, "
    "eight rounds.",
    x="temperature τ",
    grid=grid,
    answer=answer,
)


if __name__ == "__main__":
    QUESTION.main(__doc__)
