"""fedkd: a simulator of federated distillation on Flower.

The names below are imported on first use, so that ``fedkd --help`` does not wait for
PyTorch.
"""

from __future__ import annotations

import os
import sys
from importlib import import_module
from importlib.abc import MetaPathFinder
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedkd import data, losses, testing
    from fedkd.engines.run import resume, run
    from fedkd.errors import FedkdError
    from fedkd.experiment import Experiment
    from fedkd.knowledge import SoftLabels, Weights
    from fedkd.records.callbacks import Callback
    from fedkd.records.results import CentralRun, Run
    from fedkd.reports.export.export import Export, export
    from fedkd.reports.report import report
    from fedkd.strategy import DistillationStrategy
    from fedkd.studies.central import central
    from fedkd.studies.comparison.result import Comparison
    from fedkd.studies.comparison.run import compare
    from fedkd.studies.sweep.result import Sweep
    from fedkd.studies.sweep.run import sweep

__version__ = "0.1.0"

# No usage statistics are sent unless the user turns them on: Flower and Ray read these on import.
for _variable, _value in {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "HF_HUB_DISABLE_TELEMETRY": "1",
}.items():
    os.environ.setdefault(_variable, _value)

_HOME = {
    "Callback": "records.callbacks",
    "CentralRun": "records.results",
    "Comparison": "studies.comparison.result",
    "DistillationStrategy": "strategy",
    "Experiment": "experiment",
    "Export": "reports.export.export",
    "FedkdError": "errors",
    "Run": "records.results",
    "SoftLabels": "knowledge",
    "Weights": "knowledge",
    "Sweep": "studies.sweep.result",
    "central": "studies.central",
    "compare": "studies.comparison.run",
    "export": "reports.export.export",
    "report": "reports.report",
    "resume": "engines.run",
    "run": "engines.run",
    "sweep": "studies.sweep.run",
}

__all__ = [
    "Callback",
    "CentralRun",
    "Comparison",
    "DistillationStrategy",
    "Experiment",
    "Export",
    "FedkdError",
    "Run",
    "SoftLabels",
    "Sweep",
    "Weights",
    "central",
    "compare",
    "data",
    "export",
    "losses",
    "report",
    "resume",
    "run",
    "sweep",
    "testing",
]


def __getattr__(name: str) -> Any:
    if name in ("data", "losses", "testing"):
        return import_module(f"fedkd.{name}")
    if name not in _HOME:
        raise AttributeError(f"module 'fedkd' has no attribute '{name}'")
    return getattr(import_module(f"fedkd.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]


_MOVED = {
    "baseline": "fedkd.studies.central",
    "callbacks": "fedkd.records.callbacks",
    "codecs": "fedkd.knowledge (Wire) and fedkd.knowledge.codec",
    "comparing": "fedkd.studies.comparison",
    "comparison": "fedkd.studies.comparison",
    "exporting": "fedkd.reports.export",
    "findings": "fedkd.reports.findings",
    "leakage": "fedkd.studies.leakage",
    "plots": "fedkd.reports.plots",
    "presets": "fedkd.cli.presets",
    "procedures": "fedkd.phases",
    "robust": "fedkd.knowledge",
    "runner": "fedkd.engines.run",
    "server": "fedkd.strategy (Server, Replies)",
    "sweeps": "fedkd.studies.sweep",
    "trackers": "fedkd.records.trackers",
    "world": "fedkd.data.federated",
}
"""Modules of earlier documentation, and where their content is now."""


class _Moved(MetaPathFinder):
    """The last finder, which is called if no other finds the module."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        """Raise an error that names the new place of a module that has moved.

        Raises:
            ImportError: it is one of `_MOVED`.
        """
        package, _, module = name.partition(".")
        if package == __name__ and module in _MOVED:
            raise ImportError(f"{name} has moved: it is now {_MOVED[module]}", name=name)


sys.meta_path.append(_Moved())
