"""Attacks: what malicious clients do to their labels, or send in the place of their soft labels.

``attack`` names one, ``attackers`` the share of the clients that are malicious; who they are follows
from the seed. An attack is a pure function, and knows what a client can know: its own honest answer,
what it received last, and the seed that those who collude share. Two attacks of the literature see the
answers of all honest clients. Nobody has these before the round ends; what stands for them here is what
the client received last, and its own answer where it received nothing, as in round 1.

What is sent stays a valid answer: finite, probabilities on the simplex, logits as large as the client's
own. No check of the server can tell it from an honest one.
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
    """What a malicious client knows as it answers N samples.

    Attributes:
        own: its honest answer, probabilities float64 ``[N, C]``.
        expected: what honest clients are likely to say, float64 ``[N, C]``: the probabilities it received
            last, `own` where it received none.
        seed: of the run, which those who collude share.
        client: who it is.
        round: of the federation.
        num_clients: K.
        num_malicious: how many of them are malicious.
    """

    own: Tensor
    expected: Tensor
    seed: int
    client: int
    round: int
    num_clients: int
    num_malicious: int

    @property
    def num_classes(self) -> int:
        """C."""
        return self.own.shape[-1]


def flip(labels: Tensor, num_classes: int) -> Tensor:
    """Take class c for class C − 1 − c, in training and wherever else a client counts its own labels.

    Every class is flipped, as by Fang et al. 2020 (arXiv:1911.11815, section 4.1); Fung et al. 2018
    (arXiv:1808.04866) and Tolpegin et al. 2020 (arXiv:2007.08432) flip one class to another.
    Of an odd number of classes the middle one keeps its label. Labels of the public set stay.

    Args:
        labels: int64 ``[n]``, of the private images.
        num_classes: C.

    Returns:
        int64 ``[n]``.
    """
    return num_classes - 1 - labels


def random(known: Known) -> Tensor:
    """Be sure of a class drawn for each sample, client and round by itself, ``[N, C]``.

    As in the code of Roux, Zimmer and Pokutta 2025 (ICLR, arXiv:2402.12265).
    """
    stream = generator(known.seed, known.client, known.round, "attack", "random")
    drawn_N = torch.randint(known.num_classes, (len(known.own),), generator=stream)
    return _sure(drawn_N, known.num_classes)


def constant(known: Known) -> Tensor:
    """Be sure of one class for every sample of every round, ``[N, C]``; each client has its own.

    In the code of Roux et al. (arXiv:2402.12265) it is class 0 for all of them.
    """
    stream = generator(known.seed, known.client, "attack", "constant")
    drawn = torch.randint(known.num_classes, (1,), generator=stream)
    return _sure(drawn.expand(len(known.own)), known.num_classes)


def least_likely(known: Known) -> Tensor:
    """Be sure of the class that honest clients hold for the least likely, ``[N, C]``.

    LMA of Roux, Zimmer and Pokutta 2025 (ICLR, arXiv:2402.12265; ``CELMAX`` in their code), which sees
    the mean of this round's honest answers; `Known.expected` stands for it, in which last round's lies
    have their share. Those who received the same thus agree; in round 1 each goes by its own model.
    """
    return _sure(known.expected.min(-1).indices, known.num_classes)


def colluding(known: Known) -> Tensor:
    """Be sure of the class that follows the likeliest one in an order that attackers share, ``[N, C]``.

    The order is drawn from the seed alone, for the whole run, and closed to a circle, so that every class
    is taken for one other and none for itself: what colluders say is wrong, consistent, and as easy to
    learn as the truth.
    """
    circle_C = permutation(known.num_classes, known.seed, "attack", "colluding")
    next_C = torch.empty_like(circle_C)
    next_C[circle_C] = circle_C.roll(-1)
    return _sure(next_C[known.expected.max(-1).indices], known.num_classes)


def little_is_enough(known: Known) -> Tensor:
    """Stay within the spread of honest answers, on its wrong side, ``[N, C]``.

    Baruch, Baruch and Goldberg 2019 (NeurIPS, arXiv:1902.06635, algorithm 3): mean − z·σ by coordinate,
    with the z of `deviations`. On the simplex, where coordinates cannot all be lowered, the likeliest
    class is lowered and every other raised; negative numbers become 0 and rows are divided by their sum.
    `Known.expected` stands for the mean, and the distance of the client's own answer from it, class by
    class, for σ, which in the paper colluders estimate from all their answers. Where nothing was received
    the answer is honest; where z is 0, as for one or two liars of ten, it repeats what was received.
    """
    z = deviations(known.num_clients, known.num_malicious)
    likeliest_NC = _sure(known.expected.max(-1).indices, known.num_classes)
    spread_NC = (known.own - known.expected).abs()
    moved_NC = (known.expected + (1 - 2 * likeliest_NC) * z * spread_NC).clamp_min(0)
    # All is 0 only where the one class that was sure is lowered to nothing and no other moves: never,
    # as both rows sum to 1 and the others then have to differ.
    return moved_NC / moved_NC.sum(-1, keepdim=True)


def deviations(num_clients: int, num_malicious: int) -> float:
    """How many standard deviations hide among honest answers: z of Baruch et al. 2019, algorithm 3.

    s = ⌊n/2⌋ + 1 − m honest clients have to lie farther out for a majority to be on the attackers' side;
    z = Φ⁻¹((n − m − s) / (n − m)). At least 0, and s at least 1 where attackers are the majority.
    """
    honest = num_clients - num_malicious
    needed = max(num_clients // 2 + 1 - num_malicious, 1)
    return max(NormalDist().inv_cdf((honest - needed) / honest), 0.0) if honest > needed else 0.0


class Attack(NamedTuple):
    """What an attack does.

    Attributes:
        labels: makes of private labels int64 ``[n]``, and C, those that the client trains on.
        answer: makes of what the client knows the probabilities float64 ``[N, C]`` that it sends.
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
"""By the value of the key ``attack``."""


def malicious_clients(experiment: Experiment) -> frozenset[int]:
    """Return who is malicious: round(attackers · K) clients (half to even), drawn by the seed.

    Those of a smaller share are among those of a larger one.
    """
    if experiment.attack == "none":
        return frozenset()
    return _drawn(experiment.num_clients, experiment.attackers, experiment.seed)


@lru_cache(maxsize=64)
def _drawn(num_clients: int, share: float, seed: int) -> frozenset[int]:
    order = permutation(num_clients, seed, "attackers")
    return frozenset(order[: round(share * num_clients)].tolist())


def attack_of(experiment: Experiment, client: int) -> Attack:
    """Return what a client does: `HONEST`, or the experiment's attack."""
    return ATTACKS[experiment.attack] if client in malicious_clients(experiment) else HONEST


def attacked(
    honest: SoftLabels,
    received: Knowledge | None,
    experiment: Experiment,
    client: int,
    round: int,
) -> SoftLabels:
    """Return what a client sends in the place of its honest answer (K = 1), for the same samples.

    Logits are the logarithms of the attack's probabilities, none below the least that the client itself
    gives to a class of that sample, plus the constant that its own row has: as large as honest ones, and
    an attack that says what is honest sends the honest logits.

    Args:
        honest: the client's own answer.
        received: what it received last; anything but soft labels tells it nothing.
        experiment: names the attack.
        client: who it is.
        round: of the federation.
    """
    answer = attack_of(experiment, client).answer
    if answer is None:
        return honest
    exact = replace(honest, values=honest.values.double())
    own_NC = exact.probabilities[0]
    known = Known(
        own_NC,
        _expected(own_NC, honest.samples, received),
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
    """Refuse an attack on soft labels where clients send something else.

    Where they send nothing at all there is nobody to be attacked, and any attack will do.

    Raises:
        FedkdError: the attack and what the strategy's clients send do not go together.
    """
    if uploads in (None, SoftLabels) or not experiment.attackers:
        return
    if ATTACKS[experiment.attack].answer is not None:
        other = ", ".join(name for name, attack in ATTACKS.items() if attack.answer is None)
        raise FedkdError(
            Setting("attack", experiment.attack),
            " falsifies soft labels, and clients of ",
            Setting("strategy", experiment.strategy),
            f" send none: accepted there: {other}",
        )


def _sure(classes_N: Tensor, num_classes: int) -> Tensor:
    return one_hot(classes_N, num_classes).double()


def _expected(own_NC: Tensor, samples: Tensor, received: Knowledge | None) -> Tensor:
    """Return the received probabilities of `samples`, and the own ones where there are none."""
    if not isinstance(received, SoftLabels) or not len(received.samples) or not len(samples):
        return own_NC
    count = int(torch.cat([samples, received.samples]).max()) + 1
    place = torch.full((count,), -1)
    answered = received.mask.any(0)
    place[received.samples[answered]] = torch.arange(len(received.samples))[answered]
    place_N = place[samples]
    told_NC = received.mean_probabilities().to(own_NC)[place_N]
    return torch.where((place_N >= 0).unsqueeze(-1), told_NC, own_NC)


def _as_logits(values_NC: Tensor, own_NC: Tensor) -> Tensor:
    """Return probabilities as logits of the size of a client's `own`."""
    constant_N1 = own_NC.logsumexp(-1, keepdim=True)
    least_N1 = own_NC.amin(-1, keepdim=True) - constant_N1
    return values_NC.log().maximum(least_N1) + constant_N1
