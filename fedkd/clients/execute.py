"""A client executes phases: the one implementation behind every engine.

`execute_together` takes the instructions of any number of clients, runs those that can share a stack as
one cohort, and returns a report or a failure for each. A Flower client hands over its single
instruction, the in-process engine all of a round.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b

import torch
from torch import Tensor

from fedkd.clients.instructions import OUT_OF_MEMORY, ClientReport, Failure, Instruction
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
from fedkd.user_code import error_with_location, user_location

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class FederationInstructions:
    """The instructions of one federation.

    Attributes:
        experiment: the run.
        instructions: of any of its clients.
        store: where these keep their states.
        secret_noise: whether the noise of ``dp-noise`` is this node's own secret: a server that knows
            its seed can take it off.
    """

    experiment: Experiment
    instructions: Sequence[Instruction]
    store: ResidentStates
    secret_noise: bool = False


def execute_together(
    data: FederatedData, federations: Sequence[FederationInstructions]
) -> list[list[ClientReport | Failure]]:
    """Execute instructions, stacking the clients that share architectures and phases.

    No more clients of a federation than a round draws are in memory at once. A stack in which
    something fails is run again federation by federation, and client by client, from the stored states
    (with the same numbers, since every draw is keyed), so that only the culprit fails. One that is out
    of memory is run again by halves, down to single clients, which its reports count as an event.

    Args:
        data: the data of all federations.
        federations: of one federation each; their experiments differ in nothing or in `STACKABLE` keys.

    Returns:
        For each part one result an instruction, in the same sequence.
    """
    results: list[dict[int, ClientReport | Failure]] = [{} for _ in federations]
    groups: dict[Hashable, dict[int, list[Instruction]]] = {}
    texts: dict[int, str] = {}  # instructions of one round share their phases
    for number, federation in enumerate(federations):
        for instruction in federation.instructions:
            if id(instruction.phases) not in texts:
                texts[id(instruction.phases)] = to_text(instruction.phases)
            kind = _group_key(federation.experiment, instruction, texts[id(instruction.phases)])
            groups.setdefault(kind, {}).setdefault(number, []).append(instruction)
    for group in groups.values():
        for some in _batches(group, federations[0].experiment.clients_per_round):
            chosen = {
                n: replace(federations[n], instructions=instructions)
                for n, instructions in some.items()
            }
            found = _run_or_split(data, list(chosen.values()))
            for number, answers in zip(chosen, found, strict=True):
                results[number].update({answer.client: answer for answer in answers})
    return [
        [found[instruction.client] for instruction in federation.instructions]
        for federation, found in zip(federations, results, strict=True)
    ]


def _batches(
    group: Mapping[int, Sequence[Instruction]], size: int
) -> Iterator[dict[int, Sequence[Instruction]]]:
    """Deal the instructions of a group into stacks with at most `size` of each federation."""
    for first in range(0, max(len(instructions) for instructions in group.values()), size):
        dealt = {n: instructions[first : first + size] for n, instructions in group.items()}
        yield {n: instructions for n, instructions in dealt.items() if instructions}


def _group_key(experiment: Experiment, instruction: Instruction, phases: str) -> Hashable:
    """Name what the clients of one stack have in common."""
    labels = (
        instruction.knowledge if isinstance(instruction.knowledge, SoftLabels | Packed) else None
    )
    return (
        experiment.alpha == 1,  # without the hard term private images may not be looked at at all
        experiment.student_of(instruction.client),
        experiment.teacher_of(instruction.client),
        phases,
        instruction.round,
        instruction.base == INITIAL,
        instruction.evaluate,
        instruction.knowledge is None,
        instruction.knowledge_round,
        "" if labels is None else _fingerprint(labels.samples),
        _fingerprint(instruction.asked),
    )


def _fingerprint(samples: Tensor) -> str:
    return blake2b(samples.cpu().numpy().tobytes(), digest_size=16).hexdigest()


def _run_or_split(
    data: FederatedData, federations: Sequence[FederationInstructions]
) -> list[list[ClientReport | Failure]]:
    try:
        found = _run(data, federations)
    except Exception as error:
        pieces = _pieces(federations, error)
        did_not_fit = is_out_of_memory(error)
        reason = "" if pieces else _reason(error)
    else:
        return _stored(federations, found)
    # Out of the handler: the exception, which holds the frames and tensors of the stack, is gone.
    if did_not_fit:
        _free_memory(federations)
    if not pieces:  # whatever a client's model or data raises is its failure, never the round's
        return [[Failure(federations[0].instructions[0].client, reason)]]
    results: list[list[ClientReport | Failure]] = [[] for _ in federations]
    for piece in pieces:
        for number, answers in zip(piece, _run_or_split(data, list(piece.values())), strict=True):
            results[number] += answers
    if did_not_fit:
        _count_out_of_memory(results)
    return results


_Piece = dict[int, FederationInstructions]
"""Some of the instructions of a stack, by the number of the part they belong to."""


def _pieces(federations: Sequence[FederationInstructions], error: Exception) -> list[_Piece]:
    """Return what to run in the place of a stack in which something failed; nothing for one client."""
    first = federations[0]
    if is_out_of_memory(error):
        return _halves(federations)
    if first.experiment.plan != "loop" and _is_refused_by_vmap(error):
        _logger.warning("run client by client, as vmap refuses: %s", one_line(error))
        loops = [replace(p, experiment=p.experiment.replace(plan="loop")) for p in federations]
        return [dict(enumerate(loops))]
    if len(federations) > 1:
        return [{number: federation} for number, federation in enumerate(federations)]
    if len(first.instructions) > 1:
        return [
            {0: replace(first, instructions=[instruction])} for instruction in first.instructions
        ]
    return []


def _halves(federations: Sequence[FederationInstructions]) -> list[_Piece]:
    """Deal the clients of a stack that is out of memory into two; one client has no halves."""
    clients = [
        (number, instruction)
        for number, federation in enumerate(federations)
        for instruction in federation.instructions
    ]
    if len(clients) == 1:
        return []
    _logger.warning("out of memory with %d clients in a stack: again by halves", len(clients))
    half = -(-len(clients) // 2)
    pieces: list[_Piece] = []
    for some in (clients[:half], clients[half:]):
        instructions: dict[int, list[Instruction]] = {}
        for number, instruction in some:
            instructions.setdefault(number, []).append(instruction)
        pieces.append(
            {n: replace(federations[n], instructions=each) for n, each in instructions.items()}
        )
    return pieces


def _reason(error: Exception) -> str:
    return (
        f"{error}{user_location(error)}"
        if isinstance(error, FedkdError)
        else error_with_location(error)
    )


def _stored(
    federations: Sequence[FederationInstructions], found: Sequence[_Outcome]
) -> list[list[ClientReport | Failure]]:
    """Write what came of the parts to disk; return the results."""
    for federation, (_, trained, memories) in zip(federations, found, strict=True):
        bases = {instruction.client: instruction.base for instruction in federation.instructions}
        round = federation.instructions[0].round
        federation.store.memories.save(memories, round, bases)  # a full disk is no client's failure
        for states in trained:
            federation.store.put(states, round, bases)
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


def _free_memory(federations: Sequence[FederationInstructions]) -> None:
    """Free what can be had again: states in memory are on disk as well, and stay there from now on."""
    for federation in federations:
        federation.store.limit = 0
    gc.collect()  # a lane's exception and its frames hold each other
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def _count_out_of_memory(results: Sequence[Sequence[ClientReport | Failure]]) -> None:
    """Have the first report of each federation tell that its stack was run again by halves."""
    for answers in results:
        told = next((answer.events for answer in answers if isinstance(answer, ClientReport)), None)
        if told is not None:
            told[OUT_OF_MEMORY] = told.get(OUT_OF_MEMORY, 0) + 1


def _is_refused_by_vmap(error: Exception) -> bool:
    """Whether a model or a term does something that cannot be mapped over clients."""
    text = str(error).lower()
    return isinstance(error, RuntimeError) and ("vmap" in text or "batching rule" in text)


# --- One stack, from stored states to reports -----------------------------------------------------

_Outcome = tuple[list[ClientReport | Failure], list[States], dict[int, Memory]]
"""Of one part: a result for each instruction, the new states, and the new memories by client."""


def _run(data: FederatedData, federations: Sequence[FederationInstructions]) -> list[_Outcome]:
    """Execute a group's instructions as one stack, or two where only some have news to digest."""
    before = [_starting_states(data, federation) for federation in federations]
    kept = [_memories(federation) for federation in federations]
    outcomes: list[_Outcome] = [
        (_lost(federation, states), [], {client: memories[client] for client in states.clients})
        for federation, states, memories in zip(federations, before, kept, strict=True)
    ]
    rows = [
        _rows(states, federation) for states, federation in zip(before, federations, strict=True)
    ]
    for is_fresh in (False, True):
        chosen = {n: each[is_fresh] for n, each in enumerate(rows) if each[is_fresh]}
        if not chosen:
            continue
        taken = {n: _some(before[n], positions) for n, positions in chosen.items()}
        several = len(taken) > 1
        states = concatenated(list(taken.values())) if several else next(iter(taken.values()))
        owners = [(n, client) for n, some in taken.items() for client in some.clients]
        instructions = [
            {instruction.client: instruction for instruction in federation.instructions}
            for federation in federations
        ]
        stack = Stack(
            [federations[n].experiment for n, _ in owners],
            data,
            [instructions[n][client] for n, client in owners],
            states,
            is_fresh,
            [kept[n][client] for n, client in owners],
            secret_noise=federations[0].secret_noise,
        )
        reports = run_phases(stack)
        first = 0
        for n, some in taken.items():
            span = range(first, first := first + len(some))
            outcomes[n][0].extend(reports[i] for i in span)
            outcomes[n][1].append(states.rows(span) if several else states)
    return outcomes


def _lost(federation: FederationInstructions, states: States) -> list[ClientReport | Failure]:
    """Return the failures of clients whose states are not there."""
    found = set(states.clients)
    return [
        Failure(instruction.client, f"has no state of round {instruction.base} to start from")
        for instruction in federation.instructions
        if instruction.client not in found
    ]


def _rows(states: States, federation: FederationInstructions) -> dict[bool, list[int]]:
    """Return which rows of a part's states have no news to digest, and which have."""
    instructions = {instruction.client: instruction for instruction in federation.instructions}
    rows: dict[bool, list[int]] = {False: [], True: []}
    for row, (client, digested) in enumerate(zip(states.clients, states.digested, strict=True)):
        rows[has_news(instructions[client], digested)].append(row)
    return rows


def _some(states: States, rows: Sequence[int]) -> States:
    return states if len(rows) == len(states) else states.rows(rows)


def _memories(federation: FederationInstructions) -> dict[int, Memory]:
    """Return what clients kept besides their models, by client."""
    if federation.instructions[0].base == INITIAL:
        return {instruction.client: {} for instruction in federation.instructions}
    return federation.store.memories.load(
        {instruction.client: instruction.base for instruction in federation.instructions}
    )


def _starting_states(data: FederatedData, federation: FederationInstructions) -> States:
    """Return the states that instructions start from, as far as they exist; all or none are initial."""
    experiment, first = federation.experiment, federation.instructions[0]
    bases = {instruction.client: instruction.base for instruction in federation.instructions}
    if first.base != INITIAL:
        return federation.store.take(bases, data.train.device)
    names: dict[Role, str] = {"student": experiment.student_of(first.client)}
    if experiment.teacher_of(first.client) != "none":
        names["teacher"] = experiment.teacher_of(first.client)
    models: dict[str, State] = {
        role: architectures_of(data).initial_states(name, experiment.seed, len(bases))
        for role, name in names.items()
    }
    return States(list(bases), models, [0] * len(bases))
