"""SCARLET: its equation in float64 loops, its cache against a dictionary, and both ends in step."""

from __future__ import annotations

import copy
import io
import math
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from federation_tools import C as CLASSES
from federation_tools import (
    Meddle,
    array,
    federate,
    reply_with,
    tiny,
    with_arrays,
)
from federation_tools import P as PUBLIC_OF_TINY
from flwr.app import Array, Message
from loops import mean_loop
from torch import Tensor
from watching import watch

from fedkd.clients.instructions import Instruction
from fedkd.errors import FedkdError
from fedkd.federation.server import Replies
from fedkd.knowledge import Rule, SoftLabels, Wire
from fedkd.phases import Digest, Predict, Revisit
from strategies.scarlet import SCARLET

K, N, C = 3, 5, 7
F64 = torch.float64
EVERYBODY = torch.ones(K, N).bool()
SOME = torch.tensor([[1, 1, 0, 0, 1], [1, 0, 0, 1, 1], [1, 1, 1, 0, 1]]).bool()
BETAS = [0.5, 1.0, 1.5, 2.0, 7.0]


def probabilities(*shape: int, seed: int = 1) -> Tensor:
    draws = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)
    return (3 * draws).softmax(-1)


def answers(seed: int = 1, mask: Tensor = EVERYBODY) -> SoftLabels:
    return SoftLabels(probabilities(K, N, C, seed=seed), "probabilities", mask=mask)


def enhanced_era_loop(row: list[float], beta: float) -> list[float]:
    """p^β / Σ p^β, with the powers taken of ratios to the largest where they would underflow."""
    powers = [math.exp(beta * (math.log(p) - math.log(max(row)))) if p > 0 else 0.0 for p in row]
    return [p / math.fsum(powers) for p in powers]


# --- Enhanced ERA --------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", [EVERYBODY, SOME], ids=["all", "some"])
@pytest.mark.parametrize("beta", BETAS)
def test_enhanced_era_is_the_normalised_power_of_the_mean(beta: float, mask: Tensor) -> None:
    given = answers(mask=mask)
    wanted = [enhanced_era_loop(row, beta) for row in mean_loop(given.values, mask)]
    got = SCARLET(beta=beta).aggregate(given)
    torch.testing.assert_close(got, torch.tensor(wanted, dtype=F64), rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(got.sum(-1), torch.ones(N, dtype=F64))


def test_a_case_by_hand() -> None:
    """Means ½, ¼, ¼ at β = 2: 4 : 1 : 1. At β = ½: √2 : 1 : 1."""
    two = torch.tensor([[[0.75, 0.25, 0.0]], [[0.25, 0.25, 0.5]]], dtype=F64)
    given = SoftLabels(two, "probabilities")
    sharp = SCARLET(beta=2.0).aggregate(given)
    torch.testing.assert_close(sharp, torch.tensor([[4.0, 1, 1]], dtype=F64) / 6)
    flat = SCARLET(beta=0.5).aggregate(given)
    root = math.sqrt(2)
    torch.testing.assert_close(flat, torch.tensor([[root, 1, 1]], dtype=F64) / (root + 2))


@pytest.mark.parametrize("beta", BETAS)
def test_log_odds_are_multiplied_by_beta(beta: float) -> None:
    """What sets it apart from DS-FL's softmax, which depends on differences of probabilities."""
    odds = answers().mean_probabilities().log()
    got = SCARLET(beta=beta).aggregate(answers()).log()
    wanted = beta * (odds - odds[:, :1])
    torch.testing.assert_close(got - got[:, :1], wanted, rtol=1e-10, atol=1e-12)


def test_a_larger_beta_is_a_sharper_label_of_the_same_order() -> None:
    labels = [SCARLET(beta=beta).aggregate(answers()) for beta in BETAS]
    entropies = torch.stack([-(p * p.log()).sum(-1) for p in labels])
    assert bool((entropies.diff(dim=0) < 0).all())
    instruction = answers().mean_probabilities().argsort(-1)
    assert all(torch.equal(p.argsort(-1), instruction) for p in labels)


@pytest.mark.parametrize("beta", BETAS)
def test_one_client_gets_its_own_answer_sharpened(beta: float) -> None:
    for k in range(K):
        own = answers().values[k : k + 1]
        wanted = [enhanced_era_loop(row, beta) for row in own[0].tolist()]
        got = SCARLET(beta=beta).aggregate(SoftLabels(own, "probabilities"))
        torch.testing.assert_close(got, torch.tensor(wanted, dtype=F64), rtol=1e-12, atol=1e-15)
        if beta == 1:
            torch.testing.assert_close(got, own[0], rtol=1e-14, atol=0)


@pytest.mark.parametrize("beta", [*BETAS, 1000.0])
def test_what_all_are_sure_of_stays_sure_and_what_nobody_knows_stays_uniform(beta: float) -> None:
    one_hot = torch.eye(C, dtype=F64)[:N].expand(K, N, C)
    got = SCARLET(beta=beta).aggregate(SoftLabels(one_hot, "probabilities"))
    assert torch.equal(got, one_hot[0])
    uniform = torch.full((K, N, C), 1 / C, dtype=F64)
    got = SCARLET(beta=beta).aggregate(SoftLabels(uniform, "probabilities"))
    torch.testing.assert_close(got, uniform[0], rtol=1e-14, atol=0)


@pytest.mark.parametrize("beta", [*BETAS, 1000.0])
def test_votes_that_tie_tie_and_a_class_that_nobody_holds_stays_at_zero(beta: float) -> None:
    """Two sure clients disagree on each sample, a third halves: 0 and 1 are equal bit for bit."""
    sure = torch.zeros(K, N, C, dtype=F64)
    sure[0, :, 0] = sure[1, :, 1] = 1
    sure[2, :, :2] = 0.5
    got = SCARLET(beta=beta).aggregate(SoftLabels(sure, "probabilities"))
    wanted = torch.zeros(N, C, dtype=F64)
    wanted[:, :2] = 0.5
    assert torch.equal(got, wanted)


def test_small_numbers_to_a_large_power_are_still_probabilities() -> None:
    """0.14^β is 0 in float32 from β = 53 on: a division of rows of zeros."""
    nearly_uniform = torch.full((1, 1, C), 0.14)
    nearly_uniform[..., 2] = 0.16
    got = SCARLET(beta=200.0).aggregate(SoftLabels(nearly_uniform, "probabilities"))
    wanted = enhanced_era_loop(nearly_uniform[0, 0].tolist(), 200.0)
    torch.testing.assert_close(got[0], torch.tensor(wanted), rtol=1e-4, atol=1e-12)


@pytest.mark.parametrize("rule", ["median", "trimmed-mean", "geometric-median"])
def test_a_robust_rule_takes_the_place_of_the_mean(rule: Rule) -> None:
    """Of three clients two agree: the median of each class is theirs, whatever the third says."""
    agreed = probabilities(1, N, C).repeat(K, 1, 1)
    agreed[1] = probabilities(N, C, seed=2)
    got = SCARLET(beta=1.5, combine=rule).aggregate(SoftLabels(agreed, "probabilities"))
    base = agreed[0] if rule != "trimmed-mean" else agreed.mean(0)  # a fifth of three is nobody
    wanted = [enhanced_era_loop(row, 1.5) for row in base.tolist()]
    torch.testing.assert_close(got, torch.tensor(wanted, dtype=F64), rtol=1e-9, atol=1e-12)


def test_logits_and_settings_that_would_be_silently_wrong_are_refused() -> None:
    with pytest.raises(FedkdError, match="SCARLET aggregates probabilities, not logits"):
        SCARLET().aggregate(SoftLabels(torch.zeros(K, N, C), "logits"))
    wrong: list[dict[str, Any]] = [
        {"beta": 0.0},
        {"beta": -1.0},
        {"beta": math.nan},
        {"cache_duration": -1},
        {"cache_duration": 2.5},
        {"combine": "sum"},
    ]
    for settings in wrong:
        ((name, _),) = settings.items()
        with pytest.raises(FedkdError, match=name.replace("_", "-")):
            SCARLET(**settings)


# --- The cache -----------------------------------------------------------------------------------

PUBLIC = 23


@dataclass
class Desk:
    """What a strategy sees of a server, with the draws of each round made here."""

    draws: dict[int, Tensor]
    round: int = 0
    num_public: int = PUBLIC
    state: dict[str, Any] = field(default_factory=dict)

    def draw(self) -> Tensor:
        return self.draws[self.round]


class Cache:
    """The cache once more: a label and its round by sample, as the paper's text has it."""

    def __init__(self, duration: int, beta: float) -> None:
        self.duration, self.beta = duration, beta
        self.labels: dict[int, tuple[list[float], int]] = {}

    def serves(self, sample: int, now: int) -> bool:
        return sample in self.labels and now - self.labels[sample][1] <= self.duration

    def requests(self, drawn: list[int], now: int) -> list[int]:
        return [sample for sample in drawn if not self.serves(sample, now)]

    def renew(self, given: dict[int, list[list[float]]], now: int) -> None:
        """Take the answers by sample, of those clients that answered it."""
        for sample, rows in given.items():
            mean = [math.fsum(column) / len(rows) for column in zip(*rows, strict=True)]
            self.labels[sample] = (enhanced_era_loop(mean, self.beta), now)

    def digested(self, drawn: list[int], now: int) -> dict[int, list[float]]:
        return {sample: self.labels[sample][0] for sample in drawn if self.serves(sample, now)}


def draws(rounds: int, seed: int = 0) -> dict[int, Tensor]:
    """Draw 11 of 23 samples a round, sorted; all of them in round 5."""
    generator = torch.Generator().manual_seed(seed)
    found = {r: torch.randperm(PUBLIC, generator=generator)[:11] for r in range(1, rounds + 1)}
    found[5] = torch.arange(PUBLIC)
    return {r: samples.sort().values for r, samples in found.items()}


def replies_to(asked: Tensor, round: int, some: bool) -> Replies:
    """Answer as K clients do; with `some`, each leaves samples out, and the first of all is nobody's."""
    generator = torch.Generator().manual_seed(100 + round)
    values = probabilities(K, len(asked), C, seed=round)
    given = []
    for k in range(K):
        kept = torch.rand(len(asked), generator=generator) < 0.6
        kept[:1] = False
        rows = kept if some else torch.ones(len(asked)).bool()
        one = values[k : k + 1, rows].float()
        given.append(SoftLabels(one, "probabilities", asked[rows], torch.tensor([k])))
    return Replies(list(range(K)), SoftLabels.stack(given))


def by_sample(labels: SoftLabels) -> dict[int, list[list[float]]]:
    return {
        int(sample): [labels.values[k, n].tolist() for k in range(K) if labels.mask[k, n]]
        for n, sample in enumerate(labels.samples)
    }


@pytest.mark.parametrize("some", [False, True], ids=["all answer", "some answer"])
@pytest.mark.parametrize("duration", [0, 1, 2, 6, 50])
def test_the_cache_is_that_of_a_dictionary(duration: int, some: bool) -> None:
    strategy, rounds = SCARLET(beta=1.5, cache_duration=duration), 13
    desk: Any = Desk(draws(rounds))
    cache = Cache(duration, 1.5)
    saved = 0
    for number in range(1, rounds + 1):
        desk.round = number
        drawn = desk.draw().tolist()
        asked = strategy.request(desk)
        assert asked.tolist() == cache.requests(drawn, number)
        saved += len(drawn) - len(asked)
        replies = replies_to(asked, number, some)
        assert replies.labels is not None
        cache.renew(by_sample(replies.labels), number)
        got = strategy.update(replies, desk)
        wanted = cache.digested(drawn, number)
        assert got.samples.tolist() == list(wanted)
        assert got.space == "probabilities"
        labels = torch.tensor(list(wanted.values())).reshape(1, -1, C)
        torch.testing.assert_close(got.values, labels, rtol=1e-5, atol=1e-7)
    assert (saved == 0) == (duration == 0)


def published_ages(duration: int, rounds: int) -> list[int]:
    """Return how old the label is that clients digest, by the published signals: drawn every round.

    Clients are asked for it at an age of exactly D already, but are signalled to use the old one.
    """
    cached, ages = 0, []
    for now in range(1, rounds + 1):
        if not cached:
            cached = now
            ages.append(0)
        elif now - cached <= duration:
            ages.append(now - cached)
        else:
            cached = 0  # dropped, and the fresh label used once
            ages.append(0)
    return ages


@pytest.mark.parametrize("duration", [0, 1, 2, 5])
def test_a_published_duration_means_the_same_here(duration: int) -> None:
    """Until it is renewed, a label is used as long as in the authors' code with the same D."""
    desk: Any = Desk({r: torch.arange(PUBLIC) for r in range(1, duration + 3)})
    strategy, made, ages = SCARLET(cache_duration=duration), 0, []
    for number in desk.draws:
        desk.round = number
        asked = strategy.request(desk)
        made = number if len(asked) else made
        ages.append(number - made)
        strategy.update(replies_to(asked, number, False), desk)
    assert ages == published_ages(duration, len(ages)) == [*range(duration + 1), 0]


def test_a_label_is_used_up_to_an_age_of_its_duration() -> None:
    """One round later it is asked again, and the fresh label is what clients are told."""
    strategy = SCARLET(cache_duration=2)
    desk: Any = Desk({r: torch.arange(PUBLIC) for r in range(1, 11)})
    told = {}
    asked_in = []
    for number in desk.draws:
        desk.round = number
        asked = strategy.request(desk)
        assert len(asked) in (0, PUBLIC)
        asked_in += [number] if len(asked) else []
        told[number] = strategy.update(replies_to(asked, number, False), desk)
        assert len(told[number].samples) == PUBLIC
        if number in (1, 4, 7, 10):
            labels = replies_to(asked, number, False).labels
            assert labels is not None
            fresh = strategy.aggregate(labels)
            assert torch.equal(told[number].values[0], fresh)
        else:
            assert torch.equal(told[number].values, told[number - 1].values)
    assert asked_in == [1, 4, 7, 10]
    for earlier, later in ((1, 4), (4, 7), (7, 10)):
        assert not torch.equal(told[earlier].values, told[later].values)


def test_when_all_is_cached_nothing_is_asked_and_all_is_digested() -> None:
    strategy = SCARLET(cache_duration=1)
    desk: Any = Desk({1: torch.arange(PUBLIC), 2: torch.tensor([3, 5, 11])}, round=1)
    first = strategy.update(replies_to(desk.draw(), 1, False), desk)
    desk.round = 2
    asked = strategy.request(desk)
    assert asked.shape == (0,)
    assert asked.dtype == torch.int64
    replies = replies_to(asked, 2, False)
    assert replies.labels is not None
    assert replies.labels.values.shape == (K, 0, C)
    assert strategy.aggregate(replies.labels).shape == (0, C)
    second = strategy.update(replies, desk)
    assert second.samples.tolist() == [3, 5, 11]
    assert torch.equal(second.values, first.values[:, [3, 5, 11]])


def test_what_nobody_answers_is_left_out_and_asked_again() -> None:
    """An expired label does not step in for an answer that did not come."""
    strategy = SCARLET(cache_duration=1)
    desk: Any = Desk({r: torch.tensor([2, 3, 7]) for r in (1, 2, 3, 4)})
    heard = {1: [2, 3], 2: [7], 3: [3], 4: [2]}
    wanted_asked = {1: [2, 3, 7], 2: [7], 3: [2, 3], 4: [2, 7]}
    wanted_told = {1: [2, 3], 2: [2, 3, 7], 3: [3, 7], 4: [2, 3]}
    for number, samples in heard.items():
        desk.round = number
        asked = strategy.request(desk)
        assert asked.tolist() == wanted_asked[number]
        replies = replies_to(torch.tensor(samples), number, False)
        told = strategy.update(replies, desk)
        assert told.samples.tolist() == wanted_told[number]
        torch.testing.assert_close(told.values.sum(-1), torch.ones(1, len(told.samples)))
    desk.draws[5] = desk.draws[4]
    desk.round = 5
    nothing = SoftLabels(torch.zeros(K, 0, C), "probabilities", torch.zeros(0, dtype=torch.int64))
    told = strategy.update(Replies(list(range(K)), nothing), desk)
    assert told.samples.tolist() == [2]


def test_asking_changes_nothing_and_a_copy_of_the_memory_goes_on_as_the_original() -> None:
    strategy = SCARLET(cache_duration=2)
    desk: Any = Desk(draws(9))
    for number in range(1, 5):
        desk.round = number
        asked = strategy.request(desk)
        assert torch.equal(asked, strategy.request(desk))
        strategy.update(replies_to(asked, number, True), desk)
    file = io.BytesIO()
    torch.save(desk.state, file)
    file.seek(0)
    others: list[Any] = [
        Desk(desk.draws, state=copy.deepcopy(desk.state)),
        Desk(desk.draws, state=torch.load(file)),
    ]
    lost = copy.deepcopy(desk.state)
    for number in range(5, 10):
        told = []
        for each in (desk, *others):
            each.round = number
            asked = strategy.request(each)
            told.append(strategy.update(replies_to(asked, number, True), each))
        for copied in told[1:]:
            assert torch.equal(copied.samples, told[0].samples)
            assert torch.equal(copied.values, told[0].values)
    assert not torch.equal(lost["asked"], desk.state["asked"])
    for name, tensor in desk.state.items():
        assert torch.equal(others[1].state[name], tensor)


def test_the_phases_the_wire_and_the_defaults() -> None:
    strategy = SCARLET()
    assert strategy.phases(1) == [Digest(), Revisit(), Predict("probabilities")]
    assert strategy.wire() == (Wire(), Wire(rows="changed"))
    assert strategy.closes == "digest"
    assert (strategy.beta, strategy.cache_duration, strategy.combine) == (2.0, 2, "mean")


# --- Both ends -----------------------------------------------------------------------------------


def silent_or_spoilt(instruction: Instruction, message: Message, reply: Message) -> Message | None:
    """Client 1 says nothing in round 2, and client 2 sends NaN in rounds 3 and 4."""
    if (instruction.round, instruction.client) == (2, 1):
        return None
    if (instruction.round, instruction.client) in ((3, 2), (4, 2)) and "knowledge" in reply.content:
        spoilt = array(torch.full((len(instruction.asked), CLASSES), math.nan))
        return reply_with(message, with_arrays(reply.content, values=spoilt))
    return reply


def test_with_all_samples_drawn_labels_are_asked_for_and_sent_once_while_they_are_cached() -> None:
    done = federate(tiny(num_server_rounds=7), strategy=SCARLET(cache_duration=2))
    labels, bitmap = PUBLIC_OF_TINY * CLASSES * 4, math.ceil(PUBLIC_OF_TINY / 8)
    assert [row["dropped"] for row in done.rows] == [{}] * 7
    asking = [1, 0, 0, 1, 0, 0, 1]
    assert [row["bytes_up"] for row in done.rows] == [K * labels * asks for asks in asking]
    wanted = [0, labels + bitmap, bitmap, bitmap, labels + bitmap, bitmap, bitmap]
    assert [row["bytes_down"] for row in done.rows] == [K * size for size in wanted]
    for row in done.rows[1:]:
        assert row["knowledge_round"] == row["round"] - 1
        assert row["loss_digest"] > 0  # what is cached is digested as well


@pytest.mark.parametrize("meddle", [None, silent_or_spoilt], ids=["all reply", "some fail"])
@pytest.mark.parametrize("keys", [{}, {"public_per_round": 11}], ids=["all drawn", "some drawn"])
@pytest.mark.parametrize("duration", [0, 2])
def test_clients_read_the_labels_that_the_server_holds(
    duration: int, keys: dict[str, Any], meddle: Meddle | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment = tiny(num_server_rounds=7, **keys)
    seen = watch(monkeypatch, experiment, SCARLET(cache_duration=duration), meddle)
    seen.assert_heard()
    seen.assert_in_step()
    spoilt = [
        number for number in (3, 4) if len(seen.done.exchanges[number - 1].instructions[2].asked)
    ]
    assert spoilt
    wanted = {} if meddle is None else {2: "1", **dict.fromkeys(spoilt, "2")}
    for row in seen.done.rows:
        assert "".join(row["dropped"]) == wanted.get(row["round"], "")


def test_a_client_that_is_seldom_drawn_catches_up(monkeypatch: pytest.MonkeyPatch) -> None:
    keys: dict[str, Any] = {"num_clients": 5, "fraction_train": 0.4, "public_per_round": 17}
    experiment = tiny(num_server_rounds=9, **keys)
    seen = watch(monkeypatch, experiment, SCARLET(cache_duration=3), None)
    assert [row["dropped"] for row in seen.done.rows] == [{}] * 9
    seen.assert_heard()
    assert seen.assert_in_step() > 17
    assert set(seen.done.exchanges[-1].instructions) == set(range(5))


def test_declared_bytes_are_never_exceeded() -> None:
    strategy, drawn = SCARLET(cache_duration=2), 11
    names = {"P": drawn, "C": CLASSES, "I": min(4 * drawn, math.ceil(PUBLIC_OF_TINY / 8))}
    facts = strategy.facts
    up, down = (eval(f.removeprefix("<= "), {}, names) for f in (facts.up, facts.down))
    experiment = tiny(num_server_rounds=9, public_per_round=drawn)
    rows = federate(experiment, strategy=strategy).rows
    assert all(row["bytes_up"] <= K * up and row["bytes_down"] <= K * down for row in rows)
    assert min(row["bytes_up"] for row in rows) < K * up / 2
    assert rows[0]["bytes_up"] == K * up


def test_a_sample_that_no_client_answers_is_asked_for_again_alone() -> None:
    def forgets_the_first(instruction: Instruction, message: Message, reply: Message) -> Message:
        if instruction.round != 1:
            return reply
        values = reply.content.array_records["knowledge"]["values"].numpy()[1:]
        some = {"values": Array(values), "samples": array(instruction.asked[1:].to(torch.int32))}
        return reply_with(message, with_arrays(reply.content, **some))

    experiment = tiny(num_server_rounds=3)
    done = federate(experiment, forgets_the_first, SCARLET(cache_duration=2))
    assert [row["dropped"] for row in done.rows] == [{}] * 3
    asked = [exchange.instructions[0].asked.tolist() for exchange in done.exchanges]
    assert asked[:3] == [list(range(PUBLIC_OF_TINY)), [0], []]
    told = [exchange.instructions[0].knowledge for exchange in done.exchanges]
    sizes = [len(labels.samples) for labels in told if labels is not None]  # type: ignore[union-attr]
    assert sizes == [PUBLIC_OF_TINY - 1, PUBLIC_OF_TINY, PUBLIC_OF_TINY]
