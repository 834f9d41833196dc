"""CFD: its equations in float64 loops, algorithm 1 against dictionaries, and both ends in step."""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from federation_tools import C as CLASSES
from federation_tools import Meddle, federate, reply_with, tiny, with_arrays
from federation_tools import P as PUBLIC_OF_TINY
from flwr.app import Array, Message
from torch import Tensor
from watching import watch

from fedkd.clients.instructions import Instruction
from fedkd.errors import FedkdError
from fedkd.experiment import Experiment
from fedkd.federation.server import Replies
from fedkd.knowledge import Rule, SoftLabels, Wire
from fedkd.knowledge.codec import KnownRows, pack, unpack
from fedkd.phases import Digest, Phase, Predict, Reset, Revisit
from strategies.cfd import CFD

K, N, C = 3, 5, 7
F64 = torch.float64
EVERYBODY = torch.ones(K, N).bool()
SOME = torch.tensor([[1, 1, 0, 0, 1], [1, 0, 0, 1, 1], [1, 1, 1, 0, 1]]).bool()
BITS = (1, 2, 4, 8, 32)


def probabilities(*shape: int, seed: int = 1) -> Tensor:
    draws = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)
    return (3 * draws).softmax(-1)


def crossed(values: Tensor, wire: Wire) -> Tensor:
    """Return what arrives of ``[N, C]`` probabilities at a receiver that has nothing."""
    packed, _ = pack(values.unsqueeze(0), "probabilities", torch.arange(len(values)), wire, 50)
    arrived, _ = unpack(packed, 50)
    return arrived[0]


# --- Equations 10, 11 and 14 ---------------------------------------------------------------------


@pytest.mark.parametrize("mask", [EVERYBODY, SOME], ids=["all", "some"])
def test_the_clients_labels_are_averaged(mask: Tensor) -> None:
    given = SoftLabels(probabilities(K, N, C), "probabilities", mask=mask)
    wanted = []
    for n in range(N):
        rows = [given.values[k, n].tolist() for k in range(K) if mask[k, n]]
        wanted.append([math.fsum(column) / len(rows) for column in zip(*rows, strict=True)])
    torch.testing.assert_close(
        CFD().aggregate(given), torch.tensor(wanted, dtype=F64), rtol=1e-14, atol=0
    )


def test_at_one_bit_the_mean_counts_votes() -> None:
    """Ties of a client go to the lower class; a class that nobody prefers gets nothing."""
    said = torch.tensor(
        [
            [[0.5, 0.3, 0.2], [0.4, 0.4, 0.2], [0, 0, 1]],
            [[0.4, 0.5, 0.1], [0.2, 0.4, 0.4], [0, 0, 1]],
            [[0.6, 0.2, 0.2], [1 / 3, 1 / 3, 1 / 3], [0, 1, 0]],
        ]
    )
    up, _ = CFD().wire()
    votes = torch.stack([crossed(client, up) for client in said])
    shares = CFD().aggregate(SoftLabels(votes.double(), "probabilities"))
    wanted = torch.tensor([[2, 1, 0], [2, 1, 0], [0, 1, 2]], dtype=F64) / 3
    torch.testing.assert_close(shares, wanted)


@pytest.mark.parametrize("bits", BITS)
def test_one_client_gets_its_own_quantised_answer_back(bits: Any) -> None:
    up, _ = CFD(up_bits=bits).wire()
    own = crossed(probabilities(N, C), up)
    alone = CFD(up_bits=bits).aggregate(SoftLabels(own.unsqueeze(0), "probabilities"))
    assert torch.equal(alone, own)
    if bits == 32:
        assert torch.equal(own, probabilities(N, C).float())


@pytest.mark.parametrize("bits", [1, 2])
@pytest.mark.parametrize("end", [0, 1], ids=["up", "down"])
def test_what_crosses_is_the_nearest_point_of_the_grid_on_the_simplex(bits: Any, end: int) -> None:
    """Equation 10, by trying every q with entries l / (2^b - 1) that sum to 1."""
    steps = 2**bits - 1
    grid = [q for q in product(range(steps + 1), repeat=C) if sum(q) == steps]
    wire = CFD(up_bits=bits, down_bits=bits).wire()[end]
    given = torch.cat([probabilities(N, C), torch.eye(C, dtype=F64)])
    for p, q in zip(given.tolist(), crossed(given, wire).double().mul(steps).tolist(), strict=True):
        assert sum(q) == pytest.approx(steps)
        distances = [math.fsum(abs(g - steps * x) for g, x in zip(g, p, strict=True)) for g in grid]
        distance = math.fsum(abs(a - steps * x) for a, x in zip(q, p, strict=True))
        assert distance == pytest.approx(min(distances), abs=1e-5)


@pytest.mark.parametrize("bits", BITS)
def test_sure_answers_cross_without_loss(bits: Any) -> None:
    sure = torch.eye(C)
    for wire in CFD(up_bits=bits, down_bits=bits).wire():
        assert torch.equal(crossed(sure, wire), sure)


@pytest.mark.parametrize("rule", ["median", "trimmed-mean", "geometric-median"])
def test_a_robust_rule_takes_the_place_of_the_mean(rule: Rule) -> None:
    """Two of three vote alike: all but the trimmed mean, which trims nobody of three, follow them."""
    votes = torch.eye(C, dtype=F64)[torch.tensor([[1, 2, 3], [1, 2, 3], [4, 5, 6]])]
    got = CFD(combine=rule).aggregate(SoftLabels(votes, "probabilities"))
    wanted = votes[0] if rule != "trimmed-mean" else votes.mean(0)
    torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-12)


# --- Algorithm 1 ---------------------------------------------------------------------------------


class Peer:
    """One end's picture of the other's labels at one bit, as a dictionary."""

    def __init__(self) -> None:
        self.classes: dict[int, int] = {}

    def news(self, rows: Tensor) -> list[int]:
        """Return the samples whose most probable class is another than before, and remember it."""
        winners = {n: row.index(max(row)) for n, row in enumerate(rows.tolist())}
        changed = [n for n, winner in winners.items() if self.classes.get(n) != winner]
        self.classes |= winners
        return changed


def test_only_changed_votes_cross_whichever_rounds_a_client_misses() -> None:
    """Equation 13 over nine rounds: bitmap, bytes and votes as dictionaries have them."""
    up, _ = CFD().wire()
    samples = torch.arange(N)
    said = probabilities(K, N, C)
    peers = [Peer() for _ in range(K)]
    sent: list[KnownRows | None] = [None] * K
    heard: list[KnownRows | None] = [None] * K
    generator = torch.Generator().manual_seed(2)
    unchanged = 0
    for number in range(1, 10):
        taking_part = [k for k in range(K) if number == 1 or (number + k) % 3]
        arrived = []
        for k in taking_part:
            moved = torch.rand(N, generator=generator) < 0.4
            said[k, moved] = probabilities(N, C, seed=10 * number + k)[moved]
            wanted = peers[k].news(said[k])
            packed, sent[k] = pack(said[k : k + 1], "probabilities", samples, up, N, sent[k])
            values, heard[k] = unpack(packed, N, heard[k])
            bitmap = sum(128 >> n for n in wanted)
            assert packed.arrays["changed"].tolist() == [bitmap]
            unchanged += N - len(wanted)
            assert values[0].argmax(-1).tolist() == [peers[k].classes[n] for n in range(N)]
            assert bool(((values == 0) | (values == 1)).all())
            arrived.append(values)
        shares = CFD().aggregate(SoftLabels(torch.cat(arrived), "probabilities"))
        for n in range(N):
            for c in range(C):
                votes = sum(peers[k].classes[n] == c for k in taking_part)
                assert float(shares[n, c]) == pytest.approx(votes / len(taking_part))
    assert unchanged > 20


@dataclass
class Desk:
    """A server whose model answers with what it was last taught, blurred."""

    fits: list[tuple[Phase, SoftLabels]] = field(default_factory=list)
    asked: list[Tensor] = field(default_factory=list)
    num_public: int = 2 * N
    answer: Tensor = field(default_factory=lambda: torch.randn(2 * N, C))

    def everything(self) -> Tensor:
        return torch.arange(self.num_public)

    def fit(self, phase: Phase, labels: SoftLabels) -> None:
        self.fits.append((phase, labels))

    def predict(self, samples: Tensor) -> SoftLabels:
        assert self.fits, "the server predicts before it has learnt"
        self.asked.append(samples)
        return SoftLabels(self.answer[samples].unsqueeze(0), "logits", samples)


def test_the_server_distils_the_mean_and_sends_what_its_model_then_predicts() -> None:
    """Equations 14 to 16, with samples that nobody answered: the model has an opinion on them too."""
    desk: Any = Desk()
    samples = torch.tensor([1, 2, 3, 5, 7])
    given = SoftLabels(probabilities(K, N, C), "probabilities", samples, mask=EVERYBODY)
    told = CFD().update(Replies([0, 1, 2], given), desk)
    ((phase, taught),) = desk.fits
    assert phase == Digest()
    assert torch.equal(taught.samples, samples)
    torch.testing.assert_close(taught.values[0], given.values.mean(0))
    assert torch.equal(told.samples, torch.arange(2 * N))
    assert told.space == "probabilities"
    assert told.values.shape == (1, 2 * N, C)
    rows = [[math.exp(z) for z in row] for row in desk.answer.double().tolist()]
    wanted = torch.tensor([[e / math.fsum(row) for e in row] for row in rows])
    torch.testing.assert_close(told.values[0], wanted)


def test_no_answers_are_no_lesson_but_the_server_still_predicts() -> None:
    desk: Any = Desk()
    nothing = SoftLabels(torch.zeros(K, 0, C), "probabilities", torch.zeros(0, dtype=torch.int64))
    told = CFD().update(Replies([0, 1, 2], nothing), desk)
    assert desk.fits[0][1].values.shape == (1, 0, C)
    assert told.values.shape == (1, 2 * N, C)


def test_clients_start_from_the_common_weights_each_round_and_answer_everything() -> None:
    desk: Any = Desk()
    for number in (1, 2, 7):
        phases = CFD().phases(number)
        assert phases == [Reset(), Digest(), Revisit(), Predict("probabilities")]
    assert torch.equal(CFD().request(desk), torch.arange(2 * N))
    assert CFD.closes == "digest"
    assert CFD.facts.headline == "server"


# --- Settings ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("up", "down"), list(product(BITS, BITS)))
def test_bits_name_the_numbers_of_both_directions(up: Any, down: Any) -> None:
    numbers = {b: f"simplex:{b}" for b in BITS} | {32: "float32"}
    assert CFD(up_bits=up, down_bits=down).wire() == (
        Wire(numbers[up], "changed", "deflate"),
        Wire(numbers[down], "changed", "deflate"),
    )


def test_bits_come_as_text_too_and_others_are_refused_by_name() -> None:
    texts: dict[str, Any] = {"up_bits": "4", "down_bits": "32"}
    assert CFD(**texts) == CFD(up_bits=4, down_bits=32)
    assert isinstance(CFD(**texts).up_bits, int)
    for wrong in (0, 3, 16, 64, -1, 1.5, "3", "one", "1.0", None):
        for name in ("up_bits", "down_bits"):
            settings: dict[str, Any] = {name: wrong}
            with pytest.raises(FedkdError, match=rf"{name[:-5]}.bits = .*1, 2, 4, 8, 32"):
                CFD(**settings)
    with pytest.raises(FedkdError, match="combine"):
        CFD(combine="sum")  # type: ignore[arg-type]


def test_logits_and_a_missing_server_model_are_refused() -> None:
    with pytest.raises(FedkdError, match="CFD aggregates probabilities, not logits"):
        CFD().aggregate(SoftLabels(torch.zeros(K, N, C), "logits"))
    CFD().check(Experiment(server_model="mlp-20"))
    with pytest.raises(FedkdError, match=r"server-model = 'none'.*CFD"):
        CFD().check(Experiment())


@pytest.mark.parametrize("classes", [2, 3, 7, 10, 100])
@pytest.mark.parametrize("bits", BITS)
def test_no_labels_cost_more_than_declared(bits: Any, classes: int) -> None:
    """Labels as incompressible as can be: every row new, and drawn evenly from the simplex."""
    public = 2003
    strategy = CFD(up_bits=bits, down_bits=bits)
    generator = torch.Generator().manual_seed(3)
    even = -torch.rand(public, classes, generator=generator, dtype=F64).log()
    even = even / even.sum(-1, keepdim=True)
    wires = zip(strategy.wire(), (strategy.facts.up, strategy.facts.down), strict=True)
    for wire, formula in wires:
        packed, _ = pack(even.unsqueeze(0), "probabilities", torch.arange(public), wire, public)
        size = sum(t.numel() * t.element_size() for t in packed.arrays.values())
        most, names = formula.removeprefix("<= "), {"P": public, "C": classes}
        assert size <= eval(most, {}, names | strategy.settings())


# --- Both ends -----------------------------------------------------------------------------------

BITMAP = math.ceil(PUBLIC_OF_TINY / 8)
NOTHING = len(zlib.compress(b""))
"""Bytes of a deflated array without any row."""


def tiny_with_server(**keys: Any) -> Experiment:
    return tiny(**{"server_model": "mlp-8", "public_labels": False, **keys})


def silent_or_spoilt(instruction: Instruction, message: Message, reply: Message) -> Message | None:
    """Client 1 says nothing in round 2, and client 2 sends junk in rounds 3 and 4."""
    if (instruction.round, instruction.client) == (2, 1):
        return None
    if (instruction.round, instruction.client) in ((3, 2), (4, 2)):
        junk = Array(np.frombuffer(b"junk", np.uint8))
        return reply_with(message, with_arrays(reply.content, values=junk))
    return reply


@pytest.mark.parametrize("meddle", [None, silent_or_spoilt], ids=["all reply", "some fail"])
@pytest.mark.parametrize(("up", "down"), [(1, 1), (2, 4), (1, 32), (32, 8)])
def test_both_ends_hold_the_same_labels(
    up: Any, down: Any, meddle: Meddle | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    strategy = CFD(up_bits=up, down_bits=down)
    numbers = [wire.number for wire in strategy.wire()]
    seen = watch(monkeypatch, tiny_with_server(num_server_rounds=6), strategy, meddle)
    seen.assert_heard(numbers[0])
    seen.assert_in_step(numbers[1])
    fails = {2: ["1"], 3: ["2"], 4: ["2"]} if meddle else {}
    for row in seen.done.rows:
        assert list(row["dropped"]) == fails.get(row["round"], [])


def test_clients_that_miss_rounds_stay_in_step(monkeypatch: pytest.MonkeyPatch) -> None:
    keys: dict[str, Any] = {"num_clients": 5, "fraction_train": 0.4, "num_server_rounds": 9}
    seen = watch(monkeypatch, tiny_with_server(learning_rate=0.1, **keys), CFD())
    assert [row["dropped"] for row in seen.done.rows] == [{}] * 9
    seen.assert_heard("simplex:1")
    assert seen.assert_in_step("simplex:1") > 0


def test_where_nothing_changes_only_the_bitmap_crosses() -> None:
    """Clients that hardly learn, from the same weights each round, vote as they did."""
    experiment = tiny_with_server(learning_rate=1e-12, num_server_rounds=4)
    rows = federate(experiment, strategy=CFD()).rows
    least = K * (BITMAP + NOTHING)
    assert [row["bytes_up"] for row in rows[1:]] == [least] * 3
    assert [row["bytes_down"] for row in rows[2:]] == [least] * 2
    assert rows[0]["bytes_up"] > least
    assert rows[0]["bytes_down"] == 0  # the whole public set is asked for without a list
    assert rows[1]["bytes_down"] > least


def test_one_bit_is_a_fiftieth_of_floats_and_less_from_round_to_round() -> None:
    rows = federate(tiny_with_server(num_server_rounds=5), strategy=CFD()).rows
    plain = tiny_with_server(num_server_rounds=2, codec="float32")
    floats = federate(plain, strategy=CFD()).rows
    assert [row["bytes_up"] for row in floats] == [K * PUBLIC_OF_TINY * CLASSES * 4] * 2
    names = {"P": PUBLIC_OF_TINY, "C": CLASSES, **CFD().settings()}
    facts = CFD.facts
    up, down = (eval(f.removeprefix("<= "), {}, names) for f in (facts.up, facts.down))
    for row in rows:
        assert row["bytes_up"] <= K * up
        assert row["bytes_down"] <= K * down
        assert 40 * row["bytes_up"] < floats[0]["bytes_up"]
    assert rows[4]["bytes_up"] < rows[0]["bytes_up"]
    assert rows[4]["bytes_down"] < rows[1]["bytes_down"]


def test_the_server_learns_and_clients_distil_it_from_the_same_start() -> None:
    """In one batch on the public set alone, whoever distils the same comes out the same."""
    keys: dict[str, Any] = {"num_clients": 5, "fraction_train": 0.6, "num_server_rounds": 5}
    keys |= {"partition": "dirichlet", "partition_alpha": 0.1, "learning_rate": 0.05}
    experiment = tiny_with_server(alpha=1.0, batch_size=64, **keys)
    rows = federate(experiment, strategy=CFD()).rows
    assert rows[0]["server_accuracy"] is not None
    for row in rows[1:]:
        assert len(set(row["client_accuracy_after_digest"])) == 1
        assert len(set(row["client_accuracy_after_revisit"])) > 1
