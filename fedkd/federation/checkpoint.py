"""What the server needs to resume a federation after its process has ended.

One file, ``server.safetensors`` in the run folder, replaced as a whole after every round: tensors by
name, and the rest as JSON in the file's header. It is written last, after the states of the clients and
the records of the round: resuming starts from it and drops whatever is newer.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor

from fedkd.clients.instructions import ClientReport
from fedkd.errors import FedkdError
from fedkd.knowledge import Knowledge, SoftLabels
from fedkd.knowledge.codec import KnownRows
from fedkd.knowledge.kinds import BY_NAME
from fedkd.records.files import read_safetensors, replace_file
from fedkd.records.folder import RunFolder
from fedkd.training.parameters import State

FILE = "server.safetensors"

_FIELDS = "fedkd"
"""The entry of the file's header that holds the fields as JSON."""

KnownRowsByClient = dict[int, KnownRows | None]
"""By client, the rows that it has of our soft labels, or we of its."""


@dataclass(eq=False)
class Checkpoint:
    """What the server remembers after a round.

    Attributes:
        round: the round, from 1; 0 before the first.
        knowledge: the newest, or ``None``.
        knowledge_round: the round that produced it.
        state: the strategy's memory.
        model: parameters and buffers of the server's model, where it keeps one.
        trained: whether that model has been trained.
        base: by client, the round of the state that it continues from.
        downlink: rows of our soft labels that clients know, where only changes are sent.
        uplink: rows of theirs that we know.
        enrolled_again: the clients that lost what they kept and began once more like new ones.
        asked: by client, how many rows of soft labels it has been asked for in total.
        rounds_without_quorum: how many in a row, up to and including this one.
        totals: bytes so far, by name.
        identity: a fingerprint of what the numbers of the run depend on; see `fedkd.records.identity`.
    """

    round: int = 0
    knowledge: Knowledge | None = None
    knowledge_round: int = 0
    state: dict[str, Tensor | float | int | str] = field(default_factory=dict)
    model: State | None = None
    trained: bool = False
    base: dict[int, int] = field(default_factory=dict)
    downlink: KnownRowsByClient = field(default_factory=dict)
    uplink: KnownRowsByClient = field(default_factory=dict)
    enrolled_again: set[int] = field(default_factory=set)
    asked: dict[int, int] = field(default_factory=dict)
    rounds_without_quorum: int = 0
    totals: dict[str, int] = field(default_factory=dict)
    identity: str = ""

    def commit(
        self, round: int, reports: Iterable[ClientReport], sent: Mapping[int, KnownRows | None]
    ) -> None:
        """Note from which state these clients continue, and which rows both ends now know.

        Args:
            round: the round that they reported on.
            reports: the good ones.
            sent: by client, the rows that it knows once it has what it was sent.
        """
        for report in reports:
            self.base[report.client] = round
            if report.client in sent:
                self.downlink[report.client] = sent[report.client]
            if isinstance(report.answer, SoftLabels):
                self.uplink[report.client] = report.known

    def enrol_again(self, client: int) -> bool:
        """Let a client begin like a new one, once in a run; return whether it may.

        What it has been asked for so far still counts.
        """
        if client in self.enrolled_again:
            return False
        self.enrolled_again.add(client)
        self.base.pop(client, None)
        self.downlink.pop(client, None)
        self.uplink.pop(client, None)
        return True

    def check(self, folder: RunFolder, identity: str) -> None:
        """Raise an error if this is the checkpoint of a run that is known by another identity.

        Raises:
            FedkdError: it is.
        """
        if self.identity != identity:
            raise FedkdError(
                f"{folder.path}: {FILE} and identity.json are of different runs; restore them, or "
                "start a new run"
            )

    def save(self, folder: Path) -> None:
        """Write the file.

        Raises:
            FedkdError: it cannot be written; the previous one is intact.
        """
        tensors, described = _knowledge_out(self.knowledge)
        tensors |= {f"model/{name}": tensor for name, tensor in (self.model or {}).items()}
        scalars = {n: value for n, value in self.state.items() if not isinstance(value, Tensor)}
        memory = {n: value for n, value in self.state.items() if isinstance(value, Tensor)}
        tensors |= {f"state/{name}": tensor for name, tensor in memory.items()}
        numbers: dict[int, int] = {}
        listed = {"sent": _listed(self.downlink, numbers, tensors)}
        listed |= {"heard": _listed(self.uplink, numbers, tensors)}
        fields = {
            "round": self.round,
            "knowledge": described,
            "knowledge_round": self.knowledge_round,
            "state": scalars,
            "trained": self.trained,
            "base": sorted(self.base.items()),
            **listed,
            "enrolled_again": sorted(self.enrolled_again),
            "asked": sorted(self.asked.items()),
            "lost": self.rounds_without_quorum,
            "totals": self.totals,
            "identity": self.identity,
        }
        # Copies, as safetensors refuses tensors that share memory.
        copies = {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}
        content = {n: t.contiguous() for n, t in copies.items()}
        replace_file(folder / FILE, save(content, metadata={_FIELDS: json.dumps(fields)}))

    @classmethod
    def load(cls, folder: Path) -> Checkpoint:
        """Return the checkpoint of a run folder; an empty one if no round has been finished.

        Raises:
            FedkdError: the file cannot be read.
        """
        path = folder / FILE
        if not path.exists():
            return cls()
        tensors, metadata = read_safetensors(path)
        try:
            return cls._of(json.loads(metadata[_FIELDS]), tensors)
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise FedkdError(f"{path} is not a checkpoint of this version ({error!r})") from None

    @classmethod
    def _of(cls, fields: dict[str, Any], tensors: Mapping[str, Tensor]) -> Checkpoint:
        known_by_number: dict[int, KnownRows] = {}
        directions = ("sent", "heard")
        for number in {each for name in directions for _, each in fields[name]} - {None}:
            parts = _under(f"references/{number}", tensors)
            known_by_number[number] = KnownRows(parts["codes"], parts["known"])
        opened = {
            direction: {client: known_by_number.get(number) for client, number in fields[direction]}
            for direction in directions
        }
        return cls(
            round=fields["round"],
            knowledge=_knowledge_in(fields["knowledge"], _under("knowledge", tensors)),
            knowledge_round=fields["knowledge_round"],
            state={**fields["state"], **_under("state", tensors)},
            model=_under("model", tensors) or None,
            trained=fields["trained"],
            base=dict(fields["base"]),
            downlink=opened["sent"],
            uplink=opened["heard"],
            enrolled_again=set(fields["enrolled_again"]),
            asked=dict(fields["asked"]),
            rounds_without_quorum=fields["lost"],
            totals=fields["totals"],
            identity=fields["identity"],
        )


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors whose names begin with a prefix, without it."""
    start = f"{prefix}/"
    return {n.removeprefix(start): t for n, t in tensors.items() if n.startswith(start)}


def _listed(
    known_by_client: KnownRowsByClient, numbers: dict[int, int], tensors: dict[str, Tensor]
) -> list[tuple[int, int | None]]:
    """Return the number of each client's rows, and add the tensors of each object once to `tensors`."""
    numbered: list[tuple[int, int | None]] = []
    for client, known in sorted(known_by_client.items(), key=lambda item: item[0]):
        if known is None:
            numbered.append((client, None))
            continue
        if id(known) not in numbers:
            number = numbers[id(known)] = len(numbers)
            tensors[f"references/{number}/codes"] = known.codes
            tensors[f"references/{number}/known"] = known.known
        numbered.append((client, numbers[id(known)]))
    return numbered


def _knowledge_out(knowledge: Knowledge | None) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """Return the tensors of knowledge by name, and the fields that describe it."""
    if knowledge is None:
        return {}, None
    tensors = {f"knowledge/{name}": tensor for name, tensor in knowledge.tensors().items()}
    return tensors, {"kind": knowledge.kind, **knowledge.stored_fields()}


def _knowledge_in(fields: dict[str, Any] | None, tensors: Mapping[str, Tensor]) -> Knowledge | None:
    return None if fields is None else BY_NAME[fields["kind"]].from_tensors(tensors, fields)
