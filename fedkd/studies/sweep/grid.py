"""The values that a sweep varies: a grid of values, or ranges for a search."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fedkd.errors import FedkdError
from fedkd.experiment import Experiment
from fedkd.keys import Scalar, extra, kebab, snake

_FIXED = {"fold", *Experiment.keys("seed", "clients", "machine", "bookkeeping")}
"""Keys that a sweep sets itself, or that change no accuracy beyond rounding."""


def typed(experiment: Experiment, grid: Mapping[str, Sequence[Scalar]]) -> dict[str, list[Scalar]]:
    """Return the grid with each value validated and typed: it may be text, as on the command line."""
    values_by_key: dict[str, list[Scalar]] = {}
    for name, options in grid.items():
        key = snake(name)
        if key in _FIXED:
            raise FedkdError(
                f"{kebab(key)} cannot be swept: a sweep sets it, or it changes no accuracy"
            )
        if isinstance(options, str) or not isinstance(options, Sequence):
            raise FedkdError(
                f"{kebab(key)} = {options!r} (from the grid): must be a list of values"
            )
        values = [getattr(_with(experiment, {name: value}), key) for value in options]
        if not values or len(set(values)) < len(values):
            raise FedkdError(
                f"{kebab(key)} = {list(options)}: give at least one value, without repeats"
            )
        values_by_key[key] = values
    if not values_by_key:
        raise FedkdError("the grid is empty: name keys and values, as in alpha=0.3,0.7 tau=1,5")
    _refuse_without_effect(experiment, values_by_key)
    return values_by_key


def _with(experiment: Experiment, keys: Mapping[str, Scalar]) -> Experiment:
    """Return the experiment with keys of the grid, some of which may have no effect by themselves."""
    sources = ("the experiment", experiment.flat()), ("the grid", keys)
    return Experiment.load(*sources, without_effect_too=True)


def _refuse_without_effect(
    experiment: Experiment, values_by_key: Mapping[str, Sequence[Scalar]]
) -> None:
    """Refuse a key that has no effect at any point of the grid."""
    for key, values in values_by_key.items():
        requirement = extra(Experiment.model_fields[key], "only_with")
        beside = values_by_key.get(requirement.key, ()) if requirement is not None else ()
        reached = [_with(experiment, {requirement.key: value}) for value in beside]
        fields = Experiment.model_fields
        if not any(requirement.is_met(vars(each), fields) for each in reached):
            for value in values:
                _with(experiment, {key: value}).refuse_without_effect(key)


def typed_ranges(
    experiment: Experiment, ranges: Mapping[str, Sequence[Scalar]]
) -> dict[str, list[Scalar]]:
    """Return the ranges with their bounds validated as by `typed`.

    Raises:
        FedkdError: a key, a bound or a range is invalid.
    """
    values = typed(experiment, ranges)
    for key, bounds in values.items():
        if len(bounds) != 2 or not all(type(b) in (int, float) for b in bounds):
            raise FedkdError(f"{kebab(key)} = {bounds}: a range is LOW..HIGH, two numbers")
        if float(bounds[0]) >= float(bounds[1]):
            raise FedkdError(f"{kebab(key)} = {bounds[0]}..{bounds[1]}: LOW must be below HIGH")
    return values


def parse(text: str | None, *, is_search: bool) -> dict[str, list[Scalar]]:
    """Return the grid in a text such as ``alpha=0.3,0.7 tau=1,5``, or ranges such as ``alpha=0.1..0.9``.

    Args:
        text: a grid or ranges.
        is_search: whether ranges are required.

    Returns:
        Values (or bounds) by key, as text.

    Raises:
        FedkdError: the text is neither, or not the required one.
    """
    if text is None:
        raise FedkdError("--vary is missing: name keys and values, as in 'alpha=0.3,0.7 tau=1,5'")
    values_by_key: dict[str, list[Scalar]] = {}
    ranges = set()
    for pair in text.split():
        key, equals, values = pair.partition("=")
        if not (key and equals and values):
            raise FedkdError(
                f"vary = '{pair}': must be KEY=VALUE,VALUE,... or KEY=LOW..HIGH, with spaces between keys"
            )
        if snake(key) in values_by_key:
            raise FedkdError(f"vary = '{text}': {key} is given twice")
        values_by_key[snake(key)] = list(values.split(".." if ".." in values else ","))
        ranges.add(".." in values)
    if len(ranges) > 1:
        raise FedkdError(f"vary = '{text}': use values or ranges, not both")
    if ranges != {is_search}:
        raise FedkdError(
            f"vary = '{text}': values make a grid, ranges (LOW..HIGH) make a search, which needs --trials"
        )
    return values_by_key
