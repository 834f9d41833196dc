"""What both peers need: networks, images and the loss, in plain PyTorch.

The images come from a file that ``benchmarks/ours.py`` has written: the same public set, shards, test set
and initial weights for every system. Nothing here imports fedkd.
"""

from __future__ import annotations

from functools import lru_cache

from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div, log_softmax, softmax
from torch.nn.utils import vector_to_parameters
from work import ALPHA, TAU


def network(student: str) -> nn.Sequential:
    """Return a network of the benchmark, layer by layer that of fedkd with the same name."""
    if student == "mlp-20":
        return nn.Sequential(
            nn.Flatten(),
            *(nn.Linear(784, 20), nn.ReLU()),
            *(nn.Linear(20, 20), nn.ReLU()),
            nn.Linear(20, 10),
        )
    if student == "cnn":
        return nn.Sequential(
            *(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Flatten(), nn.Linear(576, 10)),
        )
    if student == "cnn-5x5":
        return cnn_5x5((1, 28, 28), 10)
    raise ValueError(f"unknown network {student}")


def cnn_5x5(input_shape: tuple[int, int, int], num_classes: int) -> nn.Sequential:
    """Return a network of two 5x5 convolutions, 28,938 parameters at 1x28x28 and 10 classes.

    fedkd takes it as ``student="task:cnn_5x5"``.
    """
    channels, height, width = input_shape
    return nn.Sequential(
        *(nn.Conv2d(channels, 16, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 32, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(32 * (height // 4) * (width // 4), num_classes)),
    )


def initial_network(student: str, path: str) -> nn.Sequential:
    """Return a network with the initial weights that all clients share."""
    model = network(student)
    initial = stored(path)["initial"].clone()  # parameters become views of it
    vector_to_parameters(initial, model.parameters())
    return model


def load(path: str, name: str) -> tuple[Tensor, Tensor]:
    """Return the normalised images ``[N, 1, 28, 28]`` and labels ``[N]`` called `name`."""
    return _normalised(path, stored(path)[f"{name}_images"]), stored(path)[f"{name}_labels"]


def load_shard(path: str, client: int) -> tuple[Tensor, Tensor]:
    """Return the private images and labels of a client."""
    tensors = stored(path)
    end = int(tensors["private_sizes"][: client + 1].sum())
    rows = slice(end - int(tensors["private_sizes"][client]), end)
    return _normalised(path, tensors["private_images"][rows]), tensors["private_labels"][rows]


@lru_cache
def stored(path: str) -> dict[str, Tensor]:
    """Return what the file holds, read once a process."""
    return load_file(path)


def _normalised(path: str, pixels: Tensor) -> Tensor:
    return (pixels.float() / 255 - stored(path)["mean"]) / stored(path)["std"]


def loss(logits: Tensor, labels: Tensor, taught: Tensor | None) -> Tensor:
    """Return cross entropy, or α·τ²·KL + (1 − α)·CE where there are logits of the others."""
    hard = cross_entropy(logits, labels)
    if taught is None:
        return hard
    soft = kl_div(log_softmax(logits / TAU, 1), softmax(taught / TAU, 1), reduction="batchmean")
    return ALPHA * TAU**2 * soft + (1 - ALPHA) * hard


def share_right(logits: Tensor, labels: Tensor) -> float:
    """Return accuracy, 0..1."""
    return float((logits.argmax(1) == labels).float().mean())


def mean(values: list[float]) -> float:
    """Return the mean of some numbers."""
    return sum(values) / len(values)
