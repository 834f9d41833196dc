"""Makes several runs at once, each in its own process, when they fit into memory.

Processes receive jobs as lines of JSON and answer likewise, so that nothing is pickled and the caller's
script is not run again. A run is the same in any process: its numbers depend on the experiment and its
plan, not on other runs.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import IO, Any

import torch

from fedkd.engines.run import resume, run
from fedkd.errors import FedkdError, one_line
from fedkd.experiment import Experiment
from fedkd.records.callbacks import EachRound
from fedkd.studies.arguments import Progress
from fedkd.studies.central import central
from fedkd.studies.comparison import capacity

_SPARE = 0.8
"""Share of the free memory that may be taken."""

_PATIENCE_S = 10.0


@dataclass(frozen=True)
class Job:
    """A run to be made.

    Attributes:
        what: its name in progress and errors.
        experiment: the run.
        seeds: those of a central baseline; none of a federated run.
        begun: the folder of an interrupted federated run, which is resumed.
    """

    what: str
    experiment: Experiment
    seeds: tuple[int, ...] = ()
    begun: Path | None = None


def threads_each(at_once: int) -> int:
    """Return the threads of each of `at_once` processes: an equal share of this one's."""
    return max(1, torch.get_num_threads() // at_once)


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Set the number of PyTorch's threads for the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def check_jobs(experiment: Experiment, at_once: int) -> None:
    """Raise an error where runs at once would each start Ray, or could not import the user's code.

    Raises:
        FedkdError: see above, or the number is invalid.
    """
    if type(at_once) is not int or at_once < 1:
        raise FedkdError(f"jobs = {at_once!r}: must be a whole number ≥ 1")
    if at_once == 1:
        return
    uses_ray = experiment.engine == "flower" or experiment.num_workers > 0
    if uses_ray:
        key = "engine = 'flower'" if experiment.engine == "flower" else "num-workers"
        raise FedkdError(
            f"jobs = {at_once} contradicts {key}: it starts Ray, and only one Ray at a time can run on a "
            "machine; set jobs = 1"
        )
    for key, value in experiment.flat().items():
        if "__main__:" in str(value):
            raise FedkdError(
                f"jobs = {at_once} contradicts {key} = '{value}': other processes cannot import what "
                "is defined in the script or notebook; move it to its own file, or set jobs = 1"
            )


def make(jobs: Sequence[Job], at_once: int, progress: Progress) -> tuple[list[Path], str | None]:
    """Make runs, at most `at_once` at a time.

    Args:
        jobs: the runs.
        at_once: 1 makes them one by one in this process. Else the first is made alone, to measure its
            memory, and then as many at once as fit.
        progress: called with the share of all of them that is done.

    Returns:
        Their folders; and how many were made at once and why, or `None` unless `at_once` and the jobs
        are several.

    Raises:
        FedkdError: a run failed; the message names it. Runs under way are finished first, and no
            others are started. Finished ones stay.
    """
    if at_once == 1 or len(jobs) < 2:
        return [_in_this_process(jobs, number, progress) for number in range(len(jobs))], None
    makers = _Makers(jobs, at_once, progress)
    try:
        return makers.make(), makers.remark
    finally:
        makers.end()


def _in_this_process(jobs: Sequence[Job], number: int, progress: Progress) -> Path:
    job, count = jobs[number], len(jobs)
    text = f"{job.what} ({number + 1} of {count})"
    try:
        return _made(job, lambda share: progress(text, (number + share) / count))
    except FedkdError as error:
        raise FedkdError(f"{job.what}: {error}") from error


def _made(job: Job, report: Callable[[float], None]) -> Path:
    """Make one run and return its folder."""
    report(0.0)
    if job.seeds:
        begun: dict[str, None] = {}

        def part(what: str, share: float) -> None:  # teachers, then students
            begun[what] = None
            report((len(begun) - 1 + share) / 2)

        path = central(job.experiment, job.seeds, progress=part).path
        assert path is not None
        return path
    rounds = job.experiment.num_server_rounds
    following = [EachRound(lambda row: report(row["round"] / rounds))]
    done = resume(job.begun, following) if job.begun else run(job.experiment, following)
    return done.path


# --- The process that makes runs ------------------------------------------------------------------


def serve() -> None:
    """Make the runs that come in as lines on stdin, and answer on stdout, until stdin ends."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # other output must not mix with the answers

    def answer(**fields: Any) -> None:
        answers.write(json.dumps(fields) + "\n")
        answers.flush()

    for line in sys.stdin:
        task = json.loads(line)
        torch.set_num_threads(task["threads"])
        begun = task["begun"] and Path(task["begun"])
        job = Job("", Experiment.load(("jobs", task["experiment"])), tuple(task["seeds"]), begun)
        try:
            path = _made(job, lambda share: answer(share=share))
        except BrokenPipeError:  # the parent process has ended
            os._exit(1)
        except FedkdError as error:
            answer(failed=str(error))
        except Exception as error:
            traceback.print_exc()
            answer(failed=one_line(error))
        else:
            answer(path=str(path), peak=capacity.peak_bytes(), gpu_peak=capacity.gpu_peak_bytes(),
                gpu_free=capacity.gpu_free_bytes())  # fmt: skip


_SERVE = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from fedkd.studies.comparison.jobs import serve; serve()"
)

Answers = SimpleQueue[tuple["_Maker", dict[str, Any] | None]]
"""Answers by process; `None` when it has ended."""


@dataclass(eq=False)
class _Maker:
    """A process that makes runs, seen from the parent."""

    threads: int
    answers: Answers
    share: float = 0.0
    process: subprocess.Popen[str] = field(init=False)

    def __post_init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", _SERVE, json.dumps([path for path in sys.path if path])],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            env={**os.environ, "OMP_NUM_THREADS": str(self.threads)},
            start_new_session=True,  # Ctrl-C is ours to handle: we end them
        )
        Thread(target=self._listen, args=(self.process.stdout,), daemon=True).start()

    def _listen(self, lines: IO[str]) -> None:
        with lines:
            for line in lines:
                if not line.endswith("\n"):  # it died while writing
                    break
                self.answers.put((self, json.loads(line)))
        self.answers.put((self, None))

    def send(self, job: Job) -> None:
        """Send it a run to make."""
        self.share = 0.0
        task = {
            "experiment": job.experiment.flat(),
            "seeds": job.seeds,
            "begun": job.begun and str(job.begun),
            "threads": self.threads,
        }
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):  # it has died; its last answer is `None`
            self.process.stdin.write(json.dumps(task) + "\n")
            self.process.stdin.flush()

    def death(self) -> str:
        """Return how the process ended, in words."""
        try:
            code = self.process.wait(_PATIENCE_S)
        except subprocess.TimeoutExpired:  # it closed its output but did not exit
            self.process.kill()
            code = self.process.wait()
        why = ", probably out of memory" if code == -9 else ""
        return f"its process ended with exit code {code}{why}"

    def end(self) -> None:
        """End the process, even while it works."""
        self.process.terminate()
        with suppress(OSError):
            assert self.process.stdin is not None
            self.process.stdin.close()
        try:
            self.process.wait(_PATIENCE_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


class _Makers:
    """The processes that make a number of runs, and which run each is making."""

    def __init__(self, jobs: Sequence[Job], at_once: int, progress: Progress) -> None:
        self._jobs = jobs
        self._at_once = min(at_once, len(jobs))
        self._threads = threads_each(at_once)
        self._progress = progress
        self._waiting = deque(range(len(jobs)))
        self._idle: list[_Maker] = []
        self._busy: dict[_Maker, int] = {}
        self._paths: dict[int, Path] = {}
        self._answers: Answers = SimpleQueue()
        self._free = capacity.free_bytes()
        self._room = 1  # the first run is made alone
        self._peak = 0
        self._failure: FedkdError | None = None
        self.remark: str | None = None

    def make(self) -> list[Path]:
        """Make all runs and return their folders in the order of the jobs."""
        self._start()
        while self._busy:
            maker, answer = self._answers.get()
            if maker in self._busy:
                self._take(maker, answer)
        if self._failure is not None:
            raise self._failure
        return [self._paths[number] for number in range(len(self._jobs))]

    def end(self) -> None:
        """End all processes."""
        for maker in (*self._busy, *self._idle):
            maker.end()

    def _start(self) -> None:
        """Start as many runs as there is room for."""
        while self._waiting and self._failure is None and len(self._busy) < self._room:
            maker = self._idle.pop() if self._idle else _Maker(self._threads, self._answers)
            number = self._waiting.popleft()
            self._busy[maker] = number
            maker.send(self._jobs[number])
        self._show_progress()

    def _take(self, maker: _Maker, answer: dict[str, Any] | None) -> None:
        """Handle a process' answer about its run."""
        if answer is not None and "share" in answer:
            maker.share = answer["share"]
            self._show_progress()
            return
        number = self._busy.pop(maker)
        if answer is None:
            self._fail(number, maker.death())
            maker.end()
        else:
            self._idle.append(maker)
            if "failed" in answer:
                self._fail(number, answer["failed"])
            else:
                self._paths[number] = Path(answer["path"])
                self._measure(answer)
        self._start()

    def _fail(self, number: int, why: str) -> None:
        if self._failure is None:
            self._failure = FedkdError(f"{self._jobs[number].what}: {why}")

    def _measure(self, answer: dict[str, Any]) -> None:
        """Set how many runs fit, assuming that all are as large as the largest so far."""
        self._peak = max(self._peak, answer["peak"])
        room, why = fitting(self._at_once, self._peak, self._free, "memory")
        if answer["gpu_peak"]:
            on_gpu, why_gpu = fitting(
                self._at_once, answer["gpu_peak"], answer["gpu_free"], "GPU memory"
            )
            room, why = (on_gpu, why_gpu) if on_gpu < room else (room, f"{why}; {why_gpu}")
        self._room = room
        each = f"{self._threads} thread{'s' * (self._threads > 1)}"
        self.remark = f"{room} runs at once" if room > 1 else "one run at a time"
        self.remark += f", each with {each}: {why}"

    def _show_progress(self) -> None:
        count = len(self._jobs)
        names = [self._jobs[number].what for number in self._busy.values()]
        share = (len(self._paths) + sum(maker.share for maker in self._busy)) / count
        done = f"{len(self._paths)} of {count} done"
        self._progress(f"{'; '.join(names)} ({done})" if names else done, share)


def fitting(most: int, each: int, free: int | None, what: str) -> tuple[int, str]:
    """Return how many runs fit at once, at least one and at most `most`, and why.

    Args:
        most: the largest number.
        each: bytes that a run takes.
        free: free bytes, `None` if unknown.
        what: the kind of memory.
    """
    if free is None:
        return most, f"a run takes {each / 1e9:.1f} GB of {what}; how much is free is unknown"
    fits = max(1, min(most, int(_SPARE * free / max(1, each))))
    return fits, f"a run takes {each / 1e9:.1f} GB of {what}, {free / 1e9:.1f} GB are free"
