"""Cronus and COMET against float64 loops written from their papers, at their edges, and in a run."""

from __future__ import annotations

import math
from itertools import permutations, product

import numpy as np
import pytest
import torch
from federation_tools import C as CLASSES
from federation_tools import P, federate, tiny
from torch import Tensor

from fedkd.errors import FedkdError
from fedkd.knowledge import SoftLabels, require_one
from fedkd.phases import Apply, Fit, LocalClient, Predict, Revisit, Role, closing
from strategies.comet import COMET, By, nearest_centroid
from strategies.cronus import Cronus

N, C = 5, 7
F64 = torch.float64
Row = list[float]


def rand(*shape: int, seed: int = 1) -> Tensor:
    return 3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def some(clients: int) -> Tensor:
    """Return a mask in which samples have different numbers of answers, at least one."""
    mask = torch.ones(clients, N).bool()
    for sample in range(N):
        for missing in range(sample % clients):
            mask[(sample + missing) % clients, sample] = False
    return mask


def labels(clients: int, seed: int = 1, mask: Tensor | None = None) -> SoftLabels:
    samples = torch.tensor([2, 3, 11, 13, 29])
    values = rand(clients, N, C, seed=seed).softmax(-1)
    return SoftLabels(values, "probabilities", samples, mask=mask)


def one_hot(*classes: int) -> SoftLabels:
    """Return one sample that each client is sure of."""
    return SoftLabels(torch.eye(C, dtype=F64)[list(classes)].unsqueeze(1), "probabilities")


def sample_rows(given: SoftLabels, n: int) -> list[Row]:
    return [given.values[k, n].tolist() for k in range(len(given.values)) if given.mask[k, n]]


def permuted(given: SoftLabels, order: tuple[int, ...]) -> SoftLabels:
    rows = list(order)
    return SoftLabels(
        given.values[rows],
        given.space,
        given.samples,
        given.clients[rows],
        given.num_examples[rows],
        given.mask[rows],
    )


def mean_loop(rows: list[Row]) -> Row:
    return [math.fsum(column) / len(rows) for column in zip(*rows, strict=True)]


def squared(a: Row, b: Row) -> float:
    return math.fsum((x - y) ** 2 for x, y in zip(a, b, strict=True))


# --- Cronus: the filter ----------------------------------------------------------------------------


def power_iteration(rows: list[Row]) -> Row:
    """Return the top eigenvector of the rows' covariance."""
    centre, size = mean_loop(rows), len(rows[0])
    away = [[x - m for x, m in zip(row, centre, strict=True)] for row in rows]
    covariance = [
        [math.fsum(a[i] * a[j] for a in away) / (len(rows) - 1) for j in range(size)]
        for i in range(size)
    ]
    vector = [1.0 + 0.1 * i for i in range(size)]
    for _ in range(3000):
        vector = [
            math.fsum(c * v for c, v in zip(line, vector, strict=True)) for line in covariance
        ]
        length = math.hypot(*vector)
        vector = [v / length for v in vector]
    return vector


def cronus_loop(rows: list[Row], epsilon: float) -> Row:
    malicious = min(int(epsilon * len(rows) + 1e-9), (len(rows) - 1) // 2)
    for dropped in (math.ceil(malicious / 2), math.floor(malicious / 2)):
        if not dropped:
            continue
        top, centre = power_iteration(rows), mean_loop(rows)
        scores = [
            abs(math.fsum((x - m) * v for x, m, v in zip(row, centre, top, strict=True)))
            for row in rows
        ]
        keep = sorted(range(len(rows)), key=scores.__getitem__)[: len(rows) - dropped]
        rows = [rows[k] for k in sorted(keep)]
    return mean_loop(rows)


@pytest.mark.parametrize("epsilon", [0.0, 0.2, 0.34, 0.5])
@pytest.mark.parametrize("clients", [3, 5, 7])
def test_cronus_is_the_spectral_filter(clients: int, epsilon: float) -> None:
    for seed, mask in ((1, None), (2, some(clients))):
        given = labels(clients, seed, mask)
        expected = [cronus_loop(sample_rows(given, n), epsilon) for n in range(N)]
        got = Cronus(epsilon=epsilon).aggregate(given)
        torch.testing.assert_close(got, torch.tensor(expected, dtype=F64), rtol=1e-9, atol=1e-12)


def test_cronus_with_fewer_clients_than_classes_and_with_more() -> None:
    for clients in (4, 13):
        given = labels(clients, seed=3)
        expected = [cronus_loop(sample_rows(given, n), 0.5) for n in range(N)]
        torch.testing.assert_close(Cronus().aggregate(given), torch.tensor(expected, dtype=F64))


def test_cronus_written_out_by_hand() -> None:
    """Two say A, one says B: v is B − A, the scores 1/3, 1/3 and 2/3 of its length; B goes."""
    a = torch.tensor([0.7, 0.1, 0.1, 0.1, 0, 0, 0], dtype=F64)
    b = torch.tensor([0.1, 0.1, 0.1, 0.1, 0.2, 0.2, 0.2], dtype=F64)
    given = SoftLabels(torch.stack([a, b, a]).unsqueeze(1), "probabilities")
    torch.testing.assert_close(Cronus().aggregate(given)[0], a)
    torch.testing.assert_close(Cronus(epsilon=0.3).aggregate(given)[0], (2 * a + b) / 3)


def test_the_default_is_the_largest_minority() -> None:
    """Some of K agree on a wrong class: at most (K − 1)/2 of them are dropped, which is enough."""
    for clients in range(1, 12):
        minority = (clients - 1) // 2
        for malicious in range(minority + 1):
            given = one_hot(*[2] * (clients - malicious), *[5] * malicious)
            got = Cronus().aggregate(given)[0]
            torch.testing.assert_close(
                got, torch.eye(C, dtype=F64)[2], msg=f"{malicious}/{clients}"
            )


def test_a_smaller_epsilon_withstands_fewer() -> None:
    ten = one_hot(*[2] * 7, *[5] * 3)
    assert Cronus(epsilon=0.3).aggregate(ten)[0].argmax() == 2
    torch.testing.assert_close(Cronus(epsilon=0.3).aggregate(ten)[0, 5], torch.tensor(0.0).double())
    assert float(Cronus(epsilon=0.2).aggregate(ten)[0, 5]) == pytest.approx(1 / 8)
    # 0.29 · 100 is 28.999999999999996.
    hundred = one_hot(*[2] * 71, *[5] * 29)
    assert float(Cronus(epsilon=0.29).aggregate(hundred)[0, 5]) == 0
    assert float(Cronus(epsilon=0.28).aggregate(hundred)[0, 5]) == pytest.approx(1 / 72)


def published_drops(clients: int) -> int:
    """Return how many of clients with different scores the code of arXiv:2402.12265 drops."""
    quantile = 1 - (clients - 1) // 2 / (2 * clients)
    kept = max(int(quantile * clients), 1)
    scores = torch.arange(1.0, kept + 1)
    threshold = torch.quantile(scores, quantile, interpolation="higher")
    return clients - int((scores <= threshold).sum())


def test_cronus_drops_all_that_may_be_malicious_where_the_published_code_keeps_some() -> None:
    """The table on its page: along one direction, the outermost clients are far from all others."""
    for clients, published in {3: 1, 5: 1, 7: 2, 10: 3, 20: 8}.items():
        minority = (clients - 1) // 2
        assert published_drops(clients) == published
        given = one_hot(*[2] * (clients - minority), *[5] * minority)
        got = Cronus().aggregate(given)[0, 5]
        assert float(got) < 1e-12  # all of the minority dropped
        honest = clients - minority
        kept = clients - published
        left = Cronus(epsilon=published / clients).aggregate(given)[0, 5]
        assert float(left) == pytest.approx((kept - honest) / kept)


def test_attackers_move_cronus_less_than_a_mean() -> None:
    """Three of ten are sure of the class that the honest find least likely."""
    honest = (rand(1, 101, C) + 0.3 * rand(7, 101, C, seed=2)).softmax(-1)
    least = honest.mean(0).argmin(-1)
    attack = torch.eye(C, dtype=F64)[least].expand(3, 101, C)
    given = SoftLabels(torch.cat([honest, attack]), "probabilities")
    robust = (Cronus(epsilon=0.3).aggregate(given) - honest.mean(0)).norm(dim=-1)
    plain = (given.mean_probabilities() - honest.mean(0)).norm(dim=-1)
    assert float(robust.mean()) < 0.3 * float(plain.mean())
    assert bool((Cronus(epsilon=0.3).aggregate(given).argmax(-1) != least).all())


def test_cronus_at_exact_ties() -> None:
    """Clients that tie are treated alike, whatever their order and that of the classes."""
    halves = one_hot(1, 1, 4, 4)
    torch.testing.assert_close(Cronus().aggregate(halves), halves.values.mean(0))
    for order in permutations((1, 4, 6)):
        different = one_hot(*order)  # all directions vary alike
        torch.testing.assert_close(Cronus().aggregate(different), different.values.mean(0))
    crowd = one_hot(0, 0, 0, 3, 6)
    torch.testing.assert_close(Cronus().aggregate(crowd)[0], torch.eye(C, dtype=F64)[0])


# --- COMET: k-means --------------------------------------------------------------------------------


def best_clusters(rows: list[Row], clusters: int) -> tuple[float, list[Row]]:
    """Return the least squared distances of all ways to split rows, and the means, largest first."""

    def means_of(split: tuple[int, ...]) -> list[tuple[list[Row], Row]]:
        parts = [
            [row for row, m in zip(rows, split, strict=True) if m == each] for each in set(split)
        ]
        return [(part, mean_loop(part)) for part in parts]

    def cost(split: tuple[int, ...]) -> float:
        return math.fsum(squared(row, mean) for part, mean in means_of(split) for row in part)

    best = min(product(range(clusters), repeat=len(rows)), key=cost)
    largest = sorted(means_of(best), key=lambda part: -len(part[0]))
    return cost(best), [mean for _, mean in largest]


def inertia(rows: list[Row], centroids: list[Row]) -> float:
    return math.fsum(min(squared(row, c) for c in centroids) for row in rows)


def assert_same_rows(got: Tensor, expected: Tensor) -> None:
    """Compare centroids, [M, D]; equally large clusters may come in any sequence."""
    nearest = torch.cdist(expected, got).argmin(1).tolist()
    assert len(got[nearest].unique(dim=0)) == len(got.unique(dim=0))
    torch.testing.assert_close(got[nearest], expected)


@pytest.mark.parametrize("clusters", [1, 2, 3])
@pytest.mark.parametrize("clients", [3, 5, 7])
def test_comet_clusters_the_answers_to_each_sample(clients: int, clusters: int) -> None:
    for mask in (None, some(clients)):
        given = labels(clients, mask=mask)
        got = COMET(clusters=clusters, by="sample").aggregate(given)
        assert got.space == "probabilities"
        assert torch.equal(got.samples, given.samples)
        for n in range(N):
            rows = sample_rows(given, n)
            _, expected = best_clusters(rows, min(clusters, len(rows)))
            assert_same_rows(got.values[:, n], torch.tensor(expected, dtype=F64))


@pytest.mark.parametrize("clusters", [1, 2, 3])
@pytest.mark.parametrize("clients", [3, 5, 7])
def test_comet_clusters_clients_by_all_that_they_predict(clients: int, clusters: int) -> None:
    for mask in (None, some(clients)):
        given = labels(clients, mask=mask)
        means = [mean_loop(sample_rows(given, n)) for n in range(N)]
        vectors = [
            [
                x
                for n in range(N)
                for x in (given.values[k, n].tolist() if given.mask[k, n] else means[n])
            ]
            for k in range(clients)
        ]
        got = COMET(clusters=clusters).aggregate(given).values
        assert got.shape == (clusters, N, C)
        expected = torch.tensor(best_clusters(vectors, clusters)[1], dtype=F64)
        assert_same_rows(got.flatten(1), expected)


@pytest.mark.parametrize(
    ("clients", "clusters", "excess"),
    [(5, 2, 1e-9), (7, 2, 1e-9), (7, 3, 1e-9), pytest.param(9, 3, 0.05, marks=pytest.mark.slow)],
)
def test_comet_comes_close_to_the_best_clusters(clients: int, clusters: int, excess: float) -> None:
    """Few clients are split in the best of all ways; from one start it is up to half as much again."""
    for seed in range(3 if clients < 9 else 1):
        given = labels(clients, seed=100 * seed + 10 * clients)
        for n in range(N):
            rows = sample_rows(given, n)
            got = COMET(clusters=clusters, by="sample").aggregate(given.keep(torch.tensor([n])))
            least, _ = best_clusters(rows, clusters)
            assert inertia(rows, got.values[:, 0].tolist()) <= (1 + excess) * least + 1e-12


@pytest.mark.parametrize("by", ["client", "sample"])
@pytest.mark.parametrize(("clients", "clusters"), [(13, 3), (17, 2), (13, 11)])
def test_more_clients_than_can_be_split_in_all_ways(by: By, clients: int, clusters: int) -> None:
    """Camps that are apart are found from any start, in any order; where nobody is left, it repeats."""
    camps = torch.arange(clients) * 5 % clusters
    logits = rand(clusters, N, C)[camps] + 0.02 * rand(clients, N, C, seed=2)
    given = SoftLabels(logits.softmax(-1), "probabilities")
    got = COMET(clusters=clusters, by=by).aggregate(given).values
    expected = torch.stack([given.values[camps == m].mean(0) for m in range(clusters)])
    turned = permuted(given, (*tuple(range(1, clients)), 0))
    for n in range(N):
        assert_same_rows(got[:, n], expected[:, n])
    torch.testing.assert_close(COMET(clusters=clusters, by=by).aggregate(turned).values, got)


@pytest.mark.parametrize("by", ["client", "sample"])
def test_comet_finds_the_best_clusters_where_they_are_apart(by: By) -> None:
    """Of all ways to split five clients in two, the one with the least squared distances."""
    camps = torch.tensor([0, 1, 1, 0, 1])
    logits = rand(2, N, C)[camps] + 0.02 * rand(5, N, C, seed=2)
    given = SoftLabels(logits.softmax(-1), "probabilities")

    def cost(split: tuple[int, ...]) -> float:
        parts = [given.values[[k for k in range(5) if split[k] == m]] for m in (0, 1)]
        return sum(float((p - p.mean(0)).square().sum()) for p in parts if len(p))

    best = min(product((0, 1), repeat=5), key=cost)
    assert best in ((0, 1, 1, 0, 1), (1, 0, 0, 1, 0))
    got = COMET(by=by).aggregate(given).values
    torch.testing.assert_close(got[0], given.values[camps == 1].mean(0))  # three clients: the first
    torch.testing.assert_close(got[1], given.values[camps == 0].mean(0))


@pytest.mark.parametrize("by", ["client", "sample"])
def test_one_cluster_is_the_mean_and_as_many_as_clients_are_the_clients(by: By) -> None:
    given = labels(3)
    one = COMET(clusters=1, by=by).aggregate(given)
    torch.testing.assert_close(one.values[0], given.mean_probabilities())
    each = COMET(clusters=3, by=by).aggregate(given).values
    for n in range(N):
        torch.testing.assert_close(
            torch.tensor(sorted(each[:, n].tolist())),
            torch.tensor(sorted(given.values[:, n].tolist())),
        )


@pytest.mark.parametrize("by", ["client", "sample"])
@pytest.mark.parametrize("clusters", [2, 5])
def test_clusters_that_nobody_is_left_for_repeat_others(by: By, clusters: int) -> None:
    alone = labels(1)
    got = COMET(clusters=clusters, by=by).aggregate(alone).values
    torch.testing.assert_close(got, alone.values.expand(clusters, N, C))
    two = labels(2)
    got = COMET(clusters=clusters, by=by).aggregate(two).values
    for n in range(N):
        found = {tuple(row) for row in got[:, n].tolist()}
        assert found == {tuple(row) for row in two.values[:, n].tolist()}


@pytest.mark.parametrize("by", ["client", "sample"])
def test_comet_at_exact_ties_and_one_hot_answers(by: By) -> None:
    """Three classes for two clusters: each centroid is the mean of whole camps, the largest first."""
    given = one_hot(0, 3, 3, 6, 3)
    got = COMET(by=by).aggregate(given).values[:, 0]
    torch.testing.assert_close(got.sum(-1), torch.ones(2, dtype=F64))
    weights = torch.tensor([[0.0, 3.0, 1.0], [1.0, 0.0, 0.0]], dtype=F64)  # of classes 0, 3, 6
    sets = [weights, weights[:, [2, 1, 0]]]
    expected = [(w / w.sum(-1, keepdim=True)) for w in sets]
    apart = [w for w in expected if torch.allclose(got[:, [0, 3, 6]], w)]
    alone = torch.tensor([[0.0, 1.0, 0.0], [0.5, 0.0, 0.5]], dtype=F64)
    assert apart or torch.allclose(got[:, [0, 3, 6]], alone)


# --- COMET: the choice -----------------------------------------------------------------------------


def client(received: SoftLabels | None, logits: Tensor) -> LocalClient:
    """Return a client whose student gives `logits`, [P, C]."""

    def predict(samples: Tensor, model: Role = "teacher") -> Tensor:
        assert model == "student"
        return logits[samples]

    return LocalClient(
        images=torch.zeros(2, 1, 3, 3),
        labels=torch.zeros(2, dtype=torch.int64),
        load_public=lambda: torch.zeros(len(logits), 1, 3, 3),
        received=received,
        state={},
        predict=predict,
        generator=lambda purpose: torch.Generator(),
    )


@pytest.mark.parametrize("by", ["client", "sample"])
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_a_client_keeps_the_centroid_nearest_to_its_own_prediction(
    by: By, dtype: torch.dtype
) -> None:
    samples = torch.tensor([2, 3, 11, 13, 29])
    for seed in range(5):
        centroids = rand(3, N, C, seed=seed).softmax(-1).to(dtype)
        logits = rand(31, C, seed=seed + 50).float()
        someone = client(SoftLabels(centroids, "probabilities", samples), logits)
        nearest_centroid(someone, by=by)
        own = logits[samples].double().softmax(-1)
        gaps = [
            [squared(centroids[m, n].tolist(), own[n].tolist()) for n in range(N)] for m in range(3)
        ]
        if by == "client":
            nearest = [min(range(3), key=lambda m: math.fsum(gaps[m]))] * N
        else:
            nearest = [min(range(3), key=lambda m: gaps[m][n]) for n in range(N)]
        chosen = someone.received
        assert chosen is not None
        require_one(chosen)
        assert chosen.values.dtype == dtype
        assert torch.equal(chosen.samples, samples)
        for n, m in enumerate(nearest):
            assert torch.equal(chosen.values[0, n], centroids[m, n])
        assert (len(set(nearest)) > 1) == (by == "sample")


def test_a_choice_is_between_probabilities_whatever_the_size_of_logits() -> None:
    """The nearest in logits would be the other one."""
    centroids = torch.tensor([[[0.5, 0.5]], [[0.99, 0.01]]])
    someone = client(SoftLabels(centroids, "probabilities"), torch.tensor([[1.2, 0.7]]))
    nearest_centroid(someone, by="sample")
    assert someone.received is not None
    assert torch.equal(someone.received.values, centroids[:1])


@pytest.mark.parametrize("by", ["client", "sample"])
def test_a_client_without_knowledge_or_samples_chooses_nothing(by: By) -> None:
    nobody = client(None, rand(31, C))
    nearest_centroid(nobody, by=by)
    assert nobody.received is None
    none = SoftLabels(torch.zeros(2, 0, C), "probabilities")
    someone = client(none, rand(31, C))
    nearest_centroid(someone, by=by)
    assert someone.received is not None
    assert someone.received.values.shape == (1, 0, C)


# --- Both ------------------------------------------------------------------------------------------

BOTH = [Cronus(), Cronus(epsilon=0.2), COMET(), COMET(by="sample"), COMET(clusters=3, by="sample")]


def values_of(strategy: Cronus | COMET, given: SoftLabels) -> Tensor:
    """Return what is aggregated as sets, [M, N, C]."""
    got = strategy.aggregate(given)
    return got.values if isinstance(got, SoftLabels) else got.unsqueeze(0)


@pytest.mark.parametrize("strategy", BOTH, ids=repr)
@pytest.mark.parametrize("ties", [False, True])
def test_the_order_of_replies_changes_nothing(strategy: Cronus | COMET, ties: bool) -> None:
    mask = None if isinstance(strategy, COMET) and strategy.by == "client" else some(5)
    given = labels(5, mask=mask)
    if ties:
        classes = torch.tensor([[0, 1], [2, 1], [2, 1], [4, 0], [6, 0]])
        given.values[:, 1:3] = torch.eye(C, dtype=F64)[classes]
    first = values_of(strategy, given)
    for order in list(permutations(range(5)))[::13]:
        torch.testing.assert_close(
            values_of(strategy, permuted(given, order)), first, rtol=0, atol=1e-15
        )


@pytest.mark.parametrize("strategy", BOTH, ids=repr)
def test_nothing_is_drawn_and_nothing_is_written_to(strategy: Cronus | COMET) -> None:
    given = labels(5, mask=some(5))
    kept = given.values.clone()
    drawn = torch.random.get_rng_state(), np.random.get_state(legacy=False)["state"]["key"]
    first, again = values_of(strategy, given), values_of(strategy, given)
    assert torch.equal(first, again)
    assert torch.equal(given.values, kept)
    assert torch.equal(torch.random.get_rng_state(), drawn[0])
    assert np.array_equal(np.random.get_state(legacy=False)["state"]["key"], drawn[1])


@pytest.mark.parametrize("strategy", BOTH, ids=repr)
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_type_simplex_and_shape_are_kept(strategy: Cronus | COMET, dtype: torch.dtype) -> None:
    given = labels(7, mask=some(7))
    single = SoftLabels(given.values.to(dtype), "probabilities", mask=given.mask)
    got = values_of(strategy, single)
    assert got.dtype == dtype
    assert got.shape[1:] == (N, C)
    assert len(got) == (strategy.clusters if isinstance(strategy, COMET) else 1)
    assert bool((got >= 0).all())
    torch.testing.assert_close(got.sum(-1), torch.ones(len(got), N, dtype=dtype))
    torch.testing.assert_close(got.double(), values_of(strategy, given), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("strategy", BOTH, ids=repr)
def test_one_client_gets_itself_back_and_equal_ones_are_as_good_as_one(
    strategy: Cronus | COMET,
) -> None:
    alone = labels(1)
    for clients in (1, 2, 5):
        given = SoftLabels(alone.values.expand(clients, N, C), "probabilities")
        got = values_of(strategy, given)
        torch.testing.assert_close(got, alone.values.expand_as(got), rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize("strategy", BOTH, ids=repr)
def test_who_did_not_answer_a_sample_is_not_heard_on_it(strategy: Cronus | COMET) -> None:
    given = labels(5, mask=some(5))
    shouting = torch.where(given.mask.unsqueeze(-1), given.values, 1e9)
    loud = SoftLabels(shouting, "probabilities", given.samples, mask=given.mask)
    assert torch.equal(values_of(strategy, loud), values_of(strategy, given))


@pytest.mark.parametrize("strategy", BOTH, ids=repr)
def test_no_samples_give_none_and_a_class_nobody_holds_stays_at_zero(
    strategy: Cronus | COMET,
) -> None:
    empty = SoftLabels(torch.zeros(3, 0, C), "probabilities")
    assert values_of(strategy, empty).shape[1:] == (0, C)
    given = labels(5)
    given.values[:, :, 4] = 0
    given.values[:] = given.values / given.values.sum(-1, keepdim=True)
    assert not values_of(strategy, given)[..., 4].any()


@pytest.mark.parametrize("strategy", [Cronus(), COMET()], ids=repr)
def test_logits_are_refused_as_both_rules_are_for_probabilities(strategy: Cronus | COMET) -> None:
    with pytest.raises(FedkdError, match=f"{strategy.name()} .* probabilities, not logits"):
        strategy.aggregate(SoftLabels(rand(3, N, C), "logits"))


def test_settings_out_of_range_are_refused() -> None:
    for epsilon in (-0.1, 0.51):
        with pytest.raises(FedkdError, match="epsilon"):
            Cronus(epsilon=epsilon)
    with pytest.raises(FedkdError, match="clusters"):
        COMET(clusters=0)
    with pytest.raises(FedkdError, match=r"by = 'sampel'.*sample"):
        COMET(by="sampel")  # type: ignore[arg-type]


@pytest.mark.parametrize("strategy", [Cronus(), COMET(weight=0.3)], ids=repr)
def test_clients_train_alone_first_then_on_both_sets_at_once(strategy: Cronus | COMET) -> None:
    answer = Predict("probabilities", model="student")
    choose = Apply(nearest_centroid, {"by": "client"}, name="choose")
    chooses = [choose] if isinstance(strategy, COMET) else []
    assert strategy.phases(1) == [*chooses, Revisit(model="student"), answer]
    for round in (2, 3):
        *before, joint, last = strategy.phases(round)
        weight = strategy.weight if isinstance(strategy, COMET) else 1.0
        assert joint == Fit("digest", private={"ce": 1.0}, public={"kl": weight})
        assert last == answer
        assert before == chooses
        assert closing(strategy.phases(round), strategy.closes) == [*before, joint]


# --- In a run --------------------------------------------------------------------------------------


def answers_of(run_exchange: object) -> SoftLabels:
    answers = run_exchange.answers([0, 1, 2])  # type: ignore[attr-defined]
    assert isinstance(answers, SoftLabels)
    return answers


@pytest.mark.parametrize("public_labels", [True, False])
def test_a_federation_of_cronus(public_labels: bool) -> None:
    experiment = tiny(num_server_rounds=2, public_labels=public_labels)
    run = federate(experiment, strategy=Cronus())
    for exchange, later in zip(run.exchanges, run.exchanges[1:], strict=False):
        received = later.instructions[1].knowledge
        assert isinstance(received, SoftLabels)
        expected = Cronus().aggregate(answers_of(exchange))
        assert torch.equal(received.values[0], expected)
    assert [row["bytes_up"] for row in run.rows] == [3 * P * CLASSES * 4] * 2
    assert [row["bytes_down"] for row in run.rows] == [0, 3 * P * CLASSES * 4]


@pytest.mark.parametrize("strategy", [COMET(), COMET(clusters=3, by="sample")], ids=repr)
def test_a_federation_of_comet(strategy: COMET) -> None:
    """All receive all centroids; as each chooses for itself, models stay apart."""
    run = federate(tiny(num_server_rounds=2), strategy=strategy)
    received = run.knowledge
    assert isinstance(received, SoftLabels)
    expected = strategy.aggregate(answers_of(run.exchanges[1]))
    assert torch.equal(received.values, expected.values)
    assert [row["bytes_up"] for row in run.rows] == [3 * P * CLASSES * 4] * 2
    down = 3 * strategy.clusters * P * CLASSES * 4
    assert [row["bytes_down"] for row in run.rows] == [0, down]
    accuracy = [run.exchanges[2].report(k).metrics["accuracy"] for k in range(3)]
    assert all(0 <= a <= 1 for a in accuracy)


def test_part_of_the_public_set_and_part_of_the_clients() -> None:
    keys = {"num_server_rounds": 3, "public_per_round": 11, "num_clients": 5, "fraction_train": 0.6}
    for strategy in (Cronus(), COMET(), COMET(by="sample")):
        run = federate(tiny(**keys), strategy=strategy)
        assert [len(row["answered"]) for row in run.rows] == [3, 3, 3]
        assert [row["bytes_up"] for row in run.rows] == [3 * 11 * CLASSES * 4] * 3
        index = min(4 * 11, math.ceil(P / 8))
        sets = strategy.clusters if isinstance(strategy, COMET) else 1
        down = [3 * index] + [3 * (sets * 11 * CLASSES * 4 + 2 * index)] * 2
        assert [row["bytes_down"] for row in run.rows] == down


def test_several_centroids_are_digested_only_after_a_choice() -> None:
    """Without its procedure, COMET's clients would have more than one answer a sample."""

    class NoChoice(COMET):
        """COMET without its procedure."""

        def phases(self, round: int) -> list:  # type: ignore[type-arg]
            return [phase for phase in super().phases(round) if not isinstance(phase, Apply)]

    with pytest.raises(FedkdError, match="knowledge of 2 clients cannot be sent to one"):
        federate(tiny(num_server_rounds=4), strategy=NoChoice())
