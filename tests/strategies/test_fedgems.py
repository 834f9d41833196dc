"""FedGEMS against loops written from the paper: whom the server hears, what it asks, how it learns."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from federation_tools import C as CLASSES
from federation_tools import P, federate, tiny
from torch import Tensor, nn

from fedkd.data.federated import federated_data
from fedkd.errors import FedkdError
from fedkd.experiment import Experiment
from fedkd.federation.server import Replies, Server
from fedkd.knowledge import SoftLabels
from fedkd.losses import Step
from fedkd.phases import Fit, Predict, Revisit, closing, resolve_term
from fedkd.training.architectures import architectures_of
from fedkd.training.models import build
from strategies.fedgems import FedGEMS

K, N, C = 3, 5, 7
F64 = torch.float64
TARGETS = torch.tensor([4, 0, 6, 2, 4])
MASK = torch.tensor([[1, 1, 0, 1, 1], [1, 0, 1, 1, 1], [1, 1, 1, 0, 1]]).bool()

Matrix = list[list[float]]


def rand(*shape: int, seed: int = 1) -> Tensor:
    return 3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def answers(mask: Tensor | None = None, seed: int = 1) -> SoftLabels:
    """Return logits of three clients.

    About samples 0 to 3 are right: all, two, one and nobody; class 4 has two samples, 1, 3, 5 none.
    """
    values = rand(K, N, C, seed=seed)
    for n, right in enumerate([(0, 1, 2), (0, 2), (1,), (), (0, 1)]):
        for k in range(K):
            best = TARGETS[n] if k in right else (TARGETS[n] + 1 + k) % C
            values[k, n, best] = values[k, n].max() + 0.5 + 0.25 * k
    mask = torch.ones(K, N).bool() if mask is None else mask
    return SoftLabels(values * mask.unsqueeze(-1), "logits", mask=mask, targets=TARGETS)


def some_of(given: SoftLabels, rows: list[int]) -> SoftLabels:
    """Return the answers of some clients."""
    return SoftLabels(given.values[rows], "logits", mask=given.mask[rows], targets=given.targets)


# --- Whom the server hears -----------------------------------------------------------------------


def softmax_loop(row: list[float]) -> list[float]:
    exponentials = [math.exp(v - max(row)) for v in row]
    return [e / math.fsum(exponentials) for e in exponentials]


def entropy_loop(row: list[float]) -> float:
    return -math.fsum(p * math.log(p) for p in softmax_loop(row) if p > 0)


def fuse_loop(given: SoftLabels) -> tuple[Matrix, list[bool]]:
    """Σ_k softmax_k(1 / H_k) z_k over the clients that are right, in Python's own arithmetic.

    Where nobody is, over all that answered. Also: where anybody is right.
    """
    assert given.targets is not None
    rows, helped = [], []
    for n, target in enumerate(given.targets.tolist()):
        said = [given.values[k, n].tolist() for k in range(len(given.values)) if given.mask[k, n]]
        right = [row for row in said if row.index(max(row)) == target]
        heard = right or said
        weights = softmax_loop([1 / max(entropy_loop(row), 1e-6) for row in heard])
        columns = zip(*heard, strict=True)
        rows.append(
            [math.fsum(w * z for w, z in zip(weights, column, strict=True)) for column in columns]
        )
        helped.append(bool(right))
    return rows, helped


@pytest.mark.parametrize("mask", [None, MASK], ids=["all", "some"])
@pytest.mark.parametrize("seed", [1, 2])
def test_clients_that_are_right_are_heard_the_more_the_surer_they_are(
    mask: Tensor | None, seed: int
) -> None:
    given = answers(mask, seed)
    expected, helped = fuse_loop(given)
    assert helped == [True, True, True, False, True]
    fused = FedGEMS().aggregate(given)
    torch.testing.assert_close(fused, torch.tensor(expected, dtype=F64), rtol=1e-11, atol=1e-12)


def test_weights_worked_out_by_hand() -> None:
    """Entropies ln 2 and 0.5004 of two classes, both right: weights by exp(1.4427 - 1.9984)."""
    values = torch.tensor([[[0.0, 0.0]], [[1.3863, 0.0]]], dtype=F64)  # of 0.8: ln 4
    fused = FedGEMS().aggregate(SoftLabels(values, "logits", targets=torch.tensor([0])))
    assert float(fused[0, 0]) == pytest.approx(1.3863 / (1 + math.exp(1.4427 - 1.9984)), rel=1e-3)


def test_clients_that_are_wrong_have_no_weight_at_all() -> None:
    """Not even the exp(0) of a softmax over all clients, in which those that are wrong have a 0."""
    given = answers()
    other = given.values.clone()
    other[[0, 2], 2] = rand(2, C, seed=9)
    other[[0, 2], 2, (int(TARGETS[2]) + 3) % C] = 40
    changed = SoftLabels(other, "logits", targets=TARGETS)
    assert torch.equal(FedGEMS().aggregate(given)[2], given.values[1, 2])
    assert torch.equal(FedGEMS().aggregate(changed)[2], given.values[1, 2])


def test_one_client_gets_its_own_answer_back() -> None:
    """Whether it is right or not."""
    for k in range(K):
        alone = some_of(answers(), [k])
        assert torch.equal(FedGEMS().aggregate(alone), alone.values[0])


@pytest.mark.parametrize("order", [[2, 0, 1], [1, 0, 2]])
def test_the_order_of_clients_does_not_matter_and_equals_are_one(order: list[int]) -> None:
    given = answers(MASK)
    fused = FedGEMS().aggregate(given)
    shuffled = FedGEMS().aggregate(some_of(given, order))
    torch.testing.assert_close(shuffled, fused, rtol=1e-12, atol=1e-13)
    whole = answers()
    thrice = FedGEMS().aggregate(some_of(whole, [1, 1, 1]))
    torch.testing.assert_close(thrice, whole.values[1], rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_sure_answers_are_as_good_as_each_other(dtype: torch.dtype) -> None:
    """One-hot outputs have no entropy: 1/0 against 1/0 is half and half, and drowns out the unsure."""
    values = torch.zeros(K, 1, C, dtype=dtype)
    values[0, 0, 3], values[1, 0, 3], values[2, 0, 3] = 200, 1000, 0.5
    given = SoftLabels(values, "logits", targets=torch.tensor([3]))
    fused = FedGEMS().aggregate(given)
    assert fused.dtype == dtype
    assert bool(fused.isfinite().all())
    torch.testing.assert_close(fused, values[:2].mean(0), rtol=1e-6, atol=0)


def test_a_tie_counts_as_the_first_class_as_in_accuracies() -> None:
    values = torch.zeros(2, 2, C, dtype=F64)
    values[0, :, [1, 4]] = 2.0
    values[1] = values[0]
    values[1, 1, 4] = 2.5
    fused = FedGEMS().aggregate(SoftLabels(values, "logits", targets=torch.tensor([1, 4])))
    assert torch.equal(fused, torch.stack([values[0, 0], values[1, 1]]))


def test_soft_labels_for_no_samples_are_none() -> None:
    nothing = SoftLabels(torch.zeros(K, 0, C), "logits", targets=torch.zeros(0, dtype=torch.int64))
    assert FedGEMS().aggregate(nothing).shape == (0, C)


def test_without_labels_nobody_can_be_right() -> None:
    with pytest.raises(FedkdError, match="public-labels"):
        FedGEMS().aggregate(SoftLabels(rand(K, N, C), "logits"))


# --- What it asks and how it learns --------------------------------------------------------------


def plain(**keys: Any) -> Experiment:
    """Return an experiment in which every fit is one step of plain SGD."""
    sgd = {"batch_size": 1000, "optimizer": "sgd", "learning_rate": 0.1, "tau": 3.0}
    return tiny(**{**sgd, "server_model": "mlp-20", "num_server_rounds": 2, **keys})


def server_of(experiment: Experiment, number: int = 1) -> Server:
    return Server(experiment, federated_data(experiment), round=number)


def replies_to(server: Server, asked: Tensor, seed: int = 1) -> Replies:
    """Return answers of three clients, each right about half of the samples."""
    assert server.targets is not None
    values = rand(K, len(asked), CLASSES, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    is_right = torch.rand(K, len(asked), generator=generator) < 0.5
    values[is_right] += (
        9 * nn.functional.one_hot(server.targets[asked], CLASSES).expand(K, -1, -1)[is_right]
    )
    labels = SoftLabels(values.float(), "logits", asked, targets=server.targets[asked])
    return Replies([0, 1, 2], labels)


@dataclass
class Learner:
    """The server's model once more, in float64 and by itself."""

    model: nn.Module
    pixels: Tensor
    targets: Tensor
    rate: float
    tau: float
    swapped: bool = False

    @classmethod
    def of(cls, server: Server, *, swapped: bool = False) -> Learner:
        experiment, public = server.experiment, server.data.public
        model = build(experiment.server_model, server.data.input_shape, CLASSES).double()
        state = architectures_of(server.data).initial_state(
            experiment.server_model, experiment.seed
        )
        model.load_state_dict({n: t.to(F64) for n, t in state.items()})
        pixels = public.batch(torch.arange(len(public))).to(F64)
        assert public.labels is not None
        labels = public.labels
        return cls(model, pixels, labels, experiment.learning_rate, experiment.tau, swapped)

    def logits(self) -> Tensor:
        with torch.no_grad():
            answer: Tensor = self.model(self.pixels)
        return answer

    def wrong(self) -> set[int]:
        """Return the samples that it gets wrong."""
        own = self.logits().argmax(-1)
        return {i for i, label in enumerate(self.targets.tolist()) if int(own[i]) != label}

    def step(self, samples: list[int], epsilon: float, taught: dict[int, Tensor]) -> None:
        """Step down ε CE + (1 − ε) τ² KL(taught ‖ own), averaged over samples."""
        if not samples:
            return
        losses = []
        for i in samples:
            z = self.model(self.pixels[i : i + 1])[0]
            hard = -z.log_softmax(-1)[self.targets[i]]
            loss = epsilon * hard
            if i in taught:
                p = (taught[i] / self.tau).softmax(-1)
                q = (z / self.tau).softmax(-1)
                p, q = (q, p) if self.swapped else (p, q)
                loss = loss + (1 - epsilon) * self.tau**2 * (p * (p.log() - q.log())).sum()
            losses.append(loss)
        mean = torch.stack(losses).mean()
        weights = list(self.model.parameters())
        for weight, gradient in zip(weights, torch.autograd.grad(mean, weights), strict=True):
            weight.data -= self.rate * gradient


def round_of_the_paper(
    learner: Learner, drawn: list[int], pool: dict[int, Tensor], labels: SoftLabels, epsilon: float
) -> Tensor:
    """One round of the server; `pool` is brought up to date. Returns its logits of all samples."""
    fused, helped = fuse_loop(labels)
    advice = {
        i: torch.tensor(row, dtype=F64)
        for i, row, helps in zip(labels.samples.tolist(), fused, helped, strict=True)
        if helps
    }
    own = learner.logits().argmax(-1)
    wrong = [i for i in drawn if own[i] != learner.targets[i]]
    taught = {i: pool.get(i, advice.get(i)) for i in wrong}
    taught = {i: row for i, row in taught.items() if row is not None}
    learner.step([i for i in drawn if i not in taught], 1.0, {})
    learner.step(sorted(taught), epsilon, {i: row for i, row in taught.items() if row is not None})
    after = learner.logits()
    for i in drawn:
        if int(after[i].argmax()) == int(learner.targets[i]):
            pool[i] = after[i]
    return after


@pytest.mark.parametrize("keys", [{}, {"public_per_round": 11}], ids=["all", "some"])
def test_at_first_it_asks_for_all_that_it_gets_wrong(keys: dict[str, Any]) -> None:
    server = server_of(plain(**keys), 2)
    wrong = Learner.of(server).wrong()
    asked = FedGEMS().request(server).tolist()
    assert asked == [i for i in server.draw().tolist() if i in wrong]
    assert 0 < len(asked) < len(server.draw())


@pytest.mark.parametrize("keys", [{}, {"public_per_round": 11}], ids=["all", "some"])
def test_it_asks_for_what_it_never_was_right_about(keys: dict[str, Any]) -> None:
    server = server_of(plain(**keys), 3)
    known = torch.arange(P) % 3 != 0
    server.state |= {"known": known, "pool": torch.zeros(P, CLASSES)}
    asked = FedGEMS().request(server)
    wrong = Learner.of(server).wrong()
    assert asked.tolist() == [i for i in server.draw().tolist() if i % 3 == 0 and i in wrong]
    assert len(asked)
    server.state["known"] = torch.ones(P).bool()
    assert FedGEMS().request(server).shape == (0,)
    assert FedGEMS().request(server).dtype == torch.int64


@pytest.mark.parametrize("keys", [{}, {"public_per_round": 23}], ids=["all", "some"])
@pytest.mark.parametrize("epsilon", [0.75, 0.0, 1.0])
def test_two_rounds_of_the_server_are_those_of_the_paper(
    epsilon: float, keys: dict[str, Any]
) -> None:
    """What it knows, stores and passes on: from labels, its own logits and those of clients."""
    server, strategy = server_of(plain(**keys)), FedGEMS(epsilon=epsilon)
    learner, pool = Learner.of(server), dict[int, Tensor]()
    asked_of = []
    for number in (1, 2, 3):
        server.round = number
        asked = strategy.request(server)
        drawn = server.draw().tolist()
        wrong = learner.wrong()
        assert asked.tolist() == [i for i in drawn if i not in pool and i in wrong]
        asked_of.append(len(asked))
        replies = replies_to(server, asked, number)
        assert replies.labels is not None
        known = strategy.update(replies, server)
        after = round_of_the_paper(learner, drawn, pool, replies.labels, epsilon)
        assert known.space == "logits"
        assert known.samples.tolist() == drawn
        torch.testing.assert_close(known.values[0].double(), after[drawn], rtol=1e-3, atol=1e-4)
        stored, is_known = server.state["pool"], server.state["known"]
        assert isinstance(stored, Tensor)
        assert isinstance(is_known, Tensor)
        assert is_known.nonzero()[:, 0].tolist() == sorted(pool)
        for i, row in pool.items():
            torch.testing.assert_close(stored[i].double(), row, rtol=1e-3, atol=1e-4)
    assert 0 < min(asked_of[1:]) < asked_of[0]


def test_the_divergence_goes_from_the_taught_to_the_learner() -> None:
    """The arguments of KL the other way round, as other code has them, give another server."""
    server, strategy = server_of(plain()), FedGEMS(epsilon=0.0)
    replies = replies_to(server, server.draw())
    assert replies.labels is not None
    known = strategy.update(replies, server).values[0].double()
    drawn = server.draw().tolist()
    ours, theirs = (
        round_of_the_paper(Learner.of(server, swapped=s), drawn, {}, replies.labels, 0.0)
        for s in (False, True)
    )
    torch.testing.assert_close(known, ours, rtol=1e-3, atol=1e-4)
    assert float((known - theirs).abs().max()) > 0.01


def test_a_client_s_digest_has_the_same_direction_and_weights() -> None:
    """ε CE + (1 − ε) τ² KL(server ‖ client), term by term."""
    (digest, *_) = FedGEMS().phases(2)
    assert isinstance(digest, Fit)
    server, own = rand(N, C, seed=3), rand(N, C, seed=4)
    numbers = {"tau": torch.tensor(2.0, dtype=F64)}
    step = Step(own, TARGETS, server, {}, {}, numbers)
    loss = torch.zeros(N, dtype=F64)
    for name, coefficient in digest.public.items():
        assert isinstance(coefficient, float)
        loss += coefficient * resolve_term(name)(step)
    for n in range(N):
        p, q = (softmax_loop((z[n] / 2).tolist()) for z in (server, own))
        divergence = math.fsum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
        hard = -math.log(softmax_loop(own[n].tolist())[int(TARGETS[n])])
        assert float(loss[n]) == pytest.approx(0.75 * hard + 0.25 * 4 * divergence, rel=1e-12)


def test_where_it_once_was_right_its_own_logits_teach() -> None:
    """Those samples are not asked for again, though the model is wrong about them now."""
    server, strategy = server_of(plain(), 2), FedGEMS(epsilon=0.0)
    assert server.targets is not None
    own = server.predict(server.draw()).values[0].argmax(-1)
    wrong = server.draw()[own != server.targets]
    pool = rand(P, CLASSES, seed=8).float()
    known = torch.zeros(P).bool()
    known[wrong[::2]] = True
    server.state |= {"pool": pool.clone(), "known": known}
    asked = strategy.request(server)
    assert not set(asked.tolist()) & set(wrong[::2].tolist())
    replies = replies_to(server, asked)
    assert replies.labels is not None
    learner = Learner.of(server)
    memory = {int(i): pool[i].double() for i in wrong[::2]}
    got = strategy.update(replies, server).values[0].double()
    after = round_of_the_paper(learner, list(range(P)), memory, replies.labels, 0.0)
    torch.testing.assert_close(got, after, rtol=1e-3, atol=1e-4)


def test_where_nobody_is_right_its_label_teaches_alone_with_weight_1() -> None:
    """Not with ε, which divides a weight between label and logits: at 0 nothing would be learnt."""
    server, strategy = server_of(plain()), FedGEMS(epsilon=0.0)
    assert server.targets is not None
    values = torch.zeros(K, P, CLASSES)
    values[:, torch.arange(P), (server.targets + 1) % CLASSES] = 9.0
    replies = Replies([0, 1, 2], SoftLabels(values, "logits", targets=server.targets))
    known = strategy.update(replies, server)
    learner = Learner.of(server)
    learner.step(list(range(P)), 1.0, {})
    torch.testing.assert_close(known.values[0].double(), learner.logits(), rtol=1e-3, atol=1e-4)


def test_with_nothing_left_to_ask_it_goes_on_with_its_labels() -> None:
    server = server_of(plain(), 2)
    server.state |= {"pool": torch.zeros(P, CLASSES), "known": torch.ones(P).bool()}
    assert server.targets is not None
    nothing = SoftLabels(
        torch.zeros(K, 0, CLASSES),
        "logits",
        torch.empty(0, dtype=torch.int64),
        targets=server.targets[:0],
    )
    known = FedGEMS().update(Replies([0, 1, 2], nothing), server)
    assert known.values.shape == (1, P, CLASSES)


# --- In a federation -----------------------------------------------------------------------------


def test_clients_digest_by_epsilon_then_revisit_and_answer_with_logits() -> None:
    digest = Fit("digest", public={"kl": 0.25, "ce": 0.75})
    assert FedGEMS().phases(1) == [digest, Revisit(), Predict()]
    assert closing(FedGEMS().phases(9), FedGEMS.closes) == [digest]
    first = FedGEMS(epsilon=0.5).phases(1)[0]
    assert first == Fit("digest", public={"kl": 0.5, "ce": 0.5})


@pytest.mark.parametrize("epsilon", [-0.1, 1.1, math.nan])
def test_an_epsilon_that_is_no_share_is_refused(epsilon: float) -> None:
    with pytest.raises(FedkdError, match="epsilon"):
        FedGEMS(epsilon=epsilon)


def test_it_wants_labels_and_a_model_at_the_server() -> None:
    with pytest.raises(FedkdError, match=r"server-model = 'none'.*FedGEMS"):
        federate(tiny(), strategy=FedGEMS())
    with pytest.raises(FedkdError, match=r"public-labels = false.*FedGEMS"):
        federate(tiny(server_model="mlp-20", public_labels=False), strategy=FedGEMS())


def test_a_federation_asks_ever_less_and_the_server_s_logits_come_back() -> None:
    """Until nothing is asked, which goes on as well; bytes stay within the formulas."""
    experiment = tiny(server_model="mlp-40", num_server_rounds=6, distill_epochs=25)
    run = federate(experiment, strategy=FedGEMS())
    asked = [len(exchange.instructions[0].asked) for exchange in run.exchanges[:-1]]
    assert 0 < asked[0] <= P
    assert asked[1:] == sorted(asked[1:], reverse=True)
    assert asked[-1] == 0
    assert [row["dropped"] for row in run.rows] == [{}] * 6
    assert [row["bytes_up"] for row in run.rows] == [K * n * CLASSES * 4 for n in asked]
    sizes = {"P": P, "C": CLASSES, "I": 0}
    for row in run.rows[1:]:
        assert row["bytes_up"] <= K * eval(FedGEMS.facts.up.removeprefix("<="), {}, sizes)
        assert row["bytes_down"] <= K * eval(FedGEMS.facts.down.removeprefix("<="), {}, sizes)
    assert run.rows[-1]["server_accuracy"] > 0.5
    assert isinstance(run.knowledge, SoftLabels)
    assert run.knowledge.values.shape == (1, P, CLASSES)


def test_draws_of_few_samples_stay_within_the_formulas() -> None:
    few = 11
    experiment = tiny(server_model="mlp-20", num_server_rounds=4, public_per_round=few)
    rows = federate(experiment, strategy=FedGEMS()).rows
    sizes = {"P": few, "C": CLASSES, "I": min(4 * few, math.ceil(P / 8))}
    for row in rows[1:]:
        assert row["bytes_up"] <= K * eval(FedGEMS.facts.up.removeprefix("<="), {}, sizes)
        assert row["bytes_down"] <= K * eval(FedGEMS.facts.down.removeprefix("<="), {}, sizes)
