"""What the checks say of a strategy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from fedkd.errors import FedkdError

Result = Literal["passed", "failed", "not applicable", "not tried"]


class Wrong(Exception):
    """A strategy does not do what a check asks of it; the text says what to change."""


class NotApplicable(Exception):
    """A check has nothing to say about this strategy; the text says why."""


@dataclass(frozen=True)
class CheckResult:
    """What one check found.

    Attributes:
        check: its name.
        shows: what is true of a strategy that passes it.
        result: ``"not tried"`` where an earlier check failed on which it rests.
        detail: what to change, or why the check does not apply; empty if it passed.
        seconds: that it took.
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
    """What all checks found.

    Attributes:
        strategy: its name.
        findings: one a check, in order.
    """

    strategy: str
    findings: tuple[CheckResult, ...]

    @property
    def failures(self) -> tuple[CheckResult, ...]:
        """The findings of the checks that failed."""
        return tuple(finding for finding in self.findings if finding.result == "failed")

    def as_json(self) -> dict[str, Any]:
        """Return plain values."""
        return {"strategy": self.strategy, "findings": [vars(finding) for finding in self.findings]}

    def __str__(self) -> str:
        return "\n".join([self.strategy, *map(str, self.findings)])


class StrategyCheckFailed(FedkdError):
    """A strategy failed checks: all of them, and what to change.

    Attributes:
        report: what all checks found.
    """

    def __init__(self, report: CheckResults) -> None:
        said = "; ".join(f"{finding.check}: {finding.detail}" for finding in report.failures)
        count = len(report.failures)
        super().__init__(f"{report.strategy} fails {count} check{'s' * (count > 1)}: {said}")
        self.report = report
