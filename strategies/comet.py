"""COMET (also PerFed-CKT): Personalized Federated Learning via Clustered Knowledge Transfer.

Yae Jee Cho, Jianyu Wang, Tarun Chiruvolu, Gauri Joshi, 2021 (IEEE JSTSP 2023), arXiv:2109.08119.
"""

from __future__ import annotations

from functools import lru_cache
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

_SPLITS = 1100
"""The most splits that are tried for a start: all of 11 clients into 2 clusters, of 8 into 3."""

_STARTS = 8
"""About how many starts there are if all clients are too many to be split in all ways."""

_SAMPLES = 1024
"""Samples for which splits are compared at a time."""

_TIE = 1e-9
"""Share of a sum of squared distances that is taken for rounding."""


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

    1. k-means is not left to chance: up to 11 clients (8 of three clusters, 7 of more) are split in the
       best of all ways; with more, it starts from the best splits of several groups of them, and the
       best result is taken. The order of clients does not matter. With fewer distinct clients than
       clusters, some centroids are the same.
    2. A sample that a client did not answer gets the others' mean.
    3. The regulariser is the divergence at the experiment's τ, not the squared distance of outputs.
    4. Clients send, and the server clusters, probabilities, as the code published with SCARLET does. The
       paper's abstract speaks of logits, whose constant and scale differ from architecture to
       architecture: distances between them would compare networks before they compare what is known.
    5. ``by="sample"`` is not the paper's but that of the code published with SCARLET (Azuma et al. 2025,
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

    The best of several runs of Lloyd's k-means, by the sum of squared distances. Each starts from the
    best split of some of the clients, which take turns: with few clients it is the best of all. Vectors
    of clients that did not answer do not count.
    """
    best_MND, least_N = rows_KND[:0], rows_KND.new_full(rows_KND.shape[1:2], torch.inf)
    for hand in _hands(len(rows_KND), clusters):
        start_MND = _start(rows_KND, answered_KN, hand, clusters)
        centroids_MND = _lloyd(rows_KND, answered_KN, start_MND)
        spread_N = (_nearest(rows_KND, centroids_MND)[0] * answered_KN).sum(0)
        is_better_N1 = (spread_N < (1 - _TIE) * least_N).unsqueeze(-1)
        best_MND = (
            torch.where(is_better_N1, centroids_MND, best_MND) if len(best_MND) else centroids_MND
        )
        least_N = least_N.minimum(spread_N)
    sizes_MN = _members(rows_KND, answered_KN, best_MND).sum(1)
    order_MN = sizes_MN.argsort(stable=True, dim=0, descending=True)
    return best_MND.gather(0, order_MN.unsqueeze(-1).expand_as(best_MND))


def _lloyd(rows_KND: Tensor, answered_KN: Tensor, centroids_MND: Tensor) -> Tensor:
    """Return centroids that are the means of the vectors nearest to them; an empty one stays put."""
    for _ in range(_STEPS):
        member_MKN = _members(rows_KND, answered_KN, centroids_MND)
        sizes_MN1 = member_MKN.sum(1).unsqueeze(-1)
        totals_MND = torch.einsum("mkn,knd->mnd", member_MKN, rows_KND)
        moved_MND = torch.where(sizes_MN1 > 0, totals_MND / sizes_MN1, centroids_MND)
        if torch.equal(moved_MND, centroids_MND):
            break
        centroids_MND = moved_MND
    return centroids_MND


def _start(rows_KND: Tensor, answered_KN: Tensor, hand: list[int], clusters: int) -> Tensor:
    """Return the means of the best split of the clients in `hand`, ``[M, N, D]``.

    A cluster that gets none of them starts from the client farthest from those before it.
    """
    member_MHN = _best_split(rows_KND[hand], answered_KN[hand], clusters).to(rows_KND.dtype)
    sizes_MN1 = member_MHN.sum(1).unsqueeze(-1)
    totals_MND = torch.einsum("mhn,hnd->mnd", member_MHN, rows_KND[hand])
    counts_N1 = answered_KN.sum(0).clamp_min(1).unsqueeze(-1)
    far_KN = _squared(rows_KND, (rows_KND * answered_KN.unsqueeze(-1)).sum(0) / counts_N1)
    starts: list[Tensor] = []
    for total_ND, size_N1 in zip(totals_MND, sizes_MN1, strict=True):
        farthest_N = torch.where(answered_KN, far_KN, -1.0).argmax(0)
        index_1ND = farthest_N.view(1, -1, 1).expand_as(rows_KND[:1])
        farthest_ND = rows_KND.gather(0, index_1ND).squeeze(0)
        start_ND = torch.where(size_N1 > 0, total_ND / size_N1, farthest_ND)
        nearby_KN = _squared(rows_KND, start_ND)
        far_KN = far_KN.minimum(nearby_KN) if starts else nearby_KN
        starts.append(start_ND)
    return torch.stack(starts)


def _best_split(rows_HND: Tensor, answered_HN: Tensor, clusters: int) -> Tensor:
    """Return the split with the least squared distances from the means, bool ``[M, H, N]``.

    Half of the squared distances within a cluster, over its size, are those from its mean.
    """
    splits_AH = _splits(len(rows_HND), clusters)
    member_AMH = splits_AH.unsqueeze(1) == torch.arange(clusters).view(1, -1, 1)
    flat_BH = member_AMH.flatten(0, 1).to(rows_HND.dtype)
    pairs_BHH = flat_BH.unsqueeze(2) * flat_BH.unsqueeze(1)
    chosen = []
    for rows_HnD, answered_Hn in zip(
        rows_HND.split(_SAMPLES, 1), answered_HN.split(_SAMPLES, 1), strict=True
    ):
        count_Hn = answered_Hn.to(rows_HND.dtype)
        squared_HHn = torch.stack([_squared(rows_HnD, row_nD) for row_nD in rows_HnD])
        squared_HHn = squared_HHn * count_Hn * count_Hn.unsqueeze(1)
        within_Bn = pairs_BHH.flatten(1) @ squared_HHn.flatten(0, 1)
        spread_Bn = within_Bn / (flat_BH @ count_Hn).clamp_min(1)
        spread_An = spread_Bn.unflatten(0, (len(splits_AH), clusters)).sum(1)
        chosen.append(spread_An.argmin(0))
    return member_AMH[torch.cat(chosen)].permute(1, 2, 0) & answered_HN


def _hands(clients: int, clusters: int) -> list[list[int]]:
    """Return groups of as many clients as can be split in all ways: one of all, or several."""
    size = _splits(clients, clusters).shape[1]
    if size == clients:
        return [list(range(clients))]
    spaced = [i * clients // size for i in range(size)]
    turns = range(0, clients, max(1, clients // _STARTS))
    return [sorted((i + turn) % clients for i in spaced) for turn in turns]


@lru_cache
def _splits(clients: int, clusters: int) -> Tensor:
    """Return all ways to split clients into clusters, which are numbered as they appear, ``[A, H]``.

    H is the number of clients, or the largest for which there are at most `_SPLITS` ways.
    """
    ways = [[0]]
    for _ in range(clients - 1):
        more = [[*way, m] for way in ways for m in range(min(max(way) + 2, clusters))]
        if len(more) > _SPLITS:
            break
        ways = more
    return torch.tensor(ways)


def _members(rows_KND: Tensor, answered_KN: Tensor, centroids_MND: Tensor) -> Tensor:
    """Return which vectors belong to each centroid, their nearest, 0 or 1 ``[M, K, N]``."""
    _, nearest_KN = _nearest(rows_KND, centroids_MND)
    member_KNM = one_hot(nearest_KN, len(centroids_MND)) * answered_KN.unsqueeze(-1)
    return member_KNM.movedim(-1, 0).to(rows_KND.dtype)


def _nearest(rows_KND: Tensor, centroids_MND: Tensor) -> tuple[Tensor, Tensor]:
    """Return squared distances from the nearest centroids, and which these are, ``[K, N]`` each."""
    squared_MKN = torch.stack([_squared(rows_KND, centroid_ND) for centroid_ND in centroids_MND])
    squared_KN, nearest_KN = squared_MKN.min(0)
    return squared_KN, nearest_KN


def _squared(rows_KND: Tensor, point_ND: Tensor) -> Tensor:
    """Return squared distances ``[K, N]``."""
    return (rows_KND - point_ND).square().sum(-1)
