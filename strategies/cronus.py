"""Cronus: Robust and Heterogeneous Collaborative Learning with Black-Box Knowledge Transfer.

Hongyan Chang, Virat Shejwalkar, Reza Shokri, Amir Houmansadr, 2019, arXiv:1912.11279; its robust mean is
the spectral filter of Diakonikolas, Kamath, Kane, Li, Moitra, Stewart, ICML 2017, arXiv:1703.00893.
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from fedkd.knowledge import SoftLabels, in_canonical_order
from fedkd.phases import Fit, Phase, Predict, Revisit
from fedkd.strategy import DistillationStrategy, Facts

_TIE = 1e-9
"""Outlier scores (at most √2) and relative variances that differ by no more are equal."""


class Cronus(DistillationStrategy):
    """Robust mean of client probabilities; clients train on it and on their own data at once.

    For each public sample the clients' covariance shows the direction in which they differ most; those
    that are farthest out along it are dropped; the rest is filtered once more, and averaged. The first
    round is local training alone. Not to be confused with DS-FL and FedMD, which trust every client, and
    digest and revisit in turn. The public set needs no labels; mixed architectures are welcome. There is
    one model a client, the student: a local teacher is not used.

    Departures from the paper:

    1. The filter drops ε·K clients in two passes, half of them each, the first half rounded up: so the
       code of Roux et al. (2024, arXiv:2402.12265) describes its own. What it computes drops fewer,
       as quantiles are rounded in favour of keeping: 1 of 5 where 2 may be malicious, 3 of 10 where 4
       may be, so that some always stay in the mean. The original continues until the greatest variance is
       below a threshold, for which that of honest answers has to be known, and draws at random how many
       to drop.
    2. Clients that are equally far out lose equal shares of their weight, and where several directions
       have the same variance, the distance in all of them counts: the order of clients and of classes
       does not matter.
    3. A step takes a batch of each set with equal weight, whatever their sizes, and the soft labels
       teach by the divergence at the experiment's τ; at τ = 1 it is the paper's cross entropy.

    Args:
        epsilon: ε, the share of the clients that may be malicious, of those that answered a sample; 0.5,
            and any other share that is not a minority, means the largest minority.
    """

    facts = Facts(
        paper="1912.11279",
        up="P*C*4",
        down="P*C*4 + 2*I",
        server_model="optional",
        bibtex=r"""
        @misc{chang2019cronus,
          title = {Cronus: Robust and Heterogeneous Collaborative Learning with Black-Box Knowledge
            Transfer},
          author = {Chang, Hongyan and Shejwalkar, Virat and Shokri, Reza and Houmansadr, Amir},
          year = {2019},
          eprint = {1912.11279},
          archiveprefix = {arXiv},
        }
        """,
    )

    epsilon: Annotated[float, Field(ge=0, le=0.5)] = 0.5

    def phases(self, round: int) -> list[Phase]:
        answer = Predict("probabilities", model="student")
        if round == 1:
            return [Revisit(model="student"), answer]
        return [Fit("digest", private={"ce": 1.0}, public={"kl": 1.0}), answer]

    def aggregate(self, labels: SoftLabels) -> Tensor:
        rows_KNC, answered_KN = in_canonical_order(labels.values.double(), labels.mask)
        weights_KN, malicious_N = answered_KN.double(), self._malicious(answered_KN.sum(0))
        for dropped_N in ((malicious_N + 1) // 2, malicious_N // 2):
            scores_KN = _outlier_scores(rows_KNC, weights_KN)
            weights_KN = _without_farthest(weights_KN, scores_KN, dropped_N)
        return _mean(rows_KNC, weights_KN).to(labels.values.dtype)

    def _malicious(self, answered_N: Tensor) -> Tensor:
        """Return how many of the clients that answered a sample are to be dropped."""
        share_N = (self.epsilon * answered_N.double() + _TIE).floor().long()
        return share_N.minimum((answered_N - 1).clamp_min(0) // 2)


def _outlier_scores(rows_KNC: Tensor, weights_KN: Tensor) -> Tensor:
    """Return the distance from the mean in the direction of the greatest variance, ``[K, N]``."""
    centred_NKC = (rows_KNC - _mean(rows_KNC, weights_KN)).transpose(0, 1)
    # Right singular vectors are the covariance's eigenvectors, squared singular values the variances.
    weighted_NKC = centred_NKC * weights_KN.T.sqrt().unsqueeze(-1)
    _, s_NR, v_NRC = torch.linalg.svd(weighted_NKC, full_matrices=False)
    is_top_NR = s_NR.square() >= (1 - _TIE) * s_NR[:, :1].square()
    along_NKR = (centred_NKC @ v_NRC.mT) * is_top_NR.unsqueeze(1)
    scores_NK: Tensor = along_NKR.norm(dim=-1)
    return scores_NK.T


def _without_farthest(weights_KN: Tensor, scores_KN: Tensor, dropped_N: Tensor) -> Tensor:
    """Return the weights less those of `dropped_N` clients, the greatest scores first, ``[K, N]``."""
    scores_KN = torch.where(weights_KN > 0, scores_KN, -1.0)
    ranked_KN, order_KN = scores_KN.sort(stable=True, dim=0, descending=True)
    group_KN = torch.zeros_like(order_KN)  # ties are one group; 0 is the farthest
    group_KN[1:] = (ranked_KN.diff(dim=0) < -_TIE).cumsum(0)
    group_KN = group_KN.scatter(0, order_KN, group_KN)  # by client
    sizes_GN = torch.zeros_like(weights_KN).scatter_add(0, group_KN, weights_KN)
    farther_GN = sizes_GN.cumsum(0) - sizes_GN
    left_GN = (1 - (dropped_N - farther_GN) / sizes_GN.clamp_min(_TIE)).clamp(0, 1)
    return weights_KN * left_GN.gather(0, group_KN)


def _mean(rows_KNC: Tensor, weights_KN: Tensor) -> Tensor:
    """Return the weighted average over clients, ``[N, C]``."""
    total_NC = (rows_KNC * weights_KN.unsqueeze(-1)).sum(0)
    return total_NC / weights_KN.sum(0).clamp_min(1).unsqueeze(-1)
