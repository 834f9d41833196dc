"""Client states on disk: which file and slot hold which client's state of which round.

States are kept by round because a crash or a lost reply leaves a client one round ahead: every
instruction names the round to start from. On disk a client therefore has two slots, and a new state
never overwrites the one that its instruction started from.

A file holds a group of clients that share their architectures: those with one value of ``k % period``,
as comma lists of models repeat with that period. `fedkd.clients.slot_file` describes its layout.

A state is on the disk before `StateFiles.save` returns. A process that dies, or a machine that loses
power, may leave a broken state in a slot, but never in the one that the instruction started from. The
server records a round as finished only after its clients' states are written, so no instruction starts
from a broken state.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from secrets import token_hex
from time import monotonic, sleep

import numpy as np
import torch
from torch import Tensor

from fedkd.clients.slot_file import (
    CLIENTS_A_FILE,
    Ints,
    RowType,
    SlotFile,
    bytes_of,
    file_header,
    row_types,
)
from fedkd.clients.states import INITIAL, States
from fedkd.errors import FedkdError
from fedkd.records.files import flush_folder
from fedkd.training.parameters import State

LOCK_TIMEOUT = 60.0
"""Seconds to wait for a file that another process has locked."""


@dataclass(frozen=True)
class StateFiles:
    """States on disk, for any number of processes at once.

    Client k is in ``<folder>/<k % period>-<k // period // CLIENTS_A_FILE>.safetensors``, which holds
    ``<role>/<name>`` ``[2, CLIENTS_A_FILE, ...]``, and int64 ``round`` and
    ``digested`` ``[2, CLIENTS_A_FILE]``: two slots a client, round 0 where a slot is empty.

    Attributes:
        folder: created if it is missing.
        period: clients whose ids differ by a multiple of it have the same architectures.
    """

    folder: Path
    period: int = 1

    def load(self, bases: Mapping[int, int]) -> States:
        """Return states, on the CPU.

        Args:
            bases: by client, the round of the state to read; all of the same architectures.

        Returns:
            The states that exist, in the order of `bases`; ``clients`` lists whose.

        Raises:
            FedkdError: a file cannot be read, or its parameters differ from those of another file.
        """
        clients = list(bases)
        base_rounds = np.fromiter(bases.values(), np.int64, len(bases))
        digested = torch.zeros(len(bases), dtype=torch.int64)
        exists = np.zeros(len(bases), dtype=bool)
        stack: dict[str, Tensor] = {}
        for location in self._locations(clients):
            if not location.path.exists():
                continue
            with location.opened("read") as file:
                stored = file.rounds()[:, location.rows]
                matches = (stored == base_rounds[location.positions]) & (stored != INITIAL)
                matched = matches.any(0)
                if not matched.any():
                    continue
                if not stack:
                    stack = file.empty_stack(len(clients))
                    kinds = row_types(stack)
                    contents = {n: bytes_of(t) for n, t in [*stack.items(), ("digested", digested)]}
                file.check(kinds)
                cells = (matches.argmax(0) * CLIENTS_A_FILE + location.rows)[matched]
                positions = location.positions[matched]
                file.read(cells, positions, contents)
                exists[positions] = True
        states = States(clients, _by_role(stack), digested.tolist())
        if exists.all():
            return states
        return states.rows(np.flatnonzero(exists).tolist())

    def save(self, states: States, round: int, keep: Mapping[int, int]) -> None:
        """Write states, and delete these clients' older ones except those to keep.

        Args:
            states: on any device.
            round: of the states.
            keep: by client, the round that it started from, whose state stays. States of other
                clients are not changed.

        Raises:
            FedkdError: a file cannot be written, or holds other parameters, or newer states: this
                process is left over from a run that has continued without it. The states to keep
                are intact.
        """
        if round <= INITIAL:
            raise ValueError(f"round = {round}: only the states of later rounds are stored")
        stack = {
            f"{role}/{name}": tensor.detach().cpu().contiguous()
            for role, model in states.models.items()
            for name, tensor in model.items()
        }
        kinds = row_types(stack)
        digested = torch.tensor(states.digested, dtype=torch.int64)
        contents = {name: bytes_of(t) for name, t in [*stack.items(), ("digested", digested)]}
        rounds = {"round": bytes_of(torch.full((len(states),), round))}
        kept_rounds = np.array([keep[client] for client in states.clients], dtype=np.int64)
        for location in self._locations(states.clients):
            location.create(kinds)
            with location.opened("written") as file:
                file.check(kinds)
                stored = file.rounds()[:, location.rows]
                if (stored > round).any():
                    raise FedkdError(
                        f"{location.path} already holds states of rounds after {round}: an earlier run "
                        "had the same name, or this process is left over from a run that has continued "
                        "without it"
                    )
                stays = (stored == kept_rounds[location.positions]) & (stored != round)
                cells = stays[0] * CLIENTS_A_FILE + location.rows
                # A partial write must not count as a state: the slot is marked empty until all of it is
                # written.
                file.write_rounds(location.rows, np.where(stays, stored, INITIAL))
                file.write(cells, location.positions, contents)
                file.write(cells, location.positions, rounds)
                file.flush()

    def _locations(self, clients: Sequence[int]) -> Iterator[_Location]:
        """Yield the files of clients, with the clients in each."""
        rank, residue = np.divmod(np.array(clients, dtype=np.int64), self.period)
        number, row = np.divmod(rank, CLIENTS_A_FILE)
        files: dict[tuple[int, int], list[int]] = {}
        for position, key in enumerate(zip(residue.tolist(), number.tolist(), strict=True)):
            files.setdefault(key, []).append(position)
        for (residue_of_file, file_number), positions in files.items():
            path = self.folder / f"{residue_of_file}-{file_number}.safetensors"
            first = residue_of_file + file_number * CLIENTS_A_FILE * self.period
            index = np.array(positions)
            yield _Location(path, first, self.period, row[index], index)


@dataclass(frozen=True, eq=False)
class _Location:
    """The clients of one call whose states are in one file.

    Attributes:
        path: of the file.
        first: client of row 0.
        step: difference between the clients of consecutive rows.
        rows: of the clients in the file, int64 ``[n]``.
        positions: of the same clients in the call, int64 ``[n]``.
    """

    path: Path
    first: int
    step: int
    rows: Ints
    positions: Ints

    @property
    def metadata(self) -> dict[str, str]:
        """The file's metadata, which identify its clients."""
        numbers = {"first": self.first, "step": self.step, "count": CLIENTS_A_FILE}
        return {name: str(number) for name, number in numbers.items()}

    def create(self, kinds: Mapping[str, RowType]) -> None:
        """Create the file, with empty slots for rows of these types, if it is missing."""
        if self.path.exists():
            return
        # Another process may create it at the same time; the second must not replace the first.
        temporary = self.path.with_name(f".{self.path.name}.{token_hex(8)}.part")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            header, size = file_header(kinds, self.metadata)
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
    def opened(self, purpose: str) -> Iterator[SlotFile]:
        """Yield the open, locked file, to be ``"read"`` or ``"written"``.

        Raises:
            FedkdError: it cannot be opened or locked, or is not a complete file of these clients.
        """
        try:
            with FileIO(self.path, "r" if purpose == "read" else "r+") as file:
                _lock(file, shared=purpose == "read")
                yield SlotFile(self.path, file, self.metadata)
        except OSError as error:
            raise FedkdError(f"{self.path} cannot be {purpose}: {error.strerror}") from error


def _lock(file: FileIO, *, shared: bool) -> None:
    """Lock a file, waiting for writers (and, unless `shared`, for readers) in other processes.

    A client that is late for its round may still be writing when the same client starts the next.

    Raises:
        FedkdError: another process holds the lock for `LOCK_TIMEOUT` seconds.
    """
    with suppress(ImportError, OSError):  # Windows and some network file systems have no locks
        import fcntl

        kind = (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB
        end = monotonic() + LOCK_TIMEOUT
        while monotonic() < end:
            with suppress(BlockingIOError):
                fcntl.flock(file, kind)
                return
            sleep(0.01)
        raise FedkdError(f"{file.name} has been locked by another process for {LOCK_TIMEOUT:g} s")


def _by_role(stack: Mapping[str, Tensor]) -> dict[str, State]:
    models: dict[str, State] = {}
    for name, tensor in stack.items():
        role, _, parameter = name.partition("/")
        models.setdefault(role, {})[parameter] = tensor
    return models
