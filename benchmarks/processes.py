"""Run a process tree to its end, and measure its seconds and its peak memory.

Processes are recognised by a variable in their environment, which children inherit: Ray's daemons leave
the tree, but keep it. Memory is the sum of their proportional set sizes (PSS), in which a page that n
processes share counts 1/n for each. Only Linux reports it; elsewhere the peak is unknown.
"""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Thread
from time import monotonic, sleep
from uuid import uuid4

MARKER = "FEDKD_BENCHMARK"
SAMPLE_S = 0.2
REST = 15
"""A sample is followed by a rest of so many times its own length: reading slows what is measured."""

PATIENCE_S = 10.0
"""How long daemons may take to end after the process that started them."""


@dataclass(frozen=True)
class Outcome:
    """How a process ended.

    Attributes:
        returncode: its exit status; negative if a signal ended it.
        started: when, on the monotonic clock.
        seconds: until its end.
        peak_bytes: of all processes together, or `None` where it cannot be known.
        timed_out: whether it was ended because it took too long.
    """

    returncode: int
    started: float
    seconds: float
    peak_bytes: int | None
    timed_out: bool


def run(
    command: Sequence[str], environment: Mapping[str, str], log: Path, timeout: float
) -> Outcome:
    """Return how a command ended, with its output in `log`; end the processes that it leaves behind."""
    mark = uuid4().hex
    memory = _Memory(mark)
    timed_out = False
    with log.open("wb") as output:
        started = monotonic()
        process = subprocess.Popen(
            command,
            env={**environment, MARKER: mark},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        memory.start()
        try:
            process.wait(timeout)
        except subprocess.TimeoutExpired:
            timed_out = True
        finally:
            seconds = monotonic() - started
            memory.end()
            if process.poll() is None:
                process.kill()
            process.wait()
            _end_the_rest(mark, 0.0 if timed_out else PATIENCE_S)
    return Outcome(process.returncode, started, seconds, memory.peak, timed_out)


class _Memory(Thread):
    """Samples the memory of the marked processes."""

    def __init__(self, mark: str) -> None:
        super().__init__(daemon=True)
        self._mark = mark
        self._ended = Event()
        self.peak: int | None = None

    def run(self) -> None:
        pause = SAMPLE_S
        while not self._ended.wait(pause):
            started = monotonic()
            sizes = [size for pid in marked(self._mark) if (size := pss_bytes(pid)) is not None]
            if sizes:
                self.peak = max(self.peak or 0, sum(sizes))
            pause = max(SAMPLE_S, REST * (monotonic() - started))

    def end(self) -> None:
        self._ended.set()
        self.join()


def marked(mark: str) -> list[int]:
    """Return the ids of the living processes whose environment carries a mark."""
    variable = f"{MARKER}={mark}".encode()
    pids = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if variable in (folder / "environ").read_bytes().split(b"\0"):
                pids.append(int(folder.name))
    return pids


def pss_bytes(pid: int) -> int | None:
    """Return the proportional set size of a process, or `None` if it has ended or reports none."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("Pss:")), None)


def _end_the_rest(mark: str, patience: float) -> None:
    """Wait up to `patience` seconds for the processes that one has left behind, then end them."""
    deadline = monotonic() + patience
    while marked(mark) and monotonic() < deadline:
        sleep(0.1)
    while left := marked(mark):
        for pid in left:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        sleep(0.1)
