"""What each client receives of the newest knowledge, encoded once for all who receive the same."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from weakref import WeakValueDictionary

from fedkd.federation.algorithm import CheckedAlgorithm
from fedkd.federation.checkpoint import Checkpoint
from fedkd.federation.knowledge_records import encode_knowledge
from fedkd.federation.server import Server
from fedkd.knowledge import Knowledge, SoftLabels, Weights
from fedkd.knowledge.codec import KnownRows
from fedkd.phases import Phase

_Records = dict[str, Any]


class SharedKnownRows:
    """One object for all clients that have the same soft labels, however they got them.

    An object that no client has any more is dropped.
    """

    def __init__(self) -> None:
        self._by_fingerprint: WeakValueDictionary[bytes, KnownRows] = WeakValueDictionary()

    def shared(self, known: KnownRows | None) -> KnownRows | None:
        """Return the one object that is used for all rows equal to these."""
        if known is None:
            return None
        return self._by_fingerprint.setdefault(known.fingerprint(), known)


class Outgoing:
    """The knowledge that goes out in one exchange.

    Args:
        algorithm: decides what each client receives.
        server: has the experiment and the sizes of the public set.
        checkpoint: the newest knowledge, and what each client already has.
        known_rows: of this federation.
    """

    def __init__(
        self,
        algorithm: CheckedAlgorithm,
        server: Server,
        checkpoint: Checkpoint,
        known_rows: SharedKnownRows,
    ) -> None:
        self._algorithm = algorithm
        self._experiment = server.experiment
        self._sizes = server.data.sizes
        self._checkpoint = checkpoint
        self._known_rows = known_rows
        # By the ids of what was encoded and of what its receivers had. Both objects are stored too:
        # another object could get the id of a freed one.
        self._encodings: dict[
            tuple[int, int], tuple[object, object, _Records, KnownRows | None]
        ] = {}

    def records_for(
        self, client: int, phases: Sequence[Phase]
    ) -> tuple[_Records, KnownRows | None] | None:
        """Encode what a client receives, once for all who receive the same and have the same.

        Args:
            client: partition id.
            phases: what it is to do with the knowledge.

        Returns:
            The records, and what the client has of our soft labels once it has received them; ``None`` if
            there is no knowledge for it.

        Raises:
            FedkdError: the algorithm's error, with its location.
        """
        if self._checkpoint.knowledge is None:
            return None
        part = self._algorithm.personalise(self._checkpoint.knowledge, client, phases)
        identity: object = part
        if isinstance(part, Weights):
            student = self._experiment.student_of(client)
            if student not in part.by_model:
                return None
            identity, part = part.by_model[student], part.only(student)
        known = self._checkpoint.downlink.get(client)
        key = id(identity), id(known)
        if key not in self._encodings:
            with self._algorithm.attributed_to("personalise", [client]):
                self._algorithm.check_knowledge(part)
                self._encodings[key] = (identity, known, *self._encoded(part, known))
        *_, records, newer = self._encodings[key]
        return records, newer

    def _encoded(
        self, part: Knowledge, known: KnownRows | None
    ) -> tuple[_Records, KnownRows | None]:
        """Encode knowledge for clients that already have `known` of it."""
        if not isinstance(part, SoftLabels):
            return encode_knowledge(part, self._sizes, asked=False), None
        packed, newer = part.pack(self._algorithm.wire_down, self._sizes.num_public, known)
        return encode_knowledge(packed, self._sizes, asked=False), self._known_rows.shared(newer)
