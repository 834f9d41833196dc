"""The work that every system does, what it costs, and how a system records what it did.

A round, for each of K clients: one epoch over the labelled public images against the mean of all clients'
logits of the round before (in the first round against the labels alone), one epoch over the private
images, logits for the public images, one test. Batches of 64, a fresh Adam in each epoch.

Nothing here imports torch, so that the command which watches the systems shares no memory with them.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from math import ceil
from pathlib import Path
from time import monotonic
from typing import Any

BATCH_SIZE = 64
LEARNING_RATE = 1e-3
ALPHA = 0.7
TAU = 5.0

MACS = {
    "mlp-20": (784 * 20, 20 * 20, 20 * 10),
    "cnn": (28 * 28 * 16 * 9, 14 * 14 * 32 * 16 * 9, 7 * 7 * 64 * 32 * 9, 576 * 10),
    "cnn-5x5": (28 * 28 * 16 * 25, 14 * 14 * 32 * 16 * 25, 1568 * 10),
}
"""Multiplications of an MNIST image, layer by layer, in one forward pass; one addition goes with each."""


@dataclass(frozen=True)
class Work:
    """One cell of the table.

    Attributes:
        student: the clients' network, a key of `MACS`.
        num_clients: K.
        private_size: private images of all clients together, dealt evenly.
        public_size: images that all clients predict and are distilled on.
        test_size: images on which each client is tested once a round.
        dataset: where fedkd takes the images from.
    """

    student: str
    num_clients: int
    private_size: int
    public_size: int = 2_000
    test_size: int = 10_000
    dataset: str = "mnist"

    @classmethod
    def of(cls, student: str, num_clients: int) -> Work:
        """Return the benchmark's work: 1,000 private images a client while MNIST has as many."""
        return cls(student, num_clients, min(1_000 * num_clients, 58_000))

    @classmethod
    def tiny(cls, student: str) -> Work:
        """Return work of a second, on images that come with a dependency of fedkd."""
        return cls(student, 3, 180, public_size=120, test_size=200, dataset="mnist-5k")

    @property
    def steps(self) -> int:
        """Optimiser steps of a client in a round."""
        private = self.private_size / self.num_clients
        return ceil(self.public_size / BATCH_SIZE) + ceil(private / BATCH_SIZE)

    @property
    def flops(self) -> float:
        """Useful floating-point operations of a round, all clients: products of matrices alone.

        A layer's forward pass takes 2 a multiplication and addition. Its gradients take as many again
        for the weights, and as many again for the input, which the first layer does not need.
        """
        macs = MACS[self.student]
        forward = 2 * sum(macs)
        step = 3 * forward - 2 * macs[0]
        trained = self.private_size + self.num_clients * self.public_size
        tested = self.num_clients * (self.public_size + self.test_size)
        return float(step * trained + forward * tested)


@dataclass(frozen=True)
class Job:
    """What one process is to do.

    Attributes:
        work: the round.
        rounds: how many, the first one (which is left out of the figures) included.
        seed: of initial weights and shuffles.
        num_cpus: CPUs of the machine that may be used.
        folder: holds ``images.safetensors`` and takes ``record.jsonl``.
    """

    work: Work
    rounds: int
    seed: int
    num_cpus: int
    folder: str

    @property
    def images(self) -> str:
        """The file of images, shards and initial weights."""
        return str(Path(self.folder, "images.safetensors"))

    def write(self) -> Path:
        """Write the job into its folder and return the file."""
        path = Path(self.folder, "job.json")
        path.write_text(json.dumps(asdict(self)), encoding="utf-8")
        return path

    @classmethod
    def read(cls) -> Job:
        """Return the job that the command line names."""
        keys: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
        return cls(work=Work(**keys.pop("work")), **keys)

    def mark(self, event: str, **values: object) -> None:
        """Record an event at the present time of the clock that all processes share."""
        line = json.dumps({"event": event, "time": monotonic(), **values})
        with Path(self.folder, "record.jsonl").open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    def events(self, event: str) -> list[dict[str, Any]]:
        """Return the marks of an event so far."""
        path = Path(self.folder, "record.jsonl")
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        return [entry for entry in map(json.loads, lines) if entry["event"] == event]
