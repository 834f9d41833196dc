"""Client states between rounds: all on disk, those used last also stacked in memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from fedkd.clients.memories import Memories
from fedkd.clients.state_files import StateFiles
from fedkd.clients.states import States, gather


@dataclass(eq=False)
class _Held:
    """A stack in memory.

    Attributes:
        states: some rows may be out of date.
        round: of the states.
        current: number of clients without a state in a later stack.
    """

    states: States
    round: int
    current: int


class ResidentStates:
    """Client states, of which the stacks used last stay in memory, on their device.

    All states are on disk as well, so none is lost with the process, and `take` returns what
    `StateFiles.find` would return. No other process may use the states of these clients.

    Attributes:
        files: all states on disk.
        memories: other tensors of the clients; always on disk.
        limit: largest number of clients whose states stay in memory, not counting those taken.
    """

    def __init__(self, files: StateFiles, limit: int) -> None:
        self.files = files
        self.memories = Memories(files.folder / "memory")
        self.limit = limit
        self._stacks: list[_Held] = []  # the least recently used first
        self._places: dict[int, tuple[_Held, int]] = {}

    def take(self, bases: Mapping[int, int], device: torch.device) -> States:
        """Return states, which the caller may modify.

        A stack of exactly these clients in this order is returned without a copy and removed from
        memory: a caller that fails halfway takes the states again, from disk.

        Args:
            bases: by client, the round of the state to take; all of the same architectures.
            device: of the states returned.

        Returns:
            The states that exist and are whole, in the order of `bases`; ``clients`` lists whose.

        Raises:
            FedkdError: see `StateFiles.find`.
        """
        held: dict[_Held, list[int]] = {}
        missing: dict[int, int] = {}
        for client, base in bases.items():
            stack, row = self._places.get(client, (None, 0))
            if stack is None or stack.round != base:
                missing[client] = base
            else:
                held.setdefault(stack, []).append(row)
        if not missing and len(held) == 1:
            (stack,) = held
            if stack.states.clients == list(bases):
                self._forget(stack)
                return stack.states.to(device)
        loaded, _ = self.files.find(missing)
        if not held:
            return loaded.to(device)
        for stack in held:  # used just now
            self._stacks.remove(stack)
            self._stacks.append(stack)
        lost = missing.keys() - set(loaded.clients)
        sources: list[tuple[States, Sequence[int]]] = [(s.states, rows) for s, rows in held.items()]
        if len(loaded):
            sources.append((loaded, range(len(loaded))))
        return gather(sources, [client for client in bases if client not in lost], device)

    def why_lost(self, client: int, base: int) -> str:
        """Return in one line why `take` finds no state of a client's base round."""
        missing = f"has no state of round {base} to start from"
        return self.files.find({client: base})[1].get(client, missing)

    def put(self, states: States, round: int, keep: Mapping[int, int]) -> None:
        """Write states to disk and keep them in memory; the caller must not modify them afterwards.

        Args:
            states: of clients that share their architectures.
            round: of the states.
            keep: by client, the round that it started from, whose state stays on disk.

        Raises:
            FedkdError: see `StateFiles.save`; memory is then unchanged.
        """
        if not len(states):
            return
        self.files.save(states, round, keep)
        for client in states.clients:
            self._supersede(client)
        stack = _Held(states, round, len(states))
        self._stacks.append(stack)
        self._places.update({client: (stack, row) for row, client in enumerate(states.clients)})
        while sum(len(each.states) for each in self._stacks) > self.limit:
            self._forget(self._stacks[0])

    def _supersede(self, client: int) -> None:
        stack, _ = self._places.pop(client, (None, 0))
        if stack is not None:
            stack.current -= 1
            if not stack.current:
                self._stacks.remove(stack)

    def _forget(self, stack: _Held) -> None:
        self._stacks.remove(stack)
        for client in stack.states.clients:
            if self._places.get(client, (None, 0))[0] is stack:
                del self._places[client]
