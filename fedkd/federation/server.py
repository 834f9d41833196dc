"""The server as a strategy sees it: the replies of a round, its memory and its model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from fedkd.data.federated import FederatedData
from fedkd.errors import FedkdError, Setting
from fedkd.experiment import Experiment
from fedkd.knowledge import ClassMeans, Knowledge, SoftLabels, Weights, require_one
from fedkd.losses import Term
from fedkd.phases import Fit, experiment_term
from fedkd.randomness import generator, permutation
from fedkd.training.accuracy import accuracy
from fedkd.training.architectures import architectures_of
from fedkd.training.batches import BatchStream
from fedkd.training.cohort import Cohort
from fedkd.training.optimizers import OptimizerSettings
from fedkd.training.terms import Terms, public_stream, resolved_terms


@dataclass(frozen=True, eq=False)
class Replies:
    """The good replies of a round, in order of partition.

    Attributes:
        clients: partition ids.
        labels: their soft labels, stacked, or ``None`` if none were asked for; without samples that no
            client answered.
        class_means: their class means, or ``None``.
        weights: their weights, or ``None``.
    """

    clients: list[int]
    labels: SoftLabels | None = None
    class_means: ClassMeans | None = None
    weights: Weights | None = None

    def __post_init__(self) -> None:
        if self.labels is None:
            return
        answered_N = self.labels.mask.any(0)
        if not bool(answered_N.all()):
            object.__setattr__(self, "labels", self.labels.keep(answered_N))

    @property
    def knowledge(self) -> Knowledge | None:
        """The kind that was uploaded, or ``None``."""
        return self.labels or self.class_means or self.weights


@dataclass
class Server:
    """What the server has: the data, its memory and its model.

    Attributes:
        experiment: the run.
        data: the data; a strategy may use the public set and its labels, nothing private.
        round: the current round, from 1.
        state: a strategy's memory, tensors and scalars by name; kept only if the round is accepted.
        model: the server's own model (``server-model``), a cohort of one, or ``None``.
        trained: whether that model has been trained.
    """

    experiment: Experiment
    data: FederatedData = field(repr=False)
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
        return len(self.data.public)

    @property
    def num_classes(self) -> int:
        """C."""
        return self.data.num_classes

    @property
    def targets(self) -> Tensor | None:
        """Labels of the public set, int64 ``[P]``, or ``None`` if it has none."""
        labels = self.data.public.labels
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

    def fit(
        self,
        phase: Fit,
        labels: SoftLabels | None = None,
        samples: Tensor | None = None,
        weights: Weights | None = None,
    ) -> Weights | None:
        """Train the server's model on the public set, or models with the weights that are passed.

        Args:
            phase: has the public terms; on an unlabelled public set those that need labels are left out.
            labels: soft labels to digest, K = 1.
            samples: int64 ``[N]``, public samples for a fit on hard labels alone.
            weights: K = 1 of each architecture: these are trained instead of the server's model.

        Returns:
            The new weights if weights were passed, else ``None``. Without samples nothing is trained.

        Raises:
            FedkdError: soft labels of several clients, terms without what they need, or no model.
        """
        if labels is not None:
            require_one(labels)
        elif samples is None:
            raise FedkdError("server.fit takes soft labels to digest, or samples with hard labels")
        batch_stream = self._public_stream(phase, labels, samples)
        if weights is None:
            if self.model is None:
                raise FedkdError(
                    Setting("server-model", "none"), ": there is no model to train; name one"
                )
            self._train(self.model, phase, batch_stream)
            self.trained = self.trained or bool(len(batch_stream.rows[0]))
            return None
        parts = {}
        for name, part in weights.by_model.items():
            cohort = self._cohort(name, part.tensors)
            self._train(cohort, phase, batch_stream)
            tensors = {n: t.cpu() for n, t in {**cohort.params, **cohort.buffers}.items()}
            parts[name] = replace(part, tensors=tensors)
        return Weights(parts)

    def predict(self, samples: Tensor, weights: Weights | None = None) -> SoftLabels:
        """Return logits for public samples, on the CPU.

        Args:
            samples: int64 ``[N]``.
            weights: of any number of clients: the logits of each, in order of partition, instead of
                those of the server's model (K = 1).

        Raises:
            FedkdError: there is no model.
        """
        public = self.data.public
        if weights is None:
            if self.model is None:
                raise FedkdError(
                    Setting("server-model", "none"), ": there is no model to predict with; name one"
                )
            return SoftLabels(self.model.predict(public, samples).cpu(), "logits", samples)
        parts = weights.by_model.items()
        values = torch.cat(
            [
                self._cohort(name, part.tensors).predict(public, samples).cpu()
                for name, part in parts
            ]
        )
        clients = torch.cat([part.clients for _, part in parts])
        examples = torch.cat([part.num_examples for _, part in parts])
        order = clients.argsort()
        return SoftLabels(values[order], "logits", samples, clients[order], examples[order])

    def _public_stream(
        self, phase: Fit, labels: SoftLabels | None, samples: Tensor | None
    ) -> BatchStream:
        terms = self._terms(phase, labels)
        if labels is not None:
            return public_stream(self.data.public, terms, [labels])
        assert samples is not None
        return BatchStream("public", self.data.public, [samples], terms)

    def _terms(self, phase: Fit, labels: SoftLabels | None) -> Terms:
        """Return a fit's public terms resolved, without those on hard labels if there are none."""
        experiment = self.experiment
        has_labels = self.data.public.labels is not None
        for name in phase.public:
            _check_needs(name, experiment_term(name, experiment), labels)
        # Without hard labels the soft part is all of the loss.
        alpha = experiment.alpha if has_labels else 1.0
        terms = resolved_terms(
            phase.public, alpha, lambda term: term.needs is not None or has_labels, experiment
        )
        if not terms:
            raise FedkdError(f"the fit '{phase.name}' has no term for an unlabelled public set")
        return terms

    def _train(self, model: Cohort, phase: Fit, batch_stream: BatchStream) -> None:
        if not len(batch_stream.rows[0]):
            return
        experiment = self.experiment
        model.fit(
            [batch_stream],
            epochs=experiment.distill_epochs if phase.epochs is None else phase.epochs,
            batch_size=experiment.batch_size,
            optimizer=OptimizerSettings.from_experiment(experiment),
            numbers={"tau": experiment.tau, **phase.numbers},
            streams=[(experiment.seed, "server", self.round, phase.name)],
        )

    def accuracy(self, weights: Weights | None = None) -> float | None:
        """Return test accuracy of `weights` (mean over architectures), or of the trained model."""
        if weights is not None:
            parts = [
                self._tested(self._cohort(name, part.tensors))
                for name, part in weights.by_model.items()
            ]
            return sum(parts) / len(parts)
        return self._tested(self.model) if self.model is not None and self.trained else None

    def _tested(self, cohort: Cohort) -> float:
        test = self.data.test
        assert test.labels is not None
        return float(accuracy(cohort.classify(test).cpu(), test.labels.cpu()))

    def _cohort(self, name: str, stack: Mapping[str, Tensor] | None = None) -> Cohort:
        """Return a cohort of copies of a stack ``[K, ...]``, or of one model with initial weights."""
        if stack is None:
            stack = architectures_of(self.data).initial_states(name, self.experiment.seed, 1)
        device = self.data.train.device
        copies = {n: t.to(device, copy=True) for n, t in stack.items()}
        return architectures_of(self.data).cohort(self.experiment, name, copies)


def _check_needs(name: str, term: Term, labels: SoftLabels | None) -> None:
    """Refuse a term that needs what the server has not got."""
    if term.needs == "class-means":
        raise FedkdError(f"{name} needs class means, which public samples do not have")
    if term.needs is not None and labels is None:
        raise FedkdError(f"{name} needs soft labels, and server.fit got none")
