"""Fits against a plain PyTorch loop: optimisers, terms, dropout, and what is told of a fit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache, partial

import pytest
import torch
from plain_training import (
    ALPHA,
    F64,
    LANES_2,
    LEARNING_RATE,
    LOOP,
    MODELS,
    OPTIMIZERS,
    PLANS,
    SEVEN,
    SIZES,
    STACKED_1,
    STACKED_2,
    STACKED_ALL,
    TAU,
    B,
    C,
    Dropping,
    N,
    Name,
    NumpyDropout,
    PlainSide,
    assert_equal_states,
    batches,
    cohort_of,
    distilling_loss,
    fit,
    fresh,
    hard_loss,
    images,
    inputs,
    is_normed,
    optimizer_of,
    plain,
    plain_optimizer,
    plan_name,
    private_stream,
    shard,
    soft_labels,
    start,
    stream,
    train_plainly,
)
from sampling import one_in
from torch import Tensor, nn
from torch.nn import functional as F

from fedkd.errors import FedkdError
from fedkd.losses import Step, ce, kl, term
from fedkd.training.batches import BatchStream
from fedkd.training.cohort import Cohort
from fedkd.training.fit import NORM_EVERY, Fitted
from fedkd.training.parameters import State
from fedkd.training.plans import Plan

SEVEN_NORMED = [0, 1, 2, 7, 4, 5, 6]
"""With 3 images for 1, of which batch normalisation cannot learn; 17 and 9 have a last batch of one."""

# --- Hard labels: architectures, optimisers, plans, K --------------------------------------------


def cases() -> Iterator[tuple[str, Name, Plan]]:
    """Yield all combinations for nets that are cheap, and for the others each plan and optimiser."""
    for model in ("mlp", "small-cnn"):
        yield from ((model, name, plan) for name in OPTIMIZERS for plan in PLANS)
    for model in ("cnn", "resnet"):
        yield from ((model, "adam", plan) for plan in (STACKED_1, STACKED_2, LOOP))
        yield model, "sgd", STACKED_ALL
        yield model, "adamw", LOOP


@pytest.mark.parametrize(("model", "name", "plan"), one_in(2, cases()), ids=plan_name)
def test_each_of_seven_clients_equals_a_plain_loop(model: str, name: Name, plan: Plan) -> None:
    clients = SEVEN_NORMED if model == "resnet" else SEVEN
    cohort = cohort_of(MODELS[model], clients, plan)

    losses = fit(cohort, clients, [private_stream(clients)], name)

    for i, k in enumerate(clients):
        expected, loss = plain(model, name, k)
        assert set(cohort.state(i)) == set(expected)
        assert_equal_states(cohort.state(i), expected, 1e-9)
        assert float(losses[i]) == pytest.approx(loss, abs=1e-9)
        before = start(MODELS[model], k)
        assert max(float((expected[n] - t).abs().max()) for n, t in before.items()) > 1e-5


@pytest.mark.parametrize("clients", [[1], [2, 0, 1], [6, 4, 1]], ids=str)
@pytest.mark.parametrize("plan", [STACKED_2, LOOP], ids=plan_name)
@pytest.mark.parametrize("model", ["mlp", "small-cnn", "resnet"])
def test_so_do_cohorts_of_one_and_three(model: str, plan: Plan, clients: list[int]) -> None:
    cohort = cohort_of(MODELS[model], clients, plan)
    fit(cohort, clients, [private_stream(clients)])
    assert len(cohort) == len(clients)
    for i, k in enumerate(clients):
        assert_equal_states(cohort.state(i), plain(model, "adam", k)[0], 1e-9)


@pytest.mark.parametrize("plan", PLANS, ids=plan_name)
def test_a_dense_net_in_float32_equals_a_plain_loop(plan: Plan) -> None:
    clients = SEVEN
    cohort = cohort_of(MODELS["mlp"], clients, plan, torch.float32)
    fit(cohort, clients, [private_stream(clients, torch.float32)])
    for k in clients:
        module = fresh(MODELS["mlp"], k, torch.float32)
        batch_stream = PlainSide("private", shard(k), hard_loss)
        expected, _ = train_plainly(module, k, [batch_stream], dtype=torch.float32)
        # Adam makes a step of the learning rate of a gradient that is nothing but rounding.
        assert_equal_states(cohort.state(k), expected, 5e-5)


@pytest.mark.parametrize("plan", [STACKED_ALL, LOOP], ids=plan_name)
def test_every_fit_starts_with_a_fresh_optimiser_and_in_training_mode(plan: Plan) -> None:
    clients, build = [1, 0, 4], MODELS["normed"]
    cohort = cohort_of(build, clients, plan)
    fit(cohort, clients, [private_stream(clients)], epochs=2)
    cohort.predict(images())
    fit(cohort, clients, [private_stream(clients)], epochs=1)
    for i, k in enumerate(clients):
        module = fresh(build, k)
        batch_stream = PlainSide("private", shard(k), hard_loss)
        train_plainly(module, k, [batch_stream], epochs=2)
        expected, _ = train_plainly(module, k, [batch_stream], epochs=1)
        assert_equal_states(cohort.state(i), expected, 1e-9)


# --- Terms of a user's own -----------------------------------------------------------------------


@term(needs=None, needs_start=True)
def proximal(step: Step) -> Tensor:
    """FedProx's μ/2·‖w − w₀‖²: one number a step, whatever the size of the batch."""
    assert step.start is not None
    squares = [(step.params[n] - step.start[n]).square().sum() for n in step.params]
    return step.numbers["mu"] / 2 * torch.stack(squares).sum()


def tethered_loss(
    model: nn.Module, x: Tensor, y: Tensor, _: Tensor, first: Sequence[Tensor], strength: float
) -> Tensor:
    pairs = zip(model.parameters(), first, strict=True)
    distance = torch.stack([(p - f).square().sum() for p, f in pairs]).sum()
    return F.cross_entropy(model(x), y) + strength * distance


@pytest.mark.parametrize("plan", [STACKED_2, LOOP], ids=plan_name)
def test_a_term_of_one_number_is_added_once_and_knows_the_start(plan: Plan) -> None:
    clients, build = [0, 1, 6], MODELS["mlp"]
    mu = torch.tensor([0.1, 3.0, 1.0], dtype=F64)
    coefficient = torch.tensor([1.0, 0.5, 2.0], dtype=F64)
    rows = [shard(k) for k in clients]
    cohort = cohort_of(build, clients, plan)
    batch_stream = BatchStream("private", images(), rows, {ce: 1.0, proximal: coefficient})

    fit(cohort, clients, [batch_stream], numbers={"mu": mu})

    for i, k in enumerate(clients):
        module = fresh(build, k)
        first = [p.detach().clone() for p in module.parameters()]
        strength = float(mu[i] / 2 * coefficient[i])
        loss = partial(tethered_loss, first=first, strength=strength)
        expected, _ = train_plainly(module, k, [PlainSide("private", shard(k), loss)])
        assert_equal_states(cohort.state(i), expected, 1e-9)


# --- Dropout -------------------------------------------------------------------------------------


@pytest.mark.parametrize("plan", [STACKED_2, STACKED_ALL, LOOP], ids=plan_name)
def test_dropout_nets_equal_a_plain_loop_with_masks_of_its_own(plan: Plan) -> None:
    clients = [0, 1, 6]

    def build() -> nn.Module:
        return Dropping(nn.Dropout(0.5))

    cohort = cohort_of(build, clients, plan)
    fit(cohort, clients, [private_stream(clients)])

    for i, k in enumerate(clients):
        module = fresh(lambda: Dropping(NumpyDropout(0.5, call=0), NumpyDropout(0.3, call=1)), k)
        for dropout in module.modules():
            if isinstance(dropout, NumpyDropout):
                dropout.k = k
        expected, _ = train_plainly(module, k, [PlainSide("private", shard(k), hard_loss)])
        assert_equal_states(cohort.state(i), expected, 1e-9)


@pytest.mark.parametrize("plan", [STACKED_ALL, LOOP], ids=plan_name)
def test_training_neither_reads_nor_moves_the_global_generator(plan: Plan) -> None:
    results = []
    for seed in (1, 2):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            cohort = cohort_of(lambda: Dropping(nn.Dropout(0.5)), [0, 1], plan)
            before = torch.get_rng_state()
            fit(cohort, [0, 1], [private_stream([0, 1])], epochs=1)
            assert torch.equal(torch.get_rng_state(), before)
            results.append(cohort.state(1))
    assert all(torch.equal(results[0][n], t) for n, t in results[1].items())


class Noisy(nn.Module):
    """Noise drawn where no rule for a name of ``torch.nn.functional`` can see it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, C)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(1)
        return self.layer(flat + flat.new_empty(flat.shape).normal_())  # type: ignore[no-any-return]


@pytest.mark.parametrize("plan", [STACKED_ALL, LOOP], ids=plan_name)
def test_models_that_draw_otherwise_are_refused(plan: Plan) -> None:
    cohort = cohort_of(Noisy, [0, 1], plan)
    with pytest.raises(FedkdError, match="cannot be keyed"):
        fit(cohort, [0, 1], [private_stream([0, 1])], epochs=1)


# --- What is told of a fit -----------------------------------------------------------------------


EPOCHS_OF = [3, 1, 2, 5, 1, 2, 4]
TAUGHT_BY = [1, 0, 1, 2, 2, 0, 1]
"""Seven students of three teachers."""


@dataclass
class Told:
    """What a plain loop has to tell of a client: losses and gradient norms, step by step."""

    state: State
    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)


@cache
def told_plainly(model: str, name: Name, k: int) -> Told:
    """Distil teacher `TAUGHT_BY[k]` into client k for `EPOCHS_OF[k]` epochs."""
    module = fresh(MODELS[model], k)
    optimizer = plain_optimizer(name, module.parameters(), float(LEARNING_RATE[k]))
    batch_stream = PlainSide(
        "public", shard(k), partial(distilling_loss, k=k), soft_labels(3, N)[TAUGHT_BY[k]]
    )
    normed = is_normed(module)
    drawn, told = batches(batch_stream, k, F64, normed), Told({})
    module.train()
    for _ in range(EPOCHS_OF[k] * (-(-SIZES[k] // B) - (normed and SIZES[k] % B == 1))):
        optimizer.zero_grad()
        loss = batch_stream.loss(module, *next(drawn))
        grads = torch.autograd.grad(loss, list(module.parameters()))
        told.norms.append(float(torch.cat([grad.flatten() for grad in grads]).norm()))
        for parameter, grad in zip(module.parameters(), grads, strict=True):
            parameter.grad = grad
        optimizer.step()
        told.losses.append(float(loss.detach()))
    told.state = {n: t.detach() for n, t in module.state_dict().items()}
    return told


def distilled(
    model: str, name: Name, clients: Sequence[int], plan: Plan, dtype: torch.dtype = F64
) -> tuple[Cohort, Fitted]:
    """Distil three teachers into some of the seven clients, each with numbers of its own."""
    cohort, index = cohort_of(MODELS[model], clients, plan, dtype), torch.tensor(clients)
    batch_stream = BatchStream(
        "public",
        images(dtype),
        [shard(k) for k in clients],
        {kl: ALPHA[index], ce: 1 - ALPHA[index]},
        soft_labels(3, N).to(dtype),
        torch.tensor(TAUGHT_BY)[index],
    )
    fitted = cohort.fit(
        [batch_stream],
        epochs=[EPOCHS_OF[k] for k in clients],
        batch_size=B,
        optimizer=optimizer_of(name, clients),
        streams=[stream(k) for k in clients],
        numbers={"tau": TAU[index]},
    )
    return cohort, fitted


@pytest.mark.parametrize("plan", PLANS, ids=plan_name)
@pytest.mark.parametrize(
    ("model", "name"), [("mlp", "adam"), ("mlp", "sgd"), ("normed", "adamw"), ("small-cnn", "sgd")]
)
def test_students_of_different_teachers_and_epochs_equal_plain_loops(
    model: str, name: Name, plan: Plan
) -> None:
    clients = [3, 1, 6, 0, 5, 4, 2]
    clients = [k for k in clients if not (model == "normed" and SIZES[k] == 1)]
    cohort, fitted = distilled(model, name, clients, plan)
    most = max(len(told_plainly(model, name, k).losses) for k in clients)
    assert fitted.loss_by_step.shape == (len(clients), most)
    assert fitted.gradient_norm_by_step.shape == (len(clients), -(-most // NORM_EVERY))
    for i, k in enumerate(clients):
        told = told_plainly(model, name, k)
        steps = len(told.losses)
        assert_equal_states(cohort.state(i), told.state, 1e-9)
        assert fitted.loss_by_step[i, :steps].tolist() == pytest.approx(told.losses, abs=1e-9)
        assert bool(fitted.loss_by_step[i, steps:].isnan().all())
        measured = told.norms[::NORM_EVERY]
        given = fitted.gradient_norm_by_step[i]
        assert given[: len(measured)].tolist() == pytest.approx(measured, rel=1e-7)
        assert bool(given[len(measured) :].isnan().all())
        assert float(fitted.losses[i]) == pytest.approx(sum(told.losses) / steps, abs=1e-9)
        mean = sum(measured) / len(measured)
        assert float(fitted.gradient_norms[i]) == pytest.approx(mean, rel=1e-7)
        assert mean > 1e-3


@pytest.mark.parametrize("name", ["adam", "sgd"])
def test_what_is_told_of_a_dense_client_does_not_depend_on_the_others(name: Name) -> None:
    """To the last bit, in float32: steps, losses and norms."""
    _, together = distilled("mlp", name, SEVEN, STACKED_ALL, torch.float32)
    for clients, plan in (
        *(([k], STACKED_1) for k in SEVEN),
        ([6, 2, 4], STACKED_ALL),
        ([6, 5, 4, 3, 2, 1, 0], STACKED_2),
        ([6, 5, 4, 3, 2, 1, 0], LANES_2),
    ):
        _, fitted = distilled("mlp", name, clients, plan, torch.float32)
        for i, k in enumerate(clients):
            steps = len(told_plainly("mlp", name, k).losses)
            for of, length in (("loss_by_step", steps), ("gradient_norm_by_step", -(-steps // 8))):
                given, expected = getattr(fitted, of)[i], getattr(together, of)[k]
                assert torch.equal(given[:length], expected[:length]), (of, clients, k)
            assert float(fitted.losses[i]) == float(together.losses[k])
            assert float(fitted.gradient_norms[i]) == float(together.gradient_norms[k])


def test_a_convolutional_client_is_told_the_same_one_by_one() -> None:
    _, together = distilled("small-cnn", "adam", [0, 1, 2], LOOP, torch.float32)
    _, alone = distilled("small-cnn", "adam", [1], LOOP, torch.float32)
    assert float(alone.gradient_norms[0]) == float(together.gradient_norms[1])
    assert float(alone.losses[0]) == float(together.losses[1])


class _Scaled(nn.Module):
    """A net with a parameter of no dimension, as a learnt temperature is, and one that is not used."""

    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.Linear(64, C)
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.unused = nn.Parameter(torch.ones(5))
        self.frozen = nn.Parameter(torch.ones(()), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        z: Tensor = self.frozen * self.scale * self.dense(x.flatten(1))
        return z


@pytest.mark.parametrize("plan", [STACKED_ALL, LOOP], ids=plan_name)
def test_a_parameter_may_be_a_number_or_have_no_part_in_the_loss(plan: Plan) -> None:
    clients = [2, 0, 4]
    cohort = cohort_of(_Scaled, clients, plan)
    fitted = cohort.fit(
        [private_stream(clients)],
        epochs=1,
        batch_size=B,
        optimizer=optimizer_of("sgd", clients),
        streams=[stream(k) for k in clients],
    )
    for i, k in enumerate(clients):
        batch_stream = PlainSide("private", shard(k), hard_loss)
        module = fresh(_Scaled, k)
        assert isinstance(module, _Scaled)
        x, y, _ = next(batches(batch_stream, k, F64))
        used = [module.dense.weight, module.dense.bias, module.scale]
        grads = torch.autograd.grad(hard_loss(module, x, y, x), used)
        norm = torch.cat([grad.flatten() for grad in grads]).norm()
        assert float(fitted.gradient_norm_by_step[i, 0]) == pytest.approx(float(norm), rel=1e-9)
        expected, _ = train_plainly(module, k, [batch_stream], "sgd", epochs=1)
        assert_equal_states(cohort.state(i), expected, 1e-9)


@pytest.mark.parametrize("plan", [STACKED_2, LOOP, LANES_2], ids=plan_name)
@pytest.mark.parametrize("model", ["mlp", "normed"])
def test_answers_are_the_largest_probability_and_its_class(model: str, plan: Plan) -> None:
    clients = [4, 1, 2]
    cohort = cohort_of(MODELS[model], clients, plan)
    fit(cohort, clients, [private_stream(clients)])
    classes, confidences = cohort.answer(images())
    for i in range(3):
        module = MODELS[model]().to(F64).eval()
        module.load_state_dict(cohort.state(i))
        p = module(inputs()).softmax(-1)
        assert torch.equal(classes[i].long(), p.argmax(-1))
        torch.testing.assert_close(confidences[i], p.max(-1).values.detach(), rtol=0, atol=1e-12)
    assert torch.equal(classes, cohort.classify(images()))


def test_answers_of_extreme_models_are_certain_and_finite() -> None:
    cohort = cohort_of(MODELS["linear"], [0, 1], STACKED_2, torch.float32)
    for tensor in cohort.params.values():
        tensor *= 1e6
    classes, confidences = cohort.answer(images(torch.float32))
    assert bool(confidences.isfinite().all())
    assert float(confidences.median()) == 1
    assert torch.equal(classes, cohort.classify(images(torch.float32)))
