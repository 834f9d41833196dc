"""The losses against formulas written out in Python floats, and against what PyTorch ships."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn
from torch.func import vmap
from torch.nn import functional as F

import fedkd
from fedkd.errors import FedkdError
from fedkd.losses import (
    Step,
    Term,
    ce,
    cross_entropy,
    distillation_loss,
    effective_weights,
    kl,
    kl_divergence,
    kl_mean,
    mae_logits,
    soft_term,
    term,
)

K, B, C = 3, 5, 7
HARD = -math.inf
KlReduction = Literal["batchmean", "mean"]


def logits(*shape: int, seed: int = 0, scale: float = 3.0) -> Tensor:
    """Draw float64 logits of mixed signs."""
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(*shape, generator=generator, dtype=torch.float64)


def labels(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(0, C, shape, generator=torch.Generator().manual_seed(seed))


def log_softmax(row: Sequence[float]) -> list[float]:
    """Do it in Python floats: shift by the maximum, sum exactly."""
    top = max(row)
    total = math.log(math.fsum(math.exp(z - top) for z in row))
    return [z - top - total for z in row]


def kl_of_row(teacher: Sequence[float], student: Sequence[float], tau: float) -> float:
    log_p = log_softmax([z / tau for z in teacher])
    log_q = log_softmax([z / tau for z in student])
    return math.fsum(math.exp(p) * (p - q) for p, q in zip(log_p, log_q, strict=True) if p > HARD)


def rows_of(tensor: Tensor) -> list[list[float]]:
    rows: list[list[float]] = tensor.tolist()
    return rows


def written_out(
    student: Tensor,
    teacher: Tensor,
    hard: Tensor,
    alpha: float,
    tau: float,
    kl_reduction: KlReduction = "batchmean",
) -> Tensor:
    """α·τ²·KL + (1−α)·CE per sample, ``[B]``."""
    values = []
    for zs, zt, y in zip(rows_of(student), rows_of(teacher), hard.tolist(), strict=True):
        soft = tau * tau * kl_of_row(zt, zs, tau) / (len(zs) if kl_reduction == "mean" else 1)
        values.append(alpha * soft - (1 - alpha) * log_softmax(zs)[y])
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize("kl_reduction", ["batchmean", "mean"])
@pytest.mark.parametrize(("alpha", "tau"), [(0.0, 2.0), (0.3, 1.0), (0.7, 5.0), (1.0, 0.5)])
def test_distillation_loss_is_the_formula(
    alpha: float, tau: float, kl_reduction: KlReduction
) -> None:
    zs, zt, y = logits(B, C), logits(B, C, seed=1), labels(B)
    expected = written_out(zs, zt, y, alpha, tau, kl_reduction)

    each = distillation_loss(zs, zt, y, alpha, tau, reduction="none", kl_reduction=kl_reduction)
    mean = distillation_loss(zs, zt, y, alpha, tau, kl_reduction=kl_reduction)

    torch.testing.assert_close(each, expected, rtol=1e-13, atol=1e-14)
    torch.testing.assert_close(mean, expected.mean(), rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1.0, 1e3])
@pytest.mark.parametrize("tau", [0.5, 1.0, 5.0])
def test_kl_of_equal_logits_is_exactly_zero(dtype: torch.dtype, scale: float, tau: float) -> None:
    z = logits(B, C, scale=scale).to(dtype)
    assert torch.equal(kl_divergence(z, z, tau), torch.zeros(B, dtype=dtype))


def test_kl_is_not_symmetric_and_the_teacher_comes_first() -> None:
    a, b = logits(B, C), logits(B, C, seed=1)
    pairs = list(zip(rows_of(a), rows_of(b), strict=True))
    forward = torch.tensor([kl_of_row(za, zb, 2.0) for za, zb in pairs], dtype=torch.float64)
    backward = torch.tensor([kl_of_row(zb, za, 2.0) for za, zb in pairs], dtype=torch.float64)

    torch.testing.assert_close(kl_divergence(a, b, 2.0), forward, rtol=1e-12, atol=0)
    assert bool(((forward - backward).abs() > 1e-3).all())
    assert bool((forward > 0).all())


def test_log_probabilities_serve_as_logits_of_a_teacher() -> None:
    zs, zt = logits(B, C), logits(B, C, seed=1)
    given = kl_divergence(zt.log_softmax(-1), zs, 3.0)
    torch.testing.assert_close(given, kl_divergence(zt, zs, 3.0), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("alpha", [0, 0.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_alpha_0_is_cross_entropy_bit_for_bit(alpha: float, dtype: torch.dtype) -> None:
    zs, y = logits(B, C).to(dtype), labels(B)
    teacher = torch.full_like(zs, math.nan)  # α = 0 does not look at it, not even times 0

    each = distillation_loss(zs, teacher, y, alpha, 5.0, reduction="none")
    mean = distillation_loss(zs, teacher, y, alpha, 5.0)

    assert torch.equal(each, F.cross_entropy(zs, y, reduction="none"))
    assert torch.equal(mean, F.cross_entropy(zs, y, reduction="none").mean())
    torch.testing.assert_close(mean, F.cross_entropy(zs, y), rtol=2e-7, atol=0)


@pytest.mark.parametrize("alpha", [1, 1.0])
def test_alpha_1_is_the_soft_term_bit_for_bit(alpha: float) -> None:
    zs, zt, y = logits(B, C), logits(B, C, seed=1), labels(B)
    zs[0, y[0]] = -math.inf  # infinite cross entropy: α = 1 does not look at it, not even times 0
    zt[0, y[0]] = -math.inf

    each = distillation_loss(zs, zt, y, alpha, 4.0, reduction="none")

    assert torch.equal(each, soft_term(zt, zs, 4.0))
    torch.testing.assert_close(each[1:], written_out(zs, zt, y, 1.0, 4.0)[1:], rtol=1e-12, atol=0)


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_limits_given_as_tensors_agree(alpha: float) -> None:
    zs, zt, y = logits(B, C), logits(B, C, seed=1), labels(B)
    given = distillation_loss(zs, zt, y, torch.tensor(alpha), torch.tensor(4.0), reduction="none")
    number = distillation_loss(zs, zt, y, alpha, 4.0, reduction="none")
    torch.testing.assert_close(given, number, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize(("alpha", "tau"), [(0.0, 3.0), (0.3, 1.0), (0.7, 5.0), (1.0, 2.0)])
def test_gradient_is_that_of_the_formula_and_the_closed_form(alpha: float, tau: float) -> None:
    zs, zt, y = logits(B, C).requires_grad_(), logits(B, C, seed=1), labels(B)
    loss = distillation_loss(zs, zt, y, alpha, tau, reduction="none").sum()
    (given,) = torch.autograd.grad(loss, zs)

    p, q = (zt / tau).exp(), (zs / tau).exp()
    p, q = p / p.sum(-1, keepdim=True), q / q.sum(-1, keepdim=True)
    probability = zs.exp() / zs.exp().sum(-1, keepdim=True)
    hard = -probability[torch.arange(B), y].log()
    formula = alpha * tau**2 * (p * (p / q).log()).sum(-1) + (1 - alpha) * hard
    (by_autograd,) = torch.autograd.grad(formula.sum(), zs)

    one_hot = torch.eye(C, dtype=torch.float64)[y]
    closed = alpha * tau * (q - p) + (1 - alpha) * (probability - one_hot)

    torch.testing.assert_close(given, by_autograd, rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(given, closed.detach(), rtol=1e-11, atol=1e-13)


def test_gradient_of_a_large_tau_is_that_of_matched_logits() -> None:
    """Hinton et al. 2015, section 2.1: (z_S − z_T)/C of centred logits as τ grows."""
    zs, zt = logits(B, C), logits(B, C, seed=1)
    zs, zt = zs - zs.mean(-1, keepdim=True), zt - zt.mean(-1, keepdim=True)
    leaf = zs.clone().requires_grad_()
    (given,) = torch.autograd.grad(soft_term(zt, leaf, 1e5).sum(), leaf)
    torch.testing.assert_close(given, (zs - zt) / C, rtol=0, atol=1e-3)
    assert float(given.abs().max()) > 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("alpha", "tau"), [(0.0, 1.0), (0.7, 5.0), (1.0, 1.0), (0.5, 0.5)])
def test_logits_of_a_thousand_give_the_right_finite_values(
    alpha: float, tau: float, dtype: torch.dtype
) -> None:
    sign = torch.randint(0, 2, (2, B, C), generator=torch.Generator().manual_seed(7)) * 2 - 1
    zs, zt = (1e3 * sign).to(dtype)
    zs[0, 0], zt[0, 0] = 1e3, -1e3  # opposite certainties in one class
    zs[0, 1:], zt[0, 1:] = -1e3, 1e3
    y = labels(B)
    zs.requires_grad_()

    each = distillation_loss(zs, zt, y, alpha, tau, reduction="none")
    (gradient,) = torch.autograd.grad(each.sum(), zs)

    expected = written_out(zs.detach().double(), zt.double(), y, alpha, tau)
    relative = 1e-5 if dtype == torch.float32 else 1e-12
    torch.testing.assert_close(each.double(), expected, rtol=relative, atol=1e-5)
    assert float(each.detach().max()) > 100
    assert bool(gradient.isfinite().all())
    assert float(gradient.abs().max()) > 0.1


@pytest.mark.parametrize("alpha", [0.4, 1.0])
def test_one_hot_labels_as_log_probabilities_of_minus_infinity(alpha: float) -> None:
    zs, y = logits(B, C).requires_grad_(), labels(B)
    teacher = torch.full((B, C), HARD, dtype=torch.float64)
    teacher[torch.arange(B), y] = 0.0

    each = distillation_loss(zs, teacher, y, alpha, 1.0, reduction="none")
    (gradient,) = torch.autograd.grad(each.sum(), zs)

    # At τ = 1 the KL to a one-hot distribution is the cross entropy, whatever α is.
    probability = zs.detach().softmax(-1)
    torch.testing.assert_close(each, F.cross_entropy(zs, y, reduction="none"), rtol=1e-12, atol=0)
    torch.testing.assert_close(
        gradient, probability - torch.eye(C, dtype=torch.float64)[y], rtol=1e-11, atol=1e-14
    )


def test_some_classes_of_probability_zero() -> None:
    zs, zt = logits(B, C).requires_grad_(), logits(B, C, seed=1)
    zt[:, 2:4] = HARD
    each = kl_divergence(zt, zs, 3.0)
    (gradient,) = torch.autograd.grad(each.sum(), zs)

    pairs = zip(rows_of(zt), rows_of(zs.detach()), strict=True)
    expected = torch.tensor([kl_of_row(t, s, 3.0) for t, s in pairs], dtype=torch.float64)
    closed = ((zs.detach() / 3).softmax(-1) - (zt / 3).softmax(-1)) / 3
    torch.testing.assert_close(each.detach(), expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(gradient, closed, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("kl_reduction", ["batchmean", "mean"])
def test_no_gradient_reaches_the_teacher(kl_reduction: KlReduction) -> None:
    zs, zt = logits(B, C).requires_grad_(), logits(B, C, seed=1).requires_grad_()
    distillation_loss(zs, zt, labels(B), 0.7, 5.0, kl_reduction=kl_reduction).backward()
    assert zt.grad is None
    assert zs.grad is not None

    for each in (kl, kl_mean, mae_logits):
        assert not each(_step(zs.detach(), zt)).requires_grad
        assert each(_step(zs, zt)).requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_reduction_mean_is_kldivloss_with_its_defaults(dtype: torch.dtype) -> None:
    zs, zt, y = logits(B, C).to(dtype), logits(B, C, seed=1).to(dtype), labels(B)
    tau, alpha = 5.0, 0.7
    with pytest.warns(UserWarning, match="batchmean"):  # the warning that the source ran into
        soft = nn.KLDivLoss()((zs / tau).log_softmax(-1), (zt / tau).softmax(-1)) * tau**2
    expected = alpha * soft + (1 - alpha) * nn.CrossEntropyLoss()(zs, y)

    mean = distillation_loss(zs, zt, y, alpha, tau, kl_reduction="mean")

    torch.testing.assert_close(mean, expected)
    torch.testing.assert_close(soft_term(zt, zs, tau, "mean").mean(), soft)


def test_alpha_and_tau_of_each_client_broadcast() -> None:
    zs, y = logits(K, B, C), labels(K, B)
    alphas, taus = [0.0, 0.4, 1.0], [1.0, 2.5, 7.0]
    alpha = torch.tensor(alphas, dtype=torch.float64).unsqueeze(1)
    tau = torch.tensor(taus, dtype=torch.float64).unsqueeze(1)
    for zt in (logits(K, B, C, seed=1), logits(B, C, seed=1)):
        each = distillation_loss(zs, zt, y, alpha, tau, reduction="none")
        teachers = zt.expand(K, B, C)
        expected = torch.stack(
            [written_out(zs[k], teachers[k], y[k], alphas[k], taus[k]) for k in range(K)]
        )
        torch.testing.assert_close(each, expected, rtol=1e-12, atol=1e-13)
        mean = distillation_loss(zs, zt, y, alpha, tau)
        torch.testing.assert_close(mean, expected.mean(), rtol=1e-12, atol=0)


def test_cross_entropy_keeps_leading_axes() -> None:
    z, y = logits(K, B, C), labels(K, B)
    expected = [[-log_softmax(rows_of(z[k])[b])[int(y[k, b])] for b in range(B)] for k in range(K)]
    torch.testing.assert_close(
        cross_entropy(z, y), torch.tensor(expected, dtype=torch.float64), rtol=1e-13, atol=1e-14
    )


@pytest.mark.parametrize("kl_reduction", ["batchmean", "mean"])
def test_mapped_over_clients_equals_one_by_one(kl_reduction: KlReduction) -> None:
    zs, zt, y = logits(K, B, C), logits(K, B, C, seed=1), labels(K, B)
    alpha = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    tau = torch.tensor([1.0, 3.0, 5.0], dtype=torch.float64)

    def one(zs: Tensor, zt: Tensor, y: Tensor, alpha: Tensor, tau: Tensor) -> Tensor:
        return distillation_loss(zs, zt, y, alpha, tau, kl_reduction=kl_reduction)

    mapped = vmap(one)(zs, zt, y, alpha, tau)
    looped = [
        distillation_loss(
            zs[k], zt[k], y[k], float(alpha[k]), float(tau[k]), kl_reduction=kl_reduction
        )
        for k in range(K)
    ]
    torch.testing.assert_close(mapped, torch.stack(looped), rtol=1e-13, atol=0)


def _step(zs: Tensor, zt: Tensor | None, y: Tensor | None = None, tau: float = 5.0) -> Step:
    y = labels(len(zs)) if y is None else y
    return Step(zs, y, zt, {}, {}, {"tau": torch.tensor(tau, dtype=torch.float64)})


def test_terms_are_what_their_names_say() -> None:
    zs, zt, y = logits(B, C), logits(B, C, seed=1), labels(B)
    step = _step(zs, zt, y)
    differences = [
        math.fsum(abs(a - b) for a, b in zip(s, t, strict=True)) / C
        for s, t in zip(rows_of(zs), rows_of(zt), strict=True)
    ]
    expected = {
        ce: written_out(zs, zt, y, 0.0, 5.0),
        kl: written_out(zs, zt, y, 1.0, 5.0),
        kl_mean: written_out(zs, zt, y, 1.0, 5.0, "mean"),
        mae_logits: torch.tensor(differences, dtype=torch.float64),
    }
    for each, values in expected.items():
        torch.testing.assert_close(each(step), values, rtol=1e-12, atol=1e-13)


def test_terms_say_what_they_need_and_where_they_are_found() -> None:
    needs = {t.import_path: (t.needs, t.needs_start) for t in (ce, kl, kl_mean, mae_logits)}
    assert needs == {
        "fedkd.losses:ce": (None, False),
        "fedkd.losses:kl": ("soft-labels", False),
        "fedkd.losses:kl_mean": ("soft-labels", False),
        "fedkd.losses:mae_logits": ("logits", False),
    }

    @term(needs="logits", needs_start=True)
    def own(step: Step) -> Tensor:
        return step.logits.sum(-1)

    assert isinstance(own, Term)
    assert (own.needs, own.needs_start) == ("logits", True)
    zs = logits(B, C)
    assert torch.equal(own(_step(zs, None)), zs.sum(-1))


@pytest.mark.parametrize(
    ("alpha", "tau", "kl_reduction", "expected"),
    [
        (0.7, 5.0, "batchmean", "0.7·5² = 17.5 × KL + 0.3 × CE"),
        (0.7, 5.0, "mean", "0.7·5²/10 = 1.75 × KL + 0.3 × CE"),
        (1.0, 2.0, "batchmean", "1·2² = 4 × KL + 0 × CE"),
        (0.0, 2.5, "batchmean", "0·2.5² = 0 × KL + 1 × CE"),
    ],
)
def test_effective_weights_are_spelled_out(
    alpha: float, tau: float, kl_reduction: str, expected: str
) -> None:
    assert effective_weights(alpha, tau, kl_reduction, 10) == expected


def test_other_reductions_are_refused() -> None:
    zs, zt, y = torch.zeros(3, 5), torch.zeros(3, 5), torch.zeros(3, dtype=torch.int64)
    wrong: list[dict[str, Any]] = [{"reduction": "sum"}, {"kl_reduction": "batch"}]
    for keys in wrong:
        with pytest.raises(FedkdError, match="must be 'mean' or 'none'"):
            fedkd.losses.distillation_loss(zs, zt, y, 0.5, 3.0, **keys)
