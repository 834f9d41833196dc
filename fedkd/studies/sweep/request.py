"""The settings of a sweep, given by a caller or read from the folder of an interrupted one."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Self

from fedkd.experiment import Experiment
from fedkd.keys import Scalar, kebab
from fedkd.records.folder import RunFolder
from fedkd.studies.arguments import Progress, silent
from fedkd.studies.sweep.folder import SweepFolder
from fedkd.studies.sweep.result import Sweep
from fedkd.studies.sweep.run import search, sweep
from fedkd.studies.sweep.tables import counted


@dataclass(frozen=True)
class SweepRequest:
    """The settings of a sweep besides the experiment; see `sweep` and `search`.

    Attributes:
        grid: values by key; of a search, the bounds of each.
        trials: of a search, the points to try.
        seeds: S seeds.
        folds: F.
        of: whose accuracy, as for `sweep`.
    """

    grid: dict[str, list[Scalar]]
    trials: int | None
    seeds: list[int]
    folds: int
    of: str

    @classmethod
    def in_folder(cls, path: str | Path) -> Self:
        """Return the settings in a sweep's folder.

        Raises:
            FedkdError: the folder holds no sweep.
        """
        settings = SweepFolder(Path(path)).record()
        return cls(**{each.name: settings[each.name] for each in fields(cls)})

    def __str__(self) -> str:
        between = "," if self.trials is None else ".."
        grid = [f"{kebab(key)}={between.join(map(str, v))}" for key, v in self.grid.items()]
        return f"{' '.join(grid)}, {counted(self.seeds, 'seed')}, {self.folds} folds"

    def make(self, experiment: Experiment, progress: Progress = silent) -> Sweep:
        """Return the sweep, made or resumed.

        Raises:
            FedkdError: see `sweep` and `search`.
        """
        rest: dict[str, Any] = {"of": self.of, "progress": progress}
        if self.trials is None:
            return sweep(experiment, self.grid, self.seeds, self.folds, **rest)
        return search(experiment, self.grid, self.trials, self.seeds, self.folds, **rest)


def resume(path: str | Path, *, progress: Progress = silent) -> Sweep:
    """Return a sweep or search, resumed after the rounds that are done.

    Args:
        path: its folder.
        progress: see `sweep`.

    Raises:
        FedkdError: the folder holds no sweep made by this code.
    """
    return SweepRequest.in_folder(path).make(
        RunFolder.existing(path).relocated_experiment(), progress
    )
