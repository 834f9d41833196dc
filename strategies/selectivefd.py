"""Selective-FD: Selective Knowledge Sharing for Privacy-Preserving Federated Distillation.

Jiawei Shao, Fangzhao Wu, Jun Zhang, Nature Communications 15, 2024, arXiv:2304.01731, client-side and
server-side selectors. The density ratio is that of Takafumi Kanamori, Taiji Suzuki, Masashi Sugiyama,
Statistical analysis of kernel-based least-squares density-ratio estimation, Machine Learning 86, 2012.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import one_hot

from fedkd.knowledge import Rule, SoftLabels, combine_probabilities
from fedkd.phases import Apply, Digest, LocalClient, Phase, Predict, Revisit, procedure
from fedkd.strategy import Count, DistillationStrategy, Facts, Positive, Replies, Server

ROWS = 1024
"""Images for which density ratios are computed at a time."""

LEAST_DISTANCE = 1e-6
"""The least median distance between images, so that a kernel has a width even if all are the same."""


@procedure
def density_ratio(
    client: LocalClient, images: int, width: float, ridge: float, quantile: float, least: int
) -> None:
    """Store, once, which public samples look like a client's own: ``state["familiar"]``, bool ``[P]``.

    A density ratio is fitted to half of the chosen private images against noise that is uniform over
    their pixels' range; a public sample is familiar if its ratio is above a quantile of the other half's.
    """
    if "familiar" in client.state:
        return
    draw = client.generator("density ratio")
    chosen = torch.randperm(len(client.images), generator=draw)[: 2 * images]
    private = client.images[chosen].cpu()
    low, high = private.amin((0, 2, 3), keepdim=True), private.amax((0, 2, 3), keepdim=True)
    noise = low + (high - low) * torch.rand(images, *private.shape[1:], generator=draw)
    fitted, held_out = private.flatten(1).tensor_split(2)
    public = client.public.cpu().flatten(1)
    some = public[torch.randperm(len(public), generator=draw)[:images]]
    distance = torch.cdist(fitted.double(), some.double()).median()
    sigma = width * max(float(distance), LEAST_DISTANCE)
    compared = held_out if len(held_out) else fitted
    ratios = kulsif(torch.cat([compared, public]), fitted, noise.flatten(1), sigma, ridge)
    familiar = ratios[len(compared) :] > ratios[: len(compared)].quantile(quantile)
    familiar[ratios[len(compared) :].topk(min(least, len(public))).indices] = True
    client.state["familiar"] = familiar


def kulsif(at: Tensor, private: Tensor, noise: Tensor, sigma: float, ridge: float) -> Tensor:
    """Return an estimate of p(x) / q(x) by kernel-based unconstrained least-squares importance fitting.

    The minimiser w of ½ Σ_j w(q_j)² / n − Σ_i w(p_i) / m + ½ λ‖w‖² over the functions of a Gaussian
    kernel k (Kanamori et al. 2012, section 3) is

        w(x) = Σ_j α_j k(x, q_j) + Σ_i k(x, p_i) / (mλ),  (K / n + λI) α = −Σ_i k(q, p_i) / (nmλ).

    Args:
        at: points x, ``[N, d]``.
        private: draws p_i from p, ``[m, d]``.
        noise: draws q_j from q, ``[n, d]``.
        sigma: σ of k(x, y) = exp(−‖x − y‖² / 2σ²).
        ridge: λ.

    Returns:
        float64 ``[N]``; where p is small the estimate may fall below 0.
    """
    private, noise = private.double(), noise.double()
    n, m = len(noise), len(private)
    system = _kernel(noise, noise, sigma) / n + ridge * torch.eye(n, dtype=torch.float64)
    alpha = torch.linalg.solve(system, -_kernel(noise, private, sigma).sum(1) / (n * m * ridge))
    ratios = [
        _kernel(x, noise, sigma) @ alpha + _kernel(x, private, sigma).mean(1) / ridge
        for x in at.double().split(ROWS)
    ]
    return torch.cat(ratios)


def _kernel(x: Tensor, y: Tensor, sigma: float) -> Tensor:
    return (torch.cdist(x, y) / sigma).square().div(-2).exp()


class SelectiveFD(DistillationStrategy):
    """Clients answer what looks like their own data; the server passes on what they agree on.

    Mean of probabilities over the clients that answered a sample. Needs no public labels; mixed
    architectures are welcome. Not to be confused with FedGEMS, whose server selects by labels.

    The client's selector compares density ratios (see `density_ratio`), so it is only as good as
    distances between pixels: use it where classes differ in the images themselves. The server's drops
    samples whose mean p̄ is ambiguous, ‖p̄ − one-hot(argmax p̄)‖₁ = 2 (1 − max p̄) being above a
    threshold.

    Departures from the paper and its authors' demonstration (MNIST, one class a client):

    1. The kernel's width is relative to the data: the demonstration's 5 on normalised MNIST is 0.15 of
       the median distance between images there.
    2. The ratio is fitted to at most `images` private images, and its threshold taken from as many
       others (the demonstration: 5 % of the shard and the rest of it).
    3. The system of equations for α is solved; the demonstration multiplies by its matrix instead.
    4. A client answers at least its `least` most familiar samples, so that every client always answers.
    5. A sample that nobody answered is not passed on, whatever `ambiguity` is.
    6. If no sample passes the server's selector, the previous knowledge stays.

    Args:
        images: private images that a density ratio is fitted to, and images of noise.
        width: kernel width σ over the median distance between private and public images.
        ridge: λ of the density ratio; the demonstration's is 250^-½.
        quantile: share of private images that may look less familiar than a familiar sample: the
            demonstration's 0.25.
        least: samples that a client answers in any case.
        ambiguity: largest L1 distance to the one-hot label that passes the server, 0 to 2; 2 is the
            demonstration, which has no selector there.
        labels: ``"soft"`` sends the mean on, ``"hard"`` its one-hot label, for a digest with τ = 1: at
            a higher temperature it asks for logits that are τ times as far apart.
        combine: ``"mean"``, or a robust rule in its place (`fedkd.knowledge.combine`).
    """

    facts = Facts(
        paper="2304.01731",
        up="<= P*C*4 + P*4",
        down="<= P*C*4 + P*4 + I",
        bibtex=r"""
        @article{shao2024selective,
          title = {Selective knowledge sharing for privacy-preserving federated distillation without a good
            teacher},
          author = {Shao, Jiawei and Wu, Fangzhao and Zhang, Jun},
          journal = {Nature Communications},
          volume = {15},
          year = {2024},
          doi = {10.1038/s41467-023-44383-9},
          eprint = {2304.01731},
          archiveprefix = {arXiv},
        }
        """,  # noqa: E501 - as it is printed
    )

    images: Count = 250
    width: Positive = 0.15
    ridge: Positive = 250**-0.5
    quantile: Annotated[float, Field(ge=0, le=1)] = 0.25
    least: Count = 10
    ambiguity: Annotated[float, Field(ge=0, le=2)] = 1.5
    labels: Literal["soft", "hard"] = "soft"
    combine: Rule = "mean"

    def phases(self, round: int) -> list[Phase]:
        names = ("images", "width", "ridge", "quantile", "least")
        select = Apply(density_ratio, {name: getattr(self, name) for name in names})
        return [select, Digest(), Revisit(), Predict("probabilities", only="familiar")]

    def aggregate(self, labels: SoftLabels) -> Tensor:
        return combine_probabilities(labels, self.combine)

    def update(self, replies: Replies, server: Server) -> SoftLabels | None:
        assert replies.labels is not None
        mean_NC = self.aggregate(replies.labels)
        hard_NC = one_hot(mean_NC.argmax(-1), mean_NC.shape[-1]).to(mean_NC.dtype)
        passes = (mean_NC - hard_NC).abs().sum(-1) <= self.ambiguity
        if not bool(passes.any()):
            return None
        sent_NC = mean_NC if self.labels == "soft" else hard_NC
        samples = replies.labels.samples
        return SoftLabels.shared(sent_NC[passes], samples[passes], "probabilities")
