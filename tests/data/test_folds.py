"""Folds: parts of the training images that stand in for the test set, which nothing may look at."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from federation_tools import tiny
from flwr.app import RecordDict
from torch import Tensor

import fedkd
from fedkd import data
from fedkd.data import federated, sources
from fedkd.data.federated import FederatedData, class_counts, federated_data
from fedkd.data.images import Images
from fedkd.errors import FedkdError
from fedkd.experiment import Experiment
from fedkd.federation.messages import decode_experiment, experiment_record

N = 151


@pytest.fixture(autouse=True)
def fresh_data() -> Iterator[None]:
    """Keep no split of other data, before or after."""
    fresh()
    yield
    fresh()


def fresh() -> None:
    federated._data.cache_clear()
    sources._sources.clear()


def rows_of(images: Tensor, among: Tensor) -> list[int]:
    """Find images by their pixels."""
    place = {image.numpy().tobytes(): row for row, image in enumerate(among)}
    assert len(place) == len(among)  # no two alike, or this finds the wrong one
    return [place[image.numpy().tobytes()] for image in images]


def folds(count: int, **keys: Any) -> list[FederatedData]:
    return [federated_data(tiny(fold=f"{i}/{count}", **keys)) for i in range(1, count + 1)]


def labels(images: Images) -> Tensor:
    assert images.labels is not None
    return images.labels


# --- Which images --------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [2, 3, 5, 7])
def test_every_training_image_is_in_one_fold_and_no_test_image_is(count: int) -> None:
    whole = federated_data(tiny()).train
    found = [rows_of(each.test.pixels, whole.pixels) for each in folds(count)]
    assert sorted(row for rows in found for row in rows) == list(range(N))
    for rows, each in zip(found, folds(count), strict=True):
        left = rows_of(each.train.pixels, whole.pixels)
        assert sorted(rows + left) == list(range(N))
        assert left == sorted(left)  # in their order
        assert labels(each.train).tolist() == labels(whole)[left].tolist()
        assert labels(each.test).tolist() == labels(whole)[rows].tolist()


@pytest.mark.parametrize("count", [2, 3, 5, 7])
def test_every_fold_has_its_share_of_every_class_and_of_all(count: int) -> None:
    by_class = torch.stack([labels(each.test).bincount(minlength=10) for each in folds(count)])
    assert int((by_class.max(0).values - by_class.min(0).values).max()) <= 1
    sizes = by_class.sum(1)
    assert int(sizes.max() - sizes.min()) <= 10  # one a class at most, and spread over the folds
    exact = labels(federated_data(tiny()).train).bincount(minlength=10).double() / count
    assert float((by_class.double() - exact).abs().max()) < 1


def test_folds_are_the_same_for_every_seed_partition_and_number_of_clients() -> None:
    first = federated_data(tiny(fold="2/3"))
    for keys in (
        {"seed": 8},
        {"partition_seed": 3},
        {"num_clients": 5, "partition": "dirichlet"},
        {"public_size": 11, "public_labels": False},
    ):
        other = federated_data(tiny(fold="2/3", **keys))
        assert torch.equal(first.test.pixels, other.test.pixels), keys
        assert torch.equal(first.train.pixels, other.train.pixels), keys


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"public_labels": False},
        {"partition": "dirichlet", "partition_alpha": 0.3, "seed": 3},
        {"public_size": None},
    ],
    ids=str,
)
def test_public_set_and_shards_share_out_what_is_left(keys: dict[str, Any]) -> None:
    for each in folds(3, **keys):
        held = set(rows_of(each.train.pixels, federated_data(tiny()).train.pixels))
        out = rows_of(each.test.pixels, federated_data(tiny()).train.pixels)
        assert held.isdisjoint(out)
        public = rows_of(each.public.pixels, each.train.pixels)
        private = [row for shard in each.shards for row in shard.tolist()]
        assert sorted(public + private) == list(range(len(each.train)))
        expected = len(each.train) // 5 if "public_size" in keys else 37
        assert len(public) == expected
        labelled = keys.get("public_labels", True)
        assert sorted(each.pooled.tolist()) == sorted(private + (public if labelled else []))
        assert each.public_truth is not None
        assert each.public_truth.tolist() == labels(each.train)[public].tolist()
        assert class_counts(each)["test"] == labels(each.test).bincount(minlength=10).tolist()
        counts = torch.tensor(class_counts(each)["counts"])
        assert torch.equal(counts.sum(0), labels(each.train)[private].bincount(minlength=10))


def test_clients_elsewhere_are_told_the_fold() -> None:
    experiment = tiny(fold="2/5")
    told = decode_experiment(RecordDict({"experiment": experiment_record(experiment)}))
    assert told.fold == "2/5"
    assert torch.equal(federated_data(told).train.pixels, federated_data(experiment).train.pixels)


@pytest.mark.parametrize(
    "fold", ["0/3", "4/3", "1/1", "1", "2/3/4", "1/-2", "auto", "-1/3", "01/2"]
)
def test_other_folds_are_refused(fold: str) -> None:
    with pytest.raises(FedkdError, match=f"fold = '{fold}'.*none, or I/N"):
        tiny(fold=fold)


def test_more_folds_than_images_are_refused_with_their_number() -> None:
    with pytest.raises(FedkdError, match=r"fold = '997/1009': 151 training images"):
        federated_data(tiny(fold="997/1009"))


# --- Nobody looks at the test set, or at the fold ------------------------------------------------


def with_garbage(monkeypatch: pytest.MonkeyPatch, split: str, rows: Tensor | None = None) -> None:
    """Replace images, and shuffle labels, of the data set as it is loaded."""
    honest = data.load

    def load(name: str, folder: str | None = None, *, key: str = "dataset") -> data.Dataset:
        found = honest(name, folder, key=key)
        pixels = getattr(found, f"{split}_images").clone()
        changed = torch.arange(len(pixels)) if rows is None else rows
        noise = torch.randint(0, 256, pixels.shape, generator=torch.Generator().manual_seed(1))
        pixels[changed] = noise[changed].to(torch.uint8)
        truth = getattr(found, f"{split}_labels").clone()
        if rows is None:
            truth = 9 - truth
        return replace(found, **{f"{split}_images": pixels, f"{split}_labels": truth})

    monkeypatch.setattr(sources, "load", load)
    fresh()


def without(record: dict[str, Any], *beginnings: str) -> dict[str, Any]:
    return {n: v for n, v in record.items() if not n.startswith(beginnings)}


def trained(experiment: Experiment) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    run = fedkd.run(experiment)
    rows = [without(row, "seconds", "wire_") for row in run.rounds]
    return rows, without(run.result, "seconds", "wire_", "environment")


def test_test_images_replaced_by_garbage_change_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment = tiny(
        fold="1/3", strategy="DSFL", num_server_rounds=2, run_dir=str(tmp_path), plan="stacked-3"
    )
    central = {"teacher": "mlp-11", "name": None}
    before = trained(experiment.replace(name="before"))
    pooled = fedkd.central(experiment.replace(**central), save=False)
    with_garbage(monkeypatch, "test")
    assert trained(experiment.replace(name="after")) == before
    again = fedkd.central(experiment.replace(**central), save=False)
    assert without(again.as_json(), "seconds") == without(pooled.as_json(), "seconds")


def test_images_of_the_fold_are_not_trained_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Garbage in their place changes what is measured on them, and nothing of the training."""
    experiment = tiny(
        fold="1/3", strategy="DSFL", num_server_rounds=2, run_dir=str(tmp_path), plan="stacked-3"
    )
    before, central = trained(experiment.replace(name="before")), {"teacher": "mlp-11"}
    pooled = fedkd.central(experiment.replace(**central), save=False)
    rows = torch.tensor(
        rows_of(federated_data(experiment).test.pixels, data.load("digits").train_images)
    )
    with_garbage(monkeypatch, "train", rows)
    after = trained(experiment.replace(name="after"))
    measured = ("accuracy", "own_accuracy", "client_accuracy", "client_own", "server_accuracy")
    for row, other in zip([*before[0], before[1]], [*after[0], after[1]], strict=True):
        assert without(row, *measured) == without(other, *measured)
        assert row != other
    assert before[1]["training_accuracy"] == after[1]["training_accuracy"]
    again = fedkd.central(experiment.replace(**central), save=False)
    assert again.training == pooled.training
    assert again.student_accuracies != pooled.student_accuracies


def test_a_fold_is_as_many_images_as_the_result_says(tmp_path: Path) -> None:
    experiment = tiny(fold="3/7", strategy="LocalOnly", run_dir=str(tmp_path))
    run = fedkd.run(experiment)
    assert run.result["test_size"] == len(federated_data(experiment).test)
    assert run.experiment.fold == "3/7"
