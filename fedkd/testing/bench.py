"""Run federations of a few tiny clients in this process, and record all messages, to check strategies."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import count
from math import isnan
from pathlib import Path
from typing import Any, cast

import torch
from flwr.app import Message, RecordDict
from torch import Tensor

from fedkd.data import Dataset, load
from fedkd.data.federated import federated_data
from fedkd.engines.answering import handle, introduce, reply, store_of
from fedkd.experiment import Experiment
from fedkd.federation.algorithm import Algorithm
from fedkd.federation.flower_internals.local_grid import LocalGrid, task_identity
from fedkd.federation.messages import HELLO, encode_introduction
from fedkd.federation.rounds import Federation
from fedkd.federation.server import Replies, Server
from fedkd.knowledge import KINDS, Knowledge, ModelWeights, SoftLabels, tensors_of
from fedkd.phases import Apply, Fit, import_path
from fedkd.records.files import Row
from fedkd.strategy import DistillationStrategy
from fedkd.testing.outcomes import Wrong

K, ROUNDS, FEW = 5, 3, 11
"""Clients, rounds, and public samples a round where not all are drawn."""

SMALL: dict[str, Any] = {
    "dataset": "digits",
    "train_size": 187,
    "test_size": 61,
    "public_size": 37,
    "student": "mlp-8",
    "batch_size": 16,
    "learning_rate": 0.01,
    "device": "cpu",
}
OTHER: dict[str, Any] = {"dataset": "fedkd.testing.bench:seven_digits", "student": "mlp-12"}
"""Other sizes: of C, D and the model."""

TEACHER = "mlp-11"
"""A local teacher that is no copy of any student above."""

_VARIED: dict[str, Any] = {
    "partition": "dirichlet",  # shards of different sizes: a stack of clients is padded
    "partition_alpha": 1.0,
    "num_clients": K,
    "num_server_rounds": ROUNDS,
    "fraction_train": 1.0,
    "public_per_round": None,
    "quorum": 1,
    "evaluate_every": 97,
    "engine": "cohort",
    "num_workers": 0,
    "ray_address": None,
    "plan": "stacked",
    "profile": False,
    "codec": "auto",
}
"""Keys that the checks vary."""

ROUGH = (
    "seconds",
    *(f"wire_bytes_{way}{by}" for way in ("up", "down") for by in ("", "_by_client")),
)
"""Fields of a record that may differ between equal runs: seconds, and the length of their text."""


def seven_digits(folder: Path) -> Dataset:
    """Return the digits 0 to 6."""
    digits = load("digits", folder)
    train, test = digits.train_labels < 7, digits.test_labels < 7
    return replace(
        digits,
        name="seven-digits",
        train_images=digits.train_images[train],
        train_labels=digits.train_labels[train],
        test_images=digits.test_images[test],
        test_labels=digits.test_labels[test],
        class_names=digits.class_names[:7],
    )


# --- The calls of a strategy -------------------------------------------------------------------------


@dataclass(frozen=True)
class Update:
    """An update of a strategy's knowledge: its round, the replies, the new knowledge and state."""

    round: int
    replies: Replies
    new: Knowledge | None
    state: Mapping[str, Any]


class Witness:
    """Stands in for a strategy in a federation, and records its calls and their results."""

    def __init__(self, strategy: DistillationStrategy) -> None:
        self.strategy = strategy
        self.asked: dict[int, Tensor] = {}
        self.updates: list[Update] = []
        self.server: Server | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.strategy, name)

    def request(self, server: Server) -> Tensor:
        """Return the samples that the strategy asks for, which two calls have to agree on."""
        before = deepcopy(server.state)
        asked = self.strategy.request(server)
        again = self.strategy.request(server)
        self._unchanged(before, server, "request")
        if not same(asked, again):
            raise Wrong(
                "request gives other samples when it is called again: draw them by server.draw() or "
                "server.generator(purpose)"
            )
        self.asked[server.round] = asked
        return asked

    def update(self, replies: Replies, server: Server) -> Knowledge | None:
        """Return the updated knowledge."""
        before = deepcopy(replies)
        new = self.strategy.update(replies, server)
        self.server = server
        self.updates.append(Update(server.round, before, deepcopy(new), deepcopy(server.state)))
        return new

    def personalise(self, knowledge: Knowledge, client: int, server: Server) -> Knowledge:
        """Return what one client receives."""
        before = deepcopy(server.state)
        received = self.strategy.personalise(knowledge, client, server)
        self._unchanged(before, server, "personalise")
        return received

    def _unchanged(self, before: Mapping[str, Any], server: Server, method: str) -> None:
        if not same(before, server.state):
            raise Wrong(
                f"{method} changes server.state, which stays changed if the round is lost: write it "
                "in update only"
            )


# --- Clients -----------------------------------------------------------------------------------------

Change = Callable[[int, int, Message, RecordDict], Message | None]
"""From round, client, its message and its answer to the reply that is sent; `None` for silence."""


def honest(round: int, client: int, message: Message, content: RecordDict) -> Message | None:
    """Return the client's answer as its reply, unchanged."""
    return Message(content, reply_to=message)


class Clients:
    """Clients in this process, whose replies may be changed or replayed from another federation."""

    def __init__(
        self, experiment: Experiment, change: Change, replay: Sequence[Mapping[int, RecordDict]]
    ) -> None:
        self._experiment = experiment
        self._store = store_of(experiment, experiment.clients_per_round)
        self._change = change
        self._replay = replay
        self.exchanges: list[dict[int, RecordDict]] = []

    def __call__(self, messages: Sequence[tuple[int, Message]]) -> list[Message | None]:
        """Return the replies to all messages of an exchange, in order."""
        if messages[0][1].metadata.message_type == HELLO:
            return [
                Message(encode_introduction(introduce(self._experiment, client)), reply_to=message)
                for client, message in messages
            ]
        answers: dict[int, RecordDict] = {}
        replies: list[Message | None] = []
        number = len(self.exchanges) + 1
        for (client, message), answer in zip(messages, self._handle(messages), strict=True):
            if isinstance(answer, RecordDict):
                answers[client] = answer
                replies.append(self._change(number, client, message, answer))
            else:
                replies.append(reply(message, answer))
        self.exchanges.append(answers)
        return replies

    def _handle(self, messages: Sequence[tuple[int, Message]]) -> Sequence[Any]:
        if self._replay:
            answers = self._replay[len(self.exchanges)]
            return [_replayed(answers[client], message) for client, message in messages]
        contents = [(client, message.content) for client, message in messages]
        return handle(self._experiment, self._store, contents)


def _replayed(content: RecordDict, message: Message) -> RecordDict:
    """Return a client's answer from another federation, with the round of a message of this one."""
    copy = deepcopy(content)
    number = message.content.config_records["instruction"]["round"]
    assert isinstance(number, int)
    copy.metric_records["report"]["round"] = number
    return copy


@dataclass
class Done:
    """A federation that ran to its end."""

    experiment: Experiment
    rows: list[Row]
    witness: Witness
    exchanges: list[dict[int, RecordDict]] = field(repr=False)
    """What clients answered in each round and in the closing exchange."""

    @property
    def updates(self) -> list[Update]:
        """The updates of the strategy's knowledge."""
        return self.witness.updates


@dataclass
class Bench:
    """A strategy, and the federations in which it is checked.

    Attributes:
        strategy: what is checked.
        base: an experiment whose data, models and training replace the smallest ones.
        folder: for what clients keep between rounds.
        engines: whether to run on Ray as well.
    """

    strategy: DistillationStrategy
    base: Experiment | None
    folder: Path
    engines: bool = False
    _numbers: Iterable[int] = field(default_factory=count, repr=False)

    @cached_property
    def experiment(self) -> Experiment:
        """The experiment of which the checks vary some keys."""
        keys = {**SMALL, "data_dir": str(self.folder / "data")}
        keys = keys if self.base is None else self.base.model_dump()
        if keys.get("server_model", "none") == "none" and (
            self.strategy.facts.server_model == "required"
        ):
            keys["server_model"] = str(keys["student"]).split(",")[0]
        if self.strategy.facts.local_teacher and "none" in keys.get("teacher", "none").split(","):
            keys["teacher"] = TEACHER
        modules = [*keys.get("client_code", "none").split(","), *self._client_modules()]
        named = dict.fromkeys(name.strip() for name in modules if name.strip() != "none")
        code = ",".join(named) or "none"
        return Experiment(**{**keys, **_VARIED, "client_code": code, "run_dir": str(self.folder)})

    def _client_modules(self) -> list[str]:
        """Return the modules of the strategy's own terms and procedures."""
        names = []
        for phase in [*self.strategy.phases(1), *self.strategy.phases(2)]:
            if isinstance(phase, Fit):
                names += [*phase.private, *phase.public]
            if isinstance(phase, Apply):
                names.append(import_path(phase.procedure))
        modules = {name.rpartition(":")[0] for name in names} - {"", "fedkd.losses", "__main__"}
        return sorted(name for name in modules if not f"{name}.".startswith("strategies."))

    @property
    def other(self) -> dict[str, Any]:
        """Keys of another number of classes and another model, if `base` does not set them."""
        return OTHER if self.base is None else {}

    @cached_property
    def usual(self) -> Done:
        """Three rounds without failures."""
        return self.federate()

    @cached_property
    def few(self) -> Done:
        """Three rounds of fewer clients, samples and classes, with another model."""
        return self.federate(num_clients=3, public_per_round=FEW, **self.other)

    def named(self, **keys: Any) -> Experiment:
        """Return the experiment with some keys changed, and a folder of its own."""
        return self.experiment.replace(name=f"run-{next(iter(self._numbers))}", **keys)

    def federate(
        self,
        change: Change = honest,
        witness: Witness | None = None,
        replay: Sequence[Mapping[int, RecordDict]] = (),
        grid: type[LocalGrid] = LocalGrid,
        **keys: Any,
    ) -> Done:
        """Return a federation that has run.

        Args:
            change: changes replies.
            witness: stands in for the strategy.
            replay: what clients answer instead of working, exchange by exchange.
            grid: carries the messages.
            keys: keys of the experiment that differ.
        """
        experiment = self.named(**keys)
        witness = witness or Witness(self.strategy)
        clients = Clients(experiment, change, replay)
        with task_identity():
            carrier = grid(clients, num_clients=experiment.num_clients)
            federation = Federation(
                cast(Algorithm, witness), carrier, experiment, federated_data(experiment)
            )
            federation.run()
        return Done(experiment, federation.rows, witness, clients.exchanges)

    def server(self, **keys: Any) -> Server:
        """Return a server in round 1."""
        experiment = self.experiment.replace(**keys)
        return Server(experiment, federated_data(experiment), round=1)


def require_all(done: Done, rows: Iterable[Row] | None = None) -> Done:
    """Return a federation in which every sampled client answered, in all rounds or in those of `rows`.

    Raises:
        Wrong: one did not; the text has its reason.
    """
    for row in done.rows if rows is None else rows:
        for client, reason in row["dropped"].items():
            raise Wrong(f"client {client} fails in round {row['round']}: {reason}")
    return done


def same(one: Any, other: Any) -> bool:
    """Whether two values, such as states or knowledge, are equal, NaN to NaN as well."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.dtype == other.dtype and _same_values(one, other)
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(same(one[n], other[n]) for n in one)
    if isinstance(one, (*KINDS, ModelWeights)) and type(one) is type(other):
        return same(vars(one), vars(other))
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, float) and isinstance(other, float) and isnan(one) and isnan(other):
        return True
    return bool(type(one) is type(other) and one == other)


def _same_values(one: Tensor, other: Tensor) -> bool:
    """Whether shapes and values are equal; NaN is equal to NaN."""
    if one.shape != other.shape:
        return False
    return bool(((one == other) | (one.isnan() & other.isnan())).all())


def distance(one: Knowledge, other: Knowledge) -> float:
    """Return the largest difference between the values of two; infinite where shapes differ."""
    alike = type(one) is type(other)
    ours, theirs = tensors_of(one), tensors_of(other)
    if isinstance(one, SoftLabels) and isinstance(other, SoftLabels):
        alike = torch.equal(one.samples, other.samples)
    if not alike or [t.shape for t in ours] != [t.shape for t in theirs]:
        return float("inf")
    gaps = [
        (a.double() - b.double()).abs().amax()
        for a, b in zip(ours, theirs, strict=True)
        if a.numel()
    ]
    return float(torch.stack(gaps).amax()) if gaps else 0.0  # NaN stays NaN
