"""The stacked trainer against a plain PyTorch loop: ``DataLoader``, ``nn.Module``, ``torch.optim``.

The oracle below shares nothing with the trainer but the order of the samples, which both draw from
`fedkd.randomness.permutation`, and the names of the streams.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from typing import Literal

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from fedkd.data.images import Images
from fedkd.errors import FedkdError
from fedkd.losses import Step, Term, ce, kl, kl_mean, mae_logits, term
from fedkd.randomness import key, permutation
from fedkd.training import models
from fedkd.training.batches import BatchStream
from fedkd.training.cohort import Cohort
from fedkd.training.fit import NORM_EVERY, Fitted
from fedkd.training.optimizers import OptimizerSettings
from fedkd.training.parameters import State, initial_state
from fedkd.training.plans import Plan
from fedkd.training.schedule import Stream

SHAPE, C, N, B, EPOCHS = (1, 8, 8), 7, 101, 8, 3
SIZES = [5, 17, 64, 1, 8, 9, 16, 3]
SEVEN = [0, 1, 2, 3, 4, 5, 6]
SEVEN_NORMED = [0, 1, 2, 7, 4, 5, 6]
"""With 3 images for 1: a client whose only batch is one image has gradients near zero, of which Adam
makes steps of full size, so that the oracle differs from itself by 2e-9 if its inputs are normalised
by another formula. Its neighbours stay within 1e-12, a last batch of one image (of 17) included."""
MEAN, STD = 0.3, 0.4
F64 = torch.float64

Name = Literal["adam", "adamw", "sgd"]
Builder = Callable[[], nn.Module]

LEARNING_RATE = torch.tensor([1e-3, 3e-4, 2e-3, 5e-4, 3e-3, 2e-4, 1.5e-3, 7e-4], dtype=F64)
ALPHA = torch.tensor([0.7, 0.0, 0.3, 1.0, 0.5, 0.9, 0.1], dtype=F64)
TAU = torch.tensor([5.0, 1.0, 2.0, 3.0, 10.0, 0.5, 4.0], dtype=F64)
OPTIMIZERS: dict[Name, dict[str, float]] = {
    "adam": {},
    "adamw": {"weight_decay": 0.05},
    "sgd": {"momentum": 0.9, "weight_decay": 0.01},
}
STACKED_1, STACKED_2, STACKED_ALL = Plan(True, 1), Plan(True, 2), Plan(True, 7)
LOOP = Plan(False)
LANES_2, LOOP_LANES = Plan(True, 3, lanes=2), Plan(False, lanes=3)
PLANS = [STACKED_1, STACKED_2, STACKED_ALL, LOOP, LANES_2, LOOP_LANES]


def plan_name(value: object) -> str | None:
    return str(value) if isinstance(value, Plan) else None


# --- Data and the streams of the clients ---------------------------------------------------------


@cache
def images(dtype: torch.dtype = F64, labelled: bool = True) -> Images:
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randint(0, 256, (N, *SHAPE), generator=generator).to(torch.uint8)
    labels = torch.randint(0, C, (N,), generator=generator)
    return Images(pixels, labels if labelled else None, [MEAN], [STD], dtype)


def inputs(dtype: torch.dtype = F64) -> Tensor:
    if dtype == torch.float32:
        # A pixel near the mean leaves few digits after any formula, and Adam makes full steps of the
        # gradient that it gets: by another formula this oracle differs from itself by 1e-5.
        return images(dtype).batch(torch.arange(N))
    return (images().pixels.to(dtype) / 255 - MEAN) / STD


def labels() -> Tensor:
    given = images().labels
    assert given is not None
    return given


@cache
def shard(k: int, batch_stream: str = "private") -> Tensor:
    """Return client k's sample numbers, in no particular order."""
    return torch.randperm(N, generator=torch.Generator().manual_seed(50 * len(batch_stream) + k))[
        : SIZES[k]
    ]


def soft_labels(count: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(count)
    return 3 * torch.randn(count, *shape, C, generator=generator, dtype=F64)


def stream(k: int) -> Stream:
    return (13, k, 4, "digest")


def fresh(build: Builder, k: int, dtype: torch.dtype = F64) -> nn.Module:
    """Build client k's model with the weights it starts from."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(key(13, k))
        return build().to(dtype)


def start(build: Builder, k: int, dtype: torch.dtype = F64) -> State:
    """Return the same as the trainer makes it."""
    state = initial_state(build, 13, k)
    return {n: t.to(dtype) if t.is_floating_point() else t for n, t in state.items()}


# --- Models --------------------------------------------------------------------------------------


def _small_cnn() -> nn.Module:
    """Strides, groups, bias, average pooling: what `cnn` does not have."""
    return nn.Sequential(
        *(nn.Conv2d(1, 6, 3, stride=2, padding=1), nn.Tanh()),
        *(nn.Conv2d(6, 6, 3, groups=3), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(6, C)),
    )


def _normed() -> nn.Module:
    """The smallest net whose batch statistics matter; no bias before them (see `dense_normed`)."""
    return nn.Sequential(
        *(nn.Conv2d(1, 5, 3, stride=2, bias=False), nn.BatchNorm2d(5), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(45, C)),
    )


MODELS: dict[str, Builder] = {
    "mlp": lambda: models.build("mlp-20", SHAPE, C),
    "cnn": lambda: models.build("cnn", SHAPE, C),
    "small-cnn": _small_cnn,
    "resnet": lambda: models.build("resnet-8", SHAPE, C),
    "normed": _normed,
    "linear": lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, C)),
}

# --- The oracle ----------------------------------------------------------------------------------


PlainLoss = Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor]
"""Of (model, inputs, labels, teacher's logits): a scalar."""


@dataclass(frozen=True)
class PlainSide:
    """One client's samples under a loss of its own, the plain way."""

    name: str
    rows: Tensor
    loss: PlainLoss
    teacher_logits: Tensor = field(default_factory=lambda: torch.zeros(N, C, dtype=F64))
    """In the order of `rows`."""


def batches(batch_stream: PlainSide, k: int, dtype: torch.dtype) -> Iterator[list[Tensor]]:
    """Yield a client's batches for ever: one DataLoader an epoch."""
    size = len(batch_stream.rows)
    dataset = TensorDataset(
        inputs(dtype)[batch_stream.rows],
        labels()[batch_stream.rows],
        batch_stream.teacher_logits[:size].to(dtype),
    )
    epoch = 0
    while True:
        order: list[int] = permutation(size, *stream(k), batch_stream.name, epoch).tolist()
        loader: DataLoader[tuple[Tensor, ...]] = DataLoader(dataset, batch_size=B, sampler=order)
        yield from loader
        epoch += 1


def plain_optimizer(
    name: Name, parameters: Iterator[nn.Parameter], lr: float
) -> torch.optim.Optimizer:
    kinds: dict[Name, Callable[..., torch.optim.Optimizer]] = {
        "adam": torch.optim.Adam,
        "adamw": torch.optim.AdamW,
        "sgd": torch.optim.SGD,
    }
    return kinds[name](parameters, lr=lr, **OPTIMIZERS[name])


def train_plainly(
    model: nn.Module,
    k: int,
    batch_streams: Sequence[PlainSide],
    name: Name = "adam",
    epochs: int = EPOCHS,
    dtype: torch.dtype = F64,
) -> tuple[State, float]:
    """Train `model` in place; return its state and the mean loss over its steps."""
    optimizer = plain_optimizer(name, model.parameters(), float(LEARNING_RATE[k]))
    model.train()
    streams = [batches(batch_stream, k, dtype) for batch_stream in batch_streams]
    steps = epochs * -(-len(batch_streams[0].rows) // B)
    total = 0.0
    for step in range(steps):
        for module in model.modules():
            if isinstance(module, NumpyDropout):
                module.step = step
        optimizer.zero_grad()
        drawn = [next(each) for each in streams]
        loss = torch.stack(
            [
                batch_stream.loss(model, *batch)
                for batch_stream, batch in zip(batch_streams, drawn, strict=True)
            ]
        ).sum()
        loss.backward()
        optimizer.step()
        total += float(loss.detach())
    return {n: t.detach() for n, t in model.state_dict().items()}, total / steps


def hard_loss(model: nn.Module, x: Tensor, y: Tensor, _: Tensor) -> Tensor:
    return F.cross_entropy(model(x), y)


def soft_loss(zs: Tensor, zt: Tensor, tau: float) -> Tensor:
    """τ²·KL averaged over samples, from PyTorch's own kl_div on probabilities."""
    p, log_q = (zt / tau).softmax(-1), (zs / tau).log_softmax(-1)
    return tau**2 * F.kl_div(log_q, p, reduction="batchmean")


def soft_part(k: int) -> PlainLoss:
    """α·τ²·KL with client k's own α and τ."""
    return lambda model, x, y, zt: float(ALPHA[k]) * soft_loss(model(x), zt, float(TAU[k]))


def hard_part(k: int) -> PlainLoss:
    """(1−α)·CE with client k's own α."""
    return lambda model, x, y, zt: (1 - float(ALPHA[k])) * F.cross_entropy(model(x), y)


def distilling_loss(model: nn.Module, x: Tensor, y: Tensor, zt: Tensor, k: int) -> Tensor:
    """Both, of one forward pass: batch statistics must move once a step."""
    alpha, zs = float(ALPHA[k]), model(x)
    return alpha * soft_loss(zs, zt, float(TAU[k])) + (1 - alpha) * F.cross_entropy(zs, y)


@cache
def plain(model: str, name: Name, k: int) -> tuple[State, float]:
    """Train client k alone with hard labels."""
    module = fresh(MODELS[model], k)
    return train_plainly(module, k, [PlainSide("private", shard(k), hard_loss)], name)


# --- The cohort ----------------------------------------------------------------------------------


def cohort_of(
    build: Builder, clients: Sequence[int], plan: Plan, dtype: torch.dtype = F64
) -> Cohort:
    return Cohort.of(build().to(dtype), [start(build, k, dtype) for k in clients], plan)


def optimizer_of(name: Name, clients: Sequence[int]) -> OptimizerSettings:
    return OptimizerSettings(name, LEARNING_RATE[torch.tensor(clients)], **OPTIMIZERS[name])


def private_stream(clients: Sequence[int], dtype: torch.dtype = F64) -> BatchStream:
    return BatchStream("private", images(dtype), [shard(k) for k in clients], {ce: 1.0})


def fit(
    cohort: Cohort,
    clients: Sequence[int],
    batch_streams: Sequence[BatchStream],
    name: Name = "adam",
    epochs: int = EPOCHS,
    numbers: Mapping[str, float | Tensor] | None = None,
    batch_size: int = B,
) -> Tensor:
    return cohort.fit(
        batch_streams,
        epochs=epochs,
        batch_size=batch_size,
        optimizer=optimizer_of(name, clients),
        streams=[stream(k) for k in clients],
        numbers=numbers,
    ).losses


def assert_equal_states(given: State, expected: Mapping[str, Tensor], tolerance: float) -> None:
    assert list(given) != []
    for name, tensor in given.items():
        torch.testing.assert_close(
            tensor, expected[name], rtol=0, atol=tolerance, msg=partial("{}: {}".format, name)
        )


# --- Hard labels: architectures, optimisers, plans, K --------------------------------------------


def cases() -> Iterator[tuple[str, Name, Plan]]:
    """Yield all combinations for nets that are cheap, and for the others each plan and optimiser."""
    for model in ("mlp", "small-cnn"):
        yield from ((model, name, plan) for name in OPTIMIZERS for plan in PLANS)
    for model in ("cnn", "resnet"):
        yield from ((model, "adam", plan) for plan in (STACKED_1, STACKED_2, LOOP))
        yield model, "sgd", STACKED_ALL
        yield model, "adamw", LOOP


@pytest.mark.parametrize(("model", "name", "plan"), list(cases()), ids=plan_name)
def test_each_of_seven_clients_equals_a_plain_loop(model: str, name: Name, plan: Plan) -> None:
    clients = SEVEN_NORMED if model == "resnet" else SEVEN
    cohort = cohort_of(MODELS[model], clients, plan)

    losses = fit(cohort, clients, [private_stream(clients)], name)

    for i, k in enumerate(clients):
        expected, loss = plain(model, name, k)
        assert set(cohort.state(i)) == set(expected)
        assert_equal_states(cohort.state(i), expected, 1e-9)
        assert float(losses[i]) == pytest.approx(loss, abs=1e-9)
        before = start(MODELS[model], k)
        assert max(float((expected[n] - t).abs().max()) for n, t in before.items()) > 1e-5


@pytest.mark.parametrize("clients", [[1], [2, 0, 1], [6, 4, 1]], ids=str)
@pytest.mark.parametrize("plan", [STACKED_2, LOOP], ids=plan_name)
@pytest.mark.parametrize("model", ["mlp", "small-cnn", "resnet"])
def test_so_do_cohorts_of_one_and_three(model: str, plan: Plan, clients: list[int]) -> None:
    cohort = cohort_of(MODELS[model], clients, plan)
    fit(cohort, clients, [private_stream(clients)])
    assert len(cohort) == len(clients)
    for i, k in enumerate(clients):
        assert_equal_states(cohort.state(i), plain(model, "adam", k)[0], 1e-9)


@pytest.mark.parametrize("plan", PLANS, ids=plan_name)
def test_a_dense_net_in_float32_equals_a_plain_loop(plan: Plan) -> None:
    clients = SEVEN
    cohort = cohort_of(MODELS["mlp"], clients, plan, torch.float32)
    fit(cohort, clients, [private_stream(clients, torch.float32)])
    for k in clients:
        module = fresh(MODELS["mlp"], k, torch.float32)
        batch_stream = PlainSide("private", shard(k), hard_loss)
        expected, _ = train_plainly(module, k, [batch_stream], dtype=torch.float32)
        # Adam makes a step of the learning rate of a gradient that is nothing but rounding.
        assert_equal_states(cohort.state(k), expected, 5e-5)


@pytest.mark.parametrize("plan", [STACKED_ALL, LOOP], ids=plan_name)
def test_every_fit_starts_with_a_fresh_optimiser_and_in_training_mode(plan: Plan) -> None:
    clients, build = [1, 0, 4], MODELS["normed"]
    cohort = cohort_of(build, clients, plan)
    fit(cohort, clients, [private_stream(clients)], epochs=2)
    cohort.predict(images())
    fit(cohort, clients, [private_stream(clients)], epochs=1)
    for i, k in enumerate(clients):
        module = fresh(build, k)
        batch_stream = PlainSide("private", shard(k), hard_loss)
        train_plainly(module, k, [batch_stream], epochs=2)
        expected, _ = train_plainly(module, k, [batch_stream], epochs=1)
        assert_equal_states(cohort.state(i), expected, 1e-9)


# --- Neighbours ----------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    ("name", "batch_size"), [("adam", B), ("adamw", B), ("sgd", B), ("adam", 7), ("sgd", 1)]
)
def test_a_dense_client_s_bits_do_not_depend_on_the_others(
    name: Name, batch_size: int, threads: int
) -> None:
    """Float32 under vmap: alone, reordered, in blocks of other sizes, and in lanes.

    Matrix products differ by where a client's rows begin (batches of odd sizes) and, for a stack of
    one, by the number of threads: a lane has one.
    """
    torch.set_num_threads(threads)

    def trained(clients: list[int], block: int, lanes: int = threads) -> dict[int, State]:
        plan = Plan(True, block, lanes)
        cohort = cohort_of(MODELS["mlp"], clients, plan, torch.float32)
        batch_stream = private_stream(clients, torch.float32)
        fit(cohort, clients, [batch_stream], name, batch_size=batch_size)
        return {k: cohort.state(i) for i, k in enumerate(clients)}

    together = trained(SEVEN, 7)
    for others in (
        *(trained([k], 1) for k in SEVEN),
        trained([4, 0, 6], 7),
        trained([6, 5, 4, 3, 2, 1, 0], 3),
        trained([6, 5, 4, 3, 2, 1, 0], 3, lanes=2),
        trained([2, 1], 2),
        trained([2], 2, lanes=2),
    ):
        for k, state in others.items():
            assert all(torch.equal(state[n], t) for n, t in together[k].items())


@pytest.mark.parametrize("lanes", [1, 2])
@pytest.mark.parametrize("threads", [1, 2])
def test_a_convolutional_client_s_bits_do_not_depend_on_the_others_one_by_one(
    threads: int, lanes: int
) -> None:
    torch.set_num_threads(threads)

    def trained(clients: list[int]) -> dict[int, State]:
        plan = Plan(False, lanes=lanes)
        cohort = cohort_of(MODELS["small-cnn"], clients, plan, torch.float32)
        fit(cohort, clients, [private_stream(clients, torch.float32)])
        return {k: cohort.state(i) for i, k in enumerate(clients)}

    together = trained([0, 1, 2])
    for others in (trained([2, 0]), trained([1])):
        for k, state in others.items():
            assert all(torch.equal(state[n], t) for n, t in together[k].items())


@pytest.mark.parametrize("augment", ["jitter-2", "crop-flip"])
def test_augmented_images_do_not_depend_on_plan_or_neighbours(
    augment: Literal["jitter-2", "crop-flip"],
) -> None:
    def trained(clients: list[int], plan: Plan) -> dict[int, State]:
        cohort = cohort_of(MODELS["mlp"], clients, plan)
        rows = [shard(k) for k in clients]
        fit(cohort, clients, [BatchStream("private", images(), rows, {ce: 1.0}, augment=augment)])
        return {k: cohort.state(i) for i, k in enumerate(clients)}

    together = trained([0, 1, 2], STACKED_ALL)
    for others in (trained([0, 1, 2], LOOP), trained([2, 1], STACKED_1)):
        for k, state in others.items():
            assert_equal_states(state, together[k], 1e-9)
    plainly = plain("mlp", "adam", 2)[0]
    assert not torch.allclose(plainly["head.weight"], together[2]["head.weight"], atol=1e-3)


# --- Distillation --------------------------------------------------------------------------------


@pytest.mark.parametrize("plan", [STACKED_2, STACKED_ALL, LOOP], ids=plan_name)
@pytest.mark.parametrize("name", ["adam", "sgd"])
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "personal"])
def test_distillation_with_own_alpha_and_tau_equals_a_plain_loop(
    shared: bool, name: Name, plan: Plan
) -> None:
    clients, build = [4, 1, 0, 2, 5], MODELS["small-cnn"]
    rows = [torch.arange(19) * 3 % N if shared else shard(k) for k in clients]
    teachers = soft_labels(1 if shared else len(clients), 64)
    chosen = torch.tensor(clients)
    alpha = ALPHA[chosen]
    batch_stream = BatchStream("public", images(), rows, {kl: alpha, ce: 1 - alpha}, teachers)
    cohort = cohort_of(build, clients, plan)

    fit(cohort, clients, [batch_stream], name, numbers={"tau": TAU[chosen]})

    for i, k in enumerate(clients):
        module = fresh(build, k)
        own = PlainSide(
            "public", rows[i], partial(distilling_loss, k=k), teachers[0 if shared else i]
        )
        expected, _ = train_plainly(module, k, [own], name)
        assert_equal_states(cohort.state(i), expected, 1e-9)


@pytest.mark.parametrize("plan", [STACKED_2, LOOP], ids=plan_name)
@pytest.mark.parametrize("model", ["mlp", "normed"])
def test_two_sides_in_one_step_equal_a_plain_loop(model: str, plan: Plan) -> None:
    """Unlabelled public images under KL, and a private batch in the same step, wrapping around."""
    clients, build = [0, 6, 1], MODELS[model]
    public, teachers = torch.arange(21) * 2, soft_labels(1, 21)
    chosen = torch.tensor(clients)
    alpha = ALPHA[chosen]
    batch_streams = [
        BatchStream("public", images(labelled=False), [public] * 3, {kl: alpha}, teachers),
        BatchStream("private", images(), [shard(k) for k in clients], {ce: 1 - alpha}),
    ]
    cohort = cohort_of(build, clients, plan)

    losses = fit(cohort, clients, batch_streams, numbers={"tau": TAU[chosen]})

    for i, k in enumerate(clients):
        own = [
            PlainSide("public", public, soft_part(k), teachers[0]),
            PlainSide("private", shard(k), hard_part(k)),
        ]
        expected, loss = train_plainly(fresh(build, k), k, own)
        assert_equal_states(cohort.state(i), expected, 1e-9)
        assert float(losses[i]) == pytest.approx(loss, abs=1e-9)


@pytest.mark.parametrize("plan", [STACKED_ALL, LOOP], ids=plan_name)
@pytest.mark.parametrize("each", [kl_mean, mae_logits], ids=lambda t: t.import_path)
def test_other_digests_equal_a_plain_loop(each: Term, plan: Plan) -> None:
    def loss(model: nn.Module, x: Tensor, y: Tensor, zt: Tensor) -> Tensor:
        if each is mae_logits:
            return F.l1_loss(model(x), zt)
        return soft_loss(model(x), zt, 2.0) / C

    clients, teachers = [0, 1], soft_labels(1, 11)
    rows = torch.arange(11)
    cohort = cohort_of(MODELS["mlp"], clients, plan)
    fit(
        cohort,
        clients,
        [BatchStream("public", images(), [rows] * 2, {each: 1.0}, teachers)],
        numbers={"tau": 2.0},
    )
    for k in clients:
        module = fresh(MODELS["mlp"], k)
        expected, _ = train_plainly(module, k, [PlainSide("public", rows, loss, teachers[0])])
        assert_equal_states(cohort.state(k), expected, 1e-9)


# --- Terms of a user's own -----------------------------------------------------------------------


@term(needs=None, needs_start=True)
def proximal(step: Step) -> Tensor:
    """FedProx's μ/2·‖w − w₀‖²: one number a step, whatever the size of the batch."""
    assert step.start is not None
    squares = [(step.params[n] - step.start[n]).square().sum() for n in step.params]
    return step.numbers["mu"] / 2 * torch.stack(squares).sum()


def tethered_loss(
    model: nn.Module, x: Tensor, y: Tensor, _: Tensor, first: Sequence[Tensor], strength: float
) -> Tensor:
    pairs = zip(model.parameters(), first, strict=True)
    distance = torch.stack([(p - f).square().sum() for p, f in pairs]).sum()
    return F.cross_entropy(model(x), y) + strength * distance


@pytest.mark.parametrize("plan", [STACKED_2, LOOP], ids=plan_name)
def test_a_term_of_one_number_is_added_once_and_knows_the_start(plan: Plan) -> None:
    clients, build = [0, 1, 6], MODELS["mlp"]
    mu = torch.tensor([0.1, 3.0, 1.0], dtype=F64)
    coefficient = torch.tensor([1.0, 0.5, 2.0], dtype=F64)
    rows = [shard(k) for k in clients]
    cohort = cohort_of(build, clients, plan)
    batch_stream = BatchStream("private", images(), rows, {ce: 1.0, proximal: coefficient})

    fit(cohort, clients, [batch_stream], numbers={"mu": mu})

    for i, k in enumerate(clients):
        module = fresh(build, k)
        first = [p.detach().clone() for p in module.parameters()]
        strength = float(mu[i] / 2 * coefficient[i])
        loss = partial(tethered_loss, first=first, strength=strength)
        expected, _ = train_plainly(module, k, [PlainSide("private", shard(k), loss)])
        assert_equal_states(cohort.state(i), expected, 1e-9)


# --- Dropout -------------------------------------------------------------------------------------

WORD = (1 << 64) - 1
GOLDEN = 0x9E3779B97F4A7C15


def splitmix(z: int) -> int:
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & WORD
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & WORD
    return z ^ (z >> 31)


class NumpyDropout(nn.Module):
    """Dropout by masks from Python integers; the n-th call of a forward pass in client k's stream."""

    def __init__(self, p: float, call: int) -> None:
        super().__init__()
        self.p, self.call, self.k, self.step = p, call, 0, 0

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        root = key(*stream(self.k), "private", "step")
        of_step = splitmix((root + self.step * GOLDEN) & WORD)
        counters = [(self.call + 1) * 2**40 + i for i in range(-(-x.numel() // 4))]
        words = [splitmix((of_step + counter * GOLDEN) & WORD) for counter in counters]
        drawn = np.array(words, dtype="<u8").view("<u2")[: x.numel()].astype(np.int64)
        keep = torch.from_numpy(drawn >= round(self.p * 65536)).reshape(x.shape)
        return x * keep / (1 - self.p)


class Dropping(nn.Module):
    """Two dropouts: one a layer, one a call of ``F.dropout`` unless `second` replaces it."""

    def __init__(self, first: nn.Module, second: nn.Module | None = None) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(64, 13), nn.Linear(13, C)
        self.first, self.second = first, second

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(self.inner(x.flatten(1)).relu())
        if self.second is None:
            return self.outer(F.dropout(hidden, 0.3, self.training))  # type: ignore[no-any-return]
        return self.outer(self.second(hidden))  # type: ignore[no-any-return]


@pytest.mark.parametrize("plan", [STACKED_2, STACKED_ALL, LOOP], ids=plan_name)
def test_dropout_nets_equal_a_plain_loop_with_masks_of_its_own(plan: Plan) -> None:
    clients = [0, 1, 6]

    def build() -> nn.Module:
        return Dropping(nn.Dropout(0.5))

    cohort = cohort_of(build, clients, plan)
    fit(cohort, clients, [private_stream(clients)])

    for i, k in enumerate(clients):
        module = fresh(lambda: Dropping(NumpyDropout(0.5, call=0), NumpyDropout(0.3, call=1)), k)
        for dropout in module.modules():
            if isinstance(dropout, NumpyDropout):
                dropout.k = k
        expected, _ = train_plainly(module, k, [PlainSide("private", shard(k), hard_loss)])
        assert_equal_states(cohort.state(i), expected, 1e-9)


@pytest.mark.parametrize("plan", [STACKED_ALL, LOOP], ids=plan_name)
def test_training_neither_reads_nor_moves_the_global_generator(plan: Plan) -> None:
    results = []
    for seed in (1, 2):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            cohort = cohort_of(lambda: Dropping(nn.Dropout(0.5)), [0, 1], plan)
            before = torch.get_rng_state()
            fit(cohort, [0, 1], [private_stream([0, 1])], epochs=1)
            assert torch.equal(torch.get_rng_state(), before)
            results.append(cohort.state(1))
    assert all(torch.equal(results[0][n], t) for n, t in results[1].items())


class Noisy(nn.Module):
    """Noise drawn where no rule for a name of ``torch.nn.functional`` can see it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, C)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(1)
        return self.layer(flat + flat.new_empty(flat.shape).normal_())  # type: ignore[no-any-return]


class Attentive(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, dropout=0.5, batch_first=True)
        self.head = nn.Linear(64, C)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.squeeze(1)
        mixed, _ = self.attention(rows, rows, rows)
        return self.head(mixed.flatten(1))  # type: ignore[no-any-return]


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
@pytest.mark.parametrize("plan", [STACKED_ALL, LOOP], ids=plan_name)
@pytest.mark.parametrize(
    "build", [Noisy, Attentive, lambda: nn.Sequential(nn.Dropout2d(), MODELS["linear"]())]
)
def test_models_that_draw_otherwise_are_refused(build: Builder, plan: Plan) -> None:
    cohort = cohort_of(build, [0, 1], plan)
    with pytest.raises(FedkdError, match="cannot be keyed"):
        fit(cohort, [0, 1], [private_stream([0, 1])], epochs=1)


# --- Predicting ----------------------------------------------------------------------------------


@pytest.mark.parametrize("plan", PLANS, ids=plan_name)
@pytest.mark.parametrize("model", ["mlp", "normed", "dropout"])
def test_predictions_are_those_of_the_module_in_evaluation(
    model: str, plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "fedkd.training.cohort.IMAGES_AT_ONCE", {True: 13, False: 13}
    )  # 101 images in eight chunks
    build = MODELS.get(model, lambda: Dropping(nn.Dropout(0.5)))
    clients = [0, 1, 2]
    cohort = cohort_of(build, clients, plan)
    fit(cohort, clients, [private_stream(clients)], epochs=1)
    states = [cohort.state(k) for k in clients]
    rows = torch.arange(N).flip(0)[:29]

    every, some = cohort.predict(images()), cohort.predict(images(labelled=False), rows)
    classes, some_classes = cohort.classify(images()), cohort.classify(images(), rows)

    assert every.shape == (3, N, C)
    assert not every.requires_grad
    assert classes.dtype == torch.int16
    for k in clients:
        module = build().double()
        module.load_state_dict(states[k])
        expected = module.eval()(inputs()).detach()
        torch.testing.assert_close(every[k], expected, rtol=0, atol=1e-12)
        torch.testing.assert_close(some[k], expected[rows], rtol=0, atol=1e-12)
        assert torch.equal(classes[k].long(), expected.argmax(-1))
        assert torch.equal(some_classes[k].long(), expected[rows].argmax(-1))
        assert_equal_states(cohort.state(k), states[k], 0.0)  # predicting changes nothing


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("count", [N, 29, 7, 1])
def test_float32_dense_predictions_do_not_depend_on_the_others(count: int, threads: int) -> None:
    torch.set_num_threads(threads)
    rows = torch.arange(N).flip(0)[:count]
    full = cohort_of(MODELS["mlp"], SEVEN, Plan(True, 7, threads), torch.float32)
    together = full.predict(images(torch.float32), rows)
    assert together.shape == (7, count, C)
    for plan in (Plan(True, 7, threads), LANES_2):
        for k in SEVEN:
            alone = cohort_of(MODELS["mlp"], [k], plan, torch.float32)
            assert torch.equal(alone.predict(images(torch.float32), rows)[0], together[k])


class Greedy(nn.Module):
    """Works on its input in place, as a first layer with ``inplace=True`` does."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, C)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.mul_(-2.0).flatten(1))  # type: ignore[no-any-return]


@pytest.mark.parametrize("plan", [STACKED_2, LOOP, LANES_2], ids=plan_name)
@pytest.mark.parametrize("rows", [None, torch.arange(29)], ids=["all", "some"])
def test_a_model_that_works_in_place_spoils_no_images(plan: Plan, rows: Tensor | None) -> None:
    """Not for the next block, not for the next look at the same set, not for another model."""
    clients = [0, 1, 2, 4, 5]
    greedy, other = cohort_of(Greedy, clients, plan), cohort_of(MODELS["linear"], clients, plan)
    seen = replace(images())
    first, before = greedy.predict(seen, rows), other.predict(replace(images()), rows)
    assert torch.equal(greedy.predict(seen, rows), first)
    assert torch.equal(other.predict(seen, rows), before)
    for i, k in enumerate(clients):
        module = fresh(Greedy, k).eval()
        expected = module(inputs() if rows is None else inputs()[rows]).detach()
        torch.testing.assert_close(first[i], expected, rtol=0, atol=1e-12)


# --- States --------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["mlp", "resnet"])
def test_initial_state_is_that_of_a_seeded_build_and_leaves_the_global_generator_alone(
    model: str,
) -> None:
    before = torch.get_rng_state()
    given = initial_state(MODELS[model], 5, "client", 2)
    assert torch.equal(torch.get_rng_state(), before)

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(key(5, "client", 2))
        expected = MODELS[model]().state_dict()
    assert set(given) == set(expected)
    assert all(torch.equal(given[n], t) for n, t in expected.items())
    assert not any(t.requires_grad for t in given.values())
    other = initial_state(MODELS[model], 5, "client", 3)
    assert not torch.equal(other["head.weight"], given["head.weight"])


def test_states_go_in_and_come_out_as_copies() -> None:
    cohort = cohort_of(MODELS["resnet"], [0, 1, 2], LOOP)
    taken = cohort.state(1)
    assert_equal_states(taken, start(MODELS["resnet"], 1), 0.0)
    taken["head.bias"].fill_(7.0)
    assert_equal_states(cohort.state(1), start(MODELS["resnet"], 1), 0.0)

    cohort.load(2, {n: t.float() if t.is_floating_point() else t for n, t in taken.items()})
    assert cohort.params["head.bias"].dtype == F64
    assert_equal_states(cohort.state(2), taken, 1e-7)
    assert_equal_states(cohort.state(0), start(MODELS["resnet"], 0), 0.0)
    taken["head.bias"].fill_(9.0)
    assert bool((cohort.state(2)["head.bias"] == 7.0).all())


class Tied(nn.Module):
    """Two layers with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, C)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.b(self.a(x.flatten(1)).relu()).relu())  # type: ignore[no-any-return]


class Counting(nn.Module):
    """A buffer that is part of the module but not of its ``state_dict``."""

    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, C)
        self.register_buffer("scale", torch.linspace(0.5, 2.0, 64), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.flatten(1) * self.scale)  # type: ignore[no-any-return]


def frozen() -> nn.Module:
    """A trained body that a user fixed: ``requires_grad`` is the way to say so."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 13), nn.ReLU(), nn.Linear(13, C))
    model[1].requires_grad_(False)
    return model


class Spare(nn.Module):
    """A parameter that no loss reaches: ``torch.optim`` leaves it alone, weight decay included."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.spare = nn.Linear(64, C), nn.Parameter(torch.ones(5))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.flatten(1))  # type: ignore[no-any-return]


def dense_normed() -> nn.Module:
    """Without bias before it: that gradient is zero but for rounding, which Adam blows up."""
    return nn.Sequential(
        *(nn.Flatten(), nn.Linear(64, 13, bias=False)),
        *(nn.BatchNorm1d(13, momentum=0.3), nn.ReLU(), nn.Linear(13, C)),
    )


@pytest.mark.parametrize("plan", [STACKED_2, LOOP], ids=plan_name)
@pytest.mark.parametrize("build", [Tied, Counting, frozen, Spare, dense_normed])
def test_special_modules_train_as_in_plain_pytorch(build: Builder, plan: Plan) -> None:
    """With decay, and shards of 5, 64 and 8 samples: no batch of one, which 1-d norms refuse."""
    clients = [0, 2, 4]
    cohort = cohort_of(build, clients, plan)
    fit(cohort, clients, [private_stream(clients)], "adamw")
    for i, k in enumerate(clients):
        module = fresh(build, k)
        expected, _ = train_plainly(module, k, [PlainSide("private", shard(k), hard_loss)], "adamw")
        trained = {n: t for n, t in cohort.state(i).items() if n in expected}
        assert_equal_states(trained, expected, 1e-9)


def test_a_last_batch_of_one_sample_under_batch_norm_is_the_same_in_both_plans() -> None:
    """PyTorch refuses such a batch; shards of 9 and 17 images have one in every epoch."""
    clients = [1, 5]
    states = []
    for plan in (STACKED_ALL, LOOP):
        cohort = cohort_of(dense_normed, clients, plan)
        fit(cohort, clients, [private_stream(clients)])
        states.append(cohort.state(0))
    assert all(bool(t.isfinite().all()) for t in states[0].values())
    assert_equal_states(states[0], states[1], 1e-9)


# --- Errors, progress ----------------------------------------------------------------------------


@pytest.mark.parametrize("plan", [STACKED_ALL, LOOP], ids=plan_name)
@pytest.mark.parametrize("empty", [0, 1], ids=["first side", "second side"])
def test_a_client_without_samples_is_refused_before_anything_moves(empty: int, plan: Plan) -> None:
    clients = [0, 1, 2]
    cohort = cohort_of(MODELS["linear"], clients, plan)
    rows = [[shard(k) for k in clients] for _ in range(2)]
    rows[empty][1] = torch.empty(0, dtype=torch.int64)
    names = ["public", "private"]
    batch_streams = [
        BatchStream(n, images(), r, {ce: 1.0}) for n, r in zip(names, rows, strict=True)
    ]
    with pytest.raises(FedkdError, match=f"model 1 .*no {names[empty]} samples"):
        fit(cohort, clients, batch_streams)
    for k in clients:
        assert_equal_states(cohort.state(k), start(MODELS["linear"], k), 0.0)


@pytest.mark.parametrize("plan", PLANS, ids=plan_name)
def test_progress_rises_to_one(plan: Plan) -> None:
    told: list[float] = []
    clients = [0, 1, 2]
    cohort = cohort_of(MODELS["linear"], clients, plan)
    cohort.fit(
        [private_stream(clients)],
        epochs=1,
        batch_size=B,
        optimizer=OptimizerSettings(),
        streams=[stream(k) for k in clients],
        progress=told.append,
    )
    assert told == sorted(told)
    assert 0 < told[0] < 1
    assert told[-1] == 1


# --- What is told of a fit -----------------------------------------------------------------------

EPOCHS_OF = [3, 1, 2, 5, 1, 2, 4]
TAUGHT_BY = [1, 0, 1, 2, 2, 0, 1]
"""Seven students of three teachers."""


@dataclass
class Told:
    """What a plain loop has to tell of a client: losses and gradient norms, step by step."""

    state: State
    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)


@cache
def told_plainly(model: str, name: Name, k: int) -> Told:
    """Distil teacher `TAUGHT_BY[k]` into client k for `EPOCHS_OF[k]` epochs."""
    module = fresh(MODELS[model], k)
    optimizer = plain_optimizer(name, module.parameters(), float(LEARNING_RATE[k]))
    batch_stream = PlainSide(
        "public", shard(k), partial(distilling_loss, k=k), soft_labels(3, N)[TAUGHT_BY[k]]
    )
    drawn, told = batches(batch_stream, k, F64), Told({})
    module.train()
    for _ in range(EPOCHS_OF[k] * -(-SIZES[k] // B)):
        optimizer.zero_grad()
        loss = batch_stream.loss(module, *next(drawn))
        grads = torch.autograd.grad(loss, list(module.parameters()))
        told.norms.append(float(torch.cat([grad.flatten() for grad in grads]).norm()))
        for parameter, grad in zip(module.parameters(), grads, strict=True):
            parameter.grad = grad
        optimizer.step()
        told.losses.append(float(loss.detach()))
    told.state = {n: t.detach() for n, t in module.state_dict().items()}
    return told


def distilled(
    model: str, name: Name, clients: Sequence[int], plan: Plan, dtype: torch.dtype = F64
) -> tuple[Cohort, Fitted]:
    """Distil three teachers into some of the seven clients, each with numbers of its own."""
    cohort, index = cohort_of(MODELS[model], clients, plan, dtype), torch.tensor(clients)
    batch_stream = BatchStream(
        "public",
        images(dtype),
        [shard(k) for k in clients],
        {kl: ALPHA[index], ce: 1 - ALPHA[index]},
        soft_labels(3, N).to(dtype),
        torch.tensor(TAUGHT_BY)[index],
    )
    fitted = cohort.fit(
        [batch_stream],
        epochs=[EPOCHS_OF[k] for k in clients],
        batch_size=B,
        optimizer=optimizer_of(name, clients),
        streams=[stream(k) for k in clients],
        numbers={"tau": TAU[index]},
    )
    return cohort, fitted


@pytest.mark.parametrize("plan", PLANS, ids=plan_name)
@pytest.mark.parametrize(
    ("model", "name"), [("mlp", "adam"), ("mlp", "sgd"), ("normed", "adamw"), ("small-cnn", "sgd")]
)
def test_students_of_different_teachers_and_epochs_equal_plain_loops(
    model: str, name: Name, plan: Plan
) -> None:
    clients = [3, 1, 6, 0, 5, 4, 2]
    # One image of one batch under batch norm: see SEVEN_NORMED.
    clients = [k for k in clients if not (model == "normed" and SIZES[k] == 1)]
    cohort, fitted = distilled(model, name, clients, plan)
    most = max(EPOCHS_OF[k] * -(-SIZES[k] // B) for k in clients)
    assert fitted.loss_by_step.shape == (len(clients), most)
    assert fitted.gradient_norm_by_step.shape == (len(clients), -(-most // NORM_EVERY))
    for i, k in enumerate(clients):
        told = told_plainly(model, name, k)
        steps = len(told.losses)
        assert_equal_states(cohort.state(i), told.state, 1e-9)
        assert fitted.loss_by_step[i, :steps].tolist() == pytest.approx(told.losses, abs=1e-9)
        assert bool(fitted.loss_by_step[i, steps:].isnan().all())
        measured = told.norms[::NORM_EVERY]
        given = fitted.gradient_norm_by_step[i]
        assert given[: len(measured)].tolist() == pytest.approx(measured, rel=1e-7)
        assert bool(given[len(measured) :].isnan().all())
        assert float(fitted.losses[i]) == pytest.approx(sum(told.losses) / steps, abs=1e-9)
        mean = sum(measured) / len(measured)
        assert float(fitted.gradient_norms[i]) == pytest.approx(mean, rel=1e-7)
        assert mean > 1e-3


@pytest.mark.parametrize("name", ["adam", "sgd"])
def test_what_is_told_of_a_dense_client_does_not_depend_on_the_others(name: Name) -> None:
    """To the last bit, in float32: steps, losses and norms."""
    _, together = distilled("mlp", name, SEVEN, STACKED_ALL, torch.float32)
    for clients, plan in (
        *(([k], STACKED_1) for k in SEVEN),
        ([6, 2, 4], STACKED_ALL),
        ([6, 5, 4, 3, 2, 1, 0], STACKED_2),
        ([6, 5, 4, 3, 2, 1, 0], LANES_2),
    ):
        _, fitted = distilled("mlp", name, clients, plan, torch.float32)
        for i, k in enumerate(clients):
            steps = len(told_plainly("mlp", name, k).losses)
            for of, length in (("loss_by_step", steps), ("gradient_norm_by_step", -(-steps // 8))):
                given, expected = getattr(fitted, of)[i], getattr(together, of)[k]
                assert torch.equal(given[:length], expected[:length]), (of, clients, k)
            assert float(fitted.losses[i]) == float(together.losses[k])
            assert float(fitted.gradient_norms[i]) == float(together.gradient_norms[k])


def test_a_convolutional_client_is_told_the_same_one_by_one() -> None:
    _, together = distilled("small-cnn", "adam", [0, 1, 2], LOOP, torch.float32)
    _, alone = distilled("small-cnn", "adam", [1], LOOP, torch.float32)
    assert float(alone.gradient_norms[0]) == float(together.gradient_norms[1])
    assert float(alone.losses[0]) == float(together.losses[1])


class _Scaled(nn.Module):
    """A net with a parameter of no dimension, as a learnt temperature is, and one that is not used."""

    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.Linear(64, C)
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.unused = nn.Parameter(torch.ones(5))
        self.frozen = nn.Parameter(torch.ones(()), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        z: Tensor = self.frozen * self.scale * self.dense(x.flatten(1))
        return z


@pytest.mark.parametrize("plan", [STACKED_ALL, LOOP], ids=plan_name)
def test_a_parameter_may_be_a_number_or_have_no_part_in_the_loss(plan: Plan) -> None:
    clients = [2, 0, 4]
    cohort = cohort_of(_Scaled, clients, plan)
    fitted = cohort.fit(
        [private_stream(clients)],
        epochs=1,
        batch_size=B,
        optimizer=optimizer_of("sgd", clients),
        streams=[stream(k) for k in clients],
    )
    for i, k in enumerate(clients):
        batch_stream = PlainSide("private", shard(k), hard_loss)
        module = fresh(_Scaled, k)
        assert isinstance(module, _Scaled)
        x, y, _ = next(batches(batch_stream, k, F64))
        used = [module.dense.weight, module.dense.bias, module.scale]
        grads = torch.autograd.grad(hard_loss(module, x, y, x), used)
        norm = torch.cat([grad.flatten() for grad in grads]).norm()
        assert float(fitted.gradient_norm_by_step[i, 0]) == pytest.approx(float(norm), rel=1e-9)
        expected, _ = train_plainly(module, k, [batch_stream], "sgd", epochs=1)
        assert_equal_states(cohort.state(i), expected, 1e-9)


@pytest.mark.parametrize("plan", [STACKED_2, LOOP, LANES_2], ids=plan_name)
@pytest.mark.parametrize("model", ["mlp", "normed"])
def test_answers_are_the_largest_probability_and_its_class(model: str, plan: Plan) -> None:
    clients = [4, 1, 2]
    cohort = cohort_of(MODELS[model], clients, plan)
    fit(cohort, clients, [private_stream(clients)])
    classes, confidences = cohort.answer(images())
    for i in range(3):
        module = MODELS[model]().to(F64).eval()
        module.load_state_dict(cohort.state(i))
        p = module(inputs()).softmax(-1)
        assert torch.equal(classes[i].long(), p.argmax(-1))
        torch.testing.assert_close(confidences[i], p.max(-1).values.detach(), rtol=0, atol=1e-12)
    assert torch.equal(classes, cohort.classify(images()))


def test_answers_of_extreme_models_are_certain_and_finite() -> None:
    cohort = cohort_of(MODELS["linear"], [0, 1], STACKED_2, torch.float32)
    for tensor in cohort.params.values():
        tensor *= 1e6
    classes, confidences = cohort.answer(images(torch.float32))
    assert bool(confidences.isfinite().all())
    assert float(confidences.median()) == 1
    assert torch.equal(classes, cohort.classify(images(torch.float32)))
