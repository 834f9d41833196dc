"""Federations side by side against the same federations alone."""

from __future__ import annotations

import signal
import threading
from collections.abc import Sequence
from pathlib import Path
from time import monotonic
from typing import Any

import pytest
import torch
from federation_tools import tiny
from flwr.app import RecordDict
from sampling import one_in
from torch import nn

from fedkd.clients import execute as client
from fedkd.clients.run_phases import run_phases
from fedkd.clients.stack import Stack
from fedkd.engines import run as runner
from fedkd.engines import side_by_side as engine
from fedkd.engines.answering import store_of
from fedkd.engines.run import run, run_side_by_side
from fedkd.errors import FedkdError
from fedkd.experiment import Experiment
from fedkd.records import Row, Run
from fedkd.records.callbacks import Callback, EachRound
from fedkd.records.predictions import Tested as Kept  # a name that pytest does not collect
from fedkd.registry import strategies

CLOSE = 2e-3
"""Relative. Step sizes of their own take another of Adam's two forms, whose last bits differ. After
three rounds that is 1e-7 of most numbers, and 1e-4 of a calibration error, as confidences change bins.
"""

ONE_IMAGE = 1 / 61
"""An image on the border between two classes may fall to the other side."""

RARE_IMAGE = 0.1
"""The same where an image of a class counts by how much of that class the client has."""

DIFFERENT: list[dict[str, Any]] = [
    {"alpha": 0.5, "tau": 3.0, "learning_rate": 0.003, "local_epochs": 2, "seed": 7},
    {"alpha": 1.0, "tau": 5.0, "learning_rate": 0.02, "distill_epochs": 2, "seed": 5},
    {"alpha": 0.0, "tau": 1.0, "weight_decay": 0.01, "seed": 5},
]
ALIKE: list[dict[str, Any]] = [{"seed": 7}, {"seed": 2}, {"seed": 5}]
"""Nothing that changes a form: these are the same to the last bit."""


def shared(folder: Path, **keys: Any) -> Experiment:
    """Return what the federations of a test have in common: the shards above all."""
    common = {"num_server_rounds": 3, "partition": "dirichlet", "partition_alpha": 0.5}
    plan = {"partition_seed": 4, "plan": "stacked-4", "run_dir": str(folder)}
    return tiny(**{**common, **plan, **keys})


def side_by_side(base: Experiment, keys: Sequence[dict[str, Any]]) -> list[Run | Exception]:
    return run_side_by_side([base.replace(name=f"t{n}", **k) for n, k in enumerate(keys)])


def alone(base: Experiment, keys: Sequence[dict[str, Any]]) -> list[Run]:
    return [run(base.replace(name=f"a{n}", **k)) for n, k in enumerate(keys)]


def records(found: Run | Exception) -> list[Row]:
    assert isinstance(found, Run), repr(found)
    return [*found.rounds, found.result]


ROUGH = ("seconds", "environment", "wire_bytes")


def assert_close(name: str, given: Any, expected: Any, exactly: bool) -> None:
    if isinstance(expected, float) and not exactly:
        within = CLOSE * abs(expected)
        if "accuracy" in name or name == "agreement":
            within = RARE_IMAGE if "own" in name else ONE_IMAGE
        assert given == pytest.approx(expected, abs=max(within, 1e-6)), name
    elif isinstance(expected, list):
        assert len(given) == len(expected), name
        for one, other in zip(given, expected, strict=True):
            assert_close(name, one, other, exactly)
    else:
        assert given == expected, name


def assert_same(given: Run | Exception, expected: Run, exactly: bool = False) -> None:
    rows, others = records(given), records(expected)
    assert len(rows) == len(others)
    for row, other in zip(rows, others, strict=True):
        assert row.keys() == other.keys()
        for name, value in other.items():
            if not name.startswith(ROUGH):
                assert_close(name, row[name], value, exactly)


def server_model(strategy: str) -> dict[str, str]:
    facts = strategies()[strategy].facts
    return {"server_model": "mlp-11"} if facts.server_model == "required" else {}


# --- The same numbers ----------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", one_in(6, sorted(strategies())))
def test_federations_side_by_side_are_those_alone(strategy: str, tmp_path: Path) -> None:
    base = shared(tmp_path, strategy=strategy, **server_model(strategy))
    found, apart = side_by_side(base, DIFFERENT), alone(base, DIFFERENT[:2])
    for one, other in zip(found[:2], apart, strict=True):
        assert_same(one, other)
    norms = {tuple(row.get("gradient_norm_revisit", 0) for row in each.rounds) for each in apart}
    assert len(norms) > 1 or strategy == "FedGEMS"  # they do differ from each other


@pytest.mark.slow
@pytest.mark.parametrize(
    "keys",
    one_in(
        4,
        [
            {"strategy": "SCARLET", "codec": "simplex:2+changed+range", "fraction_train": 0.67},
            {"strategy": "CFD", "server_model": "mlp-11", "fraction_train": 0.34},
            {"strategy": "DSFL", "public_per_round": 23, "public_labels": False},
            {
                "strategy": "FedMD",
                "teacher": "mlp-11,none",
                "student": "mlp-8,mlp-5",
                "num_clients": 5,
            },
            {"strategy": "SelectiveFD", "public_labels": False, "fraction_train": 0.67},
            {"strategy": "FedProto", "plan": "loop"},
            {"strategy": "DSFL", "student": "test_side_by_side:normed", "num_server_rounds": 2},
            {"strategy": "FedAvg", "student": "test_side_by_side:normed", "num_server_rounds": 2},
        ],
    ),
    ids=lambda keys: "-".join(map(str, keys.values())),
)
def test_so_they_are_with_memories_codecs_some_clients_and_mixed_models(
    keys: dict[str, Any], tmp_path: Path
) -> None:
    if "test_side_by_side:normed" in keys.values():  # Adam makes full steps of rounding there
        keys = {**keys, "client_code": "test_side_by_side", "optimizer": "sgd"}
    base = shared(tmp_path, **keys)
    for one, other in zip(side_by_side(base, DIFFERENT), alone(base, DIFFERENT), strict=True):
        assert_same(one, other)


@pytest.mark.parametrize(
    ("strategy", "student"),
    one_in(3, [("DSFL", "mlp-8"), ("FedProx", "mlp-8"), ("KTpFL", "test_side_by_side:normed")]),
)
def test_those_that_differ_in_the_seed_alone_are_the_same_to_the_last_bit(
    strategy: str, student: str, tmp_path: Path
) -> None:
    base = shared(tmp_path, strategy=strategy, student=student, client_code="test_side_by_side")
    for one, other in zip(side_by_side(base, ALIKE), alone(base, ALIKE), strict=True):
        assert_same(one, other, exactly=True)


def test_a_run_does_not_depend_on_who_else_runs(tmp_path: Path) -> None:
    """Nor on whether it is first."""
    base = shared(tmp_path, strategy="DSFL")
    first, second, third = (base.replace(**keys) for keys in DIFFERENT)
    both = run_side_by_side([first.replace(name="1"), second.replace(name="2")])
    three = run_side_by_side([second.replace(name="4"), third.replace(name="5")])
    assert isinstance(three[0], Run)
    assert_same(both[1], three[0])


def normed(input_shape: tuple[int, int, int], num_classes: int) -> nn.Module:
    """Build the smallest net with batch statistics."""
    inputs = input_shape[0] * input_shape[1] * input_shape[2]
    return nn.Sequential(
        *(nn.Flatten(), nn.Linear(inputs, 7, bias=False), nn.BatchNorm1d(7), nn.ReLU()),
        nn.Linear(7, num_classes),
    )


# --- When something goes wrong -------------------------------------------------------------------


def breaking(
    monkeypatch: pytest.MonkeyPatch, seed: int, clients: set[int], rounds: set[int]
) -> None:
    """Let some clients of the federation of a seed fail in some rounds."""
    honest = run_phases

    def broken(stack: Stack) -> Any:
        owners = zip(stack.experiments, stack.clients, strict=True)
        if stack.first.round in rounds and any(e.seed == seed and k in clients for e, k in owners):
            raise ArithmeticError("a divergence")
        return honest(stack)

    monkeypatch.setattr(client, "run_phases", broken)


@pytest.mark.parametrize("strategy", one_in(3, ["DSFL", "FedAvg", "SelectiveFD"]))
def test_a_client_that_fails_is_dropped_by_its_own_federation_alone(
    strategy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = shared(tmp_path, strategy=strategy)
    breaking(monkeypatch, seed=2, clients={1}, rounds={2})
    found, apart = side_by_side(base, ALIKE), alone(base, ALIKE)
    dropped = [[list(row["dropped"]) for row in records(each)] for each in found]
    assert dropped == [[[], [], [], []], [[], ["1"], [], []], [[], [], [], []]]
    for one, other in zip(found, apart, strict=True):
        assert_same(one, other)


def test_a_client_that_fails_in_the_closing_exchange_has_no_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = shared(tmp_path, strategy="DSFL")
    breaking(monkeypatch, seed=2, clients={1}, rounds={4})
    found = side_by_side(base, ALIKE)
    owners = []
    for each in found:
        assert isinstance(each, Run)
        tested = Kept.load(each.path)
        assert tested is not None
        owners.append(tested.models["student"].owners)
    assert owners == [[0, 1, 2], [0, 2], [0, 1, 2]]


def test_a_federation_that_loses_its_clients_ends_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = shared(tmp_path, strategy="DSFL", num_server_rounds=5)
    breaking(monkeypatch, seed=2, clients={0, 1, 2}, rounds={1, 2, 3, 4, 5, 6})
    first, lost, third = side_by_side(base, ALIKE)
    assert isinstance(lost, FedkdError)
    assert "a divergence" in str(lost)
    assert not (tmp_path / "t1" / "result.json").exists()
    for one, keys in ((first, ALIKE[0]), (third, ALIKE[2])):
        (expected,) = alone(base.replace(run_dir=str(tmp_path / str(keys["seed"]))), [keys])
        assert_same(one, expected)


def test_a_callback_that_raises_ends_one_federation(tmp_path: Path) -> None:
    told: list[int] = []

    class Once(Callback):
        def on_round_end(self, row: Row) -> None:
            told.append(row["round"])
            if len(told) == 2:
                raise ArithmeticError("enough")

    base = shared(tmp_path, strategy="LocalOnly")
    planned = [base.replace(name=f"t{n}", **keys) for n, keys in enumerate(ALIKE)]
    found = run_side_by_side(planned, [Once()])
    assert sum(isinstance(each, Run) for each in found) == 2
    assert sum(isinstance(each, ArithmeticError) for each in found) == 1
    assert sorted(told) == [1, 1, 1, 2, 2, 3, 3]


def in_daemons(*jobs: Any) -> list[threading.Thread]:
    """Start threads that no one waits for at the end: what hangs here should fail and no more."""
    threads = [threading.Thread(target=job, daemon=True) for job in jobs]
    for thread in threads:
        thread.start()
    return threads


@pytest.mark.parametrize("raised", [ArithmeticError, SystemExit, KeyboardInterrupt])
def test_whatever_is_raised_while_clients_train_nobody_waits_for_ever(
    raised: type[BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As by a model or a procedure that calls `sys.exit`."""

    def handle_together(sent: object) -> Any:
        raise raised

    monkeypatch.setattr(engine, "handle_together", handle_together)
    experiment = shared(tmp_path, name="mine")
    meeting = engine._Meeting(3)
    ended: list[BaseException] = []

    def federation(number: int) -> None:
        contents: list[tuple[int, RecordDict]] = []
        with meeting.turn:
            try:
                meeting.handle(number, experiment, store_of(experiment), contents)
            except BaseException as error:
                ended.append(error)
            finally:
                meeting.leave()

    threads = in_daemons(*(lambda n=n: federation(n) for n in range(3)))
    until = monotonic() + 2
    for thread in threads:
        thread.join(max(0, until - monotonic()))
    assert [type(error) for error in ended] == [raised] * 3


def test_ctrl_c_ends_all_federations_after_the_round(tmp_path: Path) -> None:
    told: list[int] = []
    main = threading.main_thread().ident
    assert main is not None

    def interrupt(row: Row) -> None:
        told.append(row["round"])
        if row["round"] == 2 and told.count(2) == 1:
            signal.pthread_kill(main, signal.SIGINT)

    base = shared(tmp_path, strategy="LocalOnly", num_server_rounds=41)
    with pytest.raises(KeyboardInterrupt):
        run_side_by_side(
            [base.replace(name=f"t{n}", **keys) for n, keys in enumerate(ALIKE)],
            [EachRound(interrupt)],
        )
    assert max(told) < 41


def test_threads_of_the_federations_have_the_threads_of_the_caller(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest, seen = run_phases, set()

    def watched(stack: Stack) -> Any:
        seen.add(torch.get_num_threads())
        return honest(stack)

    monkeypatch.setattr(client, "run_phases", watched)
    torch.set_num_threads(3)
    side_by_side(shared(tmp_path, strategy="LocalOnly", num_server_rounds=1), ALIKE)
    assert seen == {3}


# --- What is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "keys",
    [
        {"batch_size": 17},
        {"strategy": "FedMD"},
        {"num_server_rounds": 2},
        {"partition_seed": None},
        {"fold": "1/2", "test_size": None},
        {"student": "mlp-9"},
        {"optimizer": "sgd"},
    ],
    ids=str,
)
def test_experiments_that_differ_otherwise_are_refused_before_anything_is_written(
    keys: dict[str, Any], tmp_path: Path
) -> None:
    base = shared(tmp_path, strategy="DSFL")
    with pytest.raises(FedkdError, match="may differ only in local-epochs, distill-epochs"):
        side_by_side(base, [{}, {"seed": 2, **keys}])
    assert list(tmp_path.iterdir()) == []


def test_the_same_shards_by_another_key_are_the_same_shards(tmp_path: Path) -> None:
    base = shared(tmp_path, strategy="LocalOnly", num_server_rounds=1)
    found = side_by_side(base, [{"seed": 2}, {"seed": 4, "partition_seed": None}])
    assert all(isinstance(each, Run) for each in found)


@pytest.mark.parametrize("keys", [{"engine": "flower"}, {"num_workers": 2}], ids=str)
def test_another_engine_is_refused(keys: dict[str, Any], tmp_path: Path) -> None:
    base = shared(tmp_path, strategy="LocalOnly", num_server_rounds=1)
    with pytest.raises(FedkdError, match=next(iter(keys)).replace("_", "-")):
        side_by_side(base.replace(**keys), ALIKE)
    assert list(tmp_path.iterdir()) == []


def test_two_runs_of_one_name_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    base = shared(tmp_path, strategy="LocalOnly", num_server_rounds=1, name="mine")
    with pytest.raises(FedkdError, match="mine"):
        run_side_by_side([base, base.replace(seed=2)])
    assert list(tmp_path.iterdir()) == []


def test_a_plan_that_is_left_open_is_one_for_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Plans are measured, and two measurements may end differently."""

    def planned(experiment: Experiment, *_: object) -> Experiment:
        measured = "loop" if experiment.seed == 2 else "stacked-3"
        return experiment.replace(plan=measured) if experiment.plan == "auto" else experiment

    monkeypatch.setattr(runner, "with_plan", planned)
    base = shared(tmp_path, strategy="LocalOnly", num_server_rounds=1, plan="auto")
    assert all(isinstance(each, Run) for each in side_by_side(base, ALIKE))
