"""PyTorch's dropouts, drawn from the stream of a client instead of a global generator.

Each function takes `draw` first, which returns uniform 16-bit integers of a shape, and then what the
function of PyTorch takes that it stands in for. What is kept or dropped is decided as there; only the
source of the draws differs. So the resolution of a probability is 1/65536.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

Draw = Callable[[Sequence[int]], Tensor]
"""Returns int64 0..65535 of a shape, other ones at every call."""

_SELU_LIMIT = 1.7580993408473766
"""λ·α of SELU: alpha dropout sets units to minus this (Klambauer et al. 2017, 1706.02515, section 3)."""


def _kept(draw: Draw, shape: Sequence[int], p: float) -> Tensor:
    """Return which units are kept, bool of `shape`, each with probability 1 - p."""
    if not 0 <= p <= 1:
        raise ValueError(f"dropout probability has to be between 0 and 1, but got {p}")
    return draw(shape) >= round(p * 65536)


def _channels(input: Tensor) -> list[int]:
    """Return the shape of a mask that drops whole channels of ``[B, channels, ...]``."""
    return [*input.shape[:2], *[1] * (input.ndim - 2)]


def _scaled(input: Tensor, keep: Tensor, p: float) -> Tensor:
    # p = 1 drops everything; the denominator is then never used.
    return torch.where(keep, input / max(1 - p, 1 / 65536), input.new_zeros(()))


def _alpha_scaled(input: Tensor, keep: Tensor, p: float) -> Tensor:
    if p == 1:
        return torch.zeros_like(input)
    scale = 1 / math.sqrt((_SELU_LIMIT**2 * p + 1) * (1 - p))
    shift = _SELU_LIMIT * scale * p
    return torch.where(keep, input * scale + shift, input.new_tensor(shift - _SELU_LIMIT * scale))


def dropout(draw: Draw, input: Tensor, p: float, train: bool) -> Tensor:
    """Stand in for `torch.dropout`."""
    if not train or p == 0:
        return input
    return _scaled(input, _kept(draw, input.shape, p), p)


def feature_dropout(draw: Draw, input: Tensor, p: float, train: bool) -> Tensor:
    """Stand in for `torch.feature_dropout`, the core of dropout1d, 2d and 3d."""
    if not train or p == 0:
        return input
    return _scaled(input, _kept(draw, _channels(input), p), p)


def alpha_dropout(draw: Draw, input: Tensor, p: float, train: bool) -> Tensor:
    """Stand in for `torch.alpha_dropout`."""
    if not train or p == 0:
        return input
    return _alpha_scaled(input, _kept(draw, input.shape, p), p)


def feature_alpha_dropout(draw: Draw, input: Tensor, p: float, train: bool) -> Tensor:
    """Stand in for `torch.feature_alpha_dropout`."""
    if not train or p == 0:
        return input
    return _alpha_scaled(input, _kept(draw, _channels(input), p), p)


def bernoulli(draw: Draw, input: Tensor, p: float | Tensor | None = None) -> Tensor:
    """Stand in for `torch.bernoulli`; `p` defaults to the values of `input`."""
    likely = input if p is None else p
    return (draw(input.shape) < likely * 65536).to(input.dtype)


def attention(
    draw: Draw,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Stand in for `torch.nn.functional.scaled_dot_product_attention`, written out if it drops."""
    if dropout_p == 0:
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask, 0.0, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    if enable_gqa:
        groups = query.shape[-3] // key.shape[-3]
        key, value = key.repeat_interleave(groups, -3), value.repeat_interleave(groups, -3)
    scores = query @ key.transpose(-2, -1) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        attn_mask = torch.ones_like(scores, dtype=torch.bool).tril()
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, -torch.inf)
    elif attn_mask is not None:
        scores = scores + attn_mask
    return dropout(draw, scores.softmax(-1), dropout_p, True) @ value


def recurrent(function: Callable[..., Any], draw: Draw, *args: Any) -> Any:
    """Stand in for `function`, such as `torch.lstm`: layer by layer, if units are dropped between them.

    Packed sequences are left to PyTorch.
    """
    is_packed = isinstance(args[1], Tensor) and not args[1].is_floating_point()
    if is_packed:
        return function(*args)
    input, states, weights, has_biases, layers, p, train, both_ways, batch_first = args
    if not train or p == 0 or layers == 1:
        return function(*args)
    each, directions = len(weights) // layers, 1 + both_ways
    ends = []
    for layer in range(layers):
        rows = slice(layer * directions, (layer + 1) * directions)
        start = states[rows] if isinstance(states, Tensor) else tuple(s[rows] for s in states)
        own = weights[layer * each : (layer + 1) * each]
        input = dropout(draw, input, p, True) if layer else input
        input, *end = function(input, start, own, has_biases, 1, 0.0, train, both_ways, batch_first)
        ends.append(end)
    return (input, *(torch.cat(state) for state in zip(*ends, strict=True)))
