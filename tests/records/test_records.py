"""Run folders: written whole or not at all, and read back as they were."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fedkd.errors import FedkdError
from fedkd.experiment import Experiment, read_toml
from fedkd.records import Run
from fedkd.records.files import replace_file, write_json
from fedkd.records.folder import RunFolder, environment
from fedkd.records.results import CentralRun, gap_closed

OF_A_ROUND: dict[str, Any] = {
    "answered": [],
    "accepted": False,
    "server_accuracy": None,
    "bytes_up": 0,
    "bytes_down": 7,
    "seconds": {"round": 0.25},
}
ROWS: list[dict[str, Any]] = [
    {"round": 1, "sampled": [0, 2], "dropped": {"1": "no «reply»"}, "accuracy": None, **OF_A_ROUND},
    {"round": 2, "sampled": [1], "dropped": {}, "accuracy": 0.1 + 0.2, **OF_A_ROUND},
]
RESULT: dict[str, Any] = {
    "accuracy": 0.75,
    "client_accuracy": [0.5, None, 1.0],
    "server_accuracy": None,
    "dropped": {},
    "rounds": 2,
    "bytes_up": 2**40,
    "bytes_down": 7,
    "test_size": 61,
    "seconds": 0.5,
}


def made(tmp_path: Path, **keys: Any) -> RunFolder:
    experiment = Experiment(run_dir=str(tmp_path / "runs"), **keys)
    return RunFolder.create(experiment, "default", begun)


def begun(folder: RunFolder, name: str) -> None:
    (folder.path / "begun").write_text(name)


# --- The folder ----------------------------------------------------------------------------------


def test_a_named_run_gets_its_folder_once(tmp_path: Path) -> None:
    folder = made(tmp_path, name="mine")
    assert folder.path == tmp_path / "runs" / "mine"
    assert [(file.name, file.read_text()) for file in folder.path.iterdir()] == [("begun", "mine")]
    with pytest.raises(FedkdError, match=r"name = 'mine'.*mine exists.*choose another"):
        made(tmp_path, name="mine")
    with pytest.raises(FedkdError, match="name = 'mine'"):
        RunFolder.check(Experiment(run_dir=str(tmp_path / "runs"), name="mine"))
    RunFolder.check(Experiment(run_dir=str(tmp_path / "runs"), name="other"))


def test_a_nameless_run_gets_the_next_free_folder(tmp_path: Path) -> None:
    names = [made(tmp_path).path.name for _ in range(3)]
    assert names == ["default", "default-2", "default-3"]


def test_an_empty_folder_is_free_and_one_with_files_is_not(tmp_path: Path) -> None:
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    (tmp_path / "runs" / "default").mkdir()
    assert made(tmp_path, name="mine").path.name == "mine"
    assert made(tmp_path).path.name == "default"
    with pytest.raises(FedkdError, match="mine exists"):
        made(tmp_path, name="mine")


@pytest.mark.parametrize(
    ("file", "advice"),
    [
        ("experiment.toml", "continue it with fedkd run --resume {}, or choose another name"),
        ("comparison.json", "continue it with fedkd compare --resume {}, or choose another name"),
        ("sweep.json", "continue it with fedkd sweep --resume {}, or choose another name"),
        ("something", "choose another name, or remove the folder"),
    ],
)
def test_the_advice_for_a_folder_that_exists_keeps_what_is_done(
    tmp_path: Path, file: str, advice: str
) -> None:
    path = tmp_path / "runs" / "mine"
    path.mkdir(parents=True)
    (path / file).touch()
    with pytest.raises(FedkdError) as refused:
        made(tmp_path, name="mine")
    assert str(refused.value).endswith(f"exists; {advice.format(path)}")


@pytest.mark.parametrize(
    "how", ["os._exit(9)", "raise KeyboardInterrupt", "raise OSError(28, 'No space')"]
)
def test_what_ends_before_its_first_files_are_written_does_not_take_the_name(
    tmp_path: Path, how: str
) -> None:
    code = (
        "import os, sys; from fedkd.records.folder import RunFolder\n"
        "from fedkd.experiment import Experiment\n"
        "def begin(folder, name):\n"
        "    (folder.path / 'identity.json').touch()\n"
        f"    {how}\n"
        "RunFolder.create(Experiment(run_dir=sys.argv[1], name='mine'), 'default', begin)"
    )
    runs = tmp_path / "runs"
    ended = subprocess.run([sys.executable, "-c", code, str(runs)], capture_output=True)
    assert ended.returncode
    assert not (runs / "mine").exists()
    assert made(tmp_path, name="mine").path == runs / "mine"


def test_of_two_that_make_the_same_folder_at_once_one_is_refused(tmp_path: Path) -> None:
    def slow(folder: RunFolder, name: str) -> None:
        begun(folder, name)
        made(tmp_path, name="mine")

    with pytest.raises(FedkdError, match="mine exists"):
        RunFolder.create(Experiment(run_dir=str(tmp_path / "runs"), name="mine"), "", slow)


def test_a_file_in_the_way_is_named(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("a file")
    with pytest.raises(FedkdError, match=r"run-dir = '.*runs'"):
        made(tmp_path)
    with pytest.raises(FedkdError, match=r"run-dir = '.*runs'"):
        made(tmp_path, name="mine")
    (tmp_path / "runs").unlink()
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "default").write_text("a file")
    with pytest.raises(FedkdError, match="default is in the way"):
        made(tmp_path)


# --- Files ---------------------------------------------------------------------------------------


def test_the_experiment_is_itself_a_config_file(tmp_path: Path) -> None:
    folder = made(tmp_path)
    experiment = Experiment(
        student="mlp-8,lenet", tau=0.5, public_size=77, name="x", strategy_config="a=1 b='2'"
    )
    folder.write_experiment(experiment, environment("cpu", 1))
    text = (folder.path / "experiment.toml").read_text()
    assert "# torch: " in text
    assert "# device: cpu" in text
    assert Experiment.load(read_toml(folder.path / "experiment.toml")) == experiment


def test_the_environment_says_what_a_run_depends_on() -> None:
    found = environment("cuda:0", 3)
    assert {"python", "fedkd", "torch", "torchvision", "flwr", "ray", "numpy"} <= set(found)
    assert found["device"] == "cuda:0"
    assert found["threads"] == 3
    assert all(isinstance(v, str | int) for v in found.values())


def test_rounds_are_appended_line_by_line(tmp_path: Path) -> None:
    folder = made(tmp_path)
    path = folder.path / "rounds.jsonl"
    for number, row in enumerate(ROWS, 1):
        folder.append_round(row)
        text = path.read_text(encoding="utf-8")
        assert text.endswith("\n")
        assert [json.loads(line) for line in text.splitlines()] == ROWS[:number]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_json_does_not_know_is_never_written(tmp_path: Path, value: float) -> None:
    folder = made(tmp_path)
    folder.append_round(ROWS[0])
    folder.write_result({**RESULT, "rounds": 1})
    with pytest.raises(ValueError, match="JSON"):
        folder.append_round({"round": 2, "accuracy": value})
    with pytest.raises(ValueError, match="JSON"):
        folder.write_result({"accuracy": [value]})
    run = Run.load(folder.path)
    assert run.rounds == ROWS[:1]
    assert run.result == {**RESULT, "rounds": 1}


def test_a_file_is_replaced_whole_and_leaves_no_scraps(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    write_json(path, {"a": 1})
    write_json(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 2}
    replace_file(path, b"short")
    assert path.read_bytes() == b"short"
    assert [p.name for p in tmp_path.iterdir()] == ["result.json"]


def test_a_write_that_dies_half_way_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "result.json"
    replace_file(path, b"old")

    def fail(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(FedkdError, match=r"result\.json cannot be written: No space left"):
        replace_file(path, b"new and longer")
    assert path.read_bytes() == b"old"
    folder = RunFolder(tmp_path)
    with pytest.raises(FedkdError, match=r"rounds\.jsonl cannot be written: No space left"):
        folder.append_round(ROWS[0])


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "result.json").mkdir()
    with pytest.raises(FedkdError, match=r"result\.json cannot be written"):
        replace_file(tmp_path / "result.json", b"x")
    with pytest.raises(FedkdError, match=r"rounds\.jsonl cannot be written"):
        RunFolder(tmp_path / "nowhere").append_round(ROWS[0])


# --- Reading -------------------------------------------------------------------------------------


def finished(tmp_path: Path) -> Path:
    folder = made(tmp_path)
    folder.write_experiment(Experiment(seed=7, num_server_rounds=2), environment("cpu", 1))
    for row in ROWS:
        folder.append_round(row)
    folder.write_result(RESULT)
    return folder.path


def test_a_run_is_read_as_it_was_written(tmp_path: Path) -> None:
    path = finished(tmp_path)
    for given in (path, str(path)):
        run = Run.load(given)
        assert run.path == path
        assert run.rounds == ROWS
        assert run.result == RESULT
        assert run.experiment == Experiment(seed=7, num_server_rounds=2)
        assert run.accuracy == 0.75
        assert run.client_accuracy == [0.5, None, 1.0]
        assert run.server_accuracy is None
        assert (run.bytes_up, run.bytes_down) == (2**40, 7)


@pytest.mark.parametrize("missing", ["rounds.jsonl", "result.json"])
def test_a_run_that_is_not_finished_says_what_is_missing(tmp_path: Path, missing: str) -> None:
    path = finished(tmp_path)
    (path / missing).unlink()
    with pytest.raises(FedkdError, match=f"no finished run: {missing} is missing"):
        Run.load(path)
    with pytest.raises(FedkdError, match="nowhere holds no finished run"):
        Run.load(tmp_path / "nowhere")


@pytest.mark.parametrize("broken", ["rounds.jsonl", "result.json"])
def test_a_torn_record_is_named(tmp_path: Path, broken: str) -> None:
    path = finished(tmp_path)
    (path / broken).write_text((path / broken).read_text()[:-20])
    with pytest.raises(FedkdError, match="not valid JSON") as caught:
        Run.load(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_run_without_its_experiment_says_so_when_asked(tmp_path: Path) -> None:
    path = finished(tmp_path)
    (path / "experiment.toml").unlink()
    run = Run.load(path)
    with pytest.raises(FedkdError, match=r"experiment\.toml"):
        _ = run.experiment


# --- The central baseline ------------------------------------------------------------------------


def test_a_central_run_gives_means_over_its_seeds() -> None:
    run = CentralRun(
        path=None,
        seeds=[0, 1, 2],
        teacher_accuracies=[0.9, 0.95, 1.0],
        student_alone_accuracies=[0.6, 0.7, 0.5],
        student_accuracies=[0.8, 0.7, 0.75],
        agreements=[0.5, 0.6, 0.7],
        parameters={"teacher": 7, "student": 3},
        test_size=11,
        seconds={"teacher": 1.0},
        training={},
        soft_label_entropy=[1.0, 1.1, 1.2],
        soft_label_entropy_at_tau=[2.0, 2.1, 2.2],
    )
    assert run.teacher_accuracy == pytest.approx(0.95)
    assert run.student_alone_accuracy == pytest.approx(0.6)
    assert run.student_accuracy == pytest.approx(0.75)
    assert run.gap_closed == pytest.approx((0.75 - 0.6) / (0.95 - 0.6))
    written = run.as_json()
    assert json.loads(json.dumps(written, allow_nan=False)) == written
    assert written["student_accuracies"] == [0.8, 0.7, 0.75]
    assert written["gap_closed"] == run.gap_closed


@pytest.mark.parametrize(
    ("value", "low", "high", "expected"),
    [(0.7, 0.6, 0.8, 0.5), (0.5, 0.6, 0.8, -0.5), (0.9, 0.6, 0.8, 1.5),
     (0.7, 0.8, 0.8, None), (0.7, 0.8, 0.6, None)],
)  # fmt: skip
def test_the_gap_that_is_closed(
    value: float, low: float, high: float, expected: float | None
) -> None:
    closed = gap_closed(value, low, high)
    assert closed == (None if expected is None else pytest.approx(expected))


@pytest.mark.parametrize("text", ["[]", "3", '{"keys": []}', '{"keys": 3}', "{", '{"data": null}'])
def test_a_damaged_identity_is_one_line(tmp_path: Path, text: str) -> None:
    folder = made(tmp_path)
    folder.write_experiment(Experiment(), {})
    (folder.path / "identity.json").write_text(text)
    with pytest.raises(FedkdError, match=r"identity\.json") as refused:
        _ = folder.experiment
    assert "\n" not in str(refused.value)
