"""Whatever clients send, the round is that of those who sent nothing wrong.

Honest replies of small federations, spoilt in every way of `fuzzing` and in ways that are drawn. What a
round must come to is asked of a federation in which the bad clients are silent: its record, and every
byte of the next round's messages, from which all that the server remembers follows.
"""

from __future__ import annotations

import math
import os
import re
import tracemalloc
from collections.abc import Callable, Iterable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from functools import cache
from random import Random
from typing import Any

import fuzzing
import numpy as np
import pytest
from federation_tools import Clients, Finished, federate, open_federation, tiny
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from fuzzing import CASES, Numbers, cases_for, failed, with_arrays, with_content
from hypothesis import given, settings
from hypothesis import strategies as st
from sampling import one_in

from fedkd.clients.instructions import Instruction
from fedkd.data.federated import federated_data
from fedkd.errors import FedkdError
from fedkd.experiment import Experiment
from fedkd.federation.events import Events
from fedkd.federation.exchange import REFUSED
from fedkd.federation.flower_internals.local_grid import FIRST_NODE_ID, LocalGrid, task_identity
from fedkd.federation.flower_internals.replies import error_reply
from fedkd.federation.messages import decode_experiment, decode_instruction, decode_introduction
from fedkd.federation.rounds import Federation
from fedkd.records import Row
from fedkd.registry import strategy_of
from fedkd.testing.bench import same

P, C, K, QUORUM = 13, 7, 5, 3
ROUND = 2
"""The round whose replies are spoilt: clients have states, and references for what changed."""

KINDS: dict[str, dict[str, Any]] = {
    "logits": {"strategy": "FedMD", "public_per_round": 11},
    "probabilities": {"strategy": "DSFL"},
    "float16 logits": {"strategy": "FedMD", "codec": "float16", "public_per_round": 11},
    "float16": {"strategy": "DSFL", "codec": "float16"},
    "deflate": {"strategy": "FedMD", "codec": "changed+deflate"},
    "simplex:8": {"strategy": "DSFL", "codec": "simplex:8", "public_per_round": 11},
    "simplex:1 changed": {"strategy": "DSFL", "codec": "simplex:1+changed"},
    "simplex:4 bits": {"strategy": "DSFL", "codec": "simplex:4+bits"},
    "simplex:2 deflate": {"strategy": "DSFL", "codec": "simplex:2+changed+deflate"},
    "simplex:1 range": {"strategy": "DSFL", "codec": "simplex:1+range"},
    "simplex:8 range": {"strategy": "FedMD", "codec": "simplex:8+changed+range"},
    "means of probabilities": {"strategy": "FD"},
    "means of features": {"strategy": "FedProto"},
    "weights": {"strategy": "FedAvg"},
    "none": {"strategy": "LocalOnly"},
}
FEW = "few asked"
FEW_ASKED = {FEW: {"strategy": "DSFL", "fraction_train": 0.6}}

EACH, FLIPPED, DRAWN, MAIL, CLOSED, HELLOS, ORDERS = 400, 100, 500, 500, 200, 500, 1000
"""Cases of each test, of which `make test` tries an eighth and `make test-slow` all."""

SEEDS = st.integers(0, 2**32 - 1)

TIMES = int(os.environ.get("FEDKD_FUZZ_TIMES", "1"))
"""How many times as many cases are tried, then with other seeds at every run."""


Tries = Callable[[int], int]


@pytest.fixture(
    params=[
        pytest.param(8, id="an eighth"),
        pytest.param(1, id="all", marks=pytest.mark.slow),
    ]
)
def tries(request: pytest.FixtureRequest) -> Tries:
    """Return how many cases of a number are tried."""
    return lambda count: -(-count // request.param)


def examples(count: int) -> settings:
    return settings(
        max_examples=count * TIMES, deadline=None, derandomize=TIMES == 1, database=None
    )


# --- A federation before its second round ends ---------------------------------------------------


@dataclass
class Waiting:
    """A federation that has sent the messages of a round, and what its clients answer."""

    federation: Federation
    shared: list[object]
    honest: dict[int, Message]
    """What those say that were asked, by their place among them."""
    earlier: dict[int, Message]
    """What they said in the round before."""

    def fork(self) -> Federation:
        """Return a copy of the federation, which goes on by itself."""
        return deepcopy(self.federation, {id(each): each for each in self.shared})


def experiment_of(kind: str) -> Experiment:
    keys = {"student": "mlp-5", "num_clients": K, "num_server_rounds": 3, "quorum": QUORUM}
    data = {"dataset": "fuzzing:seven_classes", "train_size": None, "test_size": None}
    return tiny(**{**keys, **data, "public_size": P, **{**KINDS, **FEW_ASKED}[kind]})


@cache
def waiting(kind: str) -> Waiting:
    experiment = experiment_of(kind)
    clients, events = Clients(experiment), Events()
    grid = LocalGrid(clients.handle, num_clients=K)
    strategy = strategy_of(experiment)
    federation = strategy.open(grid, experiment, events=events)
    earlier: dict[int, Message] = {}
    for number in range(1, ROUND + 1):
        replies = list(grid.send_and_receive(federation.open_round(number)))
        if number < ROUND:
            assert federation.finish_round(replies)["dropped"] == {}
            earlier = dict(enumerate(replies))
    shared = [*shared_by(federation, grid, strategy), events]
    return Waiting(federation, shared, dict(enumerate(replies)), earlier)


def shared_by(federation: Federation, *others: object) -> list[object]:
    """Return what copies of a federation may share."""
    exchange, experiment = federation._exchange, federation._experiment
    assert exchange is not None
    return [*others, exchange.events, experiment, federated_data(experiment)]


@pytest.fixture(autouse=True)
def identity() -> Iterator[None]:
    with task_identity():
        yield


@dataclass
class Outcome:
    """A round's record, and what the server tells its clients in the next."""

    row: Row
    told: list[RecordDict]


def finished(kind: str, replies: Iterable[object]) -> Outcome:
    return ended(waiting(kind).fork(), replies)


def ended(federation: Federation, replies: Iterable[Any]) -> Outcome:
    row = federation.finish_round(replies)
    return Outcome(row, [message.content for message in federation.open_round(ROUND + 1)])


@cache
def without(kind: str, silent: frozenset[int]) -> Outcome:
    """Return the round in which some clients do not answer."""
    honest = waiting(kind).honest
    outcome = finished(kind, [reply for k, reply in honest.items() if k not in silent])
    assert outcome.row["dropped"] == dict.fromkeys(map(str, sorted(silent)), "no reply in time")
    assert outcome.row["accepted"] is (len(honest) - len(silent) >= QUORUM)
    return outcome


MAY_DIFFER = {"dropped", "seconds", "events"} | {
    f"{wire}bytes_up{by}" for wire in ("", "wire_") for by in ("", "_by_client", "_by_tensor")
}


def assert_as_if_silent(kind: str, outcome: Outcome, bad: Iterable[int]) -> None:
    """Check that a round is that in which the bad clients were silent, but for why they do not count."""
    expected = without(kind, frozenset(bad))
    row = outcome.row
    fields = row.keys() - MAY_DIFFER
    assert fields == expected.row.keys() - MAY_DIFFER
    assert {n: row[n] for n in fields} == {n: expected.row[n] for n in fields}
    assert list(row["dropped"]) == list(expected.row["dropped"])
    assert row["seconds"].keys() == expected.row["seconds"].keys()
    assert outcome.told == expected.told
    known = without(kind, frozenset()).row["bytes_up_by_tensor"].keys()
    assert row["bytes_up_by_tensor"].keys() <= {*known, REFUSED}
    assert sum(row["bytes_up_by_tensor"].values()) == row["bytes_up"]
    for reason in row["dropped"].values():
        assert_readable(reason)


INTERNAL = re.compile(r"[A-Z]\w*(Error|Exception|Warning)\b|Traceback|sends a reply that cannot")


def assert_readable(reason: str) -> None:
    """Check that a reason is one short line, without a word of Python's."""
    assert 0 < len(reason) <= 200
    assert reason.isprintable()
    assert not INTERNAL.search(reason), reason


def shuffled(replies: list[Any], seed: int) -> list[Any]:
    Random(seed).shuffle(replies)
    return replies


# --- Spoilt in ways that are known ---------------------------------------------------------------


def bad_clients(names: list[str]) -> st.SearchStrategy[dict[int, tuple[str, int]]]:
    """Draw up to all clients, each with a way to spoil its reply and a seed for it."""
    how = st.tuples(st.sampled_from(names), SEEDS)
    return st.dictionaries(st.integers(0, K - 1), how, min_size=1, max_size=K)


@cache
def names_of(kind: str, client: int) -> frozenset[str]:
    return frozenset(cases_for(waiting(kind).honest[client].content))


def spoilt(reply: Message, name: str, seed: int) -> Message:
    return with_content(reply, CASES[name].spoil(reply.content, Random(seed)))


@pytest.mark.parametrize("kind", one_in(16, KINDS))
def test_a_spoilt_reply_costs_its_client_the_round_and_nobody_else_anything(
    kind: str, tries: Tries
) -> None:
    honest, seen = waiting(kind).honest, list[str]()

    @examples(tries(EACH))
    @given(drawn=bad_clients(sorted(names_of(kind, 0))), instruction=SEEDS)
    def check(drawn: dict[int, tuple[str, int]], instruction: int) -> None:
        bad = {k: how for k, how in drawn.items() if how[0] in names_of(kind, k)}
        replies = {**honest, **{k: spoilt(honest[k], *how) for k, how in bad.items()}}
        outcome = finished(kind, shuffled([*replies.values()], instruction))
        assert_as_if_silent(kind, outcome, bad)
        for client, (name, _) in bad.items():
            reason = outcome.row["dropped"][str(client)]
            assert re.search(CASES[name].reason, reason), (name, reason)
        seen.extend(name for name, _ in bad.values())

    for client in honest:
        for name in sorted(names_of(kind, client) - set(seen)):  # every way at least once
            check.hypothesis.inner_test({client: (name, client)}, client)  # type: ignore[attr-defined]
    check()
    print(f"{len(seen)} spoilt replies")
    assert len(seen) >= tries(EACH)


def test_there_are_ten_thousand_cases() -> None:
    """As each test sees to it that its share of them was tried."""
    assert len(KINDS) * (EACH + FLIPPED) + 2 * DRAWN + MAIL + CLOSED + HELLOS + ORDERS >= 10_000


BOMBS = [
    ("simplex:2 deflate", "bomb"),
    ("probabilities", "shape-of-terabytes"),
    ("deflate", "bomb"),
    ("simplex:1 range", "bomb"),
    ("simplex:4 bits", "bomb"),
]


@pytest.mark.parametrize(("kind", "name"), one_in(5, BOMBS))
def test_what_promises_gigabytes_takes_next_to_no_memory(kind: str, name: str) -> None:
    """A bomb of 97 kB inflates to 100 MB; a header of 128 bytes promises up to 10^36."""
    honest = waiting(kind).honest
    replies = [{**honest, 1: spoilt(honest[1], name, seed)} for seed in range(29)]
    federations = [waiting(kind).fork() for _ in replies]
    tracemalloc.start()
    try:
        for federation, sent in zip(federations, replies, strict=True):
            row = federation.finish_round(sent.values())
            assert list(row["dropped"]) == ["1"]
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 10_000_000


# --- Arrays that are drawn, some of which are sound ----------------------------------------------

SCALES = (0.0, 1e-3, 1.0, 1e4, 1e30, 3e38)
OFF = (0.0, 0.0, 5e-4, -5e-4, 2e-3, -2e-3, 0.5)


def drawn_array(random: Random, shape: tuple[int, int], is_probability: bool) -> Numbers:
    """Return an array that is often of the right type and shape, and often sound."""
    if random.random() < 0.2:
        shape = random.choice([(shape[0] - 1, C), (shape[0], C + 1), (C, shape[0]), (0, C)])
    values = np.random.default_rng(random.randrange(2**32)).standard_normal(shape)
    if is_probability:
        values = np.exp(values) / np.exp(values).sum(-1, keepdims=True)
        values *= 1 + random.choice(OFF)
    else:
        values = np.clip(values, -1, 1) * random.choice(SCALES)
    if values.size and random.random() < 0.3:
        spoil = random.choice([math.nan, math.inf, -math.inf, -0.1, 0.0, -1e-30])
        values.reshape(-1)[random.randrange(values.size)] = spoil
    with np.errstate(all="ignore"):
        return values.astype(
            random.choice(["float32"] * 6 + ["float64", "float16", ">f4", "int32"])
        )


def is_sound(values: Numbers, shape: tuple[int, int], is_probability: bool) -> bool:
    """Decide without the server's code."""
    if values.dtype != np.dtype("<f4") or values.shape != shape or not np.isfinite(values).all():
        return False
    exact = values.astype(np.float64)
    return not is_probability or bool((exact >= 0).all() and (abs(exact.sum(-1) - 1) < 1e-3).all())


@pytest.mark.parametrize("kind", one_in(2, ["logits", "probabilities"]))
def test_an_array_counts_exactly_if_it_is_sound(kind: str, tries: Tries) -> None:
    honest, is_probability = waiting(kind).honest, kind == "probabilities"
    original = {k: fuzzing.arrays_of(reply.content)["values"] for k, reply in honest.items()}
    shape = (11 if kind == "logits" else P, C)
    counted = {True: 0, False: 0}

    @examples(tries(DRAWN))
    @given(client=st.integers(0, K - 1), seed=SEEDS)
    def check(client: int, seed: int) -> None:
        values = drawn_array(Random(seed), shape, is_probability)
        content = with_arrays(honest[client].content, {"values": Array(values)})
        replies = {**honest, client: with_content(honest[client], content)}
        outcome = finished(kind, replies.values())
        sound = is_sound(values, shape, is_probability)
        counted[sound] += 1
        if not sound:
            assert_as_if_silent(kind, outcome, [client])
            return
        assert outcome.row["dropped"] == {}
        stacked = np.stack([*{**original, client: values}.values()]).astype(np.float64)
        expected = stacked.mean(0)
        if is_probability:  # entropy reduction at temperature 0.1
            powers = np.exp(expected / 0.1 - (expected / 0.1).max(-1, keepdims=True))
            expected = powers / powers.sum(-1, keepdims=True)
        told = outcome.told[0].array_records["knowledge"]["values"].numpy()
        np.testing.assert_allclose(told, expected, rtol=1e-5, atol=1e-6)

    check()
    print(f"{counted[True]} sound arrays, {counted[False]} refused")
    assert min(counted.values()) > tries(DRAWN) / 8


@pytest.mark.parametrize("kind", KINDS)
def test_flipped_bytes_are_refused_or_make_another_sound_array(kind: str, tries: Tries) -> None:
    """What is accepted NumPy reads as well, and it leads to knowledge that is finite."""
    honest, tried = waiting(kind).honest, list[int]()

    @examples(tries(FLIPPED))
    @given(client=st.integers(0, K - 1), seed=SEEDS)
    def check(client: int, seed: int) -> None:
        tried.append(seed)
        reply, random = honest[client], Random(seed)
        if "knowledge" not in reply.content:
            return
        record = reply.content.array_records["knowledge"]
        name = random.choice([*record])
        data = bytearray(record[name].data)
        for _ in range(random.choice([1, 1, 2, 9])):
            data[random.randrange(len(data))] ^= 1 << random.randrange(8)
        old = record[name]
        flipped = Array(old.dtype, old.shape, old.stype, bytes(data))
        content = with_arrays(reply.content, {name: flipped})
        outcome = finished(kind, {**honest, client: with_content(reply, content)}.values())
        if outcome.row["dropped"]:
            assert_as_if_silent(kind, outcome, [client])
            return
        read = flipped.numpy()
        assert (read.dtype, read.shape) == (np.dtype(old.dtype), old.shape)
        for told in outcome.told:
            arrays = fuzzing.arrays_of(told) if "knowledge" in told else {}
            assert all(np.isfinite(array).all() for array in arrays.values())

    check()
    assert len(tried) >= tries(FLIPPED)


# --- Who replies, how often, and to what ---------------------------------------------------------

ACTS: dict[str, str] = {
    "twice": "replied twice",
    "twice, badly first": ".",
    "twice, badly then": "replied twice",
    "five times": "replied twice",
    "fails": "^out of luck$",
    "fails in colour": r"^red .*title left \[/bold\]$",
    "fails at length": "x{199}…",
    "fails without words": "without a reason",
    "fails unprintably": "^nothing that can be shown$",
    "replays the round before": "replies to round 1 in round 2",
    "is late": "replies to the message of round '1'",
    "says nothing": "sends an empty reply",
    "is silent": "no reply in time",
}
SOUND = "answers late besides"
"""A reply to the round before comes beside the one to this: nothing is wrong with that."""


def of_round(reply: Message, group: str) -> Message:
    """Return a reply to a message of another round."""
    other = with_content(reply, reply.content)
    other.metadata.group_id = group
    return other


def act(name: str, client: int, kind: str, seed: int) -> list[Message]:
    """Return what comes from a client that does not do what it should."""
    good, before = waiting(kind).honest[client], waiting(kind).earlier[client]
    bad = spoilt(good, "nothing", seed)
    empty = with_content(good, RecordDict())
    empty.__dict__["_content"] = None
    acts = {
        "twice": [good, good],
        "twice, badly first": [bad, good],
        "twice, badly then": [good, bad],
        "five times": [good] * 5,
        "fails": [failed(good, "out of luck")],
        "fails in colour": [failed(good, fuzzing.ESCAPES)],
        "fails at length": [failed(good, fuzzing.LONG)],
        "fails without words": [failed(good, "")],
        "fails unprintably": [failed(good, "\x07\x00\u202e")],
        "replays the round before": [with_content(good, before.content)],
        "is late": [before],
        "says nothing": [empty],
        "is silent": [],
        SOUND: [before, good],
    }
    return acts[name]


def stray(random: Random, reply: Message) -> object:
    """Return something that comes from nobody we know."""
    stranger = with_content(reply, reply.content)
    stranger.metadata.__dict__["_src_node_id"] = random.choice([0, 999, -1, 2**63, None, "1001"])
    return random.choice([None, 7, "reply", b"", RecordDict(), [], stranger, stranger, stranger])


def test_who_replies_out_of_turn_is_out_of_the_round(tries: Tries) -> None:
    acts, tried = [*ACTS, SOUND], list[str]()

    @examples(tries(MAIL))
    @given(
        kind=st.sampled_from(
            ["logits", "deflate", "simplex:1 changed", "means of features", "weights"]
        ),
        drawn=st.dictionaries(st.integers(0, K - 1), st.sampled_from(acts), max_size=K),
        strays=st.integers(0, 3),
        seed=SEEDS,
    )
    def check(kind: str, drawn: dict[int, str], strays: int, seed: int) -> None:
        honest, random = waiting(kind).honest, Random(seed)
        parts: list[list[object]] = [[stray(random, honest[0])] for _ in range(strays)]
        for client, reply in honest.items():
            name = drawn.get(client)
            parts.append([*act(name, client, kind, seed)] if name else [reply])
        random.shuffle(parts)
        federation = waiting(kind).fork()
        exchange = federation._exchange
        assert exchange is not None
        outcome = ended(federation, [reply for part in parts for reply in part])
        bad = {client: name for client, name in drawn.items() if name != SOUND}
        assert_as_if_silent(kind, outcome, bad)
        for client, name in bad.items():
            assert re.search(ACTS[name], outcome.row["dropped"][str(client)]), (name, outcome.row)
        counted = [outcome.row["events"], exchange.events.take()]
        assert sum(events.get("stray-reply", 0) for events in counted) == strays
        tried.extend(drawn.values())

    checked: Any = check
    for seed, name in enumerate(acts):  # each once, however few are drawn
        checked.hypothesis.inner_test("logits", {seed % K: name}, 0, seed)
    check()
    print(f"{len(tried)} clients out of turn")
    assert set(tried) == set(acts)


def test_a_client_that_was_not_asked_is_named_and_changes_nothing() -> None:
    kind = FEW
    honest = waiting(kind).honest
    sampled = waiting(kind).federation.rows[-1]["sampled"]
    federation = waiting(kind).fork()
    exchange = federation._exchange
    assert exchange is not None
    assert len(exchange.sampled) == len(sampled) == len(honest) == QUORUM
    (uninvited, _) = sorted(set(range(K)) - set(exchange.sampled))
    reply = with_content(honest[0], honest[0].content)
    reply.metadata.__dict__["_src_node_id"] = FIRST_NODE_ID + uninvited
    outcome = ended(federation, [reply, *honest.values(), reply])
    expected = without(kind, frozenset())
    assert outcome.row["dropped"] == {str(uninvited): "replies without having been asked"}
    assert outcome.row["answered"] == expected.row["answered"] == exchange.sampled
    assert outcome.told == expected.told


# --- The closing exchange ------------------------------------------------------------------------


@cache
def closing() -> Waiting:
    """Return a federation at its end, with the clients' last replies."""
    experiment = experiment_of("probabilities").replace(num_server_rounds=1, quorum=1)
    clients, events = Clients(experiment), Events()
    grid, strategy = LocalGrid(clients.handle, num_clients=K), strategy_of(experiment)
    federation = strategy.open(grid, experiment, events=events)
    federation.finish_round(grid.send_and_receive(federation.open_round(1)))
    honest = dict(enumerate(grid.send_and_receive(federation.open_closing())))
    return Waiting(federation, [*shared_by(federation, grid, strategy), events], honest, {})


def test_a_spoilt_last_reply_leaves_the_result_to_the_others(tries: Tries) -> None:
    honest, tried = closing().honest, list[str]()
    names = sorted(cases_for(honest[0].content))
    plain = closing().fork().close(honest.values(), 0.0)
    assert plain["dropped"] == {}

    @examples(tries(CLOSED))
    @given(bad=bad_clients(names))
    def check(bad: dict[int, tuple[str, int]]) -> None:
        replies = {**honest, **{k: spoilt(honest[k], *how) for k, how in bad.items()}}
        tried.extend(name for name, _ in bad.values())
        if len(bad) == K:
            with pytest.raises(FedkdError, match="no client answered the closing exchange"):
                closing().fork().close(replies.values(), 0.0)
            return
        result = closing().fork().close(replies.values(), 0.0)
        assert list(result["dropped"]) == [str(k) for k in sorted(bad)]
        for client, (name, _) in bad.items():
            assert re.search(CASES[name].reason, result["dropped"][str(client)])
            assert_readable(result["dropped"][str(client)])
        for which in ("client_accuracy", "client_own_accuracy", "client_training_accuracy"):
            assert result[which] == [None if k in bad else plain[which][k] for k in range(K)]

    for name in names:  # every way at least once
        check.hypothesis.inner_test({0: (name, 0)})  # type: ignore[attr-defined]
    check()
    assert set(tried) == set(names)


# --- A whole run ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["logits", "simplex:1 changed", "means of features", "weights"])
def test_a_run_with_a_bad_client_is_that_with_a_silent_one(kind: str) -> None:
    """Also in the rounds after: what is remembered of the others stays right."""
    experiment = experiment_of(kind).replace(num_server_rounds=5)

    def badly(instruction: Instruction, message: Message, reply: Message) -> Message:
        if instruction.client != 1 or instruction.round in (1, 4):
            return reply
        names = sorted(cases_for(reply.content))
        return spoilt(reply, Random(instruction.round).choice(names), instruction.round)

    def silently(instruction: Instruction, message: Message, reply: Message) -> Message | None:
        return None if instruction.client == 1 and instruction.round not in (1, 4) else reply

    bad, silent = federate(experiment, badly), federate(experiment, silently)
    assert [list(row["dropped"]) for row in bad.rows] == [[], ["1"], ["1"], [], ["1"]]
    for row, expected in zip(bad.rows, silent.rows, strict=True):
        fields = expected.keys() - MAY_DIFFER
        assert {n: row[n] for n in fields} == {n: expected[n] for n in fields}
    assert bad.exchanges[-1].instructions.keys() == silent.exchanges[-1].instructions.keys()
    for here, there in zip(bad.exchanges, silent.exchanges, strict=True):
        assert {k: o.base for k, o in here.instructions.items()} == {
            k: o.base for k, o in there.instructions.items()
        }
    ours, theirs = (last_told(done) for done in (bad, silent))
    assert ours.keys() == theirs.keys()
    assert all(same(vars(ours[k]), vars(theirs[k])) for k in ours)


def last_told(done: Finished) -> dict[int, Any]:
    """Return what the closing exchange told each client, decoded or as it was packed."""
    return {
        client: instruction.knowledge
        for client, instruction in done.exchanges[-1].instructions.items()
    }


# --- Strangers who introduce themselves ----------------------------------------------------------


def junk(random: Random) -> Any:
    """Return something that a record may hold."""
    return random.choice(
        [
            0, -1, 3, 2**62, 1.5, math.nan, True, "", "a", "none", fuzzing.ESCAPES, b"", b"\x00\xff",
            [], [1, 2], [1.0, math.inf], ["a", ""], [True], fuzzing.LONG, "module:function", "9" * 5000,
        ]
    )  # fmt: skip


def test_a_hello_that_is_none_is_an_error_of_one_line(tries: Tries) -> None:
    said = {"client": 3, "num_examples": 41, "student": "mlp-5", "sources": "00ff"}
    tried = {True: 0, False: 0}

    @examples(tries(HELLOS))
    @given(seed=SEEDS)
    def check(seed: int) -> None:
        random = Random(seed)
        fields = {**said, random.choice([*said, "more"]): junk(random)}
        if random.random() < 0.3:
            del fields[random.choice([*said])]
        full = {"num_examples": 41, **fields}  # which a node may withhold
        sound = {name: type(value) for name, value in full.items()} == {
            name: type(value) for name, value in said.items()
        }
        tried[sound] += 1
        records = RecordDict({"introduction": ConfigRecord(fields)})
        if sound:
            assert vars(decode_introduction(records)) == {"num_examples": None, **fields}
            return
        with pytest.raises(FedkdError, match="sends no introduction") as caught:
            decode_introduction(records)
        assert len(str(caught.value)) < 300

    check()
    assert min(tried.values()) > tries(HELLOS) / 50


def test_a_stranger_cannot_end_a_federation_that_is_under_way(tries: Tries) -> None:
    """Nor one that begins: a wrong claim only costs who makes it."""
    experiment = experiment_of("probabilities")
    speech: list[Callable[[Message, RecordDict], Message]] = []
    refused = {True: 0, False: 0}

    def say(client: int, message: Message, reply: Message) -> Message:
        return speech[-1](message, reply.content) if client == 4 else reply

    clients = Clients(experiment, meddle_hello=say)

    @examples(tries(HELLOS))
    @given(seed=SEEDS, is_first=st.booleans())
    def check(seed: int, is_first: bool) -> None:
        federation = open_federation(experiment, clients)
        if not is_first:
            speech.append(lambda message, _: error_reply(message, "not yet"))
            federation.roster.complete()
        speech.append(lambda message, honest: claim(message, honest, Random(seed)))
        federation.roster.complete()
        refused[is_first] += 1
        messages = federation.open_round(1)
        assert [order_of(message)["client"] for message in messages] == [0, 1, 2, 3]
        row = federation.finish_round([])
        assert row["dropped"]["4"].startswith("never introduced itself (")
        assert_readable(row["dropped"]["4"])

    check()
    assert min(refused.values()) > tries(HELLOS) / 20


def order_of(message: Message) -> ConfigRecord:
    return message.content.config_records["instruction"]


def claim(message: Message, honest: RecordDict, random: Random) -> Message:
    """Introduce a client wrongly: as another, with other data, another student or other code."""
    wrong: dict[str, list[Any]] = {
        "client": [0, 3, 5, -1, 2**62, -(2**62), 4.0, "4", True],
        "num_examples": [0, -1, 29, 2**62, 30.0],
        "student": ["mlp-6", "", "os:abort", fuzzing.LONG, fuzzing.ESCAPES, 5],
        "sources": ["", "00ff", fuzzing.LONG, fuzzing.ESCAPES, 5],
        "more": [1],
    }
    said = dict(honest.config_records["introduction"])
    name = random.choice([*wrong])
    said[name] = random.choice([value for value in wrong[name] if value != said.get(name)])
    return Message(RecordDict({"introduction": ConfigRecord(said)}), reply_to=message)


def test_a_node_that_says_nonsense_at_first_ends_nothing_but_its_own_part() -> None:
    """Nonsense is no introduction; a claim that can be read is for `Roster.complete` to judge."""
    experiment = experiment_of("probabilities").replace(num_server_rounds=1)
    for spoil in (
        lambda message: Message(RecordDict(), reply_to=message),
        lambda message: Message(RecordDict({"introduction": MetricRecord()}), reply_to=message),
        lambda message: error_reply(message, fuzzing.ESCAPES),
        lambda message: error_reply(message, fuzzing.LONG),
    ):

        def say(client: int, message: Message, reply: Message, spoil: Any = spoil) -> Message:
            return spoil(message) if client == 4 else reply

        (row,) = federate(experiment, meddle_hello=say).rows
        assert row["answered"] == [0, 1, 2, 3]
        assert row["dropped"]["4"].startswith("never introduced itself (")
        assert_readable(row["dropped"]["4"])


# --- The other direction: what a client makes of a server's message ------------------------------


def what_is_wrong(work: Callable[[], object]) -> str | None:
    """Return what fedkd says is wrong; any other exception is the test's failure."""
    try:
        work()
    except FedkdError as error:
        return str(error)
    return None


@cache
def instructions() -> dict[str, list[RecordDict]]:
    return {kind: without(kind, frozenset()).told for kind in KINDS}


def spoilt_order(instruction: RecordDict, random: Random) -> RecordDict:
    """Return an order of which something is not as it should be."""
    names = [
        n
        for n, case in CASES.items()
        if case.needs != "any" and fuzzing.fits(case.needs, instruction)
    ]
    what = random.choice(["instruction", "record", "request", "knowledge", "knowledge"])
    if what == "knowledge" and names:
        return CASES[random.choice(names)].spoil(instruction, random)
    if what == "record":
        name = random.choice([*instruction])
        others = [None, ArrayRecord(), ConfigRecord(), MetricRecord({"a": 1})]
        return fuzzing.with_records(instruction, **{name: random.choice(others)})
    if what == "request":
        values = np.arange(17, dtype=random.choice(["i4", "i8", "u1", "f4"])) - random.randrange(3)
        return fuzzing.with_records(instruction, request=ArrayRecord({"samples": Array(values)}))
    said = dict(instruction.config_records["instruction"])
    said[random.choice([*said])] = random.choice([junk(random), phases_of_junk(random)])
    return fuzzing.with_records(instruction, instruction=ConfigRecord(said))


def phases_of_junk(random: Random) -> str:
    """Return a text in the place of an instruction's phases."""
    phase = random.choice(["Fit", "Predict", "Load", "Apply", "MeanByClass", "Dream", "", "Reset"])
    field = random.choice(
        ["name", "public", "private", "epochs", "numbers", "space", "model", "procedure"]
    )
    value = random.choice(
        ["1", "-1", "null", "{}", '{"kl": 1e999}', '{"kl": NaN}', '"x"', "[[]]", '{"os:abort": 1}']
    )
    text = f'[{{"phase": "{phase}", "{field}": {value}}}]'
    return random.choice([text, text[:-2], "[" * 5000, "{}", "null", f"[{text}]", text * 2])


def test_an_order_that_is_none_is_an_error_of_one_line(tries: Tries) -> None:
    tried = {True: 0, False: 0}
    sizes = federated_data(experiment_of("logits")).sizes

    @examples(tries(ORDERS))
    @given(kind=st.sampled_from([*KINDS]), seed=SEEDS)
    def check(kind: str, seed: int) -> None:
        random = Random(seed)
        instruction = spoilt_order(random.choice(instructions()[kind]), random)
        said = what_is_wrong(lambda: decode_instruction(instruction, sizes, num_examples=30))
        tried[said is None] += 1  # sound by chance, or for the strategy's code to refuse
        assert said is None or "\n" not in said

    check()
    assert tried[False] > tries(ORDERS) / 2


def test_an_experiment_that_is_none_is_an_error_of_one_line(tries: Tries) -> None:
    keys = dict(experiment_of("logits").flat())
    tried = {True: 0, False: 0}

    @examples(tries(ORDERS))
    @given(seed=SEEDS)
    def check(seed: int) -> None:
        random = Random(seed)
        changed = {**keys, random.choice([*keys, *keys, "more", ""]): junk(random)}
        records = RecordDict({"experiment": ConfigRecord(changed)})
        said = what_is_wrong(lambda: decode_experiment(records))
        tried[said is None] += 1
        assert said is None or "\n" not in said

    check()
    assert tried[False] > tries(ORDERS) / 2
