"""Run dropout, batch normalisation and dense layers under ``vmap`` independently of other clients.

Under ``vmap`` PyTorch draws dropout from one generator by position in the stack, and batch
normalisation sees padding. `KeyedMode` intercepts both inside the mapped function: dropout masks
become a counter-based hash of a per-client key (integer arithmetic, the same on CPU and CUDA), and
batch statistics are taken over real rows only. The model need not be changed, and calls of
``torch.nn.functional`` in a user's model are intercepted as well.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from fedkd.errors import FedkdError
from fedkd.randomness import draws

EPS = 1 / 65536
"""Resolution of a dropout probability: draws have 16 bits."""


def _generators() -> list[Tensor]:
    """Return the states of the global generators that a forward pass might draw from."""
    states = [torch.get_rng_state()]
    return [*states, torch.cuda.get_rng_state()] if torch.cuda.is_initialized() else states


class KeyedMode(TorchFunctionMode):
    """Mode of one client's forward pass: its own dropout masks, batch statistics without padding.

    Args:
        key: int64 0-d, the client's stream for this step; ``None`` outside training.
        real: bool ``[B]``, which rows are not padding; ``None`` where no row is.
        watch: whether to look for other random draws; a fit's first step is enough.

    Raises:
        FedkdError: the model calls another random function, whose draws would depend on the
            other clients.
    """

    def __init__(self, key: Tensor | None, real: Tensor | None, watch: bool = True) -> None:
        super().__init__()
        self._watch = watch
        self._key = key
        self._real = real
        self._calls = 0

    def __enter__(self) -> Self:
        self._generators = _generators() if self._watch else []
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: Any
    ) -> None:
        super().__exit__(kind, error, trace)  # type: ignore[no-untyped-call]
        # Composite functions (attention with dropout) are intercepted as a whole, without their draws.
        # Without `vmap` these move the global generator; with it they raise an error.
        refused = isinstance(error, RuntimeError) and "randomness error mode" in str(error)
        watched = self._watch and error is None
        moved = watched and not all(map(torch.equal, self._generators, _generators()))
        if refused or moved:
            raise FedkdError(
                "the model draws random numbers other than by nn.Dropout, which cannot be keyed"
            ) from error

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.dropout:
            return self._dropout(*args, **kwargs)
        if func is F.batch_norm:
            return self._batch_norm(*args, **kwargs)
        if self._real is not None and func in _STACKED:
            return _STACKED[func](*args, **kwargs)
        return func(*args, **kwargs)

    def _dropout(
        self, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
    ) -> Tensor:
        if not training or p == 0:
            return input
        if self._key is None:
            raise FedkdError("dropout in training mode needs a key")
        draw = draws(self._key, input.numel(), self._calls).reshape(input.shape)
        self._calls += 1
        keep = draw >= round(p * 65536)
        # p = 1 drops everything; the denominator is then never used.
        out = torch.where(keep, input / max(1 - p, EPS), input.new_zeros(()))
        return input.copy_(out) if inplace else out

    def _batch_norm(
        self,
        input: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> Tensor:
        if self._real is not None:
            input = _not_half(input)
        # PyTorch refuses a batch of one value per channel, and the last batch of a shard may be one.
        if not training or (self._real is None and input.numel() > input.shape[1]):
            return F.batch_norm(
                input, running_mean, running_var, weight, bias, training, momentum, eps
            )
        rows = input.new_ones(len(input)) if self._real is None else self._real.to(input.dtype)
        per_channel = [1, -1, *[1] * (input.ndim - 2)]
        dims = [d for d in range(input.ndim) if d != 1]
        real = rows.reshape(-1, *[1] * (input.ndim - 1))
        count = real.sum() * (input.numel() // (input.shape[0] * input.shape[1]))
        mean = (input * real).sum(dims) / count
        centred = input - mean.reshape(per_channel)
        var = (centred.square() * real).sum(dims) / count
        if running_mean is not None and running_var is not None:
            running_mean.mul_(1 - momentum).add_(momentum * mean.detach())
            unbiased = var.detach() * count / (count - 1).clamp_min(1)
            running_var.mul_(1 - momentum).add_(momentum * unbiased)
        out = centred * torch.rsqrt(var + eps).reshape(per_channel)
        if weight is not None:
            out = out * weight.reshape(per_channel)
        return out if bias is None else out + bias.reshape(per_channel)


class FeaturesFirst(TorchFunctionMode):
    """Mode that runs the layers of stacked models as `KeyedMode` does, outside training."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        run: Callable[..., Any] = _STACKED.get(func, func)
        return run(*args, **(kwargs or {}))


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return a dense layer's output, computed with the features first as ``(W xᵀ + b)ᵀ``.

    Under ``vmap`` this is one batched product in each direction whose results need no transposing:
    1.5 times as fast as ``F.linear`` there, and one wide product where all models see the same input.
    """
    if input.ndim != 2:
        return F.linear(input, weight, bias)
    product = weight @ input.t()
    # Not `addmm`, which vmap splits into more operations than these two.
    return (product if bias is None else product + bias.unsqueeze(1)).t()


def _convolution(function: Any) -> Callable[..., Tensor]:
    """Return a convolution that computes in autocast's dtype, which vmap's convolution ignores."""

    def convolve(input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        device = input.device.type
        positional, keyword = [input, *args], kwargs
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
            positional = [a.to(dtype) if isinstance(a, Tensor) else a for a in positional]
            keyword = {n: a.to(dtype) if isinstance(a, Tensor) else a for n, a in kwargs.items()}
        output: Tensor = function(*positional, **keyword)
        return output

    return convolve


def _not_half(input: Tensor) -> Tensor:
    """Return bfloat16 as float32: statistics need it, and vmap's normalisation cannot mix both."""
    return input.float() if input.dtype == torch.bfloat16 else input


def _batch_norm(input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return F.batch_norm(_not_half(input), *args, **kwargs)


_STACKED: dict[Callable[..., Any], Callable[..., Tensor]] = {
    F.linear: _linear,
    F.batch_norm: _batch_norm,
    **{function: _convolution(function) for function in (F.conv1d, F.conv2d, F.conv3d)},
}
"""Layers that run differently in a stack."""
