"""FedMD: Heterogenous Federated Learning via Model Distillation.

Daliang Li and Junpu Wang, 2019, arXiv:1910.03581, algorithm 1.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from fedkd.knowledge import Rule, SoftLabels, combine_logits
from fedkd.losses import mae_logits
from fedkd.phases import Digest, Fit, Phase, Predict, Revisit, import_path
from fedkd.strategy import Count, DistillationStrategy, Facts


class FedMD(DistillationStrategy):
    """Clients agree on the mean of their logits; each digests it, then revisits its own data.

    Not to be confused with DS-FL, which averages probabilities: the mean of logits is a geometric
    mean of probabilities. Mixed architectures are welcome; no weights leave a client. The first round
    is transfer learning: train on the public labels (skipped where there are none), then on the
    private shard.

    Args:
        digest: ``"kl"`` is the τ-softened loss of the experiment's α and τ; ``"mae"`` the mean
            absolute error between logits, as in the authors' code.
        transfer_epochs: passes over the labelled public set in round 1 (the authors': up to 20).
        combine: ``"mean"``, or a robust rule in its place (`fedkd.knowledge.combine`), of logits.
    """

    facts = Facts(
        paper="1910.03581",
        up="P*C*4",
        down="P*C*4 + 2*I",
        server_model="optional",
        bibtex=r"""
        @misc{li2019fedmd,
          title = {{FedMD}: Heterogenous Federated Learning via Model Distillation},
          author = {Li, Daliang and Wang, Junpu},
          year = {2019},
          eprint = {1910.03581},
          archiveprefix = {arXiv},
        }
        """,
    )
    closes = "revisit"

    digest: Literal["kl", "mae"] = "kl"
    transfer_epochs: Count = 5
    combine: Rule = "mean"

    def phases(self, round: int) -> list[Phase]:
        if round == 1:
            transfer = Fit("transfer", "teacher", public={"ce": 1.0}, epochs=self.transfer_epochs)
            return [transfer, Revisit(), Predict()]
        if self.digest == "kl":
            return [Digest(), Revisit(), Predict()]
        mae = Fit("digest", public={import_path(mae_logits): 1.0})
        return [mae, Revisit(), Predict()]

    def aggregate(self, labels: SoftLabels) -> Tensor:
        return combine_logits(labels, self.combine)
