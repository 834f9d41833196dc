"""KT-pFL against loops written from the paper: coefficients, teachers, and who is absent."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from federation_tools import C as CLASSES
from federation_tools import P, federate, tiny
from torch import Tensor

from fedkd.data.federated import federated_data
from fedkd.errors import FedkdError
from fedkd.experiment import Experiment
from fedkd.federation.server import Replies, Server
from fedkd.knowledge import SoftLabels
from fedkd.phases import Digest, Predict, Revisit
from strategies.ktpfl import KTpFL

K, N, C = 3, 5, 7
F64 = torch.float64
MASK = torch.tensor([[1, 1, 0, 0, 1], [1, 0, 1, 1, 1], [1, 1, 1, 0, 1]]).bool()
"""Samples 0 and 4 are answered by all."""

Matrix = list[list[float]]


def rand(*shape: int, seed: int = 1) -> Tensor:
    return 3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def answers(clients: list[int], mask: Tensor | None = None, seed: int = 1) -> SoftLabels:
    values = rand(len(clients), N, C, seed=seed).softmax(-1)
    mask = torch.ones(len(clients), N).bool() if mask is None else mask
    values = values * mask.unsqueeze(-1)
    samples = torch.tensor([2, 3, 11, 5, 7])
    return SoftLabels(values, "probabilities", samples, torch.tensor(clients), mask=mask)


def server_of(num_clients: int = K, c: Tensor | None = None) -> Server:
    experiment = tiny(num_clients=num_clients)
    server = Server(experiment, federated_data(experiment), round=1)
    if c is not None:
        server.state["coefficients"] = c.clone()
    return server


def learnt(strategy: KTpFL, server: Server, *rounds: SoftLabels) -> Tensor:
    """Return the coefficients after some rounds."""
    for given in rounds:
        assert strategy.update(Replies(given.clients.tolist(), given), server) is given
    c = server.state["coefficients"]
    assert isinstance(c, Tensor)
    return c


def teacher(given: SoftLabels, client: int, server: Server) -> Tensor:
    """Return what a client receives, which must be for it alone."""
    mine = KTpFL().personalise(given, client, server)
    assert torch.equal(mine.samples, given.samples)
    assert (len(mine.values), mine.space) == (1, given.space)
    return mine.values[0]


# --- The coefficients ----------------------------------------------------------------------------


def objective(row: list[float], k: int, given: Tensor, rho: float) -> float:
    """MSE(p_k, Σ_l c_kl p_l) + ρ MSE(c_k, 1/K), in Python's own arithmetic."""
    clients, samples, classes = given.shape
    squares = []
    for n in range(samples):
        for c in range(classes):
            mixed = math.fsum(row[j] * float(given[j, n, c]) for j in range(clients))
            squares.append((float(given[k, n, c]) - mixed) ** 2)
    pull = math.fsum((row[j] - 1 / clients) ** 2 for j in range(clients))
    return math.fsum(squares) / len(squares) + rho * pull / clients


def step_loop(c: Matrix, given: Tensor, rate: float, rho: float) -> Matrix:
    """One step down the objective of each client, then onto the simplex.

    It is quadratic in c, of which a central difference is the gradient exactly.
    """
    stepped = []
    for k, row in enumerate(c):
        new = []
        for j in range(len(row)):
            sides = [[*row[:j], row[j] + h, *row[j + 1 :]] for h in (0.5, -0.5)]
            up, down = (objective(side, k, given, rho) for side in sides)
            new.append(max(row[j] - rate * (up - down), 0.0))
        total = math.fsum(new)
        stepped.append([v / total for v in new] if total > 0 else [1 / len(new)] * len(new))
    return stepped


@pytest.mark.parametrize("rho", [0.0, 0.7])
@pytest.mark.parametrize("rate", [0.5, 20.0])
@pytest.mark.parametrize("steps", [1, 4])
def test_coefficients_step_down_the_paper_s_objective(rho: float, rate: float, steps: int) -> None:
    """From 1/K, two rounds; the larger rate meets the edge of the simplex."""
    strategy = KTpFL(rho=rho, learning_rate=rate, steps=steps)
    rounds = [answers([0, 1, 2], seed=1), answers([0, 1, 2], seed=2)]
    expected: Matrix = [[1 / K] * K for _ in range(K)]
    for given in rounds:
        for _ in range(steps):
            expected = step_loop(expected, given.values, rate, rho)
    c = learnt(strategy, server_of(), *rounds)
    torch.testing.assert_close(c, torch.tensor(expected, dtype=F64), rtol=1e-10, atol=1e-12)
    assert float((c - 1 / K).abs().max()) > 0.03
    assert bool((c == 0).any()) == (rate == 20)


def test_a_step_worked_out_by_hand() -> None:
    """Of p = (1, 0), (0, 1) on one sample the mixture is (½, ½), and c_k steps by ± 2·½·½ / 2 · rate."""
    values = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]], dtype=F64)
    given = SoftLabels(values, "probabilities", clients=torch.tensor([0, 1]))
    c = learnt(KTpFL(learning_rate=0.4, rho=0.7), server_of(2), given)
    # Own: ∂ = 2 · ((½ − 1) · 1 + ½ · 0) / 2 = −½, the other's +½; ρ pulls nowhere at 1/K.
    torch.testing.assert_close(c, torch.tensor([[0.7, 0.3], [0.3, 0.7]], dtype=F64))


def test_equal_clients_stay_equal() -> None:
    given = answers([0, 1, 2])
    same = SoftLabels(given.values[[1, 1, 1]], "probabilities", given.samples)
    c = learnt(KTpFL(), server_of(), same, same)
    torch.testing.assert_close(c, torch.full((K, K), 1 / K, dtype=F64), rtol=1e-14, atol=0)


def test_clients_that_predict_alike_come_to_teach_each_other() -> None:
    """Clients 0 and 1 say nearly the same, client 2 something else."""
    base = rand(2, N, C).softmax(-1)
    near = 0.95 * base[0] + 0.05 * base[1]
    given = SoftLabels(torch.stack([base[0], near, base[1]]), "probabilities")
    c = learnt(KTpFL(rho=0.03, learning_rate=2), server_of(), *[given] * 20)
    assert c[0, 1] > 4 * c[0, 2]
    assert c[1, 0] > 4 * c[1, 2]
    assert c[2, 2] > 0.6


def test_rho_holds_the_coefficients_together_and_nothing_else_does() -> None:
    """Softmax(5 c), which the authors' code takes every round, would undo what was learnt before."""
    given, slowly = answers([0, 1, 2]), 0.05
    spread = [
        float((learnt(KTpFL(rho=rho), server_of(), *[given] * 15) - 1 / K).abs().max())
        for rho in (0.0, 0.1, 0.9)
    ]
    assert spread[0] > spread[1] > spread[2] > 0
    one, eight = (
        float(
            (learnt(KTpFL(rho=0, learning_rate=slowly), server_of(), *[given] * n) - 1 / K).amax()
        )
        for n in (1, 8)
    )
    assert 6 * one < eight < 9 * one


def test_a_client_alone_trusts_itself() -> None:
    c = learnt(KTpFL(), server_of(1), answers([0]))
    assert torch.equal(c, torch.ones(1, 1, dtype=F64))


def test_where_no_coefficient_is_left_all_are_equal() -> None:
    """Of (0.6, 0.4) and (1, 0) the mixture is (0.8, 0.2): client 0 would have less of both."""
    values = torch.tensor([[[0.6, 0.4]], [[1.0, 0.0]]], dtype=F64)
    given = SoftLabels(values, "probabilities")
    c = torch.tensor([[0.5, 0.5], [0.5, 0.5]], dtype=F64)
    stepped = learnt(KTpFL(learning_rate=1e6), server_of(2, c), given)
    assert stepped[0].tolist() == [0.5, 0.5]
    torch.testing.assert_close(
        stepped[1], torch.tensor([1 / 6, 5 / 6], dtype=F64), rtol=1e-4, atol=0
    )


# --- Who is absent -------------------------------------------------------------------------------


def test_of_absent_clients_nothing_is_learnt() -> None:
    """Of five clients three answer: their block steps as if they were all, in what the rest leave."""
    c = rand(5, 5, seed=7).softmax(-1)
    here = [0, 2, 3]
    given = answers(here)
    stepped = learnt(KTpFL(learning_rate=0.5), server_of(5, c), given)
    share = c[here][:, here].sum(1, keepdim=True)
    alone: Matrix = (c[here][:, here] / share).tolist()
    expected = c.clone()
    block = torch.tensor(step_loop(alone, given.values, 0.5, 0.7), dtype=F64)
    for row, k in enumerate(here):
        for column, j in enumerate(here):
            expected[k, j] = share[row, 0] * block[row, column]
    torch.testing.assert_close(stepped, expected, rtol=1e-10, atol=1e-13)
    assert torch.equal(stepped[[1, 4]], c[[1, 4]])
    assert torch.equal(stepped[:, [1, 4]], c[:, [1, 4]])
    torch.testing.assert_close(stepped.sum(1), torch.ones(5, dtype=F64))
    assert float((stepped - c).abs().max()) > 1e-3


def test_partial_answers_are_compared_where_all_answered() -> None:
    whole = answers([0, 1, 2])
    common = SoftLabels(whole.values[:, [0, 4]], "probabilities", whole.samples[[0, 4]])
    some = answers([0, 1, 2], MASK)
    torch.testing.assert_close(
        learnt(KTpFL(), server_of(), some), learnt(KTpFL(), server_of(), common)
    )


def test_no_common_sample_or_none_at_all_leaves_the_start() -> None:
    apart = answers(
        [0, 1, 2], torch.tensor([[1, 0, 0, 1, 0], [0, 1, 1, 0, 0], [0, 0, 0, 0, 1]]).bool()
    )
    nothing = SoftLabels(torch.zeros(K, 0, C, dtype=F64), "probabilities")
    for given in (apart, nothing):
        c = learnt(KTpFL(), server_of(), given)
        assert torch.equal(c, torch.full((K, K), 1 / K, dtype=F64))
    assert teacher(nothing, 1, server_of()).shape == (0, C)


@pytest.mark.parametrize("order", [[2, 0, 1], [1, 0, 2]])
def test_the_order_of_replies_does_not_matter(order: list[int]) -> None:
    given = answers([0, 1, 2])
    shuffled = SoftLabels(given.values[order], "probabilities", given.samples, given.clients[order])
    servers = server_of(), server_of()
    a, b = learnt(KTpFL(), servers[0], given), learnt(KTpFL(), servers[1], shuffled)
    torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-15)
    for k in range(K):
        torch.testing.assert_close(teacher(given, k, servers[0]), teacher(shuffled, k, servers[1]))


# --- The teachers --------------------------------------------------------------------------------


def teacher_loop(given: SoftLabels, row: list[float]) -> Matrix:
    """Σ_l c_kl p_l over the clients that answered, by coefficients that sum to 1 over them."""
    rows = []
    for n in range(len(given.samples)):
        there = [j for j in range(len(given.clients)) if given.mask[j, n]]
        shares = [row[int(given.clients[j])] for j in there]
        shares = shares if math.fsum(shares) > 0 else [1.0] * len(there)
        rows.append(
            [
                math.fsum(
                    s * float(given.values[j, n, c]) for s, j in zip(shares, there, strict=True)
                )
                / math.fsum(shares)
                for c in range(C)
            ]
        )
    return rows


@pytest.mark.parametrize("mask", [None, MASK], ids=["all", "some"])
@pytest.mark.parametrize("clients", [[0, 1, 2], [1, 3, 4]], ids=str)
def test_every_client_has_its_own_mixture(clients: list[int], mask: Tensor | None) -> None:
    """Those that did not answer have one as well."""
    c = rand(5, 5, seed=3).softmax(-1)
    c[2] = torch.tensor([0, 0, 1, 0, 0])  # trusts client 2 alone, who may be absent
    server, given = server_of(5, c), answers(clients, mask)
    for client in range(5):
        mine = teacher(given, client, server)
        expected = torch.tensor(teacher_loop(given, c[client].tolist()), dtype=F64)
        torch.testing.assert_close(mine, expected, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(mine.sum(-1), torch.ones(N, dtype=F64))


def test_before_anything_is_learnt_all_have_the_mean() -> None:
    given = answers([0, 1, 2], MASK)
    server, mean = server_of(), KTpFL().aggregate(given)
    for client in range(K):
        torch.testing.assert_close(teacher(given, client, server), mean, rtol=1e-14, atol=1e-15)
    torch.testing.assert_close(mean[1], (given.values[0, 1] + given.values[2, 1]) / 2)


def test_one_client_gets_its_own_answer_back() -> None:
    given, server = answers([0]), server_of(1)
    learnt(KTpFL(), server, given)
    assert torch.equal(teacher(given, 0, server), given.values[0])
    assert torch.equal(KTpFL().aggregate(given), given.values[0])


def test_one_hot_answers_are_mixed_to_their_coefficients() -> None:
    values = torch.eye(C, dtype=F64)[:K].unsqueeze(1)
    given = SoftLabels(values, "probabilities", torch.tensor([4]))
    server = server_of()
    c = learnt(KTpFL(), server, given)
    for client in range(K):
        mine = teacher(given, client, server)
        torch.testing.assert_close(mine[0, :K], c[client])
        assert torch.equal(mine[0, K:], torch.zeros(C - K, dtype=F64))  # classes that nobody names


def test_type_and_input_are_kept() -> None:
    given = answers([0, 1, 2])
    single = SoftLabels(given.values.float(), "probabilities", given.samples)
    before, server = single.values.clone(), server_of()
    learnt(KTpFL(), server, single)
    assert teacher(single, 1, server).dtype == torch.float32
    assert KTpFL().aggregate(single).dtype == torch.float32
    assert torch.equal(single.values, before)


def test_logits_are_refused_as_its_rule_is_for_probabilities() -> None:
    with pytest.raises(FedkdError, match="probabilities"):
        KTpFL().aggregate(SoftLabels(rand(K, N, C), "logits"))


@pytest.mark.parametrize(
    "settings", [{"rho": -0.1}, {"learning_rate": 0.0}, {"steps": 0}, {"rho": math.nan}], ids=str
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(FedkdError, match="KTpFL"):
        KTpFL(**settings)


# --- In a federation -----------------------------------------------------------------------------


def test_a_round_digests_revisits_and_answers_with_probabilities() -> None:
    assert KTpFL().phases(3) == [Digest(), Revisit(), Predict("probabilities")]


def stepped_loop(c: Matrix, here: list[int], said: SoftLabels, strategy: KTpFL) -> Matrix:
    """One round's step of the clients that answered, within what the others leave them."""
    shares = [math.fsum(c[k][j] for j in here) for k in here]
    block = [[c[k][j] / share for j in here] for k, share in zip(here, shares, strict=True)]
    block = step_loop(block, said.values, strategy.learning_rate, strategy.rho)
    new = [list(row) for row in c]
    for k, share, row in zip(here, shares, block, strict=True):
        for j, v in zip(here, row, strict=True):
            new[k][j] = share * v
    return new


def replayed(experiment: Experiment, strategy: KTpFL) -> None:
    """Check what every client of a run received against the loops, round by round."""
    run = federate(experiment, strategy=strategy)
    assert [row["dropped"] for row in run.rows] == [{}] * len(run.rows)
    everybody = experiment.num_clients
    c: Matrix = [[1 / everybody] * everybody] * everybody
    differences = []
    for exchange, later in itertools.pairwise(run.exchanges):
        here = sorted(exchange.instructions)
        said = exchange.answers(here)
        assert isinstance(said, SoftLabels)
        c = stepped_loop(c, here, said, strategy)
        for k, order in later.instructions.items():
            assert isinstance(order.knowledge, SoftLabels)
            mine = order.knowledge.values[0]
            torch.testing.assert_close(mine, teacher_loop_of(said, c[k]), rtol=1e-4, atol=1e-5)
            differences.append(float((mine - said.mean_probabilities()).abs().max()))
    assert max(differences) > 1e-3  # a teacher is not the mean


def teacher_loop_of(given: SoftLabels, row: list[float]) -> Tensor:
    """Return the mixture of complete answers by a row of coefficients."""
    shares = [row[k] for k in given.clients.tolist()]
    mixed = torch.zeros(given.values.shape[1:], dtype=F64)
    for share, values in zip(shares, given.values.double(), strict=True):
        mixed += share / math.fsum(shares) * values
    return mixed.float()


@pytest.mark.parametrize(
    "keys",
    [{}, {"num_clients": 5, "fraction_train": 0.6, "public_per_round": 11}],
    ids=["all", "some"],
)
def test_each_client_of_a_federation_receives_its_own_teacher(keys: dict[str, Any]) -> None:
    experiment = tiny(num_server_rounds=3, partition="dirichlet", **keys)
    replayed(experiment, KTpFL(rho=0.1, learning_rate=30))


def test_it_moves_the_bytes_of_its_formulas() -> None:
    rows = federate(tiny(num_server_rounds=2), strategy=KTpFL()).rows
    sizes = {"P": P, "C": CLASSES, "I": 0}
    up, down = (eval(formula, {}, sizes) for formula in (KTpFL.facts.up, KTpFL.facts.down))
    assert rows[1]["bytes_up"] == K * up
    assert rows[1]["bytes_down"] == K * down


def test_teachers_change_what_students_become() -> None:
    """Against one teacher for all: the coefficients reach the students."""
    taught = [
        federate(tiny(num_server_rounds=4, partition="dirichlet"), strategy=strategy)
        for strategy in (KTpFL(rho=0, learning_rate=50), KTpFL(rho=0, learning_rate=1e-9))
    ]
    own, shared = (run.rows[-1]["loss_revisit"] for run in taught)
    assert own != shared
    assert taught[0].rows[0]["loss_revisit"] == taught[1].rows[0]["loss_revisit"]


def test_public_labels_are_learnt_unless_alpha_is_1() -> None:
    """As its page says: 1 - α of the digest is cross entropy, which the paper's has not."""
    for alpha, learns in ((1.0, False), (0.5, True)):
        runs = [
            federate(
                tiny(num_server_rounds=2, alpha=alpha, public_labels=labelled), strategy=KTpFL()
            )
            for labelled in (True, False)
        ]
        with_labels, without = (run.knowledge for run in runs)
        assert isinstance(with_labels, SoftLabels)
        assert isinstance(without, SoftLabels)
        same = torch.allclose(with_labels.values, without.values, atol=1e-6)
        assert same is not learns
