"""Optimisers over stacked parameters: K clients step at once, each with its own hyper-parameters.

``torch.optim`` is the oracle: the same updates, written elementwise over a leading client axis. The
fused kernels of PyTorch are not used, as they read gradients in memory order (wrong for the
transposed strides that ``vmap`` leaves) and round the tail of a tensor differently, which would make
a client's numbers depend on its neighbours.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fedkd.experiment import Experiment

BETA1, BETA2, EPS = 0.9, 0.999, 1e-8
"""Adam's defaults (Kingma and Ba 2015), which ``torch.optim`` uses too."""


@dataclass(frozen=True)
class OptimizerSettings:
    """An optimiser by name with hyper-parameters per client: numbers, or tensors ``[K]``."""

    name: Literal["adam", "adamw", "sgd"] = "adam"
    learning_rate: float | Tensor = 1e-3
    momentum: float | Tensor = 0.0
    weight_decay: float | Tensor = 0.0

    @classmethod
    def of(cls, experiment: Experiment) -> OptimizerSettings:
        """Return the settings that an experiment names, the same for all its clients."""
        return cls(
            experiment.optimizer,
            experiment.learning_rate,
            experiment.momentum,
            experiment.weight_decay,
        )

    def rows(self, rows: Tensor) -> OptimizerSettings:
        """Return the settings of the clients `rows` (int64 ``[A]``)."""

        def pick(value: float | Tensor) -> float | Tensor:
            return value.to(rows.device)[rows] if isinstance(value, Tensor) else value

        return OptimizerSettings(
            self.name, pick(self.learning_rate), pick(self.momentum), pick(self.weight_decay)
        )


class StackedOptimizer:
    """Updates stacked parameters in place, the first `a` clients at a time.

    Fresh state at construction, as every phase starts with a fresh optimiser. All active clients
    have taken the same number of steps, since clients are ordered by the steps they still have.

    Args:
        params: ``[K, ...]`` tensors, updated in place.
        settings: hyper-parameters; tensors are ``[K]``.
    """

    def __init__(self, params: Sequence[Tensor], settings: OptimizerSettings) -> None:
        self._params = params
        self._learning_rate = [_per_client(settings.learning_rate, p) for p in params]
        self._decay = [_per_client(settings.weight_decay, p) for p in params]
        self._momentum = [_per_client(settings.momentum, p) for p in params]
        self._has_decay = _any(settings.weight_decay)
        self._has_momentum = _any(settings.momentum)
        self._steps = 0
        self._first = [torch.zeros_like(p) for p in params] if self._keeps_first(settings) else []
        adaptive = settings.name != "sgd"
        self._second = [torch.zeros_like(p) for p in params] if adaptive else []
        self._scratch = [torch.empty_like(p) for p in params] if adaptive else []
        updates: dict[str, Callable[[int, Tensor, Tensor], None]] = {
            "adam": self._adam,
            "adamw": self._adamw,
            "sgd": self._sgd,
        }
        self._update = updates[settings.name]

    def _keeps_first(self, settings: OptimizerSettings) -> bool:
        return settings.name != "sgd" or self._has_momentum

    def step(self, grads: Sequence[Tensor | None], active: int) -> None:
        """Apply one step to the first `active` clients.

        Args:
            grads: ``[active, ...]`` for every parameter, any strides; not modified. As in
                ``torch.optim``, a parameter whose gradient is ``None`` is left alone.
            active: how many clients, counted from the first row, take this step.
        """
        self._steps += 1
        for i, (param, grad) in enumerate(zip(self._params, grads, strict=True)):
            if grad is not None:
                self._update(i, param[:active], grad)

    def _sgd(self, i: int, param: Tensor, grad: Tensor) -> None:
        active = len(param)
        if self._has_decay:
            grad = grad + self._decay[i][:active] * param
        if self._has_momentum:
            buffer = self._first[i][:active]
            if self._steps == 1:
                buffer.copy_(grad)
            else:
                buffer.mul_(self._momentum[i][:active]).add_(grad)
            grad = buffer
        param.sub_(self._learning_rate[i][:active] * grad)

    def _adam(self, i: int, param: Tensor, grad: Tensor) -> None:
        if self._has_decay:
            grad = grad + self._decay[i][: len(param)] * param
        self._adam_update(i, param, grad)

    def _adamw(self, i: int, param: Tensor, grad: Tensor) -> None:
        if self._has_decay:
            active = len(param)
            param.mul_(1 - self._learning_rate[i][:active] * self._decay[i][:active])
        self._adam_update(i, param, grad)

    def _adam_update(self, i: int, param: Tensor, grad: Tensor) -> None:
        active = len(param)
        grad = (
            grad.contiguous()
        )  # read twice below; vmap leaves the gradients of weights transposed
        first, second = self._first[i][:active], self._second[i][:active]
        scratch = self._scratch[i][:active]
        first.lerp_(grad, 1 - BETA1)
        second.mul_(BETA2).addcmul_(grad, grad, value=1 - BETA2)
        torch.sqrt(second, out=scratch)
        scratch.div_((1 - BETA2**self._steps) ** 0.5).add_(EPS)
        torch.div(first, scratch, out=scratch)
        scratch.mul_(self._learning_rate[i][:active] / (1 - BETA1**self._steps))
        param.sub_(scratch)


def _per_client(value: float | Tensor, param: Tensor) -> Tensor:
    """Shape a hyper-parameter ``[K]`` (or a number) as ``[K, 1, ...]`` to broadcast over `param`."""
    tensor = torch.as_tensor(value, dtype=param.dtype, device=param.device)
    if tensor.ndim == 0:
        tensor = tensor.expand(len(param))
    return tensor.reshape(len(param), *[1] * (param.ndim - 1))


def _any(value: float | Tensor) -> bool:
    return bool(torch.as_tensor(value).any())
