"""The round loop, once for all strategies: hello, T rounds, a closing exchange.

A run takes 1 + T + 1 exchanges. Each round sends one message to every sampled client, with the newest
knowledge and the phases to execute; the reply holds the answer and the metrics. A bad reply is
dropped with its reason and the round continues; below the quorum the previous knowledge stays. The
record of a round and its checkpoint are on disk before the next round begins.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from time import monotonic
from typing import Any, Literal

import torch
from flwr.app import Message
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result

from fedkd.clients.instructions import Instruction
from fedkd.clients.states import INITIAL
from fedkd.data.federated import FederatedData, class_counts
from fedkd.errors import DivergedError, FedkdError
from fedkd.experiment import Experiment
from fedkd.federation.acceptance import Acceptance
from fedkd.federation.algorithm import Algorithm, CheckedAlgorithm
from fedkd.federation.checkpoint import Checkpoint
from fedkd.federation.events import Events
from fedkd.federation.exchange import Exchange
from fedkd.federation.messages import TRAIN, encode_instruction, encode_request, experiment_record
from fedkd.federation.outgoing import Outgoing, SharedKnownRows
from fedkd.federation.roster import Roster
from fedkd.federation.round_record import RunRecord
from fedkd.federation.server import Server
from fedkd.knowledge import Knowledge, SoftLabels, Weights
from fedkd.phases import Digest, Predict
from fedkd.randomness import permutation
from fedkd.records.files import Row
from fedkd.records.folder import RunFolder
from fedkd.records.identity import as_one

_NOTHING = torch.empty(0, dtype=torch.int64)

_TOTALS = ("bytes_up", "bytes_down", "wire_bytes_up", "wire_bytes_down")

LOST_ROUNDS = 3
"""So many consecutive rounds without a quorum end a run: then probably all clients have died."""


class Federation:
    """A federation in session.

    Args:
        strategy: the algorithm.
        grid: reaches the clients.
        experiment: the run.
        data: the data as the server sees it.
        folder: where records are written, if anywhere.
        on_round: called with each round's record, once that is on disk.
        events: the incidents of the engine.

    Attributes:
        roster: the clients that have introduced themselves.
    """

    def __init__(
        self,
        strategy: Algorithm,
        grid: Grid,
        experiment: Experiment,
        data: FederatedData,
        folder: RunFolder | None = None,
        on_round: Callable[[Row], None] = lambda _: None,
        events: Events | None = None,
    ) -> None:
        strategy.check(experiment)
        self._events = events or Events()
        self._on_round = on_round
        self._grid = grid
        self._experiment = experiment
        self._experiment_record = experiment_record(experiment)
        self._server = Server(experiment, data)
        self._algorithm = CheckedAlgorithm(strategy, self._server)
        self._acceptance = Acceptance(self._algorithm, self._server)
        self._checkpoint = Checkpoint(
            totals=dict.fromkeys(_TOTALS, 0), identity=as_one(folder.identity) if folder else ""
        )
        self._known_rows = SharedKnownRows()
        self._exchange: Exchange | None = None
        self._record = RunRecord(self._server, folder)
        self._folder = folder
        self.roster = Roster(grid, experiment, data, self._experiment_record)

    @property
    def rows(self) -> list[Row]:
        """The records of the rounds so far."""
        return self._record.rows

    # --- the whole run --------------------------------------------------------------------------

    def run(self) -> Result:
        """Run all rounds that are not done yet and the closing exchange, and write the result."""
        started = monotonic()
        if self._folder is not None:
            self._folder.write_shards(class_counts(self._server.data))
            self._resume(self._folder)
        rounds = self._experiment.num_server_rounds
        for number in range(self._checkpoint.round + 1, rounds + 1):
            messages = self.open_round(number)
            self.finish_round(self._send(messages))
        result = self.close(self._send(self.open_closing()), started)
        return self._record.flower_result(result)

    def _resume(self, folder: RunFolder) -> None:
        """Restore the state after the last finished round, if the folder holds one."""
        checkpoint = Checkpoint.load(folder.path)
        self._record.keep(checkpoint.round)
        if checkpoint.round:
            checkpoint.check(folder, self._checkpoint.identity)
            downlink = checkpoint.downlink
            downlink |= {k: self._known_rows.shared(known) for k, known in downlink.items()}
            _restore(self._server, checkpoint)
            self._checkpoint = checkpoint

    def _send(self, messages: Iterable[Message]) -> list[Message]:
        timeout = self._experiment.round_timeout
        return list(self._grid.send_and_receive(messages, timeout=timeout))

    # --- messages out ---------------------------------------------------------------------------

    def open_round(self, number: int) -> list[Message]:
        """Draw the round's clients and return their messages.

        Raises:
            FedkdError: clients are missing before the first round, or the strategy fails.
        """
        self._server.round = number
        experiment = self._experiment
        phases = self._algorithm.phases(number)
        # A client that joins late begins with the phases of round 1.
        predicts = any(
            isinstance(phase, Predict) for phase in [*phases, *self._algorithm.phases(1)]
        )
        instruction = Instruction(
            client=-1,
            round=number,
            base=INITIAL,
            phases=tuple(phases),
            asked=self._algorithm.request() if predicts else _NOTHING,
            knowledge_round=self._checkpoint.knowledge_round,
            evaluate=self._evaluates(number),
            wire=self._algorithm.wire_up,
        )
        drawn = permutation(experiment.num_clients, experiment.seed, "clients", number)
        return self._open(instruction, sorted(drawn[: experiment.clients_per_round].tolist()))

    def _evaluates(self, number: int) -> Literal["phases", "last", "none"]:
        """Return after which phases of a round clients test their models."""
        experiment = self._experiment
        if number % experiment.evaluate_every and number != experiment.num_server_rounds:
            return "none"
        return "phases" if experiment.evaluate_phases == "all" else "last"

    def open_closing(self) -> list[Message]:
        """Return the messages of the closing exchange, to all clients."""
        number = self._server.round + 1
        instruction = Instruction(
            client=-1,
            round=number,
            base=INITIAL,
            phases=tuple(self._algorithm.closing(number)),
            asked=_NOTHING,
            knowledge_round=self._checkpoint.knowledge_round,
            evaluate="end",
        )
        return self._open(instruction, list(range(self._experiment.num_clients)))

    def _open(self, instruction: Instruction, sampled: list[int]) -> list[Message]:
        """Begin an exchange: return the instruction as a message to every sampled client."""
        self.roster.complete()
        exchange = self._exchange = Exchange(sampled, events=self._events)
        outgoing = Outgoing(self._algorithm, self._server, self._checkpoint, self._known_rows)
        request = encode_request(instruction.asked, self._server.data.sizes)
        first = tuple(self._algorithm.phases(1))
        messages = []
        for client in sampled:
            node = self.roster.node_of(client)
            if node is None:
                exchange.dropped[client] = self.roster.why_missing()
                continue
            personal = replace(
                instruction, client=client, base=self._checkpoint.base.get(client, INITIAL)
            )
            if personal.base == INITIAL and instruction.evaluate != "end":
                personal = replace(personal, phases=first)
            # A closing exchange that only tests needs no knowledge.
            encoded = outgoing.records_for(client, personal.phases) if personal.phases else None
            records: dict[str, Any] = {}
            if encoded is not None:
                records, exchange.sent[client] = encoded
            content = encode_instruction(personal, self._experiment_record, records, request)
            exchange.instructions[client] = personal
            self._count_asked(personal)
            exchange.down.count(client, content)
            timeout, group = self._experiment.round_timeout, str(instruction.round)
            messages.append(Message(content, node, TRAIN, ttl=timeout, group_id=group))
        exchange.encoding = monotonic() - exchange.started
        return messages

    def _count_asked(self, instruction: Instruction) -> None:
        """Count the rows of soft labels that a client is about to send."""
        if any(isinstance(phase, Predict) for phase in instruction.phases):
            asked = self._checkpoint.asked
            asked[instruction.client] = asked.get(instruction.client, 0) + len(instruction.asked)

    # --- replies in -----------------------------------------------------------------------------

    def finish_round(self, replies: Iterable[Message]) -> Row:
        """Check the replies, update the knowledge, write the round's record and return it.

        Raises:
            FedkdError: this is the third consecutive round without a quorum, or the strategy fails.
        """
        exchange = self._received(replies)
        self._enrol_again(exchange)
        digested_round = self._checkpoint.knowledge_round
        aggregating = monotonic()
        self._acceptance.leave_out_useless(exchange)
        accepted = self._has_quorum(exchange) and self._accept(exchange)
        self._checkpoint.rounds_without_quorum = (
            0 if accepted else self._checkpoint.rounds_without_quorum + 1
        )
        ended, trial = monotonic(), self._acceptance.trial_seconds()
        spent = {
            "aggregate": ended - aggregating - trial,
            "trial": trial,
            "round": ended - exchange.started,
        }
        row = self._record.row(
            exchange,
            self._checkpoint,
            digested_round=digested_round,
            accepted=accepted,
            spent=spent,
        )
        self._record.add(row, self._checkpoint)
        if self._folder is not None:
            _store(self._server, self._checkpoint)
            self._checkpoint.save(self._folder.path)  # from now on the round is done
        self._on_round(row)
        if self._checkpoint.rounds_without_quorum >= LOST_ROUNDS:
            what = (
                f"round {self._server.round}: no quorum of {self._experiment.quorum} in "
                f"{LOST_ROUNDS} consecutive rounds"
            )
            raise _failure(what, exchange.dropped.values(), self._experiment.learning_rate)
        return row

    def close(self, replies: Iterable[Message], started: float) -> dict[str, Any]:
        """Return the result, with the final accuracies, and write it to ``result.json``.

        Raises:
            FedkdError: no round had a quorum, or no client answered the closing exchange.
        """
        exchange, rate = self._received(replies), self._experiment.learning_rate
        if not any(row["accepted"] for row in self.rows):
            reasons = {reason for row in self.rows for reason in row["dropped"].values()}
            what = f"no round had a quorum of {self._experiment.quorum}"
            raise _failure(what, reasons, rate)
        if not exchange.reports:
            what = "no client answered the closing exchange"
            raise _failure(what, exchange.dropped.values(), rate)
        headline = self._algorithm.facts.headline
        return self._record.close(exchange, self._checkpoint, headline=headline, started=started)

    def _received(self, replies: Iterable[Message]) -> Exchange:
        """Return the exchange with its replies sorted: good reports by partition, drops with a reason."""
        exchange = self._exchange
        assert exchange is not None
        client_of, data = self.roster.client_of(), self._server.data
        exchange.receive(replies, client_of, self._experiment, data, self._checkpoint.uplink)
        counted = {**exchange.up.record("up", ()), **exchange.down.record("down", ())}
        for name in self._checkpoint.totals:
            self._checkpoint.totals[name] += counted[name]
        return exchange

    def _enrol_again(self, exchange: Exchange) -> None:
        """Let clients that have lost what they kept begin from the initial weights, each once."""
        for client in sorted(exchange.lost & self._checkpoint.base.keys()):
            if self._checkpoint.enrol_again(client):
                exchange.enrolled_again.append(client)
            else:
                exchange.dropped[client] += "; it was enrolled again before, so it stays dropped"

    def _has_quorum(self, exchange: Exchange) -> bool:
        return len(exchange.reports) >= self._experiment.quorum

    def _accept(self, exchange: Exchange) -> bool:
        """Update the knowledge, and note in the checkpoint what the clients now have.

        Returns:
            Whether there is a quorum of replies with which the new knowledge works; else nothing changes.
        """
        proposal = self._acceptance.update(exchange, self._checkpoint.knowledge)
        if not self._has_quorum(exchange):
            self._algorithm.withdraw(proposal)
            return False
        new = self._algorithm.accept(proposal)
        self._checkpoint.commit(self._server.round, exchange.reports, exchange.sent)
        if new is not None:
            self._renew(new)
        return True

    def _renew(self, new: Knowledge) -> None:
        """Replace the knowledge; an optional server model digests it."""
        if isinstance(new, Weights) and isinstance(self._checkpoint.knowledge, Weights):
            # An architecture without a drawn client keeps its last average.
            new = self._checkpoint.knowledge.updated(new)
        self._checkpoint.knowledge, self._checkpoint.knowledge_round = new, self._server.round
        is_optional = self._algorithm.facts.server_model != "required"
        if not is_optional or self._server.model is None or not isinstance(new, SoftLabels):
            return
        if len(new.values) == 1:
            self._server.fit(Digest(), new)


def _restore(server: Server, checkpoint: Checkpoint) -> None:
    """Load the server's state from a checkpoint."""
    server.round, server.state, server.trained = (
        checkpoint.round,
        dict(checkpoint.state),
        checkpoint.trained,
    )
    if server.model is not None and checkpoint.model is not None:
        server.model.load(0, checkpoint.model)


def _store(server: Server, checkpoint: Checkpoint) -> None:
    """Copy the server's state to a checkpoint."""
    checkpoint.round, checkpoint.state, checkpoint.trained = (
        server.round,
        server.state,
        server.trained,
    )
    checkpoint.model = None if server.model is None else server.model.state(0)


def _failure(what: str, dropped: Iterable[str], rate: float) -> FedkdError:
    """Return the error with the clients' reasons, and with advice if training diverged."""
    reasons = sorted(set(dropped))
    text = f"{what}; reasons of the clients: {'; '.join(reasons)}"
    if any("not finite" in reason or "NaN or infinity" in reason for reason in reasons):
        advice = f"training diverged at learning-rate = {rate:g}: try {rate / 10:g}"
        return DivergedError(f"{text}; {advice}")
    return FedkdError(text)
