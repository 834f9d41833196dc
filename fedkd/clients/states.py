"""States of clients as stacks of tensors in memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from fedkd.training.parameters import State

INITIAL = 0
"""The round of the state that every client starts from; it is never stored."""


@dataclass(eq=False)
class States:
    """The states of K clients that share their architectures.

    Attributes:
        clients: partition ids.
        models: parameters and buffers ``[K, ...]`` by role and name; clients without a local teacher
            have only a student.
        digested: of each client, the round of the newest knowledge that it has digested.
        kept: of each client, the mark of the memory that belongs to its state: `memories.mark_of`.
    """

    clients: list[int]
    models: dict[str, State]
    digested: list[int]
    kept: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.kept = self.kept or [0] * len(self.clients)

    def __len__(self) -> int:
        return len(self.clients)

    def rows(self, positions: Sequence[int]) -> States:
        """Return a copy of the states at some positions of the stack."""
        index = torch.tensor(positions, dtype=torch.int64)
        models = {
            role: {name: tensor[index.to(tensor.device)] for name, tensor in model.items()}
            for role, model in self.models.items()
        }
        clients, digested, kept = (
            [each[i] for i in positions] for each in (self.clients, self.digested, self.kept)
        )
        return States(clients, models, digested, kept)

    def to(self, device: torch.device) -> States:
        """Return these states on a device; tensors that are there already are not copied."""
        models = {
            role: {name: tensor.to(device) for name, tensor in model.items()}
            for role, model in self.models.items()
        }
        return States(self.clients, models, self.digested, self.kept)


def concatenated(parts: Sequence[States]) -> States:
    """Return a copy of stacks with the same roles and parameters, concatenated along the client axis."""
    models: dict[str, State] = {
        role: {name: torch.cat([part.models[role][name] for part in parts]) for name in model}
        for role, model in parts[0].models.items()
    }
    clients = [client for part in parts for client in part.clients]
    digested = [number for part in parts for number in part.digested]
    return States(clients, models, digested, [bits for part in parts for bits in part.kept])


def gather(
    sources: Sequence[tuple[States, Sequence[int]]],
    clients: Sequence[int],
    device: torch.device | None = None,
) -> States:
    """Return a new stack of rows chosen from several, on `device` (default: that of the first)."""
    first = sources[0][0]
    models: dict[str, State] = {
        role: {
            name: tensor.new_empty((len(clients), *tensor.shape[1:]), device=device)
            for name, tensor in model.items()
        }
        for role, model in first.models.items()
    }
    gathered = States(list(clients), models, [0] * len(clients))
    place = {client: position for position, client in enumerate(clients)}
    for states, rows in sources:
        positions = [place[states.clients[row]] for row in rows]
        for row, position in zip(rows, positions, strict=True):
            gathered.digested[position] = states.digested[row]
            gathered.kept[position] = states.kept[row]
        for role, model in models.items():
            for name, tensor in model.items():
                source = states.models[role][name]
                picked = source[torch.tensor(rows, dtype=torch.int64, device=source.device)]
                index = torch.tensor(positions, dtype=torch.int64, device=tensor.device)
                tensor[index] = picked.to(tensor.device)
    return gathered
