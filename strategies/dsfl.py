"""DS-FL: Distillation-Based Semi-Supervised Federated Learning.

Sohei Itahara, Takayuki Nishio, Yusuke Koda, Masahiro Morikura, Koji Yamamoto, 2020 (IEEE TMC 2023),
arXiv:2008.06180, algorithm 1 and section 3.3.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from fedkd.knowledge import Rule, SoftLabels, combine_probabilities
from fedkd.phases import Digest, Phase, Predict, Revisit
from fedkd.strategy import DistillationStrategy, Facts, Positive


class DSFL(DistillationStrategy):
    """Mean of client probabilities, sharpened by a softmax at low temperature.

    Not to be confused with FedMD, which averages logits. The public set needs no labels; mixed
    architectures are welcome; the server may keep a model to evaluate (``server-model``).

    Args:
        sharpening: ``"era"`` (entropy reduction aggregation, softmax(mean / T)) or ``"mean"`` (simple
            aggregation).
        era_temperature: T; 0.1 in the paper. As the softmax is taken of probabilities, the sharpest
            label it can give is e^(1/T) / (e^(1/T) + C − 1).
        combine: ``"mean"``, or a robust rule in its place (`fedkd.knowledge.combine`).
    """

    facts = Facts(
        paper="2008.06180",
        up="P*C*4",
        down="P*C*4 + 2*I",
        server_model="optional",
        headline="server",
        bibtex=r"""
        @article{itahara2023dsfl,
          title = {Distillation-Based Semi-Supervised Federated Learning for Communication-Efficient
            Collaborative Training With Non-{IID} Private Data},
          author = {Itahara, Sohei and Nishio, Takayuki and Koda, Yusuke and Morikura, Masahiro and
            Yamamoto, Koji},
          journal = {IEEE Transactions on Mobile Computing},
          volume = {22},
          number = {1},
          pages = {191--205},
          year = {2023},
          doi = {10.1109/TMC.2021.3070013},
          eprint = {2008.06180},
          archiveprefix = {arXiv},
        }
        """,
    )

    sharpening: Literal["era", "mean"] = "era"
    era_temperature: Positive = 0.1
    combine: Rule = "mean"

    def phases(self, round: int) -> list[Phase]:
        return [Digest(), Revisit(), Predict("probabilities")]

    def aggregate(self, labels: SoftLabels) -> Tensor:
        combined_NC = combine_probabilities(labels, self.combine)
        if self.sharpening == "mean":
            return combined_NC
        return (combined_NC / self.era_temperature).softmax(-1)
