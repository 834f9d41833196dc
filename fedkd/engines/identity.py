"""Work out what a run is known by; see `fedkd.records.identity`."""

from __future__ import annotations

import platform
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from fedkd.code_fingerprint import code_fingerprints
from fedkd.data.cache import fingerprint
from fedkd.data.federated import federated_data
from fedkd.experiment import Experiment
from fedkd.keys import kebab
from fedkd.phases import Apply, Fit, import_path, resolve_procedure, resolve_term
from fedkd.records.files import package_version
from fedkd.records.identity import Identity, keys_of
from fedkd.registry import client_modules
from fedkd.strategy import DistillationStrategy
from fedkd.training.architectures import architectures_of
from fedkd.user_code import find_function
from fedkd.user_code import fingerprint as sources_fingerprint

NOT_CENTRAL = ("seed", *Experiment.keys("federation", "evaluation", "clients"))
"""Keys that the central baseline does not read; its seeds are in the result."""


def _models(is_central: bool) -> tuple[str, ...]:
    """Return the keys that name the models of a run."""
    return ("student", "teacher") if is_central else ("student", "teacher", "server_model")


def identity_of(
    experiment: Experiment,
    strategy: DistillationStrategy | None = None,
    seeds: Sequence[int] | None = None,
) -> Identity:
    """Return what the numbers of a run depend on.

    Args:
        experiment: the run, with all that was left open decided.
        strategy: its strategy; `None` for a central baseline.
        seeds: of a central baseline; default the experiment's.

    Raises:
        FedkdError: a data set, model or term cannot be loaded.
    """
    seeds = [experiment.seed] if seeds is None else seeds
    return {
        "software": software(),
        "keys": keys_of(experiment, NOT_CENTRAL if strategy is None else ()),
        "data": dict(federated_data(experiment).fingerprints),
        "code": code_fingerprints(_used(experiment, strategy)),
        "weights": dict(_weights(experiment, strategy is None, seeds)),
    }


def software() -> dict[str, Any]:
    """Return the versions on which numbers depend."""
    return {
        "torch": package_version("torch"),
        "python": ".".join(platform.python_version_tuple()[:2]),
        "fedkd's own code": sources_fingerprint(()),
    }


def _used(experiment: Experiment, strategy: DistillationStrategy | None) -> Iterable[object]:
    """Yield the user's functions and classes that take part."""
    for key, name in _user_named(experiment, strategy is None):
        yield find_function(name, kebab(key))
    if strategy is None:
        return
    yield type(strategy)
    modules = client_modules(experiment, strategy)
    for phase in [*strategy.phases(1), *strategy.phases(2)]:
        if isinstance(phase, Fit):
            for name in (*phase.private, *phase.public):
                yield resolve_term(name, modules).function
        elif isinstance(phase, Apply):
            yield resolve_procedure(import_path(phase.procedure), modules).function


def _user_named(experiment: Experiment, is_central: bool) -> Iterator[tuple[str, str]]:
    """Yield the functions that keys name, as ``module:function``, each with its key."""
    keys = ("dataset", "public", *_models(is_central))
    for key in keys:
        for name in str(getattr(experiment, key)).split(","):
            if ":" in name:
                yield key, name.strip()


def _weights(
    experiment: Experiment, is_central: bool, seeds: Sequence[int]
) -> Iterator[tuple[str, str]]:
    """Yield a fingerprint of the initial weights of each architecture, by name and seed."""
    architectures = architectures_of(federated_data(experiment))
    listed = (getattr(experiment, key) for key in _models(is_central))
    names = dict.fromkeys(name.strip() for names in listed for name in names.split(","))
    for name in names:
        for seed in seeds if name != "none" else ():
            state = architectures.initial_state(name, seed)
            yield f"{name}, seed {seed}", fingerprint({n: t.cpu() for n, t in state.items()})[:16]
