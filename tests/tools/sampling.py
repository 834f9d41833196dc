"""Long tables of cases, of which `make test` tries some and `make test-slow` all."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def one_in(every: int, values: Iterable[Any]) -> list[Any]:
    """Return parameters for `pytest.mark.parametrize`: all but one in so many are slow.

    Args:
        every: the first of so many, and so on, is in `make test`.
        values: a tuple holds the values of several arguments.
    """
    return [
        pytest.param(
            *(value if isinstance(value, tuple) else (value,)),
            marks=[pytest.mark.slow] * (number % every > 0),
        )
        for number, value in enumerate(values)
    ]
