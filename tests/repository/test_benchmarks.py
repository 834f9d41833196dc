"""The benchmark compares like with like: peers and engines do the same work, and it is counted right."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Context, Message, RecordDict
from paths import ROOT
from safetensors.torch import save_file
from sampling import one_in
from torch.utils.flop_counter import FlopCounterMode

from fedkd.federation.flower_internals.local_grid import LocalGrid, task_identity

BENCHMARKS = ROOT / "benchmarks"
STUDENTS = ["mlp-20", "cnn", "cnn-5x5"]
CLIENTS = 3


@pytest.fixture(autouse=True)
def scripts(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let the benchmark's modules be found, as its processes find them."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.syspath_prepend(str(BENCHMARKS / "peers"))
    yield
    for name in set(sys.modules) - before:
        path = getattr(sys.modules[name], "__file__", None)
        if path is not None and Path(path).is_relative_to(BENCHMARKS):
            del sys.modules[name]


def run_flower_app(job: Any) -> None:
    """Run the peer's strategy and client app in this process."""
    peer = import_module("flower_app")
    contexts = [
        Context(
            run_id=1,
            node_id=client,
            node_config={"partition-id": client, "num-partitions": CLIENTS},
            state=RecordDict(),
            run_config={},
        )
        for client in range(CLIENTS)
    ]

    def handle(messages: Any) -> list[Message]:
        return [peer.app(message, contexts[client]) for client, message in messages]

    with task_identity():
        peer.serve(LocalGrid(handle, num_clients=CLIENTS), job)


@pytest.mark.parametrize("student", one_in(3, STUDENTS))
def test_all_systems_do_the_same_work(student: str, tmp_path: Path) -> None:
    """An epoch of one batch does not depend on its shuffle, so that every number must agree."""
    work, ours, plain = map(import_module, ("work", "ours", "plain_loop"))
    cell = work.Work(student, CLIENTS, CLIENTS * 59, 61, 97, "mnist-5k")

    def job(name: str) -> Any:
        (tmp_path / name).mkdir()
        made = work.Job(cell, rounds=3, seed=5, num_cpus=1, folder=str(tmp_path / name))
        save_file(ours.images_of(made), made.images)
        return made

    jobs = {name: job(name) for name in ("cohort", "plain", "channels-last", "app")}
    ours.run(jobs["cohort"], "cohort")
    plain.run(jobs["plain"])
    plain.run(jobs["channels-last"], torch.channels_last)
    run_flower_app(jobs["app"])

    (records,) = Path(jobs["cohort"].folder, "runs").glob("*/rounds.jsonl")
    assert "accuracy_after_digest" not in records.read_text(encoding="utf-8")  # one test a round
    wanted = jobs["cohort"].events("round")
    assert len(wanted) == 3
    assert wanted[0]["loss_digest"] - wanted[2]["loss_digest"] > 0.001  # it has learnt something
    for name in ("plain", "channels-last", "app"):
        found = jobs[name].events("round")
        for key, tolerance in (("loss_digest", 1e-5), ("loss_revisit", 1e-5), ("accuracy", 0.004)):
            assert [row[key] for row in found] == pytest.approx(
                [row[key] for row in wanted], abs=tolerance
            ), (name, key)


@pytest.mark.parametrize("student", STUDENTS)
def test_the_useful_arithmetic_is_what_torch_counts(student: str) -> None:
    work, task = import_module("work"), import_module("task")
    cell = work.Work(student, 5, 5 * 7, public_size=3, test_size=11)
    model = task.network(student)

    def predict(images: int) -> None:
        with torch.no_grad():
            model(torch.zeros(images, 1, 28, 28))

    with FlopCounterMode(display=False) as counter:
        for _ in range(5):
            for images in (3, 7):  # digest and revisit
                model(torch.zeros(images, 1, 28, 28)).sum().backward()
            predict(3)
            predict(11)
    assert cell.flops == counter.get_total_flops()


def test_k_clients_share_mnist() -> None:
    work = import_module("work").Work
    assert [work.of("mlp-20", k).private_size for k in (10, 58, 59, 1000)] == [
        10_000,
        58_000,
        58_000,
        58_000,
    ]
    assert work.of("mlp-20", 10).steps == 16 + 32
    assert work.of("mlp-20", 1000).steps == 1 + 32


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="needs Linux's /proc")
def test_memory_counts_daemons_and_leaves_none_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    processes = import_module("processes")
    monkeypatch.setattr(processes, "PATIENCE_S", 0.0)
    pid = tmp_path / "pid"
    daemon = (
        "import os, sys, time; kept = b'x' * 137_000_000; "
        "open(sys.argv[1], 'w').write(str(os.getpid())); time.sleep(60)"
    )
    parent = (
        "import subprocess, sys, time; "
        "subprocess.Popen([sys.executable, '-c', *sys.argv[1:]], start_new_session=True); "
        "time.sleep(2)"
    )
    command = [sys.executable, "-c", parent, daemon, str(pid)]
    outcome = processes.run(command, {}, tmp_path / "log", 30.0)
    assert outcome.returncode == 0
    assert 137_000_000 < outcome.peak_bytes < 250_000_000
    # A process that has been ended is nobody's memory, even before it is reaped.
    assert processes.pss_bytes(int(pid.read_text(encoding="utf-8"))) is None


def test_a_system_that_takes_too_long_is_ended(tmp_path: Path) -> None:
    processes = import_module("processes")
    command = [sys.executable, "-c", "import time; time.sleep(60)"]
    outcome = processes.run(command, {}, tmp_path / "log", 0.5)
    assert outcome.timed_out
    assert outcome.returncode != 0


@pytest.mark.slow
def test_a_failing_system_is_reported_and_the_others_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    engines = import_module("engines")
    broken = engines.System("broken", "os:no_such_function", {"mlp-20": 1}, 1)
    systems = {"broken": broken, "plain-loop": engines.SYSTEMS["plain-loop"]}
    monkeypatch.setattr(engines, "SYSTEMS", systems)
    monkeypatch.setattr(engines.Benchmark, "_command_line", lambda *_: None)
    output = tmp_path / "there" / "engines.md"
    smoke = ["--smoke", "--students", "mlp-20", "--systems", "broken,plain-loop"]
    monkeypatch.setattr(sys, "argv", ["engines.py", *smoke, "--output", str(output)])
    engines.main()
    table = output.read_text(encoding="utf-8")
    assert table in capsys.readouterr().out
    assert "| mlp-20 | 3 | broken | failed |" in table
    assert "cannot import name 'no_such_function'" in table
    (good,) = [
        sample
        for sample in json.loads(output.with_suffix(".json").read_text(encoding="utf-8"))["samples"]
        if sample["failure"] is None
    ]
    assert good["system"] == "plain loop"
    assert len(good["round_seconds"]) == 1
    assert 0.1 < good["accuracies"][-1] <= 1


def test_the_table_compares_medians_with_the_first_system() -> None:
    report, work = import_module("report"), import_module("work").Work
    cell = work.of("mlp-20", 50)
    results = report.Results({"CPU": "abacus"}, ["a", "b", "c"], [cell])
    results.matmul_flops = [4 * cell.flops]
    results.left_out["c", "mlp-20", 50] = "too slow"
    results.samples = [
        report.Sample(
            "a", cell, 1, None, [2.0, 1.0, 9.0], 3.0, 99.0, 2_500_000_000, [0.1, 0.7, 0.8]
        ),
        report.Sample("b", cell, 1, None, [5.0], 4.0, 99.0, None, [0.2, 0.6]),
    ]
    table = report.markdown(results)
    assert (
        "| mlp-20 | 50 | a | 2 (1–9) | 3 | 40.00 | 0.833 | 1.00 | 2.50 | 3.0 | 12.5 % "
        "| 70.0 % (round 2) |" in table
    )
    assert (
        "| mlp-20 | 50 | b | 5 (5–5) | 1 | 100.00 | 2.083 | 2.50 | – | 4.0 | 5.0 % "
        "| 60.0 % (round 2) |" in table
    )
    assert "| mlp-20 | 50 | c | not run: too slow |" in table
    assert "in points: mlp-20 with 50 clients 10.0." in table
