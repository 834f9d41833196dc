"""Options shared by all commands: where the experiment comes from, and what is printed.

Flags are derived from `Experiment` and taken as text. `Experiment` alone validates them, together with a
preset and a file, so that an error is worded once and names the flag or file behind each value.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, make_dataclass
from dataclasses import field as dataclass_field
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Group, Parameter

from fedkd.cli.presets import PRESETS, preset
from fedkd.engines.ray_leftovers import remove_leftovers
from fedkd.errors import FedkdError, one_line
from fedkd.experiment import Experiment, read_toml
from fedkd.keys import AUTO, accepted, kebab

if TYPE_CHECKING:
    from rich.console import RenderableType

    from fedkd.cli.console import ProgressDisplay

Source = tuple[str, Mapping[str, object]]
"""Where keys come from, and the keys."""

WORK = Group("What to run", sort_key=0)
_START = Group(
    "Where to start from (flags win over the file, the file over the preset)", sort_key=5
)
OUTPUT = Group("Output", sort_key=90)
_SECTIONS = {
    "dataset": Group("Data", sort_key=10),
    "student": Group("Models", sort_key=20),
    "strategy": Group("Method", sort_key=30),
    "local_epochs": Group("Training", sort_key=40),
    "attack": Group("Attacks and privacy", sort_key=45),
    "seed": Group("Running", sort_key=50),
}
"""The keys' panels in the help, each by its first key."""

Seeds = Annotated[
    str | None,
    Parameter(
        name="--seeds",
        group=WORK,
        metavar="0,1,2",
        help="seeds separated by commas [whole numbers ≥ 0; default the key seed]",
    ),
]

NumSeeds = Annotated[
    str | None,
    Parameter(
        name="--num-seeds",
        group=WORK,
        metavar="N",
        help="how many seeds, from the key seed on, instead of --seeds [whole number ≥ 1]",
    ),
]

Resume = Annotated[
    str | None,
    Parameter(
        name="--resume",
        group=WORK,
        metavar="FOLDER",
        help="resume what was interrupted in this folder, instead of starting a new run",
    ),
]


def begun_run(folder: str) -> Experiment:
    """Return the experiment of the folder of a run or sweep that has begun."""
    from fedkd.records.folder import RunFolder

    return RunFolder.existing(folder).relocated_experiment()


def refuse_beside(resumed: str | None, **options: object) -> None:
    """Raise an error for options given with ``--resume``, which uses the original ones.

    Raises:
        FedkdError: one of them is not `None`; the message names it.
    """
    names = [name for name, value in options.items() if value is not None]
    if resumed is not None and names:
        flags = ", ".join(name if name.startswith("-") else f"--{kebab(name)}" for name in names)
        raise FedkdError(
            f"--resume {resumed} uses the options that the run was started with; remove {flags}"
        )


@dataclass(frozen=True, kw_only=True)
class _Start:
    """Where an experiment comes from; a flag for each key is added below."""

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
        Parameter(
            group=_START,
            negative="",
            help="shrink all sizes that no flag sets, to take seconds on the same data",
        ),
    ] = False

    def sources(self) -> list[Source]:
        """Return the preset, the file and each flag with its keys; later ones win."""
        sources: list[Source] = []
        if self.preset is not None:
            keys = preset(self.preset).model_dump(exclude_unset=True)
            sources.append((f"--preset {self.preset}", keys))
        if self.config is not None:
            sources.append(read_toml(self.config))
        for name in self._flags():
            sources.append((f"--{kebab(name)}", {name: getattr(self, name)}))
        return sources

    def _flags(self) -> list[str]:
        """Return the keys that are given as flags."""
        return [name for name in Experiment.model_fields if getattr(self, name) is not None]

    @contextmanager
    def experiment(
        self,
        resumed: str | None = None,
        begun: Callable[[str], Experiment] = begun_run,
        *,
        besides: Sequence[str] = (),
    ) -> Iterator[Experiment]:
        """Yield the validated experiment; errors in the block name the source of each value.

        Args:
            resumed: a folder to resume in, whose experiment is yielded.
            begun: returns the experiment of such a folder.
            besides: flags that may change it nevertheless.
        """
        sources = self.sources()
        if resumed is not None:
            keys = {where: True for where, _ in sources if where not in besides}
            refuse_beside(resumed, **{"--smoke": self.smoke or None}, **keys)
            sources = [(resumed, begun(resumed).flat()), *sources]
        try:
            experiment = Experiment.load(*sources)
            remove_leftovers()
            yield experiment.smoke(*self._flags()) if self.smoke else experiment
        except FedkdError as error:
            raise error.with_sources(_origins(sources)) from error


def _flags() -> Iterator[tuple[str, object, Any]]:
    """Yield each key as a flag that takes text: `Experiment` alone validates it."""
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
    """Options of what is printed."""

    json: Annotated[
        bool, Parameter(group=OUTPUT, negative="", help="the result as JSON, no text on stdout")
    ] = False
    quiet: Annotated[
        bool, Parameter(group=OUTPUT, negative="", help="the result in one line, no progress")
    ] = False

    def progress(self, preview: Callable[[], Mapping[str, str]]) -> ProgressDisplay:
        """Return a display of progress, which begins with the preview."""
        from fedkd.cli.console import ProgressDisplay

        is_brief = self.json or self.quiet
        return ProgressDisplay(shown=not self.quiet, preview=None if is_brief else preview)

    def result(
        self,
        value: object,
        brief: Iterable[str],
        full: Iterable[RenderableType | Mapping[str, object]],
    ) -> None:
        """Print the result in the chosen form."""
        from fedkd.cli.console import write

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
DEFAULTS = Start()
TEXT = Output()


def _origins(sources: Sequence[Source]) -> dict[str, tuple[object, str]]:
    """Return the value of each key and where it comes from; later sources win."""
    origins: dict[str, tuple[object, str]] = {
        kebab(name): (key.default, "the default") for name, key in Experiment.model_fields.items()
    }
    for where, keys in sources:
        origins |= {kebab(name): (value, f"from {where}") for name, value in keys.items()}
    return origins


def chosen_seeds(text: str | None, count: str | None, experiment: Experiment) -> list[int]:
    """Return the seeds in a text, separated by commas, or so many from the key ``seed`` on.

    Raises:
        FedkdError: one of them is no seed or is there twice, or both are given.
    """
    if text is not None and count is not None:
        raise FedkdError(f"seeds = '{text}' contradicts num-seeds = '{count}': give one of the two")
    if text is None:
        return [experiment.seed + n for n in range(chosen_count(count, "num-seeds"))]
    seeds = [Experiment.load(("--seeds", {"seed": part.strip()})).seed for part in text.split(",")]
    if len(set(seeds)) < len(seeds):
        raise FedkdError(f"seeds = '{text}' (from --seeds): give each seed once")
    return seeds


def chosen_count(text: str | None, key: str) -> int:
    """Return the number in a text, by default 1.

    Raises:
        FedkdError: it is none, below 1, or more runs than anybody makes.
    """
    if text is None:
        return 1
    digits = text if text.isdecimal() else "0"
    if len(digits) > 6:
        raise FedkdError(f"{key} = '{one_line(text)}' (from --{key}): must be below 1,000,000")
    if int(digits) < 1:
        raise FedkdError(f"{key} = '{text}' (from --{key}): must be a whole number ≥ 1")
    return int(digits)
