"""What models answered on the test images: the file, its bins, and the accuracies of a run."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from federation_tools import tiny
from sklearn.calibration import calibration_curve
from torch import Tensor, nn

import fedkd
from fedkd.clients import evaluation
from fedkd.clients.evaluation import record_predicted
from fedkd.clients.stack import Stack
from fedkd.clients.state_files import StateFiles
from fedkd.data.federated import FederatedData, federated_data
from fedkd.data.images import Images
from fedkd.errors import FedkdError
from fedkd.knowledge import ClassMeans
from fedkd.knowledge.calibration import BINS, expected_calibration_error, reliability
from fedkd.records import Run, predictions
from fedkd.records.predictions import Predictions
from fedkd.training.models import build

# --- Bins ----------------------------------------------------------------------------------------


def answers(count: int = 997) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7)
    confidences = torch.rand(count, generator=generator).clamp_min(0.1)
    correct = torch.rand(count, generator=generator) < confidences**2
    return confidences, correct


@pytest.mark.parametrize("bins", [1, 7, BINS])
def test_bins_are_those_of_a_plain_loop(bins: int) -> None:
    confidences, correct = answers()
    said = reliability(confidences, correct, bins)
    error = 0.0
    for m in range(bins):
        inside = [
            (c, r)
            for c, r in zip(confidences.double().tolist(), correct.tolist(), strict=True)
            if m / bins < c <= (m + 1) / bins
        ]
        assert said["count"][m] == len(inside)
        if not inside:
            assert (said["confidence"][m], said["accuracy"][m]) == (None, None)
            continue
        sure, right = (float(np.mean(each)) for each in zip(*inside, strict=True))
        assert said["confidence"][m] == pytest.approx(sure)
        assert said["accuracy"][m] == pytest.approx(right)
        error += len(inside) / len(confidences) * abs(right - sure)
    assert expected_calibration_error(said) == pytest.approx(error, abs=1e-12)
    assert error > 0.05 or bins == 1


def test_bins_are_those_of_scikit_learn() -> None:
    confidences, correct = answers()
    said = reliability(confidences.view(1, -1), correct.view(1, -1))
    right, sure = calibration_curve(correct.numpy(), confidences.double().numpy(), n_bins=BINS)
    assert [a for a in said["accuracy"] if a is not None] == pytest.approx(right.tolist())
    assert [c for c in said["confidence"] if c is not None] == pytest.approx(sure.tolist())


def test_a_confidence_on_the_border_belongs_to_the_bin_below() -> None:
    confidences = torch.tensor([0.0, 0.25, 0.2500001, 0.5, 0.75, 1.0])
    assert reliability(confidences, torch.ones(6, dtype=torch.bool), 4)["count"] == [2, 2, 1, 1]


def test_who_is_as_right_as_sure_has_no_error_and_who_is_sure_and_wrong_all() -> None:
    half = torch.full((10,), 0.5), torch.arange(10) % 2 == 0
    assert expected_calibration_error(reliability(*half)) == pytest.approx(0)
    wrong = torch.ones(10), torch.zeros(10, dtype=torch.bool)
    assert expected_calibration_error(reliability(*wrong)) == 1


# --- The file ------------------------------------------------------------------------------------


def test_a_file_comes_back_as_it_was(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(1)
    models = {}
    for kind, owners in (("student", [0, 3, 70_000]), ("teacher", [2])):
        shape = (len(owners), 11)
        confidences = torch.rand(shape, generator=generator).half().float()
        classes = torch.randint(0, 997, shape, generator=generator)
        models[kind] = Predictions(classes, confidences, owners)
    models["teacher"].confidences[0, 3] = torch.nan
    given = predictions.Tested(torch.randint(0, 997, (11,), generator=generator), models)
    given.save(tmp_path)
    found = predictions.Tested.load(tmp_path)
    assert found is not None
    assert torch.equal(found.labels, given.labels)
    assert found.labels.dtype == torch.int64
    assert set(found.models) == {"student", "teacher"}
    for kind, each in found.models.items():
        assert torch.equal(each.classes, models[kind].classes)
        assert each.classes.dtype == torch.int64
        torch.testing.assert_close(
            each.confidences, models[kind].confidences, rtol=0, atol=0, equal_nan=True
        )
        assert each.owners == models[kind].owners
        expected = models[kind].classes == given.labels
        assert torch.equal(found.correct(kind), expected)
    assert [path.name for path in tmp_path.iterdir()] == ["tested.safetensors"]


def test_a_run_that_kept_nothing_has_none_and_a_file_that_is_broken_is_named(
    tmp_path: Path,
) -> None:
    assert predictions.Tested.load(tmp_path) is None
    (tmp_path / "tested.safetensors").write_bytes(b"half a file")
    with pytest.raises(FedkdError, match=r"tested\.safetensors cannot be read"):
        predictions.Tested.load(tmp_path)


def test_of_many_models_the_first_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(predictions, "MOST_ANSWERS", 25)
    classes = torch.arange(35).view(5, 7)
    given = predictions.Tested(
        torch.arange(7), {"student": Predictions(classes, classes.float(), [9, 8, 7, 6, 5])}
    )
    given.save(tmp_path)
    found = predictions.Tested.load(tmp_path)
    assert found is not None
    assert found.models["student"].owners == [9, 8, 7]
    assert torch.equal(found.models["student"].classes, classes[:3])


# --- Of a run ------------------------------------------------------------------------------------


def assert_agrees(run: Run, kind: str = "student") -> predictions.Tested:
    """The answers are the accuracies of the run, exactly."""
    found = predictions.Tested.load(run.path)
    assert found is not None
    labels = federated_data(run.experiment).test.labels
    assert labels is not None
    assert torch.equal(found.labels, labels)
    right = found.correct(kind).double().mean(1).tolist()
    expected = [a for a in run.client_accuracy if a is not None]
    owners = [k for k, a in enumerate(run.client_accuracy) if a is not None]
    assert found.models[kind].owners == owners
    if kind == "student":
        assert right == expected
        assert sum(right) / len(right) == pytest.approx(run.accuracy, abs=1e-15)
    kept = run.path / "clients" / "memory"
    assert not kept.exists() or not list(kept.glob("tested-*"))
    return found


@pytest.mark.parametrize(
    "keys",
    [
        {"strategy": "DSFL"},
        {"strategy": "FedAvg", "fraction_train": 0.34},
        {"strategy": "FedMD", "teacher": "mlp-11"},
        {"strategy": "FedMD", "teacher": "mlp-11,none", "student": "mlp-8,mlp-5", "num_clients": 5},
        {"strategy": "SelectiveFD"},
        {"strategy": "SCARLET", "codec": "simplex:2+changed+range"},
    ],
    ids=lambda keys: "-".join(map(str, keys.values())),
)
def test_answers_are_the_accuracies_of_the_run(keys: dict[str, Any], tmp_path: Path) -> None:
    run = fedkd.run(tiny(num_server_rounds=2, run_dir=str(tmp_path), **keys))
    found = assert_agrees(run)
    confidences = found.models["student"].confidences
    assert bool(((confidences >= 0.1 - 1e-3) & (confidences <= 1)).all())
    teachers = [
        k for k in range(run.experiment.num_clients) if run.experiment.teacher_of(k) != "none"
    ]
    if teachers:
        assert found.models["teacher"].owners == teachers
        different = found.models["teacher"].classes != found.models["student"].classes[teachers]
        assert bool(different.any())
    else:
        assert set(found.models) == {"student"}


def normalised(data: FederatedData, pixels: Tensor) -> Tensor:
    return (pixels.double() / 255 - data.test.mean[0]) / data.test.std[0]


def left_models(run: Run, closing: int) -> list[nn.Module]:
    """Return the three clients' students as the closing exchange left them, in float64."""
    states = StateFiles(run.path / "clients", 1).load(dict.fromkeys(range(3), closing))
    models = []
    for k in range(3):
        model = build(run.experiment.student, (1, 8, 8), 10).double()
        state = {n: t[k].double() for n, t in states.models["student"].items()}
        model.load_state_dict(state)
        models.append(model.eval().requires_grad_(False))
    return models


def test_answers_and_confidences_are_those_of_the_models_that_are_left(tmp_path: Path) -> None:
    """By a forward pass of our own, in float64, over the states of the closing exchange."""
    run = fedkd.run(tiny(strategy="DSFL", num_server_rounds=2, run_dir=str(tmp_path)))
    found, data = assert_agrees(run), federated_data(run.experiment)
    images = normalised(data, data.test.pixels)
    for k, model in enumerate(left_models(run, 3)):
        p = model(images).softmax(-1)
        assert torch.equal(found.models["student"].classes[k], p.argmax(-1))
        expected = p.max(-1).values.float()
        torch.testing.assert_close(
            found.models["student"].confidences[k], expected, rtol=0, atol=6e-4
        )


def test_what_is_classified_by_means_has_no_confidence(tmp_path: Path) -> None:
    run = fedkd.run(tiny(strategy="FedProto", num_server_rounds=2, run_dir=str(tmp_path)))
    assert bool(assert_agrees(run).models["student"].confidences.isnan().all())


def test_training_accuracy_is_of_the_same_classifier_as_the_accuracy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FedProto classifies by the nearest class mean: the clients' own images as the test images."""
    given, expected, honest = [], [], evaluation.record_training_accuracy

    def watched(stack: Stack) -> None:
        honest(stack)
        assert stack.by_means
        train = stack.data.train
        assert train.labels is not None
        for row, (shard, means) in enumerate(zip(stack.shards, stack.knowledge, strict=True)):
            assert isinstance(means, ClassMeans)
            features = stack.role("student").only(row).features(train, shard)[0]
            right = means.nearest(features) == train.labels[shard]
            given.append(stack.metrics[row]["training_accuracy"])
            expected.append(float(right.double().mean()))

    monkeypatch.setattr(evaluation, "record_training_accuracy", watched)
    fedkd.run(tiny(strategy="FedProto", num_server_rounds=3, run_dir=str(tmp_path)))
    assert given == expected


def test_training_accuracy_is_that_on_the_own_images(tmp_path: Path) -> None:
    run = fedkd.run(tiny(strategy="LocalOnly", num_server_rounds=5, run_dir=str(tmp_path)))
    data = federated_data(run.experiment)
    assert data.train.labels is not None
    expected = []
    for model, shard in zip(left_models(run, 6), data.shards, strict=True):
        predicted = model(normalised(data, data.train.pixels[shard])).argmax(-1)
        expected.append(float((predicted == data.train.labels[shard]).double().mean()))
    assert run.result["client_training_accuracy"] == expected
    assert run.result["training_accuracy"] == pytest.approx(sum(expected) / 3)
    assert run.result["training_accuracy"] > run.accuracy


def test_a_central_run_keeps_its_answers_by_seed(tmp_path: Path) -> None:
    experiment = tiny(teacher="mlp-11", local_epochs=2, distill_epochs=2, run_dir=str(tmp_path))
    run = fedkd.central(experiment, [3, 0, 2**31 - 1])
    assert run.path is not None
    found = predictions.Tested.load(run.path)
    assert found is not None
    for kind, accuracies in (
        ("teacher", run.teacher_accuracies),
        ("student-alone", run.student_alone_accuracies),
        ("student-distilled", run.student_accuracies),
    ):
        assert found.models[kind].owners == [3, 0, 2**31 - 1]
        assert found.correct(kind).double().mean(1).tolist() == accuracies
    agree = found.models["student-distilled"].classes == found.models["teacher"].classes
    assert agree.double().mean(1).tolist() == run.agreements


@pytest.mark.ray
@pytest.mark.slow
def test_flower_clients_leave_the_same_answers(tmp_path: Path) -> None:
    keys: dict[str, Any] = {"strategy": "FedMD", "teacher": "mlp-11", "plan": "loop", "fold": "1/2"}
    here = fedkd.run(tiny(run_dir=str(tmp_path), name="here", **keys))
    there = fedkd.run(tiny(run_dir=str(tmp_path), name="there", engine="flower", **keys))
    one, other = assert_agrees(here), assert_agrees(there)
    assert here.accuracy == there.accuracy
    assert here.result["client_training_accuracy"] == there.result["client_training_accuracy"]
    for kind, each in one.models.items():
        assert torch.equal(each.classes, other.models[kind].classes)
        assert torch.equal(each.confidences, other.models[kind].confidences)
        assert each.owners == other.models[kind].owners
    for row, same in zip(here.rounds, there.rounds, strict=True):
        assert row["gradient_norm_transfer"] == same["gradient_norm_transfer"]
        assert row["knowledge_ece"] == same["knowledge_ece"]


# --- Shares that clients report ------------------------------------------------------------------


def test_who_is_right_about_everything_reports_no_more_than_one() -> None:
    """Shares of classes add up to 1 + 2e-16 for some shards, and the server refuses more than 1."""
    labels = torch.arange(10).repeat(3)
    test = Images(torch.zeros(30, 1, 2, 2, dtype=torch.uint8), labels, [0.0], [1.0])
    counts = torch.randint(0, 60, (997, 10), generator=torch.Generator().manual_seed(1))
    stack = SimpleNamespace(
        data=SimpleNamespace(test=test, num_classes=10, private_label_counts=counts),
        clients=list(range(997)),
        metrics=[{} for _ in range(997)],
    )
    record_predicted(stack, "accuracy", labels.expand(997, -1))  # type: ignore[arg-type]
    assert {metrics["accuracy"] for metrics in stack.metrics} == {1.0}
    assert max(metrics["own_accuracy"] for metrics in stack.metrics) <= 1
