"""Chooses α, τ and other keys by cross-validation on training data, never on the test set.

Every point of a grid is trained for every seed and fold, on the training images without the fold, and
measured on the fold. Points that differ only in α, τ, step size or epochs are trained in one stack, so
that a grid costs little more than its largest part. Results are on disk: a sweep that was interrupted,
or gets more seeds or points, continues from them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

from fedkd.data.sources import held, reload
from fedkd.errors import FedkdError
from fedkd.experiment import Experiment
from fedkd.keys import Scalar
from fedkd.studies.arguments import Progress, seeds_of, silent
from fedkd.studies.sweep.folder import Keys
from fedkd.studies.sweep.grid import typed, typed_ranges
from fedkd.studies.sweep.result import Point, Sweep
from fedkd.studies.sweep.training import Trials

AT_ONCE = 8
"""Points of a search that are chosen before any of them is measured: enough for a stack."""


def sweep(
    experiment: Experiment,
    grid: Mapping[str, Sequence[Scalar]],
    seeds: Sequence[int] | None = None,
    folds: int = 3,
    *,
    of: str = "federation",
    progress: Progress = silent,
) -> Sweep:
    """Return a sweep: every point of a grid, trained for every seed and fold and measured on the fold.

    Args:
        experiment: what all points share.
        grid: values by key, such as ``{"alpha": [0.3, 0.7], "tau": [1, 5]}``.
        seeds: default the experiment's.
        folds: F ≥ 2, parts of the training images, each held out once.
        of: ``"federation"``: the mean over its clients; ``"central"``: the student distilled from
            the pooled teacher.
        progress: called with a description of the current work and the share that is done, 0..1.

    Raises:
        FedkdError: a key or value is invalid; nothing has been trained then.
    """
    values = typed(experiment, grid)
    trials = Trials(experiment, of, seeds_of(experiment, seeds), folds, progress)
    points = [dict(zip(values, chosen, strict=True)) for chosen in product(*values.values())]
    reload(experiment)
    with held():
        trials.check(points)
        trials.begin(values, points)
        with trials.folder.locked():
            trials.evaluate(points)
            return Sweep.load(trials.finish(points))


def search(
    experiment: Experiment,
    ranges: Mapping[str, Sequence[Scalar]],
    trials: int,
    seeds: Sequence[int] | None = None,
    folds: int = 3,
    *,
    of: str = "federation",
    progress: Progress = silent,
) -> Sweep:
    """Return a sweep whose points Optuna chooses, for more keys than a grid can cover.

    The sampler (TPE, Watanabe 2023) is seeded, so that an interrupted search chooses the same points
    again and reuses those that are done. Points are chosen eight at a time, which train in one stack.

    Args:
        experiment: what all points share.
        ranges: (low, high) by key; on a logarithmic scale where high ≥ 10 low > 0; integers where
            the key is an integer.
        trials: points to try.
        seeds: see `sweep`.
        folds: see `sweep`.
        of: see `sweep`.
        progress: see `sweep`.

    Raises:
        FedkdError: a key or range is invalid, or Optuna is not installed.
    """
    if trials < 1:
        raise FedkdError(f"trials = {trials}: must be ≥ 1")
    study = _study(experiment.seed)
    values = typed_ranges(experiment, ranges)
    work = Trials(experiment, of, seeds_of(experiment, seeds), folds, progress)
    reload(experiment)
    with held():
        work.check([{key: bounds[end] for key, bounds in values.items()} for end in (0, 1)])
        work.begin(values, [], trials)
        with work.folder.locked():
            return Sweep.load(work.finish(_searched(work, values, trials, study)))


def _searched(
    work: Trials, values: Mapping[str, Sequence[Any]], trials: int, study: Any
) -> list[Keys]:
    """Return the distinct points that a search has chosen, all measured."""
    points: list[Keys] = []
    while len(points) < trials:
        suggestions = [study.ask() for _ in range(min(AT_ONCE, trials - len(points)))]
        new = [
            {key: _suggested(trial, key, b) for key, b in values.items()} for trial in suggestions
        ]
        work.evaluate(new, len(points) / trials, len(new) / trials)
        for trial, keys in zip(suggestions, new, strict=True):
            study.tell(trial, Point(keys, work.table(keys)).accuracy)
        points += new
    return [keys for n, keys in enumerate(points) if keys not in points[:n]]


def _study(seed: int) -> Any:
    try:
        import optuna
    except ImportError:
        raise FedkdError("a search needs Optuna: pip install 'fedkd[optuna]'") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(seed=seed))


def _suggested(trial: Any, key: str, bounds: Sequence[Any]) -> Scalar:
    """Return a value of a key that a trial suggests between the bounds."""
    low, high = bounds
    is_log = 0 < 10 * low <= high
    suggest = trial.suggest_int if type(low) is int else trial.suggest_float
    value = suggest(key, low, high, log=is_log)
    return int(value) if type(low) is int else min(high, max(low, float(f"{value:.4g}")))
