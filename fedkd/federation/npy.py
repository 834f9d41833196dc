"""Safe reading of untrusted arrays in NumPy's ``.npy`` format.

``numpy.load`` evaluates the header as Python, and allocates memory for whatever shape it claims before it
checks how many bytes follow. Here the header must be the text that NumPy itself writes (version 1.0 of
``numpy.lib.format``), and type and shape must account for every byte.
"""

from __future__ import annotations

import math
import re

import numpy as np
import torch
from torch import Tensor

from fedkd.errors import FedkdError

_LONGEST_HEADER = 1024
_HEADER = re.compile(
    rb"\x93NUMPY\x01\x00(?P<length>..)"
    rb"\{'descr': '(?P<type>[^'\\]{1,40})', 'fortran_order': (?P<order>True|False), "
    rb"'shape': \((?P<shape>[\d, ]*)\), \} *\n",
    re.DOTALL,
)
_TYPES = {b"|b1": "bool", b"|u1": "uint8", b"|i1": "int8"} | {
    f"<{kind}{size}".encode(): f"{name}{8 * size}"
    for kind, name in (("i", "int"), ("f", "float"))
    for size in (2, 4, 8)
}
_MOST_AXES = 16
_MOST_NUMBERS = 1 << 31


def read_npy(data: bytes) -> Tensor:
    """Return the array that `data` holds, with memory of its own: as much as its numbers have bytes.

    Both orders of axes are read.

    Raises:
        FedkdError: it is not an array, holds what no tensor can hold, or has more or fewer bytes than its
            header says.
    """
    header = _HEADER.match(data, 0, _LONGEST_HEADER)
    if header is None or 10 + int.from_bytes(header["length"], "little") != header.end():
        raise FedkdError("is not a .npy array")
    if header["type"] not in _TYPES:
        raise FedkdError(f"holds numbers of type {header['type'].decode('latin-1')!r}")
    kind, shape = np.dtype(_TYPES[header["type"]]), _shape(header["shape"])
    expected, present = kind.itemsize * math.prod(shape), len(data) - header.end()
    if expected != present:
        raise FedkdError(f"has {present} bytes: {kind.name} {list(shape)} must have {expected}")
    values = np.frombuffer(data[header.end() :], kind).copy()
    return torch.from_numpy(values.reshape(shape, order="F" if header["order"] == b"True" else "C"))


def _shape(text: bytes) -> tuple[int, ...]:
    axes = [axis for axis in text.replace(b" ", b"").split(b",") if axis]
    if len(axes) > _MOST_AXES or any(len(axis) > 10 for axis in axes):
        raise FedkdError("has a shape that no tensor has")
    shape = tuple(map(int, axes))
    if repr(shape).encode() != b"(%s)" % text:
        raise FedkdError("is not a .npy array")
    # Without the zeros, which would hide the other axes in the product.
    if math.prod(axis or 1 for axis in shape) > _MOST_NUMBERS:
        raise FedkdError(f"has a shape that no tensor has: {list(shape)}")
    return shape
