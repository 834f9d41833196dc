"""Clients in worker processes: the same run for any number of them, whatever becomes of one."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from shutil import rmtree
from tempfile import mkdtemp
from typing import Any

import pytest
import torch
from accident_models import FOLDER
from deployment_tools import free_port
from federation_tools import ROUGH, tiny
from flwr.app import RecordDict
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import fedkd
from fedkd.clients.instructions import Failure, Instruction
from fedkd.data import write_tensors
from fedkd.engines import workers
from fedkd.engines.preflight import check
from fedkd.engines.resources import Share, placement, share_of
from fedkd.engines.worker import Worker
from fedkd.engines.workers import Workers
from fedkd.errors import FedkdError
from fedkd.experiment import Experiment
from fedkd.federation.events import Events
from fedkd.federation.knowledge_records import encode_knowledge
from fedkd.federation.messages import decode_instruction, encode_instruction, experiment_record
from fedkd.federation.server import Replies, Server
from fedkd.knowledge import Sizes, SoftLabels
from fedkd.phases import Digest, Phase, Revisit
from fedkd.records import Run
from fedkd.strategy import DistillationStrategy
from fedkd.user_code import fingerprint

# --- Who is where ---------------------------------------------------------------------------------


def test_placement_by_hand() -> None:
    """Groups in order of their names: b's clients 1, 4 and 5, then w's 0, 2 and 3."""
    groups = ["w", "b", "w", "w", "b", "b"]
    sizes = [11, 5, 7, 13, 2, 3]
    # b: 5 -> 0, 3 -> 1, 2 -> 1 (3 < 5 images). w: 13 -> 0 (5 = 5, the first), 11 -> 1, 7 -> 1.
    assert placement(groups, sizes, 2) == [1, 0, 1, 0, 1, 1]
    assert placement(groups, sizes, 1) == [0] * 6
    # b: 5 -> 0, 3 -> 1, 2 -> 2. w: 13 -> 2, 11 -> 1, 7 -> 0.
    assert placement(groups, sizes, 3) == [1, 0, 0, 2, 2, 1]


@given(
    st.lists(st.tuples(st.sampled_from("xyz"), st.integers(1, 1000)), min_size=1, max_size=40),
    st.integers(1, 7),
)
def test_every_group_is_dealt_evenly(clients: list[tuple[str, int]], num_workers: int) -> None:
    groups, sizes = [group for group, _ in clients], [size for _, size in clients]
    found = placement(groups, sizes, num_workers)
    assert len(found) == len(clients)
    for group in set(groups):
        members = [k for k, name in enumerate(groups) if name == group]
        parts = [[sizes[k] for k in members if found[k] == w] for w in range(num_workers)]
        counts, images = [len(part) for part in parts], [sum(part) for part in parts]
        assert sum(counts) == len(members)
        assert max(counts) - min(counts) <= 1
        assert max(images) - min(images) <= max(sizes[k] for k in members)


@pytest.mark.parametrize(
    ("nodes", "num_workers", "share"),
    [
        ([{"CPU": 2}], 1, (2, 0)),
        ([{"CPU": 2}], 2, (1, 0)),
        ([{"CPU": 7.0}], 2, (3, 0)),
        ([{"CPU": 5}, {"CPU": 11}, {}], 3, (5, 0)),  # 5 | 5 + 5; by 6 only one fits
        ([{"CPU": 7, "GPU": 1}], 1, (7, 1)),
        ([{"CPU": 7, "GPU": 2}], 2, (3, 1)),
        ([{"CPU": 7, "GPU": 2}], 3, (2, 0.5)),
        ([{"CPU": 4, "GPU": 1}, {"CPU": 64}, {"CPU": 6, "GPU": 1}], 2, (4, 1)),
    ],
)
def test_workers_share_the_machines(
    nodes: list[dict[str, float]], num_workers: int, share: tuple[int, float]
) -> None:
    on_gpu = share[1] > 0
    assert share_of(nodes, num_workers, on_gpu) == Share(*share, threads=share[0])


@pytest.mark.parametrize(
    ("nodes", "on_gpu", "reason"),
    [
        ([{"CPU": 2}], False, "num-workers = 3: each takes a CPU, and the cluster has 2"),
        ([{"CPU": 5}], True, "Ray knows of no GPU"),
        ([{"CPU": 2, "GPU": 1}, {"CPU": 9}], True, "each takes a CPU.* where a GPU is"),
    ],
)
def test_too_small_a_cluster_is_refused(
    nodes: list[dict[str, float]], on_gpu: bool, reason: str
) -> None:
    with pytest.raises(FedkdError, match=reason):
        share_of(nodes, 3, on_gpu)


# --- What is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "reason"),
    [
        (
            {"num_workers": 2, "engine": "flower"},
            "num-workers = 2 has no effect with engine = 'flower'",
        ),
        ({"num_workers": 4}, "num-workers = 4 contradicts num-clients = 3"),
        ({"ray_address": "h:1"}, "ray-address = 'h:1' has no effect with num-workers = 0"),
        ({"num_workers": -1}, r"num-workers = -1.*≥ 0"),
    ],
)
def test_keys_that_contradict_each_other_are_refused(keys: dict[str, Any], reason: str) -> None:
    with pytest.raises(FedkdError, match=reason):
        tiny(**keys)


def test_a_smoke_run_of_workers_is_valid() -> None:
    small = tiny(num_clients=7, num_workers=7).smoke()
    assert (small.num_clients, small.num_workers) == (3, 3)


@pytest.mark.parametrize("address", ["127.0.0.1:{port}", "ray://127.0.0.1:{port}", "head", "h:x"])
def test_an_address_where_nobody_listens_is_refused_at_once(address: str, tmp_path: Path) -> None:
    where = address.format(port=free_port())
    experiment = tiny(num_workers=2, ray_address=where, run_dir=str(tmp_path / "runs"))
    with pytest.raises(FedkdError, match=f"ray-address = '{where}': nothing answers there"):
        check(experiment)
    assert list(tmp_path.iterdir()) == []


# --- A worker, in this process --------------------------------------------------------------------


SIZES = Sizes(num_public=37, num_classes=10)


def contents_for(
    experiment: Experiment,
    clients: list[int],
    phases: list[Phase],
    labels: SoftLabels | None = None,
) -> list[tuple[int, RecordDict]]:
    """Return what the server would send to clients in the first round."""
    record = experiment_record(experiment)
    packed = {} if labels is None else encode_knowledge(labels, SIZES, asked=False)
    nothing = torch.empty(0, dtype=torch.int64)
    instructions = [
        Instruction(k, 1, 0, tuple(phases), nothing, knowledge_round=1) for k in clients
    ]
    return [
        (instruction.client, encode_instruction(instruction, record, packed, {}))
        for instruction in instructions
    ]


def test_what_many_messages_share_travels_once_and_arrives_as_one() -> None:
    """As Ray ships a call's arguments. Clients whose knowledge is one object share it in a stack."""
    cloudpickle: Any = import_module("ray.cloudpickle")
    values = torch.randn(1, 37, 10).softmax(-1)
    labels = SoftLabels(
        values, "probabilities", torch.arange(37), torch.tensor([0]), torch.tensor([5])
    )
    contents = contents_for(tiny(num_clients=11), list(range(11)), [Digest()], labels)
    shipped = cloudpickle.dumps(contents, protocol=5)
    assert shipped.count(values.numpy().tobytes()) == 1
    seen: dict[Any, Any] = {}
    instructions = [
        decode_instruction(content, SIZES, num_examples=5, seen=seen)
        for _, content in cloudpickle.loads(shipped)
    ]
    assert len({id(instruction.knowledge) for instruction in instructions}) == 1
    assert isinstance(instructions[0].knowledge, SoftLabels)
    assert torch.equal(instructions[0].knowledge.values, values)


def test_a_worker_that_runs_other_code_is_refused(tmp_path: Path) -> None:
    experiment = tiny(num_workers=2, name="x", run_dir=str(tmp_path))
    same = Worker(experiment.flat(), fingerprint(experiment.client_modules), [], 1)
    assert same.handle([], {}) == []
    keys = {**experiment.flat(), "a-key-of-another-version": 3}
    with pytest.raises(FedkdError, match=f"worker on {socket.gethostname()} runs other code"):
        Worker(keys, "0123456789abcdef", [], 1).handle([], {})


def test_a_machine_without_the_data_asks_for_them_and_downloads_none(tmp_path: Path) -> None:
    experiment = tiny(dataset="mnist", data_dir=str(tmp_path), name="x", run_dir=str(tmp_path))
    assert (
        Worker(experiment.flat(), fingerprint(experiment.client_modules), [], 1).handle([], {})
        is None
    )
    assert list(tmp_path.iterdir()) == []


# --- The same run ---------------------------------------------------------------------------------

DENSE: dict[str, Any] = {
    "num_clients": 7,
    "student": "mlp-20",
    "plan": "stacked",
    "partition": "dirichlet",
    "fraction_train": 0.7,
    "public_per_round": 23,
    "num_server_rounds": 3,
}
MIXED: dict[str, Any] = {
    "num_clients": 5,
    "student": "mlp-20,lenet,resnet-8",
    "teacher": "mlp-64",
    "partition": "dirichlet",
    "public_labels": False,
    "num_server_rounds": 2,
}


@dataclass(frozen=True)
class Told:
    """A run and what its clients told the server, round by round."""

    run: Run
    handle: list[SoftLabels]


def told(keys: dict[str, Any], folder: Path, **more: Any) -> Told:
    """Run an experiment by its public name and listen in on the server."""
    handle: list[SoftLabels] = []
    update = DistillationStrategy.update

    def listen(self: DistillationStrategy, replies: Replies, server: Server) -> Any:
        assert replies.labels is not None
        handle.append(replies.labels)
        return update(self, replies, server)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DistillationStrategy, "update", listen)
        return Told(fedkd.run(tiny(**{"run_dir": str(folder), **keys, **more})), handle)


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Told:
    torch.set_num_threads(1)
    return told(DENSE, tmp_path_factory.mktemp("dense"))


def assert_same(got: Told, expected: Told, tolerance: float = 0.0) -> None:
    """Compare rounds, uploads and results; with no tolerance bit for bit. Machinery may have broken."""
    assert len(got.run.rounds) == len(expected.run.rounds) == len(got.handle)
    for row, other in zip(got.run.rounds, expected.run.rounds, strict=True):
        assert row["dropped"] == {}
        assert row.keys() == other.keys()
        for name in row.keys() - {*ROUGH, "events"}:
            if tolerance and (name.startswith("loss_") or name == "agreement"):
                assert row[name] == pytest.approx(other[name], rel=tolerance, abs=tolerance), name
            else:
                assert row[name] == other[name], name
    for answer, other_answer in zip(got.handle, expected.handle, strict=True):
        assert torch.equal(answer.clients, other_answer.clients)
        assert torch.equal(answer.samples, other_answer.samples)
        assert_close(answer.values, other_answer.values, tolerance)
    for name in ("client_accuracy", "client_own_accuracy", "bytes_up", "bytes_down", "dropped"):
        assert got.run.result[name] == expected.run.result[name]


def assert_close(tensor: Tensor, other: Tensor, tolerance: float) -> None:
    if tolerance:
        torch.testing.assert_close(tensor, other, rtol=0, atol=tolerance)
    else:
        assert tensor.dtype == other.dtype
        assert torch.equal(tensor, other)


def test_the_dense_case_is_worth_comparing(dense: Told) -> None:
    """Clients and rounds differ, some clients sit out, shards differ, knowledge is digested."""
    assert {len(row["sampled"]) for row in dense.run.rounds} == {5}
    assert len({tuple(row["sampled"]) for row in dense.run.rounds}) > 1
    assert "loss_digest" in dense.run.rounds[2]
    assert not torch.equal(dense.handle[0].values[0], dense.handle[0].values[1])
    assert len(set(dense.handle[0].num_examples.tolist())) > 1


@pytest.mark.ray
@pytest.mark.slow
def test_one_worker_on_a_ray_of_its_own(
    dense: Told, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray is gone afterwards, and so are the variables that were set for it."""
    import ray

    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setenv("RAY_ADDRESS", "192.0.2.1:1")  # another cluster is nobody's business
    before = {**os.environ, "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0"}
    assert_same(told(DENSE, tmp_path, num_workers=1), dense)
    assert not ray.is_initialized()
    assert dict(os.environ) == before


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """Start a Ray cluster of one machine that has no data; yield its address."""
    folder = Path(mkdtemp(prefix="fedkd-ray-"))  # short: sockets lie below it
    port = free_port()
    options = {
        "port": port,
        "ray-client-server-port": free_port(),
        "num-cpus": 3,
        "object-store-memory": 10**8,
        "include-dashboard": "false",
        "temp-dir": folder / "ray",
    }
    start = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block"]
    start += ["--disable-usage-stats", *(f"--{name}={value}" for name, value in options.items())]
    environment = {**os.environ, "FEDKD_DATA_DIR": str(folder / "data"), FOLDER: str(folder)}
    log = folder / "log"
    with log.open("w") as file:
        process = subprocess.Popen(start, stdout=file, stderr=file, env=environment, cwd=folder)
    try:
        end = time.monotonic() + 60
        while "Ray runtime started" not in log.read_text():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < end, log.read_text()
            time.sleep(0.1)
        yield f"127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(30)
        rmtree(folder, ignore_errors=True)


@pytest.mark.ray
@pytest.mark.slow
def test_three_workers_on_a_cluster_give_the_same_bits(
    dense: Told, cluster: str, tmp_path: Path
) -> None:
    assert_same(told(DENSE, tmp_path, num_workers=3, ray_address=cluster), dense)


@pytest.mark.ray
@pytest.mark.slow
def test_convolutions_and_local_teachers_give_the_same_to_the_last_digits(
    cluster: str, tmp_path: Path
) -> None:
    got = told(MIXED, tmp_path / "workers", num_workers=2, ray_address=cluster)
    assert_same(got, told(MIXED, tmp_path / "here"), tolerance=1e-5)


@pytest.mark.ray
@pytest.mark.slow
def test_one_of_two_workers_killed_in_mid_round_on_a_machine_without_the_data(
    cluster: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The data are sent, the worker is restarted, and not a bit of the run is another."""
    split = torch.Generator().manual_seed(3)
    sizes = {"train": 151, "test": 61}
    images = {
        f"{name}_images": torch.randint(256, (n, 1, 5, 7), generator=split, dtype=torch.uint8)
        for name, n in sizes.items()
    }
    labels = {
        f"{name}_labels": torch.randint(3, (n,), generator=split) for name, n in sizes.items()
    }
    write_tensors(tmp_path / "marks.safetensors", {**images, **labels})
    (tmp_path / "killing").touch()  # it does not happen here
    monkeypatch.setenv("FEDKD_DATA_DIR", str(tmp_path))
    monkeypatch.setenv(FOLDER, str(tmp_path))
    keys: dict[str, Any] = {
        "dataset": "accident_models:marks",
        "data_dir": None,
        "num_clients": 8,
        "student": "mlp-8,accident_models:killing",
        "plan": "stacked",
        "num_server_rounds": 2,
    }
    here = told(keys, tmp_path / "here")
    caplog.clear()
    there = told(keys, tmp_path / "workers", num_workers=2, ray_address=cluster)
    assert_same(there, here)
    assert [row["events"] for row in there.run.rounds] == [{"worker-died": 1}, {}]
    (event,) = [record.message.partition(": ")[0] for record in caplog.records]
    assert re.fullmatch("worker [01] is restarted, its clients start over", event)


def reported(answer: RecordDict) -> int:
    """Return whose report this is."""
    return int(answer.metric_records["report"]["partition-id"])  # type: ignore[arg-type]


@pytest.mark.ray
@pytest.mark.slow
def test_what_a_worker_does_costs_its_clients_at_most_a_round(
    cluster: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment = tiny(
        num_clients=4,
        student="mlp-8,accident_models:hanging,mlp-8,accident_models:doomed",
        num_workers=2,
        ray_address=cluster,
        name="accidents",
        run_dir=str(tmp_path),
    )
    monkeypatch.setattr(workers, "RESTARTS", 1)

    def outcomes(clients: list[int]) -> dict[int, str | int]:
        found = crew.handle(contents_for(experiment, clients, [Revisit()]))
        return {
            client: answer.reason if isinstance(answer, Failure) else reported(answer)
            for client, answer in zip(clients, found, strict=True)
        }

    events = Events()
    with Workers(experiment, events) as crew:
        assert crew._worker_of == [0, 1, 1, 0]
        crew._timeout = 5.0
        assert outcomes([0, 1, 2]) == {0: 0, 1: "no reply in time", 2: "no reply in time"}
        crew._timeout = 60.0
        lost = dict.fromkeys((0, 3), "worker process died")
        assert outcomes([2, 1, 0, 3]) == {2: 2, 1: 1, **lost}
        assert outcomes([0, 1]) == {0: 0, 1: 1}
        assert events.take() == {"worker-died": 1, "worker-given-up": 1, "worker-late": 1}
        # What is nobody's failure is raised here, with its type.
        (_, content), _ = contents_for(experiment, [0, 1], [Revisit()])
        with pytest.raises(
            FedkdError, match="the instruction is for partition 0, this node holds 1"
        ):
            crew.handle([(1, content)])


@pytest.mark.ray
@pytest.mark.slow
def test_a_foreign_cluster_is_left_as_it_was(cluster: str) -> None:
    import ray

    from fedkd.engines.ray_session import ray_log, ray_session

    with ray_session(threads=1):
        ray.init(address=cluster, **ray_log())
        known: Any = ray
        end = time.monotonic() + 30
        while known.available_resources().get("CPU") != 3 and time.monotonic() < end:
            time.sleep(0.1)
        assert known.available_resources()["CPU"] == 3
