"""Split training images into a public set and the clients' shards, as index tensors.

Every split is a function of the labels, the arguments and the seed. The partitioners are those of
flwr-datasets, because users know their names and numbers. They cut each class in storage order, so
the samples are permuted first: another seed then moves blocks, not only proportions.
"""

from __future__ import annotations

import hashlib
import math
import warnings
from dataclasses import astuple, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from fedkd import randomness
from fedkd.data.cache import fingerprint, read_tensors, write_tensors
from fedkd.errors import FedkdError, Setting, nearest, safe_logger

KINDS = ("iid", "dirichlet", "shard", "pathological")

_log = safe_logger(__name__)


def split_public(labels: Tensor, size: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return a public set drawn uniformly from the training split (not stratified), and the rest.

    Args:
        labels: int64 ``[N]``, of the training split.
        size: images in the public set, ``1..N-1``.
        seed: the same seed gives the same split.

    Returns:
        Public indices ``[size]`` in the order drawn, so that any prefix is a uniform draw too (and
        a smaller set is a prefix of a larger one), and private indices ``[N - size]``, ascending.

    Raises:
        FedkdError: `size` leaves no public or no private image.
    """
    n = len(labels)
    if not 1 <= size < n:
        raise FedkdError(
            Setting("public-size", size),
            f" must lie in 1..{n - 1}: it is cut from the {n} training images",
        )
    order = randomness.permutation(n, "public", seed)
    return order[:size], order[size:].sort().values


def label_counts(labels: Tensor, shards: list[Tensor], num_classes: int) -> Tensor:
    """Return how often each client has each label: int64 ``[K, C]``."""
    return torch.stack([labels[shard].bincount(minlength=num_classes) for shard in shards])


@dataclass(frozen=True)
class _Request:
    """The arguments of `partition` that decide the result."""

    kind: str
    num_clients: int
    seed: int
    alpha: float
    classes_per_client: int
    min_size: int


def partition(
    labels: Tensor,
    *,
    kind: str,
    num_clients: int,
    seed: int,
    alpha: float,
    classes_per_client: int,
    min_size: int,
    cache_dir: str | Path | None = None,
) -> list[Tensor]:
    """Return the shards of `num_clients` clients; each sample is in exactly one.

    - ``iid``: equal parts at random.
    - ``dirichlet``: each class is divided by proportions drawn from Dirichlet(`alpha`)
      (Yurochkin et al. 2019, arXiv:1905.12022); drawn again, up to 10 times, until every client
      has `min_size`.
    - ``shard``: sorted by label, cut into ``K * classes_per_client`` blocks, which are dealt at
      random (McMahan et al. 2017, arXiv:1602.05629). Where the samples do not divide evenly, the
      blocks are rounded up and the last clients may get one block fewer.
    - ``pathological``: exactly `classes_per_client` classes each, a class divided evenly between
      its clients (Li et al. 2022, arXiv:2102.02079: client k's first class is k modulo C, the rest
      are random). With fewer clients than classes that would leave classes out: then the classes,
      in random order, are dealt in turn.

    Args:
        labels: int64 ``[N]``.
        kind: one of `KINDS`.
        num_clients: K, at most N.
        seed: the same seed gives the same shards.
        alpha: concentration, positive; small is skewed, large is even. For ``dirichlet``.
        classes_per_client: classes, or blocks, of a client. For ``pathological`` and ``shard``.
        min_size: fewest samples of a client, 1 or more.
        cache_dir: folder that caches the result for other processes, which then never import
            flwr-datasets; ``None``: no cache. A damaged file is replaced.

    Returns:
        K index tensors into `labels`, int64, ascending.

    Raises:
        FedkdError: the request is impossible; the message says what to change.
    """
    request = _Request(kind, num_clients, seed, alpha, classes_per_client, min_size)
    _check(labels, request)
    if cache_dir is None:
        return _draw(labels, request)
    path = Path(cache_dir) / f"partition-{_fingerprint(labels, request)}.safetensors"
    shards = _read(path)
    if shards is None:
        shards = _draw(labels, request)
        _write(path, shards)
    return shards


# --- Checks before anything is drawn --------------------------------------------------------------


def _check(labels: Tensor, request: _Request) -> None:
    """Raise an error for a request that no draw can satisfy."""
    n, clients, least = len(labels), request.num_clients, request.min_size
    if request.kind not in KINDS:
        raise FedkdError(
            Setting("partition", request.kind),
            f" is unknown{nearest(request.kind, KINDS)}: choose one of {', '.join(KINDS)}",
        )
    if not 1 <= clients <= n:
        raise FedkdError(
            Setting("num-clients", clients), f" must lie in 1..{n}, the number of private images"
        )
    if least < 1:
        raise FedkdError(
            Setting("min-partition-size", least), " must be 1 or more: every client needs an image"
        )
    if clients * least > n:
        raise FedkdError(
            f"{clients} clients of {least} images or more need {clients * least}, and there are only "
            f"{n}: lower num-clients, or min-partition-size to {n // clients} or less"
        )
    if request.kind == "dirichlet" and not 0 < request.alpha < math.inf:
        raise FedkdError(Setting("partition-alpha", request.alpha), " must be positive and finite")
    if request.kind in ("shard", "pathological"):
        _check_classes(labels, request)


def _check_classes(labels: Tensor, request: _Request) -> None:
    n, clients, each = len(labels), request.num_clients, request.classes_per_client
    classes = len(_classes(labels))
    if each < 1:
        raise FedkdError(Setting("classes-per-client", each), " must be 1 or more")
    if request.kind == "shard" and clients * each > n:
        raise FedkdError(
            f"{clients} clients with {each} blocks each need {clients * each} images, and there "
            f"are only {n}: lower num-clients or classes-per-client"
        )
    if request.kind == "pathological" and each > classes:
        raise FedkdError(
            Setting("classes-per-client", each), f" must lie in 1..{classes}, the number of classes"
        )
    if request.kind == "pathological" and clients * each < classes:
        raise FedkdError(
            f"{clients} clients with {each} classes each leave some of the {classes} classes out: "
            f"raise classes-per-client to {-(-classes // clients)} or more, or num-clients "
            f"to {-(-classes // each)} or more"
        )


def _classes(labels: Tensor) -> Tensor:
    """Return the labels that occur, ascending: int64 ``[C]``."""
    return labels.bincount().nonzero().flatten()


# --- Drawn ----------------------------------------------------------------------------------------


def _draw(labels: Tensor, request: _Request) -> list[Tensor]:
    few = request.num_clients < len(_classes(labels))
    by_turns = request.kind == "pathological" and few
    shards = (_deal_in_turn if by_turns else _draw_with_flwr)(labels, request)
    sizes = [len(shard) for shard in shards]
    if sum(sizes) != len(labels) or min(sizes) < request.min_size:
        raise _impossible(request)
    return shards


def _deal_in_turn(labels: Tensor, request: _Request) -> list[Tensor]:
    """Return shards whose classes are dealt in turn from one shuffled deck: K * each >= C uses all."""
    clients, each = request.num_clients, request.classes_per_client
    classes = _classes(labels)
    deck = classes[randomness.permutation(len(classes), "partition", request.seed)]
    hands = deck[torch.arange(clients * each) % len(deck)].reshape(clients, each)
    order = randomness.permutation(len(labels), "partition-order", request.seed)
    shards: list[list[Tensor]] = [[] for _ in range(clients)]
    for label in classes:
        owners = (hands == label).any(1).nonzero().flatten().tolist()
        members = order[labels[order] == label]
        for client, part in zip(owners, members.tensor_split(len(owners)), strict=True):
            shards[client].append(part)
    return [torch.cat(parts).sort().values for parts in shards]


def _draw_with_flwr(labels: Tensor, request: _Request) -> list[Tensor]:
    from datasets import Dataset  # type: ignore[import-untyped]

    order = randomness.permutation(len(labels), "partition-order", request.seed)
    columns = {"label": labels[order].numpy(), "index": order.numpy()}
    partitioner = _partitioner(len(labels), request)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # one per draw that was too small, and pyarrow's
        # As Arrow columns: row by row, as Python objects, takes ten times as long.
        partitioner.dataset = Dataset.from_dict(columns).with_format("arrow")
        try:
            tables = [partitioner.load_partition(k)[:] for k in range(request.num_clients)]
        except ValueError as error:
            raise _impossible(request) from error
    return [torch.from_numpy(rows["index"].to_numpy().copy()).sort().values for rows in tables]


def _partitioner(n: int, request: _Request) -> Any:
    """Return the partitioner of flwr-datasets for `n` samples."""
    from flwr_datasets import partitioner

    clients, each = request.num_clients, request.classes_per_client
    common = {
        "num_partitions": clients,
        "partition_by": "label",
        "shuffle": False,  # the order within a client is drawn elsewhere
        "seed": randomness.key("partition", request.seed),
    }
    match request.kind:
        case "iid":
            return partitioner.IidPartitioner(clients)
        case "dirichlet":
            return partitioner.DirichletPartitioner(
                alpha=float(request.alpha), min_partition_size=request.min_size, **common
            )
        case "shard":  # by size: by their number, it drops the samples that remain
            return partitioner.ShardPartitioner(
                shard_size=-(-n // (clients * each)), keep_incomplete_shard=True, **common
            )
        case _:
            return partitioner.PathologicalPartitioner(
                num_classes_per_partition=each,
                class_assignment_mode="first-deterministic",
                **common,
            )


def _impossible(request: _Request) -> FedkdError:
    """Return the error for a request that no draw satisfied; it says what to change."""
    small = f"fewer than {request.min_size} images for some of {request.num_clients} clients"
    if request.kind == "dirichlet":
        what = f"each of 11 draws with partition-alpha = {request.alpha} left {small}"
        change = "raise partition-alpha, or lower num-clients or min-partition-size"
    else:
        what = f"classes-per-client = {request.classes_per_client} leaves {small}"
        change = "lower num-clients, classes-per-client or min-partition-size"
    return FedkdError(Setting("partition", request.kind), f" is impossible here ({what}): {change}")


# --- Cached for other processes -------------------------------------------------------------------


def _fingerprint(labels: Tensor, request: _Request) -> str:
    """Return a hash of all that decides the result, including the version of flwr-datasets."""
    sha256 = hashlib.sha256(labels.contiguous().numpy().data)
    sha256.update(repr((astuple(request), version("flwr-datasets"))).encode())
    return sha256.hexdigest()[:32]


def _write(path: Path, shards: list[Tensor]) -> None:
    sizes = torch.tensor([len(shard) for shard in shards])
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_tensors(path, {"indices": torch.cat(shards), "sizes": sizes})
    except OSError as error:
        _log.warning("the partition is not cached for other processes: %s", error)


def _read(path: Path) -> list[Tensor] | None:
    """Return the shards in `path`, or ``None`` if it is missing or damaged."""
    try:
        tensors, stored_fingerprint = read_tensors(path)
    except (OSError, SafetensorError):
        return None
    if fingerprint(tensors) != stored_fingerprint:
        return None
    return list(torch.split(tensors["indices"], tensors["sizes"].tolist()))
