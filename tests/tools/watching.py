"""A federation with both ends under observation: what each said, and what the other made of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
from federation_tools import (
    Finished,
    Meddle,
    federate,
)
from federation_tools import P as PUBLIC_OF_TINY

from fedkd.clients import execute as executing
from fedkd.clients import stack
from fedkd.clients.instructions import ClientReport, Instruction
from fedkd.clients.memories import Memory
from fedkd.clients.run_phases import run_phases
from fedkd.clients.stack import Stack
from fedkd.experiment import Experiment
from fedkd.federation.server import Replies, Server
from fedkd.knowledge import SoftLabels, Wire
from fedkd.knowledge.codec import Packed
from fedkd.strategy import DistillationStrategy


@dataclass
class Watched:
    """A federation that ran: what each end said, and what the other made of it.

    Attributes:
        told: by round, what `update` returned.
        opened: by exchange and client, the labels that the client decoded.
        said: by exchange and client, what the client's model answered.
        heard: by round, the labels that `update` was given.
    """

    done: Finished
    told: dict[int, SoftLabels] = field(default_factory=dict)
    opened: dict[tuple[int, int], SoftLabels] = field(default_factory=dict)
    said: dict[tuple[int, int], SoftLabels] = field(default_factory=dict)
    heard: dict[int, SoftLabels] = field(default_factory=dict)

    def assert_heard(self, number: str = "float32") -> None:
        """Check that the server was given what the clients said, as it is once it has crossed."""
        for round, labels in self.heard.items():
            assert labels.clients.tolist() == self.done.rows[round - 1]["answered"]
            for row, client in enumerate(labels.clients.tolist()):
                got = dict(zip(labels.samples.tolist(), labels.values[row].tolist(), strict=True))
                assert got == rows_of(self.said[round, client], number)

    def assert_in_step(self, number: str = "float32") -> int:
        """Check that clients read what the server said, and were sent the rows they had not, alone.

        What a client has is kept here as a dictionary of rows, which only rounds that count and to
        which it replied bring forward. Returns how many rows were sent to catch up: changed before
        the newest knowledge.
        """
        have: dict[int, dict[int, list[float]]] = {}
        caught_up = 0
        rows = [*self.done.rows, {"accepted": False, "answered": []}]
        for exchange, row in zip(self.done.exchanges, rows, strict=True):
            for client, instruction in exchange.instructions.items():
                if instruction.knowledge is None:
                    continue
                told = self.told[instruction.knowledge_round]
                wanted = rows_of(told, number)
                got = self.opened[instruction.round, client]
                assert rows_of(got, "float32") == wanted
                known = have.setdefault(client, {})
                news = [sample for sample in wanted if known.get(sample) != wanted[sample]]
                assert isinstance(instruction.knowledge, Packed)
                assert changed_samples(instruction.knowledge) == news
                before = self.told.get(instruction.knowledge_round - 1)
                old = {} if before is None else rows_of(before, number)
                caught_up += sum(wanted[sample] == old.get(sample) for sample in news)
                if row["accepted"] and client in row["answered"]:
                    known |= wanted
        return caught_up


def rows_of(labels: SoftLabels, number: str) -> dict[int, list[float]]:
    """Return K = 1 labels by sample, as they are once they have crossed as `number`."""
    packed, _ = labels.pack(Wire(number), PUBLIC_OF_TINY)
    crossed, _ = SoftLabels.unpack(packed, PUBLIC_OF_TINY)
    return dict(zip(labels.samples.tolist(), crossed.values[0].tolist(), strict=True))


def changed_samples(packed: Packed) -> list[int]:
    bits = [int(b) for byte in packed.arrays["changed"].tolist() for b in f"{byte:08b}"]
    return [int(s) for s, bit in zip(packed.samples, bits, strict=False) if bit]


def watch(
    monkeypatch: pytest.MonkeyPatch,
    experiment: Experiment,
    strategy: DistillationStrategy,
    meddle: Meddle | None = None,
) -> Watched:
    """Run a federation with both ends under observation."""
    cls: Any = type(strategy)
    update, opens = cls.update, stack.received_knowledge
    seen = Watched(Finished([], []))

    def tell(self: Any, replies: Replies, server: Server) -> Any:
        assert replies.labels is not None
        seen.heard[server.round] = replies.labels
        seen.told[server.round] = update(self, replies, server)
        return seen.told[server.round]

    def open_and_note(instruction: Instruction, memory: Memory, num_public: int) -> Any:
        received = opens(instruction, memory, num_public)
        if isinstance(received, SoftLabels):
            seen.opened[instruction.round, instruction.client] = received
        return received

    def run_and_note(stack: Stack) -> list[ClientReport]:
        reports = run_phases(stack)
        for report in reports:
            if isinstance(report.answer, SoftLabels):
                seen.said[stack.first.round, report.client] = report.answer
        return reports

    monkeypatch.setattr(cls, "update", tell)
    monkeypatch.setattr(stack, "received_knowledge", open_and_note)
    monkeypatch.setattr(executing, "run_phases", run_and_note)
    seen.done = federate(experiment, meddle, strategy)
    return seen
