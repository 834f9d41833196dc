"""A federation in miniature: tiny clients in this process, their mail on record, one of them bad.

In a module of its own that clients can import: its terms and models travel as ``module:function``.
"""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from torch import Tensor, nn

from fedkd.clients.execute import FederationInstructions, execute_together
from fedkd.clients.instructions import ClientReport, Failure, Instruction
from fedkd.clients.state_store import ResidentStates
from fedkd.data.federated import FederatedData, federated_data
from fedkd.engines import client_app, in_process
from fedkd.experiment import Experiment
from fedkd.federation.flower_internals.local_grid import LocalGrid, task_identity
from fedkd.federation.messages import HELLO, decode_instruction, decode_report
from fedkd.federation.rounds import Federation
from fedkd.knowledge import KINDS, ClassMeans, Knowledge, Sizes, SoftLabels, Weights
from fedkd.losses import Step, cross_entropy, term
from fedkd.records import Row
from fedkd.records.folder import RunFolder
from fedkd.registry import strategy_of
from fedkd.strategy import DistillationStrategy
from fedkd.training.architectures import architectures_of
from fedkd.training.models import build

DATA = str(Path(tempfile.gettempdir()) / "fedkd-tests-data")
P, C, B = 37, 10, 16
"""Public samples, classes and batch size of `tiny`."""


def tiny(**keys: Any) -> Experiment:
    """Return an experiment of a tenth of a second a round."""
    small: dict[str, Any] = {
        "dataset": "digits",
        "data_dir": DATA,
        "train_size": 151,
        "test_size": 61,
        "public_size": P,
        "partition": "iid",
        "num_clients": 3,
        "student": "mlp-8",
        "num_server_rounds": 1,
        "batch_size": B,
        "learning_rate": 0.01,
        "device": "cpu",
        "seed": 5,
    }
    if "fold" in keys:
        small["test_size"] = None
    return Experiment(**{**small, **keys})


def digits_comparison(**keys: Any) -> Experiment:
    """Return an experiment that compares methods in seconds, central ones among them."""
    small: dict[str, Any] = {
        "dataset": "digits",
        "public_size": 97,
        "public_labels": False,
        "num_clients": 3,
        "student": "mlp-13",
        "teacher": "mlp-37",
        "num_server_rounds": 2,
        "device": "cpu",
    }
    return Experiment(**{**small, **keys})


ROUGH = (
    "seconds",
    *(f"wire_bytes_{way}{by}" for way in ("up", "down") for by in ("", "_by_client")),
)
"""Fields of a record that may differ between runs: a text of a number of seconds has any length."""


def one_step(**keys: Any) -> Experiment:
    """Return an experiment of which a round is one step of plain SGD on the whole shard."""
    plain = {"batch_size": 1000, "optimizer": "sgd", "learning_rate": 0.5, "num_server_rounds": 3}
    return tiny(**{**plain, "partition": "dirichlet", "partition_alpha": 0.3, "seed": 3, **keys})


def shard(data: FederatedData, client: int) -> tuple[Tensor, Tensor]:
    """Return a client's images, normalised in float64, and labels."""
    rows = data.shards[client]
    assert data.train.labels is not None
    mean, std = (
        torch.tensor(v, dtype=torch.float64)[:, None, None]
        for v in (data.train.mean, data.train.std)
    )
    images = (data.train.pixels[rows].to(torch.float64) / 255 - mean) / std
    return images, data.train.labels[rows]


def starting(experiment: Experiment, client: int) -> Any:
    """Return a client's initial model in float64."""
    data = federated_data(experiment)
    name = experiment.student_of(client)
    model = build(name, data.input_shape, data.num_classes).double()
    state = architectures_of(data).initial_state(name, experiment.seed)
    model.load_state_dict({n: t.to(torch.float64) for n, t in state.items()})
    return model


def execute(
    experiment: Experiment,
    data: FederatedData,
    instructions: Sequence[Instruction],
    store: ResidentStates,
) -> list[ClientReport | Failure]:
    """Execute instructions of one federation, and return one result an instruction."""
    (results,) = execute_together(data, [FederationInstructions(experiment, instructions, store)])
    return results


# --- Clients with their mail on record -----------------------------------------------------------

Meddle = Callable[[Instruction, Message, Message], Message | None]
"""Given an instruction, its message and the honest reply: the reply that is sent, or None for silence."""

MeddleHello = Callable[[int, Message, Message], Message | None]
"""The same for the introduction of a partition."""


@dataclass
class Exchange:
    """What one exchange told the clients, and what they answered, by partition."""

    sizes: Sizes
    instructions: dict[int, Instruction] = field(default_factory=dict)
    replies: dict[int, Message | None] = field(default_factory=dict)

    def report(self, client: int) -> ClientReport:
        """Decode a client's reply."""
        reply = self.replies[client]
        assert reply is not None
        return decode_report(reply.content, self.instructions[client].asked, self.sizes)

    def answers(self, clients: Sequence[int]) -> Knowledge:
        """Stack the answers of some clients."""
        answers = [self.report(k).answer for k in clients]
        labels = [a for a in answers if isinstance(a, SoftLabels)]
        means = [a for a in answers if isinstance(a, ClassMeans)]
        weights = [a for a in answers if isinstance(a, Weights)]
        assert max(len(labels), len(means), len(weights)) == len(clients)
        if labels:
            return SoftLabels.stack(labels)
        return ClassMeans.stack(means) if means else Weights.stack(weights)


class Clients:
    """The clients of the in-process engine, with one who may change their replies.

    Their states are in a folder of their own, which goes with them. With `replay` they do not work, and
    say exchange by exchange what they said then.

    Attributes:
        states: the folder of their states.
    """

    def __init__(
        self,
        experiment: Experiment,
        meddle: Meddle | None = None,
        meddle_hello: MeddleHello | None = None,
        replay: Sequence[Exchange] | None = None,
    ) -> None:
        folder = tempfile.mkdtemp(prefix="fedkd-tests-clients-")
        weakref.finalize(self, shutil.rmtree, folder)
        self._honest = in_process.Clients(experiment.replace(name="clients", run_dir=folder))
        self.states = Path(folder) / "clients" / "clients"
        self._meddle = meddle or (lambda instruction, message, reply: reply)
        self._meddle_hello = meddle_hello or (lambda client, message, reply: reply)
        data = federated_data(experiment)
        self._shards, self._sizes = data.shards, data.sizes
        self._replay = replay
        self.exchanges: list[Exchange] = []

    def _work(self, messages: Sequence[tuple[int, Message]]) -> list[Message | None]:
        if self._replay is None:
            return self._honest.handle(messages)
        then = self._replay[len(self.exchanges)].replies
        contents = [reply.content for k, _ in messages if (reply := then[k]) is not None]
        return [reply_with(m, c) for (_, m), c in zip(messages, contents, strict=True)]

    def handle(self, messages: Sequence[tuple[int, Message]]) -> list[Message | None]:
        """Answer all messages of an exchange."""
        if messages[0][1].metadata.message_type == HELLO:
            said = self._honest.handle(messages)
            return [
                self._meddle_hello(client, message, reply)
                for (client, message), reply in zip(messages, said, strict=True)
                if reply is not None
            ]
        honest = self._work(messages)
        exchange = Exchange(self._sizes)
        for (client, message), reply in zip(messages, honest, strict=True):
            assert reply is not None
            instruction = decode_instruction(
                message.content, self._sizes, num_examples=len(self._shards[client])
            )
            exchange.instructions[client] = instruction
            exchange.replies[client] = self._meddle(instruction, message, reply)
        self.exchanges.append(exchange)
        return [exchange.replies[client] for client, _ in messages]


@dataclass
class Finished:
    """A federation that ran to its end."""

    rows: list[Row]
    exchanges: list[Exchange]
    """T rounds and the closing exchange."""

    @property
    def knowledge(self) -> Knowledge:
        """What the closing exchange told client 0."""
        received = self.exchanges[-1].instructions[0].knowledge
        assert isinstance(received, KINDS)
        return received


def open_federation(
    experiment: Experiment,
    clients: Clients,
    strategy: DistillationStrategy | None = None,
    grid: type[LocalGrid] = LocalGrid,
) -> Federation:
    """Open a session; its messages have to be built within `task_identity`."""
    reaching = grid(clients.handle, num_clients=experiment.num_clients)
    path = Path(experiment.run_dir) / (experiment.name or "")
    folder = RunFolder(path) if experiment.name and path.is_dir() else None
    return (strategy or strategy_of(experiment)).open(reaching, experiment, folder)


def federate(
    experiment: Experiment,
    meddle: Meddle | None = None,
    strategy: DistillationStrategy | None = None,
    grid: type[LocalGrid] = LocalGrid,
    meddle_hello: MeddleHello | None = None,
    replay: Sequence[Exchange] | None = None,
) -> Finished:
    """Run a federation; with a name and no folder, nothing is written."""
    clients = Clients(experiment, meddle, meddle_hello, replay)
    with task_identity():
        federation = open_federation(experiment, clients, strategy, grid)
        federation.run()
    return Finished(federation.rows, clients.exchanges)


def call_client_app(content: RecordDict, kind: str, node: Mapping[str, Any]) -> Message:
    """Call the client app as Flower does on a node of some configuration; return its reply."""
    context = Context(
        run_id=1,
        node_id=11,
        node_config={"partition-id": 0, **node},
        state=RecordDict(),
        run_config={},
    )
    with task_identity():
        message = Message(content, 11, kind, ttl=60)
        message.metadata.__dict__["_message_id"] = "1"
        return client_app.app(message, context)


# --- Replies that are not as they should be ------------------------------------------------------


def reply_with(message: Message, content: RecordDict) -> Message:
    """Answer `message` with other content."""
    return Message(content, reply_to=message)


def array(tensor: Tensor) -> Array:
    """Pack a tensor as Flower does."""
    return Array(tensor.contiguous().numpy())


def with_arrays(content: RecordDict, **arrays: Array) -> RecordDict:
    """Return records in which some arrays of the knowledge are others."""
    old = dict(content.array_records["knowledge"])
    changed = RecordDict({**content, "knowledge": ArrayRecord({**old, **arrays})})
    return (
        with_config(changed, "knowledge-kind", samples="listed") if "samples" in arrays else changed
    )


def with_metrics(content: RecordDict, **metrics: Any) -> RecordDict:
    """Return records in which some numbers of the report are others; `_` stands for a hyphen."""
    hyphened = {name.replace("__", "-"): value for name, value in metrics.items()}
    old = dict(content.metric_records["report"])
    return RecordDict({**content, "report": MetricRecord({**old, **hyphened})})


def without(content: RecordDict, *names: str) -> RecordDict:
    """Return records without some."""
    return RecordDict({name: record for name, record in content.items() if name not in names})


def with_config(content: RecordDict, name: str, **values: Any) -> RecordDict:
    """Return records in which some values of a config record are others."""
    old = dict(content.config_records.get(name, {}))
    return RecordDict({**content, name: ConfigRecord({**old, **values})})


# --- Functions and models that travel by name ----------------------------------------------------


@term(needs=None)
def refuses_nines(step: Step) -> Tensor:
    """Cross entropy that raises at the sight of a nine."""
    if bool((step.labels == 9).any()):
        raise ArithmeticError("a nine\nof all things")
    return cross_entropy(step.logits, step.labels)


def not_a_term(step: Step) -> Tensor:
    """Return zeros, undeclared."""
    return torch.zeros(len(step.labels))


class Fragile(nn.Module):
    """An MLP that raises when it trains on an image that is white all over."""

    def __init__(self, inputs: int, num_classes: int) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(inputs, 5), nn.Linear(5, num_classes))

    def forward(self, images: Tensor) -> Tensor:
        """Return logits."""
        if self.training and bool((images.flatten(1).amin(1) > 1).any()):
            raise ArithmeticError("blinded")
        logits: Tensor = self.net(images)
        return logits


def fragile(input_shape: tuple[int, int, int], num_classes: int) -> nn.Module:
    """Build `Fragile`."""
    channels, height, width = input_shape
    return Fragile(channels * height * width, num_classes)


class Choosy(nn.Module):
    """A linear model that decides by a value, which vmap refuses."""

    def __init__(self, inputs: int, num_classes: int) -> None:
        super().__init__()
        self.dense = nn.Linear(inputs, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits."""
        logits: Tensor = self.dense(images.flatten(1))
        return logits if logits.sum() > 0 else -logits


def choosy(input_shape: tuple[int, int, int], num_classes: int) -> nn.Module:
    """Build `Choosy`."""
    channels, height, width = input_shape
    return Choosy(channels * height * width, num_classes)


class Lazy(Choosy):
    """The same until it shall train on more images than are tried before a run."""

    def forward(self, images: Tensor) -> Tensor:
        """Return logits."""
        if self.training and len(images) > 9:
            raise ArithmeticError("not today")
        return super().forward(images)


def lazy(input_shape: tuple[int, int, int], num_classes: int) -> nn.Module:
    """Build `Lazy`."""
    channels, height, width = input_shape
    return Lazy(channels * height * width, num_classes)


CALLED: list[object] = []
"""What `bomb` was called with."""


def bomb(*arguments: object) -> nn.Module:
    """Record that somebody called a function that only a client named."""
    CALLED.append(arguments)
    return nn.Identity()


@term(needs="logits")
def mae_by_item(step: Step) -> Tensor:
    """The mean absolute error, with a call that vmap refuses."""
    assert step.teacher_logits is not None
    scale = float(torch.ones_like(step.logits).mean().item())
    return scale * (step.logits - step.teacher_logits).abs().mean(-1)
