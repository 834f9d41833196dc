"""Phases: the sentences in which a strategy tells a client what to do.

A message carries a list of phases. The usual round is digest (distil received knowledge into the
student), revisit (train on the private shard), predict (answer with soft labels). Digest and revisit
are one procedure, `Fit`, with other data and loss terms.

Loss terms travel by reference, ``module:function``; a client resolves one only inside `fedkd.losses`,
`strategies` and the modules that its own ``client-code`` key names.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from importlib import import_module
from typing import Any, Literal, TypeAlias

from fedkd import losses
from fedkd.errors import FedkdError
from fedkd.knowledge import Space
from fedkd.losses import Term
from fedkd.references import in_one_line

Role = Literal["student", "teacher"]
"""Which local model: a client without a local teacher takes its student for both."""

Coefficient: TypeAlias = float | Literal["alpha", "1-alpha"]
"""A number, or the experiment's α or 1 − α."""


@dataclass(frozen=True)
class Load:
    """Replace the student's weights by the received ones; skipped where none were received."""

    name: str = "load"


@dataclass(frozen=True)
class Fit:
    """Train a local model with a fresh optimiser.

    An epoch runs over the public samples that knowledge came for if `public` is given (all public
    samples where no term needs knowledge), else over the private shard. On an unlabelled public set
    ``ce`` takes a private batch drawn in the same step. Terms that need knowledge which has not come,
    or which this client has digested already, are skipped, and so is the phase if none is left.

    Attributes:
        name: names the phase in records (``accuracy_after_<name>``).
        model: which local model is trained.
        private: coefficients by term reference, on the private shard.
        public: the same on public samples.
        epochs: passes; ``None`` means ``distill-epochs`` with `public`, else ``local-epochs``.
        numbers: what terms read from ``step.numbers``; ``tau`` is added from the experiment.
    """

    name: str
    model: Role = "student"
    private: Mapping[str, Coefficient] = field(default_factory=dict)
    public: Mapping[str, Coefficient] = field(default_factory=dict)
    epochs: int | None = None
    numbers: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Predict:
    """Answer with a local model's soft labels on the public samples asked for."""

    space: Space = "logits"
    model: Role = "teacher"
    name: str = "predict"


@dataclass(frozen=True)
class SendWeights:
    """Answer with the student's parameters and buffers."""

    name: str = "send"


Phase: TypeAlias = Load | Fit | Predict | SendWeights
_PHASES: dict[str, Callable[..., Phase]] = {
    cls.__name__: cls for cls in (Load, Fit, Predict, SendWeights)
}
ANSWERS = (Predict, SendWeights)


def Digest(loss: Term | str = losses.kl, epochs: int | None = None) -> Fit:
    """Distil received soft labels into the student: α · `loss` + (1 − α) · CE."""
    public: dict[str, Coefficient] = {reference(loss): "alpha", "ce": "1-alpha"}
    return Fit("digest", "student", public=public, epochs=epochs)


def Revisit(
    private: Mapping[Term | str, Coefficient] | None = None,
    model: Role = "teacher",
    epochs: int | None = None,
    numbers: Mapping[str, float] | None = None,
) -> Fit:
    """Train on the private shard, by cross entropy if no other terms are given."""
    terms = {reference(t): c for t, c in (private or {"ce": 1.0}).items()}
    return Fit("revisit", model, private=terms, epochs=epochs, numbers=numbers or {})


def reference(term: Term | str) -> str:
    """Return the name under which a term travels: short for those of `fedkd.losses`."""
    name = term if isinstance(term, str) else term.reference
    return name.removeprefix("fedkd.losses:")


def resolve_term(name: str, client_code: Sequence[str] = ()) -> Term:
    """Find a term by reference.

    Args:
        name: ``function`` of `fedkd.losses`, or ``module:function``.
        client_code: modules that this client allows besides `fedkd.losses` and `strategies`.

    Raises:
        FedkdError: the module is not allowed, or holds no such term.
    """
    module, _, function = name.rpartition(":")
    module = module or "fedkd.losses"
    allowed = ("fedkd.losses", "strategies", *client_code)
    if not any(module == a or module.startswith(f"{a}.") for a in allowed):
        raise FedkdError(
            f"the instruction names {name}, but this client only runs code of {', '.join(allowed)}; "
            "add the module to client-code if you trust it"
        )
    try:
        found = getattr(import_module(module), function, None)
    except Exception as error:  # importing runs the module
        raise FedkdError(f"{name} is not a loss term: {in_one_line(error)}") from None
    if not isinstance(found, Term):
        raise FedkdError(f"{name} is not a loss term: declare it with @term at the top of {module}")
    return found


def to_text(phases: Sequence[Phase]) -> str:
    """Encode phases as JSON."""
    return json.dumps([{"phase": type(phase).__name__, **vars(phase)} for phase in phases])


@lru_cache(maxsize=64)
def from_text(text: str) -> tuple[Phase, ...]:
    """Decode `to_text`; the same text gives the same phases, as every client of a round has them.

    Raises:
        FedkdError: the text is not a list of phases.
    """
    try:
        entries: list[dict[str, Any]] = json.loads(text)
        if not isinstance(entries, list):
            raise TypeError("not a list")
        return tuple(_PHASES[entry.pop("phase")](**entry) for entry in entries)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise FedkdError(f"the instruction's phases cannot be read: {error}") from None


def closing(phases: Sequence[Phase], last: Literal["digest", "revisit"]) -> list[Phase]:
    """Cut a round's phases down to the closing exchange.

    Cut before the first answer, and if the algorithm closes with its digest also before the first fit
    on private data only: the last knowledge is taken in, and nothing more.
    """
    kept: list[Phase] = []
    for phase in phases:
        private_only = isinstance(phase, Fit) and not phase.public
        if isinstance(phase, ANSWERS) or (last == "digest" and private_only):
            break
        kept.append(phase)
    return kept
