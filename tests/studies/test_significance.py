"""The interval and the test are those of slow loops, closed forms and scipy."""

from __future__ import annotations

from itertools import product
from math import comb
from statistics import NormalDist

import numpy as np
import pytest
from scipy.stats import binomtest

from fedkd.studies.comparison import significance
from fedkd.studies.comparison.significance import (
    bootstrap,
    images_won,
    mean_difference,
    paired,
    sign_test,
)


def _slow(differences: list[list[float]], draws: int, seed: int) -> tuple[float, float]:
    """Resample seeds, then clients within each, in plain loops with another generator."""
    chance = np.random.Generator(np.random.MT19937(seed))
    means = []
    for _ in range(draws):
        total = 0.0
        for _ in differences:
            clients = differences[int(chance.integers(len(differences)))]
            picked = [clients[int(chance.integers(len(clients)))] for _ in clients]
            total += sum(picked) / len(picked)
        means.append(total / len(differences))
    means.sort()
    return means[round(0.025 * draws)], means[round(0.975 * draws)]


def _some(seeds: int, clients: int, between: float, within: float) -> list[np.ndarray]:
    chance = np.random.default_rng(7)
    centres = chance.normal(0.03, between, seeds)
    return [chance.normal(centre, within, clients) for centre in centres]


def test_the_interval_is_that_of_a_slow_loop() -> None:
    differences = _some(5, 7, 0.05, 0.11)
    slow = _slow([each.tolist() for each in differences], 6000, 3)
    width = slow[1] - slow[0]
    assert bootstrap(differences) == pytest.approx(slow, abs=0.04 * width)


def test_the_interval_of_a_few_numbers_is_that_of_all_resamples() -> None:
    """Two seeds of two and three clients: every resample written out, with its chance."""
    differences = [[-0.11, 0.05], [0.02, 0.07, 0.29]]
    outcomes: list[tuple[float, float]] = []
    for first, second in product(differences, repeat=2):
        resamples = [list(product(each, repeat=len(each))) for each in (first, second)]
        chance = 1 / 4 / len(resamples[0]) / len(resamples[1])
        for a, b in product(*resamples):
            outcomes.append(((sum(a) / len(a) + sum(b) / len(b)) / 2, chance))
    outcomes.sort()
    cumulated = np.cumsum([chance for _, chance in outcomes])
    low, high = bootstrap([np.array(each) for each in differences]) or (0, 0)
    exact = [outcomes[int((cumulated < share).sum())][0] for share in (0.025, 0.975)]
    assert (low, high) == pytest.approx(exact, abs=1e-9)


def test_over_many_clients_of_one_seed_the_interval_is_the_normal_one() -> None:
    (values,) = _some(1, 401, 0.0, 0.2)
    margin = NormalDist().inv_cdf(0.975) * values.std() / 401**0.5
    expected = (values.mean() - margin, values.mean() + margin)
    assert bootstrap([values]) == pytest.approx(expected, abs=0.05 * margin)


def test_over_many_seeds_of_one_model_the_interval_is_the_normal_one() -> None:
    differences = _some(101, 1, 0.2, 0.0)
    values = np.concatenate(differences)
    margin = NormalDist().inv_cdf(0.975) * values.std() / 101**0.5
    expected = (values.mean() - margin, values.mean() + margin)
    assert bootstrap(differences) == pytest.approx(expected, abs=0.05 * margin)


def test_variances_of_the_two_stages_add_up() -> None:
    """Var = (between the seeds' means + mean within / K) / S, both with 1/n."""
    differences = _some(23, 11, 0.07, 0.31)
    means = np.array([each.mean() for each in differences])
    within = np.mean([each.var() for each in differences]) / 11
    spread = ((means.var() + within) / 23) ** 0.5
    low, high = bootstrap(differences) or (0, 0)
    assert (high - low) / 2 == pytest.approx(NormalDist().inv_cdf(0.975) * spread, rel=0.05)


def test_the_draws_are_the_same_each_time_and_however_many_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    differences = _some(3, 5, 0.05, 0.05)
    once = bootstrap(differences)
    assert bootstrap(differences) == once
    monkeypatch.setattr(significance, "_MOST_NUMBERS", 977)
    assert bootstrap(differences) == pytest.approx(once, abs=0.003)


def test_one_seed_of_equal_differences_has_no_interval() -> None:
    assert bootstrap([np.array([0.03])]) is None
    assert bootstrap([np.array([0.03, 0.03, 0.03])]) is None
    assert bootstrap([np.array([0.03]), np.array([0.03])]) == pytest.approx((0.03, 0.03))


def test_clients_are_paired_and_a_central_model_with_each_of_them() -> None:
    nan = float("nan")
    ours = [np.array([0.5, nan, 0.75]), np.array([0.25, 0.5, 1.0])]
    theirs = [np.array([0.25, 0.5, 0.5]), np.array([0.5, nan, 0.5])]
    both = paired(ours, theirs)
    assert [each.tolist() for each in both] == [[0.25, 0.25], [-0.25, 0.5]]
    assert mean_difference(both) == (0.25 + 0.125) / 2
    central = paired([np.array([0.9]), np.array([1.0])], theirs)
    assert central[0] == pytest.approx([0.65, 0.4, 0.4])
    assert central[1] == pytest.approx([0.5, 0.5])


@pytest.mark.parametrize(("seeds", "covered"), [(2, 0.5), (3, 0.75)])
def test_with_few_seeds_and_no_clients_the_interval_covers_less_than_it_says(
    seeds: int, covered: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its ends are then the least and the largest difference: 1 − 2^(1 − S) (`docs/compare.md`)."""
    monkeypatch.setattr(significance, "DRAWS", 1000)
    chance = np.random.default_rng(11)
    hits = 0
    for _ in range(1000):
        low, high = bootstrap(list(chance.normal(0, 1, (seeds, 1)))) or (0, 0)
        hits += low <= 0 <= high
    assert hits / 1000 == pytest.approx(covered, abs=0.05)


# --- The exact test -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("won", "lost"), [(0, 0), (1, 0), (3, 11), (11, 3), (5, 5), (6, 5), (0, 17), (211, 173)]
)
def test_the_sign_test_is_the_two_sided_binomial_test(won: int, lost: int) -> None:
    expected = binomtest(won, won + lost).pvalue if won + lost else 1.0
    assert sign_test(won, lost) == pytest.approx(expected, rel=1e-9)


def test_the_sign_test_counts_all_splits_that_are_as_uneven() -> None:
    for count in range(1, 12):
        for won in range(count + 1):
            as_uneven = [k for k in range(count + 1) if abs(2 * k - count) >= abs(2 * won - count)]
            share = sum(comb(count, k) for k in as_uneven) / 2**count
            assert sign_test(won, count - won) == pytest.approx(share)


def test_the_sign_test_of_a_whole_test_set_is_a_number() -> None:
    assert sign_test(0, 60_000) == 0.0
    assert sign_test(30_100, 29_900) == pytest.approx(binomtest(30_100, 60_000).pvalue)


def test_of_two_single_models_the_discordant_images_count() -> None:
    ours = np.array([[1, 1, 1, 0, 0, 1, 0]], dtype=bool)
    theirs = np.array([[1, 0, 0, 1, 0, 0, 0]], dtype=bool)
    assert images_won(ours, theirs) == (3, 1)
    assert images_won(theirs, ours) == (1, 3)


def test_of_several_models_the_larger_share_wins_an_image() -> None:
    chance = np.random.default_rng(5)
    ours, theirs = chance.random((3, 101)) < 0.6, chance.random((6, 101)) < 0.5
    won = lost = 0
    for image in range(101):
        mine, their = sum(ours[:, image].tolist()) * 2, sum(theirs[:, image].tolist())
        won, lost = won + (mine > their), lost + (mine < their)
    assert images_won(ours, theirs) == (won, lost)
    assert won + lost < 101  # there are ties, which no rounding may break


def test_under_no_difference_few_tests_are_small() -> None:
    """Exactness: the chance of p ≤ 0.05 is at most 0.05, whatever the number of images that differ."""
    for count in range(1, 60):
        small = [k for k in range(count + 1) if sign_test(k, count - k) <= 0.05]
        assert sum(comb(count, k) for k in small) / 2**count <= 0.05
