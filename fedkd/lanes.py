"""Lanes: jobs that run at the same time in threads of this process, each with its share of the CPU.

A step of many small models is hundreds of short operations. Two lanes of one thread each beat one
lane of two threads there, which meet after every operation, and by far where the machine is shared:
what another process takes from one core then no longer stops the other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from copy import deepcopy
from queue import SimpleQueue
from typing import TypeVar

import torch
from torch import nn

from fedkd.stateless import Stateless

J = TypeVar("J")
R = TypeVar("R")


def in_lanes(
    run: Callable[[Stateless, J], R], jobs: Sequence[J], skeleton: nn.Module, lanes: int
) -> list[R]:
    """Return ``run(model, job)`` for every job, in their order.

    Args:
        run: what to do with a model without parameters of its own, and of its lane's own.
        jobs: taken from the front by whichever lane is free.
        skeleton: copied for every lane but the first.
        lanes: how many run at once. A job has its share of the threads also if it is the only one, as
            the number of threads decides the last bits of a product.
    """
    if lanes == 1:
        model = Stateless(skeleton)
        return [run(model, job) for job in jobs]
    threads = torch.get_num_threads()
    share = max(1, threads // lanes)
    models: SimpleQueue[Stateless] = SimpleQueue()
    for lane in range(lanes):
        models.put(Stateless(deepcopy(skeleton) if lane else skeleton))

    def one(job: J) -> R:
        torch.set_num_threads(share)  # of the calling thread
        mine = models.get()
        try:
            return run(mine, job)
        finally:
            models.put(mine)

    try:
        with ThreadPoolExecutor(lanes) as pool:
            calls = [pool.submit(copy_context().run, one, job) for job in jobs]
            try:
                return [call.result() for call in calls]
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    finally:
        torch.set_num_threads(threads)
