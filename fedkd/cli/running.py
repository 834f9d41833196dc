"""The commands that run experiments; each imports what it needs when it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from fedkd.cli.options import (
    DEFAULTS,
    OUTPUT,
    TEXT,
    WORK,
    AnyOutput,
    AnyStart,
    NumSeeds,
    Resume,
    Seeds,
    chosen_count,
    chosen_seeds,
    refuse_beside,
)
from fedkd.experiment import Experiment


def run(
    *,
    track: Annotated[
        str | None,
        Parameter(
            group=OUTPUT,
            metavar="NAME",
            help="log the run to tensorboard, wandb, or both separated by a comma [default neither]",
        ),
    ] = None,
    resume: Resume = None,
    start: AnyStart = DEFAULTS,
    output: AnyOutput = TEXT,
) -> None:
    """Run a federation and write its run folder, or resume one that was interrupted.

    With --resume and --num-server-rounds a run is extended by more rounds.
    """
    with start.experiment(resume, besides=["--num-server-rounds"]) as experiment:
        from fedkd.cli import preview, results
        from fedkd.engines import preflight
        from fedkd.engines import run as runner
        from fedkd.records import callbacks, trackers
        from fedkd.reports.findings.diagnose import findings

        followers = [] if track is None else trackers.trackers(track)
        strategy = preflight.check(experiment, is_new=resume is None)
        rounds = experiment.num_server_rounds
        with output.progress(lambda: preview.run_preview(experiment, strategy)) as steps:
            steps.show("starting", 0)
            shown = callbacks.EachRound(
                lambda row: steps.show(results.round_line(row, rounds), row["round"] / rounds)
            )
            listeners = [shown, *followers]
            done = (
                runner.resume(resume, listeners, num_server_rounds=rounds)
                if resume
                else runner.run(experiment, listeners)
            )
    causes = findings(done)
    output.result(
        {"path": str(done.path), **done.result, "findings": [each.as_json() for each in causes]},
        [results.run_line(done)],
        [
            results.rounds_table(done),
            *([results.run_profile(done)] if experiment.profile else []),
            results.run_facts(done),
            *map(str, causes),
        ],
    )


def central(
    *,
    seeds: Seeds = None,
    num_seeds: NumSeeds = None,
    start: AnyStart = DEFAULTS,
    output: AnyOutput = TEXT,
) -> None:
    """Train a teacher on the pooled data, a student alone and a student distilled from it."""
    with start.experiment() as experiment:
        from fedkd.cli import preview, results
        from fedkd.reports.findings.diagnose import findings
        from fedkd.studies.central import central as run_central

        chosen = chosen_seeds(seeds, num_seeds, experiment)
        with output.progress(lambda: preview.central_preview(experiment, chosen)) as steps:
            done = run_central(experiment, chosen, progress=steps.show)
    causes = findings(done)
    output.result(
        {
            "path": str(done.path),
            **done.as_json(),
            "findings": [each.as_json() for each in causes],
        },
        [results.central_line(done)],
        [results.central_table(done), results.central_facts(done), *map(str, causes)],
    )


def compare(
    *,
    methods: Annotated[
        str | None,
        Parameter(
            group=WORK,
            metavar="A,B,C",
            help="strategies, teacher, student-alone, student-distilled, separated by commas "
            "[default all three, LocalOnly, FedAvg, FedMD, DSFL]",
        ),
    ] = None,
    seeds: Seeds = None,
    num_seeds: NumSeeds = None,
    reference: Annotated[
        str | None,
        Parameter(
            group=WORK,
            metavar="METHOD",
            help="method that the others are compared with [default LocalOnly if it is one of them, "
            "else the first]",
        ),
    ] = None,
    target: Annotated[
        str | None,
        Parameter(
            group=WORK,
            metavar="ACCURACY",
            help="target for which rounds and bytes are shown [0.85 or 85%, or a share of the central "
            "student's; default 0.9c]",
        ),
    ] = None,
    jobs: Annotated[
        str | None,
        Parameter(
            group=WORK,
            metavar="N",
            help="runs made at once, each in its own process, when they fit [whole number ≥ 1; "
            "default 1]",
        ),
    ] = None,
    resume: Resume = None,
    start: AnyStart = DEFAULTS,
    output: AnyOutput = TEXT,
) -> None:
    """Run methods side by side on the same shards, public set and initial weights."""
    given = {"seeds": seeds, "num_seeds": num_seeds, "reference": reference, "target": target}
    refuse_beside(resume, methods=methods, **given)
    with start.experiment(resume, _begun_comparison) as experiment:
        from fedkd.cli import preview, results
        from fedkd.studies.comparison import run as comparison

        names = None if methods is None else methods.split(",")
        chosen = chosen_seeds(seeds, num_seeds, experiment)
        fixed, at_once = comparison.checked_target(target), chosen_count(jobs, "jobs")
        with output.progress(lambda: preview.compare_preview(experiment)) as steps:
            if resume is not None:
                done = comparison.resume(resume, jobs=at_once, progress=steps.show)
            else:
                done = comparison.compare(
                    experiment,
                    names,
                    chosen,
                    reference=reference,
                    target=fixed,
                    jobs=at_once,
                    progress=steps.show,
                )
    brief = [f"{entry.label}: {results.spread(entry.accuracies)}" for entry in done.entries]
    texts = ["\n".join(lines) for lines in (done.notes, done.sentences) if lines]
    output.result(done.as_json(), brief, [done.table(), *texts, {"folder": str(done.path)}])


def _begun_comparison(folder: str) -> Experiment:
    from fedkd.studies.comparison.record import ComparisonRecord

    return ComparisonRecord.read(Path(folder)).experiment


def sweep(
    *,
    vary: Annotated[
        str | None,
        Parameter(
            group=WORK,
            metavar="GRID",
            help="keys and values, such as 'alpha=0.1,0.5,0.9 tau=1,5 learning-rate=0.001,0.01'; or, "
            "with --trials, ranges, such as 'alpha=0.1..0.9 tau=1..20' [needed unless --resume]",
        ),
    ] = None,
    of: Annotated[
        str | None,
        Parameter(
            group=WORK,
            metavar="WHAT",
            help="whose accuracy counts [federation: mean over its clients; central: the student "
            "distilled from the pooled teacher; default federation]",
        ),
    ] = None,
    folds: Annotated[
        int | None,
        Parameter(
            group=WORK,
            metavar="F",
            help="parts of the training images, each held out once and measured on; the test set is "
            "never used [whole number ≥ 2; default 3]",
        ),
    ] = None,
    trials: Annotated[
        int | None,
        Parameter(
            group=WORK,
            metavar="N",
            help="points that Optuna chooses from the ranges [whole number ≥ 1; default none: a grid]",
        ),
    ] = None,
    seeds: Seeds = None,
    num_seeds: NumSeeds = None,
    resume: Resume = None,
    start: AnyStart = DEFAULTS,
    output: AnyOutput = TEXT,
) -> None:
    """Choose alpha, tau and the like by cross-validation on the training images."""
    given = {"folds": folds, "trials": trials, "seeds": seeds, "num_seeds": num_seeds}
    refuse_beside(resume, vary=vary, of=of, **given)
    with start.experiment(resume) as experiment:
        from fedkd.cli import preview
        from fedkd.studies.sweep.grid import parse
        from fedkd.studies.sweep.request import SweepRequest

        if resume is not None:
            request = SweepRequest.in_folder(resume)
        else:
            grid = parse(vary, is_search=trials is not None)
            chosen = chosen_seeds(seeds, num_seeds, experiment)
            parts = 3 if folds is None else folds
            request = SweepRequest(grid, trials, chosen, parts, of or "federation")
        with output.progress(
            lambda: preview.sweep_preview(
                experiment, str(request), request.seeds, request.folds, request.of
            )
        ) as steps:
            done = request.make(experiment, steps.show)
    output.result(
        done.as_json(), [f"{done.best}: {done.accuracy_text}"], [done.table(), done.facts()]
    )
