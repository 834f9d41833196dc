"""Measure the time spent in the parts of the hot path; costs nothing unless a run is profiled.

Parts are those of the hot path: ``data`` (gather, augment, normalise), ``forward``, ``backward``,
``optimizer``, ``predict``, ``evaluate``. A part inside another counts only towards the outer one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from time import perf_counter
from types import TracebackType

import torch

Seconds = dict[str, float]

TIMED = "part"
"""Prefix of a part's name among the seconds of a client report."""

_running: ContextVar[Seconds | None] = ContextVar("seconds by part", default=None)


@contextmanager
def profiled(enabled: bool = True) -> Iterator[Seconds]:
    """Yield seconds by part, filled while the block runs; empty unless `enabled`.

    On a GPU every part then waits for the device, so that its time is its own: a profiled run is
    slower than others.
    """
    seconds: Seconds = {}
    token = _running.set(seconds if enabled else None)
    try:
        yield seconds
    finally:
        _running.reset(token)


class timed:
    """Measures the block as a part, inside `profiled`."""

    __slots__ = ("_name", "_seconds", "_started", "_token")

    def __init__(self, name: str) -> None:
        self._name = name

    def __enter__(self) -> None:
        self._seconds = _running.get()
        if self._seconds is not None:
            self._token = _running.set(None)
            _wait_for_the_device()
            self._started = perf_counter()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._seconds is not None:
            _wait_for_the_device()
            spent = perf_counter() - self._started
            self._seconds[self._name] = self._seconds.get(self._name, 0.0) + spent
            _running.reset(self._token)


def _wait_for_the_device() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
