"""What a run writes down, what it tells as it goes, and how it is read back."""

from fedkd.records.files import Row
from fedkd.records.results import Run

__all__ = ["Row", "Run"]
