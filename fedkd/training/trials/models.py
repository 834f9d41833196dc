"""Try a user's model against plain PyTorch before a run.

Two clients take a step on a full batch and one on a short batch: stacked, one by one, and as ordinary
modules with an ordinary optimiser. A model that only the stack changes is run one by one; one that is
not the same one by one either is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedkd.data.images import Images
from fedkd.errors import FedkdError, one_line
from fedkd.randomness import key
from fedkd.training.cohort import IMAGES_AT_ONCE
from fedkd.training.parameters import named_tensors
from fedkd.training.plans import Plan, convolves, largest_block
from fedkd.training.trials.coupling import coupled_layer
from fedkd.training.trials.side_effects import SideEffects
from fedkd.training.trials.steps import CLIENTS, Result, Steps, copied, difference, equal
from fedkd.user_code import error_with_location

_DECISIVE = 0.005
"""If rounding makes more than this share of a float32 step, float64 tells faults from it."""


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
        # In float64 convolutions take many times as long: it is asked if float32 gives no clear yes.
        single = _Trial(build, images, torch.float32)
        found: Verdict | FedkdError
        try:
            found = single.verdict()
        except FedkdError as error:
            found = error
        if found == Verdict() and single.rounding < _DECISIVE:
            return found
        try:
            return _Trial(build, images, torch.float64).verdict()
        except _NoFloat64:
            if isinstance(found, FedkdError):
                raise found from None
            return found


class _NoFloat64(Exception):
    """The model does not run in float64."""


class _Trial:
    """A trial in one number format.

    Attributes:
        rounding: which share of the steps rounding may make.
    """

    def __init__(self, build: Callable[[], nn.Module], images: Images, dtype: torch.dtype) -> None:
        self._build, self._dtype = build, dtype
        self._untouched = self._built()
        self._start = copied(self._untouched)
        self._steps = Steps(self._new, self._output, images, dtype)
        self.rounding = 0.0

    def verdict(self) -> Verdict:
        """Return how the model may be run.

        Raises:
            FedkdError: see `verdict_on`.
        """
        self._check_initial_weights()
        remark = self._check_evaluation()
        plain = self._plain()
        nudged = [self._steps.plain(k, nudged=True)[1] for k in range(CLIENTS)]
        self.rounding = max(map(self._steps.rounding, plain, nudged))
        tolerances = list(map(self._steps.tolerated, plain, nudged))
        name = difference(self._steps.in_cohort(Plan(stacked=False)), plain, tolerances)
        if name:
            raise FedkdError(
                f"after two steps its {name} differ from plain PyTorch: fedkd puts parameters and "
                "buffers into the model for each call, so read them from it and keep no other references"
            )
        layers = [self._coupled_layer(training) for training in (True, False)]
        if layers[1]:
            many = f"of which there are {IMAGES_AT_ONCE[False]}"
            remark += (
                f"; {layers[1]} lets the images of a batch affect each other in tests too, {many}"
            )
        layer = layers[0] or layers[1]
        why = f"{layer} lets the images of a batch affect each other" if layer else ""
        why = why or self._why_not_stacked(plain, tolerances)
        return Verdict(why, remark.removeprefix("; "))

    def _built(self) -> nn.Module:
        """Return the model, built with the same seed every time."""
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(key("trial"))
            module = self._build()
        # Not `to`, which makes complex tensors real.
        return module.double() if self._dtype == torch.float64 else module.float()

    def _new(self) -> nn.Module:
        """Return a copy of the model as it was built, which takes less time than drawing weights."""
        try:
            return deepcopy(self._untouched)
        except Exception:  # some of the user's attributes cannot be copied
            return self._built()

    def _output(self, module: nn.Module, images: Tensor) -> Tensor:
        where = f"in {'training' if module.training else 'evaluation'} mode on {len(images)} images"
        try:
            output: object = module(images)
        except Exception as error:  # of the user's code
            if self._dtype == torch.float64:
                raise _NoFloat64 from error
            raise FedkdError(f"it fails {where}: {error_with_location(error)}") from error
        if (
            not isinstance(output, Tensor)
            or output.shape[:1] != images.shape[:1]
            or output.ndim != 2
        ):
            what = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise FedkdError(f"it returns {what} {where}: must be logits [B, C]")
        return output

    # --- The module alone -----------------------------------------------------------------------

    def _check_initial_weights(self) -> None:
        if not self._start:
            raise FedkdError("it has neither parameters nor buffers")
        for name, _ in self._untouched.named_parameters():
            if not bool(self._start[name].isfinite().all()):
                raise FedkdError(f"its initial weights '{name}' are not finite numbers")
        again = copied(self._built())
        for name, tensor in self._start.items():
            if not equal(tensor, again[name]):
                raise FedkdError(
                    f"two models built with one seed differ in '{name}': draw initial weights from "
                    "PyTorch, whose seed is set before"
                )

    @torch.no_grad()
    def _check_evaluation(self) -> str:
        """Refuse outputs in evaluation mode that are no function of the images; return a remark."""
        module, images = self._new().eval(), self._steps.batch()
        effects, before = SideEffects(module), torch.get_rng_state()
        outputs = [self._output(module, images) for _ in range(2)]
        effects.check()
        self._check_names(module)
        if not torch.equal(before, torch.get_rng_state()):
            raise FedkdError(
                "it draws random numbers in evaluation mode: pass training=self.training to a dropout of "
                "torch.nn.functional"
            )
        changed = [n for n, t in named_tensors(module).items() if not equal(t, self._start[n])]
        if changed:
            return f"it changes its buffer '{changed[0]}' in evaluation mode, which is not kept"
        if not equal(*outputs):
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

    def _plain(self) -> list[Result]:
        """Return what plain PyTorch gives for each client; the calls of the first are watched."""
        results = []
        for k in range(CLIENTS):
            module, result = self._steps.plain(k, watched=k == 0)
            self._check_names(module)
            results.append(result)
        return results

    # --- The module in a stack ------------------------------------------------------------------

    def _coupled_layer(self, training: bool) -> str:
        with suppress(Exception):  # where the layout of a stack is refused, so is the stack
            return coupled_layer(self._new().train(training), self._steps.batch())
        return ""

    def _why_not_stacked(self, plain: list[Result], tolerances: list[dict[str, float]]) -> str:
        """Return why the model must not be stacked; empty if it may be."""
        module = self._new()
        on_cpu = self._steps.batch().device.type == "cpu"
        if on_cpu and convolves(module) and largest_block(module) == 1:
            return "a stack of models of its size gains nothing on a CPU"
        try:
            results = self._steps.in_cohort(Plan(stacked=True, block=CLIENTS))
            name = difference(results, plain, tolerances)
        except Exception as error:  # of the user's code under vmap
            return f"vmap refuses it: {one_line(error)}"
        return f"stacked, its {name} differ from plain PyTorch" if name else ""
