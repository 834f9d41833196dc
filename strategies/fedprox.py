"""FedProx: Federated Optimization in Heterogeneous Networks.

Tian Li, Anit Kumar Sahu, Manzil Zaheer, Maziar Sanjabi, Ameet Talwalkar, Virginia Smith, MLSys 2020,
arXiv:1812.06127, algorithm 2.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fedkd.knowledge import Weights
from fedkd.losses import Step, term
from fedkd.phases import Load, Phase, Revisit, SendWeights
from fedkd.strategy import DistillationStrategy, Facts, NonNegative


@term(needs=None, needs_start=True)
def proximal(step: Step) -> Tensor:
    """Return ½ ‖w − w_t‖², w_t being the weights at the start of the phase, a 0-d tensor."""
    squared = [(w - step.start[name]).square().sum() for name, w in step.params.items()]
    return torch.stack(squared).sum() / 2


class FedProx(DistillationStrategy):
    """FedAvg with a proximal term that keeps each student close to the weights it was sent.

    With μ = 0 it is FedAvg exactly. The term covers what is trained, not buffers.

    Departures from the paper:

    1. All clients do the same number of epochs; in the paper stragglers may do fewer, and their
       unfinished work is averaged anyway.
    2. Clients are drawn evenly and weighted by their images; algorithm 2 draws them in proportion to
       their images and weights them evenly.

    Args:
        mu: μ, of the proximal term. The authors tune it for each data set, between 0.001 and 1.
    """

    facts = Facts(
        paper="1812.06127",
        up="S",
        down="S",
        headline="server",
        mixed_models=False,
        distils=False,
        bibtex=r"""
        @inproceedings{li2020fedprox,
          title = {Federated Optimization in Heterogeneous Networks},
          author = {Li, Tian and Sahu, Anit Kumar and Zaheer, Manzil and Sanjabi, Maziar and
            Talwalkar, Ameet and Smith, Virginia},
          booktitle = {Proceedings of Machine Learning and Systems},
          volume = {2},
          pages = {429--450},
          year = {2020},
          eprint = {1812.06127},
          archiveprefix = {arXiv},
        }
        """,
    )

    mu: NonNegative = 0.01

    def phases(self, round: int) -> list[Phase]:
        return [Load(), Revisit({"ce": 1.0, proximal: self.mu}, model="student"), SendWeights()]

    def aggregate(self, weights: Weights) -> Weights:
        return weights.average()
