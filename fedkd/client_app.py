"""The Flower client: executes the orders it receives on a cohort of one.

In a simulation the experiment in a message is this user's own. The node of a deployment believes it in
everything but what code may run there: that is for its own configuration to say, as in
``flower-supernode --node-config 'partition-id=0 client-code="my_strategy"'``.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from fedkd.allocator import keep_freed_memory
from fedkd.client import Part, execute_together
from fedkd.codecs import Packed
from fedkd.errors import FedkdError
from fedkd.experiment import Experiment, kebab
from fedkd.knowledge import Knowledge
from fedkd.messages import (
    Introduction,
    decode_experiment,
    decode_order,
    encode_introduction,
    encode_report,
)
from fedkd.orders import Failure, Order
from fedkd.phases import installed_modules
from fedkd.sources import digest
from fedkd.statefiles import StateFiles
from fedkd.states import ResidentStates
from fedkd.transport.adapter import always_reply, error_reply
from fedkd.world import World, world_of

app = ClientApp(mods=[always_reply])


@app.query("hello")
def hello(message: Message, context: Context) -> Message:
    """Say which partition this node holds, how large it is, and which code it runs."""
    experiment = decode_experiment(message.content)
    _allowed(experiment, context)
    introduction = introduce(experiment, _partition(context, experiment))
    return Message(encode_introduction(introduction), reply_to=message)


@app.train("fedkd")
def train(message: Message, context: Context) -> Message:
    """Execute an order and report."""
    keep_freed_memory()
    experiment = _allowed(decode_experiment(message.content), context)
    client = _partition(context, experiment)
    (answer,) = answers(experiment, store_of(experiment), [(client, message.content)])
    return reply(message, answer)


def answers(
    experiment: Experiment, store: ResidentStates, contents: Sequence[tuple[int, RecordDict]]
) -> list[RecordDict | Failure]:
    """Answer the messages of any number of clients of one federation.

    Args:
        experiment: the run.
        store: where these clients keep their states.
        contents: each client's partition id and what it was sent.

    Raises:
        FedkdError: an order cannot be read, or is another client's.
    """
    (found,) = answers_together([Sent(experiment, store, contents)])
    return found


@dataclass(frozen=True, eq=False)
class Sent:
    """What the clients of one federation were sent.

    Attributes:
        experiment: the run.
        store: where these clients keep their states.
        contents: each client's partition id and its message.
    """

    experiment: Experiment
    store: ResidentStates
    contents: Sequence[tuple[int, RecordDict]]


def answers_together(sent: Sequence[Sent]) -> list[list[RecordDict | Failure]]:
    """Answer the messages of federations on the same data, those that can share a stack side by side.

    Raises:
        FedkdError: an order cannot be read, or is another client's.
    """
    world = world_of(sent[0].experiment)
    started = perf_counter()
    parts = [Part(one.experiment, _orders(one, world), one.store) for one in sent]
    decoding = (perf_counter() - started) / sum(len(part.orders) for part in parts)
    return [
        [
            result
            if isinstance(result, Failure)
            else encode_report(result, order.asked, world.sizes, decoding)
            for order, result in zip(part.orders, results, strict=True)
        ]
        for part, results in zip(parts, execute_together(world, parts), strict=True)
    ]


def _orders(sent: Sent, world: World) -> list[Order]:
    seen: dict[Any, Knowledge | Packed | None] = {}
    orders = []
    for client, content in sent.contents:
        held = len(world.shards[client])
        order = decode_order(content, world.sizes, num_examples=held, seen=seen)
        if order.client != client:
            raise FedkdError(f"the order is for partition {order.client}, this node holds {client}")
        orders.append(order)
    return orders


def reply(message: Message, answer: RecordDict | Failure) -> Message:
    """Wrap a client's answer as the reply to a message."""
    if isinstance(answer, Failure):
        return error_reply(message, answer.reason)
    return Message(answer, reply_to=message)


def introduce(experiment: Experiment, client: int) -> Introduction:
    """Say who a client is."""
    num_examples = len(world_of(experiment).shards[client])
    return Introduction(client, num_examples, experiment.student_of(client), digest(experiment))


def store_of(experiment: Experiment, resident: int = 0) -> ResidentStates:
    """Return where this run's clients keep their states: on disk, by partition id.

    Flower would ship a context's state to the worker and back with every call.

    Args:
        experiment: the run, named.
        resident: the most clients whose states stay in memory as well; none where any process may
            get any client.
    """
    if experiment.name is None:
        raise FedkdError(
            "the experiment has no name, so its clients have no folder for their states"
        )
    folder = Path(experiment.run_dir) / experiment.name / "clients"
    return ResidentStates(StateFiles(folder, experiment.architecture_period), resident)


def _allowed(experiment: Experiment, context: Context) -> Experiment:
    """Return the experiment of a message with the ``client-code`` that holds here.

    Raises:
        FedkdError: it names code that the node of a deployment does not allow.
    """
    if _is_simulated():
        return experiment
    own = experiment.replace(client_code=context.node_config.get("client-code", "none"))
    for key in ("client_code", "dataset", "public", "student", "teacher"):
        modules = _modules(experiment, key)
        installed = installed_modules() if key == "client_code" else ()
        allowed = (*own.client_modules, *installed)
        for module in modules:
            if not any(module == name or module.startswith(f"{name}.") for name in allowed):
                raise FedkdError(
                    f"{kebab(key)} of the run names {module}, which this node does not allow; whoever "
                    f"trusts it starts the node with --node-config 'client-code=\"{module}\"'"
                )
    return own


def _modules(experiment: Experiment, key: str) -> list[str]:
    """Return the modules outside fedkd whose code a client is to run for the value of a key."""
    if key == "client_code":
        return experiment.client_modules
    names = str(getattr(experiment, key)).split(",")
    return [name.strip().rpartition(":")[0] for name in names if ":" in name]


def _is_simulated() -> bool:
    """Whether this process is an actor of Ray, as the clients of Flower's simulations are."""
    ray = sys.modules.get("ray")  # not imported here: the node of a deployment needs none
    if ray is None or not ray.is_initialized():
        return False
    return ray.get_runtime_context().get_actor_id() is not None


def _partition(context: Context, experiment: Experiment) -> int:
    client = context.node_config.get("partition-id")
    if not isinstance(client, int) or not 0 <= client < experiment.num_clients:
        raise FedkdError(
            f"partition-id = {client!r} of this node: must be 0 to {experiment.num_clients - 1}"
        )
    return client
