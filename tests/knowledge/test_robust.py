"""Robust rules against loops, closed forms and optimality conditions, and what breaks a mean."""

from __future__ import annotations

import math
from itertools import permutations
from statistics import median
from typing import get_args

import pytest
import torch
from federation_tools import C as CLASSES
from federation_tools import P, federate, tiny
from torch import Tensor

from fedkd.errors import FedkdError
from fedkd.knowledge import (
    Rule,
    SoftLabels,
    Space,
    combine,
    combine_logits,
    combine_probabilities,
    in_canonical_order,
)
from fedkd.knowledge.robust import coordinate_median, geometric_median, trimmed_mean
from strategies.dsfl import DSFL
from strategies.fedmd import FedMD

N, C = 5, 7
F64 = torch.float64
RULES: tuple[Rule, ...] = get_args(Rule)
ROBUST: tuple[Rule, ...] = tuple(rule for rule in RULES if rule != "mean")


def rand(*shape: int, seed: int = 1) -> Tensor:
    return 3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def rows(clients: int, space: Space = "probabilities", seed: int = 1) -> Tensor:
    logits = rand(clients, N, C, seed=seed)
    return logits if space == "logits" else logits.softmax(-1)


def some(clients: int) -> Tensor:
    """Return a mask in which each sample has another number of answers, at least one."""
    mask = torch.ones(clients, N).bool()
    for sample in range(N):
        for missing in range(sample % clients):
            mask[(sample + missing) % clients, sample] = False
    return mask


def everyone(values: Tensor) -> Tensor:
    return torch.ones(values.shape[:2]).bool()


def one_hot(*classes: int) -> Tensor:
    """Return one sample that each client is sure of: ``[K, 1, C]``."""
    return torch.eye(C, dtype=F64)[list(classes)].unsqueeze(1)


def columns(values: Tensor, mask: Tensor, sample: int) -> list[list[float]]:
    """Return, class by class, what the clients that answered say of a sample."""
    answers = [values[k, sample].tolist() for k in range(len(values)) if mask[k, sample]]
    return [list(column) for column in zip(*answers, strict=True)]


def trimmed_loop(column: list[float], share: float) -> float:
    dropped = int(share * len(column) + 1e-9)
    kept = sorted(column)[dropped : len(column) - dropped]
    return math.fsum(kept) / len(kept)


def distance_sum(points: list[list[float]], centre: list[float]) -> float:
    return math.fsum(math.dist(point, centre) for point in points)


def weiszfeld_loop(points: list[list[float]]) -> list[float]:
    """Return Weiszfeld's point, or the best of the given ones if that is better."""
    centre = [math.fsum(column) / len(points) for column in zip(*points, strict=True)]
    for _ in range(3000):
        weights = [1 / max(math.dist(point, centre), 1e-300) for point in points]
        total = math.fsum(weights)
        centre = [
            math.fsum(w * x for w, x in zip(weights, column, strict=True)) / total
            for column in zip(*points, strict=True)
        ]
    return min([*points, centre], key=lambda candidate: distance_sum(points, candidate))


# --- Each rule against a loop ----------------------------------------------------------------------


@pytest.mark.parametrize("space", ["logits", "probabilities"])
@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("clients", [1, 2, 3, 7])
def test_the_mean_is_that_of_soft_labels_bit_for_bit(
    clients: int, dtype: torch.dtype, space: Space
) -> None:
    given = SoftLabels(rows(clients, space).to(dtype), space, mask=some(clients))
    assert torch.equal(combine_probabilities(given, "mean"), given.mean_probabilities())
    assert torch.equal(combine_logits(given, "mean"), given.mean_logits())
    assert torch.equal(
        combine(given.values, given.mask, "mean", space=space),
        given.mean_logits() if space == "logits" else given.mean_probabilities(),
    )


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("clients", [2, 3, 4, 5, 7])
def test_the_median_is_that_of_each_class(clients: int, whole: bool) -> None:
    values = rows(clients, "logits")
    mask = everyone(values) if whole else some(clients)
    expected = [[median(column) for column in columns(values, mask, n)] for n in range(N)]
    wanted = torch.tensor(expected, dtype=F64)
    assert torch.equal(coordinate_median(values, mask), wanted)
    assert torch.equal(combine(values, mask, "median", space="logits"), wanted)


def test_of_an_even_number_the_median_is_the_middle_of_two() -> None:
    values = torch.tensor([1.0, 2.0, 5.0, 90.0]).view(4, 1, 1)
    assert coordinate_median(values, everyone(values)).item() == 3.5
    assert values.median(0).values.item() == 2.0


@pytest.mark.parametrize("share", [0.0, 0.2, 0.34, 0.49])
@pytest.mark.parametrize("clients", [2, 3, 5, 7])
def test_the_trimmed_mean_is_that_without_both_ends(clients: int, share: float) -> None:
    values = rows(clients, "logits")
    for mask in (everyone(values), some(clients)):
        expected = [
            [trimmed_loop(column, share) for column in columns(values, mask, n)] for n in range(N)
        ]
        wanted = torch.tensor(expected, dtype=F64)
        torch.testing.assert_close(trimmed_mean(values, mask, share), wanted)
        got = combine(values, mask, "trimmed-mean", space="logits", trim=share)
        torch.testing.assert_close(got, wanted)


def test_a_share_that_is_meant_to_give_a_whole_number_gives_it() -> None:
    values = torch.arange(100, dtype=F64).square().view(100, 1, 1)
    assert int(0.29 * 100) == 28
    expected = sum(k * k for k in range(29, 71)) / 42
    assert trimmed_mean(values, everyone(values), 0.29).item() == pytest.approx(expected)


@pytest.mark.parametrize("space", ["logits", "probabilities"])
@pytest.mark.parametrize("clients", [3, 4, 5, 7])
def test_the_geometric_median_is_weiszfelds_point(clients: int, space: Space) -> None:
    values = rows(clients, space)
    for mask in (everyone(values), some(clients)):
        got = geometric_median(values, mask)
        for n in range(N):
            points = [values[k, n].tolist() for k in range(clients) if mask[k, n]]
            expected = weiszfeld_loop(points)
            if len(points) > 2:  # of two, every point between them is one
                assert got[n].tolist() == pytest.approx(expected, abs=1e-6)
            assert distance_sum(points, got[n].tolist()) <= distance_sum(points, expected) + 1e-9


@pytest.mark.parametrize("clients", [3, 5, 7])
def test_at_the_geometric_median_the_pulls_of_all_clients_balance(clients: int) -> None:
    """Unit vectors to the rows add up to nothing, or to less than the rows at the point hold."""
    values = rand(clients, 101, C, seed=3)
    values[0] += 30
    centre = geometric_median(values, everyone(values))
    away = values - centre
    distance = away.norm(dim=-1, keepdim=True)
    hit = distance < 1e-9
    pull = torch.where(hit, 0.0, away / distance).sum(0).norm(dim=-1)
    slack = (pull - hit.sum((0, 2))).clamp_min(0)
    assert float(slack.median()) < 1e-9
    assert float(slack.max()) < 0.02
    assert clients != 3 or bool(hit.any())  # both cases of the condition are met


def test_geometric_medians_with_closed_forms() -> None:
    root = math.sqrt(3)
    # Fermat's point of an equilateral triangle: its centre. Seen at more than 120°: the corner.
    triangle = torch.tensor([[0.0, 0.0], [2.0, 0.0], [1.0, root]], dtype=F64)
    blunt = torch.tensor([[0.0, 0.1], [5.0, 0.0], [-4.0, 0.0]], dtype=F64)
    # Of a convex quadrilateral: where its diagonals cross.
    square = torch.tensor([[0.0, 0.0], [4.0, 0.0], [6.0, 6.0], [0.0, 4.0]], dtype=F64)
    line = torch.tensor([[1.0, 2.0], [3.0, 4.0], [90.0, 91.0]], dtype=F64)
    twice = torch.tensor([[1.0, 1.0], [1.0, 1.0], [9.0, -3.0]], dtype=F64)
    cases = [
        (triangle, [1.0, root / 3]),
        (blunt, [0.0, 0.1]),
        (square, [2.0, 2.0]),
        (line, [3.0, 4.0]),
        (twice, [1.0, 1.0]),
    ]
    for points, expected in cases:
        values = points.unsqueeze(1)
        got = geometric_median(values, everyone(values))[0].tolist()
        assert got == pytest.approx(expected, abs=1e-6), points


def test_a_mean_that_hits_a_row_is_left_behind() -> None:
    """Weiszfeld's own step would divide by 0, or stay: here the mean is a row but not the median."""
    points = torch.tensor([[0.0, 0.0], [1.0, 0.0], [1.0, 0.3], [1.0, -0.3], [-3.0, 0.0]], dtype=F64)
    assert torch.equal(points.mean(0), points[0])
    values = points.unsqueeze(1)
    got = geometric_median(values, everyone(values))[0].tolist()
    best = weiszfeld_loop([point.tolist() for point in points[1:]] + [[1e-9, 0.0]])
    assert got == pytest.approx(best, abs=1e-6)
    assert distance_sum(points.tolist(), got) < distance_sum(points.tolist(), [0.0, 0.0]) - 0.5


# --- What is true of every rule --------------------------------------------------------------------


@pytest.mark.parametrize("rule", ROBUST)
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_the_order_of_clients_changes_not_a_bit(rule: Rule, dtype: torch.dtype) -> None:
    for space in get_args(Space):
        values, mask = rows(5, space).to(dtype), some(5)
        values[3] = values[1]  # exact ties too
        first = combine(values, mask, rule, space=space)
        for order in list(permutations(range(5)))[::17]:
            assert torch.equal(combine(values[[*order]], mask[[*order]], rule, space=space), first)


@pytest.mark.parametrize("rule", RULES)
def test_samples_do_not_depend_on_each_other(rule: Rule) -> None:
    values, mask = rows(7), some(7)
    together = combine(values, mask, rule)
    for n in range(N):
        alone = combine(values[:, n : n + 1], mask[:, n : n + 1], rule)
        torch.testing.assert_close(alone[0], together[n], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_nothing_is_written_to_and_the_type_is_kept(rule: Rule, dtype: torch.dtype) -> None:
    values, mask = rows(3).to(dtype), some(3)
    kept, exact = values.clone(), combine(rows(3), mask, rule)
    got = combine(values, mask, rule)
    assert got.dtype == dtype
    assert torch.equal(values, kept)
    torch.testing.assert_close(got.double(), exact, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("clients", [1, 2, 3, 4, 5, 7])
def test_probabilities_stay_on_the_simplex(rule: Rule, clients: int) -> None:
    got = combine(rows(clients), some(clients), rule)
    torch.testing.assert_close(got.sum(-1), torch.ones(N, dtype=F64))
    assert bool((got >= 0).all())


def test_medians_and_trimmed_means_leave_the_simplex_before_they_are_divided_by_their_sum() -> None:
    values = rows(5)
    for alone, rule in ((coordinate_median, "median"), (trimmed_mean, "trimmed-mean")):
        raw = alone(values, everyone(values))
        assert float((raw.sum(-1) - 1).abs().max()) > 0.05
        expected = raw / raw.sum(-1, keepdim=True)
        torch.testing.assert_close(combine(values, everyone(values), rule), expected)  # type: ignore[arg-type]


@pytest.mark.parametrize("rule", RULES)
def test_no_samples_give_none(rule: Rule) -> None:
    assert combine(torch.zeros(3, 0, C), torch.zeros(3, 0).bool(), rule).shape == (0, C)


@pytest.mark.parametrize("rule", RULES)
def test_one_client_is_its_own_combination_and_of_two_it_is_the_mean(rule: Rule) -> None:
    alone = rows(1)
    torch.testing.assert_close(combine(alone, everyone(alone), rule), alone[0], rtol=1e-14, atol=0)
    two = rows(2)
    torch.testing.assert_close(combine(two, everyone(two), rule), two.mean(0))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("space", ["logits", "probabilities"])
def test_equal_clients_are_as_good_as_one(rule: Rule, space: Space) -> None:
    one = rows(1, space)
    values = one.expand(5, N, C)
    got = combine(values, everyone(values), rule, space=space)
    torch.testing.assert_close(got, one[0], rtol=1e-14, atol=0)


@pytest.mark.parametrize("rule", RULES)
def test_who_did_not_answer_is_not_heard(rule: Rule) -> None:
    values, mask = rows(5), some(5)
    shouting = torch.where(mask.unsqueeze(-1), values, 1e30)
    assert torch.equal(combine(shouting, mask, rule), combine(values, mask, rule))
    for n in range(N):
        answered = values[mask[:, n], n : n + 1]
        alone = combine(answered, everyone(answered), rule)
        torch.testing.assert_close(combine(values, mask, rule)[n], alone[0], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("rule", RULES)
def test_a_sample_that_nobody_answered_is_zeros_as_in_a_mean(rule: Rule) -> None:
    values, mask = rows(3), some(3)
    mask[:, 2] = False
    got = combine(values, mask, rule)
    assert torch.equal(got[2], torch.zeros(C, dtype=F64))
    assert bool(got.isfinite().all())


@pytest.mark.parametrize("rule", ROBUST)
def test_one_client_far_off_does_not_carry_the_others_away(rule: Rule) -> None:
    """At any distance the result stays near the honest clients, where a mean goes along."""
    honest = rows(6, "logits")
    where = []
    for far in (1e2, 1e4, 1e6):
        values = torch.cat([honest, torch.full((1, N, C), far, dtype=F64)])
        mean = combine(values, everyone(values), "mean", space="logits")
        assert float(mean.min()) > far / 10
        got = combine(values, everyone(values), rule, space="logits")
        assert float((got - honest.mean(0)).abs().max()) < 6
        where.append(got)
    torch.testing.assert_close(where[1], where[2], rtol=0, atol=1e-2)


@pytest.mark.parametrize("rule", ["median", "geometric-median"])
@pytest.mark.parametrize("clients", [3, 5, 7])
def test_the_largest_minority_does_not_decide(rule: Rule, clients: int) -> None:
    """(K − 1)/2 clients that agree on a wrong class do not win, though a mean may follow them."""
    honest = (clients + 1) // 2
    values = torch.full((clients, 1, C), 0.3 / (C - 1), dtype=F64)
    values[:honest, :, 2] = 0.7
    values[honest:] = one_hot(*[4] * (clients - honest))
    got = combine(values, everyone(values), rule)
    torch.testing.assert_close(got, values[0], atol=1e-6, rtol=0)


@pytest.mark.parametrize("size", [1e3, 1e20, 3e38])
@pytest.mark.parametrize("clients", [5, 10, 20])
def test_a_geometric_median_of_logits_withstands_a_fifth_at_any_distance(
    clients: int, size: float
) -> None:
    """It is where the honest rows and unit pulls towards the others balance, and does not follow them."""
    lies = clients // 5
    given = torch.randn(clients, 5, 7, generator=torch.Generator().manual_seed(3)).double()
    direction = torch.randn(5, 7, generator=torch.Generator().manual_seed(4)).double()
    direction = direction / direction.abs().amax(-1, keepdim=True)
    given[:lies] = size * direction
    mask = torch.ones(clients, 5).bool()
    got = geometric_median(given, mask)
    honest = given[lies:]
    assert bool(((got >= honest.amin(0) - 1e-6) & (got <= honest.amax(0) + 1e-6)).all())
    away = given - got
    pulls = (away / away.norm(dim=-1, keepdim=True)).sum(0).norm(dim=-1)
    nearest = away.norm(dim=-1).amin(0)
    assert bool(((pulls < 1e-4) | ((nearest < 1e-9) & (pulls <= 1))).all())
    far = geometric_median(torch.cat([1e20 / size * given[:lies], honest]), mask)
    torch.testing.assert_close(got, far, rtol=0, atol=0.05 if size < 1e6 else 1e-6)


def test_a_trimmed_mean_withstands_its_share_and_no_more() -> None:
    values = torch.full((10, 1, C), 0.3 / (C - 1), dtype=F64)
    values[:, :, 2] = 0.7
    values[:2] = one_hot(4, 4)
    got = combine(values, everyone(values), "trimmed-mean", trim=0.2)
    torch.testing.assert_close(got, values[9])
    values[:3] = one_hot(4, 4, 4)
    got = combine(values, everyone(values), "trimmed-mean", trim=0.2)
    assert float((got - values[9]).abs().max()) > 0.1


@pytest.mark.parametrize("rule", RULES)
def test_a_vote_of_one_hot_clients(rule: Rule) -> None:
    """A majority of certain clients wins whole, by every rule but the mean."""
    values = one_hot(3, 3, 3, 0, 6)
    got = combine(values, everyone(values), rule)[0]
    assert got.argmax() == 3
    if rule != "mean":
        torch.testing.assert_close(got, one_hot(3)[0, 0], atol=1e-6, rtol=0)


@pytest.mark.parametrize("rule", RULES)
def test_where_no_class_has_half_of_the_clients_the_mean_decides(rule: Rule) -> None:
    """All certain, all different: medians and trimmed means are 0 and say nothing."""
    values = one_hot(0, 2, 3, 5, 6)
    assert float(coordinate_median(values, everyone(values)).sum()) == 0
    assert float(trimmed_mean(values, everyone(values)).sum()) == 0
    torch.testing.assert_close(combine(values, everyone(values), rule), values.mean(0))


@pytest.mark.parametrize("rule", RULES)
def test_a_class_that_nobody_holds_stays_at_zero(rule: Rule) -> None:
    values = rows(5)
    values[:, :, 4] = 0
    values = values / values.sum(-1, keepdim=True)
    got = combine(values, some(5), rule)
    assert torch.equal(got[:, 4], torch.zeros(N, dtype=F64))


@pytest.mark.parametrize("rule", RULES)
def test_huge_logits_stay_finite(rule: Rule) -> None:
    values = rand(3, N, C).float().sign() * 1e37
    assert bool(combine(values, everyone(values), rule, space="logits").isfinite().all())


# --- Order and refusals ----------------------------------------------------------------------------


def test_the_canonical_order_is_that_of_rows_as_words_with_absent_clients_last() -> None:
    values = rand(5, N, C).sign()  # ties in most columns
    mask = some(5)
    ordered, answered = in_canonical_order(values, mask)
    for n in range(N):
        expected = sorted(values[k, n].tolist() for k in range(5) if mask[k, n])
        assert answered[:, n].tolist() == [True] * len(expected) + [False] * (5 - len(expected))
        assert ordered[: len(expected), n].tolist() == expected
        assert not ordered[len(expected) :, n].any()


def test_what_cannot_be_combined_is_refused() -> None:
    values = rows(3, "logits")
    with pytest.raises(FedkdError, match=r"'krum': must be one of mean, median, trimmed-mean"):
        combine(values, everyone(values), "krum", space="logits")  # type: ignore[arg-type]
    for share in (0.5, -0.1, 1.0):
        with pytest.raises(FedkdError, match=f"trim = {share}"):
            trimmed_mean(values, everyone(values), share)
    for rule in ROBUST:
        with pytest.raises(FedkdError, match="space='logits'"):
            combine(values, everyone(values), rule)


# --- In a strategy ---------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES)
def test_strategies_take_a_rule_in_the_place_of_their_mean(rule: Rule) -> None:
    probs = SoftLabels(rows(5), "probabilities", mask=some(5))
    combined = combine_probabilities(probs, rule)
    assert torch.equal(DSFL(combine=rule, sharpening="mean").aggregate(probs), combined)
    assert torch.equal(DSFL(combine=rule).aggregate(probs), (combined / 0.1).softmax(-1))
    logits = SoftLabels(rows(5, "logits"), "logits", mask=some(5))
    expected = combine(logits.values, logits.mask, rule, space="logits")
    assert torch.equal(FedMD(combine=rule).aggregate(logits), expected)


def test_strategies_average_unless_told_otherwise_and_name_the_rules() -> None:
    assert DSFL().combine == FedMD().combine == "mean"
    with pytest.raises(FedkdError, match=r"combine = 'medain'.*median"):
        DSFL(combine="medain")  # type: ignore[arg-type]


@pytest.mark.parametrize("rule", ROBUST)
def test_a_federation_runs_on_a_rule(rule: Rule) -> None:
    run = federate(tiny(num_server_rounds=2), strategy=DSFL(combine=rule, sharpening="mean"))
    answers = run.exchanges[1].answers([0, 1, 2])
    assert isinstance(answers, SoftLabels)
    assert isinstance(run.knowledge, SoftLabels)
    assert run.knowledge.values.shape == (1, P, CLASSES)
    assert torch.equal(run.knowledge.values[0], combine_probabilities(answers, rule))
