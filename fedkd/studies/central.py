"""The central baseline: a teacher on the pooled data, a student alone, a student distilled.

All seeds run as one cohort; the student alone is the distilled student with α = 0, so that both see
the same images in the same order from the same initial weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from math import isfinite
from typing import Any

import torch
from safetensors.torch import save as safetensors_bytes
from torch import Tensor

from fedkd.data.federated import class_counts, federated_data
from fedkd.data.sources import reload
from fedkd.engines.identity import identity_of
from fedkd.engines.run_folder import record_beginning
from fedkd.errors import FedkdError, Setting
from fedkd.experiment import Experiment
from fedkd.machine import keep_freed_memory
from fedkd.records.files import replace_file
from fedkd.records.folder import RunFolder
from fedkd.records.predictions import Predictions, Tested
from fedkd.records.results import CentralRun
from fedkd.studies.arguments import Progress, seeds_of, silent
from fedkd.studies.pooled import TRAINED, Pooled, accuracies
from fedkd.training.cohort import Classified
from fedkd.training.fit import NORM_EVERY, Fitted
from fedkd.training.model_checks import check_models
from fedkd.training.models import num_parameters
from fedkd.training.tuning import check_plan, plan_reasons, with_plan

MODELS = "models.safetensors"
"""A central run's models: tensors ``<model>/<seed>/<parameter>``."""


def central(
    experiment: Experiment,
    seeds: Sequence[int] | None = None,
    *,
    save: bool = True,
    progress: Progress = silent,
) -> CentralRun:
    """Train teacher, student alone and student distilled on the pooled data.

    ``local-epochs`` are the teacher's, ``distill-epochs`` both students' (equal steps). Augmentation
    applies to the teacher only: the soft labels are those of the images as they are (Hinton et al.
    2015, section 3: the transfer set contains no translations).

    Args:
        experiment: data, models and training; federated keys are not used.
        seeds: run as one cohort; default the experiment's.
        save: whether to write a run folder.
        progress: called with the share of the work that is done.

    Raises:
        FedkdError: a key, the data or a model is invalid; nothing has been trained then.
    """
    seeds = seeds_of(experiment, seeds)
    check_central(experiment)
    if save:
        RunFolder.check(experiment)
    reload(experiment)
    by_seed = [federated_data(experiment.replace(seed=seed)) for seed in seeds]
    check_models(experiment, by_seed[0], TRAINED, trained=TRAINED)
    keep_freed_memory()
    counts = ((experiment.teacher, len(seeds)), (experiment.student, 2 * len(seeds)))
    reasons = plan_reasons(experiment, counts)
    experiment = with_plan(experiment, counts)
    alone = [experiment.replace(seed=seed, alpha=0.0) for seed in seeds]
    distilled = [experiment.replace(seed=seed) for seed in seeds]
    pooled = Pooled([*alone, *distilled], progress)
    run, tested = _trained(pooled)
    return _saved(run, tested, pooled, experiment, reasons) if save else run


def check_central(experiment: Experiment) -> None:
    """Raise an error for an experiment that has no central baseline.

    Raises:
        FedkdError: there is no teacher, or several students or teachers.
    """
    if experiment.teacher == "none":
        raise FedkdError(
            Setting("teacher", "none"), ": the central baseline needs a teacher, such as 'mlp-800'"
        )
    check_plan(experiment)
    for key, names in (("student", experiment.student), ("teacher", experiment.teacher)):
        if "," in names:
            raise FedkdError(f"{key} = '{names}': the central baseline trains one {key}; name one")


def _trained(pooled: Pooled) -> tuple[CentralRun, Tested]:
    """Train everything and test it; of 2 S students the first S are alone."""
    teaching, learning = pooled.train_teachers(), pooled.train_students()
    test = pooled.data.test
    taught, learnt = pooled.teachers.answer(test), pooled.students.answer(test)
    count = len(taught.classes)
    answers = {
        "teacher": taught,
        "student-alone": Classified(*(each[:count] for each in learnt)),
        "student-distilled": Classified(*(each[count:] for each in learnt)),
    }
    right = {model: accuracies(each.classes, test) for model, each in answers.items()}
    agreement = answers["student-distilled"].classes == taught.classes
    seeds = [experiment.seed for experiment in pooled.experiments[:count]]
    run = CentralRun(
        path=None,
        seeds=seeds,
        teacher_accuracies=right["teacher"],
        student_alone_accuracies=right["student-alone"],
        student_accuracies=right["student-distilled"],
        agreements=[float(a) for a in agreement.cpu().double().mean(1)],
        parameters={
            "teacher": num_parameters(pooled.teachers.skeleton),
            "student": num_parameters(pooled.students.skeleton),
        },
        test_size=len(test),
        seconds=pooled.seconds,
        training=_training(pooled, teaching, learning),
        soft_label_entropy=_finite(pooled.soft_label_entropies(at_tau=False)[count:]),
        soft_label_entropy_at_tau=_finite(pooled.soft_label_entropies(at_tau=True)[count:]),
    )
    predictions = {
        model: Predictions(each.classes.cpu(), each.confidences.cpu(), seeds)
        for model, each in answers.items()
    }
    assert test.labels is not None
    return run, Tested(test.labels.cpu(), predictions)


def _training(pooled: Pooled, teaching: Fitted, learning: Fitted) -> dict[str, dict[str, Any]]:
    """Return the training curves of each model, epoch by epoch."""
    experiment, count = pooled.experiment, len(teaching.losses)
    student_accuracies = pooled.training_accuracies(pooled.students)
    alone, distilled = slice(count), slice(count, None)
    students = experiment.distill_epochs
    teacher_accuracies = pooled.training_accuracies(pooled.teachers)
    courses = {
        "teacher": _course(teaching, slice(None), experiment.local_epochs, teacher_accuracies),
        "student-alone": _course(learning, alone, students, student_accuracies[alone]),
        "student-distilled": _course(learning, distilled, students, student_accuracies[distilled]),
    }
    frequent = pooled.shares_of_the_most_frequent_class()[:count]
    return {model: {**course, "frequent": frequent} for model, course in courses.items()}


def _course(fitted: Fitted, rows: slice, epochs: int, accuracy: list[float]) -> dict[str, Any]:
    """Return the training curves of some rows of a fit, and their accuracy on their training images."""
    steps = fitted.loss_by_step.shape[1] // epochs
    return {
        "loss": _by_epoch(fitted.loss_by_step[rows], steps, epochs, 1),
        "gradient_norm": _by_epoch(fitted.gradient_norm_by_step[rows], steps, epochs, NORM_EVERY),
        "accuracy": accuracy,
    }


def _by_epoch(values: Tensor, steps: int, epochs: int, every: int) -> list[list[float | None]]:
    """Return epoch means of what was measured at every `every`-th of `steps` an epoch, ``[S, M]``.

    `None` stands for what is not finite, and for an epoch too short to have a measurement.
    """
    epoch = torch.arange(values.shape[1]) * every // steps
    means = [values[:, (epoch == e).to(values.device)].mean(1).tolist() for e in range(epochs)]
    return [_finite(model) for model in zip(*means, strict=True)]


def _finite(values: Iterable[float]) -> list[float | None]:
    """Return the values with `None` for those that JSON cannot hold."""
    return [value if isfinite(value) else None for value in values]


def _saved(
    run: CentralRun,
    tested: Tested,
    pooled: Pooled,
    experiment: Experiment,
    reasons: Mapping[str, str],
) -> CentralRun:
    device, identity = str(pooled.data.train.device), identity_of(experiment, None, run.seeds)
    folder = RunFolder.create(
        experiment,
        f"central-{experiment.dataset_word}",
        lambda part, _: record_beginning(part, experiment, device, reasons, identity),
    )
    folder.write_shards(class_counts(pooled.data))
    tested.save(folder.path)
    replace_file(folder.path / MODELS, safetensors_bytes(_models(pooled, run.seeds)))
    folder.write_result(run.as_json())
    return replace(run, path=folder.path)


def _models(pooled: Pooled, seeds: Sequence[int]) -> dict[str, Tensor]:
    """Return all parameters and buffers as ``<model>/<seed>/<name>``."""
    tensors: dict[str, Tensor] = {}
    for model, cohort, first in (
        ("teacher", pooled.teachers, 0),
        ("student-alone", pooled.students, 0),
        ("student-distilled", pooled.students, len(seeds)),
    ):
        for row, seed in enumerate(seeds):
            state = cohort.state(first + row)
            tensors |= {f"{model}/{seed}/{name}": t.cpu().contiguous() for name, t in state.items()}
    return tensors
