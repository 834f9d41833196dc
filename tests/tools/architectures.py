"""Architectures that users bring: those of torchvision, and small ones for every kind of layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torchvision.models as tv
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.convnext import CNBlockConfig
from torchvision.models.maxvit import MaxVit
from torchvision.models.resnet import Bottleneck
from torchvision.models.swin_transformer import (
    PatchMerging,
    PatchMergingV2,
    SwinTransformerBlock,
    SwinTransformerBlockV2,
)
from torchvision.models.vgg import make_layers

C = 7
Build = Callable[[], nn.Module]
DIM = 12
"""Width of the small architectures; their images are 3x8x8."""


class Small(nn.Module):
    """``head(act(middle(stem(x))))``, where a kind of layer is put in the middle of 12 features."""

    def __init__(self, middle: nn.Module) -> None:
        super().__init__()
        self.stem = nn.Linear(3 * 64, DIM)
        self.middle = middle
        self.head = nn.Linear(DIM, C)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(F.gelu(self.middle(self.stem(x.flatten(1)))))
        return logits


class Sequences(nn.Module):
    """The eight rows of an image as a sequence of vectors, through a layer for sequences."""

    def __init__(self, layer: nn.Module, width: int = DIM, axis: int = 1) -> None:
        super().__init__()
        self.stem, self.layer, self.head = nn.Linear(24, DIM), layer, nn.Linear(width, C)
        self.axis = axis

    def forward(self, x: Tensor) -> Tensor:
        rows = self.stem(x.transpose(1, 2).flatten(2))
        out: Any = self.layer(rows)
        out = out[0] if isinstance(out, tuple) else out
        logits: Tensor = self.head(out.mean(self.axis))
        return logits


class Convolutional(nn.Module):
    """A convolution, a kind of layer on its 8 maps of 8x8, and a linear head."""

    def __init__(self, layer: nn.Module, maps: int = 8) -> None:
        super().__init__()
        self.stem, self.layer = nn.Conv2d(3, 8, 3, padding=1), layer
        self.head = nn.Linear(maps, C)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(F.relu(self.layer(self.stem(x))).mean((2, 3)))
        return logits


class Reshaped(nn.Module):
    """A layer that sees 12 features as another shape."""

    def __init__(self, layer: nn.Module, *shape: int) -> None:
        super().__init__()
        self.layer, self.shape = layer, shape

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.reshape(len(x), *self.shape)).flatten(1)  # type: ignore[no-any-return]


class Residual(nn.Module):
    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.inner = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)  # type: ignore[no-any-return]


class Tied(nn.Module):
    """Two layers with one weight, and its transpose in a third."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(DIM, DIM), nn.Linear(DIM, DIM)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.b(torch.tanh(self.a(x))), self.a.weight.t())


class Running(nn.Module):
    """A running mean of each sample's own kind: the buffer is assigned, and no row sees another."""

    steps: Tensor
    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.register_buffer("scale", torch.ones(DIM))

    def forward(self, x: Tensor) -> Tensor:
        scaled = x * self.scale
        if self.training:
            self.steps = self.steps + 1
            self.scale = 0.9 * self.scale + 0.01 * self.steps
        return scaled


class InPlace(nn.Module):
    """A buffer that is changed in place."""

    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.calls += 1
        return x / (1 + self.calls)


class RunningMean(nn.Module):
    """A running mean over the batch, assigned."""

    mean: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(DIM))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
        return x - self.mean


class BatchMean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(0)


class BatchMaximum(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x / (1 + x.abs().max())


class Causal(nn.Module):
    """Attention with a mask of -inf in a buffer."""

    mask: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(DIM, 2, batch_first=True)
        self.register_buffer("mask", torch.triu(torch.full((8, 8), -math.inf), 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, attn_mask=self.mask, need_weights=False)[0]  # type: ignore[no-any-return]


class Spectrum(nn.Module):
    """The spectrum of the features, and a complex buffer."""

    phase: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("phase", torch.polar(torch.ones(DIM // 2), torch.arange(DIM // 2) / 3))

    def forward(self, x: Tensor) -> Tensor:
        turned = torch.view_as_complex(x.reshape(-1, DIM // 2, 2).contiguous()) * self.phase
        return torch.view_as_real(turned).flatten(1)


class Squeeze(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Sequential(nn.Linear(8, 3), nn.ReLU(), nn.Linear(3, 8), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(x.mean((2, 3)))[:, :, None, None]  # type: ignore[no-any-return]


class Mixer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.channels = nn.Linear(8, 8), nn.Linear(DIM, DIM)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.tokens(x.transpose(1, 2)).transpose(1, 2)
        return x + self.channels(F.gelu(x))  # type: ignore[no-any-return]


class Quantised(nn.Module):
    """Pixels as indices of an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(5, 6), nn.Linear(6, C)

    def forward(self, x: Tensor) -> Tensor:
        levels = (x.flatten(1) * 2).clamp(-2, 2).round().long() + 2
        logits: Tensor = self.head(self.embedding(levels).mean(1))
        return logits


def _in(*modules: Callable[[], nn.Module]) -> Build:
    return lambda: Small(nn.Sequential(*(module() for module in modules)))


def _encoder(**options: Any) -> Build:
    return lambda: Sequences(nn.TransformerEncoderLayer(DIM, 3, 17, batch_first=True, **options))


SMALL: Mapping[str, Build] = {
    "batch norm": _in(partial(nn.BatchNorm1d, DIM)),
    "batch norm without statistics": _in(partial(nn.BatchNorm1d, DIM, track_running_stats=False)),
    "layer norm": _in(partial(nn.LayerNorm, DIM)),
    "group norm": _in(partial(nn.GroupNorm, 3, DIM)),
    "rms norm": _in(partial(nn.RMSNorm, DIM)),
    "instance norm": lambda: Convolutional(nn.InstanceNorm2d(8, affine=True)),
    "instance norm with statistics": lambda: Convolutional(
        nn.InstanceNorm2d(8, track_running_stats=True)
    ),
    "local response norm": lambda: Convolutional(nn.LocalResponseNorm(3)),
    "residual mlp": _in(
        lambda: Residual(nn.Linear(DIM, 5), nn.SiLU(), nn.Linear(5, DIM)),
        lambda: Residual(nn.LayerNorm(DIM), nn.Linear(DIM, DIM), nn.Dropout(0.3)),
    ),
    "tied weights": _in(Tied),
    "a buffer assigned": _in(Running),
    "a buffer changed in place": _in(InPlace),
    "a running mean": _in(RunningMean),
    "the mean of a batch": _in(BatchMean),
    "the maximum of a batch": _in(BatchMaximum),
    "a weight norm": _in(lambda: nn.utils.parametrizations.weight_norm(nn.Linear(DIM, DIM))),
    "a spectral norm": _in(lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(DIM, DIM))),
    "an orthogonal layer": _in(lambda: nn.utils.parametrizations.orthogonal(nn.Linear(DIM, DIM))),
    "prelu": _in(partial(nn.PReLU, DIM)),
    "alpha dropout": _in(nn.SELU, partial(nn.AlphaDropout, 0.3)),
    "a 1d convolution": _in(lambda: Reshaped(nn.Conv1d(3, 3, 3, padding=1), 3, 4)),
    "a 3d convolution": _in(lambda: Reshaped(nn.Conv3d(1, 1, 3, padding=1), 1, 3, 2, 2)),
    "a transposed convolution": lambda: Convolutional(nn.ConvTranspose2d(8, 4, 2, 2), 4),
    "a depthwise convolution": lambda: Convolutional(nn.Conv2d(8, 8, 3, groups=8)),
    "dropout of maps": lambda: Convolutional(nn.Dropout2d(0.3)),
    "squeeze and excitation": lambda: Convolutional(Squeeze()),
    "pixel shuffle": lambda: Convolutional(nn.PixelShuffle(2), 2),
    "upsampling": lambda: Convolutional(nn.Upsample(scale_factor=2, mode="bilinear")),
    "pooling": lambda: Convolutional(
        nn.Sequential(nn.AvgPool2d(2), nn.AdaptiveMaxPool2d((2, 3)), nn.LPPool2d(2, 2))
    ),
    "an embedding": Quantised,
    "an encoder layer": _encoder(),
    "an encoder layer, norm first": _encoder(norm_first=True, activation="gelu"),
    "an encoder layer, batch second": lambda: Sequences(
        nn.TransformerEncoderLayer(DIM, 3, 17, dropout=0.0)
    ),
    "causal attention": lambda: Sequences(Causal()),
    "a mixer": lambda: Sequences(Mixer()),
    "lstm": lambda: Sequences(nn.LSTM(DIM, 5, 2, batch_first=True, dropout=0.3), 5),
    "lstm, both ways": lambda: Sequences(nn.LSTM(DIM, 5, batch_first=True, bidirectional=True), 10),
    "gru": lambda: Sequences(nn.GRU(DIM, 5, 2, batch_first=True), 5),
    "rnn": lambda: Sequences(nn.RNN(DIM, 5, batch_first=True), 5),
    "a spectrum": _in(Spectrum),
}
"""For images 3x8x8."""


def _torchvision(name: str, **options: Any) -> Build:
    return lambda: tv.get_model(name, weights=None, num_classes=C, **options)


def _narrow(module: nn.Module, features: int) -> nn.Module:
    """Return a classifier of 4,096 units, 100 million weights in float64, as one of 32."""
    module.classifier = nn.Sequential(
        *(nn.Dropout(), nn.Linear(features, 32), nn.ReLU(inplace=True), nn.Linear(32, C))
    )
    return module


def _alexnet() -> nn.Module:
    return _narrow(tv.AlexNet(1), 256 * 36)


def _vgg() -> nn.Module:
    layers = make_layers([8, "M", 16, "M", 32, 32, "M", 32, "M", 32, "M"], batch_norm=True)
    return _narrow(tv.VGG(layers, 1), 32 * 49)


def _bottlenecks(**options: Any) -> Build:
    return lambda: tv.ResNet(Bottleneck, [1, 1, 1, 1], num_classes=C, **options)


def _swin(block: Any, merging: Any) -> Build:
    return lambda: tv.SwinTransformer(
        *([2, 2], 12, [2, 2], [2, 3], [4, 4]),
        num_classes=C,
        block=block,
        downsample_layer=merging,
    )


def _convnext() -> nn.Module:
    stages = [CNBlockConfig(16, 24, 1), CNBlockConfig(24, None, 2)]
    model: nn.Module = tv.ConvNeXt(stages, 0.2, num_classes=C)
    return model


FAMILIES: Mapping[str, tuple[Build, int]] = {
    "vit": (
        lambda: tv.VisionTransformer(32, 8, 2, 2, 16, 31, dropout=0.1, num_classes=C),
        32,
    ),
    "alexnet": (_alexnet, 64),
    "convnext": (_convnext, 32),
    "densenet": (_torchvision("densenet121"), 32),
    "efficientnet": (_torchvision("efficientnet_b0"), 32),
    "efficientnet v2": (_torchvision("efficientnet_v2_s"), 32),
    "googlenet": (_torchvision("googlenet", aux_logits=False, init_weights=True), 32),
    "inception": (_torchvision("inception_v3", aux_logits=False, init_weights=True), 75),
    "maxvit": (
        lambda: MaxVit((32, 32), 8, 4, [8, 16], [1, 1], 8, 0.2, num_classes=C),
        32,
    ),
    "mnasnet": (_torchvision("mnasnet0_5"), 32),
    "mobilenet v2": (_torchvision("mobilenet_v2"), 32),
    "mobilenet v3": (_torchvision("mobilenet_v3_small"), 32),
    "regnet x": (_torchvision("regnet_x_400mf"), 32),
    "regnet y": (_torchvision("regnet_y_400mf"), 32),
    "resnet": (_torchvision("resnet18"), 32),
    "resnext": (_bottlenecks(groups=32, width_per_group=4), 32),
    "shufflenet": (_torchvision("shufflenet_v2_x0_5"), 32),
    "squeezenet": (_torchvision("squeezenet1_1"), 32),
    "swin": (_swin(SwinTransformerBlock, PatchMerging), 32),
    "swin v2": (_swin(SwinTransformerBlockV2, PatchMergingV2), 32),
    "vgg": (_vgg, 32),
    "wide resnet": (_bottlenecks(width_per_group=128), 32),
}
"""The smallest member of each family of torchvision, with the height of its images; a smaller one where
that has over 10 million weights, or 32x32 is too small for it (ViT, MaxViT)."""
