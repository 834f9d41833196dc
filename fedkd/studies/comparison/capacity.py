"""How much memory this process has taken and how much is left, on the machine and on its GPU."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import torch

_CUDA_CONTEXT = 600 << 20
"""Bytes of a GPU that a process takes besides its tensors, about."""


def peak_bytes() -> int:
    """Return the most memory that this process has held so far."""
    try:
        status = Path("/proc/self/status").read_text()
        return int(re.findall(r"VmHWM:\s*(\d+) kB", status)[0]) << 10
    except (OSError, IndexError):  # not Linux, where ru_maxrss would begin at the parent's
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak << 10


def free_bytes() -> int | None:
    """Return the memory that new processes can have, or `None` where the system does not say."""
    try:
        told = Path("/proc/meminfo").read_text()
    except OSError:
        return None
    free = int(re.findall(r"MemAvailable:\s*(\d+) kB", told)[0]) << 10
    return min([free, *_control_group_bytes()])


def _control_group_bytes() -> list[int]:
    """Return what the control groups around this process leave it, where there are limits."""
    try:
        groups = Path("/proc/self/cgroup").read_text()
    except OSError:
        return []
    left = []
    for base, controller, most, now in (
        ("/sys/fs/cgroup", "", "memory.max", "memory.current"),
        ("/sys/fs/cgroup/memory", "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        found = re.findall(rf"^\d+:{controller}:/?(.*)$", groups, re.MULTILINE)
        left += left_in(Path(base, *found[:1]), most, now)
    return left


def left_in(group: Path, most: str, now: str) -> list[int]:
    """Return the bytes that a control group and those around it have left, of those with a limit.

    Args:
        group: its folder.
        most: the file with its limit.
        now: the file with what it holds.
    """
    left = []
    for folder in (group, *group.parents):
        limit, taken = _number(folder / most), _number(folder / now)
        if limit is not None and taken is not None:
            # What the kernel would give back when asked is not taken.
            left.append(limit - taken + _cache(folder))
    return left


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # no such file, or "max"
        return None


def _cache(group: Path) -> int:
    try:
        told = (group / "memory.stat").read_text()
    except OSError:
        return 0
    return sum(map(int, re.findall(r"^inactive_file (\d+)$", told, re.MULTILINE)))


def gpu_peak_bytes() -> int:
    """Return the most memory of its GPU that this process has held so far, 0 if it uses none."""
    if not torch.cuda.is_initialized():
        return 0
    return torch.cuda.max_memory_reserved() + _CUDA_CONTEXT


def gpu_free_bytes() -> int:
    """Return the memory of its GPU that is free, this process' own included; 0 if it uses none."""
    if not torch.cuda.is_initialized():
        return 0
    free, _ = torch.cuda.mem_get_info()
    return free + torch.cuda.memory_reserved() + _CUDA_CONTEXT
