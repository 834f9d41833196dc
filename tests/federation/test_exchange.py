"""Whatever one client does, a round goes on without it and gives what the others alone would have given.

The clients are those of the in-process engine; a test meddles with what one of them sends.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from exchanges import (
    BAD,
    HONEST,
    SENDING,
    K,
    assert_knowledge,
    dropping,
    first_array,
    tensors,
    timeless,
)
from federation_tools import (
    Finished,
    Meddle,
    P,
    array,
    federate,
    reply_with,
    tiny,
    with_arrays,
    with_config,
    with_metrics,
    without,
)
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from torch import Tensor

from fedkd.clients.instructions import Instruction
from fedkd.clients.states import INITIAL
from fedkd.errors import FedkdError
from fedkd.federation.flower_internals.local_grid import LocalGrid
from fedkd.federation.flower_internals.replies import error_reply
from fedkd.knowledge import SoftLabels
from fedkd.records.folder import RunFolder
from fedkd.registry import find


def in_round(number: int, client: int, change: Callable[[RecordDict], RecordDict]) -> Meddle:
    """Return a meddler who changes one client's records in one round."""

    def meddle(instruction: Instruction, message: Message, reply: Message) -> Message:
        if (instruction.round, instruction.client) != (number, client):
            return reply
        return reply_with(message, change(reply.content))

    return meddle


# --- A bad reply is dropped, and the aggregate is that of the others -----------------------------


def spoil(value: float) -> Callable[[RecordDict], RecordDict]:
    def change(values: Tensor) -> Tensor:
        values[2, 3] = value
        return values

    return lambda content: first_array(content, change)


def reshape(change: Callable[[Tensor], Tensor]) -> Callable[[RecordDict], RecordDict]:
    return lambda content: first_array(content, change)


def raw(**changes: Any) -> Callable[[RecordDict], RecordDict]:
    """Replace an array by one whose description or bytes are not true."""

    def change(content: RecordDict) -> RecordDict:
        name, old = next(iter(content.array_records["knowledge"].items()))
        fields = {"dtype": old.dtype, "shape": old.shape, "stype": old.stype, "data": old.data}
        return with_arrays(content, **{name: Array(**{**fields, **changes})})

    return change


def other_kind(content: RecordDict) -> RecordDict:
    """Send weights for soft labels, and soft labels for weights."""
    kind = str(content.config_records["knowledge-kind"]["kind"])
    if kind == "soft-labels":
        return with_config(content, "knowledge-kind", kind="weights", model="mlp-8")
    values = array(torch.full((P, 10), 0.1))
    arrays = ArrayRecord({"values": values})
    records = with_config(content, "knowledge-kind", kind="soft-labels", space="logits")
    return RecordDict({**records, "knowledge": arrays})


BAD_REPLIES: dict[str, tuple[Callable[[RecordDict], RecordDict], str]] = {
    "nan": (spoil(math.nan), "NaN or infinity"),
    "infinity": (spoil(math.inf), "NaN or infinity"),
    "minus-infinity": (spoil(-math.inf), "NaN or infinity"),
    "one-row": (reshape(lambda v: v[:1]), r"shape|must be"),
    "row-more": (reshape(lambda v: torch.cat([v, v[:1]])), r"shape|must be"),
    "class-less": (reshape(lambda v: v[:, :-1]), r"shape|must be"),
    "class-more": (reshape(lambda v: torch.cat([v, 0 * v[:, :1]], 1)), r"shape|must be"),
    "axis-less": (reshape(lambda v: v[:, 0]), r"shape|axes|\[K, N, C\]"),
    "axis-more": (reshape(lambda v: v.unsqueeze(0)), r"shape|must be"),
    "transposed": (reshape(lambda v: v.T), r"shape|must be"),
    "float64": (reshape(lambda v: v.double()), "float64"),
    "float16": (reshape(lambda v: v.half()), "float16"),
    "integers": (reshape(lambda v: v.int()), "int32"),
    "truncated": (lambda c: raw(data=b"\x93NUMPY")(c), "cannot be read"),
    "junk-type": (raw(dtype="float99", data=b"junk"), "cannot be read"),
    "junk-shape": (raw(shape=(-1, 10), data=b"junk"), "cannot be read"),
    "junk-storage": (raw(stype="pickle"), "cannot be read"),
    "other-kind": (other_kind, "does not send the|shape|read"),
    "no-knowledge": (lambda c: without(c, "knowledge"), "does not send the"),
    "no-kind": (lambda c: without(c, "knowledge-kind"), "cannot be read"),
    "no-report": (lambda c: without(c, "report"), "no report"),
    "nothing": (lambda c: RecordDict(), "no report"),
    "other-partition": (lambda c: with_metrics(c, partition__id=2), "partition 2"),
    "no-partition": (lambda c: with_metrics(c, partition__id=7), "partition 7"),
    "examples-more": (lambda c: with_metrics(c, num__examples=39), "num-examples = 39 .* 38"),
    "examples-negative": (lambda c: with_metrics(c, num__examples=-39), "num-examples = -39"),
    "examples-huge": (lambda c: with_metrics(c, num__examples=10**12), "num-examples = 10+"),
    "examples-none": (lambda c: with_metrics(c, num__examples=0), "num-examples = 0"),
    "examples-fraction": (lambda c: with_metrics(c, num__examples=38.0), "whole number"),
    "metric-nan": (lambda c: with_metrics(c, loss_revisit=math.nan), "not finite"),
    "metric-infinite": (lambda c: with_metrics(c, accuracy_after_revisit=math.inf), "not finite"),
    "metric-list": (lambda c: with_metrics(c, loss_revisit=[1.0, 2.0]), "not finite"),
}
BAD_LABELS: dict[str, tuple[Callable[[RecordDict], RecordDict], str]] = {
    "other-space": (
        lambda c: with_config(c, "knowledge-kind", space="dreams"),
        "'logits' or 'probabilities'",
    ),
    "samples-twice": (
        lambda c: with_arrays(c, samples=array(torch.arange(P, dtype=torch.int32) // 2)),
        "twice",
    ),
    "samples-unasked": (
        lambda c: with_arrays(c, samples=array(torch.arange(P, dtype=torch.int32) + 1)),
        "must be in 0 .. 36",
    ),
    "samples-negative": (
        lambda c: with_arrays(c, samples=array(torch.arange(P, dtype=torch.int32) - 1)),
        "must be in 0 .. 36",
    ),
    "samples-fewer": (
        lambda c: with_arrays(c, samples=array(torch.arange(P - 1, dtype=torch.int32))),
        "must be",
    ),
    "samples-nan": (
        lambda c: with_arrays(c, samples=array(torch.full((P,), math.nan))),
        "samples are torch.float32",
    ),
}
BAD_PROBABILITIES: dict[str, tuple[Callable[[RecordDict], RecordDict], str]] = {
    "negative": (
        reshape(lambda v: v + torch.tensor([[-1.0, 1.0] + [0.0] * 8])),
        "negative probabilities",
    ),
    "off-simplex": (reshape(lambda v: 1.01 * v), "sums differ from 1"),
    "zeros": (reshape(lambda v: 0 * v), "sums differ from 1"),
    "logits": (lambda c: with_config(c, "knowledge-kind", space="logits"), "probabilities that"),
}
BAD_WEIGHTS: dict[str, tuple[Callable[[RecordDict], RecordDict], str]] = {
    "other-model": (lambda c: with_config(c, "knowledge-kind", model="lenet"), "mlp-8"),
    "parameter-more": (lambda c: with_arrays(c, more=array(torch.zeros(2, 2))), "parameters"),
    "parameter-less": (
        lambda c: RecordDict(
            {
                **c,
                "knowledge": ArrayRecord(
                    {n: a for n, a in c.array_records["knowledge"].items() if n != "head.bias"}
                ),
            }
        ),
        "parameters",
    ),
}


def cases(
    *tables: dict[str, tuple[Callable[[RecordDict], RecordDict], str]],
) -> pytest.MarkDecorator:
    """Parametrise a test by bad replies."""
    merged = {name: case for table in tables for name, case in table.items()}
    return pytest.mark.parametrize(("change", "reason"), merged.values(), ids=merged)


@cache
def honest_run(name: str) -> Finished:
    return federate(tiny(strategy=name))


def badly(name: str, meddle: Meddle | None = None, grid: type[LocalGrid] = LocalGrid) -> Finished:
    """Run a round in which the others say what they say in the honest run."""
    replay = honest_run(name).exchanges
    return federate(tiny(strategy=name), meddle, grid=grid, replay=replay)


def assert_dropped(done: Finished, name: str, reason: str) -> None:
    """Check that the bad client is out of round 1, with its reason and without a trace."""
    row = done.rows[0]
    assert row["answered"] == HONEST
    assert list(row["dropped"]) == [str(BAD)]
    assert re.search(reason, row["dropped"][str(BAD)]), row["dropped"]
    assert "\n" not in row["dropped"][str(BAD)]
    assert row["accepted"] is True
    first, closing = done.exchanges
    honest = honest_run(name).exchanges[0].answers(HONEST)
    assert_knowledge(done.knowledge, find(name).aggregate(honest))
    assert {k: instruction.base for k, instruction in closing.instructions.items()} == {
        0: 1,
        1: INITIAL,
        2: 1,
    }
    for field, value in row.items():
        if field.startswith("client_"):
            honest_row = honest_run(name).rows[0]
            assert value == [honest_row[field][k] for k in HONEST]
    assert first.instructions.keys() == {0, 1, 2}


@cases(BAD_REPLIES, BAD_LABELS)
def test_a_bad_reply_to_fedmd_is_dropped(
    change: Callable[[RecordDict], RecordDict], reason: str
) -> None:
    assert_dropped(badly("FedMD", in_round(1, BAD, change)), "FedMD", reason)


@cases(BAD_REPLIES, BAD_LABELS, BAD_PROBABILITIES)
def test_a_bad_reply_to_dsfl_is_dropped(
    change: Callable[[RecordDict], RecordDict], reason: str
) -> None:
    assert_dropped(badly("DSFL", in_round(1, BAD, change)), "DSFL", reason)


@cases(BAD_REPLIES, BAD_WEIGHTS)
def test_a_bad_reply_to_fedavg_is_dropped(
    change: Callable[[RecordDict], RecordDict], reason: str
) -> None:
    assert_dropped(badly("FedAvg", in_round(1, BAD, change)), "FedAvg", reason)


@pytest.mark.parametrize("name", SENDING)
def test_a_silent_client_is_dropped(name: str) -> None:
    assert_dropped(badly(name, dropping(1, BAD)), name, "no reply in time")


@pytest.mark.parametrize("name", SENDING)
def test_a_client_that_fails_is_dropped_with_its_own_words(name: str) -> None:
    def fail(instruction: Instruction, message: Message, reply: Message) -> Message:
        bad = (instruction.round, instruction.client) == (1, BAD)
        return error_reply(message, "ArithmeticError: out of luck") if bad else reply

    assert_dropped(badly(name, fail), name, "^ArithmeticError: out of luck$")


class Echoing(LocalGrid):
    """A grid on which partition 1 is heard twice in round 1."""

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> list[Message]:
        sent = list(messages)
        replies = list(super().send_and_receive(sent, timeout=timeout))
        instruction = sent[0].content.config_records.get("instruction", ConfigRecord())
        return [*replies, replies[BAD]] if instruction.get("round") == 1 else replies


@pytest.mark.parametrize("name", SENDING)
def test_a_client_that_replies_twice_is_dropped(name: str) -> None:
    assert_dropped(badly(name, grid=Echoing), name, "twice")


@pytest.mark.parametrize("name", [*SENDING, "LocalOnly"])
def test_metrics_and_records_that_nobody_asked_for_do_no_harm(name: str) -> None:
    """Flower ends the run over one more metric."""

    def chatty(content: RecordDict) -> RecordDict:
        more = with_metrics(content, humidity=0.5, zeal=7)
        return RecordDict({**more, "note": ConfigRecord({"from": "me"})})

    done, plain = badly(name, in_round(1, BAD, chatty)), honest_run(name)
    assert done.rows[0]["dropped"] == {}
    assert done.rows[0]["answered"] == [0, 1, 2]
    if name != "LocalOnly":
        assert_knowledge(done.knowledge, plain.knowledge)
    ours = set(plain.rows[0]) - {"wire_bytes_up", "wire_bytes_up_by_client", "seconds"}
    assert {n: done.rows[0][n] for n in ours} == {n: plain.rows[0][n] for n in ours}


def test_a_clients_metrics_cannot_take_the_place_of_the_servers_own_fields() -> None:
    names = ["round", "sampled", "answered", "dropped", "accepted", "knowledge_round"]
    names += ["server_accuracy", "bytes_up", "wire_bytes_down", "bytes_up_by_tensor", "seconds"]

    def usurp(content: RecordDict) -> RecordDict:
        return with_metrics(content, **dict.fromkeys(names, -7.5))

    row = badly("DSFL", in_round(1, BAD, usurp)).rows[0]
    assert [n for n in names if row[n] == -7.5] == []
    assert row["round"] == 1
    assert row["sampled"] == [0, 1, 2]


@pytest.mark.parametrize(
    "record",
    [ConfigRecord({"note": ""}), ConfigRecord({"none": []}), MetricRecord({"none": []})],
    ids=["empty-text", "empty-list", "empty-metric"],
)
def test_a_record_that_flower_cannot_count_does_not_end_the_run(
    record: ConfigRecord | MetricRecord,
) -> None:
    def odd(content: RecordDict) -> RecordDict:
        return RecordDict({**content, "odd": record})

    row = badly("DSFL", in_round(1, BAD, odd)).rows[0]
    assert {0, 2} <= set(row["answered"])


@pytest.mark.parametrize("number", [1, 2], ids=["round", "closing"])
def test_knowledge_that_nobody_asked_for_does_not_end_the_run(number: int) -> None:
    arrays = ArrayRecord(
        {"values": array(torch.full((P, 10), 0.1)), "samples": array(torch.arange(P).int())}
    )

    def generous(content: RecordDict) -> RecordDict:
        kind = ConfigRecord({"kind": "soft-labels", "space": "probabilities"})
        return RecordDict({**content, "knowledge": arrays, "knowledge-kind": kind})

    done = badly("LocalOnly", in_round(number, BAD, generous))
    assert {0, 2} <= set(done.rows[0]["answered"])


def test_a_partial_answer_counts_where_it_answers() -> None:
    rows = torch.tensor([3, 1, 20])

    def partial(content: RecordDict) -> RecordDict:
        picked = first_array(content, lambda values: values[rows])
        return with_arrays(picked, samples=array(rows.int()))

    done = badly("FedMD", in_round(1, BAD, partial))
    assert done.rows[0]["dropped"] == {}
    answers = [done.exchanges[0].report(k).answer for k in range(K)]
    values = [a.values[0].double() for a in answers if isinstance(a, SoftLabels)]
    expected = (values[0] + values[2]) / 2
    for i, n in enumerate(rows.tolist()):
        expected[n] = (values[0][n] + values[1][i] + values[2][n]) / 3
    got = done.knowledge
    assert isinstance(got, SoftLabels)
    torch.testing.assert_close(got.values[0].double(), expected, rtol=1e-6, atol=1e-6)


def test_finite_replies_do_not_overflow_into_infinite_knowledge() -> None:
    """What passes one by one is digested by everybody: its mean has to be finite as well."""

    def shout(instruction: Instruction, message: Message, reply: Message) -> Message:
        if instruction.round != 1 or instruction.client == 0:
            return reply
        loud = first_array(reply.content, lambda values: torch.full_like(values, 3e38))
        return reply_with(message, loud)

    done = federate(tiny(strategy="FedMD", num_server_rounds=2), shout)
    received = done.exchanges[1].instructions[0].knowledge
    if received is not None:
        assert all(bool(t.isfinite().all()) for t in tensors(received).values())
    assert done.rows[1]["answered"] == [0, 1, 2]


@pytest.mark.parametrize("name", [*SENDING, "LocalOnly"])
def test_the_order_of_replies_changes_nothing(name: str) -> None:
    class Backwards(LocalGrid):
        def send_and_receive(
            self, messages: Iterable[Message], *, timeout: float | None = None
        ) -> list[Message]:
            return list(super().send_and_receive(messages, timeout=timeout))[::-1]

    experiment = tiny(strategy=name, num_server_rounds=2)
    forth, back = federate(experiment), federate(experiment, grid=Backwards)
    assert list(map(timeless, forth.rows)) == list(map(timeless, back.rows))
    if name != "LocalOnly":
        assert_knowledge(forth.knowledge, back.knowledge)


# --- The closing exchange ------------------------------------------------------------------------


def finished(experiment: tuple[str, Path], meddle: Meddle | None = None) -> dict[str, Any]:
    """Run a strategy for one round in a folder and return ``result.json``."""
    name, path = experiment
    named = tiny(strategy=name, run_dir=str(path), name="run")
    RunFolder.create(named, "")
    federate(named, meddle)
    result: dict[str, Any] = json.loads((path / "run" / "result.json").read_text())
    return result


def test_a_client_that_fails_at_the_end_has_no_final_accuracy(tmp_path: Path) -> None:
    result = finished(("DSFL", tmp_path), dropping(2, BAD))
    first, second, third = result["client_accuracy"]
    assert second is None
    assert result["accuracy"] == pytest.approx((first + third) / 2)
    assert result["dropped"] == {"1": "no reply in time"}


@pytest.mark.parametrize("missing", ["accuracy", "own_accuracy"])
def test_a_final_report_without_an_accuracy_is_dropped(tmp_path: Path, missing: str) -> None:
    def forget(content: RecordDict) -> RecordDict:
        metrics = dict(content.metric_records["report"])
        del metrics[missing]
        return RecordDict({**content, "report": MetricRecord(metrics)})

    result = finished(("DSFL", tmp_path), in_round(2, BAD, forget))
    assert result["client_accuracy"][BAD] is None
    assert list(result["dropped"]) == ["1"]


def test_a_run_whose_clients_are_all_gone_at_the_end_says_so(tmp_path: Path) -> None:
    with pytest.raises(FedkdError, match=r"closing exchange; .*: no reply in time"):
        finished(("DSFL", tmp_path), lambda o, m, r: None if o.round == 2 else r)
    assert len((tmp_path / "run" / "rounds.jsonl").read_text().splitlines()) == 1
