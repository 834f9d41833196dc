"""Calling a module with other tensors, against ``torch.func.functional_call``."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from fedkd.training import models
from fedkd.training.parameters import Stateless

SHAPE, C, N = (1, 8, 8), 7, 5


class Tied(nn.Module):
    """Two layers with one weight, one module under two names, and a buffer that is not saved."""

    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, C)
        self.b.weight = self.a.weight
        self.again = self.b
        self.register_buffer("scale", torch.linspace(0.5, 2.0, 64), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.again(self.b(self.a(images.flatten(1) * self.scale)))
        return self.head(hidden.relu())  # type: ignore[no-any-return]


def resnet() -> nn.Module:
    return models.build("resnet-8", SHAPE, C)


def mlp() -> nn.Module:
    return models.build("mlp-13", SHAPE, C)


def tensors_like(model: nn.Module, seed: int) -> dict[str, Tensor]:
    """Return other values for all parameters and buffers."""
    generator = torch.Generator().manual_seed(seed)
    named = [*model.named_parameters(), *model.named_buffers()]
    return {
        n: t + torch.rand(t.shape, generator=generator)
        if t.is_floating_point()
        else t.detach().clone()
        for n, t in named
    }


def images() -> Tensor:
    return torch.randn(N, *SHAPE, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("build", [Tied, resnet, mlp])
@pytest.mark.parametrize("training", [True, False])
def test_outputs_and_gradients_are_those_of_functional_call(
    build: Callable[[], nn.Module], training: bool
) -> None:
    model = build().train(training)
    model_before = {n: t.detach().clone() for n, t in model.state_dict().items()}
    found = []
    other = deepcopy(
        model
    )  # which `functional_call` does not leave as it was if names share a module
    for call in (
        Stateless(model),
        lambda tensors, x: functional_call(other, tensors, (x,), strict=True),
    ):
        tensors = {
            n: t.detach().requires_grad_(t.is_floating_point())
            for n, t in tensors_like(model, 1).items()
        }
        leaves = [tensors[n] for n, _ in model.named_parameters()]
        held = {n: tensors[n].detach().clone() for n, _ in model.named_buffers()}
        given = {**tensors, **held}
        output = call(given, images())
        grads = torch.autograd.grad(output.square().sum(), leaves)
        found.append([output, *grads, *held.values()])
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)
    assert all(torch.equal(model_before[n], t) for n, t in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_stacked_tensors_can_be_mapped_over() -> None:
    model = resnet().eval()
    call = Stateless(model)
    several = [tensors_like(model, seed) for seed in (1, 2, 3)]
    stack = {n: torch.stack([t[n] for t in several]).detach() for n in several[0]}
    seen = images()
    together = vmap(lambda tensors: call(tensors, seen))(stack)
    for tensors, output in zip(several, together, strict=True):
        expected = functional_call(model, tensors, (seen,), strict=True)
        torch.testing.assert_close(output, expected.detach(), rtol=1e-4, atol=1e-5)


def test_what_is_tied_stays_tied_and_everything_is_back_in_place() -> None:
    model = Tied()
    before = dict(model.named_parameters())
    call = Stateless(model)
    other = tensors_like(model, 2)
    assert "b.weight" not in other
    call(other, images())
    assert model.a.weight is model.b.weight is model.again.weight is before["a.weight"]
    assert all(before[n] is p for n, p in model.named_parameters())


@pytest.mark.parametrize("missing", ["a.weight", "scale", "head.bias"])
def test_after_an_error_everything_is_back_in_place(missing: str) -> None:
    model = Tied()
    own = [*model.parameters(), *model.buffers()]
    other = tensors_like(model, 2)
    with pytest.raises(KeyError, match=missing):
        Stateless(model)({n: t for n, t in other.items() if n != missing}, images())
    with pytest.raises(RuntimeError, match="size of tensor"):
        Stateless(model)(other, images()[:, :, :3])
    assert all(a is b for a, b in zip(own, (*model.parameters(), *model.buffers()), strict=True))
