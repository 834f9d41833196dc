"""The record of a federation: a row for each round, the result, and both as Flower's metrics."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from math import isfinite
from time import monotonic
from typing import Any, Literal

import torch
from flwr.app import MetricRecord
from flwr.serverapp.strategy import Result

from fedkd.clients.instructions import WITHHOLDABLE, ClientReport
from fedkd.clients.memories import Memories, collected
from fedkd.clients.privacy import epsilon
from fedkd.experiment import Experiment
from fedkd.federation.checkpoint import Checkpoint
from fedkd.federation.exchange import Exchange
from fedkd.federation.server import Server
from fedkd.knowledge import SoftLabels, Weights
from fedkd.knowledge.calibration import label_details, label_statistics
from fedkd.records.files import Row
from fedkd.records.folder import RunFolder, environment
from fedkd.records.results import mean_of


class RunRecord:
    """The record of a run, in memory and in its folder.

    Args:
        server: whose model is tested and whose knowledge is described.
        folder: where the record is written, if anywhere.

    Attributes:
        rows: of the rounds so far.
    """

    def __init__(self, server: Server, folder: RunFolder | None) -> None:
        self._server = server
        self._folder = folder
        self.rows: list[Row] = []

    def keep(self, rounds: int) -> None:
        """Read the rows of the first rounds from the folder, and drop all others."""
        assert self._folder is not None
        self.rows = self._folder.keep(rounds)

    def row(
        self,
        exchange: Exchange,
        checkpoint: Checkpoint,
        *,
        digested_round: int,
        accepted: bool,
        spent: Mapping[str, float],
    ) -> Row:
        """Return the row of a round.

        Args:
            exchange: of this round, its replies sorted.
            checkpoint: the state of the server after the round.
            digested_round: round of the knowledge that clients received.
            accepted: whether there was a quorum.
            spent: seconds of the server's work, by name.
        """
        encoding = {"encode": exchange.encoding}
        seconds = _summed([*(report.seconds for report in exchange.reports), encoding])
        return {
            "round": self._server.round,
            "sampled": exchange.sampled,
            "answered": [report.client for report in exchange.reports],
            "dropped": _dropped(exchange),
            "enrolled_again": exchange.enrolled_again,
            "withheld": _withheld(exchange.reports),
            "accepted": accepted,
            "events": _events_of(exchange),
            "knowledge_round": digested_round or None,
            **_metrics(exchange.reports),
            **self._knowledge_fields(checkpoint),
            "epsilon": _epsilon(self._server.experiment, checkpoint.asked),
            "server_accuracy": self._server_accuracy(exchange, checkpoint),
            **exchange.up.record("up", exchange.sampled),
            **exchange.down.record("down", exchange.sampled),
            "seconds": {**seconds, **spent},
        }

    def add(self, row: Row, checkpoint: Checkpoint) -> None:
        """Add a row, and write it to the folder together with details of the round's knowledge."""
        self.rows.append(row)
        if self._folder is None:
            return
        labels = self._new_labels(checkpoint)
        if labels is not None:
            details = label_details(labels, self._server.data.public_truth)
            self._folder.append("knowledge.jsonl", {"round": row["round"], **details})
        self._folder.append_round(row)

    def _new_labels(self, checkpoint: Checkpoint) -> SoftLabels | None:
        """Return the soft labels of this round, if it made any."""
        is_new = checkpoint.knowledge_round == self._server.round
        return (
            checkpoint.knowledge
            if is_new and isinstance(checkpoint.knowledge, SoftLabels)
            else None
        )

    def _knowledge_fields(self, checkpoint: Checkpoint) -> dict[str, Any]:
        """Describe this round's soft labels, if there are any."""
        labels = self._new_labels(checkpoint)
        if labels is None:
            return {}
        truth = self._server.data.public_truth
        return label_statistics(labels, truth, self._server.experiment.tau)

    def _server_accuracy(self, exchange: Exchange, checkpoint: Checkpoint) -> float | None:
        """Return the accuracy of the server's model in rounds in which the clients test theirs."""
        if not any(
            instruction.evaluate != "none" for instruction in exchange.instructions.values()
        ):
            return None
        weights = checkpoint.knowledge if isinstance(checkpoint.knowledge, Weights) else None
        return self._server.accuracy(weights)

    def close(
        self,
        exchange: Exchange,
        checkpoint: Checkpoint,
        *,
        headline: Literal["clients", "server"],
        started: float,
    ) -> dict[str, Any]:
        """Return the result, with the final accuracies, and write it to ``result.json``.

        Args:
            exchange: the closing one, its replies sorted.
            checkpoint: the state of the server after the last round.
            headline: whose accuracy the tables of the algorithm's paper show.
            started: when the run began, in seconds of the monotonic clock.
        """
        final = {report.client: report.metrics for report in exchange.reports}
        clients = range(self._server.num_clients)
        device = str(self._server.data.train.device)
        result = {
            **_final_shares(final, clients),
            "server_accuracy": self._server_accuracy(exchange, checkpoint),
            "reports": headline,
            "epsilon": _epsilon(self._server.experiment, checkpoint.asked),
            "dropped": _dropped(exchange),
            "withheld": _withheld(exchange.reports),
            "events": _added([*(row["events"] for row in self.rows), _events_of(exchange)]),
            "rounds": len(self.rows),
            **checkpoint.totals,
            "test_size": len(self._server.data.test),
            "seconds": monotonic() - started,
            "environment": environment(device, torch.get_num_threads()),
        }
        if self._folder is not None:
            self._save_predictions(final, self._folder)
            self._folder.write_result(result)
        return result

    def _save_predictions(self, clients: Iterable[int], folder: RunFolder) -> None:
        """Save the models' predictions for the test images, where clients share our disk."""
        memories = Memories(folder.path / "clients" / "memory")
        labels = self._server.data.test.labels
        assert labels is not None
        closing = dict.fromkeys(clients, self._server.round + 1)
        predictions = collected(memories, closing, labels.cpu())
        if predictions is not None:
            predictions.save(folder.path)

    def flower_result(self, result: Mapping[str, Any]) -> Result:
        """Summarise the record as Flower's metrics by round."""
        flower = Result()
        for row in self.rows:
            flower.train_metrics_clientapp[row["round"]] = plain_numbers(row)
        flower.evaluate_metrics_clientapp[len(self.rows)] = plain_numbers(result)
        return flower


def plain_numbers(row: Mapping[str, Any]) -> MetricRecord:
    """Return the numbers of a row or result: all that Flower's metrics can hold."""
    return MetricRecord({name: value for name, value in row.items() if type(value) in (int, float)})


def _dropped(exchange: Exchange) -> dict[str, str]:
    return {str(client): exchange.dropped[client] for client in sorted(exchange.dropped)}


def _events_of(exchange: Exchange) -> dict[str, int]:
    """Return how many events there were, those of the engine and those that clients report."""
    return _added([exchange.events.take(), *(report.events for report in exchange.reports)])


def _added(counts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    """Return the sums of counts by name."""
    total = Counter[str]()
    for each in counts:
        total.update(each)
    return dict(sorted(total.items()))


def _epsilon(experiment: Experiment, asked: Mapping[int, int]) -> float | None:
    """Return ε of the client that was asked for the most rows; `None` without noise, or if infinite."""
    if not experiment.dp_noise:
        return None
    rows = max(asked.values(), default=0)
    value = epsilon(noise=experiment.dp_noise, rows=rows, delta=experiment.dp_delta)
    return value if isfinite(value) else None


def _final_shares(
    final: Mapping[int, Mapping[str, float]], clients: Iterable[int]
) -> dict[str, Any]:
    """Return final accuracies by client, `None` where not reported, and the means of those that were."""
    shares: dict[str, Any] = {}
    for name in ("accuracy", "own_accuracy", "training_accuracy"):
        reported = [final.get(client, {}).get(name) for client in clients]
        known = [accuracy for accuracy in reported if accuracy is not None]
        shares[name] = mean_of(known) if known else None
        shares[f"client_{name}"] = reported
    return shares


def _withheld(reports: Sequence[ClientReport]) -> dict[str, list[int]]:
    """Return the clients that withhold a part of their reports, by part."""
    by_part = {part: [r.client for r in reports if part in r.withheld] for part in WITHHOLDABLE}
    return {part: clients for part, clients in by_part.items() if clients}


def _metrics(reports: Sequence[ClientReport]) -> dict[str, Any]:
    """Return the means of the clients' metrics, and the lists of their accuracies."""
    names = dict.fromkeys(name for report in reports for name in report.metrics)
    metrics: dict[str, Any] = {}
    for name in names:
        values = [report.metrics.get(name) for report in reports]
        metrics[name] = mean_of(v for v in values if v is not None)
        if "accuracy" in name:
            metrics[f"client_{name}"] = values
    return metrics


def _summed(parts: Iterable[Mapping[str, float]]) -> dict[str, float]:
    total: dict[str, float] = {}
    for part in parts:
        for name, value in part.items():
            total[name] = total.get(name, 0.0) + value
    return total
