"""Rounds below the quorum, of mixed architectures, in Flower's loop; what a strategy remembers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from exchanges import BAD, SENDING, K, assert_knowledge, dropping, timeless
from federation_tools import (
    ROUGH,
    Clients,
    Exchange,
    P,
    federate,
    open_federation,
    tiny,
)
from flwr.app import ArrayRecord, ConfigRecord, Message
from flwr.serverapp.strategy import Strategy
from torch import Tensor

from fedkd.clients.instructions import Instruction
from fedkd.errors import FedkdError
from fedkd.federation.flower_internals.local_grid import LocalGrid, task_identity
from fedkd.federation.messages import experiment_record
from fedkd.federation.server import Replies, Server
from fedkd.knowledge import Knowledge, SoftLabels, Weights
from fedkd.phases import Digest, Fit, Phase, Predict, Revisit
from fedkd.records.folder import RunFolder
from fedkd.registry import find
from fedkd.strategy import DistillationStrategy, Facts

# --- Below the quorum ----------------------------------------------------------------------------


def test_below_the_quorum_the_previous_knowledge_stays() -> None:
    experiment = tiny(strategy="DSFL", num_server_rounds=3, quorum=3)
    done = federate(experiment, dropping(2, BAD))
    first, second, third = done.rows
    assert [row["accepted"] for row in done.rows] == [True, False, True]
    assert second["answered"] == [0, 2]
    assert second["dropped"] == {"1": "no reply in time"}
    assert [row["knowledge_round"] for row in done.rows] == [None, 1, 1]
    for exchange in done.exchanges[1:3]:
        assert all(instruction.base == 1 for instruction in exchange.instructions.values())
        assert all(
            instruction.knowledge_round == 1 for instruction in exchange.instructions.values()
        )
    assert_knowledge(
        done.exchanges[2].instructions[0].knowledge, done.exchanges[1].instructions[0].knowledge
    )
    # Clients start over from round 1, so the third round digests the same knowledge as the second.
    assert third["client_accuracy_after_digest"][0] is not None
    assert third["agreement"] > 0
    assert first["accepted"] is True


def test_a_lost_round_leaves_no_trace_in_what_follows() -> None:
    """Round 3 after a lost round 2 digests from the same states, with the draws of round 3."""
    experiment = tiny(strategy="DSFL", num_server_rounds=3, quorum=3)
    all_lost = federate(experiment, lambda o, m, r: None if o.round == 2 else r)
    one_lost = federate(experiment, dropping(2, BAD))
    assert timeless(all_lost.rows[2]) == timeless(one_lost.rows[2])
    assert_knowledge(all_lost.knowledge, one_lost.knowledge)


@pytest.mark.parametrize("name", [*SENDING, "LocalOnly"])
def test_three_lost_rounds_running_end_the_run(tmp_path: Path, name: str) -> None:
    experiment = tiny(strategy=name, num_server_rounds=9, quorum=3, run_dir=str(tmp_path), name="x")
    folder = RunFolder.create(experiment, "")

    def from_two_on(instruction: Instruction, message: Message, reply: Message) -> Message | None:
        return None if instruction.client == BAD and instruction.round > 1 else reply

    with pytest.raises(
        FedkdError, match=r"round 4.*quorum of 3 in 3 consecutive rounds.*no reply in time"
    ):
        federate(experiment, from_two_on)
    lines = (folder.path / "rounds.jsonl").read_text().splitlines()
    assert [json.loads(line)["accepted"] for line in lines] == [True, False, False, False]
    assert not (folder.path / "result.json").exists()


def test_lost_rounds_that_are_not_running_do_not_end_the_run() -> None:
    experiment = tiny(strategy="DSFL", num_server_rounds=7, quorum=3)
    lost = {1, 2, 4, 5, 7}
    done = federate(experiment, lambda o, m, r: None if o.client == BAD and o.round in lost else r)
    assert [row["round"] for row in done.rows if not row["accepted"]] == sorted(lost)
    assert [row["knowledge_round"] for row in done.rows] == [None, None, None, 3, 3, 3, 6]


# --- Architectures, server models, evaluation ----------------------------------------------------


def test_architectures_mix_in_one_federation() -> None:
    experiment = tiny(
        strategy="FedMD", student="mlp-8,lenet,resnet-8", num_server_rounds=2, local_epochs=2
    )
    done = federate(experiment)
    assert [row["dropped"] for row in done.rows] == [{}, {}]
    sizes = [done.exchanges[1].report(k).metrics["accuracy_after_digest"] for k in range(K)]
    assert all(0 <= s <= 1 for s in sizes)


@pytest.mark.parametrize("student", ["mlp-8,lenet", "resnet-8", "resnet-8-gn", "cnn-large"])
def test_fedavg_averages_every_architecture_of_ours(student: str) -> None:
    """BatchNorm's counters are tensors without axes."""
    done = federate(tiny(strategy="FedAvg", student=student, num_server_rounds=1))
    assert done.rows[0]["dropped"] == {}
    assert done.rows[0]["server_accuracy"] is not None
    answers = done.exchanges[0].answers(range(K))
    assert isinstance(answers, Weights)
    sent = done.exchanges[-1].instructions[0].knowledge
    assert_knowledge(sent, find("FedAvg").aggregate(answers).only(student.split(",")[0]))


def test_a_server_model_is_an_observer(tmp_path: Path) -> None:
    """It learns from the knowledge, and the clients do not notice."""
    plain = federate(tiny(strategy="DSFL", num_server_rounds=3))
    watched = federate(
        tiny(strategy="DSFL", num_server_rounds=3, server_model="mlp-9", distill_epochs=1)
    )
    accuracies = [row["server_accuracy"] for row in watched.rows]
    assert all(isinstance(a, float) and 0 < a <= 1 for a in accuracies)
    assert [row["server_accuracy"] for row in plain.rows] == [None] * 3
    for with_model, alone in zip(watched.rows, plain.rows, strict=True):
        kept = {"seconds", "server_accuracy", "wire_bytes_down", "wire_bytes_down_by_client"}
        assert {n: v for n, v in with_model.items() if n not in kept} == {
            n: v for n, v in alone.items() if n not in kept
        }


def test_accuracies_are_measured_when_due_and_in_the_last_round() -> None:
    experiment = tiny(strategy="FedAvg", num_server_rounds=5, evaluate_every=2)
    done = federate(experiment)
    tested = [row["round"] for row in done.rows if "accuracy_after_revisit" in row]
    assert tested == [2, 4, 5]
    server = [row["round"] for row in done.rows if row["server_accuracy"] is not None]
    assert server == [2, 4, 5]
    always = federate(experiment.replace(evaluate_every=1))
    for row, other in zip(done.rows, always.rows, strict=True):
        assert row["loss_revisit"] == other["loss_revisit"]
        if row["round"] in tested:
            assert row["accuracy_after_revisit"] == other["accuracy_after_revisit"]


def test_clients_test_after_the_last_phase_only_if_that_is_wanted() -> None:
    experiment = tiny(strategy="FedMD", num_server_rounds=4, evaluate_every=3)
    every, last = (
        federate(experiment.replace(evaluate_phases=phases)).rows for phases in ("all", "last")
    )
    skipped = {
        name
        for name in every[2]
        if name.startswith(("accuracy_after_digest", "client_accuracy_after_digest", "agreement"))
    }
    assert len(skipped) >= 2
    for row, other in zip(last, every, strict=True):
        kept = {name: value for name, value in other.items() if name not in skipped}
        for name in ROUGH:
            del row[name], kept[name]
        assert row == kept
    tested = [row["round"] for row in last if "accuracy_after_revisit" in row]
    assert tested == [3, 4]


def test_a_phase_may_have_any_name_and_is_recorded_under_it() -> None:
    class Named(DistillationStrategy):
        facts = Facts("none", "0", "0")

        def phases(self, round: int) -> list[Phase]:
            return [Fit("warm-up 1", "student", private={"ce": 1.0})]

    row = federate(tiny(), strategy=Named()).rows[0]
    assert row["dropped"] == {}
    assert 0 <= row["accuracy_after_warm-up 1"] <= 1
    assert len(row["client_accuracy_after_warm-up 1"]) == K
    assert row["loss_warm-up 1"] > 0


# --- Under Flower's own loop ---------------------------------------------------------------------


@pytest.mark.parametrize("name", [*SENDING, "LocalOnly"])
def test_the_same_rounds_run_under_flowers_own_loop(name: str) -> None:
    experiment = tiny(strategy=name, num_server_rounds=3)
    ours = federate(experiment)
    strategy = find(name)
    clients = Clients(experiment)
    with task_identity():
        grid = LocalGrid(clients.handle, num_clients=K)
        federation = strategy.open(grid, experiment)
        result = Strategy.start(strategy, grid, ArrayRecord(), num_rounds=3)
    assert list(map(timeless, federation.rows)) == list(map(timeless, ours.rows))
    for number, row in enumerate(ours.rows, 1):
        metrics = result.train_metrics_clientapp[number]
        assert metrics["accuracy_after_revisit"] == row["accuracy_after_revisit"]
        assert metrics["bytes_up"] == row["bytes_up"]


def test_start_takes_the_experiment_as_flowers_config() -> None:
    """Flower's signature; the number of rounds is that of the call."""
    experiment = tiny(strategy="DSFL", num_server_rounds=5)
    clients = Clients(experiment)
    with task_identity():
        grid = LocalGrid(clients.handle, num_clients=K)
        result = find("DSFL").start(grid, num_rounds=2, train_config=experiment_record(experiment))
    assert sorted(result.train_metrics_clientapp) == [1, 2]
    expected = federate(experiment.replace(num_server_rounds=2)).rows
    for number, row in enumerate(expected, 1):
        metrics = result.train_metrics_clientapp[number]
        assert metrics["accuracy_after_revisit"] == row["accuracy_after_revisit"]
    assert len(clients.exchanges) == 3


def test_rounds_without_a_session_say_what_to_do() -> None:
    with pytest.raises(FedkdError, match=r"start\(\).*open\(\)"):
        find("DSFL").configure_train(1, ArrayRecord(), ConfigRecord(), None)  # type: ignore[arg-type]


# --- What a strategy remembers -------------------------------------------------------------------


class Diary(DistillationStrategy):
    """Keeps a table in the server's state, writes into it in place, and stumbles when told to."""

    facts = Facts("none", "P*C*4", "0")
    stumbles_in: int = 0

    def phases(self, round: int) -> list[Phase]:
        return [Digest(), Revisit(), Predict()]

    def update(self, replies: Replies, server: Server) -> SoftLabels | None:
        table = server.state.setdefault("table", torch.zeros(3))
        assert isinstance(table, Tensor)
        table += 1
        server.state["round"] = server.round
        if server.round == self.stumbles_in:
            raise ArithmeticError("clumsy")
        assert replies.labels is not None
        value = float(table[0])
        values = torch.full((P, 10), value)
        return SoftLabels.shared(values, replies.labels.samples, "logits")


def entries(exchanges: Sequence[Exchange]) -> list[float | None]:
    """Return what the diary's table held in each exchange, as the clients were told."""
    told = [exchange.instructions[0].knowledge for exchange in exchanges]
    return [float(k.values[0, 0, 0]) if isinstance(k, SoftLabels) else None for k in told]


def test_a_strategys_memory_lasts_from_round_to_round() -> None:
    done = federate(tiny(num_server_rounds=3), strategy=Diary())
    assert entries(done.exchanges) == [None, 1.0, 2.0, 3.0]


def test_a_strategy_that_raises_leaves_its_memory_as_it_was() -> None:
    """In-place writes into a table would survive a shallow copy."""
    experiment = tiny(num_server_rounds=3)
    clients = Clients(experiment)
    with task_identity():
        federation = open_federation(experiment, clients, Diary(stumbles_in=2))
        grid = LocalGrid(clients.handle, num_clients=K)
        for number in (1, 2, 3):
            replies = list(grid.send_and_receive(federation.open_round(number)))
            if number == 2:
                with pytest.raises(FedkdError, match="ArithmeticError: clumsy"):
                    federation.finish_round(replies)
            else:
                federation.finish_round(replies)
        list(grid.send_and_receive(federation.open_closing()))
    assert entries(clients.exchanges) == [None, 1.0, 1.0, 2.0]
    assert clients.exchanges[2].instructions[0].base == 1


def test_a_strategy_that_raises_is_named_with_its_round(tmp_path: Path) -> None:
    experiment = tiny(num_server_rounds=3, run_dir=str(tmp_path), name="run")
    folder = RunFolder.create(experiment, "")
    with pytest.raises(Exception, match="clumsy") as caught:
        federate(experiment, strategy=Diary(stumbles_in=2))
    text = " ".join([str(caught.value), *getattr(caught.value, "__notes__", [])])
    assert "Diary" in text
    assert "round 2" in text
    assert len((folder.path / "rounds.jsonl").read_text().splitlines()) == 1


def test_below_the_quorum_a_strategys_memory_stays() -> None:
    done = federate(tiny(num_server_rounds=3, quorum=3), dropping(2, BAD), strategy=Diary())
    assert entries(done.exchanges) == [None, 1.0, 1.0, 2.0]


class Asking(DistillationStrategy):
    """Asks for samples that are not there, or says other things that a loop cannot use."""

    facts = Facts("none", "0", "0")
    slip: str = "none"

    def phases(self, round: int) -> list[Phase]:
        wrong: Any = [Digest(), "revisit"]
        return wrong if self.slip == "phases" else super().phases(round)

    def request(self, server: Server) -> Tensor:
        answers: dict[str, Any] = {
            "far": torch.tensor([0, 1, P]),
            "twice": torch.tensor([3, 3]),
            "list": [0, 1],
            "floats": torch.tensor([0.0, 1.0]),
        }
        asked: Tensor = answers.get(self.slip, server.draw())
        return asked

    def aggregate(self, knowledge: SoftLabels) -> Tensor:
        return knowledge.mean_logits()

    def personalise(self, knowledge: Knowledge, client: int, server: Server) -> Knowledge:
        wrong: Any = knowledge if self.slip != "personalise" else torch.zeros(3)
        given: Knowledge = wrong
        return given


@pytest.mark.parametrize(
    ("slip", "reason"),
    [
        ("phases", "phases of Asking, round .: .*not a list of phases"),
        ("far", f"request of Asking, round 1: sample {P}: must be in 0 .. {P - 1}"),
        ("twice", "request of Asking, round 1: .*distinct"),
        ("list", "request of Asking, round 1: .*int64 tensor"),
        ("floats", "request of Asking, round 1: .*int64 tensor"),
        ("personalise", "personalise of Asking, round 2, client 0: returns a Tensor"),
    ],
)
def test_what_a_strategy_says_wrongly_is_named_and_blamed_on_no_client(
    slip: str, reason: str
) -> None:
    assert federate(tiny(num_server_rounds=2), strategy=Asking()).rows[1]["dropped"] == {}
    with pytest.raises(FedkdError, match=reason):
        federate(tiny(num_server_rounds=2), strategy=Asking(slip=slip))


def test_a_run_in_which_nobody_ever_answered_has_no_result(tmp_path: Path) -> None:
    named = tiny(strategy="DSFL", num_server_rounds=2, run_dir=str(tmp_path), name="run")
    RunFolder.create(named, "")
    lost = lambda instruction, message, reply: reply if instruction.evaluate == "end" else None  # noqa: E731
    with pytest.raises(FedkdError, match=r"no round had a quorum of 1.*no reply in time"):
        federate(named, lost)
    assert len((tmp_path / "run" / "rounds.jsonl").read_text().splitlines()) == 2
    assert not (tmp_path / "run" / "result.json").exists()
