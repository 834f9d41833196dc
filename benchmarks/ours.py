"""Run fedkd's part of the benchmark: the images for all systems, and its two engines.

Each function runs in a process of its own, with the job that the command line names.
"""

from __future__ import annotations

from math import prod
from pathlib import Path
from time import perf_counter
from typing import Literal

import tomli_w
import torch
from safetensors.torch import save_file
from torch import Tensor
from work import ALPHA, BATCH_SIZE, LEARNING_RATE, TAU, Job

import fedkd
from fedkd.data.federated import FederatedData, federated_data
from fedkd.data.images import Images
from fedkd.records import Row
from fedkd.records.callbacks import EachRound
from fedkd.records.folder import environment
from fedkd.training.architectures import architectures_of

TASK_NETWORKS = {"cnn-5x5": "task:cnn_5x5"}
"""Networks of the benchmark that are not built into fedkd."""

MATRIX = 2048


def prepare() -> None:
    """Write the images, and measure at what rate this machine multiplies matrices."""
    job = Job.read()
    save_file(images_of(job), job.images)
    job.mark(
        "machine",
        matmul_flops=matmul_rate(),
        environment=environment("cpu", torch.get_num_threads()),
    )


def write_experiment() -> None:
    """Write the job as an experiment file for ``fedkd run --config``."""
    job = Job.read()
    text = tomli_w.dumps(experiment(job, "cohort").flat())
    Path(job.folder, "experiment.toml").write_text(text, encoding="utf-8")


def images_of(job: Job) -> dict[str, Tensor]:
    """Return public set, shards, test set and initial weights under the names that peers look for."""
    keys = experiment(job, "cohort")
    data = federated_data(keys)
    tensors = {
        "mean": torch.tensor(data.train.mean),
        "std": torch.tensor(data.train.std),
        "private_sizes": torch.tensor([len(rows) for rows in data.shards]),
        "initial": initial_weights(data, keys),
    }
    private = data.train.keep(torch.cat(data.shards))
    sets: dict[str, Images] = {"private": private, "public": data.public, "test": data.test}
    for name, images in sets.items():
        assert images.labels is not None
        tensors |= {f"{name}_images": images.pixels, f"{name}_labels": images.labels}
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def initial_weights(data: FederatedData, keys: fedkd.Experiment) -> Tensor:
    """Return the initial weights of every client as one vector, in the order of the layers."""
    architectures = architectures_of(data)
    state = architectures.initial_state(keys.student, keys.seed)
    names = [name for name, _ in architectures.model(keys.student).named_parameters()]
    return torch.cat([state[name].flatten() for name in names])


def matmul_rate(repeats: int = 20) -> float:
    """Return the best rate of a float32 product of two 2048x2048 matrices on all threads, FLOP/s."""
    a, b = torch.randn(2, MATRIX, MATRIX)
    seconds = []
    for _ in range(repeats):
        started = perf_counter()
        a @ b
        seconds.append(perf_counter() - started)
    return 2 * prod((MATRIX,) * 3) / min(seconds)


def experiment(job: Job, engine: Literal["cohort", "flower"]) -> fedkd.Experiment:
    """Return the job as an experiment.

    FedMD's rounds are the work from the second on; in its first, which is left out of the figures, an
    epoch over the public labels stands in for the digest.
    """
    work = job.work
    return fedkd.Experiment(
        dataset=work.dataset,
        train_size=work.private_size + work.public_size,
        test_size=work.test_size,
        public_size=work.public_size,
        public_labels=True,
        partition="iid",
        num_clients=work.num_clients,
        student=TASK_NETWORKS.get(work.student, work.student),
        strategy="FedMD",
        strategy_config="transfer_epochs=1",
        num_server_rounds=job.rounds,
        evaluate_phases="last",
        local_epochs=1,
        distill_epochs=1,
        batch_size=BATCH_SIZE,
        optimizer="adam",
        learning_rate=LEARNING_RATE,
        alpha=ALPHA,
        tau=TAU,
        seed=job.seed,
        device="cpu",
        engine=engine,
        client_cpus=1.0,
        run_dir=str(Path(job.folder, "runs")),
    )


def cohort() -> None:
    """Run the job on the in-process engine."""
    run(Job.read(), "cohort")


def flower() -> None:
    """Run the job on the engine of Flower clients."""
    run(Job.read(), "flower")


def run(job: Job, engine: Literal["cohort", "flower"]) -> None:
    """Run all rounds and mark the end of each."""

    def on_round(row: Row) -> None:
        job.mark(
            "round",
            accuracy=row["accuracy_after_revisit"],
            loss_digest=row.get("loss_digest", row.get("loss_transfer")),
            loss_revisit=row["loss_revisit"],
            seconds=row["seconds"],
        )

    fedkd.run(experiment(job, engine), [EachRound(on_round)])
