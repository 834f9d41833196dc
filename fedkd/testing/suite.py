"""Run all checks of a strategy, in order."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from time import monotonic

from fedkd.errors import FedkdError, one_line
from fedkd.experiment import Experiment
from fedkd.strategy import DistillationStrategy
from fedkd.testing import aggregation, declarations, replies, rounds
from fedkd.testing.bench import Bench
from fedkd.testing.outcomes import (
    CheckResult,
    CheckResults,
    NotApplicable,
    StrategyCheckFailed,
    Wrong,
)
from fedkd.user_code import user_location

_ADVICE = {
    "server-model = 'none': there is no model": "declare server_model='required' in facts",
    "object has no attribute": "look the name up in docs/write-a-strategy.md, or in its class",
}
"""What to change, by a part of an exception's text."""

_UNKNOWN_TO_IT = (
    "a strategy has its settings and methods only: keep what lasts between rounds in "
    "server.state['{name}'], in update"
)
"""What to change if a strategy reads an attribute that it has not got."""


@dataclass(frozen=True)
class Check:
    """One thing that is true of every strategy.

    Attributes:
        name: as it is printed.
        function: raises `Wrong`, or `NotApplicable`; its docstring says what it shows.
        after: checks that have to pass first: otherwise this one would only repeat their failure.
    """

    name: str
    function: Callable[[Bench], None]
    after: tuple[str, ...] = ()

    @property
    def shows(self) -> str:
        """What is true of a strategy that passes."""
        return (self.function.__doc__ or "").partition("\n")[0]


_RULE = ("phases", "types")
_ROUNDS = ("rounds",)

CHECKS = (
    Check("settings", declarations.settings),
    Check("facts", declarations.facts),
    Check("phases", declarations.phases),
    Check("client-code", declarations.client_code, ("phases",)),
    Check("types", aggregation.types, ("phases",)),
    Check("order", aggregation.order, _RULE),
    Check("alone", aggregation.alone, _RULE),
    Check("simplex", aggregation.simplex, _RULE),
    Check("equal", aggregation.equal, (*_RULE, "simplex")),
    Check("mask", aggregation.mask, (*_RULE, "simplex", "equal")),
    Check("pure", aggregation.pure, _RULE),
    Check("request", rounds.request, ("phases",)),
    Check(
        "rounds",
        rounds.rounds,
        ("settings", "facts", "client-code", "types", "simplex", "request"),
    ),
    Check("bad-replies", replies.bad_replies, _ROUNDS),
    Check("few-replies", replies.few_replies, (*_ROUNDS, "bad-replies")),
    Check("quorum", rounds.quorum, (*_ROUNDS, "bad-replies")),
    Check("partial", rounds.partial, (*_ROUNDS, "bad-replies")),
    Check("repeat", rounds.repeat, (*_ROUNDS, "pure")),
    Check("state", rounds.state, (*_ROUNDS, "pure", "repeat")),
    Check("plans", rounds.plans, (*_ROUNDS, "repeat")),
    Check("samples", rounds.samples, (*_ROUNDS, "alone", "bad-replies")),
    Check("bytes", rounds.measured_bytes, _ROUNDS),
    Check("public-labels", rounds.public_labels, _ROUNDS),
    Check("server-model", rounds.server_model, _ROUNDS),
    Check("local-teacher", rounds.local_teacher, _ROUNDS),
    Check("mixed", rounds.mixed, _ROUNDS),
    Check("codec", rounds.codec, _ROUNDS),
    Check("engines", rounds.both_engines, _ROUNDS),
)


def check_strategy(
    strategy: DistillationStrategy, experiment: Experiment | None = None, *, engines: bool = False
) -> CheckResults:
    """Run all checks of a strategy.

    Args:
        strategy: with the settings that are to be checked.
        experiment: the data, models and training to use; by default the smallest that there are.
            Numbers of clients, rounds and samples are varied in any case.
        engines: whether to run three rounds on Ray as well (about 10 s).

    Returns:
        One result a check.

    Raises:
        StrategyCheckFailed: a check failed; the text has all that did, and what to change.
    """
    checks = CheckResults(strategy.name(), tuple(examine(strategy, experiment, engines=engines)))
    if checks.failures:
        raise StrategyCheckFailed(checks)
    return checks


def examine(
    strategy: DistillationStrategy, experiment: Experiment | None = None, *, engines: bool = False
) -> Iterator[CheckResult]:
    """Yield the result of each check, failed ones too, as soon as it has run; see `check_strategy`."""
    with tempfile.TemporaryDirectory(prefix="fedkd-check-") as folder:
        bench = Bench(strategy, experiment, Path(folder), engines)
        failed: set[str] = set()
        for check in CHECKS:
            first = next((name for name in check.after if name in failed), None)
            if first is not None:
                result = CheckResult(check.name, check.shows, "not tried", f"fix {first} first")
            else:
                result = _result_of(check, bench)
            if result.result in ("failed", "not tried"):
                failed.add(check.name)
            yield result


def _result_of(check: Check, bench: Bench) -> CheckResult:
    started = monotonic()
    try:
        check.function(bench)
    except NotApplicable as why:
        return CheckResult(
            check.name, check.shows, "not applicable", str(why), monotonic() - started
        )
    except Exception as error:
        detail = _what_to_change(error)
        return CheckResult(check.name, check.shows, "failed", detail, monotonic() - started)
    return CheckResult(check.name, check.shows, "passed", "", monotonic() - started)


def _what_to_change(error: Exception) -> str:
    """Return what to change in one line, with the line of the user's code that raised."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, Wrong):
            return str(cause)
        if isinstance(cause, AttributeError) and isinstance(cause.obj, DistillationStrategy):
            return f"{_text_of(error)}; {_UNKNOWN_TO_IT.format(name=cause.name)}"
        cause = cause.__cause__
    text = _text_of(error)
    advice = [change for part, change in _ADVICE.items() if part in text]
    return f"{text}; {advice[0]}" if advice else text


def _text_of(error: Exception) -> str:
    """Return an exception in one line, with the line of the user's code that raised it."""
    return str(error) if isinstance(error, FedkdError) else one_line(error) + user_location(error)
