"""Intervals and tests are those of closed forms, enumerations and other implementations, and cover."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations, product
from math import atan, cos, pi, sin, sqrt

import numpy as np
import pytest
from sampling import one_in
from scipy import stats

from fedkd.studies.comparison.differences import difference, verdict_on
from fedkd.studies.comparison.entries import Entry
from fedkd.studies.comparison.significance import (
    detectable,
    holm,
    interval,
    p_value,
    paired,
    ratio_interval,
    sign_flip,
)

FIVE = [0.031, -0.012, 0.044, 0.019, 0.027]


def two_sided(t: float, df: int) -> float:
    """Return P(|T| > t), by the finite sums of Abramowitz and Stegun, 26.7.3 and 26.7.4."""
    angle, term, total = atan(t / sqrt(df)), 1.0, 0.0
    if df % 2 == 0:
        for j in range(0, df - 1, 2):
            total += term
            term *= (j + 1) / (j + 2) * cos(angle) ** 2
        return 1 - sin(angle) * total
    term = cos(angle)
    for j in range(1, df - 1, 2):
        total += term
        term *= (j + 1) / (j + 2) * cos(angle) ** 2
    return 1 - 2 / pi * (angle + sin(angle) * total)


def test_the_interval_is_that_of_the_table_of_t() -> None:
    """Five differences: mean 0.0218, s² = 0.0018188 / 4, t of 4 degrees of freedom 2.776445."""
    mean = sum(FIVE) / 5
    variance = sum((d - mean) ** 2 for d in FIVE) / 4
    half = 2.776445 * sqrt(variance / 5)
    assert interval(FIVE) == pytest.approx((mean - half, mean + half), rel=1e-6)


@pytest.mark.parametrize("count", [3, 4, 5, 6, 7, 11])
def test_p_is_the_tail_of_t_and_agrees_with_the_interval(count: int) -> None:
    values = np.random.default_rng(count).normal(0.02, 0.03, count).tolist()
    mean = sum(values) / count
    error = sqrt(sum((v - mean) ** 2 for v in values) / (count - 1) / count)
    assert p_value(values) == pytest.approx(two_sided(abs(mean) / error, count - 1), rel=1e-9)
    low, high = interval(values) or (0.0, 0.0)
    for end in (low, high):  # moved until an end is 0, the difference is just significant
        assert p_value([v - end for v in values]) == pytest.approx(0.05, rel=1e-9)


@pytest.mark.parametrize("values", [[], [0.1], [0.1, 0.2], [0.03, 0.03, 0.03]])
def test_what_shows_nothing_about_chance_has_neither_interval_nor_p(values: list[float]) -> None:
    assert interval(values) is None
    assert p_value(values) is None
    assert detectable(values) is None


def test_signs_are_flipped_in_all_ways() -> None:
    for count in range(1, 9):
        values = np.random.default_rng(count).normal(0.3, 1, count).tolist()
        as_far = 0
        for signs in product((-1, 1), repeat=count):
            flipped = sum(s * v for s, v in zip(signs, values, strict=True))
            as_far += abs(flipped) >= abs(sum(values)) - 1e-12
        assert sign_flip(values) == as_far / 2**count
    assert sign_flip([0.1] * 6) == 2 / 64  # the least that six seeds can give
    assert sign_flip([0.1, -0.1]) == 1.0
    assert sign_flip([]) is None
    assert sign_flip([0.1] * 17) is None


def test_sign_flips_agree_with_scipy() -> None:
    values = np.random.default_rng(3).normal(0.4, 1, 9)
    found = stats.permutation_test(
        (values,), np.mean, permutation_type="samples", n_resamples=np.inf, alternative="two-sided"
    )
    assert sign_flip(values.tolist()) == pytest.approx(found.pvalue)


def test_holm_by_hand() -> None:
    """0.01·4 = 0.04; 0.02·3 = 0.06; 0.04·2 = 0.08; 0.03 is third: 0.03·2 = 0.06 is raised to 0.06."""
    assert holm([0.02, 0.01, None, 0.04, 0.03]) == pytest.approx([0.06, 0.04, None, 0.06, 0.06])
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([0.013]) == [0.013]
    assert holm([]) == []


def test_holm_is_the_closed_test_of_bonferroni() -> None:
    """Corrected p: the largest Bonferroni p of all sets of hypotheses that a hypothesis is in."""
    values = [0.004, 0.03, 0.011, 0.2, 0.019]
    for place, corrected in enumerate(holm(list(values))):
        closed = max(
            min(1.0, len(chosen) * min(values[i] for i in chosen))
            for size in range(1, 6)
            for chosen in combinations(range(5), size)
            if place in chosen
        )
        assert corrected == pytest.approx(closed)


@pytest.mark.parametrize("count", [3, 6, 10])
def test_what_can_be_detected_is_found_four_times_in_five(count: int) -> None:
    values = np.random.default_rng(count).normal(0, 0.05, count)
    shift = detectable(values.tolist())
    assert shift is not None
    spread = values.std(ddof=1)
    draws = np.random.default_rng(7).normal(shift, spread, (40_000, count))
    found = stats.ttest_1samp(draws, 0, axis=1).pvalue < 0.05
    assert found.mean() == pytest.approx(0.8, abs=0.008)


def test_an_interval_of_a_ratio_holds_the_ratios_that_are_not_refused() -> None:
    above, below = [0.21, 0.30, 0.24, 0.29, 0.33], [0.41, 0.47, 0.44, 0.5, 0.46]
    low, high = ratio_interval(above, below) or (0.0, 0.0)

    def p(ratio: float) -> float:
        rest = [a - ratio * b for a, b in zip(above, below, strict=True)]
        return float(stats.ttest_1samp(rest, 0).pvalue)

    assert p(low) == pytest.approx(0.05, rel=1e-6)
    assert p(high) == pytest.approx(0.05, rel=1e-6)
    assert p((low + high) / 2) > 0.05
    assert low < sum(above) / sum(below) < high


def test_a_ratio_whose_denominator_may_be_0_has_no_interval() -> None:
    assert ratio_interval([0.2, 0.3, 0.1], [0.4, -0.1, 0.1]) is None
    assert ratio_interval([0.2, 0.3], [0.4, 0.5]) is None


def test_clients_are_paired_and_a_central_model_with_each_of_them() -> None:
    nan = float("nan")
    ours = [np.array([0.5, nan, 0.75]), np.array([0.25, 0.5, 1.0])]
    theirs = [np.array([0.25, 0.5, 0.5]), np.array([0.5, nan, 0.5])]
    assert paired(ours, theirs) == [0.25, 0.125]
    central = paired([np.array([0.9]), np.array([1.0])], theirs)
    assert central == pytest.approx([0.9 - 1.25 / 3, 0.5])
    assert paired([np.array([nan, 0.5])], [np.array([0.5, nan])]) == []


# --- Coverage, through the code that prints -------------------------------------------------------

TRIES, CLIENTS = 2_000, 10


def entry_of(accuracies: np.ndarray) -> Entry:
    """Return a method with these accuracies by seed and client."""
    rows: list[list[float | None]] = [[float(a) for a in row] for row in accuracies]
    return Entry("DSFL", accuracies.mean(1).tolist(), rows, 0, None, 1, 1, 1.0)


def coverage(seeds: int, true: float, between: float, within: float) -> float:
    """Return how many experiments have an interval that holds the true difference.

    Shards make both methods better or worse alike, and each method's seeds and clients differ besides.
    """
    chance = np.random.default_rng(seeds)
    held = 0
    for _ in range(TRIES):
        shards = chance.normal(0.7, 0.1, (seeds, 1))
        ours, theirs = (
            shards + chance.normal(0, between, (seeds, 1)) + chance.normal(0, within, (seeds, CLIENTS))
            for _ in range(2)
        )  # fmt: skip
        found = difference(entry_of(ours + true), entry_of(theirs))
        assert found.low is not None
        assert found.high is not None
        held += found.low <= true <= found.high
    return held / TRIES


SPREADS = [(0.02, 0.04), (0.03, 0.0), (0.0, 0.05)]


@pytest.mark.parametrize("seeds", [3, 5, 10])
@pytest.mark.parametrize(("between", "within"), one_in(3, SPREADS))
def test_an_interval_holds_the_true_difference_as_often_as_it_says(
    seeds: int, between: float, within: float
) -> None:
    assert 0.93 <= coverage(seeds, 0.04, between, within) <= 0.97


def test_a_verdict_names_a_winner_among_equals_in_one_of_twenty_comparisons_at_most() -> None:
    """Five methods that differ by chance alone, of which the best is picked."""
    chance, tries, ahead = np.random.default_rng(5), 300, 0
    for _ in range(tries):
        shards = chance.normal(0.7, 0.1, (6, 1)) + np.zeros(CLIENTS)
        methods = [entry_of(shards + chance.normal(0, 0.03, (6, 1))) for _ in range(5)]
        said = verdict_on([replace(m, method=f"m{n}") for n, m in enumerate(methods)])
        assert said is not None
        ahead += "is ahead of" in said
    assert ahead / tries <= 0.06
    better = [shards + 0.1 * n + chance.normal(0, 0.01, (6, 1)) for n in range(3)]
    sure = [replace(entry_of(accuracies), method=f"m{n}") for n, accuracies in enumerate(better)]
    assert (verdict_on(sure) or "").startswith("m2 is ahead of m1 by ")
    assert verdict_on(sure[:1]) is None


def test_a_row_without_an_interval_says_what_is_known() -> None:
    one = entry_of(np.full((2, CLIENTS), 0.5))
    found = difference(replace(one, accuracies=[0.5, 0.5]), one)
    assert (found.mean, found.low, found.p_value, found.p_sign_flip) == (0.0, None, None, 1.0)
