"""The data of an experiment: every image has one place, and all parties see the same."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from federation_tools import DATA, tiny
from torch import Tensor

from fedkd import data
from fedkd.data.federated import FederatedData, federated_data
from fedkd.errors import FedkdError
from fedkd.experiment import Experiment

KINDS = ["iid", "dirichlet", "shard", "pathological"]


def split(**keys: Any) -> FederatedData:
    return federated_data(tiny(**keys))


def as_bytes(pixels: Tensor) -> list[bytes]:
    return [image.numpy().tobytes() for image in pixels]


def labelled(pixels: Tensor, labels: Tensor | None) -> Counter[tuple[bytes, int]]:
    """Count images together with their labels; digits has a few that are equal."""
    assert labels is not None
    return Counter(zip(as_bytes(pixels), labels.tolist(), strict=True))


def same_split(one: FederatedData, other: FederatedData) -> bool:
    return (
        len(one.shards) == len(other.shards)
        and all(torch.equal(a, b) for a, b in zip(one.shards, other.shards, strict=True))
        and torch.equal(one.public.pixels, other.public.pixels)
    )


# --- Every image has one place -------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_public_set_and_shards_are_disjoint_and_cover_the_training_split(kind: str) -> None:
    found = split(partition=kind, train_size=None, test_size=None, public_size=101, num_clients=7)
    source = data.load("digits", DATA)
    private = torch.cat(found.shards)
    assert len(private.unique()) == len(private)
    assert len(private) + len(found.public) == len(source.train_images) == len(found.train)
    assert len(found.public) == 101
    dealt = labelled(found.train.pixels[private], _labels(found)[private])
    given = labelled(found.public.pixels, found.public.labels)
    assert dealt + given == labelled(source.train_images, source.train_labels)


def _labels(found: FederatedData) -> Tensor:
    assert found.train.labels is not None
    return found.train.labels


def test_the_test_set_is_the_data_sets_own_and_untouched() -> None:
    found = split(train_size=None, test_size=None)
    source = data.load("digits", DATA)
    assert torch.equal(found.test.pixels, source.test_images)
    assert found.test.labels is not None
    assert torch.equal(found.test.labels, source.test_labels)
    assert torch.equal(found.train.pixels, source.train_images)
    assert found.num_classes == source.num_classes == 10
    assert found.input_shape == source.input_shape == (1, 8, 8)
    assert tuple(found.train.mean) == source.mean
    assert tuple(found.test.std) == source.std


def test_every_client_has_its_minimum_and_the_counts_are_right() -> None:
    found = split(partition="dirichlet", partition_alpha=0.3, min_partition_size=5, train_size=700)
    assert min(map(len, found.shards)) >= 5
    for k, shard in enumerate(found.shards):
        counts = Counter(_labels(found)[shard].tolist())
        assert found.private_label_counts[k].tolist() == [counts[c] for c in range(10)]


# --- Labels of the public set --------------------------------------------------------------------


def test_an_unlabelled_public_set_has_no_labels_anywhere() -> None:
    hidden, shown = split(public_labels=False), split()
    assert hidden.public.labels is None
    assert shown.public.labels is not None
    assert torch.equal(hidden.public.pixels, shown.public.pixels)
    assert same_split(hidden, shown)


def test_pooled_are_the_images_whose_labels_somebody_holds() -> None:
    assert split().pooled.tolist() == list(range(151))
    hidden = split(public_labels=False)
    assert hidden.pooled.tolist() == torch.cat(hidden.shards).sort().values.tolist()
    assert len(hidden.pooled) == 151 - 37


# --- Seeds and sizes -----------------------------------------------------------------------------


def test_the_split_follows_from_the_seed_or_from_its_own() -> None:
    assert same_split(split(seed=1), split(seed=1))
    assert not same_split(split(seed=1), split(seed=2))
    assert same_split(split(seed=1, partition_seed=9), split(seed=2, partition_seed=9))
    assert same_split(split(seed=9), split(seed=2, partition_seed=9))
    assert not same_split(split(partition_seed=9), split(partition_seed=0))


def test_the_images_that_are_used_do_not_depend_on_the_seed() -> None:
    one, other = split(seed=1), split(seed=2)
    assert torch.equal(one.train.pixels, other.train.pixels)
    assert torch.equal(one.test.pixels, other.test.pixels)
    assert len(one.train) == 151
    assert len(one.test) == 61
    source = data.load("digits", DATA)
    everything = labelled(source.train_images, source.train_labels)
    assert not labelled(one.train.pixels, one.train.labels) - everything
    everything = labelled(source.test_images, source.test_labels)
    assert not labelled(one.test.pixels, one.test.labels) - everything


def test_a_public_set_is_a_fifth_unless_told_otherwise() -> None:
    assert len(split(public_size=None).public) == 151 // 5


def test_what_has_no_influence_on_the_data_shares_it() -> None:
    assert split(alpha=0.1, strategy="FedAvg") is split(alpha=0.9, student="lenet")
    assert split(seed=1) is not split(seed=2)


@pytest.mark.parametrize(
    ("keys", "reason"),
    [
        ({"train_size": 5000}, r"train-size = 5000: digits has 1438 train images.*10 to 1438"),
        ({"test_size": 360}, r"test-size = 360: digits has 359 test images"),
        ({"public_size": 151}, r"public-size = 151 must lie in 1\.\.150"),
        ({"num_clients": 200}, r"num-clients = 200 must lie in 1\.\.114"),
        ({"min_partition_size": 100}, "min-partition-size"),
        ({"dataset": "digit"}, "digit.*did you mean 'digits'"),
        ({"public": "mnist-5k", "public_labels": False}, r"public = 'mnist-5k'.*\(1, 28, 28\)"),
    ],
)
def test_an_impossible_split_is_refused_by_key(keys: dict[str, Any], reason: str) -> None:
    with pytest.raises(FedkdError, match=reason):
        split(**keys)


# --- A public set from elsewhere -----------------------------------------------------------------


def test_a_public_set_may_be_another_data_set(real_data: Path) -> None:
    keys: dict[str, Any] = {
        "dataset": "mnist",
        "data_dir": str(real_data),
        "public": "fashion-mnist",
        "public_labels": False,
        "partition": "iid",
        "train_size": 307,
        "test_size": 61,
        "public_size": 101,
        "num_clients": 3,
        "device": "cpu",
    }
    found = federated_data(Experiment(**keys))
    mnist, fashion = data.load("mnist", real_data), data.load("fashion-mnist", real_data)
    assert len(found.public) == 101
    assert found.public.labels is None
    theirs = set(as_bytes(fashion.train_images[:60_000]))
    assert set(as_bytes(found.public.pixels)) <= theirs
    assert len(set(as_bytes(found.public.pixels))) == 101
    # The private images are all of the training images, and the pipeline is that of MNIST.
    assert sorted(torch.cat(found.shards).tolist()) == list(range(307))
    assert found.pooled.tolist() == list(range(307))
    assert tuple(found.public.mean) == tuple(found.train.mean) == mnist.mean
    expected = (found.public.pixels.double() / 255 - mnist.mean[0]) / mnist.std[0]
    got = found.public.batch(torch.arange(101)).double()
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    other = federated_data(Experiment(**{**keys, "seed": 1}))
    assert not torch.equal(other.public.pixels, found.public.pixels)
    with pytest.raises(FedkdError, match=r"public-size = 60001: fashion-mnist has 60000"):
        federated_data(Experiment(**{**keys, "public_size": 60_001}))
    with pytest.raises(FedkdError, match=r"public = 'cifar10'.*\(3, 32, 32\).*\(1, 28, 28\)"):
        federated_data(Experiment(**{**keys, "public": "cifar10"}))
