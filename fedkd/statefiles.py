"""What clients keep between rounds, on disk: stacks of tensors that are read and written in place.

States are kept by round because a crash or a lost reply leaves a client one round ahead: every order
names the round to start from. On disk a client therefore has two slots, and a new state never takes
the one that its order started from.

A file holds a shard of clients that share their architectures: client k of ``k % period``, as comma
lists of models repeat with that period. It is a safetensors file of fixed size, sparse, so that it
takes the space of the rows that were written. Rows are read and written in place, only as many as
asked for: a memory map would make whole pages resident, be killed where the disk is full instead of
told so, and share pages between machines that write each other's neighbours.

A state is on the disk before `StateFiles.save` returns. A process that dies, or a machine that loses
power, may leave a broken state in a slot, but never in that of the state which the order started from;
and as a server writes down that a round is done after its clients' states, nobody asks for the other.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from io import FileIO
from math import prod
from pathlib import Path
from secrets import token_hex
from time import monotonic, sleep
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedkd.cohort import State
from fedkd.errors import FedkdError
from fedkd.records import flush_folder

INITIAL = 0
"""The round of the state that every client starts from; it is never stored."""

CLIENTS_A_FILE = 100
"""Few enough that a file is quickly copied, many enough that a folder of 10,000 clients is short."""

LOCK_TIMEOUT = 60.0
"""Seconds until a file that another process works on must be free."""

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

_Ints = NDArray[np.int64]


@dataclass(eq=False)
class States:
    """The states of K clients that share their architectures.

    Attributes:
        clients: partition ids.
        models: parameters and buffers ``[K, ...]`` by role and name; clients without a local teacher
            have only a student.
        digested: of each client, the round of the newest knowledge that it has digested.
    """

    clients: list[int]
    models: dict[str, State]
    digested: list[int]

    def __len__(self) -> int:
        return len(self.clients)

    def rows(self, positions: Sequence[int]) -> States:
        """Copy the states at some positions of the stack."""
        index = torch.tensor(positions, dtype=torch.int64)
        models = {
            role: {name: tensor[index.to(tensor.device)] for name, tensor in model.items()}
            for role, model in self.models.items()
        }
        clients, digested = ([each[i] for i in positions] for each in (self.clients, self.digested))
        return States(clients, models, digested)

    def to(self, device: torch.device) -> States:
        """Return these states on a device: the very tensors where they are there already."""
        models = {
            role: {name: tensor.to(device) for name, tensor in model.items()}
            for role, model in self.models.items()
        }
        return States(self.clients, models, self.digested)


def concatenated(parts: Sequence[States]) -> States:
    """Copy stacks with the same roles and parameters one behind the other."""
    models: dict[str, State] = {
        role: {name: torch.cat([part.models[role][name] for part in parts]) for name in model}
        for role, model in parts[0].models.items()
    }
    clients = [client for part in parts for client in part.clients]
    return States(clients, models, [number for part in parts for number in part.digested])


def join(parts: Sequence[States], clients: Sequence[int]) -> States:
    """Copy the states of `clients`, in that order, out of stacks on one device.

    Args:
        parts: stacks with the same roles and parameters; together they hold every client once.
        clients: all clients of the stacks.
    """
    return gather([(part, range(len(part))) for part in parts], clients)


def gather(
    sources: Sequence[tuple[States, Sequence[int]]],
    clients: Sequence[int],
    device: torch.device | None = None,
) -> States:
    """Copy rows of stacks into a new one, on `device` (default: that of the first)."""
    first = sources[0][0]
    models: dict[str, State] = {
        role: {
            name: tensor.new_empty((len(clients), *tensor.shape[1:]), device=device)
            for name, tensor in model.items()
        }
        for role, model in first.models.items()
    }
    joined = States(list(clients), models, [0] * len(clients))
    place = {client: position for position, client in enumerate(clients)}
    for states, rows in sources:
        positions = [place[states.clients[row]] for row in rows]
        for row, position in zip(rows, positions, strict=True):
            joined.digested[position] = states.digested[row]
        for role, model in models.items():
            for name, tensor in model.items():
                source = states.models[role][name]
                picked = source[torch.tensor(rows, dtype=torch.int64, device=source.device)]
                index = torch.tensor(positions, dtype=torch.int64, device=tensor.device)
                tensor[index] = picked.to(tensor.device)
    return joined


# --- On disk -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StateFiles:
    """States on disk, for any number of processes at once.

    Client k is in ``<folder>/<k % period>-<k // period // CLIENTS_A_FILE>.safetensors``, which holds
    ``<role>/<name>`` ``[2, CLIENTS_A_FILE, ...]``, and int64 ``round`` and
    ``digested`` ``[2, CLIENTS_A_FILE]``: two slots a client, round 0 where a slot is empty.

    Attributes:
        folder: made where there is none.
        period: clients whose numbers differ by a multiple of it have the same architectures.
    """

    folder: Path
    period: int = 1

    def load(self, bases: Mapping[int, int]) -> States:
        """Read states, on the CPU.

        Args:
            bases: by client, the round whose state is wanted; all of the same architectures.

        Returns:
            Those that are there, in the order asked for; ``clients`` tells which.

        Raises:
            FedkdError: a file cannot be read, or holds other parameters than the one before it.
        """
        clients = list(bases)
        wanted = np.fromiter(bases.values(), np.int64, len(bases))
        digested = torch.zeros(len(wanted), dtype=torch.int64)
        is_found = np.zeros(len(wanted), dtype=bool)
        stack: dict[str, Tensor] = {}
        for part in self._parts(clients):
            if not part.path.exists():
                continue
            with part.opened("read") as file:
                held = file.rounds()[:, part.rows]
                matches = (held == wanted[part.positions]) & (held != INITIAL)
                here = matches.any(0)
                if not here.any():
                    continue
                if not stack:
                    stack = file.empty_stack(len(clients))
                    kinds = _kinds(stack)
                    contents = {n: _content(t) for n, t in [*stack.items(), ("digested", digested)]}
                file.check(kinds)
                cells = (matches.argmax(0) * CLIENTS_A_FILE + part.rows)[here]
                positions = part.positions[here]
                file.read(cells, positions, contents)
                is_found[positions] = True
        states = States(clients, _by_role(stack), digested.tolist())
        if is_found.all():
            return states
        return states.rows(np.flatnonzero(is_found).tolist())

    def save(self, states: States, round: int, keep: Mapping[int, int]) -> None:
        """Write states, and drop all others of these clients but those to keep.

        Args:
            states: on any device.
            round: that they are of.
            keep: by client, the round that it started from, which stays. What other clients have
                is not touched.

        Raises:
            FedkdError: a file cannot be written, or holds other parameters, or newer states: this
                process is a leftover of a run that has gone on without it. The states to keep are
                there nevertheless.
        """
        if round <= INITIAL:
            raise ValueError(f"round = {round}: only the states of later rounds are stored")
        stack = {
            f"{role}/{name}": tensor.detach().cpu().contiguous()
            for role, model in states.models.items()
            for name, tensor in model.items()
        }
        kinds = _kinds(stack)
        digested = torch.tensor(states.digested, dtype=torch.int64)
        contents = {name: _content(t) for name, t in [*stack.items(), ("digested", digested)]}
        rounds = {"round": _content(torch.full((len(states),), round))}
        kept = np.array([keep[client] for client in states.clients], dtype=np.int64)
        for part in self._parts(states.clients):
            part.create(kinds)
            with part.opened("written") as file:
                file.check(kinds)
                held = file.rounds()[:, part.rows]
                if (held > round).any():
                    raise FedkdError(
                        f"{part.path} holds states of rounds after {round} already: of an earlier run of "
                        "the same name, or this process is a leftover of a run that has gone on"
                    )
                stays = (held == kept[part.positions]) & (held != round)
                cells = stays[0] * CLIENTS_A_FILE + part.rows
                # Nothing that a torn write leaves behind may pass for a state: the slot is empty
                # until all of it is there.
                file.write_rounds(part.rows, np.where(stays, held, INITIAL))
                file.write(cells, part.positions, contents)
                file.write(cells, part.positions, rounds)
                file.flush()

    def _parts(self, clients: Sequence[int]) -> Iterator[_Part]:
        """Sort clients into files."""
        rank, residue = np.divmod(np.array(clients, dtype=np.int64), self.period)
        number, row = np.divmod(rank, CLIENTS_A_FILE)
        files: dict[tuple[int, int], list[int]] = {}
        for position, key in enumerate(zip(residue.tolist(), number.tolist(), strict=True)):
            files.setdefault(key, []).append(position)
        for (of, at), positions in files.items():
            path = self.folder / f"{of}-{at}.safetensors"
            first = of + at * CLIENTS_A_FILE * self.period
            index = np.array(positions)
            yield _Part(path, first, self.period, row[index], index)


@dataclass(frozen=True)
class _Kind:
    """What a row of a tensor is."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Bytes."""
        return prod(self.shape) * self.dtype.itemsize

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')} {list(self.shape)}"


_BOOKKEEPING = {"round": _Kind(torch.int64, ()), "digested": _Kind(torch.int64, ())}


def _kinds(stack: Mapping[str, Tensor]) -> dict[str, _Kind]:
    return {name: _Kind(tensor.dtype, tuple(tensor.shape[1:])) for name, tensor in stack.items()}


@dataclass(frozen=True, eq=False)
class _Part:
    """The clients of one call that share a file.

    Attributes:
        path: of the file.
        first: client of its row 0.
        step: from the client of one row to that of the next.
        rows: of the file, int64 ``[n]``.
        positions: of the same clients in the call, int64 ``[n]``.
    """

    path: Path
    first: int
    step: int
    rows: _Ints
    positions: _Ints

    @property
    def metadata(self) -> dict[str, str]:
        """Whose states the file holds."""
        numbers = {"first": self.first, "step": self.step, "count": CLIENTS_A_FILE}
        return {name: str(number) for name, number in numbers.items()}

    def create(self, kinds: Mapping[str, _Kind]) -> None:
        """Make the file where there is none: empty slots for rows of these kinds."""
        if self.path.exists():
            return
        # Another process may make it just now; whoever comes second must not replace it.
        temporary = self.path.with_name(f".{self.path.name}.{token_hex(8)}.part")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            header, size = _header({**_BOOKKEEPING, **kinds}, self.metadata)
            with temporary.open("xb") as file:
                file.write(header)
                file.truncate(size)
                file.flush()
                os.fsync(file.fileno())
            with suppress(FileExistsError):
                self.path.hardlink_to(temporary)
            flush_folder(self.path.parent)
        except OSError as error:
            raise FedkdError(f"{self.path} cannot be written: {error.strerror}") from error
        finally:
            with suppress(OSError):
                temporary.unlink()

    @contextmanager
    def opened(self, purpose: str) -> Iterator[_OpenFile]:
        """Open the file to be ``"read"`` or ``"written"``.

        Raises:
            FedkdError: it cannot be, or is no whole file of these clients' states.
        """
        try:
            with FileIO(self.path, "r" if purpose == "read" else "r+") as file:
                _lock(file, shared=purpose == "read")
                yield _OpenFile(self.path, file, self.metadata)
        except OSError as error:
            raise FedkdError(f"{self.path} cannot be {purpose}: {error.strerror}") from error


def _lock(file: FileIO, *, shared: bool) -> None:
    """Wait until no other has the file open to write it (or, unless `shared`, to read it).

    A client that is late for its round may still be writing when the same client starts the next.

    Raises:
        FedkdError: another process does not let go.
    """
    with suppress(ImportError, OSError):  # Windows and some network file systems know no locks
        import fcntl

        kind = (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB
        end = monotonic() + LOCK_TIMEOUT
        while monotonic() < end:
            with suppress(BlockingIOError):
                fcntl.flock(file, kind)
                return
            sleep(0.01)
        raise FedkdError(f"{file.name} has been locked by another process for {LOCK_TIMEOUT:g} s")


class _OpenFile:
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

    def check(self, kinds: Mapping[str, _Kind]) -> None:
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

    def rounds(self) -> _Ints:
        """Return the rounds of all slots, int64 ``[2, CLIENTS_A_FILE]``."""
        content = self._bytes(self._starts["round"], 2 * CLIENTS_A_FILE * 8)
        return np.frombuffer(content, "<i8").reshape(2, CLIENTS_A_FILE)

    def write_rounds(self, rows: _Ints, rounds: _Ints) -> None:
        """Write the rounds int64 ``[2, n]`` of both slots of some rows."""
        cells = np.concatenate([rows, CLIENTS_A_FILE + rows])
        self.write(cells, np.arange(len(cells)), {"round": rounds.reshape(-1).view(np.uint8).data})

    def flush(self) -> None:
        """Force what was written to the disk."""
        os.fsync(self._file.fileno())

    def read(self, cells: _Ints, positions: _Ints, contents: Mapping[str, memoryview]) -> None:
        """Read cells of the named tensors into positions of stacks, of which it gets the bytes."""
        for offset, piece in self._pieces(cells, positions, contents):
            self._file.seek(offset)
            while piece:
                piece = piece[self._some(self._file.readinto(piece)) :]

    def write(self, cells: _Ints, positions: _Ints, contents: Mapping[str, memoryview]) -> None:
        """Write positions of stacks, of which it gets the bytes, to cells of the named tensors."""
        for offset, piece in self._pieces(cells, positions, contents):
            self._file.seek(offset)
            while piece:
                piece = piece[self._file.write(piece) :]

    def _pieces(
        self, cells: _Ints, positions: _Ints, contents: Mapping[str, memoryview]
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


def _content(tensor: Tensor) -> memoryview:
    """Return the bytes of a contiguous tensor on the CPU: its own, not a copy."""
    # By explicit strides, as those of an axis of length 1 may be anything.
    return tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8).numpy().data


def _runs(cells: _Ints, positions: _Ints) -> list[tuple[int, int, int]]:
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


def _header(kinds: Mapping[str, _Kind], metadata: Mapping[str, str]) -> tuple[bytes, int]:
    """Return the header of a file of empty slots, and the size of the whole file in bytes."""
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


def _kind(entry: Mapping[str, Any]) -> _Kind:
    """Read a tensor's entry in a header."""
    slots, clients, *shape = entry["shape"]
    if (slots, clients) != (2, CLIENTS_A_FILE):
        raise ValueError("not two slots a client")
    return _Kind(DTYPES[entry["dtype"]], tuple(shape))


def _data_size(kinds: Mapping[str, _Kind]) -> int:
    return sum(2 * CLIENTS_A_FILE * kind.size for kind in kinds.values())


def _words(metadata: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {number}" for name, number in metadata.items())


def _by_role(stack: Mapping[str, Tensor]) -> dict[str, State]:
    models: dict[str, State] = {}
    for name, tensor in stack.items():
        role, _, parameter = name.partition("/")
        models.setdefault(role, {})[parameter] = tensor
    return models
