"""The Flower client: executes the orders it receives on a cohort of one."""

from __future__ import annotations

from pathlib import Path

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedkd.client import Failure, execute
from fedkd.errors import FedkdError
from fedkd.experiment import Experiment
from fedkd.messages import (
    Introduction,
    decode_experiment,
    decode_order,
    encode_introduction,
    encode_report,
)
from fedkd.sources import digest
from fedkd.states import DiskStore
from fedkd.transport.adapter import always_reply, error_reply
from fedkd.world import world_of

app = ClientApp(mods=[always_reply])


@app.query("hello")
def hello(message: Message, context: Context) -> Message:
    """Say which partition this node holds, how large it is, and which code it runs."""
    experiment = decode_experiment(message.content)
    introduction = introduce(experiment, _partition(context, experiment))
    return Message(encode_introduction(introduction), reply_to=message)


@app.train("fedkd")
def train(message: Message, context: Context) -> Message:
    """Execute an order and report."""
    experiment = decode_experiment(message.content)
    client = _partition(context, experiment)
    world = world_of(experiment)
    order = decode_order(message.content, num_examples=len(world.shards[client]))
    if order.client != client:
        raise FedkdError(f"the order is for partition {order.client}, this node holds {client}")
    (result,) = execute(experiment, world, [order], store_of(experiment))
    if isinstance(result, Failure):
        return error_reply(message, result.reason)
    return Message(encode_report(result, order.asked), reply_to=message)


def introduce(experiment: Experiment, client: int) -> Introduction:
    """Say who a client is."""
    num_examples = len(world_of(experiment).shards[client])
    return Introduction(client, num_examples, experiment.student_of(client), digest(experiment))


def store_of(experiment: Experiment) -> DiskStore:
    """Return where this run's clients keep their states: on disk, by partition id.

    Flower would ship a context's state to the worker and back with every call.
    """
    if experiment.name is None:
        raise FedkdError(
            "the experiment has no name, so its clients have no folder for their states"
        )
    return DiskStore(Path(experiment.run_dir) / experiment.name / "clients")


def _partition(context: Context, experiment: Experiment) -> int:
    client = context.node_config.get("partition-id")
    if not isinstance(client, int) or not 0 <= client < experiment.num_clients:
        raise FedkdError(
            f"partition-id = {client!r} of this node: must be 0 to {experiment.num_clients - 1}"
        )
    return client
