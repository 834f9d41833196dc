"""Assign CPUs and GPUs to the workers of all machines, and to Flower's clients on this one."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fedkd.errors import FedkdError, Setting


def placement(groups: Sequence[str], sizes: Sequence[int], num_workers: int) -> list[int]:
    """Return the worker of each client; the numbers of a group's clients a worker differ by at most one.

    A group's clients, the largest shard first, go one by one to the worker that has the fewest of the
    group, and among these the fewest images.

    Args:
        groups: by client, what is run together (its architectures).
        sizes: by client, its private images.
        num_workers: number of workers.
    """
    worker_of = [0] * len(groups)
    images = [0] * num_workers
    for group in sorted(set(groups)):
        has = [0] * num_workers
        members = [client for client, name in enumerate(groups) if name == group]
        for client in sorted(members, key=lambda k: -sizes[k]):
            worker = min(range(num_workers), key=lambda w: (has[w], images[w], w))
            worker_of[client] = worker
            has[worker] += 1
            images[worker] += sizes[client]
    return worker_of


@dataclass(frozen=True)
class Share:
    """What a worker takes of a machine: whole CPUs, as many threads or fewer, part of a GPU."""

    cpus: int
    gpus: float
    threads: int


def share_of(nodes: Sequence[Mapping[str, float]], num_workers: int, on_gpu: bool) -> Share:
    """Return the largest share that the workers can have, all the same.

    Args:
        nodes: the ``CPU`` and ``GPU`` of each machine.
        num_workers: number of shares.
        on_gpu: whether each needs a GPU, or a fraction if there are fewer than workers.

    Raises:
        FedkdError: there are fewer CPUs than workers, or no GPU.
    """
    gpus = sum(int(node.get("GPU", 0)) for node in nodes)
    if on_gpu and not gpus:
        raise FedkdError(
            Setting("num-workers", num_workers), " on device = 'cuda': Ray knows of no GPU"
        )
    workers_per_gpu = math.ceil(num_workers / gpus) if on_gpu else 0

    def places(cpus: int) -> int:
        count = 0
        for node in nodes:
            by_cpu = int(node.get("CPU", 0)) // cpus
            by_gpu = int(node.get("GPU", 0)) * workers_per_gpu
            count += min(by_cpu, by_gpu) if on_gpu else by_cpu
        return count

    most = max((int(node.get("CPU", 0)) for node in nodes), default=0)
    cpus = next((cpus for cpus in range(most, 0, -1) if places(cpus) >= num_workers), 0)
    if not cpus:
        total = sum(int(node.get("CPU", 0)) for node in nodes)
        raise FedkdError(
            Setting("num-workers", num_workers),
            f": each takes a CPU, and the cluster has {total} where "
            f"{'a GPU is' if on_gpu else 'they are'}; lower num-workers",
        )
    return Share(cpus, 1 / workers_per_gpu if on_gpu else 0.0, cpus)


def check_resources(
    num_clients: int, client_cpus: float, client_gpus: float, num_cpus: int | None = None
) -> dict[str, int]:
    """Return the CPUs and GPUs to start Ray with: at most what the clients can use at once.

    Flower starts a worker for every share of a CPU, and hangs when there is none.

    Raises:
        FedkdError: this machine has no such share.
    """
    cpus = num_cpus if num_cpus is not None else available_cpus()
    gpus = 0
    if client_gpus > 0:
        import torch

        gpus = torch.cuda.device_count()
    if not 0 < client_cpus <= cpus:
        raise FedkdError(
            Setting("client-cpus", client_cpus),
            f": a client needs more than 0 and at most the {cpus} "
            f"CPU{'s' * (cpus != 1)} that this run may use",
        )
    if not 0 <= client_gpus <= gpus:
        raise FedkdError(
            Setting("client-gpus", client_gpus),
            f": a client takes at least 0 and at most the {gpus} GPU{'s' * (gpus != 1)} "
            "of this machine",
        )
    if client_gpus > 1 and client_gpus % 1:
        raise FedkdError(Setting("client-gpus", client_gpus), ": above 1 it must be a whole number")
    return {
        "num_cpus": min(cpus, math.ceil(num_clients * client_cpus)),
        "num_gpus": min(gpus, math.ceil(num_clients * client_gpus)),
    }


def available_cpus() -> int:
    """Return how many CPUs this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
