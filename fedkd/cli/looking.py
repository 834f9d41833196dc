"""The commands that work on finished runs, or list strategies and data sets."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from fedkd.cli.options import (
    TEXT,
    WORK,
    AnyOutput,
)
from fedkd.errors import FedkdError, printable


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
            help="folder for every figure as SVG and PNG, and the tables as Markdown and LaTeX",
        ),
    ] = None,
    output: AnyOutput = TEXT,
) -> None:
    """Write one page about runs, comparisons and sweeps: tables, figures, findings."""
    from fedkd.reports.page.collect import find
    from fedkd.reports.report import write

    sources = find(folders)
    path = write(sources, file, figures)
    for line in sources.skipped:
        print(printable(line), file=sys.stderr)
    facts = {"report": str(path), **({"figures": figures} if figures is not None else {})}
    output.result(facts, [str(path)], [facts])


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
            help="client of a federated run [default the first that took part in the closing exchange]",
        ),
    ] = None,
    seed: Annotated[
        int | None,
        Parameter(group=WORK, metavar="S", help="seed of a central run [default the first]"),
    ] = None,
    file: Annotated[
        str | None,
        Parameter(
            name="--output",
            group=WORK,
            metavar="FILE",
            help="the file [default RUN/exports/MODEL-OWNER with the form's ending]",
        ),
    ] = None,
    output: AnyOutput = TEXT,
) -> None:
    """Export a trained model of a run as a file for deployment, verified, with a card."""
    from fedkd.reports.export.export import export as export_model

    done = export_model(run, to, model=model, client=client, seed=seed, output=file)
    value = {"path": str(done.path), "card": str(done.card_path), **done.card}
    output.result(value, [f"{done.path}: {done.facts['accuracy']}"], [done.facts])


def strategies(*, output: AnyOutput = TEXT) -> None:
    """List the strategies with their properties."""
    from fedkd import registry
    from fedkd.cli import results

    rows = [results.strategy_row(cls) for cls in registry.strategies().values()]
    names = [str(row["name"]) for row in rows]
    settings = results.strategies_settings(rows)
    output.result(
        rows, names, [results.strategies_table(rows), results.STRATEGIES_LEGEND, settings]
    )


def cite(
    run: Annotated[str, Parameter(metavar="RUN", help="run folder, such as runs/dsfl-mnist-seed0")],
    /,
    *,
    output: AnyOutput = TEXT,
) -> None:
    """Print the BibTeX of what a run used: strategy, data, codec, Flower, distillation."""
    from fedkd.records.folder import RunFolder
    from fedkd.registry import strategy_of
    from fedkd.reports.citations import citations

    folder = RunFolder.existing(run)
    experiment = folder.experiment
    strategy = strategy_of(experiment)
    used = experiment.replace(codec="/".join(map(str, strategy.wires(experiment))))
    entries = citations(used, strategy.facts, folder.environment.get("fedkd"))
    output.result(entries, entries, entries)


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
        Parameter(group=WORK, negative="", help="also compare both engines, which starts Ray"),
    ] = False,
    output: AnyOutput = TEXT,
) -> None:
    """Check a strategy against what all strategies must satisfy, and show what to change."""
    from fedkd import registry, testing
    from fedkd.cli import preview, results

    instance = registry.find(strategy, strategy_config)
    outcomes = []
    with output.progress(lambda: preview.check_preview(instance)) as steps:
        steps.show("starting", 0)
        for outcome in testing.examine(instance, engines=engines):
            outcomes.append(outcome)
            steps.show(f"{outcome.check}: {outcome.result}", len(outcomes) / len(testing.CHECKS))
    checked = testing.CheckResults(instance.name(), tuple(outcomes))
    brief = [f"{instance.name()}: {results.check_line(checked)}", *map(str, checked.failures)]
    output.result(
        checked.as_json(), brief, [results.checks_table(checked), results.check_line(checked)]
    )
    if checked.failures:
        failed = ", ".join(failure.check for failure in checked.failures)
        raise FedkdError(f"{instance.name()} fails {failed}")


def data(
    name: Annotated[str | None, Parameter(help="data set to load, downloaded if needed")] = None,
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
    from fedkd.cli import results
    from fedkd.data import DATASETS, data_folder, load

    folder = data_folder(data_dir)
    if name is None:
        rows = [results.dataset_row(known, folder) for known in DATASETS]
        output.result(rows, DATASETS, [results.datasets_table(rows), {"folder": str(folder)}])
    else:
        facts = results.dataset_facts(load(name, folder))
        brief = f"{name}: {facts['train']} training and {facts['test']} test images"
        output.result(facts, [brief], [facts])


def list_(
    folder: Annotated[
        str, Parameter(metavar="FOLDER", help="folder that contains the folders of runs")
    ] = "runs",
    /,
    *,
    where: Annotated[
        str | None,
        Parameter(
            group=WORK,
            metavar="VALUE",
            help='only runs with these keys, as key=value pairs separated by spaces ["strategy=DSFL '
            'seed=0"]',
        ),
    ] = None,
    output: AnyOutput = TEXT,
) -> None:
    """List runs, baselines and sweeps with their results."""
    from fedkd.cli import results
    from fedkd.records.overview import overviews

    found, skipped = overviews(folder, _pairs(where))
    for line in skipped:
        print(printable(line), file=sys.stderr)
    brief = [f"{run.path.name}: {results.overview_result(run)}" for run in found]
    output.result([run.as_row() for run in found], brief, [results.overviews_table(found)])


def _pairs(text: str | None) -> dict[str, str]:
    """Return the values by key in a text of ``key=value`` pairs."""
    pairs = {}
    for part in (text or "").split():
        key, equals, value = part.partition("=")
        if not (key and equals and value):
            raise FedkdError(f"where = '{text}': '{part}' must be key=value")
        pairs[key] = value
    return pairs


def diff(
    first: Annotated[str, Parameter(metavar="RUN", help="run folder")],
    second: Annotated[str, Parameter(metavar="RUN", help="run folder")],
    /,
    *,
    output: AnyOutput = TEXT,
) -> None:
    """Show how two runs differ: keys, code, data and versions, and their figures."""
    from fedkd.cli import results
    from fedkd.records.overview import differences

    found = differences(first, second)
    value = {"keys": found.keys, "besides": found.besides, "figures": found.figures}
    full = results.differences_parts(found, Path(first).name, Path(second).name)
    output.result(value, [*found.keys, *found.besides] or ["nothing but the figures"], full)
