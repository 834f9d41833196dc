"""Teachers and students on the pooled data, any number of them side by side.

Each student has its own experiment: seed, α, τ, step size and epochs. A teacher is trained once for all
students whose experiments agree in everything that a teacher depends on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from time import monotonic

import torch
from torch import Tensor

from fedkd.data.federated import federated_data
from fedkd.data.images import Augment, Images
from fedkd.experiment import Experiment
from fedkd.knowledge.calibration import entropy
from fedkd.losses import Term, ce, kl_term
from fedkd.studies.arguments import Progress
from fedkd.training.accuracy import accuracy
from fedkd.training.architectures import architectures_of
from fedkd.training.batches import BatchStream
from fedkd.training.cohort import Cohort
from fedkd.training.fit import Fitted
from fedkd.training.optimizers import OptimizerSettings, stacked_values
from fedkd.training.parameters import stacked

TRAINED = ("student", "teacher")
"""Keys of the experiment that name the models, all of which are trained."""


class Pooled:
    """Students in training, and their teachers.

    The teachers' ``local-epochs`` and the students' ``distill-epochs`` count passes over the pooled
    images. Augmentation applies to teachers only: the soft labels are those of the images as they are
    (Hinton et al. 2015, section 3: the transfer set contains no translations).

    Args:
        experiments: one per student; they share data, architectures, optimiser and batch size.
        progress: called with the share of the work that is done.

    Attributes:
        teachers: a cohort of T.
        students: a cohort of K.
        teacher_of: the teacher of each student: int64 ``[K]``.
        seconds: by phase.
    """

    def __init__(
        self, experiments: Sequence[Experiment], progress: Progress = lambda _, __: None
    ) -> None:
        self.experiments = list(experiments)
        self.experiment = experiments[0]
        self.data = federated_data(self.experiment)
        self.seconds: dict[str, float] = {}
        self._progress = progress
        student_keys = Experiment.keys("distillation")  # no teacher depends on them
        kinds = [experiment.at_default(*student_keys) for experiment in experiments]
        self._teachers_experiments = list(dict.fromkeys(kinds))
        place = {kind: n for n, kind in enumerate(self._teachers_experiments)}
        self.teacher_of = torch.tensor([place[kind] for kind in kinds])
        self.teachers = self._cohort(self.experiment.teacher_of(0), self._teachers_experiments)
        self.students = self._cohort(self.experiment.student_of(0), self.experiments)

    def train_teachers(self) -> Fitted:
        """Train the teachers on hard labels."""
        experiments = self._teachers_experiments
        epochs = [experiment.local_epochs for experiment in experiments]
        batch_stream = self._batch_stream(experiments, {ce: 1.0}, augment=self.experiment.augment)
        return self._fit("teacher", self.teachers, experiments, batch_stream, epochs)

    def train_students(self) -> Fitted:
        """Distil the teachers into the students, each with its own α and τ."""
        experiments = self.experiments
        alpha = stacked_values(experiments, "alpha")
        terms = {kl_term(self.experiment.kl_reduction): alpha, ce: 1 - alpha}
        self.soft_labels = self._soft_labels()
        batch_stream = self._batch_stream(experiments, terms, self.soft_labels, self.teacher_of)
        epochs = [experiment.distill_epochs for experiment in experiments]
        return self._fit("students", self.students, experiments, batch_stream, epochs)

    def soft_label_entropies(self, at_tau: bool) -> list[float]:
        """Return the mean entropy in nats of each student's soft labels, at τ or at 1."""
        entropies = []
        for teacher, experiment in zip(self.teacher_of.tolist(), self.experiments, strict=True):
            tau = experiment.tau if at_tau else 1.0
            entropies.append(float(entropy(self.soft_labels[teacher] / tau).double().mean()))
        return entropies

    def training_accuracies(self, cohort: Cohort) -> list[float]:
        """Return each model's accuracy on the pooled images that it was trained on."""
        train = self.data.train
        assert train.labels is not None
        predicted, labels = cohort.classify(train).cpu(), train.labels.cpu()
        owners = self.experiments if cohort is self.students else self._teachers_experiments
        rows = [federated_data(experiment).pooled for experiment in owners]
        return [
            float(accuracy(each[chosen].unsqueeze(0), labels[chosen]))
            for each, chosen in zip(predicted, rows, strict=True)
        ]

    def shares_of_the_most_frequent_class(self) -> list[float]:
        """Return what a student gets right of its training images if it always names one class."""
        assert self.data.train.labels is not None
        labels = self.data.train.labels.cpu()
        owned = [labels[federated_data(experiment).pooled] for experiment in self.experiments]
        return [int(each.bincount().max()) / len(each) for each in owned]

    def _cohort(self, name: str, experiments: Sequence[Experiment]) -> Cohort:
        architectures = architectures_of(self.data)
        states = [architectures.initial_state(name, experiment.seed) for experiment in experiments]
        return architectures.cohort(self.experiment, name, stacked(states))

    def _soft_labels(self) -> Tensor:
        """Return each teacher's logits of its pooled images, ``[T, N, C]`` in the order of its rows."""
        rows = [federated_data(experiment).pooled for experiment in self._teachers_experiments]
        if all(torch.equal(rows[0], each) for each in rows):
            return self.teachers.predict(self.data.train, rows[0])
        whole = self.teachers.predict(self.data.train)
        return torch.stack([logits[each] for logits, each in zip(whole, rows, strict=True)])

    def _batch_stream(
        self,
        experiments: Sequence[Experiment],
        terms: Mapping[Term, float | Tensor],
        teacher_logits: Tensor | None = None,
        taught_by: Tensor | None = None,
        augment: Augment = "none",
    ) -> BatchStream:
        rows = [federated_data(experiment).pooled for experiment in experiments]
        return BatchStream(
            "pooled", self.data.train, rows, terms, teacher_logits, taught_by, augment=augment
        )

    def _fit(
        self,
        what: str,
        cohort: Cohort,
        experiments: Sequence[Experiment],
        batch_stream: BatchStream,
        epochs: Sequence[int],
    ) -> Fitted:
        started = monotonic()
        fitted = cohort.fit(
            [batch_stream],
            epochs=epochs,
            batch_size=self.experiment.batch_size,
            optimizer=OptimizerSettings.from_experiments(experiments),
            numbers={"tau": stacked_values(experiments, "tau")},
            streams=[(experiment.seed, "central", what) for experiment in experiments],
            progress=lambda done: self._progress(what, done),
        )
        self.seconds[what] = monotonic() - started
        return fitted


def accuracies(predicted: Tensor, images: Images) -> list[float]:
    """Return the share of images that each model got right, of classes ``[K, N]``."""
    assert images.labels is not None
    shares: list[float] = accuracy(predicted.cpu(), images.labels.cpu()).tolist()
    return shares
