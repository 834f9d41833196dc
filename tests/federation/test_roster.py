"""Who introduces itself, late, wrongly or not at all, and what that ends."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import federation_tools
import pytest
import torch
from exchanges import BAD, HONEST, assert_knowledge, first_array
from federation_tools import (
    Clients,
    Finished,
    Meddle,
    MeddleHello,
    federate,
    reply_with,
    tiny,
    with_config,
    with_metrics,
)
from flwr.app import ConfigRecord, Message, RecordDict

from fedkd.clients.instructions import Instruction
from fedkd.errors import FedkdError
from fedkd.federation.flower_internals.local_grid import LocalGrid, task_identity
from fedkd.federation.flower_internals.replies import error_reply
from fedkd.registry import find


def introducing(**changes: Any) -> MeddleHello:
    """Return a meddler with what partition 1 says of itself."""

    def meddle(client: int, message: Message, reply: Message) -> Message:
        if client != BAD:
            return reply
        return reply_with(message, with_config(reply.content, "introduction", **changes))

    return meddle


LIES = [
    ({"client": 0}, "nodes 1000 and 1001 both hold partition 0"),
    ({"client": 3}, "partition 3.*0 to 2"),
    ({"client": -1}, "partition -1.*0 to 2"),
    ({"client": 2**62}, f"partition {2**62}"),
    ({"sources": "0123"}, "client 1 runs other code"),
    ({"num_examples": 0}, "num-examples = 0"),
    ({"student": "\x1b[2J\x07\u202emlp"}, r"another student, \ufffd\[2J\ufffd\ufffdmlp"),
    ({"student": "os:abort"}, "another student"),
    ({"client": 1.0}, "sends no introduction"),
]


@pytest.mark.parametrize(("changes", "reason"), LIES)
def test_one_lying_hello_leaves_out_its_own_node_alone(
    changes: dict[str, Any], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    done = federate(tiny(num_server_rounds=2), meddle_hello=introducing(**changes))
    for row in done.rows:
        assert row["answered"] == HONEST
        assert re.search(reason, row["dropped"][str(BAD)])
    assert any(re.search(reason, message) for message in caplog.messages)
    said = [*caplog.messages, *(text for row in done.rows for text in row["dropped"].values())]
    assert all(map(str.isprintable, said))


def test_who_claims_anothers_partition_after_its_own_holds_one_alone() -> None:
    """A node is heard once: a second reply of the same node enrols it nowhere else."""

    class Twice(LocalGrid):
        def send_and_receive(self, messages: Any, *, timeout: float | None = None) -> Any:
            for reply in super().send_and_receive(messages, timeout=timeout):
                yield reply
                if "introduction" in reply.content and reply.metadata.src_node_id == 1001:
                    other = with_config(reply.content, "introduction", client=2)
                    (asked,) = (m for m in messages if m.metadata.dst_node_id == 1001)
                    yield reply_with(asked, other)

    done = federate(tiny(), grid=Twice)
    assert done.rows[0]["answered"] == [0, 1, 2]


@pytest.mark.parametrize("quorum", [1, 3])
def test_a_federation_without_a_quorum_that_fits_together_does_not_begin(quorum: int) -> None:
    def stale(client: int, message: Message, reply: Message) -> Message:
        if quorum == 3 and client != BAD:
            return reply
        return reply_with(message, with_config(reply.content, "introduction", sources="0123"))

    with pytest.raises(FedkdError, match=rf"quorum = {quorum}: .* runs other code"):
        federate(tiny(quorum=quorum), meddle_hello=stale)


@pytest.mark.parametrize("changes", [{"client": 0}, {"client": 3}, {"sources": "0123"}])
def test_nobody_who_comes_late_ends_the_run(changes: dict[str, Any]) -> None:
    late = introducing(**changes)
    said: list[int] = []

    def meddle(client: int, message: Message, reply: Message) -> Message | None:
        said.append(client)
        if client == BAD and said.count(BAD) == 1:
            return None
        return late(client, message, reply)

    federation = federate(tiny(num_server_rounds=2), meddle_hello=meddle)
    for row in federation.rows:
        assert row["answered"] == [0, 2]
    assert re.search(
        r"never introduced itself \(.*(both hold|partition 3|other code)", str(federation.rows[1])
    )


def test_too_few_nodes_are_named_with_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedkd.federation.roster.HELLO_TIMEOUT", 0.2)
    clients = Clients(tiny())
    with task_identity():
        federation = find("DSFL").open(LocalGrid(clients.handle, num_clients=2), tiny())
        with pytest.raises(FedkdError, match="num-clients = 3: only 2"):
            federation.run()


@pytest.mark.parametrize("kind", ["silent", "failed"])
def test_a_client_that_does_not_introduce_itself_can_do_so_later(kind: str) -> None:
    said: list[int] = []

    def shy(client: int, message: Message, reply: Message) -> Message | None:
        said.append(client)
        if client != BAD or said.count(BAD) > 1:
            return reply
        return None if kind == "silent" else error_reply(message, "FedkdError: no data here")

    done = federate(tiny(strategy="DSFL", num_server_rounds=2), meddle_hello=shy)
    first, second = done.rows
    assert first["answered"] == [0, 2]
    assert list(first["dropped"]) == ["1"]
    if kind == "failed":
        assert "no data here" in first["dropped"]["1"]
    assert second["answered"] == [0, 1, 2]
    assert second["dropped"] == {}


@pytest.mark.parametrize(
    "change",
    [
        lambda content: RecordDict(),
        lambda content: RecordDict({"introduction": ConfigRecord({"client": 1})}),
        lambda content: with_config(content, "introduction", client="1"),
        lambda content: with_config(content, "introduction", num_examples="38"),
        lambda content: with_config(content, "introduction", student=8),
    ],
    ids=["nothing", "little", "client", "examples", "student"],
)
def test_an_introduction_that_cannot_be_read_never_becomes_a_crash(
    change: Callable[[RecordDict], RecordDict],
) -> None:
    """The client is dropped, or the run refused in one line before its first round."""

    def mumble(client: int, message: Message, reply: Message) -> Message:
        return reply_with(message, change(reply.content)) if client == BAD else reply

    outcome = attempt(None, mumble)
    if isinstance(outcome, Finished):
        assert outcome.rows[0]["answered"] == HONEST
    else:
        assert "introduction" in str(outcome)


def attempt(meddle: Meddle | None, meddle_hello: MeddleHello) -> Finished | FedkdError:
    """Run FedAvg, unless it is refused."""
    try:
        return federate(tiny(strategy="FedAvg"), meddle, meddle_hello=meddle_hello)
    except FedkdError as error:
        return error


@pytest.mark.parametrize("claimed", [-39, 0, 10**12])
def test_nobody_can_claim_other_data_than_its_partition_has(claimed: int) -> None:
    """Consistently, from the introduction on: FedAvg weighs by it."""

    def nine(instruction: Instruction, message: Message, reply: Message) -> Message:
        if instruction.client != BAD or instruction.round != 1:
            return reply
        loud = first_array(reply.content, lambda values: torch.full_like(values, 9.0))
        return reply_with(message, with_metrics(loud, num__examples=claimed))

    outcome = attempt(nine, introducing(num_examples=claimed))
    if isinstance(outcome, Finished):
        assert outcome.rows[0]["answered"] == HONEST
        honest = outcome.exchanges[0].answers(HONEST)
        assert_knowledge(outcome.knowledge, find("FedAvg").aggregate(honest))
    else:
        assert str(claimed) in str(outcome)


def test_a_client_cannot_name_code_that_the_server_runs() -> None:
    """The server knows which student a partition has; a client's word for it may be any function."""
    federation_tools.CALLED.clear()

    def renamed(instruction: Instruction, message: Message, reply: Message) -> Message:
        if instruction.client != BAD or instruction.round != 1:
            return reply
        other = with_config(reply.content, "knowledge-kind", model="federation_tools:bomb")
        return reply_with(message, other)

    outcome = attempt(renamed, introducing(student="federation_tools:bomb"))
    if isinstance(outcome, Finished):
        assert outcome.rows[0]["answered"] == HONEST
    assert federation_tools.CALLED == []
