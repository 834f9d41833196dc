"""Reports: one HTML file that shows the results of runs, made from their folders alone.

No script, no network, no date: the same folders give the same file.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedkd.errors import FedkdError, printable
from fedkd.experiment import Experiment
from fedkd.keys import kebab
from fedkd.records.files import package_version, replace_file
from fedkd.records.folder import RunFolder
from fedkd.records.results import CentralRun, Run
from fedkd.reports.findings.diagnose import findings
from fedkd.reports.findings.learning import Finding
from fedkd.reports.page import experiment as report_experiment
from fedkd.reports.page import svg as report_svg
from fedkd.reports.page import sweeps as report_sweeps
from fedkd.reports.page import tables as report_tables
from fedkd.reports.page.central import of_central
from fedkd.reports.page.collect import Federations, Sources, find, partition_text
from fedkd.reports.page.figures import of_federations
from fedkd.reports.page.parts import (
    Drawing,
    Missing,
    Shown,
    privacy,
    seeds_text,
    slug,
    tested_on,
)
from fedkd.reports.page.tables import Table
from fedkd.reports.plots.style import COLOURS, HEAT, INK, MUTED, ON_HEAT, PAPER, RULE
from fedkd.studies.comparison.result import Comparison
from fedkd.studies.sweep.result import Sweep

LIGHT = {
    "paper": PAPER,
    "ink": INK,
    "muted": MUTED,
    "rule": RULE,
    "heat": HEAT,
    "on_heat": ON_HEAT,
    "curves": COLOURS,
}
"""Colours of the page on white, as in the figures."""


def report(
    folders: Sequence[str | Path] | str | Path = (),
    output: str | Path = "report.html",
    figures: str | Path | None = None,
) -> Path:
    """Write a report on runs, baselines, comparisons and sweeps as one HTML file.

    Args:
        folders: their folders, or folders that contain such, or one; by default all in ``runs/``.
        output: the file, which is replaced.
        figures: a folder for every figure as SVG and PNG, and the tables as Markdown and LaTeX.

    Returns:
        `output`.

    Raises:
        FedkdError: a given folder holds nothing finished, nothing is found, or a file cannot be
            written.
    """
    several = (folders,) if isinstance(folders, str | Path) else folders
    return write(find(several), output, figures)


def write(sources: Sources, output: str | Path, figures: str | Path | None = None) -> Path:
    """Write a report on the sources from `fedkd.reports.page.collect.find`; see `report`."""
    path = Path(output)
    if not path.parent.is_dir():
        raise FedkdError(f"output = {path}: there is no folder {path.parent}")
    sections = _sections(sources)
    if figures is not None:
        _write_files(sections, Path(figures))
    replace_file(path, page(sections, sources.skipped).encode())
    return path


# --- Sections -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Section:
    """The part of the page on one comparison, group of runs, baseline or sweep."""

    title: str
    facts: str
    shown: list[Shown]
    experiments: list[Experiment]
    commands: list[list[str]]
    folders: list[Path]
    tables: list[Table] = field(default_factory=list)
    sentences: list[str] = field(default_factory=list)
    findings: list[dict[str, str]] = field(default_factory=list)

    @property
    def drawings(self) -> list[Drawing]:
        """The figures that could be drawn."""
        return [each for each in self.shown if isinstance(each, Drawing)]

    @property
    def missing(self) -> list[str]:
        """One line per reason why figures are missing."""
        reasons: dict[str, list[str]] = {}
        for each in self.shown:
            if isinstance(each, Missing):
                reasons.setdefault(each.reason, []).append(each.title)
        return [f"Not shown: {', '.join(t)} ({reason})." for reason, t in reasons.items()]


def _sections(sources: Sources) -> list[Section]:
    return [
        *map(_of_federations, sources.federations),
        *map(_of_central, sources.centrals),
        *map(_of_sweep, sources.sweeps),
    ]


def _of_federations(group: Federations) -> Section:
    runs = [run for seeds in group.runs.values() for run in seeds]
    comparison = group.comparison
    folders = [*group.central_folders, *(run.path for run in runs)]
    return Section(
        title=group.title,
        facts=_facts(group),
        shown=of_federations(group),
        experiments=[run.experiment for run in runs],
        commands=[_compare_command(comparison)] if comparison else _run_commands(group),
        folders=folders,
        tables=report_tables.of_comparison(comparison)
        if comparison
        else [report_tables.of_runs(group)],
        sentences=comparison.sentences if comparison else [],
        findings=_findings_of(group),
    )


def _facts(group: Federations) -> str:
    """Return in one line what the runs have in common."""
    first = next(iter(group.runs.values()))[0]
    experiment = first.experiment
    seeds = sorted({run.experiment.seed for runs in group.runs.values() for run in runs})
    names = {"student": experiment.student, "teacher": experiment.teacher}
    parts = [
        experiment.dataset,
        f"{experiment.num_clients} clients, {partition_text(experiment)}",
        _public(first),
        ", ".join(f"{role} {name}" for role, name in names.items() if name != "none"),
        _counted(sorted({len(r.rounds) for rs in group.runs.values() for r in rs}), "round"),
        seeds_text(seeds),
        tested_on(experiment, first.result["test_size"]),
        *privacy(group.runs),
    ]
    return " · ".join(parts)


def _public(run: Run) -> str:
    experiment = run.experiment
    shards = run.shards
    counts = shards["public"] if shards else None
    count = f"{sum(counts):,} " if counts else f"{experiment.public_size or ''} ".lstrip()
    where = "" if experiment.public == "train" else f" of {experiment.public}"
    return f"{count}public images{where} {'with' if experiment.public_labels else 'without'} labels"


def _counted(values: Sequence[int], what: str) -> str:
    listed = ", ".join(f"{value:,}" for value in values)
    return f"{listed} {what}{'s' * (list(values) != [1])}"


def _compare_command(comparison: Comparison) -> list[str]:
    """Return the command that repeats a comparison."""
    options = {
        "methods": ",".join(entry.method for entry in comparison.entries),
        "seeds": ",".join(map(str, comparison.seeds)),
        "reference": comparison.reference,
    }
    if comparison.asked_target is not None:
        options["target"] = str(comparison.asked_target)
    return report_experiment.command("compare", comparison.experiment, options, ("seed",))


def _run_commands(group: Federations) -> list[list[str]]:
    runs = [run for seeds in group.runs.values() for run in seeds]
    central = [] if group.central is None else [_central_command(group.central)]
    return [*central, *(report_experiment.command("run", run.experiment, {}) for run in runs)]


def _central_command(run: CentralRun) -> list[str]:
    assert run.path is not None
    seeds = ",".join(map(str, run.seeds))
    experiment = run.experiment
    return report_experiment.command("central", experiment, {"seeds": seeds}, ("seed",))


def _of_central(run: CentralRun) -> Section:
    assert run.path is not None
    experiment = run.experiment
    facts = [
        experiment.dataset,
        f"teacher {experiment.teacher} ({run.parameters['teacher']:,} parameters)",
        f"student {experiment.student} ({run.parameters['student']:,} parameters)",
        seeds_text(run.seeds),
        tested_on(experiment, run.test_size),
    ]
    return Section(
        title=run.path.name,
        facts=" · ".join(facts),
        shown=of_central(run),
        experiments=[experiment],
        commands=[_central_command(run)],
        folders=[run.path],
        tables=[report_tables.of_central(run)],
        findings=_merged([("", run)]),
    )


def _of_sweep(sweep: Sweep) -> Section:
    experiment = sweep.experiment
    whose = (
        "central student" if sweep.of == "central" else f"{experiment.strategy}, the clients' mean"
    )
    facts = [
        experiment.dataset,
        whose,
        f"{len(sweep.points)} points",
        f"{sweep.folds} folds",
        seeds_text(sweep.seeds),
    ]
    grid = " ".join(
        f"{kebab(key)}={('..' if sweep.is_search else ',').join(map(str, values))}"
        for key, values in sweep.grid.items()
    )
    options = {"vary": grid, "of": sweep.of, "folds": str(sweep.folds)}
    options["seeds"] = ",".join(map(str, sweep.seeds))
    if sweep.is_search:
        options["trials"] = str(len(sweep.points))
    return Section(
        title=sweep.path.name,
        facts=" · ".join(facts),
        shown=report_sweeps.of_sweep(sweep),
        experiments=[experiment],
        commands=[report_experiment.command("sweep", experiment, options, ("seed", *sweep.grid))],
        folders=[sweep.path],
        tables=[report_sweeps.table(sweep)],
    )


# --- Findings -------------------------------------------------------------------------------------


def _findings_of(group: Federations) -> list[dict[str, str]]:
    central: list[tuple[str, Run | CentralRun]] = []
    if group.central is not None:
        central = [("central", group.central)]
    return _merged([*central, *((name, run) for name, runs in group.runs.items() for run in runs)])


def _merged(runs: Iterable[tuple[str, Run | CentralRun]]) -> list[dict[str, str]]:
    """Return the findings, each once for all runs of a method that have the same problem."""
    alike: dict[tuple[str, str, str], list[tuple[Finding, str]]] = {}
    for name, run in runs:
        for each in findings(run):
            seed = str(run.experiment.seed) if isinstance(run, Run) else ""
            alike.setdefault((name, each.problem, each.suggestion), []).append((each, seed))
    return [
        {
            "problem": problem,
            "runs": ", ".join(filter(None, [name, _of_seeds([seed for _, seed in each])])),
            "evidence": each[0][0].evidence,
            "suggestion": suggestion,
        }
        for (name, problem, suggestion), each in alike.items()
    ]


def _of_seeds(seeds: Sequence[str]) -> str:
    known = [seed for seed in seeds if seed]
    if not known:
        return ""
    first = f", evidence of seed {known[0]}" if len(known) > 1 else ""
    return f"seed{'s' * (len(known) > 1)} {', '.join(known)}{first}"


def _sentence(text: str) -> str:
    """Return a text with a capital first letter, except for letters such as τ."""
    return text[:1].upper() + text[1:] if text[:1].isascii() else text


# --- The page -------------------------------------------------------------------------------------


def page(sections: Sequence[Section], skipped: Sequence[str] = ()) -> str:
    """Return the HTML."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("fedkd.reports.page", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["sentence"] = _sentence
    title = sections[0].title if len(sections) == 1 else "fedkd report"
    html = environment.get_template("report.html.jinja").render(
        title=title,
        lead=_lead(sections),
        sections=_numbered(sections),
        skipped=skipped,
        light=LIGHT,
        version=package_version("fedkd"),
    )
    return printable(html)


def _lead(sections: Sequence[Section]) -> str:
    if len(sections) == 1:
        return sections[0].facts
    return f"{len(sections)} experiments."


def _numbered(sections: Sequence[Section]) -> list[dict[str, Any]]:
    """Return sections as the template uses them, with figures numbered consecutively."""
    number = 0
    ready = []
    for anchor, section in zip(_slugs(sections), sections, strict=True):
        drawn = []
        for each in section.drawings:
            number += 1
            name = f"{anchor}-{each.key}"
            description = f"{each.caption} {each.described}".strip()
            svg = report_svg.inline(each.figure, f"{name}-svg", each.title, description)
            drawn.append({"anchor": name, "number": number, "title": each.title,
                          "caption": each.caption, "svg": svg})  # fmt: skip
        ready.append(
            {
                "anchor": anchor,
                "figures": drawn,
                "differing": report_experiment.differing(section.experiments),
                "all_keys": report_experiment.keys(section.experiments),
                "versions": _versions(section.folders),
                **{name: getattr(section, name) for name in _UNCHANGED},
            }
        )
    return ready


_UNCHANGED = (
    "title", "facts", "sentences", "tables", "findings", "missing", "commands", "folders",
)  # fmt: skip


def _versions(folders: Iterable[Path]) -> str:
    """Return the versions that runs were made with: one text if they agree, else one per version."""
    folders_by_versions: dict[str, list[str]] = {}
    for folder in folders:
        if (folder / "experiment.toml").is_file():
            versions = RunFolder(folder).environment
            text = ", ".join(f"{name} {value}" for name, value in versions.items())
            folders_by_versions.setdefault(text, []).append(folder.name)
    if len(folders_by_versions) == 1:
        return next(iter(folders_by_versions))
    return "; ".join(f"{', '.join(names)}: {text}" for text, names in folders_by_versions.items())


def _slugs(sections: Sequence[Section]) -> list[str]:
    """Return an anchor for each section."""
    anchors: list[str] = []
    for section in sections:
        plain = anchor = slug(section.title)
        number = 1
        while anchor in anchors:
            number += 1
            anchor = f"{plain}-{number}"
        anchors.append(anchor)
    return anchors


def _write_files(sections: Sequence[Section], folder: Path) -> None:
    """Write every figure as SVG and PNG, and every table as Markdown and LaTeX."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FedkdError(f"figures = {folder}: cannot be made ({error.strerror})") from None
    for name, section in zip(_slugs(sections), sections, strict=True):
        prefix = f"{name}-" if len(sections) > 1 else ""
        for each in section.drawings:
            report_svg.save(each.figure, folder / f"{prefix}{each.key}")
        for table in section.tables:
            for ending, text in (("md", table.markdown()), ("tex", table.latex())):
                replace_file(folder / f"{prefix}{table.key}.{ending}", printable(text).encode())
