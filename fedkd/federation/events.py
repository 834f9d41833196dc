"""Counted incidents of a run: failures it recovered from, by round."""

from __future__ import annotations

from collections import Counter
from threading import Lock

from fedkd.errors import safe_logger

_logger = safe_logger(__name__)


class Events:
    """Incidents since the last round's record, counted; any thread may add to them."""

    def __init__(self) -> None:
        self._counts = Counter[str]()
        self._lock = Lock()

    def add(self, name: str, text: str) -> None:
        """Count an event, and log it.

        Args:
            name: its kind, in kebab-case, such as ``"worker-died"``; listed in `docs/records.md`.
            text: one line that says what happened, and to which client or worker.
        """
        with self._lock:
            self._counts[name] += 1
        _logger.warning("%s", text)

    def take(self) -> dict[str, int]:
        """Return how many of each kind there were, and reset the counts."""
        with self._lock:
            counts, self._counts = self._counts, Counter()
        return dict(sorted(counts.items()))
