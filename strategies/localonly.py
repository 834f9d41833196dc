"""Local only: every student trains alone on its own shard, the baseline for what collaboration gains."""

from __future__ import annotations

from fedkd.phases import Phase, Revisit
from fedkd.strategy import DistillationStrategy, Facts


class LocalOnly(DistillationStrategy):
    """Students train on their private shards with hard labels; nothing crosses the wire.

    A round is ``local-epochs`` passes with a fresh optimiser, as in every other strategy.
    """

    facts = Facts(paper="none", up="0", down="0", mixed_models=False, distils=False)

    def phases(self, round: int) -> list[Phase]:
        return [Revisit(model="student")]
