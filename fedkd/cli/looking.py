"""The commands that work on finished runs, or say what there is."""

from __future__ import annotations

import sys
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
            help="write every figure as SVG and PNG there too, and the tables as Markdown and LaTeX",
        ),
    ] = None,
    output: AnyOutput = TEXT,
) -> None:
    """Write one page about runs, comparisons and sweeps: tables, figures, findings."""
    from fedkd.reports.page.collect import find
    from fedkd.reports.report import write

    found = find(folders)
    path = write(found, file, figures)
    for line in found.skipped:
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
    from fedkd.reports.export.export import export as export_model

    done = export_model(run, to, model=model, client=client, seed=seed, output=file)
    value = {"path": str(done.path), "card": str(done.card_path), **done.card}
    output.result(value, [f"{done.path}: {done.facts['accuracy']}"], [done.facts])


def strategies(*, output: AnyOutput = TEXT) -> None:
    """List the strategies with what they declare."""
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
    entries = citations(used, strategy.facts, folder.version)
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
        Parameter(group=WORK, negative="", help="compare both engines as well, which starts Ray"),
    ] = False,
    output: AnyOutput = TEXT,
) -> None:
    """Check what is true of every strategy, and say what to change in this one."""
    from fedkd import registry, testing
    from fedkd.cli import preview, results

    found = registry.find(strategy, strategy_config)
    findings = []
    with output.progress(lambda: preview.check_plan(found)) as steps:
        steps.show("starting", 0)
        for finding in testing.examine(found, engines=engines):
            findings.append(finding)
            steps.show(f"{finding.check}: {finding.result}", len(findings) / len(testing.CHECKS))
    report = testing.CheckResults(found.name(), tuple(findings))
    brief = [f"{found.name()}: {results.check_line(report)}", *map(str, report.failures)]
    output.result(
        report.as_json(), brief, [results.findings_table(report), results.check_line(report)]
    )
    if report.failures:
        raise FedkdError(f"{found.name()} fails {', '.join(f.check for f in report.failures)}")


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
