"""COMET (also PerFed-CKT): Personalized Federated Learning via Clustered Knowledge Transfer.

Yae Jee Cho, Jianyu Wang, Tarun Chiruvolu, Gauri Joshi, 2021 (IEEE JSTSP 2023), arXiv:2109.08119.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from fedkd.knowledge import SoftLabels, in_canonical_order
from fedkd.phases import Apply, Fit, LocalClient, Phase, Predict, Revisit, procedure
from fedkd.strategy import Count, DistillationStrategy, Facts, Positive

By = Literal["client", "sample"]

_STEPS = 100
"""The most iterations of k-means, which stops earlier if no centroid moves."""


@procedure
def nearest_centroid(client: LocalClient, by: By) -> None:
    """Replace the received centroids ``[M, N, C]`` by the one nearest to the client's own prediction.

    The choice is made for each sample, or for all by the sum of their squared distances.
    """
    if client.received is None:
        return
    centroids_MNC, samples = client.received.values, client.received.samples
    own_NC = client.predict(samples, "student").softmax(-1).to(centroids_MNC)
    squared_MN = (centroids_MNC - own_NC).square().sum(-1)
    if by == "client":
        squared_MN = squared_MN.sum(1, keepdim=True).expand_as(squared_MN)
    nearest_1NC = squared_MN.argmin(0).view(1, -1, 1).expand_as(centroids_MNC[:1])
    chosen_1NC = centroids_MNC.gather(0, nearest_1NC)
    client.received = SoftLabels(chosen_1NC, client.received.space, samples)


class COMET(DistillationStrategy):
    """Clusters of what clients predict; each client learns from the cluster nearest to it.

    The server sends the centroids of all clusters, and each client chooses: knowledge is personal
    although all receive the same. The public set needs no labels; mixed architectures are welcome. Not
    to be confused with KTpFL, whose server mixes knowledge for each client. There is one model a client,
    the student, which learns from both sets at once: a local teacher is not used.

    Departures from the paper:

    1. k-means starts from the clients farthest from the mean and from each other: no randomness, and
       no dependence on the order of clients. With fewer distinct clients than clusters, some centroids
       are the same.
    2. A sample that a client did not answer gets the others' mean.
    3. The regulariser is the divergence at the experiment's τ, not the squared distance of outputs.
    4. ``by="sample"`` is not the paper's but that of the code published with SCARLET (Azuma et al. 2025,
       arXiv:2504.19602): clients are clustered, and choose, separately for each sample.

    Args:
        clusters: M, number of centroids.
        weight: λ, of the regulariser beside the cross entropy on private data.
        by: what is clustered: each ``"client"`` by all that it predicts, or for each ``"sample"`` the
            clients' answers to it.
    """

    facts = Facts(
        paper="2109.08119",
        up="P*C*4",
        down="clusters*P*C*4 + 2*I",
        bibtex=r"""
        @misc{cho2021comet,
          title = {Personalized Federated Learning for Heterogeneous Clients with Clustered Knowledge
            Transfer},
          author = {Cho, Yae Jee and Wang, Jianyu and Chiruvolu, Tarun and Joshi, Gauri},
          year = {2021},
          eprint = {2109.08119},
          archiveprefix = {arXiv},
          note = {Named COMET in the journal version, doi 10.1109/JSTSP.2022.3231527},
        }
        """,
    )

    clusters: Count = 2
    weight: Positive = 1.0
    by: By = "client"

    def phases(self, round: int) -> list[Phase]:
        answer = Predict("probabilities", model="student")
        # A client that joins later receives centroids in its first round already.
        choose = Apply(nearest_centroid, {"by": self.by}, name="choose")
        if round == 1:
            return [choose, Revisit(model="student"), answer]
        return [choose, Fit("digest", private={"ce": 1.0}, public={"kl": self.weight}), answer]

    def aggregate(self, labels: SoftLabels) -> SoftLabels:
        rows_KNC = labels.values.double()
        if self.by == "sample":
            centroids_MNC = _k_means(*in_canonical_order(rows_KNC, labels.mask), self.clusters)
        else:
            mean_NC = labels.mean_probabilities().double()
            filled_KNC = torch.where(labels.mask.unsqueeze(-1), rows_KNC, mean_NC)
            clients_K1D = filled_KNC[labels.clients.argsort()].flatten(1).unsqueeze(1)
            all_K1 = clients_K1D.new_ones(clients_K1D.shape[:2]).bool()
            centroids_M1D = _k_means(clients_K1D, all_K1, self.clusters)
            centroids_MNC = centroids_M1D.view(self.clusters, *rows_KNC.shape[1:])
        return SoftLabels(centroids_MNC.to(labels.values.dtype), "probabilities", labels.samples)


def _k_means(rows_KND: Tensor, answered_KN: Tensor, clusters: int) -> Tensor:
    """Return the centroids of K vectors for each of N samples, ``[M, N, D]``, the largest cluster first.

    By Lloyd's k-means. Vectors of clients that did not answer do not count. A cluster that
    becomes empty keeps its last centroid.
    """
    centroids_MND = _seeds(rows_KND, answered_KN, clusters)
    for _ in range(_STEPS):
        member_MKN = _members(rows_KND, answered_KN, centroids_MND)
        sizes_MN1 = member_MKN.sum(1).unsqueeze(-1)
        totals_MND = torch.einsum("mkn,knd->mnd", member_MKN, rows_KND)
        moved_MND = torch.where(sizes_MN1 > 0, totals_MND / sizes_MN1, centroids_MND)
        if torch.equal(moved_MND, centroids_MND):
            break
        centroids_MND = moved_MND
    sizes_MN = _members(rows_KND, answered_KN, centroids_MND).sum(1)
    order_MN = sizes_MN.argsort(stable=True, dim=0, descending=True)
    return centroids_MND.gather(0, order_MN.unsqueeze(-1).expand_as(centroids_MND))


def _seeds(rows_KND: Tensor, answered_KN: Tensor, clusters: int) -> Tensor:
    """Return the vector farthest from the mean, then always the one farthest from those before it."""
    counts_N1 = answered_KN.sum(0).clamp_min(1).unsqueeze(-1)
    mean_ND = (rows_KND * answered_KN.unsqueeze(-1)).sum(0) / counts_N1
    far_KN = _squared(rows_KND, mean_ND)
    seeds: list[Tensor] = []
    for _ in range(clusters):
        farthest_N = torch.where(answered_KN, far_KN, -1.0).argmax(0)
        index_1ND = farthest_N.view(1, -1, 1).expand_as(rows_KND[:1])
        seed_ND = rows_KND.gather(0, index_1ND).squeeze(0)
        nearby_KN = _squared(rows_KND, seed_ND)
        far_KN = far_KN.minimum(nearby_KN) if seeds else nearby_KN
        seeds.append(seed_ND)
    return torch.stack(seeds)


def _members(rows_KND: Tensor, answered_KN: Tensor, centroids_MND: Tensor) -> Tensor:
    """Return which vectors belong to each centroid, their nearest, 0 or 1 ``[M, K, N]``."""
    squared_MKN = torch.stack([_squared(rows_KND, centroid_ND) for centroid_ND in centroids_MND])
    nearest_KN = squared_MKN.argmin(0)
    member_KNM = one_hot(nearest_KN, len(centroids_MND)) * answered_KN.unsqueeze(-1)
    return member_KNM.movedim(-1, 0).to(rows_KND.dtype)


def _squared(rows_KND: Tensor, point_ND: Tensor) -> Tensor:
    """Return squared distances ``[K, N]``."""
    return (rows_KND - point_ND).square().sum(-1)
