"""ExpGuard: exponential weights over how far out each client has been so far.

Christophe Roux, Max Zimmer, Sebastian Pokutta, On the Byzantine-Resilience of Distillation-Based
Federated Learning, ICLR 2025, arXiv:2402.12265; the authors' code is ZIB-IOL/FedDistill.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fedkd.knowledge import Knowledge, Rule, SoftLabels, combine
from fedkd.phases import Digest, Phase, Predict, Revisit
from fedkd.strategy import DistillationStrategy, Facts, Positive, Replies, Server


class ExpGuard(DistillationStrategy):
    """Mean of client probabilities in which a client counts less the farther out it has been so far.

    A robust rule gives the prediction of the majority for each sample. A client's outlier score is its
    mean distance from that, and its weight exp(−η · Σ scores of all rounds): a client that lies round
    after round soon counts for nothing. Not to be confused with Cronus and the robust rules of DS-FL,
    which judge each sample by itself and remember nothing. The public set needs no labels; mixed
    architectures are welcome.

    Departures from the paper:

    1. Clients learn as in DS-FL, with its simple aggregation; in the paper they begin each round with the
       weights of a model that the server has distilled.
    2. A client that does not answer in a round keeps its weight, and those that do redistribute their
       total weight (as in Freund et al. 1997, "Using and combining predictors that specialize"): absence
       changes no weight. Where all answer this is the paper's rule.
    3. The default of η is not the paper's, whose values are not in its code.

    Args:
        step_size: η, by how much a score (0 to √2) lowers the logarithm of a client's weight.
        combine: the rule that gives the prediction of the majority.
    """

    facts = Facts(
        paper="2402.12265",
        up="P*C*4",
        down="P*C*4 + 2*I",
        server_model="optional",
        headline="server",
        bibtex=r"""
        @inproceedings{roux2025expguard,
          title = {On the {Byzantine}-Resilience of Distillation-Based Federated Learning},
          author = {Roux, Christophe and Zimmer, Max and Pokutta, Sebastian},
          booktitle = {International Conference on Learning Representations},
          year = {2025},
          eprint = {2402.12265},
          archiveprefix = {arXiv},
        }
        """,
    )

    step_size: Positive = 5.0
    combine: Rule = "median"

    def phases(self, round: int) -> list[Phase]:
        return [Digest(), Revisit(), Predict("probabilities")]

    def aggregate(self, labels: SoftLabels) -> Tensor:
        """Return the mean of the first round, in which all clients start with equal weights."""
        equal_K = torch.zeros(len(labels.clients), dtype=torch.float64)
        return _weighted_mean(labels, self._updated(labels, equal_K))

    def update(self, replies: Replies, server: Server) -> Knowledge | None:
        labels = replies.labels
        if labels is None:
            return None
        logs_K = _log_weights(server)
        logs_K[labels.clients] = self._updated(labels, logs_K[labels.clients])
        server.state["log_weights"] = logs_K
        combined_NC = _weighted_mean(labels, logs_K[labels.clients])
        return SoftLabels.shared(combined_NC, labels.samples, labels.space)

    def _updated(self, labels: SoftLabels, logs_K: Tensor) -> Tensor:
        """Return the logarithms of the weights that clients have after this round, float64 ``[K]``."""
        values_KNC, answered_K = labels.values.double(), labels.mask.any(1)
        common_NC = combine(values_KNC, labels.mask, self.combine)
        apart_KN = (values_KNC - common_NC).norm(dim=-1).masked_fill(~labels.mask, 0.0)
        score_K = apart_KN.sum(1) / labels.mask.sum(1).clamp_min(1)
        lower_K = logs_K - self.step_size * score_K
        shared = logs_K[answered_K].logsumexp(0) - lower_K[answered_K].logsumexp(0)
        return torch.where(answered_K, lower_K + shared, logs_K)


def _log_weights(server: Server) -> Tensor:
    """Return the logarithms of all clients' weights, float64 ``[K]``, as a copy."""
    logs_K = server.state.get("log_weights", torch.zeros(server.num_clients, dtype=torch.float64))
    assert isinstance(logs_K, Tensor)
    return logs_K.clone()


def _weighted_mean(labels: SoftLabels, logs_K: Tensor) -> Tensor:
    """Return the weighted average over the clients that answered, ``[N, C]``."""
    logs_KN = logs_K.unsqueeze(1).expand(labels.mask.shape)
    weights_KN = logs_KN.masked_fill(~labels.mask, -torch.inf).softmax(0)
    weighed_KNC = weights_KN.unsqueeze(-1) * labels.values.double()
    answered_KN1 = labels.mask.unsqueeze(-1)
    return weighed_KNC.masked_fill(~answered_KN1, 0.0).sum(0).to(labels.values.dtype)
