"""A comparison's own record: which runs it is made of, and what was asked of them."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, field, replace
from os.path import normpath, relpath
from pathlib import Path
from typing import Any

from fedkd.errors import FedkdError, Setting
from fedkd.experiment import Experiment
from fedkd.records.files import read_json, write_json
from fedkd.records.folder import RunFolder
from fedkd.registry import find
from fedkd.strategy import DistillationStrategy
from fedkd.studies.comparison.entries import Counted, counted
from fedkd.studies.comparison.methods import variant

FILE = "comparison.json"

_BESIDES = {"seed", *Experiment.keys("bookkeeping")}
"""Keys in which a comparison may differ from one of the same name."""


@dataclass(frozen=True)
class ComparisonRecord:
    """What ``comparison.json`` holds.

    Attributes:
        experiment: what all methods share, as it was asked for.
        methods: their names.
        seeds: of every method.
        reference: the method that the others are compared with.
        target: as it was asked for, or `None` for the default.
        runs: folders by strategy, one a seed.
        central: folders of the central baseline by seed.
        reused: runs that were there already; a central baseline counts once a seed.
        remark: what there is to say of runs made at once.
        counted: by strategy, which accuracy tells when the target is reached.
        path: the comparison's folder.
    """

    experiment: Experiment
    methods: list[str]
    seeds: list[int]
    reference: str
    target: float | None
    runs: dict[str, list[Path]] = field(default_factory=dict)
    central: dict[int, Path] = field(default_factory=dict)
    reused: int = 0
    remark: str | None = None
    counted: dict[str, Counted] = field(default_factory=dict)
    path: Path = Path()

    @property
    def is_finished(self) -> bool:
        """Whether all runs have been made."""
        return bool(self.runs or self.central)

    @staticmethod
    def check(experiment: Experiment) -> None:
        """Refuse a name of something else; the same comparison may be written again.

        Raises:
            FedkdError: the folder is there, and holds no comparison of this experiment.
        """
        if experiment.name is None:
            return
        folder = Path(experiment.run_dir) / experiment.name
        try:
            known = ComparisonRecord.read(folder).experiment if folder.exists() else experiment
        except FedkdError:
            return RunFolder.check(experiment)
        if known.model_dump(exclude=_BESIDES) != experiment.model_dump(exclude=_BESIDES):
            raise FedkdError(
                Setting("name", experiment.name),
                f": {folder} compares methods on another experiment; choose another "
                "name, or remove the folder",
            )

    def written(self) -> ComparisonRecord:
        """Fill in what the methods say of themselves, write it to its folder, and return it."""
        experiment = self.experiment
        has_teacher = experiment.teacher != "none"
        found = {n: counted(_strategy(experiment, n), has_teacher=has_teacher) for n in self.runs}
        known = Path(experiment.run_dir) / (experiment.name or "")
        if experiment.name is None and (earlier := self._earlier()) is not None:
            known = earlier
        elif experiment.name is None or not known.exists():
            default = f"compare-{experiment.dataset.replace(':', '.')}"
            known = RunFolder.create(experiment, default).path
        record = replace(self, counted=found, path=known)
        write_json(known / FILE, record.as_json())
        return record

    def _earlier(self) -> Path | None:
        """Return the folder of the same comparison, if it was made before."""

        def asked(record: ComparisonRecord) -> tuple[Any, ...]:
            shared = record.experiment.model_dump(exclude=_BESIDES)
            return shared, record.methods, record.seeds, record.reference, record.target

        for path in sorted(Path(self.experiment.run_dir).glob(f"*/{FILE}")):
            with suppress(FedkdError):  # of another version
                if asked(ComparisonRecord.read(path.parent)) == asked(self):
                    return path.parent
        return None

    def as_json(self) -> dict[str, Any]:
        """Return the record, with paths as seen from its folder."""
        seen = {m: [relpath(path, self.path) for path in paths] for m, paths in self.runs.items()}
        return {
            "experiment": self.experiment.flat(),
            "methods": self.methods,
            "seeds": self.seeds,
            "reference": self.reference,
            "target": self.target,
            "runs": seen,
            "central": {str(s): relpath(path, self.path) for s, path in self.central.items()},
            "counted": {method: vars(each) for method, each in self.counted.items()},
            "reused": self.reused,
            "remark": self.remark,
        }

    @classmethod
    def read(cls, folder: Path) -> ComparisonRecord:
        """Read a comparison's folder.

        Raises:
            FedkdError: there is none in it.
        """
        found = read_json(folder / FILE, "comparison")
        try:
            return cls._of(found, folder)
        except (AttributeError, KeyError, TypeError) as error:
            raise FedkdError(f"{folder / FILE} is no record of this version ({error!r})") from None

    @classmethod
    def _of(cls, found: dict[str, Any], folder: Path) -> ComparisonRecord:
        def seen(path: str) -> Path:
            return Path(normpath(folder / path))

        found["experiment"] = Experiment.load((str(folder / FILE), found["experiment"]))
        found["runs"] = {m: [seen(path) for path in paths] for m, paths in found["runs"].items()}
        found["central"] = {int(seed): seen(path) for seed, path in found["central"].items()}
        found["counted"] = {m: Counted(**each) for m, each in found["counted"].items()}
        return cls(**found, path=folder)


def _strategy(experiment: Experiment, method: str) -> DistillationStrategy:
    given = variant(experiment, method, experiment.seed)
    return find(method, given.strategy_config)
