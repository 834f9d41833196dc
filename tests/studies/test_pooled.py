"""Students of several seeds, temperatures, step sizes and epochs at once, against each by itself."""

from __future__ import annotations

import json
from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from federation_tools import tiny
from safetensors.torch import load_file
from sampling import one_in
from scipy.special import softmax
from scipy.stats import entropy as scipy_entropy

import fedkd
from fedkd.data.federated import federated_data
from fedkd.experiment import Experiment
from fedkd.studies.pooled import Pooled, accuracies
from fedkd.training.architectures import architectures_of

F64 = torch.float64

BASE: dict[str, Any] = {"teacher": "mlp-11", "local_epochs": 2, "distill_epochs": 2, "seed": 1}

DIFFERENT: list[dict[str, Any]] = [
    {"alpha": 0.0, "tau": 1.0},
    {"alpha": 0.5, "tau": 3.0, "distill_epochs": 3},
    {"alpha": 1.0, "tau": 5.0, "seed": 4},
    {"alpha": 0.9, "tau": 2.0, "learning_rate": 0.003},
    {"alpha": 0.9, "tau": 2.0, "local_epochs": 4, "weight_decay": 0.01},
    {"alpha": 0.5, "tau": 8.0, "seed": 4},
    {"alpha": 0.5, "tau": 8.0, "seed": 9, "distill_epochs": 1},
]
"""Students 0 and 1, and 2 and 5, share a teacher."""


def experiments(**keys: Any) -> list[Experiment]:
    return [tiny(**{**BASE, **keys, **own}) for own in DIFFERENT]


def trained(members: list[Experiment]) -> Pooled:
    pooled = Pooled(members)
    pooled.train_teachers()
    pooled.train_students()
    return pooled


@pytest.mark.parametrize(
    "keys",
    one_in(
        2,
        [
            {"plan": "stacked-4"},
            {"plan": "loop", "kl_reduction": "mean", "optimizer": "sgd", "momentum": 0.9},
            {"plan": "stacked-4", "fold": "2/3", "public_labels": False, "augment": "jitter-2"},
        ],
    ),
    ids=str,
)
def test_each_student_is_the_one_of_a_central_run_of_its_own(keys: dict[str, Any]) -> None:
    members = experiments(**keys)
    pooled = trained(members)
    assert len(pooled.teachers) == 5
    test = pooled.data.test
    found = accuracies(pooled.students.classify(test), test)
    for k, member in enumerate(members):
        alone = fedkd.central(member, save=False)
        image = 1.5 / alone.test_size  # see CLOSE of test_side_by_side.py
        assert found[k] == pytest.approx(alone.student_accuracy, abs=image)
        teacher = accuracies(pooled.teachers.classify(test), test)[pooled.teacher_of[k]]
        assert teacher == pytest.approx(alone.teacher_accuracy, abs=image)
        single = trained([member])
        for of, row, other in (
            (pooled.students, k, single.students),
            (pooled.teachers, int(pooled.teacher_of[k]), single.teachers),
        ):
            for name, tensor in of.state(row).items():
                torch.testing.assert_close(tensor, other.state(0)[name], rtol=1e-3, atol=1e-4)
    states = [pooled.students.state(k)["head.weight"] for k in range(len(members))]
    assert all(
        not torch.allclose(a, b, atol=1e-3) for n, a in enumerate(states) for b in states[:n]
    )


def test_those_that_differ_in_the_seed_alone_are_the_same_to_the_last_bit() -> None:
    members = [tiny(**{**BASE, "plan": "stacked-3", "seed": seed}) for seed in (4, 0, 11)]
    pooled = trained(members)
    for k, member in enumerate(members):
        single = trained([member])
        for name, tensor in pooled.students.state(k).items():
            assert torch.equal(tensor, single.students.state(0)[name])


def test_every_student_learns_from_the_soft_labels_of_its_own_pooled_images() -> None:
    """Entropies by a forward pass of our own over the rows that the seed leaves, in float64."""
    members = experiments(public_labels=False, plan="stacked-4")
    pooled = trained(members)
    train = pooled.data.train
    pixels = (train.pixels.double() / 255 - train.mean[0]) / train.std[0]
    for k, member in enumerate(members):
        rows = federated_data(member).pooled
        assert len(rows) == 151 - 37
        model = architectures_of(pooled.data).model("mlp-11").double()
        state = pooled.teachers.state(int(pooled.teacher_of[k]))
        model.load_state_dict({n: t.double() for n, t in state.items()})
        logits = model.eval()(pixels[rows]).detach().numpy()
        given = pooled.soft_labels[pooled.teacher_of[k]].double().numpy()
        assert given == pytest.approx(logits, abs=1e-4)
        for at_tau, tau in ((False, 1.0), (True, member.tau)):
            expected = scipy_entropy(softmax(logits / tau, 1), axis=1).mean()
            assert pooled.soft_label_entropies(at_tau)[k] == pytest.approx(expected, rel=1e-4)
        model = architectures_of(pooled.data).model("mlp-8").double()
        model.load_state_dict({n: t.double() for n, t in pooled.students.state(k).items()})
        assert train.labels is not None
        right = model.eval()(pixels[rows]).argmax(1) == train.labels[rows]
        accuracy = pooled.training_accuracies(pooled.students)[k]
        assert accuracy == pytest.approx(float(right.double().mean()), abs=1.5 / len(rows))


# --- What a central run says ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> fedkd.CentralRun:
    keys = {**BASE, "local_epochs": 3, "tau": 3.0, "run_dir": str(tmp_path_factory.mktemp("runs"))}
    return fedkd.central(tiny(**keys, public_labels=False, batch_size=13), [7, 2])


def test_training_is_told_epoch_by_epoch(run: fedkd.CentralRun) -> None:
    """Nine steps an epoch, of which one or two are measured; the losses fall."""
    assert set(run.training) == {"teacher", "student-alone", "student-distilled"}
    for model, epochs in (("teacher", 3), ("student-alone", 2), ("student-distilled", 2)):
        said = run.training[model]
        for of in ("loss", "gradient_norm"):
            assert [len(seed) for seed in said[of]] == [epochs, epochs]
            assert all(isfinite(value) and value > 0 for seed in said[of] for value in seed)
        assert all(seed[0] > seed[-1] for seed in said["loss"])
        assert len(said["accuracy"]) == 2
    assert run.training["student-alone"]["loss"] != run.training["student-distilled"]["loss"]


def test_the_losses_of_epochs_are_means_of_its_steps(run: fedkd.CentralRun) -> None:
    """The gradient is measured at steps 0, 8, 16, 24 of 27: epochs of nine have two, one and one."""
    members = [run.experiment.replace(seed=seed, name=None) for seed in (7, 2)]
    pooled = Pooled(members)
    fitted = pooled.train_teachers()
    assert fitted.loss_by_step.shape == (2, 27)
    assert fitted.gradient_norm_by_step.shape == (2, 4)
    losses = fitted.loss_by_step.view(2, 3, 9).mean(-1)
    said = run.training["teacher"]
    assert np.array(said["loss"]) == pytest.approx(losses.numpy(), rel=1e-6)
    norms = fitted.gradient_norm_by_step
    expected = [[float(row[:2].mean()), float(row[2]), float(row[3])] for row in norms]
    assert np.array(said["gradient_norm"]) == pytest.approx(np.array(expected), rel=1e-6)
    assert float(fitted.losses[0]) == pytest.approx(float(fitted.loss_by_step[0].mean()), rel=1e-6)


def test_epochs_too_short_to_be_measured_have_no_norm() -> None:
    keys = {**BASE, "local_epochs": 5, "batch_size": 67, "public_labels": True}
    run = fedkd.central(tiny(**keys), save=False)  # three steps an epoch
    (norms,) = run.training["teacher"]["gradient_norm"]
    assert [norm is None for norm in norms] == [False, True, False, True, True]
    assert json.dumps(run.as_json(), allow_nan=False)


def test_a_run_that_diverges_is_still_written(tmp_path: Path) -> None:
    keys = {**BASE, "optimizer": "sgd", "learning_rate": 10.0, "run_dir": str(tmp_path)}
    run = fedkd.central(tiny(**{**keys, "momentum": 0.99, "local_epochs": 9}))
    assert run.path is not None
    losses = run.training["teacher"]["loss"][0]
    assert fedkd.CentralRun.load(run.path).training == run.training
    assert any(loss is None or loss > 10 for loss in losses)


def test_a_run_comes_back_from_its_folder(run: fedkd.CentralRun) -> None:
    assert run.path is not None
    again = fedkd.CentralRun.load(run.path)
    assert again == run
    assert again.experiment.tau == 3.0
    assert again.gap_closed == run.gap_closed
    assert json.loads((run.path / "shards.json").read_text())["test"]


def test_a_run_whose_teacher_is_as_large_as_its_student_can_be_repeated(tmp_path: Path) -> None:
    """From its own record, in which each architecture's plan stands once."""
    keys = {**BASE, "teacher": "mlp-8", "run_dir": str(tmp_path)}
    first = fedkd.central(tiny(**keys), [0, 1])
    again = fedkd.central(first.experiment.replace(name=None), [0, 1])
    assert again.student_accuracies == first.student_accuracies


def test_models_of_a_run_are_those_that_were_tested(run: fedkd.CentralRun) -> None:
    assert run.path is not None
    tensors, data = load_file(run.path / "models.safetensors"), federated_data(run.experiment)
    pixels = (data.test.pixels.double() / 255 - data.test.mean[0]) / data.test.std[0]
    assert data.test.labels is not None
    for model, name, expected in (
        ("teacher", "mlp-11", run.teacher_accuracies),
        ("student-alone", "mlp-8", run.student_alone_accuracies),
        ("student-distilled", "mlp-8", run.student_accuracies),
    ):
        for seed, accuracy in zip(run.seeds, expected, strict=True):
            head = f"{model}/{seed}/"
            state = {
                n.removeprefix(head): t.double() for n, t in tensors.items() if n.startswith(head)
            }
            module = architectures_of(data).model(name).double()
            module.load_state_dict(state)
            right = module.eval()(pixels).argmax(1) == data.test.labels
            assert float(right.double().mean()) == pytest.approx(accuracy, abs=1.5 / 61)
