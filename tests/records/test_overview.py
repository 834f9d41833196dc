"""What is listed, and how two runs differ, is what their files say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from federation_tools import tiny

import fedkd
from fedkd.cli import main
from fedkd.errors import FedkdError
from fedkd.records.overview import Overview, differences, overviews


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with two federations, a baseline, half a run and what is none."""
    folder = tmp_path_factory.mktemp("runs")
    first = tiny(strategy="DSFL", name="a", run_dir=str(folder), seed=3)
    fedkd.run(first)
    fedkd.run(first.replace(name="b", tau=2.5, num_server_rounds=2))
    fedkd.central(tiny(teacher="mlp-13", name="c", run_dir=str(folder)), [5, 7])
    fedkd.run(tiny(strategy="FedAvg", name="half", run_dir=str(folder)))
    (folder / "half" / "result.json").unlink()
    (folder / "none").mkdir()
    (folder / "torn").mkdir()
    (folder / "torn" / "experiment.toml").write_text("seed = ")
    return folder


def result(folder: Path) -> dict[str, object]:
    found: dict[str, object] = json.loads((folder / "result.json").read_text())
    return found


def test_all_runs_are_listed_with_what_their_results_say(runs: Path) -> None:
    found, skipped = overviews(runs)
    assert [(run.path.name, run.kind, run.is_finished) for run in found] == [
        ("a", "federated", True),
        ("b", "federated", True),
        ("c", "central", True),
        ("half", "federated", False),
    ]
    for run in found[:2]:
        assert run.figures["accuracy"] == result(run.path)["accuracy"]
        assert run.figures["bytes_up"] == result(run.path)["bytes_up"]
    said = result(runs / "c")["student_accuracies"]
    assert isinstance(said, list)
    assert found[2].figures["student_distilled_accuracy"] == pytest.approx(sum(said) / 2)
    (line,) = skipped
    assert "torn" in line
    assert "is not valid TOML" in line


@pytest.mark.parametrize(
    ("wanted", "names"),
    [
        ({"strategy": "dsfl"}, ["a", "b"]),
        ({"tau": "2.5"}, ["b"]),
        ({"strategy": "FedMD"}, []),  # not the baseline either, whose file names the default
        ({"teacher": "mlp-13"}, ["c"]),
        ({"strategy": "FedAvg", "seed": "5"}, ["half"]),
        ({"num-clients": "4"}, []),
    ],
)
def test_runs_are_chosen_by_their_keys(
    wanted: dict[str, str], names: list[str], runs: Path
) -> None:
    assert [run.path.name for run in overviews(runs, wanted)[0]] == names


def test_two_runs_differ_in_keys_and_figures(runs: Path) -> None:
    found = differences(runs / "a", runs / "b")
    assert found.keys == {"tau": (5.0, 2.5), "num-server-rounds": (1, 2)}
    assert found.besides == []
    ours, theirs = result(runs / "a"), result(runs / "b")
    assert found.figures["bytes_up"] == (ours["bytes_up"], theirs["bytes_up"])
    assert found.figures["accuracy"] == (ours["accuracy"], theirs["accuracy"])
    assert Overview.of(runs / "a").experiment.tau == 5.0


def test_what_differs_besides_is_named(runs: Path, tmp_path: Path) -> None:
    other = tiny(strategy="DSFL", seed=3, name="d", dataset="mnist-5k", run_dir=str(tmp_path))
    found = differences(runs / "a", fedkd.run(other).path)
    assert found.keys == {"dataset": ("digits", "mnist-5k")}
    assert "the training images or their labels" in found.besides


def test_the_commands_print_it(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["list", str(runs), "--where", "strategy=DSFL"])
    out, err = capsys.readouterr()
    assert [line.split()[:2] for line in out.splitlines()[1:3]] == [["a", "DSFL"], ["b", "DSFL"]]
    assert "torn" in err
    main(["list", str(runs), "--json"])
    rows = json.loads(capsys.readouterr().out)
    assert [row["kind"] for row in rows] == ["federated", "federated", "central", "federated"]
    assert rows[1]["experiment"]["tau"] == 2.5
    main(["diff", str(runs / "a"), str(runs / "b")])
    out = capsys.readouterr().out
    assert [line.split() for line in out.splitlines() if line.startswith("tau")] == [
        ["tau", "5.0", "2.5"]
    ]
    assert "accuracy" in out
    main(["diff", str(runs / "a"), str(runs / "a"), "--json"])
    assert json.loads(capsys.readouterr().out)["keys"] == {}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["list", "nowhere"], "nowhere cannot be read: No such file or directory"),
        (["list", ".", "--where", "stratgy=DSFL"], "no key 'stratgy' .did you mean 'strategy'"),
        (["list", ".", "--where", "strategy"], "'strategy' must be key=value"),
        (["diff", "nowhere", "nowhere"], "nowhere is not a run folder"),
    ],
)
def test_what_is_not_there_is_one_line(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="2"):
        main(words)
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    with pytest.raises(FedkdError, match=said):
        raise FedkdError(line)
