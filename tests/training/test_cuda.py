"""On a GPU the numbers are those of the CPU, within tolerance. Skipped where there is none.

What of it can be seen without a GPU is tested everywhere: that no step waits for the device, and how
many clients are taken to fit.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from federation_tools import tiny
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import fedkd
from fedkd.data.federated import federated_data
from fedkd.data.images import Images
from fedkd.losses import ce, kl
from fedkd.machine import Precision
from fedkd.training import models, tuning
from fedkd.training.architectures import architectures_of
from fedkd.training.batches import BatchStream
from fedkd.training.cohort import Cohort
from fedkd.training.optimizers import OptimizerSettings
from fedkd.training.parameters import State, initial_state, stacked
from fedkd.training.plans import Plan

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")

SHAPE, C, N, B = (1, 8, 8), 7, 101, 8
SIZES = [29, 17, 53, 5, 11]
K = len(SIZES)
STACKED, BLOCKS, LOOP = Plan(True, K), Plan(True, 2), Plan(False)
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


# --- Federations ---------------------------------------------------------------------------------


@needs_cuda
@pytest.mark.parametrize("strategy", ["FedMD", "DSFL", "FedAvg"])
@pytest.mark.parametrize("student", ["mlp-20", "mlp-20,resnet-8,lenet"])
def test_a_federation_on_cuda_equals_one_on_the_cpu(
    tmp_path: Path, strategy: str, student: str
) -> None:
    experiment = fedkd.Experiment(
        dataset="digits",
        public_size=97,
        public_labels=False,
        num_clients=3,
        student=student,
        teacher="none" if "," in student else "mlp-37",
        strategy=strategy,
        num_server_rounds=2,
        run_dir=str(tmp_path),
    )
    cpu, cuda = (fedkd.run(experiment.replace(device=device)) for device in ("cpu", "cuda"))
    assert (cuda.bytes_up, cuda.bytes_down) == (cpu.bytes_up, cpu.bytes_down)
    for here, there in zip(cpu.client_accuracy, cuda.client_accuracy, strict=True):
        assert there == pytest.approx(here, abs=0.03)


@needs_cuda
def test_the_central_baseline_on_cuda_equals_that_on_the_cpu() -> None:
    experiment = fedkd.Experiment(
        dataset="digits", teacher="mlp-37", student="mlp-20", local_epochs=3
    )
    cpu, cuda = (
        fedkd.central(experiment.replace(device=device), [0, 1, 2], save=False)
        for device in ("cpu", "cuda")
    )
    assert cuda.teacher_accuracies == pytest.approx(cpu.teacher_accuracies, abs=0.02)
    assert cuda.student_accuracies == pytest.approx(cpu.student_accuracies, abs=0.03)


@needs_cuda
@pytest.mark.parametrize("precision", ["tf32", "bfloat16"])
@pytest.mark.parametrize("plan", ["stacked", "loop"])
@pytest.mark.parametrize("student", ["mlp-20", "resnet-8"])
def test_a_federation_in_fewer_bits_comes_near_one_in_float32(
    student: str, plan: str, precision: str, tmp_path: Path
) -> None:
    keys: dict[str, Any] = {
        "device": "cuda",
        "student": student,
        "plan": plan,
        "num_server_rounds": 2,
        "run_dir": str(tmp_path),
    }
    exact = fedkd.run(tiny(**keys))
    rough = fedkd.run(tiny(**keys, precision=precision))
    for row, expected in zip(rough.rounds, exact.rounds, strict=True):
        assert row["dropped"] == {}
        assert row["loss_revisit"] == pytest.approx(expected["loss_revisit"], rel=0.15)


# --- Cohorts -------------------------------------------------------------------------------------


def normed() -> nn.Module:
    """Without bias before it: that gradient is zero but for rounding, which Adam blows up."""
    return nn.Sequential(
        *(nn.Flatten(), nn.Linear(64, 13, bias=False), nn.BatchNorm1d(13)),
        *(nn.ReLU(), nn.Dropout(0.3), nn.Linear(13, C)),
    )


def small_cnn() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(1, 5, 3, stride=2, bias=False), nn.BatchNorm2d(5), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(45, C)),
    )


BUILDERS: dict[str, Callable[[], nn.Module]] = {
    "mlp": lambda: models.build("mlp-11", SHAPE, C),
    "normed": normed,
    "cnn": small_cnn,
}
OPTIMIZERS = {
    "adam": OptimizerSettings("adam"),
    "adamw": OptimizerSettings("adamw", weight_decay=0.1),
    "sgd": OptimizerSettings("sgd", 0.01, 0.9, 0.01),
    "rates": OptimizerSettings("adam", torch.linspace(1e-4, 1e-2, K)),
}


def images(device: torch.device) -> Images:
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randint(0, 256, (N, *SHAPE), generator=generator).to(torch.uint8)
    labels = torch.randint(0, C, (N,), generator=generator)
    return Images(pixels.to(device), labels.to(device), [0.3], [0.4])


def batch_streams(device: torch.device) -> list[BatchStream]:
    """Return a public side with soft labels and an augmented private one."""
    generator = torch.Generator().manual_seed(2)
    teachers = 3 * torch.randn(1, 13, C, generator=generator).to(device)
    rows = [torch.randperm(N, generator=generator)[:size] for size in SIZES]
    public = [torch.arange(13)] * K
    return [
        BatchStream("private", images(device), rows, {ce: 0.7}, augment="jitter-2"),
        BatchStream("public", images(device), public, {kl: torch.linspace(0.1, 1, K)}, teachers),
    ]


def cohort_of(
    name: str,
    plan: Plan,
    device: torch.device,
    precision: Precision = "float32",
) -> Cohort:
    build = BUILDERS[name]
    stack = stacked([initial_state(build, 13, k) for k in range(K)])
    on_device = {n: t.to(device) for n, t in stack.items()}
    return Cohort.over(build().to(device), on_device, plan, precision)


def fit(
    cohort: Cohort,
    optimizer: OptimizerSettings,
    progress: Callable[[float], None] = lambda _: None,
) -> Tensor:
    return cohort.fit(
        batch_streams(next(iter(cohort.params.values())).device),
        epochs=2,
        batch_size=B,
        optimizer=optimizer,
        streams=[(13, k) for k in range(K)],
        numbers={"tau": 2.0},
        progress=progress,
    ).losses


def trained(name: str, plan: Plan, device: torch.device, **more: Any) -> tuple[Tensor, State]:
    """Return logits ``[K, N, C]`` and states after training with SGD, as exact as its gradients."""
    cohort = cohort_of(name, plan, device, **more)
    fit(cohort, OPTIMIZERS["sgd"])
    return cohort.predict(images(device)), {**cohort.params, **cohort.buffers}


@needs_cuda
@pytest.mark.parametrize("plan", [STACKED, BLOCKS, LOOP], ids=str)
@pytest.mark.parametrize("name", BUILDERS)
def test_every_plan_on_cuda_equals_the_cpu_one_by_one(name: str, plan: Plan) -> None:
    logits, states = trained(name, plan, CUDA)
    expected_logits, expected = trained(name, LOOP, CPU)
    torch.testing.assert_close(logits.cpu(), expected_logits, rtol=0, atol=1e-3)
    for n, tensor in states.items():
        torch.testing.assert_close(tensor.cpu(), expected[n], rtol=0, atol=1e-4)


@needs_cuda
@pytest.mark.parametrize("precision", ["tf32", "bfloat16"])
@pytest.mark.parametrize("plan", [STACKED, LOOP], ids=str)
@pytest.mark.parametrize("name", BUILDERS)
def test_fewer_bits_come_near_float32_under_every_plan(
    name: str, plan: Plan, precision: Precision
) -> None:
    exact, _ = trained(name, plan, CUDA)
    rough, states = trained(name, plan, CUDA, precision=precision)
    assert rough.dtype == torch.float32
    assert {t.dtype for t in states.values()} <= {torch.float32, torch.int64}
    scale = float(exact.abs().max())
    torch.testing.assert_close(rough, exact, rtol=0, atol=0.1 * scale)


# --- Nobody waits for the device -----------------------------------------------------------------


@needs_cuda
@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("name", BUILDERS)
def test_no_step_waits_for_the_gpu(name: str, optimizer: OptimizerSettings) -> None:
    """After the first, which may look around, until the last is on its way."""
    cohort = cohort_of(name, STACKED, CUDA)
    fit(cohort, optimizer)  # libraries have started

    def after(share: float) -> None:
        torch.cuda.set_sync_debug_mode("error" if share < 1 else "default")

    try:
        fit(cohort, optimizer, after)
    finally:
        torch.cuda.set_sync_debug_mode("default")


aten = torch.ops.aten
WAITING = {
    aten._local_scalar_dense.default: "reads a number",
    aten.lift_fresh.default: "makes a tensor of Python numbers, which it copies to the device",
    aten.nonzero.default: "counts",
    aten.equal.default: "compares",
}
"""Operations for which the host would wait, were the tensors on a GPU."""


class Watching(TorchDispatchMode):
    """Counts the operations that would wait."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.is_on = False
        self.seen = Counter[str]()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if self.is_on and func in WAITING:
            self.seen[WAITING[func]] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("name", BUILDERS)
def test_no_step_would_wait_for_a_gpu(name: str, optimizer: OptimizerSettings) -> None:
    """The same by the operations that a fit on the CPU calls."""
    watching = Watching()
    told: list[float] = []

    def after(share: float) -> None:
        watching.is_on = share < 1
        told.append(share)

    with watching:
        fit(cohort_of(name, STACKED, CPU), optimizer, after)
    assert len(told) == 2 * -(-max(SIZES) // B)
    assert watching.seen == {}


def test_what_would_wait_is_seen() -> None:
    watching = Watching()
    watching.is_on = True
    with watching:
        float(torch.ones(3).sum())
        torch.tensor([2, 3])
        torch.ones(5).nonzero()
        torch.equal(torch.ones(2), torch.zeros(2))
    assert set(watching.seen) == set(WAITING.values())


# --- Memory --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("free", "resident", "each", "fit"),
    [
        (1000, 100, 7.0, 100),  # 800 - 100 are left
        (1000, 100, 701.0, 1),
        (1000, 900, 7.0, 1),  # nothing is left, and one has to run
        (1010, 101, 7.5, 94),  # 808 - 101 = 707 = 94 · 7.5 + 2
    ],
)
def test_clients_fit_with_a_fifth_left_over(
    free: int, resident: int, each: float, fit: int
) -> None:
    assert tuning.fitting_block(free, resident, each) == fit


class Memory:
    """The memory of a GPU, in bytes: a step's clients come and go, a library's workspace stays."""

    def __init__(self, each: int, workspace: int, free: int) -> None:
        self.each, self.workspace, self.free = each, workspace, free
        self.allocated = self.peak = 0

    def step(self, clients: int) -> None:
        self.allocated += self.workspace
        self.workspace = 0
        self.peak = max(self.peak, self.allocated + self.each * clients)

    def reset(self) -> None:
        self.peak = self.allocated


@contextmanager
def faked(memory: Memory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        cuda: dict[str, Callable[..., Any]] = {
            "reset_peak_memory_stats": lambda _: memory.reset(),
            "memory_allocated": lambda _: memory.allocated,
            "max_memory_allocated": lambda _: memory.peak,
            "empty_cache": lambda: None,
            "mem_get_info": lambda _: (memory.free, memory.free),
        }
        for name, function in cuda.items():
            patch.setattr(torch.cuda, name, function)

        def timed(_: Any, __: Any, ___: Any, clients: int, *____: Any) -> tuple[float, float]:
            memory.step(clients)
            return 1.0, 1.0

        patch.setattr(tuning, "_time", timed)
        yield


@pytest.mark.parametrize("workspace", [0, 32 << 20])
def test_the_memory_of_a_client_is_measured_without_what_the_first_step_leaves(
    workspace: int,
) -> None:
    """CUDA's libraries keep a workspace, many times as large as a small client."""
    experiment = tiny()
    data, clients = federated_data(experiment), 100
    state = sum(t.nbytes for t in architectures_of(data).initial_state("mlp-8", 0).values())
    each, free = 1 << 20, 1 << 30
    with faked(Memory(each, workspace, free)):
        block = tuning._fitting_block(experiment, data, "mlp-8", clients)
    assert block == int((0.8 * free - clients * state) / each)


@needs_cuda
def test_the_block_that_is_taken_to_fit_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    experiment = tiny(device="cuda", batch_size=128, student="mlp-1200")
    data, clients = federated_data(experiment), 23
    free = 1 << 30
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (free, free))
    block = tuning._fitting_block(experiment, data, "mlp-1200", clients)
    assert block > 1
    device = data.train.device
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    tuning._time(experiment, data, "mlp-1200", block, Plan(True, block))
    assert torch.cuda.max_memory_allocated(device) - before < free
