"""Optimisers over stacked parameters: K clients step at once, each with its own hyper-parameters.

The updates are those of ``torch.optim``, written elementwise over a leading client axis. The fused
kernel of Adam needs a third of the memory traffic, and is used where it is safe. It reads gradients in
memory order (wrong for the transposed strides that ``vmap`` may leave), so they are made contiguous.
It also rounds the last elements of a tensor, those that do not fill a vector, differently. So a stack
uses it only if each client's part fills whole vectors: otherwise the last client's results would depend
on its position.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.optim.adam import adam
from torch.optim.adamw import adamw

from fedkd.experiment import Experiment

BETA1, BETA2, EPS = 0.9, 0.999, 1e-8
"""Adam's defaults (Kingma and Ba 2015), which ``torch.optim`` uses too."""


@dataclass(frozen=True)
class OptimizerSettings:
    """An optimiser's name and hyper-parameters: numbers for all clients, or tensors ``[K]``."""

    name: Literal["adam", "adamw", "sgd"] = "adam"
    learning_rate: float | Tensor = 1e-3
    momentum: float | Tensor = 0.0
    weight_decay: float | Tensor = 0.0

    @classmethod
    def from_experiment(cls, experiment: Experiment) -> OptimizerSettings:
        """Return an experiment's settings, the same for all its clients."""
        return cls(
            experiment.optimizer,
            experiment.learning_rate,
            experiment.momentum,
            experiment.weight_decay,
        )

    @classmethod
    def from_experiments(cls, experiments: Sequence[Experiment]) -> OptimizerSettings:
        """Return the settings of models that belong to one experiment each.

        Args:
            experiments: K of them, with the same optimiser.
        """
        return cls(
            experiments[0].optimizer,
            stacked_values(experiments, "learning_rate"),
            stacked_values(experiments, "momentum"),
            stacked_values(experiments, "weight_decay"),
        )

    def rows(self, rows: Tensor) -> OptimizerSettings:
        """Return the settings of the clients `rows` (int64 ``[A]``)."""

        def pick(value: float | Tensor) -> float | Tensor:
            return value.to(rows.device)[rows] if isinstance(value, Tensor) else value

        return OptimizerSettings(
            self.name, pick(self.learning_rate), pick(self.momentum), pick(self.weight_decay)
        )


def stacked_values(experiments: Sequence[Experiment], key: str) -> float | Tensor:
    """Return one number if all experiments share it (which is faster), else float64 ``[K]``."""
    values = [getattr(experiment, key) for experiment in experiments]
    alike = len(set(values)) == 1
    return values[0] if alike else torch.tensor(values, dtype=torch.float64)


class StackedOptimizer:
    """Updates stacked parameters in place, the first clients of the stack at each step.

    Its state is fresh, as every phase starts with a fresh optimiser. All active clients have taken the
    same number of steps, since clients are sorted by their number of steps.

    Args:
        params: ``[K, ...]`` tensors, updated in place.
        settings: hyper-parameters; tensors are ``[K]``.
        alone: whether K is 1 because clients run one by one, each in tensors of its own.
    """

    def __init__(
        self, params: Sequence[Tensor], settings: OptimizerSettings, alone: bool = False
    ) -> None:
        self._settings = settings
        self._params = list(params)
        self._steps = 0
        per_client = isinstance(settings.learning_rate, Tensor) or isinstance(
            settings.weight_decay, Tensor
        )
        self._fused = {
            i for i, p in enumerate(params) if not per_client and (alone or _fills_vectors(p[0]))
        }
        # On the device from the beginning: copying a number there makes every step wait.
        self._rate = _column(settings.learning_rate, params[0])
        self._momentum = _column(settings.momentum, params[0])
        self._decay = _column(settings.weight_decay, params[0])
        self._shrink = _column(1 - settings.learning_rate * settings.weight_decay, params[0])
        self._has_decay = _any(settings.weight_decay)
        self._has_momentum = _any(settings.momentum)
        adaptive = settings.name != "sgd"
        keeps_first = adaptive or self._has_momentum
        self._first = [torch.zeros_like(p) for p in params] if keeps_first else []
        self._second = [torch.zeros_like(p) for p in params] if adaptive else []
        self._scratch = [torch.empty_like(p) for p in params] if adaptive else []
        self._fused &= set(range(len(params))) if adaptive else set()
        self._counts = {i: torch.zeros((), device=params[i].device) for i in self._fused}

    def step(self, grads: Sequence[Tensor | None], active: int) -> None:
        """Apply one step to the first `active` clients.

        Args:
            grads: ``[active, ...]`` for every parameter, any strides; not modified. As in
                ``torch.optim``, a parameter whose gradient is ``None`` is left alone.
            active: how many clients, counted from the first row, take this step.
        """
        self._steps += 1
        indices = [i for i, grad in enumerate(grads) if grad is not None]
        params = _rows(self._params, indices, active)
        # Contiguous, as they are read several times and vmap may leave them transposed.
        gradients = [grad.contiguous() for grad in grads if grad is not None]
        if self._settings.name == "sgd":
            self._sgd(indices, params, gradients)
            return
        for update, chosen in (
            (self._fused_adam, [n for n, i in enumerate(indices) if i in self._fused]),
            (self._adam, [n for n, i in enumerate(indices) if i not in self._fused]),
        ):
            if chosen:
                update(
                    [indices[n] for n in chosen],
                    [params[n] for n in chosen],
                    [gradients[n] for n in chosen],
                )

    def _fused_adam(self, indices: list[int], params: list[Tensor], grads: list[Tensor]) -> None:
        settings, active = self._settings, len(params[0])
        assert not isinstance(settings.learning_rate, Tensor)
        assert not isinstance(settings.weight_decay, Tensor)
        update = adamw if settings.name == "adamw" else adam
        update(
            params,
            grads,
            _rows(self._first, indices, active),
            _rows(self._second, indices, active),
            [],
            [self._counts[i] for i in indices],
            fused=True,
            amsgrad=False,
            beta1=BETA1,
            beta2=BETA2,
            lr=settings.learning_rate,
            weight_decay=settings.weight_decay,
            eps=EPS,
            maximize=False,
        )

    def _sgd(self, indices: list[int], params: list[Tensor], grads: list[Tensor]) -> None:
        if self._has_decay:
            grads = _decayed(grads, params, self._decay)
        if self._has_momentum:
            buffers = _rows(self._first, indices, len(params[0]))
            if self._steps == 1:
                torch._foreach_copy_(buffers, grads)
            else:
                torch._foreach_mul_(buffers, _factors(self._momentum, params))
                torch._foreach_add_(buffers, grads)
            grads = buffers
        torch._foreach_sub_(params, torch._foreach_mul(grads, _factors(self._rate, params)))

    def _adam(self, indices: list[int], params: list[Tensor], grads: list[Tensor]) -> None:
        settings, active = self._settings, len(params[0])
        if self._has_decay and settings.name == "adamw":
            torch._foreach_mul_(params, _factors(self._shrink, params))
        elif self._has_decay:
            grads = _decayed(grads, params, self._decay)
        first, second = _rows(self._first, indices, active), _rows(self._second, indices, active)
        root = _rows(self._scratch, indices, active)
        torch._foreach_lerp_(first, grads, 1 - BETA1)
        torch._foreach_mul_(second, BETA2)
        torch._foreach_addcmul_(second, grads, grads, 1 - BETA2)
        for source, target in zip(second, root, strict=True):
            torch.sqrt(source, out=target)
        # m̂ / (√v̂ + ε), with the corrections of both moments moved out of the passes over the tensors.
        correction = (1 - BETA2**self._steps) ** 0.5
        torch._foreach_add_(root, EPS * correction)
        scale = correction / (1 - BETA1**self._steps)
        if isinstance(settings.learning_rate, Tensor):
            update = torch._foreach_div(first, root)
            torch._foreach_mul_(update, _factors(self._rate * scale, params))
            torch._foreach_sub_(params, update)
        else:
            torch._foreach_addcdiv_(params, first, root, -settings.learning_rate * scale)


def _fills_vectors(param: Tensor) -> bool:
    """Whether a client's part of a stacked tensor is made of whole vectors (64 bytes, AVX-512)."""
    return param.numel() * param.element_size() % 64 == 0


def _rows(tensors: Sequence[Tensor], indices: Sequence[int], active: int) -> list[Tensor]:
    return [tensors[i][:active] for i in indices]


def _column(value: float | Tensor, like: Tensor) -> Tensor:
    """Return a hyper-parameter ``[K]`` in the type and on the device of a stacked tensor."""
    tensor = torch.as_tensor(value, dtype=like.dtype, device=like.device)
    return tensor if tensor.ndim else tensor.expand(len(like))


def _factors(column: Tensor, params: Sequence[Tensor]) -> list[Tensor]:
    """Return a hyper-parameter ``[K]`` in shapes that broadcast over each of `params`."""
    rows = column[: len(params[0])]
    return [rows.reshape(-1, *[1] * (p.ndim - 1)) for p in params]


def _decayed(grads: list[Tensor], params: list[Tensor], decay: Tensor) -> list[Tensor]:
    added = torch._foreach_mul(params, _factors(decay, params))
    torch._foreach_add_(added, grads)
    return list(added)


def _any(value: float | Tensor) -> bool:
    return bool(torch.as_tensor(value).any())
