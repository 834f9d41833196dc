"""Students and a data set for tests of workers: clients name them by ``worker_models:killing`` etc.

What is to go wrong once leaves a file behind, which the next process finds.
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from torch import Tensor, nn

from fedkd.data import Dataset, read_tensors
from fedkd.training.models import build

FOLDER = "FEDKD_TEST_FOLDER"
"""Variable that names the folder of these files; what is there already does not happen."""


class _Accident(nn.Module):
    """An MLP whose process meets with an accident when it is about to train."""

    def __init__(self, name: str, input_shape: tuple[int, int, int], num_classes: int) -> None:
        super().__init__()
        self.inner = build("mlp-12", input_shape, num_classes)
        self._name = name

    def forward(self, images: Tensor) -> Tensor:
        """Return logits, or do not."""
        if self.training:
            self._happen()
        logits: Tensor = self.inner(images)
        return logits

    def _happen(self) -> None:
        if self._name != "doomed":
            try:
                (Path(os.environ[FOLDER]) / self._name).touch(exist_ok=False)
            except FileExistsError:
                return
        if self._name == "hanging":
            time.sleep(1000)
        os.kill(os.getpid(), signal.SIGKILL)


def killing(input_shape: tuple[int, int, int], num_classes: int) -> nn.Module:
    """Return a model that kills its process, once."""
    return _Accident("killing", input_shape, num_classes)


def hanging(input_shape: tuple[int, int, int], num_classes: int) -> nn.Module:
    """Return a model that sleeps for longer than any test, once."""
    return _Accident("hanging", input_shape, num_classes)


def doomed(input_shape: tuple[int, int, int], num_classes: int) -> nn.Module:
    """Return a model that kills its process every time."""
    return _Accident("doomed", input_shape, num_classes)


def marks(folder: Path) -> Dataset:
    """Read the data set ``marks`` from a file that only one machine has."""
    tensors, _ = read_tensors(folder / "marks.safetensors")
    return Dataset(name="marks", class_names=("a", "b", "c"), mean=(0.4,), std=(0.3,), **tensors)
