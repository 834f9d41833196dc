"""Clients with the same architectures and phases, executing their orders side by side."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import compress
from time import monotonic

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from fedkd.attacks import Attack, attack_of, attacked
from fedkd.batches import Side
from fedkd.codecs import PLAIN, Packed, Reference
from fedkd.cohort import Answers, Cohort
from fedkd.errors import FedkdError
from fedkd.experiment import Experiment
from fedkd.images import Images
from fedkd.knowledge import ClassMeans, Knowledge, ModelWeights, Output, SoftLabels, Weights
from fedkd.losses import Term
from fedkd.memories import TESTED, Memory, check_kept
from fedkd.optimizers import OptimizerSettings, shared
from fedkd.orders import Order, Report
from fedkd.parameters import State
from fedkd.phases import (
    Apply,
    ClassifyByMeans,
    Coefficient,
    Fit,
    Load,
    LocalClient,
    MeanByClass,
    Phase,
    Predict,
    Reset,
    Role,
    check_received,
    experiment_term,
    reference,
    resolve_procedure,
)
from fedkd.privacy import privatise
from fedkd.profiling import PART, part, profiled
from fedkd.randomness import generator
from fedkd.states import INITIAL, States
from fedkd.world import World


def has_news(order: Order, digested: int) -> bool:
    """Whether there is knowledge that a client has not digested."""
    labels = order.knowledge
    empty = isinstance(labels, SoftLabels | Packed) and not len(labels.samples)
    return order.knowledge is not None and not empty and order.knowledge_round > digested


STACKABLE = (
    "alpha", "tau", "learning_rate", "momentum", "weight_decay", "local_epochs", "distill_epochs",
)  # fmt: skip
"""Keys of the experiment that may differ between clients that train side by side."""


@dataclass
class Stack:
    """Clients with the same architectures and phases, executing one order each as one cohort.

    Their states are trained in place. They may be of several federations on the same data, whose
    experiments then differ in `STACKABLE` keys alone.

    Attributes:
        experiments: of each client.
        world: the data.
        orders: of each client.
        states: of each client.
        is_fresh: whether they have knowledge to digest that is new to them.
        memories: what each client keeps besides.
        secret_noise: whether the noise of ``dp-noise`` comes from this machine's entropy, as that of a
            deployment has to: whoever knows the seed of a simulation can take its noise off again.
    """

    experiments: Sequence[Experiment]
    world: World
    orders: list[Order]
    states: States
    is_fresh: bool
    memories: list[Memory]
    secret_noise: bool = False
    by_means: bool = False
    knowledge: list[Knowledge | None] = field(init=False)
    cohorts: dict[str, Cohort] = field(init=False)
    answers: list[Knowledge | None] = field(init=False)
    metrics: list[dict[str, float]] = field(init=False)
    seconds: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.experiment = self.experiments[0]
        self.first = self.orders[0]
        self.clients = self.states.clients
        self.shards = [self.world.shards[k] for k in self.clients]
        self.answers = [None] * len(self.orders)
        self.metrics = [{} for _ in self.orders]
        self.knowledge = [self._opened(row) for row in range(len(self.orders))]
        self.cohorts = {
            role: self.world.cohort(self.experiment, self._architecture(role), stack)
            for role, stack in self.states.models.items()
        }

    def _opened(self, row: int) -> Knowledge | None:
        """Decode what a client received, with what it has already if only changes were sent."""
        received = self.orders[row].knowledge
        if not isinstance(received, Packed):
            return received
        memory = self.memories[row]
        known = _reference(memory, "down")
        labels, newer = SoftLabels.unpack(received, self.world.sizes.num_public, known)
        _remember(memory, "down", newer)
        return labels

    def _check_names_kept(self, before: Sequence[set[str]]) -> None:
        """Refuse a client's state of other names than last round, which no file could hold beside it."""
        for names, memory in zip(before, self.memories, strict=True):
            now = set(memory.get("own", {}))
            if names and now and now != names:
                raise FedkdError(
                    f"procedures keep {', '.join(sorted(now))}, which was {', '.join(sorted(names))}: "
                    "the names in a client's state stay"
                )

    def _all_packed(self) -> list[Packed | None]:
        if self.first.wire == PLAIN:
            return [None] * len(self.orders)
        started = monotonic()
        packed = [self._packed(row) for row in range(len(self.orders))]
        self._spend("encode", monotonic() - started)
        return packed

    def _packed(self, row: int) -> Packed | None:
        """Encode a client's soft labels, if it answers any."""
        answer, wire = self.answers[row], self.first.wire
        if not isinstance(answer, SoftLabels):
            return None
        memory = self.memories[row]
        heard = _reference(memory, "up")
        packed, newer = answer.pack(wire, self.world.sizes.num_public, heard)
        _remember(memory, "up", newer)
        return packed

    def _architecture(self, role: str) -> str:
        client = self.first.client
        of = self.experiment.student_of if role == "student" else self.experiment.teacher_of
        return of(client)

    def role(self, role: Role) -> Cohort:
        """Return the models in a role; without a local teacher the student is its own."""
        return self.cohorts.get(role, self.cohorts["student"])

    def run(self) -> list[Report]:
        """Execute every phase for all clients."""
        kept = [set(memory.get("own", {})) for memory in self.memories]
        with profiled(self.experiment.profile) as parts:
            for position, phase in enumerate(self.first.phases):
                started = monotonic()
                self._run_phase(phase, position)
                self._spend(phase.name, monotonic() - started)
            if self.first.evaluate == "end":
                self._examine()
            self._check_names_kept(kept)
            packed = self._all_packed()
        for name, spent in parts.items():
            self._spend(f"{PART} {name}", spent)
        return [
            Report(k, len(shard), answer, metrics, dict(self.seconds), sent, round=self.first.round)
            for k, shard, answer, metrics, sent in zip(
                self.clients, self.shards, self.answers, self.metrics, packed, strict=True
            )
        ]

    def _spend(self, name: str, seconds: float) -> None:
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds / len(self.orders)

    def _run_phase(self, phase: Phase, position: int) -> None:
        if isinstance(phase, Fit):
            self._fit(phase, position)
        elif isinstance(phase, Reset):
            self._reset()
        elif isinstance(phase, Load):
            self._load()
        elif isinstance(phase, Apply):
            self._apply(phase, position)
        elif isinstance(phase, ClassifyByMeans):
            self.by_means = isinstance(self.knowledge[0], ClassMeans)
        elif isinstance(phase, Predict):
            self._predict(phase)
        elif isinstance(phase, MeanByClass):
            self._average(phase)
        else:
            self._send()

    def _reset(self) -> None:
        name = self._architecture("student")
        for row, experiment in enumerate(self.experiments):
            initial = self.world.initial_state(name, experiment.seed)
            self.cohorts["student"].load(row, initial)
        self.is_fresh = has_news(self.first, INITIAL)

    def _load(self) -> None:
        name = self._architecture("student")
        for row, knowledge in enumerate(self.knowledge):
            if knowledge is None:
                continue
            if not isinstance(knowledge, Weights) or name not in knowledge.by_model:
                raise FedkdError(f"the load phase needs weights of {name}, and received none")
            received = knowledge.by_model[name].tensors
            self.cohorts["student"].load(row, {n: t[0] for n, t in received.items()})

    def _apply(self, phase: Apply, position: int) -> None:
        found = resolve_procedure(reference(phase.procedure), self.experiment.client_modules)
        stream = f"{phase.name} {self._occurrence(position)}"
        load_public = cache(self.world.public.whole)  # for all of them, if any looks
        for row, memory in enumerate(self.memories):
            before, client = memory.get("own", {}), self._local_client(row, stream, load_public)
            received = client.received
            found(client, **phase.numbers)
            if client.received is not received:
                check_received(found, client.received)
            check_kept(found.reference, client.state, before)
            if client.received is not None:
                self.knowledge[row] = client.received
            _remember(memory, "own", client.state)

    def _occurrence(self, position: int) -> int:
        """Count the earlier phases of this order that have the same name."""
        name = self.first.phases[position].name
        return sum(phase.name == name for phase in self.first.phases[:position])

    def _local_client(
        self, row: int, stream: str, load_public: Callable[[], Tensor]
    ) -> LocalClient:
        train, shard, received = self.world.train, self.shards[row], self.knowledge[row]
        rows = shard.to(train.device)
        where = self.experiments[row].seed, self.clients[row], self.first.round, stream

        def predict(samples: Tensor, model: Role = "teacher") -> Tensor:
            return self.role(model).only(row).predict(self.world.public, samples)[0]

        return LocalClient(
            images=train.batch(rows),
            labels=self._labels(row),
            load_public=load_public,
            received=received if isinstance(received, SoftLabels) else None,
            state=dict(self.memories[row].get("own", {})),
            predict=predict,
            generator=lambda purpose: generator(*where, purpose),
        )

    def _fit(self, phase: Fit, position: int) -> None:
        sides = self._sides(phase)
        if not sides:
            return
        stream = f"{phase.name} {self._occurrence(position)}"
        key = "distill_epochs" if phase.public else "local_epochs"
        default = [getattr(experiment, key) for experiment in self.experiments]
        fitted = self.role(phase.model).fit(
            sides,
            epochs=default if phase.epochs is None else phase.epochs,
            batch_size=self.experiment.batch_size,
            optimizer=OptimizerSettings.of_all(self.experiments),
            numbers={"tau": shared(self.experiments, "tau"), **phase.numbers},
            streams=[
                (experiment.seed, client, self.first.round, stream)
                for experiment, client in zip(self.experiments, self.clients, strict=True)
            ],
        )
        told = {"loss": fitted.losses, "gradient_norm": fitted.gradient_norms}
        for name, values in told.items():
            for metrics, value in zip(self.metrics, values.tolist(), strict=True):
                metrics[f"{name}_{phase.name}"] = value
        if any(side.teacher_logits is not None for side in sides):
            self.states.digested = [self.first.knowledge_round] * len(self.orders)
        if not self._is_evaluated(position):
            return
        with part("evaluate"):
            if any(side.teacher_logits is not None for side in sides):
                self._measure_agreement(phase.model)
            if self.first.evaluate != "end":
                self._record_accuracy(f"accuracy_after_{phase.name}", phase.model)

    def _is_evaluated(self, position: int) -> bool:
        """Whether models are tested after the fit at a position."""
        if self.first.evaluate != "last":
            return self.first.evaluate in ("phases", "end")
        later = self.first.phases[position + 1 :]
        return not any(isinstance(phase, Fit) and self._sides(phase) for phase in later)

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
            hard = {t: c for t, c in public.items() if t.needs is None and _counts(c)}
            private = {t: private.get(t, 0) + hard.get(t, 0) for t in {**hard, **private}}
            public = {t: c for t, c in public.items() if t.needs is not None}
        sides = []
        if public:
            sides.append(self._public_side(public))
        if private:
            _refuse_soft_labels(private)
            sides.append(self._private_side(private))
        return sides

    def _public_side(self, terms: dict[Term, float | Tensor]) -> Side:
        public = self.world.public
        if all(term.needs is None for term in terms):
            rows = torch.arange(len(public))
            return Side("public", public, [rows] * len(self.orders), terms)
        if not all(isinstance(k, SoftLabels) for k in self.knowledge):
            raise FedkdError("a term needs soft labels, and other knowledge was received")
        labels = [k for k in self.knowledge if isinstance(k, SoftLabels)]
        if any(len(each.values) != 1 for each in labels):
            raise FedkdError(
                "several sets of soft labels were received: a procedure has to choose before they are "
                "digested"
            )
        if any(term.needs == "logits" for term in terms) and labels[0].space != "logits":
            raise FedkdError("a term needs logits, and probabilities were received")
        different = {id(each): each for each in labels}  # most share one
        place = {which: n for n, which in enumerate(different)}
        logits = [each.logits[0] for each in different.values()]
        return Side(
            "public",
            public,
            [each.samples for each in labels],
            terms,
            pad_sequence(logits, batch_first=True).to(public.device, public.dtype),
            torch.tensor([place[id(each)] for each in labels]),
        )

    def _private_side(self, terms: dict[Term, float | Tensor]) -> Side:
        side = Side(
            "private", self.world.train, self.shards, terms, augment=self.experiment.augment
        )
        if any(self._attack(row).labels for row in range(len(self.orders))):
            side = replace(side, labels=[self._labels(row) for row in range(len(self.orders))])
        if not any(term.needs == "class-means" for term in terms):
            return side
        means = [k for k in self.knowledge if isinstance(k, ClassMeans)]
        means = means[:1] if all(each is means[0] for each in means) else means
        return replace(
            side,
            class_means=torch.cat([each.values for each in means]),
            class_counts=torch.cat([each.counts for each in means]),
        )

    def _labels(self, row: int) -> Tensor:
        """Return what a client takes for the labels of its private images, int64 ``[n]``."""
        train = self.world.train
        assert train.labels is not None
        labels = train.labels[self.shards[row].to(train.device)]
        falsify = self._attack(row).labels
        return labels if falsify is None else falsify(labels, self.world.num_classes)

    def _attack(self, row: int) -> Attack:
        return attack_of(self.experiments[row], self.clients[row])

    def _terms(self, named: Mapping[str, Coefficient]) -> dict[Term, float | Tensor]:
        """Resolve a fit's terms; those whose knowledge has not come, or is old, are left out."""
        alpha = shared(self.experiments, "alpha")
        values = {"alpha": alpha, "1-alpha": 1 - alpha}
        terms: dict[Term, float | Tensor] = {}
        for name, coefficient in named.items():
            term = self._term(name)
            if self._has(term):
                terms[term] = values[coefficient] if isinstance(coefficient, str) else coefficient
        return terms

    def _has(self, term: Term) -> bool:
        """Whether what a term needs is there: soft labels only if they are news."""
        if term.needs == "class-means":
            return isinstance(self.knowledge[0], ClassMeans)
        return term.needs is None or self.is_fresh

    def _term(self, name: str) -> Term:
        return experiment_term(name, self.experiment)

    def _wants_knowledge(self, named: Mapping[str, Coefficient]) -> bool:
        return any(self._term(name).needs is not None for name in named)

    def _predict(self, phase: Predict) -> None:
        asked = self.first.asked
        with part("predict"):
            logits = self.role(phase.model).predict(self.world.public, asked)
            values = (logits if phase.space == "logits" else logits.softmax(-1)).cpu()
        for row, client in enumerate(self.clients):
            labels = SoftLabels(
                values[row : row + 1],
                phase.space,
                asked,
                torch.tensor([client]),
                torch.tensor([len(self.shards[row])]),
            )
            if phase.only is not None:
                labels = self._some(row, labels, phase.only)
            self.answers[row] = self._leaving(row, labels)

    def _leaving(self, row: int, labels: SoftLabels) -> SoftLabels:
        """Return what leaves a client that would honestly say `labels`."""
        if self._attack(row).answer is not None:
            experiment, client = self.experiments[row], self.clients[row]
            return attacked(labels, self.knowledge[row], experiment, client, self.first.round)
        return self._privatised(row, labels)

    def _privatised(self, row: int, labels: SoftLabels) -> SoftLabels:
        experiment, client = self.experiments[row], self.clients[row]
        if not experiment.dp_noise:
            return labels
        seeded = generator(experiment.seed, "dp", client, self.first.round)
        return privatise(labels, experiment, None if self.secret_noise else seeded)

    def _some(self, row: int, labels: SoftLabels, name: str) -> SoftLabels:
        """Keep the samples for which a tensor of the client's state is true."""
        chosen = self.memories[row].get("own", {}).get(name)
        shape = (len(self.world.public),)
        if chosen is None or chosen.dtype != torch.bool or tuple(chosen.shape) != shape:
            raise FedkdError(
                f"only = '{name}': the client's state has no such tensor, bool of shape {shape}"
            )
        return labels.keep(chosen[labels.samples])

    def _outputs(
        self, row: int, role: Role, of: Output, images: Images, rows: Tensor | None
    ) -> Tensor:
        """Return what a client's model makes of images, ``[N, D]``."""
        one = self.role(role).only(row)
        if of == "features":
            return one.features(images, rows)[0]
        logits = one.predict(images, rows)[0]
        return logits.softmax(-1) if of == "probabilities" else logits

    def _by_means(self, role: Role) -> Tensor:
        """Classify the test images by the nearest received class mean, int64 ``[K, N]``."""
        test = self.world.test
        means = [k for k in self.knowledge if isinstance(k, ClassMeans)]
        return torch.stack(
            [m.nearest(self._outputs(row, role, m.of, test, None)) for row, m in enumerate(means)]
        )

    def _average(self, phase: MeanByClass) -> None:
        train, classes = self.world.train, self.world.num_classes
        for row, (client, shard) in enumerate(zip(self.clients, self.shards, strict=True)):
            outputs = self._outputs(row, phase.model, phase.of, train, shard.to(train.device))
            member = torch.nn.functional.one_hot(self._labels(row), classes).to(outputs.dtype)
            counts = member.sum(0)
            means = (member.T @ outputs) / counts.clamp_min(1).unsqueeze(-1)
            self.answers[row] = ClassMeans(
                means.unsqueeze(0).cpu(),
                counts.unsqueeze(0).cpu().to(torch.int64),
                torch.tensor([client]),
                phase.of,
            )

    def _send(self) -> None:
        name = self._architecture("student")
        sent = {n: t.cpu() for n, t in self.states.models["student"].items()}
        for k, client in enumerate(self.clients):
            tensors = {n: t[k : k + 1].clone() for n, t in sent.items()}
            weights = ModelWeights(
                tensors, torch.tensor([client]), torch.tensor([len(self.shards[k])])
            )
            self.answers[k] = Weights({name: weights})

    def _measure_agreement(self, role: Role) -> None:
        """Record on how much of the digested knowledge the student now agrees with it."""
        labels = [k for k in self.knowledge if isinstance(k, SoftLabels)]
        told = {id(each): each.samples for each in labels}  # most share one
        samples = torch.cat(list(told.values())).unique()
        predicted = self.role(role).classify(self.world.public, samples).cpu()
        taught: dict[int, Tensor] = {}
        for metrics, each, mine in zip(self.metrics, labels, predicted, strict=True):
            if id(each) not in taught:
                taught[id(each)] = each.values[0].max(-1).indices.cpu()
            places = torch.searchsorted(samples, each.samples)
            metrics["agreement"] = float((mine[places] == taught[id(each)]).double().mean())

    def _record_accuracy(self, name: str, role: Role) -> None:
        """Test the models in a role after a phase."""
        predicted = self._by_means(role) if self.by_means else None
        if predicted is None:
            predicted = self.role(role).classify(self.world.test)
        self._record_predicted(name, predicted)

    def _examine(self) -> None:
        """Test all models at the end: what they answer stays with the client, as `tested` finds it."""
        for role, cohort in self.cohorts.items():
            trained = [
                role == "student" or self._is_trained(role, row) for row in range(len(cohort))
            ]
            if not any(trained):
                continue
            answers = cohort.answer(self.world.test)
            if role == "student":
                if self.by_means:
                    classes = self._by_means("student").to(torch.int16)
                    answers = Answers(classes, torch.full_like(answers.confidences, torch.nan))
                self._record_predicted("accuracy", answers.classes)
            for memory, classes, confidences in compress(
                zip(self.memories, *answers, strict=True), trained
            ):
                kept = {"classes": classes, "confidences": confidences.to(torch.float16)}
                _remember(memory, f"{TESTED}{role}", kept)
        self._record_training_accuracy()

    def _is_trained(self, role: str, row: int) -> bool:
        """Whether a local teacher is one: some strategies have no use for it."""
        initial = self.world.initial_state(self._architecture(role), self.experiments[row].seed)
        params = self.cohorts[role].params
        return any(not torch.equal(tensor[row], initial[name]) for name, tensor in params.items())

    def _record_training_accuracy(self) -> None:
        """Record the students' accuracy on their own private images."""
        train = self.world.train
        assert train.labels is not None
        for row, (metrics, shard) in enumerate(zip(self.metrics, self.shards, strict=True)):
            rows = shard.to(train.device)
            right = self._classified(row, train, rows) == train.labels[rows]
            metrics["training_accuracy"] = float(right.double().mean())

    def _classified(self, row: int, images: Images, rows: Tensor) -> Tensor:
        """Return the classes ``[N]`` that a client's student says, by means where it goes by them."""
        means = self.knowledge[row]
        if self.by_means and isinstance(means, ClassMeans):
            return means.nearest(self._outputs(row, "student", means.of, images, rows))
        return self.cohorts["student"].only(row).classify(images, rows)[0]

    def _record_predicted(self, name: str, predicted: Tensor) -> None:
        """Record accuracy on the test set, and weighted by the client's own label distribution.

        Args:
            name: of the accuracy.
            predicted: classes ``[K, N]`` of the test images.
        """
        test, classes = self.world.test, self.world.num_classes
        right = correct_by_class(predicted, test, classes)
        # Over the classes that the test set has; a shard without any of them counts evenly.
        counts = self.world.private_label_counts[self.clients].double() * (right.total > 0)
        counts += (counts.sum(1, keepdim=True) == 0) * (right.total > 0)
        share = counts / counts.sum(1, keepdim=True)
        own = (share * right.correct / right.total.clamp_min(1)).sum(1)
        accuracy = right.correct.sum(1) / right.total.sum()
        for metrics, a, o in zip(self.metrics, accuracy.tolist(), own.tolist(), strict=True):
            metrics[name] = a
            metrics["own_accuracy"] = min(1.0, o)  # shares add up to 1 but for rounding


def _counts(coefficient: float | Tensor) -> bool:
    """Whether a term with this coefficient, or these, adds anything."""
    return bool((torch.as_tensor(coefficient) != 0).any())


def _reference(memory: Memory, direction: str) -> Reference | None:
    """Return what a client's memory says of soft labels that were sent before."""
    kept = memory.get(direction)
    return None if kept is None else Reference(kept["codes"], kept["known"])


def _remember(memory: Memory, name: str, kept: Reference | State | None) -> None:
    """Put tensors into a client's memory, on the CPU, in the place of what was there."""
    tensors = {"codes": kept.codes, "known": kept.known} if isinstance(kept, Reference) else kept
    memory.pop(name, None)
    if tensors:
        memory[name] = {n: tensor.detach().cpu() for n, tensor in tensors.items()}


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
    member = torch.nn.functional.one_hot(labels, num_classes).float()  # counts are exact in it
    right = (predicted.cpu() == labels).float()
    return ByClass((right @ member).double(), member.sum(0).double())
