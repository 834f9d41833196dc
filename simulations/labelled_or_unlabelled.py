"""What are the labels of a public set worth, and are soft labels worth anything once it has labels?

2,000 private images of mnist-5k among ten clients (Dirichlet 0.3), and 50 to 800 public images with and
without labels. With labels, FedMD begins by training on them, and every digest has 1 − α of
cross-entropy to them. The control has the labels and no exchange: in each round every client trains on
the public labels, then on its shard, and ends on the one that its method ends on (DS-FL the public set,
FedMD the shard). Students `mlp-20`, eight rounds; about 60 public steps a round for every size; three
seeds. No download; three minutes on one core:

    python simulations/labelled_or_unlabelled.py --write docs/questions
"""

from __future__ import annotations

from math import ceil

import fedkd
from fedkd.phases import Fit, Phase, Revisit
from fedkd.strategy import Facts
from simulations._questions import BASE, Cell, Grid, Question, Result, where

MODULE = "simulations.labelled_or_unlabelled"
SIZES = (50, 200, 800)
METHODS = {"DS-FL": "DSFL", "FedMD": "FedMD"}
CONTROLS = {"DS-FL": "labels alone", "FedMD": "labels alone, shard last"}


class PublicLabels(fedkd.DistillationStrategy):
    """No teacher: train on the labelled public set, then on the shard; at the end on the former."""

    facts = Facts(paper="none", up="0", down="0", public_labels=True)

    def phases(self, round: int) -> list[Phase]:
        """Return training on public labels, then on private ones."""
        return [Fit("public", public={"ce": 1.0}), Revisit(model="student")]


class ShardLast(PublicLabels):
    """The same, ending on the shard, as FedMD does."""

    closes = "revisit"


def sizes(**keys: object) -> dict[str, fedkd.Experiment]:
    """Return the experiment of every size of the public set, with other keys changed."""
    return {
        f"{size}": BASE.replace(
            train_size=2_000 + size,
            public_size=size,
            distill_epochs=round(60 / ceil(size / BASE.batch_size)),
            **keys,
        )
        for size in SIZES
    }


def grid() -> Grid:
    """Return each method with and without labels, and controls with the labels or shards alone."""
    lines = {"local only": ("LocalOnly", False)}
    lines[CONTROLS["DS-FL"]] = (f"{MODULE}:PublicLabels", True)
    lines[CONTROLS["FedMD"]] = (f"{MODULE}:ShardLast", True)
    for name, method in METHODS.items():
        lines |= {name: (method, False), f"{name}, labels": (method, True)}
    return {
        name: {p: Cell(e, method) for p, e in sizes(public_labels=labelled).items()}
        for name, (method, labelled) in lines.items()
    }


def answer(result: Result) -> str:
    """Return what labels add at the outer sizes, and where an exchange beats labels alone."""
    return " ".join(_sentence(result, name) for name in METHODS)


def _sentence(result: Result, name: str) -> str:
    few, many = result.points[0], result.points[-1]
    labels = [result.gain(f"{name}, labels", name, point) for point in (few, many)]
    beyond = [result.gain(f"{name}, labels", CONTROLS[name], point) for point in result.points]
    return (
        f"With {few} public images labelled {name} ends {labels[0].words} unlabelled {name}, with {many} "
        f"{labels[1].words} it; its exchange is worth a point or more beside clients that have the same "
        f"labels and send nothing {where(result.points, [gain.mean >= 1 for gain in beyond])} "
        f"({beyond[0]} points with {few}, {beyond[-1]} with {many})."
    )


QUESTION = Question(
    name="labelled_or_unlabelled",
    question="A labelled or an unlabelled public set?",
    setting="2,000 private images of mnist-5k among ten clients (Dirichlet 0.3), `mlp-20`, eight rounds; "
    "about 60 public steps a round for every size. Labels alone: public labels and shard in "
    "turn without exchange, ending on the public set as DS-FL does, or on the shard as FedMD does.",
    x="public images",
    grid=grid,
    answer=answer,
)


if __name__ == "__main__":
    QUESTION.main(__doc__)
