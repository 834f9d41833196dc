"""Callbacks: what they are told, in which order, and what one that raises does to the run."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from small_runs import ROUNDS, lines, tiny

import fedkd
from fedkd.records import Row, Run
from fedkd.records.callbacks import Callback, Callbacks, EachRound, replay


class Diary(Callback):
    """Writes down what it is told, and raises where it is asked to."""

    def __init__(self, notes: list[str], who: str = "", raises: Sequence[str] = ()) -> None:
        self._notes, self._who, self._raises = notes, who, raises

    def _note(self, what: str) -> None:
        self._notes.append(f"{self._who} {what}".strip())
        if what in self._raises:
            raise ArithmeticError(f"{self._who} at {what}")

    def on_run_start(self, experiment: fedkd.Experiment, path: Path) -> None:
        self._note("start")

    def on_round_end(self, row: Row) -> None:
        self._note(f"round {row['round']}")

    def on_run_end(self, run: Run) -> None:
        self._note("end")

    def on_error(self, error: BaseException) -> None:
        self._notes.append(f"{self._who} {type(error).__name__}".strip())
        if "error" in self._raises:
            raise ArithmeticError("in the error")


class Optional(Diary):
    """A tracker with bad luck."""

    essential = False


# --- What they are told --------------------------------------------------------------------------


def test_everything_is_on_disk_before_it_is_told(tmp_path: Path) -> None:
    found: dict[str, Any] = {"rows": [], "on disk": []}

    class Witness(Callback):
        def on_run_start(self, experiment: fedkd.Experiment, path: Path) -> None:
            found["path"] = path
            found["files"] = {file.name for file in path.iterdir()}
            found["named"] = experiment

        def on_round_end(self, row: Row) -> None:
            found["rows"].append(row)
            found["on disk"].append(lines(found["path"]))

        def on_run_end(self, run: Run) -> None:
            found["run"] = run

    run = fedkd.run(tiny(tmp_path, name=None), callbacks=[Witness()])
    assert found["files"] == {"experiment.toml", "identity.json", ".lock"}
    assert found["path"] == run.path
    assert found["named"] == run.experiment
    assert found["named"].name == run.path.name
    assert len(run.rounds) == ROUNDS
    assert found["on disk"] == [run.rounds[: n + 1] for n in range(ROUNDS)]
    assert found["rows"] == run.rounds
    assert found["run"] == run


def test_all_are_told_of_a_moment_in_the_order_of_the_list(tmp_path: Path) -> None:
    notes: list[str] = []
    fedkd.run(tiny(tmp_path), callbacks=(Diary(notes, who) for who in "ab"))
    moments = ("start", "round 1", "round 2", "end")
    assert notes == [f"{who} {moment}" for moment in moments for who in "ab"]


def test_a_callback_that_overrides_nothing_changes_nothing(tmp_path: Path) -> None:
    with_it = fedkd.run(tiny(tmp_path, name="with"), callbacks=[Callback()])
    without = fedkd.run(tiny(tmp_path, name="without"))
    assert with_it.accuracy == without.accuracy
    assert [row["client_accuracy_after_revisit"] for row in with_it.rounds] == [
        row["client_accuracy_after_revisit"] for row in without.rounds
    ]


def test_each_has_the_record_to_itself(tmp_path: Path) -> None:
    seen: list[Row] = []

    def spoil(row: Row) -> None:
        row["seconds"].clear()
        row["answered"].append("nobody")
        del row["bytes_up"]

    run = fedkd.run(tiny(tmp_path), callbacks=[EachRound(spoil), EachRound(seen.append)])
    assert seen == run.rounds


def test_a_finished_run_can_be_told_again(tmp_path: Path) -> None:
    run = fedkd.run(tiny(tmp_path))
    notes: list[str] = []
    rows: list[Row] = []
    replay(run, [Diary(notes), EachRound(rows.append)])
    assert notes == ["start", "round 1", "round 2", "end"]
    assert rows == run.rounds
    with pytest.raises(ArithmeticError):
        replay(run, [Diary(notes := [], raises=["round 1"])])
    assert notes == ["start", "round 1", "ArithmeticError"]


@pytest.mark.ray
@pytest.mark.slow
def test_the_other_engine_tells_the_same(tmp_path: Path) -> None:
    notes: list[str] = []
    with pytest.raises(ArithmeticError, match="at round 2") as caught:
        fedkd.run(tiny(tmp_path, engine="flower"), [Diary(notes, raises=["round 2"])])
    assert caught.value.__notes__ == ["on_round_end of Diary, after round 2, raised this"]
    assert notes == ["start", "round 1", "round 2", "ArithmeticError"]
    assert [row["round"] for row in lines(tmp_path / "tiny")] == [1, 2]


# --- One that raises -----------------------------------------------------------------------------


def test_an_exception_in_a_round_ends_the_run_after_all_have_heard_of_the_round(
    tmp_path: Path,
) -> None:
    notes: list[str] = []
    told = [Diary(notes, "a"), Diary(notes, "b", ["round 1"]), Diary(notes, "c")]
    with pytest.raises(ArithmeticError, match="b at round 1") as caught:
        fedkd.run(tiny(tmp_path), callbacks=told)
    assert caught.value.__notes__ == ["on_round_end of Diary, after round 1, raised this"]
    assert notes == [
        *("a start", "b start", "c start"),
        *("a round 1", "b round 1", "c round 1"),
        *("a ArithmeticError", "b ArithmeticError", "c ArithmeticError"),
    ]
    assert [row["round"] for row in lines(tmp_path / "tiny")] == [1]
    with pytest.raises(fedkd.FedkdError, match=r"no finished run: result\.json is missing"):
        Run.load(tmp_path / "tiny")


def test_an_exception_at_the_start_ends_the_run_before_anything_is_trained(tmp_path: Path) -> None:
    notes: list[str] = []
    told = [Diary(notes, "a"), Optional(notes, "b", ["start"]), Diary(notes, "c")]
    with pytest.raises(ArithmeticError, match="b at start") as caught:
        fedkd.run(tiny(tmp_path), callbacks=told)
    assert caught.value.__notes__ == ["on_run_start of Optional, before round 1, raised this"]
    assert notes == ["a start", "b start", "a ArithmeticError", "b ArithmeticError"]
    assert not (tmp_path / "tiny" / "rounds.jsonl").exists()


def test_an_exception_at_the_end_leaves_a_finished_run_and_is_no_error_of_it(
    tmp_path: Path,
) -> None:
    notes: list[str] = []
    told = [Diary(notes, "a", ["end"]), Diary(notes, "b")]
    with pytest.raises(ArithmeticError, match="a at end") as caught:
        fedkd.run(tiny(tmp_path), callbacks=told)
    (note,) = caught.value.__notes__
    assert note == f"on_run_end of Diary, with {tmp_path / 'tiny'} finished, raised this"
    assert notes[-2:] == ["a end", "b end"]
    assert len(Run.load(tmp_path / "tiny").rounds) == ROUNDS


def test_one_that_is_not_essential_is_logged_once_and_goes_on_being_called(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    notes: list[str] = []
    raising = ["round 1", "round 2", "end"]
    with caplog.at_level(logging.WARNING, "fedkd.records.callbacks"):
        run = fedkd.run(tiny(tmp_path), callbacks=[Optional(notes, "t", raising)])
    assert notes == ["t start", "t round 1", "t round 2", "t end"]
    assert len(run.rounds) == ROUNDS
    assert [record.getMessage() for record in caplog.records] == [
        "on_round_end of Optional, after round 1, raised ArithmeticError('t at round 1'); logged once"
    ]


def test_of_two_that_raise_the_first_is_raised_and_the_other_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    told = [Diary([], who, ["round 1"]) for who in "ab"]
    with pytest.raises(ArithmeticError, match="a at round 1"):
        fedkd.run(tiny(tmp_path), callbacks=told)
    assert ["b at round 1" in record.getMessage() for record in caplog.records] == [True]


def test_what_on_error_raises_does_not_hide_what_went_wrong(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    notes: list[str] = []
    told = [Diary(notes, "a", ["round 1", "error"]), Diary(notes, "b")]
    with pytest.raises(ArithmeticError, match="a at round 1"):
        fedkd.run(tiny(tmp_path), callbacks=told)
    assert notes[-2:] == ["a ArithmeticError", "b ArithmeticError"]
    (record,) = caplog.records
    assert record.getMessage() == "on_error of Diary raised ArithmeticError('in the error')"


def test_ctrl_c_reaches_on_error(tmp_path: Path) -> None:
    notes: list[str] = []

    def interrupt(row: Row) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fedkd.run(tiny(tmp_path), callbacks=[EachRound(interrupt), Diary(notes)])
    assert notes == ["start", "InterruptedRun"]


def test_a_federation_that_loses_its_clients_reaches_on_error(tmp_path: Path) -> None:
    notes: list[str] = []
    lost = tiny(tmp_path, student="small_runs:Hopeless", strategy="LocalOnly", plan="loop")
    with pytest.raises(fedkd.FedkdError, match=r"no round had a quorum.*no hope"):
        fedkd.run(lost, callbacks=[Diary(notes)])
    assert notes == ["start", "round 1", "round 2", "FedkdError"]


# --- Before any work -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (print, r"<built-in function print> is not a .*Callback; write EachRound\(function\)"),
        (Callback, r"the class Callback is not a .*Callback; write Callback\(\)"),
        ("tensorboard", r"'tensorboard' is not a fedkd\.Callback$"),
    ],
)
def test_what_is_no_callback_is_refused_before_anything_is_written(
    tmp_path: Path, value: Any, text: str
) -> None:
    with pytest.raises(fedkd.FedkdError, match=text):
        fedkd.run(tiny(tmp_path), callbacks=[value])
    assert list(tmp_path.iterdir()) == []


def test_one_that_has_been_told_the_end_hears_of_no_error() -> None:
    notes: list[str] = []
    told = Callbacks([Diary(notes)])
    told.on_run_start(fedkd.Experiment(), Path("nowhere"))
    told.on_run_end(Run(Path("nowhere"), [], {}))
    told.on_error(RuntimeError())
    assert notes == ["start", "end"]
