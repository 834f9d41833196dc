"""Whatever breaks under a run ends in a counted event and a finished run, or in one clear error."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from shutil import rmtree
from tempfile import mkdtemp
from typing import Any

import accident_models
import pytest
import torch
from accident_models import FOLDER, NODE, STUDENTS, Forgetful, plan
from federation_tools import ROUGH, tiny
from paths import TOOLS

import fedkd
from fedkd.clients import execute as client
from fedkd.clients.execute import is_out_of_memory
from fedkd.clients.instructions import ClientReport
from fedkd.clients.run_phases import run_phases
from fedkd.clients.stack import Stack
from fedkd.engines import ray_session, workers
from fedkd.engines.run import run_side_by_side
from fedkd.errors import FedkdError
from fedkd.experiment import Experiment
from fedkd.records import Run
from fedkd.records.callbacks import EachRound

HEADLESS = r"Ray went away: its head process did not answer 3 times in a row"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder of a run whose processes look there for what is to go wrong."""
    monkeypatch.setenv(FOLDER, str(tmp_path))
    return tmp_path


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shorten the deadlines of Ray, not what happens at their ends."""
    monkeypatch.setattr(ray_session, "LOOK_EVERY", 0.5)
    monkeypatch.setattr(ray_session, "PATIENCE", 5.0)
    monkeypatch.setattr(ray_session, "LEAVE_TIMEOUT", 8.0)


def accidental(folder: Path, **keys: Any) -> Experiment:
    """Return a run of four clients that meet with accidents."""
    small: dict[str, Any] = {
        "num_clients": 4,
        "student": STUDENTS,
        "strategy": "LocalOnly",
        "num_server_rounds": 3,
        "plan": "loop",
        "run_dir": str(folder / "runs"),
        "name": "broken",
    }
    return tiny(**{**small, **keys})


def before_round(folder: Path, accidents: Mapping[int, Sequence[str]]) -> EachRound:
    """Plan what goes wrong in a round once the round before is over."""
    return EachRound(lambda row: plan(folder, *accidents.get(row["round"] + 1, ())))


def happened(run: Run) -> list[tuple[dict[str, int], dict[str, str]]]:
    """Return by round what was counted and who was dropped for which reason."""
    return [(row["events"], row["dropped"]) for row in run.rounds]


NO_MEMORY = "RuntimeError: [enforce fail at alloc_cpu.cpp"
"""How PyTorch begins to say that the CPU has none."""


def assert_no_memory(reason: str) -> None:
    assert reason.startswith(NO_MEMORY), reason
    assert "accident_models.py" in reason


def assert_same_numbers(run: Run, other: Run) -> None:
    """Compare two runs bit for bit, all but time and what went wrong."""
    for row, expected in zip(run.rounds, other.rounds, strict=True):
        assert row.keys() == expected.keys()
        for name in row.keys() - {*ROUGH, "events"}:
            assert row[name] == expected[name], name
    assert run.client_accuracy == other.client_accuracy


# --- A GPU, or this machine, out of memory --------------------------------------------------------


def with_room_for(
    most: int, monkeypatch: pytest.MonkeyPatch, never: Sequence[int] = ()
) -> list[int]:
    """Have stacks of more clients, or of one of `never`, run out of memory once they are trained.

    Returns:
        The sizes of all stacks that are tried.
    """
    tried: list[int] = []

    def scarce(stack: Stack) -> list[ClientReport]:
        reports = run_phases(stack)  # has trained its states in place
        tried.append(len(stack.instructions))
        if len(stack.instructions) > most or set(never) & set(stack.clients):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.00 GiB")
        return reports

    monkeypatch.setattr(client, "run_phases", scarce)
    return tried


MANY: dict[str, Any] = {
    "num_clients": 7,
    "student": "mlp-20",
    "plan": "stacked",
    "num_server_rounds": 3,
    "fraction_train": 1.0,
    "partition": "dirichlet",
}


def test_a_stack_that_does_not_fit_is_run_by_halves_with_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = fedkd.run(tiny(**MANY, run_dir=str(tmp_path), name="plain"))
    tried = with_room_for(2, monkeypatch)
    run = fedkd.run(tiny(**MANY, run_dir=str(tmp_path), name="scarce"))
    # 7 = 4 + 3 = (2 + 2) + (2 + 1): three that do not fit, in three rounds and the closing exchange.
    assert tried == [7, 4, 2, 2, 3, 2, 1] * 4
    assert happened(run) == [({"out-of-memory": 3}, {})] * 3
    assert [row["events"] for row in plain.rounds] == [{}] * 3
    assert "loss_digest" in run.rounds[2]
    assert_same_numbers(run, plain)


def test_a_client_that_does_not_even_fit_alone_is_dropped_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_room_for(7, monkeypatch, never=[4])
    run = fedkd.run(tiny(**{**MANY, "num_server_rounds": 1}, run_dir=str(tmp_path), name="x"))
    reason = (
        "OutOfMemoryError: CUDA out of memory. Tried to allocate 3.00 GiB (test_broken_machinery.py"
    )
    (row,) = run.rounds
    assert row["answered"] == [0, 1, 2, 3, 5, 6]
    assert row["dropped"].keys() == {"4"}
    assert row["dropped"]["4"].startswith(reason)
    # 7 = 4 + 3, where 4, 5, 6 = (4, 5) + 6, and 4 alone says why itself.
    assert row["events"] == {"out-of-memory": 3}


def test_federations_side_by_side_are_both_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = {**MANY, "num_clients": 3, "num_server_rounds": 1, "run_dir": str(tmp_path)}
    experiments = [tiny(**keys, alpha=alpha, name=f"{alpha}") for alpha in (0.25, 0.75)]
    tried = with_room_for(3, monkeypatch)
    found = run_side_by_side(experiments)
    assert tried == [6, 3, 3] * 2
    for run in found:
        assert isinstance(run, Run)
        assert happened(run) == [({"out-of-memory": 1}, {})]


LARGE: dict[str, Any] = {
    "num_clients": 101,
    "student": "mlp-499",
    "plan": "stacked-5",
    "num_server_rounds": 1,
    "fraction_train": 1.0,
    "strategy": "LocalOnly",
    "train_size": 505,
}
"""Clients of 1.1 MB each, which take 116 MB as a stack."""

SCARCE = """
import json, resource, sys, torch
from pathlib import Path
import fedkd
from federation_tools import tiny

torch.set_num_threads(1)
keys = json.loads(sys.argv[1])
fedkd.run(tiny(**{**keys, "num_clients": 3, "name": "warm"}))
pages = int(Path("/proc/self/statm").read_text().split()[0])
limit = pages * resource.getpagesize() + (64 << 20)
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
fedkd.run(tiny(**keys, name="scarce"))
"""


@pytest.mark.slow
def test_a_stack_larger_than_the_memory_of_its_process(tmp_path: Path) -> None:
    keys = {**LARGE, "run_dir": str(tmp_path)}
    plain = fedkd.run(tiny(**keys, name="plain"))
    command = [sys.executable, "-c", SCARCE, json.dumps(keys)]
    subprocess.run(command, check=True, timeout=120, cwd=TOOLS)
    run = Run.load(tmp_path / "scarce")
    ((events, dropped),) = happened(run)
    assert dropped == {}
    assert events["out-of-memory"] >= 1
    assert_same_numbers(run, plain)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory."), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"), True),
        (RuntimeError("shapes do not match"), False),
        (ValueError("CUDA out of memory"), False),
    ],
)
def test_what_counts_as_out_of_memory(error: Exception, expected: bool) -> None:
    assert is_out_of_memory(error) == expected


def test_a_real_limit_is_an_out_of_memory() -> None:
    with pytest.raises(RuntimeError) as raised:
        accident_models.exhaust_memory()
    assert is_out_of_memory(raised.value)


# --- Client processes (engine = "flower"), and in the end Ray itself ------------------------------


def gcs_of_this_process() -> int:
    """Return the process id of the head of the Ray that this process has started."""
    worker: Any = import_module("ray._private.worker")
    (gcs,) = worker._global_node.all_processes["gcs_server"]
    pid: int = gcs.process.pid
    return pid


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.machines
@pytest.mark.usefixtures("impatient")
def test_client_processes_die_hang_dawdle_and_run_out_of_memory_until_ray_goes(
    folder: Path,
) -> None:
    """Each costs its client the round and no more; without its head Ray is an error at once."""
    accidents: dict[int, Sequence[str]] = {
        2: ["client-1-killed", "client-2-slow"],
        3: ["client-0-hangs", "client-3-memory"],
        5: ["client-2-hangs"],
    }
    rows = []

    def after(row: dict[str, Any]) -> None:
        rows.append(row)
        plan(folder, *accidents.get(row["round"] + 1, ()))
        if row["round"] == 4:
            os.kill(gcs_of_this_process(), signal.SIGKILL)

    experiment = accidental(folder, engine="flower", num_server_rounds=5, round_timeout=25.0)
    with pytest.raises(FedkdError, match=HEADLESS):
        fedkd.run(experiment, [EachRound(after)])
    assert [row["events"] for row in rows] == [
        {},
        {"client-died": 1},
        {"client-late": 1},
        {},
    ]
    dropped = [row["dropped"] for row in rows]
    assert_no_memory(dropped[2].pop("3"))
    assert dropped == [{}, {"1": "client process died"}, {"0": "no reply in time"}, {}]
    lines = (folder / "runs" / "broken" / "rounds.jsonl").read_text().splitlines()
    assert [json.loads(line)["round"] for line in lines] == [1, 2, 3, 4]


# --- Workers on machines that go away -------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


QUICK = {
    "RAY_health_check_initial_delay_ms": "500",
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_timeout_ms": "5000",
    "RAY_health_check_failure_threshold": "3",
}
"""Has Ray's head notice within seconds that a machine is gone; by default it takes half a minute."""


class Machine:
    """One of several that this one plays: a node of a Ray cluster, with one CPU."""

    def __init__(self, name: str, folder: Path, *options: str) -> None:
        self._command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", *options]
        self._command += ["--disable-usage-stats", "--num-cpus=1"]
        self._command += [f"--object-store-memory={10**8}"]
        own = {NODE: name, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}  # for `Forgetful`
        self._environment = {**os.environ, **QUICK, **own}
        self._log = folder / f"{name}.log"
        self.process = self._begun()

    def _begun(self) -> subprocess.Popen[bytes]:
        with self._log.open("w") as log:
            return subprocess.Popen(self._command, stdout=log, stderr=log, env=self._environment)

    def wait(self) -> None:
        """Return when it is up; Ray itself gives up on a busy machine after half a minute."""
        end = time.monotonic() + 120
        while "Ray runtime started" not in self._log.read_text():
            assert time.monotonic() < end, self._log.read_text()
            if self.process.poll() is not None:
                self.process = self._begun()
            time.sleep(0.1)

    def child(self, name: str) -> int:
        """Return the id of one of its processes."""
        for entry in Path("/proc").iterdir():
            try:
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                program = (entry / "cmdline").read_text().split("\0")[0]
            except (OSError, ValueError, IndexError):
                continue
            if parent == self.process.pid and Path(program).name == name:
                return int(entry.name)
        raise AssertionError(f"no {name}")

    def end(self) -> None:
        """End all its processes."""
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(20)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.machines
@pytest.mark.usefixtures("impatient")
def test_machines_of_a_cluster_go_away_until_its_head_falls_silent(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With room elsewhere the run is the same; without, and without a head, there is one clear error."""
    folder = Path(mkdtemp(prefix="fedkd-ray-"))  # short: sockets lie below it
    monkeypatch.setenv(FOLDER, str(folder))
    monkeypatch.setattr(workers, "START_TIMEOUT", 60.0)
    monkeypatch.setattr(workers, "Worker", Forgetful)
    plain = fedkd.run(accidental(folder, name="plain"))
    with cluster(folder) as (address, head):
        experiment = accidental(folder, num_workers=2, ray_address=address)
        accidents = {
            1: ["client-1-memory"],
            2: ["machine-dies"],
            3: ["worker-memory"],
        }
        plan(folder, *accidents[1])
        run = fedkd.run(experiment.replace(name="room"), [before_round(folder, accidents)])
        assert_no_memory(run.rounds[0]["dropped"].pop("1"))
        assert happened(run) == [
            ({}, {}),
            ({"node-died": 1, "worker-died": 1}, {}),
            ({"worker-died": 1}, {}),
        ]
        assert None not in run.client_accuracy
        # A client whose first round was lost begins in the second.
        for k in (0, 2, 3):
            assert run.client_accuracy[k] == plain.client_accuracy[k]

        def lose_the_last_room(row: dict[str, Any]) -> None:
            monkeypatch.setattr(workers, "START_TIMEOUT", 8.0)
            plan(folder, "machine-dies")

        with pytest.raises(FedkdError, match=r"could not be restarted within 8 s.* on 1 machine"):
            fedkd.run(experiment.replace(name="no-room"), [EachRound(lose_the_last_room)])
        monkeypatch.setattr(workers, "START_TIMEOUT", 60.0)

        def fall_silent(row: dict[str, Any]) -> None:
            plan(folder, "client-0-killed")
            os.kill(head.child("gcs_server"), signal.SIGSTOP)

        with pytest.raises(FedkdError, match=HEADLESS):
            fedkd.run(experiment.replace(name="headless", num_workers=1), [EachRound(fall_silent)])


@contextmanager
def cluster(folder: Path) -> Iterator[tuple[str, Machine]]:
    """Start a cluster of a head and two machines; yield its address, and the head."""
    port = free_port()
    options = [f"--port={port}", f"--ray-client-server-port={free_port()}"]
    options += ["--include-dashboard=false", f"--temp-dir={folder / 'ray'}"]
    head = Machine("head", folder, "--head", *options)
    others: list[Machine] = []
    try:
        head.wait()
        for name in ("a", "b"):  # one by one: two that start at once get into each other's way
            others.append(Machine(name, folder, f"--address=127.0.0.1:{port}"))
            others[-1].wait()
        yield f"127.0.0.1:{port}", head
    finally:
        for machine in (*others, head):
            machine.end()
        rmtree(folder, ignore_errors=True)


# --- A Ray that does not start --------------------------------------------------------------------

ABSENT = """
import socket, sys, threading, time
from fedkd.engines import workers
from fedkd.errors import FedkdError
from fedkd.engines import ray_session
import fedkd
from federation_tools import tiny

workers.RAY_TIMEOUT = float(sys.argv[3])
ray_session.LEAVE_TIMEOUT = 3.0
listener = socket.socket()
listener.bind(("", 0))
listener.listen(50)
accepted = []
def accept():
    while True:
        accepted.append(listener.accept())
threading.Thread(target=accept, daemon=True).start()
host = __import__("ray").util.get_node_ip_address()
address = f"{host}:{listener.getsockname()[1]}" if sys.argv[2] == "silent" else None
keys = dict(engine="flower") if sys.argv[2] == "flower" else dict(num_workers=2, ray_address=address)
try:
    fedkd.run(tiny(**keys, run_dir=sys.argv[1], name="absent"))
except FedkdError as error:
    print("FedkdError:", error)
"""


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.machines
@pytest.mark.parametrize(
    ("case", "timeout", "said"),
    [
        ("silent", 4, r"ray-address = '.*': no cluster can be joined there \(no answer in 4 s\)"),
        ("flower", 60, r"Ray does not start \(NotADirectoryError: "),
    ],
)
def test_a_ray_that_does_not_start_is_one_clear_error(
    case: str, timeout: int, said: str, tmp_path: Path
) -> None:
    """In a process of its own: a start that never ends stays in a thread, and that must not keep it."""
    nowhere = {} if case == "silent" else {"RAY_TMPDIR": "/dev/null/ray"}
    done = subprocess.run(
        [sys.executable, "-c", ABSENT, str(tmp_path), case, str(timeout)],
        capture_output=True,
        text=True,
        timeout=150,
        env={**os.environ, **nowhere},
        cwd=TOOLS,
    )
    assert re.match(f"FedkdError: {said}", done.stdout), done.stdout + done.stderr
    assert len(done.stdout.splitlines()) == 1
    assert done.returncode == 0
