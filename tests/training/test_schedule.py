"""The schedule against ``DataLoader``, and what a stream of batches owes its samples."""

from __future__ import annotations

from collections import Counter
from itertools import chain

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from fedkd.randomness import permutation
from fedkd.training.schedule import Schedule, Stream, schedule, steps_per_epoch

B = 8
SIZES = [5, 17, 64, 1, 8, 9]
EPOCHS = 3
STREAMS: list[Stream] = [(11, k, "round", 2) for k in range(len(SIZES))]


def loader_batches(n: int, stream: Stream, epochs: int, batch_size: int = B) -> list[list[int]]:
    """Return what a DataLoader over ``0..n-1`` yields, visited in the order of the stream."""
    batches: list[list[int]] = []
    for epoch in range(epochs):
        order: list[int] = permutation(n, *stream, epoch).tolist()
        loader: DataLoader[int] = DataLoader(
            range(n),  # type: ignore[arg-type]
            batch_size=batch_size,
            sampler=order,
        )
        batches += [batch.tolist() for batch in loader]
    return batches


def real_batches(drawn: Schedule, k: int) -> list[list[int]]:
    """Return client k's batches without padding, by the schedule's own sizes."""
    return [drawn.positions[k, t, : int(drawn.sizes[k, t])].tolist() for t in range(drawn.steps[k])]


def whole_epochs(epochs: int = EPOCHS, batch_size: int = B) -> Schedule:
    steps = [epochs * steps_per_epoch(n, batch_size) for n in SIZES]
    return schedule(SIZES, steps, batch_size, STREAMS)


@pytest.mark.parametrize("batch_size", [1, 7, 8, 64, 100])
def test_batches_are_those_of_a_data_loader(batch_size: int) -> None:
    drawn = whole_epochs(batch_size=batch_size)
    for k, n in enumerate(SIZES):
        expected = loader_batches(n, STREAMS[k], EPOCHS, batch_size)
        assert len(expected) == drawn.steps[k] == EPOCHS * steps_per_epoch(n, batch_size)
        assert real_batches(drawn, k) == expected


def test_every_epoch_visits_each_sample_once_in_another_order() -> None:
    drawn = whole_epochs()
    for k, n in enumerate(SIZES):
        per_epoch = steps_per_epoch(n, B)
        batches = real_batches(drawn, k)
        flat = [list(chain(*batches[e * per_epoch :][:per_epoch])) for e in range(EPOCHS)]
        assert all(sorted(visited) == list(range(n)) for visited in flat)
        if n > 5:
            assert len({tuple(visited) for visited in flat}) == EPOCHS


def test_a_stream_with_more_steps_than_an_epoch_wraps_around() -> None:
    """As the private side of a step does while the public side sets the number of steps."""
    wanted = [7, 4, 19, 3, 2, 5]
    drawn = schedule(SIZES, wanted, B, STREAMS)
    assert drawn.steps == wanted
    for k, n in enumerate(SIZES):
        assert real_batches(drawn, k) == loader_batches(n, STREAMS[k], wanted[k])[: wanted[k]]

    visits = Counter(chain(*real_batches(drawn, 0)))
    assert set(visits.values()) == {7}  # 5 samples fit into one batch: each seen at every step


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_weights_sum_to_one_and_are_zero_on_padding(dtype: torch.dtype) -> None:
    drawn = whole_epochs().to(torch.device("cpu"), dtype)
    total = max(drawn.steps)
    assert drawn.positions.shape == drawn.weights.shape == (len(SIZES), total, B)
    assert drawn.sizes.shape == (len(SIZES), total)
    assert drawn.weights.dtype == dtype
    for k in range(len(SIZES)):
        for t in range(total):
            n = int(drawn.sizes[k, t])
            expected = torch.zeros(B, dtype=dtype)
            if t < drawn.steps[k]:
                assert 1 <= n <= B
                expected[:n] = torch.tensor(1.0, dtype=dtype) / n
            else:
                assert n == 0
            assert torch.equal(drawn.weights[k, t], expected)


def test_padding_points_at_a_real_sample() -> None:
    drawn = whole_epochs()
    for k, n in enumerate(SIZES):
        assert int(drawn.positions[k].max()) == n - 1
        assert int(drawn.positions[k].min()) == 0
        padding = drawn.positions[k][_padding(drawn, k)]
        assert bool((padding == 0).all())
    assert bool(_padding(drawn, 0).any())


def _padding(drawn: Schedule, k: int) -> Tensor:
    return torch.arange(B) >= drawn.sizes[k].unsqueeze(-1)


def test_a_client_s_batches_do_not_depend_on_the_others() -> None:
    together = whole_epochs()
    for k in (0, 2, 5):
        steps = together.steps[k]
        alone = schedule([SIZES[k]], [steps], B, [STREAMS[k]])
        assert torch.equal(alone.positions[0], together.positions[k, :steps])
        assert torch.equal(alone.sizes[0], together.sizes[k, :steps])

    others = schedule([64, 64], [24, 24], B, [STREAMS[2], (11, 2, "round", 3)])
    assert torch.equal(others.positions[0], together.positions[2])
    assert not torch.equal(others.positions[1], together.positions[2])


@pytest.mark.parametrize(
    ("samples", "batch_size", "expected"), [(1, 8, 1), (8, 8, 1), (9, 8, 2), (64, 8, 8), (0, 8, 0)]
)
def test_steps_per_epoch(samples: int, batch_size: int, expected: int) -> None:
    assert steps_per_epoch(samples, batch_size) == expected
