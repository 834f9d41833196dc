"""The in-process engine: all clients of a round side by side on one device.

It receives the messages that a strategy sends, decodes them, executes them together (clients of one
architecture and instruction as one stacked cohort), and encodes the replies, so that bytes and rounding
are those of the wire. With ``num-workers`` worker processes do the same for their share of the clients;
without, Ray is not imported.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial

from flwr.app import Message, RecordDict

from fedkd.clients.instructions import Failure
from fedkd.engines.answering import handle, introduce, reply, store_of
from fedkd.engines.workers import Workers
from fedkd.experiment import Experiment
from fedkd.federation.events import Events
from fedkd.federation.flower_internals.local_grid import LocalGrid, task_identity
from fedkd.federation.messages import HELLO, encode_introduction
from fedkd.records.files import Row
from fedkd.records.folder import RunFolder
from fedkd.strategy import DistillationStrategy

Handler = Callable[[Sequence[tuple[int, RecordDict]]], list[RecordDict | Failure]]
"""Answers what clients were sent, by partition id, in order."""


def run(
    strategy: DistillationStrategy,
    experiment: Experiment,
    folder: RunFolder,
    on_round: Callable[[Row], None],
) -> None:
    """Run a federation in this process, or in its workers, and write its records to `folder`."""
    with ExitStack() as stack:
        events = Events()
        workers = Workers(experiment, events) if experiment.num_workers else None
        if workers is not None:
            stack.enter_context(workers)
        clients = Clients(experiment, workers.handle if workers else None)
        grid = LocalGrid(clients.handle, num_clients=experiment.num_clients)
        stack.enter_context(task_identity())
        strategy.open(grid, experiment, folder, on_round, events).run()


class Clients:
    """All clients of a federation.

    Args:
        experiment: the run.
        handler: answers their messages; by default they are executed in this process.
    """

    def __init__(self, experiment: Experiment, handler: Handler | None = None) -> None:
        self._experiment = experiment
        in_process = partial(handle, experiment, store_of(experiment, experiment.clients_per_round))
        self._handle = handler or in_process

    def handle(self, messages: Sequence[tuple[int, Message]]) -> list[Message | None]:
        """Return the replies to all messages of an exchange, in order."""
        if messages[0][1].metadata.message_type == HELLO:
            return [self._hello(client, message) for client, message in messages]
        contents = [(client, message.content) for client, message in messages]
        answers = self._handle(contents)
        return [
            reply(message, answer) for (_, message), answer in zip(messages, answers, strict=True)
        ]

    def _hello(self, client: int, message: Message) -> Message:
        introduction = introduce(self._experiment, client)
        return Message(encode_introduction(introduction), reply_to=message)
