"""Train a block of models: every step, and a trace of losses and gradient norms."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from threading import Lock

import torch
from torch import Tensor
from torch.func import vmap
from torch.nn.functional import pad

from fedkd.errors import FedkdError
from fedkd.losses import Step
from fedkd.machine import Precision, forward_pass
from fedkd.training.batches import Batches, BatchStream, Block, spread
from fedkd.training.optimizers import OptimizerSettings, StackedOptimizer
from fedkd.training.parameters import State, Stateless
from fedkd.training.profiling import timed
from fedkd.training.vmap_modes import KeyedMode, no_other_draws

NORM_EVERY = 8
"""Steps between measurements of the gradient's norm, which cost a pass over all gradients."""


@dataclass(frozen=True, eq=False)
class Fitted:
    """Losses and gradient norms of K models that took up to T steps.

    Attributes:
        losses: ``[K]``, each model's mean training loss over its steps.
        gradient_norms: ``[K]``, the Euclidean norm of the gradient of all trained parameters, averaged
            over every `NORM_EVERY`-th step.
        loss_by_step: ``[K, T]``, NaN past a model's last step.
        gradient_norm_by_step: ``[K, ⌈T / NORM_EVERY⌉]``, likewise.
    """

    losses: Tensor
    gradient_norms: Tensor
    loss_by_step: Tensor
    gradient_norm_by_step: Tensor


def concatenated_fits(parts: Sequence[Fitted], order: Sequence[int]) -> Fitted:
    """Return the fits of all blocks as one, in the order of the cohort.

    Args:
        parts: of consecutive blocks, the models with most steps first.
        order: position in the cohort of each model of `parts`.
    """
    place = torch.tensor(order).argsort().to(parts[0].losses.device)

    def concatenated(name: str) -> Tensor:
        tensors = [getattr(part, name) for part in parts]
        if tensors[0].ndim > 1:
            width = tensors[0].shape[1]
            tensors = [pad(t, (0, width - t.shape[1]), value=torch.nan) for t in tensors]
        return torch.cat(tensors)[place]

    return Fitted(**{each.name: concatenated(each.name) for each in fields(Fitted)})


class Progress:
    """Counts the steps of a fit over all lanes, and reports the share that is done."""

    def __init__(self, total: int, report: Callable[[float], None]) -> None:
        self._done, self._total, self._report = 0, total, report
        self._lock = Lock()

    def __call__(self, steps: int) -> None:
        """Count steps that were just taken by all models together."""
        with self._lock:
            self._done += steps
            self._report(self._done / self._total)


class BlockFit:
    """One fit of a block: a copy of its clients' rows, sorted by the number of steps."""

    def __init__(
        self,
        model: Stateless,
        params: State,
        buffers: State,
        batch_streams: Sequence[BatchStream],
        block: Block,
        precision: Precision,
    ) -> None:
        """Copy the rows of the block out of a cohort's `params` and `buffers`, ``[K, ...]`` by name."""
        self._model, self._block, self._precision = model, block, precision
        self._whole = (params, buffers)
        self._params = {n: p[block.index] for n, p in params.items()}
        self._buffers = {n: b[block.index] for n, b in buffers.items()}
        self._start = self._starting_point(batch_streams)
        self._trained = [n for n, p in model.module.named_parameters() if p.requires_grad]
        self._values: State = {}
        self._batch_streams = [Batches(batch_stream, block) for batch_stream in batch_streams]

    def _starting_point(self, batch_streams: Sequence[BatchStream]) -> State:
        if any(term.needs_start for batch_stream in batch_streams for term in batch_stream.terms):
            return {n: p.clone() for n, p in self._params.items()}
        return {}

    def train(
        self,
        optimizer: OptimizerSettings,
        numbers: Mapping[str, float | Tensor],
        count_steps: Callable[[int], None],
    ) -> Fitted:
        """Take every step; return losses and gradient norms.

        Args:
            optimizer: its settings, for all clients of the cohort.
            numbers: what terms read from ``step.numbers``, each a number or a tensor ``[K]``.
            count_steps: called after each step with the number of models that took it.
        """
        steps, index, dtype = self._block.steps, self._block.index, self._block.dtype
        self._values = {n: spread(v, index, dtype) for n, v in numbers.items()}
        stepper = StackedOptimizer(
            [self._params[n] for n in self._trained],
            optimizer.rows(index),
            alone=not self._block.stacked,
        )
        trace = _Trace(steps, dtype, index.device)
        for tick in range(steps[0]):
            active = sum(count > tick for count in steps)
            inputs = self._inputs(tick, active)
            losses, grads = self._computed(inputs, watch=tick == 0)
            trace.add(tick, losses, grads)
            with timed("optimizer"):
                stepper.step(grads, active)
            count_steps(active)
        return trace.fitted()

    def _inputs(self, tick: int, active: int) -> _Inputs:
        """Return everything that the losses of a step depend on."""
        with timed("data"):
            batches = [batch_stream.batch(tick, active) for batch_stream in self._batch_streams]
        return (
            {n: p[:active] for n, p in self._params.items()},
            {n: b[:active] for n, b in self._buffers.items()},
            {n: p[:active] for n, p in self._start.items()},
            {n: v[:active] for n, v in self._values.items()},
            *batches,
        )

    def _computed(self, inputs: _Inputs, watch: bool) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        """Return the losses ``[active]`` and the gradients of the trained parameters."""
        with timed("forward"):
            params = {n: p.detach() for n, p in inputs[0].items()}
            leaves = [params[n].requires_grad_() for n in self._trained]
            losses, assigned = self._losses((params, *inputs[1:]), watch)
        with timed("backward"):
            grads = torch.autograd.grad(losses.sum(), leaves, allow_unused=True)
        for name, tensor in assigned.items():  # now: the backward pass needs the values before
            self._buffers[name][: len(losses)] = tensor
        return losses.detach(), grads

    def _losses(self, inputs: _Inputs, watch: bool) -> tuple[Tensor, State]:
        """Return the losses ``[active]``, and the buffers ``[active, ...]`` that the model assigned."""
        # As one flat list: `vmap` would flatten and rebuild the dictionaries at every step.
        names = [list(tree) for tree in inputs]

        def one_client(*tensors: Tensor) -> tuple[Tensor, State]:
            return self._client_loss(watch, *_trees(names, tensors))

        if self._block.stacked:
            stacked: tuple[Tensor, State] = vmap(one_client)(*_flat(inputs))
            return stacked
        loss, assigned = one_client(*(tensor.squeeze(0) for tensor in _flat(inputs)))
        return loss.unsqueeze(0), {n: t.unsqueeze(0) for n, t in assigned.items()}

    def _client_loss(
        self,
        watch: bool,
        params: State,
        buffers: State,
        start: State,
        numbers: State,
        *batches: State,
    ) -> tuple[Tensor, State]:
        total = next(iter(params.values())).new_zeros(())
        tensors = {**params, **buffers}
        for batch_stream, batch in zip(self._batch_streams, batches, strict=True):
            with (
                no_other_draws(watch),
                KeyedMode(batch["key"], batch["real"] if self._block.stacked else None),
                forward_pass(self._precision, self._block.index.device),
            ):
                logits, features = self._forward(batch_stream, tensors, batch["images"])
            step = Step(
                logits,
                batch["labels"],
                batch.get("teacher_logits"),
                params,
                start,
                numbers,
                features,
                batch.get("class_means"),
                batch.get("class_counts"),
                batch["real"],
            )
            for i, term in enumerate(batch_stream.terms):
                value: object = term(step)
                if not isinstance(value, Tensor):
                    kind = type(value).__name__
                    raise FedkdError(f"{term.import_path} returns a {kind}: must be a tensor")
                if value.shape not in ((), step.labels.shape):
                    raise FedkdError(
                        f"{term.import_path} returns shape {tuple(value.shape)}: must be "
                        f"{tuple(step.labels.shape)} (one value per sample), or () (added as it is)"
                    )
                mean = (value * batch["weights"]).sum() if value.ndim else value
                total = total + batch[f"coefficient {i}"] * mean
        return total, {n: tensors[n] for n, t in buffers.items() if tensors[n] is not t}

    def _forward(
        self, batch_stream: Batches, state: State, images: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Return the logits, and the features if a term needs them."""
        dtype = self._block.dtype
        if not any(term.needs_features for term in batch_stream.terms):
            return self._model(state, images).to(dtype), None
        features = self._model.features(state, images)
        return self._model.head(state, features).to(dtype), features.to(dtype)

    def write_back(self) -> None:
        """Write the trained rows back into the cohort."""
        for rows, whole in zip((self._params, self._buffers), self._whole, strict=True):
            for name, tensor in rows.items():
                whole[name][self._block.index] = tensor


_Inputs = tuple[State, ...]
"""Inputs of a step: parameters, buffers, parameters at the start, numbers, a batch of each stream."""


def _flat(inputs: _Inputs) -> list[Tensor]:
    return [tensor for tree in inputs for tensor in tree.values()]


def _trees(names: Sequence[Sequence[str]], tensors: Sequence[Tensor]) -> list[State]:
    remaining = iter(tensors)
    return [{name: next(remaining) for name in tree} for tree in names]


class _Trace:
    """Losses and gradient norms of a block, step by step.

    Args:
        steps: of each model, the most first.
    """

    def __init__(self, steps: Sequence[int], dtype: torch.dtype, device: torch.device) -> None:
        shape = (len(steps), steps[0])
        self._steps = torch.tensor(steps, device=device)
        self._losses = torch.full(shape, torch.nan, dtype=dtype, device=device)
        self._norms = torch.full_like(self._losses[:, ::NORM_EVERY], torch.nan)
        self._measured = -(-self._steps // NORM_EVERY)
        # Added step by step: the rounding of a sum over a padded axis depends on its length. Shares of
        # the mean are added, as finite numbers may add up to infinity.
        self._loss = torch.zeros(len(steps), dtype=dtype, device=device)
        self._norm = torch.zeros_like(self._loss)

    def add(self, tick: int, losses: Tensor, grads: Sequence[Tensor | None]) -> None:
        """Add a step of the first models: losses ``[active]`` and gradients ``[active, ...]``."""
        active = len(losses)
        self._losses[:active, tick] = losses
        self._loss[:active] += losses / self._steps[:active]
        if tick % NORM_EVERY == 0:
            norms = _norms([grad for grad in grads if grad is not None])
            self._norms[:active, tick // NORM_EVERY] = norms
            self._norm[:active] += norms / self._measured[:active]

    def fitted(self) -> Fitted:
        """Return losses and gradient norms of all steps."""
        return Fitted(self._loss, self._norm, self._losses, self._norms)


def _norms(grads: Sequence[Tensor]) -> Tensor:
    """Return the Euclidean norm ``[active]`` of each model's gradient, ``[active, ...]`` by parameter."""
    norms = torch.zeros_like(grads[0].reshape(len(grads[0]), -1)[:, 0])
    for grad in grads:
        # Contiguous, as numbers are added in the order in which they lie in memory.
        rows = grad.contiguous().view(len(grad), -1)
        # Relative to the largest number, whose square may overflow.
        largest = rows.abs().amax(1).clamp_min(torch.finfo(rows.dtype).tiny)
        relative = torch.linalg.vector_norm(rows / largest.unsqueeze(1), dim=1)
        norms = torch.hypot(norms, largest * relative)
    return norms
