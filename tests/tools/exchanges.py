"""What tests of the round loop have in common: meddlers, and comparisons bit for bit."""

from __future__ import annotations

from collections.abc import Callable

import torch
from federation_tools import (
    Meddle,
    array,
    with_arrays,
)
from flwr.app import RecordDict
from torch import Tensor

from fedkd.knowledge import Knowledge, SoftLabels, Weights
from fedkd.knowledge.codec import Packed
from fedkd.records import Row

K, BAD = 3, 1
HONEST = [0, 2]
SENDING = ["FedMD", "DSFL", "FedAvg"]


Got = Knowledge | Packed | None
"""What an instruction may carry."""


def tensors(knowledge: Got) -> dict[str, Tensor]:
    """Return what K = 1 knowledge consists of."""
    if isinstance(knowledge, SoftLabels):
        return {"values": knowledge.values, "samples": knowledge.samples}
    assert isinstance(knowledge, Weights)
    return {n: t for part in knowledge.by_model.values() for n, t in part.tensors.items()}


def assert_knowledge(got: Got, expected: Got | Tensor) -> None:
    """Compare bit for bit; a tensor stands for soft labels on the whole public set."""
    if isinstance(expected, Tensor):
        assert isinstance(got, SoftLabels)
        assert torch.equal(got.values[0], expected)
        return
    assert list(tensors(got)) == list(tensors(expected))
    for name, tensor in tensors(expected).items():
        assert torch.equal(tensors(got)[name], tensor)


def timeless(row: Row) -> Row:
    return {name: value for name, value in row.items() if name != "seconds"}


def dropping(number: int, client: int) -> Meddle:
    """Return a meddler who keeps one client's reply in one round."""
    return lambda instruction, _, reply: (
        None if (instruction.round, instruction.client) == (number, client) else reply
    )


# --- A bad reply is dropped, and the aggregate is that of the others -----------------------------


def first_array(content: RecordDict, change: Callable[[Tensor], Tensor]) -> RecordDict:
    """Change the first array of the knowledge that has two axes: soft labels, or a weight matrix."""
    record = content.array_records["knowledge"]
    name = next(n for n, a in record.items() if len(a.shape) == 2)
    changed = change(torch.from_numpy(record[name].numpy().copy()))
    return with_arrays(content, **{name: array(changed)})
