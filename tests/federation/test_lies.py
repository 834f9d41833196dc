"""Absurd but finite replies: they are left out or do no harm, and nobody else is left out."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from federation_tools import Exchange, Finished, federate, tiny
from flwr.app import Message
from lies import CLASS_MEANS, LARGEST, LOGITS, PROBABILITIES, WEIGHTS, Arrays, Lie, told
from sampling import one_in
from torch import Tensor

from fedkd.clients.instructions import ClientReport, Instruction
from fedkd.data.federated import federated_data
from fedkd.experiment import Experiment
from fedkd.federation.outliers import farthest_first, least
from fedkd.federation.trial import Trial
from fedkd.knowledge import (
    ClassMeans,
    Knowledge,
    ModelWeights,
    SoftLabels,
    Weights,
    tensors_of,
)
from fedkd.knowledge.codec import Packed
from fedkd.phases import ClassifyByMeans, Digest, MeanByClass, Phase, Predict, Revisit
from fedkd.registry import strategies

K, LIAR = 5, 1


def experiment_of(strategy: str, **keys: Any) -> Experiment:
    cls = strategies()[strategy]
    small: dict[str, Any] = {
        "strategy": strategy,
        "num_clients": K,
        "num_server_rounds": 3,
        "student": "lies:normed" if cls().uploads() is Weights else "mlp-8",
        "teacher": "mlp-7" if cls.facts.local_teacher else "none",
        "server_model": "mlp-8" if cls.facts.server_model == "required" else "none",
        "codec": "float32" if strategy == "CFD" else "auto",
        # Models as new as these agree on no sample well enough to be passed on.
        "strategy_config": "ambiguity=2" if strategy == "SelectiveFD" else "none",
        "evaluate_every": 3,
        "plan": "stacked",
    }
    return tiny(**{**small, **keys})


def lies_for(strategy: str) -> Mapping[str, Lie]:
    """Return what a client of a strategy may say."""
    algorithm = strategies()[strategy]()
    phases = [phase for phase in algorithm.phases(2) if isinstance(phase, Predict | MeanByClass)]
    outputs = {phase.space if isinstance(phase, Predict) else phase.of for phase in phases}
    if algorithm.uploads() is Weights:
        return WEIGHTS
    tables = {"logits": LOGITS, "probabilities": PROBABILITIES, "features": CLASS_MEANS}
    return tables[outputs.pop()] if outputs else {}


def lying(experiment: Experiment, lie: Lie) -> Finished:
    """Run a federation in which one client lies in every round."""

    def meddle(instruction: Instruction, message: Message, reply: Message) -> Message:
        return told(reply, lie) if instruction.client == LIAR else reply

    return federate(experiment, meddle)


def left_out(done: Finished) -> list[set[int]]:
    return [{int(client) for client in row["dropped"]} for row in done.rows]


def told_to_all(done: Finished) -> list[Tensor]:
    """Return the tensors of the knowledge that clients received in the last exchange that had some."""
    exchange = next(e for e in reversed(done.exchanges) if _knowledge_in(e))
    assert exchange.instructions.keys() == set(range(K))
    tensors: list[Tensor] = []
    for received in _knowledge_in(exchange):
        if isinstance(received, Packed):
            tensors += received.arrays.values()
        else:
            tensors += tensors_of(received)
    return tensors


def _knowledge_in(exchange: Exchange) -> list[Knowledge | Packed]:
    told = [instruction.knowledge for instruction in exchange.instructions.values()]
    return [knowledge for knowledge in told if knowledge is not None]


TABLE = [(strategy, name) for strategy in strategies() for name in lies_for(strategy)]


def test_the_table_has_hundreds_of_lies() -> None:
    assert len({*WEIGHTS, *CLASS_MEANS, *LOGITS, *PROBABILITIES}) > 60
    assert len(TABLE) > 300
    assert {strategy for strategy, _ in TABLE} == {*strategies()} - {"LocalOnly"}


@pytest.mark.parametrize(("strategy", "name"), one_in(67, TABLE))
def test_a_lie_ends_no_run_spoils_no_knowledge_and_costs_no_other_client_anything(
    strategy: str, name: str
) -> None:
    done = lying(experiment_of(strategy), lies_for(strategy)[name])
    assert all(row["accepted"] for row in done.rows)
    assert all(dropped <= {LIAR} for dropped in left_out(done))
    assert done.exchanges[-1].instructions.keys() == set(range(K))
    assert all(bool(tensor.isfinite().all()) for tensor in told_to_all(done))


# --- What is left out, and what is not -------------------------------------------------------------

USELESS = "weights with which predictions are not finite"


@pytest.mark.parametrize(
    ("strategy", "name", "reason"),
    [
        ("FedAvg", "all 1e+38", USELESS),
        ("FedProx", "variance -1", USELESS),
        ("FedDF", "one variance -1", USELESS),
        ("FedProto", "all 1e+20", "class means with which losses or gradients are not finite"),
    ],
)
def test_who_is_left_out_alone_is_named_with_the_reason(
    strategy: str, name: str, reason: str
) -> None:
    experiment = experiment_of(strategy, num_server_rounds=1, evaluate_every=1)
    done = lying(experiment, lies_for(strategy)[name])
    silent = federate(experiment, lambda i, m, r: None if i.client == LIAR else r)
    for row, without in zip(done.rows, silent.rows, strict=True):
        assert row["dropped"] == {str(LIAR): f"sends {reason}"}
        assert row["bytes_up_by_tensor"]["refused"] == row["bytes_up_by_client"][LIAR] > 0
        assert sum(row["bytes_up_by_tensor"].values()) == row["bytes_up"]
        same = ("answered", "server_accuracy", "loss_revisit", "knowledge_round")
        assert [row[n] for n in same] == [without[n] for n in same]


@pytest.mark.parametrize("strategy", ["FedAvg", "FedDF"])
def test_of_mixed_architectures_the_others_make_their_models_without_the_liar(
    strategy: str,
) -> None:
    experiment = experiment_of(strategy, num_server_rounds=1, student="mlp-8,mlp-5")
    done = lying(experiment, WEIGHTS[f"all {LARGEST:.3g}"])
    silent = federate(experiment, lambda i, m, r: None if i.client == LIAR else r)
    assert left_out(done) == left_out(silent) == [{LIAR}]
    for ours, others in zip(told_to_all(done), told_to_all(silent), strict=True):
        assert torch.equal(ours, others)


def test_what_alone_can_be_used_is_left_out_where_it_spoils_all_together() -> None:
    """Its own logits are finite: one of them is 3e38 times a feature below 1."""
    experiment = experiment_of("FedAvg", num_server_rounds=1)
    done = lying(experiment, WEIGHTS["one of head.weight 3.4e+38"])
    assert left_out(done) == [{LIAR}]
    reason = "sends weights with which those of all together are not finite in use"
    assert {row["dropped"][str(LIAR)] for row in done.rows} == {reason}


def large(arrays: Arrays, times: float) -> Arrays:
    return {n: a * np.float32(times) if a.dtype == np.float32 else a for n, a in arrays.items()}


@pytest.mark.parametrize("strategy", ["FedAvg", "FedProto", "FedMD"])
def test_numbers_that_are_merely_large_stay(strategy: str) -> None:
    done = lying(experiment_of(strategy), partial(large, times=1000))
    assert left_out(done) == [set()] * 3


def test_if_most_have_diverged_nobody_is_blamed_for_what_they_are_together() -> None:
    """Three of five send what is only useful alone, so that no minority explains it."""
    lie = WEIGHTS["one of head.weight 3.4e+38"]

    def meddle(instruction: Instruction, message: Message, reply: Message) -> Message:
        return told(reply, lie) if instruction.client < 3 else reply

    done = federate(experiment_of("FedAvg", num_server_rounds=1), meddle)
    assert left_out(done) == [set()]


def test_below_the_quorum_with_a_liar_left_out_the_previous_knowledge_stays() -> None:
    for name in ("all 1e+38", "one of head.weight 3.4e+38"):  # alone, and together
        experiment = experiment_of("FedAvg", num_server_rounds=2, quorum=K)

        def meddle(
            instruction: Instruction, message: Message, reply: Message, lie: Lie = WEIGHTS[name]
        ) -> Message:
            return (
                told(reply, lie) if (instruction.client, instruction.round) == (LIAR, 2) else reply
            )

        done = federate(experiment, meddle)
        assert [row["accepted"] for row in done.rows] == [True, False]
        first, last = (done.exchanges[n].instructions[0].knowledge_round for n in (1, 2))
        assert first == last == 1


# --- The trial -------------------------------------------------------------------------------------


def means_of(value: float) -> ClassMeans:
    values = torch.full((1, 10, 8), value)
    counts = torch.ones(1, 10, dtype=torch.int64)
    return ClassMeans(values, counts, torch.tensor([0]), "features")


def labels_of(value: float, row: int) -> SoftLabels:
    values = torch.zeros(1, 37, 10)
    values[0, row, 3], values[0, row, 4] = value, -value
    return SoftLabels(values, "logits")


def phases_of(strategy: str) -> list[Phase]:
    return strategies()[strategy]().phases(2)


def test_class_means_teach_while_their_squares_are_finite() -> None:
    """The squared distance overflows between 1e19 and 2e19, whose square is 4e38."""
    trial = Trial(tiny(strategy="FedProto"), federated_data(tiny()))
    tried: list[tuple[int, Knowledge]] = [(0, means_of(v)) for v in (0.5, 1e18, 2e19, LARGEST)]
    phases = phases_of("FedProto")
    assert trial.teaches(tried, phases, 1, 1.0) == [True, True, False, False]
    assert trial.teaches(tried, phases) == [True, False, False, False]  # 1e36 · 1e6


@pytest.mark.parametrize("row", [0, 36])
def test_soft_labels_are_tried_where_they_are_largest(row: int) -> None:
    """At a temperature of a half logits of 3e38 are infinite; 5 of 37 rows do not fit into a trial."""
    experiment = tiny(tau=0.5)
    trial = Trial(experiment, federated_data(experiment))
    tried: list[tuple[int, Knowledge]] = [(0, labels_of(v, row)) for v in (1.0, 1e38, LARGEST)]
    assert trial.teaches(tried, [Digest()], 1, 1.0) == [True, True, False]


def test_a_trial_that_cannot_be_made_blames_nobody() -> None:
    experiment = tiny(student="federation_tools:lazy")
    trial = Trial(experiment, federated_data(experiment))
    assert trial.teaches([(0, means_of(1.0))], [ClassifyByMeans(), Revisit()]) == [True]


# --- Who is at fault -------------------------------------------------------------------------------


def reports_of(answers: list[Knowledge]) -> list[ClientReport]:
    return [ClientReport(k, 1, answer, {}, {}) for k, answer in enumerate(answers)]


def weights_of(client: int, value: float, name: str = "a") -> Weights:
    owner = torch.tensor([client]), torch.tensor([1])
    return Weights({name: ModelWeights({"w": torch.full((1, 3), value)}, *owner)})


def test_the_farthest_from_the_median_comes_first() -> None:
    answers: list[Knowledge] = [
        weights_of(k, v) for k, v in enumerate([1.0, 3e38, 2.0, -3e38, 2.5, 1.5])
    ]
    zeros = {"w": torch.zeros(3)}
    # With the start, 0, the median is 1.5; 3e38 is as far above it as -3e38 is below.
    assert farthest_first(reports_of(answers), lambda name: zeros) == [3, 1, 4, 2, 0, 5]


def test_one_client_of_an_architecture_is_compared_with_its_start() -> None:
    answers: list[Knowledge] = [weights_of(0, 1.0), weights_of(1, 1.2), weights_of(2, 1e9, "b")]
    assert farthest_first(reports_of(answers), lambda name: {"w": torch.ones(3)})[0] == 2


def test_distances_are_over_the_classes_and_samples_that_a_client_has() -> None:
    values = torch.tensor([[0.0, 9.0], [1.0, 0.0], [5.0, 0.0]])
    counts = torch.tensor([[1, 0], [1, 1], [1, 1]])
    means: list[Knowledge] = [
        ClassMeans(values[k].view(1, 2, 1), counts[k : k + 1], torch.tensor([k]), "logits")
        for k in range(3)
    ]
    # Medians 1 and 0: distances 1 (its other class does not count), 0, and 4 / √2.
    assert farthest_first(reports_of(means), lambda name: {}) == [2, 0, 1]
    labels: list[Knowledge] = [
        SoftLabels(values[k].view(1, 2, 1), "logits", clients=torch.tensor([k])) for k in range(3)
    ]
    assert farthest_first(reports_of(labels), lambda name: {}) == [0, 2, 1]  # 9 / √2 now counts


@pytest.mark.parametrize("most", range(12))
def test_the_fewest_that_explain_it_are_found_in_few_tries(most: int) -> None:
    for needed in range(1, most + 3):
        tried: list[int] = []

        def works(count: int, needed: int = needed, tried: list[int] = tried) -> bool:
            tried.append(count)
            return count >= needed

        assert least(most, works) == (needed if needed <= most else None)
        assert len(tried) <= 2 * max(most, 1).bit_length()
        assert all(1 <= count <= most for count in tried)
