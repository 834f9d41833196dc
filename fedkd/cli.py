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
from contextlib import contextmanager
from dataclasses import dataclass, make_dataclass
from dataclasses import field as dataclass_field
from pathlib import Path
from statistics import mean, stdev
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, Self

from cyclopts import App, Group, Parameter
from cyclopts.exceptions import (
    CycloptsError,
    MissingArgumentError,
    UnknownCommandError,
    UnknownOptionError,
    UnusedCliTokensError,
)
from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from fedkd import __version__
from fedkd.errors import FedkdError, nearest
from fedkd.experiment import AUTO, Experiment, accepted, kebab, read_toml, snake
from fedkd.presets import PRESETS, preset

if TYPE_CHECKING:
    from fedkd.data import Dataset
    from fedkd.records import CentralRun, Row, Run
    from fedkd.strategy import DistillationStrategy
    from fedkd.world import World

Source = tuple[str, Mapping[str, object]]
"""Where keys came from, and the keys."""

SHOWN_ROUNDS = 5
"""Rounds in the table at the end; all are in the run folder."""

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
    def experiment(self, seeds: str | None = None) -> Iterator[Experiment]:
        """Validate the experiment for the block; errors in it name the source of each value."""
        sources = self.sources()
        try:
            experiment = Experiment.load(*sources)
            yield experiment.smoke() if self.smoke else experiment
        except FedkdError as error:
            if seeds is not None:
                sources.append(("--seeds", {"seed": seeds}))
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

    def progress(self, plan: Callable[[], Mapping[str, str]]) -> _Steps:
        """Return a display of progress on stderr; before its first step `plan` goes to stdout.

        By then everything has been checked: an error comes alone.
        """
        announced = not self.json and not self.quiet
        return _Steps(
            shown=not self.quiet, begin=lambda: _print(f"{_facts(plan())}\n") if announced else None
        )

    def result(
        self,
        value: object,
        brief: Iterable[str],
        full: Iterable[RenderableType | Mapping[str, str]],
    ) -> None:
        """Print the result in the form asked for."""
        if self.json:
            sys.stdout.write(json.dumps(value, indent=2, allow_nan=False) + "\n")
        elif self.quiet:
            _print("\n".join(brief))
        else:
            for number, part in enumerate(full):
                if number:
                    _print("")
                _print(_facts(part) if isinstance(part, Mapping) else part)


AnyStart = Annotated[Start, Parameter(name="*")]
AnyOutput = Annotated[Output, Parameter(name="*")]
_DEFAULTS = Start()
_TEXT = Output()


# --- Commands -------------------------------------------------------------------------------------


@app.command
def run(*, start: AnyStart = _DEFAULTS, output: AnyOutput = _TEXT) -> None:
    """Run a federation and write its run folder."""
    with start.experiment() as experiment:
        from fedkd import runner

        strategy = runner.check(experiment)
        rounds = experiment.num_server_rounds
        with output.progress(lambda: _plan(experiment, strategy)) as steps:
            steps.show("starting", 0)
            done = runner.run(
                experiment,
                on_round=lambda row: steps.show(_round_line(row, rounds), row["round"] / rounds),
            )
    facts = _run_facts(done)
    line = f"{facts['accuracy']}; bytes {facts['bytes']}; {facts['seconds']} s; {done.path}"
    output.result({"path": str(done.path), **done.result}, [line], [_rounds_table(done), facts])


@app.command
def central(*, seeds: Seeds = None, start: AnyStart = _DEFAULTS, output: AnyOutput = _TEXT) -> None:
    """Train a teacher on the pooled data, a student alone and a student distilled from it."""
    with start.experiment(seeds) as experiment:
        from fedkd import baseline

        chosen = _seeds(seeds) or [experiment.seed]
        with output.progress(lambda: _pooled(experiment, chosen)) as steps:
            done = baseline.central(experiment, chosen, progress=steps.show)
    result = {"path": str(done.path), **done.as_json()}
    output.result(result, [_central_line(done)], [_central_table(done), _central_facts(done)])


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
    with start.experiment(seeds) as experiment:
        from fedkd import comparison

        names = comparison.METHODS if methods is None else methods.split(",")
        chosen = _seeds(seeds) or [experiment.seed]
        with output.progress(lambda: _shared(experiment)) as steps:
            done = comparison.compare(experiment, names, chosen, progress=steps.show)
    lines = [f"{entry.method}: {_spread(entry.accuracies)}" for entry in done.entries]
    output.result(done.as_json(), lines, [done.table()])


@app.command
def strategies(*, output: AnyOutput = _TEXT) -> None:
    """List the strategies with what they declare."""
    from fedkd import registry

    rows = [_declared(cls) for cls in registry.strategies().values()]
    legend = {
        "up, down": "payload bytes of a client in a round",
        "P": "public images asked for",
        "C": "classes",
        "W": "numbers in the student's weights and buffers",
    }
    names = [str(row["name"]) for row in rows]
    output.result(rows, names, [_strategies_table(rows), legend])


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
    from fedkd.data import DATASETS, data_folder, load

    folder = data_folder(data_dir)
    if name is not None:
        facts = _loaded(load(name, folder))
        words = {key: _words(value) for key, value in facts.items()}
        line = f"{name}: {facts['train']} training and {facts['test']} test images"
        output.result(facts, [line], [words])
        return
    rows = [_known(known, folder) for known in DATASETS]
    output.result(rows, list(DATASETS), [_datasets_table(rows), {"folder": str(folder)}])


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
    r"""\b(?P<key>[a-z]+(?:-[a-z]+)*+)(?:\ =)?\ (?P<value>'[^']*'|"[^"]*"|(?<==\ )[^\s:;,()'"]++)
        (?:\ \(from\ Python\))?+(?!\ \(from\ )""",
    re.VERBOSE,
)
"""A key with its value in the text of an error, the source of which is not named."""


def with_sources(text: str, sources: Sequence[Source]) -> str:
    """Add to an error's text where the values that it names came from.

    What is below the command line knows keys and values, but not flags and files. The first mention
    of each key with (a part of) its value is followed by its source, unless that is there.
    """
    given = {kebab(name): (value, where) for where, keys in sources for name, value in keys.items()}
    done: set[str] = set()

    def add(mention: re.Match[str]) -> str:
        key, value = mention["key"], mention["value"].strip("'\"")
        if key in done or snake(key) not in Experiment.model_fields:
            return mention[0]
        default = Experiment.model_fields[snake(key)].default
        whole, where = given.get(key, (default, ""))
        if not _is_part(value, whole):
            return mention[0]
        done.add(key)
        shown = mention[0].removesuffix(" (from Python)")
        return f"{shown} (from {where})" if where else f"{shown} (the default)"

    return _MENTION.sub(add, text)


def _is_part(text: str, value: object) -> bool:
    """Say whether `text` is `value`, or a part of it: one model of a list, the file of file:class."""
    try:
        return float(text) == float(str(value))
    except ValueError:
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


def _seeds(text: str | None) -> list[int] | None:
    """Read a comma list of seeds, each checked as the key ``seed`` is."""
    if text is None:
        return None
    seeds = [Experiment.load(("--seeds", {"seed": part.strip()})).seed for part in text.split(",")]
    if len(set(seeds)) < len(seeds):
        raise FedkdError(f"seeds = '{text}' (from --seeds): each must be named once")
    return seeds


# --- Progress -------------------------------------------------------------------------------------


class _Steps:
    """How far the work is, on stderr: a bar on a terminal, elsewhere a line for each new text."""

    def __init__(self, shown: bool, begin: Callable[[], None]) -> None:
        console = Console(stderr=True, highlight=False)
        self._bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            console=console,
            transient=True,
            redirect_stdout=False,  # results must not land on stderr
            disable=not (shown and console.is_terminal),
        )
        self._task = self._bar.add_task("", total=1.0)
        self._in_lines = shown and not console.is_terminal
        self._begin: Callable[[], None] | None = begin
        self._text = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def show(self, text: str, share: float) -> None:
        """Say what is going on, and how much of it is done, 0..1."""
        if self._begin is not None:
            self._begin()
            self._begin = None
            self._bar.reset(self._task)
            self._bar.start()
        self._bar.update(self._task, description=text, completed=share)
        if self._in_lines and share > 0 and text != self._text:
            print(text, file=sys.stderr, flush=True)
        self._text = text


def _round_line(row: Row, rounds: int) -> str:
    parts = [f"{_percent(row[name])} {label}" for name, label in _accuracies([row]).items()]
    if row["dropped"]:
        parts.append(f"{len(row['dropped'])} dropped")
    return f"round {row['round']} of {rounds}: {', '.join(parts) or 'not evaluated'}"


def _accuracies(rows: Sequence[Row]) -> dict[str, str]:
    """Return the accuracies that the rows hold, with labels, in the order of a usual round."""
    found: dict[str, str] = {}
    for row in reversed(rows):  # the first round may have phases of its own
        for name, value in row.items():
            if name.startswith("accuracy_after_") and value is not None:
                found[name] = name.removeprefix("accuracy_").replace("_", " ")
    if any(row["server_accuracy"] is not None for row in rows):
        found["server_accuracy"] = "server"
    return found


# --- What is about to happen ----------------------------------------------------------------------


def _plan(experiment: Experiment, strategy: DistillationStrategy) -> dict[str, str]:
    """Say what a federation is about to do."""
    from fedkd.world import world_of

    settings = ", ".join(f"{kebab(key)}={value}" for key, value in strategy.settings().items())
    return {
        **_shared(experiment),
        "strategy": f"{strategy.name()}{f' ({settings})' if settings else ''}, "
        f"{experiment.num_server_rounds} rounds",
        "loss": _losses(experiment, strategy, world_of(experiment)),
    }


def _shared(experiment: Experiment) -> dict[str, str]:
    """Say what is the same for all methods of a comparison."""
    from fedkd.world import world_of

    world = world_of(experiment)
    sizes = [len(shard) for shard in world.shards]
    drawn = experiment.clients_per_round
    each = "" if drawn == len(sizes) else f", {drawn} drawn each round"
    return {
        "data": _images(experiment, len(world.train), len(world.test)),
        "public": _public(experiment, world),
        "clients": f"{len(sizes)} ({experiment.partition}), {min(sizes):,} to {max(sizes):,} private "
        f"images each{each}",
        "models": "; ".join(
            f"{key} {_models(getattr(experiment, snake(key)), world)}"
            for key in ("student", "teacher", "server-model")
        ),
        "training": _training(experiment),
        "engine": f"{experiment.engine} on {world.train.device}",
        "loss": _weights(experiment, world),
    }


def _pooled(experiment: Experiment, seeds: Sequence[int]) -> dict[str, str]:
    """Say what the central baseline is about to do."""
    from fedkd.world import world_of

    world = world_of(experiment)
    return {
        "data": _images(experiment, len(world.pooled), len(world.test)),
        "models": f"teacher {_models(experiment.teacher_of(0), world)}; "
        f"student {_models(experiment.student_of(0), world)}",
        "training": f"{_training(experiment)}; epochs: teacher {experiment.local_epochs}, "
        f"students {experiment.distill_epochs}",
        "loss": f"student distilled {_weights(experiment, world)}; teacher and student alone CE",
        "seeds": ", ".join(str(seed) for seed in seeds),
        "device": str(world.train.device),
    }


def _weights(experiment: Experiment, world: World) -> str:
    from fedkd.losses import effective_weights

    return effective_weights(
        experiment.alpha, experiment.tau, experiment.kl_reduction, world.num_classes
    )


def _images(experiment: Experiment, train: int, test: int) -> str:
    return f"{experiment.dataset}, {train:,} training and {test:,} test images"


def _public(experiment: Experiment, world: World) -> str:
    where = "of the training images" if experiment.public == "train" else f"of {experiment.public}"
    labels = "without labels" if world.public.labels is None else "with labels"
    per_round = experiment.public_per_round
    return f"{len(world.public):,} {where}, {labels}" + (
        f", {per_round:,} drawn each round" if per_round else ""
    )


def _models(names: str, world: World) -> str:
    from fedkd.models import num_parameters

    return ", ".join(
        name if name == "none" else f"{name} ({num_parameters(world.model(name)):,} parameters)"
        for name in dict.fromkeys(part.strip() for part in names.split(","))
    )


def _losses(experiment: Experiment, strategy: DistillationStrategy, world: World) -> str:
    """Spell out the loss of each training phase of a usual round."""
    from fedkd.phases import Fit

    values = {"alpha": experiment.alpha, "1-alpha": 1 - experiment.alpha}
    losses = []
    for phase in strategy.phases(2):
        if not isinstance(phase, Fit):
            continue
        terms = {**phase.private, **phase.public}
        text = " + ".join(
            f"{values[weight] if isinstance(weight, str) else weight:g} × {name.upper()}"
            for name, weight in terms.items()
        ).removeprefix("1 × ")
        if terms == {"kl": "alpha", "ce": "1-alpha"}:
            text = _weights(experiment, world)
        if "ce" in phase.public and world.public.labels is None:
            text += " of private images"
        losses.append(f"{phase.name} {text}")
    return "; ".join(losses)


def _training(experiment: Experiment) -> str:
    return f"{experiment.optimizer} at {experiment.learning_rate:g}, batches of {experiment.batch_size}"


# --- Results --------------------------------------------------------------------------------------


def _run_facts(done: Run) -> dict[str, str]:
    tested = [accuracy for accuracy in done.client_accuracy if accuracy is not None]
    server = done.server_accuracy
    return {
        "accuracy": f"{_percent(done.accuracy)} on average over {len(tested)} clients "
        f"({_percent(min(tested))} to {_percent(max(tested))})",
        "server": "keeps no model" if server is None else _percent(server),
        "bytes": f"{done.bytes_up:,} up, {done.bytes_down:,} down",
        "seconds": f"{done.result['seconds']:.1f}",
        "folder": str(done.path),
    }


def _rounds_table(done: Run) -> Table:
    rows = done.rounds[-SHOWN_ROUNDS:]
    accuracies = _accuracies(rows)
    table = _table("round", "answered", *accuracies.values(), "bytes up", "bytes down", "seconds")
    for row in rows:
        table.add_row(
            str(row["round"]),
            f"{len(row['answered'])} of {len(row['sampled'])}",
            *(_percent(row.get(name)) for name in accuracies),
            f"{row['bytes_up']:,}",
            f"{row['bytes_down']:,}",
            f"{row['seconds']['round']:.1f}",
        )
    return table


def _central_table(done: CentralRun) -> Table:
    table = _table("", "test accuracy", "test errors", "parameters")
    size = done.test_size
    for label, model, accuracies in _central_rows(done):
        errors = _mean_std([(1 - accuracy) * size for accuracy in accuracies])
        table.add_row(label, _spread(accuracies), errors, f"{done.parameters[model]:,}")
    return table


def _central_rows(done: CentralRun) -> list[tuple[str, str, list[float]]]:
    return [
        ("teacher", "teacher", done.teacher_accuracies),
        ("student alone", "student", done.student_alone_accuracies),
        ("student distilled", "student", done.student_accuracies),
    ]


def _central_facts(done: CentralRun) -> dict[str, str]:
    spread = " (mean ± standard deviation)" if len(done.seeds) > 1 else ""
    return {
        "gap closed": _gap(done),
        "agreement": f"{_spread(done.agreements)} of test images alike by teacher and student distilled",
        "test set": f"{done.test_size:,} images",
        "seeds": f"{', '.join(str(seed) for seed in done.seeds)}{spread}",
        "seconds": ", ".join(f"{what} {spent:.1f}" for what, spent in done.seconds.items()),
        "folder": str(done.path),
    }


def _central_line(done: CentralRun) -> str:
    parts = [f"{label} {_spread(values)}" for label, _, values in _central_rows(done)]
    return f"{', '.join(parts)}; gap closed {_gap(done)}; {done.path}"


def _gap(done: CentralRun) -> str:
    closed = done.gap_closed
    return (
        "n/a (the teacher is not better than the student alone)"
        if closed is None
        else _percent(closed)
    )


def _declared(cls: type[DistillationStrategy]) -> dict[str, Any]:
    from fedkd.knowledge import Weights

    strategy, facts = cls(), cls.facts
    return {
        "name": cls.name(),
        "paper": facts.paper,
        "up": facts.up,
        "down": facts.down,
        "public_labels": facts.public_labels,
        "server_model": facts.server_model,
        "mixed_architectures": strategy.uploads() is not Weights,
        "reports": facts.reports,
        "settings": strategy.settings(),
        "summary": (cls.__doc__ or "").strip().partition("\n")[0],
    }


def _strategies_table(rows: Iterable[Mapping[str, Any]]) -> Table:
    table = _table(
        "strategy", "paper", "up", "down", "public labels", "server model", "mixed models",
        "reports", "settings", right=False,
    )  # fmt: skip
    for row in rows:
        table.add_row(
            row["name"],
            row["paper"],
            row["up"],
            row["down"],
            "needed" if row["public_labels"] else "not needed",
            row["server_model"],
            "yes" if row["mixed_architectures"] else "no",
            row["reports"],
            "\n".join(f"{kebab(key)}={value}" for key, value in row["settings"].items()) or "none",
        )
    return table


def _known(name: str, folder: Path) -> dict[str, Any]:
    """Say what is known of a data set without loading it, and whether it is in the folder."""
    from fedkd.data import DATASETS

    info = DATASETS[name]
    file = folder / f"{name}.safetensors"
    return {
        "name": name,
        "train": info.num_train,
        "test": info.num_test,
        "input_shape": list(info.input_shape),
        "classes": info.num_classes,
        "needs_download": info.needs_download,
        "cached": str(file) if file.is_file() else None,
        "description": info.description,
    }


def _datasets_table(rows: Iterable[Mapping[str, Any]]) -> Table:
    table = _table("data set", "training", "test", "classes", "image", "where", "what")
    table.columns[-1].justify = table.columns[-2].justify = "left"
    for row in rows:
        where = "in the folder" if row["cached"] else "to be downloaded"
        table.add_row(
            row["name"],
            f"{row['train']:,}",
            f"{row['test']:,}",
            str(row["classes"]),
            "×".join(str(side) for side in row["input_shape"]),
            where if row["needs_download"] else "installed",
            row["description"],
        )
    return table


def _loaded(dataset: Dataset) -> dict[str, Any]:
    return {
        "name": dataset.name,
        "train": len(dataset.train_images),
        "test": len(dataset.test_images),
        "input_shape": list(dataset.input_shape),
        "class_names": list(dataset.class_names),
        "mean": list(dataset.mean),
        "std": list(dataset.std),
    }


# --- Text -----------------------------------------------------------------------------------------


def _print(what: RenderableType) -> None:
    """Print to stdout: coloured on a terminal, plain and 120 wide elsewhere."""
    width = None if sys.stdout.isatty() else 120
    console = Console(width=width, markup=False, highlight=False, emoji=False)
    console.print(what, soft_wrap=isinstance(what, str))


def _table(first: str, *others: str, right: bool = True) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column(first)
    for name in others:
        table.add_column(name, justify="right" if right else "left")
    return table


def _facts(facts: Mapping[str, str]) -> str:
    width = max(len(name) for name in facts)
    return "\n".join(f"{name:<{width}}  {text}" for name, text in facts.items())


def _words(value: object) -> str:
    if isinstance(value, list):
        return ", ".join(str(part) for part in value)
    return f"{value:,}" if isinstance(value, int) else str(value)


def _percent(fraction: float | None) -> str:
    return "n/a" if fraction is None else f"{100 * fraction:.1f} %"


def _spread(fractions: Sequence[float]) -> str:
    return f"{_mean_std([100 * fraction for fraction in fractions])} %"


def _mean_std(values: Sequence[float]) -> str:
    """Write the mean and, from two values on, the standard deviation (n − 1)."""
    spread = f" ± {stdev(values):.1f}" if len(values) > 1 else ""
    return f"{mean(values):.1f}{spread}"
