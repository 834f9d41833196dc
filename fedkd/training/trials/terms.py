"""Try a loss term of a user before a run: stacked, one by one and padded it must give the same."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import vmap

from fedkd.errors import FedkdError, one_line
from fedkd.knowledge import Output
from fedkd.losses import Step, Term
from fedkd.training.parameters import State
from fedkd.user_code import user_location

CLIENTS, SAMPLES, WIDTH = 3, 5, 8
"""Three clients of five samples each, padded to eight."""

_Fields = dict[str, Any]
"""Fields of a `Step`; with a leading client axis where it says so."""


class _Outcome(NamedTuple):
    """Losses, and the gradients of their sum."""

    value: Tensor
    grads: list[Tensor]


def try_term(
    term: Term,
    model: nn.Module,
    state: State,
    num_classes: int,
    numbers: Mapping[str, float],
    outputs: Container[Output] = (),
) -> None:
    """Try a term on random batches in float64, of five samples, two and one.

    Args:
        term: of a user.
        model: whose parameters are trained.
        state: its weights.
        num_classes: C.
        numbers: what it reads from ``step.numbers``, besides ``tau``.
        outputs: what the class means are of, for a term that needs them.

    Raises:
        FedkdError: it does not return one value a sample or one number, these or their gradients are not
            finite, or they depend on other clients, on padding or on the call; the text says which.
    """
    fields = dict(_fields(term, model, state, num_classes, {"tau": 3.0, **numbers}, outputs))
    trial = _TermTrial(term)
    for samples in (SAMPLES, 2, 1):
        trial.on(_cut(fields, samples), samples)


class _TermTrial:
    """Runs a term in every way in which a run does."""

    def __init__(self, term: Term) -> None:
        self._term, self._name = term, term.import_path

    def on(self, fields: _Fields, samples: int) -> None:
        """Compare all ways on batches of `samples`.

        Raises:
            FedkdError: see `try_term`.
        """
        alone = [self._run(_of_client(fields, k)) for k in range(CLIENTS)]
        self._check(alone, samples)
        again = [self._run(_of_client(fields, k)).value for k in range(CLIENTS)]
        if not all(torch.equal(a, b.value) for a, b in zip(again, alone, strict=True)):
            raise FedkdError(
                f"{self._name} gives another loss when it is called again: it may not draw"
            )
        self._compare_stacked(fields, alone)
        self._compare_padded(fields, alone, samples)

    def _check(self, alone: Sequence[_Outcome], samples: int) -> None:
        shape = tuple(alone[0].value.shape)
        if shape not in ((), (samples,)):
            raise FedkdError(
                f"{self._name} returns {list(shape)} for {samples} samples: return one value a sample, "
                "[B], or a 0-d tensor; the trainer averages"
            )
        for value, grads in alone:
            if not all(bool(t.isfinite().all()) for t in (value, *grads)):
                raise FedkdError(
                    f"{self._name} gives a loss or gradient that is NaN or infinite for a batch of "
                    f"{samples} with finite input: keep logarithms, roots and divisions away from 0 "
                    "(torch.where alone does not)"
                )

    def _run(self, fields: _Fields, through: Callable[[Any], Any] = lambda f: f) -> _Outcome:
        """Return the losses, and the gradients of their sum."""
        features = [fields["features"]] if "features" in fields else []
        leaves = [fields["logits"], *features, *fields["params"].values()]
        for leaf in leaves:
            leaf.requires_grad_()
        function = through(lambda given: self._term(Step(**{"teacher_logits": None, **given})))
        try:
            value: object = function(fields)
        except Exception as error:
            where = user_location(error)
            raise FedkdError(f"{self._name} raises {one_line(error)}{where}") from error
        if not isinstance(value, Tensor):
            raise FedkdError(f"{self._name} returns a {type(value).__name__}: return a tensor")
        if not value.requires_grad:
            raise FedkdError(
                f"{self._name} depends on nothing that is trained: do not detach the model's logits, "
                "features or parameters, nor leave torch"
            )
        grads: Sequence[Any] = torch.autograd.grad(value.sum(), leaves, allow_unused=True)
        filled = [
            torch.zeros_like(leaf) if grad is None else grad
            for leaf, grad in zip(leaves, grads, strict=True)
        ]
        return _Outcome(value.detach(), filled)

    def _compare_stacked(self, fields: _Fields, alone: Sequence[_Outcome]) -> None:
        try:
            value, grads = self._run(_of_client(fields, slice(None)), vmap)
        except FedkdError as error:
            raise FedkdError(
                f"{error}, when clients are stacked (torch.func.vmap): no .item() or float(), no "
                "boolean-mask indexing, no `if` on a value, no draws, nothing in place; torch.where "
                "chooses"
            ) from None
        for k, expected in enumerate(alone):
            pairs = zip((value, *grads), (expected.value, *expected.grads), strict=True)
            if not all(_close(a[k], b) for a, b in pairs):
                raise FedkdError(
                    f"{self._name} gives other losses stacked than one by one: every operation has to "
                    "work along the last axes, never across clients"
                )

    def _compare_padded(self, fields: _Fields, alone: Sequence[_Outcome], samples: int) -> None:
        """Repeat the first sample at the end, as a stack does whose batches are wider."""
        for k, expected in enumerate(alone):
            value = self._run(_padded(_of_client(fields, k))).value
            if not _close(value[:samples] if value.ndim else value, expected.value):
                raise FedkdError(
                    f"{self._name} gives other losses when a batch is padded: return one value a sample, "
                    "[B], that depends on this sample alone, and the trainer averages; or leave out "
                    "padding by step.mask, and return one number, a 0-d tensor"
                )


def _close(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, rtol=1e-6, atol=1e-9)


_OF_SAMPLES = ("logits", "labels", "teacher_logits", "features", "mask")


def _fields(
    term: Term,
    model: nn.Module,
    state: State,
    num_classes: int,
    numbers: Mapping[str, float],
    outputs: Container[Output],
) -> Iterator[tuple[str, Any]]:
    """Yield the fields of a `Step` that the term needs, of all clients: ``[K, ...]``."""
    draw = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(CLIENTS, *shape, generator=draw, dtype=torch.float64)

    labels = torch.randint(num_classes, (CLIENTS, SAMPLES), generator=draw)
    labels[:, 0] = 0  # of the class that is absent below
    yield "labels", labels
    yield "logits", normal(SAMPLES, num_classes)
    yield "mask", torch.ones(CLIENTS, SAMPLES, dtype=torch.bool)
    yield "numbers", {n: torch.full((CLIENTS,), float(v)).double() for n, v in numbers.items()}
    if term.needs in ("soft-labels", "logits"):
        yield "teacher_logits", normal(SAMPLES, num_classes)
    width = 11 if "features" in outputs else num_classes
    if term.needs == "class-means":
        means = normal(num_classes, width)
        means = means.softmax(-1) if "probabilities" in outputs else means
        counts = torch.randint(1, 5, (CLIENTS, num_classes), generator=draw).double()
        means[:, 0], counts[:, 0] = 0, 0
        yield from (("class_means", means), ("class_counts", counts))
    if term.needs_features:
        yield "features", normal(SAMPLES, width)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    params = {
        n: t.cpu().double().expand(CLIENTS, *t.shape) for n, t in state.items() if n in trained
    }
    yield "params", params
    yield (
        "start",
        {n: t + normal(*t.shape[1:]) for n, t in params.items()} if term.needs_start else {},
    )


def _cut(fields: _Fields, samples: int) -> _Fields:
    return {n: v[:, :samples] if n in _OF_SAMPLES else v for n, v in fields.items()}


def _of_client(fields: _Fields, k: int | slice) -> _Fields:
    """Return copies of one client's fields, or of a slice of all."""

    def copied(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {name: tensor[k].clone() for name, tensor in value.items()}
        return value[k].clone()

    return {name: copied(value) for name, value in fields.items()}


def _padded(fields: _Fields) -> _Fields:
    """Return one client's fields, the first sample repeated at the end and masked."""
    padded = dict(fields)
    for name in _OF_SAMPLES:
        if name in fields:
            first = fields[name][:1].expand(WIDTH - len(fields[name]), *fields[name].shape[1:])
            last = torch.zeros_like(first) if name == "mask" else first
            padded[name] = torch.cat([fields[name], last])
    return padded
