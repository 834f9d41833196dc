"""Model architectures, built by name: those of fedkd, each ``head(body(x))``, and those of users.

Initial weights are PyTorch's defaults, drawn from the global generator as its layers draw them:
wrap `build` in ``torch.random.fork_rng()`` and ``torch.manual_seed(key)`` to choose the stream.
All models of fedkd run under ``torch.func.vmap`` over a leading axis of stacked parameters.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from math import prod

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedkd.errors import FedkdError, nearest, one_line
from fedkd.user_code import find_function

InputShape = tuple[int, int, int]
Builder = Callable[[InputShape, int], nn.Module]

MAX_MLP_WIDTH = 8192


class Classifier(nn.Module):
    """A network in two parts: `body` gives flat features ``[B, D]``, `head` logits ``[B, C]``."""

    def __init__(self, body: nn.Module, head: nn.Linear) -> None:
        super().__init__()
        self.body = body
        self.head = head

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits ``[B, C]`` of images ``[B, channels, height, width]``."""
        logits: Tensor = self.head(self.body(images))
        return logits


def build(name: str, input_shape: InputShape, num_classes: int) -> nn.Module:
    """Return a freshly initialised model for images ``[B, *input_shape]``, in training mode.

    Args:
        name: one of `NAMES`, ``mlp-<width>``, or ``module:function`` or ``file.py:function`` for your own
            ``function(input_shape, num_classes) -> nn.Module``.
        input_shape: (channels, height, width), such as (1, 8, 8), (1, 28, 28) or (3, 32, 32).
        num_classes: C, the width of the logits.

    The models, with their number of parameters at 10 classes (1x28x28 for ``mlp`` and ``lenet``,
    3x32x32 for the others):

    - ``mlp-<width>``: two hidden layers of `width` units, ReLU. ``mlp-20`` has 16,330 parameters.
      Only ``mlp-1200`` (2,395,210) drops units, 80 % after each hidden layer.
    - ``hinton-1200``: the same layers as ``mlp-1200``, but 20 % of the inputs and 50 % of the units
      after each hidden layer are dropped (Hinton et al. 2012, 1207.0580).
    - ``lenet`` (61,706): LeNet-5 (LeCun et al. 1998, section II-B) with ReLU, max pooling and a
      linear output. As in the paper the input is 32x32: smaller images get a margin of zeros.
    - ``cnn`` (33,834): three 3x3 convolutions of 16, 32 and 64 channels, each ReLU and max pooling.
    - ``cnn-large`` (805,290): convolutions of 32 | 64, 64 | 128, 128 channels with BatchNorm, max
      pooling after each ``|`` and at the end, then 256 hidden units, half of which are dropped.
    - ``resnet-8`` (75,290), ``resnet-20`` (269,722): He et al. 2015 (1512.03385), section 4.2, with
      its parameter-free shortcuts (option A) and BatchNorm; ``-gn`` has GroupNorm of 8 groups.

    Raises:
        FedkdError: the name is unknown, the model does not accept the input shape, or a user's model
            cannot be imported or built, or returns outputs of the wrong shape (tried in evaluation
            mode on two zero images).
    """
    builder = _find(name)
    if ":" in name:
        return _build_user_model(name, builder, input_shape, num_classes)
    return builder(input_shape, num_classes)


def num_parameters(model: nn.Module) -> int:
    """Return the number of entries of all parameters; shared ones count once, buffers not at all."""
    return sum(parameter.numel() for parameter in model.parameters())


def _mlp(
    shape: InputShape,
    num_classes: int,
    *,
    width: int,
    dropout: float = 0.0,
    input_dropout: float = 0.0,
) -> Classifier:
    hidden: list[nn.Module] = [nn.Dropout(input_dropout)] if input_dropout else []
    for before, after in pairwise((prod(shape), width, width)):
        hidden += [nn.Linear(before, after), nn.ReLU()]
        if dropout:
            hidden.append(nn.Dropout(dropout))
    return Classifier(nn.Sequential(nn.Flatten(), *hidden), nn.Linear(width, num_classes))


def _lenet(shape: InputShape, num_classes: int) -> Classifier:
    channels, height, width = shape
    rows, columns = max(0, 32 - height), max(0, 32 - width)
    margin = (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2)
    area = prod(
        ((side + missing - 4) // 2 - 4) // 2 for side, missing in ((height, rows), (width, columns))
    )
    body = nn.Sequential(
        nn.ZeroPad2d(margin),
        *(nn.Conv2d(channels, 6, 5), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2)),
        nn.Flatten(),
        *(nn.Linear(16 * area, 120), nn.ReLU()),
        *(nn.Linear(120, 84), nn.ReLU()),
    )
    return Classifier(body, nn.Linear(84, num_classes))


def _cnn(shape: InputShape, num_classes: int) -> Classifier:
    area = _area_after_pooling("cnn", shape)
    body = nn.Sequential(*_convolutions(shape[0], ((16,), (32,), (64,))), nn.Flatten())
    return Classifier(body, nn.Linear(64 * area, num_classes))


def _cnn_large(shape: InputShape, num_classes: int) -> Classifier:
    area = _area_after_pooling("cnn-large", shape)
    stages = ((32,), (64, 64), (128, 128))
    body = nn.Sequential(
        *_convolutions(shape[0], stages, norm=nn.BatchNorm2d),
        nn.Flatten(),
        *(nn.Linear(128 * area, 256), nn.ReLU(), nn.Dropout(0.5)),
    )
    return Classifier(body, nn.Linear(256, num_classes))


def _area_after_pooling(name: str, shape: InputShape) -> int:
    """Return how many pixels are left after three max poolings, which round down."""
    _, height, width = shape
    if min(height, width) < 8:
        raise FedkdError(
            f"model '{name}' pools three times and needs images of at least 8x8 pixels, "
            f"got input shape {shape}; 'lenet', 'resnet-8' and 'mlp-20' take any size"
        )
    return (height // 8) * (width // 8)


def _convolutions(
    channels: int,
    stages: tuple[tuple[int, ...], ...],
    norm: Callable[[int], nn.Module] | None = None,
) -> list[nn.Module]:
    """Return 3x3 convolutions that keep the map's size, with ReLU; max pooling ends each stage."""
    layers: list[nn.Module] = []
    for stage in stages:
        for width in stage:
            layers.append(nn.Conv2d(channels, width, 3, padding=1, bias=norm is None))
            if norm is not None:
                layers.append(norm(width))
            layers.append(nn.ReLU(inplace=True))
            channels = width
        layers.append(nn.MaxPool2d(2))
    return layers


class _ResidualBlock(nn.Module):
    """Two 3x3 convolutions around an identity that is subsampled and zero-padded (option A)."""

    def __init__(
        self, inputs: int, outputs: int, stride: int, norm: Callable[[int], nn.Module]
    ) -> None:
        super().__init__()
        self.residual = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False),
            norm(outputs),
            nn.ReLU(inplace=True),
            nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
            norm(outputs),
        )
        self.stride = stride
        self.new_channels = outputs - inputs

    def forward(self, images: Tensor) -> Tensor:
        shortcut = images[..., :: self.stride, :: self.stride]
        if self.new_channels:
            shortcut = F.pad(shortcut, (0, 0, 0, 0, 0, self.new_channels))
        return F.relu(self.residual(images) + shortcut)


def _resnet(
    shape: InputShape, num_classes: int, *, depth: int, norm: Callable[[int], nn.Module]
) -> Classifier:
    layers = [nn.Conv2d(shape[0], 16, 3, padding=1, bias=False), norm(16), nn.ReLU(inplace=True)]
    channels = 16
    for outputs in (16, 32, 64):
        for _ in range((depth - 2) // 6):
            stride = 1 if outputs == channels else 2
            layers.append(_ResidualBlock(channels, outputs, stride, norm))
            channels = outputs
    body = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return Classifier(body, nn.Linear(channels, num_classes))


_group_norm = partial(nn.GroupNorm, 8)

_BUILDERS: dict[str, Builder] = {
    "mlp-20": partial(_mlp, width=20),
    "mlp-64": partial(_mlp, width=64),
    "mlp-800": partial(_mlp, width=800),
    "mlp-1200": partial(_mlp, width=1200, dropout=0.8),
    # Dropout as in Hinton et al. 2012 (1207.0580), the recipe behind Hinton, Vinyals, Dean 2015.
    "hinton-1200": partial(_mlp, width=1200, dropout=0.5, input_dropout=0.2),
    "lenet": _lenet,
    "cnn": _cnn,
    "cnn-large": _cnn_large,
    "resnet-8": partial(_resnet, depth=8, norm=nn.BatchNorm2d),
    "resnet-20": partial(_resnet, depth=20, norm=nn.BatchNorm2d),
    "resnet-8-gn": partial(_resnet, depth=8, norm=_group_norm),
    "resnet-20-gn": partial(_resnet, depth=20, norm=_group_norm),
}
NAMES: tuple[str, ...] = tuple(_BUILDERS)


def _find(name: str) -> Builder:
    if name in _BUILDERS:
        return _BUILDERS[name]
    family = re.fullmatch(r"mlp-([1-9][0-9]{0,3})", name)
    if family and int(family[1]) <= MAX_MLP_WIDTH:
        return partial(_mlp, width=int(family[1]))
    if ":" in name:
        return find_function(name, "model")
    if name.endswith(".py"):
        raise FedkdError(f"name a function of the file, as in {name}:my_model")
    raise FedkdError(
        f"unknown model '{name}'{nearest(name, NAMES)}: use one of {', '.join(NAMES)}, "
        f"mlp-<width> with a width of 1 to {MAX_MLP_WIDTH}, or your own as 'module:function' "
        "or 'file.py:function'"
    )


def _build_user_model(
    name: str, builder: Builder, input_shape: InputShape, num_classes: int
) -> nn.Module:
    call = f"model '{name}' called with {input_shape}, {num_classes}"
    try:
        model: object = builder(input_shape, num_classes)
    except Exception as error:
        raise FedkdError(f"{call} failed: {one_line(error)}") from error
    if not isinstance(model, nn.Module):
        raise FedkdError(f"{call} returned a {type(model).__name__}, not a torch.nn.Module")
    try:
        with torch.no_grad():
            logits: object = model.eval()(torch.zeros(2, *input_shape))
    except Exception as error:
        raise FedkdError(f"{call} fails on two zero images: {one_line(error)}") from error
    shape = tuple(logits.shape) if isinstance(logits, Tensor) else f"a {type(logits).__name__}"
    if shape != (2, num_classes):
        raise FedkdError(
            f"{call} gives logits of shape {shape} for two images, expected {(2, num_classes)}"
        )
    return model.train()
