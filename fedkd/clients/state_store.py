"""What clients keep between rounds: stacked in memory while in use, all of it on disk."""

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
        states: whose rows may be out of date.
        round: that they are of.
        current: clients of which no later stack holds a state.
    """

    states: States
    round: int
    current: int


class ResidentStates:
    """States of which the stacks used last stay in memory, on their device.

    All of them are on disk as well, so that nothing is lost with the process, and `take` gives what
    `StateFiles.load` would give. One process has the states of its clients to itself.

    Attributes:
        files: where all states are.
        memories: what clients keep besides; always on disk.
        limit: the most clients whose states stay in memory, beside what was handed out.
    """

    def __init__(self, files: StateFiles, limit: int) -> None:
        self.files = files
        self.memories = Memories(files.folder / "memory")
        self.limit = limit
        self._stacks: list[_Held] = []  # that used longest ago first
        self._places: dict[int, tuple[_Held, int]] = {}

    def take(self, bases: Mapping[int, int], device: torch.device) -> States:
        """Hand over states, which the caller may write into.

        A stack of exactly these clients in this order is handed over without a copy and forgotten:
        whoever fails halfway takes again, and gets what is on disk.

        Args:
            bases: by client, the round whose state is wanted; all of the same architectures.
            device: where to.

        Returns:
            Those that are there, in the order asked for; ``clients`` tells which.

        Raises:
            FedkdError: see `StateFiles.load`.
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
        loaded = self.files.load(missing)
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

    def put(self, states: States, round: int, keep: Mapping[int, int]) -> None:
        """Write states to disk, and keep them in memory: from now on nobody may write into them.

        Args:
            states: of clients that share their architectures.
            round: that they are of.
            keep: by client, the round that it started from.

        Raises:
            FedkdError: see `StateFiles.save`; what is in memory is as before.
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
