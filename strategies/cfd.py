"""CFD: Communication-Efficient Federated Distillation via Soft-Label Quantization and Delta Coding.

Felix Sattler, Arturo Marban, Roman Rischke, Wojciech Samek, IEEE TNSE 9(4), 2022, arXiv:2012.00632,
algorithm 1 and section IV.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from fedkd.knowledge import Rule, SoftLabels, Wire, combine_probabilities
from fedkd.phases import Digest, Phase, Predict, Reset, Revisit
from fedkd.strategy import DistillationStrategy, Facts, Replies, Server

Bits = Literal[1, 2, 4, 8, 32]


class CFD(DistillationStrategy):
    """Soft labels of one bit, of which only changed ones are sent, and a server that distils them first.

    Clients send quantised probabilities (equation 10) of the whole public set, without the rows that
    did not change (equation 13). Dual distillation (equations 14 to 17): the server's model, which keeps
    what it learns, distils their mean, and its own predictions go to the clients, quantised likewise;
    these start from the common initial weights each round, so that it does not matter which rounds they
    missed. Not to be confused with FedDF, which moves weights. The public set needs no labels; mixed
    architectures are welcome.

    Departures from the paper:

    1. Rows are entropy-coded by deflate, not by an arithmetic coder, which the key ``codec`` gives
       (``simplex:1+changed+range``). A bitmap says which rows follow, where the paper codes zeros.
    2. The quantiser breaks ties in favour of the lower class, not at random.
    3. A client that missed rounds gets the changes relative to what it has, not to the last round.
    4. Clients distil with batch orders of their own, so that their models are then similar; the paper's
       share the random seed, and are equal.
    5. Digests are weighted by the experiment's α and τ, at clients and server; the paper's are pure, at
       τ = 1. Optimisers start from scratch every round.

    Args:
        up_bits: b_up, bits of a probability that a client sends: 1 (the most probable class), 2, 4, 8, or
            32 for floats, not quantised.
        down_bits: b_down, the same for the server's; the paper's CFD-1-32 and CFD-1-1.
        combine: ``"mean"`` (equation 14), or a robust rule in its place (`fedkd.knowledge.combine`).
    """

    # P/8: the bitmap. Deflate adds less than a thousandth and 64 bytes.
    facts = Facts(
        paper="2012.00632",
        up="<= 1.001*P*C*up_bits/8 + P/8 + 64",
        down="<= 1.001*P*C*down_bits/8 + P/8 + 64",
        server_model="required",
        headline="server",
        bibtex=r"""
        @article{sattler2022cfd,
          title = {{CFD}: Communication-Efficient Federated Distillation via Soft-Label Quantization and
            Delta Coding},
          author = {Sattler, Felix and Marban, Arturo and Rischke, Roman and Samek, Wojciech},
          journal = {IEEE Transactions on Network Science and Engineering},
          volume = {9},
          number = {4},
          pages = {2025--2038},
          year = {2022},
          doi = {10.1109/TNSE.2021.3081748},
          eprint = {2012.00632},
          archiveprefix = {arXiv},
        }
        """,
    )

    up_bits: Bits = 1
    down_bits: Bits = 1
    combine: Rule = "mean"

    def phases(self, round: int) -> list[Phase]:
        return [Reset(), Digest(), Revisit(), Predict("probabilities")]

    def wire(self) -> tuple[Wire, Wire]:
        up, down = (
            "float32" if bits == 32 else f"simplex:{bits}"
            for bits in (self.up_bits, self.down_bits)
        )
        return Wire(up, "changed", "deflate"), Wire(down, "changed", "deflate")

    def request(self, server: Server) -> Tensor:
        return server.everything()

    def aggregate(self, labels: SoftLabels) -> Tensor:
        return combine_probabilities(labels, self.combine)

    def update(self, replies: Replies, server: Server) -> SoftLabels:
        labels = replies.labels
        assert labels is not None
        votes = SoftLabels.shared(self.aggregate(labels), labels.samples, "probabilities")
        server.fit(Digest(), votes)
        predicted = server.predict(server.everything())
        return SoftLabels.shared(predicted.probabilities[0], predicted.samples, "probabilities")
