"""Tables of a report as cells of text, for the page, Markdown and LaTeX."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, stdev

from rich.table import Table as RichTable

from fedkd.records.results import CentralRun, Run
from fedkd.reports.page.collect import Federations
from fedkd.reports.page.parts import central_accuracies, tested_on
from fedkd.studies.comparison.result import Comparison
from fedkd.wording import plus_minus, size

NONE = "–"


@dataclass(frozen=True)
class Table:
    """Cells by row; the first names the method.

    Attributes:
        key: names its file.
        title: what it shows.
        columns: names; the first column is text, all others are numbers.
        rows: cells of each method.
        best: number of the row whose accuracy is best among the federated methods, or `None`.
        notes: what the columns mean.
    """

    key: str
    title: str
    columns: list[str]
    rows: list[list[str]]
    best: int | None
    notes: list[str]

    def markdown(self) -> str:
        """Return the table in Markdown, the best accuracy in bold."""
        rule = ["---", *["---:"] * (len(self.columns) - 1)]
        cells = [[_piped(cell) for cell in row] for row in self._bold("**{}**")]
        lines = [f"| {' | '.join(row)} |" for row in [self.columns, rule, *cells]]
        return "\n\n".join([self.title, "\n".join(lines), *self.notes]) + "\n"

    def latex(self) -> str:
        """Return the table in LaTeX, for the package booktabs, the best accuracy in bold."""
        head = " & ".join(_tex(name) for name in self.columns)
        bold = "\\textbf{{{}}}"
        rows = [
            " & ".join(
                bold.format(_tex(cell)) if (number, place) == (self.best, 1) else _tex(cell)
                for place, cell in enumerate(row)
            )
            for number, row in enumerate(self.rows)
        ]
        lines = [
            "% needs \\usepackage{booktabs}",
            f"% {self.title}",
            *(f"% {note}" for note in self.notes),
            f"\\begin{{tabular}}{{l{'r' * (len(self.columns) - 1)}}}",
            "\\toprule",
            f"{head} \\\\",
            "\\midrule",
            *(f"{row} \\\\" for row in rows),
            "\\bottomrule",
            "\\end{tabular}",
        ]
        return "\n".join(lines) + "\n"

    def _bold(self, mark: str) -> list[list[str]]:
        return [
            [
                mark.format(cell) if (number, place) == (self.best, 1) else cell
                for place, cell in enumerate(row)
            ]
            for number, row in enumerate(self.rows)
        ]


_TEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{",
    "}": r"\}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$", "–": "--",
    "−": "$-$", "α": r"$\alpha$", "τ": r"$\tau$", "×": r"$\times$", "<": "$<$", ">": "$>$",
    "≥": r"$\geq$",
}  # fmt: skip


def _tex(text: str) -> str:
    return "".join(_TEX.get(character, character) for character in text)


def _piped(text: str) -> str:
    return text.replace("\\", "\\\\").replace("|", "\\|")


def mean_percent(fractions: Sequence[float]) -> str:
    """Return fractions in percent as text: the mean and, from two on, the standard deviation."""
    spread = 100 * stdev(fractions) if len(fractions) > 1 else None
    return plus_minus(100 * mean(fractions), spread)


# --- A comparison ---------------------------------------------------------------------------------


COLUMNS = (
    "Accuracy: mean over clients, ± standard deviation over seeds; worst decile: mean of the tenth of "
    "the clients that is worst off; server: its own model, where it differs; gap: share of the way from "
    "local only to the better central student, with its interval; last: difference to the reference in "
    "points, its interval, and p, all over seeds."
)


def of_comparison(comparison: Comparison) -> list[Table]:
    """Return the two tables of a comparison, as ``fedkd compare`` prints them."""
    federated = [
        n for n, entry in enumerate(comparison.entries) if entry.client_accuracies is not None
    ]
    best = max(federated, key=lambda n: comparison.entries[n].accuracy, default=None)
    return [
        _plain("table-accuracy", comparison.accuracy_table(), best, [COLUMNS, *comparison.notes]),
        _plain("table-cost", comparison.cost_table(), None, []),
    ]


def _plain(key: str, table: RichTable, best: int | None, notes: list[str]) -> Table:
    """Return a table of rich's as cells."""
    columns = [str(column.header) for column in table.columns]
    cells = zip(*(map(str, column.cells) for column in table.columns), strict=True)
    return Table(key, str(table.title), columns, [list(row) for row in cells], best, notes)


# --- Other runs ---------------------------------------------------------------------------------

NOTE = (
    "Test accuracy: mean over clients of the students after the closing exchange; mean ± standard "
    "deviation over seeds. Clients: the worst and the best. Bytes: payload of all clients over a run. "
    "Means over seeds."
)


def of_runs(group: Federations) -> Table:
    """Return the table of federated runs outside a comparison."""
    central = central_accuracies(group.central) if group.central else {}
    rows = [
        {"method": name, "test accuracy, %": mean_percent(values), "seeds": str(len(values))}
        for name, values in central.items()
    ]
    rows += [{"method": name, **_cells(runs)} for name, runs in group.runs.items()]
    known = [[run.accuracy for run in runs if run.has_accuracy] for runs in group.runs.values()]
    means = [mean(accuracies) if accuracies else -1.0 for accuracies in known]
    best = len(central) + means.index(max(means)) if len(means) > 1 and any(known) else None
    most = max(len(runs) for runs in group.runs.values())
    count = "means over seeds" if most > 1 else "1 seed"
    first = next(iter(group.runs.values()))[0]
    title = (
        f"Results of the runs, {count}, {tested_on(first.experiment, first.result['test_size'])}"
    )
    return from_cells(
        title, rows, best, [NOTE, *group.notes, *_withholding(group), *_beginnings(group)]
    )


def _withholding(group: Federations) -> list[str]:
    """Return a note on each method some of whose clients do not say how accurate they are."""
    counts = {
        name: max(len(run.result.get("withheld", {}).get("metrics", [])) for run in runs)
        for name, runs in group.runs.items()
    }
    return [
        f"{name}: clients that withhold their metrics, and are in no mean: {count}."
        for name, count in counts.items()
        if count
    ]


def _beginnings(group: Federations) -> list[str]:
    """Return a note on each method some of whose clients began once more from the initial weights."""
    counts = {
        name: max(sum(len(row.get("enrolled_again", [])) for row in run.rounds) for run in runs)
        for name, runs in group.runs.items()
    }
    return [
        f"{name}: clients that lost what they kept, and began again from the initial weights: {count}."
        for name, count in counts.items()
        if count
    ]


def _cells(runs: Sequence[Run]) -> dict[str, str]:
    known = [run for run in runs if run.has_accuracy]
    clients = [[a for a in run.client_accuracy if a is not None] for run in known]
    servers = [run.server_accuracy for run in runs if run.server_accuracy is not None]
    return {
        "test accuracy, %": mean_percent([run.accuracy for run in known]) if known else NONE,
        "clients, %": f"{100 * mean(map(min, clients)):.1f}–{100 * mean(map(max, clients)):.1f}"
        if known
        else NONE,
        "server, %": mean_percent(servers) if servers else NONE,
        "seeds": str(len(runs)),
        "rounds": f"{mean(len(run.rounds) for run in runs):g}",
        "bytes up": size(mean(run.bytes_up for run in runs)),
        "bytes down": size(mean(run.bytes_down for run in runs)),
        "seconds": f"{mean(float(run.result['seconds']) for run in runs):.1f}",
    }


def of_central(run: CentralRun) -> Table:
    """Return the table of a central baseline."""
    accuracies = central_accuracies(run)
    rows = [
        {
            "model": name,
            "test accuracy, %": mean_percent(values),
            "parameters": f"{run.parameters['teacher' if name == 'teacher' else 'student']:,}",
            "seeds": str(len(values)),
        }
        for name, values in accuracies.items()
    ]
    title = f"Test accuracy, {run.test_size:,} test images"
    return from_cells(title, rows, None, ["Mean ± standard deviation over seeds."])


def from_cells(
    title: str, rows: Sequence[Mapping[str, str]], best: int | None, notes: list[str]
) -> Table:
    """Return a table of the columns that are not empty, in order of appearance."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    columns = [name for name in columns if any(row.get(name, NONE) != NONE for row in rows)]
    cells = [[row.get(name, NONE) for name in columns] for row in rows]
    return Table("table", title, columns, cells, best, notes)
