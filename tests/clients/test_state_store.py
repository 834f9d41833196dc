"""More clients than stay in memory: a cohort a round, the rest on disk, and the same numbers."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from weakref import WeakSet

import pytest
import torch
from federation_tools import ROUGH, execute, tiny

import fedkd
from fedkd.clients.execute import FederationInstructions, execute_together
from fedkd.clients.instructions import ClientReport, Failure, Instruction
from fedkd.clients.state_files import StateFiles
from fedkd.clients.state_store import ResidentStates
from fedkd.clients.states import INITIAL, States
from fedkd.data.federated import FederatedData, federated_data
from fedkd.engines import answering
from fedkd.engines import in_process as engine
from fedkd.knowledge import SoftLabels
from fedkd.records import Run

CLIENTS, ROUNDS, COHORT = 211, 5, 6
MANY: dict[str, Any] = {
    "num_clients": CLIENTS,
    "fraction_train": 0.03,
    "num_server_rounds": ROUNDS,
    "train_size": 1297,
    "public_per_round": 23,
    "plan": "stacked",
}
"""round(0.03 · 211) = 6 clients a round."""


@dataclass
class Seen:
    """A run, and what its clients did in each of its rounds and the closing exchange.

    Attributes:
        exchanges: orders and their reports.
        stored: clients of every stack that was put away, by exchange.
        in_memory: clients whose states were in memory after each of these, by exchange.
        loaded: clients whose states came from disk, by exchange.
    """

    run: Run
    exchanges: list[list[tuple[Instruction, ClientReport]]] = field(default_factory=list)
    stored: dict[int, list[list[int]]] = field(default_factory=lambda: defaultdict(list))
    in_memory: dict[int, list[int]] = field(default_factory=lambda: defaultdict(list))
    loaded: dict[int, int] = field(default_factory=lambda: defaultdict(int))


def watched(folder: Path, name: str, *, resident: bool = False) -> Seen:
    """Run the federation by its public name; if asked, with all clients in memory and in one stack."""
    seen = Seen(None)  # type: ignore[arg-type]  # it is there at the end
    alive: WeakSet[States] = WeakSet()
    put, find = ResidentStates.put, StateFiles.find

    def executing(
        data: FederatedData, parts: Sequence[FederationInstructions]
    ) -> list[list[ClientReport | Failure]]:
        (part,) = parts
        if resident:
            part = replace(part, experiment=part.experiment.replace(fraction_train=1.0))
        (results,) = execute_together(data, [part])
        reports = [result for result in results if isinstance(result, ClientReport)]
        seen.exchanges.append(list(zip(part.instructions, reports, strict=True)))
        return [results]

    def putting(self: ResidentStates, states: States, round: int, keep: Mapping[int, int]) -> None:
        put(self, states, round, keep)
        alive.add(states)
        now = len(seen.exchanges)
        seen.stored[now].append(states.clients)
        del states
        seen.in_memory[now].append(sum(len(each) for each in alive))

    def finding(self: StateFiles, bases: Mapping[int, int]) -> tuple[States, dict[int, str]]:
        states, damaged = find(self, bases)
        if "memory" not in self.folder.parts:  # what the test brings together at the end
            seen.loaded[len(seen.exchanges)] += len(states)
        return states, damaged

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(answering, "execute_together", executing)
        patch.setattr(ResidentStates, "put", putting)
        patch.setattr(StateFiles, "find", finding)
        if resident:
            everything = (ROUNDS + 1) * CLIENTS  # what was overtaken counts until its stack goes
            patch.setattr(engine, "store_of", lambda e, _: answering.store_of(e, everything))
        seen.run = fedkd.run(tiny(**MANY, run_dir=str(folder), name=name))
    return seen


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Seen:
    torch.set_num_threads(1)
    return watched(tmp_path_factory.mktemp("many"), "many")


def drawn_again(seen: Seen) -> list[int]:
    """Return the clients that took part in more than one round."""
    rounds = [row["sampled"] for row in seen.run.rounds]
    return [k for k in range(CLIENTS) if sum(k in sampled for sampled in rounds) > 1]


@pytest.mark.slow
def test_the_case_is_worth_looking_at(many: Seen) -> None:
    """Clients come again, others come for the first time after knowledge is there, most never."""
    rounds = [row["sampled"] for row in many.run.rounds]
    assert len(rounds) == ROUNDS
    assert {len(sampled) for sampled in rounds} == {COHORT}
    assert drawn_again(many)
    assert len(set().union(*rounds)) > 3 * COHORT
    assert all(row["dropped"] == {} for row in many.run.rounds)
    assert "loss_digest" in many.run.rounds[-1]


def test_no_more_than_a_cohort_is_in_memory(many: Seen) -> None:
    assert len(many.exchanges) == ROUNDS + 1
    for number in range(ROUNDS + 1):
        assert max(many.in_memory[number]) == COHORT


def test_the_closing_exchange_reaches_all_a_cohort_at_a_time(many: Seen) -> None:
    stacks = many.stored[ROUNDS]
    assert all(len(stack) <= COHORT for stack in stacks)
    assert sorted(client for stack in stacks for client in stack) == list(range(CLIENTS))
    # As few as they can be: who was never drawn takes no part in the others' stacks.
    known = len(set().union(*(row["sampled"] for row in many.run.rounds)))
    assert len(stacks) == math.ceil(known / COHORT) + math.ceil((CLIENTS - known) / COHORT)
    assert len(many.run.client_accuracy) == CLIENTS
    assert all(accuracy is not None for accuracy in many.run.client_accuracy)


def test_states_are_in_a_file_for_every_hundred_clients(many: Seen) -> None:
    files = sorted(path.name for path in (many.run.path / "clients").iterdir())
    assert files == ["0-0.safetensors", "0-1.safetensors", "0-2.safetensors"]
    stored = StateFiles(many.run.path / "clients")
    assert len(stored.load(dict.fromkeys(range(CLIENTS), ROUNDS + 1))) == CLIENTS


def test_the_numbers_are_those_with_all_clients_in_memory(many: Seen, tmp_path: Path) -> None:
    """Bit for bit: records, reports and results, from stacks of up to 211 that are never read."""
    whole = watched(tmp_path, "whole", resident=True)
    assert sum(whole.loaded.values()) == 0 < sum(many.loaded.values())
    assert len(whole.stored[ROUNDS]) == 2
    assert max(whole.in_memory[ROUNDS]) >= CLIENTS

    for row, other in zip(many.run.rounds, whole.run.rounds, strict=True):
        assert row.keys() == other.keys()
        for name in row.keys() - set(ROUGH):
            assert row[name] == other[name], name
    for name in ("client_accuracy", "client_own_accuracy", "bytes_up", "bytes_down", "dropped"):
        assert many.run.result[name] == whole.run.result[name]
    for exchange, expected in zip(many.exchanges, whole.exchanges, strict=True):
        for (instruction, report), (same_order, same) in zip(exchange, expected, strict=True):
            assert (instruction.client, instruction.base) == (same_order.client, same_order.base)
            assert_same(report, same)


def assert_same(report: ClientReport, expected: ClientReport) -> None:
    """Compare bit for bit, seconds aside."""
    assert report.client == expected.client
    assert report.metrics == expected.metrics
    assert isinstance(report.answer, SoftLabels) == isinstance(expected.answer, SoftLabels)
    if isinstance(report.answer, SoftLabels) and isinstance(expected.answer, SoftLabels):
        assert torch.equal(report.answer.values, expected.answer.values)


def test_who_is_drawn_again_goes_on_from_its_own_state(many: Seen, tmp_path: Path) -> None:
    """As it does alone, with nobody before, between or beside; from another state it does not."""
    experiment = tiny(**MANY)
    for client in drawn_again(many):
        mine = [
            (instruction, report)
            for exchange in many.exchanges
            for instruction, report in exchange
            if instruction.client == client
        ]
        instructions = [instruction for instruction, _ in mine]
        assert [o.base for o in instructions] == [INITIAL, *(o.round for o in instructions[:-1])]
        assert len(instructions) > 2  # the closing exchange is the last

        alone = ResidentStates(StateFiles(tmp_path / str(client)), 0)
        for instruction, report in mine:
            (result,) = execute(experiment, federated_data(experiment), [instruction], alone)
            assert isinstance(result, ClientReport)
            assert_same(result, report)

        second, report = mine[1]
        fresh = ResidentStates(StateFiles(tmp_path / "fresh"), 0)
        restarted = replace(second, base=INITIAL)
        (result,) = execute(experiment, federated_data(experiment), [restarted], fresh)
        assert isinstance(result, ClientReport)
        assert isinstance(result.answer, SoftLabels)
        assert isinstance(report.answer, SoftLabels)
        assert not torch.equal(result.answer.values, report.answer.values)


def test_who_was_never_drawn_starts_at_the_end(many: Seen) -> None:
    last = {client: row["round"] for row in many.run.rounds for client in row["sampled"]}
    for instruction, _ in many.exchanges[ROUNDS]:
        assert instruction.base == last.get(instruction.client, INITIAL)
