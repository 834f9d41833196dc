"""A cohort: K models of one architecture, trained, distilled and evaluated side by side.

The only code in the project that trains, distils, predicts or evaluates. Parameters are stacked along
a leading client axis; a client's numbers depend on its own data and random streams, never on who
else is in the stack. How the models are run (all stacked through ``vmap``, or one by one) is a plan
and changes results only within floating-point tolerance.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from threading import Lock
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import vmap
from torch.nn.functional import pad

from fedkd.errors import FedkdError
from fedkd.images import Augment, Images
from fedkd.keyed import FeaturesFirst, KeyedMode, at_steps
from fedkd.lanes import in_lanes
from fedkd.losses import Step, Term
from fedkd.optimizers import OptimizerSettings, StackedOptimizer
from fedkd.plans import Plan
from fedkd.precision import Precision, forward_pass, matrix_products
from fedkd.profiling import part
from fedkd.randomness import key
from fedkd.schedule import Stream, schedule, steps_per_epoch
from fedkd.stateless import Stateless

State = dict[str, Tensor]
"""One model's parameters and buffers by name, without a client axis."""

_Forward = Callable[[Stateless, Mapping[str, Tensor], Tensor], Tensor]

VECTOR = 4
"""Widths of stacked batches are multiples of it: else a client's logits begin at odd addresses, and
matrix products round differently by where that is."""

NORM_EVERY = 8
"""Steps from one measurement of the gradient's norm to the next: a pass over all gradients costs time."""

IMAGES_AT_ONCE = {True: 1000, False: 250}
"""Images a forward pass without training takes, stacked or not: measured best on a CPU."""


@dataclass(frozen=True)
class Side:
    """One stream of batches of a fit: whose samples, with which soft labels, under which terms.

    Attributes:
        name: names the random stream (``"private"`` or ``"public"``).
        images: where the samples are.
        rows: int64 indices into `images`, one tensor a client.
        terms: coefficients by term, each a number or a tensor ``[K]``.
        teacher_logits: ``[1, N, C]`` (the same for all) or ``[K, N, C]`` (or as many as `taught_by`
            names), in the order of `rows`; N is that of the client with most samples.
        taught_by: which of the `teacher_logits` each client learns from, int64 ``[K]``; default: the only
            one, or client k from the k-th.
        augment: how images are changed as they are drawn.
        class_means: ``[1, C, D]`` or ``[K, C, D]``, for terms that ask for them.
        class_counts: ``[1, C]`` or ``[K, C]``, images behind them.
        labels: what each client takes for the labels of its `rows`, int64; default: those of `images`.
    """

    name: str
    images: Images
    rows: Sequence[Tensor]
    terms: Mapping[Term, float | Tensor]
    teacher_logits: Tensor | None = None
    taught_by: Tensor | None = None
    augment: Augment = "none"
    class_means: Tensor | None = None
    class_counts: Tensor | None = None
    labels: Sequence[Tensor] | None = None


class Answers(NamedTuple):
    """What K models say of N images: classes int16 ``[K, N]``, and their probabilities ``[K, N]``."""

    classes: Tensor
    confidences: Tensor


@dataclass(frozen=True, eq=False)
class Fitted:
    """How training went, of K models that took up to T steps.

    Attributes:
        losses: ``[K]``, each model's mean training loss over its steps.
        gradient_norms: ``[K]``, the Euclidean norm of the gradient of all trained parameters, mean over
            every `NORM_EVERY`-th step.
        loss_by_step: ``[K, T]``, NaN past a model's last step.
        gradient_norm_by_step: ``[K, ⌈T / NORM_EVERY⌉]``, likewise.
    """

    losses: Tensor
    gradient_norms: Tensor
    loss_by_step: Tensor
    gradient_norm_by_step: Tensor


@dataclass
class Cohort:
    """K models of one architecture.

    Attributes:
        skeleton: the module whose structure all share; its own parameters are not used.
        params: ``[K, ...]`` by name.
        buffers: ``[K, ...]`` by name.
        plan: how they are run.
        precision: number format of the forward and backward passes.
    """

    skeleton: nn.Module
    params: State
    buffers: State
    plan: Plan = field(default_factory=lambda: Plan(stacked=False))
    precision: Precision = "float32"

    @classmethod
    def of(cls, skeleton: nn.Module, states: Sequence[State], plan: Plan) -> Cohort:
        """Stack models from their states."""
        return cls.over(skeleton, stacked(states), plan)

    @classmethod
    def over(
        cls,
        skeleton: nn.Module,
        stack: State,
        plan: Plan,
        precision: Precision = "float32",
    ) -> Cohort:
        """Make a cohort that trains the tensors of a stack, ``[K, ...]`` by name, in place."""
        params = {n: stack[n] for n, _ in skeleton.named_parameters()}
        buffers = {n: stack[n] for n, _ in skeleton.named_buffers()}
        return cls(skeleton, params, buffers, plan, precision)

    def __len__(self) -> int:
        return len(next(iter(self.params.values())))

    def state(self, k: int) -> State:
        """Copy model `k` out of the stack."""
        return {n: t[k].clone() for n, t in {**self.params, **self.buffers}.items()}

    def only(self, k: int) -> Cohort:
        """Return model `k` as a cohort of its own, which shares its tensors with this one."""
        params = {name: tensor[k : k + 1] for name, tensor in self.params.items()}
        buffers = {name: tensor[k : k + 1] for name, tensor in self.buffers.items()}
        return replace(self, params=params, buffers=buffers)

    def load(self, k: int, state: Mapping[str, Tensor]) -> None:
        """Overwrite model `k`."""
        for name, tensor in {**self.params, **self.buffers}.items():
            tensor[k] = state[name].to(tensor.device, tensor.dtype)

    def fit(
        self,
        sides: Sequence[Side],
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
            sides: an epoch runs over the first; every step draws a batch of each other side as well.
            epochs: passes over the first side's samples, of all models or of each.
            batch_size: B.
            optimizer: which one, with hyper-parameters per client where they are tensors ``[K]``.
            streams: the random stream of each client.
            numbers: what terms read from ``step.numbers``, each a number or a tensor ``[K]``.
            progress: told the share of all steps that is done, 0..1, after each.

        Raises:
            FedkdError: a client has no samples.
        """
        self.skeleton.train()
        passes = [epochs] * len(self) if isinstance(epochs, int) else epochs
        steps = [
            count * steps_per_epoch(len(rows), batch_size)
            for count, rows in zip(passes, sides[0].rows, strict=True)
        ]
        for side in sides:
            empty = [k for k, rows in enumerate(side.rows) if not len(rows)]
            if empty:
                raise FedkdError(f"model {empty[0]} of the cohort has no {side.name} samples")
        order = sorted(range(len(self)), key=lambda k: -steps[k])
        ticked = _Progress(sum(steps), progress)
        blocks = self._blocks(order)

        def train(model: Stateless, clients: Sequence[int]) -> Fitted:
            taken = [steps[k] for k in clients]
            block = _Block(self, model, clients, sides, batch_size, streams, taken)
            fitted = block.train(optimizer, numbers or {}, ticked)
            block.write_back()
            return fitted

        with matrix_products(self.precision, self._device):
            parts = in_lanes(train, blocks, self.skeleton, self.plan.lanes)
        return _joined(parts, order)

    def predict(self, images: Images, rows: Tensor | None = None) -> Tensor:
        """Return logits ``[K, N, C]`` in evaluation mode for the images `rows` (default: all)."""
        return self._evaluated(images, rows, lambda logits: logits)

    def features(self, images: Images, rows: Tensor | None = None) -> Tensor:
        """Return what the models' bodies give, ``[K, N, D]``, in evaluation mode.

        Raises:
            FedkdError: the model is not a body and a head.
        """
        return self._evaluated(images, rows, lambda features: features, Stateless.features)

    def classify(self, images: Images, rows: Tensor | None = None) -> Tensor:
        """Return predicted classes, int16 ``[K, N]``, without holding all logits at once."""
        # `argmax` itself is five times slower over few classes.
        return self._evaluated(images, rows, lambda z: z.max(-1).indices.to(torch.int16))

    def answer(self, images: Images) -> Answers:
        """Return the predicted classes of all images, and how sure the models are of them."""

        def read(z: Tensor) -> Tensor:
            best = z.max(-1)
            confidences = (best.values - z.logsumexp(-1)).exp()
            return torch.stack([best.indices.to(z.dtype), confidences], -1)

        classes, confidences = self._evaluated(images, None, read).unbind(-1)
        return Answers(classes.to(torch.int16), confidences)

    @property
    def _device(self) -> torch.device:
        return next(iter(self.params.values())).device

    @property
    def _dtype(self) -> torch.dtype:
        return next(iter(self.params.values())).dtype

    def _blocks(self, clients: Sequence[int]) -> list[Sequence[int]]:
        """Deal clients into blocks, at least one a lane where there are enough of them."""
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
        """Return what `read` makes of the outputs ``[block, n, C]``, joined over models and images."""
        self.skeleton.eval()
        size, stacked = IMAGES_AT_ONCE[self.plan.stacked], self.plan.stacked

        @torch.no_grad()
        def run(model: Stateless, clients: Sequence[int]) -> Tensor:
            block = slice(clients[0], clients[-1] + 1)
            state = {n: t[block] for n, t in {**self.params, **self.buffers}.items()}
            chunks = images.chunks(rows, size, channels_last=not stacked)
            outputs = (self._outputs(partial(forward, model), state, chunk) for chunk in chunks)
            return torch.cat([read(output) for output in outputs], 1)

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


def _whole_vectors(batch: Tensor) -> Tensor:
    """Repeat the first image until the batch's width is a multiple of `VECTOR`."""
    missing = -len(batch) % VECTOR
    return torch.cat([batch, batch[:1].expand(missing, *batch.shape[1:])]) if missing else batch


def stacked(states: Sequence[State]) -> State:
    """Stack the states of K models, ``[K, ...]`` by name."""
    return {name: torch.stack([state[name] for state in states]) for name in states[0]}


def initial_state(build: Callable[[], nn.Module], *parts: int | str) -> State:
    """Return a new model's state with weights drawn from the stream named by `parts`.

    PyTorch's initialisers draw from the global generator, which is restored afterwards.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(key(*parts))
        model = build()
    named = [*model.named_parameters(), *model.named_buffers()]
    return {n: t.detach().clone() for n, t in named}


_Inputs = tuple[State, ...]
"""Of a step: parameters, buffers, parameters at the start, numbers, and a batch for each side."""


def _flat(inputs: _Inputs) -> list[Tensor]:
    return [tensor for tree in inputs for tensor in tree.values()]


def _trees(names: Sequence[Sequence[str]], tensors: Sequence[Tensor]) -> list[State]:
    left = iter(tensors)
    return [{name: next(left) for name in tree} for tree in names]


class _Progress:
    """Tells the share of all steps that is done, whichever lane does them."""

    def __init__(self, total: int, told: Callable[[float], None]) -> None:
        self._done, self._total, self._told = 0, total, told
        self._lock = Lock()

    def __call__(self, steps: int) -> None:
        with self._lock:
            self._done += steps
            self._told(self._done / self._total)


class _Trace:
    """Losses and gradient norms of a block on its way.

    Args:
        steps: of each model, the most first.
    """

    def __init__(self, steps: Sequence[int], dtype: torch.dtype, device: torch.device) -> None:
        shape = (len(steps), steps[0])
        self._steps = torch.tensor(steps, device=device)
        self._losses = torch.full(shape, torch.nan, dtype=dtype, device=device)
        self._norms = torch.full_like(self._losses[:, ::NORM_EVERY], torch.nan)
        # Summed as they come: a sum over a padded axis would round by how long that is.
        self._loss = torch.zeros(len(steps), dtype=dtype, device=device)
        self._norm = torch.zeros_like(self._loss)

    def add(self, tick: int, losses: Tensor, grads: Sequence[Tensor | None]) -> None:
        """Take in a step of the first models: losses ``[active]`` and gradients ``[active, ...]``."""
        active = len(losses)
        self._losses[:active, tick] = losses
        self._loss[:active] += losses
        if tick % NORM_EVERY == 0:
            norms = _norms([grad for grad in grads if grad is not None])
            self._norms[:active, tick // NORM_EVERY] = norms
            self._norm[:active] += norms

    def fitted(self) -> Fitted:
        """Return what came of it."""
        measured = -(-self._steps // NORM_EVERY)
        return Fitted(self._loss / self._steps, self._norm / measured, self._losses, self._norms)


def _norms(grads: Sequence[Tensor]) -> Tensor:
    """Return the Euclidean norm ``[active]`` of each model's gradient, ``[active, ...]`` by parameter."""
    norms = torch.zeros_like(grads[0].reshape(len(grads[0]), -1)[:, 0])
    for grad in grads:
        # Contiguous, as the order in which numbers are added is theirs in memory.
        rows = grad.contiguous().view(len(grad), -1)
        norms = torch.hypot(norms, torch.linalg.vector_norm(rows, dim=1))
    return norms


def _joined(parts: Sequence[Fitted], order: Sequence[int]) -> Fitted:
    """Join blocks of models that stand in `order`, the one with most steps first."""
    place = torch.tensor(order).argsort().to(parts[0].losses.device)

    def joined(name: str) -> Tensor:
        tensors = [getattr(part, name) for part in parts]
        if tensors[0].ndim > 1:
            width = tensors[0].shape[1]
            tensors = [pad(t, (0, width - t.shape[1]), value=torch.nan) for t in tensors]
        return torch.cat(tensors)[place]

    return Fitted(**{each.name: joined(each.name) for each in fields(Fitted)})


class _Block:
    """Some clients of a cohort through one fit: a copy of their rows, sorted by steps to take."""

    def __init__(
        self,
        cohort: Cohort,
        model: Stateless,
        clients: Sequence[int],
        sides: Sequence[Side],
        batch_size: int,
        streams: Sequence[Stream],
        steps: Sequence[int],
    ) -> None:
        self._model = model
        self.index = torch.tensor(clients, device=cohort._device)
        self._cohort = cohort
        self._steps = list(steps)
        self._params = {n: p[self.index] for n, p in cohort.params.items()}
        self._buffers = {n: b[self.index] for n, b in cohort.buffers.items()}
        self._start = self._starting_point(sides)
        self._trained = [n for n, p in model.module.named_parameters() if p.requires_grad]
        self._values: State = {}
        self._sides = [
            _BlockSide(side, clients, self.index, steps, batch_size, streams, cohort)
            for side in sides
        ]

    def _starting_point(self, sides: Sequence[Side]) -> State:
        if any(term.needs_start for side in sides for term in side.terms):
            return {n: p.clone() for n, p in self._params.items()}
        return {}

    def train(
        self,
        optimizer: OptimizerSettings,
        numbers: Mapping[str, float | Tensor],
        ticked: Callable[[int], None],
    ) -> Fitted:
        """Run every step."""
        dtype, device = self._cohort._dtype, self.index.device
        self._values = {n: _spread(v, self.index, dtype) for n, v in numbers.items()}
        stepper = StackedOptimizer(
            [self._params[n] for n in self._trained],
            optimizer.rows(self.index),
            alone=not self._cohort.plan.stacked,
        )
        trace = _Trace(self._steps, dtype, device)
        for tick in range(self._steps[0]):
            active = sum(steps > tick for steps in self._steps)
            inputs = self._inputs(tick, active)
            losses, grads = self._computed(inputs, watch=tick == 0)
            trace.add(tick, losses, grads)
            with part("optimizer"):
                stepper.step(grads, active)
            ticked(active)
        return trace.fitted()

    def _inputs(self, tick: int, active: int) -> _Inputs:
        """Return all that the losses of a step depend on."""
        with part("data"):
            batches = [side.batch(tick, active) for side in self._sides]
        return (
            {n: p[:active] for n, p in self._params.items()},
            {n: b[:active] for n, b in self._buffers.items()},
            {n: p[:active] for n, p in self._start.items()},
            {n: v[:active] for n, v in self._values.items()},
            *batches,
        )

    def _computed(self, inputs: _Inputs, watch: bool) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        """Return the losses ``[active]`` and the gradients of what is trained."""
        with part("forward"):
            params = {n: p.detach() for n, p in inputs[0].items()}
            leaves = [params[n].requires_grad_() for n in self._trained]
            losses = self._losses((params, *inputs[1:]), watch)
        with part("backward"):
            return losses.detach(), torch.autograd.grad(losses.sum(), leaves, allow_unused=True)

    def _losses(self, inputs: _Inputs, watch: bool) -> Tensor:
        # As one flat list: `vmap` would take the dictionaries apart and join them at every step.
        names = [list(tree) for tree in inputs]

        def one_client(*tensors: Tensor) -> Tensor:
            return self._client_loss(watch, *_trees(names, tensors))

        if self._cohort.plan.stacked:
            losses: Tensor = vmap(one_client)(*_flat(inputs))
            return losses
        return one_client(*(tensor.squeeze(0) for tensor in _flat(inputs))).unsqueeze(0)

    def _client_loss(
        self,
        watch: bool,
        params: State,
        buffers: State,
        start: State,
        numbers: State,
        *batches: State,
    ) -> Tensor:
        total = next(iter(params.values())).new_zeros(())
        for side, batch in zip(self._sides, batches, strict=True):
            with (
                KeyedMode(batch["key"], batch.get("real"), watch=watch),
                forward_pass(self._cohort.precision, self.index.device),
            ):
                logits, features = self._forward(side, {**params, **buffers}, batch["images"])
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
            )
            for i, term in enumerate(side.terms):
                value: object = term(step)
                if not isinstance(value, Tensor):
                    kind = type(value).__name__
                    raise FedkdError(f"{term.reference} returns a {kind}: must be a tensor")
                if value.shape not in ((), step.labels.shape):
                    raise FedkdError(
                        f"{term.reference} returns shape {tuple(value.shape)}: must be "
                        f"{tuple(step.labels.shape)} (a value a sample), or () (added as it is)"
                    )
                mean = (value * batch["weights"]).sum() if value.ndim else value
                total = total + batch[f"coefficient {i}"] * mean
        return total

    def _forward(
        self, side: _BlockSide, state: State, images: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Return the logits, and the features if a term wants them."""
        dtype = self._cohort._dtype
        if not any(term.needs_features for term in side.terms):
            return self._model(state, images).to(dtype), None
        features = self._model.features(state, images)
        return self._model.head(state, features).to(dtype), features.to(dtype)

    def write_back(self) -> None:
        """Put the trained rows back into the cohort."""
        for mine, whole in (
            (self._params, self._cohort.params),
            (self._buffers, self._cohort.buffers),
        ):
            for name, tensor in mine.items():
                whole[name][self.index] = tensor


class _BlockSide:
    """One side of a fit for the clients of a block: what they see at each step.

    All that does not depend on the model is made for all steps at once, so that a step costs a gather.
    """

    def __init__(
        self,
        side: Side,
        clients: Sequence[int],
        index: Tensor,
        steps: Sequence[int],
        batch_size: int,
        streams: Sequence[Stream],
        cohort: Cohort,
    ) -> None:
        device, dtype = index.device, cohort._dtype
        self._images = side.images
        self._augment: Augment = side.augment
        self._stacked = cohort.plan.stacked
        rows = [side.rows[k].to(device) for k in clients]
        drawn = schedule(
            [len(r) for r in rows], steps, batch_size, [(*streams[k], side.name) for k in clients]
        ).padded(-(-batch_size // VECTOR) * VECTOR if self._stacked else batch_size)
        drawn = drawn.to(device, dtype)
        self._positions, self._weights, self._sizes = drawn.positions, drawn.weights, drawn.sizes
        padded = nn.utils.rnn.pad_sequence(rows, batch_first=True)
        self._rows = padded.gather(1, drawn.positions.flatten(1)).view_as(drawn.positions)
        self._real = drawn.weights > 0
        labels = side.images.labels
        self._labels = torch.zeros_like(self._rows) if labels is None else labels[self._rows]
        if side.labels is not None:
            own = [side.labels[k].to(device) for k in clients]
            padded = nn.utils.rnn.pad_sequence(own, batch_first=True)
            self._labels = padded.gather(1, drawn.positions.flatten(1)).view_as(drawn.positions)
        self._teacher_logits = side.teacher_logits
        several = side.teacher_logits is not None and len(side.teacher_logits) > 1
        taught_by = index if side.taught_by is None else side.taught_by.to(device)[index]
        self._owner = taught_by if several else None
        keys = [key(*streams[k], side.name, "step") for k in clients]
        self._keys = at_steps(torch.tensor(keys, device=device), max(steps))
        means = {"class_means": side.class_means, "class_counts": side.class_counts}
        self._constant = {
            name: _own(tensor.to(device, dtype), index)
            for name, tensor in means.items()
            if tensor is not None
        }
        self.terms = list(side.terms)
        self._coefficients = {
            f"coefficient {i}": _spread(value, index, dtype)
            for i, value in enumerate(side.terms.values())
        }

    def batch(self, tick: int, active: int) -> dict[str, Tensor]:
        """Return the batch of step `tick` for the first `active` clients.

        One client at a time sees no padding: it is cut off instead of masked.
        """
        width = None if self._stacked else int(self._sizes[0, tick])
        now = (slice(active), tick, slice(width))
        keys = self._keys[:active, tick]
        batch = {
            "images": self._images.batches(
                self._rows[now], self._augment, keys, channels_last=not self._stacked
            ),
            "labels": self._labels[now],
            "weights": self._weights[now],
            "key": keys,
            **{
                name: value[:active]
                for name, value in {**self._coefficients, **self._constant}.items()
            },
        }
        if self._stacked:
            batch["real"] = self._real[now]
        if self._teacher_logits is not None:
            batch["teacher_logits"] = self._taught(self._positions[now])
        return batch

    def _taught(self, positions: Tensor) -> Tensor:
        """Return the received logits ``[active, B, C]`` of these samples."""
        assert self._teacher_logits is not None
        if self._owner is None:
            shared = self._teacher_logits[0].index_select(0, positions.flatten())
            return shared.view(*positions.shape, -1)
        return self._teacher_logits[self._owner[: len(positions), None], positions]


def _own(tensor: Tensor, index: Tensor) -> Tensor:
    """Give each client of a block its row of ``[K, ...]``, or the only one of ``[1, ...]``."""
    return tensor[index] if len(tensor) > 1 else tensor.expand(len(index), *tensor.shape[1:])


def _spread(value: float | Tensor, index: Tensor, dtype: torch.dtype) -> Tensor:
    """Give each client of a block its own value of a number or of a tensor ``[K]``."""
    tensor = torch.as_tensor(value, dtype=dtype, device=index.device)
    return tensor[index] if tensor.ndim else tensor.expand(len(index))
