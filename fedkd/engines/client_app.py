"""The Flower client: executes the instructions it receives on a cohort of one.

In a simulation the experiment in a message comes from the same user. The node of a deployment takes from
it what to learn and how. The rest it takes from its own configuration: which code may run, where its data
and its clients' states are, which device it uses and how much noise it requires, as in
``flower-supernode --node-config 'partition-id=0 state-dir="/var/lib/fedkd" client-code="my_strategy"'``.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from fedkd.clients.instructions import WITHHOLDABLE, Failure
from fedkd.data.cache import data_folder
from fedkd.data.federated import federated_data
from fedkd.engines.answering import Delivery, handle_together, reply, store_of
from fedkd.engines.deployment import within_limits
from fedkd.engines.node_limits import KEYS, NodeLimits, check_present
from fedkd.errors import FedkdError, Setting, nearest, one_line, safe_logger
from fedkd.experiment import Experiment
from fedkd.federation.flower_internals.replies import always_reply
from fedkd.federation.messages import (
    Introduction,
    decode_experiment,
    decode_phases,
    encode_introduction,
)
from fedkd.keys import AUTO, kebab
from fedkd.knowledge.kinds import BY_NAME
from fedkd.machine import keep_freed_memory
from fedkd.phases import Predict, installed_modules
from fedkd.user_code import find_function, fingerprint, is_within

_logger = safe_logger(__name__)

_NODE = "this node's --node-config"

_UNSAID = "cannot carry out the instruction; the node's own log says why (it has dp-noise)"

app = ClientApp(mods=[always_reply, within_limits])


@app.query("hello")
def hello(message: Message, context: Context) -> Message:
    """Return which partition this node holds, how large it is, and which code it runs."""
    received = decode_experiment(message.content)
    experiment = _localised(received, context)
    client = _partition(context, experiment)
    # With it withheld the data are not even read: whether a partition can be made depends on labels.
    withholds = "num-examples" in _withheld(context)
    num_examples = None if withholds else len(federated_data(experiment).shards[client])
    # The server compares the code that the run names; a node may allow more.
    sources = fingerprint(received.client_modules)
    introduction = Introduction(client, num_examples, experiment.student_of(client), sources)
    return Message(encode_introduction(introduction), reply_to=message)


@app.train("fedkd")
def train(message: Message, context: Context) -> Message:
    """Return the client report of an executed instruction."""
    keep_freed_memory()
    experiment = _localised(decode_experiment(message.content), context)
    client = _partition(context, experiment)
    _check_choosing(message.content, context)
    delivery = Delivery(
        experiment,
        store_of(experiment),
        [(client, message.content)],
        secret_noise=not _is_simulated(),
        withheld=_withheld(context),
    )
    answer = _carried_out(delivery, client, context)
    if isinstance(answer, RecordDict):
        _check_leaving(answer, context)
    return reply(message, answer)


def _carried_out(delivery: Delivery, client: int, context: Context) -> RecordDict | Failure:
    """Return a client's answer; a node with noise keeps the reason of a failure in its own log."""
    if not _noise(context):
        ((answer,),) = handle_together([delivery])
        return answer
    try:
        ((answer,),) = handle_together([delivery])
    except Exception:  # its text may hold anything private
        _logger.warning("a client failed", exc_info=True)
        return Failure(client, _UNSAID)
    if isinstance(answer, Failure):
        _logger.warning("a client failed: %s", one_line(answer.reason))
        return Failure(client, _UNSAID, answer.is_lost)
    return answer


def _localised(experiment: Experiment, context: Context) -> Experiment:
    """Return the experiment of a message with the keys that the node of a deployment decides.

    Raises:
        FedkdError: it asks for what the node does not do, or the node's configuration is wrong.
    """
    if _is_simulated():
        return experiment
    config = context.node_config
    defaults = Experiment().flat()
    names = [kebab(key) for key in Experiment.keys_that("node_decides")]
    _check_known(config, [*names, *_OWN_KEYS])
    node_keys = {name: config.get(name, defaults[name]) for name in names}
    # The run's name is made of letters, digits, '.', '_' and '-': its folder lies in this one.
    node_keys["run-dir"] = _state_dir(config.get("state-dir", AUTO))
    accepted = Experiment.load(("the message", experiment.flat()), (_NODE, node_keys))
    partitions = data_folder(accepted.data_dir) / "partitions"
    NodeLimits.of(config).check_disk([Path(accepted.run_dir), partitions])
    check_present(accepted)
    _check_code(experiment, accepted.client_modules)
    _check_noise(experiment, _noise(context))
    _sends(context)
    _withheld(context)
    return accepted


_OWN_KEYS = (
    "partition-id",
    "num-partitions",
    "state-dir",
    "sends",
    "dp-noise",
    "share-metrics",
    *KEYS,
)
"""What a node's configuration may hold besides the keys of the experiment that it decides."""


def _check_known(config: Iterable[str], known: Sequence[str]) -> None:
    """Refuse a key that has no meaning: it may be a misspelt one that was to protect something."""
    for key in config:
        if key not in known:
            raise FedkdError(
                f"{key} (from {_NODE}): no such key{nearest(key, known)}; there are {', '.join(known)}"
            )


def _check_code(experiment: Experiment, allowed: Sequence[str]) -> None:
    """Refuse a run that names code which is not defined in the modules that this node allows."""
    for module in experiment.client_modules:
        _check_module("client-code", module, (*allowed, *installed_modules()))
    for key in Experiment.keys_that("names_code"):
        for reference in _references(experiment, key):
            _check_module(kebab(key), reference.partition(":")[0], allowed)
            find_function(reference, f"{kebab(key)} of the run", allowed)


def _check_module(key: str, module: str, allowed: Sequence[str]) -> None:
    if not is_within(module, allowed):
        raise FedkdError(
            f"{key} of the run names {module}, which this node does not allow; to allow it, start the "
            f"node with --node-config 'client-code=\"{module}\"'"
        )


def _noise(context: Context) -> float:
    """Return the least ``dp-noise`` that this node requires; 0 in a simulation."""
    if _is_simulated():
        return 0.0
    return Experiment.load((_NODE, {"dp-noise": context.node_config.get("dp-noise", 0.0)})).dp_noise


def _withheld(context: Context) -> tuple[str, ...]:
    """Return the parts of its reports that this node keeps back: with noise all, as none has noise."""
    shares = context.node_config.get("share-metrics", True)
    if not isinstance(shares, bool):
        raise FedkdError(f"share-metrics = {shares!r} (from {_NODE}): must be true or false")
    if _noise(context):
        return WITHHOLDABLE
    return () if shares or _is_simulated() else ("metrics",)


def _check_choosing(content: RecordDict, context: Context) -> None:
    """Refuse an instruction by which private images choose what a node with noise answers."""
    if not _noise(context):
        return
    for phase in decode_phases(content):
        if isinstance(phase, Predict) and phase.only is not None:
            raise FedkdError(
                f"the run asks only for the samples that '{phase.only}' of the client's state chooses, "
                "a choice to which the dp-noise of this node is not added"
            )


def _check_noise(experiment: Experiment, required: float) -> None:
    """Refuse a run whose soft labels would leave with less noise than this node requires."""
    if experiment.dp_noise < required:
        raise FedkdError(
            Setting("dp-noise", experiment.dp_noise),
            f" of the run: this node requires at least {required:g} (from its --node-config)",
        )


def _check_leaving(answer: RecordDict, context: Context) -> None:
    """Refuse to send a kind of knowledge that this node does not allow, whatever the instruction."""
    if _is_simulated() or "knowledge-kind" not in answer:
        return
    kind = str(answer.config_records["knowledge-kind"]["kind"])
    allowed = _sends(context)
    if kind not in allowed:
        raise FedkdError(f"the run asks for {kind}, this node only sends {', '.join(allowed)}")
    if kind != "soft-labels" and _noise(context):
        raise FedkdError(
            f"the run asks for {kind}, to which the dp-noise of this node is not added"
        )


def _sends(context: Context) -> list[str]:
    """Return the kinds of knowledge that this node may be asked to send."""
    value = context.node_config.get("sends", ",".join(BY_NAME))
    allowed = [kind.strip() for kind in str(value).split(",")]
    if not set(allowed) <= set(BY_NAME):
        raise FedkdError(
            f"sends = {value!r} (from {_NODE}): must be a comma list of {', '.join(BY_NAME)}"
        )
    return allowed


def _state_dir(value: object) -> str:
    """Return the folder in which this node keeps its clients' states."""
    if value == AUTO:
        return str(Path(os.environ.get("FLWR_HOME") or "~/.flwr").expanduser() / "fedkd")
    if not isinstance(value, str) or not value:
        raise FedkdError(
            f"state-dir = {value!r} (from {_NODE}): must be the path of a folder, or auto"
        )
    return str(Path(value).expanduser())


def _references(experiment: Experiment, key: str) -> list[str]:
    """Return the functions outside fedkd, ``module:function``, that a client is to run for a key."""
    names = str(getattr(experiment, key)).split(",")
    return [name.strip() for name in names if ":" in name]


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
