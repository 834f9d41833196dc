"""Memories: client tensors other than model weights, kept between rounds.

A strategy's procedures keep their results (``own``); a codec that sends only changes keeps the rows
that the peer has already (``up`` and ``down``). Like models, memories are kept by round, so that an
instruction whose reply was lost starts from what the client knew before it. A client's state says which
memories were written with it, so that a lost one is not taken for one that never was.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from shutil import rmtree
from zlib import crc32

import torch
from torch import Tensor

from fedkd.clients.slot_file import DTYPES, bytes_of
from fedkd.clients.state_files import StateFiles
from fedkd.clients.states import States
from fedkd.errors import FedkdError
from fedkd.records.predictions import MOST_ANSWERS, Predictions, Tested
from fedkd.training.parameters import State, stacked

_ROLE = "kept"
"""The role under which a state file holds a memory's tensors."""

TESTED = "tested-"
"""Prefix of the name under which a client keeps a model's answers on the test images."""

_NAMES = ("own", "up", "down")
"""Names of the memories that clients continue from; see `mark_of`."""

Memory = dict[str, State]
"""What one client keeps: tensors by name, grouped by the name of their purpose."""


@dataclass(frozen=True)
class Memories:
    """Memories on disk, in a folder of state files per purpose.

    Attributes:
        folder: created when there is something to keep.
    """

    folder: Path

    def load(self, bases: Mapping[int, int]) -> dict[int, Memory]:
        """Return all memories that there are, on the CPU.

        Args:
            bases: by client, the round of the memory to read.

        Returns:
            Memories by client; empty for a client that keeps nothing of that round.

        Raises:
            FedkdError: see `StateFiles.load`.
        """
        memories: dict[int, Memory] = {client: {} for client in bases}
        names = sorted(p.name for p in self.folder.iterdir()) if self.folder.is_dir() else []
        for name in names:
            _add(memories, name, StateFiles(self.folder / name).load(bases))
        return memories

    def find(
        self, bases: Mapping[int, int], kept: Mapping[int, int]
    ) -> tuple[dict[int, Memory], dict[int, str]]:
        """Return the memories from which clients continue, on the CPU, and who has lost one.

        Args:
            bases: by client, the round of the memory to read.
            kept: by client, the mark of the memory that belongs to its state of that round.

        Returns:
            Memories by client, and by client in one line what is missing, damaged, or another's.

        Raises:
            FedkdError: see `StateFiles.find`.
        """
        memories: dict[int, Memory] = {client: {} for client in bases}
        lost: dict[int, str] = {}
        for bit, name in enumerate(_NAMES):
            owners = {client: bases[client] for client in bases if kept[client] >> bit & 1}
            files = StateFiles(self.folder / name)
            states, damaged = files.find(owners)
            _add(memories, name, states)
            for client in owners.keys() - set(states.clients):
                missing = f"its memory of round {bases[client]} is missing"
                text = f"{missing}: {files.path_of(client)}"
                lost.setdefault(client, damaged.get(client, text))
        for client in bases.keys() - lost.keys():
            if mark_of(memories[client]) != kept[client]:
                what = f"its memory of round {bases[client]}"
                lost[client] = f"{what} was not written with its state: {self.folder}"
        return memories, lost

    def save(self, memories: Mapping[int, Memory], round: int, keep: Mapping[int, int]) -> None:
        """Write memories, and delete these clients' older ones except those to keep.

        Args:
            memories: by client.
            round: of the memories.
            keep: by client, the round that it started from, whose memory stays.

        Raises:
            FedkdError: see `StateFiles.save`; clients of one file keep different tensors.
        """
        names = sorted({name for memory in memories.values() for name in memory})
        for name in names:
            owners = [client for client, memory in memories.items() if memory.get(name)]
            alike: dict[tuple[object, ...], list[int]] = {}
            for client in owners:
                kinds = tuple((n, t.dtype, t.shape) for n, t in memories[client][name].items())
                alike.setdefault(kinds, []).append(client)
            for clients in alike.values():
                stack = stacked([memories[client][name] for client in clients])
                states = States(clients, {_ROLE: stack}, [0] * len(clients))
                StateFiles(self.folder / name).save(states, round, keep)


def mark_of(memory: Memory) -> int:
    """Return the mark of a client's memory, which its state keeps: names in the low bits, a checksum."""
    names = [name for name in sorted(memory) if not name.startswith(TESTED)]
    checksum = 0
    for name in names:
        for key, tensor in sorted(memory[name].items()):
            about = f"{name} {key} {tensor.dtype} {list(tensor.shape)}".encode()
            checksum = crc32(bytes_of(tensor.contiguous()), crc32(about, checksum))
    return checksum << len(_NAMES) | sum(1 << _NAMES.index(name) for name in names)


def _add(memories: Mapping[int, Memory], name: str, states: States) -> None:
    """Add what was read of one name to clients' memories."""
    for row, client in enumerate(states.clients):
        tensors = states.models[_ROLE]
        memories[client][name] = {n: t[row].clone() for n, t in tensors.items()}


def check_client_state(
    procedure: str, state: Mapping[str, object], before: Mapping[str, Tensor]
) -> None:
    """Raise an error for a client's state that cannot be stored like that of the round before.

    Args:
        procedure: name of the procedure that set the state.
        state: tensors by name.
        before: the state before the procedure.

    Raises:
        FedkdError: a value is not a tensor, or its type or shape has changed.
    """
    for name, value in state.items():
        if not isinstance(value, Tensor) or value.dtype not in DTYPES.values():
            kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise FedkdError(
                f"{procedure} sets state['{name}'] to {kind}: must be a tensor of one of the types "
                f"{', '.join(str(dtype).removeprefix('torch.') for dtype in DTYPES.values())}"
            )
        old = before.get(name, value)
        if (old.dtype, old.shape) != (value.dtype, value.shape):
            raise FedkdError(
                f"{procedure} sets state['{name}'] to {value.dtype} {tuple(value.shape)}, but it was "
                f"{old.dtype} {tuple(old.shape)}: type and shape must not change"
            )


def collected(memories: Memories, closing: Mapping[int, int], labels: Tensor) -> Tested | None:
    """Return the clients' test answers of the closing exchange, and delete them from disk.

    Args:
        memories: of all clients, if this process shares their disk.
        closing: by client that answered, the round of its last state.
        labels: true classes of the test images, int64 ``[N]``.

    Returns:
        The answers, or `None` if this machine has none, as in a deployment.
    """
    clients = sorted(closing)[: max(1, MOST_ANSWERS // len(labels))]
    by_client = memories.load({client: closing[client] for client in clients})
    kinds = {name for memory in by_client.values() for name in memory if name.startswith(TESTED)}
    models = {kind.removeprefix(TESTED): _predictions(kind, by_client) for kind in sorted(kinds)}
    for kind in kinds:
        rmtree(memories.folder / kind, ignore_errors=True)  # a late client may still write
    with suppress(OSError):  # it holds other memories, or does not exist
        memories.folder.rmdir()
    return Tested(labels, models) if models else None


def _predictions(kind: str, memories: Mapping[int, Memory]) -> Predictions:
    owners = [client for client, memory in memories.items() if kind in memory]
    answers = [memories[client][kind] for client in owners]
    classes = torch.stack([each["classes"] for each in answers])
    confidences = torch.stack([each["confidences"] for each in answers])
    return Predictions(classes, confidences, owners)
