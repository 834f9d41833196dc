"""What a node with noise, or with metrics of its own, does not send, whatever it is asked."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from federation_tools import call_client_app, reply_with, tiny
from flwr.app import Message, RecordDict
from sampling import one_in

from fedkd.clients.instructions import Instruction
from fedkd.data import federated
from fedkd.data.federated import federated_data
from fedkd.engines.run_folder import record_beginning
from fedkd.errors import FedkdError
from fedkd.experiment import Experiment
from fedkd.federation.flower_internals.local_grid import LocalGrid, task_identity
from fedkd.federation.flower_internals.replies import failure_reason
from fedkd.federation.messages import (
    HELLO,
    TRAIN,
    decode_introduction,
    encode_instruction,
    encode_request,
    experiment_record,
)
from fedkd.phases import (
    Apply,
    Fit,
    LocalClient,
    MeanByClass,
    Phase,
    Predict,
    SendWeights,
    procedure,
)
from fedkd.records.folder import RunFolder
from fedkd.records.results import Run
from fedkd.registry import strategy_of
from fedkd.reports.findings.diagnose import findings
from fedkd.reports.report import report

HERE = __name__
PREDICT = Predict(space="probabilities")
LEARN = Fit("revisit", private={"ce": 1.0})


@procedure
def chooses(client: LocalClient) -> None:
    """Choose public samples by a private label."""
    client.state = {"chosen": torch.arange(len(client.load_public())) == int(client.labels[0])}


@procedure
def tells(client: LocalClient) -> None:
    """Raise what is private."""
    raise ValueError(f"labels {client.labels.tolist()}")


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A Flower home and a data folder of this test's own, of which no other test finds data in memory."""
    monkeypatch.setenv("FLWR_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("FEDKD_DATA_DIR", str(tmp_path / "data"))
    yield
    federated._data.cache_clear()


def asked(
    run: Experiment, node: Mapping[str, Any], phases: Sequence[Phase], evaluate: str = "end"
) -> Message:
    """Have a node execute some phases."""
    wanted = torch.arange(5)
    instruction = Instruction(0, 1, 0, tuple(phases), wanted, evaluate=evaluate)  # type: ignore[arg-type]
    request = encode_request(wanted, federated_data(tiny()).sizes)
    content = encode_instruction(instruction, experiment_record(run), {}, request)
    return call_client_app(content, TRAIN, node)


NOISY = {"dp-noise": 1.5, "client-code": HERE}


@pytest.mark.parametrize("evaluate", ["phases", "last", "end", "none"])
@pytest.mark.parametrize(
    "phases",
    [
        (),
        (LEARN,),
        (PREDICT,),
        (LEARN, PREDICT),
        (PREDICT, LEARN, PREDICT, PREDICT),
        (Fit("loss_of_one", private={"ce": 1e-6}), PREDICT),
        (MeanByClass(of="probabilities"), PREDICT),
        (SendWeights(), PREDICT),
    ],
)
def test_a_node_with_noise_sends_noisy_labels_and_nothing_else(
    phases: Sequence[Phase], evaluate: str
) -> None:
    run = tiny(name="mine", dp_noise=1.5, client_code=HERE, profile=True)
    reply = asked(run, NOISY, phases, evaluate)
    assert not reply.has_error()
    assert dict(reply.content.metric_records["report"]) == {"partition-id": 0, "round": 1}
    others = set(reply.content) - {"report", "withheld"}
    assert others == ({"knowledge", "knowledge-kind"} if PREDICT in phases else set())
    again = asked(run.replace(name="again"), NOISY, phases, evaluate)
    if PREDICT in phases:  # drawn anew: no seed that a server knows removes it
        first, second = (
            r.content.array_records["knowledge"]["values"].numpy() for r in (reply, again)
        )
        assert abs(first - second).max() > 0.01


@pytest.mark.parametrize(
    ("phases", "said"),
    [
        ((MeanByClass(of="probabilities"),), "asks for class-means"),
        ((PREDICT, MeanByClass(of="logits")), "asks for class-means"),
        ((PREDICT, SendWeights()), "asks for weights"),
        ((Apply(chooses), Predict(space="probabilities", only="chosen")), "chosen"),
        ((Predict(space="probabilities", only="chosen"), PREDICT), "chosen"),
    ],
)
def test_what_has_no_noise_does_not_leave_a_node_with_noise(
    phases: Sequence[Phase], said: str
) -> None:
    run = tiny(name="mine", dp_noise=1.5, client_code=HERE)
    reply = asked(run, NOISY, phases)
    assert said in failure_reason(reply)
    assert "dp-noise" in failure_reason(reply)


def test_why_a_node_with_noise_fails_stays_in_its_log(caplog: pytest.LogCaptureFixture) -> None:
    run = tiny(name="mine", dp_noise=1.5, client_code=HERE)
    labels = str(federated_data(tiny()).train.labels[federated_data(tiny()).shards[0]].tolist()[:3])  # type: ignore[index]
    with caplog.at_level(logging.WARNING):
        said = failure_reason(asked(run, NOISY, (Apply(tells), PREDICT)))
    assert "labels" not in said
    assert "the node's own log" in said
    assert labels[1:-1] in caplog.text
    open_node = {"client-code": HERE}
    assert labels[1:-1] in failure_reason(asked(run, open_node, (Apply(tells), PREDICT)))


@pytest.mark.parametrize("keys", [{}, {"partition": "pathological"}, {"min_partition_size": 140}])
def test_a_node_with_noise_does_not_say_how_its_partition_comes_out(keys: dict[str, Any]) -> None:
    """By changing the partition's keys, a server would find the labels' counts in its size."""
    run = tiny(name="mine", dp_noise=1.5, **keys)
    content = RecordDict({"experiment": experiment_record(run)})
    said = decode_introduction(call_client_app(content, HELLO, {"dp-noise": 1.5}).content)
    assert (said.client, said.num_examples, said.student) == (0, None, "mlp-8")
    if "min_partition_size" in keys:  # the same run fails on a node that reads its data
        assert call_client_app(content, HELLO, {}).has_error()


def test_a_node_keeps_its_metrics_back_without_noise() -> None:
    run = tiny(name="mine")
    told, quiet = (
        asked(run.replace(name=name), node, (LEARN, PREDICT)).content.metric_records["report"]
        for name, node in (("a", {}), ("b", {"share-metrics": False}))
    )
    assert {"loss_revisit", "gradient_norm_revisit", "accuracy", "own_accuracy"} <= set(told)
    kept_back = set(told) - set(quiet)
    assert kept_back == {
        name for name in told if name.startswith(("loss", "gradient")) or "accuracy" in name
    }
    assert quiet["num-examples"] == told["num-examples"]


@pytest.mark.parametrize(
    ("node", "said"),
    [
        ({"share-metrics": "no"}, "share-metrics = 'no'"),
        ({"share-metrics": 0}, "share-metrics = 0"),
        ({"share-metric": False}, "share-metric .*did you mean 'share-metrics'"),
        ({"dp_noise": 3.0}, "dp_noise .*did you mean 'dp-noise'"),
        ({"client_code": "none"}, "client_code .*did you mean 'client-code'"),
    ],
)
def test_a_key_that_protects_nothing_is_refused(node: dict[str, Any], said: str) -> None:
    content = RecordDict({"experiment": experiment_record(tiny(name="mine"))})
    for kind in (HELLO, TRAIN):
        with pytest.raises(FedkdError, match=said):
            raise FedkdError(failure_reason(call_client_app(content, kind, node)))


# --- A run with such nodes --------------------------------------------------------------------------


def finished(folder: Path, nodes: Sequence[Mapping[str, Any]], **keys: Any) -> Run:
    """Run a federation on nodes of these configurations, and read it back."""
    run = tiny(run_dir=str(folder), name="run", num_server_rounds=2, num_clients=len(nodes), **keys)

    def handle(messages: Sequence[tuple[int, Message]]) -> Iterator[Message]:
        for client, message in messages:
            node = {"partition-id": client, "state-dir": str(folder / "states"), **nodes[client]}
            reply = call_client_app(message.content, message.metadata.message_type, node)
            yield reply_with(message, reply.content)

    run_folder = RunFolder.create(run, "run")
    record_beginning(run_folder, run, "cpu")
    with task_identity():
        grid = LocalGrid(lambda messages: list(handle(messages)), num_clients=len(nodes))
        strategy_of(run).open(grid, run, run_folder).run()
    return Run.load(run_folder.path)


@pytest.mark.parametrize(
    ("nodes", "keys", "withheld"),
    [
        ([{"dp-noise": 2.0}] * 3, {"dp_noise": 2.0}, [0, 1, 2]),
        ([{"share-metrics": False}] * 3, {}, [0, 1, 2]),
        ([{}, {"share-metrics": False}, {}], {}, [1]),
        ([{}, {"dp-noise": 0.5}, {}], {"dp_noise": 2.0}, [1]),
    ],
    ids=["noise", "quiet", "one is quiet", "one has noise"],
)
@pytest.mark.parametrize("strategy", one_in(2, ["DSFL", "FedMD"]))
def test_a_run_copes_with_what_is_withheld_and_records_it(
    strategy: str,
    nodes: Sequence[Mapping[str, Any]],
    keys: dict[str, Any],
    withheld: list[int],
    tmp_path: Path,
) -> None:
    done = finished(tmp_path, nodes, strategy=strategy, **keys)
    telling = [client for client in range(3) if client not in withheld]
    for record in (*done.rounds, done.result):
        assert record["withheld"]["metrics"] == withheld
        assert record["dropped"] == {}
    for row in done.rounds:
        assert row["answered"] == [0, 1, 2]
        assert ("loss_revisit" in row) == bool(telling)
    known = [client for client, a in enumerate(done.client_accuracy) if a is not None]
    assert known == telling
    assert done.has_accuracy == bool(telling)
    if not telling:
        assert json.loads((done.path / "result.json").read_text())["accuracy"] is None
        with pytest.raises(FedkdError, match="withhold"):
            _ = done.accuracy
    findings(done)
    page = report(done.path, tmp_path / "report.html").read_text()
    assert f"withhold their metrics, and are in no mean: {len(withheld)}" in page
