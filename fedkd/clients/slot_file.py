"""The bytes of one file of states: two slots a client, read and written in place.

It is a safetensors file of fixed size, sparse, so that it takes the space of the rows that were
written. Rows are read and written in place, only as many as asked for: a memory map would make whole
pages resident, kill the process where the disk is full instead of raising an error, and share pages
between machines that write each other's neighbours.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from io import FileIO
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedkd.errors import FedkdError

CLIENTS_A_FILE = 100
"""Few enough that a file is quickly copied, many enough that a folder of 10,000 clients is short."""

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""The names of dtypes in a safetensors file."""

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class RowType:
    """What a row of a tensor is."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Bytes."""
        return prod(self.shape) * self.dtype.itemsize

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')} {list(self.shape)}"


_BOOKKEEPING = {"round": RowType(torch.int64, ()), "digested": RowType(torch.int64, ())}


def row_types(stack: Mapping[str, Tensor]) -> dict[str, RowType]:
    """Return what a row of each tensor ``[K, ...]`` is."""
    return {name: RowType(tensor.dtype, tuple(tensor.shape[1:])) for name, tensor in stack.items()}


class SlotFile:
    """An open file of states. A cell is a slot of a client: slot · `CLIENTS_A_FILE` + row."""

    def __init__(self, path: Path, file: FileIO, metadata: Mapping[str, str]) -> None:
        self._path = path
        self._file = file
        try:
            length = int.from_bytes(self._bytes(0, 8), "little")
            size = os.fstat(file.fileno()).st_size
            header = json.loads(self._bytes(8, min(length, size)))
            found = header.pop("__metadata__")
            self._kinds = {name: _kind(entry) for name, entry in header.items()}
            self._starts = {
                name: 8 + length + int(entry["data_offsets"][0]) for name, entry in header.items()
            }
            whole = 8 + length + _data_size(self._kinds)
        except (ValueError, KeyError, TypeError, AttributeError):
            raise FedkdError(f"{path} is not a file of client states") from None
        if size != whole:
            raise FedkdError(f"{path} has {size} bytes instead of {whole}")
        if found != metadata:
            raise FedkdError(f"{path} is for clients {_words(found)}, not for {_words(metadata)}")

    def check(self, kinds: Mapping[str, RowType]) -> None:
        """Refuse a file of other parameters than these."""
        wanted = {**_BOOKKEEPING, **kinds}
        if self._kinds == wanted:
            return
        for name in {**wanted, **self._kinds}:
            here, there = self._kinds.get(name), wanted.get(name)
            if here != there:
                raise FedkdError(
                    f"{self._path} holds {name} as {here or 'nothing'} a client, and the states "
                    f"have {there or 'nothing'}: they are of other models"
                )

    def empty_stack(self, count: int) -> dict[str, Tensor]:
        """Return a stack of `count` clients' parameters, not initialised."""
        return {
            name: torch.empty((count, *kind.shape), dtype=kind.dtype)
            for name, kind in self._kinds.items()
            if name not in _BOOKKEEPING
        }

    def rounds(self) -> Ints:
        """Return the rounds of all slots, int64 ``[2, CLIENTS_A_FILE]``."""
        content = self._bytes(self._starts["round"], 2 * CLIENTS_A_FILE * 8)
        return np.frombuffer(content, "<i8").reshape(2, CLIENTS_A_FILE)

    def write_rounds(self, rows: Ints, rounds: Ints) -> None:
        """Write the rounds int64 ``[2, n]`` of both slots of some rows."""
        cells = np.concatenate([rows, CLIENTS_A_FILE + rows])
        self.write(cells, np.arange(len(cells)), {"round": rounds.reshape(-1).view(np.uint8).data})

    def flush(self) -> None:
        """Force what was written to the disk."""
        os.fsync(self._file.fileno())

    def read(self, cells: Ints, positions: Ints, contents: Mapping[str, memoryview]) -> None:
        """Read cells of the named tensors into positions of stacks, of which it gets the bytes."""
        for offset, piece in self._pieces(cells, positions, contents):
            self._file.seek(offset)
            while piece:
                piece = piece[self._some(self._file.readinto(piece)) :]

    def write(self, cells: Ints, positions: Ints, contents: Mapping[str, memoryview]) -> None:
        """Write positions of stacks, of which it gets the bytes, to cells of the named tensors."""
        for offset, piece in self._pieces(cells, positions, contents):
            self._file.seek(offset)
            while piece:
                piece = piece[self._file.write(piece) :]

    def _pieces(
        self, cells: Ints, positions: Ints, contents: Mapping[str, memoryview]
    ) -> Iterator[tuple[int, memoryview]]:
        """Yield what is adjacent both in the file and in memory: byte offset, and bytes."""
        runs = _runs(cells, positions)
        for name, content in contents.items():
            start, size = self._starts[name], self._kinds[name].size
            for cell, position, length in runs:
                yield start + cell * size, content[position * size : (position + length) * size]

    def _bytes(self, offset: int, size: int) -> bytearray:
        content = bytearray(size)
        self._file.seek(offset)
        missing = memoryview(content)
        while missing:
            missing = missing[self._some(self._file.readinto(missing)) :]
        return content

    def _some(self, count: int | None) -> int:
        if not count:
            raise FedkdError(f"{self._path} ends early")
        return count


def bytes_of(tensor: Tensor) -> memoryview:
    """Return the bytes of a contiguous tensor on the CPU: its own, not a copy."""
    # By explicit strides, as those of an axis of length 1 may be anything.
    return tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8).numpy().data


def _runs(cells: Ints, positions: Ints) -> list[tuple[int, int, int]]:
    """Join cells whose successors in the file are those in memory.

    Returns:
        First cell, first position and length of each run.
    """
    runs: list[tuple[int, int, int]] = []
    for cell, position in zip(cells.tolist(), positions.tolist(), strict=True):
        if runs:
            first, at, length = runs[-1]
            if (cell, position) == (first + length, at + length):
                runs[-1] = (first, at, length + 1)
                continue
        runs.append((cell, position, 1))
    return runs


def file_header(
    parameters: Mapping[str, RowType], metadata: Mapping[str, str]
) -> tuple[bytes, int]:
    """Return the header of a file of empty slots, and the size of the whole file in bytes."""
    kinds = {**_BOOKKEEPING, **parameters}
    names = {dtype: name for name, dtype in DTYPES.items()}
    entries: dict[str, Any] = {"__metadata__": dict(metadata)}
    offsets, end = {}, 0
    # As in files that safetensors writes, the widest first, so that every tensor is aligned.
    for name, kind in sorted(kinds.items(), key=lambda item: -item[1].dtype.itemsize):
        offsets[name] = [end, end := end + 2 * CLIENTS_A_FILE * kind.size]
    for name, kind in kinds.items():
        if kind.dtype not in names:
            raise FedkdError(f"{name} is {kind.dtype}: states on disk are {', '.join(DTYPES)}")
        entries[name] = {
            "dtype": names[kind.dtype],
            "shape": [2, CLIENTS_A_FILE, *kind.shape],
            "data_offsets": offsets[name],
        }
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, 8 + len(text) + end


def _kind(entry: Mapping[str, Any]) -> RowType:
    """Read a tensor's entry in a header."""
    slots, clients, *shape = entry["shape"]
    if (slots, clients) != (2, CLIENTS_A_FILE):
        raise ValueError("not two slots a client")
    return RowType(DTYPES[entry["dtype"]], tuple(shape))


def _data_size(kinds: Mapping[str, RowType]) -> int:
    return sum(2 * CLIENTS_A_FILE * kind.size for kind in kinds.values())


def _words(metadata: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {number}" for name, number in metadata.items())
