"""A deployment on this machine: SuperLink and SuperNodes, TLS and keys, and what goes wrong there."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from deployment_tools import Deployment, Node, copied_app, deployed, make_keys, wait_until
from federation_tools import ROUGH
from fuzzing import CASES
from misbehaving import HANGS, UNREADABLE, WAYS
from paths import TOOLS

import fedkd
from fedkd.clients.state_files import StateFiles
from fedkd.experiment import Experiment
from fedkd.records import Run

KEYS: dict[str, Any] = {
    "dataset": "mnist-5k",
    "train_size": 600,
    "test_size": 200,
    "public_size": 120,
    "num_clients": 2,
    "num_server_rounds": 2,
    "strategy": "DSFL",
    "student": "mlp-20,mlp-8",
    "plan": "loop",
    "device": "cpu",
    "seed": 3,
}
TIMEOUT_S = 60.0

pytestmark = [pytest.mark.slow, pytest.mark.machines, pytest.mark.timeout(600)]


# --- A federation of processes ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    """A SuperLink, and two nodes that it knows and that are there."""
    missing = [tool for tool in ("bash", "openssl", "ssh-keygen") if shutil.which(tool) is None]
    if missing:
        pytest.skip(f"no {', '.join(missing)} here, with which docs/deploy.md makes keys")
    with deployed(tmp_path_factory.mktemp("deployment")) as deployment:
        for k in range(2):
            deployment.register(f"node-{k}")
        own = f'state-dir="{deployment.folder}/states"'
        for node in [
            deployment.node("node-0", f"partition-id=0 {own}"),
            deployment.node("node-1", "partition-id=1 misbehaves=true"),
        ]:
            node.wait()
        yield deployment


@pytest.fixture(scope="module")
def strangers(federation: Deployment) -> dict[str, Node]:
    """Nodes that are not to get in: one without a registered key, one that trusts somebody else."""
    config = "partition-id=0"
    others = federation.folder / "others"
    make_keys(others)
    return {
        "no key": federation.node("stranger", config, key=others / "node-0"),
        "other ca": federation.node(
            "mistaken", config, ca=others / "ca.crt", key=others / "node-1"
        ),
    }


@pytest.fixture(scope="module")
def clean(federation: Deployment, strangers: dict[str, Node]) -> Run:
    """Two rounds of fedkd's apps, with strangers at the door."""
    folder = federation.folder
    app = copied_app(folder / "app")
    run_id = federation.submit(app, **KEYS, run_dir=folder / "runs", name="clean")
    listed = federation.finished(run_id)
    assert listed["status"] == "finished:completed", listed
    return Run.load(folder / "runs" / "clean")


@pytest.fixture(scope="module")
def too_few(federation: Deployment, clean: Run) -> str:
    """Start a run for more nodes than there are: it waits for them while others run."""
    keys = {**KEYS, "num_clients": 7, "run_dir": federation.folder / "runs", "name": "too-few"}
    return federation.submit(federation.folder / "app", **keys)


@pytest.fixture(scope="module")
def hard(federation: Deployment, too_few: str) -> Run:
    """A run in which node 1 spoils its replies, and a third node is killed after the first round."""
    folder = federation.folder
    app = copied_app(folder / "spoilt-app")
    for module in ("misbehaving.py", "fuzzing.py"):
        shutil.copy(TOOLS / module, app / module)
    project = (app / "pyproject.toml").read_text()
    project = project.replace(
        'clientapp = "fedkd.engines.client_app:app"', 'clientapp = "misbehaving:app"'
    )
    project = project.replace("fab-include = [", 'fab-include = ["misbehaving.py", "fuzzing.py", ')
    (app / "pyproject.toml").write_text(project)
    federation.register("node-2")
    victim = federation.node("node-2", "partition-id=2")
    victim.wait()
    keys = {**KEYS, "num_clients": 3, "num_server_rounds": len(WAYS) + 1, "name": "hard"}
    run_id = federation.submit(
        app, **keys, run_dir=folder / "runs", quorum=1, round_timeout=TIMEOUT_S
    )
    rounds = folder / "runs" / "hard" / "rounds.jsonl"
    wait_until(lambda: rounds.is_file() and "\n" in rounds.read_text(), "there is a round")
    victim.kill()
    listed = federation.finished(run_id)
    assert listed["status"] == "finished:completed", listed
    return Run.load(folder / "runs" / "hard")


def test_two_nodes_get_what_the_simulation_gets(
    federation: Deployment, clean: Run, tmp_path: Path
) -> None:
    simulated = fedkd.run(Experiment(**KEYS, run_dir=str(tmp_path), name="clean"))
    assert len(clean.rounds) == len(simulated.rounds) == 2
    for one, other in zip(clean.rounds, simulated.rounds, strict=True):
        assert _exactly(one) == _exactly(other)
    results = [{**run.result, "environment": None} for run in (clean, simulated)]
    assert _exactly(results[0]) == _exactly(results[1])
    assert clean.result["dropped"] == {}
    assert not (federation.folder / "runs" / "clean" / "clients").exists()  # the nodes keep them
    folders = [federation.folder / "states", federation.folder / "node-1" / "flwr" / "fedkd"]
    for client, folder in enumerate(folders):
        reference = _state(tmp_path / "clean" / "clients", client)
        state = _state(folder / "clean" / "clients", client)
        assert state.keys() == reference.keys() != set()
        assert all(torch.equal(state[name], reference[name]) for name in reference)


def _exactly(record: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in record.items() if name not in ROUGH}


def _state(folder: Path, client: int) -> dict[str, torch.Tensor]:
    """Return what a client learned in the last round."""
    states = StateFiles(folder, period=2).load({client: KEYS["num_server_rounds"]})
    assert states.clients == [client]
    return {f"{r} {n}": t for r, model in states.models.items() for n, t in model.items()}


def test_a_node_without_a_registered_key_is_refused(
    federation: Deployment, strangers: dict[str, Node]
) -> None:
    stranger = strangers["no key"]
    assert stranger.process.wait(60) != 0
    assert "Failed to initialize the connection" in stranger.log
    assert "SuperNode ID" not in stranger.log
    assert federation.statuses().keys() <= set(federation.ids.values())


def test_a_node_that_trusts_another_authority_does_not_connect(strangers: dict[str, Node]) -> None:
    mistaken = strangers["other ca"]
    assert mistaken.process.wait(60) != 0
    assert "CERTIFICATE_VERIFY_FAILED" in mistaken.log
    assert "SuperNode ID" not in mistaken.log


def test_replies_that_are_spoilt_are_dropped_one_by_one(hard: Run) -> None:
    """From another process: what Flower cannot read either, and none at all."""
    assert [row["round"] for row in hard.rounds] == [*range(1, len(WAYS) + 2)]
    for row, way in zip(hard.rounds, WAYS, strict=False):
        said = row["dropped"]["1"]
        reason = {HANGS: "no reply in time", UNREADABLE: "sent an unreadable reply"}.get(way)
        assert re.search(reason or CASES[way].reason, said), (way, said)
        assert 1 not in row["answered"], way
        assert 0 in row["answered"], way
    assert "1" not in hard.rounds[-1]["dropped"]
    assert 1 in hard.rounds[-1]["answered"]


def test_a_call_that_hangs_is_given_up_at_its_deadline(federation: Deployment, hard: Run) -> None:
    """And its node answers the next round."""
    log = federation.log("node-1")
    assert "TimeoutError: the message's deadline has passed" in log
    following = hard.rounds[WAYS.index(HANGS) + 1]["dropped"]["1"]
    assert following != "no reply in time"


def test_a_node_that_is_killed_is_missing_from_then_on(hard: Run) -> None:
    assert 2 in hard.rounds[0]["answered"]
    said = [row["dropped"].get("2") for row in hard.rounds[1:]]
    assert set(said) <= {"no reply in time", "node is gone"}, said
    assert said == sorted(said)  # first the one, if at all, then the other
    assert hard.result["dropped"] == {"2": "node is gone"}
    assert [score is None for score in hard.result["client_accuracy"]] == [False, False, True]


def test_too_few_nodes_are_an_error_that_names_the_setting(
    federation: Deployment, too_few: str
) -> None:
    listed = federation.finished(too_few)
    assert listed["status"] == "finished:failed", listed
    assert re.search(r"num-clients = 7: only [23] Flower nodes are there", federation.said(too_few))
