"""What the server wants of a client, and what it answers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from fedkd.knowledge import Knowledge, Wire
from fedkd.knowledge.codec import KnownRows, Packed
from fedkd.knowledge.wire import PLAIN
from fedkd.phases import Phase

OUT_OF_MEMORY = "out-of-memory"
"""A stack of clients did not fit, and was run again by halves."""

REPORTED = (OUT_OF_MEMORY,)
"""Kinds of events that happen at a client, which counts them in its report."""


@dataclass(frozen=True, eq=False)
class Instruction:
    """What the server wants of one client.

    Attributes:
        client: partition id.
        round: names the random streams and the state that results.
        base: round of the state to start from.
        phases: what to do.
        asked: public samples to answer, int64 ``[M]``.
        knowledge: what to digest or load, K = 1 (soft labels among which a procedure chooses may be
            more); packed where the client's state is needed to decode it, ``None`` where there is none.
        knowledge_round: the round that it came out of.
        evaluate: test after each phase that trains (``"phases"``) or after the last of them only
            (``"last"``), the student once at the end (``"end"``: the closing exchange), or not at all.
        wire: how soft labels are to be encoded that are answered.
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
    """What one client answers.

    Attributes:
        client: partition id.
        num_examples: its private images.
        answer: knowledge of K = 1, if the phases ask for any.
        metrics: test accuracies and the like, fractions 0..1.
        seconds: by phase; a stack's time is shared equally by its clients.
        packed: the answer as it is sent, where that is not simply its numbers.
        known: what the server then has of this client's soft labels, where only changes are sent.
        events: what broke at the client and was fixed, how often by kind: see `REPORTED`.
        round: of the order that it answers; 0 where the client does not say.
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


@dataclass(frozen=True)
class Failure:
    """A client that could not execute its instruction, and why in one line."""

    client: int
    reason: str
