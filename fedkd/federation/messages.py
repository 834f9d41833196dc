"""Instructions and client reports as Flower records, and back.

An instruction is sent with the experiment's keys (any Ray worker may get any client), the samples asked
for and the knowledge; a client report is its numbers and the answer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from reprlib import repr as shown
from time import perf_counter
from typing import Any

import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from torch import Tensor

from fedkd.clients.instructions import REPORTED, WITHHOLDABLE, ClientReport, Instruction
from fedkd.errors import FedkdError, one_line
from fedkd.experiment import Experiment
from fedkd.federation.knowledge_records import (
    decode_knowledge,
    decode_tensor,
    encode_knowledge,
    typed_record,
)
from fedkd.knowledge import Knowledge, Sizes, SoftLabels, Wire
from fedkd.knowledge.codec import KnownRows, Packed, pack_samples, unpack_samples
from fedkd.knowledge.wire import PLAIN
from fedkd.phases import Phase, from_text, to_text

TRAIN, HELLO = "train.fedkd", "query.hello"
"""Message types: execute an instruction; introduce yourself."""

_SECONDS = "seconds "
"""Prefix of the names of the seconds that a client reports."""

_EVENT = "event "
"""Prefix of the names of the failures that a client recovered from, with how many there were."""

MOST_NUMBERS = 1000
"""The most numbers that a report may hold: an honest one has a few for each phase."""


@dataclass(frozen=True)
class Introduction:
    """What a client sends about itself before the first round.

    Attributes:
        client: partition id.
        num_examples: its private images; ``None`` if it does not say.
        student: architecture of its student.
        sources: fingerprint of the code it runs.
    """

    client: int
    num_examples: int | None
    student: str
    sources: str


def encode_introduction(introduction: Introduction) -> RecordDict:
    """Pack an introduction."""
    said = {name: value for name, value in vars(introduction).items() if value is not None}
    return RecordDict({"introduction": ConfigRecord(said)})


def decode_introduction(records: RecordDict) -> Introduction:
    """Unpack an introduction.

    Raises:
        FedkdError: the records are not an introduction.
    """
    fields = dict(typed_record(records, "introduction", ConfigRecord) or {})
    field_types = {"client": int, "num_examples": int, "student": str, "sources": str}
    if {"num_examples": int, **{n: type(value) for n, value in fields.items()}} != field_types:
        raise FedkdError(
            f"sends no introduction (it has {shown([*fields]) if fields else 'nothing'})"
        )
    introduction: dict[str, Any] = {"num_examples": None, **fields}
    return Introduction(**introduction)


def experiment_record(experiment: Experiment) -> ConfigRecord:
    """Pack the experiment's keys."""
    return ConfigRecord(dict(experiment.flat()))


def decode_experiment(records: RecordDict) -> Experiment:
    """Unpack the experiment's keys.

    Raises:
        FedkdError: they are missing or do not validate.
    """
    keys = typed_record(records, "experiment", ConfigRecord)
    if keys is None:
        raise FedkdError("the message carries no experiment")
    try:
        return Experiment.load(("the message", dict(keys)))
    except FedkdError as error:
        raise FedkdError(one_line(str(error))) from None


def encode_request(asked: Tensor, sizes: Sizes) -> dict[str, Any]:
    """Pack the public samples asked for (int64 ``[M]``) as a record ``request``, if there are any.

    A request that names no sample asks for the whole public set.
    """
    if not len(asked):
        return {}
    listed = pack_samples(asked, sizes.num_public)
    arrays = {} if listed is None else {"samples": Array(listed.numpy())}
    return {"request": ArrayRecord(arrays)}


def encode_instruction(
    instruction: Instruction,
    experiment: ConfigRecord,
    knowledge: dict[str, Any],
    request: dict[str, Any],
) -> RecordDict:
    """Pack an instruction.

    Args:
        instruction: what the client is to do.
        experiment: see `experiment_record`; shared by all messages.
        knowledge: see `encode_knowledge`; shared by all who receive the same.
        request: see `encode_request`; shared by all who are asked the same.
    """
    fields: dict[str, Any] = {
        "client": instruction.client,
        "round": instruction.round,
        "base": instruction.base,
        "phases": to_text(instruction.phases),
        "knowledge-round": instruction.knowledge_round,
        "evaluate": instruction.evaluate,
        "wire": str(instruction.wire),
    }
    records: dict[str, Any] = {
        "experiment": experiment,
        "instruction": ConfigRecord(fields),
        **knowledge,
        **request,
    }
    return RecordDict(records)


def decode_phases(records: RecordDict) -> tuple[Phase, ...]:
    """Unpack the phases of an instruction alone.

    Raises:
        FedkdError: the records are not an instruction.
    """
    record = typed_record(records, "instruction", ConfigRecord)
    if record is None or type(record.get("phases")) is not str:
        raise FedkdError("the instruction cannot be read: it has no phases")
    return from_text(str(record["phases"]))


def decode_instruction(
    records: RecordDict,
    sizes: Sizes,
    *,
    num_examples: int,
    seen: dict[Any, Knowledge | Packed | None] | None = None,
) -> Instruction:
    """Unpack an instruction.

    Soft labels of which only changed rows were sent stay packed: the rows that they change are in the
    client's state.

    Args:
        records: of a message.
        sizes: of the public set.
        num_examples: the client's private images.
        seen: knowledge decoded before, by its bytes; instructions that share them share one object, which
            is how a stack knows that all its clients received the same.

    Raises:
        FedkdError: the records are not a valid instruction.
    """
    seen = {} if seen is None else seen
    try:
        instruction = _instruction(records)
        knowledge = _received(records, sizes, instruction["client"], num_examples, seen)
        asked = torch.empty(0, dtype=torch.int64)
        request = typed_record(records, "request", ArrayRecord)
        if request is not None:
            listed = decode_tensor("samples", request["samples"]) if "samples" in request else None
            asked = unpack_samples(listed, sizes.num_public)
        return Instruction(
            client=instruction["client"],
            round=instruction["round"],
            base=instruction["base"],
            phases=from_text(instruction["phases"]),
            asked=asked,
            knowledge=knowledge,
            knowledge_round=instruction["knowledge-round"],
            evaluate=instruction["evaluate"],
            wire=Wire.parse(instruction["wire"]),
        )
    except FedkdError as error:
        raise FedkdError(one_line(str(error))) from None
    except Exception as error:
        # A malicious message can make the decoder raise anything.
        raise FedkdError(f"the instruction cannot be read: {one_line(error)}") from None


def _received(
    records: RecordDict,
    sizes: Sizes,
    client: int,
    num_examples: int,
    seen: dict[Any, Knowledge | Packed | None],
) -> Knowledge | Packed | None:
    """Return the knowledge of an instruction, one object for all instructions that share its bytes."""
    arrays = typed_record(records, "knowledge", ArrayRecord)
    key = tuple(id(array.data) for array in arrays.values()) if arrays else ()
    if key not in seen:
        received = decode_knowledge(records, sizes, client=client, num_examples=num_examples)
        if isinstance(received, Packed) and received.wire.rows == "all":
            received, _ = SoftLabels.unpack(received, sizes.num_public)
        seen[key] = received
    return seen[key]


def _instruction(records: RecordDict) -> dict[str, Any]:
    """Return the fields of an instruction, numbers and texts checked."""
    record: Any = typed_record(records, "instruction", ConfigRecord)
    instruction: dict[str, Any] = dict(record)
    for name in ("client", "round", "base", "knowledge-round"):
        if type(instruction[name]) is not int:
            raise FedkdError(
                f"the instruction's {name} = {instruction[name]!r} is not a whole number"
            )
    for name in ("phases", "evaluate", "wire"):
        if type(instruction[name]) is not str:
            raise FedkdError(f"the instruction's {name} = {instruction[name]!r} is not a text")
    return instruction


def encode_report(
    report: ClientReport,
    asked: Tensor,
    sizes: Sizes,
    decoding: float = 0.0,
    withheld: Sequence[str] = (),
) -> RecordDict:
    """Pack a client report; sample indices are sent only if the answer is for other samples than asked.

    Args:
        report: of the client.
        asked: samples that it was asked for.
        sizes: of the public set.
        decoding: seconds that decoding its instruction took, added to those of this encoding.
        withheld: the parts, of `WITHHOLDABLE`, of which nothing is sent but that they are withheld.
    """
    started = perf_counter()
    knowledge: dict[str, Any] = {}
    if report.answer is not None:
        labels = report.answer if isinstance(report.answer, SoftLabels) else None
        whole = labels is not None and torch.equal(labels.samples, asked)
        knowledge = encode_knowledge(report.packed or report.answer, sizes, asked=whole)
    encoding = report.seconds.get("encode", 0.0) + decoding + perf_counter() - started
    seconds = {**report.seconds, "encode": encoding}
    parts: dict[str, dict[str, Any]] = {
        "num-examples": {"num-examples": report.num_examples},
        "metrics": report.metrics,
        "seconds": {_SECONDS + name: spent for name, spent in seconds.items()},
        "events": {_EVENT + name: count for name, count in report.events.items()},
    }
    numbers: dict[str, Any] = {"partition-id": report.client, "round": report.round}
    for name, part in parts.items():
        numbers.update({} if name in withheld else part)
    said = {"withheld": ConfigRecord({"parts": list(withheld)})} if withheld else {}
    return RecordDict({"report": MetricRecord(numbers), **said, **knowledge})


def decode_report(
    records: RecordDict,
    asked: Tensor,
    sizes: Sizes,
    wire: Wire = PLAIN,
    known: KnownRows | None = None,
    num_examples: int | None = None,
) -> ClientReport:
    """Unpack a client report.

    Args:
        records: of a message.
        asked: samples that the client was asked for.
        sizes: of the public set.
        wire: how its soft labels have to be encoded.
        known: what the server already has of them.
        num_examples: the client's private images, if it withholds their number.

    Raises:
        FedkdError: the records are not a valid report.
    """
    reported = typed_record(records, "report", MetricRecord)
    if reported is None:
        raise FedkdError("sends no report")
    if len(reported) > MOST_NUMBERS:
        raise FedkdError(f"reports {len(reported)} numbers: must be at most {MOST_NUMBERS}")
    numbers: dict[str, Any] = dict(reported)
    client = _integer(numbers, "partition-id")
    withheld = _withheld(records)
    if "num-examples" not in withheld or num_examples is None:
        num_examples = _integer(numbers, "num-examples")
    round = _integer(numbers, "round") if "round" in numbers else 0
    events = {
        name: _integer(numbers, _EVENT + name) for name in REPORTED if _EVENT + name in numbers
    }
    for name, value in numbers.items():
        if not _is_finite(value):
            raise FedkdError(
                f"sends metrics that are not finite numbers: {shown(name)} = {_shown_number(value)}"
            )
    seconds = {n.removeprefix(_SECONDS): v for n, v in numbers.items() if n.startswith(_SECONDS)}
    metrics = {n: v for n, v in numbers.items() if not n.startswith((_SECONDS, _EVENT))}
    answer = decode_knowledge(
        records, sizes, client=client, num_examples=num_examples, samples=asked
    )
    newer = None
    if isinstance(answer, Packed):
        owner = torch.tensor([client]), torch.tensor([num_examples])
        answer, newer = _unpacked(answer, sizes, wire, known, owner)
    return ClientReport(
        client=client,
        num_examples=num_examples,
        answer=answer,
        metrics=metrics,
        seconds=seconds,
        known=newer,
        events=events,
        round=round,
        withheld=withheld,
    )


def _withheld(records: RecordDict) -> tuple[str, ...]:
    """Return the parts that a report withholds."""
    fields = dict(typed_record(records, "withheld", ConfigRecord) or {})
    parts = fields.get("parts", [])
    if not isinstance(parts, list) or not set(parts) <= set(WITHHOLDABLE):
        raise FedkdError(f"withholds {shown(parts)}: must be a list of {', '.join(WITHHOLDABLE)}")
    return tuple(part for part in WITHHOLDABLE if part in parts)


def _unpacked(
    packed: Packed,
    sizes: Sizes,
    wire: Wire,
    known: KnownRows | None,
    owner: tuple[Tensor, Tensor],
) -> tuple[SoftLabels, KnownRows | None]:
    """Decode a client's soft labels, if they are encoded as they have to be."""
    if (packed.wire, packed.sets) != (wire, 1):
        raise FedkdError(
            f"sends {shown(packed.sets)} × {packed.wire}, where one set as {wire} was asked for"
        )
    try:
        return SoftLabels.unpack(packed, sizes.num_public, known, owner)
    except FedkdError as error:
        raise FedkdError(f"sends soft labels that cannot be read: {error}") from None


def _integer(numbers: dict[str, Any], name: str) -> int:
    value = numbers.pop(name, None)
    if type(value) is not int or value.bit_length() > 63:
        raise FedkdError(
            f"sends {name} = {_shown_number(value)}, which must be a whole number of 64 bits"
        )
    return value


def _is_finite(value: object) -> bool:
    if type(value) is int:
        return value.bit_length() <= 63
    return type(value) is float and math.isfinite(value)


def _shown_number(value: object) -> str:
    """Return a number as short text; Python refuses to write out the largest ones."""
    is_vast = isinstance(value, int) and value.bit_length() > 63
    return "a number of more than 64 bits" if is_vast else shown(value)
