"""Selective-FD: density ratios against closed forms, both selectors against loops of the paper."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from federation_tools import C as CLASSES
from federation_tools import Finished, P, federate, tiny
from numpy.typing import NDArray
from torch import Tensor

from fedkd.data.federated import federated_data
from fedkd.errors import FedkdError
from fedkd.federation.server import Replies, Server
from fedkd.knowledge import SoftLabels
from fedkd.phases import (
    Apply,
    Digest,
    LocalClient,
    Predict,
    Revisit,
    from_text,
    resolve_procedure,
    to_text,
)
from fedkd.randomness import generator
from strategies.selectivefd import SelectiveFD, density_ratio, kulsif

K, N, C = 3, 5, 7
F64 = torch.float64
MASK = torch.tensor([[1, 1, 0, 0, 1], [1, 0, 0, 1, 1], [1, 1, 1, 0, 1]]).bool()
SAMPLES = torch.tensor([2, 3, 11, 5, 7])

Floats = NDArray[np.float64]


def rand(*shape: int, seed: int = 1) -> Tensor:
    return 3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


# --- The density ratio ---------------------------------------------------------------------------


def gauss(x: Floats, y: Floats, sigma: float) -> Floats:
    """exp(−‖x − y‖² / 2σ²), entry by entry."""
    rows = [[math.exp(-(math.dist(a, b) ** 2) / (2 * sigma**2)) for b in y] for a in x]
    return np.array(rows)


def minimiser(at: Floats, own: Floats, noise: Floats, sigma: float, ridge: float) -> Floats:
    """Minimise ½ mean w(q)² − mean w(p) + ½ λ‖w‖² over all coefficients of w = Σ β_i k(·, s_i).

    s are all points together; the gradient (Kₛq Kqₛ / n + λ Kₛₛ) β − Kₛp 1 / m is set to 0 at once,
    where the paper knows half of β beforehand.
    """
    points = np.concatenate([noise, own])
    to_noise, to_own = gauss(points, noise, sigma), gauss(points, own, sigma)
    system = to_noise @ to_noise.T / len(noise) + ridge * gauss(points, points, sigma)
    beta: Floats = np.linalg.lstsq(system, to_own.mean(1), rcond=None)[0]
    values: Floats = gauss(at, points, sigma) @ beta
    return values


@pytest.mark.parametrize("ridge", [0.01, 0.3])
@pytest.mark.parametrize("sigma", [0.7, 2.0])
@pytest.mark.parametrize(("m", "n"), [(5, 7), (11, 3), (1, 5)])
def test_the_ratio_minimises_the_paper_s_objective(
    m: int, n: int, sigma: float, ridge: float
) -> None:
    at, own, noise = rand(13, 2, seed=1), rand(m, 2, seed=2) / 3, rand(n, 2, seed=3)
    expected = minimiser(at.numpy(), own.numpy(), noise.numpy(), sigma, ridge)
    got = kulsif(at, own, noise, sigma, ridge)
    assert got.dtype == F64
    np.testing.assert_allclose(got.numpy(), expected, rtol=1e-6, atol=1e-8)


def demonstration(at: Tensor, own: Tensor, noise: Tensor, sigma: float, ridge: float) -> Tensor:
    """The authors' code, which multiplies by the matrix of the system instead of solving it."""
    kernel = [torch.from_numpy(gauss(x.numpy(), noise.numpy(), sigma)) for x in (noise, own, at)]
    system = kernel[0] / len(noise) + ridge * torch.eye(len(noise), dtype=F64)
    alpha = -system @ kernel[1].sum(0) / (len(noise) * len(own) * ridge)
    mean = torch.from_numpy(gauss(at.numpy(), own.numpy(), sigma)).mean(1)
    return kernel[2] @ alpha + mean / ridge


@pytest.mark.parametrize("case", ["uniform", "normal"])
def test_a_known_ratio_is_found(case: str) -> None:
    """Uniform on half of the other's range: 2 there, else 0. Normal in normal: σ_q/σ_p exp(…)."""
    draw, m, n = torch.Generator().manual_seed(1), 701, 503
    if case == "uniform":
        own = torch.rand(m, 1, generator=draw, dtype=F64)
        noise = 2 * torch.rand(n, 1, generator=draw, dtype=F64)
        at = torch.tensor([0.2, 0.4, 0.6, 0.8, 1.2, 1.4, 1.6, 1.8], dtype=F64).unsqueeze(1)
        true, sigma = torch.tensor([2.0] * 4 + [0.0] * 4, dtype=F64), 0.1
    else:
        own = 0.5 * torch.randn(m, 1, generator=draw, dtype=F64)
        noise = torch.randn(n, 1, generator=draw, dtype=F64)
        at = torch.linspace(-1.5, 1.5, 13, dtype=F64).unsqueeze(1)
        true, sigma = (2 * torch.exp(-1.5 * at**2))[:, 0], 0.5
    found = kulsif(at, own, noise, sigma, 0.005)
    assert float((found - true).abs().mean()) < 0.2
    assert float((demonstration(at, own, noise, sigma, 0.005) - true).abs().mean()) > 10


def test_many_points_are_worked_out_in_parts() -> None:
    at, own, noise = rand(2500, 2).float(), rand(5, 2, seed=2), rand(7, 2, seed=3)
    whole = kulsif(at, own, noise, 2.0, 0.1)
    assert whole.shape == (2500,)
    for i in (0, 1023, 1024, 2499):
        torch.testing.assert_close(kulsif(at[i : i + 1], own, noise, 2.0, 0.1)[0], whole[i])
    assert kulsif(at[:0], own, noise, 2.0, 0.1).shape == (0,)


# --- The client's selector -----------------------------------------------------------------------

SETTINGS: dict[str, Any] = {
    "images": 11,
    "width": 0.3,
    "ridge": 0.1,
    "quantile": 0.25,
    "least": 3,
}


def pictures(kind: int, count: int, seed: int) -> Tensor:
    """Return images of noise around one of two patterns, ``[count, 2, 3, 3]``."""
    pattern = rand(2, 3, 3, seed=100 + kind).float()
    generator = torch.Generator().manual_seed(seed)
    return pattern + 0.5 * torch.randn(count, 2, 3, 3, generator=generator)


def client_of(images: Tensor, public: Tensor, seed: int = 1) -> LocalClient:
    return LocalClient(
        images=images,
        labels=torch.zeros(len(images), dtype=torch.int64),
        load_public=lambda: public,
        received=None,
        state={},
        predict=lambda samples, model="student": torch.zeros(len(samples), C),
        generator=lambda purpose: generator(seed, purpose),
    )


def familiar_to(private: Tensor, public: Tensor, **settings: Any) -> Tensor:
    client = client_of(private, public)
    density_ratio(client, **{**SETTINGS, **settings})
    (found,) = client.state.values()
    assert found.dtype == torch.bool
    assert found.shape == (len(public),)
    return client.state["familiar"]


def familiar_loop(private: Tensor, public: Tensor, **settings: Any) -> list[bool]:
    """The selector once more, image by image, with the same draws."""
    s = {**SETTINGS, **settings}
    draw = generator(1, "density ratio")
    order = torch.randperm(len(private), generator=draw)[: 2 * s["images"]].tolist()
    noise = torch.rand(s["images"], 2, 3, 3, generator=draw)
    for channel in range(2):
        seen = [float(v) for i in order for v in private[i, channel].flatten()]
        noise[:, channel] = min(seen) + (max(seen) - min(seen)) * noise[:, channel]
    others = torch.randperm(len(public), generator=draw)[: s["images"]].tolist()
    flat = private.double().flatten(1).numpy()
    there = public.double().flatten(1).numpy()
    half = -(-len(order) // 2)
    fitted, held_out = flat[order[:half]], flat[order[half:] or order]
    distances = sorted(math.dist(a, b) for a in fitted for b in there[others])
    sigma = s["width"] * distances[(len(distances) - 1) // 2]
    against = noise.double().flatten(1).numpy()
    own = minimiser(held_out, fitted, against, sigma, s["ridge"])
    ratios = minimiser(there, fitted, against, sigma, s["ridge"])
    threshold = float(np.quantile(own, s["quantile"]))
    top = sorted(range(len(there)), key=lambda i: -ratios[i])[: s["least"]]
    return [bool(r > threshold) or i in top for i, r in enumerate(ratios)]


@pytest.mark.parametrize("count", [1, 2, 3, 17, 31])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"quantile": 0.8, "least": 1, "width": 0.15},
        {"quantile": 0.5, "least": 1, "width": 1.5, "images": 7},
        {"quantile": 0.7, "least": 1, "width": 3.0, "ridge": 0.001},
    ],
    ids=str,
)
def test_familiar_are_samples_with_a_ratio_like_that_of_own_images(
    settings: dict[str, Any], count: int
) -> None:
    images = pictures(0, count, seed=1)
    public = torch.cat([pictures(0, 59, seed=2), pictures(1, 38, seed=3)])
    public[:, 1] *= 3  # channels have ranges of their own
    images[:, 1] *= 3
    found = familiar_to(images, public, **settings)
    assert found.tolist() == familiar_loop(images, public, **settings)


def test_it_tells_own_classes_from_others() -> None:
    images = pictures(0, 40, seed=1)
    public = torch.cat([pictures(0, 100, seed=2), pictures(1, 100, seed=3)])
    found = familiar_to(images, public, images=250, quantile=0.1, width=0.5)
    assert int(found[:100].sum()) > 75
    assert int(found[100:].sum()) == 0
    both = torch.cat([images, pictures(1, 40, seed=4)])
    found = familiar_to(both, public, images=250, quantile=0.1, width=0.5)
    assert int(found[100:].sum()) > 75


def test_the_quantile_says_how_choosy_it_is() -> None:
    images, public = pictures(0, 40, seed=1), pictures(0, 97, seed=2)
    counts = [int(familiar_to(images, public, quantile=q).sum()) for q in (0, 0.25, 0.5, 0.75, 1)]
    assert counts == sorted(counts, reverse=True)
    assert counts[0] > 80
    assert counts[-1] < 30


@pytest.mark.parametrize(("least", "wanted"), [(1, 1), (5, 5), (17, 17), (100, 17)])
def test_nobody_is_silent(least: int, wanted: int) -> None:
    """Where nothing looks familiar, the most familiar are answered."""
    images, public = pictures(0, 40, seed=1), pictures(1, 17, seed=3)
    assert int(familiar_to(images, public, least=least, quantile=1).sum()) == wanted


def test_it_is_found_out_once() -> None:
    images, public = pictures(0, 20, seed=1), pictures(0, 17, seed=2)
    client = client_of(images, public)
    density_ratio(client, **SETTINGS)
    first = client.state["familiar"].clone()

    def refuse(purpose: str) -> torch.Generator:
        raise AssertionError(purpose)

    later = client_of(pictures(1, 20, seed=5), public)
    later.state, later.generator = client.state, refuse
    density_ratio(later, **SETTINGS)
    assert torch.equal(later.state["familiar"], first)


@pytest.mark.parametrize("last", [True, False])
def test_images_that_are_all_the_same_are_familiar_to_themselves(last: bool) -> None:
    """No range for noise, no distance, no kernel width, no ratio above another's."""
    same = torch.full((6, 2, 3, 3), 0.5)
    assert int(familiar_to(same, same, least=1).sum()) == 1
    parts = pictures(0, 5, seed=1), same.repeat(2, 1, 1, 1)
    found = familiar_to(same, torch.cat(parts if last else parts[::-1]), least=3)
    assert int(found.sum()) == int(found[5:].sum() if last else found[:12].sum()) == 3


# --- The server's selector -----------------------------------------------------------------------


def answers(mask: Tensor | None = None, seed: int = 1) -> SoftLabels:
    mask = torch.ones(K, N).bool() if mask is None else mask
    values = rand(K, N, C, seed=seed).softmax(-1) * mask.unsqueeze(-1)
    return SoftLabels(values, "probabilities", SAMPLES, mask=mask)


def server() -> Server:
    """Return a server that this strategy must not look at."""
    return None  # type: ignore[return-value]


def updated(strategy: SelectiveFD, given: SoftLabels) -> SoftLabels | None:
    return strategy.update(Replies(given.clients.tolist(), given), server())


def mean_loop(given: SoftLabels) -> list[list[float]]:
    rows = []
    for n in range(len(given.samples)):
        said = [given.values[k, n].tolist() for k in range(len(given.values)) if given.mask[k, n]]
        columns = zip(*said, strict=True)
        rows.append([math.fsum(column) / len(said) for column in columns])
    return rows


@pytest.mark.parametrize("mask", [None, MASK], ids=["all", "some"])
def test_the_ensemble_is_the_mean_of_who_answered(mask: Tensor | None) -> None:
    given = answers(mask)
    if mask is not None:
        given = given.keep(mask.any(0))
    expected = torch.tensor(mean_loop(given), dtype=F64)
    torch.testing.assert_close(SelectiveFD().aggregate(given), expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("form", ["soft", "hard"])
@pytest.mark.parametrize("ambiguity", [0.9, 1.0, 1.3, 1.4, 2.0])
@pytest.mark.parametrize("mask", [None, MASK], ids=["all", "some"])
def test_ambiguous_samples_are_dropped(mask: Tensor | None, ambiguity: float, form: Any) -> None:
    given = answers(mask, seed=5)
    rows, samples = [], []
    for n, row in enumerate(mean_loop(given)):
        best = row.index(max(row))
        hard = [float(c == best) for c in range(C)]
        if math.fsum(abs(a - b) for a, b in zip(row, hard, strict=True)) <= ambiguity:
            rows.append(row if form == "soft" else hard)
            samples.append(int(SAMPLES[n]))
    sent = updated(SelectiveFD(ambiguity=ambiguity, labels=form), given)
    if not rows:
        assert sent is None
        return
    assert sent is not None
    assert (len(sent.values), sent.space) == (1, "probabilities")
    assert sent.samples.tolist() == samples
    expected = torch.tensor(rows, dtype=F64)
    torch.testing.assert_close(sent.values[0], expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("form", ["soft", "hard"])
def test_a_sample_that_nobody_answered_is_not_passed_on(form: Any) -> None:
    """Its mean is a row of zeros, at distance 1 from any label: nearer than half of the others."""
    mask = torch.ones(K, N).bool()
    mask[:, 1] = mask[:, 3] = False
    sent = updated(SelectiveFD(ambiguity=2, labels=form), answers(mask))
    assert sent is not None
    assert sent.samples.tolist() == SAMPLES[[0, 2, 4]].tolist()
    torch.testing.assert_close(sent.values.sum(-1), torch.ones(1, 3, dtype=F64))
    nobody = answers(torch.zeros(K, N).bool())
    assert updated(SelectiveFD(ambiguity=2, labels=form), nobody) is None


def test_there_are_rows_on_both_sides_of_the_thresholds() -> None:
    distances = [2 * (1 - max(row)) for row in mean_loop(answers(seed=5))]
    assert 0.9 < min(distances) < 1 < 1.3 < 1.4 < max(distances) < 2


@pytest.mark.parametrize(("ambiguity", "passes"), [(1.0, True), (0.99, False)])
def test_an_exact_tie_is_at_distance_one_and_the_first_class_wins(
    ambiguity: float, passes: bool
) -> None:
    values = torch.zeros(2, 1, C, dtype=F64)
    values[0, 0, 5] = values[1, 0, 2] = 1
    given = SoftLabels(values, "probabilities")
    sent = updated(SelectiveFD(ambiguity=ambiguity, labels="hard"), given)
    assert (sent is not None) == passes
    if sent is not None:
        assert sent.values[0, 0].tolist() == [0, 0, 1, 0, 0, 0, 0]


def test_one_hot_answers_that_agree_pass_any_threshold() -> None:
    """And classes that nobody names keep nothing."""
    values = torch.eye(C, dtype=F64)[[0, 3, 3, 6, 0]].expand(K, N, C)
    sent = updated(SelectiveFD(ambiguity=0), SoftLabels(values, "probabilities"))
    assert sent is not None
    assert torch.equal(sent.values[0], values[0])


def test_one_client_gets_its_own_unambiguous_answers_back() -> None:
    given = answers(seed=5)
    alone = SoftLabels(given.values[1:2], "probabilities", SAMPLES)
    sent = updated(SelectiveFD(ambiguity=2), alone)
    assert sent is not None
    assert torch.equal(sent.values, alone.values)
    assert torch.equal(sent.samples, SAMPLES)


def test_answers_for_no_samples_leave_the_last_knowledge() -> None:
    nothing = SoftLabels(torch.zeros(K, 0, C), "probabilities")
    assert SelectiveFD().aggregate(nothing).shape == (0, C)
    assert updated(SelectiveFD(), nothing) is None


def test_a_robust_rule_takes_the_place_of_the_mean() -> None:
    given = answers()
    median = SelectiveFD(combine="median").aggregate(given)
    middle = given.values.median(0).values
    torch.testing.assert_close(median, middle / middle.sum(-1, keepdim=True))


def test_logits_are_refused_as_its_rule_is_for_probabilities() -> None:
    with pytest.raises(FedkdError, match="probabilities"):
        SelectiveFD().aggregate(SoftLabels(rand(K, N, C), "logits"))


@pytest.mark.parametrize(
    "settings",
    [
        {"width": 0.0},
        {"ridge": -1.0},
        {"quantile": 1.5},
        {"ambiguity": 2.1},
        {"ambiguity": math.nan},
        {"images": 0},
        {"least": 0},
        {"labels": "warm"},
    ],
    ids=str,
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any]) -> None:
    ((name, _),) = settings.items()
    with pytest.raises(FedkdError, match=name):
        SelectiveFD(**settings)


# --- In a federation -----------------------------------------------------------------------------


def test_its_phases_travel_and_name_what_a_client_allows() -> None:
    phases = SelectiveFD(images=13, least=2).phases(1)
    select = phases[0]
    assert isinstance(select, Apply)
    assert phases[1:] == [Digest(), Revisit(), Predict("probabilities", only="familiar")]
    assert list(from_text(to_text(phases))) == phases
    assert resolve_procedure(str(select.procedure)) is density_ratio
    assert select.numbers == {
        "images": 13,
        "width": 0.15,
        "ridge": 250**-0.5,
        "quantile": 0.25,
        "least": 2,
    }


def familiar_in(run: Finished, number: int, client: int) -> set[int]:
    """Return the samples that a client answered in a round."""
    answer = run.exchanges[number - 1].report(client).answer
    assert isinstance(answer, SoftLabels)
    assert bool(answer.mask.all())
    return set(answer.samples.tolist())


def test_clients_answer_what_is_familiar_round_after_round() -> None:
    """And the server passes on what is not ambiguous of it."""
    experiment, strategy = tiny(num_server_rounds=3), SelectiveFD(images=20, least=2, ambiguity=1.6)
    data, run = federated_data(experiment), federate(experiment, strategy=strategy)
    assert [row["dropped"] for row in run.rows] == [{}] * 3
    found = []
    for k, shard in enumerate(data.shards):
        client = client_of(data.train.batch(shard), data.public.batch(torch.arange(P)))
        client.generator = lambda purpose, k=k: generator(  # type: ignore[misc]
            experiment.seed, k, 1, "apply 0", purpose
        )
        density_ratio(
            client, **{**SETTINGS, "images": 20, "least": 2, "width": 0.15, "ridge": 250**-0.5}
        )
        found.append(set(client.state["familiar"].nonzero()[:, 0].tolist()))
        assert 2 <= len(found[-1]) < P
        assert [familiar_in(run, n, k) for n in (1, 2, 3)] == [found[-1]] * 3
    assert found[0] != found[1]
    for exchange, later in zip(run.exchanges, run.exchanges[1:], strict=False):
        said = exchange.answers([0, 1, 2])
        assert isinstance(said, SoftLabels)
        mean = said.mean_probabilities()
        sure = 2 * (1 - mean.amax(-1)) <= 1.6
        received = later.instructions[0].knowledge
        if bool(sure.any()):
            assert isinstance(received, SoftLabels)
            assert received.samples.tolist() == said.samples[sure].tolist()


@pytest.mark.parametrize("few", [None, 11])
def test_it_moves_no_more_bytes_than_it_declares(few: int | None) -> None:
    """Exactly: the values of who answered what, and a list or a bitmap of it."""
    experiment = tiny(num_server_rounds=3, public_per_round=few)
    run = federate(experiment, strategy=SelectiveFD(images=20, least=2, ambiguity=2))
    asked = few or P
    sizes = {"P": asked, "C": CLASSES, "I": 0 if few is None else min(4 * few, math.ceil(P / 8))}
    up, down = (
        eval(formula.removeprefix("<="), {}, sizes)
        for formula in (SelectiveFD.facts.up, SelectiveFD.facts.down)
    )
    for number, row in enumerate(run.rows, 1):
        assert row["dropped"] == {}
        answered = [len(familiar_in(run, number, k)) for k in range(K)]
        lists = [min(4 * n, math.ceil(P / 8)) if n < asked else 0 for n in answered]
        assert row["bytes_up_by_client"] == [
            n * CLASSES * 4 + listed for n, listed in zip(answered, lists, strict=True)
        ]
        assert max(row["bytes_up_by_client"]) <= up
        assert max(row["bytes_down_by_client"]) <= down
    assert run.rows[0]["bytes_up"] < K * asked * CLASSES * 4


def test_a_client_that_finds_nothing_familiar_among_the_drawn_answers_none() -> None:
    """It is not dropped for that."""
    experiment = tiny(num_server_rounds=4, public_per_round=3)
    run = federate(experiment, strategy=SelectiveFD(images=20, least=1, quantile=1, ambiguity=2))
    assert [row["dropped"] for row in run.rows] == [{}] * 4
    counts = [len(familiar_in(run, n, k)) for n in (1, 2, 3, 4) for k in range(K)]
    assert min(counts) == 0


def test_one_by_one_clients_find_the_same_familiar() -> None:
    stacked, looped = (
        federate(tiny(num_server_rounds=2, plan=plan), strategy=SelectiveFD(images=20, least=2))
        for plan in ("auto", "loop")
    )
    for number in (1, 2):
        for k in range(K):
            assert familiar_in(stacked, number, k) == familiar_in(looped, number, k)


def test_it_needs_no_labels_of_the_public_set() -> None:
    run = federate(tiny(num_server_rounds=2, public_labels=False), strategy=SelectiveFD(least=2))
    assert [row["dropped"] for row in run.rows] == [{}] * 2
