"""The strategy interface: what an algorithm of federated distillation decides.

A strategy is a frozen dataclass of hyper-parameters that overrides one or more of `phases`, `request`,
`aggregate`, `update` and `personalise`. Everything else (the round loop, sampling, checks of replies,
byte counts, records) is done by the federation and is the same for all. The memory of a strategy is
``server.state``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import wraps
from inspect import get_annotations
from typing import (
    Annotated,
    Any,
    ClassVar,
    Literal,
    Self,
    dataclass_transform,
    get_args,
    get_type_hints,
)

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy
from pydantic import Field, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo
from torch import Tensor

from fedkd.clients.attacks import check_attack
from fedkd.clients.privacy import check_privacy
from fedkd.data.federated import federated_data
from fedkd.errors import FedkdError, Setting, nearest
from fedkd.experiment import Experiment
from fedkd.federation.algorithm import Facts
from fedkd.federation.events import Events
from fedkd.federation.round_record import plain_numbers
from fedkd.federation.rounds import Federation
from fedkd.federation.server import Replies, Server
from fedkd.keys import accepted, kebab
from fedkd.knowledge import Knowledge, SoftLabels, Wire
from fedkd.knowledge.wire import PLAIN, parse_codec
from fedkd.phases import ANSWERING, Digest, Phase, Predict, Revisit
from fedkd.records.files import Row
from fedkd.records.folder import RunFolder

__all__ = [
    "Count",
    "DistillationStrategy",
    "Facts",
    "NonNegative",
    "Positive",
    "Replies",
    "Server",
]

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
"""Type of a setting that is a number above 0."""

NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
"""Type of a setting that is a number from 0."""

Count = Annotated[int, Field(ge=1)]
"""Type of a setting that is a whole number from 1."""


@dataclass_transform(kw_only_default=True, frozen_default=True)
class DistillationStrategy(Strategy):
    """Base of all strategies: override what your algorithm does differently.

    Subclasses become frozen, keyword-only dataclasses without a decorator; their fields are scalars.
    """

    facts: ClassVar[Facts]
    closes: ClassVar[Literal["digest", "revisit"]] = "digest"
    """Last phase of the closing exchange, after which final accuracies are taken."""

    # --- what an algorithm decides ------------------------------------------------------------

    def phases(self, round: int) -> list[Phase]:
        """Return what clients do in `round`.

        Round 1 is a client's first: one that joins later begins with the phases of round 1.
        """
        return [Digest(), Revisit(), Predict()]

    def request(self, server: Server) -> Tensor:
        """Return the public samples to be answered this round, int64 ``[M]``, distinct."""
        return server.draw()

    def wire(self) -> tuple[Wire, Wire]:
        """Return how soft labels cross the wire, up and down, unless the key ``codec`` is set."""
        return PLAIN, PLAIN

    def aggregate(self, knowledge: Any) -> Any:
        """Return the combination of what K clients sent: the paper's equation, without a server.

        This is a pure function.

        Args:
            knowledge: what the clients sent: `SoftLabels`, `ClassMeans` or `Weights`.

        Returns:
            ``[N, C]`` in the space of the uploads, or knowledge of K = 1.

        Raises:
            TypeError: the knowledge is of the wrong kind.
        """
        raise FedkdError(f"{type(self).__name__} defines neither aggregate nor update")

    def update(self, replies: Replies, server: Server) -> Knowledge | None:
        """Return new knowledge from a round's replies, or ``None`` to keep the previous."""
        if replies.knowledge is None:
            return None
        return _as_knowledge(self.aggregate(replies.knowledge), replies)

    def personalise(self, knowledge: Knowledge, client: int, server: Server) -> Knowledge:
        """Return what `client` receives; the same object for all who receive the same.

        K = 1, or several sets of soft labels if a procedure of the client chooses among them.
        """
        return knowledge

    # --- as a dataclass of settings --------------------------------------------------------------

    def __new__(cls, **settings: Any) -> Self:
        """Return a new strategy; raise a TypeError for the base itself, or without `facts`."""
        if not isinstance(getattr(cls, "facts", None), Facts):
            raise TypeError(
                f"{cls.__name__} is abstract: a strategy is a subclass of DistillationStrategy that "
                "declares facts = Facts(...)"
            )
        return super().__new__(cls)

    def __post_init__(self) -> None:
        """Check the settings and convert those that are texts.

        Raises:
            FedkdError: a setting is of the wrong type or out of range.
        """
        hints = get_type_hints(type(self), include_extras=True)
        for name, value in self.settings().items():
            object.__setattr__(self, name, _checked(name, value, hints[name], self.name()))

    def __getstate__(self) -> dict[str, Any]:
        """Return the settings for pickling, without the open session."""
        return self.settings()

    def __init_subclass__(cls) -> None:
        _refuse_unannotated(cls)
        if "aggregate" in cls.__dict__:
            setattr(cls, "aggregate", _typed(cls.aggregate))  # noqa: B010 - mypy: a method
        dataclass(frozen=True, kw_only=True)(cls)
        # The dataclass's own refusal does not say where memory belongs.
        setattr(cls, "__setattr__", _unchangeable)  # noqa: B010 - mypy: a method

    # --- derived ---------------------------------------------------------------------------------

    @classmethod
    def name(cls) -> str:
        """Return the name of the strategy: that of its class."""
        return cls.__name__

    def settings(self) -> dict[str, Any]:
        """Return the hyper-parameters by name."""
        return {f.name: getattr(self, f.name) for f in fields(self)}  # type: ignore[arg-type]

    def uploads(self) -> type[Knowledge] | None:
        """Return the kind of knowledge that clients send, from the phases of a usual round."""
        for phase in self.phases(2):
            if isinstance(phase, ANSWERING):
                return phase.sends
        return None

    def wires(self, experiment: Experiment) -> tuple[Wire, Wire]:
        """Return how soft labels cross the wire in this experiment, up and down.

        Raises:
            FedkdError: ``codec`` is not valid, or there are no soft labels to encode.
        """
        if experiment.codec == "auto":
            return self.wire()
        if self.uploads() is not SoftLabels:
            raise FedkdError(
                Setting("codec", experiment.codec),
                f": {self.name()} sends no soft labels to encode; set codec = 'auto'",
            )
        return parse_codec(experiment.codec)

    def check(self, experiment: Experiment) -> None:
        """Refuse an experiment that would silently give wrong results with this strategy.

        Raises:
            FedkdError: the keys contradict each other; the text says which to change.
        """
        if self.facts.public_labels and not experiment.public_labels:
            raise FedkdError(
                Setting("public-labels", False),
                f": {self.name()} needs the labels of the public set; set public-labels = true or "
                "choose another strategy",
            )
        if self.facts.server_model == "required" and experiment.server_model == "none":
            raise FedkdError(
                Setting("server-model", "none"),
                f": {self.name()} trains a model at the server; name one",
            )
        if self.facts.local_teacher and "none" in experiment.teacher.split(","):
            raise FedkdError(
                Setting("teacher", experiment.teacher),
                f": {self.name()} needs a local teacher at every client; name one",
            )
        self.wires(experiment)
        check_attack(experiment, self.uploads())
        check_privacy(experiment, self.uploads())

    def open(
        self,
        grid: Grid,
        experiment: Experiment,
        folder: RunFolder | None = None,
        on_round: Callable[[Row], None] = lambda _: None,
        events: Events | None = None,
    ) -> Federation:
        """Return an open session, to be run as a whole, or round by round by Flower's own loop.

        Args:
            grid: Flower's, or an engine's.
            experiment: what to run.
            folder: where records go, if anywhere.
            on_round: called with each round's record, once that is on disk.
            events: the incidents of the engine.
        """
        data = federated_data(experiment)
        federation = Federation(self, grid, experiment, data, folder, on_round, events)
        object.__setattr__(self, "_open_session", federation)  # the strategy is frozen
        return federation

    @property
    def _session(self) -> Federation:
        session: Federation | None = getattr(self, "_open_session", None)
        if session is None:
            raise FedkdError("no session is open: call start(), or open() first")
        return session

    # --- Flower's own interface: no algorithm changes it -----------------------------------------

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord | None = None,
        num_rounds: int = 3,
        timeout: float = 3600,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: Callable[[int, ArrayRecord], MetricRecord | None] | None = None,
    ) -> Result:
        """Run the federation (hello, `num_rounds` rounds, a closing exchange) and return its metrics.

        Args:
            grid: Flower's, or an engine's.
            initial_arrays: not used; initial weights follow from the seed.
            num_rounds: number of rounds; replaces the experiment's.
            timeout: seconds to wait for the replies of a round.
            train_config: the experiment's keys, see `Experiment.flat`. With a ``name``, records are
                written to its run folder (Flower clients need one for their states), else not at all.
            evaluate_config: not used; clients evaluate in the same exchange.
            evaluate_fn: not used; the server evaluates its model itself.

        Returns:
            Flower's record of metrics by round.

        Raises:
            FedkdError: too few clients, or no quorum in three consecutive rounds.
        """
        keys: dict[str, Any] = dict(train_config or {})
        keys |= {"num-server-rounds": num_rounds, "round-timeout": timeout}
        experiment = Experiment.load(("train_config", keys))
        folder = RunFolder.create(experiment, "") if experiment.name else None
        return self.open(grid, experiment, folder).run()

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Return the round's messages."""
        return self._session.open_round(server_round)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Check the replies, update the knowledge, write the round's record and return its numbers."""
        row = self._session.finish_round(replies)
        return None, plain_numbers(row)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Return nothing: clients evaluate while they train."""
        return []

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """Return nothing: there is no second exchange."""
        return None

    def summary(self) -> None:
        """Print nothing: the command line prints the experiment."""


def _refuse_unannotated(cls: type[DistillationStrategy]) -> None:
    """Refuse a class that changes a setting without its type, as a dataclass would ignore it.

    Raises:
        FedkdError: the text says how to write it.
    """
    own, checked = get_annotations(cls), set()
    for base in cls.__mro__[1:]:
        for setting in fields(base) if is_dataclass(base) else ():
            name, value = setting.name, getattr(cls, setting.name, MISSING)
            if name not in own and name not in checked and value is not setting.default:
                kind = setting.type if isinstance(setting.type, str) else setting.type.__name__
                raise FedkdError(
                    f"{cls.__name__} changes the setting {name} of {base.__name__} without its type, so "
                    f"that {setting.default!r} would be used: write {name}: {kind} = {value!r}"
                )
            checked.add(name)


def _unchangeable(strategy: DistillationStrategy, name: str, value: object) -> None:
    """Refuse ``self.name = value`` in a strategy."""
    raise FedkdError(
        f"self.{name} = ... in {strategy.name()}: a strategy cannot be changed; keep what lasts between "
        f"rounds in server.state['{name}'], in update"
    )


def _as_knowledge(combined: Any, replies: Replies) -> Knowledge:
    """Return the result of ``aggregate`` as knowledge."""
    if combined is None:
        raise FedkdError("aggregate returns None: it must return [N, C], or knowledge")
    if isinstance(combined, Tensor):
        if replies.labels is None:
            kind = type(replies.knowledge).__name__
            raise FedkdError(f"aggregate returns a tensor: for {kind} it must return {kind}")
        expected = tuple(replies.labels.values.shape[1:])
        if tuple(combined.shape) != expected:
            raise FedkdError(
                f"aggregate returns shape {tuple(combined.shape)}: must be [N, C] = {expected}"
            )
        return SoftLabels.shared(combined, replies.labels.samples, replies.labels.space)
    knowledge: Knowledge = combined
    return knowledge


def _checked(name: str, value: object, hint: Any, strategy: str) -> object:
    """Return a setting's value, converted to its type."""
    try:
        return TypeAdapter(hint).validate_python(_number(value, hint))
    except ValidationError:
        field = FieldInfo.from_annotation(hint)
        choices = map(str, get_args(hint))
        close = nearest(value, choices) if isinstance(value, str) else ""
        raise FedkdError(
            f"{kebab(name)} = {value!r} of {strategy}: must be {accepted(field)}{close}"
        ) from None


def _number(value: object, hint: Any) -> object:
    """Return the number that a text stands for if only certain numbers are accepted."""
    choices = {str(choice): choice for choice in get_args(hint) if isinstance(choice, int)}
    return choices.get(value, value) if isinstance(value, str) else value


def _typed(aggregate: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """Return `aggregate` with a check that the knowledge is of the right kind."""

    @wraps(aggregate)
    def checked(self: DistillationStrategy, knowledge: Any) -> Any:
        kind = self.uploads()
        if kind is not None and not isinstance(knowledge, kind):
            raise TypeError(
                f"{self.name()}.aggregate takes {kind.__name__}, not {type(knowledge).__name__}"
            )
        spaces = {phase.space for phase in self.phases(2) if isinstance(phase, Predict)}
        if spaces == {"probabilities"} and knowledge.space != "probabilities":
            raise FedkdError(f"{self.name()} aggregates probabilities, not {knowledge.space}")
        return aggregate(self, knowledge)

    return checked
