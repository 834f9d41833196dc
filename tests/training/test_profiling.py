"""Where the time goes, by a clock that only the test moves."""

from __future__ import annotations

from threading import Barrier, local

import pytest
from torch import nn

from fedkd.training.lanes import in_lanes
from fedkd.training.parameters import Stateless
from fedkd.training.profiling import profiled, timed


class Clock(local):
    """Seconds by the clock of each thread."""

    now = 0.0

    def __call__(self) -> float:
        return self.now

    def pass_by(self, seconds: float) -> None:
        self.now += seconds

    def stumble(self, seconds: float) -> None:
        self.now += seconds
        raise ArithmeticError


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("fedkd.training.profiling.perf_counter", clock)
    return clock


def test_parts_add_up_by_name(clock: Clock) -> None:
    with profiled() as seconds:
        for name, spent in (("data", 2), ("forward", 3), ("data", 5)):
            clock.pass_by(100)
            with timed(name):
                clock.pass_by(spent)
        assert seconds == {"data": 7, "forward": 3}
        with timed("forward"):
            clock.pass_by(11)
    assert seconds == {"data": 7, "forward": 14}


def test_a_part_within_another_counts_for_the_outer_one_only(clock: Clock) -> None:
    with profiled() as seconds:
        with timed("evaluate"):
            clock.pass_by(2)
            with timed("predict"):
                clock.pass_by(3)
                with timed("data"):
                    clock.pass_by(5)
            clock.pass_by(7)
        with timed("predict"):
            clock.pass_by(11)
    assert seconds == {"evaluate": 17, "predict": 11}


def test_a_part_that_raises_is_counted_and_ends(clock: Clock) -> None:
    with profiled() as seconds:
        with pytest.raises(ArithmeticError), timed("forward"):
            clock.stumble(2)
        with timed("backward"):
            clock.pass_by(3)
    assert seconds == {"forward": 2, "backward": 3}


def test_nothing_is_measured_unless_somebody_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> float:
        raise AssertionError("nobody asked")

    monkeypatch.setattr("fedkd.training.profiling.perf_counter", refuse)
    monkeypatch.setattr("fedkd.training.profiling._wait_for_the_device", refuse)
    with timed("data"):
        pass
    with profiled(False) as seconds, timed("data"):
        pass
    assert seconds == {}


def test_measuring_ends_with_the_block(clock: Clock) -> None:
    with pytest.raises(ArithmeticError), profiled() as seconds, timed("data"):
        clock.stumble(2)
    with timed("data"):
        clock.pass_by(3)
    assert seconds == {"data": 2}


def test_a_block_within_another_measures_for_itself(clock: Clock) -> None:
    with profiled() as outer:
        with timed("data"):
            clock.pass_by(2)
        with profiled() as inner, timed("data"):
            clock.pass_by(3)
        with profiled(False), timed("data"):
            clock.pass_by(5)
        with timed("data"):
            clock.pass_by(7)
    assert (outer, inner) == ({"data": 9}, {"data": 3})


def test_lanes_are_measured_together(clock: Clock) -> None:
    """Two at a time, each by its own clock; a part around all of them counts alone."""
    together = Barrier(2)

    def run(_: Stateless, spent: int) -> None:
        together.wait(20)
        with timed("forward"):
            clock.pass_by(spent)
            with timed("data"):
                clock.pass_by(100)

    jobs = [2, 3, 5, 7, 11, 13]
    with profiled() as seconds:
        in_lanes(run, jobs, nn.Identity(), 2)
        with timed("evaluate"):
            clock.pass_by(17)
            in_lanes(run, jobs, nn.Identity(), 2)
    assert seconds == {"forward": sum(jobs) + 100 * len(jobs), "evaluate": 17}
    with profiled(False) as nothing:
        in_lanes(run, jobs, nn.Identity(), 2)
    assert nothing == {}
