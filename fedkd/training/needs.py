"""What a model needs to be trained: parameters that can change, and samples enough."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

BATCH_NORM_NEEDS_TWO = "a model with batch normalisation needs at least 2 samples in a batch"


def is_trainable(model: nn.Module) -> bool:
    """Whether any parameter of a model is trained."""
    return any(parameter.requires_grad for parameter in model.parameters())


def smallest_batch(model: nn.Module) -> int:
    """Return the number of samples below which a model cannot learn from a batch.

    PyTorch refuses one value per channel, whose deviation is 0. Whether a sample has one or more depends
    on the size of its feature maps; here the layer alone decides, so that the rule is short.
    """
    return 2 if any(isinstance(module, _BatchNorm) for module in model.modules()) else 1
