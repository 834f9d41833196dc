"""What is lost on a disk between rounds, on every engine, on a node, and where a run is cut off."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from damaging import change, lose
from federation_tools import ROUGH, call_client_app, tiny

import fedkd
from fedkd.cli.results import round_line
from fedkd.clients.instructions import Instruction
from fedkd.data.federated import federated_data
from fedkd.engines import answering, in_process
from fedkd.engines.run import resume
from fedkd.federation.flower_internals.replies import failure_reason, says_lost
from fedkd.federation.messages import TRAIN, encode_instruction, encode_request, experiment_record
from fedkd.phases import Phase, Predict, Revisit
from fedkd.records import Row, Run
from fedkd.records.callbacks import EachRound
from fedkd.reports.report import report

ROUNDS = 5
LOST, DAMAGED = 1, 2
KEYS: dict[str, Any] = {
    "strategy": "SelectiveFD",
    "codec": "simplex:4+changed",
    "num_server_rounds": ROUNDS,
    "plan": "stacked",
}


def disk(folder: Path, *, again: bool = True) -> Callable[[Row], None]:
    """Return what happens to a run's folder: two clients lose something, and one of them once more."""
    clients = folder / "clients"

    def after(row: Row) -> None:
        if row["round"] == 1:
            lose(clients / "memory" / "own" / "0-0.safetensors", LOST)
        if row["round"] == 2:
            change(clients / "0-0.safetensors", "student/head.weight", DAMAGED, 2)
        if row["round"] == 4 and again:
            lose(clients / "0-0.safetensors", LOST)

    return after


def expected_of(rows: list[Row]) -> None:
    """Compare with what is to happen."""
    assert [list(row["dropped"]) for row in rows] == [[], ["1"], ["2"], [], ["1"]]
    assert [row["enrolled_again"] for row in rows] == [[], [LOST], [DAMAGED], [], []]
    assert "its memory of round 1 is missing" in rows[1]["dropped"]["1"]
    assert "what client 2 kept of round 2 is not as it was written" in rows[2]["dropped"]["2"]
    assert rows[4]["dropped"]["1"] == (
        "has no state of round 4 to start from; it was enrolled again before, so it stays dropped"
    )


def ran(folder: Path, **keys: Any) -> Run:
    experiment = tiny(**{**KEYS, "run_dir": str(folder), "name": "it", **keys})
    return fedkd.run(experiment, [EachRound(disk(folder / "it"))])


def exact(row: Row) -> Row:
    """Leave out what depends on where a run lies."""
    reasons = {client: text.rpartition("/")[2] for client, text in row["dropped"].items()}
    return {**{name: row[name] for name in row if name not in ROUGH}, "dropped": reasons}


@pytest.fixture
def from_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep no state in memory, as a process that has been started anew."""
    monkeypatch.setattr(in_process, "store_of", lambda e, _: answering.store_of(e, 0))


@pytest.mark.usefixtures("from_disk")
def test_a_run_that_is_cut_off_knows_who_was_enrolled_again(tmp_path: Path) -> None:
    whole = ran(tmp_path / "whole")
    expected_of(whole.rounds)
    folder = tmp_path / "cut" / "it"
    happens = disk(folder)

    class CutOffError(Exception):
        """The process ends here."""

    def cut_off(row: Row) -> None:
        happens(row)
        if row["round"] in (2, 4):
            raise CutOffError

    experiment = tiny(**KEYS, run_dir=str(folder.parent), name="it")
    with pytest.raises(CutOffError):
        fedkd.run(experiment, [EachRound(cut_off)])
    with pytest.raises(CutOffError):
        resume(folder, [EachRound(cut_off)])
    done = resume(folder)
    assert list(map(exact, done.rounds)) == list(map(exact, whole.rounds))
    assert done.client_accuracy == whole.client_accuracy
    assert round_line(done.rounds[1], ROUNDS).endswith(", enrolled again: 1")
    assert "enrolled again:" not in round_line(done.rounds[4], ROUNDS)
    page = report([folder], tmp_path / "page.html").read_text()
    assert "began again from the initial weights: 2." in page
    for path in (whole.path / "clients").rglob("*.safetensors"):
        relative = path.relative_to(whole.path)
        assert (folder / relative).read_bytes() == path.read_bytes(), relative


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("keys", [{"engine": "flower"}, {"num_workers": 2}])
def test_every_engine_says_the_same(
    tmp_path: Path, keys: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Workers keep states in memory, so that there a loss on the disk costs nobody anything."""
    got = ran(tmp_path / "got", **keys)
    if "engine" in keys:
        monkeypatch.setattr(in_process, "store_of", lambda e, _: answering.store_of(e, 0))
        expected_of(got.rounds)
    expected = ran(tmp_path / "expected")
    for row, other in zip(got.rounds, expected.rounds, strict=True):
        one, same = exact(row), exact(other)
        assert one.keys() == same.keys()
        for name in one:
            if name.startswith(("loss_", "gradient_norm_")) or name == "agreement":
                assert one[name] == pytest.approx(same[name], rel=1e-5, abs=1e-5), name
            else:
                assert one[name] == same[name], name


# --- A node --------------------------------------------------------------------------------------


def told(node: dict[str, Any], base: int, number: int, phase: Phase) -> Any:
    experiment = tiny(name="mine", dp_noise=1.0)
    nothing = torch.arange(3) if isinstance(phase, Predict) else torch.empty(0, dtype=torch.int64)
    instruction = Instruction(0, number, base, phases=(phase,), asked=nothing, evaluate="none")
    request = encode_request(nothing, federated_data(experiment).sizes)
    content = encode_instruction(instruction, experiment_record(experiment), {}, request)
    return call_client_app(content, TRAIN, node)


@pytest.mark.parametrize("noise", [0.0, 1.0])
def test_a_node_whose_disk_is_wiped_says_so_and_goes_on(tmp_path: Path, noise: float) -> None:
    """Whoever keeps the reasons of failures to itself says no more than that it has lost its state."""
    node = {"state-dir": str(tmp_path / "states"), "dp-noise": noise}
    assert not told(node, 0, 1, Revisit()).has_error()
    assert not told(node, 1, 2, Revisit()).has_error()
    shutil.rmtree(tmp_path / "states")
    reply = told(node, 2, 3, Revisit())
    assert says_lost(reply)
    reason = failure_reason(reply)
    assert ("has no state of round 2" in reason) == (noise == 0)
    assert ("the node's own log says why" in reason) == (noise > 0)
    assert not told(node, 0, 4, Revisit()).has_error()
    assert not told(node, 4, 5, Revisit()).has_error()
    other = told(node, 5, 6, Predict())
    assert other.has_error() is False


def test_a_failure_of_another_kind_is_no_loss(tmp_path: Path) -> None:
    (tmp_path / "in-the-way").write_text("")
    reply = told({"state-dir": str(tmp_path / "in-the-way")}, 0, 1, Revisit())
    assert reply.has_error()
    assert not says_lost(reply)
