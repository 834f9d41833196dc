"""Check a strategy among clients that answer late, wrongly, twice or not at all."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from torch import Tensor

from fedkd.errors import FedkdError
from fedkd.federation.flower_internals.local_grid import LocalGrid
from fedkd.federation.flower_internals.replies import error_reply
from fedkd.testing.bench import Bench, Change, honest, require_all
from fedkd.testing.outcomes import Wrong

BAD = 1
"""The client whose reply is bad."""

_Arrays = dict[str, Tensor]


def bad_replies(bench: Bench) -> None:
    """A bad reply is dropped with a reason, whatever is wrong with it, and the round goes on."""
    exchanges = require_all(bench.usual).exchanges
    replay = [exchanges[0], exchanges[-1]]
    for name, change in [*_SILENT.items(), *_spoilt(exchanges[0][BAD]).items()]:
        grid = _Echoing if name == "a reply twice" else LocalGrid
        try:
            done = bench.federate(change, replay=replay, grid=grid, num_server_rounds=1)
        except FedkdError as error:
            raise Wrong(
                f"the round does not go on without a client ({name}): {error}; update has to work with "
                "the clients that answered, len(replies.clients), not with num_clients"
            ) from error
        row = done.rows[0]
        others = [client for client in row["sampled"] if client != BAD]
        if row["answered"] != others or not row["dropped"].get(str(BAD)):
            raise Wrong(f"{name}: the client is not dropped; leave checking replies to the base")
        if [update.replies.clients for update in done.updates] != [others]:
            raise Wrong(
                f"{name}: update does not get the other clients' answers; do not override the base"
            )


def few_replies(bench: Bench) -> None:
    """A round goes on with one reply, and without any the next one does."""

    def only_first(number: int, client: int, message: Message, content: RecordDict) -> Any:
        return honest(number, client, message, content) if number > 1 or client == 0 else None

    def none(number: int, client: int, message: Message, content: RecordDict) -> Any:
        return honest(number, client, message, content) if number > 1 else None

    for count, change in (("one reply", only_first), ("no reply", none)):
        try:
            done = bench.federate(change, num_server_rounds=2)
        except FedkdError as error:
            raise Wrong(
                f"with {count} in round 1: {error}; divide by numbers that cannot be 0 (no unbiased "
                "variance of one client), and let phases and update do without earlier knowledge"
            ) from error
        require_all(done, done.rows[1:])
        if done.rows[0]["accepted"] != (count == "one reply"):
            raise Wrong(f"{count} in round 1 is not treated as such; leave the quorum to the base")


# --- What may be wrong with a reply ------------------------------------------------------------------


class _Echoing(LocalGrid):
    """A grid on which the reply of client `BAD` arrives twice."""

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> list[Message]:
        sent = list(messages)
        replies = list(super().send_and_receive(sent, timeout=timeout))
        is_round = sent[0].content.get("instruction", ConfigRecord()).get("round") == 1
        return [*replies, replies[BAD]] if is_round else replies


def _in_round_1(answer: Callable[[Message, RecordDict], Message | None]) -> Change:
    def change(number: int, client: int, message: Message, content: RecordDict) -> Message | None:
        if (number, client) != (1, BAD):
            return honest(number, client, message, content)
        return answer(message, content)

    return change


def _fails(message: Message, content: RecordDict) -> Message:
    return error_reply(message, "ArithmeticError: out of luck")


_SILENT: dict[str, Change] = {
    "no reply in time": _in_round_1(lambda message, content: None),
    "a failure": _in_round_1(_fails),
    "a reply twice": honest,
}


def _spoilt(content: RecordDict) -> dict[str, Change]:
    """Return changes that spoil what a client uploads, by name; none if it uploads nothing."""
    record = content.get("knowledge")
    if not isinstance(record, ArrayRecord):
        return {}
    arrays = {n: torch.from_numpy(a.numpy().copy()) for n, a in record.items()}
    name = next((n for n, t in arrays.items() if t.ndim > 1 and t.numel()), next(iter(arrays)))
    kind = content["knowledge-kind"]
    assert isinstance(kind, ConfigRecord)
    spoilt: dict[str, Callable[[_Arrays], _Arrays]] = {
        "NaN": lambda a: {**a, name: _with(a[name], math.nan)},
        "infinity": lambda a: {**a, name: _with(a[name], math.inf)},
        "a wrong shape": lambda a: {**a, name: a[name][..., :-1]},
        "a wrong type": lambda a: {**a, name: _other_type(a[name])},
        "no knowledge": lambda a: {},
    }
    if "probabilities" in (kind.get("space"), kind.get("of")) and arrays[name].is_floating_point():
        spoilt["negative probabilities"] = lambda a: {**a, name: -a[name]}
    if "counts" in arrays:
        spoilt["negative counts"] = lambda a: {**a, "counts": -a["counts"]}
    changes = {n: _in_round_1(_sending(change, arrays)) for n, change in spoilt.items()}
    if kind["kind"] == "soft-labels":
        wrong = torch.arange(1, 1 + 10**6, dtype=torch.int32)
        changes["a sample that is not there"] = _in_round_1(
            _sending(lambda a: {**a, "samples": wrong[-len(a[name]) :]}, arrays, samples="listed")
        )
    return changes


def _sending(
    change: Callable[[_Arrays], _Arrays], arrays: _Arrays, **kind: str
) -> Callable[[Message, RecordDict], Message]:
    """Return a client that sends changed arrays."""

    def answer(message: Message, content: RecordDict) -> Message:
        changed = change({name: tensor.clone() for name, tensor in arrays.items()})
        packed = {n: Array(t.contiguous().numpy()) for n, t in changed.items()}
        old = dict(content.config_records["knowledge-kind"])
        records = {**content, "knowledge-kind": ConfigRecord({**old, **kind})}
        records["knowledge"] = ArrayRecord(packed)
        return Message(RecordDict(records), reply_to=message)

    return answer


def _with(tensor: Tensor, value: float) -> Tensor:
    """Return a tensor with a bad first value; one of integers, as packed, becomes floats throughout."""
    if not tensor.is_floating_point():
        return torch.full(tensor.shape, value)
    tensor.view(-1)[0] = value
    return tensor


def _other_type(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor.to(torch.int64)
