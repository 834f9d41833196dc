"""Users' architectures against plain PyTorch: two steps, on a full and a short batch, in every plan.

The oracle is an ordinary module in an ordinary loop. Dropouts drop nothing there and here: how they drop
is in test_keyed_draws.py, and that they drop alike in every plan is tested below.
"""

from __future__ import annotations

from functools import cache

import pytest
import torch
from architectures import FAMILIES, SMALL, Build, C
from sampling import one_in
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import StochasticDepth

from fedkd.data.images import Images
from fedkd.losses import ce
from fedkd.randomness import permutation
from fedkd.training.batches import BatchStream
from fedkd.training.cohort import Cohort
from fedkd.training.optimizers import OptimizerSettings
from fedkd.training.parameters import State, initial_state
from fedkd.training.plans import Plan
from fedkd.training.trials.models import verdict_on

K, B, N, RATE = 3, 3, 5, 0.01
MEAN, STD = [0.4, 0.5, 0.6], [0.3, 0.2, 0.4]
LOOP, LANES = Plan(stacked=False), Plan(stacked=False, lanes=2)
STACKED = [Plan(stacked=True, block=3), Plan(stacked=True, block=2), Plan(True, 2, lanes=2)]

COUPLED = {
    *("a running mean", "the mean of a batch", "the maximum of a batch"),
    *("instance norm with statistics", "an encoder layer, batch second"),
    "batch norm without statistics",
}
"""Whose samples affect each other, and would see padding."""

REFUSED_BY_VMAP = {"lstm", "lstm, both ways", "gru", "rnn", "a spectral norm"}

SIZE = dict.fromkeys(SMALL, 8) | {name: size for name, (_, size) in FAMILIES.items()}
BUILD: dict[str, Build] = {**SMALL, **{name: build for name, (build, _) in FAMILIES.items()}}

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@cache
def images(size: int) -> Images:
    draw = torch.Generator().manual_seed(size)
    pixels = torch.randint(0, 256, (K * N, 3, size, size), generator=draw).to(torch.uint8)
    labels = torch.randint(0, C, (K * N,), generator=draw)
    return Images(pixels, labels, MEAN, STD, torch.float64)


def inputs(size: int) -> Tensor:
    mean, std = torch.tensor([MEAN, STD], dtype=torch.float64)[..., None, None]
    normalised: Tensor = (images(size).pixels.double() / 255 - mean) / std
    return normalised


def module_of(name: str, k: int) -> nn.Module:
    """Return client k's module in float64, which drops nothing."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(k)
        module = BUILD[name]().double()
    for part in module.modules():
        if isinstance(part, nn.modules.dropout._DropoutNd | StochasticDepth):
            part.p = 0.0
        if isinstance(part, nn.MultiheadAttention | nn.RNNBase):
            part.dropout = 0.0
        if isinstance(part, nn.modules.batchnorm._BatchNorm):
            part.eps = 1.0  # or three images with one pixel each make 10¹⁰ times of any rounding
    return module


def trained_plainly(name: str, k: int) -> tuple[State, Tensor]:
    """Return client k's tensors after two steps, and its logits for its images in evaluation mode."""
    module, given = module_of(name, k).train(), images(SIZE[name])
    assert given.labels is not None
    x, y = inputs(SIZE[name])[k * N : (k + 1) * N], given.labels[k * N : (k + 1) * N]
    optimizer = torch.optim.SGD(module.parameters(), RATE, momentum=0.9)
    order = permutation(N, 3, k, "steps", "private", 0)
    for rows in order.split(B):
        optimizer.zero_grad()
        F.cross_entropy(module(x[rows]), y[rows]).backward()
        optimizer.step()
    with torch.no_grad():
        logits = module.eval()(x)
    return {n: t.detach() for n, t in [*module.named_parameters(), *module.named_buffers()]}, logits


def trained(
    name: str, plan: Plan, states: list[State], skeleton: nn.Module
) -> tuple[Cohort, Tensor]:
    cohort = Cohort.of(skeleton, states, plan)
    rows = list(torch.arange(K * N).split(N))
    cohort.fit(
        [BatchStream("private", images(SIZE[name]), rows, {ce: 1.0})],
        epochs=1,
        batch_size=B,
        optimizer=OptimizerSettings("sgd", RATE, momentum=0.9),
        streams=[(3, k, "steps") for k in range(K)],
    )
    return cohort, torch.stack([cohort.predict(images(SIZE[name]), rows[k])[k] for k in range(K)])


def started(name: str) -> list[State]:
    modules = [module_of(name, k) for k in range(K)]
    return [
        {n: t.detach().clone() for n, t in [*m.named_parameters(), *m.named_buffers()]}
        for m in modules
    ]


@pytest.mark.parametrize("name", [*one_in(4, SMALL), *one_in(100, FAMILIES)])
def test_an_architecture_equals_plain_pytorch_in_every_plan(name: str) -> None:
    verdict = verdict_on(lambda: BUILD[name]().train(), images(SIZE[name]))
    why = verdict.why_not_stacked.replace(
        "a stack of models of its size gains nothing on a CPU", ""
    )
    assert bool(why) == (name in COUPLED | REFUSED_BY_VMAP), why
    assert ("vmap" in why) == (name in REFUSED_BY_VMAP)
    expected = [trained_plainly(name, k) for k in range(K)]
    stacked = [] if why else STACKED
    for plan in (LOOP, LANES, *stacked) if name in SMALL else (LOOP, *stacked[:1]):
        cohort, logits = trained(name, plan, started(name), module_of(name, 0))
        for k, (state, outputs) in enumerate(expected):
            given = cohort.state(k)
            assert given.keys() == state.keys()
            for n, tensor in state.items():
                torch.testing.assert_close(
                    given[n], tensor, rtol=1e-9, atol=1e-9, msg=f"{plan} {n}"
                )
            # Of the largest logit, as they are sums of numbers as large.
            error = 1e-9 * max(1.0, float(outputs.abs().max()))
            torch.testing.assert_close(logits[k], outputs, rtol=0, atol=error)


DROPPING = [
    *("residual mlp", "alpha dropout", "dropout of maps", "an encoder layer", "lstm"),
    *("vit", "convnext", "mobilenet v3", "maxvit"),
]


@pytest.mark.parametrize("name", [*one_in(2, DROPPING[:5]), *one_in(100, DROPPING[5:])])
def test_what_drops_drops_alike_in_every_plan(name: str) -> None:
    skeleton = BUILD[name]().double()
    with torch.random.fork_rng(devices=[]):
        state = initial_state(lambda: BUILD[name]().double(), 5)
    before = torch.get_rng_state()
    plans = [LOOP, LANES, *(STACKED if name not in REFUSED_BY_VMAP else ())]
    plans = plans if name in SMALL else [LOOP, STACKED[0]]
    results = [trained(name, plan, [state] * K, skeleton)[0] for plan in plans]
    assert torch.equal(before, torch.get_rng_state())
    for other in results[1:]:
        for n, tensor in results[0].state(1).items():
            torch.testing.assert_close(other.state(1)[n], tensor, rtol=1e-8, atol=1e-8, msg=n)
    plain = trained(name, LOOP, [state] * K, module_of(name, 0))[0].state(1)
    assert any(not torch.allclose(results[0].state(1)[n], t) for n, t in plain.items())
