"""Client states on disk: which file and slot hold which client's state of which round.

States are kept by round because a crash or a lost reply leaves a client one round ahead: every
instruction names the round to start from. On disk a client therefore has two slots, and a new state
never overwrites the one that its instruction started from.

A file holds a group of clients that share their architectures: those with one value of ``k % period``,
as comma lists of models repeat with that period. `fedkd.clients.slot_file` describes its layout.

A state is on the disk before `StateFiles.save` returns. A process that dies, or a machine that loses
power, may leave a broken state in a slot, but never in the one that the instruction started from. The
server records a round as finished only after its clients' states are written, so no instruction starts
from a broken state. A state that has changed since it was written counts as lost, by its checksum.
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
    BOOKKEEPING,
    CLIENTS_A_FILE,
    DamagedError,
    Ints,
    RowType,
    SlotFile,
    bytes_of,
    file_header,
    row_types,
)
from fedkd.clients.states import INITIAL, States
from fedkd.errors import FedkdError, safe_logger
from fedkd.records.files import flush_folder, make_folder
from fedkd.training.parameters import State

_logger = safe_logger(__name__)

LOCK_TIMEOUT = 60.0
"""Seconds to wait for a file that another process has locked."""


@dataclass(frozen=True)
class StateFiles:
    """States on disk, for any number of processes at once.

    Client k is in ``<folder>/<k % period>-<k // period // CLIENTS_A_FILE>.safetensors``, which holds
    ``<role>/<name>`` ``[2, CLIENTS_A_FILE, ...]``, and int64 ``round``, ``digested``, ``kept`` and
    ``checksum`` ``[2, CLIENTS_A_FILE]``: two slots a client, round 0 where a slot is empty.

    Attributes:
        folder: created if it is missing.
        period: clients whose ids differ by a multiple of it have the same architectures.
    """

    folder: Path
    period: int = 1

    def path_of(self, client: int) -> Path:
        """Return the file that holds a client's states."""
        return next(self._locations([client])).path

    def load(self, bases: Mapping[int, int]) -> States:
        """Return states, on the CPU.

        Args:
            bases: by client, the round of the state to read; all of the same architectures.

        Returns:
            The states that exist, in the order of `bases`; ``clients`` lists whose.

        Raises:
            FedkdError: a state is damaged, a file cannot be read, or its parameters differ from those of
                another file.
        """
        states, damaged = self.find(bases)
        for text in damaged.values():
            raise DamagedError(text)
        return states

    def find(self, bases: Mapping[int, int]) -> tuple[States, dict[int, str]]:
        """Return the states that exist and are whole, as `load` does, and which are damaged.

        Returns:
            The states, and by client in one line why its state is not among them, if it is damaged.

        Raises:
            FedkdError: a file cannot be read, or its parameters differ from those of another file.
        """
        clients = list(bases)
        rounds = np.fromiter(bases.values(), np.int64, len(bases))
        exists = np.zeros(len(bases), dtype=bool)
        stack: dict[str, Tensor] = {}
        damaged: dict[int, str] = {}
        for location in self._locations(clients):
            if not location.path.exists():
                continue
            try:
                with location.opened("read") as file:
                    whole, broken = _read(file, location, rounds, stack)
            except DamagedError as error:
                damaged |= {clients[position]: str(error) for position in location.positions}
                continue
            exists[whole] = True
            for client in (clients[position] for position in broken):
                what = f"what client {client} kept of round {bases[client]}"
                damaged[client] = f"{location.path} is damaged: {what} is not as it was written"
        numbers = {
            name: stack.pop(name, torch.zeros(len(clients), dtype=torch.int64)).tolist()
            for name in BOOKKEEPING
        }
        states = States(clients, _by_role(stack), numbers["digested"], numbers["kept"])
        if exists.all():
            return states, damaged
        return states.rows(np.flatnonzero(exists).tolist()), damaged

    def save(self, states: States, round: int, keep: Mapping[int, int]) -> None:
        """Write states, and delete these clients' older ones except those to keep.

        A damaged file is replaced, and stays beside the new one, as ``<name>.damaged``.

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
        numbers = {"digested": states.digested, "kept": states.kept, "checksum": [0] * len(states)}
        stack |= {name: torch.tensor(each, dtype=torch.int64) for name, each in numbers.items()}
        stack["round"] = torch.full((len(states),), round)  # the last, see `_write`
        kept_rounds = np.array([keep[client] for client in states.clients], dtype=np.int64)
        for location in self._locations(states.clients):
            try:
                _write(location, kinds, stack, kept_rounds)
            except DamagedError:
                location.set_aside(kinds)
                _write(location, kinds, stack, kept_rounds)

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
            make_folder(self.path.parent)
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

    def set_aside(self, kinds: Mapping[str, RowType]) -> None:
        """Rename the file, unless another process has replaced it meanwhile."""
        try:
            with FileIO(self.path, "r+") as file:
                _lock(file, shared=False)
                with suppress(FileNotFoundError):
                    if os.path.samestat(os.fstat(file.fileno()), self.path.stat()):
                        self._rename_if_damaged(file, kinds)
        except OSError as error:
            raise FedkdError(f"{self.path} cannot be replaced: {error.strerror}") from error

    def _rename_if_damaged(self, file: FileIO, kinds: Mapping[str, RowType]) -> None:
        try:
            SlotFile(self.path, file, self.metadata).check(kinds)
        except DamagedError as error:
            aside = self.path.with_name(f"{self.path.name}.damaged")
            _logger.warning("%s: renamed to %s, and replaced", error, aside.name)
            self.path.replace(aside)
            flush_folder(self.path.parent)

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


def _read(
    file: SlotFile, location: _Location, rounds: Ints, stack: dict[str, Tensor]
) -> tuple[Ints, Ints]:
    """Read a file's states of some rounds into a stack, which is made if it is empty.

    Returns:
        The positions of states that are as they were written, and of those that are not.

    Raises:
        FedkdError: the file's parameters differ from the stack's.
    """
    stored = file.rounds()[:, location.rows]
    matches = (stored == rounds[location.positions]) & (stored != INITIAL)
    matched = matches.any(0)
    positions = location.positions[matched]
    if not len(positions):
        return positions, positions
    found = stack or file.empty_stack(len(rounds))
    file.check(row_types({name: found[name] for name in found if name not in BOOKKEEPING}))
    contents = {name: bytes_of(tensor) for name, tensor in found.items()}
    file.read((matches.argmax(0) * CLIENTS_A_FILE + location.rows)[matched], positions, contents)
    fits = file.checksums(positions, contents) == found["checksum"].numpy()[positions]
    if fits.any():
        stack.update(found)
    return positions[fits], positions[~fits]


def _write(
    location: _Location,
    kinds: Mapping[str, RowType],
    stack: Mapping[str, Tensor],
    kept_rounds: Ints,
) -> None:
    """Write a stack's states of the clients of one file.

    Args:
        location: the file and its clients.
        kinds: row types of the parameters.
        stack: the parameters, and the numbers of `BOOKKEEPING`; checksums are set here.
        kept_rounds: the round of the state to keep, of each state of the stack.

    Raises:
        FedkdError: see `StateFiles.save`; a `DamagedError` if the file is damaged.
    """
    round = int(stack["round"][0])
    contents = {name: bytes_of(tensor) for name, tensor in stack.items()}
    location.create(kinds)
    with location.opened("written") as file:
        file.check(kinds)
        stored = file.rounds()[:, location.rows]
        slots, columns = np.nonzero(stored > round)
        if file.whole(slots * CLIENTS_A_FILE + location.rows[columns]).any():
            raise FedkdError(
                f"{location.path} already holds states of rounds after {round}: an earlier run "
                "had the same name, or this process is left over from a run that has continued "
                "without it"
            )
        stays = (stored == kept_rounds[location.positions]) & (stored != round)
        cells = stays[0] * CLIENTS_A_FILE + location.rows
        stack["checksum"].numpy()[location.positions] = file.checksums(location.positions, contents)
        # A partial write must not count as a state: the slot is marked empty until all of it is
        # written.
        file.write_rounds(location.rows, np.where(stays, stored, INITIAL))
        file.write(cells, location.positions, contents)
        file.flush()


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
