"""Measure fedkd's engines, a Flower app and a plain PyTorch loop on the same work, in turns, in one run.

Every system runs each cell (student, number of clients) in a process of its own, one system after the
other, and all of them again for each repeat. The first round is left out. Slow systems run fewer rounds,
and none at all where two rounds would take too long. About a quarter of an hour on two cores; needs MNIST
(FEDKD_DATA_DIR) and nothing else running on the machine.

    python benchmarks/engines.py
    python benchmarks/engines.py --smoke
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from itertools import pairwise
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory, mkdtemp
from time import monotonic, sleep

import processes
from processes import Outcome
from report import Results, Sample, markdown
from work import MACS, Job, Work

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class System:
    """Something that can do the work.

    Attributes:
        title: its name in the table.
        entry: ``module:function`` that runs the job.
        expected_ms: what a client-round takes on two cores of an AMD EPYC, by student. Only the number
            of rounds depends on it.
        expected_start: seconds of start and end.
        on_ray: whether Flower's simulation runs it.
        environment: variables that it is run with.
    """

    title: str
    entry: str
    expected_ms: Mapping[str, float]
    expected_start: float
    on_ray: bool = False
    environment: Mapping[str, str] = field(default_factory=dict)


SYSTEMS = {
    "cohort": System("fedkd, cohort", "ours:cohort", {"mlp-20": 7, "cnn": 500, "cnn-5x5": 550}, 5),
    "flower": System(
        "fedkd, flower", "ours:flower", {"mlp-20": 40, "cnn": 1000, "cnn-5x5": 860}, 15, on_ray=True
    ),
    "flower-app": System(
        "Flower app",
        "flower_app:main",
        {"mlp-20": 65, "cnn": 1000, "cnn-5x5": 860},
        15,
        on_ray=True,
    ),
    "plain-loop": System(
        "plain loop", "plain_loop:main", {"mlp-20": 22, "cnn": 1200, "cnn-5x5": 990}, 3
    ),
    "plain-loop-tuned": System(
        "plain loop, tuned",
        "plain_loop:tuned",
        {"mlp-20": 22, "cnn": 700, "cnn-5x5": 510},
        3,
        environment={
            "MALLOC_TRIM_THRESHOLD_": "1073741824",
            "MALLOC_TOP_PAD_": "134217728",
            "MALLOC_MMAP_THRESHOLD_": "33554432",
        },
    ),
}

ROUNDS_S = 40.0
"""Expected seconds of a process's rounds beyond which it runs fewer of them."""

REPEATED_CLIENTS = 50
"""Cells with more clients than this run once: their rounds are long, and differ less."""

TIMEOUT_S = 600.0


def main() -> None:
    """Measure, print and write."""
    options = parse(sys.argv[1:])
    started = monotonic()
    benchmark = Benchmark(options)
    print(f"about {benchmark.expected_seconds() / 60:.0f} minutes", flush=True)
    with TemporaryDirectory(prefix="fedkd-benchmark-") as folder:
        benchmark.run(Path(folder))
    print(f"\n{markdown(benchmark.results)}\n{monotonic() - started:.0f} s in all")
    if all(sample.failure is not None for sample in benchmark.results.samples):
        raise SystemExit("every system failed")


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--clients", type=_numbers, default=[10, 50, 200, 1000], metavar="K,K,...")
    parser.add_argument(
        "--students", type=_names(MACS), default=["mlp-20", "cnn"], metavar="NAME,..."
    )
    parser.add_argument(
        "--systems", type=_names(SYSTEMS), default=list(SYSTEMS), metavar="NAME,..."
    )
    parser.add_argument("--rounds", type=int, default=5, help="measured rounds a process, at most")
    parser.add_argument("--repeats", type=int, default=2, help="processes a system and cell")
    parser.add_argument(
        "--ray-clients", type=int, default=200, help="largest K for the systems that run on Ray"
    )
    parser.add_argument(
        "--longest", type=float, default=45, help="seconds that two rounds may be expected to take"
    )
    parser.add_argument("--output", type=Path, help="Markdown file, with JSON beside it")
    parser.add_argument("--smoke", action="store_true", help="three clients, 300 images, one round")
    options = parser.parse_args(arguments)
    if options.rounds < 1 or options.repeats < 1:
        parser.error("--rounds and --repeats must be at least 1")
    if options.smoke:
        options.rounds = options.repeats = 1
    elif options.output is None:
        options.output = HERE / "results" / "engines.md"
    return options


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def _names(known: Iterable[str]) -> Callable[[str], list[str]]:
    """Return a reader of comma lists of known names."""

    def names(text: str) -> list[str]:
        chosen = text.split(",")
        for name in chosen:
            if name not in known:
                raise argparse.ArgumentTypeError(f"{name}: choose from {', '.join(known)}")
        return chosen

    return names


class Benchmark:
    """The whole measurement.

    Attributes:
        results: what has been measured so far.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self._rounds: int = options.rounds
        self._repeats: int = options.repeats
        self._output: Path | None = options.output
        self._smoke: bool = options.smoke
        self._systems = [SYSTEMS[name] for name in options.systems]
        cells = (
            [Work.tiny(student) for student in options.students]
            if options.smoke
            else [Work.of(s, clients) for s in options.students for clients in options.clients]
        )
        self.results = Results(machine(), [system.title for system in self._systems], cells)
        for work in cells:
            for system in self._systems:
                why = self._why_not(system, work, options.ray_clients, options.longest)
                if why is not None:
                    self.results.left_out[system.title, work.student, work.num_clients] = why

    def _why_not(self, system: System, work: Work, ray_clients: int, longest: float) -> str | None:
        """Return why a system does not run a cell, or `None` if it does."""
        if system.on_ray and work.num_clients > ray_clients:
            return (
                f"Flower's driver looks at all messages of all nodes ten times a second, which is "
                f"quadratic; --ray-clients {ray_clients}"
            )
        expected = self._expected_round(system, work)
        if not self._smoke and 2 * expected > longest:
            return f"about {expected:.0f} s a round; --longest {longest:.0f}"
        return None

    def _expected_round(self, system: System, work: Work) -> float:
        return work.num_clients * system.expected_ms[work.student] / 1000

    def _rounds_of(self, system: System, work: Work) -> int:
        """Return how many rounds to measure, so that they take not much longer than `ROUNDS_S`."""
        affordable = int(ROUNDS_S / self._expected_round(system, work)) - 1
        return max(1, min(self._rounds, affordable))

    def _runs_of(self, work: Work) -> list[System]:
        """Return the systems that run a cell."""
        left_out = self.results.left_out
        return [
            system
            for system in self._systems
            if (system.title, work.student, work.num_clients) not in left_out
        ]

    def _repeats_of(self, work: Work) -> int:
        return self._repeats if work.num_clients <= REPEATED_CLIENTS else 1

    def expected_seconds(self) -> float:
        """Return about how long all of it takes."""
        return sum(
            self._repeats_of(work)
            * (
                system.expected_start
                + (1 + self._rounds_of(system, work)) * self._expected_round(system, work)
            )
            for work in self.results.cells
            for system in self._runs_of(work)
        )

    def run(self, folder: Path) -> None:
        """Measure everything, with scratch files in `folder`, and write each result when it is there."""
        for work in self.results.cells:
            systems = self._runs_of(work)
            for repeat in range(1, self._repeats_of(work) + 1) if systems else []:
                images = self._prepare(work, repeat, folder)
                for system in systems:
                    self._measure(system, work, repeat, images, folder)
                images.unlink()
        self._command_line(folder)
        self._write()

    def _prepare(self, work: Work, repeat: int, folder: Path) -> Path:
        """Write the images, measure the machine's rate, and return the images' file."""
        job = self._job(work, repeat, 1, folder)
        outcome = start("ours:prepare", job, {})
        if outcome.returncode != 0:
            raise SystemExit(f"the images cannot be made: {last_words(job)}")
        (measured,) = job.events("machine")
        self.results.matmul_flops.append(measured["matmul_flops"])
        versions = measured["environment"]
        self.results.machine["torch threads"] = str(versions.pop("threads"))
        self.results.machine["versions"] = ", ".join(f"{n} {v}" for n, v in versions.items())
        rate = measured["matmul_flops"] / 1e9
        print(
            f"\n{work.student}, {work.num_clients:,} clients, repeat {repeat}: images are ready, "
        )
        print(f"  2048×2048 product at {rate:.0f} GFLOP/s", flush=True)
        return Path(job.images)

    def _job(self, work: Work, repeat: int, rounds: int, folder: Path) -> Job:
        """Return a job with a folder of its own."""
        job_folder = Path(mkdtemp(dir=folder))
        return Job(work, rounds, repeat - 1, available_cpus(), str(job_folder))

    def _measure(self, system: System, work: Work, repeat: int, images: Path, folder: Path) -> None:
        """Run one system once, record and print the result."""
        job = self._job(work, repeat, 1 + self._rounds_of(system, work), folder)
        Path(job.images).symlink_to(images)
        outcome = start(system.entry, job, system.environment)
        sample = sample_of(system, job, repeat, outcome)
        self.results.samples.append(sample)
        print(f"  {in_words(sample)}", flush=True)
        self._write()

    def _write(self) -> None:
        if self._output is not None:
            self.results.write(self._output)

    def _command_line(self, folder: Path) -> None:
        """Measure ``fedkd --help``, and ``fedkd run`` up to its first training step."""
        helped = [seconds_of_help() for _ in range(1 + self._rounds)]
        if None in helped:
            print("  fedkd --help failed", flush=True)
        else:  # the first one fills the disk's cache
            self.results.help_seconds = [seconds for seconds in helped[1:] if seconds is not None]
        work = Work.tiny("mlp-20") if self._smoke else Work.of("mlp-20", 10)
        for repeat in range(1, self._repeats + 1):
            job = self._job(work, repeat, 1 + self._rounds, folder)
            outcome = start("ours:write_experiment", job, {})
            seconds = seconds_to_first_step(job) if outcome.returncode == 0 else None
            if seconds is None:
                print(f"  fedkd run failed: {last_words(job)}", flush=True)
            else:
                self.results.start_seconds.append(seconds)


# --- A process -----------------------------------------------------------------------------------


def start(entry: str, job: Job, environment: Mapping[str, str]) -> Outcome:
    """Run ``module:function`` in a fresh process to its end, its output in the job's folder."""
    module, function = entry.split(":")
    code = f"from {module} import {function}; {function}()"
    command = [sys.executable, "-c", code, str(job.write())]
    return processes.run(command, {**surroundings(), **environment}, log_of(job), TIMEOUT_S)


def surroundings() -> dict[str, str]:
    """Return this environment with a path to our modules, and without settings of glibc's allocator.

    Ray's workers inherit it: a ``ClientApp`` has to be importable there as well.
    """
    inherited = {
        name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")
    }
    quiet = {
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    }
    return {**inherited, **quiet, "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE / "peers")])}


def log_of(job: Job) -> Path:
    """Return the file with what the job's process printed."""
    return Path(job.folder, "log.txt")


def last_words(job: Job) -> str:
    """Return the last line that the job's process printed."""
    lines = log_of(job).read_text(encoding="utf-8", errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "it printed nothing")


def sample_of(system: System, job: Job, repeat: int, outcome: Outcome) -> Sample:
    """Return the figures of a process, from its marks."""
    marks = job.events("round")
    if outcome.timed_out:
        failure = f"ended after {TIMEOUT_S:.0f} s"
    elif outcome.returncode != 0 or len(marks) < job.rounds:
        failure = f"exit status {outcome.returncode}: {last_words(job)}"
    else:
        times = [mark["time"] for mark in marks]
        rounds = [after - before for before, after in pairwise(times)]
        return Sample(
            system.title,
            job.work,
            repeat,
            round_seconds=rounds,
            start_seconds=times[0] - outcome.started - median(rounds),
            process_seconds=outcome.seconds,
            peak_bytes=outcome.peak_bytes,
            accuracies=[mark["accuracy"] for mark in marks],
            digest_seconds=[m["seconds"]["digest"] for m in marks[1:] if "seconds" in m],
        )
    return Sample(system.title, job.work, repeat, failure, process_seconds=outcome.seconds)


def in_words(sample: Sample) -> str:
    """Return a sample as a line of progress."""
    if sample.failure is not None:
        return f"{sample.system}: FAILED, {sample.failure}"
    peak = "?" if sample.peak_bytes is None else f"{sample.peak_bytes / 1e9:.2f}"
    return (
        f"{sample.system}: {median(sample.round_seconds):.3g} s a round "
        f"({len(sample.round_seconds)} measured), {peak} GB, start {sample.start_seconds:.1f} s, "
        f"accuracy {100 * sample.accuracies[-1]:.1f} %; {sample.process_seconds:.0f} s in all"
    )


# --- The command line of fedkd -------------------------------------------------------------------


def seconds_of_help() -> float | None:
    """Return how long ``fedkd --help`` takes, or `None` if it fails."""
    started = monotonic()
    command = [sys.executable, "-m", "fedkd", "--help"]
    done = subprocess.run(command, env=surroundings(), stdout=subprocess.DEVNULL, check=False)
    return monotonic() - started if done.returncode == 0 else None


def seconds_to_first_step(job: Job) -> float | None:
    """Return how long ``fedkd run`` takes from its start to its first step, or `None` if it fails.

    It is measured from outside: when the first round's record appears, less a median round.
    """
    config, runs = Path(job.folder, "experiment.toml"), Path(job.folder, "runs")
    command = [sys.executable, "-m", "fedkd", "run", "--config", str(config)]
    times: list[float] = []
    with log_of(job).open("wb") as log:
        started = monotonic()
        process = subprocess.Popen(
            command, env=surroundings(), stdout=log, stderr=log, stdin=subprocess.DEVNULL
        )
        try:
            while process.poll() is None and monotonic() - started < TIMEOUT_S:
                records = list(runs.glob("*/rounds.jsonl"))
                written = records[0].read_bytes().count(b"\n") if records else 0
                times += [monotonic()] * (written - len(times))
                sleep(0.005)
        finally:
            process.kill()
            process.wait()
    if process.returncode != 0 or len(times) < job.rounds:
        return None
    return times[0] - started - median(after - before for before, after in pairwise(times))


# --- The machine ---------------------------------------------------------------------------------


def machine() -> dict[str, str]:
    """Return what the figures depend on, by name."""
    load = ", ".join(f"{value:.2f}" for value in os.getloadavg())
    threads = os.environ.get("OMP_NUM_THREADS")
    return {
        "date": date.today().isoformat(),
        "CPU": cpu_model(),
        "CPUs that may be used": str(available_cpus()),
        "load before (1, 5, 15 minutes)": load,
        **({"OMP_NUM_THREADS": threads} if threads else {}),
    }


def cpu_model() -> str:
    """Return the name of the processor."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "unknown"


def available_cpus() -> int:
    """Return how many CPUs this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


if __name__ == "__main__":
    main()
