"""Check what a strategy declares: settings, facts, phases, and the code that clients run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from math import ceil, isfinite
from typing import Any, get_args

import torch
from torch import Tensor
from torch.func import vmap

from fedkd.errors import FedkdError, one_line
from fedkd.experiment import Experiment
from fedkd.knowledge import Output, Space
from fedkd.losses import Step, Term
from fedkd.phases import (
    ANSWERING,
    Apply,
    Fit,
    MeanByClass,
    Phase,
    from_text,
    import_path,
    resolve_procedure,
    resolve_term,
    to_text,
)
from fedkd.testing.bench import Bench
from fedkd.testing.outcomes import NotApplicable, Wrong
from fedkd.training.architectures import architectures_of
from fedkd.user_code import user_location

SYMBOLS = ("P", "C", "K", "S", "D", "I")
"""Symbols in formulas of bytes, besides settings; `fedkd.strategy.Facts` explains them."""


def settings(bench: Bench) -> None:
    """Settings are scalars with defaults, and can be given as text."""
    strategy = bench.strategy
    for name, value in strategy.settings().items():
        if type(value) not in (bool, int, float, str):
            raise Wrong(
                f"{name} = {value!r} is a {type(value).__name__}: settings are numbers, texts or "
                "booleans, as strategy-config sends them; take a name and look the rest up"
            )
    try:
        type(strategy)()
    except TypeError as error:
        raise Wrong(f"{error}: give every setting a default") from None
    texts = {name: str(value) for name, value in strategy.settings().items()}
    try:
        read = type(strategy)(**texts)
    except FedkdError as error:
        raise Wrong(
            f"a setting cannot be given as text, as --strategy-config does: {error}"
        ) from None
    if read != strategy or deepcopy(strategy) != strategy:
        raise Wrong(
            "a copy made of the settings is not equal: store nothing else on the strategy, and derive "
            "what depends on settings in methods or properties"
        )


def facts(bench: Bench) -> None:
    """What is declared can be read: formulas of known symbols and settings."""
    declared = bench.strategy.facts
    if not declared.paper:
        raise Wrong("facts.paper is empty: give an arXiv number or venue, or 'none'")
    symbols = dict.fromkeys(SYMBOLS, 7)
    for way in ("up", "down"):
        evaluate(getattr(declared, way), way, {**symbols, **bench.strategy.settings()})


def evaluate(formula: str, way: str, symbols: Mapping[str, Any]) -> float:
    """Return the bytes that a formula gives.

    Raises:
        Wrong: it cannot be evaluated; the text names the symbols that there are.
    """
    text = formula.strip().removeprefix("<=")
    try:
        value = eval(text, {"__builtins__": {}, "ceil": ceil, "min": min, "max": max}, {**symbols})
        if isinstance(value, bool) or not isinstance(value, int | float) or not value >= 0:
            raise TypeError(f"gives {value!r}")
    except Exception as error:
        setting_names = [name for name in symbols if name not in SYMBOLS]
        raise Wrong(
            f"facts.{way} = '{formula}' is not a number of bytes ({one_line(error)}): write it with "
            f"{', '.join(SYMBOLS)}{', or a setting ' * bool(setting_names)}{', '.join(setting_names)}"
        ) from None
    return float(value)


# --- Phases ------------------------------------------------------------------------------------------


def phases(bench: Bench) -> None:
    """Phases are a list, the same at every call, with one answer at most, and can be sent."""
    strategy = bench.strategy
    answers = set()
    for number in (1, 2, 3):
        listed: Any = strategy.phases(number)
        where = f"phases({number})"
        if not isinstance(listed, list) or not all(isinstance(phase, Phase) for phase in listed):
            raise Wrong(f"{where} gives {listed!r}: return a list of phases (see fedkd.phases)")
        if strategy.phases(number) != listed:
            raise Wrong(
                f"{where} gives other phases when called again: they may depend on round only"
            )
        _check_phases(where, listed)
        answers |= {
            (type(p), getattr(p, "space", ""), getattr(p, "of", ""))
            for p in listed
            if isinstance(p, ANSWERING)
        }
        if sum(isinstance(phase, ANSWERING) for phase in listed) > 1:
            raise Wrong(f"{where} answers twice: a client sends one kind of knowledge a round")
    if len(answers) > 1:
        raise Wrong(
            "phases answer with other knowledge in other rounds: clients that join late begin with "
            "round 1 in any round, so all rounds have to answer with the same kind and space"
        )


def _check_phases(where: str, listed: Sequence[Phase]) -> None:
    for phase in listed:
        if isinstance(phase, Fit):
            _check_fit(where, phase)
        for name, choices in {"space": Space, "of": Output}.items():
            value = getattr(phase, name, None)
            if value is not None and value not in get_args(choices):
                raise Wrong(
                    f"{where}: {type(phase).__name__}({value!r}) must be one of "
                    f"{', '.join(get_args(choices))}"
                )
    try:
        text = to_text(listed)
    except TypeError as error:
        raise Wrong(f"{where} cannot be sent ({error}): numbers of phases are scalars") from None
    if list(from_text(text)) != list(listed):
        raise Wrong(f"{where} changes when it is sent: give phases numbers and texts only")


def _check_fit(where: str, phase: Fit) -> None:
    terms = {**phase.private, **phase.public}
    if not terms:
        raise Wrong(f"{where}: the fit '{phase.name}' has no terms: give it private or public ones")
    for name, weight in terms.items():
        is_named = weight in ("alpha", "1-alpha")
        if not is_named and (isinstance(weight, str) or not isfinite(weight)):
            raise Wrong(
                f"{where}: the coefficient {weight!r} of {name} must be a number, 'alpha' or '1-alpha'"
            )


# --- Client code -------------------------------------------------------------------------------------


def client_code(bench: Bench) -> None:
    """Terms and procedures are found by name; terms give the same stacked, one by one and padded."""
    experiment = bench.experiment
    listed = [*bench.strategy.phases(1), *bench.strategy.phases(2)]
    for phase in listed:
        if isinstance(phase, Apply):
            resolve_procedure(import_path(phase.procedure), experiment.client_modules)
    numbers: dict[str, dict[str, float]] = {}
    for phase in listed:
        if isinstance(phase, Fit):
            for name in (*phase.private, *phase.public):
                numbers.setdefault(name, dict(phase.numbers))
    for name, values in numbers.items():
        term = resolve_term(name, experiment.client_modules)
        if not term.import_path.startswith("fedkd.losses:"):
            _TermCheck(bench, term, experiment, values)()
    user_terms = [name for name in numbers if ":" in name]
    if not user_terms and not any(isinstance(phase, Apply) for phase in listed):
        raise NotApplicable("clients run fedkd's own terms only")


class _TermCheck:
    """Runs a term for three clients of five samples each."""

    clients, samples = 3, 5

    def __init__(
        self, bench: Bench, term: Term, experiment: Experiment, numbers: Mapping[str, float]
    ) -> None:
        self.term = term
        self.name = term.import_path
        self.steps = _steps(bench, term, experiment, numbers, self.clients, self.samples)

    def __call__(self) -> None:
        alone = [self._one(row) for row in range(self.clients)]
        shape = tuple(alone[0][0].shape)
        if shape not in ((), (self.samples,)):
            raise Wrong(
                f"{self.name} returns {list(shape)} for {self.samples} samples: return one value a "
                "sample, [B], or a 0-d tensor; the trainer averages"
            )
        for value, grads in alone:
            if not all(bool(t.isfinite().all()) for t in (value, *grads)):
                raise Wrong(
                    f"{self.name} gives a loss or gradient that is NaN or infinite for finite input: "
                    "keep logarithms, roots and divisions away from 0 (torch.where alone does not)"
                )
        if not all(torch.equal(self._one(row)[0], value) for row, (value, _) in enumerate(alone)):
            raise Wrong(f"{self.name} gives another loss when it is called again: it may not draw")
        self._compare_stacked(alone)
        self._compare_padded(alone)

    def _one(self, row: int) -> tuple[Tensor, list[Tensor]]:
        return self._run(
            {n: _row(v, row) for n, v in self.steps.items()}, lambda function: function
        )

    def _run(
        self, fields: dict[str, Any], through: Callable[[Any], Any]
    ) -> tuple[Tensor, list[Tensor]]:
        """Return the losses, and the gradients of their sum."""
        leaves = _trained(fields)
        for leaf in leaves:
            leaf.requires_grad_()
        function = through(lambda step: self.term(_step(step)))
        try:
            value: object = function(fields)
        except Exception as error:
            raise Wrong(f"{self.name} raises {one_line(error)}{user_location(error)}") from error
        if not isinstance(value, Tensor):
            raise Wrong(f"{self.name} returns a {type(value).__name__}: return a tensor")
        if not value.requires_grad:
            raise Wrong(
                f"{self.name} depends on nothing that is trained: do not detach the model's logits, "
                "features or parameters, nor leave torch"
            )
        grads: Sequence[Any] = torch.autograd.grad(value.sum(), leaves, allow_unused=True)
        filled = [
            torch.zeros_like(leaf) if grad is None else grad
            for leaf, grad in zip(leaves, grads, strict=True)
        ]
        return value.detach(), filled

    def _compare_stacked(self, alone: Sequence[tuple[Tensor, list[Tensor]]]) -> None:
        try:
            value, grads = self._run({n: _row(v, slice(None)) for n, v in self.steps.items()}, vmap)
        except Wrong as error:
            raise Wrong(
                f"{error}, when clients are stacked (torch.func.vmap): no .item() or float(), no "
                "boolean-mask indexing, no `if` on a value, no draws, nothing in place; torch.where "
                "chooses"
            ) from None
        for row, (expected, expected_grads) in enumerate(alone):
            pairs = zip((value, *grads), (expected, *expected_grads), strict=True)
            if not all(torch.allclose(a[row], b, rtol=1e-4, atol=1e-5) for a, b in pairs):
                raise Wrong(
                    f"{self.name} gives other losses stacked than one by one: every operation has to "
                    "work along the last axes, never across clients"
                )

    def _compare_padded(self, alone: Sequence[tuple[Tensor, list[Tensor]]]) -> None:
        """Repeat the first sample at the end, as a stack does to be as wide as its largest client."""
        for row, (expected, _) in enumerate(alone):
            fields = {n: _row(v, row) for n, v in self.steps.items()}
            for name in ("logits", "labels", "teacher_logits", "features"):
                if name in fields:
                    fields[name] = torch.cat([fields[name], fields[name][:1]])
            value, _ = self._run(fields, lambda function: function)
            real = value[: self.samples] if value.ndim else value
            if not torch.allclose(real, expected, rtol=1e-4, atol=1e-5):
                raise Wrong(
                    f"{self.name} gives other losses when a batch is padded: it may not average or "
                    "compare over the batch; return one value a sample, [B], and the trainer averages"
                )


def _steps(
    bench: Bench,
    term: Term,
    experiment: Experiment,
    numbers: Mapping[str, float],
    clients: int,
    samples: int,
) -> dict[str, Any]:
    """Return the fields of a `Step` that the term needs, for all clients: ``[K, ...]``."""
    data = bench.server().data
    classes = data.num_classes
    draw = torch.Generator().manual_seed(1)
    architectures, student = architectures_of(data), experiment.student_of(0)
    state = architectures.initial_states(student, 1, clients)
    trained = {name for name, _ in architectures.skeleton(student).named_parameters()}
    params = {n: t for n, t in state.items() if n in trained}
    of = {p.of for p in bench.strategy.phases(2) if isinstance(p, MeanByClass)}
    width = 11 if "features" in of else classes
    labels = torch.randint(classes, (clients, samples), generator=draw)
    labels[:, 0] = 0  # of the class that is absent below
    step: dict[str, Any] = {
        "logits": torch.randn(clients, samples, classes, generator=draw),
        "labels": labels,
        "params": params,
        "numbers": {n: torch.full((clients,), float(v)) for n, v in {"tau": 3, **numbers}.items()},
    }
    if term.needs in ("soft-labels", "logits"):
        step["teacher_logits"] = torch.randn(clients, samples, classes, generator=draw)
    if term.needs == "class-means":
        means = torch.randn(clients, classes, width, generator=draw)
        means = means.softmax(-1) if "probabilities" in of else means
        counts = torch.randint(1, 5, (clients, classes), generator=draw).float()
        means[:, 0], counts[:, 0] = 0, 0
        step |= {"class_means": means, "class_counts": counts}
    if term.needs_features:
        step["features"] = torch.randn(clients, samples, width, generator=draw)
    if term.needs_start:
        step["start"] = {n: t + torch.randn(t.shape, generator=draw) for n, t in params.items()}
    return step


def _step(fields: Mapping[str, Any]) -> Step:
    return Step(**{"teacher_logits": None, "start": {}, **fields})


def _row(value: Any, row: int | slice) -> Any:
    """Return a copy of one client's part, or of a slice of all."""
    if isinstance(value, Mapping):
        return {name: tensor[row].clone() for name, tensor in value.items()}
    return value[row].clone()


def _trained(fields: Mapping[str, Any]) -> list[Tensor]:
    features = [fields["features"]] if "features" in fields else []
    return [fields["logits"], *features, *fields["params"].values()]
