"""Central and federated methods side by side, on the same shards, public set and initial weights.

Finished runs are reused and interrupted ones are resumed, so that another method or seed costs only
its own runs. The comparison's record only names its runs: every number is computed from their folders.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import nan
from pathlib import Path

from fedkd.data.sources import held, reload
from fedkd.engines.interrupts import naming_resume_command
from fedkd.errors import FedkdError
from fedkd.experiment import Experiment
from fedkd.studies.arguments import Progress, seeds_of, silent
from fedkd.studies.comparison.entries import Target
from fedkd.studies.comparison.jobs import Job, check_jobs, make, threads, threads_each
from fedkd.studies.comparison.methods import (
    LOCAL,
    Method,
    canonical,
    check_all,
    default_methods,
    federated,
    label,
    pooled,
    variant,
)
from fedkd.studies.comparison.record import ComparisonRecord
from fedkd.studies.comparison.result import Comparison
from fedkd.studies.comparison.reuse import ExistingRuns, common_plan
from fedkd.training.tuning import with_plan


def compare(
    experiment: Experiment,
    methods: Sequence[Method] | None = None,
    seeds: Sequence[int] | None = None,
    *,
    reference: Method | None = None,
    target: Target | None = None,
    jobs: int = 1,
    progress: Progress = silent,
) -> Comparison:
    """Run methods on the same shards, public set, client samples and initial weights.

    Finished runs in ``run-dir`` are reused where they would come out the same, and unfinished ones are
    resumed. Those of other data, code or versions are made again, and the comparison's remark says why.

    Args:
        experiment: what all methods share. Its strategy is not used, its ``strategy-config`` only by
            the method that it names. Its name is that of the comparison and the prefix of its runs'.
        methods: names or classes of strategies, and ``teacher``, ``student-alone``,
            ``student-distilled``; see `fedkd.studies.comparison.methods.default_methods`.
        seeds: of all methods; default the experiment's.
        reference: the method that the others are compared with; default LocalOnly if it is compared,
            else the first.
        target: for which rounds and bytes are given: an accuracy, 0..1 or in percent, or a share of the
            central student's, such as ``"0.9c"``, which is the default where there is one.
        jobs: runs made at once, each in its own process, when they fit into memory. The numbers are
            the same as one after another.
        progress: called with a description of the current work and the share that is done, 0..1.

    Raises:
        FedkdError: a method or key is invalid, and nothing has been run; or a run failed: finished
            ones stay, and the same call continues from them.
    """
    seeds = seeds_of(experiment, seeds)
    names = [canonical(m) for m in (default_methods(experiment) if methods is None else methods)]
    check_jobs(experiment, jobs)
    reload(experiment)
    with held():
        check_all(experiment, names, seeds)
        chosen = _reference(names, reference)
        fixed = checked_target(target)
        ComparisonRecord.check(experiment)
        record = ComparisonRecord(experiment, names, seeds, chosen, fixed).written()  # for `resume`
        with naming_resume_command(f"compare --resume {record.path}", lambda _: "interrupted"):
            done = _made(record, jobs, progress)
    return Comparison.from_record(done.written())


def resume(path: str | Path, *, jobs: int = 1, progress: Progress = silent) -> Comparison:
    """Return the comparison in a folder, resumed where it was interrupted; see `compare`.

    Interrupted runs are resumed after their last finished round.

    Args:
        path: its folder, which may have been moved together with those of its runs.
        jobs: see `compare`.
        progress: see `compare`.

    Raises:
        FedkdError: there is no comparison, or see `compare`.
    """
    folder = Path(path)
    record = ComparisonRecord.read(folder)
    experiment = record.experiment.replace(run_dir=str(folder.parent))
    if experiment.name is not None:
        experiment = experiment.replace(name=folder.name)
    return compare(
        experiment,
        record.methods,
        record.seeds,
        reference=record.reference,
        target=record.target,
        jobs=jobs,
        progress=progress,
    )


def _reference(names: Sequence[str], method: Method | None) -> str:
    if method is None:
        return LOCAL if LOCAL in names else names[0]
    name = canonical(method)
    if name not in names:
        raise FedkdError(f"reference = '{method}': must be one of the methods: {', '.join(names)}")
    return name


def checked_target(target: Target | None) -> Target | None:
    """Return a target as it is recorded: a fraction, also if given in percent, or a share as text.

    Raises:
        FedkdError: it is neither an accuracy nor a share of one.
    """
    if target is None:
        return None
    text = str(target).strip()
    of_central, number = text.endswith("c"), text.removesuffix("c").removesuffix("%")
    try:
        value = float(number) / (100 if text.endswith("%") else 1)
    except ValueError:
        value = nan
    value = round(value, 4) if of_central else value / 100 if value > 1 else value
    if not 0 < value <= 1:
        raise FedkdError(
            f"target = {target!r}: must be an accuracy such as 0.85 or 85%, or a share of the central "
            "student's such as 0.9c, above 0 and at most 1"
        )
    return f"{value:g}c" if of_central else value


def _made(record: ComparisonRecord, at_once: int, progress: Progress) -> ComparisonRecord:
    """Make the missing runs; return the record with all folders and the jobs' remark."""
    experiment, seeds = record.experiment, record.seeds
    methods = list(federated(record.methods))
    existing = ExistingRuns(experiment.run_dir)
    keys = [(name, seed) for name in methods for seed in seeds]
    finished = {
        key: paths for key in keys if (paths := existing.federated(variant(experiment, *key)))
    }
    has_central = len(methods) < len(record.methods)
    central = existing.central(pooled(experiment), seeds) if has_central else {}
    begun = {
        key: existing.unfinished(variant(experiment, *key)) for key in keys if key not in finished
    }
    jobs = _central_jobs(experiment, seeds, central) if has_central else []
    known = [
        *(path for paths in finished.values() for path in paths),
        *filter(None, begun.values()),
    ]
    jobs += _federated_jobs(experiment, begun, known, at_once)
    paths, remark = make(jobs, at_once, progress)
    central |= {seed: path for job, path in zip(jobs, paths, strict=True) for seed in job.seeds}
    folders = {key: paths[0] for key, paths in finished.items()}
    folders |= zip(begun, paths[len(paths) - len(begun) :], strict=True)
    return replace(
        record,
        runs={name: [folders[name, seed] for seed in seeds] for name in methods},
        central={seed: central[seed] for seed in seeds if has_central},
        reused=len(finished) + len(central) - sum(len(job.seeds) for job in jobs),
        remark=". ".join(filter(None, (remark, existing.remark()))) or None,
    )


def _central_jobs(
    experiment: Experiment, seeds: Sequence[int], existing: Mapping[int, Path]
) -> list[Job]:
    """Return the job of the central baseline of the missing seeds, one cohort, if any."""
    missing = tuple(seed for seed in seeds if seed not in existing)
    shared = common_plan(pooled(experiment), existing.values())
    return [Job("central baseline", _free(shared), missing)] if missing else []


def _federated_jobs(
    experiment: Experiment,
    begun: Mapping[tuple[str, int], Path | None],
    known: Sequence[Path],
    at_once: int,
) -> list[Job]:
    """Return the jobs of the missing federations by method and seed, resuming interrupted ones.

    All use one plan, so that rounding does not differ by method.
    """
    if not begun:
        return []
    with threads(threads_each(at_once)):
        shared = with_plan(common_plan(experiment, known))
    return [
        Job(f"{label(n)}, seed {s}", _free(variant(shared, n, s)), begun=path)
        for (n, s), path in begun.items()
    ]


def _free(experiment: Experiment) -> Experiment:
    """Return the experiment with a number after its name if that folder exists."""
    name, number = experiment.name, 1
    while experiment.name and (Path(experiment.run_dir) / experiment.name).exists():
        number += 1
        experiment = experiment.replace(name=f"{name}-{number}")
    return experiment
