"""A client executes phases: the one implementation behind every engine.

`execute` takes the orders of any number of clients, runs those that can share a stack as one cohort,
and returns a report or a failure for each. A Flower client hands over its single order, the
in-process engine all of a round.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from time import monotonic
from typing import Literal

import torch
from torch import Tensor

from fedkd.cohort import Cohort, Side
from fedkd.errors import FedkdError
from fedkd.experiment import Experiment
from fedkd.images import Images
from fedkd.knowledge import Knowledge, ModelWeights, SoftLabels, Weights
from fedkd.losses import Term, kl_term
from fedkd.optimizers import OptimizerSettings
from fedkd.phases import (
    Coefficient,
    Fit,
    Load,
    Phase,
    Predict,
    Role,
    resolve_term,
    to_text,
)
from fedkd.references import in_one_line
from fedkd.states import INITIAL, ClientState, Store
from fedkd.world import World

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Order:
    """What the server wants of one client.

    Attributes:
        client: partition id.
        round: names the random streams and the state that results.
        base: round of the state to start from.
        phases: what to do.
        asked: public samples to answer, int64 ``[M]``.
        knowledge: what to digest or load, K = 1; ``None`` where there is none yet.
        knowledge_round: the round that it came out of.
        evaluate: test after each phase that trains (``"phases"``), the student once at the end
            (``"end"``: the closing exchange), or not at all.
    """

    client: int
    round: int
    base: int
    phases: tuple[Phase, ...]
    asked: Tensor
    knowledge: Knowledge | None = None
    knowledge_round: int = 0
    evaluate: Literal["phases", "end", "none"] = "phases"


@dataclass(frozen=True, eq=False)
class Report:
    """What one client answers.

    Attributes:
        client: partition id.
        num_examples: its private images.
        answer: knowledge of K = 1, if the phases ask for any.
        metrics: test accuracies and the like, fractions 0..1.
        seconds: by phase; a stack's time is shared equally by its clients.
    """

    client: int
    num_examples: int
    answer: Knowledge | None
    metrics: dict[str, float]
    seconds: dict[str, float]


@dataclass(frozen=True)
class Failure:
    """A client that could not execute its order, and why in one line."""

    client: int
    reason: str


def execute(
    experiment: Experiment, world: World, orders: Sequence[Order], store: Store
) -> list[Report | Failure]:
    """Execute orders, stacking the clients that share architectures and phases.

    A stack in which something fails is run again client by client from the stored states (with the
    same numbers, since every draw is keyed), so that only the culprit fails.

    Returns:
        One result an order, in the same sequence. States are stored only for reports.
    """
    results: dict[int, Report | Failure] = {}
    groups: dict[str, list[tuple[Order, ClientState]]] = {}
    for order in orders:
        start = _starting_state(experiment, world, order, store)
        if isinstance(start, Failure):
            results[order.client] = start
        else:
            groups.setdefault(_group_key(experiment, order, start), []).append((order, start))
    for group in groups.values():
        outcomes = _run_or_split(experiment, world, group)
        for (order, _), (result, state) in zip(group, outcomes, strict=True):
            results[order.client] = result
            if state is not None:
                store.save(order.client, order.round, state, keep=order.base)
    return [results[order.client] for order in orders]


def _starting_state(
    experiment: Experiment, world: World, order: Order, store: Store
) -> ClientState | Failure:
    if order.base != INITIAL:
        state = store.load(order.client, order.base)
        return state or Failure(order.client, f"has no state of round {order.base} to start from")
    names: dict[Role, str] = {"student": experiment.student_of(order.client)}
    if experiment.teacher_of(order.client) != "none":
        names["teacher"] = experiment.teacher_of(order.client)
    return ClientState({r: world.initial_state(n, experiment.seed) for r, n in names.items()})


def _group_key(experiment: Experiment, order: Order, state: ClientState) -> str:
    """Name what the clients of one stack have in common."""
    labels = order.knowledge if isinstance(order.knowledge, SoftLabels) else None
    parts = (
        experiment.student_of(order.client),
        experiment.teacher_of(order.client),
        to_text(order.phases),
        order.round,
        order.evaluate,
        _is_fresh(order, state),
        "" if labels is None else _digest(labels.samples),
        _digest(order.asked),
    )
    return json.dumps(parts)


def _digest(samples: Tensor) -> str:
    return blake2b(samples.cpu().numpy().tobytes(), digest_size=16).hexdigest()


def _is_fresh(order: Order, state: ClientState) -> bool:
    """Whether there is knowledge that this client has not digested."""
    empty = isinstance(order.knowledge, SoftLabels) and not len(order.knowledge.samples)
    return order.knowledge is not None and not empty and order.knowledge_round > state.digested


_Outcome = tuple[Report, ClientState] | tuple[Failure, None]


def _run_or_split(
    experiment: Experiment, world: World, group: Sequence[tuple[Order, ClientState]]
) -> list[_Outcome]:
    try:
        return list(_Stack(experiment, world, group).run())
    except Exception as error:
        if experiment.plan != "loop" and _is_refused_by_vmap(error):
            _logger.warning("run client by client, as vmap refuses: %s", in_one_line(error))
            return _run_or_split(experiment.replace(plan="loop"), world, group)
        # Whatever a client's model or data raises is that client's failure, never the round's.
        if len(group) == 1:
            known = isinstance(error, FedkdError)
            reason = str(error) if known else in_one_line(error)
            return [(Failure(group[0][0].client, reason), None)]
        return [result for one in group for result in _run_or_split(experiment, world, [one])]


def _is_refused_by_vmap(error: Exception) -> bool:
    """Whether a model or a term does something that cannot be mapped over clients."""
    text = str(error).lower()
    return isinstance(error, RuntimeError) and ("vmap" in text or "batching rule" in text)


@dataclass
class _Stack:
    """Clients with the same architectures and phases, executing one order each as one cohort."""

    experiment: Experiment
    world: World
    group: Sequence[tuple[Order, ClientState]]
    cohorts: dict[Role, Cohort] = field(init=False)
    answers: list[Knowledge | None] = field(init=False)
    metrics: list[dict[str, float]] = field(init=False)
    seconds: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.orders = [order for order, _ in self.group]
        self.first = self.orders[0]
        self.clients = [order.client for order in self.orders]
        self.shards = [self.world.shards[k] for k in self.clients]
        self.digested = [state.digested for _, state in self.group]
        self.is_fresh = _is_fresh(self.first, self.group[0][1])
        self.answers = [None] * len(self.orders)
        self.metrics = [{} for _ in self.orders]
        self.cohorts = {role: self._cohort(role) for role in self.group[0][1].models}

    def _cohort(self, role: Role) -> Cohort:
        name = self._architecture(role)
        device = self.world.train.device
        states = [
            {n: t.to(device) for n, t in state.models[role].items()} for _, state in self.group
        ]
        plan = self.world.plan(name, self.experiment.plan)
        return Cohort.of(self.world.model(name), states, plan)

    def _architecture(self, role: Role) -> str:
        client = self.first.client
        of = self.experiment.student_of if role == "student" else self.experiment.teacher_of
        return of(client)

    def role(self, role: Role) -> Cohort:
        """Return the models in a role; without a local teacher the student is its own."""
        return self.cohorts.get(role, self.cohorts["student"])

    def run(self) -> list[tuple[Report, ClientState]]:
        """Execute every phase for all clients."""
        for position, phase in enumerate(self.first.phases):
            started = monotonic()
            before = sum(p.name == phase.name for p in self.first.phases[:position])
            self._run_phase(phase, before)
            spent = (monotonic() - started) / len(self.orders)
            self.seconds[phase.name] = self.seconds.get(phase.name, 0.0) + spent
        if self.first.evaluate == "end":
            self._record_accuracy("accuracy", "student")
        return [self._finished(k) for k in range(len(self.orders))]

    def _finished(self, k: int) -> tuple[Report, ClientState]:
        report = Report(
            self.clients[k],
            len(self.shards[k]),
            self.answers[k],
            self.metrics[k],
            dict(self.seconds),
        )
        models = {role: cohort.state(k) for role, cohort in self.cohorts.items()}
        return report, ClientState(models, self.digested[k])

    def _run_phase(self, phase: Phase, occurrence: int) -> None:
        if isinstance(phase, Fit):
            self._fit(phase, occurrence)
        elif isinstance(phase, Load):
            self._load()
        elif isinstance(phase, Predict):
            self._predict(phase)
        else:
            self._send()

    def _load(self) -> None:
        name = self._architecture("student")
        for k, order in enumerate(self.orders):
            if order.knowledge is None:
                continue
            if not isinstance(order.knowledge, Weights) or name not in order.knowledge.by_model:
                raise FedkdError(f"the load phase needs weights of {name}, and received none")
            received = order.knowledge.by_model[name].tensors
            self.cohorts["student"].load(k, {n: t[0] for n, t in received.items()})

    def _fit(self, phase: Fit, occurrence: int) -> None:
        sides = self._sides(phase)
        if not sides:
            return
        experiment = self.experiment
        default = experiment.distill_epochs if phase.public else experiment.local_epochs
        losses = self.role(phase.model).fit(
            sides,
            epochs=default if phase.epochs is None else phase.epochs,
            batch_size=experiment.batch_size,
            optimizer=OptimizerSettings.of(experiment),
            numbers={"tau": experiment.tau, **phase.numbers},
            streams=[
                (experiment.seed, client, self.first.round, f"{phase.name} {occurrence}")
                for client in self.clients
            ],
        )
        for metrics, loss in zip(self.metrics, losses.tolist(), strict=True):
            metrics[f"loss_{phase.name}"] = loss
        if any(side.teacher_logits is not None for side in sides):
            self.digested = [self.first.knowledge_round] * len(self.orders)
            self._measure_agreement(phase.model)
        self._evaluate(phase.name, phase.model)

    def _sides(self, phase: Fit) -> list[Side]:
        """Turn a fit's terms into streams of batches, without terms whose knowledge is missing."""
        public = self._terms(phase.public)
        private = self._terms(phase.private)
        if phase.public and all(term.needs is None for term in public):
            # The public set is there to be distilled on; without knowledge only its labels teach.
            teaches = (
                not self._wants_knowledge(phase.public) and self.world.public.labels is not None
            )
            public = public if teaches else {}
        if self.world.public.labels is None and public:
            # Cross entropy needs labels: a private batch in the same step has them.
            hard = {t: c for t, c in public.items() if t.needs is None and c != 0}
            private = {t: private.get(t, 0) + hard.get(t, 0) for t in {**hard, **private}}
            public = {t: c for t, c in public.items() if t.needs is not None}
        sides = []
        if public:
            sides.append(self._public_side(public))
        if private:
            _refuse_soft_labels(private)
            sides.append(
                Side(
                    "private",
                    self.world.train,
                    self.shards,
                    private,
                    augment=self.experiment.augment,
                )
            )
        return sides

    def _public_side(self, terms: dict[Term, float | Tensor]) -> Side:
        public = self.world.public
        if all(term.needs is None for term in terms):
            rows = torch.arange(len(public))
            return Side("public", public, [rows] * len(self.orders), terms)
        received = [order.knowledge for order in self.orders]
        if not all(isinstance(k, SoftLabels) for k in received):
            raise FedkdError("a term needs soft labels, and other knowledge was received")
        labels = [k for k in received if isinstance(k, SoftLabels)]
        if any(term.needs == "logits" for term in terms) and labels[0].space != "logits":
            raise FedkdError("a term needs logits, and probabilities were received")
        shared = all(each is labels[0] for each in labels)
        logits = torch.cat([each.logits for each in (labels[:1] if shared else labels)])
        return Side(
            "public",
            public,
            [labels[0].samples] * len(self.orders),
            terms,
            logits.to(public.device, public.dtype),
        )

    def _terms(self, named: Mapping[str, Coefficient]) -> dict[Term, float | Tensor]:
        """Resolve a fit's terms; those whose knowledge has not come, or is old, are left out."""
        values = {"alpha": self.experiment.alpha, "1-alpha": 1 - self.experiment.alpha}
        terms: dict[Term, float | Tensor] = {}
        for name, coefficient in named.items():
            term = self._term(name)
            if term.needs is None or self.is_fresh:
                terms[term] = values[coefficient] if isinstance(coefficient, str) else coefficient
        return terms

    def _term(self, name: str) -> Term:
        if name == "kl":
            return kl_term(self.experiment.kl_reduction)
        return resolve_term(name, self.experiment.client_modules)

    def _wants_knowledge(self, named: Mapping[str, Coefficient]) -> bool:
        return any(self._term(name).needs is not None for name in named)

    def _predict(self, phase: Predict) -> None:
        asked = self.first.asked
        logits = self.role(phase.model).predict(self.world.public, asked)
        values = logits if phase.space == "logits" else logits.softmax(-1)
        for k, client in enumerate(self.clients):
            self.answers[k] = SoftLabels(
                values[k : k + 1],
                phase.space,
                asked,
                torch.tensor([client]),
                torch.tensor([len(self.shards[k])]),
            )

    def _send(self) -> None:
        cohort, name = self.cohorts["student"], self._architecture("student")
        for k, client in enumerate(self.clients):
            tensors = {n: t.unsqueeze(0) for n, t in cohort.state(k).items()}
            weights = ModelWeights(
                tensors, torch.tensor([client]), torch.tensor([len(self.shards[k])])
            )
            self.answers[k] = Weights({name: weights})

    def _measure_agreement(self, role: Role) -> None:
        """Record on how much of the digested knowledge the student now agrees with it."""
        if self.first.evaluate == "none":
            return
        assert isinstance(self.first.knowledge, SoftLabels)
        predicted = self.role(role).classify(self.world.public, self.first.knowledge.samples)
        for metrics, order, mine in zip(self.metrics, self.orders, predicted, strict=True):
            assert isinstance(order.knowledge, SoftLabels)
            taught = order.knowledge.values[0].argmax(-1).cpu()
            metrics["agreement"] = float((mine.cpu() == taught).double().mean())

    def _evaluate(self, phase_name: str, role: Role) -> None:
        if self.first.evaluate == "phases":
            self._record_accuracy(f"accuracy_after_{phase_name}", role)

    def _record_accuracy(self, name: str, role: Role) -> None:
        """Record accuracy on the test set, and weighted by the client's own label distribution."""
        test, classes = self.world.test, self.world.num_classes
        right = correct_by_class(self.role(role).classify(test), test, classes)
        # Over the classes that the test set has; a shard without any of them counts evenly.
        counts = self.world.private_label_counts[self.clients].double() * (right.total > 0)
        counts += (counts.sum(1, keepdim=True) == 0) * (right.total > 0)
        share = counts / counts.sum(1, keepdim=True)
        own = (share * right.correct / right.total.clamp_min(1)).sum(1)
        accuracy = right.correct.sum(1) / right.total.sum()
        for metrics, a, o in zip(self.metrics, accuracy.tolist(), own.tolist(), strict=True):
            metrics[name] = a
            metrics["own_accuracy"] = o


def _refuse_soft_labels(private: Mapping[Term, object]) -> None:
    for term in private:
        if term.needs in ("soft-labels", "logits"):
            raise FedkdError(
                f"{term.reference} needs soft labels, which private images have not; put it in public"
            )


@dataclass(frozen=True, eq=False)
class ByClass:
    """Test results by true class: correct answers float64 ``[K, C]``, and test images ``[C]``."""

    correct: Tensor
    total: Tensor


def correct_by_class(predicted: Tensor, test: Images, num_classes: int) -> ByClass:
    """Count correct predictions (int ``[K, N]``) by true class."""
    assert test.labels is not None
    labels = test.labels.cpu()  # some devices know no float64
    member = torch.nn.functional.one_hot(labels, num_classes).double()
    right = (predicted.cpu() == labels).double()
    return ByClass(right @ member, member.sum(0))
