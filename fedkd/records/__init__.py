"""Run folders: writing, reading, callbacks and trackers."""

from fedkd.records.files import Row
from fedkd.records.results import Run

__all__ = ["Row", "Run"]
