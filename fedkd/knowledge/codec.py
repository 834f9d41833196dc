"""Encoding of soft labels for the wire, and decoding.

A `Wire` has three slots in a fixed order: the number format of a value, the rows that are sent, and how
the result is packed. `pack` and `unpack` apply it to one peer's soft labels. Where only changed rows are
sent, both ends keep `KnownRows`: those that the receiver already has.

Everything here works on the CPU and without a loop over samples.
"""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import blake2b
from reprlib import repr as shown
from typing import Any, ClassVar

import torch
from torch import Tensor

from fedkd.errors import FedkdError
from fedkd.knowledge.arrival import Arrival, Sizes, taken
from fedkd.knowledge.packing import (
    check_plain,
    packed_codes,
    read_bitmap,
    unpacked_codes,
    write_bitmap,
)
from fedkd.knowledge.samples import check_samples
from fedkd.knowledge.wire import Wire

SPACES = ("logits", "probabilities")

MOST_SETS = 1000
"""The most sets of soft labels that are decoded. Packed, millions of sets fit into a few bytes."""


@dataclass(frozen=True, eq=False)
class KnownRows:
    """The soft labels of one peer that the other already has, by public sample.

    Attributes:
        codes: ``[P, W]``, W = sets · classes, in the type of the codes.
        known: bool ``[P]``, which rows these are.
    """

    codes: Tensor
    known: Tensor

    @classmethod
    def empty(cls, wire: Wire, num_public: int, width: int) -> KnownRows:
        """Return an instance without any known row, for rows of `width` codes."""
        codes = torch.zeros(num_public, width, dtype=wire.dtype)
        return cls(codes, torch.zeros(num_public, dtype=torch.bool))

    def fingerprint(self) -> bytes:
        """Return a fingerprint of the content: equal contents, equal fingerprints."""
        content_hash = blake2b(digest_size=16)
        for tensor in (self.codes, self.known):
            content_hash.update(tensor.contiguous().view(torch.uint8).numpy().data)
        return content_hash.digest()

    def updated(self, samples: Tensor, codes: Tensor) -> KnownRows:
        """Return a copy in which the rows `samples` are `codes`; this instance does not change."""
        new, known = self.codes.clone(), self.known.clone()
        new[samples], known[samples] = codes, True
        return KnownRows(new, known)


@dataclass(frozen=True, eq=False)
class Packed:
    """One peer's soft labels as they cross the wire.

    Attributes:
        wire: the codec.
        space: ``"logits"`` or ``"probabilities"``, the space of what `unpack` returns.
        sets: M, alternatives for each sample; usually 1.
        num_classes: C.
        samples: int64 ``[N]``, indices into the public set, distinct.
        arrays: ``"values"``, and ``"changed"`` (uint8 ``[ceil(N/8)]``, a bit a sample, the first in the
            highest bit) where only changed rows are sent. Their bytes are the payload. Floats that are
            not converted may share memory with the values that were packed.
    """

    kind: ClassVar[str] = "soft-labels"
    message_fields: ClassVar[dict[str, type]] = {
        "space": str,
        "wire": str,
        "sets": int,
        "samples": str,
    }

    wire: Wire
    space: str
    sets: int
    num_classes: int
    samples: Tensor
    arrays: dict[str, Tensor]

    def to_message(self, sizes: Sizes, *, asked: bool) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return the tensors of a message, and its `message_fields`.

        Args:
            sizes: of the public set.
            asked: whether the samples are those that the receiver asked for, so that it knows them.
        """
        listed = None if asked else pack_samples(self.samples, sizes.num_public)
        which = "asked" if asked else "all" if listed is None else "listed"
        fields = {"space": self.space, "wire": str(self.wire), "sets": self.sets, "samples": which}
        return self.arrays if listed is None else {**self.arrays, "samples": listed}, fields

    @classmethod
    def from_message(
        cls, tensors: dict[str, Tensor], fields: dict[str, Any], arrival: Arrival
    ) -> Packed:
        """Return the soft labels of a message, the inverse of `to_message`.

        Raises:
            FedkdError: the samples are not known, or there are too many sets.
        """
        sizes, which = arrival.sizes, fields["samples"]
        if which not in ("asked", "all", "listed"):
            raise FedkdError(f"samples = {shown(which)}: must be asked, all or listed")
        if which == "listed":
            samples = unpack_samples(taken(tensors, "samples"), sizes.num_public)
        elif which == "all":
            samples = torch.arange(sizes.num_public)
        elif arrival.samples is None:
            raise FedkdError("its samples are neither named nor asked for")
        else:
            samples = arrival.samples
        if not 0 < fields["sets"] <= MOST_SETS:
            raise FedkdError(f"sets = {shown(fields['sets'])}: must be 1 to {MOST_SETS}")
        wire = Wire.parse(fields["wire"])
        return cls(wire, fields["space"], fields["sets"], sizes.num_classes, samples, tensors)


def pack(
    values: Tensor,
    space: str,
    samples: Tensor,
    wire: Wire,
    num_public: int,
    known: KnownRows | None = None,
) -> tuple[Packed, KnownRows | None]:
    """Return soft labels packed for the wire.

    Args:
        values: ``[M, N, C]``.
        space: ``"logits"`` or ``"probabilities"``. On the simplex, logits are sent as their softmax
            and decoded as logits.
        samples: int64 ``[N]``, distinct.
        wire: the codec.
        num_public: P, samples of the public set.
        known: the rows that the receiver has, where only changed rows are sent; ``None`` for none.

    Returns:
        What to send, and the rows that the receiver has afterwards (``None`` where all rows are sent).
        `known` itself does not change, so that a message that is lost can be ignored.

    Raises:
        FedkdError: shapes do not match, or values to be put on the simplex are not finite or are
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
        base = _known_rows(known, wire, num_public, sets * classes)
        changed = ~base.known[samples] | _differ(codes, base.codes[samples])
        arrays["changed"] = write_bitmap(changed)
        codes = codes[changed]
        updated = base.updated(samples[changed], codes)
    arrays["values"] = packed_codes(codes, wire, classes)
    return Packed(wire, space, sets, classes, samples, arrays), updated


def unpack(
    packed: Packed, num_public: int, known: KnownRows | None = None
) -> tuple[Tensor, KnownRows | None]:
    """Return the soft labels that were packed for the wire.

    Whatever the arrays hold, the result is soft labels of the declared shape or an error. The caller
    checks whether floats are finite, and whether space, sets, classes and samples are those asked for.

    Args:
        packed: what was received.
        num_public: P, samples of the public set.
        known: the rows that this end has, where only changed rows are sent; ``None`` for none.

    Returns:
        Values float32 ``[M, N, C]``, and the updated `known` (``None`` where all rows are sent).

    Raises:
        FedkdError: an array is missing or has a wrong type or length, a code is off the simplex, or an
            unchanged row is missing in `known`.
    """
    wire, sets, classes, samples = packed.wire, packed.sets, packed.num_classes, packed.samples
    _check_header(packed.space, sets, classes, samples, num_public)
    expected = {"values", "changed"} if wire.rows == "changed" else {"values"}
    if set(packed.arrays) != expected:
        raise FedkdError(
            f"arrays = {sorted(map(str, packed.arrays))}: must be {sorted(expected)} for {wire}"
        )
    if wire.rows == "all":
        codes = unpacked_codes(packed.arrays["values"], wire, len(samples), sets, classes)
        return _dequantised(codes, packed), None
    changed = read_bitmap("changed", packed.arrays["changed"], len(samples))
    base = _known_rows(known, wire, num_public, sets * classes)
    missing = int((~changed & ~base.known[samples]).sum())
    if missing:
        raise FedkdError(
            f"{missing} of {len(samples)} rows are marked as unchanged, but none was received before"
        )
    codes = unpacked_codes(packed.arrays["values"], wire, int(changed.sum()), sets, classes)
    updated = base.updated(samples[changed], codes)
    return _dequantised(updated.codes[samples], packed), updated


def pack_samples(samples: Tensor, num_public: int) -> Tensor | None:
    """Return an index list packed for the wire.

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
        marked = torch.zeros(num_public, dtype=torch.bool)
        marked[samples] = True
        return write_bitmap(marked)
    return samples.to(torch.int32)


def unpack_samples(packed: Tensor | None, num_public: int) -> Tensor:
    """Return the index list that was packed for the wire, int64 ``[N]``.

    Raises:
        FedkdError: neither an int32 list nor a uint8 bitmap, a wrong length, an index out of range, or
            one that occurs twice.
    """
    if packed is None:
        return torch.arange(num_public)
    check_plain("samples", packed, 1)
    if packed.dtype == torch.uint8:
        return read_bitmap("samples", packed, num_public).nonzero().squeeze(1)
    if packed.dtype != torch.int32:
        raise FedkdError(f"samples are {packed.dtype}: must be an int32 list or a uint8 bitmap")
    samples = packed.to(torch.int64)
    return check_samples(samples, num_public)


# --- Checks ------------------------------------------------------------------------------------


def _check_header(space: str, sets: int, classes: int, samples: Tensor, num_public: int) -> None:
    if space not in SPACES:
        raise FedkdError(f"space = {space!r}: must be 'logits' or 'probabilities'")
    numbers: dict[str, Any] = {"sets": sets, "num_classes": classes}
    for name, value in numbers.items():
        if not isinstance(value, int) or value < 1:
            raise FedkdError(f"{name} = {value!r}: must be a whole number >= 1")
    check_plain("samples", samples, 1)
    check_samples(samples, num_public)


def _known_rows(known: KnownRows | None, wire: Wire, num_public: int, width: int) -> KnownRows:
    if known is None:
        return KnownRows.empty(wire, num_public, width)
    dtype, shape = known.codes.dtype, tuple(known.codes.shape)
    if (dtype, shape, tuple(known.known.shape)) != (wire.dtype, (num_public, width), (num_public,)):
        raise FedkdError(
            f"the known rows are {dtype} {list(shape)}: must be {wire.dtype} "
            f"{[num_public, width]} for {wire}"
        )
    return known


# --- Numbers -----------------------------------------------------------------------------------


def _quantised(rows: Tensor, space: str, wire: Wire) -> Tensor:
    """Return the codes of float32 rows ``[N, M, C]``, same shape."""
    if wire.number == "float32":
        return rows
    if wire.number == "float16":
        # Large logits become the largest float16; an infinity stays one, so that the receiver refuses it.
        limit = torch.finfo(torch.float16).max
        return torch.where(rows.isinf(), rows, rows.clamp(-limit, limit)).to(torch.float16)
    if not bool(rows.isfinite().all()):
        raise FedkdError(f"soft labels hold NaN or infinity: must be finite for {wire.number}")
    if wire.bits == 1:
        # The first of equal values, as numpy guarantees. Of the logits: a softmax would round.
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
    """Return the rows of whole numbers that sum to `steps` nearest to `steps` times the probabilities.

    Largest remainders: round down, then up where the remainder is largest (of equal ones, the lowest
    index first). Rounding up at i instead of j changes the squared distance by 2(r_j − r_i), the
    remainders' difference, so this is the nearest point (in L1 as well): Q_b of Sattler et al. 2021.
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
    as 1/(2C) of one. That keeps logits moderate and the row nearest to its own code, so that packing it
    again changes nothing.
    """
    classes, bits = packed.num_classes, packed.wire.bits
    rows = codes.reshape(len(codes), packed.sets, classes).transpose(0, 1).to(torch.float32)
    if not bits:
        return rows.contiguous()
    if packed.space == "probabilities":
        return rows.contiguous() / packed.wire.steps
    smooth = rows.double().masked_fill(rows == 0, 1 / (2 * classes))
    return torch.log(smooth / smooth.sum(-1, keepdim=True)).to(torch.float32).contiguous()


def _differ(codes: Tensor, known: Tensor) -> Tensor:
    """Return which rows differ in any bit, bool ``[N]``: −0.0 differs from 0.0, a NaN equals itself."""
    if codes.dtype != torch.uint8:
        bits = torch.int32 if codes.dtype == torch.float32 else torch.int16
        codes, known = codes.view(bits), known.view(bits)
    return (codes != known).any(-1)
