"""The stacked optimisers against one ``torch.optim`` optimiser a client."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
from torch import Tensor, nn

from fedkd.training.optimizers import OptimizerSettings, StackedOptimizer

K = 3
SHAPES = [(7,), (5, 3), (2, 3, 5, 1), ()]
ACTIVE = [3, 3, 3, 2, 2, 2, 2, 1, 1, 1, 1]
"""How many clients still step, of 11 steps in all."""

LEARNING_RATE = torch.tensor([0.1, 0.003, 0.03], dtype=torch.float64)
MOMENTUM = torch.tensor([0.9, 0.0, 0.5], dtype=torch.float64)
DECAY = torch.tensor([0.01, 0.2, 0.0], dtype=torch.float64)

Name = Literal["adam", "adamw", "sgd"]


def oracle(
    name: Name, params: list[nn.Parameter], lr: float, momentum: float, decay: float
) -> torch.optim.Optimizer:
    if name == "sgd":
        return torch.optim.SGD(params, lr=lr, momentum=momentum, weight_decay=decay)
    kind = torch.optim.Adam if name == "adam" else torch.optim.AdamW
    return kind(params, lr=lr, weight_decay=decay)


def draw(seed: int, dtype: torch.dtype, scale: float = 1.0) -> list[Tensor]:
    """Draw a tensor ``[K, *shape]`` for every shape, contiguous."""
    generator = torch.Generator().manual_seed(seed)
    return [
        scale * torch.randn(K, *shape, generator=generator, dtype=torch.float64).to(dtype)
        for shape in SHAPES
    ]


def transposed(tensor: Tensor) -> Tensor:
    """Return the same values with the strides reversed, as ``vmap`` leaves gradients of weights."""
    axes = tuple(reversed(range(tensor.ndim)))
    return tensor.permute(axes).contiguous().permute(axes)


def compare(
    name: Name, settings: OptimizerSettings, dtype: torch.dtype, tolerance: float
) -> list[Tensor]:
    """Step stack and oracles alike, compare after each step, and return the trained stack."""

    def of(value: float | Tensor, k: int) -> float:
        return float(value[k]) if isinstance(value, Tensor) else value

    start = draw(0, dtype)
    stacked = [p.clone() for p in start]
    stepper = StackedOptimizer(stacked, settings)
    alone = [[nn.Parameter(p[k].clone()) for p in start] for k in range(K)]
    oracles = [
        oracle(
            name,
            alone[k],
            of(settings.learning_rate, k),
            of(settings.momentum, k),
            of(settings.weight_decay, k),
        )
        for k in range(K)
    ]
    for step, active in enumerate(ACTIVE):
        grads = [
            transposed(g[:active]) for g in draw(step + 1, dtype, scale=10.0 ** (step % 3 - 1))
        ]
        before = [g.clone() for g in grads]
        assert not all(g.is_contiguous() for g in grads)
        stepper.step(grads, active)
        assert all(torch.equal(g, b) for g, b in zip(grads, before, strict=True))
        for k in range(active):
            for param, grad in zip(alone[k], grads, strict=True):
                param.grad = grad[k].clone()
            oracles[k].step()
        for k in range(K):  # the clients past `active` stay where they stopped
            for mine, param in zip(stacked, alone[k], strict=True):
                torch.testing.assert_close(mine[k], param.data, rtol=tolerance, atol=tolerance)
    assert all(float((s - p).abs().min()) > 0 for s, p in zip(stacked, start, strict=True))
    return stacked


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
@pytest.mark.parametrize("name", ["adam", "adamw", "sgd"])
def test_own_hyper_parameters_equal_torch(name: Name, dtype: torch.dtype, tolerance: float) -> None:
    momentum = MOMENTUM if name == "sgd" else 0.0
    compare(name, OptimizerSettings(name, LEARNING_RATE, momentum, DECAY), dtype, tolerance)


@pytest.mark.parametrize(
    "settings",
    [
        OptimizerSettings(),
        OptimizerSettings("adam", 0.01, weight_decay=0.1),
        OptimizerSettings("adamw", 0.01, weight_decay=0.1),
        OptimizerSettings("sgd", 0.01),
        OptimizerSettings("sgd", 0.01, momentum=0.9),
        OptimizerSettings("sgd", 0.01, weight_decay=0.1),
        OptimizerSettings("sgd", 0.01, momentum=0.9, weight_decay=0.1),
    ],
    ids=lambda s: f"{s.name} momentum {s.momentum} decay {s.weight_decay}",
)
def test_shared_hyper_parameters_equal_torch_and_tensors(settings: OptimizerSettings) -> None:
    numbers = compare(settings.name, settings, torch.float64, 1e-12)
    every = OptimizerSettings(
        settings.name,
        torch.as_tensor(settings.learning_rate, dtype=torch.float64).expand(K),
        torch.as_tensor(settings.momentum, dtype=torch.float64).expand(K),
        torch.as_tensor(settings.weight_decay, dtype=torch.float64).expand(K),
    )
    tensors = compare(settings.name, every, torch.float64, 1e-12)
    for a, b in zip(numbers, tensors, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-14, atol=1e-14)


def test_adam_s_defaults_are_torch_s() -> None:
    defaults = torch.optim.Adam([nn.Parameter(torch.zeros(1))]).defaults
    assert OptimizerSettings().name == "adam"
    assert OptimizerSettings().learning_rate == defaults["lr"]
    assert OptimizerSettings().weight_decay == defaults["weight_decay"]


def _picked(value: float | Tensor) -> list[float] | float:
    return [float(v) for v in value] if isinstance(value, Tensor) else value


def test_rows_pick_each_client_s_own() -> None:
    settings = OptimizerSettings("sgd", LEARNING_RATE, 0.5, DECAY).rows(torch.tensor([2, 0]))
    assert settings.name == "sgd"
    assert _picked(settings.learning_rate) == [0.03, 0.1]
    assert settings.momentum == 0.5
    assert _picked(settings.weight_decay) == [0.0, 0.01]


@pytest.mark.parametrize("name", ["adam", "adamw", "sgd"])
def test_a_client_s_bits_do_not_depend_on_the_others(name: Name) -> None:
    """Elementwise arithmetic: the fused kernels of PyTorch fail this at the tail of a tensor."""
    settings = OptimizerSettings(
        name, LEARNING_RATE, MOMENTUM if name == "sgd" else 0.0, weight_decay=DECAY
    )

    def train(clients: list[int]) -> dict[int, list[Tensor]]:
        rows = torch.tensor(clients)
        stacked = [p[rows] for p in draw(0, torch.float32)]
        stepper = StackedOptimizer(stacked, settings.rows(rows))
        for step in range(11):
            stepper.step([g[rows] for g in draw(step + 1, torch.float32)], len(clients))
        return {k: [p[i] for p in stacked] for i, k in enumerate(clients)}

    together, reordered = train([0, 1, 2]), train([2, 0])
    for k in (0, 2):
        for other in (reordered[k], train([k])[k]):
            assert all(torch.equal(a, b) for a, b in zip(together[k], other, strict=True))
