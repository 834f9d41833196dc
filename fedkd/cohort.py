"""A cohort: K models of one architecture, trained, distilled and evaluated side by side.

The only code in the project that trains, distils, predicts or evaluates. Parameters are stacked along
a leading client axis; a client's numbers depend on its own data and random streams, never on who
else is in the stack. How the models are run (all stacked through ``vmap``, or one by one) is a plan
and changes results only within floating-point tolerance.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.utils._pytree import tree_map

from fedkd.errors import FedkdError
from fedkd.images import Augment, Images
from fedkd.keyed import KeyedMode, at_step, mix
from fedkd.losses import Step, Term
from fedkd.optimizers import OptimizerSettings, StackedOptimizer
from fedkd.randomness import key
from fedkd.references import in_one_line
from fedkd.schedule import Schedule, Stream, schedule, steps_per_epoch

T = TypeVar("T")
PlanName = Literal["auto", "stacked", "loop"]

_logger = logging.getLogger(__name__)

State = dict[str, Tensor]
"""One model's parameters and buffers by name, without a client axis."""

IMAGES_AT_ONCE = 1000
"""Images a forward pass without training takes: measured best for small dense nets on a CPU."""


@dataclass(frozen=True)
class Plan:
    """How the models of a cohort are run.

    Attributes:
        stacked: through ``vmap``, K = 1 included (so that a client's bits do not depend on K), or
            one by one.
        block: models stepped at once; 1 unless stacked.
    """

    stacked: bool
    block: int = 1

    def __post_init__(self) -> None:
        if self.block != 1 and not self.stacked:
            raise ValueError(f"block = {self.block}: models that run one by one make blocks of 1")


def choose_plan(model: nn.Module, example: Tensor, wanted: PlanName = "auto") -> Plan:
    """Choose how to run models like `model`.

    Stacking turns convolutions into grouped ones, which lose on a CPU; small dense nets gain
    everywhere. Blocks are bounded because temporaries that outgrow the heap page-fault.

    Args:
        model: on the device.
        example: two images, to try whether ``vmap`` takes the model.
        wanted: ``"auto"``, or the plan to take.
    """
    on_cpu = example.device.type == "cpu"
    stacked = wanted == "stacked"
    if wanted == "auto":
        convolves = any(isinstance(m, nn.Conv1d | nn.Conv2d | nn.Conv3d) for m in model.modules())
        stacked = not (convolves and on_cpu) and _maps(model, example)
    if not stacked:
        return Plan(stacked=False)
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    most, budget = (100, 8 << 20) if on_cpu else (1000, 4 << 30)
    return Plan(stacked=True, block=max(1, min(most, budget // max(size, 1))))


def _maps(model: nn.Module, example: Tensor) -> bool:
    """Try whether two copies of the model run side by side; say which operation refuses."""
    states: list[State] = [dict(model.named_parameters()), dict(model.named_buffers())]
    stacked = [{n: t.detach().expand(2, *t.shape) for n, t in state.items()} for state in states]
    training = model.training
    model.eval()
    try:
        vmap(lambda p, b: functional_call(model, (p, b), (example,), strict=True))(*stacked)
    except RuntimeError as error:
        _logger.warning("run one by one, as vmap refuses the model: %s", in_one_line(error))
        return False
    finally:
        model.train(training)
    return True


@dataclass(frozen=True)
class Side:
    """One stream of batches of a fit: whose samples, with which soft labels, under which terms.

    Attributes:
        name: names the random stream (``"private"`` or ``"public"``).
        images: where the samples are.
        rows: int64 indices into `images`, one tensor a client.
        terms: coefficients by term, each a number or a tensor ``[K]``.
        teacher_logits: ``[1, N, C]`` (the same for all) or ``[K, N, C]``, in the order of `rows`.
        augment: how images are changed as they are drawn.
    """

    name: str
    images: Images
    rows: Sequence[Tensor]
    terms: Mapping[Term, float | Tensor]
    teacher_logits: Tensor | None = None
    augment: Augment = "none"


@dataclass
class Cohort:
    """K models of one architecture.

    Attributes:
        skeleton: the module whose structure all share; its own parameters are not used.
        params: ``[K, ...]`` by name.
        buffers: ``[K, ...]`` by name.
        plan: how they are run.
    """

    skeleton: nn.Module
    params: State
    buffers: State
    plan: Plan = field(default_factory=lambda: Plan(stacked=False))

    @classmethod
    def of(cls, skeleton: nn.Module, states: Sequence[State], plan: Plan) -> Cohort:
        """Stack models from their states."""
        params = {n: torch.stack([s[n] for s in states]) for n, _ in skeleton.named_parameters()}
        buffers = {n: torch.stack([s[n] for s in states]) for n, _ in skeleton.named_buffers()}
        return cls(skeleton, params, buffers, plan)

    def __len__(self) -> int:
        return len(next(iter(self.params.values())))

    def state(self, k: int) -> State:
        """Copy model `k` out of the stack."""
        return {n: t[k].clone() for n, t in {**self.params, **self.buffers}.items()}

    def load(self, k: int, state: Mapping[str, Tensor]) -> None:
        """Overwrite model `k`."""
        for name, tensor in {**self.params, **self.buffers}.items():
            tensor[k] = state[name].to(tensor.device, tensor.dtype)

    def fit(
        self,
        sides: Sequence[Side],
        *,
        epochs: int,
        batch_size: int,
        optimizer: OptimizerSettings,
        streams: Sequence[Stream],
        numbers: Mapping[str, float | Tensor] | None = None,
        progress: Callable[[float], None] = lambda _: None,
    ) -> Tensor:
        """Train all models in place, with a fresh optimiser each.

        Args:
            sides: an epoch runs over the first; every step draws a batch of each other side as well.
            epochs: passes over the first side's samples.
            batch_size: B.
            optimizer: which one, with hyper-parameters per client where they are tensors ``[K]``.
            streams: the random stream of each client.
            numbers: what terms read from ``step.numbers``, each a number or a tensor ``[K]``.
            progress: told the share of all steps that is done, 0..1, after each.

        Returns:
            ``[K]``, each client's mean training loss over its steps.

        Raises:
            FedkdError: a client has no samples.
        """
        self.skeleton.train()
        steps = [epochs * steps_per_epoch(len(rows), batch_size) for rows in sides[0].rows]
        for side in sides:
            empty = [k for k, rows in enumerate(side.rows) if not len(rows)]
            if empty:
                raise FedkdError(f"model {empty[0]} of the cohort has no {side.name} samples")
        order = sorted(range(len(self)), key=lambda k: -steps[k])
        losses = torch.zeros(len(self), dtype=self._dtype, device=self._device)
        done = 0

        def tick(active: int) -> None:
            nonlocal done
            done += active
            progress(done / sum(steps))

        for first in range(0, len(order), self.plan.block):
            clients = order[first : first + self.plan.block]
            block = _Block(self, clients, sides, batch_size, streams, [steps[k] for k in clients])
            losses[block.index] = block.train(optimizer, numbers or {}, tick)
            block.write_back()
        return losses

    def predict(self, images: Images, rows: Tensor | None = None) -> Tensor:
        """Return logits ``[K, N, C]`` in evaluation mode for the images `rows` (default: all)."""
        chunks = [torch.cat(list(chunk)) for chunk in self._logits(images, rows)]
        return torch.cat(chunks, dim=1)

    def classify(self, images: Images, rows: Tensor | None = None) -> Tensor:
        """Return predicted classes, int16 ``[K, N]``, without holding all logits at once."""
        chunks = [
            torch.cat([logits.argmax(-1).to(torch.int16) for logits in chunk])
            for chunk in self._logits(images, rows)
        ]
        return torch.cat(chunks, dim=1)

    @property
    def _device(self) -> torch.device:
        return next(iter(self.params.values())).device

    @property
    def _dtype(self) -> torch.dtype:
        return next(iter(self.params.values())).dtype

    def _logits(self, images: Images, rows: Tensor | None) -> Iterator[Iterator[Tensor]]:
        """Yield, chunk of images by chunk, the logits ``[block, n, C]`` of block after block."""
        self.skeleton.eval()
        wanted = torch.arange(len(images)) if rows is None else rows
        for chunk in wanted.to(images.device).split(IMAGES_AT_ONCE):
            yield self._blocks_of_logits(images.batch(chunk))

    @torch.no_grad()
    def _blocks_of_logits(self, batch: Tensor) -> Iterator[Tensor]:
        for first in range(0, len(self), self.plan.block):
            block = slice(first, first + self.plan.block)
            params = {n: p[block] for n, p in self.params.items()}
            buffers = {n: b[block] for n, b in self.buffers.items()}
            if self.plan.stacked:
                yield vmap(self._eval_forward, in_dims=(0, 0, None))(params, buffers, batch)
            else:
                one = self._eval_forward(_squeezed(params), _squeezed(buffers), batch)
                yield one.unsqueeze(0)

    def _eval_forward(self, params: State, buffers: State, images: Tensor) -> Tensor:
        logits: Tensor = functional_call(self.skeleton, (params, buffers), (images,), strict=True)
        return logits


def initial_state(build: Callable[[], nn.Module], *parts: int | str) -> State:
    """Return a new model's state with weights drawn from the stream named by `parts`.

    PyTorch's initialisers draw from the global generator, which is restored afterwards.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(key(*parts))
        model = build()
    named = [*model.named_parameters(), *model.named_buffers()]
    return {n: t.detach().clone() for n, t in named}


class _Block:
    """Some clients of a cohort through one fit: a copy of their rows, sorted by steps to take."""

    def __init__(
        self,
        cohort: Cohort,
        clients: Sequence[int],
        sides: Sequence[Side],
        batch_size: int,
        streams: Sequence[Stream],
        steps: Sequence[int],
    ) -> None:
        self.index = torch.tensor(clients, device=cohort._device)
        self._cohort = cohort
        self._steps = list(steps)
        self._params = {n: p[self.index] for n, p in cohort.params.items()}
        self._buffers = {n: b[self.index] for n, b in cohort.buffers.items()}
        self._start = self._starting_point(sides)
        self._sides = [
            _BlockSide(side, clients, self.index, steps, batch_size, streams, cohort._dtype)
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
    ) -> Tensor:
        """Run every step and return the mean loss ``[block]``."""
        skeleton = self._cohort.skeleton
        trained = [n for n, p in skeleton.named_parameters() if p.requires_grad]
        stepper = StackedOptimizer([self._params[n] for n in trained], optimizer.rows(self.index))
        dtype = self._cohort._dtype
        values = {n: _spread(v, self.index, dtype) for n, v in numbers.items()}
        total = torch.zeros(len(self._steps), dtype=dtype, device=self.index.device)
        for tick in range(self._steps[0]):
            active = sum(steps > tick for steps in self._steps)
            params = {n: p[:active].detach() for n, p in self._params.items()}
            leaves = [params[n].requires_grad_() for n in trained]
            losses = self._losses(tick, active, params, values)
            grads = torch.autograd.grad(losses.sum(), leaves, allow_unused=True)
            total[:active] += losses.detach()
            del losses
            stepper.step(grads, active)
            ticked(active)
        return total / torch.tensor(self._steps, dtype=dtype, device=total.device)

    def _losses(self, tick: int, active: int, leaves: State, values: State) -> Tensor:
        stacked = self._cohort.plan.stacked
        inputs = (
            leaves,
            {n: b[:active] for n, b in self._buffers.items()},
            {n: p[:active] for n, p in self._start.items()},
            [side.batch(tick, active, trim=not stacked) for side in self._sides],
            {n: v[:active] for n, v in values.items()},
        )
        if stacked:
            losses: Tensor = vmap(self._client_loss)(*inputs)
            return losses
        return self._client_loss(*_squeezed(inputs)).unsqueeze(0)

    def _client_loss(
        self,
        params: State,
        buffers: State,
        start: State,
        batches: Sequence[Mapping[str, Tensor]],
        numbers: Mapping[str, Tensor],
    ) -> Tensor:
        total = next(iter(params.values())).new_zeros(())
        for side, batch in zip(self._sides, batches, strict=True):
            real = batch["weights"] > 0 if self._cohort.plan.stacked else None
            with KeyedMode(batch["dropout_key"], real):
                logits = functional_call(
                    self._cohort.skeleton, (params, buffers), (batch["images"],), strict=True
                )
            teacher_logits = batch.get("teacher_logits")
            step = Step(logits, batch["labels"], teacher_logits, params, start, numbers)
            for i, term in enumerate(side.terms):
                value = term(step)
                mean = (value * batch["weights"]).sum() if value.ndim else value
                total = total + batch[f"coefficient {i}"] * mean
        return total

    def write_back(self) -> None:
        """Put the trained rows back into the cohort."""
        for mine, whole in (
            (self._params, self._cohort.params),
            (self._buffers, self._cohort.buffers),
        ):
            for name, tensor in mine.items():
                whole[name][self.index] = tensor


class _BlockSide:
    """One side of a fit for the clients of a block: what they see at each step."""

    def __init__(
        self,
        side: Side,
        clients: Sequence[int],
        index: Tensor,
        steps: Sequence[int],
        batch_size: int,
        streams: Sequence[Stream],
        dtype: torch.dtype,
    ) -> None:
        device = index.device
        self._images = side.images
        self._augment: Augment = side.augment
        rows = [side.rows[k].to(device) for k in clients]
        drawn = schedule(
            [len(r) for r in rows], steps, batch_size, [(*streams[k], side.name) for k in clients]
        )
        self._schedule: Schedule = drawn.to(device, dtype)
        self._rows = nn.utils.rnn.pad_sequence(rows, batch_first=True)
        self._teacher_logits = side.teacher_logits
        self._owner = (
            index if side.teacher_logits is not None and len(side.teacher_logits) > 1 else None
        )
        keys = [key(*streams[k], side.name, "step") for k in clients]
        self._keys = torch.tensor(keys, device=device)
        self.terms = list(side.terms)
        self._coefficients = {
            f"coefficient {i}": _spread(value, index, dtype)
            for i, value in enumerate(side.terms.values())
        }

    def batch(self, tick: int, active: int, trim: bool) -> dict[str, Tensor]:
        """Return the batch of step `tick` for the first `active` clients.

        With `trim` (one client at a time) padding is cut off instead of masked.
        """
        positions = self._schedule.positions[:active, tick]
        weights = self._schedule.weights[:active, tick]
        if trim:
            real = int(self._schedule.sizes[0, tick])
            positions, weights = positions[:, :real], weights[:, :real]
        rows = self._rows[:active].gather(1, positions)
        step_keys = at_step(self._keys[:active], tick)
        labels = self._images.labels
        batch = {
            "images": self._images.augmented(rows, self._augment, mix(step_keys)),
            "labels": torch.zeros_like(rows) if labels is None else labels[rows],
            "weights": weights,
            "dropout_key": step_keys,
            **{name: value[:active] for name, value in self._coefficients.items()},
        }
        if self._teacher_logits is not None:
            owner = 0 if self._owner is None else self._owner[:active, None]
            batch["teacher_logits"] = self._teacher_logits[owner, positions]
        return batch


def _spread(value: float | Tensor, index: Tensor, dtype: torch.dtype) -> Tensor:
    """Give each client of a block its own value of a number or of a tensor ``[K]``."""
    tensor = torch.as_tensor(value, dtype=dtype, device=index.device)
    return tensor[index] if tensor.ndim else tensor.expand(len(index))


def _squeezed(tree: T) -> T:
    """Take the client axis of length 1 off every tensor (a view, unlike indexing)."""
    squeezed: T = tree_map(lambda t: t.squeeze(0), tree)
    return squeezed
