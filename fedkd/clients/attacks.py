"""Attacks: how malicious clients falsify their labels, or the soft labels that they send.

The key ``attack`` names one, ``attackers`` is the share of malicious clients; the seed decides which
clients these are. An attack is a pure function of what a client can know: its honest answer, the
knowledge that it received last, and the seed that colluding clients share. Two attacks of the
literature see the answers of all honest clients. These are not available before the round ends, so
here they are estimated by the knowledge received last, or by the client's own answer where it received
nothing, as in round 1.

What is sent is a valid answer: finite, probabilities on the simplex, logits as large as the client's
honest ones. No check of the server can tell it from an honest answer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from statistics import NormalDist
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from fedkd.errors import FedkdError, Setting
from fedkd.experiment import Experiment
from fedkd.knowledge import Knowledge, SoftLabels
from fedkd.randomness import generator, permutation


@dataclass(frozen=True, eq=False)
class Known:
    """What a malicious client knows when it answers N samples.

    Attributes:
        honest: its honest answer, probabilities float64 ``[N, C]``.
        expected: estimate of honest clients' answers, float64 ``[N, C]``: the probabilities it received
            last, `honest` where it received none.
        seed: of the run, which colluding clients share.
        client: its partition id.
        round: of the federation.
        num_clients: K.
        num_malicious: number of malicious clients.
    """

    honest: Tensor
    expected: Tensor
    seed: int
    client: int
    round: int
    num_clients: int
    num_malicious: int

    @property
    def num_classes(self) -> int:
        """The number of classes, C."""
        return self.honest.shape[-1]


def flip(labels: Tensor, num_classes: int) -> Tensor:
    """Return labels with class c replaced by C − 1 − c, for training and for counts by class.

    Every class is flipped, as by Fang et al. 2020 (arXiv:1911.11815, section 4.1); Fung et al. 2018
    (arXiv:1808.04866) and Tolpegin et al. 2020 (arXiv:2007.08432) flip one class to another.
    With an odd number of classes the middle one keeps its label. Public labels are not flipped.

    Args:
        labels: int64 ``[n]``, of the private images.
        num_classes: C.

    Returns:
        int64 ``[n]``.
    """
    return num_classes - 1 - labels


def random(known: Known) -> Tensor:
    """Return one-hot rows ``[N, C]`` of a class drawn for each sample, client and round.

    As in the code of Roux, Zimmer and Pokutta 2025 (ICLR, arXiv:2402.12265).
    """
    stream = generator(known.seed, known.client, known.round, "attack", "random")
    drawn_N = torch.randint(known.num_classes, (len(known.honest),), generator=stream)
    return _one_hot(drawn_N, known.num_classes)


def constant(known: Known) -> Tensor:
    """Return one-hot rows ``[N, C]`` of one class in all rounds, drawn for each client.

    In the code of Roux et al. (arXiv:2402.12265) all clients use class 0.
    """
    stream = generator(known.seed, known.client, "attack", "constant")
    drawn = torch.randint(known.num_classes, (1,), generator=stream)
    return _one_hot(drawn.expand(len(known.honest)), known.num_classes)


def least_likely(known: Known) -> Tensor:
    """Return one-hot rows ``[N, C]`` of the class that honest clients find least likely.

    LMA of Roux, Zimmer and Pokutta 2025 (ICLR, arXiv:2402.12265; ``CELMAX`` in their code), which sees
    the mean of this round's honest answers. `Known.expected` estimates it, and includes last round's
    falsified answers. Attackers that received the same knowledge thus agree; in round 1 each uses its
    own model.
    """
    return _one_hot(known.expected.min(-1).indices, known.num_classes)


def colluding(known: Known) -> Tensor:
    """Return one-hot rows ``[N, C]`` of the class after the likeliest one in an order attackers share.

    The order is drawn from the seed alone, for the whole run, and is circular, so that every class is
    replaced by another one: the answers are wrong, consistent, and as easy to learn as the truth.
    """
    circle_C = permutation(known.num_classes, known.seed, "attack", "colluding")
    next_C = torch.empty_like(circle_C)
    next_C[circle_C] = circle_C.roll(-1)
    return _one_hot(next_C[known.expected.max(-1).indices], known.num_classes)


def little_is_enough(known: Known) -> Tensor:
    """Return answers ``[N, C]`` within the spread of honest ones, on the wrong side of their mean.

    Baruch, Baruch and Goldberg 2019 (NeurIPS, arXiv:1902.06635, algorithm 3): mean − z·σ by coordinate,
    with the z of `deviations`. On the simplex, where coordinates cannot all be lowered, the likeliest
    class is lowered and every other raised; negative numbers become 0 and rows are divided by their sum.
    `Known.expected` estimates the mean, and the distance of the client's honest answer from it, class by
    class, estimates σ, for which colluders of the paper use all their answers. Where nothing was received
    the answer is honest; where z is 0, as for one or two attackers of ten, it repeats what was received.
    """
    z = deviations(known.num_clients, known.num_malicious)
    likeliest_NC = _one_hot(known.expected.max(-1).indices, known.num_classes)
    spread_NC = (known.honest - known.expected).abs()
    moved_NC = (known.expected + (1 - 2 * likeliest_NC) * z * spread_NC).clamp_min(0)
    # A row is 0 only if its one certain class is lowered to 0 and no other is raised. That cannot
    # happen: both rows sum to 1, so another class would differ as well.
    return moved_NC / moved_NC.sum(-1, keepdim=True)


def deviations(num_clients: int, num_malicious: int) -> float:
    """Return z of Baruch et al. 2019, algorithm 3: the standard deviations that stay unnoticed.

    s = ⌊n/2⌋ + 1 − m honest clients must be farther out for a majority to be on the attackers' side;
    z = Φ⁻¹((n − m − s) / (n − m)). z is at least 0, and s at least 1 if attackers are the majority.
    """
    honest = num_clients - num_malicious
    needed = max(num_clients // 2 + 1 - num_malicious, 1)
    return max(NormalDist().inv_cdf((honest - needed) / honest), 0.0) if honest > needed else 0.0


class Attack(NamedTuple):
    """The functions of an attack.

    Attributes:
        labels: turns private labels int64 ``[n]``, and C, into those that the client trains on.
        answer: turns what the client knows into the probabilities float64 ``[N, C]`` that it sends.
    """

    labels: Callable[[Tensor, int], Tensor] | None = None
    answer: Callable[[Known], Tensor] | None = None


HONEST = Attack()

ATTACKS: Mapping[str, Attack] = {
    "none": HONEST,
    "label-flip": Attack(labels=flip),
    "random": Attack(answer=random),
    "constant": Attack(answer=constant),
    "least-likely": Attack(answer=least_likely),
    "colluding": Attack(answer=colluding),
    "little-is-enough": Attack(answer=little_is_enough),
}
"""Attacks by the value of the key ``attack``."""


def malicious_clients(experiment: Experiment) -> frozenset[int]:
    """Return the malicious clients: round(attackers · K) of them (half to even), drawn by the seed.

    A larger share includes the clients of a smaller one.
    """
    if experiment.attack == "none":
        return frozenset()
    return _drawn(experiment.num_clients, experiment.attackers, experiment.seed)


@lru_cache(maxsize=64)
def _drawn(num_clients: int, share: float, seed: int) -> frozenset[int]:
    order = permutation(num_clients, seed, "attackers")
    return frozenset(order[: round(share * num_clients)].tolist())


def attack_of(experiment: Experiment, client: int) -> Attack:
    """Return the experiment's attack for a malicious client, `HONEST` for another."""
    return ATTACKS[experiment.attack] if client in malicious_clients(experiment) else HONEST


def attacked(
    honest: SoftLabels,
    received: Knowledge | None,
    experiment: Experiment,
    client: int,
    round: int,
) -> SoftLabels:
    """Return what a client sends instead of its honest answer (K = 1), for the same samples.

    Logits are the logarithms of the attack's probabilities, none below the client's own least one for
    that sample, plus the constant of its honest row. So they are as large as honest ones, and an attack
    that returns the honest probabilities sends the honest logits.

    Args:
        honest: the client's own answer.
        received: the knowledge that it received last; only soft labels are used.
        experiment: names the attack.
        client: its partition id.
        round: of the federation.
    """
    answer = attack_of(experiment, client).answer
    if answer is None:
        return honest
    exact = replace(honest, values=honest.values.double())
    honest_NC = exact.probabilities[0]
    known = Known(
        honest_NC,
        _expected(honest_NC, honest.samples, received),
        experiment.seed,
        client,
        round,
        experiment.num_clients,
        len(malicious_clients(experiment)),
    )
    values_NC = answer(known)
    if honest.space == "logits":
        values_NC = _as_logits(values_NC, exact.values[0])
    return replace(honest, values=values_NC.to(honest.values.dtype).unsqueeze(0))


def check_attack(experiment: Experiment, uploads: type[Knowledge] | None) -> None:
    """Raise an error if an attack falsifies soft labels and clients send something else.

    If they send nothing at all, any attack is accepted, as it has no effect.

    Raises:
        FedkdError: the attack does not apply to what the strategy's clients send.
    """
    if uploads in (None, SoftLabels) or not experiment.attackers:
        return
    if ATTACKS[experiment.attack].answer is not None:
        accepted = ", ".join(name for name, attack in ATTACKS.items() if attack.answer is None)
        raise FedkdError(
            Setting("attack", experiment.attack),
            " falsifies soft labels, and clients of ",
            Setting("strategy", experiment.strategy),
            f" send none; accepted there: {accepted}",
        )


def _one_hot(classes_N: Tensor, num_classes: int) -> Tensor:
    return one_hot(classes_N, num_classes).double()


def _expected(honest_NC: Tensor, samples: Tensor, received: Knowledge | None) -> Tensor:
    """Return the received probabilities of `samples`, and the honest ones where there are none."""
    if not isinstance(received, SoftLabels) or not len(received.samples) or not len(samples):
        return honest_NC
    count = int(torch.cat([samples, received.samples]).max()) + 1
    place = torch.full((count,), -1)
    answered = received.mask.any(0)
    place[received.samples[answered]] = torch.arange(len(received.samples))[answered]
    place_N = place[samples]
    received_NC = received.mean_probabilities().to(honest_NC)[place_N]
    return torch.where((place_N >= 0).unsqueeze(-1), received_NC, honest_NC)


def _as_logits(values_NC: Tensor, honest_NC: Tensor) -> Tensor:
    """Return probabilities as logits as large as a client's `honest_NC`."""
    constant_N1 = honest_NC.logsumexp(-1, keepdim=True)
    least_N1 = honest_NC.amin(-1, keepdim=True) - constant_N1
    return values_NC.log().maximum(least_N1) + constant_N1
