"""Arguments that all studies share: seeds and a progress function."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from fedkd.errors import FedkdError
from fedkd.experiment import Experiment

Progress = Callable[[str, float], None]
"""Called with a description of the current work and the share that is done, 0..1."""


def silent(_: str, __: float) -> None:
    """Report no progress."""


def seeds_of(experiment: Experiment, seeds: Sequence[int] | None) -> list[int]:
    """Return the seeds of a study: those given, by default the experiment's.

    Raises:
        FedkdError: the list is empty, or has repeats.
    """
    chosen = [experiment.seed] if seeds is None else list(seeds)
    refuse_repeats("seeds", chosen)
    return chosen


def refuse_repeats(what: str, values: Sequence[object]) -> None:
    """Raise an error if a list is empty or has repeats.

    Raises:
        FedkdError: see above.
    """
    if not values or len(set(values)) < len(values):
        listed = ",".join(map(str, values))
        raise FedkdError(f"{what} = '{listed}': give at least one, without repeats")
