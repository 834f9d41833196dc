"""Measures what soft labels reveal, by two attacks of an honest but curious server.

The server follows the protocol and sees every client's answers about the public samples. It *distils
proxies* of the clients from their answers, and evaluates a proxy on candidate images: those on which it
is more confident than on others were perhaps the client's (membership inference by the loss: Yeom,
Giacomelli, Fredrikson and Jha 2018, arXiv:1709.01604; by a distilled copy of a client: Shi, Ouyang and
Wang 2025, arXiv:2502.08001). It also estimates how common each class is with a client from how often the
client predicts it.

These are baselines, not the strongest known attacks: their success is a lower bound of what leaks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedkd.data.federated import FederatedData
from fedkd.errors import FedkdError
from fedkd.experiment import Experiment
from fedkd.knowledge import SoftLabels
from fedkd.losses import kl, log_probabilities
from fedkd.randomness import generator
from fedkd.training.architectures import architectures_of
from fedkd.training.batches import BatchStream
from fedkd.training.cohort import Cohort
from fedkd.training.optimizers import OptimizerSettings

# --- What the server has --------------------------------------------------------------------------


def averaged(heard: Sequence[SoftLabels], num_public: int) -> SoftLabels:
    """Return each client's answers averaged over the rounds, which also reduces noise.

    Args:
        heard: the answers of a round each, of the same space.
        num_public: P.

    Returns:
        ``[K, P, C]`` for the whole public set; samples that a client never answered are masked.
    """
    clients = torch.cat([labels.clients for labels in heard]).unique()
    classes = heard[0].values.shape[-1]
    totals = torch.zeros(len(clients), num_public, classes, dtype=torch.float64)
    counts = torch.zeros(len(clients), num_public, dtype=torch.int64)
    for labels in heard:
        rows = torch.searchsorted(clients, labels.clients).unsqueeze(1), labels.samples
        totals[rows] += labels.values.double() * labels.mask.unsqueeze(-1)
        counts[rows] += labels.mask
    values = (totals / counts.clamp_min(1).unsqueeze(-1)).float()
    return SoftLabels(values, heard[0].space, clients=clients, mask=counts > 0)


def distilled_proxies(
    labels: SoftLabels, data: FederatedData, experiment: Experiment, epochs: int
) -> Cohort:
    """Return a copy of every client, distilled from its answers by KL(client ‖ proxy) at temperature 1.

    Args:
        labels: of K clients, each of which answered at least one sample.
        data: only its public images are used.
        experiment: its optimiser, batch size and seed, and the architecture of its (first) student.
        epochs: passes over the samples that a client answered.

    Returns:
        A cohort of K.
    """
    clients, public, architecture = labels.clients.tolist(), data.public, experiment.student_of(0)
    rows = [labels.samples[mask] for mask in labels.mask]
    taught = [logits[mask] for logits, mask in zip(labels.logits, labels.mask, strict=True)]
    teacher = torch.nn.utils.rnn.pad_sequence(taught, batch_first=True)
    proxies = architectures_of(data).cohort(
        experiment,
        architecture,
        architectures_of(data).initial_states(architecture, experiment.seed, len(clients)),
    )
    proxies.fit(
        [BatchStream("public", public, rows, {kl: 1.0}, teacher.to(public.device, public.dtype))],
        epochs=epochs,
        batch_size=experiment.batch_size,
        optimizer=OptimizerSettings.from_experiment(experiment),
        numbers={"tau": 1.0},
        streams=[(experiment.seed, client, "proxy") for client in clients],
    )
    return proxies


# --- Membership -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Detection:
    """How well scores separate members from others.

    Attributes:
        auc: probability that a member scores above another image, a tie being half; 0.5 is guessing.
        advantage: largest TPR − FPR over all thresholds (Yeom et al. 2018); 0 is guessing.
        tpr_at_1: TPR at an FPR of at most 1 % (Carlini et al. 2022, arXiv:2112.03570); 0.01 is guessing.
    """

    auc: float
    advantage: float
    tpr_at_1: float


def detection(members: Tensor, others: Tensor) -> Detection:
    """Return how well scores separate members ``[M]`` from others ``[N]``: higher means member.

    Raises:
        FedkdError: one of the two is empty.
    """
    if not len(members) or not len(others):
        raise FedkdError(f"{len(members)} members and {len(others)} others: both need a score")
    thresholds = torch.cat([members, others]).unique()
    # The share with a score at or above each threshold.
    caught, wrong = (
        1 - torch.searchsorted(scores.sort().values, thresholds).double() / len(scores)
        for scores in (members, others)
    )
    origin = torch.zeros(1, dtype=torch.float64)
    tpr, fpr = torch.cat([caught, origin]), torch.cat([wrong, origin])  # from (1, 1) to (0, 0)
    auc = float(torch.trapezoid(tpr.flip(0), fpr.flip(0)))
    return Detection(auc, float((tpr - fpr).max()), float(tpr[fpr <= 0.01].max()))


def log_likelihoods(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the log-probability ``[..., N]`` of the true classes: minus the loss.

    Args:
        logits: ``[..., N, C]``.
        labels: int64 ``[N]``.
    """
    index = labels.expand(logits.shape[:-1]).unsqueeze(-1)
    return log_probabilities(logits).gather(-1, index).squeeze(-1)


def calibrated(scores: Tensor) -> Tensor:
    """Return each client's scores ``[K, N]`` minus the mean of the other clients'.

    An image that is easy for all says little about one (difficulty calibration: Watson et al. 2022,
    arXiv:2111.08440); the others stand in for models trained without it.
    """
    others = (scores.sum(0, keepdim=True) - scores) / (len(scores) - 1)
    return scores - others


def matched(members: Tensor, others: Tensor, *stream: int | str) -> tuple[Tensor, Tensor]:
    """Return random positions with equally many of each class among members and others.

    So an attack cannot separate them by class alone: a client's shard holds few classes.

    Args:
        members: classes int64 ``[M]``.
        others: classes int64 ``[N]``.
        stream: names the random stream.

    Returns:
        Positions in `members` and in `others`, int64 of one length.
    """
    draw = generator(*stream, "matched")
    chosen: tuple[list[Tensor], list[Tensor]] = ([], [])
    for label in members.unique():
        rows = [(classes == label).nonzero().flatten() for classes in (members, others)]
        count = min(map(len, rows))
        for positions, of_class in zip(chosen, rows, strict=True):
            positions.append(of_class[torch.randperm(len(of_class), generator=draw)[:count]])
    return torch.cat(chosen[0]), torch.cat(chosen[1])


# --- Label distributions --------------------------------------------------------------------------


def label_distributions(labels: SoftLabels, public: Tensor) -> Tensor:
    """Return an estimate of how common each class is with each client, ``[K, C]``.

    A client predicts its frequent classes too often: its mean probability of a class, over the share of
    that class in the public set, normalised.

    Args:
        labels: of K clients.
        public: images of each class in the public set, ``[C]``; a class that it lacks is not corrected.
    """
    means = torch.stack(
        [
            rows[mask].double().mean(0)
            for rows, mask in zip(labels.probabilities, labels.mask, strict=True)
        ]
    )
    share = public.double() / public.sum()
    tilt = means / torch.where(share > 0, share, 1.0)
    return tilt / tilt.sum(1, keepdim=True)


def total_variation(p: Tensor, q: Tensor) -> Tensor:
    """Return half the L1 distance of distributions ``[..., C]``: 0 where they agree, at most 1."""
    return (p.double() - q.double()).abs().sum(-1) / 2
