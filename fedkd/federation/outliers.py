"""Who is at fault if good replies are bad together: the fewest of those farthest from the middle."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from fedkd.clients.instructions import ClientReport
from fedkd.knowledge import ClassMeans, SoftLabels, Weights
from fedkd.knowledge.robust import coordinate_median
from fedkd.training.parameters import State


def farthest_first(
    reports: Sequence[ClientReport], start: Callable[[str], Mapping[str, Tensor]]
) -> list[int]:
    """Return the clients in order of their answers' distance from the coordinate-wise median.

    The distance is the root mean square over all numbers of an answer. Of equal ones the later
    partition comes first.

    Args:
        reports: with answers of one kind.
        start: the weights ``[...]`` by name with which clients of an architecture began. They count as
            one answer more, so that two clients, or one, have a middle.
    """
    distances: dict[int, float] = {}
    answers = [report.answer for report in reports]
    if labels := [answer for answer in answers if isinstance(answer, SoftLabels)]:
        rows = SoftLabels.stack(labels)
        distances = _by_client(rows.clients, _distances(rows.values, rows.mask))
    elif means := [answer for answer in answers if isinstance(answer, ClassMeans)]:
        stack = ClassMeans.stack(means)
        distances = _by_client(stack.clients, _distances(stack.values, stack.present))
    else:
        weights = Weights.stack([answer for answer in answers if isinstance(answer, Weights)])
        for name, part in weights.by_model.items():
            found = _of_weights(part.tensors, start(name))
            distances |= _by_client(part.clients, found)
    return sorted(distances, key=lambda client: (distances[client], client), reverse=True)


def least(most: int, works: Callable[[int], bool]) -> int | None:
    """Return the least number from 1 to `most` that works, if more always work where fewer do.

    Doubled until it works, then halved: a few tries, however many there are. ``None`` if `most` does
    not work either.
    """
    fails, tried = 0, min(1, most)
    while tried > fails and not works(tried):
        fails, tried = tried, min(2 * tried, most)
    if tried <= fails:
        return None
    while tried - fails > 1:
        middle = (tried + fails) // 2
        fails, tried = (fails, middle) if works(middle) else (middle, tried)
    return tried


def _by_client(clients: Tensor, distances_K: Tensor) -> dict[int, float]:
    return dict(zip(clients.tolist(), distances_K.tolist(), strict=True))


def _distances(values: Tensor, mask: Tensor) -> Tensor:
    """Return the distances ``[K]`` of ``[K, N, C]`` where `mask` ``[K, N]`` is true."""
    exact = values.double()  # squares of float32 do not overflow
    apart = (exact - coordinate_median(exact, mask)).square().mean(-1).masked_fill(~mask, 0.0)
    return (apart.sum(1) / mask.sum(1).clamp_min(1)).sqrt()


def _of_weights(tensors: State | Mapping[str, Tensor], start: Mapping[str, Tensor]) -> Tensor:
    """Return the distances ``[K]`` of weights, ``[K, ...]`` by name."""
    total, count = torch.zeros(1, dtype=torch.float64), 0
    for name, stacked in tensors.items():
        if not stacked.is_floating_point():
            continue
        values = torch.cat([stacked, start[name].to(stacked).unsqueeze(0)]).flatten(1).unsqueeze(1)
        everyone = torch.ones(values.shape[:2], dtype=torch.bool)
        size = values.shape[-1]
        total = total + _distances(values, everyone)[:-1].square() * size
        count += size
    return (total / max(count, 1)).sqrt()
