"""The stacked trainer against a plain PyTorch loop: ``DataLoader``, ``nn.Module``, ``torch.optim``.

The oracle below shares nothing with the trainer but the order of the samples, which both draw from
`fedkd.randomness.permutation`, and the names of the streams.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from fedkd.data.images import Images
from fedkd.losses import ce
from fedkd.randomness import key, permutation
from fedkd.training import models
from fedkd.training.batches import BatchStream
from fedkd.training.cohort import Cohort
from fedkd.training.optimizers import OptimizerSettings
from fedkd.training.parameters import State, initial_state
from fedkd.training.plans import Plan
from fedkd.training.schedule import Stream

SHAPE, C, N, B, EPOCHS = (1, 8, 8), 7, 101, 8, 3
SIZES = [5, 17, 64, 1, 8, 9, 16, 3]
SEVEN = [0, 1, 2, 3, 4, 5, 6]
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


def is_normed(model: nn.Module) -> bool:
    return any(isinstance(module, nn.BatchNorm2d) for module in model.modules())


def batches(
    batch_stream: PlainSide, k: int, dtype: torch.dtype, normed: bool = False
) -> Iterator[list[Tensor]]:
    """Yield a client's batches for ever: one DataLoader an epoch, without a single image if `normed`."""
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
        yield from (batch for batch in loader if not normed or len(batch[0]) > 1)
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
    normed, samples = is_normed(model), len(batch_streams[0].rows)
    streams = [batches(batch_stream, k, dtype, normed) for batch_stream in batch_streams]
    steps = epochs * (-(-samples // B) - (normed and samples % B == 1))
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
