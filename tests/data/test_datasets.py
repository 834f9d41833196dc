"""Data sets: the original pixels, one mapped copy, and one clear line for whatever is wrong."""

from __future__ import annotations

import errno
import hashlib
import os
import pickle
import struct
import sys
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fedkd import data
from fedkd.data import DATASETS, TENSORS, Dataset, DatasetInfo, cache
from fedkd.errors import FedkdError
from fedkd.experiment import Experiment

TINY = DatasetInfo(
    description="made up",
    num_train=11,
    num_test=5,
    input_shape=(1, 3, 2),
    class_names=("a", "b", "c"),
    mean=(0.5,),
    std=(0.25,),
    torchvision="MNIST",
)


def tiny_tensors(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "train_images": torch.randint(256, (11, 1, 3, 2), generator=generator).to(torch.uint8),
        "train_labels": torch.randint(3, (11,), generator=generator),
        "test_images": torch.randint(256, (5, 1, 3, 2), generator=generator).to(torch.uint8),
        "test_labels": torch.randint(3, (5,), generator=generator),
    }


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Register the small data set ``mnist`` with a known fingerprint, and return its cache file."""
    info = replace(TINY, sha256=data.fingerprint(tiny_tensors()))
    monkeypatch.setattr(cache, "DATASETS", MappingProxyType({"mnist": info}))
    path = tmp_path / "mnist.safetensors"
    save_file(tiny_tensors(), path)
    return path


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise urllib.error.URLError("Temporary failure in name resolution")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)


def message(name: str, data_dir: Path | None = None) -> str:
    """Return the text of the one-line error that loading `name` ends in."""
    with pytest.raises(FedkdError) as caught:
        data.load(name, data_dir)
    text = str(caught.value)
    assert "\n" not in text
    return text


# --- Without a download --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "fingerprint"),
    [
        ("digits", "2d532681d5be425b0a22c0579bd63874e3f1ab81cb6d9059a6a30c6c5c33dd9d"),
        ("mnist-5k", "d85894635dde363a2c88d3209dcd1e26759f7756db70d89a21423ffc63b935da"),
    ],
)
def test_shipped_sets_never_change(name: str, fingerprint: str, tmp_path: Path) -> None:
    dataset = data.load(name, tmp_path / "never-made")
    tensors = {tensor: getattr(dataset, tensor) for tensor in TENSORS}
    assert data.fingerprint(tensors) == fingerprint
    assert {tensor: list(value.shape) for tensor, value in tensors.items()} == DATASETS[name].shapes
    assert not (tmp_path / "never-made").exists()


@pytest.mark.parametrize("name", ["digits", "mnist-5k"])
def test_shipped_splits_are_stratified_in_every_prefix(name: str) -> None:
    dataset = data.load(name)
    for labels, fifths in ((dataset.train_labels, 4), (dataset.test_labels, 1)):
        whole = torch.cat([dataset.train_labels, dataset.test_labels]).bincount()
        assert ((labels.bincount() - whole * fifths / 5).abs() < 1).all()
        for size in (10, 50, 200):
            counts = labels[:size].bincount(minlength=10)
            assert counts.max() - counts.min() <= 2


def test_digits_are_the_images_of_scikit_learn() -> None:
    from sklearn.datasets import load_digits

    dataset = data.load("digits")
    images = torch.cat([dataset.train_images, dataset.test_images]).flatten(1)
    labels = torch.cat([dataset.train_labels, dataset.test_labels])
    ours = sorted(
        (label, *row) for label, row in zip(labels.tolist(), images.tolist(), strict=True)
    )
    source = load_digits()
    theirs = sorted(
        (int(label), *(int(255 * value / 16 + 0.5) for value in row))
        for label, row in zip(source.target, source.data, strict=True)
    )
    assert ours == theirs


def test_mnist_5k_is_part_of_mnist(real_data: Path) -> None:
    small, full = data.load("mnist-5k"), data.load("mnist", real_data)

    def labelled(dataset: Dataset) -> list[bytes]:
        images = torch.cat([dataset.train_images, dataset.test_images]).flatten(1)
        labels = torch.cat([dataset.train_labels, dataset.test_labels]).to(torch.uint8)
        return [row.tobytes() for row in torch.cat([images, labels[:, None]], 1).numpy()]

    known = set(labelled(full))
    assert len(known) == 70_000  # no two images of MNIST are equal
    assert set(labelled(small)) < known
    assert len(set(labelled(small))) == 5_000


# --- The originals -------------------------------------------------------------------------------

PUBLISHED_MD5 = {
    # of the uncompressed IDX files and of CIFAR-10's binary version
    "mnist": "6bbc9ace898e44ae57da46a324031adb a25bea736e30d166cdddb491f175f624 "
    "2646ac647ad5339dbf082846283269ea 27ae3e4e09519cfbb04c329615203637",
    "fashion-mnist": "f4a8712d7a061bf5bd6d2ca38dc4d50a 9018921c3c673c538a1fc5bad174d6f9 "
    "8181f5470baa50b63fa0f6fddb340f0a 15d484375f8d13e6eb1aabb0c3f46965",
    "cifar10": "5dd7e06a14cb22eb9f671a540d1b7c25 5ea93a67294ea407fff1d09f752e9692 "
    "942cd6a4bcdd0dd3c604fbe906cb4421 ae636b3ba5c66a11e91e8cb52e771fcb "
    "53f37980c15c3d472c316c40844f3f0d 803d5f7f4d78ea53de84dbe85f74fb6d",
}


def idx(values: Tensor) -> bytes:
    """Write uint8 `values` as an IDX file (LeCun's format)."""
    header = struct.pack(f">I{values.ndim}I", 0x0800 | values.ndim, *values.shape)
    return header + values.contiguous().numpy().tobytes()


def published_files(name: str, dataset: Dataset) -> list[bytes]:
    splits = [
        (dataset.train_images, dataset.train_labels.to(torch.uint8)),
        (dataset.test_images, dataset.test_labels.to(torch.uint8)),
    ]
    if name != "cifar10":
        return [file for images, labels in splits for file in (idx(images[:, 0]), idx(labels))]
    rows = torch.cat([torch.cat([y[:, None], x.flatten(1)], 1) for x, y in splits])
    return [batch.numpy().tobytes() for batch in rows.reshape(6, 10_000, -1)]


@pytest.mark.parametrize("name", PUBLISHED_MD5)
def test_the_known_fingerprints_are_those_of_the_published_files(
    name: str, real_data: Path
) -> None:
    files = published_files(name, data.load(name, real_data))
    found = [hashlib.md5(file, usedforsecurity=False).hexdigest() for file in files]
    assert found == PUBLISHED_MD5[name].split()


@pytest.mark.parametrize("name", ["digits", "mnist", "fashion-mnist", "cifar10"])
def test_normalisation_is_that_of_the_training_images(name: str, real_data: Path) -> None:
    dataset = data.load(name, real_data)
    for channel, (mean, std) in enumerate(zip(dataset.mean, dataset.std, strict=True)):
        counts = dataset.train_images[:, channel].flatten().bincount(minlength=256).double()
        values, weights = torch.arange(256, dtype=torch.float64) / 255, counts / counts.sum()
        true_mean = (weights * values).sum()
        true_std = (weights * (values - true_mean) ** 2).sum().sqrt()
        assert mean == pytest.approx(true_mean.item(), abs=6e-5)
        assert std == pytest.approx(true_std.item(), abs=6e-5)


def test_catalogue() -> None:
    from torchvision import datasets

    assert list(DATASETS) == ["digits", "mnist-5k", "mnist", "fashion-mnist", "cifar10", "cifar100"]
    assert [name for name in DATASETS if not DATASETS[name].needs_download] == [
        "digits",
        "mnist-5k",
    ]
    assert list(DATASETS["fashion-mnist"].class_names) == datasets.FashionMNIST.classes
    names = DATASETS["cifar100"].class_names
    assert len(set(names)) == 100
    assert list(names) == sorted(names)  # as CIFAR-100 numbers them
    for info in DATASETS.values():
        assert "\n" not in info.description
        assert len(info.mean) == len(info.std) == info.input_shape[0]


# --- Converted once ------------------------------------------------------------------------------


def linked_raw_files(name: str, real_data: Path, folder: Path) -> Path:
    """Put links to torchvision's own files of `name` under `folder`; return their folder."""
    source = real_data / str(DATASETS[name].torchvision) / "raw"
    if not source.is_dir():
        pytest.skip(f"no {source}: torchvision's own files of {name}")
    target = folder / str(DATASETS[name].torchvision) / "raw"
    target.mkdir(parents=True)
    for file in source.glob("*-ubyte"):
        (target / file.name).symlink_to(file.resolve())
    return target


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("name", ["mnist", "fashion-mnist"])
def test_torchvision_files_are_converted_once(
    name: str, real_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    linked_raw_files(name, real_data, tmp_path)
    first = data.load(name, tmp_path)
    assert torch.equal(first.test_images, data.load(name, real_data).test_images)
    monkeypatch.setattr(cache, "_convert", None)  # not called again
    assert torch.equal(data.load(name, tmp_path).train_labels, first.train_labels)
    assert [file.name for file in tmp_path.iterdir() if file.is_file()] == [f"{name}.safetensors"]
    umask = os.umask(0)
    os.umask(umask)
    assert (tmp_path / f"{name}.safetensors").stat().st_mode & 0o777 == 0o666 & ~umask


@pytest.mark.usefixtures("offline")
def test_torchvision_files_that_are_not_the_originals(real_data: Path, tmp_path: Path) -> None:
    labels = linked_raw_files("mnist", real_data, tmp_path) / "t10k-labels-idx1-ubyte"
    content = bytearray(labels.read_bytes())
    content[-1] ^= 1
    labels.unlink()
    labels.write_bytes(content)
    text = message("mnist", tmp_path)
    assert f"files of mnist in {tmp_path} do not hold the original" in text
    assert not (tmp_path / "mnist.safetensors").exists()


@pytest.mark.usefixtures("offline")
def test_torchvision_files_that_are_cut_short(tiny: Path) -> None:
    tiny.unlink()
    raw = tiny.parent / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name, tensor in tiny_tensors().items():
        stem = name.replace("test", "t10k").replace("_images", "-images-idx3-ubyte")
        content = idx(tensor.squeeze(1) if tensor.ndim > 1 else tensor.to(torch.uint8))
        (raw / stem.replace("_labels", "-labels-idx1-ubyte")).write_bytes(content)
    assert torch.equal(data.load("mnist", tiny.parent).test_images, tiny_tensors()["test_images"])
    tiny.unlink()
    images = raw / "train-images-idx3-ubyte"
    images.write_bytes(images.read_bytes()[:-3])
    assert "torchvision could not provide mnist" in message("mnist", tiny.parent)


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_files_in_torchvision_s_layout(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Small files in the layout of the real ones, read by torchvision's own class."""
    import torchvision

    source = getattr(torchvision.datasets, str(DATASETS[name].torchvision))
    info = replace(DATASETS[name], num_train=14, num_test=3, sha256=None)
    monkeypatch.setattr(cache, "DATASETS", MappingProxyType({name: info}))
    folder = tmp_path / source.base_folder
    folder.mkdir()
    generator = torch.Generator().manual_seed(3)
    pixels = torch.randint(256, (17, 3, 32, 32), generator=generator).to(torch.uint8)
    labels = torch.randint(10, (17,), generator=generator)
    parts = {"first": slice(0, 8), "second": slice(8, 14), "test": slice(14, 17)}
    key = "labels" if name == "cifar10" else "fine_labels"
    contents: dict[str, object] = {
        part: {"data": pixels[rows].flatten(1).numpy(), key: labels[rows].tolist()}
        for part, rows in parts.items()
    }
    contents["meta"] = {source.meta["key"]: list(info.class_names)}
    md5 = {}
    for part, content in contents.items():
        (folder / part).write_bytes(pickle.dumps(content))
        md5[part] = hashlib.md5((folder / part).read_bytes(), usedforsecurity=False).hexdigest()
    monkeypatch.setattr(source, "train_list", [[p, md5[p]] for p in ("first", "second")])
    monkeypatch.setattr(source, "test_list", [["test", md5["test"]]])
    monkeypatch.setattr(source, "meta", {**source.meta, "filename": "meta", "md5": md5["meta"]})

    dataset = data.load(name, tmp_path)
    assert torch.equal(dataset.train_images, pixels[:14])
    assert torch.equal(dataset.test_images, pixels[14:])
    assert torch.equal(dataset.train_labels, labels[:14])
    assert torch.equal(dataset.test_labels, labels[14:])

    path = tmp_path / f"{name}.safetensors"  # its fingerprint is in the file, not in the code
    content_bytes = bytearray(path.read_bytes())
    content_bytes[-1] ^= 1
    path.write_bytes(content_bytes)
    assert f"{path} is damaged (sha256" in message(name, tmp_path)


def test_the_fingerprint_covers_names_types_shapes_and_bytes() -> None:
    tensors = tiny_tensors()
    expected = hashlib.sha256()
    for name in ("test_images", "test_labels", "train_images", "train_labels"):
        kind = "uint8" if "images" in name else "int64"
        expected.update(f"{name} {kind} {list(tensors[name].shape)}\n".encode())
        expected.update(tensors[name].numpy().tobytes())
    assert data.fingerprint(tensors) == expected.hexdigest()


def test_mapped_tensors_lie_in_the_file_and_writes_do_not(tiny: Path) -> None:
    if not Path("/proc/self/maps").exists():
        pytest.skip("only Linux lists what a process has mapped")
    dataset = data.load("mnist", tiny.parent)
    spans = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        if line.endswith(str(tiny)):
            low, high = line.split()[0].split("-")
            spans.append(range(int(low, 16), int(high, 16)))
    for name in TENSORS:
        assert any(getattr(dataset, name).data_ptr() in span for span in spans), name
    dataset.train_images.add_(1)
    again = data.load("mnist", tiny.parent)
    assert torch.equal(again.train_images, tiny_tensors()["train_images"])


def test_a_file_is_hashed_once_for_each_of_its_states(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    fingerprint = data.fingerprint

    def counted(tensors: Mapping[str, Tensor]) -> str:
        calls.append(1)
        return fingerprint(tensors)

    monkeypatch.setattr(cache, "fingerprint", counted)
    data.load("mnist", tiny.parent)
    data.load("mnist", tiny.parent)
    assert len(calls) == 1
    tiny.unlink()
    save_file(tiny_tensors(seed=1), tiny)
    assert "is damaged (sha256" in message("mnist", tiny.parent)
    assert "is damaged (sha256" in message("mnist", tiny.parent)  # a wrong one is not remembered
    assert len(calls) == 3


# --- What is wrong with a cache ------------------------------------------------------------------


def test_truncated_cache(tiny: Path) -> None:
    whole = tiny.read_bytes()
    for size in (len(whole) - 1, len(whole) // 2, 20, 3, 0):
        tiny.write_bytes(whole[:size])
        text = message("mnist", tiny.parent)
        assert f"{tiny} is damaged" in text
        assert "delete it and run again" in text


def test_cache_without_a_tensor(tiny: Path) -> None:
    tensors = tiny_tensors()
    del tensors["test_labels"]
    save_file(tensors, tiny)
    assert f"{tiny} is damaged (it has no test_labels)" in message("mnist", tiny.parent)


def test_cache_with_a_tensor_of_another_shape_or_type(tiny: Path) -> None:
    save_file({**tiny_tensors(), "train_labels": torch.zeros(10, dtype=torch.int64)}, tiny)
    assert "train_labels is int64 [10], not int64 [11]" in message("mnist", tiny.parent)
    save_file({**tiny_tensors(), "test_images": torch.zeros(5, 1, 3, 2)}, tiny)
    assert "test_images is float32 [5, 1, 3, 2], not uint8" in message("mnist", tiny.parent)


def test_real_cache_with_one_changed_label(real_data: Path, tmp_path: Path) -> None:
    tensors = load_file(real_data / "mnist.safetensors")
    tensors["test_labels"][-1] = (tensors["test_labels"][-1] + 1) % 10
    path = tmp_path / "mnist.safetensors"
    save_file(tensors, path)
    assert f"{path} is damaged (sha256" in message("mnist", tmp_path)


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("name", ["mnist", "fashion-mnist", "cifar10", "cifar100"])
def test_offline_and_missing(name: str, tmp_path: Path) -> None:
    text = message(name, tmp_path)
    assert str(tmp_path / f"{name}.safetensors") in text
    assert "digits or mnist-5k, which need no download" in text
    assert "name resolution" in text


@pytest.mark.usefixtures("offline")
def test_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        text = message("cifar10", folder)
        assert f"cannot read or write {folder / 'cifar10.safetensors'}" in text
        assert "data-dir or $FEDKD_DATA_DIR" in text


def test_full_disk_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(cache, "DATASETS", MappingProxyType({"mnist": TINY}))
    monkeypatch.setattr(cache, "_from_torchvision", lambda *_: tiny_tensors())
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        assert "(No space left on device)" in message("mnist", tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert torch.equal(data.load("mnist", tmp_path).test_labels, tiny_tensors()["test_labels"])


def test_unknown_name() -> None:
    text = message("fasion-mnist")
    assert "dataset = 'fasion-mnist': no such data set (did you mean 'fashion-mnist'?)" in text
    assert "cifar100" in text
    assert "module:function" in text


def test_data_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for variable in ("FEDKD_DATA_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert data.data_folder() == tmp_path / ".cache" / "fedkd"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert data.data_folder() == tmp_path / "cache" / "fedkd"
    monkeypatch.setenv("FEDKD_DATA_DIR", "~/images")
    assert data.data_folder() == tmp_path / "images"
    assert data.data_folder("elsewhere") == Path("elsewhere")


# --- The user's own ------------------------------------------------------------------------------

OWN = """
import torch
from fedkd.data import Dataset

def fruit(data_dir, **changes):
    images = torch.full((7, 2, 3, 5), 9, dtype=torch.uint8)
    keys = dict(
        name=f"fruit in {data_dir.name}",
        train_images=images, train_labels=torch.arange(7) % 3,
        test_images=images[:2], test_labels=torch.tensor([2, 0]),
        class_names=("apple", "pear", "plum"), mean=(0.5, 0.4), std=(0.1, 0.2),
    )
    return Dataset(**{**keys, **changes})

def nothing(data_dir): return None
def no_argument(): return fruit(None)
def broken(data_dir): raise KeyError("apple")
half_done = 3
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Put a module with data sets into the working directory; return its name."""
    (tmp_path / "my_fruit.py").write_text(OWN)
    (tmp_path / "my_typo.py").write_text("def oops(:")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "my_fruit", raising=False)
    return "my_fruit"


def test_own_dataset(own: str, tmp_path: Path) -> None:
    dataset = data.load(f"{own}:fruit", tmp_path / "basket")
    assert dataset.name == "fruit in basket"
    assert dataset.num_classes == 3
    assert dataset.input_shape == (2, 3, 5)


def test_own_dataset_that_cannot_be_had(own: str) -> None:
    assert "cannot import 'nowhere' (ModuleNotFoundError" in message("nowhere:fruit")
    assert "cannot import 'my_typo' (SyntaxError" in message("my_typo:oops")
    assert "cannot import '' (" in message(":fruit")
    assert "has no function 'frut' (did you mean 'fruit'?)" in message(f"{own}:frut")
    assert "has no function 'half_done'" in message(f"{own}:half_done")
    assert "must return a fedkd.data.Dataset, not NoneType" in message(f"{own}:nothing")
    assert "must take one argument, the data folder" in message(f"{own}:no_argument")
    assert "raised KeyError: 'apple'" in message(f"{own}:broken")


def test_own_dataset_in_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under its absolute path, from any working directory."""
    file = tmp_path / "fruit_of_a_user.py"
    file.write_text(OWN)
    monkeypatch.chdir(tmp_path)
    experiment = Experiment(
        dataset="fruit_of_a_user.py:fruit", public=f"{file.name}:fruit", public_labels=False
    )
    assert experiment.dataset == experiment.public == f"{file}:fruit"
    assert experiment.dataset_word == "fruit_of_a_user.fruit"
    assert Experiment(dataset="my.own:fruit").dataset_word == "my.own.fruit"
    monkeypatch.chdir("/")
    assert data.load(experiment.dataset, tmp_path).num_classes == 3
    assert "has no function 'frut' (did you mean 'fruit'?)" in message(f"{file}:frut")
    assert "there is no such file" in message(f"{tmp_path / 'nothing.py'}:fruit")
    assert "name a function of the file, as in fruit.py:my_data" in message("fruit.py")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ("train_images=torch.zeros(7, 2, 3, 5)", "train_images must be uint8 [N, C, H, W]"),
        ("test_images=images[:2, 0]", "test_images must be uint8 [N, C, H, W]"),
        ("train_labels=torch.zeros(7)", "train_labels must be int64 [N]"),
        ("test_images=images[:0], test_labels=torch.arange(0)", "not uint8 [0, 2, 3, 5]"),
        ("test_labels=[0, 1]", "test_labels must be a tensor on the CPU"),
        ("train_images=images.to('meta')", "train_images must be a tensor on the CPU"),
        ("train_labels=torch.arange(6) % 3", "7 train_images but 6 train_labels"),
        ("train_labels=torch.arange(7)", "train_labels must lie in 0..2"),
        ("test_labels=torch.tensor([-1, 0])", "test_labels must lie in 0..2"),
        ("test_images=images[:2, :1]", "test_images are [1, 3, 5] but train_images [2, 3, 5]"),
        ("class_names=('apple',)", "class_names must name at least two classes"),
        ("mean=(0.5,)", "mean and std must have 2 values each"),
        ("std=(0.5, 0.0)", "mean must be finite and std positive"),
        ("mean=(33.3, 29.1), std=(78.6, 71.3)", "divide those of pixels 0..255 by 255"),
        ("std=(0.5, 78.6)", "must lie in 0..1"),
        ("train_images=images // 9", "train_images have no pixel above 1"),
        (
            "train_images=images.permute(0, 2, 3, 1), test_images=images[:2].permute(0, 2, 3, 1)",
            "train_images [7, 3, 5, 2] have their channels last: use images.permute(0, 3, 1, 2)",
        ),
        (
            "train_images=torch.full((7, 11, 13, 3), 9, dtype=torch.uint8), "
            "mean=[0.5] * 11, std=[0.5] * 11",
            "train_images [7, 11, 13, 3] have their channels last",
        ),
        ("train_labels=torch.arange(7) % 3 + 1", "not 1..3: they count from 1; subtract 1"),
        (
            "train_labels=torch.arange(7) % 2 + 1, test_labels=torch.tensor([1, 2])",
            "no image has label 0",
        ),
    ],
)
def test_own_dataset_that_is_wrong(own: str, changes: str, expected: str, tmp_path: Path) -> None:
    module = tmp_path / "my_fruit.py"
    wrong = f"""
def wrong(data_dir):
    images = torch.full((7, 2, 3, 5), 9, dtype=torch.uint8)
    return fruit(data_dir, {changes})
"""
    module.write_text(OWN + wrong)
    text = message(f"{own}:wrong", tmp_path)
    assert text.startswith("dataset 'fruit in ")
    assert expected in text
