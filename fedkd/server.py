"""The server's side of a federation that a strategy may look at and work on."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from fedkd.client import correct_by_class
from fedkd.cohort import Cohort, Side, State
from fedkd.experiment import Experiment
from fedkd.knowledge import Knowledge, SoftLabels, Weights, require_one
from fedkd.losses import Term, ce, kl_term
from fedkd.optimizers import OptimizerSettings
from fedkd.randomness import generator, permutation
from fedkd.world import World


@dataclass(frozen=True, eq=False)
class Replies:
    """The good replies of a round, in order of partition.

    Attributes:
        clients: partition ids.
        labels: their soft labels, stacked, or ``None`` if they were not asked for any.
        weights: their weights, or ``None``.
    """

    clients: list[int]
    labels: SoftLabels | None = None
    weights: Weights | None = None

    @property
    def knowledge(self) -> Knowledge | None:
        """The one kind that was uploaded."""
        return self.labels if self.labels is not None else self.weights


@dataclass
class Server:
    """What the server knows and remembers.

    Attributes:
        experiment: the run.
        world: the data; a strategy may use the public set and its labels, nothing private.
        round: the running round, from 1.
        state: a strategy's memory, tensors and scalars by name; kept only if the round is accepted.
        model: the server's own model (``server-model``), a cohort of one, or ``None``.
        trained: whether that model has been trained.
    """

    experiment: Experiment
    world: World = field(repr=False)
    round: int = 0
    state: dict[str, Tensor | float | int | str] = field(default_factory=dict)
    model: Cohort | None = field(init=False, repr=False)
    trained: bool = False

    def __post_init__(self) -> None:
        name = self.experiment.server_model
        self.model = None if name == "none" else self._cohort(name)

    @property
    def num_clients(self) -> int:
        """K, all clients of the federation."""
        return self.experiment.num_clients

    @property
    def num_public(self) -> int:
        """P, the size of the public set."""
        return len(self.world.public)

    @property
    def targets(self) -> Tensor | None:
        """Labels of the public set, int64 ``[P]``, where it has any."""
        labels = self.world.public.labels
        return None if labels is None else labels.cpu()

    def everything(self) -> Tensor:
        """Return all public samples, int64 ``[P]``."""
        return torch.arange(self.num_public)

    def draw(self) -> Tensor:
        """Return the public samples of this round, sorted: a pure function of (seed, round)."""
        count = self.experiment.public_per_round
        if count is None or count >= self.num_public:
            return self.everything()
        order = permutation(self.num_public, self.experiment.seed, "public draw", self.round)
        return order[:count].sort().values

    def generator(self, purpose: str) -> torch.Generator:
        """Return a generator for `purpose` in this round."""
        return generator(self.experiment.seed, "server", self.round, purpose)

    def fit(self, labels: SoftLabels) -> None:
        """Distil soft labels (K = 1) into the server's model, with hard labels where it has any."""
        assert self.model is not None
        require_one(labels)
        if not len(labels.samples):
            return
        self.trained = True
        experiment, public = self.experiment, self.world.public
        soft = kl_term(experiment.kl_reduction)
        terms: dict[Term, float | Tensor] = {soft: 1.0}
        if public.labels is not None:
            terms = {soft: experiment.alpha, ce: 1 - experiment.alpha}
        logits = labels.logits.to(public.device, public.dtype)
        self.model.fit(
            [Side("public", public, [labels.samples], terms, logits)],
            epochs=experiment.distill_epochs,
            batch_size=experiment.batch_size,
            optimizer=OptimizerSettings.of(experiment),
            numbers={"tau": experiment.tau},
            streams=[(experiment.seed, "server", self.round, "digest")],
        )

    def accuracy(self, weights: Weights | None = None) -> float | None:
        """Return test accuracy of the given weights (mean over architectures), or of the model."""
        if weights is not None:
            parts = [
                self._tested(self._cohort(name, {n: t[0] for n, t in part.tensors.items()}))
                for name, part in weights.by_model.items()
            ]
            return sum(parts) / len(parts)
        return self._tested(self.model) if self.model is not None and self.trained else None

    def _tested(self, cohort: Cohort) -> float:
        test = self.world.test
        right = correct_by_class(cohort.classify(test), test, self.world.num_classes)
        return float(right.correct.sum() / right.total.sum())

    def _cohort(self, name: str, state: State | None = None) -> Cohort:
        if state is None:
            state = self.world.initial_state(name, self.experiment.seed)
        device = self.world.train.device
        stack = {n: t.to(device).unsqueeze(0).clone() for n, t in state.items()}
        return self.world.cohort(self.experiment, name, stack)
