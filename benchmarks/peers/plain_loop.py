"""A plain PyTorch loop: one process, client after client, images normalised once and kept in memory.

No ``DataLoader``, no framework: batches are indices, and PyTorch uses all threads. `main` is the loop as
one would write it first; `tuned` is the same with channels-last images and convolutions, and is run with
environment variables that tell glibc's allocator to keep what it has.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from task import initial_network, load, load_shard, loss, mean, share_right
from torch import Tensor, nn
from work import BATCH_SIZE, LEARNING_RATE, Job

TEST_BATCH_SIZE = 1_000


@dataclass
class Client:
    """A client's model and private images."""

    model: nn.Module
    images: Tensor
    labels: Tensor


def main() -> None:
    """Run the job that the command line names."""
    run(Job.read())


def tuned() -> None:
    """Run it with channels-last images and models."""
    run(Job.read(), torch.channels_last)


def run(job: Job, layout: torch.memory_format = torch.contiguous_format) -> None:
    """Run all rounds and mark the end of each."""
    torch.manual_seed(job.seed)
    public_images, public_labels = load(job.images, "public")
    test_images, test_labels = load(job.images, "test")
    public_images = public_images.contiguous(memory_format=layout)
    test_images = test_images.contiguous(memory_format=layout)
    clients = [client_of(job, number, layout) for number in range(job.work.num_clients)]
    taught: Tensor | None = None
    for _ in range(job.rounds):
        logits, accuracies, digested, revisited = [], [], [], []
        for client in clients:
            digested.append(train(client.model, public_images, public_labels, taught))
            revisited.append(train(client.model, client.images, client.labels))
            logits.append(predict(client.model, public_images))
            accuracies.append(share_right(predict(client.model, test_images), test_labels))
        taught = torch.stack(logits).mean(0)
        job.mark(
            "round",
            accuracy=mean(accuracies),
            loss_digest=mean(digested),
            loss_revisit=mean(revisited),
        )


def client_of(job: Job, number: int, layout: torch.memory_format) -> Client:
    """Return a client with its shard and the initial weights."""
    images, labels = load_shard(job.images, number)
    model = initial_network(job.work.student, job.images).to(memory_format=layout)
    return Client(model, images.contiguous(memory_format=layout), labels)


def train(model: nn.Module, images: Tensor, labels: Tensor, taught: Tensor | None = None) -> float:
    """Train for one epoch with a fresh Adam; return the mean loss of its steps."""
    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)
    model.train()
    losses = []
    for rows in torch.randperm(len(images)).split(BATCH_SIZE):
        optimizer.zero_grad()
        value = loss(model(images[rows]), labels[rows], None if taught is None else taught[rows])
        value.backward()
        optimizer.step()
        losses.append(value.item())
    return mean(losses)


@torch.no_grad()
def predict(model: nn.Module, images: Tensor) -> Tensor:
    """Return logits ``[N, 10]``."""
    model.eval()
    return torch.cat([model(batch) for batch in images.split(TEST_BATCH_SIZE)])
