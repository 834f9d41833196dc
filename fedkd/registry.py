"""Find strategies by name: ours, installed ones, and a user's own file.

The only module that imports `strategies`, and it does so by name, so that nothing below depends on the
algorithms that it runs.
"""

from __future__ import annotations

import sys
from dataclasses import MISSING, fields
from importlib.metadata import EntryPoint, entry_points
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any, TypeGuard

from fedkd.errors import FedkdError, Setting, nearest
from fedkd.experiment import Experiment
from fedkd.keys import kebab, snake
from fedkd.knowledge import Wire
from fedkd.phases import GROUP, check_phases, to_text
from fedkd.randomness import key
from fedkd.strategy import DistillationStrategy
from fedkd.user_code import (
    GENERATED_PREFIX,
    add_import_path,
    attributed,
    error_with_location,
    import_user_module,
)

_read: dict[str, int] = {}
"""When the files were last changed that were read here, in ns, by path."""


def strategies() -> dict[str, type[DistillationStrategy]]:
    """Return all strategies by class name: those of fedkd, then installed ones.

    Raises:
        FedkdError: a strategy does not import or is none, or `strategies` is somebody else's package.
    """
    return {**ours(), **{name: _load(point) for name, point in _installed().items()}}


def ours() -> dict[str, type[DistillationStrategy]]:
    """Return fedkd's own strategies by class name.

    Raises:
        FedkdError: one does not import, or `strategies` is somebody else's package.
    """
    package = _import("strategies", "fedkd's own strategies")
    _refuse_foreign(package)
    return {name: getattr(package, name) for name in package.__all__}


def _installed() -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=GROUP)}


def _load(point: EntryPoint) -> type[DistillationStrategy]:
    """Import an installed strategy: its name must be its class's, as in records, and nobody else's."""
    what = f"the installed strategy {point.name} ({point.value})"
    try:
        cls = point.load()
    except Exception as error:
        raise FedkdError(f"{what} does not import: {error_with_location(error)}") from error
    if not _is_strategy(cls):
        raise FedkdError(f"{what} is none: it must be a subclass of fedkd.DistillationStrategy")
    if point.name != cls.name():
        raise FedkdError(f"{what} must be called as its class: {cls.name()} = '{point.value}'")
    if _plain(point.name) in map(_plain, ours()):
        raise FedkdError(f"{what} is called like one of fedkd's own; give it another name")
    return cls


def find(name: str, config: str = "none") -> DistillationStrategy:
    """Return the strategy called `name` with its settings.

    Args:
        name: a class name in any case, with or without hyphens (``dsfl``, ``DS-FL``);
            ``module:Class``; or ``file.py:Class``.
        config: settings as ``key=value`` pairs separated by spaces, or ``"none"``.

    Raises:
        FedkdError: there is no such strategy, it does not import, or a setting is not right.
    """
    cls = _user_strategy(name) if ":" in name else _named(name)
    settings = _settings(cls, config)
    bare = [f.name for f in fields(cls) if f.default is MISSING]  # type: ignore[arg-type]
    if bare:
        raise FedkdError(Setting("strategy", name), f": its setting {bare[0]} needs a default")
    try:
        return cls(**settings)
    except FedkdError as error:
        raise FedkdError(Setting("strategy-config", config), f": {error}") from None
    except Exception as error:  # it declares no facts, or what it does with its settings went wrong
        raise FedkdError(Setting("strategy", name), f": {error_with_location(error)}") from error


def strategy_of(experiment: Experiment) -> DistillationStrategy:
    """Return the experiment's strategy, checked against the experiment.

    Raises:
        FedkdError: see `find`, the two do not go together, or what it says of clients' work is nothing
            that can be sent; the text names the user's file and line.
    """
    strategy = find(experiment.strategy, experiment.strategy_config)
    _check_saying(strategy)
    strategy.check(experiment)
    return strategy


def client_modules(experiment: Experiment, strategy: DistillationStrategy) -> list[str]:
    """Return ``client-code`` with the module of a strategy that is not ours.

    So a user's own loss terms and procedures run wherever this experiment is the client's own: in a
    simulation. The clients of a deployment go by what their node allows.
    """
    module = type(strategy).__module__
    own = module.partition(".")[0] in ("fedkd", "strategies")
    return list(dict.fromkeys([*experiment.client_modules, *([] if own else [module])]))


def reproducible_keys(experiment: Experiment, strategy: DistillationStrategy) -> dict[str, str]:
    """Return the keys that name a strategy and its client code, as a run is recorded and repeated.

    One of a script that is run is found in the script's file afterwards.
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


def _check_saying(strategy: DistillationStrategy) -> None:
    """Have a strategy say its phases and its wire once, before anything depends on them."""
    for number in (1, 2):
        with attributed(f"phases of {strategy.name()}, round {number}"):
            phases: object = strategy.phases(number)
            to_text(check_phases(phases))
    with attributed(f"wire of {strategy.name()}"):
        wires: object = strategy.wire()
        if not isinstance(wires, tuple) or [type(wire) for wire in wires] != [Wire, Wire]:
            raise FedkdError(f"{wires!r} is not two of fedkd.knowledge.Wire, up and down")


def _named(name: str) -> type[DistillationStrategy]:
    own, installed = ours(), _installed()
    names = {_plain(known): known for known in (*installed, *own)}
    if name.endswith(".py"):
        raise FedkdError(
            Setting("strategy", name), f": say which class of the file, as {name}:MyStrategy"
        )
    if _plain(name) not in names:
        known = [*own, *installed]
        raise FedkdError(
            Setting("strategy", name),
            f": no such strategy{nearest(name, known)}; there are {', '.join(known)}, "
            "or your own as module:Class or file.py:Class",
        )
    found = names[_plain(name)]
    return own[found] if found in own else _load(installed[found])


def _plain(name: str) -> str:
    return name.lower().replace("-", "").replace("_", "")


def _user_strategy(name: str) -> type[DistillationStrategy]:
    where, _, class_name = name.rpartition(":")
    module = _load_file(Path(where)) if where.endswith(".py") else _import(where, name)
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
        # Whatever the user's module does while it is imported is worth one line, not a traceback.
        raise FedkdError(
            Setting("strategy", what), f": {module} does not import: {error_with_location(error)}"
        ) from error


def _load_file(path: Path) -> ModuleType:
    """Import a file as the module of its name; read it anew if it has changed since.

    Its folder is searched for modules from then on, by worker processes too: clients import from the
    file what it defines, such as loss terms.
    """
    if not path.exists():
        raise FedkdError(Setting("strategy", path), ": there is no such file")
    name, changed = _module_name(path), path.stat().st_mtime_ns
    where = str(path.resolve())
    if name in sys.modules and _read.setdefault(where, changed) == changed:
        return sys.modules[name]
    add_import_path(path.resolve().parent)
    spec = spec_from_file_location(name, path.resolve())
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise FedkdError(
            Setting("strategy", path), f": the file does not import: {error_with_location(error)}"
        ) from error
    _read[where] = changed
    return module


def _module_name(path: Path) -> str:
    """Return the file's own name, or a made-up one where that is another module's."""
    made_up = f"{GENERATED_PREFIX}{key(str(path.resolve())):x}"
    if "." in path.stem:
        return made_up
    try:
        spec = find_spec(path.stem)
    except ValueError:  # a module without a spec, such as __main__
        return made_up
    its_own = spec is None or (spec.origin and Path(spec.origin).resolve() == path.resolve())
    return path.stem if its_own else made_up


def _refuse_foreign(package: ModuleType) -> None:
    """Refuse a `strategies` package that stands elsewhere than beside fedkd."""
    here = Path(__file__).resolve().parent.parent
    there = Path(package.__file__ or "").resolve().parent.parent
    if here != there:
        raise FedkdError(
            f"the package 'strategies' in {there} hides fedkd's own in {here}; rename your folder, "
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
