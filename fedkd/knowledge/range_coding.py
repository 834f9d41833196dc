"""Range coding of codes on the simplex, with constriction (the extra ``codec``).

It is adaptive, so that no model has to be sent: rows are coded in blocks, each with the counts of all
blocks before it. Counts are whole numbers, hence the same on every machine.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from fedkd.errors import FedkdError

Array = npt.NDArray[Any]

FIRST_BLOCK = 16
"""Rows that are coded with an untrained model; every later block doubles the number of rows."""


class _Coder(Protocol):
    """A writer codes symbols and returns them; a reader ignores them and returns those it read."""

    def one(self, weights: Array, symbols: Array) -> Array:
        """Code symbols ``[n]`` under one distribution, `weights` ``[A]``."""

    def each(self, weights: Array, symbols: Array) -> Array:
        """Code symbols ``[n]`` under one distribution each, `weights` ``[n, A]``."""

    def even(self, sizes: Array, symbols: Array) -> Array:
        """Code symbols ``[n]``, uniform below `sizes` ``[n]`` (>= 2)."""


class _Writer:
    def __init__(self) -> None:
        self._coder = _constriction().queue.RangeEncoder()
        self._model = _constriction().model

    def one(self, weights: Array, symbols: Array) -> Array:
        self._coder.encode(_int32(symbols), self._model.Categorical(weights, perfect=False))
        return symbols

    def each(self, weights: Array, symbols: Array) -> Array:
        self._coder.encode(_int32(symbols), self._model.Categorical(perfect=False), weights)
        return symbols

    def even(self, sizes: Array, symbols: Array) -> Array:
        self._coder.encode(_int32(symbols), self._model.Uniform(), _int32(sizes))
        return symbols

    def bytes(self) -> bytes:
        compressed: Array = self._coder.get_compressed()
        return compressed.astype("<u4").tobytes()


class _Reader:
    def __init__(self, data: bytes) -> None:
        words = np.frombuffer(data, "<u4").astype(np.uint32)
        self._coder = _constriction().queue.RangeDecoder(words)
        self._model = _constriction().model

    def one(self, weights: Array, symbols: Array) -> Array:
        model = self._model.Categorical(weights, perfect=False)
        return self._read(model, len(symbols))

    def each(self, weights: Array, symbols: Array) -> Array:
        return self._read(self._model.Categorical(perfect=False), weights)

    def even(self, sizes: Array, symbols: Array) -> Array:
        return self._read(self._model.Uniform(), _int32(sizes))

    def _read(self, *arguments: Any) -> Array:
        try:
            symbols: Array = self._coder.decode(*arguments)
        except (AssertionError, ValueError) as error:  # raised for bytes that no encoder wrote
            raise FedkdError(f"values are not a range code: {error}") from None
        return symbols.astype(np.int64)


def _constriction() -> Any:
    try:
        import constriction
    except ImportError:
        raise FedkdError("pack = 'range' needs constriction: pip install 'fedkd[codec]'") from None
    return constriction.stream


def _int32(array: Array) -> Array:
    return np.ascontiguousarray(array, dtype=np.int32)


def range_coded(symbols: Array, bits: int, classes: int) -> bytes:
    """Return the bytes of symbols, int64 ``[n]``: codes of `bits` bits, row by row; at one bit, classes.

    Raises:
        FedkdError: constriction is not installed.
    """
    writer = _Writer()
    _walk(writer, symbols.copy(), bits, classes)
    return writer.bytes()


def range_decoded(data: bytes, count: int, bits: int, classes: int) -> Array:
    """Return `count` symbols, int64 ``[count]``.

    Raises:
        FedkdError: the bytes are not the code of so many symbols, or constriction is not installed.
    """
    if len(data) % 4:
        raise FedkdError(f"values have {len(data)} bytes: must be a multiple of 4 for range coding")
    symbols = _walk(_Reader(data), np.zeros(count, np.int64), bits, classes)
    # A reader decodes any bytes, even too few, but the code of these symbols is unique.
    if range_coded(symbols, bits, classes) != data:
        raise FedkdError("values are not a range code: their symbols have another code")
    return symbols


def _walk(coder: _Coder, symbols: Array, bits: int, classes: int) -> Array:
    """Code all symbols, int64 ``[n]``, and return them."""
    if bits == 1:
        return _walk_classes(coder, symbols, classes)
    return _walk_rows(coder, symbols.reshape(-1, classes), bits).reshape(-1)


def _blocks(count: int) -> Iterator[slice]:
    """Yield blocks of 0 .. count - 1, each as long as all before it together."""
    start = 0
    while start < count:
        stop = max(FIRST_BLOCK, 2 * start)
        yield slice(start, min(stop, count))
        start = stop


def _walk_classes(coder: _Coder, winners: Array, classes: int) -> Array:
    if classes == 1:
        return np.zeros_like(winners)
    counts = np.ones(classes)  # every class starts with half an occurrence
    for block in _blocks(len(winners)):
        winners[block] = coder.one(counts, winners[block])
        counts += 2 * np.bincount(winners[block], minlength=classes)
    return winners


def _walk_rows(coder: _Coder, rows: Array, bits: int) -> Array:
    """Code rows of codes ``[n, C]``, class by class.

    Each class takes q of a row's remaining steps. Nearly always q is almost nothing or almost all, so the
    symbol says which end is nearer and the bit length of the distance to it, under a distribution that
    depends on the remaining steps; the lower bits of the distance follow with a uniform distribution.
    The last class takes the remaining steps, and a row without any is finished.
    """
    steps = (1 << bits) - 1
    counts = np.ones((bits + 1, 2 * bits))
    for block in _blocks(len(rows)):
        part = rows[block]
        left = np.full(len(part), steps)
        for column in range(rows.shape[1] - 1):
            open_ = left.nonzero()[0]
            taken = _walk_column(coder, part[open_, column], left[open_], counts, steps)
            part[open_, column] = taken
            left[open_] -= taken
        part[:, -1] = left
    return rows


_BIT_LENGTH = np.array([n.bit_length() for n in range(256)])


def _walk_column(coder: _Coder, taken: Array, left: Array, counts: Array, steps: int) -> Array:
    """Code and return how much of `left` ``[n]`` (>= 1) each row takes for one class; update `counts`."""
    # The state of a row: the bit length of what is left, and one more for "nothing taken yet".
    state = np.where(left == steps, len(counts) - 1, _BIT_LENGTH[left] - 1)
    near_all = 2 * taken > left
    distance = np.where(near_all, left - taken, taken)
    symbol = coder.each(counts[state], 2 * _BIT_LENGTH[distance] + near_all)
    np.add.at(counts, (state, symbol), 2)
    length = symbol >> 1
    top = np.where(length > 0, 1 << np.maximum(length - 1, 0), 0)
    rest = np.zeros_like(top)
    long = top > 1
    rest[long] = coder.even(top[long], (distance - top)[long])
    distance = top + rest
    if bool((distance > left).any()):
        raise FedkdError("values are not a range code: a row takes more steps than remain")
    return np.where(symbol & 1, left - distance, distance)
