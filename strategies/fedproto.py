"""FedProto: Federated Prototype Learning across Heterogeneous Clients.

Yue Tan, Guodong Long, Lu Liu, Tianyi Zhou, Qinghua Lu, Jing Jiang, Chengqi Zhang, AAAI 2022,
arXiv:2105.00243, algorithm 1 and equations 3 to 8.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fedkd.knowledge import ClassMeans
from fedkd.losses import Step, term
from fedkd.phases import ClassifyByMeans, MeanByClass, Phase, Revisit
from fedkd.strategy import DistillationStrategy, Facts, Positive


@term(needs="class-means", needs_features=True)
def towards_prototype(step: Step) -> Tensor:
    """Return the mean squared difference between features and their class's prototype, ``[B]``.

    The mean is over D; 0 where no client has the class.
    """
    assert step.features is not None
    assert step.class_means is not None
    assert step.class_counts is not None
    squared_BD = (step.features - step.class_means[step.labels]).square()
    return torch.where(step.class_counts[step.labels] > 0, squared_BD.mean(-1), 0.0)


class FedProto(DistillationStrategy):
    """Clients share their mean features by class; each pulls its features towards the mean of all.

    A client classifies by the nearest prototype (equation 4), so that it can predict classes of
    which it has no image. Needs no public set. Architectures may be mixed as long as their features (the
    input of the model's head) have the same width. Not to be confused with FD, which shares mean outputs
    and leaves out the client's own.

    Departures from the paper:

    1. The distance of equation 8 is between each image's features and the prototype, as the mean
       squared error, as in the authors' code; in the paper it is between prototypes.
    2. Equation 6 divides by the number of clients that have the class, on top of weights that already
       sum to 1, which shrinks prototypes. That factor is left out. (The authors' code takes the plain
       mean over clients.)
    3. Prototypes are taken in evaluation mode after training (equation 3), not over the steps of it as
       in the authors' code.
    4. A class of which no client has an image is never predicted. Absent classes are sent as zeros with a
       count of 0; in the paper they are not sent.

    Args:
        weight: λ, of the distance to the prototypes beside the cross entropy; the authors' is 1 for
            MNIST and 0.1 for CIFAR-10.
    """

    facts = Facts(
        paper="2105.00243",
        up="C*D*4 + C*4",
        down="C*D*4 + C*4",
        distils=False,
        bibtex=r"""
        @inproceedings{tan2022fedproto,
          title = {{FedProto}: Federated Prototype Learning across Heterogeneous Clients},
          author = {Tan, Yue and Long, Guodong and Liu, Lu and Zhou, Tianyi and Lu, Qinghua and Jiang, Jing and
            Zhang, Chengqi},
          booktitle = {Proceedings of the AAAI Conference on Artificial Intelligence},
          volume = {36},
          number = {8},
          pages = {8432--8440},
          year = {2022},
          doi = {10.1609/aaai.v36i8.20819},
          eprint = {2105.00243},
          archiveprefix = {arXiv},
        }
        """,  # noqa: E501 - as it is printed
    )

    weight: Positive = 1.0

    def phases(self, round: int) -> list[Phase]:
        revisit = Revisit({"ce": 1.0, towards_prototype: self.weight}, model="student")
        return [ClassifyByMeans(), revisit, MeanByClass("features")]

    def aggregate(self, means: ClassMeans) -> ClassMeans:
        return means.mean(weights=means.counts)
