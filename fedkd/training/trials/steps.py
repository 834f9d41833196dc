"""Two steps of a few clients: in plain PyTorch, in a cohort, and how far the two are apart."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedkd.data.images import Images
from fedkd.errors import FedkdError
from fedkd.losses import ce
from fedkd.randomness import draws, key
from fedkd.training.batches import Batches, BatchStream, Block
from fedkd.training.cohort import Cohort
from fedkd.training.needs import is_trainable
from fedkd.training.optimizers import OptimizerSettings
from fedkd.training.parameters import State, named_tensors
from fedkd.training.plans import Plan
from fedkd.training.trials.side_effects import SideEffects
from fedkd.training.vmap_modes import KeyedMode, no_other_draws

CLIENTS, BATCH, REST = 2, 4, 3
"""A full batch of 4 and a short one of 3, which a stack pads to 4."""

RATE = 0.01

_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}
"""Relative to the largest change of a tensor: rounding is far below, a wrong formula far above."""

_NOISE = {torch.float64: 1e-10, torch.float32: 1e-4}
"""Relative to the largest change of any tensor: less is rounding, as of a bias before a norm."""

_NUDGE = {torch.float64: 1e-13, torch.float32: 1e-4}
"""Relative change of the pixels that shows what a model makes of rounding, some hundred times that of a
product. A deep net that normalises over few images makes 10¹⁰ times of it."""


@dataclass(frozen=True)
class Result:
    """What two steps make of a client's model, and its outputs after them, ``[BATCH + REST, C]``."""

    state: State
    logits: Tensor


class Steps:
    """Two steps on a few real images, in one number format.

    Args:
        build: returns a new model with the same initial weights every time, in training mode.
        call: calls a module with images.
        images: real ones.
        dtype: of the steps.
    """

    def __init__(
        self,
        build: Callable[[], nn.Module],
        call: Callable[[nn.Module, Tensor], Tensor],
        images: Images,
        dtype: torch.dtype,
    ) -> None:
        self._build, self._call, self._dtype = build, call, dtype
        self._images = _few(images, dtype)
        self._rows = list(torch.arange(CLIENTS * (BATCH + REST)).split(BATCH + REST))
        self._start = copied(build())
        self._stream = BatchStream("private", self._images, self._rows, {ce: 1.0})

    def batch(self) -> Tensor:
        """Return the images of the first client, ``[BATCH + REST, c, h, w]``."""
        return self._images.batch(self._rows[0])

    def plain(
        self, k: int, *, nudged: bool = False, watched: bool = False
    ) -> tuple[nn.Module, Result]:
        """Return client k's module after two steps in plain PyTorch, and the result.

        Args:
            k: the client.
            nudged: whether the pixels are changed by some hundred times their rounding.
            watched: whether attributes and generators are compared with those before.

        Raises:
            FedkdError: the model draws what cannot be keyed, changes what it must not, or a loss is not
                finite.
        """
        module = self._build()
        effects = SideEffects(module) if watched else None
        self._train(module, k, nudged)
        if effects is not None:
            effects.check()
        state = copied(module)
        with torch.no_grad():
            images = self._images.batch(self._rows[k])
            logits = self._call(module.eval(), self._nudge(images) if nudged else images)
        return module, Result(state, logits)

    def _train(self, module: nn.Module, k: int, nudged: bool) -> None:
        trained = [p for p in module.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(trained, RATE) if trained else None
        index = torch.tensor([k], device=self._images.device)
        block = Block([k], index, [2], [_name(k)], BATCH, False, self._dtype)
        batches = Batches(self._stream, block)
        for tick in range(2):
            batch = batches.batch(tick, 1)
            images = self._nudge(batch["images"][0]) if nudged else batch["images"][0]
            with no_other_draws(watch=True), KeyedMode(batch["key"][0], None):
                logits = self._call(module, images)
            loss = F.cross_entropy(logits, batch["labels"][0])
            if not bool(loss.isfinite()):
                raise FedkdError("its loss on real images is not a finite number")
            if optimizer is not None:
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()

    def in_cohort(self, plan: Plan) -> list[Result]:
        """Return what two steps of a cohort give for each client."""
        cohort = Cohort.of(self._build(), [self._start] * CLIENTS, plan)
        if is_trainable(cohort.skeleton):
            cohort.fit(
                [self._stream],
                epochs=1,
                batch_size=BATCH,
                optimizer=OptimizerSettings("sgd", RATE),
                streams=[_name(k) for k in range(CLIENTS)],
            )
        return [
            Result(cohort.state(k), cohort.predict(self._images, self._rows[k])[k])
            for k in range(CLIENTS)
        ]

    def tolerated(self, plain: Result, nudged: Result) -> dict[str, float]:
        """Return by name up to what a tensor's difference may be rounding; ``""`` is the outputs'."""
        sizes = {n: _size(t) for n, t in self._changes(plain).items()}
        noise = _NOISE[self._dtype] * max(sizes.values(), default=0.0)
        relative = _TOLERANCE[self._dtype]
        tolerated = {
            n: relative * s + noise + 10 * _size(plain.state[n] - nudged.state[n])
            for n, s in sizes.items()
        }
        of_logits = relative * _size(plain.logits) + 10 * _size(plain.logits - nudged.logits)
        return {"": of_logits, **tolerated}

    def rounding(self, plain: Result, nudged: Result) -> float:
        """Return which share of all changes a nudge makes."""
        changes, others = self._changes(plain), self._changes(nudged)
        whole = sum(float(t.square().sum()) for t in changes.values())
        made = sum(float((t - others[n]).square().sum()) for n, t in changes.items())
        return math.sqrt(made / max(whole, 1e-30))

    def _changes(self, result: Result) -> State:
        """Return by how much two steps changed each tensor, but integers and complex numbers."""
        state = {n: t for n, t in result.state.items() if t.is_floating_point()}
        return {n: (t - self._start[n]).nan_to_num(0, 0, 0) for n, t in state.items()}

    def _nudge(self, images: Tensor) -> Tensor:
        signs = draws(torch.tensor(key("nudge")), images.numel()).reshape(images.shape) % 2 * 2 - 1
        return images * (1 + _NUDGE[self._dtype] * signs.to(images))


def difference(
    results: list[Result], plain: list[Result], tolerances: list[dict[str, float]]
) -> str:
    """Return what differs most, in words; empty if all differences are tolerated.

    Args:
        results: of each client.
        plain: likewise, in plain PyTorch.
        tolerances: of each client, see `Steps.tolerated`.
    """
    largest: dict[str, float] = {}
    for result, expected, tolerated in zip(results, plain, tolerances, strict=True):
        pairs = {"": (result.logits, expected.logits)}
        pairs |= {n: (result.state[n], t) for n, t in expected.state.items()}
        for name, (value, wanted) in pairs.items():
            error = (
                _size(value - wanted) / max(tolerated[name], 1e-30) if name in tolerated else 0.0
            )
            if name not in tolerated and not equal(value, wanted):
                error = torch.inf
            largest[name] = max(error, largest.get(name, 0.0))
    name = max(largest, key=lambda name: largest[name])
    if largest[name] <= 1:
        return ""
    return f"values of '{name}'" if name else "outputs"


def copied(module: nn.Module) -> State:
    """Return copies of a module's parameters and buffers."""
    return {n: t.detach().clone() for n, t in named_tensors(module).items()}


def equal(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are the same, where both are NaN as well."""
    return a.shape == b.shape and torch.equal(a.nan_to_num(), b.nan_to_num())


def _name(k: int) -> tuple[int | str, ...]:
    return (0, k, "trial")


def _few(images: Images, dtype: torch.dtype) -> Images:
    count = CLIENTS * (BATCH + REST)
    few = images.keep(torch.arange(count, device=images.device) % len(images))
    return replace(few, dtype=dtype)


def _size(tensor: Tensor) -> float:
    """Return the largest absolute value; infinite masks that stay as they are do not count."""
    return float(tensor.nan_to_num(0, 0, 0).abs().max()) if tensor.numel() else 0.0
