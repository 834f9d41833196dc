"""Knowledge as Flower records and back: its arrays, and the fields that describe them.

Public samples that are the whole public set, or those that were asked for, need no indices; others are
named by a bitmap or by int32 indices, whichever is less.
"""

from __future__ import annotations

from reprlib import repr as shown
from typing import Any, TypeVar

from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from torch import Tensor

from fedkd.errors import FedkdError
from fedkd.federation.npy import read_npy
from fedkd.knowledge import Knowledge, Sizes, require_one
from fedkd.knowledge.arrival import Arrival
from fedkd.knowledge.codec import Packed
from fedkd.knowledge.kinds import BY_NAME

_R = TypeVar("_R", ArrayRecord, ConfigRecord, MetricRecord)


def typed_record(records: RecordDict, name: str, kind: type[_R]) -> _R | None:
    """Return a record, or ``None`` if it is missing or of another kind.

    Flower's own views by kind copy all records.
    """
    record = records.get(name)
    return record if isinstance(record, kind) else None


def encode_knowledge(knowledge: Knowledge | Packed, sizes: Sizes, *, asked: bool) -> dict[str, Any]:
    """Pack knowledge as records ``knowledge`` (arrays) and ``knowledge-kind``.

    Args:
        knowledge: soft labels (encoded, or K = 1 to be sent as they are), class means of K = 1, or
            weights of one architecture and K = 1.
        sizes: of the public set.
        asked: whether the samples of soft labels are exactly those that the receiver asked for, so that
            it knows them.
    """
    if not isinstance(knowledge, Packed):
        require_one(knowledge)
    tensors, fields = knowledge.to_message(sizes, asked=asked)
    arrays = {name: Array(t.detach().cpu().contiguous().numpy()) for name, t in tensors.items()}
    described = ConfigRecord({"kind": knowledge.kind, **fields})
    return {"knowledge": ArrayRecord(arrays), "knowledge-kind": described}


def decode_knowledge(
    records: RecordDict,
    sizes: Sizes,
    *,
    client: int,
    num_examples: int,
    samples: Tensor | None = None,
) -> Knowledge | Packed | None:
    """Unpack knowledge, or return ``None`` where the message carries none.

    Args:
        records: of a message.
        sizes: of the public set.
        client: partition id that it is attributed to.
        num_examples: private images behind it.
        samples: those that were asked for.

    Returns:
        Soft labels as they came: `SoftLabels.unpack` decodes them.

    Raises:
        FedkdError: the records are not valid knowledge.
    """
    arrays = typed_record(records, "knowledge", ArrayRecord)
    if arrays is None:
        return None
    try:
        kind, fields = _described(records)
        tensors = {name: decode_tensor(name, array) for name, array in arrays.items()}
        return kind.from_message(tensors, fields, Arrival(sizes, client, num_examples, samples))
    except FedkdError as error:
        raise FedkdError(f"sends knowledge that cannot be read: {error}") from None


def _described(records: RecordDict) -> tuple[type[Knowledge], dict[str, Any]]:
    """Return the kind of a message's knowledge and its fields, names and types checked."""
    fields = dict(typed_record(records, "knowledge-kind", ConfigRecord) or {})
    name = fields.get("kind")
    if not isinstance(name, str) or name not in BY_NAME:
        raise FedkdError(f"kind = {shown(name)}: must be one of {', '.join(BY_NAME)}")
    field_types = {"kind": str, **BY_NAME[name].message_fields}
    if {name: type(value) for name, value in fields.items()} != field_types:
        raise FedkdError(
            f"{name} must be described by {', '.join(field_types)}, not by {shown(fields)}"
        )
    return BY_NAME[name], fields


def decode_tensor(name: str, array: Array) -> Tensor:
    """Return the tensor of an array.

    Raises:
        FedkdError: it cannot be read, or its type or shape is not the declared one.
    """
    try:
        if array.stype != "numpy.ndarray":
            raise FedkdError(f"is stored as {shown(array.stype)}")
        tensor = read_npy(array.data)
        dtype, shape = str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape)
        if (dtype, shape) != (array.dtype, tuple(array.shape)):
            raise FedkdError(
                f"is {dtype} {shape}, declared as {shown(array.dtype)} {shown(array.shape)}"
            )
    except FedkdError as error:
        raise FedkdError(f"{shown(name)} {error}") from None
    return tensor
