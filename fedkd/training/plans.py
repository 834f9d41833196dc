"""Plans: how the models of a cohort are run; results differ only within floating-point tolerance."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from fedkd.errors import one_line, safe_logger

_logger = safe_logger(__name__)

_TEXT = re.compile(r"(?:loop|stacked(?:-(?P<block>[1-9]\d*))?)(?:x(?P<lanes>[1-9]\d*))?")


@dataclass(frozen=True)
class Plan:
    """How the models of a cohort are run, written ``loop``, ``stacked-50`` or ``stacked-50x2``.

    Attributes:
        stacked: whether through ``vmap``, K = 1 included (so that a client's bits do not depend on
            K); otherwise one by one.
        block: models stepped at once; 1 unless stacked.
        lanes: blocks run at the same time, each with its share of the CPU's threads.
    """

    stacked: bool
    block: int = 1
    lanes: int = 1

    def __post_init__(self) -> None:
        if self.block != 1 and not self.stacked:
            raise ValueError(f"block = {self.block}: models that run one by one make blocks of 1")

    def __str__(self) -> str:
        name = f"stacked-{self.block}" if self.stacked else "loop"
        return name if self.lanes == 1 else f"{name}x{self.lanes}"


def default_plan(model: nn.Module, example: Tensor, may_stack: bool = True) -> Plan:
    """Return the plan that needs no measurement.

    Stacking turns convolutions into grouped ones, which are slower on a CPU; small dense nets gain
    everywhere. Blocks are bounded because temporaries that outgrow the heap cause page faults.

    Args:
        model: on the device.
        example: two images, to try whether the model runs under ``vmap``.
        may_stack: whether its numbers are right then.
    """
    on_cpu = example.device.type == "cpu"
    if not may_stack or (convolves(model) and on_cpu) or not _maps(model, example):
        return Plan(stacked=False)
    return Plan(stacked=True, block=largest_block(model))


def convolves(model: nn.Module) -> bool:
    """Whether a model has convolutions."""
    return any(isinstance(m, nn.Conv1d | nn.Conv2d | nn.Conv3d) for m in model.modules())


def largest_block(model: nn.Module) -> int:
    """Return the largest number of models of this size to step at once."""
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    on_cpu = all(p.device.type == "cpu" for p in model.parameters())
    most, budget = (100, 8 << 20) if on_cpu else (1000, 4 << 30)
    return max(1, min(most, budget // max(size, 1)))


def plan_from_key(
    key: str, architecture: str, model: nn.Module, example: Tensor, may_stack: bool = True
) -> Plan:
    """Return the plan of an architecture under an experiment's ``plan`` key.

    Args:
        key: ``"auto"``, one plan for all, or ``architecture=plan`` pairs, separated by commas; other
            architectures run by their `default_plan`.
        architecture: a model's name.
        model: see `default_plan`.
        example: likewise.
        may_stack: likewise.
    """
    for entry in key.split(","):
        name, _, text = entry.strip().rpartition("=")
        match = _TEXT.fullmatch(text)
        if name in ("", architecture) and match:
            plan = Plan(text.startswith("stacked"), lanes=int(match["lanes"] or 1))
            block = int(match["block"] or largest_block(model))
            return replace(plan, block=block) if plan.stacked else plan
    return default_plan(model, example, may_stack)


def without(key: str, architecture: str) -> str:
    """Return a ``plan`` key without the pairs of an architecture."""
    entries = [e.strip() for e in key.split(",")]
    return ", ".join(e for e in entries if e.rpartition("=")[0] != architecture) or "auto"


def _maps(model: nn.Module, example: Tensor) -> bool:
    """Whether two copies of the model run under ``vmap``; if not, the reason is logged."""
    states: list[dict[str, Tensor]] = [
        dict(model.named_parameters()),
        dict(model.named_buffers()),
    ]
    stacked = [{n: t.detach().expand(2, *t.shape) for n, t in state.items()} for state in states]
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            vmap(lambda p, b: functional_call(model, (p, b), (example,), strict=True))(*stacked)
    except RuntimeError as error:
        _logger.warning("models are run one by one, as vmap refuses them: %s", one_line(error))
        return False
    finally:
        model.train(training)
    return True
