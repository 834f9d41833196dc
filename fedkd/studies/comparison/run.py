"""Central and federated methods side by side, on the same shards, public set and initial weights.

Runs that are there already are not made again, and those that were cut off go on, so that one with
another method or seed costs that method or seed. The comparison's own record only says which
runs it is made of: every number is computed from their folders.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from fedkd.engines.interrupts import naming_resume_command
from fedkd.errors import FedkdError
from fedkd.experiment import Experiment
from fedkd.studies.arguments import Progress, seeds_of, silent
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
    target: float | None = None,
    jobs: int = 1,
    progress: Progress = silent,
) -> Comparison:
    """Run methods on the same shards, public set, client samples and initial weights.

    Finished runs in ``run-dir`` are taken where the same code made them of the same experiment, and
    unfinished ones go on.

    Args:
        experiment: what all methods share. Its strategy is not used, its ``strategy-config`` only by
            the method that it names. Its name is the comparison's, and the beginning of its runs'.
        methods: names or classes of strategies, and ``teacher``, ``student-alone``,
            ``student-distilled``; see `fedkd.studies.comparison.methods.default_methods`.
        seeds: of all methods; default the experiment's.
        reference: the method that the others are compared with; default LocalOnly if it is compared,
            else the first.
        target: accuracy, 0..1 or in percent, of which to say when it is reached; default see
            `fedkd.studies.comparison.entries.default_target`.
        jobs: runs made at once, in processes of their own, when they fit into memory. The numbers are
            those of one after another.
        progress: told what is going on and how far it is, 0..1.

    Raises:
        FedkdError: a method or key is not right, and nothing has been run then; or a run went wrong:
            finished ones stay, and the same call goes on from them.
    """
    seeds = seeds_of(experiment, seeds)
    names = [canonical(m) for m in (default_methods(experiment) if methods is None else methods)]
    check_jobs(experiment, jobs)
    check_all(experiment, names, seeds)
    chosen = _reference(names, reference)
    share = _share(target)
    ComparisonRecord.check(experiment)
    record = ComparisonRecord(experiment, names, seeds, chosen, share).written()  # for `resume`
    with naming_resume_command(f"compare --resume {record.path}", lambda _: "interrupted"):
        done = _made(record, jobs, progress)
    return Comparison.from_record(done.written())


def resume(path: str | Path, *, jobs: int = 1, progress: Progress = silent) -> Comparison:
    """Go on with a comparison that was cut off; see `compare`.

    Runs that were cut off go on after their last finished round.

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


def _reference(names: Sequence[str], wanted: Method | None) -> str:
    if wanted is None:
        return LOCAL if LOCAL in names else names[0]
    name = canonical(wanted)
    if name not in names:
        raise FedkdError(f"reference = '{wanted}': must be one of the methods: {', '.join(names)}")
    return name


def _share(target: float | None) -> float | None:
    """Read an accuracy that is given as a fraction or, above 1, in percent."""
    if target is None:
        return None
    share = target / 100 if target > 1 else target
    if not 0 < share <= 1:
        raise FedkdError(f"target = {target:g}: must be an accuracy, > 0 and ≤ 1, or in percent")
    return share


def _made(record: ComparisonRecord, at_once: int, progress: Progress) -> ComparisonRecord:
    """Make the runs that are not there; return the record with all folders and the jobs' remark."""
    experiment, seeds = record.experiment, record.seeds
    methods = list(federated(record.methods))
    shelf = ExistingRuns(experiment.run_dir)
    wanted = [(name, seed) for name in methods for seed in seeds]
    there = {key: found for key in wanted if (found := shelf.federated(variant(experiment, *key)))}
    has_central = len(methods) < len(record.methods)
    pools = shelf.central(pooled(experiment)) if has_central else {}
    central = {seed: pools[seed] for seed in seeds if seed in pools}
    begun = {key: shelf.unfinished(variant(experiment, *key)) for key in wanted if key not in there}
    jobs = _central_jobs(experiment, seeds, central) if has_central else []
    known = [*(path for paths in there.values() for path in paths), *filter(None, begun.values())]
    jobs += _federated_jobs(experiment, begun, known, at_once)
    paths, remark = make(jobs, at_once, progress)
    central |= {seed: path for job, path in zip(jobs, paths, strict=True) for seed in job.seeds}
    folders = {key: found[0] for key, found in there.items()}
    folders |= zip(begun, paths[len(paths) - len(begun) :], strict=True)
    return replace(
        record,
        runs={name: [folders[name, seed] for seed in seeds] for name in methods},
        central={seed: central[seed] for seed in seeds if has_central},
        reused=len(there) + len(central) - sum(len(job.seeds) for job in jobs),
        remark=remark,
    )


def _central_jobs(
    experiment: Experiment, seeds: Sequence[int], there: Mapping[int, Path]
) -> list[Job]:
    """Return the central baseline of the seeds that there is none of: one cohort."""
    missing = tuple(seed for seed in seeds if seed not in there)
    shared = common_plan(pooled(experiment), there.values())
    return [Job("central baseline", _free(shared), missing)] if missing else []


def _federated_jobs(
    experiment: Experiment,
    begun: Mapping[tuple[str, int], Path | None],
    known: Sequence[Path],
    at_once: int,
) -> list[Job]:
    """Return the federations that are missing, by method and seed, with the folders of those cut off.

    One plan for all: its bits are not the method's.
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
    """Number the name of a run whose folder is taken, as by one that was interrupted."""
    name, number = experiment.name, 1
    while experiment.name and (Path(experiment.run_dir) / experiment.name).exists():
        number += 1
        experiment = experiment.replace(name=f"{name}-{number}")
    return experiment
