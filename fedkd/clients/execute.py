"""Execute the instructions of clients, for every engine.

`execute_together` takes the instructions of any number of clients, runs those that can share a stack as
one cohort, and returns a report or a failure for each. A Flower client passes its single instruction,
the in-process engine all of a round.
"""

from __future__ import annotations

import gc
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b

import torch
from torch import Tensor

from fedkd.clients.instructions import OUT_OF_MEMORY, ClientReport, Failure, Instruction
from fedkd.clients.memories import Memory, mark_of
from fedkd.clients.run_phases import run_phases
from fedkd.clients.stack import Stack, has_news
from fedkd.clients.starting import Start, start_of
from fedkd.clients.state_store import ResidentStates
from fedkd.clients.states import INITIAL, States, concatenated
from fedkd.data.federated import FederatedData
from fedkd.errors import FedkdError, one_line, safe_logger
from fedkd.experiment import Experiment
from fedkd.knowledge import SoftLabels
from fedkd.knowledge.codec import Packed
from fedkd.phases import to_text
from fedkd.user_code import error_with_location, user_location

_logger = safe_logger(__name__)


@dataclass(frozen=True, eq=False)
class FederationInstructions:
    """The instructions of one federation.

    Attributes:
        experiment: the run.
        instructions: of some or all of its clients.
        store: holds these clients' states.
        secret_noise: whether the noise of ``dp-noise`` is a secret of this node: a server that knows its
            seed can remove it.
    """

    experiment: Experiment
    instructions: Sequence[Instruction]
    store: ResidentStates
    secret_noise: bool = False


def execute_together(
    data: FederatedData, federations: Sequence[FederationInstructions]
) -> list[list[ClientReport | Failure]]:
    """Return the results of instructions; clients that share architectures and phases are stacked.

    At most as many clients of a federation as a round draws are in memory at once. If a stack fails, it
    is run again federation by federation, then client by client, from the stored states (with the same
    results, since every draw is keyed), so that only the client that caused the failure fails. A stack
    that is out of memory is run again in halves, down to single clients; reports count this as an event.

    Args:
        data: the data of all federations.
        federations: instructions by federation; their experiments may differ in `STACKABLE` keys.

    Returns:
        For each federation one result per instruction, in the same order.
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
            outcomes = _run_or_split(data, list(chosen.values()))
            for number, outcome in zip(chosen, outcomes, strict=True):
                results[number].update({result.client: result for result in outcome})
    return [
        [by_client[instruction.client] for instruction in federation.instructions]
        for federation, by_client in zip(federations, results, strict=True)
    ]


def _batches(
    group: Mapping[int, Sequence[Instruction]], size: int
) -> Iterator[dict[int, Sequence[Instruction]]]:
    """Yield the instructions of a group in stacks with at most `size` of each federation."""
    for first in range(0, max(len(instructions) for instructions in group.values()), size):
        dealt = {n: instructions[first : first + size] for n, instructions in group.items()}
        yield {n: instructions for n, instructions in dealt.items() if instructions}


def _group_key(experiment: Experiment, instruction: Instruction, phases: str) -> Hashable:
    """Return what the clients of one stack must have in common."""
    labels = (
        instruction.knowledge if isinstance(instruction.knowledge, SoftLabels | Packed) else None
    )
    return (
        experiment.alpha == 1,  # without the hard term private images may not be used at all
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
        outcomes = _run(data, federations)
    except Exception as error:
        pieces = _pieces(federations, error)
        did_not_fit = is_out_of_memory(error)
        reason = "" if pieces else _reason(error)
    else:
        return _store(federations, outcomes)
    # Outside the handler: the exception, which holds the frames and tensors of the stack, is freed.
    if did_not_fit:
        _free_memory(federations)
    if not pieces:  # what a client's model or data raises is its own failure, not the round's
        return [[Failure(federations[0].instructions[0].client, reason)]]
    results: list[list[ClientReport | Failure]] = [[] for _ in federations]
    for piece in pieces:
        for number, outcome in zip(piece, _run_or_split(data, list(piece.values())), strict=True):
            results[number] += outcome
    if did_not_fit:
        _count_out_of_memory(results)
    return results


_Piece = dict[int, FederationInstructions]
"""Some of the instructions of a stack, by the number of their federation."""


def _pieces(federations: Sequence[FederationInstructions], error: Exception) -> list[_Piece]:
    """Return what to run instead of a stack that failed; nothing for a single client."""
    first = federations[0]
    if is_out_of_memory(error):
        return _halves(federations)
    if first.experiment.plan != "loop" and _is_refused_by_vmap(error):
        _logger.warning("clients are run one by one, as vmap refuses them: %s", one_line(error))
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
    """Return the two halves of a stack that is out of memory; nothing for a single client."""
    clients = [
        (number, instruction)
        for number, federation in enumerate(federations)
        for instruction in federation.instructions
    ]
    if len(clients) == 1:
        return []
    _logger.warning("out of memory with %d clients in a stack: run again in halves", len(clients))
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


def _store(
    federations: Sequence[FederationInstructions], outcomes: Sequence[_Outcome]
) -> list[list[ClientReport | Failure]]:
    """Write new states and memories to disk; return the results by federation."""
    for federation, (_, trained, memories) in zip(federations, outcomes, strict=True):
        bases = {instruction.client: instruction.base for instruction in federation.instructions}
        round = federation.instructions[0].round
        federation.store.memories.save(
            memories, round, bases
        )  # a full disk is not a client's failure
        for states in trained:
            states.kept = [mark_of(memories[client]) for client in states.clients]
            federation.store.put(states, round, bases)
    return [results for results, _, _ in outcomes]


# --- Out of memory --------------------------------------------------------------------------------

_NO_MEMORY = (
    "DefaultCPUAllocator",  # of PyTorch, which raises a RuntimeError on a CPU
    "CUDA out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "MPS backend out of memory",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception reports that the memory of the CPU or the GPU did not suffice."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _NO_MEMORY)


def _free_memory(federations: Sequence[FederationInstructions]) -> None:
    """Free states that are also on disk; from now on they stay on disk only."""
    for federation in federations:
        federation.store.limit = 0
    gc.collect()  # a lane's exception and its frames refer to each other
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def _count_out_of_memory(results: Sequence[Sequence[ClientReport | Failure]]) -> None:
    """Add an event to each federation's first client report: its stack was run again in halves."""
    for outcome in results:
        events = next((each.events for each in outcome if isinstance(each, ClientReport)), None)
        if events is not None:
            events[OUT_OF_MEMORY] = events.get(OUT_OF_MEMORY, 0) + 1


def _is_refused_by_vmap(error: Exception) -> bool:
    """Whether an error says that a model or a term cannot be mapped over clients."""
    text = str(error).lower()
    return isinstance(error, RuntimeError) and ("vmap" in text or "batching rule" in text)


# --- One stack, from stored states to reports -----------------------------------------------------

_Outcome = tuple[list[ClientReport | Failure], list[States], dict[int, Memory]]
"""Of one federation: a result per instruction, the new states, and the new memories by client."""


def _run(data: FederatedData, federations: Sequence[FederationInstructions]) -> list[_Outcome]:
    """Return the outcomes of a group run as one stack, or as two if only some have new knowledge."""
    starts = [start_of(data, f.experiment, f.instructions, f.store) for f in federations]
    outcomes: list[_Outcome] = [(_failures(start), [], start.memories) for start in starts]
    rows = [
        _rows(start.states, federation)
        for start, federation in zip(starts, federations, strict=True)
    ]
    for is_fresh in (False, True):
        chosen = {n: each[is_fresh] for n, each in enumerate(rows) if each[is_fresh]}
        if not chosen:
            continue
        taken = {n: _rows_of(starts[n].states, positions) for n, positions in chosen.items()}
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
            [starts[n].memories[client] for n, client in owners],
            secret_noise=federations[0].secret_noise,
        )
        reports = run_phases(stack)
        first = 0
        for n, some in taken.items():
            span = range(first, first := first + len(some))
            outcomes[n][0].extend(reports[i] for i in span)
            outcomes[n][1].append(states.rows(span) if several else states)
    return outcomes


def _failures(start: Start) -> list[ClientReport | Failure]:
    """Return the failures of clients that have lost what they are to start from."""
    return [Failure(client, reason, is_lost=True) for client, reason in start.lost.items()]


def _rows(states: States, federation: FederationInstructions) -> dict[bool, list[int]]:
    """Return the rows of states without (False) and with (True) new knowledge to digest."""
    instructions = {instruction.client: instruction for instruction in federation.instructions}
    rows: dict[bool, list[int]] = {False: [], True: []}
    for row, (client, digested) in enumerate(zip(states.clients, states.digested, strict=True)):
        rows[has_news(instructions[client], digested)].append(row)
    return rows


def _rows_of(states: States, rows: Sequence[int]) -> States:
    return states if len(rows) == len(states) else states.rows(rows)
