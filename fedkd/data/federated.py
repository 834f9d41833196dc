"""Federated data: the public set, private shards and test set of an experiment.

They depend on the experiment alone, so a client in another process, the server and the central
baseline all hold the same images in the same order.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from fedkd.data.cache import data_folder
from fedkd.data.datasets import Dataset
from fedkd.data.images import Images
from fedkd.data.partition import label_counts, partition, split_public
from fedkd.data.sources import fingerprints, source
from fedkd.errors import FedkdError, Setting
from fedkd.experiment import Experiment
from fedkd.knowledge import Sizes
from fedkd.machine import resolve_device
from fedkd.randomness import permutation

_SUBSET = "subset"


@dataclass(frozen=True, eq=False)
class FederatedData:
    """Images on the device, and which of them each client holds.

    Attributes:
        num_classes: C.
        input_shape: ``(c, h, w)``.
        train: the labelled training images into which `shards` are indices.
        test: the test images; never trained on or split.
        public: the P public images, with labels only where ``public-labels`` says so.
        shards: each client's private images, int64 indices into `train`.
        pooled: the training images whose labels some party holds: all shards and a labelled public set.
        private_label_counts: int64 ``[K, C]``.
        class_names: one for each class.
        public_truth: true classes of the public images, int64 ``[P]`` on the CPU, used by measurements
            alone, even where no party of the federation knows them; `None` if they are of other classes.
        fingerprints: of the data sets that all this was cut from; see `fedkd.data.sources`.
    """

    num_classes: int
    input_shape: tuple[int, int, int]
    train: Images
    test: Images
    public: Images
    shards: tuple[Tensor, ...]
    pooled: Tensor
    private_label_counts: Tensor
    class_names: tuple[str, ...]
    public_truth: Tensor | None
    fingerprints: Mapping[str, str]

    @property
    def sizes(self) -> Sizes:
        """The sizes of soft labels on the public set."""
        return Sizes(len(self.public), self.num_classes)


def class_counts(data: FederatedData) -> dict[str, Any]:
    """Return the contents of ``shards.json``: how many images of each class each party holds."""
    classes, truth = data.num_classes, data.public_truth
    assert data.test.labels is not None
    return {
        "classes": list(data.class_names),
        "counts": data.private_label_counts.tolist(),
        "public": None if truth is None else truth.bincount(minlength=classes).tolist(),
        "test": data.test.labels.cpu().bincount(minlength=classes).tolist(),
    }


def federated_data(experiment: Experiment) -> FederatedData:
    """Return the experiment's data, built once per process for experiments that share it.

    A data set of the user is loaded again by `fedkd.data.sources.reload`, not here.

    Raises:
        FedkdError: the data set cannot be loaded, or not be split as the experiment says.
    """
    shared = {key: getattr(experiment, key) for key in _DATA_KEYS}
    seed, device = experiment.split_seed, str(resolve_device(experiment.device))
    key = Experiment(**shared, partition_seed=seed, device=device)
    return _data(key, tuple(fingerprints(experiment).items()))


_DATA_KEYS = ("data_dir", *Experiment.keys("data", "federated data"))
"""The keys that decide the data, besides the split's seed and the device."""


@lru_cache(maxsize=8)
def _data(experiment: Experiment, fingerprints: tuple[tuple[str, str], ...]) -> FederatedData:
    """Return the data of an experiment whose other keys have their defaults."""
    dataset = source(experiment.dataset, experiment.data_dir).dataset
    train = _subset(dataset, "train", experiment.train_size, experiment.device)
    if experiment.fold == "none":
        test = _subset(dataset, "test", experiment.test_size, experiment.device)
    else:
        train, test = _held_out(train, experiment.fold)
    assert train.labels is not None
    labels = train.labels.cpu()
    public, public_truth, private_rows = _public(experiment, dataset, train, labels)
    dealt = partition(
        labels[private_rows],
        kind=experiment.partition,
        num_clients=experiment.num_clients,
        seed=experiment.split_seed,
        alpha=experiment.partition_alpha,
        classes_per_client=experiment.classes_per_client,
        min_size=experiment.min_partition_size,
        cache_dir=data_folder(experiment.data_dir) / "partitions",
    )
    shards = tuple(private_rows[rows] for rows in dealt)
    return FederatedData(
        num_classes=dataset.num_classes,
        input_shape=dataset.input_shape,
        train=train,
        test=test,
        public=public,
        shards=shards,
        pooled=torch.arange(len(train)) if experiment.public_labels else private_rows,
        private_label_counts=label_counts(labels, list(shards), dataset.num_classes),
        class_names=dataset.class_names,
        public_truth=public_truth,
        fingerprints=dict(fingerprints),
    )


def _public(
    experiment: Experiment, dataset: Dataset, train: Images, labels: Tensor
) -> tuple[Images, Tensor | None, Tensor]:
    """Return the public images, their true classes, and the rows of the private training images."""
    size = len(train) // 5 if experiment.public_size is None else experiment.public_size
    if experiment.public != "train":
        return (
            _public_from_another_data_set(experiment, size, dataset),
            None,
            torch.arange(len(train)),
        )
    public_rows, private_rows = split_public(labels, size, experiment.split_seed)
    rows = public_rows.to(train.device)
    images = train.keep(rows, labelled=experiment.public_labels)
    return images, labels[public_rows], private_rows


def _held_out(train: Images, fold: str) -> tuple[Images, Images]:
    """Return the training images outside a fold, and those of the fold.

    Folds have equal shares of every class, within one image, and depend on no seed.
    """
    assert train.labels is not None
    number, count = (int(part) for part in fold.split("/"))
    labels = train.labels.cpu()
    fold_of, dealt = torch.empty_like(labels), 0
    for label in labels.unique().tolist():
        rows = (labels == label).nonzero().flatten()
        drawn = permutation(len(rows), "fold", label)
        # Each class continues where the one before it ended: folds differ by one image at most.
        fold_of[rows[drawn]] = (torch.arange(len(rows)) + dealt) % count
        dealt += len(rows)
    chosen = (fold_of == number - 1).to(train.device)
    if not chosen.any() or chosen.all():
        raise FedkdError(
            Setting("fold", fold), f": {len(labels)} training images have no such fold"
        )
    return train.keep((~chosen).nonzero().flatten()), train.keep(chosen.nonzero().flatten())


def _subset(dataset: Dataset, split: str, size: int | None, device: str) -> Images:
    """Return a split's images, or a fixed random part of them that depends on no seed."""
    pixels, labels = (
        (dataset.train_images, dataset.train_labels)
        if split == "train"
        else (dataset.test_images, dataset.test_labels)
    )
    if size is not None and size > len(pixels):
        raise FedkdError(
            f"{split}-size = {size}: {dataset.name} has {len(pixels)} {split} images; "
            f"accepted: 10 to {len(pixels)}, or auto"
        )
    if size is not None and size < len(pixels):
        rows = permutation(len(pixels), _SUBSET, split)[:size].sort().values
        pixels, labels = pixels[rows], labels[rows]
    return Images(pixels.to(device), labels.to(device), dataset.mean, dataset.std)


def _refuse_overlap(name: str, public: Tensor, private: Dataset) -> None:
    """Raise an error if a public set shares images with the private or the test images."""
    public_images = {image.numpy().tobytes() for image in public}
    for split, images in (("training", private.train_images), ("test", private.test_images)):
        if any(image.numpy().tobytes() in public_images for image in images):
            raise FedkdError(
                Setting("public", name),
                f": it shares images with the {split} images of ",
                Setting("dataset", private.name),
                "; set public = 'train' or choose a data set without them",
            )


def _public_from_another_data_set(experiment: Experiment, size: int, private: Dataset) -> Images:
    """Return an unlabelled public set drawn from another data set's training split."""
    name = experiment.public
    other = source(name, experiment.data_dir, "public").dataset
    if other.input_shape != private.input_shape:
        raise FedkdError(
            Setting("public", name),
            f": its images are {other.input_shape}, those of ",
            Setting("dataset", private.name),
            f" are {private.input_shape}; both must have the same shape",
        )
    if size > len(other.train_images):
        raise FedkdError(
            Setting("public-size", size), f": {name} has {len(other.train_images)} training images"
        )
    drawn = permutation(len(other.train_images), experiment.split_seed, "public")
    rows = drawn[:size].sort().values
    _refuse_overlap(name, other.train_images[rows], private)
    # Normalised like the private images: a client has one input pipeline.
    pixels = other.train_images[rows].to(experiment.device)
    return Images(pixels, None, private.mean, private.std)
