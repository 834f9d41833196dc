"""What every study takes: its seeds, and a function that is told how far it is."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from fedkd.errors import FedkdError
from fedkd.experiment import Experiment

Progress = Callable[[str, float], None]
"""Called with what is going on and how far it is, 0..1."""


def silent(_: str, __: float) -> None:
    """Report no progress."""


def seeds_of(experiment: Experiment, seeds: Sequence[int] | None) -> list[int]:
    """Return the seeds of a study: those asked for, by default the experiment's.

    Raises:
        FedkdError: there is none, or one is there twice.
    """
    chosen = [experiment.seed] if seeds is None else list(seeds)
    refuse_repeats("seeds", chosen)
    return chosen


def refuse_repeats(what: str, values: Sequence[object]) -> None:
    """Refuse a list that is empty or names something twice.

    Raises:
        FedkdError: it does.
    """
    if not values or len(set(values)) < len(values):
        listed = ",".join(map(str, values))
        raise FedkdError(f"{what} = '{listed}': at least one, and none of them twice")
