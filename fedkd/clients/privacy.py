"""Differential privacy for soft labels: noise on every row that leaves a client, and the ε it gives.

A row is moved to a common origin, clipped to a Euclidean norm c, and sent with Gaussian noise of
standard deviation σ·c per entry (the Gaussian mechanism: Dwork and Roth 2014, appendix A). However
training uses two private data sets, their clipped rows differ by at most 2c, so R rows that leave one
client compose to a Gaussian mechanism with μ = 2·sqrt(R)/σ (Dong, Roth and Su 2022, arXiv:1905.02383,
corollary 3.3). Neighbours are *all* data sets of one client: local differential privacy of the client,
which requires no trust in the server. `docs/privacy.md` says what this covers and what it does not.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec

import numpy as np
import torch
from torch import Tensor

from fedkd.errors import FedkdError, Setting
from fedkd.experiment import Experiment
from fedkd.knowledge import Knowledge, SoftLabels, Space
from fedkd.knowledge.kinds import in_words

LARGEST_MU = 1e6
"""The largest μ whose ε, about 5·10^11, is computed; beyond it ε is infinite."""


def privatise(
    labels: SoftLabels, experiment: Experiment, generator: torch.Generator | None
) -> SoftLabels:
    """Return soft labels with the noise of ``dp-noise`` and ``dp-clip``; see `privatised`."""
    clip, noise = experiment.dp_clip, experiment.dp_noise
    values = [privatised(rows, labels.space, clip, noise, generator) for rows in labels.values]
    return replace(labels, values=torch.stack(values))


def privatised(
    values: Tensor, space: Space, clip: float, noise: float, generator: torch.Generator | None
) -> Tensor:
    """Return every row clipped and with Gaussian noise.

    From logits the mean of their row is subtracted, which softmax ignores. From probabilities 1/C is
    subtracted; with the noise they are projected onto the simplex, which is post-processing. A row
    that is not finite counts as the origin.

    Args:
        values: ``[N, C]``.
        space: of the values.
        clip: c, the largest Euclidean norm of a row about its origin.
        noise: σ, in units of `clip`.
        generator: draws the noise of a simulation, which is then repeatable; ``None`` draws it from the
            operating system's entropy. Anyone who knows the generator's seed (or tries its 2^32
            states) can remove the noise.

    Returns:
        ``[N, C]``, of the dtype of `values`.
    """
    rows = values.double()
    origin = rows.mean(-1, keepdim=True) if space == "logits" else 1 / rows.shape[-1]
    # To refuse a row that is not finite would tell without noise that training diverged.
    centred = (rows - origin).where(rows.isfinite().all(-1, keepdim=True), 0.0)
    norms = torch.linalg.vector_norm(centred, dim=-1, keepdim=True)
    clipped: Tensor = centred * (clip / norms.clamp_min(clip))
    noisy = clipped + noise * clip * _normal(rows.shape, generator).to(rows.device)
    if space == "probabilities":
        noisy = onto_simplex(noisy + origin)
    return noisy.to(values.dtype)


def _normal(shape: Sequence[int], generator: torch.Generator | None) -> Tensor:
    """Return standard normal numbers, float64."""
    if generator is not None:
        return torch.randn(tuple(shape), generator=generator, dtype=torch.float64)
    # By Box and Muller: torch's generator has a seed of 32 bits, all of which can be tried.
    count = math.prod(shape)
    pairs = -(-count // 2)
    drawn = np.frombuffer(secrets.token_bytes(16 * pairs), dtype="<u8").reshape(2, pairs)
    uniform = ((drawn >> 11) + 0.5) / 2**53
    radius, angle = np.sqrt(-2 * np.log(uniform[0])), 2 * np.pi * uniform[1]
    both = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:count]
    return torch.from_numpy(both).view(*shape)


def onto_simplex(rows: Tensor) -> Tensor:
    """Return the nearest rows of probabilities by Euclidean distance, ``[N, C]``.

    Duchi, Shalev-Shwartz, Singer and Chandra, ICML 2008, figure 1.
    """
    ordered = rows.sort(descending=True).values
    counts = torch.arange(1, rows.shape[-1] + 1, device=rows.device)
    thresholds = (ordered.cumsum(-1) - 1) / counts
    last = (ordered > thresholds).sum(-1, keepdim=True) - 1  # always true of the first
    projected = (rows - thresholds.gather(-1, last)).clamp_min(0)
    return projected / projected.sum(-1, keepdim=True)


def epsilon(*, noise: float, rows: int, delta: float) -> float:
    """Return ε of the soft labels that left one client, at δ = `delta`.

    The rows compose to one Gaussian mechanism exactly, and so its ε is exact too: Balle and Wang 2018,
    arXiv:1805.06530, theorem 8, as dp-accounting solves it. (Its accountants for Rényi divergences and
    privacy-loss distributions bound the same number from above.)

    Args:
        noise: σ, in units of the clipping norm.
        rows: R, all soft labels of one public sample each that the client was asked for and sent.
        delta: δ.

    Returns:
        At least 0; infinity without noise, or with too little of it (`LARGEST_MU`).
    """
    if rows == 0:
        return 0.0
    mu = 2 * math.sqrt(rows) / noise if noise > 0 else math.inf
    if mu > LARGEST_MU:
        return math.inf
    from dp_accounting import get_epsilon_gaussian

    with np.errstate(divide="ignore"):  # it takes logarithms of 0
        return float(get_epsilon_gaussian(1 / mu, delta))


def check_privacy(experiment: Experiment, uploads: type[Knowledge] | None) -> None:
    """Raise an error for ``dp-noise`` that would protect nothing, or whose ε cannot be computed.

    Args:
        experiment: the run.
        uploads: the knowledge that clients of its strategy send (`DistillationStrategy.uploads`).

    Raises:
        FedkdError: clients send something other than soft labels, or dp-accounting is not installed.
    """
    if not experiment.dp_noise:
        return
    noise = Setting("dp-noise", experiment.dp_noise)
    if uploads not in (SoftLabels, None):
        raise FedkdError(
            noise,
            f": {experiment.strategy} sends {in_words(uploads)}, to which no noise is added; set "
            "dp-noise = 0 or choose a strategy that sends soft labels",
        )
    if find_spec("dp_accounting") is None:
        raise FedkdError(noise, ": ε needs dp-accounting: pip install 'fedkd[privacy]'")
