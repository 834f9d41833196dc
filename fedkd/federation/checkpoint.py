"""What a server has to remember of a federation to go on after its process is gone.

One file, ``server.safetensors`` in the run folder, replaced as a whole after every round: tensors by
name, and the rest as JSON in the file's header. It is written last, after the states of the clients and
the records of the round; whoever resumes goes by it, and drops what is newer.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from fedkd.errors import FedkdError
from fedkd.knowledge import Knowledge
from fedkd.knowledge.codec import KnownRows
from fedkd.knowledge.kinds import BY_NAME
from fedkd.records.files import replace_file
from fedkd.training.parameters import State

FILE = "server.safetensors"

_SAID = "fedkd"
"""The entry of the header in which the rest stands."""

KnownRowsByClient = dict[int, KnownRows | None]
"""What a client has of our soft labels, or we of its, by client."""


@dataclass(eq=False)
class Checkpoint:
    """What a server remembers after a round.

    Attributes:
        round: the round, from 1; 0 before the first.
        knowledge: the newest, if there is any.
        knowledge_round: the round that it came out of.
        state: the strategy's memory.
        model: parameters and buffers of the server's model, where it keeps one.
        trained: whether that model has been trained.
        base: by client, the round of the state that it goes on from.
        downlink: rows of our soft labels that clients know, where only changes are sent.
        uplink: rows of theirs that we know.
        asked: by client, the rows of soft labels that it was asked for in all.
        rounds_without_quorum: how many in a row, up to this one.
        totals: bytes so far.
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
    asked: dict[int, int] = field(default_factory=dict)
    rounds_without_quorum: int = 0
    totals: dict[str, int] = field(default_factory=dict)

    def save(self, folder: Path) -> None:
        """Write the file.

        Raises:
            FedkdError: it cannot be written; the one before it is still there.
        """
        tensors, kind = _knowledge_out(self.knowledge)
        tensors |= {f"model/{name}": tensor for name, tensor in (self.model or {}).items()}
        scalars = {n: value for n, value in self.state.items() if not isinstance(value, Tensor)}
        kept = {n: value for n, value in self.state.items() if isinstance(value, Tensor)}
        tensors |= {f"state/{name}": tensor for name, tensor in kept.items()}
        places: dict[int, int] = {}
        listed = {"sent": _listed(self.downlink, places, tensors)}
        listed |= {"heard": _listed(self.uplink, places, tensors)}
        said = {
            "round": self.round,
            "knowledge": kind,
            "knowledge_round": self.knowledge_round,
            "state": scalars,
            "trained": self.trained,
            "base": sorted(self.base.items()),
            **listed,
            "asked": sorted(self.asked.items()),
            "lost": self.rounds_without_quorum,
            "totals": self.totals,
        }
        # Copies, as safetensors refuses tensors that share memory.
        alone = {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}
        content = {n: t.contiguous() for n, t in alone.items()}
        replace_file(folder / FILE, save(content, metadata={_SAID: json.dumps(said)}))

    @classmethod
    def load(cls, folder: Path) -> Checkpoint:
        """Read the file; a run that has not finished a round has none, and begins at the beginning.

        Raises:
            FedkdError: the file cannot be read.
        """
        path = folder / FILE
        if not path.exists():
            return cls()
        try:
            with safe_open(path, "pt") as file:
                said = json.loads(file.metadata()[_SAID])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return cls._of(said, tensors)
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
            raise FedkdError(f"{path} is no checkpoint of this version ({error!r})") from None

    @classmethod
    def _of(cls, said: dict[str, Any], tensors: Mapping[str, Tensor]) -> Checkpoint:
        known_by_number: dict[int, KnownRows] = {}
        for number in {place for each in ("sent", "heard") for _, place in said[each]} - {None}:
            parts = _under(f"references/{number}", tensors)
            known_by_number[number] = KnownRows(parts["codes"], parts["known"])
        opened = {
            each: {client: known_by_number.get(place) for client, place in said[each]}
            for each in ("sent", "heard")
        }
        return cls(
            round=said["round"],
            knowledge=_knowledge_in(said["knowledge"], _under("knowledge", tensors)),
            knowledge_round=said["knowledge_round"],
            state={**said["state"], **_under("state", tensors)},
            model=_under("model", tensors) or None,
            trained=said["trained"],
            base=dict(said["base"]),
            downlink=opened["sent"],
            uplink=opened["heard"],
            asked=dict(said["asked"]),
            rounds_without_quorum=said["lost"],
            totals=said["totals"],
        )


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors whose names begin with a prefix, without it."""
    start = f"{prefix}/"
    return {n.removeprefix(start): t for n, t in tensors.items() if n.startswith(start)}


def _listed(
    known_by_number: KnownRowsByClient, places: dict[int, int], tensors: dict[str, Tensor]
) -> list[tuple[int, int | None]]:
    """Number references, each object once, and put their tensors beside the others."""
    found: list[tuple[int, int | None]] = []
    for client, known in sorted(known_by_number.items(), key=lambda item: item[0]):
        if known is None:
            found.append((client, None))
            continue
        if id(known) not in places:
            number = places[id(known)] = len(places)
            tensors[f"references/{number}/codes"] = known.codes
            tensors[f"references/{number}/known"] = known.known
        found.append((client, places[id(known)]))
    return found


def _knowledge_out(knowledge: Knowledge | None) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """Return the tensors of knowledge by name, and what is to be said of it."""
    if knowledge is None:
        return {}, None
    tensors = {f"knowledge/{name}": tensor for name, tensor in knowledge.tensors().items()}
    return tensors, {"kind": knowledge.kind, **knowledge.stored_fields()}


def _knowledge_in(said: dict[str, Any] | None, tensors: Mapping[str, Tensor]) -> Knowledge | None:
    return None if said is None else BY_NAME[said["kind"]].from_tensors(tensors, said)
