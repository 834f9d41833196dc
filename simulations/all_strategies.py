"""Every strategy on the same clients: how accurate, and for how many bytes?

Ten clients (Dirichlet 0.3 and 0.1), three seeds, students `mlp-20`, ten rounds, on mnist-5k and on all of
MNIST (downloaded once, or in $FEDKD_DATA_DIR). The public set is unlabelled, except for FedGEMS, which
needs its labels; models at the server are `mlp-64`. With `--write FOLDER` the tables go to
FOLDER/README.md and each strategy's numbers to its page there, if it has one. An hour on one core.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from rich.console import Console
from rich.progress import Progress

import fedkd
from fedkd.registry import strategies

COMMON = fedkd.Experiment(
    num_clients=10,
    student="mlp-20",
    public_labels=False,
    num_server_rounds=10,
    alpha=0.9,
    tau=3.0,
    evaluate_phases="last",
    evaluate_every=10,
)
SETTINGS = {
    # Enough steps for students that start from scratch in every round (CFD's), and as many for all.
    "mnist-5k": COMMON.replace(dataset="mnist-5k", local_epochs=5, distill_epochs=20),
    "mnist": COMMON.replace(dataset="mnist", public_size=5000, local_epochs=1, distill_epochs=5),
}
ALPHAS = (0.3, 0.1)
SEEDS = (0, 1, 2)
Table = dict[str, dict[str, Any]]


def measure(base: fedkd.Experiment, seeds: Sequence[int], progress: Any) -> Table:
    """Return accuracies and bytes by strategy, each run with every seed."""
    table: Table = {}
    for name, cls in strategies().items():
        facts = cls.facts
        experiment = base.replace(
            public_labels=facts.public_labels,
            server_model="mlp-64" if facts.server_model == "required" else "none",
        )
        (entry,) = fedkd.compare(experiment, [name], seeds, progress=progress).entries
        server = entry.server_accuracies if facts.headline == "server" else None
        table[name] = {
            "clients": entry.accuracies,
            "server": server,
            "bytes_up": entry.bytes_up,
            "bytes_down": entry.bytes_down,
            "labelled": facts.public_labels,
        }
    return table


def _percent(values: Sequence[float] | None) -> str:
    if not values:
        return "–"
    spread = f" ± {100 * stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * mean(values):.1f}{spread}"


def markdown(title: str, table: Table) -> str:
    """Return a table, the most accurate clients first."""
    lines = [f"### {title}", "", "| strategy | clients | server's model | MB up | MB down |"]
    lines.append("|---|---|---|---|---|")
    for name, row in sorted(table.items(), key=lambda item: -mean(item[1]["clients"])):
        mark = " (labelled public set)" if row["labelled"] else ""
        lines.append(
            f"| [{name}]({name.lower()}.md){mark} | {_percent(row['clients'])} | "
            f"{_percent(row['server'])} | {row['bytes_up'] / 1e6:.3f} | {row['bytes_down'] / 1e6:.3f} |"
        )
    return "\n".join(lines)


def numbers_of(name: str, tables: Mapping[str, Table]) -> str:
    """Return one strategy's rows of all tables, beside local training."""
    lines = [
        "| data | clients | local only | server's model | MB up | MB down |",
        "|---|---|---|---|---|---|",
    ]
    for title, table in tables.items():
        row, alone = table[name], table["LocalOnly"]
        lines.append(
            f"| {title} | {_percent(row['clients'])} | {_percent(alone['clients'])} | "
            f"{_percent(row['server'])} | {row['bytes_up'] / 1e6:.3f} | {row['bytes_down'] / 1e6:.3f} |"
        )
    return "\n".join(lines)


def write(folder: Path, tables: Mapping[str, Table], about: str) -> None:
    """Write all tables, and each strategy's numbers to its page."""
    parts = [f"# The strategies side by side\n\n{about}"]
    parts += [markdown(title, table) for title, table in tables.items()]
    (folder / "README.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    (folder / "results.json").write_text(json.dumps(tables, indent=1) + "\n", encoding="utf-8")
    for name in next(iter(tables.values())):
        page = folder / f"{name.lower()}.md"
        if page.is_file():
            text = page.read_text(encoding="utf-8")
            between = (
                f"<!-- numbers: begin -->\n\n{numbers_of(name, tables)}\n\n<!-- numbers: end -->"
            )
            text = re.sub(
                r"<!-- numbers: begin -->.*<!-- numbers: end -->", between, text, flags=re.S
            )
            page.write_text(text, encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, and write with ``--write``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="seconds instead of an hour")
    parser.add_argument("--write", type=Path, metavar="FOLDER", help="where README.md goes")
    chosen = parser.parse_args(arguments)
    seeds = SEEDS[:1] if chosen.smoke else SEEDS
    settings = {"mnist-5k": SETTINGS["mnist-5k"].smoke()} if chosen.smoke else SETTINGS
    console = Console()
    tables: dict[str, Table] = {}
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("", total=1.0)
        for data, base in settings.items():
            for alpha in ALPHAS[:1] if chosen.smoke else ALPHAS:
                title = f"{data}, Dirichlet {alpha:g}"
                tables[title] = measure(
                    base.replace(partition_alpha=alpha),
                    seeds,
                    lambda what, share, t=title: progress.update(
                        task, description=f"{t}: {what}", completed=share
                    ),
                )
                text = markdown(title, tables[title])
                console.print(f"{text}\n", markup=False, highlight=False, soft_wrap=True)
    if chosen.write is not None:
        write(chosen.write, tables, _about(len(seeds)))


def _about(seeds: int) -> str:
    return (
        "`python simulations/all_strategies.py --write docs/strategies`: ten clients, students "
        f"`mlp-20`, {seeds} seeds\n(mean ± standard deviation), test accuracy in percent after the "
        "closing exchange (1,000 test images of mnist-5k,\n10,000 of MNIST), payload bytes of all "
        "clients over ten rounds. Every strategy has its own defaults, the other keys are\nthe same "
        "for all: none was tuned, so that the order of neighbours says little."
    )


if __name__ == "__main__":
    main()
