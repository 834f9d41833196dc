"""Knowledge: masked means and weighted averages against loops, and what is refused."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import Tensor

from fedkd.errors import FedkdError
from fedkd.knowledge import (
    SIMPLEX_TOLERANCE,
    Knowledge,
    ModelWeights,
    SoftLabels,
    Space,
    Weights,
    check_answer,
)

K, N, C = 3, 5, 7
F64 = torch.float64
MASK = torch.tensor([[1, 1, 0, 0, 1], [1, 0, 0, 1, 1], [1, 1, 1, 0, 1]]).bool()
"""Sample 2 is answered by one client, sample 3 by another, sample 0 by all."""
SPACES: list[Space] = ["logits", "probabilities"]


def rand(*shape: int, seed: int = 1) -> Tensor:
    return 4 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def values_of(space: Space, *shape: int, seed: int = 1) -> Tensor:
    logits = rand(*shape, seed=seed)
    return logits if space == "logits" else logits.exp() / logits.exp().sum(-1, keepdim=True)


def softmax_loop(row: list[float]) -> list[float]:
    exponentials = [math.exp(v - max(row)) for v in row]
    return [e / math.fsum(exponentials) for e in exponentials]


def mean_loop(labels: SoftLabels, wanted: Space) -> list[list[float]]:
    """Mean over those who answered, sample by sample, in the space `wanted`."""
    means = []
    for n in range(N):
        rows = []
        for k in range(len(labels.values)):
            if not labels.mask[k, n]:
                continue
            row = labels.values[k, n].tolist()
            if labels.space != wanted:
                row = softmax_loop(row) if wanted == "probabilities" else [math.log(p) for p in row]
            rows.append(row)
        means.append([math.fsum(row[c] for row in rows) / len(rows) for c in range(C)])
    return means


# --- Soft labels: means --------------------------------------------------------------------------


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("mask", [None, MASK], ids=["all", "some"])
def test_means_are_those_of_a_loop_over_the_clients_that_answered(
    space: Space, mask: Tensor | None
) -> None:
    labels = SoftLabels(values_of(space, K, N, C), space, mask=mask)
    means = {"logits": labels.mean_logits(), "probabilities": labels.mean_probabilities()}
    for wanted in SPACES:
        mean = means[wanted]
        expected = torch.tensor(mean_loop(labels, wanted), dtype=F64)
        torch.testing.assert_close(mean, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_means_keep_the_type_and_the_input(dtype: torch.dtype) -> None:
    values = values_of("logits", K, N, C).to(dtype)
    before = values.clone()
    labels = SoftLabels(values, "logits", mask=MASK)
    assert labels.mean_logits().dtype == labels.mean_probabilities().dtype == dtype
    assert torch.equal(values, before)


def test_means_do_not_weigh_by_num_examples() -> None:
    values = values_of("probabilities", K, N, C)
    weighted = SoftLabels(values, "probabilities", num_examples=torch.tensor([1, 1000, 10]))
    plain = SoftLabels(values, "probabilities")
    assert torch.equal(weighted.mean_probabilities(), plain.mean_probabilities())


@pytest.mark.parametrize("space", SPACES)
def test_what_stands_where_a_client_did_not_answer_does_not_matter(space: Space) -> None:
    values = values_of(space, K, N, C)
    clean = SoftLabels(values, space, mask=MASK)
    dirty = SoftLabels(
        torch.where(MASK.unsqueeze(-1), values, values.new_tensor(math.nan)), space, mask=MASK
    )
    assert torch.equal(clean.mean_logits(), dirty.mean_logits())
    assert torch.equal(clean.mean_probabilities(), dirty.mean_probabilities())


# --- Soft labels: spaces -------------------------------------------------------------------------


def test_logits_of_probabilities_are_their_logarithms_and_back() -> None:
    probs = values_of("probabilities", K, N, C)
    labels = SoftLabels(probs, "probabilities")
    torch.testing.assert_close(labels.logits, probs.log(), rtol=1e-13, atol=0)
    back = SoftLabels(labels.logits, "logits").probabilities
    torch.testing.assert_close(back, probs, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_logits_of_one_hot_labels_are_finite_and_give_them_back(dtype: torch.dtype) -> None:
    one_hot = torch.eye(C, dtype=dtype).unsqueeze(0)
    logits = SoftLabels(one_hot, "probabilities").logits
    assert bool(logits.isfinite().all())
    torch.testing.assert_close(logits.softmax(-1), one_hot, rtol=0, atol=1e-37)


def test_probabilities_of_large_logits_are_finite_rows_that_sum_to_one() -> None:
    labels = SoftLabels(250 * rand(K, N, C).sign() * rand(K, N, C, seed=2).abs(), "logits")
    assert labels.values.abs().max() > 1e3
    torch.testing.assert_close(labels.probabilities.sum(-1), torch.ones(K, N, dtype=F64))


def test_values_are_given_as_they_are_in_their_own_space() -> None:
    for space in SPACES:
        labels = SoftLabels(values_of(space, K, N, C), space)
        own = labels.logits if space == "logits" else labels.probabilities
        assert torch.equal(own, labels.values)


# --- Soft labels: stacking, keeping, defaults ----------------------------------------------------


def partial(client: int, samples: list[int], **keys: Any) -> SoftLabels:
    return SoftLabels(
        values_of("logits", 1, len(samples), C, seed=client),
        "logits",
        torch.tensor(samples),
        torch.tensor([client]),
        torch.tensor([10 * client]),
        **keys,
    )


def test_stacked_partial_answers_stand_at_their_samples() -> None:
    answers = [partial(2, [11, 3, 5]), partial(4, [3, 29]), partial(9, [5, 2, 3, 11])]
    stacked = SoftLabels.stack(answers)
    assert stacked.samples.tolist() == [2, 3, 5, 11, 29]
    assert stacked.clients.tolist() == [2, 4, 9]
    assert stacked.num_examples.tolist() == [20, 40, 90]
    for k, answer in enumerate(answers):
        given = dict(zip(answer.samples.tolist(), answer.values[0], strict=True))
        for n, sample in enumerate(stacked.samples.tolist()):
            assert bool(stacked.mask[k, n]) == (sample in given)
            if sample in given:
                assert torch.equal(stacked.values[k, n], given[sample])
    mean = stacked.mean_logits()
    only_second = answers[1].values[0, 1]
    assert torch.equal(mean[4], only_second)


def test_a_sample_that_nobody_answered_does_not_appear() -> None:
    """Also where an answer lists it and says by its mask that it has none."""
    first = partial(0, [7, 2], mask=torch.tensor([[False, True]]))
    second = partial(1, [7, 5], mask=torch.tensor([[False, True]]))
    assert SoftLabels.stack([first, second]).samples.tolist() == [2, 5]


def test_stacking_one_answer_only_sorts_it() -> None:
    stacked = SoftLabels.stack([partial(3, [8, 1, 6])])
    assert stacked.samples.tolist() == [1, 6, 8]
    assert torch.equal(stacked.values[0], partial(3, [8, 1, 6]).values[0, [1, 2, 0]])
    assert bool(stacked.mask.all())


@pytest.mark.parametrize(
    "rows", [torch.tensor([4, 0, 2]), torch.tensor([True, False, True, False, True])]
)
def test_keep_keeps_rows_of_everything(rows: Tensor) -> None:
    labels = SoftLabels(
        values_of("logits", K, N, C),
        "logits",
        samples=torch.tensor([13, 2, 17, 5, 3]),
        clients=torch.tensor([1, 4, 6]),
        num_examples=torch.tensor([5, 9, 2]),
        mask=MASK,
        targets=torch.tensor([6, 0, 3, 2, 1]),
    )
    kept = labels.keep(rows)
    positions = rows.nonzero().flatten().tolist() if rows.dtype == torch.bool else rows.tolist()
    assert kept.samples.tolist() == [labels.samples.tolist()[n] for n in positions]
    assert kept.targets is not None
    assert kept.targets.tolist() == [[6, 0, 3, 2, 1][n] for n in positions]
    for i, n in enumerate(positions):
        assert torch.equal(kept.values[:, i], labels.values[:, n])
        assert torch.equal(kept.mask[:, i], labels.mask[:, n])
    assert kept.clients.tolist() == [1, 4, 6]
    assert kept.num_examples.tolist() == [5, 9, 2]
    assert kept.space == "logits"


def test_all_but_values_and_space_have_defaults() -> None:
    labels = SoftLabels(values_of("logits", K, N, C), "logits")
    assert labels.samples.tolist() == list(range(N))
    assert labels.clients.tolist() == list(range(K))
    assert labels.num_examples.tolist() == [1] * K
    assert labels.mask.shape == (K, N)
    assert bool(labels.mask.all())
    assert labels.targets is None


def test_shared_knowledge_has_one_client_axis() -> None:
    values, samples = values_of("logits", N, C), torch.tensor([9, 1, 4, 6, 2])
    labels = SoftLabels.shared(values, samples, "logits")
    assert torch.equal(labels.values, values.unsqueeze(0))
    assert torch.equal(labels.samples, samples)
    assert torch.equal(labels.mean_logits(), values)


def test_no_samples_are_no_error() -> None:
    labels = SoftLabels(torch.zeros(K, 0, C), "probabilities")
    assert labels.mean_logits().shape == labels.mean_probabilities().shape == (0, C)
    check_answer(labels)
    empty = SoftLabels(torch.zeros(1, 0, C), "probabilities")
    stacked = SoftLabels.stack([empty, SoftLabels(torch.zeros(1, 0, C), "probabilities")])
    assert stacked.values.shape == (2, 0, C)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"values": torch.zeros(N, C)}, r"\(5, 7\).*\[K, N, C\]"),
        ({"values": torch.zeros(1, K, N, C)}, r"\(1, 3, 5, 7\).*\[K, N, C\]"),
        ({"space": "probs"}, "'probs'.*'logits' or 'probabilities'"),
        ({"samples": torch.arange(N - 1)}, r"samples.*\(4,\).*\(5,\)"),
        ({"samples": torch.zeros(N, 1)}, r"samples.*\(5, 1\).*\(5,\)"),
        ({"clients": torch.arange(N)}, r"clients.*\(5,\).*\(3,\)"),
        ({"num_examples": torch.ones(1)}, r"num_examples.*\(1,\).*\(3,\)"),
        ({"mask": torch.ones(N, K).bool()}, r"mask.*\(5, 3\).*\(3, 5\)"),
        ({"targets": torch.zeros(C)}, r"targets.*\(7,\).*\(5,\)"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_shapes_that_do_not_fit_are_named(change: dict[str, Any], message: str) -> None:
    fitting: dict[str, Any] = {"values": torch.zeros(K, N, C), "space": "logits"}
    SoftLabels(**fitting)
    with pytest.raises(FedkdError, match=message):
        SoftLabels(**{**fitting, **change})


# --- Weights -------------------------------------------------------------------------------------

EXAMPLES = [2, 3, 5]


def model_weights(seed: int = 1, counters: tuple[int, ...] = (11, 4, 40)) -> ModelWeights:
    tensors = {
        "layer.weight": rand(K, 2, N, seed=seed).float(),
        "layer.bias": rand(K, C, seed=seed + 1),
        "scalar": rand(K, seed=seed + 2),
        "counter": torch.tensor(counters),
    }
    return ModelWeights(tensors, torch.tensor([0, 2, 6]), torch.tensor(EXAMPLES))


def exact_mean(entries: list[float], shares: list[int]) -> Fraction:
    """Return Σ n_k·w_k / Σ n_k without any rounding."""
    weighted = (n * Fraction(w) for n, w in zip(shares, entries, strict=True))
    return sum(weighted, Fraction(0)) / sum(shares)


def test_average_of_weights_is_that_of_exact_arithmetic() -> None:
    weights = model_weights()
    average = weights.average()
    for name in ("layer.weight", "layer.bias", "scalar"):
        stacked, mean = weights.tensors[name], average.tensors[name]
        assert mean.shape == (1, *stacked.shape[1:])
        assert mean.dtype == stacked.dtype
        for i, got in enumerate(mean.flatten().tolist()):
            expected = exact_mean(stacked.reshape(K, -1)[:, i].tolist(), EXAMPLES)
            tolerance = 4e-15 if stacked.dtype == F64 else 2.4e-7
            assert abs(float(Fraction(got) - expected)) <= tolerance * max(1.0, abs(got))


def test_average_of_a_counter_is_the_nearest_whole_number() -> None:
    for counters in ((11, 4, 40), (7, 7, 7), (-3, 0, 1), (10**9, 3, 10**9 + 1)):
        mean = model_weights(counters=counters).average().tensors["counter"]
        assert mean.dtype == torch.int64
        assert mean.tolist() == [round(exact_mean([float(c) for c in counters], EXAMPLES))]


def test_average_says_whose_examples_it_stands_for_and_leaves_its_input_alone() -> None:
    weights = model_weights()
    before = {name: tensor.clone() for name, tensor in weights.tensors.items()}
    average = weights.average()
    assert average.num_examples.tolist() == [sum(EXAMPLES)]
    assert average.clients.shape == (1,)
    for name, tensor in weights.tensors.items():
        assert torch.equal(tensor, before[name])


def test_weights_are_averaged_within_an_architecture_only() -> None:
    small, large = model_weights(1), model_weights(5)
    both = Weights({"small": small, "large": large}).average()
    assert list(both.by_model) == ["small", "large"]
    for name, alone in (("small", small), ("large", large)):
        assert torch.equal(
            both.by_model[name].tensors["layer.bias"], alone.average().tensors["layer.bias"]
        )
    assert list(both.only("large").by_model) == ["large"]


def test_weights_of_single_clients_stack_by_architecture() -> None:
    def answer(name: str, client: int, value: float) -> Weights:
        weights = ModelWeights(
            {"w": torch.full((1, 2), value)}, torch.tensor([client]), torch.tensor([client + 1])
        )
        return Weights({name: weights})

    stacked = Weights.stack([answer("a", 4, 1.0), answer("b", 2, 2.0), answer("a", 1, 3.0)])
    assert stacked.by_model["a"].tensors["w"].tolist() == [[1.0, 1.0], [3.0, 3.0]]
    assert stacked.by_model["a"].clients.tolist() == [4, 1]
    assert stacked.by_model["a"].num_examples.tolist() == [5, 2]
    assert stacked.by_model["b"].tensors["w"].tolist() == [[2.0, 2.0]]


# --- What is refused -----------------------------------------------------------------------------


def spoilt(space: Space, value: float) -> SoftLabels:
    values = values_of(space, K, N, C)
    values[1, 3, 6] = value
    return SoftLabels(values, space)


def off_simplex(by: float) -> SoftLabels:
    values = values_of("probabilities", K, N, C)
    values[2, 4, 0] += by
    return SoftLabels(values, "probabilities")


def spoilt_weights(name: str, value: float) -> Weights:
    weights = model_weights()
    weights.tensors[name][1] = value
    return Weights({"good": model_weights(3), "bad": weights})


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (spoilt("logits", math.nan), "NaN or infinity"),
        (spoilt("logits", math.inf), "NaN or infinity"),
        (spoilt("logits", -math.inf), "NaN or infinity"),
        (spoilt("probabilities", math.nan), "NaN or infinity"),
        (spoilt("probabilities", -1e-6), "negative probabilities"),
        (off_simplex(2 * SIMPLEX_TOLERANCE), "sums differ from 1 by 0.002"),
        (off_simplex(1.0), "sums differ from 1 by 1"),
        (SoftLabels(torch.zeros(K, N, C), "probabilities"), "sums differ from 1 by 1"),
        (spoilt_weights("layer.bias", math.nan), "NaN or infinity"),
        (spoilt_weights("layer.weight", -math.inf), "NaN or infinity"),
    ],
)
def test_poison_is_refused(answer: Knowledge, reason: str) -> None:
    with pytest.raises(FedkdError, match=reason):
        check_answer(answer)


@pytest.mark.parametrize(
    "answer",
    [
        spoilt("logits", -1e30),
        SoftLabels(-values_of("probabilities", K, N, C), "logits"),
        off_simplex(0.5 * SIMPLEX_TOLERANCE),
        SoftLabels(values_of("probabilities", K, N, C).half().float(), "probabilities"),
        SoftLabels(torch.eye(C).unsqueeze(0), "probabilities"),
        spoilt_weights("counter", -7),
    ],
)
def test_what_is_unusual_but_sound_passes(answer: Knowledge) -> None:
    check_answer(answer)
