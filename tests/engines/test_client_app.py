"""What the node of a deployment decides for itself, and how a server waits for nodes."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from subprocess import PIPE
from threading import Event
from typing import Any

import pytest
import torch
from federation_tools import array, call_client_app, tiny
from flwr.app import ArrayRecord, Error, Message, RecordDict
from flwr.common.constant import SUPERLINK_NODE_ID
from flwr.supercore.run import RunNotRunningException
from httpx import ConnectError
from paths import ROOT

from fedkd.clients.instructions import Instruction
from fedkd.data.federated import federated_data
from fedkd.engines.deployment import DeployedGrid
from fedkd.experiment import Experiment
from fedkd.federation.flower_internals.local_grid import FIRST_NODE_ID, LocalGrid, task_identity
from fedkd.federation.flower_internals.replies import failure_reason
from fedkd.federation.messages import (
    HELLO,
    TRAIN,
    encode_instruction,
    encode_request,
    experiment_record,
)
from fedkd.phases import Fit, MeanByClass, Phase, Predict, SendWeights

# --- What a node decides ----------------------------------------------------------------------------


def asked(
    experiment: Experiment, node: dict[str, Any], phase: Phase | None = None, kind: str = TRAIN
) -> Message:
    """Call the client app as a SuperNode with this configuration does."""
    wanted = torch.arange(3) if isinstance(phase, Predict) else torch.empty(0, dtype=torch.int64)
    instruction = Instruction(
        0, 1, 0, phases=(phase,) if phase else (), asked=wanted, evaluate="none"
    )
    record = experiment_record(experiment)
    content = RecordDict({"experiment": record})
    if kind == TRAIN:
        request = encode_request(wanted, federated_data(tiny()).sizes)
        content = encode_instruction(instruction, record, {}, request)
    return call_client_app(content, kind, node)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Flower home and a data folder of this test's own."""
    monkeypatch.setenv("FLWR_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("FEDKD_DATA_DIR", str(tmp_path / "data"))
    return tmp_path / "home"


PREDICT = Predict(space="probabilities")


def test_a_server_does_not_say_where_a_node_reads_and_writes(tmp_path: Path, home: Path) -> None:
    servers = tmp_path / "servers"
    run = tiny(run_dir=str(servers), data_dir=str(servers), name="mine", device="cuda:77")
    for kind in (HELLO, TRAIN):
        assert not asked(run, {}, PREDICT, kind).has_error()
    assert not servers.exists()
    assert (home / "fedkd" / "mine" / "clients").is_dir()
    assert (tmp_path / "data" / "partitions").is_dir()
    own = {"state-dir": str(tmp_path / "a" / "b"), "data-dir": str(tmp_path / "c")}
    assert not asked(run, own, PREDICT).has_error()
    assert (tmp_path / "a" / "b" / "mine" / "clients").is_dir()
    assert (tmp_path / "c" / "partitions").is_dir()
    assert not servers.exists()


@pytest.mark.parametrize("name", ["../elsewhere", "/tmp/elsewhere", "..", "a/b", ""])
def test_the_name_of_a_run_is_no_path(name: str, home: Path) -> None:
    run = tiny(name="mine")
    forged = run.model_copy(update={"name": name})
    assert "name = " in failure_reason(asked(forged, {}, PREDICT))
    assert not home.exists()


@pytest.mark.parametrize(
    ("node", "said"),
    [
        ({"state-dir": 3}, "state-dir = 3"),
        ({"state-dir": ""}, "state-dir = ''"),
        ({"data-dir": 3}, "data-dir = 3 (from this node's --node-config)"),
        ({"device": "abacus"}, "device = 'abacus'"),
        ({"client-code": 3}, "client-code = 3 (from this node's --node-config)"),
        ({"dp-noise": "much"}, "dp-noise = 'much' (from this node's --node-config)"),
        ({"sends": "soft-labels,everything"}, "sends = 'soft-labels,everything'"),
        ({"sends": 3}, "sends = 3"),
        (
            {"max-memory": 0},
            "max-memory = 0 (from this node's --node-config): must be a number > 0",
        ),
        ({"max-disk": "much"}, "max-disk = 'much'"),
        ({"max-seconds": float("inf")}, "max-seconds = inf"),
        ({"max-seconds": True}, "max-seconds = True"),
        ({"partition-id": 3}, "partition-id = 3 of this node: must be 0 to 2"),
    ],
)
def test_a_node_that_is_set_up_wrongly_says_so_at_once(node: dict[str, Any], said: str) -> None:
    assert said in failure_reason(asked(tiny(name="mine"), node, kind=HELLO))


def test_a_node_takes_part_with_as_much_noise_as_it_wants() -> None:
    node = {"dp-noise": 1.5}
    for kind in (HELLO, TRAIN):
        said = failure_reason(asked(tiny(name="mine", dp_noise=1.25), node, PREDICT, kind))
        assert "dp-noise = 1.25 of the run" in said
        assert "at least 1.5" in said
        for enough in (1.5, 2.0):
            run = tiny(name="mine", dp_noise=enough)
            assert not asked(run, node, PREDICT, kind).has_error()


@pytest.mark.parametrize(
    ("kind", "phase"),
    [
        ("soft-labels", PREDICT),
        ("class-means", MeanByClass(of="probabilities")),
        ("weights", SendWeights()),
    ],
)
def test_a_node_sends_what_it_wants_to(kind: str, phase: Phase) -> None:
    run = tiny(name="mine")
    everything = ["soft-labels", "class-means", "weights"]
    for node in ({}, {"sends": kind}, {"sends": ", ".join(everything)}):
        reply = asked(run, node, phase)
        assert reply.content.config_records["knowledge-kind"]["kind"] == kind
    others = [each for each in everything if each != kind]
    said = failure_reason(asked(run, {"sends": ",".join(others)}, phase))
    assert f"asks for {kind}, this node only sends {', '.join(others)}" in said
    private = asked(tiny(name="mine", dp_noise=1.0), {"dp-noise": 1.0}, phase)
    assert private.has_error() == (kind != "soft-labels")


# --- Which code a node runs -------------------------------------------------------------------------

SITE_DATA = """
import functools
from shutil import rmtree
from shutil import rmtree as forget

import torch

from fedkd.data import load as load_ours
from site_data.inner import load

forgetting = functools.partial(rmtree)
logged = functools.wraps(rmtree)(lambda folder: rmtree(folder))

class Delete:
    forget = staticmethod(rmtree)
"""

INNER = """
import torch

from fedkd import data
from fedkd.losses import term

def load(folder):
    return data.load("digits", folder)

def net(input_shape, num_classes):
    pixels = input_shape[0] * input_shape[1] * input_shape[2]
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(pixels, num_classes))
"""

RULES = """
from shutil import rmtree

from fedkd.losses import term
from somebody import theirs

taken = term(needs=None)(rmtree)
"""


SOMEBODY = """
from fedkd.losses import term

@term(needs=None)
def theirs(step):
    return step.logits.sum()
"""


@pytest.fixture
def site_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Two modules, of which a node allows ``site_data``; returns a file in its data folder."""
    for name, source in (("__init__", SITE_DATA), ("inner", INNER), ("rules", RULES)):
        path = tmp_path / "code" / "site_data" / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
    (tmp_path / "code" / "somebody.py").write_text(SOMEBODY)
    monkeypatch.syspath_prepend(tmp_path / "code")
    monkeypatch.setenv("FEDKD_DATA_DIR", str(tmp_path / "site"))
    kept = tmp_path / "site" / "kept.txt"
    kept.parent.mkdir()
    kept.write_text("private")
    yield kept
    for name in [n for n in sys.modules if n.partition(".")[0] in ("site_data", "somebody")]:
        del sys.modules[name]


@pytest.mark.parametrize(
    ("reference", "said"),
    [
        ("site_data:torch.serialization.shutil.rmtree", "is not a plain name"),
        ("site_data:Delete.forget", "is not a plain name"),
        ("site_data:__loader__", "is not a plain name"),
        ("site_data:inner:load", "must be site_data or a submodule"),
        ("site_data:", "is not a plain name"),
        ("site_data:rmtree", "is defined in shutil"),
        ("site_data:forget", "is defined in shutil"),
        ("site_data:logged", "is defined in shutil"),
        ("site_data:forgetting", "is defined in functools"),
        ("site_data:load_ours", "is defined in fedkd.data"),
        ("site_data:functools", "has no function 'functools'"),
        ("site_data.torch:serialization", "cannot import"),
        ("site_data.__main__:load", "which this node does not allow"),
        ("site_data/../shutil:rmtree", "which this node does not allow"),
        ("site_data.py:rmtree", "does not allow"),
        ("site_data_of_others:load", "which this node does not allow"),
        ("shutil:rmtree", "which this node does not allow"),
    ],
)
@pytest.mark.parametrize("key", ["dataset", "public", "student", "teacher"])
def test_a_server_names_only_what_is_defined_in_allowed_modules(
    key: str, reference: str, said: str, site_data: Path
) -> None:
    keys: dict[str, Any] = {key: reference, "public_labels": False, "name": "evil"}
    for kind in (HELLO, TRAIN):
        reason = failure_reason(asked(tiny(**keys), {"client-code": "site_data"}, PREDICT, kind))
        assert said in reason
    assert site_data.read_text() == "private"


def test_what_an_allowed_package_takes_from_its_own_submodules_is_its_own(site_data: Path) -> None:
    node = {"client-code": "site_data"}
    for reference in ("site_data:load", "site_data.inner:load"):
        run = tiny(dataset=reference, student="site_data.inner:net", name="own")
        for kind in (HELLO, TRAIN):
            assert not asked(run, node, PREDICT, kind).has_error()


@pytest.mark.parametrize(
    ("reference", "said"),
    [
        ("site_data.rules:taken", "is defined in shutil"),
        ("site_data.rules:theirs", "is defined in somebody"),
        ("site_data.rules:theirs.function", "is not a loss term"),
        ("somebody:theirs", "only runs code of"),
    ],
)
def test_loss_terms_go_by_the_same_rule(reference: str, said: str, site_data: Path) -> None:
    fit = Fit("revisit", private={reference: 1.0})
    assert said in failure_reason(asked(tiny(name="evil"), {"client-code": "site_data"}, fit))
    assert site_data.read_text() == "private"


# --- How a server waits for nodes -------------------------------------------------------------------


class Nodes(LocalGrid):
    """Nodes 0 to 4, of which some do what only real ones can."""

    def __init__(self, ways: Sequence[str]) -> None:
        def answer(messages: Sequence[tuple[int, Message]]) -> list[Message | None]:
            content = RecordDict({"a": ArrayRecord({"b": array(torch.arange(3))})})
            return [Message(content, reply_to=message) for _, message in messages]

        super().__init__(answer, num_clients=len(ways))
        self._ways = ways
        self._node_of: dict[str, int] = {}
        self._pulls: dict[int, int] = {}
        self.released = Event()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        sent = list(messages)
        ids = list(super().push_messages(sent))
        nodes = [message.metadata.dst_node_id - FIRST_NODE_ID for message in sent]
        self._node_of = dict(zip(ids, nodes, strict=True))
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        (message_id,) = message_ids
        node = self._node_of[message_id]
        way = self._ways[node]
        self._pulls[node] = self._pulls.get(node, 0) + 1
        if way == "late" and self._pulls[node] < 2:
            return []
        if way == "silent":
            return []
        if way == "garbled":
            raise ValueError("no message\nat all")
        if way == "stuck":
            self.released.wait()
        if way == "unplugged":
            raise ConnectError("refused")
        if way == "stopped":
            raise RunNotRunningException("refused")
        (reply,) = super().pull_messages([message_id])
        if way in ("gone", "another"):
            reply.metadata.__dict__["_src_node_id"] = SUPERLINK_NODE_ID
        if way == "gone":
            metadata = reply.metadata
            return [Message(error=Error(5, "offline"), metadata=metadata)]  # type: ignore[call-overload]
        return [reply]


def replies_of(grid: Nodes, timeout: float | None) -> dict[int, Message]:
    """Send a message to every node, and return the replies by node."""
    with task_identity():
        messages = [Message(RecordDict(), node, TRAIN) for node in grid.get_node_ids()]
        found = list(DeployedGrid(grid).send_and_receive(messages, timeout=timeout))
    assert len({reply.metadata.reply_to_message_id for reply in found}) == len(found)
    return {reply.metadata.src_node_id - FIRST_NODE_ID: reply for reply in found}


def test_whatever_a_node_does_is_its_own_reply() -> None:
    replies = replies_of(Nodes(["good", "garbled", "gone", "late", "another"]), None)
    assert sorted(replies) == [0, 1, 2, 3, 4]
    assert "b" in replies[0].content.array_records["a"]
    assert "b" in replies[3].content.array_records["a"]
    reasons = {node: failure_reason(replies[node]) for node in (1, 2, 4)}
    assert reasons == {
        1: "sent an unreadable reply: ValueError: no message at all",
        2: "node is gone",
        4: "replies as another node",
    }


def test_nobody_is_waited_for_beyond_the_timeout() -> None:
    """Not even by who is being read, as a node is that dies while it sends."""
    grid = Nodes(["good", "silent", "stuck"])
    began = time.monotonic()
    try:
        assert sorted(replies_of(grid, 1.5)) == [0]
        assert time.monotonic() - began < 60
    finally:
        grid.released.set()


@pytest.mark.parametrize("way", ["unplugged", "stopped"])
def test_a_superlink_out_of_reach_is_no_nodes_failure(way: str) -> None:
    with pytest.raises((ConnectError, RunNotRunningException), match="refused"):
        replies_of(Nodes(["good", way]), None)


# --- What a message may cost ------------------------------------------------------------------------


def test_a_node_downloads_nothing_because_a_server_says_so(tmp_path: Path) -> None:
    for keys in ({"dataset": "cifar10"}, {"public": "fashion-mnist"}):
        unlabelled = {"public_labels": False, "train_size": "auto", "test_size": "auto"}
        run = tiny(name="mine").replace(**keys, **unlabelled)
        said = failure_reason(asked(run, {}, PREDICT, HELLO))
        assert "downloads nothing because a server says so" in said
        assert f"fedkd data {next(iter(keys.values()))}" in said
    assert not list((tmp_path / "data").glob("*"))


def test_a_full_node_refuses_further_runs_until_there_is_room(home: Path) -> None:
    node = {"max-disk": 0.01}
    assert not asked(tiny(name="first"), node, PREDICT).has_error()
    (home / "fedkd" / "first" / "large").write_bytes(bytes(range(250)) * 44_000)
    for kind in (HELLO, TRAIN):
        said = failure_reason(asked(tiny(name="second"), node, PREDICT, kind))
        assert "take 0.01 GB" in said
        assert "more than its max-disk = 0.01: delete runs that have ended there" in said
    assert not (home / "fedkd" / "second").exists()
    (home / "fedkd" / "first" / "large").unlink()
    assert not asked(tiny(name="second"), node, PREDICT).has_error()


def test_holes_of_a_state_file_take_no_disk(home: Path) -> None:
    folder = home / "fedkd" / "first"
    folder.mkdir(parents=True)
    with (folder / "holes").open("wb") as file:
        file.truncate(10**12)
    assert not asked(tiny(name="second"), {"max-disk": 0.01}, PREDICT).has_error()


HUNGRY = """
import sys
import torch
from flwr.app import Context, Message, RecordDict
from fedkd.engines import deployment
from fedkd.federation.flower_internals.local_grid import task_identity
from fedkd.federation.flower_internals.replies import always_reply, failure_reason
sys.argv[0] = "/somewhere/flwr-clientapp"

with task_identity():
    message = Message(RecordDict(), 11, "train.fedkd", ttl=3600.0)
    message.metadata.__dict__["_message_id"] = "1"
    for node, call in [
        ({"max-memory": 4}, lambda m, c: torch.zeros(10**9).sum() and None),
        ({"max-seconds": 0.5}, lambda m, c: __import__("time").sleep(3600)),
    ]:
        context = Context(run_id=1, node_id=11, node_config=node, state=RecordDict(), run_config={})
        print(failure_reason(always_reply(
            message, context, lambda m, c: deployment.within_limits(m, c, call)
        )), flush=True)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="other systems count memory in another way")
def test_a_message_gets_no_more_memory_or_time_than_its_node_gives() -> None:
    done = subprocess.run(
        [sys.executable, "-c", HUNGRY], capture_output=True, text=True, cwd=ROOT, timeout=200
    )
    memory, seconds = done.stdout.splitlines()
    assert "can't allocate memory" in memory
    assert seconds == SAID


def test_a_plan_of_many_lanes_takes_no_more_than_its_clients_need() -> None:
    run = tiny(name="mine", plan="loopx1000000")
    assert not asked(run, {}, Fit("train", private={"ce": 1.0})).has_error()


# --- A call that hangs ------------------------------------------------------------------------------

HANGING = """
import sys, time
from flwr.app import Context, Message, RecordDict
from fedkd.engines import deployment
from fedkd.federation.flower_internals.local_grid import task_identity
from fedkd.federation.flower_internals.replies import always_reply, failure_reason
deployment._GRACE_S = 1.0
sys.argv[0] = "/somewhere/flwr-clientapp"

def hang(message, context):
    while True:
        try:
            time.sleep(3600)
        except TimeoutError:
            print("heard", flush=True)
            if "heedless" not in sys.argv:
                raise

with task_identity():
    message = Message(RecordDict(), 11, "train.fedkd", ttl=1.0)
    message.metadata.__dict__["_message_id"] = "1"
    context = Context(run_id=1, node_id=11, node_config={}, state=RecordDict(), run_config={})
    call = lambda m, c: deployment.within_limits(m, c, hang)
    print(failure_reason(always_reply(message, context, call)), flush=True)
"""


SAID = "TimeoutError: the message's deadline, or the node's max-seconds, has passed"


@pytest.mark.slow
def test_a_call_that_hangs_fails_at_the_deadline_and_ends_its_process_soon_after() -> None:
    """Those that heed a `TimeoutError` reply; those that do not are ended."""
    started = [
        subprocess.Popen(
            [sys.executable, "-c", HANGING, *how], stdout=PIPE, stderr=PIPE, text=True, cwd=ROOT
        )
        for how in ((), ("heedless",))
    ]
    (said, _), (heard, traceback) = [process.communicate(timeout=200) for process in started]
    assert [process.returncode for process in started] == [0, 1]
    assert said.splitlines() == ["heard", SAID]
    assert heard.splitlines() == ["heard"]
    assert "Timeout (0:00:0" in traceback
    assert "in hang" in traceback
