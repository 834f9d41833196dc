"""Runs made at once are the runs that each would be alone, and nothing is left behind."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from federation_tools import digits_comparison

import fedkd
from fedkd.studies.comparison import capacity, jobs
from fedkd.studies.comparison.jobs import Job, fitting, make

EXPERIMENT = digits_comparison(plan="stacked")
METHODS = ["student-distilled", "LocalOnly", "DSFL"]

_TIMES = ("seconds", "environment")


def makers(parent: int) -> list[int]:
    """Return the processes that a process has started to make runs, and that are still there."""
    told = Path(f"/proc/{parent}/task/{parent}/children").read_text()
    return [number for number in map(int, told.split()) if is_there(number)]


def is_there(number: int) -> bool:
    """Whether a process makes runs, as far as one that has ended shows its command no more."""
    try:
        return "fedkd.studies.comparison.jobs" in Path(f"/proc/{number}/cmdline").read_text()
    except OSError:
        return False


def numbers(comparison: fedkd.Comparison) -> Any:
    """Return all records of the runs but their times."""
    runs = [run for each in comparison.runs.values() for run in each]
    rows = [
        {name: value for name, value in row.items() if name not in _TIMES}
        for run in runs
        for row in (*run.rounds, run.result)
    ]
    assert comparison.central is not None
    return rows, comparison.central.training, comparison.central.student_accuracies


@pytest.mark.slow
def test_several_at_once_give_the_numbers_of_one_after_another(tmp_path: Path) -> None:
    told: list[tuple[str, float]] = []
    at_once = fedkd.compare(
        EXPERIMENT.replace(run_dir=str(tmp_path / "two")),
        METHODS,
        [0],
        jobs=2,
        progress=lambda text, share: told.append((text, share)),
    )
    assert not makers(os.getpid())
    alone = fedkd.compare(EXPERIMENT.replace(run_dir=str(tmp_path / "one")), METHODS, [0])
    assert numbers(at_once) == numbers(alone)
    assert re.fullmatch(
        r"2 runs at once, each with 1 thread: a run takes \d\.\d GB of memory, [\d.]+ GB are free",
        at_once.remark or "",
    )
    assert alone.remark is None
    shares = [share for _, share in told]
    assert shares == sorted(shares)
    assert told[0] == ("central baseline (0 of 3 done)", 0.0)  # alone, to be measured
    assert told[-1] == ("3 of 3 done", 1.0)
    together = {text for text, _ in told if ";" in text}
    assert together
    assert all(text.count("; ") == 1 for text in together)


FAILS = """
import fedkd
from fedkd.strategy import Facts

class Fails(fedkd.DistillationStrategy):
    facts = Facts(paper="none", up="4 P C", down="4 P C")

    def aggregate(self, labels):
        raise RuntimeError("no idea")
"""


@pytest.mark.slow
def test_a_failing_run_is_named_and_finished_ones_stay(tmp_path: Path) -> None:
    (tmp_path / "fails_at_once.py").write_text(FAILS)
    experiment = EXPERIMENT.replace(run_dir=str(tmp_path / "runs"))
    methods = ["LocalOnly", f"{tmp_path}/fails_at_once.py:Fails", "FedAvg"]
    with pytest.raises(
        fedkd.FedkdError, match=r"^Fails, seed 3: update of Fails.*no idea.*fails_at_once.py"
    ):
        fedkd.compare(experiment, methods, [3], jobs=2)
    assert not makers(os.getpid())
    finished = {path.parent.name for path in (tmp_path / "runs").glob("*/result.json")}
    assert finished == {"localonly-digits-seed3", "fedavg-digits-seed3"}
    with pytest.raises(fedkd.FedkdError, match=r"^Fails, seed 3: update of Fails"):
        fedkd.compare(experiment, methods, [3])
    assert fedkd.compare(experiment, ["LocalOnly", "FedAvg"], [3]).reused == 2


CALL = """
import signal, sys, fedkd
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores Ctrl-C
experiment = fedkd.Experiment.load(fedkd.experiment.read_toml(sys.argv[1]))
fedkd.compare(experiment, ["local", "fedavg", "fedprox"], jobs=3)
"""


@pytest.mark.slow
def test_an_interrupt_ends_all_processes(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    experiment = EXPERIMENT.replace(run_dir=str(runs))
    lines = [f"{key} = {json.dumps(value)}" for key, value in experiment.flat().items()]
    (tmp_path / "e.toml").write_text("\n".join(lines))
    call = [sys.executable, "-c", CALL, str(tmp_path / "e.toml")]
    process = subprocess.Popen(call, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 100
    while len(found := makers(process.pid)) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate()
    assert f"InterruptedRun: interrupted; to continue: fedkd compare --resume {runs}/" in said
    assert process.returncode not in (None, 0)
    assert len(found) == 2
    assert not any(map(is_there, found))
    assert len(list(runs.glob("*/result.json"))) == 1


def test_a_process_that_dies_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "_SERVE", "import os; os.kill(os.getpid(), 9)")
    job = Job("DSFL, seed 0", EXPERIMENT.replace(run_dir=str(tmp_path)))
    with pytest.raises(
        fedkd.FedkdError,
        match=r"DSFL, seed 0: its process ended with exit code -9, probably out of",
    ):
        make([job, job], 2, lambda _, __: None)


# --- Memory ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wanted", "each", "free", "fits"),
    [(4, 2e9, 10e9, 4), (5, 2e9, 10e9, 4), (5, 3e9, 10e9, 2), (5, 30e9, 10e9, 1), (3, 0, 0, 1)],
)
def test_four_fifths_of_the_free_memory_are_dealt_out(
    wanted: int, each: float, free: float, fits: int
) -> None:
    assert fitting(wanted, int(each), int(free), "memory")[0] == fits


def test_where_free_memory_is_not_known_as_many_run_as_asked() -> None:
    assert fitting(7, 5, None, "memory")[0] == 7


@pytest.mark.slow
def test_memory_is_measured() -> None:
    """A process that fills 300 MB has held 300 MB more, and its parent's peak is not its own."""
    code = (
        "from fedkd.studies.comparison.capacity import peak_bytes; a = peak_bytes();"
        "b = b'x' * 300_000_000;"
        "print(a, peak_bytes())"
    )
    filled = b"x" * 900_000_000
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    before, after = map(int, done.stdout.split())
    assert after - before == pytest.approx(300e6, rel=0.1)
    assert before < len(filled) < capacity.peak_bytes()
    free = capacity.free_bytes()
    assert free is not None
    assert 0 < free < 1e14


def test_a_control_group_limits_what_is_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    group = tmp_path / "outer" / "inner"
    group.mkdir(parents=True)
    for folder, most, now in ((group, "max", 7), (group.parent, "1000", 400), (tmp_path, "900", 5)):
        (folder / "memory.max").write_text(f"{most}\n")
        (folder / "memory.current").write_text(f"{now}\n")
    (group.parent / "memory.stat").write_text("anon 5\ninactive_file 30\nactive_file 2\n")
    assert sorted(capacity.left_in(group, "memory.max", "memory.current")) == [630, 895]
