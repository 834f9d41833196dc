"""The central baseline: a teacher on the pooled data, a student alone, a student distilled.

All seeds run as one cohort; the student alone is the distilled student with α = 0, so that both see
the same images in the same order from the same initial weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from time import monotonic

import torch
from torch import Tensor

from fedkd.allocator import keep_freed_memory
from fedkd.cohort import Cohort, Side, stacked
from fedkd.errors import FedkdError
from fedkd.experiment import Experiment
from fedkd.images import Augment, Images
from fedkd.losses import Term, ce, kl_term
from fedkd.models import num_parameters
from fedkd.optimizers import OptimizerSettings
from fedkd.preflight import check_plan
from fedkd.records import CentralRun, RunFolder, environment
from fedkd.tuning import described, planned
from fedkd.world import World, check_models, world_of

Progress = Callable[[str, float], None]
"""Called with what is going on and how far it is, 0..1."""


def central(
    experiment: Experiment,
    seeds: Sequence[int] | None = None,
    *,
    save: bool = True,
    progress: Progress = lambda _, __: None,
) -> CentralRun:
    """Train teacher, student alone and student distilled on the pooled data.

    ``local-epochs`` are the teacher's, ``distill-epochs`` both students' (equal steps). Augmentation
    applies to the teacher only: the soft labels are those of the images as they are (Hinton et al.
    2015, section 3: the transfer set contains no translations).

    Args:
        experiment: data, models and training; federated keys are not used.
        seeds: run as one cohort; default the experiment's.
        save: whether to write a run folder.
        progress: told how far the work is.

    Raises:
        FedkdError: a key, the data or a model is not right; nothing has been trained then.
    """
    seeds = [experiment.seed] if seeds is None else list(seeds)
    if not seeds or len(set(seeds)) < len(seeds):
        raise FedkdError(f"seeds = {seeds}: at least one, and none of them twice")
    check_central(experiment)
    if save:
        RunFolder.check(experiment)
    worlds = [world_of(experiment.replace(seed=seed)) for seed in seeds]
    check_models(experiment, worlds[0], ("student", "teacher"))
    keep_freed_memory()
    counts = ((experiment.teacher, len(seeds)), (experiment.student, 2 * len(seeds)))
    reasons = described(experiment, counts)
    experiment = planned(experiment, counts)
    work = _Central(experiment, seeds, worlds, progress)
    run = work.run()
    return _saved(run, experiment, str(worlds[0].train.device), reasons) if save else run


def check_central(experiment: Experiment) -> None:
    """Refuse an experiment that has no central baseline.

    Raises:
        FedkdError: there is no teacher, or several students or teachers.
    """
    if experiment.teacher == "none":
        raise FedkdError(
            "teacher = 'none': the central baseline needs a teacher, such as 'mlp-800'"
        )
    check_plan(experiment)
    for key, names in (("student", experiment.student), ("teacher", experiment.teacher)):
        if "," in names:
            raise FedkdError(f"{key} = '{names}': the central baseline trains one {key}; name one")


class _Central:
    """One central baseline in the making."""

    def __init__(
        self,
        experiment: Experiment,
        seeds: Sequence[int],
        worlds: Sequence[World],
        progress: Progress,
    ) -> None:
        self.experiment = experiment
        self.seeds = list(seeds)
        self.world = worlds[0]
        self.rows = [world.pooled for world in worlds]
        self.progress = progress
        self.seconds: dict[str, float] = {}
        self.teachers = self._cohort(experiment.teacher_of(0), self.seeds)
        self.students = self._cohort(experiment.student_of(0), self.seeds * 2)

    def run(self) -> CentralRun:
        """Train everything and measure it on the test set."""
        self._train_teachers()
        self._train_students()
        test = self.world.test
        taught = self.teachers.classify(test)
        learnt = self.students.classify(test)
        count = len(self.seeds)
        accuracies = _accuracy(learnt, test)
        agreement = (learnt[count:] == taught).cpu().double().mean(1)
        return CentralRun(
            path=None,
            seeds=self.seeds,
            teacher_accuracies=_accuracy(taught, test),
            student_alone_accuracies=accuracies[:count],
            student_accuracies=accuracies[count:],
            agreements=[float(a) for a in agreement],
            parameters={
                "teacher": num_parameters(self.teachers.skeleton),
                "student": num_parameters(self.students.skeleton),
            },
            test_size=len(test),
            seconds=self.seconds,
        )

    def _cohort(self, name: str, seeds: Sequence[int]) -> Cohort:
        states = [self.world.initial_state(name, seed) for seed in seeds]
        return self.world.cohort(self.experiment, name, stacked(states))

    def _train_teachers(self) -> None:
        self._fit("teacher", self.teachers, {ce: 1.0}, None, self.experiment.augment)

    def _train_students(self) -> None:
        experiment, count = self.experiment, len(self.seeds)
        device = self.world.train.device
        alpha = torch.tensor([0.0] * count + [experiment.alpha] * count, device=device)
        soft = kl_term(experiment.kl_reduction)
        teacher_logits = self._teacher_logits().repeat(2, 1, 1)
        self._fit("students", self.students, {soft: alpha, ce: 1 - alpha}, teacher_logits, "none")

    def _teacher_logits(self) -> Tensor:
        """Label each seed's own pooled images, ``[S, N, C]`` in the order of its rows."""
        rows = self.rows
        if all(torch.equal(rows[0], r) for r in rows):
            return self.teachers.predict(self.world.train, rows[0])
        whole = self.teachers.predict(self.world.train)
        return torch.stack([logits[r] for logits, r in zip(whole, rows, strict=True)])

    def _fit(
        self,
        what: str,
        cohort: Cohort,
        terms: dict[Term, float | Tensor],
        teacher_logits: Tensor | None,
        augment: Augment,
    ) -> None:
        experiment = self.experiment
        started = monotonic()
        copies = len(cohort) // len(self.seeds)
        teaches = teacher_logits is None
        cohort.fit(
            [Side("pooled", self.world.train, self.rows * copies, terms, teacher_logits, augment)],
            epochs=experiment.local_epochs if teaches else experiment.distill_epochs,
            batch_size=experiment.batch_size,
            optimizer=OptimizerSettings.of(experiment),
            numbers={"tau": experiment.tau},
            streams=[(seed, "central", what) for seed in self.seeds * copies],
            progress=lambda done: self.progress(what, done),
        )
        self.seconds[what] = monotonic() - started


def _accuracy(predicted: Tensor, images: Images) -> list[float]:
    assert images.labels is not None
    return [float(a) for a in (predicted.cpu() == images.labels.cpu()).double().mean(1)]


def _saved(
    run: CentralRun, experiment: Experiment, device: str, reasons: Mapping[str, str]
) -> CentralRun:
    folder = RunFolder.create(experiment, f"central-{experiment.dataset.replace(':', '.')}")
    surroundings = environment(device, torch.get_num_threads())
    folder.write_experiment(experiment, {**surroundings, **reasons})
    folder.write_result(run.as_json())
    return CentralRun(**{**run.__dict__, "path": folder.path})
