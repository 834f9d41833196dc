"""Distillation losses, one value per sample; the caller averages.

A *term* is a function of one client's batch. The stacked trainer maps terms over clients, masks
padding and averages, so a term never sees a client axis and seldom averages. A tensor's name says
which space it is in: logits, log_probs or probs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from fedkd.errors import FedkdError

Needs = Literal["soft-labels", "logits", "class-means"] | None


def kl_divergence(teacher_logits: Tensor, student_logits: Tensor, tau: float | Tensor) -> Tensor:
    """Return the Kullback-Leibler divergence KL(softmax(z_T/τ) ‖ softmax(z_S/τ)) per sample.

    Args:
        teacher_logits: ``[..., C]``; no gradient flows into it. Log-probabilities work as well.
        student_logits: ``[..., C]``.
        tau: temperature, a number or a tensor that broadcasts against ``[...]``.

    Returns:
        ``[...]``, not multiplied by τ². Exactly 0 where both are equal; finite for finite logits.
    """
    scale = _column(tau)
    log_p = log_probabilities(teacher_logits.detach() / scale)
    log_q = log_probabilities(student_logits / scale)
    p = log_p.exp()
    # 0·log 0 = 0: a one-hot label has log-probabilities of -inf, for which `kl_div` gives NaN.
    return torch.where(p > 0, p * (log_p - log_q), 0.0).sum(-1)


def log_probabilities(logits: Tensor) -> Tensor:
    """Return log softmax over the classes, ``[..., C]``.

    Computed over the last but one axis of the transposed tensor. With few classes this is ten times as
    fast on a CPU, which then processes many samples at once, and stacked dense layers return their
    logits in this layout anyway.
    """
    if logits.ndim < 2:
        return log_softmax(logits, dim=-1)
    return log_softmax(logits.transpose(-1, -2), dim=-2).transpose(-1, -2)


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the cross entropy with hard labels per sample.

    Args:
        logits: ``[..., C]``.
        labels: int64 ``[...]``.

    Returns:
        ``[...]``.
    """
    return -log_probabilities(logits).gather(-1, labels.unsqueeze(-1)).squeeze(-1)


def distillation_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    alpha: float | Tensor,
    tau: float | Tensor,
    reduction: Literal["mean", "none"] = "mean",
    kl_reduction: Literal["batchmean", "mean"] = "batchmean",
) -> Tensor:
    """Return α·τ²·KL(softmax(z_T/τ) ‖ softmax(z_S/τ)) + (1−α)·CE(z_S, y), Hinton et al. 2015, section 2.

    Args:
        student_logits: ``[..., C]``.
        teacher_logits: ``[..., C]``, detached here.
        labels: int64 ``[...]``.
        alpha: weight of the soft term, 0..1; a number or a tensor that broadcasts against ``[...]``.
        tau: temperature, > 0; likewise.
        reduction: ``"mean"`` over samples, or ``"none"`` for ``[...]``.
        kl_reduction: ``"batchmean"`` is the formula above. ``"mean"`` divides the soft term by C as
            well, which is what ``nn.KLDivLoss()`` computes with its default reduction.

    Returns:
        A scalar, or ``[...]``. At α = 0 exactly the cross entropy, at α = 1 exactly the soft term.

    Raises:
        FedkdError: a reduction is none of these.
    """
    if reduction not in ("mean", "none") or kl_reduction not in ("batchmean", "mean"):
        raise FedkdError(
            f"reduction = {reduction!r}, kl_reduction = {kl_reduction!r}: must be 'mean' or 'none', and "
            "'batchmean' or 'mean'"
        )
    if isinstance(alpha, int | float) and alpha == 0:
        loss = cross_entropy(student_logits, labels)
    else:
        soft = soft_term(teacher_logits, student_logits, tau, kl_reduction)
        if isinstance(alpha, int | float) and alpha == 1:
            loss = soft
        else:
            loss = alpha * soft + (1 - alpha) * cross_entropy(student_logits, labels)
    return loss.mean() if reduction == "mean" else loss


def soft_term(
    teacher_logits: Tensor,
    student_logits: Tensor,
    tau: float | Tensor,
    kl_reduction: Literal["batchmean", "mean"] = "batchmean",
) -> Tensor:
    """Return τ²·KL per sample ``[...]``; τ² makes its gradient's size independent of τ (section 2)."""
    soft = kl_divergence(teacher_logits, student_logits, tau) * tau**2
    return soft / student_logits.shape[-1] if kl_reduction == "mean" else soft


def effective_weights(alpha: float, tau: float, kl_reduction: str, num_classes: int) -> str:
    """Return the weights that α and τ amount to, as in ``0.7·5² = 17.5 × KL + 0.3 × CE``."""
    divided = f"/{num_classes}" if kl_reduction == "mean" else ""
    weight = alpha * tau**2 / (num_classes if divided else 1)
    return f"{alpha:g}·{tau:g}²{divided} = {weight:g} × KL + {1 - alpha:g} × CE"


def _column(value: float | Tensor) -> float | Tensor:
    return value.unsqueeze(-1) if isinstance(value, Tensor) else value


class Step(NamedTuple):
    """What a term sees of one client's step: no client axis, padding included."""

    logits: Tensor
    """``[B, C]`` of the model that is trained."""
    labels: Tensor
    """int64 ``[B]``; zeros where there are none."""
    teacher_logits: Tensor | None
    """``[B, C]`` received for these samples; log-probabilities where probabilities arrived."""
    params: Mapping[str, Tensor]
    """The parameters that are trained."""
    start: Mapping[str, Tensor]
    """The same at the start of the phase; empty unless a term asks for it (``needs_start``)."""
    numbers: Mapping[str, Tensor]
    """0-d tensors by name; ``tau`` is always there."""
    features: Tensor | None = None
    """``[B, D]``, the input of the model's head; ``None`` unless a term asks for it."""
    class_means: Tensor | None = None
    """``[C, D]`` received for the classes (D = C for outputs); zeros where a class is absent."""
    class_counts: Tensor | None = None
    """``[C]``, images behind each mean; 0 where a class is absent."""
    mask: Tensor | None = None
    """bool ``[B]``, which rows are samples and not padding; in a run it is always there."""


TermFunction = Callable[[Step], Tensor]


@dataclass(frozen=True)
class Term:
    """A loss term: its function, and the inputs that it needs."""

    function: TermFunction
    needs: Needs
    needs_start: bool = False
    needs_features: bool = False

    @property
    def import_path(self) -> str:
        """The ``module:function`` under which the term travels."""
        return f"{self.function.__module__}:{self.function.__qualname__}"

    def __call__(self, step: Step) -> Tensor:
        """Return ``[B]`` (one value a sample) or a 0-d tensor (added as it is)."""
        return self.function(step)


def term(
    *, needs: Needs, needs_start: bool = False, needs_features: bool = False
) -> Callable[[TermFunction], Term]:
    """Return a decorator that makes a module-level function of one client's batch a loss term.

    The function must be pure torch: no averaging, no client axis, no ``.item()``, no boolean-mask
    indexing, no ``if`` on a value, no random draws, nothing in place. A term that compares the samples of
    a batch leaves out padding by ``step.mask`` and returns one number for the batch, a 0-d tensor.

    Args:
        needs: the knowledge without which the term is skipped (round 1, or a failed quorum);
            ``"logits"`` refuses probabilities.
        needs_start: whether ``step.start`` is filled.
        needs_features: whether ``step.features`` is filled, which requires a model with ``body`` and
            ``head``.

    Raises:
        FedkdError: `needs` is none of these.
    """
    if needs not in (None, *get_args(get_args(Needs)[0])):
        accepted = ", ".join(get_args(get_args(Needs)[0]))
        raise FedkdError(f"needs = {needs!r} of a term: must be None or one of {accepted}")
    return lambda function: Term(function, needs, needs_start, needs_features)


@term(needs=None)
def ce(step: Step) -> Tensor:
    """Return the cross entropy with the hard labels, ``[B]``."""
    return cross_entropy(step.logits, step.labels)


@term(needs="soft-labels")
def kl(step: Step) -> Tensor:
    """Return τ²·KL to the received soft labels, ``[B]``."""
    assert step.teacher_logits is not None
    return soft_term(step.teacher_logits, step.logits, step.numbers["tau"])


@term(needs="soft-labels")
def kl_mean(step: Step) -> Tensor:
    """Return τ²·KL divided by the number of classes, ``[B]``: ``nn.KLDivLoss()`` by default."""
    assert step.teacher_logits is not None
    return soft_term(step.teacher_logits, step.logits, step.numbers["tau"], "mean")


def kl_term(kl_reduction: Literal["batchmean", "mean"]) -> Term:
    """Return the soft term under the experiment's ``kl-reduction``."""
    return kl if kl_reduction == "batchmean" else kl_mean


@term(needs="logits")
def mae_logits(step: Step) -> Tensor:
    """Return the mean absolute error between logits, ``[B]`` (FedMD's digest in its authors' code)."""
    assert step.teacher_logits is not None
    return (step.logits - step.teacher_logits.detach()).abs().mean(-1)
