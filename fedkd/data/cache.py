"""Load data sets from one memory-mapped file each, so that many processes share one copy.

What torchvision downloads is converted once to ``<data-dir>/<name>.safetensors`` and mapped from
then on; class names, normalisation and the fingerprint of the tensors live in the code, not in the file.
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import os
import sys
import tempfile
import threading
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from fedkd.data.datasets import (
    DATASETS,
    TENSORS,
    Dataset,
    DatasetInfo,
    describe,
    dtype_name,
    dtype_of,
    shipped,
)
from fedkd.errors import FedkdError, Setting, nearest, one_line
from fedkd.user_code import find_function


def load(name: str, data_dir: str | Path | None = None, *, key: str = "dataset") -> Dataset:
    """Return a data set by its name in `DATASETS`, or a user's by its function.

    What torchvision downloads is converted once and memory-mapped from then on: processes that load
    the same file share its pages, and writing to the tensors changes the writer's copy only. Its
    fingerprint is verified at the first load of a file in each process (0.1 s for CIFAR-10).

    ``cifar100`` is untested (its original could not be downloaded): torchvision's checksums guard its
    download, and the fingerprint in the cache file guards the cache.

    Args:
        name: a key of `DATASETS`, ``"module:function"`` or ``"file.py:function"``: a function that is
            called with the data folder (a `Path`, which need not exist) and returns a `Dataset`. The
            module may lie in the working directory.
        data_dir: see `data_folder`.
        key: the experiment's key whose value is the name; errors name it.

    Raises:
        FedkdError: the name is unknown; the file is missing and cannot be downloaded, is damaged or
            cannot be written; or the user's function does not return a valid data set.
    """
    folder = data_folder(data_dir)
    if ":" in name:
        return _load_user_dataset(name, folder, key)
    if name.endswith(".py"):
        raise FedkdError(Setting(key, name), f": name a function of the file, as in {name}:my_data")
    if name not in DATASETS:
        raise FedkdError(
            Setting(key, name),
            f": no such data set{nearest(name, DATASETS)}; accepted: {', '.join(DATASETS)}, or your "
            "own as module:function or file.py:function",
        )
    info = DATASETS[name]
    tensors = _load_cached(name, folder) if info.needs_download else shipped(name)
    return Dataset(name=name, class_names=info.class_names, mean=info.mean, std=info.std, **tensors)


def data_folder(value: str | Path | None = None) -> Path:
    """Return the folder of data sets: `value`, else ``$FEDKD_DATA_DIR``, else the user's cache.

    The user's cache is ``$XDG_CACHE_HOME/fedkd``, or ``~/.cache/fedkd``. The folder need not exist.
    """
    chosen = value or os.environ.get("FEDKD_DATA_DIR")
    if chosen:
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "fedkd"


# --- Downloaded once, then mapped -----------------------------------------------------------------


def _load_cached(name: str, folder: Path) -> dict[str, Tensor]:
    path = folder / f"{name}.safetensors"
    try:
        if not path.exists():
            _convert(name, path)
        return _read_cache(path, DATASETS[name])
    except OSError as error:
        raise FedkdError(
            f"cannot read or write {path} ({error.strerror or error}): "
            "choose another folder with data-dir or $FEDKD_DATA_DIR"
        ) from error


def _convert(name: str, path: Path) -> None:
    """Have torchvision provide data set `name` in the folder of `path`, and write it to `path`."""
    folder = path.parent
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(
        dir=folder
    ):  # fails now if writing would fail after a long download
        pass
    tensors = _from_torchvision(name, path)
    actual, expected = fingerprint(tensors), DATASETS[name].sha256
    if expected and actual != expected:
        raise FedkdError(
            f"torchvision's files of {name} in {folder} do not hold the original images and labels "
            f"(sha256 {actual[:12]}..., not {expected[:12]}...): delete them and run again"
        )
    write_tensors(path, tensors)


def _from_torchvision(name: str, path: Path) -> dict[str, Tensor]:
    """Return the four tensors of data set `name`, downloaded beside `path` if they are missing."""
    import torchvision

    source = getattr(torchvision.datasets, str(DATASETS[name].torchvision))
    try:
        with contextlib.redirect_stdout(sys.stderr):  # torchvision prints; ours may be JSON
            train, test = (source(path.parent, train=t, download=True) for t in (True, False))
    except Exception as error:  # a network, a mirror or a half-written file can raise anything
        raise FedkdError(
            f"{path} is missing, and torchvision could not provide {name} in {path.parent} "
            f"({one_line(error)}): copy the file there, or fix the network or delete unfinished "
            "downloads of torchvision there and run again, or set dataset to digits or mnist-5k, "
            "which need no download"
        ) from error
    return {
        "train_images": _channels_first(torch.as_tensor(train.data)),
        "train_labels": torch.as_tensor(train.targets, dtype=torch.int64),
        "test_images": _channels_first(torch.as_tensor(test.data)),
        "test_labels": torch.as_tensor(test.targets, dtype=torch.int64),
    }


def _channels_first(images: Tensor) -> Tensor:
    """Return torchvision's ``[N, H, W]`` or ``[N, H, W, C]`` as ``[N, C, H, W]``."""
    if images.ndim == 3:
        return images.unsqueeze(1)
    return images.permute(0, 3, 1, 2).contiguous()


def _read_cache(path: Path, info: DatasetInfo) -> dict[str, Tensor]:
    """Return the memory-mapped tensors of `path`, checked for types, shapes and fingerprint."""
    try:
        tensors, stored_fingerprint = read_tensors(path)
    except SafetensorError as error:
        raise _damaged(path, str(error)) from error
    if missing := set(TENSORS) - set(tensors):
        raise _damaged(path, f"it has no {', '.join(sorted(missing))}")
    for name, shape in info.shapes.items():
        tensor = tensors[name]
        if tensor.dtype != dtype_of(name) or list(tensor.shape) != shape:
            expected = f"{dtype_name(dtype_of(name))} {shape}"
            raise _damaged(path, f"{name} is {describe(tensor)}, not {expected}")
    if known := info.sha256 or stored_fingerprint:
        _verify(path, tensors, known)
    return tensors


_verified: set[tuple[Path, int, int, int]] = set()
"""Files whose fingerprint this process has verified, with the inode, size and time that they had."""


def _verify(path: Path, tensors: Mapping[str, Tensor], known: str) -> None:
    """Raise an error unless the tensors of `path` have the `known` fingerprint; compared once a file."""
    status = path.stat()
    state = (path.absolute(), status.st_ino, status.st_size, status.st_mtime_ns)
    if state in _verified:
        return
    actual = fingerprint(tensors)
    if actual != known:
        raise _damaged(path, f"sha256 {actual[:12]}..., not {known[:12]}...")
    _verified.add(state)


def _damaged(path: Path, reason: str) -> FedkdError:
    return FedkdError(
        f"{path} is damaged ({reason}): delete it and run again (it is rebuilt, with a new download "
        "if torchvision's files are gone), or replace it by an intact copy"
    )


# --- Tensor files -------------------------------------------------------------------------------


def fingerprint(tensors: Mapping[str, Tensor], besides: str = "") -> str:
    """Return the SHA-256 (hexadecimal) over name, type, shape and bytes of each tensor, by name.

    Args:
        tensors: on the CPU.
        besides: a text that counts as well.
    """
    sha256 = hashlib.sha256(besides.encode())
    for name in sorted(tensors):
        sha256.update(f"{name} {describe(tensors[name])}\n".encode())
        sha256.update(tensors[name].contiguous().flatten().view(torch.uint8).numpy().data)
    return sha256.hexdigest()


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write a safetensors file with its fingerprint; other processes see all of it or nothing.

    Raises:
        OSError: the folder of `path` cannot be written.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.part")
    try:
        with part.open("wb") as file:
            file.write(save(tensors, {"sha256": fingerprint(tensors)}))
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        raise


def read_tensors(path: Path) -> tuple[dict[str, Tensor], str | None]:
    """Return the memory-mapped tensors of `path` and the fingerprint stored in it, if any (not compared).

    Raises:
        OSError: `path` cannot be opened.
        SafetensorError: it is not a complete safetensors file.
    """
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return tensors, (file.metadata() or {}).get("sha256")


# --- Data sets of the user ------------------------------------------------------------------------


def _load_user_dataset(spec: str, folder: Path, key: str) -> Dataset:
    """Return the data set of the user's ``module:function``, called with the data folder."""
    function = find_function(spec, key)
    try:
        inspect.signature(function).bind(folder)
    except TypeError as error:
        raise FedkdError(
            Setting(key, spec), f" must take one argument, the data folder ({error})"
        ) from error
    try:
        dataset = function(folder)
    except FedkdError:
        raise
    except Exception as error:
        raise FedkdError(Setting(key, spec), f" raised {one_line(error)}") from error
    if not isinstance(dataset, Dataset):
        raise FedkdError(
            Setting(key, spec), f" must return a fedkd.data.Dataset, not {type(dataset).__name__}"
        )
    return dataset
