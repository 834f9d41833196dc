"""Codecs: how soft labels cross the wire, and how many bytes that takes.

A `Wire` has three slots in a fixed order: the number that stands for a value, the rows that are sent,
and how what is left is packed. `pack` and `unpack` apply it to one peer's soft labels; where only
changed rows are sent, both ends keep a `Reference`, what the receiver has already.

Everything here works on the CPU and without a loop over samples.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fedkd.errors import FedkdError, nearest
from fedkd.rangecoding import range_coded, range_decoded

Array = npt.NDArray[Any]

NUMBERS = ("float32", "float16", "simplex:8", "simplex:4", "simplex:2", "simplex:1")
ROWS = ("all", "changed")
PACKS = ("raw", "bits", "deflate", "range")
SPACES = ("logits", "probabilities")


@dataclass(frozen=True)
class Wire:
    """How soft labels cross the wire in one direction.

    Attributes:
        number: ``"float32"``, ``"float16"`` or ``"simplex:b"``: every row is rounded to multiples of
            1/(2^b − 1) that sum to 1, b = 8, 4, 2 or 1 (Sattler et al. 2021, constrained uniform
            quantisation; b = 1 is the most probable class).
        rows: ``"all"``, or ``"changed"``: only rows that differ from what the receiver has.
        pack: ``"raw"``, ``"bits"`` (b bits a code; for b = 1 a class index), ``"deflate"`` (zlib) or
            ``"range"`` (range coding; needs the extra ``codec``).

    Raises:
        FedkdError: an unknown value, or bits or range with floating-point numbers.
    """

    number: str = "float32"
    rows: str = "all"
    pack: str = "raw"

    def __post_init__(self) -> None:
        for slot, accepted in (("number", NUMBERS), ("rows", ROWS), ("pack", PACKS)):
            value = getattr(self, slot)
            if value not in accepted:
                raise FedkdError(f"{slot} = {value!r}: must be one of {', '.join(accepted)}")
        if self.pack in ("bits", "range") and not self.number.startswith("simplex"):
            raise FedkdError(
                f"pack = {self.pack!r} with number = {self.number!r}: needs one of "
                f"{', '.join(NUMBERS[2:])}; floats are packed by raw or deflate"
            )

    @classmethod
    def parse(cls, text: str) -> Wire:
        """Read ``"simplex:1+changed+range"``: the slots in their order, each may be left out.

        Raises:
            FedkdError: the text is none; it begins with ``codec = '...'``.
        """
        try:
            return cls(**_slots(text))
        except FedkdError as error:
            raise FedkdError(f"codec = {text!r}: {error}") from None

    def __str__(self) -> str:
        values = (self.number, self.rows, self.pack)
        words = [
            v for v, plain in zip(values, ("float32", "all", "raw"), strict=True) if v != plain
        ]
        return "+".join(words) or "float32"

    @property
    def bits(self) -> int:
        """Bits of a code on the simplex; 0 for floating-point numbers."""
        name, _, bits = self.number.partition(":")
        return int(bits) if name == "simplex" else 0

    @property
    def steps(self) -> int:
        """What the codes of a row on the simplex sum to, 2^b − 1."""
        return (1 << self.bits) - 1

    @property
    def dtype(self) -> torch.dtype:
        """The type of a code: uint8, float16 or float32."""
        return torch.uint8 if self.bits else getattr(torch, self.number)


PLAIN = Wire()


def _slots(text: str) -> dict[str, str]:
    order = {"number": NUMBERS, "rows": ROWS, "pack": PACKS}
    found: dict[str, str] = {}
    left = list(order)
    for word in str(text).split("+"):
        slot = next((s for s in order if word in order[s]), None)
        if slot is None:
            known = [w for words in order.values() for w in words]
            raise FedkdError(
                f"{word!r} is none of {', '.join(known)}{nearest(word, known)}; an example is "
                "simplex:1+changed+deflate"
            )
        if slot not in left:
            raise FedkdError(f"{word!r} is out of place: the order is number+rows+pack, each once")
        del left[: left.index(slot) + 1]
        found[slot] = word
    return found


def parse_codec(text: str) -> tuple[Wire, Wire]:
    """Read ``"UP/DOWN"``, or one codec for both directions: (clients to server, server to clients).

    Raises:
        FedkdError: one of the two is no codec, or there are more; it begins with ``codec = '...'``.
    """
    parts = str(text).split("/")
    if len(parts) > 2:
        raise FedkdError(f"codec = {text!r}: must be UP/DOWN, or one codec for both directions")
    try:
        wires = [Wire(**_slots(part)) for part in parts]
    except FedkdError as error:
        raise FedkdError(f"codec = {text!r}: {error}") from None
    return wires[0], wires[-1]


@dataclass(frozen=True, eq=False)
class Reference:
    """What one peer already has of the other's soft labels, by public sample.

    Attributes:
        codes: ``[P, W]``, W = sets · classes, in the type of the codes.
        known: bool ``[P]``, which rows it has.
    """

    codes: Tensor
    known: Tensor

    @classmethod
    def empty(cls, wire: Wire, num_public: int, width: int) -> Reference:
        """Return one that knows nothing, for rows of `width` codes."""
        codes = torch.zeros(num_public, width, dtype=wire.dtype)
        return cls(codes, torch.zeros(num_public, dtype=torch.bool))

    def digest(self) -> bytes:
        """Return a digest of the content, the same for all that have the same."""
        found = blake2b(digest_size=16)
        for tensor in (self.codes, self.known):
            found.update(tensor.contiguous().view(torch.uint8).numpy().data)
        return found.digest()

    def updated(self, samples: Tensor, codes: Tensor) -> Reference:
        """Return a copy in which the rows `samples` are `codes`; this one stays as it is."""
        new, known = self.codes.clone(), self.known.clone()
        new[samples], known[samples] = codes, True
        return Reference(new, known)


@dataclass(frozen=True, eq=False)
class Packed:
    """One peer's soft labels as they cross the wire.

    Attributes:
        wire: the codec.
        space: ``"logits"`` or ``"probabilities"``, the space that `unpack` gives back.
        sets: M, alternatives for each sample; usually 1.
        num_classes: C.
        samples: int64 ``[N]``, indices into the public set, distinct.
        arrays: ``"values"``, and ``"changed"`` (uint8 ``[ceil(N/8)]``, a bit a sample, the first in the
            highest bit) where only changed rows are sent. Their bytes are the payload. Floats that are
            sent as they are may share memory with the values they were made of.
    """

    wire: Wire
    space: str
    sets: int
    num_classes: int
    samples: Tensor
    arrays: dict[str, Tensor]


def pack(
    values: Tensor,
    space: str,
    samples: Tensor,
    wire: Wire,
    num_public: int,
    reference: Reference | None = None,
) -> tuple[Packed, Reference | None]:
    """Write soft labels for the wire.

    Args:
        values: ``[M, N, C]``.
        space: ``"logits"`` or ``"probabilities"``. On the simplex, logits cross as their softmax and
            come back as logits.
        samples: int64 ``[N]``, distinct.
        wire: the codec.
        num_public: P, samples of the public set.
        reference: what the receiver has, where only changed rows are sent; ``None`` is nothing.

    Returns:
        What to send, and the reference once the receiver has it (``None`` where all rows are sent).
        `reference` itself is not changed, so that a message that got lost can be forgotten.

    Raises:
        FedkdError: shapes do not fit, or values that are to go on the simplex are not finite or are
            negative probabilities.
    """
    if values.ndim != 3:
        raise FedkdError(f"soft labels have shape {tuple(values.shape)}: must be [M, N, C]")
    sets, n, classes = values.shape
    samples = samples.detach().cpu()
    _check_header(space, sets, classes, samples, num_public)
    if len(samples) != n:
        raise FedkdError(
            f"{len(samples)} samples: must be {n}, one for each row of the soft labels"
        )
    rows = values.detach().to("cpu", torch.float32).transpose(0, 1)
    codes = _quantised(rows.contiguous(), space, wire).reshape(n, sets * classes)
    arrays: dict[str, Tensor] = {}
    updated = None
    if wire.rows == "changed":
        base = _reference(reference, wire, num_public, sets * classes)
        changed = ~base.known[samples] | _differ(codes, base.codes[samples])
        arrays["changed"] = _tensor(np.packbits(changed.numpy()))
        codes = codes[changed]
        updated = base.updated(samples[changed], codes)
    arrays["values"] = _packed(codes, wire, classes)
    return Packed(wire, space, sets, classes, samples, arrays), updated


def unpack(
    packed: Packed, num_public: int, reference: Reference | None = None
) -> tuple[Tensor, Reference | None]:
    """Read soft labels from the wire.

    Whatever the arrays hold ends in soft labels of the promised shape or in an error. Whether floats are
    finite is left to the caller, as is whether space, sets, classes and samples are what was asked for.

    Args:
        packed: what arrived.
        num_public: P, samples of the public set.
        reference: what this end has, where only changed rows are sent; ``None`` is nothing.

    Returns:
        Values float32 ``[M, N, C]``, and the updated reference (``None`` where all rows are sent).

    Raises:
        FedkdError: an array is missing or has a wrong type or length, a code is off the simplex, or an
            unchanged row is one that `reference` does not know.
    """
    wire, sets, classes, samples = packed.wire, packed.sets, packed.num_classes, packed.samples
    _check_header(packed.space, sets, classes, samples, num_public)
    wanted = {"values", "changed"} if wire.rows == "changed" else {"values"}
    if set(packed.arrays) != wanted:
        raise FedkdError(
            f"arrays = {sorted(map(str, packed.arrays))}: must be {sorted(wanted)} for {wire}"
        )
    if wire.rows == "all":
        codes = _unpacked(packed.arrays["values"], wire, len(samples), sets, classes)
        return _dequantised(codes, packed), None
    changed = _bitmap("changed", packed.arrays["changed"], len(samples))
    base = _reference(reference, wire, num_public, sets * classes)
    lost = int((~changed & ~base.known[samples]).sum())
    if lost:
        raise FedkdError(
            f"{lost} of {len(samples)} rows are marked as unchanged, but none was received before"
        )
    codes = _unpacked(packed.arrays["values"], wire, int(changed.sum()), sets, classes)
    updated = base.updated(samples[changed], codes)
    return _dequantised(updated.codes[samples], packed), updated


def pack_samples(samples: Tensor, num_public: int) -> Tensor | None:
    """Write an index list for the wire.

    Args:
        samples: integer ``[N]``, distinct, in ``0 .. num_public - 1``.
        num_public: P, samples of the public set.

    Returns:
        ``None`` for the whole public set in order; else the smaller of the list itself (int32 ``[N]``)
        and, if it is sorted, a bitmap (uint8 ``[ceil(P/8)]``, the first sample in the highest bit).
    """
    samples = samples.detach().to("cpu", torch.int64)
    if torch.equal(samples, torch.arange(num_public)):
        return None
    if bool((samples.diff() > 0).all()) and -(-num_public // 8) < 4 * len(samples):
        marked = np.zeros(num_public, dtype=bool)
        marked[samples.numpy()] = True
        return _tensor(np.packbits(marked))
    return samples.to(torch.int32)


def unpack_samples(packed: Tensor | None, num_public: int) -> Tensor:
    """Read an index list from the wire, int64 ``[N]``.

    Raises:
        FedkdError: neither an int32 list nor a uint8 bitmap, a wrong length, an index out of range, or
            one that occurs twice.
    """
    if packed is None:
        return torch.arange(num_public)
    _check_plain("samples", packed, 1)
    if packed.dtype == torch.uint8:
        return _bitmap("samples", packed, num_public).nonzero().squeeze(1)
    if packed.dtype != torch.int32:
        raise FedkdError(f"samples are {packed.dtype}: must be an int32 list or a uint8 bitmap")
    samples = packed.to(torch.int64)
    _check_samples(samples, num_public)
    return samples


# --- Checks ------------------------------------------------------------------------------------


def _check_header(space: str, sets: int, classes: int, samples: Tensor, num_public: int) -> None:
    if space not in SPACES:
        raise FedkdError(f"space = {space!r}: must be 'logits' or 'probabilities'")
    numbers: dict[str, Any] = {"sets": sets, "num_classes": classes}
    for name, value in numbers.items():
        if not isinstance(value, int) or value < 1:
            raise FedkdError(f"{name} = {value!r}: must be a whole number >= 1")
    _check_plain("samples", samples, 1)
    if samples.dtype != torch.int64:
        raise FedkdError(f"samples are {samples.dtype}: must be int64")
    _check_samples(samples, num_public)


def _check_samples(samples: Tensor, num_public: int) -> None:
    if len(samples) == 0:
        return
    if len(samples) > num_public:
        raise FedkdError(f"{len(samples)} samples: must be at most {num_public}, the public set")
    low, high = int(samples.min()), int(samples.max())
    if low < 0 or high >= num_public:
        wrong = low if low < 0 else high
        raise FedkdError(f"sample {wrong}: must be in 0 .. {num_public - 1}, the public set")
    if len(samples.unique()) < len(samples):
        raise FedkdError("samples occur twice: must be distinct")


def _check_plain(name: str, tensor: Any, ndim: int) -> None:
    if not isinstance(tensor, Tensor) or tensor.layout != torch.strided:
        raise FedkdError(f"{name} is a {type(tensor).__name__}: must be a dense tensor")
    if tensor.device.type != "cpu" or tensor.ndim != ndim:
        raise FedkdError(
            f"{name} has shape {tuple(tensor.shape)} on {tensor.device}: must have {ndim} "
            f"dimension{'s' if ndim > 1 else ''}, on the CPU"
        )


def _check_array(name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    _check_plain(name, tensor, len(shape))
    if tensor.dtype != dtype or tuple(tensor.shape) != shape:
        raise FedkdError(
            f"{name} is {tensor.dtype} {list(tensor.shape)}: must be {dtype} {list(shape)}"
        )


def _reference(reference: Reference | None, wire: Wire, num_public: int, width: int) -> Reference:
    if reference is None:
        return Reference.empty(wire, num_public, width)
    found = (reference.codes.dtype, tuple(reference.codes.shape), tuple(reference.known.shape))
    if found != (wire.dtype, (num_public, width), (num_public,)):
        raise FedkdError(
            f"the reference holds {found[0]} {list(found[1])}: must be {wire.dtype} "
            f"{[num_public, width]} for {wire}"
        )
    return reference


# --- Numbers -----------------------------------------------------------------------------------


def _quantised(rows: Tensor, space: str, wire: Wire) -> Tensor:
    """Return the codes of float32 rows ``[N, M, C]``, same shape."""
    if wire.number == "float32":
        return rows
    if wire.number == "float16":
        # Large logits are held at the largest float16; an infinity stays one, for the receiver to refuse.
        limit = torch.finfo(torch.float16).max
        return torch.where(rows.isinf(), rows, rows.clamp(-limit, limit)).to(torch.float16)
    if not bool(rows.isfinite().all()):
        raise FedkdError(f"soft labels hold NaN or infinity: must be finite for {wire.number}")
    if wire.bits == 1:
        # The first of equal ones, by numpy's word. Of the logits themselves: no rounding by a softmax.
        winners = torch.from_numpy(rows.numpy().argmax(-1))
        return torch.zeros(rows.shape, dtype=torch.uint8).scatter_(-1, winners.unsqueeze(-1), 1)
    # In float64, so that rounding of the sum cannot move a code.
    return _nearest_codes(_on_simplex(rows.double(), space), wire.steps)


def _on_simplex(rows: Tensor, space: str) -> Tensor:
    if space == "logits":
        return rows.softmax(-1)
    total = rows.sum(-1, keepdim=True)
    if bool((rows < 0).any()) or bool((total <= 0).any()):
        raise FedkdError("soft labels hold negative probabilities or rows of zeros")
    return rows / total


def _nearest_codes(probabilities: Tensor, steps: int) -> Tensor:
    """Round rows to whole numbers that sum to `steps`, as near as such a row can be.

    Largest remainders: round down, then up where most was cut off (of equal ones, the lowest index
    first). Going up at i instead of j changes the squared distance by 2(r_j − r_i), the remainders'
    difference, so that this is the nearest point (in L1 as well): Q_b of Sattler et al. 2021.
    """
    scaled = probabilities * steps
    down = scaled.floor()
    missing = (steps - down.sum(-1, keepdim=True)).to(torch.int64)
    order = (scaled - down).argsort(dim=-1, descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(
        -1, order, torch.arange(order.shape[-1]).expand_as(order)
    )
    return (down + (rank < missing)).to(torch.uint8)


def _dequantised(codes: Tensor, packed: Packed) -> Tensor:
    """Return float32 values ``[M, N, C]`` of codes ``[N, W]``.

    As logits, a zero code would be −inf. Here the zeros of a row share at most half a step: each counts
    1/(2C) of one. That keeps logits moderate and the row nearest to its own code, so that a second
    passage changes nothing.
    """
    classes, bits = packed.num_classes, packed.wire.bits
    rows = codes.reshape(len(codes), packed.sets, classes).transpose(0, 1).to(torch.float32)
    if not bits:
        return rows.contiguous()
    if packed.space == "probabilities":
        return rows.contiguous() / packed.wire.steps
    smooth = rows.double().masked_fill(rows == 0, 1 / (2 * classes))
    return torch.log(smooth / smooth.sum(-1, keepdim=True)).to(torch.float32).contiguous()


def _check_codes(codes: Tensor, wire: Wire, classes: int) -> None:
    """Refuse codes ``[n, W]`` that are off the simplex."""
    steps = wire.steps
    sums = codes.reshape(-1, classes).sum(-1, dtype=torch.int64)
    off = sums[sums != steps]
    if len(off):
        raise FedkdError(f"values hold a row of codes with sum {int(off[0])}: must be {steps}")


# --- Rows --------------------------------------------------------------------------------------


def _differ(codes: Tensor, known: Tensor) -> Tensor:
    """Return which rows differ, bool ``[N]``, bit by bit: −0.0 is not 0.0, a NaN is itself."""
    if codes.dtype != torch.uint8:
        bits = torch.int32 if codes.dtype == torch.float32 else torch.int16
        codes, known = codes.view(bits), known.view(bits)
    return (codes != known).any(-1)


def _bitmap(name: str, packed: Tensor, count: int) -> Tensor:
    """Read `count` bits, bool ``[count]``."""
    _check_array(name, packed, torch.uint8, (-(-count // 8),))
    bits = _from_bits(name, packed.contiguous().numpy(), count, 1)
    return torch.from_numpy(bits.astype(np.bool_))


# --- Packing -----------------------------------------------------------------------------------


def _packed(codes: Tensor, wire: Wire, classes: int) -> Tensor:
    """Pack codes ``[n, W]``."""
    if wire.pack == "raw":
        return codes.contiguous()
    if wire.pack == "range":
        return _tensor(
            np.frombuffer(range_coded(_symbols(codes, wire, classes), wire.bits, classes), "u1")
        )
    if wire.pack == "deflate" and wire.bits != 1:
        plain = codes.numpy().astype(_on_wire(wire)).tobytes()
    else:
        # Deflated class indices are packed to bits before: a byte each costs more at ten classes.
        plain = _to_bits(_symbols(codes, wire, classes), _width(wire, classes))
    if wire.pack == "deflate":
        plain = zlib.compress(plain, 9)
    return _tensor(np.frombuffer(plain, "u1"))


def _unpacked(packed: Tensor, wire: Wire, rows: int, sets: int, classes: int) -> Tensor:
    """Return the codes ``[rows, W]`` of an array from the wire."""
    shape = (rows, sets * classes)
    if wire.pack == "raw":
        _check_array("values", packed, wire.dtype, shape)
        codes = packed.detach()
    else:
        codes = _read_codes(packed, wire, rows * sets * classes, classes).reshape(shape)
    if wire.bits:
        _check_codes(codes, wire, classes)
    return codes


def _read_codes(packed: Tensor, wire: Wire, codes: int, classes: int) -> Tensor:
    """Return `codes` codes, flat, of an array that is not raw."""
    _check_plain("values", packed, 1)
    if packed.dtype != torch.uint8:
        raise FedkdError(f"values are {packed.dtype}: must be uint8 for {wire}")
    count = codes // classes if wire.bits == 1 else codes
    data = packed.contiguous().numpy()
    if wire.pack == "range":
        return _codes_of(range_decoded(data.tobytes(), count, wire.bits, classes), wire, classes)
    if wire.pack == "deflate" and wire.bits != 1:
        plain = _inflated(data, count * _on_wire(wire).itemsize).view(_on_wire(wire))
        return _tensor(plain.astype(plain.dtype.newbyteorder("=")))
    width = _width(wire, classes)
    if wire.pack == "deflate":
        data = _inflated(data, -(-count * width // 8))
    return _codes_of(_from_bits("values", data, count, width), wire, classes)


def _symbols(codes: Tensor, wire: Wire, classes: int) -> Array:
    """Return codes on the simplex as int64, flat; at one bit the class of each row instead."""
    table: Array = codes.numpy().astype(np.int64)
    return table.reshape(-1, classes).argmax(-1) if wire.bits == 1 else table.reshape(-1)


def _codes_of(symbols: Array, wire: Wire, classes: int) -> Tensor:
    """Undo `_symbols`: uint8, flat."""
    if wire.bits != 1:
        return torch.from_numpy(symbols.astype(np.uint8))
    if len(symbols) and int(symbols.max()) >= classes:
        raise FedkdError(f"values hold class {int(symbols.max())}: must be below {classes}")
    codes = torch.zeros(len(symbols), classes, dtype=torch.uint8)
    return codes.scatter_(1, torch.from_numpy(symbols).unsqueeze(1), 1).reshape(-1)


def _on_wire(wire: Wire) -> np.dtype[Any]:
    """Return the type of a code as bytes: little-endian."""
    return np.dtype({"float32": "<f4", "float16": "<f2"}.get(wire.number, "u1"))


def _width(wire: Wire, classes: int) -> int:
    """Return bits of a symbol: b, or at one bit ceil(log2 C) (0 for a single class)."""
    return wire.bits if wire.bits > 1 else (classes - 1).bit_length()


def _tensor(array: Array) -> Tensor:
    """Return a tensor with memory of its own (it may be written to, unlike bytes)."""
    return torch.from_numpy(array.copy())


def _to_bits(symbols: Array, width: int) -> bytes:
    """Pack whole numbers with `width` bits each, the highest first, ceil(count·width/8) bytes."""
    shifts = np.arange(width - 1, -1, -1)
    return np.packbits(((symbols[:, None] >> shifts) & 1).astype(np.uint8)).tobytes()


def _from_bits(name: str, data: Array, count: int, width: int) -> Array:
    """Read `count` numbers of `width` bits, int64 ``[count]``, from bytes."""
    if len(data) != -(-count * width // 8):
        raise FedkdError(f"{name}: {len(data)} bytes: must be {-(-count * width // 8)}")
    bits: Array = np.unpackbits(data)
    if bits[count * width :].any():
        raise FedkdError(f"{name} has bits behind its end: must be 0")
    table: Array = bits[: count * width].reshape(count, width).astype(np.int64)
    shifts = np.arange(width - 1, -1, -1)
    numbers: Array = np.bitwise_or.reduce(table << shifts, axis=1, initial=0)
    return numbers


def _inflated(data: Array, expected: int) -> Array:
    """Undo zlib, never far beyond the bytes that are expected."""
    reader = zlib.decompressobj()
    try:
        plain = reader.decompress(data.tobytes(), expected + 1)
    except zlib.error as error:
        raise FedkdError(f"values are no zlib stream: {error}") from None
    if len(plain) != expected or not reader.eof or reader.unused_data:
        raise FedkdError(f"values do not inflate to exactly {expected} bytes")
    return np.frombuffer(plain, np.uint8)
