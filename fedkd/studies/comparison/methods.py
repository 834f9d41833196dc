"""The methods of a comparison: their names, and the experiment that each of them runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from fedkd.engines.preflight import check
from fedkd.errors import FedkdError, Setting, nearest
from fedkd.experiment import Experiment
from fedkd.knowledge import SoftLabels
from fedkd.registry import find, strategies
from fedkd.strategy import DistillationStrategy
from fedkd.studies.arguments import refuse_repeats
from fedkd.studies.central import check_central
from fedkd.training.plans import without

CENTRAL = ("teacher", "student-alone", "student-distilled")
"""Methods of the central baseline; all others are strategies."""

LOCAL, ALONE, DISTILLED = "LocalOnly", "student-alone", "student-distilled"
"""The gap closed is measured from the first to the better of the other two."""

_LABELS = {
    "teacher": "teacher",
    ALONE: "student alone",
    DISTILLED: "student distilled",
    LOCAL: "local only",
}

Method = str | type[DistillationStrategy]
"""A method's name, or a strategy's class."""


def label(method: str) -> str:
    """Return a method's name in tables."""
    return _LABELS.get(method, method.split(":")[-1])


def subject(method: str) -> str:
    """Return the same name as it begins a sentence."""
    name = label(method)
    return name[0].upper() + name[1:] if method in _LABELS else name


def canonical(method: Method) -> str:
    """Return a method's canonical name, as in records.

    Raises:
        FedkdError: there is no such method.
    """
    if isinstance(method, type):
        is_built_in = method.__module__.partition(".")[0] == "strategies"
        method = method.__name__ if is_built_in else f"{method.__module__}:{method.__qualname__}"
    if not isinstance(method, str):
        raise FedkdError(
            f"methods: {method!r} is neither a name nor a strategy class; settings go to strategy-config"
        )
    plain = method.strip().lower().replace(" ", "-").replace("_", "-")
    if plain in CENTRAL:
        return plain
    if plain in ("local", "local-only"):
        return LOCAL
    if ":" in plain:
        find(method.strip())
        return method.strip()
    known = {*CENTRAL, *strategies()}
    try:
        return find(plain).name()
    except FedkdError:
        raise FedkdError(
            f"methods: no method '{method}'{nearest(plain, known)}; "
            f"the methods are {', '.join(sorted(known))}"
        ) from None


def default_methods(experiment: Experiment) -> list[str]:
    """Return the default methods; the central baseline is among them only where there is one."""
    federated = [LOCAL, "FedAvg", "FedMD", "DSFL"]
    single = experiment.teacher != "none" and "," not in experiment.teacher + experiment.student
    return [*CENTRAL, *federated] if single else federated


def check_all(experiment: Experiment, names: Sequence[str], seeds: Sequence[int]) -> None:
    """Raise an error if any run of a comparison is invalid, before the first.

    Raises:
        FedkdError: a run is invalid, or there is nothing to compare.
    """
    refuse_repeats("methods", [_folder_word(name) for name in names])
    refuse_repeats("seeds", seeds)
    if experiment.strategy_config != "none" and canonical(experiment.strategy) not in names:
        raise FedkdError(
            Setting("strategy-config", experiment.strategy_config),
            " belongs to ",
            Setting("strategy", experiment.strategy),
            ", which is not compared; set strategy to the method it is for",
        )
    if any(name in CENTRAL for name in names):
        check_central(pooled(experiment))
    for name in federated(names):
        for seed in seeds:
            check(variant(experiment, name, seed).replace(name=None))


def federated(names: Sequence[str]) -> Iterator[str]:
    """Yield the methods that are strategies."""
    return (name for name in names if name not in CENTRAL)


def variant(experiment: Experiment, method: str, seed: int) -> Experiment:
    """Return the experiment as one strategy runs it with one seed."""
    strategy = find(method)
    has_labels = strategy.uploads() is SoftLabels
    observes = strategy.facts.server_model != "none"
    serves_alone = (
        experiment.server_model not in f"{experiment.student},{experiment.teacher}".split(",")
    )
    drops = serves_alone and not observes
    return experiment.replace(
        strategy=method,
        plan=without(experiment.plan, experiment.server_model) if drops else experiment.plan,
        # Settings and the server's model belong to the methods that use them.
        strategy_config=experiment.strategy_config
        if canonical(experiment.strategy) == method
        else "none",
        server_model=experiment.server_model if observes else "none",
        codec=experiment.codec if has_labels else "auto",
        seed=seed,
        name=f"{experiment.name}-{_folder_word(method)}-seed{seed}" if experiment.name else None,
    )


def pooled(experiment: Experiment) -> Experiment:
    """Return the central baseline's experiment: as many epochs as the clients train in all."""
    rounds = experiment.num_server_rounds
    return experiment.replace(
        local_epochs=rounds * experiment.local_epochs,
        distill_epochs=rounds * experiment.distill_epochs,
        name=f"{experiment.name}-central" if experiment.name else None,
    )


def _folder_word(method: str) -> str:
    """Return a method's name in run folders."""
    return method.split(":")[-1].lower()
