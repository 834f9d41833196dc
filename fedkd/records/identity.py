"""What a run is known by: all that its numbers depend on, by name, so that a change can be named.

``identity.json`` in the run folder holds it; `fedkd.engines.identity` works it out.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from hashlib import blake2b
from typing import Any

from fedkd.experiment import Experiment
from fedkd.keys import AUTO, kebab

FILE = "identity.json"

Identity = Mapping[str, Mapping[str, Any]]
"""``software``, ``keys``, ``data``, ``code`` and ``weights``: values or fingerprints by name."""

_WORDS = {
    "software": "{}",
    "keys": "{}",
    "data": "the {} images or their labels",
    "code": "the code of {}",
    "weights": "the initial weights of {}",
}
_LONGEST = 60
"""Most characters of a value in words."""

_NAMES = {"train": "training"}


def as_one(identity: Identity) -> str:
    """Return a fingerprint of an identity: 16 hexadecimal digits."""
    return blake2b(json.dumps(identity, sort_keys=True).encode(), digest_size=8).hexdigest()


def keys_of(experiment: Experiment, besides: Iterable[str] = ()) -> dict[str, Any]:
    """Return the keys of an experiment that may change numbers, with their values.

    The number of rounds is not one of them: a longer run begins as a shorter one does.

    Args:
        experiment: of a run.
        besides: names of keys that this kind of run does not read.
    """
    left_out = {"num_server_rounds", *Experiment.keys("bookkeeping"), *besides}
    values = experiment.model_dump()
    return {kebab(name): value for name, value in values.items() if name not in left_out}


def changes(before: Identity, now: Identity) -> list[str]:
    """Return in words what differs between a run and what would be run now; empty if nothing does.

    Args:
        before: of the run; it may hold the weights of more seeds.
        now: the kinds that are compared.
    """
    return [
        _WORDS[kind].format(_NAMES.get(name, name))
        + _values(kind, before.get(kind, {}).get(name), value)
        for kind in now
        for name, value in _compared(kind, before.get(kind, {}), now[kind])
        if before.get(kind, {}).get(name) != value
    ]


def counted(reasons: Iterable[Sequence[str]]) -> str:
    """Return in words how often which changes made something out of date; empty if none did.

    Args:
        reasons: of each thing what `changes` says.
    """
    counts = Counter("; ".join(changed) for changed in reasons)
    return ", ".join(f"{count} as of {why}" for why, count in counts.items())


def _compared(
    kind: str, before: Mapping[str, Any], now: Mapping[str, Any]
) -> Iterator[tuple[str, Any]]:
    """Yield what there is now, and what there was before and is no more."""
    yield from now.items()
    if kind in ("data", "code"):
        yield from ((name, None) for name in before if name not in now)


def _values(kind: str, before: Any, now: Any) -> str:
    """Return both values, where they say something to a reader."""
    if kind == "keys":
        return f" = {_written(now)}, was {_written(before)}"
    if kind == "code" and None in (before, now):
        return " (no longer used)" if now is None else " (not used before)"
    is_version = "." in str(before) + str(now)
    return f" {now}, was {before}" if kind == "software" and is_version else ""


def _written(value: Any) -> str:
    text = str(value).lower() if isinstance(value, bool) else AUTO if value is None else str(value)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."
