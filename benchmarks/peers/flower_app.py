"""Federated distillation as a good user of Flower writes it, after Flower's quick start with PyTorch.

A `Strategy` averages the soft labels that the clients' `ClientApp` replies with; each client keeps its
model in ``context.state``, trains and tests with a ``DataLoader`` over a ``TensorDataset`` of normalised
images, and has one CPU. A round is Flower's: an exchange to train, an exchange to evaluate.

Each epoch has an Adam of its own, so there is no optimiser's state to keep from one to the next.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from time import sleep

import numpy as np
import torch
from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Context,
    Message,
    MessageType,
    MetricRecord,
    RecordDict,
)
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import Strategy
from flwr.simulation import run_simulation
from task import initial_network, load, load_shard, loss, mean, network
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from work import BATCH_SIZE, LEARNING_RATE, Job

# --- Client --------------------------------------------------------------------------------------

app = ClientApp()


@app.train()
def train(msg: Message, context: Context) -> Message:
    """Digest what the others know, train on the private images, answer with soft labels."""
    config = msg.content.config_records["config"]
    path, student = str(config["images"]), str(config["student"])
    if "model" in context.state:
        model = network(student)
        model.load_state_dict(context.state.array_records["model"].to_torch_state_dict())
    else:
        model = initial_network(student, path)

    public = load_common(path, "public")
    arrays = msg.content.array_records["arrays"]
    digest = public
    if "soft-labels" in arrays:
        taught = torch.from_numpy(arrays["soft-labels"].numpy())
        digest = TensorDataset(*public.tensors, taught)
    partition = int(context.node_config["partition-id"])
    private = TensorDataset(*load_shard(path, partition))

    loss_digest = fit(model, DataLoader(digest, batch_size=BATCH_SIZE, shuffle=True))
    loss_revisit = fit(model, DataLoader(private, batch_size=BATCH_SIZE, shuffle=True))
    soft_labels = predict(model, DataLoader(public, batch_size=BATCH_SIZE))

    context.state["model"] = ArrayRecord(model.state_dict())
    arrays = ArrayRecord({"soft-labels": Array(soft_labels.numpy())})
    metrics = MetricRecord({"loss-digest": loss_digest, "loss-revisit": loss_revisit})
    return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=msg)


@app.evaluate()
def evaluate(msg: Message, context: Context) -> Message:
    """Test the client's model."""
    config = msg.content.config_records["config"]
    model = network(str(config["student"]))
    model.load_state_dict(context.state.array_records["model"].to_torch_state_dict())
    test = load_common(str(config["images"]), "test")
    metrics = MetricRecord({"accuracy": accuracy(model, DataLoader(test, batch_size=BATCH_SIZE))})
    return Message(RecordDict({"metrics": metrics}), reply_to=msg)


@lru_cache
def load_common(path: str, name: str) -> TensorDataset:
    """Load what all clients share, once a process."""
    return TensorDataset(*load(path, name))


def fit(model: nn.Module, loader: DataLoader[tuple[Tensor, ...]]) -> float:
    """Train for one epoch; return the mean loss of its steps."""
    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)
    model.train()
    running_loss = 0.0
    for images, labels, *taught in loader:
        optimizer.zero_grad()
        value = loss(model(images), labels, taught[0] if taught else None)
        value.backward()
        optimizer.step()
        running_loss += value.item()
    return running_loss / len(loader)


@torch.no_grad()
def predict(model: nn.Module, loader: DataLoader[tuple[Tensor, ...]]) -> Tensor:
    """Return logits ``[N, 10]``."""
    model.eval()
    return torch.cat([model(images) for images, _ in loader])


@torch.no_grad()
def accuracy(model: nn.Module, loader: DataLoader[tuple[Tensor, ...]]) -> float:
    """Return the share of images that are classified right."""
    model.eval()
    right, total = 0, 0
    for images, labels in loader:
        right += int((model(images).argmax(1) == labels).sum())
        total += len(labels)
    return right / total


# --- Server --------------------------------------------------------------------------------------


class MeanSoftLabels(Strategy):
    """Sends every client the mean of all clients' soft labels.

    Args:
        num_clients: how many to wait for.

    Attributes:
        metrics: of the last round, means over clients.
    """

    def __init__(self, num_clients: int) -> None:
        self.num_clients = num_clients
        self.metrics: dict[str, float] = {}

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Send the soft labels; in the first round there are none yet."""
        content = RecordDict({"arrays": arrays, "config": config})
        return self._to_all(content, MessageType.TRAIN, grid)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Average the soft labels."""
        contents = self._contents(replies)
        answers = [content.array_records["arrays"]["soft-labels"].numpy() for content in contents]
        for name in ("loss-digest", "loss-revisit"):
            self.metrics[name] = averaged_metric(contents, name)
        soft_labels = np.mean(answers, axis=0)
        return ArrayRecord({"soft-labels": Array(soft_labels)}), MetricRecord(dict(self.metrics))

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Ask every client to test itself."""
        return self._to_all(RecordDict({"config": config}), MessageType.EVALUATE, grid)

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """Average the accuracies."""
        self.metrics["accuracy"] = averaged_metric(self._contents(replies), "accuracy")
        return MetricRecord({"accuracy": self.metrics["accuracy"]})

    def summary(self) -> None:
        """Log nothing."""

    def _to_all(self, content: RecordDict, message_type: str, grid: Grid) -> list[Message]:
        while len(nodes := list(grid.get_node_ids())) < self.num_clients:
            sleep(0.1)
        return [Message(content, node, message_type) for node in nodes]

    def _contents(self, replies: Iterable[Message]) -> list[RecordDict]:
        listed = list(replies)
        errors = [reply.error.reason for reply in listed if reply.has_error()]
        if errors or len(listed) < self.num_clients:
            raise RuntimeError(f"{len(listed)} of {self.num_clients} replied; errors: {errors[:1]}")
        return [reply.content for reply in listed]


def averaged_metric(contents: list[RecordDict], name: str) -> float:
    """Return the mean of a metric over clients."""
    values = [content.metric_records["metrics"][name] for content in contents]
    return mean([value for value in values if isinstance(value, int | float)])


def serve(grid: Grid, job: Job) -> None:
    """Run all rounds and mark the end of each."""
    strategy = MeanSoftLabels(job.work.num_clients)
    config: dict[str, str] = {"images": job.images, "student": job.work.student}

    def after_round(number: int, arrays: ArrayRecord) -> None:
        if number:
            job.mark("round", **{name.replace("-", "_"): v for name, v in strategy.metrics.items()})

    strategy.start(
        grid=grid,
        initial_arrays=ArrayRecord(),
        num_rounds=job.rounds,
        train_config=ConfigRecord(dict(config)),
        evaluate_config=ConfigRecord(dict(config)),
        evaluate_fn=after_round,
    )


def main() -> None:
    """Run the job that the command line names on Ray, one CPU a client."""
    job = Job.read()
    server = ServerApp()

    @server.main()
    def run(grid: Grid, context: Context) -> None:
        serve(grid, job)

    run_simulation(
        server_app=server,
        client_app=app,
        num_supernodes=job.work.num_clients,
        backend_config={
            "init_args": {"num_cpus": job.num_cpus, "include_dashboard": False},
            "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
        },
    )
