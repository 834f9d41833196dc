"""Students that fail at a known time: test clients use them by ``failing_models:dying`` and the like.

How often a client has started a fit is counted in a file, as a client's calls are spread over
processes.
"""

from __future__ import annotations

import os
from pathlib import Path

from torch import Tensor, nn

from fedkd.training.models import build

FOLDER = "FEDKD_TEST_FOLDER"
"""Variable that names the folder of the counters."""


class _Counting(nn.Module):
    """An MLP that does something else when it is about to train for the n-th time."""

    def __init__(
        self, name: str, fatal: int, input_shape: tuple[int, int, int], classes: int
    ) -> None:
        super().__init__()
        self.inner = build("mlp-7", input_shape, classes)
        self._name, self._fatal = name, fatal
        self._fresh = True

    def train(self, mode: bool = True) -> _Counting:
        """Enter or leave training mode, as every fit does before its first step."""
        self._fresh = mode
        super().train(mode)
        return self

    def forward(self, images: Tensor) -> Tensor:
        if self.training and self._fresh:
            self._fresh = False
            self._count()
        logits: Tensor = self.inner(images)
        return logits

    def _count(self) -> None:
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
