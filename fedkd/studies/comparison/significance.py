"""How sure a difference of two methods is. The unit is the seed, and both methods have the same seeds.

Pure functions of numbers; `docs/compare.md` states what they cover and what they do not.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from math import sqrt

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, stats

ERROR = 0.05
"""Share of experiments without a difference in which a test finds one."""

LEVEL = 1 - ERROR
"""Share of experiments whose interval holds the true difference."""

POWER = 0.8
"""Chance with which a test finds what `detectable` says."""

LEAST_SEEDS = 3
"""Seeds that an interval takes; with fewer the spread over seeds is not known."""

MOST_FLIPPED = 16
"""Seeds whose signs are flipped in all 2ⁿ ways."""

Floats = NDArray[np.float64]


def paired(ours: Sequence[Floats], theirs: Sequence[Floats]) -> list[float]:
    """Return the difference of two methods by seed: the mean over clients that answered in both.

    Args:
        ours: by seed the accuracies ``[K]`` of a federation's clients, NaN of one that did not answer,
            or ``[1]`` of a central model, which is paired with every client.
        theirs: the other method's, likewise; equal numbers have the same data.

    Returns:
        One number a seed; a seed in which nobody answered in both has none.
    """
    differences = (a - b for a, b in zip(ours, theirs, strict=True))
    known = (each[~np.isnan(each)] for each in differences)
    return [float(each.mean()) for each in known if len(each)]


def interval(differences: Sequence[float]) -> tuple[float, float] | None:
    """Return the 95 % interval of the mean: mean ± t·s/√n, t of n − 1 degrees of freedom.

    Args:
        differences: paired ones, one a seed, taken to be normal (Student 1908).

    Returns:
        The ends, or `None` for fewer than `LEAST_SEEDS` differences, or if all are equal: they show
        nothing about chance.
    """
    if not _show_chance(differences):
        return None
    middle, half = float(np.mean(differences)), _t(len(differences)) * _error(differences)
    return middle - half, middle + half


def p_value(differences: Sequence[float]) -> float | None:
    """Return the two-sided p-value of the paired t-test of no difference; `None` as for `interval`."""
    if not _show_chance(differences):
        return None
    statistic = float(np.mean(differences)) / _error(differences)
    return float(2 * stats.t.sf(abs(statistic), len(differences) - 1))


def sign_flip(differences: Sequence[float]) -> float | None:
    """Return the exact two-sided p-value of no difference, whatever the law, if it is symmetric.

    Without a difference each of the 2ⁿ ways to flip signs is as likely. p is the share of those whose
    mean is as far from 0 (Fisher 1935, section 21): at least 2/2ⁿ, so 6 seeds are needed for 0.05.

    Args:
        differences: paired ones, one a seed.

    Returns:
        `None` for no difference, or more than `MOST_FLIPPED`.
    """
    if not 0 < len(differences) <= MOST_FLIPPED:
        return None
    values = np.array(differences)
    sums = abs(_signs(len(values)) @ values)
    reached = sums >= abs(values.sum()) - 1e-12 * abs(values).sum()  # as sums are rounded
    return float(reached.mean())


def detectable(differences: Sequence[float]) -> float | None:
    """Return the smallest true difference that as many seeds would have shown in 80 % of experiments.

    By the noncentral t distribution, with the spread of these differences; `None` as for `interval`.
    """
    if not _show_chance(differences):
        return None
    return _noncentrality(len(differences)) * _error(differences)


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Return p-values corrected for how many there are (Holm 1979), so that all together err as seldom.

    Args:
        p_values: `None` stays `None`, and does not count.
    """
    known = sorted((p, place) for place, p in enumerate(p_values) if p is not None)
    corrected: list[float | None] = [None] * len(p_values)
    least = 0.0
    for rank, (p, place) in enumerate(known):
        least = max(least, min(1.0, p * (len(known) - rank)))
        corrected[place] = least
    return corrected


def ratio_interval(above: Sequence[float], below: Sequence[float]) -> tuple[float, float] | None:
    """Return the 95 % interval of mean(above) / mean(below), both of the same seeds (Fieller 1954).

    Its ends are the ratios ρ for which above − ρ·below has a mean that is just not different from 0.

    Returns:
        `None` for fewer than `LEAST_SEEDS` seeds, or where it is unbounded: the denominator could be 0.
    """
    if len(above) < LEAST_SEEDS:
        return None
    (xx, xy), (_, yy) = np.cov(above, below) / len(above) * _t(len(above)) ** 2
    x, y = float(np.mean(above)), float(np.mean(below))
    # (x − ρy)² = xx − 2ρ·xy + ρ²·yy, a quadratic in ρ.
    square, half, constant = y * y - yy, x * y - xy, x * x - xx
    if square <= 1e-12 * y * y:
        return None
    root = sqrt(max(0.0, half * half - square * constant))
    return float((half - root) / square), float((half + root) / square)


def _show_chance(differences: Sequence[float]) -> bool:
    """Whether there are enough differences, and not all the same."""
    return len(differences) >= LEAST_SEEDS and float(np.ptp(differences)) > 1e-12


def _error(differences: Sequence[float]) -> float:
    """Return the standard error of the mean."""
    return float(np.std(differences, ddof=1)) / sqrt(len(differences))


@lru_cache
def _signs(count: int) -> Floats:
    """Return all ways to choose so many signs, ``[2ⁿ, n]``."""
    bits = np.arange(2**count)[:, None] >> np.arange(count) & 1
    return (2 * bits - 1).astype(np.float64)


@lru_cache
def _t(count: int) -> float:
    return float(stats.t.ppf((1 + LEVEL) / 2, count - 1))


@lru_cache
def _noncentrality(count: int) -> float:
    """Return the true difference over its standard error at which the test has its power."""
    critical, degrees = _t(count), count - 1
    most = 2 * (critical + float(stats.t.ppf(POWER, degrees)))
    return float(
        optimize.brentq(lambda shift: stats.nct.sf(critical, degrees, shift) - POWER, 0, most)
    )
