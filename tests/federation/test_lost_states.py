"""A client that loses what it kept fails, and begins once more like one that joins late."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from damaging import change, lose
from exchanges import BAD, HONEST, K
from federation_tools import ROUGH, Clients, Exchange, Finished, Meddle, open_federation, tiny
from flwr.app import Message
from sampling import one_in

from fedkd.clients.instructions import Instruction
from fedkd.engines import answering, in_process
from fedkd.experiment import Experiment
from fedkd.federation.checkpoint import Checkpoint
from fedkd.federation.flower_internals.local_grid import task_identity
from fedkd.federation.flower_internals.replies import error_reply
from fedkd.federation.server import Replies, Server
from fedkd.knowledge import SoftLabels
from fedkd.phases import Apply, Digest, LocalClient, Phase, Predict, Revisit, procedure
from fedkd.records import Row
from fedkd.strategy import DistillationStrategy, Facts

HERE = __name__


@procedure
def growing(client: LocalClient) -> None:
    """Digest more samples with every call, of which the client's state keeps the number."""
    calls = client.state["calls"] = client.state.get("calls", torch.tensor(0)) + 1
    if client.received is not None:
        client.received = client.received.keep(client.received.samples < 7 * calls)


class Deaf(DistillationStrategy):
    """Averages what all clients but one say, so that nothing else depends on that one."""

    facts = Facts("none", "P*C*4", "P*C*4")

    def phases(self, round: int) -> list[Phase]:
        if round == 1:
            return [Revisit(), Predict(space="probabilities")]
        return [Apply(f"{HERE}:growing"), Digest(), Revisit(), Predict(space="probabilities")]

    def update(self, replies: Replies, server: Server) -> SoftLabels | None:
        labels = replies.labels
        assert labels is not None
        heard = [row for row, client in enumerate(replies.clients) if client != BAD]
        return SoftLabels.shared(labels.values[heard].mean(0), labels.samples, labels.space)


KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "changes": {"codec": "simplex:2+changed"},
}


def experiment_of(kind: str, rounds: int) -> Experiment:
    return tiny(**KINDS[kind], client_code=HERE, plan="stacked", num_server_rounds=rounds)


def federated(
    experiment: Experiment,
    after: Mapping[int, Callable[[Path], object]] | None = None,
    meddle: Meddle = lambda instruction, message, reply: reply,
) -> Finished:
    """Run a federation in which something happens to the clients' folder after some rounds."""

    def meddling(instruction: Instruction, message: Message, reply: Message) -> Message | None:
        if instruction.client == K - 1 and after and instruction.round in after:
            after[instruction.round](clients.states)
        return meddle(instruction, message, reply)

    with pytest.MonkeyPatch.context() as patch, task_identity():
        patch.setattr(in_process, "store_of", lambda e, _: answering.store_of(e, 0))
        clients = Clients(experiment, meddling)
        federation = open_federation(experiment, clients, Deaf())
        federation.run()
    return Finished(federation.rows, clients.exchanges)


def exact(row: Row, *without: str) -> Row:
    return {name: value for name, value in row.items() if name not in (*ROUGH, *without)}


STATE = "0-0.safetensors"
LOSSES: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "state lost": (
        "plain",
        lambda folder: lose(folder / STATE, BAD),
        "has no state of round 2 to start from",
    ),
    "state damaged": (
        "changes",
        lambda folder: change(folder / STATE, "student/head.weight", BAD, 2),
        "is damaged: what client 1 kept of round 2 is not as it was written",
    ),
    "procedure's state lost": (
        "plain",
        lambda folder: lose(folder / "memory" / "own" / STATE, BAD),
        "its memory of round 2 is missing: ",
    ),
    "what it has sent lost": (
        "changes",
        lambda folder: lose(folder / "memory" / "up" / STATE, BAD),
        "its memory of round 2 is missing: ",
    ),
    "what it has received damaged": (
        "changes",
        lambda folder: change(folder / "memory" / "down" / STATE, "kept/codes", BAD, 2),
        "is damaged: what client 1 kept of round 2 is not as it was written",
    ),
}


@pytest.mark.parametrize("loss", one_in(2, LOSSES))
def test_who_loses_what_it_kept_is_dropped_and_begins_like_one_that_joins_late(loss: str) -> None:
    kind, happens, reason = LOSSES[loss]
    experiment = experiment_of(kind, 5)
    done = federated(experiment, {2: happens})
    assert [list(row["dropped"]) for row in done.rows] == [[], [], ["1"], [], []]
    assert reason in done.rows[2]["dropped"]["1"]
    assert [row["enrolled_again"] for row in done.rows] == [[], [], [BAD], [], []]

    def silent(number: int) -> Meddle:
        return lambda i, _, reply: None if (i.client, i.round) == (BAD, number) else reply

    # Nobody else notices: it is as if its reply to round 3 had been lost.
    other = federated(experiment, meddle=silent(3))
    own = ("dropped", "enrolled_again", "bytes_up", "bytes_up_by_client", "bytes_up_by_tensor")
    for row, same in zip(done.rows[:3], other.rows[:3], strict=True):
        assert exact(row, *own) == exact(same, *own)
    for one, expected in zip(done.exchanges, other.exchanges, strict=True):
        for k in HONEST:
            assert_same_answer(one, expected, k)

    # From then on it is one of whom nothing was ever heard before.
    late = federated(experiment, meddle=lambda i, m, r: None if silent_until(3, i) else r)
    for row, same in zip(done.rows[3:], late.rows[3:], strict=True):
        assert exact(row) == exact(same)
        assert row["answered"] == [0, 1, 2]
    for one, expected in zip(done.exchanges[3:], late.exchanges[3:], strict=True):
        for k in range(K):
            told, same_told = one.instructions[k], expected.instructions[k]
            assert (told.base, told.phases) == (same_told.base, same_told.phases)
            assert_same_answer(one, expected, k)
    assert done.exchanges[3].instructions[BAD].base == 0
    assert done.exchanges[3].instructions[BAD].phases == tuple(Deaf().phases(1))
    assert done.exchanges[4].instructions[BAD].base == 4


def silent_until(last: int, instruction: Instruction) -> bool:
    return instruction.client == BAD and instruction.round <= last


def assert_same_answer(one: Exchange, other: Exchange, client: int) -> None:
    """Compare what a client sent, byte by byte."""
    replies = [each.replies[client] for each in (one, other)]
    contents = [reply.content for reply in replies if reply is not None]
    sent = [
        {n: a.data for n, a in c.array_records["knowledge"].items()} if "knowledge" in c else {}
        for c in contents
    ]
    assert sent[0] == sent[1]
    numbers = [dict(c.metric_records["report"]) for c in contents]
    assert numbers[0].keys() == numbers[1].keys()
    for name in numbers[0]:
        if "accuracy" in name or "loss" in name:
            assert numbers[0][name] == numbers[1][name]


def test_who_loses_it_again_stays_dropped() -> None:
    def lost(folder: Path) -> None:
        lose(folder / STATE, BAD)

    done = federated(experiment_of("plain", 6), {1: lost, 3: lost})
    assert [row["enrolled_again"] for row in done.rows] == [[], [1], [], [], [], []]
    reasons = [row["dropped"].get("1") for row in done.rows]
    again = (
        "has no state of round 3 to start from; it was enrolled again before, so it stays dropped"
    )
    first = "has no state of round 1 to start from"
    assert reasons == [None, first, None, again, again, again]
    assert [row["answered"] == HONEST for row in done.rows] == [r is not None for r in reasons]


def test_all_may_lose_it_at_once() -> None:
    done = federated(experiment_of("changes", 4), {2: lambda folder: (folder / STATE).unlink()})
    assert [row["enrolled_again"] for row in done.rows] == [[], [], [0, 1, 2], []]
    assert [row["accepted"] for row in done.rows] == [True, True, False, True]
    assert done.rows[3]["answered"] == [0, 1, 2]


def test_who_says_so_without_having_had_anything_is_just_dropped() -> None:
    def lying(instruction: Instruction, message: Message, reply: Message) -> Message:
        if instruction.client != BAD:
            return reply
        return error_reply(message, "gone", is_lost=True)

    done = federated(experiment_of("plain", 3), meddle=lying)
    assert [row["dropped"] for row in done.rows] == [{"1": "gone"}] * 3
    assert [row["enrolled_again"] for row in done.rows] == [[]] * 3


def test_a_checkpoint_remembers_who_was_enrolled_again(tmp_path: Path) -> None:
    checkpoint = Checkpoint(base={0: 3, 1: 3}, downlink={1: None}, uplink={1: None}, asked={1: 5})
    assert checkpoint.enrol_again(1)
    checkpoint.save(tmp_path)
    loaded = Checkpoint.load(tmp_path)
    assert (loaded.base, loaded.downlink, loaded.uplink) == ({0: 3}, {}, {})
    assert loaded.asked == {1: 5}
    loaded.base[1] = 5
    assert not loaded.enrol_again(1)
    assert loaded.base == {0: 3, 1: 5}
    assert loaded.enrol_again(0)
