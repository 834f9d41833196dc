"""Memories: client tensors other than model weights, kept between rounds.

A strategy's procedures keep their results (``own``); a codec that sends only changes keeps the rows
that the peer has already (``up`` and ``down``). Like models, memories are kept by round, so that an
instruction whose reply was lost starts from what the client knew before it.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from shutil import rmtree

import torch
from torch import Tensor

from fedkd.clients.slot_file import DTYPES
from fedkd.clients.state_files import StateFiles
from fedkd.clients.states import States
from fedkd.errors import FedkdError
from fedkd.records.predictions import MOST_ANSWERS, Predictions, Tested
from fedkd.training.parameters import State, stacked

_ROLE = "kept"
"""The role under which a state file holds a memory's tensors."""

TESTED = "tested-"
"""Prefix of the name under which a client keeps a model's answers on the test images."""

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
        """Return all memories, on the CPU.

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
            states = StateFiles(self.folder / name).load(bases)
            for row, client in enumerate(states.clients):
                tensors = states.models[_ROLE]
                memories[client][name] = {n: t[row].clone() for n, t in tensors.items()}
        return memories

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
