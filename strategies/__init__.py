"""The algorithms, one per file. Every strategy that a file here defines is found by being there.

Type checkers know a strategy by its file: ``from strategies.dsfl import DSFL``.
"""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules
from typing import TYPE_CHECKING, Any

from fedkd.strategy import DistillationStrategy

if TYPE_CHECKING:

    def __getattr__(name: str) -> Any: ...


def _defined_in(module: str) -> list[type[DistillationStrategy]]:
    """Return the strategies that a module defines, leaving out those that it imports."""
    return [
        value
        for value in vars(import_module(module)).values()
        if isinstance(value, type)
        and issubclass(value, DistillationStrategy)
        and value.__module__ == module
    ]


_by_name = {
    cls.name(): cls
    for file in iter_modules(__path__, f"{__name__}.")
    for cls in _defined_in(file.name)
}
globals().update(_by_name)

__all__ = sorted(_by_name, key=lambda name: (not name.isupper(), name))  # acronyms first
