"""FD: Communication-Efficient On-Device Machine Learning: Federated Distillation and Augmentation.

Eunjeong Jeong, Seungeun Oh, Hyesung Kim, Jihong Park, Mehdi Bennis, Seong-Lyun Kim, 2018,
arXiv:1811.11479, section 2 and algorithm 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fedkd.knowledge import ClassMeans, Knowledge
from fedkd.losses import Step, log_probabilities, term
from fedkd.phases import MeanByClass, Phase, Revisit
from fedkd.strategy import DistillationStrategy, Facts, Positive, Replies, Server


@term(needs="class-means")
def towards_class_mean(step: Step) -> Tensor:
    """Return the cross entropy φ(F(w, b), F̂_y) with the others' mean output for the class, ``[B]``.

    The class is the label. 0 where no other client has the class.
    """
    assert step.class_means is not None
    assert step.class_counts is not None
    target_BC = step.class_means[step.labels]
    entropy = -(target_BC * log_probabilities(step.logits)).sum(-1)
    return torch.where(step.class_counts[step.labels] > 0, entropy, 0.0)


class FD(DistillationStrategy):
    """Clients share their mean softmax output by class, and learn from the mean of the others'.

    Needs no public set; mixed architectures are welcome. Not to be confused with FedProto, which shares
    mean features, nor with "FedDistill" of other libraries: what is averaged here are probabilities,
    never logits; what a client receives does not include its own output; and a client without a
    class does not count in that class's mean.

    Departures from the paper:

    1. A client's means are taken in evaluation mode after its training, not over the steps of it.
    2. The number of images in each mean is sent with it (4 bytes a class), as it shows which classes a
       client has; the paper's devices have some of each. Means are not weighted by it.
    3. M − 1 of the leave-one-out mean is the number of others that answered and have the class.

    Args:
        gamma: weight γ of the others' means beside the labels; the paper gives no value.
    """

    facts = Facts(
        paper="1811.11479",
        up="C*C*4 + C*4",
        down="C*C*4 + C*4",
        bibtex=r"""
        @misc{jeong2018fd,
          title = {Communication-Efficient On-Device Machine Learning: Federated Distillation and
            Augmentation under Non-{IID} Private Data},
          author = {Jeong, Eunjeong and Oh, Seungeun and Kim, Hyesung and Park, Jihong and Bennis, Mehdi and
            Kim, Seong-Lyun},
          year = {2018},
          eprint = {1811.11479},
          archiveprefix = {arXiv},
        }
        """,  # noqa: E501 - as it is printed
    )

    gamma: Positive = 1.0

    def phases(self, round: int) -> list[Phase]:
        revisit = Revisit({"ce": 1.0, towards_class_mean: self.gamma}, model="student")
        return [revisit, MeanByClass("probabilities")]

    def aggregate(self, means: ClassMeans) -> ClassMeans:
        return means.mean(weights=means.present)

    def update(self, replies: Replies, server: Server) -> ClassMeans | None:
        return replies.class_means

    def personalise(self, knowledge: Knowledge, client: int, server: Server) -> ClassMeans:
        assert isinstance(knowledge, ClassMeans)
        is_other = (knowledge.clients != client).unsqueeze(-1)
        return knowledge.mean(weights=knowledge.present & is_other)
