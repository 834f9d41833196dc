"""Check what a strategy declares: settings, facts, phases, and the code that clients run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from math import ceil, isfinite
from typing import Any, get_args

from fedkd.errors import FedkdError, one_line
from fedkd.knowledge import Output, Space
from fedkd.losses import Term
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
from fedkd.training.trials.terms import try_term

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
            _try_term(bench, term, values)
    user_terms = [name for name in numbers if ":" in name]
    if not user_terms and not any(isinstance(phase, Apply) for phase in listed):
        raise NotApplicable("clients run fedkd's own terms only")


def _try_term(bench: Bench, term: Term, numbers: Mapping[str, float]) -> None:
    data = bench.server().data
    architectures, student = architectures_of(data), bench.experiment.student_of(0)
    model, state = architectures.skeleton(student), architectures.initial_state(student, 1)
    outputs = {p.of for p in bench.strategy.phases(2) if isinstance(p, MeanByClass)}
    try:
        try_term(term, model, state, data.num_classes, numbers, outputs)
    except FedkdError as error:
        raise Wrong(str(error)) from None
