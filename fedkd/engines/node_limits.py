"""What a server's messages may cost a node of a deployment: memory, disk and time.

A SuperNode handles each message in a process of its own, so that a limit of that process is one of the
message.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from math import inf
from pathlib import Path

from fedkd.data.cache import data_folder
from fedkd.data.datasets import DATASETS
from fedkd.errors import FedkdError, Setting
from fedkd.experiment import Experiment

GB = 10**9

KEYS = ("max-memory", "max-disk", "max-seconds")
"""Keys of ``--node-config``."""

DISK_GB, SECONDS = 10.0, 3600.0
"""The defaults of ``max-disk`` and ``max-seconds``; that of ``max-memory`` is half of the machine's."""


@dataclass(frozen=True)
class NodeLimits:
    """Limits that a node sets for itself.

    Attributes:
        memory: bytes that a message's process may allocate.
        disk: bytes that states and cached partitions of all runs may take.
        seconds: time for a message, whatever its own deadline.
    """

    memory: float
    disk: float
    seconds: float

    @classmethod
    def of(cls, config: Mapping[str, object]) -> NodeLimits:
        """Return the limits of a node's configuration.

        Raises:
            FedkdError: a limit is not a positive number.
        """
        defaults = (_machine_memory() / 2 / GB, DISK_GB, SECONDS)
        memory, disk, seconds = (
            _positive(key, config.get(key, default))
            for key, default in zip(KEYS, defaults, strict=True)
        )
        return cls(memory * GB, disk * GB, seconds)

    def limit_memory(self) -> None:
        """Limit what this process may allocate from now on, where the system can (Linux, macOS)."""
        if find_spec("resource") is None:
            return
        resource = import_module("resource")
        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        limit = int(self.memory)
        if hard not in (-1, resource.RLIM_INFINITY):
            limit = min(limit, hard)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))

    def check_disk(self, folders: Iterable[Path]) -> None:
        """Raise an error if the files in these folders take more than the limit.

        Raises:
            FedkdError: they do; the text says how much.
        """
        taken = sum(_size(folder) for folder in folders)
        if taken > self.disk:
            raise FedkdError(
                f"this node's runs take {taken / GB:.2f} GB, more than its max-disk = "
                f"{self.disk / GB:g}: delete runs that have ended there"
            )


def check_present(experiment: Experiment) -> None:
    """Refuse data sets that this node would have to download.

    Args:
        experiment: of a message, with the node's own data folder.

    Raises:
        FedkdError: a data set of the run is not there.
    """
    folder = data_folder(experiment.data_dir)
    for key in ("dataset", "public"):
        name = str(getattr(experiment, key))
        needs = name in DATASETS and DATASETS[name].needs_download
        if needs and not (folder / f"{name}.safetensors").exists():
            raise FedkdError(
                Setting(key, name),
                f" of the run is not on this node, which downloads nothing because a server says so: "
                f"prepare it there by fedkd data {name}",
            )


def _positive(key: str, value: object) -> float:
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < inf:
        return float(value)
    raise FedkdError(f"{key} = {value!r} (from this node's --node-config): must be a number > 0")


def _machine_memory() -> float:
    """Return the bytes of memory of this machine."""
    if "SC_PHYS_PAGES" not in os.sysconf_names:
        return 16.0 * GB
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def _size(folder: Path) -> int:
    """Return the bytes that the files of a folder take on disk; holes take none."""
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            status = Path(parent, name).lstat()
            total += getattr(status, "st_blocks", status.st_size // 512) * 512
    return total
