"""Findings: on runs that were made to fail in one way each, on healthy ones, and at the thresholds.

``python tests/reports/test_findings.py`` makes the runs again and prints the table of docs/findings.md.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from math import log
from pathlib import Path
from typing import Any

import pytest
import torch

import fedkd
from fedkd.experiment import Experiment
from fedkd.records.folder import RunFolder
from fedkd.records.results import CentralRun, Run
from fedkd.reports.findings.diagnose import findings
from fedkd.reports.findings.learning import Finding

BASE = {
    "dataset": "mnist-5k",
    "student": "mlp-20",
    "strategy": "DSFL",
    "public_labels": False,
    "num_server_rounds": 4,
    "local_epochs": 2,
    "distill_epochs": 5,
    "alpha": 0.9,
    "tau": 3.0,
    "evaluate_phases": "last",
    "plan": "stacked",
    "device": "cpu",
}
CENTRAL = {"teacher": "mlp-200", "local_epochs": 6, "distill_epochs": 6, "alpha": 0.7, "tau": 5.0}
SGD = {"optimizer": "sgd", "learning_rate": 0.1}
CFD = {
    "strategy": "CFD",
    "server_model": "mlp-64",
    "num_server_rounds": 3,
    "distill_epochs": 10,
}
ONCE = {"num_server_rounds": 1, "local_epochs": 1, "distill_epochs": 1}

FAILING: list[tuple[str, dict[str, Any]]] = [
    ("student-too-small", {"student": "mlp-1"}),
    ("student-too-small", {"student": "mlp-2"}),
    ("student-too-small", {"student": "mlp-1", "strategy": "FedAvg"}),
    ("student-too-small", {"student": "mlp-20,mlp-1"}),
    ("student-too-small", {"student": "mlp-1", "teacher": "mlp-64", "evaluate_phases": "all"}),
    ("learning-rate-too-high", {"learning_rate": 0.1}),
    ("learning-rate-too-high", {"learning_rate": 1.0, "strategy": "FedAvg"}),
    ("learning-rate-too-high", {"optimizer": "sgd", "learning_rate": 10.0, "strategy": "FedMD"}),
    ("learning-rate-too-high", {"learning_rate": 0.1, "student": "mlp-2"}),
    ("learning-rate-too-low", {"learning_rate": 1e-5}),
    ("too-few-rounds", ONCE),
    ("too-few-rounds", {**ONCE, "num_server_rounds": 2, "strategy": "FedAvg"}),
    ("tau-too-hard", {**SGD, "tau": 0.03, "alpha": 1.0, "evaluate_phases": "all"}),
    ("tau-too-soft", {**CFD, "tau": 100.0}),
]
FAILING_CENTRALLY: list[tuple[str, dict[str, Any]]] = [
    ("student-too-small", {"student": "mlp-2"}),
    ("learning-rate-too-high", {"learning_rate": 0.1}),
    ("too-few-epochs", {"local_epochs": 1, "distill_epochs": 1}),
    ("tau-too-hard", {**SGD, "tau": 0.03, "alpha": 1.0}),
    ("tau-too-soft", {"student": "mlp-4", "tau": 1000.0, "alpha": 1.0, "distill_epochs": 12}),
]
HEALTHY: list[dict[str, Any]] = [
    {},
    {"tau": 0.1, "alpha": 0.7, "evaluate_phases": "all"},
    {**SGD, "strategy": "FedMD", "seed": 1, "public_labels": True},
    {"strategy": "FedAvg", "num_server_rounds": 10},
    {"strategy": "FD", "partition_alpha": 0.1, "num_server_rounds": 6, "seed": 1},
    {"strategy": "LocalOnly", "partition": "pathological", "num_server_rounds": 6},
    {"strategy": "SelectiveFD", "partition_alpha": 0.1, "seed": 2},
    {"strategy": "SCARLET", "fraction_train": 0.5, "num_server_rounds": 6},
    {**CFD, "tau": 1.0},
    {"teacher": "mlp-64", "evaluate_phases": "all"},
    {"student": "mlp-20,mlp-37", "learning_rate": 0.005},
]
MORE_HEALTHY: list[dict[str, Any]] = [
    {"partition": "iid", "seed": 2, "evaluate_every": 3},
    {"tau": 1000.0},
    {"strategy": "FedAvg", "num_server_rounds": 15, "partition_alpha": 0.1, "seed": 2},
    {"strategy": "FedProto", "num_server_rounds": 6},
    {"strategy": "Cronus", "partition_alpha": 0.1, "seed": 1, "evaluate_phases": "all"},
    {"teacher": "mlp-64", "num_server_rounds": 1, "local_epochs": 5},
    {"dataset": "digits", "num_server_rounds": 6, "local_epochs": 5, "distill_epochs": 10},
]
"""What is looked at with the slow tests, and not in the table of docs/findings.md."""
HEALTHY_CENTRALLY: list[dict[str, Any]] = [
    {},
    {"tau": 1000.0},
    {"tau": 0.1, "alpha": 1.0},
    {"kl_reduction": "mean", "alpha": 0.9, **SGD},
    {"dataset": "digits", "local_epochs": 20, "distill_epochs": 20},
]


def federated(folder: Path | str, keys: dict[str, Any], seed: int | None = None) -> Run:
    more = {} if seed is None else {"seed": seed}
    return fedkd.run(Experiment(**{**BASE, **keys, **more, "run_dir": str(folder)}))


def pooled(folder: Path | str, keys: dict[str, Any], seeds: tuple[int, ...]) -> CentralRun:
    return fedkd.central(Experiment(**{**BASE, **CENTRAL, **keys, "run_dir": str(folder)}), seeds)


def named(keys: dict[str, Any]) -> str:
    return " ".join(f"{name.replace('_', '-')}={value}" for name, value in keys.items()) or "base"


# --- Real runs ------------------------------------------------------------------------------------


def takes_a_moment(keys: dict[str, Any]) -> bool:
    return keys.get("strategy") in ("FedAvg", "LocalOnly") or keys == ONCE


def slow_if(is_slow: bool) -> list[pytest.MarkDecorator]:
    return [pytest.mark.slow] * is_slow


def _each_seed() -> Iterator[Any]:
    """One seed, and where a run takes a moment two more, which are slow.

    So are the runs that take longer, but for the first of a kind of which no other takes a moment.
    """
    kinds = {kind for kind, keys in FAILING if takes_a_moment(keys)} | {"tau-too-soft"}
    for kind, keys in FAILING:
        is_quick = takes_a_moment(keys)
        yield pytest.param(kind, keys, 0, marks=slow_if(kind in kinds and not is_quick))
        kinds.add(kind)
        if is_quick:
            yield from (pytest.param(kind, keys, s, marks=pytest.mark.slow) for s in (1, 2))


@pytest.mark.parametrize(("kind", "keys", "seed"), [*_each_seed()], ids=str)
def test_a_run_made_to_fail_says_how(
    kind: str, keys: dict[str, Any], seed: int, tmp_path: Path
) -> None:
    run = federated(tmp_path, keys, seed)
    found = findings(run)
    assert [each.kind for each in found] == [kind]
    key, value = found[0].suggestion.split(" = ")
    changed = run.experiment.replace(**{key.replace("-", "_"): value.strip("'")})
    assert changed != run.experiment  # what is suggested can be done, and changes something


@pytest.mark.parametrize(
    ("kind", "keys"),
    [
        pytest.param(kind, keys, marks=slow_if(kind not in ("student-too-small", "too-few-epochs")))
        for kind, keys in FAILING_CENTRALLY
    ],
    ids=str,
)
def test_a_central_run_made_to_fail_says_how(
    kind: str, keys: dict[str, Any], tmp_path: Path
) -> None:
    assert kinds(pooled(tmp_path, keys, (0, 1))) == [kind]


@pytest.mark.parametrize(
    "keys",
    [
        *(pytest.param(k, marks=slow_if(bool(k) and not takes_a_moment(k))) for k in HEALTHY),
        *(pytest.param(keys, marks=pytest.mark.slow) for keys in MORE_HEALTHY),
    ],
    ids=named,
)
def test_a_healthy_run_says_nothing(keys: dict[str, Any], tmp_path: Path) -> None:
    assert findings(federated(tmp_path, keys)) == []


@pytest.mark.parametrize(
    "keys",
    [pytest.param(keys, marks=slow_if(bool(keys))) for keys in HEALTHY_CENTRALLY],
    ids=named,
)
def test_a_healthy_central_run_says_nothing(keys: dict[str, Any], tmp_path: Path) -> None:
    assert findings(pooled(tmp_path, keys, (0,))) == []


@pytest.mark.parametrize(
    "bad", [{"student": "mlp-1"}, {"learning_rate": 0.1}, {**ONCE, "num_server_rounds": 2}], ids=str
)
def test_the_suggestion_helps(bad: dict[str, Any], tmp_path: Path) -> None:
    """By fifteen points at least."""
    keys = {"strategy": "FedAvg", **bad}
    before = federated(tmp_path, keys)
    key, value = findings(before)[0].suggestion.split(" = ")
    after = federated(tmp_path, {**keys, key.replace("-", "_"): value.strip("'")})
    assert after.accuracy > before.accuracy + 0.15


def test_a_run_that_was_not_saved_and_one_without_the_newer_records_say_nothing(
    tmp_path: Path,
) -> None:
    keys = {"student": "mlp-1", "dataset": "digits", "strategy": "FedAvg"}
    experiment = Experiment(**{**BASE, **CENTRAL, **ONCE, **keys})
    assert findings(fedkd.central(experiment, save=False)) == []
    run = federated(tmp_path, keys)
    assert [each.kind for each in findings(run)] == ["student-too-small"]
    older = Run(run.path, run.rounds, {k: v for k, v in run.result.items() if "training" not in k})
    assert findings(older) == []
    (run.path / "shards.json").unlink()
    assert findings(run) == []


def test_it_is_said_in_a_line_and_in_json() -> None:
    found = Finding("tau-too-soft", "τ is too soft", "tau = 5", "tau = 1")
    assert str(found) == "τ is too soft: tau = 5; try tau = 1"
    assert json.loads(json.dumps(found.as_json())) == {
        "kind": "tau-too-soft",
        "problem": "τ is too soft",
        "evidence": "tau = 5",
        "suggestion": "tau = 1",
    }


# --- Constructed records --------------------------------------------------------------------------

COUNTS = [[30, 30, 0, 0, 0, 0, 0], [0, 0, 20, 20, 20, 0, 0], [0, 0, 0, 0, 0, 50, 50]]
"""K = 3 shards of 7 classes, of entropies ln 2, ln 3, ln 2 and most frequent shares 1/2, 1/3, 1/2."""

H = [log(2), log(3), log(2)]
FREQUENT = (1 / 2 + 1 / 3 + 1 / 2) / 3


def records(
    folder: Path,
    relative: list[float],
    *,
    gain: float = 0.0,
    accuracy: float = 0.1,
    counts: list[list[int]] = COUNTS,
    public: list[int] | None = None,
    rows: dict[int, dict[str, Any]] | None = None,
    result: dict[str, Any] | None = None,
    **keys: Any,
) -> Run:
    """Write the records of a run with these losses relative to the labels' entropy, and read them."""
    experiment = Experiment(
        **{"num_clients": 3, "num_server_rounds": len(relative), "run_dir": str(folder), **keys}
    )
    made = RunFolder.create(experiment, "made")
    made.write_experiment(experiment, {})
    clients = list(range(len(counts)))
    training = FREQUENT + gain * (1 - FREQUENT)
    made.write_shards(
        {"classes": [str(c) for c in range(len(counts[0]))], "counts": counts, "public": public}
    )
    for number, loss in enumerate(relative, 1):
        row = {
            "round": number,
            "sampled": clients,
            "answered": clients,
            "dropped": {},
            "accepted": True,
            "server_accuracy": None,
            "bytes_up": 0,
            "bytes_down": 0,
            "seconds": {"round": 1.0},
            "loss_revisit": loss * sum(H) / 3,
            "gradient_norm_revisit": 1.0,
        }
        made.append_round({**row, **(rows or {}).get(number, {})})
    ended = {
        "accuracy": accuracy,
        "client_accuracy": [accuracy] * len(counts),
        "training_accuracy": training,
        "client_training_accuracy": [training] * len(counts),
        "server_accuracy": None,
        "dropped": {},
        "rounds": len(relative),
        "bytes_up": 0,
        "bytes_down": 0,
        "test_size": 7,
        "seconds": 1.0,
    }
    made.write_result({**ended, **(result or {})})
    return Run.load(made.path)


def kinds(run: Run | CentralRun) -> list[str]:
    return [each.kind for each in findings(run)]


SMALL = ["student-too-small"]
HIGH = ["learning-rate-too-high"]
ROUNDS = ["too-few-rounds"]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, SMALL),
        ({"gain": 0.299}, SMALL),
        ({"gain": 0.301}, []),
        ({"accuracy": 0.428}, SMALL),  # 3/7 = 0.4286
        ({"accuracy": 0.429}, []),
        ({"learning_rate": 1e-4}, SMALL),
        ({"learning_rate": 0.9e-4}, ["learning-rate-too-low"]),
        ({"learning_rate": 0.02}, SMALL),
        ({"learning_rate": 0.021}, HIGH),
        ({"optimizer": "sgd", "learning_rate": 0.0999, "momentum": 0.9}, SMALL),
        ({"optimizer": "sgd", "learning_rate": 0.101, "momentum": 0.9}, HIGH),
        ({"rows": {3: {"gradient_norm_revisit": 0.49}}}, HIGH),
        ({"rows": {3: {"gradient_norm_revisit": 0.51}}}, SMALL),
        ({"rows": {1: {"loss_revisit": 1.49 * log(7)}}}, SMALL),
        ({"rows": {1: {"loss_revisit": 1.51 * log(7)}}}, HIGH),
        ({"rows": {n: {"gradient_norm_revisit": None} for n in range(1, 4)}}, SMALL),
        ({"result": {"training_accuracy": None}}, []),
    ],
    ids=str,
)
def test_thresholds_of_students_that_learn_nothing(
    change: dict[str, Any], expected: list[str], tmp_path: Path
) -> None:
    """Three rounds; the last two hardly differ, so that nothing falls."""
    assert kinds(records(tmp_path, [1.2, 1.1, 1.1], **change)) == expected


@pytest.mark.parametrize(("late", "expected"), [(0.89, []), (0.91, SMALL)])
def test_loss_is_measured_by_the_entropy_of_those_who_answered(
    late: float, expected: list[str], tmp_path: Path
) -> None:
    """Client 1 alone: late · ln 3, which is 1.33 times as much of the mean of all three."""
    asked = {"sampled": [1], "answered": [1], "loss_revisit": late * log(3)}
    last = {number: {**asked} for number in range(4, 10)}
    assert kinds(records(tmp_path, [1.0] * 9, rows=last)) == expected


def test_rounds_without_a_quorum_do_not_count(tmp_path: Path) -> None:
    lost = {"accepted": False, "answered": [0], "loss_revisit": 0.001}
    assert kinds(records(tmp_path, [1.1] * 4, rows={4: lost})) == SMALL


def test_a_phase_that_ended_early_says_nothing_about_the_end(tmp_path: Path) -> None:
    """As of strategies that train on private images in round 1 alone."""
    assert kinds(records(tmp_path, [1.1] * 4, rows={4: {"loss_revisit": None}})) == []


@pytest.mark.parametrize(
    ("last", "expected"),
    # 61, 60 and 100 images in batches of 5: 12, 12 and 20 steps, 44/3 on average, for 2 epochs 88/3. A
    # fall by 10 % in 100 steps is one to 0.9 ** (88/3/100) = 0.96957 in a round.
    [(0.9690, ROUNDS), (0.9701, SMALL)],
)
def test_what_falls_by_a_tenth_in_a_hundred_steps_has_more_to_learn(
    last: float, expected: list[str], tmp_path: Path
) -> None:
    run = records(tmp_path, [1.2, 1.2, 1.2 * last], batch_size=5, local_epochs=2)
    assert kinds(run) == expected


@pytest.mark.parametrize(
    ("public", "expected"),
    # 100 public images: 20 more steps a round, 148/3 of them: 0.9 ** (148/300) = 0.94936.
    [([50, 50, 0, 0, 0, 0, 0], SMALL), (None, ROUNDS)],
)
def test_steps_of_the_digest_count(
    public: list[int] | None, expected: list[str], tmp_path: Path
) -> None:
    digest = {number: {"loss_digest": 0.5} for number in (2, 3)}
    losses = [1.2, 1.2, 1.2 * 0.96]
    run = records(tmp_path, losses, rows=digest, public=public, batch_size=5, local_epochs=2)
    assert kinds(run) == expected


@pytest.mark.parametrize(
    ("relative", "gain", "expected"),
    [([1.1], 0.69, ROUNDS), ([1.1], 0.71, []), ([0.89], 0.5, []), ([1.1, 1.1], 0.0, ROUNDS)],
)
def test_fewer_than_three_rounds_tell_no_trend(
    relative: list[float], gain: float, expected: list[str], tmp_path: Path
) -> None:
    assert kinds(records(tmp_path, relative, gain=gain)) == expected


@pytest.mark.parametrize(("each", "expected"), [(5, ROUNDS), (6, ROUNDS), (9, SMALL)])
def test_rounds_count_by_client(each: int, expected: list[str], tmp_path: Path) -> None:
    """One client of three a round: five, six and nine rounds are 5/3, 2 and 3 for each."""
    rows = {
        n: {"sampled": [n % 3], "answered": [n % 3], "loss_revisit": 1.1 * H[n % 3]}
        for n in range(1, each + 1)
    }
    assert kinds(records(tmp_path, [1.1] * each, rows=rows)) == expected


@pytest.mark.parametrize(("accuracy", "expected"), [(0.029, SMALL), (0.031, [])])
def test_near_chance_depends_on_the_classes(
    accuracy: float, expected: list[str], tmp_path: Path
) -> None:
    counts = [[n + (c == 0) for c in range(100)] for n in (2, 3, 5)]
    run = records(
        tmp_path,
        [4.6 / (sum(H) / 3)] * 3,
        counts=counts,
        accuracy=accuracy,
        result={"training_accuracy": 0.02, "client_training_accuracy": [0.02] * 3},
    )
    assert kinds(run) == expected


def test_shards_of_one_class_leave_nothing_to_learn(tmp_path: Path) -> None:
    counts = [[60, 0, 0, 0, 0, 0, 0], [0, 60, 0, 0, 0, 0, 0], [0, 0, 60, 0, 0, 0, 0]]
    assert kinds(records(tmp_path, [1.1] * 3, counts=counts)) == []


@pytest.mark.parametrize(
    ("refused", "expected"), [({"0": "not finite numbers"}, []), ({"0": "late", "1": "late"}, [])]
)
def test_a_few_bad_replies_are_no_finding(
    refused: dict[str, str], expected: list[str], tmp_path: Path
) -> None:
    run = records(tmp_path, [0.3] * 3, gain=0.9, accuracy=0.9, rows={2: {"dropped": refused}})
    assert kinds(run) == expected


def test_replies_that_are_not_finite_point_at_the_learning_rate(tmp_path: Path) -> None:
    refused = {"0": "sends metrics that are not finite numbers", "2": "holds NaN or infinity"}
    run = records(
        tmp_path,
        [0.3] * 3,
        gain=0.9,
        accuracy=0.9,
        rows={2: {"dropped": refused}},
        learning_rate=0.5,
    )
    (found,) = findings(run)
    assert found.kind == "learning-rate-too-high"
    assert found.evidence.startswith("adam at 0.5, 2 of 3 replies to round 2 were refused")
    assert found.suggestion == "learning-rate = 0.001"


@pytest.mark.parametrize(
    ("norm", "tau", "expected"),
    [(5.1, 3.0, ["tau-too-soft"]), (4.9, 3.0, []), (5.1, 1.0, [])],
)
def test_logits_that_explode_after_digests_point_at_tau(
    norm: float, tau: float, expected: list[str], tmp_path: Path
) -> None:
    grown = {n: {"gradient_norm_revisit": norm, "loss_digest": 9.0} for n in (2, 3)}
    run = records(tmp_path, [0.9, 1.5, 1.5], accuracy=0.5, rows=grown, tau=tau)
    assert kinds(run) == expected


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, ["tau-too-hard"]),
        ({"agreement": 0.71}, []),
        ({"knowledge_accuracy": 0.74}, []),  # not 0.15 above 0.6
        ({"knowledge_entropy_at_tau": 0.1 * log(7) + 0.001}, []),
        ({"knowledge_accuracy": None}, []),
        ({"agreement": None}, []),
    ],
    ids=str,
)
def test_thresholds_of_students_that_ignore_one_hot_labels(
    change: dict[str, Any], expected: list[str], tmp_path: Path
) -> None:
    said = {"agreement": 0.69, "knowledge_accuracy": 0.76, "knowledge_entropy_at_tau": 0.1 * log(7)}
    run = records(
        tmp_path, [0.3] * 3, gain=0.9, accuracy=0.6, rows={3: {**said, **change}}, tau=0.99
    )
    assert kinds(run) == expected


def test_the_architecture_that_lies_behind_is_named(tmp_path: Path) -> None:
    told = {"client_training_accuracy": [0.9, 0.59, 0.8], "client_accuracy": [0.8, 0.2, 0.7]}
    run = records(
        tmp_path, [0.5] * 3, gain=0.9, accuracy=0.6, result=told, student="cnn,mlp-7, resnet-8"
    )
    (found,) = findings(run)
    assert found.suggestion == "student = 'cnn,mlp-28,resnet-8'"
    assert "mlp-7" in found.problem
    told["client_training_accuracy"][1] = 0.61
    assert kinds(Run(run.path, run.rounds, {**run.result, **told})) == []


# --- Constructed central records ------------------------------------------------------------------


@pytest.fixture
def made(tmp_path: Path) -> CentralRun:
    """A healthy central run of two seeds on 7 even classes, by its records."""
    experiment = Experiment(run_dir=str(tmp_path), teacher="mlp-64", tau=5.0)
    folder = RunFolder.create(experiment, "central")
    folder.write_experiment(experiment, {})
    folder.write_shards({"classes": list("abcdefg"), "counts": [[10] * 7] * 3, "public": None})
    well = {"loss": [[1.9, 0.4, 0.2]] * 2, "gradient_norm": [[1.0, 1.0, None]] * 2}
    models = ("teacher", "student-alone", "student-distilled")
    return CentralRun(
        path=folder.path,
        seeds=[0, 1],
        teacher_accuracies=[0.9, 0.9],
        student_alone_accuracies=[0.9, 0.9],
        student_accuracies=[0.9, 0.9],
        agreements=[0.9, 0.9],
        parameters={},
        test_size=7,
        seconds={},
        training={model: {**well, "accuracy": [0.9, 0.9]} for model in models},
        soft_label_entropy=[0.1, 0.1],
        soft_label_entropy_at_tau=[1.9, 1.9],
    )


def test_central_records_that_are_well_say_nothing(made: CentralRun) -> None:
    assert findings(made) == []


@pytest.mark.parametrize("model", ["teacher", "student-alone", "student-distilled"])
def test_a_loss_that_is_not_finite_points_at_the_learning_rate(
    made: CentralRun, model: str
) -> None:
    made.training[model]["loss"] = [[1.9, 0.4, 0.2], [1.9, None, None]]
    made.soft_label_entropy_at_tau[1] = None
    (found,) = findings(made)
    assert found.kind == "learning-rate-too-high"
    assert model.replace("-", " ") in found.evidence


@pytest.mark.parametrize(
    ("distilled", "tested", "entropy", "expected"),
    [
        (0.76, 0.8, 1.9, []),
        (0.74, 0.8, 1.9, ["tau-too-soft"]),
        (0.74, 0.9, 1.9, []),
        (0.74, 0.8, 0.7 * log(7) - 0.01, []),
        (0.74, 0.8, 0.1, []),
    ],
)
def test_thresholds_of_harmful_distillation(
    made: CentralRun, distilled: float, tested: float, entropy: float, expected: list[str]
) -> None:
    """On own training images, and on test images too: else it has only kept from overfitting."""
    made.student_accuracies[:] = [tested, tested]
    made.training["student-distilled"]["accuracy"] = [distilled - 0.01, distilled + 0.01]
    made.soft_label_entropy_at_tau[:] = [entropy, entropy]
    assert kinds(made) == expected


@pytest.mark.parametrize(
    ("losses", "expected"),
    # Four steps an epoch (210 images, batches of 64): 10 % in 100 steps are 0.42 % an epoch.
    [
        ([1.9, 1.9, 1.89], ["too-few-epochs"]),
        ([1.9, 1.9, 1.899], SMALL),
        ([1.9, 1.9], ["too-few-epochs"]),
        ([0.49 * log(7)] * 3, []),
        ([0.51 * log(7)] * 3, SMALL),
    ],
)
def test_thresholds_of_central_students_that_learn_little(
    made: CentralRun, losses: list[float], expected: list[str]
) -> None:
    alone = made.training["student-alone"]
    alone |= {"loss": [losses] * 2, "gradient_norm": [[1.0] * len(losses)] * 2}
    alone["accuracy"] = [0.2, 0.2]
    assert kinds(made) == expected


# --- The table of docs/findings.md ----------------------------------------------------------------


def measured(run: Run) -> list[str]:
    """Compute from the records, once more, what decides: the columns of the first table."""
    shards = json.loads((run.path / "shards.json").read_text())["counts"]
    entropies = [-sum(n / sum(s) * log(n / sum(s)) for n in s if n) for s in shards]
    rows = [row for row in run.rounds if row.get("loss_revisit") is not None]
    losses = [
        row["loss_revisit"] / (sum(entropies[k] for k in row["answered"]) / len(row["answered"]))
        for row in rows
    ]
    norms = [row["gradient_norm_revisit"] for row in rows]
    window = max(1, len(rows) // 3)
    frequent = sum(max(s) / sum(s) for s in shards) / len(shards)
    last = [row for row in run.rounds if row.get("agreement") is not None][-1:]
    return [
        f"{sum(losses[-window:]) / window:.2f}" if rows[-1] is run.rounds[-1] else "–",
        f"{rows[0]['loss_revisit'] / log(len(shards[0])):.3g}",
        f"{sum(norms[-window:]) / window / norms[0]:.2g}",
        f"{(run.result['training_accuracy'] - frequent) / (1 - frequent):.2f}",
        f"{last[0]['agreement']:.2f}" if last else "–",
        f"{run.accuracy:.2f}",
    ]


def measured_centrally(run: CentralRun) -> list[str]:
    said = run.training
    shards = json.loads((run.path / "shards.json").read_text())["counts"]  # type: ignore[operator]
    uniform = log(len(shards[0]))
    window = max(1, len(said["student-alone"]["loss"][0]) // 3)
    late = [sum(losses[-window:]) / window / uniform for losses in said["student-alone"]["loss"]]
    alone, distilled = (
        sum(said[m]["accuracy"]) / len(run.seeds) for m in ("student-alone", "student-distilled")
    )
    entropy = (
        sum(value or 0.0 for value in run.soft_label_entropy_at_tau) / len(run.seeds) / uniform
    )
    columns = (sum(late) / len(late), alone, distilled, entropy, run.student_accuracy)
    return [f"{value:.2f}" for value in columns]


def table() -> Iterator[str]:
    """Make all runs and yield the lines of the tables."""
    heads = "late loss | first loss / ln C | gradient norm | gain | agreement | test accuracy"
    yield f"| run | {heads} | found |\n|{'---|' * 8}"
    with tempfile.TemporaryDirectory() as folder:
        healthy = [("", keys, keys.get("seed", 0)) for keys in HEALTHY]
        for _, keys, seed in [*(each.values for each in _each_seed()), *healthy]:
            run = federated(folder, keys, seed)
            told = {key: value for key, value in keys.items() if key != "seed"}
            yield _line(f"{named(told)} seed={seed}", measured(run), run)
        heads = "late loss alone | accuracy on own images, alone | distilled | entropy at τ / ln C"
        yield f"\n| central run, seeds 0, 1, 2 | {heads} | test accuracy | found |"
        yield f"|{'---|' * 7}"
        for _, keys in [*FAILING_CENTRALLY, *(("", keys) for keys in HEALTHY_CENTRALLY)]:
            central = pooled(folder, keys, (0, 1, 2))
            yield _line(named(keys), measured_centrally(central), central)


def _line(label: str, columns: list[str], run: Run | CentralRun) -> str:
    found = ", ".join(kinds(run)) or "–"
    return f"| `{label}` | {' | '.join(columns)} | {found} |"


if __name__ == "__main__":
    torch.set_num_threads(1)
    for line in table():
        print(line, flush=True)
