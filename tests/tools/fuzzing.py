"""Ways to spoil what a client sends, each with what the server is to say of it.

In a module of its own that a client can import (``ClientApp(mods=[...])``), without Hypothesis. Every
way ends in a reply that is not valid, whatever the number generator that it is given draws.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterator
from copy import copy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict

from fedkd.data import Dataset
from fedkd.knowledge import Wire

Corruption = Callable[[Message], "Message | list[Message]"]
Spoil = Callable[[RecordDict, Random], RecordDict]
Numbers = np.ndarray[Any, np.dtype[Any]]

LONG = "x" * 2_000_000
"""Two megabytes of a text."""

ESCAPES = "\x1b[31mred\x1b]0;title\x07\r\n\u202eleft\x00[/bold]"
"""What a console had better not be given, and a record neither."""


@dataclass(frozen=True)
class Case:
    """One way to spoil a reply.

    Attributes:
        spoil: given the records of an honest reply and a generator, the records that are sent.
        reason: a regular expression that the server's reason matches.
        needs: what the honest reply has to have; see `fits`.
        on_wire: whether Flower can carry it between processes.
    """

    spoil: Spoil
    reason: str
    needs: str = "any"
    on_wire: bool = True


def corruptions() -> dict[str, Corruption]:
    """Return what a bad client may do to its reply to a round that asks for soft labels.

    Each takes the honest reply and returns what is sent instead: one message, or for ``twice`` a list.
    """
    return {
        **{
            name: partial(_spoilt, case, name)
            for name, case in CASES.items()
            if case.on_wire and case.needs in ("any", "arrays", "labels")
        },
        "error-in-colour": lambda reply: failed(reply, ESCAPES),
        "error-of-megabytes": lambda reply: failed(reply, LONG),
        "error-without-words": lambda reply: failed(reply, ""),
        "twice": lambda reply: [reply, reply],
    }


def reasons() -> dict[str, str]:
    """Return what the server is to say of each of `corruptions`, as regular expressions."""
    of_errors = {"error-in-colour": "red", "error-of-megabytes": "x{199}…"}
    last = {"error-without-words": "without a reason", "twice": "twice"}
    return {**{name: case.reason for name, case in CASES.items()}, **of_errors, **last}


def _spoilt(case: Case, name: str, reply: Message) -> Message:
    return with_content(reply, case.spoil(reply.content, Random(name)))


def with_content(reply: Message, content: RecordDict) -> Message:
    """Return a reply with other records."""
    return Message(content=content, metadata=copy(reply.metadata))  # type: ignore[call-overload,no-any-return]


def failed(reply: Message, reason: str) -> Message:
    """Return a reply in whose place the client failed."""
    return Message(error=Error(2, reason), metadata=copy(reply.metadata))  # type: ignore[call-overload,no-any-return]


# --- Records -------------------------------------------------------------------------------------


def with_records(content: RecordDict, **records: Any) -> RecordDict:
    """Return records of which some are others, or are missing where ``None`` is given."""
    named = {name.replace("_", "-"): record for name, record in records.items()}
    return RecordDict({n: r for n, r in {**content, **named}.items() if r is not None})


def with_numbers(content: RecordDict, numbers: dict[str, Any]) -> RecordDict:
    """Return a reply in whose report some numbers are others, or are missing."""
    changed = {**content.metric_records["report"], **numbers}
    kept = {name: value for name, value in changed.items() if value is not None}
    return with_records(content, report=MetricRecord(kept))


def with_kind(content: RecordDict, **said: Any) -> RecordDict:
    """Return a reply in which something else is said of its knowledge."""
    changed = {**content.config_records["knowledge-kind"], **said}
    kept = {name: value for name, value in changed.items() if value is not None}
    return with_records(content, knowledge_kind=ConfigRecord(kept))


def with_arrays(content: RecordDict, arrays: dict[str, Array | None]) -> RecordDict:
    """Return a reply in whose knowledge some arrays are others, or are missing."""
    changed = {**content.array_records["knowledge"], **arrays}
    kept = {name: array for name, array in changed.items() if array is not None}
    return with_records(content, knowledge=ArrayRecord(kept))


def arrays_of(content: RecordDict) -> dict[str, Numbers]:
    """Return the arrays of a reply's knowledge, to be written to."""
    record = content.array_records["knowledge"]
    return {name: array.numpy().copy() for name, array in record.items()}


def fits(needs: str, content: RecordDict) -> bool:
    """Whether an honest reply has what a way to spoil it needs."""
    if needs == "any" or "knowledge" not in content:
        return needs in ("any", "nothing")
    kind = content.config_records["knowledge-kind"]
    assert isinstance(kind["kind"], str)
    what = {"arrays", kind["kind"]}
    arrays = arrays_of(content)
    if kind["kind"] == "soft-labels":
        wire = Wire.parse(str(kind["wire"]))
        number, said = wire.number.partition(":")[0], str(kind["space"])
        what |= {"labels", wire.rows, f"{number} {wire.pack}"}
        if number != "simplex" and wire.pack == "raw":
            what |= {said}
        if wire.pack != "raw":
            what |= {"packed"}
        if not arrays["values"].size:
            what &= {"arrays", "soft-labels", "labels", "changed", "all"}
    if any(a.dtype.kind == "f" and a.size for a in arrays.values()):
        what |= {"floats"}
    return needs in what


# --- Arrays --------------------------------------------------------------------------------------


def npy(descr: str, order: str, shape: str, body: bytes) -> bytes:
    """Return bytes in NumPy's form, whatever stands in the header."""
    text = f"{{'descr': '{descr}', 'fortran_order': {order}, 'shape': {shape}, }}".encode("latin-1")
    text += b" " * (-(len(text) + 11) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + body


def _array(content: RecordDict, random: Random) -> tuple[str, Array]:
    record = content.array_records["knowledge"]
    name = random.choice([*record])
    return name, record[name]


def _with_array(change: Callable[[Array, Random], Array]) -> Spoil:
    """Change one of the arrays, as it is packed."""

    def spoil(content: RecordDict, random: Random) -> RecordDict:
        name, array = _array(content, random)
        return with_arrays(content, {name: change(array, random)})

    return spoil


def _with_values(change: Callable[[Numbers, Random], Numbers]) -> Spoil:
    """Change the numbers of one of the arrays."""
    return _with_array(lambda array, random: Array(change(array.numpy().copy(), random)))


def _floats(change: Callable[[Numbers, Random], Numbers]) -> Spoil:
    """Change the numbers of one of the floating-point arrays."""

    def spoil(content: RecordDict, random: Random) -> RecordDict:
        floats = {n: a for n, a in arrays_of(content).items() if a.dtype.kind == "f" and a.size}
        name = random.choice([*floats])
        return with_arrays(content, {name: Array(change(floats[name], random))})

    return spoil


def _every_float(*values: float) -> Spoil:
    """Fill all floating-point arrays with one of `values`."""

    def spoil(content: RecordDict, random: Random) -> RecordDict:
        value, arrays = random.choice(values), arrays_of(content)
        filled = {
            n: Array(np.full_like(a, value)) for n, a in arrays.items() if a.dtype.kind == "f"
        }
        return with_arrays(content, {**filled})

    return spoil


def _values(change: Callable[[Numbers, Random], Numbers]) -> Spoil:
    """Change the array ``values``."""

    def spoil(content: RecordDict, random: Random) -> RecordDict:
        return with_arrays(content, {"values": Array(change(arrays_of(content)["values"], random))})

    return spoil


def _with(*values: float) -> Callable[[Numbers, Random], Numbers]:
    def change(array: Numbers, random: Random) -> Numbers:
        for _ in range(random.choice([1, 1, array.size])):
            array.reshape(-1)[random.randrange(array.size)] = random.choice(values)
        return array

    return change


def _other_shape(array: Numbers, random: Random) -> Numbers:
    shapes: list[Numbers] = [
        array[None],
        array[..., None],
        np.concatenate([array[None]] * 2),
        array.reshape(-1)[:0],
        np.concatenate([array.reshape(-1)] * random.randrange(2, 9)),
        np.zeros((*array.shape, random.randrange(9)), array.dtype),
        np.zeros((0,) * (array.ndim + 1), array.dtype),
    ]
    return random.choice([each for each in shapes if each.shape != array.shape])


_OTHERS = (
    "float64", "float16", "float32", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint64",
    "bool", "complex64", "complex128", "U3", "S5", "datetime64[s]",
)  # fmt: skip


def _other_type(array: Numbers, random: Random) -> Numbers:
    others = [other for other in _OTHERS if np.dtype(other) != array.dtype]
    kind = random.choice(others)
    with np.errstate(all="ignore"):
        return (array.astype(np.int64) if kind[0] in "USd" else array).astype(kind)


def _other_bytes(array: Array, data: bytes) -> Array:
    return Array(array.dtype, array.shape, array.stype, data)


def _cut(array: Array, random: Random) -> Array:
    return _other_bytes(array, array.data[: random.randrange(len(array.data))])


def _longer(array: Array, random: Random) -> Array:
    return _other_bytes(array, array.data + random.randbytes(random.choice([1, 3, 64, 100_000])))


def _garbage(array: Array, random: Random) -> Array:
    begin = random.choice([b"", b"PK\x03\x04", b"\x80\x04\x95", b"\x93NUMPY", array.data[:10]])
    return _other_bytes(array, begin + random.randbytes(random.choice([1, 77, 4_000_000])))


def _broken_header(array: Array, random: Random) -> Array:
    offset = 10 + int.from_bytes(array.data[8:10], "little")
    text, body = array.data[10:offset], array.data[offset:]
    changed = random.choice(
        [
            text.replace(b"'descr'", b"'decsr'"),
            text.replace(b"'shape'", b"'shade'"),
            text.replace(b"False", b"None "),
            text.replace(b"(", b"["),
            text.replace(b"(", b"(-"),
            text.replace(b"{", b"(" * 60),
            text.replace(b"{", b"-" * 900 + b"{"),
            b"(" * len(text),
            b"[" * 9000,
            b"__import__('os').abort()",
            b"\xff" * len(text),
            text[: len(text) // 2],
        ]
    )
    magic = random.choice(
        [b"\x93NUMPY\x01\x00", b"\x93NUMPY\x02\x00", b"\x93NUMPY\x03\x00", b"NUMPY\x93\x01\x00"]
    )
    width = 2 if magic[6] == 1 else 4
    return _other_bytes(array, magic + len(changed).to_bytes(width, "little") + changed + body)


def _huge_shape(array: Array, random: Random) -> Array:
    """Promise what would not fit into any memory, in a hundred bytes."""
    shape = random.choice(
        [
            (2**33,), (2**40,), (2**31, 7), (13, 2**28), (2**62,), (2**63, 2), (10**18, 10**18),
            (0, 2**62, 2**62), (2**16,) * 4, (1,) * 63 + (2**35,), (7,) * 40, (10**300,),
        ]
    )  # fmt: skip
    descr = random.choice(["<f4", "<f8", "|u1", "<i4", "<U999999", "|V999999999"])
    body = random.choice([b"", array.data[-91:]])
    data = npy(descr, "False", repr(shape), body)
    honest = random.random() < 0.5 and math.prod(shape) < 2**200
    said = shape if honest and max(shape) < 2**31 else array.shape
    return Array(array.dtype, said, array.stype, data)


def _lying(array: Array, random: Random) -> Array:
    said: dict[str, Any] = {"dtype": array.dtype, "shape": array.shape, "stype": array.stype}
    lies: list[dict[str, Any]] = [
        {"dtype": random.choice(["float99", "", "object", "complex128", LONG])},
        {"shape": (*array.shape, 1)},
        {"shape": random.choice([(-1,), (2**40, 2**20), (1,) * 200])},
        {"stype": random.choice(["pickle", "", "torch.tensor", LONG])},
    ]
    return Array(**{**said, "data": array.data, **random.choice(lies)})


def _big_endian(array: Numbers, random: Random) -> Numbers:
    if array.dtype.itemsize == 1:
        return array.astype(">i4")
    return array.astype(array.dtype.newbyteorder(">"))


def _objects(array: Array, random: Random) -> Array:
    """Send a pickle, which must never be opened."""
    data = npy("|O", "False", repr(array.shape), b"\x80\x04cos\nabort\n(tR.")
    return Array("object", array.shape, array.stype, data)


# --- Reports -------------------------------------------------------------------------------------


def _numbers(name: str, *values: Any) -> Spoil:
    """Report one of `values` as a number; ``None`` takes it away."""
    return lambda content, random: with_numbers(content, {name: random.choice(values)})


def _moved(name: str, *steps: int) -> Spoil:
    """Report a whole number that is another by one of some steps."""

    def spoil(content: RecordDict, random: Random) -> RecordDict:
        value = content.metric_records["report"][name]
        assert isinstance(value, int)
        return with_numbers(content, {name: value + random.choice(steps)})

    return spoil


def _metric(*values: Any) -> Spoil:
    """Report one of `values` as a metric, of those that are reported or another."""

    def spoil(content: RecordDict, random: Random) -> RecordDict:
        integers = {"partition-id", "num-examples", "round"}
        names = sorted(content.metric_records["report"].keys() - integers)
        name = random.choice([*names, "humidity", "accuracy", LONG, ESCAPES])
        return with_numbers(content, {name: random.choice(values)})

    return spoil


def _flood(content: RecordDict, random: Random) -> RecordDict:
    count = random.choice([1_001, 5_000, 20_000])
    name = random.choice(["seconds {}", "event {}", "accuracy_after_{}", "{}"])
    return with_numbers(content, {name.format(n): random.random() for n in range(count)})


def _share(content: RecordDict, random: Random) -> RecordDict:
    report = content.metric_records["report"]
    names = [name for name in report if "accuracy" in name]
    value = random.choice([-0.25, 1.5, -1e300, 1e300, 7, 10**18, math.nextafter(1, 2)])
    return with_numbers(content, {random.choice(names): value})


def _amount(begin: str, *values: float) -> Spoil:
    """Report an amount that cannot be under a name that begins with `begin`."""

    def spoil(content: RecordDict, random: Random) -> RecordDict:
        names = [name for name in content.metric_records["report"] if name.startswith(begin)]
        return with_numbers(content, {random.choice(names): random.choice(values)})

    return spoil


def _other_record(name: str) -> Spoil:
    """Send a record of another kind under a name, or none."""

    def spoil(content: RecordDict, random: Random) -> RecordDict:
        kinds = [ArrayRecord, ConfigRecord, MetricRecord]
        others = [kind() for kind in kinds if not isinstance(content[name], kind)]
        return with_records(content, **{name: random.choice([*others, None])})

    return spoil


# --- What is said of knowledge -------------------------------------------------------------------


def _kind_says(name: str, *values: Any) -> Spoil:
    def spoil(content: RecordDict, random: Random) -> RecordDict:
        was = content.config_records["knowledge-kind"].get(name)
        others = [value for value in values if (type(value), value) != (type(was), was)]
        return with_kind(content, **{name: random.choice(others)})

    return spoil


def _kind_without(content: RecordDict, random: Random) -> RecordDict:
    return with_kind(content, **{random.choice([*content.config_records["knowledge-kind"]]): None})


def _kind_more(content: RecordDict, random: Random) -> RecordDict:
    return with_kind(content, **{random.choice(["more", LONG, ESCAPES]): random.choice([1, "a"])})


def _array_more(content: RecordDict, random: Random) -> RecordDict:
    name = random.choice(["more", "value", LONG, ESCAPES, "samples "])
    return with_arrays(content, {name: Array(np.zeros(3, np.float32))})


def _arrays_many(content: RecordDict, random: Random) -> RecordDict:
    array = Array(np.zeros(1, np.float32))
    return with_arrays(content, {f"more {n}": array for n in range(random.choice([2, 300]))})


def _array_less(content: RecordDict, random: Random) -> RecordDict:
    return with_arrays(content, {random.choice([*content.array_records["knowledge"]]): None})


def _array_renamed(content: RecordDict, random: Random) -> RecordDict:
    name, array = _array(content, random)
    return with_arrays(content, {name: None, random.choice(["Values", "", LONG]): array})


def _unasked_knowledge(content: RecordDict, random: Random) -> RecordDict:
    kinds: list[dict[str, Any]] = [
        {"kind": "soft-labels", "space": "logits", "wire": "float32", "sets": 1, "samples": "all"},
        {"kind": "weights", "model": "mlp-3"},
        {"kind": "class-means", "of": "probabilities"},
    ]
    arrays = {"values": Array(np.zeros((13, 7), np.float32))}
    kind = random.choice(kinds)
    if kind["kind"] == "class-means":
        arrays = {
            "values": Array(np.zeros((7, 7), np.float32)),
            "counts": Array(np.zeros(7, "<i4")),
        }
    records = with_records(content, knowledge=ArrayRecord(arrays))
    return with_records(records, knowledge_kind=ConfigRecord(kind))


# --- Soft labels ---------------------------------------------------------------------------------


def _rows(content: RecordDict) -> int:
    """Return how many samples the values of a reply may be for; raw ones say so themselves."""
    values = arrays_of(content)["values"]
    return int(values.shape[0]) if values.ndim == 2 else 11


def _samples(draw: Callable[[int, Random], Numbers]) -> Spoil:
    """Name samples that are none."""

    def spoil(content: RecordDict, random: Random) -> RecordDict:
        listed = with_kind(content, samples="listed")
        return with_arrays(listed, {"samples": Array(draw(_rows(content), random))})

    return spoil


def _out_of_range(count: int, random: Random) -> Numbers:
    samples = np.arange(max(count, 1), dtype=np.int32)
    wrong = [-1, 13, 14, 2**31 - 1, -(2**31), 10**6]
    samples[random.randrange(len(samples))] = random.choice(wrong)
    return samples


def _repeated(count: int, random: Random) -> Numbers:
    samples = np.arange(max(count, 2), dtype=np.int32) % 13
    samples[0] = samples[1]
    return samples


def _no_samples(count: int, random: Random) -> Numbers:
    samples = np.arange(max(count, 1), dtype=np.int64)
    others: list[Numbers] = [
        samples,
        samples.astype(np.float32),
        np.full(count, math.nan, np.float32),
        samples.astype(np.int32)[None],
        np.zeros(random.choice([0, 1, 3, 100]), np.uint8),  # 13 samples are two bytes of bits
        np.full(2, 255, np.uint8),  # bits behind the 13th
        np.array(5, np.int32),
        samples.astype(bool),
        np.arange(1000, dtype=np.int32),
    ]
    return random.choice(others)


# --- Probabilities and codes ---------------------------------------------------------------------


def _negative(values: Numbers, random: Random) -> Numbers:
    row, first, second = random.randrange(len(values)), *random.sample(range(values.shape[1]), 2)
    values[row, second] += values[row, first] + 0.25
    values[row, first] = -0.25
    return values


def _off_simplex(values: Numbers, random: Random) -> Numbers:
    row = random.randrange(len(values))
    values[row] *= random.choice([0, 0.5, 0.99, 1.01, 2, 1000])
    return values


def _off_codes(values: Numbers, random: Random) -> Numbers:
    row = values[random.randrange(len(values))]
    place = random.randrange(len(row))
    row[place] = (int(row[place]) + random.randrange(1, 200)) % 256
    return values


def _bomb(content: RecordDict, random: Random) -> RecordDict:
    """Send a few kilobytes that inflate to a hundred megabytes."""
    return with_arrays(
        content, {"values": Array(np.frombuffer(_bombs()[random.randrange(2)], "u1"))}
    )


_made: list[bytes] = []


def _bombs() -> list[bytes]:
    if not _made:
        _made.extend(zlib.compress(bytes([fill]) * 100_000_000, 9) for fill in (0, 255))
    return _made


def _no_stream(values: Numbers, random: Random) -> Numbers:
    """Send bytes of the right kind and of a wrong number."""
    lengths = [n for n in (0, 1, 5, 333, 1_000_001, len(values) + 4) if n != len(values)]
    return np.frombuffer(random.randbytes(random.choice(lengths)), np.uint8)


def _trailing(values: Numbers, random: Random) -> Numbers:
    return np.concatenate([values, np.zeros(random.choice([1, 4, 1000]), np.uint8)])


def _changed(values: Numbers, random: Random) -> Numbers:
    others: list[Numbers] = [
        np.zeros(random.choice([0, 1, 3, 99]), np.uint8),
        np.full(2, 255, np.uint8),
        values.astype(np.int64),
        values[None],
    ]
    return random.choice(others)


def _changed_spoilt(content: RecordDict, random: Random) -> RecordDict:
    array = _changed(arrays_of(content)["changed"], random)
    return with_arrays(content, {"changed": Array(array)})


# --- Class means and weights ---------------------------------------------------------------------


def _counts(content: RecordDict, random: Random) -> RecordDict:
    counts = arrays_of(content)["counts"]
    others: list[Numbers] = [
        counts + 1,
        counts * 0,
        counts.astype(np.int64),
        counts.astype(np.float32),
        counts[:-1],
        np.full(len(counts), 2**31 - 1, np.int32),
    ]
    moved = counts.copy()
    moved[0], moved[1] = -1, counts[0] + counts[1] + 1
    return with_arrays(content, {"counts": Array(random.choice([*others, moved]))})


# --- The list ------------------------------------------------------------------------------------

_VAST = 2**63
CASES: dict[str, Case] = {
    "nothing": Case(lambda c, r: RecordDict(), "^sends no report$"),
    "report-of-another-kind": Case(_other_record("report"), "^sends no report$"),
    "report-empty": Case(
        lambda c, r: with_records(c, report=MetricRecord()), "partition-id = None"
    ),
    "partition-missing": Case(_numbers("partition-id", None), "partition-id = None"),
    "partition-of-another": Case(
        _moved("partition-id", 1, -1, 1000, 2**62, -(2**62)), "for partition"
    ),
    "partition-no-number": Case(_numbers("partition-id", 1.0, math.nan, [1], []), "whole number"),
    "partition-vast": Case(
        _numbers("partition-id", _VAST, -_VAST, 10**5000), "64 bits", on_wire=False
    ),
    "examples-missing": Case(_numbers("num-examples", None), "num-examples = None"),
    "examples-absurd": Case(
        _numbers("num-examples", 0, -1, -39, 10**12, 2**62, 2**63 - 1),
        "num-examples = .* of a partition",
    ),
    "examples-no-number": Case(_numbers("num-examples", 38.0, math.inf, [38], []), "whole number"),
    "examples-vast": Case(_numbers("num-examples", _VAST, 10**5000), "64 bits", on_wire=False),
    "round-missing": Case(_numbers("round", None), "replies to no round that it names"),
    "round-of-another": Case(_moved("round", 1, -1, -9, 10**9, 2**62), "replies to .* in round"),
    "round-no-number": Case(_numbers("round", 2.0, math.nan, [2]), "round = .* whole number"),
    "metric-not-finite": Case(_metric(math.nan, math.inf, -math.inf), "not finite"),
    "metric-no-number": Case(_metric([1.0, 2.0], [], [10**6] * 1000), "not finite"),
    "metric-vast": Case(_metric(_VAST, -_VAST, 10**5000), "64 bits", on_wire=False),
    "metric-flood": Case(_flood, r"reports \d+ numbers"),
    "share-out-of-range": Case(_share, "which must be 0 to 1"),
    "loss-absurd": Case(_amount("loss_", 1e39, -1e39, 1.7e308), "loss_.* which must be"),
    "norm-absurd": Case(_amount("gradient_norm_", -1.0, 1e39), "gradient_norm_.* which must be"),
    "seconds-absurd": Case(
        _amount("seconds ", -1.0, 1e10, 1.7e308, -(2**62)), "which must be 0 to 1e"
    ),
    "events-absurd": Case(
        _numbers("event out-of-memory", -1, 10**12, 2**62), "out-of-memory = .* which must be"
    ),
    "events-no-number": Case(_numbers("event out-of-memory", 0.5, math.nan, [1]), "whole number"),
    "unasked-knowledge": Case(_unasked_knowledge, "was not asked for", "nothing"),
    # Knowledge of any kind.
    "knowledge-of-another-kind": Case(
        _other_record("knowledge"), "does not send the|knowledge", "arrays"
    ),
    "knowledge-empty": Case(
        lambda c, r: with_records(c, knowledge=ArrayRecord()),
        "no values|arrays = |other parameters",
        "arrays",
    ),
    "kind-of-another-kind": Case(
        _other_record("knowledge-kind"), "kind = None: must be one of", "arrays"
    ),
    "kind-unknown": Case(
        _kind_says("kind", "dreams", "", LONG, ESCAPES), "must be one of", "arrays"
    ),
    "kind-no-text": Case(
        _kind_says("kind", 3, 1.5, True, b"kind", [1], ["a"]), "must be one of", "arrays"
    ),
    "kind-of-others": Case(
        _kind_says("kind", "weights", "class-means", "soft-labels"),
        "must be described by",
        "arrays",
    ),
    "kind-less": Case(_kind_without, "must be described by|must be one of", "arrays"),
    "kind-more": Case(_kind_more, "must be described by", "arrays"),
    "array-more": Case(_array_more, "arrays = |come with|other parameters", "arrays"),
    "arrays-many": Case(_arrays_many, "arrays = |come with|other parameters", "arrays"),
    "array-less": Case(_array_less, "arrays = |it has no|other parameters", "arrays"),
    "array-renamed": Case(_array_renamed, "arrays = |it has no|other parameters", "arrays"),
    "shape": Case(_with_values(_other_shape), "shape|must be|bytes|range code", "arrays"),
    "type": Case(_with_values(_other_type), "must be|numbers of type|shape|no .npy", "arrays"),
    "big-endian": Case(_with_values(_big_endian), "numbers of type '>", "arrays"),
    "cut-off": Case(_with_array(_cut), "not a .npy array|bytes", "arrays"),
    "longer": Case(_with_array(_longer), "bytes: .* must have", "arrays"),
    "garbage": Case(_with_array(_garbage), "not a .npy array", "arrays"),
    "header-broken": Case(_with_array(_broken_header), "not a .npy array", "arrays"),
    "shape-of-terabytes": Case(
        _with_array(_huge_shape), "no tensor has|numbers of type|bytes: .* must have", "arrays"
    ),
    "array-that-lies": Case(_with_array(_lying), "declared as|is stored as", "arrays"),
    "pickle": Case(_with_array(_objects), "numbers of type '|O'", "arrays"),
    "nan": Case(_floats(_with(math.nan)), "NaN or infinity", "floats"),
    "infinity": Case(_floats(_with(math.inf, -math.inf)), "NaN or infinity", "floats"),
    # Soft labels.
    "space-unknown": Case(_kind_says("space", "dreams", "", LONG, ESCAPES), "space = ", "labels"),
    "space-no-text": Case(
        _kind_says("space", 1, b"logits", ["logits"]), "must be described", "labels"
    ),
    "space-another": Case(
        _kind_says("space", "logits", "probabilities"),
        "does not send the .* that were asked for",
        "labels",
    ),
    "wire-unknown": Case(
        _kind_says("wire", "float33", "", LONG, ESCAPES, "raw+all", "float32+bits"),
        "codec = ",
        "labels",
    ),
    "wire-another": Case(
        _kind_says(
            "wire",
            "float32",
            "float16",
            "simplex:8",
            "simplex:1+changed+range",
            "deflate",
            "float16+changed+deflate",
        ),
        "where one set as .* was asked for",
        "labels",
    ),
    "sets-absurd": Case(
        _kind_says("sets", 0, -1, 2, 10**6, 2**62), "where one set as|sets = ", "labels"
    ),
    "sets-no-number": Case(_kind_says("sets", 1.0, "1", True, [1]), "must be described", "labels"),
    "samples-unknown": Case(
        _kind_says("samples", "some", "", LONG, ESCAPES), "samples = ", "labels"
    ),
    "samples-missing": Case(
        lambda c, r: with_kind(c, samples="listed"), "it has no samples", "labels"
    ),
    "samples-out-of-range": Case(
        _samples(_out_of_range), r"must be in 0 \.\. 12|at most 13", "labels"
    ),
    "samples-repeated": Case(_samples(_repeated), "occur twice", "labels"),
    "samples-of-no-kind": Case(
        _samples(_no_samples),
        "samples (are|is|has|have)|behind its end|at most 13|bytes|values",
        "labels",
    ),
    "probability-negative": Case(_values(_negative), "negative probabilities", "probabilities"),
    "rows-off-the-simplex": Case(_values(_off_simplex), "sums differ from 1", "probabilities"),
    "codes-off-the-simplex": Case(_values(_off_codes), "row of codes with sum", "simplex raw"),
    "bomb": Case(_bomb, "inflate|bytes: must be|multiple of 4|range code|behind its end", "packed"),
    "no-stream": Case(
        _values(_no_stream), "zlib|inflate|bytes: must be|multiple of 4|range code", "packed"
    ),
    "trailing-bytes": Case(
        _values(_trailing), "inflate|bytes: must be|multiple of 4|range code", "packed"
    ),
    "changed-spoilt": Case(_changed_spoilt, "changed|values", "changed"),
    # Class means and weights.
    "of-another": Case(
        _kind_says("of", "features", "probabilities", "logits", "", LONG),
        "does not send the means",
        "class-means",
    ),
    "counts-spoilt": Case(_counts, "counts", "class-means"),
    "means-beyond-belief": Case(
        _values(lambda values, random: np.full_like(values, random.choice([1e20, -3e38]))),
        "simplex|negative prob|sums differ|class means with which losses or gradients are not finite",
        "class-means",
    ),
    "weights-beyond-belief": Case(
        _every_float(1e20, 3e38), "weights with which predictions are not finite", "weights"
    ),
    "model-another": Case(
        _kind_says("model", "lenet", "", "mlp-9", LONG, ESCAPES),
        "does not send the weights of",
        "weights",
    ),
}


def cases_for(content: RecordDict) -> Iterator[str]:
    """Name the ways to spoil an honest reply."""
    return (name for name, case in CASES.items() if fits(case.needs, content))


# --- Data that travels by name -------------------------------------------------------------------


def seven_classes(folder: Path) -> Dataset:
    """Return 151 training images and 61 test images of 4 × 4 pixels in 7 classes, easily told apart."""
    generator = torch.Generator().manual_seed(7)
    patterns = torch.randint(0, 200, (7, 1, 4, 4), generator=generator)

    def images(count: int) -> tuple[torch.Tensor, torch.Tensor]:
        labels = torch.randint(0, 7, (count,), generator=generator)
        noise = torch.randint(0, 56, (count, 1, 4, 4), generator=generator)
        return (patterns[labels] + noise).to(torch.uint8), labels

    names = tuple("abcdefg")
    return Dataset("seven", *images(151), *images(61), names, (0.5,), (0.25,))
