"""The record of a comparison: its settings and the folders of its runs."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, field, replace
from os.path import normpath, relpath
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import Field, model_validator

from fedkd.errors import FedkdError, Setting
from fedkd.experiment import Experiment
from fedkd.records.files import read_json, write_json
from fedkd.records.folder import RunFolder
from fedkd.records.shapes import Count, Shape, Share, Value, equal_lengths
from fedkd.registry import find
from fedkd.strategy import DistillationStrategy
from fedkd.studies.comparison.entries import Counted, Target, counted
from fedkd.studies.comparison.methods import CENTRAL, variant

FILE = "comparison.json"

_BESIDES = {"seed", *Experiment.keys("bookkeeping")}
"""Keys in which a comparison may differ from one of the same name."""


_UNCHANGED = ("methods", "seeds", "reference", "target", "reused", "remark")


class _Counted(Shape):
    """A `Counted` in the file."""

    field: Annotated[str, Field(pattern=r"^(accuracy|accuracy_after_\w+|server_accuracy)$")]
    later: bool
    delivered: bool


class _Content(Shape):
    """``comparison.json``."""

    experiment: dict[str, Value]
    methods: Annotated[list[str], Field(min_length=1)]
    seeds: Annotated[list[Count], Field(min_length=1)]
    reference: str
    target: Share | Annotated[str, Field(pattern=r"^\d{0,3}\.?\d{1,9}c$")] | None
    runs: dict[str, list[str]]
    central: dict[Annotated[str, Field(pattern=r"^\d{1,18}$")], str]
    counted: dict[str, _Counted]
    reused: Count
    remark: str | None

    @model_validator(mode="after")
    def _complete(self) -> Self:
        for name, values in (("methods", self.methods), ("seeds", self.seeds)):
            if len(set(values)) < len(values):
                raise ValueError(f"{name} must differ")
        if self.reference not in self.methods:
            raise ValueError("reference must be one of the methods")
        if self.runs or self.central:
            self._refuse_gaps()
        return self

    def _refuse_gaps(self) -> None:
        """Raise an error if a finished comparison lacks a run."""
        is_pooled = not set(self.methods).isdisjoint(CENTRAL)
        federated = [method for method in self.methods if method not in CENTRAL]
        if not self.runs.keys() == self.counted.keys() == set(federated):
            raise ValueError("runs and counted must have an entry of each strategy in methods")
        if is_pooled and sorted(map(int, self.central)) != sorted(self.seeds):
            raise ValueError("central must have an entry of each seed")
        equal_lengths(
            ((f"runs.{method}", each) for method, each in self.runs.items()), len(self.seeds)
        )


@dataclass(frozen=True)
class ComparisonRecord:
    """The content of ``comparison.json``.

    Attributes:
        experiment: what all methods share, as given by the user.
        methods: their names.
        seeds: of every method.
        reference: the method that the others are compared with.
        target: as given by the user, or `None` for the default.
        runs: folders by strategy, one a seed.
        central: folders of the central baseline by seed.
        reused: runs that existed already; a central baseline counts once a seed.
        remark: how many runs were made at once and why, or `None`.
        counted: by strategy, which accuracy decides when the target is reached.
        path: the comparison's folder.
    """

    experiment: Experiment
    methods: list[str]
    seeds: list[int]
    reference: str
    target: Target | None
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
        """Raise an error if the name belongs to something else; the same comparison may be written again.

        Raises:
            FedkdError: the folder exists and holds no comparison of this experiment.
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
        """Return the record with `counted` and `path` filled in, written to its folder."""
        experiment = self.experiment
        has_teacher = experiment.teacher != "none"
        fields = {n: counted(_strategy(experiment, n), has_teacher=has_teacher) for n in self.runs}
        folder = Path(experiment.run_dir) / (experiment.name or "")
        if experiment.name is None and (earlier := self._earlier()) is not None:
            folder = earlier
        elif experiment.name is None or not folder.exists():
            default = f"compare-{experiment.dataset_word}"
            folder = RunFolder.create(experiment, default, self._begin).path
        record = replace(self, counted=fields, path=folder)
        write_json(folder / FILE, record.as_json())
        return record

    def _begin(self, folder: RunFolder, _: str) -> None:
        write_json(folder.path / FILE, self.as_json())

    def _earlier(self) -> Path | None:
        """Return the folder of the same comparison, if it was made before."""

        def settings(record: ComparisonRecord) -> tuple[Any, ...]:
            shared = record.experiment.model_dump(exclude=_BESIDES)
            return shared, record.methods, record.seeds, record.reference, record.target

        for path in sorted(Path(self.experiment.run_dir).glob(f"*/{FILE}")):
            with suppress(FedkdError):  # written by another version
                if settings(ComparisonRecord.read(path.parent)) == settings(self):
                    return path.parent
        return None

    def as_json(self) -> dict[str, Any]:
        """Return the record, with paths relative to its folder."""
        runs = {m: [relpath(path, self.path) for path in paths] for m, paths in self.runs.items()}
        return {
            "experiment": self.experiment.flat(),
            "methods": self.methods,
            "seeds": self.seeds,
            "reference": self.reference,
            "target": self.target,
            "runs": runs,
            "central": {str(s): relpath(path, self.path) for s, path in self.central.items()},
            "counted": {method: vars(each) for method, each in self.counted.items()},
            "reused": self.reused,
            "remark": self.remark,
        }

    @classmethod
    def read(cls, folder: Path) -> ComparisonRecord:
        """Return the record in a comparison's folder.

        Raises:
            FedkdError: the folder holds none.
        """
        values = read_json(folder / FILE, _Content, "comparison")

        def absolute(path: str) -> Path:
            return Path(normpath(folder / path))

        return cls(
            experiment=Experiment.load((str(folder / FILE), values["experiment"])),
            runs={m: [absolute(path) for path in paths] for m, paths in values["runs"].items()},
            central={int(seed): absolute(path) for seed, path in values["central"].items()},
            counted={
                method: Counted(each["field"], each["later"], each["delivered"])
                for method, each in values["counted"].items()
            },
            **{name: values[name] for name in _UNCHANGED},
            path=folder,
        )


def _strategy(experiment: Experiment, method: str) -> DistillationStrategy:
    varied = variant(experiment, method, experiment.seed)
    return find(method, varied.strategy_config)
