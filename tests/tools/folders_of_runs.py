"""A folder of every kind: a comparison, its runs, a baseline and a sweep."""

from __future__ import annotations

from pathlib import Path

from federation_tools import tiny

import fedkd


def one_of_each(runs: Path) -> None:
    """Fill a folder with a comparison, its runs, a baseline and a sweep."""
    base = tiny(run_dir=str(runs), teacher="mlp-13", num_server_rounds=2)
    fedkd.compare(base, ["student-distilled", "LocalOnly", "DSFL"], [0])
    fedkd.sweep(base, {"alpha": [0.3, 0.7]}, folds=2)
