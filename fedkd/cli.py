"""The command line: the same keys as everywhere else, checked in the same place.

Results go to stdout, progress and errors to stderr. PyTorch is imported by the commands that need it, not
here. What they take is in `fedkd.options`.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, NoReturn

from cyclopts import App, Parameter
from cyclopts.exceptions import (
    CycloptsError,
    MissingArgumentError,
    UnknownCommandError,
    UnknownOptionError,
    UnusedCliTokensError,
)

from fedkd import __version__
from fedkd.errors import FedkdError, nearest, printable
from fedkd.experiment import Experiment, accepted, kebab, snake
from fedkd.options import (
    DEFAULTS,
    OUTPUT,
    TEXT,
    WORK,
    AnyOutput,
    AnyStart,
    Resume,
    Seeds,
    chosen_accuracy,
    chosen_count,
    chosen_seeds,
    refuse_beside,
)

app = App(
    name="fedkd",
    help="Simulate federated distillation on Flower: students, teachers and soft labels.\n\n"
    "`fedkd COMMAND --help` lists what a command takes, with ranges and defaults.",
    version=__version__,
    help_format="plaintext",
    default_parameter=Parameter(show_default=False),
    suppress_keyboard_interrupt=False,
)


@app.command
def run(
    *,
    track: Annotated[
        str | None,
        Parameter(
            group=OUTPUT,
            metavar="NAME",
            help="follow the run in tensorboard, wandb, or both separated by a comma [default neither]",
        ),
    ] = None,
    resume: Resume = None,
    start: AnyStart = DEFAULTS,
    output: AnyOutput = TEXT,
) -> None:
    """Run a federation and write its run folder, or go on with one that was cut off."""
    with start.experiment(resume) as experiment:
        from fedkd import display, runner
        from fedkd.engines import preflight
        from fedkd.findings.diagnose import findings
        from fedkd.records import callbacks, trackers

        followers = [] if track is None else trackers.trackers(track)
        strategy = preflight.check(experiment, is_new=resume is None)
        rounds = experiment.num_server_rounds
        with output.progress(lambda: display.run_plan(experiment, strategy)) as steps:
            steps.show("starting", 0)
            shown = callbacks.EachRound(
                lambda row: steps.show(display.round_line(row, rounds), row["round"] / rounds)
            )
            told = [shown, *followers]
            done = runner.resume(resume, told) if resume else runner.run(experiment, told)
    found = findings(done)
    output.result(
        {"path": str(done.path), **done.result, "findings": [each.as_json() for each in found]},
        [display.run_line(done)],
        [
            display.rounds_table(done),
            *([display.run_profile(done)] if experiment.profile else []),
            display.run_facts(done),
            *map(str, found),
        ],
    )


@app.command
def central(*, seeds: Seeds = None, start: AnyStart = DEFAULTS, output: AnyOutput = TEXT) -> None:
    """Train a teacher on the pooled data, a student alone and a student distilled from it."""
    with start.experiment() as experiment:
        from fedkd import baseline, display
        from fedkd.findings.diagnose import findings

        chosen = chosen_seeds(seeds, experiment)
        with output.progress(lambda: display.central_plan(experiment, chosen)) as steps:
            done = baseline.central(experiment, chosen, progress=steps.show)
    found = findings(done)
    output.result(
        {
            "path": str(done.path),
            **done.as_json(),
            "findings": [each.as_json() for each in found],
        },
        [display.central_line(done)],
        [display.central_table(done), display.central_facts(done), *map(str, found)],
    )


@app.command
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
            help="accuracy of which to say when it is reached [0.85 or 85%; default what all that send "
            "something reach]",
        ),
    ] = None,
    jobs: Annotated[
        str | None,
        Parameter(
            group=WORK,
            metavar="N",
            help="runs made at once, in processes of their own, when they fit [whole number ≥ 1; "
            "default 1]",
        ),
    ] = None,
    resume: Resume = None,
    start: AnyStart = DEFAULTS,
    output: AnyOutput = TEXT,
) -> None:
    """Run methods side by side on the same shards, public set and initial weights."""
    refuse_beside(resume, methods=methods, seeds=seeds, reference=reference, target=target)
    with start.experiment(resume, _begun_comparison) as experiment:
        from fedkd import comparison, display

        names = None if methods is None else methods.split(",")
        chosen = chosen_seeds(seeds, experiment)
        share, at_once = chosen_accuracy(target), chosen_count(jobs)
        with output.progress(lambda: display.compare_plan(experiment)) as steps:
            if resume is not None:
                done = comparison.resume(resume, jobs=at_once, progress=steps.show)
            else:
                done = comparison.compare(
                    experiment,
                    names,
                    chosen,
                    reference=reference,
                    target=share,
                    jobs=at_once,
                    progress=steps.show,
                )
    brief = [f"{entry.label}: {display.spread(entry.accuracies)}" for entry in done.entries]
    said = ["\n".join(lines) for lines in (done.notes, done.sentences) if lines]
    output.result(done.as_json(), brief, [done.table(), *said, {"folder": str(done.path)}])


def _begun_comparison(folder: str) -> Experiment:
    from fedkd.comparing.record import Record

    return Record.read(Path(folder)).experiment


@app.command
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
            "never touched [whole number ≥ 2; default 3]",
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
    resume: Resume = None,
    start: AnyStart = DEFAULTS,
    output: AnyOutput = TEXT,
) -> None:
    """Choose alpha, tau and the like by cross-validation on the training images."""
    refuse_beside(resume, vary=vary, of=of, folds=folds, trials=trials, seeds=seeds)
    with start.experiment(resume) as experiment:
        from fedkd import display, sweeps

        if resume is not None:
            asked = sweeps.Asked.in_folder(resume)
        else:
            grid = sweeps.parse(vary, is_search=trials is not None)
            chosen = chosen_seeds(seeds, experiment)
            parts = 3 if folds is None else folds
            asked = sweeps.Asked(grid, trials, chosen, parts, of or "federation")
        with output.progress(
            lambda: display.sweep_plan(experiment, str(asked), asked.seeds, asked.folds, asked.of)
        ) as steps:
            done = asked.make(experiment, steps.show)
    output.result(
        done.as_json(), [f"{done.best}: {done.accuracy_text}"], [done.table(), done.facts()]
    )


@app.command
def report(
    *folders: Annotated[
        str,
        Parameter(
            metavar="FOLDER",
            help="folders of runs, comparisons and sweeps [default: all in runs/]",
        ),
    ],
    file: Annotated[
        str,
        Parameter(
            name="--output", group=WORK, metavar="FILE", help="the page [default report.html]"
        ),
    ] = "report.html",
    figures: Annotated[
        str | None,
        Parameter(
            group=WORK,
            metavar="FOLDER",
            help="write every figure as SVG and PNG there too, and the tables as Markdown and LaTeX",
        ),
    ] = None,
    output: AnyOutput = TEXT,
) -> None:
    """Write one page about runs, comparisons and sweeps: tables, figures, findings."""
    from fedkd import reports
    from fedkd.reporting import sources

    found = sources.find(folders)
    path = reports.write(found, file, figures)
    for line in found.skipped:
        print(printable(line), file=sys.stderr)
    facts = {"report": str(path), **({"figures": figures} if figures is not None else {})}
    output.result(facts, [str(path)], [facts])


@app.command
def export(
    run: Annotated[str, Parameter(metavar="RUN", help="run folder, such as runs/dsfl-mnist-seed0")],
    /,
    *,
    to: Annotated[
        str,
        Parameter(
            group=WORK,
            metavar="FORM",
            help="the form of the file [torch-export, onnx, int8; default torch-export]",
        ),
    ] = "torch-export",
    model: Annotated[
        str | None,
        Parameter(
            group=WORK,
            metavar="MODEL",
            help="which model [of a federated run student (default) or teacher; of a central run "
            "student-distilled (default), student-alone or teacher]",
        ),
    ] = None,
    client: Annotated[
        int | None,
        Parameter(
            group=WORK,
            metavar="K",
            help="of a federated run, whose [default the first that took part in the closing exchange]",
        ),
    ] = None,
    seed: Annotated[
        int | None,
        Parameter(group=WORK, metavar="S", help="of a central run, which [default the first]"),
    ] = None,
    file: Annotated[
        str | None,
        Parameter(
            name="--output",
            group=WORK,
            metavar="FILE",
            help="where to [default RUN/exports/MODEL-OWNER with the form's ending]",
        ),
    ] = None,
    output: AnyOutput = TEXT,
) -> None:
    """Export a trained model of a run as a file for deployment, verified, with a card."""
    from fedkd import exporting

    done = exporting.export(run, to, model=model, client=client, seed=seed, output=file)
    value = {"path": str(done.path), "card": str(done.card_path), **done.card}
    output.result(value, [f"{done.path}: {done.facts['accuracy']}"], [done.facts])


@app.command
def strategies(*, output: AnyOutput = TEXT) -> None:
    """List the strategies with what they declare."""
    from fedkd import display, registry

    rows = [display.strategy_row(cls) for cls in registry.strategies().values()]
    names = [str(row["name"]) for row in rows]
    settings = display.strategies_settings(rows)
    output.result(
        rows, names, [display.strategies_table(rows), display.STRATEGIES_LEGEND, settings]
    )


@app.command
def cite(
    run: Annotated[str, Parameter(metavar="RUN", help="run folder, such as runs/dsfl-mnist-seed0")],
    /,
    *,
    output: AnyOutput = TEXT,
) -> None:
    """Print the BibTeX of what a run used: strategy, data, codec, Flower, distillation."""
    from fedkd.citations import citations
    from fedkd.records.folder import RunFolder
    from fedkd.registry import strategy_of

    folder = RunFolder.existing(run)
    experiment = folder.experiment
    strategy = strategy_of(experiment)
    used = experiment.replace(codec="/".join(map(str, strategy.wires(experiment))))
    entries = citations(used, strategy.facts.paper, folder.version)
    output.result(entries, entries, entries)


@app.command
def check(
    strategy: Annotated[str, Parameter(help="a strategy, named as for --strategy")],
    /,
    *,
    strategy_config: Annotated[
        str,
        Parameter(
            group=WORK,
            metavar="VALUE",
            help="its settings as key=value pairs separated by spaces [default none]",
        ),
    ] = "none",
    engines: Annotated[
        bool,
        Parameter(group=WORK, negative="", help="compare both engines as well, which starts Ray"),
    ] = False,
    output: AnyOutput = TEXT,
) -> None:
    """Check what is true of every strategy, and say what to change in this one."""
    from fedkd import display, registry, testing

    found = registry.find(strategy, strategy_config)
    findings = []
    with output.progress(lambda: display.check_plan(found)) as steps:
        steps.show("starting", 0)
        for finding in testing.examine(found, engines=engines):
            findings.append(finding)
            steps.show(f"{finding.check}: {finding.result}", len(findings) / len(testing.CHECKS))
    report = testing.Report(found.name(), tuple(findings))
    brief = [f"{found.name()}: {display.check_line(report)}", *map(str, report.failures)]
    output.result(
        report.as_json(), brief, [display.findings_table(report), display.check_line(report)]
    )
    if report.failures:
        raise FedkdError(f"{found.name()} fails {', '.join(f.check for f in report.failures)}")


@app.command
def data(
    name: Annotated[str | None, Parameter(help="load this one, downloading it if needed")] = None,
    /,
    *,
    data_dir: Annotated[
        str | None,
        Parameter(
            group=WORK,
            metavar="FOLDER",
            help="data cache [default $FEDKD_DATA_DIR, then your cache folder]",
        ),
    ] = None,
    output: AnyOutput = TEXT,
) -> None:
    """List the data sets, or load one."""
    from fedkd import display
    from fedkd.data import DATASETS, data_folder, load

    folder = data_folder(data_dir)
    if name is None:
        rows = [display.dataset_row(known, folder) for known in DATASETS]
        output.result(rows, DATASETS, [display.datasets_table(rows), {"folder": str(folder)}])
    else:
        facts = display.dataset_facts(load(name, folder))
        brief = f"{name}: {facts['train']} training and {facts['test']} test images"
        output.result(facts, [brief], [facts])


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line.

    Raises:
        SystemExit: with 2 for a mistake that the user can mend and with 130 for Ctrl-C, each after one
            line on stderr. Any other exception is ours and comes with its traceback.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal without τ still gets its table
    tokens = sys.argv[1:] if argv is None else list(argv)
    try:
        app(tokens, exit_on_error=False, print_error=False, result_action="return_value")
    except FedkdError as error:
        _exit(str(error), 2)
    except CycloptsError as error:
        _exit(_usage(error), 2)
    except KeyboardInterrupt as interrupt:
        _exit(str(interrupt) or "interrupted", 130)


def _exit(text: str, code: int) -> NoReturn:
    print(f"fedkd: {printable(' '.join(text.split()))}", file=sys.stderr)
    raise SystemExit(code)


# --- Errors ---------------------------------------------------------------------------------------


def _usage(error: CycloptsError) -> str:
    """Say in one line what is wrong with the arguments."""
    command = " ".join(["fedkd", *(error.command_chain or ())])
    word = (error.unused_tokens or [""])[0]
    if isinstance(error, UnknownCommandError):
        commands = [name for name in app if not name.startswith("-")]
        return f"unknown command '{word}'{nearest(word, commands)}; there are {', '.join(commands)}"
    if isinstance(error, UnknownOptionError):
        return _unknown_option(error, command)
    if isinstance(error, MissingArgumentError) and error.argument is not None:
        flag = error.keyword or error.argument.name
        field = Experiment.model_fields.get(snake(flag.removeprefix("--")))
        must = f"must be {accepted(field)}" if field else f"`{command} --help` says what it takes"
        return f"{flag} has no value: {must}"
    if isinstance(error, UnusedCliTokensError):
        key, equals, value = word.partition("=")
        hint = f" (did you mean '--{key} {value}'?)" if equals else ""
        hint = f" (did you mean '--config {word}'?)" if word.endswith(".toml") else hint
        return f"unexpected argument '{word}'{hint}; `{command} --help` lists what it takes"
    return str(error)


def _unknown_option(error: UnknownOptionError, command: str) -> str:
    """Answer an unknown flag as an unknown key is answered, where the command takes keys."""
    flag, _, value = (error.token.keyword or error.token.value).partition("=")
    options = [name for a in error.argument_collection for name in a.names if name[:1] == "-"]
    keys = [f"--{kebab(name)}" for name in Experiment.model_fields]
    own = [option for option in options if option not in keys]
    hint = nearest(flag, options)
    if len(own) == len(options) or any(f"'{option}'" in hint for option in own):
        return f"unknown option {flag}{hint or f'; `{command} --help` lists them'}"
    try:
        Experiment.load((flag, {flag.lstrip("-"): value}))
    except FedkdError as unknown:
        return str(unknown)
    return f"unknown option {flag}{hint}"
