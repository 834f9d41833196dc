"""Decode, execute and answer the messages of clients; shared by all engines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

from flwr.app import Message, RecordDict

from fedkd.clients.execute import FederationInstructions, execute_together
from fedkd.clients.instructions import Failure, Instruction
from fedkd.clients.state_files import StateFiles
from fedkd.clients.state_store import ResidentStates
from fedkd.data.federated import FederatedData, federated_data
from fedkd.errors import FedkdError
from fedkd.experiment import Experiment
from fedkd.federation.flower_internals.replies import error_reply
from fedkd.federation.messages import Introduction, decode_instruction, encode_report
from fedkd.knowledge import Knowledge
from fedkd.knowledge.codec import Packed
from fedkd.user_code import fingerprint


def handle(
    experiment: Experiment, store: ResidentStates, contents: Sequence[tuple[int, RecordDict]]
) -> list[RecordDict | Failure]:
    """Return the answers to the messages of any number of clients of one federation.

    Args:
        experiment: the run.
        store: where these clients keep their states.
        contents: each client's partition id and what it was sent.

    Raises:
        FedkdError: an instruction cannot be read, or is another client's.
    """
    (answers,) = handle_together([Delivery(experiment, store, contents)])
    return answers


@dataclass(frozen=True, eq=False)
class Delivery:
    """What the clients of one federation were sent.

    Attributes:
        experiment: the run.
        store: where these clients keep their states.
        contents: each client's partition id and its message.
        secret_noise: see `fedkd.clients.execute.FederationInstructions`.
        withheld: parts of the reports that are not sent; see `fedkd.federation.messages.encode_report`.
    """

    experiment: Experiment
    store: ResidentStates
    contents: Sequence[tuple[int, RecordDict]]
    secret_noise: bool = False
    withheld: tuple[str, ...] = ()


def handle_together(deliveries: Sequence[Delivery]) -> list[list[RecordDict | Failure]]:
    """Return the answers of clients of federations on the same data; those that can share a stack.

    Raises:
        FedkdError: an instruction cannot be read, or is another client's.
    """
    data = federated_data(deliveries[0].experiment)
    started = perf_counter()
    parts = [
        FederationInstructions(
            one.experiment, _instructions(one, data), one.store, one.secret_noise
        )
        for one in deliveries
    ]
    decoding = (perf_counter() - started) / sum(len(part.instructions) for part in parts)
    return [
        [
            result
            if isinstance(result, Failure)
            else encode_report(result, instruction.asked, data.sizes, decoding, one.withheld)
            for instruction, result in zip(part.instructions, results, strict=True)
        ]
        for one, part, results in zip(deliveries, parts, execute_together(data, parts), strict=True)
    ]


def _instructions(deliveries: Delivery, data: FederatedData) -> list[Instruction]:
    seen: dict[Any, Knowledge | Packed | None] = {}
    instructions = []
    for client, content in deliveries.contents:
        size = len(data.shards[client])
        instruction = decode_instruction(content, data.sizes, num_examples=size, seen=seen)
        if instruction.client != client:
            raise FedkdError(
                f"the instruction is for partition {instruction.client}, this node holds {client}"
            )
        instructions.append(instruction)
    return instructions


def reply(message: Message, answer: RecordDict | Failure) -> Message:
    """Return a client's answer as the reply to a message."""
    if isinstance(answer, Failure):
        return error_reply(message, answer.reason, is_lost=answer.is_lost)
    return Message(answer, reply_to=message)


def introduce(experiment: Experiment, client: int) -> Introduction:
    """Return who a client is: its partition, images and student, and the fingerprint of its code."""
    num_examples = len(federated_data(experiment).shards[client])
    return Introduction(
        client, num_examples, experiment.student_of(client), fingerprint(experiment.client_modules)
    )


def store_of(experiment: Experiment, resident: int = 0) -> ResidentStates:
    """Return where this run's clients keep their states: on disk, by partition id.

    Flower would ship a context's state to the worker and back with every call.

    Args:
        experiment: the run, named.
        resident: the most clients whose states stay in memory as well; 0 where any process may
            get any client.

    Raises:
        FedkdError: the experiment has no name.
    """
    if experiment.name is None:
        raise FedkdError(
            "the experiment has no name, so its clients have no folder for their states"
        )
    folder = Path(experiment.run_dir) / experiment.name / "clients"
    return ResidentStates(StateFiles(folder, experiment.architecture_period), resident)


def located(experiment: Experiment) -> Experiment:
    """Return the experiment with absolute paths: workers have a working directory of their own."""
    return experiment.replace(
        run_dir=str(Path(experiment.run_dir).absolute()),
        data_dir=experiment.data_dir and str(Path(experiment.data_dir).absolute()),
    )
