"""Noise on soft labels: the mechanism, what it amounts to, and where it is refused."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import mpmath  # type: ignore[import-untyped]
import numpy as np
import pytest
import torch
from federation_tools import P, federate, tiny
from scipy.optimize import brentq
from scipy.stats import norm
from torch import Tensor

import fedkd
from fedkd.clients import execute as client
from fedkd.clients.privacy import check_privacy, epsilon, onto_simplex, privatise, privatised
from fedkd.clients.stack import Stack
from fedkd.errors import FedkdError
from fedkd.knowledge import ClassMeans, SoftLabels, Space, Weights
from fedkd.randomness import generator
from fedkd.registry import strategies

N, C = 13, 7
SPACES: tuple[Space, ...] = ("logits", "probabilities")


def _rows(space: Space, scale: float = 3.0, rows: int = N) -> Tensor:
    logits = scale * torch.randn(rows, C, generator=generator("rows", rows)) + 1.7
    return logits if space == "logits" else logits.softmax(-1)


# --- The mechanism --------------------------------------------------------------------------------


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("clip", [0.31, 0.8, 5.0, 1e4])
def test_without_noise_only_long_rows_are_shortened(space: Space, clip: float) -> None:
    values = _rows(space)
    given = values.double().numpy()
    wanted = np.empty((N, C))
    for n, row in enumerate(given):  # a float64 reference, row by row
        origin = row.sum() / C if space == "logits" else 1 / C
        length = math.sqrt(sum((x - origin) ** 2 for x in row))
        wanted[n] = (row - origin) * min(1.0, clip / length)
        wanted[n] += 0 if space == "logits" else origin
    found = privatised(values, space, clip, 0.0, generator("unused"))
    assert found.dtype == values.dtype
    np.testing.assert_allclose(found.double().numpy(), wanted, atol=3e-7 * max(1, clip / 5))


@pytest.mark.parametrize("space", SPACES)
def test_no_two_rows_are_farther_apart_than_twice_the_clip(space: Space) -> None:
    clip = 0.61
    extreme = torch.zeros(2, C, dtype=torch.float64)
    extreme[0, 2], extreme[1, 5] = (1, 1) if space == "probabilities" else (1e38, -1e38)
    if space == "logits":
        extreme[1] = -extreme[0]
    values = torch.cat([extreme, _rows(space, 9.0).double()])
    clipped = privatised(values, space, clip, 0.0, generator("unused"))
    distances = torch.cdist(clipped, clipped)
    assert float(distances.max()) <= 2 * clip * (1 + 1e-12)
    if space == "logits":
        assert float(distances[0, 1]) == pytest.approx(2 * clip)  # so the bound is attained


@pytest.mark.parametrize("seeded", [True, False])
def test_noise_is_normal_with_the_right_spread_and_independent(seeded: bool) -> None:
    rows, clip, noise = 20_011, 0.7, 1.9
    values = _rows("logits", rows=rows).double()
    kept = privatised(values, "logits", clip, 0.0, None)
    draw = generator("noise") if seeded else None
    drawn = (privatised(values, "logits", clip, noise, draw) - kept) / (noise * clip)
    count = drawn.numel()
    assert abs(float(drawn.mean())) < 5 / math.sqrt(count)
    assert abs(float(drawn.var()) - 1) < 5 * math.sqrt(2 / count)
    # Every column by itself, and each with every other: a Gaussian's covariance is the identity.
    covariance = torch.cov(drawn.T)
    assert float((covariance - torch.eye(C)).abs().max()) < 5 * math.sqrt(2 / rows)
    assert float((drawn[1:] * drawn[:-1]).mean().abs()) < 5 / math.sqrt(count)
    # Kolmogorov and Smirnov's distance to the normal distribution, at 10^-6.
    ordered = norm.cdf(drawn.flatten().sort().values.numpy())
    steps = np.arange(count + 1) / count
    distance = max(np.abs(ordered - steps[1:]).max(), np.abs(ordered - steps[:-1]).max())
    assert distance < math.sqrt(-math.log(1e-6 / 2) / 2 / count)


def test_secret_noise_depends_on_no_seed_and_never_comes_again() -> None:
    values = _rows("logits")
    found = []
    for _ in range(2):
        torch.manual_seed(5)
        np.random.seed(5)  # which must not matter
        found.append(privatised(values, "logits", 1.0, 1.0, None))
    assert not bool((found[0] == found[1]).any())
    seeded = [privatised(values, "logits", 1.0, 1.0, generator("a", 3)) for _ in range(2)]
    assert torch.equal(*seeded)


@pytest.mark.parametrize("noise", [0.2, 4.0, 1e6])
def test_noisy_probabilities_are_the_nearest_rows_of_the_simplex(noise: float) -> None:
    values, clip = _rows("probabilities"), 0.9
    drawn = torch.randn(N, C, generator=generator("n"), dtype=torch.float64)
    found = privatised(values, "probabilities", clip, noise, generator("n"))
    kept = privatised(values.double(), "probabilities", clip, 0.0, None)
    noisy = (kept + noise * clip * drawn).numpy()
    for row, projected in zip(noisy, found.double().numpy(), strict=True):
        threshold = brentq(
            lambda t, r=row: np.maximum(r - t, 0).sum() - 1, row.min() - 1, row.max()
        )
        np.testing.assert_allclose(projected, np.maximum(row - threshold, 0), atol=2e-6)
    assert bool((found >= 0).all())
    assert float((found.sum(-1) - 1).abs().max()) < 1e-6


def test_the_simplex_itself_stays_where_it_is() -> None:
    values = torch.cat([_rows("logits").double().softmax(-1), torch.eye(C, dtype=torch.float64)])
    torch.testing.assert_close(onto_simplex(values), values, rtol=0, atol=1e-15)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("space", ["logits", "probabilities"])
def test_a_row_that_cannot_be_clipped_leaves_as_noise_alone(bad: float, space: Space) -> None:
    """To refuse it would tell without noise that training on the private images diverged."""
    values = _rows(space)
    values[3, 2] = bad
    uniform = _rows(space)
    uniform[3] = 1 / C
    noisy, expected = (
        privatised(rows, space, 0.7, 1.3, generator("bad")) for rows in (values, uniform)
    )
    torch.testing.assert_close(noisy, expected)


def test_an_optimal_guess_between_two_data_sets_is_right_as_often_as_accounted_for() -> None:
    """An audit of mechanism and accountant together: the likelihood-ratio test at its best threshold."""
    rows, noise, clip = 40_009, 1.3, 0.4
    one = torch.tensor([[4.0, -1, -1, -1, -1, 0, 0]])  # longer than the clip, mean 0
    noisy = [
        privatised((sign * one).expand(rows, -1), "logits", clip, noise, generator("audit", sign))
        for sign in (1, -1)
    ]
    right = [
        ((sign * rows_NC) @ one[0] > 0).double().mean()
        for sign, rows_NC in zip((1, -1), noisy, strict=True)
    ]
    mu = 2 / noise
    for share in right:
        assert abs(float(share) - norm.cdf(mu / 2)) < 5 / math.sqrt(4 * rows)
    # Kairouz, Oh and Viswanath 2015: TPR ≤ e^ε FPR + δ; this test wants exactly this ε at this δ.
    delta = norm.cdf(mu / 2) - math.e * norm.cdf(-mu / 2)
    assert epsilon(noise=noise, rows=1, delta=delta) >= 1


# --- What it amounts to ---------------------------------------------------------------------------


def _delta(eps: Any, mu: Any) -> Any:
    """δ of a Gaussian mechanism (Balle and Wang 2018, theorem 8, with Δ/σ = μ), to 60 digits."""
    with mpmath.workdps(60):
        eps, mu = mpmath.mpf(eps), mpmath.mpf(mu)
        tail = mpmath.exp(eps) * mpmath.ncdf(-mu / 2 - eps / mu)
        return mpmath.ncdf(mu / 2 - eps / mu) - tail


@pytest.mark.parametrize("delta", [1e-300, 1e-9, 1e-5, 0.01, 0.5])
@pytest.mark.parametrize("rows", [1, 37, 1009, 1_000_003])
@pytest.mark.parametrize("noise", [0.003, 0.7, 4.0, 61.0, 5000.0, 1e6])
def test_epsilon_is_the_closed_form_of_composed_gaussians(
    noise: float, rows: int, delta: float
) -> None:
    found = epsilon(noise=noise, rows=rows, delta=delta)
    mu = 2 * mpmath.sqrt(rows) / mpmath.mpf(noise)
    if found == 0:
        assert _delta(0, mu) <= delta
    else:
        assert float(_delta(found, mu) / delta) == pytest.approx(1, rel=1e-4)


def test_published_values() -> None:
    # Bu, Dong, Long and Su 2020 (Harvard Data Science Review 2.3), figure 4: at δ = 1e-5 a μ of 0.35 is
    # ε = 1.34 and one of 1.78 is 8.68, both rounded to two decimals.
    for mu, published in ((0.35, 1.34), (1.78, 8.68)):
        low, high = (epsilon(noise=2 / m, rows=1, delta=1e-5) for m in (mu - 0.005, mu + 0.005))
        assert low - 0.005 <= published <= high + 0.005
    # Dong, Roth and Su 2022, corollary 2.13 at μ = 1 and ε = 1: δ = Φ(−1/2) − e·Φ(−3/2) = 0.12694.
    assert epsilon(noise=2.0, rows=1, delta=0.126936737507) == pytest.approx(1, rel=1e-9)
    # A hundred rows under ten times the noise are one row.
    assert epsilon(noise=20.0, rows=100, delta=0.126936737507) == pytest.approx(1, rel=1e-9)


def test_other_accountants_come_to_the_same_or_to_more() -> None:
    from dp_accounting import GaussianDpEvent, SelfComposedDpEvent
    from dp_accounting.pld import PLDAccountant
    from dp_accounting.rdp import RdpAccountant

    noise, rows, delta = 31.0, 97, 1e-5
    found = epsilon(noise=noise, rows=rows, delta=delta)
    event = SelfComposedDpEvent(GaussianDpEvent(noise / 2), rows)
    by_losses, by_renyi = (
        a().compose(event).get_epsilon(delta) for a in (PLDAccountant, RdpAccountant)
    )
    assert found <= by_losses + 1e-6
    assert by_losses == pytest.approx(found, rel=2e-3)
    assert found < by_renyi < 1.3 * found


def test_the_ends_of_the_range() -> None:
    assert epsilon(noise=0.0, rows=0, delta=1e-5) == 0
    assert epsilon(noise=0.0, rows=1, delta=1e-5) == math.inf
    assert epsilon(noise=1e-300, rows=10**12, delta=1e-5) == math.inf
    assert epsilon(noise=1e-5, rows=10**6, delta=1e-5) == math.inf
    large = epsilon(noise=2e-6, rows=1, delta=1e-300)  # μ = 10^6, the largest
    assert large == pytest.approx(5e11, rel=1e-3)
    assert epsilon(noise=1e6, rows=1, delta=1e-5) == 0
    several = [epsilon(noise=3.0, rows=rows, delta=1e-5) for rows in (1, 2, 3, 5, 7)]
    assert several == sorted(set(several))
    less = [epsilon(noise=noise, rows=5, delta=1e-5) for noise in (0.5, 1.0, 2.0, 4.0)]
    assert less == sorted(set(less), reverse=True)


# --- Where it is refused --------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "said"), [(ClassMeans, "class means"), (Weights, "weights")])
def test_what_no_noise_is_added_to_is_refused(kind: Any, said: str) -> None:
    experiment = tiny(strategy="FedAvg", dp_noise=0.5)
    wanted = (
        f"dp-noise = 0.5: FedAvg sends {said}, to which no noise is added; set dp-noise = 0 or choose a "
        "strategy that sends soft labels"
    )
    with pytest.raises(FedkdError) as raised:
        check_privacy(experiment, kind)
    assert str(raised.value) == wanted
    check_privacy(tiny(strategy="FedAvg"), kind)
    check_privacy(experiment, SoftLabels)
    check_privacy(experiment, None)


def test_a_missing_accountant_is_told_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "dp_accounting", None)
    with pytest.raises(FedkdError, match=r"^dp-noise = 3\.0: .* pip install 'fedkd\[privacy\]'$"):
        check_privacy(tiny(dp_noise=3.0), SoftLabels)
    check_privacy(tiny(), SoftLabels)


# --- In a federation ------------------------------------------------------------------------------

SOFT = [name for name, cls in strategies().items() if cls().uploads() is SoftLabels]
OTHER = [n for n, cls in strategies().items() if cls().uploads() in (ClassMeans, Weights)]


def _experiment(strategy: str, **keys: Any) -> Any:
    facts = strategies()[strategy].facts
    server_model = "mlp-4" if facts.server_model == "required" else "none"
    return tiny(strategy=strategy, server_model=server_model, codec="float32", **keys)


@pytest.mark.parametrize("name", SOFT)
def test_every_answer_of_every_soft_label_strategy_has_noise(name: str) -> None:
    keys = {"dp_clip": 0.8, "seed": 11}
    plain = federate(_experiment(name, seed=11)).exchanges[0].answers([0, 1, 2])
    noisy = federate(_experiment(name, dp_noise=0.4, **keys)).exchanges[0].answers([0, 1, 2])
    assert isinstance(plain, SoftLabels)
    assert isinstance(noisy, SoftLabels)
    assert torch.equal(plain.samples, noisy.samples)
    assert torch.equal(plain.mask, noisy.mask)
    for k in range(3):
        mask = plain.mask[k]
        stream = generator(11, "dp", k, 1)
        wanted = privatised(plain.values[k, mask], plain.space, 0.8, 0.4, stream)
        assert torch.equal(noisy.values[k, mask], wanted)
        assert not torch.equal(plain.values[k, mask], wanted)


def test_noise_is_another_for_every_client_and_round() -> None:
    # No training: the honest answers are the same for all clients in all rounds.
    still = _experiment("DSFL", learning_rate=1e-30, dp_noise=1.0, num_server_rounds=2)
    exchanges = federate(still).exchanges[:2]
    answers = [e.answers([0, 1, 2]) for e in exchanges]
    rows = torch.cat([labels.values for labels in answers if isinstance(labels, SoftLabels)])
    assert rows.shape == (6, P, 10)
    different = (rows.unsqueeze(0) != rows.unsqueeze(1)).flatten(2).any(-1)
    assert torch.equal(different, ~torch.eye(6, dtype=torch.bool))


def test_a_codec_comes_after_the_noise() -> None:
    keys = {"dp_noise": 0.3, "seed": 11}
    full = federate(_experiment("DSFL", **keys)).exchanges[0].instructions[0]
    coded = federate(_experiment("DSFL", **keys).replace(codec="simplex:2")).exchanges
    noisy = federate(_experiment("DSFL", **keys)).exchanges[0].answers([0])
    assert isinstance(noisy, SoftLabels)
    packed = coded[0].replies[0]
    assert packed is not None
    codes = packed.content.array_records["knowledge"]["values"].numpy()
    wanted, _ = noisy.pack(coded[0].instructions[0].wire, P)
    assert np.array_equal(codes, wanted.arrays["values"].numpy())
    assert full.wire != coded[0].instructions[0].wire


def test_nothing_is_clipped_without_noise() -> None:
    answers = federate(_experiment("FedMD", learning_rate=0.1)).exchanges[0].answers([0, 1, 2])
    assert isinstance(answers, SoftLabels)
    assert answers.values.norm(dim=-1).max() > 1.0  # dp-clip
    with pytest.raises(FedkdError, match=r"dp-clip = 0.001 has no effect with dp-noise"):
        _experiment("FedMD", dp_clip=1e-3)


def test_all_sets_of_soft_labels_are_noised_apart() -> None:
    values = torch.zeros(2, N, C)
    labels = SoftLabels(values, "logits")
    noisy = privatise(labels, tiny(dp_noise=1.0), generator("x"))
    assert not bool((noisy.values[0] == noisy.values[1]).any())
    assert noisy.samples is labels.samples


def test_the_noise_of_a_node_is_nobodys_to_repeat(monkeypatch: pytest.MonkeyPatch) -> None:
    class Secret(Stack):
        def __post_init__(self) -> None:
            self.secret_noise = True
            super().__post_init__()

    seeded, again = (federate(_experiment("DSFL", dp_noise=0.5)) for _ in range(2))
    monkeypatch.setattr(client, "Stack", Secret)
    secret, another = (federate(_experiment("DSFL", dp_noise=0.5)) for _ in range(2))
    quiet = federate(_experiment("DSFL"))
    sent = []
    for finished in (seeded, again, secret, another, quiet):
        answers = finished.exchanges[0].answers([0, 1, 2])
        assert isinstance(answers, SoftLabels)
        sent.append(answers.values)
    assert torch.equal(sent[0], sent[1])
    for other in (sent[0], sent[3], sent[4]):
        assert not torch.equal(sent[2], other)


# --- Records and report ---------------------------------------------------------------------------


@pytest.mark.slow
def test_epsilon_is_in_the_record_and_in_the_report(tmp_path: Path) -> None:
    keys: dict[str, Any] = {
        "num_server_rounds": 3,
        "run_dir": str(tmp_path),
        "public_per_round": 11,
    }
    spent = {}
    for name, noise, delta in (("some", 7.0, 1e-4), ("none", 0.0, 1e-5), ("little", 1e-7, 1e-4)):
        run = fedkd.run(_experiment("DSFL", name=name, dp_noise=noise, dp_delta=delta, **keys))
        spent[name] = [*(row["epsilon"] for row in run.rounds), run.result["epsilon"]]
    assert spent["none"] == spent["little"] == [None] * 4
    rows = (11, 22, 33, 33)
    assert spent["some"] == [epsilon(noise=7.0, rows=each, delta=1e-4) for each in rows]
    page = fedkd.report(tmp_path / "some", tmp_path / "some.html").read_text(encoding="utf-8")
    assert f"soft labels of a client: DSFL ε = {spent['some'][-1]:.3g} at δ = 0.0001" in page
    page = fedkd.report(tmp_path / "little", tmp_path / "little.html").read_text(encoding="utf-8")
    assert "soft labels of a client: DSFL ε = ∞ at δ = 0.0001" in page
    page = fedkd.report(tmp_path / "none", tmp_path / "none.html").read_text(encoding="utf-8")
    assert "soft labels of a client" not in page


def test_the_rows_of_a_reply_that_is_refused_have_left_all_the_same() -> None:
    def refused(order: Any, message: Any, reply: Any) -> Any:
        return None if order.client == 1 else reply  # never arrives

    keys: dict[str, Any] = {"dp_noise": 7.0, "num_server_rounds": 2}
    silent = federate(_experiment("DSFL", **keys), meddle=refused).rows
    assert [list(row["dropped"]) for row in silent] == [["1"], ["1"]]
    rows = (P, 2 * P)
    assert [row["epsilon"] for row in silent] == [
        epsilon(noise=7.0, rows=each, delta=1e-5) for each in rows
    ]


@pytest.mark.parametrize("name", OTHER)
def test_strategies_without_soft_labels_are_refused_before_any_work(
    name: str, tmp_path: Path
) -> None:
    experiment = _experiment(name, dp_noise=1.0, run_dir=str(tmp_path / "runs")).replace(
        codec="auto"
    )
    with pytest.raises(
        FedkdError, match=f"^dp-noise = 1\\.0: {name} sends .*, to which no noise is added"
    ):
        fedkd.run(experiment)
    assert not (tmp_path / "runs").exists()


@pytest.mark.ray
@pytest.mark.slow
def test_noise_is_the_same_in_both_engines(tmp_path: Path) -> None:
    keys: dict[str, Any] = {"dp_noise": 0.4, "plan": "stacked", "run_dir": str(tmp_path)}
    runs = [
        fedkd.run(_experiment("FedMD", engine=engine, name=engine, **keys))
        for engine in ("cohort", "flower")
    ]
    told = [json.loads((run.path / "knowledge.jsonl").read_text("utf-8")) for run in runs]
    for mine, theirs in zip(*(each["by_class"] for each in told), strict=True):
        assert mine == pytest.approx(theirs, abs=1e-5)
    assert runs[0].client_accuracy == runs[1].client_accuracy
    assert runs[0].result["epsilon"] == runs[1].result["epsilon"] > 0
