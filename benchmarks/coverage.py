"""Measure how often the interval that `fedkd compare` prints holds the true difference.

Seeds whose differences are normal or skewed, or of which one in ten collapses. Minutes on one core.

    python benchmarks/coverage.py > benchmarks/results/coverage.md
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from fedkd.studies.comparison.differences import difference
from fedkd.studies.comparison.entries import Entry

TRIES, CLIENTS, TRUE = 10_000, 10, 0.04
SEEDS = (3, 5, 6, 10, 20)

Draw = Callable[[np.random.Generator, int], np.ndarray]
"""Draws the effect of so many seeds and clients on a method's accuracy, ``[S, K]``; its mean is 0."""


def normal(between: float, within: float) -> Draw:
    """Return normal effects of seeds and of clients, with these standard deviations."""

    def draw(chance: np.random.Generator, seeds: int) -> np.ndarray:
        clients = chance.normal(0, within, (seeds, CLIENTS))
        return chance.normal(0, between, (seeds, 1)) + clients

    return draw


def skewed(chance: np.random.Generator, seeds: int) -> np.ndarray:
    """Draw effects of seeds with an exponential tail to worse accuracies."""
    return 0.03 * (1 - chance.exponential(1, (seeds, 1))) + np.zeros(CLIENTS)


def collapsing(chance: np.random.Generator, seeds: int) -> np.ndarray:
    """Draw normal effects of seeds, of which one in ten loses 40 points."""
    lost = chance.random((seeds, 1)) < 0.1
    return chance.normal(0, 0.02, (seeds, 1)) - 0.4 * lost + 0.04 + np.zeros(CLIENTS)


LAWS: dict[str, tuple[Draw, Draw]] = {
    "normal, seeds matter": (normal(0.03, 0), normal(0.03, 0)),
    "normal, clients matter too": (normal(0.02, 0.04), normal(0.02, 0.04)),
    "skewed, ours alone": (skewed, normal(0.005, 0)),
    "one in ten of ours collapses": (collapsing, normal(0.02, 0)),
}
"""The effects on ours and on theirs."""


def entry_of(accuracies: np.ndarray) -> Entry:
    """Return a method with these accuracies by seed and client."""
    rows = accuracies.tolist()
    return Entry("DSFL", accuracies.mean(1).tolist(), rows, 0, None, 1, 1, 1.0)


def coverage(ours: Draw, theirs: Draw, seeds: int) -> float:
    """Return the share of experiments whose interval holds the true difference."""
    chance = np.random.default_rng(seeds)
    held = 0
    for _ in range(TRIES):
        shards = chance.normal(0.7, 0.1, (seeds, 1))
        found = difference(
            entry_of(shards + TRUE + ours(chance, seeds)), entry_of(shards + theirs(chance, seeds))
        )
        assert found.low is not None
        assert found.high is not None
        held += found.low <= TRUE <= found.high
    return held / TRIES


def table() -> Iterator[str]:
    """Yield the lines of a table in Markdown."""
    yield f"Share of {TRIES:,} simulated comparisons whose 95 % interval holds the true difference.\n"
    yield f"| seeds | {' | '.join(LAWS)} |"
    yield f"|---|{'---:|' * len(LAWS)}"
    for seeds in SEEDS:
        cells = [f"{100 * coverage(*law, seeds):.1f} %" for law in LAWS.values()]
        yield f"| {seeds} | {' | '.join(cells)} |"


if __name__ == "__main__":
    for line in table():
        print(line, flush=True)
