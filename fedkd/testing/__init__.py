"""Check strategies, fedkd's own and yours.

`check_strategy` tries a strategy alone, and in federations of five tiny clients with bad replies, lost
rounds and partial participation. For each thing that is wrong it says in one line what to change. It
works offline, on the digits that come with scikit-learn, and writes to a temporary folder only.
"""

from fedkd.testing.outcomes import CheckResult, CheckResults, StrategyCheckFailed
from fedkd.testing.suite import CHECKS, Check, check_strategy, examine

__all__ = [
    "CHECKS",
    "Check",
    "CheckResult",
    "CheckResults",
    "StrategyCheckFailed",
    "check_strategy",
    "examine",
]
