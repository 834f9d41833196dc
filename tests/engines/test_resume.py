"""A run that is cut off, wherever, goes on and ends as if it had not been."""

from __future__ import annotations

import io
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from federation_tools import tiny
from killing import Killers
from sampling import one_in

import fedkd
from fedkd.cli import main
from fedkd.engines.interrupts import Interrupts
from fedkd.engines.run import resume
from fedkd.errors import FedkdError
from fedkd.federation.checkpoint import Checkpoint
from fedkd.knowledge import ClassMeans, ModelWeights, SoftLabels, Weights
from fedkd.knowledge.codec import KnownRows
from fedkd.records import Run
from fedkd.records.callbacks import EachRound
from fedkd.records.files import read_lines
from fedkd.records.folder import RunFolder
from fedkd.records.shapes import Round
from fedkd.studies.comparison.result import Comparison
from fedkd.studies.comparison.run import resume as resume_comparison
from fedkd.studies.sweep.request import resume as resume_sweep
from fedkd.studies.sweep.run import sweep

ROUNDS = 5
PARTLY: dict[str, Any] = {"num_clients": 5, "fraction_train": 0.6, "public_per_round": 23}
EXPERIMENTS: dict[str, dict[str, Any]] = {
    "DSFL": {**PARTLY},
    "SCARLET": {**PARTLY, "strategy": "SCARLET", "server_model": "mlp-5"},
    "CFD": {"strategy": "CFD", "server_model": "mlp-5", "fraction_train": 0.67},
    "FedGEMS": {"strategy": "FedGEMS", "server_model": "mlp-5"},
    "KTpFL": {"strategy": "KTpFL", "student": "mlp-8,mlp-5", "num_clients": 4},
    "SelectiveFD": {**PARTLY, "strategy": "SelectiveFD", "teacher": "mlp-5"},
    "FedDF": {**PARTLY, "strategy": "FedDF", "student": "mlp-8,mlp-5"},
    "FedProto": {**PARTLY, "strategy": "FedProto"},
}
"""Memories of every kind: of the server's model, of a strategy, of codecs, of clients, of weights."""

Whole = tuple[Path, dict[str, Any]]

POINTS = 48
"""Processes killed in this file besides those that run on Ray."""


def keys_of(name: str) -> dict[str, Any]:
    """Return what is run under a strategy's name."""
    common = {"strategy": name, "num_server_rounds": ROUNDS, "name": "it", "run_dir": "runs"}
    keys = tiny(**{**common, "plan": "stacked", **EXPERIMENTS[name]}).model_dump()
    return {key: value for key, value in keys.items() if value is not None}


def untimed(value: Any) -> Any:
    """Leave the seconds out of a record."""
    if isinstance(value, dict):
        return {name: untimed(each) for name, each in value.items() if "seconds" not in name}
    return value


def content(folder: Path) -> dict[str, Any]:
    """Return all that a run leaves, by file: records without seconds, tensors as bytes."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.suffix == ".jsonl":
            found[name] = [untimed(json.loads(line)) for line in path.read_text().splitlines()]
        elif path.suffix == ".json":
            found[name] = untimed(json.loads(path.read_text()))
        elif path.suffix == ".safetensors":
            found[name] = path.read_bytes()
        elif path.is_file() and path.name != ".lock":
            found[name] = path.read_text()
    found.pop("resumptions.jsonl", None)
    return found


def assert_same(whole: Path, resumed: Path) -> None:
    expected, found = content(whole), content(resumed)
    assert list(found) == list(expected)
    for name in expected:
        assert found[name] == expected[name], name


@pytest.fixture(scope="module")
def killers() -> Iterator[Killers]:
    with Killers() as found:
        yield found


@pytest.fixture(scope="module")
def whole(killers: Killers, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Whole]:
    """Return what gives a strategy's folder of a run that nothing has disturbed, and its end."""

    @cache
    def of(name: str) -> Whole:
        folder = tmp_path_factory.mktemp("whole")
        ended = killers.run(folder, keys=keys_of(name))
        assert (ended["signal"], ended["said"]) == (0, "")
        return folder / "runs" / "it", ended

    return of


def gone_on(killers: Killers, folder: Path, keys: dict[str, Any], **how: Any) -> dict[str, Any]:
    """Go on with a run, or begin it where it was cut off before it had a folder."""
    if (folder / "runs" / "it" / "experiment.toml").is_file():
        return killers.run(folder, resume="runs/it", **how)
    for path in (folder / "runs").glob("it/.*"):
        path.unlink()
    for path in (folder / "runs").glob("it"):
        path.rmdir()
    return killers.run(folder, keys=keys, **how)


# --- Killed --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "point", [pytest.param(n, marks=[pytest.mark.slow] * (n >= 1)) for n in range(POINTS)]
)
def test_a_run_that_is_killed_ends_as_if_it_had_not_been(
    killers: Killers, whole: Callable[[str], Whole], tmp_path: Path, point: int
) -> None:
    """Two thirds of the points are in a write: to a state, a record, a checkpoint, a flush or rename."""
    draw = random.Random(point)
    name = list(EXPERIMENTS)[point % len(EXPERIMENTS)]
    expected, undisturbed = whole(name)
    writes = undisturbed["writes"]
    ends: list[dict[str, Any]] = []
    for again in range(1 + (point % 5 == 0)):  # every fifth is killed again while it goes on
        how: dict[str, Any] = {"after": draw.uniform(0.0, 0.4)}
        if point % 3:
            how = {"dies_at": draw.randint(1, writes // (1 + again)), "part": draw.random()}
        ends.append(gone_on(killers, tmp_path, keys_of(name), **how))
    assert all(end["said"] == "" for end in ends)
    if point % 3:
        assert ends[0]["signal"] == signal.SIGKILL
    last = gone_on(killers, tmp_path, keys_of(name))
    assert (last["signal"], last["said"]) == (0, "")
    assert_same(expected, tmp_path / "runs" / "it")


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.1, 0.23, 0.42, 0.65, 0.88])
def test_a_full_disk_stops_a_run_that_goes_on_when_there_is_room(
    killers: Killers, whole: Callable[[str], Whole], tmp_path: Path, share: float
) -> None:
    expected, undisturbed = whole("DSFL")
    room = int(share * undisturbed["bytes"])
    ended = killers.run(tmp_path, keys=keys_of("DSFL"), room=room)
    assert re.fullmatch(
        r"\S+\.(jsonl?|safetensors) cannot be written: No space left on device", ended["said"]
    )
    last = killers.run(tmp_path, resume="runs/it")
    assert (last["signal"], last["said"]) == (0, "")
    assert_same(expected, tmp_path / "runs" / "it")


def test_a_record_that_cannot_be_written_stops_the_run(tmp_path: Path) -> None:
    """By a folder in its way: who may do everything is refused nothing."""
    experiment = tiny(name="it", run_dir=str(tmp_path), num_server_rounds=3)

    def block(_: Any) -> None:
        (tmp_path / "it" / ".server.safetensors.part").mkdir(exist_ok=True)

    with pytest.raises(FedkdError, match=r"server\.safetensors cannot be written: Is a directory"):
        fedkd.run(experiment, [EachRound(block)])
    (tmp_path / "it" / ".server.safetensors.part").rmdir()
    assert Checkpoint.load(tmp_path / "it").round == 1
    assert [row["round"] for row in resume(tmp_path / "it").rounds] == [1, 2, 3]


# --- Ctrl-C --------------------------------------------------------------------------------------


def write_config(folder: Path) -> None:
    toml = [f"{k} = {json.dumps(v)}" for k, v in tiny(name="it").flat().items()]
    (folder / "it.toml").write_text("\n".join(toml))


@pytest.mark.slow
def test_ctrl_c_finishes_the_round_and_names_how_to_go_on(tmp_path: Path) -> None:
    write_config(tmp_path)
    flags = ["--num-server-rounds", "100000", "--plan", "stacked"]
    process = subprocess.Popen(
        [sys.executable, "-m", "fedkd", "run", "--config", "it.toml", *flags],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
        start_new_session=True,
    )
    assert process.stderr is not None
    assert process.stderr.readline().startswith("round 1 of ")
    os.killpg(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    last = said.splitlines()[-1]
    match = re.fullmatch(
        r"fedkd: interrupted after round (\d+) of 100000; to continue: fedkd run --resume runs/it",
        last,
    )
    assert match
    rows = read_lines(tmp_path / "runs/it/rounds.jsonl", Round)
    assert [row["round"] for row in rows] == list(range(1, int(match[1]) + 1))
    assert Checkpoint.load(tmp_path / "runs/it").round == int(match[1])


class _Interrupting(io.RawIOBase):
    """A file during whose first write Ctrl-C arrives."""

    def __init__(self, interrupts: Interrupts) -> None:
        self._interrupts = interrupts

    def writable(self) -> bool:
        return True

    def write(self, content: Any) -> int:
        if not self._interrupts.requested:
            self._interrupts.handle(signal.SIGINT, None)
        return len(content)


def test_ctrl_c_may_come_while_a_line_is_written(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    interrupts = Interrupts()
    stream = io.TextIOWrapper(
        io.BufferedWriter(_Interrupting(interrupts)), line_buffering=True, encoding="utf-8"
    )
    monkeypatch.setattr(sys, "stderr", stream)
    print("round 1 of 3", file=sys.stderr)
    assert interrupts.requested
    assert "finishing the round" in capfd.readouterr().err
    with pytest.raises(KeyboardInterrupt):
        interrupts.handle(signal.SIGINT, None)


@pytest.mark.slow
def test_a_second_ctrl_c_stops_at_once(tmp_path: Path) -> None:
    """In the middle of a round that would take hours."""
    write_config(tmp_path)
    slow = ["--name", "slow", "--local-epochs", "1000000", "--num-server-rounds", "2"]
    process = subprocess.Popen(
        [sys.executable, "-m", "fedkd", "run", "--config", "it.toml", *slow],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
    )
    assert process.stdout is not None
    for line in process.stdout:  # the plan is printed, then the clients train
        if line.startswith("plan"):
            break
    wait_for(lambda: (tmp_path / "runs/slow/.lock").exists())
    process.send_signal(signal.SIGINT)
    assert process.stderr is not None
    assert process.stderr.readline() == "fedkd: finishing the round; Ctrl-C again stops at once\n"
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert said.splitlines()[-1] == (
        "fedkd: stopped at once, 0 rounds are done; to continue: fedkd run --resume runs/slow"
    )


def wait_for(done: Any) -> None:
    deadline = time.monotonic() + 60
    while not done() and time.monotonic() < deadline:
        time.sleep(0.02)


# --- What is refused -----------------------------------------------------------------------------


def cut(folder: Path, rounds: int = 2) -> Path:
    """Return the folder of a run of three rounds that was interrupted after some of them."""

    def stop(row: Any) -> None:
        if row["round"] == rounds:
            raise KeyboardInterrupt

    experiment = tiny(name="it", run_dir=str(folder), num_server_rounds=3)
    with pytest.raises(
        KeyboardInterrupt, match=f"{rounds} rounds are done; to continue: fedkd run --resume"
    ):
        fedkd.run(experiment, [EachRound(stop)])
    return folder / "it"


def test_a_run_of_other_code_is_refused(tmp_path: Path) -> None:
    folder = cut(tmp_path)
    change(folder, "software", "fedkd's own code", "0123456789abcdef")
    with pytest.raises(
        FedkdError,
        match=r"cannot be resumed, as it was begun with something else: fedkd's own code",
    ):
        resume(folder)


def change(folder: Path, kind: str, name: str, value: Any) -> None:
    """Write something else down that a run was begun with."""
    identity = json.loads((folder / "identity.json").read_text())
    identity[kind][name] = value
    (folder / "identity.json").write_text(json.dumps(identity))


def test_two_processes_do_not_run_the_same(tmp_path: Path) -> None:
    folder = cut(tmp_path)
    with (
        RunFolder(folder).locked(),
        pytest.raises(FedkdError, match="is being run by another process"),
    ):
        resume(folder)
    assert len(resume(folder).rounds) == 3


def test_a_folder_that_was_moved_goes_on_where_it_is(tmp_path: Path) -> None:
    folder = cut(tmp_path / "before")
    folder.rename(tmp_path / "after")
    run = resume(tmp_path / "after")
    assert run.path == tmp_path / "after"
    assert len(run.rounds) == 3
    assert not folder.exists()


def test_a_finished_run_is_only_read(tmp_path: Path) -> None:
    done = fedkd.run(tiny(name="it", run_dir=str(tmp_path)))
    before = content(done.path)
    assert resume(done.path).result == done.result
    assert content(done.path) == before


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda f: (f / "rounds.jsonl").unlink(), r"rounds\.jsonl does not hold rounds 1 to 2"),
        (
            lambda f: (f / "server.safetensors").write_bytes(b"x" * 99),
            r"server\.safetensors cannot be read: ",
        ),
        (lambda f: (f / "experiment.toml").unlink(), "has no experiment.toml"),
    ],
)
def test_a_damaged_folder_is_named(tmp_path: Path, damage: Any, said: str) -> None:
    folder = cut(tmp_path)
    damage(folder)
    with pytest.raises(FedkdError, match=said):
        resume(folder)


@pytest.mark.parametrize("command", ["run", "compare", "sweep"])
def test_nothing_can_be_changed_on_the_way(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main([command, "--resume", str(tmp_path), "--alpha", "0.5"])
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert said == (
        f"fedkd: --resume {tmp_path} uses the options that the run was started with; remove --alpha\n"
    )


# --- Checkpoints ---------------------------------------------------------------------------------


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def knowledges() -> dict[str, Any]:
    clients, examples = torch.tensor([3, 1, 7]), torch.tensor([11, 2, 5])
    stack = {"body.weight": drawn(3, 5, 2), "steps": torch.tensor([1, 2, 3])}
    labels = torch.arange(5) % 2
    return {
        "none": None,
        "logits": SoftLabels(drawn(3, 5, 7), "logits", torch.tensor([9, 2, 3, 0, 1]), clients),
        "probabilities": SoftLabels(
            drawn(2, 5, 7).softmax(-1), "probabilities", mask=drawn(2, 5) > 0, targets=labels
        ),
        "means": ClassMeans(drawn(3, 7, 2), torch.ones(3, 7).long(), clients, "features"),
        "weights": Weights(
            {
                "a,b": ModelWeights(stack, clients, examples),
                "m.py:f": ModelWeights({"w": drawn(1, 2)}, clients[:1], examples[:1]),
            }
        ),
    }


@pytest.mark.parametrize("kind", list(knowledges()))
def test_a_checkpoint_is_read_as_it_was_written(tmp_path: Path, kind: str) -> None:
    shared = KnownRows(torch.tensor([[1, 2], [3, 4]]).byte(), torch.tensor([True, False]))
    written = Checkpoint(
        round=7,
        knowledge=knowledges()[kind],
        knowledge_round=5,
        state={"asked/when": torch.tensor([3, -1]), "width": 0.1 + 0.2, "n": -2, "word": "τ"},
        model={"head.weight": drawn(1, 3, 2), "steps": torch.tensor([4])},
        trained=True,
        base={2: 7, 0: 3},
        downlink={2: shared, 0: None, 1: shared},
        uplink={0: KnownRows(drawn(2, 3), torch.tensor([False, True])), 5: None},
        asked={2: 13, 0: 5},
        rounds_without_quorum=1,
        totals={"bytes_up": 2**53 + 1},
    )
    written.save(tmp_path)
    read = Checkpoint.load(tmp_path)
    assert spelled(read) == spelled(written)
    assert read.downlink[2] is read.downlink[1]


def spelled(value: Any) -> Any:
    """Write out what is in an object, with every bit of its tensors."""
    if isinstance(value, torch.Tensor):
        return str(value.dtype), list(value.shape), value.numpy().tobytes()
    if isinstance(value, dict):
        return {key: spelled(each) for key, each in value.items()}
    return spelled(vars(value)) if hasattr(value, "__dict__") else value


# --- On Ray --------------------------------------------------------------------------------------


ENGINES: dict[str, dict[str, Any]] = {
    "workers": {"num_workers": 2},
    "flower": {"engine": "flower", "client_cpus": 1.0},
}


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("engine", list(ENGINES))
def test_a_run_on_ray_that_is_killed_ends_as_if_it_had_not_been(
    engine: str, tmp_path: Path
) -> None:
    """In its fourth round."""
    keys = {**keys_of("SCARLET"), **ENGINES[engine], "num_server_rounds": 5}
    call = f"fedkd.run(Experiment(**{keys!r}))"
    intact, killed = tmp_path / "intact", tmp_path / "killed"  # paths as long count as many bytes
    for folder in (intact, killed):
        folder.mkdir()
    finished(intact, call)
    process = started(killed, call)
    wait_for(partial(has_rounds, killed / "runs/it/rounds.jsonl", 3))
    process.kill()
    process.wait()
    assert not (killed / "runs/it/result.json").exists()
    finished(killed, "fedkd.resume('runs/it')")
    assert_same(intact / "runs/it", killed / "runs/it")


def has_rounds(path: Path, count: int) -> bool:
    return path.exists() and path.read_bytes().count(b"\n") >= count


def started(folder: Path, call: str) -> subprocess.Popen[bytes]:
    program = f"import fedkd; from fedkd import Experiment; {call}"
    return subprocess.Popen([sys.executable, "-c", program], cwd=folder)


def finished(folder: Path, call: str) -> None:
    assert started(folder, call).wait(200) == 0


# --- Comparisons and sweeps ----------------------------------------------------------------------


@pytest.mark.slow
def test_a_comparison_that_is_interrupted_goes_on(tmp_path: Path) -> None:
    experiment = tiny(run_dir=str(tmp_path), num_server_rounds=3, teacher="mlp-5", name="both")
    methods, seeds = ["student-alone", "LocalOnly", "DSFL"], [5, 3]
    whole = fedkd.compare(experiment.replace(run_dir=str(tmp_path / "whole")), methods, seeds)
    seen: list[str] = []

    def stop(what: str, share: float) -> None:
        seen.append(what)
        if share > 0.8 and not what.startswith("DSFL, seed 3"):
            return
        if share > 0.8 and seen.count(what) == 3:  # its second round is done
            raise KeyboardInterrupt

    with pytest.raises(
        KeyboardInterrupt, match=f"to continue: fedkd compare --resume {tmp_path}/both"
    ):
        fedkd.compare(experiment, methods, seeds, progress=stop)
    assert Checkpoint.load(tmp_path / "both-dsfl-seed3").round == 2
    with pytest.raises(FedkdError, match="is unfinished; resume it with: fedkd compare --resume"):
        Comparison.load(tmp_path / "both")
    done = resume_comparison(tmp_path / "both")
    assert done.reused == 5
    assert (tmp_path / "both-dsfl-seed3/resumptions.jsonl").is_file()
    assert [entry.accuracies for entry in done.entries] == [e.accuracies for e in whole.entries]
    for name in ("both-dsfl-seed5", "both-dsfl-seed3", "both-localonly-seed3"):
        rows, expected = (untimed_rows(folder / name) for folder in (tmp_path, tmp_path / "whole"))
        assert [row["accuracy_after_revisit"] for row in rows] == [
            row["accuracy_after_revisit"] for row in expected
        ]


def untimed_rows(folder: Path) -> list[Any]:
    return [untimed(row) for row in Run.load(folder).rounds]


@pytest.mark.parametrize("seeds", one_in(2, [[5, 3], [5]]))
def test_a_sweep_that_is_interrupted_goes_on(tmp_path: Path, seeds: list[int]) -> None:
    """Two seeds train side by side; one trains alone."""
    experiment = tiny(num_server_rounds=3, strategy="DSFL", partition_seed=2, plan="stacked")
    grid = {"alpha": [0.3]}
    whole = sweep(experiment.replace(run_dir=str(tmp_path / "whole")), grid, seeds, 2)
    shares: list[float] = []

    def stop(_: str, share: float) -> None:
        shares.append(share)
        if share >= 0.75:
            raise KeyboardInterrupt

    cut_off = experiment.replace(run_dir=str(tmp_path / "cut"))
    with pytest.raises(KeyboardInterrupt):
        sweep(cut_off, grid, seeds, 2, progress=stop)
    (folder,) = (tmp_path / "cut").iterdir()
    rounds = [Checkpoint.load(each).round for each in sorted((folder / "runs").iterdir())]
    assert len(rounds) == len(seeds)
    assert max(rounds) >= 2
    done = resume_sweep(folder, progress=lambda _, share: shares.append(-share))
    assert done.path == folder
    assert [point.accuracies for point in done.points] == [p.accuracies for p in whole.points]
    told = [-share for share in shares if share < 0]
    assert len(told) < len(shares) - len(told)  # fewer rounds were left than had been done
