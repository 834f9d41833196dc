"""What clients start from: the states and memories of their base rounds, or the initial weights.

A client that has lost a part of it fails; it never starts from less than it had.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fedkd.clients.instructions import Instruction
from fedkd.clients.memories import Memory
from fedkd.clients.slot_file import RowType, row_types
from fedkd.clients.state_store import ResidentStates
from fedkd.clients.states import INITIAL, States
from fedkd.data.federated import FederatedData
from fedkd.errors import FedkdError
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
        FedkdError: a file cannot be read, or is another run's.
    """
    bases = {instruction.client: instruction.base for instruction in instructions}
    if instructions[0].base == INITIAL:
        states = _initial_states(data, experiment, list(bases))
        return Start(states, {client: {} for client in bases}, {})
    states = store.take(bases, data.train.device)
    _check_models(data, experiment, states, store)
    lost = {k: store.why_lost(k, bases[k]) for k in bases.keys() - set(states.clients)}
    kept = dict(zip(states.clients, states.kept, strict=True))
    memories, without = store.memories.find({k: bases[k] for k in kept}, kept)
    if without:
        whole = [row for row, client in enumerate(states.clients) if client not in without]
        states = states.rows(whole)
    return Start(states, {k: memories[k] for k in states.clients}, lost | without)


def _initial_states(data: FederatedData, experiment: Experiment, clients: list[int]) -> States:
    architectures = architectures_of(data)
    models: dict[str, State] = {
        role: architectures.initial_states(name, experiment.seed, len(clients))
        for role, name in _names(experiment, clients[0]).items()
    }
    return States(clients, models, [0] * len(clients))


def _names(experiment: Experiment, client: int) -> dict[Role, str]:
    """Return the architectures of a client's models, by role."""
    names: dict[Role, str] = {"student": experiment.student_of(client)}
    if experiment.teacher_of(client) != "none":
        names["teacher"] = experiment.teacher_of(client)
    return names


def _check_models(
    data: FederatedData, experiment: Experiment, states: States, store: ResidentStates
) -> None:
    """Raise an error if a file holds whole states, but of other models than these clients have.

    Raises:
        FedkdError: it does; the message names the file of the first client.
    """
    if not len(states):
        return
    names = _names(experiment, states.clients[0])
    found = {role: row_types(model) for role, model in states.models.items()}
    for role, name in names.items():
        initial = architectures_of(data).initial_state(name, experiment.seed)
        if found.pop(role, {}) != {n: RowType(t.dtype, tuple(t.shape)) for n, t in initial.items()}:
            found[role] = {}
    if found:
        raise FedkdError(
            f"{store.files.path_of(states.clients[0])} holds states of other models than "
            f"{' and '.join(names.values())}: it is another run's"
        )
