"""A trial of what clients sent: is a model, or anything that can be learnt, to be had from it?

Finite numbers can be absurd: weights of 1e20, a negative variance, class means whose squares overflow.
No bound tells these from numbers that are merely large, so they are tried: the server plays a client on
a few public images, with the model and the loss terms that clients use. What gives logits, losses or
gradients that are not finite has failed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from time import monotonic

import torch
from torch import Tensor

from fedkd.clients.instructions import Instruction
from fedkd.clients.run_phases import run_phases
from fedkd.clients.stack import Stack
from fedkd.clients.states import INITIAL, States
from fedkd.data.federated import FederatedData
from fedkd.errors import safe_logger
from fedkd.experiment import Experiment
from fedkd.knowledge import Knowledge, SoftLabels, Weights
from fedkd.losses import log_probabilities
from fedkd.phases import ClassifyByMeans, Fit, Load, Phase, Reset
from fedkd.randomness import permutation
from fedkd.training.architectures import architectures_of
from fedkd.training.parameters import State

_logger = safe_logger(__name__)

IMAGES = 32
"""Images of a trial, or one of each class if there are more classes."""

STEPS = 2
"""Steps of each fit of a trial."""

MODELS = 16
"""Uploads of weights that are tried at once: each is copied for that."""

MARGIN = 1e6
"""How many times as large the numbers of a trial may become before they overflow: clients have other
images, and take more steps."""

_LARGEST = torch.finfo(torch.float32).max

_TRIED = (Load, Reset, Fit, ClassifyByMeans)
"""Phases that a trial carries out: procedures need a client's own state, answers are not needed."""


class Trial:
    """Plays clients on a few public images.

    Args:
        experiment: the run.
        data: the data as the server sees it; nothing private is used.

    Attributes:
        seconds: that all trials took.
    """

    def __init__(self, experiment: Experiment, data: FederatedData) -> None:
        self._experiment = experiment.replace(
            batch_size=max(IMAGES, data.num_classes),
            profile=False,
        )
        self._one_by_one = self._experiment.replace(plan="loop")  # where vmap refuses a model
        self._real = data
        self.seconds = 0.0

    @property
    def _data(self) -> FederatedData:
        return _with_trial_images(self._real, self._experiment.batch_size, self._experiment.seed)

    def predicts(self, weights: Sequence[Weights]) -> list[bool]:
        """Return whether the models of clients (K = 1 each) have finite logits and losses."""
        passed = dict[int, bool]()
        with self._timed():
            for first in range(0, len(weights), MODELS):
                for name, part in Weights.stack(weights[first : first + MODELS]).by_model.items():
                    outcomes = self._finite_models(name, part.tensors).tolist()
                    passed |= dict(zip(part.clients.tolist(), outcomes, strict=True))
        return [
            all(passed[k] for part in each.by_model.values() for k in part.clients.tolist())
            for each in weights
        ]

    def teaches(
        self,
        received: Sequence[tuple[int, Knowledge]],
        phases: Sequence[Phase],
        steps: int = STEPS,
        margin: float = MARGIN,
    ) -> list[bool]:
        """Return which knowledge (K = 1) clients could learn from, all numbers being finite.

        A client begins with its initial models, loads what it is to load, and takes a few steps of
        each fit. For soft labels these are the rows with the largest numbers.

        Args:
            received: partition ids, which decide the architectures, and what is received.
            phases: of which those that load or train are carried out.
            steps: of each fit.
            margin: losses and norms must be finite even when so many times as large.
        """
        tried = [
            replace(phase, epochs=steps) if isinstance(phase, Fit) else phase
            for phase in phases
            if isinstance(phase, _TRIED)
        ]
        groups: dict[tuple[str, str, int], list[int]] = {}
        for place, (client, knowledge) in enumerate(received):
            student, teacher = (
                name_of(client)
                for name_of in (self._experiment.student_of, self._experiment.teacher_of)
            )
            rows = len(knowledge.samples) if isinstance(knowledge, SoftLabels) else 0
            groups.setdefault((student, teacher, rows), []).append(place)
        passed = [True] * len(received)
        with self._timed():
            for places in groups.values():
                outcomes = self._taught([received[place] for place in places], tried, margin)
                for place, outcome in zip(places, outcomes, strict=True):
                    passed[place] = outcome
        return passed

    @contextmanager
    def _timed(self) -> Iterator[None]:
        started = monotonic()
        yield
        self.seconds += monotonic() - started

    def _taught(
        self, received: Sequence[tuple[int, Knowledge]], phases: Sequence[Phase], margin: float
    ) -> list[bool]:
        """Return the outcomes of clients with the same architectures."""
        # By the clients' own plan first: `vmap` computes some layers otherwise, with other overflows.
        for experiment in (self._experiment, self._one_by_one):
            try:
                return self._run(experiment, received, phases, margin)
            except Exception:  # a user's model or term may raise anything, and will at the clients
                _logger.debug("knowledge cannot be tried", exc_info=True)
        return [True] * len(received)

    def _run(
        self,
        experiment: Experiment,
        received: Sequence[tuple[int, Knowledge]],
        phases: Sequence[Phase],
        margin: float,
    ) -> list[bool]:
        nothing = torch.empty(0, dtype=torch.int64)
        count = experiment.batch_size
        instructions = [
            Instruction(
                client, 1, INITIAL, tuple(phases), nothing, _largest(knowledge, count), 1, "none"
            )
            for client, knowledge in received
        ]
        clients = [client for client, _ in received]
        first, seed = clients[0], experiment.seed
        names = {"student": experiment.student_of(first), "teacher": experiment.teacher_of(first)}
        models: dict[str, State] = {
            role: architectures_of(self._data).initial_states(name, seed, len(clients))
            for role, name in names.items()
            if name != "none"
        }
        states = States(clients, models, [0] * len(clients))
        stack = Stack(
            [experiment] * len(clients),
            self._data,
            instructions,
            states,
            is_fresh=True,
            memories=[{} for _ in clients],
        )
        reports = run_phases(stack)
        trained = [
            self._finite_models(names[role], dict(cohort.params) | dict(cohort.buffers))
            for role, cohort in stack.cohorts.items()
        ]
        return [
            all(abs(value) <= _LARGEST / margin for value in report.metrics.values())
            and all(bool(outcomes[row]) for outcomes in trained)
            for row, report in enumerate(reports)
        ]

    def _finite_models(self, name: str, tensors: Mapping[str, Tensor]) -> Tensor:
        """Return which models have finite logits and cross entropy on the trial's images, ``[K]``."""
        images = self._data.train
        stack = {n: tensor.to(images.device) for n, tensor in tensors.items()}
        cohort = architectures_of(self._data).cohort(self._experiment, name, stack)
        # Finite logits may be so far apart that the logarithm of a probability is not.
        return log_probabilities(cohort.predict(images)).isfinite().flatten(1).all(1).cpu()


def pieces(knowledge: Knowledge) -> Iterator[Knowledge]:
    """Yield knowledge as single clients digest it: sets of soft labels one by one, where answered."""
    if not isinstance(knowledge, SoftLabels):
        yield knowledge
        return
    for k, answered in enumerate(knowledge.mask):
        values = knowledge.values[k : k + 1, answered]
        if values.numel():
            yield SoftLabels(values, knowledge.space, knowledge.samples[answered])


def _largest(knowledge: Knowledge, count: int) -> Knowledge:
    """Return soft labels for only the samples with the largest numbers, as one batch."""
    if not isinstance(knowledge, SoftLabels) or len(knowledge.samples) <= count:
        return knowledge
    size = knowledge.values.abs().amax((0, 2))
    return knowledge.keep(size.topk(count).indices.sort().values)


@lru_cache(maxsize=8)
def _with_trial_images(data: FederatedData, count: int, seed: int) -> FederatedData:
    """Return data in which all that a client holds are some public images, with labels of all classes."""
    rows = permutation(len(data.public), seed, "trial")
    rows = rows.repeat(-(-count // len(rows)))[:count].to(data.public.device)
    labels = torch.arange(count, device=data.public.device) % data.num_classes
    images = replace(data.public.keep(rows, labelled=False), labels=labels)
    shards = tuple(torch.arange(count) for _ in data.shards)
    return replace(data, train=images, shards=shards)
