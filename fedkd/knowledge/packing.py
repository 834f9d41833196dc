"""Packing of the codes of soft labels into an array of bytes, and back."""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fedkd.errors import FedkdError
from fedkd.knowledge.range_coding import range_coded, range_decoded
from fedkd.knowledge.wire import Wire

Array = npt.NDArray[Any]


def packed_codes(codes: Tensor, wire: Wire, classes: int) -> Tensor:
    """Return codes ``[n, W]`` packed into the array that is sent; a row has `classes` codes a set."""
    if wire.pack == "raw":
        return codes.contiguous()
    if wire.pack == "range":
        return _tensor(
            np.frombuffer(range_coded(_symbols(codes, wire, classes), wire.bits, classes), "u1")
        )
    if wire.pack == "deflate" and wire.bits != 1:
        plain = codes.numpy().astype(_on_wire(wire)).tobytes()
    else:
        # Class indices are packed to bits first: as bytes, they deflate worse at ten classes.
        plain = _to_bits(_symbols(codes, wire, classes), _width(wire, classes))
    if wire.pack == "deflate":
        plain = zlib.compress(plain, 9)
    return _tensor(np.frombuffer(plain, "u1"))


def unpacked_codes(packed: Tensor, wire: Wire, rows: int, sets: int, classes: int) -> Tensor:
    """Return the codes ``[rows, W]`` of an array that was received.

    Raises:
        FedkdError: the array has a wrong type or length, or a code is not valid.
    """
    shape = (rows, sets * classes)
    if wire.pack == "raw":
        _check_array("values", packed, wire.dtype, shape)
        codes = packed.detach()
    else:
        codes = _read_codes(packed, wire, rows * sets * classes, classes).reshape(shape)
    if wire.bits:
        _check_codes(codes, wire, classes)
    return codes


def write_bitmap(marked: Tensor) -> Tensor:
    """Return bool ``[N]`` as bits, uint8 ``[ceil(N/8)]``, the first in the highest bit."""
    return _tensor(np.packbits(marked.numpy()))


def read_bitmap(name: str, packed: Tensor, count: int) -> Tensor:
    """Return `count` bits as bool ``[count]``."""
    _check_array(name, packed, torch.uint8, (-(-count // 8),))
    bits = _from_bits(name, packed.contiguous().numpy(), count, 1)
    return torch.from_numpy(bits.astype(np.bool_))


def check_plain(name: str, tensor: Any, ndim: int) -> None:
    """Refuse anything but a dense tensor of `ndim` dimensions on the CPU."""
    if not isinstance(tensor, Tensor) or tensor.layout != torch.strided:
        raise FedkdError(f"{name} is a {type(tensor).__name__}: must be a dense tensor")
    if tensor.device.type != "cpu" or tensor.ndim != ndim:
        raise FedkdError(
            f"{name} has shape {tuple(tensor.shape)} on {tensor.device}: must have {ndim} "
            f"dimension{'s' if ndim > 1 else ''}, on the CPU"
        )


def _read_codes(packed: Tensor, wire: Wire, codes: int, classes: int) -> Tensor:
    """Return the codes of an array that is not raw, flat; there are `codes` of them."""
    check_plain("values", packed, 1)
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
    """Return codes on the simplex as int64, flat; at one bit, the class of each row instead."""
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


def _check_codes(codes: Tensor, wire: Wire, classes: int) -> None:
    """Refuse codes ``[n, W]`` that are off the simplex."""
    steps = wire.steps
    sums = codes.reshape(-1, classes).sum(-1, dtype=torch.int64)
    off = sums[sums != steps]
    if len(off):
        raise FedkdError(f"values hold a row of codes with sum {int(off[0])}: must be {steps}")


def _on_wire(wire: Wire) -> np.dtype[Any]:
    """Return the type of a code as bytes: little-endian."""
    return np.dtype({"float32": "<f4", "float16": "<f2"}.get(wire.number, "u1"))


def _width(wire: Wire, classes: int) -> int:
    """Return the bits of a symbol: b, or at one bit ceil(log2 C) (0 for a single class)."""
    return wire.bits if wire.bits > 1 else (classes - 1).bit_length()


def _to_bits(symbols: Array, width: int) -> bytes:
    """Return whole numbers packed with `width` bits each, highest first: ceil(count·width/8) bytes."""
    shifts = np.arange(width - 1, -1, -1)
    return np.packbits(((symbols[:, None] >> shifts) & 1).astype(np.uint8)).tobytes()


def _from_bits(name: str, data: Array, count: int, width: int) -> Array:
    """Return `count` numbers of `width` bits, int64 ``[count]``, read from bytes."""
    if len(data) != -(-count * width // 8):
        raise FedkdError(f"{name}: {len(data)} bytes: must be {-(-count * width // 8)}")
    bits: Array = np.unpackbits(data)
    if bits[count * width :].any():
        raise FedkdError(f"{name} has bits set after its end: must be 0")
    table: Array = bits[: count * width].reshape(count, width).astype(np.int64)
    shifts = np.arange(width - 1, -1, -1)
    numbers: Array = np.bitwise_or.reduce(table << shifts, axis=1, initial=0)
    return numbers


def _inflated(data: Array, expected: int) -> Array:
    """Return what zlib compressed, reading at most one byte more than `expected`."""
    reader = zlib.decompressobj()
    try:
        plain = reader.decompress(data.tobytes(), expected + 1)
    except zlib.error as error:
        raise FedkdError(f"values are not a zlib stream: {error}") from None
    if len(plain) != expected or not reader.eof or reader.unused_data:
        raise FedkdError(f"values do not inflate to exactly {expected} bytes")
    return np.frombuffer(plain, np.uint8)


def _check_array(name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    check_plain(name, tensor, len(shape))
    if tensor.dtype != dtype or tuple(tensor.shape) != shape:
        raise FedkdError(
            f"{name} is {tensor.dtype} {list(tensor.shape)}: must be {dtype} {list(shape)}"
        )


def _tensor(array: Array) -> Tensor:
    """Return a tensor with memory of its own (it may be written to, unlike bytes)."""
    return torch.from_numpy(array.copy())
