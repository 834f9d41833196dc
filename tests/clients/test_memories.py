"""What clients keep besides their models: on the disk for good, and never less than they had."""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from damaging import change
from executing import K, assert_same_state, new_store, reports, run, state
from federation_tools import tiny
from safetensors.torch import save_file

import fedkd
from fedkd.clients.instructions import ClientReport, Failure
from fedkd.clients.state_files import StateFiles
from fedkd.clients.state_store import ResidentStates
from fedkd.clients.states import INITIAL, States
from fedkd.knowledge.wire import Wire
from fedkd.phases import Apply, LocalClient, Predict, Revisit, procedure

HERE = __name__


@procedure
def count(client: LocalClient) -> None:
    """Count the calls, in the client's state."""
    client.state["calls"] = client.state.get("calls", torch.tensor(0)) + 1


@procedure
def forget(client: LocalClient) -> None:
    """Keep nothing."""
    client.state.clear()


# --- On the disk ---------------------------------------------------------------------------------


def test_every_file_and_folder_that_appears_is_flushed_into_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed: dict[tuple[int, int], set[str]] = {}
    fsync = os.fsync

    def noted(descriptor: int) -> None:
        fsync(descriptor)
        about = os.fstat(descriptor)
        if stat.S_ISDIR(about.st_mode):
            flushed.setdefault((about.st_dev, about.st_ino), set()).update(os.listdir(descriptor))

    monkeypatch.setattr(os, "fsync", noted)
    keys = {"strategy": "SelectiveFD", "codec": "simplex:2+changed", "num_server_rounds": 2}
    runs = tmp_path / "not" / "yet"
    fedkd.run(tiny(**keys, name="it", run_dir=str(runs)))
    clients = runs / "it" / "clients"
    names = {str(path.relative_to(clients)) for path in clients.rglob("*")}
    assert {"memory", "memory/down/0-0.safetensors", "memory/own", "memory/up"} <= names
    made = [runs.parent, runs, runs / "it", clients, *clients.rglob("*")]
    for path in made:
        about = path.parent.stat()
        assert path.name in flushed.get((about.st_dev, about.st_ino), ()), path


# --- Lost ----------------------------------------------------------------------------------------

KINDS: dict[str, dict[str, Any]] = {
    "own": {"phases": [Apply(f"{HERE}:count"), Revisit()]},
    "up": {
        "phases": [Revisit(), Predict()],
        "asked": torch.tensor([3, 5, 11]),
        "wire": Wire(rows="changed"),
    },
}


def executed(
    store: ResidentStates, kind: str, number: int, **how: Any
) -> list[ClientReport | Failure]:
    """Have all clients keep something, from the round before."""
    experiment = tiny(client_code=HERE, plan="stacked")
    fields = {"round": number, "base": number - 1, **KINDS[kind], **how}
    return run(experiment, fields.pop("phases"), store=store, **fields)[0]


def stored(kind: str, limit: int) -> tuple[ResidentStates, Path]:
    """Return a store after the first round, and the file of the memories."""
    store = new_store(tiny(), limit)
    reports(executed(store, kind, 1))
    (path,) = store.memories.folder.rglob("*.safetensors")
    assert path.parent.name == kind
    return store, path


def another(path: Path, calls: torch.Tensor) -> None:
    """Put a file there as we write them, of another run."""
    path.unlink()
    states = States([0, 1, 2], {"kept": {"calls": calls}}, [0] * 3)
    StateFiles(path.parent).save(states, 1, dict.fromkeys(range(3), INITIAL))


STRANGE = "its memory of round 1 was not written with its state: "
DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (Path.unlink, "its memory of round 1 is missing: {}"),
    "folder missing": (
        lambda path: shutil.rmtree(path.parent.parent),
        "its memory of round 1 is missing: {}",
    ),
    "another run's": (lambda path: another(path, torch.full((3,), 7)), STRANGE),
    "of another shape": (lambda path: another(path, torch.ones(3, 5)), STRANGE),
    "cut": (lambda path: os.truncate(path, 5003), "{} has 5003 bytes instead of "),
    "empty": (lambda path: os.truncate(path, 0), "{} is not a file of client states"),
    "rubbish": (
        lambda path: path.write_bytes(b"\x07" * 4096),
        "{} is not a file of client states",
    ),
    "deep rubbish": (
        lambda path: path.write_bytes((99_999).to_bytes(8, "little") + b"[" * 99_999),
        "{} is not a file of client states",
    ),
    "foreign": (
        lambda path: save_file({"round": torch.ones(2, 100)}, path, {"first": "0"}),
        "{} is not a file of client states",
    ),
}


@pytest.mark.parametrize("limit", [0, K])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_lost_memory_is_a_failure_and_never_an_empty_one(damage: str, limit: int) -> None:
    store, path = stored("own", limit)
    do, reason = DAMAGES[damage]
    do(path)
    results = executed(store, "own", 2)
    for client, result in enumerate(results):
        assert isinstance(result, Failure)
        assert (result.client, result.is_lost) == (client, True)
        assert result.reason.startswith(reason.format(path))
        assert "\n" not in result.reason


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("what", ["round", "tensor", "checksum"])
def test_a_damaged_memory_costs_its_own_client_alone(kind: str, what: str) -> None:
    store, path = stored(kind, K)
    undisturbed, _ = stored(kind, K)
    change(path, {"tensor": {"own": "kept/calls", "up": "kept/codes"}[kind]}.get(what, what), 1, 1)
    results = executed(store, kind, 2)
    reason = {
        "round": f"its memory of round 1 is missing: {path}",
        "tensor": f"{path} is damaged: what client 1 kept of round 1 is not as it was written",
    }
    assert results[1] == Failure(1, reason.get(what, reason["tensor"]), is_lost=True)
    expected = executed(undisturbed, kind, 2)
    for k in (0, 2):
        one, other = results[k], expected[k]
        assert isinstance(one, ClientReport)
        assert isinstance(other, ClientReport)
        assert one.metrics == other.metrics
        assert_same_state(state(store, k, 2), state(undisturbed, k, 2))
        found, right = (each.memories.load({k: 2})[k][kind] for each in (store, undisturbed))
        assert found.keys() == right.keys()
        assert all(torch.equal(found[name], right[name]) for name in right)


@pytest.mark.parametrize("damage", sorted(DAMAGES.keys() - {"of another shape"}))
def test_from_the_initial_weights_a_client_goes_on_over_what_is_damaged(damage: str) -> None:
    store, path = stored("own", 0)
    do, _ = DAMAGES[damage]
    do(path)
    if damage not in ("folder missing", "another run's"):
        do(next(store.files.folder.glob("*.safetensors")))
    fresh = new_store(tiny(), 0)
    for each in (store, fresh):
        reports(executed(each, "own", 2, base=INITIAL))
        reports(executed(each, "own", 3))
    for k in range(K):
        assert_same_state(state(store, k, 3), state(fresh, k, 3))
        assert store.memories.load({k: 3})[k]["own"]["calls"] == 2


def test_a_memory_that_a_client_no_longer_has_is_not_missed() -> None:
    store, path = stored("own", 0)
    reports(executed(store, "own", 2, phases=[Apply(f"{HERE}:forget"), Revisit()]))
    path.unlink()
    reports(executed(store, "own", 3))
    assert store.memories.load({1: 3})[1]["own"]["calls"] == 1
