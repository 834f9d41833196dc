"""States: what is read is what was written, for any history, crash, process and file."""

from __future__ import annotations

import json
import multiprocessing
import re
import resource
import shutil
import tempfile
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from io import FileIO
from itertools import accumulate
from multiprocessing.synchronize import Barrier
from pathlib import Path
from secrets import token_hex
from threading import Thread
from typing import Any
from weakref import WeakSet, ref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from fedkd.clients import state_files
from fedkd.clients.slot_file import CLIENTS_A_FILE
from fedkd.clients.state_files import StateFiles
from fedkd.clients.state_store import ResidentStates
from fedkd.clients.states import INITIAL, States, gather
from fedkd.errors import FedkdError
from fedkd.phases import Role

CPU = torch.device("cpu")
ROLES: tuple[Role, ...] = ("student", "teacher")
SHAPES: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
    "head.weight": ((3, 5), torch.float32),
    "head.bias": ((7,), torch.bfloat16),
    "temperature": ((), torch.float64),
    "norm.num_batches_tracked": ((), torch.int64),
    "mask": ((11,), torch.bool),
    "small": ((2,), torch.float16),
    "nothing": ((0, 13), torch.float32),
}


def drawn(clients: Sequence[int], seed: int, roles: Sequence[Role] = ROLES) -> States:
    """Return states of random bits, NaNs of all kinds included."""
    generator = torch.Generator().manual_seed(seed)

    def bits(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        if dtype == torch.bool:
            return torch.randint(2, shape, generator=generator).bool()
        flat = torch.randint(
            256, (torch.empty(shape).numel() * dtype.itemsize,), generator=generator
        )
        return flat.to(torch.uint8).view(dtype).reshape(shape)

    models: dict[str, dict[str, Tensor]] = {
        role: {n: bits((len(clients), *shape), dtype) for n, (shape, dtype) in SHAPES.items()}
        for role in roles
    }
    digested = torch.randint(2**40, (len(clients),), generator=generator)
    kept = torch.randint(8, (len(clients),), generator=generator)
    return States(list(clients), models, digested.tolist(), kept.tolist())


def marked(clients: Sequence[int], mark: float, size: int = 13) -> States:
    """Return states all of whose numbers are one mark."""
    b = torch.full((len(clients),), float(mark))
    stack = {"a": b[:, None].repeat(1, size), "b": b}
    return States(list(clients), {"student": stack}, [int(mark)] * len(clients))


def to_bytes(tensor: Tensor) -> bytes:
    return tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def row(states: States, k: int) -> tuple[Any, ...]:
    """Spell out one client's state: names, dtypes, shapes, bytes."""
    return (
        states.digested[k],
        states.kept[k],
        *(
            (role, name, tensor.dtype, tensor.shape[1:], to_bytes(tensor[k]))
            for role, model in states.models.items()
            for name, tensor in model.items()
        ),
    )


def spelled(states: States) -> dict[int, tuple[Any, ...]]:
    return {client: row(states, k) for k, client in enumerate(states.clients)}


def since(states: States | Sequence[int], round: int = INITIAL) -> dict[int, int]:
    """Say that all clients started from one round."""
    clients = states.clients if isinstance(states, States) else states
    return dict.fromkeys(clients, round)


def scribble(states: States) -> None:
    """Overwrite a stack as training does."""
    for model in states.models.values():
        for tensor in model.values():
            tensor.fill_(1)
    states.digested[:] = [-1] * len(states)


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


# --- Stacks --------------------------------------------------------------------------------------


def test_rows_and_joins_are_copies_in_the_order_asked_for() -> None:
    states = drawn([7, 2, 5, 3, 11], seed=1)
    expected = spelled(states)
    picked = states.rows([3, 0])
    assert picked.clients == [3, 7]
    assert spelled(picked) == {k: expected[k] for k in (3, 7)}
    order = [2, 3, 5, 7, 11]
    joined = gather([(states.rows([1, 2, 4]), range(3)), (picked, range(2))], order)
    assert joined.clients == order
    assert spelled(joined) == expected
    scribble(picked)
    scribble(joined)
    assert spelled(states) == expected
    assert len(states.rows([])) == 0


# --- Files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("roles", [("student",), ROLES])
def test_states_come_back_bit_for_bit(tmp_path: Path, roles: tuple[Role, ...]) -> None:
    store = StateFiles(tmp_path / "not" / "yet", period=3)
    one = drawn([301, 1, 7, 4, 601, 298], 1, roles)
    two = drawn([7, 1], 2, roles)
    store.save(one, 5, since(one))
    store.save(two, 6, since(two, 5))
    found = store.load({4: 5, 7: 6, 298: 5, 601: 5, 1: 5, 301: 5})
    assert found.clients == [4, 7, 298, 601, 1, 301]
    assert spelled(found) == spelled(one) | {7: spelled(two)[7]}
    assert spelled(store.load({7: 5, 1: 6})) == {7: spelled(one)[7], 1: spelled(two)[1]}


def test_what_is_not_there_is_left_out(tmp_path: Path) -> None:
    store = StateFiles(tmp_path)
    assert spelled(store.load({3: 1, 5: INITIAL})) == spelled(store.load({})) == {}
    states = drawn([2, 5, 103], 1)
    store.save(states, 3, since(states))
    found = store.load({211: 3, 103: 3, 5: 2, 3: 3, 2: 3, 7: INITIAL, 103 + 2: INITIAL})
    assert found.clients == [103, 2]
    assert spelled(found) == {k: v for k, v in spelled(states).items() if k != 5}


def test_only_the_newest_state_and_its_base_are_kept(tmp_path: Path) -> None:
    """A reply that is lost sends its client back to the base."""
    store = StateFiles(tmp_path)

    def rounds() -> list[int]:
        return [number for number in range(12) if store.load({7: number}).clients]

    def after(number: int, base: int) -> list[int]:
        store.save(marked([7], number), number, {7: base})
        return rounds()

    assert after(1, INITIAL) == [1]
    assert after(2, INITIAL) == [2]  # round 1 was lost
    assert after(3, 2) == [2, 3]
    assert after(4, 2) == [2, 4]  # and so was 3
    assert after(4, 2) == [2, 4]
    assert after(11, 4) == [4, 11]
    assert store.load({7: 4}).models["student"]["a"].unique().tolist() == [4]
    assert store.load({7: 11}).models["student"]["a"].unique().tolist() == [11]
    with pytest.raises(FedkdError, match="already holds states of rounds after 5"):
        after(5, 4)  # a leftover of a run that has gone on without it
    assert rounds() == [4, 11]
    with pytest.raises(ValueError, match="round = 0"):
        after(INITIAL, INITIAL)


def test_a_file_is_a_safetensors_file_of_two_slots_a_client(tmp_path: Path) -> None:
    states = drawn([2, 5, 302, 305], 1)
    StateFiles(tmp_path, period=3).save(states, 7, since(states))
    paths = files(tmp_path)
    assert [path.name for path in paths] == ["2-0.safetensors", "2-1.safetensors"]
    for path, (first, second), beginning in zip(
        paths, [(2, 5), (302, 305)], ["2", "302"], strict=True
    ):
        with safe_open(path, "pt") as file:
            assert file.metadata() == {"first": beginning, "step": "3", "count": "100"}
        tensors = load_file(path)
        rounds, digested, kept, checksum = (
            tensors.pop(name) for name in ("round", "digested", "kept", "checksum")
        )
        for numbers in (rounds, digested, kept, checksum):
            assert (numbers.dtype, numbers.shape) == (torch.int64, (2, CLIENTS_A_FILE))
        header = path.read_bytes()[8 : 8 + header_of(path)[0]]
        slots = rounds.nonzero().tolist()
        assert sorted(row for _, row in slots) == [0, 1]
        for (slot, at), client in zip(
            sorted(slots, key=lambda s: s[1]), (first, second), strict=True
        ):
            assert rounds[slot, at] == 7
            expected = row(states, states.clients.index(client))
            assert (digested[slot, at], kept[slot, at]) == expected[:2]
            held = {**tensors, "round": rounds, "digested": digested, "kept": kept}
            row_bytes = b"".join(to_bytes(held[name][slot, at]) for name in sorted(held))
            assert checksum[slot, at] == zlib.crc32(header + row_bytes)
            read = [
                (*name.split("/"), t.dtype, t.shape[2:], to_bytes(t[slot, at]))
                for name, t in tensors.items()
            ]
            assert Counter(read) == Counter(expected[2:])


def test_ten_thousand_clients_take_the_space_of_those_that_ran(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[Path] = []

    class Counted(FileIO):
        def __init__(self, path: Path, mode: str) -> None:
            opened.append(path)
            super().__init__(path, mode)

    monkeypatch.setattr(state_files, "FileIO", Counted)
    store = StateFiles(tmp_path)
    clients = [103 * i + 5 for i in range(97)]  # one a file, and none in two of the hundred
    size = 4099
    store.save(marked(clients, 1, size), 1, since(clients))
    assert len(opened) == 97
    found = store.load(since(clients, 1))
    assert len(opened) == 2 * 97
    assert torch.equal(found.models["student"]["a"], torch.ones(97, size))
    assert len(files(tmp_path)) == len({client // 100 for client in clients}) == 97
    stats = [path.stat() for path in files(tmp_path)]
    assert sum(stat.st_size for stat in stats) > 2 * 97 * 100 * size * 4
    # Blocks of 4 KiB: a row of `a` touches at most 6, all else at most 8.
    assert sum(stat.st_blocks * 512 for stat in stats) < 97 * 16 * 4096


# --- Any history, against a dictionary -----------------------------------------------------------

CLIENTS = (0, 1, 2, 3, 97, 98, 199, 200, 299, 300, 301, 597, 601, 1009)
PERIOD = 3


@dataclass
class Model:
    """What has to be there: by client, by round."""

    states: dict[int, dict[int, tuple[Any, ...]]] = field(default_factory=dict)

    def save(self, states: States, round: int, keep: Mapping[int, int]) -> None:
        for client, state in spelled(states).items():
            old = self.states.get(client, {})
            self.states[client] = {r: s for r, s in old.items() if r == keep[client]}
            self.states[client][round] = state

    def load(self, bases: Mapping[int, int]) -> dict[int, tuple[Any, ...]]:
        return {
            client: self.states[client][base]
            for client, base in bases.items()
            if base in self.states.get(client, {})
        }


some_rounds = st.integers(0, 5)
some_clients = st.dictionaries(st.sampled_from(CLIENTS), some_rounds, min_size=1)


def in_order(history: list[Any]) -> list[Any]:
    """Let rounds only go up, as those of a run do."""
    newest = list(accumulate((step[2] for step in history), max))
    return [
        (w, bases, number, seed)
        for (w, bases, _, seed), number in zip(history, newest, strict=True)
    ]


histories = st.lists(
    st.tuples(st.booleans(), some_clients, st.integers(1, 5), st.integers(0, 2**30)), max_size=23
).map(in_order)
"""Each step: whether to write, which clients with which bases, the round to write, a seed."""


@contextmanager
def fresh_folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


@settings(deadline=None, max_examples=60)
@given(histories)
def test_files_hold_what_a_dictionary_would(history: list[Any]) -> None:
    model = Model()
    with fresh_folder() as folder:
        store = StateFiles(folder, PERIOD)
        for writes, bases, number, seed in history:
            if writes:
                states = drawn(list(bases), seed)
                store.save(states, number, bases)
                model.save(states, number, bases)
            found = store.load(bases)
            expected = model.load(bases)
            assert found.clients == list(expected)
            assert spelled(found) == expected
        for number in range(6):
            everyone = dict.fromkeys(CLIENTS, number)
            assert spelled(store.load(everyone)) == model.load(everyone)


@pytest.mark.slow
@settings(deadline=None, max_examples=60)
@given(histories, st.integers(0, 17))
def test_what_stays_in_memory_is_what_is_on_disk(history: list[Any], limit: int) -> None:
    """States that were taken are overwritten at once, as training does."""
    model = Model()
    alive: WeakSet[States] = WeakSet()
    with fresh_folder() as folder:
        store = ResidentStates(StateFiles(folder, PERIOD), limit)
        for writes, bases, number, seed in history:
            if writes:
                states = drawn(list(bases), seed)
                store.put(states, number, bases)
                model.save(states, number, bases)
                alive.add(states)
                del states
                if seed % 2:
                    bases = dict.fromkeys(bases, number)
            taken = store.take(bases, CPU)
            expected = model.load(bases)
            assert taken.clients == list(expected)
            assert spelled(taken) == expected
            scribble(taken)
            assert sum(len(states) for states in alive) <= limit
        for number in range(6):
            everyone = dict.fromkeys(CLIENTS, number)
            assert spelled(store.take(everyone, CPU)) == model.load(everyone)


# --- In memory -----------------------------------------------------------------------------------


def held(store: ResidentStates, bases: Mapping[int, int]) -> list[int]:
    """Return which states a store has without its files, which are gone for good."""
    shutil.rmtree(store.files.folder)
    return store.take(bases, CPU).clients


def test_the_same_clients_get_the_very_stack_once(tmp_path: Path) -> None:
    store = ResidentStates(StateFiles(tmp_path), 5)
    states = drawn([5, 2, 3], 1)
    expected = spelled(states)
    store.put(states, 1, since(states))
    taken = store.take({5: 1, 2: 1, 3: 1}, CPU)
    for role, model in states.models.items():
        assert all(taken.models[role][name] is tensor for name, tensor in model.items())
    scribble(taken)
    assert spelled(store.take({5: 1, 2: 1, 3: 1}, CPU)) == expected
    assert held(store, {5: 1, 2: 1, 3: 1}) == []


@pytest.mark.parametrize("bases", [{2: 1, 5: 1, 3: 1}, {5: 1, 2: 1}, {5: 1, 2: 1, 3: 1, 7: 1}])
def test_other_clients_or_another_order_get_copies(tmp_path: Path, bases: dict[int, int]) -> None:
    store = ResidentStates(StateFiles(tmp_path), 5)
    states, other = drawn([5, 2, 3], 1), drawn([7], 2)
    expected = spelled(states) | spelled(other)
    store.put(other, 1, since(other))
    store.put(states, 1, since(states))
    taken = store.take(bases, CPU)
    assert taken.clients == list(bases)
    scribble(taken)
    assert spelled(states) | spelled(other) == expected
    assert held(store, {5: 1, 2: 1, 3: 1, 7: 1}) == [5, 2, 3, 7]


def test_a_newer_state_hides_the_older_one_in_memory(tmp_path: Path) -> None:
    store = ResidentStates(StateFiles(tmp_path), 5)
    store.put(marked([2, 3, 5], 1), 1, since([2, 3, 5]))
    store.put(marked([3], 2), 2, {3: 1})
    # Of the base, which was superseded, only the file knows.
    assert store.take({2: 1, 3: 1, 5: 1}, CPU).models["student"]["b"].tolist() == [1, 1, 1]
    assert store.take({2: 1, 3: 2, 5: 1}, CPU).models["student"]["b"].tolist() == [1, 2, 1]
    assert held(store, {2: 1, 3: 1, 5: 1}) == [2, 5]


def test_a_stack_is_freed_with_its_last_current_state(tmp_path: Path) -> None:
    store = ResidentStates(StateFiles(tmp_path), 11)
    states = marked([2, 3, 5], 1)
    alive = ref(states)
    store.put(states, 1, since(states))
    del states
    store.put(marked([3, 7], 2), 2, {3: 1, 7: INITIAL})
    assert alive() is not None
    store.put(marked([5, 2], 2), 2, {5: 1, 2: 1})
    assert alive() is None
    assert held(store, dict.fromkeys((2, 3, 5, 7), 2)) == [2, 3, 5, 7]


def test_an_older_stack_goes_without_the_newer_states_of_its_clients(tmp_path: Path) -> None:
    store = ResidentStates(StateFiles(tmp_path), 5)
    store.put(marked([2, 3, 5], 1), 1, since([2, 3, 5]))
    store.put(marked([3, 7], 2), 2, {3: 1, 7: INITIAL})
    store.put(marked([11], 2), 2, {11: INITIAL})
    assert held(store, {2: 1, 3: 2, 5: 1, 7: 2, 11: 2}) == [3, 7, 11]


def test_the_stacks_used_longest_ago_make_room(tmp_path: Path) -> None:
    store = ResidentStates(StateFiles(tmp_path), 7)
    for clients in ([1, 2], [3, 4], [5, 6]):
        store.put(marked(clients, 1), 1, since(clients))
    store.take({2: 1}, CPU)
    store.put(marked([7, 8, 9], 1), 1, since([7, 8, 9]))
    assert held(store, dict.fromkeys(range(10), 1)) == [1, 2, 5, 6, 7, 8, 9]


def test_a_stack_beyond_the_limit_is_only_on_disk(tmp_path: Path) -> None:
    store = ResidentStates(StateFiles(tmp_path), 2)
    store.put(marked([2, 3], 1), 1, since([2, 3]))
    store.put(marked([5, 7, 11], 1), 1, since([5, 7, 11]))
    assert store.take({5: 1, 7: 1, 11: 1}, CPU).clients == [5, 7, 11]
    assert held(store, dict.fromkeys((2, 3, 5, 7, 11), 1)) == []


def test_a_stack_that_cannot_be_written_is_not_held(tmp_path: Path) -> None:
    store = ResidentStates(StateFiles(tmp_path), 5)
    store.put(marked([2, 3], 1), 1, since([2, 3]))
    with pytest.raises(FedkdError, match=r"a as float32 \[13\] per client.*float32 \[17\]"):
        store.put(marked([2, 3], 2, size=17), 2, since([2, 3], 1))
    assert store.take({2: 2, 3: 2}, CPU).clients == []
    assert store.take({2: 1, 3: 1}, CPU).models["student"]["b"].tolist() == [1, 1]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_stacks_stay_on_their_device(tmp_path: Path) -> None:
    store, cuda = ResidentStates(StateFiles(tmp_path), 5), torch.device("cuda")
    states = drawn([5, 2, 3], 1)
    expected = spelled(states)
    resident = states.to(cuda)
    store.put(resident, 1, since(states))
    mixed = store.take({2: 1, 3: 1}, cuda)
    assert mixed.models["student"]["head.weight"].is_cuda
    assert spelled(mixed) == {k: expected[k] for k in (2, 3)}
    taken = store.take(since(states, 1), cuda)
    assert taken.models["student"]["mask"] is resident.models["student"]["mask"]
    again = store.take(since(states, 1), cuda)  # from disk
    assert again.models["student"]["mask"].is_cuda
    assert spelled(again) == expected


# --- Crashes -------------------------------------------------------------------------------------


class Died(BaseException):
    """The process ends here."""


@pytest.mark.parametrize("share", [0.0, 0.5], ids=["before", "within"])
def test_a_process_that_dies_while_writing_leaves_no_torn_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, share: float
) -> None:
    """Whichever write it dies before or within: the base is there, and the new round whole or not."""
    clients = [2, 3, 7, 101]
    left = 0

    class Mortal(FileIO):
        def write(self, content: memoryview, /) -> int:  # type: ignore[override]
            nonlocal left
            left -= 1
            if left < 0:
                super().write(content[: int(share * len(content))])
                raise Died
            return super().write(content)

    for writes in range(100):
        store = StateFiles(tmp_path / str(writes))
        for number, start in ((3, INITIAL), (4, 3), (5, 3)):
            store.save(marked(clients, number), number, since(clients, start))
        left = writes
        with monkeypatch.context() as patch:
            patch.setattr(state_files, "FileIO", Mortal)
            try:
                store.save(marked(clients, 6), 6, since(clients, 3))
            except Died:
                done = False
            else:
                done = True
        base, lost, new = (store.load(since(clients, number)) for number in (3, 5, 6))
        assert base.clients == clients
        for found, mark in ((base, 3), (lost, 5), (new, 6)):
            for client, state in spelled(found).items():
                assert state == row(marked([client], mark), 0)
        assert not set(lost.clients) & set(new.clients)
        if done:
            assert new.clients == clients
            break
        store.save(marked(clients, 6), 6, since(clients, 3))
        assert spelled(store.load(since(clients, 6))) == spelled(marked(clients, 6))
    assert writes > 2 * 5


# --- Many at once --------------------------------------------------------------------------------

SHARE = 3
"""Processes, each with every third client."""


def write_share(folder: str, index: int, barrier: Barrier) -> None:
    """Write one's own clients of seven files that all processes make at the same moment."""
    store = StateFiles(Path(folder))
    for number in range(7):
        clients = [k for k in range(100 * number, 100 * (number + 1)) if k % SHARE == index]
        barrier.wait(60)
        for round in (1, 2, 3):
            store.save(marked(clients, 10 * round + index), round, since(clients, round - 1))


@pytest.mark.slow
def test_processes_write_clients_of_the_same_files(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(SHARE)
    processes = [
        context.Process(target=write_share, args=(str(tmp_path), index, barrier))
        for index in range(SHARE)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert [path.name for path in files(tmp_path)] == [f"0-{n}.safetensors" for n in range(7)]
    everyone = range(700)
    for round in (2, 3):
        found = StateFiles(tmp_path).load(since(everyone, round))
        assert found.clients == list(everyone)
        expected = torch.tensor([10.0 * round + k % SHARE for k in everyone])
        assert torch.equal(found.models["student"]["b"], expected)
        assert torch.equal(found.models["student"]["a"], expected[:, None].expand(-1, 13))


def test_a_file_that_another_process_makes_meanwhile_is_not_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def name_late(size: int) -> str:
        """Name a temporary file once another process has made the file for good."""
        monkeypatch.setattr(state_files, "token_hex", token_hex)
        StateFiles(tmp_path).save(marked([3], 3), 1, {3: INITIAL})
        return token_hex(size)

    monkeypatch.setattr(state_files, "token_hex", name_late)
    StateFiles(tmp_path).save(marked([2], 2), 1, {2: INITIAL})
    found = StateFiles(tmp_path).load({2: 1, 3: 1})
    assert found.models["student"]["b"].tolist() == [2, 3]
    assert [path.name for path in files(tmp_path)] == ["0-0.safetensors"]


def test_a_client_that_runs_twice_at_a_time_has_one_state_or_the_other(tmp_path: Path) -> None:
    """One whose round timed out may still be writing while it starts the next."""
    store, size = StateFiles(tmp_path), 300_007
    errors: list[str] = []
    store.save(marked([7], 1, size), 1, {7: INITIAL})

    def write(number: int) -> None:
        states = marked([7], number, size)
        for _ in range(53):
            with suppress(FedkdError):  # the later round is there already
                store.save(states, number, {7: 1})

    def read() -> None:
        for _ in range(53):
            for number in (1, 2, 3):
                for tensor in store.load({7: number}).models.get("student", {}).values():
                    if (found := tensor.unique().tolist()) != [number]:
                        errors.append(f"round {number}: {found}")

    threads = [Thread(target=write, args=(n,)) for n in (2, 3)] + [Thread(target=read)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []


# --- What a user can fix ------------------------------------------------------------------------


def test_a_file_of_other_models_is_refused(tmp_path: Path) -> None:
    store = StateFiles(tmp_path)
    states = marked([2, 3], 1)
    store.save(states, 1, since(states))
    (path,) = files(tmp_path)
    before = path.read_bytes()
    a, b = states.models["student"].values()

    def refused(**stack: Tensor) -> str:
        other = States([2, 3], {"student": stack}, [0, 0])
        with pytest.raises(FedkdError) as error:
            store.save(other, 2, since(other, 1))
        return str(error.value)

    assert refused(a=a[:, :11], b=b) == (
        f"{path} holds student/a as float32 [13] per client, and the states have float32 [11]: "
        "they are of other models"
    )
    assert "student/b as float32 [] per client, and the states have int64 []" in refused(
        a=a, b=b.long()
    )
    assert "student/b as float32 [] per client, and the states have nothing" in refused(a=a)
    assert "student/c as nothing per client, and the states have float32 []" in refused(
        a=a, b=b, c=b
    )
    assert path.read_bytes() == before


def test_two_architectures_in_one_call_are_refused(tmp_path: Path) -> None:
    store = StateFiles(tmp_path, period=2)
    store.save(marked([0], 1), 1, {0: INITIAL})
    store.save(marked([1], 1, size=11), 1, {1: INITIAL})
    with pytest.raises(FedkdError, match=r"1-0.safetensors holds student/a as float32 \[11\]"):
        store.load({0: 1, 1: 1})


def test_files_of_other_clients_are_refused(tmp_path: Path) -> None:
    states = marked([2], 1)
    StateFiles(tmp_path, period=1).save(states, 1, {2: INITIAL})
    with pytest.raises(FedkdError, match=r"first 0, step 1, count 100, not for first 0, step 2,"):
        StateFiles(tmp_path, period=2).load({2: 1})


def header_of(path: Path) -> tuple[int, dict[str, Any]]:
    """Return a file's header, and its length without the eight bytes that say so."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    return length, json.loads(content[8 : 8 + length])


def flipped(path: Path, at: int) -> None:
    """Change one bit of a file."""
    content = bytearray(path.read_bytes())
    content[at] ^= 0x10
    path.write_bytes(content)


def test_a_flipped_byte_costs_at_most_its_own_client(tmp_path: Path) -> None:
    """Wherever it is: no state is ever read as another than was written."""
    states = drawn([2, 5, 71], 1)
    expected = spelled(states)
    store = StateFiles(tmp_path / "whole")
    for number in (1, 2):
        store.save(states, number, since(states, number - 1))
    (path,) = files(tmp_path)
    whole = path.read_bytes()
    start = 8 + header_of(path)[0]
    used = [at for at in range(start, len(whole)) if whole[at]]
    found: Counter[int] = Counter()
    for at in [*range(0, start, 7), *used[:: max(1, len(used) // 97)]]:
        flipped(path, at)
        try:
            read, damaged = store.find(since(states, 2))
        except FedkdError:  # for other clients, by what it says
            assert at < start
            read, damaged = States([], {}, []), dict.fromkeys(expected, "")
        path.write_bytes(whole)
        assert spelled(read) == {k: expected[k] for k in read.clients}
        assert set(damaged) <= set(expected) - set(read.clients)
        found[len(read)] += 1
        if at < start:
            assert len(read) == 0
    assert set(found) == {0, 2, 3}  # the header; a state of round 2; one of round 1


def test_a_damaged_state_is_named_and_written_anew(tmp_path: Path) -> None:
    store = StateFiles(tmp_path)
    store.save(marked([2, 3], 1), 1, since([2, 3]))
    (path,) = files(tmp_path)
    length, header = header_of(path)
    flipped(
        path,
        8 + length + header["student/a"]["data_offsets"][0] + (CLIENTS_A_FILE + 3) * 13 * 4 + 5,
    )
    states, damaged = store.find(since([2, 3], 1))
    assert spelled(states) == spelled(marked([2], 1))
    reason = f"{path} is damaged: what client 3 kept of round 1 is not as it was written"
    assert damaged == {3: reason}
    with pytest.raises(FedkdError, match=re.escape(reason)):
        store.load(since([2, 3], 1))
    store.save(marked([3], 2), 2, {3: INITIAL})
    assert spelled(store.load({2: 1, 3: 2})) == spelled(marked([2], 1)) | spelled(marked([3], 2))
    assert files(tmp_path) == [path]


def test_a_damaged_round_is_not_taken_for_that_of_a_newer_state(tmp_path: Path) -> None:
    store = StateFiles(tmp_path)
    store.save(marked([2, 3], 1), 1, since([2, 3]))
    (path,) = files(tmp_path)
    at = path.read_bytes().index((1).to_bytes(8, "little") * 2)  # of both clients, side by side
    flipped(path, at + 3)
    assert store.find(since([2, 3], 1))[0].clients == [3]
    store.save(marked([2], 2), 2, {2: INITIAL})
    assert spelled(store.load({2: 2, 3: 1})) == spelled(marked([2], 2)) | spelled(marked([3], 1))


def test_a_file_that_two_processes_find_damaged_is_replaced_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = StateFiles(tmp_path)
    path = tmp_path / "0-0.safetensors"
    path.write_bytes(b"rubbish")
    aside = state_files._Location.set_aside

    def late(*given: Any) -> None:
        """Do so when another process has done it and has written its state."""
        monkeypatch.setattr(state_files._Location, "set_aside", aside)
        StateFiles(tmp_path).save(marked([3], 3), 1, {3: INITIAL})
        aside(*given)

    monkeypatch.setattr(state_files._Location, "set_aside", late)
    store.save(marked([2], 2), 1, {2: INITIAL})
    assert spelled(store.load({2: 1, 3: 1})) == spelled(marked([2], 2)) | spelled(marked([3], 3))
    assert (tmp_path / "0-0.safetensors.damaged").read_bytes() == b"rubbish"


def test_a_system_that_moves_few_bytes_at_a_time_is_asked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Slow(FileIO):
        def write(self, content: memoryview, /) -> int:  # type: ignore[override]
            return super().write(content[:7])

        def readinto(self, content: memoryview, /) -> int:  # type: ignore[override]
            return super().readinto(content[:11])

    monkeypatch.setattr(state_files, "FileIO", Slow)
    states = drawn([2, 3, 7], 1)
    StateFiles(tmp_path).save(states, 1, since(states))
    assert spelled(StateFiles(tmp_path).load(since(states, 1))) == spelled(states)


@pytest.mark.parametrize("length", [0, 5, 8, 100, -1])
def test_a_file_cut_short_is_named_and_replaced(tmp_path: Path, length: int) -> None:
    store = StateFiles(tmp_path)
    store.save(marked([2], 1), 1, {2: INITIAL})
    (path,) = files(tmp_path)
    cut = path.read_bytes()[:length]
    path.write_bytes(cut)
    reason = f"{path} (is not a file of client states|has .* bytes instead of|ends early)"
    with pytest.raises(FedkdError, match=reason):
        store.load({2: 1})
    store.save(marked([2], 2), 2, {2: 1})
    assert spelled(store.load({2: 2, 3: 1})) == spelled(marked([2], 2))
    assert [each.name for each in files(tmp_path)] == [path.name, f"{path.name}.damaged"]
    assert files(tmp_path)[1].read_bytes() == cut


def test_another_safetensors_file_is_refused(tmp_path: Path) -> None:
    save_file({"round": torch.zeros(2, 100)}, tmp_path / "0-0.safetensors", {"first": "0"})
    with pytest.raises(FedkdError, match=r"0-0\.safetensors is not a file of client states"):
        StateFiles(tmp_path).load({2: 1})
    save_file({"a": torch.zeros(3, 100)}, tmp_path / "0-0.safetensors", {"first": "0"})
    with pytest.raises(FedkdError, match=r"0-0\.safetensors is not a file of client states"):
        StateFiles(tmp_path).load({2: 1})


def test_a_dtype_that_safetensors_does_not_know_is_named(tmp_path: Path) -> None:
    stack = {"a": torch.zeros(1, 3, dtype=torch.complex128)}
    with pytest.raises(FedkdError, match=r"student/a is torch.complex128: .*F64, F32"):
        StateFiles(tmp_path).save(States([2], {"student": stack}, [0]), 1, {2: INITIAL})
    assert files(tmp_path) == []


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "clients").write_text("in the way")
    store = StateFiles(tmp_path / "clients")
    with pytest.raises(FedkdError, match=r"clients/0-0\.safetensors cannot be written: \w+"):
        store.save(marked([2], 1), 1, {2: INITIAL})


def test_a_full_disk_is_named_and_the_base_is_there(tmp_path: Path) -> None:
    """A limit on the size of files stands for the end of the disk."""
    store, clients = StateFiles(tmp_path), [2, 71]
    for number in (1, 2):
        store.save(marked(clients, number), number, since(clients, number - 1))
    length, header = header_of(tmp_path / "0-0.safetensors")
    between = 8 + length + header["student/a"]["data_offsets"][0] + (CLIENTS_A_FILE + 50) * 13 * 4
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (between, hard))
    try:
        with pytest.raises(FedkdError, match=r"0-0\.safetensors cannot be written: File too large"):
            store.save(marked(clients, 3), 3, since(clients, 2))
        with pytest.raises(FedkdError, match=r"0-1\.safetensors cannot be written: File too large"):
            store.save(marked([101], 3), 3, {101: 2})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in files(tmp_path)] == ["0-0.safetensors"]
    first, second = load_file(tmp_path / "0-0.safetensors")["student/a"][:, clients].unbind(1)
    assert (first[:, 0].tolist(), second[:, 0].tolist()) == ([2, 3], [2, 1])  # half was written
    assert store.load(since(clients, 3)).clients == []
    assert spelled(store.load(since(clients, 2))) == spelled(marked(clients, 2))
