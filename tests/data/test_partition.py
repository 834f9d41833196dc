"""Shards: each image with exactly one client, the same for the same seed, as skewed as asked."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from paths import ROOT
from torch import Tensor

from fedkd import data, randomness
from fedkd.data.partition import KINDS, label_counts, partition, split_public
from fedkd.errors import FedkdError

SKEWED = torch.repeat_interleave(torch.arange(7), torch.tensor([211, 83, 101, 61, 131, 47, 97]))
"""731 labels of 7 classes of different sizes, sorted."""


def cut(labels: Tensor = SKEWED, **changes: Any) -> list[Tensor]:
    keys: dict[str, Any] = {
        "kind": "dirichlet",
        "num_clients": 5,
        "seed": 0,
        "alpha": 0.5,
        "classes_per_client": 3,
        "min_size": 2,
    }
    return partition(labels, **{**keys, **changes})


def refusal(labels: Tensor = SKEWED, **changes: Any) -> str:
    """Return the text of the one-line error that this partition ends in."""
    with pytest.raises(FedkdError) as caught:
        cut(labels, **changes)
    text = str(caught.value)
    assert "\n" not in text
    return text


def equal(first: list[Tensor], second: list[Tensor]) -> bool:
    return len(first) == len(second) and all(map(torch.equal, first, second))


# --- What every kind promises ---------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(12))
def test_every_sample_has_exactly_one_client(kind: str, seed: int) -> None:
    labels = SKEWED[torch.randperm(731, generator=torch.Generator().manual_seed(seed))]
    shards = cut(labels, kind=kind, seed=seed, num_clients=(3, 5, 11)[seed % 3])
    assert len(shards) == (3, 5, 11)[seed % 3]
    assert sorted(torch.cat(shards).tolist()) == list(range(731))
    for shard in shards:
        assert shard.dtype == torch.int64
        assert len(shard) >= 2
        assert (shard.diff() > 0).all()


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    kind=st.sampled_from(KINDS),
    classes=st.integers(1, 6),
    samples=st.integers(1, 90),
    clients=st.integers(1, 20),
    each=st.integers(1, 7),
    least=st.integers(1, 5),
    alpha=st.floats(1e-3, 1e3),
    seed=st.integers(-(2**40), 2**40),
)
def test_a_partition_is_exact_or_refused(
    kind: str,
    classes: int,
    samples: int,
    clients: int,
    each: int,
    least: int,
    alpha: float,
    seed: int,
) -> None:
    labels = torch.randint(classes, (samples,), generator=torch.Generator().manual_seed(seed))
    try:
        shards = cut(
            labels,
            kind=kind,
            num_clients=clients,
            classes_per_client=each,
            min_size=least,
            alpha=alpha,
            seed=seed,
        )
    except FedkdError as error:
        assert "\n" not in str(error)  # noqa: PT017 (either outcome is right)
        return
    assert len(shards) == clients
    assert min(len(shard) for shard in shards) >= least
    assert sorted(torch.cat(shards).tolist()) == list(range(samples))


@pytest.mark.parametrize("kind", KINDS)
def test_the_seed_decides(kind: str) -> None:
    first = cut(kind=kind, seed=3)
    assert equal(first, cut(kind=kind, seed=3))
    assert not equal(first, cut(kind=kind, seed=4))


@pytest.mark.parametrize("kind", KINDS)
def test_the_seed_decides_which_samples_of_a_class_stay_together(kind: str) -> None:
    """Stored order must not: the partitioners themselves cut each class into runs of it."""
    labels = torch.zeros(60, dtype=torch.int64)
    together = torch.zeros(60, 60)
    for seed in range(8):
        shards = cut(labels, kind=kind, num_clients=3, classes_per_client=1, alpha=100.0, seed=seed)
        for shard in shards:
            together[shard[:, None], shard] += 1 / 8
    neighbours = together.diagonal(1).mean().item()  # uncut runs would give 57/59
    distant = together.diagonal(30).mean().item()
    assert neighbours < 0.5
    assert abs(neighbours - distant) < 0.15


# --- What each kind is ----------------------------------------------------------------------------


def test_iid_parts_are_equal_and_alike() -> None:
    labels = torch.arange(10).repeat_interleave(301)
    shards = cut(labels, kind="iid", num_clients=7)
    sizes = [len(shard) for shard in shards]
    assert max(sizes) - min(sizes) <= 1
    counts = label_counts(labels, shards, 10).double()  # 43 of each class expected
    expected = counts.sum(1, keepdim=True) * counts.sum(0) / counts.sum()
    chi_square = ((counts - expected) ** 2 / expected).sum().item()
    assert 25 < chi_square < 90  # 54 degrees of freedom: 0.1 % lie below 27, 0.1 % above 91


@pytest.mark.parametrize("alpha", [0.2, 1.0, 10.0])
def test_dirichlet_proportions_have_the_moments_of_the_law(alpha: float) -> None:
    """E[p²] = (α + 1) / (K (Kα + 1)) for the share p of a class that a client gets."""
    clients, classes, seeds = 3, 7, 30
    labels = torch.arange(classes).repeat(211)
    shares = (
        torch.stack(
            [
                label_counts(labels, cut(labels, num_clients=3, alpha=alpha, seed=s, min_size=1), 7)
                for s in range(seeds)
            ]
        ).double()
        / 211
    )  # [seeds, K, C]
    assert shares.mean((0, 2)).numpy() == pytest.approx(np.full(3, 1 / 3), abs=0.1)
    square = (alpha + 1) / (clients * (clients * alpha + 1))
    draws = np.random.default_rng(7).dirichlet([alpha] * clients, 20_000)
    error = (draws**2).sum(1).std() / math.sqrt(seeds * classes)  # of a mean over as many draws
    assert shares.square().sum(1).mean().item() == pytest.approx(clients * square, abs=4 * error)


def test_dirichlet_limits() -> None:
    labels = torch.arange(7).repeat(211)
    even = label_counts(labels, cut(labels, alpha=1e3), 7)
    assert (even - 211 / 5).abs().max() < 211 / 5 * 0.25
    skewed = label_counts(labels, cut(labels, alpha=1e-3, num_clients=2, min_size=1, seed=1), 7)
    assert (skewed.max(0).values > 0.99 * 211).all()


def test_dirichlet_is_the_cut_written_out() -> None:
    """The same draws and roundings in numpy alone: order, columns and indices are wired right."""
    seed, clients = 5, 4
    order = randomness.permutation(len(SKEWED), "partition-order", seed).numpy()
    generator = np.random.default_rng(randomness.key("partition", seed))
    expected: list[list[int]] = [[] for _ in range(clients)]
    for label in range(7):
        members = order[SKEWED.numpy()[order] == label]
        shares = generator.dirichlet([0.5] * clients)
        cuts = (shares.cumsum() * len(members)).astype(int)[:-1]
        for client, part in enumerate(np.split(members, cuts)):
            expected[client].extend(part.tolist())
    found = [shard.tolist() for shard in cut(num_clients=clients, seed=seed, alpha=0.5)]
    assert found == [sorted(part) for part in expected]


def test_shards_are_equal_blocks_of_the_sorted_labels() -> None:
    labels = torch.arange(10).repeat_interleave(30)
    shards = cut(labels, kind="shard", num_clients=5, classes_per_client=2)
    assert [len(shard) for shard in shards] == [60] * 5
    counts = label_counts(labels, shards, 10)
    assert sorted(counts.flatten().tolist()) == [0] * 40 + [30] * 10  # each class with one client
    blocks = {tuple(row.nonzero().flatten().tolist()) for row in counts}
    assert blocks != {(0, 1), (2, 3), (4, 5), (6, 7), (8, 9)}  # dealt, not handed out in order


def test_shards_that_do_not_divide_evenly() -> None:
    for samples in range(100, 140):
        labels = torch.arange(samples) % 7
        sizes = [len(s) for s in cut(labels, kind="shard", num_clients=3, classes_per_client=2)]
        block = math.ceil(samples / 6)
        assert sum(sizes) == samples
        assert all(2 * block - 6 < size <= 2 * block for size in sizes)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("clients", [3, 4, 6, 7, 19])
def test_pathological_clients_have_exactly_so_many_classes(clients: int, seed: int) -> None:
    shards = cut(kind="pathological", num_clients=clients, classes_per_client=3, seed=seed)
    counts = label_counts(SKEWED, shards, 7)
    has = counts > 0
    assert has.sum(1).tolist() == [3] * clients
    assert has.any(0).all()
    for label in range(7):  # divided evenly between its clients
        parts = counts[:, label][has[:, label]]
        assert parts.max() - parts.min() <= 1
    if clients >= 7:
        assert all(has[client, client % 7] for client in range(clients))
    else:  # dealt in turn
        assert has.sum(0).max() - has.sum(0).min() <= 1


def test_pathological_hands_differ_between_seeds() -> None:
    for clients in (4, 10):
        hands = {
            tuple(label_counts(SKEWED, shards, 7).bool().flatten().tolist())
            for shards in (
                cut(kind="pathological", num_clients=clients, seed=seed) for seed in range(5)
            )
        }
        assert len(hands) == 5


def test_real_labels(real_data: Path) -> None:
    labels = data.load("mnist", real_data).train_labels
    public, private = split_public(labels, 10_000, 0)
    rest = labels[private]
    shards = cut(rest, num_clients=100, alpha=0.3, min_size=10)
    counts = label_counts(rest, shards, 10)
    assert torch.equal(counts.sum(0) + labels[public].bincount(), labels.bincount())
    assert counts.sum(1).tolist() == [len(shard) for shard in shards]
    top = (counts.max(1).values / counts.sum(1)).mean().item()
    assert 0.3 < top < 0.7  # the largest class of a client: 0.11 for iid, 1 for one class each


def test_label_counts() -> None:
    labels = torch.tensor([2, 0, 2, 1, 2])
    shards = [torch.tensor([0, 2, 3]), torch.tensor([1]), torch.tensor([4])]
    assert label_counts(labels, shards, 4).tolist() == [[0, 1, 2, 0], [1, 0, 0, 0], [0, 0, 1, 0]]


# --- The public set -------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 97, 730])
def test_public_split_is_exact(size: int) -> None:
    public, private = split_public(SKEWED, size, seed=2)
    assert (len(public), len(private)) == (size, 731 - size)
    assert sorted([*public.tolist(), *private.tolist()]) == list(range(731))
    assert (private.diff() > 0).all()


def test_public_split_by_seed_and_size() -> None:
    first, _ = split_public(SKEWED, 97, seed=2)
    assert torch.equal(first, split_public(SKEWED, 97, seed=2)[0])
    assert torch.equal(first, split_public(SKEWED, 101, seed=2)[0][:97])
    assert set(first.tolist()) != set(split_public(SKEWED, 97, seed=3)[0].tolist())


def test_public_split_is_uniform() -> None:
    seen = torch.zeros(40)
    for seed in range(400):
        seen[split_public(torch.zeros(40), 10, seed)[0]] += 1
    assert ((seen - 100).abs() < 4 * math.sqrt(400 * 0.25 * 0.75)).all()


@pytest.mark.parametrize("size", [-1, 0, 731, 1000])
def test_public_size_out_of_range(size: int) -> None:
    with pytest.raises(FedkdError, match=rf"^public-size = {size} must lie in 1\.\.730"):
        split_public(SKEWED, size, seed=0)


# --- What is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"kind": "dirichelt"}, "partition = 'dirichelt' is unknown (did you mean 'dirichlet'?)"),
        ({"num_clients": 0}, "num-clients = 0 must lie in 1..731"),
        ({"num_clients": 732, "kind": "iid"}, "num-clients = 732 must lie in 1..731"),
        ({"min_size": 0}, "min-partition-size = 0 must be 1 or more"),
        ({"min_size": 147}, "lower num-clients, or min-partition-size to 146 or less"),
        ({"alpha": 0.0}, "partition-alpha = 0.0 must be positive"),
        ({"alpha": -0.5}, "partition-alpha = -0.5 must be positive"),
        ({"alpha": math.nan}, "partition-alpha = nan must be positive"),
        ({"alpha": math.inf}, "partition-alpha = inf must be positive"),
        (
            {"alpha": 0.01, "num_clients": 100},
            "raise partition-alpha, or lower num-clients or min-partition-size",
        ),
        ({"kind": "shard", "classes_per_client": 0}, "classes-per-client = 0 must be 1 or more"),
        ({"kind": "pathological", "classes_per_client": 0}, "classes-per-client = 0 must be 1"),
        (
            {"kind": "shard", "num_clients": 244, "min_size": 1},
            "244 clients with 3 blocks each need 732 images, and there are only 731",
        ),
        (
            {"kind": "shard", "num_clients": 5, "min_size": 140, "classes_per_client": 17},
            "lower num-clients, classes-per-client or min-partition-size",
        ),
        (
            {"kind": "pathological", "classes_per_client": 8},
            "classes-per-client = 8 must lie in 1..7, the number of classes",
        ),
        (
            {"kind": "pathological", "num_clients": 2},
            "raise classes-per-client to 4 or more, or num-clients to 3 or more",
        ),
        (
            {"kind": "pathological", "num_clients": 4, "classes_per_client": 2, "min_size": 182},
            "partition = 'pathological' is impossible here",
        ),
        (
            {"kind": "pathological", "num_clients": 200, "min_size": 1},
            "partition = 'pathological' is impossible here",
        ),
    ],
)
def test_impossible_requests_say_what_to_change(changes: dict[str, Any], expected: str) -> None:
    assert expected in refusal(**changes)


def test_a_thousand_clients_at_a_tenth(real_data: Path) -> None:
    labels = data.load("mnist", real_data).train_labels
    text = refusal(labels, num_clients=1_000, alpha=0.1)
    assert "partition-alpha = 0.1" in text
    assert "fewer than 2 images for some of 1000 clients" in text
    assert "raise partition-alpha, or lower num-clients or min-partition-size" in text


def test_pathological_names_only_classes_that_occur() -> None:
    labels = torch.tensor([0, 4, 9]).repeat(20)
    assert "must lie in 1..3" in refusal(labels, kind="pathological", classes_per_client=4)
    shards = cut(labels, kind="pathological", classes_per_client=2)
    assert (label_counts(labels, shards, 10) > 0).sum(1).tolist() == [2] * 5


# --- Kept for other processes ---------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_kept_partition_needs_no_flwr_datasets(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = cut(kind=kind, num_clients=7, cache_dir=tmp_path / "made")
    assert equal(first, cut(kind=kind, num_clients=7))
    for name in ("flwr_datasets", "datasets"):
        monkeypatch.setitem(sys.modules, name, None)  # importing it fails from here on
    assert equal(first, cut(kind=kind, num_clients=7, cache_dir=tmp_path / "made"))
    with pytest.raises(ImportError):
        cut(kind=kind, num_clients=7)


def test_whatever_decides_the_result_names_the_file(tmp_path: Path) -> None:
    cut(cache_dir=tmp_path)
    others: list[dict[str, Any]] = [
        {"seed": 1},
        {"alpha": 0.6},
        {"num_clients": 4},
        {"min_size": 3},
        {"kind": "shard"},
        {"kind": "shard", "classes_per_client": 2},
        {"labels": SKEWED.flip(0)},
    ]
    for number, changes in enumerate(others, start=2):
        kept = cut(**changes, cache_dir=tmp_path)
        assert equal(kept, cut(**changes))
        assert len(list(tmp_path.iterdir())) == number


def test_a_damaged_file_is_made_anew(tmp_path: Path) -> None:
    first = cut(cache_dir=tmp_path)
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[-1] ^= 1
    for wrong in (b"", whole[:-8], b"\0" * len(whole), bytes(flipped)):
        path.write_bytes(wrong)
        assert equal(first, cut(cache_dir=tmp_path))
        assert path.read_bytes() == whole


def test_a_folder_that_cannot_be_written(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("in the way")
    shards = cut(cache_dir=tmp_path / "file")
    assert equal(shards, cut())
    assert "the partition is not cached for other processes" in caplog.text


@pytest.mark.slow
def test_importing_the_module_imports_no_partitioner() -> None:
    code = (
        "import sys, fedkd.data.partition; "
        "print([m for m in ('flwr', 'flwr_datasets', 'datasets', 'ray') if m in sys.modules])"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True
    )
    assert done.stdout.strip() == "[]"
