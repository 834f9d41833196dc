"""Codecs: nearest codes by brute force, exact bytes, exact round trips, and nothing but FedkdError."""

from __future__ import annotations

import contextlib
import io
import itertools
import math
import re
import sys
import zlib
from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from paths import DOCS
from torch import Tensor

from fedkd.errors import FedkdError
from fedkd.knowledge import Wire
from fedkd.knowledge.codec import KnownRows, Packed, pack, pack_samples, unpack, unpack_samples
from fedkd.knowledge.wire import NUMBERS, PACKS, PLAIN, ROWS, parse_codec


def makes_sense(number: str, packing: str) -> bool:
    return packing in ("raw", "deflate") or number.startswith("simplex")


WIRES = [
    Wire(number, rows, packing)
    for number, rows, packing in itertools.product(NUMBERS, ROWS, PACKS)
    if makes_sense(number, packing)
]
ALL_ROWS = [wire for wire in WIRES if wire.rows == "all"]
BITS = {"simplex:8": 8, "simplex:4": 4, "simplex:2": 2, "simplex:1": 1}
P = 23
EVERY = pytest.mark.parametrize("wire", WIRES, ids=str)


def logits(*shape: int, seed: int = 0, scale: float = 3.0) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def labels(space: str, *shape: int, seed: int = 0) -> Tensor:
    values = logits(*shape, seed=seed)
    return values if space == "logits" else values.softmax(-1)


def there_and_back(values: Tensor, space: str, wire: Wire) -> tuple[Tensor, Packed]:
    samples = torch.arange(values.shape[1])
    packed, _ = pack(values, space, samples, wire, len(samples))
    return unpack(packed, len(samples))[0], packed


def payload(packed: Packed) -> int:
    return sum(array.numel() * array.element_size() for array in packed.arrays.values())


# --- The three slots


def test_a_codec_is_read_and_written() -> None:
    assert len(WIRES) == 2 * (2 * 2 + 4 * 4)
    for wire in WIRES:
        assert Wire.parse(str(wire)) == wire
    assert str(Wire("simplex:1", "changed", "range")) == "simplex:1+changed+range"
    assert str(Wire(rows="changed")) == "changed"
    assert str(PLAIN) == "float32"
    assert Wire.parse("float32+all+raw") == Wire.parse("raw") == PLAIN
    assert Wire.parse("simplex:2+bits") == Wire("simplex:2", "all", "bits")


def test_up_and_down_may_differ() -> None:
    assert parse_codec("simplex:1+bits/float16") == (
        Wire("simplex:1", "all", "bits"),
        Wire("float16"),
    )
    assert parse_codec("changed") == (Wire(rows="changed"), Wire(rows="changed"))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ["codec = '':", "float32"]),
        ("simplex:3", ["codec = 'simplex:3':", "simplex:4", "did you mean"]),
        ("simplex:1+", ["codec = 'simplex:1+':", "''"]),
        ("changed+simplex:1", ["'simplex:1' is out of place", "number+rows+pack"]),
        ("simplex:1+simplex:1", ["out of place"]),
        ("bits", ["pack = 'bits'", "number = 'float32'", "simplex:8"]),
        ("float16+range", ["pack = 'range'", "number = 'float16'"]),
        (" float32", ["' float32'"]),
    ],
)
def test_what_is_no_codec_is_refused(text: str, words: list[str]) -> None:
    for parse in (Wire.parse, parse_codec):
        with pytest.raises(FedkdError) as caught:
            parse(text)
        assert str(caught.value).startswith(f"codec = {text!r}: ")
        assert all(word in str(caught.value) for word in words), str(caught.value)


@pytest.mark.parametrize("text", ["float32/float32/float32", "float32/", "/", "float32/bits"])
def test_what_is_no_pair_is_refused(text: str) -> None:
    with pytest.raises(FedkdError, match=f"^codec = '{text}': "):
        parse_codec(text)


@pytest.mark.parametrize(
    ("slots", "words"),
    [
        ({"number": "int8"}, "number = 'int8': must be one of float32, float16, simplex:8"),
        ({"rows": "some"}, "rows = 'some': must be one of all, changed"),
        ({"pack": "gzip"}, "pack = 'gzip': must be one of raw, bits, deflate, range"),
    ],
)
def test_a_slot_names_what_it_accepts(slots: dict[str, str], words: str) -> None:
    with pytest.raises(FedkdError, match=words):
        Wire(**slots)


# --- Numbers


def all_codes(steps: int, classes: int) -> np.ndarray[Any, Any]:
    """Every way to spread `steps` over `classes`."""
    rows = itertools.product(range(steps + 1), repeat=classes - 1)
    return np.array([(*row, steps - sum(row)) for row in rows if sum(row) <= steps])


@pytest.mark.parametrize(("b", "classes"), [(1, 2), (1, 5), (2, 2), (2, 3), (2, 5), (4, 3), (8, 2)])
def test_codes_are_the_nearest_point_of_the_simplex(b: int, classes: int) -> None:
    steps = 2**b - 1
    wire = Wire(f"simplex:{b}")
    values = labels("probabilities", 1, 53, classes, seed=b)
    found = there_and_back(values, "probabilities", wire)[1].arrays["values"].numpy()
    candidates = all_codes(steps, classes)
    exact = values[0].double()
    wanted = (exact / exact.sum(-1, keepdim=True)).numpy()
    assert (found.sum(-1) == steps).all()
    for p, code in zip(wanted, found, strict=True):
        for order in (1, 2):
            distances = (np.abs(candidates / steps - p) ** order).sum(-1)
            mine = (np.abs(code / steps - p) ** order).sum()
            assert mine <= distances.min() + 1e-12
            assert distances.max() > mine  # the comparison can fail


@pytest.mark.parametrize(
    ("b", "row", "code"),
    [
        (1, [0.25, 0.25, 0.25, 0.25], [1, 0, 0, 0]),
        (1, [0.0, 0.5, 0.5, 0.0], [0, 1, 0, 0]),
        (2, [0.25, 0.25, 0.25, 0.25], [1, 1, 1, 0]),
        (2, [0.5, 0.0, 0.0, 0.5], [2, 0, 0, 1]),
        (4, [0.5, 0.5, 0.0, 0.0], [8, 7, 0, 0]),
        (8, [0.0, 1.0, 0.0, 0.0], [0, 255, 0, 0]),
        (8, [0.25, 0.25, 0.25, 0.25], [64, 64, 64, 63]),
    ],
)
def test_of_equals_the_lowest_class_wins(b: int, row: list[float], code: list[int]) -> None:
    values = torch.tensor([[row]])
    for space, given_values in (
        ("probabilities", values),
        ("logits", values.clamp_min(1e-30).log()),
    ):
        _, packed = there_and_back(given_values, space, Wire(f"simplex:{b}"))
        assert packed.arrays["values"].tolist() == [code]


@pytest.mark.parametrize("b", [8, 4, 2, 1])
@pytest.mark.parametrize("classes", [1, 2, 7, 100])
@pytest.mark.parametrize("space", ["logits", "probabilities"])
@pytest.mark.parametrize("sharpness", [0.1, 1.0, 5.0])
def test_a_second_passage_changes_nothing(
    b: int, classes: int, space: str, sharpness: float
) -> None:
    values = sharpness * labels("logits", 3, 11, classes)
    values = values if space == "logits" else values.softmax(-1)
    once, first = there_and_back(values, space, Wire(f"simplex:{b}"))
    twice, second = there_and_back(once, space, Wire(f"simplex:{b}"))
    assert torch.equal(first.arrays["values"], second.arrays["values"])
    assert torch.equal(once, twice)


def test_codes_come_back_as_probabilities_and_as_finite_logits() -> None:
    row = torch.tensor([[[0.7, 0.3, 0.0, 0.0, 0.0]]])
    (back,), _ = there_and_back(row, "probabilities", Wire("simplex:2"))
    assert back.tolist() == [pytest.approx([2 / 3, 1 / 3, 0, 0, 0])]
    (back,), packed = there_and_back(row.clamp_min(1e-9).log(), "logits", Wire("simplex:2"))
    # By hand: each of three zeros counts 1/10 of a step, so the row sums to 3.3 steps.
    wanted = [math.log(2 / 3.3), math.log(1 / 3.3)] + 3 * [math.log(0.1 / 3.3)]
    assert back.tolist() == [pytest.approx(wanted)]
    assert packed.space == "logits"


@pytest.mark.parametrize("b", [4, 8])
def test_logits_survive_as_well_as_their_probabilities(b: int) -> None:
    """No probability moves by more than a step (rounding) and half a step (the zeros' share)."""
    values = logits(1, 53, 7, scale=1.0)
    back, _ = there_and_back(values, "logits", Wire(f"simplex:{b}"))
    error = (back.softmax(-1) - values.softmax(-1)).abs().max()
    assert 0 < error <= 1.5 / (2**b - 1)


@pytest.mark.parametrize("space", ["logits", "probabilities"])
@pytest.mark.parametrize("packing", ["raw", "deflate"])
def test_floats_come_back(space: str, packing: str) -> None:
    values = labels(space, 3, 11, 7)
    assert torch.equal(there_and_back(values, space, Wire("float32", "all", packing))[0], values)
    half = there_and_back(values, space, Wire("float16", "all", packing))[0]
    wanted = values.numpy().astype(np.float16).astype(np.float32)
    assert half.dtype == torch.float32
    assert np.array_equal(half.numpy(), wanted)


def test_large_logits_stay_finite_and_infinite_ones_do_not() -> None:
    values = torch.tensor([[[1e30, -1e30, 1.0], [math.inf, -math.inf, math.nan]]])
    (back,), _ = there_and_back(values, "logits", Wire("float16"))
    assert back[0].tolist() == [65504.0, -65504.0, 1.0]
    assert back[1, :2].tolist() == [math.inf, -math.inf]
    assert math.isnan(back[1, 2])


@pytest.mark.parametrize("b", [1, 8])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_does_not_go_on_the_simplex(b: int, bad: float) -> None:
    values = logits(1, 5, 7)
    values[0, 2, 3] = bad
    with pytest.raises(FedkdError, match=f"NaN or infinity: must be finite for simplex:{b}"):
        there_and_back(values, "logits", Wire(f"simplex:{b}"))


@pytest.mark.parametrize("row", [[0.0, 0.0], [1.5, -0.5]])
def test_what_is_no_probability_does_not_go_on_the_simplex(row: list[float]) -> None:
    with pytest.raises(FedkdError, match="negative probabilities or rows of zeros"):
        there_and_back(torch.tensor([[row]]), "probabilities", Wire("simplex:4"))


@given(
    st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=13),
    st.sampled_from(["simplex:8", "simplex:4", "simplex:2", "simplex:1"]),
)
@settings(deadline=None, max_examples=100)
def test_any_logits_give_codes_on_the_simplex(row: list[float], number: str) -> None:
    wire = Wire(number, "all", "bits")
    back, _ = there_and_back(torch.tensor([[row]]), "logits", wire)
    assert bool(back.isfinite().all())
    if number == "simplex:1":
        first = row.index(max(row))
        assert int(back.argmax()) == first


# --- Bytes


def formula(wire: Wire, rows: int, sets: int, classes: int) -> int | None:
    """Bytes of the values as the page says; None where they depend on the values."""
    width = sets * classes
    if wire.pack == "raw":
        return rows * width * {"float32": 4, "float16": 2}.get(wire.number, 1)
    if wire.pack == "bits" and wire.number == "simplex:1":
        return math.ceil(rows * sets * math.ceil(math.log2(classes)) / 8)
    if wire.pack == "bits":
        return math.ceil(rows * width * BITS[wire.number] / 8)
    return None


def in_the_open(packed: Packed, sets: int, classes: int) -> bytes:
    """What deflate is to compress, from the codes that raw would send, by whole-number arithmetic."""
    wire = packed.wire
    raw = replace(wire, pack="raw")
    values, _ = unpack(packed, P)
    codes = pack(values, packed.space, packed.samples, raw, P)[0].arrays["values"].numpy()
    if wire.number != "simplex:1":
        return codes.tobytes()
    width = math.ceil(math.log2(classes))
    text = "".join(
        f"{winner:0{width}b}" if width else ""
        for winner in codes.reshape(-1, classes).argmax(-1).tolist()
    )
    text += "0" * (-len(text) % 8)
    return int(text or "0", 2).to_bytes(len(text) // 8, "big")


@pytest.mark.parametrize("space", ["logits", "probabilities"])
@pytest.mark.parametrize(("sets", "n", "classes"), [(1, 11, 7), (3, 5, 10), (1, 0, 7), (1, 11, 2)])
@EVERY
def test_bytes_are_exact(wire: Wire, sets: int, n: int, classes: int, space: str) -> None:
    samples = torch.randperm(P, generator=torch.Generator().manual_seed(1))[:n]
    packed, _ = pack(labels(space, sets, n, classes), space, samples, wire, P)
    found = packed.arrays["values"].numel() * packed.arrays["values"].element_size()
    wanted = formula(wire, n, sets, classes)
    if wanted is not None:
        assert found == wanted
    if wire.pack == "deflate":
        assert packed.arrays["values"].numpy().tobytes() == zlib.compress(
            in_the_open(packed, sets, classes), 9
        )
    bitmap = math.ceil(n / 8) if wire.rows == "changed" else 0
    assert payload(packed) == found + bitmap
    assert all(a.is_contiguous() and a.device.type == "cpu" for a in packed.arrays.values())


@pytest.mark.parametrize("classes", [1, 2, 3, 5, 100, 300])
def test_bits_are_packed_the_highest_first(classes: int) -> None:
    """Against Python's whole numbers."""
    values = logits(1, 13, classes, seed=classes)
    for number, width in (
        ("simplex:1", math.ceil(math.log2(classes))),
        ("simplex:2", 2),
        ("simplex:4", 4),
    ):
        raw = there_and_back(values, "logits", Wire(number))[1].arrays["values"].numpy()
        symbols = raw.argmax(-1) if number == "simplex:1" else raw.reshape(-1)
        text = "".join(f"{s:0{width}b}" for s in symbols.tolist()) if width else ""
        text += "0" * (-len(text) % 8)
        wanted = [int(text[i : i + 8], 2) for i in range(0, len(text), 8)]
        packed = there_and_back(values, "logits", Wire(number, "all", "bits"))[1]
        assert packed.arrays["values"].tolist() == wanted


def entropy_bytes(symbols: list[Any]) -> float:
    counts = Counter(symbols)
    total = len(symbols)
    return -sum(c * math.log2(c / total) for c in counts.values()) / 8


@pytest.mark.parametrize("classes", [2, 10, 100])
@pytest.mark.parametrize("n", [53, 1009])
@pytest.mark.parametrize("skew", [0.0, 2.0])
def test_range_coding_of_classes_comes_near_their_entropy(
    classes: int, n: int, skew: float
) -> None:
    """No model travels; learning it costs about a bit for each class and doubling of the rows."""
    values = logits(1, n, classes, seed=n) + skew * logits(1, 1, classes, seed=3)
    _, packed = there_and_back(values, "logits", Wire("simplex:1", "all", "range"))
    bound = entropy_bytes(values[0].argmax(-1).tolist())
    learning = (classes - 1) * math.log2(n) / 8
    found = payload(packed)
    assert bound <= found <= bound + learning + 8
    if n > 1000 and classes > 2:  # two classes at even odds leave nothing to gain
        assert found < math.ceil(n * math.ceil(math.log2(classes)) / 8)


@pytest.mark.parametrize("number", ["simplex:8", "simplex:4", "simplex:2"])
@pytest.mark.parametrize("sharpness", [0.3, 1.0, 3.0])
def test_range_coding_of_codes_beats_their_entropy_and_deflate(
    number: str, sharpness: float
) -> None:
    """The entropy of a code by itself: what is left of the row says more, so it is beaten."""
    values = sharpness * logits(1, 1009, 10)
    _, raw = there_and_back(values, "logits", Wire(number))
    _, deflated = there_and_back(values, "logits", Wire(number, "all", "deflate"))
    _, ranged = there_and_back(values, "logits", Wire(number, "all", "range"))
    alone = entropy_bytes(raw.arrays["values"].reshape(-1).tolist())
    rows = entropy_bytes([tuple(row) for row in raw.arrays["values"].tolist()])
    assert payload(ranged) < payload(deflated)
    assert payload(ranged) < 1.02 * alone + 8
    # Below is not possible for independent rows, but for how few of them there are.
    assert number != "simplex:2" or sharpness < 3 or payload(ranged) > 0.9 * rows


@pytest.mark.parametrize("number", ["simplex:8", "simplex:4", "simplex:2", "simplex:1"])
def test_rows_that_are_all_alike_cost_next_to_nothing(number: str) -> None:
    """Class indices; codes of more bits pay half a byte a row for where the class stands."""
    values = torch.eye(10)[3].expand(1, 1009, 10)
    back, packed = there_and_back(values, "probabilities", Wire(number, "all", "range"))
    assert torch.equal(back, values)
    assert payload(packed) <= (40 if number == "simplex:1" else 1009 / 2)


# --- Round trips


@pytest.mark.parametrize("space", ["logits", "probabilities"])
@pytest.mark.parametrize(
    ("sets", "n", "classes"),
    [(1, 11, 7), (3, 5, 10), (1, 0, 7), (1, 13, 2), (2, 23, 100), (1, 5, 1)],
)
@EVERY
def test_packing_loses_nothing(wire: Wire, sets: int, n: int, classes: int, space: str) -> None:
    """Whatever the packing, what arrives is what the plain codes stand for."""
    samples = torch.randperm(P, generator=torch.Generator().manual_seed(2))[:n]
    values = labels(space, sets, n, classes, seed=5)
    packed, sent = pack(values, space, samples, wire, P)
    back, kept = unpack(packed, P)
    plain, _ = pack(values, space, samples, Wire(wire.number), P)
    assert torch.equal(back, unpack(plain, P)[0])
    assert back.shape == values.shape
    assert back.dtype == torch.float32
    assert (sent is None) == (kept is None) == (wire.rows == "all")
    if sent is not None and kept is not None:
        assert torch.equal(sent.codes, kept.codes)
        assert sorted(kept.known.nonzero().flatten().tolist()) == sorted(samples.tolist())


@pytest.mark.parametrize("wire", [w for w in ALL_ROWS if w.pack == "range"], ids=str)
@given(st.integers(1, 70), st.integers(1, 12), st.floats(0, 30), st.integers(0, 2**31))
@settings(deadline=None, max_examples=25)
def test_range_coding_is_exact(wire: Wire, n: int, classes: int, scale: float, seed: int) -> None:
    values = logits(1, n, classes, seed=seed, scale=scale)
    back, _ = there_and_back(values, "logits", wire)
    plain, _ = there_and_back(values, "logits", Wire(wire.number))
    assert torch.equal(back, plain)


def test_the_simplex_in_two_sets_is_kept_in_each() -> None:
    values = labels("probabilities", 3, 5, 7)
    _, packed = there_and_back(values, "probabilities", Wire("simplex:4"))
    rows = packed.arrays["values"]
    assert rows.shape == (5, 21)
    assert (rows.reshape(5, 3, 7).sum(-1) == 15).all()
    # A sample's row is its sets one after another.
    single = [there_and_back(v[None], "probabilities", Wire("simplex:4"))[1] for v in values]
    assert torch.equal(rows, torch.cat([s.arrays["values"] for s in single], 1))


def test_without_the_extra_range_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    wire = Wire("simplex:1", "all", "range")
    _, packed = there_and_back(logits(1, 5, 7), "logits", wire)
    monkeypatch.setitem(sys.modules, "constriction", None)
    message = r"pack = 'range' needs constriction: pip install 'fedkd\[codec\]'"
    with pytest.raises(FedkdError, match=message):
        there_and_back(logits(1, 5, 7), "logits", wire)
    with pytest.raises(FedkdError, match=message):
        unpack(packed, 5)


def test_the_range_code_is_the_same_on_every_machine() -> None:
    """A text that was written once; whoever changes the model sees it here."""
    values = torch.tensor([[[5, 1, 0], [0, 4, 2], [3, 3, 1], [0, 0, 9.0], [2, 0, 1], [8, 1, 1]]])
    values = values / values.sum(-1, keepdim=True)
    _, one = there_and_back(values, "probabilities", Wire("simplex:1", "all", "range"))
    _, eight = there_and_back(values, "probabilities", Wire("simplex:8", "all", "range"))
    assert one.arrays["values"].numpy().tobytes().hex() == "0af3c322"
    assert eight.arrays["values"].numpy().tobytes().hex() == "5dfde0d027254fa62092f6e1"


# --- Changed rows


CHANGED = [wire for wire in WIRES if wire.rows == "changed"]


@pytest.mark.parametrize("wire", CHANGED, ids=str)
def test_peers_stay_in_step_though_messages_get_lost(wire: Wire) -> None:
    """The sender rolls back what was lost; the receiver's rows are what a full message would say."""
    generator = torch.Generator().manual_seed(11)
    table = labels("probabilities", 1, P, 7)
    sender: KnownRows | None = None
    receiver: KnownRows | None = None
    saved = 0
    for turn in range(9):
        n = int(torch.randint(0, P + 1, (), generator=generator))
        samples = torch.randperm(P, generator=generator)[:n]
        table[0, turn::5] = labels("probabilities", 1, P, 7, seed=turn)[0, turn::5]
        values = table[:, samples]
        before = None if sender is None else (sender.codes.clone(), sender.known.clone())
        packed, after = pack(values, "probabilities", samples, wire, P, sender)
        if before is not None and sender is not None:
            assert torch.equal(sender.codes, before[0])
            assert torch.equal(sender.known, before[1])
        plain = replace(wire, rows="all")
        wanted, _ = unpack(pack(values, "probabilities", samples, plain, P)[0], P)
        saved += n - int(np.unpackbits(packed.arrays["changed"].numpy()).sum())
        got, kept = unpack(packed, P, receiver)
        assert torch.equal(got, wanted)
        if turn % 3 != 1:  # else the reply is lost: both ends forget
            sender, receiver = after, kept
        if sender is not None and receiver is not None:
            assert torch.equal(sender.codes, receiver.codes)
            assert torch.equal(sender.known, receiver.known)
    assert saved > P


@pytest.mark.parametrize("number", NUMBERS)
def test_only_rows_that_changed_are_sent(number: str) -> None:
    wire = Wire(number, "changed")
    samples = torch.tensor([4, 0, 19, 7, 22])
    values = labels("probabilities", 2, 5, 7)
    _, known = pack(values, "probabilities", samples, wire, P)
    again, _ = pack(values, "probabilities", samples, wire, P, known)
    assert again.arrays["changed"].tolist() == [0]
    assert again.arrays["values"].shape == (0, 14)
    other = values.clone()
    other[1, 3] = other[1, 3].roll(1)  # sample 7, in one of its two sets
    packed, _ = pack(other, "probabilities", samples, wire, P, known)
    assert packed.arrays["changed"].tolist() == [0b00010000]
    assert packed.arrays["values"].shape == (1, 14)


def test_a_change_below_the_resolution_is_none() -> None:
    samples = torch.arange(5)
    values = labels("logits", 1, 5, 7)
    nearby = values + 1e-6 * values.flip(1)
    for number, sent in (("float32", 5), ("simplex:4", 0)):
        wire = Wire(number, "changed")
        _, known = pack(values, "logits", samples, wire, 5)
        packed, _ = pack(nearby, "logits", samples, wire, 5, known)
        assert len(packed.arrays["values"]) == sent


def test_floats_are_compared_by_their_bits() -> None:
    wire = Wire(rows="changed")
    values = torch.tensor([[[math.nan, 1.0], [0.0, 1.0]]])
    samples = torch.arange(2)
    _, known = pack(values, "logits", samples, wire, 2)
    values[0, 1, 0] = -0.0
    packed, _ = pack(values, "logits", samples, wire, 2, known)
    assert packed.arrays["changed"].tolist() == [0b01000000]
    back, _ = unpack(packed, 2, known)
    assert math.copysign(1, back[0, 1, 0]) == -1


def test_a_row_that_was_never_sent_counts_as_changed() -> None:
    """Zeros too, though an empty reference is made of them."""
    values = torch.zeros(1, 5, 7)
    packed, _ = pack(values, "logits", torch.arange(5), Wire(rows="changed"), P)
    assert packed.arrays["changed"].tolist() == [0b11111000]
    assert torch.equal(unpack(packed, P)[0], values)


def test_an_unchanged_row_must_be_known() -> None:
    wire = Wire("simplex:1", "changed", "bits")
    values = logits(1, 5, 7)
    _, known = pack(values, "logits", torch.arange(5), wire, P)
    packed, _ = pack(values, "logits", torch.arange(5), wire, P, known)
    with pytest.raises(FedkdError, match="5 of 5 rows are marked as unchanged"):
        unpack(packed, P)


def test_a_reference_of_another_shape_is_refused() -> None:
    wire = Wire("simplex:2", "changed")
    for known in (
        KnownRows.empty(wire, P, 14),
        KnownRows.empty(wire, P - 1, 7),
        KnownRows.empty(PLAIN, P, 7),
    ):
        with pytest.raises(FedkdError, match=r"the known rows are .* must be torch\.uint8"):
            pack(logits(1, 5, 7), "logits", torch.arange(5), wire, P, known)


# --- Index lists


@pytest.mark.parametrize(
    ("samples", "public", "dtype", "size"),
    [
        (list(range(P)), P, None, 0),
        ([], P, torch.int32, 0),
        ([], 0, None, 0),
        ([5], P, torch.uint8, 3),
        ([5], 1009, torch.int32, 4),
        (list(range(0, 23, 2)), P, torch.uint8, 3),
        (list(range(22, -1, -1)), P, torch.int32, 92),
        ([7, 3, 19], P, torch.int32, 12),
        ([1, 31], 64, torch.int32, 8),  # as many bytes as the bitmap
        ([1, 31], 56, torch.uint8, 7),
    ],
)
def test_index_lists_take_the_shorter_form(
    samples: list[int], public: int, dtype: torch.dtype | None, size: int
) -> None:
    packed = pack_samples(torch.tensor(samples, dtype=torch.int64), public)
    assert (None if packed is None else packed.dtype) == dtype
    assert (0 if packed is None else packed.nbytes) == size
    back = unpack_samples(packed, public)
    assert back.dtype == torch.int64
    assert back.tolist() == samples
    if packed is not None and packed.dtype == torch.uint8:
        text = "".join("1" if i in samples else "0" for i in range(public))
        text += "0" * (-public % 8)
        assert int.from_bytes(packed.numpy().tobytes(), "big") == int(text, 2)


@pytest.mark.parametrize(
    ("packed", "words"),
    [
        (torch.tensor([0, 23], dtype=torch.int32), "sample 23: must be in 0 .. 22"),
        (torch.tensor([-1, 3], dtype=torch.int32), "sample -1"),
        (torch.tensor([3, 3], dtype=torch.int32), "distinct"),
        (torch.arange(24, dtype=torch.int32), "24 samples: must be at most 23"),
        (torch.tensor([3]), "int64"),
        (torch.tensor([3.0]), "float32"),
        (torch.tensor([[3]], dtype=torch.int32), "1 dimension"),
        (torch.zeros(2, dtype=torch.uint8), r"\[2\]: must be torch.uint8 \[3\]"),
        (torch.tensor([0, 0, 1], dtype=torch.uint8), "bits set after its end"),
        (torch.zeros(3, dtype=torch.int32, device="meta"), "on the CPU"),
        (torch.zeros(3, dtype=torch.int32).to_sparse(), "dense"),
    ],
)
def test_index_lists_that_make_no_sense_are_refused(packed: Tensor, words: str) -> None:
    with pytest.raises(FedkdError, match=words):
        unpack_samples(packed, P)


# --- Untrusted arrays


def packed_of(wire: Wire, n: int = 11, classes: int = 7) -> Packed:
    return pack(labels("probabilities", 2, n, classes), "probabilities", torch.arange(n), wire, P)[
        0
    ]


def with_values(packed: Packed, values: Any) -> Packed:
    return replace(packed, arrays={**packed.arrays, "values": values})


def u8(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.uint8)


def bytes_of(data: bytes) -> Tensor:
    return torch.tensor(list(data), dtype=torch.uint8)


@EVERY
def test_a_wrong_type_length_or_shape_is_refused(wire: Wire) -> None:
    packed = packed_of(wire)
    values = packed.arrays["values"]
    wrong = [
        values[:-1],
        torch.cat([values, values[:1]]),
        values.to(torch.float64),
        values.to(torch.bool),
        values.unsqueeze(0),
        values.to("meta"),
        values.to_sparse(),
        [1, 2],
        None,
    ]
    for other in wrong:
        with pytest.raises(FedkdError, match="values"):
            unpack(with_values(packed, other), P)
    for arrays in ({}, {**packed.arrays, "more": values}, {"changed": u8(0)}):
        with pytest.raises(FedkdError, match="arrays"):
            unpack(replace(packed, arrays=arrays), P)


@pytest.mark.parametrize(
    ("text", "values", "words"),
    [
        ("simplex:2", [[1, 1, 0]], "sum 2: must be 3"),
        ("simplex:2", [[253, 3, 3]], "sum 259: must be 3"),  # 3 in eight bits
        ("simplex:1", [[0, 0, 0]], "sum 0: must be 1"),
        ("simplex:1", [[1, 1, 0]], "sum 2: must be 1"),
        ("simplex:2+bits", [0b11010000], "sum 4: must be 3"),
        ("simplex:2+bits", [0b11000001], "bits set after its end"),
        ("simplex:1+bits", [0b11000000], "class 3: must be below 3"),
        ("simplex:1+bits", [0b10000001], "bits set after its end"),
        ("simplex:1+deflate", list(zlib.compress(bytes([0b11000000]))), "class 3"),
        ("simplex:2+deflate", list(zlib.compress(bytes([1, 1, 3]))), "sum 5: must be 3"),
        ("simplex:2+deflate", list(zlib.compress(bytes([1, 1]))), "exactly 3 bytes"),
        ("simplex:2+deflate", list(zlib.compress(bytes([1, 1, 1])) + b"x"), "exactly 3 bytes"),
        ("simplex:2+deflate", list(zlib.compress(bytes([1, 1, 1]))[:-1]), "exactly 3 bytes"),
        ("simplex:2+deflate", [1, 2, 3], "not a zlib stream"),
        ("simplex:2+deflate", [], "exactly 3 bytes"),
        ("simplex:2+range", [1, 2, 3], "multiple of 4"),
        ("simplex:2+range", 8 * [255], "not a range code"),
        ("simplex:1+range", 8 * [255], "not a range code"),
        ("simplex:1+range", 8 * [0], "not a range code"),
    ],
)
def test_a_defect_is_named(text: str, values: list[Any], words: str) -> None:
    array = torch.tensor(values, dtype=torch.uint8)
    packed = Packed(Wire.parse(text), "probabilities", 1, 3, torch.tensor([4]), {"values": array})
    with pytest.raises(FedkdError, match=words):
        unpack(packed, P)


def test_a_bomb_is_not_inflated(monkeypatch: pytest.MonkeyPatch) -> None:
    """64 MiB of zeros in 64 KiB: at most one byte more than expected is asked for."""
    asked = []
    whole = zlib.decompressobj

    class Watched:
        def __init__(self) -> None:
            self.reader = whole()

        def decompress(self, data: bytes, limit: int) -> bytes:
            asked.append(limit)
            return self.reader.decompress(data, limit)

        def __getattr__(self, name: str) -> Any:
            return getattr(self.reader, name)

    monkeypatch.setattr(zlib, "decompressobj", Watched)
    packed = packed_of(Wire("simplex:8", "all", "deflate"))
    with pytest.raises(FedkdError, match="exactly 154 bytes"):
        unpack(with_values(packed, bytes_of(zlib.compress(bytes(2**26), 9))), P)
    assert asked == [155]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"space": "features"}, "space = 'features'"),
        ({"sets": 0}, "sets = 0"),
        ({"num_classes": -7}, "num_classes = -7"),
        ({"num_classes": 6}, "values"),
        ({"sets": 3}, "values"),
        ({"samples": torch.arange(10)}, "values"),
        ({"samples": torch.arange(13, 24)}, "sample 23"),
        ({"samples": torch.zeros(11, dtype=torch.int64)}, "distinct"),
        ({"samples": torch.arange(11, dtype=torch.int32)}, "int64"),
    ],
)
def test_a_header_that_does_not_fit_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(FedkdError, match=words):
        unpack(replace(packed_of(Wire("simplex:4")), **changes), P)


@pytest.mark.parametrize(
    ("values", "samples", "words"),
    [
        (logits(5, 7), torch.arange(5), r"shape \(5, 7\)"),
        (logits(1, 5, 7), torch.arange(4), "4 samples: must be 5"),
        (logits(1, 5, 7), torch.tensor([0, 1, 2, 3, 3]), "distinct"),
    ],
)
def test_what_cannot_be_packed_is_refused(values: Tensor, samples: Tensor, words: str) -> None:
    with pytest.raises(FedkdError, match=words):
        pack(values, "logits", samples, PLAIN, P)


def unpack_or_refuse(packed: Packed) -> bool:
    """Return whether it was refused; what is taken has the promised shape and is on the simplex."""
    try:
        values, _ = unpack(packed, P)
    except FedkdError:
        return True
    assert values.shape == (packed.sets, len(packed.samples), packed.num_classes)
    if packed.wire.number.startswith("simplex"):
        assert bool(((values.sum(-1) - 1).abs() < 1e-5).all())
        assert bool((values >= 0).all())
    return False


@EVERY
def test_flipped_cut_and_random_bytes_end_in_an_error_or_on_the_simplex(wire: Wire) -> None:
    generator = np.random.default_rng(13)
    packed = packed_of(wire)
    refused = 0
    for turn in range(60):
        arrays = {}
        for name, array in packed.arrays.items():
            data = array.numpy().copy()
            flat = data.reshape(-1).view(np.uint8)
            if turn % 3 == 0:
                flat[generator.integers(len(flat))] ^= 1 << generator.integers(8)
            elif turn % 3 == 1:
                flat[:] = generator.integers(0, 256, len(flat))
            elif data.ndim == 1:
                data = data[: generator.integers(len(data))].copy()
            arrays[name] = torch.from_numpy(data)
        refused += unpack_or_refuse(replace(packed, arrays=arrays))
    assert refused or wire == PLAIN or wire == Wire("float16")


@pytest.mark.parametrize("wire", [w for w in ALL_ROWS if w.pack != "raw"], ids=str)
@given(st.binary(max_size=200))
@settings(deadline=None, max_examples=60)
def test_garbage_ends_in_an_error_or_on_the_simplex(wire: Wire, data: bytes) -> None:
    samples = torch.arange(11)
    unpack_or_refuse(Packed(wire, "probabilities", 1, 5, samples, {"values": bytes_of(data)}))


# --- The page


def table(text: str) -> dict[str, list[int]]:
    rows = re.findall(r"^\| `([\w:]+)` \|(.*)\|$", text, re.MULTILINE)
    return {
        name: [int(n) for n in re.findall(r"\d+", cells)] for name, cells in rows if name in NUMBERS
    }


def test_the_page_shows_what_its_code_prints() -> None:
    """To 2 %: deflate and the last bit of a softmax differ between versions of their libraries."""
    page = DOCS / "codecs.md"
    text = page.read_text(encoding="utf-8")
    (source,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(compile(source, str(page), "exec"), {})
    shown, found = table(text), table(printed.getvalue())
    assert list(shown) == list(found) == list(NUMBERS)
    for name in shown:
        assert found[name] == pytest.approx(shown[name], rel=0.02)
