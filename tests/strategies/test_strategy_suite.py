"""Every registered strategy passes the public suite, and no check is skipped that applies."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from sampling import one_in

from fedkd.knowledge import SoftLabels, Weights
from fedkd.losses import Term
from fedkd.phases import Procedure
from fedkd.registry import strategies
from fedkd.strategy import DistillationStrategy
from fedkd.testing import CHECKS, CheckResult, examine
from fedkd.testing.bench import Bench

NAMES = list(strategies())
RULE = ("types", "order", "alone", "simplex", "equal", "pure")
QUICK = [check.name for check in CHECKS][: [check.name for check in CHECKS].index("rounds")]
"""Checks that run no federation: `make test` has these of all strategies, the others of one in three."""


def cases() -> Iterator[Any]:
    """Yield strategies with the names of checks; those of a strategy stay on one worker, to run once."""
    for param in one_in(3, NAMES):
        (name,) = param.values
        group = pytest.mark.xdist_group(f"suite-{name}")
        for check in CHECKS:
            marks = [] if check.name in QUICK else param.marks
            yield pytest.param(name, check.name, marks=[group, *marks])


class Examination:
    """A strategy's checks, each run when it is asked for, after those before it."""

    def __init__(self, strategy: DistillationStrategy) -> None:
        self._running = examine(strategy)
        self._done: dict[str, CheckResult] = {}

    def result(self, check: str) -> CheckResult:
        while check not in self._done:
            result = next(self._running)
            self._done[result.check] = result
        return self._done[check]


@pytest.fixture(scope="module")
def examined() -> Callable[[str], Examination]:
    """Return what gives the examination of a strategy, of which there is one while this module runs."""
    return cache(lambda name: Examination(strategies()[name]()))


def brings_code(strategy: DistillationStrategy) -> bool:
    module = sys.modules[type(strategy).__module__]
    return any(
        isinstance(value, Term | Procedure) and value.function.__module__ == module.__name__
        for value in vars(module).values()
    )


def does_not_apply(check: str, strategy: DistillationStrategy) -> bool:
    uploads, model = strategy.uploads(), strategy.facts.server_model
    return {
        **dict.fromkeys(RULE, uploads is None),
        "mask": uploads in (None, Weights),
        "request": uploads is not SoftLabels,
        "codec": uploads is not SoftLabels,
        "samples": uploads is not SoftLabels or model == "required",
        "server-model": model == "none",
        "client-code": not brings_code(strategy),
        "engines": True,  # below
    }.get(check, False)


@pytest.mark.parametrize(("name", "check"), [*cases()])
def test_a_strategy_passes(examined: Callable[[str], Examination], name: str, check: str) -> None:
    result = examined(name).result(check)
    applies = not does_not_apply(check, strategies()[name]())
    assert result.result == ("passed" if applies else "not applicable"), str(result)


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.parametrize("name", ["CFD", *(n for n in NAMES if brings_code(strategies()[n]()))])
def test_both_engines_agree(name: str, tmp_path: Path) -> None:
    """Of those that bring code, and one that remembers what was sent; `fedkd check` does any."""
    (check,) = (check for check in CHECKS if check.name == "engines")
    check.function(Bench(strategies()[name](), None, tmp_path, engines=True))


def test_there_are_strategies_and_checks() -> None:
    assert len(NAMES) >= 16
    assert len({check.name for check in CHECKS}) == len(CHECKS) >= 25
    assert all(check.shows.endswith(".") for check in CHECKS)
