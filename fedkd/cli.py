"""The command line: the same keys as everywhere else, checked in the same place.

Flags are derived from `Experiment`, taken as text and validated by it alone, together with a preset
and a file, so that an error is worded once and names the flag or file behind each value. Results go
to stdout, progress and errors to stderr. PyTorch is imported by the commands that need it, not here.
"""

from __future__ import annotations

import io
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, make_dataclass
from dataclasses import field as dataclass_field
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

from cyclopts import App, Group, Parameter
from cyclopts.exceptions import (
    CycloptsError,
    MissingArgumentError,
    UnknownCommandError,
    UnknownOptionError,
    UnusedCliTokensError,
)

from fedkd import __version__
from fedkd.errors import FedkdError, nearest
from fedkd.experiment import AUTO, Experiment, accepted, kebab, read_toml, snake
from fedkd.presets import PRESETS, preset

if TYPE_CHECKING:
    from rich.console import RenderableType

    from fedkd.display import Steps

Source = tuple[str, Mapping[str, object]]
"""Where keys came from, and the keys."""

app = App(
    name="fedkd",
    help="Simulate federated distillation on Flower: students, teachers and soft labels.\n\n"
    "`fedkd COMMAND --help` lists what a command takes, with ranges and defaults.",
    version=__version__,
    help_format="plaintext",
    default_parameter=Parameter(show_default=False),
    suppress_keyboard_interrupt=False,
)


# --- What every command takes ---------------------------------------------------------------------

_WORK = Group("What to run", sort_key=0)
_START = Group(
    "Where to start from (flags win over the file, the file over the preset)", sort_key=5
)
_OUTPUT = Group("Output", sort_key=90)
_SECTIONS = {
    "dataset": Group("Data", sort_key=10),
    "student": Group("Models", sort_key=20),
    "strategy": Group("Method", sort_key=30),
    "local_epochs": Group("Training", sort_key=40),
    "seed": Group("Running", sort_key=50),
}
"""The keys' panels in the help, each by its first key."""

Seeds = Annotated[
    str | None,
    Parameter(
        name="--seeds",
        group=_WORK,
        metavar="0,1,2",
        help="seeds separated by commas [whole numbers ≥ 0; default the key seed]",
    ),
]


@dataclass(frozen=True, kw_only=True)
class _Start:
    """Where an experiment comes from; the flags themselves are added below."""

    preset: Annotated[
        str | None,
        Parameter(
            group=_START, metavar="NAME", help=f"ready-made experiment [{', '.join(PRESETS)}]"
        ),
    ] = None
    config: Annotated[
        str | None,
        Parameter(
            group=_START, metavar="FILE", help="TOML file of the keys below, such as alpha = 0.5"
        ),
    ] = None
    smoke: Annotated[
        bool,
        Parameter(group=_START, negative="", help="shrink all sizes: seconds, on the same data"),
    ] = False

    def sources(self) -> list[Source]:
        """Return the preset, the file and each flag with its keys; later ones win."""
        found: list[Source] = []
        if self.preset is not None:
            keys = preset(self.preset).model_dump(exclude_unset=True)
            found.append((f"--preset {self.preset}", keys))
        if self.config is not None:
            found.append(read_toml(self.config))
        for name in Experiment.model_fields:
            if (text := getattr(self, name)) is not None:
                found.append((f"--{kebab(name)}", {name: text}))
        return found

    @contextmanager
    def experiment(self) -> Iterator[Experiment]:
        """Validate the experiment for the block; errors in it name the source of each value."""
        sources = self.sources()
        try:
            experiment = Experiment.load(*sources)
            yield experiment.smoke() if self.smoke else experiment
        except FedkdError as error:
            raise FedkdError(with_sources(str(error), sources)) from error


def _flags() -> Iterator[tuple[str, object, Any]]:
    """Turn each key into a flag that takes text: `Experiment` alone says what is right."""
    section = _SECTIONS["dataset"]
    for name, key in Experiment.model_fields.items():
        section = _SECTIONS.get(name, section)
        default = AUTO if key.default is None else key.default
        text = str(default).lower() if isinstance(default, bool) else f"{default}"
        about = f"{key.description} [{accepted(key)}; default {text}]"
        flag = Parameter(f"--{kebab(name)}", group=section, help=about, metavar="VALUE")
        yield name, Annotated[str | None, flag], dataclass_field(default=None)


if TYPE_CHECKING:
    Start = _Start
else:
    Start = make_dataclass(
        "Start",
        _flags(),
        bases=(_Start,),
        namespace={"__module__": __name__},
        frozen=True,
        kw_only=True,
    )


@dataclass(frozen=True, kw_only=True)
class Output:
    """What is printed."""

    json: Annotated[
        bool, Parameter(group=_OUTPUT, negative="", help="the result as JSON, no text on stdout")
    ] = False
    quiet: Annotated[
        bool, Parameter(group=_OUTPUT, negative="", help="the result in a line, no progress")
    ] = False

    def progress(self, plan: Callable[[], Mapping[str, str]]) -> Steps:
        """Return a display of progress, which begins with the plan."""
        from fedkd.display import Steps

        return Steps(shown=not self.quiet, plan=None if self.json or self.quiet else plan)

    def result(
        self,
        value: object,
        brief: Iterable[str],
        full: Iterable[RenderableType | Mapping[str, object]],
    ) -> None:
        """Print the result in the form asked for."""
        from fedkd.display import write

        if self.json:
            sys.stdout.write(json.dumps(value, indent=2, allow_nan=False) + "\n")
        elif self.quiet:
            write("\n".join(brief))
        else:
            for number, part in enumerate(full):
                if number:
                    write("")
                write(part)


AnyStart = Annotated[Start, Parameter(name="*")]
AnyOutput = Annotated[Output, Parameter(name="*")]
_DEFAULTS = Start()
_TEXT = Output()


# --- Commands -------------------------------------------------------------------------------------


@app.command
def run(*, start: AnyStart = _DEFAULTS, output: AnyOutput = _TEXT) -> None:
    """Run a federation and write its run folder."""
    with start.experiment() as experiment:
        from fedkd import callbacks, display, preflight, runner

        strategy = preflight.check(experiment)
        rounds = experiment.num_server_rounds
        with output.progress(lambda: display.run_plan(experiment, strategy)) as steps:
            steps.show("starting", 0)
            shown = callbacks.EachRound(
                lambda row: steps.show(display.round_line(row, rounds), row["round"] / rounds)
            )
            done = runner.run(experiment, [shown])
    output.result(
        {"path": str(done.path), **done.result},
        [display.run_line(done)],
        [
            display.rounds_table(done),
            *([display.run_profile(done)] if experiment.profile else []),
            display.run_facts(done),
        ],
    )


@app.command
def central(*, seeds: Seeds = None, start: AnyStart = _DEFAULTS, output: AnyOutput = _TEXT) -> None:
    """Train a teacher on the pooled data, a student alone and a student distilled from it."""
    with start.experiment() as experiment:
        from fedkd import baseline, display

        chosen = _seeds(seeds, experiment)
        with output.progress(lambda: display.central_plan(experiment, chosen)) as steps:
            done = baseline.central(experiment, chosen, progress=steps.show)
    output.result(
        {"path": str(done.path), **done.as_json()},
        [display.central_line(done)],
        [display.central_table(done), display.central_facts(done)],
    )


@app.command
def compare(
    *,
    methods: Annotated[
        str | None,
        Parameter(
            group=_WORK,
            metavar="A,B,C",
            help="strategies, teacher, student-alone, student-distilled, separated by commas "
            "[default all three, LocalOnly, FedAvg, FedMD, DSFL]",
        ),
    ] = None,
    seeds: Seeds = None,
    start: AnyStart = _DEFAULTS,
    output: AnyOutput = _TEXT,
) -> None:
    """Run methods side by side on the same shards, public set and initial weights."""
    with start.experiment() as experiment:
        from fedkd import comparison, display

        names = None if methods is None else methods.split(",")
        chosen = _seeds(seeds, experiment)
        with output.progress(lambda: display.compare_plan(experiment)) as steps:
            done = comparison.compare(experiment, names, chosen, progress=steps.show)
    brief = [f"{entry.label}: {display.spread(entry.accuracies)}" for entry in done.entries]
    output.result(done.as_json(), brief, [done.table()])


@app.command
def strategies(*, output: AnyOutput = _TEXT) -> None:
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
    output: AnyOutput = _TEXT,
) -> None:
    """Print the BibTeX of what a run used: strategy, data, codec, Flower, distillation."""
    from fedkd.citations import citations
    from fedkd.records import RunFolder
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
            group=_WORK,
            metavar="VALUE",
            help="its settings as key=value pairs separated by spaces [default none]",
        ),
    ] = "none",
    engines: Annotated[
        bool,
        Parameter(group=_WORK, negative="", help="compare both engines as well, which starts Ray"),
    ] = False,
    output: AnyOutput = _TEXT,
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
            group=_WORK,
            metavar="FOLDER",
            help="data cache [default $FEDKD_DATA_DIR, then your cache folder]",
        ),
    ] = None,
    output: AnyOutput = _TEXT,
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
    except KeyboardInterrupt:
        _exit("interrupted", 130)


def _exit(text: str, code: int) -> NoReturn:
    print(f"fedkd: {' '.join(text.split())}", file=sys.stderr)
    raise SystemExit(code)


# --- Errors ---------------------------------------------------------------------------------------

_MENTION = re.compile(
    r"\b(?P<key>[a-z]+(?:-[a-z]+)*)(?: =)? (?P<value>'[^']*'|(?<== )[^\s:;,()']++)(?! \(from )"
)
"""A key with its value in the text of an error, the source of which is not named."""


def with_sources(text: str, sources: Sequence[Source]) -> str:
    """Name the sources of the values in an error raised below the command line, or a contradiction.

    What raises it knows keys and values, but not flags and files. The first mention of each key with
    (a part of) its value is followed by where that came from, unless that is there.
    """
    origins: dict[str, tuple[object, str]] = {
        kebab(name): (key.default, "the default") for name, key in Experiment.model_fields.items()
    }
    for where, keys in sources:
        origins |= {kebab(name): (value, f"from {where}") for name, value in keys.items()}

    def add(mention: re.Match[str]) -> str:
        key, value = mention["key"], mention["value"].strip("'")
        if key not in origins or not _is_part(value, origins[key][0]):
            return mention[0]
        return f"{mention[0]} ({origins.pop(key)[1]})"

    return _MENTION.sub(add, text)


def _is_part(text: str, value: object) -> bool:
    """Say whether `text` is `value`, or a part of it: one model of a list, the file of file:class."""
    with suppress(ValueError):
        return float(text) == float(str(value))
    return text.lower() in str(value).lower()


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


def _seeds(text: str | None, experiment: Experiment) -> list[int]:
    """Read a comma list of seeds, each checked as the key ``seed`` is, which is the default."""
    if text is None:
        return [experiment.seed]
    seeds = [Experiment.load(("--seeds", {"seed": part.strip()})).seed for part in text.split(",")]
    if len(set(seeds)) < len(seeds):
        raise FedkdError(f"seeds = '{text}' (from --seeds): each must be named once")
    return seeds
