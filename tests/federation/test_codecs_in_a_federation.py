"""Codecs in a federation: what both sides hold stays the same, and every byte is counted."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from federation_tools import C, P, federate, reply_with, tiny, without
from flwr.app import Message

from fedkd.clients.instructions import Instruction
from fedkd.clients.memories import Memories, Memory
from fedkd.errors import FedkdError
from fedkd.federation.flower_internals.replies import error_reply
from fedkd.knowledge import SoftLabels
from fedkd.knowledge.codec import Packed
from fedkd.knowledge.wire import parse_codec
from fedkd.registry import find
from fedkd.strategy import DistillationStrategy

K = 3
BITS = {"simplex:8": 8, "simplex:4": 4, "simplex:2": 2}


def with_codec(codec: str, **keys: Any) -> Any:
    settings: dict[str, Any] = {"strategy": "DSFL", "num_server_rounds": 3, "codec": codec, **keys}
    return tiny(**settings)


def payload(codec: str) -> int:
    """Bytes of P rows of C classes, of all rows and packed plainly, written out."""
    wire, _ = parse_codec(codec)
    if wire.number == "simplex:1":
        return math.ceil(P * math.ceil(math.log2(C)) / 8) if wire.pack == "bits" else P * C
    if wire.number in BITS:
        return math.ceil(P * C * BITS[wire.number] / 8) if wire.pack == "bits" else P * C
    return P * C * {"float32": 4, "float16": 2}[wire.number]


@pytest.mark.parametrize("strategy", ["FedMD", "DSFL"])
@pytest.mark.parametrize(
    "codec",
    ["float32", "float16", "simplex:8", "simplex:4+bits", "simplex:2+bits", "simplex:1+bits"],
)
def test_every_soft_label_strategy_takes_every_codec_and_its_bytes_are_exact(
    strategy: str, codec: str
) -> None:
    done = federate(with_codec(codec, strategy=strategy))
    for row in done.rows:
        assert row["dropped"] == {}
        assert row["bytes_up_by_client"] == [payload(codec)] * K
        assert row["wire_bytes_up"] > row["bytes_up"]
    for row in done.rows[1:]:
        assert row["bytes_down_by_client"] == [payload(codec)] * K


@pytest.mark.parametrize("codec", ["simplex:4+deflate", "simplex:1+range", "float16+deflate"])
def test_lossless_packing_changes_bytes_and_nothing_else(codec: str) -> None:
    plain = federate(with_codec(codec.partition("+")[0]))
    packed = federate(with_codec(codec))
    for row, other in zip(packed.rows, plain.rows, strict=True):
        assert row["loss_revisit"] == other["loss_revisit"]
        assert row.get("loss_digest") == other.get("loss_digest")
    assert packed.rows[0]["bytes_up"] != plain.rows[0]["bytes_up"]


def test_up_and_down_may_differ() -> None:
    done = federate(with_codec("simplex:1+bits/float16"))
    assert done.rows[1]["bytes_up_by_client"] == [math.ceil(P * 4 / 8)] * K
    assert done.rows[1]["bytes_down_by_client"] == [P * C * 2] * K


@pytest.mark.parametrize("number", ["float32", "simplex:1", "simplex:4"])
def test_sending_only_changes_changes_bytes_and_nothing_else(number: str) -> None:
    """With half of the clients a round, so that some come back after rounds that they missed."""
    keys: dict[str, Any] = {"num_server_rounds": 6, "fraction_train": 0.67, "num_clients": 3}
    plain = federate(with_codec(number, **keys))
    changes = federate(with_codec(f"{number}+changed", **keys))
    for row, other in zip(changes.rows, plain.rows, strict=True):
        assert row["dropped"] == other["dropped"] == {}
        for name in ("loss_revisit", "loss_digest", "agreement", "sampled"):
            assert row.get(name) == other.get(name), name
    bitmap = math.ceil(P / 8)
    for row in changes.rows:
        assert all(size >= bitmap for size in row["bytes_up_by_client"])
    # Once everybody has sent: fewer bytes than all rows would take, up and down.
    if number == "simplex:1":
        assert changes.rows[-1]["bytes_up"] < plain.rows[-1]["bytes_up"]
        assert changes.rows[-1]["bytes_down"] < plain.rows[-1]["bytes_down"]


@pytest.mark.parametrize("loss", ["silence", "error", "garbage"])
def test_a_lost_reply_takes_both_sides_back_to_what_they_had(loss: str) -> None:
    def lose(instruction: Instruction, message: Message, reply: Message) -> Message | None:
        if (instruction.client, instruction.round) not in ((1, 2), (0, 3)):
            return reply
        if loss == "silence":
            return None
        if loss == "error":
            return error_reply(message, "lost")
        return reply_with(message, without(reply.content, "knowledge"))

    keys: dict[str, Any] = {"num_server_rounds": 5}
    plain = federate(with_codec("simplex:4", **keys), lose)
    changes = federate(with_codec("simplex:4+changed", **keys), lose)
    for row, other in zip(changes.rows, plain.rows, strict=True):
        assert row["dropped"].keys() == other["dropped"].keys()
        for name in ("loss_revisit", "loss_digest", "agreement"):
            assert row.get(name) == other.get(name), (row["round"], name)


def test_changed_rows_arrive_packed_and_all_rows_as_numbers() -> None:
    changes, plain = federate(with_codec("float32+changed")), federate(with_codec("float32"))
    assert isinstance(changes.exchanges[-1].instructions[0].knowledge, Packed)
    assert isinstance(plain.exchanges[-1].instructions[0].knowledge, SoftLabels)


def test_knowledge_that_nobody_acknowledged_is_sent_again() -> None:
    """After a round below the quorum."""

    def lose(instruction: Instruction, message: Message, reply: Message) -> Message | None:
        return None if instruction.round == 3 and instruction.client else reply

    done = federate(with_codec("float32+changed", num_server_rounds=4, quorum=2), lose)
    assert done.rows[2]["accepted"] is False
    again = done.rows[3]["bytes_down_by_client"]
    # Nobody acknowledged round 3, so that what came with it comes again.
    assert again == done.rows[2]["bytes_down_by_client"]


@pytest.mark.parametrize(
    ("keys", "reason"),
    [
        ({"codec": "float33"}, "codec"),
        ({"codec": "float32+bits"}, "codec|pack"),
        ({"codec": "simplex:3"}, "codec|number"),
        ({"codec": "simplex:1/simplex:1/simplex:1"}, "codec"),
        ({"codec": "simplex:1", "strategy": "FedAvg"}, "FedAvg sends no soft labels"),
        ({"codec": "float16", "strategy": "LocalOnly"}, "LocalOnly sends no soft labels"),
    ],
)
def test_a_codec_that_makes_no_sense_is_refused_before_any_work(
    keys: dict[str, Any], reason: str
) -> None:
    with pytest.raises(FedkdError, match=reason):
        federate(tiny(**{"strategy": "DSFL", **keys}))


def test_a_strategys_own_wire_gives_way_to_the_experiments() -> None:
    own = find("SCARLET")
    assert [wire.rows for wire in own.wires(tiny())] == ["all", "changed"]
    assert [str(wire) for wire in own.wires(tiny(codec="float16"))] == ["float16", "float16"]


# --- Memories ------------------------------------------------------------------------------------


def remembered(seed: int) -> Memory:
    drawn = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 255, (P, 7), generator=drawn).to(torch.uint8)
    return {"down": {"codes": codes, "known": codes[:, 0] > 100}, "own": {"w": torch.tensor(2.5)}}


def test_memories_come_back_by_round(tmp_path: Path) -> None:
    memories = Memories(tmp_path / "memory")
    first = {k: remembered(k) for k in (0, 1, 205)}
    later = {1: remembered(11)}
    memories.save(first, 1, {0: 0, 1: 0, 205: 0})
    memories.save(later, 2, {1: 1})
    for bases, expected in (({0: 1, 1: 1, 205: 1}, first), ({1: 2}, later)):
        found = memories.load(bases)
        assert found.keys() == expected.keys()
        for client, memory in expected.items():
            assert found[client].keys() == memory.keys()
            for name, tensors in memory.items():
                for key, tensor in tensors.items():
                    assert torch.equal(found[client][name][key], tensor)


def test_a_client_without_a_memory_of_a_round_has_none(tmp_path: Path) -> None:
    memories = Memories(tmp_path / "memory")
    assert memories.load({3: 1}) == {3: {}}
    memories.save({3: {}}, 1, {3: 0})
    assert not (tmp_path / "memory").exists()
    memories.save({3: remembered(3)}, 2, {3: 1})
    assert memories.load({3: 1, 4: 2}) == {3: {}, 4: {}}


def test_clients_that_keep_other_tensors_than_each_other_are_told(tmp_path: Path) -> None:
    memories = Memories(tmp_path / "memory")
    memories.save({0: {"own": {"mask": torch.zeros(5)}}}, 1, {0: 0})
    with pytest.raises(FedkdError, match=r"mask.*\[5\].*\[6\]"):
        memories.save({1: {"own": {"mask": torch.zeros(6)}}}, 1, {1: 0})


def test_strategies_without_a_codec_of_their_own_send_plain_numbers() -> None:
    assert [str(w) for w in DistillationStrategy.wire(find("FedMD"))] == ["float32", "float32"]
