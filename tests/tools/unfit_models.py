"""Models of a user that cannot be run as they are, or only one by one, each by one fault."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

Shape = tuple[int, int, int]


class Net(nn.Module):
    """Two dense layers of five units, with a fault between them."""

    def __init__(self, shape: Shape, num_classes: int) -> None:
        super().__init__()
        self.a = nn.Linear(math.prod(shape), 5)
        self.b = nn.Linear(5, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.b(self.between(F.relu(self.a(x.flatten(1)))))
        return logits

    def between(self, x: Tensor) -> Tensor:
        return x


class CountsCalls(Net):
    calls = 0

    def between(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x


class Remembers(Net):
    def __init__(self, shape: Shape, num_classes: int) -> None:
        super().__init__(shape, num_classes)
        self.seen: dict[str, list[int]] = {"sizes": []}

    def between(self, x: Tensor) -> Tensor:
        self.seen["sizes"].append(len(x))
        return x


class KeepsTensor(Net):
    """A running mean in an attribute that is no buffer."""

    def __init__(self, shape: Shape, num_classes: int) -> None:
        super().__init__(shape, num_classes)
        self.mean = torch.zeros(5)

    def between(self, x: Tensor) -> Tensor:
        if self.training:
            self.mean += 0.1 * x.detach().mean(0).to(self.mean)
        return x - self.mean


class OnItsClass(Net):
    count: tuple[int, ...] = (0,)

    def between(self, x: Tensor) -> Tensor:
        type(self).count += (1,)
        return x


STEPS = 0


class InAGlobal(Net):
    def between(self, x: Tensor) -> Tensor:
        global STEPS
        STEPS += 1
        return x


class OwnGenerator(Net):
    def __init__(self, shape: Shape, num_classes: int) -> None:
        super().__init__(shape, num_classes)
        self.draw = np.random.default_rng(3)

    def between(self, x: Tensor) -> Tensor:
        return x + float(self.draw.normal()) if self.training else x


class NumpyNoise(Net):
    def between(self, x: Tensor) -> Tensor:
        return x + float(np.random.normal()) if self.training else x


class PythonNoise(Net):
    def between(self, x: Tensor) -> Tensor:
        return x + random.random() if self.training else x


class TorchNoise(Net):
    def between(self, x: Tensor) -> Tensor:
        return x + torch.randn_like(x) if self.training else x


class DropsAlways(Net):
    def between(self, x: Tensor) -> Tensor:
        return F.dropout(x, 0.3)


class NumpyWeights(Net):
    def __init__(self, shape: Shape, num_classes: int) -> None:
        super().__init__(shape, num_classes)
        self.a.weight.data = torch.as_tensor(np.random.normal(size=self.a.weight.shape)).float()


class CopiesWeights(Net):
    """A reference to a weight besides the module's own."""

    def __init__(self, shape: Shape, num_classes: int) -> None:
        super().__init__(shape, num_classes)
        self.kept = (self.b.weight,)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.relu(self.a(x.flatten(1))), *self.kept)


class LateBuffer(Net):
    late: Tensor

    def between(self, x: Tensor) -> Tensor:
        if not hasattr(self, "late"):
            self.register_buffer("late", torch.ones(5))
        return x * self.late


class GrowingBuffer(Net):
    sizes: Tensor

    def __init__(self, shape: Shape, num_classes: int) -> None:
        super().__init__(shape, num_classes)
        self.register_buffer("sizes", torch.zeros(1))

    def between(self, x: Tensor) -> Tensor:
        if self.training:
            self.sizes = torch.cat([self.sizes, self.sizes[:1]])
        return x


class Infinite(Net):
    def __init__(self, shape: Shape, num_classes: int) -> None:
        super().__init__(shape, num_classes)
        self.a.bias.data[2] = torch.nan


class Diverging(Net):
    def between(self, x: Tensor) -> Tensor:
        return x / 0 if self.training else x


class FailsInTraining(Net):
    def between(self, x: Tensor) -> Tensor:
        if self.training:
            raise IndexError("no such layer")
        return x


class TwoOutputs(Net):
    """Besides its logits, those of an auxiliary head in training."""

    def forward(self, x: Tensor) -> Tensor:
        logits = super().forward(x)
        return (logits, logits) if self.training else logits  # type: ignore[return-value]


class Frozen(Net):
    def __init__(self, shape: Shape, num_classes: int) -> None:
        super().__init__(shape, num_classes)
        self.requires_grad_(False)


class WithoutParameters(nn.Module):
    def __init__(self, shape: Shape, num_classes: int) -> None:
        super().__init__()
        self.num_classes = num_classes

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1)[:, : self.num_classes]


REFUSED: dict[Callable[..., nn.Module], str] = {
    CountsCalls: r"^'calls' changes when it is called",
    Remembers: r"^'seen' changes when it is called",
    KeepsTensor: r"^'mean' changes when it is called",
    OnItsClass: r"^'OnItsClass.count' changes when it is called",
    InAGlobal: r"^'unfit_models.STEPS' changes when it is called",
    OwnGenerator: r"^'draw' changes when it is called",
    NumpyNoise: r"draws from numpy.random",
    PythonNoise: r"draws from Python's random",
    TorchNoise: r"draws random numbers other than by a dropout",
    DropsAlways: r"draws random numbers in evaluation mode: pass training=self.training",
    NumpyWeights: r"two models built with one seed differ in 'a.weight'",
    CopiesWeights: r"values of 'b.weight' differ from plain PyTorch",
    LateBuffer: r"a call adds or removes 'late'",
    GrowingBuffer: r"assigns torch.float\d\d \(2,\) to its buffer 'sizes', which is torch.float",
    Infinite: r"initial weights 'a.bias' are not finite",
    Diverging: r"loss on real images is not a finite number",
    FailsInTraining: r"fails in training mode on 4 images: IndexError: no such layer \(unfit_models",
    TwoOutputs: r"it returns tuple in training mode on 4 images: must be logits",
    WithoutParameters: r"neither parameters nor buffers",
}
"""With what their trial says."""


class Centred(Net):
    """Subtracts the mean of the batch, of padding as well."""

    def between(self, x: Tensor) -> Tensor:
        return x - x.mean(0)


class Masked(Net):
    """A mask of -inf in a buffer."""

    mask: Tensor

    def __init__(self, shape: Shape, num_classes: int) -> None:
        super().__init__(shape, num_classes)
        self.register_buffer("mask", torch.tensor([0, 0, -torch.inf, 0, 0]))

    def between(self, x: Tensor) -> Tensor:
        return (x + self.mask).softmax(1)


class CountsTests(Net):
    """Changes its buffer in evaluation mode too."""

    calls: Tensor
    kept: Tensor

    def __init__(self, shape: Shape, num_classes: int) -> None:
        super().__init__(shape, num_classes)
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("kept", torch.zeros(()))

    def between(self, x: Tensor) -> Tensor:
        self.calls = self.calls + 1
        self.kept += 1
        return x / (1 + 0.1 * (self.calls + self.kept))


class Normed(Net):
    def __init__(self, shape: Shape, num_classes: int) -> None:
        super().__init__(shape, num_classes)
        self.norm = nn.BatchNorm1d(5)

    def between(self, x: Tensor) -> Tensor:
        return self.norm(x)  # type: ignore[no-any-return]
