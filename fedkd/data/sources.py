"""The data sets that this process has loaded, each once, with fingerprints of what was loaded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from fedkd.data.cache import data_folder, fingerprint, load
from fedkd.data.datasets import Dataset
from fedkd.experiment import Experiment


@dataclass(frozen=True, eq=False)
class Source:
    """A data set as it was loaded.

    Attributes:
        dataset: its tensors.
        fingerprints: of ``train`` and ``test``: images, labels, classes and normalisation.
    """

    dataset: Dataset
    fingerprints: Mapping[str, str]


_sources: dict[tuple[str, Path], Source] = {}
_holders = 0


def source(name: str, data_dir: str | None, key: str = "dataset") -> Source:
    """Return a data set, loaded once in this process.

    Raises:
        FedkdError: see `fedkd.data.cache.load`.
    """
    place = (name, data_folder(data_dir).absolute())
    if place not in _sources:
        _sources[place] = _loaded(name, data_dir, key)
    return _sources[place]


def fingerprints(experiment: Experiment) -> dict[str, str]:
    """Return those of an experiment's data sets: ``train``, ``test``, and ``public`` where it is another.

    Raises:
        FedkdError: see `fedkd.data.cache.load`.
    """
    found = dict(source(experiment.dataset, experiment.data_dir).fingerprints)
    if experiment.public != "train":
        public = source(experiment.public, experiment.data_dir, "public")
        found["public"] = public.fingerprints["train"]
    return found


def reload(experiment: Experiment) -> None:
    """Load an experiment's own data sets again: since this process did, the user may have changed them.

    Raises:
        FedkdError: see `fedkd.data.cache.load`.
    """
    for key in ("dataset", "public"):
        name = getattr(experiment, key)
        place = (name, data_folder(experiment.data_dir).absolute())
        if ":" in name and place in _sources and not _holders:
            again = _loaded(name, experiment.data_dir, key)
            if again.fingerprints != _sources[place].fingerprints:
                _sources[place] = again


@contextmanager
def held() -> Iterator[None]:
    """Load no data set again in the block: the runs of one study see the same images."""
    global _holders
    _holders += 1
    try:
        yield
    finally:
        _holders -= 1


def _loaded(name: str, data_dir: str | None, key: str) -> Source:
    dataset = load(name, data_dir, key=key)
    said = f"{dataset.class_names} {dataset.mean} {dataset.std}"
    return Source(
        dataset,
        {
            split: fingerprint({"images": images, "labels": labels}, said)
            for split, images, labels in (
                ("train", dataset.train_images, dataset.train_labels),
                ("test", dataset.test_images, dataset.test_labels),
            )
        },
    )
