"""Find strategies by name: ours, installed ones, and a user's own file.

The only module that imports `strategies`, and it does so by name, so that nothing below depends on the
algorithms that it runs.
"""

from __future__ import annotations

import sys
from dataclasses import fields
from importlib import import_module
from importlib.metadata import entry_points
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any, TypeGuard

from fedkd.errors import FedkdError, nearest
from fedkd.experiment import Experiment, kebab, snake
from fedkd.phases import GROUP
from fedkd.randomness import key
from fedkd.strategy import DistillationStrategy


def strategies() -> dict[str, type[DistillationStrategy]]:
    """Return all strategies by class name: those of fedkd, then installed ones.

    Raises:
        FedkdError: a strategy does not import, or `strategies` is somebody else's package.
    """
    package = _import("strategies", "fedkd's own strategies")
    _refuse_foreign(package)
    found = {name: getattr(package, name) for name in package.__all__}
    for point in entry_points(group=GROUP):
        try:
            found[point.name] = point.load()
        except Exception as error:
            raise FedkdError(
                f"the installed strategy {point.name} ({point.value}) does not import: {error}"
            ) from error
    return found


def find(name: str, config: str = "none") -> DistillationStrategy:
    """Return the strategy called `name` with its settings.

    Args:
        name: a class name in any case, with or without hyphens (``dsfl``, ``DS-FL``);
            ``module:Class``; or ``file.py:Class``.
        config: settings as ``key=value`` pairs separated by spaces, or ``"none"``.

    Raises:
        FedkdError: there is no such strategy, it does not import, or a setting is not right.
    """
    cls = _own(name) if ":" in name else _named(name)
    settings = _settings(cls, config)
    try:
        return cls(**settings)
    except TypeError as error:  # it declares no facts
        raise FedkdError(f"strategy = '{name}': {error}") from None
    except FedkdError as error:
        raise FedkdError(f"strategy-config = '{config}': {error}") from None


def strategy_of(experiment: Experiment) -> DistillationStrategy:
    """Return the experiment's strategy, checked against the experiment.

    Raises:
        FedkdError: see `find`, or the two do not go together.
    """
    strategy = find(experiment.strategy, experiment.strategy_config)
    strategy.check(experiment)
    return strategy


def _named(name: str) -> type[DistillationStrategy]:
    known = strategies()
    by_plain = {_plain(known_name): cls for known_name, cls in known.items()}
    if _plain(name) not in by_plain:
        raise FedkdError(
            f"strategy = '{name}': no such strategy{nearest(name, known)}; there are "
            f"{', '.join(known)}, or your own as module:Class or file.py:Class"
        )
    return by_plain[_plain(name)]


def _plain(name: str) -> str:
    return name.lower().replace("-", "").replace("_", "")


def _own(name: str) -> type[DistillationStrategy]:
    where, _, class_name = name.rpartition(":")
    module = _load_file(Path(where)) if where.endswith(".py") else _import(where, name)
    cls = getattr(module, class_name, None)
    if not _is_strategy(cls):
        present = [n for n, v in vars(module).items() if _is_strategy(v)]
        raise FedkdError(
            f"strategy = '{name}': {where} defines no strategy {class_name}"
            f"{nearest(class_name, present)}; a strategy is a subclass of "
            "fedkd.DistillationStrategy"
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
        return import_module(module)
    except Exception as error:
        # Whatever the user's module does while it is imported is worth one line, not a traceback.
        kind = type(error).__name__
        raise FedkdError(
            f"strategy = '{what}': {module} does not import: {kind}: {error}"
        ) from error


def _load_file(path: Path) -> ModuleType:
    if not path.exists():
        raise FedkdError(f"strategy = '{path}': there is no such file")
    name = _module_name(path)
    spec = spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        line = getattr(error, "lineno", None)
        at = f", line {line}" if line else ""
        raise FedkdError(
            f"strategy = '{path}': the file does not import: {type(error).__name__}: {error}{at}"
        ) from error
    return module


def _module_name(path: Path) -> str:
    """Return the file's own name, or a made-up one where that is another module's.

    Under its own name clients can import what the file defines, such as loss terms.
    """
    try:
        spec = find_spec(path.stem)
    except (ValueError, ImportError):
        spec = None
    if spec is None or (spec.origin and Path(spec.origin).resolve() == path.resolve()):
        return path.stem
    return f"strategy_file_{key(str(path.resolve())):x}"


def _refuse_foreign(package: ModuleType) -> None:
    """Refuse a `strategies` package that stands elsewhere than beside fedkd."""
    ours = Path(__file__).resolve().parent.parent
    theirs = Path(package.__file__ or "").resolve().parent.parent
    if ours != theirs:
        raise FedkdError(
            f"the package 'strategies' in {theirs} hides fedkd's own in {ours}; rename your folder, "
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
        if not equals or name not in known:
            raise FedkdError(
                f"strategy-config = '{config}': '{pair}' is not a setting of {cls.__name__}"
                f"{nearest(kebab(name), map(kebab, known))}; settings: "
                f"{', '.join(map(kebab, known)) or 'none'}, written key=value and separated by spaces"
            )
        settings[name] = text
    return settings
