"""Try a user's model against plain PyTorch before a run.

Two clients take a step on a full batch and one on a short batch: stacked, one by one, and as ordinary
modules with an ordinary optimiser. A model that only the stack changes is run one by one; one that is
not the same one by one either is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedkd.data.images import Images
from fedkd.errors import FedkdError, one_line
from fedkd.losses import ce
from fedkd.randomness import key
from fedkd.training.batches import Batches, BatchStream, Block
from fedkd.training.cohort import IMAGES_AT_ONCE, Cohort
from fedkd.training.coupling import coupled_layer
from fedkd.training.needs import is_trainable
from fedkd.training.optimizers import OptimizerSettings
from fedkd.training.parameters import State, named_tensors
from fedkd.training.plans import Plan
from fedkd.training.side_effects import SideEffects
from fedkd.training.vmap_modes import KeyedMode, no_other_draws
from fedkd.user_code import error_with_location

CLIENTS, BATCH, REST = 2, 3, 2
"""A full batch of 3 and a short one of 2; stacked, both are padded to 4."""

RATE = 0.01

_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-2}
"""Relative to the largest change of a tensor: rounding is far below, a wrong formula far above."""

_NOISE = {torch.float64: 1e-10, torch.float32: 1e-4}
"""Relative to the largest change of any tensor: less is rounding, as of a bias before a norm."""


@dataclass(frozen=True)
class Verdict:
    """How a model may be run.

    Attributes:
        why_not_stacked: why its copies must be run one by one; empty if they may be stacked.
        remark: what else its user should know; empty if there is nothing.
    """

    why_not_stacked: str = ""
    remark: str = ""


def verdict_on(build: Callable[[], nn.Module], images: Images) -> Verdict:
    """Return how a model may be run, after trying it.

    Args:
        build: returns a new model, in training mode, on the device of the images.
        images: real ones.

    Raises:
        FedkdError: runs of this model would not be what plain PyTorch computes; the text says why.
    """
    with torch.random.fork_rng():
        try:
            return _Trial(build, images, torch.float64).verdict()
        except _NoFloat64:
            return _Trial(build, images, torch.float32).verdict()


class _NoFloat64(Exception):
    """The model does not run in float64."""


@dataclass(frozen=True)
class _Result:
    """What two steps make of a client's model, and its outputs after them, ``[BATCH + REST, C]``."""

    state: State
    logits: Tensor


class _Trial:
    """A trial in one number format."""

    def __init__(self, build: Callable[[], nn.Module], images: Images, dtype: torch.dtype) -> None:
        self._build, self._dtype = build, dtype
        self._images = _few(images, dtype)
        self._rows = list(torch.arange(CLIENTS * (BATCH + REST)).split(BATCH + REST))
        self._start = _copied(self._new())

    def verdict(self) -> Verdict:
        """Return how the model may be run."""
        self._check_initial_weights()
        remark = self._check_evaluation()
        plain = [self._plain(k) for k in range(CLIENTS)]
        name = self._difference(self._in_cohort(Plan(stacked=False)), plain)
        if name:
            raise FedkdError(
                f"after two steps its {name} differ from plain PyTorch: fedkd puts parameters and "
                "buffers into the model for each call, so read them from it and keep no other references"
            )
        in_training, in_evaluation = (self._coupled_layer(mode) for mode in (True, False))
        if in_evaluation:
            remark += (
                f"; in evaluation mode {in_evaluation} lets the images of a batch affect each other, of "
                f"which there are {IMAGES_AT_ONCE[False]}"
            )
        layer = in_training or in_evaluation
        why = f"{layer} lets the images of a batch affect each other" if layer else ""
        return Verdict(why or self._why_not_stacked(plain), remark.removeprefix("; "))

    def _coupled_layer(self, training: bool) -> str:
        module, images = self._new().train(training), self._images.batch(self._rows[0])
        with suppress(Exception):  # where the layout of a stack is refused, the stack is
            return coupled_layer(module, images)
        return ""

    def _new(self) -> nn.Module:
        """Return the model with the same initial weights every time."""
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(key("trial"))
            module = self._build()
        # Not `to`, which makes complex tensors real.
        return module.double() if self._dtype == torch.float64 else module.float()

    # --- The module alone -----------------------------------------------------------------------

    def _check_initial_weights(self) -> None:
        if not self._start:
            raise FedkdError("it has neither parameters nor buffers")
        for name, _ in self._new().named_parameters():
            if not bool(self._start[name].isfinite().all()):
                raise FedkdError(f"its initial weights '{name}' are not finite numbers")
        again = _copied(self._new())
        for name, tensor in self._start.items():
            if not _equal(tensor, again[name]):
                raise FedkdError(
                    f"two models built with one seed differ in '{name}': draw initial weights from "
                    "PyTorch, whose seed is set before"
                )

    @torch.no_grad()
    def _check_evaluation(self) -> str:
        """Refuse outputs in evaluation mode that are no function of the images; return a remark."""
        module, images = self._new().eval(), self._images.batch(self._rows[0])
        effects, before = SideEffects(module), torch.get_rng_state()
        outputs = [self._output(module, images) for _ in range(2)]
        effects.check()
        self._check_names(module)
        if not torch.equal(before, torch.get_rng_state()):
            raise FedkdError(
                "it draws random numbers in evaluation mode: pass training=self.training to a dropout of "
                "torch.nn.functional"
            )
        changed = [n for n, t in named_tensors(module).items() if not _equal(t, self._start[n])]
        if changed:
            return f"it changes its buffer '{changed[0]}' in evaluation mode, which is not kept"
        if not _equal(*outputs):
            raise FedkdError(
                "in evaluation mode it gives other outputs for the same images at a second call"
            )
        return ""

    def _check_names(self, module: nn.Module) -> None:
        late = sorted(named_tensors(module).keys() ^ self._start.keys())
        if late:
            raise FedkdError(
                f"a call adds or removes '{late[0]}': register parameters and buffers in __init__"
            )

    def _output(self, module: nn.Module, images: Tensor) -> Tensor:
        try:
            output: Tensor = module(images)
        except Exception as error:  # of the user's code
            if self._dtype == torch.float64:
                raise _NoFloat64 from error
            mode = "training" if module.training else "evaluation"
            where = f"in {mode} mode on {len(images)} images"
            raise FedkdError(f"it fails {where}: {error_with_location(error)}") from error
        return output

    def _plain(self, k: int) -> _Result:
        """Return what client k's two steps give in plain PyTorch, whose every call is watched."""
        module = self._new()
        effects = SideEffects(module)
        trained = [p for p in module.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(trained, RATE) if trained else None
        batches = self._batches(k)
        for tick in range(2):
            batch = batches.batch(tick, 1)
            images, labels, stream = batch["images"][0], batch["labels"][0], batch["key"][0]
            with no_other_draws(watch=True), KeyedMode(stream, None):
                logits = self._output(module, images)
            loss = F.cross_entropy(logits, labels)
            if not bool(loss.isfinite()):
                raise FedkdError("its loss on real images is not a finite number")
            if optimizer is not None:
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        effects.check()
        self._check_names(module)
        state = _copied(module)
        with torch.no_grad():
            return _Result(state, module.eval()(self._images.batch(self._rows[k])))

    def _batches(self, k: int) -> Batches:
        device = self._images.device
        block = Block(
            [k], torch.tensor([k], device=device), [2], [_stream(k)], BATCH, False, self._dtype
        )
        return Batches(self._private(), block)

    # --- The module in a cohort -----------------------------------------------------------------

    def _private(self) -> BatchStream:
        return BatchStream("private", self._images, self._rows, {ce: 1.0})

    def _in_cohort(self, plan: Plan) -> list[_Result]:
        """Return what a cohort's two steps give for each client."""
        cohort = Cohort.of(self._new(), [self._start] * CLIENTS, plan)
        if is_trainable(cohort.skeleton):
            cohort.fit(
                [self._private()],
                epochs=1,
                batch_size=BATCH,
                optimizer=OptimizerSettings("sgd", RATE),
                streams=[_stream(k) for k in range(CLIENTS)],
            )
        return [
            _Result(cohort.state(k), cohort.predict(self._images, self._rows[k])[k])
            for k in range(CLIENTS)
        ]

    def _why_not_stacked(self, plain: list[_Result]) -> str:
        """Return why the model must not be stacked; empty if it may be."""
        try:
            name = self._difference(self._in_cohort(Plan(stacked=True, block=CLIENTS)), plain)
        except Exception as error:  # of the user's code under vmap
            return f"vmap refuses it: {one_line(error)}"
        return f"stacked, its {name} differ from plain PyTorch" if name else ""

    def _difference(self, results: list[_Result], plain: list[_Result]) -> str:
        """Return what differs most beyond rounding, in words; empty if nothing does."""
        errors = [self._errors(*pair) for pair in zip(results, plain, strict=True)]
        largest = {name: max(each[name] for each in errors) for name in errors[0]}
        name = max(largest, key=lambda name: largest[name])
        if largest[name] <= 1:
            return ""
        return f"values of '{name}'" if name else "outputs"

    def _errors(self, result: _Result, plain: _Result) -> dict[str, float]:
        """Return the error of each tensor by name, of the outputs as ``""``: 1 is what is tolerated."""
        tolerance = _TOLERANCE[self._dtype]
        sizes = {n: _size(t - self._start[n]) for n, t in _floating(plain.state).items()}
        noise = _NOISE[self._dtype] * max(sizes.values(), default=0.0)
        errors = {"": _error(result.logits, plain.logits, tolerance * _size(plain.logits))}
        for name, tensor in plain.state.items():
            tolerated = tolerance * sizes.get(name, 0.0) + noise
            errors[name] = _error(result.state[name], tensor, tolerated)
        return errors


def _stream(k: int) -> tuple[int | str, ...]:
    return (0, k, "trial")


def _few(images: Images, dtype: torch.dtype) -> Images:
    count = CLIENTS * (BATCH + REST)
    few = images.keep(torch.arange(count, device=images.device) % len(images))
    return replace(few, dtype=dtype)


def _copied(module: nn.Module) -> State:
    return {n: t.detach().clone() for n, t in named_tensors(module).items()}


def _floating(state: State) -> State:
    return {n: t for n, t in state.items() if t.is_floating_point()}


def _size(tensor: Tensor) -> float:
    """Return the largest absolute value; infinite masks that stay as they are do not count."""
    return float(tensor.nan_to_num(0, 0, 0).abs().max()) if tensor.numel() else 0.0


def _error(value: Tensor, expected: Tensor, tolerated: float) -> float:
    """Return the largest difference in units of what is tolerated; of integers there is none."""
    if not value.is_floating_point():
        return 0.0 if _equal(value, expected) else torch.inf
    return _size(value - expected) / max(tolerated, 1e-30)


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a.nan_to_num(), b.nan_to_num())
