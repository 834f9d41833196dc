"""Number formats: float32 is exact, bfloat16 comes near it, TF32 is refused where there is none."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache
from operator import attrgetter
from pathlib import Path
from typing import Any

import pytest
import torch
from federation_tools import tiny
from torch import Tensor, nn
from torch.nn import functional as F

import fedkd
from fedkd.data.images import Images
from fedkd.errors import FedkdError
from fedkd.losses import ce, kl
from fedkd.machine import Precision, forward_pass, matrix_products
from fedkd.training import models
from fedkd.training.batches import BatchStream
from fedkd.training.cohort import Cohort
from fedkd.training.optimizers import OptimizerSettings, StackedOptimizer
from fedkd.training.parameters import State, initial_state, stacked
from fedkd.training.plans import Plan

SHAPE, C, N, B, K = (1, 8, 8), 7, 101, 8, 3
SIZES = [29, 17, 53]
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
PLANS = {"stacked": Plan(True, K), "lanes": Plan(True, 2, lanes=2), "loop": Plan(False)}
EPS = 2.0**-8
"""The largest relative error of rounding to bfloat16: 8 bits."""

Builder = Callable[[], nn.Module]


def small_cnn() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(1, 5, 3, stride=2, bias=False), nn.BatchNorm2d(5), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(45, C)),
    )


def normed() -> nn.Module:
    """Without bias, what is to be normalised is bfloat16."""
    return nn.Sequential(
        *(nn.Flatten(), nn.Linear(64, 13, bias=False), nn.BatchNorm1d(13)),
        *(nn.ReLU(), nn.Linear(13, C)),
    )


def dropping() -> nn.Module:
    return nn.Sequential(
        *(nn.Flatten(), nn.Linear(64, 13), nn.ReLU(), nn.Dropout(0.3), nn.Linear(13, C)),
    )


BUILDERS: dict[str, Builder] = {
    "mlp": lambda: models.build("mlp-11", SHAPE, C),
    "cnn": small_cnn,
    "normed": normed,
    "dropout": dropping,
}


@cache
def images() -> Images:
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randint(0, 256, (N, *SHAPE), generator=generator).to(torch.uint8)
    return Images(pixels, torch.randint(0, C, (N,), generator=generator), [0.3], [0.4])


def cohort_of(build: Builder, plan: Plan, precision: Precision | None = None) -> Cohort:
    stack = stacked([initial_state(build, 13, k) for k in range(K)])
    if precision is None:
        return Cohort.over(build(), stack, plan)
    return Cohort.over(build(), stack, plan, precision)


def fit(cohort: Cohort) -> Tensor:
    """Learn labels and soft labels with SGD, whose steps are as exact as the gradients."""
    rows = [torch.arange(size) for size in SIZES]
    teachers = 3 * torch.randn(1, max(SIZES), C, generator=torch.Generator().manual_seed(2))
    return cohort.fit(
        [BatchStream("public", images(), rows, {ce: 0.7, kl: 0.3}, teachers)],
        epochs=2,
        batch_size=B,
        optimizer=OptimizerSettings("sgd", 0.01),
        streams=[(13, k) for k in range(K)],
        numbers={"tau": 2.0},
    ).losses


def trained(
    build: Builder, plan: Plan, precision: Precision | None = None
) -> tuple[Tensor, Tensor, State]:
    """Return losses ``[K]``, logits ``[K, N, C]`` and states after training."""
    cohort = cohort_of(build, plan, precision)
    losses = fit(cohort)
    return losses, cohort.predict(images()), {**cohort.params, **cohort.buffers}


# --- float32 -------------------------------------------------------------------------------------


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_float32_is_the_default_and_is_not_rounded(plan: Plan) -> None:
    """Logits within rounding of float64, which bfloat16 and TF32 (10 bits) are far from."""
    losses, logits, states = trained(BUILDERS["mlp"], plan)
    asked_losses, asked_logits, _ = trained(BUILDERS["mlp"], plan, "float32")
    assert torch.equal(losses, asked_losses)
    assert torch.equal(logits, asked_logits)
    for k in range(K):
        module = BUILDERS["mlp"]().double()
        module.load_state_dict({n: t[k].double() for n, t in states.items()})
        expected = module(images().batch(torch.arange(N)).double()).detach()
        torch.testing.assert_close(logits[k].double(), expected, rtol=0, atol=2e-6)


# --- bfloat16 ------------------------------------------------------------------------------------


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
@pytest.mark.parametrize("name", BUILDERS)
def test_bfloat16_comes_near_float32_and_is_not_it(name: str, plan: Plan) -> None:
    """Losses within a hundredth, logits within a few roundings of the largest; both are float32."""
    exact_losses, exact_logits, _ = trained(BUILDERS[name], plan)
    losses, logits, states = trained(BUILDERS[name], plan, "bfloat16")
    assert losses.dtype == logits.dtype == torch.float32
    assert {t.dtype for t in states.values()} <= {torch.float32, torch.int64}
    assert not torch.equal(losses, exact_losses)
    torch.testing.assert_close(losses, exact_losses, rtol=0.01, atol=0)
    assert not torch.equal(logits, exact_logits)
    scale = float(exact_logits.abs().max())
    torch.testing.assert_close(logits, exact_logits, rtol=0, atol=8 * EPS * scale)


@pytest.mark.parametrize("name", ["mlp", "dropout"])
def test_plans_agree_in_bfloat16_as_far_as_it_goes(name: str) -> None:
    expected, _, _ = trained(BUILDERS[name], PLANS["loop"], "bfloat16")
    for plan in PLANS.values():
        losses, _, _ = trained(BUILDERS[name], plan, "bfloat16")
        torch.testing.assert_close(losses, expected, rtol=2 * EPS, atol=0)


class Peeking(nn.Module):
    """Notes what its layers give."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, C, bias=False)
        self.given: list[torch.dtype] = []

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.layer(x.flatten(1))
        self.given.append(logits.dtype)
        return logits


@pytest.mark.parametrize("plan", [PLANS["stacked"], PLANS["loop"]], ids=["stacked", "loop"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_what_is_rounded_are_the_passes_and_nothing_else(
    precision: Precision, plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Layers compute in bfloat16 in training and testing; gradients and optimisers are float32."""
    seen: list[torch.dtype] = []
    step = StackedOptimizer.step

    def watched(self: StackedOptimizer, grads: Sequence[Tensor | None], active: int) -> None:
        step(self, grads, active)
        state = [*self._params, *self._first, *self._second, *self._scratch]
        seen.extend(t.dtype for t in [*state, *grads] if t is not None)

    monkeypatch.setattr(StackedOptimizer, "step", watched)
    cohort = cohort_of(Peeking, plan, precision)
    cohort.fit(
        [BatchStream("private", images(), [torch.arange(size) for size in SIZES], {ce: 1.0})],
        epochs=1,
        batch_size=B,
        optimizer=OptimizerSettings("adam"),
        streams=[(13, k) for k in range(K)],
    )
    skeleton = cohort.skeleton
    assert isinstance(skeleton, Peeking)
    inside = torch.bfloat16 if precision == "bfloat16" else torch.float32
    assert set(skeleton.given) == {inside}
    assert set(seen) == {torch.float32}
    skeleton.given.clear()
    assert cohort.predict(images()).dtype == torch.float32
    assert set(skeleton.given) == {inside}


def test_the_casts_of_one_step_do_not_serve_the_next() -> None:
    """A cache of cast weights would give the product with the weights of before."""
    weight = torch.ones(5, 5, requires_grad=True)
    with forward_pass("bfloat16", CPU):
        before = F.linear(torch.ones(3, 5), weight)
        with torch.no_grad():
            weight.mul_(2)
        assert torch.equal(F.linear(torch.ones(3, 5), weight), 2 * before)


def test_a_run_in_bfloat16_is_recorded_and_learns(tmp_path: Path) -> None:
    keys: dict[str, Any] = {
        "run_dir": str(tmp_path),
        "plan": "stacked",
        "num_server_rounds": 3,
        "local_epochs": 3,
        "train_size": 601,
    }
    exact = fedkd.run(tiny(**keys))
    rough = fedkd.run(tiny(**keys, precision="bfloat16"))
    assert rough.experiment.precision == "bfloat16"
    assert 'precision = "bfloat16"' in (rough.path / "experiment.toml").read_text()
    assert [row["dropped"] for row in rough.rounds] == [{}] * 3
    assert rough.rounds[-1]["loss_revisit"] != exact.rounds[-1]["loss_revisit"]
    assert rough.rounds[-1]["loss_revisit"] == pytest.approx(
        exact.rounds[-1]["loss_revisit"], rel=0.05
    )
    assert all(accuracy is not None and accuracy > 0.5 for accuracy in rough.client_accuracy)


# --- TF32 ----------------------------------------------------------------------------------------


def test_tf32_is_refused_without_a_gpu_before_any_work(tmp_path: Path) -> None:
    experiment = tiny(precision="tf32", run_dir=str(tmp_path))
    with pytest.raises(
        FedkdError, match=r"precision = 'tf32': device = 'cpu' .*accepted there: float32, bfloat16"
    ):
        fedkd.run(experiment)
    assert list(tmp_path.iterdir()) == []


def switches() -> list[Any]:
    """Return what PyTorch asks how products, convolutions and recurrent layers are to be rounded."""
    return list(attrgetter("cuda.matmul", "cudnn.conv", "cudnn.rnn")(torch.backends))


def positions() -> list[str]:
    return [switch.fp32_precision for switch in switches()]


@pytest.fixture
def as_found() -> Iterator[None]:
    """Put the switches back; they exist without a GPU as well."""
    before = positions()
    yield
    for switch, position in zip(switches(), before, strict=True):
        switch.fp32_precision = position


USERS: dict[str, list[str]] = {
    "as PyTorch has them": ["none", "tf32", "tf32"],
    "all exact": ["ieee", "ieee", "ieee"],
    "products in TF32": ["tf32", "ieee", "ieee"],
    "all in TF32": ["tf32", "tf32", "tf32"],
}


@pytest.mark.usefixtures("as_found")
@pytest.mark.parametrize("chosen", USERS.values(), ids=USERS)
@pytest.mark.parametrize("precision", ["float32", "tf32", "bfloat16"])
def test_a_gpu_rounds_to_tf32_only_where_asked_and_afterwards_as_before(
    precision: Precision, chosen: list[str]
) -> None:
    for switch, position in zip(switches(), chosen, strict=True):
        switch.fp32_precision = position
    wanted = "tf32" if precision == "tf32" else "ieee"

    with matrix_products(precision, CUDA):
        assert positions() == [wanted] * 3
    assert positions() == chosen

    with pytest.raises(ArithmeticError), matrix_products(precision, CUDA):
        raise ArithmeticError
    assert positions() == chosen

    with matrix_products(precision, CPU):
        assert positions() == chosen


@pytest.mark.usefixtures("as_found")
@pytest.mark.parametrize("precision", ["float32", "tf32", "bfloat16"])
def test_what_a_user_set_in_pytorch_s_older_way_can_still_be_read(precision: Precision) -> None:
    """PyTorch raises where it finds the two ways mixed."""
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        with matrix_products(precision, CUDA):
            pass
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
