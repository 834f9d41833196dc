"""Lies that are finite and well-formed: what a client sends is of the right type, shape and range.

By kind of knowledge and by name. In a module of its own that clients can import, for its model.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
from flwr.app import Array, Message
from fuzzing import Numbers, arrays_of, with_arrays, with_content
from torch import Tensor, nn

Arrays = dict[str, Numbers]
Lie = Callable[[Arrays], Arrays]

LARGEST = float(np.finfo(np.float32).max)
MAGNITUDES = (1e4, 1e8, 1e15, 1e20, 1e30, 1e38, LARGEST)


def told(reply: Message, lie: Lie) -> Message:
    """Return a reply in which a lie stands for the honest answer; without one, the reply."""
    if "knowledge" not in reply.content:
        return reply
    arrays = {name: Array(array) for name, array in lie(arrays_of(reply.content)).items()}
    return with_content(reply, with_arrays(reply.content, {**arrays}))


# --- Any numbers -----------------------------------------------------------------------------------


def _each(change: Callable[[Numbers], Numbers], only: str = "") -> Lie:
    """Change every floating-point array whose name contains `only`."""

    def lie(arrays: Arrays) -> Arrays:
        changed = dict(arrays)
        for name, array in arrays.items():
            if array.dtype == np.float32 and array.size and only in name:
                new = np.clip(change(array.astype(np.float64)), -LARGEST, LARGEST)
                changed[name] = new.astype(np.float32)
        return changed

    return lie


def _filled(array: Numbers, value: float) -> Numbers:
    return np.full_like(array, value)


def _scaled(array: Numbers, value: float) -> Numbers:
    return array * value


def _one(array: Numbers, value: float) -> Numbers:
    array.reshape(-1)[array.size // 2] = value
    return array


def _signs(array: Numbers, value: float) -> Numbers:
    """All numbers as large, with signs that alternate."""
    signs = np.where(np.arange(array.size) % 2, -1.0, 1.0)
    return signs.reshape(array.shape) * value


def _shifted(array: Numbers, value: float) -> Numbers:
    return array + value


_WAYS = {"all": _filled, "scaled": _scaled, "one": _one, "signs": _signs, "shifted": _shifted}


def _large(ways: tuple[str, ...], only: str = "") -> dict[str, Lie]:
    """Return each way at each magnitude."""
    where = f" of {only}" if only else ""
    return {
        f"{way}{where} {value:.3g}": _each(partial(_WAYS[way], value=value), only)
        for way in ways
        for value in MAGNITUDES
    }


# --- Weights ---------------------------------------------------------------------------------------


def _counters(value: int) -> Lie:
    def lie(arrays: Arrays) -> Arrays:
        return {
            name: np.full_like(array, value) if array.dtype == np.int64 else array
            for name, array in arrays.items()
        }

    return lie


WEIGHTS: dict[str, Lie] = {
    **_large(("all", "scaled", "signs"), only=""),
    **_large(("one",), only="head.weight"),
    **{
        f"variance {value:.3g}": _each(partial(_filled, value=value), "running_var")
        for value in (-1.0, -1e-4, -1e20, 0.0, 1e-38, 1e38, LARGEST)
    },
    "one variance -1": _each(partial(_one, value=-1.0), "running_var"),
    **{
        f"running mean {value:.3g}": _each(partial(_filled, value=value), "running_mean")
        for value in (1e20, LARGEST)
    },
    **{f"counters {value}": _counters(value) for value in (-1, 2**63 - 1, -(2**63))},
    "zeros": _each(partial(_filled, value=0.0)),
}
"""Of a model with a `head` and BatchNorm."""


# --- Class means -----------------------------------------------------------------------------------


def _all_in_one_class(arrays: Arrays, value: float | None = None, place: int = 0) -> Arrays:
    counts, values = arrays["counts"], arrays["values"]
    total = counts.sum()
    counts[:] = 0
    counts[place] = total
    if value is not None:
        values[place] = value
    return {"counts": counts, "values": values}


CLASS_MEANS: dict[str, Lie] = {
    **_large(("all", "scaled", "one", "signs")),
    "all in one class": _all_in_one_class,
    **{
        f"all in one class at {value:.3g}": partial(_all_in_one_class, value=value, place=-1)
        for value in (1e15, 1e19, LARGEST)
    },
    "zeros": _each(partial(_filled, value=0.0)),
}


# --- Soft labels -----------------------------------------------------------------------------------

LOGITS: dict[str, Lie] = {
    **_large(("all", "scaled", "one", "signs", "shifted")),
    "negative": _each(partial(_filled, value=-LARGEST)),
    "zeros": _each(partial(_filled, value=0.0)),
}


def _rows(change: Callable[[Numbers], Numbers]) -> Lie:
    return lambda arrays: {**arrays, "values": change(arrays["values"]).astype(np.float32)}


def _sure(values: Numbers, place: int = 0, rest: float = 0.0, total: float = 1.0) -> Numbers:
    """Rows of one class, of which the others have next to nothing."""
    rows = np.full_like(values, rest)
    rows[..., place] = total
    return rows


def _wrong(values: Numbers) -> Numbers:
    """The least likely class for certain."""
    wrong: Numbers = np.eye(values.shape[-1])[values.argmin(-1)]
    return wrong


PROBABILITIES: dict[str, Lie] = {
    "uniform": _rows(lambda values: np.full_like(values, 1 / values.shape[-1])),
    "wrong": _rows(_wrong),
    "one class": _rows(_sure),
    "the last class": _rows(partial(_sure, place=-1)),
    "denormal": _rows(partial(_sure, rest=1e-45)),
    "tiny": _rows(partial(_sure, rest=1e-38)),
    "above the border": _rows(partial(_sure, total=1.0009)),
    "below the border": _rows(partial(_sure, total=0.9991)),
    "all above": _rows(lambda values: values * 1.0009),
    "all below": _rows(lambda values: values * 0.9991),
    "negative zeros": _rows(partial(_sure, rest=-0.0)),
    "two classes": _rows(lambda values: (_sure(values) + _sure(values, -1)) / 2),
}


# --- A model to lie about --------------------------------------------------------------------------


class Normed(nn.Module):
    """One hidden layer with BatchNorm, and a head."""

    def __init__(self, inputs: int, num_classes: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(inputs, 8), nn.BatchNorm1d(8), nn.ReLU())
        self.head = nn.Linear(8, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits."""
        logits: Tensor = self.head(self.body(images))
        return logits


def normed(input_shape: tuple[int, int, int], num_classes: int) -> nn.Module:
    """Build `Normed`."""
    channels, height, width = input_shape
    return Normed(channels * height * width, num_classes)
