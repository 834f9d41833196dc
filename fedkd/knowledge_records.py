"""Knowledge to records and back: arrays, and what is said of them.

Public samples that are the whole public set, or those that were asked for, need no indices; others are
named by a bitmap or by int32 indices, whichever is less.
"""

from __future__ import annotations

from collections.abc import Mapping
from reprlib import repr as shown
from typing import Any, TypeVar

import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from torch import Tensor

from fedkd.errors import FedkdError
from fedkd.knowledge import (
    ClassMeans,
    Knowledge,
    ModelWeights,
    Sizes,
    SoftLabels,
    Weights,
    Wire,
    require_one,
)
from fedkd.knowledge.codec import Packed, pack_samples, unpack_samples
from fedkd.knowledge.wire import PLAIN
from fedkd.npy import read_npy

MOST_SETS = 1000
"""The most sets of soft labels that are decoded: packed, millions of them fit into a few bytes."""

_R = TypeVar("_R", ArrayRecord, ConfigRecord, MetricRecord)


def typed_record(records: RecordDict, name: str, kind: type[_R]) -> _R | None:
    """Return a record if it is there and of its kind; Flower's views by kind copy all of them."""
    found = records.get(name)
    return found if isinstance(found, kind) else None


def encode_knowledge(knowledge: Knowledge | Packed, sizes: Sizes, *, asked: bool) -> dict[str, Any]:
    """Pack knowledge as records ``knowledge`` (arrays) and ``knowledge-kind``.

    Args:
        knowledge: soft labels (encoded, or K = 1 to be sent as they are), class means of K = 1, or
            weights of one architecture and K = 1.
        sizes: of the public set.
        asked: whether soft labels are for the very samples that the receiver asked for, so that it
            knows which.
    """
    if isinstance(knowledge, SoftLabels):
        require_one(knowledge)
        knowledge, _ = knowledge.pack(PLAIN, sizes.num_public)
    tensors, kind = _encoded(knowledge)
    if isinstance(knowledge, Packed):
        listed = None if asked else pack_samples(knowledge.samples, sizes.num_public)
        if listed is not None:
            tensors = {**tensors, "samples": listed}
        kind["samples"] = "asked" if asked else "all" if listed is None else "listed"
    arrays = {name: Array(t.detach().cpu().contiguous().numpy()) for name, t in tensors.items()}
    return {"knowledge": ArrayRecord(arrays), "knowledge-kind": ConfigRecord(kind)}


def _encoded(knowledge: Packed | ClassMeans | Weights) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return knowledge as tensors and what is to be said of them."""
    if isinstance(knowledge, Packed):
        kind = {"kind": "soft-labels", "space": knowledge.space, "wire": str(knowledge.wire)}
        return dict(knowledge.arrays), {**kind, "sets": knowledge.sets}
    require_one(knowledge)
    if isinstance(knowledge, ClassMeans):
        means = {"values": knowledge.values[0], "counts": knowledge.counts[0].to(torch.int32)}
        return means, {"kind": "class-means", "of": knowledge.of}
    ((model, weights),) = knowledge.by_model.items()
    named = {name: stacked[0] for name, stacked in weights.tensors.items()}
    return named, {"kind": "weights", "model": model}


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
        FedkdError: the records do not make up knowledge.
    """
    arrays = typed_record(records, "knowledge", ArrayRecord)
    if arrays is None:
        return None
    try:
        kind = _kind(records)
        tensors = {name: decode_tensor(name, array) for name, array in arrays.items()}
        if kind["kind"] == "soft-labels":
            return _packed(tensors, kind, sizes, samples)
        if kind["kind"] == "class-means":
            return _class_means(tensors, kind, client)
    except FedkdError as error:
        raise FedkdError(f"sends knowledge that cannot be read: {error}") from None
    stacked = {name: tensor.unsqueeze(0) for name, tensor in tensors.items()}
    owner = torch.tensor([client]), torch.tensor([num_examples])
    return Weights({kind["model"]: ModelWeights(stacked, *owner)})


_KINDS: dict[str, dict[str, type]] = {
    "soft-labels": {"space": str, "wire": str, "sets": int, "samples": str},
    "class-means": {"of": str},
    "weights": {"model": str},
}
"""What is said of knowledge of each kind besides its kind."""


def _kind(records: RecordDict) -> dict[str, Any]:
    """Return what a message says of its knowledge, names and types checked."""
    said = dict(typed_record(records, "knowledge-kind", ConfigRecord) or {})
    kind = said.get("kind")
    if not isinstance(kind, str) or kind not in _KINDS:
        raise FedkdError(f"kind = {shown(kind)} is none of {', '.join(_KINDS)}")
    wanted = {"kind": str, **_KINDS[kind]}
    if {name: type(value) for name, value in said.items()} != wanted:
        raise FedkdError(f"{kind} must be described by {', '.join(wanted)}, not by {shown(said)}")
    return said


def _packed(
    tensors: dict[str, Tensor], kind: Mapping[str, Any], sizes: Sizes, asked: Tensor | None
) -> Packed:
    if kind["samples"] not in ("asked", "all", "listed"):
        raise FedkdError(f"samples = {shown(kind['samples'])}: must be asked, all or listed")
    if kind["samples"] == "listed":
        named = unpack_samples(_taken(tensors, "samples"), sizes.num_public)
    elif kind["samples"] == "all":
        named = torch.arange(sizes.num_public)
    elif asked is None:
        raise FedkdError("it is for samples that it does not name")
    else:
        named = asked
    if not 0 < kind["sets"] <= MOST_SETS:
        raise FedkdError(f"sets = {shown(kind['sets'])}: must be 1 to {MOST_SETS}")
    wire = Wire.parse(kind["wire"])
    return Packed(wire, kind["space"], kind["sets"], sizes.num_classes, named, tensors)


def _class_means(tensors: dict[str, Tensor], kind: Mapping[str, Any], client: int) -> ClassMeans:
    values, counts = _taken(tensors, "values"), _taken(tensors, "counts")
    if tensors:
        raise FedkdError(f"class means come with {shown([*tensors])}")
    if counts.dtype != torch.int32:  # longer ones could add up to anything
        raise FedkdError(f"counts are {counts.dtype}: must be torch.int32")
    means, images = values.unsqueeze(0), counts.to(torch.int64).unsqueeze(0)
    return ClassMeans(means, images, torch.tensor([client]), kind["of"])


def _taken(tensors: dict[str, Tensor], name: str) -> Tensor:
    if name not in tensors:
        raise FedkdError(f"it has no {name} (but {shown([*tensors])})")
    return tensors.pop(name)


def decode_tensor(name: str, array: Array) -> Tensor:
    """Read an array, and refuse one that is not what it says of itself."""
    try:
        if array.stype != "numpy.ndarray":
            raise FedkdError(f"is stored as {shown(array.stype)}")
        tensor = read_npy(array.data)
        found = str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape)
        if found != (array.dtype, tuple(array.shape)):
            raise FedkdError(
                f"is {found[0]} {found[1]}, called {shown(array.dtype)} {shown(array.shape)}"
            )
    except FedkdError as error:
        raise FedkdError(f"{shown(name)} {error}") from None
    return tensor
