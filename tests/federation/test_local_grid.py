"""Messages arrive, in process and on Ray: the same numbers, and no client takes the run with it."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from threading import Event
from typing import Any

import grid_clients
import numpy as np
import pytest
from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Context,
    Error,
    Message,
    MetricRecord,
    RecordDict,
)
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg, Strategy
from flwr.simulation import run_simulation
from numpy.typing import NDArray

from fedkd.engines.simulation import guarded, simulate
from fedkd.errors import FedkdError
from fedkd.federation.events import Events
from fedkd.federation.flower_internals.backend import GuardedGrid, SimulationStopped, quiet
from fedkd.federation.flower_internals.local_grid import (
    FIRST_NODE_ID,
    Handle,
    LocalGrid,
    task_identity,
)
from fedkd.federation.flower_internals.replies import always_reply, error_reply, failure_reason

K = 5


def client_context(
    partition_id: int, num_partitions: int, run_config: Mapping[str, bool | int | float | str]
) -> Context:
    """Return the `Context` that a simulation would give to the client of `partition_id`."""
    return Context(
        run_id=1,
        node_id=FIRST_NODE_ID + partition_id,
        node_config={"partition-id": partition_id, "num-partitions": num_partitions},
        state=RecordDict(),
        run_config=dict(run_config),
    )


ROUNDS = 3


def one_by_one(contexts: Sequence[Context]) -> Handle:
    """Return a handle that calls the test's ClientApp for one client after the other."""

    def handle(batch: Sequence[tuple[int, Message]]) -> list[Message | None]:
        replies: list[Message | None] = []
        for partition, message in batch:
            try:
                replies.append(grid_clients.app(message, contexts[partition]))
            except Exception as exception:
                replies.append(error_reply(message, exception))
        return replies

    return handle


def contexts(num_clients: int = K) -> list[Context]:
    return [client_context(k, num_clients, {"seed": 3}) for k in range(num_clients)]


def to_all(grid: Grid, kind: str, content: RecordDict) -> list[Message]:
    return [Message(content, node, kind) for node in grid.get_node_ids()]


def deeds(**by_partition: str) -> RecordDict:
    names = {name.removeprefix("client_"): deed for name, deed in by_partition.items()}
    return RecordDict({"deeds": ConfigRecord({**names})})


# --- A strategy of our own, on both grids --------------------------------------------------------


class MeanOfLabels(Strategy):
    """Sends every client the mean soft labels, shifted by its place among the nodes' partitions."""

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        content = RecordDict({"knowledge": arrays})
        return (
            Message(content, node, "train", group_id=str(server_round))
            for node in grid.get_node_ids()
        )

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord, MetricRecord]:
        by_partition: dict[int, NDArray[np.float16]] = {}
        for reply in replies:
            labels = reply.content.array_records["labels"]["labels"].numpy()
            by_partition[int(metric(reply, "partition-id"))] = labels
        assert sorted(by_partition) == list(range(K))
        mean = np.stack([by_partition[k] for k in range(K)]).astype(np.float64).mean(axis=0)
        return ArrayRecord({"labels": Array(mean)}), MetricRecord()

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        return []

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        return None

    def summary(self) -> None:
        """Nothing to say."""


def metric(reply: Message, name: str) -> float:
    value = reply.content.metric_records["metrics"][name]
    assert isinstance(value, int | float)
    return value


def run_mean_of_labels(grid: Grid) -> NDArray[np.float64]:
    start = ArrayRecord({"labels": Array(np.linspace(-2.0, 3.0, 21).reshape(7, 3))})
    result = MeanOfLabels().start(grid, start, num_rounds=ROUNDS, timeout=60)
    labels: NDArray[np.float64] = result.arrays["labels"].numpy()
    return labels


def mean_of_labels_by_hand() -> NDArray[np.float64]:
    """Compute the same without messages."""
    knowledge = np.linspace(-2.0, 3.0, 21).reshape(7, 3)
    own = [np.sin(np.arange(21) * (k + 1.7)).reshape(7, 3) for k in range(K)]
    for _ in range(ROUNDS):
        own = [state + 0.3 * (knowledge - state) for state in own]
        knowledge = np.mean([state.astype(np.float16).astype(np.float64) for state in own], axis=0)
    return knowledge


def test_own_strategy_runs_in_process() -> None:
    with task_identity(), quiet():
        labels = run_mean_of_labels(LocalGrid(one_by_one(contexts()), num_clients=K))
    np.testing.assert_array_equal(labels, mean_of_labels_by_hand())


def test_flowers_own_fedavg_runs_in_process() -> None:
    start = np.linspace(-2.0, 3.0, 21).reshape(7, 3)
    fedavg = FedAvg(fraction_evaluate=0.0, arrayrecord_key="knowledge")
    with task_identity(), quiet():
        grid = LocalGrid(one_by_one(contexts()), num_clients=K)
        result = fedavg.start(grid, ArrayRecord({"labels": Array(start)}), num_rounds=1)
    own = [np.sin(np.arange(21) * (k + 1.7)).reshape(7, 3) for k in range(K)]
    moved = [state + 0.3 * (start - state) for state in own]
    expected = np.average(moved, axis=0, weights=np.arange(K) + 2.0)
    assert result.arrays["labels"].numpy().dtype == np.float16
    np.testing.assert_allclose(result.arrays["labels"].numpy(), expected, atol=3e-3)
    assert np.abs(expected - np.mean(moved, axis=0)).max() > 0.05


# --- The in-process grid -------------------------------------------------------------------------


def silent_or_loud(batch: Sequence[tuple[int, Message]]) -> list[Message | None]:
    """Partition 1 says nothing, partition 3 fails, the others say who they are."""
    replies: list[Message | None] = []
    for partition, message in batch:
        metrics = RecordDict({"metrics": MetricRecord({"partition-id": partition})})
        replies.append(Message(metrics, reply_to=message))
        if partition == 1:
            replies[-1] = None
        if partition == 3:
            replies[-1] = error_reply(message, OverflowError("too much\nof it"))
    return replies


def test_missing_and_failing_replies_do_not_hold_up_the_others() -> None:
    with task_identity():
        grid = LocalGrid(silent_or_loud, num_clients=K)
        replies = list(grid.send_and_receive(to_all(grid, "train", RecordDict()), timeout=None))
    assert [r.metadata.src_node_id - FIRST_NODE_ID for r in replies] == [0, 2, 3, 4]
    assert [r.has_error() for r in replies] == [False, False, True, False]
    assert [metric(r, "partition-id") for r in replies if r.has_content()] == [0, 2, 4]
    assert replies[2].error.code == 2
    assert failure_reason(replies[2]) == "OverflowError: too much of it"


def test_all_messages_of_one_call_are_handled_together_and_in_order() -> None:
    calls: list[list[int]] = []

    def handle(batch: Sequence[tuple[int, Message]]) -> list[Message | None]:
        calls.append([partition for partition, _ in batch])
        return [Message(message.content, reply_to=message) for _, message in batch]

    with task_identity():
        grid = LocalGrid(handle, num_clients=3)
        nodes = [FIRST_NODE_ID + k for k in (2, 0, 0)]
        replies = list(
            grid.send_and_receive(Message(RecordDict(), n, "train.x", group_id="8") for n in nodes)
        )
        assert list(grid.send_and_receive([])) == []
    assert calls == [[2, 0, 0]]
    assert [r.metadata.src_node_id for r in replies] == nodes
    assert {r.metadata.group_id for r in replies} == {"8"}
    assert len({r.metadata.message_id for r in replies}) == 3


def test_pushed_messages_are_pulled_once_by_their_ids() -> None:
    with task_identity():
        grid = LocalGrid(silent_or_loud, num_clients=K)
        messages = to_all(grid, "train", RecordDict())
        ids = list(grid.push_messages(messages))
        assert ids == [message.metadata.message_id for message in messages]
        assert len(set(ids)) == K
        first = list(grid.pull_messages([ids[2], ids[1]]))
        rest = list(grid.pull_messages(ids))
    assert [reply.metadata.reply_to_message_id for reply in first] == [ids[2]]
    assert [reply.metadata.reply_to_message_id for reply in rest] == [ids[0], ids[3], ids[4]]
    assert list(grid.pull_messages([*ids, "never sent"])) == []


def test_clients_and_server_share_no_record() -> None:
    sent = RecordDict(
        {
            "arrays": ArrayRecord({"a": Array(np.arange(5.0))}),
            "metrics": MetricRecord({"numbers": [2, 3]}),
            "config": ConfigRecord({"names": ["x"]}),
        }
    )
    all_contexts = contexts(3)
    with task_identity():
        grid = LocalGrid(one_by_one(all_contexts), num_clients=3)
        replies = list(grid.send_and_receive(to_all(grid, "train.meddle", sent)))
    assert sorted(sent) == ["arrays", "config", "metrics"]
    assert list(sent.array_records["arrays"]) == ["a"]
    assert sent.metric_records["metrics"]["numbers"] == [2, 3]
    for reply in replies:
        assert sorted(reply.content.array_records["arrays"]) == ["a", "extra"]
        assert reply.content.metric_records["metrics"]["numbers"] == [2, 3, 7]
        numbers = reply.content.metric_records["metrics"]["numbers"]
        assert isinstance(numbers, list)
        numbers.clear()
        reply.content.array_records["arrays"].pop("a")
    for context in all_contexts:
        assert sorted(context.state.array_records["arrays"]) == ["a", "extra"]
        assert context.state.metric_records["metrics"]["numbers"] == [2, 3, 7]


def test_messages_and_replies_that_do_not_fit_are_refused() -> None:
    with task_identity():
        beyond = [Message(RecordDict(), FIRST_NODE_ID + K, "train")]
        with pytest.raises(ValueError, match="no node 1005: there are 1000 to 1004"):
            LocalGrid(silent_or_loud, num_clients=K).send_and_receive(beyond)

        short = LocalGrid(lambda batch: silent_or_loud(batch)[1:], num_clients=K)
        with pytest.raises(ValueError, match="5 messages got 4 replies"):
            short.send_and_receive(to_all(short, "train", RecordDict()))

        mixed = LocalGrid(lambda batch: silent_or_loud(batch)[::-1], num_clients=K)
        with pytest.raises(ValueError, match="for another message"):
            mixed.send_and_receive(to_all(mixed, "train", RecordDict()))


def test_an_exception_of_the_engine_is_not_a_clients_failure() -> None:
    def broken(batch: Sequence[tuple[int, Message]]) -> list[Message | None]:
        raise ZeroDivisionError("a bug")

    with task_identity():
        grid = LocalGrid(broken, num_clients=K)
        with pytest.raises(ZeroDivisionError, match="a bug"):
            grid.send_and_receive(to_all(grid, "train", RecordDict()))


def test_the_identity_ends_with_its_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flwr.supercore.task_identity.TaskIdentity._run_id", None)

    def build() -> Message:
        return Message(RecordDict(), FIRST_NODE_ID, "train")

    with task_identity():
        with task_identity():
            build()
        build()
    with pytest.raises(RuntimeError, match="run_id is not set"):
        build()


def test_contexts_are_those_of_a_simulation() -> None:
    context = client_context(3, 7, {"alpha": 0.5})
    assert context.node_config == {"partition-id": 3, "num-partitions": 7}
    assert context.run_config == {"alpha": 0.5}
    assert context.node_id == FIRST_NODE_ID + 3
    assert len(context.state) == 0


# --- Failures ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("deed", "reason"),
    [
        ("raise", "ArithmeticError: nothing but nonsense"),
        ("return-nothing", "TypeError: the client returned NoneType instead of a Message"),
        ("", ""),
    ],
)
def test_a_polite_client_always_replies(deed: str, reason: str) -> None:
    context = client_context(2, K, {})
    context.state["kept"] = MetricRecord({"numbers": [1]})
    with task_identity():
        message = Message(deeds(client_2=deed), FIRST_NODE_ID + 2, "query.do_and_reply")
    reply = grid_clients.app(message, context)
    assert reply.metadata.dst_node_id == message.metadata.src_node_id
    assert sorted(context.state) == (["kept"] if deed else ["kept", "last"])
    if deed:
        assert (reply.error.code, failure_reason(reply)) == (2, reason)
    else:
        assert metric(reply, "partition-id") == 2


def test_a_failed_call_leaves_lists_in_the_state_as_they_were() -> None:
    def change_and_fail(message: Message, context: Context) -> Message:
        numbers = context.state.metric_records["kept"]["numbers"]
        assert isinstance(numbers, list)
        numbers.append(9)
        raise ValueError

    context = client_context(0, K, {})
    context.state["kept"] = MetricRecord({"numbers": [1]})
    with task_identity():
        message = Message(RecordDict(), FIRST_NODE_ID, "query")
    reply = always_reply(message, context, change_and_fail)
    assert failure_reason(reply) == "ValueError"
    assert context.state.metric_records["kept"]["numbers"] == [1]


# As Flower 1.41 with Ray 2.55 wrote them, paths shortened.
RAISED = (
    "<class 'ray.exceptions.RayTaskError(ClientAppException)'>:<'\x1b[36mray::ClientAppActor.run()"
    "\x1b[39m (pid=52, ip=10.0.0.2, actor_id=d4, repr=<flwr.ray_actor.ClientAppActor object>)\n"
    '  File "/x/client_app.py", line 161, in __call__\n    return self._funcs[name](m, context)'
    '\n           ^^^^^^^^^^\n  File "/x/clients.py", line 12, in train\n    raise ValueError("two'
    '\\nlines")\nValueError: two\nlines\n\nThe above exception was the direct cause of the '
    "following exception:\n\n\x1b[36mray::ClientAppActor.run()\x1b[39m (pid=52, ip=10.0.0.2)\n"
    '  File "/x/ray_actor.py", line 65, in run\n    raise ClientAppException(str(ex)) from ex\n'
    "flwr.clientapp.client_app.ClientAppException: \nException ClientAppException occurred. "
    "Message: two\nlines'>"
)
KILLED = (
    "<class 'ray.exceptions.ActorUnavailableError'>:<'The actor b0 is unavailable: The actor is "
    "temporarily unavailable: RpcError: RPC error: Socket closed rpc_code: 14. The task may or may "
    "not have been executed on the actor.'>"
)
DEPLOYED = (
    "<class 'flwr.clientapp.client_app.ClientAppException'>:<'\nException ClientAppException "
    "occurred. Message: no such file'>"
)
EXPIRED = "Error: Message Unavailable - The requested message could not be found in the database."


@pytest.mark.parametrize(
    ("code", "text", "reason"),
    [
        (2, RAISED, "ValueError: two lines"),
        (0, KILLED, "client process died"),
        (0, "<class 'ray.exceptions.ActorDiedError'>:<'The actor died.'>", "client process died"),
        (2, DEPLOYED, "no such file"),
        (3, EXPIRED, "no reply in time"),
        (5, "Node is no longer there", "node is gone"),
        (0, "<class 'builtins.KeyError'>:<''w''>", "KeyError: 'w'"),
        (2, "ValueError: one\n  two \x1b[31mthree\x1b[0m", "ValueError: one two three"),
        (2, "x" * 500, "x" * 199 + "…"),
        (6, "", "error 6 without a reason"),
    ],
)
def test_reasons_are_one_short_line(code: int, text: str, reason: str) -> None:
    with task_identity():
        message = Message(RecordDict(), FIRST_NODE_ID, "train")
    assert failure_reason(Message(Error(code, text), reply_to=message)) == reason


def test_a_guarded_grid_stops_waiting_when_the_simulation_ends() -> None:
    stopped = Event()

    def nobody_answers(batch: Sequence[tuple[int, Message]]) -> list[Message | None]:
        stopped.set()
        return [None for _ in batch]

    with task_identity():
        grid = GuardedGrid(LocalGrid(nobody_answers, num_clients=1), stopped)
        with pytest.raises(SimulationStopped):
            grid.send_and_receive(to_all(grid, "train", RecordDict()))


def test_a_guarded_grid_lets_messages_expire_with_the_round() -> None:
    lives: list[float] = []

    def note(batch: Sequence[tuple[int, Message]]) -> list[Message | None]:
        lives.extend(message.metadata.ttl for _, message in batch)
        return [None if partition else Message(m.content, reply_to=m) for partition, m in batch]

    with task_identity():
        grid = GuardedGrid(LocalGrid(note, num_clients=2), Event())
        replies = list(grid.send_and_receive(to_all(grid, "train", RecordDict()), timeout=0.25))
        longer = [Message(RecordDict(), FIRST_NODE_ID, "train", ttl=0.5)]
        list(grid.send_and_receive(longer, timeout=60.0))
    assert len(replies) == 1
    assert lives == [0.25, 0.25, 0.5]


# --- On Ray --------------------------------------------------------------------------------------


class Finished(Exception):
    """What the server raises at the end, to see it come out."""


@dataclass
class Seen:
    """What the server of the run on Ray saw."""

    labels: NDArray[np.float64] | None = None
    rounds: list[dict[int, str]] = field(default_factory=list)
    events: list[dict[str, int]] = field(default_factory=list)
    threads: object = None
    raised: BaseException | None = None
    environment: dict[str, str] = field(default_factory=dict)


def ask(grid: Grid, content: RecordDict) -> dict[int, Message]:
    """Return the replies by node id."""
    replies = grid.send_and_receive(to_all(grid, "query.do", content), timeout=60)
    return {reply.metadata.src_node_id: reply for reply in replies}


def outcomes(
    grid: Grid, nodes: dict[int, int], content: RecordDict, timeout: float = 60.0
) -> dict[int, str]:
    """Return {partition: "ok" or the reason of its failure}; what is missing gave no reply."""
    messages = to_all(grid, "query.do", content)
    replies = {
        r.metadata.reply_to_message_id: r for r in grid.send_and_receive(messages, timeout=timeout)
    }
    return {
        nodes[message.metadata.dst_node_id]: "ok" if reply.has_content() else failure_reason(reply)
        for message in messages
        if (reply := replies.get(message.metadata.message_id))
    }


@pytest.fixture(scope="module")
def on_ray() -> Seen:
    """Run everything that needs Ray once: the toy strategy, then six rounds of accidents."""
    seen, events = Seen(), Events()

    def server(grid: Grid) -> None:
        seen.labels = run_mean_of_labels(grid)
        answers = ask(grid, deeds())
        nodes = {node: int(metric(reply, "partition-id")) for node, reply in answers.items()}
        seen.threads = {str(reply.content["about"]["threads"]) for reply in answers.values()}
        accidents = [
            (deeds(), 60.0),
            (deeds(client_2="exit"), 60.0),
            (deeds(client_1="raise", client_3="return-nothing"), 60.0),
            (deeds(client_4="hang"), 4.0),
            (deeds(), 60.0),
            (deeds(client_0="hang"), 0.5),
        ]
        for content, timeout in accidents:
            seen.rounds.append(outcomes(grid, nodes, content, timeout))
            seen.events.append(events.take())
        raise Finished

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "3")
        patch.setenv("PYTHONPATH", "/nowhere")
        try:
            simulate(server, grid_clients.app, num_clients=K, num_cpus=2, events=events)
        except Finished as finished:
            seen.raised = finished
        seen.environment = dict(os.environ)
    return seen


@pytest.mark.ray
@pytest.mark.slow
def test_own_strategy_gives_the_same_on_ray(on_ray: Seen) -> None:
    assert on_ray.labels is not None
    np.testing.assert_array_equal(on_ray.labels, mean_of_labels_by_hand())


@pytest.mark.ray
@pytest.mark.slow
def test_a_dead_client_process_costs_one_reply(on_ray: Seen) -> None:
    everybody = dict.fromkeys(range(K), "ok")
    assert on_ray.rounds[0] == everybody
    assert on_ray.rounds[1] == {**everybody, 2: "client process died"}


@pytest.mark.ray
@pytest.mark.slow
def test_clients_that_raise_or_return_nothing_are_named(on_ray: Seen) -> None:
    assert on_ray.rounds[2] == {
        **dict.fromkeys((0, 2, 4), "ok"),
        1: "ArithmeticError: nothing but nonsense",
        3: "TypeError: the client returned NoneType instead of a Message",
    }


@pytest.mark.ray
@pytest.mark.slow
def test_a_client_that_hangs_costs_its_round_and_not_the_run(on_ray: Seen) -> None:
    answered = {k: reason for k, reason in on_ray.rounds[3].items() if reason == "ok"}
    assert sorted(answered) == [0, 1, 2, 3]
    assert on_ray.rounds[4] == dict.fromkeys(range(K), "ok")
    assert isinstance(on_ray.raised, Finished)  # although client 0 hung when the server returned


@pytest.mark.ray
@pytest.mark.slow
def test_what_became_of_client_processes_is_counted_round_by_round(on_ray: Seen) -> None:
    died, late = {"client-died": 1}, {"client-late": 1}
    assert on_ray.events == [{}, died, {}, late, {}, late]


@pytest.mark.ray
@pytest.mark.slow
def test_threads_are_the_workers_and_the_environment_is_as_before(on_ray: Seen) -> None:
    assert on_ray.threads == {"1"}
    assert on_ray.environment["OMP_NUM_THREADS"] == "3"
    assert on_ray.environment["PYTHONPATH"] == "/nowhere"


@pytest.mark.ray
@pytest.mark.slow
def test_a_simulation_that_flower_started_survives_a_dead_client_too(
    on_ray: Seen, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", "")  # Flower sets it, and leaves it
    rounds: list[dict[int, str]] = []
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        while len(list(grid.get_node_ids())) < 3:
            time.sleep(0.05)
        with guarded(grid) as tended:
            answers = ask(tended, deeds())
            nodes = {node: int(metric(reply, "partition-id")) for node, reply in answers.items()}
            rounds.append(outcomes(tended, nodes, deeds(client_1="exit")))
            rounds.append(outcomes(tended, nodes, deeds()))

    resources: dict[str, Any] = {"init_args": {"num_cpus": 1}, "client_resources": {"num_cpus": 1}}
    with task_identity(), quiet():
        run_simulation(app, grid_clients.app, 3, backend_config=resources)
    assert rounds == [{0: "ok", 1: "client process died", 2: "ok"}, dict.fromkeys(range(3), "ok")]


def test_a_grid_without_ray_needs_no_guard() -> None:
    grid = LocalGrid(silent_or_loud, num_clients=K)
    with guarded(grid) as same:
        assert same is grid


@pytest.mark.parametrize(
    ("cpus", "gpus", "message"),
    [
        (2.0, 0.0, "client-cpus = 2.0: a client needs more than 0 and at most the 1 CPU that"),
        (0.0, 0.0, "client-cpus = 0.0: a client needs more than 0 and at most the 1 CPU that"),
        (1.0, 99.0, "client-gpus = 99.0: a client takes at least 0 and at most the"),
    ],
)
def test_too_small_a_machine_is_an_error_and_not_a_hang(
    cpus: float, gpus: float, message: str
) -> None:
    def server(grid: Grid) -> None:
        raise AssertionError("started")

    with pytest.raises(FedkdError, match=message):
        simulate(
            server,
            grid_clients.app,
            num_clients=K,
            client_cpus=cpus,
            client_gpus=gpus,
            num_cpus=1,
        )
