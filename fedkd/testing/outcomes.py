"""Results of the checks of a strategy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from fedkd.errors import FedkdError

Result = Literal["passed", "failed", "not applicable", "not tried"]


class Wrong(Exception):
    """A strategy does not do what a check requires; the text says what to change."""


class NotApplicable(Exception):
    """A check does not apply to a strategy; the text says why."""


@dataclass(frozen=True)
class CheckResult:
    """The result of one check.

    Attributes:
        check: its name.
        shows: what is true of a strategy that passes it.
        result: ``"not tried"`` if an earlier check failed on which it depends.
        detail: what to change, or why the check does not apply; empty if it passed.
        seconds: its duration.
    """

    check: str
    shows: str
    result: Result
    detail: str = ""
    seconds: float = 0.0

    def __str__(self) -> str:
        return f"{self.check}: {self.result}{f' ({self.detail})' if self.detail else ''}"


@dataclass(frozen=True)
class CheckResults:
    """The results of all checks.

    Attributes:
        strategy: its name.
        results: one a check, in order.
    """

    strategy: str
    results: tuple[CheckResult, ...]

    @property
    def failures(self) -> tuple[CheckResult, ...]:
        """The results of the checks that failed."""
        return tuple(result for result in self.results if result.result == "failed")

    def as_json(self) -> dict[str, Any]:
        """Return the results as values that JSON can hold."""
        return {"strategy": self.strategy, "findings": [vars(result) for result in self.results]}

    def __str__(self) -> str:
        return "\n".join([self.strategy, *map(str, self.results)])


class StrategyCheckFailed(FedkdError):
    """A strategy failed checks; the text names each, with what to change.

    Attributes:
        checks: the results of all checks.
    """

    def __init__(self, checks: CheckResults) -> None:
        details = "; ".join(f"{result.check}: {result.detail}" for result in checks.failures)
        count = len(checks.failures)
        super().__init__(f"{checks.strategy} fails {count} check{'s' * (count > 1)}: {details}")
        self.checks = checks
