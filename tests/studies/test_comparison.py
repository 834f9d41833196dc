"""Methods side by side are the runs that each would be alone."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from importlib.metadata import version
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from federation_tools import digits_comparison
from rich.console import Console
from scipy import stats

import fedkd
from fedkd.records import Run
from fedkd.records.folder import RunFolder
from fedkd.records.results import CentralRun
from fedkd.registry import find
from fedkd.studies.comparison.differences import with_differences
from fedkd.studies.comparison.entries import (
    Entry,
    Point,
    counted,
    curve,
    reached,
    target_of,
    with_gaps,
)
from fedkd.studies.comparison.methods import default_methods
from fedkd.studies.comparison.result import Comparison
from fedkd.studies.comparison.tables import notes
from strategies.dsfl import DSFL

EXPERIMENT = digits_comparison()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


BOTH = EXPERIMENT.replace(strategy="DSFL", strategy_config="sharpening=mean", name="both")
METHODS = ["teacher", "student-alone", "student distilled", "local", "fedavg", "ds-fl"]


@pytest.fixture(scope="module")
def comparison(folder: Path) -> fedkd.Comparison:
    return fedkd.compare(BOTH.replace(run_dir=str(folder)), METHODS, [0, 3])


@pytest.fixture
def copy(comparison: fedkd.Comparison, folder: Path, tmp_path: Path) -> Path:
    """Return a copy of all folders, in which something may be changed."""
    return shutil.copytree(folder, tmp_path / "moved" / "runs")


def made(folder: Path) -> set[str]:
    """Return the names of the run folders in a folder."""
    return {path.parent.name for path in folder.glob("*/experiment.toml")}


def test_each_method_is_the_run_it_would_be_alone(
    comparison: fedkd.Comparison, tmp_path: Path
) -> None:
    for method, config in {
        "LocalOnly": "none",
        "FedAvg": "none",
        "DSFL": "sharpening=mean",
    }.items():
        alone = fedkd.run(
            EXPERIMENT.replace(
                strategy=method, strategy_config=config, seed=3, run_dir=str(tmp_path)
            )
        )
        together = comparison.runs[method][1]
        assert together.client_accuracy == alone.client_accuracy
        assert (together.bytes_up, together.bytes_down) == (alone.bytes_up, alone.bytes_down)
    pooled = EXPERIMENT.replace(local_epochs=2, distill_epochs=2)
    baseline = fedkd.central(pooled, [0, 3], save=False)
    assert comparison["teacher"].accuracies == baseline.teacher_accuracies
    assert comparison["student alone"].accuracies == baseline.student_alone_accuracies
    assert comparison["student distilled"].accuracies == baseline.student_accuracies


def test_all_methods_share_shards_and_initial_weights(comparison: fedkd.Comparison) -> None:
    """After one round of revisit, before anything has been exchanged, FedAvg and local only agree."""
    first = {
        method: [run.rounds[0]["client_accuracy_after_revisit"] for run in runs]
        for method, runs in comparison.runs.items()
    }
    sampled = {m: [run.rounds[0]["sampled"] for run in runs] for m, runs in comparison.runs.items()}
    assert first["LocalOnly"] == first["FedAvg"]
    assert len({str(s) for s in sampled.values()}) == 1


def test_the_entries_sum_up_the_runs(comparison: fedkd.Comparison) -> None:
    entry, runs = comparison["DSFL"], comparison.runs["DSFL"]
    first, second = (run.accuracy for run in runs)
    assert entry.accuracies == [first, second]
    assert entry.accuracy == pytest.approx((first + second) / 2)
    assert entry.spread == pytest.approx(abs(first - second) / 2**0.5)
    assert entry.worst_decile == pytest.approx(
        sum(min(a for a in run.client_accuracy if a is not None) for run in runs) / 2
    )
    low = comparison["local only"].accuracy
    students = [comparison["student distilled"], comparison["student alone"]]
    better = max(students, key=lambda student: student.accuracy)
    assert entry.gap_to == better.method
    assert entry.gap_closed == pytest.approx((entry.accuracy - low) / (better.accuracy - low))
    assert entry.gap_low is None  # two seeds
    assert comparison["local only"].gap_closed is None
    assert comparison["local only"].bytes_up == 0
    assert comparison["FedAvg"].server_accuracies == comparison["FedAvg"].accuracies


def test_a_comparison_is_json_and_lies_in_run_folders(
    comparison: fedkd.Comparison, folder: Path
) -> None:
    parsed = json.loads(json.dumps(comparison.as_json(), allow_nan=False))
    assert [m["method"] for m in parsed["methods"]][:3] == [
        "teacher",
        "student-alone",
        "student-distilled",
    ]
    assert parsed["test_size"] == 359
    assert {path.name for path in folder.iterdir()} == {
        "both",
        "both-central",
        *(f"both-{m}-seed{s}" for m in ("localonly", "fedavg", "dsfl") for s in (0, 3)),
    }


@pytest.mark.parametrize(
    ("method", "reason"),
    [("techer", "did you mean 'teacher'"), ("DSLF", "did you mean 'DSFL'"), ("x.py:Y", "no such")],
)
def test_a_method_that_is_none_is_named_before_any_work(
    tmp_path: Path, method: str, reason: str
) -> None:
    with pytest.raises(fedkd.FedkdError, match=reason):
        fedkd.compare(EXPERIMENT.replace(run_dir=str(tmp_path)), ["LocalOnly", method])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("keys", "methods", "seeds", "reason"),
    [
        ({"strategy_config": "sharpening=mean"}, ["DSFL"], [0], "strategy-config.*not compared"),
        ({}, ["DSFL", "ds-fl"], [0], "methods = 'dsfl,dsfl'.*without repeats"),
        ({}, [], [0], "methods = ''"),
        ({}, ["DSFL"], [3, 3], "seeds = '3,3'"),
        ({"teacher": "none"}, ["teacher"], [0], "teacher = 'none'"),
        ({"student": "mlp-8,mlp-9"}, ["student-alone"], [0], "student = 'mlp-8,mlp-9'"),
    ],
)
def test_what_cannot_be_compared_is_refused_before_any_work(
    tmp_path: Path, keys: dict[str, str], methods: list[str], seeds: list[int], reason: str
) -> None:
    with pytest.raises(fedkd.FedkdError, match=reason):
        fedkd.compare(EXPERIMENT.replace(run_dir=str(tmp_path), **keys), methods, seeds)
    assert list(tmp_path.iterdir()) == []


def test_without_a_single_teacher_only_the_federated_methods_are_compared() -> None:
    federated = ["LocalOnly", "FedAvg", "FedMD", "DSFL"]
    assert default_methods(EXPERIMENT.replace(teacher="none")) == federated
    assert default_methods(EXPERIMENT.replace(student="mlp-8,mlp-9")) == federated
    assert default_methods(EXPERIMENT)[3:] == federated


# --- The comparison's own record ------------------------------------------------------------------


def test_a_comparison_is_rebuilt_from_its_run_folders(comparison: fedkd.Comparison) -> None:
    again = Comparison.load(comparison.path)
    assert again == comparison
    assert again.as_json() == comparison.as_json()
    record = json.loads((comparison.path / "comparison.json").read_text())
    assert record["runs"]["DSFL"] == ["../both-dsfl-seed0", "../both-dsfl-seed3"]
    assert "accuracies" not in str(record)


def test_runs_may_be_moved(comparison: fedkd.Comparison, copy: Path) -> None:
    moved = Comparison.load(copy / "both")
    assert moved.rows == comparison.rows
    assert moved.sentences == comparison.sentences
    assert {run.path.parent for run in moved.runs["FedAvg"]} == {copy}


def test_what_is_no_comparison_is_refused(copy: Path, tmp_path: Path) -> None:
    with pytest.raises(fedkd.FedkdError, match=r"nowhere holds no comparison: comparison\.json"):
        Comparison.load(tmp_path / "nowhere")
    shutil.rmtree(copy / "both-fedavg-seed3")
    with pytest.raises(fedkd.FedkdError, match="both-fedavg-seed3 holds no finished run"):
        Comparison.load(copy / "both")
    (copy / "both" / "comparison.json").write_text('{"experiment": {}}')
    with pytest.raises(fedkd.FedkdError, match=r"both: comparison\.json: methods is missing"):
        Comparison.load(copy / "both")


def test_a_name_of_something_else_is_refused_before_any_work(copy: Path) -> None:
    before = made(copy)
    for keys in ({"tau": 2.0}, {"name": "both-central"}):
        with pytest.raises(fedkd.FedkdError, match=r"name = 'both.*choose another name"):
            fedkd.compare(BOTH.replace(run_dir=str(copy), **keys), ["DSFL"], [0])
    assert made(copy) == before


# --- Runs that are there already ------------------------------------------------------------------


def test_finished_runs_are_not_made_again(comparison: fedkd.Comparison, copy: Path) -> None:
    before = made(copy)
    again = fedkd.compare(BOTH.replace(run_dir=str(copy)), METHODS, [0, 3])
    assert again.rows == comparison.rows
    assert again.reused == 8
    assert "8 of 8 runs existed already." in again.notes
    assert made(copy) == before


def test_only_what_is_missing_is_made(comparison: fedkd.Comparison, copy: Path) -> None:
    before = made(copy)
    more = fedkd.compare(
        EXPERIMENT.replace(run_dir=str(copy), profile=True),
        ["student-distilled", "fedmd", "fedavg", "ds-fl"],
        [3, 5, 0],
    )
    # DSFL has its default settings here. The central baseline is made of the new seed only.
    assert made(copy) - before == {
        "central-digits",
        *(f"fedmd-digits-seed{seed}" for seed in (0, 3, 5)),
        *(f"dsfl-digits-seed{seed}" for seed in (0, 3, 5)),
        "fedavg-digits-seed5",
    }
    assert more.reused == 4
    assert more.path == copy / "compare-digits"
    assert CentralRun.load(copy / "central-digits").seeds == [5]
    first, last = comparison["student-distilled"].accuracies
    assert more["student-distilled"].accuracies[::2] == [last, first]
    assert more["FedAvg"].accuracies[::2] == comparison["FedAvg"].accuracies[::-1]
    assert more.central is not None
    assert more.central.path is None
    assert len(more.central.training["teacher"]["loss"]) == 3
    assert Comparison.load(more.path) == more


def test_a_run_of_other_code_is_made_again_and_half_a_run_goes_on(copy: Path) -> None:
    other, half = copy / "both-localonly-seed0", copy / "both-fedavg-seed0"
    identity = json.loads((other / "identity.json").read_text())
    identity["software"]["torch"] = "2.0.0"
    (other / "identity.json").write_text(json.dumps(identity))
    whole = Run.load(half)
    (half / "result.json").unlink()
    again = fedkd.compare(BOTH.replace(run_dir=str(copy)), ["dsfl", "local", "fedavg"], [0, 3])
    assert again.reused == 4
    assert again.remark == (
        f"runs made again since something changed: 1 as of torch {version('torch')}, was 2.0.0"
    )
    names = {method: [run.path.name for run in runs] for method, runs in again.runs.items()}
    assert names == {
        "DSFL": ["both-dsfl-seed0", "both-dsfl-seed3"],
        "LocalOnly": ["both-localonly-seed0-2", "both-localonly-seed3"],
        "FedAvg": ["both-fedavg-seed0", "both-fedavg-seed3"],
    }
    assert again.runs["FedAvg"][0].rounds == whole.rounds
    assert again.runs["FedAvg"][0].client_accuracy == whole.client_accuracy
    assert (half / "resumptions.jsonl").is_file()


@pytest.mark.parametrize("keys", [{"tau": 2.0}, {"batch_size": 61}, {"plan": "loop"}])
def test_another_experiment_is_another_run(copy: Path, keys: dict[str, Any]) -> None:
    again = fedkd.compare(
        EXPERIMENT.replace(run_dir=str(copy), **keys), ["student-alone", "local"], [0]
    )
    assert again.reused == 0


STRATEGY = """
import fedkd
from fedkd.strategy import Facts

class Mine(fedkd.DistillationStrategy):
    facts = Facts(paper="none", up="4 P C", down="4 P C")

    def aggregate(self, labels):
        return labels.mean_logits() * {factor}
"""


def test_a_users_strategy_is_run_again_if_its_file_has_changed(tmp_path: Path) -> None:
    file = tmp_path / "mine_for_reuse.py"
    experiment = EXPERIMENT.replace(run_dir=str(tmp_path / "runs"), num_server_rounds=1)
    reused = []
    for factor in (1, 1, 3):
        if factor != 1 or not file.exists():
            file.write_text(STRATEGY.format(factor=factor))
        reused.append(fedkd.compare(experiment, [f"{file}:Mine"]).reused)
    assert reused == [0, 1, 0]


NET = """
from torch import nn

def net(input_shape, num_classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, num_classes))
"""


def test_a_users_model_is_run_again_once_it_has_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "net_for_reuse.py").write_text(NET)
    monkeypatch.syspath_prepend(tmp_path)
    experiment = EXPERIMENT.replace(run_dir=str(tmp_path / "runs"), student="net_for_reuse:net")
    experiment = experiment.replace(num_server_rounds=1)
    assert [fedkd.compare(experiment, ["local"]).reused for _ in range(2)] == [0, 1]
    import net_for_reuse  # type: ignore[import-not-found]

    exec(NET.replace("num_classes)", "num_classes, bias=False)"), vars(net_for_reuse))
    again = fedkd.compare(experiment, ["local"])
    assert again.reused == 0
    assert again.remark == (
        "runs made again since something changed: 1 as of the code of net_for_reuse:net; "
        "the initial weights of net_for_reuse:net, seed 0"
    )
    assert fedkd.compare(experiment, ["local"]).reused == 1


CALL = """
import sys, fedkd
experiment = fedkd.Experiment.load(fedkd.experiment.read_toml(sys.argv[1]))
print("begun", flush=True)
fedkd.compare(experiment, ["teacher", "local", "fedavg", "dsfl"], [0, 1])
"""


@pytest.mark.slow
def test_a_comparison_that_was_killed_goes_on(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    experiment = EXPERIMENT.replace(run_dir=str(runs), num_server_rounds=3, name="killed")
    lines = [f"{key} = {json.dumps(value)}" for key, value in experiment.flat().items()]
    (tmp_path / "e.toml").write_text("\n".join(lines))
    process = subprocess.Popen([sys.executable, "-c", CALL, str(tmp_path / "e.toml")])
    deadline = time.monotonic() + 100
    while len(list(runs.glob("*/result.json"))) < 3 and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    finished = {path.parent.name for path in runs.glob("*/result.json")}
    assert 3 <= len(finished) < 7
    stamps = {name: (runs / name / "result.json").stat().st_mtime_ns for name in finished}

    methods = ["teacher", "local", "fedavg", "dsfl"]
    ended = fedkd.compare(experiment, methods, [0, 1])
    assert ended.reused == len(finished) + 1  # the central baseline has two seeds
    assert {n: (runs / n / "result.json").stat().st_mtime_ns for n in finished} == stamps
    (plan,) = {run.experiment.plan for each in ended.runs.values() for run in each}
    whole = experiment.replace(run_dir=str(tmp_path / "whole"), name=None, plan=plan)
    straight = fedkd.compare(whole, methods[1:], [0, 1])
    for method in methods[1:]:
        assert ended[method].client_accuracies == straight[method].client_accuracies
        assert ended[method].bytes_to_target == straight[method].bytes_to_target


# --- Numbers --------------------------------------------------------------------------------------


def test_differences_are_those_of_clients(comparison: fedkd.Comparison) -> None:
    """Written out from result.json."""
    entry = comparison["DSFL"]
    assert comparison.reference == "LocalOnly"
    assert comparison["local"].difference is None
    assert entry.difference is not None
    ours, theirs = comparison.runs["DSFL"], comparison.runs["LocalOnly"]
    by_seed = []
    for mine, their in zip(ours, theirs, strict=True):
        pairs = zip(mine.client_accuracy, their.client_accuracy, strict=True)
        by_seed.append(sum((a or 0.0) - (b or 0.0) for a, b in pairs) / 3)
    assert entry.difference.by_seed == pytest.approx(by_seed)
    assert entry.difference.mean == pytest.approx(sum(by_seed) / 2)
    assert entry.difference.mean == pytest.approx(entry.accuracy - comparison["LocalOnly"].accuracy)
    assert (entry.difference.low, entry.difference.p_value) == (None, None)
    assert comparison.notes[0] == "No intervals with 2: they take 3 seeds, and 6 to be of use."


def with_three_seeds(comparison: fedkd.Comparison) -> list[Entry]:
    """Return the entries with a third seed, made up, and compared again."""
    third = {"teacher": 0.9, "student-alone": 0.81, "student-distilled": 0.83}
    thirds = third | {"LocalOnly": 0.32, "FedAvg": 0.55, "DSFL": 0.61}
    entries = [
        replace(
            entry,
            accuracies=[*entry.accuracies, thirds[entry.method]],
            client_accuracies=entry.client_accuracies
            and [*entry.client_accuracies, [thirds[entry.method]] * 3],
        )
        for entry in comparison.entries
    ]
    return with_differences(with_gaps(entries, comparison.central), "LocalOnly", None)


def test_from_three_seeds_on_differences_are_tested(comparison: fedkd.Comparison) -> None:
    """With scipy's tests, and Holm's correction for five comparisons written out."""
    entries = {entry.method: entry for entry in with_three_seeds(comparison)}
    found = {m: d for m, e in entries.items() if (d := e.difference) is not None}
    tests = {m: stats.ttest_1samp(each.by_seed, 0) for m, each in found.items()}
    for method, each in found.items():
        assert len(each.by_seed) == 3
        assert each.p_value == pytest.approx(tests[method].pvalue)
        expected = tests[method].confidence_interval(0.95)
        assert (each.low, each.high) == pytest.approx((expected.low, expected.high))
    ranked = sorted(found, key=lambda m: tests[m].pvalue)
    least = 0.0
    for rank, method in enumerate(ranked):
        least = max(least, min(1.0, tests[method].pvalue * (5 - rank)))
        assert found[method].p_holm == pytest.approx(least)
    said = notes([*entries.values()], 3, None, None)
    assert said[0] == "Intervals and p: paired t over 3 seeds, p corrected for 5 comparisons."
    assert said[1].startswith("Smallest difference that so many seeds find in 4 of 5 experiments: ")
    gap = entries["FedAvg"]
    assert gap.gap_low is None or (gap.gap_low < (gap.gap_closed or 0) < (gap.gap_high or 0))


@pytest.mark.parametrize(
    ("strategy", "teacher"),
    [
        *(("DSFL", teacher) for teacher in ("none", "mlp-11")),
        *(("FedAvg", teacher) for teacher in ("none", "mlp-11")),
        *(("FedMD", "mlp-11"), ("FD", "none"), ("Cronus", "mlp-11"), ("LocalOnly", "none")),
    ],
)
def test_a_point_is_where_a_shorter_run_would_have_ended(
    tmp_path: Path, strategy: str, teacher: str
) -> None:
    experiment = EXPERIMENT.replace(strategy=strategy, run_dir=str(tmp_path), plan="stacked")
    experiment = experiment.replace(teacher=teacher, num_server_rounds=3)
    run, shorter = fedkd.run(experiment), fedkd.run(experiment.replace(num_server_rounds=2))
    points = curve(run, counted(find(strategy), has_teacher=teacher != "none"))
    assert [point.round for point in points] == [1, 2, 3]
    assert points[1].accuracy == pytest.approx(shorter.accuracy, abs=1e-12)
    assert points[1].payload == shorter.bytes_up + shorter.bytes_down
    assert points[2].accuracy == run.accuracy
    assert points[2].payload == run.bytes_up + run.bytes_down
    third = reached(points, run.accuracy)
    assert third is not None
    assert third.accuracy >= run.accuracy
    assert reached(points, 1.01) is None


def test_a_target_that_is_lost_again_was_not_reached() -> None:
    points = [Point(n, a, n) for n, a in enumerate([0.3, 0.7, 0.5, 0.6, 0.8], 1)]
    assert reached(points, 0.6) == points[3]
    assert reached(points, 0.7) == points[4]
    assert reached(points, 0.2) == points[0]
    assert reached([*points, Point(6, 0.1, 6)], 0.2) is None


def test_the_target_is_a_share_of_the_central_student(comparison: fedkd.Comparison) -> None:
    entries = {entry.method: entry for entry in comparison.entries}
    alone = replace(entries["student-alone"], accuracies=[0.6, 0.7])
    distilled = replace(entries["student-distilled"], accuracies=[0.5, 0.7])
    rest = [entries["LocalOnly"], entries["DSFL"], entries["teacher"]]
    both = [*rest, distilled, alone]
    target, where = target_of(None, both) or (0, None)
    assert target == pytest.approx(0.9 * 0.65)
    assert where == "0.9 of the accuracy of student alone"
    target, where = target_of("0.5c", [*rest, distilled]) or (0, None)
    assert target == pytest.approx(0.3)
    assert where == "0.5 of the accuracy of student distilled"
    assert target_of(0.37, rest) == (0.37, None)
    assert target_of(1, rest) == (1, None)
    assert target_of(None, rest) is None
    assert comparison.asked_target is None
    assert comparison.target_reason is not None


def test_a_gap_that_is_none_is_said_once(comparison: fedkd.Comparison) -> None:
    entries = [replace(e, gap_closed=None) for e in comparison.entries]
    found = [
        replace(e, accuracies=[0.1, 0.1]) if e.method.startswith("student") else e for e in entries
    ]
    local = next(entry for entry in found if entry.method == "LocalOnly")
    said = [note for note in notes(found, 2, None, None) if "gap" in note]
    assert said == [
        "The gap closed is n/a: student alone (10 %) is not better than local only "
        f"({100 * round(local.accuracy, 3):g} %)."
    ]
    assert not [note for note in comparison.notes if "n/a" in note]


# --- What is asked for ----------------------------------------------------------------------------


def test_reference_and_target_are_as_asked(copy: Path) -> None:
    experiment = BOTH.replace(run_dir=str(copy), name=None)
    one = fedkd.compare(experiment, [DSFL, "local"], [0], reference=DSFL, target=35)
    assert (one.reference, one.target, one.target_reason) == ("DSFL", 0.35, None)
    local = one["LocalOnly"]
    assert local.sentence is not None
    assert re.match(r"Local only sends nothing and ends .* than DSFL", local.sentence)
    assert one["DSFL"].sentence is None
    assert Comparison.load(one.path) == one
    share = fedkd.compare(experiment, [DSFL, "student-alone"], [0], target="0.8c")
    assert share.asked_target == "0.8c"
    assert share.target == pytest.approx(0.8 * share["student alone"].accuracy, abs=5e-4)
    assert Comparison.load(share.path) == share
    again = fedkd.compare(experiment, ["dsfl", "fedavg"], [0], target=0.35)
    assert again.target == 0.35
    assert again.reference == "DSFL"  # the first, without local only
    assert again["DSFL"].rounds_to_target == one["DSFL"].rounds_to_target


@pytest.mark.parametrize(
    ("keys", "arguments", "reason"),
    [
        ({}, {"reference": "fedavg"}, "reference = 'fedavg'.*LocalOnly, DSFL"),
        ({}, {"target": 0}, "target = 0: must be"),
        ({}, {"target": 100.5}, r"target = 100\.5: must be"),
        ({}, {"jobs": 0}, "jobs = 0: must be a whole number ≥ 1"),
        ({"engine": "flower"}, {"jobs": 2}, "jobs = 2 contradicts engine = 'flower'.*set jobs = 1"),
        ({"num_workers": 2}, {"jobs": 2}, "jobs = 2 contradicts num-workers"),
        ({"student": "__main__:net"}, {"jobs": 2}, "jobs = 2 contradicts student = '__main__:net'"),
    ],
)
def test_what_cannot_be_asked_is_refused_before_any_work(
    tmp_path: Path, keys: dict[str, Any], arguments: dict[str, Any], reason: str
) -> None:
    with pytest.raises(fedkd.FedkdError, match=reason):
        fedkd.compare(
            EXPERIMENT.replace(run_dir=str(tmp_path), **keys), ["local", "DSFL"], [0], **arguments
        )
    assert list(tmp_path.iterdir()) == []


def test_a_strategy_with_settings_is_named_by_its_class(tmp_path: Path) -> None:
    with pytest.raises(fedkd.FedkdError, match="settings go to strategy-config"):
        fedkd.compare(EXPERIMENT.replace(run_dir=str(tmp_path)), [DSFL()])  # type: ignore[list-item]


def test_the_tables_are_at_most_100_wide_and_say_what_the_entries_say(
    comparison: fedkd.Comparison,
) -> None:
    out = StringIO()
    Console(file=out, width=200).print(comparison.table())
    lines = out.getvalue().splitlines()
    assert max(len(line.rstrip()) for line in lines) <= 100
    entry: Entry = comparison["DSFL"]
    assert entry.difference is not None
    assert entry.spread is not None
    (accuracy, cost) = [line for line in lines if line.strip().startswith("DSFL ")]
    assert f"{100 * entry.accuracy:.1f} ± {100 * entry.spread:.1f}" in accuracy
    assert f"{100 * entry.difference.mean:+.1f}".replace("-", "−") in accuracy
    assert f"{(entry.bytes_up or 0) / 1000:.1f} kB" in cost
    assert "− local only" in out.getvalue()
    assert any(line.startswith(" teacher") and "–" in line for line in lines)


def test_where_runs_lie_is_read_from_their_folders(comparison: fedkd.Comparison) -> None:
    run = comparison.runs["DSFL"][0]
    assert RunFolder(run.path).experiment.strategy_config == "sharpening=mean"
    assert comparison.central is not None
    assert comparison.central.path == comparison.central_folders[0]
