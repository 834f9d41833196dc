"""FedGEMS: Federated Learning of Larger Server Models via Selective Knowledge Fusion.

Sijie Cheng, Jingwen Wu, Yanghua Xiao, Yang Liu, Yang Liu, 2021, arXiv:2110.11027, selective knowledge
fusion and algorithm of FedGEMS.
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from fedkd.errors import FedkdError
from fedkd.knowledge import SoftLabels
from fedkd.phases import Fit, Phase, Predict, Revisit
from fedkd.strategy import DistillationStrategy, Facts, Replies, Server

LEAST_ENTROPY = 1e-6
"""Entropy, in nats, below which an answer counts as sure: a one-hot answer has 0."""


class FedGEMS(DistillationStrategy):
    """A larger model at the server learns from itself where it can, and asks clients where it cannot.

    The server trains on the labelled public set. It learns samples that its model gets right from their
    labels. Where the model is wrong, it learns ε CE + (1 − ε) KL from the logits that it gave when it
    last was right; only for samples that it never got right does it ask the clients, and it uses the
    answers of those that are right (see `aggregate`). Clients digest the server's logits. Mixed
    architectures are welcome. Not to be confused with FedMD, whose server has no model and uses the
    answers of all clients.

    Departures from the paper:

    1. The server judges, asks and stores logits once a round, not batch by batch as it learns, and
       takes two passes: first on labels alone, then on labels and logits.
    2. Where no client is right about a sample, there is no KL, which the paper does not provide for. The
       server then learns it from its label alone, with weight 1 like samples that it gets right: ε only
       divides a weight between label and logits. With ε = 0 such samples would teach nothing.
    3. The entropy of a sure answer, 0, counts as 10⁻⁶.
    4. KL is the experiment's, at temperature τ and times τ². Its direction is KL(teacher ‖ learner), for
       server and clients.

    Args:
        epsilon: ε, weight of the labels beside logits; 0.75 in the paper.
    """

    facts = Facts(
        paper="2110.11027",
        up="<= P*C*4",
        down="<= P*C*4 + P*4 + I",
        public_labels=True,
        server_model="required",
        headline="server",
        bibtex=r"""
        @misc{cheng2021fedgems,
          title = {{FedGEMS}: Federated Learning of Larger Server Models via Selective Knowledge Fusion},
          author = {Cheng, Sijie and Wu, Jingwen and Xiao, Yanghua and Liu, Yang and Liu, Yang},
          year = {2021},
          eprint = {2110.11027},
          archiveprefix = {arXiv},
        }
        """,
    )

    epsilon: Annotated[float, Field(ge=0, le=1)] = 0.75

    def phases(self, round: int) -> list[Phase]:
        return [self._mixed("digest"), Revisit(), Predict()]

    def _mixed(self, name: str) -> Fit:
        return Fit(name, public={"kl": 1 - self.epsilon, "ce": self.epsilon})

    def request(self, server: Server) -> Tensor:
        drawn = server.draw()
        _, is_known = _pool(server)
        assert server.targets is not None
        is_wrong = server.predict(drawn).values[0].argmax(-1) != server.targets[drawn]
        return drawn[~is_known[drawn] & is_wrong]

    def aggregate(self, labels: SoftLabels) -> Tensor:
        """Return the mean of the logits of clients that are right, weighted by softmax(1 / entropy).

        ``[N, C]``; where no client is right, of all that answered.
        """
        right_KN = _right(labels)
        used_KN = torch.where(right_KN.any(0), right_KN, labels.mask)
        logits = labels.logits.double()
        entropy_KN = torch.special.entr(logits.softmax(-1)).sum(-1)
        sure_KN = entropy_KN.clamp_min(LEAST_ENTROPY).reciprocal()
        weights_KN = torch.where(used_KN, sure_KN, -torch.inf).softmax(0)
        return torch.einsum("kn,knc->nc", weights_KN, logits).to(labels.values.dtype)

    def update(self, replies: Replies, server: Server) -> SoftLabels:
        assert replies.labels is not None
        assert server.targets is not None
        drawn = server.draw()
        pool_PC, is_known = _pool(server)
        taught_PC, is_taught = pool_PC.clone(), is_known.clone()
        helps = _right(replies.labels).any(0)
        answered = replies.labels.samples[helps]
        taught_PC[answered], is_taught[answered] = self.aggregate(replies.labels)[helps], True

        is_right = server.predict(drawn).values[0].argmax(-1) == server.targets[drawn]
        taught = drawn[is_taught[drawn] & ~is_right]
        server.fit(Fit("labels", public={"ce": 1.0}), samples=drawn[is_right | ~is_taught[drawn]])
        server.fit(self._mixed("fuse"), SoftLabels.shared(taught_PC[taught], taught, "logits"))

        known = server.predict(drawn)
        is_right = known.values[0].argmax(-1) == server.targets[drawn]
        pool_PC[drawn[is_right]] = known.values[0, is_right]
        is_known[drawn[is_right]] = True
        server.state |= {"pool": pool_PC, "known": is_known}
        return known


def _right(labels: SoftLabels) -> Tensor:
    """Return which clients' answers are right, bool ``[K, N]``."""
    if labels.targets is None:
        raise FedkdError("FedGEMS needs the labels of the public set: set public-labels = true")
    return (labels.values.argmax(-1) == labels.targets) & labels.mask


def _pool(server: Server) -> tuple[Tensor, Tensor]:
    """Return the logits of when the server last was right ``[P, C]``, and where it ever was ``[P]``."""
    p, c = server.num_public, server.num_classes
    pool = server.state.get("pool", torch.zeros(p, c))
    known = server.state.get("known", torch.zeros(p, dtype=torch.bool))
    assert isinstance(pool, Tensor)
    assert isinstance(known, Tensor)
    return pool, known
