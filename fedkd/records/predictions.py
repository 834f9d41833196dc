"""Predictions of trained models on the test images, kept in a file.

Written at the end of a run, so that a report or a test of two methods on the same images needs neither
the data nor the models.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from fedkd.errors import FedkdError
from fedkd.records.files import read_safetensors, replace_file

FILE = "tested.safetensors"

_WHOLE = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)

MOST_ANSWERS = 100_000_000
"""Models × images kept per run, 4 bytes each. In larger populations only the first models are kept."""


@dataclass(frozen=True, eq=False)
class Predictions:
    """Predictions of M models of one kind on N test images.

    Attributes:
        classes: predicted, int64 ``[M, N]``.
        confidences: probability of the predicted class, float32 ``[M, N]``; NaN where a model has none.
        owners: the models' clients (partition ids) or seeds.
    """

    classes: Tensor
    confidences: Tensor
    owners: list[int]


@dataclass(frozen=True, eq=False)
class Tested:
    """Predictions of a run's models on the test images.

    Attributes:
        labels: the true classes, int64 ``[N]``.
        models: by kind: ``student`` and, with local teachers, ``teacher`` of a federated run;
            ``teacher``, ``student-alone`` and ``student-distilled`` of a central one.
    """

    labels: Tensor
    models: Mapping[str, Predictions]

    @classmethod
    def load(cls, folder: str | Path) -> Tested | None:
        """Return what the file in a run folder holds, or `None` where there is none.

        Raises:
            FedkdError: the file cannot be read.
        """
        path = Path(folder) / FILE
        if not path.exists():
            return None
        tensors, _ = read_safetensors(path)
        kinds = sorted({name.partition("/")[0] for name in tensors if "/" in name})
        labels = _checked(path, tensors, "labels")
        return cls(labels, {kind: _predictions(path, tensors, kind, len(labels)) for kind in kinds})

    def save(self, folder: Path) -> None:
        """Write the file.

        Raises:
            FedkdError: it cannot be written.
        """
        tensors = {"labels": self.labels.to(torch.int16)}
        for kind, predictions in self.models.items():
            most = max(1, MOST_ANSWERS // max(1, len(self.labels)))
            tensors[f"{kind}/classes"] = predictions.classes[:most].to(torch.int16).contiguous()
            confidences = predictions.confidences[:most].to(torch.float16)
            tensors[f"{kind}/confidences"] = confidences.contiguous()
            tensors[f"{kind}/owners"] = torch.tensor(predictions.owners[:most])
        replace_file(folder / FILE, save(tensors))

    def correct(self, kind: str) -> Tensor:
        """Return which predictions are right: bool ``[M, N]``."""
        return self.models[kind].classes == self.labels


def _predictions(path: Path, tensors: Mapping[str, Tensor], kind: str, images: int) -> Predictions:
    """Return the predictions of the models of one kind.

    Raises:
        FedkdError: a tensor is missing, or of another kind.
    """
    owners = _checked(path, tensors, f"{kind}/owners")
    shape = (len(owners), images)
    classes = _checked(path, tensors, f"{kind}/classes", shape)
    confidences = _checked(path, tensors, f"{kind}/confidences", shape, is_whole=False)
    if bool(confidences.isinf().any()):
        raise FedkdError(f"{path}: {kind}/confidences must be finite, or NaN where there is none")
    return Predictions(classes, confidences, owners.tolist())


def _checked(
    path: Path,
    tensors: Mapping[str, Tensor],
    name: str,
    shape: tuple[int, ...] | None = None,
    *,
    is_whole: bool = True,
) -> Tensor:
    """Return a tensor as int64 or float32, which must be of whole numbers or not, and of a shape."""
    tensor = tensors.get(name)
    if tensor is None:
        raise FedkdError(f"{path} holds no {name}")
    fits = tensor.dtype in _WHOLE if is_whole else tensor.is_floating_point()
    if not fits or tuple(tensor.shape) != (shape or (tensor.numel(),)):
        wanted = "of any length" if shape is None else str(list(shape))
        kind = "whole numbers" if is_whole else "floating-point numbers"
        raise FedkdError(
            f"{path}: {name} is {tensor.dtype} {list(tensor.shape)}: must be {kind}, {wanted}"
        )
    return tensor.long() if is_whole else tensor.float()
