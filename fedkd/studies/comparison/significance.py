"""Uncertainty of the difference of two methods: a bootstrap over seeds and clients, and an exact test.

Pure functions of numbers; `docs/compare.md` states what they cover and what they do not.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fedkd.randomness import key

DRAWS = 10_000
"""Resamples behind an interval."""

LEVEL = 0.95
"""Share of the resampled means inside an interval."""

_MOST_NUMBERS = 4_000_000
"""Numbers drawn at a time, 32 MB of them: there may be thousands of clients."""

Floats = NDArray[np.float64]


def paired(ours: Sequence[Floats], theirs: Sequence[Floats]) -> list[Floats]:
    """Return the differences of two methods client by client: equal numbers have the same data.

    Args:
        ours: by seed the accuracies ``[K]`` of a federation's clients, NaN of one that did not answer,
            or ``[1]`` of a central model, which is paired with every client.
        theirs: the other method's, likewise.

    Returns:
        By seed the differences of the clients that answered in both; a seed without any has none.
    """
    differences = (a - b for a, b in zip(ours, theirs, strict=True))
    return [each[~np.isnan(each)] for each in differences]


def mean_difference(differences: Sequence[Floats]) -> float:
    """Return the mean over seeds of the mean over a seed's clients."""
    return float(np.mean([each.mean() for each in differences]))


def bootstrap(differences: Sequence[Floats]) -> tuple[float, float] | None:
    """Return the percentile interval of `mean_difference` under a two-stage bootstrap.

    Seeds are drawn with replacement, then, independently for each drawn seed, as many of its clients
    as it has (Davison and Hinkley 1997, section 3.8). As differences are drawn, both methods see the
    same draws. The same numbers give the same interval: the draws have a fixed seed.

    Args:
        differences: `paired` ones by seed; each seed has at least one.

    Returns:
        The ends, or `None` for one seed whose differences are all equal: they show nothing about chance.
    """
    if len(differences) == 1 and np.ptp(differences[0]) == 0:
        return None
    chance = np.random.default_rng(key("bootstrap"))
    seeds = chance.integers(len(differences), size=(DRAWS, len(differences)))
    means = np.zeros(DRAWS)
    for number, each in enumerate(differences):
        times_drawn = (seeds == number).sum(1)
        owners = np.repeat(np.arange(DRAWS), times_drawn)
        drawn = _resampled_means(chance, each, len(owners))
        means += np.bincount(owners, weights=drawn, minlength=DRAWS)
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(means / len(differences), (tail, 1 - tail))
    return float(low), float(high)


def _resampled_means(chance: np.random.Generator, values: Floats, count: int) -> Floats:
    """Return the means of `count` samples of `values`, as large as it and with replacement."""
    at_once = max(1, _MOST_NUMBERS // len(values))
    means = np.empty(count)
    for begin in range(0, count, at_once):
        part = means[begin : begin + at_once]
        part[:] = values[chance.integers(len(values), size=(len(part), len(values)))].mean(1)
    return means


def images_won(ours: NDArray[np.bool_], theirs: NDArray[np.bool_]) -> tuple[int, int]:
    """Return on how many test images a larger share of one method's models is right.

    Args:
        ours: whether each model is right on each image, ``[M, N]``; models of all seeds and clients.
        theirs: the other method's, ``[L, N]``, of the same images.

    Returns:
        How many images `ours` wins, and how many `theirs` wins; the others are ties.
    """
    # Integers, so that equal shares compare as equal.
    margin = ours.sum(0) * len(theirs) - theirs.sum(0) * len(ours)
    return int((margin > 0).sum()), int((margin < 0).sum())


def sign_test(won: int, lost: int) -> float:
    """Return the two-sided p-value of as uneven a split, were each side equally likely.

    With one model each this is McNemar's exact test (1947) on the images that one of them gets right.
    """
    count = won + lost
    term = total = 1  # binomial coefficients, exact
    for number in range(min(won, lost)):
        term = term * (count - number) // (number + 1)
        total += term
    return min(1.0, float(2 * total / 2**count))
