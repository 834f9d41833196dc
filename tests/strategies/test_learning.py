"""Every strategy learns on real images: its students beat those that train alone.

Real MNIST (5,000 images that come with a dependency), ten clients, Dirichlet 0.3, an unlabelled public
set where the strategy does with one. The tables in docs/strategies are ten rounds and three seeds.
Those of two strategies are in `make test`, the others are slow.
"""

from __future__ import annotations

from functools import cache
from statistics import mean

import pytest

import fedkd
from fedkd.knowledge import ClassMeans
from fedkd.registry import strategies

THIN = [name for name, cls in strategies().items() if cls().uploads() is ClassMeans]
"""Those that share a few numbers a class: better than alone by points, where students train briefly."""

QUICK = ("DSFL", "FedAvg")
"""Those that learn so much that a few epochs show it."""

CLEAR = [n for n, cls in strategies().items() if cls().uploads() not in (ClassMeans, None)]


@cache
def accuracy(folder: str, strategy: str, seed: int, rounds: int, local: int, distill: int) -> float:
    facts = strategies()[strategy].facts
    experiment = fedkd.Experiment(
        dataset="mnist-5k",
        student="mlp-20",
        strategy=strategy,
        public_labels=facts.public_labels,
        server_model="mlp-20" if facts.server_model == "required" else "none",
        num_server_rounds=rounds,
        local_epochs=local,
        distill_epochs=distill,
        alpha=0.9,
        tau=3.0,
        evaluate_every=rounds,
        evaluate_phases="last",
        plan="stacked",
        device="cpu",
        seed=seed,
        run_dir=folder,
    )
    return fedkd.run(experiment).accuracy


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("runs"))


@pytest.mark.parametrize(
    "strategy", [pytest.param(n, marks=[pytest.mark.slow] * (n not in QUICK)) for n in CLEAR]
)
def test_students_beat_those_that_train_alone(strategy: str, folder: str) -> None:
    """By three points at least, of a thousand test images."""
    sizes = {"seed": 0, "rounds": 5, "local": 5, "distill": 5 if strategy in QUICK else 15}
    assert accuracy(folder, strategy, **sizes) > accuracy(folder, "LocalOnly", **sizes) + 0.03


@pytest.mark.slow
@pytest.mark.parametrize("strategy", THIN)
def test_a_few_numbers_a_class_beat_none_where_students_train_briefly(
    strategy: str, folder: str
) -> None:
    sizes = {"rounds": 10, "local": 1, "distill": 1}
    got, alone = (
        mean(accuracy(folder, name, seed, **sizes) for seed in (0, 1, 2))
        for name in (strategy, "LocalOnly")
    )
    assert got > alone + 0.01
