"""Plans are chosen by a clock: here by one that only the test moves."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from federation_tools import tiny

import fedkd
from fedkd.data.federated import FederatedData, federated_data
from fedkd.experiment import Experiment, read_toml
from fedkd.records import Run
from fedkd.training import tuning
from fedkd.training.architectures import architectures_of
from fedkd.training.cohort import Cohort
from fedkd.training.fit import Fitted
from fedkd.training.plans import Plan
from fedkd.training.tuning import candidates, choose_plans, fastest, with_plan

Timing = Callable[[Plan], tuple[float, float]]
"""Given a plan: the seconds that measuring it takes, and those of a client's step in it."""


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    """Choose again in every test."""
    tuning._chosen.cache_clear()
    yield
    tuning._chosen.cache_clear()


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> Callable[[Timing], list[tuple[str, Plan, int]]]:
    """Time plans by a rule instead of a clock; returns the list of what will have been timed."""

    def by(timing: Timing) -> list[tuple[str, Plan, int]]:
        asked: list[tuple[str, Plan, int]] = []

        def time(
            experiment: Experiment, data: FederatedData, name: str, clients: int, plan: Plan
        ) -> tuple[float, float]:
            asked.append((name, plan, clients))
            return timing(plan)

        monkeypatch.setattr(tuning, "_time", time)
        return asked

    return by


def refuse(*_: Any) -> tuple[float, float]:
    raise AssertionError("nothing is to be measured")


# --- What is tried -------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("clients", [1, 2, 7, 101])
@pytest.mark.parametrize("largest", [1, 3, 53])
@pytest.mark.parametrize("stacked", [True, False], ids=["stacked", "loop"])
def test_the_ways_to_run_clients_fit_them_and_the_machine(
    stacked: bool, largest: int, clients: int, threads: int
) -> None:
    default = Plan(True, largest) if stacked else Plan(False)
    plans = candidates(default, largest, clients, threads)
    assert len(set(plans)) == len(plans)
    for plan in plans:
        assert plan.block <= min(largest, clients)
        assert plan.lanes <= min(threads, clients)
    assert {plan.stacked for plan in plans} == {True, False}
    first = plans[0]
    assert first.stacked == stacked
    assert first.lanes == min(threads, clients)
    if stacked:  # all clients at once if they may, and no block larger than that takes
        assert first.block == largest or first.block * first.lanes >= clients
        assert (first.block - 1) * first.lanes < clients


A, B, C = Plan(True, 7, 2), Plan(True, 13), Plan(False, lanes=2)


@pytest.mark.parametrize(
    ("times", "taken"),
    [
        ({A: 1.0}, A),
        ({A: 1.0, B: 0.95, C: 0.91}, A),
        ({A: 1.0, B: 0.95, C: 0.89}, C),
        ({A: 1.0, B: 0.5, C: 0.7}, B),
        ({A: 1.0, B: 0.7, C: 0.69}, C),
        ({A: 1.0, B: 3.0, C: 1.0}, A),
        ({B: 3.0, A: 1.0, C: 2.9}, A),
    ],
)
def test_the_first_is_taken_unless_another_is_clearly_faster(
    times: dict[Plan, float], taken: Plan
) -> None:
    assert fastest(times) == taken


# --- How it is timed -----------------------------------------------------------------------------


class Ticks:
    """A clock that goes on by a second whenever somebody looks."""

    def __init__(self) -> None:
        self._seconds = count()

    def __call__(self) -> float:
        return float(next(self._seconds))


@pytest.mark.parametrize(
    ("plan", "clients", "expected"),
    [
        (Plan(True, 1), 1, 1.0),
        (Plan(True, 3), 3, 1 / 3),
        (Plan(True, 7), 7, 1 / 7),
        (Plan(True, 2, 2), 4, 1 / 2),
        (Plan(False), 3, 1.0),
        (Plan(False, lanes=2), 3, 1.0),
    ],
    ids=str,
)
def test_the_time_of_a_clients_step_is_that_of_a_block_shared(
    plan: Plan, clients: int, expected: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every step of a block takes a second of this clock."""
    monkeypatch.setattr(tuning, "perf_counter", Ticks())
    experiment = tiny()
    _, each = tuning._time(experiment, federated_data(experiment), "mlp-8", clients, plan)
    assert each == pytest.approx(expected)


def test_measuring_takes_few_steps_and_leaves_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(2)
    steps: list[int] = []
    fit = Cohort.fit

    def counted(self: Cohort, sides: Sequence[Any], **keys: Any) -> Fitted:
        assert len(self) == len(sides[0].rows)
        steps.extend(keys["epochs"] * -(-len(rows) // keys["batch_size"]) for rows in sides[0].rows)
        return fit(self, sides, **keys)

    monkeypatch.setattr(Cohort, "fit", counted)
    experiment = tiny(teacher="lenet", student="mlp-8,mlp-7", num_server_rounds=20)
    data = federated_data(experiment)
    names = ("mlp-8", "mlp-7", "lenet")
    architectures = architectures_of(data)
    before = {
        name: {n: t.clone() for n, t in architectures.initial_state(name, experiment.seed).items()}
        for name in names
    }
    for name in names:
        architectures.skeleton(name)  # building one draws weights
    generator = torch.get_rng_state()
    found = choose_plans(experiment)
    assert [choice.architecture for choice in found] == list(names)
    assert set(steps) == {tuning.STEPS}
    assert torch.get_num_threads() == 2
    assert torch.equal(torch.get_rng_state(), generator)
    for name, state in before.items():
        for parameter, tensor in architectures.initial_state(name, experiment.seed).items():
            assert torch.equal(tensor, state[parameter])


# --- How long ------------------------------------------------------------------------------------


def budget(experiment: Experiment, step: float) -> float:
    """Return a hundredth of 20 rounds of 3 clients, in seconds, if a client's step takes `step`.

    A round of `tiny` has 3 batches of 38 private images and 3 of 37 public ones.
    """
    shards = [len(shard) for shard in federated_data(experiment).shards]
    assert (min(shards), max(shards), len(federated_data(experiment).public)) == (38, 38, 37)
    return 0.01 * 20 * (3 + 3) * 3 * step


@pytest.mark.parametrize("share", [0.01, 0.3, 0.45, 0.7, 1.3, 100])
def test_measuring_stops_before_it_takes_a_hundredth_of_twenty_rounds(
    share: float, timed: Callable[[Timing], list[tuple[str, Plan, int]]]
) -> None:
    """The first plan is always timed; the others while they fit, the next taken to be like the last."""
    torch.set_num_threads(2)
    experiment, step = tiny(), 2.0
    used = share * budget(experiment, step)
    asked = timed(lambda plan: (used, step))
    (choice,) = choose_plans(experiment)
    plans = candidates(choice.plan, 100, 3, 2)
    assert choice.plan == plans[0]
    assert len(plans) >= 3
    assert [plan for _, plan, _ in asked] == plans[: max(1, int(1 / share))]


def test_the_budget_is_that_of_the_fastest_so_far(
    timed: Callable[[Timing], list[tuple[str, Plan, int]]],
) -> None:
    """A slow first plan promises a long run, which the second shows to be a short one."""
    torch.set_num_threads(2)
    experiment = tiny()
    used = 0.1 * budget(experiment, 2.0)
    asked = timed(lambda plan: (used, 2.0 if plan.stacked and plan.lanes > 1 else 0.2))
    (choice,) = choose_plans(experiment)
    assert len(asked) == 2
    assert choice.plan == asked[1][1]


def test_a_longer_run_may_measure_more(
    timed: Callable[[Timing], list[tuple[str, Plan, int]]],
) -> None:
    torch.set_num_threads(2)
    used = 0.6 * budget(tiny(), 1.0)
    asked = timed(lambda plan: (used, 1.0))
    choose_plans(tiny())
    assert len(asked) == 1
    choose_plans(tiny(local_epochs=5, distill_epochs=5))
    assert len(asked) > 2


# --- For whom ------------------------------------------------------------------------------------


def test_a_plan_is_chosen_for_the_clients_that_run_at_once(
    timed: Callable[[Timing], list[tuple[str, Plan, int]]],
) -> None:
    """11 of 22 clients a round: 22 students of two kinds, 11 teachers (every second client has one)."""
    torch.set_num_threads(2)
    asked = timed(lambda plan: (0.0, 1.0))
    experiment = tiny(
        student="mlp-8,mlp-7",
        teacher="lenet,none",
        num_clients=22,
        fraction_train=0.5,
        train_size=300,
    )
    found = choose_plans(experiment)
    assert [choice.architecture for choice in found] == ["mlp-8", "mlp-7", "lenet"]
    blocks: dict[str, int] = {}
    for name, plan, clients in asked:
        blocks[name] = max(blocks.get(name, 0), plan.block)
        assert clients == plan.block * plan.lanes
    assert all(3 <= block <= 6 for block in blocks.values())


def test_a_flower_client_is_alone_in_its_process(
    timed: Callable[[Timing], list[tuple[str, Plan, int]]],
) -> None:
    torch.set_num_threads(2)
    asked = timed(lambda plan: (0.0, 1.0))
    choose_plans(tiny(engine="flower", student="mlp-8,lenet"))
    assert asked
    assert all((plan.block, plan.lanes, clients) == (1, 1, 1) for _, plan, clients in asked)


def test_a_plan_that_was_given_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "_time", refuse)
    experiment = tiny(student="mlp-8,lenet", plan="mlp-8=stacked-3x2, lenet=loop")
    assert with_plan(experiment) == experiment
    assert [(c.architecture, str(c.plan)) for c in choose_plans(experiment)] == [
        ("mlp-8", "stacked-3x2"),
        ("lenet", "loop"),
    ]


def test_equal_experiments_are_measured_once(
    timed: Callable[[Timing], list[tuple[str, Plan, int]]],
) -> None:
    asked = timed(lambda plan: (0.0, 1.0))
    first = with_plan(tiny())
    counted = len(asked)
    assert counted > 1
    assert with_plan(tiny()) == first
    assert len(asked) == counted


# --- Models that refuse ---------------------------------------------------------------------------


def test_a_plan_that_a_model_does_not_take_is_not_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    """All plans are tried, however long they take."""
    monkeypatch.setattr(tuning, "ROUNDS", 10**9)
    experiment = tiny(student="federation_tools:choosy")
    (choice,) = choose_plans(experiment)
    assert not choice.plan.stacked


def test_a_model_that_raises_is_its_clients_failure_and_ends_no_run(tmp_path: Path) -> None:
    done = fedkd.run(
        tiny(student="mlp-8,federation_tools:lazy", strategy="LocalOnly", run_dir=str(tmp_path))
    )
    assert done.rounds[0]["dropped"]["1"].startswith("ArithmeticError: not today (federation_tools")
    assert done.rounds[0]["answered"] == [0, 2]


# --- What becomes of it --------------------------------------------------------------------------


def run_by(timing: Timing, timed: Callable[[Timing], Any], folder: Path, name: str) -> Run:
    timed(timing)
    tuning._chosen.cache_clear()
    return fedkd.run(
        tiny(
            student="mlp-8,lenet",
            num_server_rounds=2,
            local_epochs=2,
            num_clients=4,
            run_dir=str(folder),
            name=name,
        )
    )


@pytest.mark.slow
def test_the_choice_is_recorded_and_does_not_decide_results(
    timed: Callable[[Timing], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four runs by clocks that prefer another plan each: all are run as recorded, and agree."""
    torch.set_num_threads(2)
    wishes: dict[str, Timing] = {
        "loop": lambda plan: (0.0, 2.0 if plan.stacked else 1.0),
        "stacked": lambda plan: (0.0, 1.0 if plan.stacked else 2.0),
        "lanes": lambda plan: (0.0, 1.0 / plan.lanes),
        "blocks": lambda plan: (0.0, 1.0 + plan.block),
    }
    runs = {name: run_by(wish, timed, tmp_path, name) for name, wish in wishes.items()}
    plans = {name: done.experiment.plan for name, done in runs.items()}
    assert plans["loop"].count("loop") == 2
    assert plans["stacked"].count("stacked") == 2
    assert plans["lanes"].count("x2") == 2
    assert len(set(plans.values())) >= 3

    monkeypatch.setattr(tuning, "_time", refuse)
    for name, done in runs.items():
        tuning._chosen.cache_clear()
        saved = Experiment.load(read_toml(done.path / "experiment.toml"))
        assert saved.plan == plans[name]
        entries = dict(entry.split("=") for entry in saved.plan.split(", "))
        assert set(entries) == {"mlp-8", "lenet"}
        for architecture, text in entries.items():
            assert (
                str(architectures_of(federated_data(saved)).plan(architecture, saved.plan)) == text
            )
        assert with_plan(saved) == saved

    expected = runs["loop"]
    for done in runs.values():
        for row, other in zip(done.rounds, expected.rounds, strict=True):
            assert row["dropped"] == {}
            assert row["loss_revisit"] == pytest.approx(other["loss_revisit"], rel=1e-4)
        for mine, theirs in zip(done.client_accuracy, expected.client_accuracy, strict=True):
            assert mine == pytest.approx(theirs, abs=1 / 61 + 1e-9)
