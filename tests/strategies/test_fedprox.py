"""FedProx against its formula, and against FedAvg where μ is 0."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from federation_tools import Finished, federate, tiny
from torch import Tensor
from torch.func import vmap
from torch.nn import functional as F

from fedkd.data.federated import federated_data
from fedkd.errors import FedkdError
from fedkd.experiment import Experiment
from fedkd.knowledge import ModelWeights, Weights
from fedkd.losses import Step
from fedkd.phases import Load, Revisit, SendWeights, closing
from fedkd.training.architectures import architectures_of
from fedkd.training.models import build
from strategies.fedavg import FedAvg
from strategies.fedprox import FedProx, proximal

K, B, C, D = 3, 5, 7, 11
F64 = torch.float64
SHAPES = {"body.weight": (C, D), "body.bias": (C,), "scale": ()}


def rand(*shape: int, seed: int = 1) -> Tensor:
    return 3 * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def params(seed: int, *stack: int) -> dict[str, Tensor]:
    return {n: rand(*stack, *shape, seed=seed + len(n)) for n, shape in SHAPES.items()}


def step(params: dict[str, Tensor], start: dict[str, Tensor]) -> Step:
    logits = torch.zeros(B, C, dtype=F64)
    return Step(logits, torch.zeros(B).long(), None, params, start, {})


# --- The loss term -------------------------------------------------------------------------------


def test_the_term_is_half_the_squared_distance_to_the_start() -> None:
    now, start = params(1), params(2)
    squares = [
        (a - b) ** 2
        for name in SHAPES
        for a, b in zip(now[name].flatten().tolist(), start[name].flatten().tolist(), strict=True)
    ]
    assert len(squares) == C * D + C + 1
    distance = proximal(step(now, start))
    assert distance.shape == ()
    assert float(distance) == pytest.approx(math.fsum(squares) / 2, rel=1e-13)


def test_its_gradient_is_the_way_from_the_start() -> None:
    now, start = {n: p.requires_grad_() for n, p in params(1).items()}, params(2)
    gradients = torch.autograd.grad(proximal(step(now, start)), list(now.values()))
    for name, gradient in zip(now, gradients, strict=True):
        torch.testing.assert_close(gradient, now[name].detach() - start[name], rtol=1e-14, atol=0)


def test_at_the_start_it_is_0_and_so_is_its_gradient() -> None:
    start = params(2)
    now = {n: p.clone().requires_grad_() for n, p in start.items()}
    distance = proximal(step(now, start))
    gradients = torch.autograd.grad(distance, list(now.values()))
    assert float(distance.detach()) == 0
    assert all(bool((g == 0).all()) for g in gradients)


def test_mapped_over_clients_it_is_what_it_is_in_a_loop() -> None:
    now = {n: p.requires_grad_() for n, p in params(1, K).items()}
    start = params(2, K)
    mapped = vmap(lambda p, s: proximal(step(p, s)))(now, start)
    looped = torch.stack(
        [
            proximal(step({n: p[k] for n, p in now.items()}, {n: s[k] for n, s in start.items()}))
            for k in range(K)
        ]
    )
    assert mapped.shape == (K,)
    torch.testing.assert_close(mapped, looped, rtol=1e-14, atol=0)
    weights = rand(K, seed=9)
    for_mapped, for_looped = (
        torch.autograd.grad((weights * losses).sum(), list(now.values()))
        for losses in (mapped, looped)
    )
    for mine, theirs in zip(for_mapped, for_looped, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-14, atol=0)


# --- The strategy --------------------------------------------------------------------------------


def test_fedprox_is_fedavg_with_a_term() -> None:
    revisit = Revisit({"ce": 1.0, proximal: 0.3}, model="student")
    assert FedProx(mu=0.3).phases(1) == [Load(), revisit, SendWeights()]
    assert revisit.private == {"ce": 1.0, "strategies.fedprox:proximal": 0.3}
    assert closing(FedProx().phases(5), FedProx.closes) == [Load()]


def test_it_averages_as_fedavg_does() -> None:
    given = Weights({"m": ModelWeights(params(1, K), torch.arange(K), torch.tensor([2, 3, 5]))})
    mine = FedProx().aggregate(given).by_model["m"].tensors
    for name, stacked in given.by_model["m"].tensors.items():
        by_hand = (2 * stacked[0] + 3 * stacked[1] + 5 * stacked[2]) / 10
        torch.testing.assert_close(mine[name][0], by_hand, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("mu", [-0.1, math.nan])
def test_a_mu_below_0_is_refused(mu: float) -> None:
    with pytest.raises(FedkdError, match="mu"):
        FedProx(mu=mu)


# --- A federation of three -----------------------------------------------------------------------


def sent(done: Finished, number: int, client: int) -> dict[str, Tensor]:
    """Return the weights that a client sent in a round."""
    answer = done.exchanges[number].report(client).answer
    assert isinstance(answer, Weights)
    (part,) = answer.by_model.values()
    return {n: t[0] for n, t in part.tensors.items()}


@pytest.mark.parametrize("student", ["mlp-8", "resnet-8"])
@pytest.mark.parametrize("plan", ["stacked", "loop"])
def test_with_mu_0_it_is_fedavg_bit_for_bit(student: str, plan: str) -> None:
    experiment = tiny(num_server_rounds=2, student=student, plan=plan)
    prox, avg = (federate(experiment, strategy=s) for s in (FedProx(mu=0), FedAvg()))
    for number in range(2):
        for k in range(K):
            theirs = sent(avg, number, k)
            for name, weight in sent(prox, number, k).items():
                assert torch.equal(weight, theirs[name]), name
        assert prox.rows[number]["server_accuracy"] == avg.rows[number]["server_accuracy"]
        assert prox.rows[number]["bytes_up"] == avg.rows[number]["bytes_up"]


def three_steps(**keys: Any) -> Experiment:
    """Return an experiment of which a round is three steps of plain SGD on the whole shard."""
    plain = {"batch_size": 1000, "optimizer": "sgd", "learning_rate": 0.3, "local_epochs": 3}
    return tiny(**{**plain, "num_server_rounds": 2, **keys})


def rounds_of_the_paper(experiment: Experiment, mu: float) -> list[list[dict[str, Tensor]]]:
    """Run algorithm 2 in float64, all clients to the end: their weights by round and client."""
    data = federated_data(experiment)
    labels = data.train.labels
    assert labels is not None
    mean, std = (
        torch.tensor(v, dtype=F64)[:, None, None] for v in (data.train.mean, data.train.std)
    )
    x = (data.train.pixels.to(F64) / 255 - mean) / std
    model = build("mlp-8", data.input_shape, data.num_classes).double()
    initial = architectures_of(data).initial_state("mlp-8", experiment.seed)
    at = {n: t.to(F64) for n, t in initial.items()}
    rounds = []
    for _ in range(experiment.num_server_rounds):
        now = []
        for shard in data.shards:
            model.load_state_dict(at)
            for _ in range(experiment.local_epochs):
                loss = F.cross_entropy(model(x[shard]), labels[shard])
                gradients = torch.autograd.grad(loss, list(model.parameters()))
                with torch.no_grad():
                    for (name, weight), slope in zip(
                        model.named_parameters(), gradients, strict=True
                    ):
                        weight.sub_(experiment.learning_rate * (slope + mu * (weight - at[name])))
            now.append({n: t.clone() for n, t in model.state_dict().items()})
        sizes = [len(shard) for shard in data.shards]
        at = {n: sum(s * w[n] for s, w in zip(sizes, now, strict=True)) / sum(sizes) for n in at}
        rounds.append(now)
    return rounds


@pytest.mark.parametrize("plan", ["stacked", "loop"])
@pytest.mark.parametrize("mu", [0.5, 2.0])
def test_two_rounds_are_those_of_the_papers_algorithm(mu: float, plan: str) -> None:
    """In the second round the start is what was loaded, not the client's own weights."""
    experiment = three_steps(plan=plan)
    done = federate(experiment, strategy=FedProx(mu=mu))
    assert [row["dropped"] for row in done.rows] == [{}] * 2
    expected, free = rounds_of_the_paper(experiment, mu), rounds_of_the_paper(experiment, 0.0)
    for number in range(2):
        for k in range(K):
            mine, without = expected[number][k], free[number][k]
            for name, weight in sent(done, number, k).items():
                torch.testing.assert_close(weight.double(), mine[name], rtol=0, atol=2e-5)
            assert max(float((mine[n] - without[n]).abs().max()) for n in mine) > 1e-3


def test_the_larger_mu_the_closer_clients_stay() -> None:
    experiment = three_steps(num_server_rounds=1)
    start = architectures_of(federated_data(experiment)).initial_state("mlp-8", experiment.seed)
    distances = []
    for mu in (0.0, 1.0, 3.0):
        weights = sent(federate(experiment, strategy=FedProx(mu=mu)), 0, 1)
        distances.append(sum(float((weights[n] - start[n]).square().sum()) for n in start))
    assert distances == sorted(distances, reverse=True)
    assert distances[2] < 0.5 * distances[0]
