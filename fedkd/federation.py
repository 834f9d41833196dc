"""The round loop, once for all strategies: hello, T rounds, a closing exchange.

A run costs 1 + T + 1 exchanges. Each round one message goes to every sampled client, with the newest
knowledge and the phases to execute; its reply brings the answer and the metrics. A bad reply is
dropped with its reason and the round goes on; below the quorum the previous knowledge stays. The
record of a round, and what it takes to go on from it, is on disk before the next one begins.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy, deepcopy
from dataclasses import replace
from math import isfinite
from time import monotonic, sleep
from typing import Any, Literal
from weakref import WeakValueDictionary

import torch
from flwr.app import Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result
from torch import Tensor

from fedkd.algorithm import Algorithm
from fedkd.checkpoints import Checkpoint
from fedkd.codecs import Reference
from fedkd.diagnostics import described, detailed
from fedkd.errors import DivergedError, FedkdError
from fedkd.events import Events
from fedkd.exchange import Exchange
from fedkd.experiment import Experiment
from fedkd.knowledge import (
    KINDS,
    ClassMeans,
    Knowledge,
    SoftLabels,
    Weights,
    check_answer,
    require_one,
)
from fedkd.memories import Memories, collected
from fedkd.messages import (
    HELLO,
    TRAIN,
    Introduction,
    decode_introduction,
    encode_knowledge,
    encode_order,
    encode_request,
    experiment_record,
)
from fedkd.orders import Order, Report
from fedkd.phases import Apply, Digest, Phase, Predict, check_phases, closing
from fedkd.privacy import epsilon
from fedkd.randomness import permutation
from fedkd.records.files import Row
from fedkd.records.folder import RunFolder, environment
from fedkd.references import blaming
from fedkd.server import Replies, Server
from fedkd.sources import digest as sources_digest
from fedkd.states import INITIAL
from fedkd.transport.replies import failure_reason
from fedkd.world import World, who_holds_what

HELLO_TIMEOUT = 60.0
"""Seconds until all clients must have introduced themselves."""

_Encodings = dict[tuple[int, int], tuple[object, object, dict[str, Any], Reference | None]]
"""Encoded knowledge by the ids of what was encoded and of what its receivers had, which are kept
beside it: another object could take over the id of a freed one."""

_NOTHING = torch.empty(0, dtype=torch.int64)

_TOTALS = ("bytes_up", "bytes_down", "wire_bytes_up", "wire_bytes_down")

LOST_ROUNDS = 3
"""Rounds running without a quorum that end a run: clients that all died look like this."""


class Federation:
    """A federation in session.

    Args:
        strategy: the algorithm.
        grid: reaches the clients.
        experiment: the run.
        world: the data as the server sees it.
        folder: where records are written, if anywhere.
        on_round: called with each round's record, once that is on disk.
        events: what the machinery between us and the clients has to tell.
    """

    def __init__(
        self,
        strategy: Algorithm,
        grid: Grid,
        experiment: Experiment,
        world: World,
        folder: RunFolder | None = None,
        on_round: Callable[[Row], None] = lambda _: None,
        events: Events | None = None,
    ) -> None:
        strategy.check(experiment)
        self._events = events or Events()
        self._on_round = on_round
        self._strategy = strategy
        self._grid = grid
        self._experiment = experiment
        self._record = experiment_record(experiment)
        self._server = Server(experiment, world)
        self._kept = Checkpoint(totals=dict.fromkeys(_TOTALS, 0))
        self._roster: dict[int, int] = {}  # node ids by partition
        self._hello_failures: list[str] = []
        self._exchange: Exchange | None = None
        self._wire_up, self._wire_down = strategy.wires(experiment)
        self._references: WeakValueDictionary[bytes, Reference] = WeakValueDictionary()
        self.rows: list[Row] = []
        self._folder = folder

    # --- the whole run --------------------------------------------------------------------------

    def run(self) -> Result:
        """Run all rounds that are not done yet and the closing exchange, and write the result."""
        started = monotonic()
        if self._folder is not None:
            self._folder.write_shards(who_holds_what(self._server.world))
            self._go_on(self._folder)
        rounds = self._experiment.num_server_rounds
        for number in range(self._kept.round + 1, rounds + 1):
            messages = self.open_round(number)
            self.finish_round(self._send(messages))
        result = self.close(self._send(self.open_closing()), started)
        return self._flower_result(result)

    def _go_on(self, folder: RunFolder) -> None:
        """Take up a run that was cut off after some of its rounds, if the folder holds one."""
        kept = Checkpoint.load(folder.path)
        self.rows = folder.keep(kept.round)
        if not kept.round:
            return
        kept.sent |= {client: self._interned(each) for client, each in kept.sent.items()}
        server = self._server
        server.round, server.state, server.trained = kept.round, dict(kept.state), kept.trained
        if server.model is not None and kept.model is not None:
            server.model.load(0, kept.model)
        self._kept = kept

    def _remember(self, folder: RunFolder) -> None:
        """Write down all that going on takes: from now on the round is done."""
        server = self._server
        self._kept.round, self._kept.state = server.round, server.state
        self._kept.model = None if server.model is None else server.model.state(0)
        self._kept.trained = server.trained
        self._kept.save(folder.path)

    def _send(self, messages: Iterable[Message]) -> list[Message]:
        timeout = self._experiment.round_timeout
        return list(self._grid.send_and_receive(messages, timeout=timeout))

    # --- hello ----------------------------------------------------------------------------------

    def introduce(self) -> None:
        """Learn which node holds which partition, from nodes that have not said yet.

        Raises:
            FedkdError: when nobody has yet: fewer clients than ``num-clients`` after a minute, two
                for one partition, or clients that run other code than the server. Later nobody is waited
                for, and nobody who comes ends the run.
        """
        is_first = not self._roster
        new = set(self._nodes(is_first)) - set(self._roster.values())
        content = RecordDict({"experiment": self._record})
        timeout = min(HELLO_TIMEOUT, self._experiment.round_timeout)
        hellos = [Message(content, node, HELLO, ttl=timeout) for node in new]
        self._hello_failures = []
        for reply in self._grid.send_and_receive(hellos, timeout=timeout) if hellos else []:
            if reply.metadata.src_node_id not in new:
                continue  # nobody has asked it
            if reply.has_error():
                self._hello_failures.append(failure_reason(reply))
                continue
            try:
                said = decode_introduction(reply.content)
            except FedkdError as error:
                self._hello_failures.append(str(error))
                continue
            try:
                self._enrol(said, reply.metadata.src_node_id)
            except FedkdError as error:
                if is_first:  # to be mended before anything is run
                    raise
                self._hello_failures.append(str(error))

    def _nodes(self, is_first: bool) -> list[int]:
        """Return the nodes that are there; at first, once there are enough."""
        wanted, deadline = self._experiment.num_clients, monotonic() + HELLO_TIMEOUT
        nodes = list(self._grid.get_node_ids())
        while is_first and len(nodes) < wanted and monotonic() < deadline:
            sleep(0.1)
            nodes = list(self._grid.get_node_ids())
        if is_first and len(nodes) < wanted:
            raise FedkdError(
                f"num-clients = {wanted}: only {len(nodes)} Flower nodes are there; start as many, "
                f'with --federation-config "num-supernodes={wanted}" under `flwr run`'
            )
        return nodes

    def _enrol(self, said: Introduction, node_id: int) -> None:
        if said.sources != sources_digest(self._experiment):
            raise FedkdError(
                f"client {said.client} runs other code than the server (fedkd, strategies or "
                "client-code differ); start both from the same installation"
            )
        known = self._roster.get(said.client, node_id)
        if known != node_id:
            raise FedkdError(f"nodes {known} and {node_id} both hold partition {said.client}")
        if not 0 <= said.client < self._experiment.num_clients:
            raise FedkdError(
                f"a node holds partition {said.client}; num-clients = "
                f"{self._experiment.num_clients} allows 0 to {self._experiment.num_clients - 1}"
            )
        if said.num_examples != (held := len(self._server.world.shards[said.client])):
            self._hello_failures.append(
                f"introduces num-examples = {said.num_examples} of a partition of {held}"
            )
        elif said.student != self._experiment.student_of(said.client):
            self._hello_failures.append(f"introduces another student, {said.student}")
        else:
            self._roster[said.client] = node_id

    # --- a round --------------------------------------------------------------------------------

    def open_round(self, number: int) -> list[Message]:
        """Draw the round's clients and return their messages."""
        self._server.round = number
        due = number % self._experiment.evaluate_every == 0
        last = number == self._experiment.num_server_rounds
        phases = self._phases(number)
        # Who comes in late begins with the phases of round 1.
        predicts = any(isinstance(phase, Predict) for phase in [*phases, *self._phases(1)])
        order = Order(
            client=-1,
            round=number,
            base=INITIAL,
            phases=tuple(phases),
            asked=self._request() if predicts else _NOTHING,
            knowledge_round=self._kept.knowledge_round,
            evaluate=self._evaluates if due or last else "none",
            wire=self._wire_up,
        )
        everybody, seed = self._experiment.num_clients, self._experiment.seed
        chosen = permutation(everybody, seed, "clients", number)[
            : self._experiment.clients_per_round
        ]
        return self._open(order, sorted(chosen.tolist()))

    @property
    def _evaluates(self) -> Literal["phases", "last"]:
        return "phases" if self._experiment.evaluate_phases == "all" else "last"

    def open_closing(self) -> list[Message]:
        """Return the messages of the closing exchange, to all clients."""
        number = self._server.round + 1
        order = Order(
            client=-1,
            round=number,
            base=INITIAL,
            phases=tuple(closing(self._phases(number), self._strategy.closes)),
            asked=_NOTHING,
            knowledge_round=self._kept.knowledge_round,
            evaluate="end",
        )
        return self._open(order, list(range(self._experiment.num_clients)))

    def _open(self, order: Order, sampled: list[int]) -> list[Message]:
        """Begin an exchange: address the order to every sampled client."""
        if len(self._roster) < self._experiment.num_clients:
            self.introduce()
        exchange = self._exchange = Exchange(sampled, events=self._events)
        packed: _Encodings = {}
        request = encode_request(order.asked, self._server.world.sizes)
        first = tuple(self._phases(1))
        messages = []
        for client in sampled:
            if client not in self._roster:
                exchange.dropped[client] = self._unknown()
                continue
            mine = replace(order, client=client, base=self._kept.base.get(client, INITIAL))
            if mine.base == INITIAL and order.evaluate != "end":
                mine = replace(mine, phases=first)
            # A closing exchange that only tests needs none.
            knowledge = self._packed(client, mine.phases, packed) if mine.phases else {}
            content = encode_order(mine, self._record, knowledge, request)
            exchange.orders[client] = mine
            self._count_asked(mine)
            exchange.down.count(client, content)
            timeout, group = self._experiment.round_timeout, str(order.round)
            node = self._roster[client]
            messages.append(Message(content, node, TRAIN, ttl=timeout, group_id=group))
        exchange.encoding = monotonic() - exchange.started
        return messages

    def _count_asked(self, order: Order) -> None:
        """Count the rows of soft labels that a client is about to give away."""
        if any(isinstance(phase, Predict) for phase in order.phases):
            asked = self._kept.asked
            asked[order.client] = asked.get(order.client, 0) + len(order.asked)

    def _epsilon(self) -> float | None:
        """Return ε of the client that has been asked for most; `None` without noise, or if infinite."""
        experiment = self._experiment
        if not experiment.dp_noise:
            return None
        rows = max(self._kept.asked.values(), default=0)
        found = epsilon(noise=experiment.dp_noise, rows=rows, delta=experiment.dp_delta)
        return found if isfinite(found) else None

    def _phases(self, number: int) -> list[Phase]:
        """Ask the strategy for a round's phases, and check what it says."""
        with self._named("phases"):
            return check_phases(self._strategy.phases(number))

    def _request(self) -> Tensor:
        """Ask the strategy which samples it wants, and check what it says."""
        with self._named("request"):
            asked: object = self._strategy.request(self._server)
            return self._check_samples(asked)

    def _check_samples(self, samples: object) -> Tensor:
        if not isinstance(samples, Tensor) or samples.dtype != torch.int64 or samples.ndim != 1:
            raise FedkdError(f"{samples!r} is not an int64 tensor [M] of public samples")
        in_range = bool(((samples >= 0) & (samples < self._server.num_public)).all())
        if not in_range or len(samples.unique()) < len(samples):
            raise FedkdError(
                f"public samples must be distinct and 0 to {self._server.num_public - 1}"
            )
        return samples

    def _personal(self, knowledge: Knowledge, client: int, phases: Sequence[Phase]) -> Knowledge:
        """Ask the strategy what a client receives, and check what it says."""
        with self._named("personalise", [client]):
            received: object = self._strategy.personalise(knowledge, client, self._server)
            if not isinstance(received, KINDS):
                raise FedkdError(f"returns a {type(received).__name__} instead of knowledge")
            if not any(isinstance(phase, Apply) for phase in phases):
                require_one(received)
        return received

    @contextmanager
    def _named(self, method: str, clients: Sequence[int] = ()) -> Iterator[None]:
        """Name the strategy, its method and line, the round and the clients in whatever is raised."""
        where = f"{method} of {self._strategy.name()}, round {self._server.round}"
        if clients:
            where += f", client{'s' * (len(clients) > 1)} {_listed(clients)}"
        with blaming(where):
            yield

    def _unknown(self) -> str:
        said = "; ".join(sorted(set(self._hello_failures)))
        return f"never introduced itself ({said})" if said else "never introduced itself"

    def _packed(self, client: int, phases: Sequence[Phase], packed: _Encodings) -> dict[str, Any]:
        """Encode what a client receives, once for all who receive the same and have the same."""
        if self._kept.knowledge is None:
            return {}
        part = self._personal(self._kept.knowledge, client, phases)
        kept: object = part
        if isinstance(part, Weights):
            student = self._experiment.student_of(client)
            if student not in part.by_model:
                return {}
            kept, part = part.by_model[student], part.only(student)
        known = self._kept.sent.get(client)
        key = id(kept), id(known)
        if key not in packed:
            with self._named("personalise", [client]):
                self._check_new(part)
                packed[key] = (kept, known, *self._encoded(part, known))
        *_, records, newer = packed[key]
        assert self._exchange is not None
        self._exchange.sent[client] = newer
        return records

    def _encoded(
        self, part: Knowledge, known: Reference | None
    ) -> tuple[dict[str, Any], Reference | None]:
        """Encode knowledge for clients that have `known` of it already."""
        sizes = self._server.world.sizes
        if not isinstance(part, SoftLabels):
            return encode_knowledge(part, sizes, asked=False), None
        packed, newer = part.pack(self._wire_down, sizes.num_public, known)
        return encode_knowledge(packed, sizes, asked=False), self._interned(newer)

    def _interned(self, reference: Reference | None) -> Reference | None:
        """Return the one object for all clients that have the same, whichever way they came by it."""
        if reference is None:
            return None
        return self._references.setdefault(reference.digest(), reference)

    def finish_round(self, replies: Iterable[Message]) -> Row:
        """Check the replies, update the knowledge, and write the round's record.

        Raises:
            FedkdError: the third round running without a quorum.
        """
        exchange = self._received(replies)
        digested_round = self._kept.knowledge_round
        accepted = len(exchange.reports) >= self._experiment.quorum
        aggregating = monotonic()
        if accepted:
            self._accept(exchange.reports)
        self._kept.lost = 0 if accepted else self._kept.lost + 1
        spent = {"aggregate": monotonic() - aggregating, "round": monotonic() - exchange.started}
        row = self._row(exchange, digested_round, accepted, spent)
        self.rows.append(row)
        self._write(row)
        self._on_round(row)
        if self._kept.lost >= LOST_ROUNDS:
            what = (
                f"round {self._server.round}: no quorum of {self._experiment.quorum} in "
                f"{LOST_ROUNDS} rounds running"
            )
            raise self._failure(what, exchange.dropped.values())
        return row

    def _failure(self, what: str, said: Iterable[str]) -> FedkdError:
        """Say why clients were dropped, and what to try where their numbers grew out of bounds."""
        reasons, rate = sorted(set(said)), self._experiment.learning_rate
        text = f"{what}; the clients' reasons: {'; '.join(reasons)}"
        if any("not finite" in reason or "NaN or infinity" in reason for reason in reasons):
            advice = f"training diverged at learning-rate = {rate:g}: try {rate / 10:g}"
            return DivergedError(f"{text}; {advice}")
        return FedkdError(text)

    def _write(self, row: Row) -> None:
        if self._folder is None:
            return
        if self._kept.knowledge_round == row["round"] and isinstance(
            self._kept.knowledge, SoftLabels
        ):
            said = detailed(self._kept.knowledge, self._server.world.public_truth)
            self._folder.append("knowledge.jsonl", {"round": row["round"], **said})
        self._folder.append_round(row)
        self._remember(self._folder)

    def _knowledge_fields(self) -> dict[str, Any]:
        """Say what the soft labels of this round say, if it made any."""
        if self._kept.knowledge_round != self._server.round or not isinstance(
            self._kept.knowledge, SoftLabels
        ):
            return {}
        truth = self._server.world.public_truth
        return described(self._kept.knowledge, truth, self._experiment.tau)

    def _accept(self, reports: Sequence[Report]) -> None:
        """Let the strategy update the knowledge; its memory is kept only if it succeeds."""
        draft = copy(self._server)
        draft.state = deepcopy(self._server.state)
        with self._named("update", [report.client for report in reports]):
            new = self._strategy.update(_replies(reports, self._server.targets), draft)
            if new is not None:
                self._check_new(new)
        self._server.state, self._server.trained = draft.state, draft.trained
        self._commit(reports)
        if new is None:
            return
        if isinstance(new, Weights) and isinstance(self._kept.knowledge, Weights):
            # An architecture of which no client was drawn keeps its last average.
            new = self._kept.knowledge.updated(new)
        self._kept.knowledge, self._kept.knowledge_round = new, self._server.round
        observes = self._strategy.facts.server_model != "required"
        if not observes or self._server.model is None or not isinstance(new, SoftLabels):
            return
        if len(new.values) == 1:
            self._server.fit(Digest(), new)

    def _commit(self, reports: Sequence[Report]) -> None:
        """Remember from which state these clients go on, and what they have."""
        assert self._exchange is not None
        for report in reports:
            client = report.client
            self._kept.base[client] = self._server.round
            if client in self._exchange.sent:
                self._kept.sent[client] = self._exchange.sent[client]
            if isinstance(report.answer, SoftLabels):
                self._kept.heard[client] = report.reference

    def _check_new(self, new: object) -> None:
        """Refuse what a strategy may not make of the replies."""
        if not isinstance(new, KINDS):
            raise FedkdError(f"returns a {type(new).__name__} instead of knowledge or None")
        if isinstance(new, SoftLabels):
            sizes, (_, _, classes) = self._server.world.sizes, new.values.shape
            if classes != sizes.num_classes:
                raise FedkdError(
                    f"returns soft labels of {classes} classes: must be {sizes.num_classes}"
                )
            self._check_samples(new.samples)
        if isinstance(new, ClassMeans) and new.values.shape[1] != self._server.num_classes:
            raise FedkdError(
                f"returns means of {new.values.shape[1]} classes: must be {self._server.num_classes}"
            )
        check_answer(new)

    # --- replies --------------------------------------------------------------------------------

    def _received(self, replies: Iterable[Message]) -> Exchange:
        """Sort the replies into good reports, in order of partition, and drops with a reason."""
        exchange = self._exchange
        assert exchange is not None
        client_of = {node: client for client, node in self._roster.items()}
        exchange.receive(replies, client_of, self._experiment, self._server.world, self._kept.heard)
        self._sum_bytes(exchange)
        return exchange

    def _sum_bytes(self, exchange: Exchange) -> None:
        found = {**exchange.up.record("up", ()), **exchange.down.record("down", ())}
        for name in self._kept.totals:
            self._kept.totals[name] += found[name]

    # --- records --------------------------------------------------------------------------------

    def _row(
        self, exchange: Exchange, digested_round: int, accepted: bool, spent: Mapping[str, float]
    ) -> Row:
        encoding = {"encode": exchange.encoding}
        seconds = _summed([*(report.seconds for report in exchange.reports), encoding])
        return {
            "round": self._server.round,
            "sampled": exchange.sampled,
            "answered": [report.client for report in exchange.reports],
            "dropped": {str(k): exchange.dropped[k] for k in sorted(exchange.dropped)},
            "accepted": accepted,
            "events": self._happened(exchange),
            "knowledge_round": digested_round or None,
            **_metrics(exchange.reports),
            **self._knowledge_fields(),
            "epsilon": self._epsilon(),
            "server_accuracy": self._server_accuracy(exchange),
            **exchange.up.record("up", exchange.sampled),
            **exchange.down.record("down", exchange.sampled),
            "seconds": {**seconds, **spent},
        }

    def _happened(self, exchange: Exchange) -> dict[str, int]:
        """Count the events that clients report and those of the machinery between us and them."""
        return _added([self._events.take(), *(report.events for report in exchange.reports)])

    def _server_accuracy(self, exchange: Exchange) -> float | None:
        """Test the server's model when the clients test theirs."""
        if not any(order.evaluate != "none" for order in exchange.orders.values()):
            return None
        weights = self._kept.knowledge if isinstance(self._kept.knowledge, Weights) else None
        return self._server.accuracy(weights)

    def close(self, replies: Iterable[Message], started: float) -> dict[str, Any]:
        """Take the final accuracies and write ``result.json``.

        Raises:
            FedkdError: no round had a quorum, or no client answered the closing exchange.
        """
        exchange = self._received(replies)
        if not any(row["accepted"] for row in self.rows):
            said = {reason for row in self.rows for reason in row["dropped"].values()}
            raise self._failure(f"no round had a quorum of {self._experiment.quorum}", said)
        if not exchange.reports:
            raise self._failure(
                "no client answered the closing exchange", exchange.dropped.values()
            )
        final = {report.client: report.metrics for report in exchange.reports}
        clients = range(self._experiment.num_clients)
        device = str(self._server.world.train.device)
        result = {
            "accuracy": _mean(m["accuracy"] for m in final.values()),
            "client_accuracy": [final.get(k, {}).get("accuracy") for k in clients],
            "own_accuracy": _mean(m["own_accuracy"] for m in final.values()),
            "client_own_accuracy": [final.get(k, {}).get("own_accuracy") for k in clients],
            **_trained(final, clients),
            "server_accuracy": self._server_accuracy(exchange),
            "reports": self._strategy.facts.reports,
            "epsilon": self._epsilon(),
            "dropped": {str(k): exchange.dropped[k] for k in sorted(exchange.dropped)},
            "events": _added([*(row["events"] for row in self.rows), self._happened(exchange)]),
            "rounds": len(self.rows),
            **self._kept.totals,
            "test_size": len(self._server.world.test),
            "seconds": monotonic() - started,
            "environment": environment(device, torch.get_num_threads()),
        }
        if self._folder is not None:
            self._collect(final)
            self._folder.write_result(result)
        return result

    def _collect(self, answered: Iterable[int]) -> None:
        """Bring together what the models answered on the test images, where clients share our disk."""
        assert self._folder is not None
        memories = Memories(self._folder.path / "clients" / "memory")
        labels = self._server.world.test.labels
        assert labels is not None
        closing = dict.fromkeys(answered, self._server.round + 1)
        tested = collected(memories, closing, labels.cpu())
        if tested is not None:
            tested.save(self._folder.path)

    def _flower_result(self, result: Mapping[str, Any]) -> Result:
        """Tell Flower's users by round what the run folder says in full."""
        flower = Result()
        for row in self.rows:
            flower.train_metrics_clientapp[row["round"]] = plain_numbers(row)
        flower.evaluate_metrics_clientapp[len(self.rows)] = plain_numbers(result)
        return flower


def _added(counts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    """Add up how often events of each kind happened."""
    total = Counter[str]()
    for each in counts:
        total.update(each)
    return dict(sorted(total.items()))


def _trained(final: Mapping[int, Mapping[str, float]], clients: Iterable[int]) -> dict[str, Any]:
    """Return accuracies on private training images, of those clients that told theirs."""
    told = [final.get(client, {}).get("training_accuracy") for client in clients]
    known = [accuracy for accuracy in told if accuracy is not None]
    mean = _mean(known) if known else None
    return {"training_accuracy": mean, "client_training_accuracy": told}


def plain_numbers(row: Mapping[str, Any]) -> MetricRecord:
    """Return a record's numbers: all that Flower's metrics can hold."""
    return MetricRecord({name: value for name, value in row.items() if type(value) in (int, float)})


def _replies(reports: Sequence[Report], targets: Tensor | None) -> Replies:
    answers = [report.answer for report in reports]
    labels = [answer for answer in answers if isinstance(answer, SoftLabels)]
    means = [answer for answer in answers if isinstance(answer, ClassMeans)]
    weights = [answer for answer in answers if isinstance(answer, Weights)]
    return Replies(
        [report.client for report in reports],
        SoftLabels.stack(labels, targets) if labels else None,
        ClassMeans.stack(means) if means else None,
        Weights.stack(weights) if weights else None,
    )


def _listed(clients: Sequence[int]) -> str:
    """Name clients, the first ten of them."""
    more = f" and {len(clients) - 10} more" if len(clients) > 10 else ""
    return ", ".join(map(str, clients[:10])) + more


def _metrics(reports: Sequence[Report]) -> dict[str, Any]:
    """Turn the clients' metrics into means, and accuracies into lists as well."""
    names = dict.fromkeys(name for report in reports for name in report.metrics)
    metrics: dict[str, Any] = {}
    for name in names:
        values = [report.metrics.get(name) for report in reports]
        metrics[name] = _mean(v for v in values if v is not None)
        if "accuracy" in name:
            metrics[f"client_{name}"] = values
    return metrics


def _mean(values: Iterable[float]) -> float:
    listed = list(values)
    return sum(listed) / len(listed)


def _summed(parts: Iterable[Mapping[str, float]]) -> dict[str, float]:
    total: dict[str, float] = {}
    for part in parts:
        for name, value in part.items():
            total[name] = total.get(name, 0.0) + value
    return total
