"""The central baseline against a plain PyTorch loop, and the presets against their sources."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from federation_tools import tiny
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import fedkd
from fedkd.cli.presets import PRESETS, preset
from fedkd.data import load
from fedkd.randomness import key, permutation
from fedkd.records.results import CentralRun, gap_closed
from fedkd.studies.central import central
from fedkd.training.models import build

SHAPE, CLASSES = (1, 8, 8), 10
TINY = fedkd.Experiment(
    dataset="digits",
    public_size=97,
    num_clients=3,
    teacher="mlp-37",
    student="mlp-7",
    local_epochs=3,
    distill_epochs=2,
    batch_size=67,
    learning_rate=3e-3,
    alpha=0.6,
    tau=2.5,
    device="cpu",
)


def normalised(images: Tensor) -> Tensor:
    digits = load("digits")
    return (images.float() / 255 - digits.mean[0]) / digits.std[0]


def fresh(name: str, seed: int) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(key(seed, "initial", name))
        return build(name, SHAPE, CLASSES)


def plain(
    name: str, epochs: int, what: str, teacher: nn.Module | None, alpha: float, divide: bool
) -> nn.Module:
    """Train with DataLoader, torch.optim and the formula written out."""
    digits = load("digits")
    data = TensorDataset(normalised(digits.train_images), digits.train_labels)
    model = fresh(name, TINY.seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=TINY.learning_rate)
    for epoch in range(epochs):
        order = permutation(len(data), TINY.seed, "central", what, "pooled", epoch)
        for images, labels in DataLoader(data, TINY.batch_size, sampler=order.tolist()):
            z = model(images)
            loss = (1 - alpha) * F.cross_entropy(z, labels)
            if teacher is not None:
                with torch.no_grad():
                    p = (teacher(images) / TINY.tau).softmax(-1)
                log_q = (z / TINY.tau).log_softmax(-1)
                kl = (p * (p.log() - log_q)).sum() / len(labels)
                loss = loss + alpha * TINY.tau**2 * kl / (CLASSES if divide else 1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model.eval()


def accuracy(model: nn.Module) -> float:
    digits = load("digits")
    predicted = model(normalised(digits.test_images)).argmax(-1)
    return float((predicted == digits.test_labels).double().mean())


@pytest.mark.parametrize("divide", [False, True], ids=["batchmean", "mean"])
def test_central_equals_a_plain_loop(divide: bool) -> None:
    run = central(TINY.replace(kl_reduction="mean" if divide else "batchmean"), save=False)
    teacher = plain("mlp-37", 3, "teacher", None, 0.0, divide)
    alone = plain("mlp-7", 2, "students", None, 0.0, divide)
    distilled = plain("mlp-7", 2, "students", teacher, TINY.alpha, divide)
    one_image = 1.5 / run.test_size  # a tie may fall to the other side in float32
    assert run.teacher_accuracy == pytest.approx(accuracy(teacher), abs=one_image)
    assert run.student_alone_accuracy == pytest.approx(accuracy(alone), abs=one_image)
    assert run.student_accuracy == pytest.approx(accuracy(distilled), abs=one_image)
    assert len({run.student_accuracy, run.student_alone_accuracy, run.teacher_accuracy}) == 3
    images = normalised(load("digits").test_images)
    agree = (teacher(images).argmax(-1) == distilled(images).argmax(-1)).double().mean()
    assert run.agreements[0] == pytest.approx(float(agree), abs=2 * one_image)


@pytest.mark.parametrize("labels", [True, False])
def test_seeds_in_one_cohort_equal_seeds_alone(labels: bool) -> None:
    """Each on its own pooled images where the public set is not labelled."""
    experiment = TINY.replace(public_labels=labels, local_epochs=1, distill_epochs=1)
    together = central(experiment, [0, 5, 2], save=False)
    for position, seed in enumerate((0, 5, 2)):
        alone = central(experiment.replace(seed=seed), save=False)
        assert alone.teacher_accuracies == [together.teacher_accuracies[position]]
        assert alone.student_accuracies == [together.student_accuracies[position]]
        assert alone.student_alone_accuracies == [together.student_alone_accuracies[position]]


def test_a_distilled_student_learns_from_its_teacher_alone() -> None:
    """At α = 1 no label is used; agreement grows with training."""
    short = central(TINY.replace(alpha=1.0, distill_epochs=1), save=False)
    long = central(TINY.replace(alpha=1.0, distill_epochs=29), save=False)
    assert long.student_accuracy > 0.8
    assert long.agreements[0] > short.agreements[0] + 0.2


def test_a_run_is_written_and_says_what_it_was(tmp_path: Path) -> None:
    experiment = TINY.replace(run_dir=str(tmp_path), name="mine", local_epochs=1, distill_epochs=1)
    run = central(experiment, [0, 1])
    assert run.path == tmp_path / "mine"
    text = (run.path / "result.json").read_text()
    assert '"gap_closed"' in text
    assert 'name = "mine"' in (run.path / "experiment.toml").read_text()
    with pytest.raises(fedkd.FedkdError, match=r"name = 'mine'.*exists"):
        central(experiment)


@pytest.mark.parametrize(
    ("keys", "reason"),
    [
        ({"teacher": "none"}, "teacher = 'none'"),
        ({"teacher": "mlp37"}, "teacher = 'mlp37'.*mlp-<width>"),
        ({"student": "resnet-9"}, "student = 'resnet-9'.*did you mean 'resnet-"),
    ],
)
def test_a_missing_or_mistyped_model_is_named_with_its_key(
    tmp_path: Path, keys: dict[str, str], reason: str
) -> None:
    with pytest.raises(fedkd.FedkdError, match=reason):
        central(TINY.replace(run_dir=str(tmp_path), **keys))
    assert list(tmp_path.iterdir()) == []


def test_the_gap_closed_is_na_where_there_is_no_gap() -> None:
    assert gap_closed(0.95, 0.90, 0.98) == pytest.approx(0.625)
    assert gap_closed(0.95, 0.98, 0.90) is None
    assert gap_closed(0.95, 0.9, 0.9) is None
    run = CentralRun(
        None,
        [0, 1],
        [0.98, 0.96],
        [0.9, 0.92],
        [0.95, 0.95],
        [1.0, 1.0],
        {},
        7,
        {},
        {},
        [1.0, 1.0],
        [2.0, 2.0],
    )
    assert run.gap_closed == pytest.approx((0.95 - 0.91) / (0.97 - 0.91))


def test_the_missions_recipe_is_the_preset() -> None:
    recipe = preset("mnist-mlp")
    assert (recipe.dataset, recipe.teacher, recipe.student) == ("mnist", "mlp-1200", "mlp-20")
    assert (recipe.batch_size, recipe.optimizer, recipe.learning_rate) == (64, "adam", 1e-3)
    assert (recipe.local_epochs, recipe.distill_epochs) == (10, 10)
    assert (recipe.alpha, recipe.tau, recipe.kl_reduction) == (0.7, 5.0, "batchmean")
    hinton = preset("mnist-hinton")
    assert (hinton.student, hinton.tau, hinton.augment) == ("mlp-800", 20.0, "jitter-2")
    assert preset("cifar10-cnn").dataset == "cifar10"
    assert set(PRESETS) == {"mnist-mlp", "mnist-hinton", "cifar10-cnn"}
    with pytest.raises(fedkd.FedkdError, match=r"mnist-mpl.*did you mean 'mnist-mlp'"):
        preset("mnist-mpl")


def test_the_teacher_alone_sees_augmented_images() -> None:
    plainly = central(TINY, save=False)
    jittered = central(TINY.replace(augment="jitter-2"), save=False)
    assert jittered.teacher_accuracies != plainly.teacher_accuracies
    assert jittered.student_alone_accuracies == plainly.student_alone_accuracies


@pytest.mark.parametrize(
    "keys", [{"learning_rate": 10.0}, {"optimizer": "sgd", "learning_rate": 9.0}]
)
def test_no_gap_is_closed_where_the_teacher_diverged(keys: dict[str, Any], tmp_path: Path) -> None:
    """Its accuracy is that of one class, which may be above that of the student alone."""
    run = fedkd.central(
        tiny(teacher="mlp-11", local_epochs=5, plan="loop", run_dir=str(tmp_path), **keys)
    )
    assert "teacher" in run.without_learning
    lucky = replace(run, teacher_accuracies=[0.13], student_alone_accuracies=[0.11])
    assert lucky.gap_closed is None
    assert run.path is not None
    assert fedkd.CentralRun.load(run.path).without_learning == run.without_learning


def test_of_models_that_have_learnt_the_gap_is_closed_by_what_they_say() -> None:
    keys = {"train_size": 503, "local_epochs": 13, "distill_epochs": 13, "plan": "loop"}
    run = fedkd.central(tiny(teacher="mlp-31", **keys), save=False)
    assert run.without_learning == []
    made = replace(run, teacher_accuracies=[0.9], student_alone_accuracies=[0.5])
    assert replace(made, student_accuracies=[0.6]).gap_closed == pytest.approx(0.25)
