"""Run jobs at the same time in threads of this process (lanes), each with its share of the CPU.

A step of many small models is hundreds of short operations. Two lanes of one thread each are faster
than one lane of two threads, which have to synchronise after every operation. On a shared machine they
are much faster: another process that takes time from one core no longer stops the other core.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextvars import copy_context
from copy import deepcopy
from functools import cache
from queue import SimpleQueue
from typing import TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import nn

from fedkd.training.parameters import Stateless

J = TypeVar("J")
R = TypeVar("R")


def in_lanes(
    run: Callable[[Stateless, J], R], jobs: Sequence[J], skeleton: nn.Module, lanes: int
) -> list[R]:
    """Return ``run(model, job)`` for every job, in their order.

    Args:
        run: called with a job and its lane's copy of the model, which holds no parameters.
        jobs: the next one goes to the first lane that is free.
        skeleton: copied for every lane.
        lanes: how many run at once. A job uses its share of the threads even if it is the only one, as
            the number of threads decides the last bits of a product.
    """
    if lanes == 1:
        model = Stateless(skeleton)
        return [run(model, job) for job in jobs]
    threads = torch.get_num_threads()
    share = max(1, threads // lanes)
    models: SimpleQueue[Stateless] = SimpleQueue()
    needed = min(lanes, len(jobs))
    for model in _copies(skeleton, needed):
        models.put(model)

    def one(job: J) -> R:
        torch.set_num_threads(share)  # of the calling thread
        model = models.get()
        try:
            return run(model, job)
        finally:
            models.put(model)

    calls = [_pool(needed).submit(copy_context().run, one, job) for job in jobs]
    try:
        return [call.result() for call in calls]
    finally:
        for call in calls:
            call.cancel()
        wait(calls)
        torch.set_num_threads(threads)


@cache
def _pool(lanes: int) -> ThreadPoolExecutor:
    """Return the threads of the lanes, which are reused: starting one takes as long as a step."""
    return ThreadPoolExecutor(lanes, thread_name_prefix="lane")


_COPIES: WeakKeyDictionary[nn.Module, list[Stateless]] = WeakKeyDictionary()


def _copies(skeleton: nn.Module, lanes: int) -> list[Stateless]:
    """Return a copy of a model for every lane, in the same mode."""
    copies = _COPIES.setdefault(skeleton, [])
    copies += [Stateless(deepcopy(skeleton)) for _ in range(len(copies), lanes)]
    for copy in copies[:lanes]:
        copy.module.train(skeleton.training)
    return copies[:lanes]
