"""Trackers: callbacks that log a run to TensorBoard or Weights & Biases while it progresses.

They log the content of ``rounds.jsonl`` and ``result.json`` under ``<group>/<field>`` with the fields of
`docs/records.md`; both tools show each group as a section. A tracker that
fails in a round does not end the run (`fedkd.records.callbacks`).
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from fedkd.errors import FedkdError, nearest
from fedkd.experiment import Experiment
from fedkd.records.callbacks import Callback
from fedkd.records.files import Row
from fedkd.records.results import Run

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

_GROUPS = {
    "knowledge": "knowledge",
    "gradient_norm": "gradient_norm",
    "loss": "loss",
    "bytes": "bytes",
    "seconds": "seconds",
    "accuracy": "accuracy",
    "agreement": "accuracy",
    "accepted": "clients",
}
"""Groups by a part of the field's name: the first that matches; `other` where none does."""

_COUNTED = ("sampled", "answered", "dropped", "enrolled_again")
"""Fields that list clients: their length is logged."""


def scalars(row: Row) -> dict[str, float]:
    """Return the numbers in a round's record under their names: ``accuracy/accuracy_after_digest``.

    Mappings give one number per key (``seconds/digest``, ``bytes/bytes_up_by_tensor/<tensor>``), lists
    of clients their length (``clients/dropped``). Lists by client are left to `by_client`.
    """
    numbers: dict[str, float] = {}
    for field, value in row.items():
        name = _name(field)
        if field in _COUNTED:
            numbers[f"clients/{field}"] = len(value)
        elif isinstance(value, Mapping):
            counts = {key: len(v) if isinstance(v, list) else v for key, v in value.items()}
            numbers |= {f"{name}/{key}": number for key, number in counts.items()}
        elif isinstance(value, int | float) and field != "round":
            numbers[name] = +value  # True as 1
    return numbers


def by_client(record: Mapping[str, Any], group: str = "clients") -> dict[str, list[float]]:
    """Return a record's accuracies by client, without the clients that have none."""
    lists = {field: record[field] for field in record if field.startswith("client_")}
    known = {field: [v for v in values if v is not None] for field, values in lists.items()}
    return {f"{group}/{field}": values for field, values in known.items() if values}


def of_result(result: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers in ``result.json``: ``result/accuracy``."""
    numbers = {name: value for name, value in result.items() if isinstance(value, int | float)}
    return {f"result/{name}": value for name, value in numbers.items()}


class TensorBoard(Callback):
    """Writes event files for TensorBoard; needs ``pip install 'fedkd[tensorboard]'``.

    Scalars by round, histograms of the accuracies by client, the experiment as text, and at the end
    experiment and result as hyperparameters. TensorBoard keeps float32: bytes are exact in
    ``rounds.jsonl`` only.

    Args:
        folder: where a folder with the run's name is made; default ``tensorboard`` in the run folder,
            so that ``tensorboard --logdir runs`` shows all runs.

    Raises:
        FedkdError: TensorBoard is not installed.
    """

    essential: ClassVar[bool] = False

    def __init__(self, folder: str | Path | None = None) -> None:
        _require("tensorboard", "TensorBoard")
        self._folder = folder
        self._writer: SummaryWriter | None = None

    def on_run_start(self, experiment: Experiment, path: Path) -> None:
        """Open the event file; earlier logs of a run of that name are hidden."""
        from torch.utils.tensorboard import SummaryWriter

        folder = path / "tensorboard" if self._folder is None else Path(self._folder) / path.name
        self._writer = SummaryWriter(str(folder), purge_step=0)
        text = (path / "experiment.toml").read_text(encoding="utf-8")
        code = "".join(f"    {line}\n" for line in text.splitlines())  # a block of Markdown
        self._writer.add_text("experiment", code, 0)
        self._writer.flush()

    def on_round_end(self, row: Row) -> None:
        """Log a round and flush it."""
        assert self._writer is not None
        for name, value in scalars(row).items():
            self._writer.add_scalar(name, value, row["round"])
        self._add_histograms(by_client(row), row["round"])
        self._writer.flush()

    def on_run_end(self, run: Run) -> None:
        """Log the result beside the experiment's keys, and close."""
        from torch.utils.tensorboard.summary import hparams

        assert self._writer is not None
        last, result = int(run.result["rounds"]), of_result(run.result)
        try:
            # Not by add_hparams: its separate file may be read first, and then be hidden by ours.
            for summary in hparams(run.experiment.flat(), result):
                self._writer._get_file_writer().add_summary(summary)
            for name, value in result.items():
                self._writer.add_scalar(name, value, last)
            self._add_histograms(by_client(run.result, "result"), last)
        finally:
            self._writer.close()

    def on_error(self, error: BaseException) -> None:
        """Write what is in memory, and close."""
        if self._writer is not None:
            self._writer.close()

    def _add_histograms(self, accuracies: Mapping[str, list[float]], step: int) -> None:
        import numpy as np

        assert self._writer is not None
        edges = np.linspace(0, 1, 21)
        for name, values in accuracies.items():
            self._writer.add_histogram(name, np.asarray(values), step, bins=edges)


class WeightsAndBiases(Callback):
    """Logs to Weights & Biases; needs ``pip install 'fedkd[wandb]'``.

    The experiment is the config, a round is a step, the result is the summary. A run that ends early is
    marked as failed. Its files are in ``runs/<name>/wandb``.

    Args:
        project: where it is listed; default ``$WANDB_PROJECT``.
        init: further arguments of ``wandb.init``, such as ``mode="offline"``, ``entity`` or ``tags``.

    Raises:
        FedkdError: wandb is not installed.
    """

    essential: ClassVar[bool] = False

    def __init__(self, project: str | None = None, **init: Any) -> None:
        _require("wandb", "Weights & Biases")
        self._init = {"project": project, **init}
        self._run: Any = None

    def on_run_start(self, experiment: Experiment, path: Path) -> None:
        """Open a run on Weights & Biases.

        Raises:
            FedkdError: wandb fails, for example without a key or network.
        """
        import wandb

        ours = {"config": experiment.flat(), "name": path.name, "dir": str(path)}
        try:
            self._run = wandb.init(**{**ours, **self._init})
        except wandb.Error as error:
            raise FedkdError(
                f"wandb: {error} (`wandb login` stores a key, WANDB_MODE=offline needs none)"
            ) from error

    def on_round_end(self, row: Row) -> None:
        """Log a round."""
        import wandb

        histograms = {name: wandb.Histogram(values) for name, values in by_client(row).items()}
        self._run.log({**scalars(row), **histograms}, step=row["round"])

    def on_run_end(self, run: Run) -> None:
        """Log the result as the summary."""
        try:
            self._run.summary.update(of_result(run.result))
        finally:
            self._run.finish()

    def on_error(self, error: BaseException) -> None:
        """Mark the run as failed; otherwise it would be shown as running."""
        if self._run is not None:
            self._run.finish(exit_code=1)


TRACKERS: dict[str, type[TensorBoard] | type[WeightsAndBiases]] = {
    "tensorboard": TensorBoard,
    "wandb": WeightsAndBiases,
}
"""Trackers by the name of their package, as on the command line."""


def trackers(names: str) -> list[Callback]:
    """Return trackers by their names, separated by commas, with default arguments.

    Raises:
        FedkdError: there is no such tracker, one is named twice, or its package is not installed.
    """
    chosen = [name.strip() for name in names.split(",")]
    for name in chosen:
        if name not in TRACKERS:
            raise FedkdError(
                f"track = '{name}': must be {' or '.join(TRACKERS)}, or both separated by a comma"
                f"{nearest(name, TRACKERS)}"
            )
    if len(set(chosen)) < len(chosen):
        raise FedkdError(f"track = '{names}': give each at most once")
    return [TRACKERS[name]() for name in chosen]


def _name(field: str) -> str:
    group = next((group for part, group in _GROUPS.items() if part in field), "other")
    return group if field == group else f"{group}/{field}"


def _require(package: str, what: str) -> None:
    """Raise an error if a package is missing; a folder of that name, as W&B makes, does not count."""
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        raise FedkdError(f"{what} needs {package}: pip install 'fedkd[{package}]'")
