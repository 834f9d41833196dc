"""Students and a worker that meet with accidents: clients name them by ``broken_models:accident_0`` etc.

What is to happen is the name of a file in a folder that all processes of a run know; who does it
takes the file away, so that it happens once.
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

from fedkd.engines.worker import Worker
from fedkd.training.models import build

FOLDER = "FEDKD_TEST_FOLDER"
"""Variable that names the folder."""

NODE = "FEDKD_TEST_NODE"
"""Variable that names the machine of a cluster on which a process runs."""

SLOW_S = 2.0
FOR_EVER_S = 10_000.0


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


class _Accidental(nn.Module):
    """An MLP that does what is due when it is about to train."""

    def __init__(self, number: int, input_shape: tuple[int, int, int], num_classes: int) -> None:
        super().__init__()
        self.inner = build("mlp-7", input_shape, num_classes)
        self._number = number

    def forward(self, images: Tensor) -> Tensor:
        """Return logits, or do not."""
        if self.training:
            self._happen()
        logits: Tensor = self.inner(images)
        return logits

    def _happen(self) -> None:
        client = f"client-{self._number}"
        if is_due(f"{client}-killed"):  # as by the kernel when memory runs out
            os.kill(os.getpid(), signal.SIGKILL)
        if is_due(f"{client}-hangs"):
            time.sleep(FOR_EVER_S)
        if is_due(f"{client}-slow"):
            time.sleep(SLOW_S)
        if is_due(f"{client}-memory"):
            exhaust_memory()
        if os.environ.get(NODE, "head") != "head" and is_due("machine-dies"):
            end_the_machine()


def accident_0(input_shape: tuple[int, int, int], num_classes: int) -> nn.Module:
    """Return the student of client 0."""
    return _Accidental(0, input_shape, num_classes)


def accident_1(input_shape: tuple[int, int, int], num_classes: int) -> nn.Module:
    """Return the student of client 1."""
    return _Accidental(1, input_shape, num_classes)


def accident_2(input_shape: tuple[int, int, int], num_classes: int) -> nn.Module:
    """Return the student of client 2."""
    return _Accidental(2, input_shape, num_classes)


def accident_3(input_shape: tuple[int, int, int], num_classes: int) -> nn.Module:
    """Return the student of client 3."""
    return _Accidental(3, input_shape, num_classes)


STUDENTS = ",".join(f"broken_models:accident_{k}" for k in range(4))
"""The ``student`` of four clients."""


class Forgetful(Worker):
    """A worker that runs out of memory outside its clients' training."""

    def handle(self, contents: Any, sent: Any) -> Any:
        """Answer, or have no memory to."""
        if contents and is_due("worker-memory"):
            raise MemoryError("no room for the replies")
        return super().handle(contents, sent)
