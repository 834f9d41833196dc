"""Instructions to clients, and the reports or failures that they answer with."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from fedkd.knowledge import Knowledge, Wire
from fedkd.knowledge.codec import KnownRows, Packed
from fedkd.knowledge.wire import PLAIN
from fedkd.phases import Phase

OUT_OF_MEMORY = "out-of-memory"
"""A stack of clients did not fit into memory, and was run again in halves."""

REPORTED = (OUT_OF_MEMORY,)
"""Kinds of events that a client counts in its report."""


WITHHOLDABLE = ("metrics", "num-examples", "seconds", "events")
"""The parts of a report that a client may withhold."""


@dataclass(frozen=True, eq=False)
class Instruction:
    """What the server tells one client to do.

    Attributes:
        client: partition id.
        round: names the random streams and the resulting state.
        base: round of the state to start from.
        phases: what to do, in order.
        asked: public samples to answer, int64 ``[M]``.
        knowledge: what to digest or load, K = 1 (more for soft labels among which a procedure chooses);
            packed if the client's memory is needed to decode it, ``None`` if there is none.
        knowledge_round: the round that produced it.
        evaluate: test after each phase that trains (``"phases"``) or after the last of them only
            (``"last"``), the student once at the end (``"end"``: the closing exchange), or not at all.
        wire: how to encode the soft labels of the answer.
    """

    client: int
    round: int
    base: int
    phases: tuple[Phase, ...]
    asked: Tensor
    knowledge: Knowledge | Packed | None = None
    knowledge_round: int = 0
    evaluate: Literal["phases", "last", "end", "none"] = "phases"
    wire: Wire = PLAIN


@dataclass(frozen=True, eq=False)
class ClientReport:
    """What one client answers to an instruction.

    Attributes:
        client: partition id.
        num_examples: its private images.
        answer: knowledge of K = 1, if the phases ask for any.
        metrics: test accuracies and the like, fractions 0..1.
        seconds: by phase; a stack's time is shared equally by its clients.
        packed: the answer as it is sent, unless it is sent as plain tensors.
        known: the rows of this client's soft labels that the server then has, if only changes are sent.
        events: failures at the client that were recovered, counted by kind: see `REPORTED`.
        round: of the instruction that it answers; 0 if unknown.
        withheld: the parts that the client keeps back, of `WITHHOLDABLE`; its `num_examples` is then the
            receiver's own knowledge.
    """

    client: int
    num_examples: int
    answer: Knowledge | None
    metrics: dict[str, float]
    seconds: dict[str, float]
    packed: Packed | None = None
    known: KnownRows | None = None
    events: dict[str, int] = field(default_factory=dict)
    round: int = 0
    withheld: tuple[str, ...] = ()


@dataclass(frozen=True)
class Failure:
    """A client that could not execute its instruction.

    Attributes:
        client: partition id.
        reason: why, in one line.
        is_lost: whether a part of what it kept of its base round is missing or damaged, so that it cannot
            continue from there.
    """

    client: int
    reason: str
    is_lost: bool = False
