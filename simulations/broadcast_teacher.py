"""A teacher at the server that broadcasts its labels, or teachers at the clients?

2,000 private images of mnist-5k among ten clients (Dirichlet 0.3), students `mlp-20`, and 50 to 800
*labelled* public images, which a teacher at the server needs. The teacher of a student is:

- the server: an `mlp-64` trained on the public set alone; its logits go to all, no replies;
- local teachers: an `mlp-64` on each shard, whose labels DS-FL combines (students see no private image);
- the students themselves (DS-FL), or both (FedGEMS, the published neighbour), or none (labels alone);
- as an upper bound: `mlp-64` on the pooled data, distilled into an `mlp-20` there.

Eight rounds, about 60 public steps a round for every size, three seeds. No download; three minutes on
one core:

    python simulations/broadcast_teacher.py --write docs/questions
"""

from __future__ import annotations

import fedkd
from fedkd.phases import Digest, Fit, Phase, Revisit
from fedkd.strategy import Facts, Replies, Server
from simulations._questions import Cell, Grid, Question, Result, where
from simulations.labelled_or_unlabelled import sizes

TEACHER = "mlp-64"
SERVER, LOCAL = "server's teacher", "local teachers"
UNTAUGHT, PUBLIC = "labels alone", "simulations.labelled_or_unlabelled:PublicLabels"


class Broadcast(fedkd.DistillationStrategy):
    """The server's model learns the labelled public set and sends its logits; nothing is uploaded."""

    facts = Facts(
        paper="none", up="0", down="P*C*4 + I", public_labels=True, server_model="required"
    )

    def phases(self, round: int) -> list[Phase]:
        """Return: digest the teacher's labels, then train on the shard."""
        return [Digest(), Revisit(model="student")]

    def update(self, replies: Replies, server: Server) -> fedkd.SoftLabels:
        """Return the teacher's labels of the round's public images after `distill-epochs` more epochs."""
        drawn = server.draw()
        server.fit(Fit("teach", public={"ce": 1.0}), samples=drawn)
        return server.predict(drawn)


def grid() -> Grid:
    """Return every arrangement with every size of the public set."""
    lines = {
        "local only": ("LocalOnly", {}),
        UNTAUGHT: (PUBLIC, {}),
        SERVER: ("simulations.broadcast_teacher:Broadcast", {"server_model": TEACHER}),
        LOCAL: ("DSFL", {"teacher": TEACHER}),
        "students (DS-FL)": ("DSFL", {}),
        "both (FedGEMS)": ("FedGEMS", {"server_model": TEACHER}),
    }
    grid = {
        line: {p: Cell(e, method) for p, e in sizes(public_labels=True, **keys).items()}
        for line, (method, keys) in lines.items()
    }
    pooled = sizes(public_labels=True, teacher=TEACHER)
    grid["pooled, distilled"] = {  # with as many epochs as the teacher
        p: Cell(e.replace(distill_epochs=e.local_epochs), "student-distilled")
        for p, e in pooled.items()
    }
    return grid


def answer(result: Result) -> str:
    """Return where the server's teacher beats local teachers, and what it adds to the labels."""
    points = result.points
    gains = [result.gain(SERVER, LOCAL, point) for point in points]
    extra = [result.gain(SERVER, UNTAUGHT, point) for point in points]
    few, many = points[0], points[-1]
    return (
        "Students of a teacher at the server end above students of local teachers "
        f"{where(points, [gain.mean > 0 for gain in gains])} (for {few} public images: "
        f"{gains[0].words} them; for {many}: {gains[-1].words} them). "
        "Its soft labels are worth a point or more over the labels that it learnt itself "
        f"{where(points, [gain.mean >= 1 for gain in extra])} (for {few} images: "
        f"{extra[0].words} clients without a teacher; for {many}: {extra[-1].words} them)."
    )


QUESTION = Question(
    name="broadcast_teacher",
    question="A teacher at the server that broadcasts its labels, or local teachers?",
    setting="2,000 private images of mnist-5k among ten clients (Dirichlet 0.3), students `mlp-20`, "
    "teachers `mlp-64`, a labelled public set, eight rounds; about 60 public steps a round for every "
    "size. The server's teacher learns the public set alone, the local ones a shard each. Labels alone: "
    "public labels and shards in turn, without a teacher.",
    x="labelled public images",
    grid=grid,
    answer=answer,
)


if __name__ == "__main__":
    QUESTION.main(__doc__)
