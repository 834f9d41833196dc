"""The keys of an experiment: role, spelling, accepted values, and error messages.

`Experiment` declares every key with `declared`. Code that needs the keys with certain roles calls
`Experiment.keys`, so that a new key gets its role once, where it is declared.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args, get_origin

from pydantic import Field, ValidationError
from pydantic.fields import FieldInfo

from fedkd.errors import FedkdError, Setting, nearest

Scalar = bool | int | float | str

AUTO = "auto"
"""An optional key that is ``None`` in Python, as written in TOML, commands and messages."""

Fields = Mapping[str, FieldInfo]
"""The keys of the experiment by name in Python."""

Role = Literal[
    "data",
    "federated data",
    "models",
    "federation",
    "evaluation",
    "training",
    "optimisation",
    "distillation",
    "seed",
    "clients",
    "machine",
    "bookkeeping",
]
"""What a key decides.

- ``data``: which images are used for training, for testing and as the public set.
- ``federated data``: which client holds which of them, and whether the public ones have labels.
- ``models``: architectures of the clients and of the central baseline.
- ``federation``: the method and its rounds; the central baseline does not read it.
- ``evaluation``: when clients test; no training depends on it.
- ``training``: how all models are trained; the same for all that train side by side.
- ``optimisation``: likewise, but clients that train side by side may differ in it.
- ``distillation``: likewise, for students only; a teacher does not depend on it.
- ``seed``: the seed of anything random.
- ``clients``: where and how clients run; changes no number beyond rounding.
- ``machine``: how models are run, in a federation or not; changes no number beyond rounding.
- ``bookkeeping``: where files are, and what is measured besides; changes no number.
"""


class Requirement(NamedTuple):
    """What another key must be for a key to have any effect.

    Attributes:
        key: the other key, as in Python.
        values: its values with which the key has an effect; empty: all but its default.
    """

    key: str
    values: tuple[Scalar, ...] = ()

    def is_met(self, values: Mapping[str, object], fields: Fields) -> bool:
        """Whether the keys have `values` with which the key has an effect."""
        value = values[self.key]
        return value in self.values if self.values else value != fields[self.key].default

    def __str__(self) -> str:
        wanted = " or ".join(map(repr, self.values))
        return kebab(self.key) + (f" = {wanted}" if wanted else "")


def declared(
    role: Role,
    default: Any,
    description: str,
    *,
    accepted: str | None = None,
    only_with: Requirement | None = None,
    names_code: bool = False,
    node_decides: bool = False,
    **bounds: Any,
) -> Any:
    """Return the pydantic field of a key.

    Args:
        role: see `Role`.
        default: its value if none is set.
        description: one line, as in the help of the command line.
        accepted: the accepted values in words, where type and bounds do not determine them.
        only_with: without which it has no effect, so that it must keep its default.
        names_code: whether its value may name a module whose code a client runs.
        node_decides: whether each node of a deployment sets it itself, regardless of the server.
        bounds: pydantic's own (``ge``, ``lt``, ``pattern``, ...).
    """
    properties: dict[str, Any] = {
        "role": role,
        "only_with": only_with,
        "names_code": names_code,
        "node_decides": node_decides,
    }
    properties["accepted"] = accepted
    return Field(default, description=description, json_schema_extra=properties, **bounds)


def extra(field: FieldInfo, name: str) -> Any:
    """Return a property of a key as passed to `declared`; `None` for the settings of a strategy."""
    properties = field.json_schema_extra
    return properties.get(name) if isinstance(properties, dict) else None


def without_effect(values: Mapping[str, object], fields: Fields) -> dict[str, Requirement]:
    """Return the keys that have no effect and yet are not at their defaults, with what they need.

    Args:
        values: of all keys, by name in Python.
        fields: the keys of the experiment.
    """
    needs = {name: extra(field, "only_with") for name, field in fields.items()}
    return {
        name: requirement
        for name, requirement in needs.items()
        if requirement is not None
        and values[name] != fields[name].default
        and not requirement.is_met(values, fields)
    }


def kebab(name: str) -> str:
    """Return a key as spelled in TOML and on the command line."""
    return name.replace("_", "-")


def snake(name: str) -> str:
    """Return a key as spelled in Python."""
    return name.replace("-", "_")


def accepted(field: FieldInfo) -> str:
    """Return the values that a key accepts, in words (``0 to 1``, ``iid, dirichlet, ...``)."""
    if (words := extra(field, "accepted")) is not None:
        return str(words)
    annotation = field.annotation
    if get_origin(annotation) is Literal:
        return ", ".join(str(choice) for choice in get_args(annotation))
    if annotation is bool:
        return "true, false"
    low, high, kind = _bounds(field)
    if not low and not high:
        return kind
    if low[2:] == high[2:]:
        return low[2:]
    return f"{kind} " + " and ".join(part for part in (low, high) if part)


def _bounds(field: FieldInfo) -> tuple[str, str, str]:
    low = high = ""
    for constraint in field.metadata:
        for name, sign in (("ge", "≥"), ("gt", ">")):
            if (bound := getattr(constraint, name, None)) is not None:
                low = f"{sign} {bound}"
        for name, sign in (("le", "≤"), ("lt", "<")):
            if (bound := getattr(constraint, name, None)) is not None:
                high = f"{sign} {bound}"
    text = str(field.annotation)
    kind = "whole number" if "int" in text else "number" if "float" in text else "text"
    if "None" in text and kind != "text":
        kind = f"auto, or a {kind}"
    return low, high, kind


def is_file(where: str) -> bool:
    """Whether the part of a name before its colon is a file, and not a module."""
    return where.endswith(".py")


def absolute(name: str) -> str:
    """Return ``file.py:function`` with the file's absolute path, and any other name as it is."""
    where, colon, function = name.rpartition(":")
    return f"{Path(where).expanduser().absolute()}{colon}{function}" if is_file(where) else name


# --- Errors -----------------------------------------------------------------------------------------

_ALIASES = {
    "temperature": "tau",
    "rounds": "num-server-rounds",
    "num-rounds": "num-server-rounds",
    "lr": "learning-rate",
    "epochs": "local-epochs",
    "clients": "num-clients",
    "model": "student",
    "method": "strategy",
}
"""Names that other frameworks use for our keys."""

_CLIPPING = ("grad-clip", "gradient-clip", "clip-grad", "clip-grad-norm", "max-grad-norm")
"""Names that other frameworks use for what fedkd does not do."""

FROM_PYTHON = "Python"
"""Source of keys that are passed as keyword arguments."""


def unknown(name: str, source: str, fields: Fields) -> str:
    """Return the message for a key that does not exist, with the key that was probably meant."""
    spell = snake if source == FROM_PYTHON else kebab
    if kebab(name) in _CLIPPING:
        return f"unknown key '{name}' (from {source}): gradients are not clipped"
    ours = _ALIASES.get(kebab(name))
    hint = f": the key is '{spell(ours)}'" if ours else nearest(spell(name), map(spell, fields))
    return f"unknown key '{name}' (from {source}){hint or '; `fedkd run --help` lists the keys'}"


def refusal(error: ValidationError, origins: Mapping[str, str], fields: Fields) -> FedkdError:
    """Return pydantic's report as one error that names key, value, source and what is accepted.

    Args:
        error: the report.
        origins: by key, where it came from; those that are missing come from Python.
        fields: the keys of the experiment.
    """
    by_key = {problem["loc"][:1]: problem for problem in error.errors()}
    parts: list[str | Setting] = []
    for problem in by_key.values():
        parts += ["; "] if parts else []
        parts += _problem(problem, origins, fields)
    return FedkdError(*parts)


def _problem(problem: Any, origins: Mapping[str, str], fields: Fields) -> Iterable[str | Setting]:
    if not problem["loc"]:  # keys that contradict each other
        contradiction = problem["ctx"]["error"]
        return (
            contradiction.parts if isinstance(contradiction, FedkdError) else [str(contradiction)]
        )
    name = str(problem["loc"][0])
    source = origins.get(name, FROM_PYTHON)
    field = fields.get(name)
    if field is None:
        return [unknown(name, source, fields)]
    value = problem["input"]
    text = f": must be {accepted(field)}"
    if isinstance(value, str) and get_origin(field.annotation) is Literal:
        text += nearest(value, [str(choice) for choice in get_args(field.annotation)])
    if name == "name":
        text += " made of letters, digits, '.', '_' and '-', starting with a letter or digit"
    return [Setting(kebab(name), value, f"from {source}"), text]
