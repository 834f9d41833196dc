"""What clients keep between rounds, and where: in this process or on disk, by client and round.

States are kept by round because a crash or a lost reply leaves a client one round ahead: every order
names the round to start from.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from safetensors.torch import load_file, save_file

from fedkd.cohort import State
from fedkd.phases import Role

INITIAL = 0
"""The round of the state that every client starts from; it is never stored."""


@dataclass(frozen=True)
class ClientState:
    """What a client keeps between rounds.

    Attributes:
        models: parameters and buffers by role; a client without a local teacher has only a student.
        digested: round of the newest knowledge that it has digested.
    """

    models: Mapping[Role, State]
    digested: int = 0


class Store(Protocol):
    """Where client states are kept, by client and round."""

    def load(self, client: int, round: int) -> ClientState | None:
        """Return a state, or ``None`` where there is none."""

    def save(self, client: int, round: int, state: ClientState, keep: int) -> None:
        """Store the state of `round` and drop all others but that of round `keep`."""


class MemoryStore:
    """States in this process."""

    def __init__(self) -> None:
        self._states: dict[int, dict[int, ClientState]] = {}

    def load(self, client: int, round: int) -> ClientState | None:
        """See `Store`."""
        return self._states.get(client, {}).get(round)

    def save(self, client: int, round: int, state: ClientState, keep: int) -> None:
        """See `Store`."""
        old = self._states.get(client, {})
        self._states[client] = {r: s for r, s in old.items() if r == keep} | {round: state}


@dataclass(frozen=True)
class DiskStore:
    """States as ``<folder>/<client>/<round>.safetensors``, for clients in several processes."""

    folder: Path

    def load(self, client: int, round: int) -> ClientState | None:
        """See `Store`."""
        path = self._path(client, round)
        if not path.exists():
            return None
        models: dict[Role, State] = {}
        tensors = load_file(path)
        digested = int(tensors.pop("digested"))
        for name, tensor in tensors.items():
            role, _, parameter = name.partition("/")
            models.setdefault("teacher" if role == "teacher" else "student", {})[parameter] = tensor
        return ClientState(models, digested)

    def save(self, client: int, round: int, state: ClientState, keep: int) -> None:
        """See `Store`."""
        path = self._path(client, round)
        path.parent.mkdir(parents=True, exist_ok=True)
        tensors = {
            f"{role}/{name}": tensor.cpu().contiguous()
            for role, model in state.models.items()
            for name, tensor in model.items()
        }
        temporary = path.with_suffix(".part")
        save_file({**tensors, "digested": torch.tensor(state.digested)}, temporary)
        temporary.replace(path)
        for old in path.parent.glob("*.safetensors"):
            if old.stem not in (str(round), str(keep)):
                old.unlink()

    def _path(self, client: int, round: int) -> Path:
        return self.folder / str(client) / f"{round}.safetensors"
