"""What Ray leaves behind: nothing, however the run ends."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from shutil import rmtree
from tempfile import mkdtemp

import pytest

from fedkd.cli import main
from fedkd.engines.ray_leftovers import (
    VARIABLE,
    own_folder,
    processes_of,
    ray_place,
    remove_leftovers,
)
from fedkd.errors import FedkdError

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells whose they are")


@pytest.fixture
def place(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Yield a short folder in which Ray's folders are."""
    folder = Path(mkdtemp(prefix="ray-"))  # short: sockets lie below it
    monkeypatch.setenv("RAY_TMPDIR", str(folder))
    assert ray_place() == folder / f"fedkd-ray-{os.getuid()}"
    yield folder
    rmtree(folder)


# --- Where the folders are ------------------------------------------------------------------------


def test_a_folder_is_the_drivers_alone_and_is_removed(place: Path) -> None:
    with own_folder() as folder, own_folder() as other:
        assert folder.parent == other.parent == ray_place()
        assert folder != other
        assert (
            stat.S_IMODE(folder.stat().st_mode) == stat.S_IMODE(ray_place().stat().st_mode) == 0o700
        )
        (folder / "session" / "sockets").mkdir(parents=True)
        remove_leftovers()
        assert (folder / "session" / "sockets").is_dir()
    assert [entry.name for entry in ray_place().iterdir()] == [".lock"]


@pytest.mark.parametrize("variable", ["RAY_TMPDIR", "TMPDIR"])
def test_a_place_that_is_too_long_for_sockets_is_not_taken(
    variable: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    name = f"fedkd-ray-{os.getuid()}"
    for length in range(1, 100):
        above = "/" + "x" * length
        monkeypatch.setenv(variable, above)
        session = "session_2026-12-31_23-59-59_123456_4194304/sockets/plasma_store"
        fits = len(f"{above}/{name}/12345678/{session}") < 104
        assert str(ray_place()) == (f"{above}/{name}" if fits else f"/tmp/{name}")


def open_to_all(place: Path) -> None:
    place.mkdir()
    place.chmod(0o777)


def elsewhere(place: Path) -> None:
    (place.parent / "other").mkdir(mode=0o700)
    place.symlink_to(place.parent / "other")


def of_another(place: Path) -> None:
    place.mkdir()
    os.chown(place, 12345, -1)


@pytest.mark.parametrize("prepare", [open_to_all, elsewhere, of_another])
def test_a_place_that_others_can_change_is_refused_and_left_alone(
    prepare: Callable[[Path], None], place: Path
) -> None:
    if prepare is of_another and os.getuid() != 0:
        pytest.skip("only root gives folders away")
    prepare(ray_place())
    (ray_place() / "abandoned").mkdir()
    with (
        pytest.raises(FedkdError, match=r"fedkd-ray-\d+ must be a folder of yours"),
        own_folder(),
    ):
        pass
    remove_leftovers()
    assert (ray_place() / "abandoned").is_dir()


# --- What is cleaned ------------------------------------------------------------------------------

DRIVER = """
import sys
from fedkd.engines.ray_leftovers import own_folder
with own_folder() as folder:
    print(folder, flush=True)
    sys.stdin.read()
"""


@contextmanager
def other_driver() -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """Yield another process that has a folder, and the folder."""
    command = [sys.executable, "-c", DRIVER]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, text=True, stdin=pipe, stdout=pipe) as process:
        assert process.stdout is not None
        yield process, Path(process.stdout.readline().strip())
        process.kill()


@contextmanager
def dummy(name: str, folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Yield a process that is called so and has the folder in its environment."""
    environment = {**os.environ, VARIABLE: str(folder)}
    with subprocess.Popen([name, "60"], executable="/bin/sleep", env=environment) as process:
        yield process
        process.kill()


def is_alive(process: subprocess.Popen[bytes]) -> bool:
    return process.poll() is None


def test_what_a_killed_driver_left_is_ended_and_removed(place: Path) -> None:
    with (
        other_driver() as (driver, folder),
        other_driver() as (_, alive),
        dummy("ray::Worker", folder) as worker,
        dummy("ray::Worker", alive) as other_worker,
        dummy("ray::Worker", Path(f"{folder}-longer")) as similar,
        dummy("tensorboard", folder) as program,
    ):
        remove_leftovers()
        assert folder.is_dir()
        assert is_alive(worker)
        driver.kill()
        driver.wait()
        assert processes_of(folder) == [worker.pid]
        with pytest.raises(SystemExit, match="2"):
            main(["run", "--dataset", "mnist", "--data-dir", str(place / "absent")])
        assert worker.wait(10) == -signal.SIGKILL
        assert not folder.exists()
        assert alive.is_dir()
        assert all(map(is_alive, (other_worker, similar, program)))


def test_the_next_driver_removes_what_is_left(place: Path) -> None:
    with other_driver() as (driver, folder):
        driver.kill()
        driver.wait()
        with own_folder():
            assert not folder.exists()


def test_a_driver_ends_what_still_runs_when_it_leaves(place: Path) -> None:
    with ExitStack() as stack:
        with own_folder() as folder:
            worker = stack.enter_context(dummy("ray::Worker", folder))
        assert worker.wait(10) == -signal.SIGKILL
        assert not folder.exists()


def test_a_removal_that_was_cut_off_is_finished(place: Path) -> None:
    with own_folder() as folder:
        (folder.parent / "half" / "session").mkdir(parents=True)
        remove_leftovers()
        assert not (folder.parent / "half").exists()


# --- Ray itself -----------------------------------------------------------------------------------


@dataclass
class Driven:
    """A run that another process makes on Ray.

    Attributes:
        process: the driver.
        mark: what all its processes have in their environment.
        folder: its working folder.
    """

    process: subprocess.Popen[str]
    mark: bytes
    folder: Path

    def processes(self) -> list[str]:
        """Return the command lines of all processes of the run, those of Ray and the driver."""
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                command = (entry / "cmdline").read_bytes()
                if command and self.mark in (entry / "environ").read_bytes().split(b"\0"):
                    found.append(command.replace(b"\0", b" ").decode())
        return found

    def wait_for_rounds(self, number: int) -> None:
        """Return when so many rounds are done."""
        rows = self.folder / "runs/it/rounds.jsonl"
        while not rows.exists() or rows.read_text().count("\n") < number:
            assert self.process.poll() is None, self.process.communicate()
            time.sleep(0.05)


def fedkd(folder: Path, place: Path, *flags: str) -> subprocess.Popen[str]:
    """Begin a command of fedkd in a folder; the name of the folder marks its processes."""
    command = [sys.executable, "-m", "fedkd", "run", "--dataset", "digits", "--num-clients", "2"]
    return subprocess.Popen(
        [*command, "--student", "mlp-8", "--plan", "stacked", *flags],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        cwd=folder,
        env={**os.environ, "RAY_TMPDIR": str(place), "FEDKD_TEST_MARK": str(folder)},
    )


ENGINES = {"workers": ("--num-workers", "2"), "flower": ("--engine", "flower")}
ENDS = {"normal": (None, 0), "ctrl-c": (signal.SIGINT, 130), "term": (signal.SIGTERM, 143)}


@pytest.fixture
def driven(engine: str, rounds: int, place: Path, tmp_path: Path) -> Iterator[Driven]:
    flags = ("--name", "it", "--num-server-rounds", str(rounds))
    mark = f"FEDKD_TEST_MARK={tmp_path}".encode()
    with fedkd(tmp_path, place, *ENGINES[engine], *flags) as process:
        yield Driven(process, mark, tmp_path)
        process.kill()


def assert_nothing_is_left(driven: Driven, place: Path) -> None:
    assert driven.processes() == []
    assert [entry.name for entry in place.rglob("*")] == [ray_place().name, ".lock"]
    assert not list(Path("/dev/shm").glob("*plasma*"))  # Ray's object store


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.machines
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(("end", "rounds"), [("normal", 30), ("ctrl-c", 9999), ("term", 9999)])
def test_an_orderly_end_leaves_nothing(end: str, driven: Driven, place: Path) -> None:
    number, code = ENDS[end]
    driven.wait_for_rounds(1)
    (folder,) = (entry for entry in ray_place().iterdir() if entry.is_dir())
    assert processes_of(folder)
    assert list(folder.glob("session_*/sockets/*"))
    if number is not None:
        driven.process.send_signal(number)
    _, said = driven.process.communicate(timeout=120)
    assert driven.process.returncode == code, said
    assert_nothing_is_left(driven, place)
    if number is not None:
        assert said.splitlines()[-1].endswith("to continue: fedkd run --resume runs/it"), said


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.machines
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("rounds", [9999])
def test_the_next_command_cleans_up_after_a_killed_driver(driven: Driven, place: Path) -> None:
    """The next command does not use Ray."""
    driven.wait_for_rounds(1)
    driven.process.kill()
    driven.process.wait()
    assert list(ray_place().glob("*/session_*/sockets/*"))
    with fedkd(driven.folder, place, "--name", "next", "--num-server-rounds", "1") as following:
        _, said = following.communicate(timeout=120)
    assert following.returncode == 0, said
    assert_nothing_is_left(driven, place)
