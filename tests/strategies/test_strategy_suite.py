"""Every registered strategy passes the public suite, and no check is skipped that applies."""

from __future__ import annotations

import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from fedkd.knowledge import SoftLabels, Weights
from fedkd.losses import Term
from fedkd.phases import Procedure
from fedkd.registry import strategies
from fedkd.strategy import DistillationStrategy
from fedkd.testing import CHECKS, CheckResult, examine
from fedkd.testing.bench import Bench

NAMES = list(strategies())
RULE = ("types", "order", "alone", "simplex", "equal", "pure")


def on_one_worker(name: str) -> Any:
    """Keep a strategy's checks together, as they are run once."""
    return pytest.param(name, marks=pytest.mark.xdist_group(f"suite-{name}"))


@cache
def findings(name: str) -> dict[str, CheckResult]:
    return {finding.check: finding for finding in examine(strategies()[name]())}


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


@pytest.mark.parametrize("check", [check.name for check in CHECKS])
@pytest.mark.parametrize("name", [on_one_worker(name) for name in NAMES])
def test_a_strategy_passes(name: str, check: str) -> None:
    finding = findings(name)[check]
    expected = "not applicable" if does_not_apply(check, strategies()[name]()) else "passed"
    assert finding.result == expected, str(finding)


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
