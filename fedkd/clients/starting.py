"""What clients start from: the states and memories of their base rounds, or the initial weights.

A client that has lost a part of it fails; it never starts from less than it had.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fedkd.clients.instructions import Instruction
from fedkd.clients.memories import Memory
from fedkd.clients.state_store import ResidentStates
from fedkd.clients.states import INITIAL, States
from fedkd.data.federated import FederatedData
from fedkd.experiment import Experiment
from fedkd.phases import Role
from fedkd.training.architectures import architectures_of
from fedkd.training.parameters import State


@dataclass(frozen=True, eq=False)
class Start:
    """What clients of one federation start from.

    Attributes:
        states: of the clients that have all that they need.
        memories: of the same clients.
        lost: by client, in one line what the others lack.
    """

    states: States
    memories: dict[int, Memory]
    lost: dict[int, str]


def start_of(
    data: FederatedData,
    experiment: Experiment,
    instructions: Sequence[Instruction],
    store: ResidentStates,
) -> Start:
    """Return what clients start from.

    Args:
        data: of the federation.
        experiment: the run.
        instructions: of clients that share their architectures; all or none start from the initial
            weights.
        store: holds these clients' states.

    Raises:
        FedkdError: a file cannot be read.
    """
    bases = {instruction.client: instruction.base for instruction in instructions}
    if instructions[0].base == INITIAL:
        states = _initial_states(data, experiment, list(bases))
        return Start(states, {client: {} for client in bases}, {})
    states = store.take(bases, data.train.device)
    lost = {k: store.why_lost(k, bases[k]) for k in bases.keys() - set(states.clients)}
    kept = dict(zip(states.clients, states.kept, strict=True))
    memories, without = store.memories.find({k: bases[k] for k in kept}, kept)
    if without:
        whole = [row for row, client in enumerate(states.clients) if client not in without]
        states = states.rows(whole)
    return Start(states, {k: memories[k] for k in states.clients}, lost | without)


def _initial_states(data: FederatedData, experiment: Experiment, clients: list[int]) -> States:
    names: dict[Role, str] = {"student": experiment.student_of(clients[0])}
    if experiment.teacher_of(clients[0]) != "none":
        names["teacher"] = experiment.teacher_of(clients[0])
    models: dict[str, State] = {
        role: architectures_of(data).initial_states(name, experiment.seed, len(clients))
        for role, name in names.items()
    }
    return States(clients, models, [0] * len(clients))
