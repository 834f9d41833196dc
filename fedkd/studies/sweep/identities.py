"""What the cells of a sweep are known by, so that what has changed is measured again."""

from __future__ import annotations

from typing import Any

from fedkd.engines.identity import identity_of
from fedkd.experiment import Experiment
from fedkd.records.identity import Identity
from fedkd.registry import strategy_of


class CellIdentities:
    """Identities of cells, each worked out once; keys are left out, as they identify a cell anyway.

    Args:
        of: whose accuracy, as for `fedkd.studies.sweep.run.sweep`.
    """

    def __init__(self, of: str) -> None:
        self._of = of
        self._known: dict[tuple[Any, ...], Identity] = {}

    def of(self, experiment: Experiment) -> Identity:
        """Return the data, code, initial weights and software on which a cell's accuracy depends."""
        named = ("strategy", "strategy_config", "server_model", "seed")
        deciding = (*Experiment.keys_that("names_code"), *named)
        key = tuple(getattr(experiment, name) for name in deciding)
        if key not in self._known:
            whole = experiment.replace(fold="none", name=None)  # the same for all folds
            strategy = None if self._of == "central" else strategy_of(whole)
            identity = identity_of(whole, strategy)
            self._known[key] = {kind: part for kind, part in identity.items() if kind != "keys"}
        return self._known[key]
