"""What clients are asked and sent: samples, the newest knowledge, and what is personal."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from exchanges import K, assert_knowledge
from federation_tools import (
    Exchange,
    Finished,
    P,
    federate,
    tiny,
)
from torch import Tensor

from fedkd.clients.states import INITIAL
from fedkd.data.federated import federated_data
from fedkd.federation.server import Server
from fedkd.knowledge import Knowledge, SoftLabels
from fedkd.registry import find
from fedkd.strategy import DistillationStrategy, Facts

# --- Partial participation -----------------------------------------------------------------------


PARTIAL = {"num_clients": 7, "fraction_train": 0.4, "public_per_round": 11}
"""round(0.4 · 7) = 3 of 7 clients, 11 of 37 samples a round."""


@pytest.fixture(scope="module")
def partial_run() -> Finished:
    return federate(tiny(strategy="FedMD", num_server_rounds=6, **PARTIAL))


def test_each_round_samples_other_clients_and_the_closing_all(partial_run: Finished) -> None:
    sampled = [row["sampled"] for row in partial_run.rows]
    assert all(len(set(s)) == 3 and s == sorted(s) for s in sampled)
    assert all(set(s) <= set(range(7)) for s in sampled)
    assert len({tuple(s) for s in sampled}) > 3
    for row, exchange in zip(partial_run.rows, partial_run.exchanges, strict=False):
        assert sorted(exchange.instructions) == row["sampled"] == row["answered"]
    assert sorted(partial_run.exchanges[-1].instructions) == list(range(7))


def test_all_methods_sample_the_same_clients_and_another_seed_others() -> None:
    def drawn(**keys: Any) -> list[list[int]]:
        experiment = tiny(**{"num_server_rounds": 4, **PARTIAL, **keys})
        return [row["sampled"] for row in federate(experiment).rows]

    reference = drawn(strategy="DSFL")
    assert drawn(strategy="LocalOnly") == reference
    assert drawn(strategy="FedAvg", fraction_train=0.4, batch_size=5) == reference
    assert drawn(strategy="LocalOnly", seed=6) != reference


def test_the_samples_of_a_round_are_asked_and_then_digested_in_the_next(
    partial_run: Finished,
) -> None:
    """FL-bench's FedMD digests the samples of round 1 for ever."""
    asked = []
    for number, exchange in enumerate(partial_run.exchanges[:-1], 1):
        instructions = list(exchange.instructions.values())
        assert all(torch.equal(o.asked, instructions[0].asked) for o in instructions)
        samples = instructions[0].asked.tolist()
        assert samples == sorted(set(samples))
        assert len(samples) == 11
        assert set(samples) <= set(range(P))
        asked.append(samples)
        for instruction in instructions:
            if number == 1:
                assert instruction.knowledge is None
            else:
                assert isinstance(instruction.knowledge, SoftLabels)
                assert instruction.knowledge.samples.tolist() == asked[number - 2]
                assert instruction.knowledge_round == number - 1
        for client in exchange.instructions:
            answer = exchange.report(client).answer
            assert isinstance(answer, SoftLabels)
            assert answer.samples.tolist() == samples
    assert len({tuple(samples) for samples in asked}) == len(asked)
    assert len({s for samples in asked for s in samples}) > 11


def test_what_is_sent_is_the_mean_of_the_round_before(partial_run: Finished) -> None:
    for before, after in zip(partial_run.exchanges, partial_run.exchanges[1:], strict=False):
        values = [
            answer.values[0].double()
            for k in sorted(before.instructions)
            if isinstance(answer := before.report(k).answer, SoftLabels)
        ]
        expected = sum(values) / len(values)
        for instruction in after.instructions.values():
            assert isinstance(instruction.knowledge, SoftLabels)
            assert isinstance(expected, Tensor)
            torch.testing.assert_close(
                instruction.knowledge.values[0].double(), expected, rtol=1e-6, atol=1e-6
            )


def test_a_client_starts_from_its_own_last_round_and_gets_the_newest_knowledge(
    partial_run: Finished,
) -> None:
    last: dict[int, int] = {}
    skipped = 0
    for number, exchange in enumerate(partial_run.exchanges, 1):
        for client, instruction in exchange.instructions.items():
            assert instruction.base == last.get(client, INITIAL)
            assert instruction.round == number
            skipped += 0 < instruction.base < number - 1
        if number <= len(partial_run.rows):
            last |= dict.fromkeys(exchange.instructions, number)
    assert skipped > 0


def test_a_client_that_was_away_digests_the_newest_knowledge_once(partial_run: Finished) -> None:
    for exchange in partial_run.exchanges[1:-1]:
        for client, instruction in exchange.instructions.items():
            if instruction.base == INITIAL:  # its first round: FedMD's transfer learning
                assert instruction.phases == tuple(find("FedMD").phases(1))
                continue
            metrics = exchange.report(client).metrics
            assert "loss_digest" in metrics
            assert "agreement" in metrics


def test_fedavg_does_not_lose_an_architecture_whose_clients_were_not_drawn() -> None:
    """Its last average is what the clients of that architecture go on from."""
    experiment = tiny(
        strategy="FedAvg",
        student="mlp-8,mlp-9",
        num_clients=4,
        fraction_train=0.25,
        num_server_rounds=6,
    )
    done = federate(experiment)
    sampled = [row["sampled"][0] for row in done.rows]
    newest: dict[str, Knowledge] = {}
    for number, exchange in enumerate(done.exchanges):
        for client, instruction in exchange.instructions.items():
            student = experiment.student_of(client)
            if student in newest:
                assert instruction.knowledge is not None, (number + 1, client, sampled)
                assert_knowledge(instruction.knowledge, newest[student])
        if number < len(sampled):
            answer = exchange.report(sampled[number]).answer
            assert answer is not None
            newest[experiment.student_of(sampled[number])] = answer
    assert set(newest) == {"mlp-8", "mlp-9"}


# --- What a strategy remembers -------------------------------------------------------------------


def test_knowledge_may_be_personal() -> None:
    class Private(DistillationStrategy):
        facts = Facts("none", "P*C*4", "0")

        def aggregate(self, labels: SoftLabels) -> Tensor:
            return labels.mean_logits()

        def personalise(self, knowledge: Knowledge, client: int, server: Server) -> Knowledge:
            assert isinstance(knowledge, SoftLabels)
            return SoftLabels.shared(
                knowledge.values[0] + client, knowledge.samples, knowledge.space
            )

    done = federate(tiny(num_server_rounds=2), strategy=Private())
    mean = mean_of_answers(done.exchanges[0])
    for client, instruction in done.exchanges[1].instructions.items():
        assert isinstance(instruction.knowledge, SoftLabels)
        torch.testing.assert_close(instruction.knowledge.values[0], mean + client)
    assert done.rows[1]["dropped"] == {}


def mean_of_answers(exchange: Exchange) -> Tensor:
    answers = exchange.answers(range(K))
    assert isinstance(answers, SoftLabels)
    return torch.from_numpy(np.mean(answers.values.numpy(), 0))


def test_the_draw_is_a_pure_function_of_seed_and_round() -> None:
    def draw(seed: int, number: int, size: int | None) -> list[int]:
        experiment = tiny(seed=seed, partition_seed=3, public_per_round=size)
        server = Server(experiment, federated_data(experiment))
        server.round = number
        return server.draw().tolist()

    assert draw(1, 2, 11) == draw(1, 2, 11)
    assert len({tuple(draw(seed, number, 11)) for seed in (1, 2) for number in (1, 2, 3)}) == 6
    for size in (None, P):
        assert draw(1, 2, size) == list(range(P))
    drawn = [draw(4, number, 11) for number in range(1, 200)]
    assert all(d == sorted(set(d)) and len(d) == 11 for d in drawn)
    counts = np.bincount([s for d in drawn for s in d], minlength=P)
    assert counts.min() > 199 * 11 / P / 2  # every sample gets its turn


class Personal(DistillationStrategy):
    """Everybody receives soft labels of its own, made for each."""

    facts = Facts("none", "P*C*4", "P*C*4 + P*8")

    def aggregate(self, knowledge: SoftLabels) -> Tensor:
        return knowledge.mean_logits()

    def personalise(self, knowledge: Knowledge, client: int, server: Server) -> Knowledge:
        assert isinstance(knowledge, SoftLabels)
        mine = knowledge.values[0] + 100.0 * torch.arange(10) * client
        return SoftLabels.shared(mine, knowledge.samples, "logits")


def test_what_is_personal_reaches_its_own_client() -> None:
    """Objects that live for one message only: a freed one's place in memory is soon taken."""
    done = federate(tiny(num_clients=7, num_server_rounds=3), strategy=Personal())
    for exchange in done.exchanges[1:]:
        values = []
        for client, instruction in exchange.instructions.items():
            assert isinstance(instruction.knowledge, SoftLabels)
            values.append(instruction.knowledge.values[0] - 100.0 * torch.arange(10) * client)
        for other in values[1:]:
            torch.testing.assert_close(other, values[0], rtol=0, atol=1e-3)
        assert (
            exchange.report(1).metrics["loss_digest"] != exchange.report(2).metrics["loss_digest"]
        )
