"""Attacks against loops and closed forms, and in runs: what liars change, and what they do not.

Also ExpGuard, the one rule that remembers who lied.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch
from federation_tools import (
    ROUGH,
    Finished,
    P,
    execute,
    federate,
    one_step,
    shard,
    starting,
    tiny,
)
from federation_tools import C as CLASSES
from scipy.stats import norm
from torch import Tensor
from torch.nn.functional import cross_entropy

import fedkd
from fedkd.clients.attacks import (
    ATTACKS,
    HONEST,
    Known,
    attack_of,
    attacked,
    check_attack,
    deviations,
    malicious_clients,
)
from fedkd.clients.instructions import ClientReport, Instruction
from fedkd.clients.state_files import StateFiles
from fedkd.clients.state_store import ResidentStates
from fedkd.clients.states import INITIAL
from fedkd.data.federated import FederatedData, federated_data
from fedkd.engines.preflight import check
from fedkd.errors import FedkdError
from fedkd.experiment import Experiment
from fedkd.federation.server import Replies, Server
from fedkd.knowledge import ClassMeans, Knowledge, Rule, SoftLabels, Space, Weights
from fedkd.phases import Fit, MeanByClass, Phase, Predict, Revisit, SendWeights
from fedkd.registry import strategies, strategy_of
from strategies.expguard import ExpGuard

K, N, C = 11, 5, 7
F64 = torch.float64
ON_ANSWERS = [name for name, attack in ATTACKS.items() if attack.answer is not None]
SURE = ["random", "constant", "least-likely", "colluding"]
"""Attacks that are sure of one class a sample."""


def rand(*shape: int, seed: int = 1) -> Tensor:
    return 3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def known(samples: int = N, **changed: Any) -> Known:
    given: dict[str, Any] = {
        "honest": rand(samples, C, seed=2).softmax(-1),
        "expected": rand(samples, C, seed=3).softmax(-1),
        "seed": 13,
        "client": 2,
        "round": 3,
        "num_clients": K,
        "num_malicious": 5,
    }
    return Known(**{**given, **changed})


def answer(name: str, what: Known) -> Tensor:
    attack = ATTACKS[name].answer
    assert attack is not None
    return attack(what)


def one_hot(*classes: int) -> Tensor:
    return torch.eye(C, dtype=F64)[list(classes)]


# --- Attacks as functions --------------------------------------------------------------------------


def test_every_value_of_the_key_is_an_attack() -> None:
    for name in ATTACKS:
        share = 0.0 if name == "none" else 0.4
        assert Experiment(attack=name, attackers=share).attack == name
    assert set(ATTACKS) - set(ON_ANSWERS) == {"none", "label-flip"}


def test_all_labels_are_flipped() -> None:
    falsify = ATTACKS["label-flip"].labels
    assert falsify is not None
    assert falsify(torch.tensor([0, 1, 2, 3, 4, 5, 6, 0]), 7).tolist() == [6, 5, 4, 3, 2, 1, 0, 6]
    assert falsify(torch.tensor([0, 1, 1]), 2).tolist() == [1, 0, 0]


def test_the_least_likely_class_is_that_of_the_others() -> None:
    what = known(101)
    rows = what.expected.tolist()
    assert torch.equal(answer("least-likely", what), one_hot(*[r.index(min(r)) for r in rows]))


def test_colluders_agree_and_take_every_class_for_another() -> None:
    """The likeliest class goes to the next on one circle of all classes, whoever says so, and when."""
    told = answer("colluding", known(C, expected=one_hot(*range(C)))).argmax(-1).tolist()
    walk = [0]
    while (following := told[walk[-1]]) != 0:
        walk.append(following)
    assert sorted(walk) == list(range(C))
    what = known(101)
    expected = one_hot(*[told[row.index(max(row))] for row in what.expected.tolist()])
    for client, round in ((2, 3), (5, 3), (2, 7)):
        assert torch.equal(answer("colluding", replace(what, client=client, round=round)), expected)
    circles = {
        tuple(
            answer("colluding", known(C, expected=one_hot(*range(C)), seed=s)).argmax(-1).tolist()
        )
        for s in range(11)
    }
    assert len(circles) > 5


def test_random_classes_are_even_and_each_clients_own() -> None:
    what = known(10_007)
    drawn = answer("random", what)
    assert torch.equal(drawn, answer("random", known(10_007, honest=what.expected)))
    expected, spread = 10_007 / C, math.sqrt(10_007 / C * (1 - 1 / C))
    assert bool(((drawn.sum(0) - expected).abs() < 5 * spread).all())
    for other in (replace(what, client=3), replace(what, round=4), replace(what, seed=14)):
        agreeing = (drawn * answer("random", other)).sum(-1).mean()
        assert float(agreeing) == pytest.approx(1 / C, abs=0.02)


def test_a_constant_client_says_one_class_for_ever() -> None:
    said = {}
    for client in range(101):
        classes = {
            int(c)
            for round in (1, 2, 29)
            for c in answer("constant", known(client=client, round=round)).argmax(-1)
        }
        assert len(classes) == 1
        (said[client],) = classes
    assert set(said.values()) == set(range(C))
    assert said[3] != said[4] or said[4] != said[5]  # neighbours do not collude


def test_the_worked_example_of_the_paper() -> None:
    """24 of 50: two more have to be won over, 24 of 26 honest ones lie farther in, z = 1.43."""
    assert deviations(50, 24) == pytest.approx(1.43, abs=0.005)


@pytest.mark.parametrize(
    ("clients", "malicious"), [(10, 4), (11, 5), (13, 3), (101, 47), (11, 2), (7, 0), (11, 10)]
)
def test_deviations_are_the_papers(clients: int, malicious: int) -> None:
    """By SciPy; below the mean, where too few collude, and beyond a majority the ends are held."""
    needed = max(math.floor(clients / 2 + 1) - malicious, 1)
    z = norm.ppf((clients - malicious - needed) / (clients - malicious))
    assert deviations(clients, malicious) == pytest.approx(max(z, 0), abs=1e-12)


def test_nobody_left_to_hide_among_means_no_deviation() -> None:
    assert [deviations(K, K), deviations(K, K - 1), deviations(1, 0)] == [0, 0, 0]


def little_is_enough(own: Sequence[float], expected: Sequence[float], z: float) -> list[float]:
    top = expected.index(max(expected))
    moved = [
        max(e + (-z if c == top else z) * abs(o - e), 0.0)
        for c, (o, e) in enumerate(zip(own, expected, strict=True))
    ]
    return [value / sum(moved) for value in moved]


@pytest.mark.parametrize("malicious", [1, 5, 7])
def test_little_is_enough_moves_each_class_by_its_spread(malicious: int) -> None:
    what = known(101, num_malicious=malicious)
    z = deviations(K, malicious)
    assert (z > 0) == (malicious > 1)
    rows = zip(what.honest.tolist(), what.expected.tolist(), strict=True)
    expected = torch.tensor([little_is_enough(own, told, z) for own, told in rows], dtype=F64)
    got = answer("little-is-enough", what)
    torch.testing.assert_close(got, expected, rtol=1e-13, atol=1e-15)
    top = what.expected.argmax(-1, keepdim=True)
    if z > 0:
        assert bool((got.gather(1, top) < what.expected.gather(1, top)).all())


@pytest.mark.parametrize("name", ON_ANSWERS)
def test_what_is_sent_is_on_the_simplex(name: str) -> None:
    """Also where honest answers are sure, the same, or the opposite."""
    soft = rand(3, C, seed=5).softmax(-1)
    own = torch.cat([soft, one_hot(0, 1, 2), one_hot(3, 4), soft[:1]])
    expected = torch.cat([one_hot(1, 0, 6), soft, one_hot(3, 5), soft[:1]])
    for malicious in (0, 1, 5, 10, 11):
        what = known(honest=own, expected=expected, num_malicious=malicious)
        kept = own.clone(), expected.clone()
        got = answer(name, what)
        assert (got.shape, got.dtype) == (own.shape, F64)
        assert bool((got >= 0).all())
        torch.testing.assert_close(got.sum(-1), torch.ones(len(own), dtype=F64))
        assert torch.equal(got, answer(name, what))
        assert torch.equal(own, kept[0])
        assert torch.equal(expected, kept[1])
        assert ((got == 0) | (got == 1)).all() or name not in SURE
        assert answer(name, known(0)).shape == (0, C)


# --- What a client sends instead -------------------------------------------------------------------


def lying(name: str, seed: int = 5) -> tuple[Experiment, int]:
    """Return an experiment, and one of its five malicious clients of eleven."""
    experiment = Experiment(num_clients=K, attack=name, attackers=5 / K, seed=seed)
    return experiment, min(malicious_clients(experiment))


def honest(space: Space, client: int = 0, values: Tensor | None = None) -> SoftLabels:
    logits = rand(N, C, seed=2) if values is None else values
    given = logits if space == "logits" else logits.softmax(-1)
    return SoftLabels(
        given.float().unsqueeze(0),
        space,
        torch.tensor([17, 3, 29, 11, 5]),
        torch.tensor([client]),
        torch.tensor([23]),
        torch.tensor([[True, True, False, True, True]]),
        torch.tensor([1, 0, 6, 2, 2]),
    )


@pytest.mark.parametrize("space", ["logits", "probabilities"])
@pytest.mark.parametrize("name", ON_ANSWERS)
def test_only_the_values_are_others(name: str, space: Space) -> None:
    experiment, client = lying(name)
    given = honest(space, client)
    told = SoftLabels.shared(rand(N, C, seed=7).softmax(-1), given.samples, "probabilities")
    got = attacked(given, told, experiment, client, 3)
    assert (got.values.shape, got.values.dtype) == (given.values.shape, torch.float32)
    assert not torch.equal(got.values, given.values)
    assert got.space == space
    for field in ("samples", "clients", "num_examples", "mask", "targets"):
        assert torch.equal(getattr(got, field), getattr(given, field)), field
    bystander = min(set(range(K)) - malicious_clients(experiment))
    assert attacked(given, told, experiment, bystander, 3) is given


@pytest.mark.parametrize("name", ON_ANSWERS)
def test_logits_are_as_large_as_the_clients_own(name: str) -> None:
    """Logarithms of what is said, no class below the client's least, plus the constant of its row."""
    experiment, client = lying(name)
    rows = rand(N, C, seed=2)
    rows[1], rows[3, 0] = 40 * rows[1], -700
    given = honest("logits", client, rows)
    told = SoftLabels.shared(rand(N, C, seed=7).softmax(-1), given.samples, "probabilities")
    got = attacked(given, told, experiment, client, 3).values[0]
    own = given.values[0].double()
    what = Known(own.softmax(-1), told.values[0], experiment.seed, client, 3, K, 5)
    for row, mine, said in zip(
        got.tolist(), own.tolist(), answer(name, what).tolist(), strict=True
    ):
        most = max(mine)
        constant = most + math.log(sum(math.exp(z - most) for z in mine))
        least = min(mine) - constant
        expected = [max(math.log(p) if p else -math.inf, least) + constant for p in said]
        assert row == pytest.approx(expected, rel=1e-6, abs=1e-5)
    assert bool(got.isfinite().all())


def test_who_says_what_is_honest_sends_its_own_logits() -> None:
    experiment, client = lying("little-is-enough")
    rows = rand(N, C, seed=2)
    rows[1], rows[3, 0] = 20 * rows[1], -300
    given = honest("logits", client, rows)
    got = attacked(given, None, experiment, client, 1)
    torch.testing.assert_close(got.values, given.values, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("space", ["logits", "probabilities"])
def test_what_was_received_is_found_by_sample(space: Space) -> None:
    """Two sets of labels in another order, for some samples, one of them answered by nobody."""
    experiment, client = lying("least-likely")
    given = honest("probabilities", client)
    raw = rand(2, 5, C, seed=7)
    samples = [29, 31, 17, 5, 2]
    mask = torch.tensor([[1, 1, 1, 0, 1], [0, 1, 1, 0, 1]]).bool()
    values = raw if space == "logits" else raw.softmax(-1)
    told = SoftLabels(values.float(), space, torch.tensor(samples), mask=mask)
    heard = raw.float().double().softmax(-1)
    expected = []
    for place, sample in enumerate(given.samples.tolist()):
        row = given.values[0, place]
        if sample in samples and mask[:, samples.index(sample)].any():
            at = samples.index(sample)
            row = heard[mask[:, at], at].mean(0)
        expected.append(int(row.argmin()))
    got = attacked(given, told, experiment, client, 3).values[0]
    assert torch.equal(got.double(), one_hot(*expected))
    own = given.values[0].argmin(-1).tolist()
    assert own != expected
    nothing: list[Knowledge | None] = [
        None,
        told.keep(torch.zeros(5).bool()),
        ClassMeans(rand(1, C, 3), torch.ones(1, C), torch.tensor([0]), "features"),
    ]
    for useless in nothing:
        got = attacked(given, useless, experiment, client, 3).values[0]
        assert torch.equal(got.double(), one_hot(*own))
    assert (
        attacked(given.keep(torch.zeros(N).bool()), told, experiment, client, 3).values.numel() == 0
    )


# --- Who is malicious ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("clients", "share", "count"),
    [
        (10, 0.1, 1), (10, 0.4, 4), (11, 0.4, 4), (11, 0.5, 6), (13, 0.5, 6), (3, 0.3, 1), (7, 1.0, 7),
        (101, 0.29, 29),
    ],
)  # fmt: skip
def test_as_many_are_malicious_as_the_share_says(clients: int, share: float, count: int) -> None:
    experiment = Experiment(num_clients=clients, attack="random", attackers=share)
    liars = malicious_clients(experiment)
    assert len(liars) == count
    assert liars <= set(range(clients))
    for client in range(clients):
        attack = attack_of(experiment, client)
        assert attack is (ATTACKS["random"] if client in liars else HONEST)


def test_the_seed_draws_them_evenly_and_nothing_else_does() -> None:
    counts = torch.zeros(7)
    for seed in range(503):
        liars = malicious_clients(
            Experiment(num_clients=7, attack="random", attackers=0.43, seed=seed)
        )
        counts[list(liars)] += 1
    assert counts.sum() == 503 * 3
    spread = math.sqrt(503 * 3 / 7 * 4 / 7)
    assert bool(((counts - 503 * 3 / 7).abs() < 4 * spread).all())
    keys = {"num_clients": 101, "attackers": 0.2, "seed": 3}
    one = malicious_clients(Experiment(attack="random", **keys))
    other = malicious_clients(Experiment(attack="colluding", strategy="DSFL", tau=2.0, **keys))
    more = malicious_clients(Experiment(attack="random", **{**keys, "attackers": 0.4}))
    assert one == other
    assert one < more
    assert malicious_clients(Experiment(num_clients=101)) == frozenset()


# --- Refusals --------------------------------------------------------------------------------------


OTHER = [n for n, cls in strategies().items() if cls().uploads() in (ClassMeans, Weights)]
"""Strategies that send something else than soft labels."""


@pytest.mark.parametrize("strategy", OTHER)
def test_who_sends_no_soft_labels_cannot_falsify_them(strategy: str, tmp_path: Path) -> None:
    """Refused before anything is written; false labels are for everybody."""
    keys: dict[str, Any] = {"strategy": strategy, "attackers": 0.4, "server_model": "none"}
    for name in ON_ANSWERS:
        experiment = tiny(**keys, attack=name, run_dir=str(tmp_path / "runs"))
        with pytest.raises(
            FedkdError,
            match=rf"attack = '{name}' .*strategy = '{strategy}' .*accepted there: .*label-flip",
        ):
            check_attack(experiment, strategy_of(experiment).uploads())
    for attempt in (check, fedkd.run):
        with pytest.raises(FedkdError, match=f"attack = '{name}' .*accepted there: .*label-flip"):
            attempt(experiment)
    check(experiment.replace(attack="label-flip"))
    assert list(tmp_path.iterdir()) == []


def test_who_sends_soft_labels_or_nothing_takes_every_attack() -> None:
    accepted = strategies().keys() - OTHER
    assert {"DSFL", "FedMD", "ExpGuard", "LocalOnly"} <= accepted
    for name in accepted:
        for attack in ATTACKS:
            share = 0.0 if attack == "none" else 0.4
            experiment = Experiment(
                strategy=name, server_model="mlp-20", attack=attack, attackers=share
            )
            check_attack(experiment, strategy_of(experiment).uploads())


# --- Label flipping in training --------------------------------------------------------------------

FIVE: dict[str, Any] = {"num_clients": 5, "attackers": 0.4, "seed": 3}
"""Two liars among five."""


def told(
    experiment: Experiment,
    phases: Sequence[Phase],
    folder: Path,
    data: FederatedData | None = None,
    clients: Sequence[int] = range(5),
    knowledge: SoftLabels | None = None,
    together: bool = True,
) -> dict[int, ClientReport]:
    """Let clients execute phases, in the sequence given, at once or one after the other."""
    store = ResidentStates(StateFiles(folder, experiment.architecture_period), 5)
    instructions = [
        Instruction(
            client=k,
            round=1,
            phases=tuple(phases),
            base=INITIAL,
            asked=torch.tensor([31, 2, 17, 5, 3, 29, 11]),
            knowledge=knowledge,
            knowledge_round=0 if knowledge is None else 1,
        )
        for k in clients
    ]
    groups = [instructions] if together else [[instruction] for instruction in instructions]
    found: dict[int, ClientReport] = {}
    for group in groups:
        for report in execute(experiment, data or federated_data(experiment), group, store):
            assert isinstance(report, ClientReport), report
            found[report.client] = report
    return found


def tensors(report: ClientReport) -> Iterator[Tensor]:
    """Yield what a client sends, and what it says of its training."""
    sent = report.answer
    if isinstance(sent, SoftLabels | ClassMeans):
        yield sent.values
    if isinstance(sent, ClassMeans):
        yield sent.counts
    if isinstance(sent, Weights):
        for part in sent.by_model.values():
            yield from part.tensors.values()
    names = [name for name in sorted(report.metrics) if not name.startswith("training")]
    yield torch.tensor([report.metrics[name] for name in names], dtype=F64)


def same(one: ClientReport, other: ClientReport) -> bool:
    """Whether two clients say the same, bit for bit; their accuracy on private labels aside."""
    return all(torch.equal(a, b) for a, b in zip(tensors(one), tensors(other), strict=True))


def flipped_by_hand(
    data: FederatedData, clients: Mapping[int, object] | frozenset[int]
) -> FederatedData:
    """Return the same data with other labels on the private images of some clients."""
    labels = data.train.labels
    assert labels is not None
    labels = labels.clone()
    for client in clients:
        for image in data.shards[client].tolist():
            labels[image] = 9 - labels[image]
    return replace(data, train=replace(data.train, labels=labels))


JOINT = Fit("joint", private={"ce": 1.0}, public={"kl": 1.0})


@pytest.mark.parametrize(
    ("phases", "plan"),
    [
        pytest.param((Revisit(), SendWeights()), "stacked", id="train"),
        pytest.param((Revisit(), SendWeights()), "stacked-2", id="train-in-twos"),
        pytest.param((Revisit(), SendWeights()), "loop", id="train-in-a-loop"),
        pytest.param((JOINT, SendWeights()), "stacked", id="joint"),
        pytest.param((JOINT, SendWeights()), "loop", id="joint-in-a-loop"),
        pytest.param((Revisit(), MeanByClass()), "stacked", id="means"),
        pytest.param((Revisit(), Predict("probabilities")), "stacked", id="predict"),
    ],
)
def test_false_labels_train_as_if_they_were_the_labels(
    phases: Sequence[Phase], plan: str, tmp_path: Path
) -> None:
    """Bit for bit the client whose private labels are others; the public set keeps its own."""
    experiment = tiny(**FIVE, attack="label-flip", plan=plan, public_labels=True)
    liars, data = malicious_clients(experiment), federated_data(experiment)
    assert len(liars) == 2
    knowledge = SoftLabels.shared(rand(P, CLASSES).float(), torch.arange(P), "logits")
    given = knowledge if JOINT in phases else None
    got = told(experiment, phases, tmp_path / "got", knowledge=given)
    innocent = experiment.replace(attack="none", attackers=0.0)
    by_hand = flipped_by_hand(data, liars)
    expected = told(innocent, phases, tmp_path / "by hand", by_hand, knowledge=given)
    before = told(innocent, phases, tmp_path / "before", knowledge=given)
    for client in range(5):
        assert same(got[client], expected[client])
        assert same(got[client], before[client]) == (client not in liars)


def test_a_step_with_false_labels_is_that_of_their_cross_entropy(tmp_path: Path) -> None:
    """In float64, written out: one step of gradient descent on class 9 − y."""
    experiment = one_step(attack="label-flip", attackers=1.0, num_clients=3)
    data = federated_data(experiment)
    got = told(experiment, [Revisit(), SendWeights()], tmp_path, clients=range(3))
    for client in range(3):
        images, labels = shard(data, client)
        model = starting(experiment, client)
        cross_entropy(model(images), 9 - labels).backward()
        sent = got[client].answer
        assert isinstance(sent, Weights)
        (part,) = sent.by_model.values()
        for name, parameter in model.named_parameters():
            expected = parameter.detach() - 0.5 * parameter.grad
            torch.testing.assert_close(part.tensors[name][0].double(), expected, rtol=0, atol=1e-6)


# --- In a federation -------------------------------------------------------------------------------


def uploads(run: Finished, round: int) -> dict[int, Tensor]:
    exchange = run.exchanges[round - 1]
    sent = {k: exchange.report(k).answer for k in exchange.instructions}
    return {k: labels.values for k, labels in sent.items() if isinstance(labels, SoftLabels)}


def smooth(run: Finished) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k not in ROUGH} for row in run.rows]


def mechanism(**keys: Any) -> Experiment:
    return tiny(strategy="DSFL", num_server_rounds=2, **{"plan": "stacked", **keys})


@cache
def among_five(attack: str, plan: str = "stacked") -> Finished:
    """Return a federation with two liars, which several tests read; of ``none``, with nobody who lies."""
    attackers = 0.0 if attack == "none" else FIVE["attackers"]
    return federate(mechanism(**{**FIVE, "attackers": attackers}, attack=attack, plan=plan))


@pytest.mark.parametrize(
    ("name", "plan"),
    [
        *((name, "stacked") for name in ATTACKS if name != "none"),
        *((name, "loop") for name in ("label-flip", "random", "little-is-enough")),
    ],
)
def test_in_the_first_round_the_honest_say_what_they_would_say(name: str, plan: str) -> None:
    """Bit for bit; the liars do not, where they have something to lie about."""
    liars = malicious_clients(mechanism(**FIVE, attack=name))
    got, before = among_five(name, plan), among_five("none", plan)
    first, expected = uploads(got, 1), uploads(before, 1)
    for client in range(5):
        if client not in liars:
            assert torch.equal(first[client], expected[client])
        elif name == "little-is-enough":
            torch.testing.assert_close(first[client], expected[client], rtol=0, atol=1e-6)
        else:
            assert not torch.allclose(first[client], expected[client], atol=1e-3)
    second, expected = uploads(got, 2), uploads(before, 2)
    assert not torch.allclose(second[min(liars)], expected[min(liars)], atol=1e-3)
    assert got.rows[1]["dropped"] == {}


@pytest.mark.parametrize("name", ON_ANSWERS)
def test_a_liar_in_a_federation_sends_what_the_attack_says(name: str) -> None:
    """From what the server told it, and its honest answer, which it would have sent without a lie."""
    experiment, run = mechanism(**FIVE, attack=name), among_five(name)
    received = run.exchanges[1].instructions[0].knowledge
    assert isinstance(received, SoftLabels)
    told_NC = received.values[0].double()
    liars = malicious_clients(experiment)
    for client in liars:
        got = uploads(run, 2)[client][0].double()
        what = Known(told_NC, told_NC, experiment.seed, client, 2, 5, 2)
        if name != "little-is-enough":
            assert torch.equal(got, answer(name, what))
            continue
        top = told_NC.argmax(-1, keepdim=True)
        assert bool((got.gather(1, top) < told_NC.gather(1, top) + 1e-6).all())
        assert float((got.gather(1, top) < told_NC.gather(1, top)).double().mean()) > 0.9


@pytest.mark.parametrize("name", ["label-flip", "random", "little-is-enough"])
def test_neither_order_nor_grouping_of_clients_matters(name: str, tmp_path: Path) -> None:
    """The same bits in a loop in any order and one by one; stacked, the same numbers."""
    experiment = tiny(**FIVE, attack=name, plan="loop")
    phases: list[Phase] = [Revisit(), Predict("probabilities")]
    knowledge = SoftLabels.shared(rand(P, CLASSES).float(), torch.arange(P), "logits")
    expected = told(experiment, phases, tmp_path / "a", knowledge=knowledge)
    again = told(experiment, phases, tmp_path / "b", clients=[3, 1, 4, 0, 2], knowledge=knowledge)
    alone = told(experiment, phases, tmp_path / "c", together=False, knowledge=knowledge)
    for other in (again, alone):
        assert all(same(other[k], expected[k]) for k in range(5))
    for plan in ("stacked", "stacked-2"):
        stacked = experiment.replace(plan=plan)
        in_turn = told(
            stacked, phases, tmp_path / plan, clients=[3, 1, 4, 0, 2], knowledge=knowledge
        )
        for k in range(5):
            (got, *_), (wanted, *_) = tensors(in_turn[k]), tensors(expected[k])
            torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("name", ["label-flip", "little-is-enough"])
def test_both_engines_have_the_same_liars(name: str, tmp_path: Path) -> None:
    """Accuracies by client and round, and what the server makes of their answers."""
    keys: dict[str, Any] = {
        **FIVE, "strategy": "ExpGuard", "attack": name, "num_server_rounds": 2, "plan": "stacked",
        "run_dir": str(tmp_path),
    }  # fmt: skip
    one, other, before = (
        fedkd.run(tiny(**{**keys, **more}))
        for more in (
            {"engine": "cohort"},
            {"engine": "flower"},
            {"attack": "none", "attackers": 0.0},
        )
    )
    assert one.client_accuracy == other.client_accuracy
    for row, there, honest_row in zip(one.rounds, other.rounds, before.rounds, strict=True):
        for key in ("dropped", "bytes_up", "bytes_down", "client_accuracy_after_revisit"):
            assert row[key] == there[key], key
        for key in ("knowledge_entropy", "loss_revisit"):
            assert row[key] == pytest.approx(there[key], rel=1e-5), key
        if name == "label-flip" or row["round"] > 1:
            assert row["knowledge_entropy"] != pytest.approx(
                honest_row["knowledge_entropy"], rel=1e-4
            )


# --- ExpGuard --------------------------------------------------------------------------------------

ETA = 3.7


def some(clients: int, samples: int, shift: int = 0) -> Tensor:
    """Return a mask in which each sample has another number of answers, at least one."""
    mask = torch.ones(clients, samples).bool()
    for sample in range(samples):
        for missing in range((sample + shift) % clients):
            mask[(sample + missing) % clients, sample] = False
    return mask


def guard_of(clients: int) -> Server:
    """Return a server with an empty memory."""
    experiment = tiny(num_clients=clients)
    return Server(experiment, federated_data(experiment))


def common(rows: Sequence[Sequence[float]], rule: str) -> list[float]:
    """Return what most clients think of a sample, on the simplex."""
    of = median if rule == "median" else lambda column: sum(column) / len(column)
    columns = [of([row[c] for row in rows]) for c in range(C)]
    return [value / sum(columns) for value in columns]


def guarded(
    weights: dict[int, float],
    answers: Mapping[int, Mapping[int, Sequence[float]]],
    eta: float,
    rule: str,
) -> dict[int, list[float]]:
    """Return new labels by sample, and change the weights by client: the rule, loop by loop."""
    samples = {sample for said in answers.values() for sample in said}
    centre = {s: common([said[s] for said in answers.values() if s in said], rule) for s in samples}
    heard = [client for client, said in answers.items() if said]
    before = sum(weights[client] for client in heard)
    for client in heard:
        far = [math.dist(row, centre[s]) for s, row in answers[client].items()]
        weights[client] *= math.exp(-eta * sum(far) / len(far))
    share = before / sum(weights[client] for client in heard)
    for client in heard:
        weights[client] *= share
    labels = {}
    for sample in samples:
        said = {k: row[sample] for k, row in answers.items() if sample in row}
        total = sum(weights[k] for k in said)
        labels[sample] = [
            sum(weights[k] * row[c] for k, row in said.items()) / total for c in range(C)
        ]
    return labels


@pytest.mark.parametrize("rule", ["median", "mean"])
def test_three_rounds_of_the_guard_are_the_loops(rule: Rule) -> None:
    """Part of the clients, part of the samples, and one client that answers none of them."""
    strategy, server = ExpGuard(step_size=ETA, combine=rule), guard_of(K)
    weights = dict.fromkeys(range(K), 1.0)
    rounds = [[0, 2, 3, 5, 7, 8, 10], [1, 2, 3, 5, 6, 9, 10], [0, 1, 4, 5, 7, 9, 10]]
    for number, clients in enumerate(rounds):
        samples = [3 * number + s for s in (2, 3, 7, 11, 19)]
        mask = some(7, N, shift=number)
        mask[number] &= number != 1
        values = rand(7, N, C, seed=number + 5).softmax(-1)
        labels = SoftLabels(
            values, "probabilities", torch.tensor(samples), torch.tensor(clients), mask=mask
        )
        answers = {
            k: {s: values[i, n].tolist() for n, s in enumerate(samples) if mask[i, n]}
            for i, k in enumerate(clients)
        }
        expected = guarded(weights, answers, ETA, rule)
        got = strategy.update(Replies(clients, labels), server)
        assert isinstance(got, SoftLabels)
        assert got.samples.tolist() == sorted(expected)
        wanted = torch.tensor([expected[s] for s in samples], dtype=F64)
        torch.testing.assert_close(got.values[0], wanted, rtol=1e-12, atol=1e-14)
        logs = server.state["log_weights"]
        assert isinstance(logs, Tensor)
        assert logs.exp().tolist() == pytest.approx([weights[k] for k in range(K)], rel=1e-12)
    assert len({round(weight, 6) for weight in weights.values()}) == K


def test_where_all_answer_the_weights_are_the_papers() -> None:
    """exp(−η · all scores so far), divided by their sum; nothing of who stays away."""
    strategy, server = ExpGuard(step_size=ETA, combine="mean"), guard_of(K)
    scores = torch.zeros(K, dtype=F64)
    for number in range(3):
        values = rand(K, N, C, seed=number + 5).softmax(-1)
        labels = SoftLabels(values, "probabilities")
        scores += (values - values.mean(0)).square().sum(-1).sqrt().mean(-1)
        got = strategy.update(Replies(list(range(K)), labels), server)
        weights = (-ETA * scores).exp()
        expected = torch.einsum("k,knc->nc", weights / weights.sum(), values)
        assert isinstance(got, SoftLabels)
        torch.testing.assert_close(got.values[0], expected, rtol=1e-12, atol=1e-14)
        if number == 0:
            torch.testing.assert_close(strategy.aggregate(labels), expected, rtol=1e-12, atol=0)


def test_a_constant_liar_is_soon_heard_no_more() -> None:
    """Beside six that agree its weight is e^(−ηTd) of theirs, d its distance; for ever and finite."""
    strategy, server = ExpGuard(step_size=ETA), guard_of(7)
    truth = rand(1, N, C, seed=5).softmax(-1)
    lie = one_hot(*[4] * N)
    values = torch.cat([truth.expand(6, N, C), lie.unsqueeze(0)])
    far = float((truth[0] - lie).norm(dim=-1).mean())
    labels = SoftLabels(values, "probabilities")
    shares = []
    for number in range(1, 252):
        got = strategy.update(Replies(list(range(7)), labels), server)
        assert isinstance(got, SoftLabels)
        weight = math.exp(-ETA * number * far)
        shares.append(weight / (6 + weight))
        expected = truth[0] + shares[-1] * (lie - truth[0])
        torch.testing.assert_close(got.values[0], expected, rtol=1e-10, atol=1e-13)
    assert shares[0] < 1 / 7
    assert shares[9] < 1e-6
    assert shares[-1] < 1e-300
    # It is heard, still, on a sample that nobody else answers.
    only = torch.ones(7, N).bool()
    only[:6, 3] = False
    alone = SoftLabels(values, "probabilities", mask=only)
    got = strategy.update(Replies(list(range(7)), alone), server)
    assert isinstance(got, SoftLabels)
    torch.testing.assert_close(got.values[0, 3], lie[3])


def test_who_stays_away_keeps_its_weight() -> None:
    """Whatever becomes of the others: their weights together stay what they were."""
    strategy, server = ExpGuard(step_size=ETA), guard_of(7)
    values = rand(5, N, C, seed=5).softmax(-1)
    clients = [0, 2, 3, 4, 6]
    for _ in range(3):
        strategy.update(
            Replies(clients, SoftLabels(values, "probabilities", clients=torch.tensor(clients))),
            server,
        )
    logs = server.state["log_weights"]
    assert isinstance(logs, Tensor)
    assert logs[[1, 5]].tolist() == [0, 0]
    assert float(logs[clients].exp().sum()) == pytest.approx(5, rel=1e-12)
    assert len(set(logs[clients].tolist())) == 5
    assert strategy.update(Replies([]), server) is None
    assert server.state["log_weights"] is logs
    kept = logs.clone()  # a round that is not accepted leaves what was there
    strategy.update(Replies(list(range(5)), SoftLabels(values, "probabilities")), server)
    assert server.state["log_weights"] is not logs
    assert torch.equal(logs, kept)


@pytest.mark.parametrize("keys", [{}, {"fraction_train": 0.6, "public_per_round": 11}])
def test_a_federation_under_guard(keys: dict[str, Any]) -> None:
    """What clients receive is what the guard makes of their answers, round after round."""
    strategy = ExpGuard(step_size=ETA)
    experiment = tiny(
        **FIVE, attack="constant", strategy="ExpGuard", num_server_rounds=3, plan="stacked", **keys
    )
    run = federate(experiment, strategy=strategy)
    server = guard_of(5)
    for exchange, later in zip(run.exchanges, run.exchanges[1:], strict=False):
        clients = sorted(exchange.instructions)
        labels = exchange.answers(clients)
        assert isinstance(labels, SoftLabels)
        expected = strategy.update(Replies(clients, labels), server)
        received = next(iter(later.instructions.values())).knowledge
        assert isinstance(expected, SoftLabels)
        assert isinstance(received, SoftLabels)
        assert torch.equal(received.values, expected.values)
        assert torch.equal(received.samples, expected.samples)
    logs = server.state["log_weights"]
    assert isinstance(logs, Tensor)
    liars = malicious_clients(experiment)
    assert len({len(exchange.instructions) for exchange in run.exchanges[:3]}) == 1
    if not keys:
        assert max(logs[k] for k in liars) < min(logs[k] for k in range(5) if k not in liars)


@pytest.mark.parametrize("value", [0.0, -1.0, math.inf, math.nan])
def test_a_step_size_out_of_range_is_refused(value: float) -> None:
    with pytest.raises(FedkdError, match=r"step-size = .*> 0"):
        ExpGuard(step_size=value)
