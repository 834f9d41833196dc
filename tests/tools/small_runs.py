"""Runs of seconds with records to look at, and a student that fails."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor, nn

import fedkd
from fedkd.records import Row
from fedkd.training.models import build

ROUNDS = 2


def tiny(folder: Path, **keys: Any) -> fedkd.Experiment:
    small: dict[str, Any] = {
        "dataset": "digits",
        "train_size": 307,
        "test_size": 101,
        "public_size": 97,
        "num_clients": 3,
        "num_server_rounds": ROUNDS,
        "student": "mlp-7",
        "plan": "stacked",
        "run_dir": str(folder),
        "name": "tiny",
    }
    return fedkd.Experiment(**{**small, **keys})


def lines(path: Path) -> list[Row]:
    return [json.loads(line) for line in (path / "rounds.jsonl").read_text().splitlines()]


class Hopeless(nn.Module):
    """A student that raises when it is trained."""

    def __init__(self, input_shape: tuple[int, int, int], num_classes: int) -> None:
        super().__init__()
        self.inner = build("mlp-5", input_shape, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        if self.training and len(images) > 9:  # more than are tried before a run
            raise RuntimeError("no hope")
        logits: Tensor = self.inner(images)
        return logits
