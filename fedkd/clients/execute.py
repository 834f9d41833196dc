"""A client executes phases: the one implementation behind every engine.

`execute_together` takes the orders of any number of clients, runs those that can share a stack as one
cohort, and returns a report or a failure for each. A Flower client hands over its single order, the
in-process engine all of a round.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b

import torch
from torch import Tensor

from fedkd.clients.instructions import OUT_OF_MEMORY, Failure, Order, Report
from fedkd.clients.memories import Memory
from fedkd.clients.run_phases import run_phases
from fedkd.clients.stack import Stack, has_news
from fedkd.clients.state_store import ResidentStates
from fedkd.clients.states import INITIAL, States, concatenated
from fedkd.data.federated import FederatedData
from fedkd.errors import FedkdError, one_line
from fedkd.experiment import Experiment
from fedkd.knowledge import SoftLabels
from fedkd.knowledge.codec import Packed
from fedkd.phases import Role, to_text
from fedkd.training.architectures import architectures_of
from fedkd.training.parameters import State
from fedkd.user_code import blamed, place

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Part:
    """The orders of one federation.

    Attributes:
        experiment: the run.
        orders: of any of its clients.
        store: where these keep their states.
        secret_noise: whether the noise of ``dp-noise`` is this node's own secret: a server that knows
            its seed can take it off.
    """

    experiment: Experiment
    orders: Sequence[Order]
    store: ResidentStates
    secret_noise: bool = False


def execute_together(data: FederatedData, parts: Sequence[Part]) -> list[list[Report | Failure]]:
    """Execute orders, stacking the clients that share architectures and phases.

    No more clients of a federation than a round draws are in memory at once. A stack in which
    something fails is run again federation by federation, and client by client, from the stored states
    (with the same numbers, since every draw is keyed), so that only the culprit fails. One that is out
    of memory is run again by halves, down to single clients, which its reports count as an event.

    Args:
        data: the data of all federations.
        parts: of one federation each; their experiments differ in nothing or in `STACKABLE` keys.

    Returns:
        For each part one result an order, in the same sequence.
    """
    results: list[dict[int, Report | Failure]] = [{} for _ in parts]
    groups: dict[Hashable, dict[int, list[Order]]] = {}
    texts: dict[int, str] = {}  # orders of one round share their phases
    for number, part in enumerate(parts):
        for order in part.orders:
            if id(order.phases) not in texts:
                texts[id(order.phases)] = to_text(order.phases)
            kind = _group_key(part.experiment, order, texts[id(order.phases)])
            groups.setdefault(kind, {}).setdefault(number, []).append(order)
    for group in groups.values():
        for some in _at_once(group, parts[0].experiment.clients_per_round):
            chosen = {n: replace(parts[n], orders=orders) for n, orders in some.items()}
            found = _run_or_split(data, list(chosen.values()))
            for number, answers in zip(chosen, found, strict=True):
                results[number].update({answer.client: answer for answer in answers})
    return [
        [found[order.client] for order in part.orders]
        for part, found in zip(parts, results, strict=True)
    ]


def _at_once(
    group: Mapping[int, Sequence[Order]], size: int
) -> Iterator[dict[int, Sequence[Order]]]:
    """Deal the orders of a group into stacks with at most `size` of each federation."""
    for first in range(0, max(len(orders) for orders in group.values()), size):
        dealt = {n: orders[first : first + size] for n, orders in group.items()}
        yield {n: orders for n, orders in dealt.items() if orders}


def _group_key(experiment: Experiment, order: Order, phases: str) -> Hashable:
    """Name what the clients of one stack have in common."""
    labels = order.knowledge if isinstance(order.knowledge, SoftLabels | Packed) else None
    return (
        experiment.alpha == 1,  # without the hard term private images may not be looked at at all
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


def _run_or_split(data: FederatedData, parts: Sequence[Part]) -> list[list[Report | Failure]]:
    try:
        found = _run(data, parts)
    except Exception as error:
        pieces = _pieces(parts, error)
        did_not_fit = is_out_of_memory(error)
        reason = "" if pieces else _reason(error)
    else:
        return _stored(parts, found)
    # Out of the handler: the exception, which holds the frames and tensors of the stack, is gone.
    if did_not_fit:
        _let_go(parts)
    if not pieces:  # whatever a client's model or data raises is its failure, never the round's
        return [[Failure(parts[0].orders[0].client, reason)]]
    results: list[list[Report | Failure]] = [[] for _ in parts]
    for piece in pieces:
        for number, answers in zip(piece, _run_or_split(data, list(piece.values())), strict=True):
            results[number] += answers
    if did_not_fit:
        _count_out_of_memory(results)
    return results


_Piece = dict[int, Part]
"""Some of the orders of a stack, by the number of the part they belong to."""


def _pieces(parts: Sequence[Part], error: Exception) -> list[_Piece]:
    """Return what to run in the place of a stack in which something failed; nothing for one client."""
    first = parts[0]
    if is_out_of_memory(error):
        return _halves(parts)
    if first.experiment.plan != "loop" and _is_refused_by_vmap(error):
        _logger.warning("run client by client, as vmap refuses: %s", one_line(error))
        loops = [replace(p, experiment=p.experiment.replace(plan="loop")) for p in parts]
        return [dict(enumerate(loops))]
    if len(parts) > 1:
        return [{number: part} for number, part in enumerate(parts)]
    if len(first.orders) > 1:
        return [{0: replace(first, orders=[order])} for order in first.orders]
    return []


def _halves(parts: Sequence[Part]) -> list[_Piece]:
    """Deal the clients of a stack that is out of memory into two; one client has no halves."""
    clients = [(number, order) for number, part in enumerate(parts) for order in part.orders]
    if len(clients) == 1:
        return []
    _logger.warning("out of memory with %d clients in a stack: again by halves", len(clients))
    half = -(-len(clients) // 2)
    pieces: list[_Piece] = []
    for some in (clients[:half], clients[half:]):
        orders: dict[int, list[Order]] = {}
        for number, order in some:
            orders.setdefault(number, []).append(order)
        pieces.append({n: replace(parts[n], orders=each) for n, each in orders.items()})
    return pieces


def _reason(error: Exception) -> str:
    return f"{error}{place(error)}" if isinstance(error, FedkdError) else blamed(error)


def _stored(parts: Sequence[Part], found: Sequence[_Outcome]) -> list[list[Report | Failure]]:
    """Write what came of the parts to disk; return the results."""
    for part, (_, trained, memories) in zip(parts, found, strict=True):
        bases = {order.client: order.base for order in part.orders}
        round = part.orders[0].round
        part.store.memories.save(memories, round, bases)  # a full disk is no client's failure
        for states in trained:
            part.store.put(states, round, bases)
    return [results for results, _, _ in found]


# --- Out of memory --------------------------------------------------------------------------------

_NO_MEMORY = (
    "DefaultCPUAllocator",  # of PyTorch, which raises a RuntimeError on a CPU
    "CUDA out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "MPS backend out of memory",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory, of the CPU or the GPU, did not suffice."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _NO_MEMORY)


def _let_go(parts: Sequence[Part]) -> None:
    """Free what can be had again: states in memory are on disk as well, and stay there from now on."""
    for part in parts:
        part.store.limit = 0
    gc.collect()  # a lane's exception and its frames hold each other
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def _count_out_of_memory(results: Sequence[Sequence[Report | Failure]]) -> None:
    """Have the first report of each federation tell that its stack was run again by halves."""
    for answers in results:
        told = next((answer.events for answer in answers if isinstance(answer, Report)), None)
        if told is not None:
            told[OUT_OF_MEMORY] = told.get(OUT_OF_MEMORY, 0) + 1


def _is_refused_by_vmap(error: Exception) -> bool:
    """Whether a model or a term does something that cannot be mapped over clients."""
    text = str(error).lower()
    return isinstance(error, RuntimeError) and ("vmap" in text or "batching rule" in text)


# --- One stack, from stored states to reports -----------------------------------------------------

_Outcome = tuple[list[Report | Failure], list[States], dict[int, Memory]]
"""Of one part: a result for each order, the new states, and the new memories by client."""


def _run(data: FederatedData, parts: Sequence[Part]) -> list[_Outcome]:
    """Execute a group's orders as one stack, or two where only some have news to digest."""
    before = [_starting_states(data, part) for part in parts]
    kept = [_memories(part) for part in parts]
    outcomes: list[_Outcome] = [
        (_lost(part, states), [], {client: memories[client] for client in states.clients})
        for part, states, memories in zip(parts, before, kept, strict=True)
    ]
    rows = [_rows(states, part) for states, part in zip(before, parts, strict=True)]
    for is_fresh in (False, True):
        chosen = {n: each[is_fresh] for n, each in enumerate(rows) if each[is_fresh]}
        if not chosen:
            continue
        taken = {n: _some(before[n], positions) for n, positions in chosen.items()}
        several = len(taken) > 1
        states = concatenated(list(taken.values())) if several else next(iter(taken.values()))
        owners = [(n, client) for n, some in taken.items() for client in some.clients]
        orders = [{order.client: order for order in part.orders} for part in parts]
        stack = Stack(
            [parts[n].experiment for n, _ in owners],
            data,
            [orders[n][client] for n, client in owners],
            states,
            is_fresh,
            [kept[n][client] for n, client in owners],
            secret_noise=parts[0].secret_noise,
        )
        reports = run_phases(stack)
        first = 0
        for n, some in taken.items():
            span = range(first, first := first + len(some))
            outcomes[n][0].extend(reports[i] for i in span)
            outcomes[n][1].append(states.rows(span) if several else states)
    return outcomes


def _lost(part: Part, states: States) -> list[Report | Failure]:
    """Return the failures of clients whose states are not there."""
    found = set(states.clients)
    return [
        Failure(order.client, f"has no state of round {order.base} to start from")
        for order in part.orders
        if order.client not in found
    ]


def _rows(states: States, part: Part) -> dict[bool, list[int]]:
    """Return which rows of a part's states have no news to digest, and which have."""
    orders = {order.client: order for order in part.orders}
    rows: dict[bool, list[int]] = {False: [], True: []}
    for row, (client, digested) in enumerate(zip(states.clients, states.digested, strict=True)):
        rows[has_news(orders[client], digested)].append(row)
    return rows


def _some(states: States, rows: Sequence[int]) -> States:
    return states if len(rows) == len(states) else states.rows(rows)


def _memories(part: Part) -> dict[int, Memory]:
    """Return what clients kept besides their models, by client."""
    if part.orders[0].base == INITIAL:
        return {order.client: {} for order in part.orders}
    return part.store.memories.load({order.client: order.base for order in part.orders})


def _starting_states(data: FederatedData, part: Part) -> States:
    """Return the states that the orders name, those there are; all of them, or none, are initial."""
    experiment, first = part.experiment, part.orders[0]
    bases = {order.client: order.base for order in part.orders}
    if first.base != INITIAL:
        return part.store.take(bases, data.train.device)
    names: dict[Role, str] = {"student": experiment.student_of(first.client)}
    if experiment.teacher_of(first.client) != "none":
        names["teacher"] = experiment.teacher_of(first.client)
    models: dict[str, State] = {
        role: architectures_of(data).initial_states(name, experiment.seed, len(bases))
        for role, name in names.items()
    }
    return States(list(bases), models, [0] * len(bases))
