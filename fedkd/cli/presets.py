"""Ready-made experiments, each a function that returns one, with the source of every number."""

from __future__ import annotations

from collections.abc import Callable

from fedkd.errors import FedkdError, nearest
from fedkd.experiment import Experiment


def mnist_mlp() -> Experiment:
    """Return the default recipe: a large regularised MLP teaches one of 20 units per layer.

    MNIST normalised by 0.1307 / 0.3081, batches of 64, Adam at its defaults, 10 epochs
    each, τ = 5, α = 0.7. The recipe is not tuned.
    """
    return Experiment(
        dataset="mnist",
        teacher="mlp-1200",
        student="mlp-20",
        local_epochs=10,
        distill_epochs=10,
        batch_size=64,
        optimizer="adam",
        learning_rate=1e-3,
        alpha=0.7,
        tau=5.0,
    )


def cifar10_cnn() -> Experiment:
    """Return the same recipe on CIFAR-10 with the pair of CNNs."""
    return mnist_mlp().replace(dataset="cifar10", teacher="cnn-large", student="cnn")


def mnist_hinton() -> Experiment:
    """Return Hinton, Vinyals, Dean 2015, section 3, shortened to two cores.

    As in the paper: all 60,000 images, a teacher of two layers of 1200 units with dropout, its images
    jittered by up to two pixels; a student of two layers of 800 units without any regularisation, its
    images not jittered; T = 20. The paper names no optimiser, batch size, epochs or weight of the hard
    term. Shortened: 15 epochs each (the original dropout recipe ran for thousands), Adam instead of
    SGD with max-norm constraints.
    """
    return Experiment(
        dataset="mnist",
        teacher="hinton-1200",
        student="mlp-800",
        augment="jitter-2",
        local_epochs=15,
        distill_epochs=15,
        batch_size=256,
        optimizer="adam",
        learning_rate=1e-3,
        alpha=0.9,
        tau=20.0,
    )


PRESETS: dict[str, Callable[[], Experiment]] = {
    "mnist-mlp": mnist_mlp,
    "mnist-hinton": mnist_hinton,
    "cifar10-cnn": cifar10_cnn,
}


def preset(name: str) -> Experiment:
    """Return a preset by name.

    Raises:
        FedkdError: no preset has that name.
    """
    if name not in PRESETS:
        raise FedkdError(
            f"preset = '{name}': no such preset{nearest(name, PRESETS)}; "
            f"the presets are {', '.join(PRESETS)}"
        )
    return PRESETS[name]()
