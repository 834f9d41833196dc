"""Phases: the steps of an instruction, from which a strategy composes what clients do.

A message carries a list of phases. The usual round is digest (distil received knowledge into the
student), revisit (train on the private shard), predict (answer with soft labels). Digest and revisit
are one phase, `Fit`, with other data and loss terms.

A *procedure* is a function of one client's data and models, called client by client, once a round: it
chooses among what was received, or computes tensors of its own and keeps them in the client's state.

Loss terms and procedures travel by reference, ``module:function``; a client resolves one only inside
`fedkd.losses`, `strategies`, installed strategies, and the modules that its own ``client-code`` names.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from importlib import import_module
from importlib.metadata import entry_points
from math import isfinite
from typing import Any, ClassVar, Literal, Protocol, TypeAlias, TypeVar, get_args

import torch
from torch import Tensor

from fedkd import losses
from fedkd.errors import FedkdError, nearest, one_line
from fedkd.experiment import Experiment
from fedkd.knowledge import ClassMeans, Knowledge, Output, SoftLabels, Space, Weights
from fedkd.losses import Term, kl_term
from fedkd.user_code import check_defined_within, is_name, is_within

GROUP = "fedkd.strategies"
"""Entry-point group of strategies that other packages install."""

Role = Literal["student", "teacher"]
"""Which local model: a client without a local teacher uses its student for both."""

Coefficient: TypeAlias = float | Literal["alpha", "1-alpha"]
"""A number, or the experiment's α or 1 − α."""


# --- Procedures -----------------------------------------------------------------------------------


class Predictor(Protocol):
    """Predicts for public samples with one of a client's models."""

    def __call__(self, samples: Tensor, model: Role = "teacher") -> Tensor:
        """Return logits ``[N, C]`` for samples int64 ``[N]``."""
        ...


@dataclass(eq=False)
class LocalClient:
    """What a procedure sees of its client.

    Attributes:
        images: normalised private images ``[n, c, h, w]``.
        labels: int64 ``[n]``.
        received: soft labels received, or ``None``; may be replaced by others, of one sample or more.
        state: tensors by name that the client keeps between rounds; the same names, types and shapes
            for all clients, round after round.
        predict: returns logits ``[N, C]`` of a local model for public samples (int64 ``[N]``), as in
            ``predict(samples, "student")``; by default the teacher's (without one, the student's).
        generator: returns a random generator for a purpose; its stream is this client's in this round.
        load_public: builds `public` when it is first read.
    """

    images: Tensor
    labels: Tensor
    received: SoftLabels | None
    state: dict[str, Tensor]
    predict: Predictor
    generator: Callable[[str], torch.Generator]
    load_public: Callable[[], Tensor]

    @property
    def public(self) -> Tensor:
        """Normalised public images ``[P, c, h, w]``."""
        return self.load_public()


ProcedureFunction = Callable[..., None]


@dataclass(frozen=True)
class Procedure:
    """A function that clients run in an `Apply` phase."""

    function: ProcedureFunction

    @property
    def import_path(self) -> str:
        """The ``module:function`` under which the procedure travels."""
        return f"{self.function.__module__}:{self.function.__qualname__}"

    def __call__(self, client: LocalClient, **numbers: Any) -> None:
        """Run the function for one client; `numbers` are those of the phase."""
        self.function(client, **numbers)


def procedure(function: ProcedureFunction) -> Procedure:
    """Return a module-level function ``(client, **numbers) -> None`` as a procedure."""
    return Procedure(function)


def check_received(procedure: Procedure, labels: object) -> None:
    """Raise an error unless a procedure replaced the received soft labels by valid ones.

    Raises:
        FedkdError: `labels` are not soft labels, or of no sample.
    """
    name = procedure.import_path
    if not isinstance(labels, SoftLabels):
        raise FedkdError(f"{name} sets received to a {type(labels).__name__}: must be SoftLabels")
    if not labels.values.numel():
        raise FedkdError(f"{name} sets received to soft labels of no sample: keep at least one")


# --- Phases ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Load:
    """Replace the student's weights by the received ones; skipped where none were received."""

    name: str = "load"


@dataclass(frozen=True)
class Reset:
    """Put the student back to the initial weights that all clients share.

    What was digested is forgotten with them: received knowledge counts as new again.
    """

    name: str = "reset"


@dataclass(frozen=True)
class Apply:
    """Run a procedure, client by client.

    Attributes:
        procedure: a `Procedure`, or its reference ``module:function``.
        numbers: the procedure's keyword arguments.
        name: names the phase in records (``seconds``).
    """

    procedure: Procedure | str
    numbers: Mapping[str, float | int | str | bool] = field(default_factory=dict)
    name: str = "apply"

    def __post_init__(self) -> None:
        object.__setattr__(self, "procedure", import_path(self.procedure))
        for name, value in self.numbers.items():
            if not (isinstance(value, bool | str) or _is_number(value)):
                raise FedkdError(
                    f"numbers of {self.name}: {name} = {value!r} must be a finite number or a string"
                )


@dataclass(frozen=True)
class Fit:
    """Train a local model with a fresh optimiser.

    With `public`, an epoch runs over the public samples for which knowledge was received (all public
    samples where no term needs knowledge); without it, over the private shard. On an unlabelled public
    set ``ce`` takes a private batch drawn in the same step. Terms are skipped if they need knowledge
    that was not received, or soft labels that the client has digested already; the phase is skipped if
    no term is left.

    Attributes:
        name: names the phase in records (``accuracy_after_<name>``).
        model: which local model is trained.
        private: coefficients by term (or its reference), on the private shard.
        public: the same on public samples.
        epochs: passes; ``None`` means ``distill-epochs`` with `public`, else ``local-epochs``.
        numbers: what terms read from ``step.numbers``; ``tau`` is added from the experiment.
    """

    name: str
    model: Role = "student"
    private: Mapping[Any, Coefficient] = field(default_factory=dict)
    public: Mapping[Any, Coefficient] = field(default_factory=dict)
    epochs: int | None = None
    numbers: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for side in ("private", "public"):
            object.__setattr__(self, side, _terms(getattr(self, side)))
        _check_choice(self, "model", get_args(Role))
        if self.epochs is not None and (type(self.epochs) is not int or self.epochs < 1):
            raise FedkdError(
                f"epochs = {self.epochs!r} of {self.name}: must be a whole number >= 1"
            )
        for name, number in self.numbers.items():
            if not _is_number(number):
                raise FedkdError(
                    f"numbers of {self.name}: {name} = {number!r} must be a finite number"
                )


@dataclass(frozen=True)
class Predict:
    """Answer with a local model's soft labels on the public samples asked for."""

    sends: ClassVar[type[Knowledge]] = SoftLabels

    space: Space = "logits"
    model: Role = "teacher"
    name: str = "predict"
    only: str | None = None
    """Answer only the samples for which this tensor of the client's state (bool ``[P]``) is true."""

    def __post_init__(self) -> None:
        _check_choice(self, "space", get_args(Space))
        _check_choice(self, "model", get_args(Role))


@dataclass(frozen=True)
class MeanByClass:
    """Answer with a local model's mean output by class over the private shard."""

    sends: ClassVar[type[Knowledge]] = ClassMeans

    of: Output = "probabilities"
    model: Role = "student"
    name: str = "means"

    def __post_init__(self) -> None:
        _check_choice(self, "of", get_args(Output))
        _check_choice(self, "model", get_args(Role))


@dataclass(frozen=True)
class ClassifyByMeans:
    """From here on, classify by the nearest received class mean, not by the model's head.

    Skipped where none were received.
    """

    name: str = "classify"


@dataclass(frozen=True)
class SendWeights:
    """Answer with the student's parameters and buffers."""

    sends: ClassVar[type[Knowledge]] = Weights

    name: str = "send"


Phase: TypeAlias = (
    Reset | Load | Apply | Fit | ClassifyByMeans | Predict | MeanByClass | SendWeights
)
_PHASES: dict[str, Callable[..., Phase]] = {cls.__name__: cls for cls in get_args(Phase)}
ANSWERING = (Predict, MeanByClass, SendWeights)


def Digest(loss: Term | str = losses.kl, epochs: int | None = None) -> Fit:
    """Return the fit that distils received soft labels into the student: α · `loss` + (1 − α) · CE."""
    return Fit("digest", public={loss: "alpha", "ce": "1-alpha"}, epochs=epochs)


def Revisit(
    private: Mapping[Term | str, Coefficient] | None = None,
    model: Role = "teacher",
    epochs: int | None = None,
    numbers: Mapping[str, float] | None = None,
) -> Fit:
    """Return the fit on the private shard, by cross entropy if no other terms are given."""
    terms = private or {"ce": 1.0}
    return Fit("revisit", model, private=terms, epochs=epochs, numbers=numbers or {})


def _terms(terms: Mapping[Any, Coefficient]) -> dict[str, Coefficient]:
    named = {import_path(term): coefficient for term, coefficient in terms.items()}
    for name, coefficient in named.items():
        if coefficient not in get_args(get_args(Coefficient)[1]) and not _is_number(coefficient):
            raise FedkdError(
                f"coefficient {coefficient!r} of {name}: must be a finite number, 'alpha' or '1-alpha'"
            )
    return named


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value)


def _check_choice(phase: Any, field: str, accepted: Sequence[str]) -> None:
    value = getattr(phase, field)
    if value not in accepted:
        raise FedkdError(
            f"{field} = {value!r} of {type(phase).__name__}: must be one of {', '.join(accepted)}"
            f"{nearest(str(value), accepted)}"
        )


# --- Code by reference ----------------------------------------------------------------------------


def import_path(code: object) -> str:
    """Return the name under which a term or procedure travels: short for those of `fedkd.losses`.

    Raises:
        FedkdError: it is neither, or is not defined at the top of a module.
    """
    if not isinstance(code, Term | Procedure | str):
        name = getattr(code, "__name__", repr(code))
        raise FedkdError(
            f"{name} is neither a loss term nor a procedure: decorate a function at the top of a module "
            "with @term or @procedure (a lambda cannot be sent)"
        )
    name = code if isinstance(code, str) else code.import_path
    if "<" in name:
        raise FedkdError(
            f"{name}: clients import code by name, and a lambda or a nested function has none; define "
            "it at the top of a module, and pass what varies as numbers"
        )
    return name.removeprefix("fedkd.losses:")


def resolve_term(name: str, client_code: Sequence[str] = ()) -> Term:
    """Return a term by reference.

    Args:
        name: ``function`` of `fedkd.losses`, or ``module:function``.
        client_code: modules that this client allows besides fedkd's and those of installed strategies.

    Raises:
        FedkdError: the module is not allowed, or has no such term.
    """
    return _resolve(name, Term, "loss term: declare it with @term", client_code)


def experiment_term(name: str, experiment: Experiment) -> Term:
    """Return a term by reference; ``kl`` follows the experiment's ``kl-reduction``.

    Raises:
        FedkdError: see `resolve_term`.
    """
    if name == "kl":
        return kl_term(experiment.kl_reduction)
    return resolve_term(name, experiment.client_modules)


def resolve_procedure(name: str, client_code: Sequence[str] = ()) -> Procedure:
    """Return a procedure by reference; see `resolve_term`."""
    return _resolve(name, Procedure, "procedure: declare it with @procedure", client_code)


_Code = TypeVar("_Code", Term, Procedure)


def _resolve(name: str, kind: type[_Code], what: str, client_code: Sequence[str]) -> _Code:
    module, _, function = name.rpartition(":")
    module = module or "fedkd.losses"
    allowed = ("fedkd.losses", "strategies", *installed_modules(), *client_code)
    if not is_within(module, allowed):
        raise FedkdError(
            f"the instruction names {name}, but this client only runs code of {', '.join(allowed)}; "
            "add the module to client-code if you trust it"
        )
    thing, _, advice = what.partition(": ")
    try:
        code = getattr(import_module(module), function, None) if is_name(function) else None
    except Exception as error:  # importing runs the module
        raise FedkdError(f"{name} is not a {thing}: {one_line(error)}") from None
    if not isinstance(code, kind):
        known = [n for n, v in vars(import_module(module)).items() if isinstance(v, kind)]
        raise FedkdError(
            f"{name} is not a {thing}{nearest(function, known)}: {advice} at the top of {module}"
        )
    try:
        check_defined_within(code.function, allowed)
    except FedkdError as error:
        raise FedkdError(f"{name} {error}") from None
    return code


@lru_cache(maxsize=1)
def installed_modules() -> tuple[str, ...]:
    """Return the modules of the strategies that installed packages provide."""
    return tuple(sorted({point.module for point in entry_points(group=GROUP)}))


# --- Lists of phases ------------------------------------------------------------------------------


def check_phases(phases: object) -> list[Phase]:
    """Return a strategy's phases as a list.

    Raises:
        FedkdError: `phases` is not a list of phases, or asks a client for two answers.
    """
    if not isinstance(phases, list | tuple) or not all(isinstance(p, Phase) for p in phases):
        raise FedkdError(f"{phases!r} is not a list of phases")
    answers = [type(phase).__name__ for phase in phases if isinstance(phase, ANSWERING)]
    if len(answers) > 1:
        raise FedkdError(f"asks for {' and '.join(answers)}: a client answers once a round")
    return list(phases)


def to_text(phases: Sequence[Phase]) -> str:
    """Return phases as JSON."""
    return json.dumps([{"phase": type(phase).__name__, **vars(phase)} for phase in phases])


@lru_cache(maxsize=64)
def from_text(text: str) -> tuple[Phase, ...]:
    """Return the phases in a text of `to_text`: the same objects for the same text.

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
    """Return those of a round's phases that run in the closing exchange.

    They end before the first answer and, if the algorithm closes with its digest, before the first fit
    on private data alone: clients learn from the last knowledge and do nothing more.
    """
    first_phases: list[Phase] = []
    for phase in phases:
        private_only = isinstance(phase, Fit) and not phase.public
        if isinstance(phase, ANSWERING) or (last == "digest" and private_only):
            break
        first_phases.append(phase)
    return first_phases
