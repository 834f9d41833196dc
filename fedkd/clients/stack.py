"""The state of clients with the same architectures and phases, which run side by side.

A `Stack` is data. Functions of it implement the phases (`run_phases`), the batches of a fit
(`batch_streams`), what clients send (`answers`) and how they are tested (`evaluation`).
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
    """Clients with the same architectures and phases, and one instruction each, run as one cohort.

    Their states are trained in place. They may be of several federations on the same data, whose
    experiments then differ in `STACKABLE` keys alone.

    Attributes:
        experiments: of each client.
        data: of all federations.
        instructions: of each client.
        states: of each client.
        is_fresh: whether they have knowledge to digest that is new to them.
        memories: what each client keeps besides its models.
        secret_noise: whether the noise of ``dp-noise`` comes from this machine's entropy, as a
            deployment requires: anyone who knows the seed of a simulation can remove its noise.
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
            received_knowledge(instruction, memory, self.data.sizes.num_public)
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
        """The first client's experiment, for keys that do not differ."""
        return self.experiments[0]

    @property
    def first(self) -> Instruction:
        """The first client's instruction, for fields that do not differ."""
        return self.instructions[0]

    @property
    def clients(self) -> list[int]:
        """Partition ids."""
        return self.states.clients

    def architecture(self, role: str) -> str:
        """Return the name of the architecture in a role."""
        experiment = self.experiment
        name_of = experiment.student_of if role == "student" else experiment.teacher_of
        return name_of(self.first.client)

    def role(self, role: Role) -> Cohort:
        """Return the models in a role; without local teachers these are the students."""
        return self.cohorts.get(role, self.cohorts["student"])

    def attack(self, row: int) -> Attack:
        """Return a client's attack, `HONEST` unless it is malicious."""
        return attack_of(self.experiments[row], self.clients[row])

    def labels(self, row: int) -> Tensor:
        """Return the labels that a client uses for its private images, int64 ``[n]``."""
        train = self.data.train
        assert train.labels is not None
        labels = train.labels[self.shards[row].to(train.device)]
        falsify = self.attack(row).labels
        return labels if falsify is None else falsify(labels, self.data.num_classes)

    def outputs(
        self, row: int, role: Role, of: Output, images: Images, rows: Tensor | None
    ) -> Tensor:
        """Return a client's model's features, logits or probabilities for images, ``[N, D]``."""
        model = self.role(role).only(row)
        if of == "features":
            return model.features(images, rows)[0]
        logits = model.predict(images, rows)[0]
        return logits.softmax(-1) if of == "probabilities" else logits

    def record(self, name: str, values: Tensor) -> None:
        """Add one number per client, ``[K]``, to the metrics."""
        for metrics, value in zip(self.metrics, values.tolist(), strict=True):
            metrics[name] = value

    def spend(self, name: str, seconds: float) -> None:
        """Add the time of all clients to a phase's seconds, shared equally."""
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds / len(self.instructions)


def has_news(instruction: Instruction, digested: int) -> bool:
    """Whether an instruction has knowledge that the client has not digested."""
    labels = instruction.knowledge
    empty = isinstance(labels, SoftLabels | Packed) and not len(labels.samples)
    return (
        instruction.knowledge is not None and not empty and instruction.knowledge_round > digested
    )


def received_knowledge(
    instruction: Instruction, memory: Memory, num_public: int
) -> Knowledge | None:
    """Return the knowledge that a client received, decoded by means of its memory if packed."""
    received = instruction.knowledge
    if not isinstance(received, Packed):
        return received
    labels, known = SoftLabels.unpack(received, num_public, known_rows(memory, "down"))
    set_memory(memory, "down", known)
    return labels


def known_rows(memory: Memory, direction: str) -> KnownRows | None:
    """Return the rows of soft labels that were sent before, from a client's memory."""
    tensors = memory.get(direction)
    return None if tensors is None else KnownRows(tensors["codes"], tensors["known"])


def set_memory(memory: Memory, name: str, value: KnownRows | State | None) -> None:
    """Replace the tensors under a name in a client's memory; they are stored on the CPU."""
    tensors = (
        {"codes": value.codes, "known": value.known} if isinstance(value, KnownRows) else value
    )
    memory.pop(name, None)
    if tensors:
        memory[name] = {n: tensor.detach().cpu() for n, tensor in tensors.items()}
