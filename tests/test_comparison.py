"""Methods side by side are the runs that each would be alone."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

import fedkd
from fedkd.comparison import default_methods
from fedkd.plots import accuracy_by_round

EXPERIMENT = fedkd.Experiment(
    dataset="digits",
    public_size=97,
    public_labels=False,
    num_clients=3,
    student="mlp-13",
    teacher="mlp-37",
    num_server_rounds=2,
    device="cpu",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def comparison(folder: Path) -> fedkd.Comparison:
    experiment = EXPERIMENT.replace(run_dir=str(folder), strategy="DSFL", name="both")
    experiment = experiment.replace(strategy_config="sharpening=mean")
    methods = ["teacher", "student-alone", "student distilled", "local", "fedavg", "ds-fl"]
    return fedkd.compare(experiment, methods, [0, 3])


def test_each_method_is_the_run_it_would_be_alone(
    comparison: fedkd.Comparison, tmp_path: Path
) -> None:
    for method, config in {
        "LocalOnly": "none",
        "FedAvg": "none",
        "DSFL": "sharpening=mean",
    }.items():
        alone = fedkd.run(
            EXPERIMENT.replace(
                strategy=method, strategy_config=config, seed=3, run_dir=str(tmp_path)
            )
        )
        together = comparison.runs[method][1]
        assert together.client_accuracy == alone.client_accuracy
        assert (together.bytes_up, together.bytes_down) == (alone.bytes_up, alone.bytes_down)
    pooled = EXPERIMENT.replace(local_epochs=2, distill_epochs=2)
    baseline = fedkd.central(pooled, [0, 3], save=False)
    assert comparison["teacher"].accuracies == baseline.teacher_accuracies
    assert comparison["student alone"].accuracies == baseline.student_alone_accuracies
    assert comparison["student distilled"].accuracies == baseline.student_accuracies


def test_all_methods_share_shards_and_initial_weights(comparison: fedkd.Comparison) -> None:
    """After one round of revisit, before anything has been exchanged, FedAvg and local only agree."""
    first = {
        method: [run.rounds[0]["client_accuracy_after_revisit"] for run in runs]
        for method, runs in comparison.runs.items()
    }
    sampled = {m: [run.rounds[0]["sampled"] for run in runs] for m, runs in comparison.runs.items()}
    assert first["LocalOnly"] == first["FedAvg"]
    assert len({str(s) for s in sampled.values()}) == 1


def test_the_entries_sum_up_the_runs(comparison: fedkd.Comparison) -> None:
    entry, runs = comparison["DSFL"], comparison.runs["DSFL"]
    first, second = (run.accuracy for run in runs)
    assert entry.accuracies == [first, second]
    assert entry.accuracy == pytest.approx((first + second) / 2)
    assert entry.spread == pytest.approx(abs(first - second) / 2**0.5)
    assert entry.worst == pytest.approx(
        sum(min(a for a in run.client_accuracy if a is not None) for run in runs) / 2
    )
    low, high = comparison["local only"].accuracy, comparison["student distilled"].accuracy
    if high > low:
        assert entry.gap_closed == pytest.approx((entry.accuracy - low) / (high - low))
    assert comparison["local only"].gap_closed is None
    assert comparison["local only"].bytes_up == 0
    assert comparison["FedAvg"].server_accuracies == comparison["FedAvg"].accuracies


def test_a_comparison_is_json_and_lies_in_run_folders(
    comparison: fedkd.Comparison, folder: Path
) -> None:
    parsed = json.loads(json.dumps(comparison.as_json(), allow_nan=False))
    assert [m["method"] for m in parsed["methods"]][:3] == [
        "teacher",
        "student-alone",
        "student-distilled",
    ]
    assert parsed["test_size"] == 359
    assert {path.name for path in folder.iterdir()} == {
        "both-central",
        *(f"both-{m}-seed{s}" for m in ("localonly", "fedavg", "dsfl") for s in (0, 3)),
    }


@pytest.mark.parametrize(
    ("method", "reason"),
    [("techer", "did you mean 'teacher'"), ("DSLF", "did you mean 'DSFL'"), ("x.py:Y", "no such")],
)
def test_a_method_that_is_none_is_named_before_any_work(
    tmp_path: Path, method: str, reason: str
) -> None:
    with pytest.raises(fedkd.FedkdError, match=reason):
        fedkd.compare(EXPERIMENT.replace(run_dir=str(tmp_path)), ["LocalOnly", method])
    assert list(tmp_path.iterdir()) == []


def test_the_plot_holds_every_label(tmp_path: Path) -> None:
    path = accuracy_by_round(
        {"DSFL": [(1, 0.31), (2, 0.57)], "FedAvg": [(1, 0.2), (2, 0.4)]},
        {"teacher": 0.94},
        tmp_path / "a.svg",
    )
    text = path.read_text()
    ET.fromstring(text)
    for label in ("DSFL", "FedAvg", "teacher 94.0", "test accuracy in %"):
        assert f"<!-- {label} -->" in text


@pytest.mark.parametrize(
    ("keys", "methods", "seeds", "reason"),
    [
        ({"strategy_config": "sharpening=mean"}, ["DSFL"], [0], "strategy-config.*not compared"),
        ({}, ["DSFL", "ds-fl"], [0], "methods = 'dsfl,dsfl'.*none of them twice"),
        ({}, [], [0], "methods = ''"),
        ({}, ["DSFL"], [3, 3], "seeds = '3,3'"),
        ({"teacher": "none"}, ["teacher"], [0], "teacher = 'none'"),
        ({"student": "mlp-8,mlp-9"}, ["student-alone"], [0], "student = 'mlp-8,mlp-9'"),
    ],
)
def test_what_cannot_be_compared_is_refused_before_any_work(
    tmp_path: Path, keys: dict[str, str], methods: list[str], seeds: list[int], reason: str
) -> None:
    with pytest.raises(fedkd.FedkdError, match=reason):
        fedkd.compare(EXPERIMENT.replace(run_dir=str(tmp_path), **keys), methods, seeds)
    assert list(tmp_path.iterdir()) == []


def test_without_a_single_teacher_only_the_federated_methods_are_compared() -> None:
    federated = ["LocalOnly", "FedAvg", "FedMD", "DSFL"]
    assert default_methods(EXPERIMENT.replace(teacher="none")) == federated
    assert default_methods(EXPERIMENT.replace(student="mlp-8,mlp-9")) == federated
    assert default_methods(EXPERIMENT)[3:] == federated
