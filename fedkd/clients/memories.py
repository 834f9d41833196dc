"""What clients keep between rounds besides their models: by name, for those who keep anything.

A strategy's procedures keep what they worked out (``own``), and a codec that sends only what changed
what the peer has already (``up`` and ``down``). As models are, memories are kept by round, so that an
order whose reply was lost starts from what the client knew before it.
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

_KEPT = "kept"
"""The role under which a memory's tensors stand in a file of states."""

TESTED = "tested-"
"""Begins the name under which a client keeps what a model of its answered on the test images."""

Memory = dict[str, State]
"""What one client keeps: tensors by name, by the name of what they are for."""


@dataclass(frozen=True)
class Memories:
    """Memories on disk, in a folder of state files for each name.

    Attributes:
        folder: made when there is something to keep.
    """

    folder: Path

    def load(self, bases: Mapping[int, int]) -> dict[int, Memory]:
        """Read all memories, on the CPU.

        Args:
            bases: by client, the round whose memory is wanted.

        Returns:
            By client; empty where it keeps nothing of that round.

        Raises:
            FedkdError: see `StateFiles.load`.
        """
        found: dict[int, Memory] = {client: {} for client in bases}
        names = sorted(p.name for p in self.folder.iterdir()) if self.folder.is_dir() else []
        for name in names:
            states = StateFiles(self.folder / name).load(bases)
            for row, client in enumerate(states.clients):
                kept = states.models[_KEPT]
                found[client][name] = {n: tensor[row].clone() for n, tensor in kept.items()}
        return found

    def save(self, memories: Mapping[int, Memory], round: int, keep: Mapping[int, int]) -> None:
        """Write memories, and drop all others of these clients but those to keep.

        Args:
            memories: by client.
            round: that they are of.
            keep: by client, the round that it started from, which stays.

        Raises:
            FedkdError: see `StateFiles.save`; a client keeps other tensors than the one before it.
        """
        names = sorted({name for memory in memories.values() for name in memory})
        for name in names:
            have = [client for client, memory in memories.items() if memory.get(name)]
            alike: dict[tuple[object, ...], list[int]] = {}
            for client in have:
                kinds = tuple((n, t.dtype, t.shape) for n, t in memories[client][name].items())
                alike.setdefault(kinds, []).append(client)
            for clients in alike.values():
                stack = stacked([memories[client][name] for client in clients])
                states = States(clients, {_KEPT: stack}, [0] * len(clients))
                StateFiles(self.folder / name).save(states, round, keep)


def check_kept(who: str, state: Mapping[str, object], before: Mapping[str, Tensor]) -> None:
    """Refuse a client's state that cannot be kept beside those of others and of other rounds.

    Args:
        who: made it.
        state: tensors by name.
        before: the same as they were.

    Raises:
        FedkdError: something else than tensors, or other types or shapes than before.
    """
    for name, kept in state.items():
        if not isinstance(kept, Tensor) or kept.dtype not in DTYPES.values():
            kind = kept.dtype if isinstance(kept, Tensor) else type(kept).__name__
            raise FedkdError(
                f"{who} keeps state['{name}'] as {kind}: must be a tensor of a usual dtype"
            )
        old = before.get(name, kept)
        if (old.dtype, old.shape) != (kept.dtype, kept.shape):
            raise FedkdError(
                f"{who} keeps state['{name}'] as {kept.dtype} {tuple(kept.shape)}, which was "
                f"{old.dtype} {tuple(old.shape)}: a tensor keeps its type and shape"
            )


def collected(memories: Memories, closing: Mapping[int, int], labels: Tensor) -> Tested | None:
    """Read what clients answered in the closing exchange, and tidy it away.

    Args:
        memories: of all clients, if this process shares their disk.
        closing: by client that answered, the round under which its last state is kept.
        labels: true classes of the test images, int64 ``[N]``.

    Returns:
        The answers, or `None` where there are none here, as in a deployment.
    """
    clients = sorted(closing)[: max(1, MOST_ANSWERS // len(labels))]
    found = memories.load({client: closing[client] for client in clients})
    kinds = {name for memory in found.values() for name in memory if name.startswith(TESTED)}
    models = {kind.removeprefix(TESTED): _predictions(kind, found) for kind in sorted(kinds)}
    for kind in kinds:
        rmtree(memories.folder / kind, ignore_errors=True)  # a client may be late
    with suppress(OSError):  # other memories are there, or none at all
        memories.folder.rmdir()
    return Tested(labels, models) if models else None


def _predictions(kind: str, found: Mapping[int, Memory]) -> Predictions:
    owners = [client for client, memory in found.items() if kind in memory]
    kept = [found[client][kind] for client in owners]
    classes = torch.stack([each["classes"] for each in kept])
    confidences = torch.stack([each["confidences"] for each in kept])
    return Predictions(classes, confidences, owners)
