"""Memory used by this process and memory left, on the machine and on its GPU."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import torch

_CUDA_CONTEXT = 600 << 20
"""Approximate bytes of a GPU that a process uses besides its tensors."""


def peak_bytes() -> int:
    """Return the peak memory of this process in bytes."""
    try:
        status = Path("/proc/self/status").read_text()
        return int(re.findall(r"VmHWM:\s*(\d+) kB", status)[0]) << 10
    except (OSError, IndexError):  # not Linux, where ru_maxrss would begin at the parent's
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak << 10


def free_bytes() -> int | None:
    """Return the bytes available to new processes, or `None` where the system does not report them."""
    try:
        meminfo = Path("/proc/meminfo").read_text()
    except OSError:
        return None
    free = int(re.findall(r"MemAvailable:\s*(\d+) kB", meminfo)[0]) << 10
    return min([free, *_control_group_bytes()])


def _control_group_bytes() -> list[int]:
    """Return the bytes that the limits of this process' control groups leave it."""
    try:
        groups = Path("/proc/self/cgroup").read_text()
    except OSError:
        return []
    left = []
    for base, controller, most, now in (
        ("/sys/fs/cgroup", "", "memory.max", "memory.current"),
        ("/sys/fs/cgroup/memory", "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        paths = re.findall(rf"^\d+:{controller}:/?(.*)$", groups, re.MULTILINE)
        left += left_in(Path(base, *paths[:1]), most, now)
    return left


def left_in(group: Path, most: str, now: str) -> list[int]:
    """Return the bytes left in a control group and its parents, for those with a limit.

    Args:
        group: its folder.
        most: the file with its limit.
        now: the file with its current use.
    """
    left = []
    for folder in (group, *group.parents):
        limit, taken = _number(folder / most), _number(folder / now)
        if limit is not None and taken is not None:
            # Cache that the kernel can reclaim does not count as used.
            left.append(limit - taken + _cache(folder))
    return left


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # no such file, or "max"
        return None


def _cache(group: Path) -> int:
    try:
        stat = (group / "memory.stat").read_text()
    except OSError:
        return 0
    return sum(map(int, re.findall(r"^inactive_file (\d+)$", stat, re.MULTILINE)))


def gpu_peak_bytes() -> int:
    """Return the peak memory of this process on its GPU in bytes; 0 if it uses none."""
    if not torch.cuda.is_initialized():
        return 0
    return torch.cuda.max_memory_reserved() + _CUDA_CONTEXT


def gpu_free_bytes() -> int:
    """Return the free bytes of its GPU plus those of this process; 0 if it uses none."""
    if not torch.cuda.is_initialized():
        return 0
    free, _ = torch.cuda.mem_get_info()
    return free + torch.cuda.memory_reserved() + _CUDA_CONTEXT
