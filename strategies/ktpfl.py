"""KT-pFL: Parameterized Knowledge Transfer for Personalized Federated Learning.

Jie Zhang, Song Guo, Xiaosong Ma, Haozhao Wang, Wenchao Xu, Feijie Wu, NeurIPS 2021, arXiv:2111.02862,
section 3 and algorithm 1; the fit is that of the authors' code.
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from fedkd.knowledge import Knowledge, SoftLabels
from fedkd.phases import Digest, Phase, Predict, Revisit
from fedkd.strategy import Count, DistillationStrategy, Facts, Positive, Replies, Server


class KTpFL(DistillationStrategy):
    """Every client has a teacher of its own: a mixture of all clients, with coefficients that are learnt.

    Client k digests Σ_l c_kl p_l, where p_l are the soft predictions of client l. The matrix c starts
    at 1/K and takes one gradient step a round on MSE(p_k, Σ_l c_kl p_l) + ρ MSE(c_k, 1/K): clients that
    predict alike come to teach each other, and ρ pulls coefficients towards 1/K. Needs no public labels;
    mixed architectures are welcome. Not to be confused with COMET, which has one teacher a cluster.

    Departures from the paper and its authors' code:

    1. The fit is the squared error of the code, where the paper has a divergence of the mixture from
       p_k; the penalty is a mean over K as in the code, for the paper's ‖c_k − 1/K‖² is K times that.
    2. After a step, what is below 0 becomes 0 and rows are divided by their sums. The code takes
       softmax(5 c) instead, which halves what was learnt every round (of 10 clients).
    3. A step is `learning_rate` times the gradient. The code scales each row's gradient by a power of
       5, until its entries are 0.01 to 0.05 on average.
    4. Predictions are mixed at temperature 1 and softened by the digest's τ, not the other way round.
    5. Coefficients of clients that did not answer a round do not change; those of the others step within
       the remaining share, on the samples that all of them answered. A teacher is mixed from the clients
       that answered, with coefficients that sum to 1; no client counts as having answered zeros.
    6. The paper and its code digest by the divergence alone. Here, as in all digests, 1 − α of the loss
       is CE: on the public labels where there are some, else on private batches; none at ``alpha = 1``.

    Args:
        rho: ρ, the pull towards equal coefficients; 0.7 in most of the authors' settings.
        learning_rate: of the coefficients.
        steps: gradient steps a round.
    """

    facts = Facts(
        paper="2111.02862",
        up="P*C*4",
        down="P*C*4 + 2*I",
        bibtex=r"""
        @inproceedings{zhang2021ktpfl,
          title = {Parameterized Knowledge Transfer for Personalized Federated Learning},
          author = {Zhang, Jie and Guo, Song and Ma, Xiaosong and Wang, Haozhao and Xu, Wenchao and
            Wu, Feijie},
          booktitle = {Advances in Neural Information Processing Systems},
          volume = {34},
          pages = {10092--10104},
          year = {2021},
          eprint = {2111.02862},
          archiveprefix = {arXiv},
        }
        """,
    )

    rho: Annotated[float, Field(ge=0)] = 0.7
    learning_rate: Positive = 1.0
    steps: Count = 1

    def phases(self, round: int) -> list[Phase]:
        return [Digest(), Revisit(), Predict("probabilities")]

    def aggregate(self, labels: SoftLabels) -> Tensor:
        """Return the teacher that all clients share before any coefficient is learnt, ``[N, C]``."""
        return labels.mean_probabilities()

    def update(self, replies: Replies, server: Server) -> SoftLabels:
        assert replies.labels is not None
        answered = replies.labels.clients
        common = replies.labels.values[:, replies.labels.mask.all(0)].double().flatten(1)
        c_KK = _coefficients(server)
        block_SS = c_KK[answered.unsqueeze(1), answered]
        share_S1, c_SS = block_SS.sum(1, keepdim=True), _normalised(block_SS)
        for _ in range(self.steps):
            c_SS = _normalised(c_SS - self.learning_rate * self._gradient(c_SS, common))
        c_KK[answered.unsqueeze(1), answered] = share_S1 * c_SS
        server.state["coefficients"] = c_KK
        return replies.labels

    def _gradient(self, c_SS: Tensor, p_SM: Tensor) -> Tensor:
        """Return the gradient of MSE(p_k, Σ_l c_kl p_l) + ρ MSE(c_k, 1/S) by c, for all S clients k."""
        fit = 2 * (c_SS @ p_SM - p_SM) @ p_SM.T / max(p_SM.shape[1], 1)
        return fit + 2 * self.rho * (c_SS - 1 / len(c_SS)) / len(c_SS)

    def personalise(self, knowledge: Knowledge, client: int, server: Server) -> SoftLabels:
        assert isinstance(knowledge, SoftLabels)
        if bool(knowledge.mask.all()):
            c_S = _normalised(_coefficients(server)[client, knowledge.clients].unsqueeze(0))
            flat_SM = knowledge.values.flatten(1)
            mixed_NC = (c_S.to(flat_SM.dtype) @ flat_SM).view(knowledge.values.shape[1:])
            return SoftLabels.shared(mixed_NC, knowledge.samples, knowledge.space)
        answered_SN = knowledge.mask.to(knowledge.values.dtype)
        c_S = _coefficients(server)[client, knowledge.clients].to(knowledge.values.dtype)
        share_SN = c_S.unsqueeze(1) * answered_SN
        # Where its coefficients of all clients that answered are 0, these count equally.
        share_SN = torch.where(share_SN.sum(0) > 0, share_SN, answered_SN)
        mixed_NC = torch.einsum("sn,snc->nc", share_SN / share_SN.sum(0), knowledge.values)
        return SoftLabels.shared(mixed_NC, knowledge.samples, knowledge.space)


def _coefficients(server: Server) -> Tensor:
    """Return c, float64 ``[K, K]``: row k makes the teacher of client k."""
    k = server.num_clients
    c = server.state.get("coefficients", torch.full((k, k), 1 / k, dtype=torch.float64))
    assert isinstance(c, Tensor)
    return c


def _normalised(rows: Tensor) -> Tensor:
    """Return rows clamped at 0 and divided by their sums; equal shares where a sum is 0."""
    rows = rows.clamp_min(0)
    total = rows.sum(1, keepdim=True)
    return torch.where(total > 0, rows / total, 1 / rows.shape[1])
