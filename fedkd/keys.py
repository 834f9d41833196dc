"""What a key of the experiment is: its role, its spelling and the values it accepts.

`Experiment` declares every key with `declared`. Whoever needs the keys of a kind asks `Experiment.keys`
for their roles, so that a new key is placed once, where it is declared.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal, get_args, get_origin

from pydantic import Field, ValidationError
from pydantic.fields import FieldInfo

from fedkd.errors import FedkdError, Setting, nearest

Scalar = bool | int | float | str

AUTO = "auto"
"""How an optional key (``None`` in Python) is written in TOML, on the command line and on the wire."""

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

- ``data``: which images are pooled, tested on, and public.
- ``federated data``: who holds which of them, and what is known of the public ones.
- ``models``: architectures of the clients and of the central baseline.
- ``federation``: the method and its rounds; the central baseline does not read it.
- ``evaluation``: when clients test; no training depends on it.
- ``training``: how all models are trained, alike for all that train side by side.
- ``optimisation``: the same, but clients that train side by side may differ in it.
- ``distillation``: the same of students only; a teacher does not depend on it.
- ``seed``: of anything random.
- ``clients``: where and how clients run; changes no number beyond rounding.
- ``machine``: how models are run, in a federation or not; changes no number beyond rounding.
- ``bookkeeping``: where files lie and what is measured beside; changes no number.
"""


def declared(
    role: Role,
    default: Any,
    description: str,
    *,
    accepted: str | None = None,
    names_code: bool = False,
    node_decides: bool = False,
    **bounds: Any,
) -> Any:
    """Return the pydantic field of a key.

    Args:
        role: see `Role`.
        default: its value where nobody gives one.
        description: one line, as in the help of the command line.
        accepted: the values it accepts in words, where type and bounds do not say it.
        names_code: whether its value may name a module whose code a client runs.
        node_decides: whether the node of a deployment sets it for itself, whatever the server says.
        bounds: pydantic's own (``ge``, ``lt``, ``pattern``, ...).
    """
    said: dict[str, Any] = {"role": role, "names_code": names_code, "node_decides": node_decides}
    said["accepted"] = accepted
    return Field(default, description=description, json_schema_extra=said, **bounds)


def extra(field: FieldInfo, name: str) -> Any:
    """Return what `declared` was given of a key; `None` of the settings of a strategy."""
    given = field.json_schema_extra
    return given.get(name) if isinstance(given, dict) else None


def kebab(name: str) -> str:
    """Spell a key as in TOML and on the command line."""
    return name.replace("_", "-")


def snake(name: str) -> str:
    """Spell a key as in Python."""
    return name.replace("-", "_")


def accepted(field: FieldInfo) -> str:
    """Return in words which values a key accepts (``0 to 1``, ``iid, dirichlet, ...``)."""
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
"""Words that other frameworks use, answered with ours."""

FROM_PYTHON = "Python"
"""Source of keys that are given as keyword arguments."""

Fields = Mapping[str, FieldInfo]
"""The keys of the experiment by name in Python."""


def unknown(name: str, source: str, fields: Fields) -> str:
    """Return what is wrong with a key that there is not, with the key that was probably meant."""
    spell = snake if source == FROM_PYTHON else kebab
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
