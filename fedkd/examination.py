"""What clients' models answered on the test images, brought together from where the clients left it."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from shutil import rmtree

import torch
from torch import Tensor

from fedkd.memories import TESTED, Memories, Memory
from fedkd.tested import MOST_ANSWERS, Predictions, Tested


def collected(memories: Memories, closing: Mapping[int, int], labels: Tensor) -> Tested | None:
    """Read what clients answered in the closing exchange, and tidy it away.

    Args:
        memories: of all clients, if this process shares their disk.
        closing: by client that answered, the round under which its last state is kept.
        labels: true classes of the test images, int64 ``[N]``.

    Returns:
        The answers, or `None` where there are none here, as in a deployment.
    """
    clients = sorted(closing)[: max(1, MOST_ANSWERS // len(labels))]
    found = memories.load({client: closing[client] for client in clients})
    kinds = {name for memory in found.values() for name in memory if name.startswith(TESTED)}
    models = {kind.removeprefix(TESTED): _predictions(kind, found) for kind in sorted(kinds)}
    for kind in kinds:
        rmtree(memories.folder / kind, ignore_errors=True)  # a client may be late
    with suppress(OSError):  # other memories are there, or none at all
        memories.folder.rmdir()
    return Tested(labels, models) if models else None


def _predictions(kind: str, found: Mapping[int, Memory]) -> Predictions:
    owners = [client for client, memory in found.items() if kind in memory]
    kept = [found[client][kind] for client in owners]
    classes = torch.stack([each["classes"] for each in kept])
    confidences = torch.stack([each["confidences"] for each in kept])
    return Predictions(classes, confidences, owners)
