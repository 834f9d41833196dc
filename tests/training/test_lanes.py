"""Jobs in threads of this process: whose result is whose, and who may touch what."""

from __future__ import annotations

from collections import Counter
from contextvars import ContextVar
from threading import Barrier, Event, Lock

import pytest
import torch
from torch import nn

from fedkd.training.lanes import in_lanes
from fedkd.training.parameters import Stateless

PATIENCE = 20.0
"""Seconds after which a job that waits for another one gives up, as the other one never ran."""


def skeleton() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5))


@pytest.mark.parametrize("lanes", [1, 2, 3, 11])
@pytest.mark.parametrize("count", [1, 2, 7])
def test_results_are_in_the_order_of_the_jobs(lanes: int, count: int) -> None:
    jobs = [10 * job for job in range(count)]
    assert in_lanes(lambda _, job: job + 1, jobs, skeleton(), lanes) == [job + 1 for job in jobs]


def test_jobs_run_side_by_side_and_results_stay_in_order() -> None:
    """The first waits for the second, which therefore runs at the same time and ends first."""
    done = Event()

    def run(_: Stateless, job: str) -> str:
        if job == "first":
            assert done.wait(PATIENCE)
        else:
            done.set()
        return job

    assert in_lanes(run, ["first", "second"], skeleton(), 2) == ["first", "second"]


def test_no_more_jobs_run_at_once_than_there_are_lanes() -> None:
    lanes, lock = 3, Lock()
    together = Barrier(lanes)
    running: list[int] = [0]
    most: list[int] = []

    def run(_: Stateless, job: int) -> None:
        with lock:
            running[0] += 1
            most.append(running[0])
        together.wait(PATIENCE)
        with lock:
            running[0] -= 1
        together.wait(PATIENCE)

    in_lanes(run, range(4 * lanes), skeleton(), lanes)
    assert max(most) == lanes


def test_every_lane_has_a_skeleton_of_its_own() -> None:
    given, lanes, lock = skeleton(), 3, Lock()
    together = Barrier(lanes)
    used: Counter[int] = Counter()
    kept: dict[int, nn.Module] = {}
    busy: set[int] = set()

    def run(model: Stateless, _: int) -> None:
        mine = model.module
        with lock:
            assert id(mine) not in busy
            busy.add(id(mine))
            used[id(mine)] += 1
            kept[id(mine)] = mine
        together.wait(PATIENCE)
        with lock:
            busy.remove(id(mine))
        together.wait(PATIENCE)

    in_lanes(run, range(4 * lanes), given, lanes)
    assert id(given) not in used
    assert len(used) == lanes
    tensors = [t for module in kept.values() for t in module.state_dict(keep_vars=True).values()]
    assert len({t.data_ptr() for t in tensors}) == len(tensors) == lanes * len(given.state_dict())
    for module in kept.values():
        for name, tensor in module.state_dict().items():
            assert torch.equal(tensor, given.state_dict()[name])


@pytest.mark.parametrize("lanes", [1, 2])
def test_what_a_job_raises_is_raised(lanes: int) -> None:
    def run(_: Stateless, job: int) -> int:
        if job == 3:
            raise ArithmeticError("the third")
        return job

    with pytest.raises(ArithmeticError, match="the third"):
        in_lanes(run, range(5), skeleton(), lanes)
    assert in_lanes(run, range(3), skeleton(), lanes) == [0, 1, 2]


@pytest.mark.parametrize(("threads", "lanes", "share"), [(4, 2, 2), (5, 2, 2), (2, 3, 1)])
def test_lanes_share_the_threads_and_give_them_back(threads: int, lanes: int, share: int) -> None:
    torch.set_num_threads(threads)

    def run(_: Stateless, fails: bool) -> int:
        if fails:
            raise ArithmeticError
        return torch.get_num_threads()

    assert in_lanes(run, [False] * 5, skeleton(), lanes) == [share] * 5
    assert torch.get_num_threads() == threads
    with pytest.raises(ArithmeticError):
        in_lanes(run, [False, True, False], skeleton(), lanes)
    assert torch.get_num_threads() == threads


def test_jobs_see_the_callers_context_and_cannot_change_it() -> None:
    name: ContextVar[str] = ContextVar("name", default="nobody")
    token = name.set("caller")

    def run(_: Stateless, job: int) -> str:
        seen = name.get()
        name.set(f"job {job}")
        return seen

    assert in_lanes(run, range(5), skeleton(), 2) == ["caller"] * 5
    assert name.get() == "caller"
    name.reset(token)
