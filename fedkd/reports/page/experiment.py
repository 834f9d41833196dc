"""The experiment in a report: resolved keys, versions, and the command that repeats it."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence

from fedkd.experiment import Experiment
from fedkd.keys import AUTO, Scalar, kebab

_PLACE = ("name", "run_dir")
"""Keys for the place of a run's folder; a repetition has another."""


def differing(experiments: Sequence[Experiment]) -> list[tuple[str, str, str]]:
    """Return key, value and default of the keys that differ from the defaults in any experiment."""
    rows = []
    for name, field in Experiment.model_fields.items():
        values = _values(experiments, name)
        if name not in _PLACE and values != [field.default]:
            rows.append((kebab(name), _listed(values), _text(field.default)))
    return rows


def keys(experiments: Sequence[Experiment]) -> list[tuple[str, str]]:
    """Return every key with its value, or values."""
    return [(kebab(name), _listed(_values(experiments, name))) for name in Experiment.model_fields]


def _values(experiments: Sequence[Experiment], name: str) -> list[Scalar | None]:
    return list(dict.fromkeys(getattr(experiment, name) for experiment in experiments))


def _listed(values: Sequence[Scalar | None]) -> str:
    shown = [_text(value) for value in values]
    return ", ".join(shown) if len(shown) <= 12 else f"{', '.join(shown[:10])}, … ({len(shown)})"


def _text(value: Scalar | None) -> str:
    if value is None:
        return AUTO
    return str(value).lower() if isinstance(value, bool) else str(value)


def command(
    what: str, experiment: Experiment, options: Mapping[str, str], leave: Sequence[str] = ()
) -> list[str]:
    """Return a command line that repeats an experiment, in parts for one line each.

    Args:
        what: the command, such as ``run``.
        experiment: its keys that differ from the defaults become flags.
        options: other flags and their values, which come first.
        leave: keys to leave out.
    """
    parts = [["fedkd", what], *([f"--{flag}", value] for flag, value in options.items())]
    for name, field in Experiment.model_fields.items():
        value = getattr(experiment, name)
        if name not in (*_PLACE, *leave) and value != field.default:
            parts.append([f"--{kebab(name)}", _text(value)])
    return [shlex.join(part) for part in parts]
