"""Architectures of an experiment, built for its images: plans, skeletons and initial weights.

The weights depend on a seed and a name alone, so every process starts with the same ones.
"""

from __future__ import annotations

from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from fedkd.code_fingerprint import code_fingerprints
from fedkd.data.federated import FederatedData
from fedkd.data.images import Images
from fedkd.errors import safe_logger
from fedkd.experiment import Experiment
from fedkd.training import models
from fedkd.training.cohort import Cohort
from fedkd.training.parameters import State, initial_state
from fedkd.training.plans import Plan, plan_from_key
from fedkd.training.trials.models import Verdict, verdict_on
from fedkd.user_code import find_function

_logger = safe_logger(__name__)

_VERDICTS: dict[tuple[object, ...], Verdict] = {}
"""On users' models, by what they are known by: one is tried once in a process."""


class Architectures:
    """Models for images of one shape and one number of classes, on one device.

    Plans, skeletons and initial weights are made once and kept.
    """

    def __init__(
        self,
        input_shape: tuple[int, int, int],
        num_classes: int,
        device: torch.device,
        example: Tensor,
    ) -> None:
        """Store what models are built for; each is built at its first use.

        Args:
            input_shape: ``(c, h, w)``.
            num_classes: C.
            device: of the models.
            example: two normalised images, ``[2, c, h, w]``, on which plans are tried.
        """
        self._input_shape = input_shape
        self._num_classes = num_classes
        self._device = device
        self._example = example
        self._plans: dict[tuple[str, str], Plan] = {}
        self._skeletons: dict[str, nn.Module] = {}
        self._initial: dict[tuple[str, int], State] = {}
        self._why_not_stacked: dict[str, str] = {}

    def try_model(self, name: str, images: Images) -> None:
        """Build a user's model from its code as it is now, and try it (`fedkd.training.trials`).

        Args:
            name: ``module:function`` or ``file.py:function``.
            images: real ones.

        Raises:
            FedkdError: it cannot be built, or runs of it would not be what plain PyTorch computes.
        """
        self._skeletons.pop(name, None)
        self._plans = {key: plan for key, plan in self._plans.items() if key[0] != name}
        self._initial = {key: state for key, state in self._initial.items() if key[0] != name}
        known_by = code_fingerprints([find_function(name, "model")])
        key = (name, *known_by.items(), self._input_shape, self._num_classes, str(self._device))
        if key not in _VERDICTS:
            verdict = _VERDICTS[key] = verdict_on(lambda: self.model(name), images)
            if verdict.why_not_stacked:
                _logger.warning("%s is run one by one: %s", name, verdict.why_not_stacked)
            if verdict.remark:
                _logger.warning("%s: %s", name, verdict.remark)
        self._why_not_stacked[name] = _VERDICTS[key].why_not_stacked

    def why_not_stacked(self, name: str) -> str:
        """Return why models must be run one by one; empty if they may be stacked, or were not tried."""
        return self._why_not_stacked.get(name, "")

    def plan(self, name: str, key: str) -> Plan:
        """Return how models of an architecture are run under a ``plan`` key; worked out once."""
        if (name, key) not in self._plans:
            may_stack = not self.why_not_stacked(name)
            model = self.model(name)
            self._plans[name, key] = plan_from_key(key, name, model, self._example, may_stack)
        return self._plans[name, key]

    def model(self, name: str) -> nn.Module:
        """Return a new model of an architecture, on the device."""
        return self._built(name).to(self._device)

    def skeleton(self, name: str) -> nn.Module:
        """Return the model of an architecture whose structure alone is used; built once."""
        if name not in self._skeletons:
            self._skeletons[name] = self.model(name)
        return self._skeletons[name]

    def cohort(self, experiment: Experiment, name: str, stack: State) -> Cohort:
        """Return a cohort that trains the tensors of `stack`, ``[K, ...]`` by name, in place."""
        plan = self.plan(name, experiment.plan)
        return Cohort.over(self.skeleton(name), stack, plan, experiment.precision)

    def initial_state(self, name: str, seed: int) -> State:
        """Return an architecture's initial weights, the same for every client, method and engine.

        Made once; do not write to it.
        """
        if (name, seed) not in self._initial:
            state = initial_state(lambda: self._built(name), seed, "initial", name)
            self._initial[name, seed] = {n: t.to(self._device) for n, t in state.items()}
        return self._initial[name, seed]

    def initial_states(self, name: str, seed: int, count: int) -> State:
        """Return copies of the initial weights for `count` clients, ``[count, ...]`` by name."""
        state = self.initial_state(name, seed)
        return {n: t.expand(count, *t.shape).clone() for n, t in state.items()}

    def _built(self, name: str) -> nn.Module:
        return models.build(name, self._input_shape, self._num_classes)


_architectures: WeakKeyDictionary[FederatedData, Architectures] = WeakKeyDictionary()


def architectures_of(data: FederatedData) -> Architectures:
    """Return the architectures for these images, the same object as long as `data` lives."""
    architectures = _architectures.get(data)
    if architectures is None:
        train = data.train
        example = train.batch(torch.arange(2, device=train.device))
        built = Architectures(data.input_shape, data.num_classes, train.device, example)
        architectures = _architectures.setdefault(data, built)
    return architectures
