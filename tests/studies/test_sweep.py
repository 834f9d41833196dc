"""Sweeps against runs of their own, tables made by hand, and interruptions."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from federation_tools import tiny
from paths import ROOT
from sampling import one_in

import fedkd
from fedkd.clients import execute as client
from fedkd.engines import identity
from fedkd.errors import FedkdError
from fedkd.experiment import Experiment
from fedkd.records.folder import RunFolder
from fedkd.studies.sweep import run, training
from fedkd.studies.sweep.folder import Cell, SweepFolder
from fedkd.studies.sweep.grid import parse
from fedkd.studies.sweep.result import Point, Sweep
from fedkd.studies.sweep.run import search, sweep
from fedkd.studies.sweep.training import Trials

CLOSE = 1.5 / 40
"""A test image of a fold of 50 may fall to the other side: see CLOSE of test_side_by_side.py."""

Grid = dict[str, list[Any]]


@pytest.fixture(autouse=True)
def same_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the sources be the same throughout a test, also while somebody edits them."""
    monkeypatch.setattr(identity, "sources_fingerprint", lambda _: "0123456789abcdef")


def federation(folder: Path, **keys: Any) -> Experiment:
    common = {
        "strategy": "DSFL",
        "plan": "stacked-6",
        "run_dir": str(folder),
        "num_server_rounds": 2,
    }
    return tiny(**{**common, **keys})


def central(folder: Path, **keys: Any) -> Experiment:
    common = {
        "teacher": "mlp-11",
        "plan": "stacked-6",
        "run_dir": str(folder),
        "learning_rate": 0.02,
    }
    return tiny(**{**common, **keys})


def watched(monkeypatch: pytest.MonkeyPatch) -> list[list[Cell]]:
    """Return the stacks that are trained from here on."""
    stacks: list[list[Cell]] = []
    honest = Trials._measured

    def measured(work: Trials, cells: Sequence[Cell]) -> Any:
        stacks.append(list(cells))
        return honest(work, cells)

    monkeypatch.setattr(Trials, "_measured", measured)
    return stacks


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (path / "points.jsonl").read_text().splitlines()]


# --- The same numbers as by hand -----------------------------------------------------------------


@pytest.mark.slow
def test_points_are_federations_of_their_own(tmp_path: Path) -> None:
    grid: Grid = {"alpha": [0.3, 1.0], "local_epochs": [1, 2]}
    base = federation(tmp_path, name="mine", tau=2.0)
    found = sweep(base, grid, [5, 8], folds=2)
    assert found.path == tmp_path / "mine"
    assert [point.keys for point in found.points] == [
        dict(zip(grid, values, strict=True)) for values in product(*grid.values())
    ]
    apart = base.replace(name=None, run_dir=str(tmp_path / "apart"))
    for point in found.points[1:3]:
        for s, seed, f in ((0, 5, 1), (1, 8, 0)):
            keys = {**point.keys, "seed": seed, "fold": f"{f + 1}/2"}
            alone = fedkd.run(apart.varied(**keys))
            assert point.accuracies[s][f] == pytest.approx(alone.accuracy, abs=CLOSE)
    assert len({point.accuracy for point in found.points}) > 2
    assert not (found.path / "runs").exists()


def test_points_are_central_runs_of_their_own(tmp_path: Path) -> None:
    grid: Grid = {
        "alpha": [0.0, 0.5, 1.0],
        "learning_rate": [0.001, 0.03],
        "distill_epochs": [1, 3],
    }
    base = central(tmp_path, public_labels=False)
    found = sweep(base, grid, [5, 8], folds=3, of="central")
    for point in (found.points[1], found.points[6], found.points[11]):
        for s, seed, f in ((0, 5, 0), (0, 5, 2), (1, 8, 1)):
            keys = {**point.keys, "seed": seed, "fold": f"{f + 1}/3"}
            alone = fedkd.central(base.varied(**keys), save=False)
            assert point.accuracies[s][f] == pytest.approx(alone.student_accuracy, abs=CLOSE)
            if point.keys["alpha"] == 0:
                assert alone.student_accuracy == alone.student_alone_accuracies[0]
    assert found.best.keys["learning_rate"] == 0.03
    assert found.best.keys["distill_epochs"] == 3


def test_keys_that_no_stack_can_share_are_swept_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stacks = watched(monkeypatch)
    base = federation(tmp_path, num_server_rounds=1)
    found = sweep(base, {"student": ["mlp-5", "mlp-9"], "tau": [1, 3]}, [5], folds=2)
    assert [len(stack) for stack in stacks] == [2, 2, 2, 2]
    apart = base.varied(run_dir=str(tmp_path / "apart"), fold="2/2", student="mlp-9", tau=3.0)
    assert found.points[3].accuracies[0][1] == pytest.approx(fedkd.run(apart).accuracy, abs=CLOSE)


def test_the_step_s_momentum_is_swept(tmp_path: Path) -> None:
    """Momentum is only for sgd, which the experiment says and the grid does not."""
    base = central(tmp_path, optimizer="sgd", learning_rate=0.1, distill_epochs=7, local_epochs=7)
    found = sweep(base, {"momentum": [0.0, 0.9]}, folds=2, of="central")
    assert found.points[0].accuracy != found.points[1].accuracy


@pytest.mark.slow
def test_a_key_without_effect_at_some_points_is_left_out_of_those(tmp_path: Path) -> None:
    """Where nobody attacks, and where shards are equal parts."""
    base = federation(tmp_path, num_server_rounds=1, attack="label-flip", attackers=0.3)
    grid: Grid = {"partition": ["iid", "dirichlet"], "partition_alpha": [1, 7], "attackers": [0, 1]}
    found = sweep(base, grid, folds=2)
    accuracies = [point.accuracies for point in found.points]
    assert accuracies[0:2] == accuracies[2:4]
    honest = base.varied(attackers=0.0, partition="dirichlet", partition_alpha=7.0, fold="2/2")
    alone = fedkd.run(honest.replace(run_dir=str(tmp_path / "apart")))
    assert found.points[6].accuracies[0][1] == pytest.approx(alone.accuracy, abs=CLOSE)


def test_a_value_is_right_or_wrong_beside_the_experiment_s_others(tmp_path: Path) -> None:
    """And not beside the defaults, of ten clients."""
    base = federation(tmp_path, num_server_rounds=1, num_clients=13, train_size=400)
    found = sweep(base, {"quorum": [1, 12]}, folds=2)
    assert [point.keys["quorum"] for point in found.points] == [1, 12]


def test_seeds_with_shards_of_their_own_are_stacks_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stacks = watched(monkeypatch)
    base = federation(tmp_path, num_server_rounds=1)
    sweep(base, {"tau": [1, 3]}, [5, 8], folds=2)
    sweep(base.replace(partition_seed=3), {"tau": [1, 3]}, [5, 8], folds=2)
    sweep(central(tmp_path), {"tau": [1, 3]}, [5, 8], folds=2, of="central")
    assert [len(stack) for stack in stacks] == [2] * 4 + [4] * 2 + [4] * 2


@pytest.mark.slow
def test_a_stack_holds_no_more_models_than_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "MODELS_AT_ONCE", 7)  # two federations of three clients
    stacks = watched(monkeypatch)
    base = federation(tmp_path, num_server_rounds=1)
    found = sweep(base, {"tau": [1, 2, 3, 4, 5]}, folds=2)
    assert [len(stack) for stack in stacks] == [2, 2, 1] * 2
    monkeypatch.setattr(training, "MODELS_AT_ONCE", 2)
    again = sweep(base.replace(name="again"), {"tau": [1, 2, 3, 4, 5]}, folds=2)
    for one, other in zip(found.points, again.points, strict=True):
        assert np.array(one.accuracies) == pytest.approx(np.array(other.accuracies), abs=CLOSE)


@pytest.mark.parametrize("of", ["central", "federation"])
def test_progress_rises_to_one(of: Any, tmp_path: Path) -> None:
    base = central(tmp_path) if of == "central" else federation(tmp_path)
    told: list[float] = []
    sweep(base, {"tau": [1, 3]}, [5, 8], 2, of=of, progress=lambda _, done: told.append(done))
    assert told == sorted(told)
    assert 0 < told[0] < 0.5
    assert told[-1] == pytest.approx(1)


# --- The best point and what is as good ----------------------------------------------------------


def by_hand(
    grid: Grid, table: dict[tuple[Any, ...], list[list[float]]], is_search: bool = False
) -> Sweep:
    points = [Point(dict(zip(grid, keys, strict=True)), a) for keys, a in table.items()]
    seeds, folds = [len(x) for x in (next(iter(table.values())), next(iter(table.values()))[0])]
    base = tiny()
    return Sweep(Path("x"), base, "federation", grid, is_search, list(range(seeds)), folds, points)


def places(found: Sequence[Point]) -> list[tuple[Any, ...]]:
    return [tuple(point.keys.values()) for point in found]


def test_the_mean_the_spread_and_the_best_by_numpy() -> None:
    generator = np.random.default_rng(3)
    values = generator.random((5, 3, 2))
    table = {(n,): values[n].tolist() for n in range(5)}
    found = by_hand({"tau": list(range(5))}, table)
    for n, point in enumerate(found.points):
        assert point.accuracy == pytest.approx(values[n].mean())
        assert point.spread == pytest.approx(values[n].mean(1).std(ddof=1))
    assert found.best.keys == {"tau": int(values.mean((1, 2)).argmax())}
    assert Point({"tau": 1}, [[0.5, 0.7]]).spread is None


def test_the_flat_region_is_joined_to_the_best_and_within_an_error() -> None:
    """Differences to the best of mean d and standard deviation s over n = 4: flat if d ≤ s / 2."""
    best = [[0.90, 0.80], [0.90, 0.80]]

    def worse(by: list[float]) -> list[list[float]]:
        a, b, c, d = by
        return [[0.90 - a, 0.80 - b], [0.90 - c, 0.80 - d]]

    grid: Grid = {"alpha": [0.1, 0.5, 0.9], "tau": [1.0, 3.0]}
    table = {
        (0.1, 1.0): best,
        (0.1, 3.0): worse([0.01, 0.01, 0.01, 0.01]),  # always: no spread at all
        (0.5, 1.0): worse([0.04, -0.02, 0.02, 0.0]),  # d = 0.01, s/2 = 0.0129
        (0.5, 3.0): worse([0.04, -0.01, 0.03, 0.0]),  # d = 0.015, s/2 = 0.0119
        (0.9, 1.0): worse([0.1, 0.1, 0.1, 0.11]),
        (0.9, 3.0): worse([0.04, -0.04, 0.01, 0.0]),  # as good, and beside none that is
    }
    found = by_hand(grid, table)
    for point in found.points:
        differences = (np.array(best) - np.array(point.accuracies)).ravel()
        error = differences.std(ddof=1) / 2
        assert found._is_as_good(point) == (differences.mean() <= error), point
    assert places(found.flat) == [(0.1, 1.0), (0.5, 1.0)]
    assert places(by_hand(grid, table, is_search=True).flat) == [(0.1, 1.0), (0.5, 1.0), (0.9, 3.0)]


def test_the_flat_region_does_not_depend_on_the_order_in_which_values_are_named() -> None:
    """0.9 is no neighbour of 0.1 where 0.5 lies between them."""
    same, bad = [[0.8, 0.8]], [[0.2, 0.2]]
    ordered = by_hand({"alpha": [0.1, 0.5, 0.9]}, {(0.1,): same, (0.5,): bad, (0.9,): same})
    mixed = by_hand({"alpha": [0.1, 0.9, 0.5]}, {(0.1,): same, (0.9,): same, (0.5,): bad})
    assert places(ordered.flat) == [(0.1,)]
    assert places(mixed.flat) == [(0.1,)]


def test_the_region_may_wind_and_equal_points_are_all_in_it() -> None:
    good, bad = [[0.8, 0.8]], [[0.2, 0.21]]
    grid: Grid = {"alpha": [1, 2, 3], "tau": [1, 2, 3]}
    winding = {(1, 1), (1, 2), (1, 3), (2, 3), (3, 3)}
    table = {p: good if p in winding else bad for p in product([1, 2, 3], [1, 2, 3])}
    assert set(places(by_hand(grid, table).flat)) == winding
    assert places([by_hand(grid, table).best]) == [(1, 1)]  # the first of equals
    flat = by_hand(grid, dict.fromkeys(product([1, 2, 3], [1, 2, 3]), good))
    assert len(flat.flat) == 9


def test_what_is_printed_for_machines_is_json(tmp_path: Path) -> None:
    found = sweep(central(tmp_path), {"tau": [1, 3]}, folds=2, of="central")
    said = json.loads(json.dumps(found.as_json(), allow_nan=False))
    assert said["best"]["accuracy"] == found.best.accuracy
    assert [p["keys"] for p in said["points"]] == [{"tau": 1.0}, {"tau": 3.0}]
    assert said["best"]["keys"] in said["flat"]


# --- Going on ------------------------------------------------------------------------------------


def test_a_finished_sweep_trains_nothing_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quick = federation(tmp_path, num_server_rounds=1)
    for of, base in (("central", central(tmp_path)), ("federation", quick)):
        first = sweep(base, {"tau": [1, 3]}, [5], 2, of=of)
        with monkeypatch.context() as patch:
            stacks = watched(patch)
            again = sweep(base, {"tau": [1, 3]}, [5], 2, of=of)
        assert stacks == []
        assert again == first == Sweep.load(first.path)


def test_more_points_and_seeds_train_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = central(tmp_path, name="mine")
    first = sweep(base, {"tau": [1, 3]}, [5], 2, of="central")
    stacks = watched(monkeypatch)
    more = sweep(base, {"tau": [3, 7], "alpha": [0.7]}, [5, 8], 2, of="central")
    assert sum(map(len, stacks)) == 2 * 2 * 2  # other points: these say their α
    again = sweep(base, {"tau": [1, 3, 7]}, [8, 5], 2, of="central")
    trained = {(c.keys["tau"], c.seed, c.fold) for stack in stacks[2:] for c in stack}
    assert trained == set(product([1.0, 3.0, 7.0], [5, 8], [1, 2])) - set(
        product([1.0, 3.0], [5], [1, 2])
    )
    assert again.points[0].accuracies[1] == first.points[0].accuracies[0]
    assert again.points[2].accuracies[0] == more.points[1].accuracies[1]
    assert more.path == first.path == again.path


def test_other_folds_another_base_or_other_code_are_another_sweep(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, grid = central(tmp_path), {"tau": [1, 3]}
    paths = [sweep(base, grid, [5], 2, of="central").path]
    paths.append(sweep(base, grid, [5], 3, of="central").path)
    paths.append(sweep(base.replace(alpha=0.1), grid, [5], 2, of="central").path)
    paths.append(sweep(base.replace(strategy="LocalOnly", num_server_rounds=1), grid, [5], 2).path)
    monkeypatch.setattr(identity, "sources_fingerprint", lambda _: "fedcba9876543210")
    paths.append(sweep(base, grid, [5], 2, of="central").path)
    assert len(set(paths)) == 5
    named = base.replace(name=paths[0].name)
    with pytest.raises(FedkdError, match=f"name = '{paths[0].name}'.*other code"):
        sweep(named, grid, [5], 2, of="central")


class Killed(BaseException):
    """As a process ends."""


def killed_after(monkeypatch: pytest.MonkeyPatch, cells: int) -> None:
    """End a sweep when so many cells have been written down."""
    honest, seen = SweepFolder.append, [0]

    def append(folder: SweepFolder, *told: Any) -> None:
        if seen[0] == cells:
            raise Killed
        seen[0] += 1
        honest(folder, *told)

    monkeypatch.setattr(SweepFolder, "append", append)


@pytest.mark.parametrize("cut", one_in(3, [1, 0, 31]))
@pytest.mark.parametrize("of", ["central", "federation"])
def test_an_interrupted_sweep_goes_on_also_after_a_line_that_was_cut_off(
    of: Any, cut: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever number of bytes of the last line was not written."""
    base = central(tmp_path, name="mine") if of == "central" else federation(tmp_path, name="mine")
    base = base.replace(num_server_rounds=1)
    grid: Grid = {"tau": [1, 3, 5]}
    with monkeypatch.context() as patch:
        killed_after(patch, 4)
        with pytest.raises(Killed):
            sweep(base, grid, [5], 2, of=of)
    path = tmp_path / "mine" / "points.jsonl"
    path.write_bytes(path.read_bytes()[: -cut or None])
    stacks = watched(monkeypatch)
    found = sweep(base, grid, [5], 2, of=of)
    assert sum(map(len, stacks)) == 2 if cut <= 1 else 3
    whole = sweep(base.replace(name="whole"), grid, [5], 2, of=of)
    for one, other in zip(found.points, whole.points, strict=True):
        assert np.array(one.accuracies) == pytest.approx(np.array(other.accuracies), abs=CLOSE)
    assert sum(map(len, stacks)) == 6 + (2 if cut <= 1 else 3)
    assert sweep(base, grid, [5], 2, of=of) == found
    assert not (tmp_path / "mine" / "runs").exists()


def test_an_interrupted_sweep_is_not_loaded_as_if_it_were_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed_after(monkeypatch, 1)
    with pytest.raises(Killed):
        sweep(central(tmp_path, name="mine"), {"tau": [1, 3]}, [5], 2, of="central")
    with pytest.raises(FedkdError, match=r"unfinished|finished sweep"):
        Sweep.load(tmp_path / "mine")


def test_a_folder_without_a_sweep_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FedkdError, match="holds no sweep"):
        Sweep.load(tmp_path)
    (tmp_path / "mine").mkdir()
    with pytest.raises(FedkdError, match="name = 'mine'"):
        sweep(central(tmp_path, name="mine"), {"tau": [1, 3]}, folds=2, of="central")


def test_a_folder_of_another_version_beside_it_is_no_obstacle(tmp_path: Path) -> None:
    """Of which an unnamed sweep cannot tell whether it is the same."""
    first = sweep(central(tmp_path), {"tau": [1, 3]}, folds=2, of="central")
    text = (first.path / "experiment.toml").read_text()
    (first.path / "experiment.toml").write_text(text.replace("tau = ", "temperature = "))
    second = sweep(central(tmp_path), {"tau": [1, 3]}, folds=2, of="central")
    assert second.path != first.path


SCRIPT = """
import sys
sys.path.insert(0, "tests/tools")
from federation_tools import tiny
from fedkd.engines import identity
from fedkd.studies.sweep import run
identity.sources_fingerprint = lambda _: "0123456789abcdef"
base = tiny(strategy="DSFL", plan="stacked-6", run_dir=sys.argv[1], name="mine", num_server_rounds=2)
print("begins", flush=True)
told = lambda what, done: print(done, flush=True)
run.sweep(base, {"tau": [1, 3]}, [5, 8], 2, progress=told)
"""


@pytest.mark.slow
def test_a_sweep_that_was_killed_in_the_middle_of_a_round_goes_on(tmp_path: Path) -> None:
    command = [sys.executable, "-c", SCRIPT, str(tmp_path)]
    root = ROOT
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=root, env=os.environ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line[:1].isdigit() and float(line) > 0.5:
                process.send_signal(signal.SIGKILL)
                break
    assert process.wait() == -signal.SIGKILL
    assert (tmp_path / "mine" / "runs").exists()
    before = lines(tmp_path / "mine")
    assert len(before) == 4
    base = federation(tmp_path, name="mine")
    found = sweep(base, {"tau": [1, 3]}, [5, 8], 2)
    assert lines(tmp_path / "mine")[:4] == before
    whole = sweep(base.replace(name="whole"), {"tau": [1, 3]}, [5, 8], 2)
    for one, other in zip(found.points, whole.points, strict=True):
        assert np.array(one.accuracies) == pytest.approx(np.array(other.accuracies), abs=CLOSE)
    assert not (tmp_path / "mine" / "runs").exists()


# --- When something goes wrong -------------------------------------------------------------------


def test_a_point_that_diverges_is_the_worst_and_says_why(tmp_path: Path) -> None:
    """A step of 10 with a decay of 1 multiplies weights by -9."""
    base = federation(tmp_path, strategy="FedAvg", optimizer="sgd", local_epochs=5)
    grid: Grid = {"learning_rate": [0.3, 10.0], "weight_decay": [0.0, 1.0]}
    found = sweep(base.replace(num_server_rounds=4), grid, folds=2)
    assert found.points[3].accuracy == 0 < 0.15 < found.points[0].accuracy
    assert found.best is found.points[0]
    for line in lines(found.path):
        if line["keys"] == found.points[3].keys:
            assert "finite" in line["failure"]
        if line["keys"] == found.points[0].keys:
            assert line["failure"] is None


def test_a_full_disk_is_no_accuracy_of_nought(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def append_round(folder: RunFolder, row: object) -> None:
        raise FedkdError(f"{folder.path}/rounds.jsonl cannot be written: No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "append_round", append_round)
        with pytest.raises(FedkdError, match="No space left"):
            sweep(federation(tmp_path, name="mine"), {"tau": [1, 3]}, folds=2)
    assert not (tmp_path / "mine" / "points.jsonl").exists()
    assert sweep(federation(tmp_path, name="mine"), {"tau": [1, 3]}, folds=2).best.accuracy > 0.1


def test_clients_that_never_work_are_an_error_and_not_the_worst_point(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a mistake in a term or a model of the user's own is: all points would be as bad."""

    def broken(_: object) -> Any:
        raise NameError("name 'taau' is not defined")

    monkeypatch.setattr(client, "run_phases", broken)
    with pytest.raises(FedkdError, match="taau"):
        sweep(federation(tmp_path, num_server_rounds=3), {"tau": [1, 3]}, folds=2)


def test_an_exception_that_is_nobody_s_fault_ends_the_sweep(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def told(what: str, done: float) -> None:
        raise ArithmeticError("enough")

    with pytest.raises(ArithmeticError, match="enough"):
        sweep(federation(tmp_path), {"tau": [1, 3]}, folds=2, progress=told)


@pytest.mark.parametrize(
    ("keys", "grid", "options", "reason"),
    [
        ({}, {}, {}, "grid is empty"),
        ({}, {"alpha": []}, {}, "alpha = .*at least one"),
        ({}, {"alpha": [0.5, "0.5"]}, {}, "alpha = .*without repeats"),
        ({}, {"alpha": [0.5, 1.5]}, {}, r"alpha = 1.5 \(from the grid\): must be"),
        ({}, {"alhpa": [0.5]}, {}, r"unknown key 'alhpa' \(from the grid\).*alpha"),
        ({}, {"seed": [1, 2]}, {}, "seed cannot be swept"),
        ({}, {"fold": ["1/2"]}, {}, "fold cannot be swept"),
        ({}, {"tau": [1]}, {"folds": 1}, "folds = 1"),
        ({}, {"tau": [1]}, {"seeds": []}, "seeds"),
        ({}, {"tau": [1]}, {"seeds": [3, 3]}, "seeds"),
        ({}, {"tau": [1]}, {"of": "teacher"}, "of = 'teacher'"),
        ({"fold": "1/2"}, {"tau": [1]}, {}, "fold = '1/2'"),
        ({"teacher": "none"}, {"tau": [1]}, {"of": "central"}, "teacher = 'none'"),
        ({}, {"student": ["mlp-8", "mpl-8"]}, {}, "student = 'mpl-8'"),
        ({}, {"strategy": ["DSFL", "DSFX"]}, {}, "DSFX"),
        ({}, {"tau": [1]}, {"folds": 157}, "fold"),
        ({}, {"partition_alpha": [0.1, 1]}, {}, "no effect with partition = 'iid'"),
        ({}, {"momentum": [0, 0.9], "optimizer": ["adam", "adamw"]}, {}, "momentum = 0.9 has no"),
    ],
    ids=str,
)
def test_what_is_not_right_is_refused_before_anything_is_written(
    keys: dict[str, Any], grid: Grid, options: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    base = central(tmp_path, strategy="LocalOnly", num_server_rounds=1).varied(**keys)
    with pytest.raises(FedkdError, match=reason):
        sweep(base, grid, **{"folds": 2, **options})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("alpha=0.3,0.7 tau=1,5", {"alpha": ["0.3", "0.7"], "tau": ["1", "5"]}),
        ("learning-rate=1e-4..1e-1", {"learning_rate": ["1e-4", "1e-1"]}),
    ],
)
def test_a_grid_is_read_from_text(text: str, expected: Any) -> None:
    assert parse(text, is_search=".." in text) == expected
    with pytest.raises(FedkdError, match=r"a search, which needs --trials"):
        parse(text, is_search=".." not in text)


@pytest.mark.parametrize(
    "text", ["", "alpha", "alpha=", "=1", "alpha=1 alpha=2", "alpha=0..1 tau=1,2"]
)
def test_other_text_is_refused(text: str) -> None:
    with pytest.raises(FedkdError, match="vary = "):
        parse(text, is_search=False)


# --- Search --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sweep]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(identity, "sources_fingerprint", lambda _: "0123456789abcdef")
        base = central(tmp_path_factory.mktemp("runs"), name="mine")
        yield search(base, RANGES, 13, [5, 8], 2, of="central")


RANGES: dict[str, Any] = {"learning_rate": (1e-4, 1e-1), "alpha": (0, 1), "distill_epochs": (1, 3)}


def test_a_search_draws_from_its_ranges(searched: Sweep) -> None:
    assert searched.is_search
    assert searched.grid == {
        "learning_rate": [1e-4, 0.1],
        "alpha": [0.0, 1.0],
        "distill_epochs": [1, 3],
    }
    assert len(searched.points) == 13
    rates = np.array([point.keys["learning_rate"] for point in searched.points], dtype=float)
    assert bool(((rates >= 1e-4) & (rates <= 0.1)).all())
    assert bool((rates < 3e-3).sum() > 2)  # on a logarithmic scale: evenly, one in thirty
    assert {type(point.keys["distill_epochs"]) for point in searched.points} == {int}
    assert {point.keys["distill_epochs"] for point in searched.points} <= {1, 2, 3}
    assert np.array(searched.points[0].accuracies).shape == (2, 2)
    assert searched.best.accuracy == max(point.accuracy for point in searched.points)
    assert searched.best in searched.flat


def test_points_of_a_search_are_runs_of_their_own(searched: Sweep) -> None:
    point = searched.points[10]
    keys = {**point.keys, "seed": 8, "fold": "2/2"}
    alone = fedkd.central(searched.experiment.varied(**keys, name=None), save=False)
    assert point.accuracies[1][1] == pytest.approx(alone.student_accuracy, abs=CLOSE)


def test_a_search_is_repeated_point_by_point_from_its_folder(
    searched: Sweep, monkeypatch: pytest.MonkeyPatch
) -> None:
    stacks = watched(monkeypatch)
    again = search(searched.experiment, RANGES, 13, [5, 8], 2, of="central")
    assert stacks == []
    assert again == searched


def test_a_search_is_the_same_in_another_folder(searched: Sweep, tmp_path: Path) -> None:
    base = searched.experiment.replace(run_dir=str(tmp_path))
    again = search(base, RANGES, 13, [5, 8], 2, of="central")
    assert again.points == searched.points


def test_an_interrupted_search_goes_on_as_it_would_have(
    searched: Sweep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = searched.experiment.replace(run_dir=str(tmp_path))
    with monkeypatch.context() as patch:
        killed_after(patch, 37)
        with pytest.raises(Killed):
            search(base, RANGES, 13, [5, 8], 2, of="central")
    again = search(base, RANGES, 13, [5, 8], 2, of="central")
    assert [point.keys for point in again.points] == [point.keys for point in searched.points]


@pytest.mark.parametrize(
    ("ranges", "count", "reason"),
    [
        ({"alpha": (0.9, 0.1)}, 3, "LOW must be below HIGH"),
        ({"alpha": (0.1, 0.5, 0.9)}, 3, r"LOW\.\.HIGH"),
        ({"optimizer": ("adam", "sgd")}, 3, r"LOW\.\.HIGH"),
        ({"alpha": (0, 1)}, 0, "trials = 0"),
        ({"alpha": (0, 2)}, 3, "alpha = 2"),
    ],
    ids=str,
)
def test_other_ranges_are_refused(
    ranges: dict[str, Any], count: int, reason: str, tmp_path: Path
) -> None:
    with pytest.raises(FedkdError, match=reason):
        search(central(tmp_path), ranges, count, folds=2, of="central")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("bounds", [(0.12346, 0.12348), (0.99991, 0.99999)], ids=str)
def test_a_suggestion_stays_within_its_bounds(bounds: tuple[float, float]) -> None:
    study = run._study(3)
    for _ in range(31):
        value = run._suggested(study.ask(), "alpha", bounds)
        assert bounds[0] <= float(value) <= bounds[1]


def test_a_search_without_optuna_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(FedkdError, match=r"pip install 'fedkd\[optuna\]'"):
        search(central(tmp_path), {"alpha": (0, 1)}, 3, of="central")


def test_two_processes_do_not_run_the_same_sweep(tmp_path: Path) -> None:
    base, grid = central(tmp_path), {"tau": [1, 3]}
    first = sweep(base, grid, [5], 2, of="central")
    settings = (first.path / "sweep.json").read_text()
    with (
        SweepFolder(first.path).locked(),
        pytest.raises(FedkdError, match="is being run by another process"),
    ):
        sweep(base, {"tau": [1, 3, 7]}, [5], 2, of="central")
    assert (first.path / "sweep.json").read_text() == settings
    assert len(sweep(base, {"tau": [1, 3, 7]}, [5], 2, of="central").points) == 3
