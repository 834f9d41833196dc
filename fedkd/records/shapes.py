"""What the files of a run folder hold: types and bounds, checked once where a file is read.

A folder may have been edited, cut off or sent by somebody else. What is declared here holds for all that
was read; other keys may hold any JSON. `docs/records.md` says what the fields mean.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    JsonValue,
    TypeAdapter,
    ValidationError,
    model_validator,
)

from fedkd.errors import one_line
from fedkd.keys import Scalar


def _scalar(value: object) -> object:
    if not isinstance(value, Scalar):
        raise ValueError("must be text, a number or a boolean")
    return value


Share = Annotated[float, Field(ge=0, le=1 + 1e-6)]
"""A share or accuracy, which rounding may leave above 1."""

Amount = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(ge=0, lt=2**63)]
Positive = Annotated[int, Field(ge=1, lt=2**63)]
Clients = list[Count]
Value = Annotated[Any, BeforeValidator(_scalar)]
"""The value of a key of the experiment."""


class Shape(BaseModel):
    """An object in a file."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False, extra="allow")
    __pydantic_extra__: dict[str, JsonValue] = Field(init=False)


def equal_lengths(lists: Iterable[tuple[str, list[Any] | None]], length: int) -> None:
    """Raise an error for the first list that has another length; `None` has any.

    Raises:
        ValueError: there is one.
    """
    for name, values in lists:
        if values is not None and len(values) != length:
            raise ValueError(f"{name} must have {length} entries, and has {len(values)}")


# --- A federation ---------------------------------------------------------------------------------

_KINDS: dict[str, Any] = {
    "accuracy": Share | None,
    "own_accuracy": Share | None,
    "agreement": Share | None,
    "knowledge_accuracy": Share | None,
    "client_": list[Share | None],
    "loss_": float | None,
    "gradient_norm_": Amount | None,
    "knowledge_": Amount | None,
}
"""Fields that not all rounds have, or that are named after phases; the first prefix that fits."""

_BY_PREFIX: dict[str, TypeAdapter[Any]] = {
    prefix: TypeAdapter(kind, config=Shape.model_config) for prefix, kind in _KINDS.items()
}


class Round(Shape):
    """A line of ``rounds.jsonl``."""

    round: Positive
    sampled: Clients
    answered: Clients
    dropped: dict[str, str]
    enrolled_again: Clients = []
    withheld: dict[str, Clients] = {}
    accepted: bool
    events: dict[str, Count] = {}
    knowledge_round: Count | None = None
    server_accuracy: Share | None
    epsilon: Amount | None = None
    bytes_up: Count
    bytes_down: Count
    seconds: dict[str, Amount]

    @model_validator(mode="after")
    def _fields_of_phases(self) -> Self:
        for name, value in self.__pydantic_extra__.items():
            kind = next((k for prefix, k in _BY_PREFIX.items() if name.startswith(prefix)), None)
            if kind is not None:
                try:
                    kind.validate_python(value)
                except ValidationError as error:
                    raise ValueError(misfit(error, name)) from None
            if name.startswith("client_"):
                equal_lengths([(name, value)], len(self.answered))  # type: ignore[list-item]
        if "round" not in self.seconds:
            raise ValueError("seconds has no 'round'")
        return self


class Result(Shape):
    """``result.json`` of a federation."""

    accuracy: Share | None
    client_accuracy: Annotated[list[Share | None], Field(min_length=1)]
    training_accuracy: Share | None = None
    client_training_accuracy: list[Share | None] | None = None
    server_accuracy: Share | None
    epsilon: Amount | None = None
    dropped: dict[str, str]
    withheld: dict[str, Clients] = {}
    rounds: Positive
    bytes_up: Count
    bytes_down: Count
    test_size: Positive
    seconds: Amount

    @model_validator(mode="after")
    def _one_entry_a_client(self) -> Self:
        clients = self.client_training_accuracy
        equal_lengths([("client_training_accuracy", clients)], len(self.client_accuracy))
        for name, mean, each in (
            ("accuracy", self.accuracy, self.client_accuracy),
            ("training_accuracy", self.training_accuracy, clients or []),
        ):
            if mean is not None and all(value is None for value in each):
                raise ValueError(f"{name} must be null, as no client has one")
        return self


class Shards(Shape):
    """``shards.json``."""

    classes: Annotated[list[str], Field(min_length=2)]
    counts: Annotated[list[list[Count]], Field(min_length=1)]
    public: list[Count] | None
    test: list[Count] | None = None

    @model_validator(mode="after")
    def _one_entry_a_class(self) -> Self:
        rows = [("counts", row) for row in self.counts]
        equal_lengths([*rows, ("public", self.public), ("test", self.test)], len(self.classes))
        if not all(map(sum, self.counts)):
            raise ValueError("counts must have an image of every client")
        return self


class Reliability(Shape):
    """Answers by bin of confidence."""

    count: list[Count]
    confidence: list[Share | None]
    accuracy: list[Share | None]

    @model_validator(mode="after")
    def _one_entry_a_bin(self) -> Self:
        means = (("confidence", self.confidence), ("accuracy", self.accuracy))
        equal_lengths(means, len(self.count))
        for name, values in means:
            if any(n and v is None for n, v in zip(self.count, values, strict=True)):
                raise ValueError(f"{name} must be given where count is not 0")
        return self


class KnowledgeOfRound(Shape):
    """A line of ``knowledge.jsonl``."""

    round: Positive
    by: Literal["label", "predicted"]
    by_class: Annotated[list[list[Share] | None], Field(min_length=2)]
    reliability: Reliability | None

    @model_validator(mode="after")
    def _square(self) -> Self:
        equal_lengths((("by_class", row) for row in self.by_class), len(self.by_class))
        if self.reliability is not None:
            equal_lengths([("reliability.count", self.reliability.count)], 15)
        return self


# --- A central baseline ---------------------------------------------------------------------------


class Course(Shape):
    """How a model trained, by seed."""

    loss: list[Annotated[list[float | None], Field(min_length=1)]]
    gradient_norm: list[list[Amount | None]]
    accuracy: list[Share]
    frequent: list[Share] | None = None


class CentralResult(Shape):
    """``result.json`` of a central baseline."""

    seeds: Annotated[list[Count], Field(min_length=1)]
    teacher_accuracies: list[Share]
    student_alone_accuracies: list[Share]
    student_accuracies: list[Share]
    agreements: list[Share]
    parameters: dict[Literal["teacher", "student"], Count]
    test_size: Positive
    seconds: dict[str, Amount]
    training: dict[Literal["teacher", "student-alone", "student-distilled"], Course]
    soft_label_entropy: list[Amount | None]
    soft_label_entropy_at_tau: list[Amount | None]

    @model_validator(mode="after")
    def _one_entry_a_seed(self) -> Self:
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError("seeds must differ")
        for name, found, models in (
            ("parameters", self.parameters, 2),
            ("training", self.training, 3),
        ):
            if len(found) != models:
                raise ValueError(f"{name} must have an entry of each model")
        by_seed = [(name, each) for name, each in self if isinstance(each, list)]
        by_seed += [(f"training.{name}", each) for course in self.training.values()
                    for name, each in course if isinstance(each, list)]  # fmt: skip
        equal_lengths(by_seed, len(self.seeds))
        for course in self.training.values():
            by_epoch = [("loss", row) for row in course.loss]
            by_epoch += [("gradient_norm", row) for row in course.gradient_norm]
            equal_lengths(by_epoch, len(course.loss[0]))
        return self


# --- Any run --------------------------------------------------------------------------------------


class IdentityRecord(Shape):
    """``identity.json``."""

    software: dict[str, str] = {}
    keys: dict[str, Value | None] = {}
    data: dict[str, str] = {}
    code: dict[str, str] = {}
    weights: dict[str, str] = {}


# --- In words -------------------------------------------------------------------------------------

_LONGEST = 60
"""Most characters of a value in words."""

_OBJECT = ("model_type", "dict_type")


def misfit(error: ValidationError, inside: str = "") -> str:
    """Return in words what does not fit first: where it is, the value, and what is accepted.

    Args:
        error: pydantic's report.
        inside: the key that holds what was checked.
    """
    first = error.errors()[0]
    where = ".".join(str(part) for part in (inside, *first["loc"]) if part != "")
    if first["type"] == "missing":
        return f"{where} is missing"
    text = first["msg"].removeprefix("Value error, ")
    accepted = (
        "must be an object" if first["type"] in _OBJECT else text.replace("Input should", "must")
    )
    is_whole = first["type"] == "value_error" and isinstance(first["input"], dict)
    if is_whole or not where:
        return f"{where}: {accepted}" if where else accepted
    return f"{where} = {one_line(repr(first['input']), _LONGEST)}: {accepted}"
