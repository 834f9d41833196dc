"""What runs in a worker process: it loads its data and answers the messages of its clients."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from socket import gethostname
from typing import Any

import torch
from flwr.app import RecordDict

from fedkd import data
from fedkd.clients.instructions import Failure
from fedkd.data.federated import federated_data
from fedkd.engines.answering import handle, store_of
from fedkd.errors import FedkdError
from fedkd.experiment import Experiment
from fedkd.keys import Scalar
from fedkd.machine import keep_freed_memory
from fedkd.user_code import fingerprint

Contents = list[tuple[int, RecordDict]]
"""What is sent to the clients of a worker: each one's partition id and its message."""

Results = list[RecordDict | Failure]
"""What they answer, in the same order."""


class Worker:
    """Answers messages in a worker process; Ray makes an actor of it.

    Args:
        keys: the experiment, as flat keys.
        sources: fingerprint of the code that the driver runs.
        paths: folders in which the driver finds modules.
        threads: number of threads that torch may use.
    """

    def __init__(
        self, keys: Mapping[str, Scalar], sources: str, paths: Sequence[str], threads: int
    ) -> None:
        sys.path += [path for path in paths if path not in sys.path]
        torch.set_num_threads(threads)
        keep_freed_memory()
        self._keys = keys
        self._sources = sources
        self._handle: Callable[[Contents], Results] | None = None

    def handle(self, contents: Contents, sent: Mapping[str, list[Any]]) -> Results | None:
        """Return the answers to messages, of which there may be none; the first call loads the data.

        Returns:
            One answer a message, or ``None`` if this machine lacks data that are not in `sent` yet.

        Raises:
            FedkdError: this process runs other code than the driver; see `answering.handle`.
        """
        if self._handle is None:
            self._refuse_other_code()
            experiment = Experiment.load(("the driver", self._keys))
            if sent:
                experiment = _receive(experiment, sent)
            elif not _has_data(experiment):
                return None
            federated_data(experiment)
            self._handle = partial(
                handle, experiment, store_of(experiment, experiment.clients_per_round)
            )
        return self._handle(contents) if contents else []

    def node(self) -> str:
        """Return the id of the machine that this process is on; an answer shows that it is up."""
        import ray

        return str(ray.get_runtime_context().get_node_id())

    def _refuse_other_code(self) -> None:
        # Of the keys only this one matters here; other code may know other keys.
        code = Experiment.load(("the driver", {"client-code": self._keys["client-code"]}))
        if fingerprint(code.client_modules) != self._sources:
            raise FedkdError(
                f"a worker on {gethostname()} runs other code than this process "
                "(fedkd, strategies or client-code differ); start both from the same installation"
            )


def data_sets(experiment: Experiment) -> dict[str, str]:
    """Return the data sets that an experiment uses, by key."""
    names = {"dataset": experiment.dataset, "public": experiment.public}
    return {key: name for key, name in names.items() if (key, name) != ("public", "train")}


def _has_data(experiment: Experiment) -> bool:
    """Whether this machine has the data, or can make them without a download."""
    folder = data.data_folder(experiment.data_dir)
    for name in data_sets(experiment).values():
        info = data.DATASETS.get(name)
        if info and info.needs_download and not (folder / f"{name}.safetensors").exists():
            return False
    try:
        federated_data(experiment)
    except FedkdError:  # one that is not about the data is raised again once they are sent
        return False
    return True


_delivered: dict[str, data.Dataset] = {}
"""The data sets of this worker process by key, if they had to be sent."""


def delivered_dataset(folder: Path) -> data.Dataset:
    """Return what ``dataset`` names in the driver: `data.load` finds this by ``module:function``."""
    return _delivered["dataset"]


def delivered_public(folder: Path) -> data.Dataset:
    """Return what ``public`` names in the driver."""
    return _delivered["public"]


def _receive(experiment: Experiment, sent: Mapping[str, list[Any]]) -> Experiment:
    """Return the experiment with data sets named that come out of Ray's object store."""
    import ray

    _delivered.update({key: _unpacked(*ray.get(ref)) for key, (ref,) in sent.items()})
    return experiment.replace(**{key: f"{__name__}:delivered_{key}" for key in sent})


def packed(dataset: data.Dataset) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return a data set's tensors as arrays, which the workers of a machine share, and the rest."""
    fields = {**vars(dataset)}
    return {name: fields.pop(name).numpy() for name in data.TENSORS}, fields


def _unpacked(arrays: Mapping[str, Any], fields: Mapping[str, Any]) -> data.Dataset:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        tensors: dict[str, Any] = {name: torch.from_numpy(a) for name, a in arrays.items()}
    return data.Dataset(**tensors, **fields)
