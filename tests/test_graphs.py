"""Recorded steps against the steps themselves: the same fits, with and without, bit for bit.

Every case is three fits of one cohort of which each has other inputs than the one before, so that
whatever a recording kept besides the operations would show. A step is recorded after the first fit.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.nn import functional as F

from fedkd import graphs as module
from fedkd import models
from fedkd.cohort import Cohort, Side, initial_state, stacked
from fedkd.graphs import Graphs
from fedkd.images import Images
from fedkd.losses import Step, Term, ce, cross_entropy, kl, term
from fedkd.optimizers import OptimizerSettings
from fedkd.plans import Plan
from fedkd.precision import Precision
from fedkd.profiling import profiled
from fedkd.stateless import Stateless

SHAPE, C, N, B, AFTER = (1, 8, 8), 7, 101, 8, 3
SHARDS = [5, 17, 3, 29, 2]
"""Images of each client: 1, 3, 1, 4 and 1 batches, so that 5, 2 and 1 clients are at work."""
KINDS = 3
K = len(SHARDS)

Builder = Callable[[], nn.Module]


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Record after few steps."""
    monkeypatch.setattr(module, "RECORD_AFTER", AFTER)


class Watched(Graphs):
    """Recorded steps that tell how often they were tried and replayed."""

    def __init__(self) -> None:
        super().__init__()
        self.tried: list[Hashable] = []
        self.made: set[Hashable] = set()
        self.replayed: list[Hashable] = []

    def find(self, kind: Hashable) -> module.Step | None:
        found = super().find(kind)
        if found is not None:
            self.made.add(kind)
            self.replayed.append(kind)
        return found

    def record(self, kind: Hashable, step: module.Step, inputs: Sequence[Tensor]) -> None:
        self.tried.append(kind)
        super().record(kind, step, inputs)


# --- Fits that differ ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Given:
    """What a fit is called with."""

    sides: list[Side]
    numbers: dict[str, float | Tensor] = field(default_factory=dict)
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    batch_size: int = B
    epochs: int = AFTER


def images(seed: int) -> Images:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (N, *SHAPE), generator=generator).to(torch.uint8)
    return Images(pixels, torch.randint(0, C, (N,), generator=generator), [0.3], [0.4])


def rows(seed: int, sizes: Sequence[int] = SHARDS) -> list[Tensor]:
    generator = torch.Generator().manual_seed(100 + seed)
    return [torch.randperm(N, generator=generator)[:size] for size in sizes]


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(200 + seed))


def private(n: int, terms: Mapping[Term, float | Tensor] | None = None) -> Side:
    """Return the private side of fit `n`: images, shards and coefficients of its own."""
    return Side("private", images(n), rows(n), terms or {ce: 1.0 + n})


def hard(n: int) -> Given:
    return Given([private(n)])


def augmented(n: int) -> Given:
    augment: Literal["jitter-2", "crop-flip"] = "crop-flip" if n == 1 else "jitter-2"
    return Given([replace(private(n), augment=augment)])


def with_rates(n: int) -> Given:
    rate = 1e-3 + 1e-2 * drawn(n, K) if n else 1e-2
    return Given([private(n)], optimizer=OptimizerSettings("sgd", rate, 0.9, 0.01 * n))


def distilled(n: int, shared: bool = True) -> Given:
    """Labelled public images with soft labels of one teacher, or of one a client."""
    alpha = drawn(n, K)
    public = rows(n, [13])[0] if shared else None
    teachers = 5 * drawn(n + 50, 1, 13, C) if shared else 5 * drawn(n, K, max(SHARDS), C)
    samples = rows(n) if public is None else [public] * K
    side = Side("public", images(n), samples, {kl: alpha, ce: 1 - alpha}, teachers)
    return Given([side], {"tau": 1 + 4 * drawn(n + 10, K)})


def personally(n: int) -> Given:
    return distilled(n, shared=False)


def two_sided(n: int) -> Given:
    """Unlabelled public images under KL and a private batch under CE in the same step."""
    alpha = drawn(n, K)
    public = replace(images(n), labels=None)
    sides = [
        Side("public", public, [rows(n, [13])[0]] * K, {kl: alpha}, 5 * drawn(n, 1, 13, C)),
        private(n, {ce: 1 - alpha}),
    ]
    return Given(sides, {"tau": 1.0 + n})


@term(needs=None, needs_start=True)
def proximal(step: Step) -> Tensor:
    """FedProx's μ/2·‖w − w₀‖²."""
    squares = [(step.params[n] - step.start[n]).square().sum() for n in step.params]
    return step.numbers["mu"] / 2 * torch.stack(squares).sum()


def tethered(n: int) -> Given:
    return Given([private(n, {ce: 1.0, proximal: drawn(n, K)})], {"mu": 10 * drawn(n + 10, K)})


# --- Models --------------------------------------------------------------------------------------


def mlp() -> nn.Module:
    return models.build("mlp-11", SHAPE, C)


class Dropping(nn.Module):
    """Two dropouts, one of them a call."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.drop, self.outer = nn.Linear(64, 13), nn.Dropout(0.5), nn.Linear(13, C)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.drop(self.inner(x.flatten(1)).relu())
        return self.outer(F.dropout(hidden, 0.3, self.training))  # type: ignore[no-any-return]


def normed() -> nn.Module:
    return nn.Sequential(
        *(nn.Flatten(), nn.Linear(64, 13)),
        *(nn.BatchNorm1d(13, momentum=0.3), nn.ReLU(), nn.Linear(13, C)),
    )


def cnn() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(1, 5, 3, stride=2, bias=False), nn.BatchNorm2d(5), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(45, C)),
    )


class Greedy(nn.Module):
    """Works on its input in place."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, C)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.mul_(-2.0).flatten(1))  # type: ignore[no-any-return]


class Counting(nn.Module):
    """A buffer that it writes to, and on which its output depends."""

    seen: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, C)
        self.register_buffer("seen", torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        self.seen.add_(1)
        return self.layer(x.flatten(1)) / self.seen.sum()  # type: ignore[no-any-return]


def frozen() -> nn.Module:
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 13), nn.ReLU(), nn.Linear(13, C))
    model[1].requires_grad_(False)
    return model


class Tied(nn.Module):
    """Two layers with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, C)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.b(self.a(x.flatten(1)).relu()).relu())  # type: ignore[no-any-return]


class Spare(nn.Module):
    """A parameter that no loss reaches."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.spare = nn.Linear(64, C), nn.Parameter(torch.ones(5))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.flatten(1))  # type: ignore[no-any-return]


class Shy(nn.Module):
    """Does not want to be recorded."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, C)

    def forward(self, x: Tensor) -> Tensor:
        if get_proxy_mode() is not None:
            raise NotImplementedError("not while somebody watches")
        return self.layer(x.flatten(1))  # type: ignore[no-any-return]


# --- With and without ----------------------------------------------------------------------------

ONE_STACK = Plan(True, K)
LANES = Plan(True, 3, lanes=2)
"""Blocks of 3 and 2 clients: of 4, 3 and 1 batches an epoch, and of 1 and 1."""


def fitted(
    build: Builder,
    fits: Sequence[Given],
    graphs: Graphs | None,
    plan: Plan = ONE_STACK,
    precision: Precision = "float32",
    clients: int = K,
) -> list[Tensor]:
    """Return everything that some fits of one cohort leave behind: losses and states of each."""
    stack = stacked([initial_state(build, 13, k) for k in range(clients)])
    cohort = Cohort.over(build(), stack, plan, precision, graphs)
    left = []
    for n, given in enumerate(fits):
        losses = cohort.fit(
            given.sides,
            epochs=given.epochs,
            batch_size=given.batch_size,
            optimizer=given.optimizer,
            streams=[(13, k, n) for k in range(clients)],
            numbers=given.numbers,
        ).losses
        left += [losses, *(t.clone() for t in stack.values())]
    return left


def assert_same(some: Sequence[Tensor], others: Sequence[Tensor]) -> None:
    assert all(bool(tensor.isfinite().all()) for tensor in some)
    assert [torch.equal(a, b) for a, b in zip(some, others, strict=True)] == [True] * len(some)


def compared(build: Builder, fits: Sequence[Given], **how: Any) -> Watched:
    """Fit with recorded steps and without; return the former."""
    watched = Watched()
    assert_same(fitted(build, fits, watched, **how), fitted(build, fits, None, **how))
    return watched


def three(make: Callable[[int], Given]) -> list[Given]:
    return [make(n) for n in range(3)]


BUILDERS: dict[str, Builder] = {
    "mlp": mlp,
    "dropout": Dropping,
    "normed": normed,
    "cnn": cnn,
    "in place": Greedy,
    "counting": Counting,
    "frozen": frozen,
    "tied": Tied,
}


@pytest.mark.parametrize("build", BUILDERS.values(), ids=BUILDERS)
def test_recorded_steps_of_any_model_are_the_steps(build: Builder) -> None:
    """Of shards of different sizes: a kind for each number of clients that are still at work."""
    watched = compared(build, three(hard))
    assert len(watched.tried) == len(watched.made) == KINDS
    of_a_fit = AFTER * 4  # steps of the longest shard
    assert len(watched.replayed) == 2 * of_a_fit


CASES: dict[str, tuple[Callable[[int], Given], int]] = {
    "augmented": (augmented, KINDS),
    "rates": (with_rates, KINDS),
    "distilled": (distilled, 1),  # the same public samples for all: nobody ends early
    "personal": (personally, KINDS),
    "two sides": (two_sided, 1),
    "proximal": (tethered, KINDS),
}


@pytest.mark.parametrize(("make", "kinds"), CASES.values(), ids=CASES)
def test_nothing_but_operations_is_recorded(make: Callable[[int], Given], kinds: int) -> None:
    """Data, soft labels, coefficients, numbers, starts, rates and masks are those of the fit."""
    watched = compared(Dropping, three(make))
    assert len(watched.made) == kinds


def test_every_fit_of_a_case_tells() -> None:
    """Else the cases above could not show what a recording kept: each input changes results."""
    for make, _ in CASES.values():
        usual = fitted(Dropping, three(make), None)[-1]
        again = fitted(Dropping, [make(0), make(1), make(1)], None)[-1]
        assert not torch.equal(usual, again)


@pytest.mark.parametrize("build", [mlp, Dropping, normed])
def test_lanes_replay_what_was_recorded(build: Builder) -> None:
    """Its 3, 2 and 1 clients take 3, 6 and 3 steps a fit; the 2 clients of the other block take 3."""
    torch.set_num_threads(2)
    watched = compared(build, three(hard), plan=LANES)
    assert len(watched.replayed) == 2 * (3 + 6 + 3 + 3)


@pytest.mark.parametrize("build", [mlp, cnn])
def test_bfloat16_steps_are_recorded_as_such(build: Builder) -> None:
    watched = Watched()
    exact = fitted(build, three(hard), watched)
    rough = fitted(build, three(hard), watched, precision="bfloat16")
    assert len(watched.made) == 2 * KINDS
    assert_same(exact, fitted(build, three(hard), None))
    assert_same(rough, fitted(build, three(hard), None, precision="bfloat16"))
    assert not all(map(torch.equal, exact, rough))


def test_one_architecture_s_steps_serve_all_its_cohorts() -> None:
    """Of other sizes, batches and terms, in turns, as the rounds of a run are."""
    few = [replace(hard(n), sides=[replace(private(n), rows=rows(n, [17, 29]))]) for n in range(3)]
    turns: list[tuple[list[Given], int]] = [
        (three(hard), K),
        (few, 2),
        ([replace(given, batch_size=5) for given in three(hard)], K),
        (three(tethered), K),
        (three(two_sided), K),
    ]
    watched = Watched()
    for _ in range(2):
        watched.replayed.clear()
        for fits, clients in turns:
            with_them = fitted(mlp, fits, watched, clients=clients)
            assert_same(with_them, fitted(mlp, fits, None, clients=clients))
    # In the second turn every step is one that was recorded.
    epochs = 3 * AFTER
    assert len(watched.replayed) == epochs * (4 + 4 + 6 + 4 + 2)


def test_longer_and_shorter_fits_share_recorded_steps() -> None:
    """Clients differ from round to round, and so does the number of steps to take."""
    lengths = [AFTER, 1, 2 * AFTER]
    watched = compared(mlp, [replace(hard(n), epochs=epochs) for n, epochs in enumerate(lengths)])
    assert len(watched.tried) == KINDS
    assert len(watched.replayed) == 4 * sum(lengths[1:])


def weighed(weight: float) -> Term:
    """Return a term that goes by the same name whatever its weight, as one that was edited does."""

    @term(needs=None)
    def own(step: Step) -> Tensor:
        return weight * cross_entropy(step.logits, step.labels)

    return own


def test_a_term_of_the_same_name_is_another_term() -> None:
    """As where a notebook reloads a strategy: the data, and what is kept with them, stay."""
    one, other = weighed(1.0), weighed(5.0)
    assert one.reference == other.reference
    watched = compared(
        mlp, [Given([private(n, {each: 1.0})]) for n, each in enumerate([one, one, other])]
    )
    assert watched.replayed


# --- What is not recorded ------------------------------------------------------------------------


@pytest.mark.parametrize("build", [Spare, Shy])
def test_what_cannot_be_recorded_goes_on_and_is_tried_once(build: Builder) -> None:
    watched = compared(build, three(hard))
    assert len(watched.tried) == len(set(watched.tried)) == KINDS
    assert watched.replayed == []


def test_a_kind_that_is_rare_is_not_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fit has 3 steps of all five clients, 6 of two and 3 of the last one."""
    monkeypatch.setattr(module, "RECORD_AFTER", 2 * AFTER)
    for fits, made in ((1, 0), (2, 1), (3, KINDS)):
        watched = compared(mlp, [hard(n) for n in range(fits)])
        assert len(watched.made) == made
    assert len(watched.tried) == KINDS


def test_no_more_than_so_many_are_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST", 2)
    watched = compared(mlp, three(hard))
    assert len(watched.tried) == len(watched.made) == 2


def test_a_profiled_fit_shows_all_parts_and_replays_nothing() -> None:
    watched = Watched()
    before = fitted(mlp, three(hard), watched)
    assert watched.replayed
    watched.replayed.clear()
    with profiled() as seconds:
        assert_same(fitted(mlp, three(hard), watched), before)
    assert watched.replayed == []
    assert {"data", "forward", "backward", "optimizer"} <= set(seconds)


def test_models_that_run_one_by_one_are_not_recorded() -> None:
    watched = compared(mlp, three(hard), plan=Plan(False))
    assert watched.tried == watched.replayed == []


def test_recording_leaves_no_trace_in_the_skeleton() -> None:
    """A model that raises in mid-recording has its own tensors again."""
    skeleton = Shy()
    before = dict(skeleton.named_parameters())
    stack = stacked([initial_state(Shy, 13, k) for k in range(K)])
    watched = Watched()
    Cohort.over(skeleton, stack, ONE_STACK, graphs=watched).fit(
        hard(0).sides,
        epochs=AFTER,
        batch_size=B,
        optimizer=OptimizerSettings(),
        streams=[(13, k) for k in range(K)],
    )
    assert watched.tried
    for name, tensor in skeleton.named_parameters():
        assert tensor is before[name]
    assert Stateless(skeleton)({n: t[0] for n, t in stack.items()}, torch.zeros(2, *SHAPE)).shape
