"""Trains the points of a sweep for every seed and fold, many in one stack, resumably."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from shutil import rmtree

from fedkd.data.federated import federated_data
from fedkd.engines.preflight import check
from fedkd.engines.run import is_begun, run_or_resume, run_side_by_side
from fedkd.engines.side_by_side import alike
from fedkd.errors import DivergedError, FedkdError, Setting
from fedkd.experiment import Experiment
from fedkd.keys import Scalar
from fedkd.machine import keep_freed_memory
from fedkd.records.callbacks import Callback
from fedkd.records.files import Row
from fedkd.records.folder import RunFolder
from fedkd.records.identity import as_one, changes, counted
from fedkd.records.results import Run
from fedkd.studies.arguments import Progress
from fedkd.studies.central import check_central
from fedkd.studies.pooled import TRAINED, Pooled, accuracies
from fedkd.studies.sweep.folder import Cell, Done, Keys, SweepFolder
from fedkd.studies.sweep.identities import CellIdentities
from fedkd.training.model_checks import check_models
from fedkd.training.tuning import Counts, clients_at_once, with_plan

MODELS_AT_ONCE = 500
"""Models of an architecture in one stack: enough to use a device fully, few enough for its memory."""

_RUNS = "runs"
"""Folder of federations in progress."""


class Trials:
    """Trains and measures the points of a sweep.

    Args:
        experiment: what they share.
        of: whose accuracy, as for `sweep`.
        seeds: S seeds.
        folds: F.
        progress: called with the share of the work that is done.

    Raises:
        FedkdError: too few folds, or the experiment has a fold already.
    """

    def __init__(
        self, experiment: Experiment, of: str, seeds: Sequence[int], folds: int, progress: Progress
    ) -> None:
        if folds < 2:
            raise FedkdError(f"folds = {folds}: must be ≥ 2, as each is held out from the others")
        if of not in ("federation", "central"):
            raise FedkdError(f"of = '{of}': must be federation or central")
        if experiment.fold != "none":
            raise FedkdError(Setting("fold", experiment.fold), ": a sweep sets it itself")
        self._experiment, self._of = experiment, of
        self._seeds, self._folds = list(seeds), folds
        self._progress = progress
        self._share = (0.0, 1.0)
        self._done = Done()
        self._identities = CellIdentities(of)
        self._outdated: list[list[str]] = []

    def check(self, points: Sequence[Keys]) -> None:
        """Raise an error for an invalid point, before any work.

        Raises:
            FedkdError: a point is invalid.
        """
        for seed in self._seeds:
            self._check(Cell(points[0], seed, 1))
        for keys in points:
            self._check(Cell(keys, self._seeds[0], 1))
        # Folds are equally large: if there are too few images, the last has none.
        self._check(Cell(points[0], self._seeds[0], self._folds))

    def _check(self, cell: Cell) -> None:
        experiment = self._cell_experiment(cell).replace(name=None)
        if self._of == "central":
            check_central(experiment)
            check_models(experiment, federated_data(experiment), TRAINED, trained=TRAINED)
        else:
            check(experiment)

    def begin(
        self,
        grid: Mapping[str, Sequence[Scalar]],
        points: Sequence[Keys],
        trials: int | None = None,
    ) -> None:
        """Make the folder, or open that of the same sweep.

        Args:
            grid: values by key, or bounds.
            points: all points; empty for a search.
            trials: of a search, how many points are chosen.

        Raises:
            FedkdError: the folder belongs to something else.
        """
        self._settings = {
            "of": self._of,
            "grid": {key: list(values) for key, values in grid.items()},
            "is_search": trials is not None,
            "trials": trials,
            "seeds": self._seeds,
            "folds": self._folds,
            "points": list(points),
        }
        self.folder = SweepFolder.begin(self._experiment, self._settings)
        self._done = self.folder.done()

    def evaluate(self, points: Sequence[Keys], start: float = 0.0, share: float = 1.0) -> None:
        """Train some points for all seeds and folds that are not done yet, and record each accuracy.

        Args:
            points: values by key.
            start: share of the whole work that is done, 0..1.
            share: share of the whole work that these points make up.
        """
        keep_freed_memory()
        cells = [
            Cell(keys, seed, fold)
            for fold in range(1, self._folds + 1)
            for seed in self._seeds
            for keys in points
        ]
        distinct = {cell.name: cell for cell in cells}.values()
        missing = [cell for cell in distinct if not self._is_done(cell)]
        finished = len(cells) - len(missing)
        for batch in self._batches(missing):
            self._share = (start + share * finished / len(cells), share * len(batch) / len(cells))
            for cell, outcome in zip(batch, self._measured(batch), strict=True):
                # A model whose numbers are no longer finite has learnt nothing.
                failure = str(outcome) if isinstance(outcome, DivergedError) else None
                accuracy = 0.0 if isinstance(outcome, DivergedError) else outcome
                identity = self._identities.of(self._cell_experiment(cell))
                self.folder.append(cell, self._folds, accuracy, failure, identity)
                self._done.add(cell, accuracy, as_one(identity))
            finished += len(batch)

    def _is_done(self, cell: Cell) -> bool:
        """Whether a cell is measured and would come out the same now; else note why it would not."""
        measured = self._done.identity(cell)
        if measured is None:
            return False
        now = self._identities.of(self._cell_experiment(cell))
        if measured != as_one(now):
            before = self.folder.identities().get(measured, {})
            self._outdated.append(changes(before, now))
        return measured == as_one(now)

    def table(self, keys: Keys) -> list[list[float]]:
        """Return a point's accuracies ``[S][F]``."""
        return self._done.table(keys, self._seeds, self._folds)

    def finish(self, points: Sequence[Keys]) -> Path:
        """Record that these points are all, and return the folder."""
        reasons = counted(self._outdated)
        remark = f"measured again since something changed: {reasons}" if reasons else None
        self.folder.write({**self._settings, "points": list(points), "remark": remark})
        return self.folder.path

    # --- Training ---

    def _cell_experiment(self, cell: Cell) -> Experiment:
        fold = f"{cell.fold}/{self._folds}"
        return self._experiment.varied(**cell.keys, seed=cell.seed, fold=fold)

    def _batches(self, cells: Sequence[Cell]) -> Iterator[list[Cell]]:
        """Yield cells by stack: cells on the same shards that may be trained together."""
        groups: dict[Experiment, list[Cell]] = {}
        for cell in cells:
            groups.setdefault(self._kind(cell), []).append(cell)
        for kind, group in groups.items():
            size = 1
            if self._of == "central":
                size = MODELS_AT_ONCE
            elif kind.engine == "cohort" and not kind.num_workers:
                size = max(1, MODELS_AT_ONCE // kind.clients_per_round)
            for first in range(0, len(group), size):
                yield group[first : first + size]

    def _kind(self, cell: Cell) -> Experiment:
        """Return the experiment that the cells of a stack have in common."""
        experiment = self._cell_experiment(cell)
        kind = alike(experiment)
        if self._of == "central":  # where images may differ by seed
            return kind.replace(partition_seed=experiment.partition_seed)
        return kind

    def _measured(self, cells: Sequence[Cell]) -> Sequence[float | DivergedError]:
        if self._of == "central":
            return self._centrally(cells)
        return [self._accuracy(outcome) for outcome in self._in_federations(cells)]

    def _accuracy(self, outcome: Run | Exception) -> float | DivergedError:
        if isinstance(outcome, Run):
            return outcome.accuracy
        if isinstance(outcome, DivergedError):
            return outcome
        raise outcome

    def _show(self, description: str, done: float) -> None:
        start, share = self._share
        self._progress(description, start + share * done)

    def _centrally(self, cells: Sequence[Cell]) -> list[float]:
        """Return the accuracies of all cells' students, distilled side by side."""
        experiments = [self._cell_experiment(cell) for cell in cells]
        first = self._kind(cells[0])
        plan = self._plan(
            cells[0], ((first.teacher, len(self._seeds)), (first.student, len(cells)))
        )
        description = f"fold {cells[0].fold} of {self._folds}: {len(cells)} students"

        def show(phase: str, done: float) -> None:
            self._show(description, done / 2 if phase == "teacher" else 0.5 + done / 2)

        pooled = Pooled([experiment.replace(plan=plan) for experiment in experiments], show)
        pooled.train_teachers()
        pooled.train_students()
        test = pooled.data.test
        return accuracies(pooled.students.classify(test), test)

    def _in_federations(self, cells: Sequence[Cell]) -> list[Run | Exception]:
        """Return the runs of all cells' federations, made side by side where there are several."""
        at_once = clients_at_once(self._kind(cells[0]))
        runs_folder = self.folder.path / _RUNS  # an interrupted sweep has left some here
        counts = tuple((name, n * len(cells)) for name, n in at_once)
        plan = _begun_plan(runs_folder / "0")
        placed = [] if plan is None else self._placed(cells, plan)
        if not placed or not all(is_begun(each) for each in placed):
            rmtree(runs_folder, ignore_errors=True)
            placed = self._placed(cells, self._plan(cells[0], counts))
        rounds = _Rounds(
            f"fold {cells[0].fold} of {self._folds}: {len(cells)} federations",
            sum(experiment.num_server_rounds for experiment in placed),
            self._show,
        )
        outcomes = (
            run_side_by_side(placed, [rounds], is_new=False)
            if len(placed) > 1
            else [_alone(placed[0], rounds)]
        )
        rmtree(runs_folder, ignore_errors=True)
        return outcomes

    def _placed(self, cells: Sequence[Cell], plan: str) -> list[Experiment]:
        """Return the cells' experiments, each with its own folder."""
        place = {"plan": plan, "run_dir": str(self.folder.path / _RUNS)}
        return [
            self._cell_experiment(cell).replace(name=f"{number}", **place)
            for number, cell in enumerate(cells)
        ]

    def _plan(self, cell: Cell, counts: Counts) -> str:
        """Return one plan for a stack, given models by architecture; measured once for all folds."""
        return with_plan(self._kind(Cell(cell.keys, cell.seed, 1)), counts).plan


def _begun_plan(path: Path) -> str | None:
    """Return the plan of an interrupted run, which decides its last bits, if there is one."""
    with suppress(FedkdError):
        return RunFolder.existing(path).experiment.plan
    return None


def _alone(experiment: Experiment, rounds: Callback) -> Run | Exception:
    try:
        return run_or_resume(experiment, [rounds])
    except DivergedError as error:
        return error


class _Rounds(Callback):
    """Shows how many rounds of all federations are done."""

    def __init__(self, description: str, total: int, progress: Progress) -> None:
        self._description, self._total, self._progress = description, total, progress
        self._finished = 0

    def on_round_end(self, row: Row) -> None:
        """Count a round."""
        self._finished += 1
        self._progress(self._description, self._finished / self._total)
