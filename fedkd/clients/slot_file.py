"""One state file: a safetensors file with two slots per client, read and written in place.

Its size is fixed, but it is sparse: only written rows take space on disk. Only the requested rows are
read or written. A memory map would make whole pages resident, kill the process instead of raising an
error when the disk is full, and share pages between machines that write neighbouring rows.

Every state has a checksum, so that a damaged one is not taken for a state.
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
from zlib import crc32

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedkd.errors import FedkdError

CLIENTS_A_FILE = 100
"""Small enough for files that copy quickly, large enough for a short folder of 10,000 clients."""

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
"""Dtypes by their name in a safetensors file."""

Ints = NDArray[np.int64]


class DamagedError(FedkdError):
    """A state file, or a state in it, is not as it was written."""


@dataclass(frozen=True)
class RowType:
    """Dtype and shape of a tensor's row."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """The number of bytes of a row."""
        return prod(self.shape) * self.dtype.itemsize

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')} {list(self.shape)}"


BOOKKEEPING = ("round", "digested", "kept", "checksum")
"""Numbers of each slot, int64, besides the parameters: see `StateFiles`."""

_NUMBERS = dict.fromkeys(BOOKKEEPING, RowType(torch.int64, ()))


def row_types(stack: Mapping[str, Tensor]) -> dict[str, RowType]:
    """Return the row type of each tensor ``[K, ...]``."""
    return {name: RowType(tensor.dtype, tuple(tensor.shape[1:])) for name, tensor in stack.items()}


class SlotFile:
    """An open state file. A cell is one slot of a client: slot · `CLIENTS_A_FILE` + row."""

    def __init__(self, path: Path, file: FileIO, metadata: Mapping[str, str]) -> None:
        self._path = path
        self._file = file
        try:
            length = int.from_bytes(self._bytes(0, 8), "little")
            size = os.fstat(file.fileno()).st_size
            text = self._bytes(8, min(length, size))
            header = json.loads(text)
            stored_metadata = header.pop("__metadata__")
            self._kinds = {name: _kind(entry) for name, entry in header.items()}
            self._starts = {
                name: 8 + length + entry["data_offsets"][0] for name, entry in header.items()
            }
            written, whole = file_header(self._kinds, stored_metadata)
            if written[8:] != text:
                raise ValueError("not what we write")
            self._header_checksum = crc32(text)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise DamagedError(f"{path} is not a file of client states") from None
        if size != whole:
            raise DamagedError(f"{path} has {size} bytes instead of {whole}")
        if stored_metadata != metadata:
            raise self._misfit(
                f"{path} is for clients {_text(stored_metadata)}, not for {_text(metadata)}"
            )

    def check(self, kinds: Mapping[str, RowType]) -> None:
        """Raise an error unless the file holds parameters of these row types.

        Raises:
            FedkdError: it holds others; the message names one that differs.
        """
        expected = {**_NUMBERS, **kinds}
        if self._kinds == expected:
            return
        for name in {**expected, **self._kinds}:
            in_file, in_states = self._kinds.get(name), expected.get(name)
            if in_file != in_states:
                raise self._misfit(
                    f"{self._path} holds {name} as {in_file or 'nothing'} per client, and the states "
                    f"have {in_states or 'nothing'}: they are of other models"
                )

    def empty_stack(self, count: int) -> dict[str, Tensor]:
        """Return an uninitialised stack of all that the file holds of `count` clients."""
        return {
            name: torch.empty((count, *kind.shape), dtype=kind.dtype)
            for name, kind in self._kinds.items()
        }

    def rounds(self) -> Ints:
        """Return the rounds of all slots, int64 ``[2, CLIENTS_A_FILE]``."""
        content = self._bytes(self._starts["round"], 2 * CLIENTS_A_FILE * 8)
        return np.frombuffer(content, "<i8").reshape(2, CLIENTS_A_FILE)

    def checksums(self, positions: Ints, contents: Mapping[str, memoryview]) -> Ints:
        """Return the checksums of positions of stacks, int64 ``[n]``; `contents` are all their bytes."""
        names = sorted(set(contents) - {"checksum"})
        sums = []
        for position in positions.tolist():
            value = self._header_checksum
            for name in names:
                size = self._kinds[name].size
                value = crc32(contents[name][position * size : (position + 1) * size], value)
            sums.append(value)
        return np.array(sums, dtype=np.int64)

    def whole(self, cells: Ints) -> NDArray[np.bool_]:
        """Return which cells hold a state as it was written, ``[n]``."""
        stack = self.empty_stack(len(cells))
        positions = np.arange(len(cells))
        contents = {name: bytes_of(tensor) for name, tensor in stack.items()}
        self.read(cells, positions, contents)
        stored = stack["checksum"].numpy()
        fits: NDArray[np.bool_] = self.checksums(positions, contents) == stored
        return fits

    def _misfit(self, text: str) -> FedkdError:
        """Return the error for a file of other clients or models, or of nobody's states any more."""
        is_damaged = not self.whole(np.flatnonzero(self.rounds() != 0)).any()
        return (DamagedError if is_damaged else FedkdError)(text)

    def write_rounds(self, rows: Ints, rounds: Ints) -> None:
        """Write the rounds int64 ``[2, n]`` of both slots of some rows."""
        cells = np.concatenate([rows, CLIENTS_A_FILE + rows])
        self.write(cells, np.arange(len(cells)), {"round": rounds.reshape(-1).view(np.uint8).data})

    def flush(self) -> None:
        """Force what was written to the disk."""
        os.fsync(self._file.fileno())

    def read(self, cells: Ints, positions: Ints, contents: Mapping[str, memoryview]) -> None:
        """Read cells into positions of stacks; `contents` are the bytes of these, by name."""
        for offset, piece in self._pieces(cells, positions, contents):
            self._file.seek(offset)
            while piece:
                piece = piece[self._some(self._file.readinto(piece)) :]

    def write(self, cells: Ints, positions: Ints, contents: Mapping[str, memoryview]) -> None:
        """Write positions of stacks to cells; `contents` are the bytes of the stacks, by name."""
        for offset, piece in self._pieces(cells, positions, contents):
            self._file.seek(offset)
            while piece:
                piece = piece[self._file.write(piece) :]

    def _pieces(
        self, cells: Ints, positions: Ints, contents: Mapping[str, memoryview]
    ) -> Iterator[tuple[int, memoryview]]:
        """Yield runs that are adjacent both in the file and in memory: byte offset in the file, bytes."""
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
            raise DamagedError(f"{self._path} ends early")
        return count


def bytes_of(tensor: Tensor) -> memoryview:
    """Return the bytes of a contiguous tensor on the CPU, as a view."""
    # With explicit strides, as an axis of length 1 may have any stride.
    return tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8).numpy().data


def _runs(cells: Ints, positions: Ints) -> list[tuple[int, int, int]]:
    """Return the runs of cells that are adjacent both in the file and in memory.

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
    """Return the header of a file of empty slots, and the size of the file in bytes.

    Raises:
        FedkdError: a dtype cannot be stored.
    """
    kinds = {**_NUMBERS, **parameters}
    names = {dtype: name for name, dtype in DTYPES.items()}
    entries: dict[str, Any] = {"__metadata__": dict(metadata)}
    offsets, end = {}, 0
    # The widest dtype first, as safetensors does, so that every tensor is aligned.
    for name, kind in sorted(kinds.items(), key=lambda item: -item[1].dtype.itemsize):
        offsets[name] = [end, end := end + 2 * CLIENTS_A_FILE * kind.size]
    for name, kind in kinds.items():
        if kind.dtype not in names:
            raise FedkdError(f"{name} is {kind.dtype}: states on disk must be {', '.join(DTYPES)}")
        entries[name] = {
            "dtype": names[kind.dtype],
            "shape": [2, CLIENTS_A_FILE, *kind.shape],
            "data_offsets": offsets[name],
        }
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, 8 + len(text) + end


def _kind(entry: Mapping[str, Any]) -> RowType:
    """Return the row type in a tensor's entry of a header."""
    slots, clients, *shape = entry["shape"]
    if (slots, clients) != (2, CLIENTS_A_FILE):
        raise ValueError("not two slots per client")
    return RowType(DTYPES[entry["dtype"]], tuple(shape))


def _text(metadata: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {number}" for name, number in metadata.items())
