"""Strategies by name: ours, installed ones, and those in a user's own file.

This is the only module that imports `strategies`, and it does so by name, so that nothing below it
depends on the algorithms.
"""

from __future__ import annotations

import sys
from dataclasses import MISSING, fields
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import ModuleType
from typing import Any, TypeGuard

from fedkd.errors import FedkdError, Setting, nearest
from fedkd.experiment import Experiment
from fedkd.keys import kebab, snake
from fedkd.knowledge import Wire
from fedkd.phases import GROUP, check_phases, to_text
from fedkd.strategy import DistillationStrategy
from fedkd.user_code import attributed, error_with_location, import_user_module, load_file


def strategies() -> dict[str, type[DistillationStrategy]]:
    """Return all strategies by class name: those of fedkd, then installed ones.

    Raises:
        FedkdError: a strategy cannot be imported or is not valid, or `strategies` is another package.
    """
    return {**ours(), **{name: _load(point) for name, point in _installed().items()}}


def ours() -> dict[str, type[DistillationStrategy]]:
    """Return fedkd's own strategies by class name.

    Raises:
        FedkdError: one cannot be imported, or `strategies` is another package.
    """
    package = _import("strategies", "fedkd's own strategies")
    _refuse_foreign(package)
    return {name: getattr(package, name) for name in package.__all__}


def _installed() -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=GROUP)}


def _load(point: EntryPoint) -> type[DistillationStrategy]:
    """Return an installed strategy, whose name must be that of its class and not one of ours."""
    what = f"the installed strategy {point.name} ({point.value})"
    try:
        cls = point.load()
    except Exception as error:
        raise FedkdError(f"{what} does not import: {error_with_location(error)}") from error
    if not _is_strategy(cls):
        raise FedkdError(f"{what} is not a strategy: it must subclass fedkd.DistillationStrategy")
    if point.name != cls.name():
        raise FedkdError(f"{what} must have the name of its class: {cls.name()} = '{point.value}'")
    if _plain(point.name) in map(_plain, ours()):
        raise FedkdError(f"{what} has the same name as one of fedkd's own; rename it")
    return cls


def find(name: str, config: str = "none") -> DistillationStrategy:
    """Return the strategy `name` with its settings.

    Args:
        name: a class name in any case, with or without hyphens (``dsfl``, ``DS-FL``);
            ``module:Class``; or ``file.py:Class``.
        config: settings as ``key=value`` pairs separated by spaces, or ``"none"``.

    Raises:
        FedkdError: there is no such strategy, it cannot be imported, or a setting is not valid.
    """
    cls = _user_strategy(name) if ":" in name else _by_name(name)
    settings = _settings(cls, config)
    without_default = [f.name for f in fields(cls) if f.default is MISSING]  # type: ignore[arg-type]
    if without_default:
        raise FedkdError(
            Setting("strategy", name), f": its setting {without_default[0]} needs a default"
        )
    try:
        return cls(**settings)
    except FedkdError as error:
        raise FedkdError(Setting("strategy-config", config), f": {error}") from None
    except Exception as error:  # it declares no facts, or its own code failed
        raise FedkdError(Setting("strategy", name), f": {error_with_location(error)}") from error


def strategy_of(experiment: Experiment) -> DistillationStrategy:
    """Return the experiment's strategy, checked against the experiment.

    Raises:
        FedkdError: see `find`; or the two contradict each other, or its phases or wire cannot be sent;
            the text names the user's file and line.
    """
    strategy = find(experiment.strategy, experiment.strategy_config)
    _check_phases_and_wire(strategy)
    strategy.check(experiment)
    return strategy


def client_modules(experiment: Experiment, strategy: DistillationStrategy) -> list[str]:
    """Return the modules of ``client-code``, and that of a strategy that is not ours.

    With it a user's own loss terms and procedures run in a simulation, where clients use this experiment.
    The clients of a deployment run what their node allows.
    """
    module = type(strategy).__module__
    is_ours = module.partition(".")[0] in ("fedkd", "strategies")
    return list(dict.fromkeys([*experiment.client_modules, *([] if is_ours else [module])]))


def reproducible_keys(experiment: Experiment, strategy: DistillationStrategy) -> dict[str, str]:
    """Return the keys that name a strategy and its client code, as a run is recorded and repeated.

    A strategy of the script that is running is named by the script's file.
    """
    name = experiment.strategy if ":" in experiment.strategy else strategy.name()
    file, _, class_name = name.rpartition(":")
    if file.endswith(".py"):
        name = f"{Path(file).absolute()}:{class_name}"
    script = getattr(sys.modules["__main__"], "__file__", None)
    if name.startswith("__main__:") and script is not None:
        name = f"{script}:{strategy.name()}"
    modules = client_modules(experiment, strategy)
    return {"strategy": name, "client_code": ",".join(modules) or "none"}


def _check_phases_and_wire(strategy: DistillationStrategy) -> None:
    """Refuse a strategy whose phases or wire are not valid, before anything depends on them."""
    for number in (1, 2):
        with attributed(f"phases of {strategy.name()}, round {number}"):
            phases: object = strategy.phases(number)
            to_text(check_phases(phases))
    with attributed(f"wire of {strategy.name()}"):
        wires: object = strategy.wire()
        if not isinstance(wires, tuple) or [type(wire) for wire in wires] != [Wire, Wire]:
            raise FedkdError(f"{wires!r} is not two of fedkd.knowledge.Wire, up and down")


def _by_name(name: str) -> type[DistillationStrategy]:
    own_strategies, installed = ours(), _installed()
    names = {_plain(known): known for known in (*installed, *own_strategies)}
    if name.endswith(".py"):
        raise FedkdError(
            Setting("strategy", name), f": name a class of the file, as in {name}:MyStrategy"
        )
    if _plain(name) not in names:
        known = [*own_strategies, *installed]
        raise FedkdError(
            Setting("strategy", name),
            f": no such strategy{nearest(name, known)}; there are {', '.join(known)}, "
            "or your own_strategies as module:Class or file.py:Class",
        )
    match = names[_plain(name)]
    return own_strategies[match] if match in own_strategies else _load(installed[match])


def _plain(name: str) -> str:
    return name.lower().replace("-", "").replace("_", "")


def _user_strategy(name: str) -> type[DistillationStrategy]:
    where, _, class_name = name.rpartition(":")
    module = load_file(Path(where), "strategy") if where.endswith(".py") else _import(where, name)
    cls = getattr(module, class_name, None)
    if not _is_strategy(cls):
        present = [n for n, v in vars(module).items() if _is_strategy(v)]
        raise FedkdError(
            Setting("strategy", name),
            f": {where} defines no strategy {class_name}{nearest(class_name, present)}; "
            "a strategy is a subclass of fedkd.DistillationStrategy",
        )
    return cls


def _is_strategy(value: object) -> TypeGuard[type[DistillationStrategy]]:
    return (
        isinstance(value, type)
        and issubclass(value, DistillationStrategy)
        and value is not DistillationStrategy
    )


def _import(module: str, what: str) -> ModuleType:
    try:
        return import_user_module(module)
    except Exception as error:
        # The user's module may raise anything; one line is enough, without a traceback.
        raise FedkdError(
            Setting("strategy", what), f": {module} does not import: {error_with_location(error)}"
        ) from error


def _refuse_foreign(package: ModuleType) -> None:
    """Refuse a `strategies` package that is not beside fedkd."""
    expected = Path(__file__).resolve().parent.parent
    actual = Path(package.__file__ or "").resolve().parent.parent
    if expected != actual:
        raise FedkdError(
            f"the package 'strategies' in {actual} hides fedkd's own in {expected}; rename your folder, "
            "or remove its __init__.py"
        )


def _settings(cls: type[DistillationStrategy], config: str) -> dict[str, Any]:
    if config == "none":
        return {}
    known = [f.name for f in fields(cls)]  # type: ignore[arg-type]
    settings = {}
    for pair in config.split():
        setting, equals, text = pair.partition("=")
        name = snake(setting)
        if name in known and not equals:
            raise FedkdError(
                Setting("strategy-config", config),
                f": '{setting}' has no value: write {setting}=VALUE, without spaces",
            )
        if name in settings:
            raise FedkdError(Setting("strategy-config", config), f": '{setting}' is set twice")
        if name not in known:
            raise FedkdError(
                Setting("strategy-config", config),
                f": '{pair}' is not a setting of "
                f"{cls.__name__}{nearest(kebab(name), map(kebab, known))}; settings: "
                f"{', '.join(map(kebab, known)) or 'none'}, written key=value and "
                "separated by spaces",
            )
        settings[name] = text
    return settings
