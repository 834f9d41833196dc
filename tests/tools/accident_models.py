"""Students, a worker and a data set that meet with accidents: ``accident_models:dying`` and the like.

What has happened, or is to happen, is files in a folder that all processes of a run know, as a client's
calls are spread over processes.
"""

from __future__ import annotations

import os
import resource
import signal
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fedkd.data import Dataset, read_tensors
from fedkd.engines.worker import Worker
from fedkd.federation.trial import IMAGES as TRIED_BY_SERVER
from fedkd.training.models import build

FOLDER = "FEDKD_TEST_FOLDER"
"""Variable that names the folder."""

NODE = "FEDKD_TEST_NODE"
"""Variable that names the machine of a cluster on which a process runs."""

SLOW_S = 2.0
FOR_EVER_S = 10_000.0


class _Accidental(nn.Module):
    """An MLP to which something may happen when it is about to train as a client.

    What is tried before a run is at most 9 images, and the server tries replies on a number of its own:
    clients need batches of other sizes.
    """

    def __init__(self, name: str, input_shape: tuple[int, int, int], num_classes: int) -> None:
        super().__init__()
        self.inner = build("mlp-12", input_shape, num_classes)
        self._name = name

    def forward(self, images: Tensor) -> Tensor:
        """Return logits, or do not."""
        if self.training and len(images) > 9 and len(images) != TRIED_BY_SERVER:
            self._happen()
        logits: Tensor = self.inner(images)
        return logits

    def _happen(self) -> None:
        raise NotImplementedError


# --- What is planned: each accident is a file, and happens once ----------------------------------


def plan(folder: Path, *accidents: str) -> None:
    """Have accidents happen, each once."""
    for accident in accidents:
        (folder / accident).touch()


def is_due(accident: str) -> bool:
    """Whether an accident is to happen here and now; it will not again."""
    try:
        (Path(os.environ[FOLDER]) / accident).unlink()
    except FileNotFoundError:
        return False
    return True


def exhaust_memory() -> None:
    """Allocate more than this process may have, as the kernel or the allocator then says."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + (64 << 20)
    resource.setrlimit(resource.RLIMIT_AS, (limit, before[1]))
    try:
        torch.empty(1 << 30, dtype=torch.uint8)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def end_the_machine() -> None:
    """Kill the raylet, as when the machine that this process runs on goes away."""
    os.kill(os.getppid(), signal.SIGKILL)
    time.sleep(FOR_EVER_S)


class _Planned(_Accidental):
    """Does what is due."""

    def _happen(self) -> None:
        if is_due(f"{self._name}-killed"):  # as by the kernel when memory runs out
            os.kill(os.getpid(), signal.SIGKILL)
        if is_due(f"{self._name}-hangs"):
            time.sleep(FOR_EVER_S)
        if is_due(f"{self._name}-slow"):
            time.sleep(SLOW_S)
        if is_due(f"{self._name}-memory"):
            exhaust_memory()
        if os.environ.get(NODE, "head") != "head" and is_due("machine-dies"):
            end_the_machine()


def planned_0(input_shape: tuple[int, int, int], num_classes: int) -> nn.Module:
    """Return the student of client 0."""
    return _Planned("client-0", input_shape, num_classes)


def planned_1(input_shape: tuple[int, int, int], num_classes: int) -> nn.Module:
    """Return the student of client 1."""
    return _Planned("client-1", input_shape, num_classes)


def planned_2(input_shape: tuple[int, int, int], num_classes: int) -> nn.Module:
    """Return the student of client 2."""
    return _Planned("client-2", input_shape, num_classes)


def planned_3(input_shape: tuple[int, int, int], num_classes: int) -> nn.Module:
    """Return the student of client 3."""
    return _Planned("client-3", input_shape, num_classes)


STUDENTS = ",".join(f"accident_models:planned_{k}" for k in range(4))
"""The ``student`` of four clients."""


class Forgetful(Worker):
    """A worker that runs out of memory outside its clients' training."""

    def handle(self, contents: Any, sent: Any) -> Any:
        """Answer, or have no memory to."""
        if contents and is_due("worker-memory"):
            raise MemoryError("no room for the replies")
        return super().handle(contents, sent)


# --- What happens by itself, once or always ------------------------------------------------------


class _Fated(_Accidental):
    """Kills its process or hangs; what is to happen once leaves a file behind."""

    def _happen(self) -> None:
        if self._name != "doomed":
            try:
                (Path(os.environ[FOLDER]) / self._name).touch(exist_ok=False)
            except FileExistsError:
                return
        if self._name == "hanging":
            time.sleep(FOR_EVER_S)
        os.kill(os.getpid(), signal.SIGKILL)


def killing(input_shape: tuple[int, int, int], num_classes: int) -> nn.Module:
    """Return a model that kills its process, once."""
    return _Fated("killing", input_shape, num_classes)


def hanging(input_shape: tuple[int, int, int], num_classes: int) -> nn.Module:
    """Return a model that sleeps for longer than any test, once."""
    return _Fated("hanging", input_shape, num_classes)


def doomed(input_shape: tuple[int, int, int], num_classes: int) -> nn.Module:
    """Return a model that kills its process every time."""
    return _Fated("doomed", input_shape, num_classes)


# --- What happens in a certain fit, which are counted --------------------------------------------


class _Counting(_Accidental):
    """Dies or raises when it is about to train for the n-th time."""

    def __init__(
        self, name: str, fatal: int, input_shape: tuple[int, int, int], num_classes: int
    ) -> None:
        super().__init__(name, input_shape, num_classes)
        self._fatal = fatal
        self._fresh = True

    def train(self, mode: bool = True) -> _Counting:
        """Enter or leave training mode, as every fit does before its first step."""
        self._fresh = mode
        super().train(mode)
        return self

    def _happen(self) -> None:
        if not self._fresh:
            return
        self._fresh = False
        path = Path(os.environ[FOLDER]) / self._name
        before = path.stat().st_size if path.exists() else 0
        path.write_text("." * (before + 1))
        if before + 1 == self._fatal:
            self._fail()

    def _fail(self) -> None:
        if self._name == "dying":
            os._exit(7)
        raise RuntimeError("out of luck")


def dying(input_shape: tuple[int, int, int], num_classes: int) -> nn.Module:
    """Return a model whose process dies when it trains for the second time."""
    return _Counting("dying", 2, input_shape, num_classes)


def raising(input_shape: tuple[int, int, int], num_classes: int) -> nn.Module:
    """Return a model that raises when it trains for the third time."""
    return _Counting("raising", 3, input_shape, num_classes)


# --- A data set of one machine -------------------------------------------------------------------


def marks(folder: Path) -> Dataset:
    """Read the data set ``marks`` from a file that only one machine has."""
    tensors, _ = read_tensors(folder / "marks.safetensors")
    return Dataset(name="marks", class_names=("a", "b", "c"), mean=(0.4,), std=(0.3,), **tensors)
