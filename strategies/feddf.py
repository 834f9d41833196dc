"""FedDF: Ensemble Distillation for Robust Model Fusion in Federated Learning.

Tao Lin, Lingjing Kong, Sebastian U. Stich, Martin Jaggi, NeurIPS 2020, arXiv:2006.07242,
algorithms 1 and 3.
"""

from __future__ import annotations

from fedkd.knowledge import SoftLabels, Weights
from fedkd.phases import Fit, Load, Phase, Revisit, SendWeights
from fedkd.strategy import Count, DistillationStrategy, Facts, Replies, Server


class FedDF(DistillationStrategy):
    """FedAvg, whose averaged model the server then trains on what the clients' ensemble predicts.

    One prototype per architecture: weights are averaged within it, and each prototype learns the mean
    logits of the clients of all architectures on the round's public samples. These need no labels and
    never leave the server. Not to be confused with FedMD, whose clients exchange logits themselves.

    Departures from the paper:

    1. The server takes `server_epochs` passes, with the experiment's optimiser and batch size. The
       paper's takes up to 10,000 steps of 128 samples (Adam, 0.001, cosine schedule) and stops early
       by a validation set, which the server does not have here.
    2. No client is left out of the ensemble; the paper drops those that guess at random on that set.
    3. An architecture without an answer from any client keeps its prototype.

    Args:
        server_epochs: passes over the round's public samples for each prototype.
    """

    facts = Facts(
        paper="2006.07242",
        up="S",
        down="S",
        headline="server",
        bibtex=r"""
        @inproceedings{lin2020feddf,
          title = {Ensemble Distillation for Robust Model Fusion in Federated Learning},
          author = {Lin, Tao and Kong, Lingjing and Stich, Sebastian U. and Jaggi, Martin},
          booktitle = {Advances in Neural Information Processing Systems},
          volume = {33},
          pages = {2351--2363},
          year = {2020},
          eprint = {2006.07242},
          archiveprefix = {arXiv},
        }
        """,
    )

    server_epochs: Count = 10

    def phases(self, round: int) -> list[Phase]:
        return [Load(), Revisit(model="student"), SendWeights()]

    def aggregate(self, weights: Weights) -> Weights:
        return weights.average()

    def update(self, replies: Replies, server: Server) -> Weights | None:
        assert replies.weights is not None
        drawn = server.draw()
        answers = server.predict(drawn, replies.weights)
        distil = Fit("distil", public={"kl": 1.0}, epochs=self.server_epochs, numbers={"tau": 1.0})
        ensemble_labels = SoftLabels.shared(answers.mean_logits(), drawn, "logits")
        return server.fit(distil, ensemble_labels, weights=self.aggregate(replies.weights))
