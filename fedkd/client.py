"""A client executes phases: the one implementation behind every engine.

`execute` takes the orders of any number of clients, runs those that can share a stack as one cohort,
and returns a report or a failure for each. A Flower client hands over its single order, the
in-process engine all of a round.
"""

from __future__ import annotations

import logging
from collections.abc import Hashable, Sequence
from hashlib import blake2b

from torch import Tensor

from fedkd.codecs import Packed
from fedkd.cohort import State
from fedkd.errors import FedkdError
from fedkd.experiment import Experiment
from fedkd.knowledge import SoftLabels
from fedkd.memories import Memory
from fedkd.orders import Failure, Order, Report
from fedkd.phases import to_text
from fedkd.procedures import Role
from fedkd.references import blamed, in_one_line, place
from fedkd.stack import Stack, has_news
from fedkd.statefiles import INITIAL, States
from fedkd.states import ResidentStates
from fedkd.world import World

_logger = logging.getLogger(__name__)


def execute(
    experiment: Experiment, world: World, orders: Sequence[Order], store: ResidentStates
) -> list[Report | Failure]:
    """Execute orders, stacking the clients that share architectures and phases.

    No more clients than a round draws are in memory at once. A stack in which something fails is run
    again client by client from the stored states (with the same numbers, since every draw is keyed),
    so that only the culprit fails.

    Returns:
        One result an order, in the same sequence. States are stored only for reports.
    """
    results: dict[int, Report | Failure] = {}
    groups: dict[Hashable, list[Order]] = {}
    texts: dict[int, str] = {}  # orders of one round share their phases
    for order in orders:
        if id(order.phases) not in texts:
            texts[id(order.phases)] = to_text(order.phases)
        groups.setdefault(_group_key(experiment, order, texts[id(order.phases)]), []).append(order)
    size = experiment.clients_per_round
    for group in groups.values():
        for first in range(0, len(group), size):
            for result in _run_or_split(experiment, world, group[first : first + size], store):
                results[result.client] = result
    return [results[order.client] for order in orders]


def _group_key(experiment: Experiment, order: Order, phases: str) -> Hashable:
    """Name what the clients of one stack have in common."""
    labels = order.knowledge if isinstance(order.knowledge, SoftLabels | Packed) else None
    return (
        experiment.student_of(order.client),
        experiment.teacher_of(order.client),
        phases,
        order.round,
        order.base == INITIAL,
        order.evaluate,
        order.knowledge is None,
        order.knowledge_round,
        "" if labels is None else _digest(labels.samples),
        _digest(order.asked),
    )


def _digest(samples: Tensor) -> str:
    return blake2b(samples.cpu().numpy().tobytes(), digest_size=16).hexdigest()


def _run_or_split(
    experiment: Experiment, world: World, orders: Sequence[Order], store: ResidentStates
) -> list[Report | Failure]:
    try:
        results, trained, memories = _run(experiment, world, orders, store)
    except Exception as error:
        if experiment.plan != "loop" and _is_refused_by_vmap(error):
            _logger.warning("run client by client, as vmap refuses: %s", in_one_line(error))
            return _run_or_split(experiment.replace(plan="loop"), world, orders, store)
        # Whatever a client's model or data raises is that client's failure, never the round's.
        if len(orders) == 1:
            known = isinstance(error, FedkdError)
            reason = f"{error}{place(error)}" if known else blamed(error)
            return [Failure(orders[0].client, reason)]
        return [
            result for one in orders for result in _run_or_split(experiment, world, [one], store)
        ]
    bases = {order.client: order.base for order in orders}
    store.memories.save(memories, orders[0].round, bases)  # a full disk is no client's failure
    for states in trained:
        store.put(states, orders[0].round, bases)
    return results


def _is_refused_by_vmap(error: Exception) -> bool:
    """Whether a model or a term does something that cannot be mapped over clients."""
    text = str(error).lower()
    return isinstance(error, RuntimeError) and ("vmap" in text or "batching rule" in text)


def _run(
    experiment: Experiment, world: World, orders: Sequence[Order], store: ResidentStates
) -> tuple[list[Report | Failure], list[States], dict[int, Memory]]:
    """Execute the orders of a group as one stack, or two where only some have news to digest.

    Returns:
        A result for each order, the new states, and the new memories by client.
    """
    states = _starting_states(experiment, world, orders, store)
    memories = _memories(orders, store)
    by_client = {order.client: order for order in orders}
    results: list[Report | Failure] = [
        Failure(client, f"has no state of round {order.base} to start from")
        for client, order in by_client.items()
        if client not in states.clients
    ]
    found = [by_client[client] for client in states.clients]
    trained: list[States] = []
    fresh = [has_news(o, digested) for o, digested in zip(found, states.digested, strict=True)]
    for is_fresh in sorted(set(fresh)):
        rows = [row for row, flag in enumerate(fresh) if flag == is_fresh]
        some = states if len(rows) == len(fresh) else states.rows(rows)
        mine = [found[row] for row in rows]
        stack = Stack(
            experiment, world, mine, some, is_fresh, [memories[order.client] for order in mine]
        )
        results += stack.run()
        trained.append(some)
    return results, trained, {client: memories[client] for client in states.clients}


def _memories(orders: Sequence[Order], store: ResidentStates) -> dict[int, Memory]:
    """Return what clients kept besides their models, by client."""
    if orders[0].base == INITIAL:
        return {order.client: {} for order in orders}
    return store.memories.load({order.client: order.base for order in orders})


def _starting_states(
    experiment: Experiment, world: World, orders: Sequence[Order], store: ResidentStates
) -> States:
    """Return the states that the orders name, those there are; all of them, or none, are initial."""
    bases = {order.client: order.base for order in orders}
    first = orders[0]
    if first.base != INITIAL:
        return store.take(bases, world.train.device)
    names: dict[Role, str] = {"student": experiment.student_of(first.client)}
    if experiment.teacher_of(first.client) != "none":
        names["teacher"] = experiment.teacher_of(first.client)
    models: dict[str, State] = {
        role: world.initial_states(name, experiment.seed, len(bases))
        for role, name in names.items()
    }
    return States(list(bases), models, [0] * len(bases))
