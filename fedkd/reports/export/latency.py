"""Latency of models for a batch, measured side by side."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from time import perf_counter

from torch import Tensor

WARM_UP = 3
"""Calls of each before the first timed one."""


def latencies(
    contenders: Mapping[str, Callable[[Tensor], object]], batch: Tensor, repeats: int
) -> dict[str, float]:
    """Return the median seconds of each contender for one batch.

    They take turns, so that other load on the machine affects all of them alike.

    Args:
        contenders: by name, called with the batch.
        batch: images.
        repeats: timed calls of each, odd.
    """
    spent: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(WARM_UP + repeats):
        for name, contender in contenders.items():
            started = perf_counter()
            contender(batch)
            if turn >= WARM_UP:
                spent[name].append(perf_counter() - started)
    return {name: median(times) for name, times in spent.items()}


def machine() -> str:
    """Return this machine's processor, number of cores and system as text."""
    name = platform.processor() or platform.machine()
    table = Path("/proc/cpuinfo")
    if table.is_file():
        models = [
            line.partition(":")[2].strip()
            for line in table.read_text(encoding="utf-8", errors="replace").splitlines()
            if line.startswith("model name")
        ]
        name = models[0] if models else name
    return f"{name}, {os.cpu_count()} cores, {platform.system()} {platform.machine()}"
