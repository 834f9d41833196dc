"""A cohort: K models of one architecture, trained, distilled and evaluated side by side.

No other code in the project trains, distils, predicts or evaluates. Parameters are stacked along a
leading client axis; a client's results depend on its own data and random streams, never on the other
clients in the stack. A plan says how the models are run (stacked through ``vmap``, or one by one); it
changes results only within floating-point tolerance.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import vmap

from fedkd.data.images import Images
from fedkd.errors import FedkdError, safe_logger
from fedkd.machine import Precision, forward_pass, matrix_products
from fedkd.training.batches import VECTOR, BatchStream, Block
from fedkd.training.fit import BlockFit, Fitted, Progress, concatenated_fits
from fedkd.training.lanes import in_lanes
from fedkd.training.needs import BATCH_NORM_NEEDS_TWO, is_trainable, smallest_batch
from fedkd.training.optimizers import OptimizerSettings
from fedkd.training.parameters import State, Stateless, stacked
from fedkd.training.plans import Plan
from fedkd.training.schedule import Stream, steps_per_epoch
from fedkd.training.vmap_modes import FeaturesFirst

_logger = safe_logger(__name__)

_Forward = Callable[[Stateless, State, Tensor], Tensor]

IMAGES_AT_ONCE = {True: 1000, False: 250}
"""Images per forward pass outside training, stacked or not: the fastest as measured on a CPU."""


class Classified(NamedTuple):
    """Classes int16 ``[K, N]`` that K models predict for N images, and their probabilities ``[K, N]``."""

    classes: Tensor
    confidences: Tensor


@dataclass
class Cohort:
    """K models of one architecture.

    Attributes:
        skeleton: the module whose structure all models share; its own parameters are not used.
        params: ``[K, ...]`` by name.
        buffers: ``[K, ...]`` by name.
        plan: how the models are run.
        precision: number format of the forward and backward passes.
    """

    skeleton: nn.Module
    params: State
    buffers: State
    plan: Plan = field(default_factory=lambda: Plan(stacked=False))
    precision: Precision = "float32"

    @classmethod
    def of(cls, skeleton: nn.Module, states: Sequence[State], plan: Plan) -> Cohort:
        """Return a cohort of K models, whose states are copied into a stack."""
        return cls.over(skeleton, stacked(states), plan)

    @classmethod
    def over(
        cls,
        skeleton: nn.Module,
        stack: State,
        plan: Plan,
        precision: Precision = "float32",
    ) -> Cohort:
        """Return a cohort that trains the tensors of a stack, ``[K, ...]`` by name, in place."""
        params = {n: stack[n] for n, _ in skeleton.named_parameters()}
        buffers = {n: stack[n] for n, _ in skeleton.named_buffers()}
        return cls(skeleton, params, buffers, plan, precision)

    def __len__(self) -> int:
        return len(self._example)

    @property
    def _example(self) -> Tensor:
        """A tensor of the stack; floating point, if there is one."""
        tensors = [*self.params.values(), *self.buffers.values()]
        return next((t for t in tensors if t.is_floating_point()), tensors[0])

    def state(self, k: int) -> State:
        """Return a copy of model `k`'s state."""
        return {n: t[k].clone() for n, t in {**self.params, **self.buffers}.items()}

    def only(self, k: int) -> Cohort:
        """Return a cohort of model `k` alone, which shares its tensors with this one."""
        params = {name: tensor[k : k + 1] for name, tensor in self.params.items()}
        buffers = {name: tensor[k : k + 1] for name, tensor in self.buffers.items()}
        return replace(self, params=params, buffers=buffers)

    def load(self, k: int, state: Mapping[str, Tensor]) -> None:
        """Overwrite model `k`."""
        for name, tensor in {**self.params, **self.buffers}.items():
            tensor[k] = state[name].to(tensor.device, tensor.dtype)

    def fit(
        self,
        batch_streams: Sequence[BatchStream],
        *,
        epochs: int | Sequence[int],
        batch_size: int,
        optimizer: OptimizerSettings,
        streams: Sequence[Stream],
        numbers: Mapping[str, float | Tensor] | None = None,
        progress: Callable[[float], None] = lambda _: None,
    ) -> Fitted:
        """Train all models in place, with a fresh optimiser each.

        Args:
            batch_streams: an epoch runs over the first; every step draws a batch of each other as well.
            epochs: passes over the first stream's samples, one number for all models or one each.
            batch_size: B.
            optimizer: its settings; hyper-parameters that are tensors ``[K]`` are per client.
            streams: the random stream of each client.
            numbers: what terms read from ``step.numbers``, each a number or a tensor ``[K]``.
            progress: called after each step with the share of all steps that is done, 0..1.

        Returns:
            Losses and gradient norms of all models.

        Raises:
            FedkdError: nothing of the model can be trained, or a client has too few samples.
        """
        self.skeleton.train()
        smallest = smallest_batch(self.skeleton)
        self._check_fit(batch_streams, batch_size, smallest)
        epochs_by_model = [epochs] * len(self) if isinstance(epochs, int) else epochs
        steps = [
            count * steps_per_epoch(len(rows), batch_size, smallest)
            for count, rows in zip(epochs_by_model, batch_streams[0].rows, strict=True)
        ]
        order = sorted(range(len(self)), key=lambda k: -steps[k])
        count_steps = Progress(sum(steps), progress)
        blocks = self._blocks(order)

        def train(model: Stateless, clients: Sequence[int]) -> Fitted:
            block = Block(
                clients,
                torch.tensor(clients, device=self._device),
                [steps[k] for k in clients],
                [streams[k] for k in clients],
                batch_size,
                self.plan.stacked,
                self._dtype,
                smallest,
            )
            fit = BlockFit(model, self.params, self.buffers, batch_streams, block, self.precision)
            fitted = fit.train(optimizer, numbers or {}, count_steps)
            fit.write_back()
            return fitted

        with matrix_products(self.precision, self._device):
            parts = in_lanes(train, blocks, self.skeleton, self.plan.lanes)
        return concatenated_fits(parts, order)

    def _check_fit(
        self, batch_streams: Sequence[BatchStream], batch_size: int, smallest: int
    ) -> None:
        """Refuse a fit that cannot be done."""
        if not is_trainable(self.skeleton):
            raise FedkdError(f"{type(self.skeleton).__name__} has no parameters to train")
        if batch_size < smallest:
            raise FedkdError(f"batches of one sample: {BATCH_NORM_NEEDS_TWO}")
        for batch_stream in batch_streams:
            for k, rows in enumerate(batch_stream.rows):
                if len(rows) < smallest:
                    what = f"model {k} of the cohort has {len(rows) or 'no'} {batch_stream.name} samples"
                    raise FedkdError(f"{what}: {BATCH_NORM_NEEDS_TWO}" if len(rows) else what)
                if 0 < len(rows) % batch_size < smallest:
                    _say_left_out(type(self.skeleton).__name__)

    def predict(self, images: Images, rows: Tensor | None = None) -> Tensor:
        """Return logits ``[K, N, C]`` in evaluation mode for the images `rows` (default: all)."""
        return self._evaluated(images, rows, lambda logits: logits)

    def features(self, images: Images, rows: Tensor | None = None) -> Tensor:
        """Return the outputs of the models' bodies, ``[K, N, D]``, in evaluation mode.

        Raises:
            FedkdError: the model is not a body and a head.
        """
        return self._evaluated(images, rows, lambda features: features, Stateless.features)

    def classify(self, images: Images, rows: Tensor | None = None) -> Tensor:
        """Return predicted classes, int16 ``[K, N]``, without holding all logits at once."""
        # `argmax` itself is five times slower over few classes.
        return self._evaluated(images, rows, lambda z: z.max(-1).indices.to(torch.int16))

    def answer(self, images: Images) -> Classified:
        """Return the predicted classes of all images, and their probabilities."""

        def read(z: Tensor) -> Tensor:
            best = z.max(-1)
            confidences = (best.values - z.logsumexp(-1)).exp()
            return torch.stack([best.indices.to(z.dtype), confidences], -1)

        classes, confidences = self._evaluated(images, None, read).unbind(-1)
        return Classified(classes.to(torch.int16), confidences)

    @property
    def _device(self) -> torch.device:
        return self._example.device

    @property
    def _dtype(self) -> torch.dtype:
        return self._example.dtype

    def _blocks(self, clients: Sequence[int]) -> list[Sequence[int]]:
        """Return the clients in blocks, at least one block a lane if there are enough clients."""
        size = min(self.plan.block, -(-len(clients) // self.plan.lanes))
        return [clients[first : first + size] for first in range(0, len(clients), size)]

    @torch.no_grad()
    def _evaluated(
        self,
        images: Images,
        rows: Tensor | None,
        read: Callable[[Tensor], Tensor],
        forward: _Forward = Stateless.__call__,
    ) -> Tensor:
        """Return ``read(outputs)`` of outputs ``[block, n, C]``, concatenated over models and images."""
        self.skeleton.eval()
        size, stacked = IMAGES_AT_ONCE[self.plan.stacked], self.plan.stacked

        @torch.no_grad()
        def run(model: Stateless, clients: Sequence[int]) -> Tensor:
            block = slice(clients[0], clients[-1] + 1)
            params = {n: t[block] for n, t in self.params.items()}
            outputs = []
            for chunk in images.chunks(rows, size, channels_last=not stacked):
                # Copies: a model is not changed by being tested.
                buffers = {n: t[block].clone() for n, t in self.buffers.items()}
                output = self._outputs(partial(forward, model), {**params, **buffers}, chunk)
                outputs.append(read(output))
            return torch.cat(outputs, 1)

        blocks = self._blocks(range(len(self)))
        with matrix_products(self.precision, self._device):
            return torch.cat(in_lanes(run, blocks, self.skeleton, self.plan.lanes))

    def _outputs(
        self, forward: Callable[[State, Tensor], Tensor], state: State, images: Tensor
    ) -> Tensor:
        """Return the outputs ``[block, n, C]`` of a block of models for the same images."""

        def one(state: State) -> Tensor:
            with forward_pass(self.precision, self._device):
                output = forward(state, images)
            return output.to(self._dtype)

        if not self.plan.stacked:
            # A view, unlike indexing.
            return one({name: tensor.squeeze(0) for name, tensor in state.items()}).unsqueeze(0)
        count = len(images)
        images = _whole_vectors(images)
        with FeaturesFirst():
            outputs: Tensor = vmap(one)(state)
        return outputs[:, :count]


@cache
def _say_left_out(model: str) -> None:
    """Log once that batches are left out."""
    _logger.warning(
        "%s: last batches of one sample are left out, as %s", model, BATCH_NORM_NEEDS_TWO
    )


def _whole_vectors(batch: Tensor) -> Tensor:
    """Return a batch padded with its first image to a multiple of `VECTOR` images."""
    missing = -len(batch) % VECTOR
    return torch.cat([batch, batch[:1].expand(missing, *batch.shape[1:])]) if missing else batch
