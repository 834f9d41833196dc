"""Clients with the same architectures and phases, side by side: who they are, what each knows and keeps.

A `Stack` is data. What its clients do is written as functions of it: the phases in `run_phases`, what
they train on in `batch_streams`, what they send in `answers`, how they are tested in `evaluation`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from fedkd.clients.attacks import Attack, attack_of
from fedkd.clients.instructions import Instruction
from fedkd.clients.memories import Memory
from fedkd.clients.states import States
from fedkd.data.federated import FederatedData
from fedkd.data.images import Images
from fedkd.experiment import Experiment
from fedkd.knowledge import Knowledge, Output, SoftLabels
from fedkd.knowledge.codec import KnownRows, Packed
from fedkd.phases import Role
from fedkd.training.architectures import architectures_of
from fedkd.training.cohort import Cohort
from fedkd.training.parameters import State

STACKABLE = Experiment.keys("optimisation", "distillation")
"""Keys of the experiment that may differ between clients that train side by side."""


@dataclass
class Stack:
    """Clients with the same architectures and phases, and one instruction each to execute as one cohort.

    Their states are trained in place. They may be of several federations on the same data, whose
    experiments then differ in `STACKABLE` keys alone.

    Attributes:
        experiments: of each client.
        data: the data.
        instructions: of each client.
        states: of each client.
        is_fresh: whether they have knowledge to digest that is new to them.
        memories: what each client keeps besides.
        secret_noise: whether the noise of ``dp-noise`` comes from this machine's entropy, as that of a
            deployment has to: whoever knows the seed of a simulation can take its noise off again.
        by_means: whether students classify by the nearest received class mean.
        shards: rows of each client's private images.
        knowledge: what each client received, decoded; procedures may choose among it.
        cohorts: the models by role.
        answers: what each client sends.
        metrics: of each client.
        seconds: by phase, of one client.
    """

    experiments: Sequence[Experiment]
    data: FederatedData
    instructions: list[Instruction]
    states: States
    is_fresh: bool
    memories: list[Memory]
    secret_noise: bool = False
    by_means: bool = field(init=False, default=False)
    shards: list[Tensor] = field(init=False)
    knowledge: list[Knowledge | None] = field(init=False)
    cohorts: dict[str, Cohort] = field(init=False)
    answers: list[Knowledge | None] = field(init=False)
    metrics: list[dict[str, float]] = field(init=False)
    seconds: dict[str, float] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.shards = [self.data.shards[k] for k in self.clients]
        self.answers = [None] * len(self.instructions)
        self.metrics = [{} for _ in self.instructions]
        self.knowledge = [
            opened(instruction, memory, self.data.sizes.num_public)
            for instruction, memory in zip(self.instructions, self.memories, strict=True)
        ]
        self.cohorts = {
            role: architectures_of(self.data).cohort(
                self.experiment, self.architecture(role), stack
            )
            for role, stack in self.states.models.items()
        }

    @property
    def experiment(self) -> Experiment:
        """The first client's, for all keys that do not differ."""
        return self.experiments[0]

    @property
    def first(self) -> Instruction:
        """The first client's instruction, for all that does not differ."""
        return self.instructions[0]

    @property
    def clients(self) -> list[int]:
        """Partition ids."""
        return self.states.clients

    def architecture(self, role: str) -> str:
        """Return the name of the architecture in a role."""
        of = self.experiment.student_of if role == "student" else self.experiment.teacher_of
        return of(self.first.client)

    def role(self, role: Role) -> Cohort:
        """Return the models in a role; without a local teacher the student is its own."""
        return self.cohorts.get(role, self.cohorts["student"])

    def attack(self, row: int) -> Attack:
        """Return what a client does instead of what it should, if it is an attacker."""
        return attack_of(self.experiments[row], self.clients[row])

    def labels(self, row: int) -> Tensor:
        """Return what a client takes for the labels of its private images, int64 ``[n]``."""
        train = self.data.train
        assert train.labels is not None
        labels = train.labels[self.shards[row].to(train.device)]
        falsify = self.attack(row).labels
        return labels if falsify is None else falsify(labels, self.data.num_classes)

    def outputs(
        self, row: int, role: Role, of: Output, images: Images, rows: Tensor | None
    ) -> Tensor:
        """Return what a client's model makes of images, ``[N, D]``."""
        one = self.role(role).only(row)
        if of == "features":
            return one.features(images, rows)[0]
        logits = one.predict(images, rows)[0]
        return logits.softmax(-1) if of == "probabilities" else logits

    def record(self, name: str, values: Tensor) -> None:
        """Note a number of each client, ``[K]``, in its metrics."""
        for metrics, value in zip(self.metrics, values.tolist(), strict=True):
            metrics[name] = value

    def spend(self, name: str, seconds: float) -> None:
        """Add the time of all clients to that of a phase, shared equally."""
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds / len(self.instructions)


def has_news(instruction: Instruction, digested: int) -> bool:
    """Whether there is knowledge that a client has not digested."""
    labels = instruction.knowledge
    empty = isinstance(labels, SoftLabels | Packed) and not len(labels.samples)
    return (
        instruction.knowledge is not None and not empty and instruction.knowledge_round > digested
    )


def opened(instruction: Instruction, memory: Memory, num_public: int) -> Knowledge | None:
    """Decode what a client received, with what it has already if only changes were sent."""
    received = instruction.knowledge
    if not isinstance(received, Packed):
        return received
    labels, newer = SoftLabels.unpack(received, num_public, recall(memory, "down"))
    remember(memory, "down", newer)
    return labels


def recall(memory: Memory, direction: str) -> KnownRows | None:
    """Return what a client's memory says of soft labels that were sent before."""
    kept = memory.get(direction)
    return None if kept is None else KnownRows(kept["codes"], kept["known"])


def remember(memory: Memory, name: str, kept: KnownRows | State | None) -> None:
    """Put tensors into a client's memory, on the CPU, in the place of what was there."""
    tensors = {"codes": kept.codes, "known": kept.known} if isinstance(kept, KnownRows) else kept
    memory.pop(name, None)
    if tensors:
        memory[name] = {n: tensor.detach().cpu() for n, tensor in tensors.items()}
