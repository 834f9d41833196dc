"""The suite that every strategy passes, ours and yours.

`check_strategy` tries a strategy alone, in federations of five tiny clients with bad replies, lost rounds
and partial participation, and says in one line for each thing that is wrong what to change. It works
offline, on the digits that come with scikit-learn, and writes to a temporary folder only.
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
