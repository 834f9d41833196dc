"""What clients keep between rounds, on disk: which file holds which client's state of which round.

States are kept by round because a crash or a lost reply leaves a client one round ahead: every
instruction names the round to start from. On disk a client therefore has two slots, and a new state never
takes the one that its instruction started from.

A file holds a shard of clients that share their architectures: client k of ``k % period``, as comma
lists of models repeat with that period. `fedkd.clients.slot_file` says how it is laid out.

A state is on the disk before `StateFiles.save` returns. A process that dies, or a machine that loses
power, may leave a broken state in a slot, but never in that of the state which the order started from;
and as a server writes down that a round is done after its clients' states, nobody asks for the other.
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
"""Seconds until a file that another process works on must be free."""


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
        for location in self._locations(clients):
            if not location.path.exists():
                continue
            with location.opened("read") as file:
                held = file.rounds()[:, location.rows]
                matches = (held == wanted[location.positions]) & (held != INITIAL)
                here = matches.any(0)
                if not here.any():
                    continue
                if not stack:
                    stack = file.empty_stack(len(clients))
                    kinds = row_types(stack)
                    contents = {n: bytes_of(t) for n, t in [*stack.items(), ("digested", digested)]}
                file.check(kinds)
                cells = (matches.argmax(0) * CLIENTS_A_FILE + location.rows)[here]
                positions = location.positions[here]
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
        kinds = row_types(stack)
        digested = torch.tensor(states.digested, dtype=torch.int64)
        contents = {name: bytes_of(t) for name, t in [*stack.items(), ("digested", digested)]}
        rounds = {"round": bytes_of(torch.full((len(states),), round))}
        kept = np.array([keep[client] for client in states.clients], dtype=np.int64)
        for location in self._locations(states.clients):
            location.create(kinds)
            with location.opened("written") as file:
                file.check(kinds)
                held = file.rounds()[:, location.rows]
                if (held > round).any():
                    raise FedkdError(
                        f"{location.path} holds states of rounds after {round} already: of an "
                        "earlier run of the same name, or this process is left over from a run that has "
                        "gone on"
                    )
                stays = (held == kept[location.positions]) & (held != round)
                cells = stays[0] * CLIENTS_A_FILE + location.rows
                # Nothing that a torn write leaves behind may pass for a state: the slot is empty
                # until all of it is there.
                file.write_rounds(location.rows, np.where(stays, held, INITIAL))
                file.write(cells, location.positions, contents)
                file.write(cells, location.positions, rounds)
                file.flush()

    def _locations(self, clients: Sequence[int]) -> Iterator[_Location]:
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
            yield _Location(path, first, self.period, row[index], index)


@dataclass(frozen=True, eq=False)
class _Location:
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
    rows: Ints
    positions: Ints

    @property
    def metadata(self) -> dict[str, str]:
        """Whose states the file holds."""
        numbers = {"first": self.first, "step": self.step, "count": CLIENTS_A_FILE}
        return {name: str(number) for name, number in numbers.items()}

    def create(self, kinds: Mapping[str, RowType]) -> None:
        """Make the file where there is none: empty slots for rows of these kinds."""
        if self.path.exists():
            return
        # Another process may make it just now; whoever comes second must not replace it.
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
        """Open the file to be ``"read"`` or ``"written"``.

        Raises:
            FedkdError: it cannot be, or is no whole file of these clients' states.
        """
        try:
            with FileIO(self.path, "r" if purpose == "read" else "r+") as file:
                _lock(file, shared=purpose == "read")
                yield SlotFile(self.path, file, self.metadata)
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


def _by_role(stack: Mapping[str, Tensor]) -> dict[str, State]:
    models: dict[str, State] = {}
    for name, tensor in stack.items():
        role, _, parameter = name.partition("/")
        models.setdefault(role, {})[parameter] = tensor
    return models
