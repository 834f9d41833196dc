"""FedAvg: Communication-Efficient Learning of Deep Networks from Decentralized Data.

Brendan McMahan, Eider Moore, Daniel Ramage, Seth Hampson, Blaise Agüera y Arcas, AISTATS 2017,
arXiv:1602.05629, algorithm 1.
"""

from __future__ import annotations

from fedkd.knowledge import Weights
from fedkd.phases import Load, Phase, Revisit, SendWeights
from fedkd.strategy import DistillationStrategy, Facts


class FedAvg(DistillationStrategy):
    """Mean of the students' weights, weighted by private images: the usual baseline.

    No soft labels and no public set. Weights are averaged within each architecture only. As usual,
    buffers (BatchNorm's statistics) are averaged like parameters.
    """

    facts = Facts(
        paper="1602.05629",
        up="S",
        down="S",
        headline="server",
        mixed_models=False,
        distils=False,
        bibtex=r"""
        @inproceedings{mcmahan2017fedavg,
          title = {Communication-Efficient Learning of Deep Networks from Decentralized Data},
          author = {McMahan, Brendan and Moore, Eider and Ramage, Daniel and Hampson, Seth and
            Ag{\"u}era y Arcas, Blaise},
          booktitle = {Proceedings of the 20th International Conference on Artificial Intelligence and
            Statistics},
          series = {Proceedings of Machine Learning Research},
          volume = {54},
          pages = {1273--1282},
          year = {2017},
          eprint = {1602.05629},
          archiveprefix = {arXiv},
        }
        """,
    )

    def phases(self, round: int) -> list[Phase]:
        return [Load(), Revisit(model="student"), SendWeights()]

    def aggregate(self, weights: Weights) -> Weights:
        return weights.average()
