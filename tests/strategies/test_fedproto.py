"""FedProto against float64 loops written from the paper, alone and in a federation of three."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from federation_tools import C as CLASSES
from federation_tools import federate, one_step, shard, starting
from torch import Tensor, nn
from torch.func import vmap

from fedkd.data.federated import federated_data
from fedkd.errors import FedkdError
from fedkd.experiment import Experiment
from fedkd.knowledge import ClassMeans
from fedkd.losses import Step
from fedkd.phases import ClassifyByMeans, MeanByClass, Revisit, closing
from strategies.fedproto import FedProto, towards_prototype

K, B, L, D = 3, 5, 7, 11
F64 = torch.float64
COUNTS = torch.tensor([[4, 0, 1, 2, 0, 9, 3], [1, 0, 5, 0, 0, 2, 8], [2, 0, 0, 6, 3, 1, 1]])
"""Images by client and class: class 1 is nobody's, class 4 that of client 2 alone."""
LABELS = torch.tensor([[0, 1, 5, 2, 5], [6, 3, 4, 1, 0], [2, 2, 6, 4, 3]])


def rand(*shape: int, seed: int = 1) -> Tensor:
    return 3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def means(counts: Tensor = COUNTS, seed: int = 1) -> ClassMeans:
    """Return the prototypes of K clients, zeros where a class is absent."""
    values = rand(*counts.shape, D, seed=seed) * (counts > 0).unsqueeze(-1)
    return ClassMeans(values, counts, torch.arange(len(counts)), "features")


def step(features: Tensor, labels: Tensor, values: Tensor, counts: Tensor) -> Step:
    logits = torch.zeros(len(labels), L, dtype=F64)
    return Step(logits, labels, None, {}, {}, {}, features, values, counts)


# --- The loss term -------------------------------------------------------------------------------


def term_loop(features: Tensor, labels: Tensor, values: Tensor, counts: Tensor) -> list[float]:
    """Mean over D of |h_d − C̄_d^(y)|², image by image, in Python's own arithmetic."""
    losses = []
    for h, y in zip(features.tolist(), labels.tolist(), strict=True):
        squares = [(a - b) ** 2 for a, b in zip(h, values[y].tolist(), strict=True)]
        losses.append(math.fsum(squares) / len(h) if counts[y] > 0 else 0.0)
    return losses


@pytest.mark.parametrize("k", range(K))
def test_the_term_is_the_mean_squared_distance_to_the_labels_prototype(k: int) -> None:
    features, given = rand(B, D, seed=k), means()
    values, counts = given.values[k], given.counts[k]
    losses = towards_prototype(step(features, LABELS[k], values, counts))
    expected = torch.tensor(term_loop(features, LABELS[k], values, counts), dtype=F64)
    assert losses.shape == (B,)
    torch.testing.assert_close(losses, expected, rtol=1e-13, atol=1e-13)
    is_absent = counts[LABELS[k]] == 0
    assert bool(is_absent.any())
    assert torch.equal(losses == 0, is_absent)


@pytest.mark.parametrize("k", range(K))
def test_its_gradient_points_away_from_the_prototype(k: int) -> None:
    """Closed form: ∂/∂h = 2 (h − C̄^(y)) / D, and nothing where the class is absent."""
    features, given = rand(B, D, seed=k).requires_grad_(), means()
    losses = towards_prototype(step(features, LABELS[k], given.values[k], given.counts[k]))
    (gradient,) = torch.autograd.grad(losses.sum(), features)
    present = (given.counts[k][LABELS[k]] > 0).unsqueeze(-1)
    expected = 2 * (features.detach() - given.values[k][LABELS[k]]) / D * present
    torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("shared", [True, False])
def test_mapped_over_clients_it_is_what_it_is_in_a_loop(shared: bool) -> None:
    """With what all receive, and with what each receives, values and gradients."""
    features, given = rand(K, B, D, seed=4).requires_grad_(), means()
    values, counts = (given.values[2], given.counts[2]) if shared else (given.values, given.counts)
    axis = None if shared else 0
    mapped = vmap(lambda *s: towards_prototype(step(*s)), in_dims=(0, 0, axis, axis))(
        features, LABELS, values, counts
    )
    rows = [2 if shared else k for k in range(K)]
    looped = torch.stack(
        [
            towards_prototype(step(features[k], LABELS[k], given.values[row], given.counts[row]))
            for k, row in enumerate(rows)
        ]
    )
    torch.testing.assert_close(mapped, looped, rtol=1e-14, atol=1e-14)
    weights = rand(K, B, seed=5)
    for_mapped, for_looped = (
        torch.autograd.grad((weights * losses).sum(), features)[0] for losses in (mapped, looped)
    )
    torch.testing.assert_close(for_mapped, for_looped, rtol=1e-13, atol=1e-14)
    assert float(for_looped.abs().max()) > 0.1


def test_features_on_their_prototype_are_left_alone() -> None:
    given = means(torch.ones(K, L).long())
    features = given.values[0][LABELS[0]].clone().requires_grad_()
    losses = towards_prototype(step(features, LABELS[0], given.values[0], given.counts[0]))
    (gradient,) = torch.autograd.grad(losses.sum(), features)
    assert bool((losses == 0).all())
    assert bool((gradient == 0).all())


def test_an_absent_class_gives_no_gradient_whatever_stands_in_its_place() -> None:
    """The zeros of an absent class are no prototype: nothing is pulled towards the origin."""
    features = rand(B, D).requires_grad_()
    nothing = torch.zeros(L, D, dtype=F64)
    losses = towards_prototype(step(features, LABELS[0], nothing, torch.zeros(L).long()))
    (gradient,) = torch.autograd.grad(losses.sum(), features)
    assert bool((losses == 0).all())
    assert bool((gradient == 0).all())


# --- The aggregate -------------------------------------------------------------------------------


def aggregate_loop(given: ClassMeans) -> list[list[float]]:
    """C̄^(j) = Σ_i |D_ij| / N_j · C_i^(j): equation 6 without its second division."""
    k, labels, d = given.values.shape
    rows = []
    for j in range(labels):
        total = sum(int(given.counts[i, j]) for i in range(k))
        rows.append(
            [
                math.fsum(
                    int(given.counts[i, j]) / total * float(given.values[i, j, x]) for i in range(k)
                )
                if total
                else 0.0
                for x in range(d)
            ]
        )
    return rows


@pytest.mark.parametrize("counts", [COUNTS, COUNTS + 1, torch.ones_like(COUNTS)], ids=str)
def test_prototypes_are_means_by_images(counts: Tensor) -> None:
    given = means(counts)
    shared = FedProto().aggregate(given)
    assert shared.values.shape == (1, L, D)
    assert shared.of == "features"
    expected = torch.tensor(aggregate_loop(given), dtype=F64)
    torch.testing.assert_close(shared.values[0], expected, rtol=1e-12, atol=1e-14)
    assert torch.equal(shared.counts[0], counts.sum(0))


def test_equal_prototypes_do_not_shrink() -> None:
    """Equation 6 as printed would return C / 3 for three clients that all say C."""
    one = means(COUNTS[:1] + 1)
    thrice = ClassMeans(
        one.values.expand(K, L, D),
        torch.tensor([[2], [3], [5]]).expand(K, L),
        torch.arange(K),
        one.of,
    )
    torch.testing.assert_close(FedProto().aggregate(thrice).values, one.values, rtol=1e-14, atol=0)


def test_a_class_nobody_has_stays_absent_and_one_that_one_has_is_its_own() -> None:
    shared = FedProto().aggregate(means())
    assert shared.present[0].tolist() == [True, False, True, True, True, True, True]
    assert bool((shared.values[0, 1] == 0).all())
    torch.testing.assert_close(shared.values[0, 4], means().values[2, 4], rtol=1e-15, atol=0)


def test_clients_without_a_class_do_not_dilute_its_prototype() -> None:
    counts = torch.zeros(100, L).long()
    counts[13, 3] = 2
    given = means(counts)
    torch.testing.assert_close(
        FedProto().aggregate(given).values[0, 3], given.values[13, 3], rtol=1e-14, atol=0
    )


def test_one_client_gets_itself_back_and_the_order_does_not_matter() -> None:
    given = means()
    for k in range(K):
        alone = ClassMeans(
            given.values[k : k + 1], given.counts[k : k + 1], torch.tensor([k]), given.of
        )
        mine = FedProto().aggregate(alone)
        torch.testing.assert_close(mine.values, alone.values, rtol=1e-15, atol=0)
        assert torch.equal(mine.counts, alone.counts)
    order = torch.tensor([2, 0, 1])
    permuted = ClassMeans(given.values[order], given.counts[order], given.clients[order], given.of)
    torch.testing.assert_close(
        FedProto().aggregate(permuted).values,
        FedProto().aggregate(given).values,
        rtol=1e-13,
        atol=1e-14,
    )


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_the_aggregate_keeps_the_type_and_changes_nothing(dtype: torch.dtype) -> None:
    given, exact = means(), FedProto().aggregate(means()).values
    given = ClassMeans(given.values.to(dtype), given.counts, given.clients, given.of)
    before = given.values.clone()
    shared = FedProto().aggregate(given)
    assert shared.values.dtype == dtype
    torch.testing.assert_close(shared.values.double(), exact, rtol=1e-5, atol=1e-5)
    assert torch.equal(given.values, before)


# --- The strategy --------------------------------------------------------------------------------


def test_fedproto_revisits_under_both_terms_and_answers_with_mean_features() -> None:
    revisit = Revisit({"ce": 1.0, towards_prototype: 0.3}, model="student")
    assert FedProto(weight=0.3).phases(1) == [
        ClassifyByMeans(),
        revisit,
        MeanByClass("features"),
    ]
    assert revisit.private == {"ce": 1.0, "strategies.fedproto:towards_prototype": 0.3}
    assert closing(FedProto().phases(5), FedProto.closes) == [ClassifyByMeans()]


@pytest.mark.parametrize("weight", [-1.0, 0.0, math.nan])
def test_a_weight_that_is_not_above_0_is_refused(weight: float) -> None:
    with pytest.raises(FedkdError, match="weight"):
        FedProto(weight=weight)


# --- A federation of three -----------------------------------------------------------------------


def step_of_the_paper(
    model: Any, x: Tensor, y: Tensor, prototypes: dict[int, Tensor], weight: float, rate: float
) -> None:
    """Descend L_S + λ·L_R once, in place."""
    features = model.body(x)
    loss = nn.functional.cross_entropy(model.head(features), y)
    for label, prototype in prototypes.items():
        mine = features[y == label]
        loss = loss + weight * (mine - prototype).square().sum() / features.numel()
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    with torch.no_grad():
        for parameter, gradient in zip(model.parameters(), gradients, strict=True):
            parameter.sub_(rate * gradient)


def rounds_of_the_paper(experiment: Experiment, weight: float) -> list[list[dict[int, Tensor]]]:
    """Run algorithm 1 as it stands: C_i by round, client and label."""
    data = federated_data(experiment)
    clients = range(experiment.num_clients)
    models = [starting(experiment, k) for k in clients]
    shared: dict[int, Tensor] = {}
    said = []
    for _ in range(experiment.num_server_rounds):
        now: list[dict[int, Tensor]] = []
        sums: dict[int, tuple[Tensor, int]] = {}
        for k in clients:
            x, y = shard(data, k)
            step_of_the_paper(models[k], x, y, shared, weight, experiment.learning_rate)
            with torch.no_grad():
                features = models[k].body(x)
            now.append({c: features[y == c].mean(0) for c in y.unique().tolist()})
            for c in now[-1]:
                total, count = sums.get(c, (torch.zeros(features.shape[1], dtype=F64), 0))
                sums[c] = total + features[y == c].sum(0), count + int((y == c).sum())
        shared = {c: total / count for c, (total, count) in sums.items()}
        said.append(now)
    return said


def assert_said(answer: object, expected: dict[int, Tensor]) -> None:
    """Compare what a client sent, in float32, with the paper's in float64."""
    assert isinstance(answer, ClassMeans)
    assert answer.of == "features"
    assert answer.present[0].nonzero().flatten().tolist() == sorted(expected)
    for label, mean in expected.items():
        torch.testing.assert_close(answer.values[0, label].double(), mean, rtol=1e-4, atol=2e-5)


def far_apart(one: Sequence[dict[int, Tensor]], other: Sequence[dict[int, Tensor]]) -> float:
    return max(float((a[c] - b[c]).abs().max()) for a, b in zip(one, other, strict=True) for c in a)


@pytest.mark.parametrize(
    ("student", "plan"), [("mlp-8", "stacked"), ("mlp-8", "loop"), ("mlp-84,lenet", "loop")]
)
def test_three_rounds_are_those_of_the_papers_algorithm(student: str, plan: str) -> None:
    """Architectures may be mixed where their features are equally wide, as lenet's 84."""
    experiment = one_step(student=student, plan=plan)
    done = federate(experiment, strategy=FedProto(weight=0.7))
    assert [row["dropped"] for row in done.rows] == [{}] * 3
    expected = rounds_of_the_paper(experiment, weight=0.7)
    for number in range(3):
        for k in range(K):
            assert_said(done.exchanges[number].report(k).answer, expected[number][k])
    assert far_apart(expected[2], rounds_of_the_paper(experiment, weight=0.0)[2]) > 1e-3


@pytest.mark.parametrize("width", [8, 5])
def test_bytes_are_those_of_prototypes_and_counts(width: int) -> None:
    done = federate(one_step(student=f"mlp-{width}"), strategy=FedProto())
    payload = K * (CLASSES * width * 4 + CLASSES * 4)
    assert [row["bytes_up"] for row in done.rows] == [payload] * 3
    assert [row["bytes_down"] for row in done.rows] == [0, payload, payload]


def test_features_of_two_widths_are_an_error_that_names_them() -> None:
    with pytest.raises(FedkdError, match=r"\b8\b.*\b84\b"):
        federate(one_step(student="mlp-8,lenet"), strategy=FedProto())


def test_all_receive_the_same_prototypes() -> None:
    done = federate(one_step(), strategy=FedProto())
    given = [done.exchanges[0].report(k).answer for k in range(K)]
    said = ClassMeans.stack([answer for answer in given if isinstance(answer, ClassMeans)])
    assert len(said.clients) == K
    for k in range(K):
        heard = done.exchanges[1].instructions[k].knowledge
        assert isinstance(heard, ClassMeans)
        torch.testing.assert_close(
            heard.values[0].double(),
            torch.tensor(aggregate_loop(said), dtype=F64),
            rtol=1e-6,
            atol=1e-6,
        )
        assert torch.equal(heard.counts[0], said.counts.sum(0))
